"""[checkpoint]: when checkpoints are saved, how, and which are kept."""

from typing import Literal

from megacpt.config.base import PositiveInt, Section


class Checkpoint(Section, heading="[checkpoint]", resume="free"):
    """When checkpoints are saved, how, and which are kept."""

    every_steps: PositiveInt = 500
    """Number of steps between two checkpoints. The last step is always saved. Lower it where an interruption would cost more than the
    writing."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints that are kept; older ones are removed."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this number of steps are never removed. By default none is kept for good."""
    publish: Literal["rename", "manifest"] = "rename"
    """How a finished save becomes a checkpoint: by one `rename` of its folder, or by its `manifest`, which is written last. Take the latter
    on an object store behind a file system, where a rename is no single act."""
    asynchronous: bool = False
    """Write checkpoints in the background: training waits only while the tensors are copied to host memory, which must hold them."""

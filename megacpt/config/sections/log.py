"""[log]: console, TensorBoard, MFU."""

from typing import Annotated

from megacpt.config.base import NoneAsWord, Positive, PositiveInt, Section


class Log(Section, heading="[log]", resume="free"):
    """What is shown of the run while it goes."""

    every_steps: PositiveInt = 1
    """Number of steps between two lines on the console. metrics.jsonl and TensorBoard hold every step."""
    tensorboard: bool = True
    """Write TensorBoard files to `tb/` in the run directory."""
    peak_tflops: Annotated[Positive | None, NoneAsWord("auto")] = None
    """Dense peak of one device in TFLOP/s, of which MFU is a share. `auto` takes it from the device's data sheet, on a CPU from a measured
    matrix product."""

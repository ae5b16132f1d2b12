"""The recipe as one frozen model, composed of its sections. The reference page and the schema are made from here.

Token quantities are integers or strings (`quantity.parse_tokens`). "auto" and "keep" are read as None: decided later
from the world size, the device or the checkpoint.
"""

from typing import Annotated

from pydantic import Field

from megacpt.config.base import Name, OnResume, Section
from megacpt.config.sections.checkpoint import Checkpoint
from megacpt.config.sections.data import Domain, Packing
from megacpt.config.sections.gates import Gate
from megacpt.config.sections.health import Health
from megacpt.config.sections.kernels import Kernels
from megacpt.config.sections.log import Log
from megacpt.config.sections.mixture import MixtureRules
from megacpt.config.sections.model import Model
from megacpt.config.sections.objective import Objective
from megacpt.config.sections.optimizer import Optimizer
from megacpt.config.sections.parallel import Parallel
from megacpt.config.sections.precision import Precision
from megacpt.config.sections.profile import Profile
from megacpt.config.sections.run import Run
from megacpt.config.sections.stage import Stage
from megacpt.config.sections.validation import Validation


class Recipe(Section):
    """One run. The sections stand in the order of the work: what, from what, where, how, on which data, when."""

    run: Run
    """What the run is called, where it writes and how it starts. Required."""
    model: Model
    """The model that is trained, and its tokenizer. Required."""
    parallel: Parallel = Parallel()
    """How the ranks share the model and the data. By default all of them are data-parallel."""
    precision: Precision = Precision()
    """Types of the computation, and how often gradients are reduced."""
    optimizer: Optimizer = Optimizer()
    """AdamW, its learning rate over the run, and the clipping of gradients."""
    objective: Annotated[Objective, OnResume("frozen")] = Objective()
    """The loss, and what it is divided by."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are saved, how, and which of them are kept."""
    data: dict[Name, Domain]
    """Domains of prepared data, by name. Required."""
    packing: Packing = Packing()
    """How documents become rows, and where the indices of the rows are kept."""
    mixture: MixtureRules = MixtureRules()
    """Groups of domains, and whether their weights follow the validation losses."""
    gates: dict[Name, Gate] = {}
    """Gates, by name, which stages ask at their ends. By default there are none."""
    validation: list[Validation] = []
    """Validations on held-out documents. By default there are none."""
    stages: list[Stage] = Field(min_length=1)
    """Stages of the run, one after another. At least one is required."""
    kernels: Kernels = Kernels()
    """Which implementation computes attention, the other operations and the optimizer."""
    health: Health = Health()
    """Timeouts, the spike rule, rollbacks, and comparisons between ranks."""
    log: Log = Log()
    """The console, TensorBoard, and the peak that MFU refers to."""
    profile: Profile = Profile()
    """Traces of some steps. By default nothing is traced."""

    @property
    def directory(self) -> str:
        return self.run.directory or f"runs/{self.run.name}"

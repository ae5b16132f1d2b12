"""What is known of a run before a process starts, as data: `check` prints it, and planner and reports read it. Imports no torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from megacpt.config.layout import Layout
from megacpt.errors import Problem
from megacpt.plan.memory import Peak


@dataclass(frozen=True)
class ModelFacts:
    """The shape that is trained."""

    parameters: int
    layers: int
    vocabulary: int
    padded_vocabulary: int
    rope_type: str
    rope_theta: float


@dataclass(frozen=True)
class ScheduleFacts:
    """A pipeline's step with so many micro-batches, as simulated.

    Attributes:
        bubble: idle time over busy time.
        peak_activations: most activations that a rank keeps, in pipeline stages times micro-batches.
    """

    micro_batches: int
    bubble: float
    peak_activations: int


@dataclass(frozen=True)
class ReductionFacts:
    """What the reduction of gradients costs a rank, in GiB.

    Attributes:
        chosen: "step" or "micro_batch".
        kept_gib: memory of whole gradients, which "step" keeps.
        step_gib: sent in a step by "step". micro_batch_gib: sent by "micro_batch" in the step with the most micro-batches.
    """

    chosen: str
    kept_gib: float
    step_gib: float
    micro_batch_gib: float


@dataclass(frozen=True)
class LayoutFacts:
    """A layout that some stages share.

    Attributes:
        key: of the recipe, that names it.
        pp_layers: layers of each pipeline stage; empty without a pipeline, and where the model is not known.
    """

    key: str
    layout: Layout
    schedule: str = ""
    pp_layers: tuple[int, ...] = ()
    schedules: tuple[ScheduleFacts, ...] = ()
    reduction: ReductionFacts | None = None


@dataclass(frozen=True)
class StageFacts:
    """A stage on the token clock, and its largest step on its layout.

    Attributes:
        tokens: whole steps. batch_tokens: of a step, in the order of the ramp.
        micro_batches: of the last step. rows: of the last step, without filling.
        micro_batch_rows: rows of one micro-batch on all data ranks together.
        objective: in words, where it is not the default.
        trained: parameters that it trains, and those that have masters and moments; None without `freeze`.
        memory: the fullest moment of its fullest rank; None where the model is not known.
    """

    name: str
    tokens: int
    steps: int
    batch_tokens: tuple[int, ...]
    seq_len: int
    layout: Layout
    micro_batch_tokens: int
    micro_batches: int
    micro_batch_rows: int
    rows: int
    first_rate: float
    last_rate: float
    objective: str | None
    gates: tuple[str, ...]
    on_fail: str
    trained: tuple[int, int] | None
    memory: Peak | None

    @property
    def filling(self) -> float:
        """Share of the last step's micro-batch rows that hold no label."""
        return 1 - self.rows / (self.micro_batches * self.micro_batch_rows)


@dataclass(frozen=True)
class CurriculumFacts:
    """The order of a domain's documents."""

    by: str
    buckets: int
    ascending: bool


@dataclass(frozen=True)
class DomainFacts:
    """A domain and what the stages take of it.

    Attributes:
        tokens: that it has; None where files were not read.
        taken: tokens, by the stages' mixtures.
    """

    name: str
    tokens: int | None
    taken: float
    curriculum: CurriculumFacts | None

    @property
    def epochs(self) -> float | None:
        return None if self.tokens is None else self.taken / max(1, self.tokens)


@dataclass(frozen=True)
class Facts:
    """A run, resolved. None for the model where its shape is not known."""

    name: str
    directory: str
    start: str
    seed: int
    world_size: int
    model: ModelFacts | None
    layouts: tuple[LayoutFacts, ...]
    stages: tuple[StageFacts, ...]
    domains: tuple[DomainFacts, ...]
    tokens: int
    steps: int


@dataclass
class Report:
    """What `check` found. There are facts only where there are no problems."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    facts: Facts | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

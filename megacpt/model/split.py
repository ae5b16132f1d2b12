"""Which layers and which stage a rank runs. Imports no torch.

The embedding and the head count as layers (Llama 3, arXiv 2407.21783, section 3.3.2: the first and the last stage have one
layer less), by weights that can be set.
"""

from dataclasses import dataclass
from functools import lru_cache

from megacpt.config.sections.parallel import Parallel
from megacpt.family.base import Parameter
from megacpt.parallel.pipeline.schedule import Schedule, looped, make_schedule, v_shape, virtual_stages_of


@dataclass(frozen=True)
class PipelinePlan:
    """Attributes:
    layers: of each stage. placement: the rank of each stage.
    """

    layers: tuple[range, ...]
    placement: tuple[int, ...]
    name: str = "1f1b"
    ranks: int = 1
    virtual: int = 1
    contiguous: int | None = None
    max_in_flight: int | None = None

    def of(self, rank: int) -> list[int]:
        """The stages of a rank."""
        return [stage for stage, owner in enumerate(self.placement) if owner == rank]

    @property
    def splits_ends(self) -> bool:
        """Whether the first and the last stage are on different ranks."""
        return self.placement[0] != self.placement[-1]

    def stage_of(self, parameter: Parameter) -> int:
        """The first stage that computes with a parameter."""
        if parameter.layer is None:
            return 0 if parameter.role == "lookup" else len(self.layers) - 1
        return next(stage for stage, layers in enumerate(self.layers) if parameter.layer in layers)

    def schedule(self, micro_batches: int, first_trained: int = 0) -> Schedule:
        """Args:
        first_trained: the first stage of which a parameter is trained.
        """
        return _schedule(self, micro_batches, first_trained)


@lru_cache(64)
def _schedule(plan: PipelinePlan, micro_batches: int, first_trained: int) -> Schedule:
    whole = make_schedule(plan.name, plan.ranks, plan.virtual, micro_batches, plan.contiguous, plan.max_in_flight)
    return whole.trained_from(first_trained)


def plan_pipeline(num_layers: int, parallel: Parallel) -> PipelinePlan:
    """The plan of `[parallel]`.

    Raises:
        ValueError: if the layers cannot be split so, with the numbers and the key's name.
    """
    name, ranks, virtual = parallel.schedule_name, parallel.pipeline, parallel.virtual_stages
    if virtual != virtual_stages_of(name, virtual):
        other = "interleaved" if name == "1f1b" else "zb-v" if virtual == 2 else "interleaved"
        raise ValueError(
            f'virtual_stages = {virtual}: schedule "{name}" has {virtual_stages_of(name, virtual)} a rank. Set that, or '
            f'schedule = "{other}".'
        )
    stages = ranks * virtual
    most = f"At most {num_layers + 2} stages, of which the first and the last may have none."
    if stages > num_layers + 2:
        raise ValueError(
            f"pipeline {ranks} x virtual_stages {virtual} = {stages} stages: {num_layers} layers leave stages without one. {most}"
        )
    if parallel.stage_layers is None:
        counts = split_layers(num_layers, stages, parallel.embedding_weight, parallel.head_weight)
    else:
        counts = list(parallel.stage_layers)
        if len(counts) != stages or sum(counts) != num_layers:
            raise ValueError(
                f"stage_layers = {counts}: {len(counts)} stages with {sum(counts)} layers; pipeline {ranks} x virtual_stages "
                f"{virtual} are {stages} stages, and the model has {num_layers} layers."
            )
    empty = [stage for stage in range(1, stages - 1) if counts[stage] == 0]
    if empty:
        raise ValueError(
            f"pipeline {ranks} x virtual_stages {virtual} = {stages} stages: {num_layers} layers leave stage {empty[0]} with none. "
            f"{most}"
        )
    edges = [sum(counts[:stage]) for stage in range(stages + 1)]
    layers = tuple(range(edges[s], edges[s + 1]) for s in range(stages))
    place = v_shape(ranks) if name == "zb-v" else looped(ranks, virtual)
    return PipelinePlan(layers, place, name, ranks, virtual, parallel.contiguous_micro_batches, parallel.max_in_flight)


def split_layers(num_layers: int, stages: int, embedding_weight: float, head_weight: float) -> list[int]:
    """Layers of each stage so that the heaviest is as light as can be; ties go to later stages, which keep less in flight."""
    loads = [0.0] * stages
    loads[0] += embedding_weight
    loads[-1] += head_weight
    counts = [0] * stages
    for _ in range(num_layers):
        stage = min(reversed(range(stages)), key=lambda s: loads[s])
        loads[stage] += 1
        counts[stage] += 1
    return counts


def stage_weights(plan: PipelinePlan, parallel: Parallel) -> list[float]:
    """Time of each stage in layers."""
    weights = [float(len(layers)) for layers in plan.layers]
    weights[0] += parallel.embedding_weight
    weights[-1] += parallel.head_weight
    return weights

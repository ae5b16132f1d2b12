"""[parallel]: how the ranks share the model and the data, and what a stage may change of it."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from megacpt.config.base import KeptWord, NoneAsWord, NotNegative, NotNegativeInt, PositiveInt, Section, Tokens
from megacpt.config.layout import resolve_layout
from megacpt.config.merge import layouts_of
from megacpt.errors import Problem

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class Parallel(Section, heading="[parallel]", resume="free"):
    """How the ranks share the model and the data. Any two layouts compute the same."""

    tensor: PositiveInt = 1
    """Number of ranks that share each weight matrix (tensor parallelism with sequence parallelism). Raise it, up to the GPUs of one node,
    when a layer's weights or activations do not fit."""
    context: PositiveInt = 1
    """Number of ranks that share the tokens of each row (context parallelism). Raise it when a long row does not fit."""
    pipeline: PositiveInt = 1
    """Number of ranks among which the layers are divided (pipeline parallelism). Raise it when the model does not fit in the other ways, or
    the network between nodes is slow."""
    virtual_stages: PositiveInt = 1
    """Number of pipeline stages on each rank. More of them shorten the pipeline's idle time and send more messages."""
    schedule: Annotated[Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] | None, NoneAsWord("auto")] = None
    """Order of the pipeline's work. `auto` takes `1f1b` with one stage on each rank and `interleaved` with several. `zb-h1` and `zb-v`
    compute the gradients of the weights apart and fill idle time with them."""
    contiguous_micro_batches: PositiveInt | None = None
    """Only with `interleaved`: number of micro-batches that a pipeline stage runs one after another. By default it is the pipeline degree;
    more of them hide messages and keep more activations."""
    max_in_flight: PositiveInt | None = None
    """Upper bound on the activations that a rank keeps for the pipeline, in stages times micro-batches. By default there is none; set it to
    save memory at the price of idle time."""
    stage_layers: list[NotNegativeInt] | None = None
    """Number of layers of each pipeline stage, from the first to the last. By default the layers are divided so that the heaviest stage is
    as light as possible, with embedding and head counted by `embedding_weight` and `head_weight`."""
    embedding_weight: NotNegative = 1.0
    """Cost of the embedding in layers, where the pipeline's layers are divided."""
    head_weight: NotNegative = 1.0
    """Cost of head and loss in layers, where the pipeline's layers are divided. Raise it for a large vocabulary over small layers."""
    data_replicate: PositiveInt = 1
    """Number of replicas of the sharded model (HSDP). Raise it to keep FSDP's gathers inside a part of the cluster."""
    data_shard: Annotated[PositiveInt | None, NoneAsWord("auto")] = None
    """Number of data-parallel ranks over which FSDP shards weights, gradients and optimizer state. `auto` is the world size divided by the
    other degrees."""
    micro_batch_tokens: Tokens | None = None
    """Number of tokens that one data-parallel rank runs at once, a multiple of the stage's `seq_len`. By default it is one row; raise it
    while memory lasts if the rows are short."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of the activations is kept for backward: `none` keeps all; `selective` keeps the outputs of matrix products and attention and
    recomputes the rest; `full` keeps the input of each block and recomputes the block."""
    reshard_after_forward: Annotated[bool | None, NoneAsWord("auto")] = None
    """Whether FSDP frees a block's gathered weights between forward and backward. `auto` does so except under pipeline parallelism, as
    Llama 3 did. `false` saves one gather for each block and micro-batch."""
    prefetch: NotNegativeInt = 1
    """Number of blocks whose weights FSDP gathers ahead of the computation. Raise it where gathers are not hidden and memory is left."""
    overlap: Literal["none", "chunked", "symmetric_memory"] = "none"
    """How forward hides the collectives of tensor parallelism behind matrix products. `chunked` cuts them in pieces; `symmetric_memory`
    needs GPUs that share memory (NVLink)."""

    @property
    def tokens_at_once(self) -> int:
        """`micro_batch_tokens` of a stage's layout, in which one row is filled in where the recipe gives none (merge.parallel_in)."""
        assert self.micro_batch_tokens is not None, "a layout that no stage was merged into"
        return self.micro_batch_tokens

    @property
    def schedule_name(self) -> str:
        return self.schedule or ("1f1b" if self.virtual_stages == 1 else "interleaved")


def _of_a_stage(name: str, field: FieldInfo) -> Any:
    """A key of `[parallel]` as a stage may have it: optional, where None says that it is not given; so a word is kept."""
    metadata = [KeptWord(item.word) if isinstance(item, NoneAsWord) else item for item in field.metadata]
    kind = Annotated[field.annotation, *metadata] if metadata else field.annotation
    text = f"`parallel.{name}` for this stage alone; by default the value of `[parallel]` holds. {field.description}"
    return Annotated[kind | None, Field(description=text)], None


if TYPE_CHECKING:

    class StageParallel(Section):
        """Every key of `Parallel`, optional; made below."""
else:
    StageParallel = create_model(
        "StageParallel",
        __base__=Section,
        __module__=__name__,
        __doc__="Keys of `[parallel]` that a stage has of its own. A stage with another layout begins with a checkpoint, from which all "
        "ranks go on under the new layout.",
        __cls_kwargs__={"heading": "parallel (in a stage)"},
        **{name: _of_a_stage(name, field) for name, field in Parallel.model_fields.items()},
    )


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    found = []
    for key, parallel in layouts_of(recipe).items():
        try:
            resolve_layout(parallel, world_size)
        except ValueError as error:
            found.append(Problem(key, None, str(error)))
        name, contiguous, where = (
            parallel.schedule_name,
            parallel.contiguous_micro_batches,
            f"{key}.contiguous_micro_batches",
        )
        if contiguous and name != "interleaved":
            text = f'belongs to schedule = "interleaved"; schedule is "{name}".'
            found.append(Problem(where, contiguous, text, "Remove it, or change the schedule."))
        elif contiguous and contiguous < parallel.pipeline:
            text = f"must be at least parallel.pipeline = {parallel.pipeline}, or ranks wait for each other."
            found.append(Problem(where, contiguous, text, "Raise it or remove it."))
    return found

"""The recipe as frozen models: every key, its default and its one-line meaning. The reference page is made from here.

Token quantities are integers or strings (`quantity.parse_tokens`). "auto" and "keep" are read as None: decided later
from the world size, the device or the checkpoint.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, WithJsonSchema
from pydantic_core import core_schema

from megacpt.config.quantity import parse_tokens

Tokens = Annotated[
    int,
    BeforeValidator(parse_tokens),
    WithJsonSchema({"type": ["integer", "string"], "pattern": "^[0-9][0-9_]*(\\.[0-9]+)? *(K|M|B|T|Ki|Mi|Gi|Ti)?$"}),
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]
DType = Literal["bfloat16", "float32", "float64"]


class _OrWord:
    """A value that a word may stand for: the word is read as None."""

    def __init__(self, word: str):
        self.word = word

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(lambda v: None if v == self.word else v, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core)
        choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
        return {"anyOf": [*choices, {"const": self.word}]}


class Section(BaseModel):
    """Strict: no coercion. Frozen. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Run(Section):
    name: Name
    """Name of the run; its directory is `runs/NAME` unless `directory` says otherwise."""
    directory: str | None = None
    """Where everything of the run is written. Relative to the working directory."""
    start: Literal["auto", "scratch", "pretrained", "resume"] = "auto"
    """auto resumes when the run directory holds a sound checkpoint, else starts as `[model]` says."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Seed of the data order and of a model made from scratch."""
    stop_at_step: int | None = Field(None, ge=0)
    """Save and leave after this step, as after a stop request. 0 imports the model, saves it and leaves."""


class Rope(Section):
    theta: float | None = Field(None, gt=0)
    """Base of the rotary frequencies. Default: the checkpoint's."""
    type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """Scaling rule. Default: the checkpoint's."""
    factor: float | None = Field(None, ge=1)
    """Scaling factor."""
    original_max_position_embeddings: Count | None = None
    """Context length before scaling."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original / low are divided by the factor."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original / high stay."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: factor on cos and sin. Default: 0.1 ln(factor) + 1."""
    beta_fast: float | None = Field(None, gt=0)
    """yarn: rotations above which a dimension is not interpolated. Default 32."""
    beta_slow: float | None = Field(None, gt=0)
    """yarn: rotations below which a dimension is fully interpolated. Default 1."""


RopeChoice = Annotated[Rope | None, _OrWord("keep")]


class Model(Section):
    pretrained: str | None = None
    """Hugging Face directory to continue from (config.json, safetensors, tokenizer)."""
    config: str | None = None
    """config.json of a model to train from scratch."""
    architecture: str | None = None
    """Named shape to train from scratch: llama3.2-1b, llama3.2-3b, llama3.1-8b, llama3.1-70b, llama3.1-405b."""
    expect: str | None = None
    """Named shape that `pretrained` must have. `check --no-files` then checks the layout against it."""
    tokenizer: str | None = None
    """Tokenizer directory, needed from scratch. Default: the one of `pretrained`."""
    vocab_multiple: Count = 128
    """The vocabulary is padded to a multiple of this inside the trainer, never in an export."""
    rope: RopeChoice = None
    """Change of the rotary embedding for the whole run, or "keep"."""


class Parallel(Section):
    tensor: Count = 1
    """Ranks that share each matrix, with sequence parallelism."""
    context: Count = 1
    """Ranks that share each sequence."""
    pipeline: Count = 1
    """Ranks that share the layers."""
    virtual_stages: Count = 1
    """Pipeline stages a rank."""
    schedule: Annotated[Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] | None, _OrWord("auto")] = None
    """Order of the pipeline's work. auto: 1f1b with one stage a rank, else interleaved. zb-h1 and zb-v split backward."""
    contiguous_micro_batches: Count | None = None
    """interleaved: micro-batches that a stage runs one after another (N). Default: the pipeline degree."""
    max_in_flight: Count | None = None
    """Bound on the stage activations that a rank keeps, in stages times micro-batches."""
    stage_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers of each stage. Default: balanced, with the embedding and the head counted as below."""
    embedding_weight: float = Field(1.0, ge=0)
    """What the embedding counts in the split, in layers."""
    head_weight: float = Field(1.0, ge=0)
    """What head and loss count in the split, in layers."""
    data_replicate: Count = 1
    """Replicas of the sharded model (HSDP)."""
    data_shard: Annotated[Count | None, _OrWord("auto")] = None
    """Ranks over which FSDP shards; "auto" is the world size over the other degrees."""
    micro_batch_tokens: Tokens | None = None
    """Tokens that one data-parallel rank runs at once. Default: one row of `seq_len`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """selective keeps the outputs of matrix products and attention; full keeps the input of each block."""
    reshard_after_forward: Annotated[bool | None, _OrWord("auto")] = None
    """Whether FSDP frees a block's weights between forward and backward. auto: not under pipeline, as in Llama 3."""
    prefetch: int = Field(1, ge=0)
    """Blocks whose weights FSDP gathers ahead."""
    overlap: Literal["none", "chunked", "symmetric_memory"] = "none"
    """How forward hides the collectives of tensor parallelism. symmetric_memory needs GPUs that share memory (NVLink)."""

    @property
    def schedule_name(self) -> str:
        return self.schedule or ("1f1b" if self.virtual_stages == 1 else "interleaved")


class Precision(Section):
    compute: Annotated[DType | None, _OrWord("auto")] = None
    """Type of activations and matrix products. auto: bfloat16 on a GPU, float32 on a CPU. Masters are at least fp32."""
    reduce: Literal["auto", "step", "micro_batch"] = "auto"
    """When gradients are reduced: once a step (memory) or every micro-batch (traffic). auto: step under pipeline."""


class LearningRate(Section):
    shape: Literal["constant", "cosine", "linear", "wsd"]
    """Course after the warm-up. wsd: constant, then a tail of `decay_tokens`."""
    peak: float = Field(gt=0)
    """Learning rate after the warm-up."""
    min: float = Field(0.0, ge=0)
    """Learning rate at the last token (not for constant)."""
    warmup_tokens: Tokens = 0
    """Linear warm-up from 0."""
    decay_tokens: Tokens | None = None
    """wsd: length of the tail."""
    tail: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """wsd: shape of the tail."""


class Optimizer(Section):
    lr: LearningRate | None = None
    """Learning rate over the whole run. Or one in every stage, not both."""
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay, on matrices only."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Bound of the global gradient norm."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the moments. bfloat16 halves their memory; it is rounded stochastically, with the same bits on every layout. (A run in
    float64 keeps them in float64.)"""


class Checkpoint(Section):
    every_steps: Count = 500
    """Interval of saves. The last step is always saved."""
    keep_last: Count = 2
    """Newest checkpoints kept."""
    keep_every_steps: Count | None = None
    """Checkpoints at multiples of this stay for good."""


class Domain(Section):
    paths: list[str] = Field(min_length=1)
    """Prefixes of prepared data (PREFIX.bin, .idx, .json); globs of prefixes are sorted by number."""
    holdout_documents: int = Field(0, ge=0)
    """Documents kept for validation and never trained on."""
    min_tokens: int | None = Field(None, ge=0)
    """Only documents of at least this length."""
    max_tokens: Count | None = None
    """Only documents of at most this length."""


class Packing(Section):
    method: Literal["best_fit", "concatenate"] = "best_fit"
    """best_fit cuts only documents longer than a row; concatenate fills every row and cuts where it must."""
    directory: str = "runs/.packing"
    """Where packing indices are kept, by content."""


class Validation(Section):
    domains: list[str] = Field(min_length=1)
    """One loss each, from the domain's held-out documents."""
    every_tokens: Tokens | None = None
    """Interval. Always also before the first and after the last step."""
    max_tokens: Tokens | None = None
    """At most this many tokens of each domain."""


class StageParallel(Section):
    """Keys of `[parallel]` that a stage has of its own. A stage with another layout begins with a checkpoint, from which all
    ranks go on under the new one."""

    tensor: Count | None = None
    """As in `[parallel]`, for this stage."""
    context: Count | None = None
    """As in `[parallel]`, for this stage."""
    pipeline: Count | None = None
    """As in `[parallel]`, for this stage."""
    virtual_stages: Count | None = None
    """As in `[parallel]`, for this stage."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] | None = None
    """As in `[parallel]`, for this stage."""
    contiguous_micro_batches: Count | None = None
    """As in `[parallel]`, for this stage."""
    max_in_flight: Count | None = None
    """As in `[parallel]`, for this stage."""
    stage_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """As in `[parallel]`, for this stage."""
    data_replicate: Count | None = None
    """As in `[parallel]`, for this stage."""
    data_shard: Count | None = None
    """As in `[parallel]`, for this stage."""
    micro_batch_tokens: Tokens | None = None
    """As in `[parallel]`, for this stage."""
    activation_checkpointing: Literal["none", "selective", "full"] | None = None
    """As in `[parallel]`, for this stage."""
    reshard_after_forward: bool | None = None
    """As in `[parallel]`, for this stage."""
    overlap: Literal["none", "chunked", "symmetric_memory"] | None = None
    """As in `[parallel]`, for this stage."""


def _ramp(value: Any) -> Any:
    """8192 or "4Mi" -> ((0, tokens),); [["0", "2Mi"], ["2B", "4Mi"]] -> pairs of (position, tokens)."""
    if not isinstance(value, list | tuple):
        return ((0, parse_tokens(value)),)
    if not value or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value):
        raise ValueError(
            'write a token quantity, or pairs [position, tokens], for example [["0", "2Mi"], ["2B", "4Mi"]]'
        )
    pairs = tuple((parse_tokens(at), parse_tokens(tokens)) for at, tokens in value)
    positions = [at for at, _ in pairs]
    if positions[0] != 0 or positions != sorted(set(positions)):
        raise ValueError(f"positions must begin at 0 and grow; they are {positions}")
    return pairs


_TOKENS_SCHEMA = {"type": ["integer", "string"]}
BatchTokens = Annotated[
    tuple[tuple[int, int], ...],
    BeforeValidator(_ramp),
    WithJsonSchema(
        {
            "anyOf": [
                _TOKENS_SCHEMA,
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 2, "maxItems": 2},
                },
            ]
        }
    ),
]


class Stage(Section):
    name: Name
    """Name in metrics, events and flags (`--stages.NAME.key=value`)."""
    tokens: Tokens
    """Length, rounded up to whole steps."""
    seq_len: Count
    """Tokens of a row."""
    batch_tokens: BatchTokens
    """Tokens of a step, or a ramp of pairs [tokens since the stage's start, tokens of a step]."""
    mixture: dict[str, float]
    """Share of tokens by domain; normalised to 1."""
    lr: LearningRate | None = None
    """Learning rate of this stage."""
    rope: RopeChoice = None
    """Change of the rotary embedding from this stage's start, or "keep"."""
    parallel: StageParallel = StageParallel()
    """Merged over `[parallel]`."""
    betas: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """As in `[optimizer]`, for this stage."""
    weight_decay: float | None = Field(None, ge=0)
    """As in `[optimizer]`, for this stage."""
    clip_norm: float | None = Field(None, gt=0)
    """As in `[optimizer]`, for this stage."""


class Kernels(Section):
    attention: Literal["auto", "flash-attn-3", "flash-attn-4", "flash-attn", "varlen", "triton", "cudnn", "sdpa"] = (
        "auto"
    )
    """Backend of document attention; one that is named and missing is an error."""
    operations: Literal["auto", "triton", "torch"] = "auto"
    """Embedding, norms, rotary embedding, SwiGLU, cross-entropy and the gradient norm. auto: Triton's on a GPU, torch's elsewhere."""
    optimizer: Literal["auto", "triton", "torch", "apex"] = "auto"
    """AdamW's update. apex: NVIDIA's fused Adam, which is found by its module amp_C."""
    compile: bool = False
    """Compile each block with torch.compile. Collectives and attention stay outside its graphs."""
    deterministic: bool = False
    """On a GPU, only kernels that give the same bits twice."""


class Health(Section):
    start_timeout_seconds: float = Field(1800, gt=0)
    """How long a collective waits for its ranks up to the end of the first step."""
    step_timeout_seconds: float = Field(300, gt=0)
    """The same within a step."""
    save_timeout_seconds: float = Field(1800, gt=0)
    """The same while a checkpoint is written or validation runs."""


class Log(Section):
    every_steps: Count = 1
    """Interval of the console line. metrics.jsonl and TensorBoard have every step."""
    tensorboard: bool = True
    """Write `tb/` in the run directory."""
    peak_tflops: Annotated[PositiveFloat | None, _OrWord("auto")] = None
    """Dense peak of one device that MFU refers to. auto: the device's data sheet; on a CPU, a measured matmul."""


class Profile(Section):
    steps: Annotated[tuple[int, int], Field(strict=False)] | None = None
    """First and last step of a Kineto trace (`profile/` in the run directory)."""
    ranks: list[int] = [0]
    """Ranks that record."""
    memory: bool = False
    """Record a CUDA memory snapshot over the same steps."""


class Recipe(Section):
    """One run. The sections stand in the order of the work: what, from what, where, how, on which data, when."""

    run: Run
    model: Model
    parallel: Parallel = Parallel()
    precision: Precision = Precision()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    data: dict[Name, Domain]
    packing: Packing = Packing()
    validation: list[Validation] = []
    stages: list[Stage] = Field(min_length=1)
    kernels: Kernels = Kernels()
    health: Health = Health()
    log: Log = Log()
    profile: Profile = Profile()

    @property
    def directory(self) -> str:
        return self.run.directory or f"runs/{self.run.name}"

    def parallel_of(self, stage: Stage) -> Parallel:
        """`[parallel]` with the stage's own keys merged over it."""
        merged = self.parallel.model_copy(update=stage.parallel.model_dump(exclude_none=True))
        return merged if merged.micro_batch_tokens else merged.model_copy(update={"micro_batch_tokens": stage.seq_len})

    def layout_of(self, stage: Stage) -> Parallel:
        """What of `parallel_of` a model is built for: the same for two stages that need no new layout between them."""
        return self.parallel_of(stage).model_copy(
            update={"micro_batch_tokens": None, "activation_checkpointing": "none"}
        )

    def reduction(self, parallel: Parallel) -> Literal["step", "micro_batch"]:
        """When gradients are reduced under a layout. auto: once a step under pipeline, where weights stay gathered."""
        if self.precision.reduce != "auto":
            return self.precision.reduce
        return "step" if parallel.pipeline > 1 else "micro_batch"

    @property
    def layouts(self) -> dict[str, Parallel]:
        """The different layouts of the stages in order, by the key that names each."""
        found: dict[str, Parallel] = {}
        for stage in self.stages:
            layout = self.layout_of(stage)
            if layout not in found.values():
                own = layout != self.parallel.model_copy(
                    update={"micro_batch_tokens": None, "activation_checkpointing": "none"}
                )
                found[f"stages.{stage.name}.parallel" if own else "parallel"] = layout
        return found

"""The recipe as frozen models: every key, its default and its one-line meaning. The reference page is made from here.

Token quantities are integers or strings (`quantity.parse_tokens`). "auto" and "keep" are read as None: decided later
from the world size, the device or the checkpoint.
"""

from typing import Annotated, Literal

from pydantic import Field

from megacpt.config.base import (
    Betas,
    ClipNorm,
    Count,
    DType,
    Name,
    NotNegative,
    OrWord,
    Positive,
    Seconds,
    Section,
    Tokens,
)
from megacpt.config.objective import Objective
from megacpt.config.stage import Gate, LearningRate, MixtureRules, Parallel, RopeChoice, Stage


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


class Model(Section):
    pretrained: str | None = None
    """Hugging Face directory to continue from (config.json, safetensors, tokenizer)."""
    config: str | None = None
    """config.json of a model to train from scratch."""
    architecture: str | None = None
    """Named shape to train from scratch: llama3.2-1b, llama3.2-3b, llama3-8b, llama3.1-8b, llama3.1-70b,
    llama3.1-405b, qwen2.5-7b, qwen3-0.6b, qwen3-8b, mistral-7b-v0.3."""
    expect: str | None = None
    """Named shape that `pretrained` must have. `check --no-files` then checks the layout against it."""
    tokenizer: str | None = None
    """Tokenizer directory, needed from scratch. Default: the one of `pretrained`."""
    vocab_multiple: Count = 128
    """The vocabulary is padded to a multiple of this inside the trainer, never in an export."""
    rope: RopeChoice = None
    """Change of the rotary embedding for the whole run, or "keep"."""


class Precision(Section):
    compute: Annotated[DType | None, OrWord("auto")] = None
    """Type of activations and matrix products. auto: bfloat16 on a GPU, float32 on a CPU. Masters are at least fp32."""
    reduce: Literal["auto", "step", "micro_batch"] = "auto"
    """When gradients are reduced: once a step (memory) or every micro-batch (traffic). auto: step under pipeline."""


class Optimizer(Section):
    lr: LearningRate | None = None
    """Learning rate over the whole run. Or one in every stage, not both."""
    betas: Betas = (0.9, 0.95)
    """AdamW's decay rates of the moments, from 0 to below 1."""
    eps: float = Field(1e-8, ge=1e-30, le=1)
    """AdamW's epsilon. float32 holds nothing below 1e-38, and a moment that is 0 is divided by it."""
    weight_decay: NotNegative = 0.1
    """Decoupled decay, on matrices only."""
    clip_norm: ClipNorm | None = 1.0
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
    publish: Literal["rename", "manifest"] = "rename"
    """How a save becomes a checkpoint: by one rename of its folder, or, where a rename is no single act (object stores behind a file
    system), by its manifest, which is written last."""
    asynchronous: bool = False
    """Write checkpoints behind the training: it waits only while tensors are copied to host memory."""


class DomainOrder(Section):
    """A curriculum: documents by bucket of their perplexity, shuffled inside a bucket."""

    by: Literal["nll"] = "nll"
    """What orders the documents: their mean loss."""
    scores: list[str] = Field(min_length=1)
    """Files that `megacpt score` wrote, one for each prepared set of `paths`, in order; globs are sorted by number."""
    buckets: int = Field(20, ge=1, le=10000)
    """Parts of about equally many tokens."""
    ascending: bool = True
    """From easy (low loss) to hard."""
    drop: float = Field(0.0, ge=0, lt=0.5)
    """Share of the documents left out at each end, boilerplate and garbage."""


class Domain(Section):
    paths: list[str] = Field(min_length=1)
    """Prefixes of prepared data (PREFIX.bin, .idx, .json); globs of prefixes are sorted by number."""
    holdout_documents: int = Field(0, ge=0)
    """Documents kept for validation and never trained on."""
    min_tokens: int | None = Field(None, ge=0)
    """Only documents of at least this length."""
    max_tokens: Count | None = None
    """Only documents of at most this length."""
    labels: list[str] = []
    """Only documents with one of these labels, which `prepare --domain-field` kept."""
    order: DomainOrder | None = None
    """Train the documents in the order of their perplexity."""


class Packing(Section):
    method: Literal["best_fit", "concatenate"] = "best_fit"
    """best_fit cuts only documents longer than a row; concatenate fills every row and cuts where it must. Items are never cut."""
    long_items: Literal["refuse", "drop"] = "refuse"
    """What to do with an item (documents that `prepare --item-field` keeps together) that is longer than a row: end with an error, or leave
    it out of the training, with a warning that says how many there are."""
    directory: str = "runs/.packing"
    """Where packing indices are kept, by content."""


class Validation(Section):
    domains: list[str] = Field(min_length=1)
    """One loss each, from the domain's held-out documents."""
    every_tokens: Tokens | None = None
    """Interval. Always also before the first and after the last step."""
    max_tokens: Tokens | None = None
    """At most this many tokens of each domain."""


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
    start_timeout_seconds: Seconds = 1800
    """How long a rank may give no sign of life, and a collective wait, up to the end of the first step: loading and compilation."""
    step_timeout_seconds: Seconds = 300
    """The same within a step."""
    save_timeout_seconds: Seconds = 1800
    """The same while a checkpoint is written."""
    evaluate_timeout_seconds: Seconds = 1800
    """The same while validation or gates run, between two micro-batches."""
    watchdog: bool = True
    """A process beside each node's ranks that ends a hung run, with the stacks of all ranks in `incidents/`."""
    spike_mads: Positive | None = None
    """Skip the update if loss or gradient norm lies this many median absolute deviations (times 1.4826, a normal's sigma) above the
    median of the steps accepted last. Without it only numbers that are not finite are skipped."""
    spike_window: int = Field(128, ge=8)
    """Accepted steps that the median is taken of, of the same stage; a quarter of them must be there."""
    rollback_after: Count = 8
    """After so many skipped updates in a row go back to the checkpoint before them, and leave out the data in between."""
    max_rollbacks: int = Field(4, ge=0)
    """More of them end the run with an error."""
    checksum_every_steps: Count = 100
    """Interval at which ranks that hold the same weights compare them exactly; also before each save."""
    straggler_every_steps: Count = 100
    """Interval at which every rank's times are gathered, and the slowest ranks named in metrics.jsonl."""


class Log(Section):
    every_steps: Count = 1
    """Interval of the console line. metrics.jsonl and TensorBoard have every step."""
    tensorboard: bool = True
    """Write `tb/` in the run directory."""
    peak_tflops: Annotated[Positive | None, OrWord("auto")] = None
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
    objective: Objective = Objective()
    checkpoint: Checkpoint = Checkpoint()
    data: dict[Name, Domain]
    packing: Packing = Packing()
    mixture: MixtureRules = MixtureRules()
    gates: dict[Name, Gate] = {}
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

    def objective_of(self, stage: Stage) -> Objective:
        """The stage's own, else the run's."""
        return stage.objective or self.objective

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

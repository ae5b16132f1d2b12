"""A stage of a recipe and what it refers to: layout, rotary embedding, learning rate, mixture, gates, what follows a gate."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from megacpt.config.base import (
    Betas,
    ClipNorm,
    Count,
    Name,
    NotNegative,
    OrWord,
    Positive,
    Section,
    Share,
    Tokens,
)
from megacpt.config.objective import Objective
from megacpt.config.quantity import parse_tokens


class Rope(Section):
    theta: float | None = Field(None, ge=1, le=1e15)
    """Base of the rotary frequencies. Default: the checkpoint's."""
    type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """Scaling rule. Default: the checkpoint's."""
    factor: float | None = Field(None, ge=1, le=1e6)
    """Scaling factor."""
    original_max_position_embeddings: Count | None = None
    """Context length before scaling."""
    low_freq_factor: Positive | None = None
    """llama3: wavelengths above original / low are divided by the factor."""
    high_freq_factor: Positive | None = None
    """llama3: wavelengths below original / high stay."""
    attention_factor: Positive | None = None
    """yarn: factor on cos and sin. Default: 0.1 ln(factor) + 1."""
    beta_fast: Positive | None = None
    """yarn: rotations above which a dimension is not interpolated. Default 32."""
    beta_slow: Positive | None = None
    """yarn: rotations below which a dimension is fully interpolated. Default 1."""
    rule: Literal["ntk", "ntk2"] | None = None
    """theta by rule, from the checkpoint's own theta and length and this stage's seq_len: theta s^(d / (d - 2)), ntk2 twice that."""


RopeChoice = Annotated[Rope | None, OrWord("keep")]


class Parallel(Section):
    tensor: Count = 1
    """Ranks that share each matrix, with sequence parallelism."""
    context: Count = 1
    """Ranks that share each sequence."""
    pipeline: Count = 1
    """Ranks that share the layers."""
    virtual_stages: Count = 1
    """Pipeline stages a rank."""
    schedule: Annotated[Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"] | None, OrWord("auto")] = None
    """Order of the pipeline's work. auto: 1f1b with one stage a rank, else interleaved. zb-h1 and zb-v split backward."""
    contiguous_micro_batches: Count | None = None
    """interleaved: micro-batches that a stage runs one after another (N). Default: the pipeline degree."""
    max_in_flight: Count | None = None
    """Bound on the stage activations that a rank keeps, in stages times micro-batches."""
    stage_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers of each stage. Default: balanced, with the embedding and the head counted as below."""
    embedding_weight: NotNegative = 1.0
    """What the embedding counts in the split, in layers."""
    head_weight: NotNegative = 1.0
    """What head and loss count in the split, in layers."""
    data_replicate: Count = 1
    """Replicas of the sharded model (HSDP)."""
    data_shard: Annotated[Count | None, OrWord("auto")] = None
    """Ranks over which FSDP shards; "auto" is the world size over the other degrees."""
    micro_batch_tokens: Tokens | None = None
    """Tokens that one data-parallel rank runs at once. Default: one row of `seq_len`."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """selective keeps the outputs of matrix products and attention; full keeps the input of each block."""
    reshard_after_forward: Annotated[bool | None, OrWord("auto")] = None
    """Whether FSDP frees a block's weights between forward and backward. auto: not under pipeline, as in Llama 3."""
    prefetch: int = Field(1, ge=0)
    """Blocks whose weights FSDP gathers ahead."""
    overlap: Literal["none", "chunked", "symmetric_memory"] = "none"
    """How forward hides the collectives of tensor parallelism. symmetric_memory needs GPUs that share memory (NVLink)."""

    @property
    def schedule_name(self) -> str:
        return self.schedule or ("1f1b" if self.virtual_stages == 1 else "interleaved")


class LearningRate(Section):
    shape: Literal["constant", "cosine", "linear", "wsd", "infinite"]
    """Course after the warm-up. wsd: constant, then a tail of `decay_tokens`. infinite: a cosine over `cooldown_tokens` to `constant`,
    which holds, then the tail."""
    peak: Positive
    """Learning rate after the warm-up."""
    min: NotNegative = 0.0
    """Learning rate at the last token (not for constant)."""
    warmup_tokens: Tokens = 0
    """Linear warm-up from `start`."""
    start: NotNegative = 0.0
    """Learning rate before the warm-up: 0, or where an earlier run ended (re-warming)."""
    decay_tokens: Tokens | None = None
    """wsd, infinite: length of the tail."""
    tail: Literal["linear", "cosine", "1-sqrt", "exponential"] = "linear"
    """wsd, infinite: shape of the tail. exponential needs a `min` above 0."""
    constant: Positive | None = None
    """infinite: the rate that holds."""
    cooldown_tokens: Tokens | None = None
    """infinite: length of the way from `peak` to `constant`."""


class OnlineMixture(Section):
    """Weights inside a group follow validation perplexity (Llama-3-SynE: f = 1 + alpha * change * topic weight)."""

    every_tokens: Tokens
    """Interval between adjustments."""
    start_tokens: Tokens = 0
    """None before this many tokens of a stage: after the warm-up, which raises every loss."""
    alpha: Positive = 2.0
    """How strongly a relative change of perplexity changes a weight."""
    pull: Share = 0.1
    """Pull to the stage's own weights: 0 is the published rule, which has no fixed point."""
    floor: Share = 0.2
    """A weight never falls below this part of the stage's own."""
    cap: float = Field(4.0, ge=1)
    """Nor rises above this multiple of it."""
    dead_band: NotNegative = 2.0
    """Changes of the loss below this many standard errors count as none."""
    topic_weights: dict[str, NotNegative] = {}
    """Factor of a domain's change; default 1."""


class MixtureRules(Section):
    groups: dict[Name, list[str]] = {}
    """Domains whose common share stays fixed while weights move inside. A domain in none keeps its share."""
    online: OnlineMixture | None = None
    """Adjust weights inside the groups while training."""


class NeedleGate(Section):
    """Needle in a haystack, teacher-forced: right if every token of the answer is the most probable."""

    kind: Literal["needle"]
    """needle"""
    haystack: str
    """Domain whose held-out documents (else its first) are the hay."""
    lengths: list[Count] | None = None
    """Lengths in tokens. Default: the stage's seq_len, its half, quarter and eighth."""
    depths: Count = 10
    """Places of the needle at each length."""
    inserted: Count = 1
    """Needles in the hay."""
    asked: Count = 1
    """Of them, how many are asked for."""
    minimum: Share = 1.0
    """Least mean recall over lengths and depths."""


class RecoveryGate(Section):
    """Short-context ability is what it was at the run's start."""

    kind: Literal["recovery"]
    """recovery"""
    domains: list[str] = []
    """Their validation losses, in rows of the first stage's seq_len."""
    tasks: list[str] = []
    """Multiple-choice files: lines of {"question", "choices", "answer"}."""
    tolerance: NotNegative = 0.02
    """A loss may lie above the start's by this part of it, an accuracy below it by this much."""


class ForgettingGate(Section):
    """What must not be forgotten."""

    kind: Literal["forgetting"]
    """forgetting"""
    domains: list[str] = []
    """Their validation losses, in rows of the first stage's seq_len."""
    tasks: list[str] = []
    """Multiple-choice files."""
    max_rise: NotNegative = 0.05
    """A loss may rise above the start's by at most this."""
    max_fall: NotNegative = 0.02
    """An accuracy may fall by at most this."""


Gate = Annotated[NeedleGate | RecoveryGate | ForgettingGate, Field(discriminator="kind")]


class OnFail(Section):
    """What a stage does when one of its gates is not passed."""

    action: Literal["extend", "stop", "warn"] = "stop"
    """extend trains on and asks again; stop saves and leaves; warn goes on."""
    tokens: Tokens | None = None
    """extend: length of one extension."""
    limit: Tokens | None = None
    """extend: all of them together; then the run stops."""


class Average(Section):
    """Weights averaged over the end of a stage (Polyak mean; Llama 3, section 3.4.3)."""

    last: int = Field(5, ge=2)
    """Snapshots that are averaged."""
    every_tokens: Tokens
    """Interval of snapshots."""
    decay: Literal["mean", "linear", "cosine", "1-sqrt"] = "mean"
    """Weights of the snapshots: equal, or those that emulate a decay of the learning rate over them (WSM, arXiv 2507.17634)."""


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
    """8192 or "4Mi" -> ((0, tokens),); [["0", "2Mi"], ["2B", "4Mi"]] -> pairs of (position, tokens); {start, increment, over, final}
    -> the pairs of a linear ramp (Megatron's start, increment, length): level k from k / levels of `over` on."""
    if isinstance(value, dict):
        return _linear_ramp(value)
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


def _linear_ramp(value: dict) -> tuple[tuple[int, int], ...]:
    keys = ("start", "increment", "over", "final")
    if set(value) != set(keys):
        raise ValueError(f"a linear ramp has the keys {', '.join(keys)}; they are {', '.join(map(str, value))}")
    start, increment, over, final = (parse_tokens(value[key]) for key in keys)
    if increment < 1 or final <= start or (final - start) % increment:
        raise ValueError(f"final {final} must lie a whole number of increments {increment} above start {start}")
    levels = (final - start) // increment
    if over < levels:
        raise ValueError(f"over = {over} tokens is too short for {levels} increments")
    return tuple((over * k // levels, start + k * increment) for k in range(levels + 1))


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
                {
                    "type": "object",
                    "properties": dict.fromkeys(("start", "increment", "over", "final"), _TOKENS_SCHEMA),
                    "required": ["start", "increment", "over", "final"],
                    "additionalProperties": False,
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
    """Tokens of a step; a ramp of pairs [tokens since the stage's start, tokens of a step]; or a linear one,
    {start, increment, over, final}."""
    mixture: dict[str, NotNegative]
    """Share of tokens by domain; normalised to 1."""
    lr: LearningRate | None = None
    """Learning rate of this stage."""
    rope: RopeChoice = None
    """Change of the rotary embedding from this stage's start, or "keep"."""
    parallel: StageParallel = StageParallel()
    """Merged over `[parallel]`."""
    betas: Betas | None = None
    """As in `[optimizer]`, for this stage."""
    weight_decay: NotNegative | None = None
    """As in `[optimizer]`, for this stage."""
    clip_norm: ClipNorm | None = None
    """As in `[optimizer]`, for this stage."""
    objective: Objective | None = None
    """What this stage minimises, in place of `[objective]`."""
    freeze: list[str] = []
    """Parameters that this stage does not update: names, or patterns such as "model.layers.*"."""
    gates: list[str] = []
    """Names in `[gates]` that are asked at the stage's end."""
    on_fail: OnFail = OnFail()
    """What follows when one is not passed."""
    average: Average | None = None
    """Average the weights of snapshots taken during the stage."""

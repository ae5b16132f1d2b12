"""[optimizer]: AdamW, and the course of the learning rate over the run or a stage."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megacpt.config.base import Betas, ClipNorm, NotNegative, Positive, Section, Tokens
from megacpt.errors import Problem

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class LearningRate(Section, heading="lr (in [optimizer] or every stage)"):
    """The learning rate as a function of consumed tokens: a warm-up, a course, and with some shapes a tail."""

    shape: Literal["constant", "cosine", "linear", "wsd", "infinite"]
    """Course of the learning rate after the warm-up. `cosine` and `linear` fall to `min`; `wsd` is constant with a tail of
    `decay_tokens`; `infinite` falls as a cosine over `cooldown_tokens` to `constant`, which holds until the tail."""
    peak: Positive
    """Learning rate at the end of the warm-up, the highest of the course."""
    min: NotNegative = 0.0
    """Learning rate at the last token. A constant course does not use it."""
    warmup_tokens: Tokens = 0
    """Length of the linear warm-up from `start` to `peak`, in tokens. 0 begins at the peak."""
    start: NotNegative = 0.0
    """Learning rate at the beginning of the warm-up. Set it to where an earlier run ended to warm up again from there."""
    decay_tokens: Tokens | None = None
    """Only with `wsd`, which requires it, and `infinite`: length of the tail at the end of the course, in tokens."""
    tail: Literal["linear", "cosine", "1-sqrt", "exponential"] = "linear"
    """Only with `wsd` and `infinite`: shape in which the learning rate falls to `min`. `exponential` needs a `min` above 0."""
    constant: Positive | None = None
    """Only with `infinite`, which requires it: learning rate that holds between the cool-down and the tail."""
    cooldown_tokens: Tokens | None = None
    """Only with `infinite`, which requires it: length of the cosine from `peak` to `constant`, in tokens."""


class Optimizer(Section, heading="[optimizer]", resume="frozen"):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), and the clipping of the global gradient norm."""

    lr: LearningRate | None = None
    """Learning rate over the whole run. Give either this or `lr` in every stage."""
    betas: Betas = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment, each from 0 to below 1."""
    eps: float = Field(default=1e-8, ge=1e-30, le=1)
    """AdamW's epsilon, which keeps an update finite where the second moment is 0. float32 holds nothing below 1e-38."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay. It applies to matrices, not to norms and biases."""
    clip_norm: ClipNorm | None = 1.0
    """Upper bound of the global gradient norm; larger gradients are scaled down to it."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of AdamW's moments. `bfloat16` halves their memory; it is rounded stochastically, with the same bits on every layout. A run that
    computes in float64 keeps them in float64."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    whole, found = recipe.optimizer.lr, []
    staged = [stage.name for stage in recipe.stages if stage.lr]
    if whole and staged:
        where = f"optimizer.lr and stages.{staged[0]}.lr"
        found.append(
            Problem(where, None, "both are given, not both can hold.", "Give one for the run or one in every stage.")
        )
    if whole:
        found += _rate_problems("optimizer.lr", whole, sum(stage.tokens for stage in recipe.stages))
    for stage in recipe.stages:
        where = f"stages.{stage.name}.lr"
        if stage.lr:
            found += _rate_problems(where, stage.lr, stage.tokens)
        elif not whole:
            found.append(Problem(where, None, "is missing, and there is no optimizer.lr.", "Give one of them."))
    return found


def _rate_problems(where: str, lr: LearningRate, tokens: int) -> list[Problem]:
    found = []
    if lr.min > lr.peak:
        found.append(Problem(f"{where}.min", lr.min, f"is above peak = {lr.peak}.", "Lower it to the peak at most."))
    has_tail = lr.shape in ("wsd", "infinite")
    if (lr.shape == "wsd" and lr.decay_tokens is None) or (lr.decay_tokens is not None and not has_tail):
        text = f'belongs to shape = "wsd" (required there) and "infinite"; shape is "{lr.shape}".'
        found.append(Problem(f"{where}.decay_tokens", lr.decay_tokens, text))
    if (lr.shape == "infinite") != (lr.constant is not None and lr.cooldown_tokens is not None):
        text = f'constant and cooldown_tokens belong to shape = "infinite", both; shape is "{lr.shape}".'
        found.append(Problem(where, None, text))
    elif lr.constant is not None and not lr.min <= lr.constant <= lr.peak:
        text = f"must lie between min = {lr.min} and peak = {lr.peak}."
        found.append(Problem(f"{where}.constant", lr.constant, text))
    if lr.tail == "exponential" and lr.min <= 0:
        remedy = f"Give min, for example {lr.peak / 100:g}."
        found.append(Problem(f"{where}.tail", lr.tail, "never reaches 0.", remedy))
    if lr.start and not lr.warmup_tokens:
        text = "the warm-up begins there, and there is no warmup_tokens."
        found.append(Problem(f"{where}.start", lr.start, text, "Give warmup_tokens or remove start."))
    needed = lr.warmup_tokens + (lr.cooldown_tokens or 0) + (lr.decay_tokens or 0)
    if needed > tokens:
        text = (
            f"warmup_tokens {lr.warmup_tokens} + cooldown_tokens {lr.cooldown_tokens or 0} + decay_tokens {lr.decay_tokens or 0} = "
            f"{needed} exceed the {tokens} tokens they must fit in."
        )
        found.append(Problem(where, None, text, "Shorten them, or train longer."))
    return found

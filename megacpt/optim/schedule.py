"""The learning rate as a pure function of consumed tokens. Imports no torch.

A step's rate is that at its end: the first step of a warm-up is not wasted on 0, and the last step stands at the
minimum exactly, whatever the batch ramp was. WSD: Hu et al. 2024 (arXiv 2404.06395); 1-sqrt tail: Hägele et al. 2024
(2405.18392); infinite schedule with re-warming: Ibrahim et al. 2024 (2403.08763), Singh et al. 2025 (2503.02844).
"""

import math

from megacpt.config.clock import Clock, Step
from megacpt.config.resolve import Schedule
from megacpt.config.sections.optimizer import LearningRate


def learning_rate(lr: LearningRate, tokens: int, total: int) -> float:
    """The rate after `tokens` of a schedule that is `total` tokens long."""
    if tokens < lr.warmup_tokens:
        return lr.start + (lr.peak - lr.start) * tokens / lr.warmup_tokens
    if lr.shape == "constant":
        return lr.peak
    level = lr.peak
    if lr.shape == "infinite":
        assert lr.constant is not None, "the recipe's check asks for it with this shape"
        passed = min(1.0, (tokens - lr.warmup_tokens) / lr.cooldown_tokens) if lr.cooldown_tokens else 1.0
        level = lr.constant + (lr.peak - lr.constant) * remaining("cosine", passed)
    has_tail = lr.shape in ("wsd", "infinite")
    begin = total - (lr.decay_tokens or 0) if has_tail else lr.warmup_tokens
    if tokens <= begin or total <= begin:
        return level
    passed, shape = min(1.0, (tokens - begin) / (total - begin)), lr.tail if has_tail else lr.shape
    if shape == "exponential":
        return level * (lr.min / level) ** passed
    return lr.min + (level - lr.min) * remaining(shape, passed)


def remaining(shape: str, passed: float) -> float:
    """1 at the tail's begin, 0 at its end."""
    if shape == "linear":
        return 1 - passed
    return 0.5 * (1 + math.cos(math.pi * passed)) if shape == "cosine" else 1 - math.sqrt(passed)


def rate_of_step(schedule: Schedule, clock: Clock, step: Step) -> float:
    """The rate of a step under its stage's schedule. In an extension it stays where the stage left it."""
    in_stage, in_run = clock.planned_at(step)
    if schedule.over_run:
        return learning_rate(schedule.lr, in_run, sum(clock.planned_tokens))
    return learning_rate(schedule.lr, in_stage, clock.planned_tokens[step.stage])

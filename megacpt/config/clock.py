"""The token clock: every step of a run as a pure function of the recipe.

A step has a stage, a number of rows (sequences of the stage's seq_len) and a place on the axis of consumed tokens.
Batch ramps change at step boundaries: a threshold counts from the stage's start and acts at the next step. A stage's
tokens round up to whole steps. A gate that is not passed may extend a stage; learning rates do not move in the meantime.
Nothing here depends on ranks.
"""

from bisect import bisect_right
from dataclasses import dataclass

from megacpt.config.recipe import Recipe


@dataclass(frozen=True)
class Step:
    """One optimizer step. `number` counts from 1: step 1 is the first."""

    number: int
    stage: int
    rows: int
    seq_len: int
    first_sequence: int
    """Sequences that the stage has consumed before this step."""
    tokens_before: int
    """Tokens that the run has consumed before this step."""

    @property
    def batch_tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def tokens_after(self) -> int:
        return self.tokens_before + self.batch_tokens


@dataclass(frozen=True)
class _Run:
    """Steps of one batch size."""

    first_step: int
    stage: int
    rows: int
    seq_len: int
    first_sequence: int
    tokens_before: int
    steps: int


class Clock:
    """All steps of a recipe, by number.

    Args:
        extensions: tokens by which stages have become longer than the recipe says, by name.
    """

    def __init__(self, recipe: Recipe, extensions: dict[str, int] | None = None):
        self._runs: list[_Run] = []
        self.stage_first_token: list[int] = []
        self.planned_tokens: list[int] = []
        """Tokens of each stage, whole steps, without extensions."""
        step, tokens = 1, 0
        for index, stage in enumerate(recipe.stages):
            self.stage_first_token.append(tokens)
            planned, done = 0, 0  # tokens of this stage
            for length in (stage.tokens, stage.tokens + (extensions or {}).get(stage.name, 0)):
                for i, (at, batch) in enumerate(stage.batch_tokens):
                    until = stage.batch_tokens[i + 1][0] if i + 1 < len(stage.batch_tokens) else length
                    count = max(0, -(-(min(until, length) - done) // batch)) if done >= at else 0
                    if count:
                        rows = batch // stage.seq_len
                        self._runs.append(_Run(step, index, rows, stage.seq_len, done // stage.seq_len, tokens, count))
                        step, done, tokens = step + count, done + count * batch, tokens + count * batch
                planned = planned or done
            self.planned_tokens.append(planned)
        self.stage_first_token.append(tokens)
        self.num_steps = step - 1
        self.num_tokens = tokens
        self._first_steps = [run.first_step for run in self._runs]

    def step(self, number: int) -> Step:
        """Step `number`, 1-based."""
        if not 1 <= number <= self.num_steps:
            raise IndexError(f"step {number} is outside 1..{self.num_steps}")
        run = self._runs[bisect_right(self._first_steps, number) - 1]
        k = number - run.first_step
        return Step(
            number,
            run.stage,
            run.rows,
            run.seq_len,
            run.first_sequence + k * run.rows,
            run.tokens_before + k * run.rows * run.seq_len,
        )

    def tokens_at(self, number: int) -> int:
        """Tokens consumed after step `number`; 0 for step 0."""
        return self.step(number).tokens_after if number else 0

    def stage_tokens(self, index: int) -> int:
        """Tokens that stage `index` really takes, whole steps."""
        return self.stage_first_token[index + 1] - self.stage_first_token[index]

    def planned_at(self, step: Step) -> tuple[int, int]:
        """Where a step's end stands on the axis without extensions: (tokens of its stage, tokens of the run)."""
        inside = min(step.tokens_after - self.stage_first_token[step.stage], self.planned_tokens[step.stage])
        return inside, sum(self.planned_tokens[: step.stage]) + inside

    def stage_numbers(self, index: int) -> range:
        """The numbers of a stage's steps."""
        first = 1 + sum(self.stage_steps(i) for i in range(index))
        return range(first, first + self.stage_steps(index))

    def stage_steps(self, index: int) -> int:
        return sum(run.steps for run in self._runs if run.stage == index)

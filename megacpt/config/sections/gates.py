"""[gates]: what must hold at the end of a stage."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megacpt.config.base import FilePath, NotNegative, PositiveInt, Section, Share
from megacpt.errors import Problem, nearest

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class NeedleGate(Section, heading="[gates] NAME, kind needle", resume="free"):
    """Needle in a haystack, teacher-forced: an answer is right if each of its tokens is the most probable one."""

    kind: Literal["needle"]
    """Kind of the gate: `needle` asks for facts that stand somewhere in a long text."""
    haystack: str
    """Domain whose documents surround the needle: its held-out ones, or its first ones where none are held out."""
    lengths: list[PositiveInt] | None = None
    """Lengths of the haystacks in tokens. By default they are the stage's `seq_len`, its half, quarter and eighth."""
    depths: PositiveInt = 10
    """Number of places at which the needle is put in a haystack of each length."""
    inserted: PositiveInt = 1
    """Number of needles that are put in a haystack, at most 10."""
    asked: PositiveInt = 1
    """Number of needles that are asked for, at most as many as `inserted`."""
    minimum: Share = 1.0
    """Lowest mean recall, over lengths and depths, that passes the needle gate."""


class RecoveryGate(Section, heading="[gates] NAME, kind recovery", resume="free"):
    """Short-context ability is what it was at the run's start."""

    kind: Literal["recovery"]
    """Kind of the gate: `recovery` asks whether short-context ability is back where the run began."""
    domains: list[str] = []
    """Domains whose validation losses, in rows of the first stage's `seq_len`, the recovery gate compares with the run's start."""
    tasks: list[FilePath] = []
    """Multiple-choice files whose accuracies the recovery gate compares with the run's start: lines of {"question", "choices",
    "answer"}."""
    tolerance: NotNegative = 0.02
    """How far short-context ability may stay behind the run's start: a loss may be higher by this part of it, an accuracy lower by this
    much."""


class ForgettingGate(Section, heading="[gates] NAME, kind forgetting", resume="free"):
    """What must not be forgotten."""

    kind: Literal["forgetting"]
    """Kind of the gate: `forgetting` asks how much of what the base model knew was lost."""
    domains: list[str] = []
    """Domains whose validation losses, in rows of the first stage's `seq_len`, the forgetting gate compares with the run's start."""
    tasks: list[FilePath] = []
    """Multiple-choice files whose accuracies the forgetting gate compares with the run's start: lines of {"question", "choices",
    "answer"}."""
    max_rise: NotNegative = 0.05
    """Largest rise of a validation loss above the run's start that passes the forgetting gate, in nats a token."""
    max_fall: NotNegative = 0.02
    """Largest fall of an accuracy below the run's start that passes the forgetting gate; 0.02 is two percentage points."""


Gate = Annotated[NeedleGate | RecoveryGate | ForgettingGate, Field(discriminator="kind")]


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    return [problem for name, gate in recipe.gates.items() for problem in _gate_problems(recipe, name, gate)]


def _gate_problems(recipe: "Recipe", name: str, gate: Gate) -> list[Problem]:
    where, found, domains = f"gates.{name}", [], list(recipe.data)
    for domain in [gate.haystack] if isinstance(gate, NeedleGate) else gate.domains:
        if domain not in recipe.data:
            found.append(Problem(where, None, f"no domain {domain!r}.", nearest(domain, domains)))
        elif not isinstance(gate, NeedleGate) and not recipe.data[domain].holdout_documents:
            remedy = f"Set data.{domain}.holdout_documents."
            found.append(Problem(where, None, f"{domain} holds out no documents.", remedy))
    if not isinstance(gate, NeedleGate):
        if not gate.domains and not gate.tasks:
            text = "neither domains nor tasks are given, so it asks nothing."
            found.append(Problem(where, None, text, "Give at least one of them."))
        return found
    if not gate.asked <= gate.inserted <= 10:
        text = f"asked {gate.asked} of inserted {gate.inserted}: asked <= inserted <= 10 must hold."
        found.append(Problem(where, None, text))
    for stage in recipe.stages:
        if name in stage.gates and gate.lengths and min(gate.lengths) > stage.seq_len:
            text = f"all are above stages.{stage.name}.seq_len = {stage.seq_len}, so nothing would be asked there."
            found.append(Problem(f"{where}.lengths", gate.lengths, text, "Give a length that fits."))
    return found


def warnings(recipe: "Recipe") -> list[Problem]:
    used = {name for stage in recipe.stages for name in stage.gates}
    return [
        Problem("", None, f"gate {name} is defined but no stage uses it.", "Name it in stages.NAME.gates or remove it.")
        for name in recipe.gates
        if name not in used
    ]

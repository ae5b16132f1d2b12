"""Pipeline schedules as data: what each rank does in which order, from pure functions. Any number of micro-batches.

P ranks, V stages a rank, S = P * V stages, M micro-batches, N contiguous micro-batches of a stage (Llama 3, arXiv
2407.21783, section 3.3.2 and figure 6). In the looped placement stage v * P + r is on rank r; in the V-shaped one,
stages r and 2 P - 1 - r are. Imports no torch.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")


class Action(NamedTuple):
    """kind: F forward, B whole backward, I backward for the input, W backward for the weights."""

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    """ranks: the actions of each rank in order. placement: the rank of each stage. first_trained: the first stage that has a backward;
    it gives no gradient to the one before."""

    ranks: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    first_trained: int = 0

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def forward_only(self) -> "Schedule":
        """The same order without backward: dependencies of forwards are forwards, so what ran before runs still."""
        return Schedule(tuple(tuple(a for a in actions if a.kind == "F") for actions in self.ranks), self.placement)

    def trained_from(self, stage: int) -> "Schedule":
        """The same order where nothing before a stage is trained: no backward there. What remains waits for nothing that is gone."""
        kept = (tuple(a for a in actions if a.kind == "F" or a.stage >= stage) for actions in self.ranks)
        return Schedule(tuple(kept), self.placement, stage)


def make_schedule(
    name: str,
    ranks: int,
    virtual: int,
    micro_batches: int,
    contiguous: int | None = None,
    max_in_flight: int | None = None,
) -> Schedule:
    """A schedule by name.

    Args:
        contiguous: N of `interleaved`, at least P; default P.
        max_in_flight: bound on what a rank keeps, in stages times micro-batches.
    Raises:
        ValueError: if the schedule does not exist for these degrees, or keeps more than `max_in_flight`.
    """
    if virtual != virtual_stages_of(name, virtual):
        raise ValueError(f"schedule {name!r} has {virtual_stages_of(name, virtual)} stages a rank, not {virtual}.")
    place = v_shape(ranks) if name == "zb-v" else looped(ranks, virtual)
    if name == "gpipe":
        choices = [_breadth_first(ranks, virtual, micro_batches)]
    elif name == "1f1b":
        choices = [_rounds(ranks, 1, _near_equal(micro_batches, ranks))]
    elif name == "interleaved":
        wanted = contiguous or ranks
        if wanted < ranks:
            raise ValueError(f"{wanted} contiguous micro-batches on {ranks} ranks: at least {ranks}.")
        choices = [_rounds(ranks, virtual, _near_equal(micro_batches, wanted))]
        if micro_batches % wanted:
            choices.append(_phantom(ranks, virtual, micro_batches, wanted))
    elif name == "zb-h1":
        choices = [_zb_h1(ranks, micro_batches)]
    elif name == "zb-v":
        choices = [_zb_v(ranks, micro_batches)]
    else:
        raise ValueError(f"no schedule {name!r}; there are {', '.join(SCHEDULES)}.")
    made = [Schedule(tuple(map(tuple, actions)), place) for actions in choices]
    peaks = [max(peak_in_flight(actions) for actions in schedule.ranks) for schedule in made]
    for schedule, peak in zip(made, peaks, strict=True):
        if max_in_flight is None or peak <= max_in_flight:
            return schedule
    raise ValueError(
        f"schedule {name!r} with {micro_batches} micro-batches keeps {' or '.join(map(str, peaks))} stage activations on a "
        f"rank, max_in_flight is {max_in_flight}. Raise it, or take fewer contiguous micro-batches or virtual stages."
    )


def virtual_stages_of(name: str, wanted: int) -> int:
    """Stages a rank that a schedule has, given those that were asked for."""
    return {"1f1b": 1, "zb-h1": 1, "zb-v": 2}.get(name, wanted)


def looped(ranks: int, virtual: int) -> tuple[int, ...]:
    return tuple(stage % ranks for stage in range(ranks * virtual))


def v_shape(ranks: int) -> tuple[int, ...]:
    return (*range(ranks), *reversed(range(ranks)))


def peak_in_flight(actions) -> int:
    """Most stages times micro-batches whose forward is done and whose backward, with its weights, is not. A stage without backward keeps
    nothing."""
    change, kept = {"F": 1, "B": -1, "I": 0, "W": -1}, {a.stage for a in actions if a.kind != "F"}
    return max(accumulate((change[a.kind] for a in actions if a.stage in kept), initial=0))


def _breadth_first(ranks: int, virtual: int, micro_batches: int) -> list[list[Action]]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965; with several stages, arXiv 2211.05953)."""
    order = range(micro_batches)
    return [
        [Action("F", v * ranks + r, m) for v in range(virtual) for m in order]
        + [Action("B", v * ranks + r, m) for v in reversed(range(virtual)) for m in order]
        for r in range(ranks)
    ]


def _near_equal(micro_batches: int, contiguous: int) -> list[int]:
    """Sizes of rounds that differ by one at most. A short last round behind rounds of N could deadlock."""
    rounds = max(1, micro_batches // contiguous)
    size, rest = divmod(micro_batches, rounds)
    return [size + 1] * rest + [size] * (rounds - rest)


def _rounds(ranks: int, virtual: int, sizes: list[int]) -> list[list[Action]]:
    """One forward, one backward after a warm-up (Narayanan et al. 2021, arXiv 2104.04473), in rounds of any size."""
    rounds = [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]
    out = []
    for r in range(ranks):
        forwards = [Action("F", v * ranks + r, m) for part in rounds for v in range(virtual) for m in part]
        backwards = [Action("B", v * ranks + r, m) for part in rounds for v in reversed(range(virtual)) for m in part]
        later = ranks - 1 - r
        warm = min(len(forwards), (virtual - 1) * sizes[0] + 2 * later if virtual > 1 else later)
        actions = forwards[:warm]
        for i, backward in enumerate(backwards):
            actions += [*forwards[warm + i : warm + i + 1], backward]
        out.append(actions)
    return out


def _phantom(ranks: int, virtual: int, micro_batches: int, contiguous: int) -> list[list[Action]]:
    """Rounds of exactly N, the last filled with micro-batches that are then left out: less memory, more bubble."""
    full = -(-micro_batches // contiguous)
    actions = _rounds(ranks, virtual, [contiguous] * full)
    return [[a for a in mine if a.micro_batch < micro_batches] for mine in actions]


def _zb_h1(ranks: int, micro_batches: int) -> list[list[Action]]:
    """1F1B with backward in two: rank r keeps r weight gradients back, for the time in which it would wait at the end
    (Qi et al. 2023, arXiv 2401.10241, section 3). As much in flight as rank 0 of 1F1B, (P - 1)(F + I - W) idle."""
    out = []
    for r in range(ranks):
        warm = min(micro_batches, ranks - 1 - r)
        actions = [Action("F", r, m) for m in range(warm)]
        for m in range(micro_batches):
            if warm + m < micro_batches:
                actions.append(Action("F", r, warm + m))
            actions.append(Action("I", r, m))
            if m >= r:
                actions.append(Action("W", r, m - r))
        out.append(actions + [Action("W", r, m) for m in range(max(0, micro_batches - r), micro_batches)])
    return out


def _zb_v(ranks: int, micro_batches: int) -> list[list[Action]]:
    """Stages in a V, so that a micro-batch turns round on the last rank (Qi et al. 2023, section 6; memory: Qi et al. 2024,
    arXiv 2405.15362): 2 P stage activations at most, P - 1 idle from M = 2 P - 1 on when F, I and W take the same time.
    Fewer micro-batches run the same lists without those that are missing."""
    full, out = max(micro_batches, 2 * ranks - 1), []
    for r in range(ranks):
        stages, count, actions = (r, 2 * ranks - 1 - r), dict.fromkeys([k + leg for k in "FIW" for leg in "01"], 0), []

        def take(*steps: str, stages=stages, count=count, actions=actions) -> None:
            for step in steps:
                actions.append(Action(step[0], stages[int(step[1])], count[step]))
                count[step] += 1

        take(*["F0"] * (2 * (ranks - r) - 1))
        take(*["F1", "F0"] * r)
        take(*["F1", "I1", "W1"] * (ranks - r))
        while count["F1"] < full:
            take(*["F0"] * (count["F0"] < full), "I0", "W0", "F1", "I1", "W1")
        take(*["I0", "I1"] * r)
        take(*["I0", "W0"] * (ranks - r))
        take(*["W1"] * (full - count["W1"]), *["W0"] * (full - count["W0"]))
        out.append([a for a in actions if a.micro_batch < micro_batches])
    return out

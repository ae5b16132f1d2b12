"""What a schedule costs, before it runs: time and bubble, peak activations, deadlock, and NCCL's rules. Imports no torch.

NCCL has no tags and runs one communicator in posting order, so `lower_to_ops` gives every directed edge and kind of tensor a
communicator of its own and posts receives in the order of their sends. And a message that was posted, send or receive,
holds the device until its partner is there, while any action may have to wait for the whole device: the first use of a
kernel loads it, the allocator asks for or gives back memory, an operation synchronises (CUDA C++ Programming Guide, lazy
loading, "potential hazards"). A receive posted too early waits for what its own rank cannot begin; one posted too late
holds its sender. `lower_to_ops` posts each by the schedule's timetable, and `check_messages` plays the lists by these rules.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from megacpt.parallel.pipeline.schedule import Action, Schedule, peak_in_flight

COST = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}

TRANSFER = 0.1
"""What a message takes in the timetable by which receives are posted, in forwards. Above 0 the timetable has the slack that
a real pipeline has, in which transfers hide."""


class Op(NamedTuple):
    """One line of a rank's program.

    Attributes:
        kind: run, send or receive. A run waits for what it needs.
        action: that runs, or that made or needs the tensor.
        tensor: the key (activation | gradient, stage that made it, micro-batch) of what is sent or received.
        peer: the other rank.
    """

    kind: str
    action: Action
    tensor: tuple[str, int, int] | None = None
    peer: int = -1

    @property
    def message(self) -> tuple[str, int, int]:
        """`tensor` of a send or a receive."""
        assert self.tensor is not None, self
        return self.tensor


def input_of(action: Action, schedule: Schedule) -> tuple[str, int, int] | None:
    """The tensor from another stage that an action takes."""
    if action.kind == "F" and action.stage > 0:
        return "activation", action.stage - 1, action.micro_batch
    if action.kind in "BI" and action.stage < schedule.num_stages - 1:
        return "gradient", action.stage + 1, action.micro_batch
    return None


def output_of(action: Action, schedule: Schedule) -> tuple[tuple[str, int, int], int] | None:
    """(tensor, rank that needs it) that an action gives to another stage."""
    if action.kind == "F" and action.stage < schedule.num_stages - 1:
        return ("activation", action.stage, action.micro_batch), schedule.placement[action.stage + 1]
    if action.kind in "BI" and action.stage > schedule.first_trained:
        return ("gradient", action.stage, action.micro_batch), schedule.placement[action.stage - 1]
    return None


@lru_cache(64)
def lower_to_ops(schedule: Schedule, rank: int) -> tuple[Op, ...]:
    """The program of a rank: actions, sends right after them, and each receive before the first action that begins, by the
    schedule's timetable, after the making of its tensor has begun.

    No program can hang, whatever an action waits for. Whatever waits for something waits for what begins earlier: an action
    for its tensor and for the one before it; an action behind a posted receive for the maker of that tensor; an action
    behind a posted send for its receive, which stands in front of the first action that begins after the sender's, so at
    the latest behind one that began no later. Times that only decrease make no circle. A receive in front of an action
    that needs another tensor travels while it runs; so it does in all but the tightest schedules.
    """
    return _program(schedule, rank, _begins(schedule))


def _begins(schedule: Schedule) -> dict[tuple[str, int, int], float]:
    """When the making of each tensor begins, W's weights among them."""
    timetable = simulate(schedule, transfer=TRANSFER)
    assert timetable is not None, (
        f"{len(schedule.ranks)} ranks, {schedule.num_stages} stages: a schedule that deadlocks has no program"
    )
    return {_result(action): begin for spans in timetable.spans for action, begin, _ in spans}


def _program(schedule: Schedule, rank: int, begins: Mapping[tuple[str, int, int], float]) -> tuple[Op, ...]:
    actions, program = schedule.ranks[rank], []
    tensors = [(input_of(action, schedule), action) for action in actions]
    far = [(tensor, action) for tensor, action in tensors if tensor and schedule.placement[tensor[1]] != rank]
    waiting = deque(sorted(far, key=lambda pair: begins[pair[0]]))
    for action in actions:
        while waiting and begins[waiting[0][0]] < begins[_result(action)]:
            tensor, user = waiting.popleft()
            program.append(Op("receive", user, tensor, schedule.placement[tensor[1]]))
        program.append(Op("run", action))
        given = output_of(action, schedule)
        if given and given[1] != rank:
            program.append(Op("send", action, *given))
    return tuple(program)


def _result(action: Action) -> tuple[str, int, int]:
    """The key of what an action makes."""
    kind = {"F": "activation", "W": "weights"}.get(action.kind, "gradient")
    return kind, action.stage, action.micro_batch


def channel(source: int, target: int, tensor: tuple[str, int, int]) -> tuple[str, str]:
    """(kind, direction): with the two ranks, the communicator. P2P operations have one per pair of ranks in a group."""
    return tensor[0], "up" if target > source else "down"


def check_messages(schedule: Schedule, messages: Sequence[Sequence[Op]] | None = None, holds: bool = True) -> str:
    """Plays all programs with unbuffered messages, in order on each communicator, without tags.

    Args:
        messages: the ranks' programs, default `lower_to_ops`'s.
        holds: every action waits for all that was posted on its rank before it, as on a device that must come to rest;
            without, only for the tensor that it needs.
    Returns:
        "sound", "deadlock", or "mismatch": a receive meets another tensor than it expects.
    """
    if messages is None:
        if simulate(schedule) is None:
            return "deadlock"
        begins = _begins(schedule)
        messages = [_program(schedule, rank, begins) for rank in range(len(schedule.ranks))]
    queues: dict = defaultdict(lambda: (deque(), deque()))
    arrived, posted, at = [set() for _ in messages], [set() for _ in messages], [0] * len(messages)
    while True:
        moved = False
        for rank, program in enumerate(messages):
            while at[rank] < len(program):
                op = program[at[rank]]
                if op.kind == "run":
                    tensor = input_of(op.action, schedule)
                    here = not tensor or schedule.placement[tensor[1]] == rank or tensor in arrived[rank]
                    if not here or (holds and posted[rank]):
                        break
                else:
                    ends = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
                    queues[(*ends, *channel(*ends, op.message))][op.kind == "receive"].append(op.message)
                    posted[rank].add(op.message)
                at[rank] += 1
                moved = True
        for (source, target, *_), (sends, receives) in queues.items():
            while sends and receives:
                if sends[0] != receives.popleft():
                    return "mismatch"
                tensor = sends.popleft()
                arrived[target].add(tensor)
                posted[source].remove(tensor)
                posted[target].remove(tensor)
                moved = True
        if not moved:
            whole = all(at[rank] == len(program) for rank, program in enumerate(messages))
            return "sound" if whole and not any(a or b for a, b in queues.values()) else "deadlock"


@dataclass(frozen=True)
class Simulation:
    """Attributes:
    bubble: idle time over busy time, of the busiest rank.
    peak: of each rank, most stages times micro-batches in flight.
    spans: of each rank, (action, begin, end).
    """

    time: float
    bubble: float
    peak: tuple[int, ...]
    spans: tuple[tuple[tuple[Action, float, float], ...], ...]


def simulate(
    schedule: Schedule, weights: Sequence[float] | None = None, cost: Mapping[str, float] = COST, transfer: float = 0.0
) -> Simulation | None:
    """Runs the lists in order. None if they deadlock.

    Args:
        weights: relative time of each stage, default equal. cost: time of each kind of action.
        transfer: time between the end of an action and the start of the one on another rank that needs it.
    """
    weights = weights or [1.0] * schedule.num_stages
    ends: dict[tuple[str, int, int], float] = {}
    now, at = [0.0] * len(schedule.ranks), [0] * len(schedule.ranks)
    spans: list[list] = [[] for _ in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.ranks):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                tensor = input_of(action, schedule)
                if tensor and tensor not in ends:
                    break
                far = tensor is not None and schedule.placement[tensor[1]] != rank
                begin = max(now[rank], ends[tensor] + (transfer if far else 0.0)) if tensor else now[rank]
                now[rank] = begin + cost[action.kind] * weights[action.stage]
                ends[_result(action)] = now[rank]
                spans[rank].append((action, begin, now[rank]))
                at[rank] += 1
                moved = True
    if any(at[rank] < len(actions) for rank, actions in enumerate(schedule.ranks)):
        return None
    busy = max(sum(end - begin for _, begin, end in mine) for mine in spans)
    peak = tuple(peak_in_flight(actions) for actions in schedule.ranks)
    return Simulation(max(now), max(now) / busy - 1, peak, tuple(tuple(mine) for mine in spans))

"""What a schedule costs, before it runs: time and bubble, peak activations, deadlock, and NCCL's rule. Imports no torch.

NCCL has no tags and runs one communicator in posting order, and a send waits for its partner. So `lower` gives every
directed edge and kind of tensor a communicator of its own, posts receives in the order of their sends, at most one
action ahead, and `rendezvous` plays the lists by that rule.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megacpt.parallel.pipeline.schedule import Action, Schedule, peak_in_flight

COST = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


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


def needed(action: Action, schedule: Schedule) -> tuple[str, int, int] | None:
    """The tensor from another stage that an action takes."""
    if action.kind == "F" and action.stage > 0:
        return "activation", action.stage - 1, action.micro_batch
    if action.kind in "BI" and action.stage < schedule.num_stages - 1:
        return "gradient", action.stage + 1, action.micro_batch
    return None


def made(action: Action, schedule: Schedule) -> tuple[tuple[str, int, int], int] | None:
    """(tensor, rank that needs it) that an action gives to another stage."""
    if action.kind == "F" and action.stage < schedule.num_stages - 1:
        return ("activation", action.stage, action.micro_batch), schedule.placement[action.stage + 1]
    if action.kind in "BI" and action.stage > 0:
        return ("gradient", action.stage, action.micro_batch), schedule.placement[action.stage - 1]
    return None


def lower(schedule: Schedule, rank: int) -> list[Op]:
    """The program of a rank: actions, sends right after them, receives one action ahead."""
    actions, program, posted = schedule.ranks[rank], [], 0
    for i, action in enumerate(actions):
        while posted < min(len(actions), i + 2):
            tensor = needed(actions[posted], schedule)
            if tensor and schedule.placement[tensor[1]] != rank:
                program.append(Op("receive", actions[posted], tensor, schedule.placement[tensor[1]]))
            posted += 1
        program.append(Op("run", action))
        given = made(action, schedule)
        if given and given[1] != rank:
            program.append(Op("send", action, *given))
    return program


def channel(source: int, target: int, tensor: tuple[str, int, int]) -> tuple[str, str]:
    """(kind, direction): with the two ranks, the communicator. P2P operations have one per pair of ranks in a group."""
    return tensor[0], "up" if target > source else "down"


def rendezvous(schedule: Schedule, messages: Sequence[list[Op]] | None = None) -> str:
    """Plays all programs with unbuffered messages, in order on each communicator, without tags.

    Returns:
        "sound", "deadlock", or "mismatch": a receive meets another tensor than it expects.
    """
    programs = messages or [lower(schedule, rank) for rank in range(len(schedule.ranks))]
    queues: dict = defaultdict(lambda: (deque(), deque()))
    arrived, at = [set() for _ in programs], [0] * len(programs)
    while True:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                op = program[at[rank]]
                if op.kind == "run":
                    tensor = needed(op.action, schedule)
                    if tensor and schedule.placement[tensor[1]] != rank and tensor not in arrived[rank]:
                        break
                else:
                    ends = (rank, op.peer) if op.kind == "send" else (op.peer, rank)
                    queues[(*ends, *channel(*ends, op.tensor))][op.kind == "receive"].append(op.tensor)
                at[rank] += 1
                moved = True
        for (_, target, *_), (sends, receives) in queues.items():
            while sends and receives:
                if sends[0] != receives[0]:
                    return "mismatch"
                arrived[target].add(sends.popleft())
                receives.popleft()
                moved = True
        if not moved:
            whole = all(at[rank] == len(program) for rank, program in enumerate(programs))
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
                tensor = needed(action, schedule)
                if tensor and tensor not in ends:
                    break
                far = tensor is not None and schedule.placement[tensor[1]] != rank
                begin = max(now[rank], ends[tensor] + (transfer if far else 0.0)) if tensor else now[rank]
                now[rank] = begin + cost[action.kind] * weights[action.stage]
                kind = {"F": "activation", "W": "weights"}.get(action.kind, "gradient")
                ends[kind, action.stage, action.micro_batch] = now[rank]
                spans[rank].append((action, begin, now[rank]))
                at[rank] += 1
                moved = True
    if any(at[rank] < len(actions) for rank, actions in enumerate(schedule.ranks)):
        return None
    busy = max(sum(end - begin for _, begin, end in mine) for mine in spans)
    peak = tuple(peak_in_flight(actions) for actions in schedule.ranks)
    return Simulation(max(now), max(now) / busy - 1, peak, tuple(tuple(mine) for mine in spans))

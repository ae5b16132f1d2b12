"""The executor: runs one rank's list of actions, moves tensors between stages, knows nothing of what a stage does.

Sends are asynchronous and keep their tensor until the other side has it; receives are posted by the program of
simulate.py, under which no action can hang, though it waits for the whole device: first uses of kernels need no step of
their own before the first. Between two actions all room is made before anything is posted, because making it may wait,
too. A tensor that was handed over is kept nowhere else.
"""

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.parallel.mesh import Mesh
from megacpt.parallel.pipeline.schedule import Action, Schedule
from megacpt.parallel.pipeline.simulate import channel, input_of, lower_to_ops, output_of


class StageExecutor(Protocol):
    """What stages do. Tensors between stages have shape(micro_batch) and dtype."""

    dtype: torch.dtype

    def shape(self, micro_batch: int) -> tuple[int, ...]: ...

    def run(self, action: Action, received: Tensor | None) -> Tensor | None:
        """Runs an action on the activation or gradient that it needs; returns the one that it makes."""


def execute(schedule: Schedule, work: StageExecutor, mesh: Mesh) -> None:
    """Runs this rank's part of a schedule. All pipeline ranks call it with the same schedule."""
    here: dict[tuple, Tensor] = {}
    room: dict[tuple, Tensor] = {}
    receiving: dict[tuple, tuple[dist.Work, Tensor]] = {}
    sending: deque[tuple[dist.Work, Tensor]] = deque()
    rank = mesh.pipeline_rank
    program = lower_to_ops(schedule, rank)

    def make_room(at: int) -> None:
        """For what is received before the next action."""
        while at < len(program) and program[at].kind != "run":
            op, at = program[at], at + 1
            if op.kind == "receive":
                room[op.message] = torch.empty(work.shape(op.action.micro_batch), dtype=work.dtype, device=mesh.device)

    make_room(0)
    for at, op in enumerate(program, 1):
        if op.kind == "receive":
            buffer = room.pop(op.message)
            group = mesh.channels[channel(op.peer, rank, op.message)]
            receiving[op.message] = _started(dist.irecv(buffer, group=group, group_src=op.peer)), buffer
            del buffer
        elif op.kind == "send":
            tensor = here.pop(op.message)
            group = mesh.channels[channel(rank, op.peer, op.message)]
            sending.append((_started(dist.isend(tensor, group=group, group_dst=op.peer)), tensor))
            del tensor
        else:
            key = input_of(op.action, schedule)
            if key in receiving:
                handle, buffer = receiving.pop(key)
                handle.wait()
                del handle  # it keeps the buffer
                result = work.run(op.action, buffer)
                del buffer
            else:
                result = work.run(op.action, None if key is None else here.pop(key, None))
            if given := output_of(op.action, schedule):
                assert result is not None, f"{op.action} makes nothing, {given[0]} is waited for"
                here[given[0]] = result.contiguous()
            del result
            make_room(at)
        while sending and sending[0][0].is_completed():
            sending.popleft()
    for handle, _ in sending:
        handle.wait()


def _started(handle: dist.Work | None) -> dist.Work:
    assert handle is not None, "a message of a group that this rank is not in"
    return handle


def connect(schedule: Schedule, mesh: Mesh) -> None:
    """Opens every connection of a schedule, edge by edge in the same order on all ranks.

    NCCL opens a communicator with the first message of a pair and holds up both hosts until both are there. Programs only
    account for what holds up the device: in a first step that opened connections, a host could wait for one that waits for it.
    """
    edges = set()
    for rank in range(len(schedule.ranks)):
        for op in lower_to_ops(schedule, rank):
            if op.kind == "send":
                edges.add((rank, op.peer, op.message[0], channel(rank, op.peer, op.message)))
    token = torch.zeros(1, device=mesh.device)
    for source, target, _, key in sorted(edges):
        if mesh.pipeline_rank == source:
            dist.send(token, group=mesh.channels[key], group_dst=target)
        elif mesh.pipeline_rank == target:
            dist.recv(token, group=mesh.channels[key], group_src=source)

"""All of torch that is private (an underscore in its name), so that a new version is read here and nowhere else. Each was read in torch
2.11.0 and 2.13.0. Beside it stand only what DTensors hold (parallel/sharded.py), what checkpoint/load.py overrides of Distributed
Checkpoint's reader, and the operations that the kernels call.
"""

import importlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def offset_of(tensor: DTensor) -> tuple[int, ...]:
    """Where this rank's part of a tensor begins, as Distributed Checkpoint places it; DTensor has no public way to ask."""
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]


def default_store() -> dist.Store:
    """The rendezvous of the default group. Public functions hand out none, and a second group must meet where the first did."""
    return distributed_c10d._get_default_store()


def process_groups() -> list[dist.ProcessGroup]:
    """All groups of this process. They are registered, but not listed, by the public interface."""
    return list(distributed_c10d._world.pg_map)


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """How long a collective of the group may wait from now on; the public interface sets it only when a group is made."""
    distributed_c10d._set_pg_timeout(timeout, group)


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a collective of the group waits, None where its backend has no timeouts. It can be set, but not asked for, in public."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)


def nccl_options(high_priority: bool, timeout: timedelta | None) -> Any:
    """Options of an NCCL group. What they hold as timeout is taken, with a warning if the argument of `new_group` differs."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=high_priority)
    if timeout is not None:
        options._timeout = timeout
    return options


def symmetric_memory(name: str) -> Callable:
    """An operation of torch's symmetric memory. torch 2.11 registers them with their module, which nothing else imports."""
    importlib.import_module("torch.distributed._symmetric_memory")
    return getattr(torch.ops.symm_mem, name)


def fsdp_groups(module: FSDPModule) -> list:
    """The parameter groups of one sharded module: gradients that come outside autograd are handed to them. One group in torch 2.11."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group else []
    return groups


def reread_fsdp_parameters(module: FSDPModule) -> None:
    """After parameters of a sharded module got another type, or others need a gradient. It reads both once, at the first forward."""
    for group in fsdp_groups(module):
        for parameter in group.fsdp_params:
            parameter.reset_sharded_param()
        group._init_mp_dtypes()


def end_fsdp_backward(root: FSDPModule) -> None:
    """What autograd would call at the end of a step's last backward, as torch's own pipelining does by hand."""
    root._get_fsdp_state()._root_post_backward_final_callback()


def record_memory(on: bool) -> None:
    """Whether the allocator's history is kept, for `dump_memory`. Documented, and still named as private."""
    if on:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    else:
        torch.cuda.memory._record_memory_history(enabled=None)


def dump_memory(path: str) -> None:
    """The allocator's history, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)

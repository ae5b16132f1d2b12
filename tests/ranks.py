"""Ranks by fork: a function on every rank of a gloo group, in a second. The parent has torch imported and no thread that computes."""

import contextlib
import gc
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.multiprocessing as mp
from shared import LONG_SECONDS, turn


def _rank(rank: int, world_size: int, folder: str, function: Callable, arguments: tuple) -> None:
    gc.freeze()  # the parent's garbage is not this process's: a process group's end would wait for threads that fork left behind
    forget_groups()
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), TORCH_GLOO_LAZY_INIT="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        result = ("value", function(*arguments))
    except Exception as error:
        result = ("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(result, file)
    if result[0] == "value" and dist.is_initialized():
        with contextlib.suppress(
            RuntimeError
        ):  # the result is written; a rank that has left already resets its connections
            dist.barrier()
            dist.destroy_process_group()
    os._exit(0)


def forget_groups() -> None:
    """In a child: the parent's process groups are not this one's, nor can they end here, where none of their threads runs."""
    world = dist.distributed_c10d._world
    _inherited.extend(world.pg_map)
    for registry in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config):
        registry.clear()
    world.tags_to_pg.clear()
    world.pg_to_tag.clear()


_inherited: list = []


def on_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each rank; its values in rank order. A rank's error fails the test with its traceback."""
    inherited = dist.distributed_c10d._world.default_pg  # this process's own group stays with it
    with turn(world_size), tempfile.TemporaryDirectory() as folder:
        dist.distributed_c10d._world.default_pg = None
        try:
            context = mp.start_processes(
                _rank, (world_size, folder, function, arguments), nprocs=world_size, start_method="fork", join=False
            )
            deadline = time.monotonic() + LONG_SECONDS
            while not context.join(timeout=5):
                if time.monotonic() > deadline:
                    for process in context.processes:
                        process.kill()
                    raise AssertionError(
                        f"{world_size} ranks did not end within {LONG_SECONDS:.0f} s: {function.__name__}{arguments}"
                    )
        finally:
            dist.distributed_c10d._world.default_pg = inherited
        results = []
        for rank in range(world_size):
            with open(f"{folder}/{rank}", "rb") as file:
                results.append(pickle.load(file))
    errors = [f"rank {rank}: {text}" for rank, (kind, text) in enumerate(results) if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in results]

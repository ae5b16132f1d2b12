"""Process groups at scale, counted: what a rank makes, what it connects, how long they wait. No rank makes another's groups."""

import contextlib
import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from megacpt import compat
from megacpt.config.layout import Layout
from megacpt.parallel import mesh as module
from megacpt.parallel.mesh import (
    build_mesh,
    meet,
    object_group,
    open_groups,
    raise_file_limit,
    rank_grid,
    restart_process_group,
    set_timeout,
    start_process_group,
)

CPU = torch.device("cpu")
LARGE = {
    "405B": Layout(data_shard=128, pipeline=16, tensor=8),
    "405B at 128K": Layout(data_shard=8, pipeline=16, context=16, tensor=8),
    "HSDP": Layout(data_replicate=16, data_shard=64, pipeline=4, context=1, tensor=4),
    "FSDP alone": Layout(data_shard=16384),
}


@pytest.fixture
def fake():
    """Starts a process group of which this is one rank and the others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = dist.distributed_c10d._world
    registries = ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "tags_to_pg", "pg_to_tag")
    before = world.default_pg, world.group_count, [dict(getattr(world, name)) for name in registries]
    world.default_pg = None
    for name in registries:
        getattr(world, name).clear()

    def start(rank: int, size: int) -> None:
        if world.default_pg is not None:
            dist.destroy_process_group()
        world.group_count = 1000  # this process's own are known under their numbers
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield start
    if world.default_pg is not None:
        dist.destroy_process_group()
    world.default_pg, world.group_count, kept = before
    for name, entries in zip(registries, kept, strict=True):
        getattr(world, name).update(entries)
    for group, name in world.pg_names.items():  # the end of a default group has taken all names out
        with contextlib.suppress(RuntimeError):
            torch._C._distributed_c10d._register_process_group(name, group)


def counted(monkeypatch) -> list[tuple[tuple[int, ...], dict]]:
    """(ranks, other arguments) of every group that is made from now on."""
    made, original = [], dist.new_group

    def new_group(ranks=None, timeout=None, backend=None, **options):
        made.append((tuple(ranks or ()), options | {"timeout": timeout, "backend": backend}))
        return original(ranks, timeout, backend, **(options | {"pg_options": None}))

    monkeypatch.setattr(dist, "new_group", new_group)
    return made


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("rank", [0, 5000, 16383])
def test_16384_ranks_make_their_own_groups_only(fake, monkeypatch, name, rank):
    """At most five axes, fsdp, four kinds of messages, the ends; once for all, and in equal number on all ranks."""
    layout = LARGE[name]
    fake(rank, layout.world_size)
    made = counted(monkeypatch)
    mesh = build_mesh(layout, CPU)
    assert len(made) <= 11 and all(rank in ranks for ranks, _ in made)
    assert all(options["use_local_synchronization"] for _, options in made)
    assert len(made) == {"405B": 9, "405B at 128K": 11, "HSDP": 10, "FSDP alone": 1}[name]
    grid = rank_grid(layout)
    (here,) = (grid == rank).nonzero().tolist()
    for i, axis in enumerate(("pp", "dp_replicate", "dp_shard", "cp", "tp")):
        line = grid[tuple(slice(None) if j == i else place for j, place in enumerate(here))]
        assert dist.get_process_group_ranks(mesh.groups[axis]) == line.tolist() and mesh.ranks[axis] == here[i]
    flat = grid[here[0], here[1], :, :, here[4]].flatten().tolist()
    assert dist.get_process_group_ranks(mesh.fsdp.get_group("fsdp")) == flat
    assert mesh.fsdp.shape == ((layout.data_replicate,) if layout.data_replicate > 1 else ()) + (len(flat),)
    assert mesh.tensor.mesh.tolist() == grid[(*here[:4], slice(None))].tolist()
    assert (mesh.ends is not None) == (layout.pipeline > 1 and here[0] in (0, layout.pipeline - 1))


def test_on_a_gpu_groups_that_compute_are_nccl_s(fake, monkeypatch):
    """Streams of high priority for cp and tp, the process group's own backend for all, and gloo for objects alone."""
    started = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: started.append(backend))
    monkeypatch.delenv("RANK", raising=False)
    start_process_group(torch.device("cuda", 0))
    monkeypatch.undo()
    assert started == ["nccl"]

    class Options:
        def __init__(self, is_high_priority_stream):
            self.is_high_priority_stream = is_high_priority_stream

    monkeypatch.setattr(dist, "ProcessGroupNCCL", type("NCCL", (), {"Options": Options}), raising=False)
    monkeypatch.setattr(compat, "timeout_of", lambda group: timedelta(seconds=77))
    fake(3, 64)
    made = counted(monkeypatch)
    build_mesh(Layout(data_shard=4, pipeline=4, context=2, tensor=2), torch.device("cuda", 0))
    high = {options["group_desc"]: options["pg_options"].is_high_priority_stream for _, options in made}
    assert {name for name, priority in high.items() if priority} == {"mesh_cp", "mesh_tp"}
    assert {options["backend"] for _, options in made} == {None}
    assert {options["timeout"] for _, options in made} == {options["pg_options"]._timeout for _, options in made}
    assert {options["timeout"].seconds for _, options in made} == {77}


def sockets() -> int:
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket")
        except OSError:  # the folder's own
            pass
    return count


def connected(port: int, lazily: bool) -> dict[str, int]:
    """Sockets of a rank as a run goes on, in a process group that the program starts itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    begin = sockets()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_GLOO_LAZY_INIT": str(int(lazily))}
    if lazily:
        del os.environ["TORCH_GLOO_LAZY_INIT"]
    start_process_group(CPU, 120)
    out, layout = {}, Layout(data_shard=size // 16, pipeline=4, context=2, tensor=2)

    def note(name: str) -> None:
        """What is left when no look in a second shows less: threads close what has ended a moment later. Rank 0 serves the rendezvous."""
        least, looks = sockets(), 0
        while looks < 20:
            time.sleep(0.05)
            looks = 0 if sockets() < least else looks + 1
            least = min(least, sockets())
        out[name] = least - begin - (size if rank == 0 else 0)

    note("started")
    open_groups(build_mesh(layout, CPU))
    meet(CPU)
    note("meshed")
    everyone: list = [None] * size
    dist.all_gather_object(everyone, rank, group=object_group())
    assert everyone == list(range(size))
    dist.gather_object(rank, everyone if rank == 0 else None, group=object_group())
    note("saved")
    restart_process_group(CPU, "again", 120)
    open_groups(build_mesh(layout, CPU))
    meet(CPU)
    note("again")
    return out


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_32_ranks_connect_to_those_that_they_talk_to(port):
    """About two connections a group, and to all ranks only where a checkpoint's plans are gathered: on rank 0. Everybody with everybody
    would be 31."""
    found = on_ranks(32, connected, port, True)
    assert max(counts["started"] for counts in found) <= 4
    assert max(counts["meshed"] for counts in found) <= 30
    assert max(counts["saved"] for counts in found[1:]) <= 36 and 32 <= found[0]["saved"] <= 68
    assert max(counts["again"] for counts in found) <= 30, "the groups before are gone"


def test_the_count_sees_a_full_mesh(port):
    """The twin: gloo as it is without being told."""
    assert min(counts["started"] for counts in on_ranks(16, connected, port, False)) >= 15


def timeouts() -> list[set[float]]:
    """Seconds of all groups: at first, and after a change, with groups that were made before and after it."""
    seconds = lambda: {
        group._get_backend(CPU).options._timeout.total_seconds() for group in dist.distributed_c10d._world.pg_map
    }
    found = []
    set_timeout(500)
    build_mesh(Layout(data_shard=1, pipeline=2, tensor=2), CPU)
    found.append(seconds())
    set_timeout(40)
    object_group()
    found.append(seconds())
    restart_process_group(CPU, "later", 70)
    build_mesh(Layout(data_shard=2, context=2), CPU)
    found.append(seconds())
    return found


def test_timeouts_reach_groups_that_are_made_later():
    """tp and cp would wait torch's 600 s, others its 1,800."""
    assert on_ranks(4, timeouts) == [[{500.0}, {40.0}, {70.0}]] * 4


def two_meshes() -> list[float]:
    """Groups are named alike on all ranks though only some are at an end of the pipeline."""
    out = []
    for layout in (Layout(pipeline=4), Layout(pipeline=4), Layout(data_shard=4), Layout(tensor=2, pipeline=2)):
        mesh = build_mesh(layout, CPU)
        open_groups(mesh)
        out.append(mesh.sum_over(("pp", "tp", "dp_shard"), torch.tensor(float(dist.get_rank()))).item())
    return out


def test_meshes_follow_each_other_on_one_process_group():
    assert on_ranks(4, two_meshes) == [[6.0] * 4] * 4


def test_the_file_limit_is_raised_as_far_as_it_is_needed_and_allowed(monkeypatch):
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(module.resource, "setrlimit", lambda _, pair: limits.update(now=pair))
    assert raise_file_limit(8) == 1024 and limits["now"] == (1024, 4096)
    assert raise_file_limit(1024) == 2560 and limits["now"] == (2560, 4096)
    assert raise_file_limit(16384) == 4096 and limits["now"] == (4096, 4096)
    limits["now"] = (1024, module.resource.RLIM_INFINITY)
    assert raise_file_limit(16384) == 33280

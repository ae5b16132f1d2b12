"""doctor's timing of axes."""

import torch
from ranks import on_ranks

from megacpt.doctor import open_files, slowest


def times() -> list[str]:
    from megacpt.config.sections.parallel import Parallel
    from megacpt.doctor import axes

    return axes(Parallel(tensor=2, pipeline=2), size=4096, repeats=3)


def test_every_axis_of_the_layout_is_timed():
    lines = on_ranks(4, times)[0]
    assert any(line.startswith("tp (2 ranks): all-reduce of 0.00390625 MiB") for line in lines)
    assert any(line.startswith("pp (2 ranks)") for line in lines) and not any(line.startswith("cp") for line in lines)
    assert lines[-1].startswith("slowest node: ")


def test_the_slow_node_is_named():
    ranks = [{"host": f"node{i // 2}", "tp": 0.03 if i // 2 == 2 else 0.01, "dp_shard": 0.02} for i in range(8)]
    lines = slowest(ranks, 1 << 20, {"tp": 2, "cp": 1, "dp_shard": 4})
    assert "slowest 30.00 ms on rank 4 (node2)" in lines[0] and lines[-1].startswith("slowest node: node2, 2.00 times")


def test_operations_are_run_and_a_broken_one_is_named(monkeypatch):
    import megacpt_kernels

    from megacpt.doctor import operations_checked

    assert all(": ok, " in line for line in operations_checked("cpu")[1:])
    monkeypatch.setattr(
        megacpt_kernels, "swiglu", lambda gate, up: gate + up if gate.dtype == torch.float32 else gate * up
    )
    broken = operations_checked("cpu")
    assert [line.split(":")[0].strip() for line in broken if "WRONG" in line] == ["swiglu"]


def test_the_file_limit_is_held_against_what_a_run_needs(monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert open_files(8) == "open files: 4,096 allowed, rank 0 of 8 needs up to 528"
    line = open_files(16384)
    assert "4,096 allowed, but rank 0 of 16,384 NEEDS up to 33,280" in line and "`ulimit -Hn 33280`" in line
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    assert open_files(16384) == "open files: any number allowed, rank 0 of 16,384 needs up to 33,280"

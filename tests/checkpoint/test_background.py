"""Saving in the background on a GPU, which this machine need not have: torch.cuda says it is there and counts what is asked of it."""

import threading
from collections import Counter

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megacpt.checkpoint.background import Saver
from megacpt.checkpoint.manifest import RunState, list_steps
from megacpt.checkpoint.save import CheckedWriter, prune, tensors_of
from megacpt.optim.adamw import AdamW

DEVICE = 3


@pytest.fixture
def cuda(monkeypatch):
    """Calls by (thread, what), of a GPU that has no number but 3."""
    calls: Counter = Counter()

    def asked(what):
        return calls.update([(threading.current_thread().name, what)])

    class Stream:
        device_type = "cuda"

        def synchronize(self):
            asked("synchronize")

        def wait_stream(self, stream):
            asked("wait_stream")

        def __enter__(self):
            asked("stream")

        def __exit__(self, *error):
            pass

    def set_device(device):
        assert device == DEVICE
        asked("set_device")

    one = Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: one)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return calls


def saved_behind(mesh, folder) -> None:
    """One save of a few tensors, 24 MiB."""

    def make():
        return nn.Parameter(DTensor.from_local(torch.randn(512, 512), mesh.tensor, [Replicate()]))

    parameters = {f"w{i}": make() for i in range(8)}
    saver = Saver("rename", lambda: prune(folder, 1, None))
    saver.start(folder, tensors_of(parameters, AdamW(parameters)), RunState(1, 1, 1, "s"), {})
    saver.wait()
    saver.close()
    assert [outcome.error for outcome in saver.outcomes] == [None] and list_steps(folder) == [1]


def test_the_thread_takes_this_process_s_device_and_waits_for_no_stream(mesh, tmp_path, cuda):
    saved_behind(mesh, tmp_path)
    assert {what: count for (thread, what), count in cuda.items() if thread == "save"} == {"set_device": 1}
    assert cuda["MainThread", "synchronize"] == 1, "the copies must have come before training changes what is copied"


def test_the_count_sees_torch_s_own_loader(mesh, tmp_path, cuda, monkeypatch):
    """The twin: with torch's default the thread waits for the stream at every 10 MB of host memory."""
    original = CheckedWriter.__init__

    def ahead(self, path):
        original(self, path)
        self.per_thread_copy_ahead = 10_000_000

    monkeypatch.setattr(CheckedWriter, "__init__", ahead)
    saved_behind(mesh, tmp_path)
    assert cuda["save", "synchronize"] >= 2


def groups_after_saves(folder) -> tuple[int, int, int]:
    """How many groups there are with a mesh, after a save, and after another's."""
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.parallel.mesh import build_mesh

    mesh, count = (
        build_mesh(Layout(data_shard=2), torch.device("cpu")),
        lambda: len(dist.distributed_c10d._world.pg_map),
    )
    counts = [count()]
    for _ in range(2):
        saved_behind(mesh, folder)
        counts.append(count())
    return tuple(counts)


def test_all_saves_share_one_group(tmp_path):
    """It comes with the first save, and no later one brings another."""
    for before, first, second in on_ranks(2, groups_after_saves, tmp_path):
        assert first == second == before + 1

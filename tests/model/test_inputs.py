"""A micro-batch reaches the device by one copy that does not wait: int32, from memory that the reading thread pinned."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megacpt.data.loader import IGNORE, Batch
from megacpt.model.inputs import ALIGNED, HostInputs, to_host, to_inputs
from megacpt.parallel.context import make_plan

ROWS, SEQ_LEN = 2, 48


def batch() -> Batch:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 2**31 - 1, (ROWS, SEQ_LEN))
    labels = np.where(random.random((ROWS, SEQ_LEN)) < 0.2, IGNORE, tokens[:, ::-1])
    positions = np.tile(np.concatenate([np.arange(7), np.arange(41)]), (ROWS, 1))
    return Batch(tokens, labels, positions, np.array([0, 7, 48, 55]), np.array([0, 2, 4]), ["", ""])


def rank_of(size: int, rank: int, device: str = "cpu"):
    layout = SimpleNamespace(context=size)
    return SimpleNamespace(device=torch.device(device), layout=layout, context_rank=rank)


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Tensor]:
    """What is pinned, on a machine that cannot."""
    done, device = [], [None]
    monkeypatch.setattr(torch.cuda, "set_device", lambda which: device.append(which))

    def pin(self):
        assert device[-1] == torch.device("cuda:1"), "a context on another rank's GPU"
        done.append(self)
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return done


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_device_gets_what_the_batch_holds(size):
    whole = batch()
    for rank in range(size):
        plan, inputs = (
            make_plan(whole.document_starts, ROWS * SEQ_LEN, size, rank),
            to_inputs(whole, rank_of(size, rank)),
        )
        for name, dtype in (("tokens", torch.int64), ("labels", torch.int64), ("positions", torch.int32)):
            found = getattr(inputs, name)
            assert found.dtype == dtype and found.tolist() == getattr(whole, name).reshape(-1)[plan.tokens].tolist()
        documents, planned = inputs.plan.documents, plan.documents
        assert (documents.q, documents.k) == (planned.q, planned.k) and inputs.longest == SEQ_LEN
        assert (documents.cu_q.tolist(), documents.cu_k.tolist()) == (list(planned.q), list(planned.k))
        assert documents.cu_q.dtype == documents.cu_k.dtype == torch.int32
        if size == 1:
            assert inputs.plan.keys is None
        else:
            assert inputs.plan.keys.dtype == torch.int32 and inputs.plan.keys.tolist() == plan.keys.tolist()


@pytest.mark.parametrize("size", [1, 2])
def test_one_buffer_is_pinned_for_a_gpu_and_none_for_a_cpu(size, pinned):
    to_host(batch(), rank_of(size, 0))
    assert not pinned
    host = to_host(batch(), rank_of(size, 0, "cuda:1"))
    assert len(pinned) == 1 and pinned[0] is host.buffer and host.buffer.dtype == torch.int32
    assert host.buffer.numel() < sum(host.sizes) + len(host.sizes) * ALIGNED


class Copies(TorchDispatchMode):
    """Copies from the host: (bytes, whether they may return before they are done)."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        from_host = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        if isinstance(out, torch.Tensor) and out.device.type == "meta" and from_host:
            self.found.append((from_host[0].nbytes, bool((kwargs or {}).get("non_blocking"))))
        return out


def test_one_copy_goes_to_the_device_and_does_not_wait():
    with Copies() as copies:
        host = to_host(batch(), rank_of(2, 1))
        inputs = to_inputs(host, rank_of(2, 1, "meta"))
        made_there = inputs.plan.documents.key_range, inputs.plan.documents.query_range
    assert copies.found == [(host.buffer.nbytes, True)] and {x.device.type for x in made_there} == {"meta"}
    with Copies() as copies:
        torch.zeros(3).to("meta")
    assert copies.found == [(12, False)]


def test_a_run_makes_it_in_the_thread_that_reads(mesh, recipe_file, tmp_path, monkeypatch):
    from megacpt.config.load import load_recipe
    from megacpt.train import loop

    threads, kinds = set(), set()
    from megacpt.train import session
    from megacpt.train.handlers import steps

    ahead, step, destroy = session.step_to_host, steps.train_step, loop.dist.destroy_process_group

    def watched(*args):
        threads.add(threading.current_thread().name)
        return ahead(*args)

    def stepped(model, optimizer, batch, *args):
        kinds.update(type(each) for each in batch.micro_batches)
        return step(model, optimizer, batch, *args)

    monkeypatch.setattr(session, "step_to_host", watched)
    monkeypatch.setattr(steps, "train_step", stepped)
    monkeypatch.setattr(loop.dist, "destroy_process_group", lambda group=None: destroy(group) if group else None)
    loop.train(load_recipe(recipe_file(), [f"--run.directory={tmp_path}/run", "--run.stop_at_step=2"]))
    assert threads == {"prefetch"} and kinds == {HostInputs}

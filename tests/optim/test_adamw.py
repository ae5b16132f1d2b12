import pytest
import torch
from tolerances import ADAMW, difference
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megacpt.optim.adamw import AdamW
from megacpt.optim.clip import grad_norm, inverse_clip


def pair(mesh, dtype):
    """The same parameters twice: DTensors for ours, plain for torch's."""
    torch.manual_seed(0)
    shapes = {"matrix": (5, 7), "vector": (7,)}
    plain = {name: nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in shapes.items()}
    ours = {
        n: nn.Parameter(DTensor.from_local(p.detach().clone(), mesh.tensor, [Replicate()])) for n, p in plain.items()
    }
    return ours, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_updates_equal_torchs_with_decay_on_matrices_only(mesh, dtype):
    ours, plain = pair(mesh, dtype)
    optimizer = AdamW(ours, decayed=["matrix"])
    groups = [{"params": [plain["matrix"]], "weight_decay": 0.3}, {"params": [plain["vector"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-7)
    for step in range(5):
        for name, parameter in plain.items():
            parameter.grad = torch.randn(parameter.shape, dtype=dtype, generator=torch.Generator().manual_seed(step))
            ours[name].grad = DTensor.from_local(parameter.grad.clone(), mesh.tensor, [Replicate()])
        norm = grad_norm(list(ours.values()), mesh)
        expected = nn.utils.get_total_norm([p.grad for p in plain.values()])
        assert difference(norm, expected) < 1e-6
        for parameter in plain.values():  # torch's clip_grad_norm_ adds 1e-6 to the norm; here nothing is added
            parameter.grad /= max(1.0, norm.item() / 2.0)
        optimizer.step(1e-2, (0.8, 0.9), 1e-7, 0.3, inverse_clip(norm, 2.0))
        reference.step()
    for name in plain:
        assert difference(ours[name]._local_tensor, plain[name]) < ADAMW[dtype]


def test_decay_acts_on_what_is_named(mesh):
    """Whatever its shape: the family's table decides."""
    ours, plain = pair(mesh, torch.float64)
    for parameter in ours.values():
        parameter.grad = DTensor.from_local(torch.zeros_like(parameter._local_tensor), mesh.tensor, [Replicate()])
    AdamW(ours, decayed=["vector"]).step(1e-2, (0.8, 0.9), 1e-8, 0.3)
    assert difference(ours["vector"]._local_tensor, plain["vector"] * (1 - 3e-3)) < ADAMW[torch.float64]
    assert torch.equal(ours["matrix"]._local_tensor, plain["matrix"])


def test_the_comparison_sees_decay_on_norms(mesh):
    ours, plain = pair(mesh, torch.float64)
    for parameter in ours.values():
        parameter.grad = DTensor.from_local(
            torch.ones(parameter.shape, dtype=torch.float64), mesh.tensor, [Replicate()]
        )
    optimizer = AdamW(ours)
    optimizer._groups = lambda decay: {(decay, 1): list(ours)}
    optimizer.step(1e-2, (0.8, 0.9), 1e-8, 0.3)
    undecayed = plain["vector"] - 1e-2  # the first update of a constant gradient is lr
    assert difference(ours["vector"]._local_tensor, undecayed) > 1e-4


def test_clipping_divides_only_above_the_bound():
    assert inverse_clip(torch.tensor(0.5), 1.0) == 1.0
    assert inverse_clip(torch.tensor(4.0), 2.0) == 2.0
    assert inverse_clip(torch.tensor(4.0), None) == 1.0
    assert inverse_clip(torch.tensor(4.0), 2.0, torch.tensor(True)).isnan()


PLAN = [("matrix",), (), ("matrix", "vector"), ("vector",), (), ("matrix",)]
"""What is frozen in each of six stages of three updates."""


def updated(mesh, dtype, backend, plan, optimizer=AdamW, skipped=()):
    """(ours, torch's) weights after the stages; updates in `skipped` are handed a clip coefficient of nan, and torch does not see them."""
    ours, plain = pair(mesh, dtype)
    ours_too = optimizer(ours, backend, decayed=["matrix"])
    groups = [{"params": [plain["matrix"]], "weight_decay": 0.3}, {"params": [plain["vector"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-7)
    for number in range(3 * len(plan)):
        frozen = plan[number // 3]
        for name, parameter in plain.items():
            gradient = torch.randn(parameter.shape, dtype=dtype, generator=torch.Generator().manual_seed(number))
            parameter.grad = None if name in frozen else gradient
            ours[name].grad = (
                None if name in frozen else DTensor.from_local(gradient.clone(), mesh.tensor, [Replicate()])
            )
        bad = number in skipped
        ours_too.step(
            1e-2, (0.8, 0.9), 1e-7, 0.3, torch.tensor(float("nan") if bad else 1.0, dtype=torch.float64), frozen
        )
        if bad:
            ours_too.take_back()
        else:
            reference.step()
    counts = {
        name: int(reference.state[plain[name]]["step"]) if plain[name] in reference.state else 0 for name in plain
    }
    assert {name: ours_too.count_of(name) for name in plain} == counts or optimizer is not AdamW
    return ours, plain


@pytest.mark.parametrize(
    "dtype, backend", [(torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")]
)
def test_frozen_and_thawed_parameters_count_their_own_updates_as_torchs_do(mesh, dtype, backend):
    """Freeze, thaw, freeze over six stages, with updates that were not made in between."""
    for skipped in ((), (0, 4, 5, 7, 17)):
        ours, plain = updated(mesh, dtype, backend, PLAN, skipped=skipped)
        for name in plain:
            assert difference(ours[name]._local_tensor, plain[name]) < ADAMW[dtype], (name, skipped)


def test_apex_takes_one_count_a_call(mesh, monkeypatch):
    """A stand-in for its kernel that computes with torch what it is handed."""
    import sys

    calls = []

    class Stand:
        @staticmethod
        def multi_tensor_adam(chunk, overflow, lists, lr, b1, b2, eps, step, mode, correct, decay):
            grads, weights, first, second = lists
            calls.append(step)
            counts = [torch.tensor(float(step))] * len(weights)
            torch._fused_adamw_(
                weights, grads, first, second, [], counts, lr=lr, beta1=b1, beta2=b2, weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip

    monkeypatch.setattr(sys.modules["megacpt_kernels.adamw"], "find_apex", lambda device: Stand)
    ours, plain = updated(mesh, torch.float32, "apex", PLAN)
    assert all(difference(ours[name]._local_tensor, plain[name]) < ADAMW[torch.float32] for name in plain)
    assert calls[:3] == [1, 2, 3] and calls[3:5] == [1, 4], "one call for each count"


def test_the_twin_with_one_count_for_all_is_seen(mesh):
    class OneCount(AdamW):
        def count_of(self, name):
            return self.num_updates

    ours, plain = updated(mesh, torch.float64, "torch", PLAN, OneCount)
    assert all(difference(ours[name]._local_tensor, plain[name]) > 1e-4 for name in plain)


def test_counts_are_few_numbers_and_come_back(mesh):
    """Names of other ranks are counted too; nothing is kept of a parameter that was never frozen."""
    ours, _ = pair(mesh, torch.float32)
    optimizer = AdamW(ours)
    for parameter in ours.values():
        parameter.grad = DTensor.from_local(torch.ones(parameter.shape), mesh.tensor, [Replicate()])
    optimizer.step(1e-2, (0.8, 0.9), 1e-7, 0.0, None, ["of another rank"])
    optimizer.step(1e-2, (0.8, 0.9), 1e-7, 0.0)
    assert (optimizer.num_updates, optimizer.missed) == (2, {"of another rank": 1})
    optimizer.step(1e-2, (0.8, 0.9), 1e-7, 0.0, None, ["of another rank"])
    optimizer.take_back()
    assert (optimizer.num_updates, optimizer.missed, optimizer.count_of("of another rank")) == (
        2,
        {"of another rank": 1},
        1,
    )
    again = AdamW(ours)
    again.restore(optimizer.num_updates, optimizer.missed)
    assert again.count_of("of another rank") == 1 and again.count_of("matrix") == 2

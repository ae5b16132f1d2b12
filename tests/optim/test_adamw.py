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
    optimizer = AdamW(ours)
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
    optimizer._groups = lambda decay: [(decay, list(ours))]
    optimizer.step(1e-2, (0.8, 0.9), 1e-8, 0.3)
    undecayed = plain["vector"] - 1e-2  # the first update of a constant gradient is lr
    assert difference(ours["vector"]._local_tensor, undecayed) > 1e-4


def test_clipping_divides_only_above_the_bound():
    assert inverse_clip(torch.tensor(0.5), 1.0) == 1.0
    assert inverse_clip(torch.tensor(4.0), 2.0) == 2.0
    assert inverse_clip(torch.tensor(4.0), None) == 1.0
    assert inverse_clip(torch.tensor(4.0), 2.0, torch.tensor(True)).isnan()

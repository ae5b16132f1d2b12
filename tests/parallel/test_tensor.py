"""Column and row products under every overlap: the numbers of one process, and weight gradients that are computed later."""

from dataclasses import dataclass

import pytest
import torch
from ranks import on_ranks
from tolerances import difference

T, H, F = 24, 16, 12


@dataclass
class Place:
    """A linear as layers have them (`tensor.NamedParameter`), of any tensors."""

    name: str
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None = None
    more: tuple[torch.nn.Parameter, ...] = ()

    def parts(self):
        return [(part, slice(None)) for part in (self.weight, *self.more)]


def parts(overlap: str, later: bool) -> dict[str, torch.Tensor]:
    """On a rank of two: silu(x A + c) times x A, then B; the outputs and gradients, gathered."""
    import contextlib

    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from megacpt.parallel.collectives import gather_tokens
    from megacpt.parallel.tensor import DeferredWeightGrads, TensorAxis, column_parallel, compute_deferred, row_parallel

    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,))
    group = mesh.get_group()
    x, a, b, c = (t.double() for t in reference_inputs())
    mine = lambda whole, dim: whole.chunk(size, dim)[rank].clone().contiguous()
    x = mine(x, 0).requires_grad_()
    a, b, c = (
        torch.nn.Parameter(DTensor.from_local(mine(whole, dim), mesh, [Shard(dim)], run_check=False))
        for whole, dim in ((a, 0), (b, 1), (c, 0))
    )
    axis, queue = TensorAxis(group, overlap, chunks=5), DeferredWeightGrads() if later else None
    stand_in = contextlib.nullcontext()
    if overlap == "symmetric_memory":  # torch's own, behind its operations, which need GPUs that share memory
        stand_in = symmetric._test_mode([group.group_name])
        library = torch.library.Library("symm_mem", "IMPL")
        library.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul, "CPU")
        library.impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter, "CPU")
    with stand_in:
        first, second = column_parallel(x, [Place("first", a, c), Place("second", a)], axis, later=queue)
        out = row_parallel(torch.nn.functional.silu(first) * second, Place("third", b), axis, queue)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    if later:
        assert a.grad is None and b.grad is None
        compute_deferred(queue)
    whole = lambda part, dim: gather_tokens(part.detach().transpose(0, dim).contiguous(), group).transpose(0, dim)
    return {
        "out": whole(out, 0),
        "x": whole(x.grad, 0),
        "a": whole(a.grad._local_tensor, 0),
        "b": whole(b.grad._local_tensor, 1),
        "c": whole(c.grad._local_tensor, 0),
    }


def reference_inputs():
    torch.manual_seed(0)
    return torch.randn(T, H), torch.randn(F, H), torch.randn(H, F), torch.randn(F)


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("overlap", ["none", "chunked", "symmetric_memory"])
def test_products_equal_one_process(overlap, later):
    x, a, b, c = (t.double().requires_grad_() for t in reference_inputs())
    out = (torch.nn.functional.silu(x @ a.t() + c) * (x @ a.t())) @ b.t()
    size = out.numel() // 2
    weights = torch.cat([torch.arange(size), torch.arange(size)]).view(out.shape)
    (out * weights).sum().backward()
    expected = {"out": out, "x": x.grad, "a": a.grad, "b": b.grad, "c": c.grad}
    for found in on_ranks(2, parts, overlap, later):
        assert all(difference(found[name], expected[name]) < 1e-13 for name in expected)


def test_the_fused_products_are_registered_before_they_are_used(monkeypatch):
    """torch 2.11 registers them when their module is imported, later versions sooner: here nothing is there before."""
    from types import SimpleNamespace

    from megacpt import compat

    there = SimpleNamespace()

    def register(name: str) -> None:
        assert name == "torch.distributed._symmetric_memory"
        there.fused_all_gather_matmul = "the operation"

    monkeypatch.setattr(torch.ops, "symm_mem", there)
    monkeypatch.setattr(compat.importlib, "import_module", register)
    assert compat.symmetric_memory("fused_all_gather_matmul") == "the operation"


def test_symmetric_memory_needs_gpus(mesh):
    from samples import tiny_config

    from megacpt.errors import ConfigError
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model
    from megacpt.model.decoder import ModelOptions

    with pytest.raises(ConfigError, match="needs CUDA GPUs, this is a CPU"):
        build_model(parse_config(tiny_config(), "t"), mesh, torch.float32, ModelOptions(overlap="symmetric_memory"))

"""Every product by weights is one of a `Gemm`: counted in whole steps, broken one by one, and with one that has more than a matrix."""

import ast
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from samples import family_config
from tolerances import difference
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "linear", "matmul", "einsum", "dot", "mv")
LAYOUTS = {
    "one": {},
    "tp2": dict(tensor=2),
    "tp2 chunked": dict(tensor=2, overlap="chunked"),
    "pp2 zb-h1": dict(pipeline=2, schedule="zb-h1"),
    "full recomputation": dict(activation_checkpointing="full"),
}
METHODS = ("forward", "input_gradient", "weight_gradient")


def products_of_a_step(around: str, **degrees) -> dict[str, int]:
    """On a rank: products of a step, of a forward without gradients and of log-probabilities, as torch runs them and as the Gemm makes
    them."""
    import numpy as np

    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.data.loader import Batch, StepCounts
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.inputs import to_inputs
    from megacpt.model.run import forward_backward, forward_losses
    from megacpt.model.split import plan_pipeline
    from megacpt.parallel import gemm, tensor
    from megacpt.parallel.mesh import build_mesh

    made, ran = Counter(), Counter()
    for name in METHODS:
        count_calls(gemm.PlainGemm, name, made)
    if around:
        monkey = lambda x, operand, axis: tensor.scatter_sum_tokens(x @ operand.parts[0].t(), axis.group)
        tensor._summed_product = monkey

    class Ran(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name().split("::")[-1].split(".")[0]
            ran["products"] += name in PRODUCTS
            return function(*args, **(kwargs or {}))

    parallel = Parallel(**degrees)
    config = parse_config(family_config("qwen2", tie_word_embeddings=False), "test")
    mesh = build_mesh(Layout(pipeline=parallel.pipeline, tensor=parallel.tensor), torch.device("cpu"))
    plan = plan_pipeline(config.num_hidden_layers, parallel)
    model = build_model(
        config, mesh, torch.float32, ModelOptions(overlap=parallel.overlap), plan, sharding_of(parallel)
    )
    initialize(model, config, 1)
    model.set_activation_checkpointing(parallel.activation_checkpointing)
    tokens = np.random.default_rng(0).integers(0, 400, (1, 64))
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.arange(64)[None], np.array([0]), np.array([0]), [""])
    with Ran():
        forward_backward(model, [batch, batch], StepCounts(128, 128, 2), "step")
        forward_losses(model, 1, lambda _: batch, lambda *_: None)
        if model.head is not None and parallel.pipeline == 1:
            inputs = to_inputs(batch, mesh)
            with torch.no_grad():
                model.log_probs(model(0, None, inputs), inputs)
    return {"ran": ran["products"], **{name: made[name] for name in METHODS}}


def count_calls(kind: type, name: str, counts: Counter) -> None:
    original = getattr(kind, name)

    def counted(self, *args, **more):
        counts[name] += 1
        return original(self, *args, **more)

    setattr(kind, name, counted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_product_goes_around(layout):
    degrees = LAYOUTS[layout]
    ranks = degrees.get("tensor", 1) * degrees.get("pipeline", 1)
    for found in on_ranks(ranks, partial(products_of_a_step, "", **degrees)):
        assert found["ran"] == sum(found[name] for name in METHODS), found
        assert all(found[name] for name in METHODS)
        assert found["input_gradient"] == found["weight_gradient"]


def test_the_count_sees_a_product_that_goes_around():
    (found,) = on_ranks(1, products_of_a_step, "the sums")
    assert found["ran"] > sum(found[name] for name in METHODS)


T, H, F, R, SCALE = 24, 16, 12, 3, 0.5


def factors() -> list[torch.Tensor]:
    """x; then of a column and a row linear: the matrix and the two factors that are added to it."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, H), (F, H), (R, H), (F, R), (H, F), (R, F), (H, R)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def low_rank(later: bool, frozen: bool) -> dict[str, torch.Tensor | None]:
    """On a rank of two: silu(x (A + s D C)) (B + s G E), each with its factors in the same linear; output and gradients, gathered."""
    import torch.distributed as dist
    from test_tensor import Place
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from megacpt.parallel.collectives import gather_tokens
    from megacpt.parallel.gemm import PlainGemm
    from megacpt.parallel.tensor import (
        DeferredWeightGrads,
        TensorAxis,
        column_parallel,
        compute_deferred,
        row_parallel,
        sum_replicated_gradients,
    )

    class LowRank(PlainGemm):
        is_plain = False

        def forward(self, x, w, bias=None):
            matrix, a, b = w.parts
            return super().forward(x, w._replace(parts=(matrix,)), bias) + SCALE * (x @ a.t()) @ b.t()

        def input_gradient(self, dy, w, into=None):
            matrix, a, b = w.parts
            return super().input_gradient(dy, w._replace(parts=(matrix,)), into) + SCALE * (dy @ b) @ a

        def weight_gradient(self, dy, x, w, wanted, into=None):
            matrix, a, b = w.parts
            plain = super().weight_gradient(dy, x, w._replace(parts=(matrix,)), wanted, into)
            return *plain, SCALE * (dy @ b).t() @ x, SCALE * dy.t() @ (x @ a.t())

    size, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (size,))
    group = mesh.get_group()
    x, *weights = factors()
    placements = [Shard(0), Replicate(), Shard(0), Shard(1), Shard(1), Replicate()]

    def parameter(whole, placement):
        local = whole if placement.is_replicate() else whole.chunk(size, placement.dim)[rank].clone().contiguous()
        return torch.nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False))

    w1, a1, b1, w2, a2, b2 = made = [parameter(*each) for each in zip(weights, placements, strict=True)]
    if frozen:
        w1.requires_grad_(False)
        w2.requires_grad_(False)
    x = x.chunk(size)[rank].clone().requires_grad_()
    axis, queue = TensorAxis(group, gemm=LowRank()), DeferredWeightGrads() if later else None
    (hidden,) = column_parallel(x, [Place("up", w1, more=(a1, b1))], axis, queue)
    out = row_parallel(torch.nn.functional.silu(hidden), Place("down", w2, more=(a2, b2)), axis, queue)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    if later:
        assert all(p.grad is None for p in made)
        compute_deferred(queue)
    sum_replicated_gradients(made, group)

    def whole(part, dim):
        return gather_tokens(part.detach().transpose(0, dim).contiguous(), group).transpose(0, dim)

    found = {"out": whole(out, 0), "x": whole(x.grad, 0)}
    for name, p, placement in zip(("w1", "a1", "b1", "w2", "a2", "b2"), made, placements, strict=True):
        grad = None if p.grad is None else p.grad._local_tensor
        found[name] = grad if grad is None or placement.is_replicate() else whole(grad, placement.dim)
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "matrices frozen"])
@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_a_linear_may_have_more_than_a_matrix(later, frozen):
    """Factors of an adapter, column- and row-parallel, without a line of the layers changed: sums over tp are those that are there."""
    x, w1, a1, b1, w2, a2, b2 = values = [value.requires_grad_() for value in factors()]
    out = torch.nn.functional.silu(x @ (w1 + SCALE * b1 @ a1).t()) @ (w2 + SCALE * b2 @ a2).t()
    size = out.numel() // 2
    (out * torch.cat([torch.arange(size), torch.arange(size)]).view(out.shape)).sum().backward()
    names = ("x", "w1", "a1", "b1", "w2", "a2", "b2")
    expected = {"out": out, **{name: value.grad for name, value in zip(names, values, strict=True)}}
    for found in on_ranks(2, low_rank, later, frozen):
        none = {name for name, value in found.items() if value is None}
        assert none == ({"w1", "w2"} if frozen else set())
        assert all(difference(found[name], expected[name]) < 1e-13 for name in found.keys() - none)


def products_written(path: Path) -> list[str]:
    """Where a file multiplies matrices."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
        on_chip = name == "dot" and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "tl"
        operator = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult)
        if operator or (
            not on_chip and name in (*PRODUCTS, "addmv", "addmv_", "addbmm", "chain_matmul", "tensordot", "inner")
        ):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_no_product_is_written_elsewhere():
    """In the rooms of the model's computation, and in the head, whose one kernel that multiplies on the chip stands for plain products."""
    rooms = [*(ROOT / "megacpt/parallel").rglob("*.py"), *(ROOT / "megacpt/model").rglob("*.py")]
    head = ROOT / "kernels/megacpt_kernels/linear_cross_entropy.py"
    assert [place for path in [*rooms, head] for place in products_written(path)] == []
    assert len(products_written(ROOT / "kernels/megacpt_kernels/gemm.py")) == 5

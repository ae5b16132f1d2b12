"""Triton kernels against float64: fenced inputs, poisoned outputs, sizes that divide nothing, borders of shards. In the interpreter
on a CPU; on a GPU, compiled, with `TRITON_INTERPRET=0 pytest tests/kernels/test_triton.py`."""

import sys

import pytest
import torch
from tolerances import ADAMW, ATTENTION, KERNEL, difference

pytest.importorskip("triton", reason="needs Triton (Linux)")
from megacpt_kernels import (
    Documents,
    adamw_,
    add_rms_norm,
    attention,
    cross_entropy_,
    embedding,
    linear_cross_entropy,
    linear_lse,
    rms_norm,
    rope_qk,
    rope_qk_,
    swiglu,
)
from megacpt_kernels.backend import INTERPRETED
from megacpt_kernels.linear_cross_entropy import Done, Ranks

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs TRITON_INTERPRET=1 before the first import, or a CUDA device",
)
DTYPES = [torch.float32, torch.bfloat16]
FENCE = 64


class Fenced:
    """A tensor inside a buffer of NaNs that must be left alone."""

    def __init__(self, values: torch.Tensor):
        self.buffer = torch.full((values.numel() + 2 * FENCE,), float("nan"), dtype=values.dtype)
        self.tensor = self.buffer[FENCE:-FENCE].view(values.shape)
        self.tensor.copy_(values)

    def whole(self) -> bool:
        return bool(self.buffer[:FENCE].isnan().all() and self.buffer[-FENCE:].isnan().all())


def random(*shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)


def integers(high: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, (count,), generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def compare(function, reference, inputs: list[torch.Tensor]) -> float:
    """The largest relative difference of outputs and gradients from float64; inputs and cotangents stand between fences."""
    fenced = [Fenced(x) for x in inputs]
    given = [f.tensor.requires_grad_() for f in fenced]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, want = function(*given), reference(*wide)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    cotangents = [Fenced(random(*y.shape, dtype=y.dtype, seed=7 + i)) for i, y in enumerate(got)]
    found = torch.autograd.grad(got, given, [c.tensor for c in cotangents])
    exact = torch.autograd.grad(want, wide, [c.tensor.double() for c in cotangents])
    assert all(f.whole() for f in [*fenced, *cotangents])
    assert all(x.dtype == y.dtype for x, y in zip(found, given, strict=True))
    return max(difference(a, b) for a, b in zip([*got, *found], [*want, *exact], strict=True))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write stays a NaN."""
    plain = {name: getattr(torch, name) for name in ("empty", "empty_like")}
    for name, make in plain.items():
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: make(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, h", [(1, 7), (0, 8), (33, 129), (6, 128)])
def test_rms_norm(rows, h, dtype):
    inputs = [random(rows, h, dtype=dtype), random(h, dtype=dtype, seed=1)]
    assert compare(lambda x, w: rms_norm(x, w, 1e-5, backend="triton"), norm, inputs) <= KERNEL[dtype]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, h", [(1, 7), (0, 8), (33, 129)])
def test_add_rms_norm(rows, h, dtype, backend):
    inputs = [random(rows, h, dtype=dtype), random(rows, h, dtype=dtype, seed=2), random(h, dtype=dtype, seed=1)]
    reference = lambda x, r, w: (norm(x + r, w), x + r)
    assert compare(lambda x, r, w: add_rms_norm(x, r, w, 1e-5, backend), reference, inputs) <= KERNEL[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 0, 37, 200])
def test_swiglu(rows, dtype):
    inputs = [random(rows, 13, dtype=dtype), random(rows, 13, dtype=dtype, seed=1)]
    reference = lambda g, u: g * torch.sigmoid(g) * u
    assert compare(lambda g, u: swiglu(g, u, backend="triton"), reference, inputs) <= KERNEL[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv, d", [(3, 1, 8), (18, 2, 12), (4, 0, 8)])
def test_rope(heads, kv, d, dtype):
    """Positions restart in the middle; q and k are slices of one product, so their tokens stand apart."""
    angles = torch.arange(91)[:, None] * torch.rand(d // 2)
    cos, sin, positions = angles.cos(), angles.sin(), torch.tensor([0, 1, 2, 0, 1, 90], dtype=torch.int32)

    def reference(packed):
        q, k = packed.view(6, heads + kv, d).split([heads, kv], 1)
        c, s = (torch.cat([x, x], -1)[positions][:, None].to(packed.dtype) for x in (cos, sin))
        turned = lambda x: torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return q * c + turned(q) * s, k * c + turned(k) * s

    def ours(packed):
        both = packed.view(6, heads + kv, d).split([heads, kv], 1)
        return rope_qk(*both, cos, sin, positions, backend="triton")

    packed = random(6, (heads + kv) * d, dtype=dtype)
    assert compare(ours, reference, [packed]) <= KERNEL[dtype]
    fenced = [Fenced(x) for x in packed.view(6, heads + kv, d).split([heads, kv], 1)]
    rope_qk_(*(f.tensor for f in fenced), cos, sin, positions, backend="triton")
    want = reference(packed.double())
    assert all(
        f.whole() and difference(f.tensor, w) <= KERNEL[dtype] for f, w in zip(fenced, want, strict=True) if w.numel()
    )


def test_the_comparison_sees_a_row_that_is_not_written(monkeypatch):
    """Twin: one program less."""
    module = sys.modules["megacpt_kernels.swiglu"]  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "_grid", lambda x: (x.numel() // module._BLOCK,))
    inputs = [random(200, 13), random(200, 13, seed=1)]
    assert not compare(lambda g, u: swiglu(g, u, backend="triton"), lambda g, u: g * torch.sigmoid(g) * u, inputs) < 1


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_bfloat16_arithmetic_without_a_cast_raises():
    """Twin of the interpreter's repair."""
    import triton
    import triton.language as tl

    @triton.jit
    def double(x, y):
        tl.store(y, tl.load(x) + tl.load(x))

    with pytest.raises(Exception, match="bfloat16 arithmetic"):
        double[(1,)](torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, valid", [(5, 23, 23), (3, 23, 20), (1, 1, 1), (0, 8, 8), (2, 5000, 4999)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy(rows, columns, valid, z_loss, dtype):
    fenced = Fenced(3 * random(rows, columns, dtype=dtype))
    target = integers(valid, rows, 1)
    target[rows // 2 : rows // 2 + 1] = -100
    exact = fenced.tensor.double().requires_grad_()
    lse = exact[:, :valid].logsumexp(-1)
    want = torch.nn.functional.cross_entropy(exact[:, :valid], target, reduction="none", ignore_index=-100)
    want = want + (target != -100) * z_loss * lse.square()
    weights = Fenced(random(rows, seed=2))
    weights.tensor[::3] = 0
    (want * weights.tensor.double()).sum().backward()
    nll, found = cross_entropy_(fenced.tensor, target, 0, valid, weights.tensor, z_loss=z_loss, backend="triton")
    assert fenced.whole() and weights.whole()
    assert difference(nll, want) <= 1e-6 and difference(found, lse) <= 1e-6
    assert difference(fenced.tensor, exact.grad) <= KERNEL[dtype]
    assert not fenced.tensor[:, valid:].any() and not fenced.tensor[target == -100].any()
    assert not fenced.tensor[::3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_over_shards(dtype):
    """Each shard's statistics by themselves, together by hand; targets on every border, one shard all padding."""
    width, valid = 8, 15
    whole = 2 * random(6, 24, dtype=dtype)
    target = torch.tensor([0, 7, 8, 14, -100, 3])
    local = [max(0, min(width, valid - rank * width)) for rank in range(3)]
    parts, statistics = [whole[:, r * width : (r + 1) * width].clone() for r in range(3)], []

    def collect(rank: int, backend: str):
        keep = lambda own: (statistics.append(own), own[None])[1]
        cross_entropy_(parts[rank].clone(), target, rank * width, local[rank], None, keep, backend=backend)

    for rank in range(3):
        collect(rank, "triton")
    together = torch.stack(statistics)
    exact = whole.double()[:, :valid].requires_grad_()
    weights = random(6, seed=3)
    nll = torch.nn.functional.cross_entropy(exact, target, reduction="none", ignore_index=-100)
    (nll * weights.double()).sum().backward()
    for rank in range(3):
        cross_entropy_(parts[rank], target, rank * width, local[rank], weights, lambda own: together, backend="triton")
    found = torch.cat(parts, 1)
    assert difference(found[:, :valid], exact.grad) <= KERNEL[dtype] and not found[:, valid:].any()


def test_a_target_of_the_next_shard_is_no_hit():
    """Twin: without the check of `valid`, a padded lane would match it and add minus infinity."""
    nll, _ = cross_entropy_(random(1, 16), torch.tensor([20]), 0, 12, None, backend="triton")
    assert torch.isfinite(nll).all()


def test_a_named_backend_that_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="its kernels compute in float32, the input is float64"):
        cross_entropy_(random(1, 4).double(), torch.tensor([0]), 0, 4, None, backend="triton")
    with pytest.raises(ValueError, match="possible are auto, triton, torch"):
        cross_entropy_(random(1, 4), torch.tensor([0]), 0, 4, None, backend="cuda")


@pytest.mark.parametrize("clip", [None, 2.5])
def test_adamw(clip):
    """Five updates of several sizes against torch.optim.AdamW in float64 on gradients that were divided by hand."""
    shapes = [(3, 7), (0,), (1,), (1025,)]
    fenced = [[Fenced(random(*shape, seed=i) * (i == 0)) for shape in shapes] for i in range(3)]
    weights, first, second = ([f.tensor for f in row] for row in fenced)
    exact = [torch.nn.Parameter(w.double()) for w in weights]
    optimizer = torch.optim.AdamW(exact, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    inverse = None if clip is None else torch.tensor(clip, dtype=torch.float64)
    for step in range(1, 6):
        grads = [random(*shape, seed=10 * step) for shape in shapes]
        for parameter, grad in zip(exact, grads, strict=True):
            parameter.grad = grad.double() / (clip or 1.0)
        optimizer.step()
        adamw_(weights, grads, first, second, 1e-2, (0.9, 0.95), 1e-8, 0.1, step, inverse, backend="triton")
    assert all(f.whole() for row in fenced for f in row)
    assert all(difference(w, e) <= ADAMW[torch.float32] for w, e in zip(weights, exact, strict=True) if w.numel())
    moments = [optimizer.state[p] for p in exact]
    assert all(difference(m, s["exp_avg"]) <= 1e-6 for m, s in zip(first, moments, strict=True) if m.numel())
    assert all(difference(v, s["exp_avg_sq"]) <= 1e-6 for v, s in zip(second, moments, strict=True) if v.numel())


EDGES = {
    "one": ((0, 37), (0, 37)),
    "a tile of many": ((0, 1, 6, 11, 16, 40), (0, 1, 6, 11, 16, 40)),
    "longer than a tile": ((0, 3, 70, 71, 150), (0, 3, 70, 71, 150)),
    "keys reach back": ((0, 33, 50), (0, 73, 101)),
}


def attention_reference(q, k, v, documents):
    """Softmax with an explicit mask."""
    _, heads, d = q.shape
    of = lambda e: torch.bucketize(torch.arange(e[-1]), torch.tensor(e[1:]), right=True)
    from_end = lambda e: torch.tensor(e)[of(e) + 1] - torch.arange(e[-1])
    visible = (of(documents.q)[:, None] == of(documents.k)) & (
        from_end(documents.k)[None] >= from_end(documents.q)[:, None]
    )
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def documents_of(edges) -> Documents:
    return Documents(*edges, *(torch.tensor(e, dtype=torch.int32) for e in edges))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edges, heads, kv, d", [(e, 4, 2, 8) for e in EDGES] + [("a tile of many", 3, 1, 20)])
def test_attention(edges, heads, kv, d, dtype):
    documents = documents_of(EDGES[edges])
    tq, tk = documents.q[-1], documents.k[-1]
    inputs = [
        random(tq, heads, d, dtype=dtype),
        random(tk, kv, d, dtype=dtype, seed=1),
        random(tk, kv, d, dtype=dtype, seed=2),
    ]
    ours = lambda q, k, v: attention(q, k, v, documents, backend="triton", check=True)
    assert compare(ours, lambda *x: attention_reference(*x, documents), inputs) <= ATTENTION[dtype]
    again = [torch.autograd.grad(ours(*(x := [y.clone().requires_grad_() for y in inputs])).sum(), x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))  # no atomics: the same bits
    lse = attention(*inputs, documents, backend="triton", return_lse=True)[1]
    want = attention(*(x.double() for x in inputs), documents, return_lse=True)[1]
    assert difference(lse, want) <= 1e-6


def test_attention_whole_tiles_are_used_and_needed(monkeypatch):
    """A document longer than several tiles; the twin moves its boundary by one."""
    module = sys.modules["megacpt_kernels.flash_attention"]
    monkeypatch.setattr(module, "SMALL", dict(M=16, N=16, num_warps=4, num_stages=1))
    documents = documents_of(((0, 5, 90), (0, 5, 90)))
    inputs = [random(90, 2, 8), random(90, 1, 8, seed=1), random(90, 1, 8, seed=2)]
    ours = lambda *x: attention(*x, documents, backend="triton")
    assert compare(ours, lambda *x: attention_reference(*x, documents), inputs) <= ATTENTION[torch.float32]
    moved = documents_of(((0, 6, 90), (0, 6, 90))).key_range
    monkeypatch.setattr(Documents, "key_range", property(lambda self: moved))
    broken = ours(*inputs)
    assert difference(broken, attention_reference(*inputs, documents)) > 1e-3


def test_what_a_query_sees_is_what_the_mask_shows():
    """The four bounds against the plain mask, and none of them falls."""
    for edges in EDGES.values():
        documents = documents_of(edges)
        seen, by = documents.key_range.long(), documents.query_range.long()
        key, query = torch.arange(edges[1][-1]), torch.arange(edges[0][-1])
        one = (key[None] >= seen[0][:, None]) & (key[None] <= seen[1][:, None])
        other = (query[:, None] >= by[0][None]) & (query[:, None] <= by[1][None])
        assert torch.equal(one, other) and all((x.diff() >= 0).all() for x in (*seen, *by))
        lengths = [(b - a, d - c) for a, b, c, d in zip(edges[0], edges[0][1:], edges[1], edges[1][1:], strict=False)]
        assert one.sum() == sum(q * (2 * k - q + 1) // 2 for q, k in lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, valid, hidden", [(1, 5, 5, 7), (37, 75, 145, 40), (0, 8, 8, 8), (3, 8, 8, 4)])
def test_linear_lse(rows, width, valid, hidden, dtype):
    """Two shards of the vocabulary, the second shorter or all padding; each one's numbers are brought together by hand."""
    x, weight = random(rows, hidden, dtype=dtype), random(2 * width, hidden, dtype=dtype, seed=1)
    target = integers(valid, rows, 0)
    fenced, statistics = [Fenced(x), Fenced(weight[:width]), Fenced(weight[width:])], []

    def collect(statistic):
        if statistic.ndim == 3:
            statistics.append(statistic)
        return Done(torch.cat(statistics) if statistic.ndim == 3 else statistic)

    for rank in (0, 1):
        part, real = fenced[1 + rank].tensor, max(0, min(width, valid - rank * width))
        lse, hit, largest = linear_lse(
            fenced[0].tensor, part, target, rank * width, real, Ranks(1, collect), backend="triton"
        )
    logits = (x.double() @ weight.double().t())[:, :valid]
    assert all(f.whole() for f in fenced)
    assert difference(lse, logits.logsumexp(-1)) <= 2e-6
    assert difference(hit, logits.gather(1, target[:, None]).squeeze(1)) <= 2e-6
    assert difference(largest, logits.amax(-1) if valid else largest) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [None, 64 * 9])
def test_linear_cross_entropy(chunk, dtype):
    """Weights of both signs and zeros, in one chunk and in two; loss and both gradients."""
    x, weight, target, weights = (
        random(75, 12, dtype=dtype),
        random(9, 12, dtype=dtype, seed=1),
        integers(8, 75),
        random(75),
    )
    target[7:12], weights[::3] = -100, 0
    given = [t.detach().clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().detach().requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(*given, target, 0, 8, weights, z_loss=1e-2, chunk_logits=chunk, backend="triton")
    logits = (exact[0] @ exact[1].t())[:, :8]
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=-100)
    want = (weights * (target != -100)).double() * (nll + 1e-2 * logits.logsumexp(-1).square())
    assert abs(loss.item() - want.sum().item()) <= KERNEL[dtype] * want.abs().sum().item()
    found, expected = torch.autograd.grad(loss, given), torch.autograd.grad(want.sum(), exact)
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) <= 2 * KERNEL[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", [[3, 9, 3, 0, 12, 7, 3], [5] * 40, [0], []], ids=str)
def test_embedding(ids, dtype):
    ids, table = torch.tensor(ids, dtype=torch.int64), random(6, 9, dtype=dtype)
    mine = ((ids >= 3) & (ids < 9)).double()[:, None]
    reference = lambda t: t[(ids - 3).clamp(0, 5)] * mine
    assert compare(lambda t: embedding(ids, t, 3, backend="triton"), reference, [table]) <= KERNEL[dtype]


def test_both_backends_round_to_the_same_bits():
    """Where the float32 results are the same bits: moments of zero gradients scaled by a power of two."""
    from megacpt_kernels.adamw import ShardPosition

    make = lambda: [[random(40, 30, seed=s).bfloat16()] for s in range(4)]
    got, want = make(), make()
    for tensors, backend in ((got, "triton"), (want, "torch")):
        tensors[1][0] = tensors[1][0].float() * 0
        adamw_(
            *tensors,
            0.0,
            (0.875, 0.9375),
            1.0,
            0.0,
            9,
            None,
            [ShardPosition(2**33 + 5, 30, 77, 3)],
            11,
            backend=backend,
        )
    assert torch.equal(got[2][0], want[2][0]) and torch.equal(got[3][0], want[3][0])
    assert not torch.equal(got[2][0], (random(40, 30, seed=2).bfloat16().float() * 0.875).bfloat16())

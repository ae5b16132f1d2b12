"""Every operation against a plain float64 composition on the same inputs, its gradients, gradcheck, and a broken twin."""

import math

import pytest
import torch
import torch.nn.functional as F
from megacpt_kernels import Documents, attention, cross_entropy_, rms_norm, rope_qk, swiglu
from megacpt_kernels.attention import resolve_backend
from tolerances import ATTENTION, ATTENTION_OUT, KERNEL, WEIGHT_GRAD, difference

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(function, inputs, seed=9):
    """(outputs, gradients of the inputs) under a fixed random cotangent."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [random(*o.shape, dtype=o.dtype, seed=seed + i).detach() for i, o in enumerate(outputs)]
    return outputs, torch.autograd.grad(outputs, inputs, cotangents)


def wide(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def norm_reference(x, w):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, h", [(1, 7), (0, 8), (33, 129)])
def test_rms_norm(rows, h, dtype):
    inputs = [random(rows, h, dtype=dtype), random(h, dtype=dtype, seed=1)]
    got = gradients(lambda x, w: rms_norm(x, w, 1e-5), inputs)
    want = gradients(norm_reference, wide(inputs))
    assert got[0][0].dtype == dtype
    assert difference(got[0][0], want[0][0]) <= KERNEL[dtype]
    assert difference(got[1][0], want[1][0]) <= KERNEL[dtype]
    assert difference(got[1][1], want[1][1]) <= WEIGHT_GRAD[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 0, 37])
def test_swiglu(rows, dtype):
    inputs = [random(rows, 13, dtype=dtype), random(rows, 13, dtype=dtype, seed=1)]
    got = gradients(swiglu, inputs)
    want = gradients(lambda g, u: g * torch.sigmoid(g) * u, wide(inputs))
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert difference(a, b) <= KERNEL[dtype]


def rotate_reference(q, k, cos, sin):
    cos, sin = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
    half = lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return q * cos + half(q) * sin, k * cos + half(k) * sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope(dtype):
    inputs = [random(11, 3, 8, dtype=dtype), random(11, 1, 8, dtype=dtype, seed=1)]
    angles = torch.arange(11)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    got = gradients(lambda q, k: rope_qk(q, k, cos, sin), inputs)
    want = gradients(lambda q, k: rotate_reference(q, k, cos.double(), sin.double()), wide(inputs))
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert difference(a, b) <= KERNEL[dtype]
    with pytest.raises(ValueError, match="cos has shape"):
        rope_qk(*inputs, cos[:5], sin[:5])


def attention_reference(q, k, v, documents):
    """Softmax with an explicit mask."""
    _, heads, d = q.shape
    doc_q, doc_k = (
        torch.bucketize(torch.arange(e[-1]), torch.tensor(e[1:]), right=True) for e in (documents.q, documents.k)
    )
    from_end = lambda e, doc: torch.tensor(e)[doc + 1] - torch.arange(e[-1])
    visible = (doc_q[:, None] == doc_k) & (from_end(documents.k, doc_k)[None] >= from_end(documents.q, doc_q)[:, None])
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(d)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


LAYOUTS = {
    "one": Documents.of([0], 17),
    "many": Documents.of([0, 1, 6, 11, 16, 40], 64),
    "equal": Documents.of([0, 8, 16], 24),
    "keys reach back": Documents((0, 5, 9), (0, 9, 13), torch.tensor([0, 5, 9]), torch.tensor([0, 9, 13])),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout, dtype):
    documents = LAYOUTS[layout]
    inputs = [
        random(documents.q[-1], 4, 8, dtype=dtype),
        *(random(documents.k[-1], 2, 8, dtype=dtype, seed=s) for s in (1, 2)),
    ]
    got = gradients(lambda q, k, v: attention(q, k, v, documents), inputs)
    want = gradients(lambda q, k, v: attention_reference(q, k, v, documents), wide(inputs))
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert difference(a, b) <= ATTENTION[dtype]
    assert difference(got[0][0], want[0][0]) <= ATTENTION_OUT[dtype]


def test_attention_sees_a_moved_boundary():
    inputs = [random(24, 4, 8), random(24, 2, 8, seed=1), random(24, 2, 8, seed=2)]
    moved = attention(*inputs, Documents.of([0, 8, 15], 24))
    assert difference(moved, attention_reference(*inputs, LAYOUTS["equal"])) > 1e-3


def test_a_named_backend_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="'flash-attn': needs a GPU. Use auto or sdpa"):
        resolve_backend("flash-attn", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="is unknown. Possible: auto"):
        resolve_backend("flash", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match="must begin at 0 and grow"):
        Documents.of([0, 5, 5], 9)


def loss_reference(logits, target, valid, scale):
    logits = logits.clone()
    logits[:, valid:] = -math.inf
    return F.cross_entropy(logits, target, reduction="none", ignore_index=-100), scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("valid", [23, 20])
def test_cross_entropy(valid, dtype):
    logits = (3 * random(9, 23, dtype=dtype).detach()).requires_grad_()
    target = torch.tensor([0, valid - 1, -100, 5, 7, -100, 1, 2, 3])
    exact = logits.detach().double().requires_grad_()
    want = loss_reference(exact, target, valid, 0.37)[0]
    (want.sum() * 0.37).backward()
    buffer = logits.detach().clone()
    nll, lse = cross_entropy_(buffer, target, 0, valid, 0.37)
    assert difference(nll, want) <= 1e-6 and nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert difference(lse, exact[:, :valid].logsumexp(-1)) <= 1e-6
    assert difference(buffer, exact.grad) <= KERNEL[dtype]
    assert not buffer[:, valid:].any() and not buffer[target == -100].any()


@pytest.mark.parametrize("shards", [2, 3])
def test_cross_entropy_over_shards_is_that_of_the_whole(shards):
    """Shards run in lockstep by hand: the collective waits for all of them. Targets stand on the borders."""
    import threading

    logits, width, valid = random(6, 8 * shards).detach(), 8, 8 * shards - 5
    target = torch.tensor([0, 7, 8, valid - 1, -100, 3])
    whole = logits.clone()
    want = cross_entropy_(whole, target, 0, valid, 0.5)
    barrier, box, results = threading.Barrier(shards), {}, {}

    def work(rank: int) -> None:
        def gather(statistics):
            box[rank] = statistics
            barrier.wait()
            return torch.stack([box[r] for r in range(shards)])

        part = logits[:, rank * width : (rank + 1) * width].clone()
        local_valid = max(0, min(width, valid - rank * width))
        results[rank] = (part, *cross_entropy_(part, target, rank * width, local_valid, 0.5, gather))

    threads = [threading.Thread(target=work, args=(r,)) for r in range(shards)]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    assert difference(torch.cat([results[r][0] for r in range(shards)], 1), whole) < 1e-13
    assert all(difference(results[r][i + 1], want[i]) < 1e-13 for r in range(shards) for i in (0, 1))


def test_gradcheck():
    check = lambda function, *inputs: torch.autograd.gradcheck(function, inputs)
    assert check(lambda x, w: rms_norm(x, w, 1e-5), random(3, 4), random(4, seed=1))
    assert check(swiglu, random(3, 4), random(3, 4, seed=1))
    cos, sin = torch.rand(3, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    assert check(lambda q, k: rope_qk(q, k, cos, sin), random(3, 2, 4), random(3, 1, 4, seed=1))
    documents = Documents.of([0, 2, 3], 6)
    assert check(
        lambda q, k, v: attention(q, k, v, documents), random(6, 2, 4), random(6, 1, 4, seed=1), random(6, 1, 4, seed=2)
    )

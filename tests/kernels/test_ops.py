"""Every operation against a plain float64 composition on the same inputs, its gradients, gradcheck, and a broken twin."""

import math
import sys

import attention_libraries
import pytest
import torch
import torch.nn.functional as F
from megacpt_kernels import (
    Documents,
    adamw_,
    add_rms_norm,
    attention,
    cross_entropy_,
    embedding,
    grad_norm,
    label_weights,
    linear_cross_entropy,
    linear_lse,
    rms_norm,
    rope_qk,
    rope_qk_,
    swiglu,
)
from megacpt_kernels.adamw import ShardPosition
from megacpt_kernels.attention import available_backends, resolve_backend
from megacpt_kernels.device import CPU, H100, DeviceProfile, profile_of
from megacpt_kernels.flash_attention import FORWARD, tile
from shared import LONG_SECONDS
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
    angles = torch.arange(20)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    cos, sin, positions = (
        angles.cos(),
        angles.sin(),
        torch.tensor([0, 1, 2, 0, 1, 0, 19, 3, 3, 2, 7], dtype=torch.int32),
    )
    got = gradients(lambda q, k: rope_qk(q, k, cos, sin, positions), inputs)
    want = gradients(
        lambda q, k: rotate_reference(q, k, cos[positions].double(), sin[positions].double()), wide(inputs)
    )
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert difference(a, b) <= KERNEL[dtype]
    in_place = gradients(lambda q, k: rope_qk_(q * 1, k * 1, cos, sin, positions), inputs)
    assert all(torch.equal(a, b) for a, b in zip([*got[0], *got[1]], [*in_place[0], *in_place[1]], strict=True))


def test_rope_in_place_writes_where_it_read():
    q, k = random(2, 1, 4).detach(), random(2, 1, 4, seed=1).detach()
    tables = torch.ones(2, 2).cos(), torch.ones(2, 2).sin()
    want = rope_qk(q, k, *tables, torch.tensor([0, 1]))
    got = rope_qk_(q, k, *tables, torch.tensor([0, 1]))
    assert got[0].data_ptr() == q.data_ptr() and torch.equal(q, want[0]) and torch.equal(k, want[1])


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


def loss_reference(logits, target, valid):
    logits = logits.clone()
    logits[:, valid:] = -math.inf
    return F.cross_entropy(logits, target, reduction="none", ignore_index=-100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("valid", [23, 20])
def test_cross_entropy(valid, dtype):
    logits = (3 * random(9, 23, dtype=dtype).detach()).requires_grad_()
    target = torch.tensor([0, valid - 1, -100, 5, 7, -100, 1, 2, 3])
    weights = torch.tensor([0.37, -1.5, math.nan, 0.0, 2.0, 1.0, 1e-3, -0.25, 1.0])  # not read without a label
    exact = logits.detach().double().requires_grad_()
    want = loss_reference(exact, target, valid)
    (want * weights.nan_to_num(0.0).double()).sum().backward()
    buffer = logits.detach().clone()
    nll, lse = cross_entropy_(buffer, target, 0, valid, weights)
    assert difference(nll, want) <= 1e-6 and nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert difference(lse, exact[:, :valid].logsumexp(-1)) <= 1e-6
    assert difference(buffer, exact.grad) <= KERNEL[dtype]
    assert not buffer[:, valid:].any() and not buffer[target == -100].any() and not buffer[3].any()


@pytest.mark.parametrize("shards", [2, 3])
def test_cross_entropy_over_shards_is_that_of_the_whole(shards):
    """Shards run in lockstep by hand: the collective waits for all of them. Targets stand on the borders."""
    import threading

    logits, width, valid = random(6, 8 * shards).detach(), 8, 8 * shards - 5
    target = torch.tensor([0, 7, 8, valid - 1, -100, 3])
    whole = logits.clone()
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0])
    want = cross_entropy_(whole, target, 0, valid, weights)
    barrier, box, results = threading.Barrier(shards), {}, {}

    def work(rank: int) -> None:
        def gather(statistics):
            box[rank] = statistics
            barrier.wait()
            return torch.stack([box[r] for r in range(shards)])

        part = logits[:, rank * width : (rank + 1) * width].clone()
        local_valid = max(0, min(width, valid - rank * width))
        results[rank] = (part, *cross_entropy_(part, target, rank * width, local_valid, weights, gather))

    threads = [threading.Thread(target=work, args=(r,)) for r in range(shards)]
    [t.start() for t in threads]
    [t.join(LONG_SECONDS) for t in threads]
    assert difference(torch.cat([results[r][0] for r in range(shards)], 1), whole) < 1e-13
    assert all(difference(results[r][i + 1], want[i]) < 1e-13 for r in range(shards) for i in (0, 1))


def test_gradcheck():
    check = lambda function, *inputs: torch.autograd.gradcheck(function, inputs)
    assert check(lambda x, w: rms_norm(x, w, 1e-5), random(3, 4), random(4, seed=1))
    assert check(swiglu, random(3, 4), random(3, 4, seed=1))
    assert check(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), random(3, 4), random(3, 4, seed=2), random(4, seed=1))
    cos, sin, positions = torch.rand(5, 2), torch.rand(5, 2), torch.tensor([4, 0, 4])
    assert check(lambda q, k: rope_qk(q, k, cos, sin, positions), random(3, 2, 4), random(3, 1, 4, seed=1))
    assert check(lambda q, k: rope_qk_(q * 1, k * 1, cos, sin, positions), random(3, 2, 4), random(3, 1, 4, seed=1))
    assert check(lambda table: embedding(torch.tensor([1, 3, 1, 7]), table, 1), random(3, 4))
    target = torch.tensor([0, 5, -100, 2, 4])
    weights = torch.tensor([1.0, -0.5, 7.0, 0.0, 0.25])
    loss = lambda x, w: linear_cross_entropy(x, w, target, 0, 6, weights, scale=0.3, z_loss=0.1)
    assert check(loss, random(5, 4), random(7, 4, seed=1))
    documents = Documents.of([0, 2, 3], 6)
    assert check(
        lambda q, k, v: attention(q, k, v, documents), random(6, 2, 4), random(6, 1, 4, seed=1), random(6, 1, 4, seed=2)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [None, 64 * 23])
def test_linear_cross_entropy_and_linear_lse(chunk, dtype):
    """150 tokens in chunks of 64 (or one), weights of both signs: loss, both gradients, log-sum-exp and target logits."""
    inputs = [random(150, 12, dtype=dtype), random(23, 12, dtype=dtype, seed=1)]
    target = torch.randint(0, 20, (150,), generator=torch.Generator().manual_seed(3))
    target[40:50] = -100
    exact = wide(inputs)
    logits = (exact[0] @ exact[1].t())[:, :20]
    weights = random_weights(150)
    nll = F.cross_entropy(logits, target, reduction="none", ignore_index=-100)
    want = (nll * weights.double()).sum() * 0.01
    want.backward()
    loss = linear_cross_entropy(*inputs, target, 0, 20, weights, scale=0.01, chunk_logits=chunk)
    loss.backward()
    size = (nll * weights.double()).abs().sum().item() * 0.01  # terms cancel: the error is on their scale
    assert abs(loss.item() - want.item()) <= max(KERNEL[dtype], 1e-13) * size
    for got, reference in zip(inputs, exact, strict=True):
        assert difference(got.grad, reference.grad) <= (2 * KERNEL[dtype] if dtype == torch.bfloat16 else KERNEL[dtype])
    lse, hit, largest = linear_lse(inputs[0].detach(), inputs[1].detach(), target, 0, 20)
    labelled = target >= 0
    picked = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    assert difference(lse, logits.logsumexp(-1)) <= KERNEL[dtype]
    assert difference(largest, logits.amax(-1)) <= KERNEL[dtype]
    assert difference(hit[labelled], picked[labelled]) <= KERNEL[dtype] and not hit[~labelled].any()


def random_weights(count):
    """float32 [count], a third of them 0, of both signs."""
    weights = random(count, seed=5).detach().float()
    weights[::3] = 0
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_weight_for_all_is_a_scale_to_the_bit(dtype):
    """Weights of 1 with a scale, and weights that are all that scale: the same gradients; and only labels count."""
    x, w = random(150, 12, dtype=dtype), random(23, 12, dtype=dtype, seed=1)
    target = torch.randint(0, 20, (150,), generator=torch.Generator().manual_seed(3))
    target[40:50] = -100
    found = []
    scale = 2.0**-7  # exact in every type
    for weights, factor in (
        (torch.ones(150), scale),
        (label_weights(target), scale),
        (label_weights(target, scale), 1.0),
    ):
        loss = linear_cross_entropy(x, w, target, 0, 20, weights, scale=factor, chunk_logits=64 * 23)
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_of_weight_zero_is_a_token_without_label(dtype):
    """To the bit, z-loss included: no loss, no gradient of its hidden state, none in the head."""
    x, w, weights = random(150, 12, dtype=dtype), random(23, 12, dtype=dtype, seed=1), random_weights(150)
    target = torch.randint(0, 20, (150,), generator=torch.Generator().manual_seed(3))
    hidden = torch.where(weights == 0, -100, target)
    found = []
    for ids, given in ((target, weights), (hidden, torch.where(weights == 0, math.nan, weights))):
        loss = linear_cross_entropy(x, w, ids, 0, 20, given, z_loss=0.1, chunk_logits=64 * 23)
        found.append((loss, *torch.autograd.grad(loss, (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and not found[0][1][::3].any()


@pytest.mark.parametrize("broken", ["moved", "ignored"])
def test_the_comparison_sees_wrong_weights(broken, monkeypatch):
    """Twins: weights that belong to the token before, and a gradient that takes none."""
    x, w, weights = random(150, 12), random(23, 12, seed=1), random_weights(150)
    target = torch.randint(0, 20, (150,), generator=torch.Generator().manual_seed(3))
    run = lambda given: torch.autograd.grad(linear_cross_entropy(x, w, target, 0, 23, given), (x, w))
    want = torch.autograd.grad((F.cross_entropy(x @ w.t(), target, reduction="none") * weights).sum(), (x, w))
    assert max(difference(a, b) for a, b in zip(run(weights), want, strict=True)) <= KERNEL[torch.float64]
    if broken == "ignored":
        module = sys.modules["megacpt_kernels.linear_cross_entropy"]
        original = module.cross_entropy_
        plain = lambda logits, ids, start, valid, given, *rest: original(
            logits, ids, start, valid, given * 0 + 1, *rest
        )
        monkeypatch.setattr(module, "cross_entropy_", plain)
    got = run(weights.roll(1) if broken == "moved" else weights)
    assert min(difference(a, b) for a, b in zip(got, want, strict=True)) > 1e-3


def test_a_profile_decides_what_a_device_can_run(monkeypatch):
    """Without the device: FlashAttention-3 is Hopper's, tiles are smaller before it. Where there is no GPU a pretended one is an H100."""
    module = sys.modules["megacpt_kernels.attention"]
    monkeypatch.setattr(module, "missing_library", lambda name: "")
    a100 = DeviceProfile("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30, 108)
    on_hopper, before = available_backends(H100), available_backends(a100)
    assert on_hopper["flash-attn-3"] == "" and before["flash-attn-3"] == "is for sm_90, this is sm_80"
    assert available_backends(CPU)["flash-attn-3"] == "needs a GPU"
    assert module.resolve_backend("auto", H100, torch.bfloat16) == "flash-attn-3"
    with pytest.raises(ValueError, match="is for sm_90, this is sm_80"):
        module.resolve_backend("flash-attn-3", a100, torch.bfloat16)
    q = torch.empty(4, 2, 64, dtype=torch.bfloat16)
    assert module.resolve_backend("auto", a100, torch.bfloat16) != "flash-attn-3"
    assert tile(FORWARD, q, H100) == FORWARD and tile(FORWARD, q, a100)["N"] == 32
    if not torch.cuda.is_available():
        assert profile_of("cuda") == H100 and available_backends("cuda") == on_hopper
    assert profile_of("cpu") == CPU


def test_memory_of_the_loss_is_one_chunk_of_logits():
    """131,072 tokens x 128,256 entries x 4,096 hidden in bfloat16, on pretended tensors: beside inputs and both gradients, one chunk of
    logits and an eighth (the partial product of the weight's gradient). The twin takes a chunk four times as large. A gradient that is not
    wanted has no room."""
    from memory import peak_of

    def peak(chunk: int, of_x: bool = True, of_weight: bool = True) -> int:
        x = torch.empty(131072, 4096, dtype=torch.bfloat16, device="meta", requires_grad=of_x)
        weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta", requires_grad=of_weight)
        target = torch.empty(131072, dtype=torch.int64, device="meta")
        weights = torch.empty(131072, device="meta")
        how = dict(chunk_logits=chunk, backend="triton")
        return peak_of(lambda: linear_cross_entropy(x, weight, target, 0, 128256, weights, **how))

    chunk = 1 << 29
    gradients = 2 * 131072 * 4096 + 4 * 128256 * 4096
    allowed = gradients + 2 * chunk * 1.2
    assert gradients + 2 * chunk <= peak(chunk) <= allowed < peak(4 * chunk)
    assert 2 * chunk <= peak(chunk, of_weight=False) <= allowed - 4 * 128256 * 4096
    assert 2 * chunk <= peak(chunk, of_x=False) <= allowed - 2 * 131072 * 4096


def test_weights_add_no_pass_over_the_logits():
    """On pretended tensors, what touches one of the size of the logits: a product, a pass for statistics, one for the gradient, two
    products. The weights themselves are 4 bytes a token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    pytest.importorskip("triton", reason="needs Triton (Linux)")
    tokens, vocab, hidden, seen = 256, 512, 64, []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [t for t in (*args, *(out if isinstance(out, (tuple, list)) else [out])) if torch.is_tensor(t)]
            if any(t.numel() == tokens * vocab for t in tensors) and not function.is_view:
                seen.append(function.name().split("::")[1].split(".")[0])
            return out

    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    x, weight = make(tokens, hidden).requires_grad_(), make(vocab, hidden).requires_grad_()
    with Count():
        given = make(tokens, dtype=torch.float32)
        linear_cross_entropy(
            x, weight, make(tokens, dtype=torch.int64), 0, vocab, given, z_loss=0.1, backend="triton"
        ).backward()
    assert seen == ["mm", "cross_entropy_statistics", "cross_entropy_gradient_", "mm", "mm"], seen


@pytest.mark.parametrize("divisor", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "backend, moments",
    [
        ("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float64),
        ("triton", torch.float32), ("triton", torch.bfloat16), ("apex", torch.float32),
    ],
)  # fmt: skip
def test_a_divisor_that_is_not_finite_changes_nothing(backend, moments, divisor, monkeypatch):
    """To the bit, whatever the gradients hold; with a finite one the same call changes all."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton (Linux)")
    if backend == "apex":
        from types import SimpleNamespace

        from megacpt_kernels import adamw as module

        def adam(size, flag, lists, *rest):
            for tensor in (*lists[1], *lists[2], *lists[3]):
                tensor.add_(1)

        monkeypatch.setattr(module, "find_apex", lambda device: SimpleNamespace(multi_tensor_adam=adam))
    wide = torch.float64 if moments == torch.float64 else torch.float32
    weights, first, second = ([torch.rand(1030).to(kind)] for kind in (wide, moments, moments))
    before = [x[0].clone() for x in (weights, first, second)]
    for scale, same in ((divisor, True), (2.0, False)):
        grads = [torch.full((1030,), float("nan") if same else 1.0, dtype=wide)]
        inverse = torch.tensor(scale, dtype=torch.float64)
        adamw_(weights, grads, first, second, 0.1, (0.9, 0.95), 1e-8, 0.1, 3, inverse, backend=backend)
        assert all(torch.equal(old, new) == same for old, (new,) in zip(before, (weights, first, second), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_stochastic_rounding_has_the_same_bits_however_a_tensor_is_cut(backend):
    """A matrix whole, by rows, and by columns: weights and moments in bfloat16. Another seed gives other bits; so does another name."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton (Linux)")
    rows, columns = 6, 10
    start = [random(rows, columns, seed=i).detach().bfloat16() for i in range(3)]
    start[2].abs_()
    grad = random(rows, columns, seed=5).detach().float()

    def update(cut: list[tuple[slice, slice]], seed: int = 1, key: int = 7) -> list[torch.Tensor]:
        whole = [x.clone() for x in start]
        for r, c in cut:
            part = [x[r, c].clone().contiguous() for x in whole]
            place = ShardPosition((r.start or 0) * columns + (c.start or 0), part[0].shape[1], columns, key)
            one = [[x] for x in (part[0], grad[r, c].contiguous(), *part[1:])]
            adamw_(*one, 1e-3, (0.9, 0.95), 1e-8, 0.1, 3, None, [place], seed, backend=backend)
            for x, new in zip(whole, part, strict=True):
                x[r, c] = new
        return whole

    everything = slice(None)
    want = update([(everything, everything)])
    for cut in (
        [(slice(0, 1), everything), (slice(1, 6), everything)],
        [(everything, slice(0, 5)), (everything, slice(5, 10))],
    ):
        assert all(torch.equal(a, b) for a, b in zip(update(cut), want, strict=True))
    assert not torch.equal(update([(everything, everything)], seed=2)[0], want[0])
    assert not torch.equal(update([(everything, everything)], key=8)[0], want[0])
    moved = update([(slice(0, 3), everything)])
    assert torch.equal(moved[0][3:], start[0][3:])


def test_stochastic_rounding_keeps_small_updates_in_the_mean():
    """20,000 weights of 1, steps of a hundredth of bfloat16's spacing: rounding to nearest never moves, this does by the sum."""
    n, steps, lr = 20000, 50, 2**-8 / 100
    weight, moments = torch.ones(n, dtype=torch.bfloat16), [torch.zeros(n), torch.zeros(n)]
    for step in range(1, steps + 1):
        adamw_(
            [weight],
            [torch.ones(n)],
            [moments[0]],
            [moments[1]],
            lr,
            (0.9, 0.95),
            0.0,
            0.0,
            step,
            None,
            [ShardPosition(0, n, n, 1)],
            5,
        )
    moved = 1 - weight.double().mean().item()
    deviation = 2**-8 * (0.25 * steps / 100) ** 0.5 / n**0.5 * 4
    assert abs(moved - steps * lr) <= deviation * 2, (moved, steps * lr)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grad_norm(backend):
    """Weighted, over tensors of many sizes, in float64 at the end; the same bits twice."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton (Linux)")
    grads = [random(*shape, dtype=torch.float32).detach() for shape in ((3, 7), (1,), (0,), (8193,), (2, 9000))]
    weights = [1.0, 0.5, 1.0, 1.0, 0.5]
    want = sum(w * g.double().square().sum() for g, w in zip(grads, weights, strict=True)).sqrt()
    got = grad_norm(grads, weights, backend=backend)
    assert abs(got.item() / want.item() - 1) < 1e-6 and torch.equal(got, grad_norm(grads, weights, backend=backend))
    assert grad_norm([]).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype):
    """Repeated ids, ids of other ranks, rows that nobody asks for."""
    ids, table = torch.tensor([7, 3, 9, 3, 2, 3]), random(6, 5, dtype=dtype)
    got = gradients(lambda t: embedding(ids, t, 3), [table])
    mine = ((ids >= 3) & (ids < 9)).double()[:, None]
    want = gradients(lambda t: t[(ids - 3).clamp(0, 5)] * mine, wide([table]))
    assert difference(got[0][0], want[0][0]) <= KERNEL[dtype] and difference(got[1][0], want[1][0]) <= KERNEL[dtype]


TABLE = torch.zeros(8, 2)
BAD = {
    "positions 0 to 8; the tables hold 0 to 7": lambda: rope_qk(
        random(2, 1, 4).float(), random(2, 1, 4).float(), TABLE, TABLE, torch.tensor([0, 8]), check=True
    ),
    "positions torch.int16": lambda: rope_qk(
        random(1, 1, 4), random(1, 1, 4), TABLE, TABLE, torch.zeros(1, dtype=torch.int16)
    ),
    r"cos and sin are \[p, 2\]": lambda: rope_qk(
        random(1, 1, 4), random(1, 1, 4), TABLE[:, :1], TABLE[:, :1], torch.zeros(1).int()
    ),
    r"x \(3, 4\), weight|they are \[t, h\] and \[h\]": lambda: rms_norm(random(3, 4), random(5), 1e-5),
    "2 targets outside the vocabulary, the first 9 at token 1": lambda: cross_entropy_(
        random(3, 5).detach(), torch.tensor([0, 9, 7]), 0, 5, None, check=True
    ),
    "they are written over, so they must be contiguous": lambda: cross_entropy_(
        random(5, 3).detach().t(), torch.tensor([0, 1, 2]), 0, 5, None
    ),
    "int64 .t.": lambda: cross_entropy_(random(3, 5).detach(), torch.tensor([0, 1, 2]).int(), 0, 5, None),
    "x and weight have one type": lambda: linear_lse(random(2, 4).float(), random(3, 4), torch.tensor([0, 1]), 0, 3),
    "weights .2,. torch.float32, target .3,.: there is one weight a token": lambda: linear_cross_entropy(
        random(3, 4), random(5, 4), torch.tensor([0, 1, 2]), 0, 5, torch.ones(2)
    ),
    "weights .3,. torch.bfloat16, target": lambda: linear_cross_entropy(
        random(3, 4), random(5, 4), torch.tensor([0, 1, 2]), 0, 5, torch.ones(3).bfloat16()
    ),
    "with a gradient, target .3,.: .*detach them": lambda: linear_cross_entropy(
        random(3, 4), random(5, 4), torch.tensor([0, 1, 2]), 0, 5, random(3)
    ),
    "weights .1,. torch.int64": lambda: cross_entropy_(
        random(3, 5).detach(), torch.tensor([0, 1, 2]), 0, 5, torch.ones(1).long()
    ),
    "token ids 0 to 12; the vocabulary has 0 to 9": lambda: embedding(torch.tensor([0, 12]), random(10, 2), check=10),
    "shared|cannot share 2 key heads": lambda: attention(
        random(4, 3, 8), random(4, 2, 8), random(4, 2, 8), Documents.of([0], 4)
    ),
    "the documents end at query 5": lambda: attention(
        random(4, 2, 8), random(4, 2, 8), random(4, 2, 8), Documents.of([0], 5)
    ),
    "never fall: 2 after 3 at document 1": lambda: attention(
        random(4, 1, 8),
        random(4, 1, 8),
        random(4, 1, 8),
        Documents((0, 3, 2, 4), (0, 3, 2, 4), *[torch.tensor([0, 3, 2, 4])] * 2),
        check=True,
    ),
    "document 0 has 4 queries and 2 keys": lambda: attention(
        random(4, 1, 8),
        random(2, 1, 8),
        random(2, 1, 8),
        Documents((0, 4), (0, 2), *[torch.tensor([0, 4])] * 2),
        check=True,
    ),
    "must be contiguous, of one shape": lambda: adamw_(
        [torch.zeros(2)], [torch.zeros(3)], *[[torch.zeros(2)]] * 2, 1, (0, 0), 1, 0, 1
    ),
    "devices differ: gate on cpu, up on meta": lambda: swiglu(torch.zeros(1, 2), torch.zeros(1, 2, device="meta")),
    "NVIDIA apex is not installed": lambda: adamw_(*[[torch.zeros(2)]] * 4, 1, (0, 0), 1, 0, 1, backend="apex"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named_with_its_values(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_apex_gets_its_arguments_in_its_order(monkeypatch):
    """A stand-in for amp_C.multi_tensor_adam(chunk, overflow, [grads, weights, m, v], lr, b1, b2, eps, step, adamw, bias, decay) that
    computes what it is told; against our torch path."""
    import types

    def multi_tensor_adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, mode, bias, decay):
        assert mode == 1 and bias == 1 and overflow.dtype == torch.int32
        for g, w, m, v in zip(*lists, strict=True):
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.mul_(1 - lr * decay).sub_(lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps))

    from megacpt_kernels import backend

    stand_in = types.SimpleNamespace(multi_tensor_adam=multi_tensor_adam)
    monkeypatch.setitem(sys.modules, "megacpt_kernels.adamw", sys.modules["megacpt_kernels.adamw"])
    monkeypatch.setattr(sys.modules["megacpt_kernels.adamw"], "find_apex", lambda device: stand_in)
    make = lambda: [[random(5, 3, dtype=torch.float32, seed=s).detach().abs()] for s in range(4)]
    ours, theirs = make(), make()
    clip = torch.tensor(2.0, dtype=torch.float64)
    adamw_(*ours, 1e-2, (0.9, 0.95), 1e-8, 0.1, 3, clip, backend="torch")
    adamw_(*theirs, 1e-2, (0.9, 0.95), 1e-8, 0.1, 3, clip, backend="apex")
    assert difference(theirs[0][0], ours[0][0]) <= 1e-6
    assert backend.find_apex is not None


@pytest.mark.parametrize("layout", ["keys reach back", "many"])
@pytest.mark.parametrize("name", attention_libraries.FUNCTIONS)
def test_libraries_are_called_by_their_own_names(name, layout, monkeypatch):
    """Forward and backward, a head size that they do not have, against SDPA."""
    documents = LAYOUTS[layout]
    make = lambda: [random(documents.q[-1], 4, 12), *(random(documents.k[-1], 2, 12, seed=s) for s in (1, 2))]
    want = gradients(lambda q, k, v: attention(q, k, v, documents), make())
    attention_libraries.install(name, monkeypatch)
    got = gradients(lambda q, k, v: attention(q, k, v, documents), make())
    assert attention_libraries.calls == {"forward": 1, "backward": 1}
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert difference(a, b) <= ATTENTION[torch.float64]


def test_the_true_signatures_of_torch_are_those_of_the_stand_ins():
    """What of the libraries can be had here: the functions of torch's own."""
    from megacpt_kernels.attention_backends import arguments_of, missing_library
    from torch.nn.attention import varlen

    assert missing_library("varlen") == ""
    assert arguments_of(varlen._varlen_attn_backward) == arguments_of(attention_libraries.varlen_backward)
    assert arguments_of(varlen.varlen_attn) == arguments_of(attention_libraries.varlen)


def test_a_library_of_a_version_that_is_not_known_says_what_it_wants(monkeypatch):
    from megacpt_kernels.attention_backends import missing_library

    def later(q, k, v, sink, *, causal): ...

    monkeypatch.setitem(attention_libraries.FUNCTIONS, "flash-attn", (later, attention_libraries.two_backward))
    attention_libraries.install("flash-attn", monkeypatch)
    assert missing_library("flash-attn") == (
        "flash_attn.flash_attn_varlen_func of this version wants sink, which megacpt_kernels does not know"
    )
    assert missing_library("flash-attn-4").startswith("flash_attn.cute has no flash_attn_varlen_func")


def test_what_does_not_change_is_looked_up_once(monkeypatch):
    """Signatures a process, lengths of documents a micro-batch: not in every layer."""
    from megacpt_kernels import attention_backends

    documents = Documents.of([0, 5], 9)
    inputs = [random(9, 4, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)]
    attention_libraries.install("flash-attn-4", monkeypatch)
    attention(*inputs, documents).sum().backward()
    monkeypatch.setattr(attention_backends.inspect, "signature", None)
    assert documents.longest is documents.longest
    attention(*inputs, documents).sum().backward()


def test_no_backward_without_atomics_is_an_error(monkeypatch):
    inputs = [random(9, 4, 8), random(13, 2, 8, seed=1), random(13, 2, 8, seed=2)]

    def older(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k): ...

    monkeypatch.setitem(attention_libraries.FUNCTIONS, "flash-attn", (attention_libraries.two, older))
    attention_libraries.install("flash-attn", monkeypatch)
    with pytest.raises(ValueError, match="'flash-attn' has no deterministic backward in this version"):
        attention(*inputs, LAYOUTS["keys reach back"], deterministic=True)
    attention_libraries.install("varlen", monkeypatch)
    with pytest.raises(ValueError, match="deterministic only under torch.use_deterministic_algorithms"):
        attention(*inputs, LAYOUTS["keys reach back"], deterministic=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_of_other_devices(layout, dtype, monkeypatch):
    """What SDPA does on a GPU, on a CPU: forward by whichever kernel, backward by products, in blocks of three queries."""
    from megacpt_kernels import attention_backends

    documents = LAYOUTS[layout]
    inputs = [
        random(documents.q[-1], 4, 8, dtype=dtype),
        *(random(documents.k[-1], 2, 8, dtype=dtype, seed=s) for s in (1, 2)),
    ]
    monkeypatch.setattr(attention_backends, "_cpu_forward", attention_backends._any_forward)
    monkeypatch.setattr(attention_backends, "_cpu_backward", attention_backends._any_backward)
    monkeypatch.setattr(attention_backends, "SCORES", 3 * 4 * max(documents.k))
    got = gradients(lambda q, k, v: attention(q, k, v, documents), inputs)
    want = gradients(lambda q, k, v: attention_reference(q, k, v, documents), wide(inputs))
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert difference(a, b) <= ATTENTION[dtype]
    with pytest.raises(ValueError, match="does not return the log-sum-exp"):
        attention(*inputs, documents, return_lse=True)


def test_cudnn_takes_what_its_operations_are_given(monkeypatch):
    """torch's schemas bind, on tensors without storage; what it cannot do is said."""
    from megacpt_kernels.attention_backends import BACKENDS

    q, k = torch.empty(64, 4, 8, device="meta"), torch.empty(64, 2, 8, device="meta")
    bounds = [LAYOUTS["many"].edges]
    out, lse = BACKENDS["cudnn"].forward(q, k, k, bounds, [24, 24], False)
    assert (out.shape, lse.shape) == (q.shape, (4, 64))
    grads = BACKENDS["cudnn"].backward(out, q, k, k, out, lse, bounds, [24, 24], False)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    q, k = torch.empty(9, 4, 8, device="meta"), torch.empty(13, 2, 8, device="meta")
    with pytest.raises(ValueError, match="there are keys before the queries of a document"):
        BACKENDS["cudnn"].forward(q, k, k, [LAYOUTS["keys reach back"].edges], [5, 9], False)


def test_the_log_sum_exp_comes_along():
    documents = LAYOUTS["keys reach back"]
    inputs = [random(9, 4, 8), random(13, 2, 8, seed=1), random(13, 2, 8, seed=2)]
    out, lse = attention(*inputs, documents, return_lse=True)
    k = inputs[1].repeat_interleave(2, 1)
    first = torch.einsum("hd,khd->hk", inputs[0][4], k[:9]) / math.sqrt(8)
    assert difference(lse[:, 4], first.logsumexp(-1)) < 1e-12 and torch.equal(out, attention(*inputs, documents))

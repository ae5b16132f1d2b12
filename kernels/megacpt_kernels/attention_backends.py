"""What computes attention over packed documents: one pair of functions a backend, so that whoever calls them keeps what he wants.

    forward(q, k, v, bounds, longest, deterministic) -> (out, lse)
    backward(dout, q, k, v, out, lse, bounds, longest, deterministic) -> (dq, dk, dv)

Shapes: q, out, dout [t_q, heads, d]; k, v [t_k, kv_heads, d]; lse at least fp32 [heads, t_q], empty where a backend has none. `bounds` are
the tensors of `Documents` that `Backend.bounds` names, `longest` the most queries and keys of a document. No autograd: it is
attention.py's, or the caller's.

The libraries' own autograd would keep K and V from forward to backward, so their backward is called by the name that each gives it.
What a version calls an argument is looked up in its signature.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt_kernels import flash_attention
from megacpt_kernels.backend import wide_of

Runs = list[tuple[int, int, int, int, int]]
SCORES = 2**27
"""Scores that SDPA's backward on a GPU holds at once."""


@dataclass(frozen=True)
class Backend:
    """A pair of functions, see the top of this file, and the attributes of `Documents` that they take as bounds."""

    forward: Callable
    backward: Callable
    bounds: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """Where a library's functions are, for which compute capabilities (None: Ampere and later), and how it is told of a window."""

    module: str
    forward: str
    backward_module: str
    backward: str
    capabilities: tuple[tuple[int, int], ...] | None
    window: tuple[tuple[str, object], ...] = ()


_NO_WINDOW = (("window_size", (-1, -1)), ("window_size_left", -1), ("window_size_right", -1))
LIBRARIES = {
    "flash-attn-3": Library(
        "flash_attn_interface", "flash_attn_varlen_func", "flash_attn_interface", "_flash_attn_backward", ((9, 0),), _NO_WINDOW
    ),
    "flash-attn-4": Library(
        "flash_attn.cute", "flash_attn_varlen_func", "flash_attn.cute.interface", "_flash_attn_bwd", ((9, 0), (10, 0), (10, 3))
    ),
    "flash-attn": Library(
        "flash_attn", "flash_attn_varlen_func", "flash_attn.flash_attn_interface", "_flash_attn_varlen_backward", None, _NO_WINDOW
    ),
    "varlen": Library(
        "torch.nn.attention.varlen", "varlen_attn", "torch.nn.attention.varlen", "_varlen_attn_backward", None,
        (("window_size", (-1, 0)),),
    ),
}  # fmt: skip


@functools.cache
def find(module: str, name: str) -> Callable | None:
    """A function of a package, None where it cannot be had."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # a package built for another CUDA or torch fails in many ways: it cannot be used
        return None


def _known(module: str, name: str) -> Callable:
    """A function of a package that `missing_library` has found."""
    function = find(module, name)
    assert function is not None, f"{module} has no {name}"
    return function


@functools.cache
def arguments_of(function: Callable) -> dict[str, bool]:
    """{name: whether it must be given} of a function or an operation of torch."""
    schema = getattr(getattr(function, "_opoverload", function), "_schema", None)
    if schema is not None:
        return {argument.name: not argument.has_default_value() for argument in schema.arguments}
    return {name: p.default is p.empty for name, p in inspect.signature(function).parameters.items()}


def missing_library(name: str) -> str:
    """Why a library's functions cannot be called, '' if they can."""
    library = LIBRARIES[name]
    for module, function in ((library.module, library.forward), (library.backward_module, library.backward)):
        found = find(module, function)
        if found is None:
            return f"{module} has no {function}, or cannot be imported"
        strange = [name for name, needed in arguments_of(found).items() if needed and name not in _KNOWN]
        if strange:
            return (
                f"{module}.{function} of this version wants {', '.join(strange)}, which megacpt_kernels does not know"
            )
    return ""


def _call(
    function: Callable,
    tensors: dict,
    library: Library,
    bounds: list[Tensor],
    longest: list[int],
    deterministic: bool,
    d: int,
):
    """Calls a library's function with those of its arguments that it has, by all the names that versions give them."""
    scale = 1 / math.sqrt(d)
    cu_q, cu_k = bounds
    named = {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": longest[0], "max_seqlen_k": longest[1],
        "cu_seq_q": cu_q, "cu_seq_k": cu_k, "max_q": longest[0], "max_k": longest[1],
        "softmax_scale": scale, "scale": scale, "causal": True, "is_causal": True, "deterministic": deterministic,
        "return_attn_probs": True, "return_lse": True, "enable_gqa": True,
        "dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None, "sequed_q": None, "sequed_k": None,
    }  # fmt: skip
    have = arguments_of(function)
    return function(**{name: x for name, x in (named | dict(library.window) | tensors).items() if name in have})


_KNOWN = frozenset(
    "q k v out dout dq dk dv lse softmax_lse query key value grad_out rng_state cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "cu_seq_q cu_seq_k max_q max_k softmax_scale scale causal is_causal deterministic dropout_p softcap alibi_slopes sequed_q "
    "sequed_k window_size window_size_left window_size_right".split()
)
"""Names that `_call` and its callers give."""


def _library_forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, bounds: list[Tensor], longest: list[int], deterministic: bool
) -> tuple[Tensor, Tensor]:
    library, d = LIBRARIES[name], q.shape[2]
    if deterministic:
        _check_deterministic(name)
    q, k, v = (_padded(x) for x in (q, k, v))
    tensors = {"q": q, "k": k, "v": v, "query": q, "key": k, "value": v}
    if name == "varlen":
        tensors["return_aux"] = _known(library.module, "AuxRequest")(lse=True)
    result = _call(_known(library.module, library.forward), tensors, library, bounds, longest, deterministic, d)
    return result[0][..., :d].contiguous(), result[1].contiguous()


def _check_deterministic(name: str) -> None:
    if name == "varlen":
        if not torch.are_deterministic_algorithms_enabled():
            raise ValueError(
                "attention backend 'varlen' is deterministic only under torch.use_deterministic_algorithms(True)."
            )
    elif "deterministic" not in arguments_of(find(LIBRARIES[name].backward_module, LIBRARIES[name].backward)):
        raise ValueError(f"attention backend {name!r} has no deterministic backward in this version. Use triton.")


def _library_backward(
    name: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: list[Tensor],
    longest: list[int], deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    library, d = LIBRARIES[name], q.shape[2]
    dout, q, k, v, out = (_padded(x) for x in (dout, q, k, v, out))
    into = {
        "d" + each: torch.empty(x.shape, dtype=x.dtype, device=x.device) for each, x in (("q", q), ("k", k), ("v", v))
    }
    tensors = {"q": q, "k": k, "v": v, "query": q, "key": k, "value": v, "out": out, "dout": dout, "grad_out": dout}
    tensors |= {"lse": lse, "softmax_lse": lse} | into
    if name == "varlen":  # dropout's state, as its forward makes it
        tensors["rng_state"] = torch.zeros(2, dtype=torch.uint64, device=q.device)
    function = _known(library.backward_module, library.backward)
    result = _call(function, tensors, library, bounds, longest, deterministic, d)
    grads = into.values() if "dq" in arguments_of(function) else result
    dq, dk, dv = (x[..., :d].contiguous() for x in grads)
    return dq, dk, dv


def _padded(x: Tensor) -> Tensor:
    """Contiguous, the head size brought to a multiple of 8 by zeros: the libraries have no other."""
    return F.pad(x, (0, -x.shape[2] % 8)).contiguous() if x.shape[2] % 8 else x.contiguous()


def runs_of(q_edges: list[int], k_edges: list[int]) -> Runs:
    """(q begin, q length, k begin, k length, count) of runs of neighbouring documents of the same lengths."""
    runs: Runs = []
    for q0, q1, k0, k1 in zip(q_edges, q_edges[1:], k_edges, k_edges[1:], strict=False):
        if runs and runs[-1][1] == q1 - q0 and runs[-1][3] == k1 - k0:
            runs[-1] = (*runs[-1][:4], runs[-1][4] + 1)
        else:
            runs.append((q0, q1 - q0, k0, k1 - k0, 1))
    return runs


def _runs(bounds: list[Tensor]) -> Runs:
    return runs_of(*bounds[0].tolist())


def _heads_first(x: Tensor, begin: int, length: int, count: int) -> Tensor:
    """[t, heads, d] -> [count, heads, length, d], a view."""
    return x[begin : begin + count * length].unflatten(0, (count, length)).transpose(1, 2)


def _corner_mask(length_q: int, length_k: int, like: Tensor) -> Tensor | None:
    """None for a square causal mask, else the bottom-right aligned one as an additive mask."""
    if length_q == length_k:
        return None
    keep = torch.ones(length_q, length_k, dtype=torch.bool, device=like.device).tril(length_k - length_q)
    return torch.zeros_like(keep, dtype=like.dtype).masked_fill_(~keep, float("-inf"))


def _document_forward(kernel: Callable, q: Tensor, k: Tensor, v: Tensor, bounds: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`kernel(q, k, v, mask) -> (out, lse or None)` on each run of documents, [count, heads, length, d]."""
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), []
    for q0, lq, k0, lk, n in _runs(bounds):
        parts = (_heads_first(q, q0, lq, n), _heads_first(k, k0, lk, n), _heads_first(v, k0, lk, n))
        part, part_lse = kernel(*parts, _corner_mask(lq, lk, q))
        _heads_first(out, q0, lq, n).copy_(part)
        lse += [] if part_lse is None else [part_lse.transpose(0, 1).reshape(q.shape[1], n * lq)]
    return out, torch.cat(lse, 1) if lse else q.new_empty(0)


def _document_backward(
    kernel: Callable, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernel(dout, q, k, v, out, lse [count, heads, length] or None, mask) -> (dq, dk, dv)` on each run of documents."""
    dout = dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for q0, lq, k0, lk, n in _runs(bounds):
        of_queries = functools.partial(_heads_first, begin=q0, length=lq, count=n)
        of_keys = functools.partial(_heads_first, begin=k0, length=lk, count=n)
        part_lse = lse[:, q0 : q0 + n * lq].unflatten(1, (n, lq)).transpose(0, 1).contiguous() if lse.numel() else None
        inputs = (of_queries(dout), of_queries(q), of_keys(k), of_keys(v), of_queries(out), part_lse)
        parts = kernel(*inputs, _corner_mask(lq, lk, q))
        for whole, part, place in zip((dq, dk, dv), parts, (of_queries, of_keys, of_keys), strict=True):
            place(whole).copy_(part)
    return dq, dk, dv


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """SDPA's flash kernel for CPUs. GQA is native in it."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)


def _cpu_backward(dout, q, k, v, out, lse, mask):
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operation(dout, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask)


def _any_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """SDPA, torch chooses among its kernels."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa), None


def _any_backward(dout, q, k, v, out, lse, mask):
    """By plain products in at least fp32, block of queries by block, from scores that are computed again: SDPA's backward needs what its
    autograd kept, which differs with the kernel that torch chose."""
    (n, heads, length, d), (kv, keys) = q.shape, k.shape[1:3]

    def grouped(x: Tensor) -> Tensor:
        """[n, heads, length, d] -> [n, kv, group, length, d]"""
        return wide_of(x).unflatten(1, (kv, heads // kv))

    k, v = wide_of(k), wide_of(v)
    dq, dk, dv = grouped(torch.empty_like(q)), torch.zeros_like(k), torch.zeros_like(v)
    at, rows = torch.arange(keys, device=q.device), max(1, SCORES // max(1, n * heads * keys))
    for begin in range(0, length, rows):
        block = slice(begin, begin + rows)
        queries, gradient, result = (grouped(x[:, :, block]) for x in (q, dout, out))
        last = torch.arange(begin, begin + queries.shape[3], device=q.device) + keys - length
        scores = torch.einsum("ngiqd,ngkd->ngiqk", queries, k) / math.sqrt(d)
        weights = scores.masked_fill_(at > last[:, None], -math.inf).softmax(-1)
        dv += torch.einsum("ngiqk,ngiqd->ngkd", weights, gradient)
        dweights = torch.einsum("ngiqd,ngkd->ngiqk", gradient, v) - (gradient * result).sum(-1, keepdim=True)
        dscores = weights.mul_(dweights).div_(math.sqrt(d))
        dq[:, :, :, block] = torch.einsum("ngiqk,ngkd->ngiqd", dscores, k)
        dk += torch.einsum("ngiqk,ngiqd->ngkd", dscores, queries)
    return dq.flatten(1, 2), dk, dv


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is not None:
        raise ValueError(
            "attention backend 'cudnn': there are keys before the queries of a document (context parallelism), which SDPA "
            "takes only with a mask. Use auto."
        )
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)
    return result[0], result[1].reshape(q.shape[:3])


def _cudnn_backward(dout, q, k, v, out, lse, mask):
    state = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's, of which there is none
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    longest = (q.shape[2], k.shape[2])
    return operation(dout, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, *longest, 0.0, True)


def _sdpa_forward(q, k, v, bounds, longest, deterministic):
    return _document_forward(_cpu_forward if q.device.type == "cpu" else _any_forward, q, k, v, bounds)


def _sdpa_backward(dout, q, k, v, out, lse, bounds, longest, deterministic):
    kernel = _cpu_backward if q.device.type == "cpu" else _any_backward
    return _document_backward(kernel, dout, q, k, v, out, lse, bounds)


def _triton_forward(q, k, v, bounds, longest, deterministic):
    return flash_attention.forward(q, k, v, bounds[0], 1 / math.sqrt(q.shape[2]))


def _triton_backward(dout, q, k, v, out, lse, bounds, longest, deterministic):
    key_range, query_range = bounds
    return flash_attention.backward(dout, q, k, v, out, lse, key_range, query_range, 1 / math.sqrt(q.shape[2]))


BACKENDS = {
    name: Backend(
        functools.partial(_library_forward, name), functools.partial(_library_backward, name), ("cu_q", "cu_k")
    )
    for name in LIBRARIES
} | {
    "triton": Backend(_triton_forward, _triton_backward, ("key_range", "query_range")),
    "cudnn": Backend(
        lambda q, k, v, bounds, longest, deterministic: _document_forward(_cudnn_forward, q, k, v, bounds),
        lambda dout, q, k, v, out, lse, bounds, longest, deterministic: _document_backward(
            _cudnn_backward, dout, q, k, v, out, lse, bounds
        ),
        ("edges",),
    ),
    "sdpa": Backend(_sdpa_forward, _sdpa_backward, ("edges",)),
}
"""The fastest first."""

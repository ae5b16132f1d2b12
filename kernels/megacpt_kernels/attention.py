"""Causal attention over packed documents: no mask, no padding, each document alone.

Queries and keys of document i are q[cu_q[i]:cu_q[i+1]] and k[cu_k[i]:cu_k[i+1]]; the last query sees the last key
(FlashAttention's bottom-right alignment). Backends, the fastest first:

    flash-attn-3  FlashAttention-3 (Hopper)         flash-attn-4  FlashAttention-4, CuTe (Hopper, Blackwell)
    flash-attn    FlashAttention-2                  varlen        torch's own FlashAttention-2
    triton        ours, flash_attention.py          cudnn         cuDNN through SDPA: documents whose queries are all its keys
    sdpa          SDPA document by document, any device and type; runs of equally long documents go in one call
"""

import contextlib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megacpt_kernels.backend import missing_triton
from megacpt_kernels.flash_attention import flash_attention


@dataclass(frozen=True)
class Documents:
    """Where documents begin, on the host and on the device.

    Attributes:
        q, k: tuples of documents + 1 growing integers.
        cu_q, cu_k: the same as int32 tensors on the device.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    cu_q: Tensor
    cu_k: Tensor

    @classmethod
    def of(cls, starts: Sequence[int], tokens: int, device: torch.device | str = "cpu") -> "Documents":
        """Documents that begin at `starts` among `tokens` tokens, the same for queries and keys."""
        edges = (*(int(start) for start in starts), tokens)
        if edges[0] != 0 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"document starts must begin at 0 and grow below {tokens}; they are {edges[:-1][:20]}")
        cu = torch.tensor(edges, dtype=torch.int32).to(device, non_blocking=True)
        return cls(edges, edges, cu, cu)

    def check(self) -> None:
        """Raises ValueError for edges that fall, do not begin at 0, or give a document more queries than keys."""
        for name, edges in (("queries", self.q), ("keys", self.k)):
            falls = next((i for i in range(len(edges) - 1) if edges[i + 1] < edges[i]), None)
            if edges[0] != 0 or falls is not None:
                at = "" if falls is None else f": {edges[falls + 1]} after {edges[falls]} at document {falls}"
                raise ValueError(f"cu_seqlens of {name} must begin at 0 (here {edges[0]}) and never fall{at}.")
        if len(self.q) != len(self.k):
            raise ValueError(f"{len(self.q) - 1} documents of queries, {len(self.k) - 1} of keys.")
        for i in range(len(self.q) - 1):
            queries, keys = self.q[i + 1] - self.q[i], self.k[i + 1] - self.k[i]
            if queries > keys:
                raise ValueError(
                    f"document {i} has {queries} queries and {keys} keys; causal attention needs as many keys."
                )

    @property
    def longest(self) -> tuple[int, int]:
        return tuple(max(b - a for a, b in zip(e, e[1:], strict=False)) for e in (self.q, self.k))

    @functools.cached_property
    def seen(self) -> Tensor:
        """int32 [2, t_q]: first and last key that each query sees. Made on the device."""
        query = torch.arange(self.q[-1], dtype=torch.int32, device=self.cu_q.device)
        document = torch.bucketize(query, self.cu_q[1:], right=True)
        return torch.stack([self.cu_k[document], self.cu_k[document + 1] - self.cu_q[document + 1] + query])

    @functools.cached_property
    def seen_by(self) -> Tensor:
        """int32 [2, t_k]: first and last query that sees each key."""
        key = torch.arange(self.k[-1], dtype=torch.int32, device=self.cu_k.device)
        document = torch.bucketize(key, self.cu_k[1:], right=True)
        end = self.cu_q[document + 1]
        return torch.stack([torch.maximum(self.cu_q[document], key - self.cu_k[document + 1] + end), end - 1])


@functools.cache
def _import(module: str, name: str) -> Callable | None:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # a package built for another CUDA or torch fails in many ways: it cannot be used
        return None


_LIBRARIES = {
    "flash-attn-3": ("flash_attn_interface", "flash_attn_varlen_func", ((9, 0),)),
    "flash-attn-4": ("flash_attn.cute", "flash_attn_varlen_func", ((9, 0), (10, 0), (10, 3))),
    "flash-attn": ("flash_attn", "flash_attn_varlen_func", None),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", None),
}
"""Module and function of each, and the compute capabilities that it is for (None: Ampere and later)."""
BACKENDS = (*_LIBRARIES, "triton", "cudnn", "sdpa")


def available_backends(device_type: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """{backend: '' if usable on this device and type, else why not}, the fastest first."""
    half = dtype in (torch.bfloat16, torch.float16)
    reasons = {}
    for name in BACKENDS:
        library = _LIBRARIES.get(name)
        if name == "sdpa":
            reasons[name] = ""
        elif name == "triton":
            reasons[name] = missing_triton(device_type, dtype)
        elif device_type != "cuda":
            reasons[name] = "needs a GPU"
        elif not half:
            reasons[name] = f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        elif library and library[2] and torch.cuda.get_device_capability() not in library[2]:
            wanted = ", ".join(f"sm_{major}{minor}" for major, minor in library[2])
            reasons[name] = f"is for {wanted}, this is sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
        elif library and _import(*library[:2]) is None:
            reasons[name] = "torch has no varlen_attn" if name == "varlen" else f"{library[0]} cannot be imported"
        else:
            reasons[name] = ""
    return reasons


@functools.cache
def resolve_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that `attention` will run. auto: the fastest that is there; cudnn and, but on a GPU, triton must be named.

    Raises:
        ValueError: if a named one cannot run here, with the reason.
    """
    reasons = available_backends(device_type, dtype)
    if backend == "auto":
        skipped = {"cudnn"} if device_type == "cuda" else {"cudnn", "triton"}
        return next(name for name, reason in reasons.items() if not reason and name not in skipped)
    if backend not in reasons:
        raise ValueError(f"attention backend {backend!r} is unknown. Possible: auto, {', '.join(reasons)}.")
    if reasons[backend]:
        raise ValueError(f"attention backend {backend!r}: {reasons[backend]}. Use auto or sdpa.")
    return backend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    backend: str = "auto",
    deterministic: bool = False,
    return_lse: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax(q k^T / sqrt(d)) v inside each document; grouped queries share a key head.

    Args:
        q: [t_q, heads, d]. k, v: [t_k, kv_heads, d], kv_heads divides heads.
        deterministic: the same bits twice. return_lse: also the log of each query's sum of exponentials.
        check: also look at the values of the documents (on the host).
    Returns:
        [t_q, heads, d]; with `return_lse` also at least fp32 [heads, t_q], without gradient.
    Raises:
        ValueError: for shapes, types or documents that do not fit together, or a backend that cannot run them.
    """
    _check(q, k, v, documents)
    if check:
        documents.check()
    backend = resolve_backend(backend, q.device.type, q.dtype)
    if backend == "triton":
        out, lse = flash_attention(q, k, v, documents.seen, documents.seen_by, 1 / math.sqrt(q.shape[2]))
    elif backend == "sdpa" and q.device.type == "cpu":
        out, lse = _DocumentSDPA.apply(q, k, v, documents)
    elif backend in ("sdpa", "cudnn"):
        out, lse = _sdpa_loop(q, k, v, documents, backend == "cudnn"), None
    else:
        out, lse = _library(backend, q, k, v, documents, deterministic, return_lse)
    if return_lse and lse is None:
        raise ValueError(
            f"attention backend {backend!r} does not return the log-sum-exp on {q.device.type}. Use triton."
        )
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> None:
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"{shapes}: they are [t_q, heads, d], [t_k, kv_heads, d] and [t_k, kv_heads, d].")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: {q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly.")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"{shapes} on {q.device}, {k.device}, {v.device}: types and devices must be the same.")
    if (documents.q[-1], documents.k[-1]) != (q.shape[0], k.shape[0]):
        raise ValueError(
            f"the documents end at query {documents.q[-1]} and key {documents.k[-1]}; there are {q.shape[0]} and {k.shape[0]}."
        )


def _library(
    backend: str, q: Tensor, k: Tensor, v: Tensor, documents: Documents, deterministic: bool, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """FlashAttention 2 to 4 and torch's: one call, and what each calls its arguments in its versions."""
    function = _import(*_LIBRARIES[backend][:2])
    names = inspect.signature(function).parameters
    longest_q, longest_k = documents.longest
    if deterministic and backend == "varlen" and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "attention backend 'varlen' is deterministic only under torch.use_deterministic_algorithms(True)."
        )
    if backend == "varlen":
        arguments = (documents.cu_q, documents.cu_k, longest_q, longest_k)
        options = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
        options |= {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in names else {}
        if return_lse:
            options["return_aux"] = importlib.import_module("torch.nn.attention.varlen").AuxRequest(lse=True)
        return _pair(function(q, k, v, *arguments, **options))
    named = {
        "cu_seqlens_q": documents.cu_q,
        "cu_seqlens_k": documents.cu_k,
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_k,
    }
    wanted = {"return_lse": return_lse, "return_attn_probs": return_lse, "deterministic": deterministic}
    options = {name: value for name, value in (named | wanted).items() if name in names}
    if deterministic and "deterministic" not in names:
        raise ValueError(f"attention backend {backend!r} has no deterministic backward in this version. Use triton.")
    return _pair(function(q, k, v, causal=True, **options))


def _pair(result) -> tuple[Tensor, Tensor | None]:
    return (result, None) if isinstance(result, Tensor) else (result[0], result[1])


def runs_of(documents: Documents) -> list[tuple[int, int, int, int, int]]:
    """(q begin, q length, k begin, k length, count) of runs of neighbouring documents of the same lengths."""
    runs: list[tuple[int, int, int, int, int]] = []
    for q0, q1, k0, k1 in zip(documents.q, documents.q[1:], documents.k, documents.k[1:], strict=False):
        if runs and runs[-1][1] == q1 - q0 and runs[-1][3] == k1 - k0:
            runs[-1] = (*runs[-1][:4], runs[-1][4] + 1)
        else:
            runs.append((q0, q1 - q0, k0, k1 - k0, 1))
    return runs


def _heads_first(x: Tensor, begin: int, length: int, count: int) -> Tensor:
    """[t, heads, d] -> [count, heads, length, d], a view."""
    return x[begin : begin + count * length].view(count, length, *x.shape[1:]).transpose(1, 2)


def _corner_mask(length_q: int, length_k: int, like: Tensor) -> Tensor | None:
    """None for a square causal mask, else the bottom-right aligned one as an additive mask."""
    if length_q == length_k:
        return None
    keep = torch.ones(length_q, length_k, dtype=torch.bool, device=like.device).tril(length_k - length_q)
    return torch.zeros_like(keep, dtype=like.dtype).masked_fill_(~keep, float("-inf"))


class _DocumentSDPA(torch.autograd.Function):
    """SDPA's flash kernel for CPUs on each run of documents, writing into one output. GQA is native in it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = []
        for q0, lq, k0, lk, n in runs_of(documents):
            mask = _corner_mask(lq, lk, q)
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q, q0, lq, n),
                _heads_first(k, k0, lk, n),
                _heads_first(v, k0, lk, n),
                0.0,
                mask is None,
                attn_mask=mask,
            )
            _heads_first(out, q0, lq, n).copy_(part)
            lse.append(part_lse)
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.documents = documents
        whole = torch.cat([part.transpose(0, 1).flatten(1) for part in lse], 1)
        ctx.mark_non_differentiable(whole)
        return out, whole

    @staticmethod
    def backward(ctx, dout: Tensor, _):
        q, k, v, out, *lse = ctx.saved_tensors
        dout = dout.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for (q0, lq, k0, lk, n), part_lse in zip(runs_of(ctx.documents), lse, strict=True):
            mask = _corner_mask(lq, lk, q)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(dout, q0, lq, n),
                _heads_first(q, q0, lq, n),
                _heads_first(k, k0, lk, n),
                _heads_first(v, k0, lk, n),
                _heads_first(out, q0, lq, n),
                part_lse,
                0.0,
                mask is None,
                attn_mask=mask,
            )
            for whole, part, begin, length in zip((dq, dk, dv), grads, (q0, k0, k0), (lq, lk, lk), strict=True):
                _heads_first(whole, begin, length, n).copy_(part)
        return dq, dk, dv, None


def _sdpa_loop(q: Tensor, k: Tensor, v: Tensor, documents: Documents, cudnn: bool) -> Tensor:
    """On a GPU: torch chooses among its kernels, or takes cuDNN's."""
    if cudnn and documents.q != documents.k:
        raise ValueError(
            "attention backend 'cudnn': there are keys before the queries of a document (context parallelism), which SDPA "
            "takes only with a mask. Use auto."
        )
    parts = []
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if cudnn else contextlib.nullcontext():
        for q0, lq, k0, lk, n in runs_of(documents):
            mask = _corner_mask(lq, lk, q)
            part = F.scaled_dot_product_attention(
                _heads_first(q, q0, lq, n),
                _heads_first(k, k0, lk, n),
                _heads_first(v, k0, lk, n),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            parts.append(part.transpose(1, 2).reshape(-1, *q.shape[1:]))
    return torch.cat(parts)

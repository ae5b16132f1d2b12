"""Causal attention over packed documents: no mask, no padding, each document alone.

Queries and keys of document i are q[cu_q[i]:cu_q[i+1]] and k[cu_k[i]:cu_k[i+1]]; the last query sees the last key
(FlashAttention's bottom-right alignment). Backends: flash-attn, torch's varlen_attn (both GPU, half precision), and
SDPA document by document (any device and type; runs of equally long documents go in one call).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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

    @property
    def longest(self) -> tuple[int, int]:
        return tuple(max(b - a for a, b in zip(e, e[1:], strict=False)) for e in (self.q, self.k))


def available_backends(device_type: str) -> dict[str, str]:
    """{backend: '' if usable on this device, else why not}."""
    cuda = device_type == "cuda"
    return {
        "flash-attn": "" if cuda and _flash_attn() else "needs a GPU" if not cuda else "flash-attn is not installed",
        "varlen": "" if cuda and _varlen() else "needs a GPU" if not cuda else "torch has no varlen_attn",
        "sdpa": "",
    }


@functools.cache
def _flash_attn():
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def _varlen():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def resolve_backend(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that `attention` will run.

    Raises:
        ValueError: if a named one cannot run here, with the reason.
    """
    reasons = available_backends(device_type)
    if dtype not in (torch.bfloat16, torch.float16):
        reasons |= {
            name: f"needs bfloat16 or float16, not {dtype}" for name in ("flash-attn", "varlen") if not reasons[name]
        }
    if backend == "auto":
        return next(name for name, reason in reasons.items() if not reason)
    if backend not in reasons:
        raise ValueError(f"attention backend {backend!r} is unknown. Possible: auto, {', '.join(reasons)}.")
    if reasons[backend]:
        raise ValueError(f"attention backend {backend!r}: {reasons[backend]}. Use auto or sdpa.")
    return backend


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, backend: str = "auto", deterministic: bool = False
) -> Tensor:
    """Causal softmax(q k^T / sqrt(d)) v inside each document; grouped queries share a key head.

    Args:
        q: [t_q, heads, d]. k, v: [t_k, kv_heads, d], kv_heads divides heads.
    Returns:
        [t_q, heads, d].
    """
    backend = resolve_backend(backend, q.device.type, q.dtype)
    if backend == "sdpa":
        return _DocumentSDPA.apply(q, k, v, documents) if q.device.type == "cpu" else _sdpa_loop(q, k, v, documents)
    longest_q, longest_k = documents.longest
    if backend == "flash-attn":
        return _flash_attn()(
            q, k, v, documents.cu_q, documents.cu_k, longest_q, longest_k, causal=True, deterministic=deterministic
        )
    return _varlen()(q, k, v, documents.cu_q, documents.cu_k, longest_q, longest_k, **_causal_argument(q, k))


def _causal_argument(q: Tensor, k: Tensor) -> dict:
    """torch 2.11 to 2.13 spell causal and GQA in different ways."""
    import inspect

    names = inspect.signature(_varlen()).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return causal | ({"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in names else {})


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
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
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
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
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


def _sdpa_loop(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    parts = []
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

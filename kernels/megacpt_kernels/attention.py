"""Causal attention over packed documents: no mask, no padding, each document alone.

Queries and keys of document i are q[cu_q[i]:cu_q[i+1]] and k[cu_k[i]:cu_k[i+1]]; the last query sees the last key
(FlashAttention's bottom-right alignment). Backends, the fastest first:

    flash-attn-3  FlashAttention-3 (Hopper)         flash-attn-4  FlashAttention-4, CuTe (Hopper, Blackwell)
    flash-attn    FlashAttention-2                  varlen        torch's own FlashAttention-2
    triton        ours, flash_attention.py          cudnn         cuDNN through SDPA: documents whose queries are all its keys
    sdpa          SDPA document by document, any device and type; runs of equally long documents go in one call

Whatever computes it, a profile, a pretended run and torch.compile see two operations: megacpt_kernels::attention_forward and
attention_backward. attention_backends.py holds what is behind them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt_kernels.attention_backends import BACKENDS, LIBRARIES, missing_library
from megacpt_kernels.backend import missing_triton, operation
from megacpt_kernels.device import DeviceProfile, profile_of


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
        cu = torch.tensor(edges, dtype=torch.int32, device=device)
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

    @functools.cached_property
    def longest(self) -> list[int]:
        """Most queries and most keys of a document."""
        return [max(b - a for a, b in zip(e, e[1:], strict=False)) for e in (self.q, self.k)]

    @functools.cached_property
    def edges(self) -> Tensor:
        """int64 [2, documents + 1] on the host: of queries and of keys."""
        return torch.tensor([self.q, self.k])

    def bounds(self, backend: str) -> list[Tensor]:
        """The tensors by which a backend knows where documents begin and end."""
        return [getattr(self, name) for name in BACKENDS[backend].bounds]

    @functools.cached_property
    def key_range(self) -> Tensor:
        """int32 [2, t_q]: first and last key that each query sees. Made on the device."""
        query = torch.arange(self.q[-1], dtype=torch.int32, device=self.cu_q.device)
        document = torch.bucketize(query, self.cu_q[1:], right=True)
        return torch.stack([self.cu_k[document], self.cu_k[document + 1] - self.cu_q[document + 1] + query])

    @functools.cached_property
    def query_range(self) -> Tensor:
        """int32 [2, t_k]: first and last query that sees each key."""
        key = torch.arange(self.k[-1], dtype=torch.int32, device=self.cu_k.device)
        document = torch.bucketize(key, self.cu_k[1:], right=True)
        end = self.cu_q[document + 1]
        return torch.stack([torch.maximum(self.cu_q[document], key - self.cu_k[document + 1] + end), end - 1])


def available_backends(device: DeviceProfile | str, dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """{backend: '' if usable on this device and type, else why not}, the fastest first.

    Args:
        device: its profile, or torch's name of it.
    """
    half, profile = dtype in (torch.bfloat16, torch.float16), _profile(device)
    reasons = {}
    for name in BACKENDS:
        library = LIBRARIES.get(name)
        if name == "sdpa":
            reasons[name] = ""
        elif name == "triton":
            reasons[name] = missing_triton(profile.kind, dtype)
        elif profile.kind != "cuda":
            reasons[name] = "needs a GPU"
        elif not half:
            reasons[name] = f"needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        elif library and library.capabilities and profile.capability not in library.capabilities:
            wanted = ", ".join(f"sm_{major}{minor}" for major, minor in library.capabilities)
            reasons[name] = f"is for {wanted}, this is {profile.architecture}"
        elif library:
            reasons[name] = missing_library(name)
        else:
            reasons[name] = ""
    return reasons


def _profile(device: DeviceProfile | str) -> DeviceProfile:
    return device if isinstance(device, DeviceProfile) else profile_of(device)


@functools.cache
def resolve_backend(backend: str, device: DeviceProfile | str, dtype: torch.dtype) -> str:
    """The backend that `attention` will run. auto: the fastest that is there; cudnn and, but on a GPU, triton must be named.

    Args:
        device: as of `available_backends`.
    Raises:
        ValueError: if a named one cannot run here, with the reason.
    """
    reasons = available_backends(device, dtype)
    if backend == "auto":
        skipped = {"cudnn"} if _profile(device).kind == "cuda" else {"cudnn", "triton"}
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
    if check:
        _check(q, k, v, documents)
        documents.check()
    out, lse = _Attention.apply(q, k, v, documents, backend, deterministic)
    if return_lse and lse.shape[-1] != q.shape[0]:
        raise ValueError(
            f"attention backend {backend!r} does not return the log-sum-exp on {q.device.type}. Use triton."
        )
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents, backend: str, deterministic: bool):
        out, lse = attention_forward(q, k, v, documents, backend=backend, deterministic=deterministic)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.documents, ctx.backend, ctx.deterministic = documents, backend, deterministic
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, *grads: Tensor):
        how = dict(backend=ctx.backend, deterministic=ctx.deterministic)
        q, k, v, out, lse = ctx.saved_tensors
        return *attention_backward(grads[0], q, k, v, out, lse, ctx.documents, **how), None, None, None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, *, backend: str = "auto", deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """`attention` without autograd: for those who decide themselves what is kept until `attention_backward`.

    Returns:
        (out [t_q, heads, d], lse at least fp32 [heads, t_q], or empty where the backend has none).
    """
    _check(q, k, v, documents)
    backend = resolve_backend(backend, profile_of(q.device), q.dtype)
    return _forward(q, k, v, documents.bounds(backend), documents.longest, backend, deterministic)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents,
    *,
    backend: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) from that of `out`, and what `attention_forward` took and gave under the same backend."""
    backend = resolve_backend(backend, profile_of(q.device), q.dtype)
    return _backward(dout, q, k, v, out, lse, documents.bounds(backend), documents.longest, backend, deterministic)


def _empty_results(q, k, v, bounds, longest, backend, deterministic):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (0,) if backend == "sdpa" and q.device.type != "cpu" else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=wide)


@operation(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor[] bounds, int[] longest, str backend, bool deterministic) "
    "-> (Tensor, Tensor)",
    _empty_results,
)
def _forward(q, k, v, bounds, longest, backend, deterministic):
    return BACKENDS[backend].forward(q, k, v, bounds, longest, deterministic)


@operation(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] bounds, int[] longest, "
    "str backend, bool deterministic) -> (Tensor, Tensor, Tensor)",
    lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
def _backward(dout, q, k, v, out, lse, bounds, longest, backend, deterministic):
    return BACKENDS[backend].backward(dout, q, k, v, out, lse, bounds, longest, deterministic)


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

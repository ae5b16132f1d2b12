"""Stand-ins for the attention libraries: the signatures of their functions word for word (flash-attention at 0251105, hopper/ and
flash_attn/cute in it, torch 2.13), computing on a CPU by SDPA, document by document. `calls` counts what they did.

A library's backward has no autograd behind it here either: it gets out and lse and must fill dq, dk and dv.
"""

import sys
from collections import Counter
from types import SimpleNamespace

import torch
from megacpt_kernels import attention_backends
from megacpt_kernels.attention_backends import BACKENDS
from torch import Tensor

calls: Counter = Counter()


def _forward(name, q, k, v, cu_q, cu_k, longest, scale):
    _look(name, q, k, cu_q, cu_k, longest)
    of_sdpa = BACKENDS["sdpa"].forward
    return of_sdpa(q * (scale * q.shape[2] ** 0.5), k, v, [torch.stack([cu_q, cu_k])], longest, False)


def _backward(name, dout, q, k, v, out, lse, cu_q, cu_k, longest, scale):
    _look(name, q, k, cu_q, cu_k, longest)
    factor, bounds = scale * q.shape[2] ** 0.5, [torch.stack([cu_q, cu_k])]
    dq, dk, dv = BACKENDS["sdpa"].backward(dout, q * factor, k, v, out, lse, bounds, longest, False)
    return dq * factor, dk, dv


def _look(name, q, k, cu_q, cu_k, longest):
    calls[name] += 1
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k)) and list(longest) == [int(cu.diff().max()) for cu in (cu_q, cu_k)]
    assert q.shape[2] % 8 == 0


def two(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
    assert causal and window_size == (-1, -1) and return_attn_probs
    longest = (max_seqlen_q, max_seqlen_k)
    return *_forward("forward", q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale), None


@torch.library.custom_op("megacpt_stand_in::two_backward", mutates_args=("dq", "dk", "dv"))
def two_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None, dk: Tensor | None,
    dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool, rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    assert (
        causal and (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0) and not zero_tensors
    )
    longest = (max_seqlen_q, max_seqlen_k)
    grads = _backward("backward", dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
    return torch.empty(0)


def three(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
          causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
          softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert causal and window_size == (-1, -1) and seqused_q is seqused_k is None and return_attn_probs
    longest = (max_seqlen_q, max_seqlen_k)
    return _forward("forward", q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale)


@torch.library.custom_op("megacpt_stand_in::three_backward", mutates_args=("dq", "dk", "dv"))
def three_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, dq: Tensor | None = None, dk: Tensor | None = None,
    dv: Tensor | None = None, softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    assert is_causal and (window_size_left, window_size_right) == (-1, -1) and sequed_q is sequed_k is None
    longest = (max_seqlen_q, max_seqlen_k)
    grads = _backward("backward", dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
    return torch.empty(0)


def three_backward_before(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk, dv,
    softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    """Of FlashAttention-3 before it was an operation of torch."""
    assert causal and window_size == (-1, -1)
    return three_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q,
                          max_seqlen_k, dq, dk, dv, softmax_scale, True, -1, -1, softcap, deterministic, sm_margin)  # fmt: skip


def four(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
         seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
         window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
         score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
         return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False):  # fmt: skip
    """A plain autograd.Function over kernels that torch does not know: no operation of torch's."""
    assert causal and window_size == (None, None) and return_lse

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            longest = (max_seqlen_q, max_seqlen_k)
            return _forward("forward", q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale)

        @staticmethod
        def backward(ctx, *grads):
            raise AssertionError("its own autograd would keep the gathered keys")

    return Plain.apply(q, k, v)


def four_backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                  window_size_right=None, m_block_size=64, n_block_size=128, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
                  seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
                  score_mod=None, mask_mod=None, dlse=None, learnable_sink=None):  # fmt: skip
    assert causal and window_size_left is window_size_right is None and dlse is None
    longest = (max_seqlen_q, max_seqlen_k)
    grads = _backward("backward", dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)
    return dq, dk, dv


def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
           enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert window_size == (-1, 0) and enable_gqa and return_aux.lse
    return _forward("forward", query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), scale)


@torch.library.custom_op("megacpt_stand_in::_varlen_attn_backward", mutates_args={})
def varlen_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, is_causal: bool, rng_state: Tensor, scale: float | None = None, window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert is_causal and window_size == [-1, 0] and rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
    return _backward("backward", grad_out, query, key, value, out, lse, cu_seq_q, cu_seq_k, (max_q, max_k), scale)


FUNCTIONS = {
    "flash-attn": (two, two_backward),
    "flash-attn-3": (three, three_backward),
    "flash-attn-3 before": (three, three_backward_before),
    "flash-attn-4": (four, four_backward),
    "varlen": (varlen, varlen_backward),
}


def install(name: str, monkeypatch) -> str:
    """Puts a library's stand-in where the library is looked for; "auto" then takes it on a CPU. Returns the backend's name."""
    backend, (forward, backward) = name.split()[0], FUNCTIONS[name]
    library = attention_backends.LIBRARIES[backend]
    there = {(library.module, library.forward): forward, (library.backward_module, library.backward): backward}
    there[library.module, "AuxRequest"] = SimpleNamespace
    monkeypatch.setattr(attention_backends, "find", lambda module, function: there.get((module, function)))
    module = sys.modules["megacpt_kernels.attention"]  # the function of this name hides it
    monkeypatch.setattr(module, "resolve_backend", lambda *asked: backend)
    calls.clear()
    return backend

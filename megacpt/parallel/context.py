"""Context parallelism: each rank owns some chunks of the sequence and attends to gathered keys (Llama 3, arXiv 2407.21783,
section 3.3.2), exact for documents of any length.

Shapes: T tokens of the micro-batch, T / cp of this rank, c chunks a rank, kv key-value heads of this tp rank, d head_dim.

A query of a chunk sees keys from the start of the chunk's first document to itself, so a chunk's keys are one contiguous
slice of the sequence. The slices of all chunks of a rank, side by side, make one variable-length causal call. Chunks go
to ranks by visible pairs, longest first, with the fewest chunks (2, 4 or 8 a rank) that balance to 5 %. The plan is made
on the host from the document starts that came with the batch; nothing waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megacpt_kernels import Documents, attention_backward, attention_forward
from megacpt_kernels.backend import wide_of
from torch import Tensor

from megacpt.parallel.collectives import Pending, scatter_sum_tokens, start_gather
from megacpt.parallel.recompute import Kept

BALANCE = 1.05
CHUNKS = (2, 4, 8)


@dataclass(frozen=True)
class Assignment:
    """Which rank owns which chunk.

    Attributes:
        owned: [cp, c] chunk numbers, growing in each row.
        chunk: tokens of a chunk.
        imbalance: visible pairs of the busiest rank over the mean.
    """

    owned: np.ndarray
    chunk: int
    imbalance: float


def assign(document_starts: np.ndarray, tokens: int, ranks: int) -> Assignment:
    """Gives chunks to ranks so that each has about the same number of visible pairs of query and key.

    Args:
        document_starts: growing, the first is 0.
    Raises:
        ValueError: if the tokens cannot be cut into 2 chunks a rank.
    """
    if ranks == 1:
        return Assignment(np.zeros((1, 1), np.int64), tokens, 1.0)
    possible = [c for c in CHUNKS if tokens % (c * ranks) == 0]
    if not possible:
        raise ValueError(f"{tokens} tokens cannot be cut into 2 chunks for each of {ranks} context ranks.")
    pairs = _pairs_before(np.asarray(document_starts), tokens)
    best: Assignment | None = None
    for count in possible:
        size = tokens // (count * ranks)
        costs = np.diff(pairs(np.arange(0, tokens + 1, size)))
        owned, imbalance = _greedy(costs, ranks, count)
        if best is None or imbalance < best.imbalance:
            best = Assignment(owned, size, imbalance)
        if imbalance <= BALANCE:
            break
    assert best is not None, possible
    return best


def _pairs_before(starts: np.ndarray, tokens: int):
    """A function: visible pairs of all queries before given positions. A document of n queries has n (n + 1) / 2."""
    lengths = np.diff(np.append(starts, tokens))
    before = np.concatenate([[0], np.cumsum(lengths * (lengths + 1) // 2)])

    def count(positions: np.ndarray) -> np.ndarray:
        document = np.searchsorted(starts, positions, side="right") - 1
        inside = positions - starts[document]
        return before[document] + inside * (inside + 1) // 2

    return count


def _greedy(costs: np.ndarray, ranks: int, count: int) -> tuple[np.ndarray, float]:
    """Longest first to the least loaded rank that has fewer than `count` chunks, ties by number; then swaps of a chunk of
    the busiest rank with one of another, as long as one lowers the higher load of the two."""
    loads, owned = np.zeros(ranks), [[] for _ in range(ranks)]
    for chunk in np.argsort(-costs, kind="stable"):
        open_ranks = [r for r in range(ranks) if len(owned[r]) < count]
        rank = min(open_ranks, key=lambda r: loads[r])
        owned[rank].append(int(chunk))
        loads[rank] += costs[chunk]
    table = np.array(owned)
    for _ in range(4 * ranks * count):
        busy = int(loads.argmax())
        moved = costs[table[busy]][:, None, None] - costs[table][None]  # [its chunk, other rank, other's chunk]
        higher = np.maximum(loads[busy] - moved, loads[None, :, None] + moved)
        mine, other, theirs = np.unravel_index(int(higher.argmin()), higher.shape)
        if not higher[mine, other, theirs] < loads[busy]:
            break
        table[busy, mine], table[other, theirs] = table[other, theirs], table[busy, mine]
        loads[busy] -= moved[mine, other, theirs]
        loads[other] += moved[mine, other, theirs]
    return np.sort(table, axis=1), float(loads.max() / loads.mean())


@dataclass(frozen=True)
class ContextPlan:
    """What one rank does with one micro-batch.

    Attributes:
        tokens: int64 [T / cp], places of this rank's tokens in the micro-batch.
        keys: int32 [k], places of the keys of its call among the gathered ones, which stand rank by rank; None when
            they are all of them in order. An array as planned, a tensor on the device for attention.
        documents: of the call; queries and keys count from the rank's first.
    """

    tokens: np.ndarray
    keys: np.ndarray | Tensor | None
    documents: Documents

    @property
    def keys_there(self) -> Tensor:
        """`keys` on the device."""
        assert isinstance(self.keys, Tensor), type(self.keys)
        return self.keys


def make_plan(document_starts: np.ndarray, tokens: int, ranks: int, rank: int) -> ContextPlan:
    """The plan of one rank, on the host. Pure: all ranks make the same assignment."""
    starts = np.asarray(document_starts)
    if ranks == 1:
        return ContextPlan(np.arange(tokens), None, Documents.of(starts.tolist(), tokens))
    assignment = assign(starts, tokens, ranks)
    size, places = assignment.chunk, np.empty(tokens, np.int32)  # place of each token among the gathered ones
    order = (assignment.owned.reshape(-1, 1) * size + np.arange(size)).reshape(-1)
    places[order] = np.arange(tokens)
    q_edges, k_edges, keys = [0], [0], []
    for chunk in assignment.owned[rank]:
        begin, end = int(chunk) * size, (int(chunk) + 1) * size
        first = int(starts[np.searchsorted(starts, begin, side="right") - 1])
        inner = [int(start) for start in starts[(starts > begin) & (starts < end)]]
        q_edges += [q_edges[-1] + edge - begin for edge in (*inner, end)]
        k_edges += [k_edges[-1] + edge - first for edge in (*inner, end)]
        keys.append(places[first:end])
    cu_q, cu_k = (torch.tensor(edges, dtype=torch.int32) for edges in (q_edges, k_edges))
    documents = Documents(tuple(q_edges), tuple(k_edges), cu_q, cu_k)
    return ContextPlan(order.reshape(ranks, -1)[rank], np.concatenate(keys), documents)


class Gather:
    """One call of a block gathers K and V over the context ranks twice: before forward's attention, while Q is computed, and before
    backward's, while the output projection's gradients are. Only this rank's K and V are kept in between.

    Where the block runs again before its backward, one gather serves both, or none is needed again in the repetition (see recompute.py).

    Attributes:
        local: this rank's K and V, once backward may start from them. Without their histories, as all that is held here.
        gathered: what the repetition leaves for the backward that follows it.
    """

    def __init__(self, plan: ContextPlan, group: dist.ProcessGroup, kept: Kept):
        self.plan, self.group, self.kept = plan, group, kept
        self.pending: Pending | None = None
        self.local: tuple[Tensor, Tensor] | None = None
        self.gathered: tuple[Tensor, Tensor] | None = None

    def start(self, k: Tensor, v: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        """From K and V, [T / cp, kv, d]; `prepare` is what is still to be done to K."""
        if self.plan.keys is not None:
            k = prepare(k) if prepare else k
            self.pending = start_gather(torch.stack([k.detach(), v.detach()], 1), self.group)

    def start_again(self) -> None:
        """For backward, when there is something else to compute first."""
        if self.local and self.pending is None and self.gathered is None:
            self.start(*self.local)

    def take(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The rank's slices of K and V, two [keys, kv, d]; k and v themselves if there is one rank."""
        if self.plan.keys is None:
            return k, v
        if self.gathered is None:
            if self.pending is None:
                self.start(k, v)
            assert self.pending is not None
            both, self.pending = self.pending.wait().index_select(0, self.plan.keys_there), None
            return both[:, 0].contiguous(), both[:, 1].contiguous()
        taken, self.gathered = self.gathered, None
        return taken

    def give_back(self, dkeys: Tensor, dvalues: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of K and V from those of the slices: added and summed over the ranks in at least fp32."""
        if self.plan.keys is None:
            return dkeys, dvalues
        both = wide_of(torch.stack([dkeys, dvalues], 1))
        total = both.new_zeros((len(self.plan.tokens) * self.group.size(), *both.shape[1:]))
        local = scatter_sum_tokens(total.index_add_(0, self.plan.keys_there, both), self.group).to(dkeys.dtype)
        return local[:, 0], local[:, 1]


def context_attention(q: Tensor, k: Tensor, v: Tensor, gather: Gather, backend: str, deterministic: bool) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        q: [T / cp, heads, d]. k, v: [T / cp, kv, d].
        backend, deterministic: of megacpt_kernels' attention.
    Returns:
        [T / cp, heads, d].
    """
    return _ContextAttention.apply(q, k, v, gather, dict(backend=backend, deterministic=deterministic))


class _ContextAttention(torch.autograd.Function):
    """Keeps q, local k and v, out and the log-sum-exp."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, gather: Gather, how: dict) -> Tensor:
        def attend() -> tuple[Tensor, Tensor]:
            keys = gather.take(k, v)
            if gather.kept.again:
                gather.gathered = keys
            return attention_forward(q, *keys, gather.plan.documents, **how)

        out, lse = gather.kept.once(attend)
        if gather.kept.backward_is_next and any(ctx.needs_input_grad):
            gather.local = k.detach(), v.detach()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.gather, ctx.how = gather, how
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor):
        gather: Gather = ctx.gather
        q, k, v, out, lse = ctx.saved_tensors  # where the block runs again, this is what asks for it at the latest
        (keys, values), gather.local = gather.take(k, v), None
        dq, dk, dv = attention_backward(grads[0], q, keys, values, out, lse, gather.plan.documents, **ctx.how)
        return dq, *gather.give_back(dk, dv), None, None

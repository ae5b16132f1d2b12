"""Assignment of chunks, and the exactness of each rank's one call, without processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megacpt_kernels import Documents, attention
from tolerances import ATTENTION, difference

from megacpt.parallel.context import BALANCE, assign, make_plan

CASES = st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.lists(st.integers(1, 200), max_size=30))


def starts_of(ranks: int, scale: int, lengths: list[int]) -> tuple[np.ndarray, int]:
    tokens = 16 * ranks * scale
    starts = np.unique([0, *np.cumsum(lengths)]).astype(np.int64)
    return starts[starts < tokens], tokens


@given(CASES)
def test_every_token_has_one_owner_and_ranks_have_equal_shares(case):
    starts, tokens = starts_of(*case)
    plans = [make_plan(starts, tokens, case[0], rank) for rank in range(case[0])]
    assert sorted(np.concatenate([plan.tokens for plan in plans]).tolist()) == list(range(tokens))
    assert {len(plan.tokens) for plan in plans} == {tokens // case[0]}


@settings(max_examples=40)
@given(CASES)
def test_the_one_call_of_each_rank_is_exact(case):
    """Gathered keys stand rank by rank; the call over the rank's slices equals attention over the whole sequence."""
    ranks, (starts, tokens) = case[0], starts_of(*case)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, 4, generator=random, dtype=torch.float64) for heads in (2, 1, 1))
    whole = attention(q, k, v, Documents.of(starts.tolist(), tokens))
    plans = [make_plan(starts, tokens, ranks, rank) for rank in range(ranks)]
    order = np.concatenate([plan.tokens for plan in plans])
    for plan in plans:
        keys, values = k[order][plan.keys], v[order][plan.keys]
        out = attention(q[plan.tokens], keys, values, plan.documents)
        assert difference(out, whole[plan.tokens]) < ATTENTION[torch.float64]


def documents(kind: str, seed: int, tokens: int = 131072) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "one":
        return np.array([0])
    median = {"web": 700, "book": 10_000}[kind]
    starts = np.cumsum(random.lognormal(np.log(median), 1.2, 4000).astype(int) + 1)
    return np.concatenate([[0], starts[starts < tokens]])


@pytest.mark.parametrize("kind", ["web", "book", "one"])
def test_the_busiest_of_eight_ranks_is_within_5_percent_at_128k(kind):
    assert max(assign(documents(kind, seed), 131072, 8).imbalance for seed in range(10)) <= BALANCE


def test_tokens_that_cannot_be_cut_are_an_error():
    with pytest.raises(ValueError, match="30 tokens cannot be cut into 2 chunks for each of 4"):
        assign(np.array([0]), 30, 4)

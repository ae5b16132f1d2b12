"""Sums over items that context ranks share."""

import numpy as np
import pytest
import torch
from ranks import on_ranks

TOKENS = 60


def case(ranks: int) -> tuple[list[np.ndarray], np.ndarray, torch.Tensor]:
    """(tokens of each rank, item of each token, value of each token); item 2 is nobody's, item 5 one rank's alone."""
    random = np.random.default_rng(ranks)
    item = np.sort(random.choice([0, 1, 3, 4, 6], TOKENS)).astype(np.int32)
    item[40:] = random.permutation(item[40:])  # documents of an item need not be neighbours
    item[7] = 5
    values = torch.from_numpy(random.normal(size=TOKENS) * 10.0 ** random.integers(-3, 4, TOKENS))
    return list(random.permutation(TOKENS).reshape(ranks, -1)), item, values


def sums(dtype: torch.dtype, alone: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch.distributed as dist

    from megacpt.parallel import items as room

    if alone:
        room.gather_tokens = lambda x, group: x
    group = dist.group.WORLD
    owned, item, values = case(group.size())
    tokens = owned[group.rank()]
    items = room.Items(item[tokens], 8)
    found = room.item_sums(values[tokens].to(dtype), items, group)
    return found, room.spread_to_tokens(found, items), room.counted_once(found, group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sums_are_those_of_one_process_and_the_same_on_all(ranks, dtype):
    owned, item, values = case(ranks)
    want = torch.zeros(8, dtype=torch.float64).index_add_(0, torch.from_numpy(item).long(), values.to(dtype).double())
    found = on_ranks(ranks, sums, dtype)
    for rank, (got, spread, _) in enumerate(found):
        assert torch.equal(got, found[0][0]) and (got - want).abs().max() <= 1e-14 * values.abs().sum()
        assert torch.equal(spread, got[torch.from_numpy(item[owned[rank]]).long()])
    assert not found[0][0][2] and not found[0][0][7] and torch.equal(sum(once for _, _, once in found), found[0][0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, on_ranks(ranks, sums, dtype), strict=True)), (
        "not the same bits again"
    )


def test_the_comparison_sees_ranks_that_do_not_add_up():
    first, second = on_ranks(2, sums, torch.float64, True)
    assert not torch.equal(first[0], second[0])

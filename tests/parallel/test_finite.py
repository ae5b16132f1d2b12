"""Numbers that are none are found wherever they lie, on whatever rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks

from megacpt.parallel.finite import not_finite

BAD = [float("inf"), float("-inf"), float("nan")]


@given(st.data())
def test_one_element_of_any_type_anywhere_is_found(mesh, data):
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    sizes = data.draw(st.lists(st.tuples(st.sampled_from(dtypes), st.integers(0, 40)), min_size=1, max_size=6))
    tensors = {
        str(i): torch.full((size,), torch.finfo(dtype).max, dtype=dtype) for i, (dtype, size) in enumerate(sizes)
    }
    assert not_finite(tensors) == [], "the largest number is one"
    held = [name for name, tensor in tensors.items() if tensor.numel()]
    spoiled = data.draw(st.sets(st.sampled_from(held))) if held else set()
    for name in spoiled:
        at = data.draw(st.integers(0, tensors[name].numel() - 1))
        tensors[name][at] = data.draw(st.sampled_from(BAD))
    assert not_finite(tensors) == sorted(spoiled)


def found_on(bad_rank: int) -> list[str]:
    rank = torch.distributed.get_rank()
    tensors = {f"own.{rank}": torch.ones(3), "shared": torch.ones(2, dtype=torch.bfloat16), "none": torch.ones(0)}
    if rank == bad_rank:
        tensors["shared"][1] = tensors[f"own.{rank}"][0] = float("nan")
    return not_finite(tensors if rank != 2 else {})


@pytest.mark.parametrize("bad, names", [(1, ["own.1", "shared"]), (9, [])])
def test_all_ranks_say_the_same(bad, names):
    """Ranks hold different tensors, the third holds none."""
    assert on_ranks(3, found_on, bad) == [names] * 3

import pytest
from ranks import on_ranks

from megacpt.parallel.consensus import agree, disagreements


def test_the_odd_rank_is_named():
    found = disagreements([{"recipe": "a", "data of x": "b"}] * 3 + [{"recipe": "c", "data of x": "b"}])
    assert found == ["recipe: rank 3 has c; the other 3 ranks have a. Give every node the same files and flags."]
    assert disagreements([{"recipe": "a"}] * 4) == []


def _start(odd: int | None) -> None:
    import torch.distributed as dist

    agree({"recipe": "old" if dist.get_rank() == odd else "new"})


def test_every_rank_stops_when_one_differs():
    on_ranks(3, _start, None)
    with pytest.raises(AssertionError, match=r"rank 0: ConfigError(.|\n)*recipe: rank 1 has(.|\n)*rank 2: ConfigError"):
        on_ranks(3, _start, 1)

import itertools

import pytest

from megacpt.config.layout import Layout, resolve_layout
from megacpt.config.sections.parallel import Parallel
from megacpt.parallel.mesh import picture, rank_grid


def test_figure_5_of_the_llama_3_paper():
    """16 ranks, every degree 2: ranks 0 and 1 share tensors, 0 and 2 the context, 0 and 4 the pipeline, 0 and 8 the data axis."""
    grid = rank_grid(Layout(data_shard=2, pipeline=2, context=2, tensor=2))[:, 0]
    for pp, dp, cp, tp in itertools.product(range(2), repeat=4):
        assert grid[pp, dp, cp, tp] == tp + 2 * (cp + 2 * (pp + 2 * dp))
    assert grid[0, 0, 0].tolist() == [0, 1] and grid[0, 0, :, 0].tolist() == [0, 2]
    assert grid[:, 0, 0, 0].tolist() == [0, 4] and grid[0, :, 0, 0].tolist() == [0, 8]


def test_the_picture_names_every_rank():
    text = picture(Layout(data_shard=2, pipeline=2, context=2, tensor=2))
    assert "data 1, pipeline 0: [8 9] [10 11]" in text and text.count("\n") == 4
    assert "more like these" in picture(Layout(data_shard=64))


@pytest.mark.parametrize(
    "axes, world, shard", [({"tensor": 2}, 8, 4), ({"tensor": 2, "data_shard": 3}, 6, 3), ({}, 1, 1)]
)
def test_auto_fills_what_is_left(axes, world, shard):
    assert resolve_layout(Parallel(**axes), world).data_shard == shard


@pytest.mark.parametrize(
    "axes, world, text",
    [
        ({"tensor": 3}, 8, "tensor 3 x context 1 x pipeline 1 x data_replicate 1 = 3 does not divide the world size 8"),
        ({"tensor": 2, "data_shard": 3}, 8, "x data_shard 3 = 6, but the world size is 8"),
    ],
)
def test_degrees_that_do_not_fit_show_the_arithmetic(axes, world, text):
    with pytest.raises(ValueError, match=text):
        resolve_layout(Parallel(**axes), world)

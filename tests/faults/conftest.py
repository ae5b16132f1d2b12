"""A run without faults, to compare with."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
_wholes: list[Path] = []


@pytest.fixture
def whole(recipe_file, tmp_path_factory):
    """The run of the recipe on two ranks that nothing happens to. Made once."""
    from crash import run_ranks

    if not _wholes:
        directory = tmp_path_factory.mktemp("faultless") / "whole"
        assert run_ranks(2, recipe_file(), [f"--run.directory={directory}"])[0] == [0, 0]
        _wholes.append(directory)
    return _wholes[0]

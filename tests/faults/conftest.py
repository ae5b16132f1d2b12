"""Runs without faults, to compare with and to go on from."""

import shutil
import sys
from pathlib import Path

import pytest
import shared
from samples import write_recipe

sys.path.insert(0, str(Path(__file__).parent))


def _train(name: str, prepared: Path, tokenizer_dir: Path, *flags: str) -> Path:
    from crash import run_ranks

    def make() -> Path:
        folder = shared.new_folder(name)
        path, directory = write_recipe(folder, prepared, tokenizer_dir), folder / "run"
        assert run_ranks(2, path, [f"--run.directory={directory}", *flags])[0] == [0, 0]
        return directory

    return shared.made_once(name, make)


@pytest.fixture
def whole(prepared, tokenizer_dir) -> Path:
    """The run of the recipe on two ranks that nothing happens to. Made once."""
    return _train("whole", prepared, tokenizer_dir)


@pytest.fixture
def stopped(prepared, tokenizer_dir, tmp_path) -> Path:
    """A copy of that run as it is when it is asked to stop after step 4: checkpoints of steps 2 and 4, the status of a stop on request."""
    source = _train("stopped", prepared, tokenizer_dir, "--run.stop_at_step=4")
    return shutil.copytree(source, tmp_path / "part")

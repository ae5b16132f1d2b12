"""Runs without faults, to compare with and to go on from."""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import shared
from samples import write_recipe

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Trained:
    """A run, and the recipe that it was started with: of another path, a resume would refuse it."""

    recipe: str
    run: Path


def _train(name: str, prepared: Path, tokenizer_dir: Path, *flags: str) -> Trained:
    from crash import run_ranks

    def make() -> tuple[str, Path]:
        folder = shared.new_folder(name)
        path, run = write_recipe(folder, prepared, tokenizer_dir), folder / "run"
        assert run_ranks(2, path, [f"--run.directory={run}", *flags])[0] == [0, 0]
        return path, run

    return Trained(*shared.made_once(name, make))


@pytest.fixture
def whole(prepared, tokenizer_dir) -> Path:
    """The run of the recipe on two ranks that nothing happens to. Made once."""
    return _train("whole", prepared, tokenizer_dir).run


@pytest.fixture
def stopped(prepared, tokenizer_dir, tmp_path) -> Trained:
    """A copy of that run as it is when it is asked to stop after step 4: checkpoints of steps 2 and 4, the status of a stop on request."""
    source = _train("stopped", prepared, tokenizer_dir, "--run.stop_at_step=4")
    return Trained(source.recipe, shutil.copytree(source.run, tmp_path / "stopped"))

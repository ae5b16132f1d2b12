"""Shared by all tests: one thread a process (forked ranks need it), tiny models and data, a process group of one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any import of them

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # no timing assertion in the suite
settings.load_profile("shared machine")

sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["costs"]

import shared  # noqa: E402


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # workers inherit it
        os.environ[shared.FOLDER] = tempfile.mkdtemp(prefix="megacpt-tests-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(shared.FOLDER), ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    import torch

    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("full") and not os.environ.get("MEGACPT_TEST_FULL"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with tests/run.sh --full"))


@pytest.fixture(scope="session")
def mesh():
    """A mesh of this process alone."""
    import torch

    from megacpt.config.layout import Layout
    from megacpt.parallel.mesh import build_mesh, start_process_group

    torch.set_num_threads(1)
    start_process_group(torch.device("cpu"))
    return build_mesh(Layout(), torch.device("cpu"))


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """A byte-level BPE tokenizer of 400 entries, EOS 0, as a Hugging Face directory."""
    from samples import make_tokenizer

    return shared.made_once("tokenizer", lambda: make_tokenizer(shared.new_folder("tokenizer")))


@pytest.fixture(scope="session")
def prepared(tokenizer_dir) -> Path:
    """Folder with prepared domains `a` and `b`."""
    from samples import make_data

    return shared.made_once("prepared", lambda: make_data(shared.new_folder("prepared"), tokenizer_dir))


@pytest.fixture
def recipe_file(tmp_path, prepared, tokenizer_dir):
    """Writes a tiny recipe and returns its path; keyword arguments replace whole sections."""
    from samples import write_recipe

    return lambda **sections: write_recipe(tmp_path, prepared, tokenizer_dir, **sections)


@pytest.fixture(scope="session")
def trained(prepared, tokenizer_dir):
    """Runs of a tiny model by layout (layout_runs.Trained), each made once."""
    from layout_runs import Trained
    from samples import write_recipe

    def make() -> str:
        return write_recipe(shared.new_folder("trained"), prepared, tokenizer_dir)

    return Trained(shared.folder() / "trained", shared.made_once("trained", make))


@pytest.fixture(scope="session", autouse=True)
def honest_interpreter():
    import importlib.util

    if importlib.util.find_spec("triton") and os.environ["TRITON_INTERPRET"] == "1":
        import interpreter

        interpreter.install()

"""Shared by all tests: one thread a process (forked ranks need it), tiny models and data, a process group of one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any import of them

import json
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # no timing assertion in the suite
settings.load_profile("shared machine")

sys.path.insert(0, str(Path(__file__).parent))


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
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of 400 entries, EOS 0, as a Hugging Face directory."""
    from samples import TEXTS
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer_dir) -> Path:
    """Folder with prepared domains `a` and `b`."""
    from samples import TEXTS

    from megacpt.data.prepare import Options, prepare

    directory = tmp_path_factory.mktemp("prepared")
    for name, texts in (("a", TEXTS[::2]), ("b", TEXTS[1::2])):
        with open(directory / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        prepare([str(directory / f"{name}.jsonl")], str(directory / name), Options(str(tokenizer_dir)), workers=1)
    return directory


@pytest.fixture
def recipe_file(tmp_path, prepared, tokenizer_dir):
    """Writes a tiny recipe and returns its path; keyword arguments replace whole sections."""
    import tomli_w
    from samples import tiny_config

    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))

    def write(**sections) -> str:
        recipe = {
            "run": {"name": "t", "directory": str(tmp_path / "run"), "seed": 3},
            "model": {"config": str(tmp_path / "config.json"), "tokenizer": str(tokenizer_dir)},
            "parallel": {"micro_batch_tokens": 128},
            "packing": {"directory": str(tmp_path / "packing")},
            "log": {"peak_tflops": 1.0},
            "health": {"watchdog": False},
            "data": {name: {"paths": [str(prepared / name)], "holdout_documents": 5} for name in "ab"},
            "validation": [{"domains": ["a", "b"], "every_tokens": 1024}],
            "stages": [
                {
                    "name": "s",
                    "tokens": 2048,
                    "seq_len": 64,
                    "batch_tokens": 256,
                    "mixture": {"a": 0.7, "b": 0.3},
                    "lr": {"shape": "wsd", "peak": 1e-3, "min": 1e-4, "warmup_tokens": 512, "decay_tokens": 512},
                }
            ],
        } | sections
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(recipe))
        return str(path)

    return write


@pytest.fixture(scope="session", autouse=True)
def honest_interpreter():
    import importlib.util

    if importlib.util.find_spec("triton") and os.environ["TRITON_INTERPRET"] == "1":
        import interpreter

        interpreter.install()


def pytest_runtest_logreport(report):
    if report.when == "call":
        folder = report.nodeid.split("::")[0].removeprefix("tests/").split("/")[0]
        _seconds[folder] = _seconds.get(folder, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter):
    """Where the time went, by folder."""
    terminalreporter.write_line("seconds by folder: " + ", ".join(f"{k} {v:.0f}" for k, v in sorted(_seconds.items())))


_seconds: dict[str, float] = {}

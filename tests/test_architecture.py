"""Imports point one way, inside functions too; nobody but the command line starts a run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    "megacpt_kernels",
    "errors",
    "log",
    "files",
    "heartbeat",
    "faults",
    "compat",
    "family",
    "config",
    "data",
    "parallel",
    "objective",
    "model",
    "optim",
    "checkpoint",
    "evaluate",
    "survive",
    "train",
    "plan",
    "doctor",
    "verbs",
    "cli",
    "__main__",
]
TORCH_FREE = [
    "errors",
    "log",
    "files",
    "config",
    "family",
    "data",
    "plan",
    "survive/lease.py",
    "survive/run_directory.py",
    "survive/watchdog.py",
    "survive/supervise.py",
    "verbs",
    "cli",
    "optim/schedule.py",
    "model/split.py",
    "parallel/pipeline/schedule.py",
    "parallel/pipeline/simulate.py",
    "checkpoint/manifest.py",
]


def files():
    return [*sorted((ROOT / "megacpt").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "megacpt_kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {node.module} if node.module != "megacpt" else {f"megacpt.{alias.name}" for alias in node.names}
    return found


def violations(room: str, imported: set[str]) -> list[str]:
    wrong = []
    for name in imported:
        top, _, rest = name.partition(".")
        if top not in ("megacpt", "megacpt_kernels"):
            continue
        target = "megacpt_kernels" if top == "megacpt_kernels" else rest.partition(".")[0]
        if target in ("", "__version__"):
            continue
        if ROOMS.index(target) > ROOMS.index(room) or (target == "train" and room not in ("train", "verbs", "cli")):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    if path != ROOT / "megacpt/__init__.py":
        assert violations(room_of(path), imports_of(path)) == []


def test_the_rule_sees_a_wrong_import():
    assert violations("data", {"megacpt.model.decoder"}) and violations("plan", {"megacpt.train.loop"})
    assert not violations("model", {"megacpt.data.loader", "torch"})


def test_rooms_without_torch_name_no_torch():
    for place in TORCH_FREE:
        target = ROOT / "megacpt" / place
        paths = target.rglob("*.py") if target.is_dir() else [target if target.suffix else target.with_suffix(".py")]
        for path in paths:
            tops = {name.partition(".")[0] for name in imports_of(path)}
            assert not tops & {"torch", "transformers", "megacpt_kernels"}, path


def test_kernels_is_no_package_of_its_own():
    """A top-level package `kernels` would hide the PyPI project that transformers imports."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_nothing_unsafe_and_nothing_of_one_machine():
    for path in [*files(), *(ROOT / "launch").rglob("*.*")]:
        text = path.read_text()
        for word in (
            "allow_pickle=True",
            "weights_only=False",
            "trust_remote_code=True",
            "bind_all",
            "0.0.0.0",
            "shell=True",
        ):
            assert word not in text, f"{path}: {word}"


def test_names_of_test_files_are_unique():
    """pytest collects files of one name in two folders as one module, and stops."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)

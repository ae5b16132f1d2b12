"""What is installed and what the wheel and the source archive hold."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_both_packages_import_from_any_directory(tmp_path):
    code = "import megacpt, megacpt_kernels, importlib.util as u; print(megacpt.__version__, u.find_spec('kernels'))"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.split()[1] == "None", out.stderr + out.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source archive, built with what is installed here: no network."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PIP_NO_INDEX": "1"})
    assert out.returncode == 0, out.stdout + out.stderr
    return target


def test_the_wheel_holds_both_packages_and_nothing_named_kernels(built):
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {"megacpt", "megacpt_kernels"} <= tops and "kernels" not in tops and "tests" not in tops
    for path in [*(ROOT / "megacpt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        relative = path.relative_to(ROOT)
        assert str(relative).removeprefix("kernels/") in names, relative


def test_the_source_archive_can_build_and_test_itself(built):
    names = {name.partition("/")[2] for name in tarfile.open(next(built.glob("*.tar.gz"))).getnames()}
    wanted = {
        "setup.py",
        "requirements.txt",
        "LICENSE",
        "README.md",
        "tests/run.sh",
        "launch/quickstart.sh",
        "docs/recipe.schema.json",
        "kernels/megacpt_kernels/attention.py",
        "launch/recipes/quickstart.toml",
    }
    assert wanted <= names, wanted - names


def test_the_wheel_works_beside_the_project_named_kernels(built, tmp_path):
    """Unpacked into a folder that also holds a package `kernels`: both are found, neither hides the other."""
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import kernels, megacpt_kernels, megacpt; "
        "assert kernels.theirs and megacpt.__file__.startswith(sys.argv[1]) and megacpt_kernels.__file__.startswith(sys.argv[1])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_other_pythons_are_refused_with_a_sentence(tmp_path):
    code = "import sys; sys.version_info = (3, 10, 0, 'final', 0); exec(open('setup.py').read())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (
        out.returncode == 1
        and "megacpt runs on Python 3.11, 3.12 or 3.13" in out.stderr
        and "Traceback" not in out.stderr
    )


def test_requirements_pin_what_setup_asks_for():
    import re

    setup = (ROOT / "setup.py").read_text()
    pinned = {
        re.split(r"[=<>]", line)[0].replace("_", "-").lower()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    asked = set(re.findall(r'"([A-Za-z0-9_-]+)>=', setup)) - {"flash-attn", "flash-attn-4"}
    assert {name.replace("_", "-").lower() for name in asked} <= pinned
    assert json.dumps(sorted(pinned)).count("apex") == 0


def test_the_shell_scripts_parse():
    for script in [*(ROOT / "launch").glob("*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"]:
        assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0, script


def test_operations_run_without_triton():
    """Where there is no Triton, the package imports and torch computes; a named triton is an error."""
    code = """
import sys; sys.modules["triton"] = None
import torch
from megacpt_kernels import rms_norm
print(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0).sum().item())
try: rms_norm(torch.ones(2, 4), torch.ones(4), 0.0, backend="triton")
except ValueError as error: print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == '8.0\nbackend "triton": triton is not installed. Use "torch" or "auto".\n'

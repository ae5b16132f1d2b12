"""Where a run directory can be, and what may lie in it under its names."""

import os
from pathlib import Path

import pytest

from megacpt.config.run_layout import CHECKPOINTS, FILES, FOLDERS, LONGEST_NAME, METRICS, misplaced, path_problems
from megacpt.errors import ConfigError
from megacpt.survive.run_directory import RunDirectory


def circle(path: Path) -> Path:
    path.symlink_to(path.name)
    return path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("x\0y", "holds a NUL character"),
        ("x" * (LONGEST_NAME + 1), "a name of 256 bytes; 255 are possible"),
        ("/".join(["y" * 200] * 25), "bytes; 3,800 are possible"),
        ("ü" * 128, "a name of 256 bytes"),
        ("file", "a file lies where a folder belongs"),
        ("file/run", "something unreachable (Not a directory)"),
        ("circle", "something unreachable (Too many levels of symbolic links)"),
        ("circle/run", "something unreachable"),
        ("nowhere", "a link that leads nowhere"),
    ],
)
def test_a_run_directory_that_cannot_be(tmp_path, name, told):
    (tmp_path / "file").write_text("")
    circle(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to("gone")
    (problem,) = path_problems(f"{tmp_path}/{name}")
    assert told in str(problem) and problem.where == "run.directory"


def test_a_run_directory_that_can_be(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link", "new", "new/deep", "x" * LONGEST_NAME):
        assert path_problems(f"{tmp_path}/{name}") == []


def test_every_name_is_held_to_its_kind(tmp_path):
    """All at once, before anything runs; the twin: with each of its kind, or a link to one, nothing is wrong."""
    for name in FILES:
        (tmp_path / "wrong" / name).mkdir(parents=True)
        (tmp_path / "right").mkdir(exist_ok=True)
        (tmp_path / "right" / name).write_text("")
    for name in FOLDERS:
        (tmp_path / "wrong" / name).write_text("")
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "right" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert misplaced(tmp_path / "right") == [] == misplaced(tmp_path / "not there")
    with pytest.raises(ConfigError) as error:
        RunDirectory(tmp_path / "wrong", write=True).make()
    told = [str(problem) for problem in error.value.problems]
    assert (
        len(told) == len(FILES) + len(FOLDERS) == len(set(told))
        and not (tmp_path / "wrong/lease/00000001.json").exists()
    )
    assert f"{tmp_path}/wrong/{METRICS}: a folder lies where a file belongs. Move it away." in told
    assert f"{tmp_path}/wrong/{CHECKPOINTS}: a file lies where a folder belongs. Move it away." in told


@pytest.mark.parametrize("name", [METRICS, CHECKPOINTS])
def test_links_in_a_circle_and_pipes(tmp_path, name):
    circle(tmp_path / name)
    assert "something unreachable (Too many levels" in str(misplaced(tmp_path)[0])
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "a device, a pipe or a socket lies where" in str(misplaced(tmp_path)[0])
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("gone")
    assert len(misplaced(tmp_path)) == (name == CHECKPOINTS), "a file that a link leads to can be made, a folder not"

"""Whatever has become of a run directory, every verb on it works, or leaves with 2 or 76 and a sentence: no traceback, no wait without an
end. The verbs run in a forked process each, as they would on the command line, with everything imported already."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import forget_groups

from megacpt.cli import main
from megacpt.config.run_layout import FILES, FOLDERS

for room in (
    "checkpoint.export",
    "data.tokenizer",
    "plan.check",
    "plan.inspect",
    "survive.supervise",
    "train.loop",
    "train.standalone",
):
    importlib.import_module(f"megacpt.{room}")  # so that no child imports what it may have no right to read

FULL = bool(os.environ.get("MEGACPT_TEST_FULL"))
NUMBERS = (
    "step",
    "step_s",
    "attempt",
    "first_started",
    "pid",
    "start",
    "crc32",
    "format",
    "exit_code",
    "vocab_size",
    "rope_theta",
)
DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "circle": lambda path: path.symlink_to(path.name),
    "binary": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
    "nested": lambda path: path.write_bytes(b"[" * 1_000_000),
    "nested objects": lambda path: path.write_bytes(b'{"a":' * 200_000),
    "number": lambda path: path.write_bytes(b"9" * 50_000),
    "numbers": lambda path: path.write_text(json.dumps(dict.fromkeys(NUMBERS, 10**400)) + "\n"),
    "forbidden": lambda path: path.chmod(0),
}
PLACES = [
    *FILES,
    *FOLDERS,
    "lease/00000001.json",
    "huggingface/config.json",
    "huggingface/dtypes.json",
    "huggingface/tokenizer.json",
    "checkpoints/step-00000004",
    "checkpoints/step-00000004/manifest.json",
    "checkpoints/step-00000004/.metadata",
    "checkpoints/step-00000004/__0_0.distcp",
    "incidents/x.0/conclusion.json",
]
READERS = ("list", "verify", "export", "average", "inspect", "check")
NOBODY = 65534


@pytest.fixture(scope="module")
def folder():
    """With a recipe, and a run of it that was stopped after step 4 of 8. A process without rights may use it, too."""
    from samples import make_data, make_tokenizer, write_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("tokenizer", "data"):
            (folder / part).mkdir()
        make_data(folder / "data", make_tokenizer(folder / "tokenizer"))
        validation = [{"domains": ["a"], "every_tokens": 1024}]
        write_recipe(
            folder, folder / "data", folder / "tokenizer", validation=validation, checkpoint={"every_steps": 2}
        )
        assert ends(folder, ["train"])["train"][0] == 0
        (folder / "run").rename(folder / "sound")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        yield folder


def arguments_of(verb: str, folder: Path) -> list[str]:
    run, recipe, output = str(folder / "run"), str(folder / "recipe.toml"), str(folder / "output" / verb)
    return {
        "list": ["checkpoint", "list", run],
        "verify": ["checkpoint", "verify", run],
        "export": ["export", run, "--output", output],
        "average": ["average", run, "--last", "2", "--output", output],
        "inspect": ["inspect", recipe, "--step", "3"],
        "check": ["check", recipe],
        "evaluate": ["evaluate", run, recipe],
        "train": ["train", recipe, f"--run.stop_at_step={5 if Path(run).exists() else 4}", "--log.tensorboard=false"],
        "supervise": ["supervise", "--max-restarts", "0", "--backoff", "0", "--", "true", recipe],
    }[verb]


def damaged(folder: Path, damage: str, place: str) -> None:
    """The run as it was, but for one place: what was there makes room, and the damage takes its name."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.rmtree(folder / "output", ignore_errors=True)
    shutil.copytree(folder / "sound", folder / "run", copy_function=copy_with_mode)
    path = folder / "run" / place
    if damage != "forbidden":
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    DAMAGES[damage](path)


def copy_with_mode(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    os.chmod(target, 0o666)


def ends(
    folder: Path, verbs: Sequence[str], user: int | None = None, seconds: float = 300
) -> dict[str, tuple[int, str]]:
    """(exit code, what was printed) of each verb; one child runs them one after the other, as far as it comes."""
    (folder / "ends").mkdir(exist_ok=True)
    for path in (folder / "ends").iterdir():
        path.unlink()
    (folder / "ends").chmod(0o777)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if user is not None:
            os.setgroups([]), os.setgid(user), os.setuid(user)
        torch.set_num_threads(1)
        for verb in verbs:
            run_verb(folder, verb)
        os._exit(0)
    deadline, over = time.monotonic() + seconds, False
    while not over and time.monotonic() < deadline:
        over = os.waitpid(pid, os.WNOHANG)[0] == pid
        time.sleep(0.01)
    if not over:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    found = {}
    for verb in verbs:
        told, code = folder / f"ends/{verb}.told", folder / f"ends/{verb}.code"
        found[verb] = (
            int(code.read_text()) if code.exists() else -1,
            told.read_text(errors="replace") if told.exists() else "",
        )
    return found


def run_verb(folder: Path, verb: str) -> None:
    """In the child: as the command line does."""
    code = 99
    handle = os.open(folder / f"ends/{verb}.told", os.O_WRONLY | os.O_CREAT, 0o666)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout = sys.stderr = open(handle, "w", buffering=1)
    try:
        forget_groups()
        dist.distributed_c10d._world.default_pg = None
        main(arguments_of(verb, folder))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    (folder / f"ends/{verb}.code").write_text(str(code))


def complaint(verb: str, code: int, told: str) -> str:
    """Why an end is none that a user can work with; "" if it is one."""
    allowed = (0, 2, 75, 76) if verb == "supervise" else (0, 2, 76)  # it tries again what it cannot judge
    sentence = code in (0, 75) or re.search(r"(megacpt|DAMAGED): .{20}", told, re.DOTALL)
    if code in allowed and sentence and "Traceback" not in told:
        return ""
    return f"{verb} left with {code}: {told[-1500:]}"


def cases() -> list[tuple[str, str]]:
    """Every damage of every place with --full; else one of each place, and each of them somewhere."""
    kinds = list(DAMAGES)
    return [(place, kind) for i, place in enumerate(PLACES) for kind in (kinds if FULL else [kinds[i % len(kinds)]])]


@pytest.mark.parametrize(("place", "damage"), cases())
def test_a_damaged_run_is_used_or_refused_in_a_sentence(folder, place, damage):
    user = NOBODY if damage == "forbidden" and os.getuid() == 0 else None
    damaged(folder, damage, place)
    found = ends(folder, READERS, user) | ends(folder, ["supervise"], user)
    damaged(folder, damage, place)
    found |= ends(folder, ["evaluate"], user) | ends(folder, ["train"], user)
    complaints = [complaint(verb, *end) for verb, end in found.items()]
    assert not any(complaints), "\n".join(filter(None, complaints))


def test_a_sound_run_is_used_by_all(folder):
    """The twin: without damage every verb does its work, so that above they are refused for the damage."""
    damaged(folder, "empty", "unrelated")
    found = ends(folder, [*READERS, "evaluate"], NOBODY if os.getuid() == 0 else None) | ends(folder, ["train"])
    assert {verb: code for verb, (code, _) in found.items()} == dict.fromkeys((*READERS, "evaluate", "train"), 0), (
        "\n".join(f"{verb}: {told[-1500:]}" for verb, (code, told) in found.items() if code)
    )
    assert complaint("train", 1, "") and complaint("list", 2, "") and complaint("list", 0, "Traceback")
    assert {kind for _, kind in cases()} == set(DAMAGES) and {place for place, _ in cases()} == set(PLACES)

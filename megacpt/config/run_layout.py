"""Every name in a run directory. Checkpoints, snapshots and averages are folders step-00000100 below theirs (checkpoint/manifest.py)."""

import os
import stat
from pathlib import Path

from megacpt.errors import Problem

RECIPE = "recipe.toml"
"""The resolved recipe, every value."""
PLAN = "plan.json"
"""What the run was resolved to before its first step."""
STATUS = "run.json"
"""What has become of the run."""
METRICS = "metrics.jsonl"
"""A row a step."""
EVENTS = "events.jsonl"
"""What happened between steps."""
LEDGER = "ledger.jsonl"
"""A row an attempt, from the supervisor."""
STOP_REQUEST = "stop-request"
"""Asks the owner to save and leave; written by a supervisor or a person."""

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
"""Weights that averages are made of, by stage."""
AVERAGES = "average"
"""The averages that stages made."""
HUGGING_FACE = "huggingface"
"""config.json, tokenizer files and DTYPES of the model that the run began with."""
GATES = "gates"
"""Pictures of what gates measured."""
INCIDENTS = "incidents"
"""What ranks and watchdogs saw of a failure, by attempt."""
LEASE = "lease"
"""Who owns the run directory."""
PROFILE = "profile"
TENSORBOARD = "tb"

DTYPES = "dtypes.json"
"""In HUGGING_FACE: the type that each tensor had when it was imported."""

FILES = (RECIPE, PLAN, STATUS, METRICS, EVENTS, LEDGER, STOP_REQUEST)
FOLDERS = (CHECKPOINTS, SNAPSHOTS, AVERAGES, HUGGING_FACE, GATES, INCIDENTS, LEASE, PROFILE, TENSORBOARD)


def snapshot_folder(run: Path, stage: str) -> Path:
    return run / SNAPSHOTS / stage


def incident_folder(run: Path, attempt: str) -> Path:
    return run / INCIDENTS / attempt


def gate_picture(run: Path, gate: str, step: int) -> Path:
    return run / GATES / f"{gate}-step-{step:08d}.png"


LONGEST_NAME, LONGEST_PATH = 255, 3800
"""Bytes; of the 4,095 that a path may have, what lies in a run directory takes some."""


def path_problems(path: str, key: str = "run.directory") -> list[Problem]:
    """Why the directory that a key names cannot be at a path; nothing for one that is not there yet."""
    encoded = os.fsencode(os.path.abspath(path))
    text, remedy = "", "Choose a shorter one."
    if "\0" in path:
        text, remedy = "holds a NUL character.", "Remove it."
    elif longest := [name for name in encoded.split(b"/") if len(name) > LONGEST_NAME]:
        text = f"has a name of {len(longest[0]):,} bytes; {LONGEST_NAME} are possible."
    elif len(encoded) > LONGEST_PATH:
        text = f"is a path of {len(encoded):,} bytes; {LONGEST_PATH:,} are possible."
    elif (kind := _kind(Path(path))) not in (None, _FOLDER):
        text, remedy = f"{kind} lies where a folder belongs.", "Choose another, or move it away."
    return [Problem(key, path, text, remedy)] if text else []


def misplaced(run: Path) -> list[Problem]:
    """What has a name of a run directory and is of another kind, or forbidden."""
    problems = []
    for name in (*FILES, *FOLDERS):
        path, kind = run / name, _kind(run / name)
        wanted = _FILE if name in FILES else _FOLDER
        rights = os.R_OK | os.W_OK | (os.X_OK if wanted == _FOLDER else 0)
        if kind is None or (kind == _DANGLING and wanted == _FILE):  # what such a link leads to can be made
            continue
        if kind != wanted:
            problems.append(Problem(str(path), None, f"{kind} lies where {wanted} belongs.", "Move it away."))
        elif not os.access(path, rights):
            problems.append(Problem(str(path), None, "cannot be read and written.", "Change its mode or owner."))
    return problems


_FILE, _FOLDER, _DANGLING = "a file", "a folder", "a link that leads nowhere"


def _kind(path: Path) -> str | None:
    """What lies at a path, in words; None for nothing."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return _DANGLING if os.path.islink(path) else None
    except OSError as error:  # a link in a circle, a folder above it that is a file or forbidden
        return f"something unreachable ({error.strerror})"
    return _FOLDER if stat.S_ISDIR(mode) else _FILE if stat.S_ISREG(mode) else "a device, a pipe or a socket"

"""What a run leaves behind: recipe.toml, run.json, metrics.jsonl, events.jsonl, tb/. Only rank 0 writes."""

import json
import os
import time
from pathlib import Path
from typing import Any

import megacpt
from megacpt.config.load import plain, save_recipe
from megacpt.config.recipe import Recipe
from megacpt.errors import ConfigError


class RunDirectory:
    """The folder of a run.

    Args:
        write: whether this rank writes; the others only know the paths.
    """

    def __init__(self, path: str | Path, write: bool):
        self.path, self.write = Path(path), write
        self.checkpoints = self.path / "checkpoints"
        self.facts: dict[str, Any] = {}
        if write:
            self.path.mkdir(parents=True, exist_ok=True)

    def begin(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        """Writes the resolved recipe and run.json with status running; counts the attempt."""
        if not self.write:
            return
        before = self.read_run()
        save_recipe(recipe, self.path / "recipe.toml")
        self.facts = {"megacpt": megacpt.__version__, "attempt": before.get("attempt", 0) + 1, **facts}
        self.status("running")

    def read_run(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def status(self, status: str, exit_code: int | None = None) -> None:
        if self.write and self.facts:
            content = {"status": status, "exit_code": exit_code, "time": time.time(), **self.facts}
            partial = self.path / "run.json.tmp"
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, self.path / "run.json")

    def event(self, kind: str, step: int, tokens: int, **more: Any) -> None:
        if self.write:
            self._append(
                "events.jsonl", {"time": round(time.time(), 3), "step": step, "tokens": tokens, "kind": kind, **more}
            )

    def metrics(self, row: dict[str, Any]) -> None:
        if self.write:
            self._append("metrics.jsonl", row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drops rows after a step, and a last line that a kill left unfinished."""
        path = self.path / "metrics.jsonl"
        if not self.write or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)


FREE_SECTIONS = ("parallel", "kernels", "log", "checkpoint", "health", "profile", "gates")
FREE_OF_CURRENT_STAGE = (
    "parallel",
    "tokens",
    "lr",
    "betas",
    "weight_decay",
    "clip_norm",
    "gates",
    "on_fail",
    "average",
)


def changes_on_resume(before: Recipe, now: Recipe, current: str) -> list[str]:
    """What differs between the recipe of a run and the one it is resumed with, as `key: old -> new`.

    Free to change: `FREE_SECTIONS`, `run` but its seed, stages that have not begun, and of the stage in which the
    checkpoint stands (`current`) its length, rates and layout.

    Raises:
        ConfigError: if something else differs: data order, seed, model, finished stages.
    """
    old, new = plain(before), plain(now)
    changed, frozen = [], _differing(old["run"]["seed"], new["run"]["seed"], "run.seed")
    for section in sorted((set(old) | set(new)) - {"run", "stages"}):
        differing = _differing(old.get(section), new.get(section), section)
        (changed if section in FREE_SECTIONS else frozen).extend(differing)
    names = [stage["name"] for stage in old["stages"]]
    begun = names.index(current) + 1 if current in names else 0
    for i, stage in enumerate(old["stages"][:begun]):
        later = new["stages"][i] if i < len(new["stages"]) else {}
        for key in sorted(set(stage) | set(later)):
            free = key == "parallel" or (i == begun - 1 and key in FREE_OF_CURRENT_STAGE)
            differing = _differing(stage.get(key), later.get(key), f"stages.{names[i]}.{key}")
            (changed if free else frozen).extend(differing)
    changed += _differing(old["stages"][begun:], new["stages"][begun:], f"stages after {current}")
    if frozen:
        raise ConfigError(
            [f"{line}. It is frozen once the run has begun." for line in frozen]
            + ["Take the old values, or start a new run under another run.name."],
            "the recipe of the resumed run",
        )
    return changed


def _differing(old: Any, new: Any, name: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for key in {**old, **new} for d in _differing(old.get(key), new.get(key), f"{name}.{key}")]
    return [] if old == new else [f"{name}: {old} -> {new}"]

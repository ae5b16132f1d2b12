"""What a resume may change: the keys themselves say it (`base.OnResume`, `Section.resume`), and recipes are compared key by key."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from megacpt.config.base import KeyPath, OnResume, Resume, Section
from megacpt.config.load import plain
from megacpt.config.recipe import Recipe
from megacpt.errors import ConfigError, Problem


def changes_on_resume(before: Recipe, now: Recipe, current: str) -> list[str]:
    """What differs between the recipe of a run and the one it is resumed with, as `key: old -> new`.

    Of `[run]`, which is about this start, only what is frozen counts; stages that have not begun are one line.

    Args:
        current: name of the stage in which the checkpoint stands.
    Raises:
        ConfigError: naming each difference that a resume may not make.
    """
    old, new = plain(before), plain(now)
    names = [stage["name"] for stage in old["stages"]]
    begun = names.index(current) + 1 if current in names else 0
    changed, frozen = [], []
    for path, was, is_now in _differences(old, new, begun):
        rule = resume_rule(path)
        free = rule == "free" or (rule == "unfinished stages" and path[1] == begun - 1)
        shown = ".".join(
            names[key] if isinstance(key, int) and path[i - 1 : i] == ("stages",) else str(key)
            for i, key in enumerate(path)
        )
        if free and path[0] != "run":
            changed.append(f"{shown}: {was} -> {is_now}")
        elif not free:
            frozen.append(Problem(shown, None, f"{was} -> {is_now}. It is frozen once the run has begun."))
    if old["stages"][begun:] != new["stages"][begun:]:
        changed.append(f"stages after {current}: {old['stages'][begun:]} -> {new['stages'][begun:]}")
    if frozen:
        way_out = Problem("", None, "Take the old values, or start a new run under another run.name.")
        raise ConfigError([*frozen, way_out], "the recipe of the resumed run")
    return changed


def _differences(old: dict[str, Any], new: dict[str, Any], begun: int) -> Iterator[tuple[KeyPath, Any, Any]]:
    """Every differing key outside stages that have not begun: sections by name, then stages in order."""
    for section in sorted((set(old) | set(new)) - {"stages"}):
        yield from _differing(old.get(section), new.get(section), (section,))
    for i, stage in enumerate(old["stages"][:begun]):
        later = new["stages"][i] if i < len(new["stages"]) else {}
        for key in sorted(set(stage) | set(later)):
            yield from _differing(stage.get(key), later.get(key), ("stages", i, key))


def _differing(old: Any, new: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differing(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path, old, new


def resume_rule(path: KeyPath) -> Resume:
    """What a resume may do with a key: as it says itself, else its section, else the key that holds the section.

    Raises:
        KeyError: if nobody says it; a test excludes that.
    """
    kinds: list[type[Section]] = [Recipe]
    rule: Resume | None = None
    holds_many = False
    for key in path:
        field = next((kind.model_fields[key] for kind in kinds if key in kind.model_fields and not holds_many), None)
        if field is None:  # the name or the number of an entry, or what lies inside a value
            holds_many = False
            continue
        own: Resume | None = next((item.rule for item in field.metadata if isinstance(item, OnResume)), None)
        holds_many = get_origin(field.annotation) in (dict, list)
        kinds = list(sections_in(field.annotation))
        held: Resume | None = next((kind.resume for kind in kinds), None)
        rule = own or held or rule
    if rule is None:
        raise KeyError(path)
    return rule


def sections_in(kind: Any) -> Iterator[type[Section]]:
    """The sections that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
    for part in get_args(kind):
        yield from sections_in(part)

"""Reads a recipe: TOML, then flags over it, then the models. Every problem at once, each with the file or flag it
came from and the nearest valid choice."""

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megacpt.config.base import KeyPath
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import RECIPE, STATUS
from megacpt.errors import ConfigError, Problem, nearest, show_value
from megacpt.files import write_atomically

_FIRST = "The first argument is a recipe in TOML."


def load_recipe(path: str, flags: Sequence[str] = ()) -> Recipe:
    """The recipe in file `path` with `--section.key=value` flags laid over it.

    Raises:
        ConfigError: all problems of the file and of the flags.
    """
    tree = read_toml(path)
    overrides, problems = _apply_flags(tree, flags)
    recipe, found = _validate(tree, overrides, path)
    if problems or recipe is None or found:
        raise ConfigError(problems + found, path)
    return _with_order_of_run(recipe, path)


def _with_order_of_run(recipe: Recipe, path: str) -> Recipe:
    """The recipe with its domains in the order of its run: as recipe.toml in the run directory has them, which a new run writes by name.

    Which row is next depends on that order; it must not depend on the order in which somebody writes keys. A run of a version that took
    the recipe's order keeps it.
    """
    stored = Path(recipe.directory) / RECIPE
    beside = Path(path).name == stored.name and os.path.isfile(
        Path(path).parent / STATUS
    )  # a run's own, wherever it was moved to
    stored = Path(path) if beside else stored
    run = read_toml(str(stored)) if os.path.isfile(stored) else {}
    stages = run.get("stages")
    named = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    mixtures = {str(stage.get("name")): stage.get("mixture") for stage in named}
    ordered = [
        stage.model_copy(update={"mixture": _ordered(stage.mixture, mixtures.get(stage.name))})
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"data": _ordered(recipe.data, run.get("data")), "stages": ordered})


def _ordered(content: dict[str, Any], like: Any) -> dict[str, Any]:
    """Keys in the order of a dictionary with the same ones, else by name."""
    same = isinstance(like, dict) and set(like) == set(content)
    return {key: content[key] for key in (like if same else sorted(content))}


def read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError([Problem(path, None, "no such file.", _FIRST)], "the arguments") from None
    except IsADirectoryError:
        raise ConfigError([Problem(path, None, "is a directory.", _FIRST)], "the arguments") from None
    except OSError as error:
        raise ConfigError(
            [Problem(path, None, f"cannot be read ({error.strerror}).", _FIRST)], "the arguments"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", None, f"not valid TOML: {error}.")], path) from None
    except ValueError as error:  # Python reads no number of thousands of digits, open() no name with a NUL
        raise ConfigError([Problem("", None, f"cannot be read: {error}.")], path) from None
    except RecursionError:
        raise ConfigError(
            [Problem("", None, "is nested too deeply.", "A recipe has at most five levels.")], path
        ) from None


def _apply_flags(tree: dict, flags: Sequence[str]) -> tuple[dict[KeyPath, tuple[str, str]], list[Problem]]:
    """Writes flags into `tree`. Returns {path: (flag, raw text)} and problems."""
    overrides, problems = {}, []
    for flag in flags:
        name, equals, text = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not equals or not all(name.split(".")):
            remedy = "Flags over the recipe are written --section.key=value."
            problems.append(Problem(flag, None, "not understood.", remedy))
            continue
        where = _place(tree, name.split("."))
        if isinstance(where, str):
            problems.append(Problem(flag, None, where))
            continue
        try:
            _set(tree, where, _value(text))
        except TypeError:
            text = f"{'.'.join(map(str, where[:-1]))} is a value, not a section."
            problems.append(Problem(flag, None, text, "Give a key of a section."))
        else:
            overrides[where] = (flag, text)
    return overrides, problems


def _set(tree: dict, where: KeyPath, value: Any) -> None:
    """Sets a key, making the sections on the way. Raises TypeError if one of them is a value."""
    node: Any = tree
    for i, key in enumerate(where):
        fits = isinstance(node, list) if isinstance(key, int) else isinstance(node, dict)
        if not fits:
            raise TypeError(where)
        if i + 1 == len(where):
            node[key] = value
        else:
            node = node[key] if isinstance(key, int) else node.setdefault(key, {})


def _place(tree: dict, keys: list[str]) -> KeyPath | str:
    """Keys of a flag as a path; tables of an array by name (stages) or by number. A string says what is wrong."""
    section = tree.get(keys[0])
    if keys[0] in ("stages", "validation") and len(keys) > 1:
        items = section if isinstance(section, list) else []
        names = [item.get("name") for item in items if isinstance(item, dict)]
        if keys[1] in names:
            return (keys[0], names.index(keys[1]), *keys[2:])
        if re.fullmatch("[0-9]{1,6}", keys[1]) and int(keys[1]) < len(items):
            return (keys[0], int(keys[1]), *keys[2:])
        return f"no {keys[0]} entry {keys[1]!r}. There are: {', '.join(str(n) for n in names if n) or len(items)}."
    return tuple(keys)


def _value(text: str) -> Any:
    """A flag's text as a TOML value; what is no TOML value is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, or a number of thousands of digits
        return text


def _validate(tree: dict, overrides: dict[KeyPath, tuple[str, str]], path: str) -> tuple[Recipe | None, list[Problem]]:
    if wrong := [
        Problem(show_path(where, tree), text, "holds a character that no file can hold.")
        for where, text in _unwritable(tree)
    ]:
        return None, wrong
    errors: list[ErrorDetails] = []
    for attempt in range(2):
        try:
            return Recipe.model_validate(tree), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
        # --run.name=5 is a string although 5 reads as a number: try once more with the raw text there.
        texts = [tuple(e["loc"]) for e in errors if e["type"] == "string_type" and tuple(e["loc"]) in overrides]
        if attempt == 0 and texts:
            for where in texts:
                _set(tree, where, overrides[where][1])
            continue
        break
    return None, [_problem(e, tree, overrides, path) for e in errors]


def _unwritable(node: Any, where: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Strings, keys too, that no path and no file in UTF-8 can hold: with NUL, or with bytes of the command line that are no text."""
    if isinstance(node, str) and not _is_writable(node):
        yield where, node
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in inside:
        if isinstance(key, str):
            yield from _unwritable(key, (*where, key))
        yield from _unwritable(item, (*where, key))


def _is_writable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _problem(error: ErrorDetails, tree: dict, overrides: dict[KeyPath, tuple[str, str]], path: str) -> Problem:
    where = tuple(error["loc"])
    unknown = error["type"] == "extra_forbidden"  # a flag may have made the section that is unknown
    source = next(
        (
            flag
            for at, (flag, _) in overrides.items()
            if where[: len(at)] == at or (unknown and at[: len(where)] == where)
        ),
        path,
    )
    name = show_path(where, tree)
    if unknown:
        return Problem(name, None, "unknown key.", f"{nearest(str(where[-1]), _keys_at(where[:-1]))} ({source})")
    if error["type"] == "missing":
        return Problem(name, None, "is required.", f"({source})")
    value = error["input"]
    if error["type"] == "literal_error":
        choices = error.get("ctx", {})["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        text = nearest(value if isinstance(value, str) else show_value(value), choices)
    elif error["type"] == "value_error":
        text = str(error.get("ctx", {})["error"])
    else:
        text = error["msg"].replace("Input should be", "should be")
    return Problem(name, None if isinstance(value, dict | list) else value, f"{text.rstrip('.')}.", f"({source})")


def show_path(where: KeyPath, tree: dict) -> str:
    """('stages', 0, 'seq_len') -> 'stages.adapt.seq_len'."""
    node: Any = tree
    parts: list[str] = []
    for key in where:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            node = None
        named = isinstance(key, int) and isinstance(node, dict) and isinstance(node.get("name"), str)
        parts.append(node["name"] if named else str(key))
    return ".".join(parts) or "recipe"


def _keys_at(where: KeyPath) -> list[str]:
    """Keys that the models allow at a path."""
    kind: Any = Recipe
    for key in where:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            kind = kind.model_fields[key].annotation
        else:  # an element of a list or a value of a dict
            kind = get_args(kind)[-1]
        kind = (
            next((a for a in get_args(kind) if isinstance(a, type) and issubclass(a, BaseModel)), kind)
            if (type(None) in get_args(kind))
            else kind
        )
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def plain(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as TOML-ready values: every key, None as the word that stands for it or left out."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if v is not None}
        return [clean(v) for v in value] if isinstance(value, list | tuple) else value

    return clean(recipe.model_dump())


def recipe_from(content: Any, source: str) -> Recipe:
    """The recipe that `plain` made.

    Raises:
        ConfigError: with every problem.
    """
    recipe, problems = _validate(content, {}, source)
    if recipe is None or problems:
        raise ConfigError(problems, source)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe; reading it again gives an equal one."""
    import tomli_w

    text = tomli_w.dumps(plain(recipe))
    if not path.is_file() or path.read_bytes() != text.encode():  # a resume needs no room for it
        write_atomically(path, text)

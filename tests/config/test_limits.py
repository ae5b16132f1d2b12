"""What no recipe means and somebody writes: every value for every key is accepted or a problem with its place; never a traceback."""

import datetime
import json
import os
import re

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_sections import paths

from megacpt.cli import main
from megacpt.config.load import load_recipe, read_toml, save_recipe
from megacpt.errors import ConfigError, Problem, show_value
from megacpt.plan.check import check
from megacpt.plan.describe import describe

EXAMPLES = 3000 if os.environ.get("MEGACPT_TEST_FULL") else 250
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # fmt: skip

numbers = (
    st.integers()
    | st.sampled_from([0, 1, 2, 3, 64, 192, -1, 2**31 - 1, 2**31, 2**62, 2**63, 10**18, 10**30, 10**4000])
    | st.floats()
    | st.sampled_from([1e308, 1e12, 1.0, 5e-324, -0.0])
)
texts = (
    st.text(max_size=8)
    | st.sampled_from(["", "auto", "keep", "4Mi", "1T", "64", "9" * 5000 + "T", "x" * 300, "a/" * 3000, "\0", "../..", "**", "[", "s", "a"])
    | st.sampled_from(["needle", "extend", "interleaved", "zb-v", "wsd", "infinite", "ntk", "yarn"])
)  # fmt: skip
plain = numbers | texts | st.booleans() | st.just(datetime.date(2026, 1, 1)) | st.just(datetime.time(1, 2))
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
NEEDED = {
    "lr": {"shape": "constant", "peak": 1e-3},
    "online": {"every_tokens": 512},
    "average": {"every_tokens": 512},
    "order": {"scores": ["none.jsonl"]},
    "NAME": {"paths": ["none"], "kind": "recovery"},
}
"""What a section needs beside the key that is tried; one key too many is only another problem."""


def put(tree, path, value) -> None:
    """Sets a key in a recipe, with what its section needs."""
    node = tree
    for key in path[:-1]:
        if isinstance(key, int):
            node.append({}) if not node else None
        elif key not in node:
            node[key] = dict(NEEDED.get(key, {})) if key != "validation" else []
        node = node[key]
    node[path[-1]] = value


def outcome(load):
    """The recipe and what `check` says, or the error; whatever it is, it can be shown."""
    try:
        recipe = load()
        report = check(recipe, 2, card_gib=80.0)
    except ConfigError as error:
        assert error.problems and len(str(error)) < 100_000
        return None
    json.dumps(report.as_json(), allow_nan=False)
    assert bool(report.facts) != bool(report.problems)
    for line in [*report.problems, *report.warnings, *(describe(report.facts) if report.facts else [])]:
        assert not re.search(r"\b(nan|inf)\b", str(line).partition(": ")[2]), line
    return recipe


@given(path=st.sampled_from(sorted(set(paths()), key=str)), value=values)
@example(path=("stages", 0, "mixture"), value={"a": 1e308, "b": 1e308})
@example(path=("stages", 0, "mixture"), value={"a": 1e308})
@example(path=("stages", 0, "mixture"), value={"a": 5e-324})
@example(path=("parallel", "virtual_stages"), value=10**9)
@example(path=("parallel", "stage_layers"), value=[0] * 3)
@example(path=("stages", 0, "batch_tokens"), value=64 * 10**15)
@example(path=("stages", 0, "batch_tokens"), value={"start": 64, "increment": 64, "over": "1T", "final": "1Ti"})
@example(path=("stages", 0, "tokens"), value=10**18)
@example(path=("stages", 0, "seq_len"), value=2**31 - 1)
@example(path=("gates", "NAME", "tasks"), value=["\0"])
@example(path=("run", "directory"), value="a/" * 3000)
@example(path=("run", "directory"), value="x" * 300)
@fuzzed
def test_any_value_for_any_key(recipe_file, tmp_path, path, value):
    """Accepted, or refused with a reason; what is accepted reads back equal."""
    tree = read_toml(recipe_file())
    put(tree, path, value)
    wrong = tmp_path / "fuzzed.toml"
    try:
        wrong.write_text(tomli_w.dumps(tree), encoding="utf-8")
    except (UnicodeEncodeError, ValueError):  # what is no TOML at all
        return
    if recipe := outcome(lambda: load_recipe(str(wrong))):
        save_recipe(recipe, tmp_path / "again.toml")
        assert load_recipe(str(tmp_path / "again.toml")) == recipe


dotted = st.sampled_from(sorted({".".join(map(str, path)) for path in paths()})) | st.text(max_size=12)


@given(
    key=dotted,
    tail=st.sampled_from(["", ".x", ".0", ".²", "." + "9" * 5000, "..", ".name"]),
    value=texts | numbers.map(show_value),
)
@example(key="data.a.paths", tail=".0", value="x")
@example(key="stages", tail=".²", value="1")
@example(key="run.name", tail=".x", value="1")
@example(key="run.seed", tail="", value="9" * 5000)
@example(key="run.seed", tail="", value="0x" + "f" * 5000)
@example(key="stages.0.tokens", tail="", value="0x" + "f" * 5000)
@example(key="run.seed", tail="", value="[" * 5000)
@example(key="run.start", tail="", value="0x" + "f" * 5000)
@example(key="model.pretrained", tail="", value="\udcff")
@example(key="gates.g", tail="", value='{kind="needle", haystack="a", x=1}')
@example(key="gates.g", tail="", value='{kind="nothing"}')
@example(key="gates.g", tail="", value="{}")
@fuzzed
def test_any_flag(recipe_file, key, tail, value):
    outcome(lambda: load_recipe(recipe_file(), [f"--{key}{tail}={value}"]))


def code_of(*arguments) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


@pytest.mark.parametrize(
    "content, told",
    [
        (b"x = " + b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
        (b"x = " + b"9" * 5000, "cannot be read"),
        (b"x = 0x" + b"f" * 20000, "x: unknown key"),
        (b"[run]\nseed = 0x" + b"f" * 20000, "run.seed = a number of about 24"),
        (b"[run]\nname = \"\\u0000\"", 'run.name = "\\x00": holds a character'),
        (b"[run]\nname = 1979-05-27", "run.name = 1979-05-27: should be a valid string"),
        (b"stages = 5", "stages = 5: should be a valid list"),
    ],
)  # fmt: skip
def test_files_that_no_parser_likes(tmp_path, capsys, content, told):
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    assert code_of("check", str(path)) == 2
    assert told in capsys.readouterr().err


def test_recipes_that_cannot_be_opened(tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, told in ((loop, "Too many levels"), (tmp_path / ("x" * 300), "File name too long"), ("a\0b", "null")):
        assert code_of("check", str(path)) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["nan", "inf", "-inf", "0", "-1", "-0.0"])
def test_memory_that_no_card_has(recipe_file, capsys, memory):
    assert code_of("check", recipe_file(), f"--device-memory={memory}") == 2
    assert "--device-memory" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-3", "1" + "0" * 30])
def test_worlds_that_are_none(recipe_file, capsys, size):
    assert code_of("check", recipe_file(), f"--world-size={size}") == 2
    assert "--world-size" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize("kind", ["loop", "file", "long"])
def test_directories_that_cannot_be_made(recipe_file, tmp_path, capsys, verb, kind):
    """A link loop, a file, a name that is too long: said with the key, before anything is loaded onto a device."""
    place = tmp_path / ("x" * 300 if kind == "long" else "place")
    if kind == "loop":
        place.symlink_to(place)
    elif kind == "file":
        place.write_text("")
    assert code_of(verb, recipe_file(), f"--run.directory={place}/run") == 2
    assert "run.directory" in capsys.readouterr().err


def test_a_damaged_recipe_in_the_run_directory_is_named(recipe_file, tmp_path):
    """The order of its domains is read from there."""
    path = recipe_file()
    folder = tmp_path / "other"
    folder.mkdir()
    for text in ("stages = 5", "[[stages]]\nname = [1]", "data = 1", "x = 1"):
        (folder / "recipe.toml").write_text(text)
        assert load_recipe(path, [f"--run.directory={folder}"]).data.keys() == {"a", "b"}
    (folder / "recipe.toml").write_text("x = " + "[" * 5000)
    with pytest.raises(ConfigError, match="recipe.toml"):
        load_recipe(path, [f"--run.directory={folder}"])


def test_values_are_shown_as_the_recipe_writes_them():
    assert show_value(True) == "true" and show_value("a") == '"a"' and show_value([1]) == "[1]"
    assert show_value("x" * 1000).endswith("… (1002 characters)") and "\n" not in show_value("a\nb")
    assert show_value(10**5000) == "a number of about 5000 digits" and show_value(7) == "7"
    assert str(Problem("a.b", 3, "is odd.", "Take 4.")) == "a.b = 3: is odd. Take 4."
    assert str(Problem("", None, "is odd.")) == "is odd." and str(Problem("a", None, "is odd.")) == "a: is odd."

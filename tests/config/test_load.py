import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.load import load_recipe, save_recipe
from megacpt.config.quantity import parse_tokens, show_tokens
from megacpt.config.reference import page, schema, sections
from megacpt.config.rules import problems_of
from megacpt.errors import ConfigError
from megacpt.plan.check import check
from megacpt.plan.describe import describe

ROOT = Path(__file__).parents[2]


def problems(path, *flags) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, flags)
    return str(caught.value)


@given(st.integers(0, 10**16))
def test_quantities_survive_being_shown(tokens):
    assert parse_tokens(show_tokens(tokens)) == tokens


@pytest.mark.parametrize("text, tokens", [("4Mi", 4 << 20), ("2.87T", 2_870_000_000_000), ("500K", 500_000), ("7", 7)])
def test_quantities(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("wrong", ["4MB", "-1", "1.5", "", "M", True, 1.5, -3])
def test_what_is_no_quantity_is_refused(wrong):
    with pytest.raises(ValueError):
        parse_tokens(wrong)


def test_all_problems_come_at_once_with_the_nearest_choice_and_their_source(recipe_file):
    path = recipe_file(parallell={"tensor": 2})
    text = problems(
        path,
        "--run.start=resum",
        "--stages.s.seq_len=many",
        "--stages.x.tokens=1",
        "--optimizer.betas=[0.9]",
        "nonsense",
    )
    assert "6 problems" in text
    assert "parallell: unknown key. Did you mean 'parallel'?" in text and f"({path})" in text
    assert "run.start = \"resum\": Did you mean 'resume'?" in text and "(--run.start=resum)" in text
    assert "stages.s.seq_len" in text and "(--stages.s.seq_len=many)" in text
    assert "no stages entry 'x'. There are: s." in text
    assert "optimizer.betas" in text
    assert "nonsense: not understood" in text


def test_flags_reach_every_level(recipe_file):
    recipe = load_recipe(
        recipe_file(),
        ["--run.name=12", "--stages.s.lr.peak=0.5", '--data.a.paths=["x"]', "--validation.0.max_tokens=1K"],
    )
    assert (recipe.run.name, recipe.stages[0].lr.peak, recipe.data["a"].paths) == ("12", 0.5, ["x"])
    assert recipe.validation[0].max_tokens == 1000


def test_types_are_strict(recipe_file):
    for flag in ("--parallel.tensor=true", "--parallel.tensor=2.0", "--parallel.tensor='2'", "--run.seed=-1"):
        assert "parallel.tensor" in problems(recipe_file(), flag) or "run.seed" in problems(recipe_file(), flag)


def test_broken_files_are_one_sentence(tmp_path):
    assert "no such file" in problems(str(tmp_path / "none.toml"))
    assert "is a directory" in problems(str(tmp_path))
    (tmp_path / "bad.toml").write_text("a = [1,\n")
    assert "not valid TOML" in problems(str(tmp_path / "bad.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in problems(str(tmp_path / "binary.toml"))


def test_the_resolved_recipe_reads_back_equal(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file())
    save_recipe(recipe, tmp_path / "again.toml")
    assert load_recipe(str(tmp_path / "again.toml")) == recipe


@pytest.mark.parametrize(
    "flag, expected",
    [
        (
            "--stages.s.batch_tokens=200",
            "stages.s.batch_tokens = 200: must be a multiple of seq_len = 64. Nearest: 192, 256.",
        ),
        ("--parallel.micro_batch_tokens=100", "Nearest: 64, 128."),
        ("--parallel.tensor=3", "does not divide the world size 1"),
        ("--parallel.data_shard=2", "but the world size is 1"),
        ("--parallel.pipeline=2", "pipeline 2 x data_replicate 1 = 2 does not divide the world size 1"),
        ("--parallel.contiguous_micro_batches=4", 'belongs to schedule = "interleaved"; schedule is "1f1b"'),
        ("--stages.s.mixture={c=1.0}", "no such domain in [data]. Possible: a, b."),
        ("--stages.s.mixture={a=0.0}", "the weights sum to 0.0"),
        ("--stages.s.lr.min=1.0", "is above peak"),
        ("--stages.s.lr.shape=cosine", 'belongs to shape = "wsd"'),
        ("--stages.s.lr.warmup_tokens=2000", "exceed the 2048 tokens"),
        ('--optimizer.lr={shape="constant", peak=1.0}', "not both"),
        ("--data.a.holdout_documents=0", "a holds out no documents"),
        ("--model.pretrained=x", "pretrained and config given"),
        ("--run.start=pretrained", "needs model.pretrained"),
    ],
)
def test_rules_show_the_numbers_and_the_way_out(recipe_file, flag, expected):
    found = problems_of(load_recipe(recipe_file(), [flag]), 1)
    assert any(expected in str(problem) for problem in found), found


def test_check_names_what_model_and_data_do_not_allow(recipe_file):
    recipe = load_recipe(
        recipe_file(),
        ['--data.a.paths=["/nowhere/x"]', "--data.b.holdout_documents=100000", '--model.rope={type="llama3"}'],
    )
    text = "\n".join(map(str, check(recipe, 1).problems))
    assert "/nowhere/x.json: no manifest" in text
    assert "data.b.holdout_documents = 100000" in text
    assert "rope.low_freq_factor: is required" in text


def test_check_prints_the_resolved_run(recipe_file):
    report = check(load_recipe(recipe_file()), 1)
    text = "\n".join(describe(report.facts))
    assert not report.problems
    assert "2Ki tokens in 8 steps of 256 tokens" in text and "epochs" in text


def test_check_is_quick_and_imports_no_torch(recipe_file):
    code = (
        "import sys; from megacpt.cli import run; run(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'transformers', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, "check", recipe_file()], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip().endswith("[]"), out.stdout


def test_a_bad_recipe_leaves_with_2_and_no_traceback(recipe_file):
    command = [sys.executable, "-m", "megacpt", "train", recipe_file(), "--run.sed=3"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 2 and "Traceback" not in out.stderr and "Did you mean 'seed'?" in out.stderr


def test_every_shipped_recipe_is_valid():
    recipes = sorted(
        (ROOT / "launch/recipes").glob("quickstart*.toml")
    )  # the others are for more ranks: tests/test_launch.py
    assert recipes
    for path in recipes:
        assert problems_of(load_recipe(str(path)), 1) == [], path


def test_the_schema_and_the_reference_page_are_of_this_version():
    in_schema = {name for name, model in schema()["$defs"].items() if "properties" in model}
    assert in_schema == {section.__name__ for section in sections()}, "a section that the page does not show"
    assert all(section.heading for section in sections())
    assert (ROOT / "docs/recipe.md").read_text() == page(), "run python -m megacpt.config.reference"
    assert json.loads((ROOT / "docs/recipe.schema.json").read_text()) == schema(), (
        "run python -m megacpt.config.reference"
    )


def test_the_schema_accepts_the_shipped_recipes_and_refuses_a_typing_error():
    import tomllib

    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads((ROOT / "docs/recipe.schema.json").read_text()))
    for path in sorted((ROOT / "launch/recipes").glob("*.toml")):
        tree = tomllib.loads(path.read_text())
        assert list(validator.iter_errors(tree)) == [], path
        tree["stages"][0]["sq_len"] = 3
        assert list(validator.iter_errors(tree))


def test_every_key_is_read_by_some_code():
    """A key of the recipe that no line outside its section names is a key that does nothing."""
    rooms = (ROOT / "megacpt").rglob("*.py")
    code = "\n".join(p.read_text() for p in rooms if p.parent.name != "sections" and p.name != "reference.py")
    for section in sections():
        for name in section.model_fields:
            assert f".{name}" in code or f'"{name}"' in code, f"{section.__name__}.{name}"
    assert len(sections()) > 20

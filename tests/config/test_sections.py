"""What every key of a recipe must have: a rule for a resume, a text that stands alone; and what a stage may change of the layout."""

import re
from typing import Literal

import pytest
from pydantic import Field

from megacpt.config.base import Section
from megacpt.config.load import load_recipe, save_recipe
from megacpt.config.merge import parallel_in
from megacpt.config.recipe import Recipe
from megacpt.config.reference import sections
from megacpt.config.resume import changes_on_resume, resume_rule, sections_in
from megacpt.config.sections.parallel import Parallel, StageParallel
from megacpt.errors import ConfigError


def paths(section=Recipe, before=()):
    """Where every key stands, with "NAME" for the entries of dictionaries and 0 for those of lists."""
    for name, field in section.model_fields.items():
        inner = list(sections_in(field.annotation))
        text = str(field.annotation)
        entry = ("NAME",) if text.startswith("dict") and inner else (0,) if text.startswith("list") and inner else ()
        yield (*before, name)
        for part in inner:
            yield from paths(part, (*before, name, *entry))


FREE = {"parallel", "kernels", "log", "checkpoint", "health", "profile", "gates"}
FREE_IN_UNFINISHED_STAGES = {"tokens", "lr", "betas", "weight_decay", "clip_norm", "gates", "on_fail", "average"}


def expected(path) -> str:
    """The promise to users, written out: runs that were begun rely on it."""
    if path[0] == "stages":
        key = path[2] if len(path) > 2 else ""
        return {"parallel": "free"}.get(
            key, "unfinished stages" if key in FREE_IN_UNFINISHED_STAGES else "later stages"
        )
    return "free" if path[0] in FREE or (path[0] == "run" and path[1:] != ("seed",)) else "frozen"


def test_every_key_says_what_a_resume_may_change():
    every = list(paths())
    assert len(every) > 150
    for path in every:
        assert resume_rule(path) == expected(path), path


def test_a_key_without_a_rule_is_seen(monkeypatch):
    """The twin: a section that says nothing, under a recipe that says nothing."""

    class Silent(Section, heading="silent"):
        key: int = 0

    class Bare(Section):
        section: Silent = Silent()

    monkeypatch.setattr("megacpt.config.resume.Recipe", Bare)
    with pytest.raises(KeyError):
        resume_rule(("section", "key"))


STAGES = [
    {
        "name": name,
        "tokens": 512,
        "seq_len": 64,
        "batch_tokens": 256,
        "mixture": {"a": 1.0},
        "lr": {"shape": "constant", "peak": 1e-3},
    }
    for name in ("first", "second", "third")
]


@pytest.mark.parametrize("stage, free", [("first", False), ("second", True), ("third", True)])
def test_a_resume_in_the_second_stage(recipe_file, stage, free):
    """Rates of finished stages are frozen, layouts never are; a stage that has not begun may change in all."""
    before = load_recipe(recipe_file(stages=STAGES))

    def resumed(*flags):
        return changes_on_resume(before, load_recipe(recipe_file(stages=STAGES), flags), "second")

    assert resumed(f"--stages.{stage}.parallel.context=2")
    if free:
        assert resumed(f"--stages.{stage}.lr.peak=0.5")
    else:
        with pytest.raises(ConfigError, match=f"stages.{stage}.lr.peak: 0.001 -> 0.5. It is frozen"):
            resumed(f"--stages.{stage}.lr.peak=0.5")
    if stage == "third":
        assert resumed("--stages.third.seq_len=32")[0].startswith("stages after second: [{'name': 'third'")
    else:
        with pytest.raises(ConfigError, match=f"stages.{stage}.seq_len: 64 -> 32. It is frozen"):
            resumed(f"--stages.{stage}.seq_len=32")


def test_all_frozen_keys_come_at_once(recipe_file):
    flags = [
        "--run.seed=2",
        "--data.a.min_tokens=3",
        "--optimizer.eps=1e-6",
        "--run.stop_at_step=4",
        "--log.every_steps=7",
    ]
    before = load_recipe(recipe_file())
    with pytest.raises(ConfigError) as caught:
        changes_on_resume(before, load_recipe(recipe_file(), flags), "s")
    found = [str(problem).partition(". It is frozen")[0] for problem in caught.value.problems]
    assert found[:-1] == ["data.a.min_tokens: None -> 3", "optimizer.eps: 1e-08 -> 1e-06", "run.seed: 3 -> 2"]
    assert changes_on_resume(before, load_recipe(recipe_file(), flags[3:]), "s") == ["log.every_steps: 1 -> 7"]


def texts(models=None) -> dict[str, str]:
    return {
        f"{section.__name__}.{name}": field.description or ""
        for section in models or [Recipe, *sections()]
        for name, field in section.model_fields.items()
    }


REFERS_BACK = re.compile(
    r"(The same|As in|As above|Of them|Nor|More of them|Their|None before|It|This|These|Also|Not|Where it|Interval\.)\b"
)


def bad_texts(found: dict[str, str]) -> set[str]:
    """Keys whose text needs its neighbour's: another key has the same, or it begins with a reference to one."""
    shared = {key for key, text in found.items() if list(found.values()).count(text) > 1}
    short = {key for key, text in found.items() if len(text) < 25 or not text.rstrip().endswith((".", ")."))}
    return shared | short | {key for key, text in found.items() if REFERS_BACK.match(text)}


def test_the_text_of_every_key_stands_alone():
    found = texts()
    assert len(found) > 150 and not bad_texts(found), bad_texts(found)
    assert all(section.__doc__ and section.heading for section in sections())


def test_texts_that_lean_on_a_neighbour_are_seen():
    class Leaning(Section, heading="leaning"):
        a: int = 0
        """Number of things that are counted here."""
        b: int = 0
        """Number of things that are counted here."""
        c: int = 0
        """Nor rises above this multiple of it."""
        d: int = 0
        """Interval."""
        e: int = 0
        """Upper bound of the things that are counted here."""

    assert bad_texts(texts([Leaning])) == {f"Leaning.{key}" for key in "abcd"}


def test_a_stage_has_every_key_of_parallel_and_its_words():
    assert set(StageParallel.model_fields) == set(Parallel.model_fields)
    assert StageParallel(data_shard="auto", embedding_weight=2.0).model_dump(exclude_none=True) == {
        "data_shard": "auto",
        "embedding_weight": 2.0,
    }
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        StageParallel(tensor=0)
    with pytest.raises(ValueError, match="valid integer"):
        StageParallel(data_shard="atuo")


def test_a_key_that_parallel_gets_is_a_stage_s_too():
    from megacpt.config.sections.parallel import _of_a_stage

    class More(Parallel):
        more: Literal["a", "b"] = Field("a", description="Something more.")

    kind, default = _of_a_stage("more", More.model_fields["more"])
    assert default is None and "`parallel.more` for this stage" in str(kind)


def test_a_stage_says_auto_over_a_fixed_value(recipe_file, tmp_path):
    """The word survives being written, and is read as what is decided later."""
    flags = ["--parallel.data_shard=2", "--parallel.prefetch=3", '--stages.s.parallel={data_shard="auto", prefetch=0}']
    recipe = load_recipe(recipe_file(), flags)
    own = parallel_in(recipe, recipe.stages[0])
    assert (recipe.parallel.data_shard, own.data_shard, own.prefetch) == (2, None, 0)
    save_recipe(recipe, tmp_path / "again.toml")
    again = load_recipe(str(tmp_path / "again.toml"))
    assert again == recipe and parallel_in(again, again.stages[0]) == own
    assert parallel_in(load_recipe(recipe_file(), flags[:1]), recipe.stages[0]).data_shard is None
    without = load_recipe(recipe_file(), flags[:2])
    assert parallel_in(without, without.stages[0]).data_shard == 2

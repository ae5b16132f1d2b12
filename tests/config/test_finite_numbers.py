"""No number of a recipe is inf or nan, and each has bounds that mean something."""

import math
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from megacpt.config.base import Section
from megacpt.config.load import load_recipe
from megacpt.config.reference import sections
from megacpt.config.rules import problems_of, warnings_of
from megacpt.config.sections.optimizer import LearningRate, Optimizer
from megacpt.errors import ConfigError
from megacpt.plan.check import check

NONE = [math.inf, -math.inf, math.nan]


def floats_in(kind: Any, value: float) -> list[Any]:
    """What of a field's type holds a float: an input of the type with `value` in each such place."""
    if kind is float:
        return [value]
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return [
            [inside if i == j else 0.5 for j in range(len(parts))]
            for i, part in enumerate(parts)
            for inside in floats_in(part, value)
        ]
    if get_origin(kind) is dict:
        return [{"a": inside} for inside in floats_in(parts[1], value)]
    if get_origin(kind) is list:
        return [[inside] for inside in floats_in(parts[0], value)]
    return [inside for part in parts for inside in floats_in(part, value)]


def fields() -> list[tuple[type[Section], str]]:
    """(model, field) of every float of every section."""
    return [(m, name) for m in sections() for name, field in m.model_fields.items() if floats_in(field.annotation, 0.0)]


def refused(model: type[BaseModel], name: str, value: Any) -> bool:
    """Whether the field is named as not finite, whatever else is missing."""
    try:
        model.model_validate({name: value})
    except ValidationError as error:
        return any(found["loc"][0] == name and found["type"] == "finite_number" for found in error.errors())
    return False


def test_all_floats_are_found():
    found = {f"{model.__name__}.{name}" for model, name in fields()}
    assert len(found) > 35
    assert {
        "Optimizer.betas",
        "Stage.mixture",
        "Stage.betas",
        "Log.peak_tflops",
        "OnlineMixture.topic_weights",
    } <= found


@pytest.mark.parametrize("model, name", fields(), ids=lambda x: x if isinstance(x, str) else x.__name__)
@pytest.mark.parametrize("value", NONE, ids=str)
def test_no_float_of_any_section_is_inf_or_nan(model, name, value):
    for example in floats_in(model.model_fields[name].annotation, value):
        assert refused(model, name, example), f"{model.__name__}.{name} = {example}"


def test_the_twin_without_the_rule_lets_them_pass():
    class Loose(Section):
        model_config = ConfigDict(allow_inf_nan=True)
        number: float

    class Strict(Section):
        number: float

    assert not refused(Loose, "number", math.inf) and Loose(number=math.inf).number == math.inf
    assert refused(Strict, "number", math.inf)


@given(st.sampled_from(["optimizer.eps", "optimizer.weight_decay", "stages.s.lr.peak", "stages.s.lr.min"]), st.data())
def test_what_is_accepted_is_finite(key, data):
    """Any float, by flag over a recipe: an error that names the key, or a finite number."""
    value = data.draw(st.floats() | st.sampled_from(NONE))
    model = LearningRate if ".lr." in key else Optimizer
    required = {"shape": "constant", "peak": 1.0} if ".lr." in key else {}
    name = key.rpartition(".")[2]
    try:
        accepted = model.model_validate(required | {name: value})
    except ValidationError as error:
        assert {found["loc"][0] for found in error.errors()} == {name}
    else:
        assert math.isfinite(getattr(accepted, name)) and getattr(accepted, name) >= 0


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999"])
def test_flags_and_files_are_refused_by_name(recipe_file, value):
    flags = [
        f"--{key}={text}"
        for key, text in {
            "optimizer.eps": value,
            "optimizer.betas": f"[{value}, 0.5]",
            "stages.s.lr.peak": value,
            "stages.s.rope.theta": value,
            "stages.s.mixture.a": value,
            "health.step_timeout_seconds": value,
            "mixture.online": f"{{every_tokens=512, topic_weights={{a={value}}}}}",
            "gates.g": f'{{kind="recovery", domains=["a"], tolerance={value}}}',
        }.items()
    ]
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file(), flags)
    assert "8 problems" in str(caught.value) and str(caught.value).count("should be a finite number") == 8
    for key in ("optimizer.betas.0 = ", "mixture.online.topic_weights.a = ", "gates.g.recovery.tolerance = "):
        assert key in str(caught.value)
    path = recipe_file(optimizer={"weight_decay": float(value)})
    with pytest.raises(ConfigError, match="optimizer.weight_decay = -?(inf|nan): should be a finite number"):
        load_recipe(path)


@pytest.mark.parametrize(
    "flag",
    [
        "--optimizer.betas=[1.0, 0.95]",
        "--optimizer.betas=[0.9, 2.0]",
        "--stages.s.betas=[-0.1, 0.5]",
        "--optimizer.eps=0.0",
        "--optimizer.eps=1e-300",
        "--optimizer.weight_decay=-0.1",
        "--optimizer.clip_norm=0.0",
        "--stages.s.lr.peak=0.0",
        "--stages.s.lr.min=-1e-4",
        "--stages.s.mixture.a=-1.0",
        "--stages.s.rope={theta=0.0}",
        "--model.rope={low_freq_factor=0.0}",
        "--health.step_timeout_seconds=1e300",
    ],
)
def test_numbers_out_of_their_bounds_are_refused(recipe_file, flag):
    with pytest.raises(ConfigError, match="should be (greater|less) than"):
        load_recipe(recipe_file(), [flag])


def test_weights_of_a_mixture_have_a_finite_sum(recipe_file):
    with pytest.raises(ConfigError, match="mixture.a = 1e[+]308: should be less than or equal to 1000000000000"):
        load_recipe(recipe_file(), ["--stages.s.mixture={a=1e308, b=1e308}"])
    largest = load_recipe(recipe_file(), ["--stages.s.mixture={a=1e12, b=1e12}"])
    assert problems_of(largest, 1) == [] and check(largest, 1).facts.domains[0].taken == 1024


def test_a_rate_that_turns_signs_is_warned_of(recipe_file):
    found = warnings_of(load_recipe(recipe_file(), ["--stages.s.lr.peak=20.0"]))
    assert any("lr.peak 20 x weight_decay 0.1 = 2" in str(warning) for warning in found)
    assert not any("weight_decay" in str(warning) for warning in warnings_of(load_recipe(recipe_file())))

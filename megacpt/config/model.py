"""The model that a recipe names, and what a recipe asks of it: the rotary embedding of each stage, frozen parameters, a layout."""

import fnmatch
from collections.abc import Sequence

from megacpt.config.recipe import Model
from megacpt.config.stage import Parallel, Rope, Stage
from megacpt.errors import ConfigError, nearest
from megacpt.family.base import ModelConfig, Parameter
from megacpt.family.read import parse_config, read_config
from megacpt.family.rope import change_rope
from megacpt.family.shapes import ARCHITECTURES


def load_model_config(model: Model) -> ModelConfig:
    """The model that a recipe's `[model]` names, with its change of the rotary embedding.

    Raises:
        ConfigError: if there is none, or it is not trained here.
    """
    if model.architecture:
        if model.architecture not in ARCHITECTURES:
            raise ConfigError([f"model.architecture = {model.architecture}: possible are {', '.join(ARCHITECTURES)}."])
        config = parse_config(ARCHITECTURES[model.architecture], model.architecture)
    else:
        config = read_config(model.pretrained or model.config or "")
    if model.expect and not model.architecture:
        _compare(config, load_model_config(Model(architecture=model.expect)), model.expect)
    return with_rope(config, model.rope)


def _compare(config: ModelConfig, expected: ModelConfig, name: str) -> None:
    names = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    differ = [
        f"{key} is {getattr(config, key)}, model.expect = {name} has {getattr(expected, key)}."
        for key in names
        if getattr(config, key) != getattr(expected, key)
    ]
    if differ:
        raise ConfigError(differ)


def with_rope(
    config: ModelConfig, change: Rope | None, seq_len: int = 0, checkpoint_config: ModelConfig | None = None
) -> ModelConfig:
    """The config with a recipe's change of the rotary embedding, see `change_rope`.

    Raises:
        ConfigError: if the model cannot have it.
    """
    if change is None:
        return config
    given = change.model_dump(exclude_none=True)
    return change_rope(config, seq_len=seq_len, checkpoint_config=checkpoint_config, **given)


def config_in_stage(config: ModelConfig, stages: Sequence[Stage], index: int) -> ModelConfig:
    """The model's config in a stage: changes of the rotary embedding hold on through later stages.

    Args:
        config: with `[model]`'s own change.
    Raises:
        ConfigError: if the rows are longer than the model's window.
    """
    own = config
    for stage in stages[: index + 1]:
        config = with_rope(config, stage.rope, stage.seq_len, own)
    if problem := config.window_problem(stages[index].seq_len):
        raise ConfigError([f"seq_len = {stages[index].seq_len}: {problem}"])
    return config


def frozen_names(patterns: Sequence[str], config: ModelConfig) -> list[str]:
    """Parameters that a stage's `freeze` names.

    Raises:
        ConfigError: for a pattern that fits none, or if nothing would be trained.
    """
    names = list(config.shapes())
    fitting = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    fixed = {name for found in fitting.values() for name in found}
    frozen = [p.name for p in config.parameters if not p.trainable or p.name in fixed]
    problems = [
        f"freeze: no parameter fits {pattern!r}. {nearest(pattern, names[:3])}"
        for pattern, found in fitting.items()
        if not found
    ]
    if len(frozen) == len(names):
        problems.append("freeze: all parameters are frozen, nothing would be trained.")
    if problems:
        raise ConfigError(problems)
    return frozen


def shape_problems(config: ModelConfig, parallel: Parallel, vocab_multiple: int) -> list[str]:
    """Why a layout cannot share this model's heads, matrices and vocabulary, with the numbers."""
    tensor = parallel.tensor
    shared = {(_counted(p), p.shared_units(vocab_multiple), p.repeated) for p in config.parameters if not p.is_whole(1)}
    fits = lambda units, repeated, ranks: units % ranks == 0 or (repeated and ranks % units == 0)
    most = min(units for _, units, repeated in shared if not repeated)
    possible = [n for n in range(1, most + 1) if all(fits(units, again, n) for _, units, again in shared)]
    problems = []
    for name, units, repeated in sorted(shared):
        if fits(units, repeated, tensor):
            continue
        problems.append(
            f"parallel.tensor = {tensor}: {name} = {units} can neither be divided by it nor repeated to it. "
            f"Use {', '.join(map(str, possible))}."
            if repeated
            else f"parallel.tensor = {tensor}: does not divide the model's {name} = {units}."
        )
    return problems


def _counted(parameter: Parameter) -> str:
    return "the padded vocabulary" if parameter.split == "vocab" else parameter.counted

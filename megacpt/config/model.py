"""The model that a recipe names, and what a recipe asks of it: the rotary embedding of each stage, frozen parameters, a layout."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from megacpt.config.sections.model import Model, Rope
from megacpt.config.sections.parallel import Parallel
from megacpt.config.sections.stage import Stage
from megacpt.errors import ConfigError, Problem, nearest
from megacpt.family.base import ModelConfig
from megacpt.family.read import parse_config, read_config
from megacpt.family.rope import change_rope
from megacpt.family.shapes import ARCHITECTURES


def load_model_config(model: Model) -> ModelConfig:
    """The model that a recipe's `[model]` names, with its change of the rotary embedding. Raises as `load_base_config`."""
    return with_rope(load_base_config(model), model.rope)


def load_base_config(model: Model) -> ModelConfig:
    """The model that a recipe's `[model]` names, as its config.json says it.

    Raises:
        ConfigError: if there is none, or it is not trained here.
    """
    if model.architecture:
        if model.architecture not in ARCHITECTURES:
            remedy = nearest(model.architecture, list(ARCHITECTURES))
            raise ConfigError([Problem("architecture", model.architecture, "no such shape is known here.", remedy)])
        config = parse_config(ARCHITECTURES[model.architecture], model.architecture)
    else:
        config = read_config(model.pretrained or model.config or "")
    if model.expect and not model.architecture:
        _compare(config, load_base_config(Model(architecture=model.expect)), model.expect)
    return config


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
        Problem("expect", name, f"{key} is {getattr(config, key)}, and that shape has {getattr(expected, key)}.")
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
        raise ConfigError([Problem("seq_len", stages[index].seq_len, problem)])
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
        Problem("freeze", None, f"no parameter fits {pattern!r}.", nearest(pattern, names[:3]))
        for pattern, found in fitting.items()
        if not found
    ]
    if len(frozen) == len(names):
        problems.append(Problem("freeze", None, "all parameters are frozen, nothing would be trained."))
    if problems:
        raise ConfigError(problems)
    return frozen


@dataclass(frozen=True, order=True)
class _Shared:
    """What tensor ranks share out of some parameters: so many units of a kind, repeated if there are more ranks than units."""

    name: str
    units: int
    repeated: bool

    def fits(self, ranks: int) -> bool:
        return self.units % ranks == 0 or (self.repeated and ranks % self.units == 0)


def shape_problems(
    config: ModelConfig, parallel: Parallel, vocab_multiple: int, where: str = "parallel"
) -> list[Problem]:
    """Why a layout cannot share this model's heads, matrices and vocabulary, with the numbers.

    Args:
        where: the key that holds the layout.
    """
    tensor = parallel.tensor
    shared = {
        _Shared(
            "the padded vocabulary" if p.split == "vocab" else p.counted, p.shared_units(vocab_multiple), p.repeated
        )
        for p in config.parameters
        if not p.is_whole(1)
    }
    most = min(each.units for each in shared if not each.repeated)
    possible = ", ".join(str(n) for n in range(1, most + 1) if all(each.fits(n) for each in shared))
    return [
        Problem(
            f"{where}.tensor",
            tensor,
            f"{each.name} = {each.units} can neither be divided by it nor repeated to it."
            if each.repeated
            else f"does not divide the model's {each.name} = {each.units}.",
            f"Use {possible}.",
        )
        for each in sorted(shared)
        if not each.fits(tensor)
    ]

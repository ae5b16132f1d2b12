"""config.json of a model of any family: read, and written for an export."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from megacpt.errors import ConfigError
from megacpt.family.base import ModelConfig
from megacpt.family.families import family_of
from megacpt.files import JsonError, read_object


def read_config(path: str | Path) -> ModelConfig:
    """config.json, or the folder that holds it.

    Raises:
        ConfigError: all that is missing, unknown or not trained here, at once.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        raw = read_object(file)
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such file. A Hugging Face directory holds config.json."], "the model") from None
    except (OSError, JsonError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"], "the model") from None
    return parse_config(raw, str(file))


def parse_config(raw: Any, source: str) -> ModelConfig:
    """As `read_config`, from the content.

    Raises:
        ConfigError: as `read_config`.
    """
    if not isinstance(raw, dict):
        raise ConfigError([f"{source}: is a {type(raw).__name__}, not an object."], "the model")
    keys = cast(dict[str, Any], raw)
    config, problems = family_of(keys, source).read(keys)
    if config is None:
        raise ConfigError(problems, source)
    return config


def exported_config(config: ModelConfig, dtype: str, longest: int) -> dict[str, Any]:
    """config.json of an export: what came in, with the rotary embedding, type and length of now.

    Args:
        longest: the longest row that was trained.
    """
    trained = replace(config, max_position_embeddings=max(longest, config.max_position_embeddings))
    raw = config.family.write(trained)
    return raw | dict.fromkeys([key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"], dtype)


def what_matters(config: ModelConfig) -> dict[str, Any]:
    """What of a config.json decides what is computed from given weights, by its names there."""
    ours = {each.name: getattr(config, each.name) for each in fields(config)}
    for name in ("raw", "rope", "initializer_range", "family"):
        del ours[name]
    rope = {"rope_theta": config.rope.theta, "rope_type": config.rope.type, **config.rope.fields}
    return ours | rope | {"model_type": config.model_type, "eos_token_id": config.eos_token_id}

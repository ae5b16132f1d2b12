"""[model]: the base model, its tokenizer, and changes of its rotary embedding."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megacpt.config.base import FilePath, NoneAsWord, Positive, PositiveInt, Section
from megacpt.errors import Problem

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class Rope(Section, heading="rope (in [model] and stages)"):
    """A change of the rotary position embedding. Keys that are left out keep the checkpoint's values."""

    theta: float | None = Field(None, ge=1, le=1e15)
    """Base of the rotary frequencies. A longer context needs a larger base. By default the checkpoint's base is kept."""
    type: Literal["default", "linear", "llama3", "yarn"] | None = None
    """Rule by which the rotary frequencies are scaled; `default` scales nothing. By default the checkpoint's rule is kept."""
    factor: float | None = Field(None, ge=1, le=1e6)
    """Factor by which the rotary scaling lengthens the context. Required by `linear`, `llama3` and `yarn`."""
    original_max_position_embeddings: PositiveInt | None = None
    """Context length in tokens that the rotary scaling starts from. Required by `llama3` and `yarn`."""
    low_freq_factor: Positive | None = None
    """Only with `llama3`: rotary frequencies with a wavelength above `original_max_position_embeddings / low_freq_factor` are divided by
    `factor`."""
    high_freq_factor: Positive | None = None
    """Only with `llama3`: rotary frequencies with a wavelength below `original_max_position_embeddings / high_freq_factor` are kept."""
    attention_factor: Positive | None = None
    """Only with `yarn`: factor on cosine and sine. By default it is 0.1 ln(factor) + 1."""
    beta_fast: Positive | None = None
    """Only with `yarn`: dimensions with more rotations than this over the original length are not interpolated. By default it is 32."""
    beta_slow: Positive | None = None
    """Only with `yarn`: dimensions with fewer rotations than this over the original length are fully interpolated. By default it is 1."""
    rule: Literal["ntk", "ntk2"] | None = None
    """Compute theta for a stage from the checkpoint's theta and length and the stage's `seq_len`: with s = seq_len / length and d =
    head_dim, `ntk` takes theta s^(d / (d - 2)) and `ntk2` twice that. Use it in stages instead of `theta`."""


RopeChoice = Annotated[Rope | None, NoneAsWord("keep")]


class Model(Section, heading="[model]", resume="frozen"):
    """The model that is trained: a Hugging Face directory, or a shape to be trained from scratch."""

    pretrained: FilePath | None = None
    """Hugging Face directory whose weights the run continues from: config.json, safetensors and tokenizer. Give either this, `config` or
    `architecture`."""
    config: FilePath | None = None
    """A config.json that describes a model to be trained from scratch."""
    architecture: str | None = None
    """Name of a known shape to be trained from scratch: llama3.2-1b, llama3.2-3b, llama3-8b, llama3.1-8b, llama3.1-70b, llama3.1-405b,
    qwen2.5-7b, qwen3-0.6b, qwen3-8b, mistral-7b-v0.3 or phi-4."""
    expect: str | None = None
    """Name of the shape that the model in `model.pretrained` must have. With it, `check --no-files` checks the layout without reading
    the model."""
    tokenizer: FilePath | None = None
    """Tokenizer directory. It is required from scratch; by default it is the one of `model.pretrained`."""
    vocab_multiple: PositiveInt = 128
    """Number of rows to a multiple of which the trainer pads the vocabulary. An export never holds the padding. Tensor parallelism must
    divide the padded vocabulary."""
    rope: RopeChoice = None
    """Change of the rotary position embedding for the whole run. `keep` takes it from the checkpoint."""

    @property
    def tokenizer_path(self) -> str:
        """The tokenizer that is given, or the pretrained model's; the rules require one of them."""
        path = self.tokenizer or self.pretrained
        assert path is not None, "a model from scratch has a tokenizer"
        return path


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    model, found = recipe.model, []
    given = [key for key in ("pretrained", "config", "architecture") if getattr(model, key)]
    if len(given) != 1:
        found.append(
            Problem(
                "model",
                None,
                f"{' and '.join(given) if given else 'no model'} given.",
                "Give one of pretrained (a Hugging Face directory), config (a config.json, from scratch) or architecture (a name, from "
                "scratch).",
            )
        )
    if model.pretrained is None and not model.tokenizer:
        text = "a model from scratch needs a tokenizer, so that its export is complete."
        found.append(Problem("model.tokenizer", None, text, "Give a tokenizer directory."))
    if model.rope and model.rope.rule:
        text = "a rule is for the length of a stage."
        found.append(Problem("model.rope.rule", model.rope.rule, text, "Write it as stages.NAME.rope."))
    return found

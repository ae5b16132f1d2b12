"""[data] and [packing]: domains of prepared data, curricula, and how documents become rows."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megacpt.config.base import FilePath, NotNegativeInt, PositiveInt, Section
from megacpt.errors import Problem

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class Curriculum(Section, heading="order (in [data] NAME)"):
    """A curriculum: the documents of a domain in buckets by their perplexity, shuffled inside a bucket."""

    by: Literal["nll"] = "nll"
    """Quantity that orders the documents. `nll` is their mean loss under the model that scored them."""
    scores: list[FilePath] = Field(min_length=1)
    """Score files that `megacpt score` wrote, one for each prepared set in the domain's `paths` and in that order. Globs are sorted by
    number."""
    buckets: int = Field(20, ge=1, le=10000)
    """Number of parts, of about equally many tokens, that are trained one after another."""
    ascending: bool = True
    """Train from easy documents (low loss) to hard ones; `false` is the other way."""
    drop: float = Field(0.0, ge=0, lt=0.5)
    """Share of the documents that is left out at each end of the order: boilerplate with the lowest and garbage with the highest loss."""


class Domain(Section, heading="[data] NAME", resume="frozen"):
    """A domain: prepared data under one name, of which a stage's mixture takes a share."""

    paths: list[FilePath] = Field(min_length=1)
    """Prefixes of the prepared data (PREFIX.bin, .idx and .json). Globs of prefixes are sorted by number."""
    holdout_documents: NotNegativeInt = 0
    """Number of documents that are kept for validation and never trained on."""
    min_tokens: NotNegativeInt | None = None
    """Length in tokens below which a document is left out. By default there is no lower bound."""
    max_tokens: PositiveInt | None = None
    """Length in tokens above which a document is left out. By default there is no upper bound."""
    labels: list[str] = []
    """Labels of the documents that are taken, as `prepare --domain-field` kept them. By default all documents are."""
    order: Curriculum | None = None
    """Train the domain's documents in the order of their perplexity. By default they are shuffled."""


class Packing(Section, heading="[packing]", resume="frozen"):
    """How documents become rows of `seq_len` tokens."""

    method: Literal["best_fit", "concatenate"] = "best_fit"
    """How rows are filled. `best_fit` cuts only documents that are longer than a row; `concatenate` fills every row and cuts wherever a row
    ends. Items are never cut."""
    long_items: Literal["refuse", "drop"] = "refuse"
    """What happens to an item (documents that `prepare --item-field` keeps together) that is longer than a row. `refuse` ends with an
    error; `drop` leaves it out of the training, with a warning that says how many there are."""
    directory: FilePath = "runs/.packing"
    """Directory of the packing indices, which are named by their content and shared between runs."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    return [
        Problem(
            f"data.{name}",
            None,
            f"min_tokens {domain.min_tokens} is above max_tokens {domain.max_tokens}.",
            "Exchange them.",
        )
        for name, domain in recipe.data.items()
        if domain.min_tokens and domain.max_tokens and domain.min_tokens > domain.max_tokens
    ]

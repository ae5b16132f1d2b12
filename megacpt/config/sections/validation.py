"""[[validation]]: losses on held-out documents."""

from typing import TYPE_CHECKING

from pydantic import Field

from megacpt.config.base import Section, Tokens
from megacpt.errors import Problem, nearest

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class Validation(Section, heading="[[validation]]", resume="frozen"):
    """Losses on held-out documents, one for each domain."""

    domains: list[str] = Field(min_length=1)
    """Domains whose held-out documents are validated on, one loss for each."""
    every_tokens: Tokens | None = None
    """Number of tokens between two validations. There is always one before the first and one after the last step, and by default no
    other."""
    max_tokens: Tokens | None = None
    """Upper bound of the tokens that are validated on, for each domain. By default all held-out documents are."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    found = []
    for i, validation in enumerate(recipe.validation):
        if validation.max_tokens == 0:
            found.append(Problem(f"validation.{i}.max_tokens", 0, "nothing would be validated.", "Write at least 1."))
        for domain in validation.domains:
            where = f"validation.{i}.domains"
            if domain not in recipe.data:
                found.append(Problem(where, None, f"no domain {domain!r}.", nearest(domain, list(recipe.data))))
            elif recipe.data[domain].holdout_documents == 0:
                remedy = f"Set data.{domain}.holdout_documents."
                found.append(Problem(where, None, f"{domain} holds out no documents.", remedy))
    return found

"""[mixture]: groups of domains, and weights that follow the validation losses inside a group."""

from typing import TYPE_CHECKING

from pydantic import Field

from megacpt.config.base import Name, NotNegative, Positive, Section, Share, Tokens
from megacpt.errors import Problem, nearest

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class OnlineMixture(Section, heading="online (in [mixture])"):
    """Weights inside a group follow validation perplexity (Llama-3-SynE: f = 1 + alpha * change * topic weight)."""

    every_tokens: Tokens
    """Number of tokens between two adjustments of the mixture."""
    start_tokens: Tokens = 0
    """Number of tokens of a stage before which the mixture is not adjusted. Set it to the end of the warm-up, which raises every loss."""
    alpha: Positive = 2.0
    """How strongly a relative change of a domain's perplexity changes its weight."""
    pull: Share = 0.1
    """Share by which an adjustment pulls the weights back to the stage's own. 0 is the published rule, which has no fixed point."""
    floor: Share = 0.2
    """Lower bound of a domain's adjusted weight, as a part of the stage's own weight."""
    cap: float = Field(4.0, ge=1, le=1e6)
    """Upper bound of a domain's adjusted weight, as a multiple of the stage's own weight."""
    dead_band: NotNegative = 2.0
    """Number of standard errors below which a change of a domain's loss counts as none."""
    topic_weights: dict[str, NotNegative] = {}
    """Factors, by domain, on the change that moves its weight. A domain that is not named has the factor 1."""


class MixtureRules(Section, heading="[mixture]", resume="frozen"):
    """Which domains share a fixed part of the mixture, and whether weights move inside it."""

    groups: dict[Name, list[str]] = {}
    """Groups of domains whose common share of the mixture stays fixed while weights move inside. A domain in no group keeps its share."""
    online: OnlineMixture | None = None
    """Adjust the weights inside the groups while training. By default the mixture is fixed."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    found, group_of, domains = [], {}, list(recipe.data)
    for group, names in recipe.mixture.groups.items():
        where = f"mixture.groups.{group}"
        for name in names:
            if name not in recipe.data:
                found.append(Problem(where, None, f"no domain {name!r}.", nearest(name, domains)))
            elif name in group_of:
                text = f"{name} is in group {group_of[name]} too."
                found.append(Problem(where, None, text, "A domain is in one group."))
            group_of.setdefault(name, group)
    online = recipe.mixture.online
    if online is None:
        return found
    measured = {name for name, domain in recipe.data.items() if domain.holdout_documents}
    if not any(len(names) > 1 and measured.intersection(names) for names in recipe.mixture.groups.values()):
        text = "no group has two domains, one of them with holdout_documents, so nothing would be measured or moved."
        found.append(Problem("mixture.online", None, text, "Group two domains and hold out documents, or remove it."))
    if online.every_tokens == 0:
        found.append(Problem("mixture.online.every_tokens", 0, "the interval is empty.", "Write at least 1."))
    for name in online.topic_weights:
        if name not in recipe.data:
            found.append(Problem("mixture.online.topic_weights", None, f"no domain {name!r}.", nearest(name, domains)))
    return found


def warnings(recipe: "Recipe") -> list[Problem]:
    found = []
    for group, names in recipe.mixture.groups.items() if recipe.mixture.online else ():
        blind = [name for name in names if name in recipe.data and not recipe.data[name].holdout_documents]
        if blind and len(names) > 1:
            text = f"{', '.join(blind)} hold out no documents, so nothing is measured of them: they move only with the others."
            found.append(Problem(f"mixture.groups.{group}", None, text, "Set holdout_documents."))
    return found

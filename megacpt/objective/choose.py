"""The objective that a recipe names."""

from megacpt.config.sections import objective as config
from megacpt.objective.base import Objective
from megacpt.objective.next_token import NextToken


def objective_of(section: config.Objective) -> Objective:
    return {"next_token": NextToken}[section.kind](section.normalize)

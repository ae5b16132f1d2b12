"""All packing indices that a run will ask for, built ahead of it, so that no GPU waits for one."""

from collections.abc import Iterator
from dataclasses import dataclass

from megacpt.config.recipe import Recipe
from megacpt.data.loader import open_domains, selection_of
from megacpt.data.packing import open_index


@dataclass(frozen=True)
class BuiltIndex:
    """What one index holds. Attributes: holdout: of the held-out documents, or of all others."""

    domain: str
    seq_len: int
    holdout: bool
    num_rows: int
    num_pieces: int


def build_indices(recipe: Recipe, workers: int) -> Iterator[BuiltIndex]:
    """Builds each index that is not there yet, for every length of rows that a stage has: of what it trains, and of what is validated.

    Args:
        workers: processes.
    """
    domains = open_domains(recipe, list(recipe.data))
    validated = {name for validation in recipe.validation for name in validation.domains}
    for seq_len in sorted({stage.seq_len for stage in recipe.stages}):
        stages = [stage for stage in recipe.stages if stage.seq_len == seq_len]
        trained = {name for stage in stages for name, weight in stage.mixture.items() if weight > 0}
        for name in recipe.data:
            for holdout in (False, True):
                if name in (validated if holdout else trained):
                    selection = selection_of(recipe, name, seq_len, holdout)
                    index = open_index(domains[name], selection, recipe.packing.directory, workers)
                    yield BuiltIndex(name, seq_len, holdout, index.num_rows, index.num_pieces)

"""What all ranks know alike: do they have the same recipe, data and checkpoint (a rank that read an old copy is named), and what one of
them found."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from megacpt.errors import ConfigError

Value = TypeVar("Value")


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def ask_rank_0(function: Callable[[], Value]) -> Value:
    """What rank 0's call returns, on all ranks; what it raises is raised on all. Collective."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def agree(facts: dict[str, str] | None) -> None:
    """Compares named facts over the ranks that give any. Collective.

    Raises:
        ConfigError: on every rank, naming for each fact the ranks that differ from the majority.
    """
    digests = facts and {name: hashlib.sha256(fact.encode()).hexdigest()[:12] for name, fact in facts.items()}
    everyone = gather(digests)
    problems = disagreements(everyone)
    if problems:
        raise ConfigError(problems, f"what {len(everyone)} ranks were started with")


def disagreements(everyone: Sequence[dict[str, str] | None]) -> list[str]:
    """One line for each fact on which ranks differ. None: of a rank that was not asked."""
    problems = []
    for name in sorted({name for facts in everyone if facts for name in facts}):
        found = {rank: facts.get(name, "nothing") for rank, facts in enumerate(everyone) if facts is not None}
        common = Counter(found.values()).most_common(1)[0][0]
        odd = [rank for rank, digest in found.items() if digest != common]
        if odd:
            shown = ", ".join(f"rank {rank} has {found[rank]}" for rank in odd[:8]) + (" …" if odd[8:] else "")
            problems.append(
                f"{name}: {shown}; the other {len(found) - len(odd)} ranks have {common}. Give every node the same files and flags."
            )
    return problems

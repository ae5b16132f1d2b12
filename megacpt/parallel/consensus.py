"""Before the first step: do all ranks have the same recipe, data and checkpoint? A rank that read an old copy is named."""

import hashlib
from collections import Counter

import torch.distributed as dist

from megacpt.errors import ConfigError


def agree(facts: dict[str, str]) -> None:
    """Compares named facts over all ranks. Collective.

    Raises:
        ConfigError: on every rank, naming for each fact the ranks that differ from the majority.
    """
    digests = {name: hashlib.sha256(fact.encode()).hexdigest()[:12] for name, fact in facts.items()}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, digests)
    problems = disagreements(everyone)
    if problems:
        raise ConfigError(problems, f"what {len(everyone)} ranks were started with")


def disagreements(everyone: list[dict[str, str]]) -> list[str]:
    """One line for each fact on which ranks differ."""
    problems = []
    for name in sorted({name for facts in everyone for name in facts}):
        found = [facts.get(name, "nothing") for facts in everyone]
        common = Counter(found).most_common(1)[0][0]
        odd = [rank for rank, digest in enumerate(found) if digest != common]
        if odd:
            shown = ", ".join(f"rank {rank} has {found[rank]}" for rank in odd[:8]) + (" …" if odd[8:] else "")
            problems.append(
                f"{name}: {shown}; the other {len(found) - len(odd)} ranks have {common}. Give every node the same files and flags."
            )
    return problems

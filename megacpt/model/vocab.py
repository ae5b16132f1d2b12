"""A model for a larger vocabulary: new rows of embedding and head from the old rows of the tokens that spelled them (Ziya2, arXiv
2311.03301, section 3; both matrices where they are untied)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megacpt.data.tokenizer import Tokenizer
from megacpt.data.vocabulary import moved_ids
from megacpt.errors import ConfigError
from megacpt.family.read import read_config
from megacpt.files import write_atomically
from megacpt.model.hf import PretrainedReader, write_pretrained


def grown(rows: Tensor, spellings: Sequence[Sequence[int]], old: Tokenizer, init: str) -> Tensor:
    """The rows with one more for each spelling: the mean of the old rows of its parts ("mean"), or their mean weighted by the length of
    each part's text ("weighted"); the mean of all rows where there is no spelling."""
    wide, out = rows.float(), []
    for ids in spellings:
        if not ids:
            out.append(wide.mean(0))
            continue
        lengths = [max(1, len(old.decode([i]))) for i in ids] if init == "weighted" else [1] * len(ids)
        share = torch.tensor(lengths, dtype=torch.float32) / sum(lengths)
        out.append((wide[ids] * share[:, None]).sum(0))
    return torch.cat([rows, torch.stack(out).to(rows.dtype)]) if out else rows


def expand(model: Path, tokenizer: Path, output: Path, init: str) -> tuple[int, int]:
    """Writes a Hugging Face directory of the model with the new tokenizer. Returns its vocabulary before and after.

    Raises:
        ConfigError: if the new tokenizer does not hold the old one under the same ids.
    """
    config = read_config(model)
    weights = PretrainedReader(model, config)
    old, new = Tokenizer(model), Tokenizer(tokenizer)
    size = max(new.vocab_size, config.vocab_size)
    problems = []
    if new.vocab_size <= old.vocab_size:
        problems.append(f"{tokenizer}: has {new.vocab_size} entries, the model's own {old.vocab_size}: nothing to add.")
    problems += [f"{tokenizer}, beside the model's own: {problem}" for problem in moved_ids(old, new)]
    if problems:
        raise ConfigError(problems, "the tokenizer")
    # rows between the old tokenizer's end and the model's (reserved ones) become real tokens: they are set too
    first = old.vocab_size
    spellings = [old.spell(new, i) if i < new.vocab_size else [] for i in range(first, size)]
    larger = replace(config, vocab_size=size)
    by_token = {p.name for p in config.parameters if p.split == "vocab"}

    def read(name: str) -> Tensor:
        whole = weights.read(name)
        return grown(whole[:first], spellings, old, init) if name in by_token else whole

    dtypes = {name: weights.dtype(name) for name in config.shapes()}
    write_pretrained(output, larger, tokenizer, read, dtypes, config.max_position_embeddings)
    generation = output / "generation_config.json"
    if (model / generation.name).is_file():
        write_atomically(generation, (model / generation.name).read_bytes())
    return config.vocab_size, size

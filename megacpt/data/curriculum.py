"""Documents in the order of their perplexity: buckets of about equal tokens, easy to hard or hard to easy, which packing keeps apart.

Scores are what `megacpt score` writes for each prepared set: FILE.jsonl with a line a document, FILE.json with the hashes of model,
tokenizer and data. numpy is imported where it is needed: `check` reads this file. (Order by perplexity: Decoder-3-SynE; inside a bucket
it stays random.)
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megacpt.data.manifest import read_manifest
from megacpt.errors import DataError
from megacpt.files import JsonError, parse_object, read_object

if TYPE_CHECKING:
    import numpy as np


def facts_of(scores: str) -> dict[str, Any]:
    """FILE.json beside FILE.jsonl."""
    path = Path(scores).with_suffix("")
    try:
        return read_object(f"{path}.json")
    except (OSError, JsonError) as error:
        raise DataError(f"{path}.json: {error}. `megacpt score` writes it beside the scores.") from None


def score_problems(scores: Sequence[str], prefixes: Sequence[str]) -> list[str]:
    """Why scores do not belong to prepared sets: one file for each in order, of the same data and tokenizer."""
    if len(scores) != len(prefixes):
        return [
            f"{len(scores)} files of scores for {len(prefixes)} prepared sets ({', '.join(prefixes[:5])}); one for each, in order."
        ]
    problems = []
    for file, prefix in zip(scores, prefixes, strict=True):
        try:
            facts, manifest = facts_of(file), read_manifest(prefix)
        except DataError as error:
            problems.append(str(error))
            continue
        if facts.get("tokenizer_sha256") != manifest["tokenizer"]["sha256"]:
            problems.append(
                f"{file}: scored with the tokenizer {str(facts.get('tokenizer_sha256'))[:12]}, {prefix} was prepared with "
                f"{manifest['tokenizer']['sha256'][:12]}. Score it again."
            )
        elif facts.get("data_crc32") != manifest["bin"]["crc32"] or facts.get("documents") != manifest["documents"]:
            problems.append(
                f"{file}: {facts.get('documents')} documents with CRC {facts.get('data_crc32')}, {prefix} has {manifest['documents']} with "
                f"{manifest['bin']['crc32']}: it was scored on other data. Score it again."
            )
    return problems


def digest_of(scores: Sequence[str]) -> str:
    """By content of FILE.json, which names model and data."""
    return hashlib.sha256(json.dumps([facts_of(file) for file in scores], sort_keys=True).encode()).hexdigest()[:24]


def read_scores(scores: Sequence[str]) -> "np.ndarray":
    """float64: mean loss of every document over all files, NaN where there is none."""
    import numpy as np

    values: list[float] = []
    for file in scores:
        try:
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines):
                    row = parse_object(line)
                    if row["document"] != number:
                        raise ValueError(f"line {number + 1} is of document {row['document']}")
                    nll = row["nll"]
                    if nll is not None and (type(nll) not in (int, float) or not math.isfinite(nll)):
                        raise ValueError(f"line {number + 1}: nll is {nll!r}, neither null nor a finite number")
                    values.append(float("nan") if nll is None else float(nll))
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{file}: no scores ({error}).") from None
    return np.array(values)


def item_scores(scores: "np.ndarray", lengths: "np.ndarray", first: "np.ndarray") -> "np.ndarray":
    """The mean loss of each item's labels, NaN where it has none.

    Args:
        scores, lengths: of documents. first: the first document of each item.
    """
    import numpy as np

    known = np.isfinite(scores)
    labels = np.where(known, np.maximum(lengths.astype(np.float64) - 1, 0), 0.0)
    count = np.add.reduceat(labels, first)
    total = np.add.reduceat(np.where(known, scores, 0.0) * labels, first)
    means = np.full(len(first), np.nan)
    return np.divide(total, count, out=means, where=count > 0)


def buckets_of(scores: "np.ndarray", lengths: "np.ndarray", buckets: int, ascending: bool, drop: float) -> "np.ndarray":
    """int16: the bucket of every document, -1 for those dropped.

    Args:
        scores: NaN goes to the first bucket. lengths: tokens of each document; buckets have about equally many.
        drop: share of the documents left out at each end.
    """
    import numpy as np

    order = np.argsort(np.nan_to_num(scores, nan=-np.inf), kind="stable")
    cut = int(len(order) * drop)
    kept = order[cut : len(order) - cut] if cut else order
    kept = kept if ascending else kept[::-1]
    middle = np.cumsum(lengths[kept]) - lengths[kept] / 2
    result = np.full(len(scores), -1, np.int16)
    total = max(1.0, float(lengths[kept].sum()))
    result[kept] = np.minimum(buckets - 1, (middle / total * buckets).astype(np.int16))
    return result

"""Perplexity of every document with a model: one JSON object a document, documents as they were prepared.

A document is scored alone, from its first token; one longer than a window is scored window by window, each alone. All labels count alike:
PREFIX.weights is not read.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megacpt.data.indexed import IndexedDataset
from megacpt.data.manifest import read_manifest
from megacpt.errors import DataError, NumbersError
from megacpt.evaluate.sequences import score_sequences
from megacpt.files import new_file, remove_abandoned, write_atomically
from megacpt.log import info
from megacpt.model.decoder import Decoder

Window = tuple[int, int, int]
"""(document, offset, length)."""


def windows_of(lengths: np.ndarray, seq_len: int) -> list[Window]:
    """(document, offset, length) of every window, in order."""
    return [
        (document, offset, min(seq_len, int(length) - offset))
        for document, length in enumerate(lengths)
        for offset in range(0, int(length), seq_len)
    ]


def score(model: Decoder, prefix: str, output: Path, seq_len: int, micro_batch_tokens: int, model_dir: str) -> int:
    """Writes {"document", "tokens", "nll"} lines, nll the mean over the document's labels or null, and FILE.json with
    hashes of model and tokenizer. All ranks call it, rank 0 writes. Returns the number of documents.
    """
    manifest = read_manifest(prefix)
    data = IndexedDataset(prefix)
    windows = windows_of(data.lengths, seq_len)

    def read(number: int) -> tuple[np.ndarray, int]:
        document, offset, length = windows[number]
        piece = data.read(document, offset, length)
        if int(piece.max()) >= model.config.vocab_size:
            raise DataError(
                f"{data.prefix}: document {document} holds token id {int(piece.max())}, but the model has "
                f"{model.config.vocab_size} entries. Prepare it with the model's tokenizer."
            )
        return piece, 1

    by_window = score_sequences(model, [length for _, _, length in windows], read, micro_batch_tokens)
    sums, counts = np.zeros(data.num_documents), np.zeros(data.num_documents)
    for (document, _, _), (loss, _, predicted) in zip(windows, by_window, strict=True):
        sums[document] += loss
        counts[document] += predicted
    if bad := np.flatnonzero(~np.isfinite(sums)).tolist():
        shown = ", ".join(map(str, bad[:10])) + (" …" if len(bad) > 10 else "")
        raise NumbersError(
            f"{output}: not written. The loss of {len(bad)} of {data.num_documents} documents is not finite ({shown}): no order follows "
            f"from it. Score with --dtype float32, or with another model than {model_dir}."
        )
    if dist.get_rank() != 0:
        return data.num_documents
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(output.parent)
    with new_file(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for document in range(data.num_documents):
            nll = float(sums[document] / counts[document]) if counts[document] else None
            file.write(json.dumps({"document": document, "tokens": int(data.lengths[document]), "nll": nll}) + "\n")
    facts = {
        "model": model_dir,
        "model_sha256": model_hash(Path(model_dir)),
        "tokenizer_sha256": manifest["tokenizer"]["sha256"],
        "data": prefix,
        "data_crc32": manifest["bin"]["crc32"],
        "seq_len": seq_len,
        "documents": data.num_documents,
        "tokens": data.num_tokens,
        "mean_nll": float(sums.sum() / max(1, counts.sum())),
    }
    write_atomically(str(output.with_suffix("")) + ".json", json.dumps(facts, indent=1) + "\n")
    alike = "; all labels count alike, whatever they weigh in a loss" if "weights" in manifest else ""
    info(f"scored {data.num_documents} documents, mean loss {facts['mean_nll']:.4f}{alike}")
    return data.num_documents


def model_hash(directory: Path) -> str:
    """SHA-256 over the names and contents of config.json and the safetensors files."""
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 23):
                digest.update(chunk)
    return digest.hexdigest()

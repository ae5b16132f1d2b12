"""Perplexity of every document with a model: one JSON object a document, documents as they were prepared.

A document is scored alone, from its first token; one longer than a window is scored window by window, each alone.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megacpt.config.layout import token_unit
from megacpt.data.indexed import IndexedDataset
from megacpt.data.loader import IGNORE, Batch, deal
from megacpt.data.manifest import read_manifest
from megacpt.errors import DataError
from megacpt.log import info
from megacpt.model.llama import Inputs, Llama
from megacpt.model.run import each_loss

Window = tuple[int, int, int]
"""(document, offset, length)."""


def windows_of(lengths: np.ndarray, seq_len: int) -> list[Window]:
    """(document, offset, length) of every window, in order."""
    return [
        (document, offset, min(seq_len, int(length) - offset))
        for document, length in enumerate(lengths)
        for offset in range(0, int(length), seq_len)
    ]


def groups_of(windows: list[Window], micro_batch_tokens: int) -> list[list[Window]]:
    """Windows in order, as many to a micro-batch as fit."""
    groups: list[list[Window]] = []
    filled = micro_batch_tokens
    for window in windows:
        if filled + window[2] > micro_batch_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(window)
        filled += window[2]
    return groups


def score(model: Llama, prefix: str, output: Path, seq_len: int, micro_batch_tokens: int, model_dir: str) -> int:
    """Writes {"document", "tokens", "nll"} lines, nll the mean over the document's labels or null, and FILE.json with
    hashes of model and tokenizer. All ranks call it, rank 0 writes. Returns the number of documents.
    """
    manifest = read_manifest(prefix)
    data, mesh = IndexedDataset(prefix), model.mesh
    windows = windows_of(data.lengths, seq_len)
    counts = np.zeros(data.num_documents, np.int64)
    for document, _, length in windows:
        counts[document] += length - 1
    groups = groups_of(windows, micro_batch_tokens)
    mine = [groups[i] if i is not None else [] for (i,) in deal(len(groups), mesh.layout.data, 1, mesh.data_rank)]
    total = torch.zeros(data.num_documents, dtype=torch.float64, device=mesh.device)

    def add(i: int, inputs: Inputs, losses: torch.Tensor) -> None:
        owners = np.repeat([window[0] for window in mine[i]], [window[2] for window in mine[i]]).astype(np.int64)
        places = inputs.plan.tokens[inputs.plan.tokens < len(owners)]  # those of this context rank, without filling
        kept = torch.from_numpy(inputs.plan.tokens < len(owners)).to(mesh.device)
        total.index_add_(0, torch.from_numpy(owners[places]).to(mesh.device), losses[kept].double())

    unit = token_unit(mesh.layout.tensor, mesh.layout.context)
    each_loss(model, len(mine), lambda i: _batch(data, mine[i], model.config.vocab_size, unit), add)
    sums = mesh.sum_over_tokens(total).cpu().numpy()
    if dist.get_rank() != 0:
        return data.num_documents
    partial = output.with_name(output.name + ".tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "w", encoding="utf-8") as file:
        for document in range(data.num_documents):
            nll = float(sums[document] / counts[document]) if counts[document] else None
            file.write(json.dumps({"document": document, "tokens": int(data.lengths[document]), "nll": nll}) + "\n")
    os.replace(partial, output)
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
    Path(str(output.with_suffix("")) + ".json").write_text(json.dumps(facts, indent=1) + "\n")
    info(f"scored {data.num_documents} documents, mean loss {facts['mean_nll']:.4f}")
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


def _batch(data: IndexedDataset, group: list[Window], vocab_size: int, unit: int) -> Batch:
    """Windows one behind the other, filled to a multiple of `unit` with a document without labels."""
    total = sum(length for _, _, length in group)
    padded = max(1, -(-total // unit)) * unit
    tokens, labels, positions = (
        np.zeros(padded, np.int64),
        np.full(padded, IGNORE, np.int64),
        np.zeros(padded, np.int64),
    )
    starts, at = [], 0
    for document, offset, length in group:
        piece = data.read(document, offset, length)
        if int(piece.max()) >= vocab_size:
            raise DataError(
                f"{data.prefix}: document {document} holds token id {int(piece.max())}, but the model has "
                f"{vocab_size} entries. Prepare it with the model's tokenizer."
            )
        tokens[at : at + length], labels[at : at + length - 1] = piece, piece[1:]
        positions[at : at + length] = np.arange(length)
        starts.append(at)
        at += length
    if at < padded:
        positions[at:] = np.arange(padded - at)
        starts.append(at)
    return Batch(tokens[None], labels[None], positions[None], np.array(starts), np.array([0, len(starts)]), [""])

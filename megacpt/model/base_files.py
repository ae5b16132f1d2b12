"""What a run takes from its base model besides the weights' values: config.json and the tokenizer, of which the run keeps a copy, and
digests by which another base is recognised. Imports no torch.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megacpt.config.sections.model import Model
from megacpt.data.tokenizer import TOKENIZER_FILES, VOCABULARIES
from megacpt.files import read_object

MODEL_FILES = ("config.json", "generation_config.json")
KEPT_FILES = (*MODEL_FILES, *TOKENIZER_FILES)
NO_IDS = ("generation_config.json", "chat_template.jinja", "chat_template.json")
"""Files that change nothing of what is trained."""
_PIECE = 1 << 24
_SAMPLE, _SAMPLES = 1 << 12, 4


def side_files(model: str | Path | None, tokenizer: str | Path) -> dict[str, Path]:
    """The small files that belong to a model, by the name that a copy gets: its configurations, and those of its tokenizer and of no other.

    Args:
        model: a folder, or None. tokenizer: a folder, or the file in one that was chosen.
    """
    tokenizer, chosen, found = Path(tokenizer), TOKENIZER_FILES, {}
    if tokenizer.is_file():  # of any name
        found[f"tokenizer{tokenizer.suffix}"] = tokenizer
        tokenizer, chosen = tokenizer.parent, tuple(name for name in TOKENIZER_FILES if name not in VOCABULARIES)
    for source, names in ((Path(model) if model else tokenizer, MODEL_FILES), (tokenizer, chosen)):
        found |= {name: source / name for name in names if (source / name).is_file()}
    return found


def digests(files: dict[str, Path]) -> dict[str, str]:
    """SHA-256 of each."""
    return {name: _sha256(path) for name, path in sorted(files.items())}


def weight_files(model: Model) -> list[Path]:
    """The safetensors files of the base in order; none for a model from scratch."""
    if not model.pretrained:
        return []
    folder = Path(model.pretrained)
    try:
        index = read_object(folder / "model.safetensors.index.json", 1 << 28)
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = ["model.safetensors"]
    return [folder / name for name in names if isinstance(name, str) and (folder / name).is_file()]


def share_of_digests(files: list[Path], rank: int, ranks: int) -> dict[str, str]:
    """SHA-256 of every `ranks`-th file from `rank` on: together the ranks read each byte once."""
    return {path.name: _sha256(path) for path in files[rank::ranks]}


def sampled_digest(files: Iterable[Path]) -> str:
    """Of sizes and of a few places of each file: cheap enough for every node, and another model's differs in it."""
    whole = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        whole.update(f"{path.name} {size};".encode())
        with open(path, "rb") as file:
            for part in range(_SAMPLES):
                file.seek(part * max(0, size - _SAMPLE) // max(1, _SAMPLES - 1))
                whole.update(file.read(_SAMPLE))
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            whole.update(piece)
    return whole.hexdigest()

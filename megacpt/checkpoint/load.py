"""Loading: any layout from any layout, through a metadata reader that builds only the classes it knows.

Distributed Checkpoint's .metadata is a pickle; torch reads it with pickle.load, which runs what it says. Here only the
classes that it needs are found, and file names that leave the folder are refused.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megacpt.errors import CheckpointError

_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(f"its metadata names {module}.{name}, which no checkpoint needs: it may be forged.")


class SafeReader(dcp.FileSystemReader):
    """Distributed Checkpoint's reader without pickle's powers."""

    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from None
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(f"{path}: names the file {info.relative_path!r} outside its folder.")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load(directory: Path, tensors: dict[str, Any], alone: bool = False) -> None:
    """Fills tensors (DTensors of any layout, or plain) in place.

    Args:
        alone: this process reads by itself, outside any process group's collectives.
    Raises:
        CheckpointError: if a tensor is missing or has another size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=SafeReader(directory), no_dist=alone)
    except dcp.api.CheckpointException as error:
        causes = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise CheckpointError(f"{directory}: {causes}") from None
    except (RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory}: {error}") from None


class StoredModel:
    """Whole tensors of a checkpoint, one at a time, in one process, whatever layout wrote it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.metadata = SafeReader(directory).read_metadata().state_dict_metadata

    def read(self, name: str) -> Tensor:
        """A weight by its Hugging Face name."""
        return self.tensor(f"model.{name}")

    def tensor(self, name: str) -> Tensor:
        """Anything stored, by its name in the checkpoint: model.NAME, optim.exp_avg.NAME, optim.exp_avg_sq.NAME."""
        entry = self.metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory}: holds no tensor {name.removeprefix('model.')}.")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        load(self.directory, {name: tensor}, alone=True)
        return tensor

"""Loading: any layout from any layout, through a metadata reader that builds only the classes it knows.

Distributed Checkpoint's .metadata is a pickle; torch reads it with pickle.load, which runs what it says. Here only the
classes that it needs are found, and file names that leave the folder are refused.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megacpt.checkpoint.manifest import read_item, read_manifest
from megacpt.errors import CheckpointError
from megacpt.parallel.mesh import object_group

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
    """Distributed Checkpoint's reader without pickle's powers, which compares the checksum of each item that it reads."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.sums = {
            (name, offset): (size, crc)
            for name, rows in read_manifest(directory).items.items()
            for offset, size, crc in rows
        }
        self.metadata = None

    def _slice_file(self, file, sinfo) -> io.BytesIO:
        path = Path(self.path) / sinfo.relative_path
        size, crc = self.sums.get((sinfo.relative_path, sinfo.offset), (-1, 0))
        if size != sinfo.length:
            raise CheckpointError(
                f"{path}: its metadata names {sinfo.length:,} bytes at {sinfo.offset:,}, which its manifest does not list."
            )
        return io.BytesIO(read_item(file, path, sinfo.offset, size, crc))

    def read_metadata(self, *args, **kwargs):
        if self.metadata is None:
            self.metadata = self._read_metadata()
        return self.metadata

    def _read_metadata(self):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
            self._check(metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a damaged pickle can raise anything, and hold anything
            raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from None
        metadata.storage_meta = dcp.metadata.StorageMeta(load_id=self.load_id)
        return metadata

    def _check(self, metadata: Any) -> None:
        """It is what it says, and names only files that the manifest lists."""
        kinds = dcp.metadata.TensorStorageMetadata, dcp.metadata.BytesStorageMetadata
        if not isinstance(metadata, dcp.metadata.Metadata) or not all(
            isinstance(name, str) and isinstance(entry, kinds) for name, entry in metadata.state_dict_metadata.items()
        ):
            raise CheckpointError(f"is not the metadata of a checkpoint, but {type(metadata).__name__}.")
        known = {name for name, _ in self.sums}
        for info in metadata.storage_data.values():
            if info.relative_path not in known or (Path(self.path) / info.relative_path).is_symlink():
                raise CheckpointError(
                    f"names the file {info.relative_path!r} outside its folder, or not in its manifest."
                )


def load(directory: Path, tensors: dict[str, Any], reader: SafeReader | None = None) -> None:
    """Fills tensors (DTensors of any layout, or plain) in place. All ranks call it; an error of one is raised on all.

    Args:
        reader: given, this process reads by itself, outside any process group's collectives.
    Raises:
        CheckpointError: if a tensor is missing, is damaged or has another size.
    """
    alone, reader = reader is not None, reader or SafeReader(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = object_group() if dist.is_initialized() and not alone else None
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=alone)
    except dcp.api.CheckpointException as error:  # the same on all ranks
        causes = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise CheckpointError(f"{directory}: {causes}") from None
    except CheckpointError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and not alone:  # a rank is gone: that says nothing of the checkpoint
            raise
        raise CheckpointError(f"{directory}: cannot be read ({type(error).__name__}: {error}).") from None


class StoredModel:
    """Whole tensors of a checkpoint, one at a time, in one process, whatever layout wrote it."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.reader = SafeReader(directory)
        self.metadata = self.reader.read_metadata().state_dict_metadata

    def read(self, name: str) -> Tensor:
        """A weight by its Hugging Face name."""
        return self.tensor(f"model.{name}")

    def tensor(self, name: str) -> Tensor:
        """Anything stored, by its name in the checkpoint: model.NAME, optim.exp_avg.NAME, optim.exp_avg_sq.NAME."""
        entry = self.metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{self.directory}: holds no tensor {name.removeprefix('model.')}.")
        try:
            tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        except Exception as error:  # forged: a size or a type that is none
            raise CheckpointError(
                f"{self.directory}: {name} cannot be read ({type(error).__name__}: {error})."
            ) from None
        load(self.directory, {name: tensor}, self.reader)
        return tensor

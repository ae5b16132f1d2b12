"""Loading: any layout from any layout, through a metadata reader that builds only the classes it knows.

Distributed Checkpoint's .metadata is a pickle; torch reads it with pickle.load, which runs what it says. Here only the
classes that it needs are found, and file names that leave the folder are refused.
"""

import io
import pickle
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megacpt.checkpoint.manifest import read_item, read_manifest
from megacpt.checkpoint.save import tensors_of
from megacpt.errors import CheckpointError
from megacpt.optim.adamw import AdamW
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


class _Planner(DefaultLoadPlanner):
    """Leaves as they are the tensors of some names that a checkpoint does not hold. What else is missing is an error, on all ranks."""

    def __init__(self, optional: Collection[str]):
        super().__init__(allow_partial_load=True)
        self.optional = optional

    def create_local_plan(self):
        assert self.metadata is not None, "set_up_planner has set it"
        missing = self.state_dict.keys() - self.metadata.state_dict_metadata.keys() - set(self.optional)
        if missing:
            raise CheckpointError(
                f"holds no tensor {min(missing)}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
            )
        return super().create_local_plan()


def load_training(directory: Path, optimizer: AdamW, num_updates: int, missed: Mapping[str, int]) -> None:
    """Weights, moments and counts, for any layout and whatever is trained from now on: a parameter that no update has reached may have no
    moments in the checkpoint, and begins with zeros. Arguments and errors as of `load` and `AdamW.restore`."""
    optimizer.restore(num_updates, missed)
    untouched = [name for name in optimizer.exp_avg if not optimizer.count_of(name)]
    optional = [f"optim.{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in untouched]
    load(directory, tensors_of(optimizer.parameters, optimizer), optional=optional)


def stored_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """The type in which a checkpoint holds each weight, by name. In one process.

    Raises:
        CheckpointError: if its metadata cannot be read.
    """
    entries = SafeReader(directory).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): entry.properties.dtype
        for name, entry in entries.items()
        if name.startswith("model.")
    }


def load(
    directory: Path, tensors: dict[str, Any], reader: SafeReader | None = None, optional: Collection[str] = ()
) -> None:
    """Fills tensors (DTensors of any layout, or plain) in place. All ranks call it; an error of one is raised on all.

    Args:
        reader: given, this process reads by itself, outside any process group's collectives.
        optional: names of tensors that the checkpoint need not hold; they are then left as they are.
    Raises:
        CheckpointError: if a tensor is missing, is damaged or has another size.
    """
    alone, reader = reader is not None, reader or SafeReader(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            group = object_group() if dist.is_initialized() and not alone else None
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=alone, planner=_Planner(optional))
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

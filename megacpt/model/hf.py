"""Hugging Face directories in and out: safetensors, streamed. No pickle is ever read.

Import reads from each file just the part that this rank holds. Export writes shard by shard into a folder of its own
and renames it. Names are the model's own, so neither renames nor permutes; rows of several parameters may lie in one tensor of a file.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megacpt.data.pieces import config_of_model
from megacpt.data.tokenizer import TOKENIZER_FILES
from megacpt.errors import CheckpointError, NumbersError
from megacpt.family.base import ModelConfig, Parameter, Stored
from megacpt.family.read import exported_config
from megacpt.files import new_folder, read_object, write_atomically
from megacpt.model.base_files import KEPT_FILES, side_files
from megacpt.parallel.finite import not_finite
from megacpt.parallel.sharded import global_offset, local_part

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
MAX_SHARD_BYTES = 5 * 10**9


class SafetensorsReader:
    """The tensors of a Hugging Face directory. One file is open at a time, so that what was read can leave memory.

    Raises:
        CheckpointError: if there is no safetensors file, an index that leaves the folder, or a damaged file.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._open: tuple[str, Any] | None = None
        self.file_of = self._find()

    def _find(self) -> dict[str, str]:
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if index.is_file():
            try:
                mapping = read_object(index, 1 << 28)["weight_map"]
                if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
                    raise TypeError("its weight_map is no object of file names")
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise CheckpointError(f"{index}: not an index of safetensors ({error}).") from None
            for file in set(mapping.values()):
                if Path(file).name != file or file in ("", ".", ".."):
                    raise CheckpointError(f"{index}: names {file!r}, which is not a file of its own folder.")
                if not (self.directory / file).is_file():
                    raise CheckpointError(
                        f"{self.directory / file}: is missing, but {index.name} names it. Download it again."
                    )
            return mapping
        if single.is_file():
            return dict.fromkeys(self._handle(single.name).keys(), single.name)
        pickled = sorted(p.name for p in self.directory.glob("*.bin")) + sorted(
            p.name for p in self.directory.glob("*.pt*")
        )
        if pickled:
            raise CheckpointError(
                f"{self.directory}: holds {pickled[0]}, a pickle, which can run code when it is read. Convert it where you "
                "trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)."
            )
        raise CheckpointError(f"{self.directory}: holds no model.safetensors and no model.safetensors.index.json.")

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None
            try:
                self._open = (file, safe_open(self.directory / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.directory / file}: damaged ({error}). Download it again.") from None
        return self._open[1]

    def _slice(self, name: str):
        file = self.file_of[name]
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.directory / file}: does not hold {name!r}, which the index places there ({error}). Download both again."
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        known = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
        stored = self._slice(name).get_dtype()
        if stored not in known:
            raise CheckpointError(f"{self.directory}: {name} is stored as {stored}; read are {', '.join(known)}.")
        return known[stored]

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        return self._slice(name)[box]


class PretrainedReader:
    """A Hugging Face directory as the parameters of a model, whatever its file holds together.

    Raises:
        CheckpointError: with every tensor that is missing, of another shape, or would be lost.
    """

    def __init__(self, directory: str | Path, config: ModelConfig):
        self.file = SafetensorsReader(directory)
        self.stored_in = {part.name: stored for stored in config.stored for part in stored.parts}
        if problems := [*self._wrong_tensors(config), *self._unknown_tensors(config)]:
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(f"{self.file.directory}:\n  " + "\n  ".join(problems[:20]) + more)

    def dtype(self, name: str) -> str:
        return self.file.dtype(self.stored_in[name].name)

    def source(self, name: str) -> str:
        """The file that holds a parameter."""
        return self.file.file_of[self.stored_in[name].name]

    def read(self, name: str, box: tuple[slice, ...] = (slice(None),)) -> Tensor:
        """A parameter, or a part of it."""
        stored = self.stored_in[name]
        rows = stored.rows(name)[box[0]]
        return self.file.read(stored.name, (slice(rows.start, rows.stop), *box[1:]))

    def _wrong_tensors(self, config: ModelConfig) -> Iterator[str]:
        for stored in config.stored:
            if stored.name not in self.file.file_of:
                yield f"{stored.name} {list(stored.shape)} is missing"
            elif self.file.shape(stored.name) != stored.shape:
                yield f"{stored.name} is {list(self.file.shape(stored.name))}, config.json asks for {list(stored.shape)}"

    def _unknown_tensors(self, config: ModelConfig) -> Iterator[str]:
        known, family = {stored.name for stored in config.stored}, config.family
        for name in self.file.file_of:
            if name in known or name.endswith(family.derived):
                continue
            if name != family.head:
                yield f"{name} {list(self.file.shape(name))} is no part of this model"
            elif not _same(self.file, name, config.embedding):
                yield (
                    f"{name} is not {config.embedding}, but config.json says that they are tied. To train the head as it is (as "
                    'transformers does), write "tie_word_embeddings": false into config.json; to drop it, remove it from the file'
                )


def _same(file: SafetensorsReader, one: str, other: str, rows: int = 16384) -> bool:
    """Whether two tensors hold the same values, some rows at a time."""
    if other not in file.file_of or file.shape(one) != file.shape(other):
        return False
    parts = (slice(begin, begin + rows) for begin in range(0, file.shape(one)[0], rows))
    return all(torch.equal(file.read(one, (part,)), file.read(other, (part,))) for part in parts)


@torch.no_grad()
def load_pretrained(model: nn.Module, config: ModelConfig, directory: str | Path) -> dict[str, str]:
    """Fills the local shards of `model` from a Hugging Face directory. Padding rows of the vocabulary become zero. Collective.

    Returns:
        The stored type of each parameter, for an export that gives it back.
    Raises:
        CheckpointError: if names, shapes or types are not the model's, or, on all ranks, if a value is not finite.
    """
    reader = PretrainedReader(directory, config)
    true_shapes = config.shapes()
    for name, parameter in model.named_parameters():
        fill_shard(parameter, true_shapes[name], lambda box, name=name: reader.read(name, box))
    if names := not_finite(dict(model.named_parameters())):
        raise CheckpointError(_told_of_values(reader, names, next(model.parameters()).dtype))
    return {name: reader.dtype(name) for name in true_shapes}


def pretrained_dtypes(config: ModelConfig, directory: str | Path) -> dict[str, str]:
    """The type of each tensor of a Hugging Face directory, for an export that gives it back.

    Raises:
        CheckpointError: if names or shapes are not the model's.
    """
    reader = PretrainedReader(directory, config)
    return {name: reader.dtype(name) for name in config.shapes()}


def _told_of_values(reader: PretrainedReader, names: list[str], dtype: torch.dtype) -> str:
    """File, tensor and how many of its values are not finite, counted by rank 0. Collective."""
    lines: list[str] = []
    if dist.get_rank() == 0:
        for name in names[:20]:
            bad = int((~reader.read(name).to(dtype).isfinite()).sum())
            lines.append(f"{reader.source(name)}: {name} holds {bad:,} values that are not finite in {dtype}")
    told = ["\n  ".join(lines)]
    dist.broadcast_object_list(told, src=0)
    more = f"\n  … and {len(names) - 20} more tensors" if len(names) > 20 else ""
    return (
        f"{reader.file.directory}: nothing can be trained from inf or nan:\n  {told[0]}{more}\n"
        "Download it again, or take an earlier checkpoint of that model."
    )


def fill_shard(parameter: Tensor, true_shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Copies this rank's part of a tensor of `true_shape`; what lies beyond it (vocabulary padding) becomes zero."""
    local, offset = local_part(parameter), global_offset(parameter)
    sizes = [max(0, min(size, true - at)) for size, true, at in zip(local.shape, true_shape, offset, strict=True)]
    local.zero_()
    if all(sizes):
        source = read(tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True)))
        local[tuple(slice(0, size) for size in sizes)].copy_(source)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Weights from scratch, as the family's table says: normal with the config's range, products that end a residual branch divided by
    sqrt(2 layers) (Radford et al. 2019), norms one, biases zero."""
    held = dict(model.named_parameters())
    for each in config.parameters:
        if each.name in held:
            full = _initial(each, config, seed)
            fill_shard(held[each.name], each.shape, lambda box, full=full: full[box])


def _initial(parameter: Parameter, config: ModelConfig, seed: int) -> Tensor:
    """Each tensor has a generator of its own: the same numbers on every layout."""
    if parameter.init in ("ones", "zeros"):
        return torch.full(parameter.shape, float(parameter.init == "ones"))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{parameter.name}".encode()))
    std = config.initializer_range / ((2 * config.num_hidden_layers) ** 0.5 if parameter.init == "residual" else 1)
    return torch.randn(parameter.shape, generator=generator) * std


def copy_side_files(model: str | Path | None, tokenizer: str | Path, target: Path) -> None:
    """The model's config.json and generation config, and the tokenizer with all of its files and nothing of another: whoever reads the
    folder later must find the one that was trained with.

    Args:
        model: a folder, or None. tokenizer: a folder, or the file in one that was chosen.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT_FILES:
        (target / name).unlink(missing_ok=True)
    for name, source in side_files(model, tokenizer).items():
        shutil.copyfile(source, target / name)
    have = {name for name in TOKENIZER_FILES if (target / name).is_file()}
    if "tokenizer.model" in have and not have & {"tokenizer.json", "tokenizer_config.json"}:
        _write_json(target / "tokenizer_config.json", config_of_model(target / "tokenizer.model"))


def write_pretrained(
    output: str | Path,
    config: ModelConfig,
    side: Path,
    read: Callable[[str], Tensor],
    dtypes: dict[str, str],
    longest: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokens: dict[str, int] | None = None,
) -> None:
    """Writes a complete Hugging Face directory; peak memory is one shard. Nothing is left of one that fails.

    Args:
        side: folder with generation config and tokenizer files.
        read: gives a whole parameter by name, with its true shape.
        dtypes: type of each parameter by name.
        longest: the longest row that was trained.
        tokens: eos_token_id and bos_token_id of a tokenizer that is not the model's own; both configurations will say them.
    Raises:
        CheckpointError: if `output` exists.
        NumbersError: if a value is not finite in the type that it is written in. Nothing is left under `output`.
    """
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output}: exists. Give another --output or remove it.")
    with new_folder(output) as partial:
        _write_into(partial, config, side, read, dtypes, longest, max_shard_bytes, tokens or {})


def _write_into(
    partial: Path,
    config: ModelConfig,
    side: Path,
    read: Callable[[str], Tensor],
    dtypes: dict[str, str],
    longest: int,
    max_shard_bytes: int,
    tokens: dict[str, int],
) -> None:
    copy_side_files(side, side, partial)
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    own = exported_config(config, common, longest)
    _write_json(partial / "config.json", own | _changed_ids(own, tokens))
    generation = partial / "generation_config.json"
    if not generation.exists():
        ids = {k: config.raw[k] for k in ("bos_token_id", "eos_token_id") if config.raw.get(k) is not None}
        _write_json(generation, {"_from_model_config": True, **ids, **tokens})
    elif tokens:
        own = read_object(generation)
        _write_json(generation, own | _changed_ids(own, tokens))
    shards = _plan_shards(config, dtypes, max_shard_bytes)
    weight_map, total, problems = {}, 0, []
    for i, chosen in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for stored in chosen:
            rows = []
            for part in stored.parts:
                whole = read(part.name)
                rows.append(whole.to(DTYPES[dtypes[part.name]]).contiguous())
                problems += _not_written(part.name, whole, rows[-1])
            tensors[stored.name] = torch.cat(rows) if len(rows) > 1 else rows[0]
        if problems:  # all of them are told; nothing is written any more
            continue
        try:
            save_file(tensors, partial / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(
                f"{partial / file}: could not be written: {error}. Make room and try again."
            ) from None
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if problems:
        more = f"\n  … and {len(problems) - 20} more tensors" if len(problems) > 20 else ""
        raise NumbersError("the model was not written:\n  " + "\n  ".join(problems[:20]) + more)
    if len(shards) > 1:
        _write_json(
            partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _not_written(name: str, whole: Tensor, cast: Tensor) -> list[str]:
    """Why a tensor cannot be given out: values that are not finite, or not in its new type."""
    if cast.numel() == 0 or torch.stack(cast.aminmax()).isfinite().all():
        return []
    bad, before = (int((~x.isfinite()).sum()) for x in (cast, whole))
    if before:
        return [f"{name}: {before:,} values are not finite. Export an earlier step (megacpt checkpoint list)."]
    most = f"{torch.finfo(cast.dtype).max:g}"
    return [f"{name}: {bad:,} values are above {most}, the most that {cast.dtype} holds. Write it as --dtype bfloat16."]


def _changed_ids(own: dict, tokens: dict[str, int]) -> dict[str, int]:
    """Those of the tokens that a configuration does not name, alone or in a list."""
    named = {key: own.get(key) for key in tokens}
    return {key: i for key, i in tokens.items() if i not in (ids if isinstance(ids := named[key], list) else [ids])}


def _plan_shards(config: ModelConfig, dtypes: dict[str, str], max_bytes: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    filled = 0
    for stored in config.stored:
        size = sum(part.size * DTYPES[dtypes[part.name]].itemsize for part in stored.parts)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(stored)
        filled += size
    return shards


def _write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

"""Hugging Face directories in and out: safetensors, streamed. No pickle is ever read.

Import reads from each file just the part that this rank holds. Export writes shard by shard into a folder of its own
and renames it. Names are the model's own, so neither renames nor permutes.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megacpt.data.tokenizer import TOKENIZER_FILES
from megacpt.errors import CheckpointError
from megacpt.family.base import ModelConfig as LlamaConfig
from megacpt.family.base import Parameter
from megacpt.model.config import export_config

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
SIDE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
MAX_SHARD_BYTES = 5 * 10**9


class Weights:
    """The tensors of a Hugging Face directory. One file is open at a time, so that what was read can leave memory.

    Raises:
        CheckpointError: if there is no safetensors file, an index that leaves the folder, or a damaged file.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._open: tuple[str, object] | None = None
        self.file_of = self._find()

    def _find(self) -> dict[str, str]:
        index, single = self.directory / "model.safetensors.index.json", self.directory / "model.safetensors"
        if index.is_file():
            try:
                mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
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

    def _handle(self, file: str):
        if self._open is None or self._open[0] != file:
            self._open = None
            try:
                self._open = (file, safe_open(self.directory / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.directory / file}: damaged ({error}). Download it again.") from None
        return self._open[1]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(self.file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        known = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
        stored = self._handle(self.file_of[name]).get_slice(name).get_dtype()
        if stored not in known:
            raise CheckpointError(f"{self.directory}: {name} is stored as {stored}; read are {', '.join(known)}.")
        return known[stored]

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        return self._handle(self.file_of[name]).get_slice(name)[box]


def check_names(weights: Weights, config: LlamaConfig) -> None:
    """All of the model's tensors are there with their shapes, and nothing that would be lost.

    Raises:
        CheckpointError: with every difference.
    """
    expected, problems = config.shapes(), []
    for name, shape in expected.items():
        if name not in weights.file_of:
            problems.append(f"{name} {list(shape)} is missing")
        elif weights.shape(name) != shape:
            problems.append(f"{name} is {list(weights.shape(name))}, config.json asks for {list(shape)}")
    for name in weights.file_of:
        ignorable = name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
        if name not in expected and not ignorable:
            problems.append(f"{name} {list(weights.shape(name))} is no part of this model")
    if problems:
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{weights.directory}:\n  " + "\n  ".join(problems[:20]) + more)


@torch.no_grad()
def load_pretrained(model: nn.Module, config: LlamaConfig, directory: str | Path) -> dict[str, str]:
    """Fills the local shards of `model` from a Hugging Face directory. Padding rows of the vocabulary become zero.

    Returns:
        The stored type of each tensor, for an export that gives it back.
    """
    weights = Weights(directory)
    check_names(weights, config)
    true_shapes = config.shapes()
    for name, parameter in model.named_parameters():
        fill_shard(parameter, true_shapes[name], lambda box, name=name: weights.read(name, box))
    return {name: weights.dtype(name) for name in true_shapes}


def fill_shard(parameter: Tensor, true_shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Copies this rank's part of a tensor of `true_shape`; what lies beyond it (vocabulary padding) becomes zero."""
    local = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
    offset: tuple[int, ...] = (0,) * local.ndim
    if isinstance(parameter, DTensor):
        _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    sizes = [max(0, min(size, true - at)) for size, true, at in zip(local.shape, true_shape, offset, strict=True)]
    local.zero_()
    if all(sizes):
        source = read(tuple(slice(at, at + size) for at, size in zip(offset, sizes, strict=True)))
        local[tuple(slice(0, size) for size in sizes)].copy_(source)


@torch.no_grad()
def initialize(model: nn.Module, config: LlamaConfig, seed: int) -> None:
    """Weights from scratch, as the family's table says: normal with the config's range, products that end a residual branch divided by
    sqrt(2 layers) (Radford et al. 2019), norms one, biases zero."""
    held = dict(model.named_parameters())
    for each in config.parameters:
        if each.name in held:
            full = _initial(each, config, seed)
            fill_shard(held[each.name], each.shape, lambda box, full=full: full[box])


def _initial(parameter: Parameter, config: LlamaConfig, seed: int) -> Tensor:
    """Each tensor has a generator of its own: the same numbers on every layout."""
    if parameter.init in ("ones", "zeros"):
        return torch.full(parameter.shape, float(parameter.init == "ones"))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{parameter.name}".encode()))
    std = config.initializer_range / ((2 * config.num_hidden_layers) ** 0.5 if parameter.init == "residual" else 1)
    return torch.randn(parameter.shape, generator=generator) * std


def copy_side_files(source: str | Path, target: Path) -> None:
    """config.json, generation config and tokenizer files, what there is of them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)


def write_pretrained(
    output: str | Path,
    config: LlamaConfig,
    side_files: Path,
    read: Callable[[str], Tensor],
    dtypes: dict[str, str],
    longest: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a complete Hugging Face directory; peak memory is one shard.

    Args:
        side_files: folder with generation config and tokenizer files.
        read: gives a whole tensor by name, with its true shape.
        dtypes: type of each tensor by name.
        longest: the longest row that was trained.
    Raises:
        CheckpointError: if `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output}: exists. Give another --output or remove it.")
    partial = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_side_files(side_files, partial)
    common = max(set(dtypes.values()), key=list(dtypes.values()).count)
    _write_json(partial / "config.json", export_config(config, common, longest))
    if not (partial / "generation_config.json").exists():
        ids = {k: config.raw[k] for k in ("bos_token_id", "eos_token_id") if config.raw.get(k) is not None}
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
    shards = _plan_shards(config, dtypes, max_shard_bytes)
    weight_map, total = {}, 0
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: read(name).to(DTYPES[dtypes[name]]).contiguous() for name in names}
        save_file(tensors, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        _write_json(
            partial / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    os.rename(partial, output)


def _plan_shards(config: LlamaConfig, dtypes: dict[str, str], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in config.shapes().items():
        size = torch.Size(shape).numel() * DTYPES[dtypes[name]].itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

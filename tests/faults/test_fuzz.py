"""Promise 8: whatever stands in a file, reading it ends in an error of ours or in something sound; never a crash, never garbage."""

import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megacpt.checkpoint import manifest
from megacpt.checkpoint.load import SafeReader, StoredModel
from megacpt.checkpoint.manifest import RunState, latest_intact_checkpoint, read_manifest
from megacpt.checkpoint.save import save
from megacpt.config.decisions import Baseline, Decisions
from megacpt.config.load import load_recipe
from megacpt.data.indexed import IndexedDataset
from megacpt.data.manifest import read_manifest as read_data_manifest
from megacpt.errors import CheckpointError, ConfigError, DataError, MegacptError
from megacpt.model.hf import SafetensorsReader

EXAMPLES = 2000 if os.environ.get("MEGACPT_TEST_FULL") else 150
fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "copy", "zero", "ones"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=6,
)


def edited(raw: bytes, changes) -> bytes:
    """The file with some places changed, cut out, doubled or put in."""
    out = bytearray(raw)
    for kind, where, more in changes:
        at = min(len(out), int(where * (len(out) + 1)))
        if kind == "flip" and at < len(out):
            out[at] ^= more[0] or 1
        elif kind == "cut":
            del out[at : at + len(more) if len(more) < 8 else len(out)]
        elif kind == "insert":
            out[at:at] = more
        elif kind == "copy":
            out[at:at] = out[max(0, at - 16 * len(more)) : at]
        else:
            out[at : at + len(more)] = (b"\0" if kind == "zero" else b"\xff") * len(out[at : at + len(more)])
    return bytes(out)


@pytest.fixture
def data(prepared, tmp_path):
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    return tmp_path / "a"


@given(changes=edits)
@fuzzed
def test_index_files(data, changes):
    """An index that is accepted describes its .bin exactly: every document lies inside it, one behind the other."""
    path = data.with_suffix(".idx")
    raw = path.read_bytes()
    try:
        path.write_bytes(edited(raw, changes))
        dataset = IndexedDataset(data)
        assert (dataset.lengths >= 0).all() and int(dataset.lengths.sum()) == dataset.num_tokens
        assert dataset.num_tokens * dataset.dtype.itemsize == data.with_suffix(".bin").stat().st_size
        for document in range(0, dataset.num_documents, 37):
            assert len(dataset.read(document, 0, int(dataset.lengths[document]))) == dataset.lengths[document]
    except DataError:
        pass
    finally:
        path.write_bytes(raw)


@given(
    sequences=st.integers(0, 2**63),
    boundaries=st.integers(0, 2**63),
    code=st.integers(0, 255),
    version=st.integers(0, 2**63),
)
@fuzzed
def test_index_headers(data, sequences, boundaries, code, version):
    """Counts that no memory holds."""
    path = data.with_suffix(".idx")
    raw = path.read_bytes()
    try:
        path.write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, code, sequences, boundaries) + raw[34:])
        with pytest.raises(DataError):
            IndexedDataset(data)
    finally:
        path.write_bytes(raw)


@given(changes=edits)
@fuzzed
def test_manifests_of_data(data, changes):
    path = data.with_suffix(".json")
    raw = path.read_bytes()
    try:
        path.write_bytes(edited(raw, changes))
        found = read_data_manifest(str(data))
        assert found["bin"]["bytes"] == data.with_suffix(".bin").stat().st_size
        assert all(isinstance(found[key], int) for key in ("documents", "tokens", "vocab_size"))
    except DataError:
        pass
    finally:
        path.write_bytes(raw)


@pytest.fixture(scope="module")
def checkpoint(mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    weights = {"a.weight": torch.arange(15.0).view(5, 3), "b.weight": torch.ones(7)}
    save(
        folder,
        {"model": weights},
        RunState(1, 10, 1, "s", Decisions((Baseline(losses={}, accuracies={}),)), {"a": "x"}),
        {},
    )
    return folder / "step-00000001"


@given(changes=edits)
@fuzzed
def test_manifests_of_checkpoints(checkpoint, changes):
    """One that is accepted says what was written: its own checksum sees to that."""
    path = checkpoint / "manifest.json"
    raw, before = path.read_bytes(), read_manifest(checkpoint)
    try:
        path.write_bytes(edited(raw, changes))
        assert read_manifest(checkpoint) == before
    except CheckpointError:
        pass
    finally:
        path.write_bytes(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(["format", "state", "files", "items", "facts"]), value=json_values)
@fuzzed
def test_manifests_that_are_signed_but_wrong(checkpoint, key, value):
    """Forged with a checksum that agrees: the kinds of all values are looked at."""
    path = checkpoint / "manifest.json"
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        content.pop("crc32")
        content[key] = value
        path.write_text(json.dumps({"crc32": manifest._crc(json.loads(json.dumps(content))), **content}))
        found = read_manifest(checkpoint)
        assert isinstance(found.state.step, int) and isinstance(found.files, dict)
        latest_intact_checkpoint(checkpoint.parent)
    except CheckpointError:
        pass
    finally:
        path.write_bytes(raw)


def resigned(checkpoint, metadata: bytes) -> None:
    """Other metadata, and a manifest that agrees with it."""
    known = read_manifest(checkpoint)
    (checkpoint / ".metadata").write_bytes(metadata)
    shards = {name: rows for name, rows in known.items.items() if name != ".metadata"}
    manifest.write_manifest(checkpoint, known.state, known.facts, shards)


@given(changes=edits)
@fuzzed
def test_metadata(checkpoint, changes):
    """A forged pickle whose checksum agrees: what is read then is what was written, or an error."""
    raw = (checkpoint / ".metadata").read_bytes()
    (checkpoint / "manifest.json").rename(checkpoint.parent / "kept.json")
    shutil.copy(checkpoint.parent / "kept.json", checkpoint / "manifest.json")
    try:
        resigned(checkpoint, edited(raw, changes))
        stored = StoredModel(checkpoint)
        found = stored.read("a.weight")
        assert found.shape != (5, 3) or torch.equal(found, torch.arange(15.0).view(5, 3))
    except CheckpointError:
        pass
    finally:
        (checkpoint / ".metadata").write_bytes(raw)
        (checkpoint.parent / "kept.json").rename(checkpoint / "manifest.json")


MODULES = ["os", "builtins", "subprocess", "torch", "torch.hub", "pathlib", "collections", "numpy"]
BOMBS = [("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch.hub", "load")]


@given(module=st.sampled_from(MODULES), name=st.text(max_size=12))
@fuzzed
def test_classes_that_metadata_may_name(checkpoint, module, name):
    from megacpt.checkpoint.load import _ALLOWED, _Unpickler

    body = b"c" + module.encode() + b"\n" + name.replace("\n", "").encode(errors="ignore") + b"\n."
    import io

    try:
        found = _Unpickler(io.BytesIO(body)).load()
        assert (module, name.replace("\n", "")) in _ALLOWED or isinstance(found, torch.dtype)
    except (CheckpointError, pickle.UnpicklingError, UnicodeError, EOFError):
        pass


@pytest.mark.parametrize("call", BOMBS)
def test_what_a_bomb_would_need_is_refused(call):
    import io

    from megacpt.checkpoint.load import _Unpickler

    with pytest.raises(CheckpointError, match="may be forged"):
        _Unpickler(io.BytesIO(f"c{call[0]}\n{call[1]}\n.".encode())).load()


@given(changes=edits)
@fuzzed
def test_shards(checkpoint, changes):
    """Any change of a shard is seen, whatever it is."""
    path = next(checkpoint.glob("*.distcp"))
    raw = path.read_bytes()
    try:
        path.write_bytes(edited(raw, changes))
        stored = StoredModel(checkpoint)
        assert torch.equal(stored.read("a.weight"), torch.arange(15.0).view(5, 3))
        assert torch.equal(stored.read("b.weight"), torch.ones(7))
    except CheckpointError:
        pass
    finally:
        path.write_bytes(raw)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("hf")
    save_file(
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    return folder


@given(changes=edits, header=st.booleans())
@fuzzed
def test_safetensors(hugging_face, changes, header):
    """Its format has no checksum, so numbers may differ; shapes and types may not turn into something else unseen."""
    path = hugging_face / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    try:
        path.write_bytes(edited(raw[:end], changes) + raw[end:] if header else edited(raw, changes))
        weights = SafetensorsReader(hugging_face)
        for name in list(weights.file_of):
            weights.dtype(name)
            part = weights.read(name, (slice(0, 1),))
            assert part.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64) and part.shape[0] <= 1
    except MegacptError:
        pass
    finally:
        path.write_bytes(raw)


@given(changes=edits)
@fuzzed
def test_recipes(recipe_file, changes):
    from pathlib import Path

    path = Path(recipe_file())
    raw = path.read_bytes()
    try:
        path.write_bytes(edited(raw, changes))
        recipe = load_recipe(str(path))
        assert recipe.stages and all(np.isfinite(list(stage.mixture.values())).all() or True for stage in recipe.stages)
    except ConfigError:
        pass
    finally:
        path.write_bytes(raw)


def test_links_are_not_followed(checkpoint, tmp_path):
    """A shard that is a link to a file elsewhere is no file of the checkpoint."""
    copy = tmp_path / "step-00000001"
    shutil.copytree(checkpoint, copy)
    shard = next(copy.glob("*.distcp"))
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no plain file of this folder"):
        SafeReader(copy)

import json
import os
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from megacpt.checkpoint import manifest
from megacpt.checkpoint.export import export_average
from megacpt.checkpoint.load import SafeReader, StoredModel, load
from megacpt.checkpoint.manifest import RunState, latest_intact_checkpoint, list_steps, verify
from megacpt.checkpoint.save import prune, recover_interrupted_saves, save, tensors_of
from megacpt.config.decisions import Decisions
from megacpt.errors import CheckpointError, ConfigError
from megacpt.optim.adamw import AdamW


def tensors(mesh, seed):
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        return nn.Parameter(DTensor.from_local(torch.randn(shape, generator=generator), mesh.tensor, [Replicate()]))

    parameters = {"a.weight": make(5, 3), "b.weight": make(7)}
    optimizer = AdamW(parameters)
    for moments in (optimizer.exp_avg, optimizer.exp_avg_sq):
        for moment in moments.values():
            moment._local_tensor.copy_(torch.randn(moment.shape, generator=generator))
    return parameters, optimizer


def flat(parameters, optimizer):
    return [t._local_tensor for group in (parameters, optimizer.exp_avg, optimizer.exp_avg_sq) for t in group.values()]


@pytest.fixture
def saved(mesh, tmp_path):
    """Folder with sound checkpoints of steps 1, 2 and 3, each of its own seed."""
    for step in (1, 2, 3):
        save(
            tmp_path,
            tensors_of(*tensors(mesh, step)),
            RunState(step, step * 10, step, "s", Decisions(), {"a": "x"}),
            {"layout": "one"},
        )
    return tmp_path


def test_what_was_saved_is_loaded_bit_for_bit(saved, mesh):
    found = latest_intact_checkpoint(saved)
    path, state, complaints = found.directory, found.state, found.complaints
    assert (state.step, state.tokens, state.num_updates, state.stage, state.fingerprints) == (3, 30, 3, "s", {"a": "x"})
    assert complaints == () and path.name == "step-00000003"
    fresh = tensors(mesh, 99)
    load(path, tensors_of(*fresh))
    assert all(torch.equal(a, b) for a, b in zip(flat(*fresh), flat(*tensors(mesh, 3)), strict=True))
    assert torch.equal(StoredModel(path).read("a.weight"), tensors(mesh, 3)[0]["a.weight"]._local_tensor)


def damage_bit(path):
    file = next(path.glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def truncate(path):
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "CRC32": damage_bit,
    "bytes, manifest.json says": truncate,
    "is missing or no plain file": lambda p: os.remove(next(p.glob("*.distcp"))),
    "the save was not finished": lambda p: os.remove(p / "manifest.json"),
    "not a manifest": lambda p: (p / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(saved, complaint):
    DAMAGES[complaint](saved / "step-00000003")
    with pytest.raises(CheckpointError) as found:
        verify(saved / "step-00000003")
    assert complaint in str(found.value)
    read = {3} if complaint == "CRC32" else ()  # a shard's damage is found by who reads it
    found = latest_intact_checkpoint(saved, read)
    path, state, complaints = found.directory, found.state, found.complaints
    assert state.step == 2 and path.name == "step-00000002"
    assert len(complaints) == 1 and "step-00000003" in complaints[0] and (read or complaint in complaints[0])


def test_no_sound_checkpoint_is_an_error_not_a_fresh_start(saved):
    for step in (1, 2, 3):
        damage_bit(saved / f"step-{step:08d}")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        latest_intact_checkpoint(saved, {1, 2, 3})
    assert latest_intact_checkpoint(saved / "none") is None


def test_leftovers_do_not_count_and_do_not_block(saved, mesh):
    (saved / ".tmp-step-00000004").mkdir()
    (saved / ".tmp-step-00000004/rubbish").write_text("x")
    (saved / "step-4").mkdir()
    assert list_steps(saved) == [1, 2, 3]
    save(saved, tensors_of(*tensors(mesh, 4)), RunState(4, 40, 4, "s"), {})
    assert latest_intact_checkpoint(saved).state.step == 4 and not (saved / "step-00000004/rubbish").exists()


def test_retention(saved, mesh):
    for step in (4, 5):
        shutil.copytree(saved / "step-00000003", saved / f"step-{step:08d}")
    (saved / "step-00000006").mkdir()
    assert prune(saved, 1, 2) == [1, 3] and list_steps(saved) == [2, 4, 5, 6], "nothing goes for one that is not whole"
    (saved / "step-00000006").rmdir()
    assert prune(saved, 1, None) == [2, 4] and list_steps(saved) == [5]


def test_what_a_kill_left_is_recovered(saved):
    """Killed between the two renames of a step that is saved again: the one that was there is there again."""
    (saved / "step-00000003").rename(saved / ".tmp-old-step-00000003")
    (saved / ".tmp-step-00000007").mkdir()
    (saved / ".tmp-removed-step-00000001").mkdir()
    recover_interrupted_saves(saved)
    assert latest_intact_checkpoint(saved).state.step == 3 == verify(saved / "step-00000003").step
    assert sorted(p.name for p in saved.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]
    shutil.copytree(saved / "step-00000003", saved / ".tmp-old-step-00000003")
    recover_interrupted_saves(saved)
    assert sorted(p.name for p in saved.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("/tmp/megacpt-bomb-went-off",)


def forge(path, metadata: bytes) -> None:
    """Other metadata, with a manifest that agrees."""
    known = manifest.read_manifest(path)
    (path / ".metadata").write_bytes(metadata)
    shards = {name: rows for name, rows in known.items.items() if name != ".metadata"}
    manifest.write_manifest(path, known.state, known.facts, shards)


def test_a_forged_metadata_file_runs_nothing(saved):
    path = saved / "step-00000003"
    forge(path, pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="names posix.mkdir, which no checkpoint needs"):
        SafeReader(path).read_metadata()
    assert not os.path.exists("/tmp/megacpt-bomb-went-off")


def test_metadata_that_leaves_its_folder_is_refused(saved):
    path = saved / "step-00000003"
    metadata = SafeReader(path).read_metadata()
    for place in ("../step-00000001/__0_0.distcp", "/etc/passwd", "a\0b", "", "."):
        for info in metadata.storage_data.values():
            info.relative_path = place
        forge(path, pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="outside its folder"):
            SafeReader(path).read_metadata()
    metadata.storage_data = None  # found by the fuzz
    forge(path, pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafeReader(path).read_metadata()
    forge(path, b"rubbish")
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafeReader(path).read_metadata()


def test_a_manifest_that_names_files_elsewhere_is_refused(saved):
    path = saved / "step-00000003/manifest.json"
    content = json.loads(path.read_text())
    content.pop("crc32")
    content["files"]["../step-00000002/manifest.json"] = 1
    path.write_text(json.dumps({"crc32": manifest._crc(content), **content}))
    with pytest.raises(CheckpointError, match="no plain file of this folder"):
        verify(path.parent)


def test_a_missing_tensor_is_an_error(saved, mesh):
    parameters, _ = tensors(mesh, 1)
    parameters["c.weight"] = parameters.pop("a.weight")
    with pytest.raises(CheckpointError, match=r"c\.weight"):
        load(saved / "step-00000003", tensors_of(parameters, None))


def test_only_the_names_that_saves_give_are_checkpoints(tmp_path):
    for name in (
        "step-00000004",
        "step-0000000004",
        "step-٠٠٠٠٠٠٠٥",
        "step-4",
        "step-99999999999999999999",
        "step-00000006x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000007").write_text("")
    assert list_steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("steps", "last", "told"),
    [
        (None, 0, "0 checkpoints: an average needs at least two"),
        (None, 1, "1 checkpoints: an average"),
        (None, -1, "-1 checkpoints: an average"),
        (None, 4, "the last 4 checkpoints: there are only 3"),
        ([2, 2], None, "step 2: is given more than once"),
        ([2, 2, 4, 4, 6], None, "step 2, 4: is given more than once"),
        ([2], None, "1 checkpoints"),
        ([], None, "0 checkpoints"),
        ([2, 5, -1], None, "step -1, 5: there is no such checkpoint"),
    ],
)
def test_an_average_of_what_is_not_there_is_refused(tmp_path, steps, last, told):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    with pytest.raises(ConfigError) as error:
        export_average(tmp_path, tmp_path / "out", steps, last, "mean")
    assert told in str(error.value) and "holds the steps: 2, 4, 6." in str(error.value)
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()

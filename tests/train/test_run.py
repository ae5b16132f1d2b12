"""Whole runs from the command line and in this process: train, stop, resume, export, score, evaluate."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from ranks import on_ranks
from safetensors.torch import load_file
from samples import ROPE_LLAMA3, family_config, tiny_config, without_names
from shared import LONG_SECONDS, turn, wait_until
from tolerances import PARITY

from megacpt.cli import main, run
from megacpt.config.load import load_recipe
from megacpt.config.resume import changes_on_resume
from megacpt.errors import CheckpointError, ConfigError, DataError

EXACT = ("step", "tokens", "stage", "loss", "grad_norm", "lr", "batch_tokens", "domain_tokens", "seq_len")


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "megacpt", *arguments], capture_output=True, text=True, **options)


def exit_code(*arguments: str) -> int:
    """What a shell would see, without an interpreter of its own."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return end.value.code


def rows(directory, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(directory) / name).read_text().splitlines()]


def exact(directory) -> list[dict]:
    return [{key: row[key] for key in EXACT} for row in rows(directory)]


def weights(directory, step) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((Path(directory) / f"checkpoints/step-{step:08d}").glob("*.distcp")))


@pytest.fixture
def train(mesh, recipe_file, tmp_path):
    """Trains in this process; returns the run directory."""

    def go(*flags: str, name: str = "run", **sections) -> Path:
        from megacpt.train import loop

        directory = tmp_path / name
        recipe = load_recipe(recipe_file(**sections), [f"--run.directory={directory}", *flags])
        destroy, loop.dist.destroy_process_group = loop.dist.destroy_process_group, None
        loop.dist.destroy_process_group = lambda group=None: destroy(group) if group else None  # not this process's own
        try:
            go.status = loop.train(recipe)
        finally:
            loop.dist.destroy_process_group = destroy
        return directory

    return go


def test_a_run_leaves_what_the_design_says(train):
    directory = train("--checkpoint.every_steps=3", "--checkpoint.keep_last=2")
    metrics, events = rows(directory), rows(directory, "events.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 9)) and metrics[-1]["tokens"] == 2048
    assert metrics[0]["loss"] == pytest.approx(np.log(401), rel=0.2) and metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["lr"] == pytest.approx(1e-4) and sum(metrics[-1]["domain_tokens"].values()) == 2048
    for key in ("tokens_per_second", "mfu", "mfu_exact", "data_s", "step_s", "memory_gib", "grad_norm"):
        assert metrics[0][key] >= 0
    assert all(row["mfu_exact"] <= row["mfu"] for row in metrics)  # rounded; values: tests/evaluate/test_values.py
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "start" and kinds.count("validation") == 3 and kinds.count("saved") == 3 and "stage" in kinds
    facts = json.loads((directory / "run.json").read_text())
    assert (facts["status"], facts["exit_code"], facts["attempt"], facts["start"]) == ("finished", 0, 1, "scratch")
    assert facts["peak_flops"] == 1e12 and "pipeline 1" in facts["layout"]
    assert load_recipe(str(directory / "recipe.toml")).run.seed == 3
    assert list((directory / "tb").glob("events*"))


def tags(directory) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(directory / "tb"))
    reader.Reload()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_identical(train, compute):
    flags = [f"--precision.compute={compute}", "--checkpoint.every_steps=2"]
    whole = train(*flags, name="whole")
    part = train(*flags, "--run.stop_at_step=4", name="part")
    assert train.status == "preempted" and [row["step"] for row in rows(part)] == [1, 2, 3, 4]
    (part / "metrics.jsonl").open("a").write('{"step": 5, "loss": 1}\n{"step": 6, "lo')  # a killed run's last lines
    train(*flags, name="part")
    assert exact(part) == exact(whole) and weights(part, 8) == weights(whole, 8)
    facts = json.loads((part / "run.json").read_text())
    assert (facts["attempt"], facts["start"], facts["started_at_step"]) == (2, "resume", 4)
    assert tags(part)["train/loss"] == list(range(1, 9)), "purge_step hides what is repeated"


def test_the_comparison_sees_a_lost_optimizer_state(train, monkeypatch):
    from megacpt.optim.adamw import AdamW

    whole = train(name="whole")
    part = train("--run.stop_at_step=4", name="part")
    monkeypatch.setattr(AdamW, "num_updates", property(lambda self: 1, lambda self, value: None), raising=False)
    train(name="part")
    assert weights(part, 8) != weights(whole, 8)


def test_a_resume_falls_back_to_the_checkpoint_before_a_damaged_one(train, capsys):
    whole = train(name="whole")
    part = train("--run.stop_at_step=6", "--checkpoint.every_steps=3", name="part")
    file = next((part / "checkpoints/step-00000006").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5])
    train(name="part")
    assert "skipped a damaged checkpoint" in capsys.readouterr().err
    assert exact(part) == exact(whole) and weights(part, 8) == weights(whole, 8)


def test_micro_batches_and_reduction_do_not_change_the_result(train):
    whole = train("--precision.compute=float64", name="one")
    for i, flags in enumerate(
        (
            ["--parallel.micro_batch_tokens=256"],
            ["--parallel.micro_batch_tokens=192"],
            ["--precision.reduce=step"],
            ["--parallel.activation_checkpointing=selective"],
        )
    ):
        other = train("--precision.compute=float64", *flags, name=f"other{i}")
        for a, b in zip(exact(whole), exact(other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-12) and a["grad_norm"] == pytest.approx(
                b["grad_norm"], rel=1e-12
            )


def test_what_is_frozen_cannot_change_on_resume(train, recipe_file):
    part = train("--run.stop_at_step=4")
    with pytest.raises(ConfigError, match=r"run.seed: 3 -> 4. It is frozen"):
        train("--run.seed=4")
    with pytest.raises(ConfigError, match=r"stages.s.mixture.a: 0.7 -> 0.5"):
        train("--stages.s.mixture.a=0.5")
    with pytest.raises(ConfigError, match="cannot be made shorter"):
        train("--stages.s.tokens=768")
    train("--stages.s.tokens=2304", "--log.every_steps=2")
    assert [row["step"] for row in rows(part)] == list(range(1, 10))
    start = [event for event in rows(part, "events.jsonl") if event["kind"] == "start"][-1]
    assert any("stages.s.tokens: 2048 -> 2304" in change for change in start["changes"])


def test_changes_on_resume_are_listed(recipe_file):
    before = load_recipe(recipe_file())
    assert changes_on_resume(before, before, "s") == []
    changed = changes_on_resume(
        before, load_recipe(recipe_file(), ["--stages.s.lr.peak=0.5", "--parallel.tensor=2"]), "s"
    )
    assert changed == ["parallel.tensor: 1 -> 2", "stages.s.lr.peak: 0.001 -> 0.5"]


def test_data_that_changed_since_is_an_error(train, prepared, tmp_path):
    import shutil

    for name in "ab":
        for kind in ("bin", "idx", "json"):
            shutil.copy(prepared / f"{name}.{kind}", tmp_path / f"{name}.{kind}")
    data = {name: {"paths": [str(tmp_path / name)], "holdout_documents": 5} for name in "ab"}
    train("--run.stop_at_step=4", data=data)
    manifest = json.loads((tmp_path / "b.json").read_text())
    manifest["bin"]["crc32"] ^= 1
    (tmp_path / "b.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="domain b: the prepared data differs from that at step 4"):
        train(data=data)


def test_start_modes_are_never_guessed(train):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        train("--run.start=resume")
    train("--run.stop_at_step=1")
    with pytest.raises(ConfigError, match="which would be lost"):
        train("--run.start=scratch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_import_then_export_is_bit_identical(train, tmp_path, tokenizer_dir, dtype, tied):
    torch.manual_seed(1)
    raw = without_names(tiny_config(tie_word_embeddings=tied, rope_scaling=ROPE_LLAMA3))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    directory = train("--run.stop_at_step=0", model={"pretrained": str(tmp_path / "hf")})
    assert run(["export", str(directory), "--output", str(tmp_path / "out")]) == 0
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads(
        (tmp_path / "out/config.json").read_text()
    )
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    "name, tied", [("qwen2", False), ("qwen2", True), ("qwen3", True), ("mistral", False), ("phi3", False)]
)
def test_every_family_comes_and_goes_bit_identical(train, tmp_path, tokenizer_dir, name, tied):
    """config.json, names, shapes and bits. The export loads in transformers as what it was."""
    torch.manual_seed(1)
    raw = family_config(name, tie_word_embeddings=tied, initializer_range=0.2)
    config = transformers.AutoConfig.for_model(name, **without_names(raw))
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    directory = train("--run.stop_at_step=0", model={"pretrained": str(tmp_path / "hf")})
    run(["export", str(directory), "--output", str(tmp_path / "out")])
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    def read(folder):
        return json.loads((tmp_path / folder / "config.json").read_text())

    assert read("hf") == read("out") and read("out")["model_type"] == name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs) is type(model) and all(
        torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_export_in_another_type(train, tmp_path):
    directory = train("--run.stop_at_step=0")
    for dtype, stored in (("bfloat16", torch.bfloat16), (None, torch.float32)):
        flags = ["--dtype", dtype] if dtype else []
        run(["export", str(directory), "--output", str(tmp_path / str(dtype)), *flags])
        tensors = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert {t.dtype for t in tensors.values()} == {stored} and tensors["lm_head.weight"].shape == (401, 32)
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["torch_dtype"] == (dtype or "float32")


def test_the_export_of_a_trained_run_gives_its_validation_loss_in_transformers(train, tmp_path, capsys):
    """The way round: loss of the last validation, of `evaluate`, of `score`, and of transformers on the export."""
    directory = train("--precision.compute=float32")
    assert run(["export", str(directory), "--output", str(tmp_path / "out")]) == 0
    last = [e for e in rows(directory, "events.jsonl") if e["kind"] == "validation"][-1]["losses"]
    for source in (directory, tmp_path / "out"):
        run(
            [
                "evaluate",
                str(source),
                str(directory / "recipe.toml"),
                "--output",
                str(tmp_path / "e.json"),
                "--dtype",
                "float32",
            ]
        )
        found = json.loads((tmp_path / "e.json").read_text())
        assert {k: v["loss"] for k, v in found.items()} == pytest.approx(last, rel=1e-6)
    recipe = load_recipe(str(directory / "recipe.toml"))
    prefix = recipe.data["a"].paths[0]
    run(
        [
            "score",
            str(tmp_path / "out"),
            prefix,
            "--output",
            str(tmp_path / "s.jsonl"),
            "--seq-len",
            "64",
            "--dtype",
            "float32",
        ]
    )
    scores = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    from megacpt.data.indexed import IndexedDataset

    data = IndexedDataset(prefix)
    assert [s["tokens"] for s in scores] == data.lengths.tolist() and [s["document"] for s in scores] == list(
        range(len(scores))
    )
    for score in scores[:40]:
        tokens = torch.tensor(data.read(score["document"], 0, score["tokens"]).astype(np.int64))
        losses = []
        for window in tokens.split(64):
            if len(window) > 1:
                with torch.no_grad():
                    logits = model(window[None]).logits[0, :-1]
                losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
        assert score["nll"] == (pytest.approx(np.mean(losses), rel=PARITY[torch.float32]) if losses else None)
    facts = json.loads((tmp_path / "s.json").read_text())
    assert len(facts["model_sha256"]) == 64 and facts["documents"] == len(scores)


def test_inspect_shows_the_batch_that_is_trained(train, recipe_file, tmp_path, capsys):
    path = recipe_file()
    run(["inspect", path, "--step", "3", "--decode", "--output", str(tmp_path / "b.npz")])
    out = capsys.readouterr().out
    batch = np.load(tmp_path / "b.npz")
    assert batch["tokens"].shape == (4, 64) and set(batch) == {
        "tokens",
        "labels",
        "positions",
        "weights",
        "document_starts",
        "row_offsets",
        "item",
        "domain",
    }
    assert (batch["weights"] == 1).all() and batch["item"].tolist() == list(range(len(batch["document_starts"])))
    assert "step 3, stage s: 4 rows of 64" in out and "--- row 3: domain" in out
    with pytest.raises(ConfigError, match="steps 1 to 8"):
        run(["inspect", path, "--step", "9"])


def test_index_builds_what_the_run_opens(recipe_file, tmp_path, capsys, train):
    run(["index", recipe_file(), "--workers", "2"])
    assert capsys.readouterr().out.count("rows") == 4
    before = sorted((tmp_path / "packing").iterdir())
    train()
    assert sorted((tmp_path / "packing").iterdir()) == before


def test_stages_of_several_lengths_and_rotary_embeddings(train, tmp_path):
    stage = {
        "tokens": 512,
        "seq_len": 64,
        "batch_tokens": 256,
        "mixture": {"a": 1.0},
        "lr": {"shape": "constant", "peak": 1e-3},
    }
    stages = [
        stage | {"name": "short"},
        stage | {"name": "long", "seq_len": 128, "rope": {"theta": 40000.0}, "parallel": {"micro_batch_tokens": 256}},
    ]
    whole = train(stages=stages, name="whole")
    assert [(r["stage"], r["seq_len"]) for r in rows(whole)] == [("short", 64)] * 2 + [("long", 128)] * 2
    for stop in (2, 3):
        part = train(f"--run.stop_at_step={stop}", stages=stages, name=f"part{stop}")
        train(stages=stages, name=f"part{stop}")
        assert exact(part) == exact(whole)
    run(["export", str(whole), "--output", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (128, 40000.0)


def test_profile_writes_a_trace(train):
    directory = train("--profile.steps=[2, 3]", "--stages.s.tokens=1024", "--stages.s.lr.decay_tokens=64")
    trace = json.loads((directory / "profile/rank0-steps2-3.json").read_text())
    assert any("mm" in event.get("name", "") for event in trace["traceEvents"])


def test_a_stop_request_saves_and_ends_with_0(recipe_file, tmp_path):
    path = recipe_file()
    flags = ["--stages.s.tokens=1M", "--validation=[]"]
    process = subprocess.Popen([sys.executable, "-m", "megacpt", "train", path, *flags], stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "run/metrics.jsonl").exists, alive=[process.pid])
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG_SECONDS) == 0
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["status"] == "preempted"
    last = rows(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}/manifest.json").exists()
    assert rows(tmp_path / "run", "events.jsonl")[-1]["signal"] == "SIGTERM"


def test_four_processes_under_torchrun_are_one_and_change_their_layout(train, recipe_file, tmp_path):
    """launch/torchrun.sh beside one process, through two layouts: the same losses and validation; run.json and the events have the layouts.
    Groups end and begin again on torchrun's own store. The forked ranks of test_layouts.py meet on a file instead."""
    lr = {"shape": "constant", "peak": 1e-3}
    stage = {"tokens": 512, "seq_len": 64, "batch_tokens": 256, "mixture": {"a": 1.0}, "lr": lr}
    degrees = [
        {"tensor": 2, "context": 2},
        {"pipeline": 2, "virtual_stages": 2, "schedule": "zb-v", "data_replicate": 2},
    ]

    def stages(degrees):
        return [
            stage | {"name": name, "parallel": {"micro_batch_tokens": 64, **more}}
            for name, more in zip("xy", degrees, strict=True)
        ]

    one = train("--precision.compute=float64", name="one", stages=stages([{}, {}]))
    path = recipe_file(stages=stages(degrees))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NPROC": "4", "PYTHON": sys.executable}
    command = ["bash", str(Path(__file__).parents[2] / "launch/torchrun.sh"), path, "--precision.compute=float64"]
    with turn(4):
        out = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LONG_SECONDS)
    assert out.returncode == 0, out.stderr
    ours = exact(tmp_path / "run")
    assert [row["stage"] for row in ours] == ["x", "x", "y", "y"]
    for a, b in zip(ours, exact(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12) and a["domain_tokens"] == b["domain_tokens"]
    events, alone = rows(tmp_path / "run", "events.jsonl"), rows(one, "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert kinds.index("layout") < len(kinds) - 1 - kinds[::-1].index("validation")

    def validated(events):
        return [event["losses"] for event in events if event["kind"] == "validation"]

    for a, b in zip(validated(events), validated(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    change = events[kinds.index("layout")]
    assert change["before"] == "data 1 x 1, pipeline 1, context 2, tensor 2"
    assert change["after"] == "data 2 x 1, pipeline 2, context 1, tensor 1"
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["world_size"] == 4 and facts["status"] == "finished"
    assert "data 0, pipeline 0: [0 1] [2 3]" in out.stderr and "data 1, pipeline 1: [3]" in out.stderr, out.stderr


def test_scores_and_evaluation_are_the_same_on_every_layout(train, tmp_path):
    """Forward only, with tensor 2 x context 2 x pipeline 2, and on 3 data ranks; beside one process."""
    directory = train("--precision.compute=float32")
    assert run(["export", str(directory), "--output", str(tmp_path / "out")]) == 0
    prefix = load_recipe(str(directory / "recipe.toml")).data["a"].paths[0]

    def both(name: str, *degrees: str) -> None:
        tail = [
            "--output",
            f"{tmp_path}/{name}.jsonl",
            "--seq-len",
            "64",
            "--dtype",
            "float64",
            "--micro-batch-tokens",
            "192",
        ]
        run(["score", str(tmp_path / "out"), prefix, *tail, *degrees])
        flags = [f"--parallel.{degrees[i][2:]}={degrees[i + 1]}" for i in range(0, len(degrees), 2)]
        output = ["--output", f"{tmp_path}/{name}.json2", "--dtype", "float64"]
        run(["evaluate", str(directory), str(directory / "recipe.toml"), *output, *flags])

    both("one")
    for name, ranks, degrees in (
        ("8", 8, ["--tensor", "2", "--context", "2", "--pipeline", "2"]),
        ("3", 3, []),
    ):
        on_ranks(ranks, both, name, *degrees)
        for a, b in zip(*((tmp_path / f"{n}.jsonl").read_text().splitlines() for n in (name, "one")), strict=True):
            ours, theirs = json.loads(a), json.loads(b)
            assert ours["document"] == theirs["document"] and ours["nll"] == pytest.approx(theirs["nll"], rel=1e-12)
        ours, theirs = (json.loads((tmp_path / f"{n}.json2").read_text()) for n in (name, "one"))
        assert all(ours[d]["loss"] == pytest.approx(theirs[d]["loss"], rel=1e-12) for d in theirs)


def late(path: str, flags: list[str]) -> str:
    """On a rank: rank 1 comes three seconds late to a step; what becomes of the run."""
    import time

    from megacpt.train import loop
    from megacpt.train.handlers import steps

    original, calls = steps.train_step, []

    def sleepy(*args, **kwargs):
        calls.append(1)
        if torch.distributed.get_rank() == 1 and len(calls) == 3:
            time.sleep(3)
        return original(*args, **kwargs)

    steps.train_step = sleepy
    try:
        loop.train(load_recipe(path, flags))
    except RuntimeError as error:
        torch.distributed.destroy_process_group()  # its connections are gone
        return str(error)
    return "done"


def test_a_step_waits_as_long_as_it_may(recipe_file):
    """A second is allowed: the other rank gives up."""
    flags = ["--health.step_timeout_seconds=1", "--validation=[]", "--checkpoint.every_steps=8", "--parallel.tensor=2"]
    found = on_ranks(2, late, recipe_file(), flags)
    assert "imed out" in found[0] or "imeout" in found[0], found[0]


def timeouts_in_force(path: str, flags: list[str]) -> dict[str, list[set[float]]]:
    """On a rank: what collectives would wait, in seconds, in each step and in each save."""
    import torch.distributed as dist

    from megacpt.checkpoint import background
    from megacpt.train import loop
    from megacpt.train.handlers import steps

    found: dict[str, list[set[float]]] = {"step": [], "save": []}
    cpu = torch.device("cpu")

    def noting(phase: str, original):
        def noted(*args, **kwargs):
            groups = dist.distributed_c10d._world.pg_map
            found[phase].append({group._get_backend(cpu).options._timeout.total_seconds() for group in groups})
            return original(*args, **kwargs)

        return noted

    steps.train_step, background.save = noting("step", steps.train_step), noting("save", background.save)
    loop.train(load_recipe(path, flags))
    return found


def test_each_phase_has_its_own_timeout(recipe_file):
    """The first step, in which much is done for the first time, counts as start; a save may take longer than a step."""
    seconds = {"start": 900.0, "step": 700.0, "save": 800.0}
    flags = [f"--health.{phase}_timeout_seconds={value}" for phase, value in seconds.items()]
    flags += ["--validation=[]", "--checkpoint.every_steps=4", "--parallel.tensor=2"]
    expected = {"step": [{900.0}, *[{700.0}] * 7], "save": [{800.0}] * 2}
    assert on_ranks(2, timeouts_in_force, recipe_file(), flags) == [expected] * 2


def test_torchrun_says_a_bad_recipe_once(recipe_file):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NPROC": "2", "PYTHON": sys.executable}
    script = str(Path(__file__).parents[2] / "launch/torchrun.sh")
    out = subprocess.run(
        ["bash", script, recipe_file(), "--parallel.tensor=3"], capture_output=True, text=True, env=environment
    )
    assert out.returncode != 0 and out.stderr.count("does not divide the world size 2") == 1


def test_verify_finds_a_flipped_bit_and_leaves_with_76(train, capsys):
    directory = train("--run.stop_at_step=2")
    assert run(["checkpoint", "verify", str(directory)]) == 0
    file = next((directory / "checkpoints/step-00000002").glob("*.distcp"))
    raw = bytearray(file.read_bytes())
    raw[100] ^= 4
    file.write_bytes(raw)
    assert run(["checkpoint", "verify", str(directory)]) == 76
    assert "DAMAGED" in capsys.readouterr().out
    with pytest.raises(CheckpointError):
        run(["export", str(directory), "--output", str(directory / "out"), "--step", "2"])


def test_doctor_and_help(capsys):
    out = command("doctor")
    assert out.returncode == 0 and "attention on cpu" in out.stdout and "sdpa: available" in out.stdout
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    for verb in (
        "prepare", "check", "index", "inspect", "train", "score", "evaluate", "export", "checkpoint", "doctor",
    ):  # fmt: skip
        assert f"\n    {verb} " in text or f"\n    {verb}\n" in text, verb
    assert exit_code("export", "/nowhere", "--output", "/tmp/x") == 2
    assert exit_code("train") == 2


def test_no_order_is_made_of_losses_that_are_none(prepared, tmp_path, monkeypatch):
    """Scores of a model that gives nan for one document are not written, and the document is named."""
    from types import SimpleNamespace

    from megacpt.errors import NumbersError
    from megacpt.evaluate import score

    def losses(model, lengths, read, tokens):
        found = np.ones((len(lengths), 3))
        found[7, 0] = np.nan
        return found

    monkeypatch.setattr(score, "score_sequences", losses)
    with pytest.raises(NumbersError, match=r"The loss of 1 of \d+ documents is not finite \(\d+\)"):
        score.score(SimpleNamespace(config=None), str(prepared / "a"), tmp_path / "a.jsonl", 64, 64, "model")
    assert not list(tmp_path.iterdir())

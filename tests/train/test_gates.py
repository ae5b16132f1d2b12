"""Gates, online mixture and averages in whole runs: what is decided, under any layout, after a kill, and when nothing passes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_runs import flags_of, world_size
from ranks import on_ranks
from safetensors.torch import load_file

from megacpt.checkpoint.export import export
from megacpt.cli import run as run_verb
from megacpt.config.load import load_recipe
from megacpt.errors import ConfigError, GateError
from megacpt.train import loop

GATES = {
    "needle": {
        "kind": "needle",
        "haystack": "a",
        "lengths": [96, 128],
        "depths": 3,
        "inserted": 2,
        "asked": 1,
        "minimum": 0.0,
    },
    "short": {"kind": "recovery", "domains": ["a", "b"], "tolerance": 0.9},
    "forget": {"kind": "forgetting", "domains": ["b"], "max_rise": 0.5},
}
LR = {"shape": "constant", "peak": 1e-3}


def stage(name: str, **more) -> dict:
    return {
        "name": name,
        "tokens": 1024,
        "seq_len": 128,
        "batch_tokens": 256,
        "mixture": {"a": 0.5, "b": 0.5},
        "lr": LR,
    } | more


@pytest.fixture
def staged(recipe_file, tmp_path):
    def write(stages: list[dict], gates: dict | None = None, **more) -> str:
        task = tmp_path / "task.jsonl"
        questions = [
            {"question": f"{i} and", "choices": [f"{i}{i}", "the rest of it", "no"], "answer": i % 3} for i in range(7)
        ]
        task.write_text("".join(json.dumps(q) + "\n" for q in questions))
        gates = {name: dict(gate) for name, gate in (gates or GATES).items()}
        for gate in gates.values():
            if gate["kind"] != "needle":
                gate["tasks"] = [str(task)]
                gate.setdefault("tolerance" if gate["kind"] == "recovery" else "max_fall", 1.0)
        return recipe_file(stages=stages, gates=gates, parallel={"micro_batch_tokens": 256}, **more)

    return write


def train(path: str, *flags: str) -> str:
    return loop.train(load_recipe(path, ["--log.tensorboard=false", *flags]))


def trained(path: str, flags: list[str]) -> None:
    loop.train(load_recipe(path, flags))


def events(directory: Path, kind: str) -> list[dict]:
    found = []
    for line in (directory / "events.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == kind:
            row.pop("time")
            found.append(row)
    return found


def decisions(directory: Path) -> list[dict]:
    newest = sorted((directory / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "manifest.json").read_text())["state"]["decisions"]


def test_gates_are_asked_at_the_end_of_their_stage_on_every_layout(staged, tmp_path):
    """One process and two layouts: the same decisions to the digits that decide."""
    path = staged([stage("s", gates=["needle", "short", "forget"]), stage("t")])
    found = {}
    for layout in ("dp1", "tp2 cp2", "pp2 dp2"):
        directory = tmp_path / layout
        flags = [
            "--log.tensorboard=false",
            "--validation=[]",
            f"--run.directory={directory}",
            "--precision.compute=float64",
        ]
        on_ranks(world_size(layout), trained, path, [*flags, *flags_of(layout)])
        found[layout] = decisions(directory)
    one = found["dp1"]
    assert [d["kind"] for d in one] == ["baseline", "gates"] and one[1]["passed"] and one[1]["step"] == 4
    results = {r["gate"]: r["numbers"] for r in one[1]["results"]}
    assert set(results["needle"]["by_length"]) == {"96", "128"} and set(results["short"]["losses"]) == {"a", "b"}
    assert 0 <= next(iter(results["short"]["accuracies"].values())) <= 1
    assert found["tp2 cp2"] == one and found["pp2 dp2"] == one
    assert (tmp_path / "dp1/gates/s-needle-step-00000004.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stage_is_extended_to_its_limit_and_then_stops(staged, tmp_path):
    """A gate that nobody passes: 1,024 tokens, two extensions of 512, then an error with the state saved; the resume asks again and
    goes on as soon as the recipe lets it."""
    hopeless = {"needle": GATES["needle"] | {"minimum": 1.0}}
    rule = {"action": "extend", "tokens": 512, "limit": 1024}
    path = staged([stage("s", gates=["needle"], on_fail=rule), stage("t")], hopeless)
    with pytest.raises(
        GateError, match=r"stage s did not pass its gates at step 8 \(saved\)[\s\S]*mean recall .* is below 1.0"
    ):
        train(path)
    run = tmp_path / "run"
    assert [e["step"] for e in events(run, "extend")] == [4, 6]
    assert [(e["step"], e["action"]) for e in events(run, "gates")] == [(4, "extend"), (6, "extend"), (8, "stop")]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    with pytest.raises(GateError):
        train(path)
    path = staged([stage("s", gates=["needle"], on_fail={"action": "warn"}), stage("t")], hopeless)
    assert train(path) == "finished"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13)) and [row["stage"] for row in rows] == ["s"] * 8 + [
        "t"
    ] * 4


def test_a_forgotten_domain_is_named_with_its_numbers(staged):
    gates = {"forget": {"kind": "forgetting", "domains": ["b"], "max_rise": 0.0}}
    lr = {"shape": "constant", "peak": 3.0}
    with pytest.raises(GateError, match=r"forget: loss of b is [\d.]+, at most [\d.]+ \(start [\d.]+\)"):
        train(staged([stage("s", gates=["forget"], lr=lr)], gates))


def test_six_stages_of_context_extension(staged, recipe_file, tmp_path):
    """launch/recipes/llama3_8b_8k_to_128k.toml in small: 64 to 1,024 tokens in six stages, theta by rule, gates at each end, another layout
    from the fourth on. transformers gives the export's losses at positions far beyond the base's context."""
    import transformers

    lengths = (96, 128, 256, 512, 768, 1024)
    stages = [
        {
            "name": f"s{n}", "tokens": 4 * n, "seq_len": n, "batch_tokens": 2 * n, "mixture": {"a": 1.0}, "lr": LR,
            "rope": {"rule": "ntk2"}, "gates": ["needle", "short"],
            "parallel": {"micro_batch_tokens": n, **({"context": 2} if n >= 512 else {})},
        }
        for n in lengths
    ]  # fmt: skip
    needle = {"kind": "needle", "haystack": "a", "depths": 2, "minimum": 0.0}
    gates = {"needle": needle, "short": {"kind": "recovery", "domains": ["b"], "tolerance": 0.9}}
    path = staged(stages, gates)
    on_ranks(2, trained, path, ["--log.tensorboard=false", "--validation=[]"])
    run = tmp_path / "run"
    thetas = [event["rope"]["theta"] for event in events(run, "stage")]
    assert thetas == sorted(thetas) and len(thetas) == 6
    assert [e["stage"] for e in events(run, "gates")] == [f"s{n}" for n in lengths] and len(events(run, "layout")) == 1
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="sdpa"
    )
    found = on_ranks(1, losses_at_length, str(tmp_path / "out"), 1024)[0]
    tokens = torch.arange(1024) * 7919 % 400
    with torch.no_grad():
        logits = theirs(tokens[None]).logits[0].double()
    want = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    assert torch.allclose(torch.tensor(found).double()[:-1], want, rtol=0, atol=2e-4)


def losses_at_length(directory: str, length: int) -> list[float]:
    from megacpt.config.sections.parallel import Parallel
    from megacpt.data.loader import Batch
    from megacpt.model.run import forward_losses
    from megacpt.train.standalone import open_model

    model, tokens = open_model(directory, "float32", Parallel()), np.arange(length) * 7919 % 400
    labels, found = np.append(tokens[1:], -100), []
    batch = Batch(tokens[None], labels[None], np.arange(length)[None], np.array([0]), np.array([0, 1]), [""])
    forward_losses(model, 1, lambda i: batch, lambda i, inputs, losses, right: found.append(losses))
    return found[0].tolist()


def test_a_frozen_parameter_stays_as_it_was(staged, tmp_path):
    """Only embedding and head in the first stage, all in the second; a pattern that fits nothing is named."""
    stages = [stage("new", freeze=["model.layers.*", "model.norm.weight"]), stage("all")]
    path = staged(stages, {})
    runs = {step: tmp_path / f"s{step}" for step in (0, 4, 8)}
    for step, run in runs.items():
        train(path, f"--run.directory={run}", f"--run.stop_at_step={step}")
        export(run, run / "e")
    at = {step: load_file(run / "e/model.safetensors") for step, run in runs.items()}
    layers = [name for name in at[0] if ".layers." in name or name == "model.norm.weight"]
    assert all(torch.equal(at[0][name], at[4][name]) for name in layers) and len(layers) > 5
    assert not torch.equal(at[0]["model.embed_tokens.weight"], at[4]["model.embed_tokens.weight"])
    assert all(not torch.equal(at[4][name], at[8][name]) for name in layers)
    with pytest.raises(ConfigError, match="no parameter fits 'layers'"):
        train(staged([stage("s", freeze=["layers"])], {}), f"--run.directory={tmp_path / 'bad'}")


ONLINE = {
    "groups": {"all": ["a", "b"]},
    "online": {"every_tokens": 512, "start_tokens": 512, "alpha": 5.0, "dead_band": 0.0, "topic_weights": {"b": 0.0}},
}


def test_weights_follow_the_losses_and_a_resume_follows_the_weights(staged, tmp_path):
    """12 steps with adjustments every second one. A run that stops in between and goes on gives the same metrics."""
    stages = [stage("s", tokens=3072)]
    whole = staged(stages, mixture=ONLINE)
    train(whole)
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    changes = events(tmp_path / "run", "mixture")
    assert [c["step"] for c in changes] == [2, 4, 6, 8, 10] and changes[0]["weights"] == {}
    weights = [c["weights"] for c in changes[1:]]
    assert all(
        abs(sum(w.values()) - 1) < 1e-12 and all(round(v * 1024) == v * 1024 for v in w.values()) for w in weights
    )
    assert len({json.dumps(w) for w in weights}) > 1, "nothing moved"
    train(whole, f"--run.directory={tmp_path / 'cut'}", "--run.stop_at_step=5")
    train(whole, f"--run.directory={tmp_path / 'cut'}")
    again = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    batches = tmp_path / "b.npz"
    run_verb(["inspect", whole, "--step=12", f"--output={batches}"])  # with the weights of that step
    last = json.loads(rows[-1])["domain_tokens"]["a"] - json.loads(rows[-2])["domain_tokens"]["a"]
    assert sum(np.load(batches)["domain"] == "a") * 128 == last
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "domain_tokens")

    def plain(lines):
        return [[json.loads(line)[key] for key in keys] for line in lines]

    assert plain(again) == plain(rows)


def test_evaluate_measures_what_the_gates_measure(staged, tmp_path, capsys):
    path = staged([stage("s", gates=["needle", "short"])])
    train(path)
    run_verb(["evaluate", str(tmp_path / "run"), path, f"--output={tmp_path / 'e.json'}"])
    found = json.loads((tmp_path / "e.json").read_text())
    (asked,) = events(tmp_path / "run", "gates")
    assert found["gates"]["short"] == next(r["numbers"] for r in asked["results"] if r["gate"] == "short")
    assert found["gates"]["needle"] == next(r["numbers"] for r in asked["results"] if r["gate"] == "needle")
    assert "gate needle: " in capsys.readouterr().out and set(found) == {"a", "b", "gates"}


def test_averages_are_the_mean_of_their_snapshots(staged, tmp_path):
    """Snapshots every second step; the average by hand from the exports of three runs that stop there."""
    average = {"last": 3, "every_tokens": 512}
    path = staged([stage("s", tokens=2048, average=average)])
    train(path)
    run = tmp_path / "run"
    (event,) = events(run, "average")
    assert (
        event["steps"] == [4, 6, 8]
        and event["better"] in ("last", "average")
        and set(event["losses"]["last"]) == {"a", "b"}
    )
    assert decisions(run)[-1]["kind"] == "average", "the last checkpoint does not know what was decided after its step"
    cut = tmp_path / "cut"
    train(path, f"--run.directory={cut}", "--run.stop_at_step=5")
    train(path, f"--run.directory={cut}")
    assert decisions(cut) == decisions(run)
    export(run, tmp_path / "mean", average=True)
    parts = []
    for step in (4, 6, 8):
        other = tmp_path / f"to{step}"
        train(path, f"--run.directory={other}", f"--run.stop_at_step={step}")
        export(other, other / "export")
        parts.append(load_file(other / "export/model.safetensors"))
    mean = load_file(tmp_path / "mean/model.safetensors")
    for name, tensor in mean.items():
        want = torch.stack([part[name].double() for part in parts]).mean(0)
        assert torch.allclose(tensor.double(), want, rtol=0, atol=3e-7), name
    assert not torch.equal(mean["model.norm.weight"], parts[2]["model.norm.weight"])


@pytest.mark.parametrize("decay", ["mean", "linear", "cosine", "1-sqrt"])
def test_weights_of_an_average_stand_for_a_decay(decay):
    """Under plain SGD the average of a constant rate's checkpoints is the end of a run whose rate decays (WSM)."""
    from megacpt.checkpoint.average import average_weights
    from megacpt.optim.schedule import remaining

    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    checkpoints = [torch.zeros(5, dtype=torch.float64)]
    for gradient in gradients:
        checkpoints.append(checkpoints[-1] - 0.1 * gradient)
    weights = average_weights(decay, len(checkpoints))
    assert abs(sum(weights) - 1) < 1e-12 and min(weights) >= 0
    mean = sum(w * c for w, c in zip(weights, checkpoints, strict=True))
    left = [remaining("linear" if decay == "mean" else decay, i / len(checkpoints)) for i in range(1, len(checkpoints))]
    decayed = -0.1 * sum(w * g for w, g in zip(left, gradients, strict=True))
    assert torch.allclose(mean, decayed, rtol=0, atol=1e-12)


def test_the_average_verb_writes_the_mean(staged, tmp_path, capsys):
    train(staged([stage("s")], {}, checkpoint={"every_steps": 1, "keep_last": 9}))
    for step in (2, 3, 4):
        export(tmp_path / "run", tmp_path / f"e{step}", step=step)
    run_verb(["average", str(tmp_path / "run"), "--last", "3", "--output", str(tmp_path / "mean")])
    assert "the average (mean) of steps 2, 3, 4" in capsys.readouterr().out
    parts = [load_file(tmp_path / f"e{step}/model.safetensors") for step in (2, 3, 4)]
    for name, tensor in load_file(tmp_path / "mean/model.safetensors").items():
        assert torch.allclose(
            tensor.double(), torch.stack([p[name].double() for p in parts]).mean(0), rtol=0, atol=1e-7
        )
    with pytest.raises(ConfigError, match="the last 9 checkpoints: there are only 4"):
        run_verb(["average", str(tmp_path / "run"), "--last", "9", "--output", str(tmp_path / "no")])


def test_background_saves_hold_the_state_of_their_step(staged, tmp_path):
    """A save after every step, written while training goes on: each equals that of a run that waited."""
    path = staged([stage("s", tokens=2048)], checkpoint={"every_steps": 1, "keep_last": 8, "asynchronous": True})
    train(path)
    train(path, f"--run.directory={tmp_path / 'sync'}", "--checkpoint.asynchronous=false")
    for step in range(1, 9):
        both = []
        for run in (tmp_path / "run", tmp_path / "sync"):
            export(run, run / f"e{step}", step=step)
            both.append(load_file(run / f"e{step}/model.safetensors"))
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[0]), step

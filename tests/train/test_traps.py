"""The traps of continual pre-training that others fell into, each by name. Where another test holds the whole matter, it is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_runs import flags_of, world_size
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from samples import rate_at, tiny_config
from tolerances import LAYOUT

from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe
from megacpt.data.loader import StageData, open_domains, stage_orders
from megacpt.train import loop


def trained(path: str, flags: list[str]) -> None:
    loop.train(load_recipe(path, flags))


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("vocab", [401, 453])
def test_padded_rows_take_no_probability_and_export_as_if_they_were_not_there(
    recipe_file, tmp_path, tokenizer_dir, vocab
):
    """Megatron-Bridge 625 and 1853: a vocabulary that nothing divides, padded, on tp 4 as on one; zero steps in between change no bit."""
    from megacpt.checkpoint.export import export
    from megacpt.family.read import parse_config

    base, generator = tmp_path / "base", torch.Generator().manual_seed(0)
    base.mkdir()
    config = tiny_config(vocab_size=vocab, num_key_value_heads=4)
    shapes = parse_config(config, "t").shapes()
    save_file({n: 0.05 * torch.randn(s, generator=generator) for n, s in shapes.items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tokenizer_dir / name).read_bytes())
    path = recipe_file(model={"pretrained": str(base)})
    losses = {}
    for layout in ("dp1", "tp4"):
        run = tmp_path / layout
        common = ["--log.tensorboard=false", "--validation=[]", f"--run.directory={run}", "--precision.compute=float64"]
        on_ranks(world_size(layout), trained, path, [*common, *flags_of(layout)])
        losses[layout] = [row["loss"] for row in rows(run)]
        untouched = tmp_path / f"{layout}-0"
        flags = ["--log.tensorboard=false", "--validation=[]", f"--run.directory={untouched}", "--run.stop_at_step=0"]
        on_ranks(world_size(layout), trained, path, [*flags, *flags_of(layout)])
        export(untouched, untouched / "out")
        was, now = load_file(base / "model.safetensors"), load_file(untouched / "out/model.safetensors")
        assert was.keys() == now.keys() and all(torch.equal(was[n], now[n]) for n in was)
    assert losses["tp4"] == pytest.approx(losses["dp1"], rel=LAYOUT)


def test_the_stream_of_rows_outlives_a_change_of_weights_a_kill_and_another_number_of_ranks(recipe_file, tmp_path):
    """Order and weights are in no loader's state: after an adjustment, a stop and a resume on two data ranks, the same rows go on."""
    online = {
        "groups": {"all": ["a", "b"]},
        "online": {"every_tokens": 512, "alpha": 5.0, "dead_band": 0.0, "topic_weights": {"b": 0.0}},
    }
    path = recipe_file(mixture=online)
    flags = ["--log.tensorboard=false", "--validation=[]", "--precision.compute=float64"]
    on_ranks(1, trained, path, [*flags, f"--run.directory={tmp_path / 'one'}"])
    on_ranks(1, trained, path, [*flags, f"--run.directory={tmp_path / 'two'}", "--run.stop_at_step=5"])
    on_ranks(
        2,
        trained,
        path,
        [*flags, f"--run.directory={tmp_path / 'two'}", "--parallel.data_shard=2", "--parallel.micro_batch_tokens=64"],
    )
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["domain_tokens"] for row in two] == [row["domain_tokens"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-11)


def test_bfloat16_moments_train_resume_and_reshard_bit_for_bit(recipe_file, tmp_path):
    """optimizer.state_dtype = "bfloat16": a resume gives the same bits, and a checkpoint goes to another layout with its moments."""
    path, flags = recipe_file(), ["--log.tensorboard=false", "--validation=[]", "--optimizer.state_dtype=bfloat16"]
    on_ranks(1, trained, path, [*flags, f"--run.directory={tmp_path / 'one'}"])
    on_ranks(1, trained, path, [*flags, f"--run.directory={tmp_path / 'two'}", "--run.stop_at_step=4"])
    on_ranks(1, trained, path, [*flags, f"--run.directory={tmp_path / 'two'}"])
    assert [r["loss"] for r in rows(tmp_path / "one")] == [r["loss"] for r in rows(tmp_path / "two")]
    on_ranks(2, trained, path, [*flags, f"--run.directory={tmp_path / 'three'}", "--run.stop_at_step=4"])
    on_ranks(2, trained, path, [*flags, f"--run.directory={tmp_path / 'three'}", "--parallel.tensor=2"])
    one, three = ([r["loss"] for r in rows(tmp_path / name)] for name in ("one", "three"))
    assert three == pytest.approx(one, rel=2e-3) and three != one
    from megacpt.checkpoint.load import StoredModel

    newest = sorted((tmp_path / "three/checkpoints").glob("step-*"))[-1]
    assert StoredModel(newest).tensor("optim.exp_avg.model.norm.weight").dtype == torch.bfloat16


def test_parts_of_a_domain_come_in_numeric_order(tmp_path):
    """Llama-3-SynE's released code sorted part-10 before part-2."""
    from megacpt.data.manifest import expand_files, expand_paths

    for number in (10, 2, 1):
        (tmp_path / f"part-{number}.idx").touch()
        (tmp_path / f"part-{number}.jsonl").touch()
    assert [Path(p).name for p in expand_paths([str(tmp_path / "part-*")])] == ["part-1", "part-2", "part-10"]
    assert [Path(p).name for p in expand_files([str(tmp_path / "part-*.jsonl")])] == [
        "part-1.jsonl",
        "part-2.jsonl",
        "part-10.jsonl",
    ]


def test_a_wsd_under_a_batch_ramp_ends_at_its_minimum_at_the_last_token(recipe_file):
    """Megatron-Bridge 2609: schedules in steps never end under a ramp."""
    ramp = {"start": 128, "increment": 128, "over": 1500, "final": 512}
    for batch in ([["0", 128], ["700", 256], ["1500", 512]], ramp):
        recipe = load_recipe(recipe_file(), ["--stages.s.tokens=4000", "--stages.s.lr.min=0.0"])
        stage = type(recipe.stages[0]).model_validate(recipe.stages[0].model_dump() | {"batch_tokens": batch})
        recipe = recipe.model_copy(update={"stages": [stage]})
        clock = Clock(recipe)
        assert rate_at(recipe, clock, clock.num_steps) == 0
        assert rate_at(recipe, clock, clock.num_steps - 1) > 0


def test_a_mixture_keeps_its_shares_in_every_block_beside_an_ordered_domain(recipe_file):
    """Order and mixture exclude each other in SynE's train.py; here: tests/data/test_curriculum.py. The share of length that documents
    use is reported: a row of one document sees half its length in the mean, a row of many sees little."""
    recipe = load_recipe(recipe_file())
    clock, domains = Clock(recipe), open_domains(recipe, ["a", "b"])
    data = StageData(recipe, recipe.stages[0], stage_orders(recipe, clock)[0], domains, 0, 400)
    picks = data.picks(0, 1000)
    for begin in range(0, 1000, 100):
        share = np.mean([pick.domain == "a" for pick in picks[begin : begin + 100]])
        assert abs(share - 0.7) <= 0.02


def test_the_share_of_attended_length_is_in_the_metrics(recipe_file, tmp_path):
    trained(recipe_file(), ["--log.tensorboard=false", "--validation=[]"])
    recipe = load_recipe(recipe_file())
    data = StageData(
        recipe, recipe.stages[0], stage_orders(recipe, Clock(recipe))[0], open_domains(recipe, ["a", "b"]), 0, 400
    )  # fmt: skip
    first = rows(tmp_path / "run")[0]
    pairs = data.visible_pairs(data.picks(0, 4))
    assert first["attended_tokens"] == pytest.approx(pairs / 256, abs=0.06) and 0 < first["attended_share"] <= 1
    assert first["attended_share"] == pytest.approx(pairs / (4 * 64 * 65 / 2), abs=1e-4)


def losses_of_sequences(packed_tokens: int, **degrees) -> list[float]:
    """Summed loss of nine sequences of uneven lengths, so many tokens to a micro-batch, in float64."""
    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.evaluate.sequences import score_sequences
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.split import plan_pipeline
    from megacpt.parallel.mesh import build_mesh

    config, parallel = parse_config(tiny_config(num_hidden_layers=2), "t"), Parallel(**degrees)
    mesh, plan = build_mesh(Layout(**degrees), torch.device("cpu")), plan_pipeline(2, parallel)
    model = build_model(config, mesh, torch.float64, ModelOptions(), plan, sharding_of(parallel))
    initialize(model, config, 1)
    random, lengths = np.random.default_rng(0), [2, 31, 7, 18, 3, 40, 11, 5, 2]
    tokens = [random.integers(0, 400, n) for n in lengths]
    return score_sequences(model, lengths, lambda i: (tokens[i], 1), packed_tokens)[:, 0].tolist()


def test_a_packed_row_is_each_document_alone_under_context_and_pipeline():
    """One micro-batch of all on cp 2 and pp 2, beside each sequence alone on one process."""
    from functools import partial

    alone = on_ranks(1, partial(losses_of_sequences, 1))[0]
    for found in on_ranks(4, partial(losses_of_sequences, 128, context=2, pipeline=2)):
        assert np.allclose(found, alone, rtol=LAYOUT, atol=0)

"""Vocabulary growth: old ids stay, new rows are means of what spelled them, tied and untied, and the result trains on any tp."""

import json
import shutil

import pytest
import torch
from layout_runs import flags_of, world_size
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from samples import TEXTS, tiny_config

from megacpt.cli import run
from megacpt.config.load import load_recipe
from megacpt.data.prepare import Options, prepare
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError

CHINESE = ["中文分词模型的训练与扩展", "模型的训练需要大量的中文文本", "扩展词表以后中文文本更短"] * 20


@pytest.fixture(params=["bpe", "sentencepiece"])
def pair(request, tmp_path):
    """(old tokenizer, new one on Chinese) of one kind."""
    kinds = {}
    for name, texts, size in (("old", TEXTS, 420), ("new", CHINESE, 330)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        run(
            [
                "vocab",
                "train",
                str(path),
                "--output",
                str(tmp_path / name),
                "--type",
                request.param,
                "--vocab-size",
                str(size),
            ]
        )
        kinds[name] = tmp_path / name
    return kinds["old"], kinds["new"], request.param


def model_of(directory, tokenizer, tied: bool):
    """A tiny model with random weights."""
    vocab = Tokenizer(tokenizer).vocab_size
    config = tiny_config(vocab_size=vocab, tie_word_embeddings=tied)
    from megacpt.family.read import parse_config

    shutil.copytree(tokenizer, directory)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = parse_config(config, "t").shapes()
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, directory / "model.safetensors")
    return vocab


def spelled(entry: str) -> bytes:
    """What a part stands for: a byte, or its own characters."""
    return bytes([int(entry[3:5], 16)]) if entry.startswith("<0x") else entry.encode()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["mean", "weighted"])
def test_a_model_grows_by_the_means_of_what_spelled_its_new_tokens(pair, tmp_path, tied, init, capsys):
    old_dir, new_dir, _ = pair
    before = model_of(tmp_path / "model", old_dir, tied)
    sample = tmp_path / "sample.jsonl"
    sample.write_text(json.dumps({"text": CHINESE[0]}) + "\n")
    run(["vocab", "merge", str(old_dir), str(new_dir), "--output", str(tmp_path / "merged")])
    command = [
        "vocab",
        "expand",
        str(tmp_path / "model"),
        str(tmp_path / "merged"),
        "--output",
        str(tmp_path / "grown"),
    ]
    run([*command, "--init", init, "--sample", str(sample)])
    old, new = Tokenizer(old_dir), Tokenizer(tmp_path / "merged")
    assert new.vocab_size > before and all(old.decode([i]) == new.decode([i]) for i in range(before))
    shorter = len(new.encode_batch([CHINESE[0]])[0]) < len(old.encode_batch([CHINESE[0]])[0])
    assert shorter and new.decode(new.encode_batch([CHINESE[0]])[0]).strip() == CHINESE[0]
    assert all(new.encode_batch([text]) == old.encode_batch([text]) for text in TEXTS[:5])
    out = capsys.readouterr().out
    rates = [float(word) for word in out.split("characters a token")[0].split(":")[-1].replace("->", " ").split()]
    assert rates[1] > rates[0]
    was, now = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "grown/model.safetensors")
    assert was.keys() == now.keys()
    for name in was:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(was[name], now[name])
            continue
        assert now[name].shape[0] == new.vocab_size and torch.equal(now[name][:before], was[name])
        one = next(
            i
            for i in range(before, new.vocab_size)
            if "\ufffd" not in new.decode([i]) and len(new.decode([i]).strip()) > 1
        )
        parts = old.spell(new, one)
        assert b"".join(map(spelled, map(old.token, parts))) == new.token(one).encode()
        lengths = torch.tensor([max(1, len(old.decode([i]))) if init == "weighted" else 1 for i in parts]).double()
        want = (was[name][parts].double() * (lengths / lengths.sum())[:, None]).sum(0)
        assert torch.allclose(now[name][one].double(), want, atol=1e-6) and len(parts) > 1
        fragment = next((i for i in range(before, new.vocab_size) if "\ufffd" in new.decode([i])), None)
        if fragment is not None and init == "mean":  # a part of a character: by its bytes
            parts = old.spell(new, fragment)
            assert len(parts) > 1 and torch.allclose(now[name][fragment], was[name][parts].mean(0), atol=1e-6)
    assert json.loads((tmp_path / "grown/config.json").read_text())["vocab_size"] == new.vocab_size


def test_a_tokenizer_whose_ids_moved_is_refused(pair, tmp_path):
    old_dir, new_dir, _ = pair
    model_of(tmp_path / "model", new_dir, False)
    with pytest.raises(ConfigError, match="Old ids must stay|nothing to add"):
        run(["vocab", "expand", str(tmp_path / "model"), str(old_dir), "--output", str(tmp_path / "no")])


def trained(path: str, flags: list[str]) -> None:
    from megacpt.train import loop

    loop.train(load_recipe(path, flags))


def test_the_grown_model_trains_on_any_tp_and_exports_its_true_rows(tmp_path):
    """Embeddings first with the rest frozen, then all, on tp 1 and 2: the same losses, exactly the true rows in the export."""
    import tomli_w

    from megacpt.checkpoint.export import export

    text = tmp_path / "t.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in CHINESE + TEXTS))
    for name, texts, size in (("old", TEXTS, 420), ("new", CHINESE, 330)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        run(["vocab", "train", str(path), "--output", str(tmp_path / name), "--vocab-size", str(size)])
    model_of(tmp_path / "model", tmp_path / "old", False)
    run(["vocab", "merge", str(tmp_path / "old"), str(tmp_path / "new"), "--output", str(tmp_path / "merged")])
    run(["vocab", "expand", str(tmp_path / "model"), str(tmp_path / "merged"), "--output", str(tmp_path / "grown")])
    prepare([str(text)], str(tmp_path / "d"), Options(str(tmp_path / "grown")), workers=1)
    lr = {"shape": "constant", "peak": 1e-3}
    stage = {"tokens": 512, "seq_len": 64, "batch_tokens": 128, "mixture": {"d": 1.0}, "lr": lr}
    recipe = {
        "run": {"name": "t"}, "model": {"pretrained": str(tmp_path / "grown")}, "log": {"tensorboard": False, "peak_tflops": 1.0},
        "data": {"d": {"paths": [str(tmp_path / "d")]}}, "packing": {"directory": str(tmp_path / "packing")},
        "stages": [stage | {"name": "rows", "freeze": ["model.layers.*", "model.norm.weight"]}, stage | {"name": "all"}],
    }  # fmt: skip
    path = tmp_path / "r.toml"
    path.write_text(tomli_w.dumps(recipe))
    losses = {}
    for layout in ("dp1", "tp2"):
        flags = [f"--run.directory={tmp_path / layout}", "--precision.compute=float64", *flags_of(layout)]
        on_ranks(world_size(layout), trained, str(path), flags)
        rows = (tmp_path / layout / "metrics.jsonl").read_text().splitlines()
        losses[layout] = [json.loads(row)["loss"] for row in rows]
    assert losses["tp2"] == pytest.approx(losses["dp1"], rel=1e-12)
    export(tmp_path / "tp2", tmp_path / "out")
    size = Tokenizer(tmp_path / "grown").vocab_size
    assert size % 128 and load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].shape[0] == size

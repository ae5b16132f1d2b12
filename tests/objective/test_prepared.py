"""From a jsonl of prompts and answers, by the command line, to the loss: against transformers in float64 on the same documents."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from layout_runs import body, flags_of, world_size
from objective_runs import gradients_apart
from ranks import on_ranks
from references import reference
from samples import TEXTS, tiny_config, write_recipe
from tolerances import PARITY

from megacpt.cli import run
from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe
from megacpt.config.merge import objective_in
from megacpt.data.beside import RUN, write_weights
from megacpt.data.loader import StageData, open_domains, stage_orders
from megacpt.data.manifest import crc32_of
from megacpt.data.prepare import Options, prepare
from megacpt.data.tokenizer import Tokenizer
from megacpt.evaluate.validation import ValidationSets
from megacpt.plan.check import check
from megacpt.plan.describe import describe

BOUND = PARITY[torch.float64]
SEQ_LEN = 64
WORDS = [text.split() for text in TEXTS if len(text.split()) > 9]
PAIRS = [
    {
        "parts": [
            {"text": " ".join(words[: 3 + i % 4]), "weight": 0},
            {"text": " " + " ".join(words[8 : 10 + i % 3 + k]), "weight": [1, 0.3, 2.5][(i + k) % 3]},
            *([{"text": " " + words[-1], "weight": 0}] if k else []),
        ],
        "question": i,
    }
    for i, words in enumerate(WORDS[:60])
    for k in range(1 + i % 3 % 2)
]
"""One or two weighted answers to a question; the second one's end of text weighs nothing."""
NORMALIZE = ["weight", "token", "item"]
LAYOUTS = ["dp1", "tp2 cp2 pp2"]


class Made:
    """Prepared data, a model of transformers, and a recipe over both: domain a of pairs, domain b of plain text that is cut."""

    def __init__(self, folder: Path, prepared: Path, tokenizer_dir: Path):
        self.folder, self.tokenizer = folder, Tokenizer(tokenizer_dir)
        self.model = reference(tiny_config(), torch.float64)
        transformers.PreTrainedModel.save_pretrained(self.model, folder / "hf")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
        fields = ["--segments-field", "parts", "--item-field", "question"]
        output = ["--tokenizer", str(tokenizer_dir), "--output", str(folder / "pairs"), "--workers", "1"]
        run(["prepare", str(folder / "pairs.jsonl"), *output, *fields])
        data = {
            "a": {"paths": [str(folder / "pairs")], "holdout_documents": 7},
            "b": {"paths": [str(prepared / "b")], "holdout_documents": 2},
        }
        model = {"pretrained": str(folder / "hf"), "tokenizer": str(tokenizer_dir)}
        self.path = write_recipe(folder, prepared, tokenizer_dir, data=data, model=model)
        texts = [text for text in TEXTS[1::2] if text]
        plain = [[*ids, 0] for ids in self.tokenizer.encode_batch(texts)]
        self.documents = {
            "a": [(*self.weighed(record), f"question {record['question']}") for record in PAIRS],
            "b": [(ids, [1.0] * len(ids), None) for ids in plain],
        }

    def weighed(self, record: dict) -> tuple[list[int], list[float]]:
        """A text's ids, and the weight of the part in which each begins, found by decoding (the texts are ASCII)."""
        ids = self.tokenizer.encode_batch(["".join(part["text"] for part in record["parts"])])[0]
        characters = [part["weight"] for part in record["parts"] for _ in part["text"]]
        begins = np.cumsum([0, *(len(self.tokenizer.decode([token])) for token in ids)])
        assert begins[-1] == len(characters)
        return [*ids, 0], [*(characters[at] for at in begins[:-1]), record["parts"][-1]["weight"]]

    def losses(self, rows) -> list[tuple[torch.Tensor, torch.Tensor, object]]:
        """(negative log-likelihood, weight, item) of the labels of each piece of some packed rows, each piece alone."""
        found = []
        for name, number, pieces in rows:
            for document, offset, length in pieces:
                ids, weights, item = self.documents[name][document]
                tokens = torch.tensor(ids[offset : offset + length])
                scores = self.model(tokens[None]).logits[0, :-1].log_softmax(-1)
                nll = -scores.gather(1, tokens[1:, None]).squeeze(1)
                weight = torch.tensor(weights[offset + 1 : offset + length], dtype=torch.float32).double()
                found.append((nll, weight, (number, item) if item else (number, document, offset)))
        return found

    def rows_of_step(self, first: int, count: int):
        recipe = load_recipe(self.path)
        order, domains = stage_orders(recipe, Clock(recipe))[0], open_domains(recipe, ["a", "b"])
        data = StageData(recipe, recipe.stages[0], order, domains, 0, 401)
        picks = data.picks(first, count)
        return [(pick.domain, i, data.indices[pick.domain].row(pick.row)) for i, pick in enumerate(picks)]

    def expected(self, normalize: str) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss of the first step and every gradient, by autograd."""
        labels = self.losses(self.rows_of_step(0, 4))
        total = sum((weight * nll).sum() for nll, weight, _ in labels)
        if normalize == "weight":
            loss = total / sum(weight.sum() for _, weight, _ in labels)
        elif normalize == "token":
            loss = total / sum((weight > 0).sum() for _, weight, _ in labels)
        else:
            items: dict = {}
            for nll, weight, item in labels:
                above, below = items.get(item, (0.0, 0.0))
                items[item] = above + (weight * nll).sum(), below + weight.sum()
            means = [above / below for above, below in items.values() if below > 0]
            assert len(means) < len(labels), "some items are of two documents"
            loss = sum(means) / len(means)
        self.model.zero_grad()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def train(self, normalize: str, layout: str, breakage: str = "", more: tuple[str, ...] = ()):
        """(loss of the first step, gradients there by rank)."""
        directory = self.folder / f"{normalize}-{layout}-{breakage}-{len(more)}".replace(" ", "_")
        flags = [
            "--log.tensorboard=false", "--precision.compute=float64", f"--run.directory={directory}", "--run.stop_at_step=1",
            f"--objective.normalize={normalize}", *flags_of(layout), *more,
        ]  # fmt: skip
        ranks = on_ranks(world_size(layout), body, self.path, flags, breakage)
        self.events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
        return ranks[0]["numbers"][0][0], [rank["first"] for rank in ranks]

    def distance(self, normalize: str, layout: str, breakage: str = "") -> float:
        """The larger relative difference of loss and gradients from transformers'."""
        loss, gradients = self.train(normalize, layout, breakage, ("--validation=[]",))
        want, exact = self.expected(normalize)
        return max(abs(loss - want) / want, gradients_apart(gradients, exact))


@pytest.fixture(scope="module")
def made(tmp_path_factory, prepared, tokenizer_dir):
    return Made(tmp_path_factory.mktemp("made"), prepared, tokenizer_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_prepared_weights_reach_the_loss_and_every_gradient(made, normalize, layout):
    assert made.distance(normalize, layout) < BOUND


@pytest.mark.parametrize(
    "normalize, breakage",
    [
        ("weight", "weights_of_the_token_before"),
        ("weight", "all_labels_counted"),
        ("token", "all_labels_counted"),
        ("item", "documents_alone"),
    ],
)
def test_the_comparison_sees_broken_weights(made, normalize, breakage):
    assert made.distance(normalize, "dp1", breakage) > 1e-4


@pytest.mark.parametrize("layout", ["dp1", "cp2 dp2"])
def test_validation_is_the_weighted_mean_with_its_error(made, layout):
    """Of the held-out documents, which tear no pair apart; the standard error is that of a ratio of sums."""
    made.train("token", layout)
    found = next(event["losses"] for event in made.events if event["kind"] == "validation")
    sets = ValidationSets(load_recipe(made.path), SEQ_LEN)
    for name, (index, count) in sets.rows.items():
        with torch.no_grad():
            labels = made.losses([(name, row, index.row(row)) for row in range(count)])
        nll, weight = (torch.cat([label[i] for label in labels]) for i in (0, 1))
        mean = (weight * nll).sum() / weight.sum()
        assert abs(found[name] - mean) / mean < BOUND
        questions = [item for *_, item in labels] if name == "a" else []
        assert all(sum(d[2] == q[1] for d in made.documents["a"]) == questions.count(q) for q in questions)
    plain = nll.mean()
    assert abs(found["b"] - plain) / plain < BOUND, "a domain without weights: the plain mean"


def test_the_error_of_a_weighted_mean():
    from megacpt.evaluate.validation import _mean_and_error

    random = np.random.default_rng(0)
    x, w = random.random(50), random.choice([0, 0.5, 1, 3], 50)
    sums = [(w * x).sum(), ((w * x) ** 2).sum(), w.sum(), (w * w * x).sum(), (w * w).sum()]
    found, mean = _mean_and_error(*sums), np.average(x, weights=w)
    assert abs(found.mean - mean) < 1e-15
    assert abs(found.error - math.sqrt((w**2 * (x - mean) ** 2).sum()) / w.sum()) < 1e-15
    sums = [x.sum(), (x**2).sum(), 50.0, x.sum(), 50.0]
    mean = x.sum() / 50
    assert _mean_and_error(*sums).error == math.sqrt(((x**2).sum() / 50 - mean * mean) / 50), (
        "to the bit as without weights"
    )


def test_weights_of_one_and_no_weights_train_alike_to_the_bit(tmp_path, tokenizer_dir, prepared):
    """In fp32: metrics, validation and gates' numbers of a set that says 1 of every token in runs, and of one that says nothing."""
    found = {}
    for kind in ("plain", "weighted"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        prepare([str(folder / "a.jsonl")], str(folder / "a"), Options(str(tokenizer_dir)), workers=1)
        if kind == "weighted":
            weigh_all_as_one(folder / "a")
        data = {name: {"paths": [str(folder / "a")], "holdout_documents": 5} for name in "ab"}
        path = write_recipe(folder, prepared, tokenizer_dir, data=data)
        flags = [f"--run.directory={folder / 'run'}", "--log.tensorboard=false"]
        on_ranks(1, body, path, flags, "")
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        events = [json.loads(line) for line in (folder / "run/events.jsonl").read_text().splitlines()]
        losses = [event["losses"] for event in events if event["kind"] == "validation"]
        found[kind] = [(row["step"], row["loss"], row["grad_norm"]) for row in rows], losses
    assert len(found["plain"][0]) == 8 and len(found["plain"][1]) >= 2
    assert found["plain"] == found["weighted"]


def weigh_all_as_one(prefix: Path) -> None:
    """PREFIX.weights with a run of weight 1 for every document, under the set's manifest."""
    from megacpt.data.indexed import IndexedDataset

    lengths = IndexedDataset(prefix).lengths
    runs = np.array([(n, 1.0) for n in lengths], RUN)
    target = prefix.with_name("a.weights")
    write_weights(target, [np.ones(len(lengths), np.int32)], [runs], (len(lengths), len(lengths)))
    manifest = json.loads(prefix.with_name("a.json").read_text())
    manifest["weights"] = {"bytes": target.stat().st_size, "crc32": crc32_of(target)}
    prefix.with_name("a.json").write_text(json.dumps(manifest))


def test_a_stage_has_an_objective_of_its_own(made):
    recipe = load_recipe(
        made.path, ["--objective.normalize=item", '--stages.s.objective={kind = "next_token", normalize = "token"}']
    )
    assert recipe.objective.normalize == "item" and objective_in(recipe, recipe.stages[0]).normalize == "token"
    told = "\n".join(describe(check(recipe, 1).facts))
    assert "stage s: objective next_token, normalized by token" in told
    plain = load_recipe(made.path)
    assert objective_in(plain, plain.stages[0]).normalize == "weight"


def test_inspect_shows_what_each_token_weighs(made, capsys, tmp_path, monkeypatch):
    """Marks in a file, colours on a terminal; and the arrays."""
    run(["inspect", made.path, "--step", "1", "--decode", "--output", str(tmp_path / "b.npz")])
    told = capsys.readouterr().out
    rows = made.rows_of_step(0, 4)
    labels = made.losses(rows)
    heavy, weight = sum(int((w > 0).sum()) for _, w, _ in labels), sum(float(w.sum()) for _, w, _ in labels)
    assert f"({heavy:,} with a weight above 0, {weight:.6g} in all)" in told
    pieces = next(pieces for name, _, pieces in rows if name == "a")
    prompt, answer, *_ = PAIRS[pieces[0][0]]["parts"]
    mark = f"<{answer['weight']:.6g}>"
    assert f"<0>{prompt['text']!r} {mark}" in told and f"{answer['text']}" in told
    arrays = np.load(tmp_path / "b.npz")
    at = np.where(arrays["labels"] >= 0, arrays["weights"], 0)
    assert abs(at.sum(dtype=np.float64) - weight) < 1e-9 and len(arrays["item"]) == len(arrays["document_starts"])
    assert len(set(arrays["item"].tolist())) < len(arrays["item"])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    run(["inspect", made.path, "--step", "1", "--decode"])
    assert f"\x1b[2m<0>{prompt['text']!r}\x1b[0m" in capsys.readouterr().out

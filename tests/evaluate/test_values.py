"""The numbers that gates decide on, against models made to answer right or wrong, and the FLOPs of MFU against a calculation by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples import tiny_config

from megacpt.data.questions import Question
from megacpt.data.tokenizer import Tokenizer
from megacpt.evaluate import sequences
from megacpt.evaluate.choices import accuracy
from megacpt.evaluate.needle import place_needles, run_needles
from megacpt.family.read import parse_config
from megacpt.family.shapes import ARCHITECTURES
from megacpt.model.build import build_model
from megacpt.model.decoder import ModelOptions
from megacpt.model.flops import step_flops


def test_the_flops_of_8b_by_hand():
    """Llama 3.1 8B: a layer has 4096 x 6144 (q, k, v), 4096 x 4096 (o), 3 x 4096 x 14336 weights, the head 4096 x 128256. 6 FLOPs a weight
    and token; attention 12 x 4096 a pair and layer. Rows of 8,192 tokens."""
    config = parse_config(ARCHITECTURES["llama3.1-8b"], "8b")
    dense, exact = step_flops(config, 8192, 8192, 8192 * 8193 // 2)
    assert dense == 8192 * (45_027_950_592 + 1_572_864 * 8192) == 474_422_087_516_160
    assert exact == 8192 * 45_027_950_592 + 1_572_864 * 33_558_528
    _, halves = step_flops(config, 8192, 8192, 2 * 4096 * 4097 // 2)  # two documents of 4,096
    assert halves == 8192 * 45_027_950_592 + 1_572_864 * 16_781_312


class Liking:
    """A real model that says the same distribution everywhere: one token is likely, another unlikely."""

    def __init__(self, mesh, likely: int, unlikely: int):
        config = parse_config(tiny_config(), "liking")
        self.model = build_model(config, mesh, torch.float32, ModelOptions())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                local = parameter._local_tensor
                local.fill_(0.0 if "proj" in name or name == "lm_head.weight" else 1.0)
                if name == "lm_head.weight":
                    local[likely], local[unlikely] = 0.2, -0.2


QUESTIONS = [
    Question("The order of data is", ("xx", "yy", "zz"), 0),
    Question("return the mesh for import in", ("yy", "xx"), 1),
    Question("while loss", ("zz", "yy", "xx", "yy"), 2),
    Question("if self", ("xx", "zz"), 1),
]
"""Three are right for who likes x, the last for who does not."""


@pytest.mark.parametrize("likes, dislikes, right", [("x", "z", 0.75), ("z", "x", 0.25), ("y", "z", 0.0)])
def test_accuracy_of_a_model_that_likes_a_letter(mesh, tokenizer_dir, likes, dislikes, right):
    tokenizer = Tokenizer(tokenizer_dir)

    def last(letter):
        return tokenizer.encode_batch([f"a {letter}{letter}"])[0][-1]

    model = Liking(mesh, last(likes), last(dislikes)).model
    assert accuracy(model, QUESTIONS, tokenizer, 64, 64) == right


class Oracle:
    """Stands for the forward: predicts every label of a sequence but those of sequences that it misses."""

    def __init__(self, misses):
        self.misses, self.seen = misses, 0

    def __call__(self, model, count, batch_of, use):
        for number in range(count):
            batch = batch_of(number)
            labels = torch.from_numpy(batch.labels.reshape(-1))
            right = labels >= 0
            starts = batch.document_starts.tolist()
            for begin, end in zip(starts, [*starts[1:], len(labels)], strict=True):
                if not right[begin:end].any():
                    continue  # filling
                if self.misses(self.seen):  # one token of the answer is wrong
                    right[begin + int(right[begin:end].nonzero()[0])] = False
                self.seen += 1
            inputs = SimpleNamespace(plan=SimpleNamespace(tokens=np.arange(len(labels))), labels=labels)
            use(number, inputs, torch.where(labels >= 0, 1.0, 0.0), right)


@pytest.mark.parametrize(
    "misses, expected",
    [
        (lambda n: False, [[1, 1, 1], [1, 1, 1]]),
        (lambda n: True, [[0, 0, 0], [0, 0, 0]]),
        (lambda n: n % 2 == 1, [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]),  # one of the two needles of each book
        (lambda n: n >= 6, [[1, 1, 1], [0, 0, 0]]),  # the longer length is beyond it
    ],
)
def test_recall_of_a_model_that_finds_what_it_finds(mesh, tokenizer_dir, monkeypatch, misses, expected):
    tokenizer = Tokenizer(tokenizer_dir)
    oracle = Oracle(misses)
    monkeypatch.setattr(sequences, "forward_losses", oracle)
    hay = np.array(tokenizer.encode_batch(["the order of data is a mesh. " * 400])[0], np.int64)
    grid = run_needles(
        SimpleNamespace(mesh=mesh), tokenizer, hay, [512, 1024], depths=3, inserted=3, asked=2, micro_batch_tokens=2048, seed=5
    )  # fmt: skip
    assert oracle.seen == 2 * 3 * 2
    assert grid.recall.tolist() == expected and grid.depths == (0.0, 0.5, 1.0)
    assert grid.mean == np.mean(expected)


def test_what_is_asked_of_the_model_is_the_number_in_the_book(mesh, tokenizer_dir, monkeypatch):
    """Every sequence is as long as was asked, ends with the answer, and holds its needle at its depth."""
    tokenizer, books = Tokenizer(tokenizer_dir), []

    def read_books(model, count, batch_of, use):
        for number in range(count):
            batch = batch_of(number)
            books.append((batch.tokens.reshape(-1), batch.labels.reshape(-1)))

    monkeypatch.setattr(sequences, "forward_losses", read_books)
    hay = np.array(tokenizer.encode_batch(["x " * 4000])[0], np.int64)
    run_needles(SimpleNamespace(mesh=mesh), tokenizer, hay, [600], 3, 1, 1, micro_batch_tokens=600, seed=1)
    assert len(books) == 3
    places = []
    for tokens, labels in books:
        assert len(tokens) == 600
        answer = tokenizer.decode(labels[labels >= 0].tolist()).strip()
        book = tokenizer.decode(tokens.tolist())
        assert len(answer) == 7 and answer.isdigit()
        assert f"number is: {answer}." in book and book.rstrip().endswith(answer)
        places.append(book.index(f"number is: {answer}.") / len(book))
    assert places[0] < 0.25 < places[1] < 0.6 < places[2]


def test_needles_stand_evenly_after_the_first():
    hay = np.arange(100, dtype=np.int64)
    needles = [np.array([1000]), np.array([1001])]
    placed = place_needles(hay, needles, 0.5, frozenset()).tolist()
    assert placed.index(1000) == 50 and placed.index(1001) == 76
    assert [token for token in placed if token < 1000] == list(range(100))
    assert place_needles(hay, needles[:1], 0.5, frozenset({47})).tolist().index(1000) == 48  # behind the sentence's end

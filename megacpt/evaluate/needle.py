"""Needle in a haystack without a key cache: the answer is appended and one forward decides, right if every token of the answer is the
most probable (EasyContext's form of Kamradt's test; several needles as in Llama 3, arXiv 2407.21783, section 5.2.6).
"""

from dataclasses import dataclass

import numpy as np

from megacpt.data.packing import PackingIndex
from megacpt.data.tokenizer import Tokenizer
from megacpt.evaluate.sequences import score_sequences
from megacpt.model.decoder import Decoder

CITIES = ("Singapore", "Paris", "Nairobi", "Lima", "Oslo", "Hanoi", "Quito", "Cairo", "Seoul", "Dublin")
OPENING, CLOSING = "This is a very long story book: <book>", "</book>.\nBased on the content of the book, Question: "


@dataclass(frozen=True)
class Grid:
    """Recall by length and depth, each the mean over the needles that are asked for."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    recall: np.ndarray
    """[lengths, depths]."""

    @property
    def mean(self) -> float:
        return float(self.recall.mean())


def hay_of(index: PackingIndex, tokens: int) -> np.ndarray:
    """Tokens of a domain's packed documents one behind the other, as many as are needed (repeated if they are few)."""
    pieces, total = [], 0
    for row in range(index.num_rows):
        for document, offset, length in index.row(row):
            pieces.append(index.domain.read(document, offset, length))
            total += length
        if total >= tokens:
            break
    joined = np.concatenate(pieces)
    return np.tile(joined, -(-tokens // len(joined)))[:tokens].astype(np.int64)


def place_needles(hay: np.ndarray, needles: list[np.ndarray], depth: float, ends: frozenset[int]) -> np.ndarray:
    """The hay with needles in it: the first at `depth` (0 to 1), the others evenly behind it, each after a token that ends a sentence
    where one is near."""
    step = (1 - depth) / len(needles)
    parts, begin = [], 0
    for i, needle in enumerate(needles):
        at = max(begin, round((depth + i * step) * len(hay)))
        near = next((j for j in range(at, max(begin, at - 64), -1) if j < len(hay) and int(hay[j - 1]) in ends), at)
        parts += [hay[begin:near], needle]
        begin = near
    return np.concatenate([*parts, hay[begin:]])


def run_needles(
    model: Decoder,
    tokenizer: Tokenizer,
    hay: np.ndarray,
    lengths: list[int],
    depths: int,
    inserted: int,
    asked: int,
    micro_batch_tokens: int,
    seed: int,
) -> Grid:
    """All ranks call it and get the same grid.

    Args:
        hay: at least as many tokens as the longest length.
    """

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode_batch([text])[0], np.int64)

    opening = np.concatenate(
        [np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int64), encode(OPENING)]
    )
    ends = frozenset(int(encode(text)[-1]) for text in ("end.", "end.\n", "End。"))
    random = np.random.default_rng(seed)
    places = tuple(i / max(1, depths - 1) for i in range(depths))
    cases: list[tuple[int, int, np.ndarray, int]] = []
    for row, length in enumerate(lengths):
        for column, depth in enumerate(places):
            cities = [CITIES[i] for i in random.permutation(len(CITIES))[:inserted]]
            numbers = [int(n) for n in random.integers(1_000_000, 9_999_999, inserted)]
            needles = [
                encode(f"\nThe special magic {c} number is: {n}.\n") for c, n in zip(cities, numbers, strict=True)
            ]
            for i in random.permutation(inserted)[:asked]:
                what = f"the special magic {cities[i]} number"
                question = encode(f"{CLOSING}What is {what}? Answer: T{what[1:]} is:")
                answer = encode(f" {numbers[i]}")
                room = length - len(opening) - len(question) - len(answer) - sum(map(len, needles))
                book = place_needles(hay[: max(0, room)], needles, depth, ends)
                whole = np.concatenate([opening, book, question, answer])
                cases.append((row, column, whole, len(whole) - len(answer)))
    sums = score_sequences(model, [len(c[2]) for c in cases], lambda i: (cases[i][2], cases[i][3]), micro_batch_tokens)
    recall = np.zeros((len(lengths), depths))
    for (row, column, _, _), (_, right, predicted) in zip(cases, sums, strict=True):
        recall[row, column] += (right == predicted) / asked
    return Grid(tuple(lengths), places, recall)


def heat_map(grid: Grid) -> np.ndarray:
    """uint8 [height, width, 3]: green where everything was found, red where nothing; columns are lengths, rows depths."""
    from PIL import Image, ImageDraw

    cell_w, cell_h, left, top = 72, 22, 60, 24
    picture = Image.new("RGB", (left + cell_w * len(grid.lengths), top + cell_h * len(grid.depths)), "white")
    draw = ImageDraw.Draw(picture)
    for column, length in enumerate(grid.lengths):
        draw.text((left + column * cell_w + 6, 6), f"{length}", fill="black")
        for row, depth in enumerate(grid.depths):
            value = float(grid.recall[column, row])
            x, y = left + column * cell_w, top + row * cell_h
            draw.rectangle(
                (x, y, x + cell_w - 2, y + cell_h - 2), fill=(int(220 - 160 * value), int(60 + 140 * value), 70)
            )
            draw.text((x + 6, y + 4), f"{value:.2f}", fill="black")
            if column == 0:
                draw.text((6, y + 4), f"{100 * depth:.0f} %", fill="black")
    return np.asarray(picture)

"""A topic for every document: a linear model over hashed character n-grams (scikit-learn), trained from labelled examples. Character
n-grams need no word borders, so Chinese works as English does. Stored as numpy arrays and JSON, never a pickle. Imports no torch.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.records import BadLine, Fields
from megacpt.data.text import cut, find_files, read_piece
from megacpt.errors import ConfigError, DataError
from megacpt.files import new_file, new_folder, read_object, remove_abandoned, write_atomically

FORMAT = 1
BATCH = 512


class Topics:
    """A trained model.

    Attributes:
        names: of the topics. weights: fp32 [topics, features]. bias: fp32 [topics].
        settings: of the hashing: features (a power of two), ngrams, characters (of a document that are looked at).
    """

    def __init__(self, names: list[str], weights: np.ndarray, bias: np.ndarray, settings: dict[str, Any]):
        self.names, self.bias, self.settings = names, bias, settings
        self.columns = np.ascontiguousarray(weights.T)  # [features, topics]: a row for each n-gram
        self.hasher = hasher_of(settings)

    def label(self, texts: list[str]) -> list[str]:
        most = self.settings["characters"]
        scores = self.hasher.transform([text[:most] for text in texts]) @ self.columns + self.bias
        return [self.names[i] for i in scores.argmax(1)]

    def save(self, directory: Path) -> None:
        if directory.exists():
            raise ConfigError([f"{directory}: exists. Give another --output or remove it."], "the arguments")
        facts = {"format": FORMAT, "names": self.names, **self.settings}
        with new_folder(directory) as partial:
            np.savez_compressed(partial / "weights.npz", weights=self.columns.T, bias=self.bias)
            write_atomically(partial / "topics.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Topics":
        try:
            facts = read_object(directory / "topics.json", 1 << 28)
            with np.load(directory / "weights.npz", allow_pickle=False) as arrays:
                weights, bias = arrays["weights"], arrays["bias"]
            settings = {key: facts[key] for key in ("features", "ngrams", "characters")}
            if facts["format"] != FORMAT or weights.shape != (len(facts["names"]), settings["features"]):
                raise ValueError(f"format {facts['format']}, weights {weights.shape}, {len(facts['names'])} names")
            if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
                raise ValueError("weights that are not finite")
        except Exception as error:  # a damaged archive can raise anything
            raise DataError(f"{directory}: no model of topics ({type(error).__name__}: {error}).") from None
        return cls(facts["names"], weights, bias, settings)


def hasher_of(settings: dict[str, Any]):
    """The hashing alone."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError:
        raise ConfigError(
            ["megacpt topics: needs scikit-learn. pip install 'megacpt[topics]'."], "the packages"
        ) from None
    return HashingVectorizer(
        analyzer="char", ngram_range=tuple(settings["ngrams"]), n_features=settings["features"], alternate_sign=False,
        norm="l2", lowercase=True,
        dtype=np.float32,  # pyright: ignore[reportArgumentType] scikit-learn documents it; its annotation is the default's type
    )  # fmt: skip


def train(
    inputs: list[str], output: Path, text_field: str, label_field: str, features: int, seed: int, epochs: int
) -> dict[str, Any]:
    """Trains on labelled records and writes the model. Returns what a tenth of them, held out, say: {"examples", "accuracy", "by_topic"}.

    Raises:
        DataError: for fewer than two topics, or one with fewer than ten examples.
    """
    from sklearn.linear_model import SGDClassifier

    settings = {"features": features, "ngrams": [1, 3], "characters": 4096}
    texts, labels = [], []
    for text, label in _records(inputs, text_field, label_field):
        texts.append(text[: settings["characters"]])
        labels.append(label)
    counts = Counter(labels)
    few = [f"{name!r} ({count})" for name, count in sorted(counts.items()) if count < 10]
    if len(counts) < 2 or few:
        raise DataError(
            f"{len(texts)} examples of {len(counts)} topics; at least two topics with ten examples each. "
            f"Too few: {', '.join(few) or 'topics'}."
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    held, used = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    hasher = hasher_of(settings)
    matrix = hasher.transform(texts)
    names = sorted(counts)
    number = np.array([names.index(label) for label in labels])
    model = SGDClassifier(
        loss="log_loss", alpha=1e-6, max_iter=epochs, random_state=seed, class_weight="balanced",
        tol=None,  # pyright: ignore[reportArgumentType] as above
    )  # fmt: skip
    model.fit(matrix[used], number[used])
    weights, bias = _by_topic(model, len(names))
    topics = Topics(names, weights, bias, settings)
    topics.save(output)
    found = np.array([names.index(name) for name in topics.label([texts[i] for i in held])])
    by_topic = {
        name: float((found[number[held] == i] == i).mean()) for i, name in enumerate(names) if (number[held] == i).any()
    }
    return {"examples": len(texts), "accuracy": float((found == number[held]).mean()), "by_topic": by_topic}


def _by_topic(model, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights with a row for each topic; of two, scikit-learn keeps one row."""
    weights = np.zeros((count, model.coef_.shape[1]), np.float32)
    bias = np.zeros(count, np.float32)
    if len(model.classes_) == 2:
        weights[model.classes_[1]], bias[model.classes_[1]] = model.coef_[0], model.intercept_[0]
    else:
        weights[model.classes_], bias[model.classes_] = model.coef_, model.intercept_
    return weights, bias


def label(inputs: list[str], model: Path, output: Path, text_field: str, label_field: str) -> dict[str, int]:
    """Writes {text, label} records of all documents, the file in whole or not at all. Returns documents by topic."""
    if output.exists():
        raise ConfigError([f"{output}: exists. Give another --output or remove it."], "the arguments")
    topics, counts = Topics.load(model), Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(output.parent)
    waiting: list[str] = []
    with new_file(output) as partial, open(partial, "w", encoding="utf-8") as file:

        def flush() -> None:
            for text, name in zip(waiting, topics.label(waiting) if waiting else [], strict=True):
                counts[name] += 1
                file.write(json.dumps({text_field: text, label_field: name}, ensure_ascii=False) + "\n")
            waiting.clear()

        for text, _ in _records(inputs, text_field, None):
            waiting.append(text)
            if len(waiting) == BATCH:
                flush()
        flush()
    return dict(counts)


def _records(inputs: list[str], text_field: str, label_field: str | None) -> Iterator[tuple[str, str]]:
    for piece in cut(find_files(inputs, "auto")):
        for record, _ in read_piece(piece, Fields(text_field, label_field)):
            if isinstance(record, BadLine):
                raise DataError(f"{record.path}:{record.line}: {record.reason}")
            if record.text:
                yield record.text, record.label

"""Multiple-choice tasks: a question is right if its answer has the highest log-likelihood a token of all choices."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import DataError
from megacpt.evaluate.sequences import score_sequences
from megacpt.model.llama import Llama


@dataclass(frozen=True)
class Question:
    question: str
    choices: tuple[str, ...]
    answer: int


def read_task(path: str) -> list[Question]:
    """Lines of {"question": text, "choices": [texts], "answer": number from 0 or the text of the choice}.

    Raises:
        DataError: with the first line that is none.
    """
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            choices = tuple(row["choices"])
            answer = row["answer"] if isinstance(row["answer"], int) else choices.index(row["answer"])
            if not all(isinstance(text, str) and text for text in (row["question"], *choices)):
                raise ValueError("question and choices are texts")
            if not 0 <= answer < len(choices) or len(choices) < 2:
                raise ValueError(f"answer {answer} of {len(choices)} choices")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}, line {number}: no question ({error}). Write {{"question": "...", "choices": ["...", "..."], "answer": 0}}.'
            ) from None
        questions.append(Question(row["question"], choices, answer))
    if not questions:
        raise DataError(f"{path}: holds no question.")
    return questions


def accuracy(
    model: Llama, questions: list[Question], tokenizer: Tokenizer, seq_len: int, micro_batch_tokens: int
) -> float:
    """Share of questions that the model answers right. All ranks call it and get the same number.

    Args:
        seq_len: longest sequence; of a longer question the beginning is cut.
    """
    sequences, owners = [], []
    for number, question in enumerate(questions):
        heads = tokenizer.encode_batch([question.question] * len(question.choices))
        both = tokenizer.encode_batch([f"{question.question} {choice}" for choice in question.choices])
        for head, whole in zip(heads, both, strict=True):
            shared = next(
                (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
            )
            first = max(
                1, min(shared, len(whole) - 1)
            )  # where the two part: the end of the question may melt into the choice
            cut = max(0, len(whole) - seq_len)
            sequences.append((np.array(whole[cut:], np.int64), max(1, first - cut)))
            owners.append(number)
    sums = score_sequences(model, [len(tokens) for tokens, _ in sequences], lambda i: sequences[i], micro_batch_tokens)
    mean = np.round(sums[:, 0] / np.maximum(1, sums[:, 2]), 6)  # ties fall to the first choice on every layout
    right = at = 0
    for question in questions:
        right += int(np.argmin(mean[at : at + len(question.choices)])) == question.answer
        at += len(question.choices)
    return right / len(questions)

"""Multiple-choice questions: one JSON object a line. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from megacpt.errors import DataError
from megacpt.files import parse_object


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
            row = parse_object(line)
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

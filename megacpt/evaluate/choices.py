"""Multiple-choice tasks: a question is right if its answer has the highest log-likelihood a token of all choices."""

import numpy as np

from megacpt.data.questions import Question
from megacpt.data.tokenizer import Tokenizer
from megacpt.evaluate.sequences import score_sequences
from megacpt.model.decoder import Decoder


def accuracy(
    model: Decoder, questions: list[Question], tokenizer: Tokenizer, seq_len: int, micro_batch_tokens: int
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

# SPDX-License-Identifier: Apache-2.0
"""Rows of documents and a question, in tokens: what models learn to recall from, and are asked."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from training.text.fact_writer import write_facts


# The number of a document that padding belongs to, and what a token without a label has.
PADDING, IGNORED = -1, -100


class Row(NamedTuple):
    """Documents and a question, in tokens. `answers` numbers the answer that each token of the question belongs to.

    Tokens that belong to none have -1. `asked` are the documents that hold an answer.
    """

    documents: list[list[int]]
    question: list[int]
    answers: list[int]
    asked: list[int]


def facts_row(
    rng: random.Random, num_documents: int, num_questions: int, encode: Callable[[str], list[int]], eos_token_id: int
) -> Row:
    """Return documents with a fact each, and questions about some of them. An end of text follows each answer.

    Args:
        rng: all draws come from it.
        encode: returns the tokens of a text.
    """
    documents, questions = write_facts(rng, num_documents, num_questions)
    tokens, answers = [], []
    for number, question in enumerate(questions):
        text, answer = encode(question.text), [*encode(f" {question.answer}."), eos_token_id]
        tokens += [*text, *answer]
        answers += [-1] * len(text) + [number] * len(answer)
    return Row([encode(text) for text in documents], tokens, answers, [one.asked for one in questions])


def features(row: Row) -> dict[str, list[int]]:
    """Return a row as one text, each a list of T numbers.

    Returns:
        `input_ids`; `document_ids`, those of the question after all; `is_question`; `answers`, the number of the
        answer that a token belongs to, or -1; `labels`, which are the tokens of answers.
    """
    parts = [*row.documents, row.question]
    num_before = sum(map(len, row.documents))
    ids, answers = [token for part in parts for token in part], [-1] * num_before + row.answers
    return {
        "input_ids": ids,
        "document_ids": [number for number, part in enumerate(parts) for _ in part],
        "is_question": [0] * num_before + [1] * len(row.question),
        "answers": answers,
        "labels": [IGNORED if answer < 0 else token for token, answer in zip(ids, answers, strict=True)],
    }


def window_features(input_ids: list[int]) -> dict[str, list[int]]:
    """Return a window of a text in the form of [`features`]: one document, of which each token is predicted."""
    length, ids = len(input_ids), list(input_ids)
    zeros, none = [0] * length, [-1] * length
    return {"input_ids": ids, "document_ids": zeros, "is_question": zeros, "answers": none, "labels": ids}


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return rows as a batch `(B, T)`, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fillings = {"input_ids": 0, "document_ids": PADDING, "is_question": 0, "answers": -1, "labels": IGNORED}
    batch = {
        name: torch.tensor([row[name] + [filling] * (length - len(row[name])) for row in rows])
        for name, filling in fillings.items()
    }
    return batch | {"is_question": batch["is_question"].bool()}


def fact_texts(max_documents: int, num_rows: int = 1000) -> Iterator[str]:
    """Yield documents, questions and answers, of which a tokenizer learns their words."""
    rng = random.Random("texts of facts")
    for _ in range(num_rows):
        documents, questions = write_facts(rng, max_documents, max_documents)
        yield from documents
        yield from (f"{one.text} {one.answer}." for one in questions)


class FactRows(Dataset):
    """Rows of facts of at most so many tokens, each made from `(split, index)` alone: so a training resumes exactly.

    Args:
        tokenizer: of the model.
        length: the most tokens of a row. Of too long rows documents are left out, with what is asked of them.
        num_rows: how many.
        split: another name gives other rows.
        max_documents, num_questions: of each row, at most.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        num_rows: int,
        split: str,
        max_documents: int,
        num_questions: int,
    ):
        self.tokenizer, self.length, self.num_rows, self.split = tokenizer, length, num_rows, split
        self.max_documents, self.num_questions = max_documents, num_questions

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> Row:
        """Return a row.

        Raises:
            IndexError: there are fewer.
            ValueError: a document and a question are too long together.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        rng = random.Random(f"facts {self.split} {index}")
        for num_documents in range(1 + int(rng.random() * self.max_documents), 0, -1):
            num_questions = min(num_documents, self.num_questions)
            row = facts_row(rng, num_documents, num_questions, self._encode, self.tokenizer.eos_token_id)
            if sum(map(len, row.documents)) + len(row.question) <= self.length:
                return row
        raise ValueError(f"a document and a question take more than {self.length} tokens: raise the context_length")

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return features(self.row(index))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, split_special_tokens=True)["input_ids"]
        return ids

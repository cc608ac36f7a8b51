# SPDX-License-Identifier: Apache-2.0
"""Recall: several documents, each read alone, and a question that one or more of them answer.

Three kinds of documents have one form:

- `pairs`: keys and values, each key once in a row; the question names keys (multi-query associative recall, Zoology,
  arXiv 2312.04927, whose pairs are spread over documents here);
- `facts`: fact documents of `training.text.fact_writer`; the questions are in words;
- `stories`: of `training.text.story_writer`; the question is one of them once more.

A model learns this for 1 to `max_documents` documents, and is measured beyond.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from training.recipe import Section
from training.synthetic.questions import score_answers
from training.synthetic.readings import Reading, labelled_batch, model_inputs
from training.text.question_rows import Row, fact_texts, facts_row, features, pad
from training.text.story_writer import write_stories, write_story
from training.text.tokenizer import train_tokenizer


VOCAB_SIZE = 1024
NUM_KEYS = VOCAB_SIZE // 2  # of pairs; the other tokens are values
CHOSEN_BY = ("accuracy",)


class RecallSection(Section):
    """Sizes of the task; `num_rows` are for training, `num_test` each for validation and test."""

    language: Literal["recall"]
    kind: Literal["pairs", "facts", "stories"]
    num_rows: PositiveInt
    num_test: PositiveInt = 500
    max_documents: PositiveInt = 8
    num_pairs: PositiveInt = 4
    num_questions: PositiveInt = 4
    # How the model reads while it learns: documents alone and joined, or in sequence; and where a transformer's stand.
    joined: bool = True
    positions: Literal["running", "own"] = "running"
    seed: int = Field(default=0, ge=0)


def _pairs_row(section: RecallSection, rng: random.Random, num_documents: int) -> Row:
    keys = rng.sample(range(NUM_KEYS), num_documents * section.num_pairs)
    pairs = [(key, NUM_KEYS + int(rng.random() * NUM_KEYS)) for key in keys]
    documents = [pairs[index::num_documents] for index in range(num_documents)]
    asked = [int(rng.random() * len(pairs)) for _ in range(section.num_questions)]
    asked = list(dict.fromkeys(asked))
    question = [token for number in asked for token in pairs[number]]
    answers = [part for number in range(len(asked)) for part in (-1, number)]
    tokens = [[token for pair in document for token in pair] for document in documents]
    return Row(tokens, question, answers, [number % num_documents for number in asked])


@functools.lru_cache(maxsize=1)
def recall_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of facts and stories, which is always the same."""
    return train_tokenizer(itertools.chain(fact_texts(4), write_stories(1000)), VOCAB_SIZE)


def tokens_of(text: str) -> list[int]:
    ids: list[int] = recall_tokenizer()(text)["input_ids"]
    return ids


def _facts_row(section: RecallSection, rng: random.Random, num_documents: int) -> Row:
    return facts_row(rng, num_documents, section.num_questions, tokens_of, recall_tokenizer().eos_token_id)


def _stories_row(section: RecallSection, rng: random.Random, num_documents: int) -> Row:
    documents = [tokens_of(write_story(rng)) for _ in range(num_documents)]
    asked = int(rng.random() * num_documents)
    story = documents[asked]
    # Nothing says which story comes until its first tokens have been read.
    return Row(documents, list(story), [-1, *range(len(story) - 1)], [asked])


WRITERS: dict[str, Callable[[RecallSection, random.Random, int], Row]] = {
    "pairs": _pairs_row,
    "facts": _facts_row,
    "stories": _stories_row,
}


class RecallDataset(Dataset):
    """Fresh rows, each made from `(seed, index)` alone, so that a training resumes exactly.

    Args:
        section: of the recipe.
        num_rows: length of the data set.
        split: another name gives other rows.
        num_documents: of each row; 1 to `max_documents` when absent.
    """

    def __init__(self, section: RecallSection, num_rows: int, split: str, num_documents: int | None = None):
        self.section, self.num_rows, self.split, self.num_documents = section, num_rows, split, num_documents

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> Row:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        rng = random.Random(f"{self.section.kind} {self.split} {self.section.seed} {index} {self.num_documents}")
        num_documents = self.num_documents or 1 + int(rng.random() * self.section.max_documents)
        return WRITERS[self.section.kind](self.section, rng, num_documents)

    def rows(self) -> list[Row]:
        return [self.row(index) for index in range(self.num_rows)]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return features(self.row(index))


def draw_splits(section: RecallSection) -> dict[str, RecallDataset]:
    """Return rows for training, and others for validation and test."""
    sizes = {"train": section.num_rows, "validation": section.num_test, "test": section.num_test}
    return {split: RecallDataset(section, size, split) for split, size in sizes.items()}


def provenance(section: RecallSection) -> dict[str, Any]:
    """Return nothing, for nothing is read: the settings determine the rows."""
    return {}


def tokenizer_of(section: RecallSection) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of documents of words."""
    return None if section.kind == "pairs" else recall_tokenizer()


def collator(section: RecallSection, config: PreTrainedConfig) -> Callable[[list[dict]], dict[str, Any]]:
    """Return what makes batches for a model: its arguments and labels `(B, T)`, which are the answers."""

    return functools.partial(labelled_batch, config, reading=Reading(section.joined, section.positions))


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: list[Row], batch_size: int, reading: Reading) -> dict[str, float]:
    """Return the [`score_answers`] of a model on rows; `batch_size` changes the speed alone."""

    def answered() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        # Rows of similar length have little padding.
        ordered = sorted(map(features, rows), key=lambda row: len(row["input_ids"]))
        for batch in DataLoader(cast("Dataset", ordered), batch_size, collate_fn=pad):
            batch = {name: part.to(model.device) for name, part in batch.items()}
            logits = model(**model_inputs(model.config, batch, reading)).logits
            yield logits, batch["input_ids"], batch["answers"]

    return score_answers(answered())


def score(model: PreTrainedModel, split: RecallDataset, batch_size: int = 32) -> dict[str, float]:
    """Measure how a model answers in the reading of its training, see [`score_rows`]."""
    reading = Reading(split.section.joined, split.section.positions)
    return score_rows(model, split.rows(), batch_size, reading)


def report(
    models: dict[str, PreTrainedModel], splits: dict[str, RecallDataset], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return what the result of a training says of its models: under `metrics` the scores on each split."""
    model = models["accuracy"]
    scores = {name: score(model, split, batch_size) for name, split in splits.items() if name != "train"}
    return {"metrics": scores}

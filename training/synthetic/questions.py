# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens with answers in them: what the languages of the recall suite share.

A language writes rows by a [`RowWriter`], which marks the tokens that a model has to predict, and states its settings
in a [`QuestionSection`]. From these two it gets its data sets, batches and scores. A model is measured on rows of its
training's settings, `test`, and on rows of other settings, `tests`: more pairs, longer texts, a context that is read
twice (arXiv 2407.05483).
"""

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple, cast

import torch
from pydantic import Field, PositiveInt, model_validator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from training.recipe import Section


# One vocabulary for all languages of the suite, so that one model file serves them all.
VOCAB_SIZE = 1024
CHOSEN_BY = ("accuracy",)
IGNORED = -100  # by torch's cross entropy
SPLITS = ("train", "validation", "test")


class QuestionSection(Section):
    """Sizes that all languages have; `num_rows` are for training, `num_test` each for validation and every test.

    `tests` are further tests by name: the settings in which their rows differ from those of the training.
    """

    language: str
    num_rows: PositiveInt
    num_test: PositiveInt = 500
    seed: int = Field(default=0, ge=0)
    tests: dict[str, dict[str, Any]] = {}
    # What a test cannot have of its own: it belongs to the training, or is drawn once for all rows.
    fixed: ClassVar[tuple[str, ...]] = ("language", "num_rows", "seed", "tests")

    @model_validator(mode="after")
    def _check_tests(self) -> Self:
        for name, settings in self.tests.items():
            if name in SPLITS:
                raise ValueError(f"`tests` has {name!r}, which every training has: give it another name")
            if fixed := [key for key in settings if key in self.fixed]:
                raise ValueError(f"the test {name!r} changes {fixed[0]!r}, which is the training's: leave it out")
            self.changed(settings)
        return self

    def changed(self, settings: dict[str, Any]) -> Self:
        """Return the section with other settings and no further tests.

        Raises:
            ValueError: a setting is unknown or impossible.
        """
        return type(self).model_validate(self.model_dump() | {"tests": {}} | settings)


class QuestionRow(NamedTuple):
    """A row of T tokens: `labels` are tokens to predict from what stands before them, or `IGNORED`.

    `answers` numbers the answer that each label belongs to; tokens without a label have -1. A label may differ from
    the token at its place, where the row does not show the answer.
    """

    tokens: list[int]
    labels: list[int]
    answers: list[int]


class RowWriter:
    """Writes one row from left to right."""

    def __init__(self) -> None:
        self.row = QuestionRow([], [], [])
        self._num_answers = 0

    def show(self, tokens: Iterable[int]) -> None:
        """Write tokens that are not asked for."""
        tokens = list(tokens)
        self.row.tokens.extend(tokens)
        self.row.labels.extend([IGNORED] * len(tokens))
        self.row.answers.extend([-1] * len(tokens))

    def ask(self, answer: list[int], shown: list[int] | None = None) -> None:
        """Write an answer, each token of which has to be predicted; the row shows `shown` in its place, or itself."""
        self.row.tokens.extend(answer if shown is None else shown)
        self.row.labels.extend(answer)
        self.row.answers.extend([self._num_answers] * len(answer))
        self._num_answers += 1


class QuestionDataset(Dataset):
    """Fresh rows, each made from `(seed, index)` alone, so that a training resumes exactly.

    Args:
        section: of the recipe.
        write_row: of the language.
        num_rows: length of the data set.
        split: another name gives other rows.
    """

    def __init__(
        self,
        section: Any,
        write_row: Callable[[Any, random.Random], QuestionRow],
        num_rows: int,
        split: str,
    ):
        self.section, self.num_rows, self.split, self._write_row = section, num_rows, split, write_row

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> QuestionRow:
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        rng = random.Random(f"{self.section.language} {self.split} {self.section.seed} {index}")
        return self._write_row(self.section, rng)


def question_splits(
    section: QuestionSection, write_row: Callable[[Any, random.Random], QuestionRow]
) -> dict[str, QuestionDataset]:
    """Return rows for training, others for validation and test, and others of each of the section's `tests`."""
    sizes = {"train": section.num_rows, "validation": section.num_test, "test": section.num_test}
    splits = {split: QuestionDataset(section, write_row, size, split) for split, size in sizes.items()}
    for name, settings in section.tests.items():
        changed = section.changed(settings)
        splits[name] = QuestionDataset(changed, write_row, changed.num_test, f"test: {name}")
    return splits


def _padded(rows: list[QuestionRow]) -> dict[str, torch.Tensor]:
    length = max(len(row.tokens) for row in rows)
    fillings = QuestionRow(0, IGNORED, -1)  # type: ignore[arg-type]
    return {
        name: torch.tensor([row[part] + [fillings[part]] * (length - len(row.tokens)) for row in rows])
        for part, name in enumerate(("input_ids", "labels", "answers"))
    }


def collate(rows: list[QuestionRow]) -> dict[str, torch.Tensor]:
    """Return a batch `(B, T)`, padded on the right, which needs no mask: a causal model does not read what follows."""
    batch = _padded(rows)
    return {name: batch[name] for name in ("input_ids", "labels")}


def collator(section: QuestionSection, config: PreTrainedConfig) -> Callable[..., dict[str, torch.Tensor]]:
    """Return what makes batches, for any model."""
    return collate


def provenance(section: QuestionSection) -> dict[str, Any]:
    """Return nothing, for nothing is read: the settings determine the rows."""
    return {}


def tokenizer_of(section: QuestionSection) -> None:
    """Return nothing: the tokens stand for no text."""


def score_answers(batches: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Measure how a model answers.

    Args:
        batches: of logits `(B, T, V)`; of `(B, T)` tokens, of which those of answers are the ones to predict from the
            logits before them; and of `(B, T)` numbers of answers within a row, -1 for tokens of none.

    Returns:
        `accuracy`: share of answers of which each token is the likeliest behind what stands before it; `loss`: mean
        over the tokens of answers, in nats; `num_answers`.
    """
    right, losses = [], []
    for logits, tokens, answers in batches:
        logits, tokens, answers = logits[:, :-1].float(), tokens[:, 1:], answers[:, 1:]
        is_answer = answers >= 0
        losses.append(cross_entropy(logits[is_answer], tokens[is_answer], reduction="none").cpu())
        # Answers of all rows get different numbers; one is wrong if any of its tokens is.
        rows_apart = answers + (answers.max() + 1) * torch.arange(len(answers), device=answers.device)[:, None]
        numbers = rows_apart[is_answer].unique(return_inverse=True)[1]
        is_wrong = logits.argmax(-1)[is_answer] != tokens[is_answer]
        num_wrong = torch.zeros(int(numbers.max()) + 1, device=answers.device).index_add_(0, numbers, is_wrong.float())
        right.append((num_wrong == 0).cpu())
    is_right, loss = torch.cat(right), torch.cat(losses)
    means = {"accuracy": float(is_right.double().mean()), "loss": float(loss.double().mean())}
    return means | {"num_answers": len(is_right)}


def _answered(
    model: PreTrainedModel, rows: list[QuestionRow], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for rows_of_batch in DataLoader(cast("Dataset", rows), batch_size, collate_fn=_padded):
        batch = {name: part.to(model.device) for name, part in rows_of_batch.items()}
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        yield logits, batch["labels"], batch["answers"]


@torch.no_grad()
def score(model: PreTrainedModel, split: QuestionDataset, batch_size: int = 32) -> dict[str, float]:
    """Return the [`score_answers`] of a model on a split; `batch_size` changes the speed alone."""
    # Rows of similar length have little padding.
    rows = sorted((split[index] for index in range(len(split))), key=lambda row: len(row.tokens))
    return score_answers(_answered(model, rows, batch_size))


def report(
    models: dict[str, PreTrainedModel], splits: dict[str, QuestionDataset], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return what the result of a training says of its models: under `metrics` the scores on each split."""
    model = models["accuracy"]
    return {"metrics": {name: score(model, split, batch_size) for name, split in splits.items() if name != "train"}}

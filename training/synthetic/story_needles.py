# SPDX-License-Identifier: Apache-2.0
"""Needles in stories: sentences that give people numbers, among the paragraphs of stories, and a question about one.

The form is that of the needles of RULER (arXiv 2404.06654) with several keys; the text is of `story_writer`, whose
stories have none of the needles' names and no digit, so that a question has one answer. Needles stand between
paragraphs, at any depth.
"""

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveInt, model_validator
from transformers import PreTrainedTokenizerFast
from typing_extensions import Self

from training.synthetic.questions import (
    CHOSEN_BY,
    VOCAB_SIZE,
    QuestionDataset,
    QuestionRow,
    QuestionSection,
    RowWriter,
    collator,
    provenance,
    question_splits,
    report,
    score,
)
from training.text.fact_writer import MORE_NAMES
from training.text.story_writer import BOYS, GIRLS, write_stories, write_story
from training.text.tokenizer import train_tokenizer


__all__ = ["CHOSEN_BY", "VOCAB_SIZE", "NeedlesSection", "draw_splits", "tokenizer_of"]
__all__ += ["collator", "provenance", "report", "score"]

# Of people who are in no story.
NAMES = tuple(name for names in MORE_NAMES.values() for name in names.split() if name not in {*GIRLS, *BOYS})
NEEDLE, QUESTION = "The number of {name} is {number}.", "What is the number of {name}? It is"


class NeedlesSection(QuestionSection):
    """Sizes of the task.

    Args:
        num_stories: of a row, drawn from `[fewest, most]`.
        num_needles: sentences with a number, each of another name.
        num_digits: of a number.
        num_questions: of a row, about different needles.
        times_read: how often the stories with their needles stand in the row.
    """

    language: Literal["needles"]
    num_stories: list[PositiveInt] = Field(default=[1, 2], min_length=2, max_length=2)
    num_needles: int = Field(default=4, ge=1, le=len(NAMES))
    num_digits: PositiveInt = 4
    num_questions: PositiveInt = 1
    times_read: int = Field(default=1, ge=1, le=2)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.num_stories[0] > self.num_stories[1]:
            raise ValueError(f"`num_stories` is {self.num_stories}: give the smaller number first")
        if self.num_questions > self.num_needles:
            raise ValueError(
                f"`num_questions` is {self.num_questions}, but `num_needles` is {self.num_needles}: each question is "
                "about another needle"
            )
        return self


def _draw_number(rng: random.Random, num_digits: int) -> str:
    return " ".join(str(rng.randrange(10)) for _ in range(num_digits))


def _needle_texts() -> Iterator[str]:
    rng = random.Random("texts of needles")
    for name in NAMES * 20:
        yield NEEDLE.format(name=name, number=_draw_number(rng, 8))
        yield QUESTION.format(name=name)


@functools.cache
def needle_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of stories and needles, which is always the same."""
    return train_tokenizer(itertools.chain(_needle_texts(), write_stories(1000)), VOCAB_SIZE)


def tokenizer_of(section: NeedlesSection) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the rows."""
    return needle_tokenizer()


def _tokens_of(text: str) -> list[int]:
    ids: list[int] = needle_tokenizer()(text)["input_ids"]
    return ids


def write_row(section: NeedlesSection, rng: random.Random) -> QuestionRow:
    """Return a row: stories with needles between their paragraphs, then questions, each with its answer."""
    paragraphs = [part for _ in range(rng.randint(*section.num_stories)) for part in write_story(rng).split("\n")]
    names = rng.sample(NAMES, section.num_needles)
    numbers = {name: _draw_number(rng, section.num_digits) for name in names}
    for name, number in numbers.items():
        paragraphs.insert(rng.randint(0, len(paragraphs)), NEEDLE.format(name=name, number=number))
    writer = RowWriter()
    writer.show(_tokens_of("\n".join(paragraphs) + "\n") * section.times_read)
    for name in rng.sample(names, section.num_questions):
        writer.show(_tokens_of(QUESTION.format(name=name)))
        writer.ask(_tokens_of(f" {numbers[name]}"))
        writer.show(_tokens_of(".\n"))
    return writer.row


def draw_splits(section: NeedlesSection) -> dict[str, QuestionDataset]:
    """Return rows for training, validation, test, and each of `tests`."""
    return question_splits(section, write_row)

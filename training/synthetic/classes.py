# SPDX-License-Identifier: Apache-2.0
"""In-context classification with anonymous labels: classes by hidden features, learnt from a few examples in the row.

The task is that of "Memory Mosaics at scale" (arXiv 2507.03285), whose items are texts, in an artificial form. An item
is some words. Each word has a hidden feature, by a table that is the same in all rows and that no row shows; a class
is a sequence of features. So two items of a class may have no word in common: a model has to learn the features, and
to compare items by them. Other words of an item say nothing. A row gives each class a label that is drawn for this
row alone, shows examples of each class, shuffled or grouped by class, and asks for the labels of new items.
"""

import functools
import random
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
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
    tokenizer_of,
)


__all__ = ["CHOSEN_BY", "VOCAB_SIZE", "ClassesSection", "draw_splits", "tokenizer_of"]
__all__ += ["collator", "provenance", "report", "score"]

# Words with a feature come first, then words without, then labels, and the mark of a label that is asked for.
NUM_WORDS, NUM_EMPTY_WORDS, NUM_LABELS = 256, 128, 64
FIRST_LABEL = NUM_WORDS + NUM_EMPTY_WORDS
ASKED = FIRST_LABEL + NUM_LABELS


class ClassesSection(QuestionSection):
    """Sizes of the task.

    Args:
        num_classes: of a row.
        num_shots: examples of each class, drawn for each row from `[fewest, most]`.
        order: of the examples, at random or by class.
        num_features: words of an item that have one, and features of a class.
        num_values: how many different features there are.
        num_empty_words: words of an item that say nothing.
        num_questions: of a row.
        times_read: how often the examples stand in the row, in the same order.
    """

    language: Literal["classes"]
    num_classes: int = Field(default=4, ge=2, le=NUM_LABELS)
    num_shots: list[PositiveInt] = Field(default=[1, 16], min_length=2, max_length=2)
    order: Literal["shuffled", "grouped"] = "shuffled"
    num_features: PositiveInt = 2
    num_values: int = Field(default=8, ge=2, le=NUM_WORDS)
    num_empty_words: int = Field(default=1, ge=0)
    num_questions: PositiveInt = 4
    times_read: int = Field(default=1, ge=1, le=2)
    fixed: ClassVar[tuple[str, ...]] = (*QuestionSection.fixed, "num_values")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.num_shots[0] > self.num_shots[1]:
            raise ValueError(f"`num_shots` is {self.num_shots}: give the smaller number first")
        if self.num_classes > self.num_values**self.num_features:
            raise ValueError(
                f"{self.num_features} features of {self.num_values} values make fewer than {self.num_classes} "
                "classes: lower `num_classes`, or raise one of the others"
            )
        return self


@functools.cache
def words_by_feature(num_values: int, seed: int) -> list[list[int]]:
    """Return the words that have each hidden feature, in all rows of a seed: of each as many, or one more."""
    words = list(range(NUM_WORDS))
    random.Random(f"classes table {seed}").shuffle(words)
    return [sorted(words[value::num_values]) for value in range(num_values)]


def _draw_classes(section: ClassesSection, rng: random.Random) -> list[tuple[int, ...]]:
    """Draw different sequences of features."""
    classes: dict[tuple[int, ...], None] = {}
    while len(classes) < section.num_classes:
        classes[tuple(rng.randrange(section.num_values) for _ in range(section.num_features))] = None
    return list(classes)


def _write_item(section: ClassesSection, rng: random.Random, features: tuple[int, ...]) -> list[int]:
    """Return the words of an item: those with features in the order of the features, the others anywhere."""
    table = words_by_feature(section.num_values, section.seed)
    words = [rng.choice(table[value]) for value in features]
    for _ in range(section.num_empty_words):
        words.insert(rng.randint(0, len(words)), NUM_WORDS + rng.randrange(NUM_EMPTY_WORDS))
    return words


def write_row(section: ClassesSection, rng: random.Random) -> QuestionRow:
    """Return a row: examples, each an item and its label, then items with a mark in the place of the label."""
    classes = _draw_classes(section, rng)
    labels = rng.sample(range(FIRST_LABEL, FIRST_LABEL + NUM_LABELS), section.num_classes)
    num_shots = rng.randint(*section.num_shots)
    order = [
        number for number in rng.sample(range(section.num_classes), section.num_classes) for _ in range(num_shots)
    ]
    if section.order == "shuffled":
        rng.shuffle(order)
    context: list[int] = []
    for number in order:
        context += [*_write_item(section, rng, classes[number]), labels[number]]
    writer = RowWriter()
    writer.show(context * section.times_read)
    for _ in range(section.num_questions):
        number = rng.randrange(section.num_classes)
        writer.show(_write_item(section, rng, classes[number]))
        writer.ask([labels[number]], shown=[ASKED])
    return writer.row


def draw_splits(section: ClassesSection) -> dict[str, QuestionDataset]:
    """Return rows for training, validation, test, and each of `tests`."""
    return question_splits(section, write_row)

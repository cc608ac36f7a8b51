# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927): pairs of keys and values, and later the keys.

A row begins with its pairs. Then each key comes once more among random tokens, and the model predicts its value, which
the row does not show again. The distances follow a power law, by which most keys come back soon. Zoology's vocabulary
has 8,192 tokens; here it has 1,024, which a small model embeds.
"""

import math
import random
from typing import Literal

from pydantic import Field, model_validator
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


__all__ = ["CHOSEN_BY", "VOCAB_SIZE", "MqarSection", "draw_splits", "tokenizer_of"]
__all__ += ["collator", "provenance", "report", "score"]

NUM_KEYS = VOCAB_SIZE // 2  # the other tokens are values


class MqarSection(QuestionSection):
    """Sizes of the task. A row has one of `sizes`, each `[tokens, pairs]`; the context is read `times_read` times.

    The distances of keys have a density proportional to their power `power` - 1, as Zoology's.
    """

    language: Literal["mqar"]
    sizes: list[list[int]] = Field(default=[[64, 4]], min_length=1)
    power: float = Field(default=0.01, gt=0)
    times_read: int = Field(default=1, ge=1, le=2)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for size in self.sizes:
            if len(size) != 2 or size[1] < 1:
                raise ValueError(f"`sizes` has {size}: give each as [tokens, pairs], with a pair at least")
            length, num_pairs = size
            if num_pairs > NUM_KEYS:
                raise ValueError(f"`sizes` has {num_pairs} pairs, but there are {NUM_KEYS} keys: give fewer pairs")
            least = 2 * num_pairs * (self.times_read + 1)
            if length < least:
                raise ValueError(
                    f"{num_pairs} pairs and their questions take {least} tokens, but `sizes` has {length}: give fewer "
                    "pairs, or more tokens"
                )
        return self


def _draw_places(section: MqarSection, rng: random.Random, num_places: int, num_drawn: int) -> list[int]:
    """Draw so many different places from 0 on, one after the other, with weights that fall with the distance."""
    # The smallest of exponential variables, each divided by its weight, are a draw without replacement by these
    # weights, in the order of drawing.
    waits = [-math.log(1 - rng.random()) * (place + 1) ** (1 - section.power) for place in range(num_places)]
    return sorted(range(num_places), key=waits.__getitem__)[:num_drawn]


def write_row(section: MqarSection, rng: random.Random) -> QuestionRow:
    """Return a row: pairs, then keys among random tokens, each followed by a random token in place of its value."""
    length, num_pairs = rng.choice(section.sizes)
    pairs = [(key, rng.randrange(NUM_KEYS, VOCAB_SIZE)) for key in rng.sample(range(NUM_KEYS), num_pairs)]
    writer = RowWriter()
    for _ in range(section.times_read):
        writer.show(token for pair in pairs for token in pair)
    num_left = length - len(writer.row.tokens)
    asked = dict(zip(_draw_places(section, rng, num_left // 2, num_pairs), pairs, strict=True))
    for place in range(num_left // 2):
        if place in asked:
            key, value = asked[place]
            writer.show([key])
            writer.ask([value], shown=[rng.randrange(VOCAB_SIZE)])
        else:
            writer.show([rng.randrange(VOCAB_SIZE), rng.randrange(VOCAB_SIZE)])
    writer.show([rng.randrange(VOCAB_SIZE)] * (num_left % 2))
    return writer.row


def draw_splits(section: MqarSection) -> dict[str, QuestionDataset]:
    """Return rows for training, validation, test, and each of `tests`."""
    return question_splits(section, write_row)

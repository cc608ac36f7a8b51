# SPDX-License-Identifier: Apache-2.0
"""Mechanistic Architecture Design (MAD, arXiv 2403.17844): six small tasks, each of one ability.

- `in_context_recall`: keys and values; the value of a key that the row had before;
- `fuzzy_recall`: the same, keys and values of one to three tokens;
- `noisy_recall`: the same, with other tokens between pairs;
- `selective_copying`: tokens among blanks, to be written in their order at the end;
- `compression`: random tokens, to be recovered from the model's state at the last one alone;
- `memorisation`: the value of a key, by a table that is the same in all rows, and that no row shows.

Sizes are MAD's by default. Keys of `fuzzy_recall` are such that none begins another of its row, so that a reader knows
where each ends.
"""

import functools
import random
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from training.synthetic.questions import (
    CHOSEN_BY,
    IGNORED,
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


__all__ = ["CHOSEN_BY", "VOCAB_SIZE", "MadSection", "draw_splits", "tokenizer_of"]
__all__ += ["collator", "provenance", "report", "score"]

# Tokens besides those of a task's vocabulary, which begin at 0.
BLANK, COPY, COMPRESS = VOCAB_SIZE - 1, VOCAB_SIZE - 2, VOCAB_SIZE - 3
NUM_SPECIAL = 3
# What each task reads, and MAD's value of it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "in_context_recall": {"length": 128, "num_tokens": 16},
    "fuzzy_recall": {"length": 128, "num_tokens": 16, "longest_motif": 3, "num_motifs": 8},
    "noisy_recall": {"length": 128, "num_tokens": 16, "num_noise_tokens": 16, "noise_share": 0.2},
    "selective_copying": {"length": 256, "num_tokens": 16, "num_copied": 16},
    "compression": {"length": 32, "num_tokens": 16},
    "memorisation": {"length": 32, "num_tokens": 256},
}
OPTIONS = sorted({name for defaults in DEFAULTS.values() for name in defaults})


class MadSection(QuestionSection):
    """A task and its sizes: those that are left out are MAD's, `DEFAULTS`.

    Args:
        length: tokens of a row; of `compression`, those to be recovered.
        num_tokens: of the task's vocabulary; half of them are keys where there are keys.
        longest_motif, num_motifs: of `fuzzy_recall`, the most tokens of a key or a value, and keys of a row.
        num_noise_tokens, noise_share: of `noisy_recall`, its vocabulary, and the share of pairs that are noise.
        num_copied: of `selective_copying`, tokens to copy.
    """

    language: Literal["mad"]
    task: Literal[
        "in_context_recall", "fuzzy_recall", "noisy_recall", "selective_copying", "compression", "memorisation"
    ]
    length: PositiveInt | None = None
    num_tokens: int | None = Field(default=None, ge=4)
    longest_motif: PositiveInt | None = None
    num_motifs: PositiveInt | None = None
    num_noise_tokens: PositiveInt | None = None
    noise_share: float | None = Field(default=None, ge=0, lt=1)
    num_copied: PositiveInt | None = None
    fixed: ClassVar[tuple[str, ...]] = (*QuestionSection.fixed, "task", "num_tokens")

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in OPTIONS:
            if getattr(self, name) is not None and name not in DEFAULTS[self.task]:
                raise ValueError(f"`{name}` means nothing to the task {self.task!r}: leave it out")
        sizes, most = self.sizes, VOCAB_SIZE - NUM_SPECIAL
        num_tokens = sizes["num_tokens"] + sizes.get("num_noise_tokens", 0)
        if num_tokens > most:
            raise ValueError(f"the task has {num_tokens} tokens, more than {most}: lower `num_tokens`")
        least = {
            "selective_copying": 2 * sizes.get("num_copied", 0) + 1,
            "fuzzy_recall": 4 * sizes.get("longest_motif", 0),
            "compression": 1,
            "memorisation": 2,
        }.get(self.task, 4)
        if sizes["length"] < least:
            raise ValueError(f"`length` is {sizes['length']}: a row of {self.task!r} takes {least} tokens or more")
        if "num_motifs" in sizes and sizes["num_motifs"] > sizes["num_tokens"] // 2:
            raise ValueError(
                f"`num_motifs` is {sizes['num_motifs']}, but {sizes['num_tokens']} tokens are enough for "
                f"{sizes['num_tokens'] // 2} keys of which none begins another: lower it, or raise `num_tokens`"
            )
        return self

    @property
    def sizes(self) -> dict[str, Any]:
        """The options that the task reads, by name."""
        return {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in DEFAULTS[self.task].items()
        }

    @property
    def needs_compressor(self) -> bool:
        """Whether the model has to tell a row from one state: a plain one would see what it is asked for."""
        return self.task == "compression"


def _recall_row(
    rng: random.Random, length: int, num_tokens: int, noise_share: float = 0, num_noise_tokens: int = 0
) -> QuestionRow:
    """Write pairs of a key and its value; where a key comes again, its value is asked for."""
    values: dict[int, int] = {}
    writer = RowWriter()
    for number in range(length // 2):
        is_last = number == length // 2 - 1
        # Neither the first pair nor the last is noise, so that there is a question in any case.
        if values and not is_last and rng.random() < noise_share:
            writer.show(num_tokens + rng.randrange(num_noise_tokens) for _ in range(2))
            continue
        key = rng.choice(list(values)) if is_last else rng.randrange(num_tokens // 2)
        writer.show([key])
        if key in values:
            writer.ask([values[key]])
        else:
            values[key] = rng.randrange(num_tokens // 2, num_tokens)
            writer.show([values[key]])
    return writer.row


def _draw_keys(rng: random.Random, num_tokens: int, longest_motif: int, num_motifs: int) -> list[tuple[int, ...]]:
    """Draw keys of 1 to `longest_motif` tokens, of which none begins another."""
    keys: list[tuple[int, ...]] = []
    while len(keys) < num_motifs:
        key = tuple(rng.randrange(num_tokens) for _ in range(rng.randint(1, longest_motif)))
        is_apart = all(other[: len(key)] != key[: len(other)] for other in keys)
        # A key of one token takes all keys that begin with it: enough first tokens have to stay for those to come.
        num_left = num_tokens - len({other[0] for other in [*keys, key] if len(other) == 1})
        if is_apart and num_left >= num_motifs - len(keys) - 1:
            keys.append(key)
    return keys


def _fuzzy_row(rng: random.Random, length: int, num_tokens: int, longest_motif: int, num_motifs: int) -> QuestionRow:
    """Write pairs of a key and its value, each of several tokens; where a key comes again, its value is asked for."""
    keys = _draw_keys(rng, num_tokens // 2, longest_motif, num_motifs)
    values = {
        key: [rng.randrange(num_tokens // 2, num_tokens) for _ in range(rng.randint(1, longest_motif))] for key in keys
    }
    writer, known = RowWriter(), set()
    key = rng.choice(keys)
    while len(writer.row.tokens) + len(key) + len(values[key]) <= length:
        writer.show(key)
        (writer.ask if key in known else writer.show)(values[key])
        known.add(key)
        key = rng.choice(keys)
    if max(writer.row.answers) < 0:  # no key came twice, as may happen in a short row
        return _fuzzy_row(rng, length, num_tokens, longest_motif, num_motifs)
    return writer.row


def _copying_row(rng: random.Random, length: int, num_tokens: int, num_copied: int) -> QuestionRow:
    """Write tokens among blanks, a mark, and blanks in the places of the tokens that are asked for."""
    copied = [rng.randrange(num_tokens) for _ in range(num_copied)]
    context = [BLANK] * (length - num_copied - 1)
    for place, token in zip(sorted(rng.sample(range(len(context)), num_copied)), copied, strict=True):
        context[place] = token
    writer = RowWriter()
    writer.show([*context, COPY])
    for token in copied:
        writer.ask([token], shown=[BLANK])
    return writer.row


def _compression_row(rng: random.Random, length: int, num_tokens: int) -> QuestionRow:
    """Write random tokens and a mark. A [`Compressor`] predicts the token at each place as if it were the next one."""
    tokens = [rng.randrange(num_tokens) for _ in range(length)]
    return QuestionRow([*tokens, COMPRESS], [IGNORED, *tokens], [-1, *range(length)])


@functools.cache
def memorised_values(num_tokens: int, seed: int) -> list[int]:
    """Return the value of each key of `memorisation`, in all rows of a seed."""
    rng = random.Random(f"mad table {seed}")
    return [rng.randrange(num_tokens // 2, num_tokens) for _ in range(num_tokens // 2)]


def _memorisation_row(rng: random.Random, length: int, num_tokens: int, seed: int) -> QuestionRow:
    """Write keys, each with a blank in the place of its value."""
    values, writer = memorised_values(num_tokens, seed), RowWriter()
    for _ in range(length // 2):
        key = rng.randrange(len(values))
        writer.show([key])
        writer.ask([values[key]], shown=[BLANK])
    return writer.row


WRITERS: dict[str, Callable[..., QuestionRow]] = {
    "in_context_recall": _recall_row,
    "fuzzy_recall": _fuzzy_row,
    "noisy_recall": _recall_row,
    "selective_copying": _copying_row,
    "compression": _compression_row,
    "memorisation": _memorisation_row,
}


def write_row(section: MadSection, rng: random.Random) -> QuestionRow:
    """Return a row of the section's task."""
    table = {"seed": section.seed} if section.task == "memorisation" else {}
    return WRITERS[section.task](rng, **section.sizes, **table)


def draw_splits(section: MadSection) -> dict[str, QuestionDataset]:
    """Return rows for training, validation, test, and each of `tests`."""
    return question_splits(section, write_row)

# SPDX-License-Identifier: Apache-2.0
"""A seeded writer of short documents, each with one fact, and of questions with one answer each.

A document says who has what, of which colour, and where, in sentences of several forms, among others of the story
writer's. Names, and things with their colours, differ within a row, so that a question about any of its documents has
one answer, which stands in that document alone.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from training.text.story_writer import (
    BOYS,
    ELDERS,
    GIRLS,
    HOBBIES,
    PLACES,
    PLURAL_NOUNS,
    THINGS,
    TRAIT_LINES,
    TRAITS,
    pick,
    pronouns_of,
)


COLOURS = ("red", "blue", "green", "yellow", "pink", "brown", "white", "black", "purple", "orange")
NOUNS = tuple(sorted({thing.noun for thing in THINGS} - PLURAL_NOUNS))
NAMES = (*((name, "she") for name in GIRLS), *((name, "he") for name in BOYS))

FACTS = (
    "{name} has the {colour} {noun} {in_place}.",
    "The {colour} {noun} {in_place} belongs to {name}.",
    "{In_place}, {name} plays with the {colour} {noun}.",
)
# Each asks for one of the four, by others of the same document.
QUESTIONS = {
    "who": ("Who has the {colour} {noun}?", "{name}"),
    "where": ("Where is the {colour} {noun}?", "{in_place}"),
    "colour": ("What colour is the {noun} that {name} has?", "{colour}"),
    "what": ("What does {name} have?", "{noun}"),
}


class FactRow(NamedTuple):
    """Documents, and a question that one of them answers; `asked` is its index, `kind` a key of `QUESTIONS`."""

    documents: list[str]
    question: str
    answer: str
    asked: int
    kind: str


def _draw_distinct(rng: random.Random, options: tuple, num: int) -> list:
    """Draw so many different options, in the order of the draws."""
    left, drawn = list(options), []
    for _ in range(num):
        drawn.append(left.pop(int(rng.random() * len(left))))
    return drawn


def _write_document(rng: random.Random, fields: dict[str, str], gender: str) -> str:
    elder, _ = pick(rng, ELDERS)
    words = fields | {"trait": pick(rng, TRAITS), "hobby": pick(rng, HOBBIES), "elder": elder}
    words |= pronouns_of("", gender)
    sentences = [pick(rng, FACTS).format_map(words)]
    for _ in range(int(rng.random() * 3)):
        # What is said besides names nobody, so that the fact stands alone.
        sentences.append(pick(rng, TRAIT_LINES).format_map(words))
    return " ".join(sentences)


def write_fact_rows(num_rows: int, num_documents: int, seed: int = 0) -> Iterator[FactRow]:
    """Write rows of documents with a question about one of them.

    Args:
        num_rows (`int`): how many; row i is the same however many follow it.
        num_documents (`int`): in each row.
        seed (`int`, *optional*, defaults to 0): two seeds give two unrelated streams.

    Raises:
        ValueError: if there are more documents than names.
    """
    if not 1 <= num_documents <= len(NAMES):
        raise ValueError(f"num_documents is {num_documents}: it must be from 1 to {len(NAMES)}, the number of names")
    rng = random.Random(f"fact writer {seed}")
    things = tuple((colour, noun) for colour in COLOURS for noun in NOUNS)
    places = tuple(PLACES.values())
    for _ in range(num_rows):
        names = _draw_distinct(rng, NAMES, num_documents)
        rows = []
        for (name, gender), (colour, noun) in zip(names, _draw_distinct(rng, things, num_documents), strict=True):
            in_place = pick(rng, places)["in_place"]
            fields = {"name": name, "colour": colour, "noun": noun, "in_place": in_place}
            fields["In_place"] = in_place[0].upper() + in_place[1:]
            rows.append((fields, _write_document(rng, fields, gender)))
        asked, kind = int(rng.random() * num_documents), pick(rng, tuple(QUESTIONS))
        question, answer = (part.format_map(rows[asked][0]) for part in QUESTIONS[kind])
        yield FactRow([document for _, document in rows], question, answer, asked, kind)

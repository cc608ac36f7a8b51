# SPDX-License-Identifier: Apache-2.0
"""A seeded writer of fact documents, each with one fact, and of questions with one answer each. They are no stories.

A document says who has what, of which colour, and where, and says it from both sides, in any order: that Tom has the
red ball, and that the red ball belongs to Tom. So each answer stands right behind words that its question has.
One line of the story writer may stand between. Names, and things with their colours, differ within a row, so that a
question about any of its documents has one answer, which stands in that document alone.
"""

import random
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
# More than those of the stories, so that a row may have 64 documents.
MORE_NAMES = {
    "she": "Bea Clara Dora Ella Flora Greta Hana Ida Jana Kira Lena Mina Nora Olga Paula Rita Stella Tara Uma Vera",
    "he": "Basil Carl Dan Erik Felix Gus Hugo Ivan Jonas Karl Leo Milo Nils Oscar Paul Ralf Simon Theo Uli Victor",
}
NAMES = tuple(
    (name, gender)
    for gender, names in (("she", GIRLS), ("he", BOYS))
    for name in dict.fromkeys([*names, *MORE_NAMES[gender].split()])
)

FACTS = ("{name} has the {colour} {noun} {in_place}.", "The {colour} {noun} belongs to {name}.")
# Each asks for one of the four, by others of the same document.
QUESTIONS = {
    "who": ("Who has the {colour} {noun}?", "{name}"),
    "where": ("Where is the {colour} {noun}?", "{in_place}"),
    "colour": ("What colour is the {noun} that {name} has?", "{colour}"),
    "what": ("What does {name} have?", "the {colour} {noun}"),
}


class Question(NamedTuple):
    """A question, its answer, the index of the document that has it, and a key of `QUESTIONS`."""

    text: str
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
    # What is said besides has no names, so that the fact stands alone.
    between = [pick(rng, TRAIT_LINES)] if rng.random() < 0.5 else []
    first, second = _draw_distinct(rng, FACTS, 2)
    return " ".join(sentence.format_map(words) for sentence in (first, *between, second))


def write_facts(rng: random.Random, num_documents: int, num_questions: int = 1) -> tuple[list[str], list[Question]]:
    """Write documents, and questions about different ones of them.

    Args:
        rng: all draws come from it.
        num_documents (`int`): of one fact each.
        num_questions (`int`): at most as many as documents; with fewer documents, one about each.

    Raises:
        ValueError: if there are no documents, or more than names.
    """
    if not 1 <= num_documents <= len(NAMES):
        raise ValueError(f"num_documents is {num_documents}: it must be from 1 to {len(NAMES)}, the number of names")
    things = tuple((colour, noun) for colour in COLOURS for noun in NOUNS)
    facts, documents = [], []
    people, owned = _draw_distinct(rng, NAMES, num_documents), _draw_distinct(rng, things, num_documents)
    for (name, gender), (colour, noun) in zip(people, owned, strict=True):
        in_place = pick(rng, tuple(PLACES.values()))["in_place"]
        fields = {"name": name, "colour": colour, "noun": noun, "in_place": in_place}
        facts.append(fields)
        documents.append(_write_document(rng, fields, gender))
    questions = []
    for asked in _draw_distinct(rng, tuple(range(num_documents)), min(num_questions, num_documents)):
        kind = pick(rng, tuple(QUESTIONS))
        text, answer = (part.format_map(facts[asked]) for part in QUESTIONS[kind])
        questions.append(Question(text, answer, asked, kind))
    return documents, questions

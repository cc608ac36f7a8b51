# SPDX-License-Identifier: Apache-2.0
"""Prompts for stories: lists of names, words and openings, and the prompts that are drawn from them.

Lists come from a file or from a model's answers. As for the BabiStories data set (arXiv 2405.06394, Fig. 14), a name
and the first words of the story are drawn as well as the words and features that the story must have; this makes the
stories diverse.
"""

import random
import re
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from training.text.story_filters import forbidden


# The list that each placeholder of a template is drawn from.
LISTS = {
    "name": "names",
    "verb": "verbs",
    "noun": "nouns",
    "adjective": "adjectives",
    "features": "features",
    "opening": "openings",
}
FEATURES = {
    "BadEnding": "a sad ending",
    "Conflict": "a quarrel or a problem that somebody has to deal with",
    "Dialogue": "people or animals that talk with each other",
    "Foreshadowing": "an early hint at what happens later",
    "MoralValue": "something good to learn from it",
    "Twist": "a surprise that changes everything",
}
LONGEST_NAME = 7  # characters
LONGEST_OPENING = 12  # words
MOST_FEATURES = 3
TEMPLATE = (
    "Tell a story of three to five short paragraphs for a very small child, in simple words that three-year-olds "
    'know. The story must have a character with the name "{name}", and use the verb "{verb}", the noun "{noun}" and '
    'the adjective "{adjective}". The story has {features}. Remember that every word has to be simple, and write '
    "nothing besides the story."
)
# Answers begin with this, so that each is a numbered list from the first line on.
FIRST_NUMBER = "1."
_ONE_A_LINE = "Number them from 1 to 100, one a line, and write nothing else."
_WORDS = "List 100 different {} that a child of three years knows, each a single word. " + _ONE_A_LINE
REQUESTS = {
    "names": ("List 100 different first names for people, whether girls or boys. " + _ONE_A_LINE,),
    "openings": (
        "List 100 different ways to begin a story for small children, each one sentence of simple words. "
        + _ONE_A_LINE,
        "List 100 different ways to begin a story for small children, each one sentence of simple words, no two of "
        "them with the same first word. " + _ONE_A_LINE,
    ),
    "verbs": (_WORDS.format("verbs"),),
    "nouns": (_WORDS.format("nouns"),),
    "adjectives": (_WORDS.format("adjectives"),),
}

Entry = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Entries = Annotated[list[Entry], Field(min_length=1)]


class StoryLists(BaseModel):
    """The lists of a file. None may be empty, and other keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    names: Entries | None = None
    openings: Entries | None = None
    verbs: Entries | None = None
    nouns: Entries | None = None
    adjectives: Entries | None = None
    features: Entries | None = Field(default=None, validation_alias=AliasChoices("features", "feature_labels"))

    @field_validator("features")
    @classmethod
    def _replace_labels(cls, entries: list[str] | None) -> list[str] | None:
        for entry in entries or ():
            if entry not in FEATURES and " " not in entry:
                raise ValueError(f"{entry!r} is neither a phrase nor one of the labels {', '.join(FEATURES)}")
        return entries and [FEATURES.get(entry, entry) for entry in entries]


def placeholders(template: str) -> set[str]:
    """Return the names in the braces of a template.

    Raises:
        ValueError: a name is unknown or has a format, or a brace has no partner.
    """
    known = ", ".join(f"{{{name}}}" for name in LISTS)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{error}: placeholders are {known}; a brace that is meant as such is doubled") from error
    names = set()
    for _, name, form, conversion in parts:
        if name is None:  # text behind the last placeholder
            continue
        if name not in LISTS or form or conversion:
            raise ValueError(f"unknown placeholder {{{name}}}: there are {known}, and nothing else inside the braces")
        names.add(name)
    return names


def read_lists(path: str | Path, needed: Iterable[str]) -> dict[str, list[str]]:
    """Read lists from a JSON file.

    Args:
        path: a JSON object whose values are lists of texts; its keys are the values of `LISTS`.
        needed: keys that must be there.

    Raises:
        ValueError: no such file, not JSON, a key is missing, or its value is no list of texts, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no list file {str(path)!r}: correct `lists`")
    try:
        lists = StoryLists.model_validate_json(path.read_text(encoding="utf-8")).model_dump()
    except UnicodeDecodeError as error:
        raise ValueError(f"list file {str(path)!r} is not UTF-8 ({error.reason}): convert it") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors()]
        raise ValueError(f"list file {str(path)!r} is not as it should be: {'; '.join(problems)}") from None
    missing = [name for name in needed if lists[name] is None]
    if missing:
        raise ValueError(
            f"list file {str(path)!r} misses the key{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}: add "
            "a list of texts, or leave the placeholder out of the template"
        )
    return {name: lists[name] for name in needed}


def _entries_of_line(kind: str, line: str) -> list[str]:
    if kind == "openings":
        line = line.strip("\"“”'*_ ")
        if not line or forbidden(line):  # every story with this beginning would be refused
            return []
        words = line.split()[:LONGEST_OPENING]
        # All beginnings, as the authors have them: stories begin with one word as well as with twelve.
        return [" ".join(words[:length]) for length in range(1, len(words) + 1)]
    line = line.strip('"“”*_,;. ')
    if not re.fullmatch(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*", line):
        return []
    if kind == "names":
        return [line] if len(line) <= LONGEST_NAME else []
    return [line.lower()]


def parse_answers(kind: str, answers: Iterable[str]) -> list[str]:
    """Return the entries of numbered lists, each once, in the order of their first appearance.

    A name has at most 7 characters. An opening gives one entry for every beginning of 1 to 12 words. A verb, noun or
    adjective is a single word, in lower case. Other lines are skipped.

    Args:
        kind: a key of `REQUESTS`.
        answers: texts with lines such as `12. Anna`.
    """
    entries: dict[str, None] = {}
    for answer in answers:
        for line in re.findall(r"^[ \t]*\d+[.)][ \t]*(\S.*?)[ \t]*$", answer, re.M):
            entries |= dict.fromkeys(_entries_of_line(kind, line))
    return list(entries)


def draw(lists: dict[str, list[str]], seed: int, index: int) -> dict[str, Any]:
    """Draw the name, words, features and opening of one story; they depend on nothing but the arguments.

    Args:
        lists: by the values of `LISTS`; nothing is drawn for a placeholder whose list is not given.
        seed: of the recipe.
        index: of the story, from 0.

    Returns:
        For instance `{"name": "Anna", ..., "features": ["a sad ending"], "opening": "One day"}`; up to 3 features.
    """
    # A string is hashed, so that neighbouring seeds and stories draw nothing alike.
    rng = random.Random(f"{seed} {index}")
    drawn: dict[str, Any] = {}
    for placeholder, name in LISTS.items():
        if name not in lists:
            continue
        if placeholder == "features":
            count = rng.randint(1, min(MOST_FEATURES, len(lists[name])))
            drawn[placeholder] = rng.sample(lists[name], count)
        else:
            drawn[placeholder] = rng.choice(lists[name])
    return drawn


def fill(template: str, drawn: dict[str, Any]) -> str:
    """Return the prompt: the template with the drawn words in place of its placeholders."""
    values = dict(drawn)
    if "features" in values:
        *others, last = values["features"]
        values["features"] = f"{', '.join(others)} and {last}" if others else last
    return template.format(**values)

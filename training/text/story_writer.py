# SPDX-License-Identifier: Apache-2.0
"""A seeded writer of short children's stories: the training text that needs no download.

Every story draws a character, a friend, a grown-up, a place, a required noun with an adjective that suits it and a
verb that it allows, one of eight plots, and features (dialogue, foreshadowing, moral, plot twist, bad ending; the
quarrel plot is the conflict). The plot says which sentences follow each other; `{fields}` in them are the drawn words.
The same words return through the whole story, so predicting it well needs a memory of what was said before.

Words and sentences are in `words.yaml`. All drawing uses `Random.random`, whose sequence Python keeps from version to
version, so that a seed gives the same stories everywhere.
"""

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml


Option = TypeVar("Option")

WORDS_FILE = Path(__file__).with_name("words.yaml")


class Thing(NamedTuple):
    """What the story is about: `kind` decides which plots take it, `ruin` how a bad ending finds it."""

    noun: str
    kind: str
    adjectives: tuple[str, ...]
    verbs: tuple[tuple[str, str], ...]  # (base, past)
    ruin: str = "broken"
    extra: str = ""  # the plot's own word: how practice goes wrong, or what is missing


class Plot(NamedTuple):
    """Alternatives for each step of a story. `twist` and `bad` close the story; after `happy` comes an `end`."""

    kinds: tuple[str, ...]
    setup: tuple[str, ...]
    foreshadow: tuple[str, ...]
    trouble: tuple[str, ...]
    talk: tuple[str, ...]  # either this, or
    narration: tuple[str, ...]
    happy: tuple[str, ...]
    twist: tuple[str, ...]
    bad: tuple[str, ...]
    end: tuple[str, ...]
    moral: tuple[str, ...]


def _read_thing(entry: dict[str, Any]) -> Thing:
    lists = {"adjectives": tuple(entry["adjectives"]), "verbs": tuple(entry["verbs"].items())}
    return Thing(**entry | lists)


def _read_plot(entry: dict[str, list[str]]) -> Plot:
    return Plot(**{step: tuple(sentences) for step, sentences in entry.items()})


_WORDS = yaml.safe_load(WORDS_FILE.read_text(encoding="utf-8"))
THINGS = tuple(map(_read_thing, _WORDS["things"]))
PLOTS = tuple(map(_read_plot, _WORDS["plots"].values()))
PLOTS_AND_THINGS = tuple((plot, tuple(thing for thing in THINGS if thing.kind in plot.kinds)) for plot in PLOTS)
SINGULAR, PLURAL, PLURAL_NOUNS = _WORDS["singular"], _WORDS["plural"], set(_WORDS["plural_nouns"])
GIRLS, BOYS, ANIMALS, SIZES = (_WORDS[group] for group in ("girls", "boys", "animals", "sizes"))
ELDERS = tuple(_WORDS["elders"].items())  # (word, pronoun)
PRONOUNS = _WORDS["pronouns"]
TRAITS, HOBBIES, HOMES, PLACES = (_WORDS[group] for group in ("traits", "hobbies", "homes", "places"))
OPENINGS, TRAIT_LINES, TRAIT_CLOSINGS = (_WORDS[step] for step in ("openings", "trait_lines", "trait_closings"))

# The first runs identified the stories by the checksum of the file that then held code and words. The stories are
# still the same to the bit, and so is their identity: such runs resume, and their results compare with new ones.
_RECORDED = {
    "be5b35ebc47f3a907978cb9729e2f94389fe1e67cd64f5cbf68e2afab83079dd": (
        "bd68c1b503464210f75009a44f7b1746526faafe3da65233a1b80efea3697a15"
    )
}


def pick(rng: random.Random, options: Sequence[Option]) -> Option:
    return options[int(rng.random() * len(options))]


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def pronouns_of(prefix: str, gender: str) -> dict[str, str]:
    """The fields are called after the male forms: `{he}`, `{him}`, `{his}`, `{himself}`; `{He}` begins a sentence."""
    forms = dict(zip(("he", "him", "his", "himself"), PRONOUNS[gender], strict=True))
    capitals = {field.capitalize(): form.capitalize() for field, form in forms.items()}
    return {prefix + field: form for field, form in (forms | capitals).items()}


def _names(gender: str) -> list[str]:
    return GIRLS if gender == "she" else BOYS


def _draw_people(rng: random.Random) -> dict[str, str]:
    """The character, a friend with another name (both children or both animals, never the same animal), a grown-up."""
    gender, friend_gender = pick(rng, ("she", "he")), pick(rng, ("she", "he"))
    name, friend = pick(rng, _names(gender)), pick(rng, _names(friend_gender))
    while friend == name:
        friend = pick(rng, _names(friend_gender))
    who, friend_full = ("girl", f"her friend {friend}") if gender == "she" else ("boy", f"his friend {friend}")
    if rng.random() < 0.4:
        who, other = pick(rng, ANIMALS), pick(rng, ANIMALS)
        while other == who:
            other = pick(rng, ANIMALS)
        friend_full = f"{friend} the {other}"
    elder, elder_gender = pick(rng, ELDERS)
    words = {"name": name, "who": who, "a_who": _with_article(f"{pick(rng, SIZES)} {who}"), "friend": friend}
    words |= {
        "friend_full": friend_full,
        "Friend_full": friend_full[0].upper() + friend_full[1:],
        "elder": elder,
        "Elder": elder.capitalize(),
    }
    words |= {"trait": pick(rng, TRAITS), "hobby": pick(rng, HOBBIES), "home": pick(rng, HOMES)}
    return words | pronouns_of("", gender) | pronouns_of("f_", friend_gender) | pronouns_of("e_", elder_gender)


def _draw_thing(rng: random.Random, thing: Thing) -> dict[str, str]:
    """The required noun, adjective and verb, and what has to agree with a noun in the plural."""
    adjective, (verb, verbed) = pick(rng, thing.adjectives), pick(rng, thing.verbs)
    phrase = f"{adjective} {thing.noun}"
    words = {"noun": thing.noun, "adjective": adjective, "verb": verb, "verbed": verbed, "thing": phrase}
    words |= {"ruin": thing.ruin, "extra": thing.extra, "Extra": thing.extra.capitalize()}
    if thing.noun in PLURAL_NOUNS:
        return words | PLURAL | {"a_thing": f"some {phrase}"}
    return words | SINGULAR | {"a_thing": _with_article(phrase)}


def _draw_place(rng: random.Random) -> dict[str, str]:
    place = pick(rng, tuple(PLACES))
    return {"place": place, "in_place": PLACES[place]["in_place"], "spot": pick(rng, PLACES[place]["spots"])}


def _draw_story(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Draw plot, words and features; returns the story with its `{fields}` open and the words that fill them."""
    plot, things = pick(rng, PLOTS_AND_THINGS)
    words = _draw_people(rng) | _draw_thing(rng, pick(rng, things)) | _draw_place(rng)

    outcome = pick(rng, ("happy", "happy", "happy", "moral", "moral", "twist", "twist", "bad"))
    # Foreshadowing and a moral exclude each other only because both together make the story too long.
    foreshadows = outcome != "moral" and rng.random() < 0.5
    begin = [pick(rng, OPENINGS), pick(rng, TRAIT_LINES), pick(rng, plot.setup)]
    if foreshadows:
        begin.append(pick(rng, plot.foreshadow))
    middle = [pick(rng, plot.talk if rng.random() < 0.65 else plot.narration)]
    if outcome in ("twist", "bad"):
        close = [pick(rng, getattr(plot, outcome))]
    else:
        middle.append(pick(rng, plot.happy))
        close = [pick(rng, plot.end)]
        if outcome == "moral":
            close.append(pick(rng, plot.moral))
        elif not foreshadows:
            close.append(pick(rng, TRAIT_CLOSINGS))
    paragraphs = (begin, [pick(rng, plot.trouble)], middle, close)
    return "\n".join(" ".join(sentences) for sentences in paragraphs), words


def write_story(rng: random.Random) -> str:
    """Write one story, of which all draws come from `rng`."""
    template, words = _draw_story(rng)
    return template.format_map(words)


def write_stories(num_stories: int, seed: int = 0) -> Iterator[str]:
    """Write `num_stories` short stories; the same `seed` always gives the same ones.

    Args:
        num_stories (`int`): how many; story i is the same however many follow it.
        seed (`int`, *optional*, defaults to 0): two seeds give two unrelated streams of stories.

    Yields:
        `str`: one story of 60 to 150 words in four paragraphs, separated by one line break. The writer draws at random
        and does not look back, so a repetition is possible, but there was none in the first million.
    """
    # A string seed is hashed, so that -1 and 1 differ (an integer seed loses its sign).
    rng = random.Random(f"story writer {seed}")
    for _ in range(num_stories):
        yield write_story(rng)


@functools.cache
def stories_identity() -> str:
    """Return a checksum that names the stories: it changes with any word of them, and with nothing else.

    It is the sha256 of the first 4,000 stories, in which every word and every sentence of `words.yaml` occurs, so that
    it depends on what the writer writes and not on how its code is written.
    """
    digest = hashlib.sha256("\n\n".join(write_stories(4000)).encode()).hexdigest()
    return _RECORDED.get(digest, digest)

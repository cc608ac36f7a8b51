# SPDX-License-Identifier: Apache-2.0
"""Cloze items of stories: the last sentence among those of other stories, and a name among other names.

Everything is found by rules on the text itself; there is no list of names. A word is a name in a story if it stands
with a capital letter inside a sentence of that story, and never without one, or if the stories together use it so.
The items depend on the stories and on a seed, not on any model or tokenizer.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


NUM_CANDIDATES = 4
WORD = re.compile(r"[^\W\d_]+")
# A letter, perhaps a comma, and a space come before: no sentence and no quotation begins here.
_INSIDE = re.compile(r"[^\W\d_],? $")
_ENDS = re.compile(r"[.!?][\"”’']*(\s+)(?=[\"“‘']?[A-Z])")
_GENDERS = {"he": 0, "him": 0, "his": 0, "himself": 0, "she": 1, "her": 1, "hers": 1, "herself": 1}
# A shorter last sentence, such as "The end.", says nothing of its story.
FEWEST_WORDS_OF_ENDING = 5
# A text before an item has at least so many words.
FEWEST_WORDS_BEFORE = 20
# Of a true ending and a candidate, the shorter has at least this share of the longer one's length.
SIMILAR_LENGTH = 2 / 3
# Of all uses of a known name, at most so many are without a capital letter.
MOST_LOWERCASE = 0.1


class Mention(NamedTuple):
    """A place where a story has a name: `text[start:end]`."""

    name: str
    start: int
    end: int


class Item(NamedTuple):
    """A text and candidates for what follows it, the true one first.

    Args:
        story: number of the story.
        context: what is read first; it ends without a space.
        candidates: each with the space or line break before it.
    """

    story: int
    context: str
    candidates: tuple[str, ...]


class NameItem(NamedTuple):
    """An item whose candidates are names.

    Args:
        item: text and names.
        distance: words since the true name was last seen; 0 for the word before.
        rivals: how many of the other names the text has.
        most_frequent: the candidate's number that the text has most often, the latest of several.
        latest: the candidate's number that the text had last.
    """

    item: Item
    distance: int
    rivals: int
    most_frequent: int
    latest: int


# Names


def _is_capitalised(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and word[1:].islower()


def _is_inside(text: str, start: int) -> bool:
    return _INSIDE.search(text, max(0, start - 3), start) is not None


class Names:
    """Names in a set of stories.

    Args:
        stories: texts whose use of capital letters decides.
    """

    def __init__(self, stories: Sequence[str]):
        inside: Counter[str] = Counter()
        as_written: Counter[str] = Counter()
        capitalised: Counter[str] = Counter()
        with_point: Counter[str] = Counter()
        for text in stories:
            for match in WORD.finditer(text):
                word = match.group()
                as_written[word] += 1
                if _is_capitalised(word):
                    capitalised[word] += 1
                    inside[word] += _is_inside(text, match.start())
                    with_point[word] += text.startswith(".", match.end())
        #: Words that a point follows always, such as "Mr": they are no names, and no sentence ends there.
        self.abbreviations = frozenset(word for word, count in capitalised.items() if with_point[word] == count > 1)
        self.known = frozenset(
            word
            for word, count in inside.items()
            if count > 1 and as_written[word.lower()] <= MOST_LOWERCASE * count and word not in self.abbreviations
        )

    def mentions(self, text: str) -> list[Mention]:
        """Return all names of a text, in its order."""
        matches = list(WORD.finditer(text))
        words = {match.group() for match in matches}
        here = {
            match.group() for match in matches if _is_capitalised(match.group()) and _is_inside(text, match.start())
        }
        here = {word for word in here - self.abbreviations if word.lower() not in words} | self.known
        return [Mention(match.group(), *match.span()) for match in matches if match.group() in here]


def ranked(mentions: Sequence[Mention]) -> list[str]:
    """Return the names of mentions, the most frequent first, and of several the one that comes first."""
    return [name for name, _ in Counter(mention.name for mention in mentions).most_common()]


# Endings


class _Ending(NamedTuple):
    """The last sentence of a story: where it begins, and its names with their ranks in the whole story."""

    start: int
    end: int
    mentions: list[Mention]
    ranks: dict[str, int]
    genders: frozenset[int]


def sentence_starts(text: str, names: Names) -> list[int]:
    """Return where the sentences of a text begin.

    What follows a quotation on the same line belongs to its sentence, as in `"Come!" Tim said.`
    """
    starts = [0]
    for match in _ENDS.finditer(text):
        before = WORD.findall(text[max(0, match.start() - 30) : match.start()])
        is_abbreviated = text[match.start()] == "." and before and before[-1] in names.abbreviations
        is_speech = match.start(1) > match.start() + 1 and "\n" not in match.group(1)
        if not is_abbreviated and not is_speech:
            starts.append(match.end())
    return starts


def _find_ending(text: str, names: Names) -> _Ending | None:
    """Return the last sentence that is long enough, or None if it has half a quotation or too little before it."""
    bounds = [*sentence_starts(text, names), len(text)]
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in zip(bounds, bounds[1:], strict=False)]
    long_enough = [span for span in spans if len(text[slice(*span)].split()) >= FEWEST_WORDS_OF_ENDING]
    if not long_enough:
        return None
    start, end = long_enough[-1]
    sentence = text[start:end]
    # A quotation that begins before the sentence, or goes on behind it, would be cut.
    if any(part.count('"') % 2 or part.count("“") != part.count("”") for part in (text[:start], sentence)):
        return None
    if len(text[:start].split()) < FEWEST_WORDS_BEFORE:
        return None
    mentions = names.mentions(text)
    ranks = {name: rank for rank, name in enumerate(ranked(mentions))}
    genders = frozenset(_GENDERS[word] for word in map(str.lower, WORD.findall(sentence)) if word in _GENDERS)
    return _Ending(start, end, [mention for mention in mentions if start <= mention.start < end], ranks, genders)


def _with_names(text: str, ending: _Ending, replacements: Sequence[str]) -> str:
    """Return an ending with each of its names replaced by that of the same rank in another story."""
    parts, position = [], ending.start
    for mention in ending.mentions:
        parts += [text[position : mention.start], replacements[ending.ranks[mention.name]]]
        position = mention.end
    return "".join([*parts, text[position : ending.end]])


def _fitting(text: str, ending: _Ending, other_text: str, other: _Ending, replacements: Sequence[str]) -> str | None:
    """Return another story's ending with this story's names, or None if it would stand out by its form.

    It has as many different names, pronouns of the same genders, and a similar length.
    """
    counts = [len({mention.name for mention in one.mentions}) for one in (ending, other)]
    ranks = [other.ranks[mention.name] for mention in other.mentions]
    if counts[0] != counts[1] or ending.genders != other.genders or max(ranks, default=-1) >= len(replacements):
        return None
    swapped = _with_names(other_text, other, replacements)
    shorter, longer = sorted([len(swapped), ending.end - ending.start])
    return swapped if shorter >= SIMILAR_LENGTH * longer and swapped != text[ending.start : ending.end] else None


def ending_items(stories: Sequence[str], num_items: int, seed: int) -> list[Item]:
    """Return items whose candidates are the last sentence and those of three other stories, names swapped.

    Stories without three fitting sentences elsewhere are left out.

    Args:
        stories: the texts.
        num_items: at most so many, from the first stories on.
        seed: of the choice of other stories.
    """
    names = Names(stories)
    endings = [_find_ending(text, names) for text in stories]
    items: list[Item] = []
    for number, (text, ending) in enumerate(zip(stories, endings, strict=True)):
        if ending is None or len(items) == num_items:
            continue
        # By their rank in the whole story, as the names of the other endings.
        replacements = list(ending.ranks)
        true = text[ending.start : ending.end]
        chosen: list[str] = []
        for other in np.random.default_rng([seed, number]).permutation(len(stories)):
            found = endings[other]
            swapped = None if found is None else _fitting(text, ending, stories[other], found, replacements)
            if swapped is not None and swapped not in chosen:
                chosen.append(swapped)
            if len(chosen) == NUM_CANDIDATES - 1:
                before = text[: ending.start]
                space = before[len(before.rstrip()) :]
                items.append(Item(number, before.rstrip(), tuple(space + end for end in (true, *chosen))))
                break
    return items


# Names to fill in


def _begin_alike(one: str, other: str) -> bool:
    # "Tim" is a beginning of "Timmy", so that the probability of the one contains that of the other.
    return one.startswith(other) or other.startswith(one)


def _others(true: str, near: Sequence[str], far: Iterator[str]) -> list[str]:
    """Return three names unlike the true one and each other: those of the story first."""
    chosen = [true]
    for name in (*near, *far):
        if len(chosen) == NUM_CANDIDATES:
            break
        if not any(_begin_alike(name, other) for other in chosen):
            chosen.append(name)
    return chosen[1:]


def _name_item(
    number: int, text: str, mentions: Sequence[Mention], far: Iterator[str], names: Names
) -> NameItem | None:
    """Return the item at the last of the mentions, all of which the text has up to there; None for want of names."""
    *earlier, target = mentions
    # A word that a story has once with a capital letter, and no other story has, may be no name.
    repeated = {name for name, count in Counter(mention.name for mention in earlier).items() if count > 1}
    near = [name for name in ranked(earlier) if name != target.name and name in repeated | names.known]
    candidates = (target.name, *_others(target.name, near, far))
    if len(candidates) < NUM_CANDIDATES:
        return None
    before = text[: target.start]
    space = before[len(before.rstrip()) :]
    last_seen = max(mention.end for mention in earlier if mention.name == target.name)
    seen = Counter(mention.name for mention in earlier)
    latest = {mention.name: mention.start for mention in earlier}
    return NameItem(
        Item(number, before.rstrip(), tuple(space + name for name in candidates)),
        distance=len(WORD.findall(text[last_seen : target.start])),
        rivals=sum(name in seen for name in candidates[1:]),
        most_frequent=max(range(len(candidates)), key=lambda i: (seen[candidates[i]], latest.get(candidates[i], -1))),
        latest=max(range(len(candidates)), key=lambda i: latest.get(candidates[i], -1)),
    )


def name_items(stories: Sequence[str], num_stories: int, per_story: int, seed: int) -> list[NameItem]:
    """Return items whose candidates are a name that the story had before, and three other names.

    The other names are the story's own where it has had them by then, the most frequent first, and names of other
    stories where it has too few.

    Args:
        stories: the texts.
        num_stories: at most so many have items, from the first on.
        per_story: items of a story at most, at places drawn at random.
        seed: of the places and the names of other stories.
    """
    names = Names(stories)
    all_mentions = [names.mentions(text) for text in stories]
    # Main names of the stories, each as often as it is one.
    main_names = [
        known[0] for mentions in all_mentions if (known := [n for n in ranked(mentions) if n in names.known])
    ]
    items: list[NameItem] = []
    used = 0
    for number, (text, mentions) in enumerate(zip(stories, all_mentions, strict=True)):
        places = [
            place
            for place, mention in enumerate(mentions)
            if mention.name in {earlier.name for earlier in mentions[:place]}
            and len(text[: mention.start].split()) >= FEWEST_WORDS_BEFORE
        ]
        if not places or used == num_stories:
            continue
        used += 1
        generator = np.random.default_rng([seed, number])
        for place in sorted(generator.permutation(places)[:per_story].tolist()):
            own = {mention.name for mention in mentions}
            far = (name for name in generator.permutation(main_names).tolist() if name not in own)
            item = _name_item(number, text, mentions[: place + 1], far, names)
            items += [] if item is None else [item]
    return items

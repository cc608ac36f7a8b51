# SPDX-License-Identifier: Apache-2.0
"""Filters that make a language model's answer into a story or refuse it: cut, join, check, find duplicates.

The steps are those of the BabiStories data set (arXiv 2405.06394, appendix). The list of markers is our own, and so is
the rule that unfinished and repeated stories are dropped.
"""

import hashlib
import re
from typing import NamedTuple

from datasketch import MinHash, MinHashLSH


# With shorter shingles, any two stories for small children are alike. With longer ones, a copy with a few changed
# words is not found.
SHINGLE_WORDS = 3
NUM_PERMUTATIONS = 128

# Beginnings of a passage that is about the story, or about the task, and no longer the story. These are searched for
# at the start of a line, without regard to case and to decoration such as "**" or "#".
_LINE_MARKERS = {
    "moral": r"(?:the )?morals?(?: of (?:the|this|our) (?:story|tale))?(?: is)?\s*:",
    "lesson": r"(?:the )?lessons?(?: learn(?:ed|t))?\s*:",
    "note": r"(?:important |additional |final )?notes?(?: (?:to|for) [\w ]+)?\s*:",
    "note of a person": r"(?:author|editor|teacher|parent|writer|translator)s?['’]?s? (?:notes?|guide|corner)\b",
    "to parents": r"(?:dear|to the|for|message (?:to|for)) (?:parents?|teachers?|grown-?ups?)\b",
    "the end": r"(?:the end|fin|finis|end of (?:the )?story)\b\W*$",
    "to be continued": r"to be continued\b",
    "word list": r"(?:key ?words?|vocabulary|glossary|(?:new|required|simple) words?|words? (?:used|list))\b.*:",
    "required word": r"(?:verb|noun|adjective|name|character)s?(?: (?:used|name))?\s*:",
    "features": r"(?:story )?(?:features?|elements?)(?: (?:used|included))?\s*:",
    "feature": r"(?:dialogue|conflict|(?:plot )?twist|foreshadowing|bad ending|moral value|theme)\s*:",
    "questions": r"(?:(?:discussion|comprehension|follow-?up) )?questions?\b.*:",
    "answers": r"(?:answers?|answer key|response|output|input)\s*:",
    "activity": r"(?:activity|activities|exercises?)\s*:",
    "title": r"(?:story )?titles?\s*:",
    "summary": r"(?:summary|synopsis|explanation|analysis|reflection|conclusion)\s*:",
    "word count": r"(?:word count|total words|number of words)\b",
    "heading": r"(?:chapter|part|story|version|paragraph) (?:\d+|one|two|three)\b\W*(?:.*:|$)",
    "other version": r"(?:alternat(?:iv)?e|another|different) (?:ending|version|story)\b.*:",
    "speaker": r"(?:user|assistant|human|system|ai|bot)\s*\d*\s*:",
    "instruction": r"(?:instructions?|prompt|task|requirements?|reminder)\s*:",
    "next request": r"(?:please )?(?:write|tell|create|generate) (?:me )?(?:a|another) (?:\w+ )?story\b",
    "illustration": r"(?:illustrations?|pictures?|image)\s*:",
    "translation": r"(?:translation|source|credits?|references?)\s*:",
    "copyright": r"(?:copyright|©|all rights reserved)",
    "rule": r"(?:-{3,}|={3,}|\*{3,}|_{3,}|~{3,})\s*$",
}
# The same, anywhere in a line.
_MARKERS = {
    "moral in a sentence": r"\bthe moral of (?:the|this|our) (?:story|tale)\b",
    "farewell": r"\bi hope (?:that )?you (?:like|liked|enjoy|enjoyed) (?:the|this|my) (?:story|tale)\b",
    "offer": r"\blet me know if (?:you|there|this)\b",
    "about the story": r"\b(?:this|the above) (?:short )?story (?:uses|contains|includes|features|teaches)\b",
    "the end in a line": r"(?<=[.!?\"”’])[ \t]+the end(?=\s*[.!]*\s*(?:\n|$))",
    "code": r"```",
    "template": r"<\|?/?(?:s|im_start|im_end|endoftext|user|assistant|system|eot_id)\|?>|\[/?INST\]",
}
# © is no decoration, because one marker begins with it.
_PATTERNS = {name: re.compile(rf"^[^\w\n©]*(?:{p})", re.I | re.M) for name, p in _LINE_MARKERS.items()}
_PATTERNS["rule"] = re.compile(rf"^[ \t]*{_LINE_MARKERS['rule']}", re.M)
_PATTERNS |= {name: re.compile(pattern, re.I) for name, pattern in _MARKERS.items()}

_FORBIDDEN = re.compile(r"https?|&(?:#?\w+);|--|[\\*#<>%^/@\[\]{}+=()\ufffd]|[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f]", re.I)
_SENTENCE_END = re.compile(r"[.!?…]+[\"”’']*(?=\s|$)")
# A closing quotation mark ends a story as well. It follows a word, where an opening one follows a space.
_FINISHED = re.compile(r"(?:[.!?…][\"”’']*|\w,?[\"”])$")


class Story(NamedTuple):
    """An answer after `clean`: `text` is the story, or the rest of the answer if it was refused for `reason`."""

    text: str
    reason: str | None = None
    detail: str | None = None
    marker: str | None = None


def cut_at_marker(text: str) -> tuple[str, str | None]:
    """Return the text before the first marker, and the marker's name; the whole text and None if there is none."""
    markers = [(match.start(), name) for name, pattern in _PATTERNS.items() if (match := pattern.search(text))]
    if not markers:
        return text, None
    start, name = min(markers)
    return text[:start].rstrip(), name


def forbidden(text: str) -> str | None:
    """Return the first characters that no story for small children needs, such as `#`, `http` or a parenthesis."""
    match = _FORBIDDEN.search(text)
    return match[0] if match else None


def finished(text: str) -> str:
    """Return the text up to the end of its last finished sentence; empty if no sentence ends."""
    if _FINISHED.search(text):
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def clean(text: str, opening: str) -> Story:
    """Make an answer into a story.

    Cut at the first marker after the opening, put paragraphs one line end apart, and cut a last sentence that is not
    finished.

    Args:
        text: the answer, which begins with the opening.
        opening: the words that it was made to begin with; no marker is looked for in them.

    Returns:
        `reason` None, or `empty` (nothing but the opening), `forbidden` (`detail`: the first such characters) or
        `unfinished` (no sentence beyond the opening has an end); `marker` is the name of the marker that it was cut
        at, if any.
    """
    begin, rest = text[: len(opening)], text[len(opening) :]
    rest, marker = cut_at_marker(rest)
    lines = (line.strip() for line in (begin + rest).splitlines())
    text = "\n".join(line for line in lines if line)
    if len(text) <= len(opening.strip()):
        return Story(text, "empty", marker=marker)
    characters = forbidden(text)
    if characters is not None:
        return Story(text, "forbidden", characters, marker)
    whole = finished(text)
    if len(whole) <= len(opening.strip()):
        return Story(text, "unfinished", marker=marker)
    return Story(whole, marker=marker)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def contains(text: str, word: str) -> bool:
    """Return whether a word occurs, in any case, with any regular ending: `walk` in "walked", not `run` in "ran"."""
    # A last e or y changes with the ending: "bake" is in "baking", "happy" in "happily".
    stem = re.sub(r"(?<=\w{3})[ey]$", "", word.lower())
    return re.search(rf"\b{re.escape(stem)}\w*", text.lower()) is not None


def _sketch(story_words: list[str]) -> MinHash:
    # A story of fewer words is a shingle by itself.
    count = max(1, len(story_words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(story_words[start : start + SHINGLE_WORDS]).encode() for start in range(count)}
    sketch = MinHash(num_perm=NUM_PERMUTATIONS)
    sketch.update_batch(sorted(shingles))
    return sketch


class Duplicates:
    """The stories so far, in which equal ones are found for certain, and similar ones by an estimate (MinHash).

    Two stories are near duplicates if the Jaccard similarity of their sets of three words in a row is about
    `threshold` or more. Locality-sensitive hashing finds them without a comparison of all pairs; close to the
    threshold it may err on either side.

    Args:
        threshold: between 0 and 1; None looks for equal stories only.
    """

    def __init__(self, threshold: float | None):
        self._equal: dict[bytes, int] = {}
        self._similar = None if threshold is None else MinHashLSH(threshold, num_perm=NUM_PERMUTATIONS)

    def find(self, text: str, index: int) -> tuple[str, int] | None:
        """Look a story up and, if it is new, remember it.

        Args:
            text: the story.
            index: a number that identifies it.

        Returns:
            None for a new story, else `duplicate` or `near duplicate` and the index of the earlier one.
        """
        story_words = words(text)
        digest = hashlib.blake2b(" ".join(story_words).encode(), digest_size=16).digest()
        if digest in self._equal:
            return "duplicate", self._equal[digest]
        if self._similar is not None:
            sketch = _sketch(story_words)
            similar = self._similar.query(sketch)
            if similar:
                return "near duplicate", min(similar)
            self._similar.insert(index, sketch)
        self._equal[digest] = index
        return None

# SPDX-License-Identifier: Apache-2.0
"""What a language model answers, made into a story or refused: cut, join, check, and notice what was told before.

The steps are those of the BabiStories data set (arXiv 2405.06394, appendix); the list of markers is our own, and
unfinished and repeated stories are dropped besides.
"""

import hashlib
import re
from typing import NamedTuple

from datasketch import MinHash, MinHashLSH


# A shorter shingle makes any two stories for small children alike, a longer one hides a changed word every few.
SHINGLE_WORDS = 3
NUM_PERMUTATIONS = 128

# What begins a passage that is about the story, or about the task, and no longer the story. The first group of each
# is looked for at the start of a line, without regard to case and to decoration such as "**" or "#".
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
# The same, but wherever it stands.
_MARKERS = {
    "moral in a sentence": r"\bthe moral of (?:the|this|our) (?:story|tale)\b",
    "farewell": r"\bi hope (?:that )?you (?:like|liked|enjoy|enjoyed) (?:the|this|my) (?:story|tale)\b",
    "offer": r"\blet me know if (?:you|there|this)\b",
    "about the story": r"\b(?:this|the above) (?:short )?story (?:uses|contains|includes|features|teaches)\b",
    "the end in a line": r"(?<=[.!?\"”’])[ \t]+the end(?=\s*[.!]*\s*(?:\n|$))",
    "code": r"```",
    "template": r"<\|?/?(?:s|im_start|im_end|endoftext|user|assistant|system|eot_id)\|?>|\[/?INST\]",
}
_PATTERNS = {name: re.compile(rf"^[^\w\n©]*(?:{p})", re.I | re.M) for name, p in _LINE_MARKERS.items()}
_PATTERNS["rule"] = re.compile(rf"^[ \t]*{_LINE_MARKERS['rule']}", re.M)
_PATTERNS |= {name: re.compile(pattern, re.I) for name, pattern in _MARKERS.items()}

_FORBIDDEN = re.compile(r"https?|&(?:#?\w+);|--|[\\*#<>%^/@\[\]{}+=()\ufffd]|[^\S\n ]|[\x00-\x09\x0b-\x1f\x7f]", re.I)
_SENTENCE_END = re.compile(r"[.!?…]+[\"”’']*(?=\s|$)")
# A closing quotation mark ends a story as well: there is a word before it, where an opening one has a space.
_FINISHED = re.compile(r"(?:[.!?…][\"”’']*|\w,?[\"”])$")


class Story(NamedTuple):
    """An answer after `clean`: `text` is the story, or what was left of it when `reason` refused it."""

    text: str
    reason: str | None = None
    detail: str | None = None
    marker: str | None = None


def clean(text: str, opening: str) -> Story:
    """Make an answer into a story.

    Cut at the first marker after the opening, put paragraphs one line end apart, and cut a last sentence that is not
    finished.

    Args:
        text: the answer, which begins with the opening.
        opening: the words that it was made to begin with; no marker is looked for in them.

    Returns:
        `reason` None, or `empty` (nothing but the opening), `forbidden` (`detail`: the first such characters) or
        `unfinished` (no sentence beyond the opening has an end); `marker` is the name of what was cut at, if any.
    """
    begin, rest = text[: len(opening)], text[len(opening) :]
    rest, marker = cut_at_marker(rest)
    lines = (line.strip() for line in (begin + rest).splitlines())
    text = "\n".join(line for line in lines if line)
    if len(text) <= len(opening.strip()):
        return Story(text, "empty", marker=marker)
    found = forbidden(text)
    if found is not None:
        return Story(text, "forbidden", found, marker)
    whole = finished(text)
    if len(whole) <= len(opening.strip()):
        return Story(text, "unfinished", marker=marker)
    return Story(whole, marker=marker)


def cut_at_marker(text: str) -> tuple[str, str | None]:
    """What stands before the first marker, and the marker's name; the whole text and None if there is none."""
    found = [(match.start(), name) for name, pattern in _PATTERNS.items() if (match := pattern.search(text))]
    if not found:
        return text, None
    start, name = min(found)
    return text[:start].rstrip(), name


def forbidden(text: str) -> str | None:
    """The first characters that no story for small children needs, such as `#`, `http` or a parenthesis."""
    match = _FORBIDDEN.search(text)
    return match[0] if match else None


def finished(text: str) -> str:
    """The text up to the end of its last finished sentence; empty if no sentence ends."""
    if _FINISHED.search(text):
        return text
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def contains(text: str, word: str) -> bool:
    """Whether a word occurs, in any case and with any regular ending: `walk` is in "walked", `run` is not in "ran"."""
    stem = re.sub(r"(?<=\w{3})[ey]$", "", word.lower())
    return re.search(rf"\b{re.escape(stem)}\w*", text.lower()) is not None


class Duplicates:
    """Stories seen so far: equal ones are found for certain, similar ones as MinHash estimates.

    Two stories are near duplicates if the Jaccard similarity of their sets of three words in a row is about
    `threshold` or more. Locality-sensitive hashing finds them without comparing all pairs: close to the threshold it
    may err on either side.

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
            index: by which it is to be known.

        Returns:
            None for a new story, else `duplicate` or `near duplicate` and the index of the earlier one.
        """
        told = words(text)
        digest = hashlib.blake2b(" ".join(told).encode(), digest_size=16).digest()
        if digest in self._equal:
            return "duplicate", self._equal[digest]
        if self._similar is not None:
            sketch = _sketch(told)
            similar = self._similar.query(sketch)
            if similar:
                return "near duplicate", min(similar)
            self._similar.insert(index, sketch)
        self._equal[digest] = index
        return None


def _sketch(told: list[str]) -> MinHash:
    last = max(1, len(told) - SHINGLE_WORDS + 1)
    shingles = {" ".join(told[start : start + SHINGLE_WORDS]).encode() for start in range(last)}
    sketch = MinHash(num_perm=NUM_PERMUTATIONS)
    sketch.update_batch(sorted(shingles))
    return sketch

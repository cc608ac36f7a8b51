# SPDX-License-Identifier: Apache-2.0
"""A local text in two parts, one to train on and one held out for validation, the same on every machine.

Whole documents are held out, in the order of their sha256, as long as they fit into the share; equal documents stay
together. So neither the names nor the order of files counts, and no document is in both parts. Where documents are
too long for that, such as a single book, the end of each is held out instead.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence

from training.text.story_files import read_story_file


# The part that is held out by whole documents has at least this much of its share.
_LEAST = 0.5
# In characters: a long text is cut behind the word at its border, unless that is longer than any word.
_LONGEST_WORD = 100
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _read(paths: Sequence[str], text_field: str, separator: str) -> Iterator[str]:
    for path in paths:
        yield from read_story_file(path, text_field, separator)


def _held_out_documents(paths: Sequence[str], text_field: str, separator: str, fraction: float) -> set[bytes]:
    """Return the sha256 of the documents to hold out; none if they are too long, so that each is to be cut."""
    sizes: dict[bytes, int] = {}
    for text in _read(paths, text_field, separator):
        digest = _digest(text)
        sizes[digest] = sizes.get(digest, 0) + len(text)
    room = share = fraction * sum(sizes.values())
    chosen = set()
    for digest in sorted(sizes):
        if sizes[digest] <= room:
            chosen.add(digest)
            room -= sizes[digest]
    return chosen if share - room >= _LEAST * share else set()


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Return the beginning of a text and its end, which has a fraction of it, cut between two words."""
    place = len(text) - round(fraction * len(text))
    end = _WORD_END.search(text, place, place + _LONGEST_WORD)
    place = end.start() if end else place
    return text[:place], text[place:].lstrip()


def read_part(
    paths: Sequence[str], text_field: str, separator: str, split: str, fraction: float
) -> Iterator[dict[str, str]]:
    """Yield the stories of one part of several files as rows with the one column `text`.

    Args:
        paths: files, as of `story_files.read_story_files`; they are read twice.
        text_field: as there.
        separator: as there.
        split: `"train"` or `"validation"`, which is held out.
        fraction: share of the characters that is held out at most, or, where documents are cut, about so much.

    Raises:
        ValueError: as there.
    """
    is_train = split == "train"
    held_out = _held_out_documents(paths, text_field, separator, fraction)
    for text in _read(paths, text_field, separator):
        if held_out:
            part = text if (_digest(text) in held_out) != is_train else ""
        else:
            part = _cut(text, fraction)[0 if is_train else 1]
        if part.strip():
            yield {"text": part}

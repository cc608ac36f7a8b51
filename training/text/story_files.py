# SPDX-License-Identifier: Apache-2.0
"""Stories in local files: one story is in memory at a time, and a mistake is reported with its file and line.

A `.jsonl` file has one object a line. A `.txt` file has either one JSON string a line (as BabiStories does; the first
line that is not empty decides) or plain stories with a separator between them, on a line of its own or not (as
TinyStories does); there, space around a story is dropped and line ends become `\\n`. A `.md` file is read like a
`.txt` file. Each may be compressed (`.gz`). Empty lines and empty stories are skipped.
"""

import codecs
import functools
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from training.untrusted import open_packed, parse_json


FILE_FORMS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".md", ".md.gz")
# In bytes, of a line of JSON and of a story between separators. Something longer is no story: the separator is wrong,
# or the file is made to fill the memory.
LARGEST_STORY = 16 * 2**20
_CHUNK = 2**20
_REMEDY = "cut it into stories, or raise LARGEST_STORY in training/text/story_files.py"


def quoted_names(names: Iterable[str]) -> str:
    """Return names in quotation marks, as error messages list them."""
    return ", ".join(repr(name) for name in names) or "none at all"


def _numbered_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, counted from 1, none of them larger than `LARGEST_STORY`."""
    for number in itertools.count(1):
        line = file.readline(LARGEST_STORY + 1)
        if not line:
            return
        if len(line) > LARGEST_STORY:
            raise ValueError(f"{path}:{number}: the line has over {LARGEST_STORY:,} bytes: {_REMEDY}")
        yield number, line


def _counted_lines(file: BinaryIO, path: str, at: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield the place of each line in messages, the line, and the byte behind it; `file` stands at a byte."""
    end = at
    for number, line in _numbered_lines(file, path):
        end += len(line)
        where = f"{path}:{number}" if at == 0 else f"{path}, line {number} from byte {at:,} on"
        yield where, line.removeprefix(codecs.BOM_UTF8) if end == len(line) else line, end


def _parse_line(line: bytes, where: str) -> Any:
    """Return the JSON value of a line; `where` is its place in messages."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}): convert the file to UTF-8") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: broken JSON (column {error.colno}: {error.msg}) in {text[:60].rstrip()!r}: in this file, "
            "each line has to be a JSON value of its own"
        ) from error
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists within lists
        return parse_json(text, where)


def _story_of(value: Any, text_field: str | None, where: str) -> str:
    """Return the story in a JSON value: the field of an object, or, without `text_field`, the value itself."""
    if text_field is None:
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: {type(value).__name__}, but the first line is a JSON string, so all have to be"
            )
        text = value
    elif not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}, but a JSON object with a field {text_field!r} is needed")
    elif text_field not in value:
        raise ValueError(f"{where}: no field {text_field!r}, but {quoted_names(value)}: set text_field to one of them")
    else:
        text = value[text_field]
        if not isinstance(text, str):
            raise ValueError(f"{where}: field {text_field!r} is {type(text).__name__}, not a string")
    # JSON can escape half of a surrogate pair, which no UTF-8 file, and so no cache, can hold.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text has half a character, {text[error.start]!r}: repair the line") from error
    return text


def _read_json_lines(file: BinaryIO, path: str, text_field: str | None) -> Iterator[str]:
    """Yield one story a line: in the field of an object, or, without `text_field`, as a string."""
    for where, line, _ in _counted_lines(file, path, 0):
        if not line.strip():
            continue
        text = _story_of(_parse_line(line, where), text_field, where)
        if text.strip():
            yield text


def _decode_story(content: bytes, path: str, line: int) -> str:
    """Return the text of a story that begins on this line of the file."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}): convert the file to UTF-8") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").strip()


def _read_separated(file: BinaryIO, path: str, separator: str) -> Iterator[str]:
    """Yield stories with a separator between them. The file is read in chunks, for a corpus may be a single line."""
    delimiter = separator.encode("utf-8")
    buffer, searched, line, separated = bytearray(), 0, 1, False
    while chunk := file.read(_CHUNK):
        buffer += chunk
        while (end := buffer.find(delimiter, searched)) >= 0:
            if text := _decode_story(bytes(buffer[:end]), path, line):
                yield text
            line += buffer.count(b"\n", 0, end + len(delimiter))
            del buffer[: end + len(delimiter)]
            searched, separated = 0, True
        # The next chunk may complete a separator that begins in this one.
        searched = max(0, len(buffer) - len(delimiter) + 1)
        if not separated and len(buffer) > LARGEST_STORY:
            raise ValueError(
                f"{path}: {separator!r} does not occur in the first {LARGEST_STORY >> 20} MiB, so all of it would be "
                "one story: set separator to what stands between the stories"
            )
        if len(buffer) > LARGEST_STORY:
            raise ValueError(f"{path}:{line}: the story has over {LARGEST_STORY:,} bytes: {_REMEDY}")
    if text := _decode_story(bytes(buffer), path, line):
        yield text


def _begins_with_json_string(file: BinaryIO) -> bool:
    lines = (
        line.removeprefix(codecs.BOM_UTF8).lstrip() for line in iter(functools.partial(file.readline, _CHUNK), b"")
    )
    first = next(filter(None, lines), b"")
    # The rest of a long first line. It has a bound too: the file may be one endless line.
    if first.startswith(b'"') and not first.endswith(b"\n"):
        first += file.readline(LARGEST_STORY)
    file.seek(0)
    try:
        return first.startswith(b'"') and isinstance(json.loads(first), str)
    except (ValueError, RecursionError):
        return False


def read_story_file(path: str, text_field: str, separator: str) -> Iterator[str]:
    """Yield the stories of one file.

    Args:
        path: a file of one of the `FILE_FORMS`.
        text_field: where the story is in an object of a `.jsonl` file.
        separator: what stands between stories in a `.txt` file without JSON.

    Raises:
        ValueError: the file cannot be read as described (with file and line), has a line or a story of more than
            `LARGEST_STORY` bytes, or unpacks to a hundred times its size.
    """
    name = path.lower()
    try:
        with open_packed(path) if name.endswith(".gz") else open(path, "rb") as file:
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from _read_json_lines(file, path, text_field)
            elif _begins_with_json_string(file):
                yield from _read_json_lines(file, path, None)
            else:
                yield from _read_separated(file, path, separator)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: the compressed data are damaged or cut off ({error}): get the file again"
        ) from error


def read_story_lines(path: str, text_field: str, at: int = 0) -> Iterator[tuple[str, int]]:
    """Yield the stories of a `.jsonl` file from a byte on, at which a line begins, each with the byte behind its line.

    Raises:
        ValueError: as `read_story_file` does. Lines are counted from that byte on.
    """
    with open(path, "rb") as file:
        file.seek(at)
        for where, line, end in _counted_lines(file, path, at):
            text = _story_of(_parse_line(line, where), text_field, where) if line.strip() else ""
            if text.strip():
                yield text, end


def read_story_files(paths: list[str], text_field: str, separator: str) -> Iterator[dict[str, str]]:
    """Yield the stories of several files as rows with the one column `text`; arguments as of `read_story_file`."""
    for path in paths:
        for text in read_story_file(path, text_field, separator):
            yield {"text": text}

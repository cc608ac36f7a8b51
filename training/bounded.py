# SPDX-License-Identifier: Apache-2.0
"""Reading what others have written: within bounds, and with a message that names the file for whatever is wrong.

A file of a few kilobytes can ask for any amount of memory: it unpacks to gigabytes, nests a hundred thousand lists, or
repeats an alias of an alias. What is read here takes memory in proportion to the bounds below, and every fault is a
`ValueError`.
"""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml


MEBIBYTE = 2**20
# A compressed file may unpack to so many times its size; text shrinks to a third or a tenth, a bomb to a thousandth.
MOST_TIMES = 100
# Up to here it may unpack to anything: a small file that says one thing often is no bomb.
ALWAYS_UNPACKED = 64 * MEBIBYTE
# Of a file of settings in JSON, a tokenizer included, and of one in YAML.
LARGEST_JSON, LARGEST_YAML = 256 * MEBIBYTE, MEBIBYTE
# Values of a YAML file, each counted as often as an alias repeats it.
MOST_YAML_VALUES = 20_000
_WHERE = "in training/bounded.py"


class _Unpacked(io.RawIOBase):
    """What a gzip file unpacks to, until that is too much."""

    def __init__(self, path: str | Path):
        self._path, self._packed = path, open(path, "rb")
        self._file = gzip.GzipFile(fileobj=self._packed, mode="rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = self._file.readinto(buffer)
        unpacked, packed = self._file.tell(), self._packed.tell()
        refuse_bomb(self._path, packed, unpacked)
        return size

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._packed.close()
        super().close()


def open_packed(path: str | Path) -> BinaryIO:
    """Open a gzip file to be read as what it unpacks to; reading raises `ValueError` once it is a bomb."""
    return io.BufferedReader(_Unpacked(path), MEBIBYTE)


def refuse_bomb(path: str | Path, packed: int, unpacked: int) -> None:
    """`ValueError` if so many bytes of a file unpack to so many that it is made to fill a memory or a disk."""
    if unpacked > max(ALWAYS_UNPACKED, MOST_TIMES * packed):
        raise ValueError(
            f"{path}: {packed:,} bytes unpack to {unpacked:,} and more, over {MOST_TIMES} times as much: if you "
            f"trust the file, unpack it yourself, or raise MOST_TIMES {_WHERE}"
        )


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """A JSON value; `ValueError`, which begins with `where`, if it is none or none that can be held."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise ValueError(f"{where}: cannot be read as JSON ({str(error).partition(';')[0]})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Content of a file that holds a JSON object; `ValueError` if it does not."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes; to read over {LARGEST_JSON:,}, raise LARGEST_JSON {_WHERE}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: it is damaged, or something else")
    return content


def walk(value: Any) -> Iterator[tuple[str, str, Any]]:
    """Everything within a value of JSON, however deep: its place, such as `a.b[2]`, its key and what it is."""
    waiting = [("", "", value)]
    while waiting:
        place, key, found = waiting.pop()
        if place:
            yield place, key, found
        parts: list[tuple[str, str, Any]] = []
        if isinstance(found, dict):
            parts = [(f"{place}.{name}" if place else str(name), str(name), part) for name, part in found.items()]
        elif isinstance(found, (list, tuple)):
            parts = [(f"{place}[{index}]", key, part) for index, part in enumerate(found)]
        waiting += reversed(parts)


def parse_yaml(text: str, where: str | Path) -> Any:
    """A YAML value of plain lists, tables and scalars.

    Raises:
        ValueError: it is no YAML, has a tag of another language's objects, or more values than a person writes. The
            message begins with `where` and quotes no value.
    """
    check_yaml(text, where)
    try:
        twice = _key_that_comes_twice(yaml.compose(text, yaml.SafeLoader))
        if twice is not None:
            raise ValueError(f"{where} has the key {twice!a} twice, and readers differ in which one they take")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{where} is not YAML that can be read{yaml_fault(error)}") from None
    except ValueError as error:  # a key that comes twice, a date or a number that is none
        told = str(error) if str(where) in str(error) else f"{where} is not YAML that can be read ({error})"
        raise ValueError(told) from None


def _key_that_comes_twice(node: yaml.Node | None) -> str | None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        return twice if twice is not None else _first(_key_that_comes_twice(part) for _, part in node.value)
    return _first(map(_key_that_comes_twice, node.value)) if isinstance(node, yaml.SequenceNode) else None


def _first(found: Iterable[str | None]) -> str | None:
    return next((key for key in found if key is not None), None)


def check_yaml(text: str, where: str | Path) -> None:
    """`ValueError` if YAML is too large, be it when every alias is written out."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"{where} has {len(text):,} characters: to read over {LARGEST_YAML:,}, raise LARGEST_YAML")
    if "&" not in text:  # without an anchor there are no more values than characters
        return
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        size = 0 if root is None else _written_out(root, {})
    except RecursionError:  # an alias within what it names, too
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not YAML that can be read{yaml_fault(error)}") from None
    if size > MOST_YAML_VALUES:
        raise ValueError(f"{where} has {size:,} values when its aliases are written out: write fewer")


def _written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node has, those of an alias counted each time that it stands there."""
    if id(node) not in sizes:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(node)]


def yaml_fault(error: Exception) -> str:
    """Where and what is wrong with YAML, without the text around it, which may be anything."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = "" if mark is None else f", line {mark.line + 1}"
    return f"{line}: {problem or type(error).__name__}"

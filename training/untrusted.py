# SPDX-License-Identifier: Apache-2.0
"""Reading of files that others wrote, within bounds: JSON, YAML and gzip. A fault is a `ValueError` with its file.

A file of a few kilobytes can ask for any amount of memory: it unpacks to gigabytes, nests a hundred thousand lists, or
repeats an alias of an alias. The bounds below limit the memory that these functions take.
"""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml


MEBIBYTE = 2**20
# A compressed file may unpack to at most so many times its size. Text shrinks to a third or a tenth of its size, a
# decompression bomb to a thousandth.
MOST_TIMES = 100
# A file may always unpack to this size: a small file that repeats itself is no bomb.
ALWAYS_UNPACKED = 64 * MEBIBYTE
# In bytes; a tokenizer is a JSON file too.
LARGEST_JSON, LARGEST_YAML = 256 * MEBIBYTE, MEBIBYTE
# A value counts each time that an alias repeats it.
MOST_YAML_VALUES = 20_000
# For messages: where the bounds are.
_WHERE = "in training/untrusted.py"


def refuse_bomb(path: str | Path, packed: int, unpacked: int) -> None:
    """Raise `ValueError` if a file unpacks to so much that it must be made to fill memory or disk.

    Args:
        path: of the file, for the message.
        packed: bytes of the file that were read.
        unpacked: bytes that they unpack to.
    """
    if unpacked > max(ALWAYS_UNPACKED, MOST_TIMES * packed):
        raise ValueError(
            f"{path}: {packed:,} bytes unpack to {unpacked:,} and more, over {MOST_TIMES} times as much: if you "
            f"trust the file, unpack it yourself, or raise MOST_TIMES {_WHERE}"
        )


class _Unpacked(io.RawIOBase):
    """The unpacked content of a gzip file; reading raises `ValueError` once it is too long."""

    def __init__(self, path: str | Path):
        self._path, self._packed = path, open(path, "rb")
        self._file = gzip.GzipFile(fileobj=self._packed, mode="rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        refuse_bomb(self._path, self._packed.tell(), self._file.tell())
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
    """Open a gzip file to read its unpacked content; reading raises `ValueError` once the file proves to be a bomb."""
    return io.BufferedReader(_Unpacked(path), MEBIBYTE)


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """Return the value of a JSON text; `ValueError`, which begins with `where`, if it cannot be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply to be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise ValueError(f"{where}: cannot be read as JSON ({str(error).partition(';')[0]})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return the content of a file that holds a JSON object; `ValueError` if it does not."""
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
    """Yield place (such as `a.b[2]`), key and value of everything within a JSON value, at any depth."""
    # A list in place of recursion: deep nesting must not end in a `RecursionError`.
    waiting = [("", "", value)]
    while waiting:
        place, key, current = waiting.pop()
        if place:
            yield place, key, current
        parts: list[tuple[str, str, Any]] = []
        if isinstance(current, dict):
            parts = [(f"{place}.{name}" if place else str(name), str(name), part) for name, part in current.items()]
        elif isinstance(current, (list, tuple)):
            parts = [(f"{place}[{index}]", key, part) for index, part in enumerate(current)]
        waiting += reversed(parts)


def _first_key(keys: Iterable[str | None]) -> str | None:
    return next((key for key in keys if key is not None), None)


def _repeated_key(node: yaml.Node | None) -> str | None:
    """Return the first key that a table has twice, at any depth; None if there is none."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        return repeated if repeated is not None else _first_key(_repeated_key(part) for _, part in node.value)
    return _first_key(map(_repeated_key, node.value)) if isinstance(node, yaml.SequenceNode) else None


def _num_values(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many values a node has, with those of an alias counted each time that it occurs.

    Args:
        node: of the composed YAML.
        sizes: numbers of values by the `id` of nodes that were counted before; a new one is added.
    """
    if id(node) not in sizes:
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        sizes[id(node)] = 1 + sum(_num_values(part, sizes) for part in parts)
    return sizes[id(node)]


def yaml_fault(error: Exception) -> str:
    """Return line and fault of a YAML error, without the text around it, which may hold a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = "" if mark is None else f", line {mark.line + 1}"
    return f"{line}: {problem or type(error).__name__}"


def check_yaml(text: str, where: str | Path) -> None:
    """Raise `ValueError` if a YAML text is too large, as it stands or with every alias written out."""
    if len(text) > LARGEST_YAML:
        raise ValueError(f"{where} has {len(text):,} characters: to read over {LARGEST_YAML:,}, raise LARGEST_YAML")
    if "&" not in text:  # without an anchor there are no more values than characters
        return
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        size = 0 if root is None else _num_values(root, {})
    except RecursionError:  # or an alias stands within the value that it names
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where} is not YAML that can be read{yaml_fault(error)}") from None
    if size > MOST_YAML_VALUES:
        raise ValueError(f"{where} has {size:,} values when its aliases are written out: write fewer")


def parse_yaml(text: str, where: str | Path) -> Any:
    """Return the value of a YAML text of plain lists, tables and scalars.

    Args:
        text: of the file.
        where: names the file, for the message.

    Raises:
        ValueError: the text is no YAML, has a tag that builds an object, a repeated key, or more values than a person
            writes. The message begins with `where` and quotes no value.
    """
    check_yaml(text, where)
    try:
        repeated = _repeated_key(yaml.compose(text, yaml.SafeLoader))
        if repeated is not None:
            raise ValueError(f"{where} has the key {repeated!a} twice, and readers differ in which one they take")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"{where} is not YAML that can be read{yaml_fault(error)}") from None
    except ValueError as error:  # a repeated key, or an impossible date or number
        message = str(error) if str(where) in str(error) else f"{where} is not YAML that can be read ({error})"
        raise ValueError(message) from None

# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, and checksums by which later starts notice a change: after a kill, on a full disk, on a bad one.

A file or folder is written under another name on the same file system, forced to the disk and renamed to its place:
a reader sees all of it or nothing. A checksum shows whether the content has changed. A folder has a list,
`checksums.json`, of the sha256 of each of its files and of the list itself; the list of a finished run names what
others read of it. A text that stands alone is sealed: its last line states the sha256 of the lines before.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock


CHECKSUMS = "checksums.json"
STAGED_PREFIX = ".incomplete-"
REPLACED_PREFIX = ".replaced-"
_CHUNK = 2**20

logger = logging.getLogger(__name__)


# Atomic writes


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Give a path to write to; the file appears as `final` when the block ends well, and not at all when it fails."""
    staged = final.with_name(STAGED_PREFIX + final.name)
    try:
        yield staged
        _force_to_disk(staged)
        staged.replace(final)
        # A new name is on the disk only when its folder is.
        _force_to_disk(final.parent)
    except BaseException:
        # An interrupt from the keyboard must leave nothing half written either.
        staged.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """Return a value as the JSON text that `write_json` writes."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def as_read(value: Any) -> Any:
    """Return a value as a reader of its JSON gets it: names are strings, and tuples are lists."""
    return json.loads(json_text(value))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json_text(value))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that this clone has written; `ValueError` if it is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def move_into_place(staged: Path, final: Path) -> None:
    """Force a finished folder to the disk and rename it to `final`, replacing what was there."""
    for path in (*staged.rglob("*"), staged):
        _force_to_disk(path)
    # A folder cannot be renamed onto another that holds files, so the earlier one steps aside for a moment.
    replaced = final.with_name(REPLACED_PREFIX + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staged.rename(final)
    _force_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `final` when the block ends well, and vanishes when it fails."""
    staged = final.with_name(STAGED_PREFIX + final.name)
    # A process that was killed may have left it.
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        move_into_place(staged, final)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left half written in a folder."""
    for path in folder.glob(".*"):
        if path.name.startswith((STAGED_PREFIX, REPLACED_PREFIX)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `broken-NAME`, in place of an earlier one; returns the new path."""
    aside = path.with_name(f"broken-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    return path.replace(aside)


# Checksums


def checksum(path: Path) -> str:
    """Return the sha256 of a file's content, which is read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights in a model's folder."""
    return {path.name: checksum(path) for path in sorted(folder.glob("*.safetensors"))}


def checksum_of_text(text: str) -> str:
    """Return the sha256 of a text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sealed(text: str) -> str:
    """Return a text of whole lines with its sha256 as one more line."""
    return f"{text}{json.dumps({'sha256': checksum_of_text(text)})}\n"


def read_sealed(path: Path) -> str | None:
    """Return the text of a sealed file; None if it is not there or not what was written."""
    try:
        # `read_text` would turn all ends of lines into one kind, and change the checksum.
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    # All lines but the last, whose own end is at -1.
    body = text[: text.rfind("\n", 0, -1) + 1]
    return body if sealed(body) == text else None


def checksums_of(folder: Path, parts: Iterable[str] | None = None) -> dict[str, str]:
    """Return the sha256 of a folder's files by their paths within it.

    Args:
        folder: the folder; a list of checksums in it is left out.
        parts: files, and folders with all their files, that count; by default everything does.
    """
    roots = [folder] if parts is None else [folder / part for part in parts]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    names = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    return {name: checksum(names[name]) for name in sorted(names) if name != CHECKSUMS}


def checksums_text(sums: dict[str, str]) -> str:
    """Return the content of a list: the checksums by file name, and that of the list itself."""
    # Not `json_text`: lists that lie in old folders have to stay as they are, byte for byte.
    return json.dumps({"files": sums, "sha256": checksum_of_text(json.dumps(sums, sort_keys=True))}, indent=1) + "\n"


def write_checksums(folder: Path) -> None:
    """Write the list of a folder that is about to be moved to its place."""
    (folder / CHECKSUMS).write_text(checksums_text(checksums_of(folder)), encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the sha256 by file name that a folder's list states.

    Raises:
        ValueError: there is no list, or it is not what was written; the message begins with its name.
    """
    try:
        content = read_json(folder / CHECKSUMS)
    except FileNotFoundError:
        raise ValueError(f"{CHECKSUMS} is missing") from None
    except (OSError, ValueError):
        raise ValueError(f"{CHECKSUMS} is unreadable") from None
    sums = content.get("files") if isinstance(content, dict) else None
    if not isinstance(sums, dict) or not sums:
        raise ValueError(f"{CHECKSUMS} lists nothing")
    if content.get("sha256") != checksum_of_text(json.dumps(sums, sort_keys=True)):
        raise ValueError(f"{CHECKSUMS} has changed since it was written")
    return sums


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}/")


def faults(folder: Path, part: str | None = None, unlisted: bool = True) -> list[str]:
    """Return what is wrong with a folder's files by its list, in words; empty if all are as they were written.

    Args:
        folder: the folder, with a list in it.
        part: a file or folder in it, which alone is checked; by default all is.
        unlisted: whether a file that is not in the list is a fault.
    """
    try:
        sums = read_checksums(folder)
    except ValueError as error:
        return [str(error)]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {CHECKSUMS}
    if part is not None:
        sums = {name: digest for name, digest in sums.items() if _is_within(name, part)}
        present = {name for name in present if _is_within(name, part)}
        if not sums:
            return [f"{CHECKSUMS} does not list {part}"]
    missing = [f"{name} is missing" for name in sorted(sums.keys() - present)]
    extra = [f"{CHECKSUMS} does not list {name}" for name in sorted(present - sums.keys()) if unlisted]
    changed = [name for name in sorted(present & sums.keys()) if checksum(folder / name) != sums[name]]
    return missing + extra + [f"{name} has changed since it was written" for name in changed]


def _may_list(folder: Path, part: str) -> bool:
    try:
        return any(name.startswith(f"{part}/") for name in read_checksums(folder))
    except ValueError:
        return True  # a damaged list may have listed it, and `faults` then reports the list


def refuse_damage(folder: Path) -> None:
    """Raise `ValueError` if a model's folder is not what was written, by a list in it or beside it.

    A folder that is in no list, such as one that was copied elsewhere, stands for itself.
    """
    parent, name = folder.resolve().parent, folder.resolve().name
    if (folder / CHECKSUMS).is_file():
        damage = faults(folder)
    elif (parent / CHECKSUMS).is_file():
        damage = faults(parent, name) if _may_list(parent, name) else []
    else:
        return
    if damage:
        raise ValueError(
            f"{folder} is damaged ({'; '.join(damage)}): restore it, or have it made again: without its result.json a "
            "run writes it again from its last checkpoint, and with --restart all is done again. (If you changed it "
            "yourself, copy the folder out of the run: a copy stands for itself.)"
        )


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder, unless an earlier call has made it.

    One process makes it, others wait. A folder that is damaged by its checksums is made again, with a warning. The
    lock lies beside the folder, where it is made, so that it is one lock under every name of the place.

    Args:
        folder: the folder, which appears whole or not at all.
        make: fills the empty folder that it is given, always with the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        damage = faults(folder) if folder.is_dir() else []
        if damage:
            logger.warning("%s is damaged (%s): it is removed and made again", folder, ", ".join(damage))
            shutil.rmtree(folder)
        if not folder.is_dir():
            with staged_folder(folder) as staged:
                make(staged)
                write_checksums(staged)

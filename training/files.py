# SPDX-License-Identifier: Apache-2.0
"""Checksums of content: a later start believes only what an earlier one wrote, to the last bit.

A folder that is written whole has a list in it, `checksums.json`: the sha256 of each of its files, and of the list
itself. The folder of a finished run has such a list of what others read of it. A text that stands alone is sealed: its
last line states the sha256 of the lines before.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock


LIST = "checksums.json"
STAGED_PREFIX = ".incomplete-"
REPLACED_PREFIX = ".replaced-"
_CHUNK = 2**20

logger = logging.getLogger(__name__)


def checksum(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def checksum_of_text(text: str) -> str:
    """sha256 of a text's UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def list_of(sums: dict[str, str]) -> str:
    """Content of a list: the sums by file name, and that of the list."""
    return json.dumps({"files": sums, "sha256": checksum_of_text(json.dumps(sums, sort_keys=True))}, indent=1) + "\n"


def sums_of(folder: Path, parts: Iterable[str] | None = None) -> dict[str, str]:
    """sha256 of files by their paths within a folder: of all, or of those that are named or lie in a named folder."""
    roots = [folder] if parts is None else [folder / part for part in parts]
    files = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    names = {path.relative_to(folder).as_posix(): path for path in files if path.is_file()}
    return {name: checksum(names[name]) for name in sorted(names) if name != LIST}


def write_list(folder: Path) -> None:
    """Write the list of a folder that is about to be moved to its place."""
    (folder / LIST).write_text(list_of(sums_of(folder)), encoding="utf-8")


def read_list(folder: Path) -> dict[str, str]:
    """sha256 by file name.

    Raises:
        ValueError: there is no list, or it is not what was written, in words that begin with its name.
    """
    try:
        content = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{LIST} is missing") from None
    except (OSError, ValueError):
        raise ValueError(f"{LIST} is unreadable") from None
    sums = content.get("files") if isinstance(content, dict) else None
    if not isinstance(sums, dict) or not sums:
        raise ValueError(f"{LIST} lists nothing")
    if content.get("sha256") != checksum_of_text(json.dumps(sums, sort_keys=True)):
        raise ValueError(f"{LIST} has changed since it was written")
    return sums


def faults(folder: Path, part: str | None = None, unlisted: bool = True) -> list[str]:
    """What is wrong with a folder's files by its list, in words; empty if all are what was written.

    Args:
        folder: with a list.
        part: a file or folder in it, which alone is checked; by default all is.
        unlisted: whether a file that is not in the list is a fault.
    """
    try:
        sums = read_list(folder)
    except ValueError as error:
        return [str(error)]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {LIST}
    if part is not None:
        sums = {name: digest for name, digest in sums.items() if name == part or name.startswith(f"{part}/")}
        there = {name for name in there if name == part or name.startswith(f"{part}/")}
        if not sums:
            return [f"{LIST} does not list {part}"]
    found = [f"{name} is missing" for name in sorted(sums.keys() - there)]
    found += [f"{LIST} does not list {name}" for name in sorted(there - sums.keys()) if unlisted]
    changed = [name for name in sorted(there & sums.keys()) if checksum(folder / name) != sums[name]]
    return found + [f"{name} has changed since it was written" for name in changed]


def refuse_damage(folder: Path) -> None:
    """`ValueError` if a model's folder is not what was written, by a list in it or beside it.

    A folder that no list speaks of, such as one that was copied elsewhere, stands for itself.
    """
    around, name = folder.resolve().parent, folder.resolve().name
    if (folder / LIST).is_file():
        found = faults(folder)
    elif (around / LIST).is_file():
        found = faults(around, name) if _may_list(around, name) else []
    else:
        return
    if found:
        raise ValueError(
            f"{folder} is damaged ({'; '.join(found)}): restore it, or have it made again: without its result.json a "
            "run writes it again from its last checkpoint, and with --restart all is done again. (If you changed it "
            "yourself, copy the folder out of the run: a copy stands for itself.)"
        )


def _may_list(folder: Path, part: str) -> bool:
    try:
        return any(name.startswith(f"{part}/") for name in read_list(folder))
    except ValueError:
        return True


def set_aside(path: Path) -> Path:
    """Rename what is damaged to `broken-NAME`, in place of an earlier one."""
    aside = path.with_name(f"broken-{path.name}")
    if aside.is_dir():
        shutil.rmtree(aside)
    return path.replace(aside)


def sealed(text: str) -> str:
    """A text of whole lines with its sha256 as one more line."""
    return f"{text}{json.dumps({'sha256': checksum_of_text(text)})}\n"


def unsealed(path: Path) -> str | None:
    """The text of a sealed file; None if it is not there or not what was written."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    body = text[: text.rfind("\n", 0, -1) + 1]
    return body if sealed(body) == text else None


@contextlib.contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` that takes its place when the block ends well, and vanishes when it fails."""
    staged = final.with_name(STAGED_PREFIX + final.name)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        move_into_place(staged, final)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def move_into_place(staged: Path, final: Path) -> None:
    """Force a finished folder to the disk and rename it to `final`, replacing what was there."""
    for path in (*staged.rglob("*"), staged):
        _force_to_disk(path)
    replaced = final.with_name(REPLACED_PREFIX + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staged.rename(final)
    _force_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """See to it that a folder is there as `make` fills it; what an earlier call has made is used as it is.

    One process makes it, others wait. What is damaged by its checksums is made again, with a warning. The lock lies
    beside the folder, where it is made, so that it is one lock under every name of the place.

    Args:
        folder: appears whole or not at all.
        make: fills the empty folder that it is given, always with the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        found = faults(folder) if folder.is_dir() else []
        if found:
            logger.warning("%s is damaged (%s): it is removed and made again", folder, ", ".join(found))
            shutil.rmtree(folder)
        if not folder.is_dir():
            with staged_folder(folder) as staged:
                make(staged)
                write_list(staged)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Where to write a file that appears as `final` when the block ends well, and not at all when it fails."""
    staged = final.with_name(STAGED_PREFIX + final.name)
    try:
        yield staged
        _force_to_disk(staged)
        staged.replace(final)
        _force_to_disk(final.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left half written in `folder`."""
    for path in folder.glob(".*"):
        if path.name.startswith((STAGED_PREFIX, REPLACED_PREFIX)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

# SPDX-License-Identifier: Apache-2.0
"""7z archives of stories, such as the authors' BabiStories: check the volumes, unpack one split's file, once.

`7z -v` cuts an archive into files `NAME.7z.001`, `NAME.7z.002` and so on, which are its bytes and nothing else. The
unpacked file lies in the cache of `datasets`, in a folder named by the checksums of the volumes. It appears there
whole or not at all, and is found there the next time, wherever the volumes lie by then.
"""

import contextlib
import errno
import glob
import hashlib
import io
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import BinaryIO, cast

import datasets
import py7zr
from multivolumefile import MultiVolume
from py7zr import FileInfo
from py7zr.archiveinfo import SignatureHeader
from py7zr.exceptions import DecompressionBombError, PasswordRequired, UnsupportedCompressionMethodError

from training.files import CHECKSUMS, make_once
from training.untrusted import ALWAYS_UNPACKED, MOST_TIMES, refuse_bomb


# How the file of a split begins, by the names that a split may have.
MEMBERS = {"train": "train", "validation": "val", "valid": "val", "val": "val"}

_NAME = re.compile(r"(?P<archive>.+\.7z)(?:\.(?P<number>\d{3,}))?", re.IGNORECASE)
# Bytes of the header that an archive begins with. It says where the list of members begins, counted from its own end.
_HEADER_LENGTH = 32

logger = logging.getLogger(__name__)


# Files of an archive


def is_archive_name(name: str) -> bool:
    """Return whether this names an archive or one of its volumes: `.7z`, `.7z.001`, `.7z.002` and so on."""
    return _NAME.fullmatch(name) is not None


def _split_name(path: Path) -> tuple[str, str | None]:
    """Return the name of the archive, and the number of the volume as it is written; None for a whole archive."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named as an archive: name a file .7z, .7z.001")
    return match["archive"], match["number"]


def find_archives(folder: Path) -> list[Path]:
    """Return the archives of a folder, but not of its subfolders: of each, the first volume that is there."""
    first: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_archive_name(path.name) and path.is_file() and not path.name.startswith("."):
            first.setdefault(_split_name(path)[0], path)
    return list(first.values())


def _volume(path: Path, archive: str, number: int, digits: int) -> Path:
    return path.with_name(f"{archive}.{number:0{digits}d}")


def _numbered_volumes(path: Path, archive: str, digits: int) -> list[Path]:
    # All that begins with the archive's name, because the library would take it for a volume.
    siblings = sorted(path.parent.glob(f"{glob.escape(archive)}.*"))
    numbers = [file.name.removeprefix(f"{archive}.") for file in siblings]
    unnumbered = [
        file.name for file, number in zip(siblings, numbers, strict=True) if not re.fullmatch(r"\d{3,}", number)
    ]
    if unnumbered:
        raise ValueError(f"{', '.join(unnumbered)} beside {path} is no volume: move it to another folder")
    volumes: list[Path] = []
    # Ends at the first that is missing, so that a large last number costs no time.
    for number in range(1, int(numbers[-1]) + 1):
        volumes.append(_volume(path, archive, number, digits))
        if not volumes[-1].is_file():
            raise ValueError(
                f"{volumes[-1]} is missing, but {siblings[-1].name} is there: get all volumes of the archive"
            )
    if siblings != volumes:
        others = sorted({file.name for file in siblings} - {volume.name for volume in volumes})
        raise ValueError(f"volumes of two archives lie in one folder ({', '.join(others)} beside {path}): move one")
    return volumes


# Reading


def _open_volumes(volumes: list[Path]) -> BinaryIO:
    """Return the whole archive as one stream."""
    if len(volumes) == 1:
        return volumes[0].open("rb")
    first = volumes[0]
    # Escaped, as the library looks for the volumes by a pattern; buffered, as it reads only to the end of a volume
    # where more is asked for, and py7zr does not ask twice.
    volume_file = MultiVolume(first.with_name(glob.escape(first.name.rpartition(".")[0])), mode="rb")
    return cast(BinaryIO, io.BufferedReader(volume_file))


@contextlib.contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Raise the errors of the library as a `ValueError` that names the archive and the remedy."""
    try:
        yield
    except PasswordRequired as error:
        raise ValueError(f"{path} is encrypted: unpack it, and name the text files") from error
    except DecompressionBombError as error:
        raise ValueError(f"{path} unpacks to more than it says of itself: do not trust this archive") from error
    except UnsupportedCompressionMethodError as error:
        raise ValueError(
            f"{path} is packed by a method that py7zr does not know ({error}): unpack it with 7-Zip, and name the "
            "text files"
        ) from error
    except Exception as error:  # each of the many codecs has an error of its own
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # the machine's trouble, not the archive's
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: the archive is damaged ({reason}): get all its files again") from error


def _check_complete(volumes: list[Path]) -> None:
    """Raise `ValueError` if the file is no 7z archive, its header is damaged, or bytes are missing; name the volume.

    The header says how long the archive is, so that nothing has to be unpacked for it.
    """
    with _open_volumes(volumes) as stream:
        start = stream.read(_HEADER_LENGTH)
        if len(start) < _HEADER_LENGTH or not py7zr.is_7zfile(io.BytesIO(start)):
            raise ValueError(f"{volumes[0]} is no 7z archive, it begins with {start[:6]!r}: get the file again")
        stream.seek(0)
        with _explain_errors(volumes[0]):
            header = SignatureHeader.retrieve(stream)
    needed = _HEADER_LENGTH + header.nextheaderofs + header.nextheadersize
    sizes = [volume.stat().st_size for volume in volumes]
    if sum(sizes) >= needed:
        return
    lengths = f"the archive has {needed:,} bytes, of which {sum(sizes):,} are there"
    for volume, size in zip(volumes, sizes, strict=True):
        if size < max(sizes):
            raise ValueError(f"{volume} is cut off, {lengths}: get the file again")
    archive, number = _split_name(volumes[-1])
    if number is None:
        raise ValueError(f"{volumes[0]} is cut off, {lengths}: get the file again")
    following = _volume(volumes[0], archive, len(volumes) + 1, len(number))
    alone = f" (or {volumes[0].name} is cut off)" if len(volumes) == 1 else ""
    raise ValueError(f"{following} is missing{alone}, {lengths}: get all volumes of the archive")


def archive_volumes(path: Path) -> list[Path]:
    """Return all files of an archive, in order.

    Args:
        path: the `.7z` file, its first volume, or a folder that holds one archive.

    Raises:
        ValueError: a volume is missing or cut off, something else lies among them, `path` is not the first one, the
            folder holds several archives, or the file is no 7z archive.
    """
    if path.is_dir():
        archives = find_archives(path)
        if len(archives) != 1:
            names = ", ".join(archive.name for archive in archives) or "none"
            raise ValueError(f"folder {str(path)!r} has to hold one archive, but holds {names}: name the file")
        path = archives[0]
    name, number = _split_name(path)
    if number is None:
        volumes = [path]
    else:
        first = _volume(path, name, 1, len(number))
        if not first.is_file():
            raise ValueError(f"{first} is missing: put all volumes of the archive into one folder")
        if int(number) != 1:
            raise ValueError(f"{path} is not the first volume of its archive: name {first.name}")
        volumes = _numbered_volumes(path, name, len(number))
    _check_complete(volumes)
    return volumes


# Unpacking


def _find_member(members: list[FileInfo], path: Path, split: str, forms: tuple[str, ...]) -> str:
    """Return the name of the one member that holds the split."""
    names = [member.filename for member in members]
    for name in names:
        # Read as Windows does, which separates by both slashes, on every system.
        inside = PureWindowsPath(name)
        if inside.anchor or ".." in inside.parts:
            raise ValueError(f"{path}: member {name!r} would be written outside the folder: do not trust this archive")
    listed = ", ".join(map(repr, names)) or "nothing"
    if split not in MEMBERS:
        known = ", ".join(map(repr, MEMBERS))
        raise ValueError(f"{path} has no split {split!r}, but {listed}: set split to one of {known}")
    files = [member.filename for member in members if member.is_file and member.filename.lower().endswith(forms)]
    chosen = [name for name in files if Path(name).name.lower().startswith(MEMBERS[split])]
    if len(chosen) != 1:
        number = "several files" if chosen else "no file"
        raise ValueError(
            f"{path} has {number} for split {split!r} (of the forms {', '.join(forms)}, with a name that begins with "
            f"{MEMBERS[split]!r}), but {listed}: unpack it, and name the file that is meant"
        )
    return chosen[0]


def _unpack(stream: BinaryIO, path: Path, split: str, forms: tuple[str, ...], folder: Path) -> None:
    """Write the file of the split into the folder, without the folders that it is in inside the archive."""
    packed = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    with _explain_errors(path):
        archive = py7zr.SevenZipFile(stream, max_extract_size=max(ALWAYS_UNPACKED, MOST_TIMES * packed))
        members = archive.list()
    member = _find_member(members, path, split, forms)
    # The size that the archive states. The library checks while it unpacks that there is no more.
    size = sum(part.uncompressed or 0 for part in members)
    refuse_bomb(path, packed, size)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{path} unpacks to {size:,} bytes, and there is room for {free:,}", str(folder))
    logger.info("unpacking %s of %s", member, path)
    parts = folder / "parts"
    with _explain_errors(path):
        archive.extract(path=parts, targets=[member])
    file = (parts / member).rename(folder / Path(member).name)
    file.chmod(0o644)  # an archive brings permissions along, and may bring none
    for part in sorted([parts, *parts.rglob("*")], reverse=True):
        part.rmdir()


def unpack_split(volumes: list[Path], checksums: list[str], split: str, forms: tuple[str, ...]) -> Path:
    """Return the file of a split, unpacked unless it has been already; nothing else of the archive is written.

    Args:
        volumes: as of `archive_volumes`.
        checksums: sha256 of each.
        split: a key of `MEMBERS`; the file is the one member whose name begins with the value, in any folder.
        forms: how the names of files with stories end.

    Raises:
        ValueError: there is no such split or file, or there are several; the archive is damaged, encrypted or packed
            by an unknown method, or unpacks to far more than it holds; a member would be written outside the folder.
        OSError: the disk is full.
    """
    key = hashlib.sha256(" ".join([*checksums, MEMBERS.get(split, split)]).encode()).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "archives" / key[:32]

    def unpack(staged: Path) -> None:
        with _open_volumes(volumes) as stream:
            _unpack(stream, volumes[0], split, forms, staged)

    make_once(folder, unpack)
    return next(path for path in folder.iterdir() if path.name != CHECKSUMS)

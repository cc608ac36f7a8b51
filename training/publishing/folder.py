# SPDX-License-Identifier: Apache-2.0
"""A published folder: the names of its files, the type of its content, and its list of checksums."""

import os
from pathlib import Path

from modeling_memory_mosaic.files_memory_mosaic import FILE_NAME
from training.files import checksum
from training.progress import progress
from training.text.story_selection import STORIES_FILE
from training.vectors import FILE as VECTORS_FILE


CARD, RESULT, SUMS, LICENSE = "README.md", "result.json", "SHA256SUMS", "LICENSE"
# What a card shows until the commit that it pins is known.
NO_COMMIT = "0" * 40
# The Hub adds these to every new repository.
HUB_FILES = (".gitattributes",)
# The file that only a folder of this type has.
MARKERS = {
    "model": "config.json",
    "adapter": "adapter_config.json",
    "dataset": STORIES_FILE,
    "space": "app.py",
    "memory": FILE_NAME,
    "vectors": VECTORS_FILE,
}
# Git and the downloads of the Hub keep these in a folder. They are never published.
_TOOL_FOLDERS = (".git", ".cache")


def published_files(folder: Path) -> list[str]:
    """Return the sorted paths of a folder's files, relative to it and without those of git and of Hub downloads.

    Raises:
        ValueError: the folder holds a link, which could lead out of it, or an entry that is neither file nor folder.
    """
    names: list[str] = []
    for place, subfolders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        subfolders[:] = [name for name in subfolders if (inside / name).as_posix() not in _TOOL_FOLDERS]
        for name in (*subfolders, *files):
            path = Path(place) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is a link or no file: a published folder has none, so remove it")
        names += [(inside / name).as_posix() for name in files]
    return sorted(names)


def folder_type(folder: Path) -> str:
    """Return the name in `MARKERS` of what a folder is; `ValueError` unless it is exactly one of these."""
    types = [name for name, marker in MARKERS.items() if (folder / marker).is_file()]
    if len(types) != 1:
        held = " and ".join(MARKERS[name] for name in types) or "none of " + ", ".join(MARKERS.values())
        raise ValueError(
            f"{folder} is not a published model, adapter, data set, Space, memory or set of vectors: it holds {held}"
        )
    return types[0]


def model_folder(folder: Path) -> Path:
    """Return where the model lies: in a Space it is a subfolder."""
    return folder / "model" if folder_type(folder) == "space" else folder


def summed_files(folder: Path) -> list[str]:
    """Return the files that `SHA256SUMS` lists: all but itself, the card and the files of the Hub."""
    # The card pins the commit of the other files, so it is written after them and cannot be in their list.
    return [name for name in published_files(folder) if name not in (CARD, SUMS, *HUB_FILES)]


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` in the format of the command `sha256sum`."""
    lines = [f"{checksum(folder / name)}  {name}\n" for name in progress(summed_files(folder), "checksums", "file")]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def parse_sums(text: str) -> dict[str, str]:
    """Return the sha256 by file name from a text in the format of the command `sha256sum`."""
    return {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}


def read_sums(folder: Path) -> dict[str, str]:
    """Return the sha256 by file name that a folder's `SHA256SUMS` lists; `ValueError` if it has no such file."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} has no {SUMS}: it was not published by `python -m training publish`")
    return parse_sums((folder / SUMS).read_text(encoding="utf-8"))

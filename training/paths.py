# SPDX-License-Identifier: Apache-2.0
"""Paths: where the parts of this clone lie, what a name on the command line means, and where a run may write.

A run may write nowhere that belongs to the system, to the user's settings or to the source code.
"""

import difflib
import functools
import os
import re
import tempfile
from pathlib import Path


CLONE = Path(__file__).resolve().parents[1]
CONFIGURATION = CLONE / "configuration"
RESULTS = CLONE / "training" / "results"
# Within the clone, what git keeps or an environment is made of.
_SOURCES = (
    *("benchmarks", "configuration", "hub_cards", "modeling_memory_mosaic", "serving", "tests", "training"),
    *(".ci", ".git", ".github", ".venv"),
)
_SYSTEM = (
    *(
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/lib",
        "/lib32",
        "/lib64",
        "/libx32",
        "/proc",
        "/run",
        "/sbin",
        "/sys",
        "/usr",
    ),
    *("/var/cache", "/var/lib", "/var/log", "/var/spool", "/var/www"),
    *("/Applications", "/Library", "/System", "/private/etc"),
)
_SYSTEM_OF_WINDOWS = ("SYSTEMROOT", "PROGRAMFILES", "PROGRAMDATA")  # environment variables that hold paths
# Below system folders, but made for all users to write to.
_FREE = ("/dev/shm",)


@functools.cache
def _system_folders() -> list[Path]:
    windows = [os.environ[name] for name in _SYSTEM_OF_WINDOWS if name in os.environ]
    return [Path(path).resolve() for path in (*_SYSTEM, *windows)]


def refuse_system_folder(path: str) -> None:
    """Raise `ValueError` unless a run may write into a folder of this name, which need not exist.

    Refused are the root of the file system, folders of the system and those that hold the home folder, the clone or
    the folder for temporary files; within the home folder what is hidden, as settings and keys are; and the clone's
    sources.
    """
    if not path.strip():
        raise ValueError("it is empty: give the name of a folder")
    if path.startswith("~"):
        raise ValueError(f"{path!r} begins with ~, which only a shell understands: write the path out")
    folder, home, temporary = Path(path).resolve(), Path.home().resolve(), Path(tempfile.gettempdir()).resolve()
    if folder == Path(folder.anchor) or any(folder in (place, *place.parents) for place in (home, CLONE, temporary)):
        raise ValueError(f"{path!r} is {folder}, which holds more than runs: name a new folder")
    # The order counts: a clone may lie in the folder for temporary files, where its sources stay refused.
    if any(folder.is_relative_to(CLONE / name) for name in _SOURCES):
        raise ValueError(f"{path!r} is among the sources of this clone: name another folder, such as runs/NAME")
    if folder.is_relative_to(temporary) or any(folder.is_relative_to(place) for place in _FREE):
        return
    system = [place for place in _system_folders() if place in (folder, *folder.parents)]
    if system:
        raise ValueError(f"{path!r} is in {system[0]}, which belongs to the system: name another folder")
    if folder.is_relative_to(home) and folder.relative_to(home).parts[0].startswith("."):
        raise ValueError(f"{path!r} is in a hidden folder of the home folder: name another folder")


def nearest(name: str, candidates: list[str]) -> str:
    """Return what an error adds to an unknown name: the most similar valid one, in parentheses, if there are any."""
    # Cutoff 0: the nearest name is worth showing even when it is far; sorted so that ties do not depend on hashing.
    closest = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.0)
    return f" (nearest valid name: {closest[0]!r})" if closest else ""


def configuration_file(kind: str, name: str, suffix: str) -> Path | None:
    """Return the file of a name in a folder of `configuration`, such as `recipe`; `None` if it has none."""
    folder = CONFIGURATION / kind
    path = folder / f"{name}{suffix}"
    # A name is no path, and a link could lead anywhere.
    is_name = re.fullmatch(r"\w[\w.-]*", name)
    return path if is_name and path.is_file() and path.resolve().parent == folder.resolve() else None


def nearest_file(kind: str, name: str, suffix: str) -> str:
    """Return what an error adds to the name of a file in a folder of `configuration` that there is not."""
    return nearest(name, [file.stem for file in (CONFIGURATION / kind).glob(f"*{suffix}")])


def recipe_file(name: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        name: its path, or the name of one in `configuration/recipe`, such as `demo`.

    Raises:
        ValueError: there is no such file. The nearest name is named.
    """
    path = Path(name)
    found = path if path.is_file() else configuration_file("recipe", str(path), ".yaml")
    if found is None:
        raise ValueError(
            f"there is no recipe {str(path)!r}{nearest_file('recipe', path.stem, '.yaml')}; the ready ones are in "
            "configuration/recipe"
        )
    return found

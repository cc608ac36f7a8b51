# SPDX-License-Identifier: Apache-2.0
"""Stories from their source, as a data set with one column `text`, and the provenance of that source.

A source is the embedded story writer, a local file or folder, a 7z archive, or a data set on the Hub. `load_stories`
reads any of them; unless they are streamed, stories are in the cache of `datasets` and mapped into memory from there.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow.compute
from datasets import Dataset, Features, IterableDataset, Value

from training.files import checksum
from training.text import held_out, story_files, story_writer
from training.text.archive import archive_volumes, find_archives, is_archive_name, unpack_split
from training.text.cache import cached_rows, check_unchanged, fingerprint
from training.text.held_out import read_part
from training.text.story_files import FILE_FORMS, quoted_names, read_story_files
from training.text.story_writer import WORDS_FILE, stories_identity, write_stories


EMBEDDED = "embedded"
STORY_FEATURES = Features({"text": Value("string")})

logger = logging.getLogger(__name__)


def _visible_story_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(FILE_FORMS) and file.is_file())
    # A README.md describes what else is in its folder.
    return [file for file in files if not file.name.startswith(".") and file.name.lower() != "readme.md"]


def _is_archive(path: Path) -> bool:
    if path.is_file():
        return is_archive_name(path.name)
    archives, texts = find_archives(path), _visible_story_files(path)
    if archives and texts:
        raise ValueError(
            f"folder {str(path)!r} holds an archive ({archives[0].name}) and files of stories ({texts[0].name}): name "
            "the one that is meant"
        )
    return bool(archives)


def source_type(source: str) -> Literal["embedded", "files", "archive", "hub"]:
    """Return what a source is, by its name and by what lies at this path.

    Raises:
        ValueError: it is a path at which there is nothing, or a folder that holds both an archive and stories.
    """
    if source == EMBEDDED:
        return "embedded"
    path = Path(source).expanduser()
    if source and path.exists():
        return "archive" if _is_archive(path) else "files"
    is_path = path.is_absolute() or source.startswith(".") or source.lower().endswith(FILE_FORMS)
    if not source or is_path or is_archive_name(path.name):
        raise ValueError(
            f"source {source!r} does not exist: name a file or folder, {EMBEDDED!r}, or a data set on the Hub"
        )
    return "hub"


# Embedded stories


def _generate_embedded(num_stories: int, seed: int) -> Iterator[dict[str, str]]:
    for text in write_stories(num_stories, seed):
        yield {"text": text}


def _load_embedded(split: str, num_stories: int | None, seed: int, streaming: bool) -> Dataset | IterableDataset:
    if num_stories is None:
        raise ValueError(f"source {EMBEDDED!r} never ends: set num_stories, such as 20000")
    # Without this, the validation stories would be the first of the training stories.
    if split != "train":
        seed = int.from_bytes(hashlib.sha256(f"{split} {seed}".encode()).digest()[:8], "big")
    arguments = {"num_stories": num_stories, "seed": seed}
    if streaming:
        return IterableDataset.from_generator(_generate_embedded, features=STORY_FEATURES, gen_kwargs=arguments)
    name = fingerprint(story_writer.__file__, checksum(WORDS_FILE), arguments)
    return cached_rows(_generate_embedded, arguments, STORY_FEATURES, name, total=num_stories)


# Stories in local files


def local_files(source: str, split: str, is_parted: bool = False) -> list[Path]:
    """Return the files that hold the stories of a local source; an archive is unpacked for it, once.

    Args:
        source: a file or folder.
        split: which file of an archive.
        is_parted: whether both splits are parts of all files.

    Raises:
        ValueError: the file is of no known form, the folder has no split or no file with stories, or the archive is
            not in order.
    """
    path = Path(source).expanduser()
    if _is_archive(path):
        volumes = archive_volumes(path)
        return [unpack_split(volumes, [checksum(volume) for volume in volumes], split, FILE_FORMS)]
    if path.is_file():
        if not path.name.lower().endswith(FILE_FORMS):
            raise ValueError(
                f"{source}: not one of the known forms {', '.join(FILE_FORMS)}, .7z, .7z.001; if it is plain text, "
                "name it .txt"
            )
        return [path]
    if split != "train" and not is_parted:
        raise ValueError(
            f"folder {source!r} has no split {split!r}, it is always read whole: name the file that holds that split, "
            "leave out the split (give 'train') to read all files, or hold a part out (`validation_fraction`)"
        )
    files = _visible_story_files(path)
    if not files:
        raise ValueError(f"empty corpus: folder {source!r} has no file of the forms {', '.join(FILE_FORMS)}")
    return files


def _load_local(
    source: str, split: str, text_field: str, separator: str, fraction: float | None, streaming: bool
) -> Dataset | IterableDataset:
    if not separator:
        raise ValueError("separator is empty: give what stands between the stories of a .txt file")
    files = local_files(source, split, fraction is not None)
    arguments: dict[str, Any] = {"paths": [str(file) for file in files], "text_field": text_field}
    arguments |= {"separator": separator}
    read: Callable[..., Iterator[dict[str, str]]] = read_story_files
    part: tuple[Any, ...] = ()
    if fraction is not None:
        read, part = read_part, (checksum(Path(held_out.__file__)), split, fraction)
        # Not as a list, of which a stream would give each file to a reader of its own, with a part of its own.
        arguments |= {"paths": tuple(arguments["paths"]), "split": split, "fraction": fraction}
    if next(read(**arguments), None) is None:
        raise ValueError(f"empty corpus: there is no story in {source!r}{' for ' + split if part else ''}")
    if streaming:
        return IterableDataset.from_generator(read, features=STORY_FEATURES, gen_kwargs=arguments)
    # Content and name (whose ending gives the form), not place and time: a copy is known, and an edited file is new.
    contents = [(file.name, checksum(file)) for file in files]
    name = fingerprint(story_files.__file__, contents, text_field, separator, *part)
    return cached_rows(read, arguments, STORY_FEATURES, name)


# Stories on the Hub


def _parse_hub_name(name: str) -> dict[str, str | None]:
    """Return the arguments of `datasets.load_dataset` for `NAME:CONFIGURATION@REVISION`, the last two optional."""
    path, _, revision = name.partition("@")
    path, _, configuration = path.partition(":")
    return {"path": path, "name": configuration or None, "revision": revision or None}


def _check_all_texts(stories: Dataset | IterableDataset, where: str, text_field: str) -> Dataset | IterableDataset:
    """Return the stories; raise if one of them is not a text (for a stream: while it is read)."""

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        if not isinstance(row["text"], str):
            raise ValueError(
                f"{where}, row {index}: field {text_field!r} is {type(row['text']).__name__}, not a text: leave such "
                "rows out of the data set, or name another field as text_field"
            )
        return row

    if isinstance(stories, IterableDataset):
        return stories.map(check, with_indices=True, features=stories.features)
    column = stories.data.column("text")
    if column.null_count:
        check({"text": None}, pyarrow.compute.index(column.is_null(), True).as_py())
    return stories


def _load_from_hub(name: str, split: str, text_field: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        stories = datasets.load_dataset(**_parse_hub_name(name), split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"{name!r} is neither {EMBEDDED!r} nor an existing file or folder, and as a data set on the Hub it cannot "
            f"be loaded ({error}): correct the path or name, or see to the connection"
        ) from error
    first = next(iter(stories), None)
    if first is None:
        raise ValueError(f"empty corpus: there is no story in {name!r}, split {split!r}")
    fields = stories.column_names or list(first)
    if text_field not in fields:
        raise ValueError(
            f"{name!r} has no field {text_field!r}, but {quoted_names(fields)}: set text_field to one of them"
        )
    if stories.features and getattr(stories.features[text_field], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"field {text_field!r} of {name!r} is no text, but {stories.features[text_field]}")
    stories = stories.select_columns([text_field])
    stories = stories if text_field == "text" else stories.rename_column(text_field, "text")
    stories = _check_all_texts(stories, f"{name!r}, split {split!r}", text_field)
    if not streaming:
        check_unchanged(stories)
    return stories


# Any source


def _source_type(source: str, split: str, fraction: float | None) -> str:
    """Return what a source is; `ValueError` for a part of one that has splits, and for a part that there is not."""
    kind = source_type(source)
    if fraction is None:
        return kind
    if kind != "files":
        remedy = {"hub": "name a part of it as datasets does, such as split='train[:5%]'"}.get(kind, "name the split")
        raise ValueError(f"validation_fraction is {fraction}, but {source!r} has splits: leave it out, and {remedy}")
    if split not in ("train", "validation"):
        raise ValueError(f"split is {split!r}: of a text with a validation_fraction give 'train' or 'validation'")
    return kind


def load_stories(
    source: str,
    *,
    split: str = "train",
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    num_stories: int | None = None,
    seed: int = 0,
    validation_fraction: float | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load stories from the embedded writer, from local files or from the Hub, as a data set with one column `text`.

    The forms of a local file are those of `story_files.py`. An archive is a `.7z` file, whole or in volumes (`.7z.001`
    and so on, as BabiStories is published): the file in it whose name begins with `train` or with `val` is unpacked
    once, into the cache, and read like any other.

    Args:
        source (`str`): `"embedded"`, else a file or folder if it exists (of a folder, all files of the known forms,
            sorted by name, but not its subfolders; or the one archive in it), else a data set on the Hub: its name,
            if it has several configurations also `:CONFIGURATION`, and to pin it `@REVISION`. Of an archive in
            volumes, the first.
        split (`str`): of a data set on the Hub, or the file in an archive (`"train"` or `"validation"`). The embedded
            writer has other stories for each split. A local file is read whole whatever the split; so is a folder,
            which has no other split than `"train"`; unless there is a `validation_fraction`.
        text_field (`str`): where the story is in a `.jsonl` file or a data set on the Hub.
        separator (`str`): what stands between stories in a `.txt` file.
        num_stories (`int`, *optional*): take only the first ones; required by the embedded writer.
        seed (`int`): for the embedded writer.
        validation_fraction (`float`, *optional*): of a local file or folder, the share of its text that is the split
            `"validation"`; the rest is `"train"`, see `held_out.py`.
        streaming (`bool`): read while iterating, without a cache; mistakes in the data are then found while iterating.

    Raises:
        ValueError: the source does not exist, cannot be read as described (with file and line, or row and field), has
            a line or a story of more than `LARGEST_STORY` bytes, unpacks to a hundred times its size, or holds no
            story.
    """
    if num_stories is not None and num_stories < 1:
        raise ValueError(f"num_stories is {num_stories}: ask for at least one story, or leave it out for all")
    match _source_type(source, split, validation_fraction):
        case "embedded":
            stories = _load_embedded(split, num_stories, seed, streaming)
        case "hub":
            stories = _load_from_hub(source, split, text_field, streaming)
        case _:
            stories = _load_local(source, split, text_field, separator, validation_fraction, streaming)
    if num_stories is None:
        return stories
    if not isinstance(stories, IterableDataset) and len(stories) < num_stories:
        logger.warning("%r has only %d stories, not the %d asked for", source, len(stories), num_stories)
    return stories.take(num_stories)


def source_provenance(
    source: str,
    *,
    split: str = "train",
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    num_stories: int | None = None,
    seed: int = 0,
    validation_fraction: float | None = None,
    streaming: bool = False,
) -> dict[str, Any]:
    """Return what the stories of `load_stories` with the same arguments depend on, fit for JSON and other machines.

    Returns:
        `dict`: `kind` (as of `source_type`), `name` (never a path), `files` (sha256 by file name; of an archive, its
        volumes; of the embedded writer, the identity of its stories; none for the Hub), and the arguments,
        `text_field`, `separator` and `validation_fraction` only if they matter to this type. `streaming` never does:
        the stories are the same.
    """
    kind = _source_type(source, split, validation_fraction)
    provenance: dict[str, Any] = {"kind": kind, "name": source, "files": {}}
    provenance |= {"split": split, "num_stories": num_stories, "seed": seed}
    if kind == "embedded":
        # Not a checksum of the code: a run that was started before the code was put in other words must still resume.
        return provenance | {"files": {"story_writer.py": stories_identity()}}
    if kind == "hub":
        return provenance | {"text_field": text_field}
    path = Path(source).expanduser()
    files = archive_volumes(path) if kind == "archive" else local_files(source, split, validation_fraction is not None)
    provenance |= {"name": path.resolve().name, "files": {file.name: checksum(file) for file in files}}
    provenance |= {"text_field": text_field, "separator": separator}
    return provenance if validation_fraction is None else provenance | {"validation_fraction": validation_fraction}


def _shares_text(train: dict[str, Any], validation: dict[str, Any]) -> bool:
    """Return whether two sources have text in common, by their provenance."""
    kind = train["kind"]
    if kind == "files":  # whatever the files are called, and whatever is taken of them
        parts = ("validation_fraction", "text_field", "separator", "files")
        is_parted = all(train.get(name) == validation.get(name) for name in parts) and "validation_fraction" in train
        shared = {*train["files"].values()} & {*validation["files"].values()}
        return bool(shared) and not (is_parted and train["split"] != validation["split"])
    names = ("kind", "files", "split", "seed")
    named = [source["name"].partition("@")[0] for source in (train, validation)]
    return named[0] == named[1] and all(train[name] == validation[name] for name in names)


def split_provenance(train: dict[str, Any], validation: dict[str, Any], streaming: bool = False) -> dict[str, Any]:
    """Return the `source_provenance` of both sources of a training, `train` and `validation`.

    Args:
        train: arguments of `load_stories`.
        validation: likewise.
        streaming: whether the training stories are streamed.

    Raises:
        ValueError: what is validated on is trained on.
    """
    found = {
        "train": source_provenance(**train, streaming=streaming),
        "validation": source_provenance(**validation),
    }
    if _shares_text(found["train"], found["validation"]):
        remedy = "another split of it"
        if found["train"]["kind"] == "files":
            remedy = (
                "hold a part out, as the recipe my_text does: with the same validation_fraction for both sources, "
            )
            remedy += "such as 0.05, and split=validation for the second"
        raise ValueError(
            f"the validation text {validation['source']!r} is among the training text, so that its loss would show "
            f"what was learnt by heart: name a text that is not trained on, or {remedy}"
        )
    return found

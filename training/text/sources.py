# SPDX-License-Identifier: Apache-2.0
"""From a source of stories to windows of tokens: read, tokenize, join by end-of-text, cut, collate.

`load_stories` gives a data set with one column `text`, `pack_windows` one with the column `input_ids`. Both are
written to the cache of `datasets` and memory-mapped from there, so a corpus may be larger than the memory. The names
in that cache are made of the contents (of files, tokenizer and this code), so what has changed is computed again; so
is what has changed in the cache itself, by its checksums.
"""

import codecs
import functools
import gzip
import hashlib
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from training.bounded import open_packed, parse_json
from training.files import checksum, checksum_of_text, make_once, read_sealed, sealed, write_text
from training.text import story_writer
from training.text.archive import archive_volumes, archives_in, names_archive, unpacked_file


EMBEDDED = "embedded"
FILE_FORMS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
STORY_FEATURES = Features({"text": Value("string")})
# In bytes, of a line of JSON and of a story between separators: what is longer is no story. The separator is wrong, or
# the file is made to fill the memory.
LARGEST_STORY = 16 * 2**20
_CHUNK = 2**20
_TO_RAISE = "cut it into stories, or raise LARGEST_STORY in training/text/sources.py"

logger = logging.getLogger(__name__)


def load_stories(
    source: str,
    *,
    split: str = "train",
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    num_stories: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Stories from the embedded writer, from local files or from the Hub, as a data set with one column `text`.

    The forms of a local file: `.jsonl` has one object a line. `.txt` has either one JSON string a line (as BabiStories
    does; the first line that is not empty decides) or stories as they are with `separator` between them, on a line of
    its own or not (as TinyStories does); there, space around a story is dropped and line ends become `\\n`. Either may
    be compressed (`.gz`). Empty lines and empty stories are passed over.

    An archive is a `.7z` file, whole or in volumes (`.7z.001` and so on, as BabiStories is published): the file in it
    whose name begins with `train` or with `val` is unpacked once, into the cache, and read like any other.

    Args:
        source (`str`): `"embedded"`, else a file or folder if it exists (of a folder, all files of the forms above,
            sorted by name, but not its subfolders; or the one archive in it), else a data set on the Hub: its name,
            if it has several configurations also `:CONFIGURATION`, and to pin it `@REVISION`. Of an archive in
            volumes, the first.
        split (`str`): of a data set on the Hub, or the file in an archive (`"train"` or `"validation"`). The embedded
            writer tells other stories for each split. A local file is read whole whatever the split; a folder too, and
            refuses any but `"train"`.
        text_field (`str`): where the story is in a `.jsonl` file or a data set on the Hub.
        separator (`str`): what stands between stories in a `.txt` file.
        num_stories (`int`, *optional*): take only the first ones; the embedded writer has to be told.
        seed (`int`): for the embedded writer.
        streaming (`bool`): read while iterating, without a cache; mistakes in the data are then found while iterating.

    Raises:
        ValueError: the source does not exist, cannot be read as described (with file and line, or row and field), has
            a line or a story of more than `LARGEST_STORY` bytes, unpacks to a hundred times its size, or holds no
            story.
    """
    if num_stories is not None and num_stories < 1:
        raise ValueError(f"num_stories is {num_stories}: ask for at least one story, or leave it out for all")
    kind = _kind(source)
    if kind == "embedded":
        stories = _written_stories(split, num_stories, seed, streaming)
    elif kind in ("files", "archive"):
        stories = _stories_of_files(source, split, text_field, separator, streaming)
    else:
        stories = _stories_of_hub(source, split, text_field, streaming)
        if not streaming:
            _refuse_changed_files(stories)
    if num_stories is None:
        return stories
    if not streaming and len(stories) < num_stories:
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
    streaming: bool = False,
) -> dict[str, Any]:
    """What the stories of `load_stories` with the same arguments depend on, fit for JSON and for another machine.

    Returns:
        `dict`: `kind` (`"embedded"`, `"files"`, `"archive"` or `"hub"`), `name` (never a path), `files` (sha256 by
        file name; of an archive, its volumes; for the embedded writer its own code's; none for the Hub), and the
        arguments, `text_field` and `separator` only if they matter to this kind. `streaming` never does: the stories
        are the same.
    """
    kind = _kind(source)
    provenance = {"kind": kind, "name": source, "files": {}}
    provenance |= {"split": split, "num_stories": num_stories, "seed": seed}
    if kind == "embedded":
        writer = Path(story_writer.__file__)
        return provenance | {"files": {writer.name: checksum(writer)}}
    if kind == "hub":
        return provenance | {"text_field": text_field}
    path = Path(source).expanduser()
    files = archive_volumes(path) if kind == "archive" else _story_files(source, split)
    files = {file.name: checksum(file) for file in files}
    name = path.resolve().name
    return provenance | {"name": name, "files": files, "text_field": text_field, "separator": separator}


def pack_windows(
    stories: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize stories, put the end-of-text token after each, join them all and cut the stream into windows.

    A window may begin and end inside a story. Nothing is lost between windows, whatever the batches and processes
    were; only what is left at the very end, less than one window, is dropped. An empty story adds nothing, not even an
    end-of-text token. The end-of-text token written out inside a story is text like any other: it becomes several
    ordinary tokens and never a story's end.

    Tokens and windows are cached by `datasets`: a second call does no work, another `context_length` only cuts again.

    Args:
        stories: one column `text`; other columns are ignored. A streamed one is packed while iterating.
        tokenizer: a fast tokenizer with an eos.
        context_length (`int`): tokens per window.
        num_proc (`int`, *optional*): processes that tokenize; changes the speed, never the result. Not for a stream.

    Returns:
        one column `input_ids`, each of `context_length` token ids (int32).

    Raises:
        ValueError: the stories are too few for one window (for a stream: while iterating), `context_length` is not
            positive, or the tokenizer has no eos.
    """
    if context_length < 1:
        raise ValueError(f"context_length is {context_length}: a window needs at least one token")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to put between stories: load it with `load_tokenizer`")
    features = Features({"input_ids": List(Value("int32"), length=context_length)})
    backend = _clean_backend(tokenizer)
    arguments = {"stories": stories, "context_length": context_length}
    arguments |= {"backend": backend, "eos_token_id": tokenizer.eos_token_id}
    if isinstance(stories, IterableDataset):
        return IterableDataset.from_generator(_cut_windows, features=features, gen_kwargs=arguments)
    tokens = _fingerprint(stories._fingerprint, backend.to_str(), tokenizer.eos_token_id)
    arguments |= {"num_proc": num_proc, "fingerprint": tokens}
    return _cached(_cut_windows, arguments, features, _fingerprint(tokens, context_length))


def collate_windows(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack windows into a batch of `input_ids`, `attention_mask` and `labels`, each int64 of shape `(B, T)`.

    The mask is all ones, for windows have no padding. The labels equal the ids: the model itself shifts them.
    """
    input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}


def _kind(source: str) -> str:
    if source == EMBEDDED:
        return "embedded"
    path = Path(source).expanduser()
    if source and path.exists():
        return "archive" if _is_archive(path) else "files"
    is_path = path.is_absolute() or source.startswith(".") or source.lower().endswith(FILE_FORMS)
    if not source or is_path or names_archive(path.name):
        raise ValueError(
            f"source {source!r} does not exist: name a file or folder, {EMBEDDED!r}, or a data set on the Hub"
        )
    return "hub"


def _is_archive(path: Path) -> bool:
    if path.is_file():
        return names_archive(path.name)
    archives, texts = archives_in(path), _texts_in(path)
    if archives and texts:
        raise ValueError(
            f"folder {str(path)!r} holds an archive ({archives[0].name}) and files of stories ({texts[0].name}): name "
            "the one that is meant"
        )
    return bool(archives)


def _texts_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(FILE_FORMS) and file.is_file())
    return [file for file in files if not file.name.startswith(".")]


def _cached(generator: Callable, arguments: dict, features: Features, fingerprint: str) -> Dataset:
    """Write what the generator yields to the cache, unless it is there already, and map it from there."""

    def write(staged: Path) -> None:
        with ArrowWriter(path=str(staged / "rows.arrow"), features=features) as writer:
            for row in tqdm(generator(**arguments), desc="Writing to the cache", unit=" rows"):
                writer.write(row)
            writer.finalize()

    return _cached_files(write, fingerprint)


def _cached_files(write: Callable[[Path], None], fingerprint: str) -> Dataset:
    """The Arrow files that `write` makes in a folder, in order: by their checksums, as they were written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "stories_and_windows" / fingerprint
    make_once(folder, write)
    found = concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))])
    found._fingerprint = fingerprint  # else it would be made of the place and time of the files
    return found


def _refuse_changed_files(stories: Dataset) -> None:
    """`ValueError` if a file in the library's cache, of a data set on the Hub, has changed since it was first read."""
    for path in (Path(file["filename"]) for file in stories.cache_files):
        known = Path(datasets.config.HF_DATASETS_CACHE) / "checksums" / f"{checksum_of_text(str(path.resolve()))}.txt"
        now = f"{checksum(path)}  {path}\n"
        before = read_sealed(known)
        if before is None:
            known.parent.mkdir(parents=True, exist_ok=True)
            write_text(known, sealed(now))
        elif before != now:
            raise ValueError(
                f"{path} has changed since it was first read: remove its folder and {known}, and the data set is "
                "downloaded again"
            )


def _fingerprint(*parts: Any) -> str:
    # This file counts as well: what an earlier version of it has written must not be taken for its own.
    return Hasher.hash([checksum(Path(__file__)), *parts])


def _written_stories(split: str, num_stories: int | None, seed: int, streaming: bool) -> Dataset | IterableDataset:
    if num_stories is None:
        raise ValueError(f"source {EMBEDDED!r} never ends: set num_stories, such as 20000")
    # Without this, the validation stories would be the first of the training stories.
    if split != "train":
        seed = int.from_bytes(hashlib.sha256(f"{split} {seed}".encode()).digest()[:8], "big")
    arguments = {"num_stories": num_stories, "seed": seed}
    if streaming:
        return IterableDataset.from_generator(_write, features=STORY_FEATURES, gen_kwargs=arguments)
    return _cached(_write, arguments, STORY_FEATURES, _fingerprint(checksum(Path(story_writer.__file__)), arguments))


def _write(num_stories: int, seed: int) -> Iterator[dict]:
    for text in story_writer.write_stories(num_stories, seed):
        yield {"text": text}


def _stories_of_hub(name: str, split: str, text_field: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        stories = datasets.load_dataset(**_hub_name(name), split=split, streaming=streaming)
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
        raise ValueError(f"{name!r} has no field {text_field!r}, but {_listed(fields)}: set text_field to one of them")
    if stories.features and getattr(stories.features[text_field], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"field {text_field!r} of {name!r} is no text, but {stories.features[text_field]}")
    stories = stories.select_columns([text_field])
    stories = stories if text_field == "text" else stories.rename_column(text_field, "text")
    return _without_gaps(stories, f"{name!r}, split {split!r}", text_field)


def _without_gaps(stories: Dataset | IterableDataset, where: str, text_field: str) -> Dataset | IterableDataset:
    """The stories, each of which has a text; of a stream, that is found out while it is read."""

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


def _hub_name(name: str) -> dict[str, str | None]:
    path, _, revision = name.partition("@")
    path, _, configuration = path.partition(":")
    return {"path": path, "name": configuration or None, "revision": revision or None}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none at all"


def _story_files(source: str, split: str) -> list[Path]:
    path = Path(source).expanduser()
    if _is_archive(path):
        volumes = archive_volumes(path)
        return [unpacked_file(volumes, [checksum(volume) for volume in volumes], split, FILE_FORMS)]
    if path.is_file():
        if not path.name.lower().endswith(FILE_FORMS):
            raise ValueError(f"{source}: not one of the known forms {', '.join(FILE_FORMS)}, .7z, .7z.001")
        return [path]
    if split != "train":
        raise ValueError(
            f"folder {source!r} has no split {split!r}, it is always read whole: name the file that holds that split, "
            "or leave out the split (give 'train') to read all files"
        )
    files = _texts_in(path)
    if not files:
        raise ValueError(f"empty corpus: folder {source!r} has no file of the forms {', '.join(FILE_FORMS)}")
    return files


def _stories_of_files(
    source: str, split: str, text_field: str, separator: str, streaming: bool
) -> Dataset | IterableDataset:
    if not separator:
        raise ValueError("separator is empty: give what stands between the stories of a .txt file")
    files = _story_files(source, split)
    arguments = {"paths": [str(file) for file in files], "text_field": text_field, "separator": separator}
    if next(_read_files(**arguments), None) is None:
        raise ValueError(f"empty corpus: there is no story in {source!r}")
    if streaming:
        return IterableDataset.from_generator(_read_files, features=STORY_FEATURES, gen_kwargs=arguments)
    # Content and name (whose ending tells the form), not place and time: a copy is known, an edited file is read anew.
    contents = [(file.name, checksum(file)) for file in files]
    return _cached(_read_files, arguments, STORY_FEATURES, _fingerprint(contents, text_field, separator))


def _read_files(paths: list[str], text_field: str, separator: str) -> Iterator[dict]:
    for path in paths:
        for text in _read_file(path, text_field, separator):
            yield {"text": text}


def _read_file(path: str, text_field: str, separator: str) -> Iterator[str]:
    """The stories of one file, held in memory one at a time."""
    name = path.lower()
    try:
        with open_packed(path) if name.endswith(".gz") else open(path, "rb") as file:
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from _read_json_lines(file, path, text_field)
            elif _begins_with_json_string(file):
                yield from _read_json_lines(file, path, None)
            else:
                yield from _read_documents(file, path, separator)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: the compressed data are damaged or cut off ({error}): get the file again"
        ) from error


def _begins_with_json_string(file: BinaryIO) -> bool:
    lines = (
        line.removeprefix(codecs.BOM_UTF8).lstrip() for line in iter(functools.partial(file.readline, _CHUNK), b"")
    )
    first = next(filter(None, lines), b"")
    # A file that is one endless line must not be read whole only to find that out.
    if first.startswith(b'"') and not first.endswith(b"\n"):
        first += file.readline(LARGEST_STORY)
    file.seek(0)
    try:
        return first.startswith(b'"') and isinstance(json.loads(first), str)
    except (ValueError, RecursionError):
        return False


def _numbered_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, counted from 1, none of them larger than `LARGEST_STORY`."""
    for number in itertools.count(1):
        line = file.readline(LARGEST_STORY + 1)
        if not line:
            return
        if len(line) > LARGEST_STORY:
            raise ValueError(f"{path}:{number}: the line has over {LARGEST_STORY:,} bytes: {_TO_RAISE}")
        yield number, line


def _read_json_lines(file: BinaryIO, path: str, text_field: str | None) -> Iterator[str]:
    """One story a line: in the field of an object, or, without `text_field`, as a string."""
    for number, line in _numbered_lines(file, path):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        text = _text_of(_json_value(line, where), text_field, where)
        if text.strip():
            yield text


def _json_value(line: bytes, where: str) -> Any:
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


def _text_of(value: Any, text_field: str | None, where: str) -> str:
    if text_field is None:
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: {type(value).__name__}, but the first line is a JSON string, so all have to be"
            )
        text = value
    elif not isinstance(value, dict):
        raise ValueError(f"{where}: {type(value).__name__}, but a JSON object with a field {text_field!r} is needed")
    elif text_field not in value:
        raise ValueError(f"{where}: no field {text_field!r}, but {_listed(value)}: set text_field to one of them")
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


def _read_documents(file: BinaryIO, path: str, separator: str) -> Iterator[str]:
    """Stories with a separator between them, found by chunks, as a corpus may well be a single line."""
    delimiter = separator.encode("utf-8")
    buffer, searched, line, separated = bytearray(), 0, 1, False
    while chunk := file.read(_CHUNK):
        buffer += chunk
        while (end := buffer.find(delimiter, searched)) >= 0:
            if text := _decoded(bytes(buffer[:end]), path, line):
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
            raise ValueError(f"{path}:{line}: the story has over {LARGEST_STORY:,} bytes: {_TO_RAISE}")
    if text := _decoded(bytes(buffer), path, line):
        yield text


def _decoded(document: bytes, path: str, line: int) -> str:
    """The text of a story that begins on this line of the file."""
    try:
        text = document.decode("utf-8")
    except UnicodeDecodeError as error:
        line += document.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}): convert the file to UTF-8") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").strip()


def _clean_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of what makes the token ids, without the padding and truncation of the tokenizer's last call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _cut_windows(
    stories: Dataset | IterableDataset,
    context_length: int,
    backend: Tokenizer,
    eos_token_id: int,
    num_proc: int | None = None,
    fingerprint: str | None = None,
) -> Iterator[dict]:
    """Windows of the whole token stream; a generator, since it begins anew each time a stream is iterated."""
    tokenized = _tokenized(stories, backend, eos_token_id, num_proc, fingerprint).with_format("arrow")
    rest, num_tokens = np.empty(0, np.int32), 0
    # `iter`, as in a worker of a DataLoader a plain loop over a stream would take only a share of its files.
    for batch in tokenized.iter(batch_size=1000):
        tokens = pyarrow.compute.list_flatten(batch["input_ids"]).to_numpy()
        num_tokens += len(tokens)
        tokens = np.concatenate([rest, tokens])
        whole = len(tokens) - len(tokens) % context_length
        for window in tokens[:whole].reshape(-1, context_length):
            yield {"input_ids": window.tolist()}
        rest = tokens[whole:]
    if num_tokens < context_length:
        raise ValueError(
            f"the stories have {num_tokens} tokens, too few for one window of context_length {context_length}: "
            "give more stories or lower it"
        )


def _tokenized(
    stories: Dataset | IterableDataset,
    backend: Tokenizer,
    eos_token_id: int,
    num_proc: int | None,
    fingerprint: str | None,
) -> Dataset | IterableDataset:
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": ["text"],
        "features": Features({"input_ids": List(Value("int32"))}),
        "fn_kwargs": {"backend": backend, "eos_token_id": eos_token_id},
    }
    stories = stories.select_columns(["text"])
    if isinstance(stories, IterableDataset) or len(stories) == 0:  # of nothing, no file would be written
        return stories.map(_tokenize, **options)

    def write(staged: Path) -> None:
        place = {"cache_file_name": str(staged / "tokens.arrow"), "new_fingerprint": fingerprint}
        stories.map(_tokenize, **options, **place, num_proc=num_proc, desc="Tokenizing")

    return _cached_files(write, fingerprint)


def _tokenize(batch: dict[str, list[str]], backend: Tokenizer, eos_token_id: int) -> dict[str, list[list[int]]]:
    # Special tokens written out in a story are text; set here, since a copy in another process forgets it.
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"input_ids": [[*encoding.ids, eos_token_id] if len(encoding) else [] for encoding in encodings]}

# SPDX-License-Identifier: Apache-2.0
"""Data sets in the cache of `datasets`: named by what they are made of, and checked before they are used.

What has changed (a file, a tokenizer, the code that reads it) has another name, and so is computed again. What has
changed in the cache itself is found by its checksums, and is computed again too. Data sets are memory-mapped from the
cache, so that a corpus may be larger than the memory.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher
from datasets.utils import tqdm

from training.files import checksum, checksum_of_text, make_once, read_sealed, sealed, write_text


def fingerprint(code: str, *parts: Any) -> str:
    """Return the name of a data set in the cache.

    Args:
        code: path of the module that makes the data set (`__file__`). Its content counts: an earlier version of it may
            have made something else.
        parts: all that the data set depends on besides.
    """
    return Hasher.hash([checksum(Path(__file__)), checksum(Path(code)), *parts])


def cached_files(write: Callable[[Path], None], name: str) -> Dataset:
    """Return the data set of the Arrow files that `write` makes in a folder, from the cache if they are there.

    Args:
        write: fills the folder that it is given; the files are read in the order of their names.
        name: as of `fingerprint`.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "stories_and_windows" / name
    make_once(folder, write)
    dataset = concatenate_datasets([Dataset.from_file(str(path)) for path in sorted(folder.glob("*.arrow"))])
    # Set by hand, because `datasets` would make it of the place and time of the files.
    dataset._fingerprint = name
    return dataset


def cached_rows(
    generate: Callable[..., Iterator[dict[str, Any]]],
    arguments: dict[str, Any],
    features: Features,
    name: str,
    total: int | None = None,
    has_bar: bool = True,
) -> Dataset:
    """Return the data set of the rows that `generate(**arguments)` yields, from the cache if they are there.

    Args:
        generate: yields the rows.
        arguments: of `generate`.
        features: of the data set.
        name: as of `fingerprint`.
        total: how many rows are expected, for the bar; without it, the bar counts them and knows no time left.
        has_bar: whether a bar is shown; not where `generate` shows one.
    """

    def write(staged: Path) -> None:
        with ArrowWriter(path=str(staged / "rows.arrow"), features=features) as writer:
            rows, label = generate(**arguments), "Writing to the cache"
            for row in tqdm(rows, total=total, desc=label, unit=" rows", disable=not has_bar):
                writer.write(row)
            writer.finalize()

    return cached_files(write, name)


def check_unchanged(dataset: Dataset) -> None:
    """Raise if a file that `datasets` has in its cache has changed since it was first read.

    `datasets` keeps no checksums of what it has downloaded; they are kept beside its cache, one file each.

    Raises:
        ValueError: a file has changed.
    """
    for path in (Path(file["filename"]) for file in dataset.cache_files):
        record = Path(datasets.config.HF_DATASETS_CACHE) / "checksums" / f"{checksum_of_text(str(path.resolve()))}.txt"
        line = f"{checksum(path)}  {path}\n"
        recorded = read_sealed(record)
        if recorded is None:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_text(record, sealed(line))
        elif recorded != line:
            raise ValueError(
                f"{path} has changed since it was first read: remove its folder and {record}, and the data set is "
                "downloaded again"
            )

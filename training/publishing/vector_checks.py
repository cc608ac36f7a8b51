# SPDX-License-Identifier: Apache-2.0
"""Checks of a published data set of vectors, without a model: its columns, its result, and its numbers.

Every row names the encoder that wrote it and a text of the result, and nothing else. Its vectors are finite, as many
and as long as that model's.
"""

import itertools
import math
from pathlib import Path
from typing import Any, Literal

import pyarrow.lib
import pyarrow.parquet
from pydantic import Field, PositiveInt

from modeling_memory_mosaic.store_memory_model import ROW_NAMES
from training.publishing.folder import RESULT
from training.publishing.memory_checks import Base, Data, Section, Sha256, SourceName, _parsed, _Partial
from training.untrusted import read_object, refuse_bomb
from training.vectors import FILE


class Text(Section):
    """A text of a data set of vectors: its tokens, and the chunks that they fill."""

    name: SourceName
    tokens: PositiveInt
    chunks: PositiveInt


class Content(Section):
    """What a data set of vectors holds."""

    precision: Literal["float32", "int8", "fp8"]
    rows: PositiveInt
    size: list[PositiveInt] = Field(min_length=2, max_length=2)
    chunk_length: PositiveInt
    bytes: PositiveInt
    given_back: float = Field(ge=0, le=1)
    texts: list[Text]


class Architecture(_Partial):
    """Of the model whose encoder wrote the vectors."""

    model_type: Literal["memory_model"]
    chunk_length: PositiveInt
    num_memory_embeddings: PositiveInt
    memory_size: PositiveInt
    memory_quantization: Literal["int8", "fp8"] | None = None


class Result(_Partial):
    """What `result.json` of a published data set of vectors says."""

    task: Literal["encode"]
    architecture: Architecture
    base: Base
    data: Data
    vectors: Content


def read_result(folder: Path) -> Result:
    """Return what the result of a published data set of vectors says; `ValueError` if it is not what we write."""
    return _parsed(RESULT, Result.model_validate, read_object(folder / RESULT))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of vectors; `ValueError` if it has other columns, or unpacks to too much."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if tuple(file.schema_arrow.names) != ROW_NAMES:
            raise ValueError(f"{path.name} has the columns {file.schema_arrow.names}, not {list(ROW_NAMES)}")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        refuse_bomb(path, path.stat().st_size, sum(group.total_byte_size for group in groups))
        return file.read().to_pylist()
    except pyarrow.lib.ArrowException as error:
        raise ValueError(f"{path.name} is damaged ({error}): encode the texts again") from None


def _check_rows(rows: list[dict[str, Any]], result: Result) -> None:
    sizes = result.architecture
    for row in rows:
        if (row["encoder"], row["chunk_length"]) != (result.base.fingerprint, sizes.chunk_length):
            raise ValueError(f"a row of {FILE} is of another encoder than {RESULT} says: encode the texts again")
        numbers = row["vectors"]
        is_shaped = len(numbers) == sizes.num_memory_embeddings and {*map(len, numbers)} == {sizes.memory_size}
        num_scales = 0 if sizes.memory_quantization is None else sizes.num_memory_embeddings
        if not is_shaped or len(row["scales"]) != num_scales:
            raise ValueError(f"vectors of {FILE} are not {sizes.num_memory_embeddings} of {sizes.memory_size} numbers")
        if not all(map(math.isfinite, itertools.chain(row["scales"], *numbers))):
            raise ValueError(f"a row of {FILE} has numbers that are not finite: encode the texts again")


def check_statements(folder: Path) -> str:
    """Check that table and result of a data set of vectors are such as this project writes, and say the same."""
    result, rows = read_result(folder), read_table(folder / FILE)
    counts: dict[str, list[int]] = {}
    for row in rows:
        counts.setdefault(str(row["source"]), []).append(row["chunk"])
    texts, sizes = result.vectors.texts, result.architecture
    stated = {
        "texts": (
            {name: sorted(chunks) for name, chunks in counts.items()},
            {t.name: [*range(t.chunks)] for t in texts},
        ),
        "files": (sorted(counts), sorted(result.data.read.files)),
        "rows": (len(rows), result.vectors.rows),
        "bytes": ((folder / FILE).stat().st_size, result.vectors.bytes),
        "sizes": (
            [sizes.num_memory_embeddings, sizes.memory_size, sizes.chunk_length],
            [*result.vectors.size, result.vectors.chunk_length],
        ),
        "precision": (sizes.memory_quantization or "float32", result.vectors.precision),
    }
    for name, (own, other) in stated.items():
        if own != other:
            raise ValueError(f"the {name} of {FILE} differ from those that {RESULT} states: encode the texts again")
    return f"vectors of {len(counts)} texts by {result.base.repo_id} at {result.base.revision[:12]}"


def check_vectors(folder: Path) -> str:
    """Check that every vector is finite, and as long as those of the model that its result names."""
    rows = read_table(folder / FILE)
    _check_rows(rows, read_result(folder))
    return f"{len(rows):,} rows of vectors, every number finite"


__all__ = ["Result", "Sha256", "check_statements", "check_vectors", "read_result", "read_table"]

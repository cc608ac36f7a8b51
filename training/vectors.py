# SPDX-License-Identifier: Apache-2.0
"""Data sets of vectors: what the encoder of a memory model writes of files, as a table with a row for each chunk.

`memorize` of `python -m training` writes one if its model is a memory model. `datasets` loads the table, and
`MemoryModelForCausalLM.memories_from_rows` makes memories of its rows, which `generate` reads. A text's last tokens,
which fill no chunk, are in no row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from modeling_memory_mosaic import MemoryModelForCausalLM
from modeling_memory_mosaic.identity_memory_mosaic import tokenizer_fingerprint
from modeling_memory_mosaic.layout_memory_model import TextMemories, pack_text
from modeling_memory_mosaic.store_memory_model import ROW_NAMES
from training.commands.texts import new_folder, read_files
from training.evaluate import load_model
from training.files import staged_folder
from training.progress import progress
from training.result import header_of_reading, write_result


# The `task` that the result of such a data set states, as if a recipe had made it, and its file.
TASK, FILE = "encode", "memories.parquet"
# Chunks that are given back to be compared, so that it takes minutes at most.
MOST_GIVEN = 1000


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table of vectors."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def encode_text(
    model: MemoryModelForCausalLM, tokenizer: Any, name: str, text: str
) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of one text, and how many tokens it has."""
    ids = tokenizer(text, return_tensors="pt", split_special_tokens=True)["input_ids"].to(model.device)
    length = model.config.chunk_length
    if ids.shape[1] < length:
        raise ValueError(f"{name} has {ids.shape[1]} tokens, which fill no chunk of {length}: leave it out")
    memories = model.encoder(ids).memories
    chunks = [
        tokenizer.decode(chunk, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for chunk in ids[0, : memories.shape[1] * length].split(length)
    ]
    return model.memories_to_rows(memories, sources=[name], texts=[chunks]), ids.shape[1]


@torch.no_grad()
def given_back(model: MemoryModelForCausalLM, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return the ids that the decoder tells of each row, from its vectors alone."""
    single = [row | {"source": str(number), "chunk": 0} for number, row in enumerate(rows)]
    memories = model.memories_from_rows(single)["memories"]
    ids = torch.zeros(len(rows), model.config.chunk_length, dtype=torch.long, device=memories.device)
    given = []
    for part, of_ids in zip(memories.split(64), ids.split(64), strict=True):
        context = TextMemories(part, torch.ones(part.shape[:2], dtype=torch.bool, device=part.device), 0)
        logits, _, _ = model.reconstruct("autoencoding", pack_text(of_ids), context)
        given += logits.argmax(-1)[:, 0].tolist()
    return given


def measure_given_back(model: MemoryModelForCausalLM, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Return the share of tokens that the decoder tells of the first `MOST_GIVEN` rows, places compared one by one.

    A chunk whose text has other tokens by itself, because it begins or ends within a word, is left out.
    """
    right: list[float] = []
    for row, given in zip(rows[:MOST_GIVEN], given_back(model, rows[:MOST_GIVEN]), strict=True):
        ids = tokenizer(row["text"], split_special_tokens=True)["input_ids"]
        if len(ids) == len(given):
            right.append(sum(one == other for one, other in zip(ids, given, strict=True)) / len(given))
    return sum(right) / len(right) if right else 0.0


def encode_files(model_folder: Path, files: Sequence[Path], output: Path, dtype: str | None = None) -> str:
    """Let a memory model encode files, each alone, and write their vectors into a folder, with a `result.json`.

    Args:
        files: as of `commands.texts.read_files`.
        dtype: none: a memory model has its own precision.

    Returns:
        What was written, in words.

    Raises:
        ValueError: a precision is asked for, the folder is there already, or a text fills no chunk.
    """
    new_folder(output)
    texts = read_files(files)
    loaded: Any
    loaded, tokenizer = load_model(model_folder)
    model: MemoryModelForCausalLM = loaded.eval()
    if dtype is not None:
        raise ValueError(
            f"dtype is {dtype!r}, but vectors of a memory model are stored in its own precision: set "
            "`memory_quantization` in its configuration, and train with it"
        )
    rows: list[dict[str, Any]] = []
    about: list[dict[str, Any]] = []
    with torch.no_grad():
        for name, (text, _) in progress(list(texts.items()), "texts encoded", "text"):
            of_text, num_tokens = encode_text(model, tokenizer, name, text)
            rows += of_text
            about.append({"name": name, "tokens": num_tokens, "chunks": len(of_text)})
    fingerprints = {
        "fingerprint": model.encoder.fingerprint().hex(),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    digests = {name: digest for name, (_, digest) in texts.items()}
    record = header_of_reading(output.resolve().name, TASK, model_folder, model.config, fingerprints, digests)
    with staged_folder(output) as staged:
        Dataset.from_list(rows).select_columns(list(ROW_NAMES)).to_parquet(staged / FILE)
        result = record | {
            "vectors": {
                "precision": model.config.memory_quantization or "float32",
                "rows": len(rows),
                "size": [model.config.num_memory_embeddings, model.config.memory_size],
                "chunk_length": model.config.chunk_length,
                "bytes": (staged / FILE).stat().st_size,
                "given_back": measure_given_back(model, tokenizer, rows),
                "texts": about,
            },
        }
        write_result(result, staged, [FILE])
    return f"{len(rows):,} memories of {len(texts)} texts are in {output / FILE}"

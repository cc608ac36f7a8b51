# SPDX-License-Identifier: Apache-2.0
"""Memories of files: what `memorize`, `forget` and `info` of `python -m training` do.

Texts are read as by the installed command (`commands/texts.py`). Here a memory also gets a result, by which it can be
published.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open

from modeling_memory_mosaic import MosaicMemory
from modeling_memory_mosaic.files_memory_mosaic import FILE_NAME, read_settings, read_slots
from training.commands.texts import memorize_texts, new_folder, read_files
from training.evaluate import load_model
from training.files import CHECKSUMS, staged_folder
from training.progress import progress
from training.result import header_of_reading, read_result, write_result
from training.run_folder import RUN_LOCK, locked


# The `task` that a memory's result states, as if a recipe had made it.
TASK = "memorize"
# In the folder of a memory: its result, and what was staged of it.
RESULT, PUBLISHED = "result.json", "published"
# Texts, and tokens of each, on which it is measured what a memory gives back, so that it takes seconds.
MOST_RECALLED, RECALLED_LENGTH = 16, 64


def load_memory(folder: str | Sequence[str], model: Any) -> MosaicMemory:
    memory: MosaicMemory = MosaicMemory.from_pretrained(folder, model)
    return memory


def _write(
    memory: MosaicMemory, folder: Path, dtype: str | None, record: dict[str, Any], tokens: dict[str, int]
) -> None:
    """Write a memory into a folder, with a result that says what it holds.

    Args:
        dtype: of the stored pairs.
        record: what `header_of_reading` returns.
        tokens: of each text as it was read, by its name.
    """
    memory.save_pretrained(folder, dtype=dtype)
    is_pair = memory.slot_bias[0][0, 0] > -torch.inf
    pairs = [int(is_pair[memory.source_ids == index].sum()) for index in range(len(memory.sources))]
    files = record["data"]["read"]["files"]
    kept = {name: files[name] for name in memory.sources}
    content = {
        "precision": read_settings(folder / FILE_NAME)["precision"],
        "pairs": len(memory),
        "bytes": (folder / FILE_NAME).stat().st_size,
        "texts": [
            {"name": name, "tokens": tokens[name], "pairs": number}
            for name, number in zip(memory.sources, pairs, strict=True)
        ],
    }
    data = {"read": record["data"]["read"] | {"files": kept}}
    write_result(record | {"data": data, "memory": content}, folder, [FILE_NAME])


def memorize_files(model_folder: Path, files: Sequence[Path], output: Path, dtype: str | None = None) -> MosaicMemory:
    """Let a model read files, each alone, and write what it has read into a folder, with a `result.json` of it.

    Args:
        files: as of `commands.texts.read_files`.
        dtype: of the stored pairs, see `MosaicMemory.save_pretrained`.
    """
    new_folder(output)
    texts = read_files(files)
    model, tokenizer = load_model(model_folder)
    memories = memorize_texts(model, tokenizer, {name: text for name, (text, _) in texts.items()})
    memory: MosaicMemory = MosaicMemory.union(memories)
    fingerprints = {
        "fingerprint": memory.writer.fingerprint().hex(),
        "tokenizer": memory.tokenizer,
    }
    digests = {name: digest for name, (_, digest) in texts.items()}
    record = header_of_reading(output.resolve().name, TASK, model_folder, memory.config, fingerprints, digests)
    with staged_folder(output) as staged:
        _write(memory, staged, dtype, record, {part.sources[0]: len(part.input_ids) for part in memories})
    return memory


def replace_memory(folder: Path, change: Callable[[MosaicMemory], Any], model: Any) -> MosaicMemory:
    """Change the memory in a folder, as by `forget` or `consolidate`, and return it.

    Its result names the texts that it still has and no other. What was staged for publishing is removed, because it
    holds the memory of before. Other files in the folder stay.

    Args:
        folder: of the memory, which another one replaces whole.
        change: what to do with the memory, in place.
        model: that has read it.
    """
    place = folder.resolve()
    precision = read_settings(place / FILE_NAME)["precision"]  # raises before a folder is made for the lock
    made = {FILE_NAME, RESULT, CHECKSUMS, PUBLISHED, RUN_LOCK}
    # Locked before it is read: of two processes, one would bring back what the other forgets.
    with locked(place):
        memory, record = load_memory(str(place), model), read_result(place)
        change(memory)
        with staged_folder(place) as staged:
            left_out = {str(place): made}
            shutil.copytree(
                place, staged, symlinks=True, dirs_exist_ok=True, ignore=lambda at, _: left_out.get(at, ())
            )
            if record is None:  # of a version that wrote none, or by `save_pretrained`
                memory.save_pretrained(staged, dtype=precision)
            else:
                tokens = {text["name"]: text["tokens"] for text in record["memory"]["texts"]}
                _write(memory, staged, precision, record, tokens)
    return memory


def stored_texts(folder: Path, tokenizer: Any) -> dict[str, str]:
    """Return what the tokens of a stored memory say, by the names of its texts; without forgotten and merged ones."""
    settings = read_settings(folder / FILE_NAME)
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        slots = read_slots(file, settings)
    texts = {}
    for index, name in enumerate(settings["sources"]):
        ids = slots["input_ids"][(slots["source_ids"] == index) & (slots["input_ids"] >= 0)]
        # With special tokens, and spaces as they are: what stood in the file.
        texts[name] = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return texts


def forget_source(model_folder: Path, folder: Path, source: str) -> MosaicMemory:
    """Forget a text of a stored memory, in its folder, where no file names it afterwards."""
    model, _ = load_model(model_folder)
    return replace_memory(folder, lambda memory: memory.forget(source), model.eval())


@torch.no_grad()
def _losses(model: Any, ids: torch.Tensor, reading: dict[str, Any]) -> torch.Tensor:
    """Return the loss at tokens 2 to T of a text `(T,)`, as a row of T - 1 in nats."""
    logits = model(**reading).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[1:], reduction="none").cpu()


def measure_recall(memory: MosaicMemory, model: Any) -> dict[str, Any] | None:
    """Measure how well a memory gives its texts back: the loss on the beginnings of those that are whole.

    Args:
        memory: of the model.
        model: that has read it.

    Returns:
        `num_texts`; `length`, the most tokens of a text; and by the way of reading a text, `behind` the memory, behind
        the memory without that text (`forgotten`, of several texts alone) and `alone`: `loss`, the mean over tokens,
        and `by_place`, a list of means over texts. None if no text is whole.
    """
    incomplete = memory.incomplete_sources()
    names = [name for name in memory.sources if name not in incomplete][:MOST_RECALLED]
    rows: dict[str, list[torch.Tensor]] = {}
    for name in progress(names, "loss on the texts", "text"):
        ids = memory.select([name]).input_ids[:RECALLED_LENGTH]
        others = [other for other in memory.sources if other != name]
        readings: dict[str, Any] = {"behind": memory.prompt(ids[None]), "alone": {"input_ids": ids[None]}}
        if others:
            readings["forgotten"] = memory.select(others).prompt(ids[None])
        for way, reading in readings.items():
            rows.setdefault(way, []).append(_losses(model, ids, reading))
    if not rows:
        return None
    # NaN where a text has ended.
    tables = {way: torch.nn.utils.rnn.pad_sequence(of_way, True, torch.nan) for way, of_way in rows.items()}
    return {
        "num_texts": len(names),
        "length": 1 + tables["alone"].shape[1],
        "loss": {way: float(table.nanmean()) for way, table in tables.items()},
        "by_place": {way: table.nanmean(0).tolist() for way, table in tables.items()},
    }

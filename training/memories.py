# SPDX-License-Identifier: Apache-2.0
"""Memories of files: what `memorize`, `ask`, `forget` and `info` of the command line do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import set_seed

from modeling_memory_mosaic import MosaicMemory
from modeling_memory_mosaic.files_memory_mosaic import FILE_NAME, read_settings
from training.evaluate import load_model
from training.files import staged_folder


def load_memory(folder: str | Sequence[str], model: Any) -> MosaicMemory:
    memory: MosaicMemory = MosaicMemory.from_pretrained(folder, model)
    return memory


def memorize_files(model_folder: Path, files: Sequence[Path], output: Path, dtype: str | None = None) -> MosaicMemory:
    """Let a model read files, each alone, and write what it has read into a folder.

    Args:
        files: texts in UTF-8; a memory names each by its path as given.
        dtype: of the stored pairs, see `MosaicMemory.save_pretrained`.
    """
    if output.exists():
        raise ValueError(f"{output} exists already: remove it, or choose another folder")
    texts = {str(path): path.read_text(encoding="utf-8") for path in files}
    model, tokenizer = load_model(model_folder)
    model = model.eval()
    memories = []
    for name, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", split_special_tokens=True)["input_ids"]
        if ids.shape[1] < 2:
            raise ValueError(f"{name} has {ids.shape[1]} tokens: a text of fewer than two leaves no pair")
        memories.append(model.memorize(ids, source=name, tokenizer=tokenizer))
    memory = MosaicMemory.union(memories)
    with staged_folder(output) as staged:
        memory.save_pretrained(staged, dtype=dtype)
    return memory


def ask(
    model_folder: Path,
    folders: Sequence[str],
    question: str,
    seed: int = 0,
    bandwidth: float | None = None,
    **options: Any,
) -> tuple[str, list[tuple[str, float]]]:
    """Continue a question behind the memories of some folders.

    Args:
        folders: that `memorize_files` or `MosaicMemory.save_pretrained` wrote, or repositories on the Hub.
        seed: of the sampling.
        bandwidth: see `MosaicMemory.to_cache`.
        **options: arguments of `generate`.

    Returns:
        The answer, and what each text and last the question with the answer itself added to its logits, in nats.
    """
    model, tokenizer = load_model(model_folder)
    model = model.eval()
    memory = load_memory(folders, model)
    set_seed(seed)
    prompt = memory.prompt(question, tokenizer, bandwidth=bandwidth)
    length = prompt["input_ids"].shape[1]
    output = model.generate(**prompt, **options)
    answer = cast(str, tokenizer.decode(output[0, length:], skip_special_tokens=True))
    totals = memory.explain(model, output).by_source()[length - 1 :].sum(0).tolist()
    return answer, list(zip([*memory.sources, "the question and the answer"], totals, strict=True))


def forget_source(model_folder: Path, folder: Path, source: str) -> MosaicMemory:
    """Forget a text of a stored memory, in its folder."""
    model, _ = load_model(model_folder)
    precision = read_settings(folder / FILE_NAME)["precision"]
    memory = load_memory(str(folder), model.eval()).forget(source)
    memory.save_pretrained(folder, dtype=precision)
    return memory


def describe(folder: Path) -> dict[str, Any]:
    """Return what a stored memory is, without a model."""
    settings = read_settings(folder / FILE_NAME)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return {**settings, "bytes": size}

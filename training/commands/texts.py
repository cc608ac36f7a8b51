# SPDX-License-Identifier: Apache-2.0
"""What the verbs do with texts: continue them, read them into a memory, ask it, and look inside the model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import TextStreamer, pipeline, set_seed
from transformers.utils import logging

from modeling_memory_mosaic import MosaicMemory, inspect_units, summarize_units
from modeling_memory_mosaic.files_memory_mosaic import FILE_NAME, read_settings


def continue_texts(
    model: Any, tokenizer: Any, prompts: list[str], seed: int = 0, stream: bool = False, **options: Any
) -> list[str]:
    """Continue each prompt.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        prompts: non-empty texts.
        seed: of the sampling; the same seed, model and prompts give the same texts.
        stream: print each text, token by token, while it is generated, and an empty line behind it.
        **options: arguments of `generate`, such as `max_new_tokens`, `do_sample`, `temperature` and `top_p`.

    Returns:
        Prompt and continuation, for each prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one character")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    if stream:
        options["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    set_seed(seed)  # after loading, which may draw random numbers
    texts = []
    for prompt in prompts:
        texts.append(generator(prompt, **options)[0]["generated_text"])
        if stream:
            print()
    return texts


# Memories of files


def new_folder(folder: Path) -> None:
    """Raise `ValueError` if a folder that is to be written is there already."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it, or choose another folder")


def _named_files(files: Sequence[Path]) -> dict[str, Path]:
    """Return files by the names that a memory gives their texts; `ValueError` if two would have one name."""
    named: dict[str, Path] = {}
    for path in files:
        # A memory may be published: no name in it is a path of this machine.
        leads_out = path.is_absolute() or ".." in path.parts
        name = path.name if leads_out else path.as_posix()
        if name in named:
            raise ValueError(
                f"{named[name]} and {path} would both be named {name!r}: call the command in a folder that holds "
                "both, and give their paths within it"
            )
        named[name] = path
    return named


def _read_text(path: Path) -> tuple[str, str]:
    content = path.read_bytes()
    try:
        return content.decode("utf-8"), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}): convert it, or leave it out") from None


def read_files(files: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """Return the text of each file, with the ends of its lines as they are, and the sha256 of the file.

    Args:
        files: texts in UTF-8; each is named by its path as given, or by its last part if that path is absolute or
            leads up.
    """
    return {name: _read_text(path) for name, path in _named_files(files).items()}


def memorize_texts(model: Any, tokenizer: Any, texts: Mapping[str, str]) -> list[MosaicMemory]:
    """Let a Memory Mosaic read texts, each alone; return the memory of each, whose source is its name."""
    if not hasattr(model, "memorize"):
        raise ValueError(f"the model is a {model.config.model_type}: only Memory Mosaics memorize texts")
    ids_of = {}
    for name, text in logging.tqdm(texts.items(), desc="tokenizing", unit="text", delay=2, leave=False):
        ids_of[name] = tokenizer(text, return_tensors="pt", split_special_tokens=True)["input_ids"]
        if ids_of[name].shape[1] < 2:
            raise ValueError(f"{name} has {ids_of[name].shape[1]} tokens: a text of fewer than two leaves no pair")
    memories, total = [], sum(ids.shape[1] for ids in ids_of.values())
    with logging.tqdm(total=total, desc="memorizing", unit="token", delay=2, leave=False) as bar:
        # A text is read in chunks: with each, the bar moves on within the text.
        hook = model.base_model.register_forward_hook(lambda _, read, __: bar.update(read[0].shape[1]))
        try:
            for name, ids in ids_of.items():
                memories.append(model.memorize(ids.to(model.device), source=name, tokenizer=tokenizer))
        finally:
            hook.remove()
    return memories


def describe_memory(folder: Path) -> dict[str, Any]:
    """Return what a stored memory is, without a model."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {FILE_NAME}: name a folder that `memorize` has written")
    return {**read_settings(path), "bytes": path.stat().st_size}


def answer(
    model: Any,
    tokenizer: Any,
    memories: Sequence[str],
    question: str,
    seed: int = 0,
    bandwidth: float | None = None,
    **options: Any,
) -> tuple[str, list[tuple[str, float]]]:
    """Continue a question behind stored memories.

    Args:
        model: a Memory Mosaic.
        tokenizer: its tokenizer.
        memories: folders that `memorize` or `MosaicMemory.save_pretrained` wrote, or repositories on the Hub.
        question: the text to continue.
        seed: of the sampling.
        bandwidth: see `MosaicMemory.to_cache`.
        **options: arguments of `generate`.

    Returns:
        The answer, and what each text and last the question with the answer itself added to its logits, in nats.
    """
    memory = MosaicMemory.from_pretrained(memories, model)
    set_seed(seed)
    reading: Any = {"bandwidth": bandwidth}
    prompt = memory.prompt(question, tokenizer, **reading)
    length = prompt["input_ids"].shape[1]
    output = model.generate(**prompt, **options)
    text = cast(str, tokenizer.decode(output[0, length:], skip_special_tokens=True))
    totals = memory.explain(model, output, **reading).by_source()[length - 1 :].sum(0).tolist()
    return text, list(zip([*memory.sources, "the question and the answer"], totals, strict=True))


# Inside the model


def units_table(model: Any, tokenizer: Any, text: str) -> str:
    """Return means of each unit over the tokens of a text, as a table."""
    ids = tokenizer(text, return_tensors="pt", split_special_tokens=True)["input_ids"].to(model.device)
    if ids.shape[1] < 2:
        raise ValueError(f"the text has {ids.shape[1]} tokens: the first token reads nothing, give at least two")
    return str(summarize_units(inspect_units(model, ids)))

# SPDX-License-Identifier: Apache-2.0
"""Where a model is, by its name on the command line, and how the installed command loads it and keeps its memories."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def model_folder(name: str | Path) -> Path:
    """Return the folder of a model: the folder itself, an exported one or a checkpoint, or `model` in that of a run.

    Raises:
        ValueError: neither has a `config.json`.
    """
    folder = Path(name)
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            return place
    state = "has no config.json" if folder.is_dir() else "is no folder"
    raise ValueError(f"{str(folder)!r} {state}: name an exported folder, a checkpoint, or that of a finished run")


def find(name: str) -> str | Path:
    """Return the folder of a model, or `USER/NAME`, a name on the Hub.

    Raises:
        ValueError: it has no model, or its first part is a folder here: `runs/nope` is a slip, no name on the Hub.
    """
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return model_folder(name)
    user, rest = name.split("/")
    if Path(user).is_dir():
        raise ValueError(
            f"the folder {user!r} has no {rest!r}: for a model on the Hub of that name start in another folder"
        )
    return name


def load(place: str | Path) -> tuple[Any, Any]:
    """Return the model of a folder or of the Hub, on the accelerator if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import modeling_memory_mosaic  # noqa: F401  (registers the models, so that no code of the folder runs)

    disable_progress_bar()  # small models load in no time
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False).eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device), AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def memorize(place: str | Path, files: Sequence[Path], output: Path, dtype: str | None) -> Any:
    """Let a model read files, each alone, write what it has read into a folder, and return it."""
    from modeling_memory_mosaic import MosaicMemory

    from .texts import memorize_texts, new_folder, read_files

    new_folder(output)
    texts = {name: text for name, (text, _) in read_files(files).items()}
    model, tokenizer = load(place)
    memory = MosaicMemory.union(memorize_texts(model, tokenizer, texts))
    memory.save_pretrained(output, dtype=dtype)
    return memory


def forget(place: str | Path, folder: Path, source: str) -> Any:
    """Forget a text of the memory in a folder, and return the memory.

    Raises:
        ValueError: there is no such text, or a file of the clone's tools names it too.
    """
    from modeling_memory_mosaic import MosaicMemory

    from .texts import describe_memory

    if (folder / "result.json").is_file():
        raise ValueError(
            f"{folder} has a result.json, which would go on naming it: use `python -m training forget` in a clone"
        )
    precision = describe_memory(folder)["precision"]
    model, _ = load(place)
    memory = MosaicMemory.from_pretrained(folder, model)
    memory.forget(source)
    memory.save_pretrained(folder, dtype=precision)
    return memory

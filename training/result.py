# SPDX-License-Identifier: Apache-2.0
"""The record of a run, `result.json`: what stands in it, and how it is written and read.

`files.py` has the checksums that mark a record as whole, `tables.py` the tables made from records, `figures.py` the
pictures.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from training.files import (
    CHECKSUMS,
    checksum_of_text,
    checksums_of,
    checksums_text,
    faults,
    json_text,
    read_json,
    write_text,
)
from training.paths import CLONE
from training.recipe import BaseRecipe


# Their versions are recorded: a number may depend on them.
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft")
# Pictures and tables that stand beside a result and are collected with it.
SHOWN = (".png", ".md")


def header(recipe: BaseRecipe) -> dict[str, Any]:
    """What every `result.json` says of its recipe, and of when and where it was run."""
    return {
        "name": recipe.name,
        "task": recipe.task,
        "recipe": recipe.model_dump(exclude={"output_dir"}),
        "recipe_hash": recipe.hash,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, hardware and commit of this process; what cannot be known is None."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "hardware": _hardware(),
        "commit": _commit(),
    }


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }


def cpu_name() -> str | None:
    """Return the processor's name as the system gives it; None if it gives none."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = re.findall(r"^model name\s*: (.+)$", information.read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or None


def _commit() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CLONE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None  # unpacked from an archive, or nothing committed yet


def learning_curve(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Training and validation losses (nats per token) with the steps and tokens after which they were seen."""
    curve = {"training": [], "validation": []}
    for entry in log_history:
        at = {"step": entry["step"], "tokens": entry.get("num_input_tokens_seen")}
        if "loss" in entry:
            curve["training"].append(at | {"loss": entry["loss"]})
        if "eval_loss" in entry:
            curve["validation"].append(at | {"loss": entry["eval_loss"], "perplexity": entry["eval_perplexity"]})
    return curve


def tokens_per_second(log_history: list[dict[str, Any]]) -> float | None:
    """Mean speed of training, over all resumed sessions, without evaluating and saving; None if none was logged.

    A run that was killed between two checkpoints has done some steps twice: they count once, as they were last done.
    """
    tokens = seconds = before = 0
    for entry in log_history:
        if "loss" not in entry:
            continue
        if "tokens_per_second" in entry:
            done = entry["num_input_tokens_seen"] - before
            tokens, seconds = tokens + done, seconds + done / entry["tokens_per_second"]
        before = entry["num_input_tokens_seen"]
    return round(tokens / seconds, 3) if seconds else None


def write_result(result: dict[str, Any], folder: Path, kept: Sequence[str] = (), name: str = "result.json") -> None:
    """Write what marks a run as done, and before it the checksums of it and of what others read of the folder.

    Args:
        result: the content.
        folder: of the run, or of a part of it that is done by itself.
        kept: files and folders besides that later runs use, such as `model`.
        name: of the file.
    """
    text = json_text(result)
    shown = [path.name for path in folder.iterdir() if path.suffix in SHOWN]
    sums = checksums_of(folder, [*kept, *shown]) | {name: checksum_of_text(text)}
    write_text(folder / CHECKSUMS, checksums_text(sums))
    write_text(folder / name, text)


def read_result(folder: Path, name: str = "result.json") -> dict[str, Any] | None:
    """What `write_result` has written; None if it has not.

    Raises:
        ValueError: it is not what was written.
    """
    if not (folder / name).is_file():
        return None
    if found := faults(folder, name):
        raise ValueError(
            f"{folder / name} is damaged ({'; '.join(found)}): restore it, or remove it and start again, which makes "
            "it from what else is there"
        )
    return read_json(folder / name)


def refuse_change(folder: Path) -> None:
    """`ValueError` if the folder of a finished run lacks what `write_result` has listed, or has it changed."""
    if found := faults(folder, unlisted=False):
        raise ValueError(
            f"{folder} is damaged ({'; '.join(found)}): restore it, or remove its result.json and run the recipe again"
        )

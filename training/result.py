# SPDX-License-Identifier: Apache-2.0
"""The record of a run, `result.json`: what stands in it, and how it is written and read.

Three functions read records. `read_result`, below, reads one of a run's folder and compares it with its checksums, so
that a finished run is not repeated. `tables.committed_results` reads those in `training/results`, for tables.
`publishing.portable_results` reads those that are published and takes the paths of this machine out.

`files.py` has the checksums, `figures.py` the pictures.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from training.files import (
    CHECKSUMS,
    checksum_of_text,
    checksums_of,
    checksums_text,
    faults,
    json_text,
    read_json,
    weights_checksums,
    write_text,
)
from training.paths import CLONE
from training.recipe import BaseRecipe


# Their versions are recorded: a number may depend on them.
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft")
# Pictures and tables that stand beside a result and are collected with it.
SHOWN = (".png", ".md")


def cpu_name() -> str | None:
    """Return the processor's name as the system gives it; None if it gives none."""
    # First, for on Linux `platform.processor` names at most the architecture.
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = re.findall(r"^model name\s*: (.+)$", information.read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or None


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


def _commit() -> dict[str, Any] | None:
    """Return the commit of the clone and whether its files differ from it; None outside a git repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CLONE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None  # unpacked from an archive, or nothing committed yet


def environment() -> dict[str, Any]:
    """Return versions, hardware and commit of this process, None for those that cannot be known."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "hardware": _hardware(),
        "commit": _commit(),
    }


def moment() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def header(recipe: BaseRecipe) -> dict[str, Any]:
    """Return the part of `result.json` that all tasks share: the recipe, and when and where it was run."""
    return {
        "name": recipe.name,
        "task": recipe.task,
        # The folder is a path of this machine, and results are published.
        "recipe": recipe.model_dump(exclude={"output_dir"}),
        "recipe_hash": recipe.hash,
        "finished": moment(),
        **environment(),
    }


def header_of_reading(
    name: str,
    task: str,
    model_folder: Path,
    config: PreTrainedConfig,
    fingerprints: Mapping[str, str | None],
    files: dict[str, str],
) -> dict[str, Any]:
    """Return what the record of texts that a model has read begins with; `task` stands for a recipe, as there is none.

    Args:
        name: of what was written.
        task: of what was done.
        model_folder: of the model that has read them.
        config: of that model.
        fingerprints: of the model and its tokenizer, by name.
        files: sha256 of each file, by the name of its text.
    """
    architecture = config.to_dict()
    architecture.pop("_name_or_path", None)  # a path of this machine
    return {
        "name": name,
        "task": task,
        "recipe": {"name": name, "task": task, "model": str(model_folder)},
        "finished": moment(),
        **environment(),
        "architecture": architecture,
        "base": {"weights": weights_checksums(model_folder), **fingerprints},
        "data": {"read": {"kind": "local", "name": name, "files": files}},
    }


def learning_curve(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return training and validation losses with the steps and tokens after which they were logged.

    Args:
        log_history: of the trainer's state.

    Returns:
        `training` and `validation`, lists of points in the order of the log; losses are in nats per token.
    """
    curve: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
    for entry in log_history:
        place = {"step": entry["step"], "tokens": entry.get("num_input_tokens_seen")}
        if "loss" in entry:
            curve["training"].append(place | {"loss": entry["loss"]})
        if "eval_loss" in entry:
            curve["validation"].append(place | {"loss": entry["eval_loss"], "perplexity": entry["eval_perplexity"]})
    return curve


def tokens_per_second(log_history: list[dict[str, Any]]) -> float | None:
    """Return the mean speed of training over all resumed sessions, without the time of evaluating and saving.

    A run that was killed between two checkpoints has done some steps twice: they count once, as the log of the last
    session has them. None if no speed was logged.
    """
    tokens = tokens_before = 0
    seconds = 0.0
    for entry in log_history:
        if "loss" not in entry:
            continue
        if "tokens_per_second" in entry:
            new_tokens = entry["num_input_tokens_seen"] - tokens_before
            tokens += new_tokens
            # Tokens over seconds, for a mean of speeds would weigh short entries too much.
            seconds += new_tokens / entry["tokens_per_second"]
        tokens_before = entry["num_input_tokens_seen"]
    return round(tokens / seconds, 3) if seconds else None


def write_result(result: dict[str, Any], folder: Path, kept: Sequence[str] = (), name: str = "result.json") -> None:
    """Write the file that marks a run as done, and before it the checksums of the files that others read.

    Args:
        result: the content.
        folder: of the run, or of a part of it that is done by itself.
        kept: files and folders of it that later runs use, such as `model`; pictures and tables are listed anyway.
        name: of the file.
    """
    text = json_text(result)
    shown = [path.name for path in folder.iterdir() if path.suffix in SHOWN]
    sums = checksums_of(folder, [*kept, *shown]) | {name: checksum_of_text(text)}
    # The result comes last: a run that is killed before it counts as not finished.
    write_text(folder / CHECKSUMS, checksums_text(sums))
    write_text(folder / name, text)


def read_result(folder: Path, name: str = "result.json") -> dict[str, Any] | None:
    """Return the content that `write_result` wrote; None if there is no such file.

    Raises:
        ValueError: the file has changed since.
    """
    if not (folder / name).is_file():
        return None
    if damage := faults(folder, name):
        raise ValueError(
            f"{folder / name} is damaged ({'; '.join(damage)}): restore it, or remove it and start again, which makes "
            "it from what else is there"
        )
    return read_json(folder / name)


def refuse_change(folder: Path, again: str = "remove its result.json and run the recipe again") -> None:
    """Raise `ValueError` if a file that `write_result` listed in the folder is missing or changed.

    Args:
        folder: of a run.
        again: how to make it again, for the message.
    """
    # A run's folder also has files that the list leaves out, such as checkpoints.
    if damage := faults(folder, unlisted=False):
        raise ValueError(f"{folder} is damaged ({'; '.join(damage)}): restore it, or {again}")

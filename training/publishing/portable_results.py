# SPDX-License-Identifier: Apache-2.0
"""Results as they are published: without paths of this machine, and beside the results that they compare with."""

import os
from pathlib import Path
from typing import Any

from training.paths import RESULTS
from training.untrusted import read_object


# Fields of a result that may be paths on the machine of the run.
PATH_FIELDS = ("source", "output_dir", "model", "pretrained", "lists", "name")
# Settings of a recipe that change what a run displays, and no number.
DISPLAY_SETTINGS = ("disable_tqdm", "logging_steps", "report_to")


def _shorten_paths(value: Any, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _shorten_paths(part, name in PATH_FIELDS) for name, part in value.items()}
    if isinstance(value, list):
        return [_shorten_paths(part) for part in value]
    leads_out = is_path and isinstance(value, str) and (os.path.isabs(value) or value.startswith(".."))
    return os.path.basename(value.rstrip("/")) if leads_out else value


def read_portable_result(path: Path) -> dict[str, Any]:
    """Read a `result.json` and shorten every path that leads out of the clone to its last part."""
    return _shorten_paths(read_object(path))


def without_display_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a resolved recipe without the settings that change no number."""
    training = {name: value for name, value in recipe.get("training", {}).items() if name not in DISPLAY_SETTINGS}
    return recipe | {"training": training}


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    """Return what all results in one table have in common."""
    recipe = without_display_settings(result["recipe"])
    differing = ("model", "model_args", "seed")
    return {"recipe": {name: value for name, value in recipe.items() if name not in differing}, "data": result["data"]}


def comparable_results(run: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a run's result, then those of other models and seeds by the same recipe on the same data.

    The others come from `training/results` and from the folders beside the run, one for each model and seed.

    Args:
        run: folder of the run.
        result: content of its `result.json`.
    """
    by_model = {(result["model"], result["seed"]): result}
    if result["task"] == "language_modeling":
        others = sorted((RESULTS / result["name"]).glob("*.json")) + sorted(run.parent.glob("*/result.json"))
        for other in map(read_portable_result, others):
            if other.get("task") == result["task"] and _conditions(other) == _conditions(result):
                by_model.setdefault((other["model"], other["seed"]), other)
    return list(by_model.values())

# SPDX-License-Identifier: Apache-2.0
"""One trial of a search, from its recipe to its outcome."""

import math
import time
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from transformers.utils.generic import flatten_dict

from training.parallel import recipe_job, run_logged
from training.recipe import BaseRecipe, nearest
from training.run_folder import TRIAL_LOCK


class Outcome(NamedTuple):
    """What became of a trial: its metric, or the message with which it failed, and the seconds it took."""

    metric: float | None
    error: str | None
    seconds: float


def run_trial(recipe: BaseRecipe, metric: str) -> Outcome:
    """Run a recipe, or what is left of its run; what it prints goes into a file beside its folder.

    Args:
        recipe: of any task.
        metric: dotted path of a number in its `result.json`.

    Raises:
        ValueError: there is no such number. A run that fails, or whose number is not finite, is an outcome.
    """
    folder, start = recipe.folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # Another worker may have drawn the same settings: it waits here, and then finds the result.
    with FileLock(folder / TRIAL_LOCK):
        try:
            result = run_logged(recipe_job(recipe))
        except (ValueError, torch.OutOfMemoryError) as error:
            return Outcome(None, f"{error}", round(time.monotonic() - start, 3))
    value = _look_up(result, metric)
    finite = value is not None and math.isfinite(value)
    seconds = result.get("seconds", round(time.monotonic() - start, 3))
    return Outcome(float(value), None, seconds) if finite else Outcome(None, f"{metric} is {value}", seconds)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _look_up(result: dict[str, Any], metric: str) -> float | None:
    # An error here ends the search: every other trial would end in it too.
    values = flatten_dict(result).items()
    numbers = {key: value for key, value in values if _is_number(value) or value is None}
    if metric not in numbers:
        raise ValueError(f"the result of a trial has no number {metric!r}{nearest(metric, list(numbers))}")
    return numbers[metric]

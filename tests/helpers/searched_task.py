# SPDX-License-Identifier: Apache-2.0
"""A task that takes no time, for `test_search.py`: its loss is least at x = 3. As a script, this file searches it.

Each start of a run writes its settings into the file `starts` beside its folder. While there is a file `hold` in the
folder above, a run with x = 2 waits.
"""

import os
import sys
import time
from typing import Any, Literal

import torch
from accelerate import PartialState

from training.recipe import TASKS, BaseRecipe, Section, load_recipe
from training.run_folder import run_once


TASKS["searched"] = "helpers.searched_task"


class Inner(Section):
    y: float = 1.0
    error: Literal["diverged", "memory", "bug"] | None = None


class Recipe(BaseRecipe):
    task: Literal["searched"]
    x: int | float = 0
    inner: Inner = Inner()


def measure(recipe: Recipe) -> dict[str, Any]:
    if recipe.inner.error == "diverged" and recipe.x > 3:
        raise ValueError(f"the loss diverged at x = {recipe.x}")
    if recipe.inner.error == "memory" and recipe.x > 3:
        raise torch.OutOfMemoryError("out of memory")
    if recipe.inner.error == "bug":
        raise RuntimeError("a bug")
    return {
        "data": {"lines": 1},
        "process": os.getpid(),
        "metrics": {"loss": (recipe.x - 3) ** 2 + recipe.inner.y, "nothing": None},
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    def make(data: dict[str, Any]) -> dict[str, Any]:
        print(f"x is {recipe.x}")
        with (recipe.folder.parent / "starts").open("a") as starts:
            starts.write(f"{recipe.x}\n")
        while recipe.x == 2 and (recipe.folder.parent.parent / "hold").exists():
            time.sleep(0.02)
        return measure(recipe)

    return run_once(recipe, PartialState(cpu=True), restart, lambda: {"hash": recipe.hash, "data": {}}, make)


if __name__ == "__main__":
    from training.tasks import search

    search.run(load_recipe(sys.argv[1], sys.argv[2:]))

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
from training.result import read_result, write_result
from training.run_folder import claim_folder, only_run_in


TASKS["searched"] = "helpers.searched_task"


class Inner(Section):
    y: float = 1.0
    error: Literal["diverged", "memory", "bug"] | None = None


class Recipe(BaseRecipe):
    task: Literal["searched"]
    x: int | float = 0
    inner: Inner = Inner()


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    state = PartialState(cpu=True)
    with only_run_in(recipe.folder, state):
        claim_folder(recipe, {"hash": recipe.hash, "data": {}}, state, restart)
        if (finished := read_result(recipe.folder)) is not None:
            return finished
        print(f"x is {recipe.x}")
        with (recipe.folder.parent / "starts").open("a") as starts:
            starts.write(f"{recipe.x}\n")
        while recipe.x == 2 and (recipe.folder.parent.parent / "hold").exists():
            time.sleep(0.02)
        write_result(measure(recipe), recipe.folder)
        return read_result(recipe.folder)


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


if __name__ == "__main__":
    from training.tasks import search

    search.run(load_recipe(sys.argv[1], sys.argv[2:]))

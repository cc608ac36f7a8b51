# SPDX-License-Identifier: Apache-2.0
"""Several runs at once on one machine, each in a process of its own, with one progress bar for all.

Small models gain little from many threads: two of them side by side, one core each, finish sooner than one after the
other. What a run prints goes to `FOLDER.log`, beside its folder.
"""

import multiprocessing
import os
import queue
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from tqdm import tqdm

from training.recipe import BaseRecipe, task_module


_progress: Any = None  # of a worker process: the queue to the process that waits for it


def run_all(recipes: Sequence[BaseRecipe], workers: int, description: str = "trainings") -> None:
    """Do every recipe's run; a finished one is only checked, and what an interruption leaves, the next call resumes.

    Args:
        recipes: of runs in different folders.
        workers: processes at once; each gets its share of the cores. 1: here, one after the other.
        description: what the bar calls them.

    Raises:
        Exception: the first one that a run raised; runs that had begun are finished before, others not begun.
    """
    if workers == 1 or len(recipes) < 2:
        for recipe in recipes:
            PartialState().print(f"{recipe.folder}:", flush=True)
            task_module(recipe.task).run(recipe)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of torch's threads
    messages = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Read by the libraries when the processes load them.
    with (
        _environment(OMP_NUM_THREADS=str(threads)),
        ProcessPoolExecutor(workers, context, _begin, (messages, threads)) as executor,
    ):
        futures = [executor.submit(_run, recipe.to_yaml()) for recipe in recipes]
        _show_progress(futures, messages, description)
        executor.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


class _environment:
    def __init__(self, **variables: str):
        self._variables, self._before = variables, {}

    def __enter__(self):
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *exception):
        for name, value in self._before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _show_progress(futures, messages, description: str) -> None:
    done, waiting = {}, set(futures)
    bar_format = "{desc}: {n:.2f} of {total} |{bar}| {elapsed}<{remaining}"
    with tqdm(total=len(futures), desc=description, bar_format=bar_format) as bar:
        while waiting:
            finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
            try:
                while True:
                    name, share = messages.get_nowait()
                    done[name] = share
            except queue.Empty:
                pass
            bar.n = sum(done.values())
            bar.refresh()
            if any(future.exception() is not None for future in finished):
                return


def _begin(messages, threads: int) -> None:
    global _progress
    _progress = messages
    torch.set_num_threads(threads)


def _run(text: str) -> None:
    values = yaml.safe_load(text)
    recipe = task_module(values["task"]).Recipe.model_validate(values)
    log = recipe.folder.with_name(f"{recipe.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        try:
            task_module(recipe.task).run(recipe)
            tell_progress(recipe.folder, 1.0)
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def tell_progress(folder: Path, share: float) -> None:
    """Let whoever waits for this process, if anyone, know what share of the run in `folder` is done."""
    if _progress is not None:
        _progress.put((str(folder), share))

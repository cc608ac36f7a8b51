# SPDX-License-Identifier: Apache-2.0
"""What a search does many times and several at once: one trial, from its recipe to its outcome, and who runs it."""

import contextlib
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from training.recipe import BaseRecipe, nearest, task_module


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
    folder, start = recipe.folder, time.monotonic()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        # Another worker may have drawn the same settings: it waits here, and then finds the result.
        stack.enter_context(FileLock(folder.with_name(f".{folder.name}.trial.lock")))
        try:
            result = task_module(recipe.task).run(recipe)
        except (ValueError, torch.OutOfMemoryError) as error:
            return Outcome(None, f"{error}", round(time.monotonic() - start, 3))
    value = _look_up(result, metric)
    finite = value is not None and math.isfinite(value)
    seconds = result.get("seconds", round(time.monotonic() - start, 3))
    return Outcome(float(value), None, seconds) if finite else Outcome(None, f"{metric} is {value}", seconds)


def _look_up(result: dict[str, Any], metric: str) -> float | None:
    # An error here ends the search: every other trial would end in it too.
    numbers = dict(_numbers(result))
    if metric not in numbers:
        raise ValueError(f"the result of a trial has no number {metric!r}{nearest(metric, list(numbers))}")
    return numbers[metric]


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif value is None or isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


class _ThisProcess(Executor):
    """A worker that is no process of its own."""

    def submit(self, function, /, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@contextlib.contextmanager
def start_workers(number: int) -> Iterator[list[Executor]]:
    """Workers that take one job at a time: this process, or so many others, which share threads and GPUs.

    They end with the block; when it fails, with what they are doing.
    """
    if number == 1:
        yield [_ThisProcess()]
        return
    others, gpus = set(multiprocessing.active_children()), _gpus()
    threads = max(1, torch.get_num_threads() // number)
    with contextlib.ExitStack() as stack:
        started = [_start_worker(threads, gpus[index % len(gpus)] if gpus else None) for index in range(number)]
        for worker in started:
            stack.enter_context(worker)
        try:
            yield list(started)
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _gpus() -> list[str]:
    number, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:number] if named else [str(index) for index in range(number)]


def _start_worker(threads: int, gpu: str | None) -> ProcessPoolExecutor:
    """A process with so many threads; of several GPUs it sees one, else it would train on all of them together."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_worker, (threads,))
    try:
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # a process reads it once, so it is set before this one starts
        worker.submit(int)  # starts it
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    return worker


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_search, daemon=True).start()


def _end_with_the_search() -> None:
    # A worker that outlived a killed search would go on in a folder that the next start wants to resume.
    multiprocessing.parent_process().join()
    os._exit(1)

# SPDX-License-Identifier: Apache-2.0
"""Several runs at once on one machine, each in a process of its own, with one progress bar for all.

Small models gain little from many threads: two trainings side by side, one core each, end sooner than one after the
other. What a run prints goes to `FOLDER.log`, beside its folder.
"""

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from tqdm import tqdm

from training.progress import TimeLeft
from training.recipe import BaseRecipe, task_module


class Job(NamedTuple):
    """Work in a folder of its own, done by a function of a module."""

    folder: Path
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def _run_recipe(recipe: BaseRecipe) -> dict[str, Any]:
    return task_module(recipe.task).run(recipe)


def recipe_job(recipe: BaseRecipe) -> Job:
    """Return the job of a recipe's run. A finished run is only checked, and an interrupted one goes on."""
    return Job(recipe.folder, _run_recipe, (recipe,))


# In a worker


_messages: Any = None  # of a worker: the queue to its parent


def report_progress(folder: Path, share: float) -> None:
    """Report to the parent process, if there is one, what share of the run in `folder` is done."""
    if _messages is not None:
        _messages.put((str(folder), share))


def run_logged(job: Job) -> Any:
    """Do a job and return its result; its output goes to a file beside its folder."""
    log = job.folder.with_name(f"{job.folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        return job.function(*job.arguments)


def _end_with_the_parent() -> None:
    # A worker that outlived a killed parent would go on in a folder that the next start wants to resume.
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in workers only
    parent.join()
    os._exit(1)


def _begin_worker(threads: int, messages: Any) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


# Workers


class _ThisProcess(Executor):
    """An executor that does everything at once in this process."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **options))
        return future


def _gpus() -> list[str]:
    number, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:number] if visible else [str(index) for index in range(number)]


def _start_worker(threads: int, gpu: str | None, messages: Any) -> ProcessPoolExecutor:
    """Start a process with so many threads; of several GPUs it sees one, else it would train on all of them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Not a fork, which would inherit locks of torch's threads.
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_worker, (threads, messages))
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


@contextlib.contextmanager
def start_workers(number: int, messages: Any = None) -> Iterator[list[Executor]]:
    """Give executors that take one job at a time: this process, or so many others, which share threads and GPUs.

    Each process is an executor of its own, so that one that dies fails only its own job. They end with the block; when
    the block fails, they are stopped in the middle of their jobs.

    Args:
        number: how many executors; 1 is this process.
        messages: the queue that `report_progress` of the other processes writes to.
    """
    if number == 1:
        yield [_ThisProcess()]
        return
    others, gpus = set(multiprocessing.active_children()), _gpus()
    threads = max(1, torch.get_num_threads() // number)
    with contextlib.ExitStack() as stack:
        started: list[Executor] = [
            _start_worker(threads, gpus[index % len(gpus)] if gpus else None, messages) for index in range(number)
        ]
        for worker in started:
            stack.enter_context(worker)
        try:
            yield list(started)
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


# All jobs


def _received(messages: Any) -> Iterator[tuple[str, float]]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield messages.get_nowait()


def _run_in_order(jobs: Sequence[Job], description: str) -> list[Any]:
    results, left = [], TimeLeft(len(jobs))
    for number, job in enumerate(jobs, 1):
        time_left = f", {left}" if len(jobs) > 1 else ""
        PartialState().print(f"{description}, {number} of {len(jobs)}{time_left}: {job.folder}", flush=True)
        results.append(job.function(*job.arguments))
        left.done()
    return results


def run_all(jobs: Sequence[Job], workers: int, description: str = "trainings") -> list[Any]:
    """Do every job, several at once, and return their results in order.

    Args:
        jobs: in different folders.
        workers: processes at once; each gets its share of the threads. With 1, and under `accelerate launch`, whose
            processes do each job together, the jobs are done one after the other.
        description: what the bar, or the line before each of them, calls them.

    Raises:
        Exception: the first one that a job raised; jobs that had begun are finished before, others are not begun.
    """
    if workers == 1 or len(jobs) < 2 or PartialState().num_processes > 1:
        return _run_in_order(jobs, description)
    messages = multiprocessing.get_context("spawn").Queue()
    waiting, futures = list(jobs), []
    running: dict[Future, tuple[Executor, str]] = {}
    failure: BaseException | None = None
    bar_format = "{desc}: {n:.2f} of {total} |{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=len(jobs), desc=description, bar_format=bar_format)
    with bar, start_workers(min(workers, len(jobs)), messages) as idle:
        shares = {str(job.folder): 0.0 for job in jobs}
        while waiting or running:
            while waiting and idle:
                worker, job = idle.pop(), waiting.pop(0)
                futures.append(worker.submit(run_logged, job))
                running[futures[-1]] = worker, str(job.folder)
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                idle.append(running.pop(future)[0])
                failure = failure or future.exception()
            if failure is not None:
                waiting.clear()
            # A job may train something in a folder of its own besides, which is no part of it to count.
            shares.update((folder, share) for folder, share in _received(messages) if folder in shares)
            # A job that has ended counts whole: what it last said of itself may arrive later, or never.
            bar.n = len(futures) - len(running) + sum(shares[folder] for _, folder in running.values())
            bar.refresh()
    if failure is not None:
        raise failure
    return [future.result() for future in futures]

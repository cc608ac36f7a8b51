# SPDX-License-Identifier: Apache-2.0
"""Progress: a bar with the time that is left, for every step that takes longer than two seconds."""

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from tqdm import tqdm


# Steps that end sooner show no bar.
SECONDS = 2.0
_Item = TypeVar("_Item")


def progress(items: Iterable[_Item], label: str, unit: str, total: int | None = None) -> Iterable[_Item]:
    """Iterate with a bar, which appears after two seconds and goes when it is done.

    Args:
        items: to iterate over.
        label: of the bar.
        unit: what an item is.
        total: how many items there are, if they have no length.
    """
    return tqdm(items, desc=label, unit=unit, total=total, delay=SECONDS, leave=False)


def in_steps(label: str, steps: Iterable[tuple[str, Callable[[], Any]]]) -> Iterator[Any]:
    """Yield what each step returns, with a bar that names the step being taken, if a terminal shows it.

    Args:
        label: of the bar.
        steps: of each its name, and the function that takes it.
    """
    steps = list(steps)
    # At once, not after two seconds: a bar is drawn between steps alone, and the first one may take a minute.
    with tqdm(total=len(steps), desc=label, unit="step", leave=False, disable=None) as bar:
        for name, step in steps:
            bar.set_postfix_str(name)
            result = step()
            bar.update()
            with tqdm.external_write_mode():  # what the caller prints does not run into the bar
                yield result


class TimeLeft:
    """Estimates the time that jobs in a row still take, from those that were not finished already."""

    def __init__(self, num_jobs: int) -> None:
        self._waiting = num_jobs
        self._began = time.monotonic()
        self._spent: list[float] = []

    def done(self) -> None:
        """Note that one more job is done."""
        now = time.monotonic()
        self._waiting -= 1
        if now - self._began > SECONDS:  # less: it was only found to be finished
            self._spent.append(now - self._began)
        self._began = now

    def __str__(self) -> str:
        if not self._spent:
            return "time left not known yet"
        seconds = round(self._waiting * sum(self._spent) / len(self._spent))
        return f"about {timedelta(seconds=seconds)} left"

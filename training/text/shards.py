# SPDX-License-Identifier: Apache-2.0
"""Batches of rows in files, shared by the processes of a run: each is written whole or not at all, and once.

The rows of a batch depend on its number alone, so that neither the number of processes nor an interruption changes
them. A file is sealed by its checksum, and made again if it has changed since.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from training.files import read_sealed, sealed, set_aside, write_text


logger = logging.getLogger(__name__)


def format_row(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of shards, in order.

    Raises:
        ValueError: a shard is damaged.
    """
    for path in paths:
        text = read_sealed(path)
        if text is None:
            raise ValueError(f"{path} is damaged: start the run again, which does this batch again")
        yield from map(json.loads, filter(None, text.split("\n")))  # a story may hold other ends of lines


class ShardWriter:
    """Writes batches of rows, one file each, and counts the seconds that it takes over all starts of a run.

    Args:
        folder: of the run.
        state: of the processes, which share the batches; all call the same methods.
    """

    def __init__(self, folder: Path, state: PartialState):
        self.folder, self.state = folder, state
        self._clock = folder / "seconds.json"
        earlier = read_sealed(self._clock)
        if earlier is None and self._clock.is_file():
            logger.warning("%s is damaged: the seconds are counted from this start on", self._clock)
        # As if all starts had been one: moved back by the seconds of earlier ones.
        self._started = time.perf_counter() - json.loads(earlier or "0.0")

    @property
    def seconds(self) -> float:
        """Wall-clock time of the main process, over all starts; of a killed one, up to its last whole batch."""
        return time.perf_counter() - self._started

    def _is_written(self, path: Path) -> bool:
        if not path.is_file():
            return False
        if read_sealed(path) is not None:
            return True
        logger.warning("%s is damaged: kept as %s, and done again", path, set_aside(path).name)
        return False

    def write(
        self, folder: str, name: str, count: int, make_rows: Callable[[int], Iterable[dict[str, Any]]], label: str
    ) -> list[Path]:
        """Write what is missing of batches 0 to `count - 1`, each on process number modulo processes.

        Args:
            folder: within that of the run.
            name: of the files: `NAME-00000000.jsonl` and so on.
            count: how many batches there are.
            make_rows: makes the rows of a batch from its number.
            label: shown beside the progress.

        Returns:
            The files of all batches, in order, when all are there.
        """
        paths = [self.folder / folder / f"{name}-{number:08d}.jsonl" for number in range(count)]
        numbers = range(self.state.process_index, count, self.state.num_processes)
        missing = [number for number in numbers if not self._is_written(paths[number])]
        is_main = self.state.is_main_process
        for number in tqdm(missing, desc=label, unit="batch", disable=not is_main or not missing):
            write_text(paths[number], sealed("".join(map(format_row, make_rows(number)))))
            if is_main:
                write_text(self._clock, sealed(f"{json.dumps(self.seconds)}\n"))
        self.state.wait_for_everyone()
        return paths

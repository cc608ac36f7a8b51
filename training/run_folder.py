# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whose it is, one process at a time, and in order after a kill."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout

from training.export import remove_leftovers, write_text
from training.loop import latest_checkpoint, set_aside_broken_checkpoints
from training.recipe import BaseRecipe


@contextlib.contextmanager
def only_run_in(folder: Path, state: PartialState) -> Iterator[None]:
    """Hold a lock beside the folder: a command started twice must not tidy away what the first is just saving."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    if state.is_main_process:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"a run is going on in {folder}: wait for it, or choose another output_dir") from None
    try:
        yield
    finally:
        lock.release()


def claim_folder(recipe: BaseRecipe, identity: dict[str, Any], state: PartialState, restart: bool) -> None:
    """Make the folder this recipe's: refuse another recipe's, tidy up after a killed run of the same.

    Args:
        recipe: whose folder it is.
        identity: `hash`, `data` (the provenance of what is read) and, if a run continues exactly only with as many,
            `num_processes`; besides, what an error had better show.
        state: of the processes, all of which call this.
        restart: move what an earlier run left aside.

    Raises:
        ValueError: the folder holds another recipe's run, a run of another number of processes, only damaged
            checkpoints, or, with `restart`, something that no run has written.
    """
    if recipe.folder.is_dir() and any(recipe.folder.iterdir()) and not (recipe.folder / "run.json").is_file():
        raise ValueError(f"{recipe.folder} is not the folder of a run and stays as it is: choose another output_dir")
    if not restart:
        _refuse_another_run(recipe.folder, identity)
    state.wait_for_everyone()  # nobody may change the folder while others still look at it
    if state.is_main_process:
        if restart and recipe.folder.exists():
            aside = recipe.folder.with_name(f"{recipe.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            recipe.folder.rename(aside)
            state.print(f"the earlier run is now in {aside}")
        recipe.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(recipe.folder)
        if latest_checkpoint(recipe.folder) is not None:
            set_aside_broken_checkpoints(recipe.folder)
        write_text(recipe.folder / "run.json", json.dumps(identity, indent=1))
        write_text(recipe.folder / "recipe.yaml", recipe.to_yaml())
    state.wait_for_everyone()


def _refuse_another_run(folder: Path, identity: dict[str, Any]) -> None:
    remedy = "choose another output_dir, or move the earlier run aside with --restart"
    written = folder / "run.json"
    if not written.is_file():
        return
    earlier = json.loads(written.read_text(encoding="utf-8"))
    if (earlier["hash"], earlier["data"]) != (identity["hash"], identity["data"]):
        before, now = _flat(earlier), _flat(identity)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        changes = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed if key != "hash"]
        raise ValueError(f"{folder} holds a run of another recipe or other data ({'; '.join(changes)}): {remedy}")
    if earlier.get("num_processes") != identity.get("num_processes"):
        raise ValueError(
            f"{folder} holds a run of {earlier['num_processes']} processes, not {identity['num_processes']}: start it "
            f"with as many, so that it continues exactly, or {remedy}"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat

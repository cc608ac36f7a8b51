# SPDX-License-Identifier: Apache-2.0
"""The life of a run: ownership, locking and recovery of its folder, and its work done once.

Every task goes through `run_once`. Checkpoints are verified by their checksums before a run resumes: a damaged one is
set aside, and the run resumes from the one before it (`loop.set_aside_broken_checkpoints`). `tasks/moon_model.py` has
one checkpoint, checks it likewise, and trains again if it is damaged.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers.utils.generic import flatten_dict

from training.files import CHECKSUMS, read_json, remove_leftovers, write_text
from training.loop import set_aside_broken_checkpoints
from training.recipe import BaseRecipe
from training.result import read_result, write_result


# They lie in the folder itself, which is the same whatever it is called: by a link, a bind mount, or `..` in its path.
RUN_LOCK, TRIAL_LOCK = ".run.lock", ".trial.lock"


def _content(folder: Path) -> list[Path]:
    """Return the paths in a folder, except locks; none if there is no such folder."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.name not in (RUN_LOCK, TRIAL_LOCK)]


def _refuse_other_content(folder: Path) -> None:
    if _content(folder) and not (folder / "run.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run and stays as it is: choose another output_dir")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there; `ValueError` if another process holds it."""
    folder.resolve().mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / RUN_LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"a run is going on in {folder}, or it is being published: wait for it, or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def only_run_in(folder: Path, state: PartialState) -> Iterator[None]:
    """Hold the lock of a run's folder on the main process: a second start must not tidy away what the first is saving.

    Raises:
        ValueError: another process holds it, or the folder has something in it that no run has written.
    """
    _refuse_other_content(folder)  # which then gets no lock either
    with locked(folder) if state.is_main_process else contextlib.nullcontext():
        yield


def _read_identity(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it cannot be read as JSON ({error}): {remedy}") from None
    if not isinstance(content, dict) or not {"hash", "data"} <= content.keys():
        raise ValueError(f"{path} is damaged, it does not say whose run this is: {remedy}")
    return content


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    # An empty section is no setting: without this, filling it would be shown as two changes.
    return {key: value for key, value in flatten_dict(values).items() if value != {}}


def _refuse_another_run(folder: Path, identity: dict[str, Any]) -> None:
    remedy = "choose another output_dir, or move the earlier run aside with --restart"
    path = folder / "run.json"
    if not path.is_file():
        return
    earlier = _read_identity(path, remedy)
    if (earlier["hash"], earlier["data"]) != (identity["hash"], identity["data"]):
        before, now = _flat(earlier), _flat(identity)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        changes = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed if key != "hash"]
        difference = "; ".join(changes) or "by its hash alone: its run.json may be damaged"
        raise ValueError(f"{folder} holds a run of another recipe or other data ({difference}): {remedy}")
    if earlier.get("num_processes") != identity.get("num_processes"):
        raise ValueError(
            f"{folder} holds a run of {earlier.get('num_processes')} processes, not {identity.get('num_processes')}: "
            f"start it with as many, so that it continues exactly, or {remedy}"
        )
    if earlier.get("processes_per_batch", 1) != identity.get("processes_per_batch", 1):
        raise ValueError(
            f"{folder} holds a run of {earlier.get('processes_per_batch', 1)} processes to a batch, not "
            f"{identity.get('processes_per_batch', 1)}: start it with the same cp_size and tp_size, or {remedy}"
        )


def _move_aside(folder: Path) -> Path:
    """Move what a folder holds into one beside it. The folder itself stays: it is locked, and may be a mount point."""
    aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    # `run.json` last: until then, after a kill, this is still the folder of a run.
    for path in sorted(_content(folder), key=lambda path: path.name == "run.json"):
        shutil.move(path, aside / path.name)
    return aside


def claim_folder(recipe: BaseRecipe, identity: dict[str, Any], state: PartialState, restart: bool) -> None:
    """Make the folder this recipe's: refuse another recipe's, tidy up after a killed run of the same.

    Args:
        recipe: the recipe of the run.
        identity: `hash`, `data` (the provenance of what is read) and, if a run continues exactly only with as many,
            `num_processes`; besides, what an error should show.
        state: of the processes, all of which call this.
        restart: move what an earlier run left aside.

    Raises:
        ValueError: the folder holds another recipe's run, a run of another number of processes, only damaged
            checkpoints, a `run.json` that cannot be read, or, with `restart`, something that no run has written.
    """
    _refuse_other_content(recipe.folder)
    if not restart:
        _refuse_another_run(recipe.folder, identity)
    state.wait_for_everyone()  # the folder must not change while other processes still look at it
    if state.is_main_process:
        if restart and _content(recipe.folder):
            state.print(f"the earlier run is now in {_move_aside(recipe.folder.resolve())}")
        recipe.folder.resolve().mkdir(parents=True, exist_ok=True)
        remove_leftovers(recipe.folder)
        if not (recipe.folder / "result.json").is_file():
            (recipe.folder / CHECKSUMS).unlink(missing_ok=True)  # of what a run had finished whose result is gone
            set_aside_broken_checkpoints(recipe.folder)
        # Not by `write_json`: a finished run that is started again keeps the bytes that older versions wrote.
        write_text(recipe.folder / "run.json", json.dumps(identity, indent=1))
        write_text(recipe.folder / "recipe.yaml", recipe.to_yaml())
    state.wait_for_everyone()


def run_once(
    recipe: BaseRecipe,
    state: PartialState,
    restart: bool,
    identity: Callable[[], dict[str, Any]],
    make: Callable[[Any], dict[str, Any]],
    kept: Sequence[str] = (),
    again: str | None = None,
) -> dict[str, Any]:
    """Do what a recipe asks for, unless its folder holds the finished result.

    All processes call it. The main one holds the lock of the folder and writes `result.json`; the others wait for it.

    Args:
        recipe: the recipe of the run.
        state: of the processes.
        restart: move what an earlier run left aside first.
        identity: returns the identity that `claim_folder` compares. It is called when the folder is locked, for it may
            read all of the data.
        make: does the work, given the provenance of the data (`identity()["data"]`), and returns the content of
            `result.json`. Only what it returns on the main process counts.
        kept: files and folders of the run that later runs use, such as `model`; their checksums are written.
        again: the effect of `--restart` in words, such as `trains again`: printed if the run is finished. Without it
            nothing is printed.

    Returns:
        The content of `result.json` on every process; of the earlier one, if the run was already finished.

    Raises:
        ValueError: another process is at work in the folder, or it belongs to another run (see `claim_folder`).
    """
    with only_run_in(recipe.folder, state):
        content = identity()
        claim_folder(recipe, content, state, restart)
        finished = read_result(recipe.folder)
        if finished is not None:
            if again is not None:
                state.print(f"{recipe.folder} is finished already; --restart {again}")
            return finished
        result = make(content["data"])
        if state.is_main_process:
            write_result(result, recipe.folder, kept)
        state.wait_for_everyone()
        try:
            return read_result(recipe.folder) or result
        except ValueError:
            if state.is_main_process:
                raise
            return result  # on another machine the two files may appear a moment later, one before the other

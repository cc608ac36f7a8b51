# SPDX-License-Identifier: Apache-2.0
"""The folder of a run is one folder under all its names, and changes hands whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from training.files import CHECKSUMS, read_checksums
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.run_folder import RUN_LOCK, claim_folder, locked, only_run_in, run_once


IDENTITY = {"hash": "0", "data": {}}


def recipe_in(folder):
    return load_recipe(CONFIGURATION / "recipe" / "smoke.yaml", [f"output_dir={folder}"])


@pytest.fixture
def real(tmp_path):
    (tmp_path / "real").mkdir()
    return tmp_path / "real"


def by_a_link(real):
    (real.parent / "link").symlink_to("real")
    return real.parent / "link"


def by_a_link_above(real):
    (real.parent / "above").symlink_to(real.parent)
    return real.parent / "above" / "real"


def by_dots(real):
    return real.parent / "elsewhere" / ".." / "real"


def from_here(real):
    os.chdir(real.parent)
    return Path("real")


def by_a_mount(real):
    other = real.parent / "mounted"
    other.mkdir()
    done = subprocess.run(["mount", "--bind", str(real), str(other)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"this user may not mount: {done.stderr.decode().strip()}")
    return other


NAMES = [by_a_link, by_a_link_above, by_dots, from_here, by_a_mount]


@pytest.fixture
def other_name(request, real, monkeypatch):
    monkeypatch.chdir(real.parent)
    (real.parent / "elsewhere").mkdir()
    name = request.param(real)
    yield name
    if request.param is by_a_mount:
        subprocess.run(["umount", str(name)], check=True)


@pytest.mark.parametrize("other_name", NAMES, indirect=True)
def test_one_folder_has_one_lock_under_all_its_names(real, other_name):
    for first, second in ((real, other_name), (other_name, real)):
        with locked(first), pytest.raises(ValueError, match="a run is going on"), locked(second):
            pass
    with locked(other_name), locked(real.parent / "another"):  # it was free again
        pass


@pytest.mark.parametrize("other_name", NAMES, indirect=True)
def test_a_run_is_moved_aside_and_its_folder_stays(real, other_name):
    state, recipe = PartialState(cpu=True), recipe_in(other_name)
    with only_run_in(other_name, state):
        claim_folder(recipe, IDENTITY, state, restart=False)
        (real / "model").mkdir()
        (real / "model" / "weights").write_text("old")
        claim_folder(recipe, IDENTITY | {"hash": "1"}, state, restart=True)
        with pytest.raises(ValueError, match="a run is going on"), locked(real):
            pass
    assert {path.name for path in real.iterdir()} == {RUN_LOCK, "run.json", "recipe.yaml"}
    (aside,) = {path for path in real.parent.glob("*.2*-*")}
    assert (aside / "model" / "weights").read_text() == "old" and (aside / "run.json").is_file()
    assert other_name.is_dir() and other_name.samefile(real)


def test_a_link_to_a_folder_that_is_not_there_yet_makes_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    with locked(tmp_path / "link"):
        assert (tmp_path / "far" / "away" / RUN_LOCK).is_file()


def test_two_processes_share_no_folder(real):
    hold = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(by_a_link(real) / RUN_LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="a run is going on"), locked(real):
            pass
        process.kill()
    with locked(real):  # a lock ends with its process
        pass


def test_a_folder_that_no_run_has_written_gets_no_lock(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is not the folder of a run"), only_run_in(tmp_path, PartialState(cpu=True)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_moving_aside_that_breaks_off_leaves_the_folder_of_a_run(real, monkeypatch):
    state, recipe = PartialState(cpu=True), recipe_in(real)
    claim_folder(recipe, IDENTITY, state, restart=False)
    for name in ("a", "z"):
        (real / name).mkdir()
    moved = []

    def move(path, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(path.rename(target).name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.run_folder.shutil.move", move)
        claim_folder(recipe, IDENTITY, state, restart=True)
    assert len(moved) == 2 and (real / "run.json").is_file()
    claim_folder(recipe, IDENTITY, state, restart=False)


def test_an_unfinished_run_has_no_checksums_of_a_result(real):
    state, recipe = PartialState(cpu=True), recipe_in(real)
    claim_folder(recipe, IDENTITY, state, restart=False)
    (real / CHECKSUMS).write_text("of a result that is gone")
    claim_folder(recipe, IDENTITY, state, restart=False)
    assert not (real / CHECKSUMS).exists()


def test_a_run_is_done_once_and_what_it_leaves_is_listed(real, capsys):
    state, recipe, calls = PartialState(cpu=True), recipe_in(real), []

    def make(data):
        calls.append(data)
        (real / "model").mkdir(exist_ok=True)
        (real / "model" / "weights").write_text("new")
        return {"loss": 1.5}

    for restart in (False, False, True):
        result = run_once(recipe, state, restart, lambda: IDENTITY, make, kept=["model"], again="does it again")
        assert result == {"loss": 1.5} and read_checksums(real).keys() == {"model/weights", "result.json"}
    assert calls == [{}, {}]
    assert capsys.readouterr().out.count(f"{real} is finished already; --restart does it again") == 1


def test_a_run_reads_its_data_only_when_its_folder_is_locked(real):
    def identity():
        raise AssertionError("the data are read")

    with locked(real), pytest.raises(ValueError, match="a run is going on"):
        run_once(recipe_in(real), PartialState(cpu=True), False, identity, lambda data: {})

# SPDX-License-Identifier: Apache-2.0
"""Finished runs, a folder staged from one of them, and a Space that runs. A test that changes one takes a copy."""

import shutil
from contextlib import contextmanager

import pytest
import yaml
from helpers.publications import (
    ABOUT_SMOKE,
    COMMIT,
    lora,
    memorize,
    smoke,
    smoke_v2,
    stage,
    stage_memory,
    stories_run,
)
from helpers.space import make_parts, write_space

from hub_cards.space.screenshot import BROWSER, DRIVER, serve
from training.publishing import artifacts, publish
from training.synthetic.automata import SPLITS, AutomataSection, draw_split, save_splits
from training.tasks import fine_tuning, language_modeling


@pytest.fixture(scope="session")
def about(tmp_path_factory):
    path = tmp_path_factory.mktemp("about") / "smoke.yaml"
    path.write_text(yaml.safe_dump(ABOUT_SMOKE), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    recipe = smoke(tmp_path_factory.mktemp("runs") / "smoke")
    language_modeling.run(recipe)
    return recipe.folder


@pytest.fixture(scope="session")
def run_v2(tmp_path_factory):
    recipe = smoke_v2(tmp_path_factory.mktemp("runs") / "smoke_v2")
    language_modeling.run(recipe)
    return recipe.folder


@pytest.fixture(scope="session")
def adapted(run):
    recipe = lora(run.with_name("lora"), run / "model")
    fine_tuning.run(recipe)
    return recipe.folder


@pytest.fixture(scope="session")
def staged(run, about, tmp_path_factory):
    # Out of the run, where a test that publishes it would replace the folder.
    return shutil.copytree(stage(run, "someone/smoke", about=about), tmp_path_factory.mktemp("staged") / "model")


@pytest.fixture(scope="session")
def memory(run, tmp_path_factory):
    texts = {"lily": "Lily has the red ball.\r\nShe runs home.\n", "tom": "Once upon a time Tom had a kite – blue."}
    return memorize(tmp_path_factory.mktemp("memories") / "texts", run / "model", **texts)


@pytest.fixture(scope="session")
def staged_memory(memory, tmp_path_factory):
    """A staged memory, and what was logged."""
    lines = []
    return shutil.copytree(stage_memory(memory, lines=lines), tmp_path_factory.mktemp("staged") / "memory"), lines


@contextmanager
def _untried():
    """Stage without trials, which take most of the time: `test_staging.py` and others have them."""
    with pytest.MonkeyPatch.context() as patch:
        for key, artifact in artifacts.ARTIFACTS.items():
            patch.setitem(artifacts.ARTIFACTS, key, artifact._replace(run_trials=lambda *arguments: []))
        patch.setattr(publish.trials, "check_loss", lambda *arguments: "not checked")
        yield


def _automata(folder):
    folder.mkdir()
    section = AutomataSection(language="automata", num_automata=3, num_test=2)
    save_splits(section, {name: draw_split(section, number) for name, number in SPLITS.items()}, folder)
    return folder


@pytest.fixture(scope="session")
def folder_of(request, about, tmp_path_factory):
    """A function that returns a folder with the card of a kind of thing, by its name in `CARDS` of `test_cards.py`."""
    folder, base, folders = tmp_path_factory.mktemp("cards"), f"someone/smoke@{COMMIT}", {}
    get = request.getfixturevalue
    make = {
        "mosaic": lambda: get("staged"),
        "mosaic v2": lambda: stage(get("run_v2"), "someone/smoke", about=about),
        "adapter": lambda: stage(get("adapted"), "someone/lora", "adapter", about, base),
        "merged": lambda: stage(get("adapted"), "someone/lora", "merged", about, base),
        "memory": lambda: get("staged_memory")[0],
        "memory of v2": lambda: stage_memory(memorize(folder / "v2", get("run_v2") / "model", tom="Tom had a kite.")),
        "stories": lambda: stage(stories_run(folder / "stories"), "someone/stories"),
        "automata": lambda: _automata(folder / "automata"),
    }

    def folder_of(kind):
        if kind not in folders:
            with _untried():
                folders[kind] = make[kind]()
        return folders[kind]

    # First, because their trials count elsewhere.
    get("staged"), get("staged_memory")
    return folder_of


@pytest.fixture
def copy(staged, tmp_path):
    return shutil.copytree(staged, tmp_path / "copy")


@pytest.fixture(scope="session", params=["mosaic", "mosaic v2"])
def parts(request):
    """A small model and its tokenizer, for the page."""
    return make_parts(request.param)


@pytest.fixture(scope="session")
def served(parts, tmp_path_factory):
    """The address of the page."""
    with serve(app=write_space(parts, tmp_path_factory.mktemp("space"))) as address:
        yield address


@pytest.fixture
def address(served):
    """The address, if a browser can open it."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    return served

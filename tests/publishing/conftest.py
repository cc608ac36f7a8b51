# SPDX-License-Identifier: Apache-2.0
"""Finished runs, a folder staged from one of them, and a Space that runs. A test that changes one takes a copy."""

import shutil

import pytest
import yaml
from helpers.publications import ABOUT_SMOKE, lora, memorize, smoke, stage, stage_memory
from helpers.space import make_parts, write_space

from hub_cards.space.screenshot import BROWSER, DRIVER, serve
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


@pytest.fixture
def copy(staged, tmp_path):
    return shutil.copytree(staged, tmp_path / "copy")


@pytest.fixture(scope="session")
def parts():
    """A small model and its tokenizer, for the page."""
    return make_parts()


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

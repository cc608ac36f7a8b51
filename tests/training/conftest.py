# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of training."""

import datasets
import pytest
from helpers.pictures import faults_of
from matplotlib.figure import Figure

from training.tasks import language_modeling


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Check every picture that a test draws; return a list of figures and their paths, to which each is added."""
    drawn, savefig = [], Figure.savefig

    def save(figure, path):
        savefig(figure, path)
        assert faults_of(figure) == [], path
        drawn.append((figure, path))

    monkeypatch.setattr(Figure, "savefig", save)
    return drawn


@pytest.fixture
def without_clean_process(monkeypatch):
    """Leave out a run's last check, which takes seconds; `test_export_of_a_run` and `test_cli.py` keep it."""
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield

# SPDX-License-Identifier: Apache-2.0
"""Trials: another loss than the stated one, a failing snippet and a complaint of the linter are noticed."""

import json
import shutil

import pytest
from helpers.publications import edit, list_again, stage

from training.evaluate import load_model
from training.publishing import artifacts, trials


def test_a_loss_that_is_not_the_models_is_refused(staged, run, about, tmp_path, monkeypatch):
    result, parts = json.loads((staged / "result.json").read_text()), load_model(staged)
    loss = result["metrics"]["validation_loss"]
    assert "ok: validation_loss" in trials.check_loss(result, lambda: parts, is_local=False)
    for stated in (loss - 0.01, loss + 0.01, float("nan"), str(loss), None, 1):
        changed = result | {"metrics": {"validation_loss": stated}}
        with pytest.raises(ValueError, match="`validation_loss` in result.json is .*, but measured again it is"):
            trials.check_loss(changed, lambda: parts, is_local=False)
    key = "language_modeling", "model"
    untried = artifacts.ARTIFACTS[key]._replace(run_trials=lambda *arguments: [])
    monkeypatch.setitem(artifacts.ARTIFACTS, key, untried)
    better = shutil.copytree(run, tmp_path / "better", ignore=shutil.ignore_patterns("published"))
    edit(better, "result.json", metrics=result["metrics"] | {"validation_loss": 0.1})
    list_again(better)
    with pytest.raises(ValueError, match="in result.json is 0.1, but measured again"):
        stage(better, "someone/smoke", about=about)
    assert not (better / "published" / "model").exists()


HERE = {"source": "embedded", "num_stories": 4}


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({}, "it states none on a text"),
        ({"task": ["a"]}, "it states none on a text"),
        ({"recipe": {"data": {"validation": HERE, "context_length": "64"}}}, "it states none on a text"),
        (
            {"recipe": {"data": {"validation": {"source": "/etc/passwd"}, "context_length": 64}}},
            "the data are not here",
        ),
        (
            {"recipe": {"data": {"validation": HERE | {"num_stories": 10**9}, "context_length": 64}}},
            "data are not here",
        ),
        ({"recipe": {"data": {"validation": HERE, "context_length": 10**9}}}, "the data are not here"),
        ({"recipe": {"data": {"validation": {"source": "embedded"}, "context_length": 64}}}, "not at hand"),
    ],
)
def test_what_a_strangers_result_asks_for_is_not_read(result, why):
    result = {"task": "language_modeling", "metrics": {"validation_loss": 1.0}} | result
    line = trials.check_loss(result, lambda: pytest.fail("it was loaded"), is_local=False)
    assert line.startswith("not checked: the loss that result.json states") and why in line


def test_a_failing_snippet_is_shown():
    card = "```python\nprint('fine')\n```\n\n```python\nimport nothing_of_the_kind\n```\n"
    with pytest.raises(ValueError, match="this snippet of the card fails:\n\nimport nothing_of_the_kind"):
        trials.check_snippets(card, {})


def test_a_complaint_of_the_linter_is_an_error(copy):
    path = copy / "modeling_memory_mosaic.py"
    path.write_text(path.read_text().replace('base_model_prefix = "model"', 'base_model_prefix = ""'))
    with pytest.raises(ValueError, match="TRF002"):
        trials.check_lint(copy)

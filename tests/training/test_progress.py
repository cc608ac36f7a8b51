# SPDX-License-Identifier: Apache-2.0
"""Progress: steps that take long show a bar, short ones show nothing, and trainings in a row tell the time left."""

import time

import pytest
import torch
from datasets import Dataset
from helpers.models import make_model
from helpers.stories import STORIES
from transformers.utils import logging

from training import progress as progress_module
from training.commands.texts import memorize_texts
from training.evaluate import mean_loss
from training.parallel import Job, run_all
from training.progress import TimeLeft, in_steps, progress
from training.synthetic.automata import TRAIN, AutomataSection, draw_split
from training.text.tokenizer import train_tokenizer
from training.text.windows import pack_windows


def test_a_short_step_shows_nothing_and_a_long_one_a_bar_with_the_time_left(capsys, monkeypatch):
    assert list(progress(range(3), "short", "item")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_module, "SECONDS", 0.05)
    for _ in progress(range(5), "long", "item"):
        time.sleep(0.12)
    shown = capsys.readouterr().err
    assert "long" in shown and "4/5 [00:00<00:00" in shown


def test_steps_are_taken_one_by_one_and_a_pipe_shows_no_bar(capsys):
    taken = []
    steps = in_steps("checks", [(name, lambda name=name: taken.append(name) or name) for name in ("files", "sums")])
    assert next(steps) == "files" and taken == ["files"]
    assert list(steps) == ["sums"] and capsys.readouterr().err == ""


def test_a_terminal_shows_which_step_is_taken(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(in_steps("checks", [("files", lambda: 1), ("sums", lambda: 2)])) == [1, 2]
    shown = capsys.readouterr().err
    assert "checks" in shown and "0/2" in shown and "files" in shown and "1/2" in shown and "sums" in shown


def test_the_time_left_is_that_of_the_jobs_that_were_not_finished(monkeypatch):
    clock = iter([0.0, 0.1, 60.1, 160.1])  # the first was finished already
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    left = TimeLeft(5)
    left.done()
    assert str(left) == "time left not known yet"
    left.done()
    assert str(left) == "about 0:03:00 left"
    left.done()
    assert str(left) == "about 0:02:40 left"


def test_jobs_in_a_row_say_which_of_how_many_and_the_time_left(tmp_path, capsys):
    jobs = [Job(tmp_path / str(number), abs, (-number,)) for number in range(2)]
    assert run_all(jobs, workers=1, description="measurements") == [0, 1]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"measurements, 1 of 2, time left not known yet: {tmp_path / '0'}"
    assert second.startswith("measurements, 2 of 2, ")


def test_the_bar_of_memorizing_counts_tokens_within_a_text(monkeypatch):
    bars = []

    class Bar(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def tqdm(items=None, **options):
        bars.append((Bar(), options))
        bars[-1][0].update = bars[-1][0].append
        return bars[-1][0] if items is None else items

    monkeypatch.setattr(logging, "tqdm", tqdm)
    monkeypatch.setattr("modeling_memory_mosaic.store_memory_mosaic.CHUNK_LENGTH", 4)
    model = make_model()

    def tokenizer(text, **options):
        return {"input_ids": torch.tensor([[ord(letter) % 10 for letter in text]])}

    monkeypatch.setattr("modeling_memory_mosaic.store_memory_mosaic.tokenizer_fingerprint", lambda tokenizer: "0" * 64)
    memorize_texts(model, tokenizer, {"a": "abcdefghij", "b": "abc"})
    assert bars[-1] == ([4, 4, 2, 3], {"total": 13, "desc": "memorizing", "unit": "token", "delay": 2, "leave": False})
    assert not model.base_model._forward_hooks


def _pack_windows():
    stories = Dataset.from_dict({"text": STORIES})
    pack_windows(stories, train_tokenizer(STORIES * 2, vocab_size=270), context_length=4)


LONG_STEPS = {
    "loss": lambda: mean_loss(make_model(), [{"input_ids": [1, 2, 3]}] * 4, 2),
    "windows": _pack_windows,
    "automata": lambda: draw_split(AutomataSection(language="automata", num_automata=3, num_test=2), TRAIN),
}


@pytest.mark.parametrize("label", LONG_STEPS)
def test_a_long_step_has_a_bar(label, capsys, monkeypatch, own_cache):
    monkeypatch.setattr(progress_module, "SECONDS", 0)
    LONG_STEPS[label]()
    assert f"{label}:   0%" in capsys.readouterr().err

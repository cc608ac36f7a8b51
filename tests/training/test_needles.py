# SPDX-License-Identifier: Apache-2.0
"""Needles: what is hidden is what is asked, at its distance, and a model that sees it learns to answer."""

import random

import pytest
import torch
import yaml
from helpers.memory_recipes import SMALL

from training.evaluate import load_causal_lm
from training.experiments import needles
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.synthetic.needles import IGNORED, NAMES, NUM_DIGITS, draw_rows, make_needle, needle_row
from training.text.tokenizer import train_tokenizer


LENGTH, CHUNKS = 16, 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["once upon a time"] * 2, 258)


@pytest.fixture(scope="module")
def texts(tokenizer):
    text = tokenizer("Once upon a time there was a red ball. " * 9, add_special_tokens=False)["input_ids"]
    return [text[start : start + LENGTH * CHUNKS] for start in range(120)]


def test_the_needle_that_is_asked_for_stands_at_its_distance_and_tells_the_answer(tokenizer, texts):
    rows = draw_rows(texts, tokenizer, LENGTH, [1, 4], random.Random(0))
    assert sorted(rows.distances.tolist()) == sorted(list(range(1, CHUNKS + 1)) * (len(texts) // CHUNKS))
    for ids, mask, labels, distance in zip(*rows, strict=True):
        assert mask.all() and len(ids) == LENGTH * CHUNKS + len(" Tom has 1234.")
        sentence = tokenizer.decode(ids[LENGTH * CHUNKS :])
        name, number = sentence[1:4], sentence[-NUM_DIGITS - 1 : -1]
        assert name in NAMES and sentence == f" {name} has {number}."
        start = LENGTH * (CHUNKS - int(distance))
        assert tokenizer.decode(ids[start : start + LENGTH]).count(sentence) == 1
        assert tokenizer.decode(ids[: LENGTH * CHUNKS]).count(f"{name} has") == 1
        assert tokenizer.decode(labels[labels != IGNORED]) == f" {number}."
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_four_needles_have_names_and_chunks_of_their_own(tokenizer, texts):
    rows = draw_rows(texts, tokenizer, LENGTH, [4], random.Random(1))
    for ids in rows.input_ids:
        chunks = [tokenizer.decode(chunk) for chunk in ids[: LENGTH * CHUNKS].view(CHUNKS, LENGTH)]
        found = [chunk[chunk.index(" has ") - 3 :][:3] for chunk in chunks if " has " in chunk]
        assert len(found) == len(set(found)) == 4


def test_what_does_not_fit_is_refused(tokenizer, texts):
    needle = make_needle(tokenizer, "Tom", "1234")
    with pytest.raises(ValueError, match="1 needles of up to 14 tokens do not fit into 12 chunks of 10"):
        needle_row(texts[0][:120], [needle], 1, 10, random.Random(0))
    with pytest.raises(ValueError, match="9 needles"):
        draw_rows(texts, tokenizer, LENGTH, [9], random.Random(0))


def small_recipe(tmp_path, runs, steps=2):
    values = yaml.safe_load((CONFIGURATION / "recipe" / "memory_needles.yaml").read_text(encoding="utf-8"))
    values |= {"runs": {label: values["runs"][label] for label in runs}, "claims": [], "seeds": [0], "num_rows": 16}
    values["reader"] = {"steps": steps, "batch_size": 4}
    for run in values["runs"].values():
        for stage in run["stages"]:
            stage["steps"] = 1
        run.get("model_args", {}).pop("chunk_length", None)
        run.pop("data", None), run.pop("training", None)
    path = tmp_path / "memory_needles.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    common = SMALL | {"model_args": SMALL["model_args"] | {"chunk_length": LENGTH}}
    common["data"] = SMALL["data"] | {"context_length": 2 * LENGTH}
    return load_recipe(path, settings=[{"common": common, "workers": 1}])


def test_an_experiment_asks_every_model_and_leaves_it_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(tmp_path, ["Gated, from scratch", "No memory"])
    result = needles.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    by_distance = result["measured"]["series"][0]["seeds"][0]["exact_by_distance"]
    assert by_distance.keys() == {"1", "4"} and all(len(shares) == CHUNKS for shares in by_distance.values())
    assert (recipe.folder / "memory_needles.png").stat().st_size > 10_000
    assert needles.run(recipe) == result


def test_fitting_trains_all_but_the_encoder(tmp_path, monkeypatch, tokenizer, texts):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(tmp_path, ["Gated, from scratch"])
    needles.run(recipe)
    model = load_causal_lm(recipe.trainings[0].recipe.folder / "model").cpu()
    fitted = needles.fit_reader(recipe, model, texts, tokenizer, seed=0)
    changed = {name for name, old in model.state_dict().items() if not torch.equal(old, fitted.state_dict()[name])}
    assert {name.partition(".")[0] for name in changed} == {"reader", "decoder"}


def test_a_model_that_sees_the_needle_answers_and_one_that_does_not_guesses(tokenizer, texts):
    class Copies:
        """Tells the answer that stands in the row, if `sees` says so."""

        def __init__(self, sees):
            self.sees = sees

        def __call__(self, ids, **options):
            logits = torch.zeros(*ids.shape, 258)
            logits[:, :-1].scatter_(2, ids[:, 1:, None], float(self.sees))
            return type("Output", (), {"logits": logits})

    rows = draw_rows(texts, tokenizer, LENGTH, [1], random.Random(0))
    assert needles.exact_by_distance(Copies(True), rows, 50) == [1.0] * CHUNKS
    assert needles.exact_by_distance(Copies(False), rows, 50) == [0.0] * CHUNKS

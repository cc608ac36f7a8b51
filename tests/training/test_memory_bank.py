# SPDX-License-Identifier: Apache-2.0
"""A bank of memories: questions are parts of texts, a head learns to find these, the decoder tells what is stored."""

import random

import pytest
import torch
import yaml
from helpers.kinds import LENGTH, MOSAIC, VOCAB_SIZE, make_memory_model
from helpers.memory_recipes import SMALL
from helpers.models import make_ids

from training.experiments import memory_bank
from training.experiments.memory_bank import COUNTS, FOUND, PAIRS, WRITTEN, draw_questions, fill_bank, found_by_counts
from training.paths import CONFIGURATION
from training.recipe import load_recipe


def small_recipe(tmp_path, **settings):
    values = yaml.safe_load((CONFIGURATION / "recipe" / "memory_bank.yaml").read_text(encoding="utf-8"))
    values |= {"claims": [], "seeds": [0], "num_tokens": 16, "num_texts": 20, "common": SMALL, "workers": 1}
    values["head"] |= {"steps": 2, "batch_size": 8}
    values["text"] = SMALL["data"]["validation"]
    for stage in [stage for run in values["runs"].values() for stage in run["stages"]]:
        stage["steps"] = 1
    path = tmp_path / "memory_bank.yaml"
    path.write_text(yaml.safe_dump(values | settings, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


def test_a_question_is_a_part_of_its_text():
    ids = make_ids(40, 20, vocab_size=1000)
    questions = draw_questions(ids, 5, random.Random(0))
    for text, question in zip(ids, questions, strict=True):
        assert any(torch.equal(question, text[start : start + 5]) for start in range(16))
    assert (
        len({(text == question[0]).long().argmax().item() for text, question in zip(ids, questions, strict=True)}) > 5
    )


def test_counts_find_what_is_there():
    ids = make_ids(50, 20, vocab_size=30)
    assert found_by_counts(ids, ids, 30, in_pairs=False) == found_by_counts(ids, ids, 30, in_pairs=True) == 1
    shuffled = ids[:, torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert found_by_counts(ids, shuffled, 30, in_pairs=False) == 1
    assert found_by_counts(ids, shuffled, 30, in_pairs=True) < 0.8
    assert found_by_counts(ids, ids, 100_000, in_pairs=True) == 1


def test_a_head_learns_to_find_texts_by_a_part_of_them(tmp_path):
    """An encoder that adds up its tokens loses no word, so that a linear head can find them."""
    recipe = small_recipe(tmp_path, head={"steps": 60, "batch_size": 40, "learning_rate": 0.01, "size": 32})
    model = make_memory_model(encoder=MOSAIC, memory_pooling="mean", encoder_layer=0, dtype=torch.float32)
    bank = fill_bank(model, make_ids(40, 2 * LENGTH, vocab_size=VOCAB_SIZE))
    untrained = small_recipe(tmp_path, head={"steps": 1, "batch_size": 40, "size": 32})
    shares = [
        memory_bank.ask(one, model, memory_bank.train_head(one, model, bank, 0), bank, 1)[FOUND]
        for one in (recipe, untrained)
    ]
    assert shares[0] > 0.6 > 0.3 > shares[1]


def test_the_decoder_tells_what_the_memories_of_the_found_text_hold(monkeypatch):
    model = make_memory_model(dtype=torch.float32)
    bank = fill_bank(model, make_ids(6, 2 * LENGTH, vocab_size=VOCAB_SIZE))

    def reconstruct(objective, text, context):
        assert objective == "autoencoding" and torch.equal(context.memories, bank.memories[found])
        logits = torch.nn.functional.one_hot(text.ids.unflatten(1, (2, LENGTH)), VOCAB_SIZE)
        return logits, None, None

    monkeypatch.setattr(model, "reconstruct", reconstruct)
    found = torch.arange(6)
    assert memory_bank.written_of(model, bank, found) == 1
    found = torch.tensor([1, 0, 2, 3, 4, 5])
    assert 4 / 6 <= memory_bank.written_of(model, bank, found) < 0.8


def test_an_experiment_finds_and_tells_with_every_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(tmp_path)
    result = memory_bank.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    assert result["data"]["text"]["files"]
    for series in result["measured"]["series"]:
        assert all(0 <= series["seeds"][0][name] <= 1 for name in (FOUND, WRITTEN, COUNTS, PAIRS))
    assert memory_bank.run(recipe) == result
    with pytest.raises(ValueError, match="raise text.num_stories, or lower it"):
        memory_bank.run(small_recipe(tmp_path, num_texts=100_000, name="another"))

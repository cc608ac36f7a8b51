# SPDX-License-Identifier: Apache-2.0
"""Short runs of recipes: their settings, interruptions and comparison."""

import json

import torch
from safetensors.torch import load_file

from training.loop import LanguageModelTrainer
from training.paths import CONFIGURATION
from training.recipe import load_recipe


SMOKE = CONFIGURATION / "recipe" / "smoke.yaml"


# 11 steps an epoch, 20 steps in all.
SHORT = [
    "data.train.num_stories=8",
    "data.validation.num_stories=5",
    "tokenizer.vocab_size=300",
    "tokens=5_120",
    "training.per_device_train_batch_size=4",
    "training.logging_steps=2",
    "training.eval_steps=10",
    "training.save_steps=5",
    "training.save_total_limit=10",
    "training.disable_tqdm=true",
    "generation.prompts=[]",
]


def short_recipe(folder, *overrides, model="mosaic-smoke"):
    return load_recipe(SMOKE, [f"model={model}", *SHORT, f"output_dir={folder}", *overrides])


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(one, other):
    """Bitwise: weights, and all losses that were ever logged."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (one, other)]
    assert results[0]["learning_curve"] == results[1]["learning_curve"]
    assert results[0]["metrics"] == results[1]["metrics"]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    original, done = LanguageModelTrainer.training_step, []

    def training_step(self, *arguments, **options):
        if len(done) == steps:
            raise Interrupted
        done.append(None)
        return original(self, *arguments, **options)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", training_step)

# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by a recipe: the adapter on its base is the merged model, and a stopped run ends with the same bits."""

import math

import pytest
import torch
from helpers.models import make_ids, make_model
from helpers.runs import Interrupted, interrupt_after
from peft import PeftModel
from safetensors.torch import load_file

from training.evaluate import evaluate_folder, load_causal_lm
from training.export import export_model
from training.paths import CONFIGURATION
from training.recipe import SourceSection, load_recipe
from training.tables import fine_tuning_table
from training.tasks import fine_tuning, language_modeling
from training.text.tokenizer import train_tokenizer


VALIDATION = {"source": "embedded", "split": "validation", "num_stories": 4}
SHORT = {
    "data": {"context_length": 32, "train": {"source": "embedded", "num_stories": 20}, "validation": VALIDATION},
    "tokens": 6 * 4 * 32,
    "training": {
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
        "disable_tqdm": True,
    },
    "generation": {"prompts": []},
}


@pytest.fixture(autouse=True)
def without_clean_process(monkeypatch):
    """`test_publish.py` has it."""
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)


@pytest.fixture
def base(tmp_path):
    tokenizer = train_tokenizer(["Once upon a time there was a cat. One day, a little ball."] * 3, vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    export_model(make_model(vocab_size=300, max_position_embeddings=64, **ids), tokenizer, tmp_path / "base")
    return tmp_path / "base"


def read(base, folder, **settings):
    settings = [SHORT, {"model": str(base), "base": None, "output_dir": str(folder)}, settings]
    return load_recipe(CONFIGURATION / "recipe" / "shakespeare_lora.yaml", settings=settings)


def test_the_adapter_on_its_base_is_the_merged_model(base, tmp_path):
    before = load_file(base / "model.safetensors")
    result = fine_tuning.run(read(base, tmp_path / "run"))
    adapted = PeftModel.from_pretrained(load_causal_lm(base), tmp_path / "run" / "adapter").eval()
    merged, ids = load_causal_lm(tmp_path / "run" / "merged"), make_ids(2, 12)
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(merged(ids).logits, load_causal_lm(base)(ids).logits, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(base / "model.safetensors").items())
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert result["trained_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert result["metrics"]["validation_loss"] < result["base"]["metrics"]["validation_loss"]


def test_losses_are_those_of_the_folders(base, tmp_path):
    result = fine_tuning.run(read(base, tmp_path / "run"))
    source = SourceSection(**VALIDATION)
    for folder, reported in ((base, result["base"]), (tmp_path / "run" / "merged", result)):
        measured = evaluate_folder(folder, source, context_length=32)["loss"]
        assert reported["metrics"]["validation_loss"] == pytest.approx(measured, rel=1e-6)
        assert reported["metrics"]["validation_perplexity"] == pytest.approx(math.exp(measured), rel=1e-5)


def test_a_parameter_that_the_base_lacks_is_refused(base, tmp_path):
    recipe = read(base, tmp_path / "run", lora={"target_parameters": ["persistent_memory.slots"]})
    with pytest.raises(ValueError, match="'persistent_memory.slots', which .* has no parameter of"):
        fine_tuning.run(recipe)


def test_a_stopped_adaptation_resumes_with_the_same_bits(base, tmp_path, monkeypatch):
    dropped = {"lora_dropout": 0.1, "target_parameters": []}
    recipes = [read(base, tmp_path / name, lora=dropped) for name in ("straight", "stopped")]
    fine_tuning.run(recipes[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 5)
        fine_tuning.run(recipes[1])
    fine_tuning.run(recipes[1])
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        straight, resumed = (load_file(recipe.folder / name) for recipe in recipes)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_another_base_is_another_run(base, tmp_path):
    recipe = read(base, tmp_path / "run")
    fine_tuning.run(recipe)
    hash_before = recipe.hash
    make_model(seed=1, vocab_size=300, max_position_embeddings=64).save_pretrained(base)
    again = read(base, tmp_path / "run")
    assert again.hash != hash_before
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        fine_tuning.run(again)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "someone/stories"},
            "'someone/stories': name an exported folder, or one on the Hub as USER/NAME@COMMIT",
        ),
        ({"model": "runs/nothing"}, "'runs/nothing': name an exported folder"),
        ({"model_args": {"hidden_size": 8}}, "the base has its architecture: leave it out"),
        ({"tokenizer": {"vocab_size": 300}}, "unknown key 'tokenizer"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"lora_dropout": 0.1}}, "PEFT adapts parameters without dropout only"),
        ({"data": {"context_length": 128}}, "`data.context_length` is 128"),
    ],
    ids=["not-pinned", "nowhere", "architecture", "tokenizer", "no-target", "dropout", "too-long"],
)
def test_what_a_base_decides_is_not_for_the_recipe(base, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        read(base, tmp_path / "run", **settings)


def test_a_table_puts_seeds_together_and_bases_apart(base):
    def result(seed, loss, targets, weights="a"):
        metrics = {"validation_loss": loss, "validation_perplexity": math.exp(loss)}
        lora = {"r": 8, "target_modules": ["k_proj"], "target_parameters": targets}
        origin = {"name": "base", "weights": weights, "metrics": of_base}
        return {
            "seed": seed,
            "recipe": {"lora": lora},
            "trained_parameters": 1000 + len(targets),
            "metrics": metrics,
            "base": origin,
        }

    of_base = {"validation_loss": 3.0, "validation_perplexity": 20.0}
    slots = ["persistent_memory.slot_keys"]
    table = fine_tuning_table([result(0, 2.0, []), result(0, 1.0, slots), result(1, 2.5, [])])
    assert table.splitlines()[2:] == [
        "| the base | 0 |  | 3.0000 | 20.00 |",
        "| LoRA of rank 8 on k_proj | 1,000 | 0, 1 | 2.2500 ± 0.3536 | 9.79 ± 3.39 |",
        "| LoRA of rank 8 on k_proj, slot_keys | 1,001 | 0 | 1.0000 | 2.72 |",
    ]
    with pytest.raises(ValueError, match="of several"):
        fine_tuning_table([result(0, 2.0, []), result(0, 2.0, [], weights="b")])

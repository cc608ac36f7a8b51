# SPDX-License-Identifier: Apache-2.0
"""The life of a run: it learns, resumes exactly, loses nothing, and its export is what it says."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import accelerate.accelerator
import pytest
import torch
from helpers.payload import PACKAGE, PAYLOAD
from helpers.runs import (
    SHORT,
    SMOKE,
    Interrupted,
    assert_same_run,
    interrupt_after,
    short_recipe,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, set_seed

from training import loop
from training.commands.texts import continue_texts
from training.evaluate import evaluate_folder, load_model
from training.export import export_model, verify_export
from training.files import CHECKSUMS, faults, staged_folder, write_text
from training.loop import LanguageModelTrainer
from training.paths import CONFIGURATION
from training.recipe import SourceSection, load_recipe
from training.result import read_result
from training.run_folder import only_run_in
from training.tables import results_table
from training.tasks import language_modeling
from training.text.sources import load_stories
from training.text.story_writer import write_stories
from training.text.tokenizer import load_tokenizer, train_tokenizer
from training.text.windows import collate_windows, pack_windows


CLONE = CONFIGURATION.parent
MODELS = ["mosaic-smoke", "gpt2-smoke"]
DROPOUT = {
    "mosaic-smoke": ["model_args.hidden_dropout=0.1", "model_args.attention_dropout=0.1"],
    "gpt2-smoke": ["model_args.resid_pdrop=0.1", "model_args.attn_pdrop=0.1", "model_args.embd_pdrop=0.1"],
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are faster so, and share the machine with the processes that some tests start."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# What a run learns


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_moves_and_the_loss_falls(model, tmp_path, without_clean_process):
    recipe = short_recipe(tmp_path / "run", "training.learning_rate=1e-2", model=model)
    result = language_modeling.run(recipe)
    trained, tokenizer = load_model(recipe.folder / "model")
    initial = language_modeling.build_model(recipe, tokenizer)
    assert all(parameter.requires_grad for parameter in initial.parameters())
    for (name, before), after in zip(initial.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(before, after), name
    curve = result["learning_curve"]
    assert curve["training"][-1]["loss"] < curve["training"][0]["loss"] - 0.1
    assert curve["validation"][-1]["loss"] < curve["validation"][0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_accumulated_gradients_equal_the_large_batch(model, tmp_path, without_clean_process):
    large, small = tmp_path / "large", tmp_path / "small"
    language_modeling.run(short_recipe(large, model=model))
    sizes = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    language_modeling.run(short_recipe(small, *sizes, model=model))
    first, second = weights(large), weights(small)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)


def test_models_see_the_same_batches(tmp_path, monkeypatch, without_clean_process):
    seen = []

    def recording(rows):
        batch = collate_windows(rows)
        seen[-1].append(hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest())
        return batch

    monkeypatch.setattr(language_modeling, "collate_windows", recording)
    for model in MODELS:
        seen.append([])
        language_modeling.run(short_recipe(tmp_path / model, model=model))
    seen.append([])
    language_modeling.run(short_recipe(tmp_path / "other", "seed=1"))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_only_matrices_decay():
    recipe = load_recipe(SMOKE, [*SHORT, "training.eval_strategy=no"])
    model = language_modeling.build_model(recipe, train_tokenizer(["once upon a time"] * 9, 260))
    trainer = LanguageModelTrainer(
        model=model, args=language_modeling.training_arguments(recipe), data_collator=collate_windows
    )
    decayed = set(trainer.get_decay_parameter_names(model))
    others = {name.rpartition(".")[2] for name, _ in model.named_parameters() if name not in decayed}
    assert {"key_leak", "key_scale", "value_scale", "value_mix"} <= others
    assert all(model.get_parameter(name).dim() >= 2 for name in decayed)
    assert any(name.endswith("slot_keys") for name in decayed)


# Stopping and going on


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bitwise(model, accumulation, tmp_path, monkeypatch, without_clean_process):
    batch = [
        f"training.per_device_train_batch_size={4 // accumulation}",
        f"training.gradient_accumulation_steps={accumulation}",
    ]
    recipes = [short_recipe(tmp_path / name, *batch, *DROPOUT[model], model=model) for name in ("straight", "stopped")]
    language_modeling.run(recipes[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 17 * accumulation)
        language_modeling.run(recipes[1])
    assert sorted(path.name for path in recipes[1].folder.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-15",
        "checkpoint-5",
    ]
    state = json.loads((recipes[1].folder / "checkpoint-15" / "trainer_state.json").read_text(encoding="utf-8"))
    assert 1.1 < state["epoch"] < 1.9
    language_modeling.run(recipes[1])
    assert_same_run(recipes[0].folder, recipes[1].folder)


def test_resume_of_a_stream_is_bitwise(tmp_path, monkeypatch, without_clean_process):
    recipes = [short_recipe(tmp_path / name, "data.streaming=true") for name in ("straight", "stopped")]
    language_modeling.run(recipes[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 17)
        language_modeling.run(recipes[1])
    language_modeling.run(recipes[1])
    assert_same_run(recipes[0].folder, recipes[1].folder)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "repeated"), [(8, False), (18, True)])
def test_resume_of_a_stream_of_files_is_bitwise(stop, repeated, tmp_path, monkeypatch, without_clean_process):
    """Stopped in the middle of the second file, in the first pass over the corpus and in the second."""
    (tmp_path / "stories").mkdir()
    for index, count in enumerate([2, 3, 2]):
        (tmp_path / "stories" / f"{index}.txt").write_text("<|endoftext|>".join(write_stories(count, seed=index)))
    source = [f"data.train.source={tmp_path / 'stories'}", "data.train.num_stories=null", "data.streaming=true"]
    recipes = [short_recipe(tmp_path / name, *source) for name in ("straight", "stopped")]
    language_modeling.run(recipes[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, stop)
        language_modeling.run(recipes[1])
    tokenizer = AutoTokenizer.from_pretrained(recipes[1].folder / "tokenizer")
    paths = sorted((tmp_path / "stories").iterdir())
    first, second, whole = (
        len(pack_windows(load_stories(str(source)), tokenizer, 64)) for source in (paths[0], paths[1], paths[0].parent)
    )
    passes, seen = divmod(4 * (stop - stop % 5), whole)  # windows before the newest checkpoint
    assert passes == repeated and first + 1 < seen < first + second
    language_modeling.run(recipes[1])
    assert_same_run(recipes[0].folder, recipes[1].folder)


def test_finished_run_is_shown_again_and_completed_if_cut_short(tmp_path, monkeypatch, without_clean_process):
    recipe = short_recipe(tmp_path / "run")
    result = language_modeling.run(recipe)
    trained = weights(recipe.folder)
    interrupt_after(monkeypatch, 0)  # from here on, nothing may be trained
    assert language_modeling.run(recipe) == result
    shutil.rmtree(recipe.folder / "model")
    (recipe.folder / "result.json").unlink()
    again = language_modeling.run(recipe)
    assert (again["metrics"], again["steps"]) == (result["metrics"], 20)
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(recipe.folder).items())


# Runs in a process of its own, so that it can be killed or meet a full disk at the second save.
SAVING_GOES_WRONG = """
import os, resource, signal, sys
from training.loop import LanguageModelTrainer
from training.__main__ import app

original = LanguageModelTrainer._save_optimizer_and_scheduler

def save(self, folder):
    if self.state.global_step == 10:
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    original(self, folder)

LanguageModelTrainer._save_optimizer_and_scheduler = save
app(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("kill", -signal.SIGKILL), ("full disk", 1)])
def test_saving_goes_wrong(fault, code, tmp_path, without_clean_process):
    straight, broken = short_recipe(tmp_path / "straight"), short_recipe(tmp_path / "broken")
    language_modeling.run(straight)
    (tmp_path / "recipe.yaml").write_text(broken.to_yaml(), encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-c", SAVING_GOES_WRONG, fault, "run", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        cwd=CLONE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == code, process.stderr
    assert [path.name for path in broken.folder.glob("checkpoint-*")] == ["checkpoint-5"]
    leftovers = list(broken.folder.glob(".incomplete-*"))
    if fault == "kill":
        assert leftovers
    else:
        assert not leftovers
        assert "cannot save" in process.stderr and "resumes from checkpoint-5" in process.stderr
        assert "Traceback" not in process.stderr
    language_modeling.run(broken)
    assert not list(broken.folder.glob(".incomplete-*"))
    assert_same_run(straight.folder, broken.folder)


def test_damaged_checkpoints(tmp_path, caplog, without_clean_process):
    recipe = short_recipe(tmp_path / "run")
    language_modeling.run(recipe)
    trained = weights(recipe.folder)
    (recipe.folder / "result.json").unlink()
    os.truncate(recipe.folder / "checkpoint-20" / "model.safetensors", 1000)
    (recipe.folder / "checkpoint-15" / "trainer_state.json").unlink()
    language_modeling.run(recipe)
    assert "checkpoint-20 is damaged (model.safetensors has changed since it was written)" in caplog.text
    assert "checkpoint-15 is damaged (trainer_state.json is missing)" in caplog.text
    assert "continuing from checkpoint-10" in caplog.text
    assert (recipe.folder / "broken-checkpoint-20").is_dir()
    assert not faults(recipe.folder / "checkpoint-20")
    assert all(torch.equal(trained[name], tensor) for name, tensor in weights(recipe.folder).items())


def test_no_checkpoint_left(tmp_path, without_clean_process):
    recipe = short_recipe(tmp_path / "run", "tokens=1_280")
    language_modeling.run(recipe)
    (recipe.folder / "result.json").unlink()
    (recipe.folder / "checkpoint-5" / CHECKSUMS).unlink()
    for _ in range(2):  # and it is still refused the second time
        with pytest.raises(ValueError, match="no checkpoint in .* is complete .*--restart"):
            language_modeling.run(recipe)
    language_modeling.run(recipe, restart=True)
    assert [path.name for path in tmp_path.glob("run.*/checkpoint-5")] == ["checkpoint-5"]


def test_another_recipe_in_a_used_folder(tmp_path, monkeypatch, without_clean_process):
    language_modeling.run(short_recipe(tmp_path / "run", "tokens=1_280"))
    with pytest.raises(ValueError, match=r"recipe.seed was 0, is 1.*another output_dir.*--restart"):
        language_modeling.run(short_recipe(tmp_path / "run", "tokens=1_280", "seed=1"))
    identity = language_modeling._identity
    monkeypatch.setattr(language_modeling, "_identity", lambda *arguments: identity(*arguments) | {"num_processes": 2})
    with pytest.raises(ValueError, match="a run of 1 processes, not 2"):
        language_modeling.run(short_recipe(tmp_path / "run", "tokens=1_280"))
    (tmp_path / "run" / "run.json").unlink()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for restart in (False, True):
        with pytest.raises(ValueError, match="is not the folder of a run"):
            language_modeling.run(short_recipe(tmp_path / "run", "tokens=1_280"), restart=restart)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_other_data_in_a_used_folder(tmp_path, without_clean_process):
    stories = tmp_path / "stories.jsonl"
    stories.write_text("".join(json.dumps({"text": f"Story {n} of a cat. " * 20}) + "\n" for n in range(40)))
    recipe = [f"data.train.source={stories}", "data.train.num_stories=null", "tokens=1_280"]
    language_modeling.run(short_recipe(tmp_path / "run", *recipe))
    stories.write_text(stories.read_text().replace("cat", "dog"))
    with pytest.raises(ValueError, match=r"data.train.files.*was.*other|other data.*data.train.files"):
        language_modeling.run(short_recipe(tmp_path / "run", *recipe))


def test_a_run_that_is_going_on_is_left_alone(tmp_path):
    state = language_modeling.PartialState()
    with only_run_in(tmp_path / "run", state):
        with pytest.raises(ValueError, match="a run is going on"):
            language_modeling.run(short_recipe(tmp_path / "run", "tokens=1_280"))


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path, monkeypatch, without_clean_process):
    seen = []
    original = loop.move_into_place

    def recording(staged, final):
        seen.append(sorted(path.name for path in final.parent.glob("checkpoint-*")))
        original(staged, final)

    monkeypatch.setattr(loop, "move_into_place", recording)
    recipe = short_recipe(tmp_path / "run", "training.save_total_limit=1")
    language_modeling.run(recipe)
    assert seen == [[], ["checkpoint-5"], ["checkpoint-10"], ["checkpoint-15"]]
    assert [path.name for path in recipe.folder.glob("checkpoint-*")] == ["checkpoint-20"]


# Bad input


def test_empty_and_short_corpora(tmp_path):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="empty corpus"):
        language_modeling.run(short_recipe(tmp_path / "a", f"data.train.source={tmp_path / 'empty.jsonl'}"))
    (tmp_path / "one.jsonl").write_text('{"text": "a b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="too few for one window"):
        language_modeling.run(short_recipe(tmp_path / "b", f"data.validation.source={tmp_path / 'one.jsonl'}"))
    with pytest.raises(ValueError, match="one optimizer step takes 1000: give more stories, or lower the batch"):
        language_modeling.run(short_recipe(tmp_path / "c", "training.per_device_train_batch_size=1000"))


def test_tokenizer_larger_than_the_vocabulary(tmp_path):
    train_tokenizer(["once upon a time there was a little cat"] * 9, 280).save_pretrained(tmp_path / "tokenizer")
    overrides = ["tokenizer.vocab_size=null", "tokenizer.max_training_stories=null", "model_args.vocab_size=270"]
    with pytest.raises(ValueError, match=r"280 entries, but the model 'mosaic-smoke' has embeddings for 270"):
        language_modeling.run(
            short_recipe(tmp_path / "run", *overrides, f"tokenizer.pretrained={tmp_path / 'tokenizer'}")
        )


def test_diverged_loss_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match="lower training.learning_rate"):
        language_modeling.run(
            short_recipe(tmp_path / "run", "training.learning_rate=1e38", "training.max_grad_norm=0")
        )


def test_best_model_at_end_is_refused():
    recipe = load_recipe(SMOKE, [*SHORT, "training.eval_strategy=no"])
    arguments = language_modeling.training_arguments(recipe)
    arguments.load_best_model_at_end, arguments.metric_for_best_model = True, "loss"
    model = language_modeling.build_model(recipe, train_tokenizer(["once upon a time"] * 9, 260))
    with pytest.raises(ValueError, match="load_best_model_at_end=True is not supported"):
        LanguageModelTrainer(model=model, args=arguments, data_collator=collate_windows)


# What a run leaves


def test_export_of_a_run(tmp_path):
    """The whole life with its last check, and every way of using what it leaves."""
    recipe = short_recipe(tmp_path / "run", "generation.prompts=[Once,Once]", "generation.max_new_tokens=4")
    result = language_modeling.run(recipe)
    assert [sample["prompt"] for sample in result["samples"]] == ["Once", "Once"]
    assert all(sample["text"].startswith("Once") for sample in result["samples"])
    payload = {name: (PACKAGE / name).read_bytes() for name in PAYLOAD}
    assert not any(name.startswith(("naive_", "retrieval_")) or "continuous" in name for name in payload)
    for folder in (recipe.folder / "model", recipe.folder / "checkpoint-20"):
        code = {path.name: path.read_bytes() for path in folder.glob("*.py")}
        assert code == payload
    config = json.loads((recipe.folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["use_cache"] is True
    assert config["auto_map"] == {
        "AutoConfig": "configuration_memory_mosaic.MemoryMosaicConfig",
        "AutoModel": "modeling_memory_mosaic.MemoryMosaicModel",
        "AutoModelForCausalLM": "modeling_memory_mosaic.MemoryMosaicForCausalLM",
        "AutoModelForDecision": "modeling_memory_mosaic.MemoryMosaicForCausalLM",
        "AutoModelForSequenceClassification": "modeling_memory_mosaic.MemoryMosaicForSequenceClassification",
    }
    assert verify_export(recipe.folder / "checkpoint-20", ["Once"], max_new_tokens=2)[0].startswith("Once")
    source = SourceSection(source="embedded", split="validation", num_stories=5)
    measured = evaluate_folder(recipe.folder / "model", source, batch_size=3)
    assert measured["loss"] == pytest.approx(result["metrics"]["validation_loss"], rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(result["metrics"]["validation_bits_per_byte"], rel=1e-5)


def test_special_tokens_agree_in_all_files_of_an_export(tmp_path):
    recipe = load_recipe(SMOKE, SHORT)
    tokenizer = train_tokenizer(["once upon a time"] * 9, 260)
    export_model(language_modeling.build_model(recipe, tokenizer), tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert len(saved) <= config["vocab_size"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(saved, name) is not None
        assert config[name] == generation[name] == getattr(saved, name)
    assert saved.pad_token_id != saved.eos_token_id


@pytest.mark.slow
def test_verify_export_catches_other_weights_and_broken_code(tmp_path):
    recipe = load_recipe(SMOKE, SHORT)
    tokenizer = train_tokenizer(["once upon a time"] * 9, 260)
    model = language_modeling.build_model(recipe, tokenizer)
    export_model(model, tokenizer, tmp_path / "model")
    set_seed(1)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(RuntimeError, match="computes other logits"):
        verify_export(tmp_path / "model", [], model=model)
    with (tmp_path / "model" / "modeling_memory_mosaic.py").open("a", encoding="utf-8") as file:
        file.write("\nimport a_package_that_nobody_has\n")
    with pytest.raises(RuntimeError, match="a_package_that_nobody_has"):
        verify_export(tmp_path / "model", [], model=model)


def test_failed_export_leaves_the_earlier_one(tmp_path):
    with staged_folder(tmp_path / "model") as staged:
        (staged / "weights").write_text("good", encoding="utf-8")
    with pytest.raises(OSError), staged_folder(tmp_path / "model") as staged:
        (staged / "weights").write_text("half", encoding="utf-8")
        raise OSError("no space left on device")
    assert (tmp_path / "model" / "weights").read_text(encoding="utf-8") == "good"
    write_text(tmp_path / "note", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "note"]


def test_damaged_folders_are_named(tmp_path):
    recipe = load_recipe(SMOKE, SHORT)
    tokenizer = train_tokenizer(["once upon a time"] * 9, 260)
    export_model(language_modeling.build_model(recipe, tokenizer), tokenizer, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    first, again = (continue_texts(*loaded, ["once"], seed=3, max_new_tokens=4) for _ in range(2))
    assert first == again
    with pytest.raises(ValueError, match="a prompt is empty"):
        continue_texts(*loaded, [""])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config.json"):
        load_model(tmp_path / "empty")
    assert load_model(tmp_path)[0].config.to_dict() == load_model(tmp_path / "model")[0].config.to_dict()
    os.truncate(tmp_path / "model" / "model.safetensors", 5000)
    with pytest.raises(ValueError, match="damaged"):
        load_model(tmp_path / "model")


def test_result_and_its_tables(tmp_path, without_clean_process):
    recipe = short_recipe(tmp_path / "run")
    result = language_modeling.run(recipe)
    assert result == json.loads((recipe.folder / "result.json").read_text(encoding="utf-8"))
    assert (recipe.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (result["tokens"], result["steps"], result["recipe_hash"]) == (5120, 20, recipe.hash)
    assert result["parameters"] == sum(tensor.numel() for tensor in weights(recipe.folder).values())
    assert result["versions"]["torch"] == torch.__version__ and result["hardware"]["cores"] == os.cpu_count()
    assert result["data"]["train"]["files"] and str(Path.home()) not in json.dumps(result["data"])
    metrics = result["metrics"]
    assert metrics["validation_perplexity"] == pytest.approx(math.exp(metrics["validation_loss"]))
    assert [point["step"] for point in result["learning_curve"]["validation"]] == [10, 20]

    other = result | {"seed": 1, "metrics": metrics | {"validation_loss": metrics["validation_loss"] + 0.02}}
    table = results_table([other, result])
    assert f"| mosaic-smoke | {result['parameters']:,} | 0, 1 | 5,120 |" in table
    assert f"{metrics['validation_loss'] + 0.01:.4f} ± 0.0141" in table
    with pytest.raises(ValueError, match="one recipe"):
        results_table([result, result | {"name": "other"}])


def test_tensorboard_on_request(tmp_path, without_clean_process):
    recipe = short_recipe(tmp_path / "run", "training.report_to=tensorboard", "tokens=1_280")
    language_modeling.run(recipe)
    events = EventAccumulator(str(next(recipe.folder.rglob("events.out.tfevents.*")).parent)).Reload()
    losses = [event.value for event in events.Scalars("eval/loss")]
    curve = read_result(recipe.folder)["learning_curve"]["validation"]
    assert losses == pytest.approx([point["loss"] for point in curve])


def test_a_recipe_reports_to_several_places(tmp_path):
    """The README's setting; W&B itself is not installed here."""
    recipe = short_recipe(tmp_path / "run", "training.report_to=[tensorboard,wandb]")
    assert language_modeling.training_arguments(recipe).report_to == ["tensorboard", "wandb"]


def test_a_chunked_loss_trains_as_the_whole_one_does(tmp_path, without_clean_process):
    runs = [short_recipe(tmp_path / name, *more) for name, more in (("whole", []), ("parts", ["chunked_loss=true"]))]
    assert runs[0].content().keys() == runs[1].content().keys() - {"chunked_loss"}
    losses = [language_modeling.run(recipe)["metrics"]["validation_loss"] for recipe in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_chunked_loss_of_another_model_is_refused(tmp_path, without_clean_process):
    with pytest.raises(ValueError, match="chunked_loss: GPT2LMHeadModel"):
        language_modeling.run(short_recipe(tmp_path / "run", "chunked_loss=true", model="gpt2-smoke"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own compiler reads it
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_compiled_training_resumes_and_exports_the_same_names(
    backend, by_layer, tmp_path, monkeypatch, without_clean_process
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(by_layer))
    compiled_by_layer = Mock(wraps=accelerate.accelerator.compile_regions)
    monkeypatch.setattr(accelerate.accelerator, "compile_regions", compiled_by_layer)
    compiled = ["training.torch_compile=true", f"training.torch_compile_backend={backend}"]
    recipes = [short_recipe(tmp_path / name, *compiled) for name in ("straight", "stopped")]
    language_modeling.run(recipes[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_after(patch, 17)
        language_modeling.run(recipes[1])
    language_modeling.run(recipes[1])
    assert_same_run(recipes[0].folder, recipes[1].folder)
    plain = short_recipe(tmp_path / "plain")
    result = language_modeling.run(plain)
    of_plain, of_compiled = weights(plain.folder), weights(recipes[0].folder)
    assert of_plain.keys() == of_compiled.keys()
    assert compiled_by_layer.called == by_layer
    loss = json.loads((recipes[0].folder / "result.json").read_text(encoding="utf-8"))["metrics"]["validation_loss"]
    assert loss == pytest.approx(result["metrics"]["validation_loss"], rel=1e-3)


@pytest.mark.slow
def test_mixed_precision_exports_the_plain_model(tmp_path):
    """The clean process computes in float32: so must the model whose logits and loss it is held against."""
    recipe = short_recipe(tmp_path / "run", "training.bf16=true")
    result = language_modeling.run(recipe)
    model, _ = load_model(tmp_path / "run" / "model")
    validation = load_stories(**recipe.data.validation.model_dump())
    windows = pack_windows(validation, load_tokenizer(str(tmp_path / "run" / "tokenizer")), recipe.data.context_length)
    loss = language_modeling.mean_loss(model, windows, recipe.training.per_device_eval_batch_size)
    assert result["metrics"]["validation_loss"] == pytest.approx(loss, rel=1e-6)
    assert result["precision"] == "bf16"

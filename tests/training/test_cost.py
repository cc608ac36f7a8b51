# SPDX-License-Identifier: Apache-2.0
"""What training costs: counts agree with formulas and real tensors, estimates with arithmetic, logs with clocks."""

import json
import re
import time

import psutil
import pytest
import torch
from helpers.models import read_without_blocks
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from training.__main__ import app
from training.cost import (
    activation_bytes,
    flops_per_token,
    hours,
    interleaved_seconds,
    measured_teraflops,
    new_model,
    peak_memory_bytes,
    saved_bytes,
    training_step_seconds,
)
from training.loop import LanguageModelTrainer
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.result import tokens_per_second
from training.tasks import language_modeling, symbols


SMOKE = CONFIGURATION / "recipe" / "smoke.yaml"
PAPER = CONFIGURATION / "recipe" / "babistories_paper.yaml"
# 5 steps of 256 tokens.
SHORT = [
    "data.train.num_stories=8",
    "data.validation.num_stories=5",
    "tokenizer.vocab_size=300",
    "tokens=1_280",
    "training.per_device_train_batch_size=4",
    "training.logging_steps=1",
    "training.eval_steps=5",
    "training.save_steps=5",
    "training.disable_tqdm=true",
    "generation.prompts=[]",
]
MODELS = sorted((CONFIGURATION / "model").glob("*.json"))
# Without memory models, whose windows `memory_model` counts in stages.
SMALL_MODELS = [path for path in MODELS if not re.search("paper|large|small|hub|memory", path.stem)]
LANGUAGES = ["regbench", "induction", "recall", "suite_classes", "suite_mad", "suite_mqar", "suite_needles"]
WITHOUT_DROPOUT = [
    "mosaic-tiny",
    "gpt2-tiny",
    "rope-micro",
    "alibi-micro",
    "llama-micro",
    "rope-shift-micro",
    "parts-separate-query-micro",
]


@pytest.fixture
def without_clean_process(monkeypatch):
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)


def configuration(model, **changes):
    return AutoConfig.from_pretrained(CONFIGURATION / "model" / f"{model}.json", **changes)


def training_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    model.loss_type = "ForCausalLM"
    return model


def run(folder, *overrides):
    return language_modeling.run(load_recipe(SMOKE, [*SHORT, *overrides, f"output_dir={folder}"]))


# Operations


@pytest.mark.parametrize("context_length", [64, 512])
def test_operations_of_gpt2_are_those_of_the_formula(context_length):
    config = configuration("gpt2-paper")
    width, layers = config.n_embd, config.n_layer
    weights = 12 * width**2 * layers + config.vocab_size * width
    attention = 4 * context_length * width * layers  # scores and weighted values, the masked half too
    assert flops_per_token(config, context_length) == pytest.approx(3 * (2 * weights + attention), rel=1e-6)


@pytest.mark.parametrize("context_length", [64, 512])
def test_operations_of_the_mosaic_are_those_of_the_formula(context_length):
    config = configuration("mosaic-paper")
    width, layers, slots = config.hidden_size, config.num_hidden_layers, config.num_persistent_slots
    weights = 5 * width**2 * layers + config.vocab_size * width
    retrieval = 4 * (context_length + slots) * width * layers
    leaky_sums = 2 * 2 * 32 * width * layers  # of both memories, within chunks of 32; between them it is little
    expected = 3 * (2 * weights + retrieval + leaky_sums)
    assert flops_per_token(config, context_length) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("model", "mlp_matrices"), [("rope-micro", 2), ("rope-shift-micro", 2), ("llama-micro", 3)])
def test_operations_of_rotary_transformers_are_those_of_the_formula(model, mlp_matrices):
    """The shift of keys and values is no matrix product, and so costs nothing in these units."""
    config = configuration(model)
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = (4 * width**2 + mlp_matrices * width * config.intermediate_size) * layers + config.vocab_size * width
    attention = 4 * 256 * width * layers
    assert flops_per_token(config, 256) == pytest.approx(3 * (2 * weights + attention), rel=1e-3)


def test_operations_of_a_mosaic_with_separate_queries_are_those_of_the_mosaic_and_of_their_sums():
    """A projection takes the place of slots that cost as much. The leaky sum of queries, by chunks of 32, is added."""
    mosaic, parts = configuration("mosaic-micro"), configuration("parts-separate-query-micro")
    sums = 3 * 2 * 32 * mosaic.hidden_size * mosaic.num_hidden_layers
    more = flops_per_token(parts, 256) - flops_per_token(mosaic, 256)
    assert more == pytest.approx(sums, rel=0.1)


def test_attention_is_counted_whatever_kernel_computes_it():
    """Twice the context: more operations per token, for each architecture, by the attention over so many more."""
    for model in WITHOUT_DROPOUT:
        config = configuration(model, num_hidden_layers=1)
        more = flops_per_token(config, 128) - flops_per_token(config, 64)
        assert more == pytest.approx(3 * 4 * 64 * config.hidden_size * config.num_hidden_layers, rel=0.05), model


# Memory


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Mosaics read by sdpa: estimates are for any device, and blocks of a CPU keep a little less."""
    read_without_blocks(monkeypatch)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", WITHOUT_DROPOUT)
def test_kept_bytes_are_those_of_real_tensors(model, precision, as_on_a_gpu):
    config = configuration(model)
    ids = torch.randint(0, config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    assert activation_bytes(config, 2, 64, precision) == saved_bytes(training_model(config), ids, precision)


@pytest.mark.parametrize("model", ["mosaic-tiny", "gpt2-tiny"])
def test_kept_bytes_are_what_the_allocator_holds(model, as_on_a_gpu):
    """Counted otherwise: what the profiler sees allocated in a forward pass and not freed after it."""
    config = configuration(model)
    real, ids = training_model(config), torch.zeros(2, 128, dtype=torch.long)
    real(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = real(input_ids=ids, labels=ids, use_cache=False)
    held = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    assert output.loss.requires_grad
    # The logits are held by the output as well, and the backward pass needs them only as probabilities.
    held -= output.logits.untyped_storage().nbytes()
    assert activation_bytes(config, 2, 128) == pytest.approx(held, rel=0.03)


def test_kept_bytes_grow_with_the_batch_and_shrink_by_checkpointing():
    config = configuration("mosaic-tiny")
    one, two = (activation_bytes(config, batch_size, 256) for batch_size in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.05)
    model, ids = training_model(config), torch.zeros(2, 256, dtype=torch.long)
    model.activation_checkpointing_enable()
    inputs = saved_bytes(model, ids)
    checkpointed = activation_bytes(config, 2, 256, checkpointing=True)
    assert checkpointed == inputs + (two - inputs) // config.num_hidden_layers < 0.7 * two
    every_other = activation_bytes(config, 2, 256, checkpointing=True, checkpointing_kwargs={"every_n_layers": 2})
    assert checkpointed < every_other < two


@pytest.mark.parametrize("model", ["mosaic-tiny", "gpt2-tiny"])
def test_dropout_keeps_a_byte_a_number_and_no_weights(model):
    names = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    if model == "gpt2-tiny":
        names = {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    config, plain = configuration(model, **names), configuration(model)
    masks = 2 * config.num_hidden_layers * 2 * 64 * config.hidden_size
    assert activation_bytes(config, 2, 64) - activation_bytes(plain, 2, 64) == masks


# Estimates


@pytest.mark.parametrize("path", SMALL_MODELS, ids=lambda path: path.stem)
def test_all_matrices_of_all_models_are_counted(path):
    """A token is multiplied by each matrix but tables of embeddings, forward and twice backward.

    The matrix of a compressor's state, 3 % of its numbers, is used once for each text.
    """
    config = AutoConfig.for_model(**json.loads(path.read_text(encoding="utf-8")))
    model = new_model(config)
    tables = {part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    matrices = [
        part for part in model.parameters() if min(part.shape[-2:]) > 1 and part.ndim > 1 and part not in tables
    ]
    assert flops_per_token(config, 32) >= 0.97 * 6 * sum(part.numel() for part in matrices)


def test_hours_are_arithmetic():
    assert hours(3.6e18, teraflops=100, utilisation=0.5, devices=2) == pytest.approx(10)
    for wrong, remedy in (
        ({"teraflops": 0}, "give the peak rate of one device"),
        ({"teraflops": 1, "utilisation": 40}, "a share of the peak above 0 and at most 1"),
        ({"teraflops": 1, "devices": 0}, "give the number of devices"),
    ):
        with pytest.raises(ValueError, match=remedy):
            hours(1e18, **wrong)


def test_plan_of_the_paper_for_a_machine_of_eight():
    """44 passes in 80,000 steps of 512 windows; the mosaic's sizes are those that the authors' code counts."""
    recipe = load_recipe(PAPER, ["training.bf16=true"])
    result = language_modeling.plan(recipe, teraflops=312, devices=8)
    assert (result["tokens_per_step"], result["steps"], result["warmup_steps"]) == (512 * 512, 80_000, 2_000)
    assert result["parameters"] == 123_588_336
    assert result["memory_parameters_gb"] == round(16 * 123_588_336 / 1e9, 3)
    assert result["precision"] == "bf16"
    assert result["training_flops"] == pytest.approx(result["flops_per_token"] * result["tokens"], rel=1e-6)
    assert result["hours"] == pytest.approx(result["training_flops"] / (312e12 * 0.4 * 8) / 3600, abs=1e-3)


def test_dry_run_prints_the_cost_of_a_machine():
    machine = ["--teraflops", "0.001", "--utilisation", "0.5", "--devices", "2"]
    lines = CliRunner().invoke(app, ["dry-run", str(SMOKE), *machine]).stdout.splitlines()
    values = dict(line.split(": ", 1) for line in lines if ": " in line and not line.startswith(" "))
    assert (values["tokens_per_step"], values["steps"]) == ("2,048", "10")
    flops = int(values["training_flops"].replace(",", ""))
    assert float(values["hours"]) == pytest.approx(flops / (1e9 * 0.5 * 2) / 3600, abs=1e-3)
    assert 0 < float(values["memory_activations_gb"]) < 0.1


def hours_of(recipe, *options):
    result = CliRunner().invoke(app, ["dry-run", recipe, "--teraflops", "0.001", *options])
    assert result.exit_code == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("hours: "))
    return float(line.removeprefix("hours: "))


@pytest.mark.parametrize("language", LANGUAGES)
def test_symbols_are_priced_without_drawing_them(language, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(CONFIGURATION / f"recipe/{language}_training.yaml")
    few, more = (symbols.plan(recipe, 1e-3, utilisation)["training_flops"] for utilisation in (None, 1.0))
    assert few == more > 6 * language_modeling.num_parameters(recipe) * symbols.plan(recipe)["steps"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="devices is 2"):
        symbols.plan(recipe, 1, devices=2)


def test_steps_of_epochs_of_symbols_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(CONFIGURATION / "recipe/regbench_paper_training.yaml", ["data.num_automata=65"])
    size, epochs = recipe.training.per_device_train_batch_size, recipe.training.num_train_epochs
    assert symbols.plan(recipe)["steps"] == epochs * -(-65 // size)
    assert not list(tmp_path.iterdir())


def test_experiments_and_searches_of_symbols_are_priced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = hours_of("induction_training", "training.max_steps=3000")
    assert hours_of("induction", "seeds=[0]") > one
    assert hours_of("recall_search_pairs", "space.model=[mosaic-recall]", "space.training.learning_rate=[1e-3]") > 0
    drawn = ["sampler=random", "num_trials=2"]
    result = CliRunner().invoke(app, ["dry-run", "recall_search_pairs", "--teraflops", "1", *drawn])
    assert result.exit_code == 1 and "draws trials as it goes" in result.stderr


def test_dry_run_of_epochs_knows_no_hours():
    epochs = ["tokens=null", "training.num_train_epochs=2", "training.optim=adafactor"]
    result = language_modeling.plan(load_recipe(SMOKE, epochs), teraflops=1)
    assert result["hours"] == "unknown, as the number of tokens is"
    assert "times the tokens" in result["training_flops"] and "AdamW only" in result["memory_parameters_gb"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--utilisation", "0.5"], "Give teraflops"),
        (["--devices", "0"], "devices is 0"),
        (["--teraflops", "-1"], "teraflops is -1"),
    ],
)
def test_machines_that_cannot_be_are_named(options, message):
    result = CliRunner().invoke(app, ["dry-run", str(SMOKE), *options])
    assert result.exit_code == 1 and message in result.stderr


def test_a_task_without_an_estimate_says_so(monkeypatch):
    monkeypatch.setattr(language_modeling, "plan", lambda recipe: {"games": 3})
    assert "games: 3" in CliRunner().invoke(app, ["dry-run", str(SMOKE)]).stdout
    result = CliRunner().invoke(app, ["dry-run", str(SMOKE), "--teraflops", "1"])
    assert result.exit_code == 1 and "leave out --teraflops" in result.stderr


# While training


def test_measured_rate_is_possible_and_leaves_randomness_alone():
    measured_teraflops.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert 1e-4 < measured_teraflops(torch.device("cpu")) < 1e3
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(ValueError, match="'fp8'.*use one of no, bf16, fp16"):
        measured_teraflops(torch.device("cpu"), "fp8")


def test_peak_memory_is_in_bytes_and_of_this_process():
    # Each thread counts its newest pages by itself for a while, so that the two numbers may lie some of them apart.
    now = psutil.Process().memory_info().rss - 2**22
    assert now <= peak_memory_bytes(torch.device("cpu")) < psutil.virtual_memory().total


def test_speed_in_logs_and_result(tmp_path, monkeypatch, without_clean_process):
    """Evaluation that takes long is no part of the speed; seconds of training are."""
    pause, evaluate = 0.7, LanguageModelTrainer.evaluation_loop

    def slow(self, *arguments, **options):
        time.sleep(pause)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(LanguageModelTrainer, "evaluation_loop", slow)
    result = run(tmp_path / "run", "training.eval_steps=1")
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text(encoding="utf-8"))
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(logs) == 5 and all(entry["mfu"] > 0 for entry in logs)
    seconds = sum(256 / entry["tokens_per_second"] for entry in logs)
    assert 0 < seconds < result["seconds"] - 5 * pause

    throughput = result["throughput"]
    assert throughput["tokens_per_second"] == pytest.approx(1280 / seconds, rel=1e-3)
    rate = throughput["tokens_per_second"] * throughput["model_flops_per_token"]
    assert throughput["utilisation"] == pytest.approx(rate / (throughput["measured_teraflops"] * 1e12), rel=0.01)
    assert throughput["model_flops_per_token"] == flops_per_token(configuration("mosaic-smoke"), 64)
    assert throughput["peak_memory_gb"] > 0.1


def test_speed_of_resumed_and_of_older_runs():
    def entry(tokens, speed=None):
        speed = {} if speed is None else {"tokens_per_second": speed}
        return {"loss": 1.0, "num_input_tokens_seen": tokens, **speed}

    # 1000 tokens without a logged speed, then 1000 in 10 s and 1000 in 2 s.
    history = [entry(1000), entry(2000, 100.0), {"eval_loss": 1.0, "num_input_tokens_seen": 2000}, entry(3000, 500.0)]
    assert tokens_per_second(history) == pytest.approx(2000 / 12, rel=1e-5)
    assert tokens_per_second([entry(1000)]) is None


# Ways to save memory and time


@pytest.mark.parametrize("model", ["mosaic-smoke", pytest.param("gpt2-smoke", marks=pytest.mark.slow)])
def test_less_memory_learns_the_same_or_nearly(model, tmp_path, without_clean_process):
    plain = run(tmp_path / "plain", f"model={model}")
    checkpointed = run(tmp_path / "checkpointed", f"model={model}", "training.activation_checkpointing=true")
    assert plain["learning_curve"] == checkpointed["learning_curve"]
    assert plain["metrics"] == checkpointed["metrics"]

    half = run(tmp_path / "half", f"model={model}", "training.bf16=true")
    assert (plain["precision"], half["precision"]) == ("no", "bf16")
    losses = [[point["loss"] for point in result["learning_curve"]["training"]] for result in (plain, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


# Seconds of a step


def test_steps_are_timed_in_turn_and_back_and_the_median_counts():
    now, done = 0.0, []
    durations = {"one": iter([100, 1, 3, 2]), "other": iter([100, 5, 50, 4])}  # the first is not timed

    def step(name):
        nonlocal now
        now += next(durations[name])
        done.append(name)

    steps = {name: lambda name=name: step(name) for name in durations}
    assert interleaved_seconds(steps, rounds=3, clock=lambda: now) == {"one": 2, "other": 5}
    assert done == ["one", "other", "one", "other", "other", "one", "one", "other"]


def test_timing_models_leaves_threads_and_random_numbers_as_they_were():
    configs = {"mosaic": configuration("mosaic-smoke"), "gpt2": configuration("gpt2-smoke")}
    configs["mosaic"].hidden_dropout = 0.1
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    seconds = training_step_seconds(configs, batch_size=2, context_length=16, rounds=1)
    assert seconds.keys() == configs.keys() and min(seconds.values()) > 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)

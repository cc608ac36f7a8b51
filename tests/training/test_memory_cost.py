# SPDX-License-Identifier: Apache-2.0
"""What memories cost, hold and bring: experiments run from trainings to pictures, and their numbers are recomputed."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.kinds import BACKBONES, make_memory_model
from helpers.memory_recipes import SIZES, SMALL
from helpers.models import make_ids
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_memory_mosaic.configuration_memory_model import MEMORY_READS
from training.experiments import memory_cost, memory_models
from training.experiments.memory_cost import (
    crossing,
    crossing_name,
    kept_numbers,
    loss_behind,
    read_text,
    write_tokens,
)
from training.experiments.memory_questions import BITS_OF_IDS, SHARE
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tasks import language_modeling
from training.tasks.memory_model import training_flops


RECIPES = CONFIGURATION / "recipe"
MEMORY, FULL = "Memories of the causal objective", "Full context of equal size"


def small_experiment(name, tmp_path, runs=None, seeds=(0,), **settings):
    """A shipped experiment with models of the sizes of `SMALL`, two steps each stage, without its claims.

    Args:
        runs: labels of those that stay; all by default.
        settings: other fields of the experiment.
    """
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    values["runs"] = {label: values["runs"][label] for label in runs or values["runs"]}
    small = json.loads(json.dumps(SMALL))
    small["data"]["context_length"] = 32
    small["training"] |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "eval_steps": 1}
    for run in values["runs"].values():
        args = run.get("model_args", {})
        args.pop("memory_size", None)
        args |= {"chunk_length": 32} if args.get("chunk_length", 0) >= 64 else {}
        args |= {"chunk_length": 2} if args.get("chunk_length") == 16 else {}
        args |= {"unroll_width": 8}
        for part in ("encoder", "decoder"):
            args[part] = SIZES | args.get(part, {}) | {"vocab_size": 300}
        run |= {"model_args": args}
        run["stages"] = [stage | {"steps": 3} for stage in run["stages"]]
    values |= {"claims": [], "seeds": list(seeds), "workers": 1} | settings
    values["common"] = small | {"tokenizer": {"vocab_size": 300, "max_training_stories": 8}}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


@pytest.fixture
def cost_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = {"source": "embedded", "split": "validation", "num_stories": 20}
    sizes = {"lengths": [8, 32, 64], "chunk_length": 4, "num_windows": 2, "rounds": 1, "text": text}
    runs = [MEMORY, FULL, "No memory beyond the chunk"]
    return small_experiment("memory_cost", tmp_path, runs, beside=[FULL], **sizes)


@pytest.mark.slow
def test_an_experiment_measures_quality_and_speed_of_the_same_weights(cost_recipe):
    result = memory_cost.run(cost_recipe)
    assert list(result["effects"]) == cost_recipe.effect_names
    assert (cost_recipe.folder / "memory_cost.png").stat().st_size > 10_000
    series = {one["label"]: one["seeds"] for one in result["measured"]["series"]}
    assert list(series) == list(cost_recipe.runs) and all(len(seeds) == 1 for seeds in series.values())
    for label, (one,) in series.items():
        assert f"| 64 | {label} |" in result["table"]
        assert all(value > 0 for values in one["measured"].values() for value in values.values())
    # Beyond the chunk a model without memory keeps as much behind any text, and full context in proportion.
    kept = {label: one["measured"]["numbers kept"] for label, (one,) in series.items()}
    assert kept[FULL]["64"] == 2 * 4 * SIZES["hidden_size"] * (64 + 3)
    assert kept["No memory beyond the chunk"]["8"] == kept["No memory beyond the chunk"]["64"]
    vectors, row = 16 * SIZES["hidden_size"], 2 * SIZES["hidden_size"] * (16 + 1 + 3)
    assert kept[MEMORY]["64"] == vectors + row
    assert memory_cost.run(cost_recipe) == result


@pytest.mark.parametrize("backbones", BACKBONES)
@pytest.mark.parametrize("read", MEMORY_READS)
def test_a_loss_behind_a_text_is_that_of_its_next_chunk(read, backbones):
    """By every read and backbone: it depends on what was read before unless there is no memory."""
    encoder, decoder = BACKBONES[backbones]
    model = make_memory_model(encoder=encoder, decoder=decoder, memory_read=read).eval()
    ids = make_ids(2, 15)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten()).item()
    assert loss_behind(model, ids, 10, is_full=False) == pytest.approx(expected, rel=1e-6)
    # In pieces, as a text is read and then written, it is the same model.
    cache = write_tokens(model, read_text(model, ids[:1, :10], False), 4, False)
    assert cache.num_tokens == 14 and kept_numbers(cache) >= cache.memories.numel() > 0


@pytest.mark.parametrize("backbones", BACKBONES)
def test_full_context_reads_a_text_as_one_row(backbones):
    encoder, decoder = BACKBONES[backbones]
    model = make_memory_model(encoder=encoder, decoder=decoder, max_memories=0).eval()
    ids = make_ids(1, 15)
    other = torch.cat([ids[:, :1] + 1, ids[:, 1:]], dim=1)
    assert loss_behind(model, ids, 10, is_full=False) == loss_behind(model, other, 10, is_full=False)
    assert loss_behind(model, ids, 10, is_full=True) != loss_behind(model, other, 10, is_full=True)
    assert model.config.chunk_length == 5
    cache = write_tokens(model, read_text(model, ids, True), 4, True)
    assert cache.get_seq_length() == 19 and kept_numbers(cache) > 0


def test_curves_cross_where_lines_between_lengths_meet():
    lengths = [64, 256, 1024]
    assert crossing(lengths, [4.0, 1.0, 1.0], [1.0, 4.0, 16.0]) == pytest.approx(128)
    assert crossing(lengths, [1.0, 4.0, 1.0], [2.0, 1.0, 4.0]) == pytest.approx(512)  # from there on, not before
    assert crossing(lengths, [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]) == 64
    assert math.isnan(crossing(lengths, [1.0, 1.0, 3.0], [2.0, 2.0, 2.0]))


def made_up(recipe, slope):
    """Memories read in equal time, and full context in time that grows with the length to a power."""
    series = []
    for label, seed in itertools.product(recipe.runs, recipe.seeds):
        power = slope if label.startswith("Full") else 0
        times = {str(length): (1 + 0.01 * seed) * (length / 1024) ** power for length in recipe.lengths}
        loss = {str(length): 2 + 0.5 * (label == MEMORY) * (slope < 0) + 0.001 * seed for length in recipe.lengths}
        if label.startswith("No memory"):
            loss = {key: value + 0.1 for key, value in loss.items()}
        measured = {"loss": loss, **{name: times for name in memory_cost.CROSSING}}
        if not series or series[-1]["label"] != label:
            series.append({"label": label, "seeds": []})
        series[-1]["seeds"].append({"seed": seed, "measured": measured})
    return {"series": series}


def test_claims_on_cost_can_be_supported_contradicted_and_undecided():
    recipe = load_recipe(RECIPES / "memory_cost.yaml")
    good, bad = (memory_cost.effects(recipe, made_up(recipe, slope)) for slope in (2.0, -1.0))
    assert list(good) == recipe.effect_names
    verdicts = {claim.claim: (claim.judge(good), claim.judge(bad)) for claim in recipe.claims}
    assert verdicts[recipe.claims[0].claim] == ("supported", "contradicted")
    assert {pair[0] for pair in verdicts.values()} == {"supported"}
    # Curves that never cross have no place, so that nothing is said of it.
    place = crossing_name("seconds to read", MEMORY, FULL)
    assert 2 ** good[place].value == pytest.approx(1024) and math.isnan(bad[place].value)
    assert verdicts[recipe.claims[1].claim] == ("supported", "undecided")
    assert {pair[1] for pair in verdicts.values()} == {"supported", "contradicted", "undecided"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [64, 100]}, "rising lengths of whole chunks of 64 tokens"),
        ({"lengths": [128, 64]}, "rising lengths of whole chunks of 64 tokens"),
        ({"beside": ["Full"]}, "`beside` names 'Full', which is none of the runs"),
    ],
)
def test_lengths_and_labels_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / "memory_cost.yaml", settings=[settings | {"claims": []}])


@pytest.mark.parametrize("name", ["memory_size", "memory_cost"])
def test_trainings_that_are_compared_have_equal_operations(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", settings=[{"seeds": [0]}])
    totals = [sum(training_flops(training.recipe)) for training in recipe.trainings]
    assert max(totals) / min(totals) < (1.02 if name == "memory_cost" else 1.01), totals


@pytest.mark.slow
def test_memories_are_measured_in_three_precisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_experiment("memory_size", tmp_path)
    result = memory_models.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    for column in ("bits per byte, float32", "bits per byte, int8", "tokens recovered, fp8", BITS_OF_IDS):
        assert f"| {column} " in result["table"]
    for series, training in zip(result["measured"]["series"], recipe.trainings, strict=True):
        config, own = training.recipe.build_config(), training.result()
        size = own["validation"]
        needed = own["metrics"]["autoencoding_loss"] / math.log(2) * size["tokens"]
        chunks = size["tokens"] / config.chunk_length
        expected = (needed + chunks * 32 * config.memory_numbers) / size["bytes"]
        assert series["more"]["bits per byte, float32"] == [pytest.approx(expected)]
        assert series["more"][BITS_OF_IDS] == [pytest.approx(math.log2(300) * size["tokens"] / size["bytes"])]
    # Twice the vectors are twice the room, but for what the decoder still needs.
    one, two = (
        next(series["more"] for series in result["measured"]["series"] if f"64 tokens, {number}" in series["label"])
        for number in ("2 vectors", "4 vectors")
    )
    assert two["bits per byte, float32"][0] > 1.7 * one["bits per byte, float32"][0]


@pytest.mark.slow
def test_the_table_has_a_row_of_full_context_and_shares_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = small_experiment("memory_context", tmp_path, ["Causal only", "No memory", "Full context"])
    result = memory_models.run(recipe)
    assert list(result["effects"]) == recipe.effect_names
    header, _, *rows = result["table"].splitlines()
    assert f" {SHARE.name} " in header and any(row.startswith("| Full context |") for row in rows)
    assert SHARE.of("Causal only") in result["effects"]
    losses = {
        one["label"]: one["seeds"][0]["stages"][0]["metrics"]["causal_loss"] for one in result["measured"]["series"]
    }
    assert len(set(losses.values())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory_objectives_paper", "memory_size_paper", "memory_fidelity_paper"])
def test_comparisons_of_the_papers_size_have_a_price(name, monkeypatch):
    """Counted at a fraction of the width: a dry run of the real one takes minutes."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert {language_modeling.num_parameters(one.recipe) for one in recipe.trainings[:2]} <= set(
        range(10**8, 2 * 10**8)
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    mosaic = {"encoder": sizes | {"num_persistent_slots": 8}, "decoder": sizes | {"num_persistent_slots": 8}}
    common = {"model_args": mosaic | {"unroll_width": 16}, "data": {"context_length": 1024}}
    runs = {}
    if name == "memory_fidelity_paper":
        common["model_args"] = {"decoder": sizes | {"num_persistent_slots": 8}, "unroll_width": 16}
        part = {"settings": {"model_args": sizes}}
        runs = {label: {"encoder": part} for label in recipe.runs if label != "Autoencoder"}
    small = load_recipe(RECIPES / f"{name}.yaml", settings=[{"common": common, "runs": runs, "seeds": [0, 1]}])
    planned = memory_models.plan(small, teraflops=0.001, devices=8)
    assert planned["trainings"] == 2 * len(recipe.runs) and planned["hours"] > 0
    assert sum(" hours" in str(line) for line in planned.values()) == planned["trainings"]


@pytest.mark.parametrize("model", ["memory-paper", "memory-paper-llama", "memory-paper-lm", "memory-paper-lm-llama"])
def test_models_of_the_papers_size_have_its_parameters(model):
    """The author's have 67.1 million in each core and 4.1 in each table of 8,000 tokens."""
    config = AutoConfig.from_pretrained(CONFIGURATION / "model" / f"{model}.json")
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(config).num_parameters()
    parts = 1 if "lm" in model else 2
    assert count == pytest.approx(parts * (67.1e6 + 8192 * 512), rel=0.02)

# SPDX-License-Identifier: Apache-2.0
"""Experiments on trained models measure what their names say, and name bad input before any training."""

import json

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from training import cost
from training.claims import crossed_effect
from training.evaluate import mean_loss, tokens_and_bytes
from training.experiments import attention_maps, position_loss, training_curves
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.tasks import language_modeling
from training.text.tokenizer import train_tokenizer


RECIPES = CONFIGURATION / "recipe"
COMPARISONS = [path for path in sorted(RECIPES.glob("*.yaml")) if "\nruns:" in path.read_text(encoding="utf-8")]
# Its models are on the Hub, and so are their configurations.
COMPARISONS.remove(RECIPES / "memory_fidelity_hub.yaml")
SMALL = [
    "base=smoke",
    "workers=1",
    "common.tokens=2_048",
    "common.data.train.num_stories=40",
    "common.data.validation.num_stories=12",
    "common.training.disable_tqdm=true",
    "common.generation.prompts=[]",
]
TWO_MODELS = {"Memory Mosaic": {"model": "mosaic-smoke"}, "GPT-2": {"model": "gpt2-smoke"}}
V2_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "long_term_delay": 2, "long_term_delay_range": [1, 4]}
STORIES = {"source": "embedded", "split": "validation", "num_stories": 30}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder whose `runs/` the tests of this file share: each small model is trained once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture
def small(workplace, monkeypatch):
    """Returns a function that reads a shipped experiment, with two models of the smoke size."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)

    def read(name, runs=TWO_MODELS, claims=(), **settings):
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        # Replaced here, because settings would only add to the runs of the file. Its claims are of more models.
        values |= {"runs": runs, "claims": list(claims), "seeds": [0]}
        if "depths" in values:
            values["depths"] = [1]
        path = workplace / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_recipe(path, SMALL, [settings])

    return read


@pytest.mark.slow
def test_experiments_share_the_folder_of_a_training_only_if_it_is_the_same():
    folders = {}
    for path in COMPARISONS:
        for training in load_recipe(path).all_trainings:
            first = folders.setdefault(training.recipe.folder, (training.recipe.hash, path.stem))
            assert first[0] == training.recipe.hash, f"{first[1]} and {path.stem} differ in {training.recipe.folder}"
    assert len(folders) > 500


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_trainings_of_a_comparison_differ_only_in_the_compared_settings(path):
    recipe = load_recipe(path)
    folders = [(training.recipe.folder, *training.evaluation.items()) for training in recipe.trainings]
    assert len(set(folders)) == len(folders) == len(recipe.runs) * len(recipe.variants) * len(recipe.seeds)
    for training in recipe.trainings:
        assert training.recipe.build_config().num_hidden_layers == training.depth
        assert training.recipe.seed == training.seed
        # RegBench, `join` and the suite compare them; a model without memories has its whole context in view.
        varied = {"num_automata", "joined", "positions", "task", "context_length"}
        data = [one.recipe.data.model_dump(exclude=varied) for one in (training, recipe.trainings[0])]
        assert data[0] == data[1]
        assert training.recipe.training.max_steps == recipe.trainings[0].recipe.training.max_steps
        assert getattr(training.recipe, "tokens", None) == getattr(recipe.trainings[0].recipe, "tokens", None)


def test_experiments_share_the_trainings_of_equal_models():
    curves = load_recipe(RECIPES / "training_curves.yaml")
    known = {training.recipe.folder: training.recipe.hash for training in curves.all_trainings}

    def shared(name):
        """Return the numbers of trainings for each seed, and of those that `training_curves` has too."""
        experiment = load_recipe(RECIPES / f"{name}.yaml")
        folders = {training.recipe.folder for training in experiment.all_trainings}
        both = [training.recipe for training in experiment.all_trainings if training.recipe.folder in known]
        assert all(known[recipe.folder] == recipe.hash for recipe in both)
        num_seeds = len(experiment.seeds)
        return len(folders) / num_seeds, len({recipe.folder for recipe in both}) / num_seeds

    assert shared("out_of_distribution") == (12, 12)
    assert shared("bandwidth") == (2, 2)  # what is changed in evaluation alone is no training of its own
    assert shared("beyond_training_length") == (7, 5)
    assert shared("attention_maps") == (6, 4)


def test_settings_at_a_depth_are_those_of_that_depth_alone():
    def recipe_of(run):
        values = {
            "name": "curves",
            "task": "training_curves",
            "base": "stories_micro",
            "depths": [1, 4],
            "seeds": [0, 1],
        }
        return training_curves.Recipe(**values, runs={"Llama": {"model": "llama-micro", **run}})

    slow = {"training": {"learning_rate": 1e-3}}
    plain, everywhere, at_one = (recipe_of(run) for run in ({}, slow, {"at_depth": {1: slow}}))
    # The trainings are those of runs that have the setting at every depth, or at none: nothing is trained twice.
    for one, *others in zip(at_one.trainings, everywhere.trainings, plain.trainings, strict=True):
        same = others[0 if one.depth == 1 else 1]
        assert (one.recipe.folder, one.recipe.hash) == (same.recipe.folder, same.recipe.hash)
    assert {one.recipe.training.learning_rate for one in at_one.trainings if one.depth == 1} == {1e-3}
    # What the setting is without `at_depth` leaves no trace in the folder.
    same_rate = plain.trainings[0].recipe.training.learning_rate
    unchanged = recipe_of({"at_depth": {1: {"training": {"learning_rate": same_rate}}}})
    assert [one.recipe.folder for one in unchanged.trainings] == [one.recipe.folder for one in plain.trainings]
    # A result has names where the recipe's file has numbers.
    again = training_curves.Recipe(**json.loads(at_one.model_dump_json()))
    assert again.hash == at_one.hash and again.trainings == at_one.trainings


@pytest.mark.slow
def test_losses_are_those_of_the_test_split_and_a_second_call_shows_them(small, monkeypatch):
    claims = [
        {"claim": "it is better", "paper": "not asked", "effects": ["GPT-2 - Memory Mosaic, 1 block"], "above": 0}
    ]
    options = {"claims": claims, "seeds": [0, 1], "half_budget_seeds": [1], "timing_rounds": 1}
    recipe = small("training_curves", test=STORIES, **options)
    result = training_curves.run(recipe)
    measured = result["measured"]
    assert [run["tokens"] for run in measured["runs"]] == [2048] * 4 + [1024] * 2
    stories = training_curves.load_stories(**STORIES)
    for training, run in zip(recipe.all_trainings, measured["runs"], strict=True):
        model, tokenizer = training.load()
        loss = mean_loss(model, training_curves.pack_windows(stories, tokenizer, 64), 16)
        assert run["test_loss"] == pytest.approx(loss, rel=1e-6)
        tokens, num_bytes = tokens_and_bytes(stories, tokenizer)
        assert run["test_bits_per_byte"] == pytest.approx(loss * tokens / num_bytes / np.log(2), rel=1e-6)
        assert run["validation_loss"] == training.result()["metrics"]["validation_loss"] != run["test_loss"]
    for training, curve in zip(recipe.trainings, measured["curves"], strict=True):
        assert curve["validation"] == training.result()["learning_curve"]["validation"]
    losses = [run["test_loss"] for run in measured["runs"]]
    difference = ((losses[1] - losses[0]) + (losses[3] - losses[2])) / 2
    assert result["effects"]["GPT-2 - Memory Mosaic, 1 block"]["value"] == pytest.approx(difference)
    assert [claim["verdict"] for claim in result["claims"]][0] in {"supported", "contradicted", "undecided"}
    for row, training in zip(measured["costs"], recipe.trainings[:2], strict=True):
        assert row["flops_per_token"] == cost.flops_per_token(training.recipe.build_config(), 64)
        assert row["step_seconds"] > 0
    assert "extrapolations" in result["table"] and result["table"].count("\n| ") == 3
    assert (recipe.folder / "training_curves.png").stat().st_size > 10_000
    monkeypatch.setattr(language_modeling, "run", lambda *_: pytest.fail("trained again"))
    assert training_curves.run(recipe) == result


def test_a_tuning_names_the_best_of_each_model(small):
    slow, fast = ({"model": "gpt2-smoke", "training": {"learning_rate": rate}} for rate in (1e-5, 1e-2))
    middle = {"model": "gpt2-smoke"}
    recipe = small("stories_tuning", runs={"GPT-2, 1e-5": slow, "GPT-2, 3e-3": middle, "GPT-2, 1e-2": fast})
    result = training_curves.run(recipe)
    losses = {training["label"]: training["metrics"]["validation_loss"] for training in result["trainings"]}
    best = min(losses, key=losses.get)
    rate = {"GPT-2, 3e-3": 3e-3, "GPT-2, 1e-2": 1e-2}[best]  # the slowest learns nothing
    at_end = best == "GPT-2, 1e-2"
    expected = {"model": "GPT-2", "depth": 1, "best": best, "learning_rate": rate, "at_end": at_end}
    assert result["measured"]["best"] == [expected]
    assert ("best, at an end" in result["table"]) == at_end and result["effects"] == {}
    assert (recipe.folder / "stories_tuning.png").stat().st_size > 5_000


def test_loss_by_position_has_the_mean_of_the_loss(small):
    texts = {"stories": STORIES | {"windows": "stream"}, "encyclopaedia": STORIES | {"windows": "documents"}}
    options = {"texts": texts, "context_length": 64, "better_from": 16, "flat_from": 16, "seeds": [0, 1]}
    recipe = small("out_of_distribution", **options)
    result = position_loss.run(recipe)
    for name, text in result["measured"].items():
        documents = position_loss.load_stories(**STORIES)
        kind, count = recipe.texts[name].windows, recipe.texts[name].num_windows
        losses = []
        for training in recipe.trainings:
            model, tokenizer = training.load()
            windows, groups = position_loss.cut_windows(documents, tokenizer, 64, kind, count)
            losses.append(position_loss.token_losses(model, windows, batch_size=5))
            rows = Dataset.from_dict({"input_ids": windows.tolist()})
            assert np.nanmean(losses[-1]) == pytest.approx(mean_loss(model, rows, 16), rel=1e-5)
            assert np.isnan(losses[-1][:, 0]).all() and not np.isnan(losses[-1][:, 1:]).any()
        mosaic, other = np.stack(losses[0::2]), np.stack(losses[1::2])  # each (seeds, windows, tokens)
        bands = text["models"][0]["loss"]
        assert bands["mean"][1] == pytest.approx(mosaic[..., 8:16].mean(), abs=1e-4)
        low, mean, high = (np.array(bands[part]) for part in ("low", "mean", "high"))
        assert (low < mean).all() and (mean < high).all()
        past = (other - mosaic)[..., 16:].mean(-1)
        falls = mosaic[..., 16:28].mean(-1) - mosaic[..., -12:].mean(-1)
        for name_of_effect, values in (
            ("loss past 16 tokens, GPT-2 - Memory Mosaic, 1 block", past),
            ("fall past 16 tokens, Memory Mosaic, 1 block", falls),
        ):
            expected = crossed_effect(values, groups, "nats")
            effect = result["effects"][f"{name}: {name_of_effect}"]
            assert [effect[end] for end in ("value", "low", "high")] == pytest.approx(list(expected[:3]), abs=2e-5)
            count_of = "windows" if kind == "stream" else "documents"
            assert effect["basis"] == f"2 seeds, {len(set(groups))} {count_of}"
    assert list(result["effects"]) == recipe.effect_names


def test_a_model_is_read_in_another_way_without_another_training(small, monkeypatch):
    label = "Memory Mosaic, adaptive bandwidth in evaluation"
    evaluation = {"bandwidth_exponent": 0.5, "bandwidth_start": 64}
    texts = {"stories": STORIES | {"windows": "stream", "num_windows": 20}}
    more_runs = {label: {"model": "mosaic-smoke", "evaluation": evaluation}}
    recipe = small("beyond_training_length", runs=TWO_MODELS | more_runs, texts=texts, context_length=128)
    trained = []
    run = language_modeling.run
    monkeypatch.setattr(language_modeling, "run", lambda recipe: trained.append(recipe.folder) or run(recipe))
    result = position_loss.run(recipe)
    assert len(trained) == len(set(trained)) == 2
    assert [model["label"] for model in result["measured"]["stories"]["models"]] == ["Memory Mosaic", label]
    as_trained, changed = (np.array(model["loss"]["mean"]) for model in result["measured"]["stories"]["models"])
    # GPT-2 knows 64 positions. Up to 64 pairs nothing changes.
    assert as_trained[:4] == pytest.approx(changed[:4]) and (as_trained[4:] != changed[4:]).all()
    # All tokens but the first of each window count alike.
    model, tokenizer = recipe.trainings[0].load()
    windows, _ = position_loss.cut_windows(position_loss.load_stories(**STORIES), tokenizer, 128, "stream", 20)
    mean = mean_loss(model, Dataset.from_dict({"input_ids": windows.tolist()}), 4)
    assert result["measured"]["stories"]["models"][0]["mean_loss"] == pytest.approx(mean, rel=1e-5)
    rise = result["effects"][f"stories: rise beyond 64 tokens, {label} - Memory Mosaic, 1 block"]
    expected = (changed - as_trained)[4:].mean() - (changed - as_trained)[2:4].mean()
    assert rise["value"] == pytest.approx(expected, abs=1e-4)
    assert (recipe.folder / "beyond_training_length.png").stat().st_size > 10_000


def test_windows_of_documents_lie_within_one_document():
    documents = Dataset.from_dict({"text": ["a b c d e f g " * 9, "short", "h i j k l m n " * 9]})
    tokenizer = train_tokenizer(documents["text"], 260)
    windows, groups = position_loss.cut_windows(documents, tokenizer, 16, "documents", 100)
    assert set(groups) == {0, 2}
    for ids, group in zip(windows, groups, strict=True):
        assert tokenizer.decode(ids) in documents[group]["text"]
    with pytest.raises(ValueError, match="none of the 3 documents has 4000 tokens"):
        position_loss.cut_windows(documents, tokenizer, 4000, "documents", 100)


def test_repeated_windows_say_in_their_second_half_what_the_first_has_said():
    documents = Dataset.from_dict({"text": ["a b c d e f g " * 9, "h i j k l m n " * 9]})
    tokenizer = train_tokenizer(documents["text"], 260)
    windows, groups = position_loss.cut_windows(documents, tokenizer, 16, "repeated", 5)
    assert windows.shape == (5, 16) and len(set(groups)) == 5
    assert windows[:, :8].equal(windows[:, 8:])
    stream, _ = position_loss.cut_windows(documents, tokenizer, 8, "stream", 5)
    assert windows[:, :8].equal(stream)


def test_a_removed_memory_and_found_parameters_of_v2(small):
    """A delay beyond any text leaves long-term memories with nothing to read."""
    runs = {
        "Memory Mosaic v2": {"model": "mosaic-v2-micro", "model_args": V2_SIZES},
        "Removed": {"model": "mosaic-v2-micro", "model_args": V2_SIZES, "evaluation": {"long_term_delay": 1_000_000}},
    }
    kinds = {"stories": "stream", "repeated": "repeated"}
    texts = {name: STORIES | {"windows": kind, "num_windows": 4} for name, kind in kinds.items()}
    options = {"texts": texts, "context_length": 64, "better_from": 32, "flat_from": 32}
    recipe = small("removed_memory_v2", runs=runs, parameters=["long_term.bandwidth_exponent"], **options)
    result = position_loss.run(recipe)
    model, _ = recipe.trainings[0].load()
    (removed, _) = recipe.trainings[1].load()
    for layer in model.model.layers:
        layer.contextual_memory.long_term.v_proj.weight.data.zero_()
    ids = torch.arange(64)[None]
    assert removed(ids).logits.equal(model(ids).logits)
    (row, _) = result["parameters"]
    exponents = [layer.contextual_memory.long_term.bandwidth_exponent for layer in removed.model.layers]
    assert row["mean"] == pytest.approx(torch.cat(exponents).mean().item())
    assert f"| long_term.bandwidth_exponent | Memory Mosaic v2, 1 block | {row['mean']:.3f} |" in result["table"]
    with pytest.raises(
        ValueError, match="no model of 'removed_memory_v2' has a parameter whose name ends with 'gammas'"
    ):
        position_loss._parameters(recipe.model_copy(update={"parameters": ["gammas"]}))
    with pytest.raises(ValueError, match="`context_length` 63 must be even for `windows: repeated`"):
        small("removed_memory_v2", runs=runs, **options | {"context_length": 63, "bin_width": 7})


def test_maps_are_the_models_own_and_a_model_without_positions_is_absent(small):
    recipe = small("attention_maps", text=STORIES, lengths=[128], num_windows=7, heads_depth=2)
    result = attention_maps.run(recipe)
    assert {head["label"] for head in result["measured"]["heads"]} == {"Memory Mosaic"}  # GPT-2 knows 64 positions
    assert [training.can_read(128) for training in recipe.trainings] == [True, False]
    model, tokenizer = recipe.deep_trainings[0].load(attn_implementation="eager")
    windows, _ = position_loss.cut_windows(position_loss.load_stories(**STORIES), tokenizer, 128, "stream", 7)
    maps = [torch.stack(model(row[None], output_attentions=True).attentions)[:, 0, :, -1] for row in windows]
    mean = attention_maps.last_position_maps(model, windows, batch_size=3)
    assert mean == pytest.approx(torch.stack(maps).mean(0).detach().numpy(), abs=1e-6)
    assert mean.sum(-1) == pytest.approx(1.0, abs=1e-5)
    model, _ = recipe.trainings[0].load(attn_implementation="eager")
    ((first, *_),) = attention_maps.last_position_maps(model, windows, batch_size=3)
    bins = first.reshape(-1, attention_maps.BIN).mean(1)
    assert result["measured"]["maps"][0]["bins"][0] == pytest.approx(bins.tolist(), rel=1e-3)
    deep = result["measured"]["deep_heads"]
    assert {(head["layer"], head["head"]) for head in deep} == {(layer, head) for layer in (0, 1) for head in (0, 1)}
    assert len({head["leak_coefficient"] for head in deep}) == 4
    assert list(result["effects"]) == recipe.effect_names


def test_a_flat_map_with_a_peak_is_described_as_such():
    weights = np.full(257, 1e-3)
    weights[-6:-1], weights[-1] = 0.1, 0  # a mosaic's last pair is not complete
    described = attention_maps.describe(weights)
    assert [described["sink"], described["old"]] == pytest.approx([1.0, 1.0])
    assert described["unevenness"] == pytest.approx(0.0, abs=1e-9)
    assert described["peak_width"] == 5
    assert described["newest"] + described["middle"] + 4 * 1e-3 == pytest.approx(weights.sum())
    weights[0] = 0.3
    weights[4:120] = 4e-3
    uneven = attention_maps.describe(weights)
    assert uneven["sink"] > 50 and uneven["unevenness"] > 0.5


def test_heads_that_look_elsewhere_say_little_about_the_shape_of_the_rest():
    about = {"label": "M", "length": 256}
    flat = about | {"unevenness": 0.1, "middle": 0.9, "newest": 0.1}
    peaked = about | {"unevenness": 2.0, "middle": 0.0, "newest": 1.0}
    assert attention_maps._mean([flat, peaked], "unevenness", "M", 256) == pytest.approx(0.1)
    assert attention_maps._mean([flat, peaked], "newest", "M", 256) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("training_curves", "half_budget_seeds=[9]", r"\[9\], which `seeds` has not"),
        ("training_curves", "runs.GPT-2.evaluation.hidden_size=1", "unknown key 'evaluation"),
        ("training_curves", "depths=[1]", "measures no effect 'growth of GPT-2 - Memory Mosaic from 1"),
        ("training_curves", "runs.Llama.at_depth.3.tokens=9", r"has \['3'\], but depths are \['1', '4'\]"),
        ("training_curves", "runs.Llama.at_depth.1.tokns=9", "tokns"),
        ("training_curves", "runs.Llama.at_depth=1", "has to give settings for each depth"),
        ("parts_induction", "runs.RoPE.at_depth.7.seed=9", r"has \['7'\], but depths are"),
        ("stories_tuning", "test.source=embedded", "a tuning selects"),
        ("beyond_training_length", "runs.RoPE.evaluation.bandwidth_exponent=0.1", "unknown key 'model_args.bandw"),
        ("training_curves", "base=absent", "there is no recipe"),
        ("training_curves", "common.data.train.sorce=x", "unknown key 'data.train.sorce'"),
        ("out_of_distribution", "context_length=250", "no multiple"),
        ("out_of_distribution", "better_from=255 claims=[]", "must lie more than one bin below"),
        ("out_of_distribution", "texts.stories.windows=lines", "windows"),
        ("attention_maps", "depths=[2]", "unknown key 'depths'"),
        ("attention_maps", "lengths=[64] claims=[]", "at least 128"),
    ],
)
def test_mistakes_in_an_experiment_are_named(name, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / f"{name}.yaml", override.split())


def test_every_task_has_what_the_command_line_calls():
    for path in COMPARISONS:
        module = task_module(yaml.safe_load(path.read_text(encoding="utf-8"))["task"])
        assert all(callable(getattr(module, name)) for name in ("run", "plan", "summary"))
    assert len(COMPARISONS) >= 6

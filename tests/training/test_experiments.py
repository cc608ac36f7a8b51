# SPDX-License-Identifier: Apache-2.0
"""Experiments on trained models measure what their names say, and name bad input before any training."""

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset

from training.evaluate import mean_loss
from training.experiments import attention_maps, position_loss, training_curves
from training.experiments.comparison import fits_context
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.tasks import language_modeling
from training.text.tokenizer import train_tokenizer


RECIPES = CONFIGURATION / "recipe"
COMPARISONS = [path for path in sorted(RECIPES.glob("*.yaml")) if "\nruns:" in path.read_text(encoding="utf-8")]
VERDICTS = {"reproduced", "not at this size", "contradicted"}
SMALL = [
    "base=smoke",
    "seeds=[0]",
    "depths=[1]",
    "workers=1",
    "common.tokens=2_048",
    "common.data.train.num_stories=40",
    "common.data.validation.num_stories=12",
    "common.training.disable_tqdm=true",
    "common.generation.prompts=[]",
]
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

    def read(name, **settings):
        values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        # Replaced here, because settings would only add to the runs of the file.
        values["runs"] = {"Memory Mosaic": {"model": "mosaic-smoke"}, "GPT-2": {"model": "gpt2-smoke"}}
        path = workplace / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return load_recipe(path, SMALL, [settings])

    return read


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_trainings_of_a_comparison_differ_only_in_the_compared_settings(path):
    recipe = load_recipe(path)
    folders = [training.recipe.folder for training in recipe.trainings]
    assert len(set(folders)) == len(folders) == len(recipe.runs) * len(recipe.variants) * len(recipe.seeds)
    for training in recipe.trainings:
        assert training.recipe.build_config().num_hidden_layers == training.depth
        assert training.recipe.seed == training.seed
        varied = {"num_automata"}  # RegBench compares it
        data = [one.recipe.data.model_dump(exclude=varied) for one in (training, recipe.trainings[0])]
        assert data[0] == data[1]
        assert training.recipe.training.max_steps == recipe.trainings[0].recipe.training.max_steps
        assert getattr(training.recipe, "tokens", None) == getattr(recipe.trainings[0].recipe, "tokens", None)


def test_experiments_share_the_trainings_of_equal_models():
    curves = load_recipe(RECIPES / "training_curves.yaml")
    maps = load_recipe(RECIPES / "attention_maps.yaml")
    known = {training.recipe.folder: training.recipe.hash for training in curves.trainings}
    shared = [training.recipe for training in maps.trainings if training.recipe.folder in known]
    assert len(shared) == 2 * len(maps.seeds)
    assert all(known[recipe.folder] == recipe.hash for recipe in shared)


def test_curves_are_those_of_the_trainings_and_a_second_call_shows_them(small, monkeypatch):
    recipe = small("training_curves")
    result = training_curves.run(recipe)
    assert {curve["label"] for curve in result["measured"]["curves"]} == {"Memory Mosaic", "GPT-2"}
    for training, curve in zip(recipe.trainings, result["measured"]["curves"], strict=True):
        assert curve["validation"] == training.result()["learning_curve"]["validation"]
    losses = [training["metrics"]["validation_loss"] for training in result["trainings"]]
    assert result["measured"]["gaps"]["1"] == [losses[1] - losses[0]]
    assert {claim["verdict"] for claim in result["claims"]} <= VERDICTS
    assert (recipe.folder / "training_curves.png").stat().st_size > 10_000
    monkeypatch.setattr(language_modeling, "run", lambda *_: pytest.fail("trained again"))
    assert training_curves.run(recipe) == result


def test_loss_by_position_has_the_mean_of_the_loss(small):
    texts = {"stories": STORIES | {"windows": "stream"}, "encyclopaedia": STORIES | {"windows": "documents"}}
    recipe = small("out_of_distribution", texts=texts, context_length=64, better_from=16, flat_from=16)
    result = position_loss.run(recipe)
    for name, text in result["measured"].items():
        model, tokenizer = recipe.trainings[0].load()
        documents = position_loss.load_stories(**STORIES)
        kind, count = recipe.texts[name].windows, recipe.texts[name].num_windows
        windows, _ = position_loss.cut_windows(documents, tokenizer, 64, kind, count)
        by_token = position_loss.token_losses(model, windows, batch_size=5)
        rows = Dataset.from_dict({"input_ids": windows.tolist()})
        assert np.nanmean(by_token) == pytest.approx(mean_loss(model, rows, 16), rel=1e-5)
        assert np.isnan(by_token[:, 0]).all() and not np.isnan(by_token[:, 1:]).any()
        bands = text["loss"]["Memory Mosaic, 1 block"]
        assert bands["mean"][1] == pytest.approx(by_token[:, 8:16].mean(), abs=1e-4)
        low, mean, high = (np.array(bands[part]) for part in ("low", "mean", "high"))
        assert (low <= mean).all() and (mean <= high).all()
    assert {claim["verdict"] for claim in result["claims"]} <= VERDICTS


def test_windows_of_documents_lie_within_one_document():
    documents = Dataset.from_dict({"text": ["a b c d e f g " * 9, "short", "h i j k l m n " * 9]})
    tokenizer = train_tokenizer(documents["text"], 260)
    windows, groups = position_loss.cut_windows(documents, tokenizer, 16, "documents", 100)
    assert set(groups) == {0, 2}
    for ids, group in zip(windows, groups, strict=True):
        assert tokenizer.decode(ids) in documents[group]["text"]
    with pytest.raises(ValueError, match="none of the 3 documents has 4000 tokens"):
        position_loss.cut_windows(documents, tokenizer, 4000, "documents", 100)


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "reproduced"), (1, "contradicted")])
def test_verdicts_out_of_distribution_follow_the_bands(sign, verdict):
    recipe = load_recipe(RECIPES / "out_of_distribution.yaml")
    positions = (np.arange(32) + 0.5) * 8
    band = {"mean": [sign * 0.2] * 32, "low": [sign * 0.2 - 0.1] * 32, "high": [sign * 0.2 + 0.1] * 32}
    fall = {"mean": -sign * 0.2, "low": -sign * 0.2 - 0.1, "high": -sign * 0.2 + 0.1}
    level = {"mean": 0.0, "low": -0.1, "high": 0.1}
    falls = {"M, 1 block": fall, "G, 1 block": level, "M, 1 block - G, 1 block": fall}
    measured = {"positions": positions, "differences": {"M, 1 block - G, 1 block": band}, "late_fall": falls}
    claims = list(position_loss._claims_out_of_distribution(recipe, "text", measured))
    assert [claim.verdict for claim in claims] == [verdict] * 2


def test_maps_are_the_models_own_and_a_model_without_positions_is_absent(small):
    recipe = small("attention_maps", text=STORIES, lengths=[128], num_windows=7)
    result = attention_maps.run(recipe)
    assert {head["label"] for head in result["measured"]["heads"]} == {"Memory Mosaic"}  # GPT-2 knows 64 positions
    model, tokenizer = recipe.trainings[0].load(attn_implementation="eager")
    assert fits_context(model, 10**6) and not fits_context(recipe.trainings[1].load()[0], 128)
    windows, _ = position_loss.cut_windows(position_loss.load_stories(**STORIES), tokenizer, 128, "stream", 7)
    weights = torch.stack([model(row[None], output_attentions=True).attentions[0][0, :, -1] for row in windows]).mean(
        0
    )
    mean = attention_maps.last_position_map(model, windows, batch_size=3)
    assert mean == pytest.approx(weights.detach().numpy(), abs=1e-6)
    assert mean.sum(1) == pytest.approx(1.0, abs=1e-5)
    bins = mean[0].reshape(-1, attention_maps.BIN).mean(1)
    assert result["measured"]["maps"][0]["bins"][0] == pytest.approx(bins.tolist(), rel=1e-3)


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
        ("training_curves", "baseline=GPT-3", "baseline"),
        ("training_curves", "base=absent", "there is no recipe"),
        ("training_curves", "common.data.train.sorce=x", "unknown key 'data.train.sorce'"),
        ("out_of_distribution", "context_length=250", "no multiple"),
        ("out_of_distribution", "better_from=255", "must lie more than one bin below"),
        ("out_of_distribution", "texts.stories.windows=lines", "windows"),
        ("attention_maps", "depths=[2]", "one-block"),
        ("attention_maps", "lengths=[64]", "at least 128"),
    ],
)
def test_mistakes_in_an_experiment_are_named(name, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPES / f"{name}.yaml", [override])


def test_verdicts_on_depth_follow_the_gaps():
    recipe = load_recipe(RECIPES / "training_curves.yaml")

    def verdicts(shallow, deep):
        gaps = {1: [shallow] * 3, 2: [0.1] * 3, 4: [deep] * 3}
        return [claim.verdict for claim in training_curves._claims(recipe, gaps)]

    assert verdicts(0.1, 0.0) == ["reproduced", "reproduced"]
    assert verdicts(0.1, 0.1) == ["reproduced", "not at this size"]
    assert verdicts(-0.1, -0.1) == ["contradicted", "contradicted"]


def test_every_task_has_what_the_command_line_calls():
    for path in COMPARISONS:
        module = task_module(load_recipe(path).task)
        assert all(callable(getattr(module, name)) for name in ("run", "plan", "summary"))
    assert len(COMPARISONS) >= 6

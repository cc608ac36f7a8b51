# SPDX-License-Identifier: Apache-2.0
"""The recall suite: trainings on its languages, the compressor, comparisons of models, and claims on them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from training.claims import measured_effects
from training.evaluate import load_causal_lm
from training.export import export_model
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.tables import committed_results
from training.tasks import symbols


RECIPE_FILES = CONFIGURATION / "recipe"
STORIES = ("mqar", "mad", "classes", "needles")
COMPARED = ("mqar", "mad_recall", "mad_state", "classes", "needles")
COMPARISONS = [*(f"suite_{name}{ending}" for name in COMPARED for ending in ("", "_recurrent")), "parts_v2_mqar"]
RECIPES = {name: load_recipe(RECIPE_FILES / f"{name}.yaml") for name in COMPARISONS}
CLAIMS = [(name, number) for name, recipe in RECIPES.items() for number in range(len(recipe.claims))]
ENCODERS = ["mosaic", "mosaic-v2", "rope", "rope-shift", "llama", "mamba2", "rwkv", "linear"]
TRAINING = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 2}
TRAINING |= {"disable_tqdm": True}
LONGER = {"max_steps": 3, "eval_steps": 1, "save_steps": 2}
SMALL_MODEL = {"hidden_size": 16}
SMALL = {
    "mqar": {"sizes": [[20, 2]], "tests": {"4 pairs": {"sizes": [[20, 4]]}}},
    "mad": {},
    "classes": {"num_shots": [1, 2], "tests": {"grouped": {"order": "grouped"}}},
    "needles": {"num_stories": [1, 1], "tests": {"read twice": {"times_read": 2}}},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small_training(story, **settings):
    """A shipped training, of a model as small as they come."""
    values = yaml.safe_load((RECIPE_FILES / f"suite_{story}_training.yaml").read_text(encoding="utf-8"))
    # Tests are replaced, not merged.
    values["data"] = values["data"] | {"num_rows": 8, "num_test": 2} | SMALL[story] | settings.pop("data", {})
    values["training"] |= TRAINING | settings.pop("training", {})
    values |= {"model_args": SMALL_MODEL, "output_dir": "run"} | settings
    with open(f"{values['name']}.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
    return load_recipe(f"{values['name']}.yaml")


# Trainings


@pytest.mark.parametrize("story", STORIES)
def test_a_training_measures_its_model_on_every_test(story):
    recipe = small_training(story)
    result = symbols.run(recipe)
    assert {"validation", "test", *SMALL[story].get("tests", {})} < result["metrics"].keys()
    assert all(0 <= one["accuracy"] <= 1 for one in result["metrics"].values() if isinstance(one, dict))
    assert (recipe.folder / "best" / "tokenizer.json").exists() == (story == "needles")
    assert symbols.run(recipe) == result


def test_an_interrupted_training_ends_as_one_that_was_not(monkeypatch):
    whole, shares = symbols.run(small_training("classes", output_dir="whole", training=LONGER)), []
    recipe = small_training("classes", output_dir="parts", training=LONGER)

    def interrupt(folder, share):
        shares.append(share)
        if len(shares) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("training.loop.report_progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            symbols.run(recipe)
    parts = symbols.run(recipe)
    assert all(parts[key] == whole[key] for key in ("metrics", "tokens", "steps", "learning_curve"))


# Compressors


def compressor(name, **changes):
    content = json.loads((CONFIGURATION / f"model/{name}-compressor.json").read_text(encoding="utf-8"))
    set_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**content | changes)).eval()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_compressor_tells_from_its_last_state_alone(name):
    model, ids = compressor(name), torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids, labels=ids.roll(1, 1))
        states = model.encoder(input_ids=ids, use_cache=False)[0]
        expected = model.decoder(states[:, -1:] + model.places.weight[:8])
        changed = model(torch.cat([ids[:, :1] + 1, ids[:, 1:]], dim=1)).logits
    torch.testing.assert_close(output.logits[:, :8], expected)
    assert output.loss.isfinite() and (changed - output.logits)[:, :8].abs().min(-1).values.max() > 0
    with pytest.raises(ValueError, match="texts have 33 tokens, more than 32: raise `max_length`"):
        model(torch.zeros(1, 34, dtype=torch.long))


def test_the_encoder_of_a_compressor_starts_as_the_model_alone():
    model = compressor("mosaic")
    set_seed(0)
    alone = AutoModelForCausalLM.from_config(model.config.encoder)
    parameters = dict(alone.base_model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in model.encoder.named_parameters())


@pytest.mark.parametrize("name", ["mosaic", "rope-shift"])
def test_a_compressor_is_saved_whole(name, tmp_path):
    model, ids = compressor(name), torch.arange(9)[None]
    export_model(model, None, tmp_path / "saved")
    loaded = load_causal_lm(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_compressor_learns_to_tell_a_text():
    model = compressor("mosaic").train()
    ids = torch.randint(0, 16, (4, 5), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids.roll(1, 1)).loss.backward()
        optimizer.step()
    assert (model(ids).logits[:, :4].argmax(-1) == ids[:, :4]).all()


def test_compression_needs_a_compressor_and_nothing_else_does():
    with pytest.raises(
        ValueError, match="'mosaic-suite' is of type 'memory_mosaic': MAD's task `compression`, and no"
    ):
        small_training("mad", data={"task": "compression"})
    with pytest.raises(ValueError, match="'mosaic-compressor' is of type 'compressor'"):
        small_training("mad", model="mosaic-compressor", model_args={})


def test_compressors_are_the_models_of_the_suite_with_equal_parameters():
    for name in ENCODERS:
        content = json.loads((CONFIGURATION / f"model/{name}-compressor.json").read_text(encoding="utf-8"))
        encoder = json.loads((CONFIGURATION / f"model/{name}-suite.json").read_text(encoding="utf-8"))
        assert content["encoder"] == encoder, name


# Comparisons


def small_comparison(name, monkeypatch, compared=("Memory Mosaic", "RoPE"), **settings):
    """A shipped comparison of two models, on a base of the smallest sizes."""
    values = yaml.safe_load((RECIPE_FILES / f"suite_{name}.yaml").read_text(encoding="utf-8"))
    base = small_training(name.partition("_")[0], model_args={}, output_dir=None).name
    Path("recipe").mkdir(exist_ok=True)
    Path(f"{base}.yaml").rename(f"recipe/{base}.yaml")
    monkeypatch.setattr("training.experiments.comparison.CONFIGURATION", Path("."))
    values["runs"] = {label: values["runs"][label] for label in compared}
    values |= {"seeds": [0, 1], "workers": 1, "differences": [], "claims": []} | settings
    with open(f"suite_{name}.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False)
    return load_recipe(f"suite_{name}.yaml")


def test_a_comparison_has_a_row_for_each_model_and_test(monkeypatch):
    claim = {"claim": "it is ahead", "paper": "not asked", "effects": ["accuracy (Memory Mosaic - RoPE; 4 pairs)"]}
    recipe = small_comparison("mqar", monkeypatch, differences=[["4 pairs", "test"]], claims=[claim | {"above": 0.02}])
    result = task_module("suite").run(recipe)
    rows = {(row["label"], row["place"]): row for row in result["measured"]["accuracies"]}
    assert rows.keys() == {(label, place) for label in recipe.runs for place in ("test", "4 pairs")}
    for training in recipe.trainings:
        accuracy = training.result()["metrics"]["4 pairs"]["accuracy"]
        assert rows[training.label, "4 pairs"]["accuracy"][recipe.seeds.index(training.seed)] == accuracy
    assert result["table"].count("\n") == 5 and "| 4 pairs | RoPE | 165,632 | 0.005 |" in result["table"]
    assert result["effects"].keys() == set(recipe.effect_names) and len(result["claims"]) == 1
    assert not list(recipe.folder.glob("*.png"))  # of four numbers: the table has them


def test_every_model_is_trained_for_each_task_in_its_own_settings(monkeypatch):
    tasks = {"noisy": {"data": {"task": "noisy_recall"}}, "compression": {"data": {"task": "compression"}}}
    recipe = small_comparison("mad_state", monkeypatch, tasks=tasks, seeds=[0])
    kinds = [(one.label, one.recipe.data.task, one.recipe.model) for one in recipe.trainings]
    names = {"Memory Mosaic": "mosaic", "RoPE": "rope"}
    assert kinds == [
        (label, task, f"{names[label]}-{model}")
        for task, model in (("noisy_recall", "suite"), ("compression", "compressor"))
        for label in names
    ]
    result = task_module("suite").run(recipe)
    rows = {(row["label"], row["place"]): row["model"] for row in result["measured"]["accuracies"]}
    assert rows["RoPE", "compression"] == "rope-compressor" and rows["RoPE", "noisy"] == "rope-suite"
    assert result["effects"]["accuracy (RoPE; noisy)"]["low"] is None  # one seed has no interval


def test_a_task_may_have_tests_too():
    recipe = load_recipe(RECIPE_FILES / "suite_mqar.yaml", ["claims=[]", "differences=[]"], [{"tasks": {"many": {}}}])
    assert [place.name for place in recipe.places][:2] == ["many", "many; 4 pairs"]
    assert "accuracy (Llama; many; 256 pairs)" in recipe.effect_names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"differences": [["64 pair", "test"]], "claims": []},
            r"`differences` has '64 pair', which is not measured \(nearest .*'64 p",
        ),
        ({"differences": [["64 pairs"]]}, "differences.0: List should have at least 2 items"),
        (
            {"runs": {"RoPE": {"at_task": {"many": {}}}}},
            "`at_task` of the run 'RoPE' has 'many', which `tasks` does not",
        ),
    ],
)
def test_what_is_not_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPE_FILES / "suite_mqar.yaml", settings=[settings])


def test_a_training_without_a_test_is_refused(monkeypatch):
    monkeypatch.setattr("training.experiments.comparison.Trained.result", lambda _: {"metrics": {"test": {}}})
    with pytest.raises(ValueError, match="was not measured on the test '4 pairs': move the folder away"):
        list(RECIPES["suite_mqar"].results())


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_has_models_of_equal_size_and_seeds(name):
    recipe = RECIPES[name]
    lines = task_module("suite").plan(recipe)
    assert lines["trainings"] == len(recipe.runs) * len(recipe.seeds) * len(recipe.variants) and len(recipe.seeds) == 3
    for variant in {training.recipe.model.rpartition("-")[2] for training in recipe.trainings}:
        sizes = {
            task_module("symbols").plan(t.recipe)["parameters"] for t in recipe.trainings if variant in t.recipe.model
        }
        assert max(sizes) < 1.03 * min(sizes)
    assert next(iter(recipe.runs)).startswith("Memory Mosaic")


# Claims


def made_up(recipe, effects, target, scale):
    """Content of `measured` in which the named effects have the target as their value."""
    values = {(label, place.name): [0.5] * 3 for label in recipe.runs for place in recipe.places}
    noise = [-scale, 0.0, scale]
    for name in effects:
        models, place = name.removeprefix("accuracy (").removesuffix(")").split("; ", 1)
        pair = next((pair for pair in recipe.differences if " - ".join(pair) == place), None)
        if pair is not None:
            values[models, pair[0]] = [0.5 + target + x for x in noise]
        elif models in recipe.runs:
            values[models, place] = [target + x for x in noise]
        else:
            # "RoPE + shift" holds no " - ", so that the two models of a name are its two parts.
            first, other = models.split(" - ")
            values[first, place] = [0.7 for _ in noise]
            values[other, place] = [0.7 - target - x for x in noise]
    rows = [{"label": label, "place": place, "accuracy": seeds} for (label, place), seeds in values.items()]
    return {"accuracies": rows}


@pytest.mark.parametrize("verdict", ["supported", "contradicted", "undecided"])
@pytest.mark.parametrize(("name", "number"), CLAIMS)
def test_every_rule_gives_every_verdict(name, number, verdict):
    recipe = RECIPES[name]
    claim = recipe.claims[number]
    bound = next(x for x in (claim.above, claim.below, claim.within) if x is not None)
    side = -0.04 if claim.below is not None else 0.04
    inside, outside = (0.0, bound + 0.04) if claim.within is not None else (bound + side, bound - side)
    target, scale = {"supported": (inside, 0.001), "contradicted": (outside, 0.001), "undecided": (bound, 0.2)}[
        verdict
    ]
    effects = measured_effects("suite", recipe, made_up(recipe, claim.effects, target, scale))
    assert effects.keys() == set(recipe.effect_names)
    for effect in claim.effects:
        assert effects[effect].value == pytest.approx(target, abs=1e-9)
    assert claim.judge(effects) == verdict


@pytest.mark.parametrize("name", COMPARISONS)
def test_learning_rates_are_the_best_of_the_searches(name):
    results = {result["name"]: result for result in committed_results()}
    language = "mqar" if name == "parts_v2_mqar" else name.split("_")[1]
    search = f"suite_{language}_search{'_recurrent' * name.endswith('_recurrent')}"
    if not {search, search.removesuffix("_recurrent")} <= results.keys():
        pytest.skip("the result of a search is not committed yet")
    rates: dict[str, list] = {}
    for one in {search, search.removesuffix("_recurrent")}:
        for trial in results[one]["measured"]["trials"]:
            tried = (trial["metric"], trial["settings"]["training.learning_rate"])
            rates.setdefault(trial["settings"]["model"], []).append(tried)
    for training in RECIPES[name].trainings:
        model = training.recipe.model.replace("compressor", "suite")
        assert training.recipe.training.learning_rate == max(rates[model])[1], training.name

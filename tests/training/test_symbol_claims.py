# SPDX-License-Identifier: Apache-2.0
"""Claims on artificial languages: each rule gives all three verdicts, and intervals are as described."""

import json

import numpy as np
import pytest
from scipy.stats import t

from training.claims import measured_effects
from training.experiments import regbench
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tables import committed_results


NAMES = ["regbench", "regbench_automata", "regbench_recurrent", "regbench_long", "regbench_paper"]
NAMES += ["parts_v2_regbench", "induction", "parts_induction"]
RECIPES = {name: load_recipe(CONFIGURATION / f"recipe/{name}.yaml") for name in NAMES}
CLAIMS = [(name, number) for name, recipe in RECIPES.items() for number in range(len(recipe.claims))]
POSITIONS = [10, 30, 20, 25, 15, 5]
# Deviations of made-up values: the same over seeds as over automata.
SMALL, LARGE = 0.001, 0.2


def deviations(scale, num_seeds):
    """Values `(seeds, automata)` whose mean over positions is 0."""
    signs = np.array([1, -1, 1, -1, 1, -1]) / POSITIONS
    seeds = np.linspace(-1, 1, num_seeds)[:, None] if num_seeds > 1 else np.zeros((1, 1))
    return scale * (10 * signs + seeds)


def made_up_regbench(recipe, effects, target, scale):
    """Content of `measured` in which the named effects have the target as their value."""
    num_seeds = len(recipe.seeds)
    series = {
        (label, number): [
            {"test_sequences": dict.fromkeys(regbench.MEASURES, [0.5] * 6), "test_iid": {"accuracy": 0.5}}
            for _ in range(num_seeds)
        ]
        for label in recipe.runs
        for number in recipe.num_automata
    }
    for runs in series.values():
        for run in runs:
            run["test"] = {"accuracy": 0.5}
    for name in effects:
        if name in recipe.own_automata:
            *model, less_new = recipe.own_automata[name]
            for run, deviation in zip(series[tuple(model)], deviations(scale, num_seeds), strict=True):
                base = 0.5 if less_new else 0.0
                run["test_iid"] = {"accuracy": base + target + np.average(deviation, weights=POSITIONS)}
            continue
        measure, models = recipe.contrasts[name]
        base = 0.5 if len(models) == 2 else 0.0
        for run, deviation in zip(series[models[0]], deviations(scale, num_seeds), strict=True):
            run["test_sequences"] |= {measure: (base + target + deviation).tolist()}
    rows = [{"label": label, "num_automata": number, "seeds": runs} for (label, number), runs in series.items()]
    return {"test_positions": POSITIONS, "series": rows}


def made_up_induction(recipe, effects, target, scale):
    informed = 0.8
    test = {label: [{"accuracy": 0.1}] * 3 for label in recipe.runs}
    for name in effects:
        test[recipe.labels[name]] = [{"accuracy": informed * (target + scale * seed)} for seed in (-1, 0, 1)]
    return {"informed_reader": {"accuracy": informed}, "test": test}


def targets(claim):
    """A value on each side of a rule, and its bound."""
    bound = next(x for x in (claim.above, claim.below, claim.within) if x is not None)
    inside = 0.0 if claim.within is not None else bound + (0.05 if claim.above is not None else -0.05)
    outside = bound + (-0.05 if claim.above is not None else 0.05)
    return {"supported": (inside, SMALL), "contradicted": (outside, SMALL), "undecided": (bound, LARGE)}


@pytest.mark.parametrize("verdict", ["supported", "contradicted", "undecided"])
@pytest.mark.parametrize(("name", "number"), CLAIMS)
def test_every_rule_gives_every_verdict(name, number, verdict):
    recipe = RECIPES[name]
    claim = recipe.claims[number]
    target, scale = targets(claim)[verdict]
    make = made_up_induction if recipe.task == "induction" else made_up_regbench
    measured = json.loads(json.dumps(make(recipe, claim.effects, target, scale)))
    effects = measured_effects(recipe.task, recipe, measured)
    assert effects.keys() == set(recipe.effect_names)
    for effect in claim.effects:
        assert effects[effect].value == pytest.approx(target, abs=1e-9)
    assert claim.judge(effects) == verdict


def test_one_training_has_the_interval_of_a_ratio_over_automata():
    generator = np.random.default_rng(0)
    positions = generator.integers(10, 60, 200)
    values = generator.random((1, 200))
    effect = regbench._mean(values, positions)
    mean = (values[0] * positions).sum() / positions.sum()
    residuals = positions * (values[0] - mean)
    half = t.ppf(0.975, 199) * np.sqrt(200 / 199 * (residuals**2).sum()) / positions.sum()
    assert effect.value == pytest.approx(mean)
    assert (effect.low, effect.high) == pytest.approx((mean - half, mean + half))
    assert effect.basis == "200 automata, 1 seed"


def test_several_trainings_have_an_interval_over_seeds_and_automata():
    generator = np.random.default_rng(0)
    positions = generator.integers(10, 60, 200)
    of_automata, of_seeds = generator.normal(size=200), generator.normal(size=(5, 1))
    effect = regbench._mean(of_automata + np.zeros((5, 1)), positions)
    alone = regbench._mean(of_automata[None], positions)
    assert effect.high - effect.low == pytest.approx(alone.high - alone.low)  # all of it is of automata
    effect = regbench._mean(of_seeds + np.zeros(200), positions)
    half = t.ppf(0.975, 4) * of_seeds.std(ddof=1) / 5**0.5
    assert (effect.low, effect.high) == pytest.approx((of_seeds.mean() - half, of_seeds.mean() + half))
    assert effect.basis == "5 seeds, 200 automata"


def test_differences_are_paired_by_seed_and_automaton():
    recipe = RECIPES["regbench"]
    measured = made_up_regbench(recipe, [], 0.0, SMALL)
    noise = np.random.default_rng(0).normal(size=(len(recipe.seeds), 6))
    for row in measured["series"]:
        for run, values in zip(row["seeds"], noise, strict=True):
            run["test_sequences"]["accuracy"] = (values + (row["label"] == "Memory Mosaic") * 0.25).tolist()
    effect = regbench.effects(recipe, measured)["accuracy (Memory Mosaic - LSTM; 100 automata)"]
    assert (effect.low, effect.value, effect.high) == pytest.approx((0.25, 0.25, 0.25))


def test_effects_of_the_committed_induction_result():
    (result,) = (result for result in committed_results() if result["name"] == "induction")
    recipe = type(RECIPES["induction"]).model_validate(result["recipe"])
    effects = measured_effects("induction", recipe, result["measured"])
    assert effects.keys() == set(recipe.effect_names) == set(RECIPES["induction"].effect_names)
    of_mosaic = [run["accuracy"] for run in result["measured"]["test"]["Memory Mosaic"]]
    relative = effects["accuracy relative to an informed reader (Memory Mosaic, 1 block)"].value
    assert relative == pytest.approx(np.mean(of_mosaic) / result["measured"]["informed_reader"]["accuracy"])


def test_induction_takes_any_number_of_models():
    ablated = {"Mosaic without a leak": {"model": "mosaic-induction", "training": {"learning_rate": 1.0e-3}}}
    recipe = load_recipe(CONFIGURATION / "recipe/induction.yaml", settings=[{"runs": ablated}])
    assert "accuracy relative to an informed reader (Mosaic without a leak, 1 block)" in recipe.effect_names


# Settings

SEARCHES = {
    "regbench": (
        "regbench_search",
        "regbench_search_baselines",
        "regbench_search_start",
        "regbench_search_ends",
        "regbench_search_shift",
        "regbench_search_recurrent",
    ),
    "induction": ("induction_search", "induction_search_ends"),
}
ARE_SEARCHED = ["regbench", "regbench_automata", "regbench_long", "regbench_recurrent", "parts_v2_regbench"]
ARE_SEARCHED += ["parts_induction"]


def trials_by_model(task):
    """Return a task's trials as pairs of accuracy and settings, by model; none if a result is missing."""
    results = {result["name"]: result for result in committed_results()}
    trials = {}
    for name in SEARCHES[task] if set(SEARCHES[task]) <= set(results) else ():
        for trial in results[name]["measured"]["trials"]:
            settings = dict(trial["settings"])
            trials.setdefault(settings.pop("model", "mosaic-regbench"), []).append((trial["metric"], settings))
    return trials


@pytest.mark.parametrize("name", ARE_SEARCHED)
def test_settings_are_the_best_of_the_searches(name):
    trials = trials_by_model("induction" if "induction" in name else "regbench")
    if not trials:
        pytest.skip("the result of a search is not committed yet")
    for training in RECIPES[name].all_trainings:
        _, best = max(trials[training.recipe.model], key=lambda trial: trial[0])
        assert training.recipe.training.learning_rate == best["training.learning_rate"], training.name
        assert training.recipe.model_args.get("initializer_range") == best.get("model_args.initializer_range")


@pytest.mark.parametrize("task", SEARCHES)
def test_committed_searches_end_between_rates_that_are_worse(task):
    for model, trials in trials_by_model(task).items():
        accuracy, best = max(trials, key=lambda trial: trial[0])
        rate = best.pop("training.learning_rate")
        rates = [settings.pop("training.learning_rate", rate) for _, settings in trials]
        tried = [tried for tried, (_, settings) in zip(rates, trials, strict=True) if settings == best]
        assert min(tried) < rate < max(tried), (model, accuracy)

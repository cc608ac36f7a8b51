# SPDX-License-Identifier: Apache-2.0
"""Rules of the language experiments: made-up measures give every verdict, and rates are those of the tuning."""

import json
import math
import re

import pytest

from training.experiments import attention_maps, position_loss, training_curves
from training.experiments.comparison import blocks
from training.paths import CONFIGURATION, RESULTS
from training.recipe import load_recipe
from training.text import sources


RECIPES = CONFIGURATION / "recipe"
VERDICTS = ("supported", "contradicted", "undecided")
# Tunings by the base recipe whose experiments they serve.
TUNINGS = {
    "stories_micro": ("stories_tuning", "stories_tuning_one_block", "stories_tuning_v2"),
    "stories_tiny": ("stories_tiny_tuning",),
}
ALL_TUNINGS = [name for names in TUNINGS.values() for name in names]
HAS_RUNS = [
    path
    for path in sorted(RECIPES.glob("*.yaml"))
    if {"runs:", "base:"} <= {line.split(" ")[0] for line in path.read_text(encoding="utf-8").splitlines()}
]


@pytest.fixture(scope="module")
def recipes():
    names = (
        "training_curves",
        "out_of_distribution",
        "beyond_training_length",
        "beyond_training_length_v2",
        "bandwidth",
        "attention_maps",
        "parts",
        "parts_v2",
        "removed_memory_v2",
    )
    return {name: load_recipe(RECIPES / f"{name}.yaml") for name in names}


def value_for(claim, verdict):
    """Return a value and the half of an interval about it for which a claim has a verdict."""
    bound, side = next(
        (bound, side) for bound, side in ((claim.above, 1), (claim.below, -1), (claim.within, 0)) if bound is not None
    )
    if side == 0:
        return {"supported": (0, bound / 2), "contradicted": (3 * bound, bound), "undecided": (bound, bound)}[verdict]
    return bound + {"supported": side, "contradicted": -side, "undecided": 0}[verdict] * 0.5, 0.1


def judged(module, recipe, claim, measured):
    # As it is read from a result file.
    return claim.judge(module.effects(recipe, json.loads(json.dumps(measured))))


def curves_measured(recipe, values):
    """Return losses for which each effect of `values`, a difference, has the given value and half-width."""
    runs = []
    for depth in recipe.depths:
        for number, seed in enumerate(recipe.seeds):
            losses = dict.fromkeys(recipe.runs, 0.0)
            for later, earlier in recipe.pairs:
                value, half = values.get(f"{later} - {earlier}, {blocks(depth)}", (None, None))
                if value is not None:
                    # Five seeds spread like this have an interval of 1.96 times the half-width.
                    losses[later] = losses[earlier] + value + half * (number - 2)
            place = {"depth": depth, "seed": seed, "budget": "full"}
            runs += [place | {"label": label, "test_loss": loss} for label, loss in losses.items()]
    return {"runs": runs}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_claims_on_curves_follow_the_losses_of_the_seeds(recipes, verdict):
    recipe = recipes["training_curves"]
    assert len(recipe.claims) == 11
    for claim in recipe.claims:
        value, half = value_for(claim, verdict)
        # A difference that is 0 at one block grows by what it is at four.
        names = [
            f"{match[1]}, 4 blocks" if (match := re.match("growth of (.*) from 1 to 4 blocks", name)) else name
            for name in claim.effects
        ]
        measured = curves_measured(recipe, dict.fromkeys(names, (value, half / 4)))
        assert judged(training_curves, recipe, claim, measured) == verdict, claim.claim


def test_growth_over_depth_is_that_of_the_differences(recipes):
    recipe = recipes["training_curves"]
    values = {"GPT-2 - Memory Mosaic, 1 block": (0.1, 0.0), "GPT-2 - Memory Mosaic, 4 blocks": (0.4, 0.01)}
    effects = training_curves.effects(recipe, curves_measured(recipe, values))
    growth = effects["growth of GPT-2 - Memory Mosaic from 1 to 4 blocks"]
    assert growth.value == pytest.approx(0.3)
    assert growth.high - growth.value == pytest.approx(2.776 * 0.01 * math.sqrt(2.5 / 5), rel=1e-3)


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize(
    "name",
    [
        *("out_of_distribution", "beyond_training_length", "beyond_training_length_v2"),
        *("bandwidth", "parts", "parts_v2", "removed_memory_v2"),
    ],
)
def test_claims_on_positions_read_the_stored_effects(recipes, name, verdict):
    recipe = recipes[name]
    nothing = {"value": 0.0, "low": None, "high": None, "unit": "nats", "basis": "3 seeds, 9 documents"}
    for claim in recipe.claims:
        value, half = value_for(claim, verdict)
        measured = {text: {"effects": {}} for text in recipe.texts}
        for name_of_effect in recipe.effect_names:
            text, _, effect = name_of_effect.partition(": ")
            ends = {"value": value, "low": value - half, "high": value + half}
            measured[text]["effects"][effect] = nothing | (ends if name_of_effect in claim.effects else {})
        assert judged(position_loss, recipe, claim, measured) == verdict, claim.claim


def maps_measured(recipe, mosaic, others, widths):
    """Return heads with the given measures by seed, and peak widths `widths(leak, number of the seed)`.

    `mosaic` is how far the mosaic's sink is above 1.1, `others` how far the sinks of the others are above 1.1, and how
    much more than 0.1 they are more uneven.
    """
    heads = []
    for number, seed in enumerate(recipe.seeds):
        for label in recipe.runs:
            is_mosaic = label == "Memory Mosaic"
            sink, unevenness = (
                (1.1 + mosaic[number], 0.5) if is_mosaic else (1.1 + others[number], 0.6 + others[number])
            )
            head = {"label": label, "seed": seed, "sink": sink, "unevenness": unevenness, "middle": 0.5}
            heads += [head | {"length": length} for length in recipe.lengths]
    deep = [
        {"length": length, "seed": seed, "leak_coefficient": leak / 16, "peak_width": widths(leak, number)}
        for number, seed in enumerate(recipe.seeds)
        for leak in range(16)
        for length in recipe.lengths
    ]
    return {"heads": heads, "deep_heads": deep}


HIGH, LOW, SPREAD = [0.2, 0.21, 0.2, 0.21, 0.2], [-0.2, -0.21, -0.2, -0.21, -0.2], [0.2, -0.2, 0.2, -0.2, 0.0]


@pytest.mark.parametrize(
    ("verdict", "mosaic", "others", "widths"),
    [
        ("supported", LOW, HIGH, lambda leak, number: leak // 2),
        ("contradicted", HIGH, LOW, lambda leak, number: -leak // 2),
        ("undecided", SPREAD, SPREAD, lambda leak, number: leak * (-1) ** number),
        ("undecided", SPREAD, SPREAD, lambda leak, number: 3),
    ],
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_claims_on_maps_follow_the_heads(recipes, verdict, mosaic, others, widths):
    recipe = recipes["attention_maps"]
    measured = maps_measured(recipe, mosaic, others, widths)
    assert [judged(attention_maps, recipe, claim, measured) for claim in recipe.claims] == [verdict] * 5
    basis = attention_maps.effects(recipe, measured)[recipe.rank_name].basis
    assert basis == f"{len(recipe.seeds)} seeds, 16 heads each"


def test_a_loss_moves_along_the_slope_between_two_budgets():
    # A loss that falls by 0.1 whenever the tokens double.
    at = [training_curves.loss_at(ratio, 2.7, (2.8, 2.9), (2000, 1000)) for ratio in (0.5, 1, 4)]
    assert at == pytest.approx([2.8, 2.7, 2.5])
    # The shorter training need not be exactly half as long.
    assert training_curves.loss_at(0.25, 2.7, (2.7, 2.9), (4000, 1000)) == pytest.approx(2.9)


def test_columns_at_equal_cost_give_a_dearer_model_fewer_tokens(recipes):
    recipe = recipes["training_curves"]
    measured = curves_measured(recipe, {})
    for run in measured["runs"]:
        run |= {"tokens": 2000, "parameters": 1, "learning_rate": 0.004, "test_loss": 2.0}
    half = [run | {"budget": "half", "tokens": 1000, "test_loss": 2.3} for run in measured["runs"] if run["seed"] == 1]
    measured["runs"] += half
    costs = {"Memory Mosaic": (1.0, 1.0), "GPT-2": (2.0, 0.5)}
    measured["costs"] = [
        {"label": label, "depth": depth, "flops_per_token": flops, "step_seconds": seconds}
        for depth in recipe.depths
        for label in recipe.runs
        for flops, seconds in [costs.get(label, (1.0, 1.0))]
    ]
    rows = [line.split(" | ")[-2:] for line in training_curves._table(recipe, measured).splitlines()[2:]]
    assert rows[0] == rows[1] == ["2.000", "2.000 |"]
    assert rows[2] == ["2.300", "1.700 |"]  # GPT-2: half the tokens at equal operations, twice at equal seconds


# Learning rates and splits


def committed(name):
    path = RESULTS / name / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def model_of(training):
    """Return what is trained: the file of the model, what is changed in it, and its depth."""
    recipe = training.recipe
    changed = {key: value for key, value in recipe.model_args.items() if key != "num_hidden_layers"}
    # A mosaic without a part has the rate of the whole one.
    model = re.sub("^parts-.*-(?=[a-z]+$)", "mosaic-", recipe.model)
    changed = {} if model.startswith("mosaic-v2-") else changed
    return model, json.dumps(changed, sort_keys=True), training.depth


def best_rates(tuning):
    """Return by model and depth the least loss in the committed result of a tuning, and its rate; none without it."""
    result = committed(tuning)
    if result is None:
        return {}
    losses = {training["label"]: training["metrics"]["validation_loss"] for training in result["trainings"]}
    tried = {}
    for training in load_recipe(RECIPES / f"{tuning}.yaml").trainings:
        pair = (losses[training.label], training.recipe.training.learning_rate)
        tried.setdefault(model_of(training), []).append(pair)
    return {model: min(pairs) for model, pairs in tried.items()}


def with_another_start(model):
    """Return what is trained without the standard deviation that its matrices start with."""
    name, changed, depth = model
    others = {key: value for key, value in json.loads(changed).items() if key != "initializer_range"}
    return name, json.dumps(others, sort_keys=True), depth


# Recipes that choose between settings of the models have other rates.
CHOOSES = (*ALL_TUNINGS, "stories_initialisation")
IS_TUNED = [path for path in HAS_RUNS if load_recipe(path).base in TUNINGS and path.stem not in CHOOSES]


@pytest.mark.slow
@pytest.mark.parametrize("path", IS_TUNED, ids=lambda path: path.stem)
def test_starts_and_learning_rates_are_those_that_the_tuning_found_best(path):
    recipe = load_recipe(path)
    found = [best_rates(name) for name in TUNINGS[recipe.base]]
    best = {model: pair for rates in found for model, pair in rates.items()}
    if not all(found) and not {model_of(training) for training in recipe.all_trainings} <= best.keys():
        pytest.skip("the result of the tuning is not committed yet")
    for training in recipe.all_trainings:
        model = model_of(training)
        loss, rate = best[model]
        assert training.recipe.training.learning_rate == rate, training.name
        rivals = [pair for rival, pair in best.items() if with_another_start(rival) == with_another_start(model)]
        assert (loss, rate) == min(rivals), training.name


def test_a_committed_tuning_ends_between_rates_that_are_worse():
    for tuning in ALL_TUNINGS:
        result = committed(tuning)
        if result is not None:
            assert not [row for row in result["measured"]["best"] if row["at_end"]]


def test_the_test_split_begins_where_the_tuning_split_ends(recipes, monkeypatch):
    asked = []

    def load_dataset(**options):
        asked.append(options)
        return sources.Dataset.from_dict({"text": ["Once upon a time."] * 3})

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "check_unchanged", lambda stories: None)
    curves = recipes["training_curves"]
    tuning = curves.trainings[0].recipe.data.validation
    assert (tuning.split, tuning.num_stories) == ("validation", 500)
    sections = [curves.test, recipes["attention_maps"].text]
    sections += [load_recipe(RECIPES / "stories_tiny_comparison.yaml").test]
    sections += [
        position_loss._source(recipes[name].texts["stories"]) for name in ("out_of_distribution", "bandwidth")
    ]
    for section in sections:
        stories = sources.load_stories(**(section if isinstance(section, dict) else section.model_dump()))
        assert len(stories) == 3
    assert {(options["path"], options["split"]) for options in asked} == {
        ("roneneldan/TinyStories", "validation[500:1500]")
    }

# SPDX-License-Identifier: Apache-2.0
"""Questions of memory models: effects of made-up and of committed results, and rules that can give every verdict."""

import itertools
import json
from typing import Any

import pytest
import yaml

from training import tables
from training.experiments import memory_models
from training.experiments.memory_questions import (
    BEYOND_IDS,
    BITS,
    BITS_OF_IDS,
    CAUSAL_LOSS,
    CHARACTERS,
    EXACT,
    FULL_CONTEXT,
    LOST_BY_ROUNDING,
    NO_MEMORY,
    OPERATIONS,
    PRECISIONS,
    QUESTIONS,
    RECOVERED,
    SHARE,
    TELLS,
    Measure,
)
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tables import committed_results


RECIPES = {
    recipe.name: recipe
    for recipe in map(load_recipe, sorted((CONFIGURATION / "recipe").glob("memory_*.yaml")))
    if isinstance(recipe, memory_models.Recipe)
}
RESULTS = {result["name"]: result for result in committed_results() if result["task"] == "memory_models"}
CLAIMS = [
    pytest.param(recipe, claim, id=f"{name}-{number}")
    for name, recipe in RECIPES.items()
    for number, claim in enumerate(recipe.claims)
]
GUESS = {"accuracy": 0.2, "loss": 3.0, "entropy_ratio": 0.4}
SEEDS, PLACES = 3, 16
# What a model has unless a case sets it otherwise.
USUAL = {"causal loss": 1.5, "tokens recovered": 0.7, "blank copy": 0.6, "blank copy above chance": 0.4}
USUAL |= {
    "characters above chance": 4.0,
    "tokens above chance": 4.0,
    "first half above chance": 0.3,
    OPERATIONS.name: 6.0,
    SHARE.name: 0.5,
    EXACT.name: 0.4,
    BEYOND_IDS.name: 1.0,
}
USUAL |= {one.name: 4.0 for one in BITS} | {one.name: 0.0 for one in LOST_BY_ROUNDING}
# Causal losses of the models between which a share of context lies, as the beginnings of their labels.
BOUNDS = {NO_MEMORY: 1.7, FULL_CONTEXT: 1.3}


def usual_of(label: str, name: str) -> float:
    """Return what a model has unless a case sets it otherwise."""
    bounds = [loss for beginning, loss in BOUNDS.items() if label.startswith(beginning)]
    return bounds[0] if bounds and name == CAUSAL_LOSS.name else USUAL[name]


def raw(share: float) -> float:
    """Return the accuracy that is so far above chance."""
    return GUESS["accuracy"] + (1 - GUESS["accuracy"]) * share


def one_seed(values: dict[str, float]) -> dict[str, Any]:
    """Return the result of one seed: a stage that reaches blank copy at a step, and a probe."""
    if "blank copy above chance" in values:
        values["blank copy"] = raw(values["blank copy above chance"])
    if SHARE.name in values:
        values["causal loss"] = BOUNDS[NO_MEMORY] - values[SHARE.name] * (BOUNDS[NO_MEMORY] - BOUNDS[FULL_CONTEXT])
    metrics = {"causal_loss": values["causal loss"], "blank_copy_accuracy": values["blank copy"]}
    metrics |= {"autoencoding_accuracy": values["tokens recovered"], "autoencoding_exact": values[EXACT.name]}
    recovered = values.get("tokens above chance", values["characters above chance"])
    places = [raw(recovered / PLACES)] * PLACES
    if "first half above chance" in values:
        places[: PLACES // 2] = [raw(values["first half above chance"])] * (PLACES // 2)
    # A step takes 10^10 operations.
    curve = [(10, 0.3), (round(100 * values[OPERATIONS.name]), TELLS), (100_000, 1.0)]
    logged = [{"step": step, "eval_blank_copy_accuracy": accuracy} for step, accuracy in curve]
    first = {"name": "combined", "steps": 100_000, "metrics": metrics, "learning_curve": logged}
    probe = {"name": "probe", "steps": 10, "metrics": {"autoencoding_by_place": places}, "learning_curve": []}
    return {"stages": [first, probe]}


def stored(values: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return what is measured of memories in each precision, for each seed."""
    ids, recovered = [3.0] * SEEDS, values.get(RECOVERED.name, [USUAL[RECOVERED.name]] * SEEDS)
    found = {one.name: values.get(one.name, [USUAL[one.name]] * SEEDS) for one in BITS} | {BITS_OF_IDS: ids}
    if BEYOND_IDS.name in values:
        found[BITS[1].name] = [one + 3.0 for one in values[BEYOND_IDS.name]]
    for name, one in zip(PRECISIONS[1:], LOST_BY_ROUNDING, strict=True):
        lost = values.get(one.name, [0.0] * SEEDS)
        found[f"tokens recovered, {name}"] = [all_ - part for all_, part in zip(recovered, lost, strict=True)]
    return found


def measured(labels: list[str], values: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return what an experiment may measure: of each label the usual, but `values` of each seed."""
    series = []
    for label in labels:
        own = values.get(label, {})
        derived = ("blank copy above chance", "first half above chance", "tokens above chance", SHARE.name)
        usual = {k: usual_of(label, k) for k in USUAL if k not in derived}
        seeds = [one_seed(usual | {k: v[seed] for k, v in own.items()}) for seed in range(SEEDS)]
        more = {"more": stored(own)}
        series.append({"label": label, "training_flops": [10**15, 10**11], "seeds": seeds} | more)
    return json.loads(json.dumps({"unigram": GUESS, "series": series}))


def meanings(recipe: memory_models.Recipe) -> dict[str, tuple[Measure, str, str | None]]:
    """Return measure and labels of each effect by its name."""
    found: dict[str, tuple[Measure, str, str | None]] = {}
    for each in QUESTIONS[recipe.question].measures:
        found |= {each.of(label): (each, label, None) for label in recipe.runs}
        found |= {each.between(*pair): (each, *pair) for pair in itertools.combinations(recipe.runs, 2)}
    return found


def target(claim: Any, verdict: str) -> float:
    """Return an effect of which the rule gives the verdict, or its bound."""
    bound = claim.within or (claim.below if claim.above is None else claim.above)
    step = 0.5 * claim.within if claim.within else 0.04 * max(1.0, abs(bound))
    if verdict == "undecided":
        return bound
    if claim.within:
        return 0.0 if verdict == "supported" else 3 * bound
    return bound + step * (1 if (claim.above is not None) == (verdict == "supported") else -1)


@pytest.mark.parametrize("verdict", ["supported", "contradicted", "undecided"])
@pytest.mark.parametrize(("recipe", "claim"), CLAIMS)
def test_each_claim_can_get_each_verdict(recipe, claim, verdict):
    known, values = meanings(recipe), {label: {} for label in recipe.runs}
    noise = 0.02 if verdict == "undecided" else 0.001
    for name in claim.effects:
        each, label, other = known[name]
        # Seeds differ around the target; a comparison of seeds in pairs sees the differences of both.
        effects = [target(claim, verdict) + noise * (seed - 1) for seed in range(SEEDS)]
        if other is None:
            values[label][each.name] = effects
        else:
            base = values[other].setdefault(each.name, [usual_of(other, each.name)] * SEEDS)
            values[label][each.name] = [
                usual * 2**effect if each.as_ratio else usual + effect
                for usual, effect in zip(base, effects, strict=True)
            ]
    found = memory_models.effects(recipe, measured(list(recipe.runs), values))
    assert found[claim.effects[0]].value == pytest.approx(target(claim, verdict), abs=0.01)
    assert claim.judge(found) == verdict


@pytest.mark.parametrize("name", sorted(RECIPES.keys() & RESULTS.keys()))
def test_effects_of_committed_results_are_those_that_a_recipe_can_name(name):
    result = RESULTS[name]
    recipe = memory_models.Recipe.model_validate(result["recipe"])
    found = memory_models.effects(recipe, result["measured"])
    assert list(found) == recipe.effect_names == RECIPES[name].effect_names
    assert {effect for claim in RECIPES[name].claims for effect in claim.effects} <= found.keys()


def test_operations_count_all_stages_and_have_no_interval_where_a_seed_does_not_arrive():
    result = RESULTS["memory_objectives"]
    found = memory_models.effects(RECIPES["memory_objectives"], result["measured"])
    curriculum, scratch = "Curriculum on a frozen autoencoder", "Combined from scratch"
    # 250 of 300 steps behind the autoencoder; from scratch 1,000 and 1,250 of 1,500.
    flops = {series["label"]: series["training_flops"] for series in result["measured"]["series"]}
    first = (flops[curriculum][0] + flops[curriculum][1] * 250 / 300) / 1e12
    seconds = [flops[scratch][0] * steps / 1500 / 1e12 for steps in (1000, 1250)]
    assert found[OPERATIONS.of(curriculum)].value == pytest.approx(first)
    assert found[OPERATIONS.of(scratch)].value == pytest.approx(sum(seconds) / 2)
    late = found[OPERATIONS.of("Causal only")]
    assert late.value == pytest.approx(flops["Causal only"][0] / 1e12) and late.low is None
    between = found[OPERATIONS.between(curriculum, "Causal only")]
    assert between.low is None and between.basis == "2 seeds, some of which end before they reach it"


def test_chance_is_nothing_above_chance():
    recipe = RECIPES["memory_fidelity"]
    values = {"Autoencoder": {CHARACTERS.name: [16.0] * 3}, "GPT-2, untrained": {CHARACTERS.name: [0.0] * 3}}
    found = memory_models.effects(recipe, measured(list(recipe.runs), values))
    assert found[CHARACTERS.of("Autoencoder")].value == pytest.approx(16)
    assert found[CHARACTERS.of("GPT-2, untrained")].value == pytest.approx(0, abs=1e-12)
    assert found["first half above chance: Autoencoder"].value == pytest.approx(1)


def test_a_share_of_context_lies_between_no_memory_and_full_context():
    recipe = RECIPES["memory_context"]
    labels = list(recipe.runs)
    losses = {NO_MEMORY: 1.7, FULL_CONTEXT: 1.3, "Causal only": 1.4, "Combined from scratch": 1.8}
    values = {
        label: {CAUSAL_LOSS.name: [loss + 0.1 * seed for seed in range(SEEDS)]} for label, loss in losses.items()
    }
    found = memory_models.effects(recipe, measured(labels, values))
    assert found[SHARE.of("Causal only")].value == pytest.approx(0.75)
    assert found[SHARE.of("Combined from scratch")].value == pytest.approx(-0.25)
    assert SHARE.of(NO_MEMORY) not in found and SHARE.of(FULL_CONTEXT) not in found
    # Seeds are compared with their own bounds: a loss that moves with them moves no share.
    assert found[SHARE.of("Causal only")].high == pytest.approx(0.75)
    values[FULL_CONTEXT] = {CAUSAL_LOSS.name: [2.0] * SEEDS}
    undefined = memory_models.effects(recipe, measured(labels, values))
    claim = next(claim for claim in recipe.claims if SHARE.of("Causal only") in claim.effects)
    assert claim.judge(undefined) == "undecided"  # where context is worth nothing, there is no share of it
    assert not [name for name in RECIPES["memory_objectives"].effect_names if name.startswith(SHARE.name)]


def test_a_model_without_a_memory_has_no_effects_of_one():
    names = RECIPES["memory_objectives"].effect_names
    assert CAUSAL_LOSS.of("No memory") in names
    assert not [name for name in names if "No memory" in name and not name.startswith("causal loss")]


def test_roles_are_read_in_old_results_alone():
    assert "roles" in RESULTS["memory_capacity"]["recipe"]
    with pytest.raises(ValueError, match="roles"):
        load_recipe(CONFIGURATION / "recipe" / "memory_capacity.yaml", settings=[{"roles": {"nearly_all": []}}])


def test_a_misspelt_effect_is_refused():
    claim = {"claim": "it holds", "paper": "not asked", "effects": [RECOVERED.of("8 characters")], "above": 0.5}
    with pytest.raises(ValueError, match="measures no effect 'tokens recovered: 8 characters'"):
        load_recipe(CONFIGURATION / "recipe" / "memory_capacity.yaml", settings=[{"claims": [claim]}])


@pytest.mark.slow
def test_every_sentence_of_the_abstract_has_claims_of_three_seeds_and_a_row(monkeypatch):
    """Its rows wait for a result, or have the verdict of one."""
    recipes = {}

    def load_once(path):
        recipes.setdefault(path.stem, RECIPES.get(path.stem) or load_recipe(path))
        return recipes[path.stem]

    monkeypatch.setattr(tables, "load_recipe", load_once)
    entries = yaml.safe_load(tables.ABSTRACT.read_text(encoding="utf-8"))
    recipe = RECIPES["memory_context"]
    values = {"Combined from scratch": {CHARACTERS.name: [15.9, 15.8, 15.9], "blank copy": [0.5, 0.5, 0.51]}}
    result = {"name": recipe.name, "task": recipe.task, "recipe": recipe.model_dump(exclude={"output_dir"})}
    rows = tables.abstract_table([result | {"measured": measured(list(recipe.runs), values)}]).splitlines()[2:]
    assert len(entries) == 9 and len(rows) == sum(len(entry["claims"]) for entry in entries)
    assert [row.split("|")[1].strip() for row in rows if row.split("|")[1].strip()] == [e["sentence"] for e in entries]
    assert all(len(one.seeds) >= 3 for one in recipes.values())
    verdicts = {}
    for row in rows:
        _, claim, name, _, _, verdict = (cell.strip() for cell in row.strip()[1:-1].split("|"))
        verdicts[claim] = verdict
        assert (verdict == "waiting") == (name != "`memory_context`") and "stated after" not in row
    assert verdicts["Combined objectives give memories that hold nearly all of their 16 characters"] == "supported"
    assert verdicts["A decoder tells them nearly completely"] == "contradicted"


@pytest.mark.slow
def test_comparisons_that_share_a_folder_share_the_training():
    """Folders are named by labels: one label must not stand for two trainings."""
    hashes: dict[Any, tuple[str, str]] = {}
    for path in sorted((CONFIGURATION / "recipe").glob("memory_*.yaml")):
        recipe = load_recipe(path)
        if not isinstance(recipe, memory_models.MemoryModelComparison):
            continue
        for training in recipe.trainings[: len(recipe.runs)]:  # of the first seed
            known = hashes.setdefault(training.recipe.folder, (recipe.name, training.recipe.hash))
            assert known[1] == training.recipe.hash, f"{training.recipe.folder}: {known[0]} and {recipe.name}"

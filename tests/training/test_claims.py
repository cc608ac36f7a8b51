# SPDX-License-Identifier: Apache-2.0
"""Claims: intervals of effects against simulation and scipy, and rules with a made-up effect of each kind."""

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import ttest_1samp

from training.claims import (
    ClaimSection,
    Effect,
    crossed_effect,
    judged,
    mean_effect,
    share_difference_effect,
    share_effect,
)
from training.files import json_text
from training.paths import CONFIGURATION
from training.recipe import load_recipe, task_module
from training.tables import claims_table, committed_results


RESULTS = committed_results()
RECIPES = [load_recipe(path) for path in sorted((CONFIGURATION / "recipe").glob("*.yaml"))]


def effect(low: float | None, high: float | None) -> Effect:
    return Effect(0.0 if low is None else (low + high) / 2, low, high, "nats", "5 seeds")


def claim(**rule) -> ClaimSection:
    return ClaimSection(claim="it falls", paper="not asked", effects=["fall"], **rule)


def test_the_interval_of_a_mean_is_student_t():
    values = [0.13, 0.21, 0.08, 0.17, 0.19]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    measured = mean_effect(values, "nats")
    assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert str(measured) == "0.156 (0.0917 to 0.22) nats, 5 seeds"
    assert str(mean_effect([0.5], "")) == "0.5 (no interval), 1 seed"


def test_wilson_interval_of_a_share():
    # Newcombe (1998), table I: 15 of 148.
    share = share_effect(15, 148)
    assert (share.low, share.high) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_newcombe_interval_of_a_difference_of_shares():
    # Newcombe (1998), table II, method 10: 56 of 70 less 48 of 80.
    difference = share_difference_effect(56, 70, 48, 80, basis="patients")
    assert (difference.low, difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference.value == pytest.approx(0.2) and difference.basis == "patients"
    opposite = share_difference_effect(48, 80, 56, 70, basis="patients")
    assert (opposite.low, opposite.high) == pytest.approx((-difference.high, -difference.low))


@pytest.mark.parametrize(
    ("seed_noise", "document_noise", "noise"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, 1, 2), (1, 0.3, 0.1)]
)
def test_crossed_interval_covers_other_seeds_and_other_documents(seed_noise, document_noise, noise):
    generator = np.random.default_rng(0)
    documents = np.repeat(np.arange(40), generator.integers(1, 6, 40))
    covered = []
    for _ in range(400):
        values = noise * generator.normal(size=(5, len(documents))) + seed_noise * generator.normal(size=(5, 1))
        values += (document_noise * generator.normal(size=40))[documents]
        measured = crossed_effect(values, documents.tolist(), "nats")
        covered.append(measured.low < 0 < measured.high)
    assert 0.92 < np.mean(covered) < 0.99


def test_crossed_interval_needs_two_seeds_and_two_documents():
    assert crossed_effect(np.ones((1, 4)), [0, 1, 2, 3], "").low is None
    assert crossed_effect(np.ones((4, 4)), ["a", "a", "a", "a"], "").low is None
    assert crossed_effect(np.ones((4, 4)), [0, 1, 2, 3], "")[:3] == (1, 1, 1)
    with pytest.raises(ValueError, match="needs at least one value"):
        crossed_effect(np.ones((4, 0)), [], "")


KINDS = {"above": {"above": 0.02}, "below": {"below": -0.02}, "within": {"within": 0.02}}
VERDICTS = {
    ("above", 0.03, 0.05): "supported",
    ("above", 0.0, 0.01): "contradicted",
    ("above", 0.01, 0.05): "undecided",
    ("below", -0.05, -0.03): "supported",
    ("below", -0.01, 0.03): "contradicted",
    ("below", -0.03, 0.0): "undecided",
    ("within", -0.01, 0.015): "supported",
    ("within", 0.03, 0.05): "contradicted",
    ("within", -0.05, -0.03): "contradicted",
    ("within", -0.01, 0.05): "undecided",
}


@pytest.mark.parametrize(("kind", "low", "high"), VERDICTS)
def test_each_rule_can_give_each_verdict(kind, low, high):
    assert claim(**KINDS[kind]).judge({"fall": effect(low, high)}) == VERDICTS[kind, low, high]


@pytest.mark.parametrize("rule", KINDS.values(), ids=KINDS)
def test_without_an_interval_a_claim_is_undecided(rule):
    assert claim(**rule).judge({"fall": effect(None, None)}) == "undecided"
    assert claim(**rule).judge({"fall": effect(math.nan, math.nan)}) == "undecided"


def test_all_effects_have_to_support_a_claim_and_one_can_contradict_it():
    both = ClaimSection(claim="it falls", paper="not asked", effects=["one", "other"], above=0.0)
    yes, no, unsure = effect(1, 2), effect(-2, -1), effect(-1, 1)
    assert both.judge({"one": yes, "other": yes}) == "supported"
    assert both.judge({"one": yes, "other": no}) == both.judge({"one": unsure, "other": no}) == "contradicted"
    assert both.judge({"one": yes, "other": unsure}) == "undecided"


def test_a_claim_has_exactly_one_rule():
    for rule in ({}, {"above": 0.0, "below": 1.0}, {"within": 0.0}):
        with pytest.raises(ValidationError, match="exactly one of|greater than 0"):
            claim(**rule)


@pytest.mark.parametrize("result", [r for r in RESULTS if "effects" in r], ids=lambda result: result["name"])
def test_committed_verdicts_follow_from_the_committed_measures(result):
    recipe = task_module(result["task"]).Recipe.model_validate(result["recipe"])
    written = {name: result[name] for name in ("effects", "claims")}
    assert json.loads(json_text(judged(recipe, result["measured"]))) == written


def test_no_two_claims_have_the_same_words():
    claims = [claim.claim for recipe in RECIPES for claim in getattr(recipe, "claims", [])]
    assert sorted(claims) == sorted(set(claims))


@pytest.mark.slow
def test_every_claim_is_in_the_table_once():
    table = claims_table(RESULTS)
    names = {result["name"] for result in RESULTS}
    claims = [claim.claim for recipe in RECIPES if recipe.name in names for claim in getattr(recipe, "claims", [])]
    shown = [claim for claim in claims if f"| {claim} |" in table]
    assert len(claims) == len(set(claims)) and all(table.count(f"| {claim} |") == 1 for claim in shown)
    waiting = len(claims) - len(shown)
    note = f" The committed results do not measure {waiting} other claims of today's recipes." if waiting else ""
    summary = table.partition("\n")[0]
    assert summary.startswith(f"{len(shown)} claims: ") and summary.endswith(f" undecided.{note}")


def test_committed_results_were_made_from_committed_code():
    commits = [(run["commit"], result["name"]) for result in RESULTS for run in (result, *result.get("trainings", []))]
    assert commits and not [name for commit, name in commits if commit is None or commit["dirty"]]


def test_a_claim_on_what_a_committed_run_did_not_measure_is_counted_and_not_shown():
    result = next(result for result in RESULTS if result["name"] == "memory_capacity")
    # As if the run had not had all models that the recipe's claims speak of.
    series = [row for row in result["measured"]["series"] if "32 characters" not in row["label"]]
    table = claims_table([result | {"measured": result["measured"] | {"series": series}}])
    assert "holds nearly all of 32 characters" not in table
    assert table.startswith(
        "1 claims: 1 supported, 0 contradicted, 0 undecided. The committed results do not measure 1 other claims"
    )

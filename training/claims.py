# SPDX-License-Identifier: Apache-2.0
"""Claims, effects and verdicts: what a recipe states before its result, and what the result says of it.

A recipe lists its claims. Each names one or more effects, which the experiment measures with an interval, and a rule,
which turns an effect into one of three verdicts. The rule is a part of the recipe, and so of the hash that its result
carries. Results keep the effects, so that every verdict can be computed again.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from scipy.stats import binomtest, t
from typing_extensions import Self

from training.files import as_read
from training.paths import nearest
from training.recipe import BaseRecipe, Section, task_module


Verdict = Literal["supported", "contradicted", "undecided"]
CONFIDENCE = 0.95


class Effect(NamedTuple):
    """A measured quantity with its 95 % interval.

    Args:
        value: the estimate.
        low, high: ends of the interval; None where there is too little data for one.
        unit: of all three, such as `nats`; empty for a plain number.
        basis: what the interval is taken over, such as `5 seeds`.
    """

    value: float
    low: float | None
    high: float | None
    unit: str
    basis: str

    def __str__(self) -> str:
        """Return the effect as text, with three digits after the point at most."""
        interval = "no interval" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.value:.3g} ({interval}){unit}, {self.basis}"


# Effects by name: what an experiment's function `effects` returns.
Effects = dict[str, Effect]


# Intervals


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _half_width(variance_of_mean: float, degrees_of_freedom: float) -> float:
    return float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom)) * variance_of_mean**0.5


def mean_effect(values: Sequence[float], unit: str, basis: str | None = None) -> Effect:
    """Return the mean of values, one for each seed, with the interval of Student's t.

    For a comparison of two models give the differences seed by seed: seeds that share their batches and their
    initialisation then differ less.

    Args:
        values: one for each seed.
        unit: of the values.
        basis: what the values are of; their number of seeds by default.
    """
    mean, basis = statistics.mean(values), basis or _seeds(len(values))
    if len(values) < 2:
        return Effect(mean, None, None, unit, basis)
    half = _half_width(statistics.variance(values) / len(values), len(values) - 1)
    return Effect(mean, mean - half, mean + half, unit, basis)


def crossed_effect(values: np.ndarray, documents: Sequence[object], unit: str) -> Effect:
    """Return the mean over windows and seeds, with an interval for other seeds and other documents.

    Seeds and documents are two crossed random effects. The variance of the mean is that of the means of seeds plus
    that of the means of documents, less that of what neither explains, which both contain. Student's t has
    Satterthwaite's degrees of freedom.

    Args:
        values (`np.ndarray` of shape `(seeds, windows)`): such as differences of two models' losses.
        documents: the document of each window; windows of one document are not independent.
        unit: of the values.

    Raises:
        ValueError: if there is no window.
    """
    if not values.size:
        raise ValueError("an effect needs at least one value: none of the texts or items is of this kind")
    _, numbers = np.unique([str(document) for document in documents], return_inverse=True)
    num_seeds, num_documents = len(values), int(numbers.max()) + 1
    mean, basis = float(values.mean()), f"{_seeds(num_seeds)}, {num_documents:,} documents"
    if min(num_seeds, num_documents) < 2:
        return Effect(mean, None, None, unit, basis)
    # Deviations of each seed's documents, `(seeds, documents)`. A document counts by its windows; the mean is 0.
    parts = np.stack([np.bincount(numbers, weights=row - mean) for row in values]) * num_documents / values.shape[1]
    by_seed, by_document = parts.mean(1), parts.mean(0)
    rest = parts - by_seed[:, None] - by_document
    of_seeds = float(by_seed.var(ddof=1)) / num_seeds
    of_documents = float(by_document.var(ddof=1)) / num_documents
    of_rest = float((rest**2).sum()) / ((num_seeds - 1) * (num_documents - 1) * num_seeds * num_documents)
    total = of_seeds + of_documents
    if total == 0:
        return Effect(mean, mean, mean, unit, basis)
    degrees = total**2 / (of_seeds**2 / (num_seeds - 1) + of_documents**2 / (num_documents - 1))
    half = _half_width(max(total - of_rest, of_seeds, of_documents), degrees)
    return Effect(mean, mean - half, mean + half, unit, basis)


def share_effect(successes: int, trials: int, basis: str | None = None) -> Effect:
    """Return a share of successes with Wilson's interval.

    Args:
        successes: how many.
        trials: of how many.
        basis: what a trial is; seeds by default.
    """
    interval = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return Effect(successes / trials, float(interval.low), float(interval.high), "", basis or _seeds(trials))


def share_difference_effect(
    successes: int, trials: int, other_successes: int, other_trials: int, basis: str
) -> Effect:
    """Return the difference of two shares with Newcombe's interval, from Wilson's interval of each.

    Args:
        successes, trials: of the first share.
        other_successes, other_trials: of the share that is subtracted.
        basis: what the trials are.
    """
    first, second = share_effect(successes, trials), share_effect(other_successes, other_trials)
    assert first.low is not None and first.high is not None and second.low is not None and second.high is not None
    difference = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Effect(difference, difference - below, difference + above, "", basis)


# Rules


class ClaimSection(Section):
    """A claim and its rule, stated before the result. Exactly one of `above`, `below` and `within` is given.

    A claim is supported if every effect's whole interval is on the side that the rule names: above a number, below
    it, or within so much of 0. It is contradicted if the whole interval of one of them is on the other side. It is
    undecided otherwise, and where an effect has no interval. `changed` says how and why a rule changed after a result.
    """

    claim: str
    paper: str
    effects: list[str] = Field(min_length=1)
    above: float | None = None
    below: float | None = None
    within: float | None = Field(default=None, gt=0)
    changed: str | None = None

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if sum(bound is not None for bound in (self.above, self.below, self.within)) != 1:
            raise ValueError("give exactly one of `above`, `below` and `within`: the rule of the claim")
        return self

    @property
    def rule(self) -> str:
        """The rule in words."""
        if self.above is not None:
            return f"above {self.above:g}"
        return f"below {self.below:g}" if self.below is not None else f"within {self.within:g} of 0"

    def judge_effect(self, effect: Effect) -> Verdict:
        """Return what the rule says of one effect."""
        if effect.low is None or effect.high is None:
            return "undecided"
        lower = -math.inf if self.above is None else self.above
        upper = math.inf if self.below is None else self.below
        if self.within is not None:
            lower, upper = -self.within, self.within
        # Comparisons with NaN, of a measure that could not be taken, are false: undecided.
        holds = effect.low > lower and effect.high < upper
        fails = effect.high < lower or effect.low > upper
        return "supported" if holds else "contradicted" if fails else "undecided"

    def judge(self, effects: Effects) -> Verdict:
        """Return the verdict on the claim: all of its effects have to support it, and one can contradict it."""
        verdicts = {self.judge_effect(effects[name]) for name in self.effects}
        if "contradicted" in verdicts:
            return "contradicted"
        return "supported" if verdicts == {"supported"} else "undecided"


class RecipeWithClaims(BaseRecipe):
    """A recipe of an experiment that measures effects.

    The module of its task has a function `effects`, which takes the recipe and the content of `measured` in its result
    and returns the effects.
    """

    claims: list[ClaimSection] = []

    @property
    def effect_names(self) -> list[str]:
        """Names of the effects that the experiment measures."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_effects(self) -> Self:
        # A misspelt name must not show after hours of training.
        known = self.effect_names if self.claims else []
        for name in (name for claim in self.claims for name in claim.effects):
            if name not in known:
                raise ValueError(f"the experiment measures no effect {name!r}{nearest(name, known)}")
        return self


def measured_effects(task: str, recipe: Any, measured: dict[str, Any]) -> Effects:
    """Return the effects that the experiments of a task find in what they measured.

    Args:
        task: of the recipe.
        recipe: of the experiment.
        measured: the numbers, as the result file has them.
    """
    return task_module(task).effects(recipe, measured)


def judged(recipe: RecipeWithClaims, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `result.json` that speaks of claims: all effects, and each claim with its verdict.

    Args:
        recipe: of the experiment.
        measured: the numbers of its result.
    """
    effects = measured_effects(recipe.task, recipe, as_read(measured))
    return {
        "effects": {name: effect._asdict() for name, effect in effects.items()},
        "claims": [claim.model_dump(exclude_none=True) | {"verdict": claim.judge(effects)} for claim in recipe.claims],
    }


def format_effects(names: Sequence[str], effects: dict[str, dict[str, Any]]) -> str:
    """Return effects of a result, given as `judged` writes them, as one line of text."""
    return "; ".join(f"{name}: {Effect(**effects[name])}" for name in names)


def describe_claim(claim: dict[str, Any], effects: dict[str, dict[str, Any]]) -> str:
    """Return a claim of a result, given as `judged` writes it, as a line of text with its verdict first."""
    rule = ClaimSection(**{name: value for name, value in claim.items() if name != "verdict"}).rule
    ours = format_effects(claim["effects"], effects)
    return f"{claim['verdict']}: {claim['claim']} (paper: {claim['paper']}; ours: {ours}; rule: {rule})"

# SPDX-License-Identifier: Apache-2.0
"""RegBench (Memory Mosaics, Fig. 11 and Table 4): learning a new language from the strings in the context.

Models are trained on one sequence of each training automaton. They are tested on sequences of new automata (out of
distribution) and on new sequences of the training automata (in distribution).
"""

import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from pydantic import Field, PositiveInt

from modeling_memory_mosaic import inspect_units, summarize_units
from training.claims import Effect, Effects, crossed_effect, mean_effect
from training.evaluate import load_causal_lm
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.figures import (
    FEWEST_NUMBERS,
    SMALLEST_TEXT,
    better,
    draw_units,
    label_lines,
    new_figure,
    plot_seeds,
    save_figure,
    seeds_note,
    styles_of,
)
from training.synthetic import automata
from training.tables import markdown_table, mean_and_deviation


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

# Test sequences whose units are measured, and tokens of the first that are drawn.
NUM_INSPECTED, NUM_DRAWN = 20, 30
# How the tokens are written in the picture.
SYMBOLS = "abcdefghijklmnopqr|."
# Names of effects by the measure in a result. `fitted_tvd` is the distance with a fitted temperature.
MEASURES = {"accuracy": "accuracy", "tvd": "TVD", "fitted_tvd": "fitted TVD"}


class Contrast(NamedTuple):
    """A measure of models, given by label and number of training automata; of two, the difference."""

    measure: str
    models: list[tuple[str, int]]


class Recipe(ComparisonRecipe):
    """The first run is the mosaic, which the others are compared with."""

    task: Literal["regbench"]
    num_automata: list[PositiveInt] = Field(min_length=1)

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"data": {"num_automata": number}} for number in self.num_automata]

    @property
    def own_automata(self) -> dict[str, tuple[str, int, bool]]:
        """Effects on the automata of the training, by name: label, number, and whether new ones are subtracted."""
        return {
            f"accuracy on its own automata{' - on new ones' * less_new} ({label}; {number} automata)": (
                label,
                number,
                less_new,
            )
            for number in self.num_automata
            for label in self.runs
            for less_new in (False, True)
        }

    @property
    def contrasts(self) -> dict[str, Contrast]:
        """Effects on new automata, by name. The second model of a pair is taken off the first."""
        first, *others = self.runs
        fewest, most = min(self.num_automata), max(self.num_automata)
        models = {
            f"{label}; {number} automata": [(label, number)] for number in self.num_automata for label in self.runs
        }
        for number in self.num_automata:
            models |= {f"{first} - {label}; {number} automata": [(first, number), (label, number)] for label in others}
        if fewest < most:
            models |= {f"{label}; {most} - {fewest} automata": [(label, most), (label, fewest)] for label in self.runs}
        return {
            f"{name} ({compared})": Contrast(measure, pair)
            for measure, name in MEASURES.items()
            for compared, pair in models.items()
        }

    @property
    def effect_names(self) -> list[str]:
        return [*self.contrasts, *self.own_automata]


class Series(NamedTuple):
    """One model trained on so many automata, with every seed."""

    label: str
    num_automata: int
    results: list[dict[str, Any]]

    def values(self, split: str, measure: str) -> list[float]:
        """Return a measure on a split for each seed."""
        return [result["metrics"][split][measure] for result in self.results]


def _result(training: Trained) -> dict[str, Any]:
    result = training.result()
    if "temperature" not in result["metrics"]:
        raise ValueError(
            f"{training.recipe.folder} was measured by an earlier version, without a temperature: move the folder "
            "away, and run the experiment again"
        )
    return result


def _series(recipe: Recipe, trainings: Iterable[Trained]) -> list[Series]:
    results = {(t.label, t.recipe.data.num_automata, t.seed): _result(t) for t in trainings}
    return [
        Series(label, number, [results[label, number, seed] for seed in recipe.seeds])
        for number in recipe.num_automata
        for label in recipe.runs
    ]


def _numbers(series: Series) -> dict[str, Any]:
    curves = [
        [(point["step"], round(point["accuracy"], 4), round(point["loss"], 4)) for point in result["learning_curve"]]
        for result in series.results
    ]
    kept = [
        {name: result[name] for name in ("seed", "seconds")}
        | result["metrics"]
        | {"test_sequences": {measure: result["test_sequences"][measure] for measure in MEASURES}}
        for result in series.results
    ]
    return {"label": series.label, "num_automata": series.num_automata, "seeds": kept, "validation_curve": curves}


def _mean(values: np.ndarray, num_positions: np.ndarray) -> Effect:
    """Return the mean over all test positions, with an interval for other automata and, from two on, other seeds.

    Args:
        values (`np.ndarray` of shape `(seeds, automata)`): mean over the positions of each test sequence.
        num_positions (`np.ndarray` of shape `(automata,)`): of each test sequence.
    """
    means = (values @ num_positions / num_positions.sum())[:, None]
    # Plain means of these are the means over positions. Their deviations are those of a ratio, as sequences differ in
    # length.
    values = means + num_positions / num_positions.mean() * (values - means)
    if len(values) == 1:
        return mean_effect(values[0].tolist(), "", f"{values.shape[1]} automata, 1 seed")
    effect = crossed_effect(values, range(values.shape[1]), "")
    return effect._replace(basis=f"{len(values)} seeds, {values.shape[1]} automata")


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the effects on new automata and on those of the training.

    Models are compared seed by seed and automaton by automaton. The effects on a model's own automata have intervals
    over seeds alone, because there the automata are not a sample.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    seeds = {(one["label"], one["num_automata"]): one["seeds"] for one in measured["series"]}
    num_positions = np.array(measured["test_positions"])

    found = {}
    for name, (measure, models) in recipe.contrasts.items():
        values = [np.array([one["test_sequences"][measure] for one in seeds[model]]) for model in models]
        found[name] = _mean(values[0] if len(values) == 1 else values[0] - values[1], num_positions)
    for name, (label, number, less_new) in recipe.own_automata.items():
        accuracies = [one["test_iid"]["accuracy"] - less_new * one["test"]["accuracy"] for one in seeds[label, number]]
        found[name] = mean_effect(accuracies, "")
    return found


def _inspect(recipe: Recipe) -> list[dict[str, Any]]:
    """Measure the units of the first mosaic on test sequences, and draw them on the beginning of the first."""
    first = recipe.trainings[0].recipe
    # The model of the best validation accuracy, as in the table.
    model = load_causal_lm(first.folder / "best")
    rows = automata.draw_splits(first.data)["test"].to_list()[:NUM_INSPECTED]
    batch = cast(torch.LongTensor, automata.collate(rows)["input_ids"])
    # `collate` gives no mask. Here padding would count in the means of units.
    units = inspect_units(model, batch, attention_mask=(batch != automata.PADDING).long())
    beginning = cast(torch.LongTensor, batch[:1, :NUM_DRAWN])
    letters = [SYMBOLS[token] for token in beginning[0].tolist()]
    draw_units(inspect_units(model, beginning), recipe.folder / f"{recipe.name}_units.png", letters)
    table = summarize_units(units)
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in table
    ]


def _table(series: list[Series]) -> str:
    measures = {
        "accuracy": ("test", "accuracy"),
        "TVD": ("test", "tvd"),
        "fitted TVD": ("test", "fitted_tvd"),
        "accuracy, last token": ("test", "last_accuracy"),
        "fitted TVD, last token": ("test", "fitted_last_tvd"),
        "accuracy in distribution": ("test_iid", "accuracy"),
        "fitted TVD in distribution": ("test_iid", "fitted_tvd"),
    }
    rows = []
    for one in series:
        cells = [mean_and_deviation(one.values(*measure), 3) for measure in measures.values()]
        cells.append(mean_and_deviation([result["metrics"]["temperature"] for result in one.results], 2))
        seeds = ", ".join(str(result["seed"]) for result in one.results)
        rate = f"{one.results[0]['recipe']['training']['learning_rate']:g}"
        rows.append([one.label, f"{one.results[0]['parameters']:,}", rate, f"{one.num_automata:,}", seeds, *cells])
    columns = ["model", "parameters", "learning rate", "training automata", "seeds", *measures, "temperature"]
    return markdown_table(columns, "l" + "r" * (len(columns) - 1), rows)


def _draw_bars(axis: Axes, series: list[dict[str, Any]], measure: str) -> None:
    """Draw a measure of each model, out of and in distribution, for one number of automata."""
    styles = styles_of(one["label"] for one in series)
    # At these shifts two bars of height 0.4 touch.
    for shift, split, alpha in ((-0.2, "test", 1.0), (0.2, "test_iid", 0.4)):
        for number, one in enumerate(series):
            values = [seed[split][measure] for seed in one["seeds"]]
            middle, place = statistics.median(values), number + shift
            axis.barh(place, middle, height=0.4, color=styles[one["label"]]["color"], alpha=alpha)
            axis.plot([min(values), max(values)], [place, place], color="black", lw=1.2)
            axis.text(max(values) + 0.01, place, f"{middle:.2f}", va="center", fontsize=SMALLEST_TEXT)
    axis.set_yticks(range(len(series)), [textwrap.fill(one["label"], 16) for one in series])
    axis.set_xlim(0, 1.1)
    axis.grid(False, axis="y")
    axis.invert_yaxis()


def _draw_over_automata(axis: Axes, series: list[dict[str, Any]], measure: str) -> None:
    """Draw a measure of each model, out of distribution, over the number of automata."""
    styles = styles_of(one["label"] for one in series)
    numbers = sorted({one["num_automata"] for one in series})
    for label, style in styles.items():
        of_label = {one["num_automata"]: one["seeds"] for one in series if one["label"] == label}
        by_seed = np.array([[seed["test"][measure] for seed in of_label[number]] for number in numbers]).T
        plot_seeds(axis, numbers, by_seed, marker="o", label=label, **style)
    axis.set_xscale("log")
    axis.set_xticks(numbers, [f"{number:,}" for number in numbers])
    # A logarithmic axis would put more labels between these.
    axis.minorticks_off()
    axis.set_xlabel("training automata")


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw accuracy and distance of the finished models.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    series = measured["series"]
    numbers = {one["num_automata"] for one in series}
    if 2 * len(series) < FEWEST_NUMBERS:
        return
    # Older results have distances of unscaled logits alone.
    distance = "fitted_tvd" if "fitted_tvd" in series[0]["seeds"][0]["test"] else "tvd"
    figure, axes = new_figure(2, 1, height=0.7 + 0.5 * len(series) if len(numbers) == 1 else 2.8)
    for axis, (measure, name, direction) in zip(
        axes[:, 0],
        (("accuracy", "accuracy", "higher"), (distance, "total variation distance", "lower")),
        strict=True,
    ):
        quantity = better(name, cast(Literal["lower", "higher"], direction))
        if len(numbers) == 1:
            _draw_bars(axis, series, measure)
            axis.set_xlabel(quantity)
        else:
            _draw_over_automata(axis, series, measure)
            axis.set_ylabel(quantity)
    if len(numbers) > 1:
        label_lines(axes)
    num_seeds = len(series[0]["seeds"])
    title, note = "Reading automata that the training never showed", seeds_note(num_seeds)
    if len(numbers) == 1:
        title = "Reading new automata, and those of the training"
        note = (
            f"Medians of {num_seeds} seeds; black: from the lowest to the highest. " if num_seeds > 1 else "One seed. "
        )
        note += f"Full colour: new automata. Pale: the {min(numbers):,} of the training."
    save_figure(figure, folder / f"{recipe.name}.png", title, note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    series = _series(recipe, recipe.trainings)
    measured = {
        # All models are tested on the same sequences.
        "test_positions": series[0].results[0]["test_sequences"]["num_positions"],
        "series": [_numbers(one) for one in series],
        "units": _inspect(recipe),
    }
    return {"measured": measured, "table": _table(series)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

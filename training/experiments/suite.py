# SPDX-License-Identifier: Apache-2.0
"""The recall suite: models side by side on tasks that ask what a row has said before.

A recipe has one language of the suite, and varies it by `tasks`, for each of which every model is trained, or by the
`tests` of the language, on all of which every trained model is measured. So there is one accuracy for each model and
place, which is a task or a test or both.
"""

import functools
import itertools
import statistics
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator
from typing_extensions import Self

from training.claims import Effect, Effects, mean_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, merged, plan, summary
from training.figures import FEWEST_NUMBERS, better, legend_below, new_figure, save_figure, styles_of
from training.paths import nearest
from training.tables import markdown_table


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]


# Marks of models in the picture, whose colours alone not all readers tell apart.
MARKERS = "osD^vP"


class Place(NamedTuple):
    """Where models are measured: a task of the recipe, empty if there is one alone, and a test of the language."""

    task: str
    test: str

    @property
    def name(self) -> str:
        """Both in words."""
        return "; ".join(part for part in (self.task, self.test) if part not in ("", "test")) or "test"


class Recipe(ComparisonRecipe):
    """Each run is compared with those after it.

    `tasks` are settings by name, in each of which all models are trained; a run's `at_task` has settings that win over
    its others at one of them. `differences` are pairs of places, by name: the second is taken off the first.
    """

    task: Literal["suite"]
    tasks: dict[str, dict[str, Any]] = {}
    differences: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        for label, run in self.runs.items():
            if absent := sorted(run.get("at_task", {}).keys() - self.tasks.keys()):
                raise ValueError(
                    f"`at_task` of the run {label!r} has {absent[0]!r}, which `tasks` does not have"
                    f"{nearest(absent[0], list(self.tasks))}"
                )
        names = [place.name for place in self.places]
        for name in itertools.chain.from_iterable(self.differences):
            if name not in names:
                raise ValueError(f"`differences` has {name!r}, which is not measured{nearest(name, names)}")
        return self

    @property
    def variants(self) -> list[dict[str, Any]]:
        return list(self.tasks.values()) or [{}]

    @functools.cached_property
    def run_settings(self) -> dict[str, dict[str, Any]]:
        """By label: in which settings the training of a run differs, whatever the task."""
        settings = super().run_settings
        return {
            label: {key: value for key, value in run.items() if key != "at_task"} for label, run in settings.items()
        }

    def _at_depth(self, label: str, variant: dict[str, Any]) -> dict[str, Any]:
        # Of two tasks of the same settings the first would be found, whose training is the same.
        task = next((name for name, settings in self.tasks.items() if settings == variant), "")
        return merged(super()._at_depth(label, variant), self.runs[label].get("at_task", {}).get(task, {}))

    @property
    def places(self) -> list[Place]:
        """Where models are measured, in the order of the recipe."""
        return [
            Place(task, test)
            for task, training in zip(list(self.tasks) or [""], self.trainings[:: len(self.runs)], strict=False)
            for test in ("test", *training.recipe.data.tests)
        ]

    def results(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield task, label and result of every training, the seeds of each in their order."""
        order = itertools.product(self.seeds, list(self.tasks) or [""], self.runs)
        for (_, task, label), training in zip(order, self.trainings, strict=True):
            yield task, label, _result(training)

    @property
    def effect_names(self) -> list[str]:
        names = [place.name for place in self.places]
        pairs = [f"{one} - {other}" for one, other in self.differences]
        compared = [*self.runs, *(f"{one} - {other}" for one, other in itertools.combinations(self.runs, 2))]
        of_places = [f"accuracy ({label}; {name})" for name in names for label in compared]
        return of_places + [f"accuracy ({label}; {pair})" for pair in pairs for label in self.runs]


def _result(training: Trained) -> dict[str, Any]:
    result = training.result()
    if absent := [name for name in training.recipe.data.tests if name not in result["metrics"]]:
        raise ValueError(
            f"{training.recipe.folder} was not measured on the test {absent[0]!r}: move the folder away, and run the "
            "experiment again"
        )
    return result


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return accuracies, and differences seed by seed, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    values = {(one["label"], one["place"]): one["accuracy"] for one in measured["accuracies"]}

    def difference(one: tuple[str, str], other: tuple[str, str]) -> Effect:
        return mean_effect([a - b for a, b in zip(values[one], values[other], strict=True)], "")

    found: Effects = {}
    for place in (one.name for one in recipe.places):
        found |= {f"accuracy ({label}; {place})": mean_effect(values[label, place], "") for label in recipe.runs}
        for first, other in itertools.combinations(recipe.runs, 2):
            found[f"accuracy ({first} - {other}; {place})"] = difference((first, place), (other, place))
    for one, other in recipe.differences:
        for label in recipe.runs:
            found[f"accuracy ({label}; {one} - {other})"] = difference((label, one), (label, other))
    return found


def _interval(values: list[float]) -> str:
    effect = mean_effect(values, "")
    if effect.low is None or effect.high is None:
        return ""
    # An interval of Student's t may go beyond what an accuracy can be.
    return f"{max(effect.low, 0):.3f} to {min(effect.high, 1):.3f}"


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ["task", "model", "parameters", "learning rate", "accuracy", "95 % interval", "of each seed"]
    cells = [
        [
            row["place"],
            row["label"],
            f"{row['parameters']:,}",
            f"{row['learning_rate']:g}",
            f"{sum(row['accuracy']) / len(row['accuracy']):.3f}",
            _interval(row["accuracy"]),
            ", ".join(f"{value:.3f}" for value in row["accuracy"]),
        ]
        for row in rows
    ]
    return markdown_table(columns, "llrrrrr", cells)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the median over seeds and their range, for each place and model.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    rows = {(row["place"], row["label"]): row["accuracy"] for row in measured["accuracies"]}
    names, labels = (list(dict.fromkeys(name)) for name in zip(*rows, strict=True))
    if len(rows) < FEWEST_NUMBERS:
        return
    figure, axes = new_figure(1, 1, height=0.8 + len(names) * (0.2 + 0.16 * len(labels)))
    axis = axes[0, 0]
    styles, step = styles_of(labels), 0.8 / len(labels)
    for number, label in enumerate(labels):
        for place, name in enumerate(names):
            values, height = rows[name, label], place + (number - (len(labels) - 1) / 2) * step
            axis.plot([min(values), max(values)], [height, height], color=styles[label]["color"], lw=4, alpha=0.35)
            marker, color = MARKERS[number % len(MARKERS)], styles[label]["color"]
            middle = statistics.median(values)
            axis.plot(middle, height, marker, color=color, ms=6, label=None if place else label)
    axis.set_yticks(range(len(names)), [textwrap.fill(name, 22) for name in names])
    axis.grid(False, axis="y")
    for place in range(1, len(names)):
        axis.axhline(place - 0.5, color="0.85", lw=0.8)
    axis.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel=better("accuracy of answers", "higher"))
    legend_below(figure, axes)
    num_seeds = len(next(iter(rows.values())))
    note = (
        f"Marks: medians of {num_seeds} seeds. Bars: from the lowest to the highest seed."
        if num_seeds > 1
        else "One seed."
    )
    save_figure(figure, folder / f"{recipe.name}.png", "Accuracy by task and model", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for task, label, result in recipe.results():
        results.setdefault((task, label), []).append(result)
    rows = [
        {
            "place": place.name,
            "label": label,
            "model": trained[0]["model"],
            "parameters": trained[0]["parameters"],
            "learning_rate": trained[0]["recipe"]["training"]["learning_rate"],
            **{name: [one["metrics"][place.test][name] for one in trained] for name in ("accuracy", "loss")},
            "best_step": [one["metrics"]["best_step"] for one in trained],
        }
        for place in recipe.places
        for label in recipe.runs
        for trained in [results[place.task, label]]
    ]
    curves = [
        {
            "task": task,
            "label": label,
            "validation": [
                [(point["step"], round(point["accuracy"], 4)) for point in one["learning_curve"]] for one in trained
            ],
        }
        for (task, label), trained in results.items()
    ]
    return {"measured": {"accuracies": rows, "curves": curves}, "table": _table(rows)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

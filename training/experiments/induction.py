# SPDX-License-Identifier: Apache-2.0
"""The induction task (Memory Mosaics, footnote 5): one block of mosaic against two blocks of transformer."""

from pathlib import Path
from typing import Any, Literal

from training.claims import Effects, mean_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, plan, summary
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.synthetic import bigrams
from training.synthetic.bigrams import InformedReader
from training.tables import markdown_table, mean_and_deviation


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]


class Recipe(ComparisonRecipe):
    """Models of any depths. The effects name the depth of each, so that a claim about one block is about one block."""

    task: Literal["induction"]

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the runs by the effects that are measured of them."""
        # Trainings of the first seed: one for each label.
        trainings = self.trainings[: len(self.runs)]
        return {f"accuracy relative to an informed reader ({one.name})": one.label for one in trainings}

    @property
    def effect_names(self) -> list[str]:
        return list(self.labels)


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return each model's accuracy on triggers seen before, divided by that of a reader who knows the bigrams.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    informed = measured["informed_reader"]["accuracy"]
    return {
        name: mean_effect([run["accuracy"] / informed for run in measured["test"][label]], "")
        for name, label in recipe.labels.items()
    }


def _informed(recipe: Recipe) -> dict[str, float]:
    """Return the scores, on the same test sequences, of a reader who knows all that training can teach."""
    test = bigrams.draw_splits(recipe.trainings[0].recipe.data)["test"]
    return bigrams.score(InformedReader(test), test)


def _table(recipe: Recipe, results: dict[str, list[dict[str, Any]]], informed: dict[str, float]) -> str:
    columns = ["model", "parameters", "seeds", "accuracy on triggers seen before", "of each seed", "loss there"]
    columns.append("accuracy at first occurrence")
    rows = []
    for label, runs in results.items():
        measures = [[run["metrics"]["test"][name] for run in runs] for name in ("accuracy", "loss", "first_accuracy")]
        accuracy, loss, first = (mean_and_deviation(values, 3) for values in measures)
        each = ", ".join(f"{value:.3f}" for value in measures[0])
        size = [f"{runs[0]['parameters']:,}", ", ".join(map(str, recipe.seeds))]
        rows.append([label, *size, accuracy, each, loss, first])
    accuracy, loss, first = (f"{informed[name]:.3f}" for name in ("accuracy", "loss", "first_accuracy"))
    rows.append(["a reader who knows the bigrams", "", "", accuracy, "", loss, first])
    return markdown_table(columns, "lrrrrrr", rows)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the accuracy over training.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    curves = measured["validation_accuracy"]
    styles = styles_of(curves)
    figure, axes = new_figure(1, 1, height=3.6)
    axis = axes[0, 0]
    for label, of_seeds in curves.items():
        # All seeds are evaluated after the same steps.
        steps = [step for step, _ in of_seeds[0]]
        by_seed = [[accuracy for _, accuracy in points] for points in of_seeds]
        plot_seeds(axis, steps, by_seed, label=label, **styles[label])
    informed = measured["informed_reader"]["accuracy"]
    axis.axhline(informed, color="0.4", ls=":", lw=1.2)
    axis.set(xlabel="training steps", ylim=(0, 1.02))
    axis.set_ylabel(better("accuracy on triggers seen before", "higher"))
    label_lines(axes)
    num_seeds = len(next(iter(curves.values())))
    note = f"{seeds_note(num_seeds)} Dotted: a reader who knows the bigrams."
    save_figure(figure, folder / f"{recipe.name}.png", "“a b … a” is followed by b: who learns it, and when", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    results = {label: [t.result() for t in recipe.trainings if t.label == label] for label in recipe.runs}
    curves = {
        label: [[(point["step"], round(point["accuracy"], 4)) for point in run["learning_curve"]] for run in runs]
        for label, runs in results.items()
    }
    informed = _informed(recipe)
    scores = {
        label: [{"seed": run["seed"], **run["metrics"]["test"]} for run in runs] for label, runs in results.items()
    }
    return {
        "measured": {"test": scores, "informed_reader": informed, "validation_accuracy": curves},
        "table": _table(recipe, results, informed),
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

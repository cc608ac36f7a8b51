# SPDX-License-Identifier: Apache-2.0
"""Memory models (arXiv 2602.13466): what embeddings hold of a text, and how a decoder learns to read them.

Each experiment compares trainings of `tasks/memory_model.py` and asks one `question` of them. `memory_questions.py`
has the questions, this file has the recipe, the table and the picture that they share.
"""

import math
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from pydantic import model_validator

from training.claims import Effects
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.experiments.memory_questions import (
    QUESTIONS,
    Measure,
    Question,
    Series,
    effect_names,
    effects_of,
    prepare_windows,
    probed_places,
    readings_of,
)
from training.figures import (
    FEWEST_NUMBERS,
    better,
    label_lines,
    legend_below,
    new_figure,
    plot_seeds,
    save_figure,
    seeds_note,
    styles_of,
)
from training.parallel import recipe_job, run_all
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tables import markdown_table, mean_and_deviation
from training.tasks.memory_model import training_flops, unigram


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]


class MemoryModelComparison(ComparisonRecipe):
    """Memory models side by side, each in a folder that is named by its label."""

    def _training(self, label: str, variant: dict[str, Any], seed: int) -> Trained:
        # Stages are too long for the name of a folder: the label is one.
        folder = f"runs/{self.base}/{''.join(c if c.isalnum() else '-' for c in label.lower())}-seed{seed}"
        path = CONFIGURATION / "recipe" / f"{self.base}.yaml"
        settings = [self.common, self.runs[label], {"seed": seed, "output_dir": folder}]
        recipe: Any = load_recipe(path, settings=settings)
        # Not by `build_config`, which may ask the Hub: depth is of the decoder that the model's file describes.
        return Trained(label, recipe.own_config().num_hidden_layers, seed, recipe)


class Recipe(MemoryModelComparison):
    """Memory models side by side, and the question that is asked of them."""

    task: Literal["memory_models"]
    question: Literal[
        "fidelity",
        "capacity",
        "objectives",
        "remedies",
        "positions",
        "fidelity_hub",
        "reads",
        "pretrained",
        "context",
        "size",
    ]

    @model_validator(mode="before")
    @classmethod
    def _drop_roles(cls, values: Any) -> Any:
        # Results from before effects were named by labels have the labels' `roles` in their recipe.
        if isinstance(values, dict) and "claims" not in values:
            return {name: value for name, value in values.items() if name != "roles"}
        return values

    @property
    def effect_names(self) -> list[str]:
        """Names of the effects: each measure of the question, of every model and of every two."""
        without_memory = [
            label for label, settings in self.runs.items() if settings.get("model_args", {}).get("max_memories") == 0
        ]
        return effect_names(QUESTIONS[self.question].measures, list(self.runs), without_memory)


def _summarize(series: Series) -> dict[str, Any]:
    kept = ["seed", "parameters", "steps", "tokens", "seconds", "stages"]
    if all("pretrained" in result for result in series.results):
        kept += ["pretrained", "unigram"]  # as each has tokens of its own
    seeds = [{name: result[name] for name in kept} for result in series.results]
    return {"label": series.label, "training_flops": series.flops, "seeds": seeds}


def _table(
    question: Question,
    models: list[Series],
    more_columns: list[dict[str, list[float]]],
    guess: dict[str, float],
) -> str:
    columns = ["model", "parameters", "seeds", *(column.name for column in question.columns), *more_columns[0]]
    rows = []
    for series, more in zip(models, more_columns, strict=True):
        seeds = ", ".join(str(result["seed"]) for result in series.results)
        cells = [series.format(column.measure, column.digits) for column in question.columns]
        cells += [mean_and_deviation(values, 3) if values else "" for values in more.values()]
        rows.append([series.label, f"{series.results[0]['parameters']:,}", seeds, *cells])
    table = markdown_table(columns, "l" + "r" * (len(columns) - 1), rows)
    if any("pretrained" in result for series in models for result in series.results):
        return table  # there is a guess for each tokenizer, in a column of its own
    alone = f"accuracy {guess['accuracy']:.3f}, entropy ratio {guess['entropy_ratio']:.3f}"
    return f"{table}\n\nA guess by the tokens' frequencies alone: {alone}."


def _draw_places(axis: Axes, models: list[Series], styles: dict[str, Any]) -> int:
    """Draw the accuracy of the probe at each place of a chunk; return the number of places."""
    num_places = 0
    for series in models:
        lines = [line for result in series.results if (line := probed_places(result)) is not None]
        if lines:
            num_places = len(lines[0])
            plot_seeds(axis, range(1, num_places + 1), lines, label=series.label, **styles[series.label])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="place in the chunk", ylim=(0, 1.02))
    axis.set_ylabel(better("share of tokens recovered", "higher"))
    return num_places


def _draw_over_training(axis: Axes, question: Question, models: list[Series], styles: dict[str, Any]) -> int:
    """Draw the curves of the models; return the points of the longest one."""
    num_points = 0
    for series in models:
        curves = [series.curve(result, question.curve.measure) for result in series.results]
        if not curves[0]:  # a model without a memory copies nothing
            continue
        operations = [flops / 1e12 for flops, _ in curves[0]]
        by_seed = [[value for _, value in curve] for curve in curves]
        plot_seeds(axis, operations, by_seed, label=series.label, **styles[series.label])
        num_points = max(num_points, len(operations))
    axis.set_xlabel("training so far (10$^{12}$ operations)")
    axis.set_ylabel(better(question.curve.name, question.curve.direction))
    return num_points


def _series_of(measured: dict[str, Any]) -> list[Series]:
    return [
        Series(row["label"], row["seeds"], row.get("training_flops", []), more=row.get("more", {}))
        for row in measured["series"]
    ]


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the question's measure over training, and by place if the question asks; nothing of few numbers.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    question, models = QUESTIONS[recipe.question], _series_of(measured)
    # Results from before `training_flops` have those of each stage.
    models = [
        one if one.flops else one._replace(flops=[stage["training_flops"] for stage in one.results[0]["stages"]])
        for one in models
    ]
    styles = styles_of(series.label for series in models)
    figure, axes = new_figure(1, 1, height=max(3.6, 0.52 * len(models)))
    axis = axes[0, 0]
    if question.by_place:
        num_points = _draw_places(axis, models, styles)
    else:
        num_points = _draw_over_training(axis, question, models, styles)
    if len(models) * num_points < 2 * FEWEST_NUMBERS or num_points < 3:
        return
    note = seeds_note(len(recipe.seeds))
    if question.curve.direction == "higher" and "pretrained" not in models[0].results[0]:
        note += " Dotted: a guess by the tokens' frequencies alone."
        axis.axhline(measured["unigram"]["accuracy"], color="0.4", ls=":", lw=1.2)
    if question.by_place:
        legend_below(figure, axes)  # at the last place all lines meet
    else:
        label_lines(axes)
    save_figure(figure, folder / f"{recipe.name}.png", question.title, note)


def _values_of(measure: Measure, models: list[Series], series: Series, guess: dict[str, float]) -> list[float]:
    """Return a measure of each seed of a model, for the table: nothing if a seed has none, or ended before it."""
    readings = readings_of(measure, models, series, guess)
    is_whole = all(math.isfinite(reading.value) and not reading.is_bound for reading in readings)
    return [reading.value for reading in readings] if is_whole else []


def _measure(recipe: Recipe) -> dict[str, Any]:
    models = []
    for label in recipe.runs:
        trainings = [training for training in recipe.trainings if training.label == label]
        results = [training.result() for training in trainings]
        models.append(Series(label, results, training_flops(trainings[0].recipe), trainings))
    question, first = QUESTIONS[recipe.question], recipe.trainings[0]
    guess = unigram(prepare_windows(first), first.recipe.build_config().vocab_size)
    models = [series._replace(more=question.more_columns(series, guess)) for series in models]
    columns = [
        series.more | {one.name: _values_of(one, models, series, guess) for one in question.shown} for series in models
    ]
    return {
        "measured": {
            "unigram": guess,
            "series": [_summarize(series) | {"more": series.more} for series in models],
        },
        "table": _table(question, models, columns, guess),
    }


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return each measure of the question, of every model and of every two.

    Args:
        recipe: of the experiment.
        measured: as its result has it.
    """
    return effects_of(QUESTIONS[recipe.question].measures, _series_of(measured), measured["unigram"])


def train_sources(recipe: MemoryModelComparison) -> None:
    """Train the models whose encoders or decoders the trainings begin with."""
    sources = [source for training in recipe.trainings for source in training.recipe.trained_sources()]
    # Before the trainings, because several may want the same one at once.
    run_all([recipe_job(source) for source in {source.folder: source for source in sources}.values()], recipe.workers)


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    train_sources(recipe)
    return comparison.run_comparison(recipe, restart, {}, _measure)

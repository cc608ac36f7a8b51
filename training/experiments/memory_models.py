# SPDX-License-Identifier: Apache-2.0
"""Memory models (arXiv 2602.13466): what embeddings hold of a text, and how a decoder learns to read them.

Each experiment compares trainings of `tasks/memory_model.py` and asks one `question` of them. `memory_questions.py`
has the questions, this file has the recipe, the table and the picture that they share.
"""

import statistics
from typing import Any, Literal

from pydantic import model_validator

from training.claims import Effects
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, summary
from training.experiments.memory_questions import (
    QUESTIONS,
    Question,
    Series,
    effect_names,
    effects_of,
    prepare_windows,
    probed_places,
)
from training.figures import new_figure, save_figure
from training.parallel import recipe_job, run_all
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tables import markdown_table, mean_and_deviation
from training.tasks.memory_model import training_flops, unigram


__all__ = ["Recipe", "effects", "plan", "run", "summary"]


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
        "fidelity", "capacity", "objectives", "remedies", "positions", "fidelity_hub", "reads", "pretrained"
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


def plan(
    recipe: Recipe,
    teraflops: float | None = None,
    utilisation: float | None = None,
    devices: int | None = None,
) -> dict[str, Any]:
    """Return the trainings of the experiment and whether each is finished; arguments as for `comparison.plan`."""
    return comparison.plan(recipe, teraflops, utilisation, devices)


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
        cells += [mean_and_deviation(values, 3) for values in more.values()]
        rows.append([series.label, f"{series.results[0]['parameters']:,}", seeds, *cells])
    table = markdown_table(columns, "l" + "r" * (len(columns) - 1), rows)
    if any("pretrained" in result for series in models for result in series.results):
        return table  # there is a guess for each tokenizer, in a column of its own
    alone = f"accuracy {guess['accuracy']:.3f}, entropy ratio {guess['entropy_ratio']:.3f}"
    return f"{table}\n\nA guess by the tokens' frequencies alone: {alone}."


def _draw_places(axes: Any, question: Question, models: list[Series]) -> None:
    """Draw the accuracy of the probe at each place of a chunk, the mean over seeds."""
    for number, series in enumerate(models):
        lines = [line for result in series.results if (line := probed_places(result)) is not None]
        mean = [statistics.mean(at) for at in zip(*lines, strict=True)]
        axes.plot(range(1, len(mean) + 1), mean, color=f"C{number % 10}", lw=1)
    axes.set_xlabel("place in the chunk")
    axes.set_ylabel(question.points.name)
    axes.set_ylim(0, 1.02)


def _draw(recipe: Recipe, question: Question, models: list[Series], accuracy_of_guess: float) -> None:
    """Draw the question's measure: for each model and seed, over training, and by place if the question asks."""
    figure, ((points, curves, *more),) = new_figure(1, 3 if question.by_place else 2, width=6.5, height=4.4)
    for place, series in enumerate(models):
        color = f"C{place % 10}"
        values = series.values(question.points.measure)
        points.plot(values, [place] * len(values), "o", color=color)
        for index, result in enumerate(series.results):
            curve = series.curve(result, question.curve.measure)
            # The legend has one entry for all seeds of a model.
            label = series.label if index == 0 else None
            curves.plot([x / 1e12 for x, _ in curve], [y for _, y in curve], color=color, lw=1, label=label)
    points.set_yticks(range(len(models)), [series.label for series in models])
    for axes in more:
        _draw_places(axes, question, models)
    # The first model on top, as in the table.
    points.invert_yaxis()
    points.axvline(accuracy_of_guess, color="grey", ls=":", label="frequencies alone")
    points.set_xlabel(question.points.name)
    # A little beyond 1, where a dot would be cut in half.
    points.set_xlim(0, 1.02)
    points.legend()
    curves.set_xlabel("training so far ($10^{12}$ operations)")
    curves.set_ylabel(question.curve.name)
    curves.legend()
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _measure(recipe: Recipe) -> dict[str, Any]:
    models = []
    for label in recipe.runs:
        trainings = [training for training in recipe.trainings if training.label == label]
        results = [training.result() for training in trainings]
        models.append(Series(label, results, training_flops(trainings[0].recipe), trainings))
    question, first = QUESTIONS[recipe.question], recipe.trainings[0]
    guess = unigram(prepare_windows(first), first.recipe.build_config().vocab_size)
    measured = [_summarize(series) | {"more": question.more_columns(series, guess)} for series in models]
    _draw(recipe, question, models, guess["accuracy"])
    return {
        "measured": {"unigram": guess, "series": measured},
        "table": _table(question, models, [numbers["more"] for numbers in measured], guess),
    }


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return each measure of the question, of every model and of every two.

    Args:
        recipe: of the experiment.
        measured: as its result has it.
    """
    models = [Series(row["label"], row["seeds"], row.get("training_flops", [])) for row in measured["series"]]
    return effects_of(QUESTIONS[recipe.question].measures, models, measured["unigram"])


def train_sources(recipe: MemoryModelComparison) -> None:
    """Train the models whose encoders or decoders the trainings begin with."""
    sources = [source for training in recipe.trainings for source in training.recipe.trained_sources()]
    # Before the trainings, because several may want the same one at once.
    run_all([recipe_job(source) for source in {source.folder: source for source in sources}.values()], recipe.workers)


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    train_sources(recipe)
    return comparison.run_comparison(recipe, restart, {}, _measure)

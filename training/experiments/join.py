# SPDX-License-Identifier: Apache-2.0
"""Documents read alone and joined, against documents read in sequence: how models answer behind more and more of them.

Models are trained on rows of a few documents and a question, in the reading that the recipe gives each. Then they
answer behind 2 to 64 documents, in each reading that a model of their kind has (see `training.synthetic.readings`).
Besides, documents change their order, and one is left out: that which has the answer, or another.
"""

import functools
import math
import random
import textwrap
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from transformers import PreTrainedModel

from training.claims import Effects, mean_effect
from training.evaluate import load_causal_lm
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, summary
from training.figures import better, legend_below, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.synthetic.readings import Reading, model_inputs
from training.synthetic.recall import RecallDataset, score_rows
from training.tables import markdown_table, mean_and_deviation
from training.text.question_rows import Row, features, pad


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

JOINED, SEQUENCE = "joined", "in sequence"
ROTATED, STORED, ENCODED = "joined, keys rotated again", "joined as stored", "joined as stored, parallel encoding"
# Of parallel encoding, as far as its authors searched; the best on validation rows is taken.
TEMPERATURES, SCALES = (1.0, 0.8, 0.6, 0.4, 0.2), (1.0, 0.9, 0.8, 0.7)
# Orders in which the documents of the same rows are joined.
NUM_ORDERS = 4
# With documents left out, rows have as many as the training had at most.
FORGOTTEN, OTHER_FORGOTTEN = "the document with the answer left out", "another document left out"


class Recipe(ComparisonRecipe):
    """The first run is the mosaic; `num_rows` are measured for each number of documents."""

    task: Literal["join"]
    num_documents: list[PositiveInt] = Field(min_length=1)
    num_rows: PositiveInt = 200
    batch_size: PositiveInt = 8

    def readings(self, label: str) -> list[str]:
        """Return how a run's model reads: as it was trained, and in all other ways if it was trained in sequence."""
        recipe = self.run_recipes[label]
        if hasattr(recipe.build_config(), "num_persistent_slots"):
            return [JOINED, SEQUENCE]
        if recipe.data.joined:
            return [STORED if recipe.data.positions == "own" else ROTATED, SEQUENCE]
        return [SEQUENCE, ROTATED, STORED, ENCODED]

    @functools.cached_property
    def accuracies(self) -> dict[str, tuple[str, str, int]]:
        """Effects by name: run, reading and number of documents."""
        return {
            f"accuracy ({label}; {reading}; {number} documents)": (label, reading, number)
            for label in self.runs
            for reading in self.readings(label)
            for number in self.num_documents
        }

    @functools.cached_property
    def contrasts(self) -> dict[str, tuple[str, str, str, str, int]]:
        """Differences of the first run, joined, and each reading of every run, by name."""
        first = next(iter(self.runs))
        return {
            f"accuracy ({first}; {JOINED} - {label}; {reading}; {number} documents)": (
                first,
                JOINED,
                label,
                reading,
                number,
            )
            for label in self.runs
            for reading in self.readings(label)
            for number in self.num_documents
            if (label, reading) != (first, JOINED)
        }

    @functools.cached_property
    def others(self) -> dict[str, tuple[str, str, str]]:
        """Effects of orders and of forgetting, by name: run, reading, and what is measured."""
        measures = ("largest difference of orders", FORGOTTEN, OTHER_FORGOTTEN)
        return {
            f"{'accuracy, ' if measure.endswith('out') else ''}{measure} ({label}; {reading})": (
                label,
                reading,
                measure,
            )
            for label in self.runs
            for reading in self.readings(label)
            for measure in measures
        }

    @property
    def effect_names(self) -> list[str]:
        return [*self.accuracies, *self.contrasts, *self.others]


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return accuracies and differences of them, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """

    def values(label: str, reading: str, number: int) -> list[float]:
        return [one["readings"][reading]["accuracy"][str(number)] for one in measured["models"][label]]

    found = {name: mean_effect(values(*place), "") for name, place in recipe.accuracies.items()}
    for name, (first, joined, label, reading, number) in recipe.contrasts.items():
        pairs = zip(values(first, joined, number), values(label, reading, number), strict=True)
        found[name] = mean_effect([one - other for one, other in pairs], "")
    for name, (label, reading, measure) in recipe.others.items():
        found[name] = mean_effect([one["readings"][reading][measure] for one in measured["models"][label]], "")
    return found


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the trainings of the experiment and whether each is finished. Draws no data."""
    return comparison.plan(recipe)


# Rows with another order of documents, or without one


def reordered(row: Row, order: list[int]) -> Row:
    """Return a row whose document `i` is the `order[i]`-th of before."""
    return row._replace(
        documents=[row.documents[number] for number in order], asked=[order.index(n) for n in row.asked]
    )


def without(row: Row, left_out: int) -> Row:
    """Return a row without a document. What is asked of it stays."""
    return row._replace(documents=[one for number, one in enumerate(row.documents) if number != left_out])


def about_one(row: Row, number: int = 0) -> Row:
    """Return a row of which only one answer counts."""
    return row._replace(answers=[0 if answer == number else -1 for answer in row.answers], asked=[row.asked[number]])


class Rows(NamedTuple):
    """Rows to measure on: `by_number` of documents, with the `orders` of some, and those to leave documents out of."""

    by_number: dict[int, list[Row]]
    orders: list[list[Row]]
    whole: list[Row]


def draw_rows(recipe: Recipe, split: str) -> Rows:
    """Return the rows of a split."""
    section = recipe.trainings[0].recipe.data

    def rows(number: int) -> list[Row]:
        dataset = RecallDataset(section, recipe.num_rows, split, number)
        return [dataset.row(index) for index in range(len(dataset))]

    by_number = {number: rows(number) for number in recipe.num_documents}
    whole, rng = rows(section.max_documents), random.Random("orders")
    orders = [rng.sample(range(section.max_documents), section.max_documents) for _ in range(NUM_ORDERS)]
    return Rows(by_number, [[reordered(row, order) for row in whole] for order in orders], whole)


# Measures


def _reading(name: str, model: PreTrainedModel, validation: list[Row], batch_size: int) -> Reading:
    """Return a reading by its name; parallel encoding with the best temperature and scale on validation rows."""
    if name != ENCODED:
        positions: Literal["own", "running"] = "own" if name == STORED else "running"
        return Reading(is_joined=name != SEQUENCE, positions=positions)
    options = [Reading(True, "own", temperature, scale) for temperature in TEMPERATURES for scale in SCALES]
    losses = [score_rows(model, validation, batch_size, one)["loss"] for one in options]
    return options[losses.index(min(losses))]


@torch.no_grad()
def largest_difference(model: PreTrainedModel, orders: list[list[Row]], reading: Reading) -> float:
    """Return the largest difference of a logit of an answer between two orders of the same documents."""
    logits = []
    for rows in orders:
        batch = pad([features(row) for row in rows])
        output = model(**model_inputs(model.config, batch, reading)).logits
        # Documents before it take as many tokens in any order, so that answers stand in the same places.
        logits.append(output[:, :-1][batch["answers"][:, 1:] >= 0])
    return max(float((one - logits[0]).abs().max()) for one in logits[1:])


def _measure_reading(model: PreTrainedModel, rows: Rows, reading: Reading, batch_size: int) -> dict[str, Any]:
    by_number = {str(number): score_rows(model, some, batch_size, reading) for number, some in rows.by_number.items()}
    by_order = [score_rows(model, some, batch_size, reading)["accuracy"] for some in rows.orders]
    ones = [about_one(row) for row in rows.whole]
    others = [(row.asked[0] + 1) % len(row.documents) for row in ones]
    kept = [without(row, other) for row, other in zip(ones, others, strict=True)]
    gone = [without(row, row.asked[0]) for row in ones]
    return {
        "reading": reading._asdict(),
        "accuracy": {number: one["accuracy"] for number, one in by_number.items()},
        "loss": {number: one["loss"] for number, one in by_number.items()},
        "accuracy by order": by_order,
        "largest difference of orders": largest_difference(
            model, [some[:batch_size] for some in rows.orders], reading
        ),
        "one answer": score_rows(model, ones, batch_size, reading)["accuracy"],
        FORGOTTEN: score_rows(model, gone, batch_size, reading)["accuracy"],
        OTHER_FORGOTTEN: score_rows(model, kept, batch_size, reading)["accuracy"],
    }


def _measure_model(recipe: Recipe, training: Trained, rows: Rows, validation: list[Row]) -> dict[str, Any]:
    folder = training.recipe.folder / "best"
    model = load_causal_lm(folder)
    measured = {}
    for name in recipe.readings(training.label):
        if name == ENCODED:
            model.set_attn_implementation("parallel_encoding")
        reading = _reading(name, model, validation, recipe.batch_size)
        measured[name] = _measure_reading(model, rows, reading, recipe.batch_size)
        if name == ENCODED:
            model.set_attn_implementation("sdpa")
    return {"seed": training.seed, "readings": measured}


def _table(recipe: Recipe, models: dict[str, list[dict[str, Any]]]) -> str:
    columns = ["model", "documents are read", *map(str, recipe.num_documents), "orders differ by"]
    columns += ["its document left out", "another left out"]
    rows = []
    for label, of_seeds in models.items():
        for reading in recipe.readings(label):
            ones = [one["readings"][reading] for one in of_seeds]
            numbers = [
                mean_and_deviation([one["accuracy"][str(number)] for one in ones], 3)
                for number in recipe.num_documents
            ]
            largest = f"{max(one['largest difference of orders'] for one in ones):.1g}"
            left_out = [mean_and_deviation([one[name] for one in ones], 3) for name in (FORGOTTEN, OTHER_FORGOTTEN)]
            rows.append([label, reading, *numbers, largest, *left_out])
    return markdown_table(columns, "ll" + "r" * (len(columns) - 2), rows)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw accuracy against the number of documents: a panel for each way to read them.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    models = measured["models"]
    ways = [
        way
        for way in (JOINED, ROTATED, STORED, ENCODED, SEQUENCE)
        if any(way in m[0]["readings"] for m in models.values())
    ]
    figure, axes = new_figure(math.ceil(len(ways) / 2), 2, height=2.5, sharex=True, sharey=True)
    styles = styles_of(models)
    most = recipe.trainings[0].recipe.data.max_documents
    for axis, way in zip(axes.flat, ways, strict=False):
        for label, of_seeds in models.items():
            if way in of_seeds[0]["readings"]:
                of_way = [one["readings"][way]["accuracy"] for one in of_seeds]
                by_seed = [[accuracy[str(number)] for number in recipe.num_documents] for accuracy in of_way]
                plot_seeds(axis, recipe.num_documents, by_seed, label=label, **styles[label])
        axis.axvline(most, color="0.3", ls=":", lw=1.2)
        axis.set_xscale("log", base=2)
        axis.set(ylim=(-0.02, 1.02), title=textwrap.fill(way, 30))
        axis.set_xticks(recipe.num_documents, list(map(str, recipe.num_documents)))
    for axis in axes.flat[len(ways) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(better("accuracy of answers", "higher"))
    for column in axes.T:
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.set_xlabel("documents")
        lowest.tick_params(labelbottom=True)
    legend_below(figure, axes)
    note = f"{seeds_note(len(recipe.seeds))} Trainings had up to {most} documents (dotted line)."
    save_figure(figure, folder / f"{recipe.name}.png", "Answers from documents read alone or in sequence", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    rows, validation = draw_rows(recipe, "test"), draw_rows(recipe, "validation").whole
    models = {
        label: [_measure_model(recipe, one, rows, validation) for one in recipe.trainings if one.label == label]
        for label in recipe.runs
    }
    return {"measured": {"models": models}, "table": _table(recipe, models)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

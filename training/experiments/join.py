# SPDX-License-Identifier: Apache-2.0
"""Documents read alone and joined, against documents read in sequence: how models answer behind more and more of them.

Models are trained on rows of a few documents and a question, in the reading that the recipe gives each. Then they
answer behind 2 to 64 documents, in each reading that a model of their kind has (see `training.synthetic.readings`).
Besides, documents are joined in all orders, and one is left out: that which has the answer, or another. What a mosaic
answers is compared with what `MosaicMemory.union` and `forget` give.
"""

import functools
import itertools
import math
import textwrap
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from transformers import PreTrainedModel

from modeling_memory_mosaic import MosaicMemory
from training.claims import Effects, mean_effect
from training.evaluate import load_causal_lm
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
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
# Rows with so many documents are joined in each order: 24.
NUM_ORDERED = 4
# With documents left out, rows have as many as the training had at most.
FORGOTTEN, OTHER_FORGOTTEN = "the document with the answer left out", "another document left out"
WHOLE = "one answer"
OF_ORDERS, OF_OBJECTS = "largest difference of orders", "largest difference of memory objects"


class Recipe(ComparisonRecipe):
    """The first run is the mosaic; `num_rows` are measured for each number of documents."""

    task: Literal["join"]
    num_documents: list[PositiveInt] = Field(min_length=1)
    num_rows: PositiveInt = 200
    batch_size: PositiveInt = 8

    def readings(self, label: str) -> list[str]:
        """Return how a run's model reads: as it was trained, and in all other ways if it was trained in sequence."""
        recipe = self.run_recipes[label]
        if self.is_mosaic(label):
            return [JOINED, SEQUENCE]
        if recipe.data.joined:
            return [STORED if recipe.data.positions == "own" else ROTATED, SEQUENCE]
        return [SEQUENCE, ROTATED, STORED, ENCODED]

    @functools.cached_property
    def scores(self) -> dict[str, tuple[str, str, str, int]]:
        """Effects by name: measure, run, reading and number of documents."""
        return {
            f"{measure} ({label}; {reading}; {number} documents)": (measure, label, reading, number)
            for measure in ("accuracy", "loss")
            for label in self.runs
            for reading in self.readings(label)
            for number in self.num_documents
        }

    @functools.cached_property
    def contrasts(self) -> dict[str, tuple[str, str, str, int]]:
        """Differences of the first run, joined, and each reading of every run, by name: as in `scores`."""
        own = f"{next(iter(self.runs))}; {JOINED}"
        return {
            f"{measure} ({own} - {label}; {reading}; {number} documents)": (measure, label, reading, number)
            for measure, label, reading, number in self.scores.values()
            if f"{label}; {reading}" != own
        }

    @functools.cached_property
    def others(self) -> dict[str, tuple[str, str, str]]:
        """Effects of orders, of forgetting and of memory objects, by name: run, reading, and what is measured."""
        found = {}
        for label in self.runs:
            for reading in self.readings(label):
                for measure in (OF_ORDERS, FORGOTTEN, OTHER_FORGOTTEN):
                    words = measure if measure == OF_ORDERS else f"accuracy, {measure}"
                    found[f"{words} ({label}; {reading})"] = (label, reading, measure)
                if self.is_mosaic(label) and reading == JOINED:
                    found[f"{OF_OBJECTS} ({label}; {reading})"] = (label, reading, OF_OBJECTS)
        return found

    @functools.cached_property
    def falls(self) -> dict[str, tuple[str, str, str]]:
        """How far accuracy falls if a document is left out, by name: run, reading, and which document."""
        return {
            f"fall of accuracy, {measure} ({label}; {reading})": (label, reading, measure)
            for label, reading, measure in self.others.values()
            if measure in (FORGOTTEN, OTHER_FORGOTTEN)
        }

    @property
    def effect_names(self) -> list[str]:
        return [*self.scores, *self.contrasts, *self.others, *self.falls]


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return accuracies, losses and differences of them, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """

    def values(label: str, reading: str, measure: str, number: int | None = None) -> list[float]:
        found = [one["readings"][reading][measure] for one in measured["models"][label]]
        return found if number is None else [one[str(number)] for one in found]

    def differences(one: list[float], other: list[float]) -> list[float]:
        return [a - b for a, b in zip(one, other, strict=True)]

    units, first = {"accuracy": "", "loss": "nats"}, next(iter(recipe.runs))
    found = {
        name: mean_effect(values(label, reading, measure, number), units[measure])
        for name, (measure, label, reading, number) in recipe.scores.items()
    }
    for name, (measure, label, reading, number) in recipe.contrasts.items():
        own = values(first, JOINED, measure, number)
        found[name] = mean_effect(differences(own, values(label, reading, measure, number)), units[measure])
    for name, place in recipe.others.items():
        found[name] = mean_effect(values(*place), "")
    for name, (label, reading, measure) in recipe.falls.items():
        found[name] = mean_effect(differences(values(label, reading, WHOLE), values(label, reading, measure)), "")
    return found


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

    def rows(number: int, num_rows: int = recipe.num_rows) -> list[Row]:
        return RecallDataset(section, num_rows, split, number).rows()

    num_ordered = min(NUM_ORDERED, section.max_documents)
    few = rows(num_ordered, recipe.batch_size)
    orders = [[reordered(row, list(order)) for row in few] for order in itertools.permutations(range(num_ordered))]
    by_number = {number: rows(number) for number in recipe.num_documents}
    return Rows(by_number, orders, rows(section.max_documents))


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


@torch.no_grad()
def largest_difference_of_objects(model: Any, rows: list[Row]) -> float:
    """Return the largest difference of a logit of an answer between the reading of the training and memory objects.

    Documents are memorized one by one and joined. Then the first that has an answer is forgotten, and rows without it
    are read.
    """
    found = []
    for row in rows:
        texts = {str(number): torch.tensor([ids], device=model.device) for number, ids in enumerate(row.documents)}
        memory = MosaicMemory.union([model.memorize(ids, source=name) for name, ids in texts.items()])
        question = torch.tensor([row.question], device=model.device)
        for left_out in (None, row.asked[0]):
            if left_out is not None:
                memory.forget(str(left_out))
            batch = pad([features(row if left_out is None else without(row, left_out))])
            batch = {name: part.to(model.device) for name, part in batch.items()}
            read = model(**model_inputs(model.config, batch, Reading())).logits[batch["is_question"]]
            found.append(float((model(**memory.prompt(question)).logits[0] - read).abs().max()))
    return max(found)


def _measure_reading(model: PreTrainedModel, rows: Rows, reading: Reading, batch_size: int) -> dict[str, Any]:
    by_number = {str(number): score_rows(model, some, batch_size, reading) for number, some in rows.by_number.items()}
    ones = [about_one(row) for row in rows.whole]
    others = [(row.asked[0] + 1) % len(row.documents) for row in ones]
    kept = [without(row, other) for row, other in zip(ones, others, strict=True)]
    gone = [without(row, row.asked[0]) for row in ones]
    return {
        "reading": reading._asdict(),
        "accuracy": {number: one["accuracy"] for number, one in by_number.items()},
        "loss": {number: one["loss"] for number, one in by_number.items()},
        OF_ORDERS: largest_difference(model, rows.orders, reading),
        WHOLE: score_rows(model, ones, batch_size, reading)["accuracy"],
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
        if recipe.is_mosaic(training.label) and name == JOINED:
            measured[name][OF_OBJECTS] = largest_difference_of_objects(model, rows.whole[: recipe.batch_size])
        if name == ENCODED:
            model.set_attn_implementation("sdpa")
    return {"seed": training.seed, "readings": measured}


def _table(recipe: Recipe, models: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of accuracies, orders and documents left out, and one of losses."""
    columns = ["model", "documents are read", *map(str, recipe.num_documents)]
    by_measure: dict[str, list[list[str]]] = {"accuracy": [], "loss": []}
    for label, of_seeds in models.items():
        for reading in recipe.readings(label):
            ones = [one["readings"][reading] for one in of_seeds]
            for measure, rows in by_measure.items():
                numbers = [[one[measure][str(number)] for one in ones] for number in recipe.num_documents]
                rows.append([label, reading, *(mean_and_deviation(each, 3) for each in numbers)])
            largest = f"{max(one[OF_ORDERS] for one in ones):.1g}"
            left_out = [mean_and_deviation([one[name] for one in ones], 3) for name in (FORGOTTEN, OTHER_FORGOTTEN)]
            by_measure["accuracy"][-1] += [largest, *left_out]
    more = ["orders differ by", "its document left out", "another left out"]
    accuracies = markdown_table([*columns, *more], "ll" + "r" * (len(columns) + 1), by_measure["accuracy"])
    losses = markdown_table(columns, "ll" + "r" * (len(columns) - 2), by_measure["loss"])
    return f"{accuracies}\n\nLoss in nats for each token of an answer:\n\n{losses}"


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
    found = comparison.measure_all(recipe, _measure_model, rows, validation)
    models = {label: [one for training, one in found if training.label == label] for label in recipe.runs}
    return {"measured": {"models": models}, "table": _table(recipe, models)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

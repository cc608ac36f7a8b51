# SPDX-License-Identifier: Apache-2.0
"""Bounded memories of documents: how many facts are recalled if each document may leave few pairs.

Every document is read alone within a bound, before any question is known, and several questions are asked of the
joined memories, also of more than the training had. A Memory Mosaic forgets pairs by a policy, head by head. A
transformer that was trained to read documents alone keeps the last tokens of each document, with or without its first
(attention sinks), or tokens at random.
"""

import contextlib
import itertools
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch.nn.utils.rnn import pad_sequence

from modeling_memory_mosaic import MosaicMemory, bounded
from training.claims import Effects, mean_effect
from training.evaluate import load_causal_lm
from training.experiments import comparison
from training.experiments.bound import FORGOTTEN_BY, NUM_SINKS
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.figures import better, legend_below, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.synthetic.readings import Reading, model_inputs
from training.synthetic.recall import RecallDataset
from training.tables import markdown_table, mean_and_deviation
from training.text.question_rows import Row, features, pad


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

ALL, LAST, AT_RANDOM, SINKS = "all pairs", "last tokens", "random tokens", "first and last tokens"
# What tells a measurement from others.
PLACE = ("label", "way", "budget", "documents")


class Recipe(ComparisonRecipe):
    """Each model answers behind `num_documents` documents of at most `budgets` pairs each."""

    task: Literal["bound_recall"]
    num_documents: list[PositiveInt] = Field(min_length=1)
    num_rows: PositiveInt = 50
    budgets: list[PositiveInt] = Field(min_length=1)
    policies: list[str] = Field(min_length=1)

    def ways(self, label: str) -> list[str]:
        """Return how a run's model forgets."""
        return self.policies if self.is_mosaic(label) else [LAST, SINKS, AT_RANDOM]

    @property
    def settings(self) -> list[tuple[str, str, int, int]]:
        """Run, way, budget and number of documents of each measurement; the budget of `all pairs` is 0."""
        return [
            (label, *place, number)
            for label in self.runs
            for place in [(ALL, 0), *((way, budget) for way in self.ways(label) for budget in self.budgets)]
            for number in self.num_documents
        ]

    @property
    def effect_names(self) -> list[str]:
        return [f"accuracy ({setting_name(*one)})" for one in self.settings]


def setting_name(label: str, way: str, budget: int, number: int) -> str:
    """Return a measurement's name in effects."""
    return f"{label}; {way}" + (f" of {budget}" if budget else "") + f"; {number} documents"


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return accuracies with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    values = {tuple(one[name] for name in PLACE): one["accuracy"] for one in measured["settings"]}
    return {f"accuracy ({setting_name(*one)})": mean_effect(values[one], "") for one in recipe.settings}


def _num_right(logits: torch.Tensor, row: Row) -> tuple[int, int]:
    """Return how many answers are right, and their number, by logits `(Q, V)` behind the tokens of a question."""
    likeliest = logits[:-1].argmax(-1).tolist()
    wrong = {
        n for token, t, n in zip(likeliest, row.question[1:], row.answers[1:], strict=True) if n >= 0 and token != t
    }
    num_answers = len({number for number in row.answers if number >= 0})
    return num_answers - len(wrong), num_answers


def _memorize(model: Any, documents: list[list[int]]) -> list[MosaicMemory]:
    ids = pad_sequence([torch.tensor(one) for one in documents], batch_first=True)
    lengths = torch.tensor([len(one) for one in documents])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    memories: list[MosaicMemory] = model.memorize(ids, mask, source=list(map(str, range(len(ids)))))
    return memories


@torch.no_grad()
def mosaic_logits(model: Any, rows: list[Row], way: str, budget: int) -> list[torch.Tensor]:
    """Return the logits `(Q, V)` behind each question, of documents that were memorized within a bound."""
    with contextlib.nullcontext() if way == ALL else bounded(model, max_pairs=budget, policy=way):
        memories = _memorize(model, [ids for row in rows for ids in row.documents])
    logits, rest = [], iter(memories)
    for row in rows:
        memory = MosaicMemory.union(list(itertools.islice(rest, len(row.documents))))
        logits.append(model(**memory.prompt(torch.tensor([row.question]))).logits[0])
    return logits


def _kept_places(way: str, budget: int, length: int, rng: random.Random) -> set[int]:
    """Return the places of a document's tokens that stay in sight."""
    places, sinks = range(length), min(NUM_SINKS, budget // 2) if way == SINKS else 0
    if way == AT_RANDOM:
        return set(rng.sample(places, min(budget, length)))
    return {*places[:sinks], *places[sinks - budget :]}


def _seen(row: Row, way: str, budget: int) -> torch.Tensor:
    """Return which tokens of a row `(T,)` its question may see."""
    is_kept, rng = [], random.Random(str(row.question))
    for document in row.documents:
        chosen = _kept_places(way, budget, len(document), rng)
        is_kept += [place in chosen for place in range(len(document))]
    return torch.tensor(is_kept + [True] * len(row.question))


@torch.no_grad()
def transformer_logits(model: Any, rows: list[Row], way: str, budget: int) -> list[torch.Tensor]:
    """Do as [`mosaic_logits`]: questions see few tokens of each document, and themselves."""
    logits = []
    for row in rows:
        batch = pad([features(row)])
        arguments = model_inputs(model.config, batch, Reading(True, "own"))
        if way != ALL:
            is_question = batch["is_question"][:, None, :, None]
            arguments["attention_mask"] = arguments["attention_mask"] & (_seen(row, way, budget) | ~is_question)
        logits.append(model(**arguments).logits[0][batch["is_question"][0]])
    return logits


def _measure_training(
    recipe: Recipe, training: Trained, rows: dict[int, list[Row]]
) -> dict[tuple[str, str, int, int], float]:
    model: Any = load_causal_lm(training.recipe.folder / "best")
    logits_of = mosaic_logits if recipe.is_mosaic(training.label) else transformer_logits
    found = {}
    for label, way, budget, number in recipe.settings:
        if label == training.label:
            torch.manual_seed(0)  # of a policy that draws
            answers = logits_of(model, rows[number], way, budget)
            counts = [_num_right(logits, row) for logits, row in zip(answers, rows[number], strict=True)]
            found[label, way, budget, number] = sum(right for right, _ in counts) / sum(number for _, number in counts)
    return found


def _table(recipe: Recipe, accuracy: dict[tuple[str, str, int, int], list[float]]) -> str:
    rows = []
    for label in recipe.runs:
        for number in recipe.num_documents:
            whole = mean_and_deviation(accuracy[label, ALL, 0, number], 3)
            for way in recipe.ways(label):
                cells = [mean_and_deviation(accuracy[label, way, budget, number], 3) for budget in recipe.budgets]
                rows.append([label, str(number), way, *cells, whole])
    columns = ["model", "documents", "keeps by", *(f"{budget} pairs" for budget in recipe.budgets), ALL]
    return markdown_table(columns, "lrl" + "r" * (len(recipe.budgets) + 1), rows)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw accuracy against the pairs that a document leaves: a panel for each number of documents.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    figure, axes = new_figure(1, len(recipe.num_documents), height=3.6, sharey=True)
    accuracy = {tuple(one[name] for name in PLACE): one["accuracy"] for one in measured["settings"]}
    names = {
        (label, way): f"forgets {FORGOTTEN_BY.get(way, way)}" if recipe.is_mosaic(label) else f"{label}: {way}"
        for label in recipe.runs
        for way in recipe.ways(label)
    }
    styles = styles_of(names.values())
    for axis, documents in zip(axes[0], recipe.num_documents, strict=True):
        for (label, way), name in names.items():
            by_seed = np.array([accuracy[label, way, budget, documents] for budget in recipe.budgets]).T
            plot_seeds(axis, recipe.budgets, by_seed, label=name, marker=".", **styles[name])
        axis.set_xscale("log", base=2)
        axis.set_xticks(recipe.budgets, list(map(str, recipe.budgets)))
        axis.set(title=f"{documents} documents", xlabel="pairs left of each, in a head", ylim=(-0.02, 1.02))
    axes[0, 0].set_ylabel(better("accuracy of answers", "higher"))
    legend_below(figure, axes)
    note = seeds_note(len(recipe.seeds))
    save_figure(figure, folder / f"{recipe.name}.png", "Answers from documents that leave few pairs", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    section = recipe.trainings[0].recipe.data
    rows = {n: RecallDataset(section, recipe.num_rows, "test", n).rows() for n in recipe.num_documents}
    accuracy: dict[tuple[str, str, int, int], list[float]] = {}
    for _, found in comparison.measure_all(recipe, _measure_training, rows):
        for place, value in found.items():
            accuracy.setdefault(place, []).append(value)
    settings = [{**dict(zip(PLACE, one, strict=True)), "accuracy": accuracy[one]} for one in recipe.settings]
    return {"measured": {"settings": settings}, "table": _table(recipe, accuracy)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

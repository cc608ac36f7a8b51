# SPDX-License-Identifier: Apache-2.0
"""Bounded memories of documents: how many facts are recalled if each document may leave few pairs.

Every document is read alone within a bound, before any question is known, and several questions are asked of the
joined memories. A Memory Mosaic forgets pairs by a policy, head by head. A transformer that was trained to read
documents alone keeps the last tokens of each document, or tokens at random.
"""

import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt

from modeling_memory_mosaic import MosaicMemory, bounded
from training.claims import Effects, mean_effect
from training.evaluate import load_causal_lm
from training.experiments import comparison
from training.experiments.bound import FORGOTTEN_BY
from training.experiments.comparison import ComparisonRecipe, Trained, summary
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.synthetic.readings import Reading, model_inputs
from training.synthetic.recall import RecallDataset
from training.tables import markdown_table, mean_and_deviation
from training.text.question_rows import Row, features, pad


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

ALL, LAST, AT_RANDOM = "all pairs", "last tokens", "random tokens"


class Recipe(ComparisonRecipe):
    """Each model answers behind `num_documents` documents of at most `budgets` pairs each."""

    task: Literal["bound_recall"]
    num_documents: PositiveInt
    num_rows: PositiveInt = 100
    budgets: list[PositiveInt] = Field(min_length=1)
    policies: list[str] = Field(min_length=1)

    def ways(self, label: str) -> list[str]:
        """Return how a run's model forgets."""
        return self.policies if self.is_mosaic(label) else [LAST, AT_RANDOM]

    @property
    def settings(self) -> list[tuple[str, str, int]]:
        """Run, way and budget of each measurement; the budget of `all pairs` is 0."""
        return [
            (label, *place)
            for label in self.runs
            for place in [(ALL, 0), *((way, budget) for way in self.ways(label) for budget in self.budgets)]
        ]

    @property
    def effect_names(self) -> list[str]:
        return [f"accuracy ({setting_name(*one)})" for one in self.settings]


def setting_name(label: str, way: str, budget: int) -> str:
    """Return a measurement's name in effects."""
    return f"{label}; {way}" + (f" of {budget}" if budget else "")


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return accuracies with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    values = {(one["label"], one["way"], one["budget"]): one["accuracy"] for one in measured["settings"]}
    return {f"accuracy ({setting_name(*one)})": mean_effect(values[one], "") for one in recipe.settings}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the trainings of the experiment and whether each is finished. Draws no data."""
    return comparison.plan(recipe)


def _num_right(logits: torch.Tensor, row: Row) -> tuple[int, int]:
    """Return how many answers are right, and their number, by logits `(Q, V)` behind the tokens of a question."""
    likeliest = logits[:-1].argmax(-1).tolist()
    wrong = {
        n for token, t, n in zip(likeliest, row.question[1:], row.answers[1:], strict=True) if n >= 0 and token != t
    }
    num_answers = len({number for number in row.answers if number >= 0})
    return num_answers - len(wrong), num_answers


@torch.no_grad()
def mosaic_logits(model: Any, row: Row, way: str, budget: int) -> torch.Tensor:
    """Return the logits `(Q, V)` behind a question, of documents that were memorized within a bound."""

    def memorize() -> list[MosaicMemory]:
        texts = enumerate(row.documents)
        return [model.memorize(torch.tensor([ids]), source=str(number)) for number, ids in texts]

    if way == ALL:
        memories = memorize()
    else:
        with bounded(model, max_pairs=budget, policy=way):
            memories = memorize()
    logits: torch.Tensor = model(**MosaicMemory.union(memories).prompt(torch.tensor([row.question]))).logits[0]
    return logits


@torch.no_grad()
def transformer_logits(model: Any, row: Row, way: str, budget: int) -> torch.Tensor:
    """Do as [`mosaic_logits`]: the question sees few tokens of each document, and itself."""
    batch = pad([features(row)])
    arguments = model_inputs(model.config, batch, Reading(True, "own"))
    if way != ALL:
        is_kept, rng = [], random.Random(str(row.question))
        for document in row.documents:
            places = range(len(document))
            chosen = set(places[-budget:]) if way == LAST else set(rng.sample(places, min(budget, len(places))))
            is_kept += [place in chosen for place in places]
        is_seen = torch.tensor(is_kept + [True] * len(row.question))
        is_question = batch["is_question"][:, None, :, None]
        arguments["attention_mask"] = arguments["attention_mask"] & (is_seen | ~is_question)
    logits: torch.Tensor = model(**arguments).logits[0]
    return logits[batch["is_question"][0]]


def _measure_training(recipe: Recipe, training: Trained, rows: list[Row]) -> dict[tuple[str, int], float]:
    model: Any = load_causal_lm(training.recipe.folder / "best")
    logits_of = mosaic_logits if hasattr(model.config, "num_persistent_slots") else transformer_logits
    found = {}
    for label, way, budget in recipe.settings:
        if label == training.label:
            torch.manual_seed(0)  # of a policy that draws
            counts = [_num_right(logits_of(model, row, way, budget), row) for row in rows]
            found[way, budget] = sum(right for right, _ in counts) / sum(number for _, number in counts)
    return found


def _table(recipe: Recipe, accuracy: dict[tuple[str, str, int], list[float]]) -> str:
    rows = []
    for label in recipe.runs:
        whole = mean_and_deviation(accuracy[label, ALL, 0], 3)
        for way in recipe.ways(label):
            cells = [mean_and_deviation(accuracy[label, way, budget], 3) for budget in recipe.budgets]
            rows.append([label, way, *cells, whole])
    columns = ["model", "keeps by", *(f"{budget} pairs" for budget in recipe.budgets), ALL]
    return markdown_table(columns, "ll" + "r" * (len(recipe.budgets) + 1), rows)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw accuracy against the pairs that a document leaves.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    figure, axes = new_figure(1, 1, height=4.2)
    axis = axes[0, 0]
    accuracy = {(one["label"], one["way"], one["budget"]): one["accuracy"] for one in measured["settings"]}
    names = {
        (label, way): f"forgets {FORGOTTEN_BY.get(way, way)}" if recipe.is_mosaic(label) else f"{label}: {way}"
        for label in recipe.runs
        for way in recipe.ways(label)
    }
    styles = styles_of(names.values())
    for (label, way), name in names.items():
        by_seed = np.array([accuracy[label, way, budget] for budget in recipe.budgets]).T
        plot_seeds(axis, recipe.budgets, by_seed, label=name, marker=".", **styles[name])
    axis.set_xscale("log", base=2)
    axis.set_xticks(recipe.budgets, list(map(str, recipe.budgets)))
    axis.set(xlabel="pairs that a document leaves in each head", ylim=(-0.02, 1.02))
    axis.set_ylabel(better("accuracy of answers", "higher"))
    label_lines(axes)
    note = seeds_note(len(recipe.seeds))
    save_figure(figure, folder / f"{recipe.name}.png", "Answers from documents that leave few pairs", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    dataset = RecallDataset(recipe.trainings[0].recipe.data, recipe.num_rows, "test", recipe.num_documents)
    rows = [dataset.row(index) for index in range(len(dataset))]
    accuracy: dict[tuple[str, str, int], list[float]] = {}
    for training in recipe.trainings:
        for place, value in _measure_training(recipe, training, rows).items():
            accuracy.setdefault((training.label, *place), []).append(value)
    settings = [
        {"label": label, "way": way, "budget": budget, "accuracy": accuracy[label, way, budget]}
        for label, way, budget in recipe.settings
    ]
    return {"measured": {"settings": settings}, "table": _table(recipe, accuracy)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

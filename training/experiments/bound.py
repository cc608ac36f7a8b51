# SPDX-License-Identifier: Apache-2.0
"""Bounded memories: the loss on long texts against the number of pairs that a head may hold, by what it forgets.

A Memory Mosaic forgets pairs by a policy (see `modeling_memory_mosaic.bounded`), head by head. A rotary transformer
keeps the last tokens, a window, or the last and the first few, which are its attention sinks. Losses are of the later
part of each text, where any of these bounds has been reached.
"""

import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel
from typing_extensions import Self

from modeling_memory_mosaic import bounded
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME, memory_kwargs
from training.baselines.windowed import NAME, windowed_arguments
from training.claims import Effect, Effects, crossed_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.experiments.position_loss import TextSection, cut_windows
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.recipe import SourceSection
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

ALL = "all pairs"
WINDOW, SINKS = "window", "window and sinks"
NUM_SINKS = 4
# Which pairs a policy forgets, in words.
FORGOTTEN_BY = {
    "fifo": "the oldest",
    "lru": "the least recently used",
    "usage": "the least used",
    "surprise": "the least surprising",
    "random": "at random",
}
# Tokens that a mosaic reads at a time.
CHUNK_LENGTH = 512


class Recipe(ComparisonRecipe):
    """Each way to forget is compared with all pairs of its model, with its first way, and those of the first run."""

    task: Literal["bound"]
    texts: dict[str, TextSection] = Field(min_length=1)
    context_length: PositiveInt
    measured_from: PositiveInt
    budgets: list[PositiveInt] = Field(min_length=1)
    policies: list[str] = Field(min_length=1)
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not max(self.budgets) <= self.measured_from < self.context_length:
            raise ValueError(
                f"`measured_from` {self.measured_from} must be at least the largest of `budgets`, so that all of them "
                f"have been reached, and less than `context_length` {self.context_length}"
            )
        return self

    def ways(self, label: str) -> list[str]:
        """Return how a run's model forgets."""
        return self.policies if self.is_mosaic(label) else [WINDOW, SINKS]

    @property
    def contrasts(self) -> list["Contrast"]:
        """Differences of loss that are measured of each text."""
        first = next(iter(self.runs))
        found = []
        for label, budget in itertools.product(self.runs, self.budgets):
            simplest, *_ = ways = self.ways(label)
            for way in ways:
                one = (label, way, budget)
                found.append(Contrast(one, (label, ALL, 0)))
                if way != simplest:
                    found.append(Contrast(one, (label, simplest, budget)))
                if label != first:
                    found += [Contrast(one, (first, own, budget)) for own in self.ways(first)]
        return found

    @property
    def effect_names(self) -> list[str]:
        return [f"{text}: {one.name}" for text in self.texts for one in self.contrasts]


class Contrast(NamedTuple):
    """The loss of one model, way of forgetting and budget, less that of another."""

    one: tuple[str, str, int]
    other: tuple[str, str, int]

    @property
    def name(self) -> str:
        def words(place: tuple[str, str, int]) -> str:
            label, way, budget = place
            return f"{label}, {way}" + (f" of {budget}" if budget else "")

        return f"loss, {words(self.one)} - {words(self.other)}"


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the effects of each text, which were computed from windows that results do not keep.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    return {name: Effect(**measured["effects"][name]) for name in recipe.effect_names}


# Losses


@torch.no_grad()
def _mosaic_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of each token but the first `(B, T - 1)`, read in chunks behind one memory."""
    losses, cache = [], None
    for start in range(0, ids.shape[1], CHUNK_LENGTH):
        chunk, following = ids[:, start : start + CHUNK_LENGTH], ids[:, start + 1 : start + CHUNK_LENGTH + 1]
        output: Any = model(chunk, use_cache=True, **memory_kwargs(cache))
        cache = output[MEMORY_NAME]
        logits = output.logits[:, : following.shape[1]].float()
        losses.append(cross_entropy(logits.transpose(1, 2), following, reduction="none"))
    return torch.cat(losses, dim=1)


@torch.no_grad()
def _transformer_losses(model: Any, ids: torch.Tensor, max_pairs: int, sinks: int) -> torch.Tensor:
    arguments = windowed_arguments(model, ids.shape[1], max_pairs, sinks)
    logits = model(ids, **arguments).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def text_losses(model: Any, ids: torch.Tensor, way: str, budget: int) -> torch.Tensor:
    """Return the loss of each token but the first `(B, T - 1)` of texts `(B, T)`.

    Args:
        way: a policy of `bounded`, `window`, `window and sinks`, or `all pairs`.
        budget: pairs that a head may hold.
    """
    if not hasattr(model.config, "num_persistent_slots"):
        budget = budget or ids.shape[1]
        return _transformer_losses(model, ids, budget, NUM_SINKS if way == SINKS else 0)
    if way == ALL:
        return _mosaic_losses(model, ids)
    with bounded(model, max_pairs=budget, policy=way):
        return _mosaic_losses(model, ids)


def _losses_of(recipe: Recipe, training: Trained, ids: torch.Tensor) -> dict[tuple[str, int], np.ndarray]:
    """Return the mean loss of each window's later part `(windows,)`, by way and budget."""
    model, _ = training.load()
    if not hasattr(model.config, "num_persistent_slots"):
        model.set_attn_implementation(NAME)
    settings = [(ALL, 0), *((way, budget) for way in recipe.ways(training.label) for budget in recipe.budgets)]
    found = {}
    for way, budget in tqdm(settings, desc=training.name, unit="setting"):
        parts = [text_losses(model, part, way, budget) for part in ids.to(model.device).split(recipe.batch_size)]
        found[way, budget] = torch.cat(parts)[:, recipe.measured_from - 1 :].mean(1).double().cpu().numpy()
    return found


def _measure_text(recipe: Recipe, text: TextSection) -> tuple[dict[tuple[str, str, int], np.ndarray], list[int]]:
    _, tokenizer = recipe.trainings[0].load()
    documents = load_stories(**text.model_dump(include=set(SourceSection.model_fields)))
    ids, numbers = cut_windows(documents, tokenizer, recipe.context_length, text.windows, text.num_windows)
    losses: dict[tuple[str, str, int], list[np.ndarray]] = {}
    for training, found in comparison.measure_all(recipe, _losses_of, ids):
        for place, values in found.items():
            losses.setdefault((training.label, *place), []).append(values)
    return {place: np.stack(values) for place, values in losses.items()}, numbers


def _table(recipe: Recipe, means: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for text, entries in means.items():
        for label in recipe.runs:
            own = {(one["way"], one["budget"]): one["loss"] for one in entries if one["label"] == label}
            for way in recipe.ways(label):
                losses = [f"{own[way, budget]:.3f}" for budget in recipe.budgets]
                rows.append([text, label, way, *losses, f"{own[ALL, 0]:.3f}"])
    return markdown_table(
        ["text", "model", "forgets by", *map(str, recipe.budgets), ALL], "lll" + "r" * (len(recipe.budgets) + 1), rows
    )


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the loss against the budget: a panel for each text and mosaic, transformers in all of them.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    mosaics = [label for label in recipe.runs if recipe.is_mosaic(label)]
    others = [label for label in recipe.runs if label not in mosaics]
    panels = list(itertools.product(measured["losses"], mosaics))
    figure, axes = new_figure(len(panels), 1, height=3.3)
    for axis, (text, mosaic) in zip(axes[:, 0], panels, strict=True):
        seeds = {(one["label"], one["way"], one["budget"]): one["seeds"] for one in measured["losses"][text]}
        names = {(mosaic, way): f"forgets {FORGOTTEN_BY.get(way, way)}" for way in recipe.policies}
        names |= {(label, way): f"{label}, {way}" for label in others for way in (WINDOW, SINKS)}
        styles = styles_of(names.values())
        for (label, way), name in names.items():
            by_seed = np.array([seeds[label, way, budget] for budget in recipe.budgets]).T
            plot_seeds(axis, recipe.budgets, by_seed, label=name, marker=".", **styles[name])
        axis.axhline(float(np.median(seeds[mosaic, ALL, 0])), color="#0072B2", lw=1.2, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(recipe.budgets, list(map(str, recipe.budgets)))
        axis.set(title=f"{mosaic}: {text}", ylabel=better("loss (nats per token)", "lower"))
    axes[-1, 0].set_xlabel("pairs that a head may hold")
    label_lines(axes)
    note = f"{seeds_note(len(recipe.seeds))} Dotted: the mosaic with all pairs."
    save_figure(figure, folder / f"{recipe.name}.png", "Loss behind a memory that holds few pairs", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    means, found = {}, {}
    for name, text in recipe.texts.items():
        losses, numbers = _measure_text(recipe, text)
        means[name] = [
            {
                "label": label,
                "way": way,
                "budget": budget,
                "loss": float(values.mean()),
                "seeds": values.mean(1).tolist(),
            }
            for (label, way, budget), values in losses.items()
        ]
        for one in recipe.contrasts:
            found[f"{name}: {one.name}"] = crossed_effect(losses[one.one] - losses[one.other], numbers, "nats")
    measured = {"losses": means, "effects": {name: effect._asdict() for name, effect in found.items()}}
    return {"measured": measured, "table": _table(recipe, means)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    data = {
        name: source_provenance(**text.model_dump(include=set(SourceSection.model_fields)))
        for name, text in recipe.texts.items()
    }
    return comparison.run_comparison(recipe, restart, data, _measure)

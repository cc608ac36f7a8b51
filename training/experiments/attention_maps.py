# SPDX-License-Identifier: Apache-2.0
"""Attention of the last position in each head (Memory Mosaics, Figs. 12, 13, 15).

Maps are of one-block models. How the peak of a head follows its leak coefficient is measured in every block of deeper
mosaics, which have more heads. The weights come from the models' own `output_attentions`, as means over windows.
Column t of a mosaic's map is the pair of token t, so that the last column, whose pair is not complete yet, is 0; in a
transformer it is token t itself.
"""

import functools
import itertools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import PreTrainedModel
from typing_extensions import Self

from modeling_memory_mosaic import MemoryMosaicForCausalLM
from training.claims import Effects, mean_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, blocks, plan, summary
from training.experiments.position_loss import cut_windows
from training.figures import FEWEST_NUMBERS, legend_below, new_figure, save_figure, styles_of
from training.recipe import SourceSection
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

# The level of a map is measured between the first and the newest positions, in bins.
FIRST, NEWEST, BIN = 4, 32, 8
# Measures of a map whose differences between models are effects.
COMPARED = ("sink", "unevenness")

# Of the heads of one block in the picture.
_HEAD_STYLES = styles_of(f"head {head}" for head in range(30))

# By label, length and seed: `(L, H, T)`.
Maps = dict[tuple[str, int, int], np.ndarray]


class Recipe(ComparisonRecipe):
    """The first run is the mosaic. The `lengths` are in tokens; the first is that of the training."""

    task: Literal["attention_maps"]
    text: SourceSection
    lengths: list[int] = Field(min_length=1)
    num_windows: PositiveInt
    heads_depth: PositiveInt
    batch_size: PositiveInt = 4

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if min(self.lengths) < 4 * NEWEST:
            raise ValueError(f"`lengths` are {self.lengths}: each needs at least {4 * NEWEST} tokens")
        return self

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"model_args": {"num_hidden_layers": 1}}]

    @functools.cached_property
    def deep_trainings(self) -> list[Trained]:
        """The mosaics of `heads_depth` blocks."""
        variant = {"model_args": {"num_hidden_layers": self.heads_depth}}
        return [self._training(next(iter(self.runs)), variant, seed) for seed in self.seeds]

    @property
    def all_trainings(self) -> list[Trained]:
        return [*self.trainings, *self.deep_trainings]

    @property
    def rank_name(self) -> str:
        """Name of the effect that relates the leak coefficients of heads to the widths of their peaks."""
        return f"rank correlation of leak coefficient and peak width, {blocks(self.heads_depth)}"

    @property
    def own_measures(self) -> dict[str, tuple[str, str, int]]:
        """By name: measure, label and length of each effect that is a measure of one model's maps."""
        readers = [one for one in self.trainings if one.seed == self.seeds[0]]
        return {
            f"{measure}, {one.label}, {length} tokens": (measure, one.label, length)
            for length in self.lengths
            for one in readers
            if one.can_read(length)
            for measure in COMPARED
        }

    @property
    def differences(self) -> dict[str, tuple[str, str, int]]:
        """By name: the same of each effect that compares a model's maps with those of the first."""
        first = next(iter(self.runs))
        return {
            f"{measure}, {label} - {first}, {length} tokens": (measure, label, length)
            for measure, label, length in self.own_measures.values()
            if label != first
        }

    @property
    def effect_names(self) -> list[str]:
        return [*self.own_measures, *self.differences, self.rank_name]


# Maps


@torch.no_grad()
def last_position_maps(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> np.ndarray:
    """Return the weights of the last position on each position, averaged over windows.

    Args:
        model: loaded with `attn_implementation="eager"`.
        windows: ids `(N, T)`.
        batch_size: windows at a time.

    Returns:
        `(L, H, T)`, a row for each head of each layer.
    """
    total = torch.zeros(())
    for batch in windows.split(batch_size):
        attentions = model(input_ids=batch.to(model.device), use_cache=False, output_attentions=True).attentions
        # L times (B, H, T, T) -> (L, H, T). In float64, for thousands of windows are summed.
        total = total + torch.stack([layer[:, :, -1].double().sum(0) for layer in attentions]).cpu()
    return (total / len(windows)).numpy()


def _binned(weights: np.ndarray) -> np.ndarray:
    """Return means over bins; positions that fill no bin are left out at the old end."""
    whole = len(weights) - len(weights) % BIN
    return weights[len(weights) - whole :].reshape(-1, BIN).mean(axis=1)


def describe(weights: np.ndarray) -> dict[str, float]:
    """Return measures of a head's averaged map `(T,)`.

    Returns:
        level: median of the bins between position 4 and the newest 32.
        sink: the larger weight of the first two positions, relative to the level.
        old: the mean of the older half of the middle, relative to the level.
        unevenness: standard deviation of the logarithm of the bins, 0 if flat.
        middle: share of all weight between the two ends.
        newest: share on the newest 32.
        peak_width: how many positions, counted back from the newest, lie above twice the level.
    """
    weights = np.trim_zeros(weights, "b")  # a mosaic's last pair is not complete yet
    middle, newest = weights[FIRST:-NEWEST], weights[-NEWEST:]
    # A weight may underflow to 0, which has no logarithm.
    bins = np.maximum(_binned(middle), 1e-12)
    # A median, because a wide peak can reach into the middle.
    level = float(np.median(bins))
    above = weights[::-1] > 2 * level
    return {
        "level": level,
        "sink": float(weights[:2].max() / level),
        "old": float(middle[: len(middle) // 2].mean() / level),
        "unevenness": float(np.std(np.log(bins))),
        "middle": float(middle.sum()),
        "newest": float(newest.sum()),
        # `argmin` finds the first position that is not above. If all are, it returns 0.
        "peak_width": int(len(above) if above.all() else np.argmin(above)),
    }


def _rounded_bins(weights: np.ndarray) -> list[float]:
    return [float(f"{weight:.4g}") for weight in _binned(weights)]


def _leak(model: PreTrainedModel, layer: int, head: int) -> dict[str, float]:
    """Return the factor by which a head of a mosaic fades its keys at each token; nothing for other models."""
    if not isinstance(model, MemoryMosaicForCausalLM):
        return {}
    memory: Any = model.model.layers[layer].contextual_memory
    # In float64: the committed results were computed so, and float32 would change their last digits.
    leaks = memory.leak(torch.float64)
    return {"leak_coefficient": math.exp(-leaks[head].item())}


def _mean(heads: list[dict[str, Any]], name: str, label: str, length: int) -> float:
    """Return the mean of a measure over the given heads of a model; NaN if it cannot read the length."""
    chosen = [head for head in heads if (head["label"], head["length"]) == (label, length)]
    if not chosen:
        return math.nan
    # A head that hardly looks at the middle says little about its shape: each counts by the weight it puts there.
    weights = [head["middle"] for head in chosen] if name in ("sink", "old", "unevenness") else None
    return float(np.average([head[name] for head in chosen], weights=weights))


def _rank(deep_heads: list[dict[str, Any]], length: int, seed: int) -> float:
    """Return Spearman's correlation of leak coefficient and peak width, over the heads of one mosaic."""
    heads = [head for head in deep_heads if (head["length"], head["seed"]) == (length, seed)]
    leaks, widths = ([head[name] for head in heads] for name in ("leak_coefficient", "peak_width"))
    return float(spearmanr(leaks, widths).statistic)


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return how maps differ from the first model's, by seed, and how peaks follow leaks, over all heads.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    first, found = next(iter(recipe.runs)), {}
    by_seed = {seed: [head for head in measured["heads"] if head["seed"] == seed] for seed in recipe.seeds}
    for name, (measure, label, length) in recipe.differences.items():
        pairs = [[_mean(heads, measure, one, length) for one in (label, first)] for heads in by_seed.values()]
        found[name] = mean_effect([theirs - ours for theirs, ours in pairs], "")
    for name, (measure, label, length) in recipe.own_measures.items():
        found[name] = mean_effect([_mean(heads, measure, label, length) for heads in by_seed.values()], "")
    # A correlation for each seed, as the heads of one model are not independent: all of its blocks begin alike.
    ranks = [_rank(measured["deep_heads"], recipe.lengths[0], seed) for seed in recipe.seeds]
    num_heads = len(measured["deep_heads"]) // (len(recipe.lengths) * len(recipe.seeds))
    found[recipe.rank_name] = mean_effect(ranks, "", f"{len(ranks)} seeds, {num_heads} heads each")
    return found


# Tables and pictures


def _table(recipe: Recipe, heads: list[dict[str, Any]]) -> str:
    measures = {
        "first position": "sink",
        "older half": "old",
        "unevenness": "unevenness",
        "weight on newest 32": "newest",
        "peak width": "peak_width",
    }
    rows = []
    seeds = ", ".join(map(str, recipe.seeds))
    for length in recipe.lengths:
        for label in recipe.runs:
            means = [_mean(heads, measure, label, length) for measure in measures.values()]
            cells = ["cannot be read" if math.isnan(mean) else f"{mean:.3g}" for mean in means]
            rows.append([label, str(length), seeds, *cells])
    return markdown_table(["model", "length", "seeds", *measures], "lrrrrrrr", rows)


def _draw_maps(recipe: Recipe, maps: list[dict[str, Any]], path: Path) -> None:
    """Draw the maps of one seed: a row for each model, a column for each length."""
    labels = list(dict.fromkeys(one["label"] for one in maps))
    figure, axes = new_figure(len(labels), len(recipe.lengths), height=1.9, sharex="col", sharey=True)
    for row, label in zip(axes, labels, strict=True):
        by_length = {one["length"]: one["bins"] for one in maps if one["label"] == label}
        for axis, length in zip(row, recipe.lengths, strict=True):
            for head, weights in enumerate(by_length.get(length, [])):
                places = length - BIN * (np.arange(len(weights))[::-1] + 0.5)
                name = f"head {head}"
                # A weight of 0 would break the line: here it goes below the lower end of the axis.
                axis.semilogy(places, np.maximum(weights, 1e-7), lw=1.2, label=name, **_HEAD_STYLES[name])
            if length not in by_length:
                where = {"ha": "center", "va": "center", "transform": axis.transAxes}
                axis.text(0.5, 0.5, "cannot be read: no positions\nbeyond the training length", fontsize=10, **where)
            axis.set_ylim(1e-6, 1)
            axis.set_title(f"{label}, {length} tokens")
        row[0].set_ylabel("weight")
    for axis in axes[-1]:
        axis.set_xlabel("position")
    legend_below(figure, axes)
    note = f"One seed of one block. Means over {BIN} neighbouring positions and over windows."
    save_figure(figure, path, "Where the last position looks, head by head", note)


def _draw_leaks(recipe: Recipe, deep_heads: list[dict[str, Any]], path: Path) -> None:
    """Draw the width of the peak over the leak coefficient of each head of the deeper mosaics."""
    figure, axes = new_figure(len(recipe.lengths), 1, height=2.9, sharex=True)
    layers = sorted({head["layer"] for head in deep_heads})
    styles = styles_of(f"layer {layer}" for layer in layers)
    for axis, length in zip(axes[:, 0], recipe.lengths, strict=True):
        for layer, style, marker in zip(layers, styles.values(), itertools.cycle("os^Dv"), strict=False):
            chosen = [head for head in deep_heads if (head["length"], head["layer"]) == (length, layer)]
            leaks, widths = ([head[name] for head in chosen] for name in ("leak_coefficient", "peak_width"))
            axis.scatter(leaks, widths, color=style["color"], marker=marker, label=f"layer {layer}", alpha=0.7)
        axis.set(title=f"{length} tokens", ylabel="width of the peak (positions)")
    axes[-1, 0].set_xlabel("leak coefficient: how much of its key a head keeps at each token")
    legend_below(figure, axes)
    save_figure(figure, path, "Width of a head's peak, by how slowly it forgets", "A mark for each head of each seed.")


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the maps, and how peaks follow leaks.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the pictures.
    """
    _draw_maps(recipe, measured["maps"], folder / f"{recipe.name}.png")
    deep_heads = measured.get("deep_heads", [])  # older results have none
    if len(deep_heads) >= FEWEST_NUMBERS:
        _draw_leaks(recipe, deep_heads, folder / f"{recipe.name}_leak.png")


# All models


def _read_maps(recipe: Recipe, trainings: list[Trained]) -> tuple[Maps, list[dict[str, Any]], dict[int, int]]:
    """Return the maps of trained models, what describes each head, and the number of windows of each length."""
    documents = load_stories(**recipe.text.model_dump())
    maps: Maps = {}
    heads: list[dict[str, Any]] = []
    num_windows: dict[int, int] = {}
    for training in tqdm(trainings, desc="maps"):
        # Only eager attention returns its weights.
        model, tokenizer = training.load(attn_implementation="eager")
        # A model is absent from what it cannot read.
        for length in filter(training.can_read, recipe.lengths):
            windows, _ = cut_windows(documents, tokenizer, length, "stream", recipe.num_windows)
            num_windows[length] = len(windows)
            key = (training.label, length, training.seed)
            maps[key] = last_position_maps(model, windows, recipe.batch_size)
            for layer, head in np.ndindex(maps[key].shape[:2]):
                place = {"label": training.label, "length": length, "seed": training.seed}
                place |= {"layer": layer, "head": head}
                heads.append(place | _leak(model, layer, head) | describe(maps[key][layer, head]))
    return maps, heads, num_windows


def _measure(recipe: Recipe) -> dict[str, Any]:
    maps, heads, num_windows = _read_maps(recipe, recipe.trainings)
    _, deep_heads, _ = _read_maps(recipe, recipe.deep_trainings)
    binned = [
        {"label": label, "length": length, "seed": seed, "bins": [_rounded_bins(weights) for weights in head_maps]}
        for (label, length, seed), (head_maps,) in maps.items()
        if seed == recipe.seeds[0]
    ]
    measured = {"num_windows": num_windows, "heads": heads, "deep_heads": deep_heads, "maps": binned}
    return {"measured": measured, "table": _table(recipe, heads)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Average every model's maps; returns the content of `result.json`."""
    data = {"text": source_provenance(**recipe.text.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)

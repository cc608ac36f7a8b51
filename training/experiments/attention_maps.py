# SPDX-License-Identifier: Apache-2.0
"""Attention of the last position (Memory Mosaics, Figs. 12, 13, 15): where each head of a one-block model looks.

The weights come from the models' own `output_attentions`, averaged over windows. Column t of a mosaic's map is the
pair of token t, so that the last column, whose pair is not complete yet, is 0; in a transformer it is token t itself.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from scipy.stats import spearmanr
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_memory_mosaic import MemoryMosaicForCausalLM
from training.data import load_stories, source_provenance
from training.experiments import comparison
from training.experiments.comparison import Claim, DepthComparisonRecipe, new_figure, plan, reads, save_figure, summary
from training.experiments.position_loss import cut_windows
from training.recipe import SourceSection


__all__ = ["Recipe", "plan", "run", "summary"]

# The level of a map is told by what lies between the first and the newest positions, in bins.
FIRST, NEWEST, BIN = 4, 32, 8
NO_POSITIONS = "No positions"  # the run that is no subject of the paper's claims, but shows what positions do


class Recipe(DepthComparisonRecipe):
    """The first of the runs is the mosaic; the `lengths` are tokens, the first of them the training's."""

    task: Literal["attention_maps"]
    text: SourceSection
    lengths: list[int] = Field(min_length=1)
    num_windows: PositiveInt
    batch_size: PositiveInt = 4

    @model_validator(mode="after")
    def _one_block_and_room(self):
        if self.depths != [1]:
            raise ValueError(f"`depths` is {self.depths}: maps are those of one-block models, give [1]")
        if min(self.lengths) < 4 * NEWEST:
            raise ValueError(f"`lengths` are {self.lengths}: each needs at least {4 * NEWEST} tokens")
        return self


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Average every model's maps; returns the content of `result.json`."""
    data = {"text": source_provenance(**recipe.text.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)


def _measure(recipe: Recipe) -> dict[str, Any]:
    documents = load_stories(**recipe.text.model_dump())
    maps, heads, num_windows = {}, [], {}
    for training in tqdm(recipe.trainings, desc="maps"):
        model, tokenizer = training.load(attn_implementation="eager")
        for length in recipe.lengths:
            if not reads(model, length):
                continue  # the result says so by its absence
            windows, _ = cut_windows(documents, tokenizer, length, "stream", recipe.num_windows)
            num_windows[length] = len(windows)
            mean = last_position_map(model, windows, recipe.batch_size)
            maps[training.label, length, training.seed] = mean
            for head, weights in enumerate(mean):
                about = {"label": training.label, "length": length, "seed": training.seed, "head": head}
                heads.append(about | _leak(model, head) | describe(weights))
    _draw_maps(recipe, maps)
    _draw_leaks(recipe, heads)
    first_seed = [
        {
            "label": label,
            "length": length,
            "seed": seed,
            "bins": [[float(f"{w:.4g}") for w in _binned(r)] for r in rows],
        }
        for (label, length, seed), rows in maps.items()
        if seed == recipe.seeds[0]
    ]
    return {
        "measured": {"num_windows": num_windows, "heads": heads, "maps": first_seed},
        "table": _table(recipe, heads),
        "claims": _claims(recipe, heads),
    }


@torch.no_grad()
def last_position_map(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> np.ndarray:
    """Weights of the last position on each position, `(H, T)`, of the first layer, averaged over windows `(N, T)`."""
    total = 0
    for batch in windows.split(batch_size):
        attentions = model(input_ids=batch.to(model.device), use_cache=False, output_attentions=True).attentions
        total = total + attentions[0][:, :, -1].double().sum(0)
    return (total / len(windows)).cpu().numpy()


def describe(weights: np.ndarray) -> dict[str, float]:
    """A head's averaged map `(T,)` in numbers.

    Returns:
        `level`: median of the bins between position 4 and the newest 32. Relative to it, `sink`: the larger weight of
        the first two positions, and `old`: the mean of the older half. `unevenness`: standard deviation of the
        logarithm of the bins, 0 if flat. `middle`: share of all weight between the two ends. `newest`: share on the
        newest 32. `peak_width`: how many positions, counted back from the newest, lie above twice the level.
    """
    weights = np.trim_zeros(weights, "b")
    middle, newest = weights[FIRST:-NEWEST], weights[-NEWEST:]
    bins = np.maximum(_binned(middle), 1e-12)
    level = float(np.median(bins))
    above = weights[::-1] > 2 * level
    return {
        "level": level,
        "sink": float(weights[:2].max() / level),
        "old": float(middle[: len(middle) // 2].mean() / level),
        "unevenness": float(np.std(np.log(bins))),
        "middle": float(middle.sum()),
        "newest": float(newest.sum()),
        "peak_width": int(len(above) if above.all() else np.argmin(above)),
    }


def _binned(weights: np.ndarray) -> np.ndarray:
    whole = len(weights) - len(weights) % BIN
    return weights[len(weights) - whole :].reshape(-1, BIN).mean(axis=1)


def _leak(model: PreTrainedModel, head: int) -> dict[str, float]:
    if not isinstance(model, MemoryMosaicForCausalLM):
        return {}
    leaks = model.model.layers[0].contextual_memory.leak(torch.float64)
    return {"leak_coefficient": math.exp(-leaks[head].item())}


def _mean(heads: list[dict[str, Any]], name: str, label: str, length: int) -> float:
    """Over heads and seeds; of the shape of the middle part, each head counts as far as it looks there at all."""
    chosen = [head for head in heads if (head["label"], head["length"]) == (label, length)]
    if not chosen:
        return math.nan
    weights = [head["middle"] for head in chosen] if name in ("sink", "old", "unevenness") else None
    return float(np.average([head[name] for head in chosen], weights=weights))


def _table(recipe: Recipe, heads: list[dict[str, Any]]) -> str:
    columns = ("sink", "old", "unevenness", "newest", "peak_width")
    lines = [
        "| model | length | seeds | first position | older half | unevenness | weight on newest 32 | peak width |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    seeds = ", ".join(map(str, recipe.seeds))
    for length in recipe.lengths:
        for label in recipe.runs:
            cells = [_mean(heads, name, label, length) for name in columns]
            told = ["cannot be read" if math.isnan(cell) else f"{cell:.3g}" for cell in cells]
            lines.append(f"| {label} | {length} | {seeds} | {' | '.join(told)} |")
    return "\n".join(lines)


def _claims(recipe: Recipe, heads: list[dict[str, Any]]) -> list[Claim]:
    return [
        _claim_on_learnt_positions(recipe, heads),
        *(_claim_beyond(recipe, heads, length) for length in recipe.lengths[1:]),
        _claim_on_leaks(recipe, heads),
    ]


def _claim_on_learnt_positions(recipe: Recipe, heads: list[dict[str, Any]]) -> Claim:
    (mosaic, learnt), length = list(recipe.runs)[:2], recipe.lengths[0]
    sink, unevenness = (
        [_mean(heads, name, label, length) for label in (mosaic, learnt)] for name in ("sink", "unevenness")
    )
    flatter, rougher = sink[0] < sink[1] and unevenness[0] < unevenness[1], unevenness[0] > unevenness[1]
    return Claim(
        f"At the training length {learnt}'s map is uneven with a sink at the first position, the mosaic's flat",
        "Fig. 12 (pictures)",
        f"{mosaic}: first position {sink[0]:.2f} times the level, unevenness {unevenness[0]:.2f}; "
        f"{learnt}: {sink[1]:.2f}, {unevenness[1]:.2f}",
        "reproduced" if flatter else "contradicted" if rougher else "not at this size",
    )


def _claim_beyond(recipe: Recipe, heads: list[dict[str, Any]], length: int) -> Claim:
    mosaic, *others = recipe.runs
    found = {label: _mean(heads, "unevenness", label, length) for label in (mosaic, *others)}
    found = {label: value for label, value in found.items() if not math.isnan(value)}
    with_positions = [value for label, value in found.items() if label not in (mosaic, NO_POSITIONS)]
    return Claim(
        f"Read at {length / recipe.lengths[0]:g} times the training length the mosaic's map stays flat, unlike those "
        "of transformers with positions",
        "RoPE does not carry over, ALiBi fades with distance, mosaic flat (Fig. 13; pictures)",
        f"unevenness at {length} tokens: " + ", ".join(f"{label} {value:.2f}" for label, value in found.items()),
        "reproduced" if found[mosaic] < min(with_positions, default=math.inf) else "contradicted",
    )


def _claim_on_leaks(recipe: Recipe, heads: list[dict[str, Any]]) -> Claim:
    own = [head for head in heads if "leak_coefficient" in head and head["length"] == recipe.lengths[0]]
    rank = spearmanr([head["leak_coefficient"] for head in own], [head["peak_width"] for head in own])
    sure = rank.pvalue < 0.05
    return Claim(
        "The larger a head's leak coefficient, the wider the peak on the newest positions",
        "Fig. 15 (pictures)",
        f"rank correlation {rank.statistic:.2f} (p = {rank.pvalue:.2g}) over {len(own)} heads of all seeds",
        "not at this size" if not sure else "reproduced" if rank.statistic > 0 else "contradicted",
    )


def _draw_maps(recipe: Recipe, maps: dict[tuple[str, int, int], np.ndarray]) -> None:
    figure, axes = new_figure(len(recipe.lengths), len(recipe.runs), width=3.6, height=2.8, sharex="row")
    seed = recipe.seeds[0]
    for row, length in zip(axes, recipe.lengths, strict=True):
        for axis, label in zip(row, recipe.runs, strict=True):
            if (label, length, seed) not in maps:
                axis.text(0.5, 0.5, "no positions beyond\nthe training length", ha="center", transform=axis.transAxes)
                axis.set_axis_off()
                continue
            for head, weights in enumerate(maps[label, length, seed]):
                axis.semilogy(np.maximum(weights, 1e-7), lw=0.8, label=f"head {head}")
            axis.set_ylim(1e-6, 1)
            axis.set_title(f"{label}, {length} tokens", fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("weight of the last position")
    axes[0, 0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("position")
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _draw_leaks(recipe: Recipe, heads: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(1, len(recipe.lengths))
    for axis, length in zip(axes[0], recipe.lengths, strict=True):
        own = [head for head in heads if "leak_coefficient" in head and head["length"] == length]
        for seed in recipe.seeds:
            chosen = [head for head in own if head["seed"] == seed]
            leaks, widths = [h["leak_coefficient"] for h in chosen], [h["peak_width"] for h in chosen]
            axis.scatter(leaks, widths, label=f"seed {seed}")
        axis.set_title(f"{length} tokens")
        axis.set_xlabel("leak coefficient of the head")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("width of the peak (positions)")
    axes[0, 0].legend()
    save_figure(figure, recipe.folder / f"{recipe.name}_leak.png")

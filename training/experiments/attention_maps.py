# SPDX-License-Identifier: Apache-2.0
"""Attention of the last position in each head of a one-block model (Memory Mosaics, Figs. 12, 13, 15).

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
from typing_extensions import Self

from modeling_memory_mosaic import MemoryMosaicForCausalLM
from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, fits_context, plan, summary
from training.experiments.position_loss import cut_windows
from training.figures import new_figure, save_figure
from training.recipe import SourceSection
from training.tables import Claim, markdown_table
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "plan", "run", "summary"]

# The level of a map is measured between the first and the newest positions, in bins.
FIRST, NEWEST, BIN = 4, 32, 8
# Label of the run that the paper makes no claim about: it shows what positions do.
NO_POSITIONS = "No positions"

# Label, length and seed.
MapKey = tuple[str, int, int]


class Recipe(DepthComparisonRecipe):
    """The first run is the mosaic. The `lengths` are in tokens; the first is that of the training."""

    task: Literal["attention_maps"]
    text: SourceSection
    lengths: list[int] = Field(min_length=1)
    num_windows: PositiveInt
    batch_size: PositiveInt = 4

    @model_validator(mode="after")
    def _check_depth_and_lengths(self) -> Self:
        if self.depths != [1]:
            raise ValueError(f"`depths` is {self.depths}: maps are those of one-block models, give [1]")
        if min(self.lengths) < 4 * NEWEST:
            raise ValueError(f"`lengths` are {self.lengths}: each needs at least {4 * NEWEST} tokens")
        return self


@torch.no_grad()
def last_position_map(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> np.ndarray:
    """Return the weights of the last position on each position, averaged over windows.

    Args:
        model: loaded with `attn_implementation="eager"`; its first layer is looked at.
        windows: ids `(N, T)`.
        batch_size: windows at a time.

    Returns:
        `(H, T)`, a row for each head.
    """
    sums = []
    for batch in windows.split(batch_size):
        attentions = model(input_ids=batch.to(model.device), use_cache=False, output_attentions=True).attentions
        # (B, H, T, T) -> (H, T). In float64, for thousands of windows are summed.
        sums.append(attentions[0][:, :, -1].double().sum(0))
    return (sum(sums) / len(windows)).cpu().numpy()


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


def _leak(model: PreTrainedModel, head: int) -> dict[str, float]:
    """Return the factor by which a head of a mosaic fades its keys at each token; nothing for other models."""
    if not isinstance(model, MemoryMosaicForCausalLM):
        return {}
    memory: Any = model.model.layers[0].contextual_memory
    # In float64: the committed results were computed so, and float32 would change their last digits.
    leaks = memory.leak(torch.float64)
    return {"leak_coefficient": math.exp(-leaks[head].item())}


def _mean(heads: list[dict[str, Any]], name: str, label: str, length: int) -> float:
    """Return the mean of a measure over heads and seeds; NaN if the model cannot read the length."""
    chosen = [head for head in heads if (head["label"], head["length"]) == (label, length)]
    if not chosen:
        return math.nan
    # A head that hardly looks at the middle says little about its shape: each counts by the weight it puts there.
    weights = [head["middle"] for head in chosen] if name in ("sink", "old", "unevenness") else None
    return float(np.average([head[name] for head in chosen], weights=weights))


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


def _claim_on_learnt_positions(recipe: Recipe, heads: list[dict[str, Any]]) -> Claim:
    mosaic, learnt = list(recipe.runs)[:2]
    sink, unevenness = (
        [_mean(heads, measure, label, recipe.lengths[0]) for label in (mosaic, learnt)]
        for measure in ("sink", "unevenness")
    )
    is_flatter = sink[0] < sink[1] and unevenness[0] < unevenness[1]
    is_rougher = unevenness[0] > unevenness[1]
    return Claim(
        f"At the training length {learnt}'s map is uneven with a sink at the first position, the mosaic's flat",
        "Fig. 12 (pictures)",
        f"{mosaic}: first position {sink[0]:.2f} times the level, unevenness {unevenness[0]:.2f}; "
        f"{learnt}: {sink[1]:.2f}, {unevenness[1]:.2f}",
        "reproduced" if is_flatter else "contradicted" if is_rougher else "not at this size",
    )


def _claim_beyond(recipe: Recipe, heads: list[dict[str, Any]], length: int) -> Claim:
    mosaic, *others = recipe.runs
    means = {label: _mean(heads, "unevenness", label, length) for label in (mosaic, *others)}
    unevenness = {label: mean for label, mean in means.items() if not math.isnan(mean)}
    with_positions = [mean for label, mean in unevenness.items() if label not in (mosaic, NO_POSITIONS)]
    return Claim(
        f"Read at {length / recipe.lengths[0]:g} times the training length the mosaic's map stays flat, unlike those "
        "of transformers with positions",
        "RoPE does not carry over, ALiBi fades with distance, mosaic flat (Fig. 13; pictures)",
        f"unevenness at {length} tokens: " + ", ".join(f"{label} {mean:.2f}" for label, mean in unevenness.items()),
        "reproduced" if unevenness[mosaic] < min(with_positions, default=math.inf) else "contradicted",
    )


def _heads_of_mosaic(heads: list[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    return [head for head in heads if "leak_coefficient" in head and head["length"] == length]


def _claim_on_leaks(recipe: Recipe, heads: list[dict[str, Any]]) -> Claim:
    of_mosaic = _heads_of_mosaic(heads, recipe.lengths[0])
    rank = spearmanr([head["leak_coefficient"] for head in of_mosaic], [head["peak_width"] for head in of_mosaic])
    # Also false for NaN, the p-value of widths that are all equal.
    is_significant = rank.pvalue < 0.05
    return Claim(
        "The larger a head's leak coefficient, the wider the peak on the newest positions",
        "Fig. 15 (pictures)",
        f"rank correlation {rank.statistic:.2f} (p = {rank.pvalue:.2g}) over {len(of_mosaic)} heads of all seeds",
        "not at this size" if not is_significant else "reproduced" if rank.statistic > 0 else "contradicted",
    )


def _claims(recipe: Recipe, heads: list[dict[str, Any]]) -> list[Claim]:
    return [
        _claim_on_learnt_positions(recipe, heads),
        *(_claim_beyond(recipe, heads, length) for length in recipe.lengths[1:]),
        _claim_on_leaks(recipe, heads),
    ]


def _draw_maps(recipe: Recipe, maps: dict[MapKey, np.ndarray]) -> None:
    """Draw the maps of the first seed: a row for each length, a column for each model."""
    figure, axes = new_figure(len(recipe.lengths), len(recipe.runs), width=3.6, height=2.8, sharex="row")
    seed = recipe.seeds[0]
    for row, length in zip(axes, recipe.lengths, strict=True):
        for axis, label in zip(row, recipe.runs, strict=True):
            if (label, length, seed) not in maps:
                axis.text(0.5, 0.5, "no positions beyond\nthe training length", ha="center", transform=axis.transAxes)
                axis.set_axis_off()
                continue
            for head, weights in enumerate(maps[label, length, seed]):
                # A weight of 0 would break the line: here it goes below the lower end of the axis.
                axis.semilogy(np.maximum(weights, 1e-7), lw=0.8, label=f"head {head}")
            axis.set_ylim(1e-6, 1)
            axis.set_title(f"{label}, {length} tokens", fontsize=9)
        row[0].set_ylabel("weight of the last position")
    axes[0, 0].legend()
    for axis in axes[-1]:
        axis.set_xlabel("position")
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _draw_leaks(recipe: Recipe, heads: list[dict[str, Any]]) -> None:
    """Draw the width of the peak over the leak coefficient of each head of the mosaics."""
    figure, axes = new_figure(1, len(recipe.lengths))
    for axis, length in zip(axes[0], recipe.lengths, strict=True):
        for seed in recipe.seeds:
            chosen = [head for head in _heads_of_mosaic(heads, length) if head["seed"] == seed]
            leaks = [head["leak_coefficient"] for head in chosen]
            axis.scatter(leaks, [head["peak_width"] for head in chosen], label=f"seed {seed}")
        axis.set_title(f"{length} tokens")
        axis.set_xlabel("leak coefficient of the head")
    axes[0, 0].set_ylabel("width of the peak (positions)")
    axes[0, 0].legend()
    save_figure(figure, recipe.folder / f"{recipe.name}_leak.png")


def _measure(recipe: Recipe) -> dict[str, Any]:
    documents = load_stories(**recipe.text.model_dump())
    maps: dict[MapKey, np.ndarray] = {}
    heads: list[dict[str, Any]] = []
    num_windows: dict[int, int] = {}
    for training in tqdm(recipe.trainings, desc="maps"):
        # Only eager attention returns its weights.
        model, tokenizer = training.load(attn_implementation="eager")
        for length in recipe.lengths:
            if not fits_context(model, length):
                continue  # the model is absent from the result
            windows, _ = cut_windows(documents, tokenizer, length, "stream", recipe.num_windows)
            num_windows[length] = len(windows)
            head_maps = last_position_map(model, windows, recipe.batch_size)
            maps[training.label, length, training.seed] = head_maps
            for head, weights in enumerate(head_maps):
                place = {"label": training.label, "length": length, "seed": training.seed, "head": head}
                heads.append(place | _leak(model, head) | describe(weights))
    _draw_maps(recipe, maps)
    _draw_leaks(recipe, heads)
    binned = [
        {"label": label, "length": length, "seed": seed, "bins": [_rounded_bins(weights) for weights in head_maps]}
        for (label, length, seed), head_maps in maps.items()
        if seed == recipe.seeds[0]
    ]
    return {
        "measured": {"num_windows": num_windows, "heads": heads, "maps": binned},
        "table": _table(recipe, heads),
        "claims": _claims(recipe, heads),
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Average every model's maps; returns the content of `result.json`."""
    data = {"text": source_provenance(**recipe.text.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)

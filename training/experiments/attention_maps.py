# SPDX-License-Identifier: Apache-2.0
"""Attention of the last position (Memory Mosaics, Figs. 12, 13, 15): where each head of a one-block model looks.

The weights come from the models' own `output_attentions`, averaged over windows. A mosaic stores at slot t the pair
that completes at t, so column t of its map is the pair (key of t-1, value of t-1 and t); in a transformer it is t.
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
from training.experiments.comparison import Claim, ComparisonRecipe, new_figure, plan, reads, save_figure, summary
from training.experiments.position_loss import cut_windows
from training.recipe import SourceSection


__all__ = ["Recipe", "plan", "run", "summary"]

NEWEST = 32  # positions at the end that the statistics of the flat part leave out


class Recipe(ComparisonRecipe):
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
        {"label": label, "length": length, "seed": seed, "map": [[float(f"{w:.4g}") for w in row] for row in rows]}
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
    """A head's averaged map `(T,)` in numbers; the flat part is what lies between position 4 and the newest 32.

    Returns:
        `sink`: the weight at the largest of the first two positions, `old`: the mean weight in the older half of the
        flat part, both relative to the flat part's median; `roughness`: standard deviation of the flat part around
        its own moving mean, relative to it; `newest`: share of all weight on the newest 32; `peak_width`: how many of
        the newest positions reach half way from the flat part's median to the largest weight among them.
    """
    flat, newest = weights[4:-NEWEST], weights[-NEWEST:]
    level = max(float(np.median(flat)), 1e-12)
    smooth = np.convolve(flat, np.ones(9) / 9, mode="valid")
    half_way = level + (newest.max() - level) / 2
    return {
        "sink": float(weights[:2].max() / level),
        "old": float(flat[: len(flat) // 2].mean() / level),
        "roughness": float(np.std(flat[4:-4] / np.maximum(smooth, 1e-12) - 1)),
        "newest": float(newest.sum()),
        "peak_width": int((newest >= half_way).sum()),
    }


def _leak(model: PreTrainedModel, head: int) -> dict[str, float]:
    if not isinstance(model, MemoryMosaicForCausalLM):
        return {}
    leak = model.model.layers[0].contextual_memory.key_leak[head].item()
    return {"leak_coefficient": math.exp(-abs(10 * leak))}


def _mean(heads: list[dict[str, Any]], name: str, label: str, length: int) -> float:
    chosen = [head[name] for head in heads if (head["label"], head["length"]) == (label, length)]
    return float(np.mean(chosen)) if chosen else math.nan


def _table(recipe: Recipe, heads: list[dict[str, Any]]) -> str:
    columns = ("sink", "old", "roughness", "newest", "peak_width")
    lines = [
        "| model | length | seeds | first position | older half | roughness | weight on newest 32 | peak width |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    seeds = ", ".join(map(str, recipe.seeds))
    for length in recipe.lengths:
        for label in recipe.runs:
            cells = [_mean(heads, name, label, length) for name in columns]
            told = (
                " | ".join(f"{cell:.3g}" for cell in cells)
                if not math.isnan(cells[0])
                else "cannot be read |" + " |" * 3
            )
            lines.append(f"| {label} | {length} | {seeds} | {told} |")
    return "\n".join(lines)


def _claims(recipe: Recipe, heads: list[dict[str, Any]]) -> list[Claim]:
    mosaic, *others = recipe.runs
    short, *long = recipe.lengths
    at = {label: {n: _mean(heads, n, label, short) for n in ("sink", "roughness")} for label in (mosaic, *others)}
    learnt = others[0]
    flatter = at[mosaic]["sink"] < at[learnt]["sink"] and at[mosaic]["roughness"] < at[learnt]["roughness"]
    claims = [
        Claim(
            f"At the training length {learnt}'s map is noisy with a sink at the first position, the mosaic's flat",
            "Fig. 12 (pictures)",
            "; ".join(
                f"{k}: first position {v['sink']:.2f} times the flat level, roughness {v['roughness']:.3f}"
                for k, v in at.items()
                if k in (mosaic, learnt)
            ),
            "reproduced" if flatter else "contradicted",
        )
    ]
    for length in long:
        old = {label: _mean(heads, "old", label, length) for label in (mosaic, *others)}
        old = {label: value for label, value in old.items() if not math.isnan(value)}
        flattest = min(old, key=lambda label: abs(math.log(max(old[label], 1e-12))))
        claims.append(
            Claim(
                f"Read at {length / short:g} times the training length the mosaic's map stays flat, others' do not",
                "RoPE does not carry over, ALiBi fades with distance, mosaic flat (Fig. 13; pictures)",
                f"weight on the older half relative to the flat level, 1 is flat, at {length} tokens: "
                + ", ".join(f"{label} {value:.2f}" for label, value in old.items()),
                "reproduced" if flattest == mosaic else "contradicted",
            )
        )
    own = [head for head in heads if head["label"] == mosaic and head["length"] == short]
    rank = spearmanr([head["leak_coefficient"] for head in own], [head["peak_width"] for head in own])
    correlates = rank.statistic > 0 and rank.pvalue < 0.05
    claims.append(
        Claim(
            "The larger a head's leak coefficient, the wider the peak on the newest positions",
            "Fig. 15 (pictures)",
            f"rank correlation {rank.statistic:.2f} (p = {rank.pvalue:.2g}) over {len(own)} heads of all seeds",
            "reproduced" if correlates else "contradicted" if rank.statistic < 0 else "not at this size",
        )
    )
    return claims


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

# SPDX-License-Identifier: Apache-2.0
"""Figures of the units that `inspect_units` measures: one row per unit, one column per token of a text."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from modeling_memory_mosaic import MemoryMosaicUnits, summarize_units
from training.experiments.comparison import new_figure, save_figure


# Longer texts would leave no room for the names of tokens along an axis.
MOST_NAMED_TOKENS = 80


def _draw_map(axis: Axes, numbers: torch.Tensor, title: str) -> None:
    """Draw numbers `(L, H, T)` as colours, one row per unit; grey where they are NaN."""
    num_layers, num_heads, _ = numbers.shape
    # A few large errors must not leave all other tokens in one colour.
    known = numbers[~numbers.isnan()]
    top = known.quantile(0.99).item() if known.numel() else 1.0
    image = axis.imshow(
        numbers.flatten(0, 1).numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=max(top, 1e-6)
    )
    axis.figure.colorbar(image, ax=axis, extend="max", fraction=0.03, pad=0.01)
    axis.set_facecolor("lightgrey")
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("layer, head")
    axis.set_yticks(np.arange(num_layers) * num_heads, [str(layer) for layer in range(num_layers)])
    for layer in range(1, num_layers):
        axis.axhline(layer * num_heads - 0.5, color="white", lw=0.8)


def _name_tokens(axes: np.ndarray, tokens: list[str]) -> None:
    """Write tokens along the axes."""
    # matplotlib reads a plain dollar sign as the start of a formula.
    names = [token.replace("\n", "\\n").replace(" ", "␣").replace("$", r"\$") for token in tokens]
    for axis in axes:
        axis.set_xticks(np.arange(len(names)), names, rotation=90, fontsize=7)


def _draw_bars(axis: Axes, table: list[dict[str, Any]], name: str, kind: str) -> None:
    """Draw the means of one measure of all units of a kind, in the order of the maps beside them."""
    numbers = [row[name] for row in table if row["kind"] == kind]
    axis.barh(np.arange(len(numbers)), numbers, color="C0")
    axis.axvline(0, color="black", lw=0.8)
    axis.set_title(f"{name}, {kind}", fontsize=9)
    axis.grid(axis="x", alpha=0.3)


def draw_units(units: MemoryMosaicUnits, path: Path, tokens: list[str] | None = None, row: int = 0) -> None:
    """Draw the units of one text as a PNG: error and entropy over its tokens, means of share and norm.

    Args:
        units: as `inspect_units` returns them.
        path: of the figure.
        tokens (`list[str]` of length T, *optional*): written along the axis if there are at most `MOST_NAMED_TOKENS`.
        row: row of the batch, counted from 0.

    Raises:
        ValueError: if there is no such row, or if the row has another number of tokens than `tokens`.
    """
    batch_size, num_tokens = units.error.shape[1], units.error.shape[3]
    if not 0 <= row < batch_size:
        raise ValueError(f"row={row}, but units of {batch_size} rows are given: count them from 0.")
    if tokens is not None and len(tokens) != num_tokens:
        raise ValueError(f"{len(tokens)} tokens are given, but units were inspected at {num_tokens}.")
    by_kind = (units.entropy[:, :, [row]], units.share[:, :, [row]], units.norm[:, :, [row]])
    units = MemoryMosaicUnits(units.error[:, [row]], *by_kind)
    num_layers, _, num_heads, _ = units.error.shape
    height = min(6.0, 1.2 + 0.16 * num_layers * num_heads)
    figure, axes = new_figure(3, 2, 6.5, height, sharey="row", width_ratios=[4, 1])
    maps = {
        "error of contextual units, |y - v|² / |v|²": units.error[:, 0],
        "entropy of contextual units (nats)": units.entropy[:, 0, 0],
        "entropy of persistent units (nats)": units.entropy[:, 1, 0],
    }
    for axis, (title, numbers) in zip(axes[:, 0], maps.items(), strict=True):
        _draw_map(axis, numbers, title)
    if tokens is not None and num_tokens <= MOST_NAMED_TOKENS:
        _name_tokens(axes[:, 0], tokens)
    table = summarize_units(units)
    _draw_bars(axes[0, 1], table, "share", "contextual")
    _draw_bars(axes[1, 1], table, "norm", "contextual")
    _draw_bars(axes[2, 1], table, "share", "persistent")
    axes[-1, 0].set_xlabel("token")
    save_figure(figure, path)

# SPDX-License-Identifier: Apache-2.0
"""Figures: the style of all pictures, and the pictures that belong to no single experiment.

Every picture uses `new_figure` and `save_figure`. Below them: the learning curve of a training, the stages of a
memory model, and the units that `inspect_units` measured.
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modeling_memory_mosaic import MemoryMosaicUnits, summarize_units
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES


STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "savefig.dpi": 110,
}
# More tokens than this cannot be read along an axis.
MAX_NAMED_TOKENS = 80


def new_figure(
    num_rows: int, num_columns: int, width: float = 5.0, height: float = 3.6, **options: Any
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes as a matrix `(num_rows, num_columns)`.

    Args:
        num_rows: rows of axes.
        num_columns: columns of axes.
        width: inches of each column.
        height: inches of each row.
        options: further arguments of `Figure.subplots`, such as `sharey`.
    """
    # No `rc_context`: legends, ticks and the PNG read the style when they are made, after this function.
    matplotlib.rcParams.update(STYLE)
    # Without pyplot, which needs a display and keeps every figure.
    figure = Figure(figsize=(width * num_columns, height * num_rows))
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **options)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    figure.savefig(path)


def series_style(number: int) -> dict[str, Any]:
    """Return colour and dashes of one of many series, counted from 0; thirty differ."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}


def legend_below(figure: Figure, axes: np.ndarray) -> None:
    """Put one legend for the series of all axes below them, in as many columns as the figure is wide."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    for num_columns in range(min(5, len(entries)), 0, -1):
        legend = figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=num_columns)
        figure.draw_without_rendering()
        size = legend.get_window_extent()
        if num_columns == 1 or size.width <= 0.98 * figure.bbox.width:
            break
        legend.remove()
    # The axes keep their height.
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def draw_learning_curve(result: dict[str, Any], path: Path) -> None:
    """Draw loss over tokens as a PNG: the training loss faint, the validation loss marked.

    Args:
        result: content of the `result.json` of a training.
        path: of the picture.
    """
    figure, ((axis,),) = new_figure(1, 1, width=7, height=4.5)
    for split, style in (
        ("training", {"color": "tab:blue", "alpha": 0.4, "linewidth": 1}),
        ("validation", {"color": "tab:orange", "marker": "o", "markersize": 4}),
    ):
        points = result["learning_curve"][split]
        axis.plot([point["tokens"] for point in points], [point["loss"] for point in points], label=split, **style)
    axis.set(
        xlabel="training tokens",
        ylabel="loss (nats per token)",
        title=f"{result['name']}: {result['model']}, {result['parameters'] / 1e6:.2f} M parameters",
    )
    axis.legend()
    save_figure(figure, path)


def draw_stages(result: dict[str, Any], path: Path) -> None:
    """Draw the validation measures of a memory model over all stages as a PNG.

    Left is the loss of the next token, right the share of tokens that the decoder reproduced from the memories.

    Args:
        result: content of the `result.json` of a training of a memory model.
        path: of the picture.
    """
    figure, ((loss, accuracy),) = new_figure(1, 2, width=4, height=4)
    for axis, names in (
        (loss, ["eval_causal_loss"]),
        # The first objective is the causal one, whose loss is on the left.
        (accuracy, [f"eval_{name}_accuracy" for name in OBJECTIVES[1:]]),
    ):
        for name in names:
            steps_before, points = 0, []
            for stage in result["stages"]:
                curve = stage["learning_curve"]
                points += [(steps_before + entry["step"], entry[name]) for entry in curve if name in entry]
                steps_before += stage["steps"]
                axis.axvline(steps_before, color="lightgrey", zorder=0)
            label = name.removeprefix("eval_").removesuffix("_accuracy").replace("_", " ")
            # A measure that no stage logged keeps its entry in the legend.
            axis.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=label)
        axis.set_xlabel("steps; a grey line ends a stage")
        axis.legend(loc="center right")
    loss.set_ylabel("loss of the next token (nats)")
    accuracy.set_ylabel("share of tokens reproduced")
    save_figure(figure, path)


def _draw_map(axis: Axes, numbers: torch.Tensor, title: str) -> None:
    """Draw numbers `(L, H, T)` as colours, units counted from above; NaN is grey."""
    num_layers, num_heads, _ = numbers.shape
    # An error may be large at a few tokens, which would leave all the others in one colour.
    known = numbers[~numbers.isnan()]
    top = known.quantile(0.99).item() if known.numel() else 1.0
    image = axis.imshow(
        numbers.flatten(0, 1).numpy(), aspect="auto", interpolation="nearest", vmin=0, vmax=max(top, 1e-6)
    )
    axis.figure.colorbar(image, ax=axis, extend="max", fraction=0.03, pad=0.01)
    axis.grid(False)
    axis.set_facecolor("lightgrey")
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("layer, head")
    axis.set_yticks(np.arange(num_layers) * num_heads, [str(layer) for layer in range(num_layers)])
    for layer in range(1, num_layers):
        axis.axhline(layer * num_heads - 0.5, color="white", lw=0.8)


def _name_tokens(axes: np.ndarray, tokens: list[str]) -> None:
    # A dollar sign would begin a formula.
    names = [token.replace("\n", "\\n").replace(" ", "␣").replace("$", r"\$") for token in tokens]
    for axis in axes:
        axis.set_xticks(np.arange(len(names)), names, rotation=90, fontsize=7)


def _draw_bars(axis: Axes, table: list[dict[str, Any]], name: str, kind: str) -> None:
    numbers = [row[name] for row in table if row["kind"] == kind]
    axis.barh(np.arange(len(numbers)), numbers, color="C0")
    axis.axvline(0, color="black", lw=0.8)
    axis.set_title(f"{name}, {kind}", fontsize=9)
    axis.grid(False, axis="y")


def draw_units(units: MemoryMosaicUnits, path: Path, tokens: list[str] | None = None, row: int = 0) -> None:
    """Draw the units of one text as a PNG: error and entropy over its tokens, means of share and norm.

    Args:
        units: as `inspect_units` returned them.
        path: of the picture.
        tokens: of the row, T of them; written along the axis if they are few.
        row: of the batch, counted from 0.

    Raises:
        ValueError: if there is no such row, or if the tokens are not as many as the row's.
    """
    batch_size, num_tokens = units.error.shape[1], units.error.shape[3]
    if not 0 <= row < batch_size:
        raise ValueError(f"row={row}, but units of {batch_size} rows are given: count them from 0.")
    if tokens is not None and len(tokens) != num_tokens:
        raise ValueError(f"{len(tokens)} tokens are given, but units were inspected at {num_tokens}.")
    # A list as index keeps the axis of rows, which `summarize_units` expects.
    by_kind = (units.entropy[:, :, [row]], units.share[:, :, [row]], units.norm[:, :, [row]])
    units_of_row = MemoryMosaicUnits(units.error[:, [row]], *by_kind, units.levels)
    num_layers, _, num_heads, _ = units_of_row.error.shape
    height = min(6.0, 1.2 + 0.16 * num_layers * num_heads)
    # A shared axis puts each bar beside the row of its unit in the map.
    figure, axes = new_figure(3, 2, 6.5, height, sharey="row", width_ratios=[4, 1])
    maps = {
        "error of contextual units, |y - v|² / |v|²": units_of_row.error[:, 0],
        "entropy of contextual units (nats)": units_of_row.entropy[:, 0, 0],
        "entropy of persistent units (nats)": units_of_row.entropy[:, 1, 0],
    }
    for axis, (title, numbers) in zip(axes[:, 0], maps.items(), strict=True):
        _draw_map(axis, numbers, title)
    if tokens is not None and num_tokens <= MAX_NAMED_TOKENS:
        _name_tokens(axes[:, 0], tokens)
    table = summarize_units(units_of_row)
    _draw_bars(axes[0, 1], table, "share", "contextual")
    _draw_bars(axes[1, 1], table, "norm", "contextual")
    _draw_bars(axes[2, 1], table, "share", "persistent")
    axes[-1, 0].set_xlabel("token")
    save_figure(figure, path)

# SPDX-License-Identifier: Apache-2.0
"""Figures: the style of all pictures, and the pictures that belong to no single experiment.

Every picture uses `new_figure` and `save_figure`. All are as wide as a page on a phone, on white, so that they can be
read in a dark theme; a model has the same colour in all of them (`styles_of`). Below: the learning curve of a
training, the stages of a memory model, and the units that `inspect_units` measured.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Annotation, Text
from matplotlib.ticker import EngFormatter
from scipy.optimize import isotonic_regression

from modeling_memory_mosaic import MemoryMosaicUnits, summarize_units
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from training.files import as_read
from training.recipe import BaseRecipe, task_module


# Inches of every picture. A phone shows it 390 pixels wide, where the smallest text is then 8.5 pixels high.
WIDTH = 6.4
SMALLEST_TEXT = 10
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
}
# A picture of fewer numbers than this tells less than a table of them.
FEWEST_NUMBERS = 8
# More tokens than this cannot be read along an axis.
MAX_NAMED_TOKENS = 30

# What a label has to contain for a colour of Okabe and Ito (or two more), which the colour-blind tell apart.
_FAMILIES = {
    r"adaptive bandwidth": "#56B4E9",
    r"[Mm]osaic": "#0072B2",
    r"^No positions": "#999933",
    r"shift": "#D55E00",
    r"(?i:\bgpt-?2)|learned positions": "#444444",
    r"(?i:\bllama)": "#009E73",
    r"(?i:\balibi)": "#8C564B",
    r"(?i:\brope)|transformer": "#E69F00",
    r"(?i:\b(lstm|mamba|rwkv|linear))": "#CC79A7",
}
# Tol's muted colours, for what belongs to no family.
_OTHERS = ("#332288", "#AA4499", "#44AA99", "#882255", "#CC6677", "#117733")
# Keys of settings whose names are not words.
_WORDS = {
    "initializer_range": "deviation of the initial weights",
    "logits_scaling": "divisor of the logits",
    "num_attention_heads": "heads",
    "num_hidden_layers": "blocks",
}
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def new_figure(num_rows: int, num_columns: int, height: float = 2.7, **options: Any) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes as a matrix `(num_rows, num_columns)`. Two columns can be read on a phone.

    Args:
        num_rows: rows of axes.
        num_columns: columns of axes.
        height: inches of each row.
        options: further arguments of `Figure.subplots`, such as `sharey`.
    """
    # No `rc_context`: legends, ticks and the PNG read the style when they are made, after this function.
    matplotlib.rcParams.update(STYLE)
    # Without pyplot, which needs a display and keeps every figure.
    figure = Figure(figsize=(WIDTH, height * num_rows))
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **options)


def save_figure(figure: Figure, path: Path, title: str, note: str = "") -> None:
    """Write a PNG, with a title above and, smaller, a note on how to read it."""
    lines: list[tuple[str, float, dict[str, Any]]]
    lines = [(line, 13.5, {"weight": "bold"}) for line in textwrap.wrap(title, 52)]
    lines += [(line, SMALLEST_TEXT, {"color": "0.3"}) for line in textwrap.wrap(note, 84)]
    height, head = figure.get_figheight(), 0.1 + sum(1.35 * size / 72 for _, size, _ in lines)
    # The axes keep their height.
    figure.set_figheight(height + head)
    engine = cast(ConstrainedLayoutEngine, figure.get_layout_engine())
    engine.set(rect=(0, 0, 1, height / (height + head)))
    below = 0.05
    for line, size, style in lines:
        figure.text(0.012, 1 - below / (height + head), line, fontsize=size, va="top", **style)
        below += 1.35 * size / 72
    figure.savefig(path)


def styles_of(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return colour and dashes of each label. A family of models has one colour everywhere; thirty labels differ."""
    styles: dict[str, dict[str, Any]] = {}
    others = 0
    for label in dict.fromkeys(labels):
        color = next((color for pattern, color in _FAMILIES.items() if re.search(pattern, label)), None)
        if color is None:
            color, others = _OTHERS[others % len(_OTHERS)], others + 1
        taken = sum(style["color"] == color for style in styles.values())
        styles[label] = {"color": color, "linestyle": _DASHES[taken % len(_DASHES)]}
    return styles


def in_words(key: str) -> str:
    """Return what a dotted key sets, in words: `training.learning_rate` is `learning rate`."""
    name = key.rpartition(".")[2]
    return _WORDS.get(name, name.replace("_", " "))


def better(quantity: str, direction: Literal["lower", "higher"]) -> str:
    """Return the label of an axis that says which end of it is better. The arrow turns with the label."""
    arrow = "← lower is better" if direction == "lower" else "higher is better →"
    return f"{textwrap.fill(quantity, 34)}\n{arrow}"


def plot_seeds(axis: Axes, places: Sequence[float], of_seeds: Any, **style: Any) -> None:
    """Draw a line through the medians over seeds, and a band from the lowest to the highest.

    Args:
        axis: to draw on.
        places: along the x axis.
        of_seeds: a list of values for each seed.
        style: of the line, with its `color`.
    """
    values = np.asarray(of_seeds, dtype=np.float64)
    axis.plot(places, np.median(values, axis=0), **style)
    if len(values) > 1:
        axis.fill_between(places, values.min(0), values.max(0), color=style["color"], alpha=0.18, lw=0)


def seeds_note(num_seeds: int) -> str:
    """Return what a picture made by `plot_seeds` says of its lines."""
    if num_seeds == 1:
        return "One seed."
    return f"Lines: medians of {num_seeds} seeds. Bands: from the lowest to the highest seed."


def _annotate_ends(axis: Axes) -> list[tuple[tuple[float, float], Annotation]]:
    """Write the label of each line right of its axis, and return the ends of the lines with these texts."""
    found = []
    for line in axis.get_lines():
        if str(line.get_label()).startswith("_"):
            continue
        end = (float(np.asarray(line.get_xdata())[-1]), float(np.asarray(line.get_ydata())[-1]))
        thin = {"arrowstyle": "-", "color": line.get_color(), "lw": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 1}
        text = axis.annotate(
            textwrap.fill(str(line.get_label()), 19),
            end,
            (1.04, 0.5),
            textcoords="axes fraction",
            # Light colours are hard to read as text.
            color=0.7 * np.array(to_rgb(line.get_color())),
            fontsize=10.5,
            va="center",
            linespacing=1.0,
            annotation_clip=False,
            arrowprops=thin | {"relpos": (0, 0.5)},
        )
        found.append((end, text))
    return found


def label_lines(axes: np.ndarray) -> None:
    """Write the label of each line at its right end, in a darker shade; labels move apart where lines meet.

    Args:
        axes: of one figure, whose lines have labels. Give their limits and scales before.
    """
    labelled = [(axis, ends) for axis in axes.flat if (ends := _annotate_ends(axis))]
    axes.flat[0].figure.draw_without_rendering()
    for axis, ends in labelled:
        frame = axis.get_window_extent()
        places = np.array([(axis.transData.transform(end)[1] - frame.y0) / frame.height for end, _ in ends])
        # That of the text alone: the line from it has a box too.
        heights = np.array([Text.get_window_extent(text).height for _, text in ends]) / frame.height
        for (_, text), place in zip(ends, _spread(places.clip(0, 1), 1.12 * heights), strict=True):
            text.set_position((1.04, place))


def _spread(places: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Return the places nearest to the given ones at which boxes of such heights do not overlap."""
    order = np.argsort(places, kind="stable")
    # Less the height of the boxes below, all may stand in one place: what is left is that their order stays.
    below = np.concatenate([[0], np.cumsum((heights[order][1:] + heights[order][:-1]) / 2)])
    low, high = heights[order][0] / 2 - 0.01, 1.05 - heights[order][-1] / 2 - below[-1]
    if low > high:  # more than fit beside the axis
        low = high = (low + high) / 2
    found = np.empty_like(places)
    found[order] = np.clip(isotonic_regression(places[order] - below).x, low, high) + below
    return found


def legend_below(figure: Figure, axes: np.ndarray) -> None:
    """Put one legend for the series of all axes below them, in as many columns as the figure is wide."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    height = figure.get_figheight()
    # Room for any legend, while it is measured.
    figure.set_figheight(height + len(entries))
    for num_columns in range(min(5, len(entries)), 0, -1):
        legend = figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=num_columns)
        figure.draw_without_rendering()
        size = legend.get_window_extent()
        if num_columns == 1 or size.width <= 0.98 * figure.bbox.width:
            break
        legend.remove()
    # The axes keep their height.
    figure.set_figheight(height + size.height / figure.dpi)


def draw_result(recipe: BaseRecipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the pictures of an experiment from its numbers alone, if its task has any.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the pictures.
    """
    draw = getattr(task_module(recipe.task), "draw", None)
    if draw is not None:
        draw(recipe, as_read(measured), folder)


def draw_learning_curve(result: dict[str, Any], path: Path) -> None:
    """Draw loss over tokens as a PNG: the training loss faint, the validation loss marked.

    Args:
        result: content of the `result.json` of a training.
        path: of the picture.
    """
    figure, ((axis,),) = new_figure(1, 1, height=3.4)
    color = styles_of([result["model"]])[result["model"]]["color"]
    for split, style in (("training", {"alpha": 0.45, "lw": 1}), ("validation", {"marker": "o", "ms": 4})):
        points = result["learning_curve"][split]
        axis.plot(
            [point["tokens"] for point in points],
            [point["loss"] for point in points],
            color=color,
            label=split,
            **style,
        )
    axis.set(xlabel="training tokens", ylabel=better("loss (nats per token)", "lower"))
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.legend()
    size = f"{result['parameters'] / 1e6:.2f} million parameters"
    save_figure(figure, path, f"Loss while {result['model']} was trained", f"{size}, recipe {result['name']}.")


def draw_stages(result: dict[str, Any], path: Path) -> None:
    """Draw the validation measures of a memory model over all stages as a PNG.

    Above is the loss of the next token, below the share of tokens that the decoder reproduced from the memories.

    Args:
        result: content of the `result.json` of a training of a memory model.
        path: of the picture.
    """
    figure, ((loss,), (accuracy,)) = new_figure(2, 1, height=2.8, sharex=True)
    for axis, names in (
        (loss, ["eval_causal_loss"]),
        # The first objective is the causal one, whose loss is above.
        (accuracy, [f"eval_{name}_accuracy" for name in OBJECTIVES[1:]]),
    ):
        labels = {name: name.removeprefix("eval_").removesuffix("_accuracy").replace("_", " ") for name in names}
        styles = styles_of(labels.values())
        for name, label in labels.items():
            steps_before, points = 0, []
            for stage in result["stages"]:
                curve = stage["learning_curve"]
                points += [(steps_before + entry["step"], entry[name]) for entry in curve if name in entry]
                steps_before += stage["steps"]
                axis.axvline(steps_before, color="lightgrey", zorder=0)
            # A measure that no stage logged keeps its entry in the legend.
            axis.plot(
                *zip(*points, strict=True) if points else ([], []), marker="o", ms=4, label=label, **styles[label]
            )
    accuracy.set_xlabel("steps")
    accuracy.legend()
    loss.set_ylabel(better("loss of the next\ntoken (nats)", "lower"))
    accuracy.set_ylabel(better("share of tokens\nreproduced", "higher"))
    save_figure(figure, path, "What the memory model learns, stage by stage", "A grey line ends a stage.")


def _draw_map(axis: Axes, numbers: torch.Tensor, title: str) -> None:
    """Draw numbers `(L, H, T)` as colours, units counted from above; NaN is grey."""
    num_layers, num_heads, _ = numbers.shape
    # An error may be large at a few tokens, which would leave all the others in one colour.
    known = numbers[~numbers.isnan()]
    top = known.quantile(0.99).item() if known.numel() else 1.0
    image = axis.imshow(
        numbers.flatten(0, 1).numpy(),
        aspect="auto",
        cmap="cividis",
        interpolation="nearest",
        vmin=0,
        vmax=max(top, 1e-6),
    )
    axis.figure.colorbar(image, ax=axis, extend="max", fraction=0.04, pad=0.01)
    axis.grid(False)
    axis.set_facecolor("lightgrey")
    axis.set_title(title)
    axis.set_ylabel("layer")
    axis.set_yticks(np.arange(num_layers) * num_heads, [str(layer) for layer in range(num_layers)])
    for layer in range(1, num_layers):
        axis.axhline(layer * num_heads - 0.5, color="white", lw=0.8)


def _name_tokens(axes: np.ndarray, tokens: list[str]) -> None:
    # A dollar sign would begin a formula.
    names = [token.replace("\n", "\\n").replace(" ", "␣").replace("$", r"\$") for token in tokens]
    rotation = 90 if max(map(len, names)) > 1 else 0
    for axis in axes:
        axis.set_xticks(np.arange(len(names)), names, rotation=rotation, fontsize=SMALLEST_TEXT)


def _draw_bars(axis: Axes, table: list[dict[str, Any]], name: str, kind: str) -> None:
    numbers = [row[name] for row in table if row["kind"] == kind]
    axis.barh(np.arange(len(numbers)), numbers, color="#0072B2")
    axis.axvline(0, color="black", lw=0.8)
    axis.set_title(f"mean {name}")
    axis.locator_params(axis="x", nbins=3)
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
    height = min(6.0, 1.6 + 0.16 * num_layers * num_heads)
    # A shared axis puts each bar beside the row of its unit in the map.
    figure, axes = new_figure(3, 2, height, sharey="row", width_ratios=[4, 1.1])
    maps = {
        "contextual: error |y - v|² / |v|²": units_of_row.error[:, 0],
        "contextual: entropy (nats)": units_of_row.entropy[:, 0, 0],
        "persistent: entropy (nats)": units_of_row.entropy[:, 1, 0],
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
    note = "A row for each head, layer by layer. Right: the mean over all tokens of the head's share in its layer's "
    note += "output, or of the norm of what it adds."
    save_figure(figure, path, "Each memory of the mosaic, token by token", note)

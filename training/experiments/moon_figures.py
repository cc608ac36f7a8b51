# SPDX-License-Identifier: Apache-2.0
"""Pictures of three moons: curves (Figs. 4 and 5), matrices (Fig. 6), and what each memory does."""

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes

from modeling_memory_mosaic import inspect_continuous_units
from training.figures import new_figure, save_figure
from training.synthetic import moons
from training.tasks.moon_model import (
    EVALUATION_SEED,
    SYSTEMS,
    MoonSettings,
    context_lengths,
    heads_in_words,
    load_part,
)


PANELS_IN_A_ROW = 3
SYSTEM_NAMES = {
    name: f"{name} moons, periods {', '.join(f'{period:g}' for period in periods)}"
    for name, periods in SYSTEMS.items()
}


class MoonExperiment(MoonSettings, Protocol):
    """What the pictures read of the recipe."""

    name: str
    heads: list[int]
    seeds: list[int]

    @property
    def folder(self) -> Path: ...

    @property
    def parts(self) -> dict[tuple[int, int], Path]: ...


def rounded_landmarks(recipe: MoonSettings, system: str) -> list[float]:
    """Return the periods of a system and the common one, in observations."""
    return [round(mark, 1) for mark in moons.landmarks(SYSTEMS[system], recipe.length)]


def with_heads(rows: list[dict[str, Any]], heads: int) -> list[dict[str, Any]]:
    """Return the rows of one number of heads."""
    return [row for row in rows if row["heads"] == heads]


def _mark_periods(axis: Axes, marks: list[float]) -> None:
    """Draw a vertical line at each period and at the common one."""
    for name, mark in zip(("p1", "p2", "p3", "lcm"), marks, strict=True):
        axis.axvline(mark, color="grey", lw=0.8, alpha=0.7)
        axis.text(mark, 1.01, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)


def _draw_panel(
    axis: Axes, recipe: MoonExperiment, system: str, parts: list[dict[str, Any]], identities: list[dict[str, Any]]
) -> None:
    """Draw the curves of all seeds of one number of heads in one system."""
    lengths = context_lengths(recipe)
    for part in parts:
        axis.plot(lengths, part["curves"][system], lw=0.9, label=f"seed {part['seed']}")
    for identity, style in zip(identities, (":", "--"), strict=True):
        label = f"identity, beta {identity['beta']:g}"
        axis.plot(lengths, identity["curves"][system], style, lw=1, color="black", label=label)
    _mark_periods(axis, rounded_landmarks(recipe, system))
    axis.set_title(f"{heads_in_words(parts[0]['heads'])}, {SYSTEM_NAMES[system]}", fontsize=9, pad=16)
    axis.set_ylim(0, moons.AMPLITUDE)  # diverging predictions leave the panel


def draw_curves(recipe: MoonExperiment, parts: list[dict[str, Any]], identities: list[dict[str, Any]]) -> None:
    """Draw the curves of Figs. 4 and 5: one panel for each system and each number of heads.

    Args:
        recipe: of the experiment.
        parts: contents of `part.json`, of all trainings.
        identities: measures of identity matrices, of up to as many heads as moons: those of more predict the same.
    """
    columns = min(PANELS_IN_A_ROW, len(recipe.heads))
    rows = math.ceil(len(recipe.heads) / columns)
    figure, axes = new_figure(rows * len(SYSTEMS), columns, width=4.4, height=3.0, sharey=True, sharex=True)
    for block, system in zip(axes.reshape(len(SYSTEMS), -1), SYSTEMS, strict=True):
        for axis, heads in zip(block, recipe.heads, strict=False):
            same = with_heads(identities, min(heads, moons.NUM_MOONS))
            _draw_panel(axis, recipe, system, with_heads(parts, heads), same)
        for axis in block[len(recipe.heads) :]:
            axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"mean absolute deviation,\n{recipe.horizon} predictions in a row", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("observations read")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _draw_matrix(axis: Axes, matrix: np.ndarray, fontsize: int = 5) -> None:
    """Draw a matrix as colours with its numbers."""
    # A matrix of zeros would leave no range of colours.
    axis.imshow(matrix, cmap="Blues", vmin=0, vmax=matrix.max() or 1, aspect="auto")
    axis.grid(False)
    for (row, column), value in np.ndenumerate(matrix):
        color = "white" if value > matrix.max() / 2 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=fontsize, color=color)
    axis.set_xticks([])
    axis.set_yticks([])


def draw_weights(recipe: MoonExperiment, parts: list[dict[str, Any]]) -> None:
    """Draw the matrices of Fig. 6: a line for each number of heads, three matrices for each seed.

    A matrix has a row for each complex coordinate of a head, and a column for each moon.

    Args:
        recipe: of the experiment.
        parts: contents of `part.json`, of all trainings.
    """
    # W_z is transposed, so that in all three a column is a moon.
    titles = {"W_phi": "$W_\\phi$", "W_psi": "$W_\\psi$", "W_z": "$W_z^T$"}
    by_heads = [with_heads(parts, heads) for heads in recipe.heads]
    heights = [len(rows[0]["weights"]["W_phi"]) for rows in by_heads]
    # The numbers need the same room in matrices of few and of many rows.
    height, columns = 0.3 + 0.22 * sum(heights) / len(heights), len(recipe.seeds) * len(titles)
    figure, axes = new_figure(len(heights), columns, width=0.85, height=height, height_ratios=heights)
    for place, (line, rows) in enumerate(zip(axes, by_heads, strict=True)):
        for part, of_seed in zip(rows, line.reshape(-1, len(titles)), strict=True):
            for axis, (name, title) in zip(of_seed, titles.items(), strict=True):
                _draw_matrix(axis, np.array(part["weights"][name]))
                if place == 0:
                    seed = f"seed {part['seed']}" if name == "W_psi" else ""
                    axis.set_title(f"{seed}\n{title}", fontsize=8)
        line[0].set_ylabel(heads_in_words(rows[0]["heads"]), fontsize=8)
    save_figure(figure, recipe.folder / f"{recipe.name}_weights.png")


def _late_deviation(part: dict[str, Any]) -> float:
    """Return the deviation after the longest period of a moon, by which the best model is chosen."""
    return part["sections"]["validation"]["p3 to lcm"] + part["sections"]["validation"]["after lcm"]


def _draw_moons_by_head(axis: Axes, matrix: np.ndarray) -> None:
    """Draw the share `[H][3]` of each head in the prediction of each moon."""
    _draw_matrix(axis, matrix.round(2) + 0.0, fontsize=7)  # + 0.0 turns -0.0 into 0.0
    axis.set_xticks(range(moons.NUM_MOONS), [f"period {period:g}" for period in moons.VALIDATION_TRIPLE])
    axis.set_yticks(range(len(matrix)))
    axis.set_xlabel("whose prediction it is")


def draw_units(recipe: MoonExperiment, parts: list[dict[str, Any]]) -> None:
    """Draw the measures of each memory in the best model of each number of heads.

    Args:
        recipe: of the experiment.
        parts: contents of `part.json`, of all trainings.
    """
    best = [min(with_heads(parts, heads), key=_late_deviation) for heads in recipe.heads]
    figure, axes = new_figure(4, len(best), width=3.4, height=2.3)
    windows = moons.draw_windows(moons.VALIDATION_TRIPLE, 1, recipe.length, EVALUATION_SEED)
    for column, part in zip(axes.T, best, strict=True):
        model, _ = load_part(recipe.parts[part["heads"], part["seed"]])
        units = inspect_continuous_units(model, windows)
        # The fourth axis of a column is for the matrix below. There is one window, `rows[0]`.
        for axis, rows in zip(column, (units.error, units.effective_pairs, units.share), strict=False):
            for head, values in enumerate(rows[0].tolist()):
                axis.plot(range(1, len(values) + 1), values, lw=0.8, label=f"head {head}")
            _mark_periods(axis, rounded_landmarks(recipe, "validation"))
            axis.set_xlim(0, recipe.length)
        column[0].set_title(f"{heads_in_words(part['heads'])}, seed {part['seed']}", pad=16)
        column[0].legend(fontsize=6)
        _draw_moons_by_head(column[3], np.array(part["moons_by_head"]))
    for axis, label in zip(
        axes[:, 0], ("relative error", "effective pairs", "share of prediction", "head"), strict=True
    ):
        axis.set_ylabel(label)
    for axis in (*axes[0], *axes[1]):
        axis.set_yscale("log")
    for axis in axes[0]:
        axis.set_ylim(1e-4, 10)
    for axis in axes[2]:
        axis.set_xlabel("observations read")
    save_figure(figure, recipe.folder / f"{recipe.name}_units.png")

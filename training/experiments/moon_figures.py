# SPDX-License-Identifier: Apache-2.0
"""Pictures of three moons: curves (Figs. 4 and 5), matrices (Fig. 6), and what each memory does."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from training.figures import legend_below, new_figure, plot_seeds, save_figure, seeds_note
from training.synthetic import moons
from training.tasks.moon_model import SYSTEMS, heads_in_words


# Colours of trained models and of identity matrices.
_TRAINED, _IDENTITY = "#0072B2", "0.25"
# Observations from which on curves are drawn, on a logarithmic axis that sets the periods apart.
_FIRST = 10
_BEST = "The seed with the least deviation after the longest period."


def with_heads(rows: list[dict[str, Any]], heads: int) -> list[dict[str, Any]]:
    """Return the rows of one number of heads."""
    return [row for row in rows if row["heads"] == heads]


def _numbers_of_heads(measured: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(part["heads"] for part in measured["trained"]))


def _mark_periods(axis: Axes, marks: list[float]) -> None:
    """Draw a vertical line at each period and at the common one that lies within the axis."""
    low, high = axis.get_xlim()
    named = dict(zip(("p1", "p2", "p3", "all"), marks, strict=True))
    for name, mark in ((name, mark) for name, mark in named.items() if low <= mark <= high):
        axis.axvline(mark, color="grey", lw=0.8, alpha=0.7)
        axis.text(mark, 1.01, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=10)


def _draw_panel(axis: Axes, measured: dict[str, Any], system: str, heads: int) -> None:
    """Draw the curves of one number of heads in one system."""
    lengths = measured["context_lengths"]
    curves = [part["curves"][system] for part in with_heads(measured["trained"], heads)]
    plot_seeds(axis, lengths, curves, color=_TRAINED, label="trained")
    # Identity matrices of more heads than moons predict as those of one for each.
    for identity, dashes in zip(
        with_heads(measured["identity"], min(heads, moons.NUM_MOONS)), (":", "--"), strict=True
    ):
        label = f"identity matrices, beta {identity['beta']:g}"
        axis.plot(lengths, identity["curves"][system], dashes, lw=1.2, color=_IDENTITY, label=label)
    axis.set_xscale("log")
    axis.set_xlim(_FIRST, lengths[-1])
    _mark_periods(axis, measured["landmarks"][system])
    axis.set_xticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    axis.minorticks_off()
    axis.set_ylim(0, moons.AMPLITUDE)  # diverging predictions leave the panel


def draw_curves(measured: dict[str, Any], path: Path, horizon: int) -> None:
    """Draw the curves of Figs. 4 and 5: a column for each system, a row for each number of heads.

    Args:
        measured: of the result.
        path: of the picture.
        horizon: predictions in a row.
    """
    heads = _numbers_of_heads(measured)
    figure, axes = new_figure(len(heads), len(SYSTEMS), height=1.9, sharey=True, sharex=True)
    for row, number in zip(axes, heads, strict=True):
        for axis, (system, periods) in zip(row, SYSTEMS.items(), strict=True):
            _draw_panel(axis, measured, system, number)
            if number == heads[0]:
                names = ", ".join(f"{period:g}" for period in periods)
                axis.set_title(f"{system} moons\n(periods {names})", pad=18)
        row[0].set_ylabel(f"{heads_in_words(number)}\ndeviation")
    for axis in axes[-1]:
        axis.set_xlabel("observations read")
    legend_below(figure, axes)
    note = f"Mean absolute deviation of {horizon} predictions in a row: lower is better. p1, p2, p3: a moon has come "
    note += f"round; all: all of them have. {seeds_note(len(with_heads(measured['trained'], heads[0])))}"
    save_figure(figure, path, "Predicting three moons, by the observations read", note)


def _draw_matrix(axis: Axes, matrix: np.ndarray, digits: int) -> None:
    """Draw a matrix as colours with its numbers."""
    # A matrix of zeros would leave no range of colours.
    axis.imshow(matrix, cmap="Blues", vmin=0, vmax=matrix.max() or 1, aspect="auto")
    axis.grid(False)
    for (row, column), value in np.ndenumerate(matrix):
        color = "white" if value > matrix.max() / 2 else "black"
        axis.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=10, color=color)
    axis.set_xticks([])
    axis.set_yticks([])


def _best_parts(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each number of heads the seed that deviates least after the longest period of a moon."""

    def late(part: dict[str, Any]) -> float:
        sections: dict[str, float] = part["sections"]["validation"]
        return sections["p3 to lcm"] + sections["after lcm"]

    return [min(with_heads(measured["trained"], heads), key=late) for heads in _numbers_of_heads(measured)]


def draw_weights(measured: dict[str, Any], path: Path) -> None:
    """Draw the matrices of Fig. 6: a row for each number of heads, of its best seed.

    A matrix has a row for each complex coordinate of a head, and a column for each moon.

    Args:
        measured: of the result.
        path: of the picture.
    """
    # W_z is transposed, so that in all three a column is a moon.
    titles = {"W_phi": "keys, $W_\\phi$", "W_psi": "values, $W_\\psi$", "W_z": "outputs, $W_z^T$"}
    best = _best_parts(measured)
    heights = [len(part["weights"]["W_phi"]) for part in best]
    height = 0.3 + 0.24 * sum(heights) / len(heights)
    figure, axes = new_figure(len(best), len(titles), height, height_ratios=heights)
    for row, part in zip(axes, best, strict=True):
        for axis, (name, title) in zip(row, titles.items(), strict=True):
            _draw_matrix(axis, np.array(part["weights"][name]), digits=2)
            if part is best[0]:
                axis.set_title(title)
        row[0].set_ylabel(f"{heads_in_words(part['heads'])}\nseed {part['seed']}")
    note = f"{_BEST} Columns are moons, rows the coordinates of the heads; numbers are absolute values."
    save_figure(figure, path, "Which coordinates hold which moon", note)


def draw_units(measured: dict[str, Any], path: Path) -> None:
    """Draw the share of each head in the prediction of each moon, in the best seed of each number of heads.

    Args:
        measured: of the result.
        path: of the picture.
    """
    best = _best_parts(measured)
    columns = min(2, len(best))
    figure, axes = new_figure(math.ceil(len(best) / columns), columns, height=2.4)
    for axis in axes.flat[len(best) :]:
        axis.set_visible(False)
    for axis, part in zip(axes.flat, best, strict=False):
        shares = np.array(part["moons_by_head"])
        _draw_matrix(axis, shares.round(2) + 0.0, digits=2)  # + 0.0 turns -0.0 into 0.0
        axis.set_xticks(range(moons.NUM_MOONS), [f"{period:g}" for period in moons.VALIDATION_TRIPLE])
        axis.set_yticks(range(len(shares)))
        axis.set_title(f"{heads_in_words(part['heads'])}, seed {part['seed']}")
        axis.set(xlabel="period of the moon", ylabel="head")
    note = f"{_BEST} Shares of the heads in the prediction of each moon: they sum to 1 in a column."
    save_figure(figure, path, "Which head predicts which moon", note)

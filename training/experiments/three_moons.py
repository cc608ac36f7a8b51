# SPDX-License-Identifier: Apache-2.0
"""Predictive disentanglement (Memory Mosaics, Figs. 3 to 6): each of three memories learns to predict one moon.

One memory alone predicts well only after the common period of all moons. Three memories that store one moon each can
predict it after its own period. Models with one and with three heads are trained with several seeds, and the result
lists each seed.
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from matplotlib.axes import Axes
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from tqdm import tqdm
from typing_extensions import Self

from modeling_memory_mosaic import inspect_continuous_units
from training.experiments.comparison import summary
from training.figures import new_figure, save_figure
from training.parallel import Job, run_all
from training.recipe import BaseRecipe
from training.result import header, read_result
from training.run_folder import run_once
from training.synthetic import moons
from training.tables import Claim, Verdict, markdown_table
from training.tasks.moon_model import (
    EVALUATION_SEED,
    PART,
    SECTIONS,
    SYSTEMS,
    build_model,
    context_lengths,
    heads_in_words,
    identity_model,
    load_part,
    measure,
    train_part,
)


__all__ = ["Recipe", "plan", "run", "summary"]

IDENTITY_BETAS = (5000.0, 50.0)  # a kernel with nearly no blur, and the kernel of the trained models
AMPLITUDE = 1.0  # of each coordinate of a moon
FALL = 0.9  # a deviation falls if it is at most this share of the one before
NEAR_PERMUTATION = 0.9  # least measure of matrices that count as permutations
SYSTEM_NAMES = {
    name: f"{name} moons, periods {', '.join(f'{period:g}' for period in periods)}"
    for name, periods in SYSTEMS.items()
}


class Recipe(BaseRecipe):
    """Lengths are in observations; see `configuration/README.md` for each field."""

    task: Literal["three_moons"]
    heads: list[Literal[1, 3]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    # Length, steps, learning rates, beta, clip and horizon are those of the authors' code.
    length: PositiveInt = 800
    batch_size: PositiveInt
    steps: PositiveInt = 500
    learning_rate: PositiveFloat = 1e-2
    final_learning_rate: PositiveFloat = 5e-6
    beta: PositiveFloat = 50.0
    loss_clip: PositiveFloat | None = 0.5
    num_windows: PositiveInt
    horizon: PositiveInt = 25
    eval_stride: PositiveInt = 1
    save_steps: PositiveInt = 50
    workers: PositiveInt = 1

    @model_validator(mode="after")
    def _check_parts_and_lengths(self) -> Self:
        for name in ("heads", "seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"`{name}` names one twice: {getattr(self, name)}")
        if min(self.seeds) < 0:
            raise ValueError(f"`seeds` are {self.seeds}: they cannot be negative")
        longest = moons.landmarks(moons.VALIDATION_TRIPLE, self.length)[-1]
        if not longest + self.eval_stride < self.length - self.horizon or self.length > moons.TRAJECTORY_LENGTH:
            raise ValueError(
                f"`length` {self.length}, `horizon` {self.horizon} and `eval_stride` {self.eval_stride}: "
                f"no prediction would be judged after the common period of the moons, {longest:.0f}, "
                f"or the length is over {moons.TRAJECTORY_LENGTH}"
            )
        first = min(moons.landmarks(periods, self.length)[0] for periods in SYSTEMS.values())
        # A longer stride could leave a section between two periods without any prediction.
        if self.eval_stride >= first:
            raise ValueError(f"`eval_stride` is {self.eval_stride}: it must be below the shortest period, {first:.1f}")
        return self

    def content(self) -> dict[str, Any]:
        """Return the settings that determine the result: parallel workers and the saving interval do not."""
        return self.model_dump(exclude={"output_dir", "workers", "save_steps"})

    @property
    def parts(self) -> dict[tuple[int, int], Path]:
        """Folder of each training, by heads and seed."""
        return {(h, s): self.folder / f"heads{h}-seed{s}" for h in self.heads for s in self.seeds}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what the experiment would do: each training, and whether it is finished."""
    lines: dict[str, Any] = {}
    for (heads, seed), folder in recipe.parts.items():
        finished = "finished" if (folder / PART).is_file() else "to be trained"
        parameters = build_model(recipe, heads).num_parameters()
        lines[f"{heads_in_words(heads)}, seed {seed}"] = f"{parameters} parameters, {finished}, {folder}"
    lines |= {"trainings": len(recipe.parts), "steps": recipe.steps, "predictions": len(context_lengths(recipe))}
    return lines | {"folder": str(recipe.folder), "hash": recipe.hash}


def _rounded_landmarks(recipe: Recipe, system: str) -> list[float]:
    return [round(mark, 1) for mark in moons.landmarks(SYSTEMS[system], recipe.length)]


def falls(sections: dict[str, float]) -> list[bool]:
    """Return whether the deviation falls from each section to the next, in the order of `SECTIONS`."""
    values = [sections[name] for name in SECTIONS]
    return [after <= FALL * before for before, after in zip(values, values[1:], strict=False)]


def falls_at_the_end_only(sections: dict[str, float]) -> bool:
    """Return whether the deviation is level up to the common period and falls after it, as with one memory."""
    *early, last = [sections[name] for name in SECTIONS]
    return min(early) >= FALL * max(early) and last <= FALL * min(early)


def falls_at_each_period(sections: dict[str, float]) -> bool:
    """Return whether the deviation falls at the period of each moon, as with one memory for each.

    Deviations above `AMPLITUDE` fail: such predictions diverge, so that a fall from there shows nothing.
    """
    # Without the fall at the common period: three memories need not wait for it.
    return all(falls(sections)[:3]) and max(sections.values()) <= AMPLITUDE


def _number(value: float, digits: int) -> str:
    """Format a number; large ones without decimals."""
    return f"{value:.{digits}f}" if value < 10 else f"{value:,.0f}"


def _median_and_range(values: list[float], digits: int) -> str:
    """Format the median of values with their range in brackets."""
    # Not a mean: predictions in a row can diverge, and the mean would then show that one seed alone.
    median, low, high = (_number(value, digits) for value in (statistics.median(values), min(values), max(values)))
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def _by_heads(rows: list[dict[str, Any]], heads: int) -> list[dict[str, Any]]:
    return [row for row in rows if row["heads"] == heads]


def _table_line(model: str, seeds: str, system: str, rows: list[dict[str, Any]]) -> list[str]:
    cells = [_median_and_range([row["sections"][system][name] for row in rows], 3) for name in SECTIONS]
    # One head can mix the moons in any way without any change of its predictions: there the measure has no meaning.
    together = [row["permutation"]["together"] for row in rows]
    nearness = _median_and_range(together, 2) if rows[0]["heads"] > 1 else "-"
    return [model, str(rows[0]["heads"]), seeds, system, *cells, nearness]


def _table(parts: list[dict[str, Any]], identities: list[dict[str, Any]]) -> str:
    """Return a Markdown table of deviations by section: trained models of each size in one line, then each seed."""
    groups = [(f"identity, beta {row['beta']:g}", "-", [row]) for row in identities]
    trained = defaultdict(list)
    for part in parts:
        trained[part["heads"]].append(part)
    for heads in sorted(trained):
        rows = trained[heads]
        groups.append(("trained", ", ".join(str(row["seed"]) for row in rows), rows))
        if len(rows) > 1:
            groups += [("trained", str(row["seed"]), [row]) for row in rows]
    columns = ["model", "heads", "seeds", "moons", *SECTIONS, "near a permutation"]
    lines = [_table_line(model, seeds, system, rows) for system in SYSTEMS for model, seeds, rows in groups]
    return markdown_table(columns, "lrll" + "r" * (len(columns) - 4), lines)


def _verdict(successes: int, count: int) -> Verdict:
    """Return the verdict of a majority of seeds. Fewer successes show that a claim can hold, but not reliably."""
    return "reproduced" if 2 * successes > count else "not at this size" if successes else "contradicted"


def _format_seeds(rows: list[dict[str, Any]], hold: list[bool]) -> str:
    """Format for how many seeds a claim holds, for which it fails, and the deviations of all seeds by section."""
    sections = [_median_and_range([row["sections"]["validation"][name] for row in rows], 2) for name in SECTIONS]
    failed = ", ".join(str(row["seed"]) for row, holds in zip(rows, hold, strict=True) if not holds)
    count = f"{sum(hold)} of {len(hold)} seeds" + (f" (not {failed})" if failed else "")
    return f"{count}; all seeds: {', '.join(sections)}"


def _claim_on_one_head(rows: list[dict[str, Any]]) -> Claim:
    hold = [falls_at_the_end_only(row["sections"]["validation"]) for row in rows]
    return Claim(
        "With one head the prediction of unseen moons is no better than a guess until all stand as before, then good",
        "a sharp fall at the common period alone (Fig. 4)",
        f"{_format_seeds(rows, hold)} (deviation in the five sections between the periods)",
        _verdict(sum(hold), len(hold)),
    )


def _claim_on_three_heads(rows: list[dict[str, Any]]) -> Claim:
    hold = [falls_at_each_period(row["sections"]["validation"]) for row in rows]
    return Claim(
        "With three heads the deviation falls at each moon's own period",
        "three falls, before the common period (Fig. 5)",
        _format_seeds(rows, hold),
        _verdict(sum(hold), len(hold)),
    )


def _claim_on_weights(rows: list[dict[str, Any]]) -> Claim:
    together = [row["permutation"]["together"] for row in rows]
    hold = [value >= NEAR_PERMUTATION for value in together]
    each = ", ".join(f"{row['seed']}: {value:.2f}" for row, value in zip(rows, together, strict=True))
    return Claim(
        "With three heads the matrices become permutations: each head takes one moon, and the same in all three",
        "absolute weights near permutations (Fig. 6)",
        f"{sum(hold)} of {len(hold)} seeds at least {NEAR_PERMUTATION}; 1 is a permutation, 0 an even mixture; by "
        f"seed {each}",
        _verdict(sum(hold), len(hold)),
    )


def _claim_before_the_common_period(one: list[dict[str, Any]], three: list[dict[str, Any]]) -> Claim:
    before = {
        heads: [row["sections"]["validation"]["p3 to lcm"] for row in rows] for heads, rows in ((1, one), (3, three))
    }
    level = statistics.mean(before[1])
    hold = [value <= level / 2 for value in before[3]]
    return Claim(
        "Between the longest and the common period three heads predict well, and one head cannot",
        "Fig. 5 against Fig. 4",
        f"deviation {_median_and_range(before[3], 2)} with three heads, {_median_and_range(before[1], 2)} with one; "
        f"{sum(hold)} of {len(hold)} seeds at most half of it",
        _verdict(sum(hold), len(hold)),
    )


def _claim_on_the_identity(identities: list[dict[str, Any]]) -> Claim:
    # The kernel of the trained models blurs, and its errors add up over predictions in a row.
    sharp = [row for row in identities if row["beta"] == max(IDENTITY_BETAS)]
    rules = {1: falls_at_the_end_only, 3: falls_at_each_period}
    hold = [rules[row["heads"]](row["sections"]["validation"]) for row in sharp]
    deviations = {
        row["heads"]: ", ".join(f"{row['sections']['validation'][name]:.3g}" for name in SECTIONS) for row in sharp
    }
    return Claim(
        "Identity matrices solve the task without training: the memory alone predicts",
        "stated with the training (section on three moons)",
        f"beta {max(IDENTITY_BETAS):g}: "
        + "; ".join(f"{heads_in_words(heads)} {values}" for heads, values in deviations.items()),
        _verdict(sum(hold), len(hold)),
    )


def _claims(parts: list[dict[str, Any]], identities: list[dict[str, Any]]) -> list[Claim]:
    claims = []
    if one := _by_heads(parts, 1):
        claims.append(_claim_on_one_head(one))
    if three := _by_heads(parts, 3):
        claims += [_claim_on_three_heads(three), _claim_on_weights(three)]
    if one and three:
        claims.append(_claim_before_the_common_period(one, three))
    return [*claims, _claim_on_the_identity(identities)]


def _mark_periods(axis: Axes, marks: list[float]) -> None:
    """Draw a vertical line at each period and at the common one."""
    for name, mark in zip(("p1", "p2", "p3", "lcm"), marks, strict=True):
        axis.axvline(mark, color="grey", lw=0.8, alpha=0.7)
        axis.text(mark, 1.01, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)


def _draw_curves(recipe: Recipe, parts: list[dict[str, Any]], identities: list[dict[str, Any]]) -> None:
    """Draw the curves of Figs. 4 and 5: one panel for each number of heads and each system."""
    figure, axes = new_figure(len(SYSTEMS), len(recipe.heads), width=5.4, height=3.4, sharey=True, sharex=True)
    lengths = context_lengths(recipe)
    for row, system in zip(axes, SYSTEMS, strict=True):
        for axis, heads in zip(row, recipe.heads, strict=True):
            for part in _by_heads(parts, heads):
                axis.plot(lengths, part["curves"][system], lw=0.9, label=f"seed {part['seed']}")
            for identity, style in zip(_by_heads(identities, heads), (":", "--"), strict=True):
                label = f"identity, beta {identity['beta']:g}"
                axis.plot(lengths, identity["curves"][system], style, lw=1, color="black", label=label)
            _mark_periods(axis, _rounded_landmarks(recipe, system))
            axis.set_title(f"{heads_in_words(heads)}, {SYSTEM_NAMES[system]}", fontsize=9, pad=16)
            axis.set_ylim(0, AMPLITUDE)  # diverging predictions leave the panel
    for axis in axes[:, 0]:
        axis.set_ylabel(f"mean absolute deviation,\n{recipe.horizon} predictions in a row", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("observations read")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _draw_matrix(axis: Axes, matrix: np.ndarray) -> None:
    """Draw a matrix as colours with its numbers."""
    # A matrix of zeros would leave no range of colours.
    axis.imshow(matrix, cmap="Blues", vmin=0, vmax=matrix.max() or 1)
    axis.grid(False)
    for (row, column), value in np.ndenumerate(matrix):
        color = "white" if value > matrix.max() / 2 else "black"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5, color=color)
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_weights(recipe: Recipe, parts: list[dict[str, Any]]) -> None:
    """Draw the matrices of Fig. 6 for every seed, below each other: a row for each head, a column for each moon."""
    names = list(parts[0]["weights"])
    figure, axes = new_figure(len(names) * len(recipe.heads), len(recipe.seeds), width=1.15, height=1.15)
    for index, part in enumerate(parts):
        # Parts are all seeds of one number of heads, then all of the next.
        block, column = divmod(index, len(recipe.seeds))
        for offset, name in enumerate(names):
            axis = axes[block * len(names) + offset, column]
            _draw_matrix(axis, np.array(part["weights"][name]))
            if offset == 0:
                axis.set_title(f"{heads_in_words(part['heads'])}\nseed {part['seed']}", fontsize=7)
            if column == 0:
                # W_z is transposed, so that in all three a column is a moon.
                axis.set_ylabel(("$W_\\phi$", "$W_\\psi$", "$W_z^T$")[offset], fontsize=9)
    save_figure(figure, recipe.folder / f"{recipe.name}_weights.png")


def _late_deviation(part: dict[str, Any]) -> float:
    """Return the deviation after the longest period of a moon, by which the best model is chosen."""
    return part["sections"]["validation"]["p3 to lcm"] + part["sections"]["validation"]["after lcm"]


def _draw_moons_by_head(axis: Axes, matrix: np.ndarray) -> None:
    """Draw the share `[H][3]` of each head in the prediction of each moon."""
    _draw_matrix(axis, matrix.round(2) + 0.0)  # + 0.0 turns -0.0 into 0.0
    axis.set_aspect("auto")
    axis.set_xticks(range(moons.NUM_MOONS), [f"period {period:g}" for period in moons.VALIDATION_TRIPLE])
    axis.set_yticks(range(len(matrix)))
    axis.set_xlabel("whose prediction it is")


def _draw_units(recipe: Recipe, parts: list[dict[str, Any]]) -> None:
    """Draw the measures of each memory in the best model of each number of heads."""
    best = [min(_by_heads(parts, heads), key=_late_deviation) for heads in recipe.heads]
    figure, axes = new_figure(4, len(best), width=5.4, height=2.3)
    windows = moons.draw_windows(moons.VALIDATION_TRIPLE, 1, recipe.length, EVALUATION_SEED)
    for column, part in zip(axes.T, best, strict=True):
        model, _ = load_part(recipe.parts[part["heads"], part["seed"]])
        units = inspect_continuous_units(model, windows)
        # The fourth axis of a column is for the matrix below. There is one window, `rows[0]`.
        for axis, rows in zip(column, (units.error, units.effective_pairs, units.share), strict=False):
            for head, values in enumerate(rows[0].tolist()):
                axis.plot(range(1, len(values) + 1), values, lw=0.8, label=f"head {head}")
            _mark_periods(axis, _rounded_landmarks(recipe, "validation"))
            axis.set_xlim(0, recipe.length)
        column[0].set_title(f"{heads_in_words(part['heads'])}, seed {part['seed']}", pad=16)
        column[0].legend()
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


def _read_part(folder: Path) -> dict[str, Any]:
    part = read_result(folder, PART)
    if part is None:
        raise ValueError(f"{folder} holds no {PART}: run the experiment again, which trains this model")
    return part


def _results(recipe: Recipe, data: dict[str, Any]) -> dict[str, Any]:
    """Train the missing parts, measure them and the identity models, draw all figures and judge the claims."""
    jobs = [Job(folder, train_part, (recipe, *part, folder)) for part, folder in recipe.parts.items()]
    run_all(jobs, recipe.workers)
    parts = [_read_part(folder) for folder in recipe.parts.values()]
    combinations = [(heads, beta) for beta in IDENTITY_BETAS for heads in recipe.heads]
    identities = [
        {"heads": heads, "beta": beta} | measure(identity_model(recipe, heads, beta), recipe)
        for heads, beta in tqdm(combinations, desc="identity weights")
    ]
    _draw_curves(recipe, parts, identities)
    _draw_weights(recipe, parts)
    _draw_units(recipe, parts)
    measured = {
        "context_lengths": context_lengths(recipe),
        "landmarks": {name: _rounded_landmarks(recipe, name) for name in SYSTEMS},
        "trained": parts,
        # The weights of the identity and their measures are known.
        "identity": [{k: row[k] for k in ("heads", "beta", "curves", "sections")} for row in identities],
    }
    claims = [claim._asdict() for claim in _claims(parts, identities)]
    measures = {"measured": measured, "table": _table(parts, identities), "claims": claims}
    return header(recipe) | {"data": data} | measures


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train the missing models, measure and draw; return the content of `result.json`.

    Raises:
        ValueError: if several processes were launched, as each of them would train everything.
    """
    state = PartialState()
    if state.num_processes > 1:
        raise ValueError(
            f"{state.num_processes} processes were launched, but the models are too small to be spread: start one, "
            "and train several at once by `workers`"
        )
    # No file is read: the periods of the systems stand for the data.
    data = {name: list(periods) for name, periods in SYSTEMS.items()}
    identity = {"hash": recipe.hash, "data": data, "recipe": recipe.content()}
    return run_once(recipe, state, restart, lambda: identity, make=lambda data: _results(recipe, data))

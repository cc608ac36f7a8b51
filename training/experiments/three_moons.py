# SPDX-License-Identifier: Apache-2.0
"""Predictive disentanglement (Memory Mosaics, Figs. 3 to 6): each of several memories learns to predict one moon.

One memory alone predicts well only after the common period of all moons. Three memories that store one moon each can
predict it after its own period; more memories than moons leave some to spare. Models of each number of heads are
trained with several seeds. `moon_figures.py` draws them.
"""

import math
import statistics
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from tqdm import tqdm
from typing_extensions import Self

from training.claims import (
    Effect,
    Effects,
    RecipeWithClaims,
    judged,
    mean_effect,
    share_difference_effect,
    share_effect,
)
from training.experiments.comparison import summary
from training.experiments.moon_figures import draw_curves, draw_units, draw_weights, with_heads
from training.figures import draw_result
from training.parallel import Job, run_all
from training.result import header, read_result
from training.run_folder import run_once
from training.synthetic import moons
from training.tables import markdown_table
from training.tasks.moon_model import (
    PART,
    SECTIONS,
    SYSTEMS,
    build_model,
    context_lengths,
    heads_in_words,
    identity_model,
    measure,
    sections_by_window,
    train_part,
)


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

IDENTITY_BETAS = (5000.0, 50.0)  # a kernel with nearly no blur, and the kernel of the trained models
FALL = 0.9  # a deviation falls if it is at most this share of the one before
NEAR_PERMUTATION = 0.9  # least measure of matrices that count as permutations
# With identity matrices: the section from which on the prediction is good.
SOLVED = {1: "after lcm", moons.NUM_MOONS: "p3 to lcm"}

FALLS_AT_EACH, FALLS_AT_THE_END = "falls at each period", "falls at the common period alone"
IS_PERMUTATION, SPARE_HEADS = "near a permutation", "falls at each period, spare heads less 3 heads"


def _by_heads(effect: str, heads: int) -> str:
    return f"{effect}, {heads_in_words(heads)}"


def _against_one(heads: int) -> str:
    return f"log2 of the deviation from p3 to lcm, {heads_in_words(heads)} over 1 head"


def _of_identity(heads: int) -> str:
    return f"deviation {SOLVED[heads]} over that before p1, identity, {heads_in_words(heads)}"


class Recipe(RecipeWithClaims):
    """Lengths are in observations; see `configuration/README.md` for each field."""

    task: Literal["three_moons"]
    heads: list[PositiveInt] = Field(min_length=1)
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

    @property
    def identity_heads(self) -> list[int]:
        """Numbers of heads of identity matrices: more heads than moons predict the same as one for each."""
        return sorted({min(heads, moons.NUM_MOONS) for heads in self.heads})

    @property
    def effect_names(self) -> list[str]:
        """Names of the effects: for each number of heads, and between them."""
        names = [_by_heads(name, heads) for heads in self.heads for name in (FALLS_AT_EACH, FALLS_AT_THE_END)]
        names += [_by_heads(IS_PERMUTATION, heads) for heads in self.heads if heads >= moons.NUM_MOONS]
        if 1 in self.heads:
            names += [_against_one(heads) for heads in self.heads if heads > 1]
        if moons.NUM_MOONS in self.heads and max(self.heads) > moons.NUM_MOONS:
            names.append(SPARE_HEADS)
        return names + [_of_identity(heads) for heads in self.identity_heads if heads in SOLVED]


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what the experiment would do: each training, and whether it is finished."""
    lines: dict[str, Any] = {}
    for (heads, seed), folder in recipe.parts.items():
        finished = "finished" if (folder / PART).is_file() else "to be trained"
        parameters = build_model(recipe, heads).num_parameters()
        lines[f"{heads_in_words(heads)}, seed {seed}"] = f"{parameters} parameters, {finished}, {folder}"
    lines |= {"trainings": len(recipe.parts), "steps": recipe.steps, "predictions": len(context_lengths(recipe))}
    return lines | {"folder": str(recipe.folder), "hash": recipe.hash}


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

    Deviations above `moons.AMPLITUDE` fail: such predictions diverge, so that a fall from there shows nothing.
    """
    # Without the fall at the common period: three memories need not wait for it.
    return all(falls(sections)[:3]) and max(sections.values()) <= moons.AMPLITUDE


def _count(rows: list[dict[str, Any]], effect: str) -> int:
    """Return for how many trainings an effect of single trainings holds."""
    if effect == IS_PERMUTATION:
        return sum(row["permutation"]["together"] >= NEAR_PERMUTATION for row in rows)
    holds = falls_at_each_period if effect == FALLS_AT_EACH else falls_at_the_end_only
    return sum(holds(row["sections"]["validation"]) for row in rows)


def _share(rows: list[dict[str, Any]], effect: str) -> Effect:
    return share_effect(_count(rows, effect), len(rows))


def _ratio_to_one_head(rows: list[dict[str, Any]], ones: list[dict[str, Any]]) -> Effect:
    # Ratios: a training whose predictions diverge would be all of a mean of differences.
    before = [{row["seed"]: row["sections"]["validation"]["p3 to lcm"] for row in part} for part in (rows, ones)]
    return mean_effect([math.log2(before[0][seed] / before[1][seed]) for seed in before[1]], "")


def _spare_heads(trained: list[dict[str, Any]]) -> Effect:
    spare = [row for row in trained if row["heads"] > moons.NUM_MOONS]
    three = with_heads(trained, moons.NUM_MOONS)
    counts = _count(spare, FALLS_AT_EACH), len(spare), _count(three, FALLS_AT_EACH), len(three)
    return share_difference_effect(*counts, basis=f"{len(spare)} trainings against {len(three)}")


def _identity(rows: list[dict[str, Any]], heads: int) -> Effect:
    # The kernel of the trained models blurs, and its errors add up over predictions in a row.
    (row,) = (row for row in with_heads(rows, heads) if row["beta"] == max(IDENTITY_BETAS))
    # Earlier results have the means over windows alone, and so no interval.
    windows = row.get("windows") or {name: [mean] for name, mean in row["sections"]["validation"].items()}
    ratios = [late / early for late, early in zip(windows[SOLVED[heads]], windows["before p1"], strict=True)]
    return mean_effect(ratios, "", basis=f"{len(ratios)} window{'s' * (len(ratios) > 1)}")


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return shares of seeds by number of heads, what more heads change, and how well the identity predicts.

    Args:
        recipe: of the experiment.
        measured: as its result has it.
    """
    trained = measured["trained"]
    found: Effects = {}
    for heads in recipe.heads:
        rows, ones = with_heads(trained, heads), with_heads(trained, 1)
        found |= {_by_heads(name, heads): _share(rows, name) for name in (FALLS_AT_EACH, FALLS_AT_THE_END)}
        if heads >= moons.NUM_MOONS:
            found[_by_heads(IS_PERMUTATION, heads)] = _share(rows, IS_PERMUTATION)
        if heads > 1 and ones:
            found[_against_one(heads)] = _ratio_to_one_head(rows, ones)
    if SPARE_HEADS in recipe.effect_names:
        found[SPARE_HEADS] = _spare_heads(trained)
    identities = [heads for heads in recipe.identity_heads if heads in SOLVED]
    return found | {_of_identity(heads): _identity(measured["identity"], heads) for heads in identities}


def _number(value: float, digits: int) -> str:
    """Format a number; large ones without decimals."""
    return f"{value:.{digits}f}" if value < 10 else f"{value:,.0f}"


def _median_and_range(values: list[float], digits: int) -> str:
    """Format the median of values with their range in brackets."""
    # Not a mean: predictions in a row can diverge, and the mean would then show that one seed alone.
    median, low, high = (_number(value, digits) for value in (statistics.median(values), min(values), max(values)))
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def _share_cell(rows: list[dict[str, Any]], effect: str) -> str:
    share = _share(rows, effect)
    return f"{_count(rows, effect)} of {len(rows)} ({share.low:.2f} to {share.high:.2f})"


def _counts_line(heads: int, rows: list[dict[str, Any]]) -> list[str]:
    failed = [str(row["seed"]) for row in rows if not _count([row], FALLS_AT_EACH)]
    nearness = [_share_cell(rows, IS_PERMUTATION), _median_and_range([r["permutation"]["together"] for r in rows], 2)]
    # A head of several complex coordinates can mix them in any way without any change of its predictions.
    cells = nearness if heads >= moons.NUM_MOONS else ["-", "-"]
    shares = [_share_cell(rows, FALLS_AT_EACH), ", ".join(failed) or "none", _share_cell(rows, FALLS_AT_THE_END)]
    return [str(heads), *shares, *cells, _median_and_range([row["final_loss"] for row in rows], 4)]


def _deviations_line(model: str, system: str, rows: list[dict[str, Any]]) -> list[str]:
    cells = [_median_and_range([row["sections"][system][name] for row in rows], 3) for name in SECTIONS]
    return [model, str(rows[0]["heads"]), system, *cells]


def _table(recipe: Recipe, trained: list[dict[str, Any]], identities: list[dict[str, Any]]) -> str:
    """Return Markdown tables: by number of heads how many seeds succeed, and deviations by section."""
    by_heads = {heads: with_heads(trained, heads) for heads in recipe.heads}
    columns = [
        "heads",
        FALLS_AT_EACH,
        "seeds that fail",
        FALLS_AT_THE_END,
        f"at least {NEAR_PERMUTATION} {IS_PERMUTATION}",
    ]
    columns += [IS_PERMUTATION, "final loss"]
    counts = markdown_table(columns, "rrlrrrr", [_counts_line(heads, rows) for heads, rows in by_heads.items()])
    groups = [(f"identity, beta {row['beta']:g}", [row]) for row in identities]
    groups += [(f"trained, {len(rows)} seed{'s' * (len(rows) > 1)}", rows) for rows in by_heads.values()]
    lines = [_deviations_line(model, system, rows) for system in SYSTEMS for model, rows in groups]
    deviations = markdown_table(["model", "heads", "moons", *SECTIONS], "lrl" + "r" * len(SECTIONS), lines)
    return f"{counts}\n\n{deviations}"


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw predictions, matrices, and which head predicts which moon.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the pictures.
    """
    draw_curves(measured, folder / f"{recipe.name}.png", recipe.horizon)
    draw_weights(measured, folder / f"{recipe.name}_weights.png")
    draw_units(measured, folder / f"{recipe.name}_units.png")


def _read_part(folder: Path) -> dict[str, Any]:
    part = read_result(folder, PART)
    if part is None:
        raise ValueError(f"{folder} holds no {PART}: run the experiment again, which trains this model")
    return part


def _identities(recipe: Recipe) -> list[dict[str, Any]]:
    """Measure identity matrices; what is known of them, their weights, is left out."""
    rows = []
    combinations = [(heads, beta) for beta in IDENTITY_BETAS for heads in recipe.identity_heads]
    for heads, beta in tqdm(combinations, desc="identity weights"):
        model = identity_model(recipe, heads, beta)
        measured = measure(model, recipe)
        kept = {name: measured[name] for name in ("curves", "sections")}
        rows.append({"heads": heads, "beta": beta, **kept, "windows": sections_by_window(model, recipe)})
    return rows


def _results(recipe: Recipe, data: dict[str, Any]) -> dict[str, Any]:
    """Train the missing parts, measure them and the identity models, draw all figures and judge the claims."""
    jobs = [Job(folder, train_part, (recipe, *part, folder)) for part, folder in recipe.parts.items()]
    run_all(jobs, recipe.workers)
    parts = [_read_part(folder) for folder in recipe.parts.values()]
    identities = _identities(recipe)
    measured = {
        "context_lengths": context_lengths(recipe),
        # The periods of a system and the common one, in observations.
        "landmarks": {
            name: [round(mark, 1) for mark in moons.landmarks(periods, recipe.length)]
            for name, periods in SYSTEMS.items()
        },
        "trained": parts,
        "identity": identities,
    }
    draw_result(recipe, measured, recipe.folder)
    measures = {"measured": measured, "table": _table(recipe, parts, identities)}
    return header(recipe) | {"data": data} | measures | judged(recipe, measured)


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

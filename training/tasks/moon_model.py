# SPDX-License-Identifier: Apache-2.0
"""Training on three moons: one model, and what is measured of it.

A part of the experiment (a number of heads and a seed) has a folder of its own: `checkpoint/` while it trains, then
`model/` and `part.json`. A killed training resumes from the last checkpoint and, on the CPU, ends with the same bits.
"""

import logging
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm
from transformers import get_polynomial_decay_schedule_with_warmup

from modeling_memory_mosaic import ContinuousMemoryMosaicConfig, ContinuousMemoryMosaicModel
from training.files import (
    faults,
    read_json,
    refuse_damage,
    set_aside,
    staged_folder,
    write_checksums,
    write_json,
)
from training.parallel import report_progress
from training.result import read_result, write_result
from training.synthetic import moons


# The one of the training systems that the paper's figures show.
SHOWN_TRAINING_TRIPLE = moons.TRAINING_TRIPLES[5]
SYSTEMS = {"validation": moons.VALIDATION_TRIPLE, "training": SHOWN_TRAINING_TRIPLE}
# Evaluations always draw the same windows, by a seed beyond those that trainings use.
EVALUATION_SEED = 1_000_000
SECTIONS = ("before p1", "p1 to p2", "p2 to p3", "p3 to lcm", "after lcm")
LOGGED_STEPS = 10
WINDOWS_AT_ONCE = 4
WINDOWS_OF_UNITS = 16
PART = "part.json"  # marks a part as done

logger = logging.getLogger(__name__)


def heads_in_words(heads: int) -> str:
    """Return the number of heads in words: `1 head`, `3 heads`."""
    return f"{heads} head{'s' * (heads > 1)}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class MoonRecipe(Protocol):
    """The part of the experiment's recipe that a training reads; lengths are in observations."""

    length: int
    batch_size: int
    steps: int
    learning_rate: float
    final_learning_rate: float
    beta: float
    loss_clip: float | None
    num_windows: int
    horizon: int
    eval_stride: int
    save_steps: int


class Progress:
    """The losses so far, which `Accelerator.save_state` stores beside the model; their number is that of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def build_model(recipe: MoonRecipe, heads: int, **changes: Any) -> ContinuousMemoryMosaicModel:
    """Build a new model as the recipe asks for."""
    settings = {"num_attention_heads": heads, "beta": recipe.beta, "loss_clip": recipe.loss_clip} | changes
    return ContinuousMemoryMosaicModel(ContinuousMemoryMosaicConfig(**settings))


def identity_model(recipe: MoonRecipe, heads: int, beta: float) -> ContinuousMemoryMosaicModel:
    """Build a model whose three matrices are the identity: the analytic solution, which needs no training."""
    model = build_model(recipe, heads, beta=beta)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.stack([torch.eye(moons.NUM_MOONS), torch.zeros_like(parameter[1])]))
    return model.eval()


def context_lengths(recipe: MoonRecipe) -> list[int]:
    """Return the context lengths at which predictions are made; each leaves room for what follows."""
    return list(range(1, recipe.length - recipe.horizon + 1, recipe.eval_stride))


@torch.no_grad()
def deviation_curve(
    model: ContinuousMemoryMosaicModel, windows: torch.Tensor, lengths: list[int], horizon: int
) -> np.ndarray:
    """Return the mean absolute deviation of `horizon` predictions in a row from what follows, by context length.

    Args:
        model: in evaluation mode.
        windows (`torch.Tensor` of shape `(N, T, 6)`): of one system.
        lengths: context lengths, each at most `T - horizon`.
        horizon: predictions in a row, each made from the ones before.

    Returns:
        `(len(lengths),)`: means over windows, predictions and coordinates.
    """
    total: Any = 0
    prefixes = torch.tensor(lengths)
    for batch in windows.split(WINDOWS_AT_ONCE):
        batch = batch.to(model.device)
        expected = batch.unfold(1, horizon, 1).transpose(2, 3)[:, lengths]  # (N, P, horizon, 6)
        predicted = model.predict_from_prefixes(batch, prefixes, horizon)
        total = total + (predicted - expected).abs().double().mean((2, 3)).sum(0)
    return (total / len(windows)).cpu().numpy()


def section_means(curve: np.ndarray, lengths: list[int], marks: list[float]) -> dict[str, float]:
    """Return the means of a curve between the periods, by the names of `SECTIONS`."""
    section = np.searchsorted(marks, lengths)
    return {name: _rounded(np.mean(curve[section == index])) for index, name in enumerate(SECTIONS)}


def absolute_weights(model: ContinuousMemoryMosaicModel) -> dict[str, np.ndarray]:
    """Return the absolute values of the complex matrices, `(3, 3)` each: keys and values, and the output transposed.

    Each row belongs to a head (three heads) or to one of its complex coordinates (one head), each column to a moon.
    """
    memory = model.memory
    matrices = {"W_phi": memory.k_proj.weight, "W_psi": memory.v_proj.weight, "W_z": memory.o_proj.weight.mT}
    return {name: torch.complex(*weight.detach().cpu()).abs().numpy() for name, weight in matrices.items()}


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Return the squares of the entries as shares of their row; a row of zeros stays one."""
    squares = np.square(np.asarray(matrix, dtype=float))
    totals = squares.sum(1, keepdims=True)
    return np.divide(squares, totals, out=np.zeros_like(squares), where=totals > 0)


def _assigned_share(shares: np.ndarray) -> float:
    chance = 1 / len(shares)
    mean = shares[linear_sum_assignment(shares, maximize=True)].mean()
    return max(0.0, (float(mean) - chance) / (1 - chance))


def nearness_to_permutation(matrix: np.ndarray) -> float:
    """Measure from 0 to 1 how near a matrix of absolute values `(n, n)` is to a scaled permutation.

    Columns are assigned to rows in the best way; the measure is the mean share of a row's square that lies on its
    column, scaled. 1: each row has one entry, all in different columns, of any sizes; 0: no better than a matrix of
    equal entries.
    """
    return _assigned_share(row_shares(matrix))


def permutation_measures(weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the nearness of each matrix, and of all three `together` to one assignment of moons to heads."""
    each = {name: _rounded(nearness_to_permutation(matrix)) for name, matrix in weights.items()}
    together = np.mean([row_shares(matrix) for matrix in weights.values()], axis=0)
    return each | {"together": _rounded(_assigned_share(together))}


@torch.no_grad()
def moons_by_head(model: ContinuousMemoryMosaicModel, recipe: MoonRecipe) -> list[list[float]]:
    """Return the share of each moon's prediction that comes from each head, `[H][3]`: columns sum to 1.

    It is the inner product of the head's contribution to the moon's two coordinates with their prediction, over the
    square of the prediction; both are summed over windows of the validation system and all positions behind its
    longest period.
    """
    periods = moons.VALIDATION_TRIPLE
    windows = moons.draw_windows(periods, WINDOWS_OF_UNITS, recipe.length, EVALUATION_SEED)
    longest = int(moons.landmarks(periods, recipe.length)[-2])
    contributions = model.units(windows.to(model.device)).contributions[:, :, longest:].double()
    contributions = contributions.unflatten(-1, (moons.NUM_MOONS, 2))  # (N, H, T, 3, 2)
    prediction = contributions.sum(1, keepdim=True)
    shares = (contributions * prediction).sum((0, 2, 4)) / prediction.square().sum((0, 2, 4))
    return [[_rounded(share) for share in row] for row in shares.tolist()]


def measure(model: ContinuousMemoryMosaicModel, recipe: MoonRecipe) -> dict[str, Any]:
    """Measure a model: deviations by context length, weights and division of labour, all rounded.

    Returns:
        `curves` and `sections` by system, `weights` (absolute complex entries) with their `permutation` measures, and
        `moons_by_head`.
    """
    lengths = context_lengths(recipe)
    curves, sections = {}, {}
    for name, periods in SYSTEMS.items():
        windows = moons.draw_windows(periods, recipe.num_windows, recipe.length, EVALUATION_SEED)
        curve = deviation_curve(model, windows, lengths, recipe.horizon)
        curves[name] = [_rounded(value) for value in curve]
        sections[name] = section_means(curve, lengths, moons.landmarks(periods, recipe.length))
    weights = absolute_weights(model)
    return {
        "curves": curves,
        "sections": sections,
        "weights": {name: [[_rounded(x) for x in row] for row in matrix] for name, matrix in weights.items()},
        "permutation": permutation_measures(weights),
        "moons_by_head": moons_by_head(model, recipe),
    }


def _finite(loss: float, step: int) -> float:
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower `learning_rate` or `beta`")
    return loss


def _train(recipe: MoonRecipe, heads: int, seed: int, folder: Path) -> tuple[ContinuousMemoryMosaicModel, list[float]]:
    accelerator = Accelerator()
    set_seed(seed)
    model = build_model(recipe, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    scheduler = get_polynomial_decay_schedule_with_warmup(
        optimizer, 0, recipe.steps, lr_end=recipe.final_learning_rate, power=1.0
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    progress, checkpoint = Progress(), folder / "checkpoint"
    accelerator.register_for_checkpointing(progress)
    if checkpoint.is_dir():
        accelerator.load_state(str(checkpoint))
    windows = moons.TrainingWindows(recipe.steps, recipe.batch_size, recipe.length, seed)
    first = len(progress.losses)
    bar = tqdm(
        range(first, recipe.steps), initial=first, total=recipe.steps, desc=f"{heads_in_words(heads)}, seed {seed}"
    )
    for step in bar:
        observations = windows[step].to(accelerator.device)
        loss = model(observations, labels=observations).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.losses.append(_finite(loss.item(), step))
        if step % LOGGED_STEPS == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % recipe.save_steps == 0:
            with staged_folder(checkpoint) as staged:
                accelerator.save_state(str(staged))
                write_checksums(staged)
        report_progress(folder, (step + 1) / recipe.steps)
    model = accelerator.unwrap_model(model)
    accelerator.free_memory()
    return model, progress.losses


def load_part(folder: Path) -> tuple[ContinuousMemoryMosaicModel, dict[str, Any]]:
    """Load the trained model of a part, in evaluation mode, and its losses and seconds."""
    refuse_damage(folder / "model")
    model = ContinuousMemoryMosaicModel.from_pretrained(folder / "model")
    return model.eval(), read_json(folder / "model" / "training.json")


def train_part(recipe: MoonRecipe, heads: int, seed: int, folder: Path) -> None:
    """Train one model, or go on with it, and write `part.json`; nothing to do if that is there.

    Args:
        recipe: the recipe of the experiment.
        heads, seed: which of its models to train.
        folder: the folder of this part alone.

    Raises:
        ValueError: the loss is not a finite number.
    """
    if read_result(folder, PART) is not None:
        return
    for earlier in (folder / "model", folder / "checkpoint"):
        if earlier.is_dir() and (damage := faults(earlier)):
            aside = set_aside(earlier).name
            logger.warning("%s is damaged (%s): kept as %s, and trained again", earlier, ", ".join(damage), aside)
    if not (folder / "model").is_dir():
        started = time.monotonic()
        model, losses = _train(recipe, heads, seed, folder)
        with staged_folder(folder / "model") as staged:
            model.save_pretrained(staged)
            training = {"losses": losses, "seconds": round(time.monotonic() - started, 1)}
            write_json(staged / "training.json", training)
            write_checksums(staged)
    model, training = load_part(folder)
    last = training["losses"][-5 * LOGGED_STEPS :]
    part = {
        "heads": heads,
        "seed": seed,
        "seconds": training["seconds"],  # of the process that finished it
        "final_loss": _rounded(statistics.mean(last)),
        "losses": [_rounded(loss) for loss in training["losses"][::LOGGED_STEPS]],
        **measure(model, recipe),
    }
    write_result(part, folder, ["model"], PART)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)

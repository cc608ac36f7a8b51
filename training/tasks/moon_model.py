# SPDX-License-Identifier: Apache-2.0
"""Training and measures of one model of three moons.

A part of the experiment is one number of heads and one seed. It has its own folder: `checkpoint/` while it trains,
then `model/` and `part.json`. A killed part resumes from its last checkpoint and, on the CPU, ends with the same bits.
"""

import json
import logging
import math
import shutil
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm
from transformers import get_polynomial_decay_schedule_with_warmup

from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    ContinuousMemoryMosaicModel,
    inspect_continuous_units,
    kernel_smoothing,
)
from training.files import faults, read_json, refuse_damage, set_aside, staged_folder, write_checksums, write_text
from training.parallel import report_progress
from training.result import read_result, write_result
from training.synthetic import moons
from training.tasks import narrow_attention


# The training system that the paper's figures show.
SHOWN_TRAINING_TRIPLE = moons.TRAINING_TRIPLES[5]
SYSTEMS = {"validation": moons.VALIDATION_TRIPLE, "training": SHOWN_TRAINING_TRIPLE}
# All models are measured on the windows of this seed. Recipes train with other seeds.
EVALUATION_SEED = 1_000_000
SECTIONS = ("before p1", "p1 to p2", "p2 to p3", "p3 to lcm", "after lcm")
LOGGED_STEPS = 10  # every so many steps a loss is recorded
WINDOWS_AT_ONCE = 4  # batch size of a measure, which bounds its memory
WINDOWS_OF_UNITS = 16  # over which the shares of heads are averaged
PART = "part.json"  # its presence marks a part as finished

logger = logging.getLogger(__name__)


class MoonSettings(Protocol):
    """Fields of the recipe of three moons that a training and its measures read."""

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


def complex_coordinates(heads: int) -> int:
    """Return the number of complex coordinates of a head: as few as hold all moons together."""
    return math.ceil(moons.NUM_MOONS / heads)


def build_model(recipe: MoonSettings, heads: int, **changes: Any) -> ContinuousMemoryMosaicModel:
    """Return a newly initialised model; `changes` replace fields of its configuration."""
    settings = {
        "num_attention_heads": heads,
        "head_dim": 2 * complex_coordinates(heads),
        "beta": recipe.beta,
        "loss_clip": recipe.loss_clip,
    } | changes
    return ContinuousMemoryMosaicModel(ContinuousMemoryMosaicConfig(**settings))


def identity_model(recipe: MoonSettings, heads: int, beta: float) -> ContinuousMemoryMosaicModel:
    """Return a model whose three matrices are the identity: the analytic solution, which needs no training.

    Spare heads are idle, so that more than three predict what three predict.
    """
    model = build_model(recipe, heads, beta=beta)
    with torch.no_grad():
        for parameter in model.parameters():
            # Real and imaginary part. Coordinates of the heads beyond the third are idle: their rows are zeros.
            parameter.copy_(torch.stack([torch.eye(*parameter.shape[1:]), torch.zeros_like(parameter[1])]))
    return model.eval()


def heads_in_words(heads: int) -> str:
    """Return `1 head`, `3 heads` and so on."""
    return f"{heads} head{'s' * (heads > 1)}"


def _rounded(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def context_lengths(recipe: MoonSettings) -> list[int]:
    """Return the context lengths at which predictions are measured: `horizon` observations follow each of them."""
    return list(range(1, recipe.length - recipe.horizon + 1, recipe.eval_stride))


def retrieve_shared_and_private(
    queries: torch.Tensor,
    shared_pairs: tuple[torch.Tensor, torch.Tensor],
    shared_mask: torch.Tensor,
    private_pairs: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Retrieve for each query from pairs that all queries share and from pairs of its own, in one average.

    Scores of private keys enter as the mask of empty slots, so that no shared pair is copied for each query.

    Args:
        queries (`torch.Tensor` of shape `(B, H, P, D)`): P queries, each of another continuation.
        shared_pairs: keys and values `(B, H, N, D)`.
        shared_mask (`torch.Tensor` of shape `(P, N)`): added to the scores of shared keys.
        private_pairs: keys and values `(B, H, P, S, D)`.

    Returns:
        retrieved values `(B, H, P, D)`.
    """
    (shared_keys, shared_values), (private_keys, private_values) = shared_pairs, private_pairs
    num_private = private_keys.shape[3]
    private_scores = (private_keys @ queries[..., None]).squeeze(-1)  # (B, H, P, S)
    mask = torch.cat([shared_mask.expand(*queries.shape[:3], -1), private_scores], dim=-1)  # (B, H, P, N + S)
    # A key of zeros scores 0, so that the mask alone is the score; a value of zeros adds nothing.
    slots = F.pad(shared_keys, (0, 0, 0, num_private)), F.pad(shared_values, (0, 0, 0, num_private))
    retrieved, weights = kernel_smoothing(queries, *slots, mask)
    return retrieved + (weights[..., None, -num_private:].to(private_values.dtype) @ private_values).squeeze(-2)


def _pairs_of_next(
    model: ContinuousMemoryMosaicModel, observations: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return query, key and value `(B, H, P, D)` of the next observation `(B, P, C)` of each of P continuations.

    `keys` `(B, H, P, D)` are those of the observations before.
    """
    batch_size, num_continuations, _ = observations.shape

    def unfold(rows: torch.Tensor) -> torch.Tensor:
        # (B * P, H, 1, D) to (B, H, P, D)
        return rows.squeeze(2).unflatten(0, (batch_size, num_continuations)).transpose(1, 2)

    # Each continuation becomes a row of the batch, with one observation.
    previous = keys.transpose(1, 2).flatten(0, 1)[:, :, None]
    pairs = model.memory(observations.flatten(0, 1)[:, None], previous=previous, pairs_only=True)
    return tuple(map(unfold, pairs))


@torch.no_grad()
def predict_from_prefixes(
    model: ContinuousMemoryMosaicModel, observations: torch.Tensor, lengths: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """Continue each row from several of its prefixes, with the result of one call of `model.predict` for each.

    All prefixes share the pairs of one pass. Each adds only the few pairs that its own predictions complete.

    Args:
        model: in evaluation mode.
        observations (`torch.Tensor` of shape `(B, T, C)`).
        lengths (`torch.Tensor` of shape `(P,)`): of the prefixes, from 1 to T.
        num_steps (`int`): number of observations to predict from each prefix.

    Returns:
        predictions `(B, P, num_steps, C)`.

    Raises:
        ValueError: if `num_steps` is not positive, or a length lies outside 1 to T.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be positive.")
    if lengths.ndim != 1 or lengths.min() < 1 or lengths.max() > observations.shape[1]:
        raise ValueError(f"lengths must be a list of numbers from 1 to {observations.shape[1]}, not {lengths}.")
    lengths = lengths.to(observations.device)
    latest = model(observations, use_cache=False).predictions[:, lengths - 1]  # (B, P, C)
    _, keys, values = model.memory(observations, pairs_only=True)
    # An observation completes the pair of the key before it, so the last key has no value yet.
    shared_pairs = keys[:, :, :-1], values[:, :, 1:]
    # (P, T - 1): whether a prefix has the observation that completes the pair.
    is_stored = torch.arange(1, observations.shape[1], device=lengths.device) < lengths[:, None]
    shared_mask = torch.zeros_like(is_stored, dtype=keys.dtype).masked_fill(~is_stored, float("-inf"))
    key, predictions, private_keys, private_values = keys[:, :, lengths - 1], [latest], [], []
    for _ in range(num_steps - 1):
        # The latest prediction is read as an observation: it completes the pair of the key before it.
        private_keys.append(key)
        query, key, value = _pairs_of_next(model, latest, key)
        private_values.append(value)
        private_pairs = torch.stack(private_keys, dim=3), torch.stack(private_values, dim=3)
        retrieved = retrieve_shared_and_private(query, shared_pairs, shared_mask, private_pairs)
        latest = model.memory.o_proj(retrieved.transpose(1, 2).flatten(2))
        predictions.append(latest)
    return torch.stack(predictions, dim=2)


@torch.no_grad()
def deviations(
    model: ContinuousMemoryMosaicModel, windows: torch.Tensor, lengths: list[int], horizon: int
) -> np.ndarray:
    """Return the mean absolute deviation of `horizon` predictions in a row from the observations, by context length.

    Args:
        model: in evaluation mode.
        windows (`torch.Tensor` of shape `(N, T, 6)`): of one system.
        lengths: context lengths, each at most `T - horizon`.
        horizon: predictions in a row, each made from the ones before.

    Returns:
        means over predictions and coordinates `(N, len(lengths))`.
    """
    of_windows: list[np.ndarray] = []
    prefixes = torch.tensor(lengths)
    for batch in windows.split(WINDOWS_AT_ONCE):
        batch = batch.to(model.device)
        # Block i of `unfold` is what follows the first i observations.
        expected = batch.unfold(1, horizon, 1).transpose(2, 3)[:, lengths]  # (N, P, horizon, 6)
        predicted = predict_from_prefixes(model, batch, prefixes, horizon)
        of_windows.append((predicted - expected).abs().double().mean((2, 3)).cpu().numpy())
    return np.concatenate(of_windows)


def section_means(curve: np.ndarray, lengths: list[int], marks: list[float]) -> dict[str, float]:
    """Return means of a curve between the periods `marks`, by the names of `SECTIONS`."""
    section = np.searchsorted(marks, lengths)
    return {name: _rounded(np.mean(curve[section == index])) for index, name in enumerate(SECTIONS)}


def sections_by_window(model: ContinuousMemoryMosaicModel, recipe: MoonSettings) -> dict[str, list[float]]:
    """Return the deviations by section of each single window of the validation system, by the names of `SECTIONS`."""
    periods, lengths = moons.VALIDATION_TRIPLE, context_lengths(recipe)
    windows = moons.draw_windows(periods, recipe.num_windows, recipe.length, EVALUATION_SEED)
    marks = moons.landmarks(periods, recipe.length)
    rows = [section_means(curve, lengths, marks) for curve in deviations(model, windows, lengths, recipe.horizon)]
    return {name: [row[name] for row in rows] for name in SECTIONS}


def absolute_weights(model: ContinuousMemoryMosaicModel) -> dict[str, np.ndarray]:
    """Return absolute values of the complex matrices of keys, values and (transposed) output.

    Each column belongs to a moon, and each row to a complex coordinate of a head: `(H, 3)` from three heads on, which
    have one each.
    """
    memory: Any = model.memory
    matrices = {"W_phi": memory.k_proj.weight, "W_psi": memory.v_proj.weight, "W_z": memory.o_proj.weight.mT}
    return {name: torch.complex(*weight.detach().cpu()).abs().numpy() for name, weight in matrices.items()}


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Return squares of the entries as shares of their row's sum; a row of zeros stays zero."""
    squares = np.square(np.asarray(matrix, dtype=float))
    totals = squares.sum(1, keepdims=True)
    return np.divide(squares, totals, out=np.zeros_like(squares), where=totals > 0)


def _assigned_share(shares: np.ndarray) -> float:
    """Return the mean share of the best assignment of rows to columns, rescaled so that equal shares give 0."""
    chance = 1 / shares.shape[1]
    mean = shares[linear_sum_assignment(shares, maximize=True)].mean()
    # A row of zeros has no shares, and can bring the mean below chance.
    return max(0.0, (float(mean) - chance) / (1 - chance))


def nearness_to_permutation(matrix: np.ndarray) -> float:
    """Return how near a matrix of absolute values `(H, n)` is to a scaled permutation, from 0 to 1; H is n or more.

    Each column is assigned a row of its own such that the shares of these rows' squares in their columns are largest.
    1: for each column a row that has an entry there alone, of any size. 0: no better than a matrix of equal entries.
    Rows that are not assigned do not count: they may be idle, or share the column of another.
    """
    return _assigned_share(row_shares(matrix))


def permutation_measures(weights: dict[str, np.ndarray]) -> dict[str, float]:
    """Return `nearness_to_permutation` of each matrix and, as `together`, of all with one assignment of moons."""
    each = {name: _rounded(nearness_to_permutation(matrix)) for name, matrix in weights.items()}
    together = np.mean([row_shares(matrix) for matrix in weights.values()], axis=0)
    return each | {"together": _rounded(_assigned_share(together))}


@torch.no_grad()
def moons_by_head(model: ContinuousMemoryMosaicModel, recipe: MoonSettings) -> list[list[float]]:
    """Return the share of each head in the prediction of each moon, `[H][3]`: columns sum to 1.

    A share is the inner product of the head's contribution to the moon's two coordinates with their prediction, over
    the square of the prediction. Both are summed over windows of the validation system and over all positions after
    its longest period.
    """
    periods = moons.VALIDATION_TRIPLE
    windows = moons.draw_windows(periods, WINDOWS_OF_UNITS, recipe.length, EVALUATION_SEED)
    # The last landmark is the common period of all moons.
    longest = int(moons.landmarks(periods, recipe.length)[-2])
    device: Any = model.device
    contributions = inspect_continuous_units(model, windows.to(device)).contributions[:, :, longest:].double()
    contributions = contributions.unflatten(-1, (moons.NUM_MOONS, 2))  # (N, H, T, 3, 2)
    prediction = contributions.sum(1, keepdim=True)
    shares = (contributions * prediction).sum((0, 2, 4)) / prediction.square().sum((0, 2, 4))
    return [[_rounded(share) for share in row] for row in shares.tolist()]


def measure(model: ContinuousMemoryMosaicModel, recipe: MoonSettings) -> dict[str, Any]:
    """Measure deviations by context length, weights and the share of each head in each moon, all rounded.

    Returns:
        `curves` and `sections` by system, `weights` (absolute complex entries) with their `permutation` measures, and
        `moons_by_head`.
    """
    lengths = context_lengths(recipe)
    curves, sections = {}, {}
    for name, periods in SYSTEMS.items():
        windows = moons.draw_windows(periods, recipe.num_windows, recipe.length, EVALUATION_SEED)
        curve = deviations(model, windows, lengths, recipe.horizon).mean(0)
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


class Progress:
    """Losses of all steps so far, which `Accelerator.save_state` stores beside the model."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


def _finite(loss: float, step: int) -> float:
    """Return the loss, or raise `ValueError` if it is not finite."""
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step}: lower `learning_rate` or `beta`")
    return loss


def _train(
    recipe: MoonSettings, heads: int, seed: int, folder: Path
) -> tuple[ContinuousMemoryMosaicModel, list[float]]:
    """Train a model from the last checkpoint in `folder`, if any; return it and the losses of all steps."""
    accelerator = Accelerator()
    set_seed(seed)
    model = build_model(recipe, heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    # A power of 1 is the linear decay that the authors train with.
    scheduler = get_polynomial_decay_schedule_with_warmup(
        optimizer, 0, recipe.steps, lr_end=recipe.final_learning_rate, power=1.0
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "no":
        # Nine tenths of a step went into torch's attention, which takes four times as long on so narrow heads.
        accelerator.unwrap_model(model).set_attn_implementation(narrow_attention.NAME)
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
    """Load the trained model of a part, in evaluation mode, and its record: `losses` and `seconds`.

    Raises:
        ValueError: if a file of the model has changed since it was written.
    """
    refuse_damage(folder / "model")
    model = ContinuousMemoryMosaicModel.from_pretrained(folder / "model")
    return model.eval(), read_json(folder / "model" / "training.json")


def train_part(recipe: MoonSettings, heads: int, seed: int, folder: Path) -> None:
    """Train and measure one model and write `part.json`; do nothing if the file exists.

    Args:
        recipe: of the experiment.
        heads, seed: the model's number of heads and its seed.
        folder: of this part alone.

    Raises:
        ValueError: if the loss is not finite, or a file of the finished part has changed.
    """
    if read_result(folder, PART) is not None:
        return
    for output in (folder / "model", folder / "checkpoint"):
        if output.is_dir() and (damages := faults(output)):
            aside = set_aside(output).name
            logger.warning("%s is damaged (%s): kept as %s, and trained again", output, ", ".join(damages), aside)
    if not (folder / "model").is_dir():
        started = time.monotonic()
        model, losses = _train(recipe, heads, seed, folder)
        with staged_folder(folder / "model") as staged:
            model.save_pretrained(staged)
            record: dict[str, Any] = {"losses": losses, "seconds": round(time.monotonic() - started, 1)}
            write_text(staged / "training.json", json.dumps(record))  # one line: a loss for each step
            write_checksums(staged)
    model, record = load_part(folder)
    # A mean, because the loss of one step depends on its windows.
    last = record["losses"][-5 * LOGGED_STEPS :]
    part = {
        "heads": heads,
        "seed": seed,
        "seconds": record["seconds"],  # of the process that finished the training
        "final_loss": _rounded(statistics.mean(last)),
        "losses": [_rounded(loss) for loss in record["losses"][::LOGGED_STEPS]],
        **measure(model, recipe),
    }
    write_result(part, folder, ["model"], PART)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)

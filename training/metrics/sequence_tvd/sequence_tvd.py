# SPDX-License-Identifier: Apache-2.0
"""Total variation distance (half of the summed absolute differences) between predicted and true distributions.

The true ones are those of a known source of sequences, such as a probabilistic automaton, at the same positions. The
mean is over all positions, or over the last position of each sequence.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


CITATION = """\
@article{akyurek2024icll,
    title={In-Context Language Learning: Architectures and Algorithms},
    author={Aky{\\"u}rek, Ekin and Wang, Bailin and Kim, Yoon and Andreas, Jacob},
    journal={arXiv preprint arXiv:2401.12973},
    year={2024},
}
"""
# By how much the probabilities of a position may miss 1.
TOLERANCE = 1e-3
Distributions = Sequence[Sequence[Sequence[float]]]


def _distributions(rows: Sequence[Sequence[float]], argument: str) -> np.ndarray:
    """Return one sequence as an array of shape (positions, symbols), each row a probability distribution."""
    if len(rows) == 0:
        raise ValueError(f"{argument} has no positions: leave the sequence out")
    # Before `asarray`, whose error would not name the argument.
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            f"{argument} has rows of {min(lengths)} to {max(lengths)} symbols: give all of them everywhere"
        )
    array = np.asarray(rows, np.float64)
    sums = array.sum(axis=1)
    # `~(... <= ...)` also holds for a sum of NaN.
    is_bad = ~np.isfinite(array).all(axis=1) | (array < 0).any(axis=1) | ~(np.abs(sums - 1) <= TOLERANCE)
    if is_bad.any():
        position = int(np.flatnonzero(is_bad)[0])
        raise ValueError(
            f"{argument}, position {position}, is no probability distribution (smallest entry "
            f"{array[position].min()}, sum {sums[position]}): give probabilities, not logits, that sum to 1"
        )
    return array


def sequence_tvd(predictions: Distributions, references: Distributions, positions: str = "all") -> dict[str, float]:
    """Return the mean total variation distance of sequences of distributions.

    Args:
        predictions (list of lists of lists of float): for each sequence and position, the predicted probability of
            each symbol; a sequence is an array of shape (positions, symbols).
        references (list of lists of lists of float): the true ones, of the same shapes.
        positions (str): "all" (default), or "last" for the last position of each sequence alone.

    Returns:
        tvd (float): total variation distance, averaged over the positions that count: each weighs the same.
        l1 (float): twice that, the sum of absolute differences.
        count (int): how many positions these are.

    Raises:
        ValueError: no sequence or an empty one, shapes that differ, numbers that are negative, not finite or do not
            sum to 1 within 1e-3, or another value of `positions`.

    Examples:
        >>> metric = evaluate.load("training/metrics/sequence_tvd")
        >>> metric.compute(predictions=[[[0.5, 0.5]]], references=[[[1.0, 0.0]]])["tvd"]
        0.5
    """
    if positions not in ("all", "last"):
        raise ValueError(f"positions is {positions!r}: give 'all' or 'last'")
    if len(predictions) == 0:
        raise ValueError("predictions are empty: give at least one sequence")
    distances = []
    for index, (predicted_rows, true_rows) in enumerate(zip(predictions, references, strict=True)):
        predicted = _distributions(predicted_rows, f"predictions[{index}]")
        true = _distributions(true_rows, f"references[{index}]")
        if predicted.shape != true.shape:
            raise ValueError(
                f"predictions[{index}] has shape {predicted.shape} (positions, symbols), but references[{index}] "
                f"{true.shape}: give both at the same positions, over the same symbols"
            )
        distance = np.abs(predicted - true).sum(axis=1)  # (positions,)
        distances.append(distance if positions == "all" else distance[-1:])
    l1 = float(np.concatenate(distances).mean())
    # Both, because RegBench's code reports the sum that is not halved.
    return {"tvd": l1 / 2, "l1": l1, "count": sum(map(len, distances))}


class SequenceTvd(evaluate.Metric):
    """`sequence_tvd` as a metric of `evaluate`; README.md is its card."""

    def _info(self) -> evaluate.MetricInfo:
        distributions = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=inspect.getdoc(sequence_tvd),
            features=datasets.Features({"predictions": distributions, "references": distributions}),
        )

    def _compute(self, predictions: Distributions, references: Distributions, **options: Any) -> dict[str, float]:
        return sequence_tvd(predictions, references, **options)

# SPDX-License-Identifier: Apache-2.0
"""Mean loss of a language model as a function of the position in its window, with percentile bootstrap bands.

Documents, not windows, are resampled where they are given: windows of one document resemble each other.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


CITATION = """\
@article{zhang2024memory,
    title={Memory Mosaics},
    author={Zhang, Jianyu and Nolte, Niklas and Sadhukhan, Ranajoy and Chen, Beidi and Bottou, L{\\'e}on},
    journal={arXiv preprint arXiv:2405.06394},
    year={2024},
}
"""
# Positions at a time, so that a long window does not need resamples x positions numbers at once.
BLOCK = 1024
Losses = Sequence[Sequence[float]] | np.ndarray
Documents = Sequence[str] | Sequence[int] | Sequence[None]


def _document_ids(references: Documents) -> np.ndarray:
    """Return for each window the number of its document, counted from 0."""
    num_missing = sum(label is None for label in references)
    if num_missing == len(references):
        return np.arange(len(references))
    if num_missing:
        raise ValueError(f"{num_missing} of {len(references)} windows have no document: give one for all, or for none")
    return np.unique(np.array(references), return_inverse=True)[1]


def _sums(predictions: Losses, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of losses and numbers of windows, each of shape (documents, positions)."""
    shape = (document_ids.max() + 1, max(len(losses) for losses in predictions))
    sums, counts = np.zeros(shape), np.zeros(shape)
    for index, (losses, document) in enumerate(zip(predictions, document_ids, strict=True)):
        if len(losses) == 0:
            raise ValueError(f"window {index} is empty: leave it out")
        values = np.asarray(losses, np.float64)
        if not np.isfinite(values).all():
            position = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"the loss at position {position} of window {index} is {values[position]}: repair or leave out the "
                "window, for no mean could be trusted"
            )
        sums[document, : len(values)] += values
        counts[document, : len(values)] += 1
    return sums, counts


def _band(
    sums: np.ndarray, counts: np.ndarray, confidence: float, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return percentiles, at each position, of the ratio sum / count over documents drawn with replacement."""
    num_documents = len(sums)
    generator = np.random.default_rng(seed)
    # (resamples, documents): how often each document was drawn.
    shares = np.full(num_documents, 1 / num_documents)
    weights = generator.multinomial(num_documents, shares, num_resamples).astype(np.float64)
    low, high = np.full((2, sums.shape[1]), np.nan)
    # One document alone would be drawn again and again, and look certain.
    known = np.flatnonzero((counts > 0).sum(axis=0) > 1)
    for block in np.split(known, range(BLOCK, len(known), BLOCK)):
        drawn = weights @ counts[:, block]
        means = np.full(drawn.shape, np.nan)
        # With few documents a draw may hold none that reaches a position: it says nothing about it.
        np.divide(weights @ sums[:, block], drawn, out=means, where=drawn > 0)
        is_reached = (drawn > 0).any(axis=0)
        if is_reached.any():
            ends = np.nanquantile(means[:, is_reached], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
            low[block[is_reached]], high[block[is_reached]] = ends
    return low, high


def per_position_loss(
    predictions: Losses,
    references: Documents | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the mean loss at each position and its band.

    Args:
        predictions (list of lists of float): one window each: the losses of its tokens in nats, in order. Windows may
            differ in length; a shorter one does not count at later positions.
        references (list of str or int, *optional*): the document that each window comes from; without, each window
            counts as a document of its own.
        confidence (float): share of the bootstrap distribution between `low` and `high`; above 0, below 1, default
            0.95.
        num_resamples (int): how often the documents are resampled, default 1000.
        seed (int): of the draws, default 0.

    Returns:
        mean (list of float): for each position, the mean loss over the windows that reach it, in nats.
        low, high (list of float): the band around it; NaN where fewer than two documents reach.
        count (list of int): how many windows reach the position.

    Raises:
        ValueError: no window, an empty one, a loss that is not finite, documents for some windows only, or an option
            out of its range.

    Examples:
        >>> metric = evaluate.load("training/metrics/per_position_loss")
        >>> metric.compute(predictions=[[3.0, 1.0], [1.0]])["mean"]
        [2.0, 1.0]
    """
    if len(predictions) == 0:
        raise ValueError("predictions are empty: give the losses of at least one window")
    if references is None:
        references = [None] * len(predictions)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: give a share above 0 and below 1, such as 0.95")
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}: give at least 1, such as 1000")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give a whole number from 0 on")
    sums, counts = _sums(predictions, _document_ids(references))
    low, high = _band(sums, counts, confidence, num_resamples, seed)
    total = counts.sum(axis=0)
    return {
        "mean": (sums.sum(axis=0) / total).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "count": total.astype(int).tolist(),
    }


class PerPositionLoss(evaluate.Metric):
    """`per_position_loss` as a metric of `evaluate`; README.md is its card."""

    def _info(self) -> evaluate.MetricInfo:
        losses = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=inspect.getdoc(per_position_loss),
            # Unlike `string`, this type lets the library pass a missing label, and turns a number into its digits.
            features=datasets.Features({"predictions": losses, "references": datasets.Value("large_string")}),
        )

    def add_batch(
        self, *, predictions: Losses | None = None, references: Documents | None = None, **kwargs: Any
    ) -> None:
        """Add windows and, optionally, their documents; see `compute` for what each is."""
        if predictions is None or len(predictions) == 0:
            raise ValueError("predictions are empty: give the losses of at least one window")
        # The library would demand references; missing labels stand for "none were given".
        references = [None] * len(predictions) if references is None else references
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: Losses, references: Documents, **options: Any) -> dict[str, list[float]]:
        return per_position_loss(predictions, references, **options)

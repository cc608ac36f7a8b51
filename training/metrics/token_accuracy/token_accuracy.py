# SPDX-License-Identifier: Apache-2.0
"""Share of the target tokens that were predicted right: 1 minus the normalized Hamming distance.

For tokens that are recovered from a memory or an embedding also the share of sequences that are right throughout, and
the accuracy at each place.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


CITATION = """\
@article{badger2026memory,
    title={Language Model Memory and Memory Models for Language},
    author={Badger, Benjamin L.},
    journal={arXiv preprint arXiv:2602.13466},
    year={2026},
}
"""
Tokens = Sequence[Sequence[int]]


def token_accuracy(predictions: Tokens, references: Tokens, ignore_index: int = -100) -> dict[str, Any]:
    """Return the shares of target tokens and of whole sequences that were predicted right.

    Args:
        predictions (list of lists of int): for each sequence the predicted token at each place.
        references (list of lists of int): the tokens that were to be predicted, at the same places.
        ignore_index (int): a reference that is no target; -100 by default.

    Returns:
        accuracy (float): right targets, divided by targets.
        exact (float): sequences without a mistake, divided by the sequences that have a target.
        by_place (list of float): accuracy at each place; nan where no sequence has a target.
        count (int): how many targets there are.

    Raises:
        ValueError: no target at all, a missing token, or sequences of different lengths.

    Examples:
        >>> metric = evaluate.load("training/metrics/token_accuracy")
        >>> metric.compute(predictions=[[5, 6, 7, 8]], references=[[5, 6, 0, 8]])["accuracy"]
        0.75
    """
    length = max(map(len, references), default=0)
    is_right: np.ndarray
    is_target: np.ndarray
    is_right, is_target = np.zeros((2, len(references), length), bool)
    for index, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        # Arrow takes a None for a missing token and does not refuse it.
        if None in predicted or None in true:
            raise ValueError(f"token missing in sequence {index}: give {ignore_index} where there is no target")
        if len(predicted) != len(true):
            raise ValueError(
                f"predictions[{index}] has {len(predicted)} tokens, but references[{index}] has {len(true)}: give a "
                "prediction for each, shifted already if it is of the next token"
            )
        targets = np.asarray(true, np.int64)
        is_target[index, : len(true)] = targets != ignore_index
        is_right[index, : len(true)] = np.asarray(predicted, np.int64) == targets
    # Then `is_right == is_target` holds at every place that is no target or padding.
    is_right &= is_target
    if not is_target.any():
        raise ValueError(f"there is no target: give at least one reference that is not {ignore_index}")
    # A sequence without targets would count as one without a mistake.
    has_target, targets_by_place = is_target.any(1), is_target.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the nan of a place without targets
        by_place = is_right.sum(0) / targets_by_place
    return {
        "accuracy": float(is_right.sum() / is_target.sum()),
        "exact": float((is_right == is_target).all(1)[has_target].mean()),
        "by_place": by_place.tolist(),
        "count": int(is_target.sum()),
    }


class TokenAccuracy(evaluate.Metric):
    """`token_accuracy` as a metric of `evaluate`; README.md is its card."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=inspect.getdoc(token_accuracy),
            features=datasets.Features({"predictions": tokens, "references": tokens}),
        )

    def _compute(self, predictions: Tokens, references: Tokens, **options: Any) -> dict[str, Any]:
        return token_accuracy(predictions, references, **options)

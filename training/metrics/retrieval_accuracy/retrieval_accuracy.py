# SPDX-License-Identifier: Apache-2.0
"""How well the embedding of a query finds that of the text it belongs to among all candidates, by their cosines.

The share of queries whose nearest candidate is the right one, and the InfoNCE loss.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


CITATION = """\
@article{oord2018representation,
    title={Representation Learning with Contrastive Predictive Coding},
    author={van den Oord, A{\\"a}ron and Li, Yazhe and Vinyals, Oriol},
    journal={arXiv preprint arXiv:1807.03748},
    year={2018},
}
"""
Vectors = Sequence[Sequence[float]]


def _directions(rows: Vectors, argument: str) -> np.ndarray:
    """Return vectors scaled to length one, as an array."""
    sizes = {len(row) for row in rows}
    if len(sizes) > 1:
        raise ValueError(
            f"{argument} have {min(sizes)} to {max(sizes)} numbers: all embeddings have to be of one size"
        )
    vectors = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    is_bad = ~(np.isfinite(lengths) & (lengths > 0))[:, 0]
    if is_bad.any():
        raise ValueError(f"{argument}[{int(np.flatnonzero(is_bad)[0])}] has no direction: it is zero or not finite")
    return vectors / lengths


def retrieval_accuracy(predictions: Vectors, references: Vectors, temperature: float = 0.02) -> dict[str, float]:
    """Return how well queries find their candidates.

    Args:
        predictions (list of lists of float): embeddings of the queries.
        references (list of lists of float): embeddings of the candidates; the i-th belongs to the i-th query.
        temperature (float): cosines are divided by it in the loss; 0.02 by default.

    Returns:
        accuracy (float): the share of queries whose cosine with their candidate is larger than any other.
        info_nce (float): mean negative log share of the right candidate in the softmax over all, in nats.
        chance (float): the accuracy of a random choice, and chance_info_nce (float) its loss.
        count (int): how many queries there are.

    Raises:
        ValueError: fewer than two candidates, embeddings of different sizes, a vector of length zero or with a number
            that is not finite, or a temperature that is not positive.

    Examples:
        >>> metric = evaluate.load("training/metrics/retrieval_accuracy")
        >>> metric.compute(predictions=[[1.0, 0.1], [0.2, 2.0]], references=[[1.0, 0.0], [0.0, 1.0]])["accuracy"]
        1.0
    """
    if len(references) < 2:
        raise ValueError(f"there are {len(references)} candidates: give at least two to choose from")
    # `not >` refuses NaN too.
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it has to be positive")
    queries, candidates = _directions(predictions, "predictions"), _directions(references, "references")
    if queries.shape != candidates.shape:
        raise ValueError(f"queries have shape {queries.shape}, candidates {candidates.shape}: they must be alike")
    cosines = queries @ candidates.T  # (N, N), a row for each query
    of_partners = cosines.diagonal()
    # A tie does not count as found: else embeddings that are all equal would have accuracy 1.
    best_of_others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines).max(1)
    scores = cosines / temperature
    # The largest score becomes 0, so that exp() stays finite at any temperature.
    log_shares = scores - scores.max(1, keepdims=True)
    log_shares -= np.log(np.exp(log_shares).sum(1, keepdims=True))
    return {
        "accuracy": float((of_partners > best_of_others).mean()),
        "info_nce": float(-log_shares.diagonal().mean()),
        "chance": 1 / len(cosines),
        "chance_info_nce": math.log(len(cosines)),
        "count": len(cosines),
    }


class RetrievalAccuracy(evaluate.Metric):
    """`retrieval_accuracy` as a metric of `evaluate`; README.md is its card."""

    def _info(self) -> evaluate.MetricInfo:
        vectors = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=inspect.getdoc(retrieval_accuracy),
            features=datasets.Features({"predictions": vectors, "references": vectors}),
        )

    def _compute(self, predictions: Vectors, references: Vectors, **options: Any) -> dict[str, float]:
        return retrieval_accuracy(predictions, references, **options)

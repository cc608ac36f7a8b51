# SPDX-License-Identifier: Apache-2.0
"""How well an embedding finds its partner among candidates: top-1 accuracy and InfoNCE."""

import math

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
How well the embedding of a query finds that of the text it belongs to among all candidates, by their cosines: the
share of queries whose nearest candidate is the right one, and the InfoNCE loss.
"""

_CITATION = """\
@article{oord2018representation,
    title={Representation Learning with Contrastive Predictive Coding},
    author={van den Oord, A{\\"a}ron and Li, Yazhe and Vinyals, Oriol},
    journal={arXiv preprint arXiv:1807.03748},
    year={2018},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of lists of float): embeddings of the queries.
    references (list of lists of float): embeddings of the candidates; the i-th belongs to the i-th query.
    temperature (float): cosines are divided by it in the loss; 0.02 by default.
Returns:
    accuracy (float): the share of queries whose cosine with their own candidate is larger than any other.
    info_nce (float): mean negative log share of the right candidate in the softmax over all, in nats.
    chance (float): the accuracy of a random choice, and chance_info_nce (float) its loss.
    count (int): how many queries there are.
Raises:
    ValueError: fewer than two candidates, embeddings of different sizes, a vector of length zero or with a number that
        is not finite, or a temperature that is not positive.
Examples:
    >>> metric = evaluate.load("training/metrics/retrieval_accuracy")
    >>> metric.compute(predictions=[[1.0, 0.1], [0.2, 2.0]], references=[[1.0, 0.0], [0.0, 1.0]])["accuracy"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalAccuracy(evaluate.Metric):
    """See the card, README.md."""

    def _info(self):
        vectors = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": vectors, "references": vectors}),
        )

    def _compute(self, predictions, references, temperature=0.02):
        if len(references) < 2:
            raise ValueError(f"there are {len(references)} candidates: give at least two to choose from")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}: it has to be positive")
        queries, candidates = _directions(predictions, "predictions"), _directions(references, "references")
        if queries.shape != candidates.shape:
            raise ValueError(f"queries have shape {queries.shape}, candidates {candidates.shape}: they must be alike")
        cosines = queries @ candidates.T
        own = cosines.diagonal()
        others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines).max(1)
        scores = cosines / temperature
        shares = scores - scores.max(1, keepdims=True)
        shares -= np.log(np.exp(shares).sum(1, keepdims=True))
        return {
            "accuracy": float((own > others).mean()),
            "info_nce": float(-shares.diagonal().mean()),
            "chance": 1 / len(cosines),
            "chance_info_nce": math.log(len(cosines)),
            "count": len(cosines),
        }


def _directions(rows, where):
    """Vectors stretched to length one, as an array."""
    sizes = {len(row) for row in rows}
    if len(sizes) > 1:
        raise ValueError(f"{where} have {min(sizes)} to {max(sizes)} numbers: all embeddings have to be of one size")
    vectors = np.asarray(rows, np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0))[:, 0]
    if bad.any():
        raise ValueError(f"{where}[{int(np.flatnonzero(bad)[0])}] has no direction: it is zero or not finite")
    return vectors / lengths

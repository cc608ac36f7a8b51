# SPDX-License-Identifier: Apache-2.0
"""Share of the information in a text that a model has: 1 minus its cross-entropy divided by that of a uniform guess.

Beside it, always, stands the share that a guess by the frequencies of the tokens alone reaches.
"""

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


CITATION = """\
@article{badger2026memory,
    title={Language Model Memory and Memory Models for Language},
    author={Badger, Benjamin L.},
    journal={arXiv preprint arXiv:2602.13466},
    year={2026},
}
"""


def _count_tokens(references: Sequence[Sequence[int]], vocab_size: int) -> Counter[int]:
    counts = Counter(token for text in references for token in text)
    if counts.total() == 0:
        raise ValueError("references have no tokens: give at least one")
    # Before `min`, which cannot compare None. Arrow lets missing tokens pass.
    if None in counts:
        raise ValueError("a token of the references is missing: leave it out, and what it cost")
    if not 0 <= min(counts) <= max(counts) < vocab_size:
        raise ValueError(f"tokens range from {min(counts)} to {max(counts)}, but vocab_size is {vocab_size}")
    return counts


def _unigram_cross_entropy(counts: Counter[int], vocab_size: int, frequencies: Sequence[int] | None) -> float:
    # The references have every token that is scored, so only counts of another corpus need raising.
    raised = int(frequencies is not None)
    if frequencies is None:
        frequencies = [counts[token] for token in range(vocab_size)]
    if len(frequencies) != vocab_size:
        raise ValueError(f"there are {len(frequencies)} frequencies: give each of the {vocab_size} tokens its count")
    for token, number in enumerate(frequencies):
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"the frequency of token {token} is {number}: it has to be finite and at least 0")
    whole = sum(frequencies) + raised * vocab_size
    nats = math.fsum(count * math.log(whole / (frequencies[token] + raised)) for token, count in counts.items())
    return nats / counts.total()


def entropy_ratio(
    predictions: Sequence[float],
    references: Sequence[Sequence[int]],
    vocab_size: int,
    frequencies: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return the entropy ratio of a model and of a guess by frequencies.

    Args:
        predictions (list of float): for each text its negative log likelihood in nats, summed over its tokens.
        references (list of lists of int): the tokens of each text.
        vocab_size (int): number of tokens that a uniform guess chooses from.
        frequencies (list of int, *optional*): how often a corpus has each token. Each is raised by one, so that no
            token is impossible. By default those of the references, as they are.

    Returns:
        entropy_ratio (float): 1 if every token was certain, 0 for a uniform guess, negative for less.
        unigram_entropy_ratio (float): that of a guess by the frequencies.
        cross_entropy, unigram_cross_entropy, uniform_cross_entropy (float): in nats a token; the last is
            log(vocab_size).
        count (int): how many tokens there are.

    Raises:
        ValueError: no token, one that is missing or not below vocab_size, frequencies of another number, or
            frequencies or negative log likelihoods that are negative or not finite.

    Examples:
        >>> metric = evaluate.load("training/metrics/entropy_ratio")
        >>> metric.compute(predictions=[0.0], references=[[0, 1, 2]], vocab_size=4)["entropy_ratio"]
        1.0
    """
    # The uniform guess would cost log(1) = 0, by which the ratio divides.
    if vocab_size < 2:
        raise ValueError(f"vocab_size is {vocab_size}: there is nothing to tell with fewer than two tokens")
    for index, nats in enumerate(predictions):
        if nats is None or not (math.isfinite(nats) and nats >= 0):
            raise ValueError(
                f"the negative log likelihood of text {index} is {nats}: it has to be finite and at least 0"
            )
    counts = _count_tokens(references, vocab_size)
    total = counts.total()
    # The author takes random logits from U[0, 1) as the guess, whose loss is a little above log(V).
    uniform, cross_entropy = math.log(vocab_size), math.fsum(predictions) / total
    unigram = _unigram_cross_entropy(counts, vocab_size, frequencies)
    return {
        "entropy_ratio": 1 - cross_entropy / uniform,
        "unigram_entropy_ratio": 1 - unigram / uniform,
        "cross_entropy": cross_entropy,
        "unigram_cross_entropy": unigram,
        "uniform_cross_entropy": uniform,
        "count": total,
    }


class EntropyRatio(evaluate.Metric):
    """`entropy_ratio` as a metric of `evaluate`; README.md is its card."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=inspect.getdoc(entropy_ratio),
            features=datasets.Features({"predictions": datasets.Value("float64"), "references": tokens}),
        )

    def _compute(
        self, predictions: Sequence[float], references: Sequence[Sequence[int]], **options: Any
    ) -> dict[str, float]:
        return entropy_ratio(predictions, references, **options)

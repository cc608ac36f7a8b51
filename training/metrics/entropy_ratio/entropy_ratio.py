# SPDX-License-Identifier: Apache-2.0
"""How much of a text's information a model has, as a share: with the uniform and the unigram guess as its marks."""

import math
from collections import Counter

import datasets
import evaluate


_DESCRIPTION = """\
Share of the information in a text that a model has: 1 minus its cross-entropy divided by that of a uniform guess.
Beside it, always, what a guess by the frequencies of the tokens alone reaches.
"""

_CITATION = """\
@article{badger2026memory,
    title={Language Model Memory and Memory Models for Language},
    author={Badger, Benjamin L.},
    journal={arXiv preprint arXiv:2602.13466},
    year={2026},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): for each text its negative log likelihood in nats, summed over its tokens.
    references (list of lists of int): the tokens of each text.
    vocab_size (int): number of tokens that a uniform guess chooses from.
    frequencies (list of int, *optional*): of a corpus, how often it has each token. Each is raised by one, so that no
        token is impossible. Those of the references, as they are, by default.
Returns:
    entropy_ratio (float): 1 if every token was certain, 0 for a uniform guess, negative for less.
    unigram_entropy_ratio (float): of a guess by the frequencies.
    cross_entropy, unigram_cross_entropy, uniform_cross_entropy (float): in nats a token; the last is log(vocab_size).
    count (int): how many tokens there are.
Raises:
    ValueError: no token, one that is missing or not below vocab_size, frequencies of another number, or frequencies or
        negative log likelihoods that are negative or not finite.
Examples:
    >>> metric = evaluate.load("training/metrics/entropy_ratio")
    >>> metric.compute(predictions=[0.0], references=[[0, 1, 2]], vocab_size=4)["entropy_ratio"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class EntropyRatio(evaluate.Metric):
    """See the card, README.md."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions, references, vocab_size, frequencies=None):
        if vocab_size < 2:
            raise ValueError(f"vocab_size is {vocab_size}: there is nothing to tell with fewer than two tokens")
        for index, nats in enumerate(predictions):
            if nats is None or not (math.isfinite(nats) and nats >= 0):
                raise ValueError(
                    f"the negative log likelihood of text {index} is {nats}: it has to be finite and at least 0"
                )
        counts = Counter(token for text in references for token in text)
        total = counts.total()
        if total == 0:
            raise ValueError("references have no tokens: give at least one")
        if None in counts:
            raise ValueError("a token of the references is missing: leave it out, and what it cost")
        if not 0 <= min(counts) <= max(counts) < vocab_size:
            raise ValueError(f"tokens range from {min(counts)} to {max(counts)}, but vocab_size is {vocab_size}")
        # A guess that knows the references' own frequencies needs none raised, and no other unigram guess beats it.
        raised = int(frequencies is not None)
        if frequencies is None:
            frequencies = [counts[token] for token in range(vocab_size)]
        if len(frequencies) != vocab_size:
            raise ValueError(
                f"there are {len(frequencies)} frequencies: give each of the {vocab_size} tokens its count"
            )
        for token, number in enumerate(frequencies):
            if not (math.isfinite(number) and number >= 0):
                raise ValueError(f"the frequency of token {token} is {number}: it has to be finite and at least 0")
        uniform, cross_entropy = math.log(vocab_size), math.fsum(predictions) / total
        whole = sum(frequencies) + raised * vocab_size
        unigram = math.fsum(n * math.log(whole / (frequencies[token] + raised)) for token, n in counts.items()) / total
        return {
            "entropy_ratio": 1 - cross_entropy / uniform,
            "unigram_entropy_ratio": 1 - unigram / uniform,
            "cross_entropy": cross_entropy,
            "unigram_cross_entropy": unigram,
            "uniform_cross_entropy": uniform,
            "count": total,
        }

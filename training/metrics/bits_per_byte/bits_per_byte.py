# SPDX-License-Identifier: Apache-2.0
"""Bits that a language model needs for each UTF-8 byte of text.

Its summed negative log likelihood in bits, divided by the length of the texts in bytes. Models with different
tokenizers can be compared by it. Bits that are stored beside, such as embeddings that the model reads, can be counted
with them.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


CITATION = """\
@article{gao2020pile,
    title={The {P}ile: An 800{GB} Dataset of Diverse Text for Language Modeling},
    author={Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and Foster, Charles
        and Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and Leahy, Connor},
    journal={arXiv preprint arXiv:2101.00027},
    year={2020},
}
"""


def bits_per_byte(
    predictions: Sequence[float], references: Sequence[str], stored_bits: float | None = None
) -> dict[str, float]:
    """Return the bits per byte of texts.

    Args:
        predictions (list of float): for each text its negative log likelihood in nats, summed over its tokens.
        references (list of str): the texts.
        stored_bits (float, *optional*): bits kept beside the texts' code, for all texts together.

    Returns:
        bits_per_byte (float): bits divided by bytes, over all texts together.
        bits (float): the negative log likelihood of all texts, in bits, and the stored ones.
        bytes (int): the length of all texts in UTF-8.
        bits_per_byte_of_text (float): without the stored bits; where `stored_bits` is given.

    Raises:
        ValueError: no text, texts of no bytes at all, or a negative log likelihood or stored bits that are negative or
            not finite.

    Examples:
        >>> metric = evaluate.load("training/metrics/bits_per_byte")
        >>> metric.compute(predictions=[8.0], references=["good"])["bytes"]
        4
    """
    if len(predictions) == 0:
        raise ValueError("predictions are empty: give at least one text and its negative log likelihood")
    for index, (nats, text) in enumerate(zip(predictions, references, strict=True)):
        # Arrow takes a None for a missing text and does not refuse it.
        if text is None:
            raise ValueError(f"text {index} is missing: leave it and its prediction out")
        # NaN and infinity are not below 0 either: the test names what is right.
        if nats is None or not (math.isfinite(nats) and nats >= 0):
            raise ValueError(
                f"the negative log likelihood of text {index} is {nats}: it has to be finite and at least 0 (in nats, "
                "with the sign of a loss)"
            )
    if stored_bits is not None and not (math.isfinite(stored_bits) and stored_bits >= 0):
        raise ValueError(f"stored_bits is {stored_bits}: it has to be finite and at least 0")
    num_bytes = sum(len(text.encode("utf-8")) for text in references)
    if num_bytes == 0:
        raise ValueError("the texts have no bytes: give at least one that is not empty")
    bits = math.fsum(predictions) / math.log(2)  # `fsum`: the order of texts does not matter
    if stored_bits is None:
        return {"bits_per_byte": bits / num_bytes, "bits": bits, "bytes": num_bytes}
    return {
        "bits_per_byte": (bits + stored_bits) / num_bytes,
        "bits": bits + stored_bits,
        "bytes": num_bytes,
        "bits_per_byte_of_text": bits / num_bytes,
    }


class BitsPerByte(evaluate.Metric):
    """`bits_per_byte` as a metric of `evaluate`; README.md is its card."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=inspect.getdoc(bits_per_byte),
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[str], **options: Any) -> dict[str, float]:
        return bits_per_byte(predictions, references, **options)

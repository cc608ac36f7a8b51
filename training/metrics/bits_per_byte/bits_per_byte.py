# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of texts, from their negative log likelihoods: a loss that does not depend on the tokenizer."""

import math

import datasets
import evaluate


_DESCRIPTION = """\
Bits that a language model needs for each UTF-8 byte of text: its summed negative log likelihood in bits, divided by
the length of the texts in bytes. Models with different tokenizers can be compared by it. Bits that are stored beside,
such as embeddings that the model reads, can be counted with them.
"""

_CITATION = """\
@article{gao2020pile,
    title={The {P}ile: An 800{GB} Dataset of Diverse Text for Language Modeling},
    author={Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and Foster, Charles
        and Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and Leahy, Connor},
    journal={arXiv preprint arXiv:2101.00027},
    year={2020},
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of float): for each text its negative log likelihood in nats, summed over its tokens.
    references (list of str): the texts.
    stored_bits (float, *optional*): kept beside the texts' code, of all texts together.
Returns:
    bits_per_byte (float): bits divided by bytes, over all texts together.
    bits (float): the negative log likelihood of all texts, in bits, and the stored ones.
    bytes (int): the length of all texts in UTF-8.
    bits_per_byte_of_text (float): without the stored bits; where `stored_bits` is given.
Raises:
    ValueError: no text, texts of no bytes at all, or a negative log likelihood or stored bits that are negative or not
        finite.
Examples:
    >>> metric = evaluate.load("training/metrics/bits_per_byte")
    >>> metric.compute(predictions=[8.0], references=["good"])["bytes"]
    4
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerByte(evaluate.Metric):
    """See the card, README.md."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, stored_bits=None):
        if len(predictions) == 0:
            raise ValueError("predictions are empty: give at least one text and its negative log likelihood")
        for index, (nats, text) in enumerate(zip(predictions, references, strict=True)):
            if text is None:
                raise ValueError(f"text {index} is missing: leave it and its prediction out")
            if nats is None or not (math.isfinite(nats) and nats >= 0):
                raise ValueError(
                    f"the negative log likelihood of text {index} is {nats}: it has to be finite and at least 0 (in "
                    "nats, with the sign of a loss)"
                )
        if stored_bits is not None and not (math.isfinite(stored_bits) and stored_bits >= 0):
            raise ValueError(f"stored_bits is {stored_bits}: it has to be finite and at least 0")
        length = sum(len(text.encode("utf-8")) for text in references)
        if length == 0:
            raise ValueError("the texts have no bytes: give at least one that is not empty")
        bits = math.fsum(predictions) / math.log(2)
        if stored_bits is None:
            return {"bits_per_byte": bits / length, "bits": bits, "bytes": length}
        whole = bits + stored_bits
        return {
            "bits_per_byte": whole / length,
            "bits": whole,
            "bytes": length,
            "bits_per_byte_of_text": bits / length,
        }

# SPDX-License-Identifier: Apache-2.0
"""A mean loss in nats per token, in other units."""

import math


def perplexity(loss: float) -> float:
    """Return exp of a loss in nats per token; infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte_of_loss(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Return a loss in nats per token as bits per byte of text, which does not depend on the tokenizer.

    The metric `bits_per_byte` computes it from texts.

    Args:
        loss: mean over the tokens, in nats.
        num_tokens: of the text.
        num_bytes: of the text in UTF-8.
    """
    return loss * num_tokens / num_bytes / math.log(2)

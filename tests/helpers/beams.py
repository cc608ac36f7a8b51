# SPDX-License-Identifier: Apache-2.0
"""Beam search without a memory: each beam is read as a whole text, again at each step."""

from collections.abc import Callable

import torch


def beam_search(
    last_logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, num_beams: int, num_tokens: int
) -> torch.Tensor:
    """Return the likeliest of the beams, `(1, T + num_tokens)`, of a text `(1, T)` which nothing ends.

    Args:
        last_logits: of a text `(1, tokens)`, those of the token that follows, `(vocabulary,)`.
    """
    beams = [(0.0, ids)]
    for _ in range(num_tokens):
        longer = []
        for score, text in beams:
            scores, tokens = last_logits(text).double().log_softmax(-1).topk(num_beams)
            for gain, token in zip(scores.tolist(), tokens, strict=True):
                longer.append((score + gain, torch.cat([text, token.view(1, 1)], dim=1)))
        beams = sorted(longer, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]

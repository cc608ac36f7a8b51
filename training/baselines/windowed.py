# SPDX-License-Identifier: Apache-2.0
"""Attention of a rotary transformer to the last tokens alone, and to the first few besides (attention sinks).

This is the bounded cache of a transformer (StreamingLLM, arXiv 2309.17453). The first tokens stand just before the
window there, however far the text has gone: so a query that looks at them is rotated as if it stood right behind both.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb


NAME = "windowed"
# Tokens of a block, if the window is shorter.
SHORTEST_BLOCK = 64


def windowed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    window: int,
    sinks: int,
    turn: tuple[torch.Tensor, torch.Tensor],
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend `(B, H, T, D)`: each token to the last `window` with its own, and to the first `sinks`.

    Args:
        turn: cosines and sines `(1, T, D)` that turn the query of each token to where it stands for the first tokens.

    Returns:
        the read-out `(B, T, H, D)`, and no weights.
    """
    queries, keys, sinks = query * scaling, key.transpose(-1, -2), min(sinks, key.shape[2])
    turned = apply_rotary_pos_emb(queries, queries, *turn)[0]
    places, read_outs = torch.arange(query.shape[2], device=query.device), []
    # A block sees few keys before it, so that the scores of all tokens with all others need not be computed.
    for block in places.split(max(window, SHORTEST_BLOCK)):
        first, start, end = max(0, int(block[0]) - window + 1), int(block[0]), int(block[-1]) + 1
        distance = block[:, None] - places[first:end]
        is_hidden = (distance < 0) | (distance >= window)
        near = (queries[:, :, start:end] @ keys[..., first:end]).masked_fill(is_hidden, -torch.inf)
        is_near = block[:, None] - places[:sinks] < window
        far = (turned[:, :, start:end] @ keys[..., :sinks]).masked_fill(is_near, -torch.inf)
        weights = torch.cat([far, near], dim=-1).softmax(-1)
        read_outs.append(weights[..., :sinks] @ value[:, :, :sinks] + weights[..., sinks:] @ value[:, :, first:end])
    return torch.cat(read_outs, dim=2).transpose(1, 2), None


def windowed_arguments(model: Any, num_tokens: int, max_pairs: int, sinks: int) -> dict[str, Any]:
    """Return the arguments of a GPT-NeoX, whose attention is `windowed`, for texts of so many tokens.

    Args:
        max_pairs: keys that a token sees at most, the sinks included.
    """
    window = max_pairs - sinks
    places = torch.arange(num_tokens, device=model.device)[None]
    # A query at place i sees the first key, of place 0, as from the end of a cache that is full.
    back = (max_pairs - 1 - places).clamp(max=0)
    turn = model.base_model.rotary_emb(model.get_input_embeddings().weight[None], position_ids=back)
    return {"window": window, "sinks": sinks, "turn": turn, "use_cache": False}


# The mask is made here: no other is asked for.
AttentionInterface.register(NAME, windowed_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)

# SPDX-License-Identifier: Apache-2.0
"""Causal attention for heads of few coordinates on the CPU: what torch's computes, several times faster.

Heads of three moons have two to six coordinates. torch's kernels multiply matrices in a layout for wide heads, so that
nearly all of their time goes into products with one tiny side. Here positions are the last axis of all tensors, scores
stay in the processor's cache, and powers are of 2, which torch computes faster than powers of e.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


NAME = "narrow"  # as `attn_implementation`
# Scores of so many queries of so many heads at once fill 3 MB at 800 positions.
QUERIES_AT_ONCE, HEADS_AT_ONCE = 64, 16
LOG2_E = math.log2(math.e)


def _tiles(num_heads: int, length: int) -> Iterator[tuple[slice, slice, slice]]:
    """Give heads, queries and keys of each tile; keys up to the last of the queries."""
    for head in range(0, num_heads, HEADS_AT_ONCE):
        for begin in range(0, length, QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, length)
            yield slice(head, min(head + HEADS_AT_ONCE, num_heads)), slice(begin, end), slice(0, end)


def _new_tile(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(HEADS_AT_ONCE * QUERIES_AT_ONCE * like.shape[-1])


def _products(left: torch.Tensor, right: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Return inner products `(N, R, S)` of columns of `(N, D, R)` and `(N, D, S)`, written into `tile`."""
    shape = len(left), left.shape[-1], right.shape[-1]
    return torch.bmm(left.mT, right, out=tile[: math.prod(shape)].view(shape))


def _later_keys(like: torch.Tensor) -> torch.Tensor:
    """Return minus infinity `(R, R)` for keys after their query and 0 for all others, to be added to scores."""
    return like.new_full((QUERIES_AT_ONCE, QUERIES_AT_ONCE), float("-inf")).triu(1)


def _hide_later_keys(scores: torch.Tensor, later: torch.Tensor) -> None:
    # The queries of a tile are those of its last keys.
    num_queries = scores.shape[1]
    scores[:, :, -num_queries:] += later[:num_queries, :num_queries]


def _with_row(columns: torch.Tensor, row: torch.Tensor | float) -> torch.Tensor:
    """Append one row to `(N, D, T)`."""
    if isinstance(row, float):
        return F.pad(columns, (0, 0, 0, 1), value=row)
    return torch.cat([columns, row], dim=1)


class NarrowAttention(torch.autograd.Function):
    """Causal attention of queries, keys and values `(N, D, T)`, N being rows times heads; without a scale."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        queries, keys, values = (LOG2_E * queries).contiguous(), keys.contiguous(), values.contiguous()
        retrieved, log_totals = torch.empty_like(values), torch.empty_like(keys[:, :1])
        # Ones among the values sum the weights.
        values_and_ones, tile, later = _with_row(values, 1.0), _new_tile(keys), _later_keys(keys)
        for heads, rows, columns in _tiles(len(keys), keys.shape[-1]):
            scores = _products(queries[heads, :, rows], keys[heads, :, columns], tile)
            _hide_later_keys(scores, later)
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp2_()
            sums = values_and_ones[heads, :, columns] @ weights.mT
            retrieved[heads, :, rows] = sums[:, :-1] / sums[:, -1:]
            log_totals[heads, :, rows] = largest.mT + sums[:, -1:].log2()
        ctx.save_for_backward(queries, keys, values, retrieved, log_totals)
        return retrieved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        queries, keys, values, retrieved, log_totals = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_queries, of_keys, of_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        # Against a row of ones, another row subtracts a number of each query within the product.
        queries_and_totals, keys_and_ones = _with_row(queries, -log_totals), _with_row(keys, 1.0)
        means = (gradient * retrieved).sum(1, keepdim=True)
        gradient_and_means, values_and_ones = _with_row(gradient, -means), _with_row(values, 1.0)
        first, second, later = _new_tile(keys), _new_tile(keys), _later_keys(keys)
        for heads, rows, columns in _tiles(len(keys), keys.shape[-1]):
            scores = _products(queries_and_totals[heads, :, rows], keys_and_ones[heads, :, columns], first)
            _hide_later_keys(scores, later)
            weights = scores.exp2_()
            of_scores = _products(gradient_and_means[heads, :, rows], values_and_ones[heads, :, columns], second)
            of_scores.mul_(weights)
            of_queries[heads, :, rows] = keys[heads, :, columns] @ of_scores.mT
            of_keys[heads, :, columns] += queries[heads, :, rows] @ of_scores
            of_values[heads, :, columns] += gradient[heads, :, rows] @ weights
        return of_queries, of_keys / LOG2_E, of_values


def narrow_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Retrieve by `NarrowAttention` in the calling convention of transformers' attention functions.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, H, T, D)`): of equally many positions.

    Returns:
        retrieved values `(B, T, H, D)`, and no weights.

    Raises:
        ValueError: if there is a mask, a dropout, or no causal order of as many keys as queries.
    """
    if attention_mask is not None or dropout or not is_causal or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"attn_implementation={NAME!r} serves whole rows in causal order, without a mask and without dropout: use "
            "'sdpa' for all else"
        )
    columns = ((scaling * query).mT.flatten(0, 1), key.mT.flatten(0, 1), value.mT.flatten(0, 1))
    retrieved = NarrowAttention.apply(*columns)
    return retrieved.unflatten(0, query.shape[:2]).permute(0, 3, 1, 2), None


AttentionInterface.register(NAME, narrow_attention_forward)
# With this function a missing mask is read as causal.
AttentionMaskInterface.register(NAME, sdpa_mask)

# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The Memory Mosaic authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Kernel smoothing on a CPU, block by block of queries, with or without masks and dropout of weights.

The scores and the mask of a block stay in the processor's cache, and the backward pass computes them again: memory is
linear in T. On a CPU torch's own function is slower for short texts, and with mask or dropout it holds T x N numbers.

Shapes use B batch, H heads, T queries, N pairs, D head width, G = B * H; R queries of a block, M pairs that it sees.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchdynamo_compiling

from .ops_memory_mosaic import lowest_bias


# Queries of a block. With some thousand pairs, their scores fit into the cache of a core.
BLOCK_LENGTH = 64
# For longer texts without mask and dropout, torch's own function is as fast.
LONGEST_TEXT = 1024
# Random numbers of 16 bits: four to a number of 64 bits, which are drawn four times as fast as by `bernoulli_`.
NUM_LEVELS = 2**16


@dataclass(frozen=True, eq=False)
class SlotRule:
    """Which pairs each query sees: the first `num_before` + t for query t, less those that are excluded.

    - `num_before`: N if all see all,
    - `is_full` `(B, N)`, *optional*: False at pairs that no query sees,
    - `begins` `(B, T)`, *optional*: the first pair that each query sees, that of its document.

    No tuple: `generate` would take it apart.
    """

    num_before: int
    is_full: torch.Tensor | None = None
    begins: torch.Tensor | None = None

    def seen_by(self, block: slice, num_pairs: int) -> slice:
        """Return the pairs that any query of a block may see."""
        first = 0 if self.begins is None else int(self.begins[:, block].min())
        return slice(first, min(num_pairs, self.num_before + block.stop - 1))

    def allowed(self, block: slice, pairs: slice) -> torch.Tensor | None:
        """Return which of the pairs each query of a block sees, `(B or 1, R, M)`; `None` if all see all."""
        is_allowed = None
        device = next((part.device for part in (self.is_full, self.begins) if part is not None), torch.device("cpu"))
        columns = torch.arange(pairs.start, pairs.stop, device=device)
        if self.num_before + block.start < pairs.stop:
            rows = torch.arange(block.start, block.stop, device=device)[:, None]
            is_allowed = (columns < self.num_before + rows)[None]
        if self.is_full is not None:
            is_full = self.is_full[:, None, pairs]
            is_allowed = is_full if is_allowed is None else is_allowed & is_full
        if self.begins is not None:
            is_own = columns >= self.begins[:, block, None]
            is_allowed = is_own if is_allowed is None else is_allowed & is_own
        return is_allowed

    def contiguous(self) -> "SlotRule":
        """Return the rule itself: `generate` of transformers before 5.23 asks each of a model's masks for this."""
        return self

    def mask(self, num_queries: int, num_pairs: int) -> torch.Tensor:
        """Return the whole rule as a mask `(B or 1, 1, T, N)`, for functions that do not read in blocks.

        A query that sees no pair is given pair 0, which has to be the empty slot.
        """
        is_allowed = self.allowed(slice(0, num_queries), slice(0, num_pairs))
        if is_allowed is None:
            return torch.ones(1, 1, num_queries, num_pairs, dtype=torch.bool, device="cpu")
        is_allowed = is_allowed.expand(-1, num_queries, -1).clone()
        is_allowed[..., 0] |= ~is_allowed.any(dim=-1)
        return is_allowed[:, None]


@dataclass(frozen=True, eq=False)
class NumberRule:
    """Which pairs each query sees: those whose numbers lie between two that it names, if their slots hold one.

    A number counts tokens along a row: padding has that of the token before it. So windows and delays are of tokens.

    - `numbers` `(B or 1, N)`: of the slots, never falling,
    - `first`, `last` `(B or 1, T)`: of the slots that each query sees, both included,
    - `is_full` `(B or 1, N)`: False at slots that no query sees.
    """

    numbers: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    is_full: torch.Tensor

    def seen_by(self, block: slice, num_pairs: int) -> slice:
        """Return the pairs that any query of a block may see."""
        first, last = self.first[:, block].amin(1, keepdim=True), self.last[:, block].amax(1, keepdim=True)
        if len(self.numbers) == 1:
            first, last = first.amin(0, keepdim=True), last.amax(0, keepdim=True)
        else:
            first, last = (part.expand(len(self.numbers), -1).contiguous() for part in (first, last))
        begin = int(torch.searchsorted(self.numbers, first).min())
        end = min(num_pairs, int(torch.searchsorted(self.numbers, last, right=True).max()))
        # Never empty: a slot that is not seen costs nothing.
        return slice(begin, end) if begin < end else slice(0, 1)

    def allowed(self, block: slice, pairs: slice) -> torch.Tensor:
        """Return which of the pairs each query of a block sees, `(B or 1, R, M)`."""
        numbers = self.numbers[:, None, pairs]
        is_between = (self.first[:, block, None] <= numbers) & (numbers <= self.last[:, block, None])
        return is_between & self.is_full[:, None, pairs]


Rule = SlotRule | NumberRule


def has_plain_sdpa(config: PreTrainedConfig) -> bool:
    """Return whether a model reads by transformers' own sdpa, and not by a function that a caller has registered."""
    if config._attn_implementation != "sdpa":
        return False
    return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is sdpa_attention_forward


def can_read_in_blocks(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is one that [`block_read`] reads: plain numbers on a CPU, outside of transforms."""
    if type(tensor) is not torch.Tensor or tensor.device.type != "cpu" or is_torchdynamo_compiling():
        return False
    if tensor.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"):
        return False
    # Transforms such as `torch.func.vmap` and derivatives forwards take operations apart.
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def can_read_directly(tensor: torch.Tensor, config: PreTrainedConfig) -> bool:
    """Return whether a model reads a token, of the device and dtype of a tensor, by [`direct_read`] in place of sdpa.

    On a CPU, for one query, the time is that of fetching the pairs, and sdpa is slower at it.
    """
    is_plain = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and has_plain_sdpa(config)
    return is_plain and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _blocks(num_queries: int) -> Iterator[slice]:
    for start in range(0, num_queries, BLOCK_LENGTH):
        yield slice(start, min(start + BLOCK_LENGTH, num_queries))


def _added(
    rule: Rule, block: slice, pairs: slice, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what is added to the scores `(B or 1, H or 1, R, M)` of a block; `None` if nothing is."""
    is_allowed, lowest = rule.allowed(block, pairs), lowest_bias(dtype)
    added = None
    if is_allowed is not None:
        added = torch.zeros(is_allowed.shape, dtype=dtype, device=is_allowed.device)
        added = added.masked_fill_(~is_allowed, lowest)[:, None]
    if bias is None:
        return added
    of_pairs = bias[:, :, None, pairs].to(dtype).clamp(min=lowest)
    return of_pairs if added is None else added + of_pairs


def _weights(
    queries: torch.Tensor, keys: torch.Tensor, block: slice, pairs: slice, rule: Rule, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the weights `(G, R, M)` that a block of queries gives to pairs; all 0 for a query that sees none."""
    scores = torch.bmm(queries[:, block], keys[:, pairs].transpose(1, 2))
    added = _added(rule, block, pairs, bias, scores.dtype)
    if added is None:
        return scores.softmax(dim=-1)
    num_rows = len(added) if bias is None else len(bias)
    by_row = scores.view(num_rows, -1, *scores.shape[1:])
    by_row.add_(added)
    weights, sees_any = scores.softmax(dim=-1), (added > lowest_bias(scores.dtype)).any(dim=-1, keepdim=True)
    if not sees_any.all():
        weights.view(by_row.shape).mul_(sees_any)
    return weights


def _kept(weights: torch.Tensor, dropout: float, generator: torch.Generator | None) -> torch.Tensor:
    """Return what weights are multiplied by: 0 for those dropped, and 1 / (1 - dropout) for the others."""
    numbers = torch.empty(math.ceil(weights.numel() / 4), dtype=torch.int64, device=weights.device)
    numbers.random_(-(2**63), None, generator=generator)
    levels = numbers.view(torch.int16)[: weights.numel()].view(weights.shape)
    num_dropped = min(round(dropout * NUM_LEVELS), NUM_LEVELS - 1)
    kept = torch.ge(levels, num_dropped - NUM_LEVELS // 2, out=torch.empty_like(weights))
    return kept.div_(1 - num_dropped / NUM_LEVELS)


class _BlockRead(torch.autograd.Function):
    """See [`block_read`]. Tensors are `(B, H, T or N, D)`, the result `(B, T, H, D)`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: Rule,
        dropout: float,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.rule, ctx.dropout, ctx.bias = rule, dropout, bias
        ctx.random_state = torch.get_rng_state() if dropout else None
        (batch_size, num_heads, num_queries, _), width = query.shape, value.shape[-1]
        queries, keys, values = (tensor.flatten(0, 1) for tensor in (query, key, value))
        retrieved = query.new_empty(batch_size, num_queries, num_heads, width)
        for block in _blocks(num_queries):
            pairs = rule.seen_by(block, values.shape[1])
            weights = _weights(queries, keys, block, pairs, rule, bias)
            if dropout:
                weights.mul_(_kept(weights, dropout, None))
            sums = torch.bmm(weights, values[:, pairs])
            retrieved[:, block] = sums.view(batch_size, num_heads, -1, width).transpose(1, 2)
        ctx.save_for_backward(query, key, value, retrieved)
        return retrieved

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not by `once_differentiable`, with which `torch.autograd.grad` gives second derivatives without this part.
        if torch.is_grad_enabled():
            raise RuntimeError(
                'A gradient with `create_graph=True` needs a model loaded with `attn_implementation="eager"`: reading '
                "block by block has no second derivative."
            )
        query, key, value, retrieved = ctx.saved_tensors
        queries, keys, values = (tensor.flatten(0, 1) for tensor in (query, key, value))
        generator = None if ctx.random_state is None else torch.Generator().set_state(ctx.random_state)
        to_queries, to_keys, to_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        # Each query's mean of the gradients of its weights.
        means = (gradient * retrieved).sum(dim=-1, keepdim=True)
        for block in _blocks(queries.shape[1]):
            pairs = ctx.rule.seen_by(block, values.shape[1])
            weights = _weights(queries, keys, block, pairs, ctx.rule, ctx.bias)
            of_block, mean = (part[:, block].transpose(1, 2).flatten(0, 1) for part in (gradient, means))
            to_scores, used = torch.bmm(of_block, values[:, pairs].transpose(1, 2)), weights
            if generator is not None:
                kept = _kept(weights, ctx.dropout, generator)
                to_scores.mul_(kept)
                used = kept.mul_(weights)
            to_scores.sub_(mean).mul_(weights)
            to_queries[:, block] = torch.bmm(to_scores, keys[:, pairs])
            to_keys[:, pairs].baddbmm_(to_scores.transpose(1, 2), queries[:, block])
            to_values[:, pairs].baddbmm_(used.transpose(1, 2), of_block)
        return to_queries.view(query.shape), to_keys.view(key.shape), to_values.view(value.shape), None, None, None


def block_read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rule: Rule,
    dropout: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what [`kernel_smoothing`] retrieves for queries that see pairs by a rule.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`), key and value (`torch.Tensor` of shape `(B, H, N, D)`): keys
            without a value, behind the others, are not read.
        rule ([`SlotRule`] or [`NumberRule`]).
        dropout (`float`): share of weights set to zero, rounded to a multiple of 1 / 65,536.
        bias (`torch.Tensor` of shape `(B, H or 1, N)`, *optional*): added to the scores of each pair: -inf for an
            empty one, log n for one that stands for n. Has no gradient.

    Returns:
        retrieved values `(B, T, H, D)`; 0 for a query that sees no pair.
    """
    result: torch.Tensor = _BlockRead.apply(query, key, value, rule, dropout, bias)
    return result

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
"""Memories of Memory Mosaics v2: short-term and long-term heads with gated keys, and a dense persistent memory.

Short-term heads read the last pairs of a text, long-term heads those that are older than a delay. Both extract keys by
gated sums, and their kernels narrow with the number of pairs.

Shapes use B batch, T tokens, H heads of a memory, D head width, C = hidden size, W pairs of the short-term window, P
slots of that before the new tokens, S slots of the long-term memory (one per token).
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .blocks_memory_mosaic import NumberRule, SlotRule, block_read, can_read_in_blocks, has_plain_sdpa
from .cache_memory_mosaic_v2 import WindowStates, level_states
from .configuration_memory_mosaic_v2 import MemoryMosaicV2Config
from .masking_memory_mosaic_v2 import Reading, rules_of
from .memories_memory_mosaic import MemoryMosaicPairStore
from .ops_memory_mosaic import (
    as_dtype,
    at_least_float32,
    biased_read,
    eager_attention_forward,
    forward_fill,
    lowest_bias,
    scale_to_length,
    smoothing_weights,
    weighted_values,
)
from .ops_memory_mosaic_v2 import (
    LOWEST_LOG,
    MAX_LOG_VALUE_LENGTH,
    alignment,
    gated_sum,
    inverse_temperature,
    magnitude,
    rearranged,
    window_read,
)


def largest_length(dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest length of a query or a value in a precision, which float16 alone comes near to.

    Under autocast attention functions read in its precision, whatever the dtype of queries is.
    """
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    return min(torch.finfo(dtype).max / 2, 1e38)


def gather_heads(retrieved: torch.Tensor, weight: Any, num_heads: int) -> torch.Tensor:
    """Return what all heads retrieved `(B, T, H, D)`, if processes hold some of them each.

    Args:
        weight: of a projection of these heads; a `DTensor` if they are spread.
    """
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or retrieved.shape[2] == num_heads:
        return retrieved
    # Not imported above: torch may be built without it.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(retrieved, mesh, [Shard(2)], run_check=False).redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Replicate()])


class MemoryMosaicV2Heads(MemoryMosaicPairStore):
    """Heads of one contextual memory, without a combining layer: gated keys, values, and the retrieval by them."""

    level: str
    config: MemoryMosaicV2Config

    def __init__(self, config: MemoryMosaicV2Config, layer_idx: int, num_heads: int):
        super().__init__(config, layer_idx)
        self.num_heads = num_heads
        inner_size = num_heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner_size, bias=config.use_bias)
        if config.gated_keys:
            self.gate_proj = nn.Linear(config.hidden_size, num_heads, bias=config.gate_bias)
            self.leak_proj = nn.Linear(config.hidden_size, num_heads, bias=config.gate_bias)
        else:
            self.key_leak = nn.Parameter(torch.empty(num_heads))
        num_shared = num_heads if config.bandwidth_sharing == "head" else 1
        self.bandwidth_scale = nn.Parameter(torch.empty(num_shared))
        self.bandwidth_offset = nn.Parameter(torch.empty(num_shared))
        exponent = nn.Parameter(torch.empty(num_shared)) if config.adaptive_bandwidth else None
        self.register_parameter("bandwidth_exponent", exponent)
        self.value_scale = nn.Parameter(torch.empty(num_heads))
        self.value_mix = nn.Parameter(torch.empty(num_heads))
        self.state_names = level_states(self.level)

    def log_gates_and_decays(
        self, hidden_states: torch.Tensor, is_token: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log g and log lambda of each head and token, `(B, H, T)`, in float32 at least (eq. 8)."""
        if self.config.gated_keys:
            gates = at_least_float32(self.gate_proj(hidden_states)).transpose(1, 2)
            decays = -magnitude(at_least_float32(self.leak_proj(hidden_states))).transpose(1, 2)
        else:
            decays = -self.leak()[None, :, None].expand(hidden_states.shape[0], -1, hidden_states.shape[1])
            gates = torch.zeros_like(decays)
        if is_token is not None:
            is_padding = ~is_token[:, None]
            gates, decays = gates.masked_fill(is_padding, LOWEST_LOG), decays.masked_fill(is_padding, 0.0)
        return gates, decays

    def gated_sums(
        self, hidden_states: torch.Tensor, reading: Reading, states: WindowStates | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gated sums of projected keys `(B, H, T, D)`, and the sum before them `(B, H, 1, D)` or `None`."""
        projected = self.split_heads(self.k_proj(hidden_states))
        if reading.is_token is not None:
            projected = projected * reading.is_token[:, None, :, None]
        sum_name, scale_name, _ = self.state_names
        previous = None if states is None else states.get_state(sum_name)
        before = None if previous is None or states is None else (previous, states.get_state(scale_name))
        gates, decays = self.log_gates_and_decays(hidden_states, reading.is_token)
        sums, log_scales = gated_sum(projected, gates, decays, before, reading.document_ids)
        if states is None:
            return sums, None
        if hasattr(states, "continue_gated_sum"):  # of a text that processes share
            return states.continue_gated_sum(sums, log_scales, decays)
        states.set_state(sum_name, sums)
        states.set_state(scale_name, log_scales)
        return sums, previous

    def beta(self, num_pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the inverse temperature by the number of pairs `(B or 1, T)`, `(B or 1, H or 1, T, 1)` (eq. 6)."""
        # Keys have unit length, so that a query is as long as beta and has to stay within its precision.
        thetas = (self.bandwidth_scale, self.bandwidth_offset, cast(Any, self.bandwidth_exponent))
        return inverse_temperature(num_pairs, *thetas, largest_length(dtype, num_pairs.device))

    def keys_and_queries(
        self,
        hidden_states: torch.Tensor,
        num_pairs: torch.Tensor | None,
        reading: Reading,
        states: WindowStates | None,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return keys `(B, H, S, D)` and queries `(B, H, T, D)`, and whether no token came before.

        Keys are those of the new tokens and, if there is one, of the token before them, whose pair completes now.
        Queries of an unknown number of pairs have unit length.
        """
        sums, previous = self.gated_sums(hidden_states, reading, states)
        if previous is not None:
            sums = torch.cat([previous, sums], dim=2)
        units = scale_to_length(sums, sums.new_ones(()))
        keys = as_dtype(units, hidden_states.dtype)
        queries = units[:, :, -hidden_states.shape[1] :]
        if num_pairs is not None:
            queries = queries * self.beta(num_pairs, keys.dtype)
        return keys, as_dtype(queries, keys.dtype), previous is None

    def pair_values(self, hidden_states: torch.Tensor, reading: Reading, states: WindowStates | None) -> torch.Tensor:
        """Return values of the pairs that the new tokens complete, `(B, H, T, D)`; T - 1 if no token came before."""
        projected = self.split_heads(self.v_proj(hidden_states))
        name = self.state_names[-1]
        pending = None if states is None else states.value_before(name, projected)
        if reading.is_token is not None:
            projected = forward_fill(projected, reading.is_token, pending)
        if states is not None:
            states.set_state(name, projected)
        if pending is not None:
            projected = torch.cat([pending, projected], dim=2)
        # float32 before the blend: in half precision it would round twice.
        projected = at_least_float32(projected)
        mix = at_least_float32(self.value_mix).view(-1, 1, 1)
        length = magnitude(at_least_float32(self.value_scale)).clamp(max=MAX_LOG_VALUE_LENGTH).exp()
        length = length.clamp(max=largest_length(hidden_states.dtype, hidden_states.device)).view(-1, 1, 1)
        blend = torch.lerp(projected[:, :, 1:], projected[:, :, :-1], mix)
        return as_dtype(scale_to_length(blend, length), hidden_states.dtype)

    def read_first(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, delay: int, **kwargs: Any
    ) -> torch.Tensor:
        """Read the pairs up to `delay` tokens before each, nothing before the first token and nothing padded.

        By the shift identity: tokens `delay`.. over the pairs of tokens 0.. is plain causal attention.
        """
        queries, num_pairs = queries[:, :, delay:], queries.shape[2] - delay
        keys, values = keys[:, :, :num_pairs], values[:, :, :num_pairs]
        if self.prefers_blocks(queries):
            retrieved = block_read(queries, keys, values, SlotRule(1), self.weight_dropout())
        else:
            retrieved = self.retrieve(queries, keys, values, None, **kwargs)[0]
        return F.pad(retrieved, (0, 0, 0, 0, delay, 0))

    def read_by_rule(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: NumberRule,
        slot_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return values `(B, T, H, D)` that are read of the slots that a rule allows."""
        if has_plain_sdpa(self.config) and can_read_in_blocks(queries):
            return block_read(queries, keys, values, rule, self.weight_dropout(), slot_bias)
        is_allowed = rule.allowed(slice(0, queries.shape[2]), slice(0, keys.shape[2]))[:, None].to(queries.device)
        return self.read_masked(queries, keys, values, is_allowed, slot_bias, **kwargs)

    def read_masked(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_allowed: torch.Tensor,
        slot_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return what an attention function reads of the pairs that a mask `(B or 1, 1, T, N)` allows."""
        if slot_bias is None:
            slot_bias = queries.new_zeros(1, 1, keys.shape[2])
        implementation = self.config._attn_implementation
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        kwargs |= {"is_causal": False, "dropout": self.weight_dropout(), "scaling": 1.0}
        return biased_read(attention_function, self, queries, keys, values, is_allowed, slot_bias, **kwargs)[0]

    def read_with_map(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: NumberRule,
        reading: Reading,
        slot_bias: torch.Tensor | None = None,
    ) -> "Mapped":
        """Read the slots that a rule allows by eager attention, whose map is in the graph of what is retrieved."""
        is_allowed = rule.allowed(slice(0, queries.shape[2]), slice(0, keys.shape[2]))[:, None].to(queries.device)
        bias = torch.zeros_like(is_allowed, dtype=torch.promote_types(queries.dtype, torch.float32))
        bias = bias if slot_bias is None else slot_bias[:, :, None].to(bias)
        lowest = lowest_bias(bias.dtype)
        bias = bias.masked_fill(~is_allowed, -torch.inf).clamp(min=lowest)
        sees_any = (bias > lowest).any(dim=-1, keepdim=True)
        weights = smoothing_weights(queries, keys, bias, self.weight_dropout()) * sees_any
        places = places_of_pairs(rule.numbers, reading)[:, None, None].to(weights.device)
        places = places.expand(weights.shape[0], *weights.shape[1:3], -1)
        of_tokens = weights.new_zeros(*weights.shape[:3], reading.num_slots).scatter_add(3, places, weights)
        return Mapped(of_tokens, places, rule.is_full[:, None, None].to(weights.device), values)


class Mapped(NamedTuple):
    """A map of eager attention, and how to read values by it.

    - `weights` `(B, H, T, S)`: that each token gives to the pair of each token so far,
    - `places` `(B, H, T, N)`: the token of the pair in each slot that was read,
    - `is_full` `(B or 1, 1, 1, N)`: False at slots without a pair,
    - `values` `(B, H, N, D)`: of the slots.
    """

    weights: torch.Tensor
    places: torch.Tensor
    is_full: torch.Tensor
    values: torch.Tensor

    def read(self, weights: torch.Tensor) -> torch.Tensor:
        """Return what is retrieved `(B, T, H, D)` by the map, which is given once more as a part of a larger one."""
        return weighted_values(weights.gather(3, self.places) * self.is_full, self.values).transpose(1, 2)


def places_of_pairs(numbers: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Return the place among S slots of the token of each pair, `(B or 1, N)`.

    The slot of a token holds the pair of the token before it.

    Args:
        numbers (`torch.Tensor` of shape `(B or 1, N)`): of the tokens whose slots they are.
    """
    of_slots = reading.long_rule.numbers
    num_rows = max(of_slots.shape[0], numbers.shape[0])
    before = (numbers - 1).expand(num_rows, -1).contiguous()
    places = torch.searchsorted(of_slots.expand(num_rows, -1).contiguous(), before)
    slots = torch.arange(numbers.shape[1], device=numbers.device)
    if numbers.shape[1] == reading.num_slots:  # slots of joined texts have no numbers
        places = torch.where(slots < reading.num_joined, slots - 1, places)
    return places.clamp(0, reading.num_slots - 1)


class MemoryMosaicV2ShortTermMemory(MemoryMosaicV2Heads):
    """Heads that read the last W pairs (eq. 10)."""

    level = "short_term"

    def forward(
        self,
        hidden_states: torch.Tensor,
        reading: Reading,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> "torch.Tensor | Mapped":
        """Return what hidden states `(B, T, C)` retrieve, `(B, T, H, D)`, or by eager attention its map."""
        states = cast(Any, None if past_key_values is None else self.states(past_key_values))
        keys, queries, is_first = self.keys_and_queries(hidden_states, reading.short_pairs, reading, states)
        values = self.pair_values(hidden_states, reading, states)
        rule, slot_keys, slot_values = reading.short_rule, keys[:, :, :-1], values
        if is_first and (states is not None or rule is not None):  # the first token completes no pair
            slot_keys, slot_values = F.pad(slot_keys, (0, 0, 1, 0)), F.pad(slot_values, (0, 0, 1, 0))
        if states is not None:
            window = (self.config.num_short_term_pairs, reading.is_token, reading.past_mask)
            slot_keys, slot_values = states.extend_window(slot_keys, slot_values, *window)
            first = slot_keys.shape[2] - reading.num_window - queries.shape[2]
            slot_keys, slot_values = slot_keys[:, :, first:], slot_values[:, :, first:]
        if rule is None and reading.num_window == 0:
            return self.read_first(queries, keys[:, :, :-1], values, 1, **kwargs)
        if rule is None:  # one token, that sees as many of the last slots as have pairs
            first = slot_keys.shape[2] - min(self.config.num_short_term_pairs, reading.num_slots - 1)
            slot_keys, slot_values = slot_keys[:, :, first:], slot_values[:, :, first:]
            return self.retrieve(queries, slot_keys, slot_values, None, reading.reads_directly, **kwargs)[0]
        if reading.has_maps:
            return self.read_with_map(queries, slot_keys, slot_values, rule, reading)
        reads_whole = torch.compiler.is_exporting() or reading.is_stretch
        if reads_whole or (has_plain_sdpa(self.config) and can_read_in_blocks(queries)):
            return self.read_by_rule(queries, slot_keys, slot_values, rule, **kwargs)
        return self.read_windows(queries, slot_keys, slot_values, rule, reading, **kwargs)

    def read_windows(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: NumberRule,
        reading: Reading,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Do as `read_by_rule`, with masks of blocks alone: see [`window_read`]."""
        size, is_token = self.config.num_short_term_pairs, reading.is_token
        missing = size - reading.num_window
        keys, values = (F.pad(part, (0, 0, missing, 0)) for part in (keys, values))
        is_full = F.pad(rule.is_full, (missing, 0)).expand(queries.shape[0], -1)
        documents = None if reading.document_ids is None else F.pad(reading.document_ids, (size, 0))
        if is_token is not None:
            # A window is of tokens, so that padding goes to the front of slots and queries.
            order, of_slots = alignment(is_token), alignment(F.pad(is_token, (size, 0), value=True))
            queries, keys, values = (
                rearranged(part, by) for part, by in ((queries, order), (keys, of_slots), (values, of_slots))
            )
            is_full = is_full.gather(1, of_slots)
            documents = None if documents is None else documents.gather(1, of_slots)

        def read(*block: torch.Tensor) -> torch.Tensor:
            return self.read_masked(*block, **kwargs)

        retrieved = window_read(read, queries, keys, values, is_full, documents)
        if is_token is not None:
            retrieved = rearranged(retrieved.transpose(1, 2), order.argsort(-1))
            retrieved = forward_fill(retrieved, is_token, None).transpose(1, 2)
        return retrieved


class MemoryMosaicV2LongTermMemory(MemoryMosaicV2Heads):
    """Heads that read all pairs older than a delay."""

    level = "long_term"

    def forward(
        self,
        hidden_states: torch.Tensor,
        reading: Reading,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> "torch.Tensor | Mapped":
        """Return what hidden states `(B, T, C)` retrieve, `(B, T, H, D)`, or by eager attention its map."""
        states = cast(Any, None if past_key_values is None else self.states(past_key_values))
        if hasattr(states, "read"):
            return self.read_bounded(hidden_states, reading, states)
        keys, queries, is_first = self.keys_and_queries(hidden_states, reading.long_pairs, reading, states)
        values = self.pair_values(hidden_states, reading, states)
        rule, slot_bias = reading.long_rule, None
        if states is not None and reading.slot_bias is not None:
            slot_bias = states.add_slot_bias(reading.slot_bias)
        slot_keys, slot_values = keys[:, :, :-1], values
        if past_key_values is not None or rule is not None:
            slot_keys, slot_values = self.store(slot_keys, slot_values, past_key_values, is_first=is_first)
        if slot_bias is not None and states.search is not None and states.search.reads(states, queries.shape[2]):
            is_seen = rule.allowed(slice(0, queries.shape[2]), slice(0, slot_keys.shape[2]))
            return states.search.read(states, self.layer_idx, queries, slot_keys, slot_values, is_seen)
        if rule is not None and reading.has_maps:
            return self.read_with_map(queries, slot_keys, slot_values, rule, reading, slot_bias)
        if rule is not None:
            return self.read_by_rule(queries, slot_keys, slot_values, rule, slot_bias, **kwargs)
        delay = cast(int, reading.delay)
        if is_first:
            return self.read_first(queries, keys[:, :, :-1], values, delay, **kwargs)
        last = slot_keys.shape[2] - delay + 1
        slot_keys, slot_values = slot_keys[:, :, 1:last], slot_values[:, :, 1:last]
        return self.retrieve(queries, slot_keys, slot_values, None, reading.reads_directly, **kwargs)[0]

    def read_bounded(self, hidden_states: torch.Tensor, reading: Reading, states: Any) -> torch.Tensor:
        """Return what is retrieved `(B, T, H, D)` from a bounded memory, which knows which pairs it holds."""
        keys, queries, is_first = self.keys_and_queries(hidden_states, None, reading, states)
        values = self.pair_values(hidden_states, reading, states)
        pairs = (F.pad(part, (0, 0, int(is_first), 0)) for part in (keys[:, :, :-1], values))
        is_full = cast(Any, reading.slot_bias)[:, 0] > -torch.inf
        is_token = torch.ones_like(is_full) if reading.is_token is None else reading.is_token
        retrieved: torch.Tensor = states.read(
            queries, *pairs, is_token, is_full, beta=lambda num_pairs: self.beta(num_pairs, keys.dtype)
        )
        return retrieved


class MemoryMosaicV2ContextualMemory(nn.Module):
    """Short-term and long-term heads, and the layer that combines them."""

    kind = "contextual"

    def __init__(self, config: MemoryMosaicV2Config, layer_idx: int):
        super().__init__()
        num_short, num_long = config.num_short_term_heads, config.num_long_term_heads
        self.layer_idx, self.config = layer_idx, config
        self.short_term = MemoryMosaicV2ShortTermMemory(config, layer_idx, num_short) if num_short else None
        self.long_term = MemoryMosaicV2LongTermMemory(config, layer_idx, num_long) if num_long else None
        self.head_dim = config.head_dim
        inner_size = (num_short + num_long) * self.head_dim
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=config.use_bias)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        reading: Reading,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, C)`).
            reading ([`Reading`]): padding, documents and what each token sees.
            past_key_values ([`~transformers.Cache`], *optional*): the memory; grows by T slots.

        Returns:
            output `(B, T, C)`, and under eager attention the weight `(B, heads, T, S)` that each of T tokens gives to
            the pair of each of S tokens so far: of short-term heads first, then of long-term ones.
        """
        memories = [memory for memory in (self.short_term, self.long_term) if memory is not None]
        read = [memory(hidden_states, reading, past_key_values=past_key_values, **kwargs) for memory in memories]
        if self.long_term is None and past_key_values is not None:
            # The length of a memory is that of its long-term slots, also if no head reads them.
            empty = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], self.head_dim)
            past_key_values.update(empty, empty, self.layer_idx)
        maps = [part.weights for part in read if isinstance(part, Mapped)]
        whole = torch.cat(maps, dim=1) if maps else None
        if whole is not None:
            parts = whole.split([weights.shape[1] for weights in maps], dim=1)
            read = [part.read(weights) for part, weights in zip(cast(Any, read), parts, strict=True)]
        heads = [
            gather_heads(retrieved, memory.k_proj.weight, memory.num_heads)
            for memory, retrieved in zip(memories, cast(Any, read), strict=True)
        ]
        output = self.o_proj(torch.cat(heads, dim=2).flatten(2))
        return self.dropout(output) if self.training else output, whole

    def levels(self) -> dict[str, int]:
        """Return the number of heads of each level, in the order of `o_proj`."""
        memories = [memory for memory in (self.short_term, self.long_term) if memory is not None]
        return {memory.level: memory.num_heads for memory in memories}

    def read_units(
        self, hidden_states: torch.Tensor, reading: Reading, joined: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what each head retrieves in a pass that no text came before, by eager attention, for inspection.

        Args:
            joined (*optional*): long-term keys and values `(B, H, S, D)` and biases `(B, H or 1, S)` of joined texts.

        Returns:
            retrieved values `(B, heads, T, D)`, the weights of slots of joined texts and of the text
            `(B, heads, T, S + T)`, where slot t holds the pair that token t completes, and the values of these pairs
            `(B, heads, T, D)`.
        """
        read = []
        rules = rules_of(self.config, reading, hidden_states.shape[1], hidden_states.device)
        pairs = reading.short_pairs, reading.long_pairs
        for memory, rule, num_pairs in zip((self.short_term, self.long_term), rules, pairs, strict=True):
            if memory is None:
                continue
            keys, queries, _ = memory.keys_and_queries(hidden_states, num_pairs, reading, None)
            values = memory.pair_values(hidden_states, reading, None)
            slot_keys, own_values = memory.store(keys[:, :, :-1], values, None, is_first=True)
            slot_values, bias, num_missing = own_values, at_least_float32(slot_keys[:, :1, :, 0] * 0), 0
            if joined is not None and memory is self.long_term:
                slot_keys, slot_values, bias = (
                    torch.cat([before, own.expand(-1, before.shape[1], *own.shape[2:])], dim=2)
                    for before, own in zip(joined, (slot_keys, own_values, bias), strict=True)
                )
            elif joined is not None:
                num_missing = joined[0].shape[2]
            is_allowed = rule.allowed(slice(0, queries.shape[2]), slice(0, slot_keys.shape[2]))[:, None]
            bias = bias[:, :, None].masked_fill(~is_allowed, -torch.inf).clamp(min=lowest_bias(bias.dtype))
            sees_any = (bias > lowest_bias(bias.dtype)).any(dim=-1, keepdim=True)
            weights = smoothing_weights(queries, slot_keys, bias, 0.0) * sees_any
            read.append((weighted_values(weights, slot_values), F.pad(weights, (num_missing, 0)), own_values))
        retrieved, weights, values = (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))
        return retrieved, weights, values


class MemoryMosaicV2DenseMemory(nn.Module):
    """What the model knows before it reads: a gated dense layer, W_2 (act(W_1 x) * W_3 x)."""

    kind = "persistent"

    def __init__(self, config: MemoryMosaicV2Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        inner_size = config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, inner_size, bias=config.use_bias)
        self.up_proj = nn.Linear(config.hidden_size, inner_size, bias=config.use_bias)
        self.down_proj = nn.Linear(inner_size, config.hidden_size, bias=config.use_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the output `(B, T, C)` of hidden states `(B, T, C)`."""
        return self.dropout(self.down_proj(self.gated(hidden_states)))

    def gated(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return what `down_proj` reads, `(B, T, intermediate_size)`."""
        return self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)

    def read_units(
        self, hidden_states: torch.Tensor, reading: Reading | None, joined: None
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return what the layer reads as one unit `(B, 1, T, intermediate_size)`, which has no slots to weigh."""
        gated = self.gated(hidden_states)[:, None]
        return gated, at_least_float32(gated[..., :0]), None


__all__ = ["MemoryMosaicV2ContextualMemory", "MemoryMosaicV2DenseMemory"]

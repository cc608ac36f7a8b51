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
"""Associative memories of Memory Mosaics: heads of keys and values, stored from the text or learnt.

A contextual memory stores a pair for each token and retrieves from the pairs before; a persistent one retrieves from
learnt pairs. Both extract keys by leaky sums.

Shapes use B batch, T tokens, H heads (memories per layer), D head width, C = hidden size, N persistent slots per head,
S slots of a memory (one per token). Per-head scalars are stored divided by 10, as in the authors' `Library`: Adam then
moves them ten times faster.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling

from .blocks_memory_mosaic import (
    LONGEST_TEXT,
    SlotRule,
    block_read,
    can_read_directly,
    can_read_in_blocks,
    has_plain_sdpa,
)
from .cache_memory_mosaic import MemoryMosaicStates, memory_layer
from .configuration_memory_mosaic import MemoryMosaicConfig
from .ops_memory_mosaic import (
    MAX_LOG_KEY_SCALE,
    HeadScalars,
    as_dtype,
    at_least_float32,
    biased_read,
    direct_read,
    eager_attention_forward,
    forward_fill,
    keys_and_queries,
    leaky_average,
    leaky_step,
    scale_to_length,
)


PARAMETER_SCALE = 10.0


class MemoryMosaicAssociativeMemory(nn.Module):
    """Heads of keys and values, and the retrieval by them, in a memory of any kind."""

    # Name of the leaky sum of keys in the memory's states.
    sum_name: str
    kind: str
    is_causal: bool
    key_leak: nn.Parameter

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = cast(int, config.head_dim)  # never None in a configuration that was made

    def leak(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the decay of each head's leaky sum `(H,)`, in nats per token, in `dtype` at least."""
        key_leak = self.key_leak
        if key_leak.dtype != dtype:
            key_leak = key_leak.to(torch.promote_types(key_leak.dtype, dtype))
        return (PARAMETER_SCALE * key_leak).abs()

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Reshape `(B, T, H * D)` to `(B, H, T, D)`, for the heads that this process holds."""
        if projected.shape[-1] % self.head_dim:
            raise ValueError(
                f"{projected.shape[-1]} features are not whole heads of {self.head_dim}: spread the model over "
                f"a number of processes that divides num_attention_heads={self.config.num_attention_heads}."
            )
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def states(self, past_key_values: Cache) -> MemoryMosaicStates:
        """Return this layer's part of the memory."""
        return memory_layer(past_key_values, self.layer_idx)

    def weight_dropout(self) -> float:
        """Return the share of weights that is dropped now."""
        return cast(float, self.config.attention_dropout) if self.training else 0.0

    def prefers_blocks(self, query: torch.Tensor) -> bool:
        """Return whether queries `(B, H, T, D)` without a mask are read by [`block_read`], in place of sdpa."""
        is_faster = self.weight_dropout() > 0 or (self.is_causal and query.shape[2] <= LONGEST_TEXT)
        return is_faster and has_plain_sdpa(self.config) and can_read_in_blocks(query)

    def retrieve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        reads_directly: bool = False,
        slot_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Smooth over pairs by the configured attention function, or directly (see [`direct_read`]).

        Args:
            slot_bias (`torch.Tensor` of shape `(B, H or 1, N)`, *optional*): added to the scores of each slot.

        Returns:
            retrieved values `(B, T, H, D)`, and weights `(B, H, T, N)` if the function returns them.
        """
        if reads_directly and not self.weight_dropout():
            return direct_read(query, key, value).transpose(1, 2), None
        dropout, rule = self.weight_dropout(), attention_mask
        if rule is None and self.prefers_blocks(query):
            rule = SlotRule(key.shape[2] - (query.shape[2] - 1 if self.is_causal else 0))
        if isinstance(rule, SlotRule) and can_read_in_blocks(query):
            return block_read(query, key, value, rule, dropout, slot_bias), None
        if isinstance(rule, SlotRule):  # made for embeddings on another device, or before the layer was compiled
            attention_mask = rule.mask(query.shape[2], key.shape[2]).to(query.device)
        is_one = query.shape[2] == 1 and is_torchdynamo_compiling()
        if is_one and not dropout and can_read_directly(query, self.config):
            return direct_read(query, key, value, attention_mask).transpose(1, 2), None
        implementation = self.config._attn_implementation
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # The caller's `is_causal` would win over the module's, and persistent memories are not causal.
        kwargs |= {"is_causal": self.is_causal, "dropout": dropout, "scaling": 1.0}
        if slot_bias is not None:
            if implementation == "flex_attention":  # its masks are no numbers that a bias could be added to
                attention_function = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return biased_read(attention_function, self, query, key, value, attention_mask, slot_bias, **kwargs)
        return attention_function(self, query, key, value, attention_mask, **kwargs)


class MemoryMosaicPairStore(MemoryMosaicAssociativeMemory):
    """A memory that stores a pair for each token, and retrieves from the pairs stored before."""

    sum_name = "contextual_sum"
    is_causal = True

    def store(
        self, pair_keys: torch.Tensor, pair_values: torch.Tensor, past_key_values: Cache | None, is_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add pairs to the memory and return keys and values of all its slots, `(B, H, S, D)`.

        The first token of all (`is_first`) completes no pair: slot 0 is zero.
        """
        if is_first:
            pair_keys, pair_values = F.pad(pair_keys, (0, 0, 1, 0)), F.pad(pair_values, (0, 0, 1, 0))
        if past_key_values is None:
            return pair_keys, pair_values
        return past_key_values.update(pair_keys, pair_values, self.layer_idx)

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slot_mask: Any,
        past_key_values: Cache | None,
        is_first: bool,
        slot_bias: torch.Tensor | None = None,
        is_token: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Store the pairs that the new tokens complete, then retrieve for each token.

        Args:
            queries (`torch.Tensor` of shape `(B, H, T, D)`).
            keys (`torch.Tensor` of shape `(B, H, S + 1, D)`): of S pairs, and the newest, whose pair is incomplete.
            values (`torch.Tensor` of shape `(B, H, S, D)`): S is T, or T - 1 if no token came before (`is_first`).
            slot_mask, past_key_values, slot_bias, is_token: as for `forward`.

        Returns:
            retrieved values `(B, T, H, D)`, and weights if the attention function returns them.
        """
        states: Any = None if past_key_values is None else self.states(past_key_values)
        if hasattr(states, "read"):
            # Bounded: the layer knows by itself which pairs it holds.
            pairs = (F.pad(part, (0, 0, is_first, 0)) for part in (keys[:, :, :-1], values))
            is_full = slot_bias[:, 0] > -torch.inf
            return states.read(
                queries, *pairs, torch.ones_like(is_full) if is_token is None else is_token, is_full
            ), None
        if slot_bias is not None:
            kwargs["slot_bias"] = self.states(past_key_values).add_slot_bias(slot_bias)
        slots = keys, values
        if past_key_values is not None or slot_mask is not None:
            slots = self.store(keys[:, :, :-1], values, past_key_values, is_first=is_first)
        if states is not None and states.search is not None and states.search.reads(states, queries.shape[2]):
            return states.search.read(states, self.layer_idx, queries, *slots), None
        if slot_mask is not None:
            return self.retrieve(queries, *slots, slot_mask, **kwargs)
        if is_first and self.prefers_blocks(queries):
            return block_read(queries, keys, values, SlotRule(0), self.weight_dropout()), None
        if is_first:
            # Shift identity: tokens 1.. over the pairs of tokens 0.. is plain causal attention; token 0 retrieves 0.
            retrieved, weights = self.retrieve(queries[:, :, 1:], keys[:, :, :-1], values, None, **kwargs)
            return F.pad(retrieved, (0, 0, 0, 0, 1, 0)), weights
        # By `narrow`: for one token, an index costs as much as an operation.
        slot_keys, slot_values = (tensor.narrow(2, 1, tensor.shape[2] - 1) for tensor in slots)
        return self.retrieve(queries, slot_keys, slot_values, None, **kwargs)


class MemoryMosaicTokenMemory(MemoryMosaicAssociativeMemory):
    """The key extractor and the combining layer of contextual and persistent memories."""

    key_power = 1  # of the length of a key, in queries
    config: MemoryMosaicConfig

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        num_heads, inner_size = config.num_attention_heads, config.num_attention_heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.use_bias)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=config.use_bias)
        self.key_leak = nn.Parameter(torch.empty(num_heads))
        self.key_scale = nn.Parameter(torch.empty(num_heads))
        self.value_scale = nn.Parameter(torch.empty(num_heads))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def key_length(self, power: int = 1) -> torch.Tensor:
        """Return the length of a key `(H,)`; its square is the inverse squared bandwidth of the kernel."""
        log_length = (PARAMETER_SCALE * at_least_float32(self.key_scale)).clamp(max=MAX_LOG_KEY_SCALE)
        return (log_length if power == 1 else power * log_length).exp()

    def value_length(self) -> torch.Tensor:
        """Return the length of a value `(H,)`."""
        return (PARAMETER_SCALE * at_least_float32(self.value_scale)).exp()

    def combine(self, retrieved: torch.Tensor) -> torch.Tensor:
        """Return the output `(B, T, C)` of what the heads retrieved, `(B, T, H * D)`."""
        output = self.o_proj(retrieved)
        return self.dropout(output) if self.dropout.training else output  # the module alone costs an operation

    def versions(self) -> list[tuple[int, int]] | None:
        """Return what changes when the scalars of the heads are written, moved or replaced; `None` if unknown."""
        # All that is the memory's own: asking for each by its name takes four times as long.
        try:
            return [
                (tensor.data_ptr(), tensor._version)
                for tensor in (*self._parameters.values(), *self._buffers.values())
            ]
        except RuntimeError:  # tensors without numbers or, made in inference mode, without a count of what is written
            return None

    def scalars(self, states: MemoryMosaicStates | None = None) -> HeadScalars:
        """Return what the scalars of each head stand for. A memory keeps them from token to token."""
        if states is None or torch.is_grad_enabled() or is_torchdynamo_compiling():
            return self.new_scalars(None)
        versions, known = self.versions(), states.scalars.get(self.kind)
        if known is None or known.versions is None or known.versions != versions:
            known = states.scalars[self.kind] = self.new_scalars(versions)
        return known

    def new_scalars(self, versions: list[tuple[int, int]] | None) -> HeadScalars:
        """Return the scalars of the parameters as they are."""
        leak, mix = self.leak(), getattr(self, "value_mix", None)
        of_heads = [torch.exp(-leak), self.key_length(self.key_power), self.value_length()]
        if mix is not None:
            # A copy, if it is kept: a parameter may be written or freed.
            of_heads.append(at_least_float32(mix) if torch.is_grad_enabled() else at_least_float32(mix).clone())
        return HeadScalars(versions, leak, *(scalar.view(-1, 1, 1) for scalar in of_heads))

    def leaky_sums(
        self,
        projected: torch.Tensor,
        previous: torch.Tensor | None,
        is_token: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        scalars: HeadScalars,
    ) -> torch.Tensor:
        """Return the leaky sums of projected vectors `(B, H, T, D)`, arguments as for [`leaky_average`]."""
        if previous is not None and projected.shape[2] == 1 and is_token is None and document_ids is None:
            return leaky_step(projected, scalars.decay, previous)
        return leaky_average(projected, scalars.leak, previous, is_token, document_ids)[0]

    def sum_keys(
        self,
        hidden_states: torch.Tensor,
        is_token: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        states: MemoryMosaicStates | None,
        scalars: HeadScalars,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the leaky sums of projected keys `(B, H, T, D)`, and the sum before them `(B, H, 1, D)` or `None`."""
        projected = self.split_heads(self.k_proj(hidden_states))
        if is_token is not None:
            projected = projected * is_token[:, None, :, None]
        previous = None if states is None else states.get_state(self.sum_name)
        sums = self.leaky_sums(projected, previous, is_token, document_ids, scalars)
        return (sums, None) if states is None else states.continue_sum(self.sum_name, sums, previous, scalars.leak)


class MemoryMosaicContextualMemory(MemoryMosaicTokenMemory, MemoryMosaicPairStore):
    """Stores each token's key with the value that follows it, and retrieves from the pairs stored before."""

    kind = "contextual"

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.v_proj = nn.Linear(config.hidden_size, self.k_proj.out_features, bias=config.use_bias)
        self.value_mix = nn.Parameter(torch.empty(config.num_attention_heads))

    def keys_and_queries(
        self,
        hidden_states: torch.Tensor,
        query_scale: torch.Tensor | None,
        is_token: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        states: MemoryMosaicStates | None,
        scalars: HeadScalars,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return keys `(B, H, S, D)` and queries `(B, H, T, D)`, and whether no token came before.

        Keys are those of the new tokens and, if there is one, of the token before them, whose pair completes now.
        """
        sums, previous = self.sum_keys(hidden_states, is_token, document_ids, states, scalars)
        if previous is not None:
            sums = torch.cat([previous, sums], dim=2)
        return *keys_and_queries(sums, scalars.key_length, hidden_states, query_scale), previous is None

    def pair_values(
        self,
        hidden_states: torch.Tensor,
        is_token: torch.Tensor | None,
        states: MemoryMosaicStates | None,
        scalars: HeadScalars,
    ) -> torch.Tensor:
        """Return values of the pairs that the new tokens complete, `(B, H, T, D)`; T - 1 if no token came before."""
        projected = self.split_heads(self.v_proj(hidden_states))
        pending = None if states is None else states.value_before("pending_value", projected)
        if is_token is not None:
            projected = forward_fill(projected, is_token, pending)
        if states is not None:
            states.set_state("pending_value", projected)
        # float32 before the blend: in half precision it would round twice.
        projected = at_least_float32(projected)
        if pending is None:
            earlier, projected = projected[:, :, :-1], projected[:, :, 1:]
        else:
            pending = at_least_float32(pending)
            earlier = pending if projected.shape[2] == 1 else torch.cat([pending, projected[:, :, :-1]], dim=2)
        return scale_to_length(torch.lerp(projected, earlier, scalars.value_mix), scalars.value_length)

    def forward(
        self,
        hidden_states: torch.Tensor,
        slot_mask: Any = None,
        is_token: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        slot_bias: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, C)`).
            slot_mask (*optional*): for the attention function, queries by slots. `None`: nothing is padded, and either
                the memory was empty or T is 1, so that the strict rule needs no mask.
            is_token (`torch.Tensor` of shape `(B, T)`, *optional*): False at padding.
            document_ids (`torch.Tensor` of shape `(B, T)`, *optional*): number of each token's document, if rows hold
                several.
            query_scale (`torch.Tensor` of shape `(B or 1, T)`, *optional*): factor of each token's inverse
                temperature, by the number of pairs that it sees. `None`: 1 for all.
            slot_bias (`torch.Tensor` of shape `(B, 1, T)`, *optional*): of the new slots, if the memory has biases:
                -inf where a token completes no pair.
            past_key_values ([`~transformers.Cache`], *optional*): the memory; grows by T slots.

        Returns:
            output `(B, T, C)`, and under eager attention the weight `(B, H, T, S)` that each of T tokens gives to
            the pair of each of S tokens so far.
        """
        states = None if past_key_values is None else self.states(past_key_values)
        scalars = self.scalars(states)
        past = is_token, document_ids, states, scalars
        keys, queries, is_first = self.keys_and_queries(hidden_states, query_scale, *past)
        values = as_dtype(self.pair_values(hidden_states, is_token, states, scalars), keys.dtype)
        kwargs |= {"slot_bias": slot_bias, "is_token": is_token}
        retrieved, weights = self.attend(queries, keys, values, slot_mask, past_key_values, is_first, **kwargs)
        return self.combine(retrieved.flatten(2)), weights


class MemoryMosaicPersistentMemory(MemoryMosaicTokenMemory):
    """Retrieves from learnt pairs: what the model knows before it reads. Takes the place of a feed-forward layer."""

    kind = "persistent"
    key_power = 2  # slots carry no length of their own, so queries take that of both
    sum_name = "persistent_sum"
    is_causal = False

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = (config.num_attention_heads, config.num_persistent_slots, self.head_dim)
        self.slot_keys = nn.Parameter(torch.empty(shape))
        self.slot_values = nn.Parameter(torch.empty(shape))

    def forward(
        self,
        hidden_states: torch.Tensor,
        is_token: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return the output `(B, T, C)`; arguments as for [`MemoryMosaicContextualMemory`]."""
        batch_size, num_tokens, _ = hidden_states.shape
        states = None if past_key_values is None else self.states(past_key_values)
        scalars = self.scalars(states)
        sums, _ = self.sum_keys(hidden_states, is_token, document_ids, states, scalars)
        queries = as_dtype(scale_to_length(sums, scalars.key_length), self.slot_keys.dtype)
        # Every token reads the same slots, so all rows become one batch and the slots are never repeated.
        if batch_size > 1:
            queries = queries.transpose(0, 1).flatten(1, 2)[None]  # (1, H, B * T, D)
        retrieved, _ = self.retrieve(queries, self.slot_keys[None], self.slot_values[None], None, **kwargs)
        retrieved = retrieved * as_dtype(scalars.value_length[:, 0], retrieved.dtype)  # (1, B * T, H, D)
        return self.combine(retrieved.reshape(batch_size, num_tokens, -1))


__all__ = ["MemoryMosaicContextualMemory", "MemoryMosaicPersistentMemory"]

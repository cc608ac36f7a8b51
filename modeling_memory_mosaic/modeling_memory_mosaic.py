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
"""Memory Mosaics (arXiv 2405.06394): language models whose every layer is a set of associative memories.

Notable features:
- no positions and no query projection: a token's key is its query to the pairs of keys and values stored before it
- keys are leaky averages of the past, values look one token ahead
- persistent memories, of learnt pairs, in place of feed-forward layers
- one bandwidth, leak and value scale per head, without weight decay
- exact continuation from a memory, by chunks of any length; padding and packed documents change nothing
- attention functions of transformers (sdpa, flex or eager); all else is linear in T

Shapes use B batch, T tokens, H heads (memories per layer), D head width, C = hidden size, N persistent slots per head,
S slots of a memory (one per token). Per-head scalars are stored divided by 10, as in the authors' `Library`: Adam then
moves them ten times faster.

Docstrings are written by hand (TRF057): the library's generator of them knows the models within the library only.
"""

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_memory_mosaic import AdaptableLayer, AdaptableModel
from .blocks_memory_mosaic import LONGEST_TEXT, SlotRule, block_read, can_read_in_blocks
from .cache_memory_mosaic import MEMORY_NAME, MemoryMosaicStates, check_memory, memory_kwargs, memory_layer, one_memory
from .configuration_memory_mosaic import MemoryMosaicConfig
from .generation_memory_mosaic import MemoryMosaicGenerationMixin
from .identity_memory_mosaic import note_writer
from .masking_memory_mosaic import check_inputs, create_memory_masks, find_documents, pop_packing, raise_where
from .ops_memory_mosaic import (
    MAX_LOG_KEY_SCALE,
    HeadScalars,
    as_dtype,
    at_least_float32,
    direct_read,
    eager_attention_forward,
    embed_ids,
    forward_fill,
    keys_and_queries,
    leaky_average,
    loss_without_logits,
    positions_to_keep,
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

    def reads_in_blocks(self, query: torch.Tensor) -> bool:
        """Return whether queries `(B, H, T, D)` without a mask are read by [`block_read`], in place of sdpa."""
        is_faster = self.weight_dropout() > 0 or (self.is_causal and query.shape[2] <= LONGEST_TEXT)
        return is_faster and self.config._attn_implementation == "sdpa" and can_read_in_blocks(query)

    def retrieve(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        reads_directly: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Smooth over pairs by the configured attention function, or directly (see [`reads_directly`]).

        Returns:
            retrieved values `(B, T, H, D)`, and weights `(B, H, T, N)` if the function returns them.
        """
        if reads_directly:
            return direct_read(query, key, value).transpose(1, 2), None
        dropout, rule = self.weight_dropout(), attention_mask
        if rule is None and self.reads_in_blocks(query):
            rule = SlotRule(key.shape[2] - (query.shape[2] - 1 if self.is_causal else 0))
        if isinstance(rule, SlotRule) and can_read_in_blocks(query):
            return block_read(query, key, value, rule, dropout), None
        if isinstance(rule, SlotRule):  # made for embeddings on another device, or before the layer was compiled
            attention_mask = rule.mask(query.shape[2], key.shape[2]).to(query.device)
        implementation = self.config._attn_implementation
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # The caller's `is_causal` would win over the module's, and persistent memories are not causal.
        kwargs["is_causal"] = self.is_causal
        return attention_function(self, query, key, value, attention_mask, dropout=dropout, scaling=1.0, **kwargs)


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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Store the pairs that the new tokens complete, then retrieve for each token.

        Args:
            queries (`torch.Tensor` of shape `(B, H, T, D)`).
            keys (`torch.Tensor` of shape `(B, H, S + 1, D)`): of S pairs, and the newest, whose pair is incomplete.
            values (`torch.Tensor` of shape `(B, H, S, D)`): S is T, or T - 1 if no token came before (`is_first`).
            slot_mask, past_key_values: as for `forward`.

        Returns:
            retrieved values `(B, T, H, D)`, and weights if the attention function returns them.
        """
        slots = keys, values
        if past_key_values is not None or slot_mask is not None:
            slots = self.store(keys[:, :, :-1], values, past_key_values, is_first=is_first)
        if slot_mask is not None:
            return self.retrieve(queries, *slots, slot_mask, **kwargs)
        if is_first and self.reads_in_blocks(queries):
            return block_read(queries, keys, values, SlotRule(0), self.weight_dropout()), None
        if is_first:
            # Shift identity: tokens 1.. over the pairs of tokens 0.. is plain causal attention; token 0 retrieves 0.
            retrieved, weights = self.retrieve(queries[:, :, 1:], keys[:, :, :-1], values, None, **kwargs)
            return F.pad(retrieved, (0, 0, 0, 0, 1, 0)), weights
        # By `narrow`: for one token, an index costs as much as an operation.
        filled = (tensor.narrow(2, 1, tensor.shape[2] - 1) for tensor in slots)
        return self.retrieve(queries, *filled, None, **kwargs)


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

    def scalars(self, states: MemoryMosaicStates | None = None, num_tokens: int = 0) -> HeadScalars:
        """Return what the scalars of each head stand for.

        A memory keeps them from token to token: the same weights write all of it.
        """
        keeps = states is not None and not torch.is_grad_enabled() and not is_torchdynamo_compiling()
        known = states.scalars if keeps else {}
        if num_tokens != 1 or self.kind not in known:
            leak, mix = self.leak(), getattr(self, "value_mix", None)
            of_heads = torch.exp(-leak), self.key_length(self.key_power), self.value_length()
            mixes = [] if mix is None else [at_least_float32(mix)]
            known[self.kind] = HeadScalars(leak, *(scalar.view(-1, 1, 1) for scalar in (*of_heads, *mixes)))
        return known[self.kind]

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
        sums, _ = leaky_average(projected, scalars.leak, previous, is_token, document_ids, scalars.decay)
        if states is not None:
            states.set_state(self.sum_name, sums)
        return sums, previous


class MemoryMosaicContextualMemory(MemoryMosaicTokenMemory, MemoryMosaicPairStore):
    """Stores each token's key with the value that follows it, and retrieves from the pairs stored before."""

    kind = "contextual"

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.v_proj = nn.Linear(config.hidden_size, self.k_proj.out_features, bias=config.use_bias)
        self.value_mix = nn.Parameter(torch.empty(config.num_attention_heads))

    def keys_and_queries(
        self, hidden_states: torch.Tensor, query_scale: torch.Tensor | None, *past: Any
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return keys `(B, H, S, D)` and queries `(B, H, T, D)`, and whether no token came before.

        Keys are those of the new tokens and, if there is one, of the token before them, whose pair completes now. The
        arguments `past` are the others of `sum_keys`.
        """
        sums, previous = self.sum_keys(hidden_states, *past)
        if previous is not None:
            sums = torch.cat([previous, sums], dim=2)
        return *keys_and_queries(sums, past[-1].key_length, hidden_states, query_scale), previous is None

    def pair_values(
        self,
        hidden_states: torch.Tensor,
        is_token: torch.Tensor | None,
        states: MemoryMosaicStates | None,
        scalars: HeadScalars,
    ) -> torch.Tensor:
        """Return values of the pairs that the new tokens complete, `(B, H, T, D)`; T - 1 if no token came before."""
        projected = self.split_heads(self.v_proj(hidden_states))
        pending = None if states is None else states.get_state("pending_value")
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
            past_key_values ([`~transformers.Cache`], *optional*): the memory; grows by T slots.

        Returns:
            output `(B, T, C)`, and under eager attention the weight `(B, H, T, S)` that each of T tokens gives to
            the pair of each of S tokens so far.
        """
        states = None if past_key_values is None else self.states(past_key_values)
        scalars = self.scalars(states, hidden_states.shape[1])
        past = is_token, document_ids, states, scalars
        keys, queries, is_first = self.keys_and_queries(hidden_states, query_scale, *past)
        values = as_dtype(self.pair_values(hidden_states, is_token, states, scalars), keys.dtype)
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
        scalars = self.scalars(states, num_tokens)
        sums, _ = self.sum_keys(hidden_states, is_token, document_ids, states, scalars)
        queries = as_dtype(scale_to_length(sums, scalars.key_length), self.slot_keys.dtype)
        # Every token reads the same slots, so all rows become one batch and the slots are never repeated.
        if batch_size > 1:
            queries = queries.transpose(0, 1).flatten(1, 2)[None]  # (1, H, B * T, D)
        retrieved, _ = self.retrieve(queries, self.slot_keys[None], self.slot_values[None], None, **kwargs)
        retrieved = retrieved * as_dtype(scalars.value_length[:, 0], retrieved.dtype)  # (1, B * T, H, D)
        return self.combine(retrieved.reshape(batch_size, num_tokens, -1))


class MemoryMosaicDecoderLayer(AdaptableLayer, GradientCheckpointingLayer):
    """One block: a contextual memory, then a persistent one, each added to the residual stream."""

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__()
        self.contextual_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.contextual_memory = MemoryMosaicContextualMemory(config, layer_idx)
        self.persistent_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.persistent_memory = MemoryMosaicPersistentMemory(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        slot_mask: Any = None,
        is_token: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return the residual stream `(B, T, C)`; arguments as for [`MemoryMosaicContextualMemory`]."""
        # PEFT has put a wrapper around the memory, whose slots it adapts.
        if not isinstance(self.persistent_memory, MemoryMosaicPersistentMemory):
            self.check_added_adapters()
        shared = {"is_token": is_token, "document_ids": document_ids, "past_key_values": past_key_values, **kwargs}
        own = {"slot_mask": slot_mask, "query_scale": query_scale}
        retrieved, _ = self.contextual_memory(self.contextual_norm(hidden_states), **own, **shared)
        hidden_states = hidden_states + retrieved
        return hidden_states + self.persistent_memory(self.persistent_norm(hidden_states), **shared)


# trf-ignore: TRF057
class MemoryMosaicPreTrainedModel(AdaptableModel, PreTrainedModel):
    """Base class of all Memory Mosaics: initialisation, saving, and what the library may do with them."""

    config: MemoryMosaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryMosaicDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # The leaky sums of one stretch of a text continue those of the stretch before it.
    _supports_context_parallel = False
    _can_record_outputs = {
        "hidden_states": MemoryMosaicDecoderLayer,
        "attentions": MemoryMosaicContextualMemory,
    }
    # Per-head scalars: decaying them would pull every kernel towards one bandwidth.
    no_weight_decay_names = ("key_leak", "key_scale", "value_scale", "value_mix")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise by the distributions of the authors' `Library` (memory_mosaics.py).

        | parameter | start |
        | --- | --- |
        | `k_proj`, `v_proj`, `lm_head`, `score`, tied `embed_tokens` | normal, std C^-0.5 |
        | `o_proj` | normal, std (H D layers)^-0.5 |
        | `embed_tokens`, not tied | normal, std 1 |
        | `slot_keys`, `slot_values` | normal, std D^-0.5 |
        | leak, times 10 | 0.5 to 5 evenly over heads |
        | `key_scale`, `value_scale`, times 10 | 1, -0.5 |
        | `value_mix` | uniform in [0, 1) |
        | biases | 0 |
        """
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Tied, the embedding is initialised as the head that it also is.
            init.normal_(module.weight, std=config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0)
        elif isinstance(module, MemoryMosaicTokenMemory):
            inner_size = module.o_proj.in_features
            init.normal_(module.o_proj.weight, std=(inner_size * config.num_hidden_layers) ** -0.5)
            leaks = torch.linspace(0.5, 5.0, config.num_attention_heads, device="cpu") / PARAMETER_SCALE
            init.copy_(module.key_leak, leaks)
            init.constant_(module.key_scale, 1.0 / PARAMETER_SCALE)
            init.constant_(module.value_scale, -0.5 / PARAMETER_SCALE)
            if isinstance(module, MemoryMosaicContextualMemory):
                init.uniform_(module.value_mix, 0.0, 1.0)
            elif isinstance(module, MemoryMosaicPersistentMemory):
                init.normal_(module.slot_keys, std=module.head_dim**-0.5)
                init.normal_(module.slot_values, std=module.head_dim**-0.5)
        else:
            super()._init_weights(module)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the library does, naming all classes of this file in `config.json`: each Auto class can load it."""
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {
            "AutoModel": f"{module}.MemoryMosaicModel",
            "AutoModelForCausalLM": f"{module}.MemoryMosaicForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.MemoryMosaicForSequenceClassification",
            # `transformers serve` 5.23 asks for this one first, and then only for classes within transformers.
            "AutoModelForDecision": f"{module}.MemoryMosaicForCausalLM",
        }
        return super().save_pretrained(*args, **kwargs)


# trf-ignore: TRF057
class MemoryMosaicModel(MemoryMosaicPreTrainedModel):
    """The blocks without the head. Returns hidden states and the memory."""

    def __init__(self, config: MemoryMosaicConfig):
        config.validate_architecture()  # fields may have been assigned since the configuration was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MemoryMosaicDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.gradient_checkpointing = False
        self.post_init()

    # trf-ignore: TRF057
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states `(B, T, C)` and the memory; arguments as for [`MemoryMosaicForCausalLM`].

        `attention_mask` may also be what [`create_memory_masks`] returns.
        """
        past_key_values = one_memory(past_key_values, cache)
        if input_ids is not None and inputs_embeds is None:
            embeds = embed_ids(self.embed_tokens, input_ids, self.config.vocab_size)
        elif input_ids is None and inputs_embeds is not None:
            embeds = inputs_embeds
        else:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        check_inputs(self.config, embeds, kwargs)
        if past_key_values is not None:
            self.check_memory(embeds, past_key_values)
        packing = pop_packing(kwargs, position_ids)

        # `generate` makes the masks itself where it compiles the model.
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_memory_masks(self.config, embeds, masks, past_key_values, **packing)
        # A memory holds one text: packed documents leave none.
        if use_cache and past_key_values is None and masks["document_ids"] is None:
            past_key_values = DynamicCache(config=self.config)
        elif use_cache and past_key_values is None and is_torchdynamo_compiling():
            raise ValueError(
                "Compiled, the model cannot know whether a row holds several documents, which would leave no memory: "
                "pass `use_cache=False`, a memory of your own, or no position_ids."
            )
        if past_key_values is not None:
            note_writer(memory_layer(past_key_values), self, embeds.shape[1])
            memory_layer(past_key_values).note_text(input_ids, masks["is_token"])
        hidden_states = embeds
        if masks["is_token"] is not None:
            # Padding behind a text repeats its last token in all layers: there `generate` asks what comes next.
            hidden_states = forward_fill(embeds[:, None], masks["is_token"], None)[:, 0]
        # Decoding with an early exit lowers num_hidden_layers.
        for layer in itertools.islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(hidden_states, **masks, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **memory_kwargs(past_key_values))

    def check_memory(self, embeds: torch.Tensor, past_key_values: Cache) -> None:
        """Raise `ValueError` if the model cannot read these embeddings `(B, T, C)` behind a memory."""
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                "A memory cannot be read or written under gradient checkpointing, which reads everything twice: call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`, or pass `use_cache=False`."
            )
        check_memory(past_key_values, self.config, num_rows=embeds.shape[0])
        layer = memory_layer(past_key_values)
        # Under autocast norms return float32, whatever the embeddings are.
        layer.check_precision(torch.float32 if torch.is_autocast_enabled(embeds.device.type) else embeds.dtype)
        layer.check_room(embeds.shape[1])


# trf-ignore: TRF057
class MemoryMosaicForCausalLM(MemoryMosaicPreTrainedModel, MemoryMosaicGenerationMixin):
    """A Memory Mosaic that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MemoryMosaicConfig):
        super().__init__(config)
        self.model = MemoryMosaicModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): a document begins where they do not rise;
                they mean nothing else. `seq_idx` `(B, T)` and `cu_seq_lens_q` say the same by their own conventions.
            past_key_values ([`~transformers.Cache`], *optional*): memory of what was read before; changed in place.
                `cache` is another name for it.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): not shifted; -100 is ignored, and belongs at the
                first token of each packed document.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, C)`, *optional*): in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to return the memory; `config.use_cache` when absent.
            logits_to_keep (`int` or `torch.Tensor`): compute logits of the last so many tokens (0: all), or of those
                indexed.
            skip_logits (`bool`): return the loss alone, without ever holding the logits of all tokens, which are the
                peak of memory where the vocabulary is large.

        Raises:
            ValueError: if ids, mask or packing have another form than stated, or if the memory is of another model or
                holds other rows.

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        >>> model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        >>> ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
        >>> tokenizer.decode(ids[0])
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **memory_kwargs(one_memory(past_key_values, cache)),
            **kwargs,
        )
        kept = outputs.last_hidden_state[:, positions_to_keep(logits_to_keep), :]
        # Scaling the hidden states costs C operations a token, scaling the logits vocab_size.
        kept = kept / cast(float, self.config.logits_scaling)

        loss, logits = None, None
        if labels is not None and skip_logits:
            loss = loss_without_logits(kept, self.lm_head, labels, **kwargs)
        else:
            logits = self.lm_head(kept)
        if labels is not None and logits is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **memory_kwargs(getattr(outputs, MEMORY_NAME)),
        )


# trf-ignore: TRF057
class MemoryMosaicForSequenceClassification(MemoryMosaicPreTrainedModel):
    """A Memory Mosaic that judges a text by its hidden state at the last token."""

    def __init__(self, config: MemoryMosaicConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MemoryMosaicModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens. Without
                it, ids equal to `pad_token_id` are taken for padding, unless that is an `eos_token_id` too.
            labels (*optional*): `(B,)` class numbers, `(B, num_labels)` floats for several labels at once, or `(B,)`
                floats with one label (regression); see `config.problem_type`.

        Returns:
            `SequenceClassifierOutputWithPast`: logits `(B, num_labels)`.

        Raises:
            ValueError: if there are several rows and nothing tells tokens from padding, if a row has no token, or if
                it holds several documents.
        """
        past_key_values = one_memory(past_key_values, cache)
        padding_id, has_ids_alone = self.padding_id(), attention_mask is None and past_key_values is None
        if has_ids_alone and input_ids is not None and padding_id is not None:
            attention_mask = input_ids != padding_id
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **memory_kwargs(past_key_values),
            **kwargs,
        )
        hidden_states, packing = outputs.last_hidden_state, {"position_ids": position_ids, **kwargs}
        # Compiled, the answer is not known.
        if not is_torchdynamo_compiling() and (
            find_documents(hidden_states, attention_mask, past_key_values, **packing) is not None
        ):
            raise ValueError("Several documents are packed in one row, which has one verdict: give each its own row.")
        logits = self.score(self.last_token(hidden_states, attention_mask))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            # The library's loss of classes counts a part of a batch by its share of the labels, its other two do not.
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * (labels != -100).sum() / num_items
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **memory_kwargs(getattr(outputs, MEMORY_NAME)),
        )

    def padding_id(self) -> int | None:
        """Return `pad_token_id`; `None` if that id also ends texts, as it may then stand within one."""
        ends = self.config.eos_token_id if isinstance(self.config.eos_token_id, list) else [self.config.eos_token_id]
        return None if self.config.pad_token_id in ends else self.config.pad_token_id

    def last_token(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Select from hidden states `(B, T, C)` each row's at its last token, `(B, C)`."""
        batch_size, num_tokens, _ = hidden_states.shape
        if attention_mask is None:
            if batch_size > 1:
                raise ValueError(
                    f"{batch_size} rows, but nothing tells tokens from padding: pass attention_mask. (With "
                    "input_ids, a pad_token_id that is not an eos_token_id is enough.)"
                )
            return hidden_states[:, -1]
        is_token = attention_mask[:, -num_tokens:].to(hidden_states.device, torch.bool)
        raise_where(~is_token.any(-1), "attention_mask leaves no token to judge a row by.")
        last = (torch.arange(num_tokens, device=hidden_states.device) * is_token).argmax(dim=-1)
        return hidden_states[torch.arange(batch_size, device=hidden_states.device), last]


__all__ = [
    "MemoryMosaicForCausalLM",
    "MemoryMosaicForSequenceClassification",
    "MemoryMosaicModel",
    "MemoryMosaicPreTrainedModel",
]

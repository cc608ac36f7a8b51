# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics for vLLM: pairs in its paged cache, and all else by the states of `states.py`.

Slot t of a request holds the pair that completes when token t arrives: the key of token t-1, and the value that
blends those of t-1 and t. So the strict rule, by which a token retrieves earlier pairs only, is plain causal attention
over slots. Slot 0 completes no pair. One more channel of the heads carries a bias for each slot: queries hold `BIAS`
there, keys 0, and the key of slot 0 `-BIAS`. So the first token, which sees nothing else, retrieves its zero, and no
later token gives slot 0 any weight.

Parameters have the names of the model of transformers. Shapes use N tokens of all requests together, H heads, D head
width, W stored width of heads, C hidden size, S learnt slots per head.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.sequence import IntermediateTensors

from modeling_memory_mosaic import MemoryMosaicConfig
from modeling_memory_mosaic.masking_memory_mosaic import growth_of_kernels
from modeling_memory_mosaic.memories_memory_mosaic import PARAMETER_SCALE
from modeling_memory_mosaic.ops_memory_mosaic import (
    MAX_LOG_KEY_SCALE,
    as_dtype,
    at_least_float32,
    scale_to_length,
)

from .settings import stored_width
from .states import STATES, RequestStates, StepPlan, page_layout


# Its square is far beyond any product of two keys and a bandwidth, and float16 holds the number itself.
BIAS = 2.0**15


def head_dim_of(config: MemoryMosaicConfig) -> int:
    """Return the width of a head, which a configuration that was made always has."""
    return cast(int, config.head_dim)


class TokenMemory(nn.Module):
    """The key extractor, the scalars of the heads and the combining layer of both kinds of memories."""

    sum_name: str
    key_power = 1  # of the length of a key, in queries
    key_leak: nn.Parameter
    key_scale: nn.Parameter
    value_scale: nn.Parameter

    def __init__(self, config: MemoryMosaicConfig, states: RequestStates, prefix: str):
        super().__init__()
        self.num_heads, self.head_dim, self.states = config.num_attention_heads, head_dim_of(config), states
        inner_size = self.num_heads * self.head_dim
        options: dict[str, Any] = {"bias": config.use_bias, "return_bias": False}
        self.k_proj = ReplicatedLinear(config.hidden_size, inner_size, prefix=f"{prefix}.k_proj", **options)
        self.o_proj = ReplicatedLinear(inner_size, config.hidden_size, prefix=f"{prefix}.o_proj", **options)
        for name in ("key_leak", "key_scale", "value_scale"):
            setattr(self, name, nn.Parameter(torch.empty(self.num_heads), requires_grad=False))

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(-1, self.num_heads, self.head_dim)

    # Computed once, as weights do not change while they are served.
    @cached_property
    def leak(self) -> torch.Tensor:
        """The decay of each head's leaky sum `(H,)`, in nats per token."""
        return (PARAMETER_SCALE * at_least_float32(self.key_leak)).abs()

    @cached_property
    def decay(self) -> torch.Tensor:
        return torch.exp(-self.leak)[:, None]

    @cached_property
    def key_length(self) -> torch.Tensor:
        log_length = (PARAMETER_SCALE * at_least_float32(self.key_scale)).clamp(max=MAX_LOG_KEY_SCALE)
        return (self.key_power * log_length).exp()[:, None]

    @cached_property
    def value_length(self) -> torch.Tensor:
        return (PARAMETER_SCALE * at_least_float32(self.value_scale)).exp()[:, None]

    def sum_keys(self, hidden_states: torch.Tensor, plan: StepPlan | None) -> torch.Tensor:
        """Return keys `(N, H, D)` of their length, in float32."""
        projected = self.split_heads(self.k_proj(hidden_states))
        if plan is None:
            return scale_to_length(projected, self.key_length)
        sums = self.states.leaky_sums(self.sum_name, projected, self.leak, self.decay, plan)
        return scale_to_length(sums, self.key_length)


class ContextualMemory(TokenMemory):
    """Stores each token's key with the value that follows it, and retrieves from the pairs stored before."""

    sum_name = "contextual_sum"

    def __init__(self, config: MemoryMosaicConfig, states: RequestStates, cache_config: CacheConfig, prefix: str):
        super().__init__(config, states, prefix)
        self.v_proj = ReplicatedLinear(
            config.hidden_size,
            self.num_heads * self.head_dim,
            bias=config.use_bias,
            return_bias=False,
            prefix=f"{prefix}.v_proj",
        )
        self.value_mix = nn.Parameter(torch.empty(self.num_heads), requires_grad=False)
        self.width = stored_width(self.head_dim)
        self.attn = Attention(
            self.num_heads,
            self.width,
            scale=1.0,
            num_kv_heads=self.num_heads,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
        )

    @cached_property
    def mix(self) -> torch.Tensor:
        """The share of the earlier of two values `(H, 1)`."""
        return at_least_float32(self.value_mix)[:, None]

    def widened(self, vectors: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """Return vectors `(N, H, D)` in the width of stored heads, `(N, H, W)`, with a value in the room behind."""
        return F.pad(vectors, (0, self.width - self.head_dim), value=value)

    def to_slots(self, vectors: torch.Tensor, bias: float, plan: StepPlan) -> torch.Tensor:
        """Return keys or values of pairs as slots hold them `(N, H, W)`: in slots 0 there is a bias, and no pair."""
        slots = self.widened(vectors)
        if len(plan.openings):
            slots[plan.openings] = 0.0
            slots[plan.openings, :, self.head_dim] = bias
        return slots

    def forward(
        self, hidden_states: torch.Tensor, query_scale: torch.Tensor | None, plan: StepPlan | None
    ) -> torch.Tensor:
        """Return the output `(N, C)` of normed inputs `(N, C)`.

        Args:
            query_scale (`torch.Tensor` of shape `(N, 1, 1)`, *optional*): of each token's inverse temperature.
        """
        dtype, states = hidden_states.dtype, self.states
        scaled = self.sum_keys(hidden_states, plan)
        keys, values = as_dtype(scaled, dtype), self.split_heads(self.v_proj(hidden_states))
        queries = keys if query_scale is None else as_dtype(scaled * query_scale, dtype)
        if plan is None:
            return self.o_proj(values.flatten(1))
        earlier = states.shifted("newest_value", values, plan)
        blended = torch.lerp(at_least_float32(values), at_least_float32(earlier), self.mix)
        pair_values = as_dtype(scale_to_length(blended, self.value_length), dtype)
        pair_keys = states.shifted("newest_key", keys, plan)
        # Queries hold `BIAS` in all of the room, where keys have zeros, but for one channel of slot 0.
        retrieved = self.attn(
            self.widened(queries, BIAS).flatten(1),
            self.to_slots(pair_keys, -BIAS, plan).flatten(1),
            self.to_slots(pair_values, 0.0, plan).flatten(1),
        )
        return self.o_proj(retrieved.view(-1, self.num_heads, self.width)[..., : self.head_dim].flatten(1))


class PersistentMemory(TokenMemory):
    """Retrieves from learnt pairs."""

    sum_name = "persistent_sum"
    key_power = 2  # slots carry no length of their own, so queries take that of both

    def __init__(self, config: MemoryMosaicConfig, states: RequestStates, prefix: str):
        super().__init__(config, states, prefix)
        shape = (self.num_heads, cast(int, config.num_persistent_slots), self.head_dim)
        self.slot_keys = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.slot_values = nn.Parameter(torch.empty(shape), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, plan: StepPlan | None) -> torch.Tensor:
        """Return the output `(N, C)` of normed inputs `(N, C)`."""
        queries = as_dtype(self.sum_keys(hidden_states, plan), hidden_states.dtype).transpose(0, 1)[None]
        retrieved = F.scaled_dot_product_attention(queries, self.slot_keys[None], self.slot_values[None], scale=1.0)
        retrieved = retrieved[0].transpose(0, 1) * as_dtype(self.value_length, hidden_states.dtype)
        return self.o_proj(retrieved.flatten(1))


class DecoderLayer(nn.Module):
    """One block: a contextual memory, then a persistent one, each added to the residual stream."""

    def __init__(self, config: MemoryMosaicConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        norm: dict[str, Any] = {"eps": config.layer_norm_eps, "bias": config.use_bias}
        dtype, cache_config = vllm_config.model_config.dtype, vllm_config.cache_config
        self.states = RequestStates(config.num_attention_heads, head_dim_of(config), dtype, f"{prefix}.states")
        self.contextual_norm = nn.LayerNorm(config.hidden_size, **norm)
        self.contextual_memory = ContextualMemory(config, self.states, cache_config, f"{prefix}.contextual_memory")
        self.persistent_norm = nn.LayerNorm(config.hidden_size, **norm)
        self.persistent_memory = PersistentMemory(config, self.states, f"{prefix}.persistent_memory")

    def forward(self, hidden_states: torch.Tensor, query_scale: torch.Tensor | None) -> torch.Tensor:
        plan = self.states.plan()
        retrieved = self.contextual_memory(self.contextual_norm(hidden_states), query_scale, plan)
        hidden_states = hidden_states + retrieved
        return hidden_states + self.persistent_memory(self.persistent_norm(hidden_states), plan)


class Model(nn.Module):
    """All but the head."""

    def __init__(self, config: MemoryMosaicConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, vllm_config, f"{prefix}.layers.{index}") for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states `(N, C)`; positions `(N,)` count the tokens before each, its pairs."""
        scale = growth_of_kernels(self.config, positions[None], embeds[None])
        query_scale = None if scale is None else scale[0, :, None, None]
        hidden_states = embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, query_scale)
        return self.norm(hidden_states)


class MemoryMosaicForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """A Memory Mosaic that predicts the next token."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        return page_layout(vllm_config)[0]

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return page_layout(vllm_config)[1]

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return (get_temporal_copy_spec,) * len(STATES)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config = config
        self.model = Model(config, vllm_config, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(embeds, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states / self.config.logits_scaling)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)

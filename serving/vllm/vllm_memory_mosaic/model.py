# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics for vLLM: pairs by the slots of `slots.py`, and all else by the states of `states.py`.

Parameters have the names of the model of transformers. Shapes use N tokens of all requests together, H heads, D head
width, C hidden size, S learnt slots per head.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import CacheConfig, VllmConfig
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
    leaky_average,
    scale_to_length,
)

from .slots import PairSlots
from .states import RequestStates, State, StepPlan, page_of, states_of_pairs


def head_dim_of(config: Any) -> int:
    """Return the width of a head, which a configuration that was made always has."""
    return cast(int, config.head_dim)


def state_of_sum(name: str, config: Any) -> dict[str, State]:
    """Return the state of the leaky sums of all heads of a memory."""
    return {name: State((config.num_attention_heads, head_dim_of(config)), torch.float32)}


class TokenMemory(nn.Module):
    """The key extractor, the scalars of the heads and the combining layer of both kinds of memories."""

    sum_name: str
    key_power = 1  # of the length of a key, in queries
    key_leak: nn.Parameter
    key_scale: nn.Parameter
    value_scale: nn.Parameter

    def __init__(self, config: Any, states: RequestStates, prefix: str):
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
        sums = self.states.sums({self.sum_name: 0.0}, (projected,), self.leaky_sum, plan)
        return scale_to_length(sums, self.key_length)

    def leaky_sum(self, vectors: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor]:
        return (leaky_average(vectors, self.leak, before)[0],)


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
        self.slots = PairSlots("contextual", self.num_heads, self.head_dim, states, cache_config, f"{prefix}.slots")

    @cached_property
    def mix(self) -> torch.Tensor:
        """The share of the earlier of two values `(H, 1)`."""
        return at_least_float32(self.value_mix)[:, None]

    def forward(
        self, hidden_states: torch.Tensor, query_scale: torch.Tensor | None, plan: StepPlan | None
    ) -> torch.Tensor:
        """Return the output `(N, C)` of normed inputs `(N, C)`.

        Args:
            query_scale (`torch.Tensor` of shape `(N, 1, 1)`, *optional*): of each token's inverse temperature.
        """
        dtype = hidden_states.dtype
        scaled = self.sum_keys(hidden_states, plan)
        keys, values = as_dtype(scaled, dtype), self.split_heads(self.v_proj(hidden_states))
        queries = keys if query_scale is None else as_dtype(scaled * query_scale, dtype)
        if plan is None:
            return self.o_proj(values.flatten(1))
        retrieved = self.slots(queries, keys, values, self.mix, self.value_length, plan)
        return self.o_proj(retrieved.flatten(1))


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

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        page, cache_config = self.page(config, vllm_config.model_config.dtype), vllm_config.cache_config
        self.states = RequestStates(page, f"{prefix}.states")
        self.contextual_norm = self.make_norm(config)
        self.contextual_memory = self.make_contextual(config, cache_config, f"{prefix}.contextual_memory")
        self.persistent_norm = self.make_norm(config)
        self.persistent_memory = self.make_persistent(config, f"{prefix}.persistent_memory")

    @staticmethod
    def page(config: Any, dtype: torch.dtype) -> dict[str, State]:
        """Return the states of a request in one layer."""
        sums = (state_of_sum(memory.sum_name, config) for memory in (ContextualMemory, PersistentMemory))
        pairs = states_of_pairs("contextual", config.num_attention_heads, head_dim_of(config), dtype)
        return page_of(*sums, pairs)

    @staticmethod
    def make_norm(config: Any) -> nn.Module:
        """Return the norm before a memory and before the head."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)

    def make_contextual(self, config: Any, cache_config: CacheConfig, prefix: str) -> nn.Module:
        return ContextualMemory(config, self.states, cache_config, prefix)

    def make_persistent(self, config: Any, prefix: str) -> nn.Module:
        return PersistentMemory(config, self.states, prefix)

    def forward(self, hidden_states: torch.Tensor, kernels: Any) -> torch.Tensor:
        plan = self.states.plan()
        hidden_states = hidden_states + self.contextual_memory(self.contextual_norm(hidden_states), kernels, plan)
        return hidden_states + self.persistent_memory(self.persistent_norm(hidden_states), plan=plan)


class Model(nn.Module):
    """All but the head."""

    layer_class = DecoderLayer

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(config, vllm_config, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = self.layer_class.make_norm(config)

    def kernels(self, positions: torch.Tensor, embeds: torch.Tensor) -> Any:
        """Return what the kernels of contextual memories depend on: here the inverse temperatures, if they grow."""
        scale = growth_of_kernels(self.config, positions[None], embeds[None])
        return None if scale is None else scale[0, :, None, None]

    def forward(self, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states `(N, C)`; positions `(N,)` count the tokens before each, its pairs."""
        kernels, hidden_states = self.kernels(positions, embeds), embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, kernels)
        return self.norm(hidden_states)


class MemoryMosaicForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """A Memory Mosaic that predicts the next token."""

    body_class = Model

    @classmethod
    def page(cls, vllm_config: VllmConfig) -> dict[str, State]:
        """Return the states of a request in one layer."""
        model_config = vllm_config.model_config
        return cls.body_class.layer_class.page(model_config.hf_config, model_config.dtype)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        return tuple(state.shape for state in cls.page(vllm_config).values())

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        return tuple(state.dtype for state in cls.page(vllm_config).values())

    # Not of the class, as vLLM has it: how many states there are depends on the configuration. vLLM asks the model.
    def get_mamba_state_copy_funcs(self, mamba_types: set[Any]) -> Any:
        return dict.fromkeys(mamba_types, (get_temporal_copy_spec,) * self.num_states)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config, self.num_states = config, len(self.page(vllm_config))
        self.model = self.body_class(config, vllm_config, maybe_prefix(prefix, "model"))
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

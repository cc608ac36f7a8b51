# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics v2 for vLLM: short-term and long-term heads, each with pairs of their own.

Both store pairs by `slots.py`. Short-term heads see a window of them. Of long-term heads a pair waits until its delay
is over, and is stored then: so plain causal attention sees those alone that are old enough.

Heads, their parameters and all that depends on one token are those of the model of transformers. Shapes use N tokens
of all requests together, H heads, D head width, C hidden size.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import CacheConfig

from modeling_memory_mosaic.cache_memory_mosaic_v2 import level_states
from modeling_memory_mosaic.memories_memory_mosaic_v2 import (
    MemoryMosaicV2DenseMemory,
    MemoryMosaicV2Heads,
    largest_length,
)
from modeling_memory_mosaic.modeling_memory_mosaic_v2 import make_norm
from modeling_memory_mosaic.ops_memory_mosaic import as_dtype, at_least_float32, scale_to_length
from modeling_memory_mosaic.ops_memory_mosaic_v2 import LOWEST_LOG, MAX_LOG_VALUE_LENGTH, gated_sum, magnitude

from .model import DecoderLayer, MemoryMosaicForCausalLM, Model, PersistentMemory, head_dim_of, state_of_sum
from .slots import PairSlots
from .states import RequestStates, State, StepPlan, page_of, states_of_pairs


class Level(NamedTuple):
    """Heads of one contextual memory: how many, the delay of their pairs, and how many a token sees at most."""

    num_heads: int
    delay: int
    window: int | None


def levels_of(config: Any) -> dict[str, Level]:
    """Return the levels that a model has heads of, in the order of `o_proj`."""
    levels = {
        "short_term": Level(config.num_short_term_heads, 1, config.num_short_term_pairs),
        "long_term": Level(config.num_long_term_heads, config.long_term_delay, None),
    }
    return {name: level for name, level in levels.items() if level.num_heads}


class Heads(MemoryMosaicV2Heads):
    """Heads of one contextual memory, with their pairs in the paged cache."""

    def __init__(
        self, name: str, level: Level, config: Any, states: RequestStates, cache_config: CacheConfig, prefix: str
    ):
        self.level = name
        super().__init__(config, layer_idx=0, num_heads=level.num_heads)
        self.request_states = states
        self.slots = PairSlots(
            name, level.num_heads, self.head_dim, states, cache_config, f"{prefix}.slots", level.delay, level.window
        )

    # Computed once, as weights do not change while they are served.
    @cached_property
    def mix(self) -> torch.Tensor:
        return at_least_float32(self.value_mix)[:, None]

    @cached_property
    def value_length(self) -> torch.Tensor:
        length = magnitude(at_least_float32(self.value_scale)).clamp(max=MAX_LOG_VALUE_LENGTH).exp()
        return length.clamp(max=largest_length(self.value_scale.dtype, length.device))[:, None]

    def unit_keys(self, hidden_states: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """Return directions of gated sums `(N, H, D)`, in float32."""
        projected = self.k_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        weights = (part[0].T for part in self.log_gates_and_decays(hidden_states[None], None))
        sum_name, scale_name, _ = self.state_names
        starts = {sum_name: 0.0, scale_name: LOWEST_LOG}
        sums = self.request_states.sums(starts, (projected, *weights), self.add_to_sum, plan)
        return scale_to_length(sums, sums.new_ones(()))

    @staticmethod
    def add_to_sum(
        vectors: torch.Tensor, gates: torch.Tensor, decays: torch.Tensor, before: torch.Tensor, log_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_sum(vectors, gates, decays, (before, log_scale))

    def forward(self, hidden_states: torch.Tensor, num_pairs: torch.Tensor, plan: StepPlan | None) -> torch.Tensor:
        """Return what normed inputs `(N, C)` retrieve, `(N, H, D)`.

        Args:
            num_pairs (`torch.Tensor` of shape `(N,)`): that each token counts for its bandwidth.
        """
        dtype = hidden_states.dtype
        values = self.v_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        if plan is None:
            return values
        units = self.unit_keys(hidden_states, plan)
        # Heads may share it, and without an exponent tokens do.
        beta = self.beta(num_pairs[None], dtype).expand(1, self.num_heads, len(units), 1)[0].transpose(0, 1)
        queries, keys = as_dtype(units * beta, dtype), as_dtype(units, dtype)
        return self.slots(queries, keys, values, self.mix, self.value_length, plan)


class ContextualMemory(nn.Module):
    """Short-term and long-term heads, and the layer that combines them."""

    def __init__(self, config: Any, states: RequestStates, cache_config: CacheConfig, prefix: str):
        super().__init__()
        self.levels = levels_of(config)
        for name, level in self.levels.items():
            setattr(self, name, Heads(name, level, config, states, cache_config, f"{prefix}.{name}"))
        inner_size = sum(level.num_heads for level in self.levels.values()) * head_dim_of(config)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_states: torch.Tensor, num_pairs: dict[str, torch.Tensor], plan: StepPlan | None
    ) -> torch.Tensor:
        """Return the output `(N, C)` of normed inputs `(N, C)`; `num_pairs` `(N,)` of each level as for [`Heads`]."""
        heads = [getattr(self, name)(hidden_states, num_pairs[name], plan) for name in self.levels]
        return self.o_proj(torch.cat(heads, dim=1).flatten(1))


class DecoderLayerV2(DecoderLayer):
    """One block: contextual memories, then a persistent one, each added to the residual stream."""

    @staticmethod
    def page(config: Any, dtype: torch.dtype) -> dict[str, State]:
        head_dim = head_dim_of(config)
        states = [state_of_sum("persistent_sum", config)] if config.persistent_memory_type == "slots" else []
        for name, level in levels_of(config).items():
            sum_name, scale_name, _ = level_states(name)
            states.append({sum_name: State((level.num_heads, head_dim), torch.float32)})
            states.append({scale_name: State((level.num_heads, 1), torch.float32)})
            states.append(states_of_pairs(name, level.num_heads, head_dim, dtype, level.delay))
        return page_of(*states)

    @staticmethod
    def make_norm(config: Any) -> nn.Module:
        return make_norm(config)

    def make_contextual(self, config: Any, cache_config: CacheConfig, prefix: str) -> nn.Module:
        return ContextualMemory(config, self.states, cache_config, prefix)

    def make_persistent(self, config: Any, prefix: str) -> nn.Module:
        if config.persistent_memory_type == "slots":
            return PersistentMemory(config, self.states, prefix)
        return MemoryMosaicV2DenseMemory(config, layer_idx=0)


class ModelV2(Model):
    """All but the head."""

    layer_class = DecoderLayerV2

    def kernels(self, positions: torch.Tensor, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return how many pairs each token counts for its bandwidth, `(N,)` for each level."""
        if self.config.bandwidth_count == "total":
            return {"short_term": positions, "long_term": positions}
        seen = (positions + 1 - self.config.long_term_delay).clamp(min=0)
        return {"short_term": positions.clamp(max=self.config.num_short_term_pairs), "long_term": seen}


class MemoryMosaicV2ForCausalLM(MemoryMosaicForCausalLM):
    """A Memory Mosaic v2 that predicts the next token."""

    body_class = ModelV2

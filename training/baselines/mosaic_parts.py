# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics that lack one of their parts: which of them lets a model learn in context?

Three parts can be taken away or changed, each by a field of the configuration. With all fields at their defaults the
model is a Memory Mosaic, bit for bit.

- `look_ahead=False`: the value of a pair is the token's own, not a blend with the next token's (eq. 8 with a weight of
  1). A pair still completes when the next token arrives, as the strict rule has it.
- `leak=False`: no key and no query sums over the past (eq. 7 without its sum), in contextual and persistent memories.
- `separate_query=True`: contextual memories have a projection of queries beside that of keys. Leak, length and
  normalisation are those of the keys. Lower `num_persistent_slots` by `hidden_size / 2` to keep the parameters equal.

These models are not the paper's, so the package `modeling_memory_mosaic` does not know them. A saved model carries
this file, which imports that package: it loads where the package is installed.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init

from modeling_memory_mosaic.cache_memory_mosaic import MemoryMosaicCacheLayer, MemoryMosaicStates
from modeling_memory_mosaic.configuration_memory_mosaic import MemoryMosaicConfig
from modeling_memory_mosaic.memories_memory_mosaic import (
    PARAMETER_SCALE,
    MemoryMosaicContextualMemory,
    MemoryMosaicTokenMemory,
)
from modeling_memory_mosaic.modeling_memory_mosaic import (
    MemoryMosaicForCausalLM,
    MemoryMosaicModel,
    MemoryMosaicPreTrainedModel,
)
from modeling_memory_mosaic.ops_memory_mosaic import HeadScalars, keys_and_queries


# In nats per token: exp(-1000) is zero in every precision. Infinity would give NaN at the present token, 0 * infinity.
NO_PAST = 1000.0
OWN_VALUE = 1.0


@strict
class MemoryMosaicPartsConfig(MemoryMosaicConfig):
    r"""
    Sizes of a [`MemoryMosaicConfig`], and which parts the model has.

    Args:
        look_ahead (`bool`, defaults to `True`):
            Whether the value of a pair is a learnt blend of the token's value and the next token's.
        leak (`bool`, defaults to `True`):
            Whether keys and queries are leaky sums of the past.
        separate_query (`bool`, defaults to `False`):
            Whether queries have a projection of their own in contextual memories.
    """

    model_type = "memory_mosaic_parts"

    look_ahead: bool = True
    leak: bool = True
    separate_query: bool = False

    @property
    def layer_types(self) -> list[str]:
        """Cache layer of each block: the mosaic's own, unless queries have a sum of their own to keep."""
        kind = MemoryMosaicPartsCacheLayer if self.separate_query else MemoryMosaicCacheLayer
        return [kind._layer_type] * self.num_hidden_layers


class MemoryMosaicPartsCacheLayer(MemoryMosaicCacheLayer):
    """Layer of a model with separate queries, whose leaky sum is one more running state."""

    _layer_type = MemoryMosaicPartsConfig.model_type
    state_names = (*MemoryMosaicCacheLayer.state_names, "query_sum")


class MemoryMosaicQueryMemory(MemoryMosaicContextualMemory):
    """A contextual memory whose queries are projected apart from its keys."""

    def __init__(self, config: MemoryMosaicPartsConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_proj = nn.Linear(config.hidden_size, self.k_proj.out_features, bias=config.use_bias)

    def sum_queries(
        self,
        hidden_states: torch.Tensor,
        is_token: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        states: MemoryMosaicStates | None,
        scalars: HeadScalars,
    ) -> torch.Tensor:
        """Return the leaky sums of projected queries `(B, H, T, D)`, with the leak of the keys."""
        projected = self.split_heads(self.q_proj(hidden_states))
        if is_token is not None:
            projected = projected * is_token[:, None, :, None]
        previous = None if states is None else states.get_state("query_sum")
        sums = self.leaky_sums(projected, previous, is_token, document_ids, scalars)
        if states is not None:
            states.set_state("query_sum", sums)
        return sums

    def keys_and_queries(
        self,
        hidden_states: torch.Tensor,
        query_scale: torch.Tensor | None,
        is_token: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        states: MemoryMosaicStates | None,
        scalars: HeadScalars,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return keys and queries; arguments as for [`MemoryMosaicContextualMemory`]."""
        past = is_token, document_ids, states, scalars
        keys, _, is_first = super().keys_and_queries(hidden_states, None, *past)
        sums = self.sum_queries(hidden_states, *past)
        _, queries = keys_and_queries(sums, scalars.key_length, hidden_states, query_scale)
        return keys, queries, is_first


def _fix(memory: MemoryMosaicTokenMemory, name: str, value: float) -> None:
    """Turn a parameter into a constant, which is neither trained nor saved."""
    parameter = getattr(memory, name)
    delattr(memory, name)
    memory.register_buffer(name, torch.full_like(parameter, value, requires_grad=False), persistent=False)


class MemoryMosaicPartsPreTrainedModel(MemoryMosaicPreTrainedModel):
    """Initialisation and saving of these models."""

    config: MemoryMosaicPartsConfig

    def constants(self, memory: MemoryMosaicTokenMemory) -> dict[str, float]:
        """Return by name the scalars of a memory that are not learnt, and the values that they have."""
        constants = {} if self.config.leak else {"key_leak": NO_PAST / PARAMETER_SCALE}
        if isinstance(memory, MemoryMosaicContextualMemory) and not self.config.look_ahead:
            constants["value_mix"] = OWN_VALUE
        return constants

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Constants are drawn too, so that one seed gives the same weights with and without a part.
        super()._init_weights(module)
        if isinstance(module, MemoryMosaicTokenMemory):
            for name, value in self.constants(module).items():
                init.constant_(getattr(module, name), value)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the library does, with this file: the parent would name classes of the package in `config.json`."""
        return super(MemoryMosaicPreTrainedModel, self).save_pretrained(*args, **kwargs)


class MemoryMosaicPartsModel(MemoryMosaicPartsPreTrainedModel, MemoryMosaicModel):
    """The blocks of a Memory Mosaic, with those parts that the configuration leaves."""

    def __init__(self, config: MemoryMosaicPartsConfig):
        super().__init__(config)
        if config.separate_query:
            for index, layer in enumerate(self.layers):
                layer.contextual_memory = MemoryMosaicQueryMemory(config, index)
        for memory in self.modules():
            if isinstance(memory, MemoryMosaicTokenMemory):
                for name, value in self.constants(memory).items():
                    _fix(memory, name, value)
        self.post_init()  # initialises what is new


class MemoryMosaicPartsForCausalLM(MemoryMosaicPartsPreTrainedModel, MemoryMosaicForCausalLM):
    """A Memory Mosaic without some of its parts, which predicts the next token. Caches and `generate` are its own."""

    def __init__(self, config: MemoryMosaicPartsConfig):
        # Past the constructor of the parent, which would build all parts.
        super(MemoryMosaicForCausalLM, self).__init__(config)
        self.model = MemoryMosaicPartsModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(MemoryMosaicPartsConfig.model_type, MemoryMosaicPartsConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryMosaicPartsConfig, MemoryMosaicPartsForCausalLM, exist_ok=True)
# `save_pretrained` writes this file beside the weights.
MemoryMosaicPartsConfig.register_for_auto_class()
MemoryMosaicPartsForCausalLM.register_for_auto_class("AutoModelForCausalLM")

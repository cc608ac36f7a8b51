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
"""Outputs of a memory model and of its encoder, and the hidden states and attention maps that they can hold.

Shapes are those of `modeling_memory_model.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .cache_memory_mosaic import MEMORY_NAME
from .layout_memory_model import take


# Hidden states or maps of all layers; a layer that computes none has `None`.
LayerStates = tuple[torch.Tensor | None, ...]


# trf-ignore: TRF057
@dataclass
class MemoryModelEncoderOutput(ModelOutput):
    """
    Args:
        memories (`torch.Tensor` of shape `(B, M, K, D)`): of each row's full chunks, the first one first.
        memory_mask (`torch.Tensor` of shape `(B, M)`): False where a row has fewer memories.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, M, L, C)`): if requested, those of the backbone within
            each chunk. Summary slots, if there are any, stand behind the chunk's tokens: `L + K` slots.
        attentions (`tuple` of `torch.Tensor` of shape `(B, M, heads, L, L)`): likewise.
    """

    memories: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    hidden_states: LayerStates | None = None
    attentions: LayerStates | None = None


# trf-ignore: TRF057
@dataclass
class MemoryModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): the weighted sum of the parts, in nats.
        logits (`torch.Tensor` of shape `(B, T, V)`): at each token, of the next one.
        causal_loss, autoencoding_loss, copy_loss, blank_copy_loss (`torch.Tensor`): the parts whose weight is
            positive, each a mean over its targets.
        past_key_values, cache ([`MemoryModelCache`]): what was read, under the name that this transformers uses.
        memories (`torch.Tensor` of shape `(B, M, K, D)`), memory_mask (`torch.Tensor` of shape `(B, M)`): of all full
            chunks, behind the memories that were given; the latest last. The mask is False in front of a row's first.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, T, C)`): if requested, those of the decoder, at the slot
            that predicts the next token. At the last token of a chunk that is the next row's task slot.
        attentions (`tuple` of `torch.Tensor` of shape `(B, R, heads, slots, slots)`): if requested, those of the
            decoder within each row. The slots are those of memories, the latest last, then the task slot, then the
            chunk's tokens but the last. In an open row that goes on, `(B, 1, heads, T, slots)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    causal_loss: torch.Tensor | None = None
    autoencoding_loss: torch.Tensor | None = None
    copy_loss: torch.Tensor | None = None
    blank_copy_loss: torch.Tensor | None = None
    # Under one name: transformers 5.24 warns of the other wherever it is set.
    if MEMORY_NAME == "cache":
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
    memories: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    hidden_states: LayerStates | None = None
    attentions: LayerStates | None = None


def requested_states(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return which of `output_hidden_states` and `output_attentions` are on: the caller decides, then the config."""
    requests = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
    requests = {name: getattr(config, name, None) if value is None else value for name, value in requests.items()}
    return {name: value for name, value in requests.items() if value is not None and value is not False}


def map_layers(states: LayerStates | None, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerStates | None:
    """Return the states of all layers, each changed by `change`."""
    return None if states is None else tuple(None if state is None else change(state) for state in states)


def decoder_states(
    outputs: BaseModelOutputWithPast | CausalLMOutputWithPast,
    requested: dict[str, Any],
    change: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """Return what was requested of a decoder's outputs for rows `shape` `(B, R)`.

    Args:
        change (`Callable`): applied to the hidden states `(B * R, slots, C)` of each layer.
    """
    states: dict[str, Any] = {}
    if "output_hidden_states" in requested:
        states["hidden_states"] = map_layers(outputs.hidden_states, change)
    if "output_attentions" in requested:
        states["attentions"] = map_layers(
            getattr(outputs, "attentions", None), lambda state: state.unflatten(0, shape)
        )
    return states


def states_at(states: dict[str, Any], positions: torch.Tensor) -> dict[str, Any]:
    """Return states with the hidden ones taken at `positions` `(B, T)`; attention maps stay those of rows."""
    return states | {"hidden_states": map_layers(states.get("hidden_states"), lambda state: take(state, positions))}

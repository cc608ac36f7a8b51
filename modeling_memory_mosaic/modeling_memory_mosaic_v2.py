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
"""Memory Mosaics v2 (arXiv 2507.03285, "Memory Mosaics at scale"): language models of short, long and lasting memory.

Notable features beside those of Memory Mosaics v1, whose model and heads these are:
- two contextual memories in a layer: short-term heads over the last pairs, long-term heads over those behind a delay
- keys are gated sums of the past; gates and leaks depend on the token
- kernels narrow with the number of pairs
- a gated dense layer as persistent memory
- cost and room of short-term heads are linear in T; all else is linear in T but the long-term retrieval

No code of the authors is public: `naive_memory_mosaic_v2.py` has the paper's equations as loops, and this model equals
them in value and gradient. Shapes use B batch, T tokens, C = hidden size.

Docstrings are written by hand (TRF057): the library's generator of them knows the models within the library only.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .adapters_memory_mosaic import AdaptableLayer
from .bounded_memory_mosaic_v2 import MemoryMosaicV2BoundedLayer
from .cache_memory_mosaic_v2 import MemoryMosaicV2CacheLayer, MemoryMosaicV2StaticCacheLayer
from .configuration_memory_mosaic_v2 import MemoryMosaicV2Config
from .layout_memory_mosaic import SharedTexts, Stretch
from .layout_memory_mosaic_v2 import StretchStatesV2, reading_of_stretch, shared_delay
from .masking_memory_mosaic_v2 import Reading, create_reading, draw_delay
from .memories_memory_mosaic import PARAMETER_SCALE, MemoryMosaicPersistentMemory
from .memories_memory_mosaic_v2 import (
    MemoryMosaicV2ContextualMemory,
    MemoryMosaicV2DenseMemory,
    MemoryMosaicV2Heads,
)
from .modeling_memory_mosaic import (
    MemoryMosaicForCausalLM,
    MemoryMosaicForSequenceClassification,
    MemoryMosaicModel,
    MemoryMosaicPreTrainedModel,
)


# These fields are choices of the user, or readings of what the paper leaves open: no checkpoints diverge in them.
# trf-ignore: TRF041 norm_type, gated_keys


# What the thetas of the bandwidth stand at in the beginning (table 6).
INITIAL_BANDWIDTH, INITIAL_EXPONENT = 1.5, 1 / 3
# Initial weights are normal, and clamped at so many standard deviations.
INITIAL_CUT = 3.0


def make_norm(config: MemoryMosaicV2Config) -> nn.Module:
    """Return the norm before a memory and before the head."""
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.use_bias)


class MemoryMosaicV2DecoderLayer(AdaptableLayer, GradientCheckpointingLayer):
    """One block: contextual memories, then a persistent one, each added to the residual stream."""

    def __init__(self, config: MemoryMosaicV2Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.contextual_norm = make_norm(config)
        self.contextual_memory = MemoryMosaicV2ContextualMemory(config, layer_idx)
        self.persistent_norm = make_norm(config)
        self.has_slots = config.persistent_memory_type == "slots"
        persistent: Any = MemoryMosaicPersistentMemory if self.has_slots else MemoryMosaicV2DenseMemory
        self.persistent_memory = persistent(config, layer_idx)
        # Their initial variance depends on the layer, which they do not know.
        for part in self.modules():
            if isinstance(part, nn.Linear):
                is_down = part is getattr(self.persistent_memory, "down_proj", None)
                width = part.in_features if is_down else config.hidden_size
                part.inverse_variance = 2 * width * (layer_idx + 1)  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: torch.Tensor,
        reading: Reading,
        is_token: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        shared_texts: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return the residual stream `(B, T, C)`; arguments as for [`MemoryMosaicV2ContextualMemory`].

        `shared_texts` stands for a memory where processes share texts ([`context_parallel`]).
        """
        past_key_values = past_key_values if shared_texts is None else shared_texts
        # PEFT has put a wrapper around the memory, whose slots it adapts.
        if self.has_slots and not isinstance(self.persistent_memory, MemoryMosaicPersistentMemory):
            self.check_added_adapters()
        shared: Any = {"past_key_values": past_key_values, **kwargs}
        retrieved, _ = self.contextual_memory(self.contextual_norm(hidden_states), reading, **shared)
        hidden_states = hidden_states + retrieved
        shared |= {"is_token": is_token, "document_ids": document_ids}
        return hidden_states + self.persistent_memory(self.persistent_norm(hidden_states), **shared)


# trf-ignore: TRF057
class MemoryMosaicV2PreTrainedModel(MemoryMosaicPreTrainedModel):
    """Base class of all Memory Mosaics v2: initialisation and saving."""

    config: MemoryMosaicV2Config  # type: ignore[assignment]
    base_model_prefix = "model"
    _no_split_modules = ["MemoryMosaicV2DecoderLayer"]
    # Its masks are no numbers; windows and delays are read by sdpa or eager attention.
    _supports_flex_attn = False
    _can_record_outputs = {
        "hidden_states": MemoryMosaicV2DecoderLayer,
        "attentions": MemoryMosaicV2ContextualMemory,
    }
    no_weight_decay_names: tuple[str, ...] = (
        *MemoryMosaicPreTrainedModel.no_weight_decay_names,
        "bandwidth_scale",
        "bandwidth_offset",
        "bandwidth_exponent",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as table 6 of the paper says; l is the layer, from 0 on.

        | parameter | start |
        | --- | --- |
        | linear maps in layer l | normal, std (2 C (l + 1))^-0.5, clamped at 3 std |
        | `down_proj` | normal, std (2 intermediate_size (l + 1))^-0.5, clamped at 3 std |
        | `embed_tokens`, `lm_head`, `score` | normal, std (2 C)^-0.5, clamped at 3 std |
        | `bandwidth_scale`, `bandwidth_offset` | 1.5 |
        | `bandwidth_exponent` | 1/3 |
        | `value_scale` | 0 |
        | `value_mix` | uniform in [0, 1) |
        | `key_leak`, times 10, without gates | 0.5 to 5 evenly over heads, as v1 |
        | persistent slots | as v1 |
        | norms | 1; biases 0 |
        """
        if isinstance(module, (nn.Linear, nn.Embedding)):
            self.init_matrix(module)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            self.init_bias(module)
        elif isinstance(module, MemoryMosaicV2Heads):
            self.init_scalars(module)
        elif isinstance(module, MemoryMosaicPersistentMemory):
            self.init_slots(module)
        else:
            super()._init_weights(module)

    def init_matrix(self, module: nn.Linear | nn.Embedding) -> None:
        std = float(getattr(module, "inverse_variance", 2 * self.config.hidden_size)) ** -0.5
        init.normal_(module.weight, std=std)
        if not getattr(module.weight, "_is_hf_initialized", False):  # by a checkpoint
            module.weight.clamp_(-INITIAL_CUT * std, INITIAL_CUT * std)
        self.init_bias(module)

    def init_bias(self, module: Any) -> None:
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)

    def init_scalars(self, module: Any) -> None:
        for theta in (module.bandwidth_scale, module.bandwidth_offset):
            init.constant_(theta, INITIAL_BANDWIDTH)
        if module.bandwidth_exponent is not None:
            init.constant_(module.bandwidth_exponent, INITIAL_EXPONENT)
        init.zeros_(module.value_scale)
        init.uniform_(module.value_mix, 0.0, 1.0)
        if not self.config.gated_keys:
            leaks = torch.linspace(0.5, 5.0, len(module.key_leak), device="cpu") / PARAMETER_SCALE
            init.copy_(module.key_leak, leaks)

    def init_slots(self, module: MemoryMosaicPersistentMemory) -> None:
        num_heads, num_layers = len(module.key_leak), self.config.num_hidden_layers
        init.copy_(module.key_leak, torch.linspace(0.5, 5.0, num_heads, device="cpu") / PARAMETER_SCALE)
        init.constant_(module.key_scale, 1.0 / PARAMETER_SCALE)
        init.constant_(module.value_scale, -0.5 / PARAMETER_SCALE)
        init.normal_(module.k_proj.weight, std=module.k_proj.in_features**-0.5)
        init.normal_(module.o_proj.weight, std=(module.o_proj.in_features * num_layers) ** -0.5)
        for slots in (module.slot_keys, module.slot_values):
            init.normal_(slots, std=module.head_dim**-0.5)

    @classmethod
    def auto_classes(cls) -> dict[str, str]:
        module = __name__.rpartition(".")[2]
        return {
            "AutoModel": f"{module}.MemoryMosaicV2Model",
            "AutoModelForCausalLM": f"{module}.MemoryMosaicV2ForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.MemoryMosaicV2ForSequenceClassification",
            # `transformers serve` 5.23 asks for this one first, and then only for classes within transformers.
            "AutoModelForDecision": f"{module}.MemoryMosaicV2ForCausalLM",
        }


# trf-ignore: TRF057
class MemoryMosaicV2Model(MemoryMosaicV2PreTrainedModel, MemoryMosaicModel):
    """The blocks without the head. Returns hidden states and the memory; arguments as for [`MemoryMosaicModel`].

    In training, a pass without a memory draws m (`long_term_delay_range`); behind a memory m is `long_term_delay`.
    """

    def __init__(self, config: MemoryMosaicV2Config):
        super().__init__(config)  # type: ignore[arg-type]
        self.post_init()

    def make_layer(self, config: Any, layer_idx: int) -> nn.Module:
        return MemoryMosaicV2DecoderLayer(config, layer_idx)

    def make_norm(self, config: Any) -> nn.Module:
        return make_norm(config)

    @torch.no_grad()
    def inverse_temperatures(self, num_pairs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return beta of long-term heads `(layers, H)` for a number of pairs `(1,)`, in a precision (eq. 6)."""
        layers: Any = self.layers
        memories = [layer.contextual_memory.long_term for layer in layers]
        betas = [memory.beta(num_pairs.to(memory.value_scale.device)[None], dtype) for memory in memories]
        return torch.stack([beta.double().view(-1).expand(self.config.num_long_term_heads) for beta in betas])

    def create_masks(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **packing: Any
    ) -> dict[str, Any]:
        """Return the arguments of all layers that describe padding, documents, the past, windows and delays."""
        delay = None
        if self.training and past_key_values is None:
            delay = draw_delay(self.config, embeds)
        return create_reading(self.config, embeds, attention_mask, past_key_values, delay=delay, **packing)

    def create_stretch_masks(
        self, whole: torch.Tensor, attention_mask: torch.Tensor | None, stretch: Stretch, **packing: Any
    ) -> dict[str, Any]:
        """Return the arguments of all layers for a stretch of texts whose embeddings have the shape of `whole`."""
        delay = None
        if self.training:  # drawn by one process for all
            delay = shared_delay(stretch.group, draw_delay(self.config, whole), whole.device)
        masks = create_reading(self.config, whole, attention_mask, delay=delay, **packing)
        masks["reading"] = reading_of_stretch(self.config, masks["reading"], stretch)
        masks |= {"is_token": stretch.is_token, "document_ids": stretch.document_ids}
        return masks | {"shared_texts": SharedTexts(stretch, len(self.layers), StretchStatesV2)}


# trf-ignore: TRF057
class MemoryMosaicV2ForCausalLM(MemoryMosaicV2PreTrainedModel, MemoryMosaicForCausalLM):
    """A Memory Mosaic v2 that predicts the next token; arguments as for [`MemoryMosaicForCausalLM`]."""

    body_class = MemoryMosaicV2Model

    def __init__(self, config: MemoryMosaicV2Config):
        super().__init__(config)  # type: ignore[arg-type]
        self.post_init()

    # `generate` makes the masks of a compiled step by this.
    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return [`create_reading`] for a static memory: in `generate`, steps of one token are compiled."""
        is_compiled = inputs_embeds.shape[1] == 1
        return create_reading(
            config, inputs_embeds, attention_mask, past_key_values, is_compiled=is_compiled, **kwargs
        )


# trf-ignore: TRF057
class MemoryMosaicV2ForSequenceClassification(MemoryMosaicV2PreTrainedModel, MemoryMosaicForSequenceClassification):
    """A Memory Mosaic v2 that judges a text by its hidden state at the last token."""

    body_class = MemoryMosaicV2Model

    def __init__(self, config: MemoryMosaicV2Config):
        super().__init__(config)  # type: ignore[arg-type]
        self.post_init()


__all__ = [
    "MemoryMosaicV2BoundedLayer",
    "MemoryMosaicV2CacheLayer",
    "MemoryMosaicV2ForCausalLM",
    "MemoryMosaicV2ForSequenceClassification",
    "MemoryMosaicV2Model",
    "MemoryMosaicV2PreTrainedModel",
    "MemoryMosaicV2StaticCacheLayer",
]

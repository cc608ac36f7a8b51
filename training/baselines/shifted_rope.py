# SPDX-License-Identifier: Apache-2.0
"""A transformer with rotary positions whose keys and values are mixed with those of the token before.

A Memory Mosaic joins a token's key to the value of the next token, so that one block can learn to repeat what
followed. This baseline has that shift by one token, and is transformers' GPT-NeoX in all else. The shift is a causal
depthwise convolution of width 2 between projection and rotation:

    k_t <- a * k_t + b * k_(t-1),  v_t <- c * v_t + d * v_(t-1),

with learnt a, b, c, d for each channel. A saved model carries this file, which imports nothing but torch and
transformers.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


@strict
class ShiftedGPTNeoXConfig(GPTNeoXConfig):
    """Sizes of GPT-NeoX: the shift has none of its own."""

    model_type = "shifted_gpt_neox"


class CausalShift(nn.Module):
    """A causal depthwise convolution of width 2 over tokens, without bias; `weight` is `(2, C)`, the past first."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, num_channels))

    def forward(self, states: torch.Tensor, has_previous: torch.Tensor | None) -> torch.Tensor:
        """Mix states `(B, T, C)` with those one token earlier, where `has_previous` `(B, T)` is true; `None`: all."""
        # Under autocast states are in half precision, and keys must have the precision of queries.
        past, present = self.weight.to(states.dtype)
        previous = F.pad(states[:, :-1], (0, 0, 1, 0))
        if has_previous is not None:
            previous = previous * has_previous[..., None]
        return present * states + past * previous


class ShiftedGPTNeoXAttention(GPTNeoXAttention):
    """Attention of GPT-NeoX with one shift for the keys and values of all heads."""

    def __init__(self, config: ShiftedGPTNeoXConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.shift = CausalShift(2 * config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        has_previous: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output `(B, T, C)` and, if the attention function has them, weights `(B, H, T, T)`."""
        assert position_embeddings is not None  # each layer of the model passes them
        # The projection holds query, key and value of the first head, then those of the second, and so on.
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_size))
        query, pairs = fused.split((self.head_size, 2 * self.head_size), dim=-1)
        pairs = self.shift(pairs.flatten(2), has_previous).unflatten(-1, (-1, 2 * self.head_size))
        key, value = pairs.transpose(1, 2).chunk(2, dim=-1)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.dense(mixed.flatten(2)), weights


def find_previous(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Return for each token whether the one before it belongs to its text, `(B, T)`; `None` if all do.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, on either side of a text.
        position_ids (`torch.Tensor` of shape `(B, T)`, *optional*): a text goes on where they rise by 1.

    Raises:
        ValueError: the mask has another shape, or padding stands within a text.
    """
    has_previous = None
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} axes: pass one of shape (B, T), 1 at tokens and 0 at "
                "padding, which the shift of keys and values has to know, or `has_previous`."
            )
        is_token = F.pad(attention_mask.bool(), (1, 0))
        if (is_token[:, 1:] & ~is_token[:, :-1]).sum(-1).max() > 1:
            raise ValueError("attention_mask has padding within a text: pad on the left or on the right alone.")
        has_previous = is_token[:, :-1]
    if position_ids is not None:
        continues = F.pad(position_ids.diff(dim=-1) == 1, (1, 0))
        has_previous = continues if has_previous is None else has_previous & continues
    return has_previous


class ShiftedGPTNeoXModel(GPTNeoXModel):
    """The layers of GPT-NeoX with shifted keys and values. There is no cache: each call reads the whole text."""

    config: ShiftedGPTNeoXConfig

    def __init__(self, config: ShiftedGPTNeoXConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.attention = ShiftedGPTNeoXAttention(config, index)
        self.post_init()  # initialises what is new

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CausalShift):
            # As torch initialises a convolution of width 2. By `initializer_range` keys would be nearly zero.
            init.uniform_(module.weight, -(2**-0.5), 2**-0.5)
        else:
            super()._init_weights(module)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        has_previous: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return what GPT-NeoX returns, without a cache; `use_cache`, which callers pass to every model, is unused.

        Args:
            has_previous (`torch.Tensor` of shape `(B, T)`, *optional*): whether the token before each belongs to its
                text, for masks that do not say so. See [`find_previous`] for those that do.

        Raises:
            ValueError: a cache is passed, or the mask is none that `find_previous` reads.
        """
        if any(kwargs.pop(name, None) is not None for name in ("cache", "past_key_values")):
            raise ValueError("This model has no cache, which would lack the keys to shift from: pass the whole text.")
        if has_previous is None:
            has_previous = find_previous(attention_mask, position_ids)
        output = super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            has_previous=has_previous,
            **kwargs,
        )
        return cast(BaseModelOutputWithPast, output)


class ShiftedGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    """GPT-NeoX with shifted keys and values, which predicts the next token."""

    config: ShiftedGPTNeoXConfig

    def __init__(self, config: ShiftedGPTNeoXConfig):
        # Past the constructor of the parent, which would build other layers.
        super(GPTNeoXForCausalLM, self).__init__(config)
        self.gpt_neox = ShiftedGPTNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the library does, by passes over the whole text."""
        return super().generate(*args, **kwargs | {"use_cache": False})


AutoConfig.register(ShiftedGPTNeoXConfig.model_type, ShiftedGPTNeoXConfig, exist_ok=True)
AutoModelForCausalLM.register(ShiftedGPTNeoXConfig, ShiftedGPTNeoXForCausalLM, exist_ok=True)
# An export has to load without this clone: `save_pretrained` writes this file beside the weights.
ShiftedGPTNeoXConfig.register_for_auto_class()
ShiftedGPTNeoXForCausalLM.register_for_auto_class("AutoModelForCausalLM")

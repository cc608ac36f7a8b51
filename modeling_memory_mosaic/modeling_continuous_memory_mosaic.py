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
"""A Memory Mosaic for continuous observations: one layer of associative memories that predicts the next observation.

This is the model of the paper's three moons (arXiv 2405.06394, section on predictive disentanglement). Nothing but
linear maps surrounds the memories: no residual stream, no normalisation, no learnt pairs.

Shapes use B batch, T observations, C coordinates of an observation, H heads (memories), D head width. Docstrings are
written by hand (TRF057): the library's generator of them knows only models within the library.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_memory_mosaic import AdaptableModel
from .cache_memory_mosaic import check_memory, memory_kwargs, memory_layer, one_memory
from .configuration_continuous_memory_mosaic import ContinuousMemoryMosaicConfig
from .identity_memory_mosaic import note_writer
from .masking_memory_mosaic import DOCUMENT_MARKS, create_memory_masks, raise_where
from .memories_memory_mosaic import PARAMETER_SCALE, MemoryMosaicPairStore
from .ops_memory_mosaic import at_least_float32, leaky_average


# These fields are choices of the user: no checkpoints are known that diverge in them.
# trf-ignore: TRF041 complex_weights, key_leak, learnable_beta, loss_clip


# trf-ignore: TRF057
@dataclass
class ContinuousMemoryMosaicOutput(BaseModelOutputWithPast):
    """Outputs of a [`ContinuousMemoryMosaicModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, H * D)`): the retrieved values, before `o_proj`.
        loss (`torch.Tensor` of shape `()`, *optional*): returned when `labels` are given.
        predictions (`torch.Tensor` of shape `(B, T, C)`): at t, of observation t + 1.
    """

    loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


class ComplexLinear(nn.Module):
    """Complex-linear map of real vectors, each two neighbouring coordinates being the parts of one complex number.

    The parameter `weight` `(2, out / 2, in / 2)` holds real and imaginary parts. The authors train a real matrix and
    project it to the nearest complex-linear one; this parameter has half as many numbers and needs no projection.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(2, out_features // 2, in_features // 2))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return F.linear(vectors, self.real_matrix())

    def real_matrix(self) -> torch.Tensor:
        """Return the map as a real matrix `(out, in)` of blocks ((a, -b), (b, a)), one for each complex a + ib."""
        real, imaginary = self.weight
        rows = torch.stack([real, -imaginary], dim=-1), torch.stack([imaginary, real], dim=-1)
        return torch.stack(rows, dim=1).flatten(2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def linear_map(config: ContinuousMemoryMosaicConfig, in_features: int, out_features: int) -> nn.Module:
    """Return a real or complex map, without a bias."""
    if config.complex_weights:
        return ComplexLinear(in_features, out_features)
    return nn.Linear(in_features, out_features, bias=False)


class ContinuousMemory(MemoryMosaicPairStore):
    """Associative memories that pair each observation's key with the next observation's value.

    key: k_t = W_phi x_t, or its leaky average; value: v_t = W_psi x_(t+1). Neither is normalised.
    """

    config: ContinuousMemoryMosaicConfig
    log_beta: nn.Parameter | None

    def __init__(self, config: ContinuousMemoryMosaicConfig, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        inner_size = config.num_attention_heads * self.head_dim
        self.k_proj = linear_map(config, config.observation_size, inner_size)
        self.v_proj = linear_map(config, config.observation_size, inner_size)
        self.o_proj = linear_map(config, inner_size, config.observation_size)
        for name, is_learnt in (("key_leak", config.key_leak), ("log_beta", config.learnable_beta)):
            self.register_parameter(name, nn.Parameter(torch.empty(config.num_attention_heads)) if is_learnt else None)

    def keys_and_values(
        self, observations: torch.Tensor, previous: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `(B, H, T, D)` of observations `(B, T, C)` after a key `previous` `(B, H, 1, D)`.

        The value at t is that of observation t itself: it completes the pair of the key at t - 1.
        """
        keys, values = self.split_heads(self.k_proj(observations)), self.split_heads(self.v_proj(observations))
        if self.key_leak is not None:
            keys = leaky_average(keys, self.leak(), previous)[0].to(keys.dtype)
        return keys, values

    def queries(self, keys: torch.Tensor) -> torch.Tensor:
        """Return keys `(B, H, T, D)` times the inverse temperature: stored keys are not scaled."""
        if self.log_beta is None:
            return self.config.beta * keys
        return (PARAMETER_SCALE * at_least_float32(self.log_beta)).exp()[:, None, None].to(keys.dtype) * keys

    def forward(
        self,
        observations: torch.Tensor,
        slot_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        previous: torch.Tensor | None = None,
        pairs_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Args:
            observations (`torch.Tensor` of shape `(B, T, C)`).
            slot_mask, past_key_values (*optional*): as for [`MemoryMosaicContextualMemory`].
            previous (`torch.Tensor` of shape `(B, H, 1, D)`, *optional*): the key before these observations, for
                callers that keep it themselves. Ignored if there is a memory, which holds it.
            pairs_only (`bool`): return queries, keys and values `(B, H, T, D)` instead, and retrieve nothing.
                Offloading and sharding tools fetch weights for `forward` only, so inspection asks through it.

        Returns:
            retrieved values `(B, T, H * D)`; under eager attention the weight `(B, H, T, S)` that each of T
            observations gives to the pair of each of S observations so far; and predictions `(B, T, C)`.
        """
        if past_key_values is not None:
            previous = self.states(past_key_values).get_state(self.sum_name)
        keys, values = self.keys_and_values(observations, previous)
        if pairs_only:
            return self.queries(keys), keys, values
        if past_key_values is not None:
            # With or without a leak: the newest key waits for the next observation, which completes its pair.
            self.states(past_key_values).set_state(self.sum_name, keys)
        queries = self.queries(keys)
        # The next observation completes a pair. So the newest observation has no pair yet, and the first observation
        # completes one only if another came before it.
        if previous is None:
            values = values[:, :, 1:]
        else:
            keys = torch.cat([previous, keys], dim=2)
        retrieved, weights = self.attend(queries, keys, values, slot_mask, past_key_values, previous is None, **kwargs)
        retrieved = retrieved.flatten(2)
        return retrieved, weights, self.o_proj(retrieved)  # here, as FSDP2 gathers weights for `forward` alone


def check_observations(observations: torch.Tensor, size: int) -> None:
    """Raise `ValueError` unless observations are finite, of shape `(B, T, size)`, and at least one."""
    if observations.ndim != 3 or 0 in observations.shape or observations.shape[-1] != size:
        raise ValueError(
            f"observations have shape {tuple(observations.shape)}: it must be (batch, time, {size}), with at "
            "least one of each."
        )
    if not observations.is_floating_point():
        raise ValueError(f"observations are {observations.dtype}: pass floating point numbers.")
    raise_where(~torch.isfinite(observations), "observations must be finite.", observations)


def check_series(kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for arguments that mark padding or packed documents: the model would ignore them."""
    if kwargs.get("attention_mask") is not None:
        raise ValueError("Continuous observations have no padding: pass rows of one length, without a mask.")
    for name in DOCUMENT_MARKS:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported: each row is one series, so give each series its own row.")


# `save_pretrained` of `AdaptableModel` passes most of the library's arguments on by name, which type checkers reject.
# trf-ignore: TRF057
class ContinuousMemoryMosaicModel(AdaptableModel, PreTrainedModel):  # type: ignore[misc]
    """Predicts each next observation: z_t = W_z concat_h y_t, where y_t is retrieved from the pairs stored before t.

    The first prediction is 0, as nothing is stored yet.
    """

    config: ContinuousMemoryMosaicConfig
    main_input_name = "observations"
    base_model_prefix = "model"
    _no_split_modules = ["ContinuousMemory"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    # The hidden states are the observations themselves and the retrieved values.
    _can_record_outputs = {"hidden_states": ContinuousMemory, "attentions": ContinuousMemory}
    # Per-head scalars: decay would pull all heads towards one kernel.
    no_weight_decay_names = ("key_leak", "log_beta")

    def __init__(self, config: ContinuousMemoryMosaicConfig):
        super().__init__(config)
        self.memory = ContinuousMemory(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise the matrices as the authors' script does, and leaks as the language model does.

        | parameter | values |
        | --- | --- |
        | real matrix | uniform within 1 / sqrt(in) |
        | complex matrix | uniform within 1 / sqrt(2 in): the variance of a real one, projected |
        | `key_leak` | 0.5 to 5 nats per observation, evenly over heads |
        | `log_beta` | log of `beta` |
        """
        if isinstance(module, (nn.Linear, ComplexLinear)):
            bound = (module.in_features * (2 if isinstance(module, ComplexLinear) else 1)) ** -0.5
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, ContinuousMemory):
            config = module.config
            if module.key_leak is not None:
                leaks = torch.linspace(0.5, 5.0, config.num_attention_heads, device="cpu") / PARAMETER_SCALE
                init.copy_(module.key_leak, leaks)
            if module.log_beta is not None:
                init.constant_(module.log_beta, torch.tensor(float(config.beta)).log().item() / PARAMETER_SCALE)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError(f"{type(self).__name__} reads observations: it has no table of tokens.")

    def clipped_loss(
        self,
        predictions: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return the mean over rows, positions and coordinates of clip(z_t - x_(t+1))^2, of shape `()`.

        Args:
            predictions (`torch.Tensor` of shape `(B, T, C)`).
            labels (`torch.Tensor` of shape `(B, T, C)`): the observations themselves, at least two.
            num_items_in_batch (*optional*): numbers in the labels of the whole batch, if this is a part of it. The
                part then counts by its share. `Trainer` leaves out -100 when it counts, so this method does too.

        Raises:
            ValueError: if labels have another shape than predictions, are fewer than two, or are not finite.
        """
        if labels.shape != predictions.shape or labels.shape[1] < 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, predictions {tuple(predictions.shape)}: pass the "
                "observations themselves, at least two of them."
            )
        raise_where(~torch.isfinite(labels), "labels must be finite.", labels)
        # Half precision would round small errors away.
        errors = at_least_float32(predictions[:, :-1]) - at_least_float32(labels[:, 1:])
        if self.config.loss_clip is not None:
            errors = errors.clamp(-self.config.loss_clip, self.config.loss_clip)
        loss = errors.square().mean()
        if num_items_in_batch is not None:
            loss = loss * (labels != -100).sum() / num_items_in_batch
        return loss

    # trf-ignore: TRF057
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        observations: torch.FloatTensor,
        labels: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ContinuousMemoryMosaicOutput:
        """
        Args:
            observations (`torch.FloatTensor` of shape `(B, T, C)`): those that follow what the memory has read.
            labels (`torch.FloatTensor` of shape `(B, T, C)`, *optional*): the observations themselves, not shifted;
                the loss compares the prediction at t with `labels` at t + 1.
            past_key_values or cache ([`~transformers.Cache`], *optional*): the memory; grows by T slots.
            use_cache (`bool`, *optional*): whether to return the memory.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): among `kwargs`; see [`clipped_loss`].

        Raises:
            ValueError: if observations or labels have another shape or are not finite, if the memory is another
                model's or has another number of rows, or if padding or packed documents are marked.
        """
        past_key_values = one_memory(past_key_values, cache)
        check_observations(observations, self.config.observation_size)
        if past_key_values is not None:
            check_memory(past_key_values, self.config, num_rows=observations.shape[0])
        check_series(dict(kwargs))
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        slot_mask = create_memory_masks(self.config, observations, None, past_key_values)["slot_mask"]
        if past_key_values is not None:
            note_writer(memory_layer(past_key_values), self, observations.shape[1])
            memory_layer(past_key_values).note_text(None, None)
        retrieved, _, predictions = self.memory(observations, slot_mask, past_key_values, **kwargs)
        return ContinuousMemoryMosaicOutput(
            last_hidden_state=retrieved,
            loss=None if labels is None else self.clipped_loss(predictions, labels, num_items_in_batch),
            predictions=predictions,
            **memory_kwargs(past_key_values),
        )

    @torch.no_grad()
    def predict(
        self, observations: torch.Tensor, num_steps: int, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """Continue each row by the model's own predictions.

        Args:
            observations (`torch.Tensor` of shape `(B, T, C)`).
            num_steps (`int`): number of observations to predict.
            past_key_values (*optional*): memory of what came before; it grows by `T + num_steps - 1` slots.

        Returns:
            predictions `(B, num_steps, C)`.

        Raises:
            ValueError: if `num_steps` is not positive; and as [`forward`] does.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} must be positive.")
        memory = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        latest, predictions = observations, []
        for _ in range(num_steps):
            latest = self(latest, use_cache=True, **memory_kwargs(memory)).predictions[:, -1:]
            predictions.append(latest)
        return torch.cat(predictions, dim=1)


__all__ = ["ContinuousMemoryMosaicModel"]

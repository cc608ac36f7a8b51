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
"""A Memory Mosaic for continuous observations: one layer of associative memories that predicts what comes next.

This is the model of the paper's three moons (arXiv 2405.06394, section on predictive disentanglement). Nothing but
linear maps surrounds the memories: no residual stream, no normalisation, no learnt pairs.

Shapes use B batch, T observations, C coordinates of an observation, H heads (memories), D head width. Docstrings are
written by hand (TRF057): the library's generator of them knows the models within the library only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_memory_mosaic import AdaptableModel
from .cache_memory_mosaic import MEMORY_NAME, check_memory, one_memory
from .configuration_memory_mosaic import DerivedSizes, check_heads, width_of_heads
from .identity_memory_mosaic import note_writer
from .masking_memory_mosaic import FOREIGN_PACKING_NAMES, PACKING_NAMES, create_memory_masks, raise_where
from .modeling_memory_mosaic import PARAMETER_SCALE, MemoryMosaicContextualMemory
from .ops_memory_mosaic import at_least_float32, kernel_smoothing, leaky_average


# Documented by hand: the library's generator knows its own models only. trf-ignore: TRF057
@strict
class ContinuousMemoryMosaicConfig(DerivedSizes, PreTrainedConfig):
    r"""
    Sizes and choices of a [`ContinuousMemoryMosaicModel`]. The default is the paper's three-head model of three moons.

    Args:
        observation_size (`int`, defaults to 6):
            Coordinates of an observation, C. With complex weights they are pairs, such as sine and cosine of an angle.
        num_attention_heads (`int`, defaults to 3):
            Associative memories, H.
        head_dim (`int`, *optional*):
            Width of a key and of a value, D. `observation_size // num_attention_heads` when absent.
        complex_weights (`bool`, defaults to `True`):
            Whether the three matrices are complex-linear: each pair of coordinates is one complex number. It makes
            them commute with a shift of all phases.
        beta (`float`, defaults to 50.0):
            Inverse temperature: the scores of the kernel are `beta` times the inner products of keys.
        learnable_beta (`bool`, defaults to `False`):
            Whether each head learns its own inverse temperature, from `beta` on.
        key_leak (`bool`, defaults to `False`):
            Whether keys are leaky averages of the past, one learnt decay per head, as in the language model.
        attention_dropout (`float`, defaults to 0.0):
            Share of retrieval weights dropped in training.
        loss_clip (`float`, *optional*, defaults to 0.5):
            Errors are clipped to plus and minus this before they are squared, so that what nobody can know yet (the
            memories are empty at first) does not rule the gradient. `None`: plain squared error.
        use_cache (`bool`, defaults to `False`):
            Whether the model returns its memory.

    Raises:
        ValueError: if the heads do not divide `observation_size` and no `head_dim` is given.
        huggingface_hub.errors.StrictDataclassError: if a size, `beta` or `loss_clip` is not positive, if a size is odd
            under complex weights, if the dropout lies outside [0, 1), or if a field has the wrong type.
    """

    model_type = "continuous_memory_mosaic"
    # `Trainer` gives what is left to `compute_metrics`: the predictions alone.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "last_hidden_state"]
    attribute_map = {"num_key_value_heads": "num_attention_heads", "hidden_size": "observation_size"}
    derived_fields = ("head_dim",)

    observation_size: int = 6
    num_attention_heads: int = 3
    head_dim: int | None = None
    complex_weights: bool = True
    beta: float | int = 50.0
    learnable_beta: bool = False
    key_leak: bool = False
    attention_dropout: float | int = 0.0
    loss_clip: float | int | None = 0.5
    use_cache: bool = False

    def __post_init__(self, **kwargs):
        self.derive_missing()
        check_heads(self, "observation_size")
        super().__post_init__(**kwargs)

    def derived_value(self, name: str):
        return width_of_heads(self.observation_size, self.num_attention_heads)

    @property
    def num_hidden_layers(self) -> int:
        return 1

    @property
    def layer_types(self) -> list[str]:
        """Cache layer of the one layer. A property: `config.json` must stay readable without this package."""
        return [self.model_type]

    def validate_layer_type(self):
        """There is one layer, so there is nothing to compare with the library's list of layer types."""

    def validate_architecture(self):
        """Part of `@strict` validation: runs after `__init__`, before saving, and when a model is built."""
        check_heads(self, "observation_size")
        for name in ("observation_size", "num_attention_heads", "head_dim", "beta", "loss_clip"):
            value = getattr(self, name)
            if value is None and name == "loss_clip":
                continue
            if value is None or value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        for name in ("observation_size", "head_dim"):
            if self.complex_weights and getattr(self, name) % 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} is odd: complex weights act on pairs of coordinates. Make it even, "
                    "or set complex_weights=False."
                )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must lie in [0, 1).")


@dataclass
class ContinuousMemoryMosaicOutput(BaseModelOutputWithPast):
    """What [`ContinuousMemoryMosaicModel`] returns.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, H * D)`): what the memories retrieved, before `o_proj`.
        loss (`torch.Tensor` of shape `()`, *optional*): returned when `labels` are given.
        predictions (`torch.Tensor` of shape `(B, T, C)`): at t, of observation t + 1.
    """

    loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None


@dataclass
class MemoryUnits(ModelOutput):
    """What each memory does for the prediction, by position; see [`ContinuousMemoryMosaicModel.units`].

    Args:
        error (`torch.Tensor` of shape `(B, H, T - 1)`): |y_t - v_t|^2 / |v_t|^2, of the retrieved value against the
            one that the next observation shows.
        entropy (`torch.Tensor` of shape `(B, H, T)`): of the retrieval weights, in nats; 0 where nothing is stored.
        effective_pairs (`torch.Tensor` of shape `(B, H, T)`): exp(entropy), the number of pairs that an even
            retrieval of this entropy reads; 0 where nothing is stored.
        contributions (`torch.Tensor` of shape `(B, H, T, C)`): of each memory to the prediction; their sum over H.
        share (`torch.Tensor` of shape `(B, H, T)`): inner product of contribution and prediction over the
            prediction's square; sums to 1 over H, but is 0 where the prediction is 0.
    """

    error: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    effective_pairs: torch.Tensor | None = None
    contributions: torch.Tensor | None = None
    share: torch.Tensor | None = None


class ComplexLinear(nn.Module):
    """Complex-linear map of real vectors whose neighbouring coordinates are the parts of one complex number.

    Its parameter `weight` `(2, out / 2, in / 2)` holds real and imaginary parts, so that every value of it is such a
    map: half as many numbers as a real matrix, and no projection back.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(2, out_features // 2, in_features // 2))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(vectors, self.real_matrix())

    def real_matrix(self) -> torch.Tensor:
        """The map as a real matrix `(out, in)`, made of blocks ((a, -b), (b, a)) for a complex number a + ib."""
        real, imaginary = self.weight
        rows = torch.stack([real, -imaginary], dim=-1), torch.stack([imaginary, real], dim=-1)
        return torch.stack(rows, dim=1).flatten(2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ContinuousMemory(MemoryMosaicContextualMemory):
    """Stores each observation's key with the value of the next one, and retrieves from the pairs stored before.

    key: k_t = W_phi x_t, or its leaky average; value: v_t = W_psi x_(t+1). Neither is normalised.
    """

    def __init__(self, config: ContinuousMemoryMosaicConfig, layer_idx: int = 0):
        nn.Module.__init__(self)  # the parent's projections, blends and scales are those of tokens
        self.config = config
        self.layer_idx = layer_idx
        linear = ComplexLinear if config.complex_weights else _real_linear
        inner_size = config.num_attention_heads * config.head_dim
        self.k_proj = linear(config.observation_size, inner_size)
        self.v_proj = linear(config.observation_size, inner_size)
        self.o_proj = linear(inner_size, config.observation_size)
        self.key_leak = nn.Parameter(torch.empty(config.num_attention_heads)) if config.key_leak else None
        self.log_beta = nn.Parameter(torch.empty(config.num_attention_heads)) if config.learnable_beta else None

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
            previous (`torch.Tensor` of shape `(B, H, 1, D)`, *optional*): the key before these observations, if no
                memory has it.
            pairs_only (`bool`): return queries, keys and values `(B, H, T, D)` instead, and retrieve nothing. Through
                `forward`, as tools that keep weights elsewhere fetch them for it alone.

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
            self.states(past_key_values).set_state(self.sum_name, keys)
        queries = self.queries(keys)
        # The pair of an observation completes with the next one: here all pairs but the newest observation's.
        pairs = keys[:, :, :-1], values[:, :, 1:]
        if previous is not None:
            pairs = torch.cat([previous, pairs[0]], dim=2), values
        retrieved, weights = self.attend(queries, pairs, slot_mask, past_key_values, previous is None, **kwargs)
        retrieved = retrieved.flatten(2)
        return retrieved, weights, self.o_proj(retrieved)  # here, as FSDP2 gathers weights for `forward` alone

    def keys_and_values(self, observations, previous=None):
        """Keys `(B, H, T, D)` of observations that follow a key `previous` `(B, H, 1, D)`, and their values: v_t is
        the value of the observation t itself, and belongs to the key before."""
        keys, values = self.split_heads(self.k_proj(observations)), self.split_heads(self.v_proj(observations))
        if self.key_leak is not None:
            keys = leaky_average(keys, self.leak(), previous)[0].to(keys.dtype)
        return keys, values

    def queries(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys `(B, H, T, D)` times the inverse temperature, which a query carries for both keys of a product."""
        if self.log_beta is None:
            return self.config.beta * keys
        return (PARAMETER_SCALE * at_least_float32(self.log_beta)).exp()[:, None, None].to(keys.dtype) * keys


def _real_linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


def recall_shared_and_own(queries, shared_pairs, shared_mask, own_pairs):
    """Kernel smoothing over pairs that all queries share and, in the same average, pairs that each has to itself.

    A query's scores with its own keys enter as what is added to the scores of empty slots: no shared pair is copied.

    Args:
        queries (`torch.Tensor` of shape `(B, H, P, D)`): P queries, each of another reading.
        shared_pairs: keys and values `(B, H, N, D)`.
        shared_mask (`torch.Tensor` of shape `(P, N)`): added to the scores of shared keys.
        own_pairs: keys and values `(B, H, P, S, D)`.

    Returns:
        retrieved values `(B, H, P, D)`.
    """
    (shared_keys, shared_values), (own_keys, own_values) = shared_pairs, own_pairs
    num_own = own_keys.shape[3]
    own_scores = (own_keys @ queries[..., None]).squeeze(-1)
    mask = torch.cat([shared_mask.expand(*queries.shape[:3], -1), own_scores], dim=-1)
    slots = F.pad(shared_keys, (0, 0, 0, num_own)), F.pad(shared_values, (0, 0, 0, num_own))
    retrieved, weights = kernel_smoothing(queries, *slots, mask)
    return retrieved + (weights[..., None, -num_own:].to(own_values.dtype) @ own_values).squeeze(-2)


# trf-ignore: TRF057
class ContinuousMemoryMosaicModel(AdaptableModel, PreTrainedModel):
    """Predicts each next observation: z_t = W_z concat_h y_t with y_t retrieved from the pairs stored before t.

    The first prediction is 0, as nothing is stored yet.
    """

    config: ContinuousMemoryMosaicConfig
    main_input_name = "observations"
    base_model_prefix = "model"
    _no_split_modules = ["ContinuousMemory"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    # The states are the observations themselves and what the memories retrieved.
    _can_record_outputs = {"hidden_states": ContinuousMemory, "attentions": ContinuousMemory}
    no_weight_decay_names = ("key_leak", "log_beta")

    def __init__(self, config: ContinuousMemoryMosaicConfig):
        super().__init__(config)
        self.memory = ContinuousMemory(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        """Uniform, with the variance of a real matrix of bound 1 / sqrt(in); complex, of the nearest complex one."""
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

    def get_input_embeddings(self):
        raise NotImplementedError(f"{type(self).__name__} reads observations: it has no table of tokens.")

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
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ContinuousMemoryMosaicOutput:
        """
        Args:
            observations (`torch.FloatTensor` of shape `(B, T, C)`): those that follow what the memory has read.
            labels (`torch.FloatTensor` of shape `(B, T, C)`, *optional*): the observations themselves, not shifted;
                the loss compares the prediction at t with `labels` at t + 1.
            past_key_values or cache ([`~transformers.Cache`], *optional*): the memory; grows by T slots.
            use_cache (`bool`, *optional*): whether to return the memory.
            num_items_in_batch (*optional*): see `clipped_loss`.

        Raises:
            ValueError: if observations or labels have another shape or are not finite, or if the memory is another
                model's or of other rows.
        """
        past_key_values = one_memory(past_key_values, cache)
        self.check_observations(observations)
        if past_key_values is not None:
            check_memory(past_key_values, self.config, num_rows=observations.shape[0])
        self.check_request(kwargs)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        slot_mask = create_memory_masks(self.config, observations, None, past_key_values)["slot_mask"]
        if past_key_values is not None:
            note_writer(past_key_values.layers[0], self, observations.shape[1])
            past_key_values.layers[0].note_text(None, None)
        retrieved, _, predictions = self.memory(observations, slot_mask, past_key_values, **kwargs)
        return ContinuousMemoryMosaicOutput(
            last_hidden_state=retrieved,
            loss=None if labels is None else self.clipped_loss(predictions, labels, num_items_in_batch),
            predictions=predictions,
            **{MEMORY_NAME: past_key_values},
        )

    def clipped_loss(self, predictions: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """Mean over rows, positions and coordinates of clip(z_t - x_(t+1))^2, for both of shape `(B, T, C)`.

        Of a batch that comes in several parts, with `num_items_in_batch` numbers in all labels, a part counts by its
        share of them. `Trainer` takes -100 for no label when it counts.
        """
        if labels.shape != predictions.shape or labels.shape[1] < 2:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, predictions {tuple(predictions.shape)}: pass the "
                "observations themselves, at least two of them."
            )
        raise_where(~torch.isfinite(labels), "labels must be finite.", labels)
        errors = at_least_float32(predictions[:, :-1]) - at_least_float32(labels[:, 1:])
        if self.config.loss_clip is not None:
            errors = errors.clamp(-self.config.loss_clip, self.config.loss_clip)
        loss = errors.square().mean()
        if num_items_in_batch is not None:
            loss = loss * (labels != -100).sum() / num_items_in_batch
        return loss

    @torch.no_grad()
    def predict(self, observations: torch.Tensor, num_steps: int, past_key_values: Cache | None = None):
        """Continue each row by its own predictions.

        Args:
            observations (`torch.Tensor` of shape `(B, T, C)`).
            num_steps (`int`): how many observations to predict.
            past_key_values (*optional*): a memory of what came before; it grows by `T + num_steps - 1` slots.

        Returns:
            predictions `(B, num_steps, C)`.
        """
        check_num_steps(num_steps)
        memory = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        latest, predictions = observations, []
        for _ in range(num_steps):
            latest = self(latest, use_cache=True, **{MEMORY_NAME: memory}).predictions[:, -1:]
            predictions.append(latest)
        return torch.cat(predictions, dim=1)

    @torch.no_grad()
    def predict_from_prefixes(self, observations: torch.Tensor, lengths: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Continue each row from each of several of its prefixes: the same as so many calls of `predict`.

        All prefixes share the pairs of one pass; each keeps only the few that its own predictions complete.

        Args:
            observations (`torch.Tensor` of shape `(B, T, C)`).
            lengths (`torch.Tensor` of shape `(P,)`): of the prefixes, from 1 to T.
            num_steps (`int`): how many observations to predict from each.

        Returns:
            predictions `(B, P, num_steps, C)`.
        """
        check_num_steps(num_steps)
        if lengths.ndim != 1 or lengths.min() < 1 or lengths.max() > observations.shape[1]:
            raise ValueError(f"lengths must be a list of numbers from 1 to {observations.shape[1]}, not {lengths}.")
        memory, lengths = self.memory, lengths.to(observations.device)
        latest = self(observations, use_cache=False).predictions[:, lengths - 1]  # (B, P, C)
        _, keys, values = memory(observations, pairs_only=True)
        shared = keys[:, :, :-1], values[:, :, 1:]
        is_stored = torch.arange(1, observations.shape[1], device=lengths.device) < lengths[:, None]
        shared_mask = torch.zeros_like(is_stored, dtype=keys.dtype).masked_fill(~is_stored, float("-inf"))
        key, predictions, own_keys, own_values = keys[:, :, lengths - 1], [latest], [], []
        for _ in range(num_steps - 1):
            own_keys.append(key)
            query, key, value = self._advance(latest, key)
            own_values.append(value)
            own = torch.stack(own_keys, dim=3), torch.stack(own_values, dim=3)
            retrieved = recall_shared_and_own(query, shared, shared_mask, own)
            latest = memory.o_proj(retrieved.transpose(1, 2).flatten(2))
            predictions.append(latest)
        return torch.stack(predictions, dim=2)

    def _advance(self, observations, keys):
        """The next query, key and value `(B, H, P, D)` of each of P readings, from what each observes `(B, P, C)`."""
        batch_size, num_readings, _ = observations.shape

        def unfold(rows):
            return rows.squeeze(2).unflatten(0, (batch_size, num_readings)).transpose(1, 2)

        previous = keys.transpose(1, 2).flatten(0, 1)[:, :, None]
        pairs = self.memory(observations.flatten(0, 1)[:, None], previous=previous, pairs_only=True)
        return tuple(map(unfold, pairs))

    @torch.no_grad()
    def units(self, observations: torch.Tensor) -> MemoryUnits:
        """Which memory predicts what: errors, retrieval entropies and shares of the prediction.

        Args:
            observations (`torch.Tensor` of shape `(B, T, C)`): at least two.
        """
        self.check_observations(observations)
        if observations.shape[1] < 2:
            raise ValueError("One observation completes no pair: pass at least two.")
        queries, keys, values = self.memory(observations, pairs_only=True)
        stored, queries = keys[:, :, :-1], queries[:, :, 1:]
        num_pairs = stored.shape[2]
        mask = torch.full((num_pairs, num_pairs), float("-inf"), dtype=keys.dtype, device=keys.device).triu(1)
        retrieved, weights = kernel_smoothing(queries, stored, values[:, :, 1:], mask)
        retrieved = F.pad(retrieved, (0, 0, 1, 0))  # (B, H, T, D)
        entropy = torch.special.entr(weights).sum(-1)
        error = (retrieved[:, :, :-1] - values[:, :, 1:]).square().sum(-1) / values[:, :, 1:].square().sum(-1)
        contributions = self._contributions(retrieved)
        prediction = contributions.sum(1, keepdim=True)
        square = prediction.square().sum(-1)
        share = (contributions * prediction).sum(-1) / square.masked_fill(square == 0, 1.0)
        return MemoryUnits(
            error=error,
            entropy=F.pad(entropy, (1, 0)),
            effective_pairs=F.pad(entropy.exp(), (1, 0)),
            contributions=contributions,
            share=share,
        )

    def _contributions(self, retrieved):
        """`(B, H, T, C)`: what the combining layer makes of each head's values `(B, H, T, D)` alone."""
        num_heads = retrieved.shape[1]
        alone = torch.eye(num_heads, dtype=retrieved.dtype, device=retrieved.device)
        alone = alone[:, None, :, None] * retrieved.transpose(1, 2)[:, None]  # (B, H, T, H, D)
        return self.memory.o_proj(alone.flatten(3))

    def check_observations(self, observations: torch.Tensor) -> None:
        """Refuses what is not at least one finite vector of the model's size in each of at least one row."""
        size = self.config.observation_size
        if observations.ndim != 3 or 0 in observations.shape or observations.shape[-1] != size:
            raise ValueError(
                f"observations have shape {tuple(observations.shape)}: it must be (batch, time, {size}), with at "
                "least one of each."
            )
        if not observations.is_floating_point():
            raise ValueError(f"observations are {observations.dtype}: pass floating point numbers.")
        raise_where(~torch.isfinite(observations), "observations must be finite.", observations)

    def check_request(self, kwargs) -> None:
        """Refuses what would be passed over."""
        if kwargs.get("attention_mask") is not None:
            raise ValueError("Continuous observations have no padding: pass rows of one length, without a mask.")
        for name in ("position_ids", *PACKING_NAMES, *FOREIGN_PACKING_NAMES):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: each row is one series, so give each series its own row.")


def check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be positive.")


__all__ = ["ContinuousMemoryMosaicConfig", "ContinuousMemoryMosaicModel"]

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
"""Configuration of Memory Mosaics for continuous observations: sizes, kernel and loss."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_memory_mosaic import DerivedSizes, check_heads, width_of_heads


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
            Whether the three matrices are complex-linear: each pair of coordinates is one complex number. Such
            matrices commute with a shift of all phases.
        beta (`float`, defaults to 50.0):
            Inverse temperature: the scores of the kernel are `beta` times the inner products of keys.
        learnable_beta (`bool`, defaults to `False`):
            Whether each head learns its own inverse temperature, starting at `beta`.
        key_leak (`bool`, defaults to `False`):
            Whether keys are leaky averages of the past with one learnt decay per head, as in the language model.
        attention_dropout (`float`, defaults to 0.0):
            Share of retrieval weights dropped in training.
        loss_clip (`float`, *optional*, defaults to 0.5):
            Errors are clipped to plus and minus this value before they are squared. The memories are empty at first,
            so early predictions must fail: clipping keeps these errors from dominating the gradient. `None`: plain
            squared error.
        use_cache (`bool`, defaults to `False`):
            Whether the model returns its memory.

    Raises:
        ValueError: if the heads do not divide `observation_size` and no `head_dim` is given.
        huggingface_hub.errors.StrictDataclassError: if a size, `beta` or `loss_clip` is not positive, if a size is odd
            under complex weights, if the dropout lies outside [0, 1), or if a field has the wrong type.
    """

    model_type = "continuous_memory_mosaic"
    # `Trainer` passes the remaining outputs to `compute_metrics`: the predictions alone.
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

    def __post_init__(self, **kwargs: Any) -> None:
        self.derive_missing()
        check_heads(self, "observation_size")
        super().__post_init__(**kwargs)

    def derived_value(self, name: str) -> int | None:
        """Return the default of `head_dim`; `None` if the heads do not divide `observation_size`."""
        return width_of_heads(self.observation_size, self.num_attention_heads)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers: one. The library sizes caches by it."""
        return 1

    @property
    def layer_types(self) -> list[str]:
        """Cache layer of the one layer. A property: `config.json` must stay readable without this package."""
        return [self.model_type]

    def validate_layer_type(self) -> None:
        """Skip the library's check: its list of layer types does not hold this one."""

    def validate_architecture(self) -> None:
        """Raise if a field has an impossible value. `@strict` runs this after `__init__` and before saving."""
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


__all__ = ["ContinuousMemoryMosaicConfig"]

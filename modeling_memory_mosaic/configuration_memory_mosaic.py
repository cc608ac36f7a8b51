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
"""Configuration of Memory Mosaics: sizes, dropout and the few choices that the architecture leaves open."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging
from transformers.utils.versions import require_version


logger = logging.get_logger(__name__)


def warn_of_untested_versions() -> None:
    """Log a warning outside the tested versions of transformers, which may call a memory in ways that go wrong."""
    try:
        require_version("transformers>=5.18,<6")
    except ImportError as error:
        logger.warning(f"Memory Mosaics were not tested with this version of transformers. {error}")


warn_of_untested_versions()


class DerivedSizes:
    """Base of configurations with derived fields: unless a value is chosen, such a field follows the others.

    A field that has its default value counts as derived, also in files, where all fields are written down. So
    `from_pretrained(folder, hidden_size=256)` and `config.hidden_size = 256` change the fields that depend on it; a
    field with another value stays. Assigning `None` makes a field derived again. An assignment within a part, as
    `config.encoder.hidden_size = 64`, is not noticed: assign the part.
    """

    # In an order in which each depends on earlier ones at most.
    derived_fields: tuple[str, ...] = ()

    def derived_value(self, name: str) -> Any:
        """Return the default of a derived field; `None` if the other fields leave no value that fits."""
        raise NotImplementedError

    def derive_missing(self) -> None:
        """Set all fields that are `None`. Call it in `__post_init__`, before the library's."""
        for name in self.derived_fields:
            if getattr(self, name) is None:
                setattr(self, name, self.derived_value(name))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, and all fields that were derived from it."""
        is_built = "_name_or_path" in self.__dict__  # the library's `__post_init__` sets it
        followers: list[str] = []
        if is_built:
            followers = [
                field
                for field in self.derived_fields
                if field != name and getattr(self, field) in (None, self.derived_value(field))
            ]
        super().__setattr__(name, value)
        if is_built and value is None and name in self.derived_fields:
            super().__setattr__(name, self.derived_value(name))
        for follower in followers:
            super().__setattr__(follower, self.derived_value(follower))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build as the library does; a derived field among `kwargs` keeps that value, whatever else is given."""
        chosen = {name: kwargs[name] for name in cls.derived_fields if kwargs.get(name) is not None}
        # `PreTrainedConfig` comes next in the order of classes.
        loaded = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        for name, value in chosen.items():
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, name, value)
        return loaded


def width_of_heads(size: int, num_heads: int) -> int | None:
    """Return the width of each of `num_heads` heads that share a size; `None` if it is not a whole number."""
    return size // num_heads if num_heads > 0 and size % num_heads == 0 else None


def check_heads(config: Any, size_name: str) -> None:
    """Raise `ValueError` if no `head_dim` is chosen and the heads do not divide the size that they share."""
    size, num_heads = getattr(config, size_name), config.num_attention_heads
    if config.head_dim is None and num_heads > 0 and size > 0:
        raise ValueError(
            f"{size_name}={size} is not a multiple of num_attention_heads={num_heads}: change one of them, or set "
            "head_dim."
        )


# Documented by hand: the library's generator knows its own models only. trf-ignore: TRF057
@strict
class MemoryMosaicConfig(DerivedSizes, PreTrainedConfig):
    r"""
    Sizes and choices of a Memory Mosaic (arXiv 2405.06394), the architecture of the authors' `Library`.

    The default is the paper's twelve-block model; GPT-2 of the same depth and width has as many parameters.

    Args:
        vocab_size (`int`, defaults to 50257):
            Number of token ids that the embedding and the head know. The authors pad GPT-2's 50257 to 50304.
        hidden_size (`int`, defaults to 768):
            Width of the residual stream.
        num_hidden_layers (`int`, defaults to 12):
            Number of blocks; each holds one contextual and one persistent memory.
        num_attention_heads (`int`, defaults to 12):
            Associative memories per layer: as many contextual as persistent ones.
        head_dim (`int`, *optional*):
            Width of a key and of a value. `hidden_size // num_attention_heads` when absent.
        num_persistent_slots (`int`, *optional*):
            Learnt key-value pairs per persistent memory. `3.5 * hidden_size` when absent, which makes a block as
            large as a transformer's.
        max_position_embeddings (`int`, defaults to 512):
            The training length, in tokens. Advice only: a Memory Mosaic has no positions and no longest input.
        layer_norm_eps (`float`, defaults to 1e-05):
            Added to the variance in each layer norm.
        use_bias (`bool`, defaults to `False`):
            Whether projections and layer norms have a bias. The head never has.
        bandwidth_exponent (`float`, defaults to 0.0):
            How fast kernels of contextual memories narrow as the memory grows, from 0 to 1: a token that sees n pairs
            multiplies its scores by `(max(n, bandwidth_start) / bandwidth_start) ** bandwidth_exponent`. That is an
            inverse temperature; the bandwidth is its inverse root. 0 is the authors' function, where the bandwidth
            does not depend on n. In float16 the factor is at most 441, so that no query leaves its range.
        bandwidth_start (`int`, defaults to 1):
            Number of pairs up to which the bandwidth stays as learnt. Set it to the training length to narrow the
            kernels of longer memories only.
        attention_dropout (`float`, defaults to 0.05):
            Share of retrieval weights dropped in training, in contextual and persistent memories alike.
        hidden_dropout (`float`, defaults to 0.05):
            Share of a memory layer's outputs dropped in training, after `o_proj`.
        logits_scaling (`float`, *optional*):
            Logits are divided by this. `sqrt(hidden_size)` when absent, as the authors do.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the head uses the embedding's matrix.
        use_cache (`bool`, defaults to `True`):
            Whether the model returns its memory, as `cache` or `past_key_values`.

    Raises:
        ValueError: if the heads do not divide `hidden_size` and no `head_dim` is given.
        huggingface_hub.errors.StrictDataclassError: if a size is not positive, a dropout lies outside [0, 1),
            `bandwidth_exponent` outside [0, 1], or a field has the wrong type.

    ```python
    >>> from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM

    >>> model = MemoryMosaicForCausalLM(MemoryMosaicConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    ```
    """

    model_type = "memory_mosaic"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # Tools that size a key-value cache read this name.
    attribute_map = {"num_key_value_heads": "num_attention_heads"}
    derived_fields = ("head_dim", "num_persistent_slots", "logits_scaling")
    # Memories are independent of each other: each process holds some heads of every layer, with all their parameters.
    # The styles say along which axis a parameter is cut: "colwise" the heads of a vector, "embedding_rowwise" the
    # first axis, which are the heads of the slots.
    base_model_tp_plan = {
        "layers.*.contextual_memory": "local_params",
        "layers.*.contextual_memory.k_proj": "colwise",
        "layers.*.contextual_memory.v_proj": "colwise",
        "layers.*.contextual_memory.o_proj": "rowwise",
        "layers.*.contextual_memory.key_leak": "colwise",
        "layers.*.contextual_memory.key_scale": "colwise",
        "layers.*.contextual_memory.value_scale": "colwise",
        "layers.*.contextual_memory.value_mix": "colwise",
        "layers.*.persistent_memory": "local_params",
        "layers.*.persistent_memory.k_proj": "colwise",
        "layers.*.persistent_memory.o_proj": "rowwise",
        "layers.*.persistent_memory.key_leak": "colwise",
        "layers.*.persistent_memory.key_scale": "colwise",
        "layers.*.persistent_memory.value_scale": "colwise",
        "layers.*.persistent_memory.slot_keys": "embedding_rowwise",
        "layers.*.persistent_memory.slot_values": "embedding_rowwise",
    }

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int | None = None
    num_persistent_slots: int | None = None
    max_position_embeddings: int = 512
    layer_norm_eps: float | int = 1e-5
    use_bias: bool = False
    bandwidth_exponent: float | int = 0.0
    bandwidth_start: int = 1
    attention_dropout: float | int = 0.05
    hidden_dropout: float | int = 0.05
    logits_scaling: float | int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.derive_missing()
        check_heads(self, "hidden_size")
        super().__post_init__(**kwargs)

    def derived_value(self, name: str) -> Any:
        if name == "num_persistent_slots":
            return 7 * self.hidden_size // 2
        if name == "logits_scaling":
            return max(0, self.hidden_size) ** 0.5
        return width_of_heads(self.hidden_size, self.num_attention_heads)

    @property
    def layer_types(self) -> list[str]:
        """Cache layer of each block. A property: `config.json` must stay readable without this package."""
        return [self.model_type] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Skip the library's comparison with its list of layer types: every block is alike."""

    def validate_architecture(self) -> None:
        """Raise `ValueError` for sizes that no model can have.

        `@strict` calls it after `__init__` and before saving; a model calls it when it is built.
        """
        check_heads(self, "hidden_size")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        for name in (*sizes, "num_persistent_slots", "logits_scaling", "bandwidth_start"):
            value = getattr(self, name)
            if value is None or value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1).")
        if not 0 <= self.bandwidth_exponent <= 1:
            raise ValueError(f"bandwidth_exponent={self.bandwidth_exponent} must lie in [0, 1].")


__all__ = ["MemoryMosaicConfig"]

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
"""Configuration of Memory Mosaics v2: sizes, the three levels of memory, and what the paper leaves open."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_memory_mosaic import DerivedSizes, check_heads, width_of_heads


# Values of the fields that choose one of several readings of the paper; the first is the default.
CHOICES = {
    "persistent_memory_type": ("swiglu", "slots"),
    "bandwidth_sharing": ("head", "memory"),
    "bandwidth_count": ("visible", "total"),
    "norm_type": ("rms_norm", "layer_norm"),
    "long_term_delay_draw": ("step", "sequence"),
}
# How processes share the parameters of the memories; see `MemoryMosaicConfig.base_model_tp_plan`.
OF_HEADS = ("gate_proj", "leak_proj", "k_proj", "v_proj", "key_leak", "value_scale", "value_mix")
OF_BANDWIDTH = ("bandwidth_scale", "bandwidth_offset", "bandwidth_exponent")
OF_PERSISTENT = {
    "swiglu": {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"},
    "slots": {
        "": "local_params",
        "k_proj": "colwise",
        "o_proj": "rowwise",
        "key_leak": "colwise",
        "key_scale": "colwise",
        "value_scale": "colwise",
        "slot_keys": "embedding_rowwise",
        "slot_values": "embedding_rowwise",
    },
}


# Documented by hand: the library's generator knows its own models only. trf-ignore: TRF057
@strict
class MemoryMosaicV2Config(DerivedSizes, PreTrainedConfig):
    r"""
    Sizes and choices of Memory Mosaics v2 (arXiv 2507.03285, "Memory Mosaics at scale").

    The default is the paper's small model. No code of the authors is public: what the paper leaves open is a field.

    Args:
        vocab_size (`int`, defaults to 128256):
            Number of token ids that the embedding and the head know.
        hidden_size (`int`, defaults to 2048):
            Width of the residual stream.
        num_hidden_layers (`int`, defaults to 24):
            Number of blocks; each holds short-term, long-term and persistent memory.
        num_attention_heads (`int`, defaults to 16):
            Number of heads that share `hidden_size`, so that `head_dim` is their quotient.
        head_dim (`int`, *optional*):
            Width of a key and of a value. `hidden_size // num_attention_heads` when absent.
        num_short_term_heads, num_long_term_heads (`int`, *optional*):
            Heads of the two contextual memories of a block. `num_attention_heads` each when absent; 0 leaves a memory
            out.
        short_term_window (`int`, defaults to 256):
            h of the paper. Token t reads the short-term pairs of tokens t - h + 1 to t - 1 (eq. 10). One more gives
            the reading of the legend of figure 11, t - h to t - 1.
        long_term_delay (`int`, defaults to 64):
            m of the paper, at inference. Token t reads the long-term pairs of tokens up to t - m.
        long_term_delay_range (pair of `int`, *optional*, defaults to (64, 256)):
            In training, m is drawn evenly from this range, both ends included. `None`: `long_term_delay` in training
            too.
        long_term_delay_draw (`str`, defaults to `"step"`):
            When m is drawn in training: for each forward pass (`step`) or for each row of it (`sequence`). Left open.
        persistent_memory_type (`str`, defaults to `"swiglu"`):
            `swiglu`, a dense layer as in the paper, or `slots`, the learnt pairs of Memory Mosaics v1.
        intermediate_size (`int`, *optional*):
            Width of the dense layer. `3 * hidden_size` when absent, as in the paper's small model.
        num_persistent_slots (`int`, *optional*):
            Learnt pairs per head, of `slots`. `3.5 * hidden_size` when absent.
        gated_keys (`bool`, defaults to `True`):
            Whether input gate and leak of keys depend on the token (eq. 8). `False`: one learnt leak per head, as v1.
        gate_bias (`bool`, defaults to `False`):
            Whether `gate_proj` and `leak_proj` have a bias. The paper has none; a converted v1 model has one.
        adaptive_bandwidth (`bool`, defaults to `True`):
            Whether kernels narrow with the number of pairs (eq. 6). `False`: an exponent of 0 that is not learnt.
        bandwidth_sharing (`str`, defaults to `"head"`):
            Whether each head has bandwidth parameters of its own, or all heads of a `memory` share them. Left open.
        bandwidth_count (`str`, defaults to `"visible"`):
            n of eq. 6: the pairs that a token reads (`visible`), or all pairs before it (`total`). Left open.
        norm_type (`str`, defaults to `"rms_norm"`):
            `rms_norm` or `layer_norm`. Left open.
        norm_eps (`float`, defaults to 1e-05):
            Added to the mean square or the variance in each norm.
        hidden_act (`str`, defaults to `"silu"`):
            Activation of the dense layer.
        use_bias (`bool`, defaults to `False`):
            Whether other projections and layer norms have a bias. The head never has.
        max_position_embeddings (`int`, defaults to 4096):
            The training length, in tokens. Advice only: there are no positions and no longest input.
        attention_dropout, hidden_dropout (`float`, defaults to 0.0):
            Shares of retrieval weights, and of outputs of memories, dropped in training.
        logits_scaling (`float`, defaults to 1.0):
            Logits are divided by this.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether the head uses the embedding's matrix.
        use_cache (`bool`, defaults to `True`):
            Whether the model returns its memory, as `cache` or `past_key_values`.

    Raises:
        ValueError: if the heads do not divide `hidden_size` and no `head_dim` is given.
        huggingface_hub.errors.StrictDataclassError: if a size is not positive, there is no contextual memory, a choice
            is unknown, or a field has the wrong type.

    ```python
    >>> from modeling_memory_mosaic import MemoryMosaicV2Config, MemoryMosaicV2ForCausalLM

    >>> config = MemoryMosaicV2Config(vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> model = MemoryMosaicV2ForCausalLM(config)
    ```
    """

    model_type = "memory_mosaic_v2"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    # Tools that size a key-value cache read this name.
    attribute_map = {"num_key_value_heads": "num_attention_heads"}
    derived_fields = (
        "head_dim",
        "num_short_term_heads",
        "num_long_term_heads",
        "intermediate_size",
        "num_persistent_slots",
    )

    vocab_size: int = 128256
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    head_dim: int | None = None
    num_short_term_heads: int | None = None
    num_long_term_heads: int | None = None
    short_term_window: int = 256
    long_term_delay: int = 64
    long_term_delay_range: list[int] | tuple[int, ...] | None = (64, 256)
    long_term_delay_draw: str = "step"
    persistent_memory_type: str = "swiglu"
    intermediate_size: int | None = None
    num_persistent_slots: int | None = None
    gated_keys: bool = True
    gate_bias: bool = False
    adaptive_bandwidth: bool = True
    bandwidth_sharing: str = "head"
    bandwidth_count: str = "visible"
    norm_type: str = "rms_norm"
    norm_eps: float | int = 1e-5
    hidden_act: str = "silu"
    use_bias: bool = False
    max_position_embeddings: int = 4096
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    logits_scaling: float | int = 1.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.derive_missing()
        check_heads(self, "hidden_size")
        if self.long_term_delay_range is not None:
            self.long_term_delay_range = tuple(self.long_term_delay_range)  # a list in files
        super().__post_init__(**kwargs)

    def derived_value(self, name: str) -> Any:
        if name == "num_persistent_slots":
            return 7 * self.hidden_size // 2
        if name == "intermediate_size":
            return 3 * self.hidden_size
        if name in ("num_short_term_heads", "num_long_term_heads"):
            return self.num_attention_heads
        return width_of_heads(self.hidden_size, self.num_attention_heads)

    @property
    def layer_types(self) -> list[str]:
        """Cache layer of each block. A property: `config.json` must stay readable without this package."""
        return [self.model_type] * self.num_hidden_layers

    @property
    def num_short_term_pairs(self) -> int:
        """Number of short-term pairs that a token reads at most."""
        return self.short_term_window - 1

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How processes share a model: each holds some heads of every memory, with all their parameters.

        `o_proj` reads short-term heads, then long-term ones, so that each process gathers all heads before it. Heads
        that share a bandwidth cannot be spread: there is no plan.
        """
        if self.bandwidth_sharing == "memory":
            return {}
        prefix = "layers.*.contextual_memory"
        plan = {f"{prefix}.o_proj": "rowwise_split_input"}
        for memory in ("short_term", "long_term"):
            plan[f"{prefix}.{memory}"] = "local_params"
            plan |= {f"{prefix}.{memory}.{name}": "colwise" for name in (*OF_HEADS, *OF_BANDWIDTH)}
        persistent = OF_PERSISTENT[self.persistent_memory_type].items()
        return plan | {f"layers.*.persistent_memory.{name}".rstrip("."): style for name, style in persistent}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Take no other plan: transformers 5.18 adds a tied token table, which each process holds whole here."""

    def validate_layer_type(self) -> None:
        """Skip the library's comparison with its list of layer types: every block is alike."""

    def validate_architecture(self) -> None:
        """Raise `ValueError` for sizes that no model can have.

        `@strict` calls it after `__init__` and before saving; a model calls it when it is built.
        """
        check_heads(self, "hidden_size")
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "num_persistent_slots", "long_term_delay", "logits_scaling"):
            value = getattr(self, name)
            if value is None or value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1).")
        for name, values in CHOICES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(values)}.")
        heads = (self.num_short_term_heads, self.num_long_term_heads)
        if None in heads or min(heads) < 0 or max(heads) == 0:
            raise ValueError(f"A block needs short-term or long-term heads, and has {heads}: set one of them.")
        self.validate_window_and_delay()

    def validate_window_and_delay(self) -> None:
        """Raise `ValueError` if a token would read no pair, or its own."""
        if self.short_term_window < 2:
            raise ValueError(f"short_term_window={self.short_term_window} must be at least 2, which reads one pair.")
        drawn = self.long_term_delay_range
        if drawn is not None and (len(drawn) != 2 or not 1 <= drawn[0] <= drawn[1]):
            raise ValueError(
                f"long_term_delay_range={drawn} must be two rising numbers from 1 on, or None for "
                f"long_term_delay={self.long_term_delay} in training too."
            )


__all__ = ["MemoryMosaicV2Config"]

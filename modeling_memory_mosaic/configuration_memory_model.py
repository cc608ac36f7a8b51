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
"""Configuration of memory models: an encoder turns chunks of text into embeddings, and a decoder reads them."""

import copy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_memory_mosaic import DerivedSizes, MemoryMosaicConfig


# Each has its weight, `NAME_weight`, and its part of the loss, `NAME_loss`.
OBJECTIVES = ("causal", "autoencoding", "copy", "blank_copy")
MEMORY_READS = ("prefix", "unrolled_prefix", "unroll_add")
MEMORY_POOLINGS = ("last", "summary")
MEMORY_QUANTIZATIONS = (None, "int8", "fp8")


# Documented by hand: the library's generator knows its own models only. trf-ignore: TRF057
@strict
class MemoryModelConfig(DerivedSizes, PreTrainedConfig):
    r"""
    Sizes and choices of a memory model (arXiv 2602.13466) on any causal backbones.

    A text is cut into chunks. Each chunk but the last is encoded alone into a few vectors, its memory; the decoder
    reads a chunk's own tokens behind the memories of the chunks before it.

    Args:
        encoder (`PreTrainedConfig` or `dict`, *optional*):
            Of the encoder's backbone, any causal model of transformers; a `dict` names its class by `model_type`. The
            default is a [`MemoryMosaicConfig`].
        decoder (`PreTrainedConfig` or `dict`, *optional*):
            Likewise of the decoder's. Both know the same tokens.
        chunk_length (`int`, defaults to 256):
            Tokens of a chunk, L.
        num_memory_embeddings (`int`, defaults to 1):
            Vectors that hold a chunk, K.
        memory_size (`int`, *optional*):
            Width of such a vector, D. A narrower one than the encoder is a bottleneck; the encoder's `hidden_size`
            when absent.
        memory_pooling (`str`, defaults to `"summary"`):
            Where the encoder's states are taken: `"summary"`, at K learnt slots behind the chunk, or `"last"`, at the
            chunk's last token, as the paper does; it gives one vector.
        memory_quantization (`str`, *optional*):
            `"int8"` or `"fp8"` (e4m3): the numbers of a memory are rounded to it, one scale for each vector. Training
            sees the rounded numbers, and its gradient passes them as if they were not. `None`: they are as they are.
        memory_read (`str`, defaults to `"unroll_add"`):
            How the decoder sees a memory. `"prefix"`: each vector is one slot before the chunk. `"unrolled_prefix"`:
            `slots_per_memory` slots, each a window of the memory's numbers. `"unroll_add"`: one slot, and each place
            of the chunk is given a window of each of the `unroll_window` latest memories, added to the token there.
        slots_per_memory (`int`, defaults to 1):
            For `"unrolled_prefix"`: slots of one memory.
        unroll_window (`int`, defaults to 2):
            For `"unroll_add"`: how many of the latest memories are added.
        unroll_width (`int`, *optional*):
            Numbers in a window: it goes round the memory's `K * D` numbers. Half of them when absent.
        encoder_chunk_positions (`bool`, defaults to `True`):
            Whether the encoder adds a learnt vector for each place within a chunk. A Memory Mosaic has no positions.
        decoder_chunk_positions (`bool`, defaults to `False`):
            Likewise in the decoder.
        max_memories (`int`, *optional*):
            Memories that the decoder sees, the latest ones. All when absent; 0 makes a model without memory.
        freeze_encoder (`bool`, defaults to `False`):
            Whether training leaves all of the encoder as it is: token table, backbone, positions and summary slots.
        causal_weight (`float`, defaults to 1.0):
            Weight of the next-token loss. Each of the four weights belongs to a loss that is a mean over its targets.
        autoencoding_weight (`float`, defaults to 0.0):
            Of the loss of writing each chunk down from its own memory alone.
        copy_weight (`float`, defaults to 0.0):
            Of the loss of reading the first half of the chunks a second time, behind the memories of the first time.
        blank_copy_weight (`float`, defaults to 0.0):
            The same, where the tokens of the second time are hidden.
        initializer_range (`float`, *optional*):
            Standard deviation of the decoder's own slots and positions, and of what a memory adds to a token at first.
            `hidden_size ** -0.5` of the decoder when absent, the scale of a Memory Mosaic's token table.
        use_cache (`bool`, defaults to `True`):
            Whether the model returns what it has read, see [`MemoryModelCache`].

    Raises:
        ValueError: if encoder and decoder know a different number of tokens.
        huggingface_hub.errors.StrictDataclassError: if a size is not positive, a choice none of the known ones, a
            weight negative, none positive, or one of recalling positive without memories; or a field has the wrong
            type.

    ```python
    >>> from modeling_memory_mosaic import MemoryModelConfig, MemoryModelForCausalLM, MemoryMosaicConfig

    >>> backbone = MemoryMosaicConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> model = MemoryModelForCausalLM(MemoryModelConfig(encoder=backbone, decoder=backbone, chunk_length=16))
    ```
    """

    model_type = "memory_model"
    # Trainer takes what is left for predictions: the logits.
    keys_to_ignore_at_inference = [
        *("past_key_values", "cache", "memories", "memory_mask"),
        *(f"{objective}_loss" for objective in OBJECTIVES),
    ]
    sub_configs = {"encoder": AutoConfig, "decoder": AutoConfig}
    derived_fields = ("memory_size", "unroll_width", "initializer_range")

    encoder: PreTrainedConfig | dict[str, Any] | None = None
    decoder: PreTrainedConfig | dict[str, Any] | None = None
    chunk_length: int = 256
    num_memory_embeddings: int = 1
    memory_size: int | None = None
    memory_pooling: str = "summary"
    memory_quantization: str | None = None
    memory_read: str = "unroll_add"
    slots_per_memory: int = 1
    unroll_window: int = 2
    unroll_width: int | None = None
    encoder_chunk_positions: bool = True
    decoder_chunk_positions: bool = False
    max_memories: int | None = None
    freeze_encoder: bool = False
    causal_weight: float | int = 1.0
    autoencoding_weight: float | int = 0.0
    copy_weight: float | int = 0.0
    blank_copy_weight: float | int = 0.0
    initializer_range: float | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.encoder, self.decoder = backbone_config(self.encoder), backbone_config(self.decoder)
        self.check_vocabularies()
        self.derive_missing()
        super().__post_init__(**kwargs)

    def derived_value(self, name: str):
        if name == "unroll_width":
            return max(1, self.memory_numbers // 2)
        return self.encoder.hidden_size if name == "memory_size" else self.decoder.hidden_size**-0.5

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the library's; what is given for a part of it changes that part, with the sizes that follow there."""
        for part in cls.sub_configs:
            if isinstance(kwargs.get(part), dict):
                written = dict(config_dict.get(part) or {})
                is_other = kwargs[part].get("model_type", written.get("model_type")) != written.get("model_type")
                whole = backbone_config({} if is_other else written)
                kwargs[part] = backbone_config(kwargs[part]) if is_other else whole.from_dict(written, **kwargs[part])
        return super().from_dict(config_dict, **kwargs)

    @property
    def memory_numbers(self) -> int:
        """How many numbers one memory holds, `K * D`."""
        return self.num_memory_embeddings * self.memory_size

    @property
    def prefix_slots(self) -> int:
        """Slots that one memory takes before a chunk."""
        return self.slots_per_memory if self.memory_read == "unrolled_prefix" else self.num_memory_embeddings

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.encoder.vocab_size = self.decoder.vocab_size = value

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the decoder's table is its head too: PEFT asks before it adapts one of them, or merges."""
        return getattr(self.decoder, "tie_word_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, is_tied: bool) -> None:
        self.decoder.tie_word_embeddings = is_tied

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"tie_word_embeddings": self.tie_word_embeddings}

    @property
    def hidden_size(self) -> int:
        return self.decoder.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.decoder.num_hidden_layers

    def check_vocabularies(self) -> None:
        if self.encoder.vocab_size != self.decoder.vocab_size:
            raise ValueError(
                f"The encoder knows {self.encoder.vocab_size} tokens and the decoder {self.decoder.vocab_size}: give "
                "both the same vocab_size."
            )

    def validate_architecture(self):
        """Part of `@strict` validation: runs after `__init__`, before saving, and when a model is built."""
        self.check_vocabularies()
        sizes = ("chunk_length", "num_memory_embeddings", "memory_size", "slots_per_memory", "unroll_window")
        for name in (*sizes, "unroll_width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.unroll_width > self.memory_numbers:
            raise ValueError(
                f"unroll_width={self.unroll_width} is more than the {self.memory_numbers} numbers of a memory."
            )
        if self.max_memories is not None and self.max_memories < 0:
            raise ValueError(f"max_memories={self.max_memories} must not be negative.")
        for name, known in (
            ("memory_read", MEMORY_READS),
            ("memory_pooling", MEMORY_POOLINGS),
            ("memory_quantization", MEMORY_QUANTIZATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}.")
        if self.memory_pooling == "last" and self.num_memory_embeddings > 1:
            raise ValueError(
                f"num_memory_embeddings={self.num_memory_embeddings}, but memory_pooling='last' gives one vector, the "
                "state at the last token: use memory_pooling='summary'."
            )
        weights = [getattr(self, f"{objective}_weight") for objective in OBJECTIVES]
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"The weights of {', '.join(OBJECTIVES)} are {weights}: none negative, one positive.")
        if self.max_memories == 0 and max(weights[1:]) > 0:
            raise ValueError(
                f"max_memories=0 leaves nothing to recall, but the weights of {', '.join(OBJECTIVES[1:])} are "
                f"{weights[1:]}: set them to 0."
            )


def backbone_config(given: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A backbone's configuration from what names it; of a `dict` without `model_type` it is a Memory Mosaic's."""
    if isinstance(given, PreTrainedConfig):
        return copy.deepcopy(given)  # one given twice makes two backbones
    fields = dict(given or {})
    model_type = fields.pop("model_type", MemoryMosaicConfig.model_type)
    # By itself, because a machine without this package's registration loads it from the same folder.
    if model_type == MemoryMosaicConfig.model_type:
        return MemoryMosaicConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


__all__ = ["MemoryModelConfig"]

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
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .configuration_memory_mosaic import DerivedSizes, MemoryMosaicConfig


if TYPE_CHECKING:
    # A configuration that is built has a value in each of these fields, so its users need not expect `None`.
    Backbone: TypeAlias = Any
    DerivedInt: TypeAlias = Any
    DerivedFloat: TypeAlias = Any
else:
    Backbone = PreTrainedConfig | dict[str, Any] | None
    DerivedInt, DerivedFloat = int | None, float | None

# Each objective has a weight, `NAME_weight`, and a part of the loss, `NAME_loss`.
OBJECTIVES = ("causal", "autoencoding", "copy", "blank_copy")
MEMORY_READS = ("prefix", "unrolled_prefix", "unroll_add", "gated_add", "cross_attention")
# Reads that add windows of the latest memories to tokens.
ADDITIVE_READS = ("unroll_add", "gated_add")
MEMORY_POOLINGS = ("last", "mean", "summary")
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
            Configuration of the encoder's backbone, any causal model of transformers. A `dict` names its class by
            `model_type`. The default is a [`MemoryMosaicConfig`].
        decoder (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the decoder's backbone, likewise. Both have the same `vocab_size`.
        chunk_length (`int`, defaults to 256):
            Tokens of a chunk, L.
        num_memory_embeddings (`int`, defaults to 1):
            Vectors of a memory, K.
        memory_size (`int`, *optional*):
            Width of a memory's vectors, D. The encoder's `hidden_size` when absent; less makes a bottleneck.
        memory_pooling (`str`, defaults to `"summary"`):
            Which of the encoder's states make a memory: `"summary"`, those at K learnt slots behind the chunk;
            `"last"`, the one at the chunk's last token, as in the paper; or `"mean"`, the mean over its tokens.
        encoder_layer (`int`, defaults to -1):
            From which of the encoder's `hidden_states` they are taken: -1 is the last one, behind the final norm. In
            most models 0 is the token embeddings.
        memory_quantization (`str`, *optional*):
            `"int8"` or `"fp8"` (e4m3): memories are rounded to one byte a number, with one scale for each vector.
            Training rounds too, and passes gradients on as if it did not. Not rounded when absent.
        memory_read (`str`, defaults to `"unroll_add"`):
            How the decoder sees a memory. `"prefix"`: each vector is one slot in front of the chunk.
            `"unrolled_prefix"`: `slots_per_memory` slots, each a window of the memory's numbers. `"unroll_add"`: as
            `"prefix"`, and each token of the chunk gets a window of each of the `unroll_window` latest memories added.
            `"gated_add"`: the same, with a gate for each window that depends on the token, learnt from 0 on.
            `"cross_attention"`: no slots; each token attends to `slots_per_memory` windows of every memory, and what
            it reads is added, learnt from 0 on.
        slots_per_memory (`int`, defaults to 1):
            For `"unrolled_prefix"` and `"cross_attention"`: slots of one memory.
        unroll_window (`int`, defaults to 2):
            For `"unroll_add"` and `"gated_add"`: how many of the latest memories are added.
        unroll_width (`int`, *optional*):
            Numbers in a window. Half of the memory's `K * D` numbers when absent; with `"cross_attention"` as many as
            its windows need to hold them all. A window that reaches the last number goes on at the first.
        encoder_chunk_positions (`bool`, defaults to `True`):
            Whether the encoder adds a learnt vector for each position in a chunk. A Memory Mosaic has no positions.
        decoder_chunk_positions (`bool`, defaults to `False`):
            Whether the decoder does.
        max_memories (`int`, *optional*):
            How many of the latest memories the decoder sees. All when absent; 0 makes a model without memory.
        freeze_encoder (`bool`, defaults to `False`):
            Whether training leaves the whole encoder as it is: token table, backbone, positions and summary slots.
        freeze_decoder (`bool`, defaults to `False`):
            Whether training leaves the decoder as it is: its backbone, token table and head, but not the reader.
        tie_encoder_embeddings (`bool`, defaults to `False`):
            Whether encoder and decoder have one token table. Both have the same `hidden_size` then.
        causal_weight (`float`, defaults to 1.0):
            Weight of the next-token loss. Each of the four losses is a mean over its targets.
        autoencoding_weight (`float`, defaults to 0.0):
            Weight of the loss of reconstructing each chunk from its own memory alone.
        copy_weight (`float`, defaults to 0.0):
            Weight of the loss of reading the first half of the chunks again, behind the memories of the first time.
        blank_copy_weight (`float`, defaults to 0.0):
            Weight of the same loss where the tokens of the second time are hidden.
        initializer_range (`float`, *optional*):
            Initial standard deviation of the decoder's own slots and positions, and of what a memory adds to a token.
            `hidden_size ** -0.5` of the decoder when absent, the scale of a Memory Mosaic's token table.
        use_cache (`bool`, defaults to `True`):
            Whether the model returns what it has read, see [`MemoryModelCache`].

    Raises:
        ValueError: if encoder and decoder differ in `vocab_size`.
        huggingface_hub.errors.StrictDataclassError: if a field has the wrong type, a size is not positive, a choice is
            unknown, a weight is negative, no weight is positive, or there are no memories to reconstruct from.

    ```python
    >>> from modeling_memory_mosaic import MemoryModelConfig, MemoryModelForCausalLM, MemoryMosaicConfig

    >>> backbone = MemoryMosaicConfig(vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> model = MemoryModelForCausalLM(MemoryModelConfig(encoder=backbone, decoder=backbone, chunk_length=16))
    ```
    """

    model_type = "memory_model"
    # Trainer takes the remaining output, the logits, for predictions.
    keys_to_ignore_at_inference = [
        *("past_key_values", "cache", "memories", "memory_mask"),
        *(f"{objective}_loss" for objective in OBJECTIVES),
    ]
    sub_configs = {"encoder": AutoConfig, "decoder": AutoConfig}
    derived_fields = ("memory_size", "unroll_width", "initializer_range")

    encoder: Backbone = None
    decoder: Backbone = None
    chunk_length: int = 256
    num_memory_embeddings: int = 1
    memory_size: DerivedInt = None
    memory_pooling: str = "summary"
    encoder_layer: int = -1
    memory_quantization: str | None = None
    memory_read: str = "unroll_add"
    slots_per_memory: int = 1
    unroll_window: int = 2
    unroll_width: DerivedInt = None
    encoder_chunk_positions: bool = True
    decoder_chunk_positions: bool = False
    max_memories: int | None = None
    freeze_encoder: bool = False
    freeze_decoder: bool = False
    tie_encoder_embeddings: bool = False
    causal_weight: float | int = 1.0
    autoencoding_weight: float | int = 0.0
    copy_weight: float | int = 0.0
    blank_copy_weight: float | int = 0.0
    initializer_range: DerivedFloat = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.encoder, self.decoder = backbone_config(self.encoder), backbone_config(self.decoder)
        self.check_vocabularies()
        self.derive_missing()
        super().__post_init__(**kwargs)

    def derived_value(self, name: str) -> int | float:
        """Return the default of `memory_size`, `unroll_width` or `initializer_range`."""
        if name == "unroll_width":
            if self.memory_read == "cross_attention":
                return -(-self.memory_numbers // self.slots_per_memory)
            return max(1, self.memory_numbers // 2)
        return self.encoder.hidden_size if name == "memory_size" else self.decoder.hidden_size**-0.5

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration as the library does; a `dict` for a backbone changes some fields of it.

        Fields of the backbone that are derived from the changed ones follow. Another `model_type` replaces it.
        """
        for part in cls.sub_configs:
            changes = kwargs.get(part)
            if not isinstance(changes, dict):
                continue
            saved = dict(config_dict.get(part) or {})
            if changes.get("model_type", saved.get("model_type")) != saved.get("model_type"):
                kwargs[part] = backbone_config(changes)
            else:
                kwargs[part] = backbone_config(saved).from_dict(saved, **changes)
        return super().from_dict(config_dict, **kwargs)

    @property
    def memory_numbers(self) -> int:
        """Numbers of one memory, `K * D`."""
        return self.num_memory_embeddings * self.memory_size

    @property
    def prefix_slots(self) -> int:
        """Slots of one memory in front of a chunk."""
        if self.memory_read == "cross_attention":
            return 0
        return self.slots_per_memory if self.memory_read == "unrolled_prefix" else self.num_memory_embeddings

    @property
    def vocab_size(self) -> int:
        """Number of token ids of encoder and decoder. Setting it sets both."""
        return self.decoder.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.encoder.vocab_size = self.decoder.vocab_size = value

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the decoder's token table is its head too. PEFT asks before it adapts one of them, or merges."""
        return getattr(self.decoder, "tie_word_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, is_tied: bool) -> None:
        self.decoder.tie_word_embeddings = is_tied

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"tie_word_embeddings": self.tie_word_embeddings}

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return self.decoder.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the decoder."""
        return self.decoder.num_hidden_layers

    def check_vocabularies(self) -> None:
        """Raise if encoder and decoder differ in `vocab_size`."""
        if self.encoder.vocab_size != self.decoder.vocab_size:
            raise ValueError(
                f"The encoder knows {self.encoder.vocab_size} tokens and the decoder {self.decoder.vocab_size}: give "
                "both the same vocab_size."
            )

    def validate_architecture(self) -> None:
        """Raise if fields do not fit together. `@strict` calls this after `__init__` and before saving."""
        self.check_vocabularies()
        self.check_sizes()
        self.check_choices()
        self.check_encoder()
        self.check_weights()

    def check_sizes(self) -> None:
        """Raise if a size is out of range."""
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

    def check_choices(self) -> None:
        """Raise if a choice is unknown, or `memory_pooling` does not give so many vectors."""
        for name, known in (
            ("memory_read", MEMORY_READS),
            ("memory_pooling", MEMORY_POOLINGS),
            ("memory_quantization", MEMORY_QUANTIZATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}.")
        if self.memory_pooling != "summary" and self.num_memory_embeddings > 1:
            state = "the state at the last token" if self.memory_pooling == "last" else "the mean of all states"
            raise ValueError(
                f"num_memory_embeddings={self.num_memory_embeddings}, but memory_pooling={self.memory_pooling!r} "
                f"gives one vector, {state}: use memory_pooling='summary'."
            )
        num_read = self.slots_per_memory * self.unroll_width
        if self.memory_read == "cross_attention" and num_read < self.memory_numbers:
            raise ValueError(
                f"slots_per_memory={self.slots_per_memory} windows of unroll_width={self.unroll_width} leave out "
                f"some of the {self.memory_numbers} numbers of a memory: raise either, or leave out unroll_width."
            )

    def check_encoder(self) -> None:
        """Raise if the encoder has no such layer, or cannot have the decoder's token table."""
        depth = getattr(self.encoder, "num_hidden_layers", None)
        if depth is not None and not -depth - 1 <= self.encoder_layer <= depth:
            raise ValueError(
                f"encoder_layer={self.encoder_layer}, but the encoder has {depth} blocks: give a number from "
                f"{-depth - 1} to {depth}."
            )
        if self.tie_encoder_embeddings and self.encoder.hidden_size != self.decoder.hidden_size:
            raise ValueError(
                f"tie_encoder_embeddings=True, but the encoder's hidden_size is {self.encoder.hidden_size} and the "
                f"decoder's {self.decoder.hidden_size}: one table has one width. Set it to False."
            )

    def check_weights(self) -> None:
        """Raise if a weight is negative, none is positive, or one needs memories that the decoder cannot see."""
        weights = [getattr(self, f"{objective}_weight") for objective in OBJECTIVES]
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"The weights of {', '.join(OBJECTIVES)} are {weights}: none negative, one positive.")
        if self.max_memories == 0 and max(weights[1:]) > 0:
            raise ValueError(
                f"max_memories=0 leaves nothing to reconstruct from, but the weights of {', '.join(OBJECTIVES[1:])} "
                f"are {weights[1:]}: set them to 0."
            )


def backbone_config(given: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """Return a copy of a backbone's configuration, or build one from a `dict`: a Memory Mosaic's by default."""
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)  # encoder and decoder may be given the same one
        # Its weights become a part of another folder, which has the code, and names no path of this machine.
        config.name_or_path = ""
        if hasattr(config, "auto_map"):
            del config.auto_map
        return config
    fields = dict(given or {})
    model_type = fields.pop("model_type", MemoryMosaicConfig.model_type)
    # Not by `AutoConfig`, which does not know the mosaic in a process that loads this code from a folder.
    if model_type == MemoryMosaicConfig.model_type:
        return MemoryMosaicConfig(**fields)
    return AutoConfig.for_model(model_type, **fields)


__all__ = ["MemoryModelConfig"]

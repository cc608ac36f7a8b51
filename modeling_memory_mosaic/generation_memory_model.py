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
"""Generation with a memory model: reading a text in parts, `generate`, and encoding a document ahead of it.

Behind its last full chunk each text has an open row. New tokens continue that row, by the decoder's own cache, until
the chunk is full. Then the chunk is encoded into a memory, and the next row is opened.

Shapes are those of `modeling_memory_model.py`; P is the number of tokens in the open row.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .adapters_memory_mosaic import check_routers
from .cache_memory_model import MemoryModelCache
from .cache_memory_mosaic import MEMORY_NAME, memory_kwargs, one_memory
from .configuration_memory_model import MemoryModelConfig
from .generation_memory_mosaic import continue_from, generation_settings, repeated_rows
from .identity_memory_mosaic import note_writer
from .layout_memory_model import (
    PackedText,
    TextMemories,
    embed_tokens,
    pack_text,
    packed_positions,
    right_aligned,
    slice_rows,
    take,
    visible_memories,
)
from .outputs_memory_model import decoder_states, states_at
from .reads_memory_model import BEGIN, MemoryModelReader


class MemoryModelGenerationMixin(GenerationMixin, nn.Module):
    """The library's `GenerationMixin`, with memories and an open row in place of a key-value cache."""

    # Parts of the model that this class is mixed into.
    config: MemoryModelConfig
    decoder: PreTrainedModel
    reader: MemoryModelReader
    gather_memories: Callable[..., TextMemories]
    encode_full_chunks: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    decode_text: Callable[..., tuple[torch.Tensor, dict[str, Any]]]
    decoder_masks: Callable[[torch.Tensor, int], dict[str, torch.Tensor]]
    keeps_row: bool
    is_sharded: Callable[[], bool]
    to_device: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def check_cache(self, cache: Any, memories: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        """Raise if a cache cannot be read or written by this call."""
        if not isinstance(cache, MemoryModelCache):
            raise ValueError(
                f"A {type(cache).__name__} is not what a memory model has read: pass what its forward returned. "
                "(Prefix tuning of PEFT makes such a cache: use LoRA.)"
            )
        if labels is not None:
            raise ValueError(
                "With labels a text is read as a whole, and no cache is kept of it: leave the cache out, and "
                "use_cache=True."
            )
        layers = self.decoder.modules() if self.training else ()
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError(
                "A cache cannot be read or written under gradient checkpointing, which reads everything twice: call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`, or pass `use_cache=False`."
            )
        if memories is not None and cache.num_tokens > 0:
            raise ValueError("memories come before a text, but the cache has read some already: give them at first.")

    def visible_to_open_row(self, cache: MemoryModelCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memories `(B, 1, S, K, D)` that the open row of each text sees, and their mask `(B, 1, S)`."""
        memories, memory_mask = cache.finished_memories()
        num_memories = memories.shape[1]
        ends = torch.full((memories.shape[0], 1), num_memories, device=memories.device)
        return visible_memories(memories, memory_mask, ends, num_memories, self.config)

    def step_decoder(
        self,
        cache: MemoryModelCache,
        inputs: torch.Tensor,
        mask: torch.Tensor,
        logits_to_keep: int = 0,
        **requested: Any,
    ) -> CausalLMOutputWithPast:
        """Return the decoder's outputs for inputs `(B, W, C)` and mask `(B, W)`, which continue its open row."""
        row_mask = cache.extend_row_mask(mask)
        return self.decoder(
            inputs_embeds=inputs,
            use_cache=True,
            return_dict=True,
            logits_to_keep=logits_to_keep,
            **memory_kwargs(cache.row),
            **self.decoder_masks(row_mask, inputs.shape[1]),
            **requested,
        )

    def continue_row(
        self, cache: MemoryModelCache, text: PackedText, positions: torch.Tensor, **requested: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return logits `(B, T, V)` after the tokens of a text in the open row, and the states that were requested.

        Args:
            positions (`torch.LongTensor` of shape `(B, T)`): of the tokens in their chunk, counted from 1.
        """
        tokens, is_token = embed_tokens(self.decoder, text.ids)[:, None], text.is_token
        positions = positions.clamp(max=self.config.chunk_length - 1)[:, None]
        inputs, _ = self.reader(tokens, is_token[:, None], *self.visible_to_open_row(cache), positions)
        outputs = self.step_decoder(cache, inputs[:, 0], is_token, **requested)
        assert outputs.logits is not None
        return outputs.logits, decoder_states(outputs, requested, lambda state: state, (is_token.shape[0], 1))

    def open_row(self, cache: MemoryModelCache) -> torch.Tensor:
        """Open the row behind each text's last full chunk, and return logits `(B, 1, V)` after its last token."""
        ids, is_token = cache.unfinished_chunk()
        tokens = embed_tokens(self.decoder, ids)[:, None]
        inputs, mask = self.reader(tokens, is_token[:, None], *self.visible_to_open_row(cache), task=BEGIN)
        # Padding goes to the left, so that the row's next tokens follow its last one.
        order = right_aligned(mask[:, 0])
        cache.start_row(self.config.decoder)
        outputs = self.step_decoder(cache, take(inputs[:, 0], order), take(mask[:, 0], order), logits_to_keep=1)
        assert outputs.logits is not None
        return outputs.logits

    def read_chunks(
        self, cache: MemoryModelCache, text: PackedText, positions: torch.Tensor, keep_last: bool, **requested: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Encode the chunks that a text fills, open the row behind them, and return logits and requested states.

        Args:
            text: what the open row held, and the new tokens.
            positions (`torch.LongTensor` of shape `(B, T)`): of the new tokens in that text.
            keep_last (`bool`): whether logits are wanted after the last token only.

        Returns:
            logits `(B, T, V)`, or `(B, 1, V)` where the open row alone gives them; and the states.
        """
        context = self.gather_memories(text, cache.memories, cache.memory_mask)
        cache.keep(text, context, self.config.chunk_length)
        # Sharded processes must call the decoder equally often. There no row is opened, and the unfinished chunk is
        # read again with each token; so it is where the decoder's state cannot go on, see `note_decoder`.
        logits = self.open_row(cache) if self.keeps_row and not self.is_sharded() else None
        if logits is not None and keep_last and not requested:
            return logits, {}
        logits, states = self.decode_text(text, context, **requested)
        positions = positions.clamp(max=text.ids.shape[1] - 1)
        return take(logits, positions), states_at(states, positions)

    def continue_text(
        self,
        cache: MemoryModelCache,
        text: PackedText,
        memories: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
        logits_to_keep: int,
        requested: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Read a text `(B, T)` behind the tokens that the cache has read, in the open row or in new ones.

        Args:
            memories, memory_mask: of chunks before the text; only for a cache that has read nothing.
            logits_to_keep (`int`): for how many last tokens logits are returned; 0: for all.
            requested: see [`requested_states`].

        Returns:
            logits `(B, T or logits_to_keep, V)`, and the states that were requested.
        """
        num_new = text.ids.shape[1]
        cache.start(text, memories, memory_mask)
        note_writer(cache, self, num_new)
        as_given = text.order.argsort(dim=1)
        cache.note_text(take(text.ids, as_given), take(text.is_token, as_given))
        num_open = cache.unfinished_chunk()[1].sum(-1, keepdim=True)
        open_text = cache.unfinished_text(text)
        if cache.row is not None and open_text.is_token.sum(-1).max() < self.config.chunk_length:
            logits, states = self.continue_row(cache, text, num_open + text.is_token.cumsum(-1), **requested)
            cache.ids, cache.is_token = open_text.ids, open_text.is_token
        else:
            positions = num_open + torch.arange(num_new, device=num_open.device)
            logits, states = self.read_chunks(cache, open_text, positions, logits_to_keep == 1, **requested)
        cache.num_tokens += num_new
        if logits.shape[1] == num_new:
            positions = packed_positions(text)
            logits, states = take(logits, positions[:, -logits_to_keep:]), states_at(states, positions)
        return logits, states

    @functools.wraps(GenerationMixin.generate)
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as the library does; behind a cache, ids may be the new text alone or all of it.

        See [`continue_from`].
        """
        cache = one_memory(kwargs.get("past_key_values"), kwargs.get("cache"), warn=False)
        settings = generation_settings(self, generation_config, kwargs)
        kwargs = continue_from(inputs, settings, kwargs)
        if isinstance(cache, MemoryModelCache) and cache.is_initialized:
            self.check_cache(cache, kwargs.get("memories"), None)
            ids = kwargs["input_ids"] if inputs is None else inputs
            cache.num_ahead = kwargs["attention_mask"].shape[1] - ids.shape[1]
        with repeated_rows(cache, settings):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare inputs as the library does, with only those ids that the cache has not read."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if kwargs.get("use_cache", self.config.use_cache):
            check_routers(self)
        cache = inputs.get(MEMORY_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            inputs["input_ids"] = input_ids[:, cache.get_seq_length() - cache.num_ahead :]
            if inputs["input_ids"].shape[1] == 0 and self.is_sharded():
                inputs["input_ids"] = input_ids[:, -1:]  # these texts have ended, those of another process have not
            inputs.pop("memories", None)
            inputs.pop("memory_mask", None)
        return inputs

    @torch.no_grad()
    def encode(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the memories of all chunks but the last, and the last chunk, for `generate(**rest, **memories)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): the documents.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens.

        Returns:
            `memories` `(B, M, K, D)` with `memory_mask` `(B, M)`, the latest last; and `input_ids` `(B, R)` with
            `attention_mask` `(B, R)` of the rest, 1 to `chunk_length` tokens a row, padded on the left. A row of one
            chunk or less is all rest.

        Raises:
            ValueError: if there is nothing to encode, as no row is longer than a chunk.
        """
        text = pack_text(self.to_device(input_ids), attention_mask)
        length, lengths = self.config.chunk_length, text.is_token.sum(-1)
        num_chunks = (lengths - 1) // length
        if num_chunks.max() == 0:
            raise ValueError(
                f"The longest text has {lengths.max().item()} tokens, no more than a chunk of chunk_length={length}: "
                "there is nothing to encode. Pass it to `generate` as it is."
            )
        num_encoded = num_chunks * length
        memories, memory_mask = self.encode_full_chunks(text.ids, num_encoded)
        rest, is_rest = slice_rows(text.ids, num_encoded[:, None], (lengths - num_encoded)[:, None])
        order, rest_order = right_aligned(memory_mask), right_aligned(is_rest)
        return (
            {"memories": take(memories, order), "memory_mask": take(memory_mask, order)},
            {"input_ids": take(rest, rest_order), "attention_mask": take(is_rest, rest_order).long()},
        )

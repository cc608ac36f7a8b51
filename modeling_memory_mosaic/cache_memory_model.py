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
"""Cache of a memory model: the memories of finished chunks, and the unfinished chunk with its decoder row.

Shapes are those of `modeling_memory_model.py`; P is the number of tokens in the unfinished chunk.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .cache_memory_mosaic import ReadText, check_num_rows
from .layout_memory_model import PackedText, TextMemories, left_aligned, right_aligned, slice_rows, take


class MemoryModelCache(ReadText, Cache):
    """Cache of a text that a memory model reads: memories of finished chunks, and the unfinished chunk.

    The decoder's own cache holds one row: the slots of memories, and at most `chunk_length` others. The ids of the
    whole text are kept besides, eight bytes a token. The model makes such a cache in `generate` and with
    `use_cache=True`.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget all that was read."""
        self.num_tokens = 0  # columns that were read, padding included
        self.num_ahead = 0  # how many of these are not among the ids that `generate` was given
        self.forget_text()
        # The unfinished chunk, padding behind its tokens, (B, P).
        self.ids: torch.Tensor | None = None
        self.is_token: torch.Tensor | None = None
        # The latest memory last, (B, M, K, D) and (B, M).
        self.memories: torch.Tensor | None = None
        self.memory_mask: torch.Tensor | None = None
        # The decoder's cache of the open row, and the mask of its slots (B, slots).
        self.row: DynamicCache | None = None
        self.row_mask: torch.Tensor | None = None

    def __bool__(self) -> bool:
        return True  # the length counts layers, and there are none

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.num_tokens > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns were read, padding included."""
        return self.num_tokens

    def num_rows(self) -> int:
        """Return the batch size; 0 before anything was read."""
        return 0 if self.ids is None else self.ids.shape[0]

    def num_row_slots(self) -> int:
        """Return how many slots the decoder's cache holds now."""
        return 0 if self.row is None else self.row.get_seq_length()

    def new_columns(self, attention_mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Return the part `(B, num_new)` of a mask `(B, past + num_new)` that covers the new tokens.

        Raises:
            ValueError: if the mask does not cover all tokens.
        """
        if attention_mask.shape[-1] != self.num_tokens + num_new:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens, but {self.num_tokens} were read and "
                f"{num_new} are new: it must cover all {self.num_tokens + num_new}."
            )
        return attention_mask[:, self.num_tokens :]

    def start(self, text: PackedText, memories: torch.Tensor | None, memory_mask: torch.Tensor | None) -> None:
        """Take over the memories that are given ahead of the first text.

        Raises:
            ValueError: if texts were read before, of another number of rows than `text`.
        """
        if self.ids is None:
            self.ids, self.is_token = text.ids[:, :0], text.is_token[:, :0]
            self.memories, self.memory_mask = memories, memory_mask
        else:
            check_num_rows(self.ids.shape[0], text.ids.shape[0])

    def unfinished_chunk(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids `(B, P)` of the unfinished chunk, and which are tokens `(B, P)`."""
        assert self.ids is not None and self.is_token is not None
        return self.ids, self.is_token

    def finished_memories(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the memories `(B, M, K, D)` of all finished chunks, and their mask `(B, M)`."""
        assert self.memories is not None and self.memory_mask is not None
        return self.memories, self.memory_mask

    def unfinished_text(self, text: PackedText) -> PackedText:
        """Return the text that consists of the unfinished chunk and, behind it, a new text."""
        ids, is_token = self.unfinished_chunk()
        ids, is_token = torch.cat([ids, text.ids], dim=1), torch.cat([is_token, text.is_token], dim=1)
        order = left_aligned(is_token)
        return PackedText(take(ids, order), take(is_token, order), order)

    def keep(self, text: PackedText, context: TextMemories, chunk_length: int) -> None:
        """Keep the memories of a text, and its tokens behind the last full chunk of each row."""
        num_tokens = text.is_token.sum(-1, keepdim=True)
        starts, num_rest = num_tokens // chunk_length * chunk_length, num_tokens % chunk_length
        self.ids, self.is_token = slice_rows(text.ids, starts, num_rest)
        order = right_aligned(context.mask)[:, -max(1, int(context.mask.sum(-1).max())) :]
        self.memories, self.memory_mask = take(context.memories, order), take(context.mask, order)

    def start_row(self, decoder_config: PreTrainedConfig) -> None:
        """Begin a new decoder row, without any slot."""
        self.row, self.row_mask = DynamicCache(config=decoder_config), None

    def extend_row_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Add the mask `(B, W)` of new slots, and return the mask `(B, slots + W)` of the whole row."""
        self.row_mask = mask if self.row_mask is None else torch.cat([self.row_mask, mask], dim=1)
        return self.row_mask

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._map_text(function)
        for name in ("ids", "is_token", "memories", "memory_mask", "row_mask"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        if self.row is not None:
            self.row.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        if self.row is not None:
            self.row.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])
        if self.row is not None:
            self.row.batch_select_indices(indices)

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: tokens of a finished chunk are not kept where they could be taken back."""
        raise RuntimeError(
            "A memory model cannot take tokens back, as the memory of a finished chunk does not hold them. Decode "
            "without an assistant, or read the shorter text from its beginning."
        )


__all__ = ["MemoryModelCache"]

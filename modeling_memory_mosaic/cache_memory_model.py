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
"""What a memory model has read of a text that goes on."""

import torch
from transformers.cache_utils import Cache, DynamicCache

from .cache_memory_mosaic import ReadText
from .layout_memory_model import PackedText, left_aligned, take


class MemoryModelCache(ReadText, Cache):
    """What a memory model has read: memories of finished chunks, and of the unfinished one its ids and decoder row.

    The decoder's own cache holds one row: at most `chunk_length` slots, and those of the memories. Made by the model
    itself, in `generate` or with `use_cache=True`. Besides, the ids of the whole text are kept, eight bytes a token.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        self.num_tokens = 0  # columns read so far, padding included
        self.num_ahead = 0  # of these, how many stand before the ids that `generate` was given
        self.forget_text()
        self.ids = self.is_token = None  # (B, P): of the unfinished chunk, padding behind
        self.memories = self.memory_mask = None  # (B, M, K, D) and (B, M), the latest last
        self.row: DynamicCache | None = None
        self.row_mask = None  # (B, slots of the row)

    def __bool__(self) -> bool:
        return True  # though it has no layers of its own, which is what its length counts

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.num_tokens > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def num_rows(self) -> int:
        """Rows of what was read; 0 before anything was."""
        return 0 if self.ids is None else self.ids.shape[0]

    def num_row_slots(self) -> int:
        """Slots that the decoder's cache holds at this moment."""
        return 0 if self.row is None else self.row.get_seq_length()

    def start(
        self,
        ids: torch.Tensor,
        is_token: torch.Tensor,
        memories: torch.Tensor | None,
        memory_mask: torch.Tensor | None,
    ) -> None:
        """Begin with the given memories if nothing was read before ids `(B, T)`. Raise for another batch size."""
        if self.ids is None:
            self.ids, self.is_token = ids[:, :0], is_token[:, :0]
            self.memories, self.memory_mask = memories, memory_mask
        elif self.ids.shape[0] != ids.shape[0]:
            raise ValueError(
                f"The cache has read {self.ids.shape[0]} rows, but {ids.shape[0]} are passed: they must be as many."
            )

    def open_text(self, ids: torch.Tensor, is_token: torch.Tensor) -> PackedText:
        """Return the text of the unfinished chunk and of new ids `(B, T)` behind it."""
        ids, is_token = torch.cat([self.ids, ids], dim=1), torch.cat([self.is_token, is_token], dim=1)
        order = left_aligned(is_token)
        return PackedText(take(ids, order), take(is_token, order), order)

    def new_columns(self, attention_mask: torch.Tensor, num_new: int) -> torch.Tensor:
        """Return the part `(B, T)` of a mask `(B, past + T)` for the `num_new` tokens that are not read yet."""
        if attention_mask.shape[-1] != self.num_tokens + num_new:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens, but {self.num_tokens} were read and "
                f"{num_new} are new: it must cover all {self.num_tokens + num_new}."
            )
        return attention_mask[:, self.num_tokens :]

    def _map_rows(self, function) -> None:
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

    def crop(self, *args, **kwargs) -> None:
        raise RuntimeError(
            "A memory model cannot take tokens back: the memory of a finished chunk does not tell them. Decode "
            "without an assistant, or read the shorter text anew."
        )


__all__ = ["MemoryModelCache"]

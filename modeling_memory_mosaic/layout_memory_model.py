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
"""Layout of a memory model's texts: padding is moved behind the tokens, texts become chunks, and chunks become rows.

A row of the decoder holds the memories that the chunk sees, the task slot (BEGIN or COPY), and the chunk's tokens but
the last one. The state at a slot predicts the next token, so the task slot predicts the chunk's first one.

Shapes are those of `modeling_memory_model.py`. S is the number of memories that a row sees, W of tokens in a row.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import is_torchdynamo_compiling

from .configuration_memory_model import MemoryModelConfig
from .masking_memory_mosaic import DOCUMENT_MARKS, raise_where
from .ops_memory_mosaic import embed_ids


# Rows of `slot_embeddings`: two tasks, and what stands in place of hidden tokens.
BEGIN, COPY, BLANK = range(3)


class PackedText(NamedTuple):
    """A text whose padding stands behind the tokens of each row.

    Args:
        ids (`torch.LongTensor` of shape `(B, T)`).
        is_token (`torch.Tensor` of shape `(B, T)`): False at padding.
        order (`torch.LongTensor` of shape `(B, T)`): the column of the caller's text that each one was taken from.
    """

    ids: torch.Tensor
    is_token: torch.Tensor
    order: torch.Tensor


class TextMemories(NamedTuple):
    """The memories of a text's full chunks, behind memories that were given with it.

    Args:
        memories (`torch.Tensor` of shape `(B, N, K, D)`): given ones are padded on the left, new ones on the right.
        mask (`torch.Tensor` of shape `(B, N)`): False where there is no memory.
        num_given (`int`): how many of the N were given, padding included.
    """

    memories: torch.Tensor
    mask: torch.Tensor
    num_given: int


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `(*index.shape, ...)`: each row's entries of `(B, N, ...)` at `index` `(B, ...)` of the dimension N."""
    rows = torch.arange(index.shape[0], device=index.device).view(-1, *[1] * (index.ndim - 1))
    return tensor[rows, index]


def left_aligned(is_token: torch.Tensor) -> torch.Tensor:
    """Return the order `(B, T)` of positions that puts tokens first and padding last; both keep their own order."""
    return is_token.long().argsort(dim=1, descending=True, stable=True)


def right_aligned(is_token: torch.Tensor) -> torch.Tensor:
    """Return the order `(B, T)` of positions that puts padding first and tokens last; both keep their own order."""
    return is_token.long().argsort(dim=1, stable=True)


def check_packing(kwargs: Mapping[str, Any]) -> None:
    """Raise if arguments of a forward mark several documents in a row."""
    for name in DOCUMENT_MARKS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} is not supported, as chunks are counted from each row's first token: give each document "
                "a row of its own."
            )


def pack_text(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None, is_first: bool = True
) -> PackedText:
    """Move all padding behind the tokens of each row.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`).
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens.
        is_first (`bool`): whether the text begins here. A row of a text that goes on may be all padding.

    Raises:
        ValueError: if there are no ids, a text is empty, or the mask has another shape or other values than 0 and 1.
    """
    if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids have shape {shape}: they must be (batch, tokens), with at least one of each.")
    if attention_mask is None:
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        order = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return PackedText(input_ids, is_token, order)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of the ids, "
            f"{tuple(input_ids.shape)}."
        )
    raise_where(
        (attention_mask != 0) & (attention_mask != 1), "attention_mask must hold 1 at tokens and 0 at padding."
    )
    is_token = attention_mask.to(input_ids.device, torch.bool)
    if is_first:
        is_empty = ~is_token.any(-1)
        row = "A row" if is_torchdynamo_compiling() else f"Row {is_empty.long().argmax().item()}"
        raise_where(is_empty, f"{row} is empty: attention_mask leaves it no token.")
    order = left_aligned(is_token)
    return PackedText(take(input_ids, order), take(is_token, order), order)


def packed_positions(text: PackedText) -> torch.Tensor:
    """Return where each column of the caller's text stands in the packed text, `(B, T)`.

    Padding has the position of the token before it, as `generate` takes the prediction behind a padded text there.
    """
    return (take(text.is_token, text.order.argsort(dim=1)).cumsum(dim=1) - 1).clamp(min=0)


def slice_rows(ids: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `lengths` `(B, 1)` ids of each row of `(B, T)`, from `starts` `(B, 1)` on.

    Returns:
        ids `(B, R)`, R the largest length, and which of them are within their row's slice `(B, R)`.
    """
    index = torch.arange(int(lengths.max()), device=ids.device)
    return take(ids, (starts + index).clamp(max=ids.shape[1] - 1)), index < lengths


def split_into_chunks(ids: torch.Tensor, lengths: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split packed texts `(B, T)` of `lengths` `(B,)` tokens into chunks of `length` tokens.

    Returns:
        chunks `(B * N, L)`, and which of them are full `(B, N)`. N is the number of full chunks of the longest text;
        in a compiled graph, the number that T columns could hold.
    """
    num_columns = ids.shape[1]
    if not is_torchdynamo_compiling():
        num_chunks = int(lengths.max()) // length
    else:
        # A graph cannot depend on how many chunks are full, so it takes all that fit. Where T is symbolic it takes one
        # more, as a graph is specialised to a dimension of size 1.
        num_chunks = num_columns // length + (not isinstance(num_columns, int))
    is_full = torch.arange(num_chunks, device=ids.device) < (lengths // length)[:, None]
    return F.pad(ids, (0, num_chunks * length - num_columns)).reshape(-1, length), is_full


def embed_tokens(backbone: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return token embeddings `(..., C)` of ids `(...)`.

    Raises:
        ValueError: if an id is not below `vocab_size`, or the token table is a unit of FSDP2.
    """
    table = backbone.get_input_embeddings()
    if hasattr(backbone, "unshard") and not hasattr(table, "unshard"):
        # A unit of FSDP2 collects its weights for its own forward, and would lose the gradient of this use of them.
        raise ValueError(
            f"The token table of a {type(backbone).__name__} is used besides its forward, so that it cannot be a unit "
            "of FSDP2: make its layers units, or the whole encoder, and leave the table to the unit above."
        )
    return embed_ids(table, ids, backbone.config.vocab_size)


def count_positions(backbone: PreTrainedModel) -> int | None:
    """Return how many slots a model with a table of learnt positions can read; `None` without such a table."""
    limit = getattr(backbone.config, "max_position_embeddings", None)
    tokens = backbone.get_input_embeddings()
    tables = [part for part in backbone.modules() if isinstance(part, nn.Embedding) and part is not tokens]
    return limit if limit is not None and any(table.num_embeddings >= limit for table in tables) else None


def visible_memories(
    memories: torch.Tensor, memory_mask: torch.Tensor, ends: torch.Tensor, max_end: int, config: MemoryModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the memories that each row sees: those before its end, at most `max_memories` of them.

    Args:
        memories (`torch.Tensor` of shape `(B, N, K, D)`), memory_mask (`torch.Tensor` of shape `(B, N)`).
        ends (`torch.Tensor` of shape `(B, R)`): how many of the N memories stand before each row.
        max_end (`int`): the largest of the ends.

    Returns:
        memories `(B, R, S, K, D)`, the latest last, and their mask `(B, R, S)`.
    """
    if is_torchdynamo_compiling() and memories.shape[1] > 0:
        # A graph cannot compare N with the end, so it takes more memories than there are; the mask leaves them out.
        num_visible = config.max_memories
        num_visible = max_end + config.unroll_window if num_visible is None else num_visible
    else:
        num_visible = min(memories.shape[1], max_end)
        if config.max_memories is not None:
            num_visible = min(num_visible, config.max_memories)
    index = ends[..., None] + torch.arange(-num_visible, 0, device=ends.device)
    within = index.clamp(0, max(memories.shape[1] - 1, 0))
    return take(memories, within), take(memory_mask, within) & (index == within)


def zero_from(tensor: torch.Tensor) -> torch.Tensor:
    """Return a scalar that is exactly 0, whatever the tensor holds, and gives the tensor a gradient of zeros."""
    return tensor[:0].sum()


class MemoryModelReader(nn.Module):
    """Builds the decoder's rows: slots of memories, the task slot, and the tokens."""

    def __init__(self, config: MemoryModelConfig):
        super().__init__()
        self.config = config
        width, window = config.decoder.hidden_size, config.unroll_width
        self.slot_embeddings = nn.Parameter(torch.empty(3, width))  # BEGIN, COPY, BLANK
        self.chunk_positions: nn.Parameter | None = None
        if config.decoder_chunk_positions:
            self.chunk_positions = nn.Parameter(torch.empty(config.chunk_length, width))
        is_unrolled = config.memory_read == "unrolled_prefix"
        self.prefix_proj = nn.Linear(window if is_unrolled else config.memory_size, width, bias=False)
        num_added = config.unroll_window if config.memory_read == "unroll_add" else 0
        self.unroll_projs = nn.ModuleList(nn.Linear(window, width, bias=False) for _ in range(num_added))

    def windows(self, memories: torch.Tensor, positions: torch.Tensor, num_positions: int) -> torch.Tensor:
        """Return `(..., W, unroll_width)`: the window of memories `(..., K, D)` for each of `positions` `(..., W)`.

        A window is `unroll_width` successive numbers of the memory's `K * D`, and goes on at the first number behind
        the last. The windows of `num_positions` positions begin at equal distances.
        """
        numbers = memories.flatten(-2)
        size = numbers.shape[-1]
        starts = positions * size // num_positions
        index = (starts[..., None] + torch.arange(self.config.unroll_width, device=positions.device)) % size
        if index.ndim == 2:  # the same positions in all rows
            return numbers[..., index]
        return numbers.gather(-1, index.flatten(-2)).unflatten(-1, index.shape[-2:])

    def embed_prefix(self, memories: torch.Tensor) -> torch.Tensor:
        """Return the slots `(..., slots, C)` that stand for memories `(..., K, D)` in front of a chunk."""
        if self.config.memory_read != "unrolled_prefix":
            return self.prefix_proj(memories)
        slots = torch.arange(self.config.slots_per_memory, device=memories.device)
        return self.prefix_proj(self.windows(memories, slots, self.config.slots_per_memory))

    def add_chunk_features(
        self, inputs: torch.Tensor, memories: torch.Tensor, memory_mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Add to inputs `(B, R, W, C)` what depends on their position: learnt vectors, and the latest memories.

        Args:
            memories (`torch.Tensor` of shape `(B, R, S, K, D)`): the latest one last.
            memory_mask (`torch.Tensor` of shape `(B, R, S)`): False where there is no memory.
            positions (`torch.LongTensor` of shape `(W,)` or `(B, R, W)`): within the row; 0 is the task slot.
        """
        if self.chunk_positions is not None:
            inputs = inputs + self.chunk_positions[positions]
        num_visible = memories.shape[2]
        unused: list[Any] = [self.prefix_proj] if num_visible == 0 else []
        for back, proj in enumerate(self.unroll_projs, start=1):
            if back > num_visible:
                unused.append(proj)
                continue
            windows = self.windows(memories[:, :, -back], positions, self.config.chunk_length)
            inputs = inputs + proj(windows) * memory_mask[:, :, -back, None, None]
        for proj in unused if torch.is_grad_enabled() else []:
            # Data parallelism waits for a gradient of every weight in every batch, so unused weights are applied to
            # zeros.
            inputs = inputs + proj(memories.new_zeros(1, proj.in_features) + zero_from(memories))
        return inputs

    def forward(
        self,
        tokens: torch.Tensor,
        is_token: torch.Tensor,
        memories: torch.Tensor,
        memory_mask: torch.Tensor,
        positions: torch.Tensor | None = None,
        task: int | None = None,
        is_blank: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decoder's inputs and their mask. The slots of absent memories are exactly 0.

        This is the only use of the reader's parameters, so hooks that fetch offloaded weights run in time.

        Args:
            tokens (`torch.Tensor` of shape `(B, R, W, C)`): embeddings of the chunk's tokens.
            is_token (`torch.Tensor` of shape `(B, R, W)`): False at padding, which stands behind the tokens.
            memories (`torch.Tensor` of shape `(B, R, S, K, D)`): the latest one last.
            memory_mask (`torch.Tensor` of shape `(B, R, S)`): False where there is no memory.
            positions (`torch.LongTensor` of shape `(B, R, W)`, *optional*): of tokens that continue an open row.
            task (`int`, *optional*): [`BEGIN`] or [`COPY`] for a new row; absent for an open one.
            is_blank (`bool`): whether the tokens are hidden.

        Returns:
            inputs `(B, R, slots + 1 + W, C)` and mask `(B, R, slots + 1 + W)` of new rows; `(B, R, W, C)` and
            `(B, R, W)` of an open row, which holds its memories and its task slot already.
        """
        if is_blank:
            blank_inputs = self.slot_embeddings[BLANK].expand_as(tokens)
            tokens = blank_inputs + zero_from(tokens)
        if task is not None:
            task_inputs = self.slot_embeddings[task].expand(*tokens.shape[:-2], 1, -1)
            tokens, is_token = torch.cat([task_inputs, tokens], dim=-2), F.pad(is_token, (1, 0), value=True)
            positions = torch.arange(tokens.shape[2], device=tokens.device)
        assert positions is not None
        inputs = self.add_chunk_features(tokens, memories, memory_mask, positions)
        if task is None or memories.shape[2] == 0:
            return inputs, is_token
        slots = self.embed_prefix(memories) * memory_mask[..., None, None]
        slot_mask = memory_mask[..., None].expand(slots.shape[:-1]).flatten(2)
        return torch.cat([slots.flatten(2, 3), inputs], dim=2), torch.cat([slot_mask, is_token], dim=2)

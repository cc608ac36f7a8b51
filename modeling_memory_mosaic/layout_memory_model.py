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
from transformers.utils.import_utils import is_fake_tensor

from .configuration_memory_model import MemoryModelConfig
from .masking_memory_mosaic import DOCUMENT_MARKS, raise_where
from .ops_memory_mosaic import embed_ids


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


def without_leading_padding(inputs: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `(B, R, slots, C)` and their mask without the first slots that are empty in all of them.

    Some releases of transformers let the state of a recurrent model run over the padding of a single row.
    """
    if is_torchdynamo_compiling() or is_fake_tensor(mask):
        return inputs, mask
    first = int(mask.flatten(0, 1).any(0).long().argmax())
    return inputs[:, :, first:], mask[:, :, first:]

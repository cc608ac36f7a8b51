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
"""Objectives of a memory model besides the next token: the decoder reconstructs chunks from their memories.

- autoencoding: each full chunk from its own memory alone; its tokens are hidden.
- copy: the first half of a text's full chunks a second time, behind the memories of the first time.
- blank copy: the same, with the tokens of the second time hidden.

Shapes are those of `modeling_memory_model.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.modeling_utils import PreTrainedModel

from .configuration_memory_model import OBJECTIVES, MemoryModelConfig
from .layout_memory_model import PackedText, TextMemories, embed_tokens, take
from .ops_memory_mosaic import at_least_float32
from .reads_memory_model import COPY


class ReconstructionRows(NamedTuple):
    """Chunks to reconstruct, one for each row of the decoder, and the memories that the rows see.

    Args:
        chunks (`torch.LongTensor` of shape `(B', R', L)`): ids, which are the targets too.
        memories (`torch.Tensor` of shape `(B', N, K, D)`), memory_mask (`torch.Tensor` of shape `(B', N)`).
        ends (`torch.Tensor` of shape `(R',)` or `(B', R')`): how many of the memories stand before each row.
        max_end (`int`): the largest of the ends.
        is_blank (`bool`): whether the tokens are hidden.
        is_row (`torch.Tensor` of shape `(B, R)`, `B R = B' R'`): which rows are real.
    """

    chunks: torch.Tensor
    memories: torch.Tensor
    memory_mask: torch.Tensor
    ends: torch.Tensor
    max_end: int
    is_blank: bool
    is_row: torch.Tensor


def autoencoding_rows(
    ids: torch.Tensor, memories: torch.Tensor, memory_mask: torch.Tensor, config: MemoryModelConfig
) -> ReconstructionRows:
    """Return a row for each full chunk of packed texts `(B, T)`, which sees this chunk's memory and no other."""
    # Each chunk is a text of its own here, so no row can see the memory of another chunk.
    memory, is_memory = memories.flatten(0, 1)[:, None], memory_mask.flatten()[:, None]
    chunks = ids[:, : memory_mask.shape[1] * config.chunk_length].reshape(memory.shape[0], 1, -1)
    ends = is_memory.new_ones(1, dtype=torch.long)
    return ReconstructionRows(chunks, memory, is_memory, ends, 1, True, memory_mask)


def copy_rows(
    objective: str, ids: torch.Tensor, memories: torch.Tensor, num_full: torch.Tensor, config: MemoryModelConfig
) -> ReconstructionRows:
    """Return a row for each chunk in the first half of the `num_full` `(B,)` full chunks of packed texts `(B, T)`.

    A row sees the memories of that whole half, and behind them those of the chunks that are copied before it.

    Raises:
        ValueError: if `max_memories` hides the memory of the chunk to copy.
    """
    length, half = config.chunk_length, (num_full // 2)[:, None]
    num_rows = int(half.max())
    if config.max_memories is not None and config.max_memories < num_rows:
        raise ValueError(
            f"{objective} of {num_rows} chunks reads the memory of so many chunks ago, but max_memories="
            f"{config.max_memories}: give shorter texts, raise max_memories, or set {objective}_weight=0."
        )
    rows, index = torch.arange(num_rows, device=ids.device), torch.arange(2 * num_rows, device=ids.device)
    # A copied chunk has the memory of the original, so the same half of the memories stands there twice.
    twice = take(memories, torch.where(index < half, index, (index - half).clamp(0, num_rows - 1)))
    chunks = ids[:, : num_rows * length].unflatten(1, (num_rows, length))
    is_blank = objective == "blank_copy"
    return ReconstructionRows(chunks, twice, index < 2 * half, half + rows, 2 * num_rows - 1, is_blank, rows < half)


def reconstruction_rows(
    objective: str, text: PackedText, context: TextMemories, config: MemoryModelConfig
) -> ReconstructionRows:
    """Return the rows by which an objective reconstructs a text from the memories of its chunks.

    Raises:
        ValueError: if no text is long enough, or `max_memories` hides the memory of a chunk.
    """
    memories, memory_mask = context.memories[:, context.num_given :], context.mask[:, context.num_given :]
    num_full = memory_mask.sum(-1)
    needed = 1 if objective == "autoencoding" else 2
    if num_full.max() < needed:
        raise ValueError(
            f"{objective} needs {needed} full chunk(s) of chunk_length={config.chunk_length}, but the longest text "
            f"has {text.is_token.sum(-1).max().item()} tokens: give longer texts, or set {objective}_weight=0."
        )
    if objective == "autoencoding":
        return autoencoding_rows(text.ids, memories, memory_mask, config)
    return copy_rows(objective, text.ids, memories, num_full, config)


def reconstruction_loss(logits: torch.Tensor, targets: torch.Tensor, is_row: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of logits `(B, R, L, V)` at targets `(B, R, L)` in real rows `(B, R)`, in nats."""
    return F.cross_entropy(at_least_float32(logits[is_row].flatten(0, 1)), targets[is_row].flatten())


class MemoryModelObjectives:
    """The losses of a memory model, and the reconstructions that they measure."""

    # Parts of the model that this class is mixed into.
    config: MemoryModelConfig
    decoder: PreTrainedModel
    decode_rows: Callable[..., tuple[torch.Tensor, dict[str, Any]]]
    loss_function: Callable[..., torch.Tensor]

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each objective's loss."""
        return {objective: getattr(self.config, f"{objective}_weight") for objective in OBJECTIVES}

    def check_causal_only(self) -> None:
        """Raise if the loss has other parts than that of the next token."""
        weights = {f"{objective}_weight": weight for objective, weight in self.loss_weights().items()}
        if any(weight != (name == "causal_weight") for name, weight in weights.items()):
            raise ValueError(
                f"The loss of the next token is computed outside of this model, which leaves its own out: {weights}. "
                "Set causal_weight=1 and the others to 0, or train with `transformers.Trainer`."
            )

    def reconstruct(
        self, objective: str, text: PackedText, context: TextMemories
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the decoder predicts of chunks that it sees as memories, for losses and for measures.

        Args:
            objective (`str`): `"autoencoding"`, `"copy"` or `"blank_copy"`.
            context: the text's memories, see [`~MemoryModelForCausalLM.gather_memories`]; given ones are left out.

        Returns:
            logits `(B, R, L, V)`, targets `(B, R, L)`, and which rows are real, `(B, R)`.

        Raises:
            ValueError: if no text is long enough, or `max_memories` hides the memory of a chunk.
        """
        rows = reconstruction_rows(objective, text, context, self.config)
        tokens = embed_tokens(self.decoder, rows.chunks[..., :-1])
        is_token = torch.ones_like(rows.chunks[..., :-1], dtype=torch.bool)
        visible = (rows.memories, rows.memory_mask, rows.ends, rows.max_end)
        logits, _ = self.decode_rows(tokens, is_token, *visible, COPY, rows.is_blank)
        shape = rows.is_row.shape
        return logits.flatten(0, 1).unflatten(0, shape), rows.chunks.flatten(0, 1).unflatten(0, shape), rows.is_row

    def losses(
        self,
        logits: torch.Tensor | None,
        text: PackedText,
        labels: torch.Tensor,
        context: TextMemories,
        loss_kwargs: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Return the parts of the loss whose weight is positive, each a mean over its targets, in nats.

        Args:
            logits (`torch.Tensor` of shape `(B, T, V)`, *optional*): after each packed token; for the causal loss.
            labels (`torch.Tensor` of shape `(B, T)`): of the packed tokens; -100 is ignored.
            loss_kwargs (`Mapping`): for the causal loss. `num_items_in_batch` applies to all parts.
        """
        labels = labels.masked_fill(~text.is_token, -100)
        num_items = loss_kwargs.get("num_items_in_batch")
        # Gradient accumulation sums the losses of a batch's parts, so each part counts by its share of the targets.
        share = 1.0 if num_items is None else (labels[:, 1:] != -100).sum() / num_items
        parts = {}
        for objective, weight in self.loss_weights().items():
            if weight == 0:
                continue
            if objective == "causal":
                vocab_size = self.config.decoder.vocab_size
                parts[objective] = self.loss_function(
                    logits=logits, labels=labels, vocab_size=vocab_size, **loss_kwargs
                )
            else:
                parts[objective] = share * reconstruction_loss(*self.reconstruct(objective, text, context))
        return parts

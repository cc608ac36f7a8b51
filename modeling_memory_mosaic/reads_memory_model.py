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
"""Reads of a memory model: how the memories of earlier chunks reach a row of the decoder.

- prefix: each vector of a memory, or each of several windows of it, is a slot in front of the row.
- additive: besides, each token gets a window of the latest memories added, behind a gate or not.
- cross-attention: no slot; each token attends to windows of all memories, and what it reads is added.

Gates, and what cross-attention adds, begin at 0: a new model decodes as if these had no memories to read.

Shapes are those of `modeling_memory_model.py`. S is the number of memories that a row sees, W of tokens in a row, U of
numbers in a window, J of windows of a memory.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .configuration_memory_model import ADDITIVE_READS, MemoryModelConfig


# Rows of `slot_embeddings`: two tasks, and what stands in place of hidden tokens.
BEGIN, COPY, BLANK = range(3)
# How many frequencies describe the distance of a memory, and the longest wave, in chunks.
NUM_FREQUENCIES, LONGEST_WAVE = 16, 10_000.0


def zero_from(tensor: torch.Tensor) -> torch.Tensor:
    """Return a scalar that is exactly 0, whatever the tensor holds, and gives the tensor a gradient of zeros."""
    return tensor[:0].sum()


def scaled(states: torch.Tensor) -> torch.Tensor:
    """Return states `(..., C)` at a root mean square of 1: token tables of models differ by factors in scale."""
    return F.rms_norm(states, states.shape[-1:])


def distance_waves(num_visible: int, like: torch.Tensor) -> torch.Tensor:
    """Return `(S, 2 * NUM_FREQUENCIES)`: sines and cosines of how many chunks ago each memory was, the latest last."""
    options: Any = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    distances = torch.arange(num_visible, 0, -1, **options)
    exponents = torch.arange(NUM_FREQUENCIES, **options) / NUM_FREQUENCIES
    angles = distances[:, None] * LONGEST_WAVE**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


def read_heads(decoder: PreTrainedConfig) -> int:
    """Return the heads of cross-attention: those of the decoder, as far as they divide its width."""
    return math.gcd(getattr(decoder, "num_attention_heads", None) or 1, decoder.hidden_size)


class MemoryModelCrossRead(nn.Module):
    """Attention of tokens to windows of memories, and to nothing, whose value is 0."""

    def __init__(self, config: MemoryModelConfig):
        super().__init__()
        width = config.decoder.hidden_size
        self.num_heads = read_heads(config.decoder)
        self.place_embeddings = nn.Parameter(torch.empty(config.chunk_length, width))  # of the token that asks
        self.window_embeddings = nn.Parameter(torch.empty(config.slots_per_memory, width))
        self.distance_proj = nn.Linear(2 * NUM_FREQUENCIES, width, bias=False)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(config.unroll_width, width, bias=False)
        self.v_proj = nn.Linear(config.unroll_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """Return `(B * R, heads, slots, C / heads)` of states `(B, R, slots, C)`."""
        return states.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(
        self, tokens: torch.Tensor, windows: torch.Tensor, memory_mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return what tokens `(B, R, W, C)` read of windows `(B, R, S, J, U)`; exactly 0 where there is no memory.

        Args:
            memory_mask (`torch.Tensor` of shape `(B, R, S)`): False where there is no memory.
            positions (`torch.LongTensor` of shape `(W,)` or `(B, R, W)`): of the tokens in their row.
        """
        queries = self.q_proj(scaled(tokens) + self.place_embeddings[positions])
        places = self.distance_proj(distance_waves(windows.shape[2], windows))[:, None] + self.window_embeddings
        windows = scaled(windows)
        # A first key and value of zeros: a token that finds nothing reads nothing.
        keys = F.pad((self.k_proj(windows) + places).flatten(2, 3), (0, 0, 1, 0))
        values = F.pad(self.v_proj(windows).flatten(2, 3), (0, 0, 1, 0))
        is_window = memory_mask[..., None].expand(*memory_mask.shape, windows.shape[3]).flatten(2)
        mask = F.pad(is_window, (1, 0), value=True).flatten(0, 1)[:, None, None]
        queries, keys, values = (self.split_heads(states) for states in (queries, keys, values))
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(read.transpose(1, 2).flatten(2).unflatten(0, tokens.shape[:2]))


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
        self.prefix_proj = self.gate_proj = self.cross_read = None
        if config.prefix_slots > 0:
            is_unrolled = config.memory_read == "unrolled_prefix"
            self.prefix_proj = nn.Linear(window if is_unrolled else config.memory_size, width, bias=False)
        num_added = config.unroll_window if config.memory_read in ADDITIVE_READS else 0
        self.unroll_projs = nn.ModuleList(nn.Linear(window, width, bias=False) for _ in range(num_added))
        if config.memory_read == "gated_add":
            self.gate_proj = nn.Linear(width, num_added)
        elif config.memory_read == "cross_attention":
            self.cross_read = MemoryModelCrossRead(config)

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

    def windows_of_slots(self, memories: torch.Tensor) -> torch.Tensor:
        """Return the windows `(..., slots_per_memory, unroll_width)` that stand for memories `(..., K, D)`."""
        slots = torch.arange(self.config.slots_per_memory, device=memories.device)
        return self.windows(memories, slots, self.config.slots_per_memory)

    def embed_prefix(self, memories: torch.Tensor) -> torch.Tensor:
        """Return the slots `(..., slots, C)` that stand for memories `(..., K, D)` in front of a chunk."""
        assert self.prefix_proj is not None
        if self.config.memory_read != "unrolled_prefix":
            return self.prefix_proj(memories)
        return self.prefix_proj(self.windows_of_slots(memories))

    def add_chunk_features(
        self, inputs: torch.Tensor, memories: torch.Tensor, memory_mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Add to inputs `(B, R, W, C)` what depends on their position: learnt vectors, and the latest memories.

        Args:
            memories (`torch.Tensor` of shape `(B, R, S, K, D)`): the latest one last.
            memory_mask (`torch.Tensor` of shape `(B, R, S)`): False where there is no memory.
            positions (`torch.LongTensor` of shape `(W,)` or `(B, R, W)`): within the row; 0 is the task slot.
        """
        tokens, num_visible = inputs, memories.shape[2]
        if self.chunk_positions is not None:
            inputs = inputs + self.chunk_positions[positions]
        if self.cross_read is not None:
            return inputs + self.cross_read(tokens, self.windows_of_slots(memories), memory_mask, positions)
        gates = None if self.gate_proj is None else self.gate_proj(scaled(tokens)).tanh()  # (B, R, W, unroll_window)
        unused: list[Any] = [self.prefix_proj] if num_visible == 0 else []
        for back, proj in enumerate(self.unroll_projs, start=1):
            if back > num_visible:
                unused.append(proj)
                continue
            windows = self.windows(memories[:, :, -back], positions, self.config.chunk_length)
            added = proj(windows) * memory_mask[:, :, -back, None, None]
            inputs = inputs + (added if gates is None else added * gates[..., back - 1, None])
        if gates is not None and unused:
            inputs = inputs + zero_from(gates)
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
        if task is None or memories.shape[2] == 0 or self.prefix_proj is None:
            return inputs, is_token
        slots = self.embed_prefix(memories) * memory_mask[..., None, None]
        slot_mask = memory_mask[..., None].expand(slots.shape[:-1]).flatten(2)
        return torch.cat([slots.flatten(2, 3), inputs], dim=2), torch.cat([slot_mask, is_token], dim=2)

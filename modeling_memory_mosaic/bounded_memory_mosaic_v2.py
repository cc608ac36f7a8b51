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
"""Memories of Memory Mosaics v2 of a bounded number of long-term pairs, behind a line of pairs that wait.

A pair is read `long_term_delay` tokens after its own. Until then it waits in a line of `long_term_delay - 1` pairs: it
is neither rated nor forgotten, as nothing can have used it. All else is done as for v1, whose delay is 1.

Shapes use B batch, H long-term heads, T new tokens, W pairs of the line, P pairs that a head can hold, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from .bounded_memory_mosaic import BOUNDED_LAYERS, BoundedMemoryLayer, Due
from .cache_memory_mosaic import MemoryMosaicStates
from .cache_memory_mosaic_v2 import WindowStates
from .ops_memory_mosaic import at_least_float32
from .ops_memory_mosaic_v2 import alignment, rearranged


# What the line holds of each pair, `(B, H, W, D)` and for the error `(B, H, W, 1)`.
WAITING_NAMES = ("waiting_keys", "waiting_values", "waiting_error")


class MemoryMosaicV2BoundedLayer(WindowStates, BoundedMemoryLayer):
    """Holds at most `max_pairs` long-term pairs that may be read in each head, and W that wait. Made by [`bounded`].

    `waiting` holds the line, the newest pair last; `is_waiting` `(B, W)` is False where the line is not full yet.
    """

    def __init__(self, config: PreTrainedConfig, max_pairs: int, policy: Any):
        super().__init__(config, max_pairs, policy)
        settings: Any = config
        self.line_length = settings.long_term_delay - 1
        self.counts_all = settings.bandwidth_count == "total"
        self.waiting: dict[str, torch.Tensor] = {}
        self.is_waiting: torch.Tensor  # once there are pairs

    def start(self, keys: torch.Tensor) -> None:
        super().start(keys)
        self.start_line(keys)

    def start_line(self, keys: torch.Tensor) -> None:
        """Make an empty line for pairs of a batch, by keys `(B, H, T, D)` of the first."""
        batch_size, num_heads, _, width = keys.shape
        line = (batch_size, num_heads, self.line_length)
        self.waiting = {name: keys.new_zeros(*line, width) for name in WAITING_NAMES[:2]}
        self.waiting["waiting_error"] = self.counters["error"].new_zeros(*line, 1)
        self.is_waiting = torch.zeros(batch_size, self.line_length, dtype=torch.bool, device=keys.device)

    def reset(self) -> None:
        super().reset()
        self.waiting = {}

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        if self.is_initialized:
            self.waiting = {name: function(tensor) for name, tensor in self.waiting.items()}
            self.is_waiting = function(self.is_waiting)

    def is_due(self, is_full: torch.Tensor) -> torch.Tensor:
        """Return from which new tokens on a pair may be read that waited `(B, T)`, by which complete one."""
        num_before = self.is_waiting.sum(-1, keepdim=True)
        return is_full & (num_before + is_full.long().cumsum(-1) > self.line_length)

    def due_pairs(self, keys: torch.Tensor, values: torch.Tensor, is_full: torch.Tensor) -> Due:
        """Return the oldest pair of the line for each token that completes one while the line is full.

        The new pairs go to the end of the line.
        """
        is_due = self.is_due(is_full)
        is_pair = torch.cat([self.is_waiting, is_full], dim=1)
        in_order = alignment(is_pair)  # pairs last, the oldest of them first
        count = is_pair.long().cumsum(-1)  # up to each slot
        own = count[:, self.line_length :]
        place = is_pair.shape[1] - count[:, -1:] + own - 1 - self.line_length
        order = in_order.gather(1, place.clamp(min=0))
        kept = in_order[:, is_full.shape[1] :]
        parts = dict(zip(WAITING_NAMES, (keys, values), strict=False))
        all_parts = {name: torch.cat([self.waiting[name], part], dim=2) for name, part in parts.items()}
        self.waiting |= {name: rearranged(part, kept) for name, part in all_parts.items()}
        self.is_waiting = is_pair.gather(1, kept)
        due_keys, due_values = (rearranged(part, order) for part in all_parts.values())
        return Due(due_keys, due_values, is_due, order, kept, own.clamp(max=self.line_length))

    def due_errors(self, errors: torch.Tensor, due: Due) -> torch.Tensor:
        assert due.order is not None and due.kept is not None
        waiting = self.waiting["waiting_error"]
        all_errors = torch.cat([waiting, errors[..., None].to(waiting.dtype)], dim=2)
        self.waiting["waiting_error"] = rearranged(all_errors, due.kept)
        return rearranged(all_errors, due.order)[..., 0]

    def scaled_queries(
        self,
        queries: torch.Tensor,
        is_seen: torch.Tensor,
        due: Due,
        beta: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        if beta is None:  # of pairs that are taken over, which nothing reads yet
            return queries
        num_pairs = is_seen.sum(-1)
        if self.counts_all and due.num_waiting is not None:
            num_pairs = num_pairs + due.num_waiting
        return at_least_float32(queries) * beta(num_pairs)

    def kept_pairs(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `(1, H, pairs, D)` of a row: a new text may read the waiting ones too."""
        line = (self.waiting[name][row, None, :, self.is_waiting[row]] for name in WAITING_NAMES[:2])
        keys, values = (torch.cat(parts, dim=2) for parts in zip(self._held_pairs(row), line, strict=True))
        return keys, values

    def named_numbers(self) -> dict[str, torch.Tensor]:
        return {**super().named_numbers(), **self.waiting, "is_waiting": self.is_waiting}

    def named_states(self, past_mask: torch.Tensor | None) -> dict[str, Any]:
        states = super().named_states(past_mask)
        return {name: state for name, state in states.items() if name != "last_retrieval"}

    def set_numbers(self, numbers: dict[str, torch.Tensor]) -> None:
        super().set_numbers(numbers)
        self.waiting = {name: numbers[name].clone() for name in WAITING_NAMES}
        self.is_waiting = numbers["is_waiting"]

    def take(self, layer: MemoryMosaicStates, is_token: torch.Tensor | None) -> None:
        windows = getattr(layer, "windows", None)
        if windows:
            states = layer.named_states(is_token)
            self.windows = {name: states[name].clone() for name in windows}
            self.window_size = next(iter(self.windows.values())).shape[2]
        super().take(layer, is_token)

    def take_pairs(self, keys: torch.Tensor, values: torch.Tensor, is_full: torch.Tensor) -> None:
        first, length = self.num_joined, self.line_length
        # Pairs of joined texts are read without a delay.
        if first:
            self.line_length = 0
            super().take_pairs(keys[:, :, :first], values[:, :, :first], is_full[:, :first])
            self.line_length = length
            if self.is_initialized:
                self.start_line(keys)
        super().take_pairs(keys[:, :, first:], values[:, :, first:], is_full[:, first:])


BOUNDED_LAYERS["memory_mosaic_v2"] = MemoryMosaicV2BoundedLayer


__all__ = ["MemoryMosaicV2BoundedLayer"]

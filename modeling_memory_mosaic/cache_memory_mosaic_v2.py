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
"""The memory of Memory Mosaics v2: long-term pairs, a window of short-term pairs, and the running states of both.

Long-term pairs are the keys and values of the layers of [`MemoryMosaicCacheLayer`], one slot for each token. Of
short-term pairs a layer holds the last W alone, so that they take constant room.

Shapes use B batch, H heads, T new tokens, W pairs of a window, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import is_torchdynamo_compiling

from .cache_memory_mosaic import (
    GrowingStorage,
    MemoryMosaicCacheLayer,
    MemoryMosaicStates,
    MemoryMosaicStaticCacheLayer,
    without_room,
)
from .ops_memory_mosaic_v2 import alignment, rearranged


# Running states of each of the two contextual memories, and those of learnt pairs.
STATES_OF_LEVEL = ("sum", "log_scale", "pending_value")
WINDOW_NAMES = ("short_term_keys", "short_term_values")


def level_states(level: str) -> tuple[str, ...]:
    """Return the names of the running states of `short_term` or `long_term` memory."""
    return tuple(f"{level}_{name}" for name in STATES_OF_LEVEL)


def with_padding_first(windows: dict[str, torch.Tensor], is_token: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return windows `(B, H, columns, D)` with padding among their last columns moved to the front.

    Args:
        is_token (`torch.Tensor` of shape `(B, n)`): of the last n columns; those before are in order already.
    """
    num_columns = next(iter(windows.values())).shape[2]
    ordered = is_token.new_ones(is_token.shape[0], num_columns - is_token.shape[1])
    order = alignment(torch.cat([ordered, is_token], dim=1))
    return {name: rearranged(tensor, order) for name, tensor in windows.items()}


class WindowStates(MemoryMosaicStates):
    """States of one layer, with the window of short-term pairs.

    `windows` holds keys and values `(B, H, columns, D)`. The last W columns are the last W slots of tokens; while
    tokens may be taken back, all columns that were recorded stay, padding included (`num_raw`).
    """

    grows = True  # in storage with room behind it

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.windows: dict[str, torch.Tensor] = {}
        self.window_size, self.num_raw = 0, 0
        self.window_storages = {name: GrowingStorage() for name in WINDOW_NAMES}

    def __getstate__(self) -> dict[str, Any]:
        get_state = getattr(super(), "__getstate__", None)
        state = self.__dict__ if get_state is None else get_state()
        return {**state, "windows": {name: without_room(tensor) for name, tensor in self.windows.items()}}

    def reset(self) -> None:
        super().reset()
        self.windows, self.num_raw = {}, 0

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        self.windows = {name: function(tensor) for name, tensor in self.windows.items()}

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the running states, those of short-term heads first."""
        return tuple(self.states)

    def named_states(self, past_mask: torch.Tensor | None) -> dict[str, Any]:
        windows = self.windows
        if windows:
            if self.num_raw and past_mask is not None:
                windows = with_padding_first(windows, past_mask[:, -self.num_raw :])
            windows = {name: tensor[:, :, -self.window_size :] for name, tensor in windows.items()}
        return {**super().named_states(past_mask), **windows}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        super().set_states({name: state for name, state in states.items() if name not in WINDOW_NAMES})
        self.windows = {name: states[name] for name in WINDOW_NAMES if name in states}
        self.window_size = next((tensor.shape[2] for tensor in self.windows.values()), 0)

    def state_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, int | None, int]]:
        """Return heads, columns (`None`: one for each token) and width of each tensor of a layer, by its name."""
        settings: Any = config
        heads = {"short_term": settings.num_short_term_heads, "long_term": settings.num_long_term_heads}
        shapes: dict[str, tuple[int, int | None, int]] = {}
        for name in ("keys", "values"):
            shapes[name] = (heads["long_term"], None, settings.head_dim)
        for level, number in heads.items():
            if number:
                widths = (settings.head_dim, 1, settings.head_dim)
                shapes |= {name: (number, 1, width) for name, width in zip(level_states(level), widths, strict=True)}
        if heads["short_term"]:
            window = (heads["short_term"], settings.num_short_term_pairs, settings.head_dim)
            shapes |= dict.fromkeys(WINDOW_NAMES, window)
        if settings.persistent_memory_type == "slots":
            shapes["persistent_sum"] = (settings.num_attention_heads, 1, settings.head_dim)
        return shapes

    def start_windows(self, new: dict[str, torch.Tensor], size: int) -> None:
        """Make windows of empty slots, if nothing was read before."""
        self.window_size = size
        if not self.windows:
            shapes = {name: (*tensor.shape[:2], size, tensor.shape[3]) for name, tensor in new.items()}
            self.windows = {name: tensor.new_zeros(shapes[name]) for name, tensor in new.items()}

    def extend_window(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        size: int,
        is_token: torch.Tensor | None,
        past_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the short-term pairs `(B, H, T, D)` of new tokens; return the W before and these `(B, H, W + T, D)`.

        Args:
            size (`int`): W.
            is_token (`torch.Tensor` of shape `(B, T)`, *optional*): False at padding, if there is any.
            past_mask (`torch.Tensor` of shape `(B, past)`, *optional*): of what was read before, if any was padding.
        """
        new = dict(zip(WINDOW_NAMES, (keys, values), strict=True))
        self.start_windows(new, size)
        windows = self.windows
        if self.num_raw and past_mask is not None:
            windows = with_padding_first(windows, past_mask[:, -self.num_raw :])
        if windows is self.windows and self.grows and not self.record_past and not is_torchdynamo_compiling():
            extended = {name: self.window_storages[name].append(windows[name], new[name]) for name in new}
        else:
            extended = {name: torch.cat([windows[name], new[name]], dim=2) for name in new}
        self.keep_windows(new, extended, size, is_token)
        key_columns, value_columns = (extended[name][:, :, -(size + keys.shape[2]) :] for name in WINDOW_NAMES)
        return key_columns, value_columns

    def keep_windows(
        self,
        new: dict[str, torch.Tensor],
        extended: dict[str, torch.Tensor],
        size: int,
        is_token: torch.Tensor | None,
    ) -> None:
        """Keep the last W columns, and more while the past is recorded or as room for the next ones."""
        if self.record_past:
            self.windows = {name: torch.cat([self.windows[name], new[name]], dim=2) for name in new}
            self.num_raw += new[WINDOW_NAMES[0]].shape[2]
            return
        self.num_raw = 0
        extended = extended if is_token is None else with_padding_first(extended, is_token)
        # Compiled, a window of another length would compile again.
        is_long = is_torchdynamo_compiling() or extended[WINDOW_NAMES[0]].shape[2] >= 2 * size
        self.windows = {name: tensor[:, :, -size:].clone() if is_long else tensor for name, tensor in extended.items()}


class MemoryMosaicV2CacheLayer(WindowStates, MemoryMosaicCacheLayer):
    """Grows with the text. Built by `DynamicCache(config=model.config)`."""

    _layer_type = "memory_mosaic_v2"

    def get_seq_length(self) -> int:
        """Return the number of tokens that were read, also of a model without long-term heads."""
        return self.keys.shape[2] if self.is_initialized and self.keys is not None else 0

    def _roll_back(self, num_tokens: int) -> None:
        super()._roll_back(num_tokens)
        self.windows = {name: tensor[:, :, :-num_tokens] for name, tensor in self.windows.items()}
        self.num_raw -= num_tokens


class MemoryMosaicV2StaticCacheLayer(WindowStates, MemoryMosaicStaticCacheLayer):
    """Holds `max_cache_len` tokens at fixed addresses. Built by `StaticCache(config=..., max_cache_len=...)`."""

    _layer_type = "memory_mosaic_v2"
    grows = False

    def keep_windows(
        self,
        new: dict[str, torch.Tensor],
        extended: dict[str, torch.Tensor],
        size: int,
        is_token: torch.Tensor | None,
    ) -> None:
        extended = extended if is_token is None else with_padding_first(extended, is_token)
        for name, tensor in extended.items():
            self.windows[name].copy_(tensor[:, :, -size:])


__all__ = ["MemoryMosaicV2CacheLayer", "MemoryMosaicV2StaticCacheLayer"]

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
"""Layout of texts over processes for Memory Mosaics v2: gated sums, windows and delays of a stretch.

Shapes use B batch, T tokens of whole texts, L tokens of a stretch, P processes, H heads, D head width, W pairs of the
short-term window, S slots up to the end of the stretch.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from .blocks_memory_mosaic import NumberRule
from .layout_memory_mosaic import Stretch, StretchStates, gathered
from .masking_memory_mosaic_v2 import Reading, rules_of
from .ops_memory_mosaic_v2 import LOWEST_LOG, gated_step, gated_sum


class StretchStatesV2(StretchStates):
    """The gated sums and the window of one layer before a stretch, from other processes."""

    def continue_gated_sum(
        self, sums: torch.Tensor, log_scales: torch.Tensor, log_decays: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gated sums `(B, H, L, D)` of whole texts, and the one before the stretch `(B, H, 1, D)`.

        Each process sends the last of its sums, its scale, and by how much the stretch ages a sum: `(B, H, D + 2)`
        numbers.

        Args:
            sums, log_scales: of the stretch alone, as [`gated_sum`] returns them.
            log_decays (`torch.Tensor` of shape `(B, H, L)`): not positive; 0 at padding.
        """
        stretch, ages = self.stretch, log_decays.cumsum(-1)
        last = torch.cat([sums[:, :, -1], log_scales[:, :, -1], ages[:, :, -1:]], dim=-1)
        ends, scales, decays = stretch.gather(last).permute(1, 2, 0, 3).split([sums.shape[-1], 1, 1], dim=-1)
        parts = (ends, scales[..., 0], decays[..., 0])
        ends, scales = gated_sum(*parts, None, stretch.last_documents)
        scale = F.pad(scales, (0, 0, 1, 0), value=LOWEST_LOG)[:, :, stretch.rank : stretch.rank + 1]
        before = stretch.before(ends)
        if stretch.document_ids is not None:
            ages = ages.masked_fill((stretch.document_ids > 0)[:, None], LOWEST_LOG)
        return gated_step(sums, log_scales[..., 0], ages, (before, scale))[0], before

    def extend_window(
        self, keys: torch.Tensor, values: torch.Tensor, size: int, *padding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pairs `(B, H, P + L, D)` of the slots before the stretch and of its own.

        Without padding each process sends its last W pairs, otherwise all.

        Args:
            keys, values (`torch.Tensor` of shape `(B, H, L, D)`): of the pairs that the stretch completes.
            size (`int`): W.
        """
        stretch = self.stretch
        if not has_near_window(stretch, size):
            return self.slots(keys, values)
        pairs = torch.stack([keys, values])
        before = stretch.gather(pairs[:, :, :, -size:])[stretch.rank - 1]
        whole = torch.cat([before, pairs], dim=3)
        return whole[0], whole[1]


def has_near_window(stretch: Stretch, size: int) -> bool:
    """Return whether the `size` pairs before any stretch are of the stretch before it, and known to be."""
    return stretch.is_token is None and 0 < size <= stretch.shortest


def shared_delay(group: Any, delay: int | torch.Tensor | None, device: torch.device) -> int | torch.Tensor | None:
    """Return the delay that the first process of a group has drawn, a number or `(B, 1)`."""
    if delay is None:
        return None
    first = gathered(torch.as_tensor(delay, device=device), group)[0]
    return first if isinstance(delay, torch.Tensor) else int(first)


def reading_of_stretch(config: Any, whole: Reading, stretch: Stretch) -> Reading:
    """Return the part of a reading of whole texts that a stretch needs."""
    begin, end = stretch.begin, stretch.end
    short, long = rules_of(config, whole, stretch.cuts[-1], stretch.num_tokens.device)
    size = config.num_short_term_pairs
    num_window = min(begin, size) if has_near_window(stretch, size) else begin

    def part(rule: NumberRule, first: int) -> NumberRule:
        numbers, is_full = rule.numbers[:, first:end].contiguous(), rule.is_full[:, first:end]
        return NumberRule(numbers, stretch.cut(rule.first), stretch.cut(rule.last), is_full)

    return dataclasses.replace(
        whole,
        is_token=stretch.is_token,
        document_ids=stretch.document_ids,
        past_mask=None,
        num_window=num_window,
        short_pairs=stretch.cut(whole.short_pairs),
        long_pairs=stretch.cut(whole.long_pairs),
        short_rule=part(short, begin - num_window),
        long_rule=part(long, 0),
        num_slots=end,
        is_stretch=True,
    )

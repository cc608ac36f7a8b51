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
"""Measures of the units of a continuous Memory Mosaic: which memory predicts what (arXiv 2405.06394, three moons).

A unit is one head. [`inspect_continuous_units`] asks how wrong each unit was, how sharply it chose and how much of the
prediction came from it. A model does not need this file, and folders written by `save_pretrained` do not hold it.

Shapes use B batch, T observations, C coordinates of an observation, H heads (memories), D head width.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_continuous_memory_mosaic import ContinuousMemoryMosaicModel, check_observations
from .ops_memory_mosaic import kernel_smoothing


@dataclasses.dataclass
class ContinuousMemoryMosaicUnits:
    """Measures of each unit, by position; see [`inspect_continuous_units`].

    Args:
        error (`torch.Tensor` of shape `(B, H, T - 1)`): |y_t - v_t|^2 / |v_t|^2, where y_t is the retrieved value and
            v_t the value that the next observation gives.
        entropy (`torch.Tensor` of shape `(B, H, T)`): of the retrieval weights, in nats; 0 where nothing is stored.
        contributions (`torch.Tensor` of shape `(B, H, T, C)`): part of the prediction that comes from each unit; the
            sum over H is the prediction.
        share (`torch.Tensor` of shape `(B, H, T)`): inner product of contribution and prediction over the
            prediction's square. Shares sum to 1 over H, or to 0 where the prediction is 0.
    """

    error: torch.Tensor
    entropy: torch.Tensor
    contributions: torch.Tensor
    share: torch.Tensor

    @property
    def effective_pairs(self) -> torch.Tensor:
        """`(B, H, T)`: number of pairs that equal weights of this entropy would spread over, exp(entropy).

        0 where nothing is stored.
        """
        return F.pad(self.entropy[..., 1:].exp(), (1, 0))


def unit_contributions(o_proj: nn.Module, retrieved: torch.Tensor) -> torch.Tensor:
    """Return the output `(B, H, T, C)` of the combining layer for the values `(B, H, T, D)` of each head alone."""
    identity = torch.eye(retrieved.shape[1], dtype=retrieved.dtype, device=retrieved.device)
    # One row per head, with zeros in place of all other heads. The layer is called, never read: its weights may be
    # offloaded.
    rows = identity[:, None, :, None] * retrieved.transpose(1, 2)[:, None]  # (B, H, T, H, D)
    return o_proj(rows.flatten(3))


@torch.no_grad()
def inspect_continuous_units(
    model: ContinuousMemoryMosaicModel, observations: torch.Tensor
) -> ContinuousMemoryMosaicUnits:
    """Measure each unit of a model while it reads: errors, entropies of retrieval and shares of the prediction.

    The memories' own operators compute this, without dropout, whatever attention function the model uses.

    Args:
        model ([`ContinuousMemoryMosaicModel`]).
        observations (`torch.Tensor` of shape `(B, T, C)`): at least two.

    Raises:
        ValueError: if there is only one observation; and as the model itself does.
    """
    check_observations(observations, model.config.observation_size)
    if observations.shape[1] < 2:
        raise ValueError("One observation completes no pair: pass at least two.")
    queries, keys, values = model.memory(observations, pairs_only=True)
    # Shift identity: observations 1.. over the pairs of observations 0.. is plain causal attention. The first
    # observation retrieves 0.
    stored, queries = keys[:, :, :-1], queries[:, :, 1:]
    num_pairs = stored.shape[2]
    mask = torch.full((num_pairs, num_pairs), float("-inf"), dtype=keys.dtype, device=keys.device).triu(1)
    retrieved, weights = kernel_smoothing(queries, stored, values[:, :, 1:], mask)
    retrieved = F.pad(retrieved, (0, 0, 1, 0))  # (B, H, T, D)
    error = (retrieved[:, :, :-1] - values[:, :, 1:]).square().sum(-1) / values[:, :, 1:].square().sum(-1)
    contributions = unit_contributions(model.memory.o_proj, retrieved)
    prediction = contributions.sum(1, keepdim=True)
    square = prediction.square().sum(-1)
    return ContinuousMemoryMosaicUnits(
        error=error,
        entropy=F.pad(torch.special.entr(weights).sum(-1), (1, 0)),
        contributions=contributions,
        share=(contributions * prediction).sum(-1) / square.masked_fill(square == 0, 1.0),
    )


__all__ = ["ContinuousMemoryMosaicUnits", "inspect_continuous_units"]

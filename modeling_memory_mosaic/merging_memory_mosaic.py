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
"""Pairs of near keys merged into one slot, and how the slots are shared out among texts."""

from typing import NamedTuple

import torch

from .ops_memory_mosaic import at_least_float32, k_means


class MergedPairs(NamedTuple):
    """Slots of one head: `keys`, `values` `(N, D)`, `bias` `(N,)`, and by how much a score may have changed."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    drift: float


def merge_pairs(keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, num_slots: int) -> MergedPairs:
    """Merge pairs `(S, D)` with biases `(S,)` into so many slots, of which some may be empty.

    Queries are as long as keys. So a score changes by at most that length times the distance of a key from the mean.
    """
    is_pair = bias > -torch.inf
    points, kept, counts = keys[is_pair].double(), values[is_pair].double(), bias[is_pair].double().exp()
    cluster = points.unique(dim=0, return_inverse=True)[1]
    if int(cluster.max()) >= num_slots:
        cluster = k_means(at_least_float32(keys[is_pair]), num_slots)
    totals = counts.new_zeros(num_slots).index_add_(0, cluster, counts)

    def means(vectors: torch.Tensor) -> torch.Tensor:
        sums = vectors.new_zeros(num_slots, vectors.shape[1]).index_add_(0, cluster, counts[:, None] * vectors)
        return sums / totals.clamp(min=1)[:, None]

    centres = means(points).to(keys.dtype)
    distance = (points - centres.double()[cluster]).norm(dim=-1).max()
    drift = float(distance * points.norm(dim=-1).max())
    return MergedPairs(centres, means(kept).to(values.dtype), totals.log().to(bias.dtype), drift)


def shares(sizes: list[int], total: int) -> list[int]:
    """Return shares of a total, at least 1 each and at most the sizes, in proportion to these."""
    shares = [max(1, size * total // max(total, sum(sizes))) for size in sizes]
    while sum(shares) > total:  # by those of which one was more than their part
        shares[shares.index(max(shares))] -= 1
    return shares

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
"""Clusters of all heads of a layer as one, so that a token reads few of many pairs by a few large operations.

The same numbers as those that `Clusters.read` gives head by head, where no index besides the clusters is asked.
Shapes use H heads, S pairs and C clusters of the head that has most; what other heads lack is empty.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclasses.dataclass
class ClusterStack:
    """Clusters of H heads: `keys`, `values` `(H, S, D)`, `bias` `(H, S)`; the others `(H, C, ...)`, see `Clusters`."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    begins: torch.Tensor
    sizes: torch.Tensor
    centres: torch.Tensor
    means: torch.Tensor
    log_counts: torch.Tensor
    radii: torch.Tensor

    @classmethod
    def of(cls, clusters: list[Any]) -> "ClusterStack":
        """Return the stack of the clusters of each head, whose pairs are views of it from now on."""

        def stacked(name: str) -> torch.Tensor:
            fill = -torch.inf if name in ("bias", "log_counts") else 0.0
            return pad_sequence([getattr(one, name) for one in clusters], batch_first=True, padding_value=fill)

        stack = cls(**{field.name: stacked(field.name) for field in dataclasses.fields(cls)})
        for head, one in enumerate(clusters):
            one.keys, one.values = (part[head, : len(one.keys)] for part in (stack.keys, stack.values))
        return stack

    def asks_for_more(
        self, query: torch.Tensor, others: torch.Tensor, tolerance: float, limit: torch.Tensor
    ) -> torch.Tensor:
        """Return which heads need more pairs than `limit` `(H,)` for their certificate, `(H,)`.

        Args:
            query (`torch.Tensor` of shape `(H, D)`).
            others (`torch.Tensor` of shape `(H, N)`): scores of pairs that are read besides.
        """
        scores, drift = self._scores(query), query.norm(dim=-1, keepdim=True) * self.radii
        top = torch.cat([scores, others], dim=-1).amax(-1, keepdim=True)
        error = (scores + drift - top).exp() * drift.expm1().clamp(max=1.0)
        error, order = error.sort(descending=True)
        rest = error.flip(-1).cumsum(-1).flip(-1)
        mass = (scores - top).exp().sum(-1, keepdim=True) + (others - top).exp().sum(-1, keepdim=True)
        is_read = 2 * rest > tolerance * mass
        return (self.sizes.gather(1, order) * is_read).sum(-1) > limit

    def read_all(self, query: torch.Tensor, others: torch.Tensor, other_values: torch.Tensor) -> torch.Tensor:
        """Return what each head retrieves from all pairs `(H, D)`; arguments as of [`ClusterStack.read_nearest`]."""
        # Head by head: products of a matrix and a vector are faster alone than in a batch.
        scores = torch.stack([keys @ one for keys, one in zip(self.keys, query, strict=True)]) + self.bias
        weights = torch.cat([scores, others], dim=-1).softmax(-1).split([scores.shape[1], others.shape[1]], dim=-1)
        of_heads = zip(*weights, self.values, other_values, strict=True)
        return torch.stack([one @ values + other @ own for one, other, values, own in of_heads])

    def read_nearest(
        self, query: torch.Tensor, others: torch.Tensor, other_values: torch.Tensor, limit: torch.Tensor
    ) -> "StackRead":
        """Read the pairs of the clusters with the highest scores one by one, and the other clusters as wholes.

        Args:
            query (`torch.Tensor` of shape `(H, D)`).
            others (`torch.Tensor` of shape `(H, N)`): scores of pairs that are read besides.
            other_values (`torch.Tensor` of shape `(H, N, D)`): of these.
            limit (`torch.Tensor` of shape `(H,)`): of the pairs that are read one by one.
        """
        scores = self._scores(query)
        order = scores.argsort(dim=-1, descending=True)
        places, is_pair, is_chosen = self._places(order, limit)
        keys, values = self._pairs(places)
        near = (keys @ query[:, :, None])[:, :, 0] + self.bias.gather(1, places)
        near, wholes = near.masked_fill(~is_pair, -torch.inf), scores.masked_fill(is_chosen, -torch.inf)
        all_scores = torch.cat([near, wholes, others], dim=-1)
        parts = all_scores.softmax(-1).split([near.shape[1], wholes.shape[1], others.shape[1]], dim=-1)
        of_parts = zip(parts, (values, self.means, other_values), strict=True)
        retrieved = sum((weights[:, None] @ part)[:, 0] for weights, part in of_parts)
        top = all_scores.amax(-1, keepdim=True)
        known = (near - top).exp().sum(-1) + (others - top).exp().sum(-1)
        drift = (query.norm(dim=-1, keepdim=True) * self.radii).masked_fill(is_chosen, 0.0)
        bound, mass = bound_of(wholes - top, drift, known)
        return StackRead(retrieved, is_pair.sum(-1), bound, mass)

    def _scores(self, query: torch.Tensor) -> torch.Tensor:
        return (self.centres @ query[:, :, None])[:, :, 0] + self.log_counts

    def _pairs(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `(H, P, D)` at places `(H, P)` of each head."""
        num_heads, num_slots, width = self.keys.shape
        first = torch.arange(0, num_heads * num_slots, num_slots, device=places.device)
        flat = (places + first[:, None]).flatten()
        keys, values = (part.flatten(0, 1).index_select(0, flat) for part in (self.keys, self.values))
        return keys.view(*places.shape, width), values.view(*places.shape, width)

    def _places(self, order: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the places of the pairs of the first clusters of an order that `limit` has room for.

        Returns:
            places `(H, P)`, which of them are pairs `(H, P)`, and which clusters they are of `(H, C)`.
        """
        sizes = self.sizes.gather(1, order)
        ends = sizes.cumsum(-1)
        is_first = (ends <= limit[:, None]) & (sizes > 0)
        num_pairs = (sizes * is_first).sum(-1)
        slots = torch.arange(int(num_pairs.max()), device=order.device).expand(len(order), -1).contiguous()
        rank = torch.searchsorted(ends, slots, right=True).clamp(max=order.shape[1] - 1)
        begins = self.begins.gather(1, order) - (ends - sizes)
        is_pair = slots < num_pairs[:, None]
        places = (begins.gather(1, rank) + slots).masked_fill(~is_pair, 0)
        return places, is_pair, torch.zeros_like(is_first).scatter(1, order, is_first)


class StackRead(NamedTuple):
    """What each head retrieved `(H, D)`, how many pairs it read one by one, and bound and mass as in `ClusterRead`."""

    retrieved: torch.Tensor
    num_read: torch.Tensor
    bound: torch.Tensor
    mass: torch.Tensor


def bound_of(scores: torch.Tensor, drift: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far weights may be off in sum `(...)`, and the largest share that clusters may have of the weights.

    Args:
        scores, drift (`torch.Tensor` of shape `(..., C)`): of the clusters that are read as a whole; -inf for others.
        known (`torch.Tensor` of shape `(...)`): the sum of the exponentials of all other scores.
    """
    least, most = scores.exp(), (scores + drift).exp()
    lower, upper = known + least.sum(-1), known + most.sum(-1)
    by_mass = (most.sum(-1) / upper).detach()
    by_drift = ((most * drift.expm1()).sum(-1) * upper / lower**2).detach()
    bound = 2 * torch.minimum(by_mass, by_drift).nan_to_num(nan=torch.inf, posinf=2.0)
    return bound.clamp(max=2.0), by_mass

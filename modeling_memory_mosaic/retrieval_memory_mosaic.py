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
"""Retrieval from many pairs by reading few of them: near ones one by one, the others by centres of their clusters.

What this changes of a read-out is bounded before the answer, because values have one length. Let w be the weights of
all pairs and w' those by scores that are too high or too low by at most d for pairs of mass e, and right for the
others. Then the differences of w and w' sum to at most 2 e, and to at most 2 e (exp(d) - 1) Z / Z', where Z and Z' are
the sums of their exponentials. So few pairs have to be read one by one both by a sharp kernel, where e is small, and
by a wide one, where d is.

Shapes use B batch, H heads, S slots, D head width, C clusters, G = B * H.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .ops_memory_mosaic import at_least_float32


# With fewer pairs, all are read one by one: that is faster.
FEWEST_PAIRS = 2048
# Questions of more tokens are read with all pairs too.
LONGEST_QUESTION = 32
LLOYD_STEPS = 5


def k_means(points: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Return the cluster of each point `(N, D)`, from 0 on, none of them empty, `(N,)`."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:num_clusters].to(points.device)]
    cluster = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _ in range(LLOYD_STEPS):
        # The nearest centre: products and lengths of centres say which, without a number for each pair and width.
        cluster = (points @ centres.T - 0.5 * centres.square().sum(-1)).argmax(-1)
        counts = torch.bincount(cluster, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, cluster, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return cluster.unique(return_inverse=True)[1]


@dataclasses.dataclass
class Clusters:
    """Pairs of one head, sorted by cluster, and what a cluster is as a whole. A pair that stands for n counts n times.

    - `keys`, `values` `(S, D)` and `bias` `(S,)`: of the pairs; `begins` `(C + 1,)`: where each cluster begins,
    - `centres`, `means` `(C, D)`: means of keys and of values; `log_counts` `(C,)`,
    - `radii` `(C,)`: the largest distance of a key from its centre.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    begins: torch.Tensor
    centres: torch.Tensor
    means: torch.Tensor
    log_counts: torch.Tensor
    radii: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, num_clusters: int) -> "Clusters":
        """Return the clusters of pairs `(S, D)` with biases `(S,)`; those with a bias of -inf are left out."""
        is_pair = bias > -torch.inf
        keys, values, bias = (at_least_float32(part[is_pair]) for part in (keys, values, bias))
        cluster = k_means(keys, num_clusters)
        order = cluster.argsort(stable=True)
        keys, values, bias, cluster = keys[order], values[order], bias[order], cluster[order]
        counts, sizes = bias.to(keys.dtype).exp(), torch.bincount(cluster)
        totals = torch.zeros_like(sizes, dtype=keys.dtype).index_add_(0, cluster, counts)

        def mean(vectors: torch.Tensor) -> torch.Tensor:
            sums = vectors.new_zeros(len(sizes), vectors.shape[1]).index_add_(0, cluster, counts[:, None] * vectors)
            return sums / totals[:, None]

        centres = mean(keys)
        distances = (keys - centres[cluster]).norm(dim=-1)
        radii = torch.zeros_like(totals).scatter_reduce_(0, cluster, distances, "amax")
        begins = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls(keys, values, bias, begins, centres, mean(values), totals.log(), radii)

    def pairs_of(self, clusters: torch.Tensor) -> torch.Tensor:
        """Return the places of all pairs of some clusters, `(pairs,)`."""
        begins, sizes = self.begins[clusters], self.begins[clusters + 1] - self.begins[clusters]
        ends = sizes.cumsum(0)
        within = torch.arange(int(ends[-1]) if len(ends) else 0, device=sizes.device)
        return within + torch.repeat_interleave(begins - (ends - sizes), sizes)

    def read(self, query: torch.Tensor, others: torch.Tensor, tolerance: float) -> "ClusterRead":
        """Read the pairs for a query `(D,)`, so that the weights are off by at most `tolerance` in sum.

        Args:
            others (`torch.Tensor` of shape `(N,)`): scores of pairs that are read besides, all of them right.
        """
        scores = self.centres @ query + self.log_counts
        drift = query.norm() * self.radii  # by how much a score may differ from its centre's
        # What a cluster adds to the error at most, relative to the sum of all, for the two bounds.
        top = torch.cat([scores, others]).max()
        least, most = (scores - top).exp(), (scores + drift - top).exp()
        error = most * drift.expm1().clamp(max=1.0)
        order = error.argsort(descending=True)
        rest = error[order].flip(0).cumsum(0).flip(0)
        total = least.sum() + (others - top).exp().sum()
        num_read = int((2 * rest > tolerance * total).sum())
        while True:
            places = self.pairs_of(order[:num_read])
            exact = self.keys[places] @ query + self.bias[places]
            is_left = order[num_read:]
            sums = (exact - top).exp().sum() + (others - top).exp().sum()
            lower, upper = sums + least[is_left].sum(), sums + most[is_left].sum()
            by_mass = most[is_left].sum() / upper
            by_drift = (most[is_left] * drift[is_left].expm1()).sum() * upper / lower**2
            bound = 2 * float(torch.minimum(by_mass, by_drift).nan_to_num(nan=torch.inf, posinf=2.0))
            if bound <= tolerance or num_read == len(order):
                break
            num_read = min(len(order), 2 * num_read + 1)
        return ClusterRead(places, exact, is_left, scores[is_left], bound if len(is_left) else 0.0, float(by_mass))


@dataclasses.dataclass
class ClusterRead:
    """What was read for one query: places and scores of pairs, and clusters that were read as wholes.

    `bound` is the sum by which weights may be off, `mass` the largest share of weight that wholes may have.
    """

    places: torch.Tensor
    scores: torch.Tensor
    wholes: torch.Tensor
    whole_scores: torch.Tensor
    bound: float
    mass: float


@dataclasses.dataclass
class SearchReport:
    """What was read within [`nearest`], each a list by layer and head of one number for each query.

    - `visited`: share of the pairs that were read one by one,
    - `mass_dropped`: the largest share of weight that the others may have,
    - `bound`: the largest possible error of a read-out, in the unit of values.
    """

    visited: dict[tuple[int, int], list[float]] = dataclasses.field(default_factory=dict)
    mass_dropped: dict[tuple[int, int], list[float]] = dataclasses.field(default_factory=dict)
    bound: dict[tuple[int, int], list[float]] = dataclasses.field(default_factory=dict)

    def note(self, layer: int, head: int, visited: float, mass: float, bound: float) -> None:
        for name, number in (("visited", visited), ("mass_dropped", mass), ("bound", bound)):
            getattr(self, name).setdefault((layer, head), []).append(number)

    def summary(self) -> dict[str, float]:
        """Return means over all queries, layers and heads, and the largest bound."""

        def mean(lists: dict[tuple[int, int], list[float]]) -> float:
            numbers = [number for one in lists.values() for number in one]
            return sum(numbers) / len(numbers) if numbers else 0.0

        largest = max((max(one) for one in self.bound.values()), default=0.0)
        return {"visited": mean(self.visited), "mass_dropped": mean(self.mass_dropped), "largest_bound": largest}


@dataclasses.dataclass
class Search:
    """How memories of many pairs are read within [`nearest`]."""

    tolerance: float
    num_clusters: int | None
    report: SearchReport

    def reads(self, layer: Any, num_queries: int) -> bool:
        """Return whether a layer of a memory is read so by so many queries: one of many joined pairs."""
        return layer.index is not None and layer.num_joined >= FEWEST_PAIRS and num_queries <= LONGEST_QUESTION

    def clusters(self, layer: Any) -> list[Clusters]:
        """Return the clusters of the joined pairs of each head, which are those of all rows; they are made once."""
        first = layer.num_joined
        num_clusters = self.num_clusters or int(2 * first**0.5)
        if num_clusters not in layer.index:
            keys, values = layer.keys[0, :, :first], layer.values[0, :, :first]
            bias = layer.slot_bias[0, :, :first].expand(len(keys), -1)
            parts = zip(keys, values, bias, strict=True)
            layer.index[num_clusters] = [Clusters.of(*one, num_clusters) for one in parts]
        clusters: list[Clusters] = layer.index[num_clusters]
        return clusters

    def read(
        self, layer: Any, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Return what queries `(B, H, T, D)` retrieve from all slots of a layer, `(B, T, H, D)`.

        Args:
            key, value (`torch.Tensor` of shape `(B, H, S, D)`): of all slots, those of the new tokens last.
        """
        batch_size, num_heads, num_queries, _ = query.shape
        first, retrieved = layer.num_joined, torch.empty_like(query)
        bias = layer.slot_bias.expand(-1, num_heads, -1)
        for row, (head, clusters) in itertools.product(range(batch_size), enumerate(self.clusters(layer))):
            length = value[row, head].norm(dim=-1).amax()
            own_keys, own_values = (at_least_float32(part[row, head, first:]) for part in (key, value))
            own_scores = at_least_float32(query[row, head]) @ own_keys.T + bias[row, head, first:]
            for token in range(num_queries):
                num_seen = len(own_keys) - num_queries + token + 1
                others = own_scores[token, :num_seen]
                one = at_least_float32(query[row, head, token])
                found = clusters.read(one, others, self.tolerance)
                weights = torch.cat([found.scores, found.whole_scores, others]).softmax(0)
                values = [clusters.values[found.places], clusters.means[found.wholes], own_values[:num_seen]]
                retrieved[row, head, token] = (weights @ torch.cat(values)).to(retrieved.dtype)
                share = len(found.places) / max(1, len(clusters.keys))
                self.report.note(layer_idx, head, share, found.mass, found.bound * float(length))
        return retrieved.transpose(1, 2)


@contextlib.contextmanager
def nearest(model: nn.Module, tolerance: float = 1e-3, num_clusters: int | None = None) -> Iterator[SearchReport]:
    """Let a model read joined memories of many pairs by reading few of them one by one.

    Args:
        model: a Memory Mosaic with any head, in the whole process.
        tolerance (`float`): the largest error of a read-out, in lengths of a value. Fewer pairs are read where it is
            larger.
        num_clusters (`int`, *optional*): of each head; about twice the root of the number of pairs when absent.

    Yields:
        [`SearchReport`]: grows with each query.

    Raises:
        ValueError: if the tolerance is not above 0 and at most 2, which is no bound at all.
    """
    if not 0 < tolerance <= 2:
        raise ValueError(f"tolerance={tolerance} must be above 0, which only reading all pairs meets, and at most 2.")
    models: Any = [module for module in model.modules() if hasattr(module, "search")]
    if not models:
        raise ValueError(f"{type(model).__name__} has no memories that could be searched: pass a Memory Mosaic.")
    report = SearchReport()
    before = [module.search for module in models]
    for module in models:
        module.search = Search(tolerance, num_clusters, report)
    try:
        yield report
    finally:
        for module, search in zip(models, before, strict=True):
            module.search = search


__all__ = ["SearchReport", "nearest"]

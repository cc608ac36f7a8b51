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
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .ops_memory_mosaic import at_least_float32, k_means
from .stacked_memory_mosaic import ClusterStack, bound_of


# With fewer pairs, all are read one by one: that is faster.
FEWEST_PAIRS = 2048
# Questions of more tokens are read with all pairs too.
LONGEST_QUESTION = 32
# Pairs that an index is asked for at first; four times as many each time that they are not enough.
FEWEST_FOUND = 16
# Where more than one in so many pairs had to be read one by one, all are: that is faster, and without an error.
ONE_IN = 4


class Index(Protocol):
    """Finds those of many keys that are near to queries. What it misses costs time and never the tolerance."""

    def search(self, queries: Any, k: int) -> Any:
        """Return the places of about k near keys for each of queries `(Q, D)`, `(Q, k)`; -1 where there are fewer."""


class ExactIndex:
    """Compares a query with all keys `(S, D)`."""

    def __init__(self, keys: torch.Tensor):
        self.keys = keys

    def search(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        return (queries @ self.keys.T).topk(min(k, len(self.keys)), dim=-1).indices


class LshIndex:
    """Locality-sensitive hashing: compares a query with the keys `(S, D)` that share a bucket of some table with it.

    A bucket of a table is the side of each of some random planes that a key is on.
    """

    num_tables, fewest_in_bucket = 16, 32

    def __init__(self, keys: torch.Tensor):
        self.keys = keys
        num_planes = max(1, int(math.log2(max(2, len(keys) / self.fewest_in_bucket))))
        generator = torch.Generator().manual_seed(0)
        planes = torch.randn(self.num_tables, keys.shape[1], num_planes, generator=generator, dtype=keys.dtype)
        self.planes, self.powers = planes.to(keys.device), 2 ** torch.arange(num_planes, device=keys.device)
        self.sorted, self.order = self.buckets(keys).sort(dim=-1)  # (tables, S)

    def buckets(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the bucket of vectors `(N, D)` in each table, `(tables, N)`."""
        return ((vectors @ self.planes > 0) * self.powers).sum(-1)

    def search(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        buckets = self.buckets(queries).contiguous()
        first, last = (torch.searchsorted(self.sorted, buckets, right=right) for right in (False, True))
        found = torch.full((len(queries), k), -1, device=queries.device)
        for number, query in enumerate(queries):
            ranges = zip(self.order, first[:, number].tolist(), last[:, number].tolist(), strict=True)
            places = torch.cat([order[begin:end] for order, begin, end in ranges]).unique()
            nearest_ones = (self.keys[places] @ query).topk(min(k, len(places))).indices
            found[number, : len(nearest_ones)] = places[nearest_ones]
        return found


class UsearchIndex:
    """The library usearch, a graph of neighbours on CPUs: `pip install usearch`."""

    def __init__(self, keys: torch.Tensor):
        from usearch.index import Index as Graph

        self.graph, self.device = Graph(ndim=keys.shape[1], metric="ip", dtype="f32"), keys.device
        self.graph.add(np.arange(len(keys)), keys.detach().float().cpu().numpy())

    def search(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        matches = self.graph.search(queries.detach().float().cpu().numpy(), min(k, len(self.graph)))
        return torch.from_numpy(matches.keys.astype(np.int64)).reshape(len(queries), -1).to(self.device)


# By the name in `nearest`; clusters find their own.
INDEXES: dict[str, Callable[[torch.Tensor], Index] | None] = {
    "clusters": None,
    "exact": ExactIndex,
    "lsh": LshIndex,
    "usearch": UsearchIndex,
}


@dataclasses.dataclass
class Clusters:
    """Pairs of one head, sorted by cluster, and what a cluster is as a whole. A pair that stands for n counts n times.

    - `keys`, `values` `(S, D)` and `bias` `(S,)`: of the pairs; `owner` `(S,)`: their clusters; `begins`, `sizes`
      `(C,)`: where each cluster begins, and how many slots it has,
    - `centres`, `means` `(C, D)`: means of keys and of values; `log_counts` `(C,)`,
    - `radii` `(C,)`: the largest distance of a key from its centre,
    - `longest`: the largest length of a value.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    owner: torch.Tensor
    begins: torch.Tensor
    sizes: torch.Tensor
    centres: torch.Tensor
    means: torch.Tensor
    log_counts: torch.Tensor
    radii: torch.Tensor
    longest: float
    index: Index | None = None

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
        begins = sizes.cumsum(0) - sizes
        longest = float(values.detach().norm(dim=-1).amax()) if len(values) else 0.0
        means, log_counts = mean(values), totals.log()
        return cls(keys, values, bias, cluster, begins, sizes, centres, means, log_counts, radii, longest)

    def limit(self, max_share: float | None) -> int:
        """Return how many pairs are read one by one at most."""
        return int(len(self.keys) * (1 / ONE_IN if max_share is None else max_share))

    def pairs_of(self, clusters: torch.Tensor) -> torch.Tensor:
        """Return the places of all pairs of some clusters, `(pairs,)`."""
        begins, sizes = self.begins[clusters], self.sizes[clusters]
        ends = sizes.cumsum(0)
        within = torch.arange(int(ends[-1]) if len(ends) else 0, device=sizes.device)
        return within + torch.repeat_interleave(begins - (ends - sizes), sizes)

    def rest_without(self, found: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log of the number `(C,)` and the mean of values `(C, D)` of pairs that were not found.

        Args:
            values (`torch.Tensor` of shape `(found, D)`): of the pairs that were.
        """
        if not len(found):
            return self.log_counts, self.means
        counts, owner = self.bias[found].to(self.keys.dtype).exp(), self.owner[found]
        left = self.log_counts.exp().index_add(0, owner, -counts)
        sums = self.means * self.log_counts.exp()[:, None]
        sums = sums.index_add(0, owner, -counts[:, None] * values)
        # Of a cluster that was found as a whole rounding may leave a little.
        num_left = self.sizes.index_add(0, owner, torch.full_like(owner, -1))
        left = torch.where(num_left > 0, left, 0.0)
        return left.log(), sums / torch.where(num_left > 0, left, 1.0)[:, None]

    def read(
        self, query: torch.Tensor, others: torch.Tensor, tolerance: float, max_share: float | None = None
    ) -> "ClusterRead":
        """Read the pairs for a query `(D,)`, so that the weights are off by at most `tolerance` in sum.

        Args:
            others (`torch.Tensor` of shape `(N,)`): scores of pairs that are read besides, all of them right.
            max_share: of the pairs that are read one by one; where the tolerance asks for more, `bound` exceeds it.
        """
        limit = self.limit(max_share)
        num_found, found = 0, torch.zeros(0, dtype=torch.long, device=query.device)
        while True:
            result = self._read_behind(query, others, tolerance, found, limit)
            # Where an index does not help any more, clusters are read as a whole.
            is_enough = result is not None and not len(result.extra)
            if is_enough or self.index is None or num_found >= limit:
                break
            before, num_found = len(found), min(len(self.keys), max(FEWEST_FOUND, 4 * num_found))
            found = self._found(query, num_found)
            if len(found) <= before:
                break
        if result is not None:
            return result
        return self._read_all(query) if max_share is None else self._read_nearest(query, others, limit)

    def _read_all(self, query: torch.Tensor) -> "ClusterRead":
        places, none = torch.arange(len(self.keys), device=query.device), self.keys.new_zeros(0)
        wholes, means = places[:0], self.means[:0]
        scores = self.keys @ query + self.bias
        return ClusterRead(places, scores, self.values, places, wholes, none, means, 0.0, 0.0)

    def _found(self, query: torch.Tensor, num_pairs: int) -> torch.Tensor:
        """Return the places of near pairs: those that the index finds, or of the clusters with the highest scores."""
        if self.index is not None:
            found = torch.as_tensor(self.index.search(query[None], num_pairs), device=query.device)[0].long()
            return found[(found >= 0) & (found < len(self.keys))].unique()
        order = (self.centres @ query + self.log_counts).argsort(descending=True)
        num_read = int((self.sizes[order].cumsum(0) <= num_pairs).sum())
        return self.pairs_of(order[:num_read])

    def _read_nearest(self, query: torch.Tensor, others: torch.Tensor, num_pairs: int) -> "ClusterRead":
        """Read near pairs one by one, `num_pairs` at most, and the rest of all clusters as wholes."""
        places = self._found(query, num_pairs)[:num_pairs]
        values = self.values[places]
        log_counts, means = self.rest_without(places, values)
        is_left = (log_counts > -torch.inf).nonzero()[:, 0]
        near, wholes = self.keys[places] @ query + self.bias[places], (self.centres @ query + log_counts)[is_left]
        top = torch.cat([wholes, others, near]).max()
        known = (others - top).exp().sum() + (near - top).exp().sum()
        numbers = bound_of(wholes - top, query.norm() * self.radii[is_left], known)
        bound, mass = (float(number) for number in numbers)
        bound = bound if len(is_left) else 0.0
        return ClusterRead(places, near, values, places, is_left, wholes, means[is_left], bound, mass)

    def _read_behind(
        self, query: torch.Tensor, others: torch.Tensor, tolerance: float, found: torch.Tensor, limit: int
    ) -> "ClusterRead | None":
        """Do as `read`, with pairs that an index has found; `None` where more than `limit` had to be read besides."""
        log_counts, means = self.rest_without(found, self.values[found])
        scores = self.centres @ query + log_counts
        exact = self.keys[found] @ query + self.bias[found]
        drift = query.norm() * self.radii  # by how much a score may differ from its centre's
        # What a cluster adds to the error at most, relative to the sum of all, for the two bounds.
        top = torch.cat([scores, others, exact]).max()
        error = (scores + drift - top).exp() * drift.expm1().clamp(max=1.0)
        order = error.argsort(descending=True)
        rest = error[order].flip(0).cumsum(0).flip(0)
        known = (others - top).exp().sum() + (exact - top).exp().sum()
        num_read = int((2 * rest > tolerance * ((scores - top).exp().sum() + known)).sum())
        while True:
            if int(self.sizes[order[:num_read]].sum()) + len(found) > limit:
                return None
            extra = self.pairs_of(order[:num_read])
            extra = extra[~torch.isin(extra, found)] if len(found) else extra
            more = self.keys[extra] @ query + self.bias[extra]
            is_left = order[num_read:]
            numbers = bound_of(scores[is_left] - top, drift[is_left], (more - top).exp().sum() + known)
            bound, mass = (float(number) for number in numbers)
            if bound <= tolerance or num_read == len(order):
                break
            num_read = min(len(order), 2 * num_read + 1)
        is_left, places = is_left[log_counts[is_left] > -torch.inf], torch.cat([found, extra])
        return ClusterRead(
            places,
            torch.cat([exact, more]),
            self.values[places],
            extra,
            is_left,
            scores[is_left],
            means[is_left],
            bound if len(is_left) else 0.0,
            mass,
        )


@dataclasses.dataclass
class ClusterRead:
    """What was read for one query: places, scores and values of pairs, and clusters whose rest was read as a whole.

    `extra` are those of the places that no index had found; `means` are the values of wholes. `bound` is the sum by
    which weights may be off, `mass` the largest share of weight that wholes may have.
    """

    places: torch.Tensor
    scores: torch.Tensor
    values: torch.Tensor
    extra: torch.Tensor
    wholes: torch.Tensor
    whole_scores: torch.Tensor
    means: torch.Tensor
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
    index: str | Callable[[torch.Tensor], Index] = "clusters"
    max_share: float | None = None

    def reads(self, layer: Any, num_queries: int) -> bool:
        """Return whether a layer of a memory is read so by so many queries: one of many joined pairs."""
        return layer.index is not None and layer.num_joined >= FEWEST_PAIRS and num_queries <= LONGEST_QUESTION

    def clusters(self, layer: Any) -> tuple[list[Clusters], ClusterStack | None]:
        """Return the clusters of the joined pairs of each head, which are those of all rows; they are made once.

        Without an index besides them, they are returned as one too.
        """
        first = layer.num_joined
        num_clusters = self.num_clusters or int(2 * first**0.5)
        name = (num_clusters, self.index)
        if name not in layer.index:
            keys, values = layer.keys[0, :, :first], layer.values[0, :, :first]
            bias = layer.slot_bias[0, :, :first].expand(len(keys), -1)
            of_heads = [Clusters.of(*one, num_clusters) for one in zip(keys, values, bias, strict=True)]
            make = INDEXES[self.index] if isinstance(self.index, str) else self.index
            for one in of_heads:
                one.index = None if make is None else make(one.keys)
            layer.index[name] = of_heads, ClusterStack.of(of_heads) if make is None else None
        made: tuple[list[Clusters], ClusterStack | None] = layer.index[name]
        return made

    def read(
        self,
        layer: Any,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        is_seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what queries `(B, H, T, D)` retrieve from all slots of a layer, `(B, T, H, D)`.

        Args:
            key, value (`torch.Tensor` of shape `(B, H, S, D)`): of all slots, those of the new tokens last.
            is_seen (`torch.Tensor` of shape `(B or 1, T, S)`, *optional*): which slots each token sees, all joined
                ones among them; all up to its own when absent.
        """
        batch_size, num_heads, num_queries, _ = query.shape
        first, retrieved = layer.num_joined, torch.empty_like(query)
        bias = layer.slot_bias.expand(-1, num_heads, -1)
        for row in range(batch_size):
            own = tuple(at_least_float32(part[row, :, first:]) for part in (key, value))
            scores = at_least_float32(query[row]) @ own[0].mT + bias[row, :, None, first:]
            for token in range(num_queries):
                seen: Any = slice(0, own[0].shape[1] - num_queries + token + 1)
                if is_seen is not None:
                    seen = is_seen[row if len(is_seen) > 1 else 0, token, first:]
                one = at_least_float32(query[row, :, token])
                found = self._read_heads(layer, layer_idx, one, scores[:, token, seen], own[1][:, seen])
                retrieved[row, :, token] = found.to(retrieved.dtype)
        return retrieved.transpose(1, 2)

    def _read_heads(
        self, layer: Any, layer_idx: int, query: torch.Tensor, others: torch.Tensor, other_values: torch.Tensor
    ) -> torch.Tensor:
        """Return what the query of each head `(H, D)` retrieves, from pairs with scores `(H, N)` besides."""
        of_heads, stack = self.clusters(layer)
        lengths = other_values.detach().norm(dim=-1).tolist()
        lengths = [max([one.longest, *own]) for one, own in zip(of_heads, lengths, strict=True)]
        retrieved, rest = torch.zeros_like(query), list(range(len(of_heads)))

        def note(head: int, num_read: int, mass: float, bound: float) -> None:
            share = num_read / max(1, len(of_heads[head].keys))
            self.report.note(layer_idx, head, share, mass, bound * lengths[head])

        if stack is not None:
            limit = torch.tensor([one.limit(self.max_share) for one in of_heads], device=query.device)
            is_wide = stack.asks_for_more(query, others, self.tolerance, limit)
            if self.max_share is None and is_wide.all():
                for head, one in enumerate(of_heads):
                    note(head, len(one.keys), 0.0, 0.0)
                return stack.read_all(query, others, other_values)
            if self.max_share is not None and is_wide.any():
                read = stack.read_nearest(query, others, other_values, limit)
                retrieved = torch.where(is_wide[:, None], read.retrieved, retrieved)
                numbers = list(zip(read.num_read.tolist(), read.mass.tolist(), read.bound.tolist(), strict=True))
                for head in is_wide.nonzero()[:, 0].tolist():
                    note(head, *numbers[head])
                rest = (~is_wide).nonzero()[:, 0].tolist()
        for head in rest:
            found = of_heads[head].read(query[head], others[head], self.tolerance, self.max_share)
            scores = [found.scores, found.whole_scores, others[head]]
            weights = torch.cat(scores).softmax(0).split([len(part) for part in scores])
            values = [found.values, found.means, other_values[head]]
            # Not as one matrix: with all pairs, that would copy them for each token.
            parts = [weight @ value for weight, value in zip(weights, values, strict=True)]
            retrieved[head] = sum(parts)
            note(head, len(found.places), found.mass, found.bound)
        return retrieved


@contextlib.contextmanager
def nearest(
    model: nn.Module,
    tolerance: float = 1e-3,
    index: str | Callable[[torch.Tensor], Index] = "clusters",
    num_clusters: int | None = None,
    max_share: float | None = None,
) -> Iterator[SearchReport]:
    """Let a model read joined memories of many pairs by reading few of them one by one.

    Args:
        model: a Memory Mosaic with any head, in the whole process.
        tolerance (`float`): the largest error of a read-out, in lengths of a value. Fewer pairs are read where it is
            larger.
        index (`str` or a function): what finds pairs that are read one by one: `clusters`, whose centres are near;
            `exact`, all keys; `lsh`, hashing; `usearch`, the library; or what makes an index of keys `(S, D)`: a class
            or a function that returns any object with `search(queries, k)` (see [`Index`]). It is called once for each
            head of a memory, so that an index that was made already cannot serve. Whatever one misses is read by
            clusters.
        num_clusters (`int`, *optional*): of each head; about twice the root of the number of pairs when absent.
        max_share (`float`, *optional*): of the pairs of a head that are read one by one at most. Where the tolerance
            asks for more, it is not met, and the report's `bound` says so: for wide kernels, whose certificate is
            loose and whose errors are small. By default all pairs are read there.

    Yields:
        [`SearchReport`]: grows with each query.

    Raises:
        ValueError: if the tolerance is not above 0 and at most 2, which is no bound at all; if the index is unknown,
            or one that was made already; if the share is not above 0 and at most 1.
    """
    if not 0 < tolerance <= 2:
        raise ValueError(f"tolerance={tolerance} must be above 0, which only reading all pairs meets, and at most 2.")
    if not callable(index) and hasattr(index, "search"):
        raise ValueError(
            f"This {type(index).__name__} has `search`, but an index holds the keys of one head, and each head of a "
            "memory needs its own: pass what makes one of keys `(S, D)`, its class or `index=lambda keys: ...`."
        )
    if not callable(index) and index not in INDEXES:
        raise ValueError(f"index={index!r} is not one of {', '.join(INDEXES)}, and no function of keys.")
    if max_share is not None and not 0 < max_share <= 1:
        raise ValueError(f"max_share={max_share} must be above 0 and at most 1: a share of the pairs of a head.")
    models: Any = [module for module in model.modules() if hasattr(module, "search")]
    if not models:
        raise ValueError(f"{type(model).__name__} has no memories that could be searched: pass a Memory Mosaic.")
    report = SearchReport()
    before = [module.search for module in models]
    for module in models:
        module.search = Search(tolerance, num_clusters, report, index, max_share)
    try:
        yield report
    finally:
        for module, search in zip(models, before, strict=True):
            module.search = search


__all__ = ["Index", "SearchReport", "nearest"]

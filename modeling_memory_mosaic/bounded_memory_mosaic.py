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
"""Memories of a bounded number of pairs: where each head is full, it forgets the pairs that a policy rates lowest.

Nothing has to be kept besides: pairs have no positions, so that no other pair is read in another way when one is gone.

Shapes use B batch, H heads, T new tokens, P pairs that a head can hold, D head width.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.configuration_utils import PreTrainedConfig

from .cache_memory_mosaic import MemoryMosaicStates, memory_layer, text_of
from .masking_memory_mosaic import growth_of_kernels
from .ops_memory_mosaic import at_least_float32, forward_fill, lowest_bias


# A full head makes room for this share of its pairs, so that pairs are rated seldom.
ROOM = 16
# New tokens that are read at a time, so that their weights need little memory.
LONGEST_SEGMENT = 64
# What is known of each pair, besides key, value and bias.
COUNTERS = ("born", "used_at", "usage", "exposure", "error")


def random_rating(layer: "BoundedMemoryLayer") -> torch.Tensor:
    return torch.rand_like(layer.counters["born"])


# Ratings of pairs `(B, H, P)`: a full head forgets those with the lowest.
POLICIES: dict[str, Callable[["BoundedMemoryLayer"], torch.Tensor]] = {
    "fifo": lambda layer: layer.counters["born"],
    "lru": lambda layer: layer.counters["used_at"],
    "usage": lambda layer: layer.counters["usage"] / layer.counters["exposure"].clamp(min=1),
    "surprise": lambda layer: layer.counters["error"],
    "random": random_rating,
}
# Those that need to know nothing of a pair but its place among the others.
WITHOUT_STATISTICS = ("fifo", "random")


class Due(NamedTuple):
    """Pairs that new tokens may read for the first time, by the column of that token.

    - `keys`, `values` `(B, H, T, D)`,
    - `is_full` `(B, T)`: whether there is such a pair,
    - `order` `(B, T)`, `kept` `(B, W)`, *optional*: which of the pairs that waited and of the new ones these are, and
      which ones wait now, see [`MemoryMosaicV2BoundedLayer`],
    - `num_waiting` `(B, T)`, *optional*: how many pairs each token may not read yet.
    """

    keys: torch.Tensor
    values: torch.Tensor
    is_full: torch.Tensor
    order: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    num_waiting: torch.Tensor | None = None


class BoundedMemoryLayer(MemoryMosaicStates, DynamicLayer):
    """Holds at most `max_pairs` pairs in each head of a layer. Made by [`bounded`].

    `counters`, each `(B, H, P)`, have of each pair

    - `born`: the first token that could read it, which is the one that completed it, counted over all that was read,
    - `used_at`: the last token that gave it more than an even share of its weight, or that could read it first,
    - `usage`: the sum of the weights that it was given, and `exposure`: the number of tokens that could have,
    - `error`: how wrong its head was about its value, |y - v|^2 / |v|^2, where y is what the head retrieved by its key
      when that was new. 1 if it had nothing to read then.
    """

    is_croppable = False
    is_taking = False  # whether pairs are taken over of which no counters are known

    def __init__(self, config: PreTrainedConfig, max_pairs: int, policy: Any):
        super().__init__()
        # Not of the class: caches would then be built of it.
        self._layer_type = config.layer_types[0]
        self.config, self.max_pairs = config, max_pairs
        self.policy = policy
        self.num_read = 0
        self.held: torch.Tensor  # (B,), the number of pairs of each row, once there are some
        self.counters: dict[str, torch.Tensor] = {}

    has_biases = True  # those of empty slots: no token sees them

    def note_text(self, input_ids: torch.Tensor | None, is_token: torch.Tensor | None) -> None:
        """Keep no ids, whose number is not bounded; padding is kept, if there is any."""
        self.knows_ids = False
        super().note_text(None, is_token)

    def num_rows(self) -> int:
        return len(self.held) if self.is_initialized else 0

    def reset(self) -> None:
        super().reset()
        self.num_read, self.counters = 0, {}

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        if self.is_initialized:
            self.counters = {name: function(counter) for name, counter in self.counters.items()}
            self.held = function(self.held)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda state: state[indices.to(state.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise `RuntimeError`: a pair that was forgotten cannot come back."""
        raise RuntimeError("A bounded memory cannot take tokens back: leave the assistant out, or the bound.")

    def get_seq_length(self) -> int:
        return self.num_read

    def get_mask_sizes(self, query_length: int, *args: Any) -> tuple[int, int]:
        return self.num_read + query_length, 0

    def start(self, keys: torch.Tensor) -> None:
        """Make room for pairs of a batch, by keys `(B, H, T, D)` of the first."""
        batch_size, num_heads, _, width = keys.shape
        shape = (batch_size, num_heads, self.max_pairs)
        self.lazy_initialization(keys, keys)
        self.keys, self.values = keys.new_zeros(*shape, width), keys.new_zeros(*shape, width)
        numbers = torch.zeros(shape, dtype=torch.promote_types(keys.dtype, torch.float32), device=keys.device)
        self.counters = {name: numbers.clone() for name in COUNTERS}
        self.held = torch.zeros(batch_size, dtype=torch.long, device=keys.device)
        self.states["last_retrieval"] = keys.new_zeros(batch_size, num_heads, 1, width)

    def read(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_token: torch.Tensor,
        is_full: torch.Tensor,
        beta: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Store the pairs that new tokens complete, and return what each token retrieves, `(B, T, H, D)`.

        Args:
            queries, keys, values (`torch.Tensor` of shape `(B, H, T, D)`).
            is_token (`torch.Tensor` of shape `(B, T)`): False at padding.
            is_full (`torch.Tensor` of shape `(B, T)`): whether the token completes a pair.
            beta (*optional*): maps numbers of pairs `(B, T)` to what queries are multiplied by `(B, H or 1, T, 1)`;
                the growth of kernels that the configuration names when absent.
        """
        if torch.is_grad_enabled() and queries.requires_grad:
            raise ValueError("A bounded memory has no gradient: read under `torch.no_grad()`.")
        if not self.is_initialized:
            self.start(keys)
        retrieved, start, num_tokens = [], 0, queries.shape[2]
        while start < num_tokens:
            room = self.make_room(is_full[:, start:])
            end = min(start + min(room, LONGEST_SEGMENT), num_tokens)
            segment = slice(start, end)
            heads = [tensor[:, :, segment] for tensor in (queries, keys, values)]
            rows = [tensor[:, segment] for tensor in (is_token, is_full)]
            parts: Any = (*heads, *rows, beta)
            retrieved.append(self.read_segment(*parts))
            start = end
        return torch.cat(retrieved, dim=2).transpose(1, 2)

    def read_segment(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_token: torch.Tensor,
        is_full: torch.Tensor,
        beta: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Do as `read` for tokens whose pairs fit; returns `(B, H, T, D)`."""
        numbers = self.num_read + torch.arange(1, queries.shape[2] + 1, device=queries.device)
        due = self.due_pairs(keys, values, is_full)
        num_seen = self.held[:, None] + due.is_full.long().cumsum(-1)  # (B, T)
        rows, columns = due.is_full.nonzero(as_tuple=True)
        places = num_seen[rows, columns] - 1
        self.keys[rows, :, places] = due.keys[rows, :, columns]
        self.values[rows, :, places] = due.values[rows, :, columns]
        self.held = num_seen[:, -1].clone()
        num_slots = int(self.held.max())
        is_seen = torch.arange(num_slots, device=queries.device) < num_seen[..., None]  # (B, T, P)
        retrieved, weights = self.smooth(self.scaled_queries(queries, is_seen, due, beta), is_seen)
        previous = torch.cat([self.states["last_retrieval"], retrieved[:, :, :-1]], dim=2)
        if not is_token.all():
            previous = forward_fill(previous, F.pad(is_token[:, :-1], (1, 0), value=True), None)
        last = forward_fill(retrieved, is_token, self.states["last_retrieval"])[:, :, -1:]
        self.states["last_retrieval"] = last.clone()  # a view would keep the vectors of all tokens
        errors = at_least_float32(previous - values).square().sum(-1) / at_least_float32(values).square().sum(-1)
        errors = self.due_errors(errors, due)
        for name, new in (
            ("born", numbers.expand(errors.shape)),
            ("used_at", numbers.expand(errors.shape)),
            ("error", errors),
        ):
            self.counters[name][rows, :, places] = new[rows, :, columns].to(self.counters[name].dtype)
        for name in ("usage", "exposure"):
            self.counters[name][rows, :, places] = 0.0
        self.count(weights, is_seen & is_token[..., None], num_seen, numbers)
        self.num_read += queries.shape[2]
        return retrieved

    def due_pairs(self, keys: torch.Tensor, values: torch.Tensor, is_full: torch.Tensor) -> Due:
        """Return the pairs that may be read from each new token on, for pairs that the tokens complete: these."""
        return Due(keys, values, is_full)

    def due_errors(self, errors: torch.Tensor, due: Due) -> torch.Tensor:
        """Return the errors `(B, H, T)` of due pairs, for those of the pairs that tokens complete."""
        return errors

    def scaled_queries(
        self,
        queries: torch.Tensor,
        is_seen: torch.Tensor,
        due: Due,
        beta: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return queries `(B, H, T, D)` for kernels as narrow as the number of pairs seen makes them."""
        scale = growth_of_kernels(self.config, is_seen.sum(-1), queries, *self.bandwidth)
        return queries if scale is None else (at_least_float32(queries) * scale[:, None, :, None])

    def smooth(self, queries: torch.Tensor, is_seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what queries retrieve `(B, H, T, D)`, and their weights `(B, H, T, P)`, 0 where nothing is seen."""
        num_slots = is_seen.shape[-1]
        keys, values = (at_least_float32(part[:, :, :num_slots]) for part in (self.keys, self.values))
        scores = at_least_float32(queries) @ keys.transpose(-1, -2)
        scores = scores.masked_fill(~is_seen[:, None], lowest_bias(scores.dtype))
        weights = scores.softmax(-1) * is_seen.any(-1)[:, None, :, None]
        return (weights @ values).to(self.values.dtype), weights

    def count(
        self, weights: torch.Tensor, is_seen: torch.Tensor, num_seen: torch.Tensor, numbers: torch.Tensor
    ) -> None:
        """Add the weights `(B, H, T, P)` of tokens `numbers` `(T,)` to the counters of pairs that they saw."""
        num_slots, is_seen = weights.shape[-1], is_seen[:, None]
        parts = {name: counter[..., :num_slots] for name, counter in self.counters.items()}
        weights = weights * is_seen
        parts["usage"] += weights.sum(2)
        parts["exposure"] += is_seen.sum(2)
        is_used = weights * num_seen[:, None, :, None] > 1
        last = (is_used * numbers[:, None]).amax(2).to(weights.dtype)
        parts["used_at"].copy_(torch.maximum(parts["used_at"], last))

    def make_room(self, is_full: torch.Tensor) -> int:
        """Return how many of the next tokens, one at least, have room for their pairs; make room if none has.

        Args:
            is_full (`torch.Tensor` of shape `(B, T)`): which of them complete a pair.
        """
        is_due = self.is_due(is_full)
        is_evicted = (self.held == self.max_pairs) & is_due[:, 0]
        if is_evicted.any():
            self.evict(is_evicted)
        num_held = self.held[:, None] + is_due.long().cumsum(-1)
        return int((num_held <= self.max_pairs).all(0).long().cumprod(0).sum())

    def is_due(self, is_full: torch.Tensor) -> torch.Tensor:
        """Return from which new tokens on a pair may be read for the first time `(B, T)`, by which complete one."""
        return is_full

    def evict(self, is_full: torch.Tensor) -> None:
        """Forget, in each full row `(B,)`, the pairs of each head that are rated lowest."""
        if self.is_taking and self.policy not in WITHOUT_STATISTICS:
            self.refuse_to_take()
        num_kept = self.max_pairs - max(1, self.max_pairs // ROOM)
        rate = self.policy if callable(self.policy) else POLICIES[self.policy]
        # Of pairs that are rated alike, the older ones go.
        order = rate(self).argsort(dim=-1, stable=True)
        kept = order[..., self.max_pairs - num_kept :].sort(-1).values  # (B, H, kept)

        def keep(tensor: torch.Tensor) -> None:
            index = kept if tensor.ndim == 3 else kept[..., None].expand(-1, -1, -1, tensor.shape[-1])
            rest = tensor.gather(2, index)
            tensor[is_full, :, :num_kept] = rest[is_full]

        for tensor in (self.keys, self.values, *self.counters.values()):
            keep(tensor)
        self.held = torch.where(is_full, num_kept, self.held)

    def refuse_to_take(self) -> NoReturn:
        """Raise `ValueError`: more pairs are taken over than fit, of which nothing is known to choose by."""
        policy = "a function" if callable(self.policy) else repr(self.policy)
        what, remedy, kept = "The text, read without a bound, has", "read it within `bounded(...)`", "its newest pairs"
        if self.num_joined:
            what, kept = "The joined texts, with what was read behind them, have", "the texts joined last"
            remedy = "memorize each within `bounded(...)` so that all fit, or consolidate the memory without a bound"
        raise ValueError(
            f"{what} more pairs of a head than the bound of {self.max_pairs}, and how they were used and how they "
            f"surprised, by which {policy} may choose, was not counted: {remedy}, or choose by policy='fifo', which "
            f"keeps {kept}, or 'random'."
        )

    def kept_pairs(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `(1, H, pairs, D)` of a row, of all pairs that a new text may read."""
        keys, values = self._held_pairs(row)
        return keys.clone(), values.clone()

    def _held_pairs(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        held = int(self.held[row])
        return self.keys[row, None, :, :held], self.values[row, None, :, :held]

    def named_numbers(self) -> dict[str, torch.Tensor]:
        """Return what a bounded memory is saved with besides, by name."""
        numbers = {name: torch.tensor(getattr(self, name)) for name in ("num_read", "num_joined")}
        return {**self.counters, **numbers, "held": self.held, "last_retrieval": self.states["last_retrieval"]}

    def set_numbers(self, numbers: dict[str, torch.Tensor]) -> None:
        """Set what [`BoundedMemoryLayer.named_numbers`] returned, of a layer that has started."""
        self.counters = {name: numbers[name].clone() for name in COUNTERS}
        self.held, self.states["last_retrieval"] = numbers["held"], numbers["last_retrieval"]
        self.num_read, self.num_joined = int(numbers["num_read"]), int(numbers["num_joined"])

    def take(self, layer: MemoryMosaicStates, is_token: torch.Tensor | None) -> None:
        """Take over what a layer without a bound holds: joined texts, or a text that was read.

        Their counters begin now. Nothing has used them, and all have an error of 1.

        Args:
            is_token (`torch.Tensor` of shape `(B, tokens)`, *optional*): False at padding, if there is any.

        Raises:
            ValueError: if pairs stand for several, or do not all fit and the policy had to choose by counters.
        """
        if not layer.is_initialized:
            return
        keys, values, bias = layer.keys, layer.values, layer.slot_bias
        if bias is None:
            bias = torch.zeros(len(keys), 1, keys.shape[2], device=keys.device)
            bias[:, :, 0] = -torch.inf
            if is_token is not None:
                count = is_token.long().cumsum(-1)
                bias = bias.masked_fill(~(is_token & (count > 1))[:, None], -torch.inf)
        if (bias.exp() > 1).any() or bias.shape[1] > 1:
            raise ValueError("Pairs that stand for several cannot be bounded: bound the memory, then consolidate it.")
        is_full = bias[:, 0] > -torch.inf
        self.states, self.num_joined, self.bandwidth = dict(layer.states), layer.num_joined, layer.bandwidth
        self.writer, self.read_mask, self.knows_ids = layer.writer, layer.read_mask, False
        self.is_taking = True
        self.take_pairs(keys, values, is_full)
        self.is_taking = False

    def take_pairs(self, keys: torch.Tensor, values: torch.Tensor, is_full: torch.Tensor) -> None:
        """Store the pairs of slots `(B, H, S, D)` that are full `(B, S)`."""
        # Nothing asks for them yet: zero queries use all alike.
        zeros = torch.zeros_like(keys[:, :, :1])
        for start in range(0, keys.shape[2], LONGEST_SEGMENT):
            segment = slice(start, start + LONGEST_SEGMENT)
            parts = keys[:, :, segment], values[:, :, segment]
            queries = zeros.expand(-1, -1, parts[0].shape[2], -1)
            self.read(queries, *parts, torch.zeros_like(is_full[:, segment]), is_full[:, segment])


# Classes of bounded layers by the kind of model (`layer_types`). Files of other models, which import this, add theirs.
BOUNDED_LAYERS: dict[str, type[BoundedMemoryLayer]] = {"memory_mosaic": BoundedMemoryLayer}


def bind_memory(cache: Cache, bound: tuple[PreTrainedConfig, int, Any]) -> None:
    """Replace the layers of a memory by bounded ones, which take over what they hold."""
    is_token = text_of(cache).past_mask()  # the first layer keeps the text for all
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, BoundedMemoryLayer):
            continue
        if not isinstance(layer, DynamicLayer):
            raise ValueError("A static memory is bounded by its length: pass a `DynamicCache`, or none.")
        bounded_layer = BOUNDED_LAYERS[bound[0].layer_types[0]](*bound)
        with torch.no_grad():
            bounded_layer.take(memory_layer(cache, index), is_token)
        cache.layers[index] = bounded_layer


def check_bound(max_pairs: int, policy: Any) -> None:
    """Raise `ValueError` for a bound that no memory can keep, or an unknown policy."""
    if isinstance(max_pairs, bool) or not isinstance(max_pairs, int) or max_pairs < 2:
        raise ValueError(f"max_pairs={max_pairs!r} must be a whole number of at least 2: the newest pair needs room.")
    if not callable(policy) and policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not one of {', '.join(POLICIES)}, and no function of a layer.")


@contextlib.contextmanager
def bounded(
    model: nn.Module, max_pairs: int, policy: str | Callable[[BoundedMemoryLayer], torch.Tensor] = "lru"
) -> Iterator[None]:
    """Let all memories that a model writes hold at most so many pairs in each head.

    Args:
        model: a Memory Mosaic with any head, in the whole process. Of v2, long-term heads have a bound; short-term
            ones read a window as ever.
        max_pairs (`int`): of each head. A full head forgets a sixteenth of them at once. Pairs that no token may read
            yet, by the delay of v2, wait besides: they can neither be used nor forgotten.
        policy (`str` or a function): which pairs stay. `lru`: the most recently used, which a token gave more than an
            even share of its weight; `usage`: the most used, by weight and token that could have used it; `surprise`:
            those whose values the head had not expected; `fifo`: the newest; `random`; or a function that returns
            ratings `(B, H, P)` of a [`BoundedMemoryLayer`], of which the highest stay.

    Joined texts, and a text that was read without a bound, count within it from their first new token on. They come
    without counters: if they do not fit, `fifo` keeps the texts that were joined last, and policies that choose by
    counters are refused. Where they fit, the new tokens count their use; of pairs that are rated alike, those that
    were joined first go first.

    Raises:
        ValueError: if `max_pairs` is below 2, the policy is unknown, or the model has no memories or no long-term
            heads.
    """
    check_bound(max_pairs, policy)
    models: Any = [module for module in model.modules() if hasattr(module, "bound")]
    if not models:
        raise ValueError(f"{type(model).__name__} has no memories that could be bounded: pass a Memory Mosaic.")
    if any(getattr(module.config, "num_long_term_heads", 1) == 0 for module in models):
        raise ValueError("This model has no long-term heads, whose memory could be bounded: leave the bound out.")
    before = [module.bound for module in models]
    for module in models:
        module.bound = (module.config, max_pairs, policy)
    try:
        yield
    finally:
        for module, bound in zip(models, before, strict=True):
            module.bound = bound


__all__ = ["BoundedMemoryLayer", "bounded"]

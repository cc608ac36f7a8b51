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
"""What a model has read as an object: texts that are read alone, joined in any order, and forgotten one by one.

The pairs of a memory are a set without positions. So texts that were read alone give the same answers in any order of
joining, and without one of them those of a memory that never had it.

Shapes use H heads, S slots of a memory, D head width. A text of T tokens fills T slots: slot t holds the pair of its
token t - 1, which token t completes, and slot 0 is empty.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from .cache_memory_mosaic import memory_kwargs, memory_layer
from .files_memory_mosaic import MemoryFilesMixin
from .identity_memory_mosaic import MemoryWriter, tokenizer_fingerprint, unwrapped
from .inspection_memory_mosaic import PrintedTable, trace_tokens
from .masking_memory_mosaic import find_documents, growth_of_kernels
from .merging_memory_mosaic import merge_pairs, shares


# Tokens that are read at a time, so that reading needs little memory besides the pairs.
CHUNK_LENGTH = 1024
# Tokens of texts of one length that are read together, each in a row of its own.
BATCH_TOKENS = 8192
# Token and place of a slot that stands for several pairs.
MERGED = -1


@dataclass(eq=False)
class MosaicMemory(MemoryFilesMixin):
    """Pairs of texts that a model has read, each alone.

    Made by `model.memorize(input_ids)`, [`MosaicMemory.union`] and [`MosaicMemory.from_pretrained`].

    Args:
        config ([`MemoryMosaicConfig`]): of the model.
        writer (`MemoryWriter`): the weights that have read the texts.
        keys, values (`list[torch.Tensor]`, one for each layer, of shape `(1, H, S, D)`): the pairs.
        slot_bias (`list[torch.Tensor]`, one for each layer, of shape `(1, H or 1, S)`): added to the scores of each
            slot: 0 for a pair, -inf for an empty slot, log n for a pair that stands for n.
        input_ids (`torch.LongTensor` of shape `(S,)`): the tokens; -1 where pairs were merged, as in `places`.
        source_ids (`torch.LongTensor` of shape `(S,)`): the text of each slot, as an index into `sources`.
        places (`torch.LongTensor` of shape `(S,)`): where in its text each slot's token stands.
        sources (`list[str]`): names of the texts.
        tokenizer (`str`, *optional*): fingerprint of the tokenizer that made the tokens, if it is known.
    """

    config: PreTrainedConfig
    writer: MemoryWriter
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slot_bias: list[torch.Tensor]
    input_ids: torch.Tensor
    source_ids: torch.Tensor
    places: torch.Tensor
    sources: list[str]
    tokenizer: str | None = None
    indexes: dict[int, dict[Any, Any]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        """Return the number of pairs of a layer."""
        return int((self.slot_bias[0][0, 0] > -torch.inf).sum())

    def __repr__(self) -> str:
        names = ", ".join(self.sources[:5]) + (", ..." if len(self.sources) > 5 else "")
        texts = f"{len(self.sources)} text{'s' if len(self.sources) != 1 else ''}"
        return f"MosaicMemory({len(self):,} pairs of {texts}: {names})"

    @property
    def nbytes(self) -> int:
        """Size of the pairs of all layers in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values, *self.slot_bias))

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    # Operations on the set

    @classmethod
    def union(cls, memories: Sequence["MosaicMemory"]) -> "MosaicMemory":
        """Return the memory of all texts of some memories, which stay as they are. Their order changes no answer.

        Raises:
            ValueError: if there is none, if weights differ that wrote them, or if two have a text of one name.
        """
        memories = list(memories)
        if not memories:
            raise ValueError("union of no memories: pass at least one.")
        first = memories[0]
        for other in memories[1:]:
            check_same_writer(first, other)
        sources = [name for memory in memories for name in memory.sources]
        if repeated := sorted({name for name in sources if sources.count(name) > 1}):
            raise ValueError(
                f"Two memories have a text named {repeated[0]!r}: its pairs would count twice. Name texts by "
                "`memorize(..., source=...)`, or let one memory `forget` it."
            )
        offsets = torch.tensor([0, *(len(memory.sources) for memory in memories)]).cumsum(0).tolist()
        source_ids = [memory.source_ids + offset for memory, offset in zip(memories, offsets[:-1], strict=True)]
        heads = [max(memory.slot_bias[index].shape[1] for memory in memories) for index in range(len(first.keys))]
        return replace(
            first,
            keys=_joined(memories, lambda memory, index: memory.keys[index]),
            values=_joined(memories, lambda memory, index: memory.values[index]),
            slot_bias=_joined(memories, lambda memory, index: memory.slot_bias[index].expand(-1, heads[index], -1)),
            input_ids=torch.cat([memory.input_ids.to(first.device) for memory in memories]),
            source_ids=torch.cat([ids.to(first.device) for ids in source_ids]),
            places=torch.cat([memory.places.to(first.device) for memory in memories]),
            sources=sources,
        )

    def select(self, sources: Iterable[str]) -> "MosaicMemory":
        """Return the memory of some texts alone.

        Raises:
            ValueError: if one is not among `sources`.
        """
        names = set(sources)
        chosen = [index for index, name in enumerate(self.sources) if name in names]
        for name in names - set(self.sources):
            raise ValueError(self._unknown(name))
        kept = self._keep_slots(torch.isin(self.source_ids, torch.tensor(chosen, device=self.device)))
        new_ids = torch.zeros(len(self.sources), dtype=torch.long, device=self.device)
        new_ids[chosen] = torch.arange(len(chosen), device=self.device)
        return replace(kept, source_ids=new_ids[kept.source_ids], sources=[self.sources[index] for index in chosen])

    def forget(self, source: str, tokens: slice | None = None) -> "MosaicMemory":
        """Forget a text, or the pairs of some of its tokens, in place; return the memory.

        Without a text, answers are those of a memory that never had it, to the bit. Pairs of a text's other tokens
        were made by a model that had read the forgotten ones, so that a part is forgotten as pairs only.

        Args:
            source (`str`): name of a text.
            tokens (`slice`, *optional*): places in that text, negative ones from the last that is left; the whole of
                it when absent.

        Raises:
            ValueError: if the memory has no text of this name, or none of these tokens.
        """
        if source not in self.sources:
            raise ValueError(self._unknown(source))
        if tokens is None:
            rest = self.select(name for name in self.sources if name != source)
        else:
            # The pair of token t lies in slot t + 1.
            is_source = self.source_ids == self.sources.index(source)
            length = int(self.places[is_source].max()) + 1
            if length == MERGED + 1:
                raise ValueError(
                    f"The pairs of {source!r} were merged by `consolidate`, or kept within a bound: forget the whole "
                    "text."
                )
            of_tokens = torch.tensor(range(length)[tokens], dtype=torch.long, device=self.device) + 1
            is_forgotten = is_source & torch.isin(self.places, of_tokens)
            if not is_forgotten.any():
                raise ValueError(f"{source!r} has no pairs of tokens {tokens} left: its last place is {length - 1}.")
            rest = self._keep_slots(~is_forgotten)
        self.__dict__.update(rest.__dict__)
        return self

    def consolidate(
        self,
        max_pairs: int,
        bandwidth: float | None = None,
        bandwidth_start: int | None = None,
        model: nn.Module | None = None,
    ) -> torch.Tensor:
        """Merge pairs with near keys, in place, so that each head holds at most so many.

        Pairs of equal keys are merged without error. A slot stands for as many pairs as were merged into it, with the
        means of their keys and values, and pairs of different texts stay apart, so that each text can be forgotten.
        Tokens can not: a merged slot has no place in its text.

        Args:
            max_pairs (`int`): at least one for each text.
            bandwidth, bandwidth_start: as in [`MosaicMemory.to_cache`], if the memory will be read so.
            model (*optional*): that wrote the memory. Needed for v2 alone, whose kernels it has learnt.

        Returns:
            `torch.Tensor` of shape `(layers, H)`: the largest possible error of what a head retrieves by a query, in
            lengths of a value, for questions of up to `max_position_embeddings` tokens. Layers above the first get
            other queries than before, which are not counted.

        Raises:
            ValueError: if there are more texts than pairs may be left, or for v2 the model is missing or another one.
        """
        if isinstance(max_pairs, bool) or max_pairs < max(1, len(self.sources)):
            raise ValueError(
                f"max_pairs={max_pairs} is too few for the {len(self.sources)} texts of the memory, whose pairs stay "
                "apart: raise it, or let the memory `forget` some."
            )
        parts = [self.select([name]) for name in self.sources]
        budgets = shares([int((part.slot_bias[0] > -torch.inf).sum(-1).max()) for part in parts], max_pairs)
        growth = self._largest_growth(model, *self._bandwidth(bandwidth, bandwidth_start))
        drifts = torch.zeros(len(self.keys), self.keys[0].shape[1], dtype=torch.float64)
        for part, budget in zip(parts, budgets, strict=True):
            drifts = torch.maximum(drifts, part._merge(budget))
        merged = MosaicMemory.union(parts) if parts else self
        self.__dict__.update(merged.__dict__)
        drifts = drifts if growth is None else drifts * growth
        return 2 * (drifts / 2).tanh()

    def _largest_growth(
        self, model: nn.Module | None, exponent: float | None, start: int | None
    ) -> torch.Tensor | float | None:
        """Return how many times longer than keys queries are at most, of each head `(layers, H)` or of all.

        Args:
            model (*optional*): that wrote the memory; needed of v2, where keys have length 1 and queries that of beta.
            exponent, start (*optional*): of the growth of kernels, see [`MosaicMemory._bandwidth`].
        """
        largest = torch.tensor([self.num_pairs() + self.config.max_position_embeddings])
        if hasattr(self.config, "bandwidth_exponent"):
            growth = growth_of_kernels(self.config, largest, self.keys[0], exponent, start)
            return None if growth is None else float(growth)
        if model is None:
            raise ValueError(
                "How far merged pairs of v2 may move an answer follows from the kernels that the model has learnt: "
                "pass it, `consolidate(max_pairs, model=model)`."
            )
        base: Any = unwrapped(model)
        if not self.writer.is_same(MemoryWriter(base)):
            raise ValueError("Another model wrote this memory: pass that one.")
        sharpness: torch.Tensor = base.inverse_temperatures(largest, self.dtype)
        return sharpness.cpu()

    def num_pairs(self) -> float:
        """Return the number of pairs of a head, those that a slot stands for included."""
        return float(self.slot_bias[0][0, 0].double().exp().sum())

    def _merge(self, max_slots: int) -> torch.Tensor:
        """Merge the pairs of each head into so many slots; return by how much a score may change `(layers, H)`."""
        if int((self.slot_bias[0] > -torch.inf).sum(-1).max()) <= max_slots:
            return torch.zeros(len(self.keys), self.keys[0].shape[1], dtype=torch.float64)
        layers = []
        for keys, values, bias in zip(self.keys, self.values, self.slot_bias, strict=True):
            heads = zip(keys[0], values[0], bias[0].expand(keys.shape[1], -1), strict=True)
            layers.append([merge_pairs(*head, max_slots) for head in heads])
        self.keys = [torch.stack([head.keys for head in heads])[None] for heads in layers]
        self.values = [torch.stack([head.values for head in heads])[None] for heads in layers]
        self.slot_bias = [torch.stack([head.bias for head in heads])[None] for heads in layers]
        self.source_ids = torch.zeros(max_slots, dtype=torch.long, device=self.device)
        self.input_ids, self.places = (torch.full_like(self.source_ids, MERGED) for _ in range(2))
        self.indexes = {}
        return torch.tensor([[head.drift for head in heads] for heads in layers], dtype=torch.float64)

    def _keep_slots(self, is_kept: torch.Tensor) -> "MosaicMemory":
        return replace(
            self,
            keys=[part[:, :, is_kept] for part in self.keys],
            values=[part[:, :, is_kept] for part in self.values],
            slot_bias=[part[:, :, is_kept] for part in self.slot_bias],
            input_ids=self.input_ids[is_kept],
            source_ids=self.source_ids[is_kept],
            places=self.places[is_kept],
        )

    def _unknown(self, source: str) -> str:
        names = ", ".join(map(repr, self.sources[:10])) or "none"
        return f"The memory has no text named {source!r}. It has {names}{', ...' if len(self.sources) > 10 else ''}."

    def clone(self) -> "MosaicMemory":
        """Return a copy with tensors of its own."""
        return self._map(lambda tensor: tensor.clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "MosaicMemory":
        """Return the memory on a device, with pairs in a precision. A model reads pairs of its own precision only."""
        moved = self._map(lambda tensor: tensor.to(device))
        if dtype is None:
            return moved
        return replace(
            moved,
            keys=[part.to(dtype) for part in moved.keys],
            values=[part.to(dtype) for part in moved.values],
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MosaicMemory":
        lists: dict[str, Any] = {
            name: [function(part) for part in getattr(self, name)] for name in ("keys", "values", "slot_bias")
        }
        flat: dict[str, Any] = {name: function(getattr(self, name)) for name in ("input_ids", "source_ids", "places")}
        return replace(self, **lists, **flat, sources=list(self.sources))

    # Reading

    def to_cache(
        self,
        batch_size: int = 1,
        max_cache_len: int | None = None,
        bandwidth: float | None = None,
        bandwidth_start: int | None = None,
    ) -> Cache:
        """Return a cache of the texts, behind which a new text begins, for `forward` and `generate`.

        Args:
            batch_size (`int`): rows, all with these texts.
            max_cache_len (`int`, *optional*): makes it a `StaticCache` of so many tokens, the memory's included.
            bandwidth (`float`, *optional*): exponent of the growth of kernels with the number of pairs; the
                configuration's `bandwidth_exponent` when absent.
            bandwidth_start (`int`, *optional*): number of pairs from which on they grow; the configuration's when
                absent, or `max_position_embeddings` for a configuration without growth.
        """
        self.writer.check_unchanged()
        cache: Any
        if max_cache_len is None:
            cache = DynamicCache(config=self.config)
        else:
            cache = StaticCache(config=self.config, max_cache_len=max_cache_len)
        for index, (keys, values, bias) in enumerate(zip(self.keys, self.values, self.slot_bias, strict=True)):
            layer = memory_layer(cache, index)
            if index == 0:
                is_known = bool((self.input_ids != MERGED).all())
                layer.note_text(self.input_ids.expand(batch_size, -1) if is_known else None, None)
            layer.begin_with(*(part.expand(batch_size, -1, -1, -1) for part in (keys, values)))
            layer.begin_text(bias.expand(batch_size, -1, -1))
            layer.num_joined, layer.index = len(self.input_ids), self.indexes.setdefault(index, {})
        first = memory_layer(cache)
        first.writer = self.writer
        first.bandwidth = self._bandwidth(bandwidth, bandwidth_start)
        return cache

    def _bandwidth(self, exponent: float | None, start: int | None) -> tuple[float | None, int | None]:
        """Return exponent and start of the growth of kernels as a cache has them, see [`MosaicMemory.to_cache`]."""
        if not hasattr(self.config, "bandwidth_exponent"):
            if exponent is not None or start is not None:
                raise ValueError("Kernels of v2 narrow as they have learnt to: leave bandwidth out.")
            return None, None
        if exponent is not None and start is None and not self.config.bandwidth_exponent:
            start = self.config.max_position_embeddings
        return exponent, start

    def prompt(
        self, question: Any, tokenizer: Any = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the keyword arguments by which `generate` and `forward` read a question behind the memory.

        Args:
            question (`str`, `list[str]` or `torch.LongTensor` of shape `(B, T)`): texts, or their ids.
            tokenizer: of the model; needed for texts.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): of ids, 0 at padding. Texts have one of
                their own.
            kwargs: of [`MosaicMemory.to_cache`].

        Returns:
            `dict`: `input_ids` `(B, T)`, `attention_mask` `(B, S + T)` over memory and question, and a cache that is
            the caller's own: the memory stays as it is.

        Raises:
            ValueError: if the ids are none or not `(B, T)`, if the mask has another shape or is given with texts, or
                if texts come without a tokenizer, or with another one than the memory's (where that is known, see
                `memorize`).
        """
        if isinstance(question, torch.Tensor):
            ids, mask = question, torch.ones_like(question) if attention_mask is None else attention_mask
        elif attention_mask is not None:
            raise ValueError("attention_mask is for ids: leave it out, the tokenizer makes the one of texts.")
        elif tokenizer is None:
            raise ValueError("The question is a text: pass the model's tokenizer too, or pass ids.")
        elif self.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
            raise ValueError("Another tokenizer made the tokens of this memory: pass that one, or the question's ids.")
        else:
            texts = [question] if isinstance(question, str) else list(question)
            batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left")
            ids, mask = batch["input_ids"], batch["attention_mask"]
        if ids.ndim != 2 or 0 in ids.shape:
            raise ValueError(
                f"The question has ids of shape {tuple(ids.shape)}: it must be (batch, tokens), not empty."
            )
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}: it must be that of the question's ids, "
                f"{tuple(ids.shape)}, without the memory's."
            )
        ids, mask = ids.to(self.device), mask.to(self.device, torch.long)
        past = mask.new_ones(ids.shape[0], self.input_ids.shape[0])
        cache = self.to_cache(ids.shape[0], **kwargs)
        return {"input_ids": ids, "attention_mask": torch.cat([past, mask], dim=1), **memory_kwargs(cache)}

    def explain(self, model: PreTrainedModel, output: torch.Tensor, **kwargs: Any) -> "MemoryRecall":
        """Return from where each token of a text was recalled.

        All pairs are read, also where the text was written within [`nearest`].

        Args:
            model: that wrote the memory, with its head.
            output (`torch.LongTensor` of shape `(1, T)`): the text, as `generate(**memory.prompt(...))` returns it.
            kwargs: of [`MosaicMemory.to_cache`], those that `prompt` was given: a text is recalled in another way if
                kernels are of another width.

        Raises:
            ValueError: if the text has fewer than two tokens, if there are several texts, or within [`bounded`], where
                pairs go while the text is read.
        """
        if output.ndim != 2 or output.shape[0] != 1 or output.shape[1] < 2:
            raise ValueError(f"The text has shape {tuple(output.shape)}: it must be (1, tokens), two tokens or more.")
        trace = trace_tokens(model, cast(torch.LongTensor, output), memory=self, **kwargs)
        # Of contextual units, to the logit of the token behind each: (L, H, T - 1), shared out by the weights.
        units = trace.contribution[:, 0, 0, : trace.weights.shape[2], :-1]
        pairs = torch.einsum("lht,lhts->ts", units, trace.weights[:, 0, :, :-1])
        return MemoryRecall(pairs, self.source_ids.cpu(), self.places.cpu(), list(self.sources), output[0].cpu())

    def incomplete_sources(self) -> dict[str, str]:
        """Return the names of texts that a new reading cannot be compared with, each with the reason."""
        reasons = {}
        for index, name in enumerate(self.sources):
            places = self.places[self.source_ids == index]
            if (places == MERGED).any():
                reasons[name] = "its pairs were merged by `consolidate`, or chosen within a bound"
            elif not torch.equal(places, torch.arange(len(places), device=self.device)):
                reasons[name] = "some of its tokens were forgotten, or it was read within a bound"
        return reasons

    def verify(self, model: Any, sources: Iterable[str] | None = None) -> dict[str, float]:
        """Let a model read texts again, and return how far their pairs are from those of the memory.

        Args:
            model: that wrote the memory.
            sources (*optional*): names of texts; all when absent.

        Returns:
            the largest difference of a number of any key or value, by the name of each text. Rounding alone gives
            about 1e-6 in float32.

        Raises:
            ValueError: if one of the texts cannot be compared, see [`MosaicMemory.incomplete_sources`], or is not
                among `sources`; within [`bounded`], where another reading keeps other pairs.
        """
        if unwrapped(model).bound is not None:
            raise ValueError("Within `bounded`, a text that is read again keeps other pairs: leave the bound.")
        names, incomplete = list(self.sources if sources is None else sources), self.incomplete_sources()
        if left_out := [name for name in names if name in incomplete]:
            reasons = "; ".join(f"{name!r}: {incomplete[name]}" for name in left_out[:10])
            raise ValueError(
                f"{len(left_out)} of {len(names)} texts cannot be compared with a new reading ({reasons}). Choose "
                "others, `memory.verify(model, sources=[...])`."
            )
        differences = {}
        for name in names:
            own = self.select([name])
            again = model.memorize(own.input_ids[None], source=name)
            parts = zip(own.keys + own.values, again.keys + again.values, strict=True)
            differences[name] = max(float((one - other).abs().max()) for one, other in parts)
        return differences


@dataclass
class MemoryRecall:
    """From where each token of a text was recalled.

    With the scale of the final norm held at its value, the logit of a token, less the mean over the vocabulary, is a
    sum over what each unit retrieved from each pair (see [`MemoryMosaicTrace`]).

    Args:
        contribution (`torch.Tensor` of shape `(T - 1, S + T)`): what each pair of the memory, and then of the text,
            adds to the logit of tokens 1 to T - 1, over all units.
        source_ids, places (`torch.LongTensor` of shape `(S,)`): of the memory's slots.
        sources (`list[str]`): names of the texts.
        input_ids (`torch.LongTensor` of shape `(T,)`): of the text.
    """

    contribution: torch.Tensor
    source_ids: torch.Tensor
    places: torch.Tensor
    sources: list[str]
    input_ids: torch.Tensor

    def by_source(self) -> torch.Tensor:
        """Return what each text of the memory, and last the text itself, adds to the logit `(T - 1, sources + 1)`."""
        own = torch.full((self.contribution.shape[1] - len(self.source_ids),), len(self.sources))
        owners = torch.cat([self.source_ids.cpu(), own]).expand_as(self.contribution)
        sums = self.contribution.new_zeros(len(self.contribution), len(self.sources) + 1)
        return sums.scatter_add(1, owners, self.contribution)

    def table(self, tokenizer: Any) -> PrintedTable:
        """Return [`~MemoryRecall.by_source`] in words.

        Args:
            tokenizer: of the text.

        Returns:
            `PrintedTable`, a list of dictionaries that prints as a table: for each token but the first its `token`,
            and in nats what each text adds to its logit, `from NAME`, and what the text itself adds, `own`.
        """
        columns = [*(f"from {name}" for name in self.sources), "own"]
        tokens = [repr(tokenizer.decode([token])) for token in self.input_ids[1:].tolist()]
        rows = zip(tokens, self.by_source().tolist(), strict=True)
        return PrintedTable({"token": token, **dict(zip(columns, sums, strict=True))} for token, sums in rows)

    def strongest(self, token: int, num: int = 5) -> list[tuple[str | None, int, float]]:
        """Return the pairs that add most to the logit of a token, numbered from 1, the first of the text being 0.

        Returns:
            the text's name (`None`: the text itself), the place of the token that completed the pair, and the logit.
        """
        values, slots = self.contribution[token - 1].topk(min(num, self.contribution.shape[1]))
        pairs = []
        for value, slot in zip(values.tolist(), slots.tolist(), strict=True):
            is_own = slot >= len(self.source_ids)
            name = None if is_own else self.sources[int(self.source_ids[slot])]
            place = slot - len(self.source_ids) if is_own else int(self.places[slot])
            pairs.append((name, place, value))
        return pairs


def _joined(memories: Sequence[MosaicMemory], part: Callable[[MosaicMemory, int], torch.Tensor]) -> list[torch.Tensor]:
    device = memories[0].device
    layers = range(len(memories[0].keys))
    return [torch.cat([part(memory, index).to(device) for memory in memories], dim=2) for index in layers]


def check_same_writer(first: MosaicMemory, other: MosaicMemory) -> None:
    """Raise `ValueError` if two memories were not written by the same weights in the same precision."""
    if first.dtype != other.dtype:
        raise ValueError(
            f"One memory holds pairs in {first.dtype}, another in {other.dtype}: convert one, `memory.to(dtype=...)`."
        )
    if None not in (first.tokenizer, other.tokenizer) and first.tokenizer != other.tokenizer:
        raise ValueError(
            f"Another tokenizer made the tokens of {other.sources[0]!r} than those of {first.sources[0]!r}: read both "
            "by one tokenizer."
        )
    if not first.writer.is_same(other.writer):
        raise ValueError(
            f"Other weights have read {other.sources[0]!r} than {first.sources[0]!r}: a memory is one model's. Read "
            "all texts with the same model."
        )


class MemorizingMixin:
    """`memorize`, of all Memory Mosaics that read tokens."""

    base_model: Any
    config: PreTrainedConfig
    training: bool

    @torch.no_grad()
    def memorize(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        source: str | Sequence[str] | None = None,
        position_ids: torch.Tensor | None = None,
        tokenizer: Any = None,
    ) -> MosaicMemory | list[MosaicMemory]:
        """Read texts, each alone, and return what was read. Within [`bounded`], that is what each head has kept.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`).
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
            source (`str` or list of them, *optional*): names of the texts; by default the beginning of a hash of the
                ids.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): they start again where a text begins, if
                rows hold several.
            tokenizer (*optional*): that made the ids; questions by another one are refused then.

        Returns:
            [`MosaicMemory`] of one text, or a list of them if there are several rows or texts.

        Raises:
            ValueError: if the model is in training mode, if the ids are not `(B, T)`, or if names are not as many as
                texts.
        """
        if self.training:
            raise ValueError("A memory is read without dropout: call `model.eval()` first.")
        if getattr(self.config, "num_long_term_heads", 1) == 0:
            raise ValueError("This model has no long-term heads, so that nothing of a text would be kept.")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}: it must be (batch, tokens).")
        texts = _texts(input_ids, attention_mask, position_ids)
        names = [source] if isinstance(source, str) else source
        names = [f"text {_hash(text)}" for text in texts] if names is None else list(names)
        if len(names) != len(texts):
            raise ValueError(f"{len(names)} names for {len(texts)} texts: pass one `source` for each text.")
        by_number = self._read(texts, names)
        memories = [by_number[number] for number in range(len(texts))]
        for memory in memories:
            memory.tokenizer = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        return memories[0] if len(memories) == 1 and len(input_ids) == 1 else memories

    def _read(self, texts: list[torch.Tensor], names: list[str]) -> dict[int, MosaicMemory]:
        """Return the memory of each text by its number. Texts of one length are rows of a batch without padding."""
        memories: dict[int, MosaicMemory] = {}
        for batch in _batches([len(text) for text in texts]):
            cache = DynamicCache(config=self.config)
            for chunk in torch.stack([texts[number] for number in batch]).split(CHUNK_LENGTH, dim=1):
                self.base_model(chunk, use_cache=True, **memory_kwargs(cache))
            layers = [memory_layer(cache, index) for index in range(len(cache.layers))]
            for row, number in enumerate(batch):
                memories[number] = self._memory_of(layers, row, texts[number], names[number])
        return memories

    def _memory_of(self, layers: list[Any], row: int, ids: torch.Tensor, source: str) -> MosaicMemory:
        """Return the memory of a row of a cache that has read ids `(T,)` of a text."""
        places = torch.arange(len(ids), device=ids.device)
        bias = torch.zeros(1, 1, len(ids), device=ids.device)
        if self.base_model.bound is None:
            bias[:, :, 0] = -torch.inf
            pairs = [tuple(_own(states, row) for states in (layer.keys, layer.values)) for layer in layers]
        else:  # slots have no empty one in front, and if some were forgotten, pairs of other tokens in each head
            pairs = [layer.kept_pairs(row) for layer in layers]
            held = pairs[0][0].shape[2]
            is_whole = held == len(ids) - 1
            ids, places = (part[1:] if is_whole else part.new_full((held,), MERGED) for part in (ids, places))
            bias = bias[:, :, :held]
        keys, values = (list(parts) for parts in zip(*pairs, strict=True))
        return MosaicMemory(
            config=self.config,
            writer=layers[0].writer,
            keys=keys,
            values=values,
            slot_bias=[bias] * len(layers),
            input_ids=ids,
            source_ids=torch.zeros_like(ids),
            places=places,
            sources=[source],
        )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of texts of one length, at most `BATCH_TOKENS` of their tokens at a time."""
    for length, numbers in itertools.groupby(
        sorted(range(len(lengths)), key=lengths.__getitem__), lengths.__getitem__
    ):
        of_length, num_rows = list(numbers), max(1, BATCH_TOKENS // length)
        yield from (of_length[start : start + num_rows] for start in range(0, len(of_length), num_rows))


def _own(states: torch.Tensor, row: int) -> torch.Tensor:
    """Return a row `(1, ...)` that does not keep the memory of the others."""
    return states if len(states) == 1 else states[row, None].clone()


def _hash(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:8]


def _texts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return the ids of each text `(tokens,)`, without padding."""
    is_token = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    documents = find_documents(input_ids[:, :, None], attention_mask, None, position_ids)
    texts = []
    for row in range(len(input_ids)):
        numbers = is_token[row].long() if documents is None else documents[row] + 1
        numbers = numbers.masked_fill(~is_token[row], 0)
        texts += [input_ids[row, numbers == number] for number in numbers.unique() if number]
    return texts


__all__ = ["MemorizingMixin", "MosaicMemory"]

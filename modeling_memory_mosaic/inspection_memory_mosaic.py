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
"""Measures of each unit of a Memory Mosaic: the predictive disentanglement of arXiv 2405.06394 made visible.

A unit is one head of a layer's contextual or persistent memory. Each of its retrievals predicts a value that the next
token completes. [`inspect_units`] measures how wrong a unit was, how sharply it chose, and how much of its layer's
output it made; [`measure_units`] sums this up for a model card. [`trace_tokens`] shows for each token from which pairs
each unit predicted the next one, and how much of its logit the unit made. All is recomputed from what the memories
read, by their own operators, whatever attention function the model uses.

Of Memory Mosaics v2, contextual units are the short-term heads of a layer, and behind them its long-term heads; a
dense persistent memory is one unit without slots.

Shapes use L layers, B batch, H heads, T tokens, D head width, C hidden size, N persistent slots per head, S slots of
texts that were joined before (0 if there are none).
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .cache_memory_mosaic import MEMORY_NAME, memory_layer
from .masking_memory_mosaic import strict_rule
from .ops_memory_mosaic import at_least_float32, kernel_smoothing, scale_to_length


# Kinds of units, in the order of every dimension of kinds. A memory has its kind as `kind`.
KINDS = ("contextual", "persistent")


@dataclasses.dataclass
class MemoryMosaicUnits:
    """Measures of [`inspect_units`], on the CPU, in float32 (float64 for a float64 model). NaN where nothing is known.

    Args:
        error (`torch.Tensor` of shape `(L, B, H, T)`): the surprise of contextual units, |y_t - v_t|^2 / |v_t|^2, for
            the value y_t retrieved at token t and the value v_t that the next token gave its pair. 0 is a perfect
            prediction, 1 that of a unit which retrieves 0, as at the first token of a text. More than 1 is possible:
            training never asks a unit for the value itself. NaN at each text's last token, whose pair never completes.
        entropy (`torch.Tensor` of shape `(L, 2, B, H, T)`): of the retrieval weights, in nats; contextual units first,
            then persistent ones. NaN for a token that has no pair to read: the first of each text.
        share (`torch.Tensor` of shape `(L, 2, B, H, T)`): c . o / |o|^2, where o is the output of the memory layer
            without its bias, a sum over units, and c what this unit adds to it (`o_proj` of its retrieval alone).
            Shares of a layer's units sum to 1; one is negative if the unit works against the others. NaN where o is 0.
        norm (`torch.Tensor` of shape `(L, 2, B, H, T)`): |c| / |x|, where x is the residual stream that c is added to.

    Everything is NaN at padding, and where one kind has fewer units than the other.

    `levels`, of v2 alone, has the number of units of each level, in their order: `short_term`, `long_term`, and then
    `persistent`.
    """

    error: torch.Tensor
    entropy: torch.Tensor
    share: torch.Tensor
    norm: torch.Tensor
    levels: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def effective_pairs(self) -> torch.Tensor:
        """Number of pairs `(L, 2, B, H, T)` over which equal weights have this entropy, exp(entropy)."""
        return self.entropy.exp()


@dataclasses.dataclass
class MemoryMosaicTrace:
    """Traces of [`trace_tokens`], on the CPU, in float32 (float64 for a float64 model). NaN where nothing is known.

    Logits are those of the token that follows token t, less their mean over the vocabulary: a softmax does not depend
    on what all logits have in common. With the scale of the final norm held at its value, such a logit is a sum over
    what was added to the residual stream, so that `logit == embedding + biases + contribution.sum(dim=(0, 1, 3))` to
    rounding. This shows what each part gave to the head, not what the model would predict without it: the scale, and
    what later layers retrieve, would then change.

    Args:
        weights (`torch.Tensor` of shape `(L, B, H, T, S + T)`): what token t took, in contextual units, from the pair
            that token s completed, those of joined texts first. The key of that pair is of the token before s, its
            value of both. Zero for tokens behind t. Rows sum to 1, or to 0 where nothing is stored: at the first token
            of each text, if no others were joined.
        slot_weights (`torch.Tensor` of shape `(L, B, H, T, N)`): weights of persistent units over their slots.
        contribution (`torch.Tensor` of shape `(L, 2, B, H, T)`): what each unit adds to the logit; contextual units
            first, then persistent ones. 0 where one kind has fewer units than the other.
        embedding (`torch.Tensor` of shape `(B, T)`): what the embedding of token t adds.
        biases (`torch.Tensor` of shape `(B, T)`): what all biases together add; 0 if there are none.
        logit (`torch.Tensor` of shape `(B, T)`): the model's logit, relative to the mean over the vocabulary.
        log_probability (`torch.Tensor` of shape `(B, T)`): that the model gave the token which follows.

    All but the weights are NaN at the last token of each text, which nothing follows. Everything is NaN at padding.

    `levels` as in [`MemoryMosaicUnits`].
    """

    weights: torch.Tensor
    slot_weights: torch.Tensor
    contribution: torch.Tensor
    embedding: torch.Tensor
    biases: torch.Tensor
    logit: torch.Tensor
    log_probability: torch.Tensor
    levels: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def persistent_share(self) -> torch.Tensor:
        """Sum of |contribution| over persistent units, divided by the sum over all units, `(B, T)`.

        Absolute values keep the quotient between 0 and 1: in plain sums, units for and against the token would cancel.
        """
        totals = self.contribution.abs().sum(dim=(0, 3))
        return totals[1] / totals.sum(0)


# What memories retrieve, recomputed


class _Reading(NamedTuple):
    """What a memory has read: hidden states `(B, T, C)`, and the arguments of its forward that describe them.

    `joined` are keys and values `(B, H, S, D)` of texts that were joined before, and the biases of their slots.
    `of_levels` is what short-term and long-term heads of v2 need to know of the pass.
    """

    hidden_states: torch.Tensor
    is_token: torch.Tensor | None
    document_ids: torch.Tensor | None
    query_scale: torch.Tensor | None = None
    joined: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    of_levels: Any = None


def _readable_slots(is_token: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Return which slots each token may read, `(B, 1, T, T)`, by the rule of the model's own masks."""
    batch_size, num_tokens = is_token.shape
    rows, places = (torch.arange(n, device=is_token.device) for n in (batch_size, num_tokens))
    allowed = strict_rule(is_token, document_ids)(rows[:, None, None], None, places[:, None], places)
    return (allowed & (places <= places[:, None]))[:, None]


def _retrieve_contextual(memory: Any, reading: _Reading) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_states, is_token, document_ids, query_scale, joined, _ = reading
    scalars = memory.scalars()
    keys, queries, _ = memory.keys_and_queries(hidden_states, query_scale, is_token, document_ids, None, scalars)
    values = memory.pair_values(hidden_states, is_token, None, scalars).to(keys.dtype)
    # Slot t holds the pair that token t completes. Slot 0 is empty: a token reads it if it has nothing else to read.
    slot_keys, slot_values = memory.store(keys[:, :, :-1], values, None, is_first=True)
    if is_token is None:
        is_token = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    is_readable = _readable_slots(is_token, document_ids)
    mask = torch.zeros_like(is_readable, dtype=torch.float32).masked_fill(~is_readable, -torch.inf)
    if joined is None:
        retrieved, weights = kernel_smoothing(queries, slot_keys, slot_values, mask)
        return retrieved, F.pad(weights[..., 1:], (1, 0)), slot_values
    earlier_keys, earlier_values, bias = joined
    has_pairs = (bias > -torch.inf).any(-1)[:, :, None]  # then no token needs the empty slot
    mask = mask.expand(-1, bias.shape[1], -1, -1).clone()
    mask[..., 0] = mask[..., 0].masked_fill(has_pairs, -torch.inf)
    mask = torch.cat([bias[:, :, None].expand(-1, -1, mask.shape[2], -1), mask], dim=-1)
    keys, values = torch.cat([earlier_keys, slot_keys], dim=2), torch.cat([earlier_values, slot_values], dim=2)
    retrieved, weights = kernel_smoothing(queries, keys, values, mask)
    weights[..., bias.shape[2]] = 0
    return retrieved, weights, slot_values


def _retrieve_persistent(memory: Any, reading: _Reading) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scalars = memory.scalars()
    sums, _ = memory.sum_keys(reading.hidden_states, reading.is_token, reading.document_ids, None, scalars)
    queries = scale_to_length(sums, scalars.key_length).to(memory.slot_keys.dtype)
    retrieved, weights = kernel_smoothing(queries, memory.slot_keys[None], memory.slot_values[None])
    retrieved = retrieved * scalars.value_length.to(retrieved.dtype)
    return retrieved, weights, memory.slot_values[None]


def _retrieve(memory: Any, reading: _Reading) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a memory retrieves `(B, H, T, D)`, the weights `(B, H, T, T or N)` and the values they weigh."""
    if hasattr(memory, "read_units"):  # of v2
        units: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = memory.read_units(
            reading.hidden_states, reading.of_levels, reading.joined
        )
        return units
    retrieve = _retrieve_contextual if memory.kind == "contextual" else _retrieve_persistent
    return retrieve(memory, reading)


# Measures of one memory


def _next_token(is_token: torch.Tensor, document_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the next token of the same text stands, and whether there is one, both `(B, T)`."""
    num_tokens = is_token.shape[1]
    places = torch.arange(num_tokens, device=is_token.device).expand_as(is_token)
    # The nearest token at or behind each place: a running minimum from the end.
    at_or_behind = places.masked_fill(~is_token, num_tokens).flip(1).cummin(1).values.flip(1)
    following = F.pad(at_or_behind[:, 1:], (0, 1), value=num_tokens)
    is_followed = following < num_tokens
    following = following.clamp(max=num_tokens - 1)
    if document_ids is not None:
        is_followed = is_followed & (document_ids.gather(1, following) == document_ids)
    return following, is_followed


def _error(
    retrieved: torch.Tensor,
    slot_values: torch.Tensor,
    is_token: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return the surprise `(B, H, T)` of contextual units by the values that the next tokens gave."""
    if is_token is None:
        is_token = torch.ones_like(retrieved[:, 0, :, 0], dtype=torch.bool)
    following, is_followed = _next_token(is_token, document_ids)
    completed = at_least_float32(slot_values.gather(2, following[:, None, :, None].expand_as(slot_values)))
    error = (retrieved - completed).square().sum(-1) / completed.square().sum(-1)
    return error.masked_fill(~is_followed[:, None], torch.nan)


def _additions(memory: Any, retrieved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what units with retrievals `(B, H, T, D)` add to the stream, `(H, B, T, C)`, and the shared bias `(C,)`.

    The units' sum plus the bias is the memory's output.
    """
    combine = memory.o_proj if hasattr(memory, "o_proj") else memory.down_proj
    retrieved = retrieved.transpose(1, 2)
    alone = torch.eye(retrieved.shape[2], dtype=retrieved.dtype, device=retrieved.device)
    # One row per unit, all others silent. The layer is called, never read: it may be quantized, or hold an adapter.
    rows = retrieved * alone[:, None, None, :, None]  # (H, B, T, H, D)
    bias = at_least_float32(combine(torch.zeros_like(rows[:1, :1, :1].flatten(3))))
    return at_least_float32(combine(rows.flatten(3))) - bias, bias[0, 0, 0]


def _share_and_norm(added: torch.Tensor, residual: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return share and norm `(B, H, T)` of what units add, `(H, B, T, C)`, to a stream `(B, T, C)`."""
    total = added.sum(0)
    share = (added * total).sum(-1) / total.square().sum(-1)
    length = torch.linalg.vector_norm(at_least_float32(residual), dim=-1)
    norm = torch.linalg.vector_norm(added, dim=-1) / length
    return {"share": share.transpose(0, 1), "norm": norm.transpose(0, 1)}


def _to_keep(numbers: torch.Tensor, is_known: torch.Tensor | None) -> torch.Tensor:
    """Return numbers `(B, H, T, ...)` in float32 at least, on the CPU, NaN except where `is_known` `(B, T)`."""
    if is_known is not None:
        is_known = is_known.reshape(len(numbers), 1, -1, *[1] * (numbers.ndim - 3))
        numbers = numbers.masked_fill(~is_known, torch.nan)
    return at_least_float32(numbers).cpu()


def _stack(
    measured: dict[tuple[int, str], dict[str, Any]],
    name: str,
    kinds: tuple[str, ...] = KINDS,
    missing: float = torch.nan,
) -> torch.Tensor:
    """Stack one measure of all memories, by layer and kind: `(L, kinds, B, H, T, ...)`.

    Where one kind has fewer units than the other, `missing` stands in their place.
    """
    layers = sorted({layer for layer, _ in measured})
    most = max(measured[layers[0], kind][name].shape[1] for kind in kinds)

    def whole(numbers: torch.Tensor) -> torch.Tensor:
        lacking = most - numbers.shape[1]
        return F.pad(numbers, (0, 0) * (numbers.ndim - 2) + (0, lacking), value=missing) if lacking else numbers

    return torch.stack([torch.stack([whole(measured[layer, kind][name]) for kind in kinds]) for layer in layers])


# Reading of a text by a model, with an observer


def memories_of(model: nn.Module) -> list[Any]:
    """Return all contextual and persistent memories of a model.

    They are known by their `kind`: a model loaded with `trust_remote_code=True` has classes of its own.
    """
    return [module for module in model.modules() if getattr(module, "kind", None) in KINDS]


def _levels(model: nn.Module) -> dict[str, int]:
    """Return the number of units of each level of a layer of v2; of v1 nothing, whose kinds have a head each."""
    first: Any = {memory.kind: memory for memory in reversed(memories_of(model))}
    if not hasattr(first["contextual"], "levels"):
        return {}
    num_persistent = len(getattr(first["persistent"], "slot_keys", (None,)))
    return {**first["contextual"].levels(), "persistent": num_persistent}


def _check_readable(model: nn.Module) -> None:
    if not memories_of(model):
        if any(hasattr(module, "sum_keys") for module in model.modules()):
            raise ValueError(
                f"This {type(model).__name__} runs the code that an earlier version saved beside it, which cannot be "
                "inspected: load the folder with `trust_remote_code=False`, so that the installed package runs it."
            )
        raise ValueError(
            f"{type(model).__name__} has no memories whose units could be inspected: pass a Memory Mosaic."
        )
    if any(getattr(module, "bound", None) is not None for module in model.modules()):
        raise ValueError(
            "Within `bounded`, a head forgets pairs while it reads, so that what each token retrieved cannot be "
            "shown: leave the bound. A memory that was memorized within it may be explained outside."
        )
    if any(module.training for module in model.modules()):
        raise ValueError("In training mode dropout would be part of what is measured: call `model.eval()` first.")


def _in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that ignores what other threads read by the same model: a server answers several users at once."""
    owner = threading.get_ident()

    def watching(*args: Any) -> None:
        return hook(*args) if threading.get_ident() == owner else None

    return watching


def _joined_pairs(memory: Any, cache: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return keys, values and biases of the texts that were joined before what a memory has read behind them."""
    num_joined = 0 if cache is None else memory_layer(cache).num_joined
    if memory.kind != "contextual" or not num_joined:
        return None
    layer = memory_layer(cache, memory.layer_idx)
    return layer.keys[:, :, :num_joined], layer.values[:, :, :num_joined], layer.slot_bias[:, :, :num_joined]


def _observing_hooks(model: nn.Module, observe: Callable[..., None]) -> Iterator[RemovableHandle]:
    """Register hooks that call `observe(memory, reading, residual)` for each memory.

    `reading` is what the memory has read ([`_Reading`]), `residual` `(B, T, C)` the stream before its output is added.
    """
    residual: dict[str, torch.Tensor] = {}

    def before_layer(layer: nn.Module, inputs: tuple) -> None:
        residual["contextual"] = inputs[0]

    def after_memory(memory: Any, inputs: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        if memory.kind == "contextual":
            residual["persistent"] = residual["contextual"] + outputs[0]
        # Persistent memories get no `query_scale`: the number of their pairs is fixed.
        of_levels = inputs[1] if len(inputs) > 1 else None
        if of_levels is None:
            described = kwargs["is_token"], kwargs["document_ids"], kwargs.get("query_scale")
        else:
            described = of_levels.is_token, of_levels.document_ids, None
        joined = _joined_pairs(memory, kwargs.get("past_key_values"))
        observe(memory, _Reading(inputs[0], *described, joined, of_levels), residual[memory.kind])

    for layer in model.modules():
        if hasattr(layer, "contextual_memory"):
            yield layer.register_forward_pre_hook(_in_this_thread(before_layer))
    for memory in memories_of(model):
        yield memory.register_forward_hook(_in_this_thread(after_memory), with_kwargs=True)


def _read_through(
    model: nn.Module,
    observe: Callable[..., None],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    memory: Any = None,
    **kwargs: Any,
) -> None:
    """Let the model read, and observe each of its memories: see `_observing_hooks`."""
    _check_readable(model)
    with contextlib.ExitStack() as hooks:
        for hook in _observing_hooks(model, observe):
            hooks.enter_context(hook)
        if memory is not None:
            # A static memory answers as a growing one, whose slots are those of the text.
            prompt = memory.prompt(input_ids, **kwargs | {"max_cache_len": None})
            for layer in prompt[MEMORY_NAME].layers:
                layer.index = None  # `nearest` reads all pairs then, as the observer does
            model(**prompt)
            return
        masks = {"attention_mask": attention_mask, "position_ids": position_ids}
        model(input_ids=input_ids, use_cache=False, **{name: mask for name, mask in masks.items() if mask is not None})


@torch.no_grad()
def inspect_units(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
) -> MemoryMosaicUnits:
    """Let a model read texts, and measure each of its units at each token.

    Needs room for the weights of one layer at a time: B x H x T x (T or persistent slots) numbers, whichever are more.

    Args:
        model: a Memory Mosaic with any head, in eval mode; adapters of PEFT may be in it or around it. Virtual tokens
            that an adapter puts before the text are measured too, so that T counts them.
        input_ids (`torch.LongTensor` of shape `(B, T)`).
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): a document begins where they do not rise.

    Raises:
        ValueError: if the model has no memories or a bound ([`bounded`]), is in training mode, or does not take these
            arguments.
    """
    measured: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def measure(memory: Any, reading: _Reading, residual: torch.Tensor) -> None:
        retrieved, weights, slot_values = _retrieve(memory, reading)
        entropy = torch.special.entr(weights).sum(-1)
        measures = {"entropy": entropy.masked_fill(~weights.any(-1), torch.nan)}
        if memory.kind == "contextual":
            measures["error"] = _error(retrieved, slot_values, reading.is_token, reading.document_ids)
        measures |= _share_and_norm(_additions(memory, retrieved)[0], residual)
        kept = {name: _to_keep(numbers, reading.is_token) for name, numbers in measures.items()}
        measured[memory.layer_idx, memory.kind] = kept

    _read_through(model, measure, input_ids, attention_mask, position_ids)
    stacked = {name: _stack(measured, name) for name in ("entropy", "share", "norm")}
    error = _stack(measured, "error", ("contextual",))[:, 0]
    return MemoryMosaicUnits(error, **stacked, levels=_levels(model))


class PrintedTable(list[dict[str, Any]]):
    """Rows as dictionaries; printed, a table."""

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self for name in row))
        cells = [names, *([_cell(row.get(name)) for name in names] for row in self)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(lines)


def _cell(value: int | str | float | None) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def summarize_units(units: MemoryMosaicUnits) -> PrintedTable:
    """Return means of each unit over all tokens that have something stored to read.

    Returns:
        `PrintedTable`, a list of dictionaries that prints as a table: per unit its `layer`, `kind` and `head`, of v2
            also its `level`, and the means of `error` (`None` for persistent units), `entropy`, `effective_pairs`,
            `share` and `norm`. A mean over nothing is NaN.
    """
    known = units.entropy.isnan().logical_not()
    # A unit without slots, the dense memory of v2, has no entropy at all.
    known |= units.share.isnan().logical_not() & ~known.any(4, keepdim=True).any(2, keepdim=True).any(0, keepdim=True)
    measures = {name: getattr(units, name) for name in ("entropy", "effective_pairs", "share", "norm")}
    means = {name: numbers.where(known, torch.nan).nanmean(dim=(2, 4)) for name, numbers in measures.items()}
    error = units.error.where(known[:, 0], torch.nan).nanmean(dim=(1, 3))
    table = PrintedTable()
    num_layers, _, num_heads = means["share"].shape
    levels = [level for level, number in units.levels.items() for _ in range(number)]
    of_kind = [[level for level in levels if (level == KINDS[1]) == (kind == KINDS[1])] for kind in KINDS]
    for layer in range(num_layers):
        for index, kind in enumerate(KINDS):
            for head in range(len(of_kind[index]) if levels else num_heads):
                row: dict[str, Any] = {"level": of_kind[index][head]} if levels else {}
                row |= {"error": error[layer, head].item() if kind == "contextual" else None}
                row |= {name: numbers[layer, index, head].item() for name, numbers in means.items()}
                table.append({"layer": layer, "kind": kind, "head": head, **row})
    return table


def _mean(values: list[Any]) -> float | None:
    return None if None in values else sum(values) / len(values)


def measure_units(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """Measure each memory of a Memory Mosaic while it reads texts.

    Returns:
        `dict`: number of `tokens` read; `units`, as [`summarize_units`] returns them; and `layers`, by layer and kind
        the means over heads of `error`, `effective_pairs` and `norm`, with the `half_life` of each head's keys, in
        tokens (`None` of v2, where it depends on the token).
    """
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    units = summarize_units(inspect_units(model.eval(), batch["input_ids"], batch["attention_mask"]))
    memories = [memory for memory in memories_of(model) if hasattr(memory, "leak")]
    leaks = {(memory.layer_idx, memory.kind): memory.leak(torch.float64).detach() for memory in memories}
    layers = []
    for layer, kind in dict.fromkeys((unit["layer"], unit["kind"]) for unit in units):
        heads = [unit for unit in units if (unit["layer"], unit["kind"]) == (layer, kind)]
        means = {name: _mean([head[name] for head in heads]) for name in ("error", "effective_pairs", "norm")}
        half_life = (math.log(2) / leaks[layer, kind]).tolist() if (layer, kind) in leaks else None
        layers.append({"layer": layer, "kind": kind, **means, "half_life": half_life})
    return {"tokens": int(batch["attention_mask"].sum()), "layers": layers, "units": units}


# Contributions to logits


def _following_ids(
    input_ids: torch.Tensor, final: torch.Tensor, is_token: torch.Tensor | None, document_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids that follow each token, and where one is known, both `(B, T)`. Virtual tokens have no ids."""
    ids = F.pad(input_ids.to(final.device), (final.shape[1] - input_ids.shape[1], 0), value=-1)
    if is_token is None:
        is_token = torch.ones_like(ids, dtype=torch.bool)
    places, is_followed = _next_token(is_token, document_ids)
    following = ids.gather(1, places)
    return following.clamp(min=0), is_followed & is_token & (following >= 0)


def _look_through_head(
    causal: Any, final: torch.Tensor, following: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what the head makes of residual streams `(B, T, C)` before the final norm, for the ids that follow.

    Args:
        following (`torch.Tensor` of shape `(B, T)`): ids.

    Returns:
        `dict` of `logit`, `log_probability` and `biases` (those of norm and head), `(B, T)`; and the direction
        `(B, T, C)`: its product with anything added to the stream is the logit of that part.
    """
    norm = causal.model.norm
    normed = norm(final)

    def relative_logit(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = at_least_float32(causal.lm_head(states / causal.config.logits_scaling))
        logit = logits.gather(-1, following[..., None])[..., 0]
        return logit - logits.mean(-1), logit - logits.logsumexp(-1)

    # The head is called, never read: it may be quantized, or hold an adapter. Its derivative is what it multiplies by.
    with torch.enable_grad():
        states = normed.detach().requires_grad_()
        logit, log_probability = relative_logit(states)
        (row,) = torch.autograd.grad(logit.sum(), states)
    row, final = at_least_float32(row), at_least_float32(final)
    bias = getattr(norm, "bias", None)
    bias_of_norm = torch.zeros_like(final[0, 0]) if bias is None else bias
    biases = relative_logit(torch.zeros_like(normed))[0] + (bias_of_norm * row).sum(-1)
    # Through the final norm, with its scale held: first its weight, then its centring and its scale.
    row = row * norm.weight
    if isinstance(norm, nn.RMSNorm):
        direction = row / (final.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    else:
        scale = (final.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        direction = (row - row.mean(-1, keepdim=True)) / scale  # a norm takes the mean off its input
    numbers = {"logit": logit.detach(), "log_probability": log_probability.detach(), "biases": biases}
    return numbers, direction


@torch.no_grad()
def trace_tokens(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    memory: Any = None,
    **kwargs: Any,
) -> MemoryMosaicTrace:
    """Let a model read texts, and trace from which pairs and by which units each next token was predicted.

    Keeps the weights of all layers: L x B x H x T x (S + T + persistent slots) numbers.

    Args:
        model, input_ids, attention_mask, position_ids: as for [`inspect_units`], with a model that predicts tokens.
            For a virtual token that another one follows, only the weights are known.
        memory ([`MosaicMemory`], *optional*): of texts that are joined before each row; then without the masks. All
            of its pairs are read, within [`nearest`] too.
        kwargs: of [`MosaicMemory.to_cache`], if there is a memory.

    Raises:
        ValueError: if the model has no memories, no language modelling head or a bound ([`bounded`]), is in training
            mode, or does not take these arguments.
    """
    _check_readable(model)
    if memory is not None and (attention_mask is not None or position_ids is not None):
        raise ValueError("Behind a memory, texts are traced without masks: trace one text at a time.")
    if kwargs and memory is None:
        raise TypeError(f"{', '.join(kwargs)} is of reading behind a memory: pass `memory` too, or leave it out.")
    causal: Any = next((module for module in model.modules() if "lm_head" in dict(module.named_children())), None)
    if causal is None:
        raise ValueError(f"{type(model).__name__} has no head that predicts tokens: pass a MemoryMosaicForCausalLM.")
    traces: dict[tuple[int, str], dict[str, Any]] = {}
    streams: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor | None] = {}

    def trace(memory: Any, reading: _Reading, residual: torch.Tensor) -> None:
        # What a unit adds is C numbers a token. Until the head's direction is known, the D of its retrieval are kept.
        retrieved, weights, _ = _retrieve(memory, reading)
        parts = {"memory": memory, "retrieved": retrieved, "weights": _to_keep(weights, reading.is_token)}
        traces[memory.layer_idx, memory.kind] = parts
        streams.setdefault("embedding", residual)
        masks.update(is_token=reading.is_token, document_ids=reading.document_ids)

    keep_final = _in_this_thread(lambda _, inputs: streams.update(final=inputs[0]))
    with causal.model.norm.register_forward_pre_hook(keep_final):
        _read_through(model, trace, input_ids, attention_mask, position_ids, memory, **kwargs)
    following, is_followed = _following_ids(input_ids, streams["final"], **masks)
    numbers, direction = _look_through_head(causal, streams["final"], following)
    numbers["embedding"] = (at_least_float32(streams["embedding"]) * direction).sum(-1)
    for parts in traces.values():
        added, bias = _additions(parts.pop("memory"), parts.pop("retrieved"))
        numbers["biases"] = numbers["biases"] + (bias * direction).sum(-1)
        parts["contribution"] = _to_keep((added * direction).sum(-1).transpose(0, 1), is_followed)
    return MemoryMosaicTrace(
        weights=_stack(traces, "weights", ("contextual",))[:, 0],
        slot_weights=_stack(traces, "weights", ("persistent",))[:, 0],
        contribution=_stack(traces, "contribution", missing=0.0),
        levels=_levels(model),
        **{name: _to_keep(number[:, None], is_followed)[:, 0] for name, number in numbers.items()},
    )


__all__ = [
    "MemoryMosaicTrace",
    "MemoryMosaicUnits",
    "inspect_units",
    "measure_units",
    "summarize_units",
    "trace_tokens",
]

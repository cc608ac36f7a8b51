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
"""Which unit predicts what: the predictive disentanglement of Memory Mosaics (arXiv 2405.06394) made visible.

A unit is one head of a layer's contextual or persistent memory. Each of its retrievals is a prediction of a value that
the next token completes, so each unit can be asked how wrong it was, how sharply it chose, and how much of its layer's
output is its own. All is recomputed from what the memories read, by their own operators, whatever attention function
the model uses. A model does not need this file, and folders written by `save_pretrained` do not hold it.

Shapes use L layers, B batch, H heads, T tokens, D head width, C hidden size.
"""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_memory_mosaic import at_least_float32, kernel_smoothing, scale_to_length, strict_rule


KINDS = ("contextual", "persistent")


@dataclasses.dataclass
class MemoryMosaicUnits:
    """What [`inspect_units`] found, on the CPU, in float32 (float64 of a float64 model). NaN where nothing is known.

    Args:
        error (`torch.Tensor` of shape `(L, B, H, T)`): the surprise of contextual units, |y_t - v_t|^2 / |v_t|^2, of
            what was retrieved at token t and the value that the next token gave its pair. 0 is a perfect prediction,
            1 what retrieving 0 would have, as a text's first token does; beyond 1 it is worse than that, which happens
            as training never asks a unit for the value itself. NaN at each text's last token, whose pair never
            completes.
        entropy (`torch.Tensor` of shape `(L, 2, B, H, T)`): of the retrieval weights, in nats; of contextual units
            first, then of persistent ones. NaN for a token that has no pair to read: the first of each text.
        share (`torch.Tensor` of shape `(L, 2, B, H, T)`): c . o / |o|^2, where o is the output of the memory layer
            without its bias, a sum over units, and c what this unit adds to it (`o_proj` of its retrieval alone).
            Shares of a layer's units sum to 1; one is negative if the others speak against it. NaN where o is 0.
        norm (`torch.Tensor` of shape `(L, 2, B, H, T)`): |c| / |x|, where x is the residual stream that c is added to.

    Everything is NaN at padding.
    """

    error: torch.Tensor
    entropy: torch.Tensor
    share: torch.Tensor
    norm: torch.Tensor

    @property
    def effective_pairs(self) -> torch.Tensor:
        """`(L, 2, B, H, T)`: over how many pairs weights of this entropy spread if they were equal, exp(entropy)."""
        return self.entropy.exp()


@torch.no_grad()
def inspect_units(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
) -> MemoryMosaicUnits:
    """Have a model read texts, and measure each of its units at each token.

    Needs room for the weights of one layer at a time: B x H x T x (T or persistent slots) numbers, whichever are more.

    Args:
        model: a Memory Mosaic with any head, in eval mode; adapters of PEFT may be in it or around it. Virtual tokens
            that an adapter puts before the text are measured too, so that T counts them.
        input_ids (`torch.LongTensor` of shape `(B, T)`).
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens.
        position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): a document begins where they do not rise.

    Raises:
        ValueError: if the model has no memories, or is in training mode; and what the model itself refuses.
    """
    memories = [module for module in model.modules() if hasattr(module, "sum_keys")]
    if not memories:
        raise ValueError(
            f"{type(model).__name__} has no memories whose units could be inspected: pass a Memory Mosaic."
        )
    if any(module.training for module in model.modules()):
        raise ValueError("In training mode dropout would be part of what is measured: call `model.eval()` first.")
    measured: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    with contextlib.ExitStack() as hooks:
        for hook in _measuring_hooks(model, measured):
            hooks.enter_context(hook)
        marks = {"attention_mask": attention_mask, "position_ids": position_ids}
        model(input_ids=input_ids, use_cache=False, **{name: mark for name, mark in marks.items() if mark is not None})
    layers = sorted({layer for layer, _ in measured})
    stacked = {
        name: torch.stack([torch.stack([measured[layer, kind][name] for kind in KINDS]) for layer in layers])
        for name in ("entropy", "share", "norm")
    }
    return MemoryMosaicUnits(torch.stack([measured[layer, "contextual"]["error"] for layer in layers]), **stacked)


def _measuring_hooks(model: nn.Module, measured: dict):
    """Hooks that put into `measured`, by layer and kind, what `_measure` says of each memory after it has read."""
    residual = {}

    def before_layer(layer, inputs):
        residual["contextual"] = inputs[0]

    def after_contextual(memory, inputs, kwargs, outputs):
        residual["persistent"] = residual["contextual"] + outputs[0]
        after_memory("contextual", memory, inputs[0], kwargs)

    def after_persistent(memory, inputs, kwargs, output):
        after_memory("persistent", memory, inputs[0], kwargs)

    def after_memory(kind, memory, hidden_states, kwargs):
        is_token, document = kwargs["is_token"], kwargs["document"]
        read = _read_contextual if kind == "contextual" else _read_persistent
        found = read(memory, hidden_states, is_token, document)
        found |= _contributions(memory, found.pop("retrieved"), residual[kind])
        if is_token is not None:
            found = {name: numbers.masked_fill(~is_token[:, None], torch.nan) for name, numbers in found.items()}
        measured[memory.layer_idx, kind] = {name: at_least_float32(numbers).cpu() for name, numbers in found.items()}

    for module in model.modules():
        if hasattr(module, "contextual_memory"):
            yield module.register_forward_pre_hook(before_layer)
        elif hasattr(module, "sum_keys"):
            hook = after_contextual if hasattr(module, "pair_values") else after_persistent
            yield module.register_forward_hook(hook, with_kwargs=True)


def _read_contextual(memory, hidden_states, is_token, document):
    """Retrievals `(B, H, T, D)`, and entropy and error `(B, H, T)`, of contextual units, as their memory reads."""
    sums, _ = memory.sum_keys(hidden_states, is_token, document, None)
    keys = scale_to_length(sums, memory.key_length()).to(hidden_states.dtype)
    values = memory.pair_values(hidden_states, is_token, None).to(keys.dtype)
    # Slot t holds the pair that token t completes. Slot 0 is empty: there looks who has nothing else to read.
    slot_keys, slot_values = memory.store(keys[:, :, :-1], values, None, is_first=True)
    if is_token is None:
        is_token = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    may_read = _readable_slots(is_token, document)
    barred = torch.zeros_like(may_read, dtype=torch.float32).masked_fill(~may_read, -torch.inf)
    retrieved, weights = kernel_smoothing(keys, slot_keys, slot_values, barred)
    entropy = torch.special.entr(weights).sum(-1).masked_fill(~may_read[..., 1:].any(-1), torch.nan)

    following, is_followed = _next_token(is_token, document)
    completed = at_least_float32(slot_values.gather(2, following[:, None, :, None].expand_as(slot_values)))
    error = (retrieved - completed).square().sum(-1) / completed.square().sum(-1)
    return {"retrieved": retrieved, "entropy": entropy, "error": error.masked_fill(~is_followed[:, None], torch.nan)}


def _read_persistent(memory, hidden_states, is_token, document):
    """Retrievals `(B, H, T, D)` and their entropy `(B, H, T)`, of persistent units, as their memory reads."""
    sums, _ = memory.sum_keys(hidden_states, is_token, document, None)
    queries = scale_to_length(sums, memory.key_length(power=2)).to(memory.slot_keys.dtype)
    retrieved, weights = kernel_smoothing(queries, memory.slot_keys[None], memory.slot_values[None])
    retrieved = retrieved * memory.value_length().to(retrieved.dtype)[:, None, None]
    return {"retrieved": retrieved, "entropy": torch.special.entr(weights).sum(-1)}


def _readable_slots(is_token, document):
    """Which slots each token may read, `(B, 1, T, T)`: the rule of the model's own masks."""
    batch_size, num_tokens = is_token.shape
    rows, places = (torch.arange(n, device=is_token.device) for n in (batch_size, num_tokens))
    allowed = strict_rule(is_token, document)(rows[:, None, None], None, places[:, None], places)
    return (allowed & (places <= places[:, None]))[:, None]


def _next_token(is_token, document):
    """Where the next token of the same text stands, and whether there is one, both `(B, T)`."""
    num_tokens = is_token.shape[1]
    places = torch.arange(num_tokens, device=is_token.device).expand_as(is_token)
    at_or_behind = places.masked_fill(~is_token, num_tokens).flip(1).cummin(1).values.flip(1)
    following = F.pad(at_or_behind[:, 1:], (0, 1), value=num_tokens)
    is_followed = following < num_tokens
    following = following.clamp(max=num_tokens - 1)
    if document is not None:
        is_followed = is_followed & (document.gather(1, following) == document)
    return following, is_followed


def _contributions(memory, retrieved, residual):
    """Share and norm `(B, H, T)` of what units with these retrievals `(B, H, T, D)` add to a stream `(B, T, C)`."""
    retrieved = retrieved.transpose(1, 2)
    alone = torch.eye(retrieved.shape[2], dtype=retrieved.dtype, device=retrieved.device)
    # One row per unit, all others silent. The layer is called, never read: it may be quantized, or hold an adapter.
    rows = retrieved * alone[:, None, None, :, None]  # (H, B, T, H, D)
    bias = memory.o_proj(torch.zeros_like(rows[:1, :1, :1].flatten(3)))
    added = at_least_float32(memory.o_proj(rows.flatten(3))) - at_least_float32(bias)  # (H, B, T, C)
    total = added.sum(0)
    share = (added * total).sum(-1) / total.square().sum(-1)
    length = torch.linalg.vector_norm(at_least_float32(residual), dim=-1)
    norm = torch.linalg.vector_norm(added, dim=-1) / length
    return {"share": share.transpose(0, 1), "norm": norm.transpose(0, 1)}


def summarize_units(units: MemoryMosaicUnits) -> list[dict[str, int | str | float | None]]:
    """Means of each unit over all tokens that have something stored to read.

    Returns:
        `list[dict]`: per unit its `layer`, `kind` and `head`, and the means of `error` (`None` for persistent units),
        `entropy`, `effective_pairs`, `share` and `norm`. A mean over nothing is NaN.
    """
    known = units.entropy.isnan().logical_not()
    kinds = {name: getattr(units, name) for name in ("entropy", "effective_pairs", "share", "norm")}
    means = {name: numbers.where(known, torch.nan).nanmean(dim=(2, 4)) for name, numbers in kinds.items()}
    error = units.error.where(known[:, 0], torch.nan).nanmean(dim=(1, 3))
    table = []
    num_layers, _, num_heads = means["share"].shape
    for layer in range(num_layers):
        for index, kind in enumerate(KINDS):
            for head in range(num_heads):
                own = {"error": error[layer, head].item() if kind == "contextual" else None}
                own |= {name: numbers[layer, index, head].item() for name, numbers in means.items()}
                table.append({"layer": layer, "kind": kind, "head": head, **own})
    return table


__all__ = ["MemoryMosaicUnits", "inspect_units", "summarize_units"]

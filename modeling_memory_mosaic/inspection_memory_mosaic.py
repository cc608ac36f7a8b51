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
output is its own ([`inspect_units`]); and, of each token, from which pairs each unit predicted it and how much of its
logit is the unit's ([`trace_tokens`]). All is recomputed from what the memories read, by their own operators, whatever
attention function the model uses. A model does not need this file, and folders written by `save_pretrained` do not
hold it.

Shapes use L layers, B batch, H heads, T tokens, D head width, C hidden size, N persistent slots per head.
"""

import contextlib
import dataclasses
import threading

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
    measured: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def measure(kind, memory, hidden_states, residual, is_token, document):
        retrieved, weights, slot_values = _recall(kind, memory, hidden_states, is_token, document)
        entropy = torch.special.entr(weights).sum(-1)
        found = {"entropy": entropy.masked_fill(~weights.any(-1), torch.nan)}
        if kind == "contextual":
            found["error"] = _error(retrieved, slot_values, is_token, document)
        found |= _share_and_norm(_additions(memory, retrieved)[0], residual)
        measured[memory.layer_idx, kind] = {name: _to_keep(numbers, is_token) for name, numbers in found.items()}

    _read_through(model, measure, input_ids, attention_mask, position_ids)
    stacked = {name: _stack(measured, name) for name in ("entropy", "share", "norm")}
    return MemoryMosaicUnits(_stack(measured, "error", ("contextual",))[:, 0], **stacked)


@dataclasses.dataclass
class MemoryMosaicTrace:
    """What [`trace_tokens`] found, on the CPU, in float32 (float64 of a float64 model). NaN where nothing is known.

    Logits are those of the token that follows token t, less their mean over the vocabulary: a softmax does not see
    what all logits have in common. With the scale of the final norm held at its value, such a logit is a sum over what
    was added to the residual stream, so that `logit == embedding + biases + contribution.sum(dim=(0, 1, 3))` to
    rounding. This tells what each part said to the head, not what the model would have said without it: the scale, and
    what later layers retrieve, would then be others.

    Args:
        weights (`torch.Tensor` of shape `(L, B, H, T, T)`): of contextual units: what token t took from the pair that
            token s completed, whose key is of the token before s and whose value is of both. Zero from s = t + 1 on.
            Rows sum to 1, or to 0 where nothing is stored: at the first token of each text.
        slot_weights (`torch.Tensor` of shape `(L, B, H, T, N)`): of persistent units, over their slots.
        contribution (`torch.Tensor` of shape `(L, 2, B, H, T)`): of each unit to the logit; of contextual units first,
            then of persistent ones.
        embedding (`torch.Tensor` of shape `(B, T)`): contribution of token t's own embedding.
        biases (`torch.Tensor` of shape `(B, T)`): of all biases together; 0 if there are none.
        logit (`torch.Tensor` of shape `(B, T)`): the model's own, relative to the mean over the vocabulary.
        log_probability (`torch.Tensor` of shape `(B, T)`): that the model gave the token which follows.

    All but the weights are NaN at the last token of each text, which nothing follows. Everything is NaN at padding.
    """

    weights: torch.Tensor
    slot_weights: torch.Tensor
    contribution: torch.Tensor
    embedding: torch.Tensor
    biases: torch.Tensor
    logit: torch.Tensor
    log_probability: torch.Tensor

    @property
    def persistent_share(self) -> torch.Tensor:
        """`(B, T)`: sum of |contribution| over persistent units, divided by that over all units.

        Of absolute values, as units that speak against each other would cancel in plain sums, whose quotient may be
        anything. This one lies between 0 and 1: how much is said, be it for the token or against it.
        """
        said = self.contribution.abs().sum(dim=(0, 3))
        return said[1] / said.sum(0)


@torch.no_grad()
def trace_tokens(
    model: nn.Module,
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
) -> MemoryMosaicTrace:
    """Have a model read texts, and say for each token from which pairs and by which units the next one was predicted.

    Keeps the weights of all layers: L x B x H x T x (T + persistent slots) numbers.

    Args:
        model, input_ids, attention_mask, position_ids: as for [`inspect_units`], with a model that predicts tokens. Of
            virtual tokens that another one follows, nothing but the weights is known.

    Raises:
        ValueError: if the model has no memories or no language modelling head, or is in training mode; and what the
            model itself refuses.
    """
    _check_readable(model)
    causal = next((module for module in model.modules() if "lm_head" in dict(module.named_children())), None)
    if causal is None:
        raise ValueError(f"{type(model).__name__} has no head that predicts tokens: pass a MemoryMosaicForCausalLM.")
    recalled, streams, marks = {}, {}, {}

    def recall(kind, memory, hidden_states, residual, is_token, document):
        # What a unit adds is C numbers a token: kept as the D of its retrieval, until the head's direction is known.
        retrieved, weights, _ = _recall(kind, memory, hidden_states, is_token, document)
        recalled[memory.layer_idx, kind] = {"parts": (memory, retrieved), "weights": _to_keep(weights, is_token)}
        streams.setdefault("embedding", residual)
        marks.update(is_token=is_token, document=document)

    keep_final = _in_this_thread(lambda _, inputs: streams.update(final=inputs[0]))
    with causal.model.norm.register_forward_pre_hook(keep_final):
        _read_through(model, recall, input_ids, attention_mask, position_ids)
    following, is_followed = _following_ids(input_ids, streams["final"], **marks)
    numbers, direction = _look_through_head(causal, streams["final"], following)
    numbers["embedding"] = (at_least_float32(streams["embedding"]) * direction).sum(-1)
    for found in recalled.values():
        added, bias = _additions(*found.pop("parts"))
        numbers["biases"] = numbers["biases"] + (bias * direction).sum(-1)
        found["contribution"] = _to_keep((added * direction).sum(-1).transpose(0, 1), is_followed)
    return MemoryMosaicTrace(
        weights=_stack(recalled, "weights", ("contextual",))[:, 0],
        slot_weights=_stack(recalled, "weights", ("persistent",))[:, 0],
        contribution=_stack(recalled, "contribution"),
        **{name: _to_keep(number[:, None], is_followed)[:, 0] for name, number in numbers.items()},
    )


def _following_ids(input_ids, final, is_token, document):
    """Ids of the tokens that follow each token, and where an id is known, both `(B, T)`. Virtual tokens have none."""
    ids = F.pad(input_ids.to(final.device), (final.shape[1] - input_ids.shape[1], 0), value=-1)
    if is_token is None:
        is_token = torch.ones_like(ids, dtype=torch.bool)
    places, is_followed = _next_token(is_token, document)
    following = ids.gather(1, places)
    return following.clamp(min=0), is_followed & is_token & (following >= 0)


def _look_through_head(causal, final, following):
    """What the head makes of residual streams `(B, T, C)` before the final norm, for the tokens that follow, `(B, T)`.

    Returns:
        `dict` of `logit`, `log_probability` and `biases` (those of norm and head), `(B, T)`; and the direction
        `(B, T, C)` whose product with anything added to the stream is its part of the logit.
    """
    norm = causal.model.norm
    normed = norm(final)

    def relative_logit(states):
        logits = at_least_float32(causal.lm_head(states / causal.config.logits_scaling))
        own = logits.gather(-1, following[..., None])[..., 0]
        return own - logits.mean(-1), own - logits.logsumexp(-1)

    # The head is called, never read: it may be quantized, or hold an adapter. Its derivative is what it multiplies by.
    with torch.enable_grad():
        states = normed.detach().requires_grad_()
        logit, log_probability = relative_logit(states)
        (row,) = torch.autograd.grad(logit.sum(), states)
    row, final = at_least_float32(row), at_least_float32(final)
    bias_of_norm = torch.zeros_like(final[0, 0]) if norm.bias is None else norm.bias
    biases = relative_logit(torch.zeros_like(normed))[0] + (bias_of_norm * row).sum(-1)
    row = row * norm.weight
    scale = (final.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    direction = (row - row.mean(-1, keepdim=True)) / scale  # a norm takes off the mean of whatever it is given
    numbers = {"logit": logit.detach(), "log_probability": log_probability.detach(), "biases": biases}
    return numbers, direction


def _read_through(model, observe, input_ids, attention_mask, position_ids):
    """Have the model read, and observe each of its memories: see `_observing_hooks`."""
    _check_readable(model)
    with contextlib.ExitStack() as hooks:
        for hook in _observing_hooks(model, observe):
            hooks.enter_context(hook)
        marks = {"attention_mask": attention_mask, "position_ids": position_ids}
        model(input_ids=input_ids, use_cache=False, **{name: mark for name, mark in marks.items() if mark is not None})


def _check_readable(model):
    memories = [module for module in model.modules() if hasattr(module, "sum_keys")]
    if not memories:
        raise ValueError(
            f"{type(model).__name__} has no memories whose units could be inspected: pass a Memory Mosaic."
        )
    if any(module.training for module in model.modules()):
        raise ValueError("In training mode dropout would be part of what is measured: call `model.eval()` first.")


def _observing_hooks(model: nn.Module, observe):
    """Hooks that call `observe(kind, memory, hidden_states, residual, is_token, document)` after each memory has read.

    `hidden_states` `(B, T, C)` are what it read, `residual` `(B, T, C)` the stream that its output is added to.
    """
    residual = {}

    def before_layer(layer, inputs):
        residual["contextual"] = inputs[0]

    def after_contextual(memory, inputs, kwargs, outputs):
        residual["persistent"] = residual["contextual"] + outputs[0]
        after_memory("contextual", memory, inputs[0], kwargs)

    def after_persistent(memory, inputs, kwargs, output):
        after_memory("persistent", memory, inputs[0], kwargs)

    def after_memory(kind, memory, hidden_states, kwargs):
        observe(kind, memory, hidden_states, residual[kind], kwargs["is_token"], kwargs["document"])

    for module in model.modules():
        if hasattr(module, "contextual_memory"):
            yield module.register_forward_pre_hook(_in_this_thread(before_layer))
        elif hasattr(module, "sum_keys"):
            hook = after_contextual if hasattr(module, "pair_values") else after_persistent
            yield module.register_forward_hook(_in_this_thread(hook), with_kwargs=True)


def _in_this_thread(hook):
    """A hook that passes over what other threads read by the same model: a server answers several users at once."""
    owner = threading.get_ident()

    def watching(*args):
        return hook(*args) if threading.get_ident() == owner else None

    return watching


def _to_keep(numbers, is_known):
    """Numbers `(B, H, T, ...)` as they are returned: at least float32, on the CPU, NaN except `(B, T)` where known."""
    if is_known is not None:
        is_known = is_known.reshape(len(numbers), 1, -1, *[1] * (numbers.ndim - 3))
        numbers = numbers.masked_fill(~is_known, torch.nan)
    return at_least_float32(numbers).cpu()


def _stack(measured, name, kinds=KINDS):
    """`(L, kinds, B, H, T, ...)` of what was measured, by layer and kind, under a name."""
    layers = sorted({layer for layer, _ in measured})
    return torch.stack([torch.stack([measured[layer, kind][name] for kind in kinds]) for layer in layers])


def _recall(kind, memory, hidden_states, is_token, document):
    """Retrievals `(B, H, T, D)` of a memory as it reads, weights `(B, H, T, T or N)` and the values they weigh."""
    recall = _recall_contextual if kind == "contextual" else _recall_persistent
    return recall(memory, hidden_states, is_token, document)


def _recall_contextual(memory, hidden_states, is_token, document):
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
    return retrieved, F.pad(weights[..., 1:], (1, 0)), slot_values


def _recall_persistent(memory, hidden_states, is_token, document):
    sums, _ = memory.sum_keys(hidden_states, is_token, document, None)
    queries = scale_to_length(sums, memory.key_length(power=2)).to(memory.slot_keys.dtype)
    retrieved, weights = kernel_smoothing(queries, memory.slot_keys[None], memory.slot_values[None])
    retrieved = retrieved * memory.value_length().to(retrieved.dtype)[:, None, None]
    return retrieved, weights, memory.slot_values[None]


def _error(retrieved, slot_values, is_token, document):
    """Surprise `(B, H, T)` of contextual units by the values that the next tokens gave."""
    if is_token is None:
        is_token = torch.ones_like(retrieved[:, 0, :, 0], dtype=torch.bool)
    following, is_followed = _next_token(is_token, document)
    completed = at_least_float32(slot_values.gather(2, following[:, None, :, None].expand_as(slot_values)))
    error = (retrieved - completed).square().sum(-1) / completed.square().sum(-1)
    return error.masked_fill(~is_followed[:, None], torch.nan)


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


def _additions(memory, retrieved):
    """What units with retrievals `(B, H, T, D)` add to the stream, `(H, B, T, C)`, and the bias `(C,)` they share."""
    retrieved = retrieved.transpose(1, 2)
    alone = torch.eye(retrieved.shape[2], dtype=retrieved.dtype, device=retrieved.device)
    # One row per unit, all others silent. The layer is called, never read: it may be quantized, or hold an adapter.
    rows = retrieved * alone[:, None, None, :, None]  # (H, B, T, H, D)
    bias = at_least_float32(memory.o_proj(torch.zeros_like(rows[:1, :1, :1].flatten(3))))
    return at_least_float32(memory.o_proj(rows.flatten(3))) - bias, bias[0, 0, 0]


def _share_and_norm(added, residual):
    """Share and norm `(B, H, T)` of what units add, `(H, B, T, C)`, to a stream `(B, T, C)`."""
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


__all__ = ["MemoryMosaicTrace", "MemoryMosaicUnits", "inspect_units", "summarize_units", "trace_tokens"]

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
"""Operators of Memory Mosaics v2 on plain tensors: gated sums, growing bandwidth, and reading within a window.

`naive_memory_mosaic_v2.py` states the same operators as loops.

Shapes use B batch, T tokens, H heads, D head width, W pairs of a window, L tokens of a chunk or block.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.utils.generic import maybe_autocast

from .ops_memory_mosaic import CHUNK_LENGTH, at_least_float32


# Log of the gate of what adds nothing, such as padding. Finite, so that differences of two are numbers.
LOWEST_LOG = -1e30
# The authors cap what the thetas of a bandwidth and of a value length stand for (table 6).
MAX_LOG_BANDWIDTH, MAX_LOG_VALUE_LENGTH = 10.0, 15.0
# Tokens of a block of queries in [`window_read`].
SHORTEST_BLOCK, LONGEST_BLOCK = 16, 128


def magnitude(theta: torch.Tensor) -> torch.Tensor:
    """Return |theta|, with the derivative 1 at 0: by that of `abs` nothing that starts there would learn."""
    return torch.where(theta < 0, -theta, theta)


def gated_step(
    states: torch.Tensor,
    log_gates: torch.Tensor,
    log_decays: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum `(B, H, 1, D)` and log scale `(B, H, 1, 1)` of one more token: what [`gated_sum`] repeats."""
    before, log_scale = previous
    gates, aged = log_gates[..., None], log_scale + log_decays[..., None]
    largest = torch.maximum(gates, aged).detach()
    return (gates - largest).exp() * states + (aged - largest).exp() * before, largest


def _carried(
    totals: torch.Tensor,
    log_totals: torch.Tensor,
    log_decays: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor] | None,
    document_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each chunk starts from: sums `(B, H, chunks, D)` and their log scales `(B, H, chunks, 1)`.

    Args:
        totals, log_totals, log_decays: of each chunk alone, the gated sum at its end, the log of its scale, and the
            log of the factor by which the chunk ages a sum.
    """
    if previous is None:
        previous = torch.zeros_like(totals[:, :, :1]), torch.full_like(totals[:, :, :1, :1], LOWEST_LOG)
    if totals.shape[2] == 1:
        return previous
    ends, log_scales = _gated_sums(totals, log_totals, log_decays, previous, document_ids)
    before, log_scale = previous
    return torch.cat([before, ends[:, :, :-1]], dim=2), torch.cat([log_scale, log_scales[:, :, :-1]], dim=2)


def _gated_sums(
    states: torch.Tensor,
    log_gates: torch.Tensor,
    log_decays: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor] | None,
    document_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what [`gated_sum`] does, for states in float32 at least.

    A sum is held as a vector times exp(its log scale), which is the largest log weight of what was summed: so no
    weight is above 1, whatever the gates are. Scales are constants to the gradient: they change no sum.
    """
    num_tokens = states.shape[2]
    if num_tokens == 1 and document_ids is None and previous is not None:
        return gated_step(states, log_gates, log_decays, previous)
    is_one_chunk = torch.compiler.is_exporting() or num_tokens <= CHUNK_LENGTH
    length = num_tokens if is_one_chunk else CHUNK_LENGTH
    num_chunks = 1 if is_one_chunk else (num_tokens + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    if padding := num_chunks * length - num_tokens:
        states, log_decays = F.pad(states, (0, 0, 0, padding)), F.pad(log_decays, (0, padding))
        log_gates = F.pad(log_gates, (0, padding), value=LOWEST_LOG)
        document_ids = None if document_ids is None else F.pad(document_ids, (0, padding))
    chunks = states.unflatten(2, (num_chunks, length))  # (B, H, chunks, L, D)
    log_gates, log_decays = (part.unflatten(2, (num_chunks, length)) for part in (log_gates, log_decays))
    ages = log_decays.cumsum(-1)
    # The log weight of position s in the sum at t, less what all of that sum have in common, the age of t.
    is_summed = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
    is_continued = None
    if document_ids is not None:
        document_ids = document_ids.unflatten(1, (num_chunks, length))
        is_summed = is_summed & (document_ids[..., :, None] == document_ids[..., None, :])[:, None]
        before = F.pad(document_ids[:, :-1, -1:], (0, 0, 1, 0))  # the document that the chunk before ends with
        is_continued = (document_ids == before)[:, None]
    log_weights = (log_gates - ages)[..., None, :].masked_fill(~is_summed, -torch.inf)  # (B, H, chunks, L, L)
    largest = log_weights.detach().amax(-1)
    if previous is not None or num_chunks > 1:
        last = log_weights[..., -1:, :]
        totals = ((last - largest[..., -1:, None]).exp() @ chunks).squeeze(3)
        log_age = ages[..., -1]
        ends_of = None if document_ids is None else document_ids[:, :, -1]
        carried, log_scale = _carried(totals, log_age + largest[..., -1], log_age, previous, ends_of)
        log_before = log_scale.expand_as(largest)
        if is_continued is not None:
            log_before = log_before.masked_fill(~is_continued, -torch.inf)
        largest = torch.maximum(largest, log_before.detach())
        sums = (log_weights - largest[..., None]).exp() @ chunks
        sums = sums + (log_before - largest).exp()[..., None] * carried[:, :, :, None]
    else:
        sums = (log_weights - largest[..., None]).exp() @ chunks
    log_scales = (ages + largest)[..., None]
    return sums.flatten(2, 3)[:, :, :num_tokens], log_scales.flatten(2, 3)[:, :, :num_tokens]


def gated_sum(
    states: torch.Tensor,
    log_gates: torch.Tensor,
    log_decays: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor] | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gated sums of past states up to a scale, which their directions do not depend on (v2, eq. 8).

    s_t = exp(log_gate_t) states_t + exp(log_decay_t) s_(t-1), and the returned vectors are s_t exp(-log_scale_t).

    Linear in T in time and memory; finite for any gates. Gradients are exact for functions of the direction of each
    sum, as keys are.

    Args:
        states (`torch.Tensor` of shape `(B, H, T, D)`): inputs; summed in float32 at least.
        log_gates (`torch.Tensor` of shape `(B, H, T)`): [`LOWEST_LOG`] at padding.
        log_decays (`torch.Tensor` of shape `(B, H, T)`): not positive; 0 at padding.
        previous (*optional*): vector `(B, H, 1, D)` and log scale `(B, H, 1, 1)` of the sum before; nothing when
            absent.
        document_ids (`torch.Tensor` of shape `(B, T)`, *optional*): never falling. Sums start again with each.

    Returns:
        vectors `(B, H, T, D)` and log scales `(B, H, T, 1)`: the last ones continue the sum.
    """
    with maybe_autocast(states.device.type, enabled=False):
        states, log_gates, log_decays = (at_least_float32(part) for part in (states, log_gates, log_decays))
        return _gated_sums(states, log_gates, log_decays, previous, document_ids)


def inverse_temperature(
    num_pairs: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, exponent: torch.Tensor | None, largest: float
) -> torch.Tensor:
    """Return beta = beta_1 n^alpha + beta_0 of each head and token (v2, eq. 6; parametrised as in table 6).

    Args:
        num_pairs (`torch.Tensor` of shape `(B or 1, T)`): n; 1 in place of 0.
        scale, offset, exponent (`torch.Tensor` of shape `(H or 1,)`): thetas of beta_1, beta_0 and alpha, which is 0
            without an exponent.
        largest (`float`): what beta is at most, so that queries stay within the range of a precision.

    Returns:
        beta `(B or 1, H or 1, T, 1)`, in float32 at least.
    """
    scale, offset = (at_least_float32(part).clamp(max=MAX_LOG_BANDWIDTH).view(-1, 1, 1) for part in (scale, offset))
    log_growth = scale
    if exponent is not None:
        alpha = magnitude(at_least_float32(exponent)).clamp(max=1).view(-1, 1, 1)
        log_growth = scale + alpha * num_pairs.clamp(min=1).to(scale.dtype).log()[:, None, :, None]
    return (log_growth.exp() + offset.exp()).clamp(max=largest)


def alignment(is_token: torch.Tensor) -> torch.Tensor:
    """Return the order of slots `(B, S)` in which padding comes first and tokens stay in order, `(B, S)`."""
    return is_token.to(torch.uint8).argsort(dim=-1, stable=True)


def rearranged(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return a tensor `(B, H, S, D)` with its slots in an order `(B, S)`."""
    return tensor.gather(2, order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def window_read(
    read: Callable[..., torch.Tensor],
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    is_full: torch.Tensor,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read the W pairs up to each token, block by block: the cost is T x W.

    Args:
        read: maps queries `(G, H, L, D)`, keys and values `(G, H, L + W, D)` and a mask `(G, 1, L, L + W)` to what is
            retrieved `(G, L, H, D)`.
        queries (`torch.Tensor` of shape `(B, H, T, D)`).
        keys, values (`torch.Tensor` of shape `(B, H, W + T, D)`): of the slots before the first token, and of each.
        is_full (`torch.Tensor` of shape `(B, W + T)`): whether a slot holds a pair.
        document_ids (`torch.Tensor` of shape `(B, W + T)`, *optional*): tokens read pairs of their own document.

    Returns:
        retrieved values `(B, T, H, D)`.
    """
    batch_size, num_tokens = queries.shape[0], queries.shape[2]
    size = keys.shape[2] - num_tokens
    length = min(num_tokens, max(SHORTEST_BLOCK, min(size, LONGEST_BLOCK)))
    num_blocks = (num_tokens + length - 1) // length
    padding = num_blocks * length - num_tokens

    def overlapping(tensor: torch.Tensor) -> torch.Tensor:
        blocks = F.pad(tensor, (0, 0, 0, padding)).unfold(2, size + length, length)  # (B, H, blocks, D, L + W)
        return blocks.permute(0, 2, 1, 4, 3).flatten(0, 1)

    blocks = F.pad(queries, (0, 0, 0, padding)).unflatten(2, (num_blocks, length)).transpose(1, 2).flatten(0, 1)
    lag = torch.arange(size + length, device=queries.device) - torch.arange(length, device=queries.device)[:, None]
    is_full = F.pad(is_full, (0, padding)).unfold(1, size + length, length)  # (B, blocks, L + W)
    is_seen = ((lag > 0) & (lag <= size)) & is_full[:, :, None]
    if document_ids is not None:
        of_slots = F.pad(document_ids, (0, padding)).unfold(1, size + length, length)
        is_seen = is_seen & (of_slots[:, :, size:, None] == of_slots[:, :, None])
    retrieved = read(blocks, overlapping(keys), overlapping(values), is_seen.flatten(0, 1)[:, None])
    return retrieved.unflatten(0, (batch_size, num_blocks)).flatten(1, 2)[:, :num_tokens]


__all__ = ["gated_sum", "inverse_temperature"]

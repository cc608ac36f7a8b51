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
"""Operators of Memory Mosaics on plain tensors: leaky average, scaling to a length, kernel smoothing.

One function serves whole texts, chunks and single tokens. `naive_memory_mosaic.py` states the same operators as loops.

Shapes use B batch, T tokens, H heads, D head width, N stored pairs, C hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast


# Tokens summed by one matrix product in `leaky_average`; a longer text is a leaky average of such chunks.
CHUNK_LENGTH = 32
# The authors cap the log of a key's length, so that no product of two keys leaves the range of float16.
MAX_LOG_KEY_SCALE = 5.0
# Of `k_means`: steps, and points that are compared with all centres at a time.
LLOYD_STEPS, POINTS_AT_ONCE = 5, 4096


class HeadScalars(NamedTuple):
    """What the scalars of a memory's heads stand for, `(H, 1, 1)` each, in float32 at least.

    - `versions`: of the parameters that these were computed from; `None` if they are not to be kept,
    - `leak`: of leaky sums, in nats per token, of shape `(H,)`,
    - `decay`: by which factor a leaky sum shrinks with each token,
    - `key_length`: of the kernel's keys; of persistent queries, which face slots without a scale, its square,
    - `value_length`,
    - `value_mix`: share of the earlier of two values; persistent memories have none.
    """

    versions: list[tuple[int, int]] | None
    leak: torch.Tensor
    decay: torch.Tensor
    key_length: torch.Tensor
    value_length: torch.Tensor
    value_mix: torch.Tensor | None = None


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in `dtype`. A call of `to` that changes nothing costs as much as an operation on one token."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32; return float32 and float64 as they are."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def embed_ids(embedding: nn.Module, input_ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the embeddings `(B, T, C)` of token ids `(B, T)`.

    Raises:
        ValueError: if an id is not below `vocab_size`.
    """
    try:
        return embedding(input_ids)
    except IndexError as error:
        raise ValueError(
            f"input_ids range from {input_ids.min().item()} to {input_ids.max().item()}, but vocab_size is "
            f"{vocab_size}. Use this model's own tokenizer, or call `resize_token_embeddings`."
        ) from error


def check_plain_head(head: nn.Module, hidden_states: torch.Tensor) -> None:
    """Raise `ValueError` unless a head does nothing but multiply hidden states by a weight that lies where they do."""
    weight: Any = getattr(head, "weight", None)
    has_hooks = bool(head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__)
    is_plain = type(head) is nn.Linear and head.bias is None and not has_hooks
    if not is_plain or type(weight) not in (nn.Parameter, torch.Tensor) or weight.device != hidden_states.device:
        raise ValueError(
            "skip_logits=True needs a plain `lm_head`, and this one is adapted, quantized, offloaded, sharded, hooked "
            "or has a bias: leave skip_logits out."
        )


def loss_without_logits(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Return the cross entropy of the next tokens, with the logits of a part of the tokens at a time.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, C)`).
        head: the linear layer that makes logits of them.
        labels (`torch.Tensor` of shape `(B, T)`): not shifted.
        num_items_in_batch (*optional*): what the sum of the losses is divided by; the number of labels when absent.
        ignore_index (`int`): labels that do not count.
        kwargs: of the model, as its own loss function takes them; they change nothing.

    Raises:
        ValueError: if torch is older than 2.13, if the head is more than a product, or if labels are absent, shifted
            or of another shape.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise ValueError(f"skip_logits=True needs torch 2.13 or newer, and this is {torch.__version__}.")
    check_plain_head(head, hidden_states)
    if labels is None or shift_labels is not None or labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            "skip_logits=True needs `labels`, not shifted and one for each token, and no `logits_to_keep`: without "
            "logits the loss is all that there is."
        )
    weight: Any = head.weight
    targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:].flatten().to(hidden_states.device)
    # One by one: a sum in half precision would be rounded.
    options: dict[str, Any] = {"reduction": "none", "ignore_index": ignore_index}
    options["options"] = nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(hidden_states.flatten(0, 1), weight, targets, **options)
    num_items = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(losses.device)
    return at_least_float32(losses).sum() / num_items


def positions_to_keep(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """Return the index of the positions whose logits are asked for: the last so many (0: all), or those indexed.

    Raises:
        ValueError: if the number is negative, or the index is not of shape `(tokens,)`.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep.ndim != 1:
            raise ValueError(f"logits_to_keep has shape {tuple(logits_to_keep.shape)}: it must be (tokens,).")
        return logits_to_keep
    if logits_to_keep < 0:
        raise ValueError(f"logits_to_keep={logits_to_keep} must not be negative.")
    return slice(-logits_to_keep, None)


def leaky_step(states: torch.Tensor, decay: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Return the leaky sum of one more token, in float32 at least: what [`leaky_average`] is the repetition of.

    Args:
        states, previous (`torch.Tensor` of shape `(B, H, 1, D)`): the new token's vector, and the sum before it.
        decay (`torch.Tensor`): exp(-leak), broadcasts to them.
    """
    return torch.addcmul(at_least_float32(states), decay, previous)


def chunk_decays(
    leak: torch.Tensor,
    elapsed: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    num_chunks: int,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weights by which each position of a chunk sums what came before it.

    Groups G are heads where all chunks are alike, otherwise rows x heads x chunks; L is `length`.

    Returns:
        the weight of each earlier position of the chunk `(G, L, L)`, the weight of the state before the chunk
        `(G, L)`, and by how many tokens each chunk ages a state `(B, chunks)`.
    """
    if elapsed is None:
        ages = torch.arange(1, length + 1, device=leak.device, dtype=leak.dtype)
        lags = (ages[:, None] - ages).clamp(min=0)
        return torch.exp(-leak[:, None, None] * lags).tril(), torch.exp(-leak[:, None] * ages), ages[None, -1:]
    ages = elapsed.to(leak.dtype).unflatten(1, (num_chunks, length)).cumsum(-1)  # (B, chunks, L)
    lags = (ages[..., :, None] - ages[..., None, :]).clamp(min=0)
    within = torch.exp(-leak[:, None, None, None] * lags[:, None]).tril()  # (B, H, chunks, L, L)
    before = torch.exp(-leak[:, None, None] * ages[:, None])  # (B, H, chunks, L)
    if document_ids is not None:
        document_ids = document_ids.unflatten(1, (num_chunks, length))
        carried = F.pad(document_ids[:, :-1, -1:], (0, 0, 1, 0))  # the document that the chunk before ends with
        within = within * (document_ids[..., :, None] == document_ids[..., None, :])[:, None]
        before = before * (document_ids == carried)[:, None]
    return within.flatten(0, 2), before.flatten(0, 2), ages[..., -1]


def _leaky_sums(
    states: torch.Tensor,
    leak: torch.Tensor,
    initial_state: torch.Tensor | None,
    elapsed: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return the leaky sums `(B, H, T, D)`; arguments as for [`leaky_average`], states already in float32 at least.

    One matrix product sums within chunks; a leaky average of the chunks' totals carries on between them. Matrix
    products alone touch all the states, in the backward pass too: elementwise steps and slices of the whole would
    cost more than the sums themselves.
    """
    num_tokens = states.shape[2]
    if num_tokens == 1 and document_ids is None:
        if initial_state is None:
            return states
        aged = leak[:, None, None] if elapsed is None else leak[:, None, None] * elapsed[:, None, :, None]
        return leaky_step(states, torch.exp(-aged), initial_state)
    # An exported program serves any number of tokens, so it cannot depend on their number of chunks: it has one.
    is_one_chunk = torch.compiler.is_exporting() or num_tokens <= CHUNK_LENGTH
    length = num_tokens if is_one_chunk else CHUNK_LENGTH
    num_chunks = 1 if is_one_chunk else (num_tokens + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    if padding := num_chunks * length - num_tokens:
        states = F.pad(states, (0, 0, 0, padding))
        elapsed = None if elapsed is None else F.pad(elapsed, (0, padding))
        document_ids = None if document_ids is None else F.pad(document_ids, (0, padding))
    chunks = states.unflatten(2, (num_chunks, length))  # (B, H, chunks, length, D)
    batch_size, num_heads, _, _, width = chunks.shape
    within, before, chunk_elapsed = chunk_decays(leak, elapsed, document_ids, num_chunks, length)

    # Rows are (groups, positions, columns). Chunks that share their decays form a group: if all tokens age alike all
    # chunks of a head, their vectors side by side as columns; with padding or documents each chunk is a group.
    def to_rows(vectors: torch.Tensor) -> torch.Tensor:
        return vectors.permute(1, 3, 0, 2, 4).flatten(2) if elapsed is None else vectors.flatten(0, 2)

    def from_rows(rows: torch.Tensor) -> torch.Tensor:
        if elapsed is not None:
            return rows.view(batch_size, num_heads, num_chunks, -1, width)
        return rows.view(num_heads, -1, batch_size, num_chunks, width).permute(2, 0, 3, 1, 4)

    rows = to_rows(chunks)
    sums = torch.bmm(within, rows)
    if num_chunks > 1:
        totals = from_rows(torch.bmm(within[:, -1:], rows)).squeeze(3)
        ends = _leaky_sums(
            totals,
            leak * length if elapsed is None else leak,
            initial_state,
            None if elapsed is None else chunk_elapsed,
            None if document_ids is None else document_ids[:, length - 1 :: length],
        )
        first = torch.zeros_like(ends[:, :, :1]) if initial_state is None else initial_state.to(ends.dtype)
        initial_state = torch.cat([first, ends[:, :, :-1]], dim=2)  # (B, H, chunks, D): what each chunk starts from
    if initial_state is not None:
        sums = torch.baddbmm(sums, before[:, :, None], to_rows(initial_state[:, :, :, None].to(sums.dtype)))
    # Heads come first in storage, as the persistent memory reads all rows of a head together.
    return from_rows(sums).transpose(0, 1).flatten(2, 3)[:, :, :num_tokens].transpose(0, 1)


def leaky_average(
    states: torch.Tensor,
    leak: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    elapsed: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the exponentially decaying sum of past states, one decay per head (paper, eq. 7).

    s_t = exp(-leak * elapsed_t) s_(t-1) + states_t

    Linear in T in time and memory. The sum is not divided by the total of its weights: keys are normalised afterwards.

    Args:
        states (`torch.Tensor` of shape `(B, H, T, D)`): inputs; summed in float32 at least.
        leak (`torch.Tensor` of shape `(H,)`): not negative, in nats per token.
        initial_state (`torch.Tensor` of shape `(B, H, 1, D)`, *optional*): s_(-1); zeros when absent.
        elapsed (`torch.Tensor` of shape `(B, T)`, *optional*): tokens of decay before each position: 0 where the
            state must not age (padding), else 1. All ones when absent.
        document_ids (`torch.Tensor` of shape `(B, T)`, *optional*): number of the document of each position, never
            falling. The sum starts again with each document, with document 0 at `initial_state`. One document when
            absent.

    Returns:
        sums `(B, H, T, D)` and final state `(B, H, 1, D)`: splitting T anywhere gives the same result.
    """
    if elapsed is None and document_ids is not None:
        elapsed = torch.ones_like(document_ids)
    with maybe_autocast(states.device.type, enabled=False):
        states = at_least_float32(states)
        sums = _leaky_sums(states, as_dtype(leak, states.dtype), initial_state, elapsed, document_ids)
    return sums, sums if sums.shape[2] == 1 else sums[:, :, -1:]


def scale_to_length(vectors: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Scale vectors `(B, H, T, D)` to `length` `(H, 1, 1)`, in float32 at least; a zero vector stays zero."""
    vectors = at_least_float32(vectors)
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # Not an epsilon: it would blow up the gradient of a zero vector beyond what half precision holds.
    is_zero = norms.logical_not()
    norms = norms.masked_fill(is_zero, 1.0) if torch.is_grad_enabled() else norms.masked_fill_(is_zero, 1.0)
    return vectors * (as_dtype(length, vectors.dtype) / norms)


def keys_and_queries(
    sums: torch.Tensor, length: torch.Tensor, hidden_states: torch.Tensor, query_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys of leaky sums, and those of new tokens as queries.

    A scale is that of the kernel's inverse temperature, by the number of pairs that a token sees. It makes queries
    longer and leaves keys as they are: stored pairs stay a set, and their number may grow.

    Args:
        sums (`torch.Tensor` of shape `(B, H, S, D)`): those of the T new tokens, and any before them.
        length (`torch.Tensor` of shape `(H, 1, 1)`): of keys.
        hidden_states (`torch.Tensor` of shape `(B, T, C)`): of the new tokens, for their number and dtype.
        query_scale (`torch.Tensor` of shape `(B or 1, T)`, *optional*): in float32 at least; 1 for all when absent.

    Returns:
        keys `(B, H, S, D)` and queries `(B, H, T, D)`, in the dtype of `hidden_states`.
    """
    scaled, num_tokens = scale_to_length(sums, length), hidden_states.shape[1]
    keys = as_dtype(scaled, hidden_states.dtype)
    if query_scale is None:
        return keys, keys[:, :, -num_tokens:]
    # Before the conversion: in half precision it would round twice.
    return keys, (scaled[:, :, -num_tokens:] * query_scale[:, None, :, None]).to(keys.dtype)


def forward_fill(vectors: torch.Tensor, is_token: torch.Tensor, initial_state: torch.Tensor | None) -> torch.Tensor:
    """Replace each vector at padding by the vector of the last token before it.

    Args:
        vectors (`torch.Tensor` of shape `(B, H, T, D)`).
        is_token (`torch.Tensor` of shape `(B, T)`): False at padding.
        initial_state (`torch.Tensor` of shape `(B, H, 1, D)`, *optional*): what stands before the first token. When
            absent, padding before the first token gets a vector of no meaning.

    Returns:
        vectors `(B, H, T, D)`.
    """
    first = vectors[:, :, :1] if initial_state is None else initial_state
    batch_size, num_tokens = is_token.shape
    # Where the n-th token stands, counted from 1; padding writes behind the end. (ONNX has no running maximum.)
    positions = torch.arange(1, num_tokens + 1, device=is_token.device).expand(batch_size, -1)
    count = is_token.long().cumsum(-1)
    places = count.new_zeros(batch_size, num_tokens + 2)
    places = places.scatter(1, torch.where(is_token, count, num_tokens + 1), positions)
    last = places.gather(1, count)[:, None, :, None].expand_as(vectors)
    return torch.cat([first, vectors], dim=2).gather(2, last)


def smoothing_weights(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Return the weights `(B, H, T, N)` of [`kernel_smoothing`], in float32 at least."""
    with maybe_autocast(query.device.type, enabled=False):
        scores = at_least_float32(query) @ at_least_float32(key).transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask
        return F.dropout(scores.softmax(dim=-1), p=dropout, training=dropout > 0)


def weighted_values(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the sums `(B, H, T, D)` of values `(B, H, N, D)` by weights `(B, H, T, N)`, in the values' dtype."""
    with maybe_autocast(value.device.type, enabled=False):
        return (weights @ at_least_float32(value)).to(value.dtype)


def kernel_smoothing(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average stored values, weighted by how near their keys are to the query (paper, eq. 2 and 3).

    y = sum_i softmax_i(query . key_i) value_i. With keys of one length this is a Gaussian kernel regression: the
    longer the keys, the narrower the kernel. Scores and weights are computed in float32 at least.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`), key and value (`torch.Tensor` of shape `(B or 1, H, N, D)`).
        attention_mask (`torch.Tensor`, *optional*): added to the scores; broadcasts to `(B, H, T, N)`.
        dropout (`float`): share of weights set to zero.

    Returns:
        retrieved values `(B, H, T, D)` in the values' dtype, and weights `(B, H, T, N)`.
    """
    weights = smoothing_weights(query, key, attention_mask, dropout)
    return weighted_values(weights, value), weights


def direct_read(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_seen: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what [`kernel_smoothing`] retrieves `(B, H, T, D)` for the few queries of a decoding step.

    On a CPU their time is that of fetching pairs, which products of matrices and columns do fastest. `is_seen` says
    which pairs a query sees, and broadcasts to `(B, H, T, N)`.
    """
    queries, keys, values = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(keys, queries.transpose(1, 2)).transpose(1, 2)
    if is_seen is not None:
        scores = scores.view(*query.shape[:3], -1).masked_fill(~is_seen, -torch.inf).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), values).view(query.shape)


def lowest_bias(dtype: torch.dtype) -> float:
    """Return what is added to the score of a pair that is not seen.

    Finite, so that a query that sees nothing has weights, which are then made 0; two of them stay finite too.
    """
    return torch.finfo(dtype).min / 4


def biased_read(
    attention_function: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_allowed: torch.Tensor,
    slot_bias: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what an attention function of transformers retrieves with biases of slots added to the scores.

    Args:
        is_allowed (`torch.Tensor`): which slots a query sees otherwise; broadcasts to `(B, H, T, S)`.
        slot_bias (`torch.Tensor` of shape `(B, H or 1, S)`).

    Returns:
        retrieved values `(B, T, H, D)`, 0 for a query that sees no pair, and weights if the function returns them.
    """
    bias = slot_bias[:, :, None].to(device=query.device, dtype=query.dtype).masked_fill(~is_allowed, -torch.inf)
    sees_any = (bias > -torch.inf).any(dim=-1, keepdim=True)
    retrieved, weights = attention_function(module, query, key, value, bias.where(sees_any, 0.0), **kwargs)
    weights = None if weights is None else weights * sees_any
    return retrieved * sees_any.transpose(1, 2), weights


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute [`kernel_smoothing`] in the calling convention of transformers' attention functions."""
    weights = smoothing_weights(query, key, attention_mask, dropout)
    if module.is_causal:
        # Slot t holds the pair of token t - 1, slot 0 a zero. Moved on by one, the weights name tokens.
        weights, value = F.pad(weights[..., 1:], (0, 1)), F.pad(value[:, :, 1:], (0, 0, 0, 1))
    return weighted_values(weights, value).transpose(1, 2), weights


def k_means(points: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Return the cluster of each point `(N, D)`, from 0 on, none of them empty, `(N,)`."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    centres = points[torch.randperm(len(points), generator=generator)[:num_clusters].to(points.device)]
    cluster = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _ in range(LLOYD_STEPS):
        # The nearest centre: products and lengths of centres say which, without a number for each pair and width.
        half_squares = 0.5 * centres.square().sum(-1)
        parts = [(part @ centres.T - half_squares).argmax(-1) for part in points.split(POINTS_AT_ONCE)]
        cluster = torch.cat(parts)
        counts = torch.bincount(cluster, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, cluster, points)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
    return cluster.unique(return_inverse=True)[1]


__all__ = ["kernel_smoothing", "leaky_average"]

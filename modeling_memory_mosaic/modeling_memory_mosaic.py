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
"""Memory Mosaics (arXiv 2405.06394): language models whose every layer is a set of associative memories.

Shapes use B batch, T tokens, H heads (memories per layer), D head width, C = hidden size, N persistent slots per head.
Per-head scalars are stored divided by 10, as in the authors' `Library`: Adam then moves them ten times faster.

Docstrings are written by hand (TRF057): the library's generator of them knows the models within the library only.
"""

import contextlib
import functools
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_memory_mosaic import AdaptableLayer, AdaptableModel, prepare_for_adapters
from .cache_memory_mosaic import MemoryMosaicStates
from .configuration_memory_mosaic import MemoryMosaicConfig
from .identity_memory_mosaic import note_writer


PARAMETER_SCALE = 10.0
# The authors cap the log of a key's length, so that no product of two keys leaves the range of float16.
MAX_LOG_KEY_SCALE = 5.0
# Tokens summed by one matrix product in `leaky_average`; a longer text is a leaky average of such chunks.
CHUNK_LENGTH = 32
# What `DataCollatorWithFlattening` sends along with `position_ids`.
PACKING_NAMES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What other libraries call them: taken for anything, they would be passed over.
FOREIGN_PACKING_NAMES = ("document_ids", "segment_ids", "sequence_ids", "cu_seqlens", "cu_seqlens_q")
# What outputs call the memory: `cache` from transformers 5.24 on, which warns of the old name, `past_key_values`.
MEMORY_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_memory(past_key_values: Cache | None, cache: Cache | None, is_asked_for: bool = True) -> Cache | None:
    """The memory, under whichever name it was given: transformers calls it `cache` from 5.24 on.

    Its old name is warned of, as transformers does then, where a caller has used it (`is_asked_for`).

    Raises:
        ValueError: if two different memories are given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "`past_key_values` and `cache` are two names of one memory, but two memories are given: pass one."
        )
    # PEFT passes both names: nothing that a caller could change.
    is_asked_for = is_asked_for and past_key_values is not None and cache is None
    if is_asked_for and MEMORY_NAME == "cache" and not is_torchdynamo_compiling():
        warnings.warn(
            "`past_key_values` is deprecated, as in transformers itself from 5.24 on: use `cache` instead.",
            FutureWarning,
            stacklevel=2,
        )
    return past_key_values if cache is None else cache


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def leaky_average(
    states: torch.Tensor,
    leak: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    elapsed: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponentially decaying sum of past states, one decay per head (paper, eq. 7).

    s_t = exp(-leak * elapsed_t) s_(t-1) + states_t

    Linear in T in time and memory. The sum is not divided by its weights' total: keys are normalised afterwards.

    Args:
        states (`torch.Tensor` of shape `(B, H, T, D)`): inputs; summed in float32 at least.
        leak (`torch.Tensor` of shape `(H,)`): not negative, in nats per token.
        initial_state (`torch.Tensor` of shape `(B, H, 1, D)`, *optional*): s_(-1); zeros when absent.
        elapsed (`torch.Tensor` of shape `(B, T)`, *optional*): tokens of decay before each position: 0 where the
            state must not age (padding), else 1. All ones when absent.
        document (`torch.Tensor` of shape `(B, T)`, *optional*): number of the text that each position belongs to,
            never falling; each sum starts anew with its text, number 0 at `initial_state`. One text when absent.

    Returns:
        sums `(B, H, T, D)` and final state `(B, H, 1, D)`: splitting T anywhere gives the same result.
    """
    if elapsed is None and document is not None:
        elapsed = torch.ones_like(document)
    with maybe_autocast(states.device.type, enabled=False):
        states = at_least_float32(states)
        sums = _leaky_sums(states, leak.to(states.dtype), initial_state, elapsed, document)
    return sums, sums[:, :, -1:]


def _leaky_sums(states, leak, initial_state, elapsed, document):
    """One matrix product sums within chunks; a leaky average of the chunks' own totals carries on between them.

    Matrix products alone touch all the states, in the backward pass too: elementwise steps and slices of the whole
    would cost more than the sums themselves.
    """
    num_tokens = states.shape[2]
    if num_tokens == 1 and document is None:
        aged = leak[:, None, None] if elapsed is None else leak[:, None, None] * elapsed[:, None, :, None]
        return states if initial_state is None else states + torch.exp(-aged) * initial_state
    # An exported program serves any number of tokens, so it cannot depend on their number of chunks: it has one.
    is_one_chunk = torch.compiler.is_exporting() or num_tokens <= CHUNK_LENGTH
    length = num_tokens if is_one_chunk else CHUNK_LENGTH
    num_chunks = 1 if is_one_chunk else (num_tokens + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    if padding := num_chunks * length - num_tokens:
        states = F.pad(states, (0, 0, 0, padding))
        elapsed, document = (None if marks is None else F.pad(marks, (0, padding)) for marks in (elapsed, document))
    chunks = states.unflatten(2, (num_chunks, length))  # (B, H, chunks, length, D)
    batch_size, num_heads, _, _, width = chunks.shape
    within, before, chunk_elapsed = chunk_decays(leak, elapsed, document, num_chunks, length)

    # Rows are (groups, positions, columns). Chunks that share their decays form a group: if all tokens age alike all
    # chunks of a head, their vectors side by side as columns; with padding or documents each chunk is its own.
    def to_rows(vectors):
        return vectors.permute(1, 3, 0, 2, 4).flatten(2) if elapsed is None else vectors.flatten(0, 2)

    def from_rows(rows):
        if elapsed is not None:
            return rows.view(batch_size, num_heads, num_chunks, -1, width)
        return rows.view(num_heads, -1, batch_size, num_chunks, width).permute(2, 0, 3, 1, 4)

    rows = to_rows(chunks)
    sums = within @ rows
    if num_chunks > 1:
        totals = from_rows(within[:, -1:] @ rows).squeeze(3)
        ends = _leaky_sums(
            totals,
            leak * length if elapsed is None else leak,
            initial_state,
            None if elapsed is None else chunk_elapsed,
            None if document is None else document[:, length - 1 :: length],
        )
        first = torch.zeros_like(ends[:, :, :1]) if initial_state is None else initial_state.to(ends.dtype)
        initial_state = torch.cat([first, ends[:, :, :-1]], dim=2)  # (B, H, chunks, D): what each chunk starts from
    if initial_state is not None:
        sums = torch.baddbmm(sums, before[:, :, None], to_rows(initial_state[:, :, :, None].to(sums.dtype)))
    # Heads come first in storage, as the persistent memory reads all rows of a head together.
    return from_rows(sums).transpose(0, 1).flatten(2, 3)[:, :, :num_tokens].transpose(0, 1)


def chunk_decays(leak, elapsed, document, num_chunks, length):
    """What is left, at each position of a chunk, of each earlier one `(G, L, L)` and of the time before `(G, L)`.

    Groups G are heads where all chunks are alike, else rows x heads x chunks. Third comes how far each chunk ages a
    state, `(B, chunks)`.
    """
    if elapsed is None:
        ages = torch.arange(1, length + 1, device=leak.device, dtype=leak.dtype)[None, None]
    else:
        ages = elapsed.to(leak.dtype).unflatten(1, (num_chunks, length)).cumsum(-1)  # (B, chunks, L)
    lags = (ages[..., :, None] - ages[..., None, :]).clamp(min=0)
    within = torch.exp(-leak[:, None, None, None] * lags[:, None]).tril()  # (B, H, chunks, L, L)
    before = torch.exp(-leak[:, None, None] * ages[:, None])  # (B, H, chunks, L)
    if document is not None:
        document = document.unflatten(1, (num_chunks, length))
        carried = F.pad(document[:, :-1, -1:], (0, 0, 1, 0))  # the document that the time before ended with
        within = within * (document[..., :, None] == document[..., None, :])[:, None]
        before = before * (document == carried)[:, None]
    return within.flatten(0, 2), before.flatten(0, 2), ages[..., -1]


def scale_to_length(vectors: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Vectors `(B, H, T, D)` stretched to `length` `(H,)`, in float32 at least; a zero vector stays zero."""
    vectors = at_least_float32(vectors)
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # Not an epsilon: it would blow up the gradient of a zero vector beyond what half precision holds.
    return vectors * (length.to(vectors.dtype)[:, None, None] / norms.masked_fill(norms == 0, 1.0))


def hold_last(vectors: torch.Tensor, is_token: torch.Tensor, initial_state: torch.Tensor | None) -> torch.Tensor:
    """Vectors `(B, H, T, D)` with each one at padding replaced by the last one at a token `is_token` `(B, T)`.

    Before the first token stands `initial_state` `(B, H, 1, D)`; without one, a vector of no meaning.
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


def kernel_smoothing(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average of stored values, weighted by how near their keys are to the query (paper, eq. 2 and 3).

    y = sum_i softmax_i(query . key_i) value_i. With keys of one length this is a Gaussian kernel regression whose
    bandwidth is that length. Scores and weights are computed in float32 at least.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, D)`), key and value (`torch.Tensor` of shape `(B or 1, H, N, D)`).
        attention_mask (`torch.Tensor`, *optional*): added to the scores; broadcasts to `(B, H, T, N)`.
        dropout (`float`): share of weights set to zero.

    Returns:
        retrieved values `(B, H, T, D)` in the values' dtype, and weights `(B, H, T, N)`.
    """
    weights = smoothing_weights(query, key, attention_mask, dropout)
    return weighted_values(weights, value), weights


def smoothing_weights(query, key, attention_mask, dropout):
    with maybe_autocast(query.device.type, enabled=False):
        scores = at_least_float32(query) @ at_least_float32(key).transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask
        return F.dropout(scores.softmax(dim=-1), p=dropout, training=dropout > 0)


def weighted_values(weights, value):
    with maybe_autocast(value.device.type, enabled=False):
        return (weights @ at_least_float32(value)).to(value.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, dropout=0.0, **kwargs):
    """`kernel_smoothing` in the calling convention of transformers' attention functions."""
    weights = smoothing_weights(query, key, attention_mask, dropout)
    if module.is_causal:
        # Slot t holds the pair of token t - 1, slot 0 a zero. Moved on by one, the weights name tokens.
        weights, value = F.pad(weights[..., 1:], (0, 1)), F.pad(value[:, :, 1:], (0, 0, 0, 1))
    return weighted_values(weights, value).transpose(1, 2), weights


class MemoryMosaicMemory(nn.Module):
    """What contextual and persistent memories share: the key extractor, the retrieval and the combining layer."""

    sum_name: str

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        num_heads, inner_size = config.num_attention_heads, config.num_attention_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, inner_size, bias=config.use_bias)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=config.use_bias)
        self.key_leak = nn.Parameter(torch.empty(num_heads))
        self.key_scale = nn.Parameter(torch.empty(num_heads))
        self.value_scale = nn.Parameter(torch.empty(num_heads))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """`(B, T, H * D)` to `(B, H, T, D)`; of all heads, those that this process holds."""
        if projected.shape[-1] % self.config.head_dim:
            raise ValueError(
                f"{projected.shape[-1]} features are not whole heads of {self.config.head_dim}: spread the model over "
                f"a number of processes that divides num_attention_heads={self.config.num_attention_heads}."
            )
        return projected.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def sum_keys(self, hidden_states, is_token, document, past_key_values):
        """Leaky sums of the projected keys, `(B, H, T, D)`, and the one before them, `(B, H, 1, D)` or `None`."""
        states = self.split_heads(self.k_proj(hidden_states))
        if is_token is not None:
            states = states * is_token[:, None, :, None]
        previous = None if past_key_values is None else self.states(past_key_values).get_state(self.sum_name)
        leak = (PARAMETER_SCALE * at_least_float32(self.key_leak)).abs()
        sums, _ = leaky_average(states, leak, previous, is_token, document)
        if past_key_values is not None:
            self.states(past_key_values).set_state(self.sum_name, sums)
        return sums, previous

    def key_length(self, power: int = 1) -> torch.Tensor:
        """`(H,)`: length of a key; its square is the inverse squared bandwidth of the kernel."""
        return (power * (PARAMETER_SCALE * at_least_float32(self.key_scale)).clamp(max=MAX_LOG_KEY_SCALE)).exp()

    def value_length(self) -> torch.Tensor:
        """`(H,)`: length of a value."""
        return (PARAMETER_SCALE * at_least_float32(self.value_scale)).exp()

    def states(self, past_key_values: Cache) -> MemoryMosaicStates:
        """This layer's part of the memory."""
        return past_key_values.layers[self.layer_idx]

    def retrieve(self, query, key, value, attention_mask, **kwargs):
        """Kernel smoothing by the configured attention function: `(B, T, H, D)`, and weights if it returns them."""
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        # The caller's `is_causal` would win over the module's, and persistent memories are not causal.
        kwargs["is_causal"] = self.is_causal
        return attention_function(self, query, key, value, attention_mask, dropout=dropout, scaling=1.0, **kwargs)


class MemoryMosaicContextualMemory(MemoryMosaicMemory):
    """Stores each token's key with the value that follows it, and retrieves from the pairs stored before."""

    sum_name = "contextual_sum"
    is_causal = True

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.v_proj = nn.Linear(config.hidden_size, self.k_proj.out_features, bias=config.use_bias)
        self.value_mix = nn.Parameter(torch.empty(config.num_attention_heads))

    def forward(
        self,
        hidden_states: torch.Tensor,
        slot_mask: torch.Tensor | None = None,
        is_token: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, C)`).
            slot_mask (*optional*): for the attention function, queries by slots. `None`: nothing is padded, and either
                the memory was empty or T is 1, so that the strict rule needs no mask.
            is_token (`torch.Tensor` of shape `(B, T)`, *optional*): False at padding.
            document (`torch.Tensor` of shape `(B, T)`, *optional*): number of each token's text, if rows hold several.
            past_key_values ([`~transformers.Cache`], *optional*): the memory; grows by T slots.

        Returns:
            output `(B, T, C)`, and under eager attention the weight `(B, H, T, S)` that each of T tokens gives to
            the pair of each of S tokens so far.
        """
        sums, previous = self.sum_keys(hidden_states, is_token, document, past_key_values)
        if previous is not None:
            sums = torch.cat([previous, sums], dim=2)
        keys = scale_to_length(sums, self.key_length()).to(hidden_states.dtype)
        pairs = keys[:, :, :-1], self.pair_values(hidden_states, is_token, past_key_values).to(keys.dtype)
        queries = keys[:, :, -hidden_states.shape[1] :]

        retrieved, weights = self.recall(
            queries, pairs, slot_mask, past_key_values, is_first=previous is None, **kwargs
        )
        return self.dropout(self.o_proj(retrieved.flatten(2))), weights

    def recall(self, queries, pairs, slot_mask, past_key_values, is_first: bool, **kwargs):
        """Store the pairs that the new tokens complete, then retrieve for each: `(B, T, H, D)`, and weights if any."""
        slots = pairs
        if past_key_values is not None or slot_mask is not None:
            slots = self.store(*pairs, past_key_values, is_first=is_first)
        if slot_mask is not None:
            return self.retrieve(queries, *slots, slot_mask, **kwargs)
        if is_first:
            # Shift identity: tokens 1.. over the pairs of tokens 0.. is plain causal attention; token 0 retrieves 0.
            retrieved, weights = self.retrieve(queries[:, :, 1:], *pairs, None, **kwargs)
            return F.pad(retrieved, (0, 0, 0, 0, 1, 0)), weights
        return self.retrieve(queries, *(slot[:, :, 1:] for slot in slots), None, **kwargs)

    def store(self, pair_keys, pair_values, past_key_values, is_first: bool):
        """All slots so far, `(B, H, S, D)` keys and values. The first token of all completes no pair: slot 0 is 0."""
        if is_first:
            pair_keys, pair_values = F.pad(pair_keys, (0, 0, 1, 0)), F.pad(pair_values, (0, 0, 1, 0))
        if past_key_values is None:
            return pair_keys, pair_values
        return past_key_values.update(pair_keys, pair_values, self.layer_idx)

    def pair_values(self, hidden_states, is_token, past_key_values):
        """Values of the pairs that the new tokens complete, `(B, H, T, D)`; T - 1 if no token came before."""
        projected = self.split_heads(self.v_proj(hidden_states))
        pending = None if past_key_values is None else self.states(past_key_values).get_state("pending_value")
        if is_token is not None:
            projected = hold_last(projected, is_token, pending)
        if past_key_values is not None:
            self.states(past_key_values).set_state("pending_value", projected)
        if pending is not None:
            projected = torch.cat([pending, projected], dim=2)
        # float32 before the blend: in half precision it would round twice.
        projected = at_least_float32(projected)
        mix = self.value_mix.to(projected.dtype)[:, None, None]
        return scale_to_length(torch.lerp(projected[:, :, 1:], projected[:, :, :-1], mix), self.value_length())


class MemoryMosaicPersistentMemory(MemoryMosaicMemory):
    """Retrieves from learnt pairs: what the model knows before it reads. Takes the place of a feed-forward layer."""

    sum_name = "persistent_sum"
    is_causal = False

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = (config.num_attention_heads, config.num_persistent_slots, config.head_dim)
        self.slot_keys = nn.Parameter(torch.empty(shape))
        self.slot_values = nn.Parameter(torch.empty(shape))

    def forward(
        self,
        hidden_states: torch.Tensor,
        is_token: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Output `(B, T, C)` for hidden states `(B, T, C)`; arguments as for [`MemoryMosaicContextualMemory`]."""
        batch_size, num_tokens, _ = hidden_states.shape
        sums, _ = self.sum_keys(hidden_states, is_token, document, past_key_values)
        # Slots carry no scale of their own, so the query takes both factors of the product of two keys.
        queries = scale_to_length(sums, self.key_length(power=2)).to(self.slot_keys.dtype)
        # Every token reads the same slots, so all rows become one batch and the slots are never repeated.
        queries = queries.transpose(0, 1).flatten(1, 2)[None]  # (1, H, B * T, D)
        retrieved, _ = self.retrieve(queries, self.slot_keys[None], self.slot_values[None], None, **kwargs)
        retrieved = retrieved * self.value_length().to(retrieved.dtype)[:, None]  # (1, B * T, H, D)
        return self.dropout(self.o_proj(retrieved.reshape(batch_size, num_tokens, -1)))


class MemoryMosaicDecoderLayer(AdaptableLayer, GradientCheckpointingLayer):
    """One block: a contextual memory, then a persistent one, each added to the residual stream."""

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__()
        self.contextual_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.contextual_memory = MemoryMosaicContextualMemory(config, layer_idx)
        self.persistent_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.persistent_memory = MemoryMosaicPersistentMemory(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        slot_mask: torch.Tensor | None = None,
        is_token: torch.Tensor | None = None,
        document: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        if not isinstance(self.persistent_memory, MemoryMosaicPersistentMemory):
            self.check_added_adapters()
        memory_kwargs = {"is_token": is_token, "document": document, "past_key_values": past_key_values, **kwargs}
        recalled, _ = self.contextual_memory(self.contextual_norm(hidden_states), slot_mask=slot_mask, **memory_kwargs)
        hidden_states = hidden_states + recalled
        return hidden_states + self.persistent_memory(self.persistent_norm(hidden_states), **memory_kwargs)


# trf-ignore: TRF057
class MemoryMosaicPreTrainedModel(AdaptableModel, PreTrainedModel):
    config: MemoryMosaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryMosaicDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # The leaky sums of one stretch of a text continue those of the stretch before it.
    _supports_context_parallel = False
    _can_record_outputs = {
        "hidden_states": MemoryMosaicDecoderLayer,
        "attentions": MemoryMosaicContextualMemory,
    }
    # Per-head scalars: decaying them would pull every kernel towards one bandwidth.
    no_weight_decay_names = ("key_leak", "key_scale", "value_scale", "value_mix")

    @torch.no_grad()
    def _init_weights(self, module):
        """The distributions of the authors' `Library` (memory_mosaics.py)."""
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Tied, the embedding is initialised as the head that it also is.
            init.normal_(module.weight, std=config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0)
        elif isinstance(module, MemoryMosaicMemory):
            inner_size = module.o_proj.in_features
            init.normal_(module.o_proj.weight, std=(inner_size * config.num_hidden_layers) ** -0.5)
            leaks = torch.linspace(0.5, 5.0, config.num_attention_heads, device="cpu") / PARAMETER_SCALE
            init.copy_(module.key_leak, leaks)
            init.constant_(module.key_scale, 1.0 / PARAMETER_SCALE)
            init.constant_(module.value_scale, -0.5 / PARAMETER_SCALE)
            if isinstance(module, MemoryMosaicContextualMemory):
                init.uniform_(module.value_mix, 0.0, 1.0)
            else:
                init.normal_(module.slot_keys, std=config.head_dim**-0.5)
                init.normal_(module.slot_values, std=config.head_dim**-0.5)
        else:
            super()._init_weights(module)

    def save_pretrained(self, *args, **kwargs):
        """As the library's, with all classes of this file in `config.json`: each Auto class can load the folder."""
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {
            "AutoModel": f"{module}.MemoryMosaicModel",
            "AutoModelForCausalLM": f"{module}.MemoryMosaicForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.MemoryMosaicForSequenceClassification",
            # `transformers serve` 5.23 asks for this one first, and then only for classes within transformers.
            "AutoModelForDecision": f"{module}.MemoryMosaicForCausalLM",
        }
        return super().save_pretrained(*args, **kwargs)


def create_memory_masks(config, inputs_embeds, attention_mask, past_key_values=None, cache=None, **marks):
    """What all layers of one forward pass need to know about padding, documents and the past.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, on either side or within.
        marks: `position_ids`, `seq_idx` and `cu_seq_lens_q`, see [`find_documents`].

    Returns:
        `dict`: `slot_mask`, `is_token` and `document`, the arguments of [`MemoryMosaicContextualMemory`].

    Raises:
        ValueError: if the mask is not 2-D or not as long as past and new tokens together, or if several documents are
            packed in one row and there is a memory, which holds one.
    """
    past_key_values = one_memory(past_key_values, cache, is_asked_for=False)
    num_tokens = inputs_embeds.shape[1]
    num_seen = 0 if past_key_values is None else past_key_values.get_seq_length()
    check_mask(attention_mask, inputs_embeds, num_seen)
    if attention_mask is None and past_key_values is not None:
        past_mask = past_key_values.layers[0].past_mask()
        attention_mask = None if past_mask is None else F.pad(past_mask, (0, num_tokens), value=True)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device=inputs_embeds.device, dtype=torch.bool)
        if not is_torchdynamo_compiling() and attention_mask.all():
            attention_mask = None
    is_token = None if attention_mask is None else attention_mask[:, -num_tokens:]
    if is_token is not None and not is_torchdynamo_compiling() and is_token.all():
        is_token = None
    document = find_documents(inputs_embeds, attention_mask, past_key_values, **marks)
    memory_kwargs = {"slot_mask": None, "is_token": is_token, "document": document}

    # Two families of attention functions read a missing mask as causal; the others need it spelled out.
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if attention_mask is None and document is None and mask_function in (sdpa_mask, flash_attention_mask):
        is_first = isinstance(num_seen, int) and num_seen == 0
        by_shift_identity = is_first and num_tokens > 1
        reads_all_slots = not is_first and num_tokens == 1 and not past_key_values.is_compileable
        if by_shift_identity or reads_all_slots:
            return memory_kwargs

    num_slots = num_tokens if past_key_values is None else past_key_values.get_mask_sizes(num_tokens, 0)[0]
    if attention_mask is None:
        attention_mask = inputs_embeds.new_ones((inputs_embeds.shape[0], num_slots), dtype=torch.bool)
    rule = strict_rule(F.pad(attention_mask, (0, num_slots - attention_mask.shape[1])), document)
    memory_kwargs["slot_mask"] = create_causal_mask(
        config, inputs_embeds, None, past_key_values, and_mask_function=rule
    )
    if memory_kwargs["slot_mask"] is None:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} has no function that makes its masks. Register one "
            "under the same name with `AttentionMaskInterface.register`."
        )
    return memory_kwargs


def strict_rule(is_token_slot: torch.Tensor, document: torch.Tensor | None):
    """Which slots a token may read besides causality, as a mask function of transformers.

    Args:
        is_token_slot (`torch.Tensor` of shape `(B, S)`): False where the slot's token is padding or yet to come.
        document (`torch.Tensor` of shape `(B, S)`, *optional*): number of each token's text, if rows hold several.
    """
    count = is_token_slot.long().cumsum(-1)
    if document is not None:
        # Tokens of the own document only: less those that came before it, a number that stays until the next begins.
        begins = F.pad(document.diff(dim=-1), (1, 0)) > 0
        before = (count - is_token_slot.long())[:, None, :, None]
        count = count - hold_last(before, begins, torch.zeros_like(before[:, :, :1]))[:, 0, :, 0]

    def rule(batch_idx, head_idx, q_idx, kv_idx):
        """A slot is full if its token is real and not the first; who has nothing stored reads empty slot 0."""
        is_full = is_token_slot[batch_idx, kv_idx] & (count[batch_idx, kv_idx] > 1)
        if document is not None:
            is_full = is_full & (document[batch_idx, kv_idx] == document[batch_idx, q_idx])
        return is_full | ((kv_idx == 0) & (count[batch_idx, q_idx] <= 1))

    return rule


def find_documents(
    inputs_embeds, attention_mask, past_key_values, position_ids=None, seq_idx=None, cu_seq_lens_q=None, **kwargs
):
    """Number of the document that each new token belongs to, `(B, T)`; `None` if each row is one text.

    A document begins where `position_ids` `(B, T)` do not rise or `seq_idx` `(B, T)` changes, and at the offsets
    `cu_seq_lens_q` into the rows one after another. Positions mean nothing else to a memory.

    Raises:
        ValueError: if the marks have another form, or if a document begins behind a memory.
    """
    if position_ids is None and seq_idx is None and cu_seq_lens_q is None:
        return None
    (batch_size, num_tokens, _), device = inputs_embeds.shape, inputs_embeds.device
    begins = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
    is_token, has_past = ~begins, begins[:, :1]
    if attention_mask is not None:
        attention_mask = attention_mask.to(device, torch.bool)
        is_token, has_past = attention_mask[:, -num_tokens:], attention_mask[:, :-num_tokens].any(-1, keepdim=True)
    elif past_key_values is not None:
        has_past = has_past | (past_key_values.get_seq_length() > 0)
    if position_ids is not None:
        check_shape("position_ids", position_ids, batch_size, num_tokens)
        positions = position_ids.to(device).expand(batch_size, num_tokens)[:, None, :, None]
        before = torch.zeros_like(positions[:, :, :1])  # what a memory has read began with 0: 0 goes back
        held = positions if attention_mask is None else hold_last(positions, is_token, before)
        previous = torch.cat([before, held[:, :, :-1]], dim=2)
        begins = begins | (positions <= previous)[:, 0, :, 0]
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, batch_size, num_tokens)
        begins = begins | F.pad(seq_idx.to(device).diff(dim=-1) != 0, (1, 0))
    if cu_seq_lens_q is not None:
        check_offsets(cu_seq_lens_q, batch_size * num_tokens)
        offsets = torch.arange(batch_size * num_tokens, device=device).view(batch_size, num_tokens)
        begins = begins | torch.isin(offsets, cu_seq_lens_q.to(device))
    begins = begins & is_token & (has_past | (is_token.long().cumsum(-1) > 1))  # behind other tokens only
    if past_key_values is not None:
        refuse(
            begins,
            "A document begins behind the tokens in the memory, which holds one text. Read packed documents without "
            "`past_key_values`, or each in a row of its own, padded with attention_mask. A text that the memory holds "
            "already must not be passed again.",
        )
        return None
    # Compiled, the answer is not known yet: then every row is read as if it were packed.
    return begins.long().cumsum(-1) if is_torchdynamo_compiling() or begins.any() else None


def refuse(is_wrong: torch.Tensor, message: str, found: torch.Tensor | None = None) -> None:
    """Raises `ValueError` if anything is wrong, naming the first value `found` there.

    A compiled graph holds an assertion instead (`RuntimeError`), an exported program nothing.
    """
    if torch.compiler.is_exporting():
        return
    if is_torchdynamo_compiling():
        torch._assert_async(~is_wrong.any(), message)
    elif is_wrong.any():
        raise ValueError(message if found is None else f"{message} Found: {found[is_wrong][0].item()}.")


def check_maps(config, kwargs: dict) -> None:
    """Refuses attention maps of flex attention, whose second result is another thing. sdpa warns that it has none."""
    implementation = config._attn_implementation
    if kwargs.get("output_attentions") and implementation == "flex_attention":
        raise ValueError(
            f"attn_implementation={implementation!r} computes no attention maps. Load the model with "
            '`attn_implementation="eager"`, or call `model.set_attn_implementation("eager")`.'
        )


def check_shape(name: str, tensor: torch.Tensor, batch_size: int, num_tokens: int) -> None:
    """Refuses what is not one mark for each new token, of all rows or of each."""
    if tensor.ndim != 2 or tensor.shape[1] != num_tokens or tensor.shape[0] not in (1, batch_size):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: it must be (batch, tokens), here {(batch_size, num_tokens)}."
        )


def check_offsets(cu_seq_lens_q: torch.Tensor, num_tokens: int) -> None:
    """Refuses what is not where each document begins in rows one after another, with their end behind the last."""
    if cu_seq_lens_q.ndim != 1:
        raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seq_lens_q.shape)}: it must be (documents + 1,).")
    ends = cu_seq_lens_q[[0, -1]] != torch.tensor([0, num_tokens], device=cu_seq_lens_q.device)
    message = f"cu_seq_lens_q must rise from 0 to the number of all tokens, padding included, here {num_tokens}."
    refuse(ends, message, cu_seq_lens_q[[0, -1]])
    refuse(cu_seq_lens_q.diff() < 0, message, cu_seq_lens_q[1:])


def check_mask(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, num_seen) -> None:
    """Refuses a mask that would silently be read as another one."""
    if attention_mask is None:
        return
    batch_size, num_tokens, _ = inputs_embeds.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be (batch, tokens), here with "
            f"{batch_size} rows."
        )
    # How much a static memory holds is a tensor, which a compiled graph cannot compare with a shape.
    if not is_torchdynamo_compiling() or isinstance(num_seen, int):
        num_seen = int(num_seen)
        if attention_mask.shape[1] != num_seen + num_tokens:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but the memory holds {num_seen} and "
                f"{num_tokens} are new: it must cover all {num_seen + num_tokens}."
            )
    if attention_mask.dtype != torch.bool:
        refuse(
            (attention_mask != 0) & (attention_mask != 1),
            "attention_mask must hold 1 at tokens and 0 at padding, not what to add to scores and not numbers of "
            "documents (those are told by `position_ids`).",
            attention_mask,
        )


# trf-ignore: TRF057
class MemoryMosaicModel(MemoryMosaicPreTrainedModel):
    """The blocks without the head. Returns hidden states and, as `past_key_values`, the memory."""

    def __init__(self, config: MemoryMosaicConfig):
        config.validate_architecture()  # fields may have been assigned since the configuration was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MemoryMosaicDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.gradient_checkpointing = False
        self.post_init()

    # trf-ignore: TRF057
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        past_key_values = one_memory(past_key_values, cache)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids)
        self.check_request(inputs_embeds, past_key_values, kwargs)
        # What marks documents serves here alone: an attention function would take it for marks of its own slots.
        marks = {name: kwargs.pop(name, None) for name in PACKING_NAMES}
        marks["position_ids"] = position_ids

        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_memory_masks(self.config, inputs_embeds, attention_mask, past_key_values, **marks)
        # A memory holds one text: packed documents leave none.
        if use_cache and past_key_values is None and masks["document"] is None:
            past_key_values = DynamicCache(config=self.config)
        elif use_cache and past_key_values is None and is_torchdynamo_compiling():
            raise ValueError(
                "Compiled, the marks of documents cannot be asked whether there are several, which would leave no "
                "memory: pass `use_cache=False`, a memory of your own, or no position_ids."
            )
        if past_key_values is not None:
            note_writer(past_key_values.layers[0], self, inputs_embeds.shape[1])
            past_key_values.layers[0].note_text(input_ids, masks["is_token"])
        hidden_states = inputs_embeds
        if masks["is_token"] is not None:
            # Padding behind a text repeats its last token in all layers: there `generate` asks what comes next.
            hidden_states = hold_last(inputs_embeds[:, None], masks["is_token"], None)[:, 0]
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, **masks, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{MEMORY_NAME: past_key_values},
        )

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Embeddings `(B, T, C)` of token ids `(B, T)`; an id the model does not know is named."""
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            raise ValueError(
                f"input_ids range from {input_ids.min().item()} to {input_ids.max().item()}, but vocab_size is "
                f"{self.config.vocab_size}. Use this model's own tokenizer, or call `resize_token_embeddings`."
            ) from error

    def check_request(self, inputs_embeds: torch.Tensor, past_key_values: Cache | None, kwargs) -> None:
        """Refuses what would fail later or, worse, be answered as if it had been something else."""
        if torch.jit.is_tracing():
            raise ValueError(
                "`torch.jit.trace` would keep the padding of its example for ever: use `torch.export`, or "
                "`torch.onnx.export` with `dynamo=True`."
            )
        if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape[:2]:
            raise ValueError(
                f"The ids or embeddings to read have shape {tuple(inputs_embeds.shape[:-1])}: it must be "
                "(batch, tokens), with at least one of each."
            )
        for name in FOREIGN_PACKING_NAMES:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not known: tell where documents begin by position_ids that start again.")
        if kwargs.get("cu_seq_lens_k") is not None and kwargs.get("cu_seq_lens_q") is None:
            raise ValueError("cu_seq_lens_k is given without cu_seq_lens_q, which tells where documents begin.")
        check_maps(self.config, kwargs)
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal=False is not supported: a memory holds only what came before.")
        if past_key_values is None:
            return
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                "A memory cannot be read or written under gradient checkpointing, which reads everything twice: call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`, or pass `use_cache=False`."
            )
        if torch.compiler.is_exporting() and getattr(past_key_values, "is_compileable", False):
            raise ValueError(
                "`torch.export` of a static memory is not supported: its states would be constants of the program. "
                "Export with `use_cache=False`, or compile the model, which static memories are for."
            )
        layers = getattr(past_key_values, "layers", ())  # a tuple of tensors, as older code made them, has none
        # More layers than the model uses are in order: decoding with an early exit lowers num_hidden_layers.
        if len(layers) < self.config.num_hidden_layers or not all(hasattr(layer, "get_state") for layer in layers):
            raise ValueError(
                f"This {type(past_key_values).__name__} was not made for this Memory Mosaic. Build it from the "
                "model's config: `DynamicCache(config=model.config)`. (Prefix tuning of PEFT makes such a one: use "
                "prompt tuning or LoRA.)"
            )
        if layers[0].is_initialized and layers[0].keys.shape[0] != inputs_embeds.shape[0]:
            raise ValueError(
                f"The memory holds {layers[0].keys.shape[0]} rows, but {inputs_embeds.shape[0]} are passed: they must "
                "be as many. See `batch_repeat_interleave` and `batch_select_indices` of the cache."
            )
        is_autocast = torch.is_autocast_enabled(inputs_embeds.device.type)
        dtype = torch.float32 if is_autocast else inputs_embeds.dtype
        if layers[0].is_initialized and layers[0].keys.dtype != dtype:
            layers[0].refuse_precision(dtype)
        num_seen, most = layers[0].get_seq_length(), getattr(layers[0], "max_cache_len", None)
        # Compiled, a static memory's length is not known before it runs.
        if most is not None and not is_torchdynamo_compiling() and int(num_seen) + inputs_embeds.shape[1] > most:
            raise ValueError(
                f"A static memory of max_cache_len={most} holds {int(num_seen)} tokens already, so that "
                f"{inputs_embeds.shape[1]} more do not fit: make it longer, or use one that grows, "
                "`DynamicCache(config=model.config)`."
            )


# What to do where `generate` cannot tell whether ids are new.
SAY_THAT_IDS_ARE_NEW = """To read all of them behind the memory, pass a mask over both:
    mask = torch.ones(ids.shape[0], memory.get_seq_length() + ids.shape[1], dtype=torch.long)
    model.generate(ids, attention_mask=mask, past_key_values=memory)"""


def generation_settings(model: GenerationMixin, config: GenerationConfig | None, kwargs: dict) -> dict:
    """What `generate` will take of some settings: its arguments first, then its configuration, then the model's."""
    names = ("num_beams", "num_return_sequences", "pad_token_id", "eos_token_id")
    found = {}
    for name in names:
        values = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        found[name] = next((value for value in values if value is not None), None)
    return found


@contextlib.contextmanager
def repeated_rows(memory: Cache | None, settings: dict):
    """A memory with as many rows for each text as `generate` makes of it: beams, or sequences to return.

    The rows stay, one for each returned sequence or beam; if nothing was read, because a call failed, they go again.
    """
    times = max(settings["num_beams"] or 1, settings["num_return_sequences"] or 1)
    num_read = int(memory.get_seq_length()) if hasattr(memory, "get_seq_length") else 0
    if times == 1 or num_read == 0:
        yield
        return
    read = memory if hasattr(memory, "past_ids") else memory.layers[0]
    num_rows = read.num_rows()
    memory.batch_repeat_interleave(times)
    try:
        yield
    except Exception:
        if int(memory.get_seq_length()) == num_read:
            memory.batch_select_indices(torch.arange(0, num_rows * times, times))
        raise


def continue_from(inputs: torch.Tensor | None, settings: dict, kwargs: dict) -> dict:
    """Arguments of `generate` by which it reads all new ids, and only those, behind a memory that holds some.

    The library takes ids behind a memory for the whole text, the memory's own included, unless the mask covers more
    than the ids. New ids alone would lose as many as the memory holds. Here ids are the whole text if they begin with
    those that the memory has read, and new otherwise; the mask is made to say so. A memory that `generate` returned
    has not read the last token of its text: new ids begin with it.

    Returns:
        `dict`: `kwargs`, with an `attention_mask` `(B, past + new)` if there is such a memory.

    Raises:
        ValueError: if ids and memory are of different numbers of rows, if there are no new ids, if the mask is none
            of ids or of all, or if ids might be new or the whole text.
    """
    memory = one_memory(kwargs.get("past_key_values"), kwargs.get("cache"), is_asked_for=False)
    if MEMORY_NAME == "past_key_values" and kwargs.pop("cache", None) is not None:
        kwargs["past_key_values"] = memory  # `generate` before transformers 5.24 does not know the other name
    read = memory if hasattr(memory, "past_ids") else next(iter(getattr(memory, "layers", ())), None)
    num_read = int(read.get_seq_length()) if hasattr(read, "past_ids") else 0
    if num_read == 0:
        return kwargs
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    check_new_ids(ids, kwargs.get("inputs_embeds"), read.num_rows())
    mask = kwargs.get("attention_mask")
    if mask is None or mask.shape[-1] != num_read + ids.shape[1]:
        kwargs = kwargs | {"attention_mask": whole_mask(read, ids, mask, settings)}
    is_new = kwargs["attention_mask"][:, num_read:].any(-1)
    if not is_new.all():
        raise ValueError(
            f"Row {(~is_new).nonzero()[0].item()} has no new id behind the memory, so nothing is to be continued: "
            "add one, or choose the other rows by `memory.batch_select_indices(rows)`."
        )
    return kwargs


def whole_mask(read, ids: torch.Tensor, mask: torch.Tensor | None, settings: dict) -> torch.Tensor:
    """The mask `(B, past + new)` of ids behind a memory, of which `read` tells what it has read."""
    num_read = int(read.get_seq_length())
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: it must be that of the ids, {tuple(ids.shape)}, or also "
            f"cover the {num_read} tokens of the memory."
        )
    past_mask = read.past_mask()
    if past_mask is None:
        past_mask = torch.ones(ids.shape[0], num_read, dtype=torch.bool, device=ids.device)
    new_mask = mask_by_ids(ids, settings) if mask is None else mask
    if begins_with(ids, new_mask, read.past_ids(), past_mask.to(ids.device)):
        new_mask = new_mask[:, num_read:]
    return torch.cat([past_mask.to(ids.device, torch.long), new_mask.to(ids.device, torch.long)], dim=1)


def check_new_ids(ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, num_rows: int) -> None:
    """Refuses what is no text that could be read behind a memory of so many rows."""
    if inputs_embeds is not None:
        raise ValueError(
            "Embeddings behind a memory would be taken for the whole text, the memory's own included. Read them by "
            "`model(inputs_embeds=..., past_key_values=memory)`, then generate from the next ids."
        )
    if ids is None or ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError("Behind a memory, `generate` needs at least one new id in each row, `(batch, tokens)`.")
    if num_rows != ids.shape[0]:
        raise ValueError(
            f"The memory holds {num_rows} rows, but {ids.shape[0]} are passed: they must be as many. Copy rows by "
            "`memory.batch_repeat_interleave(times)`, choose some by `memory.batch_select_indices(rows)`."
        )


def begins_with(ids, mask, past_ids: torch.Tensor | None, past_mask: torch.Tensor) -> bool:
    """Whether ids with their mask `(B, T)` are whole texts, which begin with what a memory has read and go on.

    Raises:
        ValueError: if the memory's ids are not known, if texts end where the memory does, or if some rows begin with
            the memory's text and others do not, or with other padding.
    """
    num_read, num_ids = past_mask.shape[1], ids.shape[1]
    if past_ids is None:
        raise ValueError(
            f"The memory of {num_read} tokens does not know their ids: these {num_ids} may be new, or the whole text. "
            f"{SAY_THAT_IDS_ARE_NEW}"
        )
    past_ids = past_ids.to(ids.device)
    texts = [row[is_token.bool()] for row, is_token in zip(ids, mask.to(ids.device), strict=True)]
    pasts = [row[is_token] for row, is_token in zip(past_ids, past_mask, strict=True)]
    begins = [len(past) > 0 and torch.equal(text[: len(past)], past) for text, past in zip(texts, pasts, strict=True)]
    if not any(begins):
        return False
    is_aligned = num_ids >= num_read and torch.equal(mask[:, :num_read].to(ids.device).bool(), past_mask)
    if not is_aligned or bool(((ids[:, :num_read] != past_ids) & past_mask).any()):
        raise ValueError(
            "Some rows begin with the text that the memory has read, but not all, or not with the memory's padding: "
            f"pass the new ids alone, or all texts padded as they were. {SAY_THAT_IDS_ARE_NEW}"
        )
    if num_ids == num_read:
        raise ValueError(
            f"These {num_read} ids are those that the memory has read, and no new one is among them: add the next "
            f"ids. {SAY_THAT_IDS_ARE_NEW}"
        )
    return True


def check_assisted(read, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Refuses to decode with an assistant what the library would read wrongly behind a memory, of layer `read`."""
    num_read, past_ids = int(read.get_seq_length()), read.past_ids()
    if num_read == 0:
        return
    if attention_mask is not None:
        raise ValueError(
            "Assisted and prompt-lookup decoding behind a memory takes no padding: leave the assistant out."
        )
    if past_ids is not None and torch.equal(input_ids[:, :num_read].to(past_ids.device), past_ids):
        raise ValueError(
            "In assisted and prompt-lookup decoding a text that the memory holds already must not be passed again: "
            "pass the new ids alone."
        )


def mask_by_ids(ids: torch.Tensor, settings: dict) -> torch.Tensor:
    """The mask `(B, T)` that the library gives ids that come without: 0 at `pad_token_id`, if that ends no text."""
    pad, ends = settings["pad_token_id"], settings["eos_token_id"]
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


# trf-ignore: TRF057
class MemoryMosaicForCausalLM(MemoryMosaicPreTrainedModel, GenerationMixin):
    """A Memory Mosaic that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MemoryMosaicConfig):
        super().__init__(config)
        self.model = MemoryMosaicModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    create_masks_for_generate = staticmethod(create_memory_masks)

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """As the library's; behind a memory, ids may be the new text alone or all of it, see [`continue_from`]."""
        settings = generation_settings(self, generation_config, kwargs)
        kwargs = continue_from(inputs, settings, kwargs)
        memory = one_memory(kwargs.get("past_key_values"), kwargs.get("cache"), is_asked_for=False)
        with repeated_rows(memory, settings):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """None: to a memory, positions tell documents apart, and the library's do not rise behind padding."""

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        """As the library's, which would read a memory's own text again, and leave the memory recording its past.

        Raises:
            ValueError: if `input_ids` begin with the text that a memory holds, or if there is padding behind a memory.
        """
        memory = kwargs.get(MEMORY_NAME)
        if memory is None:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        check_assisted(memory.layers[0], input_ids, kwargs.get("attention_mask"))
        not_recording = [layer for layer in memory.layers if not layer.record_past]
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            for layer in not_recording:
                layer.deactivate_past_recording()

    # `generate` takes `inputs_embeds` only if this signature names them.
    def prepare_inputs_for_generation(
        self, input_ids, *args, inputs_embeds=None, is_first_iteration: bool = False, **kwargs
    ):
        """As the library's, and as soft prompts of PEFT need it."""
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return prepare_for_adapters(self, inputs, MEMORY_NAME, is_first_iteration)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: for `generate_batch`, paged caches and continuous batching of servers."""
        raise ValueError(
            "Continuous batching is not supported: its paged cache holds keys and values, but no leaky sums and no "
            "value that waits for its next token. Use `generate` with a left-padded batch."
        )

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): a document begins where they do not rise;
                they mean nothing else. `seq_idx` `(B, T)` and `cu_seq_lens_q` tell the same, by their own conventions.
            past_key_values ([`~transformers.Cache`], *optional*): memory of what was read before; changed in place.
                `cache` is another name for it.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): not shifted; -100 is ignored, and belongs at the
                first token of each packed document.
            logits_to_keep (`int` or `torch.Tensor`): compute logits of the last so many tokens (0: all), or of those
                indexed.

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        >>> model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        >>> ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
        >>> tokenizer.decode(ids[0])
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{MEMORY_NAME: one_memory(past_key_values, cache)},
            **kwargs,
        )
        if not isinstance(logits_to_keep, torch.Tensor):
            if logits_to_keep < 0:
                raise ValueError(f"logits_to_keep={logits_to_keep} must not be negative.")
            kept = slice(-logits_to_keep, None)
        elif logits_to_keep.ndim == 1:
            kept = logits_to_keep
        else:
            raise ValueError(f"logits_to_keep has shape {tuple(logits_to_keep.shape)}: it must be (tokens,).")
        # Scaling the hidden states costs C operations a token, scaling the logits vocab_size.
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :] / self.config.logits_scaling)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{MEMORY_NAME: getattr(outputs, MEMORY_NAME)},
        )


# trf-ignore: TRF057
class MemoryMosaicForSequenceClassification(MemoryMosaicPreTrainedModel):
    """A Memory Mosaic that judges a text by its hidden state at the last token."""

    def __init__(self, config: MemoryMosaicConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MemoryMosaicModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens. Without
                it, ids equal to `pad_token_id` are taken for padding, unless that is an `eos_token_id` too.
            labels (*optional*): `(B,)` class numbers, `(B, num_labels)` floats for several labels at once, or `(B,)`
                floats with one label (regression); see `config.problem_type`.

        Returns:
            `SequenceClassifierOutputWithPast`: logits `(B, num_labels)`.

        Raises:
            ValueError: if there are several rows and nothing tells tokens from padding, if a row has no token, or if
                it holds several documents.
        """
        past_key_values = one_memory(past_key_values, cache)
        if attention_mask is None and past_key_values is None and input_ids is not None and self.can_tell_padding():
            attention_mask = input_ids != self.config.pad_token_id
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{MEMORY_NAME: past_key_values},
            **kwargs,
        )
        marks = {"position_ids": position_ids, **kwargs}
        if (
            not is_torchdynamo_compiling()
            and find_documents(outputs.last_hidden_state, attention_mask, past_key_values, **marks) is not None
        ):
            raise ValueError("Several documents are packed in one row, which has one verdict: give each its own row.")
        logits = self.score(self.last_token(outputs.last_hidden_state, attention_mask))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            # The library's loss of classes counts a part of a batch by its share of the labels, its other two do not.
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * (labels != -100).sum() / num_items
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{MEMORY_NAME: getattr(outputs, MEMORY_NAME)},
        )

    def can_tell_padding(self) -> bool:
        """Whether `pad_token_id` stands for nothing else: an end of text within a text is none of its padding."""
        ends = self.config.eos_token_id if isinstance(self.config.eos_token_id, list) else [self.config.eos_token_id]
        return self.config.pad_token_id is not None and self.config.pad_token_id not in ends

    def last_token(self, hidden_states, attention_mask) -> torch.Tensor:
        """Of hidden states `(B, T, C)`, each row's at its last token, `(B, C)`."""
        batch_size, num_tokens, _ = hidden_states.shape
        if attention_mask is None:
            if batch_size > 1:
                raise ValueError(
                    f"{batch_size} rows, but nothing tells tokens from padding: pass attention_mask. (Of ids alone, a "
                    "pad_token_id that is not an eos_token_id tells it too.)"
                )
            return hidden_states[:, -1]
        is_token = attention_mask[:, -num_tokens:].to(hidden_states.device, torch.bool)
        refuse(~is_token.any(-1), "attention_mask leaves no token to judge a row by.")
        last = (torch.arange(num_tokens, device=hidden_states.device) * is_token).argmax(dim=-1)
        return hidden_states[torch.arange(batch_size, device=hidden_states.device), last]


__all__ = [
    "MemoryMosaicForCausalLM",
    "MemoryMosaicForSequenceClassification",
    "MemoryMosaicModel",
    "MemoryMosaicPreTrainedModel",
]

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
"""What one forward pass of Memory Mosaics v2 reads: windows, delays, padding and packed documents, for all layers.

All of it is counted in tokens: a window has so many tokens of a text, however much padding stands among them. So every
slot has the number of its token, every token the numbers that it sees ([`NumberRule`]), and masks are made of these
only where an attention function needs them.

Shapes use B batch, T new tokens, W short-term pairs that a token sees at most, S slots of the long-term memory, and P
slots of short-term pairs before the new tokens: W behind a memory, otherwise 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import is_torchdynamo_compiling

from .blocks_memory_mosaic import NumberRule, can_read_directly
from .cache_memory_mosaic import memory_layer, one_memory
from .masking_memory_mosaic import check_sees_all, count_behind, count_tokens, find_documents, find_padding


@dataclass(frozen=True, eq=False)
class Reading:
    """What the layers need to know of a forward pass.

    - `is_token`, `document_ids` `(B, T)`, *optional*: False at padding; number of each token's document,
    - `past_mask` `(B, past)`, *optional*: where the memory has tokens, if it has padding,
    - `num_window`: P,
    - `delay`: the token's own number less that of the newest long-term pair that it sees,
    - `short_pairs`, `long_pairs` `(B or 1, T)`: n of the bandwidths,
    - `short_rule` over P + T slots, `long_rule` over S slots; `None`: the pairs that a token sees need no rule, as
      nothing is padded and either nothing came before or T is 1,
    - `num_slots`: S,
    - `slot_bias` `(B, 1, T)`, *optional*: of the new long-term slots behind joined texts, of which `num_joined` slots
      are,
    - `reads_directly`: whether one token is read without sdpa,
    - `has_maps`: whether eager attention gives its maps, which a bounded memory has not,
    - `is_stretch`: whether other processes read what came before, of which P slots are passed on.
    """

    is_token: torch.Tensor | None
    document_ids: torch.Tensor | None
    past_mask: torch.Tensor | None
    num_window: int
    delay: int | torch.Tensor
    short_pairs: torch.Tensor
    long_pairs: torch.Tensor
    short_rule: NumberRule | None
    long_rule: NumberRule | None
    num_slots: int
    slot_bias: torch.Tensor | None = None
    num_joined: int = 0
    reads_directly: bool = False
    has_maps: bool = False
    is_stretch: bool = False

    def contiguous(self) -> "Reading":
        """Return the reading itself: `generate` of transformers before 5.23 asks each of a model's masks for this."""
        return self


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of tokens in rows, from 1 on; padding has the number of the token before it.

    - `own` `(B or 1, T)`: of the new tokens, `of_slots` `(B or 1, S)`: of all slots, joined texts' 0,
    - `in_document` `(B or 1, T)`: of the new tokens within their documents,
    - `is_full` `(B or 1, S)`: False at slots without a pair,
    - `num_before` `(B or 1, 1)`: how many tokens came before the new ones.
    """

    own: torch.Tensor
    of_slots: torch.Tensor
    in_document: torch.Tensor
    is_full: torch.Tensor
    num_before: torch.Tensor


def count(
    attention_mask: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
    num_tokens: int,
    num_slots: int,
    device: torch.device,
) -> Counts:
    """Return the numbers of tokens of one pass.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): False at padding.
        document_ids (`torch.Tensor` of shape `(B, T)`, *optional*): if rows hold several documents.
    """
    if attention_mask is None and document_ids is None:
        of_slots = torch.arange(1, num_slots + 1, device=device)[None]
        own = past_length + torch.arange(1, num_tokens + 1, device=device)[None]
        return Counts(own, of_slots, own, of_slots >= 2, own[:, :1] - 1)
    if attention_mask is None:
        attention_mask = torch.ones_like(document_ids, dtype=torch.bool)
    is_token = F.pad(attention_mask, (0, num_slots - attention_mask.shape[1]))
    of_slots = is_token.long().cumsum(-1)
    numbers = attention_mask.long().cumsum(-1)
    in_document = count_tokens(attention_mask, document_ids)
    is_full = F.pad(attention_mask & (in_document > 1), (0, num_slots - attention_mask.shape[1]))
    own = numbers[:, -num_tokens:]
    num_before = own[:, :1] - attention_mask[:, -num_tokens, None].long()
    return Counts(own, of_slots, in_document[:, -num_tokens:], is_full, num_before)


def short_term_rule(
    counts: Counts, is_token: torch.Tensor | None, size: int, num_window: int, is_packed: bool
) -> NumberRule:
    """Return which of P + T slots each token sees: the pairs of the last W slots of tokens up to it.

    Args:
        is_token (`torch.Tensor` of shape `(B, T)`, *optional*): False at padding.
        size (`int`): W.
        num_window (`int`): P.
    """
    own = counts.own
    before = counts.num_before - num_window + torch.arange(1, num_window + 1, device=own.device)
    numbers = torch.cat([before.expand(own.shape[0], -1), own], dim=1)
    is_full = counts.in_document > 1
    if is_token is not None:
        is_full = is_full & is_token
    is_full = torch.cat([(before > 1).expand(is_full.shape[0], -1), is_full], dim=1)
    first = own - size + 1
    if is_packed:
        first = torch.maximum(first, own - counts.in_document + 1)
    return NumberRule(numbers, first, own, is_full)


def long_term_rule(
    counts: Counts,
    delay: int | torch.Tensor,
    is_packed: bool,
    has_joined: bool,
    sees_all: torch.Tensor | None = None,
) -> NumberRule:
    """Return which of S slots each token sees: the pairs of its document up to `delay` tokens before it.

    A token that sees all also sees the pairs of all documents before its own, without a delay, as those of joined
    texts.
    """
    last = counts.own - delay + 1
    if has_joined:
        return NumberRule(counts.of_slots, torch.zeros_like(last), last.clamp(min=0), counts.is_full)
    first = counts.own - counts.in_document + 1 if is_packed else torch.ones_like(counts.own)
    if sees_all is not None:
        last = torch.where(sees_all, torch.maximum(last, first - 1), last)
        first = first.masked_fill(sees_all, 1)
    return NumberRule(counts.of_slots, first.expand_as(last), last, counts.is_full)


def draw_delay(config: Any, embeds: torch.Tensor) -> int | torch.Tensor:
    """Draw m of a training step on embeddings `(B, T, C)`: one number, or one for each row `(B, 1)`."""
    # Tensors without numbers, by which costs are counted, draw none.
    if config.long_term_delay_range is None or hasattr(embeds, "fake_mode"):
        return int(config.long_term_delay)
    low, high = config.long_term_delay_range
    if config.long_term_delay_draw == "sequence":
        return torch.randint(low, high + 1, (embeds.shape[0], 1), device=embeds.device)
    drawn = torch.randint(low, high + 1, (1, 1), device="cpu")
    # A number would compile a graph of its own for each m.
    return drawn.to(embeds.device) if is_torchdynamo_compiling() else int(drawn)


def count_text(
    layer: Any, attention_mask: torch.Tensor | None, past_length: Any, num_tokens: int, num_slots: int, counts: Counts
) -> Counts:
    """Return the counts of a text behind joined ones, whose slots all tokens see.

    Args:
        layer: the first of the memory.
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): False at padding.
        counts: as if all were one text.
    """
    num_joined, device = layer.num_joined, counts.own.device
    own = count_behind(layer, attention_mask, past_length, num_tokens, device)
    is_token = torch.ones_like(counts.of_slots, dtype=torch.bool)
    if attention_mask is not None:
        is_token = F.pad(attention_mask, (0, num_slots - attention_mask.shape[1]))
    of_slots = F.pad(is_token[:, num_joined:].long().cumsum(-1), (num_joined, 0))
    is_full = (torch.arange(num_slots, device=device) < num_joined) | (is_token & (of_slots >= 2))
    is_new = torch.ones_like(own[:, :1]) if attention_mask is None else attention_mask[:, -num_tokens, None].long()
    return Counts(own, of_slots, own, is_full, own[:, :1] - is_new)


def bias_of_slots(own: torch.Tensor, is_token: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    """Return the bias `(B, 1, T)` of the slots of new tokens behind joined texts: the first completes no pair."""
    is_full = own > 1 if is_token is None else is_token & (own > 1)
    bias = torch.zeros(is_full.shape, device=own.device).masked_fill(~is_full, -torch.inf)
    return bias.expand(batch_size, -1)[:, None]


def count_pairs_seen(
    config: Any,
    counts: Counts,
    delay: int | torch.Tensor,
    joined: torch.Tensor | int,
    sees_all: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n of the bandwidths of short-term and of long-term heads, `(B or 1, T)` each.

    Args:
        joined: number of pairs of joined texts.
        sees_all (`torch.Tensor` of shape `(B, T)`, *optional*): True at tokens that see all documents before theirs.
    """
    total = (counts.in_document - 1).clamp(min=0)
    if sees_all is not None:
        joined = (counts.is_full.long().cumsum(-1) - total).masked_fill(~sees_all, 0)
    if config.bandwidth_count == "total":
        return total, joined + total
    return total.clamp(max=config.num_short_term_pairs), joined + (counts.in_document - delay).clamp(min=0)


def rules_of(config: Any, reading: Reading, num_tokens: int, device: torch.device) -> tuple[NumberRule, NumberRule]:
    """Return the rules of short-term and long-term heads in a pass that no text came before, joined ones apart."""
    counts = count(None, None, 0, num_tokens, num_tokens, device)
    short, long = reading.short_rule, reading.long_rule
    if short is None:
        short = short_term_rule(counts, None, config.num_short_term_pairs, 0, False)
    return short, long_term_rule(counts, reading.delay, False, False) if long is None else long


def create_reading(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    cache: Cache | None = None,
    is_compiled: bool = False,
    delay: int | torch.Tensor | None = None,
    sees_all: torch.Tensor | None = None,
    **packing: Any,
) -> dict[str, Any]:
    """Return what all layers of one forward pass need to know about padding, documents and the past.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, on either side or within.
        is_compiled (`bool`): whether compiled code is to read, which compiles again for each length of `past_mask`.
        delay (`int` or `torch.Tensor` of shape `(B, 1)`, *optional*): m; that of inference when absent.
        sees_all (`torch.Tensor` of shape `(B, T)`, *optional*): True at tokens whose long-term heads see the pairs of
            all documents before them in the row, as those of joined texts.
        packing: `position_ids`, `seq_idx` and `cu_seq_lens_q`, see [`find_documents`].

    Returns:
        `dict`: `is_token`, `document_ids` and the [`Reading`].

    Raises:
        ValueError: if the mask is not 2-D or not as long as past and new tokens together, or if several documents are
            packed in one row and there is a memory, which holds one.
    """
    settings: Any = config
    past_key_values = one_memory(past_key_values, cache, warn=False)
    attention_mask, is_token = find_padding(inputs_embeds, attention_mask, past_key_values)
    document_ids = find_documents(inputs_embeds, attention_mask, past_key_values, **packing)
    sees_all = check_sees_all(sees_all, inputs_embeds, document_ids, past_key_values)
    (batch_size, num_tokens, _), device = inputs_embeds.shape, inputs_embeds.device
    layer: Any = None if past_key_values is None else memory_layer(past_key_values)
    past_length: Any = 0 if past_key_values is None else past_key_values.get_seq_length()
    past_length = past_length.to(device) if isinstance(past_length, torch.Tensor) else past_length
    num_slots = num_tokens if past_key_values is None else past_key_values.get_mask_sizes(num_tokens, 0)[0]
    delay = int(settings.long_term_delay) if delay is None else delay

    counts = count(attention_mask, document_ids, past_length, num_tokens, num_slots, device)
    is_joined, slot_bias, num_joined, joined_pairs = layer is not None and layer.has_biases, None, 0, 0
    is_bounded = hasattr(layer, "read")  # it knows by itself how many long-term pairs it holds, and which are seen
    if is_joined:
        num_joined, joined_pairs = layer.num_joined, 0 if is_bounded else layer.num_pairs()
        counts = count_text(layer, attention_mask, past_length, num_tokens, num_slots, counts)
        slot_bias = bias_of_slots(counts.own, is_token, batch_size)
    short_pairs, long_pairs = count_pairs_seen(settings, counts, delay, joined_pairs, sees_all)
    size, is_packed = settings.num_short_term_pairs, document_ids is not None
    is_first = isinstance(past_length, int) and past_length == num_joined
    past_mask = None
    if attention_mask is not None and not is_compiled:
        past_mask = attention_mask[:, num_joined : attention_mask.shape[1] - num_tokens]

    needs = needs_rules(settings, num_tokens, past_length, delay, past_key_values)
    if attention_mask is not None or is_packed or is_joined:
        needs = True, not is_bounded
    num_window = 0 if is_first else size
    reading = Reading(
        is_token=is_token,
        document_ids=document_ids,
        past_mask=past_mask,
        num_window=num_window,
        delay=delay,
        short_pairs=short_pairs,
        long_pairs=long_pairs,
        short_rule=short_term_rule(counts, is_token, size, num_window, is_packed) if needs[0] else None,
        long_rule=long_term_rule(counts, delay, is_packed, is_joined, sees_all) if needs[1] else None,
        num_slots=num_slots,
        slot_bias=slot_bias,
        num_joined=num_joined,
        reads_directly=num_tokens == 1 and can_read_directly(inputs_embeds, config),
        has_maps=config._attn_implementation == "eager" and not is_bounded,
    )
    return {"is_token": is_token, "document_ids": document_ids, "reading": reading}


def needs_rules(
    config: Any, num_tokens: int, past_length: Any, delay: int | torch.Tensor, past_key_values: Cache | None
) -> tuple[bool, bool]:
    """Return whether short-term and long-term heads need a rule of what a token sees, of rows without padding.

    They do not where all pairs of a memory are seen by one token, or all up to a fixed delay by causality.
    """
    is_static = past_key_values is not None and past_key_values.is_compileable
    if is_static or not isinstance(past_length, int) or not isinstance(delay, int):
        return True, True
    # Maps of eager attention are of all slots, and an exported program serves texts of any length.
    if config._attn_implementation == "eager" or torch.compiler.is_exporting():
        return True, True
    if past_length == 0:
        return not 1 < num_tokens <= config.short_term_window, num_tokens <= delay
    return num_tokens > 1, num_tokens > 1 or past_length + 1 <= delay


__all__ = ["Reading", "create_reading"]

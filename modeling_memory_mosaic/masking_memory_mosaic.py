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
"""Masks of Memory Mosaics: padding, packed documents and the strict rule, with the checks of what describes them.

The number of pairs that each token sees follows from the same descriptions, so that the growth of kernels with it is
computed here too, once for all layers.

Shapes use B batch, T new tokens, S slots of the memory (one for each token of past and present).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    flash_attention_mask,
    sdpa_mask,
)
from transformers.utils import is_torchdynamo_compiling

from .blocks_memory_mosaic import SlotRule, can_read_directly, can_read_in_blocks, has_plain_sdpa
from .cache_memory_mosaic import memory_layer, one_memory
from .ops_memory_mosaic import MAX_LOG_KEY_SCALE, forward_fill


# What `DataCollatorWithFlattening` sends along with `position_ids`.
PACKING_NAMES = ("sees_all", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What other libraries call them: without a check they would be passed over.
FOREIGN_PACKING_NAMES = ("document_ids", "segment_ids", "sequence_ids", "cu_seqlens", "cu_seqlens_q")
# All arguments that mark where each document of a packed batch begins.
DOCUMENT_MARKS = ("position_ids", *PACKING_NAMES, *FOREIGN_PACKING_NAMES)


def raise_where(is_wrong: torch.Tensor, message: str, values: torch.Tensor | None = None) -> None:
    """Raise `ValueError` if anything is wrong, naming the first of `values` where it is.

    A compiled graph holds an assertion instead (`RuntimeError`), an exported program nothing.
    """
    # Not `transformers.utils.torch_compilable_check`: it names no value, loses its message in a compiled graph, leaves
    # an assertion in an exported program, and an environment variable switches it off.
    if torch.compiler.is_exporting():
        return
    if is_torchdynamo_compiling():
        torch._assert_async(~is_wrong.any(), message)
    elif is_wrong.any():
        raise ValueError(message if values is None else f"{message} Found: {values[is_wrong][0].item()}.")


def check_maps(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` if flex attention is asked for attention maps: its second result is something else.

    sdpa has no maps either, and warns by itself.
    """
    if kwargs.get("output_attentions") and config._attn_implementation == "flex_attention":
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} computes no attention maps. Load the model with "
            '`attn_implementation="eager"`, or call `model.set_attn_implementation("eager")`.'
        )


def check_mask(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_length: int | torch.Tensor
) -> None:
    """Raise `ValueError` for a mask that would silently be read as another one.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens.
        inputs_embeds (`torch.Tensor` of shape `(B, T, C)`).
        past_length: number of tokens in the memory; a tensor if the memory is static.
    """
    if attention_mask is None:
        return
    batch_size, num_tokens, _ = inputs_embeds.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be (batch, tokens), here with "
            f"{batch_size} rows."
        )
    # The length of a static memory is a tensor, which a compiled graph cannot compare with a shape.
    if not is_torchdynamo_compiling() or isinstance(past_length, int):
        past_length = int(past_length)
        if attention_mask.shape[1] != past_length + num_tokens:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but the memory holds {past_length} and "
                f"{num_tokens} are new: it must cover all {past_length + num_tokens}."
            )
    if attention_mask.dtype != torch.bool:
        raise_where(
            (attention_mask != 0) & (attention_mask != 1),
            "attention_mask must hold 1 at tokens and 0 at padding, not what to add to scores and not numbers of "
            "documents (pass `position_ids` for those).",
            attention_mask,
        )


def check_packing_names(kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for descriptions of packed documents under names that would be passed over."""
    for name in FOREIGN_PACKING_NAMES:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not known: show where documents begin by position_ids that start again.")
    if kwargs.get("cu_seq_lens_k") is not None and kwargs.get("cu_seq_lens_q") is None:
        raise ValueError("cu_seq_lens_k is given without cu_seq_lens_q, which says where documents begin.")


def check_inputs(config: PreTrainedConfig, inputs_embeds: torch.Tensor, kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for arguments of a model's forward that would fail later or be misread."""
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
    check_packing_names(kwargs)
    check_maps(config, kwargs)
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal=False is not supported: a memory holds only what came before.")


def pop_packing(kwargs: dict[str, Any], position_ids: torch.Tensor | None) -> dict[str, Any]:
    """Take all that describes packed documents out of the arguments of a forward, with `position_ids`.

    The layers must not get it: an attention function would take it for documents of its own slots.
    """
    packing = {name: kwargs.pop(name, None) for name in (*PACKING_NAMES, *FOREIGN_PACKING_NAMES)}
    return packing | {"position_ids": position_ids}


def check_shape(name: str, tensor: torch.Tensor, batch_size: int, num_tokens: int) -> None:
    """Raise `ValueError` unless there is one number for each new token, of all rows together or of each row."""
    if tensor.ndim != 2 or tensor.shape[1] != num_tokens or tensor.shape[0] not in (1, batch_size):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: it must be (batch, tokens), here {(batch_size, num_tokens)}."
        )


def check_offsets(cu_seq_lens_q: torch.Tensor, num_tokens: int) -> None:
    """Raise `ValueError` unless offsets rise from 0 to `num_tokens`, the number of tokens of all rows together."""
    if cu_seq_lens_q.ndim != 1:
        raise ValueError(f"cu_seq_lens_q has shape {tuple(cu_seq_lens_q.shape)}: it must be (documents + 1,).")
    is_wrong_end = cu_seq_lens_q[[0, -1]] != torch.tensor([0, num_tokens], device=cu_seq_lens_q.device)
    message = f"cu_seq_lens_q must rise from 0 to the number of all tokens, padding included, here {num_tokens}."
    raise_where(is_wrong_end, message, cu_seq_lens_q[[0, -1]])
    raise_where(cu_seq_lens_q.diff() < 0, message, cu_seq_lens_q[1:])


def find_documents(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the number of the document that each new token belongs to, `(B, T)`; `None` if each row is one document.

    A document begins where `position_ids` `(B, T)` do not rise or `seq_idx` `(B, T)` changes, and at the offsets
    `cu_seq_lens_q` into the rows one after another. Positions mean nothing else to a memory.

    Raises:
        ValueError: if one of these has another form, or if a document begins behind a memory.
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
        before = torch.zeros_like(positions[:, :, :1])  # the text in a memory began with 0, so 0 does not rise
        filled = positions if attention_mask is None else forward_fill(positions, is_token, before)
        previous = torch.cat([before, filled[:, :, :-1]], dim=2)
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
        raise_where(
            begins,
            "A document begins behind the tokens in the memory, which holds one text. Read packed documents without "
            "`past_key_values`, or each in a row of its own, padded with attention_mask. A text that the memory holds "
            "already must not be passed again.",
        )
        return None
    # Compiled, the answer is not known yet: then every row is read as if it were packed.
    return begins.long().cumsum(-1) if is_torchdynamo_compiling() or begins.any() else None


def check_sees_all(
    sees_all: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    document_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> torch.Tensor | None:
    """Return `sees_all` as booleans; `None` if rows hold one document each, which sees itself.

    Raises:
        ValueError: if it has another shape than `(B, T)`, or if there is a memory.
    """
    if sees_all is None:
        return None
    check_shape("sees_all", sees_all, *inputs_embeds.shape[:2])
    if past_key_values is not None:
        raise ValueError("sees_all is for packed documents without a memory: tokens see all that a memory holds.")
    return None if document_ids is None else sees_all.to(inputs_embeds.device, torch.bool)


def count_tokens(is_token_slot: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the number of tokens `(B, S)` of the same document so far, each slot's own included.

    Args:
        is_token_slot (`torch.Tensor` of shape `(B, S)`): False where the slot's token is padding or yet to come.
        document_ids (`torch.Tensor` of shape `(B, S)`, *optional*): number of each token's document, if rows hold
            several.
    """
    count = is_token_slot.long().cumsum(-1)
    if document_ids is None:
        return count
    # Less the tokens before the document, a number that stays until the next document begins.
    begins = F.pad(document_ids.diff(dim=-1), (1, 0)) > 0
    before = (count - is_token_slot.long())[:, None, :, None]
    return count - forward_fill(before, begins, torch.zeros_like(before[:, :, :1]))[:, 0, :, 0]


def growth_of_kernels(
    config: PreTrainedConfig,
    num_pairs: torch.Tensor,
    inputs_embeds: torch.Tensor,
    exponent: float | None = None,
    start: int | None = None,
) -> torch.Tensor | None:
    """Return the growth `(B or 1, T)` of each token's inverse temperature with the pairs `(B or 1, T)` that it sees.

    f(n) = (max(n, start) / start) ** exponent: the bandwidth of the kernel is the inverse root of its inverse
    temperature. Memory Mosaics v2 (arXiv 2507.03285) has such a growth.

    Args:
        exponent, start (*optional*): in place of the configuration's.

    Returns:
        factors in float32 at least; `None` if the kernels do not depend on n.
    """
    exponent = getattr(config, "bandwidth_exponent", 0) if exponent is None else exponent
    if exponent == 0:
        return None
    start = config.bandwidth_start if start is None else start
    dtype, device = torch.promote_types(inputs_embeds.dtype, torch.float32), inputs_embeds.device
    # The longest query has to stay within the range of the precision that scores are computed in.
    is_autocast = torch.is_autocast_enabled(device.type)
    precision = torch.get_autocast_dtype(device.type) if is_autocast else inputs_embeds.dtype
    largest = torch.finfo(precision).max / torch.e**MAX_LOG_KEY_SCALE
    return ((num_pairs.clamp(min=start).to(dtype) / start) ** exponent).clamp(max=largest)


def count_pairs(
    is_token_slot: torch.Tensor, document_ids: torch.Tensor | None, sees_all: torch.Tensor | None
) -> torch.Tensor:
    """Return the number of pairs `(B, S)` that each token sees; -1 or 0 for one that sees none.

    Arguments as for [`count_tokens`], and `sees_all` `(B, S)`: True at tokens that see the pairs of all documents
    before them in the row.
    """
    count = count_tokens(is_token_slot, document_ids)
    if sees_all is None:
        return count - 1
    return torch.where(sees_all, (is_token_slot & (count > 1)).long().cumsum(-1), count - 1)


def scale_of_queries(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
    sees_all: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return the growth of each new token's inverse temperature with the pairs that it sees: [`growth_of_kernels`].

    Args:
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): False at padding.
        document_ids (`torch.Tensor` of shape `(B, T)`, *optional*): see [`find_documents`].
        past_length: number of tokens in the memory; a tensor if the memory is static.
        sees_all (`torch.Tensor` of shape `(B, T)`, *optional*): see [`count_pairs`].

    Returns:
        factors `(B or 1, T)`, in float32 at least; `None` if the kernels do not depend on n.
    """
    if getattr(config, "bandwidth_exponent", 0) == 0:  # models of continuous observations have none
        return None
    num_tokens, device = inputs_embeds.shape[1], inputs_embeds.device
    if attention_mask is None and document_ids is None:
        past_length = past_length.to(device) if isinstance(past_length, torch.Tensor) else past_length
        num_pairs = past_length + torch.arange(num_tokens, device=device)[None]
    else:
        if attention_mask is None:
            attention_mask = torch.ones_like(document_ids, dtype=torch.bool)
        # A token sees a pair of each token before it. Behind a text, padding sees what the last token does.
        num_pairs = count_pairs(attention_mask, document_ids, sees_all)[:, -num_tokens:]
    return growth_of_kernels(config, num_pairs, inputs_embeds)


def strict_rule(
    is_token_slot: torch.Tensor, document_ids: torch.Tensor | None, sees_all: torch.Tensor | None = None
) -> Callable[..., torch.Tensor]:
    """Return which slots a token may read besides causality, as a mask function of transformers.

    Arguments as for [`count_pairs`].
    """
    count, num_pairs = (
        count_tokens(is_token_slot, document_ids),
        count_pairs(is_token_slot, document_ids, sees_all),
    )

    def rule(
        batch_idx: torch.Tensor, head_idx: torch.Tensor | None, q_idx: torch.Tensor, kv_idx: torch.Tensor
    ) -> torch.Tensor:
        """A slot is full if its token is real and not the first. A token without full slots reads empty slot 0."""
        is_full = is_token_slot[batch_idx, kv_idx] & (count[batch_idx, kv_idx] > 1)
        if document_ids is not None:
            is_seen = document_ids[batch_idx, kv_idx] == document_ids[batch_idx, q_idx]
            is_full = is_full & (is_seen if sees_all is None else is_seen | sees_all[batch_idx, q_idx])
        return is_full | ((kv_idx == 0) & (num_pairs[batch_idx, q_idx] <= 0))

    return rule


def slot_rule(
    is_token_slot: torch.Tensor,
    document_ids: torch.Tensor | None,
    past_length: int,
    sees_all: torch.Tensor | None = None,
) -> SlotRule:
    """Return the rule of [`strict_rule`] with causality, for [`block_read`], without a number for each token and slot.

    Arguments as for [`count_pairs`]; `past_length` is the number of tokens in the memory.
    """
    is_full = is_token_slot & (count_tokens(is_token_slot, document_ids) > 1)
    begins = None
    if document_ids is not None:
        places = torch.arange(document_ids.shape[1], device=document_ids.device)
        begins = (F.pad(document_ids.diff(dim=-1), (1, 0)) * places).cummax(dim=-1).values
        begins = begins if sees_all is None else begins.masked_fill(sees_all, 0)
    return SlotRule(past_length + 1, is_full, begins)


def stretch_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    begin: int,
    end: int,
    sees_all: torch.Tensor | None = None,
    **packing: Any,
) -> dict[str, Any]:
    """Return the `slot_mask` and `query_scale` of tokens `begin` to `end` of texts that several processes share.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(B, T, C)`): a tensor with shape, precision and place of the
            embeddings of whole texts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding.
        packing: as for [`create_memory_masks`].
    """
    attention_mask, _ = find_padding(inputs_embeds, attention_mask, None)
    document_ids = find_documents(inputs_embeds, attention_mask, None, **packing)
    sees_all = check_sees_all(sees_all, inputs_embeds, document_ids, None)
    query_scale = scale_of_queries(config, inputs_embeds, attention_mask, document_ids, 0, sees_all)
    if attention_mask is None:
        attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    whole = slot_rule(attention_mask, document_ids, 0, sees_all)
    begins = None if whole.begins is None else whole.begins[:, begin:end]
    is_full = None if whole.is_full is None else whole.is_full[:, :end]
    query_scale = None if query_scale is None else query_scale[:, begin:end]
    return {"slot_mask": SlotRule(begin + 1, is_full, begins), "query_scale": query_scale}


def count_behind(
    layer: Any, attention_mask: torch.Tensor | None, past_length: Any, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Return the number of tokens `(B or 1, T)` that the text behind joined ones has so far, each own included.

    Args:
        layer: the first of the memory.
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): False at padding.
    """
    if attention_mask is not None:
        return attention_mask[:, layer.num_joined :].long().cumsum(-1)[:, -num_tokens:]
    return past_length - layer.num_joined + torch.arange(1, num_tokens + 1, device=device)[None]


def joined_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache,
    is_compiled: bool,
) -> dict[str, Any]:
    """Return the `slot_mask`, `slot_bias` and `query_scale` of a text that is read behind joined ones.

    All tokens see the pairs of all joined texts, and each the pairs of its own text before it. Its first
    token completes no pair.
    """
    layer, (batch_size, num_tokens, _) = memory_layer(past_key_values), inputs_embeds.shape
    past_length: Any = past_key_values.get_seq_length()
    count = count_behind(layer, attention_mask, past_length, num_tokens, inputs_embeds.device)
    is_full = count > 1 if attention_mask is None else attention_mask[:, -num_tokens:] & (count > 1)
    slot_bias = torch.zeros(is_full.shape, device=is_full.device).masked_fill(~is_full, -torch.inf)
    masks: dict[str, Any] = {"slot_bias": slot_bias.expand(batch_size, -1)[:, None], "query_scale": None}
    if hasattr(layer, "read"):  # a bounded memory, which knows itself how many pairs it holds
        return masks | {"slot_mask": None}
    num_pairs = layer.num_pairs() + (count - 1).clamp(min=0)
    masks["query_scale"] = growth_of_kernels(config, num_pairs, inputs_embeds, *layer.bandwidth)
    if not is_compiled and has_plain_sdpa(config) and can_read_in_blocks(inputs_embeds):
        return masks | {"slot_mask": SlotRule(int(past_length) + 1)}
    num_slots = past_key_values.get_mask_sizes(num_tokens, 0)[0]
    last = past_length + torch.arange(num_tokens, device=is_full.device)
    return masks | {"slot_mask": (torch.arange(num_slots, device=is_full.device) <= last[:, None])[None, None]}


def find_padding(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return where past and new tokens are `(B, past + T)`, and the new ones `(B, T)`; `None` where all are tokens.

    Raises:
        ValueError: if the mask is not one of past and new tokens.
    """
    num_tokens = inputs_embeds.shape[1]
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    check_mask(attention_mask, inputs_embeds, past_length)
    # Without a mask, new ids are all tokens, but the memory may have read padding.
    if attention_mask is None and past_key_values is not None:
        past_mask = memory_layer(past_key_values).past_mask()
        attention_mask = None if past_mask is None else F.pad(past_mask, (0, num_tokens), value=True)
    if attention_mask is not None:
        attention_mask = attention_mask.to(device=inputs_embeds.device, dtype=torch.bool)
        # Without padding there is nothing to mask. A compiled graph cannot branch on this.
        if not is_torchdynamo_compiling() and attention_mask.all():
            attention_mask = None
    is_token = None if attention_mask is None else attention_mask[:, -num_tokens:]
    if is_token is not None and not is_torchdynamo_compiling() and is_token.all():
        is_token = None
    return attention_mask, is_token


def create_memory_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None = None,
    cache: Cache | None = None,
    is_compiled: bool = False,
    sees_all: torch.Tensor | None = None,
    **packing: Any,
) -> dict[str, Any]:
    """Return what all layers of one forward pass need to know about padding, documents and the past.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, on either side or within.
        is_compiled (`bool`): whether compiled code is to read the mask, which then is a tensor, not a [`SlotRule`].
        sees_all (`torch.Tensor` of shape `(B, T)`, *optional*): True at tokens that see the pairs of all documents
            before them in the row, and not of their own alone, as a question does that is asked of several documents.
        packing: `position_ids`, `seq_idx` and `cu_seq_lens_q`, see [`find_documents`].

    Returns:
        `dict`: `slot_mask`, `is_token`, `document_ids` and `query_scale`, the arguments of
        [`MemoryMosaicContextualMemory`]; behind joined texts `slot_bias` too, and for one token `reads_directly`, of
        `retrieve` of memories.

    Raises:
        ValueError: if the mask is not 2-D or not as long as past and new tokens together, or if several documents are
            packed in one row and there is a memory, which holds one.
    """
    past_key_values = one_memory(past_key_values, cache, warn=False)
    num_tokens = inputs_embeds.shape[1]
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    attention_mask, is_token = find_padding(inputs_embeds, attention_mask, past_key_values)
    document_ids = find_documents(inputs_embeds, attention_mask, past_key_values, **packing)
    sees_all = check_sees_all(sees_all, inputs_embeds, document_ids, past_key_values)
    masks: dict[str, Any] = {"is_token": is_token, "document_ids": document_ids}
    if past_key_values is not None and memory_layer(past_key_values).has_biases:
        return masks | joined_masks(config, inputs_embeds, attention_mask, past_key_values, is_compiled)
    query_scale = scale_of_queries(config, inputs_embeds, attention_mask, document_ids, past_length, sees_all)
    masks |= {"slot_mask": None, "query_scale": query_scale}

    # Two families of attention functions read a missing mask as causal; the others need it spelled out.
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if attention_mask is None and document_ids is None and mask_function in (sdpa_mask, flash_attention_mask):
        is_first = isinstance(past_length, int) and past_length == 0
        by_shift_identity = is_first and num_tokens > 1
        is_growing = past_key_values is not None and not past_key_values.is_compileable
        reads_all_slots = not is_first and num_tokens == 1 and is_growing
        if reads_all_slots:
            masks["reads_directly"] = can_read_directly(inputs_embeds, config)
        if by_shift_identity or reads_all_slots:
            return masks

    # A static memory has slots for tokens yet to come.
    num_slots = num_tokens if past_key_values is None else past_key_values.get_mask_sizes(num_tokens, 0)[0]
    if attention_mask is None:
        attention_mask = inputs_embeds.new_ones((inputs_embeds.shape[0], num_slots), dtype=torch.bool)
    is_token_slot = F.pad(attention_mask, (0, num_slots - attention_mask.shape[1]))
    is_eager_here = inputs_embeds.device.type == "cpu" and not is_torchdynamo_compiling()
    if is_eager_here and has_plain_sdpa(config):
        slots = slot_rule(is_token_slot, document_ids, int(past_length), sees_all)
        if not is_compiled and can_read_in_blocks(inputs_embeds):
            return masks | {"slot_mask": slots}
        return masks | {"slot_mask": slots.mask(num_tokens, num_slots)}
    rule = strict_rule(is_token_slot, document_ids, sees_all)
    masks["slot_mask"] = create_causal_mask(config, inputs_embeds, None, past_key_values, and_mask_function=rule)
    if masks["slot_mask"] is None:
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} has no function that makes its masks. Register one "
            "under the same name with `AttentionMaskInterface.register`."
        )
    return masks

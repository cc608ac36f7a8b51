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
"""`generate` behind a memory: which ids are new, how many rows the memory needs, what an assistant may read.

The library takes ids behind a memory for the whole text, the memory's own included, unless the mask covers more than
the ids: new ids alone would lose as many as the memory holds. `generate` of these models takes both, and raises where
it cannot tell them apart.

Shapes use B batch, `past` tokens in the memory, T ids passed, `new` of them not yet read.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin

from .adapters_memory_mosaic import prepare_for_adapters
from .cache_memory_mosaic import MEMORY_NAME, ReadText, check_num_rows, memory_layer, one_memory, text_of
from .masking_memory_mosaic import create_memory_masks


# What to do where `generate` cannot tell whether ids are new.
SAY_THAT_IDS_ARE_NEW = """To read all of them behind the memory, pass a mask over both:
    mask = torch.ones(ids.shape[0], memory.get_seq_length() + ids.shape[1], dtype=torch.long)
    model.generate(ids, attention_mask=mask, past_key_values=memory)"""


def generation_settings(
    model: GenerationMixin, config: GenerationConfig | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return some settings as `generate` takes them: its arguments first, then its configuration, then the model's.

    Returns:
        `dict`: `num_beams`, `num_return_sequences`, `pad_token_id` and `eos_token_id`, `None` where nothing is set.
    """
    settings = {}
    for name in ("num_beams", "num_return_sequences", "pad_token_id", "eos_token_id"):
        values = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        settings[name] = next((value for value in values if value is not None), None)
    return settings


@contextlib.contextmanager
def repeated_rows(memory: Cache | None, settings: dict[str, Any]) -> Iterator[None]:
    """Give a memory as many rows for each text as `generate` makes of it: beams, or sequences to return.

    The rows stay, one for each returned sequence or beam; if nothing was read, because a call failed, they go again.
    """
    times = max(settings["num_beams"] or 1, settings["num_return_sequences"] or 1)
    text = text_of(memory)
    num_read = 0 if text is None else int(text.get_seq_length())
    if memory is None or times == 1 or num_read == 0:
        yield
        return
    # The library repeats the ids, but only those memories that it made itself.
    num_rows = text.num_rows()
    memory.batch_repeat_interleave(times)
    try:
        yield
    except Exception:
        if int(memory.get_seq_length()) == num_read:
            memory.batch_select_indices(torch.arange(0, num_rows * times, times))
        raise


def check_new_ids(ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Return the ids that are to be read behind a memory.

    Raises:
        ValueError: if embeddings are passed in their place, or if there are no ids.
    """
    if inputs_embeds is not None:
        raise ValueError(
            "Embeddings behind a memory would be taken for the whole text, the memory's own included. Read them by "
            "`model(inputs_embeds=..., past_key_values=memory)`, then generate from the next ids."
        )
    if ids is None or ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError("Behind a memory, `generate` needs at least one new id in each row, `(batch, tokens)`.")
    return ids


def begins_with(ids: torch.Tensor, mask: torch.Tensor, past_ids: torch.Tensor | None, past_mask: torch.Tensor) -> bool:
    """Return whether ids are whole texts, which begin with the text of a memory and go on.

    Args:
        ids, mask (`torch.Tensor` of shape `(B, T)`): what is passed, 0 at padding.
        past_ids, past_mask (`torch.Tensor` of shape `(B, past)`): what the memory has read, False at padding.

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
    # Compared without padding first: a row may begin with the memory's text, but stand elsewhere in the batch.
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


def mask_by_ids(ids: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """Return the mask `(B, T)` that the library gives ids without one: 0 at `pad_token_id`, if that ends no text."""
    pad, ends = settings["pad_token_id"], settings["eos_token_id"]
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


def whole_mask(text: ReadText, ids: torch.Tensor, mask: torch.Tensor | None, settings: dict[str, Any]) -> torch.Tensor:
    """Return the mask `(B, past + new)` of ids `(B, T)` behind a memory of `text`."""
    num_read = int(text.get_seq_length())
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: it must be that of the ids, {tuple(ids.shape)}, or also "
            f"cover the {num_read} tokens of the memory."
        )
    past_mask = text.past_mask()
    if past_mask is None:
        past_mask = torch.ones(ids.shape[0], num_read, dtype=torch.bool, device=ids.device)
    new_mask = mask_by_ids(ids, settings) if mask is None else mask
    # Joined texts have no order, so no text begins with them: ids can begin with what was read behind them.
    first, past_ids = text.num_joined, text.past_ids()
    past_ids = None if past_ids is None else past_ids[:, first:]
    if num_read > first and begins_with(ids, new_mask, past_ids, past_mask[:, first:].to(ids.device)):
        if first:
            raise ValueError(
                f"These ids begin with the {num_read - first} that were read behind joined texts already: pass the "
                f"new ids alone. {SAY_THAT_IDS_ARE_NEW}"
            )
        new_mask = new_mask[:, num_read:]
    return torch.cat([past_mask.to(ids.device, torch.long), new_mask.to(ids.device, torch.long)], dim=1)


def continue_from(inputs: torch.Tensor | None, settings: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by which `generate` reads all new ids, and only those, behind a memory.

    Ids are the whole text if they begin with those that the memory has read, and new otherwise. The returned mask
    covers past and new ids, which is how the library knows which of them are new. A memory that `generate` returned
    has not read the last token of its text: new ids begin with it.

    Args:
        inputs (`torch.Tensor` of shape `(B, T)`, *optional*): the ids, if they are not in `kwargs`.
        settings: see [`generation_settings`].
        kwargs: arguments of `generate`.

    Returns:
        `dict`: `kwargs`, with an `attention_mask` `(B, past + new)` if there is a memory that has read something.

    Raises:
        ValueError: if ids and memory have different numbers of rows, if there are no new ids, if the mask covers
            neither the ids nor past and ids together, or if ids might be new or the whole text.
    """
    memory = one_memory(kwargs.get("past_key_values"), kwargs.get("cache"), warn=False)
    if MEMORY_NAME == "past_key_values" and kwargs.pop("cache", None) is not None:
        kwargs["past_key_values"] = memory  # `generate` before transformers 5.24 does not know the other name
    text = text_of(memory)
    num_read = 0 if text is None else int(text.get_seq_length())
    if num_read == 0:
        return kwargs
    ids = check_new_ids(inputs if inputs is not None else kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    check_num_rows(text.num_rows(), ids.shape[0])
    # With a mask over past and new ids the caller declares that all ids are new.
    mask = kwargs.get("attention_mask")
    if mask is None or mask.shape[-1] != num_read + ids.shape[1]:
        kwargs = kwargs | {"attention_mask": whole_mask(text, ids, mask, settings)}
    is_new = kwargs["attention_mask"][:, num_read:].any(-1)
    if not is_new.all():
        raise ValueError(
            f"Row {(~is_new).nonzero()[0].item()} has no new id behind the memory, so nothing is to be continued: "
            "add one, or choose the other rows by `memory.batch_select_indices(rows)`."
        )
    return kwargs


def check_assisted(text: ReadText, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raise `ValueError` for assisted decoding of what the library would read wrongly behind a memory of `text`."""
    num_read, past_ids = int(text.get_seq_length()), text.past_ids()
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


class MemoryMosaicGenerationMixin(GenerationMixin):
    """The library's `GenerationMixin`, with a memory in place of a key-value cache."""

    # `generate` makes the masks of a compiled step by this.
    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return [`create_memory_masks`] for a static memory: in `generate`, steps of one token are compiled."""
        is_compiled = inputs_embeds.shape[1] == 1
        return create_memory_masks(
            config, inputs_embeds, attention_mask, past_key_values, is_compiled=is_compiled, **kwargs
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as the library does; behind a memory, ids may be the new text alone or all of it.

        See [`continue_from`].
        """
        settings = generation_settings(self, generation_config, kwargs)
        if getattr(generation_config, "is_assistant", False) and kwargs.get("attention_mask") is None:
            # Without a mask, a `pad_token_id` that was written would count as padding. The library gives an assistant
            # no mask if nothing is padding: all is text.
            kwargs["attention_mask"] = torch.ones_like(inputs if inputs is not None else kwargs["input_ids"])
        kwargs = continue_from(inputs, settings, kwargs)
        memory = one_memory(kwargs.get("past_key_values"), kwargs.get("cache"), warn=False)
        with repeated_rows(memory, settings):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """Return None: to a memory, positions tell documents apart, and the library's do not rise behind padding."""

    def _assisted_decoding(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> Any:
        """Decode as the library does, which would read a memory's own text again and leave the memory recording.

        Raises:
            ValueError: if `input_ids` begin with the text that a memory holds, or if there is padding behind a memory.
        """
        memory = kwargs.get(MEMORY_NAME)
        if memory is None:
            return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]
        check_assisted(memory_layer(memory), input_ids, kwargs.get("attention_mask"))
        # The library records the past of the memory to take tokens back, and would leave recording on.
        not_recording = [layer for layer in memory.layers if not layer.record_past]
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]
        finally:
            for layer in not_recording:
                layer.deactivate_past_recording()

    # `generate` takes `inputs_embeds` only if this signature names them.
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        *args: Any,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare inputs as the library does, and as soft prompts of PEFT need them."""
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return prepare_for_adapters(self, inputs, MEMORY_NAME, is_first_iteration)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `ValueError`, for `generate_batch`, paged caches and continuous batching of servers."""
        raise ValueError(
            "Continuous batching is not supported: its paged cache holds keys and values, but no leaky sums and no "
            "value that waits for its next token. Use `generate` with a left-padded batch."
        )


__all__ = ["MemoryMosaicGenerationMixin"]

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
"""What a Memory Mosaic remembers while it reads: stored pairs and the last vectors of three running states.

`DynamicCache` and `StaticCache` build these layers by themselves from a `MemoryMosaicConfig`. Slot t of a layer
holds the pair that completes when token t arrives, (key of token t-1, value of token t-1); slot 0 is empty. So the
strict rule "a token retrieves earlier pairs only" is plain causality over slots, and there is one slot per token.

The first layer also knows what was read (`ReadText`) and by which weights (`MemoryWriter`), so that a memory is
continued by its own text and its own model, or refused.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from .identity_memory_mosaic import MemoryWriter, note_writer


class ReadText:
    """What a memory has read. By it `generate` knows whether ids are new:

    - `read_ids` `(B, tokens)`, `None` if any of it came as embeddings,
    - `read_mask` `(B, tokens or fewer)`, False at padding; what it does not cover are tokens,
    - `writer`: by which weights it was read.
    """

    def forget_text(self) -> None:
        self.knows_ids = True  # until something comes as embeddings
        self.read_ids: torch.Tensor | None = None
        self.read_mask: torch.Tensor | None = None
        self.writer: MemoryWriter | None = None

    def note_text(self, input_ids: torch.Tensor | None, is_token: torch.Tensor | None) -> None:
        """Keep the ids `(B, T)` that are about to be read, and which are tokens: all, if `is_token` is `None`."""
        num_read = self.get_seq_length()
        self.knows_ids = self.knows_ids and input_ids is not None
        if not self.knows_ids:
            self.read_ids = None
        else:
            # Cut first: a call that failed may have noted more than the memory then held.
            before = input_ids[:, :0] if num_read == 0 else self.read_ids[:, :num_read]
            self.read_ids = torch.cat([before, input_ids], dim=1).long()
        if is_token is not None:
            before = is_token[:, :0] if self.read_mask is None else self.read_mask[:, :num_read]
            self.read_mask = torch.cat([F.pad(before, (0, num_read - before.shape[1]), value=True), is_token], dim=1)

    def past_mask(self) -> torch.Tensor | None:
        """Which of the tokens read are tokens `(B, tokens)`, the others padding; `None` if all are."""
        if self.read_mask is None:
            return None
        num_read = int(self.get_seq_length())
        return F.pad(self.read_mask, (0, max(0, num_read - self.read_mask.shape[1])), value=True)[:, :num_read]

    def past_ids(self) -> torch.Tensor | None:
        """The ids that were read `(B, tokens)`, `None` if they are not known."""
        return None if self.read_ids is None else self.read_ids[:, : int(self.get_seq_length())]

    def _map_text(self, function) -> None:
        self.read_ids = None if self.read_ids is None else function(self.read_ids)
        self.read_mask = None if self.read_mask is None else function(self.read_mask)

    def _cut_text(self, num_left: int) -> None:
        self._map_text(lambda columns: columns[:, :num_left])


class MemoryMosaicStates(ReadText):
    """The running states of one layer, by name, each the last vector of a trajectory `(B, H, T, D)`:

    - `contextual_sum`, `persistent_sum`: the leaky sums of the two key extractors, in float32,
    - `pending_value`: the projected value that waits for its next token.

    They stay on the model's device when pairs are offloaded: they are small, and needed before the pairs are.
    While the past is recorded (`activate_past_recording`), trajectories are kept whole so that `crop` can roll back.

    The first layer of a memory also keeps what was read, for all of them.
    """

    state_names = ("contextual_sum", "pending_value", "persistent_sum")
    # Sized by the first tensors that arrive: nothing to allocate ahead of them.
    supports_early_init = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.states: dict[str, torch.Tensor] = {}
        self.record_past = False
        self.forget_text()

    def get_state(self, name: str) -> torch.Tensor | None:
        """Last vector `(B, H, 1, D)` of a state, `None` before the first token."""
        trajectory = self.states.get(name)
        return None if trajectory is None else trajectory[:, :, -1:]

    def set_state(self, name: str, trajectory: torch.Tensor) -> None:
        """Continue a state by `trajectory` `(B, H, T, D)`; only its last vector stays unless the past is recorded."""
        if not self.record_past:
            trajectory = trajectory[:, :, -1:].contiguous()
        elif name in self.states:
            trajectory = torch.cat([self.states[name], trajectory], dim=2)
        self.states[name] = trajectory

    def refuse_precision(self, dtype: torch.dtype) -> None:
        raise ValueError(
            f"The memory holds pairs in {self.keys.dtype}, but the model reads on in {dtype}: read the text again in "
            "this precision, or save the memory before the model is converted and load it by "
            f"`memory_from_state_dict(config, tensors, dtype={dtype}, check_weights=False)`."
        )

    def num_rows(self) -> int:
        """Rows of what was read; 0 before anything was."""
        return self.keys.shape[0] if self.is_initialized else 0

    def _map_states(self, function) -> None:
        self.states = {name: function(state) for name, state in self.states.items()}

    def _map_rows(self, function) -> None:
        self._map_states(function)
        self._map_text(function)

    def activate_past_recording(self) -> None:
        """Keep trajectories from now on, so that `crop` can take tokens back."""
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Keep last vectors only, as before `activate_past_recording`: what was read so far stays read."""
        self.record_past = False
        self._map_states(lambda trajectory: trajectory[:, :, -1:].contiguous())

    def reset(self) -> None:
        super().reset()
        self.states = {}
        self.forget_text()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))


class MemoryMosaicCacheLayer(MemoryMosaicStates, DynamicLayer):
    """Grows with the text. Built by `DynamicCache(config=model.config)`."""

    _layer_type = "memory_mosaic"

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store pairs, as the library's layers do.

        Raises:
            ValueError: if they are of another precision than those that are stored.
        """
        if self.is_initialized and key_states.dtype != self.keys.dtype:
            self.refuse_precision(key_states.dtype)
        return super().update(key_states, value_states, *args, **kwargs)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda state: state[indices.to(state.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, exactly; `crop(0)` only forgets the recorded past.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if there are not so many tokens, or if some but not all of those read before
                `activate_past_recording()` are to be taken back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back, not a length.")
        num_left = self.get_seq_length() + tokens_to_remove
        if tokens_to_remove < 0 and num_left == 0:
            return self.reset()
        if tokens_to_remove < 0 and self.is_initialized:
            self._roll_back(-tokens_to_remove)
        super().crop(tokens_to_remove)
        self._map_states(lambda trajectory: trajectory[:, :, -1:].contiguous())
        self._cut_text(num_left)

    def _roll_back(self, num_tokens: int) -> None:
        if num_tokens > self.get_seq_length():
            raise RuntimeError(
                f"Cannot crop {num_tokens} tokens: the memory holds {self.get_seq_length()}. To forget everything, "
                "call `reset()`."
            )
        recorded = min(state.shape[2] for state in self.states.values())
        if num_tokens >= recorded:
            raise RuntimeError(
                f"Cannot crop {num_tokens} tokens: the leaky sums and the pending value of only the last "
                f"{recorded - 1} were recorded. Call `activate_past_recording()` on the cache before reading the "
                "tokens you may want to take back, or read the shorter text anew."
            )
        self._map_states(lambda trajectory: trajectory[:, :, :-num_tokens])


class ContinuousMemoryMosaicCacheLayer(MemoryMosaicCacheLayer):
    """The same of a `ContinuousMemoryMosaicModel`, whose pairs need nothing but the last leaky sum of the keys."""

    _layer_type = "continuous_memory_mosaic"
    state_names = ("contextual_sum",)


class MemoryMosaicStaticCacheLayer(MemoryMosaicStates, StaticLayer):
    """Holds `max_cache_len` tokens at fixed addresses. Built by `StaticCache(config=..., max_cache_len=...)`."""

    _layer_type = "memory_mosaic"

    def get_state(self, name: str) -> torch.Tensor | None:
        # A copy, because `set_state` writes in place while the old state is still needed.
        return self.states[name].clone() if name in self.states else None

    def set_state(self, name: str, trajectory: torch.Tensor) -> None:
        if name in self.states:
            self.states[name].copy_(trajectory[:, :, -1:])
        else:
            self.states[name] = trajectory[:, :, -1:].clone()

    def note_text(self, input_ids: torch.Tensor | None, is_token: torch.Tensor | None) -> None:
        self.knows_ids = self.knows_ids and input_ids is not None
        for name, new in (("read_ids", input_ids.long() if self.knows_ids else None), ("read_mask", is_token)):
            if new is not None and getattr(self, name) is None:
                setattr(self, name, new.new_ones(new.shape[0], self.max_cache_len))
            if new is not None:
                places = torch.arange(new.shape[1], device=new.device) + self.cumulative_length.to(new.device)
                getattr(self, name).index_copy_(1, places, new)
        if not self.knows_ids:
            self.read_ids = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_batch(self, function) -> None:
        """Other rows have other addresses: a compiled step compiles again."""
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
            self.batch_size = self.keys.shape[0]
            for tensor in (self.keys, self.values):
                torch._dynamo.mark_static_address(tensor)
            self._map_rows(function)

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(
            "A static memory cannot be cropped. Use a dynamic one: `DynamicCache(config=model.config)`, or leave "
            "`cache_implementation` unset in `generate`."
        )


# Of what was read and by which weights, what `memory_state_dict` saves beside the layers' tensors.
TEXT_NAMES = ("fingerprint", "input_ids", "attention_mask")


def memory_state_dict(cache: Cache, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Everything a `DynamicCache` of this model holds, as named tensors that `safetensors` can save.

    Args:
        cache ([`~transformers.Cache`]): as returned by `model(..., use_cache=True).past_key_values` or by `generate`.
        model (`nn.Module`, *optional*): that has read it; needed only if it was compiled when it did.

    Returns:
        `dict[str, torch.Tensor]`: per layer `layers.{i}.keys` and `.values` of shape `(B, H, T, D)` and the layer's
        states `layers.{i}.{name}` of shape `(B, H, 1, D)`; `fingerprint` `(32,)` of the weights that wrote it,
        `input_ids` `(B, T)` if ids were read, and `attention_mask` `(B, T)` if there is padding. Empty for a memory
        that has read nothing.

    Raises:
        ValueError: if a layer is none of a `DynamicCache` of this model, or if the weights that wrote it are gone or
            have changed since.
    """
    tensors = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, MemoryMosaicCacheLayer):
            raise ValueError(
                f"Layer {index} is a {type(layer).__name__}: only a `DynamicCache` of this model is saved."
            )
        if layer.is_initialized:
            tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
            tensors |= {f"layers.{index}.{name}": layer.get_state(name) for name in layer.state_names}
    if tensors:
        first = cache.layers[0]
        if model is not None:
            model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of adapters
            while isinstance(getattr(model, "module", None), nn.Module):  # of data parallelism
                model = model.module
            note_writer(first, model.base_model, num_tokens=1)
        if first.writer is None:
            raise ValueError(
                "This memory does not tell which weights wrote it, as compiled code does not sign it: pass the model "
                "that has read it, `memory_state_dict(cache, model)`."
            )
        about = (torch.frombuffer(bytearray(first.writer.fingerprint()), dtype=torch.uint8),)
        about = dict(zip(TEXT_NAMES, (*about, first.past_ids(), first.past_mask()), strict=True))
        tensors |= {name: tensor for name, tensor in about.items() if tensor is not None}
    # Storage of their own: safetensors refuses views that share memory.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def memory_from_state_dict(
    config, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None, check_weights: bool = True
) -> DynamicCache:
    """The memory that [`memory_state_dict`] described: reading goes on as if never interrupted.

    The first model that reads on is compared with the one that wrote the memory, by their fingerprints.

    Args:
        config ([`MemoryMosaicConfig`] or [`ContinuousMemoryMosaicConfig`]): of the model that will read on.
        tensors (`dict[str, torch.Tensor]`): as returned by [`memory_state_dict`], on the model's device and from a
            model of its dtype.
        dtype (`torch.dtype`, *optional*): convert pairs and pending values to it; leaky sums stay in float32 at least.
        check_weights (`bool`, defaults to `True`): whether other weights are refused. Without it, a memory that they
            cannot read is read all the same, with other answers: for files without a fingerprint, or if you know that
            the weights compute the same, such as those of another precision or with an adapter merged.

    Raises:
        ValueError: if tensors are missing, left over, of another shape or kind than `config` asks for, or not finite.
    """
    cache = DynamicCache(config=config)
    if not tensors:
        return cache
    about = {name: tensors[name] for name in TEXT_NAMES if name in tensors}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in TEXT_NAMES}
    check_names(cache, tensors)
    check_pairs(config, tensors)
    if dtype is not None:
        tensors = {name: part if name.endswith("_sum") else part.to(dtype) for name, part in tensors.items()}
        check_pairs(config, tensors)  # numbers may not fit the other precision
    check_text(about, tensors["layers.0.keys"], check_weights)
    for index, layer in enumerate(cache.layers):
        parts = {name: tensors[f"layers.{index}.{name}"] for name in ("keys", "values", *layer.state_names)}
        layer.update(parts["keys"], parts["values"])
        for name in layer.state_names:
            layer.set_state(name, parts[name])
    first = cache.layers[0]
    first.read_ids, first.read_mask = about.get("input_ids"), about.get("attention_mask")
    first.knows_ids = first.read_ids is not None
    if check_weights:
        first.writer = MemoryWriter(fingerprint=bytes(about["fingerprint"].tolist()))
    return cache


def check_names(cache: Cache, tensors: dict[str, torch.Tensor]) -> None:
    """Refuses what is not the tensors of all layers of a cache."""
    expected = {
        f"layers.{index}.{name}"
        for index, layer in enumerate(cache.layers)
        for name in ("keys", "values", *layer.state_names)
    }
    if expected != set(tensors):
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(f"Not a memory of this model: missing {missing}, unknown {unknown}.")


def check_pairs(config, tensors: dict[str, torch.Tensor]) -> None:
    """Refuses pairs and states of other shapes than those of one memory, or of numbers that no model has written."""
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or (tensor.shape[1], tensor.shape[3]) != (config.num_attention_heads, config.head_dim):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; this model stores (batch, {config.num_attention_heads}, "
                f"tokens, {config.head_dim})."
            )
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {tensor.dtype}: a memory holds floating point numbers of 16 bits or more.")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} holds numbers that are not finite: the file is damaged, or they do not "
                "fit `dtype`. Read the text again."
            )
    sizes = {name: (tensor.shape[0], tensor.shape[2]) for name, tensor in tensors.items()}
    kinds = {name: tensor.dtype for name, tensor in tensors.items() if name.endswith((".keys", ".values"))}
    pairs = {size for name, size in sizes.items() if name in kinds}
    states = {size for name, size in sizes.items() if name not in kinds}
    if len(pairs) > 1 or states != {(batch_size, 1) for batch_size, _ in pairs}:
        raise ValueError(f"Not one memory: its layers hold (rows, slots) {sorted(pairs)} and states {sorted(states)}.")
    if 0 in next(iter(pairs)):
        raise ValueError(f"The memory has (rows, slots) {next(iter(pairs))}: there must be at least one of each.")
    if len(set(kinds.values())) > 1:
        raise ValueError(f"Not one memory: its pairs are of {sorted(map(str, set(kinds.values())))}.")


def check_text(about: dict[str, torch.Tensor], keys: torch.Tensor, check_weights: bool) -> None:
    """Refuses marks of the text of another form than the pairs', and a memory that does not tell its writer."""
    for name, dtype in (("input_ids", torch.int64), ("attention_mask", torch.bool)):
        given, shape = about.get(name), (keys.shape[0], keys.shape[2])
        if given is not None and (given.dtype != dtype or tuple(given.shape) != shape):
            raise ValueError(f"{name} is {given.dtype} of shape {tuple(given.shape)}: it must be {dtype} of {shape}.")
    if not check_weights:
        return
    fingerprint = about.get("fingerprint")
    if fingerprint is None or fingerprint.dtype != torch.uint8 or tuple(fingerprint.shape) != (32,):
        raise ValueError(
            "This memory does not tell which weights wrote it (`fingerprint`, 32 bytes), as older files "
            "do not: read the text again, or pass `check_weights=False` if you know that they are this model's."
        )


__all__ = [
    "ContinuousMemoryMosaicCacheLayer",
    "MemoryMosaicCacheLayer",
    "MemoryMosaicStaticCacheLayer",
    "memory_from_state_dict",
    "memory_state_dict",
]

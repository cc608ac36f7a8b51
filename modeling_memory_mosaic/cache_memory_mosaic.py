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
"""

import hashlib

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer


class MemoryMosaicStates:
    """The running states of one layer, by name, each the last vector of a trajectory `(B, H, T, D)`:

    - `contextual_sum`, `persistent_sum`: the leaky sums of the two key extractors, in float32,
    - `pending_value`: the projected value that waits for its next token.

    They stay on the model's device when pairs are offloaded: they are small, and needed before the pairs are.
    While the past is recorded (`activate_past_recording`), trajectories are kept whole so that `crop` can roll back.
    """

    state_names = ("contextual_sum", "pending_value", "persistent_sum")
    # Sized by the first tensors that arrive: nothing to allocate ahead of them.
    supports_early_init = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.states: dict[str, torch.Tensor] = {}
        self.record_past = False

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

    def _map_states(self, function) -> None:
        self.states = {name: function(state) for name, state in self.states.items()}

    def activate_past_recording(self) -> None:
        """Keep trajectories from now on, so that `crop` can take tokens back."""
        self.record_past = True

    def reset(self) -> None:
        super().reset()
        self.states = {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_states(lambda state: state.index_select(0, beam_idx.to(state.device)))


class MemoryMosaicCacheLayer(MemoryMosaicStates, DynamicLayer):
    """Grows with the text. Built by `DynamicCache(config=model.config)`."""

    _layer_type = "memory_mosaic"

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_states(lambda state: state[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens, exactly; `crop(0)` only forgets the recorded past.

        Raises:
            ValueError: if `tokens_to_remove` is positive.
            RuntimeError: if those tokens were read before `activate_past_recording()`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back, not a length.")
        if tokens_to_remove < 0 and self.is_initialized:
            self._roll_back(-tokens_to_remove)
        super().crop(tokens_to_remove)
        self._map_states(lambda trajectory: trajectory[:, :, -1:].contiguous())

    def _roll_back(self, num_tokens: int) -> None:
        if num_tokens >= self.get_seq_length():
            raise RuntimeError(
                f"Cannot crop {num_tokens} of {self.get_seq_length()} tokens: to forget everything, call `reset()`."
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

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError(
            "A static memory cannot be cropped. Use a dynamic one: `DynamicCache(config=model.config)`, or leave "
            "`cache_implementation` unset in `generate`."
        )


def weights_fingerprint(module: torch.nn.Module) -> bytes:
    """sha256 of every tensor of a module, by name, type, shape and bytes: modules of one fingerprint agree in all.

    Quantized tensors count with their parts. Sharded ones are collected, so that every process has to ask; of
    offloaded ones the numbers are fetched.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        for part, dense in dense_parts(fetched(module, name, tensor)):
            digest.update(repr((name, part, str(dense.dtype), tuple(dense.shape))).encode())
            digest.update(dense.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def fetched(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of `module`'s state, wherever it is kept: in other processes, or where `accelerate` has put it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if not tensor.is_meta:
        return tensor
    owner, _, own_name = name.rpartition(".")
    kept = getattr(getattr(module.get_submodule(owner), "_hf_hook", None), "weights_map", None)
    if kept is None:
        raise ValueError(f"{name} has a shape but no numbers, so that nothing tells these weights: load the model.")
    return kept[own_name]


def dense_parts(tensor: torch.Tensor, part: str = ""):
    """The plain tensors that a tensor consists of, with their names: itself, unless it is a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield part, tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from dense_parts(getattr(tensor, name), f"{part}.{name}")


def memory_state_dict(cache: Cache) -> dict[str, torch.Tensor]:
    """Everything a `DynamicCache` of this model holds, as named tensors that `safetensors` can save.

    The mask of padding is not part of it: keep it beside them if there is any, and pass all of it when reading on.

    Args:
        cache ([`~transformers.Cache`]): as returned by `model(..., use_cache=True).past_key_values` or by `generate`.

    Returns:
        `dict[str, torch.Tensor]`: per layer `layers.{i}.keys` and `.values` of shape `(B, H, T, D)` and the layer's
        states `layers.{i}.{name}` of shape `(B, H, 1, D)`. Empty for a memory that has read nothing.
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
    # Storage of their own: safetensors refuses views that share memory.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def memory_from_state_dict(config, tensors: dict[str, torch.Tensor]) -> DynamicCache:
    """The memory that [`memory_state_dict`] described: reading goes on as if never interrupted.

    Args:
        config ([`MemoryMosaicConfig`] or [`ContinuousMemoryMosaicConfig`]): of the model that will read on.
        tensors (`dict[str, torch.Tensor]`): as returned by [`memory_state_dict`], on the model's device and from a
            model of its dtype.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape than `config` asks for.
    """
    cache = DynamicCache(config=config)
    expected = {
        f"layers.{index}.{name}"
        for index, layer in enumerate(cache.layers)
        for name in ("keys", "values", *layer.state_names)
    }
    if tensors and expected != set(tensors):
        missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ValueError(f"Not a memory of this model: missing {missing}, unknown {unknown}.")
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or (tensor.shape[1], tensor.shape[3]) != (config.num_attention_heads, config.head_dim):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; this model stores (batch, {config.num_attention_heads}, "
                f"tokens, {config.head_dim})."
            )
    sizes = {name: (tensor.shape[0], tensor.shape[2]) for name, tensor in tensors.items()}
    pairs = {size for name, size in sizes.items() if name.endswith((".keys", ".values"))}
    states = {size for name, size in sizes.items() if name.endswith(MemoryMosaicStates.state_names)}
    if len(pairs) > 1 or states != {(batch_size, 1) for batch_size, _ in pairs}:
        raise ValueError(f"Not one memory: its layers hold (rows, slots) {sorted(pairs)} and states {sorted(states)}.")
    for index, layer in enumerate(cache.layers if tensors else []):
        layer.update(tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"])
        for name in layer.state_names:
            layer.set_state(name, tensors[f"layers.{index}.{name}"])
    return cache


__all__ = [
    "ContinuousMemoryMosaicCacheLayer",
    "MemoryMosaicCacheLayer",
    "MemoryMosaicStaticCacheLayer",
    "memory_from_state_dict",
    "memory_state_dict",
    "weights_fingerprint",
]

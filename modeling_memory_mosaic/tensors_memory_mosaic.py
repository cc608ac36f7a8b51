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
"""Saving and loading of a memory, as named tensors that `safetensors` can save.

A model does not need this file, and folders written by `save_pretrained` do not hold it.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from .bounded_memory_mosaic import COUNTERS, BoundedMemoryLayer, bind_memory, check_bound
from .cache_memory_mosaic import MemoryMosaicCacheLayer, MemoryMosaicStates, memory_layer
from .identity_memory_mosaic import MemoryWriter, note_writer, unwrapped


# Saved beside the tensors of the layers: the fingerprint of the weights, and the text.
TEXT_NAMES = ("fingerprint", "input_ids", "attention_mask")
# What a layer of a bounded number of pairs has besides: numbers, which are not negative, and vectors. The counters are
# `(B, H, P)`, `held` is `(B,)`.
VECTOR_NAMES = ("last_retrieval", "waiting_keys", "waiting_values")
BOUNDED_NAMES = (*COUNTERS, "held", "num_read", "num_joined", "waiting_error", "is_waiting", *VECTOR_NAMES)


def _text_tensors(layer: MemoryMosaicStates, model: nn.Module | None) -> dict[str, torch.Tensor]:
    """Return the tensors named in `TEXT_NAMES` of a memory's first layer, those that there are."""
    if model is not None:
        note_writer(layer, unwrapped(model), num_tokens=1)
    if layer.writer is None:
        raise ValueError(
            "This memory does not tell which weights wrote it, as compiled code does not sign it: pass the model "
            "that has read it, `memory_state_dict(cache, model)`."
        )
    fingerprint = torch.frombuffer(bytearray(layer.writer.fingerprint()), dtype=torch.uint8)
    parts = zip(TEXT_NAMES, (fingerprint, layer.past_ids(), layer.past_mask()), strict=True)
    return {name: tensor for name, tensor in parts if tensor is not None}


def _set_bounded(layer: BoundedMemoryLayer, tensors: dict[str, torch.Tensor]) -> None:
    """Fill a bounded layer, which has started, with what `named_numbers` returned.

    Raises:
        ValueError: if a tensor has another shape or kind than a layer of this size writes, or impossible numbers.
    """
    own = layer.named_numbers()
    for name in own:
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise ValueError(f"{name} of a bounded memory must be {own[name].dtype} of {tuple(own[name].shape)}.")
        if not tensor.isfinite().all() or (name not in VECTOR_NAMES and (tensor < 0).any()):
            raise ValueError(f"{name} of a bounded memory has impossible numbers: the file is damaged.")
    if (tensors["held"] > layer.max_pairs).any():
        raise ValueError(f"A row holds {int(tensors['held'].max())} pairs, and there is room for {layer.max_pairs}.")
    layer.set_numbers(tensors)


def memory_state_dict(cache: Cache, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """Return everything that a `DynamicCache` of this model holds, as named tensors.

    Args:
        cache ([`~transformers.Cache`]): as returned by `model(..., use_cache=True).past_key_values` or by `generate`.
        model (`nn.Module`, *optional*): the model that has read the text; needed only if it was compiled then.

    Returns:
        `dict[str, torch.Tensor]`: per layer `layers.{i}.keys` and `.values` of shape `(B, H, T, D)` and the layer's
        states `layers.{i}.{name}` of shape `(B, H, 1, D)`; `fingerprint` `(32,)` of the weights that wrote it,
        `input_ids` `(B, T)` if ids were read, and `attention_mask` `(B, T)` if there is padding. Empty for a memory
        that has read nothing.

    Raises:
        ValueError: if a layer is not one of a `DynamicCache` of this model, or if the weights that wrote it are gone
            or have changed since.
    """
    tensors: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, (MemoryMosaicCacheLayer, BoundedMemoryLayer)):
            raise ValueError(
                f"Layer {index} is a {type(layer).__name__}: only a `DynamicCache` of this model is saved."
            )
        if layer.slot_bias is not None:
            raise ValueError("This cache holds joined texts: save the `MosaicMemory`, and read what follows again.")
        if layer.is_initialized:
            tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
            states = layer.named_states(memory_layer(cache).past_mask())
            tensors |= {f"layers.{index}.{name}": state for name, state in states.items()}
            if isinstance(layer, BoundedMemoryLayer):
                tensors |= {f"layers.{index}.{name}": tensor for name, tensor in layer.named_numbers().items()}
    # Before anything was read there is neither a text nor a writer.
    if tensors:
        tensors |= _text_tensors(memory_layer(cache), model)
    # Storage of their own: safetensors refuses views that share memory.
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def expected_shapes(cache: Cache, config: PreTrainedConfig) -> dict[str, tuple[int, int | None, int]]:
    """Return heads, columns (`None`: one for each token) and width of all tensors of a memory, by their names."""
    return {
        f"layers.{index}.{name}": shape
        for index in range(len(cache.layers))
        for name, shape in memory_layer(cache, index).state_shapes(config).items()
    }


def check_names(cache: Cache, config: PreTrainedConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` if tensors are not those of all layers of a cache."""
    expected = expected_shapes(cache, config)
    if set(expected) != set(tensors):
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"Not a memory of this model: missing {missing}, unknown {unknown}.")


def check_numbers(shapes: dict[str, tuple[int, int | None, int]], tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` for tensors of another width than the model's, or with numbers that no model has written."""
    for name, tensor in tensors.items():
        num_heads, _, width = shapes[name]
        if tensor.ndim != 4 or (tensor.shape[1], tensor.shape[3]) != (num_heads, width):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; this model stores (batch, {num_heads}, tokens, {width})."
            )
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {tensor.dtype}: a memory holds floating point numbers of 16 bits or more.")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} holds numbers that are not finite: the file is damaged, or they do not "
                "fit `dtype`. Read the text again."
            )


def check_pairs(shapes: dict[str, tuple[int, int | None, int]], tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` if pairs and states are not of one memory: of one number of rows and slots, one precision."""
    sizes = {name: (tensor.shape[0], tensor.shape[2]) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if name.endswith((".keys", ".values"))}
    pairs = {size for name, size in sizes.items() if name in dtypes}
    states = {size for name, size in sizes.items() if name not in dtypes}
    num_rows = next(iter(pairs))[0]
    wrong = [name for name in sizes if name not in dtypes and sizes[name] != (num_rows, shapes[name][1])]
    if len(pairs) == 1 and wrong:
        raise ValueError(
            f"Not one memory: {wrong[0]} has (rows, columns) {sizes[wrong[0]]}, and must have "
            f"{(num_rows, shapes[wrong[0]][1])}."
        )
    if len(pairs) > 1:
        raise ValueError(f"Not one memory: its layers hold (rows, slots) {sorted(pairs)} and states {sorted(states)}.")
    if 0 in next(iter(pairs)):
        raise ValueError(f"The memory has (rows, slots) {next(iter(pairs))}: there must be at least one of each.")
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"Not one memory: its pairs are of {sorted(map(str, set(dtypes.values())))}.")


def check_text(text: dict[str, torch.Tensor], shape: tuple[int, int], check_weights: bool) -> None:
    """Raise `ValueError` if ids or mask are not of a shape `(B, tokens)`, or if the fingerprint is missing."""
    for name, dtype in (("input_ids", torch.int64), ("attention_mask", torch.bool)):
        tensor = text.get(name)
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: it must be {dtype} of {shape}."
            )
    if not check_weights:
        return
    fingerprint = text.get("fingerprint")
    if fingerprint is None or fingerprint.dtype != torch.uint8 or tuple(fingerprint.shape) != (32,):
        raise ValueError(
            "This memory does not tell which weights wrote it (`fingerprint`, 32 bytes), as older files "
            "do not: read the text again, or pass `check_weights=False` if you know that they are this model's."
        )


def memory_from_state_dict(
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    check_weights: bool = True,
    policy: Any = None,
) -> DynamicCache:
    """Return the memory that [`memory_state_dict`] described: reading goes on as if never interrupted.

    The first model that reads on is compared with the one that wrote the memory, by their fingerprints.

    Args:
        config ([`MemoryMosaicConfig`] or [`ContinuousMemoryMosaicConfig`]): of the model that will read on.
        tensors (`dict[str, torch.Tensor]`): as returned by [`memory_state_dict`], on the model's device and from a
            model of its dtype.
        dtype (`torch.dtype`, *optional*): convert pairs and pending values to it; leaky sums stay in float32 at least.
        check_weights (`bool`, defaults to `True`): whether other weights are refused. Without it, a memory that they
            cannot read is read all the same, with other answers: for files without a fingerprint, or if you know that
            the weights compute the same, such as those of another precision or with an adapter merged.
        policy (`str` or a function, *optional*): of a bounded memory, as for [`bounded`], which reads on within its
            bound.

    Raises:
        ValueError: if a bounded memory has no policy, or if tensors are missing, left over, of another shape or kind
            than `config` asks for, or not finite.
    """
    cache = DynamicCache(config=config)
    if not tensors:
        return cache
    text = {name: tensors[name] for name in TEXT_NAMES if name in tensors}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in TEXT_NAMES}
    of_bounded = {name: part for name, part in tensors.items() if name.rpartition(".")[2] in BOUNDED_NAMES}
    tensors = {name: part for name, part in tensors.items() if name not in of_bounded}
    check_names(cache, config, tensors)
    shapes = expected_shapes(cache, config)
    check_numbers(shapes, tensors)
    check_pairs(shapes, tensors)
    if dtype is not None:
        kept = ("_sum", "_log_scale")
        tensors = {name: part if name.endswith(kept) else part.to(dtype) for name, part in tensors.items()}
        check_numbers(shapes, tensors)  # they may not fit the other precision
        check_pairs(shapes, tensors)
    num_slots = tensors["layers.0.keys"].shape[2]
    if of_bounded:
        check_bound(num_slots, policy)
        bind_memory(cache, (config, num_slots, policy))
        num_slots = int(of_bounded.get("layers.0.num_read", torch.tensor(0)))
    check_text(text, (len(tensors["layers.0.keys"]), num_slots), check_weights)
    for index in range(len(cache.layers)):
        layer = memory_layer(cache, index)
        parts = {name: tensors[f"layers.{index}.{name}"] for name in layer.state_shapes(config)}
        if isinstance(layer, BoundedMemoryLayer):
            layer.start(parts["keys"])
            layer.keys, layer.values = parts["keys"].clone(), parts["values"].clone()  # they are written in place
            own = f"layers.{index}."
            others = {name.removeprefix(own): part for name, part in of_bounded.items() if name.startswith(own)}
            _set_bounded(layer, others)
        else:
            layer.update(parts["keys"], parts["values"])
        layer.set_states({name: part for name, part in parts.items() if name not in ("keys", "values")})
    first = memory_layer(cache)
    first.read_ids, first.read_mask = text.get("input_ids"), text.get("attention_mask")
    first.knows_ids = first.read_ids is not None
    if check_weights:
        first.writer = MemoryWriter(fingerprint=bytes(text["fingerprint"].tolist()))
    return cache


__all__ = ["memory_from_state_dict", "memory_state_dict"]

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
"""Identity of weights: their fingerprint, and the signature that a memory carries of the weights that wrote it."""

import dataclasses
import hashlib
import itertools
import json
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .adapters_memory_mosaic import COMPILED_PREFIX, adapter_parts


# By module, the fingerprint and the state of the weights that it is of.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, bytes]] = weakref.WeakKeyDictionary()
# Numbers of each weight that are looked at before a fingerprint is taken for known.
NUM_SAMPLED = 64
# Fields of a configuration, or their ends, that change nothing of what weights compute without dropout.
_NOT_COMPUTED = (
    *(
        "use_cache",
        "token_id",
        "dropout",
        "pdrop",
        "max_position_embeddings",
        "initializer_range",
        "tie_word_embeddings",
    ),
    *("long_term_delay_range", "long_term_delay_draw"),
    *("freeze_encoder", "causal_weight", "autoencoding_weight", "copy_weight", "loss_clip", "vocab_size"),
)


def settings(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    """Return names and values of the fields of a configuration that determine how weights are used."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = {field.name for field in dataclasses.fields(config)} - common
    # Without an exponent they change nothing, and fingerprints stay those of versions that had no such fields.
    if not getattr(config, "bandwidth_exponent", 0):
        names -= {"bandwidth_exponent", "bandwidth_start"}
    values = [(name, getattr(config, name)) for name in sorted(names) if not name.endswith(_NOT_COMPUTED)]
    return [(name, settings(value) if isinstance(value, PreTrainedConfig) else value) for name, value in values]


def changeable_settings(module: Any) -> list[tuple[str, Any]]:
    """Return the settings that a module may be given while it exists, but for the depth: an early exit lowers that."""
    return [(name, value) for name, value in settings(module.config) if name != "num_hidden_layers"]


def adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Return names and modules of the layers that PEFT wraps, or keeps a trained copy of."""
    return [(name, layer) for name, layer in adapter_parts(module).items() if hasattr(layer, "active_adapters")]


def acting_adapters(layer: Any) -> list[str]:
    """Return names of the adapters that a wrapped layer applies; those merged into its weights are not applied."""
    if getattr(layer, "disable_adapters", False):
        return []
    return [name for name in layer.active_adapters if name not in getattr(layer, "merged_adapters", ())]


def adapters_at_work(module: nn.Module) -> list[tuple]:
    """Return name, merged adapters and acting adapters with their scaling, for each layer that has any of these."""
    layers: list[tuple] = []
    for name, layer in adapted_layers(module):
        scaling = getattr(layer, "scaling", {})
        at_work = [(adapter, scaling.get(adapter)) for adapter in acting_adapters(layer)]
        merged = tuple(getattr(layer, "merged_adapters", ()))
        layers += [(name, merged, *at_work)] if at_work or merged else []
    return layers


def acting_weights(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield the weights of a module that act at this moment.

    Yields:
        name without wrappers of PEFT and `torch.compile`, name in the state dict, and value.
    """
    # A wrapper keeps the weights of its layer under `base_layer`, or under `original_module` beside a trained copy,
    # and those of each adapter under the adapter's name.
    wrapped = [(f"{name}.", acting_adapters(layer)) for name, layer in adapted_layers(module)]
    for full_name, value in module.state_dict().items():
        for owner, acting in wrapped:
            if full_name.startswith(owner):
                first, *rest = full_name.removeprefix(owner).split(".")
                is_replaced = first == "original_module" and acting
                if is_replaced or first not in ("base_layer", "original_module") and not set(rest) & set(acting):
                    break  # a weight that is not used at this moment
        else:
            name = full_name.replace(".base_layer", "").replace(".original_module", "")
            yield name.replace(COMPILED_PREFIX, ""), full_name, value


def is_meta(value: Any) -> bool:
    """Return whether a value is a tensor without numbers."""
    return isinstance(value, torch.Tensor) and value.is_meta


def offloaded_value(module: nn.Module, name: str) -> torch.Tensor:
    """Return the value of a weight that `accelerate` keeps elsewhere, on the CPU or on disk.

    Raises:
        ValueError: if it is not kept anywhere.
    """
    owner_name, _, own_name = name.rpartition(".")
    attached = getattr(module.get_submodule(owner_name), "_hf_hook", None)
    for hook in getattr(attached, "hooks", [attached]):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map[own_name]
    raise ValueError(f"{name} has no value (it lies on the meta device): load the weights before reading.")


def plain_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a value of a state dict as plain dense tensors with names: sharded and quantized ones taken apart.

    Raises:
        ValueError: if it has no numbers.
    """
    if is_meta(value):
        raise ValueError(f"{name} has no value (it lies on the meta device): load the weights before reading.")
    if hasattr(value, "full_tensor"):  # a `DTensor`
        value = value.full_tensor()
    if hasattr(value, "__tensor_flatten__"):  # a subclass made of other tensors, as quantizers use
        names, context = value.__tensor_flatten__()
        yield f"{name} {context}", torch.empty(0)
        for inner in names:
            yield from plain_tensors(f"{name}.{inner}", getattr(value, inner))
    elif isinstance(value, torch.Tensor) and value.is_quantized:
        yield f"{name} {value.q_scale()} {value.q_zero_point()}", value.int_repr()
    elif isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            yield from plain_tensors(f"{name}.{index}", inner)
    else:
        yield f"{name} {value!r}", torch.empty(0)


def weights_fingerprint(module: nn.Module, config: PreTrainedConfig | None = None) -> bytes:
    """Return the sha256 of all weights of a module as it computes now, and of the settings that they are used with.

    Adapters count if they act at this moment, so that a model with all adapters disabled has the fingerprint of its
    base. Quantized, sharded (`DTensor`) and offloaded weights are read where they are, at every call; others only if
    they were written since the last call, see [`counted_state`].

    Args:
        config (`PreTrainedConfig`, *optional*): the settings; the module's own when absent.

    Returns:
        `bytes`: 32 of them.

    Raises:
        ValueError: if the weights have no values here (meta device, shards of DeepSpeed ZeRO-3).
    """
    if any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in module.parameters()):
        raise ValueError("DeepSpeed ZeRO-3 keeps the weights in parts: load the model on one process for this.")
    used: Any = config or module.config
    use, written = (settings(used), adapters_at_work(module)), counted_state(module)
    if written is not None and module in _KNOWN and _KNOWN[module][0] == (use, written):
        return _KNOWN[module][1]
    digest = hashlib.sha256(repr(use).encode())
    # Sorted: wrappers change the order of names, but not what is computed.
    for name, full_name, value in sorted(acting_weights(module), key=lambda item: item[0]):
        value = offloaded_value(module, full_name) if is_meta(value) else value
        for part, tensor in plain_tensors(name, value):
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    _KNOWN[module] = ((use, written), digest.digest())
    return _KNOWN[module][1]


def counted_state(module: nn.Module) -> tuple | None:
    """Return what changes when a weight is written; `None` if weights come and go, or have no counters.

    Writing past torch's counters (`parameter.data`) is seen by where the numbers lie, and by a sample of them.
    """
    if is_scattered(module):
        return None
    tensors = [*module.parameters(), *module.buffers()]
    if any(
        hasattr(tensor, "__tensor_flatten__") or tensor.is_quantized or tensor.is_inference() for tensor in tensors
    ):
        return None
    counters = [(id(tensor), tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in tensors]
    flat = [tensor.detach().reshape(-1) for tensor in tensors if tensor.numel()]
    samples = [part[:: max(1, len(part) // NUM_SAMPLED)].double().cpu() for part in flat]
    return (*counters, hashlib.sha256(torch.cat(samples).numpy().tobytes()).digest() if samples else b"")


def is_scattered(module: nn.Module) -> bool:
    """Return whether weights come and go with each forward, as sharded and offloaded ones do."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    is_moved = any(tensor.is_meta or hasattr(tensor, "full_tensor") for tensor in tensors)
    return is_moved or hasattr(module, "unshard") or any(hasattr(part, "_hf_hook") for part in module.modules())


def weights_state(module: nn.Module) -> tuple:
    """Return what changes when weights are written or adapters switched, without reading any value.

    Writing past torch's counters (`parameter.data`) does not change it. Weights that come and go with each forward, as
    sharded and offloaded ones do, have no counters that last: for them only adapters are compared.
    """
    if is_scattered(module):
        return tuple(adapters_at_work(module))
    tensors = [*module.parameters(), *module.buffers()]
    # A tensor counts the writes to it; one made in inference mode has no counter.
    versions = [(id(tensor), tensor.dtype, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    return (*versions, *adapters_at_work(module))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of what determines a tokenizer's ids, in hexadecimal digits.

    Padding and truncation do not, and calls change them.
    """
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {name: part for name, part in content.items() if name not in ("padding", "truncation")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unwrapped(model: Any) -> nn.Module:
    """Return the model without its head and without what adapters and data parallelism put around it."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of adapters
    while isinstance(getattr(model, "module", None), nn.Module):  # of data parallelism
        model = model.module
    return model.base_model


class MemoryWriter:
    """The weights that wrote a memory.

    It is the module itself while that exists, and only their fingerprint if the memory was saved and loaded again.

    Args:
        module (`nn.Module`, *optional*): held weakly.
        fingerprint (`bytes`, *optional*): in its place.
    """

    def __init__(self, module: nn.Module | None = None, fingerprint: bytes | None = None):
        self.module = None if module is None else weakref.ref(module)
        self.state = None if module is None else weights_state(module)
        self.adapters = None if module is None else adapters_at_work(module)
        self.settings = None if module is None else changeable_settings(module)
        self.known_fingerprint = fingerprint

    def is_module(self, module: nn.Module) -> bool:
        """Return whether this very module wrote the memory."""
        return self.module is not None and self.module() is module

    def fingerprint(self) -> bytes:
        """Return the fingerprint of the weights that wrote the memory.

        Raises:
            ValueError: if they have changed since, or are gone.
        """
        if self.known_fingerprint is not None:
            return self.known_fingerprint
        self.check_unchanged()
        module = None if self.module is None else self.module()
        if module is None:
            raise ValueError(
                "The model that read this memory does not exist any more, so its weights cannot be compared: read "
                "the text again."
            )
        return weights_fingerprint(module)

    def is_same(self, other: "MemoryWriter") -> bool:
        """Return whether the same weights, with the same settings, wrote two memories.

        Raises:
            ValueError: if weights are gone or have changed since.
        """
        module = None if self.module is None else self.module()
        if module is not None and other.is_module(module):
            return (self.state, self.settings) == (other.state, other.settings)
        return self is other or self.fingerprint() == other.fingerprint()

    def check_unchanged(self) -> None:
        """Raise `ValueError` if the module that wrote the memory exists and has changed since."""
        module = None if self.module is None else self.module()
        if module is None:
            return
        if (weights_state(module), changeable_settings(module)) != (self.state, self.settings):
            raise ValueError(
                "The model's weights or settings, or the adapters in use, have changed since it read this memory: "
                "read the text again."
            )

    def check_changes(self, module: nn.Module) -> None:
        """Raise `ValueError` if this very module has other adapters or settings than when it wrote the memory."""
        if adapters_at_work(module) != self.adapters:
            raise ValueError(
                "Other adapters are in use than when this memory was read: switch them back, or read the text again."
            )
        if changeable_settings(module) != self.settings:
            raise ValueError(
                "The model's configuration has changed since this memory was read: set it back, or read the text "
                "again."
            )

    def check_reader(self, module: nn.Module) -> None:
        """Raise `ValueError` if a module has other weights than those that wrote the memory."""
        if self.fingerprint() != weights_fingerprint(module):
            raise ValueError(
                "Other weights wrote this memory than this model's: those of another model, with another adapter, of "
                "other settings or in another precision. Read the text again with this model. If you know that they "
                "compute the same, load the memory by `memory_from_state_dict(..., check_weights=False)`."
            )

    # The weights that wrote a memory also wrote its copies.
    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryWriter":
        return self

    # A weak reference cannot be pickled.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None, self.fingerprint())


def note_writer(layer: Any, module: nn.Module, num_tokens: int) -> None:
    """Sign a memory by the module that is about to read on; raise if other weights wrote it.

    Adapters and settings of the same module are compared where several tokens are read at once, as a new turn is.
    Compiled code leaves out comparison and signature: it cannot take fingerprints.

    Args:
        layer: the first layer of the memory, which holds the signature as `writer`.
        module: a whole model.
        num_tokens (`int`): how many tokens it is about to read.

    Raises:
        ValueError: if other weights wrote the memory, or if other adapters or settings were in use then.
    """
    if torch.compiler.is_compiling():
        return
    if layer.writer is not None and layer.writer.is_module(module):
        if num_tokens > 1 and layer.is_initialized:
            layer.writer.check_changes(module)
        return
    if layer.writer is not None and layer.is_initialized:
        layer.writer.check_reader(module)
    layer.writer = MemoryWriter(module)


__all__ = ["MemoryWriter", "note_writer", "tokenizer_fingerprint", "unwrapped", "weights_fingerprint"]

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
"""Support for adapters of PEFT: they come off completely, and soft prompts are read once.

PEFT is not imported: a model without adapters loads without it. Its modules are known by the package of their class.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache


# Methods of PEFT that put keys and values in front of a text.
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
# What `torch.compile` puts in front of the names of a model's weights.
COMPILED_PREFIX = "_orig_mod."


def adapter_parts(model: nn.Module) -> dict[str, Any]:
    """Return the modules that PEFT put into a model, by name: wrappers of layers, and trained copies beside them."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(parent.__module__.partition(".")[0] == "peft" for parent in type(module).__mro__)
    }


def with_loadable_names(
    model: nn.Module, state_dict: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor] | None:
    """Return a state dict under the names that the model loads, without the marks of `torch.compile`.

    Args:
        state_dict (*optional*): what is to be saved; the model's state when absent.

    Returns:
        `None` if no `state_dict` is given and the model's names need no change.

    Raises:
        ValueError: if the model has no weight of some name.
    """
    if state_dict is None:
        if not any(COMPILED_PREFIX in name for name, _ in model.named_parameters()):
            return None
        state_dict = model.state_dict()
    known = {name.replace(COMPILED_PREFIX, "") for name in model.state_dict()}
    state_dict = {name.replace(COMPILED_PREFIX, ""): tensor for name, tensor in state_dict.items()}
    unknown = sorted(state_dict.keys() - known)
    if unknown:
        raise ValueError(
            f"state_dict has {len(unknown)} names that this {type(model).__name__} does not have, such as "
            f"{unknown[0]!r}: no model would load them. Pass `accelerator.get_state_dict(model)` of this very model, "
            "or leave state_dict out."
        )
    return state_dict


def _has_parts(wrapper: Any) -> bool:
    return any(True for _ in wrapper.get_base_layer().children())


class AdaptableLayer(nn.Module):
    """A layer whose adapters may lie within adapters, as those of projections in a memory whose slots are adapted too.

    They come off in one call, and an adapter that PEFT applied only in part is noticed.
    """

    # Names of the adapters that were attached before any other.
    first_adapters: frozenset[str] = frozenset()

    @property
    def unload_and_optionally_merge_module(self) -> Callable[..., nn.Module]:
        """The method that PEFT looks for on any module when it merges or unloads.

        Raises:
            AttributeError: if no adapters lie within adapters. PEFT then takes each one off by itself.
        """
        parts = adapter_parts(self)
        if not any("base_layer" in name.split(".") or hasattr(parts[name], "parameter_name") for name in parts):
            raise AttributeError("No adapters within adapters: PEFT takes each one off by itself.")
        return self._take_adapters_off

    def _take_adapters_off(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the layer without adapters: the innermost go first, merged into what they wrap if `merge`."""
        if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in self.modules()):
            raise ValueError(
                "Adapters within adapters cannot be merged into layers that are offloaded, which would lose what is "
                "written: load the model without offloading, on the CPU if need be, and merge there."
            )
        if merge:
            self.check_added_adapters(adapter_names)
        # `named_modules` lists outer modules before inner ones.
        for name, part in reversed(adapter_parts(self).items()):
            if hasattr(part, "unload_and_optionally_merge_module"):
                module = part.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            elif hasattr(part, "base_layer"):
                if merge:
                    part.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                module = part.get_base_layer()
            else:
                continue  # a part of a wrapper, which goes with it
            parent, _, child = name.rpartition(".")
            setattr(self.get_submodule(parent), child, module)
        return self

    def check_added_adapters(self, adapter_names: list[str] | None = None) -> None:
        """Raise if an active adapter would act only in part.

        That is one added after another adapter had wrapped the slots: PEFT 0.21 then passes over the projections that
        lie within the wrapper.

        Args:
            adapter_names (*optional*): the adapters to check, in place of the active ones.

        Raises:
            ValueError: if there is such an adapter.
        """
        parts = {name: part for name, part in adapter_parts(self).items() if hasattr(part, "lora_A")}
        outer = {name for name, part in parts.items() if hasattr(part, "parameter_name") and _has_parts(part)}
        if not outer or any(parts[name].disable_adapters for name in outer):
            return
        within = {name for name in parts if any(name.startswith(f"{wrapper}.") for wrapper in outer)} - outer
        late: set[str] = set().union(*(parts[name].lora_A for name in parts.keys() - outer - within))
        late -= self.first_adapters.union(*(parts[name].lora_A for name in within))
        late &= set(adapter_names or parts[min(outer)].active_adapters)
        if late:
            raise ValueError(
                f"The adapter {min(late)!r} was added to a model whose slots another adapter adapts already. PEFT "
                "then passes over the projections of persistent memories, so that only a part of it would act: load "
                "it onto the base model alone, or before the one that adapts slots."
            )


def is_class_of_shards(module_class: type) -> bool:
    """Return whether `fully_shard` of torch has made a class, or one that it is made from."""
    return any(base.__module__.startswith("torch.distributed.") for base in module_class.__mro__)


class AdaptableModel(nn.Module):
    """Part of a `PreTrainedModel` that is saved without adapters and never left with some of them on."""

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save as the library does.

        Raises:
            ValueError: if adapters are still within the model, or if the model has no weight of some name in
                `state_dict`. Weights would be saved under names that no model has.
        """
        parts = list(adapter_parts(self))
        # Adapters that transformers itself attached are saved by themselves.
        if parts and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"An adapter still wraps {len(parts)} modules, such as {parts[0]!r}, whose weights would be saved "
                "under names that no model has: save the adapter itself (`save_pretrained` of the PEFT model), merge "
                "it first (`merge_and_unload()`), or load the model again without it."
            )
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = with_loadable_names(self, state_dict)
        # `fully_shard` gives a model a class of torch's, whose file the library would save beside the weights.
        sharded: Any = type(self)
        self.__class__ = next(base for base in sharded.__mro__ if not is_class_of_shards(base))
        try:
            # `PreTrainedModel` comes next in the order of classes.
            return super().save_pretrained(  # type: ignore[misc]
                save_directory, is_main_process, state_dict, **kwargs
            )
        finally:
            self.__class__ = sharded

    def __setattr__(self, name: str, value: Any) -> None:
        """Let layers note their first adapters: PEFT ends its first adaptation by giving the model `peft_config`."""
        if name == "peft_config" and name not in self.__dict__:
            for layer in self.modules():
                if isinstance(layer, AdaptableLayer):
                    layer.first_adapters = frozenset(value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Check that no adapter is left when PEFT takes `peft_config` away, as `merge_and_unload()` and `unload()` do.

        Raises:
            ValueError: if adapters are left, which would go on acting unnoticed.
        """
        if name == "peft_config":
            left = [part for part, module in adapter_parts(self).items() if getattr(module, "active_adapters", None)]
            if left:
                raise ValueError(
                    f"PEFT has taken the outer adapters off, but {len(left)} modules within them are still adapted, "
                    f"such as {left[0]!r}. Call the same method again, until it raises nothing; or load the model "
                    "again. (`modules_to_save` must not name what contains `target_modules`.)"
                )
        super().__delattr__(name)


def check_routers(model: nn.Module) -> None:
    """Raise `ValueError` for decoding with a memory if an adapter treats a token by all that is read with it."""
    configs: Any = getattr(model, "peft_config", {})
    if any(config.peft_type == "LILY" for config in configs.values()):
        raise ValueError(
            "Lily averages its routers over all tokens that are read at once, so that a text read token by token gets "
            "other answers: pass `use_cache=False` to `generate`."
        )


def check_soft_prompt(peft_type: str, inputs: dict[str, Any], memory: Cache | None, is_first: bool) -> None:
    """Raise `ValueError` for inputs that PEFT would put together wrongly.

    Args:
        peft_type (`str`): PEFT's name of the kind of soft prompt.
        inputs, memory, is_first: as for [`prepare_for_adapters`].
    """
    if peft_type in PREFIX_TYPES:
        raise ValueError(
            f"{getattr(peft_type, 'value', peft_type)} of PEFT puts keys and values in front of a text, but a memory "
            "holds leaky sums too: use prompt tuning or LoRA."
        )
    if memory is None:
        return
    if memory.is_compileable:
        raise ValueError(
            "A static memory has no room for the soft prompt of PEFT, which `generate` does not count: leave out "
            "`cache_implementation`, or merge a LoRA in place of the soft prompt."
        )
    if memory.get_seq_length() > 0 and (is_first or inputs["input_ids"].shape[1] != 1):
        raise ValueError(
            "Behind its soft prompt PEFT lets `generate` read one new token at a time, and would drop the others: "
            "pass the whole text, without `past_key_values`, `prefill_chunk_size`, an assistant or "
            "`prompt_lookup_num_tokens`."
        )


def prepare_for_adapters(model: Any, inputs: dict[str, Any], memory_name: str, is_first: bool) -> dict[str, Any]:
    """Return what `prepare_inputs_for_generation` returns, as the adapters of PEFT need it.

    PEFT stands between `generate` and the model, and puts soft prompts in front of a text. It looks for the memory
    under its older name. Without one, it would put soft prompts in front of every token.

    Args:
        inputs: as prepared by the library.
        memory_name (`str`): of the memory in `inputs`, as this transformers calls it.
        is_first (`bool`): whether the text begins; otherwise a memory is continued.

    Raises:
        ValueError: if soft prompts would be read wrongly, or an adapter is another one for each part of a text.
    """
    memory = inputs.get(memory_name)
    if memory is not None:
        check_routers(model)
    # PEFT puts a bound method of its model in place of this one while it generates.
    caller = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", model)
    config = getattr(caller, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return inputs
    check_soft_prompt(config.peft_type, inputs, memory, is_first)
    return inputs if memory is None else inputs | {"past_key_values": memory}


__all__ = ["AdaptableLayer", "AdaptableModel", "adapter_parts", "check_routers", "prepare_for_adapters"]

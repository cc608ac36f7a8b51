# SPDX-License-Identifier: Apache-2.0
"""The two programs of an edge device, as modules of plain tensors: `Prefill` reads a prompt, `Decode` one token more.

Neither takes a cache object: the memory's tensors are inputs and outputs, in the order of `state_names`. So a runner
hands the outputs of one call to the next, and needs neither transformers nor this package. A program serves one row of
text without padding, of `max_length` tokens at most.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache


# In tokens. `torch.export` takes one and two tokens for cases of their own.
SHORTEST_PROMPT = 3


def state_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of a memory's tensors, layer by layer, in the order that the programs have them in."""
    layer: Any = StaticCache(config=config, max_cache_len=1).layers[0]
    names = list(layer.state_shapes(config))
    return [f"layers.{index}.{name}" for index in range(config.num_hidden_layers) for name in names]


class Program(nn.Module):
    """What both programs share: the model, and how long the text may become.

    Raises:
        ValueError: if the model decodes in no memory that a static cache layer holds.
    """

    def __init__(self, model: PreTrainedModel, max_length: int):
        super().__init__()
        if type(model).__name__ not in ("MemoryMosaicForCausalLM", "MemoryMosaicV2ForCausalLM"):
            raise ValueError(
                f"No program is made of a {type(model).__name__}: only MemoryMosaicForCausalLM and "
                "MemoryMosaicV2ForCausalLM decode token by token in a static memory."
            )
        self.model, self.max_length = model, max_length
        self.config = model.config
        self.names = state_names(model.config)

    def of_layers(self) -> list[list[str]]:
        """Return the names of the tensors of each layer, without the layer."""
        own = [name.split(".", 2)[2] for name in self.names]
        width = len(own) // self.config.num_hidden_layers
        return [own[start : start + width] for start in range(0, len(own), width)]


class Prefill(Program):
    """Reads a prompt `(1, T)`; returns the logits `(1, vocab)` of its last token, and the memory's tensors."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        memory = DynamicCache(config=self.config)
        logits = self.model(input_ids=input_ids, cache=memory, use_cache=True, logits_to_keep=1).logits
        tensors: list[torch.Tensor] = []
        for layer, names in zip(memory.layers, self.of_layers(), strict=True):
            states = {"keys": layer.keys, "values": layer.values, **layer.named_states(None)}
            for name in ("keys", "values"):  # with room for the tokens to come
                states[name] = F.pad(states[name], (0, 0, 0, self.max_length - states[name].shape[2]))
            tensors += [states[name] for name in names]
        return logits[:, -1], *tensors


class Decode(Program):
    """Reads one token `(1, 1)` behind `length` `(1,)` others; returns its logits `(1, vocab)`, and the new tensors."""

    def forward(self, input_ids: torch.Tensor, length: torch.Tensor, states: list[torch.Tensor]) -> Any:
        memory, given = StaticCache(config=self.config, max_cache_len=self.max_length), iter(states)
        for layer, names in zip(memory.layers, self.of_layers(), strict=True):
            restore(layer, {name: next(given) for name in names}, length)
        logits = self.model(input_ids=input_ids, cache=memory, use_cache=True).logits
        tensors: list[torch.Tensor] = []
        for layer, names in zip(memory.layers, self.of_layers(), strict=True):
            now = {"keys": layer.keys, "values": layer.values, **layer.named_states(None)}
            tensors += [now[name] for name in names]
        return logits[:, -1], *tensors


def decode_inputs(prefill: Prefill) -> dict[str, Any]:
    """Return inputs of `Decode` by which it is exported: those behind a prompt of three tokens."""
    with torch.no_grad():
        _, *states = prefill(torch.ones(1, SHORTEST_PROMPT, dtype=torch.long))
    # Copied: where an axis has one column, strides of another order count as contiguous, and XNNPACK would
    # take them for the order of the axes.
    states = [torch.empty(state.shape, dtype=state.dtype).copy_(state) for state in states]
    return {
        "input_ids": torch.ones(1, 1, dtype=torch.long),
        "length": torch.tensor([SHORTEST_PROMPT]),
        "states": states,
    }


def description(decode: Decode) -> dict[str, Any]:
    """Return what a runner has to know of the programs, fit for JSON."""
    return {"max_length": decode.max_length, "shortest_prompt": SHORTEST_PROMPT, "states": decode.names}


def restore(layer: Any, tensors: dict[str, torch.Tensor], length: torch.Tensor) -> None:
    """Fill a static cache layer that has read nothing with the tensors of one that has read `length` tokens.

    The layer is for one pass alone: it takes new tensors in the place of its own, and writes on none. Exported, writes
    in place become copies, which XNNPACK 1.5.1 gives another shape where the width of an axis is 1.
    """
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    layer.device, layer.cumulative_length = layer.keys.device, length[0]
    layer.batch_size, layer.num_heads, _, layer.k_head_dim = layer.keys.shape
    layer.v_head_dim, layer.is_initialized = layer.values.shape[3], True
    layer.get_state = layer.states.get
    layer.set_state = functools.partial(replace_state, layer)
    layer.update = functools.partial(add_pair, layer)
    layer.keep_windows = functools.partial(replace_windows, layer)
    layer.set_states({name: tensor for name, tensor in tensors.items() if name not in ("keys", "values")})
    layer.knows_ids = False  # of the text: nothing asks for it on a device


def replace_state(layer: Any, name: str, trajectory: torch.Tensor) -> None:
    layer.states[name] = trajectory[:, :, -1:]


def add_pair(layer: Any, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    place = layer.cumulative_length[None]
    layer.keys, layer.values = layer.keys.index_copy(2, place, key), layer.values.index_copy(2, place, value)
    return layer.keys, layer.values


def replace_windows(layer: Any, new: Any, extended: dict[str, torch.Tensor], size: int, is_token: Any) -> None:
    layer.windows = {name: tensor[:, :, -size:] for name, tensor in extended.items()}

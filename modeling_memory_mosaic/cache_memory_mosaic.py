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
"""The memory of a Memory Mosaic: stored pairs and the last vectors of three running states.

`DynamicCache` and `StaticCache` build these layers by themselves from a `MemoryMosaicConfig`. Slot t of a layer
holds the pair that completes when token t arrives, (key of token t-1, value of token t-1); slot 0 is empty. So the
strict rule "a token retrieves earlier pairs only" is plain causality over slots, and there is one slot per token.

The first layer also knows what was read (`ReadText`) and which weights read it (`MemoryWriter`), so that no other
text and no other model continue a memory.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_torchdynamo_compiling

from .identity_memory_mosaic import MemoryWriter
from .ops_memory_mosaic import HeadScalars


# What outputs call the memory: `cache` from transformers 5.24 on, which warns of the old name, `past_key_values`.
MEMORY_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_memory(past_key_values: Cache | None, cache: Cache | None, warn: bool = True) -> Cache | None:
    """Return the memory, under whichever of its two names it was given.

    transformers calls it `cache` from 5.24 on, and then warns of the old name where a caller uses it (`warn`).

    Raises:
        ValueError: if two different memories are given, or a [`MosaicMemory`], which is no cache.
    """
    for memory in (past_key_values, cache):
        if hasattr(memory, "to_cache"):
            raise ValueError(
                f"A {type(memory).__name__} is not read itself, but by a copy: pass the arguments that "
                "`memory.prompt(question, tokenizer)` returns, as in `model.generate(**memory.prompt(...))`, or the "
                "cache that `memory.to_cache()` returns."
            )
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "`past_key_values` and `cache` are two names of one memory, but two memories are given: pass one."
        )
    # PEFT passes both names: nothing that a caller could change.
    has_old_name = past_key_values is not None and cache is None
    if warn and has_old_name and MEMORY_NAME == "cache" and not is_torchdynamo_compiling():
        warnings.warn(
            "`past_key_values` is deprecated, as in transformers itself from 5.24 on: use `cache` instead.",
            FutureWarning,
            stacklevel=2,
        )
    return past_key_values if cache is None else cache


def memory_kwargs(memory: Cache | None) -> dict[str, Any]:
    """Return the memory as a keyword argument of models and outputs, by the name that this transformers uses."""
    return {MEMORY_NAME: memory}


class ReadText:
    """The text that a memory has read, by which `generate` knows whether ids are new.

    - `read_ids` `(B, tokens)`, `None` if any of the text came as embeddings,
    - `read_mask` `(B, tokens or fewer)`, False at padding; columns that it does not cover are tokens,
    - `writer`: the weights that have read it,
    - `num_joined`: how many of its tokens are those of texts that were read alone and joined; then a text begins,
    - `bandwidth`: exponent and start of the growth of kernels, in place of the configuration's where not `None`.
    """

    # Every class that inherits this one has it.
    get_seq_length: Callable[..., int]

    def forget_text(self) -> None:
        """Forget the text and its writer."""
        self.knows_ids = True  # until something comes as embeddings
        self.read_ids: torch.Tensor | None = None
        self.read_mask: torch.Tensor | None = None
        self.writer: MemoryWriter | None = None
        self.num_joined = 0
        self.bandwidth: tuple[float | None, int | None] = (None, None)

    def note_text(self, input_ids: torch.Tensor | None, is_token: torch.Tensor | None) -> None:
        """Keep the ids `(B, T)` that are about to be read.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`, *optional*): absent if embeddings are read.
            is_token (`torch.Tensor` of shape `(B, T)`, *optional*): False at padding. All are tokens when absent.
        """
        num_read = self.get_seq_length()
        # Pairs may have been stored without their ids: then the whole text is unknown.
        if input_ids is None or (num_read > 0 and self.read_ids is None):
            self.knows_ids = False
        if input_ids is None or not self.knows_ids:
            self.read_ids = None
        else:
            # Cut first: a call that failed may have noted more than the memory then held.
            before = input_ids[:, :0] if self.read_ids is None else self.read_ids[:, :num_read]
            self.read_ids = torch.cat([before, input_ids], dim=1).long()
        if is_token is not None:
            before = is_token[:, :0] if self.read_mask is None else self.read_mask[:, :num_read]
            self.read_mask = torch.cat([F.pad(before, (0, num_read - before.shape[1]), value=True), is_token], dim=1)

    def past_mask(self) -> torch.Tensor | None:
        """Return where the text has tokens `(B, tokens)`, False at padding; `None` if there is no padding."""
        if self.read_mask is None:
            return None
        num_read = int(self.get_seq_length())
        return F.pad(self.read_mask, (0, max(0, num_read - self.read_mask.shape[1])), value=True)[:, :num_read]

    def past_ids(self) -> torch.Tensor | None:
        """Return the ids that were read `(B, tokens)`; `None` if they are not known."""
        return None if self.read_ids is None else self.read_ids[:, : int(self.get_seq_length())]

    def _map_text(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.read_ids = None if self.read_ids is None else function(self.read_ids)
        self.read_mask = None if self.read_mask is None else function(self.read_mask)

    def _cut_text(self, num_left: int) -> None:
        self._map_text(lambda columns: columns[:, :num_left])


class MemoryMosaicStates(ReadText, CacheLayerMixin):
    """The running states of one layer, by name, each the last vector of a trajectory `(B, H, T, D)`.

    - `contextual_sum`, `persistent_sum`: the leaky sums of the two key extractors, in float32,
    - `pending_value`: the projected value that waits for its next token.

    They stay on the model's device when pairs are offloaded: they are small, and needed before the pairs are.
    While the past is recorded (`activate_past_recording`), trajectories are kept whole so that `crop` can roll back.

    `slot_bias` `(B, H or 1, S)`, in float32, is added to the scores of each slot: -inf for an empty one, log n for one
    that stands for n pairs. `None`: slot 0 alone is empty, or the mask says which are.

    The first layer of a memory also keeps the text, for all layers.
    """

    state_names: tuple[str, ...] = ("contextual_sum", "pending_value", "persistent_sum")
    # Sized by the first tensors that arrive: nothing to allocate ahead of them.
    supports_early_init = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.states: dict[str, torch.Tensor] = {}
        self.scalars: dict[str, HeadScalars] = {}  # of the weights that read, by kind of memory
        self.record_past = False
        self.slot_bias: torch.Tensor | None = None
        # Of joined texts that many pairs make up, see `nearest`: what finds pairs, shared with the memory.
        self.index: dict[Any, Any] | None = None
        self.search: Any = None
        self.forget_text()

    def get_state(self, name: str) -> torch.Tensor | None:
        """Return the last vector `(B, H, 1, D)` of a state; `None` before the first token."""
        trajectory = self.states.get(name)
        return trajectory if trajectory is None or trajectory.shape[2] == 1 else trajectory[:, :, -1:]

    def set_state(self, name: str, trajectory: torch.Tensor) -> None:
        """Continue a state by `trajectory` `(B, H, T, D)`; only its last vector stays unless the past is recorded."""
        if not self.record_past:
            # Cloned: a view would keep the vectors of all tokens.
            trajectory = trajectory if trajectory.shape[2] == 1 else trajectory[:, :, -1:].clone()
        elif name in self.states:
            trajectory = torch.cat([self.states[name], trajectory], dim=2)
        self.states[name] = trajectory

    def continue_sum(
        self, name: str, sums: torch.Tensor, previous: torch.Tensor | None, leak: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the last of new sums `(B, H, T, D)` that went on from `previous`, and return both.

        The states of a text that processes share change both, see [`StretchStates`].
        """
        self.set_state(name, sums)
        return sums, previous

    def value_before(self, name: str, projected: torch.Tensor) -> torch.Tensor | None:
        """Return the value `(B, H, 1, D)` that waits for the first of new ones `(B, H, T, D)`; `None` if none does."""
        return self.get_state(name)

    def named_states(self, past_mask: torch.Tensor | None) -> dict[str, Any]:
        """Return what a memory is saved with, beside its pairs, by name.

        Args:
            past_mask (`torch.Tensor` of shape `(B, tokens)`, *optional*): of the text, False at padding.
        """
        return {name: self.get_state(name) for name in self.state_names}

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Set the states that [`MemoryMosaicStates.named_states`] returned, of a layer that has read nothing."""
        for name, state in states.items():
            self.set_state(name, state)

    def state_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, int | None, int]]:
        """Return heads, columns (`None`: one for each token) and width of each tensor of a layer, by its name."""
        sizes: Any = config
        of_pairs = (sizes.num_attention_heads, None, sizes.head_dim)
        of_states = (sizes.num_attention_heads, 1, sizes.head_dim)
        return {"keys": of_pairs, "values": of_pairs, **dict.fromkeys(self.state_names, of_states)}

    @property
    def has_biases(self) -> bool:
        """Whether slots have biases, so that no token reads without them."""
        return self.slot_bias is not None

    def begin_with(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store pairs `(B, H, S, D)` of texts that were read before, in a layer that has read nothing."""
        self.update(keys, values)

    def begin_text(self, slot_bias: torch.Tensor) -> None:
        """Let a text begin behind the slots that are stored, whose biases `(B, H or 1, S)` are given."""
        self.slot_bias = slot_bias

    def add_slot_bias(self, new: torch.Tensor) -> torch.Tensor:
        """Store the bias of new slots `(B, 1, T)`, and return that of all, `(B, H or 1, S)`."""
        if self.slot_bias is None:
            raise RuntimeError("This layer has no biases, although the first one has: the memory is damaged.")
        self.slot_bias = torch.cat([self.slot_bias, new.expand(-1, self.slot_bias.shape[1], -1)], dim=2)
        return self.slot_bias

    def num_pairs(self) -> torch.Tensor:
        """Return the number of joined pairs of each row `(B, 1)`, those that a slot stands for included."""
        return self.slot_bias[:, 0, : self.num_joined].exp().sum(-1, keepdim=True)

    def check_precision(self, dtype: torch.dtype) -> None:
        """Raise `ValueError` if pairs of another precision are stored than a model computes in."""
        if self.keys is None or not self.is_initialized or self.keys.dtype == dtype:
            return
        raise ValueError(
            f"The memory holds pairs in {self.keys.dtype}, but the model reads on in {dtype}: read the text again in "
            "this precision, or save the memory before the model is converted and load it by "
            f"`memory_from_state_dict(config, tensors, dtype={dtype}, check_weights=False)`."
        )

    def check_room(self, num_tokens: int) -> None:
        """Raise `ValueError` if a static layer cannot take so many more tokens. One that grows always can."""

    def num_rows(self) -> int:
        """Return the number of rows of the text; 0 before anything was read."""
        return 0 if self.keys is None or not self.is_initialized else self.keys.shape[0]

    def _map_states(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {name: function(state) for name, state in self.states.items()}

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._map_states(function)
        self._map_text(function)
        self.slot_bias = None if self.slot_bias is None else function(self.slot_bias)

    def activate_past_recording(self) -> None:
        """Keep trajectories from now on, so that `crop` can take tokens back."""
        self.record_past = True

    def deactivate_past_recording(self) -> None:
        """Keep last vectors only, as before `activate_past_recording`: what was read so far stays read."""
        self.record_past = False
        self._map_states(lambda trajectory: trajectory[:, :, -1:].contiguous())

    def reset(self) -> None:
        super().reset()
        self.states, self.scalars, self.slot_bias, self.index = {}, {}, None, None
        self.forget_text()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))


class GrowingStorage:
    """Storage of keys or of values that doubles when it is full, so that new ones are written in place.

    It holds at most twice the memory in use, and for the moment of doubling the old storage besides.
    Only the newest view of it is written on. Other views, such as those of a memory's copy, keep what they show: they
    are copied before they grow. So is everything while gradients are recorded, which may need what was there before.
    """

    def __init__(self) -> None:
        self.newest: weakref.ref[torch.Tensor] | None = None  # weak: an offloaded memory leaves nothing behind
        self.capacity = 0

    def begin(self, stored: torch.Tensor) -> None:
        """Let pairs of others be the newest: they are copied when it grows, which makes room at once."""
        self.newest, self.capacity = weakref.ref(stored), stored.shape[-2]

    def append(self, stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Return `stored` `(B, H, S, D)` and behind it `new` `(B, H, T, D)`, of which both are copied at most once."""
        length, end = stored.shape[-2], stored.shape[-2] + new.shape[-2]
        is_newest = self.newest is not None and self.newest() is stored
        is_frozen = stored.is_inference() and not torch.is_inference_mode_enabled()
        is_transformed = torch._C._are_functorch_transforms_active()
        if not is_newest or is_frozen or is_transformed or torch.is_grad_enabled():
            # Without room behind it: a memory that is reordered after each token would make it in vain.
            grown, self.capacity = torch.cat([stored, new], dim=-2), end
        else:
            batch_size, num_heads, _, width = stored.shape
            if end > self.capacity:
                self.capacity = max(2 * length, end)
                storage = stored.new_empty(batch_size, num_heads, self.capacity, width)
                storage.narrow(2, 0, length).copy_(stored)
            else:
                storage = stored.as_strided((batch_size, num_heads, self.capacity, width), stored.stride())
            storage.narrow(2, length, end - length).copy_(new)
            grown = storage.narrow(2, 0, end)
        self.newest = weakref.ref(grown)
        return grown

    # A copy of a memory has tensors of its own, and a weak reference cannot be pickled.
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def without_room(tensor: Any) -> Any:
    """Return a tensor without the room that its storage has behind it; anything else as it is."""
    has_room = isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if has_room else tensor


class MemoryMosaicCacheLayer(MemoryMosaicStates, DynamicLayer):
    """Grows with the text. Built by `DynamicCache(config=model.config)`."""

    _layer_type = "memory_mosaic"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.key_storage, self.value_storage = GrowingStorage(), GrowingStorage()

    # For copies and files, which need neither room nor what a token computes again.
    def __getstate__(self) -> dict[str, Any]:
        pairs = {name: without_room(getattr(self, name)) for name in ("keys", "values")}
        return {**self.__dict__, **pairs, "scalars": {}}

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store pairs `(B, H, T, D)` and return all, `(B, H, S, D)`.

        Raises:
            ValueError: if they are of another precision than the stored ones.
        """
        self.check_precision(key_states.dtype)
        if not self.is_initialized or is_torchdynamo_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self.key_storage.append(self.keys, key_states)
        self.values = self.value_storage.append(self.values, value_states)
        return self.keys, self.values

    def begin_with(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        # Not copied: what is read behind them is written into storage of its own.
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.key_storage.begin(keys)
        self.value_storage.begin(values)

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
        self.slot_bias = None if self.slot_bias is None else self.slot_bias[:, :, :num_left]

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
                "tokens you may want to take back, or read the shorter text again."
            )
        self._map_states(lambda trajectory: trajectory[:, :, :-num_tokens])


class ContinuousMemoryMosaicCacheLayer(MemoryMosaicCacheLayer):
    """Layer of a `ContinuousMemoryMosaicModel`. Its only running state is the last key, or the leaky sum of keys."""

    _layer_type = "continuous_memory_mosaic"
    state_names = ("contextual_sum",)


class MemoryMosaicStaticCacheLayer(MemoryMosaicStates, StaticLayer):
    """Holds `max_cache_len` tokens at fixed addresses. Built by `StaticCache(config=..., max_cache_len=...)`."""

    _layer_type = "memory_mosaic"

    def check_room(self, num_tokens: int) -> None:
        # Compiled, the length is not known before the graph runs.
        if is_torchdynamo_compiling():
            return
        length = int(self.get_seq_length())
        if length + num_tokens > self.max_cache_len:
            raise ValueError(
                f"A static memory of max_cache_len={self.max_cache_len} holds {length} tokens already, so that "
                f"{num_tokens} more do not fit: make it longer, or use one that grows, "
                "`DynamicCache(config=model.config)`."
            )

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
        new_ids = input_ids.long() if input_ids is not None and self.knows_ids else None
        for name, new in (("read_ids", new_ids), ("read_mask", is_token)):
            if new is not None and getattr(self, name) is None:
                setattr(self, name, new.new_ones(new.shape[0], self.max_cache_len))
            if new is not None:
                places = torch.arange(new.shape[1], device=new.device) + self.cumulative_length.to(new.device)
                getattr(self, name).index_copy_(1, places, new)
        if not self.knows_ids:
            self.read_ids = None

    def begin_text(self, slot_bias: torch.Tensor) -> None:
        self.slot_bias = F.pad(slot_bias, (0, self.max_cache_len - slot_bias.shape[2]), value=-torch.inf)

    def add_slot_bias(self, new: torch.Tensor) -> torch.Tensor:
        places = torch.arange(new.shape[2], device=new.device) + self.cumulative_length.to(new.device)
        return self.slot_bias.index_copy_(2, places, new.expand(-1, self.slot_bias.shape[1], -1))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def _map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Other rows have other addresses: a compiled step compiles again."""
        if self.keys is not None and self.values is not None and self.is_initialized:
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


def memory_layer(memory: Cache, index: int = 0) -> MemoryMosaicStates:
    """Return one layer of a memory of this model. The first one also keeps the text."""
    layer: Any = memory.layers[index]
    return layer


def text_of(memory: Any) -> Any:
    """Return the part of a memory that keeps its text ([`ReadText`]): the memory itself, or its first layer.

    `None` for other caches. The part is known by its methods: a model loaded with `trust_remote_code=True` has classes
    of its own.
    """
    for part in (memory, *list(getattr(memory, "layers", ()))[:1]):
        if hasattr(part, "past_ids"):
            return part
    return None


def check_num_rows(num_stored: int, num_rows: int) -> None:
    """Raise `ValueError` if a memory of `num_stored` rows (0: empty) cannot go on with `num_rows` rows."""
    if num_stored not in (0, num_rows):
        raise ValueError(
            f"The memory holds {num_stored} rows, but {num_rows} are passed: they must be as many. Copy rows by "
            "`memory.batch_repeat_interleave(times)`, choose some by `memory.batch_select_indices(rows)`."
        )


def check_memory(memory: Cache, config: PreTrainedConfig, num_rows: int) -> None:
    """Raise if a memory is not one of the model's kind, or holds other rows than are to be read.

    Args:
        memory: as a caller has given it.
        config: of the model; its `layer_types` are the kind of its cache layers.
        num_rows: of the new tokens.

    Raises:
        ValueError: if the memory has too few layers or layers of another kind, or another number of rows, or a static
            one is exported.
    """
    layers: Any = getattr(memory, "layers", ())  # a tuple of tensors, as older code made them, has none
    is_static = getattr(memory, "is_compileable", False)
    # Within an export, tensors that are inputs of the program, or computed from them, are fake ones.
    if torch.compiler.is_exporting() and is_static and not isinstance(layers[0].keys, FakeTensor):
        raise ValueError(
            "`torch.export` of a static memory is not supported if its tensors are no inputs of the program: they "
            "would be constants of it. Export with `use_cache=False`, or make them inputs, as `serving/edge` does."
        )
    # By name, as a model loaded with `trust_remote_code=True` has classes of its own. More layers than the model uses
    # are in order: decoding with an early exit lowers num_hidden_layers.
    kinds = set(config.layer_types)
    is_of_kind = all(getattr(layer, "_layer_type", None) in kinds for layer in layers)
    if len(layers) < config.num_hidden_layers or not is_of_kind:
        raise ValueError(
            f"This {type(memory).__name__} was not made for this model. Build it from the model's config: "
            "`DynamicCache(config=model.config)`. (A cache that prefix tuning of PEFT makes is refused too: use LoRA.)"
        )
    if not hasattr(layers[0], "check_precision"):
        raise ValueError(
            "The layers of this memory come from another version of this code, which was loaded later in this "
            "process: load the models of two versions in processes of their own."
        )
    check_num_rows(layers[0].num_rows(), num_rows)


__all__ = ["ContinuousMemoryMosaicCacheLayer", "MemoryMosaicCacheLayer", "MemoryMosaicStaticCacheLayer"]

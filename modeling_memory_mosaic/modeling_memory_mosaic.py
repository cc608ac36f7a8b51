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
"""Memory Mosaics (arXiv 2405.06394): language models whose every layer is a set of associative memories.

Notable features:
- no positions and no query projection: a token's key is its query to the pairs of keys and values stored before it
- keys are leaky averages of the past, values look one token ahead
- persistent memories, of learnt pairs, in place of feed-forward layers
- one bandwidth, leak and value scale per head, without weight decay
- exact continuation from a memory, by chunks of any length; padding and packed documents change nothing
- attention functions of transformers (sdpa, flex or eager); all else is linear in T

The memories themselves are in `memories_memory_mosaic.py`. Shapes use B batch, T tokens, H heads (memories per layer),
D head width, C = hidden size, N persistent slots per head, S slots of a memory (one per token).

Docstrings are written by hand (TRF057): the library's generator of them knows the models within the library only.
"""

import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .adapters_memory_mosaic import AdaptableLayer, AdaptableModel
from .bounded_memory_mosaic import bind_memory
from .cache_memory_mosaic import MEMORY_NAME, check_memory, memory_kwargs, memory_layer, one_memory
from .configuration_memory_mosaic import MemoryMosaicConfig
from .generation_memory_mosaic import MemoryMosaicGenerationMixin
from .identity_memory_mosaic import note_writer
from .layout_memory_mosaic import (
    SharedTexts,
    Stretch,
    as_columns,
    check_same_texts,
    check_shared,
    filled_tokens,
    lay_out,
    shared_loss,
)
from .masking_memory_mosaic import (
    check_inputs,
    create_memory_masks,
    find_documents,
    pop_packing,
    raise_where,
    stretch_masks,
)
from .memories_memory_mosaic import (
    PARAMETER_SCALE,
    MemoryMosaicContextualMemory,
    MemoryMosaicPersistentMemory,
    MemoryMosaicTokenMemory,
)
from .ops_memory_mosaic import embed_ids, forward_fill, loss_without_logits, positions_to_keep
from .store_memory_mosaic import MemorizingMixin


class MemoryMosaicDecoderLayer(AdaptableLayer, GradientCheckpointingLayer):
    """One block: a contextual memory, then a persistent one, each added to the residual stream."""

    def __init__(self, config: MemoryMosaicConfig, layer_idx: int):
        super().__init__()
        self.contextual_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.contextual_memory = MemoryMosaicContextualMemory(config, layer_idx)
        self.persistent_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.persistent_memory = MemoryMosaicPersistentMemory(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,
        slot_mask: Any = None,
        is_token: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        slot_bias: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        shared_texts: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Return the residual stream `(B, T, C)`; arguments as for [`MemoryMosaicContextualMemory`].

        `shared_texts` stands for a memory where processes share texts ([`context_parallel`]).
        """
        # By another name than a memory, which the library takes away under gradient checkpointing.
        past_key_values = past_key_values if shared_texts is None else shared_texts
        # PEFT has put a wrapper around the memory, whose slots it adapts.
        if not isinstance(self.persistent_memory, MemoryMosaicPersistentMemory):
            self.check_added_adapters()
        shared = {"is_token": is_token, "document_ids": document_ids, "past_key_values": past_key_values, **kwargs}
        own = {"slot_mask": slot_mask, "query_scale": query_scale, "slot_bias": slot_bias}
        retrieved, _ = self.contextual_memory(self.contextual_norm(hidden_states), **own, **shared)
        hidden_states = hidden_states + retrieved
        return hidden_states + self.persistent_memory(self.persistent_norm(hidden_states), **shared)


# trf-ignore: TRF057
class MemoryMosaicPreTrainedModel(MemorizingMixin, AdaptableModel, PreTrainedModel):
    """Base class of all Memory Mosaics: initialisation, saving, and what the library may do with them."""

    config: MemoryMosaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryMosaicDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # The leaky sums of one stretch of a text continue those of the stretch before it.
    _supports_context_parallel = False
    _can_record_outputs = {
        "hidden_states": MemoryMosaicDecoderLayer,
        "attentions": MemoryMosaicContextualMemory,
    }
    # Whether `context_parallel` takes it, whose way of sharing a text is this package's own.
    reads_stretches = False
    # Per-head scalars: decaying them would pull every kernel towards one bandwidth.
    no_weight_decay_names: tuple[str, ...] = ("key_leak", "key_scale", "value_scale", "value_mix")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise by the distributions of the authors' `Library` (memory_mosaics.py).

        | parameter | start |
        | --- | --- |
        | `k_proj`, `v_proj`, `lm_head`, `score`, tied `embed_tokens` | normal, std C^-0.5 |
        | `o_proj` | normal, std (H D layers)^-0.5 |
        | `embed_tokens`, not tied | normal, std 1 |
        | `slot_keys`, `slot_values` | normal, std D^-0.5 |
        | leak, times 10 | 0.5 to 5 evenly over heads |
        | `key_scale`, `value_scale`, times 10 | 1, -0.5 |
        | `value_mix` | uniform in [0, 1) |
        | biases | 0 |
        """
        config = self.config
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Tied, the embedding is initialised as the head that it also is.
            init.normal_(module.weight, std=config.hidden_size**-0.5 if config.tie_word_embeddings else 1.0)
        elif isinstance(module, MemoryMosaicTokenMemory):
            inner_size = module.o_proj.in_features
            init.normal_(module.o_proj.weight, std=(inner_size * config.num_hidden_layers) ** -0.5)
            leaks = torch.linspace(0.5, 5.0, config.num_attention_heads, device="cpu") / PARAMETER_SCALE
            init.copy_(module.key_leak, leaks)
            init.constant_(module.key_scale, 1.0 / PARAMETER_SCALE)
            init.constant_(module.value_scale, -0.5 / PARAMETER_SCALE)
            if isinstance(module, MemoryMosaicContextualMemory):
                init.uniform_(module.value_mix, 0.0, 1.0)
            elif isinstance(module, MemoryMosaicPersistentMemory):
                init.normal_(module.slot_keys, std=module.head_dim**-0.5)
                init.normal_(module.slot_values, std=module.head_dim**-0.5)
        else:
            super()._init_weights(module)

    @classmethod
    def auto_classes(cls) -> dict[str, str]:
        """Return the class of this file that each Auto class loads."""
        module = __name__.rpartition(".")[2]
        return {
            "AutoModel": f"{module}.MemoryMosaicModel",
            "AutoModelForCausalLM": f"{module}.MemoryMosaicForCausalLM",
            "AutoModelForSequenceClassification": f"{module}.MemoryMosaicForSequenceClassification",
            # `transformers serve` 5.23 asks for this one first, and then only for classes within transformers.
            "AutoModelForDecision": f"{module}.MemoryMosaicForCausalLM",
        }

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Spread a model over processes as the library does while it loads.

        Raises:
            ValueError: if the head is the token table, of which processes would hold unequal shards. transformers
                5.24 pads such shards twice, once for each use, and an optimizer would then train one of them only.
        """
        config: Any = model.config
        shards = getattr(distributed_config, "fsdp_size", None) or 1
        parts = shards * (getattr(distributed_config, "tp_size", None) or 1)
        if shards > 1 and config.tie_word_embeddings and config.vocab_size % parts:
            raise ValueError(
                f"vocab_size={config.vocab_size} does not divide into {parts} equal shards of the table that is also "
                f"the head: call `resize_token_embeddings(None, pad_to_multiple_of={parts})` and save the model, or "
                "shard it by Accelerate's FSDP2."
            )
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save as the library does, naming all classes of this file in `config.json`: each Auto class can load it."""
        self.config.auto_map = self.auto_classes()
        return super().save_pretrained(*args, **kwargs)


# trf-ignore: TRF057
class MemoryMosaicModel(MemoryMosaicPreTrainedModel):
    """The blocks without the head. Returns hidden states and the memory."""

    reads_stretches = True

    def __init__(self, config: MemoryMosaicConfig):
        config.validate_architecture()  # fields may have been assigned since the configuration was made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.make_layer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = self.make_norm(config)
        self.gradient_checkpointing = False
        self.bound: tuple[Any, ...] | None = None  # of memories, see `bounded`
        self.search: Any = None  # in memories, see `nearest`
        self.processes: Any = None  # that share each text, see `context_parallel`
        self.post_init()

    def make_layer(self, config: MemoryMosaicConfig, layer_idx: int) -> nn.Module:
        return MemoryMosaicDecoderLayer(config, layer_idx)

    def make_norm(self, config: MemoryMosaicConfig) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)

    # trf-ignore: TRF057
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states `(B, T, C)` and the memory; arguments as for [`MemoryMosaicForCausalLM`].

        `attention_mask` may also be what [`create_memory_masks`] returns.
        """
        past_key_values = one_memory(past_key_values, cache)
        if self.processes is not None:
            check_shared(self.config, past_key_values, attention_mask)
            return self.read_stretch(input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
        if input_ids is not None and inputs_embeds is None:
            embeds = embed_ids(self.embed_tokens, input_ids, self.config.vocab_size)
        elif input_ids is None and inputs_embeds is not None:
            embeds = inputs_embeds
        else:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        check_inputs(self.config, embeds, kwargs)
        if use_cache and past_key_values is None and self.bound is not None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            self.check_memory(embeds, past_key_values)
            if self.bound is not None:
                bind_memory(past_key_values, self.bound)
            layers: list[Any] = past_key_values.layers
            for layer in layers:
                layer.search = self.search
        packing = pop_packing(kwargs, position_ids)

        # `generate` makes the masks itself where it compiles the model.
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = self.create_masks(embeds, masks, past_key_values, **packing)
        # A memory holds one text: packed documents leave none.
        if use_cache and past_key_values is None and masks["document_ids"] is None:
            past_key_values = DynamicCache(config=self.config)
        elif use_cache and past_key_values is None and is_torchdynamo_compiling():
            raise ValueError(
                "Compiled, the model cannot know whether a row holds several documents, which would leave no memory: "
                "pass `use_cache=False`, a memory of your own, or no position_ids."
            )
        if past_key_values is not None:
            note_writer(memory_layer(past_key_values), self, embeds.shape[1])
            memory_layer(past_key_values).note_text(input_ids, masks["is_token"])
        hidden_states = embeds
        if masks["is_token"] is not None:
            # Padding behind a text repeats its last token in all layers: there `generate` asks what comes next.
            hidden_states = forward_fill(embeds[:, None], masks["is_token"], None)[:, 0]
        # Decoding with an early exit lowers num_hidden_layers.
        for layer in itertools.islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(hidden_states, **masks, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **memory_kwargs(past_key_values))

    # Collectives within a graph would be other ones, and graphs as many as there are stretches.
    @torch.compiler.disable
    def read_stretch(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states `(B, L, C)` of the stretch of this process; arguments as for `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens = as_columns(cast(Any, inputs_embeds if input_ids is None else input_ids))
        check_inputs(self.config, tokens, kwargs)
        packing = pop_packing(kwargs, position_ids)
        check_same_texts(self.processes, tokens, attention_mask, *packing.values())
        stretch = lay_out(self.processes, tokens, attention_mask, packing)
        own = stretch.cut(filled_tokens(tokens, attention_mask))
        if input_ids is not None:
            own = embed_ids(self.embed_tokens, own[..., 0], self.config.vocab_size)
        # Masks need the shape, precision and place of the embeddings of whole texts, and none of their numbers.
        hidden_states, whole = own, own.new_empty(()).expand(*tokens.shape[:2], own.shape[2])
        masks = self.create_stretch_masks(whole, attention_mask, stretch, **packing)
        for layer in itertools.islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(hidden_states, **masks, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states))

    def create_stretch_masks(
        self, whole: torch.Tensor, attention_mask: torch.Tensor | None, stretch: Stretch, **packing: Any
    ) -> dict[str, Any]:
        """Return the arguments of all layers for a stretch of texts whose embeddings have the shape of `whole`."""
        masks = stretch_masks(self.config, whole, attention_mask, stretch.begin, stretch.end, **packing)
        masks |= {"is_token": stretch.is_token, "document_ids": stretch.document_ids}
        return masks | {"shared_texts": SharedTexts(stretch, len(self.layers))}

    def create_masks(
        self, embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None, **packing: Any
    ) -> dict[str, Any]:
        """Return the arguments of all layers that describe padding, documents and the past."""
        return create_memory_masks(self.config, embeds, attention_mask, past_key_values, **packing)

    def check_memory(self, embeds: torch.Tensor, past_key_values: Cache) -> None:
        """Raise `ValueError` if the model cannot read these embeddings `(B, T, C)` behind a memory."""
        if self.gradient_checkpointing and self.training:
            raise ValueError(
                "A memory cannot be read or written under gradient checkpointing, which reads everything twice: call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`, or pass `use_cache=False`."
            )
        check_memory(past_key_values, self.config, num_rows=embeds.shape[0])
        layer = memory_layer(past_key_values)
        # Under autocast norms return float32, whatever the embeddings are.
        layer.check_precision(torch.float32 if torch.is_autocast_enabled(embeds.device.type) else embeds.dtype)
        layer.check_room(embeds.shape[1])


# trf-ignore: TRF057
class MemoryMosaicForCausalLM(MemoryMosaicPreTrainedModel, MemoryMosaicGenerationMixin):
    """A Memory Mosaic that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    reads_stretches = True
    body_class: type[MemoryMosaicModel] = MemoryMosaicModel

    def __init__(self, config: MemoryMosaicConfig):
        super().__init__(config)
        self.model = self.body_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): a document begins where they do not rise;
                they mean nothing else. `seq_idx` `(B, T)` and `cu_seq_lens_q` say the same by their own conventions.
            past_key_values ([`~transformers.Cache`], *optional*): memory of what was read before; changed in place.
                `cache` is another name for it.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): not shifted; -100 is ignored, and belongs at the
                first token of each packed document.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, C)`, *optional*): in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to return the memory; `config.use_cache` when absent.
            logits_to_keep (`int` or `torch.Tensor`): compute logits of the last so many tokens (0: all), or of those
                indexed.
            skip_logits (`bool`): return the loss alone, without ever holding the logits of all tokens, which are the
                peak of memory where the vocabulary is large.

        Raises:
            ValueError: if ids, mask or packing have another form than stated, or if the memory is of another model or
                holds other rows.

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        >>> model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        >>> ids = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
        >>> tokenizer.decode(ids[0])
        ```"""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **memory_kwargs(one_memory(past_key_values, cache)),
            **kwargs,
        )
        kept = outputs.last_hidden_state[:, positions_to_keep(logits_to_keep), :]
        # Scaling the hidden states costs C operations a token, scaling the logits vocab_size.
        kept = kept / cast(float, self.config.logits_scaling)

        loss, logits = None, None
        if not skip_logits:
            logits = self.lm_head(kept)
        if self.model.processes is not None:
            loss = self.loss_of_stretch(kept, logits, labels, logits_to_keep, **kwargs)
        elif skip_logits:
            self.check_own_loss()
            loss = loss_without_logits(kept, self.lm_head, labels, **kwargs)
        elif labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **memory_kwargs(getattr(outputs, MEMORY_NAME)),
        )

    def loss_of_stretch(
        self,
        kept: torch.Tensor,
        logits: torch.Tensor | None,
        labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Return the loss of whole texts, of which this process has read a stretch; `None` without labels.

        Args:
            kept (`torch.Tensor` of shape `(B, L, C)`): scaled hidden states.
            logits (`torch.Tensor` of shape `(B, L, vocab_size)`, *optional*): absent if they are skipped.
            labels (`torch.Tensor` of shape `(B, T)`, *optional*): of whole texts.
        """
        if not isinstance(logits_to_keep, int) or logits_to_keep != 0:
            raise ValueError("Processes that share texts compute the logits of all tokens: leave logits_to_keep out.")
        if labels is None:
            return None
        self.check_own_loss()

        def loss_of_own(labels: torch.Tensor, shift_labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if logits is not None:
                kwargs |= {"labels": labels, "shift_labels": shift_labels, "vocab_size": self.config.vocab_size}
                return self.loss_function(logits=logits, **kwargs)
            # With a column more on either side, this function shifts the labels to where they stand.
            targets, states = F.pad(shift_labels, (1, 0), value=-100), F.pad(kept, (0, 0, 0, 1))
            return loss_without_logits(states, self.lm_head, targets, **kwargs)

        return shared_loss(self.model.processes, loss_of_own, labels, kept.shape[1], **kwargs)

    def check_own_loss(self) -> None:
        """Raise `ValueError` if the model has been given another loss function, which needs whole logits."""
        if self.loss_function is not ForCausalLMLoss:
            raise ValueError(
                "skip_logits=True and context parallelism compute the loss of the next token, and this model has "
                "another one."
            )


# trf-ignore: TRF057
class MemoryMosaicForSequenceClassification(MemoryMosaicPreTrainedModel):
    """A Memory Mosaic that judges a text by its hidden state at the last token."""

    body_class: type[MemoryMosaicModel] = MemoryMosaicModel

    def __init__(self, config: MemoryMosaicConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.body_class(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, 1 at tokens. Without
                it, ids equal to `pad_token_id` are taken for padding, unless that is an `eos_token_id` too.
            labels (*optional*): `(B,)` class numbers, `(B, num_labels)` floats for several labels at once, or `(B,)`
                floats with one label (regression); see `config.problem_type`.

        Returns:
            `SequenceClassifierOutputWithPast`: logits `(B, num_labels)`.

        Raises:
            ValueError: if there are several rows and nothing tells tokens from padding, if a row has no token, or if
                it holds several documents.
        """
        past_key_values = one_memory(past_key_values, cache)
        padding_id, has_ids_alone = self.padding_id(), attention_mask is None and past_key_values is None
        if has_ids_alone and input_ids is not None and padding_id is not None:
            attention_mask = input_ids != padding_id
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **memory_kwargs(past_key_values),
            **kwargs,
        )
        hidden_states, packing = outputs.last_hidden_state, {"position_ids": position_ids, **kwargs}
        # Compiled, the answer is not known.
        if not is_torchdynamo_compiling() and (
            find_documents(hidden_states, attention_mask, past_key_values, **packing) is not None
        ):
            raise ValueError("Several documents are packed in one row, which has one verdict: give each its own row.")
        logits = self.score(self.last_token(hidden_states, attention_mask))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=None, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            # The library's loss of classes counts a part of a batch by its share of the labels, its other two do not.
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                loss = loss * (labels != -100).sum() / num_items
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **memory_kwargs(getattr(outputs, MEMORY_NAME)),
        )

    def padding_id(self) -> int | None:
        """Return `pad_token_id`; `None` if that id also ends texts, as it may then stand within one."""
        ends = self.config.eos_token_id if isinstance(self.config.eos_token_id, list) else [self.config.eos_token_id]
        return None if self.config.pad_token_id in ends else self.config.pad_token_id

    def last_token(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Select from hidden states `(B, T, C)` each row's at its last token, `(B, C)`."""
        batch_size, num_tokens, _ = hidden_states.shape
        if attention_mask is None:
            if batch_size > 1:
                raise ValueError(
                    f"{batch_size} rows, but nothing tells tokens from padding: pass attention_mask. (With "
                    "input_ids, a pad_token_id that is not an eos_token_id is enough.)"
                )
            return hidden_states[:, -1]
        is_token = attention_mask[:, -num_tokens:].to(hidden_states.device, torch.bool)
        raise_where(~is_token.any(-1), "attention_mask leaves no token to judge a row by.")
        last = (torch.arange(num_tokens, device=hidden_states.device) * is_token).argmax(dim=-1)
        return hidden_states[torch.arange(batch_size, device=hidden_states.device), last]


__all__ = [
    "MemoryMosaicForCausalLM",
    "MemoryMosaicForSequenceClassification",
    "MemoryMosaicModel",
    "MemoryMosaicPreTrainedModel",
]

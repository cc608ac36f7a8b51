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
"""Memory models (arXiv 2602.13466): a decoder that reads the memories of past chunks in place of their tokens.

Notable features:
- any causal models of transformers as encoder and decoder; a Memory Mosaic by default
- each chunk of a text is encoded alone into a few vectors, its memory
- the decoder has one row for each chunk: the memories of earlier chunks, a task slot, the chunk's own tokens
- no recurrence: one pass encodes all chunks, another decodes all rows
- the task slot predicts the chunk's first token, so every token but the text's first is a target
- four objectives: next token, autoencoding, copy, blank copy
- memories of one byte a number, with the rounding in training too
- padding anywhere; a text that is read in parts has the logits of one pass

Other files, each named `..._memory_model.py`: `backbones_` has encoder and decoder, `layout_` makes chunks and rows of
texts, `reads_` brings memories into rows, `objectives_` has the losses, `generation_` reads a text in parts, `cache_`
keeps what was read, `store_` keeps memories on disk, `outputs_` has the outputs, `configuration_` the settings.

Shapes use B batch, T tokens, L tokens of a chunk, M or N memories, K vectors of a memory, D their width, R rows of the
decoder (one for each chunk), C = hidden size of the decoder, V = vocabulary.

Docstrings are written by hand (TRF057), as the library generates them only for its own models.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.import_utils import is_fake_tensor

from .adapters_memory_mosaic import AdaptableModel
from .backbones_memory_model import (
    MemoryModelBackbones,
    build_backbone,
    build_decoder,
    embedding_std,
)
from .cache_memory_model import MemoryModelCache
from .cache_memory_mosaic import MEMORY_NAME, one_memory
from .configuration_memory_model import MemoryModelConfig
from .generation_memory_model import MemoryModelGenerationMixin
from .layout_memory_model import (
    PackedText,
    TextMemories,
    check_packing,
    count_positions,
    embed_tokens,
    pack_text,
    packed_positions,
    right_aligned,
    split_into_chunks,
    take,
    visible_memories,
    without_leading_padding,
)
from .objectives_memory_model import MemoryModelObjectives
from .outputs_memory_model import (
    MemoryModelEncoderOutput,
    MemoryModelOutput,
    decoder_states,
    map_layers,
    requested_states,
    states_at,
)
from .reads_memory_model import BEGIN, MemoryModelCrossRead, MemoryModelReader
from .store_memory_model import (
    check_memories,
    encoder_fingerprint,
    fake_quantize,
    memories_from_rows,
    memories_from_tensors,
    memories_to_rows,
    memories_to_tensors,
)


# The recipes `memory_positions` and `memory_capacity` compare what these choose:
# trf-ignore: TRF041 memory_pooling, encoder_chunk_positions, decoder_chunk_positions, memory_size, memory_read
# trf-ignore: TRF041 freeze_encoder, freeze_decoder, tie_encoder_embeddings, encoder_layer, max_memories
# trf-ignore: TRF041 memory_quantization, chunk_length, causal_weight, model_type


# trf-ignore: TRF057
class MemoryModelPreTrainedModel(AdaptableModel, PreTrainedModel):
    """Base class of the encoder and the whole model: initialisation, and saving together with this code."""

    config: MemoryModelConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _tied_weights_keys = {}  # a dictionary, where PEFT looks for those of the backbones
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.config.vocab_size = value

    # Backbones initialise themselves. trf-ignore: TRF018
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what is not part of a backbone: slots, positions, and the maps from a memory."""
        if isinstance(module, MemoryModelEncoder):
            std = embedding_std(module.backbone)
            for parameter in (module.summary_embeddings, module.chunk_positions):
                if parameter is not None:
                    init.normal_(parameter, std=std)
            if module.memory_proj is not None:
                init.normal_(module.memory_proj.weight, std=module.memory_proj.in_features**-0.5)
        elif isinstance(module, MemoryModelReader):
            for parameter in (module.slot_embeddings, module.chunk_positions):
                if parameter is not None:
                    init.normal_(parameter, std=self.config.initializer_range)
            for linear in (module.prefix_proj, *module.unroll_projs):
                if linear is not None:
                    init.normal_(linear.weight, std=self.config.initializer_range * linear.in_features**-0.5)
            if module.gate_proj is not None:
                init.zeros_(module.gate_proj.weight)
                init.zeros_(module.gate_proj.bias)
        elif isinstance(module, MemoryModelCrossRead):
            for parameter in (module.place_embeddings, module.window_embeddings):
                init.normal_(parameter)
            for linear in (module.q_proj, module.k_proj, module.v_proj, module.distance_proj):
                init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.zeros_(module.o_proj.weight)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as the library does, and name all classes of this file in `config.json` for the Auto classes."""
        module = __name__.rpartition(".")[2]
        self.config.auto_map = {
            "AutoConfig": "configuration_memory_model.MemoryModelConfig",
            "AutoModel": f"{module}.MemoryModelEncoder",
            "AutoModelForCausalLM": f"{module}.MemoryModelForCausalLM",
            # `transformers serve` 5.23 asks for this one first, and then only for classes within transformers.
            "AutoModelForDecision": f"{module}.MemoryModelForCausalLM",
        }
        return super().save_pretrained(*args, **kwargs)


# trf-ignore: TRF057
class MemoryModelEncoder(MemoryModelPreTrainedModel):
    """Encodes each chunk of a text, alone, into the vectors of its memory."""

    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^reader\."]

    def __init__(self, config: MemoryModelConfig):
        super().__init__(config)
        width = config.encoder.hidden_size
        self.backbone = build_backbone(config.encoder)
        num_positions = count_positions(self.backbone)
        num_slots = config.chunk_length + (config.num_memory_embeddings if config.memory_pooling == "summary" else 0)
        if num_positions is not None and num_slots > num_positions:
            raise ValueError(
                f"The encoder reads a chunk of chunk_length={config.chunk_length} tokens in {num_slots} slots, but "
                f"has {num_positions} learnt positions: lower chunk_length, or take an encoder without such a table."
            )
        self.summary_embeddings = self.chunk_positions = self.memory_proj = None
        if config.memory_pooling == "summary":
            self.summary_embeddings = nn.Parameter(torch.empty(config.num_memory_embeddings, width))
        if config.encoder_chunk_positions:
            self.chunk_positions = nn.Parameter(torch.empty(config.chunk_length, width))
        if config.memory_size != width:
            self.memory_proj = nn.Linear(width, config.memory_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.encoder = self.backbone.config
        self.config.vocab_size = self.backbone.config.vocab_size
        return embeddings

    def fingerprint(self) -> bytes:
        """Return the sha256 of all weights and of the settings that shape a memory; see [`weights_fingerprint`]."""
        return encoder_fingerprint(self)

    def run_backbone(self, chunks: torch.Tensor, **requested: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Return the memories `(N, K, D)` of chunks `(N, L)`, and the backbone's outputs."""
        embeds = embed_tokens(self.backbone, chunks)
        if self.chunk_positions is not None:
            embeds = embeds + self.chunk_positions
        if self.summary_embeddings is not None:
            embeds = torch.cat([embeds, self.summary_embeddings.expand(embeds.shape[0], -1, -1)], dim=1)
        is_last = self.config.encoder_layer == -1
        asked = requested if is_last else requested | {"output_hidden_states": True}
        outputs = self.backbone(inputs_embeds=embeds, use_cache=False, return_dict=True, **asked)
        states = outputs.last_hidden_state if is_last else outputs.hidden_states[self.config.encoder_layer]
        if self.config.memory_pooling == "mean":
            memories = states.mean(dim=1, keepdim=True)
        else:
            memories = states[:, -self.config.num_memory_embeddings :]
        if memories.dtype != embeds.dtype and not torch.is_autocast_enabled(memories.device.type):
            memories = memories.to(embeds.dtype)  # Mamba sums up in float32, whatever its weights
        if self.memory_proj is not None:
            memories = self.memory_proj(memories)
        return fake_quantize(memories, self.config.memory_quantization), outputs

    def encode_chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """Return the memories `(N, K, D)` of chunks `(N, L)`.

        A part of `forward`: from outside call the encoder itself, so that hooks fetch weights that are offloaded or
        sharded.
        """
        return self.run_backbone(chunks)[0]

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MemoryModelEncoderOutput:
        r"""
        Return the memories of every full chunk of each row. Tokens behind the last full chunk are in none.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens; chunks are
                counted from each row's first token.

        Raises:
            ValueError: if no row has a full chunk.
        """
        text = pack_text(input_ids, attention_mask)
        lengths = text.is_token.sum(-1)
        has_all_columns = attention_mask is None or is_torchdynamo_compiling()
        longest = text.ids.shape[1] if has_all_columns else int(lengths.max())
        if longest < self.config.chunk_length:
            raise ValueError(
                f"The longest text has {longest} tokens, which do not fill a chunk of chunk_length="
                f"{self.config.chunk_length}: there is nothing to encode."
            )
        chunks, mask = split_into_chunks(text.ids, lengths, self.config.chunk_length)
        requested, states = requested_states(self.config, kwargs), {}
        if requested:
            memories, outputs = self.run_backbone(chunks, **requested)
            for name in ("hidden_states", "attentions"):
                if f"output_{name}" in requested:
                    given = getattr(outputs, name, None)
                    states[name] = map_layers(given, lambda state: state.unflatten(0, mask.shape))
        else:
            memories = self.encode_chunks(chunks)
        return MemoryModelEncoderOutput(memories=memories.unflatten(0, mask.shape), memory_mask=mask, **states)


class MemoryModelWithoutHead:
    """A memory model's encoder, except that a call runs the whole model up to the head.

    TRL's trainers call the base model and apply the head themselves, to parts of the text at a time.
    """

    def __init__(self, model: "MemoryModelForCausalLM"):
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name.startswith("__"):  # `copy` looks names up before `model` is set
            raise AttributeError(name)
        return getattr(self.model.encoder, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        """Return the decoder's last hidden states `(B, T, C)`; arguments as for the whole model, without labels.

        Raises:
            ValueError: if the model has other objectives than the next token, or the decoder names no base.
        """
        return self.model.forward_without_head(*args, **kwargs)


# trf-ignore: TRF057
class MemoryModelForCausalLM(
    MemoryModelBackbones, MemoryModelPreTrainedModel, MemoryModelObjectives, MemoryModelGenerationMixin
):
    """A memory model that predicts the next token, and reconstructs chunks from their memories."""

    _is_stateful = True
    # A dictionary of its own: PEFT looks for one here, and adds the decoder's names to it.
    _tied_weights_keys = {}

    def __init__(self, config: MemoryModelConfig):
        super().__init__(config)
        self.encoder = MemoryModelEncoder(config)
        self.reader = MemoryModelReader(config)
        self.decoder = build_decoder(config.decoder)
        self.note_decoder()
        if config.tie_encoder_embeddings:
            self._tied_weights_keys = self.shared_table()
        self.post_init()
        self.freeze_encoder(config.freeze_encoder)
        if config.freeze_decoder:
            self.freeze_decoder()

    @property
    def base_model(self) -> Any:
        """The encoder, so that folders of an encoder alone can be loaded; a call runs the model without its head."""
        return MemoryModelWithoutHead(self)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the model's device. Offloaded weights have no device, and the tensor stays on its own."""
        return tensor if self.device.type == "meta" else tensor.to(self.device)

    def is_sharded(self) -> bool:
        """Return whether several processes hold this model in parts, and collect each part when it is called."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # some builds of torch lack it

        units = (FSDPModule, FullyShardedDataParallel)
        is_zero3 = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        return is_zero3 or any(isinstance(module, units) for module in self.modules() if module is not self)

    def encoder_must_run(self) -> bool:
        """Return whether a batch without a full chunk has to run the encoder all the same.

        Data parallelism waits for a gradient of every weight, if only of zeros. Processes with sharded weights wait
        for each other wherever the encoder is called.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.encoder.parameters()):
            return True
        return self.is_sharded()

    def encode_full_chunks(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memories `(B, N, K, D)` of the full chunks of packed texts `(B, T)`, and their mask `(B, N)`.

        A frozen encoder runs without gradients.
        """
        length = self.config.chunk_length
        chunks, mask = split_into_chunks(ids, lengths, length)
        options = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            if chunks.shape[0] > 0:
                return self.encoder(chunks, **options).memories[:, 0].unflatten(0, mask.shape), mask
            if self.encoder_must_run():
                memories = self.encoder(ids.new_zeros(1, length), **options).memories
                return memories[:, :0].expand(ids.shape[0], -1, -1, -1), mask
        shape = (*mask.shape, self.config.num_memory_embeddings, self.config.memory_size)
        return torch.empty(shape, dtype=self.dtype, device=ids.device), mask

    def gather_memories(
        self, text: PackedText, memories: torch.Tensor | None = None, memory_mask: torch.Tensor | None = None
    ) -> TextMemories:
        """Return the memories of a text's full chunks, behind those `(B, M, K, D)` that are given with it."""
        ids, lengths = text.ids, text.is_token.sum(-1)
        if self.config.max_memories == 0:
            ids, lengths = ids[:, :0], torch.zeros_like(lengths)  # the decoder would see none of the memories
        new, new_mask = self.encode_full_chunks(ids, lengths)
        if memories is None:
            return TextMemories(new, new_mask, 0)
        if memory_mask is None:
            memory_mask = memories.new_ones(memories.shape[:2])
        memories, memory_mask = memories.to(new.device), memory_mask.to(new.device, torch.bool)
        order = right_aligned(memory_mask)
        memories, memory_mask = take(memories, order).to(new), take(memory_mask, order)
        # Absent memories may hold anything, NaN included, which a product with the mask would not remove.
        memories = memories.masked_fill(~memory_mask[..., None, None], 0.0)
        num_given = memories.shape[1]
        memories, memory_mask = torch.cat([memories, new], dim=1), torch.cat([memory_mask, new_mask], dim=1)
        return TextMemories(memories, memory_mask, num_given)

    def memories_state_dict(
        self, memories: torch.Tensor, memory_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return memories of [`~MemoryModelForCausalLM.encode`] as named tensors that `safetensors` can save.

        With `memory_quantization` they are codes of one byte, and their scales. The encoder's fingerprint is among the
        tensors.

        Args:
            memories (`torch.Tensor` of shape `(B, M, K, D)`).
            memory_mask (`torch.Tensor` of shape `(B, M)`, *optional*): all ones when absent.
        """
        return memories_to_tensors(memories, memory_mask, self.encoder)

    def memories_from_state_dict(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return `memories` and `memory_mask` from what [`~MemoryModelForCausalLM.memories_state_dict`] returned.

        Memories of another precision are converted.

        Raises:
            ValueError: if another encoder wrote them, with another chunk length or other weights; or if no encoder
                could have: a part is missing, there are none, or shapes, dtypes or values are impossible.
        """
        memories, memory_mask = memories_from_tensors(tensors, self.encoder, self.dtype)
        return {"memories": self.to_device(memories), "memory_mask": self.to_device(memory_mask)}

    def memories_to_rows(
        self,
        memories: torch.Tensor,
        memory_mask: torch.Tensor | None = None,
        *,
        sources: Sequence[str],
        texts: Sequence[Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """Return memories of [`~MemoryModelForCausalLM.encode`] as rows of a data set, one for each memory.

        A row has its `source`, the number of its `chunk`, the `text` of that, the `vectors` `(K, D)` (codes of one
        byte, with `scales` `(K,)`, under `memory_quantization`), `chunk_length`, and the `encoder`'s fingerprint.

        Args:
            memories (`torch.Tensor` of shape `(B, M, K, D)`).
            memory_mask (`torch.Tensor` of shape `(B, M)`, *optional*): all ones when absent.
            sources (`Sequence[str]`): the name of each of the B texts.
            texts (`Sequence[Sequence[str]]`, *optional*): of each text the text of its chunks; empty when absent.

        Raises:
            ValueError: if there are not as many names or chunks as memories, or two texts have one name.
        """
        return memories_to_rows(memories, memory_mask, self.encoder, sources, texts)

    def memories_from_rows(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `memories` and `memory_mask` from rows of a data set, a text for each source, the latest chunk last.

        Raises:
            ValueError: if another encoder wrote them, or they are no rows of `memories_to_rows`.
        """
        memories, memory_mask = memories_from_rows(rows, self.encoder, self.dtype)
        return {"memories": self.to_device(memories), "memory_mask": self.to_device(memory_mask)}

    def decoder_masks(self, mask: torch.Tensor, num_new: int) -> dict[str, torch.Tensor]:
        """Return the decoder's `attention_mask`, and `position_ids` if it takes any, for rows `(N, past + new)`.

        Positions count present slots only, so that padding does not move the others.

        Raises:
            ValueError: if the decoder has a table of learnt positions, and a row is longer.
        """
        masks = {"attention_mask": mask.long()}
        if self.num_positions is not None and not is_torchdynamo_compiling() and not is_fake_tensor(mask):
            longest = int(mask.sum(-1).max())
            if longest > self.num_positions:
                raise ValueError(
                    f"Memories and tokens take {longest} slots of a row, but this {type(self.decoder).__name__} has "
                    f"{self.num_positions} learnt positions: set max_memories, or take a decoder without such a table."
                )
        if self.takes_positions:
            masks["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        return masks

    def decode_rows(
        self,
        tokens: torch.Tensor,
        is_token: torch.Tensor,
        memories: torch.Tensor,
        memory_mask: torch.Tensor,
        ends: torch.Tensor,
        max_end: int,
        task: int,
        is_blank: bool = False,
        has_head: bool = True,
        **requested: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return logits `(B, R, 1 + W, V)` of all rows, at the task slot and the tokens, and the requested states.

        Args:
            tokens (`torch.Tensor` of shape `(B, R, W, C)`): embeddings.
            is_token (`torch.Tensor` of shape `(B, R, W)`): False at padding, which stands behind the tokens.
            memories (`torch.Tensor` of shape `(B, N, K, D)`), memory_mask (`torch.Tensor` of shape `(B, N)`).
            ends (`torch.Tensor` of shape `(R,)` or `(B, R)`): how many of the N memories stand before each row.
            max_end (`int`): the largest of the ends.
            task (`int`): [`BEGIN`] or [`COPY`].
            is_blank (`bool`): whether the tokens are hidden.
            has_head (`bool`): whether to compute logits. Otherwise the last hidden states are returned instead.
        """
        shape, width = is_token.shape[:2], 1 + tokens.shape[2]
        visible = visible_memories(memories, memory_mask, ends.expand(shape), max_end, self.config)
        inputs, mask = self.reader(tokens, is_token, *visible, task=task, is_blank=is_blank)
        if not self.keeps_row:
            inputs, mask = without_leading_padding(inputs, mask)
        options = self.decoder_masks(mask.flatten(0, 1), inputs.shape[2]) | requested
        options |= {"inputs_embeds": inputs.flatten(0, 1), "use_cache": False, "return_dict": True}
        if has_head:
            outputs = self.decoder(logits_to_keep=width, **options)
            rows = outputs.logits.unflatten(0, shape)
        else:
            outputs = self.decoder.base_model(**options)
            rows = outputs.last_hidden_state[:, -width:].unflatten(0, shape)
        return rows, decoder_states(outputs, requested, lambda state: state[:, -width:].unflatten(0, shape), shape)

    def decode_text(
        self, text: PackedText, context: TextMemories, has_head: bool = True, **requested: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return logits `(B, T, V)` after each packed token of a text, and the requested states.

        Args:
            context: the text's memories, see [`~MemoryModelForCausalLM.gather_memories`].
            has_head (`bool`): whether to compute logits. Otherwise the last hidden states are returned instead.
        """
        length, num_tokens = self.config.chunk_length, text.ids.shape[1]
        # What follows a full last chunk is predicted in one more row. It has a task slot only, so it is decoded by
        # itself, except where all rows have to be in one call.
        in_one_call = requested or is_torchdynamo_compiling() or self.is_sharded()
        num_rows = num_tokens // length + 1 if in_one_call else -(-num_tokens // length)
        num_missing = num_rows * length - num_tokens
        has_last_row = not in_one_call and num_missing == 0
        ids, is_token = (F.pad(columns, (0, num_missing)) for columns in text[:2])
        tokens = embed_tokens(self.decoder, ids).unflatten(1, (num_rows, length))[..., :-1, :]
        is_token = is_token.unflatten(1, (num_rows, length))[..., :-1]
        memories, memory_mask, num_given = context
        ends, max_end = num_given + torch.arange(num_rows, device=ids.device), num_given + num_rows - 1
        rows, states = self.decode_rows(
            tokens, is_token, memories, memory_mask, ends, max_end, BEGIN, has_head=has_head, **requested
        )

        # Slot 0 of a row predicts its first token, so the prediction after token t is the one of slot t + 1.
        def at_tokens(slots: torch.Tensor) -> torch.Tensor:
            return slots.flatten(1, 2)[:, 1 : num_tokens + 1].contiguous()

        if not has_last_row:
            if "hidden_states" in states:
                states["hidden_states"] = map_layers(states["hidden_states"], at_tokens)
            return at_tokens(rows), states
        tokens, is_token, ends = tokens[:, :1, :0], is_token[:, :1, :0], ends[-1:] + 1
        last, _ = self.decode_rows(
            tokens, is_token, memories, memory_mask, ends, max_end + 1, BEGIN, has_head=has_head
        )
        return torch.cat([rows.flatten(1, 2)[:, 1:], last[:, 0]], dim=1), states

    def check_request(
        self, inputs_embeds: torch.Tensor | None, logits_to_keep: Any, kwargs: Mapping[str, Any]
    ) -> None:
        """Raise for arguments that would be misread, or would fail later."""
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds are not supported, nor soft prompts of PEFT, which come as such: encoder and decoder "
                "embed tokens by tables of their own. Pass input_ids; to adapt the model, use LoRA."
            )
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be a number that is not negative.")
        check_packing(kwargs)

    def forward_without_head(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        memories: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Return the decoder's last hidden states `(B, T, C)`; see [`MemoryModelWithoutHead`]."""
        self.check_causal_only()
        cache = one_memory(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None or kwargs.get("labels") is not None or kwargs.get("output_hidden_states"):
            raise ValueError(
                "The base of a memory model reads whole texts up to the head: call the model itself with a cache, "
                "with labels, or for hidden states."
            )
        if self.decoder.base_model is self.decoder:
            raise ValueError(f"A {type(self.decoder).__name__} names no base, so that its head cannot be left out.")
        self.check_request(kwargs.pop("inputs_embeds", None), 0, kwargs)
        text = pack_text(input_ids, attention_mask)
        check_memories(memories, memory_mask, text.ids.shape[0], self.config, self.dtype)
        states, _ = self.decode_text(text, self.gather_memories(text, memories, memory_mask), has_head=False)
        return BaseModelOutput(last_hidden_state=take(states, text.order.argsort(dim=1)))

    def read_text(
        self,
        text: PackedText,
        context: TextMemories,
        labels: torch.Tensor | None,
        logits_to_keep: int,
        requested: dict[str, Any],
        loss_kwargs: Mapping[str, Any],
    ) -> MemoryModelOutput:
        """Return logits and memories of a whole text, and its losses if there are `labels` `(B, T)`."""
        logits: torch.Tensor | None = None
        states: dict[str, Any] = {}
        parts: dict[str, torch.Tensor] = {}
        if labels is None or not self.training or self.config.causal_weight > 0 or requested:
            logits, states = self.decode_text(text, context, **requested)
        if labels is not None:
            parts = self.losses(logits, text, take(labels, text.order), context, loss_kwargs)
        if logits is not None:
            positions = packed_positions(text)
            logits, states = take(logits, positions[:, -logits_to_keep:]), states_at(states, positions)
        named: dict[str, Any] = {f"{name}_loss": part for name, part in parts.items()}
        if parts:
            weights = self.loss_weights()
            named["loss"] = sum(weights[name] * part for name, part in parts.items())
        order = right_aligned(context.mask)
        memories, memory_mask = take(context.memories, order), take(context.mask, order)
        return MemoryModelOutput(logits=logits, memories=memories, memory_mask=memory_mask, **named, **states)

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        memories: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        past_key_values: MemoryModelCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: MemoryModelCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MemoryModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`. Nothing is changed in them.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*): 0 at padding, on either side or
                within, 1 at tokens. Chunks are counted from each row's first token.
            memories (`torch.Tensor` of shape `(B, M, K, D)`, *optional*): of chunks before this text, the latest last;
                see [`~MemoryModelForCausalLM.encode`]. Finite; converted to the model's dtype.
            memory_mask (`torch.Tensor` of shape `(B, M)`, *optional*): 0 where there is no memory, of booleans or
                whole numbers. All ones when absent.
            past_key_values ([`MemoryModelCache`], *optional*): what was read before; changed in place. `cache` is
                another name for it.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): not shifted; -100 is ignored. They are the
                targets of the causal loss; as everywhere, the text's own first token is none. The other parts of the
                loss have the ids as their targets.
            logits_to_keep (`int`): for how many last tokens logits are computed; 0: for all.

        Raises:
            ValueError: if the text is empty, ids or mask have another form, memories are not this model's, or an
                objective with a positive weight finds no target because the text is too short.

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> tokenizer = AutoTokenizer.from_pretrained(folder)
        >>> model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        >>> memories, rest = model.encode(**tokenizer(document, return_tensors="pt"))
        >>> ids = model.generate(**rest, **memories, max_new_tokens=50)
        ```"""
        past: Any = one_memory(past_key_values, cache)
        self.check_request(inputs_embeds, logits_to_keep, kwargs)
        if past is not None:
            self.check_cache(past, memories, labels)
            if attention_mask is not None:
                attention_mask = past.new_columns(attention_mask, 0 if input_ids is None else input_ids.shape[-1])
        text = pack_text(input_ids, attention_mask, is_first=past is None)
        check_memories(memories, memory_mask, text.ids.shape[0], self.config, self.dtype)
        if labels is not None and labels.shape != text.ids.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: it must be that of the ids, {tuple(text.ids.shape)}."
            )
        if torch.compiler.is_exporting() and (use_cache or past is not None):
            raise ValueError("An exported program reads whole texts: pass `use_cache=False`, and no cache.")
        if use_cache is None:  # on request a cache is kept in training too
            is_only_read = labels is None and not self.training and not torch.compiler.is_exporting()
            use_cache = self.config.use_cache and is_only_read
        requested = requested_states(self.config, kwargs)
        if use_cache and past is None:
            past = MemoryModelCache()
            self.check_cache(past, memories, labels)
        if past is None:
            context = self.gather_memories(text, memories, memory_mask)
            return self.read_text(text, context, labels, logits_to_keep, requested, kwargs)
        logits, states = self.continue_text(past, text, memories, memory_mask, logits_to_keep, requested)
        states |= {"memories": past.memories, "memory_mask": past.memory_mask, MEMORY_NAME: past}
        return MemoryModelOutput(logits=logits, **states)


__all__ = [
    "MemoryModelEncoder",
    "MemoryModelForCausalLM",
    "MemoryModelPreTrainedModel",
]

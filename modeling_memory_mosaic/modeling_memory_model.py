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

Shapes use B batch, T tokens, L tokens of a chunk, M memories, K vectors of a memory, D their width, R rows of the
decoder (one for each chunk), C = hidden size of the decoder, V = vocabulary.

Each chunk has a row of its own: the memories of the chunks before it, a slot that says what to do (BEGIN or COPY), and
its tokens. So what is read at a slot predicts the token of the next one, the chunk's first token is predicted at
BEGIN, and the chunk's last token is an input of no row: the next row begins behind it. Nothing else carries over from
row to row, so all chunks are encoded in one pass and all rows decoded in another.

Docstrings are written by hand (TRF057): the library's generator of them knows the models within the library only.
"""

import functools
import hashlib
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, is_torchdynamo_compiling
from transformers.utils.import_utils import is_fake_tensor

from .adapters_memory_mosaic import AdaptableModel, check_routers
from .cache_memory_model import MemoryModelCache
from .cache_memory_mosaic import MEMORY_NAME, one_memory
from .configuration_memory_model import OBJECTIVES, MemoryModelConfig
from .configuration_memory_mosaic import MemoryMosaicConfig
from .generation_memory_mosaic import continue_from, generation_settings, repeated_rows
from .identity_memory_mosaic import note_writer, weights_fingerprint
from .masking_memory_mosaic import FOREIGN_PACKING_NAMES, PACKING_NAMES, raise_where
from .modeling_memory_mosaic import MemoryMosaicForCausalLM, MemoryMosaicModel
from .ops_memory_mosaic import at_least_float32, embed_ids


# The recipes `memory_positions` and `memory_capacity` compare what these choose:
# trf-ignore: TRF041 memory_pooling, encoder_chunk_positions, decoder_chunk_positions, memory_size, memory_read
# trf-ignore: TRF041 freeze_encoder, max_memories, memory_quantization, chunk_length, causal_weight, model_type

# Rounding to so many codes on each side of zero; float8 e4m3 reaches to 448.
INT8_LIMIT, FP8_LIMIT = 127.0, 448.0
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

# By which a batch of packed documents would tell where each begins.
DOCUMENT_MARKS = ("position_ids", *PACKING_NAMES, *FOREIGN_PACKING_NAMES)


# trf-ignore: TRF057
@dataclass
class MemoryModelEncoderOutput(ModelOutput):
    """
    Args:
        memories (`torch.Tensor` of shape `(B, M, K, D)`): of each row's full chunks, the first one first.
        memory_mask (`torch.Tensor` of shape `(B, M)`): False where a row has fewer of them.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, M, L, C)`): if asked for, the backbone's within each
            chunk, which has `num_memory_embeddings` summary slots behind its tokens if there are such slots.
        attentions (`tuple` of `torch.Tensor` of shape `(B, M, heads, L, L)`): likewise.
    """

    memories: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# trf-ignore: TRF057
@dataclass
class MemoryModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor`): the weighted sum of the parts, in nats.
        logits (`torch.Tensor` of shape `(B, T, V)`): at each token, of the next one.
        causal_loss, autoencoding_loss, copy_loss, blank_copy_loss (`torch.Tensor`): the parts whose weight is
            positive, each a mean over its targets.
        past_key_values, cache ([`MemoryModelCache`]): what was read, under the name that this transformers uses.
        memories (`torch.Tensor` of shape `(B, M, K, D)`) and memory_mask (`(B, M)`): of all chunks that were read to
            their end, those that were given included; the latest one last, and rows that have fewer begin with none.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, T, C)`): if asked for, the decoder's, at each token
            where the next one is predicted: at the last token of a chunk it is the slot that the next row begins with.
        attentions (`tuple` of `torch.Tensor` of shape `(B, R, heads, slots, slots)`): if asked for, the decoder's
            within each of its rows, one for each chunk that is begun. First come the slots of memories, the latest
            last, then the slot that says what to do, then the tokens but the chunk's last one. Of a text that is read
            on within its chunk, `(B, 1, heads, T, slots)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    causal_loss: torch.Tensor | None = None
    autoencoding_loss: torch.Tensor | None = None
    copy_loss: torch.Tensor | None = None
    blank_copy_loss: torch.Tensor | None = None
    past_key_values: Cache | None = None
    cache: Cache | None = None
    memories: torch.Tensor | None = None
    memory_mask: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def asked_for(config: MemoryModelConfig, kwargs: dict) -> dict:
    """Which insights the caller or, unless the caller says otherwise, the configuration asks for."""
    asked = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
    asked = {name: getattr(config, name, None) if value is None else value for name, value in asked.items()}
    return {name: value for name, value in asked.items() if value is not None and value is not False}


def each_of(states: tuple[torch.Tensor | None, ...] | None, change) -> tuple[torch.Tensor | None, ...] | None:
    """All of a decoder's states, changed alike; layers that were not asked for stay `None`."""
    return None if states is None else tuple(None if state is None else change(state) for state in states)


def states_of(outputs: ModelOutput, asked: dict, of_hidden_states, shape) -> dict:
    """What is asked for of a decoder's outputs: hidden states, changed, and maps of rows `shape` `(B, R)`."""
    states = {}
    if "output_hidden_states" in asked:
        states["hidden_states"] = each_of(outputs.hidden_states, of_hidden_states)
    if "output_attentions" in asked:
        states["attentions"] = each_of(outputs.attentions, lambda state: state.unflatten(0, shape))
    return states


def at_places(states: dict, places: torch.Tensor) -> dict:
    """The hidden states at so many places `(B, T)` of those that were read."""
    return states | {"hidden_states": each_of(states.get("hidden_states"), lambda state: take(state, places))}


def left_aligned(is_token: torch.Tensor) -> torch.Tensor:
    """The order `(B, T)` of positions in which tokens come first and padding last, both as they stood."""
    return is_token.long().argsort(dim=1, descending=True, stable=True)


def right_aligned(is_token: torch.Tensor) -> torch.Tensor:
    """The order `(B, T)` of positions in which padding comes first and tokens last."""
    return is_token.long().argsort(dim=1, stable=True)


def as_they_stood(is_token: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Where of tokens that were moved to the front, as `is_token` and `order` `(B, T)` tell, each position's stands.

    Padding has that of the token before it: behind a text, `generate` asks there what comes next.
    """
    return (take(is_token, order.argsort(dim=1)).cumsum(dim=1) - 1).clamp(min=0)


def take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`(B, N, ...)` at positions `order` `(B, ...)` of its second dimension: `(*order.shape, ...)`."""
    rows = torch.arange(order.shape[0], device=order.device).view(-1, *[1] * (order.ndim - 1))
    return tensor[rows, order]


def tokens_from(ids: torch.Tensor, starts: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ids `(B, T)` so many, `numbers` `(B, 1)`, from `starts` `(B, 1)` on: `(B, R)`, and which are meant."""
    index = torch.arange(int(numbers.max()), device=ids.device)
    return take(ids, (starts + index).clamp(max=ids.shape[1] - 1)), index < numbers


def cut_into_chunks(ids: torch.Tensor, lengths: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of texts `(B, T)` without padding before or within, `lengths` `(B,)`: chunks `(B * N, L)`, and which are full.

    In a graph that is compiled, which cannot ask how many are, N is what would fit; for texts of any length one more,
    as a graph takes a single one for a number that never changes.
    """
    num_columns = ids.shape[1]
    if not is_torchdynamo_compiling():
        num_chunks = int(lengths.max()) // length
    else:
        num_chunks = num_columns // length + (not isinstance(num_columns, int))
    is_full = torch.arange(num_chunks, device=ids.device) < (lengths // length)[:, None]
    return F.pad(ids, (0, num_chunks * length - num_columns)).reshape(-1, length), is_full


def nothing_of(tensor: torch.Tensor) -> torch.Tensor:
    """Exactly 0, whatever the tensor holds, and a gradient of zeros for what it was made of."""
    return tensor[:0].sum()


def round_through(memories: torch.Tensor, quantization: str | None) -> torch.Tensor:
    """Memories `(..., D)` rounded for storage; the gradient passes as if they were not."""
    if quantization is None:
        return memories
    codes, scale = to_codes(memories.detach(), quantization)
    return memories + (from_codes(codes, scale, memories.dtype) - memories.detach())


def to_codes(memories: torch.Tensor, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `(..., D)`, of a byte each, and the scale `(..., 1)` of each vector, in float32.

    A scale has few binary digits, in half precision one: so a code times a scale is exact, and what was rounded once
    is rounded to itself.
    """
    limit = INT8_LIMIT if quantization == "int8" else FP8_LIMIT
    steps = 2.0 if memories.element_size() == 2 else 2.0**16
    fraction, exponent = torch.frexp(memories.float().abs().amax(-1, keepdim=True) / limit)
    scale = torch.ldexp((fraction * steps).ceil() / steps, exponent)
    scaled = memories.float() / scale.masked_fill(scale == 0, 1.0)
    return (scaled.round() if quantization == "int8" else scaled).to(CODES[quantization]), scale


def from_codes(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float() * scale).to(dtype)


# trf-ignore: TRF057
class MemoryModelPreTrainedModel(AdaptableModel, PreTrainedModel):
    config: MemoryModelConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _tied_weights_keys = {}  # those of the parts, which PEFT looks for where there is a dictionary
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
    def _init_weights(self, module):
        """What backbones do not initialise themselves: slots, positions and the maps from a memory."""
        if isinstance(module, MemoryModelEncoder):
            std = table_scale(module.backbone)
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
                init.normal_(linear.weight, std=self.config.initializer_range * linear.in_features**-0.5)

    def save_pretrained(self, *args, **kwargs):
        """As the library's, with all classes of this file in `config.json`: each Auto class can load the folder."""
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
    """Writes chunks of text into embeddings: each chunk is read alone."""

    base_model_prefix = "encoder"
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^reader\."]

    def __init__(self, config: MemoryModelConfig):
        super().__init__(config)
        width = config.encoder.hidden_size
        self.backbone = build_backbone(config.encoder)
        num_positions = learnt_positions(self.backbone)
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

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.backbone.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        embeddings = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.encoder = self.backbone.config
        self.config.vocab_size = self.backbone.config.vocab_size
        return embeddings

    # trf-ignore: TRF057
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MemoryModelEncoderOutput:
        r"""
        Memories of every full chunk of each row; tokens behind the last full chunk are not part of any.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): token ids below `vocab_size`.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens; chunks are
                counted from each row's first token.

        Raises:
            ValueError: if no row has a full chunk.
        """
        ids, is_token, _ = take_text(input_ids, attention_mask)
        lengths = is_token.sum(-1)
        is_whole = attention_mask is None or is_torchdynamo_compiling()
        longest = ids.shape[1] if is_whole else int(lengths.max())
        if longest < self.config.chunk_length:
            raise ValueError(
                f"The longest text has {longest} tokens, which do not fill a chunk of chunk_length="
                f"{self.config.chunk_length}: there is nothing to encode."
            )
        chunks, mask = cut_into_chunks(ids, lengths, self.config.chunk_length)
        asked, states = asked_for(self.config, kwargs), {}
        if asked:
            memories, outputs = self.read_chunks(chunks, **asked)
            for name in ("hidden_states", "attentions"):
                states[name] = each_of(getattr(outputs, name, None), lambda state: state.unflatten(0, mask.shape))
        else:
            memories = self.encode_chunks(chunks)
        return MemoryModelEncoderOutput(memories=memories.unflatten(0, mask.shape), memory_mask=mask, **states)

    def encode_chunks(self, chunks: torch.LongTensor) -> torch.Tensor:
        """Memories `(N, K, D)` of chunks `(N, L)`.

        A part of `forward`: from outside call the encoder itself, so that the hooks run that fetch weights which are
        kept elsewhere, on a disk or in other processes.
        """
        return self.read_chunks(chunks)[0]

    def read_chunks(self, chunks: torch.LongTensor, **asked) -> tuple[torch.Tensor, ModelOutput]:
        """As `encode_chunks`, with what the backbone returns."""
        embeds = embed(self.backbone, chunks)
        if self.chunk_positions is not None:
            embeds = embeds + self.chunk_positions
        if self.summary_embeddings is not None:
            embeds = torch.cat([embeds, self.summary_embeddings.expand(embeds.shape[0], -1, -1)], dim=1)
        outputs = self.backbone(inputs_embeds=embeds, use_cache=False, return_dict=True, **asked)
        memories = outputs.last_hidden_state[:, -self.config.num_memory_embeddings :]
        if self.memory_proj is not None:
            memories = self.memory_proj(memories)
        return round_through(memories, self.config.memory_quantization), outputs

    def fingerprint(self) -> bytes:
        """sha256 of all weights and of the choices that shape a memory: two encoders of one fingerprint agree."""
        kept = ("chunk_length", "num_memory_embeddings", "memory_size", "memory_pooling", "memory_quantization")
        digest = hashlib.sha256(repr([(name, getattr(self.config, name)) for name in kept]).encode())
        digest.update(weights_fingerprint(self, self.config.encoder))
        return digest.digest()


# What the reader's slots say.
BEGIN, COPY, BLANK = range(3)


class MemoryModelReader(nn.Module):
    """Lays out the decoder's rows: slots of memories, the slot that says what to do, and the tokens."""

    def __init__(self, config: MemoryModelConfig):
        super().__init__()
        self.config = config
        width, window = config.decoder.hidden_size, config.unroll_width
        self.slot_embeddings = nn.Parameter(torch.empty(3, width))  # BEGIN, COPY, BLANK
        self.chunk_positions = None
        if config.decoder_chunk_positions:
            self.chunk_positions = nn.Parameter(torch.empty(config.chunk_length, width))
        is_unrolled = config.memory_read == "unrolled_prefix"
        self.prefix_proj = nn.Linear(window if is_unrolled else config.memory_size, width, bias=False)
        num_added = config.unroll_window if config.memory_read == "unroll_add" else 0
        self.unroll_projs = nn.ModuleList(nn.Linear(window, width, bias=False) for _ in range(num_added))

    def forward(self, tokens, is_token, seen, is_memory, places=None, slot=None, is_hidden=False):
        """Rows of the decoder, `(B, R, S + 1 + W, C)`, and their mask: what is absent is exactly 0.

        Parameters are used here alone, so that the hooks run that fetch weights which are kept elsewhere.

        Args:
            tokens (`torch.Tensor` of shape `(B, R, W, C)`): embeddings of the chunk's tokens.
            is_token (`torch.Tensor` of shape `(B, R, W)`): False at padding, which stands behind.
            seen (`torch.Tensor` of shape `(B, R, M, K, D)`): memories, the latest one last.
            is_memory (`torch.Tensor` of shape `(B, R, M)`): False where there is none.
            places (`torch.LongTensor` of shape `(B, R, W)`, *optional*): of tokens that go on in an open row: `(B, R,
                W, C)` is returned, as slot and memories stand there already.
            slot (`int`, *optional*): of a row that begins, [`BEGIN`] or [`COPY`].
            is_hidden (`bool`): whether the tokens are hidden.
        """
        if is_hidden:
            tokens = self.slot_embeddings[BLANK].expand_as(tokens) + nothing_of(tokens)
        if slot is not None:
            begin = self.slot_embeddings[slot].expand(*tokens.shape[:-2], 1, -1)
            tokens, is_token = torch.cat([begin, tokens], dim=-2), F.pad(is_token, (1, 0), value=True)
            places = torch.arange(tokens.shape[2], device=tokens.device)
        inputs = self.dress(tokens, seen, is_memory, places)
        if slot is None or seen.shape[2] == 0:
            return inputs, is_token
        slots = self.prefix(seen) * is_memory[..., None, None]
        mask = is_memory[..., None].expand(slots.shape[:-1]).flatten(2)
        return torch.cat([slots.flatten(2, 3), inputs], dim=2), torch.cat([mask, is_token], dim=2)

    def prefix(self, memories: torch.Tensor) -> torch.Tensor:
        """Slots `(..., S, C)` of memories `(..., K, D)`."""
        if self.config.memory_read != "unrolled_prefix":
            return self.prefix_proj(memories)
        slots = torch.arange(self.config.slots_per_memory, device=memories.device)
        return self.prefix_proj(self.windows(memories, slots, self.config.slots_per_memory))

    def dress(self, inputs, seen, is_memory, places) -> torch.Tensor:
        """Inputs `(B, R, W, C)` with what belongs to their places in the chunk: positions, and the latest memories.

        Args:
            seen (`torch.Tensor` of shape `(B, R, S, K, D)`): memories, the latest one last.
            is_memory (`torch.Tensor` of shape `(B, R, S)`): False where there is none.
            places (`torch.LongTensor` of shape `(W,)` or `(B, R, W)`): 0 is the slot that says what to do.
        """
        if self.chunk_positions is not None:
            inputs = inputs + self.chunk_positions[places]
        unread = [self.prefix_proj] if seen.shape[2] == 0 else []
        for back, proj in enumerate(self.unroll_projs, start=1):
            if back > seen.shape[2]:
                unread.append(proj)
                continue
            windows = self.windows(seen[:, :, -back], places, self.config.chunk_length)
            inputs = inputs + proj(windows) * is_memory[:, :, -back, None, None]
        for proj in unread if torch.is_grad_enabled() else []:
            # Data parallelism asks for a gradient of every weight in every batch. Absent memories are zeros, and so is
            # what is made of them.
            inputs = inputs + proj(seen.new_zeros(1, proj.in_features) + nothing_of(seen))
        return inputs

    def windows(self, memories: torch.Tensor, places: torch.Tensor, num_places: int) -> torch.Tensor:
        """Of memories `(..., K, D)`, going round their numbers, a window for each place `(..., W)`: `(..., W, width)`.

        The windows of `num_places` places begin at equal distances.
        """
        numbers = memories.flatten(-2)
        size = numbers.shape[-1]
        starts = places * size // num_places
        index = (starts[..., None] + torch.arange(self.config.unroll_width, device=places.device)) % size
        if index.ndim == 2:  # the same places in all rows
            return numbers[..., index]
        return numbers.gather(-1, index.flatten(-2)).unflatten(-1, index.shape[-2:])


def table_scale(backbone: PreTrainedModel) -> float:
    """Standard deviation of the token embeddings, which what is added to them or stands beside them begins with."""
    table = backbone.get_input_embeddings().weight
    if table.is_meta or is_fake_tensor(table):
        return 1.0  # laid out without numbers, so that any will do
    return table.std().item()


def build_backbone(config):
    """The base model of a configuration; a mosaic's by itself, as another machine may not have registered it."""
    if config.model_type == MemoryMosaicConfig.model_type:  # not by class, of which code from a folder has several
        return MemoryMosaicModel(config)
    return AutoModel.from_config(config)


def build_decoder(config):
    """Likewise with its head."""
    if config.model_type == MemoryMosaicConfig.model_type:
        return MemoryMosaicForCausalLM(config)
    return AutoModelForCausalLM.from_config(config)


def learnt_positions(backbone: PreTrainedModel) -> int | None:
    """How many slots a model with a table of learnt positions can read; `None` of one without such a table."""
    limit = getattr(backbone.config, "max_position_embeddings", None)
    tokens = backbone.get_input_embeddings()
    tables = [part for part in backbone.modules() if isinstance(part, nn.Embedding) and part is not tokens]
    return limit if limit is not None and any(table.num_embeddings >= limit for table in tables) else None


def embed(backbone: PreTrainedModel, ids: torch.LongTensor) -> torch.Tensor:
    """Token embeddings; an id that the model does not know is named."""
    table = backbone.get_input_embeddings()
    if hasattr(backbone, "unshard") and not hasattr(table, "unshard"):
        # A unit of FSDP2 collects its weights for its own forward, and would lose the gradient of this use of them.
        raise ValueError(
            f"The token table of a {type(backbone).__name__} is used besides its forward, so that it cannot be a unit "
            "of FSDP2: make its layers units, or the whole encoder, and leave the table to what is above."
        )
    return embed_ids(table, ids, backbone.config.vocab_size)


def take_text(input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, is_first: bool = True):
    """Ids `(B, T)` with all padding moved behind each row's tokens, which of them are tokens, and the order taken.

    Of a text that is read on (not `is_first`), a part may be all padding.

    Raises:
        ValueError: if there are no ids, or the mask has another shape or other values than 0 and 1.
    """
    if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids have shape {shape}: they must be (batch, tokens), with at least one of each.")
    if attention_mask is None:
        is_token = torch.ones_like(input_ids, dtype=torch.bool)
        return input_ids, is_token, torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of the ids, "
            f"{tuple(input_ids.shape)}."
        )
    raise_where(
        (attention_mask != 0) & (attention_mask != 1), "attention_mask must hold 1 at tokens and 0 at padding."
    )
    is_token = attention_mask.to(input_ids.device, torch.bool)
    if is_first:
        is_empty = ~is_token.any(-1)
        row = "A row" if is_torchdynamo_compiling() else f"Row {is_empty.long().argmax().item()}"
        raise_where(is_empty, f"{row} is empty: attention_mask leaves it no token.")
    order = left_aligned(is_token)
    return take(input_ids, order), take(is_token, order), order


class MemoryModelStates:
    """A memory model's encoder, which when called reads as the whole model does up to the head.

    TRL's trainers call the base model and apply the head themselves, to parts of the text at a time.
    """

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        if name == "model" or name.startswith("__"):  # a copy asks before it has a model
            raise AttributeError(name)
        return getattr(self.model.encoder, name)

    def __call__(self, *args, **kwargs) -> BaseModelOutput:
        """The decoder's last hidden states `(B, T, C)`; arguments as for the whole model, without labels.

        Raises:
            ValueError: if the model has other objectives than the next token, or none of its own base.
        """
        return self.model.read_without_head(*args, **kwargs)


# trf-ignore: TRF057
class MemoryModelForCausalLM(MemoryModelPreTrainedModel, GenerationMixin):
    """A memory model that predicts the next token, and recalls what its memories hold."""

    _is_stateful = True
    # None of its own; PEFT then looks for those of the decoder.
    _tied_weights_keys = {}

    def __init__(self, config: MemoryModelConfig):
        super().__init__(config)
        self.encoder = MemoryModelEncoder(config)
        self.reader = MemoryModelReader(config)
        self.decoder = build_decoder(config.decoder)
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.num_positions = learnt_positions(self.decoder)
        self.post_init()
        self.freeze_encoder(config.freeze_encoder)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the model makes its own

    def get_input_embeddings(self):
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.decoder.set_output_embeddings(value)

    @property
    def base_model(self):
        """The encoder, which folders of the encoder alone are loaded into; called, it gives states to the head."""
        return MemoryModelStates(self)

    def resize_token_embeddings(self, *args, **kwargs):
        """Of encoder and decoder both."""
        embeddings = self.decoder.resize_token_embeddings(*args, **kwargs)
        self.config.decoder = self.decoder.config
        self.encoder.resize_token_embeddings(*args, **kwargs)
        return embeddings

    def freeze_encoder(self, is_frozen: bool = True) -> None:
        """Whether training leaves all of the encoder as it is, its token table included; dropout is off in it then."""
        self.config.freeze_encoder = is_frozen
        self.encoder.requires_grad_(not is_frozen)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval().requires_grad_(False)  # parameters that were loaded are new ones
        return self

    def reset_decoder(self) -> None:
        """A new decoder and reader, initialised as those of a new model, of the current random seed."""
        fresh = type(self)(self.config)
        for part in ("reader", "decoder"):
            getattr(self, part).load_state_dict(getattr(fresh, part).state_dict())

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
            memory_mask (`torch.Tensor` of shape `(B, M)`, *optional*): 0 where there is none, of booleans or whole
                numbers. All ones when absent.
            past_key_values ([`MemoryModelCache`], *optional*): what was read before; changed in place. `cache` is
                another name for it.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): not shifted; -100 is ignored. They are the
                targets of the causal loss; as everywhere, the text's own first token is none. The other parts of the
                loss have the ids as their targets.
            logits_to_keep (`int`): compute logits of the last so many tokens; 0: of all.

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
        cache = one_memory(past_key_values, cache)
        self.check_request(inputs_embeds, cache, memories, labels, logits_to_keep, kwargs)
        num_new = 0 if input_ids is None else input_ids.shape[-1]
        if attention_mask is not None and cache is not None:
            attention_mask = self.new_part(attention_mask, cache, num_new)
        ids, is_token, order = take_text(input_ids, attention_mask, is_first=cache is None)
        self.check_memories(memories, memory_mask, ids.shape[0])
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}: it must be that of the ids, {tuple(ids.shape)}."
            )
        if torch.compiler.is_exporting() and (use_cache or cache is not None):
            raise ValueError("An exported program reads whole texts: pass `use_cache=False`, and no cache.")
        if use_cache is None:  # asked for, it is kept in training too
            is_read_alone = labels is None and not self.training and not torch.compiler.is_exporting()
            use_cache = self.config.use_cache and is_read_alone
        asked = asked_for(self.config, kwargs)
        if use_cache and cache is None:
            cache = MemoryModelCache()
            self.check_cache(cache, memories, labels)
        if cache is not None:
            return self.read_on(cache, ids, is_token, order, memories, memory_mask, logits_to_keep, asked)

        remembered = self.remember(ids, is_token, memories, memory_mask)
        logits, states, parts = None, {}, {}
        if labels is None or not self.training or self.config.causal_weight > 0 or asked:
            logits, states = self.read_rows(ids, is_token, *remembered, **asked)
        if labels is not None:
            parts = self.losses(logits, ids, is_token, take(labels, order), *remembered, **kwargs)
        if logits is not None:
            stood = as_they_stood(is_token, order)
            logits, states = take(logits, stood[:, -logits_to_keep:]), at_places(states, stood)
        loss = sum(getattr(self.config, f"{name}_weight") * part for name, part in parts.items()) if parts else None
        named = {f"{name}_loss": part for name, part in parts.items()}
        latest_last = right_aligned(remembered[1])
        kept = {"memories": take(remembered[0], latest_last), "memory_mask": take(remembered[1], latest_last)}
        return MemoryModelOutput(loss=loss, logits=logits, **kept, **named, **states)

    def read_without_head(self, input_ids=None, attention_mask=None, memories=None, memory_mask=None, **kwargs):
        """What [`MemoryModelStates`] returns."""
        weights = {f"{name}_weight": getattr(self.config, f"{name}_weight") for name in OBJECTIVES}
        if weights != {f"{name}_weight": float(name == "causal") for name in OBJECTIVES}:
            raise ValueError(
                f"The loss of the next token is computed outside of this model, which leaves its own out: {weights}. "
                "Set causal_weight=1 and the others to 0, or train with `transformers.Trainer`."
            )
        cache = one_memory(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None or kwargs.get("labels") is not None or kwargs.get("output_hidden_states"):
            raise ValueError(
                "The base of a memory model reads whole texts up to the head: call the model itself with a cache, "
                "with labels, or for hidden states."
            )
        if self.decoder.base_model is self.decoder:
            raise ValueError(f"A {type(self.decoder).__name__} names no base, so that its head cannot be left out.")
        self.check_request(kwargs.pop("inputs_embeds", None), None, memories, None, 0, kwargs)
        ids, is_token, order = take_text(input_ids, attention_mask)
        self.check_memories(memories, memory_mask, ids.shape[0])
        remembered = self.remember(ids, is_token, memories, memory_mask)
        states, _ = self.read_rows(ids, is_token, *remembered, has_head=False)
        return BaseModelOutput(last_hidden_state=take(states, order.argsort(dim=1)))

    def check_request(self, inputs_embeds, cache, memories, labels, logits_to_keep, kwargs) -> None:
        """Refuses what would fail later or, worse, be answered as if it had been something else."""
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds are not supported, nor soft prompts of PEFT, which come as such: encoder and decoder "
                "embed tokens by tables of their own. Pass input_ids; to adapt the model, use LoRA."
            )
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must be a number that is not negative.")
        for name in DOCUMENT_MARKS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is not supported, as chunks are counted from each row's first token: give each document "
                    "a row of its own."
                )
        if cache is not None:
            self.check_cache(cache, memories, labels)

    def check_cache(self, cache, memories, labels) -> None:
        if not isinstance(cache, MemoryModelCache):
            raise ValueError(
                f"A {type(cache).__name__} is not what a memory model has read: pass what its forward returned. "
                "(Prefix tuning of PEFT makes such a one: use LoRA.)"
            )
        if labels is not None:
            raise ValueError(
                "With labels a text is read as a whole, and no cache is kept of it: leave the cache out, and "
                "use_cache=True."
            )
        layers = self.decoder.modules() if self.training else ()
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError(
                "A cache cannot be read or written under gradient checkpointing, which reads everything twice: call "
                "`model.gradient_checkpointing_disable()` or `model.eval()`, or pass `use_cache=False`."
            )
        if memories is not None and cache.num_tokens > 0:
            raise ValueError("memories come before a text, but the cache has read some already: give them at first.")

    def check_memories(self, memories, memory_mask, num_texts: int) -> None:
        """Refuses memories of another form than this model's, or of other rows than the text's."""
        if memories is None and memory_mask is not None:
            raise ValueError("memory_mask tells which memories there are, but none are given: pass memories too.")
        if memories is None:
            return
        shape = (self.config.num_memory_embeddings, self.config.memory_size)
        if memories.ndim != 4 or tuple(memories.shape[2:]) != shape:
            raise ValueError(
                f"memories have shape {tuple(memories.shape)}, this model's are (batch, memories, {shape[0]}, "
                f"{shape[1]}): encode the text with this model, see `encode`."
            )
        if memories.shape[0] != num_texts:
            raise ValueError(f"memories are of {memories.shape[0]} rows, but the text has {num_texts}: pass as many.")
        if memory_mask is not None and memory_mask.shape != memories.shape[:2]:
            raise ValueError(
                f"memory_mask has shape {tuple(memory_mask.shape)}: it must be {tuple(memories.shape[:2])}, one for "
                "each of the memories."
            )
        self.check_numbers(memories, memory_mask)

    def check_numbers(self, memories, memory_mask) -> None:
        """Refuses what no encoder writes: numbers of another kind, or a mask that could mean something else."""
        if not memories.is_floating_point():
            raise ValueError(
                f"memories are {memories.dtype}: pass floating-point numbers of any precision, as `encode` gives them."
            )
        is_finite = memories.to(self.dtype).isfinite().flatten(2).all(-1)
        if memory_mask is not None:
            if memory_mask.is_floating_point() or memory_mask.is_complex():
                raise ValueError(
                    f"memory_mask is {memory_mask.dtype}: it must be of booleans or whole numbers, 1 where there is a "
                    "memory and 0 where there is none."
                )
            raise_where((memory_mask != 0) & (memory_mask != 1), "memory_mask must hold 1 and 0 only.", memory_mask)
            is_finite = is_finite | ~memory_mask.to(is_finite.device, torch.bool)
        raise_where(
            ~is_finite,
            f"memories are not finite as numbers of this model, which are {self.dtype}: encode the text again.",
        )

    @staticmethod
    def new_part(attention_mask: torch.Tensor, cache: MemoryModelCache, num_new: int) -> torch.Tensor:
        """Of a mask of all tokens, the part of those that are not read yet."""
        if attention_mask.shape[-1] != cache.num_tokens + num_new:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens, but {cache.num_tokens} were read and "
                f"{num_new} are new: it must cover all {cache.num_tokens + num_new}."
            )
        return attention_mask[:, cache.num_tokens :]

    def remember(self, ids, is_token, memories=None, memory_mask=None):
        """Memories of the full chunks of texts `(B, T)`, behind those that are given.

        Returns:
            memories `(B, N, K, D)` and mask `(B, N)`; the number of those given, the same in each row as rows that
            were given fewer begin with none. The new ones stand as in the text, the missing ones behind.
        """
        lengths = is_token.sum(-1)
        if self.config.max_memories == 0:
            ids, lengths = ids[:, :0], torch.zeros_like(lengths)  # the decoder would see none of them
        new, new_mask = self.encode_full_chunks(ids, lengths)
        if memories is None:
            return new, new_mask, 0
        if memory_mask is None:
            memory_mask = memories.new_ones(memories.shape[:2])
        memories, memory_mask = memories.to(new.device), memory_mask.to(new.device, torch.bool)
        order = right_aligned(memory_mask)
        memories, memory_mask = take(memories, order).to(new), take(memory_mask, order)
        memories = memories.masked_fill(~memory_mask[..., None, None], 0.0)  # whatever stands there, it has no meaning
        return torch.cat([memories, new], dim=1), torch.cat([memory_mask, new_mask], dim=1), memories.shape[1]

    def encode_full_chunks(self, ids, lengths):
        """Memories `(B, N, K, D)` of the full chunks of texts without padding before or within; which are real.

        Without gradients if the encoder is frozen. If there is no full chunk it reads one of no meaning all the same
        where its weights ask for that: for a gradient, if only of zeros, or because several processes hold them in
        parts, which all of them collect at once or wait for without end.
        """
        length = self.config.chunk_length
        chunks, mask = cut_into_chunks(ids, lengths, length)
        plainly = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            if chunks.shape[0] > 0:
                return self.encoder(chunks, **plainly).memories[:, 0].unflatten(0, mask.shape), mask
            if self.encoder_must_run():
                memories = self.encoder(ids.new_zeros(1, length), **plainly).memories
                return memories[:, :0].expand(ids.shape[0], -1, -1, -1), mask
        shape = (*mask.shape, self.config.num_memory_embeddings, self.config.memory_size)
        return torch.empty(shape, dtype=self.dtype, device=ids.device), mask

    def encoder_must_run(self) -> bool:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.encoder.parameters()):
            return True
        return self.is_sharded_in_parts()

    def is_sharded_in_parts(self) -> bool:
        """Whether parts of this model are collected from several processes, each when it is called."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # some builds of torch lack it

        units = (FSDPModule, FullyShardedDataParallel)
        is_zero3 = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        return is_zero3 or any(isinstance(module, units) for module in self.modules() if module is not self)

    def causal_logits(self, ids, is_token, memories, memory_mask, num_given):
        """Logits `(B, T, V)` of the token after each one of texts `(B, T)`: all chunks are decoded in one pass."""
        return self.read_rows(ids, is_token, memories, memory_mask, num_given)[0]

    def read_rows(self, ids, is_token, memories, memory_mask, num_given, has_head=True, **asked):
        """As `causal_logits`, with what is asked for: hidden states `(B, T, C)`, maps `(B, R, heads, slots, slots)`.

        Without the head, the last hidden states stand in the place of logits.
        """
        length, num_tokens = self.config.chunk_length, ids.shape[1]
        # A full last chunk opens another row, as what follows it is predicted there: decoded by itself, or as a whole
        # row among the rest where every process has to call the decoder as often as the others.
        in_one_call = asked or is_torchdynamo_compiling() or self.is_sharded_in_parts()
        num_rows = num_tokens // length + 1 if in_one_call else -(-num_tokens // length)
        behind = num_rows * length - num_tokens
        opens_row = not in_one_call and behind == 0
        tokens = embed(self.decoder, F.pad(ids, (0, behind))).unflatten(1, (num_rows, length))[..., :-1, :]
        is_token = F.pad(is_token, (0, behind)).unflatten(1, (num_rows, length))[..., :-1]
        ends, most = num_given + torch.arange(num_rows, device=ids.device), num_given + num_rows - 1
        rows, states = self.decode(
            tokens, is_token, memories, memory_mask, ends, most, BEGIN, has_head=has_head, **asked
        )

        def at_tokens(rows):
            return rows.flatten(1, 2)[:, 1 : num_tokens + 1].contiguous()

        if not opens_row:
            if "hidden_states" in states:
                states["hidden_states"] = each_of(states["hidden_states"], at_tokens)
            return at_tokens(rows), states
        first = (tokens[:, :1, :0], is_token[:, :1, :0])
        last, _ = self.decode(*first, memories, memory_mask, ends[-1:] + 1, most + 1, BEGIN, has_head=has_head)
        return torch.cat([rows.flatten(1, 2)[:, 1:], last[:, 0]], dim=1), states

    def recall(self, objective: str, ids, is_token, memories, memory_mask, num_given=0):
        """What the decoder writes of chunks that it sees as memories: for losses and measures alike.

        Args:
            objective (`str`): `"autoencoding"`: each full chunk from its own memory. `"copy"`: the first half of the
                full chunks anew, each behind the memories of the first half and of those written before it, which are
                the same; its tokens are seen as they are written. `"blank_copy"`: likewise, with tokens hidden.
            ids, is_token (`torch.Tensor` of shape `(B, T)`), memories, memory_mask, num_given: see
                [`~MemoryModelForCausalLM.remember`]; given memories are passed over.

        Returns:
            logits `(B, R, L, V)`, targets `(B, R, L)`, and which rows are real, `(B, R)`.

        Raises:
            ValueError: if no text is long enough.
        """
        length = self.config.chunk_length
        memories, memory_mask = memories[:, num_given:], memory_mask[:, num_given:]
        num_full = memory_mask.sum(-1)
        needed = 1 if objective == "autoencoding" else 2
        if num_full.max() < needed:
            raise ValueError(
                f"{objective} needs {needed} full chunk(s) of chunk_length={length}, but the longest text has "
                f"{is_token.sum(-1).max().item()} tokens: give longer texts, or set {objective}_weight=0."
            )
        if objective == "autoencoding":
            logits, is_row = self.recall_each(ids, memories, memory_mask)
        else:
            logits, is_row = self.recall_first_half(objective, ids, memories, num_full)
        num_rows = is_row.shape[1]
        return logits, ids[:, : num_rows * length].unflatten(1, (num_rows, length)), is_row

    def recall_each(self, ids, memories, memory_mask):
        """Logits `(B, N, L, V)` of each chunk, written from its own memory alone, and which chunks are real."""
        flat, is_memory = memories.flatten(0, 1)[:, None], memory_mask.flatten()[:, None]
        chunks = ids[:, : memory_mask.shape[1] * self.config.chunk_length].reshape(flat.shape[0], 1, -1)
        ends = is_memory.new_ones(1, dtype=torch.long)
        logits = self.decode_copies(chunks, flat, is_memory, ends, 1, is_hidden=True)
        return logits.unflatten(0, memory_mask.shape)[:, :, 0], memory_mask

    def recall_first_half(self, objective: str, ids, memories, num_full):
        """Logits `(B, R, L, V)` of the first half of so many full chunks `(B,)`, once more; which rows are real."""
        length, half = self.config.chunk_length, (num_full // 2)[:, None]
        num_rows = int(half.max())
        if self.config.max_memories is not None and self.config.max_memories < num_rows:
            raise ValueError(
                f"{objective} of {num_rows} chunks reads the memory of so many chunks ago, but max_memories="
                f"{self.config.max_memories}: give shorter texts, raise max_memories, or set {objective}_weight=0."
            )
        rows, index = torch.arange(num_rows, device=ids.device), torch.arange(2 * num_rows, device=ids.device)
        twice = take(memories, torch.where(index < half, index, (index - half).clamp(0, num_rows - 1)))
        chunks, is_hidden = ids[:, : num_rows * length].unflatten(1, (num_rows, length)), objective == "blank_copy"
        logits = self.decode_copies(chunks, twice, index < 2 * half, half + rows, 2 * num_rows - 1, is_hidden)
        return logits, rows < half

    def decode_copies(self, chunks, memories, memory_mask, ends, most: int, is_hidden: bool) -> torch.Tensor:
        """As `decode`, of whole chunks `(B, R, L)`, behind the slot that asks for a copy."""
        tokens = embed(self.decoder, chunks[..., :-1])
        is_token = torch.ones_like(chunks[..., :-1], dtype=torch.bool)
        return self.decode(tokens, is_token, memories, memory_mask, ends, most, COPY, is_hidden)[0]

    def losses(
        self, logits, ids, is_token, labels, memories, memory_mask, num_given, **kwargs
    ) -> dict[str, torch.Tensor]:
        """The parts of the loss whose weight is positive, each a mean over its targets."""
        labels = labels.masked_fill(~is_token, -100)
        parts, share = {}, 1.0
        if kwargs.get("num_items_in_batch") is not None:
            # Of a batch that comes in several parts, each part counts by its share of the targets.
            share = (labels[:, 1:] != -100).sum() / kwargs["num_items_in_batch"]
        for objective in OBJECTIVES:
            if getattr(self.config, f"{objective}_weight") == 0:
                continue
            if objective == "causal":
                vocab_size = self.config.decoder.vocab_size
                parts[objective] = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
            else:
                recalled, targets, is_row = self.recall(objective, ids, is_token, memories, memory_mask, num_given)
                parts[objective] = share * F.cross_entropy(
                    at_least_float32(recalled[is_row].flatten(0, 1)), targets[is_row].flatten()
                )
        return parts

    def decode(
        self, tokens, is_token, memories, memory_mask, ends, most, slot, is_hidden=False, has_head=True, **asked
    ) -> tuple[torch.Tensor, dict]:
        """Logits `(B, R, 1 + W, V)` of all rows at once; hidden states and maps of these rows, if asked for.

        Args:
            tokens (`torch.Tensor` of shape `(B, R, W, C)`): embeddings.
            is_token (`torch.Tensor` of shape `(B, R, W)`): False at padding, which stands behind.
            memories (`torch.Tensor` of shape `(B, N, K, D)`), memory_mask (`torch.Tensor` of shape `(B, N)`).
            ends (`torch.Tensor` of shape `(R,)` or `(B, R)`): each row sees the memories before this one.
            most (`int`): the largest of them.
            slot (`int`): [`BEGIN`] or [`COPY`].
            is_hidden (`bool`): whether the tokens are hidden.
            has_head (`bool`): whether to compute logits; else the last hidden states stand in their place.
        """
        shape, width = is_token.shape[:2], 1 + tokens.shape[2]
        seen, is_memory = self.seen(memories, memory_mask, ends.expand(shape), most)
        inputs, mask = self.reader(tokens, is_token, seen, is_memory, slot=slot, is_hidden=is_hidden)
        settings = self.masks(mask.flatten(0, 1), inputs.shape[2]) | asked
        settings |= {"inputs_embeds": inputs.flatten(0, 1), "use_cache": False, "return_dict": True}
        if has_head:
            outputs = self.decoder(logits_to_keep=width, **settings)
            rows = outputs.logits.unflatten(0, shape)
        else:
            outputs = self.decoder.base_model(**settings)
            rows = outputs.last_hidden_state[:, -width:].unflatten(0, shape)
        return rows, states_of(outputs, asked, lambda state: state[:, -width:].unflatten(0, shape), shape)

    def seen(self, memories, memory_mask, ends, most: int):
        """Of memories `(B, N, K, D)` those before `ends` `(B, R)`, the largest of which is `most`.

        Returns:
            `(B, R, S, K, D)`, the latest last, and their mask `(B, R, S)`.
        """
        if is_torchdynamo_compiling() and memories.shape[1] > 0:
            # A graph cannot ask which is less; of more there are some that are absent.
            num_seen = self.config.max_memories
            num_seen = most + self.config.unroll_window if num_seen is None else num_seen
        else:
            num_seen = min(memories.shape[1], most)
            if self.config.max_memories is not None:
                num_seen = min(num_seen, self.config.max_memories)
        index = ends[..., None] + torch.arange(-num_seen, 0, device=ends.device)
        within = index.clamp(0, max(memories.shape[1] - 1, 0))
        return take(memories, within), take(memory_mask, within) & (index == within)

    def masks(self, mask: torch.Tensor, num_new: int) -> dict[str, torch.Tensor]:
        """What a decoder needs to know of rows whose mask is `(N, past + new)`: places count what is there."""
        masks = {"attention_mask": mask.long()}
        if self.num_positions is not None and not is_torchdynamo_compiling() and not is_fake_tensor(mask):
            most = int(mask.sum(-1).max())
            if most > self.num_positions:
                raise ValueError(
                    f"Memories and tokens take {most} slots of a row, but this {type(self.decoder).__name__} has "
                    f"{self.num_positions} learnt positions: set max_memories, or take a decoder without such a table."
                )
        if self.takes_positions:
            masks["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        return masks

    def read_on(self, cache, ids, is_token, order, memories, memory_mask, logits_to_keep, asked) -> MemoryModelOutput:
        """Read the next tokens `(B, T)` of what `cache` has read: in the open row, or beginning new ones."""
        if cache.ids is None:
            cache.ids, cache.is_token = ids[:, :0], is_token[:, :0]
            cache.memories, cache.memory_mask = memories, memory_mask
        elif cache.ids.shape[0] != ids.shape[0]:
            raise ValueError(
                f"The cache has read {cache.ids.shape[0]} rows, but {ids.shape[0]} are passed: they must be as many."
            )
        note_writer(cache, self, ids.shape[1])
        as_given = order.argsort(dim=1)
        cache.note_text(take(ids, as_given), take(is_token, as_given))
        num_before = cache.is_token.sum(-1, keepdim=True)
        whole, is_whole = torch.cat([cache.ids, ids], dim=1), torch.cat([cache.is_token, is_token], dim=1)
        packed = left_aligned(is_whole)
        whole, is_whole = take(whole, packed), take(is_whole, packed)
        if cache.row is not None and is_whole.sum(-1).max() < self.config.chunk_length:
            logits, states = self.continue_rows(cache, ids, is_token, num_before + is_token.cumsum(-1), **asked)
            cache.ids, cache.is_token = whole, is_whole
        else:
            remembered = self.remember(whole, is_whole, cache.memories, cache.memory_mask)
            self.keep(cache, whole, is_whole, *remembered[:2])
            # Where the processes have to call the decoder equally often, the open chunk is read again each time.
            logits, states = None if self.is_sharded_in_parts() else self.begin_rows(cache), {}
            if logits is None or logits_to_keep != 1 or asked:
                at = num_before + torch.arange(ids.shape[1], device=ids.device)
                at = at.clamp(max=whole.shape[1] - 1)
                logits, states = self.read_rows(whole, is_whole, *remembered, **asked)
                logits, states = take(logits, at), at_places(states, at)
        cache.num_tokens += ids.shape[1]
        if logits.shape[1] == ids.shape[1]:
            stood = as_they_stood(is_token, order)
            logits, states = take(logits, stood[:, -logits_to_keep:]), at_places(states, stood)
        kept = {"memories": cache.memories, "memory_mask": cache.memory_mask}
        return MemoryModelOutput(logits=logits, **kept, **{MEMORY_NAME: cache}, **states)

    def continue_rows(self, cache, ids, is_token, places, **asked) -> tuple[torch.Tensor, dict]:
        """Logits `(B, T, V)` of tokens within the open row, at places `(B, T)` of their chunk; what is asked for."""
        num_seen = cache.memories.shape[1]
        ends = torch.full_like(ids[:, :1], num_seen)
        seen, is_memory = self.seen(cache.memories, cache.memory_mask, ends, num_seen)
        places = places.clamp(max=self.config.chunk_length - 1)[:, None]
        inputs, _ = self.reader(embed(self.decoder, ids)[:, None], is_token[:, None], seen, is_memory, places)
        outputs = self.feed(cache, inputs[:, 0], is_token, **asked)
        return outputs.logits, states_of(outputs, asked, lambda state: state, (ids.shape[0], 1))

    def keep(self, cache, ids, is_token, memories, memory_mask) -> None:
        """Of texts that are read: what stands behind the last full chunk, and the memories of what stands before."""
        length = self.config.chunk_length
        num_full, num_rest = is_token.sum(-1, keepdim=True) // length, is_token.sum(-1, keepdim=True) % length
        cache.ids, cache.is_token = tokens_from(ids, num_full * length, num_rest)
        order = right_aligned(memory_mask)[:, -max(1, int(memory_mask.sum(-1).max())) :]
        cache.memories, cache.memory_mask = take(memories, order), take(memory_mask, order)

    def begin_rows(self, cache) -> torch.Tensor:
        """Open the row behind the last full chunk of each text, read its tokens; logits `(B, 1, V)` of the last."""
        num_seen = cache.memories.shape[1]
        ends = torch.full((cache.ids.shape[0], 1), num_seen, device=cache.ids.device)
        seen, is_memory = self.seen(cache.memories, cache.memory_mask, ends, num_seen)
        tokens = embed(self.decoder, cache.ids)[:, None]
        inputs, mask = self.reader(tokens, cache.is_token[:, None], seen, is_memory, slot=BEGIN)
        order = right_aligned(mask[:, 0])
        cache.row, cache.row_mask = DynamicCache(config=self.config.decoder), mask[:, 0, :0]
        return self.feed(cache, take(inputs[:, 0], order), take(mask[:, 0], order), logits_to_keep=1).logits

    def feed(self, cache, inputs, mask, logits_to_keep=0, **asked) -> ModelOutput:
        """Let the decoder read inputs `(B, W, C)` behind what its row holds."""
        cache.row_mask = torch.cat([cache.row_mask, mask], dim=1)
        return self.decoder(
            inputs_embeds=inputs,
            use_cache=True,
            return_dict=True,
            logits_to_keep=logits_to_keep,
            **{MEMORY_NAME: cache.row},
            **self.masks(cache.row_mask, inputs.shape[1]),
            **asked,
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """As the library's; behind a cache, ids may be the new text alone or all of it, see `continue_from`."""
        cache = one_memory(kwargs.get("past_key_values"), kwargs.get("cache"), warn=False)
        settings = generation_settings(self, generation_config, kwargs)
        kwargs = continue_from(inputs, settings, kwargs)
        if isinstance(cache, MemoryModelCache) and cache.is_initialized:
            self.check_cache(cache, kwargs.get("memories"), None)
            ids = kwargs["input_ids"] if inputs is None else inputs
            cache.num_ahead = kwargs["attention_mask"].shape[1] - ids.shape[1]
        with repeated_rows(cache, settings):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if kwargs.get("use_cache", self.config.use_cache):
            check_routers(self)
        cache = inputs.get(MEMORY_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            inputs["input_ids"] = input_ids[:, cache.get_seq_length() - cache.num_ahead :]
            if inputs["input_ids"].shape[1] == 0 and self.is_sharded_in_parts():
                inputs["input_ids"] = input_ids[:, -1:]  # these texts have ended, those of another process have not
            inputs.pop("memories", None)
            inputs.pop("memory_mask", None)
        return inputs

    @torch.no_grad()
    def encode(self, input_ids, attention_mask=None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Memories of all chunks but the last one, and the last one, for `generate(**rest, **memories)`.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): the documents.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 at padding, 1 at tokens.

        Returns:
            `memories` `(B, M, K, D)` with `memory_mask` `(B, M)`, the latest last; and `input_ids` `(B, R)` with
            `attention_mask` `(B, R)` of the rest, 1 to `chunk_length` tokens a row, padded on the left. A row of one
            chunk or less is all rest.

        Raises:
            ValueError: if there is nothing to encode, as no row is longer than a chunk.
        """
        ids, is_token, _ = take_text(self.brought(input_ids), attention_mask)
        length, lengths = self.config.chunk_length, is_token.sum(-1)
        num_chunks = (lengths - 1) // length
        if num_chunks.max() == 0:
            raise ValueError(
                f"The longest text has {lengths.max().item()} tokens, no more than a chunk of chunk_length={length}: "
                "there is nothing to encode. Pass it to `generate` as it is."
            )
        memories, mask = self.encode_full_chunks(ids, num_chunks * length)
        order = right_aligned(mask)
        num_read = num_chunks * length
        rest, is_rest = tokens_from(ids, num_read[:, None], (lengths - num_read)[:, None])
        to_right = right_aligned(is_rest)
        return (
            {"memories": take(memories, order), "memory_mask": take(mask, order)},
            {"input_ids": take(rest, to_right), "attention_mask": take(is_rest, to_right).long()},
        )

    def memories_state_dict(self, memories, memory_mask=None) -> dict[str, torch.Tensor]:
        """Memories, as [`~MemoryModelForCausalLM.encode`] gives them, as named tensors that `safetensors` can save.

        Those of a quantised model are codes of one byte and their scales. Besides, they say which encoder made them.
        """
        tensors = {"memories": memories, "memory_mask": memory_mask}
        if memory_mask is None:
            tensors["memory_mask"] = torch.ones(memories.shape[:2], dtype=torch.bool)
        if self.config.memory_quantization is not None:
            tensors["memories"], tensors["scale"] = to_codes(memories, self.config.memory_quantization)
        tensors["chunk_length"] = torch.tensor(self.config.chunk_length)
        tensors["encoder"] = torch.frombuffer(bytearray(self.encoder.fingerprint()), dtype=torch.uint8)
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}

    def memories_from_state_dict(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`memories` and `memory_mask` that [`~MemoryModelForCausalLM.memories_state_dict`] described.

        Raises:
            ValueError: if they are of another chunk length, of another encoder, or no memories: not finite, of
                another kind of numbers or shape, or without any. Of another precision they are converted.
        """
        missing = {"memories", "memory_mask", "chunk_length", "encoder"} - tensors.keys()
        if missing:
            raise ValueError(f"These are no memories of a memory model: {sorted(missing)} are missing.")
        if tensors["chunk_length"].tolist() != self.config.chunk_length:
            raise ValueError(
                f"These are memories of chunks of {tensors['chunk_length'].tolist()} tokens, but this model's "
                f"chunk_length is {self.config.chunk_length}: encode the text again."
            )
        if tensors["encoder"].tolist() != list(self.encoder.fingerprint()):
            raise ValueError("These are memories of another encoder than this model's: encode the text again.")
        memories, memory_mask = tensors["memories"], tensors["memory_mask"]
        if 0 in memories.shape:
            raise ValueError(f"memories have shape {tuple(memories.shape)}, which holds none: encode the text again.")
        if self.config.memory_quantization is not None:
            memories = self.from_codes(memories, tensors.get("scale", torch.empty(0)))
        self.check_memories(memories, memory_mask, memories.shape[0])
        return {"memories": self.brought(memories.to(self.dtype)), "memory_mask": self.brought(memory_mask)}

    def from_codes(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Memories in the model's dtype, of what [`to_codes`] made."""
        dtype = CODES[self.config.memory_quantization]
        if codes.dtype != dtype or scale.dtype != torch.float32 or scale.shape != (*codes.shape[:-1], 1):
            raise ValueError(
                f"memories are {codes.dtype} with scales {scale.dtype} of shape {tuple(scale.shape)}, but this "
                f"model's are {dtype} with float32 scales of shape {(*codes.shape[:-1], 1)}: encode the text again."
            )
        return from_codes(codes, scale, self.dtype)

    def brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the model's device; weights that are kept elsewhere have none, and are brought to the tensor."""
        return tensor if self.device.type == "meta" else tensor.to(self.device)


__all__ = [
    "MemoryModelEncoder",
    "MemoryModelForCausalLM",
    "MemoryModelPreTrainedModel",
]

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
"""Backbones of a memory model: new ones of a configuration, or causal language models that exist; what is trained.

A model that exists becomes a part only if it does what a part has to do. A few tokens are read in several ways, and
the answers compared: a difference would make a memory model wrong without a sign of it.

Shapes are those of `modeling_memory_model.py`.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.import_utils import is_fake_tensor

from .adapters_memory_mosaic import adapter_parts
from .cache_memory_mosaic import memory_kwargs
from .configuration_memory_model import MemoryModelConfig
from .configuration_memory_mosaic import MemoryMosaicConfig
from .layout_memory_model import count_positions, embed_tokens
from .modeling_memory_mosaic import MemoryMosaicForCausalLM, MemoryMosaicModel
from .reads_memory_model import BEGIN, COPY


# What `from_backbones` takes for a part: a model, a folder or name on the Hub, or a configuration of a new one.
Backbone: TypeAlias = PreTrainedModel | PreTrainedConfig | str | PurePath | None
# How far two ways of reading may differ, as a share of the answers: kernels add in different orders.
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2


def build_backbone(config: Any) -> PreTrainedModel:
    """Return a new base model of a configuration."""
    # Not by Auto class, which does not know the mosaic in a process that loads this code from a folder; and not by
    # the configuration's class, of which each folder loads a copy.
    if config.model_type == MemoryMosaicConfig.model_type:
        return MemoryMosaicModel(config)
    return AutoModel.from_config(config)


def build_decoder(config: Any) -> PreTrainedModel:
    """Return a new causal language model of a configuration."""
    if config.model_type == MemoryMosaicConfig.model_type:
        return MemoryMosaicForCausalLM(config)
    return AutoModelForCausalLM.from_config(config)


def embedding_std(backbone: PreTrainedModel) -> float:
    """Return the standard deviation of the token embeddings, by which slots and positions begin at the same scale."""
    table: Any = backbone.get_input_embeddings().weight
    if table.is_meta or is_fake_tensor(table):
        return 1.0  # a model without values, where any scale serves
    return table.std().item()


def name_of_table(model: PreTrainedModel) -> str:
    """Return the name of a model's token table among its parameters."""
    table = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is table)


# Models that exist


class Parts(NamedTuple):
    """The causal language models that become encoder and decoder."""

    encoder: PreTrainedModel
    decoder: PreTrainedModel


def load_part(given: PreTrainedModel | PreTrainedConfig | str | PurePath) -> PreTrainedModel:
    """Return the causal language model that is given, in one of the ways of [`Backbone`]."""
    if isinstance(given, PreTrainedModel):
        return given
    if isinstance(given, PreTrainedConfig):
        return build_decoder(given)
    model_type = PreTrainedConfig.get_config_dict(given)[0].get("model_type")
    known = {MemoryMosaicConfig.model_type: MemoryMosaicForCausalLM}
    return known.get(model_type, AutoModelForCausalLM).from_pretrained(given)


def check_part(model: PreTrainedModel, part: str) -> None:
    """Raise if a model is none that a memory model can be made of, saved with, and loaded with again."""
    kind, config = type(model).__name__, model.config
    if config.model_type == MemoryModelConfig.model_type:
        raise ValueError(f"The {part} is a memory model itself: give a causal language model.")
    if adapter_parts(model):
        raise ValueError(
            f"The {part} has adapters of PEFT: merge them first (`merge_and_unload()`), or adapt the memory model."
        )
    weights = {type(tensor).__module__.partition(".")[0] for one in model.parameters() for tensor in (one, one.data)}
    if getattr(model, "hf_quantizer", None) is not None or weights & {"torchao", "bitsandbytes"}:
        raise ValueError(
            f"The {part} is quantized: make the memory model of the model in full precision, save it, and load it "
            "with `from_pretrained(folder, quantization_config=...)`."
        )
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"The {part} is spread over devices: load it on one, the CPU if need be, make and save the memory model, "
            "and load that with `device_map`."
        )
    if model.get_output_embeddings() is None or model.base_model is model or config.is_encoder_decoder:
        raise ValueError(f"The {part}, a {kind}, is no causal language model: load it by AutoModelForCausalLM.")
    if getattr(config, "vocab_size", None) is None or getattr(config, "hidden_size", None) is None:
        raise ValueError(
            f"The {part}, a {kind}, names no vocab_size or hidden_size of its text: give its language model alone."
        )
    arguments = inspect.signature(model.forward).parameters
    missing = [name for name in ("inputs_embeds", "attention_mask", "logits_to_keep") if name not in arguments]
    if missing:
        raise ValueError(f"The {part}, a {kind}, takes no {' and no '.join(missing)}: give another model.")
    with torch.device("meta"):
        rebuilt = build_decoder(config), build_backbone(config)
    if tuple(map(type, rebuilt)) != (type(model), type(model.base_model)):
        raise ValueError(
            f"The {part} is a {kind}, but transformers builds a {type(rebuilt[0]).__name__} of its configuration, so "
            "that the memory model could not be loaded again: load the model by AutoModelForCausalLM."
        )


def check_pair(encoder: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Raise if two models do not read the same ids in the same precision on the same device."""
    sizes = encoder.config.vocab_size, decoder.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The encoder knows {sizes[0]} tokens and the decoder {sizes[1]}, but both read the same ids: take models "
            "of one tokenizer. If one table only has spare rows, call `resize_token_embeddings` of that model before."
        )
    for name in ("dtype", "device"):
        ours, theirs = getattr(encoder, name), getattr(decoder, name)
        if ours != theirs:
            raise ValueError(f"The encoder's {name} is {ours} and the decoder's {theirs}: load both with one.")


def check_tokenizers(encoder: Any, decoder: Any) -> None:
    """Raise if two folders or names come with different tokenizers; without any there is nothing to compare."""
    vocabularies = []
    for given in (encoder, decoder):
        try:
            vocabularies.append(AutoTokenizer.from_pretrained(given).get_vocab())
        except (OSError, ValueError):
            return  # a folder without a tokenizer
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{str(encoder)!r} and {str(decoder)!r} have different tokenizers, but encoder and decoder read the same "
            "ids: take models of one tokenizer."
        )


def take_backbones(encoder: Backbone, decoder: Backbone) -> Parts:
    """Return the models to be the parts, checked by themselves and as a pair.

    Raises:
        ValueError: if none is given, or one cannot be a part; see [`~MemoryModelForCausalLM.from_backbones`].
    """
    if encoder is None and decoder is None:
        raise ValueError("Neither an encoder nor a decoder is given: give one, or both.")
    one, other = (decoder if encoder is None else encoder), (encoder if decoder is None else decoder)
    names = (one, other)
    if all(isinstance(name, (str, PurePath)) for name in names) and str(one) != str(other):
        check_tokenizers(*names)
    first = load_part(one)
    check_part(first, "decoder" if encoder is None else "encoder")
    if other is one:
        return Parts(copy.deepcopy(first), first)
    second = load_part(other)
    check_part(second, "decoder")
    check_pair(first, second)
    return Parts(first, second)


# A few tokens, read in several ways


def answers_agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two tensors of logits or states are equal but for rounding."""
    tolerance = HALF_TOLERANCE if ours.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    difference, size = (ours - theirs).abs().float().mean(), theirs.abs().float().mean()
    return bool(difference <= tolerance * size + torch.finfo(torch.float32).tiny)


def ways_of_reading(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return, by what they show, pairs of logits that a decoder has to give alike.

    Row 0 has 6 tokens behind two of padding, row 1 has 8 tokens.
    """
    ids = torch.arange(16, device=model.device).view(2, 8) * 7919 % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    embeds = embed_tokens(model, ids) * mask[..., None]
    options: dict[str, Any] = {"return_dict": True}
    placed = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        placed["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = model(input_ids=ids[:1, 2:], use_cache=False, **options).logits
    whole = model(inputs_embeds=embeds, use_cache=False, **options, **placed).logits
    plain = model(inputs_embeds=embed_tokens(model, ids[:1, 2:]), use_cache=False, **options).logits
    shorter = {name: tensor[:, :7] for name, tensor in placed.items()}
    start = model(inputs_embeds=embeds[:, :7], use_cache=False, **options, **shorter).logits
    pairs = {
        "embeddings of tokens as it reads their ids": (plain, alone),
        "a row behind padding as the row alone": (whole[:1, 2:], alone),
        "tokens without those behind them": (start[:, 2:], whole[:, 2:7]),
    }
    if not getattr(model, "_is_stateful", False):
        cache = DynamicCache(config=model.config)
        model(inputs_embeds=embeds[:, :7], use_cache=True, **options, **shorter, **memory_kwargs(cache))
        placed |= {name: tensor[:, 7:] for name, tensor in placed.items() if name == "position_ids"}
        last = model(inputs_embeds=embeds[:, 7:], use_cache=True, **options, **placed, **memory_kwargs(cache)).logits
        pairs["a row in pieces as the row at once"] = (last[:, -1], whole[:, -1])
    return pairs


def ways_of_encoding(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return, by what it shows, the pair of states that an encoder's backbone has to give alike."""
    ids = torch.arange(8, device=model.device)[None] * 7919 % model.config.vocab_size
    by_ids = model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
    by_embeds = model(inputs_embeds=embed_tokens(model, ids), use_cache=False, return_dict=True).last_hidden_state
    return {"embeddings of tokens as it reads their ids": (by_embeds, by_ids)}


@torch.no_grad()
def check_reading(model: PreTrainedModel, ways: Callable[[PreTrainedModel], dict[str, Any]]) -> None:
    """Raise if a model does not read as a part of a memory model has to, in one of several `ways`."""
    if model.device.type == "meta":
        return
    was_training = model.training
    model.eval()
    try:
        differing = [way for way, pair in ways(model).items() if not answers_agree(*pair)]
    finally:
        model.train(was_training)
    if differing:
        raise ValueError(
            f"A {type(model).__name__} does not read {', nor '.join(differing)}, so that a memory model of it would "
            "be wrong: give another model, one of causal attention or a recurrent one."
        )


# The memory model


def settings_of_backbones(
    encoder: PreTrainedModel, decoder: PreTrainedModel, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the fields of a configuration for models that exist, which `settings` may change.

    Raises:
        ValueError: if a frozen encoder would never learn what is new in it.
    """
    tokens = {name: getattr(decoder.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    chosen = {"memory_pooling": "last", "encoder_chunk_positions": False, "initializer_range": embedding_std(decoder)}
    chosen |= tokens | settings
    width = encoder.config.hidden_size
    new = {
        "memory_pooling='summary'": chosen["memory_pooling"] == "summary",
        "encoder_chunk_positions=True": chosen["encoder_chunk_positions"],
        f"memory_size={chosen.get('memory_size')}": chosen.get("memory_size") not in (None, width),
    }
    if chosen.get("freeze_encoder") and any(new.values()):
        raise ValueError(
            f"freeze_encoder=True, but {' and '.join(name for name, is_new in new.items() if is_new)} adds new "
            "weights to the encoder, which would stay random: freeze it after it has learnt them "
            "(`freeze_encoder()`), or leave that out."
        )
    return chosen


def materialize(module: nn.Module, like: torch.Tensor, keep: nn.Module | None = None) -> None:
    """Give the parameters of a module, except those of its part `keep`, storage beside `like`, without values."""
    kept = set() if keep is None else set(keep.modules())
    for each in module.modules():
        if each in kept:
            continue
        for name, parameter in each.named_parameters(recurse=False):
            setattr(each, name, nn.Parameter(torch.empty_like(parameter, dtype=like.dtype, device=like.device)))


def adopt(cls: Any, config: MemoryModelConfig, encoder: PreTrainedModel, decoder: PreTrainedModel) -> Any:
    """Return a memory model `cls` of models that exist, whose other weights are new.

    Args:
        cls: [`MemoryModelForCausalLM`], which this file cannot import.
        encoder, decoder: causal language models; the encoder's head is left out.
    """
    check_reading(decoder, ways_of_reading)
    backbone: Any = encoder.base_model
    check_reading(backbone, ways_of_encoding)
    with torch.device("meta"):
        model = cls(config)
    model.encoder.backbone, model.decoder = backbone, decoder
    table: Any = decoder.get_input_embeddings()
    like = next(iter(decoder.parameters()))
    if config.tie_encoder_embeddings:
        model.encoder.set_input_embeddings(table)
    materialize(model.reader, like)
    materialize(model.encoder, like, keep=model.encoder.backbone)
    for module in (model.encoder, *model.reader.modules()):
        model._init_weights(module)
    begin = decoder.config.bos_token_id if decoder.config.bos_token_id is not None else decoder.config.eos_token_id
    if isinstance(begin, int) and like.device.type != "meta":
        # A row begins as the decoder's own texts do.
        row = embed_tokens(decoder, torch.tensor([begin], device=like.device)).detach()
        with torch.no_grad():
            model.reader.slot_embeddings[[BEGIN, COPY]] = row
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(decoder.generation_config, name, None))
    model.note_decoder()
    model.tie_weights()
    model.freeze_encoder(config.freeze_encoder)
    model.freeze_decoder(config.freeze_decoder)
    return model.eval()


class MemoryModelBackbones(nn.Module):
    """The encoder and the decoder of a memory model: where they come from, what they share, and what is trained."""

    # Parts of the model that this class is mixed into.
    config: Any
    encoder: Any
    decoder: PreTrainedModel

    @classmethod
    def from_backbones(
        cls, encoder: Backbone = None, decoder: Backbone = None, *, chunk_length: int, **settings: Any
    ) -> Any:
        r"""
        Make a memory model of causal language models that exist: both keep their weights, and the reader is new.

        Args:
            encoder (`PreTrainedModel`, `str` or `PreTrainedConfig`): any causal language model of transformers, or a
                folder or a name on the Hub to load one from, or a configuration for a new one. The decoder's when
                absent, as a copy. A model that is given becomes a part of the new one.
            decoder (`PreTrainedModel`, `str` or `PreTrainedConfig`): likewise. The encoder's when absent.
            chunk_length (`int`): tokens of a chunk, L.
            settings: other fields of [`MemoryModelConfig`]. `memory_pooling` is `"last"` and `encoder_chunk_positions`
                `False` by default, as the encoder knows neither slots nor vectors of its own positions.

        Raises:
            ValueError: if a model cannot be a part: it is no causal language model, quantized, adapted by PEFT, of
                another vocabulary or precision than the other, or reads embeddings, padding or pieces of a text
                otherwise than the text itself. The message names the remedy.

        ```python
        >>> model = MemoryModelForCausalLM.from_backbones(decoder="openai-community/gpt2", chunk_length=64)
        ```"""
        parts = take_backbones(encoder, decoder)
        fields = settings_of_backbones(*parts, settings) | {"chunk_length": chunk_length}
        config = MemoryModelConfig(encoder=parts.encoder.config, decoder=parts.decoder.config, **fields)
        return adopt(cls, config, *parts)

    def note_decoder(self) -> None:
        """Note what the decoder can take."""
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters
        self.num_positions = count_positions(self.decoder)
        # A running state ages at padding that stands between two tokens, as where rows of a batch go on at their own
        # pace, so that such a decoder reads the unfinished chunk again with each token.
        self.keeps_row = not getattr(self.decoder, "_is_stateful", False)

    def shared_table(self) -> dict[str, str]:
        """Return the name of the decoder's token table, and that of the encoder's, under which both are stored."""
        # So that a folder of the whole model has the encoder that `AutoModel` loads from it.
        return {f"decoder.{name_of_table(self.decoder)}": f"encoder.{name_of_table(self.encoder)}"}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return what is tied to what."""
        tied = super().get_expanded_tied_weights_keys(all_submodels)  # type: ignore[misc]  # of `PreTrainedModel`
        # The library ties in this order: the decoder's table first, and its head to that.
        return self.shared_table() | tied if self.config.tie_encoder_embeddings else tied

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the token tables of encoder and decoder as the library does; return the decoder's."""
        embeddings = self.decoder.resize_token_embeddings(*args, **kwargs)
        self.config.decoder = self.decoder.config
        if self.config.tie_encoder_embeddings:
            self.encoder.set_input_embeddings(embeddings)
            self.encoder.config.vocab_size = embeddings.num_embeddings
        else:
            self.encoder.resize_token_embeddings(*args, **kwargs)
        return embeddings

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval().requires_grad_(False)  # again, as loading replaces parameters
        if self.config.freeze_decoder:
            self.decoder.eval().requires_grad_(False)
        return self

    def freeze_encoder(self, is_frozen: bool = True) -> None:
        """Stop or resume training of the whole encoder, its token table included. A frozen one has no dropout."""
        self.config.freeze_encoder = is_frozen
        self.encoder.requires_grad_(not is_frozen)
        self.train(self.training)

    def freeze_decoder(self, is_frozen: bool = True) -> None:
        """Stop or resume training of the decoder, its table and head included; the reader goes on learning."""
        self.config.freeze_decoder = is_frozen
        self.decoder.requires_grad_(not is_frozen)
        self.train(self.training)

    def reset_decoder(self) -> None:
        """Initialise decoder and reader as in a new model, from the current random seed.

        Raises:
            ValueError: if the encoder has the decoder's token table, which would change with it.
        """
        if self.config.tie_encoder_embeddings:
            raise ValueError(
                "The encoder has the decoder's token table (tie_encoder_embeddings=True), so that a new decoder would "
                "change the encoder: make the model with tables of their own."
            )
        fresh = type(self)(self.config)
        for part in ("reader", "decoder"):
            getattr(self, part).load_state_dict(getattr(fresh, part).state_dict())


__all__ = ["MemoryModelBackbones", "build_backbone", "build_decoder", "embedding_std"]

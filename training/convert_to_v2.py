# SPDX-License-Identifier: Apache-2.0
"""Conversion of a Memory Mosaic to one of v2 that computes the same logits, as a start for training.

Long-term heads without a delay are those of v1: a leak that does not depend on the token is the bias of `leak_proj`,
an input gate of 1 is a `gate_proj` of zeros, and a bandwidth that does not grow is one of exponent 0. New short-term
heads add nothing at first, as their columns of `o_proj` are 0.
"""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_memory_mosaic import (
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    MemoryMosaicV2Config,
    MemoryMosaicV2ForCausalLM,
)
from training.export import export_model


# Fields of both configurations that mean the same.
SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "num_persistent_slots"),
    *("use_bias", "max_position_embeddings", "attention_dropout", "hidden_dropout", "logits_scaling"),
    *("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# Stored scalars of v1 are divided by this, and the log of a key's length is at most 5.
PARAMETER_SCALE, MAX_LOG_KEY_SCALE = 10.0, 5.0
# In place of the log of a beta_0 of 0.
LOWEST_OFFSET = -30.0


def convert_config(config: MemoryMosaicConfig, **fields: Any) -> MemoryMosaicV2Config:
    """Return the configuration of the v2 model that computes what a v1 model does.

    Args:
        fields: `num_short_term_heads` and `short_term_window` of the new heads.

    Raises:
        ValueError: if the kernels of v1 stay as they are up to some number of pairs, which those of v2 cannot.
    """
    if config.bandwidth_exponent and config.bandwidth_start != 1:
        raise ValueError(
            f"bandwidth_start={config.bandwidth_start} with bandwidth_exponent={config.bandwidth_exponent}: kernels "
            "of v2 grow from the first pair on. Convert a model of bandwidth_start=1, or of exponent 0."
        )
    if unknown := fields.keys() - {"num_short_term_heads", "short_term_window"}:
        raise ValueError(f"{min(unknown)} follows from the model: choose num_short_term_heads, short_term_window.")
    own: dict[str, Any] = {name: getattr(config, name) for name in SAME_FIELDS}
    exact: dict[str, Any] = {
        "norm_type": "layer_norm",
        "norm_eps": config.layer_norm_eps,
        "persistent_memory_type": "slots",
    }
    exact |= {"gate_bias": True, "long_term_delay": 1, "long_term_delay_range": None}
    return MemoryMosaicV2Config(**own, **exact, **fields)


@torch.no_grad()
def convert_memory(old: Any, new: Any, exponent: float) -> None:
    """Give a v2 contextual memory the heads of a v1 one, as its long-term heads."""
    heads, width = new.long_term, old.head_dim
    for name in ("k_proj", "v_proj"):
        heads.get_submodule(name).load_state_dict(old.get_submodule(name).state_dict())
    heads.value_mix.copy_(old.value_mix)
    heads.gate_proj.weight.zero_()
    heads.gate_proj.bias.zero_()
    heads.leak_proj.weight.zero_()
    heads.leak_proj.bias.copy_((PARAMETER_SCALE * old.key_leak).abs())
    # Both keys have one length in v1, which is the root of beta.
    log_beta = 2 * (PARAMETER_SCALE * old.key_scale).clamp(max=MAX_LOG_KEY_SCALE)
    is_growing = exponent > 0
    heads.bandwidth_exponent.fill_(exponent)
    heads.bandwidth_scale.copy_(log_beta if is_growing else log_beta - math.log(2))
    heads.bandwidth_offset.copy_(torch.full_like(log_beta, LOWEST_OFFSET) if is_growing else log_beta - math.log(2))
    # Values of v2 are not shorter than 1, so that `o_proj` takes their length.
    heads.value_scale.zero_()
    lengths = (PARAMETER_SCALE * old.value_scale).exp().repeat_interleave(width)
    columns = old.o_proj.weight * lengths
    new.o_proj.weight.zero_()
    new.o_proj.weight[:, -columns.shape[1] :] = columns
    if old.o_proj.bias is not None:
        new.o_proj.bias.copy_(old.o_proj.bias)


def convert_to_v2(model: MemoryMosaicForCausalLM, **fields: Any) -> MemoryMosaicV2ForCausalLM:
    """Return a v2 model with the logits of a v1 model, but for rounding.

    Args:
        model: in float32 or float64; it stays as it is.
        fields: `num_short_term_heads` (as many as `num_attention_heads` when absent) and `short_term_window` of the
            new heads, whose other parameters are initialised at random.

    Raises:
        ValueError: if it is another model, in half precision, or of kernels that v2 does not have.
    """
    if type(model) is not MemoryMosaicForCausalLM:
        raise ValueError(f"A {type(model).__name__} is no MemoryMosaicForCausalLM, which alone is converted to v2.")
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"The model is in {model.dtype}, whose rounding would change the logits: load it in float32, convert it, "
            "then choose a precision."
        )
    config = convert_config(model.config, **fields)
    new: Any = MemoryMosaicV2ForCausalLM(config)  # a checker takes attributes of modules for tensors
    new = new.to(model.dtype)
    exponent = float(model.config.bandwidth_exponent)
    pairs = [(model.model.embed_tokens, new.model.embed_tokens), (model.model.norm, new.model.norm)]
    pairs += [] if config.tie_word_embeddings else [(model.lm_head, new.lm_head)]
    for old_layer, new_layer in zip(model.model.layers, new.model.layers, strict=True):
        same = ("contextual_norm", "persistent_norm", "persistent_memory")
        pairs += [(old_layer.get_submodule(name), new_layer.get_submodule(name)) for name in same]
        convert_memory(old_layer.contextual_memory, new_layer.contextual_memory, exponent)
    for old, part in pairs:
        part.load_state_dict(old.state_dict())
    new.tie_weights()
    return new.train(model.training)


def convert_folder_to_v2(folder: Path, output: Path, **fields: Any) -> MemoryMosaicV2ForCausalLM:
    """Convert a folder of a v1 model to one of v2, with its tokenizer if it has one.

    Raises:
        ValueError: if the folder holds another model, or the output folder is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: name a folder that does not exist yet.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is no folder of a model.")
    if not MemoryMosaicConfig.get_config_dict(folder)[0].get("model_type") == MemoryMosaicConfig.model_type:
        raise ValueError(f"{folder} holds no {MemoryMosaicConfig.model_type}, which alone is converted to v2.")
    model = convert_to_v2(MemoryMosaicForCausalLM.from_pretrained(folder), **fields)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer: PreTrainedTokenizerBase | None = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    export_model(model, tokenizer, output)
    return model

# SPDX-License-Identifier: Apache-2.0
"""Small models with random parameters, and token ids for them."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from modeling_memory_mosaic import (
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    masking_memory_mosaic,
    memories_memory_mosaic,
)


# Kernels that do not depend on the number of pairs, as the authors', and those that narrow with it, from 1 or 3 on.
BANDWIDTHS: list[dict[str, Any]] = [
    {},
    {"bandwidth_exponent": 0.25},
    {"bandwidth_exponent": 0.25, "bandwidth_start": 3},
]
NARROWING = BANDWIDTHS[-1]
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


# Runs a test for a `model` of each kernel, and of v2 by the names of its kinds. The fixture stands in conftest.py.
by_bandwidth = pytest.mark.parametrize(
    "model",
    [{}, NARROWING, "mosaic v2", "mosaic v2 otherwise"],
    indirect=True,
    ids=["fixed", "narrowing", "v2", "v2 otherwise"],
)


def randomize_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """Make each parameter random, so that no two heads and no two layers are alike; return the model in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> MemoryMosaicForCausalLM:
    """Return a small model in eval mode, with random parameters, so that no two heads and no two layers are alike."""
    torch.manual_seed(seed)
    return randomize_parameters(MemoryMosaicForCausalLM(MemoryMosaicConfig(**SIZES | config))).to(dtype)


def make_ids(*shape: int, seed: int = 0, vocab_size: int = SIZES["vocab_size"]) -> torch.Tensor:
    """Return random token ids of a shape."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def read_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mosaics read by sdpa and its masks on a CPU too."""
    for module in (memories_memory_mosaic, masking_memory_mosaic):
        monkeypatch.setattr(module, "can_read_in_blocks", lambda tensor: False)


def checkpoint_activations(model: PreTrainedModel, use_reentrant: bool) -> None:
    """Switch gradient checkpointing on, by its name from transformers 5.23 on or by the older one."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})

# SPDX-License-Identifier: Apache-2.0
"""Every test runs offline, with a cache of its own, on small models whose parameters are all away from their start."""

import os
import sys
import tempfile
from pathlib import Path


# Before the first import of a Hugging Face library: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="memory_mosaic_tests_")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM  # noqa: E402


SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> MemoryMosaicForCausalLM:
    """A small model in eval mode. Each parameter is random, so that no two heads and no two layers are alike."""
    torch.manual_seed(seed)
    model = MemoryMosaicForCausalLM(MemoryMosaicConfig(**SIZES | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def make_ids(*shape: int, seed: int = 0, vocab_size: int = SIZES["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, at equal size: what a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def checkpoint_activations(model, use_reentrant: bool) -> None:
    """Switch gradient checkpointing on, under the name that it has from transformers 5.23 on, or before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


@pytest.fixture
def model() -> MemoryMosaicForCausalLM:
    return make_model()


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """What one test compiled must not count against the limits of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

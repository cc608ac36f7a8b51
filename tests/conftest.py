# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, which run offline, with a cache of their own."""

import os
import sys
import tempfile


# Before the first import of a Hugging Face library: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="memory_mosaic_tests_")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.kinds import make_mosaic  # noqa: E402

from modeling_memory_mosaic import MemoryMosaicForCausalLM  # noqa: E402


@pytest.fixture
def model(request: pytest.FixtureRequest) -> MemoryMosaicForCausalLM:
    return make_mosaic(getattr(request, "param", {}))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Reset the compiler, so that graphs of one test do not count against the limits of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

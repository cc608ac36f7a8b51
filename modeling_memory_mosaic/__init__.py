# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics for transformers. Importing this package makes `AutoModel` and its kin know them."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_memory_mosaic import (
    MemoryMosaicCacheLayer,
    MemoryMosaicStaticCacheLayer,
    memory_from_state_dict,
    memory_state_dict,
)
from .configuration_memory_mosaic import MemoryMosaicConfig
from .modeling_memory_mosaic import (
    MemoryMosaicForCausalLM,
    MemoryMosaicModel,
    MemoryMosaicPreTrainedModel,
    kernel_smoothing,
    leaky_average,
)


AutoConfig.register(MemoryMosaicConfig.model_type, MemoryMosaicConfig, exist_ok=True)
AutoModel.register(MemoryMosaicConfig, MemoryMosaicModel, exist_ok=True)
AutoModelForCausalLM.register(MemoryMosaicConfig, MemoryMosaicForCausalLM, exist_ok=True)

__all__ = [
    "MemoryMosaicCacheLayer",
    "MemoryMosaicConfig",
    "MemoryMosaicForCausalLM",
    "MemoryMosaicModel",
    "MemoryMosaicPreTrainedModel",
    "MemoryMosaicStaticCacheLayer",
    "kernel_smoothing",
    "leaky_average",
    "memory_from_state_dict",
    "memory_state_dict",
]

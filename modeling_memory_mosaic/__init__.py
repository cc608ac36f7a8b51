# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics for transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .bounded_memory_mosaic import bounded
from .cache_memory_model import MemoryModelCache
from .cache_memory_mosaic import (
    MemoryMosaicCacheLayer,
    MemoryMosaicStaticCacheLayer,
)
from .cache_memory_mosaic_v2 import MemoryMosaicV2CacheLayer, MemoryMosaicV2StaticCacheLayer
from .configuration_continuous_memory_mosaic import ContinuousMemoryMosaicConfig
from .configuration_memory_model import MemoryModelConfig
from .configuration_memory_mosaic import MemoryMosaicConfig
from .configuration_memory_mosaic_v2 import MemoryMosaicV2Config
from .identity_memory_mosaic import weights_fingerprint
from .inspection_continuous_memory_mosaic import ContinuousMemoryMosaicUnits, inspect_continuous_units
from .inspection_memory_mosaic import (
    MemoryMosaicTrace,
    MemoryMosaicUnits,
    inspect_units,
    summarize_units,
    trace_tokens,
)
from .layout_memory_mosaic import context_parallel
from .modeling_continuous_memory_mosaic import ContinuousMemoryMosaicModel
from .modeling_memory_model import (
    MemoryModelEncoder,
    MemoryModelForCausalLM,
    MemoryModelPreTrainedModel,
)
from .modeling_memory_mosaic import (
    MemoryMosaicForCausalLM,
    MemoryMosaicForSequenceClassification,
    MemoryMosaicModel,
    MemoryMosaicPreTrainedModel,
)
from .modeling_memory_mosaic_v2 import (
    MemoryMosaicV2ForCausalLM,
    MemoryMosaicV2ForSequenceClassification,
    MemoryMosaicV2Model,
    MemoryMosaicV2PreTrainedModel,
)
from .ops_memory_mosaic import kernel_smoothing, leaky_average
from .retrieval_memory_mosaic import nearest
from .store_memory_mosaic import MosaicMemory
from .tensors_memory_mosaic import memory_from_state_dict, memory_state_dict


AutoConfig.register(MemoryMosaicConfig.model_type, MemoryMosaicConfig, exist_ok=True)
AutoModel.register(MemoryMosaicConfig, MemoryMosaicModel, exist_ok=True)
AutoConfig.register(ContinuousMemoryMosaicConfig.model_type, ContinuousMemoryMosaicConfig, exist_ok=True)
AutoModel.register(ContinuousMemoryMosaicConfig, ContinuousMemoryMosaicModel, exist_ok=True)
AutoConfig.register(MemoryModelConfig.model_type, MemoryModelConfig, exist_ok=True)
AutoModel.register(MemoryModelConfig, MemoryModelEncoder, exist_ok=True)
AutoModelForCausalLM.register(MemoryModelConfig, MemoryModelForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(MemoryMosaicConfig, MemoryMosaicForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MemoryMosaicConfig, MemoryMosaicForSequenceClassification, exist_ok=True)
AutoConfig.register(MemoryMosaicV2Config.model_type, MemoryMosaicV2Config, exist_ok=True)
AutoModel.register(MemoryMosaicV2Config, MemoryMosaicV2Model, exist_ok=True)
AutoModelForCausalLM.register(MemoryMosaicV2Config, MemoryMosaicV2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    MemoryMosaicV2Config, MemoryMosaicV2ForSequenceClassification, exist_ok=True
)

# From here on `save_pretrained` writes the code beside the weights, for machines without this package.
MemoryMosaicConfig.register_for_auto_class()
MemoryMosaicModel.register_for_auto_class("AutoModel")
ContinuousMemoryMosaicConfig.register_for_auto_class()
ContinuousMemoryMosaicModel.register_for_auto_class("AutoModel")
MemoryModelConfig.register_for_auto_class()
MemoryModelEncoder.register_for_auto_class("AutoModel")
MemoryModelForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MemoryMosaicForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MemoryMosaicForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
MemoryMosaicV2Config.register_for_auto_class()
MemoryMosaicV2Model.register_for_auto_class("AutoModel")
MemoryMosaicV2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MemoryMosaicV2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "ContinuousMemoryMosaicConfig",
    "ContinuousMemoryMosaicModel",
    "ContinuousMemoryMosaicUnits",
    "MemoryModelCache",
    "MemoryModelConfig",
    "MemoryModelEncoder",
    "MemoryModelForCausalLM",
    "MemoryModelPreTrainedModel",
    "MemoryMosaicCacheLayer",
    "MemoryMosaicConfig",
    "MemoryMosaicForCausalLM",
    "MemoryMosaicForSequenceClassification",
    "MemoryMosaicModel",
    "MemoryMosaicPreTrainedModel",
    "MemoryMosaicStaticCacheLayer",
    "MemoryMosaicTrace",
    "MemoryMosaicUnits",
    "MemoryMosaicV2CacheLayer",
    "MemoryMosaicV2Config",
    "MemoryMosaicV2ForCausalLM",
    "MemoryMosaicV2ForSequenceClassification",
    "MemoryMosaicV2Model",
    "MemoryMosaicV2PreTrainedModel",
    "MemoryMosaicV2StaticCacheLayer",
    "MosaicMemory",
    "bounded",
    "context_parallel",
    "inspect_continuous_units",
    "inspect_units",
    "kernel_smoothing",
    "leaky_average",
    "memory_from_state_dict",
    "memory_state_dict",
    "nearest",
    "summarize_units",
    "trace_tokens",
    "weights_fingerprint",
]

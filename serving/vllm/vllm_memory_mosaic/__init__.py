# SPDX-License-Identifier: Apache-2.0
"""A plugin of vLLM for Memory Mosaics: vLLM calls `register` in each of its processes.

`settings.py` has what vLLM asks before it builds a model, `states.py` the running states of each request, `slots.py`
the pairs in the paged cache, `model.py` and `model_v2.py` the models.
"""

import importlib.metadata


# Internals of vLLM, which this package relies on, change with each minor version: it is tried with this one alone.
VLLM_VERSION = "0.32"


def check_version() -> None:
    """Raise `ImportError` if the installed vLLM is of another minor version than the one that was tried."""
    from vllm import __version__

    if __version__.split("+")[0].split(".")[:2] != VLLM_VERSION.split("."):
        own = importlib.metadata.version("vllm-memory-mosaic")
        raise ImportError(
            f"vllm-memory-mosaic {own} was tried with vLLM {VLLM_VERSION} only, and this is {__version__}: install "
            f"that version, or set VLLM_PLUGINS to the names of other plugins to go on without this one."
        )


def register() -> None:
    """Make Memory Mosaics known to vLLM and transformers. May be called several times."""
    check_version()
    # Imported for what it does: transformers then knows the configurations by name.
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    import modeling_memory_mosaic  # noqa: F401

    from .settings import MosaicConvertor, MosaicSettings, MosaicV2Convertor

    package = "vllm_memory_mosaic"
    for name, model in (
        ("MemoryMosaicForCausalLM", f"{package}.model:MemoryMosaicForCausalLM"),
        ("MemoryMosaicV2ForCausalLM", f"{package}.model_v2:MemoryMosaicV2ForCausalLM"),
    ):
        ModelRegistry.register_model(name, model)
        MODELS_CONFIG_MAP[name] = MosaicSettings
    MODEL_ARCH_CONFIG_CONVERTORS["memory_mosaic"] = MosaicConvertor
    MODEL_ARCH_CONFIG_CONVERTORS["memory_mosaic_v2"] = MosaicV2Convertor

# SPDX-License-Identifier: Apache-2.0
"""What vLLM asks about a Memory Mosaic before it builds one: the width of stored keys, and what is refused."""

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase


# Widths of heads that vLLM's attention on CPUs has; those of its other attentions include them.
STORED_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def stored_width(head_dim: int) -> int:
    """Return the width of keys and values in the paged cache: one channel more than `head_dim`, at least.

    Raises:
        ValueError: if attention has no heads of that width.
    """
    for width in STORED_WIDTHS:
        if width > head_dim:
            return width
    raise ValueError(
        f"head_dim={head_dim}: this plugin needs one channel beside it, and vLLM's attention on CPUs has no more than "
        f"{STORED_WIDTHS[-1]}. Use transformers for this model."
    )


class MosaicConvertor(ModelArchConfigConvertorBase):
    """What vLLM reads of a configuration, by which it sizes the cache."""

    def get_head_size(self) -> int:
        return stored_width(self.hf_text_config.head_dim)

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        # `max_position_embeddings` is advice: there are no positions and no longest text.
        return float("inf"), None


class MosaicV2Convertor(MosaicConvertor):
    """What vLLM reads of a configuration of v2: heads of the larger of its two contextual memories."""

    def get_total_num_attention_heads(self) -> int:
        return max(self.hf_text_config.num_short_term_heads, self.hf_text_config.num_long_term_heads)

    def get_total_num_kv_heads(self) -> int:
        return self.get_total_num_attention_heads()


class MosaicSettings(VerifyAndUpdateConfig):
    """What Memory Mosaics of both versions cannot be served with."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raise `ValueError` for settings of the engine under which answers would be wrong."""
        parallel: Any = vllm_config.parallel_config
        if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
            raise ValueError("Memory Mosaics are served by one process: leave the tensor and pipeline sizes at 1.")
        cache_dtype = vllm_config.cache_config.cache_dtype
        if cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise ValueError(
                f"kv_cache_dtype={cache_dtype!r}: slot 0 of each text is kept out of reach by a number that this "
                "precision cannot hold. Leave --kv-cache-dtype out."
            )
        if vllm_config.quant_config is not None:
            raise ValueError(
                "Quantized Memory Mosaics are not supported by this plugin: serve the weights as they are."
            )
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ValueError(
                "Pairs and states are caches of several kinds, which only the hybrid manager of vLLM holds: leave "
                "--disable-hybrid-kv-cache-manager out."
            )
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "Speculative decoding is not supported: a token that is taken back leaves its trace in the leaky sums."
            )

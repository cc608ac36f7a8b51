# SPDX-License-Identifier: Apache-2.0
"""Settings of memory models: each way to read memories."""

from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES


READS = {
    "prefix": {"memory_read": "prefix"},
    "last": {"memory_read": "prefix", "memory_pooling": "last", "encoder_chunk_positions": False},
    "unrolled": {"memory_read": "unrolled_prefix", "slots_per_memory": 3, "decoder_chunk_positions": True},
    "additive": {"memory_read": "unroll_add", "unroll_window": 2},
    "gated": {"memory_read": "gated_add", "unroll_window": 2},
    "cross": {"memory_read": "cross_attention", "slots_per_memory": 3},
    "positions": {"memory_read": "prefix", "decoder_chunk_positions": True, "memory_pooling": "mean"},
    "two vectors": {"num_memory_embeddings": 2, "memory_size": 10, "decoder_chunk_positions": True},
    "latest two": {"max_memories": 2, "unroll_window": 3},
    "none": {"max_memories": 0},
    "bytes": {"memory_quantization": "int8"},
}


def all_weights(**weights):
    return {f"{objective}_weight": 1.0 for objective in OBJECTIVES} | weights

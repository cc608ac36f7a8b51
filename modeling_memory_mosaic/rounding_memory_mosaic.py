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
"""Rounding of stored vectors to one byte a number."""

import torch


# Largest code on each side of zero; float8 e4m3 reaches to 448.
LARGEST_CODE = {"int8": 127.0, "fp8": 448.0}
CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize_vectors(vectors: torch.Tensor, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes `(..., D)` of one byte each, and the scale `(..., 1)` of each vector, in float32.

    A scale has few binary digits, in half precision one. So a code times a scale is exact, and rounding what was
    rounded before changes nothing.
    """
    steps = 2.0 if vectors.element_size() == 2 else 2.0**16
    fraction, exponent = torch.frexp(vectors.float().abs().amax(-1, keepdim=True) / LARGEST_CODE[quantization])
    scale = torch.ldexp((fraction * steps).ceil() / steps, exponent)
    scaled = vectors.float() / scale.masked_fill(scale == 0, 1.0)
    return (scaled.round() if quantization == "int8" else scaled).to(CODE_DTYPES[quantization]), scale


def dequantize_vectors(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the vectors `(..., D)` that [`quantize_vectors`] rounded to these codes and scales."""
    return (codes.float() * scale).to(dtype)


def check_codes(name: str, codes: torch.Tensor, scale: torch.Tensor, quantization: str) -> None:
    """Raise `ValueError` if codes `(..., D)` and scales `(..., 1)` are not what [`quantize_vectors`] returns."""
    dtype = CODE_DTYPES[quantization]
    if codes.dtype != dtype or scale.dtype != torch.float32 or scale.shape != (*codes.shape[:-1], 1):
        raise ValueError(
            f"{name} are {codes.dtype} with scales {scale.dtype} of shape {tuple(scale.shape)}, but must be {dtype} "
            f"with float32 scales of shape {(*codes.shape[:-1], 1)}: write them again."
        )


__all__ = ["check_codes", "dequantize_vectors", "quantize_vectors"]

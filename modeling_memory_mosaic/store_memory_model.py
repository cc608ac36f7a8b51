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
"""Storage of a memory model's memories: rounding to one byte a number, named tensors, rows, and checks of memories.

Named tensors are what `safetensors` saves. Rows, one for each memory, are what a data set holds.

Shapes are those of `modeling_memory_model.py`.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from .configuration_memory_model import MemoryModelConfig
from .identity_memory_mosaic import weights_fingerprint
from .masking_memory_mosaic import raise_where
from .rounding_memory_mosaic import CODE_DTYPES, check_codes, dequantize_vectors, quantize_vectors


# What a stored memory consists of; `scale` comes with codes only.
STORED_NAMES = ("memories", "memory_mask", "chunk_length", "encoder")
# The columns of a data set of memories, a row for each.
ROW_NAMES = ("source", "chunk", "text", "vectors", "scales", "chunk_length", "encoder")
# Fields of the configuration that shape a memory.
MEMORY_FIELDS = ("chunk_length", "num_memory_embeddings", "memory_size", "memory_pooling", "memory_quantization")


def fake_quantize(memories: torch.Tensor, quantization: str | None) -> torch.Tensor:
    """Return memories `(..., D)` rounded as they will be stored, with the gradient of memories as they are."""
    if quantization is None:
        return memories
    codes, scale = quantize_vectors(memories.detach(), quantization)
    return memories + (dequantize_vectors(codes, scale, memories.dtype) - memories.detach())


def encoder_fingerprint(encoder: PreTrainedModel) -> bytes:
    """Return the sha256 of an encoder's weights and of the settings that shape a memory.

    Raises:
        ValueError: if the weights have no values here, see [`weights_fingerprint`].
    """
    config: Any = encoder.config
    fields = [(name, getattr(config, name)) for name in MEMORY_FIELDS]
    if config.encoder_layer != -1:  # memories of the last layer keep the fingerprint that they had before
        fields.append(("encoder_layer", config.encoder_layer))
    digest = hashlib.sha256(repr(fields).encode())
    digest.update(weights_fingerprint(encoder, config.encoder))
    return digest.digest()


def check_memory_shapes(
    memories: torch.Tensor | None, memory_mask: torch.Tensor | None, num_texts: int, config: MemoryModelConfig
) -> None:
    """Raise if memories have another shape than this model's, or another number of rows than the text."""
    if memories is None and memory_mask is not None:
        raise ValueError("memory_mask is given without memories: pass memories too.")
    if memories is None:
        return
    shape = (config.num_memory_embeddings, config.memory_size)
    if memories.ndim != 4 or tuple(memories.shape[2:]) != shape:
        raise ValueError(
            f"memories have shape {tuple(memories.shape)}, this model's are (batch, memories, {shape[0]}, "
            f"{shape[1]}): encode the text with this model, see `encode`."
        )
    if memories.shape[0] != num_texts:
        raise ValueError(f"memories are of {memories.shape[0]} rows, but the text has {num_texts}: pass as many.")
    if memory_mask is not None and memory_mask.shape != memories.shape[:2]:
        raise ValueError(
            f"memory_mask has shape {tuple(memory_mask.shape)}: it must be {tuple(memories.shape[:2])}, one for "
            "each of the memories."
        )


def check_memory_values(memories: torch.Tensor, memory_mask: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Raise if memories are not finite floating-point numbers, or the mask is ambiguous."""
    if not memories.is_floating_point():
        raise ValueError(
            f"memories are {memories.dtype}: pass floating-point numbers of any precision, as `encode` gives them."
        )
    is_finite = memories.to(dtype).isfinite().flatten(2).all(-1)
    if memory_mask is not None:
        if memory_mask.is_floating_point() or memory_mask.is_complex():
            raise ValueError(
                f"memory_mask is {memory_mask.dtype}: it must be of booleans or whole numbers, 1 where there is a "
                "memory and 0 where there is none."
            )
        raise_where((memory_mask != 0) & (memory_mask != 1), "memory_mask must hold 1 and 0 only.", memory_mask)
        is_finite = is_finite | ~memory_mask.to(is_finite.device, torch.bool)
    raise_where(
        ~is_finite,
        f"memories are not finite as numbers of this model, which are {dtype}: encode the text again.",
    )


def check_memories(
    memories: torch.Tensor | None,
    memory_mask: torch.Tensor | None,
    num_texts: int,
    config: MemoryModelConfig,
    dtype: torch.dtype,
) -> None:
    """Raise if memories are not what this model's encoder writes for so many texts.

    Args:
        memories (`torch.Tensor` of shape `(B, M, K, D)`, *optional*), memory_mask (`(B, M)`, *optional*): as given.
        num_texts (`int`): B.
        dtype (`torch.dtype`): of the model; values must be finite in it.
    """
    check_memory_shapes(memories, memory_mask, num_texts, config)
    if memories is not None:
        check_memory_values(memories, memory_mask, dtype)


def memories_to_tensors(
    memories: torch.Tensor, memory_mask: torch.Tensor | None, encoder: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Return memories `(B, M, K, D)` of an encoder as named tensors to save."""
    config: Any = encoder.config
    if memory_mask is None:
        memory_mask = torch.ones(memories.shape[:2], dtype=torch.bool)
    tensors = {"memories": memories, "memory_mask": memory_mask}
    if config.memory_quantization is not None:
        tensors["memories"], tensors["scale"] = quantize_vectors(memories, config.memory_quantization)
    tensors["chunk_length"] = torch.tensor(config.chunk_length)
    tensors["encoder"] = torch.frombuffer(bytearray(encoder_fingerprint(encoder)), dtype=torch.uint8)
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def check_origin(tensors: dict[str, torch.Tensor], encoder: PreTrainedModel) -> None:
    """Raise if stored memories were written by another encoder, or if a part of them is missing."""
    missing = set(STORED_NAMES) - tensors.keys()
    if missing:
        raise ValueError(f"These are no memories of a memory model: {sorted(missing)} are missing.")
    if tensors["chunk_length"].tolist() != encoder.config.chunk_length:
        raise ValueError(
            f"These are memories of chunks of {tensors['chunk_length'].tolist()} tokens, but this model's "
            f"chunk_length is {encoder.config.chunk_length}: encode the text again."
        )
    if tensors["encoder"].tolist() != list(encoder_fingerprint(encoder)):
        raise ValueError("These are memories of another encoder than this model's: encode the text again.")


def memories_from_tensors(
    tensors: dict[str, torch.Tensor], encoder: PreTrainedModel, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memories `(B, M, K, D)` in `dtype` and their mask `(B, M)`, from what [`memories_to_tensors`] returned.

    Raises:
        ValueError: if another encoder wrote them, or no encoder could have.
    """
    check_origin(tensors, encoder)
    config: Any = encoder.config
    memories, memory_mask = tensors["memories"], tensors["memory_mask"]
    if 0 in memories.shape:
        raise ValueError(f"memories have shape {tuple(memories.shape)}, which holds none: encode the text again.")
    if config.memory_quantization is not None:
        scale = tensors.get("scale", torch.empty(0))
        check_codes("memories", memories, scale, config.memory_quantization)
        memories = dequantize_vectors(memories, scale, dtype)
    check_memories(memories, memory_mask, memories.shape[0], config, dtype)
    return memories.to(dtype), memory_mask


# Rows of a data set


def memories_to_rows(
    memories: torch.Tensor,
    memory_mask: torch.Tensor | None,
    encoder: PreTrainedModel,
    sources: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """Return memories `(B, M, K, D)` of B texts as rows of plain values, one for each memory.

    Args:
        memory_mask (`torch.Tensor` of shape `(B, M)`, *optional*): all ones when absent.
        sources: the name of each text.
        texts: of each text the text of its chunks, as many as it has memories; empty when absent.

    Raises:
        ValueError: if there are not as many names or chunks as memories, or two texts have one name.
    """
    tensors = memories_to_tensors(memories, memory_mask, encoder)
    if len(sources) != len(memories) or len(set(sources)) < len(sources):
        raise ValueError(f"sources are {list(sources)}: give each of the {len(memories)} texts a name of its own.")
    counts = tensors["memory_mask"].sum(-1).tolist()
    if texts is not None and [len(chunks) for chunks in texts] != counts:
        raise ValueError(f"texts have {[len(chunks) for chunks in texts]} chunks, but there are {counts} memories.")
    common = {"chunk_length": int(tensors["chunk_length"]), "encoder": bytes(tensors["encoder"].tolist()).hex()}
    codes = tensors["memories"]
    # Tables of data know no number of eight bits with a point: such codes are bytes there.
    codes = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
    codes = codes if encoder.config.memory_quantization is not None else codes.float()
    rows = []
    for number, source in enumerate(sources):
        for chunk, place in enumerate(tensors["memory_mask"][number].nonzero().flatten().tolist()):
            scales = tensors["scale"][number, place].flatten().tolist() if "scale" in tensors else []
            text = "" if texts is None else texts[number][chunk]
            own = {"source": source, "chunk": chunk, "text": text, "vectors": codes[number, place].tolist()}
            rows.append(own | {"scales": scales} | common)
    return rows


def _tensors_of_rows(rows: Sequence[Mapping[str, Any]], quantization: str | None) -> dict[str, torch.Tensor]:
    """Return rows as the named tensors of so many texts of one memory each."""
    dtype = torch.float32 if quantization is None else CODE_DTYPES[quantization]
    stored = torch.uint8 if quantization == "fp8" else dtype
    try:
        codes = torch.tensor([row["vectors"] for row in rows], dtype=stored)[:, None]
        scales = torch.tensor([row["scales"] for row in rows], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"Vectors of these rows are no numbers of one shape ({error}): encode the texts again."
        ) from None
    tensors = {"memories": codes.view(dtype) if quantization == "fp8" else codes}
    if quantization is not None:
        tensors["scale"] = scales[:, None, :, None]
    tensors["memory_mask"] = torch.ones(len(rows), 1, dtype=torch.bool)
    tensors["chunk_length"] = torch.tensor(rows[0]["chunk_length"])
    tensors["encoder"] = torch.frombuffer(bytearray.fromhex(rows[0]["encoder"]), dtype=torch.uint8)
    return tensors


def memories_from_rows(
    rows: Iterable[Mapping[str, Any]], encoder: PreTrainedModel, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memories `(B, M, K, D)` in `dtype` and their mask `(B, M)`: a text for each source, as they first occur.

    Memories of a source are in the order of its chunks, the latest last, whatever the order of the rows. Some may be
    left out.

    Raises:
        ValueError: if there are no rows, a column is missing, a chunk occurs twice, or another encoder wrote them.
    """
    given = [row for row in rows]
    if not given:
        raise ValueError("There are no rows: a data set of memories has one for each memory.")
    missing = sorted({name for row in given for name in ROW_NAMES if name not in row} - {"text"})
    if missing:
        raise ValueError(f"These are no rows of memories: the columns {missing} are missing.")
    writers = {(row["chunk_length"], row["encoder"]) for row in given}
    if len(writers) > 1:
        raise ValueError(f"These rows are of {len(writers)} encoders: choose those of this model by `encoder`.")
    places = {(row["source"], row["chunk"]): number for number, row in enumerate(given)}
    if len(places) < len(given):
        raise ValueError("A chunk of a source occurs twice in these rows: leave the second one out.")
    alone, _ = memories_from_tensors(_tensors_of_rows(given, encoder.config.memory_quantization), encoder, dtype)
    by_source: dict[str, list[int]] = {row["source"]: [] for row in given}
    for source, chunk in sorted(places, key=lambda place: place[1]):
        by_source[source].append(places[source, chunk])
    most = max(map(len, by_source.values()))
    memories = alone.new_zeros(len(by_source), most, *alone.shape[2:])
    mask = torch.zeros(len(by_source), most, dtype=torch.bool)
    for number, chosen in enumerate(by_source.values()):
        memories[number, most - len(chosen) :] = alone[chosen, 0]
        mask[number, most - len(chosen) :] = True
    return memories, mask

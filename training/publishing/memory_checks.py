# SPDX-License-Identifier: Apache-2.0
"""Checks of a published memory, without a model: its header, its result, and its numbers.

A memory names the texts that it holds and the model that has read them, and nothing else. Its header and its result
agree, and its tensors are those of that model's layers, finite, with slots of these texts only.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import ConfigDict, Field, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from modeling_memory_mosaic.files_memory_mosaic import (
    FILE_NAME,
    SETTINGS_NAME,
    read_bias,
    read_pairs,
    read_settings,
    read_slots,
)
from modeling_memory_mosaic.rounding_memory_mosaic import CODE_DTYPES
from training.hub import COMMIT, REPO_ID
from training.publishing.folder import RESULT
from training.recipe import Section
from training.untrusted import parse_json, read_object


MOST_LAYERS = 1000
# Names of texts appear in cards and terminals and may be those of files: relative, without signs of markup.
SourceName = Annotated[str, Field(pattern=r"^\w[\w ,.()+=@&'-]*(/\w[\w ,.()+=@&'-]*)*$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Parsed = TypeVar("_Parsed", bound=Section)


class Settings(Section):
    """The header of a memory's file, as `MosaicMemory.save_pretrained` writes it."""

    format: Literal[1]
    model_type: Literal["memory_mosaic", "memory_mosaic_v2"]
    fingerprint: Sha256
    tokenizer: Sha256
    precision: Literal["float64", "float32", "bfloat16", "int8", "fp8"]
    read: Literal["alone"]
    sources: list[SourceName] = Field(min_length=1)
    num_slots: PositiveInt
    transformers: str = Field(pattern=r"^[\w.+-]{1,40}$")


class Text(Section):
    """A text of a memory: its tokens when it was read, and its pairs that each head of the first layer still has."""

    name: SourceName
    tokens: PositiveInt
    pairs: int = Field(ge=0)


class Content(Section):
    """What a memory holds."""

    precision: str
    pairs: int = Field(ge=0)
    bytes: PositiveInt
    texts: list[Text]


class Base(Section):
    """The model that has read a memory: where it is, and by what it is known."""

    repo_id: str = Field(pattern=f"^{REPO_ID.pattern}$")
    revision: str = Field(pattern=f"^{COMMIT.pattern}$")
    weights: dict[Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")], Sha256] = Field(min_length=1)
    fingerprint: Sha256
    tokenizer: Sha256


class _Partial(Section):
    """A part of a result that has more."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Architecture(_Partial):
    """The sizes of the model that determine those of its memories."""

    model_type: Literal["memory_mosaic", "memory_mosaic_v2"]
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_attention_heads: PositiveInt
    num_long_term_heads: PositiveInt | None = None  # of v2, whose long-term pairs alone are kept
    head_dim: PositiveInt
    vocab_size: PositiveInt


class Read(_Partial):
    """The files that were read, by the names of their texts."""

    files: dict[SourceName, Sha256]


class Data(_Partial):
    """The data of a memory's result."""

    read: Read


class Recall(_Partial):
    """How well a memory gives its texts back: the losses that its card states, by the way of reading."""

    loss: dict[Literal["behind", "forgotten", "alone"], float]


class Result(_Partial):
    """What `result.json` of a published memory says."""

    task: Literal["memorize"]
    architecture: Architecture
    base: Base
    data: Data
    memory: Content
    recall: Recall | None = None


def _parsed(name: str, section: Callable[[Any], _Parsed], content: Any) -> _Parsed:
    try:
        return section(content)
    except ValidationError as error:
        problems = [f"`{'.'.join(map(str, problem['loc']))}`: {problem['msg']}" for problem in error.errors()]
        shown = "; ".join(map(ascii, problems[:5])).replace("'`", "`")
        raise ValueError(f"{name} does not say of a memory what this project writes: {shown}") from None


def read_result(folder: Path) -> Result:
    """Return what the result of a published memory says; `ValueError` if it is not what this project writes."""
    return _parsed(RESULT, Result.model_validate, read_object(folder / RESULT))


def _read_header(path: Path) -> Settings:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.keys() != {SETTINGS_NAME}:
        raise ValueError(
            f"{path.name} says {sorted(metadata)} beside its tensors: a memory has {SETTINGS_NAME!r} alone"
        )
    return _parsed(path.name, Settings.model_validate, parse_json(metadata[SETTINGS_NAME], path.name))


def check_statements(folder: Path) -> str:
    """Check that header and result of a memory are such as this project writes, and say the same."""
    settings, result = _read_header(folder / FILE_NAME), read_result(folder)
    if len(set(settings.sources)) < len(settings.sources):
        raise ValueError(f"{FILE_NAME} names two texts alike")
    stated = {
        "fingerprint": (settings.fingerprint, result.base.fingerprint),
        "tokenizer": (settings.tokenizer, result.base.tokenizer),
        "precision": (settings.precision, result.memory.precision),
        "texts": (settings.sources, [text.name for text in result.memory.texts]),
        "files": (sorted(settings.sources), sorted(result.data.read.files)),
        "bytes": ((folder / FILE_NAME).stat().st_size, result.memory.bytes),
    }
    for name, (own, other) in stated.items():
        if own != other:
            raise ValueError(f"the {name} of {FILE_NAME} are {own!a}, but {RESULT} says {other!a}: memorize again")
    return f"a memory of {len(settings.sources)} texts by {result.base.repo_id} at {result.base.revision[:12]}"


def _check_tensors(file: Any, settings: dict[str, Any], sizes: Architecture) -> torch.Tensor:
    """Check all tensors of a memory's file, and return which of its slots hold a pair of the first head `(S,)`."""
    precision, layers = settings["precision"], range(sizes.num_hidden_layers)
    parts = [f"layers.{index}.{part}" for index in layers for part in ("keys", "values")]
    expected = {"input_ids", "source_ids", "places", *parts, *(f"layers.{index}.slot_bias" for index in layers)}
    expected |= {f"{name}.scale" for name in parts if precision in CODE_DTYPES}
    if wrong := expected ^ set(file.keys()):
        raise ValueError(f"{len(wrong)} tensors of {FILE_NAME} are missing or no part of it, such as {min(wrong)!a}")
    slots = read_slots(file, settings)
    if (slots["input_ids"] >= sizes.vocab_size).any():
        raise ValueError(f"input_ids of {FILE_NAME} are not below {sizes.vocab_size}, the tokens of its model")
    shape = (sizes.num_long_term_heads or sizes.num_attention_heads, settings["num_slots"], sizes.head_dim)
    dtype = torch.float64 if precision == "float64" else torch.float32
    for name in parts:
        read_pairs(file, name, shape, precision, dtype)  # raises for another shape, and for what is not finite
    biases = [read_bias(file, index, shape) for index in layers]
    return biases[0][0, 0] > -torch.inf


def check_pairs(folder: Path) -> str:
    """Check that the tensors of a memory are those that its settings and its result describe, and are finite."""
    settings, result = read_settings(folder / FILE_NAME), read_result(folder)
    try:
        with safe_open(folder / FILE_NAME, framework="pt") as file:
            is_pair = _check_tensors(file, settings, result.architecture)
            owners = file.get_tensor("source_ids")[is_pair]
            count = len(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{FILE_NAME} is damaged ({error}): memorize the texts again") from None
    pairs = owners.bincount(minlength=len(settings["sources"])).tolist()
    if pairs != [text.pairs for text in result.memory.texts] or sum(pairs) != result.memory.pairs:
        raise ValueError(f"the pairs of {FILE_NAME} are {pairs}, but {RESULT} says otherwise: memorize again")
    return f"{count} tensors of {sum(pairs):,} pairs, every number finite"

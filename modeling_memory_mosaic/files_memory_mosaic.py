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
"""A [`MosaicMemory`] on the disk and on the Hub: one safetensors file, whose header says what the pairs are.

Shapes use H heads, S slots of a memory, D head width.
"""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import CommitInfo, HfApi, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from .identity_memory_mosaic import MemoryWriter, unwrapped, weights_fingerprint
from .rounding_memory_mosaic import CODE_DTYPES, check_codes, dequantize_vectors, quantize_vectors


FILE_NAME = "memory.safetensors"
# Where the header has the settings, as JSON.
SETTINGS_NAME = "memory"
FORMAT = 1
CARD_NAME = "README.md"
# In cards that `push_to_hub` writes. A card without it, and without that of the library's cards, is somebody's own.
CARD_MARK = "<!-- Written by MosaicMemory.push_to_hub. Without this line, the next push leaves the card as it is. -->"
LIBRARY_CARD_MARK = "This model card has been automatically generated."
# Numbers of the papers, by model type.
ARXIV = {"memory_mosaic": "2405.06394", "memory_mosaic_v2": "2507.03285", "memory_model": "2602.13466"}
CARD = """---
{metadata}
---

# {title}

What a Memory Mosaic ([arXiv {paper}](https://arxiv.org/abs/{paper})) has read, as an object:
{pairs:,} key-value pairs in each head, from {count}. The model that has read
{them}{base} answers behind it without reading {them} again.

## Use

```python
from modeling_memory_mosaic import MosaicMemory
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}")
memory = MosaicMemory.from_pretrained("{repo_id}", model)
answer = model.generate(**memory.prompt("Once upon a time", tokenizer), max_new_tokens=40)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```

Other weights than those that wrote the memory are refused. It holds numbers and no code.

## What was read

| text | tokens |
| --- | ---: |
{rows}

## Limits

The memory holds the tokens of its texts: with the tokenizer, anybody can read them. A text that is forgotten
stays in earlier commits of this repository. No licence, no origin of the texts and no measure stands here:
`python -m training publish` of the project `modeling-memory-mosaic` writes a card with them.

{mark}
"""
# Precisions that pairs are stored in, by the names of `save_pretrained(dtype=...)`.
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, **CODE_DTYPES}


def pairs_to_tensors(name: str, pairs: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
    """Return keys or values `(1, H, S, D)` as named tensors to save, `(H, S, D)`."""
    if precision not in CODE_DTYPES:
        return {name: pairs[0].to(PRECISIONS[precision]).contiguous()}
    codes, scale = quantize_vectors(pairs[0], precision)
    return {name: codes.contiguous(), f"{name}.scale": scale.contiguous()}


def save_memory(memory: Any, folder: Path, precision: str | None) -> None:
    """Write a [`MosaicMemory`] into a folder, in place of an older one; until it is complete, that stays.

    Args:
        precision (`str`, *optional*): a key of `PRECISIONS`; that of the pairs when absent.
    """
    precision = str(memory.dtype).removeprefix("torch.") if precision is None else precision
    if precision not in PRECISIONS:
        raise ValueError(f"dtype={precision!r} is not one of {', '.join(PRECISIONS)}: choose one of them.")
    tensors = {name: getattr(memory, name).contiguous() for name in ("input_ids", "source_ids", "places")}
    for index, (keys, values, bias) in enumerate(zip(memory.keys, memory.values, memory.slot_bias, strict=True)):
        tensors |= pairs_to_tensors(f"layers.{index}.keys", keys, precision)
        tensors |= pairs_to_tensors(f"layers.{index}.values", values, precision)
        tensors[f"layers.{index}.slot_bias"] = bias[0].clone()
    settings = {
        "format": FORMAT,
        "model_type": memory.config.model_type,
        "fingerprint": memory.writer.fingerprint().hex(),
        "tokenizer": memory.tokenizer,
        "precision": precision,
        "read": "alone",
        "sources": memory.sources,
        "num_slots": len(memory.input_ids),
        "transformers": transformers.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f"{FILE_NAME}.part"
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, staged, metadata={SETTINGS_NAME: json.dumps(settings)})
    os.replace(staged, folder / FILE_NAME)


def find_file(folder_or_repo: str | os.PathLike, **kwargs: Any) -> Path:
    """Return the path of the file of a memory, which is fetched if it is not in a local folder.

    Raises:
        ValueError: if there is none.
    """
    if os.path.isdir(folder_or_repo):
        path = Path(folder_or_repo) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{folder_or_repo} holds no {FILE_NAME}: `memory.save_pretrained(folder)` writes it.")
        return path
    # A name on the Hub has one slash at most, and does not begin like a path.
    name = os.fspath(folder_or_repo)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"{name} is no folder: name one that `memory.save_pretrained(folder)` has written.")
    return Path(cached_file(name, FILE_NAME, **kwargs))


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a stored memory.

    Raises:
        ValueError: if the file is damaged, or is none of a memory.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get(SETTINGS_NAME, "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    names = {"format", "model_type", "fingerprint", "tokenizer", "precision", "sources", "num_slots"}
    if not isinstance(settings, dict) or names - settings.keys():
        raise ValueError(f"{path} does not describe a memory: it needs {', '.join(sorted(names))}.")
    if settings["format"] != FORMAT or settings["precision"] not in PRECISIONS:
        raise ValueError(
            f"{path} has format {settings['format']} and precision {settings['precision']!r}; this version reads "
            f"format {FORMAT} and {', '.join(PRECISIONS)}."
        )
    return settings


def read_rows(
    file: Any, name: str, shape: tuple[int, ...], runs: Sequence[tuple[int, int]] | None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return a stored tensor `(H, S, ...)`, of which only some slots are read, and its shape with all of them.

    Args:
        shape: that it must have; where it has another one, all of it is returned.
        runs (*optional*): first slot and last of each run, exclusive; all slots when absent.
    """
    stored = file.get_slice(name)
    stored_shape = tuple(stored.get_shape())
    if runs is None or stored_shape != shape:
        return file.get_tensor(name), stored_shape
    return torch.cat([stored[:, begin:end] for begin, end in runs or [(0, 0)]], dim=1), stored_shape


def read_pairs(
    file: Any,
    name: str,
    shape: tuple[int, ...],
    precision: str,
    dtype: torch.dtype,
    runs: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Return stored keys or values `(1, H, S, D)`, or those of the slots of some runs (see [`read_rows`]).

    Raises:
        ValueError: if they have another shape or precision than stated, or are not finite in `dtype`.
    """
    stored, stored_shape = read_rows(file, name, shape, runs)
    if stored.dtype != PRECISIONS[precision] or stored_shape != shape:
        raise ValueError(
            f"{name} is {stored.dtype} of shape {stored_shape}: it must be {PRECISIONS[precision]} of {shape}."
        )
    if precision in CODE_DTYPES:
        scale, _ = read_rows(file, f"{name}.scale", (*shape[:-1], 1), runs)
        check_codes(name, stored, scale, precision)
        stored = dequantize_vectors(stored, scale, dtype)
    pairs = stored.to(dtype)
    # Both are NaN if one number is.
    if pairs.numel() and not torch.stack(pairs.aminmax()).isfinite().all():
        raise ValueError(
            f"{name} holds numbers that are not finite in {dtype}: the file is damaged. Read the text again."
        )
    return pairs[None]


def read_slots(file: Any, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `source_ids` and `places` of a stored memory, each `(S,)`.

    Raises:
        ValueError: if one has another form, or names a text that is not among the sources.
    """
    shape = (settings["num_slots"],)
    slots = {name: file.get_tensor(name) for name in ("input_ids", "source_ids", "places")}
    for name, tensor in slots.items():
        least = 0 if name == "source_ids" else -1  # of merged pairs
        if tensor.dtype != torch.long or tuple(tensor.shape) != shape or (tensor < least).any():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: it must be indices of {shape}."
            )
    if (slots["source_ids"] >= len(settings["sources"])).any():
        raise ValueError(f"Slots name a text beyond the {len(settings['sources'])} sources: the file is damaged.")
    return slots


def check_model(settings: dict[str, Any], model: PreTrainedModel, fingerprint: str | None) -> None:
    """Raise `ValueError` if a stored memory is not that of a model with this fingerprint; `None`: of any weights."""
    config: Any = model.config
    if settings["model_type"] != config.model_type:
        raise ValueError(f"This is a memory of a {settings['model_type']}, and the model is a {config.model_type}.")
    if fingerprint is not None and settings["fingerprint"] != fingerprint:
        raise ValueError(
            "Other weights wrote this memory than this model's: those of another model, with another adapter, of "
            "other settings or in another precision. Read the texts again with this model. If you know that they "
            "compute the same, pass `check_weights=False`."
        )


def chosen_runs(source_ids: torch.Tensor, names: Sequence[str], chosen: Sequence[str]) -> list[tuple[int, int]]:
    """Return first and last slot, exclusive, of the runs of slots that chosen texts have, by `source_ids` `(S,)`."""
    indices = torch.tensor([index for index, name in enumerate(names) if name in chosen], dtype=torch.long)
    edges = F.pad(torch.isin(source_ids, indices).long(), (1, 1)).diff().nonzero()[:, 0]
    return [(begin, end) for begin, end in edges.view(-1, 2).tolist()]


def load_memory(
    folder_or_repo: str | os.PathLike,
    model: PreTrainedModel,
    fingerprint: str | None,
    chosen: Sequence[str] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the fields of the [`MosaicMemory`] that [`save_memory`] wrote.

    Args:
        fingerprint (`str`, *optional*): of the model; weights are not compared when absent.
        chosen (*optional*): names of texts, whose slots alone are read from the disk.
        kwargs: of `transformers.utils.cached_file`.

    Raises:
        ValueError: if it is not this model's, or damaged.
    """
    path, config = find_file(folder_or_repo, **kwargs), model.config
    settings = read_settings(path)
    check_model(settings, model, fingerprint)
    # Of v2, long-term pairs alone are kept.
    num_heads = getattr(config, "num_long_term_heads", config.num_attention_heads)
    shape = (num_heads, settings["num_slots"], config.head_dim)
    fields: dict[str, Any] = {"keys": [], "values": [], "slot_bias": []}
    try:
        with safe_open(path, framework="pt") as file:
            slots, runs = read_slots(file, settings), None
            if chosen is not None:
                runs = chosen_runs(slots["source_ids"], settings["sources"], chosen)
                slots = {
                    name: torch.cat([part[:0], *(part[slice(*run)] for run in runs)]) for name, part in slots.items()
                }
            fields |= slots
            for index in range(config.num_hidden_layers):
                for part in ("keys", "values"):
                    name = f"layers.{index}.{part}"
                    fields[part].append(read_pairs(file, name, shape, settings["precision"], model.dtype, runs))
                fields["slot_bias"].append(read_bias(file, index, shape, runs))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or holds no memory of this model: {error}.") from error
    writer = MemoryWriter(unwrapped(model))
    return fields | {"config": config, "writer": writer} | {name: settings[name] for name in ("sources", "tokenizer")}


def read_bias(
    file: Any, index: int, shape: tuple[int, ...], runs: Sequence[tuple[int, int]] | None = None
) -> torch.Tensor:
    """Return the stored biases of a layer's slots, `(1, H or 1, S)`, or of those of some runs (see [`read_rows`])."""
    name = f"layers.{index}.slot_bias"
    is_shared = file.get_slice(name).get_shape() == [1, shape[1]]
    expected = (1 if is_shared else shape[0], shape[1])
    bias, stored_shape = read_rows(file, name, expected, runs)
    if bias.dtype != torch.float32 or stored_shape != expected or bias.isnan().any() or (bias == torch.inf).any():
        raise ValueError(f"{name} is {bias.dtype} of shape {stored_shape}: the file is damaged.")
    return bias[None]


def memory_card(memory: Any, repo_id: str, tags: Sequence[str] = ()) -> str:
    """Return the card of a [`MosaicMemory`] in a repository, with the metadata that the Hub reads."""
    paper, count = ARXIV[memory.config.model_type], len(memory.sources)
    # A folder of this machine stays out of the card.
    name = str(getattr(memory.config, "_name_or_path", ""))
    base = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name) else None
    own = ["memory", "associative-memory", f"arxiv:{paper}"]
    data = ModelCardData(
        library_name="modeling-memory-mosaic", tags=[*own, *(tag for tag in tags if tag not in own)], base_model=base
    )
    lengths = memory.source_ids.bincount(minlength=count).tolist()
    return CARD.format(
        metadata=data.to_yaml(),
        title=repo_id.rpartition("/")[2],
        paper=paper,
        pairs=len(memory),
        count=f"{count:,} texts" if count != 1 else "one text",
        them="them" if count != 1 else "it",
        base="" if base is None else f", [{base}](https://huggingface.co/{base}),",
        place=base or "FOLDER_OR_REPOSITORY_OF_THE_MODEL",
        repo_id=repo_id,
        rows="\n".join(f"| `{text}` | {length:,} |" for text, length in zip(memory.sources, lengths, strict=True)),
        mark=CARD_MARK,
    )


def _has_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has a card that neither [`MemoryFilesMixin.push_to_hub`] nor the library has written."""
    if not api.file_exists(repo_id, CARD_NAME, revision=revision):
        return False
    text = Path(api.hf_hub_download(repo_id, CARD_NAME, revision=revision)).read_text(encoding="utf-8")
    return CARD_MARK not in text and LIBRARY_CARD_MARK not in text


class MemoryFilesMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of a [`MosaicMemory`]."""

    def save_pretrained(self, folder: str | os.PathLike, dtype: str | None = None, **kwargs: Any) -> None:
        """Write the memory into a folder.

        Args:
            folder: is made if it is not there; an older memory in it is replaced.
            dtype (`str`, *optional*): `float32`, `bfloat16`, or one byte a number, `int8` or `fp8`; the memory's own
                precision when absent.
            kwargs: of the library's `save_pretrained`, which change nothing.
        """
        save_memory(self, Path(folder), dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: str | None = None,
        commit_message: str = "Upload MosaicMemory",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
    ) -> CommitInfo:
        """Write the memory into a repository of the Hub in one commit, with a card that says what it holds.

        A card of your own stays. One that this method has written is written again, so that it does not name texts
        that were forgotten since. `python -m training publish` of the project writes a fuller card, with licence,
        origin and measures, and checks what it publishes.

        Args:
            repo_id: `user/name`, or a name of yours; is made if it is not there.
            dtype (`str`, *optional*): as of `save_pretrained`.
            commit_message, commit_description (*optional*): of the commit.
            private (`bool`, *optional*): whether a new repository is private; the account's default when absent.
            token (*optional*): of the Hub; the stored one when absent.
            revision (*optional*): the branch; `main` when absent.
            create_pr (`bool`): propose it in a pull request.
            tags: of the card, beside its own.

        Returns:
            `huggingface_hub.CommitInfo`: the commit, whose `oid` a reader can pin.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            if not _has_own_card(api, repo_id, revision):
                (Path(folder) / CARD_NAME).write_text(memory_card(self, repo_id, tags), encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | os.PathLike | Sequence[str | os.PathLike],
        model: PreTrainedModel,
        sources: Sequence[str] | None = None,
        check_weights: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return the memory that `save_pretrained` wrote, in the model's precision and on its device.

        Args:
            folder_or_repo: a folder, or the name of a repository on the Hub; of a list, the memories are joined, and
                the model's weights are compared once.
            model: that wrote it.
            sources (*optional*): names of texts, whose pairs alone are read from the disk; all when absent.
            check_weights (`bool`): whether other weights than those that wrote it are refused.
            kwargs: `revision`, `token`, `cache_dir` and others of `transformers.utils.cached_file`.

        Raises:
            ValueError: if it is not this model's, or damaged, or has no such text.
        """
        is_one = isinstance(folder_or_repo, (str, os.PathLike))
        places: Any = [folder_or_repo] if is_one else folder_or_repo
        fingerprint = weights_fingerprint(unwrapped(model)).hex() if check_weights else None
        loaded: Any = cls
        memories = [loaded(**load_memory(place, model, fingerprint, sources, **kwargs)) for place in places]
        memory = memories[0] if is_one else loaded.union(memories)
        memory = memory if sources is None else memory.select(sources)
        return memory.to(model.device)


__all__ = ["MemoryFilesMixin"]

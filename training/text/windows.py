# SPDX-License-Identifier: Apache-2.0
"""From stories to windows of tokens: tokenize, join by end-of-text, cut, and collate into batches."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from training.progress import progress
from training.text.cache import cached_files, cached_rows, fingerprint


def copy_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy of what makes the token ids, without the padding and truncation of the tokenizer's last call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _tokenize_batch(batch: dict[str, list[str]], backend: Tokenizer, eos_token_id: int) -> dict[str, list[list[int]]]:
    # Special tokens written out in a story are text; set here, since a copy in another process forgets it.
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"input_ids": [[*encoding.ids, eos_token_id] if len(encoding) else [] for encoding in encodings]}


def _tokenize(
    stories: Dataset | IterableDataset, backend: Tokenizer, eos_token_id: int, num_proc: int | None, name: str | None
) -> Dataset | IterableDataset:
    """Return the tokens of each story and its end-of-text. `name` is that in the cache, None for a stream."""
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": ["text"],
        "features": Features({"input_ids": List(Value("int32"))}),
        "fn_kwargs": {"backend": backend, "eos_token_id": eos_token_id},
    }
    stories = stories.select_columns(["text"])
    # `map` writes no file for an empty data set, so that there would be nothing to read from the cache.
    if isinstance(stories, IterableDataset) or name is None or len(stories) == 0:
        return stories.map(_tokenize_batch, **options)

    def write(staged: Path) -> None:
        place = {"cache_file_name": str(staged / "tokens.arrow"), "new_fingerprint": name}
        stories.map(_tokenize_batch, **options, **place, num_proc=num_proc, desc="Tokenizing")

    return cached_files(write, name)


def _cut_windows(
    stories: Dataset | IterableDataset,
    context_length: int,
    backend: Tokenizer,
    eos_token_id: int,
    num_proc: int | None = None,
    tokens_name: str | None = None,
) -> Iterator[dict[str, list[int]]]:
    """Yield windows of the whole token stream; a generator, since it begins again each time a stream is iterated."""
    tokenized = _tokenize(stories, backend, eos_token_id, num_proc, tokens_name).with_format("arrow")
    rest, num_tokens = np.empty(0, np.int32), 0
    # `iter`, as in a worker of a DataLoader a plain loop over a stream would take only a share of its files.
    batches = tokenized.iter(batch_size=1000)
    if isinstance(tokenized, Dataset):
        batches = iter(progress(batches, "windows", "thousand stories", math.ceil(len(tokenized) / 1000)))
    for batch in batches:
        tokens = pyarrow.compute.list_flatten(batch["input_ids"]).to_numpy()
        num_tokens += len(tokens)
        tokens = np.concatenate([rest, tokens])
        whole = len(tokens) - len(tokens) % context_length
        for window in tokens[:whole].reshape(-1, context_length):
            yield {"input_ids": window.tolist()}
        rest = tokens[whole:]
    if num_tokens < context_length:
        raise ValueError(
            f"the stories have {num_tokens} tokens, too few for one window of context_length {context_length}: "
            "give more stories or lower it"
        )


def pack_windows(
    stories: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    context_length: int,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize stories, put the end-of-text token after each, join them all and cut the stream into windows.

    A window may begin and end inside a story. Nothing is lost between windows, whatever the batches and processes
    were; only what is left at the very end, less than one window, is dropped. An empty story adds nothing, not even an
    end-of-text token. The end-of-text token written out inside a story is text like any other: it becomes several
    ordinary tokens and never a story's end.

    Tokens and windows are cached by `datasets`: a second call does no work, another `context_length` only cuts again.

    Args:
        stories: one column `text`; other columns are ignored. A streamed one is packed while iterating.
        tokenizer: a fast tokenizer with an eos.
        context_length (`int`): tokens per window.
        num_proc (`int`, *optional*): processes that tokenize; changes the speed, never the result. Not for a stream.

    Returns:
        one column `input_ids`, each of `context_length` token ids (int32).

    Raises:
        ValueError: the stories are too few for one window (for a stream: while iterating), `context_length` is not
            positive, or the tokenizer has no eos.
    """
    if context_length < 1:
        raise ValueError(f"context_length is {context_length}: a window needs at least one token")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token to put between stories: load it with `load_tokenizer`")
    features = Features({"input_ids": List(Value("int32"), length=context_length)})
    backend = copy_backend(tokenizer)
    arguments = {"stories": stories, "context_length": context_length}
    arguments |= {"backend": backend, "eos_token_id": tokenizer.eos_token_id}
    if isinstance(stories, IterableDataset):
        return IterableDataset.from_generator(_cut_windows, features=features, gen_kwargs=arguments)
    tokens_name = fingerprint(__file__, stories._fingerprint, backend.to_str(), tokenizer.eos_token_id)
    arguments |= {"num_proc": num_proc, "tokens_name": tokens_name}
    name = fingerprint(__file__, tokens_name, context_length)
    return cached_rows(_cut_windows, arguments, features, name, has_bar=False)


def spread_evenly(total: int, most: int | None) -> np.ndarray:
    """Return at most `most` of the numbers 0 to `total - 1`, in order and spread evenly; all of them for None."""
    if most is None or total <= most:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, most).round().astype(int))


def some_windows(windows: Dataset | IterableDataset, most: int | None) -> Dataset | IterableDataset:
    """Return at most `most` windows, spread evenly; of a stream the first ones; all of them for None."""
    if most is None:
        return windows
    if isinstance(windows, IterableDataset):
        return windows.take(most)
    return windows.select(spread_evenly(len(windows), most))


def collate_windows(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack windows into a batch of `input_ids`, `attention_mask` and `labels`, each int64 of shape `(B, T)`.

    The mask is all ones, for windows have no padding. The labels equal the ids: the model itself shifts them.
    """
    input_ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}

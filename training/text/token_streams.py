# SPDX-License-Identifier: Apache-2.0
"""Windows of tokens without an end, from streams of stories, which go on in place: no shard is read twice.

A `TokenStream` knows its place after each window: of every source the shard, how far that was read, and the tokens
that were read but fill no window yet. A checkpoint holds it. A shard that was read to its end is not opened again. In
a `.jsonl` file a reader stands at a byte; any other shard, such as a file on the Hub, is read from its beginning up to
the story where it stopped.

Several processes read shards of their own. Several sources are mixed by weight, a share of the tokens: the next story
is of the source that is furthest behind its share, so that a mixture has no state but counts.

Streams of `datasets` have states too, but with version 5.2 they do not go on in place: the state of rows of Arrow
tables is that of the table before, so that a finished shard is read again; `interleave_datasets` reads one story of
each source ahead, and draws stories, not tokens; a shuffle buffer goes on with other stories than it held. So each
shard is a stream of its own here (`IterableDataset.shard`), of which rows are counted, and nothing is shuffled.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerFast

from training.text.sources import load_stories, local_files, source_type
from training.text.story_files import read_story_file, read_story_lines
from training.text.windows import copy_backend


Place = dict[str, Any]  # fit for JSON


# Yields the stories of a shard from a place in it on, 0 for its beginning, each with the place behind it.
Shard = Callable[[int], Iterator[tuple[str, int]]]


def read_file(path: str, text_field: str, separator: str, at: int) -> Iterator[tuple[str, int]]:
    """Read a local file as a `Shard`; the other arguments are those of `load_stories`."""
    if path.lower().endswith(".jsonl"):
        return read_story_lines(path, text_field, at)
    stories = read_story_file(path, text_field, separator)  # packed or separated, so that no byte begins a story
    return itertools.islice(((text, number) for number, text in enumerate(stories, 1)), at, None)


def read_rows(stories: IterableDataset, at: int) -> Iterator[tuple[str, int]]:
    """Read a stream of `datasets` as a `Shard`."""
    # Copied, as a stream that was iterated before keeps states of it. By `iter`, as in a worker of a DataLoader a
    # plain loop would take only a share of the shards.
    batches = copy.deepcopy(stories).iter(batch_size=100)
    texts = itertools.chain.from_iterable(batch["text"] for batch in batches)
    return itertools.islice(zip(texts, itertools.count(1)), at, None)


class Reader:
    """Stories of one source, for one of several processes.

    Args:
        shards: of the source.
        share: index and number of the processes, of which each takes some of the shards, or, if there are fewer shards
            than processes, some of the stories.
    """

    def __init__(self, shards: Sequence[Shard], share: tuple[int, int] = (0, 1)) -> None:
        index, number = share
        self.shards = shards[index::number] if len(shards) >= number else shards
        self.share = (0, 1) if len(shards) >= number else share

    def read(self, place: Place | None) -> Iterator[tuple[str, Place]]:
        """Yield the stories of one round, from a place on (None: the beginning), each with the place behind it."""
        place = place or {"shard": 0, "at": 0, "story": 0}
        story, (index, number) = place["story"], self.share
        for shard in range(place["shard"], len(self.shards)):
            for text, at in self.shards[shard](place["at"] if shard == place["shard"] else 0):
                story += 1
                if (story - 1) % number == index:
                    yield text, {"shard": shard, "at": at, "story": story}


def make_reader(source: dict[str, Any], share: tuple[int, int]) -> Reader:
    """Return the reader of a source.

    Args:
        source: arguments of `load_stories`.
        share: index and number of the processes.

    Raises:
        ValueError: as `load_stories` does.
    """
    stories = load_stories(**source, streaming=True)  # refuses what cannot be read
    is_whole = source["num_stories"] is None and source.get("validation_fraction") is None
    if not is_whole:
        return Reader([functools.partial(read_rows, stories)], share)
    if source_type(source["source"]) == "files":
        form, files = (source["text_field"], source["separator"]), local_files(source["source"], source["split"])
        return Reader([functools.partial(read_file, str(file), *form) for file in files], share)
    count = stories.num_shards
    return Reader(
        [functools.partial(read_rows, stories.shard(num_shards=count, index=index)) for index in range(count)], share
    )


def without_end(reader: Reader, place: Place | None) -> Iterator[tuple[str, Place]]:
    """Yield the stories of a source from a place on, round after round."""
    for number in itertools.count():
        is_empty = True
        for story in reader.read(place):
            is_empty = False
            yield story
        # A first round may begin at its end.
        if is_empty and (number or place is None):
            raise ValueError("a source of the stream has no story for one of the processes: give it more files")
        place = None


class TokenStream(torch.utils.data.IterableDataset):
    """Windows of tokens of several sources, without an end; rows of `input_ids`, and the `place` behind them.

    Tokens are those of `pack_windows`. A window may span two stories, sources or rounds, and nothing is left out.

    Args:
        readers: of each source.
        weights: shares of the tokens, of any sum.
        tokenizer: a fast tokenizer with an eos.
        context_length: tokens of a window.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        weights: Sequence[float],
        tokenizer: PreTrainedTokenizerFast,
        context_length: int,
    ) -> None:
        self.readers, self.weights, self.context_length = list(readers), list(weights), context_length
        self.backend, self.eos_token_id = copy_backend(tokenizer), tokenizer.eos_token_id
        self.place: Place = {"sources": [{"place": None, "tokens": 0} for _ in readers], "pending": []}

    def go_on_from(self, place: Place) -> None:
        """Begin the next iteration at a place."""
        if len(place["sources"]) != len(self.readers):
            raise ValueError(
                f"the place is of {len(place['sources'])} sources, and the stream has {len(self.readers)}"
            )
        self.place = place

    def _tokenize(self, text: str) -> list[int]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [*encoding.ids, self.eos_token_id] if len(encoding) else []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # One worker reads, so that the number of workers changes nothing.
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        self.backend.encode_special_tokens = True  # written out in a story, they are text; a copy forgets it
        sources = copy.deepcopy(self.place["sources"])
        streams = [without_end(reader, source["place"]) for reader, source in zip(self.readers, sources, strict=True)]
        pending = np.array(self.place["pending"], dtype=np.int32)
        while True:
            behind = [source["tokens"] / weight for source, weight in zip(sources, self.weights, strict=True)]
            chosen = behind.index(min(behind))
            text, place = next(streams[chosen])
            ids = self._tokenize(text)
            # New ones: places that were handed out stay what they are.
            sources = list(sources)
            sources[chosen] = {"place": place, "tokens": sources[chosen]["tokens"] + len(ids)}
            pending = np.concatenate([pending, np.array(ids, dtype=np.int32)])
            while len(pending) >= self.context_length:
                window, pending = pending[: self.context_length], pending[self.context_length :]
                yield {"input_ids": window, "place": {"sources": sources, "pending": pending}}


def collate_stream(collate: Callable[..., dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the batch that `collate` makes of windows, and the `place` behind the last of them."""
    windows = [{"input_ids": row["input_ids"]} for row in rows]
    return {**collate(windows), "place": rows[-1]["place"]}


def place_to_json(place: Place) -> Place:
    """Return a place without arrays."""
    return {**place, "pending": [int(token) for token in place["pending"]]}

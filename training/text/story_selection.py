# SPDX-License-Identifier: Apache-2.0
"""From a generator's answers to a data set: which become stories, the files of both kinds, and their statistics."""

import gzip
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from training.files import staged_file
from training.text.shards import format_row, read_rows
from training.text.story_filters import Duplicates, Story, clean, contains, words


STORIES_FILE, REJECTED_FILE = "stories.jsonl.gz", "rejected.jsonl"
NUM_SAMPLES = 3


@dataclass
class Statistics:
    """Counts of the answers: prompted, rejected (by reason), cut (by marker) and kept.

    Args:
        required: what the template requires a story to use, of `name`, `verb`, `noun` and `adjective`.
    """

    required: list[str]
    prompted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    openings: set[str] = field(default_factory=set)
    complete: int = 0
    samples: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Count a kept story; `row` has its text, and what was drawn for it."""
        text = row["text"]
        self.characters.append(len(text))
        self.words.append(len(words(text)))
        # Not verbose: it would warn of each story that is longer than the model reads.
        self.tokens.append(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        self.openings.add(row["opening"])
        # A template without `{name}` draws none.
        self.names |= {row["name"]} if "name" in row else set()
        self.complete += all(contains(text, row[word]) for word in self.required)
        if len(self.samples) < NUM_SAMPLES:
            self.samples.append(text)

    def metrics(self) -> dict[str, Any]:
        """Return the numbers of `result.json`; a share is None where the template requires no word."""
        kept = len(self.characters)
        return {
            "prompted": self.prompted,
            "kept": kept,
            "rejected": dict(sorted(self.rejected.items())),
            "cut_at_marker": dict(sorted(self.cut.items())),
            "characters_mean": statistics.mean(self.characters),
            "words": sum(self.words),
            "words_mean": statistics.mean(self.words),
            "tokens": sum(self.tokens),
            "tokens_mean": statistics.mean(self.tokens),
            "distinct_names": len(self.names),
            "distinct_openings": len(self.openings),
            "share_with_all_required_words": self.complete / kept if self.required else None,
        }


def _judge(row: dict[str, Any], duplicates: Duplicates) -> Story:
    """Return the story in an answer, or the reason why there is none."""
    if row["text"] is None:
        # The prompt did not come back from the tokenizer as it was: it is unknown where the story begins.
        return Story("", "undecodable")
    story = clean(row["text"], row["opening"])
    if story.reason is None:
        # Last, because it remembers the story: one that is refused must not make another a duplicate.
        duplicate = duplicates.find(story.text, row["index"])
        if duplicate is not None:
            reason, earlier = duplicate
            return story._replace(reason=reason, detail=f"of story {earlier}")
    return story


def select_stories(
    folder: Path,
    shards: Iterable[Path],
    num_answers: int,
    near_duplicates: float | None,
    required: list[str],
    tokenizer: PreTrainedTokenizerBase,
) -> Statistics:
    """Write the stories among the answers into `STORIES_FILE`, and the others, with the reason, into `REJECTED_FILE`.

    Args:
        folder: where both files are written.
        shards: files of answers.
        num_answers: how many answers there are in them.
        near_duplicates: stories of this similarity or more are rejected; None keeps all that are not equal.
        required: as of `Statistics`.
        tokenizer: counts tokens.
    """
    duplicates, counted = Duplicates(near_duplicates), Statistics(required)
    with (
        staged_file(folder / STORIES_FILE) as kept_path,
        staged_file(folder / REJECTED_FILE) as rejected_path,
        # No name and no time in the compressed file: the same stories are the same bytes.
        kept_path.open("wb") as compressed,
        gzip.GzipFile(filename="", mode="wb", fileobj=compressed, mtime=0) as kept,
        rejected_path.open("w", encoding="utf-8") as rejected,
    ):
        for row in tqdm(read_rows(shards), total=num_answers, desc="filters", unit="story"):
            counted.prompted += 1
            text, reason, detail, marker = _judge(row, duplicates)
            counted.cut.update([marker] if marker else [])
            if reason is not None:
                counted.rejected[reason] += 1
                rejected.write(format_row({"reason": reason, "detail": detail, **row}))
                continue
            story = {"text": text, **{key: value for key, value in row.items() if key != "text"}}
            counted.add(story, tokenizer)
            kept.write(format_row(story).encode())
    return counted

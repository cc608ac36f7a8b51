# SPDX-License-Identifier: Apache-2.0
"""Needles: sentences such as "Tom has 1234." in random chunks of a text, and a question about one of them behind it.

A row is a text of whole chunks, some of which have a needle written over a part of them, then the sentence of one
needle once more. Its answer, the number, is what is predicted; nothing but the needle tells it.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase


NAMES = (
    *("Tom", "Ben", "Sam", "Max", "Tim", "Dan", "Jim", "Bob"),
    *("Amy", "Zoe", "Mia", "Eva", "Kim", "Ann", "Sue", "Ivy"),
)
NUM_DIGITS = 4
IGNORED = -100


class Needle(NamedTuple):
    """A sentence: its tokens, and how many of them are the question."""

    ids: list[int]
    num_asked: int


class NeedleRows(NamedTuple):
    """Rows of a batch.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(B, T)`): padding stands behind.
        labels (`torch.LongTensor` of shape `(B, T)`): -100 but at the answer; not shifted.
        distances (`torch.LongTensor` of shape `(B,)`): how many chunks before the question the needle stands, from 1.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    distances: torch.Tensor


def make_needle(tokenizer: PreTrainedTokenizerBase, name: str, number: str) -> Needle:
    """Return the needle of a name and a number.

    Raises:
        ValueError: if the question is not the beginning of the sentence in tokens.
    """
    ids = tokenizer(f" {name} has {number}.", add_special_tokens=False)["input_ids"]
    asked = tokenizer(f" {name} has", add_special_tokens=False)["input_ids"]
    if ids[: len(asked)] != asked:
        raise ValueError(f"the tokens of ' {name} has' do not begin those of the sentence: take another tokenizer")
    return Needle(ids, len(asked))


def draw_needles(tokenizer: PreTrainedTokenizerBase, num_needles: int, rng: random.Random) -> list[Needle]:
    """Return needles of different names, each with a number of four random digits."""
    numbers = ["".join(rng.choice("0123456789") for _ in range(NUM_DIGITS)) for _ in range(num_needles)]
    names = rng.sample(NAMES, num_needles)
    return [make_needle(tokenizer, *pair) for pair in zip(names, numbers, strict=True)]


def needle_row(
    text: Sequence[int], needles: list[Needle], distance: int, chunk_length: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Return ids and labels of a row; the first needle is asked for, and stands in the chunk at `distance`.

    Args:
        text: tokens of whole chunks; the last one is at distance 1.
        needles: at most as many as there are chunks; each is in a chunk of its own.

    Raises:
        ValueError: if a needle is longer than a chunk, or there are more needles than chunks.
    """
    ids, num_chunks = list(text), len(text) // chunk_length
    longest = max(len(needle.ids) for needle in needles)
    if longest > chunk_length or len(needles) > num_chunks:
        raise ValueError(
            f"{len(needles)} needles of up to {longest} tokens do not fit into {num_chunks} chunks of {chunk_length}: "
            "give longer or more chunks"
        )
    asked = num_chunks - distance
    others = rng.sample([chunk for chunk in range(num_chunks) if chunk != asked], len(needles) - 1)
    for needle, chunk in zip(needles, [asked, *others], strict=True):
        start = chunk * chunk_length + rng.randint(0, chunk_length - len(needle.ids))
        ids[start : start + len(needle.ids)] = needle.ids
    question = needles[0]
    labels = [IGNORED] * (len(ids) + question.num_asked) + question.ids[question.num_asked :]
    return ids + question.ids, labels


def draw_rows(
    texts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    chunk_length: int,
    num_needles: Sequence[int],
    rng: random.Random,
) -> NeedleRows:
    """Return a row for each text, at each distance equally often, with one of the numbers of needles.

    Args:
        texts: of the same number of tokens, whole chunks.
        num_needles: to choose from.
    """
    num_chunks = len(texts[0]) // chunk_length
    distances = [1 + index % num_chunks for index in range(len(texts))]
    rng.shuffle(distances)
    rows = [
        needle_row(text, draw_needles(tokenizer, rng.choice(num_needles), rng), distance, chunk_length, rng)
        for text, distance in zip(texts, distances, strict=True)
    ]
    longest = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows])
    return NeedleRows(padded, mask, labels, torch.tensor(distances))

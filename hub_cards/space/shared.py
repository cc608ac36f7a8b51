# SPDX-License-Identifier: Apache-2.0
"""What the tabs of the page share: limits, checks and what they show of numbers."""

import html
from typing import Any, TypeVar

import gradio as gr
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


Kept = TypeVar("Kept")

# A visitor waits for tokens x tokens weights of each of L x H memories.
MOST_GIVEN_TOKENS = 128
# A longer text is cut before it is tokenized, which takes time and memory in proportion. Only the end is read.
MOST_CHARACTERS = 10_000
KEPT_SECONDS = 3600
# The model and its random numbers are shared, so one request of any tab computes at a time.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}

NOT_FINITE = "What the model computes is not finite: its weights are damaged, or too large for this text."


def check_text(text: Any, name: str, remedy: str) -> None:
    """Raise `ValueError` for what is no text, or an empty one.

    Args:
        text: the value of a text box, or what a program sent in its place.
        name: of the text, as a message begins with it.
        remedy: what to write.
    """
    if not isinstance(text, str) or not text[-MOST_CHARACTERS:].strip():
        raise ValueError(f"{name} is empty: {remedy}")
    try:
        text[-MOST_CHARACTERS:].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character, which no text can have.") from error


def tokenize_end(
    tokenizer: PreTrainedTokenizerBase, text: str, name: str, most: int = MOST_GIVEN_TOKENS
) -> tuple[torch.Tensor, str]:
    """Return the ids `(1, T)` of a text's last `most` tokens, and a notice if there were more."""
    end = text[-MOST_CHARACTERS:]
    ids = tokenizer(end, return_tensors="pt").input_ids
    if ids.shape[1] <= most:
        return ids, ""
    if len(end) < len(text):  # how many tokens it has is not known
        length, unit = f"{len(text):,} characters", "tokens"
    else:
        length, unit = f"{ids.shape[1]} tokens", "of them"
    return ids[:, -most:], f"{name} has {length}; the model read the last {most} {unit}."


def generation_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, temperature: float
) -> GenerationConfig:
    """Return the settings of `generate` for so many new tokens; at temperature 0 each is the likeliest."""
    # With `top_k` at 0 all tokens can be drawn: by default only the 50 likeliest can.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(max_new_tokens=num_tokens, **sampling, **ends)


def bar(name: str, value: float, longest: float) -> str:
    """Return one bar as HTML, to the right if it speaks for the token, to the left if against it."""
    # In percent of the track, which has one half for each side.
    width = 50 * abs(value) / max(longest, 1e-9)
    left, side = (50, "for") if value >= 0 else (50 - width, "against")
    return (
        f'<div class="part"><span class="name">{name}</span><span class="track">'
        f'<span class="{side}" style="left:{left:.1f}%;width:{width:.1f}%"></span></span>'
        f'<span class="value">{value:+.2f}</span></div>'
    )


def paragraph(message: str) -> str:
    """Return a message as HTML; nothing for an empty one."""
    return message and f"<p>{html.escape(message)}</p>"


def check_kept(kept: Kept | None, name: str, remedy: str) -> Kept:
    """Return what the page keeps of a visitor; an error if it was dropped."""
    if kept is None:
        raise gr.Error(f"{name} forgotten after {KEPT_SECONDS // 60} minutes: {remedy}")
    return kept


def place_among(place: Any, size: int) -> int:
    """Return a place as a whole number below `size`; an error for values that no page sends."""
    if not str(place).isdecimal() or int(place) >= size:
        raise gr.Error("There is nothing at this place: choose a token or a memory of the page.")
    return int(place)

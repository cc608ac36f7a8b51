# SPDX-License-Identifier: Apache-2.0
"""The page of a memory model: what its memories hold of a text, chunk by chunk and place by place.

The encoder writes the vectors of each chunk, and the decoder tells the chunk from these alone. Tokens of the text are
counted from 0; those behind the last whole chunk are in no memory.
"""

import dataclasses
import html
from typing import Any, NamedTuple

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from marked import (
    CHOSEN,
    MARKS,
    Mark,
    boxed,
    choosable_text,
    make_announced,
    make_choosable,
    token_names,
    visible,
)
from modeling_memory_mosaic import MemoryModelForCausalLM
from modeling_memory_mosaic.layout_memory_model import pack_text
from shared import (
    KEPT_SECONDS,
    MOST_CHARACTERS,
    MOST_GIVEN_TOKENS,
    NOT_FINITE,
    ONE_AT_A_TIME,
    check_kept,
    check_text,
    paragraph,
    place_among,
    tokenize_end,
)


RIGHT, WRONG, IN_NONE = "given back", "another token given", "in no memory"
COLOURS = {RIGHT: "#1a9e77", WRONG: "#ee7410", IN_NONE: "#dcdce0", CHOSEN: MARKS[CHOSEN]}
# Whole chunks that a text may have where 128 tokens are fewer.
MOST_CHUNKS = 4
DROPPED = ("This text was", "read it again.")
EXAMPLES = [
    "Lily had a red ball. She played with it all day in the park. Then a big dog took the ball and ran away.",
    "Tom saw 1234 birds and 57 cats near the old house. No child in the town had ever counted them before that day.",
    "Once upon a time there was a small boat. The boat was sad because the sea was far away and it could not swim.",
]


@dataclasses.dataclass
class Held:
    """What memories hold of a text.

    Args:
        ids: of the text.
        tokens: each by its name.
        vectors (`torch.Tensor` of shape `(M, K, D)`): of each whole chunk.
        given: ids that the decoder tells, for each chunk.
        given_tokens: each of them by its name.
        probabilities (`torch.Tensor` of shape `(M, L)`): of the text's own tokens.
        num_bytes: of each chunk's text in UTF-8.
    """

    ids: list[int]
    tokens: list[str]
    vectors: torch.Tensor
    given: list[list[int]]
    given_tokens: list[list[str]]
    probabilities: torch.Tensor
    num_bytes: list[int]

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk."""
        return self.probabilities.shape[1]


@torch.no_grad()
def read(model: MemoryModelForCausalLM, tokenizer: PreTrainedTokenizerBase, text: Any) -> tuple[Held, str]:
    """Return what the memories of a text, or of the end of a long one, hold of it; and a notice if it was cut.

    Raises:
        ValueError: it is no text, fills no chunk, or what the model computes is not finite.
    """
    check_text(text, "The text", f"write one, such as: {EXAMPLES[0]}")
    length = model.config.chunk_length
    ids, notice = tokenize_end(tokenizer, text, "The text", max(MOST_GIVEN_TOKENS, MOST_CHUNKS * length))
    if ids.shape[1] < length:
        raise ValueError(f"The text has {ids.shape[1]} tokens, but a memory holds {length}: write a longer one.")
    packed = pack_text(ids)
    context = model.gather_memories(packed)
    logits, targets, _ = model.reconstruct("autoencoding", packed, context)
    vectors, chances = context.memories[0, : logits.shape[1]], logits[0].float().softmax(-1)
    if not (chances.isfinite().all() and vectors.isfinite().all()):
        raise ValueError(NOT_FINITE)
    given = chances.argmax(-1).tolist()
    whole = ids[0].tolist()
    chunks = [whole[start : start + length] for start in range(0, len(given) * length, length)]
    held = Held(
        whole,
        token_names(tokenizer, whole),
        vectors.float().cpu(),
        given,
        [token_names(tokenizer, one) for one in given],
        chances.gather(-1, targets[0, ..., None])[..., 0].cpu(),
        [len(str(tokenizer.decode(chunk)).encode()) for chunk in chunks],
    )
    return held, notice


def label_at(held: Held, place: int) -> str:
    """Return what the decoder does with the token at a place."""
    chunk, within = divmod(place, held.chunk_length)
    if chunk >= len(held.given):
        return IN_NONE
    return RIGHT if held.given[chunk][within] == held.ids[place] else WRONG


def coloured_tokens(held: Held, chosen: int) -> list[Mark]:
    """Return all tokens of a text, a line for each chunk."""
    marks = []
    for place, token in enumerate(held.tokens):
        if place and place % held.chunk_length == 0:
            marks.append(Mark("\n"))
        marks.append(Mark(visible(token), CHOSEN if place == chosen else label_at(held, place)))
    return marks


def summary(held: Held) -> str:
    """Return, as HTML, how much of the text is given back, and how much room its memories take."""
    places = range(len(held.given) * held.chunk_length)
    right = sum(label_at(held, place) == RIGHT for place in places)
    whole = sum(
        all(label_at(held, chunk * held.chunk_length + within) == RIGHT for within in range(held.chunk_length))
        for chunk in range(len(held.given))
    )
    numbers = held.vectors[0].numel()
    return (
        f"<p><b>{right} of {len(places)}</b> tokens are given back from memories alone, and {whole} of "
        f"{len(held.given)} chunks without a mistake. A memory has {numbers:,} numbers: {4 * numbers:,} bytes as "
        f"float32, {numbers:,} as bytes. Its text has {min(held.num_bytes)} to {max(held.num_bytes)} bytes.</p>"
    )


def strip(vector: torch.Tensor, largest: float, name: str) -> str:
    """Return a vector `(D,)` as a picture of D cells: blue above 0, orange below, pale near it."""
    cells = ""
    for place, number in enumerate(vector.tolist()):
        colour, strength = ("#2f86d9" if number >= 0 else "#ee7410"), abs(number) / max(largest, 1e-9)
        cells += f'<rect x="{place}" width="1" height="1" fill="{colour}" fill-opacity="{strength:.2f}"/>'
    spoken = f"{name}: {len(vector)} numbers from {float(vector.min()):.2f} to {float(vector.max()):.2f}"
    return (
        f'<svg class="strip" role="img" aria-label="{spoken}" viewBox="0 0 {len(vector)} 1" '
        f'preserveAspectRatio="none">{cells}</svg>'
    )


def vector_view(held: Held, chunk: int) -> str:
    """Return, as HTML, the vectors of a chunk."""
    if chunk >= len(held.given):
        return "<h2>2. Its vectors</h2><p>These tokens fill no chunk, so that no memory holds them.</p>"
    vectors = held.vectors[chunk]
    largest = float(held.vectors.abs().max())
    strips = "".join(strip(vector, largest, f"vector {number + 1}") for number, vector in enumerate(vectors))
    what = "One vector" if len(vectors) == 1 else f"{len(vectors)} vectors"
    return (
        f"<h2>2. The vectors of chunk {chunk + 1} of {len(held.given)}</h2><p>{what} of {vectors.shape[1]} numbers, "
        f"from {float(vectors.min()):.2f} to {float(vectors.max()):.2f}: blue above 0, orange below.</p>{strips}"
    )


def place_table(held: Held, chosen: int) -> str:
    """Return, as HTML, a chunk place by place: its tokens, those that the decoder gives, and how sure it is."""
    chunk = chosen // held.chunk_length
    if chunk >= len(held.given):
        return ""
    rows = ""
    for within in range(held.chunk_length):
        place = chunk * held.chunk_length + within
        is_right = label_at(held, place) == RIGHT
        chance = float(held.probabilities[chunk, within])
        given = boxed(held.given_tokens[chunk][within])
        rows += (
            f'<tr{" class=chosen-row" if place == chosen else ""}><th scope="row">{within + 1}</th>'
            f"<td>{boxed(held.tokens[place])}</td><td>{given if is_right else f'<b>{given}</b>'}</td>"
            f"<td>{'yes' if is_right else 'no'}</td><td>{chance:.3f}</td></tr>"
        )
    columns = ("place", "in the text", "given back", "the same", "chance of the text's token")
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    return (
        f"<h2>3. Place by place</h2><table><caption>Chunk {chunk + 1}, as the decoder tells it from its vectors "
        f"alone</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


class Views(NamedTuple):
    """The components of the right column, in the order of the values of `show_place`."""

    tokens: gr.HTML
    summary: gr.HTML
    vectors: gr.HTML
    places: gr.HTML


def show_place(held: Held, place: int) -> tuple[str, ...]:
    """Return the values of all views of the token at a place."""
    title = "1. Choose a token. Each line is a chunk, of which one memory is all that the decoder sees."
    text = choosable_text(title, coloured_tokens(held, place), COLOURS)
    return text, summary(held), vector_view(held, place // held.chunk_length), place_table(held, place)


def choose_place(held: Held | None, event: gr.SelectData) -> tuple[str, ...]:
    """Return the values of the views of the token that a visitor chose."""
    held = check_kept(held, *DROPPED)
    return show_place(held, place_among(event.index, len(held.tokens)))


HEADING = """
<p>The <b>encoder</b> reads each chunk of a text alone and leaves a few vectors, its <b>memory</b>. The <b>decoder</b>
sees the memories of earlier chunks in place of their tokens. Here it tells each chunk from its memory alone, so that
you see what the memory holds.</p>
"""


def make_tab(page: gr.Blocks, model: MemoryModelForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill the tab. A visitor's text is held only in the state of that visitor."""
    held = gr.State(time_to_live=KEPT_SECONDS)
    gr.HTML(HEADING, elem_id="vectors-heading")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            text = gr.Textbox(
                EXAMPLES[0], label="Text", lines=5, max_lines=8, max_length=MOST_CHARACTERS, elem_id="encoded"
            )
            button = gr.Button("Read it into memories", variant="primary", elem_id="encode")
            notice = make_announced("vectors-note", elem_classes="note")
            examples = gr.Examples(EXAMPLES, text, label="Choose a text: its memories are shown.", elem_id="encodings")
        with gr.Column(scale=3, min_width=320):
            views = Views(
                tokens=make_choosable("held"),
                summary=make_announced("held-summary"),
                vectors=make_announced("vectors"),
                places=gr.HTML(elem_id="places"),
            )

    def hold(text: str) -> tuple[Any, ...]:
        try:
            now, message = read(model, tokenizer, text)
        except ValueError as error:
            return gr.skip(), paragraph(str(error)), *[gr.skip()] * len(Views._fields)
        return now, paragraph(message), *show_place(now, 0)

    shown = [held, notice, *views]
    # The first visit shows an example at once.
    gr.on([page.load, button.click, text.submit], hold, [text], shown, api_name="hold", **ONE_AT_A_TIME)
    examples.load_input_event.then(hold, [text], shown, api_visibility="private", **ONE_AT_A_TIME)
    views.tokens.select(choose_place, held, list(views))

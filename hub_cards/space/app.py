# SPDX-License-Identifier: Apache-2.0
"""A page that shows the memory of a Memory Mosaic: `python hub_cards/space/app.py FOLDER_OR_REPO`.

The model continues a text. For every token the first tab shows which memories it came from and what they recalled.
`memories.py` is the second tab, of documents that are joined and forgotten. `shared.py` is what both use, and
`page.css` has the looks. In a Space the package `modeling_memory_mosaic` and the folder `model` lie beside these
files: no code of a repository is run.

A text has T tokens, a model L layers of H contextual and H persistent memories. All are counted from 0.
"""

import argparse
import dataclasses
import html
import math
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple


# Gradio reads this when it is imported. Without it, the page would send usage data to another server.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

import memories  # noqa: E402
from modeling_memory_mosaic import MemoryMosaicForCausalLM, MemoryMosaicTrace, trace_tokens  # noqa: E402
from shared import (  # noqa: E402
    CHOSEN,
    GIVEN,
    KEPT_SECONDS,
    MARKS,
    MOST_CHARACTERS,
    NOT_FINITE,
    OCHRES,
    ONE_AT_A_TIME,
    bar,
    boxed,
    check_kept,
    check_text,
    generation_settings,
    label_of,
    pair_name,
    paragraph,
    place_among,
    shown_tokens,
    tokenize_end,
    visible,
)


KINDS = ("contextual", "persistent")
MOST_NEW_TOKENS = 100
HIGHEST_TEMPERATURE = 1.5
# In bytes. A request of this page has a few kilobytes: nothing is uploaded.
LARGEST_REQUEST = 2**20
MOST_WAITING = 32
UNITS_OF_A_KIND = 4
PAIRS_OF_A_UNIT = 3
WORDS_OF_A_SLOT = 3
# Of a text that is kept no more.
DROPPED = "This text was", "continue it again."

EXAMPLES = [
    "The dog's name was Max. The cat's name was Bella. The dog's name was",
    "Tom had a big red ball. Sam had a small blue car. Tom played with his",
    '"I am sad," said the bird. "Why are you sad?" asked the cat. The bird said,',
    "Once upon a time, there was a little girl named Lily. One day, Lily",
]

PROBABILITIES = {"under 5%": 0.05, "5 to 25%": 0.25, "25 to 60%": 0.6, "over 60%": 1.01}
WEIGHTS = {"1 to 5%": 0.05, "5 to 20%": 0.2, "20 to 50%": 0.5, "over 50%": 1.01}
BLUES = dict(zip(PROBABILITIES, ["#e3eefa", "#b3d4f5", "#72b0ea", "#2f86d9"], strict=True))


@dataclasses.dataclass
class Reading:
    """A text that a model continued, with the reasons.

    Args:
        tokens: the T tokens as the page shows them.
        num_given: how many were given; the model wrote the others.
        trace: trace of the text, without the many `slot_weights`.
        slots: the slots that each persistent memory read most at each token, and their weights, both `(L, H, T, 3)`.
        words: the tokens that a slot speaks for most, by layer, head and slot, for the slots that the page shows.
    """

    tokens: list[str]
    num_given: int
    trace: MemoryMosaicTrace
    slots: tuple[torch.Tensor, torch.Tensor]
    words: dict[tuple[int, int, int], list[str]]


@dataclasses.dataclass
class Unit:
    """One memory and its contribution to one token.

    Args:
        layer: of the memory.
        kind: `contextual` or `persistent`.
        head: of the memory.
        contribution: what the memory added to the token's logit.
        recalled: what it recalled for that, strongest first: places of the tokens that completed the pairs, or numbers
            of slots, with their weights.
    """

    layer: int
    kind: str
    head: int
    contribution: float
    recalled: list[tuple[int, float]]


def load(source: str) -> tuple[MemoryMosaicForCausalLM, PreTrainedTokenizerBase]:
    """Load model (in float32, evaluation mode) and tokenizer from a folder or from a repository on the Hub.

    Raises:
        ValueError: it does not hold a Memory Mosaic that predicts tokens, with finite weights and its tokenizer.
    """
    remedy = "Pass a folder, or the name of a repository on the Hub, that holds a MemoryMosaicForCausalLM."
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        is_missing = Path(source).is_absolute() and not Path(source).exists()
        reason = "there is no such folder" if is_missing else str(error).splitlines()[0]
        raise ValueError(f"{source}: no model was found there ({reason}). {remedy}") from error
    architectures = config.architectures or ["no architecture"]
    if config.model_type != "memory_mosaic" or "MemoryMosaicForCausalLM" not in architectures:
        other = f"{', '.join(architectures)} of type {config.model_type}"
        raise ValueError(f"{source}: {other} was found there, whose memories this page cannot show. {remedy}")
    model = MemoryMosaicForCausalLM.from_pretrained(source, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: the model has no tokenizer beside it. Save its own there: `tokenizer.save_pretrained`."
        ) from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{source}: the weights have numbers that are not finite. {remedy}")
    return model.eval(), tokenizer


def generate(
    model: MemoryMosaicForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    num_tokens: int,
    temperature: float,
    seed: int,
) -> torch.Tensor:
    """Return the ids of a text and its continuation, `(1, T)`. The global random state stays as it is."""
    settings = generation_settings(model, tokenizer, num_tokens, temperature)
    # The model is on the CPU. Without the list, the state of every GPU would be kept.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        except RuntimeError as error:  # torch cannot draw from probabilities that are not finite
            raise ValueError(f"{NOT_FINITE} ({str(error).splitlines()[0]})") from error


def check_settings(beginning: Any, num_tokens: Any, temperature: Any, seed: Any) -> None:
    """Raise `ValueError` for settings out of bounds. A program is not held by the bounds of the page."""
    check_text(beginning, "The beginning", "write a few words for the model to continue.")
    if None in (num_tokens, temperature, seed):
        raise ValueError("A number is missing: give the number of new tokens, the temperature and the seed.")
    for number in (num_tokens, temperature, seed):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError("One of the settings is no number: give plain, finite numbers.")
    is_possible = 1 <= num_tokens <= MOST_NEW_TOKENS and num_tokens == int(num_tokens)
    if not (is_possible and 0 <= temperature <= HIGHEST_TEMPERATURE):
        bounds = f"1 to {MOST_NEW_TOKENS} new tokens, at a temperature from 0 on, up to {HIGHEST_TEMPERATURE}"
        raise ValueError(f"Ask for {bounds}.")
    if not (0 <= seed < 2**31 and seed == int(seed)):
        raise ValueError("The seed has to be a whole number from 0 on, below 2,147,483,648.")


@torch.no_grad()
def words_of_slots(
    model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase, places: set[tuple[int, int, int]]
) -> dict[tuple[int, int, int], list[str]]:
    """Return the tokens that a slot speaks for: those with the largest logits if its value were all that was read.

    It is a first look: what later layers make of the value is left out.

    Args:
        model: the model.
        tokenizer: of the model.
        places: layer, head and number of each slot.

    Returns:
        Tokens by slot, likeliest first.
    """
    words = {}
    for layer in {layer for layer, _, _ in places}:
        memory, in_layer = model.model.layers[layer].persistent_memory, [slot for slot in places if slot[0] == layer]
        heads, slots = torch.tensor([place[1:] for place in in_layer]).T
        # One row for each slot, its value at its head and zeros elsewhere; the last row is all zeros.
        alone = torch.zeros(len(in_layer) + 1, *memory.slot_values.shape[::2])  # (n + 1, H, D)
        alone[range(len(in_layer)), heads] = memory.slot_values[heads, slots]
        output = memory.o_proj(alone.flatten(1))
        output = output[:-1] - output[-1]  # the row of zeros gives the bias
        # The final norm without its division, which keeps the order of the logits.
        logits = model.lm_head((output - output.mean(-1, keepdim=True)) * model.model.norm.weight)
        # More than are shown, because some are left out below.
        ranking = logits.topk(min(3 * WORDS_OF_A_SLOT, logits.shape[1])).indices.tolist()
        for place, best in zip(in_layer, ranking, strict=True):
            tokens = [str(tokenizer.decode([token])) for token in best]
            # A single byte of a longer character is no word to show.
            words[place] = [token for token in tokens if "\ufffd" not in token][:WORDS_OF_A_SLOT]
    return words


def recalled_by(reading: Reading, position: int, layer: int, kind: str, head: int) -> list[tuple[int, float]]:
    """Return the pairs or slots that a memory recalled most to predict the token at a position, and their weights."""
    if kind == "persistent":
        slots, weights = (numbers[layer, head, position - 1] for numbers in reading.slots)
    else:
        row = reading.trace.weights[layer, 0, head, position - 1]
        weights, slots = row.topk(min(PAIRS_OF_A_UNIT, len(row)))
    # A smaller weight would be shown as 0%.
    return [(slot, weight) for slot, weight in zip(slots.tolist(), weights.tolist(), strict=True) if weight >= 0.005]


def strongest_units(reading: Reading, position: int) -> list[Unit]:
    """Return the memories of each kind with the largest contributions to the token at a position, positive first."""
    if position == 0:
        return []
    contribution = reading.trace.contribution[:, :, 0, :, position - 1]  # (L, 2, H)
    units = []
    for index, kind in enumerate(KINDS):
        numbers = contribution[:, index]
        for place in numbers.abs().flatten().topk(min(UNITS_OF_A_KIND, numbers.numel())).indices.tolist():
            layer, head = divmod(place, numbers.shape[1])
            recalled = recalled_by(reading, position, layer, kind, head)
            units.append(Unit(layer, kind, head, numbers[layer, head].item(), recalled))
    return sorted(units, key=lambda unit: -unit.contribution)


def write(
    model: MemoryMosaicForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    beginning: str,
    num_tokens: float,
    temperature: float,
    seed: float,
) -> tuple[Reading, str]:
    """Let the model continue a text, and trace each token of it.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        beginning: not empty; only the last `MOST_GIVEN_TOKENS` tokens are read.
        num_tokens: how many to write; the text may end earlier.
        temperature: of the sampling; 0 takes the likeliest token each time.
        seed: of the sampling.

    Returns:
        The reading, and a notice for the visitor; "" if there is none.

    Raises:
        ValueError: the beginning is empty or no text, a number is missing, out of range or not finite, or the model
            computes numbers that are not finite.
    """
    check_settings(beginning, num_tokens, temperature, seed)
    ids, notice = tokenize_end(tokenizer, beginning, "The beginning")
    text = generate(model, tokenizer, ids, int(num_tokens), temperature, int(seed))
    trace = trace_tokens(model, text)
    # Without the last token: nothing follows it, so that its numbers are NaN.
    if not (trace.logit[:, :-1].isfinite().all() and trace.contribution[..., :-1].isfinite().all()):
        raise ValueError(NOT_FINITE)
    # Both have the shape (L, H, T, 3).
    weights, slots = trace.slot_weights[:, 0].topk(min(PAIRS_OF_A_UNIT, trace.slot_weights.shape[-1]))
    trace = dataclasses.replace(trace, slot_weights=torch.empty(0))
    reading = Reading(shown_tokens(tokenizer, text[0].tolist()), ids.shape[1], trace, (slots, weights), {})
    units = [unit for position in range(len(text[0])) for unit in strongest_units(reading, position)]
    persistent = [unit for unit in units if unit.kind == "persistent"]
    places = {(unit.layer, unit.head, slot) for unit in persistent for slot, _ in unit.recalled}
    return dataclasses.replace(reading, words=words_of_slots(model, tokenizer, places)), notice


def coloured_text(reading: Reading, position: int) -> list[tuple[str, str]]:
    """Return tokens and labels: the probability that the model gave the token, or that it was given or is chosen."""
    probabilities = reading.trace.log_probability[0].exp().tolist()
    labels = [GIVEN] * reading.num_given
    # Entry t is of token t + 1, and the last entry of none.
    labels += [label_of(number, PROBABILITIES) for number in probabilities[reading.num_given - 1 : -1]]
    labels[position] = CHOSEN
    # The sign of a line break does not break the line.
    shown = [visible(token) + "\n" * token.count("\n") for token in reading.tokens]
    return list(zip(shown, labels, strict=True))


def slot_name(reading: Reading, layer: int, head: int, slot: int) -> str:
    """Return, as HTML, the number of a slot and the tokens that it speaks for."""
    words = reading.words.get((layer, head, slot), [])
    return f"slot {slot} → " + " ".join(map(boxed, words)) if words else f"slot {slot}"


def names_of_recalled(reading: Reading, unit: Unit) -> list[str]:
    """Return, as HTML, what a memory recalled, with the weights."""
    names = []
    for place, weight in unit.recalled:
        contextual = unit.kind == "contextual"
        name = pair_name(reading.tokens, place) if contextual else slot_name(reading, unit.layer, unit.head, place)
        names.append(f'<span class="pair"><b>{weight:.0%}</b> {name}</span>')
    return names


def table_rows(reading: Reading, units: list[Unit]) -> list[list[Any]]:
    """Return one row of the table for each memory."""
    rows = []
    for unit in units:
        names = names_of_recalled(reading, unit)
        names += [""] * (PAIRS_OF_A_UNIT - len(names))
        rows.append([f"{unit.contribution:+.2f}", unit.layer, unit.kind, unit.head, *names])
    return rows


def weighted_text(reading: Reading, position: int, layer: int, kind: str, head: int) -> list[tuple[str, str | None]]:
    """Return the tokens before a position, labelled by the weight that a memory gave the pair that they completed."""
    row = torch.zeros(position)
    if kind == "contextual":
        row = reading.trace.weights[layer, 0, head, position - 1, :position]
    labels = [label_of(weight, WEIGHTS) if weight >= 0.01 else None for weight in row.tolist()]
    return list(zip([visible(token) for token in reading.tokens[:position]], labels, strict=True))


def parts_of_logit(reading: Reading, position: int) -> dict[str, float]:
    """Return the parts that sum to the logit of the token at a position."""
    trace, place = reading.trace, position - 1
    contextual, persistent = trace.contribution[:, :, 0, :, place].sum(dim=(0, 2)).tolist()
    parts = {
        "the last token itself": trace.embedding[0, place].item(),
        "contextual memories": contextual,
        "persistent memories": persistent,
    }
    biases = trace.biases[0, place].item()
    return parts if biases == 0 else parts | {"biases": biases}


def explanation(reading: Reading, position: int) -> str:
    """Return, as HTML, why a token came: its probability, and bars for the parts of its logit."""
    token = html.escape(visible(reading.tokens[position]))
    if position == 0:
        return f"<p>“{token}” is the first token. Nothing came before it, so nothing predicted it: choose another.</p>"
    trace, place = reading.trace, position - 1
    origin = "was given" if position < reading.num_given else "was written"
    parts = parts_of_logit(reading, position)
    longest = max(map(abs, parts.values()))
    share = trace.persistent_share[0, place].item()
    return (
        f'<p><b class="chosen">{token}</b> (token {position}) {origin}; the model held it '
        f"<b>{trace.log_probability[0, place].exp().item():.0%}</b> likely. Its logit, "
        f"<b>{trace.logit[0, place].item():+.2f}</b> where the mean of all tokens is 0, is the sum of:</p>"
        '<div class="why"><div class="parts">'
        + "".join(bar(name, value, longest) for name, value in parts.items())
        + f'</div><div class="share"><b>{share:.0%}</b> persistent share: of all that memories said, '
        "for the token or against it, this much came from persistent ones</div></div>"
    )


def recall_sentence(position: int, layer: int, kind: str, head: int) -> str:
    """Return, as HTML, a sentence on what the coloured text below it shows."""
    name = f"<b>Layer {layer}, {kind} memory {head}</b>"
    if kind == "persistent":
        return f"<p>{name} recalled pairs that it learnt in training, and nothing of this text:</p>"
    if position == 1:
        return f"<p>{name} had nothing to recall: one token makes no pair.</p>"
    return (
        f"<p>{name} recalled what came after whatever in the text was most like what had just been read. "
        "The weights:</p>"
    )


def show_unit(reading: Reading, position: int, layer: int, kind: str, head: int) -> tuple[Any, ...]:
    """Return the values of the views of one memory: a sentence and the coloured text."""
    sentence = recall_sentence(position, layer, kind, head)
    return sentence, weighted_text(reading, position, layer, kind, head)


def show_token(reading: Reading, position: int) -> tuple[Any, ...]:
    """Return the values of all views of one token, with the contextual memory that favours it most."""
    units = strongest_units(reading, position)
    views = [coloured_text(reading, position), explanation(reading, position), table_rows(reading, units)]
    if not units:
        return *views, "", []
    first = next(unit for unit in units if unit.kind == "contextual")
    return *views, *show_unit(reading, position, first.layer, first.kind, first.head)


def choose_token(reading: Reading | None, event: gr.SelectData) -> tuple[Any, ...]:
    """Return the position of the token that a visitor chose, and the values of its views."""
    reading = check_kept(reading, *DROPPED)
    position = place_among(event.index, len(reading.tokens))
    return position, *show_token(reading, position)


def choose_unit(reading: Reading | None, position: int, event: gr.SelectData) -> tuple[Any, ...]:
    """Return the values of the views of the memory that a visitor chose in the table."""
    reading = check_kept(reading, *DROPPED)
    # The content of the row, and not its number: visitors may sort the table.
    _, layer, kind, head, *_ = event.row_value
    num_layers, _, num_heads, *_ = reading.trace.weights.shape
    # Whatever is not the second kind counts as the first: a program can send any text.
    unit = place_among(layer, num_layers), KINDS[kind == KINDS[1]], place_among(head, num_heads)
    return show_unit(reading, place_among(position, len(reading.tokens)), *unit)


HEADING = """
<h1>The memory of a Memory Mosaic</h1>
<p>A language model without attention and feed-forward layers: it has only memories.</p>
"""
TEXT_HEADING = """
<p><b>Contextual</b> memories store what came after what in the text, <b>persistent</b> ones what was learnt in
training. Each recalls what used to follow when things looked like now, and adds its word to the sum that predicts the
next token.</p>
"""

# Black letters on pale colours cannot be read on a dark page.
LIGHT = "() => document.body.classList.remove('dark')"


class Settings(NamedTuple):
    """The components of the left column, where a visitor asks for a text."""

    beginning: gr.Textbox
    num_tokens: gr.Slider
    temperature: gr.Slider
    seed: gr.Number
    button: gr.Button
    notice: gr.HTML


class Views(NamedTuple):
    """The components of the right column, in the order of the values of `show_token`."""

    text: gr.HighlightedText
    why: gr.HTML
    table: gr.Dataframe
    recalled: gr.HTML
    pairs: gr.HighlightedText


def make_settings() -> Settings:
    settings = Settings(
        beginning=gr.Textbox(
            EXAMPLES[0], label="Beginning", lines=4, max_lines=4, max_length=MOST_CHARACTERS, elem_id="beginning"
        ),
        num_tokens=gr.Slider(1, MOST_NEW_TOKENS, 40, step=1, label="New tokens"),
        temperature=gr.Slider(0, HIGHEST_TEMPERATURE, 0.7, step=0.1, label="Temperature"),
        seed=gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
        button=gr.Button("Continue the text", variant="primary", elem_id="continue"),
        notice=gr.HTML(elem_id="note", elem_classes="note"),
    )
    gr.Examples(EXAMPLES, settings.beginning, label="Beginnings to try")
    return settings


def make_views() -> Views:
    return Views(
        text=gr.HighlightedText(
            label="1. Choose a token. The bluer it is, the likelier the model held it.",
            color_map={GIVEN: MARKS[GIVEN], **BLUES, CHOSEN: MARKS[CHOSEN]},
            show_legend=True,
            elem_id="text",
        ),
        why=gr.HTML(elem_id="why"),
        table=gr.Dataframe(
            headers=["said", "layer", "memory", "head", "recalled most", "then", "then"],
            label="2. Choose a memory. What the strongest said, + for the token and - against it, and "
            "recalled: pairs of the text, or learnt slots → words that these speak for.",
            datatype=["str", "number", "str", "number", "html", "html", "html"],
            column_widths=["7%", "6%", "10%", "6%", "24%", "24%", "23%"],
            interactive=False,
            buttons=[],
            elem_id="table",
        ),
        recalled=gr.HTML(elem_id="recalled"),
        pairs=gr.HighlightedText(
            label="3. What it recalled of the text so far",
            color_map=dict(zip(WEIGHTS, OCHRES, strict=True)),
            show_legend=True,
            elem_id="pairs",
        ),
    )


def make_text_tab(page: gr.Blocks, model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill the tab. A visitor's text is held only in the state of that visitor."""
    reading, position = gr.State(time_to_live=KEPT_SECONDS), gr.State(0)
    gr.HTML(TEXT_HEADING, elem_id="text-heading")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            settings = make_settings()
        with gr.Column(scale=3, min_width=600):
            views = make_views()

    def continue_text(beginning: str, num_tokens: float, temperature: float, seed: float) -> tuple[Any, ...]:
        try:
            written, notice = write(model, tokenizer, beginning, num_tokens, temperature, seed)
        except ValueError as error:
            return gr.skip(), gr.skip(), paragraph(str(error)), *[gr.skip()] * len(views)
        last = len(written.tokens) - 1
        return written, last, paragraph(notice), *show_token(written, last)

    # The first visit shows an example at once.
    gr.on(
        [page.load, settings.button.click, settings.beginning.submit],
        continue_text,
        [settings.beginning, settings.num_tokens, settings.temperature, settings.seed],
        [reading, position, settings.notice, *views],
        **ONE_AT_A_TIME,
    )
    views.text.select(choose_token, reading, [position, *views])
    views.table.select(choose_unit, [reading, position], [views.recalled, views.pairs])


def make_page(model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase) -> gr.Blocks:
    """Return the page with its two tabs."""
    with gr.Blocks(title="The memory of a Memory Mosaic") as page:
        gr.HTML(HEADING, elem_id="heading")
        with gr.Tab("A text"):
            make_text_tab(page, model, tokenizer)
        with gr.Tab("Memories") as tab:
            memories.make_tab(tab, model, tokenizer)
    return page


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BoundedRequests:
    """An ASGI application that refuses a request of more than `LARGEST_REQUEST` bytes before it takes up memory."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received = 0
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        # By its digits first: a number of thousands of them takes long to read.
        if not stated.isdigit() or len(stated) > 9 or int(stated) > LARGEST_REQUEST:
            return await self.refuse(send)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # A request that states no length and is too long ends as if the visitor had left.
            return message if received <= LARGEST_REQUEST else {"type": "http.disconnect"}

        return await self.app(scope, counted, send)

    async def refuse(self, send: Send) -> None:
        # The rest of the request is not read, so the connection cannot take another.
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": f"over {LARGEST_REQUEST:,} bytes".encode()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a page on the memory of a Memory Mosaic.")
    beside = Path(__file__).with_name("model")
    parser.add_argument("source", nargs="?", default=str(beside), help="folder of a model, or repository on the Hub")
    try:
        page = make_page(*load(parser.parse_args().source))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    # The file of half-bold letters that Gradio brings lacks many of them.
    letters: list[gr.themes.Font | str] = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", font=letters)
    page.queue(max_size=MOST_WAITING)
    page.launch(
        theme=theme,
        css_paths=Path(__file__).with_name("page.css"),
        js=LIGHT,
        footer_links=[],
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(BoundedRequests)]},
        run_history=False,
        ssr_mode=False,
        state_session_capacity=100,
    )


if __name__ == "__main__":
    main()

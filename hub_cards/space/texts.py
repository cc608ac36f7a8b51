# SPDX-License-Identifier: Apache-2.0
"""The tab on a text: the model continues it, and the page shows which memories each token came from.

A text has T tokens, a model L layers of H contextual and H persistent memories. All are counted from 0. Contextual
memories of Memory Mosaics v2 are short-term or long-term ones. Its dense persistent memory is one without slots. The
page opens on the token that contextual memories explain best.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from marked import (
    CHOSEN,
    GIVEN,
    MARKS,
    OCHRES,
    Mark,
    boxed,
    choosable_text,
    chosen_box,
    label_of,
    make_announced,
    make_choosable,
    marked_text,
    pair_name,
    pieces,
    token_names,
    visible,
)
from modeling_memory_mosaic import MemoryMosaicForCausalLM, MemoryMosaicTrace, trace_tokens
from shared import (
    KEPT_SECONDS,
    MOST_CHARACTERS,
    NOT_FINITE,
    ONE_AT_A_TIME,
    bar,
    check_kept,
    check_text,
    generation_settings,
    paragraph,
    place_among,
    tokenize_end,
)


KINDS = ("contextual", "persistent")
MOST_NEW_TOKENS = 100
HIGHEST_TEMPERATURE = 1.5
UNITS_OF_A_KIND = 4
PAIRS_OF_A_UNIT = 3
WORDS_OF_A_SLOT = 3
# Of a text that is kept no more.
DROPPED = "This text was", "continue it again."
ENDS_OF_SENTENCES, QUOTES = ".!?…。！？", "\"'”’»」"

EXAMPLES = [
    "Tom had a big red ball. Sam had a small blue car. Tom played with his",
    "The dog's name was Max. The cat's name was Bella. The dog's name was",
    '"I am sad," said the bird. "Why are you sad?" asked the cat. The bird said,',
    "Once upon a time, there was a little girl named Lily. One day, Lily",
]

PROBABILITIES = {"under 5%": 0.05, "5 to 25%": 0.25, "25 to 60%": 0.6, "over 60%": 1.01}
WEIGHTS = {"1 to 5%": 0.05, "5 to 20%": 0.2, "20 to 50%": 0.5, "over 50%": 1.01}
BLUES = dict(zip(PROBABILITIES, ["#e3eefa", "#b3d4f5", "#72b0ea", "#2f86d9"], strict=True))
COLOURS = {GIVEN: MARKS[GIVEN], **BLUES, CHOSEN: MARKS[CHOSEN]}


@dataclasses.dataclass
class Reading:
    """A text that a model continued, with the reasons.

    Args:
        tokens: the T tokens, each by its name.
        pieces: the text as the page shows it, and the place of the last token of each piece.
        num_given: how many were given; the model wrote the others.
        trace: trace of the text, without the many `slot_weights`.
        slots: the slots that each persistent memory read most at each token, and their weights, both `(L, H, T, 3)`;
            `(L, 1, T, 0)` of dense memories.
        words: the tokens that the value of a slot favours most, by layer, head and slot.
    """

    tokens: list[str]
    pieces: list[tuple[str, int]]
    num_given: int
    trace: MemoryMosaicTrace
    slots: tuple[torch.Tensor, torch.Tensor]
    words: dict[tuple[int, int, int], list[str]]

    @property
    def has_slots(self) -> bool:
        """Whether persistent memories hold pairs."""
        return self.slots[0].shape[-1] > 0

    def name_of(self, layer: int, kind: str, head: int, noun: str = "") -> str:
        """Return the name of a memory, which has its level and its number there, with a noun between them."""
        level, number = kind, head
        num_short = self.trace.levels.get("short_term", 0)
        if kind == "contextual" and self.trace.levels:
            level, number = ("short-term", head) if head < num_short else ("long-term", head - num_short)
        return f"Layer {layer}, {level} {noun}{number}"


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
    """Return the tokens that a slot favours: those with the largest logits if its value were all that was read.

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
        if isinstance(model.model.norm, torch.nn.LayerNorm):
            output = output - output.mean(-1, keepdim=True)
        logits = model.lm_head(output * model.model.norm.weight)
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
    # One kind may have fewer memories than the other, whose contributions are 0 behind them.
    num_memories = reading.trace.weights.shape[2], reading.slots[0].shape[1]
    for index, kind in enumerate(KINDS):
        numbers = contribution[:, index, : num_memories[index]]
        for place in numbers.abs().flatten().topk(min(UNITS_OF_A_KIND, numbers.numel())).indices.tolist():
            layer, head = divmod(place, numbers.shape[1])
            recalled = recalled_by(reading, position, layer, kind, head)
            units.append(Unit(layer, kind, head, numbers[layer, head].item(), recalled))
    return sorted(units, key=lambda unit: -unit.contribution)


def is_end_of_sentence(text: str) -> bool:
    return text.strip().rstrip(QUOTES).endswith(tuple(ENDS_OF_SENTENCES))


def whole_sentences(tokenizer: PreTrainedTokenizerBase, ids: list[int], num_given: int) -> list[int]:
    """Return the ids of a text up to the end of its last written sentence.

    A text that the model ended, or whose first written sentence has no end, stays as it is.
    """
    if ids[-1] == tokenizer.eos_token_id:
        return ids
    shown = pieces(tokenizer, ids)
    for number in range(len(shown) - 1, -1, -1):
        text, place = shown[number]
        if place < num_given:
            break
        follows_an_end = number > 0 and text.strip(QUOTES) == "" and is_end_of_sentence(shown[number - 1][0])
        if is_end_of_sentence(text) or follows_an_end:
            return ids[: place + 1]
    return ids


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
        num_tokens: how many to write at most; the text ends at a sentence before.
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
    num_given = ids.shape[1]
    written = generate(model, tokenizer, ids, int(num_tokens), temperature, int(seed))[0].tolist()
    text = whole_sentences(tokenizer, written, num_given)
    trace = trace_tokens(model, torch.tensor([text]))
    # Without the last token: nothing follows it, so that its numbers are NaN.
    if not (trace.logit[:, :-1].isfinite().all() and trace.contribution[..., :-1].isfinite().all()):
        raise ValueError(NOT_FINITE)
    # Both have the shape (L, H, T, 3).
    weights, slots = trace.slot_weights[:, 0].topk(min(PAIRS_OF_A_UNIT, trace.slot_weights.shape[-1]))
    trace = dataclasses.replace(trace, slot_weights=torch.empty(0))
    names = token_names(tokenizer, text)
    reading = Reading(names, pieces(tokenizer, text), num_given, trace, (slots, weights), {})
    units = [unit for position in range(len(text)) for unit in strongest_units(reading, position)]
    persistent = [unit for unit in units if unit.kind == "persistent"]
    places = {(unit.layer, unit.head, slot) for unit in persistent for slot, _ in unit.recalled}
    return dataclasses.replace(reading, words=words_of_slots(model, tokenizer, places)), notice


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


def lead_of_contextual(reading: Reading, position: int) -> float:
    """Return by how much contextual memories add more to the logit of a token than the largest other part."""
    parts = parts_of_logit(reading, position)
    contextual = parts.pop("contextual memories")
    return contextual - max(parts.values())


def recalls_the_token(reading: Reading, position: int) -> bool:
    """Whether the contextual memory that adds most recalled, before all, an earlier place of the same token."""
    unit = next(unit for unit in strongest_units(reading, position) if unit.kind == "contextual")
    return bool(unit.recalled) and reading.tokens[unit.recalled[0][0]] == reading.tokens[position]


def opening_token(reading: Reading) -> int:
    """Return the place of the written token to open on: contextual memories lead there by most.

    Words that were recalled from the text come before others, and words before signs.
    """
    written = [place for _, place in reading.pieces if place >= max(1, reading.num_given)]

    def rank(place: int) -> tuple[bool, bool, float]:
        is_word = reading.tokens[place].strip().isalpha()
        lead = lead_of_contextual(reading, place)
        return is_word and lead > 0 and recalls_the_token(reading, place), is_word, lead

    return max(written, key=rank)


def coloured_text(reading: Reading, position: int) -> list[Mark]:
    """Return pieces and labels: the probability that the model gave the piece, or that it was given or is chosen."""
    # Entry t is of token t + 1, and the last entry of none.
    log_probabilities = reading.trace.log_probability[0].tolist()
    marks, begin = [], 0
    for text, place in reading.pieces:
        label = GIVEN
        if begin <= position <= place:
            label = CHOSEN
        elif place >= reading.num_given:
            label = label_of(math.exp(sum(log_probabilities[max(begin, 1) - 1 : place])), PROBABILITIES)
        # The sign of a line break does not break the line.
        marks += [Mark(visible(text), label), *[Mark("\n")] * text.count("\n")]
        begin = place + 1
    return marks


def favoured_slots(reading: Reading, unit: Unit, position: int) -> list[tuple[int, float, list[str]]]:
    """Return the slots that a persistent memory read and that favour the token at a position by themselves.

    Most slots favour no word that a reader would understand: they work together.
    """
    words = {slot: reading.words.get((unit.layer, unit.head, slot), []) for slot, _ in unit.recalled}
    return [(slot, weight, words[slot]) for slot, weight in unit.recalled if reading.tokens[position] in words[slot]]


def listed_units(reading: Reading, position: int) -> list[Unit]:
    """Return the units of the table: contextual memories, and persistent ones whose slots favour the token."""
    units = strongest_units(reading, position)
    return [unit for unit in units if unit.kind == "contextual" or favoured_slots(reading, unit, position)]


def names_of_recalled(reading: Reading, unit: Unit, position: int) -> list[str]:
    """Return, as HTML, what a memory recalled, with the weights."""
    if unit.kind == "contextual":
        named = [(weight, pair_name(reading.tokens, place)) for place, weight in unit.recalled]
    else:
        named = [
            (weight, f"slot {slot} → {' '.join(map(boxed, words))}")
            for slot, weight, words in favoured_slots(reading, unit, position)
        ]
    return [f'<span class="pair"><b>{weight:.0%}</b> {name}</span>' for weight, name in named]


def unit_table(reading: Reading, position: int, chosen: int) -> str:
    """Return, as an HTML table, one row for each memory that is listed; one of them is chosen."""
    of_persistent = "A persistent memory recalls slots, which hold pairs that it learnt in training."
    if not reading.has_slots:
        of_persistent = "The persistent memory of a layer is dense: it holds no pairs, and is not listed."
    rows = ""
    for number, unit in enumerate(listed_units(reading, position)):
        is_chosen = number == chosen
        names = names_of_recalled(reading, unit, position) or ["nothing: one token makes no pair"]
        rows += (
            f'<tr class="{"chosen-row" * is_chosen}"><th scope="row"><button type="button" data-choice="{number}" '
            f'aria-pressed="{str(is_chosen).lower()}" tabindex="{0 if is_chosen else -1}">'
            f"{reading.name_of(unit.layer, unit.kind, unit.head)}</button></th>"
            f"<td>{unit.contribution:+.2f}</td><td>{' '.join(names)}</td></tr>"
        )
    return (
        "<h2>2. Choose a memory.</h2><p>The table lists the memories that change the logit of the chosen token most. "
        f"A contextual memory recalls pairs of the text: a token, and what followed it. {of_persistent}</p>"
        '<table><thead><tr><th scope="col">Memory</th><th scope="col">It adds</th>'
        '<th scope="col">It recalls, with these weights</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>{sentence_on_others(reading, position)}"
    )


def sentence_on_others(reading: Reading, position: int) -> str:
    """Return, as HTML, what the strongest persistent memories add that are not listed, or nothing."""
    units = [unit for unit in strongest_units(reading, position) if unit.kind == "persistent"]
    others = [unit.contribution for unit in units if not favoured_slots(reading, unit, position)]
    if not others:
        return ""
    added = ", ".join(f"{number:+.2f}" for number in others)
    if not reading.has_slots:
        return f"<p>The strongest dense layers add {added}.</p>"
    is_one = len(others) == 1
    return (
        f"<p>{len(others)} of the {len(units)} strongest persistent memories {'is' if is_one else 'are'} not listed: "
        f"none of the slots that {'it recalls' if is_one else 'they recall'} most favours this token by itself. "
        f"{'It adds' if is_one else 'They add'} {added}.</p>"
    )


def weighted_text(reading: Reading, position: int, layer: int, kind: str, head: int) -> list[Mark]:
    """Return the text before a token, labelled by the weight that a memory gave the pairs that it completed."""
    row = [0.0] * position
    if kind == "contextual":
        row = reading.trace.weights[layer, 0, head, position - 1, :position].tolist()
    marks, begin = [], 0
    for text, place in reading.pieces:
        # Of a character that is not complete there are bytes.
        parts = (
            [(text, begin, place)] if place < position else [(reading.tokens[p], p, p) for p in range(begin, position)]
        )
        for part, first, last in parts:
            weight = sum(row[first : last + 1])
            label = label_of(min(weight, 1.0), WEIGHTS) if weight >= 0.01 else None
            marks += [Mark(visible(part), label), *[Mark("\n")] * part.count("\n")]
        begin = place + 1
    return marks


def piece_at(reading: Reading, position: int) -> tuple[str, int]:
    """Return the text of the piece that a token is in, and how many tokens it has."""
    begin = 0
    for text, place in reading.pieces:
        if position <= place:
            return text, place + 1 - begin
        begin = place + 1
    raise IndexError(f"there is no token {position}")


def explanation(reading: Reading, position: int) -> str:
    """Return, as HTML, why a token came: its probability, and bars for the parts of its logit."""
    text, num_tokens = piece_at(reading, position)
    token = chosen_box(text)
    if position == 0:
        return (
            f"<p>The chosen token is {token}. It is the first one. Nothing came before it, so nothing predicted it: "
            "choose another.</p>"
        )
    trace, place = reading.trace, position - 1
    chosen = f"The chosen token is {token} (token {position})."
    if num_tokens > 1:
        last = f"Token {position}, {boxed(reading.tokens[position])}, is the last"
        chosen = f"The chosen character is {token}. {last} of the {num_tokens} tokens that make it."
    origin = "It was given" if position < reading.num_given else "The model wrote it"
    probability = f"its probability was <b>{trace.log_probability[0, place].exp().item():.0%}</b>"
    parts = parts_of_logit(reading, position)
    longest = max(map(abs, parts.values()))
    return (
        f"<p>{chosen} {origin}; {probability}. Its logit is <b>{trace.logit[0, place].item():+.2f}</b>, "
        'where the mean of all tokens is 0. It is the sum of these parts:</p><div class="why"><div class="parts">'
        + "".join(bar(name, value, longest) for name, value in parts.items())
        + f'</div><p class="share"><b>{trace.persistent_share[0, place].item():.0%}</b> is the persistent share: of '
        "all that memories add or take away, this much is from persistent ones.</p></div>"
    )


def recall_sentence(reading: Reading, position: int, layer: int, kind: str, head: int) -> str:
    """Return, as HTML, a sentence on what the coloured text below it shows."""
    name = f"<b>{reading.name_of(layer, kind, head, 'memory ')}</b>"
    if kind == "persistent":
        return f"<p>{name} recalls pairs that it learnt in training, and nothing of this text.</p>"
    if position == 1:
        return f"<p>{name} has nothing to recall: one token makes no pair.</p>"
    return (
        f"<p>{name} recalls what followed at the places of the text that are most like the present one. The colours "
        "are the weights.</p>"
    )


def show_unit(reading: Reading, position: int, number: int) -> tuple[str, str]:
    """Return the views of one memory: the table that it is chosen in, and the coloured text."""
    unit = listed_units(reading, position)[number]
    place = unit.layer, unit.kind, unit.head
    marks = weighted_text(reading, position, *place)
    recalled = recall_sentence(reading, position, *place) + marked_text(
        "3. See what it recalls of the text so far.", marks, dict(zip(WEIGHTS, OCHRES, strict=True))
    )
    return unit_table(reading, position, number), recalled


def show_token(reading: Reading, position: int) -> tuple[str, ...]:
    """Return the values of all views of one token, with the contextual memory that favours it most."""
    text = choosable_text(
        "1. Choose a token. The bluer it is, the likelier the model found it.",
        coloured_text(reading, position),
        COLOURS,
    )
    if position == 0:
        return text, explanation(reading, position), "", ""
    kinds = [unit.kind for unit in listed_units(reading, position)]
    return text, explanation(reading, position), *show_unit(reading, position, kinds.index("contextual"))


def choose_token(reading: Reading | None, event: gr.SelectData) -> tuple[Any, ...]:
    """Return the position of the token that a visitor chose, and the values of its views."""
    reading = check_kept(reading, *DROPPED)
    _, position = reading.pieces[place_among(event.index, len(reading.pieces))]
    return position, *show_token(reading, position)


def choose_unit(reading: Reading | None, position: int, event: gr.SelectData) -> tuple[Any, ...]:
    """Return the values of the views of the memory that a visitor chose in the table."""
    reading = check_kept(reading, *DROPPED)
    position = place_among(position, len(reading.tokens))
    return show_unit(reading, position, place_among(event.index, len(listed_units(reading, position))))


HEADING = """
<p><b>Contextual</b> memories store what followed what in the text. <b>Persistent</b> memories hold what was learnt in
training. Each memory recalls what followed in situations like the present one, and adds to the logits of the tokens
that may come next.</p>
"""


class Settings(NamedTuple):
    """The components of the left column, where a visitor asks for a text."""

    beginning: gr.Textbox
    num_tokens: gr.Slider
    temperature: gr.Slider
    seed: gr.Number
    button: gr.Button
    notice: gr.HTML
    examples: gr.Examples


class Views(NamedTuple):
    """The components of the right column, in the order of the values of `show_token`."""

    text: gr.HTML
    why: gr.HTML
    table: gr.HTML
    recalled: gr.HTML


def make_settings() -> Settings:
    beginning = gr.Textbox(
        EXAMPLES[0], label="Beginning", lines=4, max_lines=4, max_length=MOST_CHARACTERS, elem_id="beginning"
    )
    button = gr.Button("Continue the text", variant="primary", elem_id="continue")
    notice = make_announced("note", elem_classes="note")
    label = "Choose a beginning: the model continues it."
    examples = gr.Examples(EXAMPLES, beginning, label=label, elem_id="beginnings")
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        # Greedy at first: the likeliest token is the one that memories agree on.
        return Settings(
            beginning,
            gr.Slider(1, MOST_NEW_TOKENS, 24, step=1, label="New tokens at most"),
            gr.Slider(0, HIGHEST_TEMPERATURE, 0, step=0.1, label="Temperature"),
            gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1),
            button,
            notice,
            examples,
        )


def make_views() -> Views:
    return Views(
        text=make_choosable("text"),
        why=make_announced("why"),
        table=make_choosable("table"),
        recalled=make_announced("recalled", elem_classes="view"),
    )


def make_tab(page: gr.Blocks, model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill the tab. A visitor's text is held only in the state of that visitor."""
    reading, position = gr.State(time_to_live=KEPT_SECONDS), gr.State(0)
    gr.HTML(HEADING, elem_id="text-heading")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            settings = make_settings()
        with gr.Column(scale=3, min_width=320):
            views = make_views()

    def continue_text(beginning: str, num_tokens: float, temperature: float, seed: float) -> tuple[Any, ...]:
        try:
            written, notice = write(model, tokenizer, beginning, num_tokens, temperature, seed)
        except ValueError as error:
            return gr.skip(), gr.skip(), paragraph(str(error)), *[gr.skip()] * len(views)
        opening = opening_token(written)
        return written, opening, paragraph(notice), *show_token(written, opening)

    given = [settings.beginning, settings.num_tokens, settings.temperature, settings.seed]
    shown = [reading, position, settings.notice, *views]
    # The first visit shows an example at once.
    asked = [page.load, settings.button.click, settings.beginning.submit]
    gr.on(asked, continue_text, given, shown, **ONE_AT_A_TIME)
    settings.examples.load_input_event.then(continue_text, given, shown, api_visibility="private", **ONE_AT_A_TIME)
    views.text.select(choose_token, reading, [position, *views])
    views.table.select(choose_unit, [reading, position], [views.table, views.recalled])

# SPDX-License-Identifier: Apache-2.0
"""Texts whose tokens are marked by colours, and views whose parts a visitor chooses by mouse or keyboard.

A visitor sees characters: several tokens that make one, as of an emoji, are one piece. Where a token stands alone, its
bytes are shown as `<F0>`.
"""

import codecs
import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


# Each mark has a label, and each label a colour. The page mixes colours with white, below black letters.
GIVEN, CHOSEN = "given", "chosen"
MARKS = {GIVEN: "#dcdce0", CHOSEN: "#ff5fa2"}
OCHRES = ("#fdeed2", "#fcd391", "#f9ab3d", "#ee7410")
END = "(end)"

MOST_BYTES = 4  # of a character in UTF-8
BYTES = {sign: byte for byte, sign in bytes_to_unicode().items()}

# A visitor moves between the buttons of a view with the arrow keys, so that the view is one stop of the tab key. The
# page draws a view again for every choice: the button that is chosen now gets the focus of the one that is gone.
CHOOSE = """
const buttons = () => [...element.querySelectorAll('[data-choice]')];
let isUsed = false;
element.addEventListener('click', (event) => {
    const button = event.target.closest('[data-choice]');
    if (!button) return;
    isUsed = true;
    trigger('select', {index: Number(button.dataset.choice), value: ''});
});
element.addEventListener('keydown', (event) => {
    const all = buttons(), place = all.indexOf(event.target.closest('[data-choice]'));
    const places = {
        ArrowRight: place + 1, ArrowDown: place + 1, ArrowLeft: place - 1, ArrowUp: place - 1,
        Home: 0, End: all.length - 1,
    };
    const next = all[places[event.key]];
    if (place < 0 || !next) return;
    event.preventDefault();
    next.focus();
});
document.addEventListener('focusin', (event) => { if (!element.contains(event.target)) isUsed = false; });
watch('value', () => {
    if (isUsed && document.activeElement === document.body) {
        element.querySelector('[data-choice][aria-pressed=true]')?.focus();
    }
});
"""
# A screen reader tells what such a view says when it changes.
ANNOUNCE = "element.setAttribute('aria-live', 'polite');"


class Mark(NamedTuple):
    """A piece of a text as the page shows it.

    Args:
        text: of the piece; "\\n" ends the line.
        label: names its colour; None has no colour.
    """

    text: str
    label: str | None = None


def show_bytes(error: UnicodeError) -> tuple[str, int]:
    """Replace bytes that are no character by their names."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("show_bytes", show_bytes)


def token_names(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token alone, with bytes that are no character as `<F0>`."""
    names = []
    for signs, token in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True):
        name = str(tokenizer.decode([token]))
        if token == tokenizer.eos_token_id:
            name = END
        elif "\ufffd" in name and all(sign in BYTES for sign in signs):
            name = bytes(BYTES[sign] for sign in signs).decode(errors="show_bytes")
        names.append(name)
    return names


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, int]]:
    """Return the text of each piece and the place of its last token. Tokens that make one character are one piece."""
    found, names, begin = [], token_names(tokenizer, ids), 0
    while begin < len(ids):
        text, end = names[begin], begin + 1
        if "\ufffd" in str(tokenizer.decode(ids[begin:end])):
            for longer in range(begin + 2, min(begin + MOST_BYTES, len(ids)) + 1):
                character = str(tokenizer.decode(ids[begin:longer]))
                if "\ufffd" not in character:
                    text, end = character, longer
                    break
        found.append((text, end - 1))
        begin = end
    return found


def visible(token: str) -> str:
    """Return a token with signs for characters that cannot be seen. Its box shows a space beside letters."""
    token = token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return token if token.strip() else token.replace(" ", "␣") or "∅"


def label_of(number: float, upper_bounds: dict[str, float]) -> str:
    """Return the first label whose bound lies above the number."""
    return next(label for label, bound in upper_bounds.items() if number < bound)


def boxed(token: str) -> str:
    """Return a token as HTML, in a box that shows its spaces."""
    return f"<u>{html.escape(visible(token))}</u>"


def chosen_box(token: str) -> str:
    """Return the chosen token as HTML."""
    return f'<b class="mark chosen">{html.escape(visible(token))}</b>'


def pair_name(tokens: list[str], place: int) -> str:
    """Return, as HTML, the pair that a token completed: its place, what came before, the tokens of key and value."""
    before = html.escape("".join(visible(token) for token in tokens[max(0, place - 3) : place - 1]))
    return f"{place}: <s>{before}</s>{boxed(tokens[place - 1])} → {boxed(tokens[place])}"


def coloured(colours: dict[str, str], label: str | None) -> str:
    """Return the HTML attributes of what has a label."""
    return "" if label is None else f' style="--mark: {colours[label]}"'


def legend(colours: dict[str, str]) -> str:
    """Return, as HTML, what the colours mean."""
    items = "".join(f'<li class="mark"{coloured(colours, label)}>{html.escape(label)}</li>' for label in colours)
    return f'<ul class="legend" aria-label="Colours">{items}</ul>'


def marked_text(title: str, marks: Sequence[Mark], colours: dict[str, str]) -> str:
    """Return, as HTML, a title, a legend and a text. A screen reader hears the label behind each coloured piece."""
    shown = ""
    for text, label in marks:
        if text == "\n":
            shown += "<br>"
        elif label is None:
            shown += f'<span class="token">{html.escape(text)}</span>'
        else:
            spoken = f'<span class="spoken"> ({html.escape(label)}) </span>'
            shown += f'<mark class="token mark"{coloured(colours, label)}>{html.escape(text)}{spoken}</mark>'
    return f'<h2>{title}</h2>{legend(colours)}<p class="tokens">{shown}</p>'


def choosable_text(title: str, marks: Sequence[Mark], colours: dict[str, str]) -> str:
    """Return, as HTML, a title, a legend and a text whose pieces are buttons, numbered without the ends of lines."""
    shown, number = "", 0
    for text, label in marks:
        if text == "\n":
            shown += "<br>"
            continue
        is_chosen = label == CHOSEN
        name = html.escape(f"{text.strip()}, {label}")
        shown += (
            f'<button type="button" class="token mark{" chosen" * is_chosen}"{coloured(colours, label)} '
            f'data-choice="{number}" aria-pressed="{str(is_chosen).lower()}" aria-label="{name}" '
            f'tabindex="{0 if is_chosen else -1}">{html.escape(text)}</button>'
        )
        number += 1
    return (
        f'<h2>{title}</h2>{legend(colours)}<div class="tokens" role="group" aria-label="Tokens, to choose one">'
        f"{shown}</div>"
    )


def make_choosable(elem_id: str) -> gr.HTML:
    """Return a view whose `select` event has the number of the button that a visitor chose."""
    return gr.HTML(elem_id=elem_id, elem_classes="view", js_on_load=CHOOSE)


def make_announced(elem_id: str, **options: Any) -> gr.HTML:
    """Return a view of which a screen reader tells every change."""
    return gr.HTML(elem_id=elem_id, js_on_load=ANNOUNCE, **options)

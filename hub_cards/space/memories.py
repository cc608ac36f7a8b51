# SPDX-License-Identifier: Apache-2.0
"""The tab on memories: documents are read alone, joined in any order, asked, and forgotten one by one.

A document is read once. Its pairs are kept in the state of the visitor, by its text and the model's weights, so that
neither a tick nor another order reads it again. Logits are in nats. Tokens of a question and its answer are counted
from 0, the first of the question.
"""

import dataclasses
import html
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import gradio as gr
import torch
from transformers import PreTrainedTokenizerBase

from marked import (
    CHOSEN,
    GIVEN,
    MARKS,
    OCHRES,
    Mark,
    choosable_text,
    chosen_box,
    coloured,
    label_of,
    make_announced,
    make_choosable,
    marked_text,
    pair_name,
    pieces,
    token_names,
    visible,
)
from modeling_memory_mosaic import MemoryMosaicForCausalLM, MosaicMemory, weights_fingerprint
from modeling_memory_mosaic.store_memory_mosaic import MemoryRecall
from shared import (
    KEPT_SECONDS,
    MOST_CHARACTERS,
    NOT_FINITE,
    ONE_AT_A_TIME,
    check_kept,
    check_text,
    generation_settings,
    paragraph,
    place_among,
    tokenize_end,
)


NAMES = ("Document A", "Document B", "Document C")
# What the question and the answer so far add themselves.
OWN = "question and answer"
ORDERS = list(itertools.permutations(NAMES))
MOST_QUESTIONS = 4
MOST_ANSWER_TOKENS = 24
STRONGEST_PLACES = 5

# Documents and questions by the name of the example. A model of `make demo` is trained on such ones.
EXAMPLES = {
    "Anna, Tom and Lucy": (
        "Anna has the blue book at the farm. The blue book belongs to Anna.",
        "The black kite belongs to Tom. Tom has the black kite at the beach.",
        "Lucy has the green apple in the field. The green apple belongs to Lucy.",
        "Who has the blue book?\nWhere is the black kite?\nWho has the green apple?",
    ),
    "Max, Lucy and Mia": (
        "Max has the black cake in the field. The black cake belongs to Max.",
        "The blue ball belongs to Lucy. Lucy has the blue ball at the lake.",
        "Mia has the red doll at the farm. The red doll belongs to Mia.",
        "What does Max have?\nWho has the blue ball?\nWhere is the red doll?",
    ),
    "Tom and Sam": (
        "Tom has the black drum in the garden. The black drum belongs to Tom.",
        "The red cup belongs to Sam. Sam has the red cup at the beach.",
        "",
        "What colour is the drum that Tom has?\nWho has the red cup?\nWhere is the red cup?",
    ),
}

COLOURS = dict(zip((*NAMES, OWN), ("#2f86d9", "#ee7410", "#1a9e77", "#c9b3ec"), strict=True))
AGAINST = "below -0.1"
NATS = {"0.1 to 0.5": 0.5, "0.5 to 1": 1.0, "1 to 2": 2.0, "over 2": math.inf}
ANSWER_COLOURS = {GIVEN: MARKS[GIVEN], **COLOURS, CHOSEN: MARKS[CHOSEN]}
PLACE_COLOURS = {AGAINST: "#9aa5b1", **dict(zip(NATS, OCHRES, strict=True))}


@dataclasses.dataclass
class Document:
    """A document that was read alone.

    Args:
        key: the weights that read it, and its text.
        memory: its pairs.
        tokens: its tokens, each by its name.
        pieces: its text as the page shows it, and the place of the last token of each piece.
        notice: for the visitor, if it was cut.
    """

    key: tuple[bytes, str]
    memory: MosaicMemory
    tokens: list[str]
    pieces: list[tuple[str, int]]
    notice: str


@dataclasses.dataclass
class Answer:
    """A question that was answered, with the reasons.

    Args:
        question: its text.
        text: of the answer.
        ids: of question and answer, `(1, T)`.
        tokens: the T tokens, each by its name.
        pieces: question and answer as the page shows them, and the place of the last token of each piece.
        num_given: how many are of the question.
        recall: from where each token came.
    """

    question: str
    text: str
    ids: torch.Tensor
    tokens: list[str]
    pieces: list[tuple[str, int]]
    num_given: int
    recall: MemoryRecall


@dataclasses.dataclass
class Visit:
    """What the page keeps of a visitor.

    Args:
        documents: all that were read, by name, also those that are forgotten now.
        order: in which they were joined.
        kept: names of those that answered.
        answers: one for each question.
        read: names of the documents that were read for these answers; the others had been read before.
        seconds: for reading them, and for answering all questions.
    """

    documents: dict[str, Document]
    order: tuple[str, ...]
    kept: list[str]
    answers: list[Answer]
    read: list[str]
    seconds: tuple[float, float]


def check_questions(questions: Any) -> list[str]:
    """Return the questions of a text, one a line; `ValueError` if there are none or too many."""
    check_text(questions, "The list of questions", f"write one, such as: {EXAMPLES['Tom and Sam'][3].splitlines()[1]}")
    if len(questions) > MOST_CHARACTERS:
        raise ValueError(f"The questions have {len(questions):,} characters: write at most {MOST_CHARACTERS:,}.")
    lines = list(dict.fromkeys(line.strip() for line in questions.splitlines() if line.strip()))
    if len(lines) > MOST_QUESTIONS:
        raise ValueError(f"There are {len(lines)} questions: ask at most {MOST_QUESTIONS}, each on a line of its own.")
    return lines


def read_document(
    model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, key: tuple[bytes, str]
) -> Document:
    """Let the model read the text of a key alone, or the end of a long one."""
    check_text(key[1], name, "write a sentence.")
    ids, notice = tokenize_end(tokenizer, key[1], name)
    if ids.shape[1] < 2:
        raise ValueError(f"{name} has one token, which makes no pair: write a sentence.")
    memory = cast(MosaicMemory, model.memorize(ids, source=name, tokenizer=tokenizer))
    read = ids[0].tolist()
    return Document(key, memory, token_names(tokenizer, read), pieces(tokenizer, read), notice)


def read_documents(
    model: MemoryMosaicForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: bytes,
    texts: Sequence[Any],
    known: dict[str, Document],
) -> tuple[dict[str, Document], list[str]]:
    """Return the documents by name, and the names of those that were not known and have been read now."""
    documents, read = {}, []
    for name, text in zip(NAMES, texts, strict=True):
        if isinstance(text, str) and not text.strip():
            continue
        key = fingerprint, text
        if name in known and known[name].key == key:
            documents[name] = known[name]
        else:
            documents[name] = read_document(model, tokenizer, name, key)
            read.append(name)
    if not documents:
        raise ValueError("All documents are empty: write a sentence into one of them.")
    return documents, read


def join(documents: dict[str, Document], order: Sequence[str], kept: Sequence[str]) -> MosaicMemory:
    """Return the memory of all documents, joined in an order, without those that are not kept."""
    memory = MosaicMemory.union([documents[name].memory for name in order if name in documents])
    return memory.select(kept)


def answer_question(
    model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase, memory: MosaicMemory, question: str
) -> tuple[Answer, str]:
    """Return the likeliest answer with the reasons, and a notice if the question was cut."""
    ids, notice = tokenize_end(tokenizer, question, "A question")
    settings = generation_settings(model, tokenizer, MOST_ANSWER_TOKENS, 0)
    output = model.generate(**memory.prompt(ids), generation_config=settings)
    recall = memory.explain(model, output)
    if not recall.contribution.isfinite().all():
        raise ValueError(NOT_FINITE)
    written = output[0, ids.shape[1] :].tolist()
    text = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
    num_given, all_ids = ids.shape[1], output[0].tolist()
    tokens = token_names(tokenizer, all_ids)
    # A character belongs to the question or to the answer.
    shown = pieces(tokenizer, all_ids[:num_given])
    shown += [(piece, num_given + place) for piece, place in pieces(tokenizer, written)]
    return Answer(question, text, output, tokens, shown, num_given, recall), notice


def answer_all(
    model: MemoryMosaicForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    before: Visit | None,
    order: Sequence[str],
    texts: Sequence[Any],
    ticks: Sequence[Any],
    questions: Any,
) -> tuple[Visit, list[str]]:
    """Read the documents that are new, and answer all questions from those whose box is ticked.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        before: what was kept of the visitor.
        order: of joining, all of `NAMES`.
        texts: of the documents; an empty one is no document.
        ticks: for each document, whether it is remembered.
        questions: one a line.

    Returns:
        The visit, and notices for the visitor.

    Raises:
        ValueError: there is no document or no question, one of them cannot be read, there are too many questions, or
            the model computes numbers that are not finite.
    """
    if not all(isinstance(tick, bool) for tick in ticks):
        raise ValueError("A box is ticked or it is not: give true or false for each document.")
    # The fingerprint is a sum over all weights: its time is none of reading.
    lines, fingerprint, start = check_questions(questions), weights_fingerprint(model), time.perf_counter()
    documents, read = read_documents(model, tokenizer, fingerprint, texts, before.documents if before else {})
    reading = time.perf_counter() - start
    kept = [name for name, tick in zip(NAMES, ticks, strict=True) if tick and name in documents]
    memory, start = join(documents, order, kept), time.perf_counter()
    answered = [answer_question(model, tokenizer, memory, line) for line in lines]
    seconds = reading, time.perf_counter() - start
    notices = [document.notice for document in documents.values()] + [notice for _, notice in answered]
    visit = Visit(documents, tuple(order), kept, [answer for answer, _ in answered], read, seconds)
    return visit, [notice for notice in dict.fromkeys(notices) if notice]


def joined_order(visit: Visit) -> list[str]:
    """Return the names of the documents that answered, in the order in which they were joined."""
    return [name for name in visit.order if name in visit.kept]


def is_reordered(one: Visit, other: Visit) -> bool:
    """Whether the same documents answered in both visits, the second before the first, in different orders."""
    is_same = not one.read and set(one.kept) == set(other.kept)
    return is_same and joined_order(one) != joined_order(other)


@torch.no_grad()
def largest_difference(model: MemoryMosaicForCausalLM, one: Visit, other: Visit) -> float:
    """Return the largest difference of a logit between the orders of two visits, at the texts of the first."""
    memories = [join(visit.documents, visit.order, visit.kept) for visit in (one, other)]
    differences = []
    for answer in one.answers:
        first, second = (model(**memory.prompt(answer.ids)).logits for memory in memories)
        differences.append((first - second).abs().max().item())
    return max(differences)


# What the page says and shows of a visit


def letters(names: Sequence[str]) -> str:
    """Return the letters of some documents, in their order."""
    return ", ".join(name[-1] for name in names)


def counted(number: int, name: str) -> str:
    return f"{number} {name}" + "s" * (number != 1)


def sentence_on_seconds(visit: Visit) -> str:
    """Return, as HTML, what was read, and how long reading and answering took."""
    reading, answering = visit.seconds
    num_tokens = sum(len(visit.documents[name].tokens) for name in visit.read)
    what = f"Read {letters(visit.read)} ({num_tokens} tokens), each alone, in <b>{reading:.3f} s</b>."
    if not visit.read:
        what = "Read no document again: the page keeps what the model has read."
    return f"<p>{what} Answered {counted(len(visit.answers), 'question')} in <b>{answering:.3f} s</b>.</p>"


def sentence_on_forgotten(visit: Visit) -> str:
    """Return, as HTML, which documents are forgotten, or nothing."""
    forgotten = [name for name in visit.documents if name not in visit.kept]
    if not forgotten:
        return ""
    answers = "The answers are those of a model that never read " + ("it" if len(forgotten) == 1 else "them")
    return f"<p><b>Forgotten: {letters(forgotten)}.</b> {answers}.</p>"


def sentence_on_changes(visit: Visit, before: Visit | None) -> str:
    """Return, as HTML, which answers are others than before, or nothing if none was asked before."""
    earlier = {answer.question: answer.text for answer in before.answers} if before else {}
    again = [answer for answer in visit.answers if answer.question in earlier]
    changed = [answer for answer in again if answer.text != earlier[answer.question]]
    if not again:
        return ""
    changes = "".join(
        f"; to <q>{html.escape(answer.question)}</q> it was <i>{html.escape(earlier[answer.question])}</i>, now "
        f"<i>{html.escape(answer.text)}</i>"
        for answer in changed
    )
    stayed = f"{len(again) - len(changed)} of {counted(len(again), 'answer')} stayed the same"
    return f"<p>{stayed}{changes or '.'}</p>"


def sentence_on_order(visit: Visit, before: Visit | None, difference: float | None) -> str:
    """Return, as HTML, in which order documents were joined, and what another order changed."""
    if len(visit.kept) < 2:
        return ""
    order = f"<p>Joined in the order <b>{letters(joined_order(visit))}</b>."
    if before is None or difference is None:
        return f"{order} Another order changes nothing: pairs have no positions. Try <i>Other order</i>.</p>"
    return (
        f"{order} In the order {letters(joined_order(before))} no logit of the {len(visit.answers)} texts differs by "
        f"more than <b>{difference:.1e}</b>, which is rounding: the order of documents changes nothing.</p>"
    )


def report(visit: Visit, before: Visit | None, difference: float | None) -> str:
    """Return, as HTML, what was read, joined and forgotten for the answers, and which of them changed."""
    return (
        sentence_on_seconds(visit)
        + sentence_on_forgotten(visit)
        + sentence_on_changes(visit, before)
        + sentence_on_order(visit, before, difference)
    )


def parts_of_token(answer: Answer, position: int) -> dict[str, float]:
    """Return what each document, and last question and answer, adds to the logit of a token."""
    return dict(zip((*answer.recall.sources, OWN), answer.recall.by_source()[position - 1].tolist(), strict=True))


def coloured_answers(visit: Visit, number: int, position: int) -> list[Mark]:
    """Return the pieces of all questions and answers, labelled by what adds most; one of them is chosen.

    The label of a character of several tokens is that of the last one.
    """
    marks = []
    for place, answer in enumerate(visit.answers):
        begin = 0
        for text, last in answer.pieces:
            label = GIVEN
            if place == number and begin <= position <= last:
                label = CHOSEN
            elif last >= answer.num_given:
                parts = parts_of_token(answer, last)
                label = max(parts, key=lambda name: parts[name])
            marks.append(Mark(visible(text), label))
            begin = last + 1
        marks.append(Mark("\n"))
    return marks


def place_of(visit: Visit, index: Any) -> tuple[int, int]:
    """Return the number of the answer and the token of a piece, counted over all questions and answers."""
    places = [(number, last) for number, answer in enumerate(visit.answers) for _, last in answer.pieces]
    return places[place_among(index, len(places))]


def token_table(visit: Visit, number: int, position: int) -> str:
    """Return, as an HTML table, what each document adds to each token of an answer."""
    answer, names = visit.answers[number], [*visit.documents, OWN]
    head = "".join(f'<th scope="col">{name.replace("Document ", "")}</th>' for name in names)
    rows = ""
    for token in range(answer.num_given, len(answer.tokens)):
        parts = parts_of_token(answer, token)
        most = max(parts, key=lambda name: parts[name])
        row = ""
        for name in names:
            value = f"{parts[name]:+.2f}" if name in parts else "forgotten"
            style = f' class="most mark"{coloured(COLOURS, name)}' if name == most else ""
            row += f"<td{style}>{value}</td>"
        shown = html.escape(visible(answer.tokens[token]))
        shown = chosen_box(answer.tokens[token]) if token == position else f"<span>{shown}</span>"
        rows += f'<tr><th scope="row">{shown}</th>{row}</tr>'
    caption = f"Nats that each document adds to each token of the answer to <q>{html.escape(answer.question)}</q>"
    head = f'<thead><tr><th scope="col">Token</th>{head}</tr></thead>'
    return f"<table><caption>{caption}</caption>{head}<tbody>{rows}</tbody></table>"


def strongest_places(visit: Visit, number: int, position: int) -> str:
    """Return, as an HTML list, the pairs that add most to the logit of a token."""
    answer = visit.answers[number]
    token = chosen_box(answer.tokens[position])
    if position == 0:
        return f"<p>{token} is the first token of a question. Nothing predicted it: choose another.</p>"
    rows = ""
    for name, place, value in answer.recall.strongest(position, STRONGEST_PLACES):
        # The first place of a text has no pair.
        if place and value >= 0.005:
            tokens = answer.tokens if name is None else visit.documents[name].tokens
            rows += f'<li class="pair"><b>{value:+.2f}</b> {name or OWN}, {pair_name(tokens, place)}</li>'
    if not rows:
        return f"<p>No pair adds to {token}: it comes from what was learnt in training.</p>"
    return f"<p>The pairs that add most to {token}, in nats:</p><ol>{rows}</ol>"


def weighted_pieces(shown: Sequence[tuple[str, int]], numbers: Sequence[float]) -> list[Mark]:
    """Return pieces, labelled by the nats of the pairs that their tokens completed."""
    marks, begin = [], 0
    for text, place in shown:
        number = sum(numbers[begin : place + 1])
        label = label_of(number, NATS) if number >= 0.1 else AGAINST if number <= -0.1 else None
        marks += [Mark(visible(text), label), *[Mark("\n")] * text.count("\n")]
        begin = place + 1
    return marks


def coloured_documents(visit: Visit, number: int, position: int) -> list[Mark]:
    """Return the documents, then question and answer, labelled by what their pairs add to the logit of a token."""
    if position == 0:
        return []
    answer = visit.answers[number]
    recall, marks = answer.recall, []
    numbers = recall.contribution[position - 1]
    for name in visit.documents:
        if name in recall.sources:
            is_of_document = recall.source_ids == recall.sources.index(name)
            joined = numbers[: len(is_of_document)][is_of_document].tolist()
            marks += [Mark(f"{name}: "), *weighted_pieces(visit.documents[name].pieces, joined), Mark("\n")]
    own = numbers[len(recall.source_ids) :][:position].tolist()
    shown = [(text, place) for text, place in answer.pieces if place < position]
    # Of a character that is not complete there are bytes.
    shown += [(answer.tokens[place], place) for place in range(shown[-1][1] + 1 if shown else 0, position)]
    return [*marks, Mark(f"{OWN.capitalize()}: "), *weighted_pieces(shown, own)]


def show_token(visit: Visit, number: int, position: int) -> tuple[str, ...]:
    """Return the values of all views of a token, in the order of `Views` without the report."""
    chosen = visit, number, position
    answers = choosable_text(
        "1. Choose a token. Its colour tells what adds most to its logit.", coloured_answers(*chosen), ANSWER_COLOURS
    )
    documents = marked_text(
        "2. See which places of the documents add to the chosen token, in nats.",
        coloured_documents(*chosen),
        PLACE_COLOURS,
    )
    return answers, token_table(*chosen), strongest_places(*chosen), documents


def choose_word(visit: Visit | None, event: gr.SelectData) -> tuple[Any, ...]:
    """Return the values of the views of the token that a visitor chose."""
    visit = check_kept(visit, "These documents were", "ask again.")
    return show_token(visit, *place_of(visit, event.index))


HEADING = """
<p>The model reads each document <b>alone</b> and once. What it has read is a set of pairs without positions. The page
joins the sets in any order and answers the questions from them. Untick a document, and the model <b>forgets</b> it:
answers from this document go, and the others stay. Only a model that was trained on such questions answers them; even
then it makes mistakes. <code>make demo</code> trains a small one.</p>
"""


class Inputs(NamedTuple):
    """The components of the left column."""

    texts: list[gr.Textbox]
    ticks: list[gr.Checkbox]
    questions: gr.Textbox
    button: gr.Button
    other_order: gr.Button
    notice: gr.HTML
    examples: gr.Examples


class Views(NamedTuple):
    """The components of the right column."""

    report: gr.HTML
    answers: gr.HTML
    table: gr.HTML
    places: gr.HTML
    documents: gr.HTML


def make_buttons() -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return (
            gr.Button("Answer", variant="primary", min_width=120, elem_id="ask"),
            gr.Button("Other order", min_width=120, elem_id="other-order"),
        )


def make_inputs() -> Inputs:
    *first, questions = next(iter(EXAMPLES.values()))
    texts, ticks = [], []
    for name, text in zip(NAMES, first, strict=True):
        with gr.Group(elem_classes=name.replace(" ", "-")):
            texts.append(gr.Textbox(text, label=name, lines=1, max_lines=3, max_length=MOST_CHARACTERS))
            ticks.append(gr.Checkbox(True, label=f"{name} is remembered"))
    asked = gr.Textbox(
        questions,
        label=f"Questions, one a line, {MOST_QUESTIONS} at most",
        lines=3,
        max_lines=4,
        max_length=MOST_CHARACTERS,
        elem_id="questions",
    )
    button, other_order = make_buttons()
    notice = make_announced("memory-note", elem_classes="note")
    # The names of the examples are shown: the columns of their texts would be too wide.
    examples = gr.Examples(
        [list(example) for example in EXAMPLES.values()],
        [*texts, asked],
        label="Choose documents: the model reads them and answers.",
        example_labels=list(EXAMPLES),
        elem_id="document-sets",
    )
    return Inputs(texts, ticks, asked, button, other_order, notice, examples)


def make_views() -> Views:
    return Views(
        report=make_announced("report"),
        answers=make_choosable("answers"),
        table=gr.HTML(elem_id="sources"),
        places=make_announced("strongest"),
        documents=gr.HTML(elem_id="documents", elem_classes="view"),
    )


def order_after(number: int, names: Sequence[str]) -> int:
    """Return the number of the next order that joins some documents in another one, if there is one."""

    def joined(number: int) -> list[str]:
        return [name for name in ORDERS[number] if name in names]

    following = [(number + step) % len(ORDERS) for step in range(len(ORDERS))]
    return next((other for other in following if joined(other) != joined(number)), number)


def asker(
    model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase, is_other_order: bool
) -> Callable[..., tuple]:
    """Return the function that answers, with the documents in the present order or in another one."""

    def ask(visit: Visit | None, order: int, *values: Any) -> tuple[Any, ...]:
        num = len(NAMES)
        texts, ticks, questions = values[:num], values[num : 2 * num], values[2 * num]
        if is_other_order:
            inputs = zip(NAMES, texts, ticks, strict=True)
            order = order_after(order, [name for name, text, tick in inputs if tick and str(text).strip()])
        try:
            now, notices = answer_all(model, tokenizer, visit, ORDERS[order], texts, ticks, questions)
        except ValueError as error:
            return *[gr.skip()] * 2, paragraph(str(error)), *[gr.skip()] * len(Views._fields)
        difference = None
        if visit is not None and is_reordered(now, visit):
            difference = largest_difference(model, now, visit)
        shown = show_token(now, 0, now.answers[0].num_given)
        return now, order, "".join(map(paragraph, notices)), report(now, visit, difference), *shown

    return ask


def make_tab(tab: gr.Tab, model: MemoryMosaicForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill the tab. What was read of a visitor's documents is held only in the state of that visitor."""
    visit, order = gr.State(time_to_live=KEPT_SECONDS), gr.State(0)
    gr.HTML(HEADING, elem_id="memories-heading")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            inputs = make_inputs()
        with gr.Column(scale=3, min_width=320):
            views = make_views()
    ask, ask_in_other_order = (asker(model, tokenizer, is_other) for is_other in (False, True))

    def first_visit(visit: Visit | None, *values: Any) -> tuple[Any, ...]:
        if visit is not None:
            return tuple(gr.skip() for _ in shown)
        return ask(visit, *values)

    given = [visit, order, *inputs.texts, *inputs.ticks, inputs.questions]
    shown = [visit, order, inputs.notice, *views]
    ticked = [tick.input for tick in inputs.ticks]
    asked = [inputs.button.click, inputs.questions.submit, *ticked]
    gr.on(asked, ask, given, shown, api_name="ask", **ONE_AT_A_TIME)
    gr.on([inputs.other_order.click], ask_in_other_order, given, shown, api_name="ask_in_other_order", **ONE_AT_A_TIME)
    examples = inputs.examples.load_input_event
    # A visitor who chooses other documents wants answers from all of them.
    everything = examples.then(lambda: [True] * len(NAMES), None, inputs.ticks, api_visibility="private")
    everything.then(ask, given, shown, api_visibility="private", **ONE_AT_A_TIME)
    gr.on([tab.select], first_visit, given, shown, api_visibility="private", **ONE_AT_A_TIME)
    views.answers.select(choose_word, visit, list(views[1:]))

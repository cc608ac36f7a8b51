# SPDX-License-Identifier: Apache-2.0
"""The tab on memories reads a document once, answers from those that are remembered, and shows from which one."""

import copy
import html
import itertools
import re
from types import SimpleNamespace

import gradio
import gradio_client
import pytest
import torch
from helpers.space import Visitor, low_contrast, make_parts, nameless, outside
from selenium.webdriver.common.keys import Keys

import marked
import memories
import shared
from hub_cards.space.screenshot import browse, find, look_at, open_tab, requested
from modeling_memory_mosaic import MosaicMemory
from training.text.fact_writer import COLOURS, FACTS, NAMES, NOUNS, QUESTIONS
from training.text.story_writer import PLACES


TEXTS = ("Once upon a time there was a cat.", "The cat saw a <b>ball</b> & a dog.", "One day, the dog saw the end.")
ASKED = "Who saw a ball?\nThere was a"
ALL = (True, True, True)


def ask(parts, before=None, texts=TEXTS, ticks=ALL, questions=ASKED, order=memories.NAMES):
    return memories.answer_all(*parts, before, order, texts, ticks, questions)[0]


@pytest.fixture(scope="module")
def visit(parts):
    return ask(parts)


@pytest.fixture
def reads(parts, monkeypatch):
    """Names of the documents that the model reads."""
    model, read = parts[0], []
    memorize = model.memorize

    def counting(*args, **kwargs):
        read.append(kwargs["source"])
        return memorize(*args, **kwargs)

    monkeypatch.setattr(model, "memorize", counting)
    return read


def assert_same_answers(visit, other):
    for one, two in zip(visit.answers, other.answers, strict=True):
        assert one.tokens == two.tokens and torch.equal(one.recall.contribution, two.recall.contribution)


def test_answers_and_their_parts_are_those_of_the_joined_memory(parts, visit):
    model, tokenizer = parts
    read = [
        model.memorize(tokenizer(text, return_tensors="pt").input_ids, source=name, tokenizer=tokenizer)
        for name, text in zip(memories.NAMES, TEXTS, strict=True)
    ]
    memory = MosaicMemory.union(read)
    for question, answer in zip(ASKED.split("\n"), visit.answers, strict=True):
        output = model.generate(**memory.prompt(question, tokenizer), max_new_tokens=24, do_sample=False)
        assert torch.equal(answer.ids, output) and "".join(answer.tokens[: answer.num_given]) == question
        assert answer.text == tokenizer.decode(output[0, answer.num_given :], skip_special_tokens=True).strip()
        sums = memory.explain(model, output).by_source()
        for position in range(1, len(answer.tokens)):
            parts_of_token = memories.parts_of_token(answer, position)
            assert list(parts_of_token) == [*memories.NAMES, memories.OWN]
            assert list(parts_of_token.values()) == sums[position - 1].tolist()


def test_a_document_is_read_once(parts, reads):
    first = ask(parts)
    assert reads == first.read == list(memories.NAMES)
    again = ask(parts, first, ticks=(False, True, True), questions="A dog", order=memories.NAMES[::-1])
    assert reads == first.read and again.read == []
    assert all(again.documents[name] is first.documents[name] for name in memories.NAMES)
    changed = ask(parts, again, texts=(*TEXTS[:2], "The end."))
    assert reads[3:] == changed.read == ["Document C"]
    # A text that stood elsewhere has another name.
    assert ask(parts, changed, texts=(TEXTS[1], TEXTS[0], "")).read == ["Document A", "Document B"]


def test_another_model_reads_the_documents_again(parts, visit):
    model, tokenizer = copy.deepcopy(parts[0]), parts[1]
    assert ask((model, tokenizer), visit).read == []  # the same weights
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert ask((model, tokenizer), visit).read == list(memories.NAMES)


def test_a_forgotten_document_is_as_if_it_had_never_been_read(parts, visit):
    for name, ticks in zip(memories.NAMES, itertools.product((True, False), repeat=3), strict=False):
        forgetful = ask(parts, visit, ticks=ticks)
        never = ask(parts, texts=[text if tick else "" for text, tick in zip(TEXTS, ticks, strict=True)])
        assert forgetful.kept == list(never.documents) and name in forgetful.documents
        assert_same_answers(forgetful, never)
    assert_same_answers(ask(parts, ask(parts, visit, ticks=(False, True, True))), visit)


def test_a_model_with_all_documents_forgotten_has_the_question_alone(parts, visit):
    model, tokenizer = parts
    alone = ask(parts, visit, ticks=(False, False, False))
    for answer in alone.answers:
        ids = answer.ids[:, : answer.num_given]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert torch.equal(answer.ids, expected) and list(memories.parts_of_token(answer, 2)) == [memories.OWN]
    shown = memories.report(alone, visit, None)
    assert "<b>Forgotten: A, B, C.</b> The answers are those of a model that never read them." in shown
    assert "Joined" not in shown
    assert memories.token_table(alone, 0, 5).count("<td>forgotten</td>") == 3 * (
        len(alone.answers[0].tokens) - alone.answers[0].num_given
    )


def test_the_order_of_documents_changes_no_answer(parts, visit):
    for order in memories.ORDERS:
        other = ask(parts, visit, order=order)
        assert other.answers[0].recall.sources == list(order) and other.read == []
        for one, two in zip(visit.answers, other.answers, strict=True):
            assert one.tokens == two.tokens
            for position in range(1, len(one.tokens)):
                expected = memories.parts_of_token(one, position)
                assert memories.parts_of_token(two, position) == pytest.approx(expected, abs=1e-5)
        assert memories.largest_difference(parts[0], visit, other) < 1e-4
    # It is measured: another set of documents does change logits.
    assert memories.largest_difference(parts[0], visit, ask(parts, visit, ticks=(False, True, True))) > 1e-4


def test_another_order_differs_and_all_come_up():
    for names in (memories.NAMES, memories.NAMES[1:], memories.NAMES[::2]):
        number, seen = 0, []
        for _ in memories.ORDERS:
            seen.append([name for name in memories.ORDERS[number] if name in names])
            number = memories.order_after(number, names)
        assert all(one != two for one, two in itertools.pairwise(seen))
        assert {tuple(order) for order in seen} == set(itertools.permutations(names))
    assert memories.order_after(3, memories.NAMES[:1]) == 3


def test_the_report_states_times_changes_and_the_order(parts, visit):
    first = memories.report(visit, None, None)
    assert re.search(
        r"Read A, B, C \(\d+ tokens\), each alone, in <b>\d+\.\d{3} s</b>\. Answered 2 questions in", first
    )
    assert "Joined in the order <b>A, B, C</b>. Another order changes nothing" in first and "stayed" not in first
    without = ask(parts, visit, ticks=(False, True, True))
    without.answers[1].text = "a <dog>"
    shown = memories.report(without, visit, None)
    assert "Read no document again" in shown and "<b>Forgotten: A.</b>" in shown
    assert "never read it." in shown and "<b>B, C</b>" in shown
    assert re.search(r"[01] of 2 answers stayed the same; to <q>", shown)
    assert (
        f"to <q>There was a</q> it was <i>{html.escape(visit.answers[1].text)}</i>, now <i>a &lt;dog&gt;</i>" in shown
    )
    turned = ask(parts, visit, order=memories.ORDERS[-1])
    shown = memories.report(turned, visit, 1.5e-6)
    assert "2 of 2 answers stayed the same.</p>" in shown and "Joined in the order <b>C, B, A</b>" in shown
    assert (
        "In the order A, B, C no logit of the 2 texts differs by more than <b>1.5e-06</b>, which is rounding" in shown
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"texts": ("", " \n", "")}, "All documents are empty: write a sentence"),
        ({"texts": (None, "", "")}, "Document A is empty: write a sentence"),
        ({"texts": ("", 5, "")}, "Document B is empty: write a sentence"),
        ({"texts": ("", "", "a \ud800 b")}, "Document C has half a character"),
        ({"texts": ("a", "", "")}, "Document A has one token, which makes no pair"),
        ({"ticks": (True, None, True)}, "A box is ticked or it is not"),
        ({"ticks": (True, "no", True)}, "A box is ticked or it is not"),
        ({"questions": " \n"}, "The list of questions is empty: write one, such as: Who has the red cup"),
        ({"questions": None}, "The list of questions is empty"),
        ({"questions": "a \ud800 b"}, "The list of questions has half a character"),
        ({"questions": "a\nb\nc\nd\n\ne"}, "There are 5 questions: ask at most 4"),
        ({"questions": "a" * 10_001}, "The questions have 10,001 characters: write at most 10,000"),
    ],
)
def test_values_out_of_bounds_are_refused(parts, values, message):
    with pytest.raises(ValueError, match=message):
        ask(parts, **values)


def test_only_the_end_of_a_long_text_is_read_with_a_notice(parts):
    text = "a cat. " * 200
    num_tokens = len(parts[1](text).input_ids)
    long, notices = memories.answer_all(*parts, None, memories.NAMES, (text, "", TEXTS[1]), ALL, text.strip())
    assert len(long.documents["Document A"].tokens) == long.answers[0].num_given == shared.MOST_GIVEN_TOKENS
    read = f"has {num_tokens} tokens; the model read the last 128 of them."
    assert notices[0] == f"Document A {read}" and notices[1].startswith("A question has")
    # The notice stays as long as the document does.
    assert memories.answer_all(*parts, long, memories.NAMES, (text, "", ""), ALL, "a cat")[1] == [f"Document A {read}"]
    longer = ask(parts, texts=("a cat. " * 500_000, "", ""))
    assert longer.documents["Document A"].notice.startswith("Document A has 3,500,000 characters")
    assert all(len(answer.tokens) - answer.num_given <= memories.MOST_ANSWER_TOKENS for answer in long.answers)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite_give_no_answer(number, name):
    model, tokenizer = make_parts()
    with torch.no_grad():
        model.get_parameter(name)[..., 3] = number
    with pytest.raises(ValueError, match="is not finite: its weights are damaged"):
        ask((model, tokenizer))


def test_colours_name_what_adds_most(visit):
    chosen = visit.answers[1].num_given
    marks = [mark for mark in memories.coloured_answers(visit, 1, chosen) if mark.text != "\n"]
    places = [memories.place_of(visit, index) for index in range(len(marks))]
    assert [label for _, label in marks].count(marked.CHOSEN) == 1
    for (text, label), (number, position) in zip(marks, places, strict=True):
        answer = visit.answers[number]
        piece = next(piece for piece, place in answer.pieces if place == position)
        assert text == marked.visible(piece)
        if number == 1 and text and label == marked.CHOSEN:
            assert position >= chosen
        elif position < answer.num_given:
            assert label == marked.GIVEN
        else:
            parts = memories.parts_of_token(answer, position)
            assert parts[label] == max(parts.values()) and label in memories.COLOURS


def test_a_character_of_several_tokens_is_one_piece_of_question_answer_and_documents(parts):
    visit = ask(parts, texts=("the cat 🤗", "日本 cat", ""), questions="the 🤗 cat")
    answer = visit.answers[0]
    assert "🤗" in [mark.text for mark in memories.coloured_answers(visit, 0, 0)]
    shown = [mark.text for mark in memories.coloured_documents(visit, 0, answer.num_given)]
    assert {"🤗", "日", "本"} <= set(shown) and not any("\ufffd" in text for text in shown)
    # Of a character that is chosen in its middle, the bytes before it are shown.
    middle = next(place for text, place in answer.pieces if text == "🤗") - 1
    assert memories.coloured_documents(visit, 0, middle)[-1].text == "<9F>"
    assert "<9F>" in answer.tokens and "&lt;F0&gt;" in memories.strongest_places(visit, 0, middle - 2) + marked.boxed(
        answer.tokens[middle - 2]
    )


def test_the_table_has_the_nats_of_each_document(visit):
    answer = visit.answers[0]
    table = memories.token_table(visit, 0, answer.num_given)
    cells = [float(cell) for cell in re.findall(r"<td[^>]*>([-+]\d+\.\d\d)</td>", table)]
    expected = answer.recall.by_source()[answer.num_given - 1 :].flatten().tolist()
    assert cells == pytest.approx(expected, abs=0.006)
    assert table.count('class="most mark"') == len(answer.tokens) - answer.num_given and table.count(" chosen") == 1
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["Token", "A", "B", "C", memories.OWN]


def test_the_strongest_places_are_pairs_of_their_texts(visit):
    answer, position = visit.answers[0], 6
    rows = re.findall(r"<li.*?</li>", memories.strongest_places(visit, 0, position))
    strongest = answer.recall.strongest(position, memories.STRONGEST_PLACES)
    strongest = [row for row in strongest if row[1] and row[2] >= 0.005]
    assert rows and len(rows) == len(strongest)
    for row, (name, place, value) in zip(rows, strongest, strict=True):
        tokens = visit.documents[name].tokens if name else answer.tokens
        pair = " → ".join(map(marked.boxed, tokens[place - 1 : place + 1]))
        assert f"<b>{value:+.2f}</b> {name or memories.OWN}, {place}: " in row and row.endswith(f"{pair}</li>")
    assert "Nothing predicted it: choose another" in memories.strongest_places(visit, 0, 0)
    assert memories.coloured_documents(visit, 0, 0) == []


def test_documents_are_coloured_by_what_their_pairs_add(parts, visit):
    without = ask(parts, visit, ticks=(True, False, True), order=memories.ORDERS[-1])
    answer, position = without.answers[0], without.answers[0].num_given
    entries = memories.coloured_documents(without, 0, position)
    text = "".join(token for token, _ in entries).replace("␣", " ")
    assert text == f"Document A: {TEXTS[0]}\nDocument C: {TEXTS[2]}\nQuestion and answer: Who saw a ball?"
    document = without.documents["Document A"]
    place = entries.index(("Document A: ", None)) + 4
    slots = (answer.recall.source_ids == answer.recall.sources.index("Document A")) & (answer.recall.places == 3)
    number = answer.recall.contribution[position - 1][: len(slots)][slots].item()
    assert document.pieces[3] == (document.tokens[3], 3)
    assert entries[place] == memories.weighted_pieces([(document.tokens[3], 0)], [number])[0]
    shown = [(letter, number) for number, letter in enumerate("abcdef")]
    labels = [label for _, label in memories.weighted_pieces(shown, [-0.2, 0.05, 0.1, 0.5, 1.0, 9.0])]
    assert labels == [memories.AGAINST, None, *memories.NATS]
    # A character has what all its tokens have.
    assert memories.weighted_pieces([("é", 1)], [0.3, 0.4]) == [("é", "0.5 to 1")]


def test_documents_and_questions_are_escaped(parts):
    visit = ask(parts, texts=("<i>a</i> & b<u>", "", ""), questions="<i>a</i> &")
    for position in range(len(visit.answers[0].tokens)):
        page = "".join(memories.show_token(visit, 0, position)) + memories.report(visit, visit, None)
        tags = "p|b|i|q|u|s|ol|ul|li|table|caption|thead|tbody|tr|th|td|span|h2|div|button|mark|br"
        assert not re.search(rf"<(?!/?({tags})\b)", page)
        assert not re.search(r"&(?!(amp|lt|gt|quot|#x27);)|<i>a", page)


@pytest.mark.parametrize("place", [-1, 1000, None, "x", True])
def test_a_word_that_is_not_on_the_page_is_an_error(visit, place):
    with pytest.raises(gradio.Error, match="There is nothing at this place"):
        memories.choose_word(visit, SimpleNamespace(index=place))
    with pytest.raises(gradio.Error, match="These documents were forgotten after 60 minutes: ask again"):
        memories.choose_word(None, SimpleNamespace(index=0))


def matches(text, templates):
    """Whether a text is one that templates of facts make."""
    fields = {
        "name": "|".join(name for name, _ in NAMES),
        "colour": "|".join(COLOURS),
        "noun": "|".join(NOUNS),
        "in_place": "|".join(place["in_place"] for place in PLACES.values()),
    }
    patterns = [
        re.sub(r"\\{(\w+)\\}", lambda field: f"({fields[field[1]]})", re.escape(template)) for template in templates
    ]
    return any(re.fullmatch(pattern, text) for pattern in patterns)


def test_examples_are_such_as_a_demo_is_trained_on():
    for *documents, questions in memories.EXAMPLES.values():
        assert len(documents) == len(memories.NAMES)
        for text in filter(None, documents):
            sentences = re.findall(r"[^.]+\.", text)
            assert len(sentences) == 2 and all(matches(sentence.strip(), FACTS) for sentence in sentences)
        for question in memories.check_questions(questions):
            assert matches(question, [text for text, _ in QUESTIONS.values()])
    assert not matches("Tom has the red sea in the park.", FACTS)


@pytest.mark.slow
def test_a_program_asks_and_gets_the_messages_of_a_visitor(served):
    client = gradio_client.Client(served, verbose=False, analytics_enabled=False)
    answer = client.predict(*TEXTS, *ALL, ASKED, api_name="/ask")
    assert "Read A, B, C" in str(answer)
    assert "Joined in the order <b>A, C, B" in str(client.predict(*TEXTS, *ALL, ASKED, api_name="/ask_in_other_order"))
    for values, message in (
        ((*TEXTS, *ALL, "a\nb\nc\nd\ne"), "There are 5 questions"),
        (("a" * 500_000, *TEXTS[1:], *ALL, ASKED), "Document A has 500,000 characters"),
        (("", "", "", *ALL, ASKED), "All documents are empty"),
    ):
        assert message in str(client.predict(*values, api_name="/ask"))


@pytest.fixture
def visitor(address):
    """A visitor whose second tab shows the first example."""
    with browse(address) as browser:
        open_tab(browser, "memories")
        yield Visitor(browser)
        # No error appeared, and the page has requested nothing from another server.
        assert browser.get_log("browser") == []
        assert all(url.startswith((address, "data:", "blob:")) for url in requested(browser))


def test_a_visitor_forgets_a_document_and_joins_in_another_order(visitor):
    def report_has(text):
        visitor.wait_for(lambda: text in visitor.texts("#report")[0])

    report_has("Read A, B, C")
    visitor.click(".Document-A input[type=checkbox]")
    report_has("Forgotten: A. The answers are those of a model that never read it.")
    report_has("Read no document again")
    visitor.wait_for(lambda: "forgotten" in visitor.texts("#sources td"))
    visitor.wait_for(lambda: "Document A:" not in visitor.texts("#documents")[0])
    visitor.click(".Document-A input[type=checkbox]")
    report_has("Joined in the order A, B, C.")
    visitor.click("#other-order")
    report_has("Joined in the order A, C, B. In the order A, B, C no logit of the 3 texts differs by more than")
    report_has("3 of 3 answers stayed the same")

    # A token of a question, which is no row of the table.
    visitor.wait_for(lambda: "Document A:" in visitor.texts("#documents")[0])
    token = visitor.texts("#answers .token")[1].strip()
    visitor.click("#answers .token", 1)
    visitor.wait_for(lambda: visitor.texts("#strongest .chosen")[0].strip() == token)
    visitor.wait_for(lambda: visitor.texts("#sources .chosen") == [])

    visitor.write("#questions textarea", "")
    visitor.click("#ask")
    visitor.wait_for(lambda: "The list of questions is empty" in visitor.texts("#memory-note")[0])
    # The first tab still has its text, and its memories can be chosen.
    open_tab(visitor.browser, "text")
    assert "Sam had" in "".join(visitor.tokens()) and len(visitor.texts("#why .part")) == 3


@pytest.mark.slow
def test_a_visitor_who_chooses_documents_gets_answers_from_all_of_them(visitor):
    visitor.click(".Document-B input[type=checkbox]")
    visitor.wait_for(lambda: "Forgotten: B" in visitor.texts("#report")[0])
    visitor.click("#document-sets button", 1)
    visitor.wait_for(lambda: "Who has the blue ball?" in visitor.texts("#answers")[0].replace("␣", " "))
    visitor.wait_for(lambda: "Joined in the order A, B, C" in visitor.texts("#report")[0])
    assert all(box.is_selected() for box in find(visitor.browser, "[class*=Document-] input[type=checkbox]"))


@pytest.mark.slow
def test_the_tab_works_by_keyboard(visitor):
    find(visitor.browser, ".Document-A input[type=checkbox]")[0].send_keys(Keys.SPACE)
    visitor.wait_for(lambda: "Forgotten: A" in visitor.texts("#report")[0])
    find(visitor.browser, "#answers [aria-pressed=true]")[0].send_keys(Keys.HOME)
    visitor.press(Keys.ARROW_RIGHT, Keys.ENTER)
    visitor.wait_for(lambda: find(visitor.browser, "#answers [data-choice='1'][aria-pressed=true]"))
    visitor.wait_for(lambda: visitor.focused().get_attribute("data-choice") == "1")
    assert nameless(visitor.browser) == []
    spoken = [find(visitor.browser, selector)[0].get_attribute("outerHTML") for selector in ("#report", "#strongest")]
    assert all('aria-live="polite"' in view for view in spoken)
    assert all(cell.get_attribute("scope") for cell in find(visitor.browser, "#sources th"))


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_tab_fits_on_a_phone_and_can_be_read(visitor, is_dark):
    look_at(visitor.browser, 390, 844, is_dark)
    open_tab(visitor.browser, "memories")
    assert visitor.browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert outside(visitor.browser, 390) == [] and low_contrast(visitor.browser) == []

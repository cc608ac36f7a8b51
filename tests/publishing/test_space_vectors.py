# SPDX-License-Identifier: Apache-2.0
"""The page of a memory model shows what memories hold: text, vectors, and the text given back, place by place."""

import re
from types import SimpleNamespace

import gradio
import pytest
import torch
from helpers.kinds import BACKBONES, make_memory_model
from helpers.memory_models import READS
from helpers.space import Visitor, low_contrast, make_memory_parts, nameless, outside, write_space
from selenium.webdriver.common.keys import Keys

import app
import shared
import vectors
from hub_cards.space.screenshot import BROWSER, DRIVER, browse, find, look_at, requested, serve


TEXT = "Once upon a time there was a <b>cat</b> & a dog."
LENGTH = 5


@pytest.fixture(scope="module")
def memory_parts():
    return make_memory_parts()


@pytest.fixture(scope="module")
def held(memory_parts):
    return vectors.read(*memory_parts, TEXT)[0]


def check(model, tokenizer, held):
    """Compare what is shown with the model's own measures."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    num_chunks = ids.shape[1] // LENGTH
    memories = model.encoder(ids).memories[0]
    torch.testing.assert_close(held.vectors, memories.float())
    assert len(held.given) == num_chunks and held.ids == ids[0].tolist()
    for number in range(num_chunks):
        chunk = ids[:, number * LENGTH : (number + 1) * LENGTH]
        text = vectors.pack_text(chunk)
        logits, targets, _ = model.reconstruct("autoencoding", text, model.gather_memories(text))
        assert held.given[number] == logits.argmax(-1)[0, 0].tolist() and torch.equal(targets[0], chunk)
        chances = logits.float().softmax(-1).gather(-1, targets[..., None])[0, 0, :, 0]
        torch.testing.assert_close(held.probabilities[number], chances)


@pytest.mark.parametrize("kind", [kind for kind in READS if kind != "none"])
def test_each_chunk_is_given_back_from_its_memory_alone_by_every_read(kind, memory_parts):
    tokenizer = memory_parts[1]
    backbone = memory_parts[0].config.encoder
    model = make_memory_model(encoder=backbone, decoder=backbone, dtype=torch.float32, **READS[kind])
    check(model, tokenizer, vectors.read(model, tokenizer, TEXT)[0])


@pytest.mark.parametrize("backbones", BACKBONES)
def test_each_chunk_is_given_back_by_every_backbone(backbones, memory_parts):
    tokenizer = memory_parts[1]
    size = {"vocab_size": len(tokenizer)}
    encoder, decoder = (type(one)(**one.to_dict() | size) for one in BACKBONES[backbones])
    model = make_memory_model(encoder=encoder, decoder=decoder, dtype=torch.float32)
    check(model, tokenizer, vectors.read(model, tokenizer, TEXT)[0])


def test_views_show_text_vectors_and_places(held):
    right = [label == vectors.RIGHT for label in (vectors.label_at(held, place) for place in range(len(held.ids)))]
    for place in range(len(held.ids)):
        text, summary, strips, table = vectors.show_place(held, place)
        chunk = place // LENGTH
        assert text.count("data-choice") == len(held.ids) and text.count("<br>") == (len(held.ids) - 1) // LENGTH
        assert f"<b>{sum(right)} of {len(held.given) * LENGTH}</b> tokens" in summary
        if chunk == len(held.given):
            assert "no memory holds them" in strips and table == ""
            continue
        assert strips.count('role="img"') == 2 and strips.count("<rect ") == held.vectors[0].numel()
        assert len(re.findall('<th scope="row">', table)) == LENGTH and table.count("chosen-row") == 1
        same = [cell == "yes" for cell in re.findall("<td>(yes|no)</td>", table)]
        assert same == right[chunk * LENGTH : (chunk + 1) * LENGTH]
    page = "".join("".join(vectors.show_place(held, place)) for place in range(len(held.ids)))
    assert "<b>cat" not in page and "&lt;" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The text is empty: write one, such as: Lily had"),
        (None, "The text is empty"),
        ("a \ud800", "The text has half a character"),
        ("a", "The text has 1 tokens, but a memory holds 5: write a longer one"),
    ],
)
def test_texts_that_fill_no_memory_are_refused(memory_parts, text, message):
    with pytest.raises(ValueError, match=message):
        vectors.read(*memory_parts, text)


def test_only_the_end_of_a_long_text_is_read_with_a_notice(memory_parts):
    held, notice = vectors.read(*memory_parts, "a cat. " * 200)
    assert len(held.ids) == shared.MOST_GIVEN_TOKENS and "the model read the last 128 of them" in notice


def test_weights_that_are_not_finite_are_named():
    model, tokenizer = make_memory_parts()
    with torch.no_grad():
        model.decoder.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(ValueError, match="is not finite: its weights are damaged"):
        vectors.read(model, tokenizer, TEXT)


@pytest.mark.parametrize("place", [-1, 1000, None, "x"])
def test_a_place_that_is_not_on_the_page_is_an_error(held, place):
    with pytest.raises(gradio.Error, match="There is nothing at this place"):
        vectors.choose_place(held, SimpleNamespace(index=place))
    with pytest.raises(gradio.Error, match="This text was forgotten after 60 minutes: read it again"):
        vectors.choose_place(None, SimpleNamespace(index=0))


def test_a_model_without_memories_is_not_shown(memory_parts, tmp_path):
    model = make_memory_model(max_memories=0, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    memory_parts[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whose memories this page cannot show"):
        app.load(str(tmp_path))


@pytest.fixture(scope="module")
def address(memory_parts, tmp_path_factory):
    """The address of the page, if a browser can open it."""
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium, or no driver of it")
    with serve(app=write_space(memory_parts, tmp_path_factory.mktemp("space"))) as address:
        yield address


@pytest.fixture
def visitor(address):
    with browse(address) as browser:
        visitor = Visitor(browser)
        visitor.wait_for(lambda: find(browser, "#places td"))
        yield visitor
        # No error appeared, and the page has requested nothing from another server.
        assert browser.get_log("browser") == []
        assert all(url.startswith((address, "data:", "blob:")) for url in requested(browser))


def test_a_visitor_sees_what_the_memory_of_a_chunk_holds(visitor):
    assert (
        "The vectors of chunk 1 of" in visitor.texts("#vectors")[0] and len(visitor.texts("#places td")) == 4 * LENGTH
    )
    visitor.write("#encoded textarea", TEXT)
    visitor.click("#encode")
    visitor.wait_for(
        lambda: "<b>" in "".join(visitor.texts("#held .token")) and "Once" in visitor.texts("#held .token")[0]
    )
    visitor.click("#held .token", LENGTH + 1)
    visitor.wait_for(lambda: "The vectors of chunk 2 of" in visitor.texts("#vectors")[0])
    visitor.wait_for(lambda: visitor.texts("#places .chosen-row th") == ["2"])
    visitor.write("#encoded textarea", "a")
    visitor.click("#encode")
    visitor.wait_for(lambda: "write a longer one" in visitor.texts("#vectors-note")[0])


@pytest.mark.slow
def test_the_page_of_a_memory_model_works_by_keyboard(visitor):
    find(visitor.browser, "#held [aria-pressed=true]")[0].send_keys(Keys.HOME)
    visitor.press(Keys.ARROW_RIGHT, Keys.ENTER)
    visitor.wait_for(lambda: find(visitor.browser, "#held [data-choice='1'][aria-pressed=true]"))
    visitor.wait_for(lambda: visitor.focused().get_attribute("data-choice") == "1")
    assert nameless(visitor.browser) == []
    assert all(cell.get_attribute("scope") for cell in find(visitor.browser, "#places th"))


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_of_a_memory_model_fits_on_a_phone_and_can_be_read(visitor, is_dark):
    look_at(visitor.browser, 390, 844, is_dark)
    visitor.wait_for(lambda: find(visitor.browser, "#places td"))
    assert visitor.browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert outside(visitor.browser, 390) == [] and low_contrast(visitor.browser) == []

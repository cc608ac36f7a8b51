# SPDX-License-Identifier: Apache-2.0
"""The page of the Space shows what the model did, in a real browser and without a network."""

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import gradio
import gradio_client
import httpx2 as httpx
import jinja2
import pytest
import torch
import yaml
from helpers.models import make_model
from helpers.space import REPOSITORY, Visitor, low_contrast, make_parts, nameless, outside
from selenium.webdriver.common.keys import Keys
from transformers import GPT2Config, GPT2LMHeadModel

import marked
import shared
import texts
from hub_cards.space import app
from hub_cards.space.screenshot import APP, browse, find, look_at, requested, serve
from modeling_memory_mosaic import MemoryMosaicForSequenceClassification, trace_tokens


CLONE = APP.parents[2]
NAN = float("nan")
BEGINNING = "Once upon a time there was a cat. One day"


@pytest.fixture(scope="module")
def reading(parts):
    return texts.write(*parts, BEGINNING, 12, 1.0, 0)[0]


def test_a_text_begins_with_what_was_given(parts, reading):
    _, tokenizer = parts
    assert reading.num_given == len(tokenizer(BEGINNING).input_ids)
    assert reading.num_given < len(reading.tokens) <= reading.num_given + 12
    assert "".join(reading.tokens[: reading.num_given]) == BEGINNING


def test_a_character_of_several_tokens_is_one_piece_and_its_tokens_are_bytes(parts):
    _, tokenizer = parts
    text = "a 🤗, é and 日本"
    ids = tokenizer(text).input_ids
    shown, names = marked.pieces(tokenizer, ids), marked.token_names(tokenizer, ids)
    assert "".join(piece for piece, _ in shown) == text and {"🤗", "é", "日", "本"} <= {piece for piece, _ in shown}
    assert shown[-1][1] == len(ids) - 1 == len(shown) - 1 + 3 + 1 + 2 + 2
    assert "<F0><9F><A4><97>" in "".join(names) and names[-3:] == ["<E6>", "<9C>", "<AC>"]
    # What makes no character at all, and a character behind it.
    broken = tokenizer("🤗").input_ids[:2] * 3 + tokenizer("é").input_ids
    assert [piece for piece, _ in marked.pieces(tokenizer, broken)] == ["<F0>", "<9F>"] * 3 + ["é"]
    assert marked.token_names(tokenizer, [tokenizer.eos_token_id]) == [marked.END]


def test_a_text_ends_at_a_sentence(parts):
    _, tokenizer = parts

    def cut(beginning, written, is_ended=False):
        given, ids = (tokenizer(text).input_ids for text in (beginning, written))
        ids = given + ids + [tokenizer.eos_token_id] * is_ended
        return tokenizer.decode(texts.whole_sentences(tokenizer, ids, len(given))[len(given) :])

    assert cut("A cat.", " It ran. It s") == " It ran."
    assert cut("A cat", ' said "no!" and') == ' said "no!"'
    assert cut("猫", "走。再") == "走。"
    assert cut("A cat. It", " ran and ran") == " ran and ran"  # no sentence of the model ends
    assert cut("A cat. It", " ran. An", is_ended=True).startswith(" ran. An")


def test_the_page_opens_on_the_word_where_contextual_memories_lead(reading):
    opening = texts.opening_token(reading)
    written = range(reading.num_given, len(reading.tokens))
    leads = {}
    for place in written:
        parts = texts.parts_of_logit(reading, place)
        leads[place] = parts["contextual memories"] - max(parts["the last token itself"], parts["persistent memories"])
    assert leads[opening] == texts.lead_of_contextual(reading, opening)
    words = [place for place in written if reading.tokens[place].strip().isalpha()]
    recalled = [place for place in words if leads[place] > 0 and texts.recalls_the_token(reading, place)]
    assert opening == max(recalled or words or written, key=leads.get)


def told_reading(parts, tokens):
    """A reading in which token 3 is the one that contextual memories lead at, and recall."""
    reading, _ = texts.write(*parts, "a cat. a", 4, 0, 0)
    trace = dataclasses.replace(reading.trace, contribution=reading.trace.contribution.clone())
    place = tokens.index("cat", 2)
    trace.contribution[:, 0, 0, :, place - 1] = 3.0
    trace.weights[:, :, :, place - 1] = 0
    trace.weights[:, :, :, place - 1, 1] = 1.0
    shown = [(token, number) for number, token in enumerate(tokens)]
    return dataclasses.replace(reading, tokens=tokens, pieces=shown, num_given=2, trace=trace)


def test_the_page_opens_on_a_token_that_was_recalled(parts):
    length = len(texts.write(*parts, "a cat. a", 4, 0, 0)[0].tokens)
    tokens = ["a", "cat", "a", "cat", *["x"] * (length - 4)]
    reading = told_reading(parts, tokens)
    assert texts.opening_token(reading) == 3 and texts.recalls_the_token(reading, 3)
    assert texts.lead_of_contextual(reading, 3) > 0


def test_a_seed_gives_a_text_and_leaves_other_random_numbers_alone(parts):
    def tokens(temperature, seed):
        return texts.write(*parts, BEGINNING, 12, temperature, seed)[0].tokens

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert tokens(1.0, 1) == tokens(1.0, 1) != tokens(1.0, 2)
    assert tokens(0, 1) == tokens(0, 2)
    assert torch.rand(1) == expected


def test_greedy_tokens_are_the_likeliest(parts):
    model, tokenizer = parts
    reading, _ = texts.write(model, tokenizer, BEGINNING, 5, 0, 0)
    ids = tokenizer(BEGINNING, return_tensors="pt").input_ids
    for token in reading.tokens[reading.num_given :]:
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        assert marked.token_names(tokenizer, best[0].tolist()) == [token]
        ids = torch.cat([ids, best], dim=1)
    torch.testing.assert_close(reading.trace.logit, trace_tokens(model, ids).logit, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((" \n", 5, 1.0, 0), "The beginning is empty"),
        ((BEGINNING, None, 1.0, 0), "A number is missing"),
        ((BEGINNING, 5, 1.0, None), "A number is missing"),
        ((BEGINNING, 0, 1.0, 0), "1 to 100 new tokens"),
        ((BEGINNING, 101, 1.0, 0), "1 to 100 new tokens"),
        ((BEGINNING, 5, -1.0, 0), "at a temperature from 0 on"),
        ((BEGINNING, 5, 1.6, 0), "at a temperature from 0 on, up to 1.5"),
        ((BEGINNING, 5.5, 1.0, 0), "1 to 100 new tokens"),
        ((BEGINNING, 5, NAN, 0), "plain, finite numbers"),
        ((BEGINNING, NAN, 1.0, 0), "plain, finite numbers"),
        ((BEGINNING, 5, 1.0, NAN), "plain, finite numbers"),
        ((BEGINNING, 5, 1.0, float("inf")), "plain, finite numbers"),
        ((BEGINNING, 5, 1.0, "0"), "plain, finite numbers"),
        ((BEGINNING, True, 1.0, 0), "plain, finite numbers"),
        ((BEGINNING, [5], 1.0, 0), "plain, finite numbers"),
        ((BEGINNING, 5, 1.0, -1), "The seed has to be a whole number"),
        ((BEGINNING, 5, 1.0, 2**31), "The seed has to be a whole number"),
        ((BEGINNING, 5, 1.0, 0.5), "The seed has to be a whole number"),
        ((None, 5, 1.0, 0), "The beginning is empty"),
        (([BEGINNING], 5, 1.0, 0), "The beginning is empty"),
        (("a \ud800 b", 5, 1.0, 0), "half a character"),
    ],
)
def test_settings_out_of_bounds_are_refused(parts, settings, message):
    with pytest.raises(ValueError, match=message):
        texts.write(*parts, *settings)


def test_only_the_end_of_a_long_beginning_is_read_with_a_notice(parts):
    model, tokenizer = parts
    text = "a cat. " * 200
    num_tokens = len(tokenizer(text).input_ids)
    reading, notice = texts.write(model, tokenizer, text, 2, 0, 0)
    assert reading.num_given == shared.MOST_GIVEN_TOKENS and "".join(reading.tokens[:128]) in text
    assert notice == f"The beginning has {num_tokens} tokens; the model read the last 128 of them."
    assert texts.write(model, tokenizer, BEGINNING, 2, 0, 0)[1] == ""


def test_a_text_is_cut_before_it_is_tokenized(parts):
    model, tokenizer = parts
    lengths = []

    def counting(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    for name in ("decode", "convert_ids_to_tokens", "pad_token_id", "eos_token_id"):
        setattr(counting, name, getattr(tokenizer, name))
    text = "a cat. " * 500_000
    reading, notice = texts.write(model, counting, text, 2, 0, 0)
    assert lengths == [shared.MOST_CHARACTERS]
    assert notice == "The beginning has 3,500,000 characters; the model read the last 128 tokens."
    assert reading.tokens == texts.write(model, tokenizer, text[-9_000:], 2, 0, 0)[0].tokens


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite_are_refused(number, temperature, name):
    model, tokenizer = make_parts()
    with torch.no_grad():
        model.get_parameter(name)[..., 3] = number
    with pytest.raises(ValueError, match="is not finite: its weights are damaged"):
        texts.write(model, tokenizer, BEGINNING, 3, temperature, 0)


def test_weights_that_are_not_finite_are_not_shown(tmp_path):
    model, tokenizer = make_parts()
    with torch.no_grad():
        model.model.norm.weight[0] = NAN
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weights have numbers that are not finite"):
        app.load(str(tmp_path))


@pytest.mark.parametrize("place", [-1, 5, "-1", None, [1], 1e9, "x", True])
def test_a_place_that_is_not_on_the_page_is_an_error(place):
    assert [shared.place_among(good, 5) for good in (0, 4, "3")] == [0, 4, 3]
    with pytest.raises(gradio.Error, match="There is nothing at this place"):
        shared.place_among(place, 5)


def test_parts_on_the_page_sum_to_the_logit(reading):
    for position in range(1, len(reading.tokens)):
        parts = texts.parts_of_logit(reading, position)
        assert list(parts) == ["the last token itself", "contextual memories", "persistent memories"]
        assert sum(parts.values()) == pytest.approx(reading.trace.logit[0, position - 1].item(), abs=1e-5)
        shown = texts.explanation(reading, position)
        assert [float(value) for value in re.findall(r'"value">([-+.\d]+)<', shown)] == pytest.approx(
            list(parts.values()), abs=0.006
        )
        assert f"<b>{reading.trace.persistent_share[0, position - 1].item():.0%}</b> is the persistent share" in shown
        assert ("It was given" in shown) == (position < reading.num_given)


def test_biases_are_a_part_where_there_are_some():
    model, tokenizer = make_parts()
    biased = make_model(vocab_size=len(tokenizer), use_bias=True, eos_token_id=0, pad_token_id=1)
    reading, _ = texts.write(biased, tokenizer, BEGINNING, 2, 0, 0)
    parts = texts.parts_of_logit(reading, 3)
    assert parts["biases"] != 0 and sum(parts.values()) == pytest.approx(reading.trace.logit[0, 2].item(), abs=1e-5)


def test_the_table_has_the_strongest_of_each_kind_with_what_they_recall(reading):
    position, contribution = len(reading.tokens) - 1, reading.trace.contribution[:, :, 0, :, -2]
    units = texts.strongest_units(reading, position)
    num_heads = {"contextual": reading.trace.weights.shape[2], "persistent": reading.slots[0].shape[1]}
    assert all(unit.head < num_heads[unit.kind] for unit in units)
    assert [unit.contribution for unit in units] == sorted((unit.contribution for unit in units), reverse=True)
    for index, kind in enumerate(texts.KINDS):
        same_kind = [unit for unit in units if unit.kind == kind]
        of_kind = contribution[:, index, : num_heads[kind]]
        strongest = of_kind.abs().flatten().sort(descending=True).values[: texts.UNITS_OF_A_KIND]
        assert sorted((abs(unit.contribution) for unit in same_kind), reverse=True) == strongest.tolist()
    listed = texts.listed_units(reading, position)
    rows = re.findall(r"<tr class.*?</tr>", texts.unit_table(reading, position, 0))
    for unit, row in zip(listed, rows, strict=True):
        name = f"Layer {unit.layer}, {unit.kind} {unit.head}"
        if unit.kind == "contextual" and (num_short := reading.trace.levels.get("short_term")):
            is_short = unit.head < num_short
            name = f"Layer {unit.layer}, {'short' if is_short else 'long'}-term {unit.head % num_short}"
        assert f"{name}<" in row and f"<td>{unit.contribution:+.2f}<" in row
        if unit.kind == "contextual":
            for place, weight in unit.recalled:
                assert weight == reading.trace.weights[unit.layer, 0, unit.head, position - 1, place].item()
                pair = [marked.boxed(token) for token in reading.tokens[place - 1 : place + 1]]
                assert f"<b>{weight:.0%}</b> {place}: <s>" in row and " → ".join(pair) in row


def test_slots_are_shown_only_where_they_favour_the_token(reading):
    position = len(reading.tokens) - 1
    persistent = [unit for unit in texts.strongest_units(reading, position) if unit.kind == "persistent"]
    silent = dataclasses.replace(reading, words={})
    assert {unit.kind for unit in texts.listed_units(silent, position)} == {"contextual"}
    shown = texts.unit_table(silent, position, 0)
    if not reading.has_slots:
        added = ", ".join(f"{unit.contribution:+.2f}" for unit in persistent)
        assert "slot" not in shown and f"The strongest dense layers add {added}." in shown
        return
    assert (
        "slot " not in shown and f"{len(persistent)} of the {len(persistent)} strongest persistent memories" in shown
    )
    # One slot of one memory favours the token.
    unit = persistent[0]
    slot, weight = unit.recalled[0]
    words = {(unit.layer, unit.head, slot): ["<b>", reading.tokens[position]]}
    telling = dataclasses.replace(reading, words=words)
    shown = texts.unit_table(telling, position, 0)
    assert f"Layer {unit.layer}, persistent {unit.head}<" in shown and shown.count("slot ") == 1
    assert f"<b>{weight:.0%}</b> slot {slot} → <u>&lt;b&gt;</u>" in shown
    assert f"{len(persistent) - 1} of the {len(persistent)} strongest persistent memories are not listed" in shown


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_slots_have_the_words_of_the_logits_of_their_values(norm):
    settings = {} if norm == "layer_norm" else {"persistent_memory_type": "slots", "norm_type": norm}
    model, tokenizer = make_parts("mosaic" if norm == "layer_norm" else "mosaic v2", **settings)
    reading, _ = texts.write(model, tokenizer, BEGINNING, 12, 1.0, 0)
    assert reading.words
    for (layer, head, slot), words in reading.words.items():
        memory, width = model.model.layers[layer].persistent_memory, model.config.head_dim
        columns = memory.o_proj.weight[:, head * width : (head + 1) * width]
        stream = columns @ memory.slot_values[head, slot]
        stream = stream - stream.mean() if norm == "layer_norm" else stream
        logits = model.lm_head.weight @ (stream * model.model.norm.weight)
        ranking = [tokenizer.decode([token]) for token in logits.argsort(descending=True)[:9].tolist()]
        assert words == [token for token in ranking if "\ufffd" not in token][:3]


def test_colours_are_those_of_weights_and_probabilities(reading):
    position = texts.opening_token(reading)
    shown = texts.coloured_text(reading, position)
    places = [place for _, place in reading.pieces]
    shown = [mark for mark in shown if mark.text != "\n"]
    assert [mark.label == marked.CHOSEN for mark in shown] == [place == position for place in places]
    begin = 0
    for place, (_, label) in zip(places, shown, strict=True):
        probability = reading.trace.log_probability[0, max(begin, 1) - 1 : place].sum().exp().item()
        if place < reading.num_given or place == position:
            assert label == (marked.CHOSEN if place == position else marked.GIVEN)
        else:
            upper = texts.PROBABILITIES[label]
            assert probability < upper
            assert all(bound <= probability or bound >= upper for bound in texts.PROBABILITIES.values())
        begin = place + 1
    weights = reading.trace.weights[1, 0, 2, position - 1, :position].tolist()
    marks = [mark for mark in texts.weighted_text(reading, position, 1, "contextual", 2) if mark.text != "\n"]
    for weight, (_, label) in zip(weights, marks, strict=True):
        assert (label is None) == (weight < 0.01) and (label is None or weight < texts.WEIGHTS[label])
    assert {mark.label for mark in texts.weighted_text(reading, position, 1, "persistent", 2)} == {None}


def test_a_chosen_character_is_told_with_its_last_byte_and_the_bytes_before_it(parts):
    reading, _ = texts.write(*parts, "a cat 🤗", 2, 0, 0)
    number = [text for text, _ in reading.pieces].index("🤗")
    position, *views = texts.choose_token(reading, SimpleNamespace(index=number))
    assert position == reading.pieces[number][1] and "🤗, chosen" in views[0]
    assert "<u>&lt;97&gt;</u>, is the last of the 4 tokens that make it" in views[1]
    marks = texts.weighted_text(reading, position, 0, "contextual", 0)
    assert [mark.text for mark in marks][-3:] == ["<F0>", "<9F>", "<A4>"]
    # Behind it the character is whole.
    later = texts.weighted_text(reading, position + 1, 0, "contextual", 0)
    assert later[-1].text == "🤗"


def test_the_first_tokens_are_shown_too(reading):
    text, why, table, recalled = texts.show_token(reading, 0)
    assert "Nothing came before it" in why and (table, recalled) == ("", "") and "data-choice" in text
    *_, table, recalled = texts.show_token(reading, 1)
    assert "one token makes no pair" in recalled and "<mark" not in recalled
    assert "nothing: one token makes no pair" in table


def test_text_is_escaped_and_what_cannot_be_seen_is_shown(parts):
    reading, _ = texts.write(*parts, "<b>a</b> & é🙂\n\n\t  x", 3, 1.0, 0)
    shown = [text for text, _ in texts.coloured_text(reading, 1)]
    assert "↵" in shown and "\n" in shown and "🙂" in shown
    assert marked.visible(" \t") == " ⇥" and marked.visible("  ") == "␣␣" and marked.visible(" a") == " a"
    tags = "p|b|div|span|u|s|h2|ul|li|br|mark|button|table|thead|tbody|tr|th|td"
    for position in range(len(reading.tokens)):
        page = "".join(texts.show_token(reading, position))
        assert not re.search(rf"<(?!/?({tags})\b)", page) and not re.search(r"&(?!(amp|lt|gt|quot|#x27);)", page)
        assert "<b>a" not in page
    assert "&lt;" in "".join(texts.show_token(reading, place)[1] for place in range(4))


def save_other(kind, folder):
    if kind == "no folder":
        folder.rmdir()
    elif kind == "GPT-2":
        GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    elif kind == "classifier":
        MemoryMosaicForSequenceClassification(make_model().config).save_pretrained(folder)
    elif kind == "model without a tokenizer":
        make_model().save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", r"no model was found there \(there is no such folder\)\. Pass a folder"),
        ("nothing", "no model was found there .* Pass a folder"),
        ("GPT-2", "GPT2LMHeadModel of type gpt2 was found there, .* Pass a folder"),
        ("classifier", "MemoryMosaicForSequenceClassification of type memory_mosaic was found there"),
        ("model without a tokenizer", "has no tokenizer beside it"),
    ],
)
def test_what_is_no_memory_mosaic_is_refused(tmp_path, kind, message):
    save_other(kind, tmp_path)
    with pytest.raises(ValueError, match=message):
        app.load(str(tmp_path))


@pytest.mark.slow
def test_the_app_refuses_in_one_line(tmp_path):
    save_other("GPT-2", tmp_path)
    with pytest.raises(RuntimeError, match=f"\n{tmp_path}: GPT2LMHeadModel of type gpt2 was found there") as refused:
        with serve(tmp_path):
            pass
    assert "Traceback" not in str(refused.value)


def test_the_card_tells_the_hub_what_it_needs():
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(APP.parent))
    sizes = {"model_type": "memory_mosaic", "num_hidden_layers": 4, "num_attention_heads": 6}
    sizes["num_persistent_slots"] = 1704
    values = {"result": {"parameters": 2_606_952, "architecture": sizes}, "gradio_version": "6.31.0"}
    card = environment.get_template("README.md.jinja").render(repo_id="someone/some-mosaic", **values)
    _, metadata, body = card.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["sdk"] == "gradio" and metadata["sdk_version"] == "6.31.0" and metadata["license"] == "apache-2.0"
    assert metadata["models"] == ["someone/some-mosaic"] and (APP.parent / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60 and isinstance(metadata["python_version"], str)
    assert "2,606,952 parameters" in body and "1,704 pairs" in body and "arXiv 2405.06394" in body
    assert "# What a memory holds" not in body
    levels = {"model_type": "memory_mosaic_v2", "num_short_term_heads": 5, "num_long_term_heads": 3}
    for of_level, phrase in (
        ("swiglu", "a dense layer that was learnt"),
        ("slots", "6 persistent ones, whose\n1,704"),
    ):
        values["result"]["architecture"] = sizes | levels | {"persistent_memory_type": of_level}
        card = environment.get_template("README.md.jinja").render(repo_id="someone/some-mosaic", **values)
        words = " ".join(card.split())
        assert "5 short-term and 3 long-term memories" in words and " ".join(phrase.split()) in words
        assert "arXiv 2507.03285" in words and "2405.06394" not in words
    values["result"]["architecture"] = {"model_type": "memory_model"}
    other = environment.get_template("README.md.jinja").render(repo_id="someone/some-mosaic", **values)
    assert yaml.safe_load(other.split("---\n", 2)[1]) == metadata
    assert (
        "# What a memory holds" in other and "memory model of 2,606,952 parameters" in other and "pairs" not in other
    )


def test_the_space_asks_for_the_versions_of_the_project():
    asked = (APP.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    project = (CLONE / "pyproject.toml").read_text(encoding="utf-8")
    # The project's own command needs one more library, which is no part of the page.
    lines = "".join(f'\n    "{line}",' for line in [*asked, "typer>=0.15,<1"])
    assert f"dependencies = [{lines}\n]" in project


def test_a_program_gets_the_messages_that_a_visitor_gets(served):
    """Text boxes and sliders have bounds in a browser only."""
    client = gradio_client.Client(served, verbose=False, analytics_enabled=False)
    for values, message in (
        (("a" * 500_000, 2, 0, 0), "The beginning has 500,000 characters"),
        ((BEGINNING, 1e9, 0, 0), "1 to 100 new tokens|greater than maximum value 100"),
        ((BEGINNING, 2, 0, -1), "The seed has to be a whole number|less than minimum value 0"),
    ):
        try:
            answer = str(client.predict(*values, api_name="/continue_text"))
        except Exception as error:
            answer = str(error)
        assert re.search(message, answer), answer


def test_requests_and_uploads_are_bounded(served):
    small, large = b"a" * 100, b"a" * (app.LARGEST_REQUEST + 1)
    route = f"{served}gradio_api/queue/join"
    assert httpx.post(route, content=small).status_code == 422  # read, and no event
    assert httpx.post(route, content=large).status_code == 413
    with contextlib.suppress(httpx.HTTPError):  # without a length: in pieces
        assert httpx.post(route, content=iter([large])).status_code >= 400
    for content in (large, b"aa"):
        answer = httpx.post(f"{served}gradio_api/upload", files={"files": ("a.txt", content)})
        assert answer.status_code == 413, answer.text
    assert httpx.get(served).status_code == 200


@pytest.fixture
def visitor(address):
    """A visitor whose page shows the first example."""
    with browse(address) as browser:
        visitor = Visitor(browser)
        visitor.wait_for(visitor.colours_now)
        assert "Sam had" in "".join(visitor.tokens())
        yield visitor
        # No error appeared, and the page has requested nothing from another server.
        assert browser.get_log("browser") == []
        assert all(url.startswith((address, "data:", "blob:")) for url in requested(browser))


def test_a_visitor_sees_why_a_token_came(visitor):
    visitor.continue_text("")
    visitor.wait_for(lambda: "The beginning is empty" in visitor.texts("#note")[0])
    visitor.continue_text(BEGINNING)
    visitor.wait_for(lambda: "".join(visitor.tokens()).startswith(BEGINNING))
    assert visitor.texts("#note") == [""] and len(visitor.tokens()) > 20

    before = visitor.texts("#why")
    visitor.click("#text .token", 4)
    visitor.wait_for(lambda: "(token 4). It was given; its probability was" in visitor.texts("#why")[0])
    assert visitor.texts("#why") != before
    assert re.search(r"\d+% is the persistent share", visitor.texts("#why")[0])
    assert len(visitor.texts("#why .part")) == 3
    rows = [text for text in visitor.texts("#table tbody tr") if re.search("contextual|-term", text)]
    assert len(rows) == texts.UNITS_OF_A_KIND and all(re.search(r"\d+% \d+: .*→", row) for row in rows)


@pytest.mark.slow
def test_a_visitor_who_chooses_an_example_sees_it_continued(visitor):
    visitor.click("#beginnings button", 1)
    visitor.wait_for(lambda: "".join(visitor.tokens()).startswith(texts.EXAMPLES[1]))
    (box,) = find(visitor.browser, "#beginning textarea")
    visitor.wait_for(lambda: box.get_attribute("value") == texts.EXAMPLES[1])
    assert len(visitor.tokens()) > 10


@pytest.mark.slow
def test_a_visitor_sees_the_opening_token_with_the_memory_that_adds_most(visitor, parts):
    opened, _ = texts.write(*parts, texts.EXAMPLES[0], 24, 0, 0)
    chosen = [button.get_attribute("aria-pressed") for button in find(visitor.browser, "#text .token")]
    assert [opened.pieces[number][1] for number, state in enumerate(chosen) if state == "true"] == [
        texts.opening_token(opened)
    ]
    assert re.search("contextual|-term", visitor.texts("#table [aria-pressed=true]")[0])
    assert re.search("(contextual|-term) memory", visitor.texts("#recalled")[0])


@pytest.mark.slow
def test_a_visitor_sees_an_emoji_and_chinese_as_characters(visitor):
    visitor.continue_text("the cat 🤗 日本")
    visitor.wait_for(lambda: {"🤗", "日", "本"} <= set(visitor.tokens()))
    visitor.click("#text .token", visitor.tokens().index("🤗"))
    visitor.wait_for(lambda: "<97>, is the last of the 4 tokens" in visitor.texts("#why")[0])
    assert "<F0>" in visitor.texts("#recalled")[0] and "<F0> → <9F>" in visitor.texts("#table")[0].replace("\n", "")


@pytest.mark.slow
def test_links_lead_to_the_paper_and_to_the_model(visitor, parts):
    links = {link.text: link.get_attribute("href") for link in find(visitor.browser, "#heading a")}
    title, number = {
        "memory_mosaic": ("Memory Mosaics", "2405.06394"),
        "memory_mosaic_v2": ("Memory Mosaics at scale", "2507.03285"),
    }[parts[0].config.model_type]
    paper = {f"{title}, arXiv {number}": f"https://arxiv.org/abs/{number}"}
    assert links == {REPOSITORY: f"https://huggingface.co/{REPOSITORY}"} | paper


@pytest.mark.slow
def test_a_page_without_a_repository_links_to_the_paper_alone(parts, tmp_path):
    assert app.repository_of("someone/mosaic") == "someone/mosaic" and app.repository_of(str(tmp_path)) is None
    assert app.repository_of("no/such/thing") is None
    assert app.heading(parts[0], None).count("<a ") == 1 and "This model is a language model" in app.heading(
        parts[0], None
    )


@pytest.mark.slow
def test_the_page_works_by_keyboard(visitor):
    """A view is one stop of the tab key, arrows move in it, and the focus stays where the visitor is."""
    (box,) = find(visitor.browser, "#beginning textarea")
    box.click()
    stops = []
    for _ in range(20):
        visitor.press(Keys.TAB)
        stops.append(visitor.focused().get_attribute("data-choice") is not None)
        if stops[-1]:
            break
    assert stops[-1], "the tab key does not lead to the tokens"
    number = int(visitor.focused().get_attribute("data-choice"))
    visitor.press(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert visitor.focused().get_attribute("data-choice") == "2" and number != 2
    visitor.press(Keys.ENTER)
    visitor.wait_for(lambda: "(token 2" in visitor.texts("#why")[0])
    visitor.wait_for(lambda: visitor.focused().get_attribute("data-choice") == "2")
    assert visitor.focused().get_attribute("aria-pressed") == "true"
    # The next stop is the memory that is chosen.
    visitor.press(Keys.TAB)
    assert re.search("contextual|-term", visitor.focused().text)
    visitor.press(Keys.ARROW_DOWN, Keys.SPACE)
    visitor.wait_for(lambda: visitor.texts("#table [aria-pressed=true]") == [visitor.focused().text])
    name = re.sub("(contextual|persistent|-term)", r"\1 memory", visitor.focused().text)
    visitor.wait_for(lambda: name in visitor.texts("#recalled")[0])


@pytest.mark.slow
def test_a_screen_reader_has_names_headings_and_changes(visitor):
    assert visitor.browser.find_element("tag name", "html").get_attribute("lang")
    names = [token.get_attribute("aria-label") for token in find(visitor.browser, "#text .token")]
    assert all(re.fullmatch(r".*, (given|chosen|under 5%|over 60%|\d+ to \d+%)", name, re.S) for name in names)
    assert [text[:2] for text in visitor.texts("h2") if text] == ["1.", "2.", "3."] and len(visitor.texts("h1")) == 1
    for selector in ("#why", "#recalled", "#note"):
        assert find(visitor.browser, selector)[0].get_attribute("outerHTML").count('aria-live="polite"') == 1
    assert all(cell.get_attribute("scope") for cell in find(visitor.browser, "#table th"))
    spoken = [spoken.get_attribute("textContent") for spoken in find(visitor.browser, "#recalled mark .spoken")]
    assert spoken and all(re.fullmatch(r" \((1 to 5|5 to 20|20 to 50|over 50)%\) ", text) for text in spoken)
    assert nameless(visitor.browser) == []


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_page_fits_on_a_phone_and_can_be_read(visitor, is_dark):
    look_at(visitor.browser, 390, 844, is_dark)
    visitor.wait_for(visitor.colours_now)
    assert visitor.browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert outside(visitor.browser, 390) == [] and low_contrast(visitor.browser) == []
    # The table shows whole words, and can be used.
    visitor.click("#table [data-choice]", 1)
    visitor.wait_for(lambda: find(visitor.browser, "#table [data-choice='1'][aria-pressed=true]"))


@pytest.mark.slow
def test_sentences_of_the_page_are_sentences(visitor):
    sentences = visitor.texts("#heading p, #text-heading p, #why p, #table p, #recalled p:not(.tokens), h2")
    assert len(sentences) >= 8
    for text in sentences:
        assert text.endswith((".", "these parts:")) and (text[0].isupper() or text[0].isdigit()), text
        assert not re.search(r"\b(said|says|speaks?|held)\b", text), text


@pytest.mark.slow
def test_a_memory_that_is_chosen_colours_the_text(visitor):
    seen = []
    for number in (3, 1, 0):
        visitor.click(f"#table [data-choice='{number}']")
        visitor.wait_for(
            lambda number=number: find(visitor.browser, f"#table [data-choice='{number}'][aria-pressed=true]")
        )
        seen.append(visitor.colours())
    assert seen[0] != seen[1] or seen[1] != seen[2]
    assert all(len(set(colours)) > 1 for colours in seen)


@pytest.mark.slow
def test_visitors_share_nothing(visitor, address):
    visitor.browser.switch_to.new_window("tab")
    visitor.browser.get(address)
    visitor.wait_for(visitor.colours_now)
    visitor.continue_text(BEGINNING)
    visitor.wait_for(lambda: "Sam had" not in "".join(visitor.tokens()))
    visitor.browser.switch_to.window(visitor.browser.window_handles[0])
    shown = visitor.tokens()
    visitor.click("#text .token", 4)
    visitor.wait_for(lambda: visitor.texts("#why .chosen")[0] == shown[4])
    assert visitor.tokens() == shown

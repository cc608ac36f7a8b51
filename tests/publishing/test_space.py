# SPDX-License-Identifier: Apache-2.0
"""The page of the Space shows what the model did, in a real browser and without a network."""

import contextlib
import html
import re

import gradio
import gradio_client
import httpx2 as httpx
import jinja2
import pytest
import torch
import yaml
from helpers.models import make_model
from helpers.space import Visitor, make_parts
from transformers import GPT2Config, GPT2LMHeadModel

import shared
from hub_cards.space import app
from hub_cards.space.screenshot import APP, browse, requested, serve
from modeling_memory_mosaic import MemoryMosaicForSequenceClassification, trace_tokens


CLONE = APP.parents[2]
NAN = float("nan")
BEGINNING = "Once upon a time there was a cat. One day"


@pytest.fixture(scope="module")
def reading(parts):
    return app.write(*parts, BEGINNING, 12, 1.0, 0)[0]


def test_a_text_begins_with_what_was_given(parts, reading):
    _, tokenizer = parts
    assert reading.num_given == len(tokenizer(BEGINNING).input_ids) and len(reading.tokens) == reading.num_given + 12
    assert "".join(reading.tokens[: reading.num_given]) == BEGINNING


def test_a_character_of_several_tokens_is_shown_whole(parts):
    """Its last token shows it, although the tokenizer knows only its bytes."""
    _, tokenizer = parts
    text = "a 🤗, é and 日本"
    tokens = app.shown_tokens(tokenizer, tokenizer(text).input_ids)
    assert "".join(tokens) == text and tokens.count("") == 3 + 1 + 2 + 2
    assert "\ufffd" in "".join(app.shown_tokens(tokenizer, tokenizer("🤗").input_ids[:2] * 4))  # no character at all


def test_a_seed_gives_a_text_and_leaves_other_random_numbers_alone(parts):
    def tokens(temperature, seed):
        return app.write(*parts, BEGINNING, 12, temperature, seed)[0].tokens

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert tokens(1.0, 1) == tokens(1.0, 1) != tokens(1.0, 2)
    assert tokens(0, 1) == tokens(0, 2)
    assert torch.rand(1) == expected


def test_greedy_tokens_are_the_likeliest(parts):
    model, tokenizer = parts
    reading, _ = app.write(model, tokenizer, BEGINNING, 5, 0, 0)
    ids = tokenizer(BEGINNING, return_tensors="pt").input_ids
    for token in reading.tokens[reading.num_given :]:
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        assert tokenizer.decode(best[0]) == token
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
        app.write(*parts, *settings)


def test_only_the_end_of_a_long_beginning_is_read_with_a_notice(parts):
    model, tokenizer = parts
    text = "a cat. " * 200
    num_tokens = len(tokenizer(text).input_ids)
    reading, notice = app.write(model, tokenizer, text, 2, 0, 0)
    assert reading.num_given == shared.MOST_GIVEN_TOKENS and "".join(reading.tokens[:128]) in text
    assert notice == f"The beginning has {num_tokens} tokens; the model read the last 128 of them."
    assert app.write(model, tokenizer, BEGINNING, 2, 0, 0)[1] == ""


def test_a_text_is_cut_before_it_is_tokenized(parts):
    model, tokenizer = parts
    lengths = []

    def counting(text, **options):
        lengths.append(len(text))
        return tokenizer(text, **options)

    counting.decode, counting.pad_token_id = tokenizer.decode, tokenizer.pad_token_id
    text = "a cat. " * 500_000
    reading, notice = app.write(model, counting, text, 2, 0, 0)
    assert lengths == [app.MOST_CHARACTERS]
    assert notice == "The beginning has 3,500,000 characters; the model read the last 128 tokens."
    assert reading.tokens == app.write(model, tokenizer, text[-9_000:], 2, 0, 0)[0].tokens


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite_are_refused(number, temperature, name):
    model, tokenizer = make_parts()
    with torch.no_grad():
        model.get_parameter(name)[..., 3] = number
    with pytest.raises(ValueError, match="is not finite: its weights are damaged"):
        app.write(model, tokenizer, BEGINNING, 3, temperature, 0)


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
    assert [app.place_among(good, 5) for good in (0, 4, "3")] == [0, 4, 3]
    with pytest.raises(gradio.Error, match="There is nothing at this place"):
        app.place_among(place, 5)


def test_parts_on_the_page_sum_to_the_logit(reading):
    for position in range(1, len(reading.tokens)):
        parts = app.parts_of_logit(reading, position)
        assert list(parts) == ["the last token itself", "contextual memories", "persistent memories"]
        assert sum(parts.values()) == pytest.approx(reading.trace.logit[0, position - 1].item(), abs=1e-5)
        shown = app.explanation(reading, position)
        assert [float(value) for value in re.findall(r'"value">([-+.\d]+)<', shown)] == pytest.approx(
            list(parts.values()), abs=0.006
        )
        assert f"<b>{reading.trace.persistent_share[0, position - 1].item():.0%}</b> persistent share" in shown
        assert ("was given" in shown) == (position < reading.num_given)


def test_biases_are_a_part_where_there_are_some():
    model, tokenizer = make_parts()
    biased = make_model(vocab_size=len(tokenizer), use_bias=True, eos_token_id=0, pad_token_id=1)
    reading, _ = app.write(biased, tokenizer, BEGINNING, 2, 0, 0)
    parts = app.parts_of_logit(reading, 3)
    assert parts["biases"] != 0 and sum(parts.values()) == pytest.approx(reading.trace.logit[0, 2].item(), abs=1e-5)


def test_the_table_has_the_strongest_of_each_kind_with_what_they_recalled(reading):
    position, contribution = len(reading.tokens) - 1, reading.trace.contribution[:, :, 0, :, -2]
    units = app.strongest_units(reading, position)
    assert [unit.contribution for unit in units] == sorted((unit.contribution for unit in units), reverse=True)
    for index, kind in enumerate(app.KINDS):
        same_kind = [unit for unit in units if unit.kind == kind]
        strongest = contribution[:, index].abs().flatten().sort(descending=True).values[: app.UNITS_OF_A_KIND]
        assert sorted((abs(unit.contribution) for unit in same_kind), reverse=True) == strongest.tolist()
    for unit, row in zip(units, app.table_rows(reading, units), strict=True):
        assert row[:4] == [f"{unit.contribution:+.2f}", unit.layer, unit.kind, unit.head]
        assert unit.contribution == contribution[unit.layer, app.KINDS.index(unit.kind), unit.head].item()
        for (place, weight), shown in zip(unit.recalled, row[4:], strict=False):
            assert f"<b>{weight:.0%}</b>" in shown
            if unit.kind == "contextual":
                assert weight == reading.trace.weights[unit.layer, 0, unit.head, position - 1, place].item()
                pair = [f"<u>{html.escape(app.visible(token))}</u>" for token in reading.tokens[place - 1 : place + 1]]
                assert f"{place}: <s>" in shown and shown.endswith(" → ".join(pair) + "</span>")
            else:
                assert f"slot {place} → <u>" in shown


def test_slots_have_the_words_of_the_logits_of_their_values(parts, reading):
    model, tokenizer = parts
    assert reading.words
    for (layer, head, slot), words in reading.words.items():
        memory, width = model.model.layers[layer].persistent_memory, model.config.head_dim
        columns = memory.o_proj.weight[:, head * width : (head + 1) * width]
        stream = columns @ memory.slot_values[head, slot]
        logits = model.lm_head.weight @ ((stream - stream.mean()) * model.model.norm.weight)
        ranking = [tokenizer.decode([token]) for token in logits.argsort(descending=True)[:9].tolist()]
        assert words == [token for token in ranking if "\ufffd" not in token][:3]


def test_colours_are_those_of_weights_and_probabilities(reading):
    position = reading.num_given + 4
    shown = app.coloured_text(reading, position)
    assert [label for _, label in shown[: reading.num_given]] == [app.GIVEN] * reading.num_given
    assert [place for place, (_, label) in enumerate(shown) if label == app.CHOSEN] == [position]
    probability = reading.trace.log_probability[0, -2].exp().item()
    upper = app.PROBABILITIES[shown[-1][1]]
    assert probability < upper and all(bound <= probability or bound >= upper for bound in app.PROBABILITIES.values())
    weights = reading.trace.weights[1, 0, 2, position - 1, :position].tolist()
    for weight, (_, label) in zip(weights, app.weighted_text(reading, position, 1, "contextual", 2), strict=True):
        assert (label is None) == (weight < 0.01) and (label is None or weight < app.WEIGHTS[label])
    assert {label for _, label in app.weighted_text(reading, position, 1, "persistent", 2)} == {None}


def test_the_first_tokens_are_shown_too(reading):
    text, why, rows, sentence, weighted = app.show_token(reading, 0)
    assert len(text) == len(reading.tokens) and "Nothing came before it" in why
    assert (rows, sentence, weighted) == ([], "", [])
    *_, rows, sentence, weighted = app.show_token(reading, 1)
    assert "one token makes no pair" in sentence and [label for _, label in weighted] == [None]
    assert [row[4:] for row in rows if row[2] == "contextual"] == [[""] * 3] * app.UNITS_OF_A_KIND


def test_text_is_escaped_and_what_cannot_be_seen_is_shown(parts):
    reading, _ = app.write(*parts, "<b>a</b> & é🙂\n\n\t  x", 3, 1.0, 0)
    tokens = [token for token, _ in app.coloured_text(reading, 1)]
    assert "↵\n" in tokens and any("\ufffd" in token for token in tokens)
    assert app.visible(" \t") == " ⇥" and app.visible("  ") == "␣␣" and app.visible(" a") == " a"
    for position in range(len(tokens)):
        _, why, rows, sentence, _ = app.show_token(reading, position)
        page = why + sentence + "".join(cell for row in rows for cell in row[4:])
        assert not re.search(r"<(?!/?(p|b|div|span|u|s)\b)", page)
        assert not re.search(r"&(?!(amp|lt|gt|quot|#x27);)", page)
    assert "&lt;" in "".join(app.show_token(reading, place)[1] for place in range(4))


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
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_persistent_slots": 1704}
    values = {"result": {"parameters": 2_606_952, "architecture": sizes}, "gradio_version": "6.31.0"}
    card = environment.get_template("README.md.jinja").render(repo_id="someone/some-mosaic", **values)
    _, metadata, body = card.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["sdk"] == "gradio" and metadata["sdk_version"] == "6.31.0" and metadata["license"] == "apache-2.0"
    assert metadata["models"] == ["someone/some-mosaic"] and (APP.parent / metadata["app_file"]).is_file()
    assert len(metadata["short_description"]) <= 60 and isinstance(metadata["python_version"], str)
    assert "2,606,952 parameters" in body and "1,704 pairs" in body


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
        assert "Bella" in "".join(visitor.tokens())
        yield visitor
        # No error appeared, and the page has requested nothing from another server.
        assert browser.get_log("browser") == []
        assert all(url.startswith((address, "data:", "blob:")) for url in requested(browser))


def test_a_visitor_sees_why_a_token_came(visitor):
    visitor.continue_text("")
    visitor.wait_for(lambda: "The beginning is empty" in visitor.texts("#note")[0])
    visitor.continue_text(BEGINNING)
    visitor.wait_for(lambda: "".join(visitor.tokens()).replace(" ", "").startswith(BEGINNING.replace(" ", "")))
    assert visitor.texts("#note") == [""] and len(visitor.tokens()) > 40

    before = visitor.texts("#why")
    visitor.click("#text .token", -5)
    visitor.wait_for(lambda: visitor.texts("#why") != before)
    assert re.search(r"\d+%\s+persistent share", visitor.texts("#why")[0]) and len(visitor.texts("#why .part")) == 3
    kinds = visitor.texts("#table [data-col='2'].body-cell")
    assert sorted(kinds) == ["contextual"] * app.UNITS_OF_A_KIND + ["persistent"] * app.UNITS_OF_A_KIND
    for kind, recalled in zip(kinds, visitor.texts("#table [data-col='4'].body-cell"), strict=True):
        assert re.match(r"\d+% slot \d+ →" if kind == "persistent" else r"\d+% \d+: .*→", recalled)


def test_a_memory_that_is_chosen_colours_the_text(visitor):
    kinds = visitor.texts("#table [data-col='2'].body-cell")
    contextual = [row for row, kind in enumerate(kinds) if kind == "contextual"]
    seen = []
    for row in (contextual[-1], kinds.index("persistent"), contextual[0]):
        layer, head = (visitor.texts(f"#table [data-testid='cell-{row}-{column}']")[0] for column in (1, 3))
        visitor.click(f"#table [data-testid='cell-{row}-2']")
        name = f"Layer {layer}, {kinds[row]} memory {head} "
        visitor.wait_for(lambda name=name: name in visitor.texts("#recalled")[0])
        seen.append(visitor.colours())
    last, persistent, first = seen
    assert len(set(persistent)) == 1 < len(set(first)) and len(set(last)) > 1
    assert first != last and len(first) == len(visitor.tokens()) - 1


def test_visitors_share_nothing(visitor, address):
    visitor.browser.switch_to.new_window("tab")
    visitor.browser.get(address)
    visitor.wait_for(visitor.colours_now)
    visitor.continue_text(BEGINNING)
    visitor.wait_for(lambda: "Bella" not in "".join(visitor.tokens()))
    visitor.browser.switch_to.window(visitor.browser.window_handles[0])
    shown = visitor.tokens()
    visitor.click("#text .token", 3)
    visitor.wait_for(lambda: visitor.texts("#why .chosen")[0] == shown[3])
    assert visitor.tokens() == shown

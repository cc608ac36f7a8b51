# SPDX-License-Identifier: Apache-2.0
"""The page of the Space shows what the model did, in a real browser and without a network."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
import yaml
from conftest import make_model
from selenium.webdriver.common.keys import Keys
from transformers import GPT2Config, GPT2LMHeadModel

from hub_cards.space import app
from hub_cards.space.screenshot import APP, BROWSER, DRIVER, browse, find, requested, serve, wait_for
from modeling_memory_mosaic import MemoryMosaicForSequenceClassification, trace_tokens
from training.tokenizer import train_tokenizer


CLONE = APP.parents[2]
STORIES = ["Once upon a time there was a cat. One day, the cat saw a <b>ball</b> & a dog.\nThe end."] * 3
BEGINNING = "Once upon a time there was a cat. One day"


def make_parts():
    """A model and its tokenizer, which knows no character of more than one byte."""
    tokenizer = train_tokenizer(STORIES, vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return make_model(vocab_size=len(tokenizer), num_persistent_slots=7, **ids), tokenizer


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def reading(parts):
    return app.write(*parts, BEGINNING, 12, 1.0, 0)[0]


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """Of the Space as it is uploaded: the package and the model beside the app."""
    folder = tmp_path_factory.mktemp("space")
    shutil.copy(APP, folder)
    shutil.copytree(CLONE / "modeling_memory_mosaic", folder / "modeling_memory_mosaic")
    for part in parts:
        part.save_pretrained(folder / "model")
    return folder


def test_a_text_is_written_once_and_traced_as_a_whole(parts, reading):
    model, tokenizer = parts
    given = tokenizer(BEGINNING, return_tensors="pt").input_ids
    assert reading.num_given == given.shape[1] and "".join(reading.tokens).startswith(BEGINNING)
    assert len(reading.tokens) == given.shape[1] + 12
    ids = torch.cat([given, torch.tensor([tokenizer("".join(reading.tokens[given.shape[1] :])).input_ids])], dim=1)
    if ids.shape[1] == len(reading.tokens) and [tokenizer.decode([token]) for token in ids[0]] == reading.tokens:
        torch.testing.assert_close(reading.trace.logit, trace_tokens(model, ids).logit, equal_nan=True)


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
    ("settings", "told"),
    [
        ((" \n", 5, 1.0, 0), "The beginning is empty"),
        ((BEGINNING, None, 1.0, 0), "A number is missing"),
        ((BEGINNING, 5, 1.0, None), "A number is missing"),
        ((BEGINNING, 0, 1.0, 0), "1 to 100 new tokens"),
        ((BEGINNING, 101, 1.0, 0), "1 to 100 new tokens"),
        ((BEGINNING, 5, -1.0, 0), "at a temperature from 0 on"),
    ],
    ids=["empty", "no number of tokens", "no seed", "no token", "too many", "cold"],
)
def test_what_cannot_be_written_is_told(parts, settings, told):
    with pytest.raises(ValueError, match=told):
        app.write(*parts, *settings)


def test_of_a_long_beginning_the_end_is_read_and_that_is_told(parts):
    model, tokenizer = parts
    text = "a cat. " * 200
    num_tokens = len(tokenizer(text).input_ids)
    reading, told = app.write(model, tokenizer, text, 2, 0, 0)
    assert reading.num_given == app.MOST_GIVEN_TOKENS and "".join(reading.tokens[:128]) in text
    assert told == f"The beginning has {num_tokens} tokens; the model read the last {app.MOST_GIVEN_TOKENS} of them."
    assert app.write(model, tokenizer, BEGINNING, 2, 0, 0)[1] == ""


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
    position, said = len(reading.tokens) - 1, reading.trace.contribution[:, :, 0, :, -2]
    units = app.strongest_units(reading, position)
    assert [unit.contribution for unit in units] == sorted((unit.contribution for unit in units), reverse=True)
    for index, kind in enumerate(app.KINDS):
        own = [unit for unit in units if unit.kind == kind]
        strongest = said[:, index].abs().flatten().sort(descending=True).values[: app.UNITS_OF_A_KIND]
        assert sorted((abs(unit.contribution) for unit in own), reverse=True) == strongest.tolist()
    for unit, row in zip(units, app.table_rows(reading, units), strict=True):
        assert row[:4] == [f"{unit.contribution:+.2f}", unit.layer, unit.kind, unit.head]
        assert unit.contribution == said[unit.layer, app.KINDS.index(unit.kind), unit.head].item()
        for (place, weight), shown in zip(unit.recalled, row[4:], strict=False):
            assert f"<b>{weight:.0%}</b>" in shown
            if unit.kind == "contextual":
                assert weight == reading.trace.weights[unit.layer, 0, unit.head, position - 1, place].item()
                pair = [f"<u>{html.escape(token)}</u>" for token in reading.tokens[place - 1 : place + 1]]
                assert f"{place}: <s>" in shown and shown.endswith(" → ".join(pair).replace("\n", "↵") + "</span>")
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
    if kind == "GPT-2":
        GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    elif kind == "classifier":
        MemoryMosaicForSequenceClassification(make_model().config).save_pretrained(folder)
    elif kind == "model without a tokenizer":
        make_model().save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("nothing", "no model was found there .* Pass a folder"),
        ("GPT-2", "GPT2LMHeadModel of type gpt2 was found there, .* Pass a folder"),
        ("classifier", "MemoryMosaicForSequenceClassification of type memory_mosaic was found there"),
        ("model without a tokenizer", "has no tokenizer beside it"),
    ],
)
def test_what_is_no_memory_mosaic_is_refused(tmp_path, kind, told):
    save_other(kind, tmp_path)
    with pytest.raises(ValueError, match=told):
        app.load(str(tmp_path))


def test_the_app_refuses_in_one_line(tmp_path):
    save_other("GPT-2", tmp_path)
    process = subprocess.run(
        [sys.executable, str(APP), str(tmp_path)], capture_output=True, text=True, cwd=CLONE, env=clone_environment()
    )
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith(f"{tmp_path}: GPT2LMHeadModel of type gpt2 was found there")

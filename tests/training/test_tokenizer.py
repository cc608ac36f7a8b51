# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: what is trained comes back exactly, what is loaded is completed without growing."""

import json
import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from training.text.story_writer import write_stories
from training.text.tokenizer import load_tokenizer, train_tokenizer


GPT2 = Path(__file__).resolve().parents[2] / "../shared/data/gpt2-tokenizer"


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(write_stories(1000), 512)


@pytest.fixture
def saved(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    return tmp_path


def _edit(path, **changes):
    content = json.loads(path.read_text())
    content = {name: value for name, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(content))


def _forget(folder, *tokens):
    """Take special tokens out of the folder's configuration, but not out of its vocabulary."""
    _edit(folder / "tokenizer_config.json", **dict.fromkeys(tokens))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two before, two after  ",
        "line\n\n\tend \r\n",
        "don 't move the space . Nor this , please !",
        "naïve café, Füße, 你好, привет",
        "\U0001f600 \u200d e\u0301 \ufeff \x00 \x7f",
        "0123456789 <|endoftext|> <|pad|> <|end",
    ],
)
def test_any_text_comes_back(trained, text):
    assert trained.decode(trained(text)["input_ids"]) == text


def test_stories_come_back_in_fewer_tokens(trained):
    for story in write_stories(20, seed=1):
        ids = trained(story)["input_ids"]
        assert trained.decode(ids) == story
        assert len(ids) < len(story) / 2


def test_special_tokens_count_within_the_size(trained):
    assert len(trained) == trained.vocab_size == 512
    assert trained.bos_token_id == trained.eos_token_id != trained.pad_token_id
    assert max(trained.get_vocab().values()) == 511
    assert trained("a<|endoftext|>b")["input_ids"].count(trained.eos_token_id) == 1


def test_nothing_is_added_unasked(trained):
    assert trained("tree")["input_ids"] != trained(" tree")["input_ids"]
    assert trained.eos_token_id not in trained("tree")["input_ids"]


def test_pads_on_the_left(trained):
    batch = trained(["One.", "One day, a fox."], padding=True)
    assert batch["input_ids"][0][0] == trained.pad_token_id
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


def test_training_is_deterministic(trained):
    again = train_tokenizer((story for story in write_stories(1000)), 512)
    assert _model(again) == _model(trained)


def _model(tokenizer):
    """Vocabulary and merges; the rest of the backend's state remembers how it was called last."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def test_saved_and_loaded_is_the_same(trained, saved):
    loaded = load_tokenizer(str(saved))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert _model(loaded) == _model(trained)
    assert loaded.special_tokens_map == trained.special_tokens_map
    assert loaded.padding_side == "left"
    text = "  Lily's dog , don 't \n<|endoftext|> 你"
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_a_small_corpus_gives_a_smaller_vocabulary():
    tokenizer = train_tokenizer(["hello hello hello"], 4096)
    assert 258 < len(tokenizer) < 300
    assert len(tokenizer(" hello")["input_ids"]) == 1


def test_bytes_alone_can_be_asked_for():
    tokenizer = train_tokenizer([], 258)
    assert len(tokenizer) == 258
    assert len(tokenizer("fox")["input_ids"]) == 3


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "nothing could be learnt for a vocabulary of 300"),
        (["abcdef"], 300, "nothing could be learnt"),
        (["aa aa"], 257, "vocab_size is 257.*need 258"),
        ("one long text", 300, r"give \[text\]"),
    ],
)
def test_training_mistakes_are_explained(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocab_size)


@pytest.mark.parametrize(("missing", "other"), [("bos_token", "eos_token"), ("eos_token", "bos_token")])
def test_bos_and_eos_stand_in_for_each_other(saved, missing, other):
    _forget(saved, missing)
    loaded = load_tokenizer(str(saved))
    assert getattr(loaded, missing) == getattr(loaded, other) == "<|endoftext|>"
    assert len(loaded) == 512


def test_neither_bos_nor_eos_is_an_error(saved):
    _forget(saved, "bos_token", "eos_token")
    with pytest.raises(ValueError, match="neither bos nor eos"):
        load_tokenizer(str(saved))


def test_a_special_token_made_for_padding_is_found(saved, caplog):
    _forget(saved, "pad_token")
    loaded = load_tokenizer(str(saved))
    assert loaded.pad_token == "<|pad|>"
    assert len(loaded) == 512
    assert not caplog.records


def test_without_one_the_eos_pads_with_a_warning(saved, caplog):
    _forget(saved, "pad_token")
    backend = json.loads((saved / "tokenizer.json").read_text())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] != "<|pad|>"]
    (saved / "tokenizer.json").write_text(json.dumps(backend))
    with caplog.at_level(logging.WARNING, logger="training.text.tokenizer"):
        loaded = load_tokenizer(str(saved))
    assert loaded.pad_token_id == loaded.eos_token_id
    assert len(loaded) == 512
    assert "no token for padding" in caplog.text


def test_what_is_no_tokenizer_is_an_error(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "missing"), "nobody/nothing"):
        with pytest.raises(ValueError, match=f"cannot load the tokenizer '{name}'"):
            load_tokenizer(name)


@pytest.mark.skipif(not GPT2.is_dir(), reason="the GPT-2 tokenizer is not at ../shared/data/gpt2-tokenizer")
def test_gpt2_loads_without_growing():
    tokenizer = load_tokenizer(str(GPT2))
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 50256
    assert tokenizer("Once upon a time")["input_ids"] == [7454, 2402, 257, 640]
    text = " don 't , \n\n 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

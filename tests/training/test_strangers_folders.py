# SPDX-License-Identifier: Apache-2.0
"""A folder of unknown origin is loaded without running its code, and its faults are messages."""

import json
import pickle
import shutil

import pytest
import torch
from helpers.models import make_model

from training.evaluate import load_causal_lm
from training.text.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_model(vocab_size=300).save_pretrained(folder)
    train_tokenizer(["a dog ran. a dog sat."] * 9, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


class Harm:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was executed')",))


def code_of_its_own(name, **settings):
    """Return a change that adds a module to a folder, and settings that ask to run it."""

    def change(folder):
        edit(folder, name, **settings)
        (folder / "harm.py").write_text("raise SystemExit('code was executed')")

    return change


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(write):
    def change(folder):
        (folder / "model.safetensors").unlink()
        write(folder / "pytorch_model.bin")

    return change


OWN_TOKENIZER = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["harm.T", None]}}
AUTO = {"AutoConfig": "harm.C", "AutoModelForCausalLM": "harm.M"}
MODELS = {
    "code": (code_of_its_own("config.json", model_type="harm", auto_map=AUTO), "custom code"),
    "pickle": (pickled(lambda path: torch.save({"model.norm.weight": Harm()}, path)), "a pickle that holds more than"),
    "raw-pickle": (
        pickled(lambda path: path.write_bytes(pickle.dumps(Harm(), protocol=2))),
        "a pickle that holds more than",
    ),
    "deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "describes no model"),
    "text": (lambda f: edit(f, "config.json", num_hidden_layers="many"), "describes no model"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "describes no model|config.json"),
    "cut-off": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 99), "the weights in .* are damaged"),
}
TOKENIZERS = {
    "code": code_of_its_own(
        "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["harm.T", None]}
    ),
    "deep": lambda f: (f / "tokenizer.json").write_text("[" * 100_000),
    "odd": lambda f: (f / "tokenizer.json").write_text('{"a": 1}'),
    "list": lambda f: (f / "tokenizer.json").write_text("[]"),
    "cut-off": lambda f: (f / "tokenizer.json").write_text('{"model": {"type"'),
    "list-of-settings": lambda f: (f / "tokenizer_config.json").write_text("[]"),
}


@pytest.mark.parametrize("harm", MODELS)
def test_a_strangers_model_is_loaded_safely_or_refused(copy, harm, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("a question was asked"))
    change, message = MODELS[harm]
    assert load_causal_lm(copy)
    change(copy)
    with pytest.raises(ValueError, match=message) as error:
        load_causal_lm(copy)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("harm", TOKENIZERS)
def test_a_strangers_tokenizer_is_loaded_safely_or_refused(copy, harm, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("a question was asked"))
    assert load_tokenizer(str(copy))
    TOKENIZERS[harm](copy)
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(str(copy))

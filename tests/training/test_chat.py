# SPDX-License-Identifier: Apache-2.0
"""A text in turns: the model goes on behind all of it, and what is stored is a memory of it."""

import pytest
import torch
from helpers.models import make_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from modeling_memory_mosaic import MosaicMemory
from training.commands.chat import HELP, Chat, talk
from training.evaluate import load_model
from training.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a mosaic and of a Llama, untrained, with a tokenizer."""
    tokenizer = train_tokenizer(["once upon a time there was a little cat"] * 9, 280)
    set_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {"llama": LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes))}
    models["mosaic"] = make_model(vocab_size=len(tokenizer))
    found = {}
    for name, model in models.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("kind", ["mosaic", "llama"])
def test_each_turn_goes_on_behind_all_that_was_written(folders, kind, capsys):
    chat = Chat(*load_model(folders[kind]), max_new_tokens=5, temperature=0, seed=0)
    for line in ("once upon", " a time", " there"):
        before = chat.ids
        answer = chat.answer(line)
        assert answer in capsys.readouterr().out
        new = chat.tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"]
        read = torch.cat([before, new], dim=1)
        expected = chat.model.generate(read, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(chat.ids, expected)


def test_a_stored_text_is_what_the_model_reads_in_it(folders, tmp_path):
    chat = Chat(*load_model(folders["mosaic"]), max_new_tokens=5, temperature=0.8, seed=0)
    assert "no memory yet" in str(pytest.raises(ValueError, chat.do, "/memory").value)
    chat.answer("once upon a time")
    assert chat.do("/memory").startswith(f"{chat.ids.shape[1]} tokens, {chat.ids.shape[1] - 1} pairs in each head")
    assert str(tmp_path / "memory") in chat.do(f"/memory {tmp_path / 'memory'}")
    memory = MosaicMemory.from_pretrained(tmp_path / "memory", chat.model)
    assert memory.input_ids.tolist() == chat.ids[0].tolist()
    with pytest.raises(ValueError, match="exists already"):
        chat.do(f"/memory {tmp_path / 'memory'}")
    assert chat.do("/new") == "all forgotten" and chat.ids.shape == (1, 0) and chat.cache is None


def test_special_tokens_that_are_typed_are_text(folders):
    chat = Chat(*load_model(folders["mosaic"]), max_new_tokens=2, temperature=0, seed=0)
    chat.answer("<|endoftext|>")
    typed = chat.ids[0, :-2].tolist()
    assert len(typed) > 1 and chat.tokenizer.eos_token_id not in typed


def test_a_seed_gives_the_same_text(folders):
    texts = [Chat(*load_model(folders["mosaic"]), 8, 1.0, seed).answer("once") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_lines_are_read_until_the_end(folders, capsys):
    def typed(*lines):
        rest = iter(lines)

        def read_line(prompt):
            line = next(rest, None)
            if line is None:
                raise EOFError
            return line

        return read_line

    chat = Chat(*load_model(folders["llama"]), 3, 0, 0)
    talk(chat, typed("once upon", "", "/memory", "/what", "/new now"))
    printed = capsys.readouterr()
    assert "the model is a llama: only Memory Mosaics have a memory to keep" in printed.err
    assert printed.out.count(HELP) == 3 and chat.ids.shape[1] > 3
    talk(chat, typed("/new", "/quit", "once"))
    assert chat.ids.shape == (1, 0)

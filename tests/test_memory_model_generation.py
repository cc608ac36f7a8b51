# SPDX-License-Identifier: Apache-2.0
"""Memory models generate: finished chunks turn into memories as the text grows, whatever the way of decoding."""

import pytest
import torch
from conftest import make_ids
from kinds import BACKBONES, LENGTH, VOCAB_SIZE, make_memory_model
from safetensors.torch import load_file, save_file
from test_memory_model import READS
from transformers import TextStreamer, pipeline, set_seed

from training.tokenizer import train_tokenizer


GREEDY = {"do_sample": False, "max_new_tokens": 13, "pad_token_id": 0}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}


def generate(model, inputs, **settings):
    set_seed(0)
    inputs = {
        "attention_mask": torch.ones_like(inputs["input_ids"])
    } | inputs  # else ids like the pad's would be masked
    return model.generate(**inputs, **GREEDY | settings)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*READS, "llama", "gpt2", "mixed"])
def test_a_cache_changes_nothing(kind, way):
    encoder, decoder = BACKBONES.get(kind, BACKBONES["mosaic"])
    model = make_memory_model(encoder=encoder, decoder=decoder, **READS.get(kind, {}))
    inputs = {"input_ids": make_ids(2, 8, vocab_size=VOCAB_SIZE)}
    texts = generate(model, inputs, **WAYS[way])
    assert texts.shape[1] == 8 + 13
    assert torch.equal(texts, generate(model, inputs, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_row_of_a_padded_batch_is_the_prompt_alone(way):
    model = make_memory_model()
    prompts = [make_ids(1, length, seed=length, vocab_size=VOCAB_SIZE) for length in (13, 10, 4, 1)]
    padded = {
        "input_ids": torch.cat([torch.nn.functional.pad(p, (13 - p.shape[1], 0)) for p in prompts]),
        "attention_mask": torch.cat([torch.arange(13)[None] >= 13 - p.shape[1] for p in prompts]).long(),
    }
    texts = generate(model, padded, **WAYS[way])
    for text, prompt in zip(texts, prompts, strict=True):
        assert torch.equal(text[13:], generate(model, {"input_ids": prompt}, **WAYS[way])[0, prompt.shape[1] :])


@pytest.mark.parametrize("kind", [name for name in READS if name != "none"])
def test_what_decoding_keeps_is_bounded(kind, monkeypatch):
    model = make_memory_model(**READS[kind])
    held, read_on = [], type(model).read_on

    def watched(self, cache, *args):
        outputs = read_on(self, cache, *args)
        memories = cache.memory_mask.sum(-1).max().item()
        seen = min(memories, model.config.max_memories or memories)
        # Slots of the memories, the one that says what to do, and all tokens of a chunk but its last.
        assert cache.num_row_slots() <= seen * model.config.prefix_slots + LENGTH
        held.append((memories, cache.num_row_slots()))
        return outputs

    monkeypatch.setattr(type(model), "read_on", watched)
    generate(model, {"input_ids": make_ids(1, 7, vocab_size=VOCAB_SIZE)}, max_new_tokens=30)
    assert [memories for memories, _ in held] == [(7 + step) // LENGTH for step in range(30)]
    assert max(slots for _, slots in held) > LENGTH


@pytest.mark.parametrize("kind", [name for name in READS if name != "none"])
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_memories_are_computed_once_saved_and_read(kind, way, tmp_path):
    model = make_memory_model(**READS[kind])
    document = {"input_ids": make_ids(2, 18, vocab_size=VOCAB_SIZE)}
    expected = generate(model, document, **WAYS[way])[:, 18:]
    memories, rest = model.encode(**document)
    save_file(model.memories_state_dict(**memories), tmp_path / "memories.safetensors")
    loaded = model.memories_from_state_dict(load_file(tmp_path / "memories.safetensors"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in memories.items())
    assert torch.equal(generate(model, rest | loaded, **WAYS[way])[:, 3:], expected)
    assert torch.equal(generate(model, rest | loaded, use_cache=False, **WAYS[way])[:, 3:], expected)


def test_rounded_memories_take_a_byte_for_each_number():
    plain, rounded = make_memory_model(), make_memory_model(memory_quantization="fp8")
    ids = make_ids(1, 18, vocab_size=VOCAB_SIZE)
    sizes = []
    for model in (plain, rounded):
        tensors = model.memories_state_dict(**model.encode(ids)[0])
        sizes.append(sum(tensors[name].nbytes for name in ("memories", "scale") if name in tensors))
    assert sizes == [3 * 24 * 8, 3 * (24 + 4)]


@pytest.mark.parametrize(
    "other, message",
    [
        ({"seed": 1}, "of another encoder"),
        ({"chunk_length": 6}, "chunks of 5 tokens, but this model's chunk_length is 6"),
        ({"memory_size": 10}, "of another encoder"),
        ({"memory_quantization": "int8"}, "of another encoder"),
    ],
)
def test_memories_of_another_model_are_refused(other, message):
    model = make_memory_model()
    tensors = model.memories_state_dict(**model.encode(make_ids(1, 18, vocab_size=VOCAB_SIZE))[0])
    with pytest.raises(ValueError, match=message):
        make_memory_model(**other).memories_from_state_dict(tensors)
    with pytest.raises(ValueError, match=r"\['encoder'\] are missing"):
        model.memories_from_state_dict({name: t for name, t in tensors.items() if name != "encoder"})


def test_a_decoder_may_be_trained_on_and_its_memories_stay_valid():
    model = make_memory_model()
    tensors = model.memories_state_dict(**model.encode(make_ids(1, 18, vocab_size=VOCAB_SIZE))[0])
    with torch.no_grad():
        model.decoder.lm_head.weight.add_(1.0)
    model.memories_from_state_dict(tensors)


def test_the_pipeline_and_a_streamer_write_on(capsys):
    tokenizer = train_tokenizer(["Once upon a time there was a cat. The cat had a hat."] * 2, 262)
    vocabulary = {"vocab_size": len(tokenizer), "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    model = make_memory_model(encoder=vocabulary, decoder=vocabulary, dtype=torch.float32)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["Once upon a time", "The cat"]
    answers = [a[0]["generated_text"] for a in writer(prompts, max_new_tokens=9, do_sample=False, batch_size=2)]
    alone = [writer(p, max_new_tokens=9, do_sample=False)[0]["generated_text"] for p in prompts]
    assert answers == alone and all(a.startswith(p) for a, p in zip(answers, prompts, strict=True))
    inputs = tokenizer(prompts[0], return_tensors="pt")
    model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=9, do_sample=False)
    assert capsys.readouterr().out.strip() == answers[0].strip()


def test_assisted_decoding_is_refused():
    model = make_memory_model()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(
            model, {"input_ids": make_ids(1, 8, vocab_size=VOCAB_SIZE)}, assistant_model=make_memory_model(seed=1)
        )

# SPDX-License-Identifier: Apache-2.0
"""Memory models generate: with every way of decoding, finished chunks turn into memories as the text grows."""

import pytest
import torch
from helpers.kinds import ALL_BACKBONES, LENGTH, VOCAB_SIZE, make_memory_model
from helpers.memory_models import READS
from helpers.models import make_ids
from safetensors.torch import load_file, save_file
from transformers import set_seed

from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME


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
    } | inputs  # without a mask, ids equal to the pad's would be masked
    return model.generate(**inputs, **GREEDY | settings)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [*READS, "llama", "gpt2", "mixed", "narrowing"])
def test_a_cache_changes_nothing(kind, way):
    encoder, decoder = ALL_BACKBONES.get(kind, ALL_BACKBONES["mosaic"])
    model = make_memory_model(encoder=encoder, decoder=decoder, **READS.get(kind, {}))
    inputs = {"input_ids": make_ids(2, 8, vocab_size=VOCAB_SIZE)}
    texts = generate(model, inputs, **WAYS[way])
    assert texts.shape[1] == 8 + 13
    assert torch.equal(texts, generate(model, inputs, use_cache=False, **WAYS[way]))


@pytest.mark.parametrize("kind", [name for name in READS if name != "none"])
def test_what_decoding_keeps_is_bounded(kind, monkeypatch):
    model = make_memory_model(**READS[kind])
    held, continue_text = [], type(model).continue_text

    def watched(self, cache, *args):
        outputs = continue_text(self, cache, *args)
        memories = cache.memory_mask.sum(-1).max().item()
        seen = min(memories, model.config.max_memories or memories)
        # Slots of the memories, the task slot, and all tokens of a chunk but its last.
        assert cache.num_row_slots() <= seen * model.config.prefix_slots + LENGTH
        held.append((memories, cache.num_row_slots()))
        return outputs

    monkeypatch.setattr(type(model), "continue_text", watched)
    generate(model, {"input_ids": make_ids(1, 7, vocab_size=VOCAB_SIZE)}, max_new_tokens=30)
    assert [memories for memories, _ in held] == [(7 + step) // LENGTH for step in range(30)]
    # A read without slots keeps the open chunk alone.
    assert max(slots for _, slots in held) >= LENGTH + (model.config.prefix_slots > 0)


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


NOT_FINITE = {
    "nan": lambda memories: memories.index_fill(3, torch.tensor(2), float("nan")),
    "infinite": lambda memories: memories.index_fill(3, torch.tensor(2), float("inf")),
    "too large for float32": lambda memories: memories.double() * 1e300,
}
OF_ANOTHER_KIND = {
    "integers": lambda memories: memories.long(),
    "booleans": lambda memories: memories.bool(),
    "complex": lambda memories: memories.to(torch.complex64),
}


@pytest.mark.parametrize("wrong", [*NOT_FINITE, *OF_ANOTHER_KIND])
def test_memories_of_impossible_numbers_are_refused(wrong):
    model = make_memory_model(dtype=torch.float32)
    memories, rest = model.encode(make_ids(2, 18, vocab_size=VOCAB_SIZE))
    tensors = model.memories_state_dict(**memories)
    wrong = (NOT_FINITE | OF_ANOTHER_KIND)[wrong](memories["memories"])
    message = "memories are not finite|memories are torch.*floating-point numbers"
    for take in (
        lambda: model(**rest, **memories | {"memories": wrong}),
        lambda: model.generate(**rest, **memories | {"memories": wrong}, max_new_tokens=2),
        lambda: model.memories_from_state_dict(tensors | {"memories": wrong}),
    ):
        with pytest.raises(ValueError, match=message):
            take()


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(2, 3), "memory_mask is torch.float32"),
        (torch.full((2, 3), 2), "memory_mask must hold 1 and 0 only. Found: 2"),
        (torch.full((2, 3), -1), "Found: -1"),
        (torch.ones(2, 2, dtype=torch.bool), "memory_mask has shape"),
    ],
)
def test_a_memory_mask_of_another_meaning_is_refused(mask, message):
    model = make_memory_model()
    memories, rest = model.encode(make_ids(2, 18, vocab_size=VOCAB_SIZE))
    tensors = model.memories_state_dict(**memories)
    with pytest.raises(ValueError, match=message):
        model(**rest, **memories | {"memory_mask": mask})
    with pytest.raises(ValueError, match=message):
        model.memories_from_state_dict(tensors | {"memory_mask": mask})


def test_what_stands_at_absent_memories_may_be_anything():
    model = make_memory_model()
    memories, rest = model.encode(make_ids(2, 18, vocab_size=VOCAB_SIZE))
    memories["memory_mask"][1, 0] = False
    expected = model(**rest, **memories).logits
    memories["memories"][1, 0] = float("nan")
    assert torch.equal(model(**rest, **memories).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_memories_of_another_precision_are_converted(dtype):
    model = make_memory_model(dtype=torch.float32)
    memories, rest = model.encode(make_ids(2, 18, vocab_size=VOCAB_SIZE))
    tensors = model.memories_state_dict(**memories)
    other = memories["memories"].to(dtype)
    read = model.memories_from_state_dict(tensors | {"memories": other})
    assert read["memories"].dtype == torch.float32
    assert torch.equal(model(**rest, **read).logits, model(**rest, memories=other).logits)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors: tensors | {"memories": tensors["memories"].float()},
            "memories are torch.float32 with scales",
        ),
        (lambda tensors: {n: t for n, t in tensors.items() if n != "scale"}, r"of shape \(0,\)"),
        (lambda tensors: tensors | {"scale": tensors["scale"][:, :1]}, "with float32 scales of shape"),
        (lambda tensors: tensors | {"scale": tensors["scale"] * float("nan")}, "memories are not finite"),
    ],
)
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_stored_codes_that_no_encoder_wrote_are_refused(quantization, change, message):
    model = make_memory_model(memory_quantization=quantization)
    tensors = model.memories_state_dict(**model.encode(make_ids(2, 18, vocab_size=VOCAB_SIZE))[0])
    model.memories_from_state_dict(tensors)
    with pytest.raises(ValueError, match=message):
        model.memories_from_state_dict(change(tensors))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memories": torch.zeros(2, 0, 1, 24), "memory_mask": torch.zeros(2, 0)}, "holds none"),
        ({"chunk_length": torch.tensor([5, 5])}, r"chunks of \[5, 5\] tokens"),
        ({"encoder": torch.full((32,), -1.5)}, "of another encoder"),
    ],
)
def test_damaged_memories_are_refused(change, message):
    model = make_memory_model()
    tensors = model.memories_state_dict(**model.encode(make_ids(2, 18, vocab_size=VOCAB_SIZE))[0])
    with pytest.raises(ValueError, match=message):
        model.memories_from_state_dict(tensors | change)


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


def test_assisted_decoding_is_refused():
    model = make_memory_model()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(
            model, {"input_ids": make_ids(1, 8, vocab_size=VOCAB_SIZE)}, assistant_model=make_memory_model(seed=1)
        )


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("num_new", [1, 4, 7, 15])
@pytest.mark.parametrize("num_read", [1, 7])
def test_new_text_behind_a_cache_is_read_whole(num_read, num_new, num_beams):
    """The mask may cover the new text or all of it, and ids may be the whole text."""
    model = make_memory_model()
    past, new = (
        make_ids(2, num_read, vocab_size=VOCAB_SIZE - 1),
        make_ids(2, num_new, seed=1, vocab_size=VOCAB_SIZE - 1),
    )
    past_mask, new_mask = torch.ones_like(past), torch.ones_like(new)
    past_mask[0, : num_read // 3], new_mask[1, : num_new // 3] = 0, 0
    new = new.masked_fill(new_mask == 0, VOCAB_SIZE - 1)
    whole, mask = torch.cat([past, new], dim=1), torch.cat([past_mask, new_mask], dim=1)
    settings = GREEDY | {"max_new_tokens": 3, "pad_token_id": VOCAB_SIZE - 1, "num_beams": num_beams}
    expected = model.generate(whole, attention_mask=mask, **settings)
    for ids, given in ((new, None), (new, new_mask), (new, mask), (whole, mask)):
        with torch.no_grad():
            cache = model(past, attention_mask=past_mask, use_cache=True)[MEMORY_NAME]
        text = model.generate(ids, attention_mask=given, past_key_values=cache, **settings)
        assert torch.equal(text, expected[:, -text.shape[1] :]) and text.shape[1] == ids.shape[1] + 3


def test_what_a_cache_cannot_continue_is_refused():
    model = make_memory_model()
    ids = make_ids(2, 9, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        cache = model(ids, use_cache=True)[MEMORY_NAME]
        memories = {"memories": cache.memories, "memory_mask": cache.memory_mask}
        with pytest.raises(ValueError, match="Other weights wrote this memory"):
            make_memory_model(seed=1)(ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="memories come before a text"):
        model.generate(ids[:, :2], past_key_values=cache, **memories)
    with pytest.raises(ValueError, match="no new one is among them"):
        model.generate(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 rows, but 1 are passed"):
        model.generate(ids[:1, :3], past_key_values=cache)

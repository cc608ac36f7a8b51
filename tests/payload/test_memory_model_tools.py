# SPDX-License-Identifier: Apache-2.0
"""Memory models in tools: hidden states and maps, exported programs, metrics, TRL's trainer, new sizes."""

import pytest
import torch
from helpers.compiling import Compiles, make_inputs
from helpers.kinds import BACKBONES, LENGTH, LLAMA, MOSAIC, make_memory_model
from helpers.memory_models import READS
from helpers.models import make_ids
from helpers.tools import logged, sft
from torch.export import Dim, export
from transformers import AutoModel, LlamaConfig

from modeling_memory_mosaic import MemoryModelCache, MemoryModelConfig, MemoryModelEncoder, MemoryMosaicConfig
from training.text.tokenizer import train_tokenizer


def head_of(model, states):
    """Logits of the decoder's last hidden states."""
    return model.decoder.lm_head(states / getattr(model.config.decoder, "logits_scaling", 1.0))


# Hidden states and attention maps


@pytest.mark.parametrize("kind", [*READS, *BACKBONES])
@pytest.mark.parametrize("num_tokens", [3, 2 * LENGTH, 2 * LENGTH + 3])
def test_hidden_states_are_those_that_logits_are_made_of(kind, num_tokens):
    encoder, decoder = BACKBONES.get(kind, BACKBONES["mosaic"])
    model = make_memory_model(encoder=encoder, decoder=decoder, **READS.get(kind, {}))
    ids, mask = make_ids(2, num_tokens), torch.ones(2, num_tokens, dtype=torch.long)
    mask[0, : num_tokens // 2] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
    for asked in ({"use_cache": False}, {"use_cache": True}, {"labels": ids}):
        outputs = model(ids, attention_mask=mask, output_hidden_states=True, **asked)
        assert len(outputs.hidden_states) == 1 + decoder.num_hidden_layers
        assert {state.shape for state in outputs.hidden_states} == {(2, num_tokens, decoder.hidden_size)}
        torch.testing.assert_close(outputs.logits[mask == 1], expected, rtol=1e-9, atol=1e-9)
        last = head_of(model, outputs.hidden_states[-1][mask == 1])
        torch.testing.assert_close(last, expected, rtol=1e-9, atol=1e-9)
    assert model(ids, use_cache=False).hidden_states is None


def test_hidden_states_of_a_text_read_on_are_those_of_one_pass():
    model = make_memory_model()
    ids = make_ids(2, 17)
    expected = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    cache, begin = MemoryModelCache(), 0
    for end in (4, 6, 7, 15, 17):
        states = model(ids[:, begin:end], cache=cache, output_hidden_states=True).hidden_states
        for state, whole in zip(states, expected, strict=True):
            torch.testing.assert_close(state, whole[:, begin:end], rtol=1e-9, atol=1e-9)
        begin = end
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    steps = model.generate(
        ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, **options
    ).hidden_states
    assert [step[0].shape[1] for step in steps] == [17, 1, 1, 1]
    torch.testing.assert_close(steps[0][-1], expected[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decoder", [MOSAIC, LLAMA], ids=["mosaic", "llama"])
def test_maps_are_of_rows_whose_first_slots_are_memories(decoder):
    # Llama's eager attention takes its softmax in float32, where a mask made for float64 is infinite.
    model = make_memory_model(decoder=decoder, memory_read="prefix", dtype=torch.float32)
    model.set_attn_implementation("eager")
    ids = make_ids(2, 2 * LENGTH + 3)
    outputs = model(ids, output_attentions=True, use_cache=False)
    assert len(outputs.attentions) == decoder.num_hidden_layers
    num_slots = 2 + LENGTH  # two memories, the task slot, and all tokens of a chunk but its last
    for maps in outputs.attentions:
        assert maps.shape == (2, 3, decoder.num_attention_heads, num_slots, num_slots)
        absent = [maps[:, 0, ..., 2:, :2], maps[:, 1, ..., 1:, :1]]  # rows that have fewer memories
        assert not any(weights.any() for weights in absent) and maps[:, 2, ..., 2:, 0].all()
    cache = MemoryModelCache()
    model(ids, cache=cache)
    (maps, *_) = model(ids[:, :1], cache=cache, output_attentions=True).attentions
    assert maps.shape == (2, 1, decoder.num_attention_heads, 1, 2 + 1 + 4)


@pytest.mark.parametrize("pooling", ["summary", "last"])
def test_the_encoder_gives_its_backbones_states_within_each_chunk(pooling):
    model = make_memory_model(memory_pooling=pooling).encoder
    model.set_attn_implementation("eager")
    ids = make_ids(2, 2 * LENGTH + 1)
    width = LENGTH + (pooling == "summary")
    plain = model(ids)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert plain.hidden_states is None and torch.equal(plain.memories, outputs.memories)
    assert {state.shape for state in outputs.hidden_states} == {(2, 2, width, MOSAIC.hidden_size)}
    assert {state.shape for state in outputs.attentions} == {(2, 2, MOSAIC.num_attention_heads, width, width)}
    torch.testing.assert_close(outputs.hidden_states[-1][:, :, -1:], outputs.memories)


def test_what_the_configuration_asks_for_is_given_unless_the_caller_says_otherwise(tmp_path):
    model = make_memory_model(dtype=torch.float32)
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    ids = make_ids(2, 2 * LENGTH)
    for each, depth in ((model, 3), (model.encoder, 3)):
        outputs = each(ids)
        assert len(outputs.hidden_states) == depth and len(outputs.attentions) == depth - 1
        outputs = each(ids, output_hidden_states=False, output_attentions=False)
        assert outputs.hidden_states is None and outputs.attentions is None
    model.config.output_attentions = False
    model.save_pretrained(tmp_path)
    assert len(AutoModel.from_pretrained(tmp_path)(ids).hidden_states) == 3


def test_maps_that_sdpa_does_not_compute_are_none_at_all():
    outputs = make_memory_model()(make_ids(1, 2 * LENGTH), output_attentions=True)
    assert outputs.attentions == ()


def test_outputs_as_a_tuple_are_those_of_the_dictionary():
    model = make_memory_model()
    ids = make_ids(2, 2 * LENGTH)
    model.config.return_dict = False
    for each in (model, model.encoder):
        for value, expected in zip(each(ids), each(ids, return_dict=True).to_tuple(), strict=True):
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, expected)


# Exported and compiled

SHALLOW = MemoryMosaicConfig(**MOSAIC.to_dict() | {"num_hidden_layers": 1})

SLOW = [(kind, True) for kind in ("unrolled", "gated", "cross", "two vectors", "latest two", "none", "llama")] + [
    ("additive", False)
]


@pytest.mark.parametrize(
    "kind, masked", [("additive", True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_an_exported_program_serves_other_batches_and_lengths(kind, masked):
    encoder, decoder = BACKBONES.get(kind, (SHALLOW, SHALLOW))
    model = make_memory_model(encoder=encoder, decoder=decoder, **READS.get(kind, {}))
    inputs = make_inputs(2, 13, masked)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    program = export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for shape in ((2, 13), (3, 6), (4, 10), (2, 23), (3, 40)):
        inputs = make_inputs(*shape, masked)
        is_token = inputs.get("attention_mask", torch.ones(shape)) == 1
        expected = model(**inputs, use_cache=False).logits[is_token]
        torch.testing.assert_close(program(**inputs).logits[is_token], expected, rtol=1e-9, atol=1e-9)


def test_an_exported_encoder_serves_other_batches_and_lengths():
    model = make_memory_model().encoder
    inputs = make_inputs(2, 13, masked=True)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    program = export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for shape in ((2, 13), (3, 6), (4, 23)):
        inputs = make_inputs(*shape, masked=True)
        outputs, expected = program(**inputs), model(**inputs)
        num_chunks = expected.memories.shape[1]
        assert torch.equal(outputs.memory_mask[:, :num_chunks], expected.memory_mask)
        assert not outputs.memory_mask[:, num_chunks:].any()
        torch.testing.assert_close(outputs.memories[:, :num_chunks], expected.memories)


def test_a_program_that_keeps_a_cache_is_refused():
    with pytest.raises(ValueError, match="pass `use_cache=False`"):
        export(make_memory_model(), (), {"input_ids": make_ids(2, 13), "use_cache": True}, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["additive", "two vectors"])
def test_compiled_training_is_one_graph_that_serves_texts_of_any_length(kind):
    model = make_memory_model(encoder=SHALLOW, decoder=SHALLOW, dtype=torch.float32, **READS[kind]).train()
    backend = Compiles()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for num_tokens in (13, 10, 40, 4):
        inputs = make_inputs(2, num_tokens, masked=True)
        inputs["labels"] = inputs["input_ids"]
        compiled(**inputs).loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model(**inputs).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        model.zero_grad()
    assert backend.count <= 4


# Trainers


TEXTS = [("Once upon a time there was a cat. " * 3)[: 15 + 17 * index] for index in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Once upon a time there was a cat."] * 3, 262)


def make_writer(tokenizer, decoder=MemoryMosaicConfig, **settings):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    sizes |= {"attention_dropout": 0.0}
    encoder = MemoryMosaicConfig(**sizes, hidden_dropout=0.0)
    decoder = encoder if decoder is MemoryMosaicConfig else decoder(**sizes, intermediate_size=30)
    return make_memory_model(encoder=encoder, decoder=decoder, dtype=torch.float32, **settings)


@pytest.mark.parametrize("decoder", [MemoryMosaicConfig, LlamaConfig])
def test_sft_trains_the_whole_model_on_its_own_loss(decoder, tokenizer, tmp_path):
    model = make_writer(tokenizer, decoder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = sft(model, tokenizer, tmp_path, TEXTS)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert not batch["attention_mask"].all()
    first_loss = make_writer(tokenizer, decoder)(**batch).loss.item()
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(first_loss, rel=1e-5)
    assert logged(trainer)[-1] < first_loss
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


def test_sft_of_packed_documents_is_refused_with_the_reason(tokenizer, tmp_path):
    trainer = sft(make_writer(tokenizer), tokenizer, tmp_path, TEXTS, padding_free=True, max_length=None)
    with pytest.raises(ValueError, match="give each document a row of its own"):
        trainer.train()


def test_sft_of_other_objectives_is_refused_with_the_remedy(tokenizer, tmp_path):
    trainer = sft(make_writer(tokenizer, autoencoding_weight=1.0), tokenizer, tmp_path, TEXTS)
    with pytest.raises(ValueError, match="train with `transformers.Trainer`"):
        trainer.train()


# Sizes


def test_the_vocabulary_has_one_size_in_all_parts():
    config = MemoryModelConfig(encoder=MOSAIC, decoder=LLAMA)
    config.vocab_size = 90
    assert config.encoder.vocab_size == config.decoder.vocab_size == config.vocab_size == 90
    assert MemoryModelConfig(encoder=MOSAIC, decoder=LLAMA, vocab_size=90).encoder.vocab_size == 90
    model = make_memory_model()
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.vocab_size == model.config.encoder.vocab_size == model.decoder.lm_head.out_features == 70


def test_a_resized_encoder_is_saved_and_loaded(tmp_path):
    encoder = make_memory_model(dtype=torch.float32).encoder
    encoder.resize_token_embeddings(70, mean_resizing=False)
    encoder.save_pretrained(tmp_path)
    loaded = MemoryModelEncoder.from_pretrained(tmp_path)
    ids = make_ids(2, LENGTH, vocab_size=70)
    assert torch.equal(loaded.eval()(ids).memories, encoder(ids).memories)


def test_a_cache_says_that_it_cannot_be_cropped():
    assert MemoryModelCache().is_croppable is False

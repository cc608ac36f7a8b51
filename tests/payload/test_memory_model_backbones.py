# SPDX-License-Identifier: Apache-2.0
"""Memory models of language models that exist: each family as encoder and decoder, in every read, saved and loaded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.kinds import FAMILIES, GPT2, LENGTH, LLAMA, MOSAIC, VOCAB_SIZE
from helpers.memory_models import READS
from helpers.models import make_ids, randomize_parameters
from peft import LoraConfig, PeftModel, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, LlamaConfig, TorchAoConfig, pipeline

from modeling_memory_mosaic import MemoryModelForCausalLM
from modeling_memory_mosaic.backbones_memory_model import build_decoder
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from training.text.tokenizer import train_tokenizer


from_backbones = MemoryModelForCausalLM.from_backbones
by_family = pytest.mark.parametrize("family", FAMILIES)
# The reads that a comparison asks for, each with the settings that it needs.
NEW_READS = ("additive", "gated", "cross", "positions")


def pretrained(family, dtype=torch.float64, seed=0, **fields):
    """A small causal language model of a family, as if trained."""
    torch.manual_seed(seed)
    config = FAMILIES[family] if isinstance(family, str) else family
    model = build_decoder(type(config)(**config.to_dict() | fields))
    return randomize_parameters(model).to(dtype)


def made_of(encoder, decoder, read="cross", dtype=torch.float64, **settings):
    """A memory model of two families whose new weights are random too, those that begin at 0 included."""
    settings = READS[read] | {"memory_pooling": "last"} | settings
    model = from_backbones(pretrained(encoder, dtype), pretrained(decoder, dtype), chunk_length=LENGTH, **settings)
    randomize_parameters(model.reader)
    return model.eval()


def tolerances(model):
    """Mamba computes in float32 whatever its weights."""
    types = {model.config.encoder.model_type, model.config.decoder.model_type}
    tolerance = 1e-4 if types & {"mamba", "qwen3", "llama"} else 1e-9
    return {"rtol": tolerance, "atol": tolerance}


# Every family, every read


@pytest.fixture(params=[(family, family) for family in FAMILIES] + [("mamba", "llama"), ("gpt2", "mamba")], ids=str)
def families(request):
    return request.param


@pytest.mark.parametrize("read", NEW_READS)
def test_rows_of_a_ragged_batch_are_the_rows_alone_in_any_pieces(families, read):
    model = made_of(*families, read)
    lengths, width = [18, 11, 5, 2], 20
    rows = [make_ids(length, seed=length, vocab_size=VOCAB_SIZE) for length in lengths]
    ids, mask = make_ids(4, width, seed=9, vocab_size=VOCAB_SIZE), torch.zeros(4, width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = torch.randperm(width - 1, generator=torch.Generator().manual_seed(number))[: len(row) - 1] + 1
        place = torch.cat([torch.zeros(1, dtype=torch.long), place.sort().values])
        ids[number, place], mask[number, place] = row, 1
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache, pieces = None, []
    for begin, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
        outputs = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = outputs.get(MEMORY_NAME)
        pieces.append(outputs.logits)
    for logits in (whole, torch.cat(pieces, dim=1)):
        for number, row in enumerate(rows):
            alone = model(row[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[number][mask[number] == 1], alone, **tolerances(model))


@pytest.mark.parametrize("read", NEW_READS)
def test_no_prediction_depends_on_what_comes_later_and_every_memory_counts(families, read):
    model = made_of(*families, read)
    ids = make_ids(1, 18, vocab_size=VOCAB_SIZE)
    logits = model(ids, use_cache=False).logits[0]
    for position in (0, 4, 7, 16):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % VOCAB_SIZE
        difference = (model(other, use_cache=False).logits[0] - logits).abs().amax(-1)
        assert not (difference[:position] > 1e-5).any()
        assert difference[position] > 1e-6
        # The next chunk sees it through the memory.
        assert position == 16 or (difference[(position // LENGTH + 1) * LENGTH :] > 1e-6).any()


@by_family
def test_generation_with_a_cache_writes_what_reading_all_again_writes(family):
    model = made_of(family, family, "gated")
    ids = make_ids(2, 8, vocab_size=VOCAB_SIZE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0}
    for way in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        text = model.generate(ids, **options, **way)
        assert text.shape == (2, 16)
        assert torch.equal(text, model.generate(ids, use_cache=False, **options, **way))


@by_family
def test_a_read_that_begins_at_zero_leaves_the_decoder_as_it_is(family):
    """Before any training the predictions are those of the decoder behind its own begin token."""
    decoder = pretrained(family, bos_token_id=7)
    expected = copy.deepcopy(decoder)
    model = from_backbones(decoder=decoder, chunk_length=LENGTH, memory_read="cross_attention")
    ids = make_ids(2, 2 * LENGTH, vocab_size=VOCAB_SIZE)
    logits = model(ids, use_cache=False).logits
    for chunk in range(2):
        own = F.pad(ids[:, chunk * LENGTH : (chunk + 1) * LENGTH - 1], (1, 0), value=7)
        rows = expected(own).logits
        ours = logits[:, chunk * LENGTH : (chunk + 1) * LENGTH - 1]
        torch.testing.assert_close(ours, rows[:, 1:], rtol=1e-4, atol=1e-4)


# What is taken over


def test_weights_are_those_that_were_given(tmp_path):
    encoder, decoder = pretrained("gpt2", torch.float32), pretrained("llama", torch.float32, seed=1)
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        part.save_pretrained(tmp_path / name)
    model = from_backbones(tmp_path / "encoder", str(tmp_path / "decoder"), chunk_length=LENGTH)
    for mine, theirs in ((model.encoder.backbone, encoder.base_model), (model.decoder, decoder)):
        assert all(torch.equal(*pair) for pair in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert model.config.memory_size == GPT2.n_embd and model.reader.prefix_proj.out_features == LLAMA.hidden_size
    ids = make_ids(2, 2 * LENGTH + 1, vocab_size=VOCAB_SIZE)
    chunks = ids[:, : 2 * LENGTH].unflatten(1, (2, LENGTH))
    states = torch.stack([encoder.base_model(chunk).last_hidden_state[:, -1] for chunk in chunks])
    torch.testing.assert_close(model.encoder(ids).memories[:, :, 0], states)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("family", ["gpt2", "mamba", "mosaic"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_memories_of_a_layer_are_its_hidden_states(family, pooling):
    model = made_of(family, "mosaic", memory_pooling=pooling, encoder_layer=-2)
    ids = make_ids(3, LENGTH, vocab_size=VOCAB_SIZE)
    states = model.encoder.backbone(ids, output_hidden_states=True).hidden_states[-2]
    expected = states[:, -1] if pooling == "last" else states.mean(1)
    torch.testing.assert_close(model.encoder(ids).memories[:, 0, 0], expected, **tolerances(model))
    assert model.encoder(ids).hidden_states is None
    last = made_of(family, "mosaic", memory_pooling=pooling)
    assert model.encoder.fingerprint() != last.encoder.fingerprint()


def test_one_model_may_be_both_parts_with_weights_of_their_own():
    model = from_backbones(pretrained("gpt2"), chunk_length=LENGTH)
    tables = model.encoder.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(*tables) and tables[0] is not tables[1]
    new = from_backbones(
        encoder=pretrained("llama"), decoder=LlamaConfig(**LLAMA.to_dict() | {"dtype": "float64"}), chunk_length=4
    )
    assert type(new.decoder).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba", "mosaic"])
def test_one_token_table_serves_both_and_is_stored_once(family, tmp_path):
    model = from_backbones(pretrained(family, torch.float32), chunk_length=LENGTH, tie_encoder_embeddings=True)

    def is_shared(model):
        return model.encoder.get_input_embeddings().weight is model.get_input_embeddings().weight

    assert is_shared(model)
    assert model.num_parameters() < from_backbones(pretrained(family), chunk_length=LENGTH).num_parameters()
    model.save_pretrained(tmp_path)
    loaded, report = MemoryModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and is_shared(loaded)
    ids = make_ids(2, 2 * LENGTH + 2, vocab_size=VOCAB_SIZE)
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    encoder, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(encoder(ids).memories, model.encoder(ids).memories)
    loaded.resize_token_embeddings(VOCAB_SIZE + 3, mean_resizing=False)
    assert is_shared(loaded) and loaded.encoder.config.vocab_size == VOCAB_SIZE + 3
    with pytest.raises(ValueError, match="make the model with tables of their own"):
        loaded.reset_decoder()


@by_family
def test_a_saved_model_is_the_same_model(family, tmp_path):
    model = made_of(family, family, "gated", torch.float32, freeze_decoder=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = make_ids(2, 2 * LENGTH + 2, vocab_size=VOCAB_SIZE)
    assert torch.equal(loaded(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert not any(parameter.requires_grad for parameter in loaded.decoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.reader.parameters())
    assert loaded.encoder.fingerprint() == model.encoder.fingerprint()


def test_generation_ends_and_pads_as_the_decoder_does():
    decoder = pretrained("llama", eos_token_id=5, pad_token_id=6)
    decoder.generation_config.eos_token_id = [5, 9]
    model = from_backbones(decoder=decoder, chunk_length=LENGTH)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([5, 9], 6)


# Training: frozen, whole, LoRA


@pytest.mark.parametrize("trained", [{"freeze_encoder": True}, {"freeze_decoder": True}, {}], ids=str)
def test_only_what_is_not_frozen_learns(trained):
    model = made_of("gpt2", "llama", "gated", torch.float32, autoencoding_weight=1.0, **trained).train()
    before = copy.deepcopy(model.state_dict())
    ids = make_ids(2, 4 * LENGTH, vocab_size=VOCAB_SIZE)
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    changed = {
        name.partition(".")[0] for name, new in model.state_dict().items() if not torch.equal(new, before[name])
    }
    assert changed == {"encoder", "reader", "decoder"} - {name.removeprefix("freeze_") for name in trained}


@pytest.mark.parametrize("family", ["gpt2", "qwen", "mamba"])
def test_lora_on_the_decoder_with_a_whole_reader_trains_saves_loads_and_merges(family, tmp_path):
    model = made_of(family, family, "gated", torch.float32, freeze_encoder=True)
    model.save_pretrained(tmp_path / "base")
    targets = {"gpt2": "c_attn", "qwen": "[qv]_proj", "mamba": "in_proj"}[family]
    options = {"init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    config = LoraConfig(target_modules=rf"decoder\..*\.{targets}", modules_to_save=["reader"], **options)
    adapted = get_peft_model(model, config).train()
    ids = make_ids(2, 3 * LENGTH, vocab_size=VOCAB_SIZE)
    adapted(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in moved) and any("reader.modules_to_save" in name for name in moved)
    assert not any(".encoder." in name for name in moved)
    adapted.eval().save_pretrained(str(tmp_path / "adapter"))
    expected = adapted(input_ids=ids, use_cache=False).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    text = merged.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 3 * LENGTH + 4)


@by_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_generates(family, dtype):
    model = made_of(family, family, "gated", dtype).train()
    ids = make_ids(2, 3 * LENGTH + 1, vocab_size=VOCAB_SIZE)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.loss.isfinite() and outputs.memories.dtype == dtype
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    text = model.eval().generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 3 * LENGTH + 4)


# Tools


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_quantized_memory_model_answers_nearly_alike(family, tmp_path):
    model = made_of(family, family, "gated", torch.float32)
    model.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    ids = make_ids(2, 3 * LENGTH, vocab_size=VOCAB_SIZE)
    expected, ours = model(ids, use_cache=False).logits, quantized(ids, use_cache=False).logits
    assert (ours - expected).abs().mean() < 0.05 * expected.abs().mean()
    text = quantized.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 3 * LENGTH + 4)
    with pytest.raises(ValueError, match="The decoder is quantized: make the memory model of the model in full"):
        from_backbones(encoder=pretrained(family, torch.float32), decoder=quantized.decoder, chunk_length=LENGTH)


def test_a_pipeline_writes_with_it():
    tokenizer = train_tokenizer(["once upon a time"] * 9, 260)
    model = made_of("gpt2", "llama", "gated", torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (answer,) = write("once upon a time, once upon", max_new_tokens=9, do_sample=False)
    assert answer["generated_text"].startswith("once upon a time, once upon")


# What cannot be a part


def adapted_model():
    return get_peft_model(pretrained("llama"), LoraConfig(target_modules=["q_proj"])).base_model.model


def spread_model():
    model = pretrained("llama")
    model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    return model


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: {}, "Neither an encoder nor a decoder is given"),
        (lambda: {"encoder": pretrained("llama"), "decoder": pretrained(MOSAIC, vocab_size=7)}, "of one tokenizer"),
        (lambda: {"encoder": pretrained("llama").model}, "The encoder, a LlamaModel, is no causal language model"),
        (lambda: {"decoder": made_of("gpt2", "gpt2")}, "is a memory model itself"),
        (lambda: {"decoder": adapted_model()}, "has adapters of PEFT: merge them first"),
        (
            lambda: {"encoder": pretrained("llama", torch.float32), "decoder": pretrained("gpt2")},
            "The encoder's dtype is torch.float32 and the decoder's torch.float64: load both with one",
        ),
        (lambda: {"decoder": spread_model()}, "The decoder is spread over devices: load it on one"),
        (
            lambda: {"decoder": pretrained("gpt2"), "freeze_encoder": True, "memory_pooling": "summary"},
            "freeze_encoder=True, but memory_pooling='summary' adds new weights",
        ),
        (
            lambda: {"decoder": pretrained("gpt2"), "freeze_encoder": True, "memory_size": 4},
            "freeze_encoder=True, but memory_size=4 adds new weights",
        ),
    ],
)
def test_what_cannot_be_a_part_is_refused_with_a_remedy(parts, message):
    with pytest.raises(ValueError, match=message):
        from_backbones(**parts(), chunk_length=LENGTH)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("positions", "does not read a row behind padding as the row alone"),
        ("mask", "nor tokens without those behind them, nor a row in pieces"),
        ("embeddings", "does not read embeddings of tokens as it reads their ids"),
    ],
)
def test_a_model_that_reads_otherwise_is_refused(spoil, message, monkeypatch):
    model = pretrained("gpt2")
    body = model.transformer
    forward = body.forward

    def spoilt(input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, **options):
        if spoil == "positions":
            position_ids = None
        if spoil == "embeddings" and inputs_embeds is not None:
            inputs_embeds = 2 * inputs_embeds
        if spoil == "mask" and inputs_embeds is not None:
            inputs_embeds = inputs_embeds + inputs_embeds.mean(1, keepdim=True)
        return forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **options,
        )

    monkeypatch.setattr(body, "forward", spoilt)
    with pytest.raises(ValueError, match=message):
        from_backbones(decoder=model, chunk_length=LENGTH)


def test_different_tokenizers_of_one_size_are_refused(tmp_path):
    config = GPT2Config(**GPT2.to_dict() | {"vocab_size": 260})
    for name, text in (("one", "once upon a time"), ("other", "in a far land")):
        pretrained(config, torch.float32).save_pretrained(tmp_path / name)
        train_tokenizer([text] * 9, 260).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="have different tokenizers, but encoder and decoder read the same ids"):
        from_backbones(tmp_path / "one", tmp_path / "other", chunk_length=LENGTH)
    from_backbones(tmp_path / "one", tmp_path / "one", chunk_length=LENGTH)

# SPDX-License-Identifier: Apache-2.0
"""A saved memory model is the same model when it is loaded, and an adapted one trains only what it should."""

import pytest
import torch
from conftest import make_ids
from kinds import BACKBONES, VOCAB_SIZE, make_memory_model
from peft import LoraConfig, get_peft_model
from test_memory_model import all_weights
from transformers import AutoConfig

from modeling_memory_mosaic import MemoryModelForCausalLM, MemoryMosaicConfig
from training.export import export_model, verify_export
from training.tokenizer import train_tokenizer


def test_a_frozen_encoder_is_frozen_when_loaded(tmp_path):
    model = make_memory_model(dtype=torch.float32)
    model.freeze_encoder()
    model.save_pretrained(tmp_path)
    loaded = MemoryModelForCausalLM.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.decoder.parameters())


def test_a_backbone_may_be_described_by_a_dictionary():
    config = AutoConfig.for_model("memory_model", encoder={"hidden_size": 24, "num_attention_heads": 3})
    assert type(config.encoder) is type(config.decoder) is MemoryMosaicConfig
    assert (config.encoder.hidden_size, config.decoder.hidden_size) == (24, 768)
    assert config.memory_size == 24 and config.encoder is not config.decoder


@pytest.mark.parametrize("backbone", ["mosaic", pytest.param("llama", marks=pytest.mark.slow)])
def test_an_export_is_proven_in_a_clean_process(backbone, tmp_path):
    tokenizer = train_tokenizer(["once upon a time"] * 9, 260)
    encoder, decoder = BACKBONES[backbone]
    model = make_memory_model(encoder=encoder, decoder=decoder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for settings in (model.config, model.generation_config):
            setattr(settings, name, getattr(tokenizer, name))
    export_model(model, tokenizer, tmp_path / "model")
    texts = verify_export(tmp_path / "model", ["once upon"], max_new_tokens=9, model=model)
    assert texts[0].startswith("once upon")


def test_adapters_of_a_frozen_encoder_rest():
    model = make_memory_model(dtype=torch.float32, **all_weights(freeze_encoder=True))
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)).train()
    ids = make_ids(2, 15, vocab_size=VOCAB_SIZE)
    adapted(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert moved and all("lora" in name and ".encoder." not in name for name in moved)

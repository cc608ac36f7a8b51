# SPDX-License-Identifier: Apache-2.0
"""A saved memory model is the model, wherever it is loaded; Trainer, PEFT and checkpointing take it as any other."""

import pytest
import torch
from conftest import make_ids
from kinds import BACKBONES, VOCAB_SIZE, make_memory_model
from peft import LoraConfig, PeftModel, get_peft_model
from test_memory_model import all_weights
from transformers import AutoConfig, Trainer, TrainingArguments

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


def arguments(folder, **settings):
    defaults = {"use_cpu": True, "max_steps": 6, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(folder), **defaults | {"logging_steps": 1} | settings)


def test_trainer_trains_evaluates_and_resumes(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in make_ids(24, 15, vocab_size=5)]

    def trainer(folder, **settings):
        model = make_memory_model(dtype=torch.float32, **all_weights())
        return Trainer(model=model, args=arguments(folder, **settings), train_dataset=rows, eval_dataset=rows[:3])

    whole = trainer(tmp_path / "whole", save_steps=3)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    ids = torch.stack([row["input_ids"] for row in rows[:3]])
    with torch.no_grad():
        assert whole.evaluate()["eval_loss"] == pytest.approx(whole.model(ids, labels=ids).loss.item(), rel=1e-4)
    resumed = trainer(tmp_path / "whole", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_accumulated_gradients_equal_the_large_batch(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in make_ids(4, 15, vocab_size=VOCAB_SIZE)]
    weights = []
    for size, parts in ((4, 1), (1, 4)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        model = make_memory_model(**all_weights())
        options = arguments(tmp_path, **batch, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant")
        Trainer(model=model, args=options, train_dataset=rows).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-6, atol=1e-8, msg=name)


def test_lora_trains_saves_loads_and_merges(tmp_path):
    model = make_memory_model(dtype=torch.float32, **all_weights())
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["k_proj", "v_proj", "prefix_proj", "unroll_projs.0"])
    adapted = get_peft_model(model, config)
    ids = make_ids(2, 15, vocab_size=VOCAB_SIZE)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    before = adapted(input_ids=ids, labels=ids).loss.item()
    for _ in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    expected = adapted.eval()(input_ids=ids, labels=ids)
    assert expected.loss.item() < before
    adapted.save_pretrained(tmp_path / "adapter")
    base = MemoryModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected.logits)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected.logits, rtol=1e-4, atol=1e-4)
    text = merged.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (2, 19)


def test_a_backbone_may_be_described_by_a_dictionary():
    config = AutoConfig.for_model("memory_model", encoder={"hidden_size": 24, "num_attention_heads": 3})
    assert type(config.encoder) is type(config.decoder) is MemoryMosaicConfig
    assert (config.encoder.hidden_size, config.decoder.hidden_size) == (24, 768)
    assert config.memory_size == 24 and config.encoder is not config.decoder


@pytest.mark.parametrize("backbone", ["mosaic", "llama"])
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

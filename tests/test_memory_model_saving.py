# SPDX-License-Identifier: Apache-2.0
"""A saved memory model is the model, wherever it is loaded; Trainer, PEFT and checkpointing take it as any other."""

import json

import pytest
import torch
from conftest import checkpoint_activations, make_ids
from peft import LoraConfig, PeftModel, get_peft_model
from test_memory_model import BACKBONES, LLAMA, VOCAB_SIZE, all_weights, make_memory_model
from test_saving import run_clean
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_memory_mosaic import MemoryModelEncoder, MemoryModelForCausalLM, MemoryMosaicConfig
from training.export import export_model, verify_export
from training.tokenizer import train_tokenizer


PAYLOAD = {
    f"{kind}_memory_{name}.py" for kind in ("configuration", "cache", "modeling") for name in ("model", "mosaic")
} | {"adapters_memory_mosaic.py"}


@pytest.fixture(params=BACKBONES)
def model(request):
    encoder, decoder = BACKBONES[request.param]
    return make_memory_model(encoder=encoder, decoder=decoder, dtype=torch.float32, num_memory_embeddings=2)


@pytest.mark.parametrize("loader", [MemoryModelForCausalLM, AutoModelForCausalLM])
def test_every_parameter_survives_bitwise(model, loader, tmp_path):
    model.save_pretrained(tmp_path)
    loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = make_ids(2, 12, vocab_size=VOCAB_SIZE)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_the_encoder_alone_is_what_automodel_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = make_ids(2, 12, vocab_size=VOCAB_SIZE)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(encoder, MemoryModelEncoder)
    assert torch.equal(encoder(ids).memories, model(ids, use_cache=False).memories)
    encoder.save_pretrained(tmp_path / "encoder")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "encoder").eval()(ids).memories, encoder(ids).memories)


def test_settings_survive_and_tell_their_backbones(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == model.config.to_diff_dict()
    for part in ("encoder", "decoder"):
        assert type(getattr(config, part)) is type(getattr(model.config, part))
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_memory_model.MemoryModelConfig",
        "AutoModel": "modeling_memory_model.MemoryModelEncoder",
        "AutoModelForCausalLM": "modeling_memory_model.MemoryModelForCausalLM",
    }


@pytest.mark.parametrize("backbone", ["mosaic", "mixed"])
def test_remote_code_loads_everything_in_a_clean_process(backbone, tmp_path, request):
    encoder, decoder = BACKBONES[backbone]
    model = make_memory_model(encoder=encoder, decoder=decoder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    package = request.config.rootpath / "modeling_memory_mosaic"
    code = {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.py")}
    assert code == {name: (package / name).read_bytes() for name in PAYLOAD}
    ids = make_ids(2, 12, vocab_size=VOCAB_SIZE)
    text = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)
    expected = {"ids": ids, "logits": model(ids).logits, "text": text, "memories": model.encoder(ids).memories}
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, expected = sys.argv[1], torch.load(sys.argv[2])
for place in (folder, sys.argv[3] + "/again"):
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    text = model.generate(expected["ids"], max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(text, expected["text"])
    encoder = AutoModel.from_pretrained(place, trust_remote_code=True).eval()
    assert torch.equal(encoder(expected["ids"]).memories, expected["memories"])
    assert AutoConfig.from_pretrained(place, trust_remote_code=True).model_type == "memory_model"
    model.save_pretrained(sys.argv[3] + "/again")
sys.path.append(sys.argv[4])
import modeling_memory_mosaic
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model) is modeling_memory_mosaic.MemoryModelForCausalLM
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
"""
    root = str(request.config.rootpath)
    run_clean(script, str(tmp_path / "model"), str(tmp_path / "expected.pt"), str(tmp_path), root, str(tmp_path))


def test_both_token_tables_are_resized(model, tmp_path):
    model.resize_token_embeddings(VOCAB_SIZE + 4, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = MemoryModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == loaded.config.encoder.vocab_size == VOCAB_SIZE + 4
    ids = make_ids(1, 12, vocab_size=VOCAB_SIZE + 4)
    assert loaded.eval()(ids).logits.shape == (1, 12, VOCAB_SIZE + 4)


def test_a_frozen_encoder_is_frozen_when_loaded(tmp_path):
    model = make_memory_model(dtype=torch.float32)
    model.freeze_encoder()
    model.save_pretrained(tmp_path)
    loaded = MemoryModelForCausalLM.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.encoder.parameters())
    assert all(parameter.requires_grad for parameter in loaded.decoder.parameters())


def test_half_precision_is_kept_and_stays_finite(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = MemoryModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = make_ids(2, 12, vocab_size=VOCAB_SIZE)
    assert loaded(ids, labels=ids).loss.isfinite() and loaded(ids).logits.isfinite().all()


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


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(use_reentrant):
    ids, gradients = make_ids(2, 15, vocab_size=VOCAB_SIZE), []
    for checkpointed in (False, True):
        model = make_memory_model(decoder=LLAMA, **all_weights()).train()
        if checkpointed:
            checkpoint_activations(model, use_reentrant)
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


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


def test_a_saved_encoder_begins_a_whole_model(tmp_path):
    encoder = make_memory_model(dtype=torch.float32).encoder
    encoder.save_pretrained(tmp_path)
    whole, report = MemoryModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"reader", "decoder"}
    assert whole.encoder.fingerprint() == encoder.fingerprint()


def test_adapters_of_a_frozen_encoder_rest():
    model = make_memory_model(dtype=torch.float32, **all_weights(freeze_encoder=True))
    adapted = get_peft_model(model, LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)).train()
    ids = make_ids(2, 15, vocab_size=VOCAB_SIZE)
    adapted(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert moved and all("lora" in name and ".encoder." not in name for name in moved)

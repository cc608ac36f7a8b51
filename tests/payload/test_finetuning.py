# SPDX-License-Identifier: Apache-2.0
"""PEFT and plain Trainer on every kind of model."""

import pytest
import torch
from helpers.kinds import KINDS, MODELS, for_kinds, make_classifier
from helpers.models import make_ids, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments


PROJECTIONS = {"k_proj", "v_proj", "o_proj"}


def test_lora_attaches_to_every_projection_and_merges():
    model = make_model()
    ids = make_ids(2, 9)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    attached = [name for name, _ in adapted.named_modules() if name.endswith("lora_A.default")]
    assert len(attached) == model.config.num_hidden_layers * 5
    assert {name.split(".")[-3] for name in attached} == PROJECTIONS
    expected = adapted(ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)
    assert not torch.equal(make_model()(ids).logits, expected)


def test_lora_trains_the_slots_too():
    slots = ["persistent_memory.slot_keys", "persistent_memory.slot_values"]
    adapted = get_peft_model(make_model(), LoraConfig(target_modules=[], target_parameters=slots))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("lora" in name for name in trained)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT sets it for GPT-2's own layers
@for_kinds(*(name for name in KINDS if name != "continuous"))
def test_lora_trains_saves_loads_and_merges(kind, tmp_path):
    model = kind.make(**kind.objectives)
    model.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = kind.inputs(model, 2, 15)
    batch, plain = kind.with_labels(inputs), kind.answer(model, inputs)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    first = adapted(**batch).loss.item()
    for _ in range(3):
        adapted(**batch).loss.backward()
        optimizer.step()
    adapted.eval()
    assert adapted(**batch).loss.item() < first
    with adapted.disable_adapter():
        torch.testing.assert_close(kind.answer(adapted, inputs), plain)
    for name, tensor in adapted.base_model.model.state_dict().items():
        assert "lora_" in name or torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    expected = kind.answer(adapted, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(kind.auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(kind.answer(loaded, inputs), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(kind.answer(merged, inputs), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = kind.auto.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.state_dict().items())


def test_lora_of_complex_weights_is_refused():
    with pytest.raises(ValueError, match="ComplexLinear.* is not supported"):
        get_peft_model(KINDS["continuous"].make(), LoraConfig(target_modules=["k_proj"]))


def trainer_of(kind, folder, num_rows=8, length=15, model=None, **settings):
    """Return a plain `Trainer` on rows of whole chunks, whose ids are below 5, so that there is something to learn."""
    model = model or kind.make(**kind.objectives)
    inputs = kind.with_labels({name: tensor % 5 for name, tensor in kind.inputs(model, num_rows, length).items()})
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(num_rows)]
    defaults = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_steps": 1, "learning_rate": 1e-2}
    arguments = TrainingArguments(str(folder), **defaults | {"max_steps": 6} | settings)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3])


@for_kinds()
def test_trainer_evaluates_with_metrics(kind, tmp_path):
    """Trainer gathers answers only, in one array: no memory, no part of the loss."""
    seen = []

    def count(prediction):
        seen.append(prediction)
        return {"rows": len(prediction.predictions)}

    trainer = trainer_of(kind, tmp_path, per_device_eval_batch_size=2)
    trainer.compute_metrics = count
    metrics = trainer.evaluate()
    batch = trainer.data_collator(trainer.eval_dataset)
    with torch.no_grad():
        outputs = trainer.model(**batch, use_cache=False)
    assert metrics["eval_rows"] == 3
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions), outputs[kind.answers], rtol=0, atol=1e-5)
    assert torch.equal(torch.from_numpy(seen[0].label_ids), batch["labels"])
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-3)


@for_kinds(*MODELS, "memory model of both")
def test_trainer_learns_and_resumes_bitwise(kind, tmp_path):
    whole = trainer_of(kind, tmp_path, save_steps=3)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = trainer_of(kind, tmp_path, save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


@pytest.mark.slow
@for_kinds(*MODELS, "memory model of both")
def test_trainer_accumulates_to_the_large_batch(kind, tmp_path):
    """Five rows in parts of two: the last part is smaller, and each row counts alike."""
    weights = []
    for size, parts in ((5, 1), (2, 3)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        options = batch | {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        model = kind.make(dtype=torch.float64, **kind.objectives)
        trainer_of(kind, tmp_path, num_rows=5, model=model, **options).train()
        weights.append(model.state_dict())
    start = kind.make(dtype=torch.float64, **kind.objectives).state_dict()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-6, atol=1e-8, msg=name)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.eye(3)[[0, 2, 1, 1, 0]]),
    ],
    ids=["regression", "several labels"],
)
def test_other_losses_of_a_classifier_accumulate_too(fields, labels):
    """PEFT leaves them out."""
    model, ids = make_classifier(dtype=torch.float64, **fields), make_ids(5, 9)
    gradients = []
    for size in (5, 2):
        model.zero_grad()
        for part in torch.arange(5).split(size):
            inputs = {"attention_mask": torch.ones_like(ids[part]), "labels": labels[part].double()}
            model(ids[part], **inputs, num_items_in_batch=labels.numel()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole)

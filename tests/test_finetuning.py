# SPDX-License-Identifier: Apache-2.0
"""PEFT and plain Trainer on a Memory Mosaic."""

import pytest
import torch
from conftest import make_ids, make_model
from peft import LoraConfig, get_peft_model
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


def test_trainer_evaluates_with_metrics(tmp_path):
    """The memory must stay out of what Trainer gathers."""
    rows = [{"input_ids": row, "labels": row} for row in make_ids(4, 8)]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True)
    seen = []

    def count(prediction):
        seen.append(prediction.predictions)
        return {"rows": len(prediction.predictions)}

    trainer = Trainer(
        model=make_model(),
        args=arguments,
        eval_dataset=rows,
        compute_metrics=count,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 4 and seen[0].shape == (4, 8, 61)
    assert metrics["eval_loss"] == pytest.approx(trainer.model(**trainer.data_collator(rows)).loss.item(), rel=1e-3)

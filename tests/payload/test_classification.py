# SPDX-License-Identifier: Apache-2.0
"""Texts are classified by the state at their last token, wherever the padding is."""

import pytest
import torch
from helpers.kinds import for_kinds, make_classifier
from helpers.models import make_ids, make_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told_by", ["pad_token_id", "embeddings and mask"])
@for_kinds("classifier", "classifier v2")
def test_padding_changes_no_verdict(kind, side, told_by):
    model = kind.make(num_labels=3, pad_token_id=60)
    rows = [make_ids(length, seed=length, vocab_size=60) for length in (1, 4, 9)]
    ids = torch.full((3, 9), 60)
    for index, row in enumerate(rows):
        start = 9 - len(row) if side == "left" else 0
        ids[index, start : start + len(row)] = row
    inputs = {"input_ids": ids, "attention_mask": (ids != 60).long()}
    if told_by == "pad_token_id":
        del inputs["attention_mask"]
    if told_by == "embeddings and mask":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    logits = model(**inputs).logits
    assert logits.shape == (3, 3)
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index], model(row[None]).logits[0], rtol=0, atol=1e-5)


def test_rows_of_unknown_padding_are_refused():
    with pytest.raises(ValueError, match="2 rows, but nothing tells tokens from padding"):
        make_classifier()(make_ids(2, 5))


@for_kinds("classifier", "classifier v2")
def test_rows_without_a_verdict_are_refused(kind):
    model, ids = kind.make(pad_token_id=60, eos_token_id=60), make_ids(2, 5)
    with pytest.raises(ValueError, match="nothing tells tokens from padding"):
        model(ids)  # 60 may be the end of a sentence
    with pytest.raises(ValueError, match="leaves no token to judge"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="Several documents are packed"):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1]]))


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"num_labels": 4}, torch.tensor([0, 3, 1])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, torch.eye(4)[:3]),
    ],
    ids=["single label", "regression", "several labels"],
)
def test_every_kind_of_label_gives_a_gradient(config, labels):
    model = make_classifier(**config, pad_token_id=60)
    ids = make_ids(3, 6, vocab_size=60)
    outputs = model(ids, labels=labels)
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss) and model.score.weight.grad.abs().sum() > 0
    assert model.model.layers[0].contextual_memory.k_proj.weight.grad.abs().sum() > 0


def test_a_classifier_starts_from_a_language_model_learns_and_loads(tmp_path):
    """Make texts of two classes: in class 1 the first token comes again somewhere."""
    language_model = make_model(pad_token_id=60, attention_dropout=0.0, hidden_dropout=0.0)
    language_model.save_pretrained(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=2)
    assert torch.equal(model.model.embed_tokens.weight, language_model.model.embed_tokens.weight)

    ids = make_ids(64, 8, vocab_size=10) + 1
    ids[:, 0] = 0
    ids[::2, 4] = 0
    rows = [{"input_ids": row, "label": int((row[1:] == 0).any())} for row in ids]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            max_steps=60,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda result: {"accuracy": (result.predictions.argmax(-1) == result.label_ids).mean()},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] >= 0.95 > before["eval_accuracy"]
    trainer.save_model(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)

# SPDX-License-Identifier: Apache-2.0
"""Trainers of other libraries."""

import trl
from datasets import Dataset


def sft(model, tokenizer, output, texts, peft_config=None, **options):
    """An `SFTTrainer` whose every step sees all texts, so that losses of two trainers can be compared."""
    arguments = trl.SFTConfig(
        str(output),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=len(texts),
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=True,  # as TRL does by default, under the name that is not deprecated
        **{"bf16": False} | options,  # TRL would switch it on
    )
    texts = Dataset.from_dict({"text": texts})
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=texts, processing_class=tokenizer, peft_config=peft_config
    )


def logged(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]

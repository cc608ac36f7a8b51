# SPDX-License-Identifier: Apache-2.0
"""Generation: continuing prompts with an exported folder or a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import pipeline, set_seed

from training.evaluate import load_model


def generate_texts(folder: str | Path, prompts: list[str], seed: int = 0, **options: Any) -> list[str]:
    """Continue each prompt.

    Args:
        folder: an exported folder or a checkpoint.
        prompts: non-empty texts.
        seed: of the sampling; the same seed, folder and prompts give the same texts.
        **options: arguments of `generate`, such as `max_new_tokens`, `do_sample`, `temperature` and `top_p`.

    Returns:
        Prompt and continuation, for each prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one character")
    model, tokenizer = load_model(folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    set_seed(seed)  # after loading, which may draw random numbers
    return [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]

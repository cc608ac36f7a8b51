# SPDX-License-Identifier: Apache-2.0
"""Generation: continuing prompts with an exported folder or a checkpoint."""

from pathlib import Path
from typing import Any

from transformers import TextStreamer, pipeline, set_seed

from training.evaluate import load_model


def generate_texts(
    folder: str | Path, prompts: list[str], seed: int = 0, stream: bool = False, **options: Any
) -> list[str]:
    """Continue each prompt.

    Args:
        folder: an exported folder, a checkpoint, or the folder of a finished run.
        prompts: non-empty texts.
        seed: of the sampling; the same seed, folder and prompts give the same texts.
        stream: print each text, token by token, while it is generated, and an empty line behind it.
        **options: arguments of `generate`, such as `max_new_tokens`, `do_sample`, `temperature` and `top_p`.

    Returns:
        Prompt and continuation, for each prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give it at least one character")
    model, tokenizer = load_model(folder)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    if stream:
        options["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    set_seed(seed)  # after loading, which may draw random numbers
    texts = []
    for prompt in prompts:
        texts.append(generator(prompt, **options)[0]["generated_text"])
        if stream:
            print()
    return texts

# SPDX-License-Identifier: Apache-2.0
"""Prompts continued by each model, side by side in a Markdown table (Memory Mosaics, Tables 1 and 5)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError
from tqdm import tqdm
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from typing_extensions import TypedDict  # pydantic refuses that of `typing` before Python 3.12

from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, Trained, plan, summary
from training.files import checksum, read_json, write_text
from training.recipe import Section
from training.tables import Claim, markdown_table


__all__ = ["Recipe", "plan", "run", "summary"]


# Models count as similar if their measures differ by at most so much: shares of continuations, and nats.
SIMILAR_REPETITION, SIMILAR_LOSS = 0.15, 0.3


class Prompt(TypedDict):
    """A beginning of a text, and what it asks for, such as `factual`."""

    kind: str
    prompt: str


class DecodingSection(Section):
    """Arguments of `generate` that choose the continuations."""

    max_new_tokens: PositiveInt = 40
    do_sample: bool = False
    num_beams: PositiveInt = 1
    temperature: float = 1.0
    top_p: float = 1.0


class Recipe(DepthComparisonRecipe):
    """`prompts` is a JSON file that holds a list of objects with `kind` and `prompt`, itself or in `prompt_set`."""

    task: Literal["samples"]
    prompts: str
    prompt_set: str | None = None
    decoding: DecodingSection = DecodingSection()


def read_prompts(path: str, prompt_set: str | None = None) -> list[Prompt]:
    """Return the prompts of a file, in its order.

    Args:
        path: a JSON file, a list of prompts or an object with such lists.
        prompt_set: the field of the object.

    Raises:
        ValueError: no such file, not JSON, of another form, or without any prompt.
    """
    file = Path(path).expanduser()
    form = 'a list such as [{"kind": "factual", "prompt": "Alice was"}]'
    try:
        content = read_json(file)
        if prompt_set is not None:
            content = content[prompt_set]
        prompts = TypeAdapter(list[Prompt]).validate_python(content, strict=True)
    except OSError as error:
        raise ValueError(
            f"cannot read the prompts {path!r} ({error.strerror}): set `prompts` to a JSON file"
        ) from error
    # A `TypeError`: the file is a list, which has no fields.
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no field {prompt_set!r}: set `prompt_set` to the field that holds {form}"
        ) from error
    # Before `ValueError`, of which it is a kind.
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the whole"
        raise ValueError(f"{path}: {where}: {problem['msg']}: it has to hold {form}") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and lists nested too deeply
        raise ValueError(f"{path}: not JSON ({error}): it has to hold {form}") from error
    if not prompts or not all(prompt["prompt"].strip() for prompt in prompts):
        raise ValueError(f"{path}: there is no prompt, or an empty one: it has to hold {form}")
    return prompts


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    seed: int,
    decoding: dict[str, Any],
) -> list[str]:
    """Return the text that a model writes after each prompt, up to its end of text.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        prompts: each is read alone.
        seed: of the sampling.
        decoding: fields of `DecodingSection`.
    """
    # `generate` warns of settings that greedy decoding does not read.
    if not decoding["do_sample"]:
        decoding = {name: value for name, value in decoding.items() if name not in ("temperature", "top_p")}
    set_seed(seed)
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        ids = cast(GenerationMixin, model).generate(**inputs, **decoding, pad_token_id=tokenizer.pad_token_id)
        texts.append(str(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)))
    return texts


def _bigrams(text: str) -> Iterator[tuple[str, str]]:
    words = text.split()
    return zip(words, words[1:], strict=False)


def _repeats(text: str, length: int = 4) -> bool:
    """Return whether any run of `length` words occurs twice."""
    words = text.split()
    runs = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return len(runs) > len(set(runs))


@torch.no_grad()
def continuation_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], texts: list[str]
) -> float:
    """Return the mean loss in nats over all tokens of the continuations, each read after its prompt."""
    total, count = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(text, add_special_tokens=False)["input_ids"]
        if after:
            ids = torch.tensor([before + after], device=model.device)
            # The prompt is no target, so that the loss is a mean over the continuation's tokens.
            labels = torch.tensor([[-100] * len(before) + after], device=model.device)
            total += model(input_ids=ids, labels=labels, use_cache=False).loss.item() * len(after)
            count += len(after)
    return total / max(count, 1)


def _judge(
    training: Trained, trainings: list[Trained], prompts: list[str], samples: dict[str, list[str]]
) -> dict[str, float]:
    """Return counts of a model's continuations, and their loss under the other models of its depth."""
    texts = samples[training.name]
    # A model finds its own text likely, so that only the others judge it.
    judges = [other for other in trainings if other.depth == training.depth and other.label != training.label]
    losses = [continuation_loss(*judge.load(), prompts, texts) for judge in judges]
    bigrams = [pair for text in texts for pair in _bigrams(text)]
    return {
        "repetition": float(np.mean([_repeats(text) for text in texts])),
        "distinct_bigrams": len(set(bigrams)) / max(1, len(bigrams)),
        "loss_under_others": float(np.mean(losses)) if losses else float("nan"),
    }


def _cell(text: str) -> str:
    """Return a text on one line, with `|` escaped for Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def _side_by_side(recipe: Recipe, prompts: list[Prompt], samples: dict[str, list[str]]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in recipe.decoding.model_dump(exclude_unset=True).items())
    lines = [
        f"# {recipe.name}: prompts continued side by side",
        "",
        f"Seed {recipe.seeds[0]} of each training; {settings or 'greedy'}. Written by `{recipe.name}.yaml`.",
        "",
    ]
    rows = [
        [_cell(text) for text in (prompt["kind"], prompt["prompt"], *continued)]
        for prompt, *continued in zip(prompts, *samples.values(), strict=True)
    ]
    table = markdown_table(["kind", "prompt", *samples], "ll" + "l" * len(samples), rows)
    return "\n".join([*lines, table]) + "\n"


def _table(judged: dict[str, dict[str, float]]) -> str:
    columns = ["model", "continuations that repeat four words", "distinct word pairs", "loss under the other model"]
    rows = []
    for name, numbers in judged.items():
        cells = (numbers["repetition"], numbers["distinct_bigrams"], numbers["loss_under_others"])
        rows.append([name, f"{cells[0]:.0%}", f"{cells[1]:.0%}", f"{cells[2]:.3f}"])
    return markdown_table(columns, "lrrr", rows)


def _claims(recipe: Recipe, judged: dict[str, dict[str, float]]) -> list[Claim]:
    described = {
        name: f"{name}: {numbers['repetition']:.0%} repeat four words, loss under the other model "
        f"{numbers['loss_under_others']:.2f}"
        for name, numbers in judged.items()
    }
    claims = []
    for depth in recipe.depths:
        trainings = [t for t in recipe.trainings if t.depth == depth and t.seed == recipe.seeds[0]]
        names = [training.name for training in trainings]
        rates = [judged[name]["repetition"] for name in names]
        losses = [judged[name]["loss_under_others"] for name in names]
        is_similar = max(rates) - min(rates) <= SIMILAR_REPETITION and max(losses) - min(losses) <= SIMILAR_LOSS
        claims.append(
            Claim(
                # The second part of a name is the depth in words.
                f"Continuations of the prompts are of similar quality ({names[0].split(', ')[1]})",
                "very similar (Tables 1 and 5)",
                "; ".join(described[name] for name in names) + "; readers may judge the texts themselves",
                "reproduced" if is_similar else "not at this size",
            )
        )
    return claims


def _measure(recipe: Recipe) -> dict[str, Any]:
    prompts = read_prompts(recipe.prompts, recipe.prompt_set)
    # A space at the end would be a token of its own, for the next word's token begins with its space.
    texts = [prompt["prompt"].strip() for prompt in prompts]
    samples: dict[str, list[str]] = {}
    trainings = [training for training in recipe.trainings if training.seed == recipe.seeds[0]]
    for training in tqdm(trainings, desc="samples"):
        model, tokenizer = training.load()
        samples[training.name] = continuations(model, tokenizer, texts, recipe.seeds[0], recipe.decoding.model_dump())
    judged = {training.name: _judge(training, trainings, texts, samples) for training in trainings}
    write_text(recipe.folder / f"{recipe.name}.md", _side_by_side(recipe, prompts, samples))
    rows = [
        prompt | {"continuations": {name: sample[index] for name, sample in samples.items()}}
        for index, prompt in enumerate(prompts)
    ]
    return {
        "measured": {"judged": judged, "samples": rows},
        "table": _table(judged),
        "claims": _claims(recipe, judged),
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Continue all prompts with every model; returns the content of `result.json`."""
    read_prompts(recipe.prompts, recipe.prompt_set)  # a mistake there must not show after hours of training
    file = Path(recipe.prompts).expanduser()
    data = {"prompts": {"kind": "files", "files": {file.name: checksum(file)}}}
    return comparison.run_comparison(recipe, restart, data, _measure)

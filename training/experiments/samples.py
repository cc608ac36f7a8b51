# SPDX-License-Identifier: Apache-2.0
"""Texts that models write: side by side in a Markdown table (Memory Mosaics, Tables 1 and 5), and their repetition.

A few prompts are continued for readers to judge. Repetition is measured on many beginnings of stories that no model
has read, beside that of the stories themselves. `continuations.py` says what is equal for all models.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from tqdm import tqdm
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from typing_extensions import TypedDict  # pydantic refuses that of `typing` before Python 3.12

from training.claims import Effects, crossed_effect, mean_effect
from training.experiments import comparison
from training.experiments.comparison import Trained, blocks, plan, summary
from training.experiments.continuations import (
    Beginnings,
    ContinuationRecipe,
    continue_prompts,
    describe_texts,
    flags,
    following_logits,
    mean_entropy,
    story_beginnings,
    temperature_of_entropy,
)
from training.files import checksum, read_json, write_text
from training.recipe import Section
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "effects", "plan", "run", "summary"]

# Measures of texts, by their names in the result, as words of effects.
MEASURES = {"repeats": "repetition", "distinct_2": "distinct pairs"}
# What stands in the place of a model's label.
STORIES = "the stories"


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


class Recipe(ContinuationRecipe):
    """`prompts` is a JSON file that holds a list of objects with `kind` and `prompt`, itself or in `prompt_set`.

    Repetition is measured at each of `entropies`, in nats, or in greedy decoding if there are none.
    """

    task: Literal["samples"]
    prompts: str
    prompt_set: str | None = None
    decoding: DecodingSection = DecodingSection()
    entropies: list[PositiveFloat] = []

    @property
    def effect_names(self) -> list[str]:
        return [one.name for one in _effects_of(self)]


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


# Repetition


def _decodings(recipe: Recipe) -> dict[float | None, str]:
    """Return by entropy, or None for greedy decoding, how texts are written, in words."""
    return {entropy: f"at {entropy:g} nats" for entropy in recipe.entropies} or {None: "greedy"}


def _continued(training: Trained, beginnings: Beginnings, recipe: Recipe) -> list[dict[str, Any]]:
    """Return for each way of decoding how much a model repeats itself after the beginnings, and its temperature."""
    model, tokenizer = training.load()
    prompts, following, _ = beginnings
    about = {"label": training.label, "depth": training.depth, "seed": training.seed}
    logits = following_logits(model, prompts, following, recipe.batch_size)
    rows = []
    for entropy in _decodings(recipe):
        temperature = None if entropy is None else temperature_of_entropy(logits, entropy)
        ids = continue_prompts(model, prompts, recipe.new_tokens, temperature, training.seed, recipe.batch_size)
        own_entropy = None
        if temperature is not None:
            own_entropy = mean_entropy(following_logits(model, prompts, ids, recipe.batch_size), temperature)
        decoded = {"entropy": entropy, "temperature": temperature, "own_entropy": own_entropy}
        rows.append(about | decoded | describe_texts(tokenizer.batch_decode(ids)))
    return rows


def _measure_repetition(recipe: Recipe) -> dict[str, Any]:
    stories = load_stories(**recipe.stories.model_dump())
    _, tokenizer = recipe.trainings[0].load()  # all models have the same
    beginnings = story_beginnings(stories, tokenizer, recipe.num_prompts, recipe.prompt_tokens, recipe.new_tokens)
    models = [
        one
        for training in tqdm(recipe.trainings, desc="repetition")
        for one in _continued(training, beginnings, recipe)
    ]
    in_stories = describe_texts(tokenizer.batch_decode(beginnings.following))
    return {"numbers": beginnings.stories, "stories": in_stories, "models": models}


# Effects


class _EffectOf(NamedTuple):
    """What an effect is of: a measure of a model's texts, less that of another model, or of the stories."""

    name: str
    measure: str
    entropy: float | None
    depth: int
    label: str
    less: str


def _effects_of(recipe: Recipe) -> Iterator[_EffectOf]:
    first, *others = recipe.runs
    pairs = [*((first, other) for other in others), *((label, STORIES) for label in recipe.runs)]
    for entropy, decoding in _decodings(recipe).items():
        for depth in recipe.depths:
            for label, less in pairs:
                for measure, words in MEASURES.items():
                    name = f"{words} {decoding}: {label} - {less}, {blocks(depth)}"
                    yield _EffectOf(name, measure, entropy, depth, label, less)


def _of_model(measured: dict[str, Any], one: _EffectOf, label: str) -> list[Any]:
    """Return a measure of a model, seed by seed, or of the stories."""
    if label == STORIES:
        return [measured["stories"][one.measure]]
    return [
        model[one.measure]
        for model in measured["models"]
        if (model["label"], model["depth"], model["entropy"]) == (label, one.depth, one.entropy)
    ]


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return how much more one repeats than the other.

    Intervals of repetition are over seeds and stories, those of the shares of distinct words over seeds alone.
    """
    found = {}
    for one in _effects_of(recipe):
        ours, theirs = (_of_model(measured, one, label) for label in (one.label, one.less))
        if one.measure == "repeats":
            differences = np.array([flags(bits) for bits in ours]) - np.array([flags(bits) for bits in theirs])
            found[one.name] = crossed_effect(differences, measured["numbers"], "")
        else:
            paired = np.array(ours) - np.array(theirs)
            found[one.name] = mean_effect(paired.tolist(), "")
    return found


def _cells(texts: list[dict[str, Any]]) -> list[str]:
    repetition = np.mean([flags(one["repeats"]).mean() for one in texts])
    return [f"{repetition:.1%}", *(f"{np.mean([one[f'distinct_{n}'] for one in texts]):.1%}" for n in (1, 2, 3))]


def _table(recipe: Recipe, measured: dict[str, Any]) -> str:
    columns = ["texts", "decoding", "temperature", "entropy of its own texts (nats)"]
    columns += ["texts that repeat four words", "distinct words", "distinct pairs", "distinct triples"]
    rows = [["the stories themselves", "", "", "", *_cells([measured["stories"]])]]
    for entropy, decoding in _decodings(recipe).items():
        for depth in recipe.depths:
            for label in recipe.runs:
                models = [
                    model
                    for model in measured["models"]
                    if (model["label"], model["depth"], model["entropy"]) == (label, depth, entropy)
                ]
                means = ["", ""]
                if entropy is not None:
                    names = ("temperature", "own_entropy")
                    means = [f"{np.mean([model[name] for model in models]):.2f}" for name in names]
                rows.append([f"{label}, {blocks(depth)}", decoding, *means, *_cells(models)])
    return markdown_table(columns, "llrrrrrr", rows)


# The run


def _continue_the_prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """Write the prompts and their continuations side by side, and return them."""
    prompts = read_prompts(recipe.prompts, recipe.prompt_set)
    # A space at the end would be a token of its own, for the next word's token begins with its space.
    texts = [prompt["prompt"].strip() for prompt in prompts]
    samples = {
        training.name: continuations(*training.load(), texts, training.seed, recipe.decoding.model_dump())
        for training in tqdm(recipe.trainings, desc="samples")
        if training.seed == recipe.seeds[0]
    }
    write_text(recipe.folder / f"{recipe.name}.md", _side_by_side(recipe, prompts, samples))
    return [
        {**prompt, "continuations": {name: sample[index] for name, sample in samples.items()}}
        for index, prompt in enumerate(prompts)
    ]


def _measure(recipe: Recipe) -> dict[str, Any]:
    samples = _continue_the_prompts(recipe)
    measured = _measure_repetition(recipe)
    return {"measured": measured | {"samples": samples}, "table": _table(recipe, measured)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Continue prompts and beginnings of stories with every model; returns the content of `result.json`."""
    read_prompts(recipe.prompts, recipe.prompt_set)  # a mistake there must not show after hours of training
    file = Path(recipe.prompts).expanduser()
    data = {
        "prompts": {"kind": "files", "files": {file.name: checksum(file)}},
        "stories": source_provenance(**recipe.stories.model_dump()),
    }
    return comparison.run_comparison(recipe, restart, data, _measure)

# SPDX-License-Identifier: Apache-2.0
"""Why a model repeats itself: the sharpness of its attention, and how far it expects what a text had before.

Three looks at the same stories, which no model has read:

- The scores of contextual memories (of attention, in a transformer) are multiplied by a factor: an inverse temperature
  of the kernel. At each factor, texts are sampled at the temperature that gives one entropy along the stories, as in
  `continuations.py`, and the loss on the stories says what the factor costs.
- Where a story has a run of tokens that it had before, a model that copies expects what came next there. The excess
  of copying is the probability of such a token less how often it comes. It is measured twice: with the model's own
  predictions, and with these at the temperature of the sampling.
- The weight that heads give to the place to copy from, in the stories and in the model's own texts. A mosaic's pair of
  a token holds the next one as its value. A transformer, which has no such pairs, looks at the next token itself.

Losses are also taken apart: of tokens that follow one which the text had before, so that there is something to copy,
and of tokens that follow a new one. What follows does not decide on which side a place is.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from pydantic import PositiveFloat, PositiveInt, model_validator
from tqdm import tqdm
from transformers import PreTrainedModel
from typing_extensions import Self

from modeling_memory_mosaic.memories_memory_mosaic import PARAMETER_SCALE, MemoryMosaicContextualMemory
from modeling_memory_mosaic.ops_memory_mosaic import MAX_LOG_KEY_SCALE
from training.claims import Effects, crossed_effect
from training.experiments import comparison
from training.experiments.comparison import Trained, blocks, plan, summary
from training.experiments.continuations import (
    Beginnings,
    ContinuationRecipe,
    bits,
    continue_prompts,
    describe_texts,
    flags,
    following_logits,
    story_beginnings,
    temperature_of_entropy,
)
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "effects", "plan", "run", "summary"]

# Measures at one factor, in words of effects.
REPETITION, LOSS = "repetition", "loss"
AFTER_OLD, AFTER_NEW = "loss after tokens that the text had", "loss after new tokens"
# Excess of copying by the model's own probabilities, and by those at the temperature of the recipe's entropy.
EXCESS, SHARP_EXCESS = "excess of copying", "excess of copying when sharpened"
EXPECTED = {EXCESS: "expected", SHARP_EXCESS: "expected when sharpened"}


class Recipe(ContinuationRecipe):
    """The first of the runs is compared with each of the others."""

    task: Literal["repetition"]
    entropy: PositiveFloat = 2.0
    factors: list[PositiveFloat] = [0.25, 0.5, 1.0, 2.0]
    copied_tokens: PositiveInt = 3

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        if 1.0 not in self.factors:
            raise ValueError(f"`factors` {self.factors} lack 1, with which the others are compared: add it")
        return self

    @property
    def effect_names(self) -> list[str]:
        return [one.name for one in _effects_of(self)]


# Sharpness


@contextlib.contextmanager
def sharpened(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """Multiply the scores of a model's contextual memories, or of its attention, by a factor.

    A mosaic's scores are products of two keys of one length, so that each key is scaled by the factor's root.

    Raises:
        ValueError: a key would be longer than a memory allows, or the model has nothing to scale.
    """
    memories = [module for module in model.modules() if isinstance(module, MemoryMosaicContextualMemory)]
    attentions: list[Any] = [
        module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)
    ]
    if not memories and not attentions:
        raise ValueError(f"{type(model).__name__} has neither contextual memories nor attention with a scale")
    step = math.log(factor) / 2 / PARAMETER_SCALE
    before = [(memory, memory.key_scale.detach().clone()) for memory in memories]
    scales = [(attention, attention.scaling) for attention in attentions]
    # A scale above the cap acts as the cap, from which the factor counts.
    longest = MAX_LOG_KEY_SCALE / PARAMETER_SCALE
    scaled = [scale.clamp(max=longest) + step for _, scale in before]
    if step > 0 and any(scale.max() > longest for scale in scaled):
        raise ValueError(f"a factor of {factor} makes keys longer than exp({MAX_LOG_KEY_SCALE}): lower `factors`")
    try:
        with torch.no_grad():
            for memory, scale in zip(memories, scaled, strict=True):
                memory.key_scale.copy_(scale)
        for attention, scale in scales:
            attention.scaling = scale * factor
        yield
    finally:
        with torch.no_grad():
            for memory, kept in before:
                memory.key_scale.copy_(kept)
        for attention, scale in scales:
            attention.scaling = scale


# What a text had before


def places_to_copy_from(ids: Sequence[int], length: int) -> list[list[int]]:
    """Return for each token the places of earlier tokens that ended the same run of `length` tokens.

    What followed there is what a copy would write next.
    """
    ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    found: list[list[int]] = []
    for place in range(len(ids)):
        run = tuple(ids[max(0, place - length + 1) : place + 1])
        found.append(list(ends[run]) if len(run) == length else [])
        ends[run].append(place)
    return found


class Copying(NamedTuple):
    """Tokens of texts that follow a run which the text had before.

    Args:
        rows, columns (`np.ndarray` of shape `(M,)`): the text and the place among the tokens that follow its prompt.
        expected (`list` of M lists): the tokens that followed the run before.
        places (`list` of M lists): where the run ended before.
        comes (`np.ndarray` of shape `(M,)`): 1 where one of the expected tokens does follow.
    """

    rows: np.ndarray
    columns: np.ndarray
    expected: list[list[int]]
    places: list[list[int]]
    comes: np.ndarray


def find_copying(prompts: torch.Tensor, following: torch.Tensor, length: int) -> Copying:
    """Return the tokens of `following` `(N, K)` that follow a run of `length` tokens which the text had before."""
    start = prompts.shape[1]
    rows, columns, expected, places, comes = [], [], [], [], []
    for row, ids in enumerate(torch.cat([prompts, following], dim=1).tolist()):
        earlier = places_to_copy_from(ids, length)
        for place in range(start, len(ids)):
            if ends := earlier[place - 1]:
                rows.append(row)
                columns.append(place - start)
                places.append(ends)
                expected.append(sorted({ids[end + 1] for end in ends}))
                comes.append(float(ids[place] in expected[-1]))
    return Copying(np.array(rows, int), np.array(columns, int), expected, places, np.array(comes))


def _expectations(probabilities: torch.Tensor, copying: Copying) -> np.ndarray:
    """Return the probability `(M,)` of the tokens that a copy would write, by probabilities `(N, K, V)`."""
    return np.array(
        [
            float(probabilities[row, column, tokens].sum())
            for row, column, tokens in zip(copying.rows, copying.columns, copying.expected, strict=True)
        ]
    )


@torch.no_grad()
def copying_weights(
    model: PreTrainedModel, prompts: torch.Tensor, following: torch.Tensor, copying: Copying, batch_size: int
) -> np.ndarray:
    """Return the mean weight `(L, H)` that heads give to the places to copy from, over the tokens of `copying`.

    Args:
        model: loaded with `attn_implementation="eager"`.
        prompts, following: `(N, P)` and `(N, K)`.
        copying: what `find_copying` has found in them.
        batch_size: texts per forward pass.
    """
    # A mosaic's weight at a token is that of its pair, whose value is of the next token.
    step = 0 if any(isinstance(module, MemoryMosaicContextualMemory) for module in model.modules()) else 1
    total: Any = 0.0
    for first, batch in enumerate(torch.cat([prompts, following], dim=1).split(batch_size)):
        attentions = model(input_ids=batch.to(model.device), use_cache=False, output_attentions=True).attentions
        weights = torch.stack([layer.float().cpu() for layer in attentions])  # (L, B, H, T, T)
        for number in np.flatnonzero(copying.rows // batch_size == first):
            row, query = copying.rows[number] % batch_size, prompts.shape[1] + copying.columns[number] - 1
            sources = [place + step for place in copying.places[number]]
            total = total + weights[:, row, :, query, sources].sum(-1)
    return np.asarray(total) / max(1, len(copying.rows))


# One model


def _losses(logits: torch.Tensor, following: torch.Tensor) -> np.ndarray:
    """Return the loss `(N, K)` of each token that follows, by logits `(N, K, V)`."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), following, reduction="none").numpy()


def _is_after_old(shape: tuple[int, ...], pairs: Copying) -> np.ndarray:
    """Return where the tokens that follow, `(N, K)`, stand behind one that the text had before."""
    is_old = np.zeros(shape, bool)
    is_old[pairs.rows, pairs.columns] = True
    return is_old


def _at_factor(
    model: PreTrainedModel, tokenizer: Any, beginnings: Beginnings, recipe: Recipe, seed: int
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return loss and repetition of a model as it is now, its logits along the stories, and the ids that it writes."""
    prompts, following, _ = beginnings
    logits = following_logits(model, prompts, following, recipe.batch_size)
    temperature = temperature_of_entropy(logits, recipe.entropy)
    ids = continue_prompts(model, prompts, recipe.new_tokens, temperature, seed, recipe.batch_size)
    of_stories = _losses(logits, following).mean(1).round(4).tolist()
    described = describe_texts(tokenizer.batch_decode(ids))
    return {LOSS: of_stories, "temperature": temperature, **described}, logits, ids


def _as_it_is(
    logits: torch.Tensor, temperature: float, beginnings: Beginnings, copying: Copying, is_old: np.ndarray
) -> dict[str, Any]:
    """Return how far a model expects copies in the stories, and its summed losses where `is_old` and elsewhere."""
    losses = _losses(logits, beginnings.following)
    expected = {
        EXPECTED[measure]: _expectations((logits / divisor).softmax(-1), copying).round(3).tolist()
        for measure, divisor in ((EXCESS, 1.0), (SHARP_EXCESS, temperature))
    }
    sums = {AFTER_OLD: (losses * is_old).sum(1), AFTER_NEW: (losses * ~is_old).sum(1)}
    return expected | {measure: of_stories.round(3).tolist() for measure, of_stories in sums.items()}


def _measure_model(
    training: Trained, beginnings: Beginnings, copying: Copying, is_old: np.ndarray, recipe: Recipe
) -> dict[str, Any]:
    prompts, following, _ = beginnings
    model, tokenizer = training.load(attn_implementation="eager")
    measured: dict[str, Any] = {"label": training.label, "depth": training.depth, "seed": training.seed}
    by_factor = {}
    for factor in recipe.factors:
        with sharpened(model, factor):
            by_factor[f"{factor:g}"], logits, ids = _at_factor(model, tokenizer, beginnings, recipe, training.seed)
        if factor == 1:
            measured |= _as_it_is(logits, by_factor["1"]["temperature"], beginnings, copying, is_old)
            of_own = find_copying(prompts, ids, recipe.copied_tokens)
            texts = {"the stories": (following, copying), "its own texts": (ids, of_own)}
            measured["weights"] = {
                name: copying_weights(model, prompts, text, found, recipe.batch_size).round(4).tolist()
                for name, (text, found) in texts.items()
            }
            measured["copies in its own texts"] = float(of_own.comes.mean()) if len(of_own.comes) else None
    return measured | {"factors": by_factor}


# Effects


class _EffectOf(NamedTuple):
    """What an effect is of: a measure of a model, at a factor less at 1, or less that of another model."""

    name: str
    measure: str
    depth: int
    label: str
    factor: float | None = None
    less: str | None = None


def _effects_of(recipe: Recipe) -> Iterator[_EffectOf]:
    first, *others = recipe.runs
    for depth in recipe.depths:
        for label in recipe.runs:
            where = f"{label}, {blocks(depth)}"
            for factor in recipe.factors:
                if factor != 1:
                    for measure in (REPETITION, LOSS):
                        name = f"{measure} at factor {factor:g} - at 1: {where}"
                        yield _EffectOf(name, measure, depth, label, factor=factor)
            for measure in EXPECTED:
                yield _EffectOf(f"{measure}: {where}", measure, depth, label)
        for other in others:
            for measure in (*EXPECTED, AFTER_OLD, AFTER_NEW):
                name = f"{measure}: {first} - {other}, {blocks(depth)}"
                yield _EffectOf(name, measure, depth, first, less=other)


def _of_models(measured: dict[str, Any], label: str, depth: int) -> list[dict[str, Any]]:
    """Return what was measured of the models of a run at a depth, seed by seed."""
    return [model for model in measured["models"] if (model["label"], model["depth"]) == (label, depth)]


def _excess(measured: dict[str, Any], measure: str, label: str, depth: int) -> np.ndarray:
    """Return the expectation of a copy less whether it comes, `(seeds, tokens)`."""
    expected = np.array([model[EXPECTED[measure]] for model in _of_models(measured, label, depth)])
    return expected - flags(measured["copying"]["comes"])


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return differences between factors and between models, with their intervals over seeds and stories."""
    found = {}
    stories = np.array(measured["numbers"])
    for one in _effects_of(recipe):
        models = _of_models(measured, one.label, one.depth)
        at = [[model["factors"][f"{factor:g}"] for model in models] for factor in (one.factor or 1.0, 1.0)]
        numbers, unit = stories.tolist(), ""
        if one.measure in EXPECTED:
            values = _excess(measured, one.measure, one.label, one.depth)
            if one.less is not None:
                values = values - _excess(measured, one.measure, one.less, one.depth)
            numbers = stories[measured["copying"]["rows"]].tolist()
        elif one.measure == REPETITION:
            changed, as_it_is = (np.array([flags(text["repeats"]) for text in texts]) for texts in at)
            values = changed - as_it_is
        elif one.measure == LOSS:
            changed, as_it_is = (np.array([text[LOSS] for text in texts]) for texts in at)
            values, unit = changed - as_it_is, "nats"
        else:
            ours, theirs = (
                np.array([model[one.measure] for model in _of_models(measured, label or "", one.depth)])
                for label in (one.label, one.less)
            )
            # Stories have different numbers of such places, and each place counts alike.
            values, unit = (ours - theirs) * len(stories) / sum(measured["places"][one.measure]), "nats"
        found[one.name] = crossed_effect(values, numbers, unit)
    return found


def _table(recipe: Recipe, measured: dict[str, Any]) -> str:
    columns = ["model", *(f"repeat four words, factor {factor:g}" for factor in recipe.factors)]
    columns += [f"loss, factor {factor:g}" for factor in recipe.factors]
    columns += ["expects a copy", "when sharpened", "copies in its own texts"]
    columns += [AFTER_OLD, AFTER_NEW, "weight on copied places", "in its own texts"]
    is_copied = flags(measured["copying"]["comes"])
    repeats = flags(measured["stories"]["repeats"]).mean()
    empty = [""] * len(recipe.factors)
    rows = [["the stories themselves", f"{repeats:.1%}", *empty[1:], *empty, f"{is_copied.mean():.1%}", *[""] * 6]]
    for depth in recipe.depths:
        for label in recipe.runs:
            models = _of_models(measured, label, depth)
            at = [[model["factors"][f"{factor:g}"] for model in models] for factor in recipe.factors]
            cells = [f"{np.mean([flags(text['repeats']).mean() for text in texts]):.1%}" for texts in at]
            cells += [f"{np.mean([text[LOSS] for text in texts]):.3f}" for texts in at]
            cells += [f"{np.mean([model[expected] for model in models]):.1%}" for expected in EXPECTED.values()]
            copies = [model["copies in its own texts"] for model in models]
            cells += ["none" if None in copies else f"{np.mean(copies):.1%}"]
            for measure in (AFTER_OLD, AFTER_NEW):
                total = np.mean([np.sum(model[measure]) for model in models])
                cells.append(f"{total / sum(measured['places'][measure]):.3f}")
            # Of the head that gives most.
            for text in ("the stories", "its own texts"):
                cells.append(f"{np.mean([np.max(model['weights'][text]) for model in models]):.2f}")
            rows.append([f"{label}, {blocks(depth)}", *cells])
    return markdown_table(columns, "l" + "r" * (len(columns) - 1), rows)


# The run


def _beginnings(recipe: Recipe, stories: Dataset) -> tuple[Beginnings, Any]:
    _, tokenizer = recipe.trainings[0].load()  # all models have the same
    return story_beginnings(stories, tokenizer, recipe.num_prompts, recipe.prompt_tokens, recipe.new_tokens), tokenizer


def _measure(recipe: Recipe) -> dict[str, Any]:
    beginnings, tokenizer = _beginnings(recipe, load_stories(**recipe.stories.model_dump()))
    prompts, following, numbers = beginnings
    copying, pairs = (find_copying(prompts, following, length) for length in (recipe.copied_tokens, 1))
    is_old = _is_after_old(tuple(following.shape), pairs)
    if not len(copying.rows) or not is_old.any() or is_old.all():
        raise ValueError(
            f"no story repeats {recipe.copied_tokens} tokens, or none has a token for the first time: lower "
            "`copied_tokens`, or take more stories and more of each"
        )
    models = [
        _measure_model(training, beginnings, copying, is_old, recipe)
        for training in tqdm(recipe.trainings, desc="repetition")
    ]
    measured = {
        "numbers": numbers,
        "stories": describe_texts(tokenizer.batch_decode(following)),
        "copying": {
            "rows": copying.rows.tolist(),
            "comes": bits(copying.comes),
        },
        "places": {AFTER_OLD: is_old.sum(1).tolist(), AFTER_NEW: (~is_old).sum(1).tolist()},
        "models": models,
    }
    return {"measured": measured, "table": _table(recipe, measured)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Measure every model at every factor; returns the content of `result.json`."""
    data = {"stories": source_provenance(**recipe.stories.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)

# SPDX-License-Identifier: Apache-2.0
"""Surprise: whether the error of a unit about what comes next finds where a text breaks.

Stories are joined without any mark between them, and single words in them are replaced by others of the same stories.
Two things are to be found: the first token of a story, and that of a replaced word. Each token has a score: the
model's loss of it, the error of a single unit (the one that finds most on validation texts), or the mean error of all
units. The measure is the area under the ROC curve: the chance that a token which is to be found has a higher score
than one which is not.
"""

import random
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import PositiveInt
from scipy.stats import mannwhitneyu
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from modeling_memory_mosaic import inspect_units
from training.claims import Effects, mean_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.recipe import SourceSection
from training.tables import markdown_table, mean_and_deviation
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "effects", "plan", "run", "summary"]

BORDERS, ODD_WORDS = "story borders", "odd words"
LOSS, UNIT, MEAN = "loss", "error of the best unit", "mean error of all units"


class Recipe(ComparisonRecipe):
    """Each text is of `stories_per_text` stories, of which `odd_words` words are replaced."""

    task: Literal["surprise"]
    validation: SourceSection
    test: SourceSection
    num_texts: PositiveInt
    stories_per_text: PositiveInt = 4
    odd_words: PositiveInt = 4

    @property
    def scores(self) -> dict[str, list[str]]:
        """By run: how its tokens are scored. Transformers have no units."""
        return {
            label: [LOSS, UNIT, MEAN] if hasattr(recipe.build_config(), "num_persistent_slots") else [LOSS]
            for label, recipe in self.run_recipes.items()
        }

    @property
    def effect_names(self) -> list[str]:
        names = []
        for what in (BORDERS, ODD_WORDS):
            for label, scores in self.scores.items():
                names += [f"AUC, {what} ({label}; {score})" for score in scores]
                names += [f"AUC, {what} ({label}; {score} - {LOSS})" for score in scores if score != LOSS]
        return names


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return areas under the curve and their differences, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    found = {}
    for what in (BORDERS, ODD_WORDS):
        for label, scores in recipe.scores.items():
            areas = {score: [one[what][score] for one in measured["models"][label]] for score in scores}
            for score, values in areas.items():
                found[f"AUC, {what} ({label}; {score})"] = mean_effect(values, "")
                if score != LOSS:
                    pairs = zip(values, areas[LOSS], strict=True)
                    found[f"AUC, {what} ({label}; {score} - {LOSS})"] = mean_effect([a - b for a, b in pairs], "")
    return found


class MarkedText(NamedTuple):
    """Token ids `(T,)` of a text, and where a story begins and an odd word stands, both `(T,)`."""

    ids: torch.Tensor
    is_border: np.ndarray
    is_odd: np.ndarray


def marked_text(
    stories: list[str], odd_words: int, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> MarkedText:
    """Join stories without a mark, with some words replaced by others of the same stories.

    A word is replaced within a story only, not in its first sentence's first words, where anything may come.
    """
    words = [story.split(" ") for story in stories]
    pool = [word for story in words for word in story if word.isalpha() and word.islower() and len(word) > 3]
    places = [(i, j) for i, story in enumerate(words) for j, word in enumerate(story) if j > 8 and word in pool]
    odd = set(rng.sample(places, min(odd_words, len(places))))
    ids: list[int] = []
    is_border, is_odd = [], []
    for i, story in enumerate(words):
        for j, word in enumerate(story):
            if (i, j) in odd:
                word = rng.choice([other for other in pool if other != word])
            text = word if not ids else f" {word}"
            tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            is_border += [i > 0 and j == t == 0 for t in range(len(tokens))]
            is_odd += [(i, j) in odd and t == 0 for t in range(len(tokens))]
            ids += tokens
    return MarkedText(torch.tensor(ids), np.array(is_border), np.array(is_odd))


def area(scores: np.ndarray, is_found: np.ndarray) -> float:
    """Return the area under the ROC curve of scores `(N,)`, of which `is_found` `(N,)` are to be the high ones."""
    sizes = int(is_found.sum()), int((~is_found).sum())
    return float(mannwhitneyu(scores[is_found], scores[~is_found]).statistic) / (sizes[0] * sizes[1])


@torch.no_grad()
def token_scores(model: Any, ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Return scores of all tokens but the first of a text `(T,)`: `LOSS` `(T - 1,)`, and `units` `(units, T - 1)`."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    scores = {LOSS: cross_entropy(logits, ids[1:], reduction="none").double().numpy()}
    if hasattr(model.config, "num_persistent_slots"):
        # The value of token t - 1 looks at token t: its error is known once that has come.
        error = inspect_units(model, cast(torch.LongTensor, ids[None])).error[:, 0]
        scores["units"] = error.flatten(0, 1)[:, :-1].double().numpy()
    return scores


def _scored(model: Any, texts: list[MarkedText]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return scores and marks of the tokens of all texts."""
    scored = [token_scores(model, text.ids) for text in texts]
    scores = {name: np.concatenate([one[name] for one in scored], axis=-1) for name in scored[0]}
    marks = {
        BORDERS: np.concatenate([text.is_border[1:] for text in texts]),
        ODD_WORDS: np.concatenate([text.is_odd[1:] for text in texts]),
    }
    return scores, marks


def _measure_training(recipe: Recipe, training: Trained, texts: dict[str, list[MarkedText]]) -> dict[str, Any]:
    model, _ = training.load()
    scores, marks = _scored(model, texts["test"])
    found: dict[str, Any] = {"seed": training.seed}
    validation = _scored(model, texts["validation"]) if "units" in scores else None
    for what, is_found in marks.items():
        found[what] = {LOSS: area(scores[LOSS], is_found)}
        if validation is not None:
            chosen = [area(errors, validation[1][what]) for errors in validation[0]["units"]]
            best = int(np.argmax(chosen))
            heads = model.config.num_attention_heads
            found[what][UNIT] = area(scores["units"][best], is_found)
            found[what][MEAN] = area(scores["units"].mean(0), is_found)
            found[what]["best unit"] = {"layer": best // heads, "head": best % heads}
    return found


def _texts(recipe: Recipe, source: SourceSection, tokenizer: Any, split: str) -> list[MarkedText]:
    stories = [text.replace("\n", " ") for text in load_stories(**source.model_dump())["text"]]
    rng, size = random.Random(f"surprise {split}"), recipe.stories_per_text
    if len(stories) < recipe.num_texts * size:
        raise ValueError(f"`{split}` has {len(stories)} stories, too few for {recipe.num_texts} texts of {size}")
    starts = range(0, recipe.num_texts * size, size)
    return [marked_text(stories[start : start + size], recipe.odd_words, tokenizer, rng) for start in starts]


def _rows(recipe: Recipe, models: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, str, list[float]]]:
    return [
        (what, label, score, [one[what][score] for one in models[label]])
        for what in (BORDERS, ODD_WORDS)
        for label, scores in recipe.scores.items()
        for score in scores
    ]


def _measure(recipe: Recipe) -> dict[str, Any]:
    _, tokenizer = recipe.trainings[0].load()
    texts = {split: _texts(recipe, getattr(recipe, split), tokenizer, split) for split in ("validation", "test")}
    found = comparison.measure_all(recipe, _measure_training, texts)
    models = {label: [one for training, one in found if training.label == label] for label in recipe.runs}
    rows = [
        (what, label, score, mean_and_deviation(values, 3)) for what, label, score, values in _rows(recipe, models)
    ]
    table = markdown_table(["found", "model", "by", "area under the ROC curve"], "lllr", rows)
    return {"measured": {"models": models}, "table": table}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    data = {name: source_provenance(**getattr(recipe, name).model_dump()) for name in ("validation", "test")}
    return comparison.run_comparison(recipe, restart, data, _measure)

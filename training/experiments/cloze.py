# SPDX-License-Identifier: Apache-2.0
"""Stories judged by a number: each model chooses how a story ends, and which of its names comes next.

The items are those of `training/text/cloze_items.py`, four candidates each, so that a guess is right in a quarter. The
candidate of the highest score is a model's choice.

- The score of an ending is its log-probability divided by its bytes. Endings differ in length, and a longer one is
  less likely; bytes, unlike tokens, do not depend on the tokenizer. The result has the accuracy by tokens beside it.
  Scores without the story show how far the sentences alone give the answer away.
- The score of a name is its log-probability, as a name stands for one word. Beside the models stand two rules: the
  name that the text has most often, and the one that it had last.

A text stands behind the end-of-text token, as in the training. All models read the same tokens: of a text that is
longer than a window of the training, the last ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.claims import Effects, crossed_effect
from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, blocks, plan, summary
from training.experiments.continuations import bits, flags
from training.files import checksum_of_text, json_text, write_text
from training.recipe import SourceSection
from training.tables import markdown_table
from training.text.cloze_items import Item, NameItem, ending_items, name_items
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "effects", "plan", "run", "summary"]

# Measures of a model, and what they are compared with beside other models.
ENDINGS, NAMES, RIVALS = "endings", "names", "names with a rival"
ALONE, MOST_FREQUENT = "the sentences alone", "the most frequent name"
# Words since a name was last seen, as bounds of the columns of the table.
DISTANCES = (0, 10, 20, 40)
NUM_SHOWN = 8


class Recipe(DepthComparisonRecipe):
    """The first of the runs is compared with each of the others. The stories must be new to all models."""

    task: Literal["cloze"]
    stories: SourceSection
    num_stories: PositiveInt = 500
    names_per_story: PositiveInt = 4
    item_seed: int = 0
    batch_size: PositiveInt = 32

    @property
    def effect_names(self) -> list[str]:
        return [name for name, *_ in _effects_of(self)]


# Scores


class _Target(NamedTuple):
    """Tokens whose log-probability is asked for: they stand behind `row[:start]`."""

    number: int
    start: int
    ids: list[int]

    @property
    def places(self) -> range:
        """Places whose logits predict the tokens."""
        return range(self.start - 1, self.start - 1 + len(self.ids))


def _rows(targets: Sequence[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[_Target]]]:
    """Return the texts that have to be read to score each (before, after), with the targets of each.

    A causal model that reads a text has read all beginnings of it, so that these are not read again.
    """
    texts = sorted((before + after[:-1], number) for number, (before, after) in enumerate(targets))
    rows: list[tuple[list[int], list[_Target]]] = []
    # Backwards: a beginning of a text is sorted directly before it.
    for text, number in reversed(texts):
        if not rows or rows[-1][0][: len(text)] != text:
            rows.append((text, []))
        before, after = targets[number]
        rows[-1][1].append(_Target(number, len(before), after))
    return sorted(rows, key=lambda row: len(row[0]))


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel, targets: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> np.ndarray:
    """Return the log-probability in nats of each list of tokens, given those before it.

    Args:
        model: a causal language model in evaluation mode.
        targets: the ids before, and those to score; neither is empty.
        batch_size: texts per forward pass.
    """
    scores = np.zeros(len(targets))
    rows = _rows(targets)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        length = max(len(text) for text, _ in batch)
        # What a row is filled up with stands behind all its targets, and a causal model does not look ahead.
        ids = torch.tensor([text + [0] * (length - len(text)) for text, _ in batch], device=model.device)
        # The places whose logits predict a target's tokens, in any row of the batch.
        places = sorted({place for _, targets_here in batch for one in targets_here for place in one.places})
        kept = torch.tensor(places, device=model.device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits.float()  # (B, places, V)
        column = {place: number for number, place in enumerate(places)}
        for row, (_, targets_here) in zip(logits, batch, strict=True):
            for one in targets_here:
                predicted = row[[column[place] for place in one.places]].log_softmax(-1)
                after = torch.tensor(one.ids, device=row.device)
                scores[one.number] = predicted.gather(1, after[:, None]).sum().item()
    return scores


def item_targets(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, context_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return the ids before and of each candidate, item by item.

    Args:
        items: texts and candidates.
        tokenizer: with an eos, which stands before a text.
        context_length: tokens that a model reads at most; earlier ones are left out, the same of all candidates.
    """

    def encode(text: str) -> list[int]:
        # Text that spells a special token stays text.
        ids: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return list(ids)

    end: Any = tokenizer.eos_token_id
    targets = []
    for item in items:
        candidates = [encode(candidate) for candidate in item.candidates]
        before = [end, *encode(item.context)]
        kept = context_length - max(map(len, candidates)) + 1  # nothing follows a candidate's last token
        if kept < 1:
            raise ValueError(
                f"a candidate of story {item.story} has {max(map(len, candidates))} tokens, but a model reads "
                f"{context_length}: {item.candidates}"
            )
        targets += [(before[-kept:], candidate) for candidate in candidates]
    return targets


def _is_first_best(scores: np.ndarray, num_items: int) -> np.ndarray:
    """Return for each item whether the first candidate's score is above all others, as 0 and 1."""
    scores = scores.reshape(num_items, -1)
    return (scores[:, 0] > scores[:, 1:].max(1)).astype(int)


def _choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    endings: list[Item],
    names: list[NameItem],
    recipe: Recipe,
) -> dict[str, str]:
    """Return which items a model answers rightly, as zeros and ones."""
    context_length = recipe.trainings[0].recipe.data.context_length
    bytes_of = np.array([len(candidate.encode()) for item in endings for candidate in item.candidates])
    whole, alone, filled = (
        item_targets(items, tokenizer, context_length)
        for items in (endings, [item._replace(context="") for item in endings], [named.item for named in names])
    )
    # One call for all: names stand in texts that endings need as well.
    scores = log_probabilities(model, [*whole, *alone, *filled], recipe.batch_size)
    of_whole, of_alone, of_names = np.split(scores, [len(whole), len(whole) + len(alone)])
    tokens_of = np.array([len(after) for _, after in whole])
    by_measure = {
        ENDINGS: (of_whole / bytes_of, len(endings)),
        "endings, by tokens": (of_whole / tokens_of, len(endings)),
        ALONE: (of_alone / bytes_of, len(endings)),
        NAMES: (of_names, len(names)),
    }
    return {measure: bits(_is_first_best(*numbers)) for measure, numbers in by_measure.items()}


# Effects


def _effects_of(recipe: Recipe) -> Iterator[tuple[str, str, int, str, str | None]]:
    """Yield the name of each effect, its measure, depth and label, and the label or rule that it is less."""
    first, *others = recipe.runs
    for depth in recipe.depths:
        for measure in (ENDINGS, NAMES, RIVALS):
            for label in recipe.runs:
                yield f"{measure}: {label}, {blocks(depth)}", measure, depth, label, None
                rule = ALONE if measure == ENDINGS else MOST_FREQUENT
                yield f"{measure}: {label} - {rule}, {blocks(depth)}", measure, depth, label, rule
            for other in others:
                yield f"{measure}: {first} - {other}, {blocks(depth)}", measure, depth, first, other


def _right(recipe: Recipe, measured: dict[str, Any], label: str, depth: int, measure: str) -> np.ndarray:
    """Return which items the models of all seeds answer rightly, `(seeds, items)`; rivals are chosen from names."""
    rows = [
        model["right"][measure] for model in measured["models"] if (model["label"], model["depth"]) == (label, depth)
    ]
    return np.array([flags(row) for row in rows])


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return accuracies, and their differences on the same items, with intervals over seeds and stories."""
    about = measured["names"]
    has_rival = np.array(about["rivals"]) > 0
    by_rule = flags(about["right"][MOST_FREQUENT])[None]
    found = {}
    for name, measure, depth, label, less in _effects_of(recipe):
        stories = np.array(measured["endings" if measure == ENDINGS else "names"]["stories"])
        kind = NAMES if measure == RIVALS else measure
        values = _right(recipe, measured, label, depth, kind)
        if less == ALONE:
            values = values - _right(recipe, measured, label, depth, ALONE)
        elif less == MOST_FREQUENT:
            values = values - by_rule
        elif less is not None:
            values = values - _right(recipe, measured, less, depth, kind)
        if measure == RIVALS:
            values, stories = values[:, has_rival], stories[has_rival]
        found[name] = crossed_effect(values, stories.tolist(), "")
    return found


# Tables


def _by_distance(right: np.ndarray, distances: np.ndarray) -> list[str]:
    bounds = [*DISTANCES, np.inf]
    groups = [(distances >= low) & (distances < high) for low, high in zip(bounds, bounds[1:], strict=False)]
    return [f"{right[:, group].mean():.1%}" if group.any() else "none" for group in groups]


def _table(recipe: Recipe, measured: dict[str, Any]) -> str:
    about = measured["names"]
    has_rival, distances = np.array(about["rivals"]) > 0, np.array(about["distances"])
    columns = ["model", "endings", "the sentences alone", "endings, by tokens", "names", "with a rival"]
    columns += [
        *(f"{low} to {high - 1} words ago" for low, high in zip(DISTANCES, DISTANCES[1:], strict=False)),
        f"{DISTANCES[-1]} and more",
    ]
    rows = []

    def of_names(right: np.ndarray) -> list[str]:
        return [f"{right.mean():.1%}", f"{right[:, has_rival].mean():.1%}", *_by_distance(right, distances)]

    for depth in recipe.depths:
        for label in recipe.runs:
            right = {
                measure: _right(recipe, measured, label, depth, measure)
                for measure in (ENDINGS, ALONE, "endings, by tokens", NAMES)
            }
            cells = [f"{right[measure].mean():.1%}" for measure in (ENDINGS, ALONE, "endings, by tokens")]
            rows.append([f"{label}, {blocks(depth)}", *cells, *of_names(right[NAMES])])
    for rule, of_rule in about["right"].items():
        rows.append([rule, "", "", "", *of_names(flags(of_rule)[None])])
    return markdown_table(columns, "l" + "r" * (len(columns) - 1), rows)


def _quoted(text: str) -> str:
    return " ".join(text.split())


def _examples(recipe: Recipe, endings: list[Item], names: list[NameItem]) -> str:
    """Return some items as Markdown, spread evenly over all, so that a reader can judge them."""
    lines = [
        f"# {recipe.name}: examples of the items",
        "",
        f"{len(endings)} endings and {len(names)} names. The true candidate stands first. Written by "
        f"`{recipe.name}.yaml`.",
    ]
    for title, items in (("Endings", endings), ("Names", [named.item for named in names])):
        lines += ["", f"## {title}"]
        for item in items[:: max(1, len(items) // NUM_SHOWN)][:NUM_SHOWN]:
            lines += ["", f"Story {item.story}: {_quoted(item.context)}", ""]
            lines += [f"{place}. {_quoted(text)}" for place, text in enumerate(item.candidates, 1)]
    return "\n".join(lines) + "\n"


# The run


def _items(recipe: Recipe) -> tuple[list[Item], list[NameItem]]:
    """Return the items of endings and of names; `ValueError` if the stories give none."""
    stories = [str(text) for text in load_stories(**recipe.stories.model_dump())["text"]]
    endings = ending_items(stories, recipe.num_stories, recipe.item_seed)
    names = name_items(stories, recipe.num_stories, recipe.names_per_story, recipe.item_seed)
    num_rivals = sum(named.rivals > 0 for named in names)
    if not endings or not num_rivals:
        raise ValueError(
            f"{len(stories)} stories give {len(endings)} items of endings and {len(names)} of names, {num_rivals} of "
            "which have a rival: take more stories, and such as have names with capital letters"
        )
    return endings, names


def _measure(recipe: Recipe) -> dict[str, Any]:
    endings, names = _items(recipe)
    models = []
    for training in tqdm(recipe.trainings, desc="cloze"):
        right = _choices(*training.load(), endings, names, recipe)
        models.append({"label": training.label, "depth": training.depth, "seed": training.seed, "right": right})
    by_rule = {
        MOST_FREQUENT: bits([named.most_frequent == 0 for named in names]),
        "the latest name": bits([named.latest == 0 for named in names]),
    }
    measured = {
        "items_sha256": checksum_of_text(json_text([endings, names])),
        "endings": {"stories": [item.story for item in endings]},
        "names": {
            "stories": [named.item.story for named in names],
            "distances": [named.distance for named in names],
            "rivals": [named.rivals for named in names],
            "right": by_rule,
        },
        "models": models,
    }
    write_text(recipe.folder / f"{recipe.name}.md", _examples(recipe, endings, names))
    return {"measured": measured, "table": _table(recipe, measured)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Let every model choose among the candidates of all items; returns the content of `result.json`."""
    _items(recipe)  # a mistake there must not show after hours of training
    data = {"stories": source_provenance(**recipe.stories.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)

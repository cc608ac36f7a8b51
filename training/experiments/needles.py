# SPDX-License-Identifier: Apache-2.0
"""Needles: which objectives leave memories from which any detail of a text can be asked, and how far back.

Each trained model gets the same short training of its decoder on questions, behind its encoder as it is: no objective
of the trainings asks for numbers. Then questions about new numbers are answered, by distance and number of needles.
"""

import copy
import itertools
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_memory_mosaic import MemoryModelForCausalLM
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from training.claims import Effects, mean_effect
from training.experiments import comparison, memory_models
from training.experiments.comparison import Trained, plan, summary
from training.experiments.memory_models import MemoryModelComparison
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.progress import progress
from training.recipe import Section
from training.synthetic.needles import NeedleRows, draw_rows
from training.tables import markdown_table, mean_and_deviation
from training.text.sources import load_stories
from training.text.windows import pack_windows


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]


class ReaderSection(Section):
    """The training on questions that each model gets: steps of AdamW on rows with one of the numbers of needles."""

    steps: PositiveInt
    batch_size: PositiveInt = 32
    learning_rate: float = Field(default=1e-3, gt=0)


class Recipe(MemoryModelComparison):
    """Memory models, asked for needles in texts of `num_tokens` tokens, whole chunks of every model."""

    task: Literal["needles"]
    num_tokens: PositiveInt
    chunk_length: PositiveInt
    num_needles: list[PositiveInt] = Field(min_length=1)
    num_rows: PositiveInt = 500
    reader: ReaderSection

    @property
    def effect_names(self) -> list[str]:
        """Names of the effects: of each number of needles, everywhere and far away, for each model and every two."""
        names = []
        for measure in measure_names(self):
            names += [f"{measure}: {label}" for label in self.runs]
            names += [f"{measure}: {one} less {other}" for one, other in itertools.combinations(self.runs, 2)]
        return names


def needles_in_words(number: int) -> str:
    """Return a number of needles in words."""
    return "1 needle" if number == 1 else f"{number} needles"


def measure_names(recipe: Recipe) -> list[str]:
    """Return what is measured: the share of numbers that are right, at all distances and in the farther half."""
    words = [needles_in_words(number) for number in recipe.num_needles]
    return [f"{place}, {each}" for each in words for place in ("exact", "exact far away")]


def _texts(recipe: Recipe, training: Trained, tokenizer: Any, split: str) -> list[list[int]]:
    source = getattr(training.recipe.data, split)
    windows = pack_windows(load_stories(**source.model_dump()), tokenizer, recipe.num_tokens)
    return [list(ids) for ids in windows.with_format("numpy")["input_ids"][:].tolist()]


def _batches(
    recipe: Recipe, texts: list[list[int]], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> Iterator[NeedleRows]:
    while True:
        chosen = rng.choices(texts, k=recipe.reader.batch_size)
        yield draw_rows(chosen, tokenizer, recipe.chunk_length, recipe.num_needles, rng)


def fit_reader(
    recipe: Recipe, model: MemoryModelForCausalLM, texts: list[list[int]], tokenizer: Any, seed: int
) -> MemoryModelForCausalLM:
    """Return a copy of the model whose decoder and reader were trained on questions, the encoder as it is.

    Args:
        texts: tokens to hide needles in.
    """
    model = copy.deepcopy(model)
    for objective in OBJECTIVES:
        setattr(model.config, f"{objective}_weight", float(objective == "causal"))
    model.freeze_encoder()
    model.freeze_decoder(False)
    model.train()
    set_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.reader.learning_rate)
    # From the rate to nothing, so that the end does not depend on the last batches.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.reader.steps)
    batches = _batches(recipe, texts, tokenizer, random.Random(seed))
    for rows in itertools.islice(batches, recipe.reader.steps):
        loss = model(rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def exact_by_distance(model: MemoryModelForCausalLM, rows: NeedleRows, batch_size: int) -> list[float]:
    """Return the share of answers that are right throughout, at each distance from 1 on.

    The answer is what greedy decoding writes: all of its tokens are the likeliest, each behind the right ones.
    """
    right: list[torch.Tensor] = []
    for start in range(0, len(rows.input_ids), batch_size):
        part = slice(start, start + batch_size)
        logits = model(rows.input_ids[part], attention_mask=rows.attention_mask[part], use_cache=False).logits
        labels = rows.labels[part, 1:]
        right.append(((logits[:, :-1].argmax(-1) == labels) | (labels < 0)).all(-1))
    is_right = torch.cat(right).double()
    return [is_right[rows.distances == distance].mean().item() for distance in range(1, int(rows.distances.max()) + 1)]


def _measure_training(recipe: Recipe, training: Trained) -> dict[str, Any]:
    loaded: Any
    loaded, tokenizer = training.load()
    model = fit_reader(recipe, loaded.cpu(), _texts(recipe, training, tokenizer, "train"), tokenizer, training.seed)
    texts = _texts(recipe, training, tokenizer, "validation")
    measured = {}
    for number in recipe.num_needles:
        # The same questions for all models of a seed.
        rng = random.Random(f"{training.seed} {number}")
        rows = draw_rows(rng.choices(texts, k=recipe.num_rows), tokenizer, recipe.chunk_length, [number], rng)
        measured[str(number)] = exact_by_distance(model, rows, recipe.reader.batch_size)
    return {"seed": training.seed, "exact_by_distance": measured}


def _value(measure: str, number: int, seed: dict[str, Any]) -> float:
    by_distance = seed["exact_by_distance"][str(number)]
    return statistics.mean(by_distance[len(by_distance) // 2 :] if measure.startswith("exact far") else by_distance)


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the shares of right numbers, of every model and of every two, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    seeds = {series["label"]: series["seeds"] for series in measured["series"]}
    found: Effects = {}
    for measure, number in zip(measure_names(recipe), [n for n in recipe.num_needles for _ in range(2)], strict=True):
        values = {label: [_value(measure, number, seed) for seed in seeds[label]] for label in recipe.runs}
        found |= {f"{measure}: {label}": mean_effect(values[label], "") for label in recipe.runs}
        for one, other in itertools.combinations(recipe.runs, 2):
            differences = [ours - theirs for ours, theirs in zip(values[one], values[other], strict=True)]
            found[f"{measure}: {one} less {other}"] = mean_effect(differences, "")
    return found


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the share of right numbers at each distance: a panel for each number of needles.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    figure, axes = new_figure(len(recipe.num_needles), 1, height=3.4, sharex=True, sharey=True)
    styles = styles_of(series["label"] for series in measured["series"])
    for axis, number in zip(axes[:, 0], recipe.num_needles, strict=True):
        for series in measured["series"]:
            by_seed = [seed["exact_by_distance"][str(number)] for seed in series["seeds"]]
            places, label = range(1, len(by_seed[0]) + 1), series["label"]
            plot_seeds(axis, places, by_seed, marker="o", ms=4, label=label, **styles[label])
        axis.set(title=needles_in_words(number), ylim=(-0.02, 1.02))
        axis.set_ylabel(better("share of numbers that are right", "higher"))
    axes[-1, 0].set_xlabel("chunks between needle and question")
    label_lines(axes)
    note = seeds_note(len(recipe.seeds))
    save_figure(figure, folder / f"{recipe.name}.png", "Numbers found by the distance of the question", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for label in recipe.runs:
        trainings = [training for training in recipe.trainings if training.label == label]
        seeds = [_measure_training(recipe, training) for training in progress(trainings, label, "training")]
        series.append({"label": label, "seeds": seeds})
    columns, rows = measure_names(recipe), []
    for one in series:
        cells = [
            mean_and_deviation([_value(measure, number, seed) for seed in one["seeds"]], 3)
            for measure, number in zip(columns, [n for n in recipe.num_needles for _ in range(2)], strict=True)
        ]
        rows.append([one["label"], ", ".join(str(seed["seed"]) for seed in one["seeds"]), *cells])
    table = markdown_table(["model", "seeds", *columns], "ll" + "r" * len(columns), rows)
    return {"measured": {"series": series}, "table": f"{table}\n\nA guess is right once in 10,000."}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models, fit a reader to each, and ask; returns the content of `result.json`."""
    memory_models.train_sources(recipe)
    return comparison.run_comparison(recipe, restart, {}, _measure)

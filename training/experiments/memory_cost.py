# SPDX-License-Identifier: Apache-2.0
"""What a memory model costs and what it predicts, on the same weights: seconds, numbers that are kept, and loss.

Behind texts of several lengths each trained model predicts one chunk more. Beside memory models stand models without
memory that see all earlier tokens (full context): their decoder reads a text of any length as one row. The text is a
stream of stories, cut into windows.

Seconds are those of one thread. Models take turns, so that a busy machine slows all of them alike.
"""

import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from pydantic import Field, PositiveInt, model_validator
from transformers import DynamicCache
from typing_extensions import Self

from modeling_memory_mosaic import MemoryModelCache, MemoryModelForCausalLM
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from training.claims import Effect, Effects, mean_effect
from training.cost import interleaved_seconds
from training.experiments import comparison, memory_models
from training.experiments.comparison import Trained, plan, summary
from training.experiments.memory_models import MemoryModelComparison
from training.experiments.memory_questions import Measure, Reading, Series, effect_names, effects_of
from training.experiments.position_loss import cut_windows
from training.figures import better, legend_below, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.progress import progress
from training.recipe import SourceSection
from training.tables import markdown_table, mean_and_deviation
from training.text.sources import load_stories, source_provenance


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

# What is measured at each length, and its unit; losses are compared by differences, all else by ratios.
LOSS, READ, WRITE, KEPT = "loss", "seconds to read", "seconds to write a chunk", "numbers kept"
UNITS = {LOSS: "nats", READ: "s", WRITE: "s", KEPT: ""}
# Measures whose curves cross where a memory model begins to pay.
CROSSING = {READ: "reads faster", WRITE: "writes faster", KEPT: "keeps fewer numbers"}


class Recipe(MemoryModelComparison):
    """Memory models and full contexts behind texts of `lengths` tokens, whole chunks of every memory model.

    The loss is a mean over one chunk behind each of at most `num_windows` texts. Times are medians of `rounds`. The
    model that a memory model is compared with where it begins to pay is `beside`.
    """

    task: Literal["memory_cost"]
    text: SourceSection
    lengths: list[PositiveInt] = Field(min_length=2)
    chunk_length: PositiveInt
    beside: list[str] = Field(min_length=1)
    num_windows: PositiveInt = 32
    rounds: PositiveInt = 5

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.lengths != sorted(set(self.lengths)) or any(length % self.chunk_length for length in self.lengths):
            raise ValueError(
                f"`lengths` is {self.lengths}: give rising lengths of whole chunks of {self.chunk_length} tokens"
            )
        if unknown := sorted(set(self.beside) - self.runs.keys()):
            raise ValueError(f"`beside` names {unknown[0]!r}, which is none of the runs {list(self.runs)}")
        return self

    @property
    def measures(self) -> list[Measure]:
        """What is measured behind each length."""
        return [_measure_of(name, length) for name in UNITS for length in self.lengths]

    @property
    def memory_labels(self) -> list[str]:
        """Labels of the models that have memories."""
        return [
            label
            for label, settings in self.runs.items()
            if settings.get("model_args", {}).get("max_memories", None) != 0
        ]

    @property
    def effect_names(self) -> list[str]:
        """Names of the effects: each measure behind each length, of every model and of every two; and crossings."""
        pairs = itertools.product(CROSSING, self.memory_labels, self.beside)
        return [*effect_names(self.measures, list(self.runs), []), *(crossing_name(*pair) for pair in pairs)]


def crossing_name(measure: str, label: str, other: str) -> str:
    """Return the name of the effect that says from which length on a model is the cheaper one of two."""
    return f"log2 of tokens from which on it {CROSSING[measure]}: {label} than {other}"


def _measure_of(name: str, length: int) -> Measure:
    def read(series: Series, seed: int, guess: dict[str, float]) -> Reading:
        return Reading(series.results[seed]["measured"][name][str(length)])

    return Measure(f"{name} behind {length:,} tokens", UNITS[name], read, as_ratio=name != LOSS, of_memory=False)


# One model


def has_full_context(training: Trained) -> bool:
    """Return whether a training's model saw all earlier tokens of its windows."""
    config = training.recipe.build_config()
    return bool(config.max_memories == 0 and config.chunk_length == training.recipe.data.context_length)


@torch.no_grad()
def loss_behind(model: MemoryModelForCausalLM, ids: torch.Tensor, length: int, is_full: bool) -> float:
    """Return the mean loss, in nats, of the tokens of texts `(N, T)` behind the first `length` ones.

    Args:
        model: of a comparison.
        ids: whole texts.
        length: tokens that are context only.
        is_full: whether a text is one row.
    """
    usual = model.config.chunk_length
    model.config.chunk_length = ids.shape[1] if is_full else usual
    try:
        losses = []
        for text in ids.split(1):
            logits = model(text, use_cache=False).logits[:, length - 1 : -1]
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), text[:, length:].flatten()).item())
    finally:
        model.config.chunk_length = usual
    return statistics.mean(losses)


def _reader(model: MemoryModelForCausalLM, is_full: bool) -> tuple[Any, Callable[[], Any]]:
    """Return what reads texts, and what makes its cache: the decoder alone where it sees all tokens."""
    if is_full:
        return model.decoder, lambda: DynamicCache(config=model.decoder.config)
    return model, MemoryModelCache


@torch.no_grad()
def read_text(model: MemoryModelForCausalLM, ids: torch.Tensor, is_full: bool) -> Any:
    """Return the cache of a text `(1, T)` that was read at once."""
    reader, new_cache = _reader(model, is_full)
    cache = new_cache()
    reader(input_ids=ids, **{MEMORY_NAME: cache}, logits_to_keep=1)
    return cache


@torch.no_grad()
def write_tokens(model: MemoryModelForCausalLM, cache: Any, num_tokens: int, is_full: bool) -> Any:
    """Read tokens one at a time behind a cache, as decoding does; which ones does not change the speed."""
    reader, _ = _reader(model, is_full)
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(num_tokens):
        reader(input_ids=token, **{MEMORY_NAME: cache}, logits_to_keep=1)
    return cache


def kept_numbers(cache: Any) -> int:
    """Return how many numbers a cache holds: keys and values of the decoder's row, and vectors of memories."""
    if not isinstance(cache, MemoryModelCache):
        return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    memories = 0 if cache.memories is None else cache.memories.numel()
    return memories + (0 if cache.row is None else kept_numbers(cache.row))  # recurrent decoders keep no row


# All models of a seed


def measure_seed(
    recipe: Recipe, models: dict[str, tuple[Any, bool]], windows: dict[int, torch.Tensor]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return what is measured of each model, by label, measure and length.

    Args:
        recipe: of the experiment.
        models: by label, each with whether it sees all earlier tokens.
        windows: by length, texts `(N, length + chunk_length)`.
    """
    measured: dict[str, dict[str, dict[str, float]]] = {label: {name: {} for name in UNITS} for label in models}
    for length in progress(recipe.lengths, "lengths", "length"):
        for label, (model, is_full) in models.items():
            measured[label][LOSS][str(length)] = loss_behind(model, windows[length], length, is_full)
        for name, of_models in _costs_behind(recipe, models, windows[length][:1, :length]).items():
            for label, value in of_models.items():
                measured[label][name][str(length)] = value
    return measured


def _costs_behind(
    recipe: Recipe, models: dict[str, tuple[Any, bool]], text: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Return what reading a text `(1, T)` costs, and writing a chunk behind it, by measure and label."""
    before = {label: read_text(model, text, is_full) for label, (model, is_full) in models.items()}
    kept: dict[str, float] = {}
    for label, (model, is_full) in models.items():
        # One token less than a chunk, behind which a memory model begins a new row.
        cache = write_tokens(model, copy.deepcopy(before[label]), recipe.chunk_length - 1, is_full)
        kept[label] = kept_numbers(cache)
    reading = {label: functools.partial(read_text, model, text, is_full) for label, (model, is_full) in models.items()}
    writing = {
        label: functools.partial(_write_behind, model, recipe.chunk_length, is_full)
        for label, (model, is_full) in models.items()
    }
    # Every run begins behind the same text, and copying is not timed.
    copies = {label: functools.partial(copy.deepcopy, cache) for label, cache in before.items()}
    return {
        KEPT: kept,
        READ: interleaved_seconds(reading, recipe.rounds),
        WRITE: interleaved_seconds(writing, recipe.rounds, prepared=copies),
    }


def _write_behind(model: MemoryModelForCausalLM, num_tokens: int, is_full: bool, cache: Any) -> None:
    write_tokens(model, cache, num_tokens, is_full)


def _measure_seed(recipe: Recipe, seed: int) -> dict[str, Any]:
    trainings = [training for training in recipe.trainings if training.seed == seed]
    models: dict[str, tuple[Any, bool]] = {}
    for training in trainings:
        loaded: Any = training.load()[0]
        models[training.label] = (loaded.cpu().eval(), has_full_context(training))
    tokenizer = trainings[0].load()[1]
    stories = load_stories(**recipe.text.model_dump())
    windows = {
        length: cut_windows(stories, tokenizer, length + recipe.chunk_length, "stream", recipe.num_windows)[0]
        for length in recipe.lengths
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure_seed(recipe, models, windows)
    finally:
        torch.set_num_threads(threads)


# Where it pays


def crossing(lengths: list[int], ours: list[float], theirs: list[float]) -> float:
    """Return the length from which on ours are below theirs at all measured lengths; NaN if they end above.

    Between two lengths both are straight lines in logarithms. Where ours are below throughout, it is the first length.
    """
    logs = [math.log(our / their) for our, their in zip(ours, theirs, strict=True)]
    if logs[-1] >= 0:
        return math.nan
    last_above = max((place for place, log in enumerate(logs) if log >= 0), default=None)
    if last_above is None:
        return float(lengths[0])
    low, high = math.log(lengths[last_above]), math.log(lengths[last_above + 1])
    share = logs[last_above] / (logs[last_above] - logs[last_above + 1])
    return math.exp(low + share * (high - low))


def crossings(recipe: Recipe, models: dict[str, Series], measure: str, label: str, other: str) -> list[float]:
    """Return the length at which two models cross, for each seed."""
    of_seeds = []
    for ours, theirs in zip(models[label].results, models[other].results, strict=True):
        curves = [[one["measured"][measure][str(length)] for length in recipe.lengths] for one in (ours, theirs)]
        of_seeds.append(crossing(recipe.lengths, *curves))
    return of_seeds


def _crossing_effect(recipe: Recipe, lengths: list[float]) -> Effect:
    effect = mean_effect([math.log2(length) for length in lengths], "")
    if any(length == recipe.lengths[0] for length in lengths):
        return effect._replace(basis=f"{effect.basis}, some of which cross at a smaller length than any measured")
    return effect


def _models(measured: dict[str, Any]) -> dict[str, Series]:
    return {one["label"]: Series(one["label"], one["seeds"], []) for one in measured["series"]}


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return each measure behind each length, of every model and of every two, and where memory models begin to pay.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    models = _models(measured)
    found = effects_of(recipe.measures, list(models.values()), {})
    for pair in itertools.product(CROSSING, recipe.memory_labels, recipe.beside):
        found[crossing_name(*pair)] = _crossing_effect(recipe, crossings(recipe, models, *pair))
    return found


# Picture and table


def _draw_measure(axis: Axes, recipe: Recipe, models: dict[str, Series], name: str, styles: dict[str, Any]) -> None:
    for label, series in models.items():
        of_seeds = [[one["measured"][name][str(length)] for length in recipe.lengths] for one in series.results]
        plot_seeds(axis, recipe.lengths, of_seeds, marker="o", ms=3, label=label, **styles[label])
    axis.set_xscale("log", base=2)
    axis.set_xticks(recipe.lengths, [f"{length:,}" for length in recipe.lengths])
    axis.minorticks_off()
    if name == LOSS:
        axis.set_ylabel(better("loss of the next chunk (nats)", "lower"))
        return
    axis.set_yscale("log")
    axis.set_ylabel(better(name, "lower"))
    place = statistics.median(crossings(recipe, models, name, recipe.memory_labels[0], recipe.beside[0]))
    if math.isfinite(place) and place > recipe.lengths[0]:
        axis.axvline(place, color="0.35", ls=":", lw=1.2)
        axis.set_title(f"memories pay from {place:,.0f} tokens on")
    else:
        axis.set_title(f"memories pay at {'all' if math.isfinite(place) else 'none'} of these lengths")


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw seconds, numbers and losses over the length of the text, with the crossing of the first two models marked.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    models = _models(measured)
    figure, axes = new_figure(len(UNITS), 1, height=3.0, sharex=True)
    styles = styles_of(models)
    for axis, name in zip(axes[:, 0], (READ, WRITE, KEPT, LOSS), strict=True):
        _draw_measure(axis, recipe, models, name, styles)
    axes[-1, 0].set_xlabel("tokens read before")
    legend_below(figure, axes)
    note = f"{seeds_note(len(recipe.seeds))} Dotted: from there on {recipe.memory_labels[0]} cost less than "
    note += f"{recipe.beside[0]}."
    save_figure(figure, folder / f"{recipe.name}.png", "What a text costs, and what it is worth", note)


def _cells(series: Series, length: int) -> list[str]:
    def values(name: str) -> list[float]:
        return [one["measured"][name][str(length)] for one in series.results]

    seconds = [mean_and_deviation(values(name), 4) for name in (READ, WRITE)]
    return [mean_and_deviation(values(LOSS), 3), *seconds, f"{statistics.mean(values(KEPT)):,.0f}"]


def _measure(recipe: Recipe) -> dict[str, Any]:
    by_seed = [_measure_seed(recipe, seed) for seed in recipe.seeds]
    series = [
        {
            "label": label,
            "seeds": [{"seed": seed, "measured": of[label]} for seed, of in zip(recipe.seeds, by_seed, strict=True)],
        }
        for label in recipe.runs
    ]
    models = _models({"series": series})
    rows = [[f"{length:,}", label, *_cells(models[label], length)] for length in recipe.lengths for label in models]
    columns = ["tokens read before", "model", LOSS, READ, WRITE, KEPT]
    return {"measured": {"series": series}, "table": markdown_table(columns, "rlrrrr", rows)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and measure them beside each other; returns the content of `result.json`."""
    data = {"text": source_provenance(**recipe.text.model_dump())}  # a mistake there shows before the trainings
    memory_models.train_sources(recipe)
    return comparison.run_comparison(recipe, restart, data, _measure)

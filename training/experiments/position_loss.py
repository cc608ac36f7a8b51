# SPDX-License-Identifier: Apache-2.0
"""Loss by position in the window, in and out of distribution (Memory Mosaics, Fig. 10) and beyond the training length.

Windows are as long as those of the training, or longer. Each text gives windows of one kind: `stream` cuts all
documents, joined by end-of-text, as the training does; `documents` takes windows that lie within one document each.
Every model reads the same windows. Curves average losses over `bin_width` neighbouring positions and over the seeds.
Bands and effects are intervals for other seeds and other documents; where a window spans documents, it counts as one.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from typing_extensions import Self

from training.claims import Effect, Effects, crossed_effect
from training.evaluate import tokens_and_bytes
from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, Trained, blocks, plan, summary
from training.figures import better, label_lines, legend_below, new_figure, save_figure, styles_of
from training.metrics.mean_loss import bits_per_byte_of_loss
from training.recipe import SourceSection, without_unset
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows, spread_evenly


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]


class TextSection(SourceSection):
    """A source of documents, and how windows are cut from them."""

    windows: Literal["stream", "documents", "repeated"]
    num_windows: PositiveInt


class Recipe(DepthComparisonRecipe):
    """Each of the runs is compared with the first, on each text. A run may have `evaluation`.

    These are fields of the model's configuration that are changed when it is loaded; the training is that of the run
    without them. Of `parameters`, names or their ends, a table gives the values that trainings have found.
    """

    task: Literal["position_loss"]
    texts: dict[str, TextSection] = Field(min_length=1)
    context_length: int = Field(ge=2)
    bin_width: PositiveInt = 8
    batch_size: PositiveInt = 16
    better_from: PositiveInt = 50  # Fig. 10: better from about 50 tokens
    flat_from: PositiveInt = 100  # Fig. 10: flat after 100 to 150
    parameters: list[str] | None = None

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(serialize(self), "parameters")

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.context_length % self.bin_width:
            raise ValueError(f"`context_length` {self.context_length} is no multiple of `bin_width` {self.bin_width}")
        if self.context_length % 2 and any(text.windows == "repeated" for text in self.texts.values()):
            raise ValueError(f"`context_length` {self.context_length} must be even for `windows: repeated`")
        if max(self.better_from, self.flat_from) >= self.context_length - self.bin_width:
            raise ValueError(
                f"`better_from` {self.better_from} and `flat_from` {self.flat_from} must lie more than one bin below "
                f"`context_length` {self.context_length}"
            )
        return self

    @model_validator(mode="after")
    def _check_first(self) -> Self:
        first = next(iter(self.runs))
        if first not in self.labels:
            raise ValueError(f"{first!r}, with which runs are compared, cannot read {self.context_length} tokens")
        return self

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        return {label: run["evaluation"] for label, run in self.runs.items() if "evaluation" in run}

    @property
    def training_length(self) -> int:
        """Tokens of a window of the training."""
        return self.trainings[0].recipe.data.context_length

    @property
    def readers(self) -> list[Trained]:
        """The trainings whose models can read windows of this length."""
        return [training for training in self.trainings if training.can_read(self.context_length)]

    @functools.cached_property
    def labels(self) -> list[str]:
        """The runs whose models can read windows of this length."""
        return list(dict.fromkeys(training.label for training in self.readers))

    @property
    def effect_names(self) -> list[str]:
        return [f"{text}: {effect.name}" for text in self.texts for effect in _effects(self)]


# Effects


class _WindowEffect(NamedTuple):
    """An effect of one text, the mean over windows of a sum.

    Args:
        name: without the text.
        depth: in blocks.
        terms: signs and labels of the models whose measures are summed.
        measure: of a window, `loss` or `change`.
    """

    name: str
    depth: int
    terms: tuple[tuple[int, str], ...]
    measure: str


def _effects(recipe: Recipe) -> Iterator[_WindowEffect]:
    """Yield what is measured of each text."""
    first, *others = recipe.labels
    is_longer = recipe.context_length > recipe.training_length
    trained = recipe.training_length
    past = f"loss beyond {trained} tokens" if is_longer else f"loss past {recipe.better_from} tokens"
    change = f"rise beyond {trained} tokens" if is_longer else f"fall past {recipe.flat_from} tokens"
    for depth in recipe.depths:
        for label in recipe.labels:
            yield _WindowEffect(f"{change}, {label}, {blocks(depth)}", depth, ((1, label),), "change")
        for other in others:
            # A claim of more falling is of the first model, one of less rising is of the other.
            pair = (other, first) if is_longer else (first, other)
            terms = ((1, pair[0]), (-1, pair[1]))
            yield _WindowEffect(f"{change}, {pair[0]} - {pair[1]}, {blocks(depth)}", depth, terms, "change")
            terms = ((1, other), (-1, first))
            yield _WindowEffect(f"{past}, {other} - {first}, {blocks(depth)}", depth, terms, "loss")


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the effects of each text, by `TEXT: EFFECT`. They were computed from windows, which results do not keep.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    return {
        f"{text}: {effect.name}": Effect(**measured[text]["effects"][effect.name])
        for text in recipe.texts
        for effect in _effects(recipe)
    }


# Windows and their losses


def _source(text: TextSection) -> dict[str, Any]:
    return text.model_dump(include=set(SourceSection.model_fields))


def _windows_within(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield for each window that lies within a document the document's number and the ids."""
    for number, text in enumerate(documents["text"]):
        # Text that spells a special token stays text. Documents may exceed the model's length: no warning of that.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for start in range(0, len(ids) - context_length + 1, context_length):
            yield number, ids[start : start + context_length]


def cut_windows(
    documents: Dataset, tokenizer: PreTrainedTokenizerFast, context_length: int, kind: str, num_windows: int
) -> tuple[torch.Tensor, list[int]]:
    """Return at most `num_windows` windows, spread evenly over the text, each of `context_length` tokens.

    Args:
        documents: one column `text`.
        tokenizer: with an eos, which stands between documents in a `stream`.
        context_length: tokens of a window.
        kind: `"stream"`, `"documents"`, or `"repeated"`, whose halves are equal.
        num_windows: how many at most.

    Returns:
        ids `(N, T)`, and for each window a number: that of its document, or across documents that of the window.

    Raises:
        ValueError: no document is long enough for one window.
    """
    if kind == "documents":
        windows = list(_windows_within(documents, tokenizer, context_length))
    else:
        times = 2 if kind == "repeated" else 1
        packed = pack_windows(documents, tokenizer, context_length // times)["input_ids"]
        windows = [(number, times * list(ids)) for number, ids in enumerate(packed)]
    if not windows:
        raise ValueError(
            f"none of the {len(documents)} documents has {context_length} tokens: lower `context_length`, or cut this "
            "text with `windows: stream`"
        )
    chosen = spread_evenly(len(windows), num_windows)
    ids = torch.tensor([list(windows[index][1]) for index in chosen], dtype=torch.int64)
    return ids, [windows[index][0] for index in chosen]


@torch.no_grad()
def token_losses(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> np.ndarray:
    """Return the loss in nats of each token of each window, `(N, T)`; NaN for the first, which nothing predicts."""
    rows = []
    for batch in windows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # (B, T - 1, V)
        rows.append(cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").cpu())
    return torch.nn.functional.pad(torch.cat(rows), (1, 0), value=math.nan).numpy()


def _binned(by_token: np.ndarray, bin_width: int) -> np.ndarray:
    """Return means `(N, T / bin_width)` over neighbouring positions."""
    # The first bin has the NaN of the first token.
    return np.nanmean(by_token.reshape(len(by_token), -1, bin_width), axis=2)


def _window_measures(recipe: Recipe, by_token: np.ndarray) -> dict[str, np.ndarray]:
    """Return what effects are made of, for each window of losses `(N, T)`.

    Returns:
        loss: the mean past `better_from`, or in longer windows past the training length.
        change: how much the loss falls after `flat_from`, from the first quarter of these positions to the last. In
            longer windows, how much it rises past the training length, from the second half of this length, whose
            losses no longer fall for want of context.
    """
    trained = recipe.training_length
    if recipe.context_length > trained:
        beyond = by_token[:, trained:].mean(1)
        return {"loss": beyond, "change": beyond - by_token[:, trained // 2 : trained].mean(1)}
    quarter = max(1, (recipe.context_length - recipe.flat_from) // 4)
    early, late = by_token[:, recipe.flat_from :][:, :quarter], by_token[:, -quarter:]
    return {"loss": by_token[:, recipe.better_from :].mean(1), "change": early.mean(1) - late.mean(1)}


class _Measures(NamedTuple):
    """Measures of one model on the windows of a text, a row for each seed."""

    mean: float  # over all tokens, where a bin may hold fewer than others
    binned: np.ndarray  # (seeds, N, bins)
    of_windows: dict[str, np.ndarray]  # each (seeds, N)


def _rounded(effect: Effect) -> Effect:
    low, high = (end if end is None else round(end, 5) for end in (effect.low, effect.high))
    return effect._replace(value=round(effect.value, 5), low=low, high=high)


def _bands(values: np.ndarray, groups: list[int]) -> dict[str, list[float | None]]:
    """Return the mean of `(seeds, N, bins)` in each bin, and its interval over seeds and documents."""
    bands = [_rounded(crossed_effect(values[..., column], groups, "nats")) for column in range(values.shape[2])]
    parts = {"mean": "value", "low": "low", "high": "high"}
    return {name: [getattr(band, part) for band in bands] for name, part in parts.items()}


def _measured_effect(
    effect: _WindowEffect, measures: dict[tuple[str, int], _Measures], groups: list[int], kind: str
) -> Effect:
    # Paired by seed and by window: how hard a window is cancels out, and the interval is narrower.
    values = sum(sign * measures[label, effect.depth].of_windows[effect.measure] for sign, label in effect.terms)
    measured = _rounded(crossed_effect(np.asarray(values, dtype=np.float64), groups, "nats"))
    # Where windows span documents, each counts as one.
    return measured if kind == "documents" else measured._replace(basis=measured.basis.replace("documents", "windows"))


def _measure_text(recipe: Recipe, name: str, text: TextSection) -> dict[str, Any]:
    documents = load_stories(**_source(text))
    losses: dict[tuple[str, int], list[np.ndarray]] = {}
    groups: list[int] = []
    for training in tqdm(recipe.readers, desc=name):
        model, tokenizer = training.load()
        if not groups:  # only now is a tokenizer at hand; all models have the same
            windows, groups = cut_windows(documents, tokenizer, recipe.context_length, text.windows, text.num_windows)
            sizes = tokens_and_bytes(documents, tokenizer)
        by_token = token_losses(model, windows, recipe.batch_size)
        losses.setdefault((training.label, training.depth), []).append(by_token)
    measures = {}
    for key, runs in losses.items():
        of_windows = [_window_measures(recipe, by_token) for by_token in runs]
        by_measure = {measure: np.array([one[measure] for one in of_windows]) for measure in of_windows[0]}
        binned = np.array([_binned(by_token, recipe.bin_width) for by_token in runs])
        measures[key] = _Measures(float(np.nanmean(runs)), binned, by_measure)
    first = next(iter(recipe.runs))
    centres = (np.arange(recipe.context_length // recipe.bin_width) + 0.5) * recipe.bin_width
    return {
        "num_windows": len(groups),
        "num_documents": len(set(groups)),
        "positions": centres.tolist(),
        "models": [
            {"label": label, "depth": depth}
            | {"mean_loss": one.mean, "bits_per_byte": bits_per_byte_of_loss(one.mean, *sizes)}
            | {"loss": _bands(one.binned, groups)}
            | {"minus_first": _bands(one.binned - measures[first, depth].binned, groups) if label != first else None}
            for (label, depth), one in measures.items()
        ],
        "effects": {
            effect.name: _measured_effect(effect, measures, groups, text.windows)._asdict()
            for effect in _effects(recipe)
        },
    }


def _table(recipe: Recipe, measured: dict[str, Any]) -> str:
    length, trained = recipe.context_length, recipe.training_length
    edges = [("first 32", 0, 32), ("32 to 64", 32, 64), ("64 to 128", 64, 128), ("from 128", 128, length)]
    edges = [edge for edge in edges if edge[1] < length]
    # The first token of a window has no loss.
    sizes = np.full(length // recipe.bin_width, recipe.bin_width) - (np.arange(length // recipe.bin_width) == 0)
    if length > trained:
        edges = [("within training length", 0, trained), ("beyond training length", trained, length)]
    columns = ["text", "model", *(name for name, *_ in edges), "bits per byte"]
    rows = []
    for name, text in measured.items():
        positions = np.array(text["positions"])
        for model in text["models"]:
            mean = np.array(model["loss"]["mean"])
            inside = [(positions >= low) & (positions < high) for _, low, high in edges]
            cells = [f"{np.average(mean[one], weights=sizes[one]):.3f}" for one in inside]
            label = f"{model['label']}, {blocks(model['depth'])}"
            rows.append([name, label, *cells, f"{model['bits_per_byte']:.3f}"])
    seeds = f"\n\nMeans over seeds {', '.join(map(str, recipe.seeds))}."
    return markdown_table(columns, "ll" + "r" * (len(columns) - 2), rows) + seeds


def _drawn_models(recipe: Recipe, text: dict[str, Any]) -> list[dict[str, Any]]:
    """Return label, depth and losses of the models of a text."""
    if "models" in text:
        models: list[dict[str, Any]] = text["models"]
        return models
    # Results from before `models`, in which names have the depth and differences are those of the first model.
    models, first = [], next(iter(recipe.runs))
    for name, loss in text["loss"].items():
        label, _, depth = name.rpartition(", ")
        less = text["differences"].get(f"{first}, {depth} - {name}")
        turned = less and {
            end: [-value for value in less[other]]
            for end, other in (("mean", "mean"), ("low", "high"), ("high", "low"))
        }
        models.append({"label": label, "depth": int(depth.split()[0]), "loss": loss, "minus_first": turned})
    return models


def _draw_bands(
    recipe: Recipe, axes: np.ndarray, positions: list[float], models: list[dict[str, Any]], styles: dict[str, Any]
) -> None:
    """Draw the losses of one text and depth above, and the differences from the first model below."""
    for model in models:
        style = styles[model["label"]]
        for axis, bands in zip(axes, (model["loss"], model["minus_first"]), strict=False):
            if bands is None:
                continue
            axis.plot(positions, bands["mean"], **style, label=model["label"])
            if None not in bands["low"]:  # as with one seed
                axis.fill_between(positions, bands["low"], bands["high"], color=style["color"], alpha=0.15, lw=0)
    for axis in axes:
        if recipe.context_length > recipe.training_length:
            axis.axvline(recipe.training_length, color="0.3", ls=":", lw=1.2)
    if len(axes) > 1:
        axes[1].axhline(0, color="black", lw=0.8)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw losses, and below them differences from the first model: a column for each text, a picture for each depth.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the pictures.
    """
    by_text = {name: _drawn_models(recipe, text) for name, text in measured.items()}
    depths = list(dict.fromkeys(model["depth"] for models in by_text.values() for model in models))
    for depth in depths:
        of_depth = {name: [m for m in models if m["depth"] == depth] for name, models in by_text.items()}
        suffix = f"_{blocks(depth)}".replace(" ", "_") if len(depths) > 1 else ""
        _draw_depth(recipe, measured, of_depth, folder / f"{recipe.name}{suffix}.png")


def _draw_depth(
    recipe: Recipe, measured: dict[str, Any], by_text: dict[str, list[dict[str, Any]]], path: Path
) -> None:
    """Draw the models of one depth."""
    some = next(iter(by_text.values()))
    labels, depth = list(dict.fromkeys(model["label"] for model in some)), some[0]["depth"]
    rows = 2 if len(labels) > 1 else 1
    figure, axes = new_figure(rows, len(measured), height=2.4, sharex=True)
    styles = styles_of(labels)
    for column, (name, models) in zip(axes.T, by_text.items(), strict=True):
        _draw_bands(recipe, column, measured[name]["positions"], models, styles)
        column[0].set_title(f"{name}, {blocks(depth)}")
        column[-1].set_xlabel("position (tokens)")
    axes[0, 0].set_ylabel(better("loss (nats per token)", "lower"))
    if rows == 2:
        axes[1, 0].set_ylabel(better(f"less {labels[0]} (nats)", "lower"))
    if len(measured) == 1:
        label_lines(axes)
    else:
        legend_below(figure, axes)
    note = "Bands: 95 % intervals for other seeds and documents."
    title = "Loss by position in the window"
    if recipe.context_length > recipe.training_length:
        title = f"Loss beyond the training length of {recipe.training_length} tokens"
        note += " The dotted line is the training length."
    save_figure(figure, path, title, note)


def _parameters(recipe: Recipe) -> list[dict[str, Any]]:
    """Return the values that the parameters of a recipe have in each model, those of all blocks and seeds together."""
    values: dict[tuple[str, str, str], list[torch.Tensor]] = {}
    for training in recipe.readers:
        model, _ = training.load()
        for wanted, (name, parameter) in itertools.product(recipe.parameters or [], model.named_parameters()):
            if name.endswith(wanted):
                values.setdefault((wanted, training.label, training.name), []).append(parameter.detach().flatten())
    found = [(wanted, name, torch.cat(parts).double()) for (wanted, _, name), parts in values.items()]
    if absent := set(recipe.parameters or []) - {wanted for wanted, *_ in found}:
        raise ValueError(f"no model of {recipe.name!r} has a parameter whose name ends with {sorted(absent)[0]!r}")
    return [
        {
            "parameter": wanted,
            "model": name,
            "mean": one.mean().item(),
            "low": one.min().item(),
            "high": one.max().item(),
        }
        for wanted, name, one in found
    ]


def _table_of_parameters(rows: list[dict[str, Any]]) -> str:
    cells = [[row["parameter"], row["model"], *(f"{row[end]:.3f}" for end in ("mean", "low", "high"))] for row in rows]
    return markdown_table(("parameter", "model", "mean", "smallest", "largest"), "llrrr", cells)


def _measure(recipe: Recipe) -> dict[str, Any]:
    measured = {name: _measure_text(recipe, name, text) for name, text in recipe.texts.items()}
    found: dict[str, Any] = {"measured": measured, "table": _table(recipe, measured)}
    if recipe.parameters is None:
        return found
    rows = _parameters(recipe)
    return found | {"parameters": rows, "table": "\n\n".join([found["table"], _table_of_parameters(rows)])}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Measure every model on every text; returns the content of `result.json`."""
    data = {name: source_provenance(**_source(text)) for name, text in recipe.texts.items()}
    return comparison.run_comparison(recipe, restart, data, _measure)

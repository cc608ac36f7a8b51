# SPDX-License-Identifier: Apache-2.0
"""Loss by position in the window, in and out of distribution (Memory Mosaics, Fig. 10) and beyond the training length.

Windows are as long as those of the training, or longer. Each text gives windows of one kind: `stream` cuts all
documents, joined by end-of-text, as the training does; `documents` takes windows that lie within one document each.
Every model reads the same windows. Losses are averaged over `bin_width` neighbouring positions and over the seeds. The
bands are bootstrap intervals over documents, and over windows where a window spans documents.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt, model_validator
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from typing_extensions import Self

from training.evaluate import tokens_and_bytes
from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, fits_context, plan, summary
from training.figures import new_figure, save_figure
from training.metrics.mean_loss import bits_per_byte_of_loss
from training.metrics.per_position_loss.per_position_loss import per_position_loss
from training.recipe import SourceSection
from training.tables import Claim, markdown_table
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


__all__ = ["Recipe", "plan", "run", "summary"]

# A loss that rises by less counts as level, in nats.
LEVEL = 0.02


class TextSection(SourceSection):
    """A source of documents, and how windows are cut from them."""

    windows: Literal["stream", "documents"]
    num_windows: PositiveInt
    in_distribution: bool


class Recipe(DepthComparisonRecipe):
    """The first of the runs is compared with each of the others, on each text."""

    task: Literal["position_loss"]
    texts: dict[str, TextSection] = Field(min_length=1)
    context_length: int = Field(ge=2)
    bin_width: PositiveInt = 8
    batch_size: PositiveInt = 16
    better_from: PositiveInt = 50  # Fig. 10: better from about 50 tokens
    flat_from: PositiveInt = 100  # Fig. 10: flat after 100 to 150

    @model_validator(mode="after")
    def _check_positions(self) -> Self:
        if self.context_length % self.bin_width:
            raise ValueError(f"`context_length` {self.context_length} is no multiple of `bin_width` {self.bin_width}")
        if max(self.better_from, self.flat_from) >= self.context_length - self.bin_width:
            raise ValueError(
                f"`better_from` {self.better_from} and `flat_from` {self.flat_from} must lie more than one bin below "
                f"`context_length` {self.context_length}"
            )
        return self

    @property
    def training_length(self) -> int:
        """Tokens of a window of the training."""
        return self.trainings[0].recipe.data.context_length


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
        kind: `"stream"` or `"documents"`.
        num_windows: how many at most.

    Returns:
        ids `(N, T)`, and for each window a number: that of its document, or in a stream that of the window.

    Raises:
        ValueError: no document is long enough for one window.
    """
    if kind == "stream":
        windows = list(enumerate(pack_windows(documents, tokenizer, context_length)["input_ids"]))
    else:
        windows = list(_windows_within(documents, tokenizer, context_length))
    if not windows:
        raise ValueError(
            f"none of the {len(documents)} documents has {context_length} tokens: lower `context_length`, or cut this "
            "text with `windows: stream`"
        )
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(num_windows, len(windows))).round().astype(int))
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


def _bands(values: np.ndarray, groups: list[int]) -> dict[str, list[float]]:
    """Return the mean over windows and its 95 % band, for each column of `(N, bins)`."""
    # As text, whose order decides which documents a seed draws: that of numbers would give other bands.
    bands = per_position_loss(values, [str(group) for group in groups])
    return {name: [round(float(number), 5) for number in bands[name]] for name in ("mean", "low", "high")}


def _pairs(recipe: Recipe, means: dict[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """Yield the names of the first model and of each other one of its depth."""
    first = next(iter(recipe.runs))
    # Models that cannot read windows of this length have no means.
    measured = [training for training in recipe.trainings if training.name in means]
    ours = {training.depth: training.name for training in measured if training.label == first}
    theirs = {training.name: training.depth for training in measured if training.label != first}
    for name, depth in theirs.items():
        yield ours[depth], name


def _differences(recipe: Recipe, means: dict[str, np.ndarray], groups: list[int]) -> dict[str, dict[str, list[float]]]:
    """Return the loss of the first model minus that of each other one of its depth, on the same windows."""
    # Paired by window: how hard a window is cancels out, and the band is narrower.
    pairs = _pairs(recipe, means)
    return {f"{ours} - {theirs}": _bands(means[ours] - means[theirs], groups) for ours, theirs in pairs}


def _late_falls(recipe: Recipe, means: dict[str, np.ndarray], groups: list[int]) -> dict[str, dict[str, float]]:
    """Return how much the loss falls after `flat_from`: from the first quarter of these positions to the last."""
    start = recipe.flat_from // recipe.bin_width
    quarter = max(1, (recipe.context_length // recipe.bin_width - start) // 4)
    falls = {key: mean[:, start : start + quarter].mean(1) - mean[:, -quarter:].mean(1) for key, mean in means.items()}
    for ours, theirs in _pairs(recipe, means):
        falls[f"{ours} - {theirs}"] = falls[ours] - falls[theirs]
    bands = {key: _bands(fall[:, None], groups) for key, fall in falls.items()}
    return {key: {name: numbers[0] for name, numbers in band.items()} for key, band in bands.items()}


def _measure_text(recipe: Recipe, name: str, text: TextSection) -> dict[str, Any]:
    documents = load_stories(**_source(text))
    losses: dict[str, list[np.ndarray]] = {}
    groups: list[int] = []
    for training in tqdm(recipe.trainings, desc=name):
        model, tokenizer = training.load()
        if not fits_context(model, recipe.context_length):
            continue  # the model is absent from the result
        if not groups:  # only now is a tokenizer at hand; all models have the same
            windows, groups = cut_windows(documents, tokenizer, recipe.context_length, text.windows, text.num_windows)
            sizes = tokens_and_bytes(documents, tokenizer)
        by_token = token_losses(model, windows, recipe.batch_size)
        losses.setdefault(training.name, []).append(_binned(by_token, recipe.bin_width))
    means = {key: np.mean(runs, axis=0) for key, runs in losses.items()}  # over seeds
    centres = (np.arange(recipe.context_length // recipe.bin_width) + 0.5) * recipe.bin_width
    return {
        "num_windows": len(groups),
        "num_documents": len(set(groups)),
        "positions": centres.tolist(),
        "bits_per_byte": {key: bits_per_byte_of_loss(float(mean.mean()), *sizes) for key, mean in means.items()},
        "loss": {key: _bands(mean, groups) for key, mean in means.items()},
        "differences": _differences(recipe, means, groups),
        "late_fall": _late_falls(recipe, means, groups),
    }


def _table(recipe: Recipe, measured: dict[str, Any]) -> str:
    length, trained = recipe.context_length, recipe.training_length
    edges = [("first 32", 0, 32), ("32 to 64", 32, 64), ("64 to 128", 64, 128), ("from 128", 128, length)]
    edges = [edge for edge in edges if edge[1] < length]
    if length > trained:
        edges = [("within training length", 0, trained), ("beyond training length", trained, length)]
    columns = ["text", "model", *(name for name, *_ in edges), "bits per byte"]
    rows = []
    for name, text in measured.items():
        positions = np.array(text["positions"])
        for key, band in text["loss"].items():
            mean = np.array(band["mean"])
            cells = [f"{mean[(positions >= low) & (positions < high)].mean():.3f}" for _, low, high in edges]
            rows.append([name, key, *cells, f"{text['bits_per_byte'][key]:.3f}"])
    return markdown_table(columns, "ll" + "r" * (len(columns) - 2), rows)


def _claim_on_late_fall(recipe: Recipe, name: str, pair: str, falls: dict[str, dict[str, float]]) -> Claim:
    ours, theirs = pair.split(" - ")
    fall, other_fall, difference = (falls[key] for key in (ours, theirs, pair))
    bands = {key: f"{band['mean']:.3f} ({band['low']:.3f} to {band['high']:.3f})" for key, band in falls.items()}
    # Either the other model's fall is not sure to be one, or the mosaic's is surely larger.
    falls_more = fall["low"] > 0 and (other_fall["low"] <= 0 or difference["low"] > 0)
    return Claim(
        f"Out of distribution ({name}), the mosaic's loss keeps falling where the transformer's is flat",
        "transformer flat after 100 to 150 tokens, mosaic still falling (Fig. 10; plotted only)",
        f"fall past {recipe.flat_from} tokens: {ours} {bands[ours]}, {theirs} {bands[theirs]}, "
        f"difference {bands[pair]} nats",
        "reproduced" if falls_more else "contradicted" if difference["high"] < 0 else "not at this size",
    )


def _claims_out_of_distribution(recipe: Recipe, name: str, measured: dict[str, Any]) -> Iterator[Claim]:
    past = np.array(measured["positions"]) >= recipe.better_from
    for pair, band in measured["differences"].items():
        low, mean, high = (np.array(band[part])[past] for part in ("low", "mean", "high"))
        better, worse = int((high < 0).sum()), int((low > 0).sum())
        yield Claim(
            f"Out of distribution ({name}), past about {recipe.better_from} tokens the mosaic predicts better",
            "better from about 50 tokens on, on Simple English Wikipedia (Fig. 10; plotted only)",
            f"{pair}: {mean.mean():+.3f} nats on average; of {past.sum()} bins its band lies below 0 in {better}, "
            f"above in {worse}",
            "reproduced" if better == past.sum() else "contradicted" if worse > better else "not at this size",
        )
        yield _claim_on_late_fall(recipe, name, pair, measured["late_fall"])


def _claims_beyond(recipe: Recipe, name: str, measured: dict[str, Any]) -> Iterator[Claim]:
    positions = np.array(measured["positions"])
    is_beyond = positions >= recipe.training_length
    # Without the first half, whose losses are high for want of context.
    is_before = ~is_beyond & (positions >= recipe.training_length // 2)
    means = {key: np.array(band["mean"]) for key, band in measured["loss"].items()}
    rises = {key: float(mean[is_beyond].mean() - mean[is_before].mean()) for key, mean in means.items()}
    # The comma keeps out labels that only begin alike.
    rises_of_mosaic = [rise for key, rise in rises.items() if key.startswith(f"{next(iter(recipe.runs))},")]
    listed = ", ".join(f"{key} {rise:+.3f}" for key, rise in rises.items())
    yield Claim(
        f"Beyond the training length ({name}) the mosaic's loss does not rise",
        "attention maps carry over to three times the length (Fig. 13); no losses given",
        f"loss beyond {recipe.training_length} tokens minus that of the second half before: {listed} nats",
        "reproduced" if max(rises_of_mosaic) < LEVEL else "contradicted",
    )


def _claims(recipe: Recipe, name: str, text: TextSection, measured: dict[str, Any]) -> Iterator[Claim]:
    if recipe.context_length > recipe.training_length:
        yield from _claims_beyond(recipe, name, measured)
    elif not text.in_distribution:
        yield from _claims_out_of_distribution(recipe, name, measured)


def _draw(recipe: Recipe, measured: dict[str, Any]) -> None:
    """Draw the losses of each text above, and the differences from the first model below."""
    names = list(dict.fromkeys(training.name for training in recipe.trainings))
    rows = 2 if any(text["differences"] for text in measured.values()) else 1
    figure, axes = new_figure(rows, len(measured), sharex=True)
    for column, (name, text) in enumerate(measured.items()):
        positions = text["positions"]
        for row, bands in zip(range(rows), (text["loss"], text["differences"]), strict=False):
            for key, band in bands.items():
                # A difference has the colour of the other model.
                color = f"C{names.index(key.split(' - ')[-1])}"
                axes[row, column].plot(positions, band["mean"], color=color, label=key, lw=1.5)
                axes[row, column].fill_between(positions, band["low"], band["high"], color=color, alpha=0.2, lw=0)
            if recipe.context_length > recipe.training_length:
                axes[row, column].axvline(recipe.training_length, color="black", ls=":", label="training length")
        axes[0, column].set_title(f"{name} ({text['num_windows']} windows)")
        axes[-1, column].set_xlabel("position in the window (tokens)")
    axes[0, 0].set_ylabel("loss (nats per token)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    if rows == 2:
        axes[1, 0].set_ylabel(f"{next(iter(recipe.runs))} minus the other (nats per token)")
        for axis in axes[1]:
            axis.axhline(0, color="black", lw=0.8)
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _measure(recipe: Recipe) -> dict[str, Any]:
    measured = {name: _measure_text(recipe, name, text) for name, text in recipe.texts.items()}
    _draw(recipe, measured)
    claims = [claim for name, text in recipe.texts.items() for claim in _claims(recipe, name, text, measured[name])]
    return {"measured": measured, "table": _table(recipe, measured), "claims": claims}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Measure every model on every text; returns the content of `result.json`."""
    data = {name: source_provenance(**_source(text)) for name, text in recipe.texts.items()}
    return comparison.run_comparison(recipe, restart, data, _measure)

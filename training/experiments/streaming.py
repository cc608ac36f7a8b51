# SPDX-License-Identifier: Apache-2.0
"""A long stream behind a bounded memory: the loss from beginning to end, and the bytes that the memory takes.

One text of many tokens is read without a break. A Memory Mosaic forgets pairs by a policy (see
`modeling_memory_mosaic.bounded`), a rotary transformer keeps a window, with or without attention sinks. Beside them
stands the same model on the same text in pieces of the training length, each of which is read from nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.ticker import EngFormatter
from pydantic import PositiveInt, model_validator
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from typing_extensions import Self

from modeling_memory_mosaic import bounded
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME, memory_kwargs
from training.baselines.windowed import NAME, windowed_arguments
from training.claims import Effects, mean_effect
from training.experiments import comparison
from training.experiments.bound import FORGOTTEN_BY, NUM_SINKS, SINKS, WINDOW
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.experiments.position_loss import token_losses
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.recipe import SourceSection
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

PIECES = "pieces read from nothing"
# Tokens that are read at a time.
CHUNK_LENGTH = 512
# The stream is measured in tenths. The first is left out where its beginning would tell.
TENTHS = 10
# A window holds nothing of the text before it. So it is measured in these tenths alone, those of the table.
OF_TABLE = (0, 1, 4, 9)


class Recipe(ComparisonRecipe):
    """Every way to forget is compared with pieces of the training length."""

    task: Literal["streaming"]
    text: SourceSection
    num_tokens: PositiveInt
    stretch: PositiveInt
    budget: PositiveInt
    policies: list[str]

    @model_validator(mode="after")
    def _check_stretches(self) -> Self:
        lengths = {run.data.context_length for run in self.run_recipes.values()}
        if self.num_tokens % (TENTHS * self.stretch) or any(self.stretch % length for length in lengths):
            raise ValueError(
                f"`num_tokens` {self.num_tokens} must be whole tenths of `stretch` {self.stretch} tokens each, and "
                f"`stretch` a multiple of the training's `context_length`, which is {sorted(lengths)}"
            )
        return self

    def ways(self, label: str) -> list[str]:
        """Return how a run's model forgets."""
        return self.policies if self.is_mosaic(label) else [WINDOW, SINKS]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Run and way of each measurement that is bounded."""
        return [(label, way) for label in self.runs for way in self.ways(label)]

    @property
    def effect_names(self) -> list[str]:
        names = []
        for label, way in self.settings:
            names += [_rise(label, way), _gain(label, way)]
            names += [_growth(label, way)] if way in self.policies else []
        return names


def _rise(label: str, way: str) -> str:
    return f"loss of the last tenth - of the second, {label}, {way}"


def _gain(label: str, way: str) -> str:
    return f"loss, {label}, {way} - {PIECES}"


def _growth(label: str, way: str) -> str:
    return f"growth of the memory after the first tenth, {label}, {way}"


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the effects, with intervals over stretches of the stream, of which each is the mean over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    losses = {(one["label"], one["way"]): _mean_losses(one) for one in measured["streams"]}
    sizes = {(one["label"], one["way"]): np.array(one["bytes"]) for one in measured["streams"]}
    tenth = recipe.num_tokens // recipe.stretch // TENTHS
    basis = f"{recipe.stretch:,} tokens each, {len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"
    found: Effects = {}
    for label, way in recipe.settings:
        own = losses[label, way]
        # The same stretch of pieces is subtracted: other stories are harder or easier for both.
        apart = own - losses[label, PIECES]
        rise = apart[-tenth:] - apart[tenth : 2 * tenth]
        apart = apart[~np.isnan(apart)]
        found[_rise(label, way)] = mean_effect(rise.tolist(), "nats", f"{tenth} pairs of stretches of {basis}")
        found[_gain(label, way)] = mean_effect(apart.tolist(), "nats", f"{len(apart)} stretches of {basis}")
        if way in recipe.policies:
            growth = (sizes[label, way][:, tenth:] - sizes[label, way][:, [tenth - 1]]).max(0)
            found[_growth(label, way)] = mean_effect(growth.tolist(), "bytes", f"{len(growth)} stretches of {basis}")
    return found


def _mean_losses(stream: dict[str, Any]) -> np.ndarray:
    """Return the mean over seeds of the loss of each stretch, NaN where it was not measured."""
    return np.array(stream["losses"], dtype=float).mean(0)


# Reading


def memory_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that the layers of a memory hold."""
    tensors: list[torch.Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            tensors += [one for one in values if isinstance(one, torch.Tensor)]
    # Two names of one storage count once.
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@torch.no_grad()
def mosaic_stream(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Read a stream `(T,)` behind one memory, and yield the losses of each chunk, and the bytes of the memory then.

    The first token of the stream, which nothing predicts, has the loss NaN.
    """
    cache: Any = None
    before = torch.full((1, model.config.vocab_size), torch.nan, device=model.device)
    for chunk in ids.split(CHUNK_LENGTH):
        output: Any = model(chunk[None], use_cache=True, **memory_kwargs(cache))
        cache, logits = output[MEMORY_NAME], output.logits[0].float()
        losses = cross_entropy(torch.cat([before, logits[:-1]]), chunk, reduction="none")
        before = logits[-1:]
        yield losses, memory_bytes(cache)


@torch.no_grad()
def window_stream(model: Any, ids: torch.Tensor, max_pairs: int, sinks: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Do the same with a transformer that sees a window, whose cache holds `max_pairs` keys and values in each layer.

    A window is read again for each chunk, with as many tokens before it as the layers can see one behind the other,
    and with the sinks of the stream in front of those. So nothing differs from reading with a cache. Outside the
    tenths of `OF_TABLE` all losses are NaN.
    """
    config = model.config
    behind = config.num_hidden_layers * max_pairs
    size = 2 * config.num_hidden_layers * max_pairs * config.hidden_size * model.dtype.itemsize
    for start in range(0, len(ids), CHUNK_LENGTH):
        if start * TENTHS // len(ids) not in OF_TABLE:
            yield torch.full((len(ids[start : start + CHUNK_LENGTH]),), torch.nan), size
            continue
        # One more token, whose logits predict the first of the chunk.
        first = max(0, start - 1 - behind)
        read = ids[first : start + CHUNK_LENGTH]
        num_sinks = min(sinks, first)
        read = torch.cat([ids[:num_sinks], read])
        logits = model(read[None], **windowed_arguments(model, len(read), max_pairs, sinks)).logits[0, :-1].float()
        losses = cross_entropy(logits, read[1:], reduction="none")
        if start == 0:
            losses = torch.cat([losses.new_full((1,), torch.nan), losses])
        yield losses[len(losses) - len(ids[start : start + CHUNK_LENGTH]) :], size


def _stretches(
    recipe: Recipe, stream: Iterator[tuple[torch.Tensor, int]], name: str
) -> tuple[list[float | None], list[int]]:
    """Return the mean loss of each stretch of a stream, if it was measured, and the most bytes of the memory in it."""
    losses, sizes = [], []
    for chunk, size in tqdm(stream, total=-(-recipe.num_tokens // CHUNK_LENGTH), desc=name, unit="chunk"):
        losses.append(chunk.cpu().numpy())
        sizes.append(np.full(len(chunk), size))
    by_stretch = np.concatenate(losses).reshape(-1, recipe.stretch)
    most = np.concatenate(sizes).reshape(-1, recipe.stretch).max(1)
    means = [None if np.isnan(one).all() else float(np.nanmean(one)) for one in by_stretch]
    return means, most.tolist()


def _read(recipe: Recipe, training: Trained, way: str, ids: torch.Tensor) -> tuple[list[float | None], list[int]]:
    model, _ = training.load()
    name = f"{training.label}, {way}, seed {training.seed}"
    if way == PIECES:
        pieces = ids.view(-1, training.recipe.data.context_length)
        by_token = token_losses(model, pieces, batch_size=16)
        return np.nanmean(by_token.reshape(-1, recipe.stretch), axis=1).tolist(), []
    ids = ids.to(model.device)
    if way in recipe.policies:
        with bounded(model, max_pairs=recipe.budget, policy=way):
            return _stretches(recipe, mosaic_stream(model, ids), name)
    model.set_attn_implementation(NAME)
    sinks = NUM_SINKS if way == SINKS else 0
    return _stretches(recipe, window_stream(model, ids, recipe.budget, sinks), name)


def _stream_ids(recipe: Recipe) -> torch.Tensor:
    """Return the stream `(num_tokens,)`.

    Raises:
        ValueError: the source has too few tokens.
    """
    first = recipe.trainings[0]
    _, tokenizer = first.load()
    stories, length = load_stories(**recipe.text.model_dump()), first.recipe.data.context_length
    windows = pack_windows(stories, tokenizer, length)["input_ids"]
    if len(windows) * length < recipe.num_tokens:
        raise ValueError(
            f"`text` has {len(windows) * length} tokens in windows of {length}, fewer than `num_tokens` "
            f"{recipe.num_tokens}: read more stories, or lower it"
        )
    return torch.tensor(np.array(windows[: recipe.num_tokens // length])).flatten()


# Results


def _table(recipe: Recipe, streams: list[dict[str, Any]]) -> str:
    tenth = recipe.num_tokens // recipe.stretch // TENTHS
    rows = []
    for one in streams:
        losses = _mean_losses(one).reshape(TENTHS, tenth).mean(1)
        size = f"{max(map(max, one['bytes'])) / 2**20:.2f}" if one["bytes"] else ""
        rows.append([one["label"], one["way"], *(f"{losses[place]:.3f}" for place in OF_TABLE), size])
    columns = ["model", "forgets by", "first tenth", "second", "fifth", "last", "memory, MiB"]
    return markdown_table(columns, "llrrrrr", rows)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the loss along the stream, less that of pieces on the same tokens: a line for each way to forget.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    figure, axes = new_figure(1, 1, height=3.6)
    axis = axes[0, 0]
    losses = {(one["label"], one["way"]): np.array(one["losses"], dtype=float) for one in measured["streams"]}
    tenth = recipe.num_tokens // recipe.stretch // TENTHS
    places = (np.arange(TENTHS) + 0.5) * tenth * recipe.stretch
    names = {
        (label, way): f"{label}, forgets {FORGOTTEN_BY[way]}" if way in FORGOTTEN_BY else f"{label}, {way}"
        for label, way in recipe.settings
    }
    styles = styles_of(names.values())
    for (label, way), name in names.items():
        apart = losses[label, way] - losses[label, PIECES]
        by_tenth = apart.reshape(len(apart), TENTHS, tenth).mean(2)
        known = ~np.isnan(by_tenth[0])
        plot_seeds(axis, places[known].tolist(), by_tenth[:, known], label=name, marker=".", **styles[name])
    axis.axhline(0, color="black", lw=0.8)
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axis.set(xlabel="tokens of the stream", ylabel=better(f"loss less that of {PIECES} (nats)", "lower"))
    label_lines(axes)
    title = f"Reading {recipe.num_tokens:,} tokens without a break"
    note = f"A head holds {recipe.budget} pairs. {seeds_note(len(recipe.seeds))}"
    save_figure(figure, folder / f"{recipe.name}.png", title, note)


def _read_in_all_ways(
    recipe: Recipe, training: Trained, ids: torch.Tensor
) -> dict[str, tuple[list[float | None], list[int]]]:
    return {way: _read(recipe, training, way, ids) for way in [PIECES, *recipe.ways(training.label)]}


def _measure(recipe: Recipe) -> dict[str, Any]:
    found, streams = comparison.measure_all(recipe, _read_in_all_ways, _stream_ids(recipe)), []
    for label in recipe.runs:
        for way in [PIECES, *recipe.ways(label)]:
            read = [by_way[way] for training, by_way in found if training.label == label]
            losses, sizes = [loss for loss, _ in read], [size for _, size in read if size]
            streams.append({"label": label, "way": way, "losses": losses, "bytes": sizes})
    return {"measured": {"streams": streams}, "table": _table(recipe, streams)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    data = {"text": source_provenance(**recipe.text.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)

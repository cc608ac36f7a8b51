# SPDX-License-Identifier: Apache-2.0
"""Reading instead of training: the loss on a text of another kind, behind memories of more and more of its like.

Models that were trained on stories read tokens of the other text, in sequence or in parts that are read alone and
joined, and then windows of its validation part behind that memory. LoRA trains the same models on the same text.
"""

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from modeling_memory_mosaic import MosaicMemory
from training.claims import Effect, Effects, crossed_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.experiments.position_loss import TextSection, cut_windows
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.paths import CONFIGURATION
from training.recipe import SourceSection, load_recipe
from training.tables import markdown_table, mean_and_deviation
from training.tasks import fine_tuning
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

NOTHING, LORA = "nothing read", "LoRA"
IN_SEQUENCE, ALONE = "in sequence", "in parts read alone"


class Recipe(ComparisonRecipe):
    """A run may have `evaluation`: fields of the configuration that are changed when its model is loaded."""

    task: Literal["reading"]
    read: SourceSection
    asked: TextSection
    context_length: PositiveInt
    num_tokens: list[PositiveInt] = Field(min_length=1)
    # Of the most tokens, read alone: the pairs that are left when they are merged.
    consolidated: list[PositiveInt] = []
    lora: str
    lora_settings: dict[str, Any] = {}
    batch_size: PositiveInt = 4

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        return {label: run["evaluation"] for label, run in self.runs.items() if "evaluation" in run}

    @property
    def adapted(self) -> list[str]:
        """The runs whose models LoRA trains, too: those that are loaded as they were trained."""
        return [label for label in self.runs if label not in self.evaluations]

    @property
    def ways(self) -> list[str]:
        """What each model has read, in words."""
        read = [f"{number:,} tokens {how}" for how in (IN_SEQUENCE, ALONE) for number in self.num_tokens]
        most = max(self.num_tokens)
        return [*read, *(f"{most:,} tokens {ALONE}, merged into {number:,}" for number in self.consolidated)]

    @property
    def contrasts(self) -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
        """Differences of loss by name, each of two pairs of run and way."""
        found = {}
        for label in self.runs:
            for way in self.ways:
                found[f"loss, {label}, {way} - {NOTHING}"] = ((label, way), (label, NOTHING))
                if label in self.adapted:
                    found[f"loss, {label}, {way} - {LORA}"] = ((label, way), (label, LORA))
            most, least = (f"{bound(self.num_tokens):,} tokens" for bound in (max, min))
            for how in (IN_SEQUENCE, ALONE):
                found[f"loss, {label}, {most} - {least}, {how}"] = (
                    (label, f"{most} {how}"),
                    (label, f"{least} {how}"),
                )
        return found

    @property
    def effect_names(self) -> list[str]:
        return list(self.contrasts)


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the effects, which were computed from windows that results do not keep.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    return {name: Effect(**measured["effects"][name]) for name in recipe.effect_names}


class Read(NamedTuple):
    """What a model has read: `memory`, the seconds that it took, and the pairs of a head."""

    memory: MosaicMemory
    seconds: float
    pairs: int


def _tokens(documents: Dataset, tokenizer: Any, number: int) -> torch.Tensor:
    """Return the first so many tokens `(1, number)` of documents that are joined by end-of-text."""
    windows = pack_windows(documents, tokenizer, number)
    if len(windows) == 0:
        raise ValueError(f"the text that is read has fewer than {number} tokens: lower `num_tokens`")
    return torch.tensor(windows[0]["input_ids"])[None].long()


def _read(model: Any, ids: torch.Tensor, how: str, length: int) -> Read:
    started = time.monotonic()
    if how == IN_SEQUENCE:
        memory = model.memorize(ids, source="text")
    else:
        parts = ids.view(-1, length).to(model.device)
        texts = [model.memorize(part[None], source=str(number)) for number, part in enumerate(parts)]
        memory = MosaicMemory.union(texts)
    return Read(memory, time.monotonic() - started, len(memory))


@torch.no_grad()
def window_losses(model: Any, windows: torch.Tensor, memory: MosaicMemory | None, batch_size: int) -> np.ndarray:
    """Return the mean loss of each window `(windows,)` of ids `(windows, T)` behind a memory."""
    losses = []
    for ids in tqdm(windows.to(model.device).split(batch_size), leave=False, unit="batch"):
        arguments = {"input_ids": ids, "use_cache": False} if memory is None else memory.prompt(ids)
        logits = model(**arguments).logits[:, :-1].float()
        losses.append(cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1).double().cpu())
    return torch.cat(losses).numpy()


def _lora(recipe: Recipe, training: Trained, windows: torch.Tensor) -> tuple[np.ndarray, dict[str, Any]]:
    """Train LoRA on a model, and return its losses, with seconds and trained numbers."""
    base = training.recipe.folder / "model"
    settings = {"model": str(base), "base": None, "seed": training.seed, "output_dir": f"{base.parent}-lora"}
    path = CONFIGURATION / "recipe" / f"{recipe.lora}.yaml"
    adapted: Any = load_recipe(path, settings=[recipe.lora_settings, settings])
    result = fine_tuning.run(adapted)
    model = comparison.load_model(Path(adapted.folder) / "merged")[0]
    cost = {"seconds": result["seconds"], "trained": result["trained_parameters"]}
    return window_losses(model, windows, None, recipe.batch_size), cost


def _measure_training(
    recipe: Recipe, training: Trained, windows: torch.Tensor
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Return losses `(windows,)` and costs, by what a model has read."""
    model: Any
    model, tokenizer = training.load()
    most = _tokens(load_stories(**recipe.read.model_dump()), tokenizer, max(recipe.num_tokens))
    losses = {NOTHING: window_losses(model, windows, None, recipe.batch_size)}
    costs: dict[str, dict[str, Any]] = {NOTHING: {"seconds": 0.0, "pairs": 0}}
    for how in (IN_SEQUENCE, ALONE):
        for number in recipe.num_tokens:
            way, read = f"{number:,} tokens {how}", _read(model, most[:, :number], how, recipe.context_length)
            losses[way] = window_losses(model, windows, read.memory, recipe.batch_size)
            costs[way] = {"seconds": read.seconds, "pairs": read.pairs}
    for number in recipe.consolidated:
        started, memory = time.monotonic(), read.memory.select(read.memory.sources)
        # Parts are one text here: nothing is to be forgotten.
        memory.source_ids, memory.sources = torch.zeros_like(memory.source_ids), ["text"]
        bound = memory.consolidate(number)
        way = f"{max(recipe.num_tokens):,} tokens {ALONE}, merged into {number:,}"
        losses[way] = window_losses(model, windows, memory, recipe.batch_size)
        seconds = costs[f"{max(recipe.num_tokens):,} tokens {ALONE}"]["seconds"] + time.monotonic() - started
        costs[way] = {"seconds": seconds, "pairs": len(memory), "bound": float(bound.max())}
    if training.label in recipe.adapted:
        losses[LORA], costs[LORA] = _lora(recipe, training, windows)
    return losses, costs


def _table(recipe: Recipe, entries: list[dict[str, Any]]) -> str:
    rows = []
    for one in entries:
        seconds = f"{np.mean(one['seconds']):,.0f}"
        rows.append([one["label"], one["way"], mean_and_deviation(one["losses"], 3), seconds, f"{one['trained']:,}"])
    columns = ["model", "has read", f"loss on {len(recipe.seeds)} seeds", "seconds", "trained numbers"]
    return markdown_table(columns, "llrrr", rows)


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the loss against the tokens that were read: a panel for each way to read them.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    figure, axes = new_figure(2, 1, height=2.9, sharex=True, sharey=True)
    losses = {(one["label"], one["way"]): one["losses"] for one in measured["losses"]}
    styles = styles_of(recipe.runs)
    titles = {IN_SEQUENCE: "read in sequence", ALONE: "read alone, in parts"}
    for axis, (how, title) in zip(axes[:, 0], titles.items(), strict=True):
        for label in recipe.runs:
            by_seed = np.array([losses[label, f"{number:,} tokens {how}"] for number in recipe.num_tokens]).T
            plot_seeds(axis, recipe.num_tokens, by_seed, marker=".", label=label, **styles[label])
            for way, dashes in ((NOTHING, ":"), (LORA, "-.")):
                if (label, way) in losses:
                    height = float(np.median(losses[label, way]))
                    axis.axhline(height, color=styles[label]["color"], ls=dashes, lw=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(recipe.num_tokens, [f"{number:,}" for number in recipe.num_tokens])
        axis.set(title=title, ylabel=better("loss on the other text (nats)", "lower"))
    axes[-1, 0].set_xlabel("tokens read")
    label_lines(axes)
    note = f"{seeds_note(len(recipe.seeds))} Dotted: nothing read."
    note += " Dashes and dots: LoRA trained on the text." if recipe.adapted else ""
    save_figure(figure, folder / f"{recipe.name}.png", "Loss on a text after another was read", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    _, tokenizer = recipe.trainings[0].load()
    text = recipe.asked
    documents = load_stories(**text.model_dump(include=set(SourceSection.model_fields)))
    windows, numbers = cut_windows(documents, tokenizer, recipe.context_length, text.windows, text.num_windows)
    losses: dict[tuple[str, str], list[np.ndarray]] = {}
    costs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for training, (found, spent) in comparison.measure_all(recipe, _measure_training, windows):
        for way, values in found.items():
            losses.setdefault((training.label, way), []).append(values)
            costs.setdefault((training.label, way), []).append(spent[way])
    entries = [
        {
            "label": label,
            "way": way,
            "losses": [float(one.mean()) for one in values],
            "seconds": [one["seconds"] for one in costs[label, way]],
            "pairs": costs[label, way][0].get("pairs"),
            "bound": costs[label, way][0].get("bound"),
            "trained": costs[label, way][0].get("trained", 0),
        }
        for (label, way), values in losses.items()
    ]
    found_effects = {
        name: crossed_effect(np.stack(losses[one]) - np.stack(losses[other]), numbers, "nats")._asdict()
        for name, (one, other) in recipe.contrasts.items()
    }
    return {"measured": {"losses": entries, "effects": found_effects}, "table": _table(recipe, entries)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    asked = recipe.asked.model_dump(include=set(SourceSection.model_fields))
    data = {"read": source_provenance(**recipe.read.model_dump()), "asked": source_provenance(**asked)}
    return comparison.run_comparison(recipe, restart, data, _measure)

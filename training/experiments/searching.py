# SPDX-License-Identifier: Apache-2.0
"""Retrieval from many pairs by reading few of them: how few, how large the error is, and how large it could have been.

Story models read many tokens, in parts that are read alone and joined, and then a story behind that memory. Every
read-out of every head is computed twice: from all pairs, and as `modeling_memory_mosaic.nearest` does within a
tolerance, by several indexes. The same is done with the queries, keys and values of a rotary transformer. The lengths
of its values differ, so that the largest of them is the unit of its errors.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from tqdm import tqdm
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from modeling_memory_mosaic import MosaicMemory
from modeling_memory_mosaic.retrieval_memory_mosaic import INDEXES, Clusters, Search, SearchReport
from training.claims import Effects, mean_effect
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, plan, summary
from training.figures import better, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.recipe import SourceSection
from training.tables import markdown_table, mean_and_deviation
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

MEASURES = ("share of pairs read", "mass of the others at most", "largest error", "largest bound")
MARGIN = "smallest bound less error"
# How many pairs matter at all.
MASS = "share of pairs with 0.99 of the weight"
# Measures of a share of the pairs, and what stands for an index there.
SHARE, SHARE_INDEXES = "share", ("clusters", "exact")
ERRORS = ("mean error", "largest error", MARGIN)


class Recipe(ComparisonRecipe):
    """`read` is memorized, and a part of `asked` is read behind it."""

    task: Literal["searching"]
    read: SourceSection
    asked: SourceSection
    num_tokens: PositiveInt
    part_length: PositiveInt
    num_queries: PositiveInt
    tolerances: list[PositiveFloat] = Field(min_length=1)
    indexes: list[Literal["clusters", "exact", "lsh", "usearch"]] = Field(min_length=1)
    # Of the pairs, read one by one by clusters and by the exact index, whatever the error is.
    shares: list[PositiveFloat] = Field(min_length=1)

    @property
    def settings(self) -> list[tuple[str, str, float]]:
        """Run, index and tolerance of each measurement."""
        return list(itertools.product(self.runs, self.indexes, self.tolerances))

    @property
    def effect_names(self) -> list[str]:
        return (
            [
                f"{measure} ({label}; {index}; tolerance {tolerance:g})"
                for label, index, tolerance in self.settings
                for measure in (*MEASURES, MARGIN)
            ]
            + [
                f"{measure} ({label}; {index}; {share:.0%} of the pairs)"
                for label, index, share in itertools.product(self.runs, SHARE_INDEXES, self.shares)
                for measure in ERRORS
            ]
            + [f"{MASS} ({label})" for label in self.runs]
        )


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return the measures of each setting, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    found = {}
    for one in measured["settings"]:
        place = f"{one['label']}; {one['index']}; tolerance {one['tolerance']:g}"
        for measure in (*MEASURES, MARGIN):
            found[f"{measure} ({place})"] = mean_effect([seed[measure] for seed in one["seeds"]], "")
    for one in measured["shares"]:
        for measure in ERRORS:
            name = f"{measure} ({one['label']}; {one['index']}; {one['share']:.0%} of the pairs)"
            found[name] = mean_effect([seed[measure] for seed in one["seeds"]], "")
    for label, seeds in measured["concentration"].items():
        found[f"{MASS} ({label})"] = mean_effect([sum(heads) / len(heads) for heads in seeds], "")
    return found


class Queries(NamedTuple):
    """What one head is asked: `queries` `(Q, D)`, and pairs to search in, `keys`, `values` `(S, D)`, `bias` `(S,)`.

    `length` is the unit of errors: of the longest value.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    length: float


class _Recorder(Search):
    """Answers from all pairs, and keeps what it was asked."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(tolerance=1.0, num_clusters=0, report=SearchReport())
        self.num_heads = num_heads
        self.asked: dict[tuple[int, int], Queries] = {}

    def reads(self, layer: Any, num_queries: int) -> bool:
        return True

    def read(self, layer: Any, layer_idx: int, query: torch.Tensor, *pairs: Any, **options: Any) -> torch.Tensor:
        num_joined, retrieved = layer.num_joined, []
        # In double precision: a certificate is no worse than the rounding of the sums that it is compared with.
        keys, values = (part[0, :, :num_joined].double() for part in (layer.keys, layer.values))
        bias = layer.slot_bias[0, :, :num_joined].expand(self.num_heads, -1)
        for head in range(self.num_heads):
            one = Queries(
                query[0, head].double(), keys[head], values[head], bias[head], float(values[head].norm(dim=-1).max())
            )
            self.asked[layer_idx, head] = one
            retrieved.append((one.queries @ one.keys.T + one.bias).softmax(-1) @ one.values)
        return torch.stack(retrieved, dim=1)[None].to(query.dtype)


@torch.no_grad()
def mosaic_queries(model: Any, parts: torch.Tensor, question: torch.Tensor) -> dict[tuple[int, int], Queries]:
    """Return what each head of a mosaic is asked by a question `(1, Q)` behind parts `(P, T)`, by layer and head.

    Only the pairs of the memory are searched, and not the few of the question.
    """
    texts = [model.memorize(part[None], source=str(number)) for number, part in enumerate(parts)]
    recorder = _Recorder(model.config.num_attention_heads)
    model.base_model.search = recorder
    try:
        model(**MosaicMemory.union(texts).prompt(question))
    finally:
        model.base_model.search = None
    return recorder.asked


_CAPTURED: list[tuple[torch.Tensor, ...]] = []


def _capturing_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    _CAPTURED.append((query * kwargs["scaling"], key, value))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register("capturing", _capturing_attention)
AttentionMaskInterface.register("capturing", sdpa_mask)


@torch.no_grad()
def transformer_queries(model: Any, parts: torch.Tensor, question: torch.Tensor) -> dict[tuple[int, int], Queries]:
    """Return what each head of a rotary transformer is asked by a question that stands behind a part."""
    model.set_attn_implementation("capturing")
    _CAPTURED.clear()
    stored: list[list[tuple[torch.Tensor, ...]]] = []
    for some in parts.split(16):
        model(input_ids=some, use_cache=False)
        stored.append(list(_CAPTURED))
        _CAPTURED.clear()
    places = parts.shape[1] + torch.arange(question.shape[1])[None]
    model(input_ids=question, position_ids=places, use_cache=False)
    asked, found = list(_CAPTURED), {}
    _CAPTURED.clear()
    for layer, (query, _, _) in enumerate(asked):
        keys, values = (torch.cat([batch[layer][part] for batch in stored]) for part in (1, 2))
        for head in range(query.shape[1]):
            own_keys, own_values = (part[:, head].flatten(0, 1).double() for part in (keys, values))
            length, bias = float(own_values.norm(dim=-1).max()), torch.zeros(len(own_keys))
            found[layer, head] = Queries(query[0, head].double(), own_keys, own_values, bias, length)
    return found


def share_with_mass(one: Queries, mass: float = 0.99) -> float:
    """Return the share of the pairs that hold so much of a query's weight at least, as a mean over queries."""
    weights = (one.queries @ one.keys.T + one.bias).softmax(-1).sort(dim=-1, descending=True).values
    return float(((weights.cumsum(-1) < mass).sum(-1) + 1).float().mean()) / weights.shape[-1]


def searched(
    one: Queries, clusters: Clusters, tolerance: float, max_share: float | None = None
) -> Iterator[dict[str, float]]:
    """Yield for each query what reading few pairs visits, and how far it is from reading all."""
    for query in one.queries:
        found = clusters.read(query, query[:0], tolerance, max_share)
        weights = torch.cat([found.scores, found.whole_scores]).softmax(0)
        retrieved = weights @ torch.cat([found.values, found.means])
        exact = (one.keys @ query + one.bias).softmax(0) @ one.values
        error = float((retrieved - exact).norm()) / one.length
        yield {
            "visited": len(found.places) / len(clusters.keys),
            "mass": found.mass,
            "error": error,
            "bound": found.bound,
        }


def _measure_training(recipe: Recipe, training: Trained) -> dict[tuple[str, float], Any]:
    """Return measures by index and tolerance, and by `SHARE` with an index and share; and `share_with_mass`."""
    model: Any
    model, tokenizer = training.load()
    read = pack_windows(load_stories(**recipe.read.model_dump()), tokenizer, recipe.part_length)
    parts = torch.tensor(read[: recipe.num_tokens // recipe.part_length]["input_ids"]).long()
    if parts.numel() < recipe.num_tokens:
        raise ValueError(f"the text that is read has {parts.numel():,} tokens: lower `num_tokens`")
    asked = pack_windows(load_stories(**recipe.asked.model_dump()), tokenizer, recipe.num_queries)
    question = torch.tensor(asked[0]["input_ids"])[None].long()
    queries_of = mosaic_queries if hasattr(model.config, "num_persistent_slots") else transformer_queries
    queries = queries_of(model, parts, question)
    found: dict[tuple[str, float], Any] = {(MASS, 0.99): [share_with_mass(one) for one in queries.values()]}
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    errors: dict[tuple[str, float], list[dict[str, float]]] = {}
    for (layer, head), one in tqdm(queries.items(), desc=training.name, unit="head"):
        clusters = Clusters.of(one.keys, one.values, one.bias, int(2 * len(one.keys) ** 0.5))
        for index in recipe.indexes:
            make = INDEXES[index]
            clusters.index = None if make is None else make(clusters.keys)
            for tolerance in recipe.tolerances:
                of_queries = list(searched(one, clusters, tolerance))
                means = {name: sum(q[name] for q in of_queries) / len(of_queries) for name in ("visited", "mass")}
                means |= {name: max(q[name] for q in of_queries) for name in ("error", "bound")}
                means["margin"] = min(q["bound"] - q["error"] for q in of_queries)
                rows.setdefault((index, tolerance), []).append({"layer": layer, "head": head, **means})
        for index, share in itertools.product(SHARE_INDEXES, recipe.shares):
            make = INDEXES[index]
            clusters.index = None if make is None else make(clusters.keys)
            of_queries = list(searched(one, clusters, min(recipe.tolerances), share))
            errors.setdefault((index, share), []).extend(of_queries)
    for (index, share), of_all in errors.items():
        mean_error = sum(q["error"] for q in of_all) / len(of_all)
        margin = min(q["bound"] - q["error"] for q in of_all)
        numbers = (mean_error, max(q["error"] for q in of_all), margin)
        found[f"{SHARE} {index}", share] = {"seed": training.seed, **dict(zip(ERRORS, numbers, strict=True))}
    for place, heads in rows.items():
        found[place] = {
            "seed": training.seed,
            MEASURES[0]: sum(one["visited"] for one in heads) / len(heads),
            MEASURES[1]: sum(one["mass"] for one in heads) / len(heads),
            MEASURES[2]: max(one["error"] for one in heads),
            MEASURES[3]: max(one["bound"] for one in heads),
            MARGIN: min(one["margin"] for one in heads),
            "heads": heads,
        }
    return found


def _table(recipe: Recipe, settings: list[dict[str, Any]], shares: list[dict[str, Any]]) -> str:
    rows = []
    for one in settings:
        means = [sum(seed[name] for seed in one["seeds"]) / len(one["seeds"]) for name in MEASURES[:2]]
        largest = [max(seed[name] for seed in one["seeds"]) for name in MEASURES[2:]]
        by_head = [head["visited"] for seed in one["seeds"] for head in seed["heads"]]
        span = f"{min(by_head):.2%} to {max(by_head):.2%}"
        numbers = [f"{means[0]:.2%}", span, f"{means[1]:.1e}", *(f"{value:.1e}" for value in largest)]
        rows.append([one["label"], one["index"], f"{one['tolerance']:g}", *numbers])
    columns = ["model", "index", "tolerance", "pairs read", "of each head", "mass of the others, at most"]
    table = markdown_table([*columns, "largest error", "largest bound"], "llrrrrrr", rows)
    if not shares:
        return table
    rows = [
        [
            one["label"],
            one["index"],
            f"{one['share']:.0%}",
            mean_and_deviation([seed[ERRORS[0]] for seed in one["seeds"]], 3),
            f"{max(seed[ERRORS[1]] for seed in one['seeds']):.2f}",
        ]
        for one in shares
    ]
    by_share = markdown_table(["model", "index", "pairs read", "mean error", "largest error"], "llrrr", rows)
    return f"{table}\n\nWith a share of the pairs in place of a tolerance:\n\n{by_share}"


def _concentration_table(concentration: dict[str, list[list[float]]]) -> str:
    rows = []
    for label, seeds in concentration.items():
        heads = [share for one in seeds for share in one]
        rows.append([label, f"{sum(heads) / len(heads):.0%}", f"{min(heads):.1%} to {max(heads):.0%}"])
    table = markdown_table(["model", "pairs with 0.99 of the weight", "of each head"], "lrr", rows)
    return f"\n\nHow many pairs matter:\n\n{table}"


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the mean error against the share of pairs that is read: a panel for each index.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    figure, axes = new_figure(2, 1, height=2.9, sharex=True, sharey=True)
    found_by = {"clusters": "pairs found by the centres of clusters", "exact": "the nearest pairs"}
    styles = styles_of(recipe.runs)
    for axis, index in zip(axes[:, 0], SHARE_INDEXES, strict=True):
        for label in recipe.runs:
            own = [one for one in measured["shares"] if (one["label"], one["index"]) == (label, index)]
            errors = np.array([[seed[ERRORS[0]] for seed in one["seeds"]] for one in own]).T
            plot_seeds(axis, [one["share"] for one in own], errors, marker=".", label=label, **styles[label])
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(recipe.shares, [f"{share:.0%}" for share in recipe.shares])
        axis.minorticks_off()
        axis.set(title=found_by[index], ylabel=better("mean error (lengths of a value)", "lower"))
    axes[-1, 0].set_xlabel("share of the pairs that is read one by one")
    label_lines(axes)
    note = seeds_note(len(recipe.seeds))
    save_figure(figure, folder / f"{recipe.name}.png", "Error of reading a share of the pairs", note)


def _measure(recipe: Recipe) -> dict[str, Any]:
    seeds: dict[tuple[str, str, float], list[Any]] = {}
    for training, found in comparison.measure_all(recipe, _measure_training):
        for (index, tolerance), one in found.items():
            seeds.setdefault((training.label, index, tolerance), []).append(one)
    settings = [
        {"label": label, "index": index, "tolerance": tolerance, "seeds": seeds[label, index, tolerance]}
        for label, index, tolerance in recipe.settings
    ]
    shares = [
        {"label": label, "index": index, "share": share, "seeds": seeds[label, f"{SHARE} {index}", share]}
        for label, index, share in itertools.product(recipe.runs, SHARE_INDEXES, recipe.shares)
    ]
    concentration = {label: seeds[label, MASS, 0.99] for label in recipe.runs}
    measured = {"settings": settings, "shares": shares, "concentration": concentration}
    return {"measured": measured, "table": _table(recipe, settings, shares) + _concentration_table(concentration)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models that are not trained yet, and measure; returns the content of `result.json`."""
    data = {name: source_provenance(**getattr(recipe, name).model_dump()) for name in ("read", "asked")}
    return comparison.run_comparison(recipe, restart, data, _measure)

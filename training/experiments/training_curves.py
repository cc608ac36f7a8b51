# SPDX-License-Identifier: Apache-2.0
"""Training curves over depth (Memory Mosaics, Fig. 9): validation loss by depth, on equal batches."""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator
from typing_extensions import Self

from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, plan, summary
from training.figures import new_figure, save_figure
from training.tables import Claim, markdown_table, mean_and_deviation


__all__ = ["Recipe", "plan", "run", "summary"]

# Mean losses that differ by less count as equal, in nats.
CLOSED = 0.01
# Contents of `result.json` by label, depth and seed.
Results = dict[tuple[str, int, int], dict[str, Any]]


class Recipe(DepthComparisonRecipe):
    """Curves of a comparison; `baseline` is the label of the run that the first is compared with."""

    task: Literal["training_curves"]
    baseline: str | None = None

    @model_validator(mode="after")
    def _check_baseline(self) -> Self:
        if self.baseline is not None and self.baseline not in list(self.runs)[1:]:
            raise ValueError(
                f"`baseline` is {self.baseline!r}, but the runs after the first are {list(self.runs)[1:]}"
            )
        return self


def _gaps(recipe: Recipe, baseline: str, results: Results) -> dict[int, list[float]]:
    """Return by depth the baseline's validation loss minus the first model's, for each seed.

    Both saw the same batches, so the difference of a seed has less noise than either loss.
    """
    first = next(iter(recipe.runs))

    def gap(depth: int, seed: int) -> float:
        losses = [results[label, depth, seed]["metrics"]["validation_loss"] for label in (baseline, first)]
        return losses[0] - losses[1]

    return {depth: [gap(depth, seed) for seed in recipe.seeds] for depth in recipe.depths}


def _table(recipe: Recipe, results: Results) -> str:
    columns = ["model", "blocks", "parameters", "seeds", "tokens", "validation loss", "perplexity"]
    rows = []
    for depth in recipe.depths:
        for label in recipe.runs:
            runs = [results[label, depth, seed] for seed in recipe.seeds]
            loss = mean_and_deviation([run["metrics"]["validation_loss"] for run in runs], 4)
            perplexity = mean_and_deviation([run["metrics"]["validation_perplexity"] for run in runs], 2)
            seeds = ", ".join(map(str, recipe.seeds))
            # Seeds do not differ in parameters and tokens.
            size = [str(depth), f"{runs[0]['parameters']:,}", seeds, f"{runs[0]['tokens']:,}"]
            rows.append([label, *size, loss, perplexity])
    return markdown_table(columns, "lrrrrrr", rows)


def _claims(recipe: Recipe, gaps: dict[int, list[float]]) -> list[Claim]:
    shallow, deep = min(recipe.depths), max(recipe.depths)
    gap_at = {depth: f"{mean_and_deviation(gaps[depth], 3)} nats at depth {depth}" for depth in sorted(gaps)}
    deep_gap = statistics.mean(gaps[deep])
    is_closed = abs(deep_gap) <= CLOSED
    baseline = f"{recipe.baseline} - {next(iter(recipe.runs))}"
    return [
        Claim(
            "At small depth the mosaic's validation loss is below the transformer's of equal size",
            "slightly better, visible at depth 1 (Fig. 9; plotted only)",
            f"{baseline}: {gap_at[shallow]}; lower with every seed: {'yes' if min(gaps[shallow]) > 0 else 'no'}",
            "reproduced" if min(gaps[shallow]) > 0 else "contradicted",
        ),
        Claim(
            "As depth grows the two become indistinguishable",
            "gone at depth 8 (Fig. 9)",
            f"{baseline}: {', '.join(gap_at.values())}",
            # The paper sees the gap gone at 8 blocks, so that a gap that is left at fewer contradicts nothing.
            "reproduced" if is_closed else "contradicted" if deep_gap < 0 else "not at this size",
        ),
    ]


def _draw(recipe: Recipe, results: Results, path: Path) -> None:
    """Draw the curve of each seed faint and the mean over the seeds strong, one column for each depth."""
    figure, axes = new_figure(1, len(recipe.depths), sharey=True)
    for column, depth in zip(axes[0], recipe.depths, strict=True):
        for number, label in enumerate(recipe.runs):
            color, by_tokens = f"C{number}", defaultdict(list)
            for seed in recipe.seeds:
                points = results[label, depth, seed]["learning_curve"]["validation"]
                column.plot([p["tokens"] for p in points], [p["loss"] for p in points], color=color, alpha=0.35, lw=1)
                for point in points:
                    # All seeds are evaluated after the same numbers of tokens.
                    by_tokens[point["tokens"]].append(point["loss"])
            mean = [statistics.mean(losses) for losses in by_tokens.values()]
            column.plot(list(by_tokens), mean, color=color, label=label, lw=1.8)
        column.set_title(f"{depth} block{'s' if depth > 1 else ''}")
        column.set_xlabel("training tokens")
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    axes[0, -1].legend()
    save_figure(figure, path)


def _measure(recipe: Recipe) -> dict[str, Any]:
    results = {(training.label, training.depth, training.seed): training.result() for training in recipe.trainings}
    curves = [
        {"label": label, "depth": depth, "seed": seed, "validation": result["learning_curve"]["validation"]}
        for (label, depth, seed), result in results.items()
    ]
    _draw(recipe, results, recipe.folder / f"{recipe.name}.png")
    gaps = _gaps(recipe, recipe.baseline, results) if recipe.baseline else {}
    return {
        "measured": {"gaps": gaps, "curves": curves},
        "table": _table(recipe, results),
        "claims": _claims(recipe, gaps) if recipe.baseline else [],
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare their curves; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

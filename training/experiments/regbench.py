# SPDX-License-Identifier: Apache-2.0
"""RegBench (Memory Mosaics, Fig. 11 and Table 4): learning a new language from the strings in the context.

Models are trained on one sequence of each training automaton. They are tested on sequences of new automata (out of
distribution) and on new sequences of the training automata (in distribution).
"""

import statistics
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, cast

import torch
from matplotlib.axes import Axes
from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from modeling_memory_mosaic import inspect_units, summarize_units
from training.evaluate import load_causal_lm
from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, summary
from training.figures import draw_units, new_figure, save_figure
from training.synthetic import automata
from training.tables import Claim, Verdict, markdown_table, mean_and_deviation


__all__ = ["Recipe", "plan", "run", "summary"]

# Figure 11 by number of training automata, read off the authors' picture: accuracy, total variation distance.
PAPER_MOSAIC = {
    100: (0.924, 0.570),
    500: (0.928, 0.253),
    1000: (0.934, 0.215),
    2500: (0.941, 0.185),
    40000: (0.959, 0.121),
}
PAPER_TRANSFORMER = {
    100: (0.523, 0.68),
    500: (0.543, 0.64),
    1000: (0.53, 0.63),
    2500: (0.925, 0.231),
    40000: (0.95, 0.144),
}
# Test sequences whose units are measured, and tokens of the first that are drawn.
NUM_INSPECTED, NUM_DRAWN = 20, 80
# How the tokens are written in the picture.
SYMBOLS = "abcdefghijklmnopqr|."
# The accuracy from which a model counts as having learnt to learn, and that up to which it counts as not.
# In Fig. 11 mosaics are above 0.92, and transformers of few automata below 0.55.
SOLVED, UNSOLVED = 0.90, 0.60


class Recipe(ComparisonRecipe):
    """The first run is the mosaic; `transformers` are the labels that the paper's claims are about."""

    task: Literal["regbench"]
    num_automata: list[PositiveInt] = Field(min_length=1)
    transformers: list[str] = []

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"data": {"num_automata": number}} for number in self.num_automata]

    @model_validator(mode="after")
    def _check_transformers(self) -> Self:
        unknown = [label for label in self.transformers if label not in list(self.runs)[1:]]
        if unknown:
            raise ValueError(f"`transformers` names {unknown}, but the runs after the first are {list(self.runs)[1:]}")
        return self


class Series(NamedTuple):
    """One model trained on so many automata, with every seed."""

    label: str
    num_automata: int
    results: list[dict[str, Any]]

    def values(self, split: str, measure: str) -> list[float]:
        """Return a measure on a split for each seed."""
        return [result["metrics"][split][measure] for result in self.results]


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return the trainings of the experiment and whether each is finished. Draws no data."""
    return comparison.plan(recipe)


def _series(recipe: Recipe, trainings: Iterable[Trained]) -> list[Series]:
    results = {(t.label, t.recipe.data.num_automata, t.seed): t.result() for t in trainings}
    return [
        Series(label, number, [results[label, number, seed] for seed in recipe.seeds])
        for number in recipe.num_automata
        for label in recipe.runs
    ]


def _numbers(series: Series) -> dict[str, Any]:
    curves = [
        [(point["step"], round(point["accuracy"], 4)) for point in result["learning_curve"]]
        for result in series.results
    ]
    kept = [{name: result[name] for name in ("seed", "seconds")} | result["metrics"] for result in series.results]
    return {"label": series.label, "num_automata": series.num_automata, "seeds": kept, "validation_accuracy": curves}


def _inspect(recipe: Recipe) -> list[dict[str, Any]]:
    """Measure the units of the first mosaic on test sequences, and draw them on the beginning of the first."""
    first = recipe.trainings[0].recipe
    # The model of the best validation accuracy, as in the table.
    model = load_causal_lm(first.folder / "best")
    rows = automata.draw_splits(first.data)["test"].to_list()[:NUM_INSPECTED]
    batch = cast(torch.LongTensor, automata.collate(rows)["input_ids"])
    # `collate` gives no mask. Here padding would count in the means of units.
    units = inspect_units(model, batch, attention_mask=(batch != automata.PADDING).long())
    beginning = cast(torch.LongTensor, batch[:1, :NUM_DRAWN])
    letters = [SYMBOLS[token] for token in beginning[0].tolist()]
    draw_units(inspect_units(model, beginning), recipe.folder / f"{recipe.name}_units.png", letters)
    table = summarize_units(units)
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in table
    ]


def _table(series: list[Series]) -> str:
    measures = {
        "accuracy": ("test", "accuracy"),
        "TVD": ("test", "tvd"),
        "accuracy, last token": ("test", "last_accuracy"),
        "TVD, last token": ("test", "last_tvd"),
        "accuracy in distribution": ("test_iid", "accuracy"),
        "TVD in distribution": ("test_iid", "tvd"),
    }
    rows = []
    for one in series:
        cells = [mean_and_deviation(one.values(*measure), 3) for measure in measures.values()]
        seeds = ", ".join(str(result["seed"]) for result in one.results)
        rows.append([one.label, f"{one.results[0]['parameters']:,}", f"{one.num_automata:,}", seeds, *cells])
    columns = ["model", "parameters", "training automata", "seeds", *measures]
    return markdown_table(columns, "l" + "r" * (len(columns) - 1), rows)


def _paper(values: dict[int, tuple[float, float]], num_automata: int, column: int) -> str:
    """Return the paper's accuracy (column 0) or TVD (column 1)."""
    return f"{values[num_automata][column]:.3f}" if num_automata in values else "not given"


def _claim_out_of_distribution(mosaic: Series, transformer: Series) -> Claim:
    ours, theirs = (one.values("test", "accuracy") for one in (mosaic, transformer))
    # Every seed has to agree, not the mean.
    reproduced = min(ours) >= SOLVED and max(theirs) <= UNSOLVED
    verdict: Verdict = (
        "reproduced" if reproduced else "contradicted" if max(ours) <= min(theirs) else "not at this size"
    )
    number = mosaic.num_automata
    return Claim(
        f"Of {number} training automata, the mosaic learns to learn a new language, the transformer does not "
        f"({transformer.label})",
        f"accuracy {_paper(PAPER_MOSAIC, number, 0)} against {_paper(PAPER_TRANSFORMER, number, 0)} (Fig. 11)",
        f"{mosaic.label} {mean_and_deviation(ours, 3)}, {transformer.label} {mean_and_deviation(theirs, 3)}",
        verdict,
    )


def _claim_on_distance(mosaic: Series, transformer: Series) -> Claim:
    ours, theirs = (one.values("test", "tvd") for one in (mosaic, transformer))
    is_lower, is_higher = max(ours) < min(theirs), min(ours) > max(theirs)
    number = mosaic.num_automata
    return Claim(
        f"Of {number} training automata, the mosaic's distances to new automata are the smaller ({transformer.label})",
        f"TVD {_paper(PAPER_MOSAIC, number, 1)} against {_paper(PAPER_TRANSFORMER, number, 1)} (Fig. 11)",
        f"{mosaic.label} {mean_and_deviation(ours, 3)}, {transformer.label} {mean_and_deviation(theirs, 3)}",
        "reproduced" if is_lower else "contradicted" if is_higher else "not at this size",
    )


def _claim_in_distribution(baseline: Series) -> Claim:
    inside, outside = (baseline.values(split, "accuracy") for split in ("test_iid", "test"))
    # Paired by seed: both numbers are of one model.
    gaps = [accuracy - other for accuracy, other in zip(inside, outside, strict=True)]
    return Claim(
        f"{baseline.label} does far better on new sequences of its {baseline.num_automata} training automata: it has "
        "learnt them by heart",
        "good in distribution (Table 4), about 0.45 out of it",
        f"accuracy {mean_and_deviation(inside, 3)} against {mean_and_deviation(outside, 3)}",
        "reproduced" if min(gaps) > 0.1 else "contradicted" if max(gaps) < 0 else "not at this size",
    )


def _claims_on_number(mosaics: list[Series]) -> Iterable[Claim]:
    fewest, most = mosaics[0], mosaics[-1]
    numbers = ", ".join(f"{one.num_automata:,}" for one in mosaics)
    # The sign of a change for the better: a distance should fall.
    for measure, name, column, sign in (("accuracy", "accuracy", 0, 1), ("tvd", "TVD", 1, -1)):
        means = [mean_and_deviation(one.values("test", measure), 3) for one in mosaics]
        first, last = (statistics.mean(one.values("test", measure)) for one in (fewest, most))
        is_better = (last - first) * sign > 0
        yield Claim(
            f"More training automata ({numbers}) make the mosaic's {name} better",
            ", ".join(_paper(PAPER_MOSAIC, one.num_automata, column) for one in mosaics) + " (Fig. 11)",
            ", ".join(means),
            "reproduced" if is_better else "contradicted",
        )


def _claims(recipe: Recipe, series: list[Series]) -> Iterable[Claim]:
    by_name = {(one.label, one.num_automata): one for one in series}
    mosaic = next(iter(recipe.runs))
    for number in recipe.num_automata:
        for label in recipe.transformers:
            pair = by_name[mosaic, number], by_name[label, number]
            yield _claim_out_of_distribution(*pair)
            yield _claim_on_distance(*pair)
            yield _claim_in_distribution(by_name[label, number])
    if len(recipe.num_automata) > 1:
        # The claim goes from the fewest to the most, in whatever order the recipe names them.
        yield from _claims_on_number([by_name[mosaic, number] for number in sorted(recipe.num_automata)])


def _draw_bars(axis: Axes, series: list[Series], measure: str) -> None:
    """Draw a measure of each model, out of and in distribution, for one number of automata."""
    # At these shifts two bars of height 0.4 touch.
    for shift, split, name in ((-0.2, "test", "new automata"), (0.2, "test_iid", "training automata")):
        places = [number + shift for number in range(len(series))]
        by_model = [one.values(split, measure) for one in series]
        axis.barh(places, [statistics.mean(values) for values in by_model], height=0.4, label=name, alpha=0.7)
        for place, values in zip(places, by_model, strict=True):
            axis.plot(values, [place] * len(values), "k.", ms=3)
    axis.set_yticks(range(len(series)), [one.label for one in series], fontsize=8)
    axis.invert_yaxis()
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=2)


def _draw_over_automata(recipe: Recipe, axis: Axes, series: list[Series], measure: str) -> None:
    """Draw a measure of each model, out of distribution, over the number of automata."""
    for number, label in enumerate(recipe.runs):
        of_label = [one for one in series if one.label == label]
        means = [statistics.mean(one.values("test", measure)) for one in of_label]
        axis.semilogx([one.num_automata for one in of_label], means, "o-", color=f"C{number}", label=label)
        for one in of_label:
            values = one.values("test", measure)
            axis.plot([one.num_automata] * len(values), values, ".", color=f"C{number}", alpha=0.4)
    axis.set_xlabel("training automata")
    axis.set_xticks(recipe.num_automata, [f"{number:,}" for number in recipe.num_automata])
    # A logarithmic axis would put more labels between these.
    axis.minorticks_off()
    axis.legend()


def _draw(recipe: Recipe, series: list[Series]) -> None:
    """Draw accuracy and distance of the finished models, and the accuracy of each seed over training."""
    figure, ((accuracy_axis, tvd_axis, curves),) = new_figure(1, 3, width=4.6)
    for axis, measure, title in (
        (accuracy_axis, "accuracy", "accuracy"),
        (tvd_axis, "tvd", "total variation distance"),
    ):
        axis.set_title(title)
        if len(recipe.num_automata) == 1:
            _draw_bars(axis, series, measure)
        else:
            _draw_over_automata(recipe, axis, series, measure)
    for number, one in enumerate(series):
        label = one.label if len(recipe.num_automata) == 1 else f"{one.label}, {one.num_automata}"
        for index, result in enumerate(one.results):
            points = result["learning_curve"]
            steps, accuracy = [p["step"] for p in points], [p["accuracy"] for p in points]
            # The legend has one entry for all seeds of a model.
            curves.plot(steps, accuracy, color=f"C{number}", lw=1, alpha=0.7, label=None if index else label)
    curves.set(xlabel="step", ylabel="validation accuracy", title="while training")
    curves.legend()
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _measure(recipe: Recipe) -> dict[str, Any]:
    series = _series(recipe, recipe.trainings)
    _draw(recipe, series)
    return {
        "measured": {"series": [_numbers(one) for one in series], "units": _inspect(recipe)},
        "table": _table(series),
        "claims": list(_claims(recipe, series)),
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    return comparison.run_comparison(recipe, restart, {}, _measure)

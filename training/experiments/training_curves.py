# SPDX-License-Identifier: Apache-2.0
"""Losses over depth (Memory Mosaics, Fig. 9): models trained on equal batches, judged on a test split.

The tuning split, on which trainings are evaluated, selects learning rates (`tuning`) and draws curves. Models of equal
size and tokens differ in operations and seconds. So with `half_budget_seeds` each is also trained on half the tokens,
and its loss at another number of tokens is that of a line in the logarithm of tokens:
L(N) = L(full) + slope ln(N / full), with slope = (L(full) - L(half)) / ln(full / half).
"""

import functools
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from matplotlib.ticker import EngFormatter
from pydantic import PositiveInt, model_validator
from tqdm import tqdm
from transformers.utils.generic import flatten_dict
from typing_extensions import Self

from training.claims import Effect, Effects, mean_effect
from training.cost import flops_per_token, training_step_seconds
from training.evaluate import mean_loss, tokens_and_bytes
from training.experiments import comparison
from training.experiments.comparison import DepthComparisonRecipe, Trained, blocks, plan, summary
from training.figures import better, in_words, label_lines, new_figure, plot_seeds, save_figure, seeds_note, styles_of
from training.metrics.mean_loss import bits_per_byte_of_loss, perplexity
from training.recipe import SourceSection
from training.tables import markdown_table, mean_and_deviation
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


__all__ = ["Recipe", "draw", "effects", "plan", "run", "summary"]

# Losses of one training each, by label, depth and seed.
Losses = dict[tuple[str, int, int], float]


def _tuned(label: str) -> str:
    """Return the model of a run of a tuning, whose label is `MODEL, SETTING`."""
    return label.rpartition(", ")[0]


class Recipe(DepthComparisonRecipe):
    """Runs of a comparison; see `configuration/README.md` for each field."""

    task: Literal["training_curves"]
    test: SourceSection | None = None
    batch_size: PositiveInt = 16
    half_budget_seeds: list[int] = []
    timing_rounds: PositiveInt = 15
    tuning: bool = False

    @functools.cached_property
    def half_budget_trainings(self) -> list[Trained]:
        """Every model at every depth once more, on half the tokens."""
        tokens = self.trainings[0].recipe.tokens
        if self.half_budget_seeds and tokens is None:
            raise ValueError(
                f"`half_budget_seeds` halve `tokens`, but the recipe {self.base!r} has none: give `common.tokens`"
            )
        return [
            self._training(label, variant | {"tokens": tokens // 2}, seed)
            for seed in self.half_budget_seeds
            for variant in self.variants
            for label in self.runs
        ]

    @property
    def all_trainings(self) -> list[Trained]:
        return [*self.trainings, *self.half_budget_trainings]

    @model_validator(mode="after")
    def _check_half_budget(self) -> Self:
        # The slope of a model is the difference of two trainings of one seed.
        if absent := sorted(set(self.half_budget_seeds) - set(self.seeds)):
            raise ValueError(f"`half_budget_seeds` has {absent}, which `seeds` has not: give seeds of both")
        return self

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if not self.tuning:
            return self
        if self.test or self.half_budget_seeds or self.claims:
            raise ValueError("a tuning selects: it has no `test`, `half_budget_seeds` or `claims`")
        models: dict[str, dict[str, Any]] = {}
        for label, run in self.runs.items():
            model = {key: value for key, value in run.items() if key != "training"}
            if models.setdefault(_tuned(label), model) != model or not _tuned(label):
                raise ValueError(
                    f"the label {label!r} of a tuning has to be `MODEL, SETTING`, and runs of one MODEL may differ in "
                    "`training` alone"
                )
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Labels of every two runs, the later one first."""
        return [(later, earlier) for earlier, later in itertools.combinations(self.runs, 2)]

    @property
    def effect_names(self) -> list[str]:
        return [name for name, _ in _differences(self)]


def _difference_name(pair: tuple[str, str], depth: int) -> str:
    return f"{pair[0]} - {pair[1]}, {blocks(depth)}"


def _differences(recipe: Recipe) -> Iterator[tuple[str, list[tuple[int, str, int]]]]:
    """Yield each effect: its name, and the terms `(sign, label, depth)` of which it is the sum for each seed."""
    if recipe.tuning:
        return  # it has one seed and selects
    shallow, deep = min(recipe.depths), max(recipe.depths)
    for pair in recipe.pairs:
        later, earlier = pair
        for depth in recipe.depths:
            yield _difference_name(pair, depth), [(1, later, depth), (-1, earlier, depth)]
        if shallow < deep:
            terms = [(1, later, deep), (-1, earlier, deep), (-1, later, shallow), (1, earlier, shallow)]
            yield f"growth of {later} - {earlier} from {shallow} to {blocks(deep)}", terms


def _losses(recipe: Recipe, measured: dict[str, Any], budget: str = "full") -> Losses:
    """Return the losses that models are compared by: on the test split, or without one on the tuning split."""
    name = "validation_loss" if recipe.test is None else "test_loss"
    runs = [run for run in measured["runs"] if run["budget"] == budget]
    return {(run["label"], run["depth"], run["seed"]): run[name] for run in runs}


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return differences of losses, paired by seed: seeds share their batches, and so part of their noise.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    losses = _losses(recipe, measured)
    found = {}
    for name, terms in _differences(recipe):
        by_seed = [sum(sign * losses[label, depth, seed] for sign, label, depth in terms) for seed in recipe.seeds]
        found[name] = mean_effect(by_seed, "nats")
    return found


# Measures


def _test_measures(recipe: Recipe, test: SourceSection) -> list[dict[str, float]]:
    """Return the measures of each training's model on the test split."""
    stories = load_stories(**test.model_dump())
    rows = []
    for training in tqdm(recipe.all_trainings, desc="test"):
        model, tokenizer = training.load()
        # Kept in a cache after the first time: all trainings have one tokenizer.
        windows = pack_windows(stories, tokenizer, training.recipe.data.context_length)
        loss = mean_loss(model, windows, recipe.batch_size)
        bits = bits_per_byte_of_loss(loss, *tokens_and_bytes(stories, tokenizer))
        rows.append({"test_loss": loss, "test_perplexity": perplexity(loss), "test_bits_per_byte": bits})
    return rows


def _runs(recipe: Recipe) -> list[dict[str, Any]]:
    budgets = ["full"] * len(recipe.trainings) + ["half"] * len(recipe.half_budget_trainings)
    rows = []
    for training, budget in zip(recipe.all_trainings, budgets, strict=True):
        result = training.result()
        row = {"label": training.label, "depth": training.depth, "seed": training.seed, "budget": budget}
        row |= {"tokens": result["tokens"], "parameters": result["parameters"]}
        row |= {"learning_rate": training.recipe.training.learning_rate}
        rows.append(row | {name: result["metrics"][name] for name in ("validation_loss", "validation_perplexity")})
    if recipe.test is not None:
        rows = [row | measures for row, measures in zip(rows, _test_measures(recipe, recipe.test), strict=True)]
    return rows


def _costs(recipe: Recipe) -> list[dict[str, Any]]:
    """Return for each model and depth operations a token and seconds a step, on this machine and interleaved."""
    rows = []
    for depth in recipe.depths:
        chosen = {
            one.label: one.recipe for one in recipe.trainings if (one.depth, one.seed) == (depth, recipe.seeds[0])
        }
        configs = {label: training.build_config() for label, training in chosen.items()}
        first = next(iter(chosen.values()))
        length, batch_size = first.data.context_length, first.training.per_device_train_batch_size
        seconds = training_step_seconds(configs, batch_size, length, recipe.timing_rounds)
        for label, config in configs.items():
            row = {"label": label, "depth": depth, "flops_per_token": flops_per_token(config, length)}
            rows.append(row | {"step_seconds": seconds[label]})
    return rows


def _best(recipe: Recipe, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best run of each model of a tuning, and whether its rate is at an end of those that were tried."""
    by_model: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        by_model[_tuned(run["label"]), run["depth"]].append(run)
    rows = []
    for (model, depth), tried in by_model.items():
        losses: dict[str, list[float]] = defaultdict(list)
        for run in tried:
            losses[run["label"]].append(run["validation_loss"])
        best = min(losses, key=lambda label: statistics.mean(losses[label]))
        rates = {run["label"]: run["learning_rate"] for run in tried}
        is_at_end = rates[best] in (min(rates.values()), max(rates.values()))
        rows.append({"model": model, "depth": depth, "best": best, "learning_rate": rates[best], "at_end": is_at_end})
    return rows


# Tables


def loss_at(ratio: float, full: float, half: tuple[float, float], tokens: tuple[int, int]) -> float:
    """Return a loss at another number of tokens, extrapolated by the slope between two trainings.

    Args:
        ratio: of the number of tokens to that of the full training.
        full: the loss to begin at, such as a mean over seeds.
        half: losses of the full and of the shorter training, of one seed.
        tokens: of the full and of the shorter training.
    """
    slope = (half[0] - half[1]) / math.log(tokens[0] / tokens[1])
    return full + slope * math.log(ratio)


def _at_equal(recipe: Recipe, measured: dict[str, Any], label: str, depth: int, cost: str) -> float:
    """Return a model's loss at the number of tokens for which it costs as much as the first model on all of them."""
    costs = {row["label"]: row[cost] for row in measured["costs"] if row["depth"] == depth}
    full, half = _losses(recipe, measured), _losses(recipe, measured, "half")
    tokens = {run["budget"]: run["tokens"] for run in measured["runs"]}
    at = [
        loss_at(
            costs[next(iter(recipe.runs))] / costs[label],
            statistics.mean(full[label, depth, one] for one in recipe.seeds),
            (full[label, depth, seed], half[label, depth, seed]),
            (tokens["full"], tokens["half"]),
        )
        for seed in recipe.half_budget_seeds
    ]
    return statistics.mean(at)


def _interval(effect: Effect) -> str:
    interval = "no interval" if effect.low is None else f"{effect.low:.3f} to {effect.high:.3f}"
    return f"{effect.value:+.3f} ({interval})"


def _table(recipe: Recipe, measured: dict[str, Any]) -> str:
    first, found, losses = next(iter(recipe.runs)), effects(recipe, measured), _losses(recipe, measured)
    split = "loss on the tuning split" if recipe.test is None else "test loss"
    columns = ["model", "blocks", "parameters", "learning rate", split, f"difference from {first}"]
    costs = ["flops_per_token", "step_seconds"] if recipe.half_budget_seeds else []
    columns += ["at equal operations", "at equal seconds"][: len(costs)]
    rows = []
    for depth, label in itertools.product(recipe.depths, recipe.runs):
        run = next(run for run in measured["runs"] if (run["label"], run["depth"]) == (label, depth))
        loss = mean_and_deviation([losses[label, depth, seed] for seed in recipe.seeds], 4)
        difference = "" if label == first else _interval(found[_difference_name((label, first), depth)])
        row = [label, str(depth), f"{run['parameters']:,}", f"{run['learning_rate']:g}", loss, difference]
        rows.append([*row, *(f"{_at_equal(recipe, measured, label, depth, cost):.3f}" for cost in costs)])
    seeds = ", ".join(map(str, recipe.seeds))
    tokens = next(run["tokens"] for run in measured["runs"])
    caption = f"Losses in nats per token after {tokens:,} tokens, mean ± standard deviation over seeds {seeds}; "
    caption += "differences with their 95 % interval, paired by seed."
    if costs:
        halved = ", ".join(map(str, recipe.half_budget_seeds))
        caption += (
            " The last two columns are extrapolations: the mean loss, moved to the number of tokens for which a model "
            f"takes as many operations, or as many seconds on one thread, as {first} on all of them, along the slope "
            f"between trainings on all and on half of the tokens (seed {halved})."
        )
    return markdown_table(columns, "l" + "r" * (len(columns) - 1), rows) + f"\n\n{caption}"


def _tuning_table(recipe: Recipe, measured: dict[str, Any]) -> str:
    best = {(row["best"], row["depth"]): row["at_end"] for row in measured["best"]}
    rows = []
    for depth, label in itertools.product(recipe.depths, recipe.runs):
        runs = [run for run in measured["runs"] if (run["label"], run["depth"]) == (label, depth)]
        loss = mean_and_deviation([run["validation_loss"] for run in runs], 4)
        perplexities = mean_and_deviation([run["validation_perplexity"] for run in runs], 2)
        mark = {None: "", False: "best", True: "best, at an end"}[best.get((label, depth))]
        rows.append([_tuned(label), str(depth), f"{runs[0]['learning_rate']:g}", loss, perplexities, mark])
    columns = ["model", "blocks", "learning rate", "loss on the tuning split", "perplexity", ""]
    return markdown_table(columns, "lrrrrl", rows)


# Pictures


def _numbers_of_labels(recipe: Recipe) -> str:
    """Return a sentence on what the number at the end of a label is, as of `GPT-2, 0.02`; nothing without one."""
    for label, settings in recipe.run_settings.items():
        for key, value in flatten_dict(settings, delimiter=".").items():
            if not isinstance(value, str) and label.endswith(f", {value}"):
                return f" The number is the {in_words(key)}."
    return ""


def _draw_curves(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the loss over training, a row for each depth."""
    depths, labels = (list(dict.fromkeys(curve[key] for curve in measured["curves"])) for key in ("depth", "label"))
    figure, axes = new_figure(len(depths), 1, height=3.3, sharex=True)
    styles, num_seeds = styles_of(labels), 0
    for axis, depth in zip(axes[:, 0], depths, strict=True):
        for label in labels:
            chosen = [
                one["validation"] for one in measured["curves"] if (one["label"], one["depth"]) == (label, depth)
            ]
            num_seeds = max(num_seeds, len(chosen))
            # All seeds are evaluated after the same numbers of tokens.
            tokens = [point["tokens"] for point in chosen[0]]
            losses = [[point["loss"] for point in points] for points in chosen]
            plot_seeds(axis, tokens, losses, label=label, **styles[label])
        axis.set(title=blocks(depth), ylabel=better("loss on the tuning split (nats)", "lower"))
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes[-1, 0].set_xlabel("training tokens")
    label_lines(axes)
    note = seeds_note(num_seeds) + _numbers_of_labels(recipe)
    save_figure(figure, folder / f"{recipe.name}.png", "Loss while the models were trained", note)


def _draw_tuning(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw losses over learning rates, a line for each model and a row for each depth."""
    by_rate: dict[tuple[int, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in measured["runs"]:
        by_rate[run["depth"], _tuned(run["label"])][run["learning_rate"]].append(run["validation_loss"])
    depths, models = (list(dict.fromkeys(key)) for key in zip(*by_rate, strict=True))
    styles, every = styles_of(models), sorted({run["learning_rate"] for run in measured["runs"]})
    figure, axes = new_figure(len(depths), 1, height=5.4)
    for axis, depth in zip(axes[:, 0], depths, strict=True):
        for model in models:
            rates = sorted(by_rate[depth, model])
            means = [statistics.mean(by_rate[depth, model][rate]) for rate in rates]
            axis.semilogx(rates, means, marker="o", ms=4, label=model, base=2, **styles[model])
            best = min(range(len(rates)), key=means.__getitem__)
            axis.plot(rates[best], means[best], "o", ms=9, mfc="none", mew=1.5, color=styles[model]["color"])
        axis.set_xticks(every, [f"{rate:g}" for rate in every])
        axis.set(title=blocks(depth), ylabel=better("loss on the tuning split (nats)", "lower"))
    axes[-1, 0].set_xlabel("learning rate")
    label_lines(axes)
    title = "Loss by learning rate"
    save_figure(figure, folder / f"{recipe.name}.png", title, "A circle marks the best rate of each model.")


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the curves, or of a tuning the losses by learning rate.

    Args:
        recipe: of the experiment.
        measured: of its result.
        folder: of the picture.
    """
    (_draw_tuning if recipe.tuning else _draw_curves)(recipe, measured, folder)


def _measure(recipe: Recipe) -> dict[str, Any]:
    measured: dict[str, Any] = {"runs": _runs(recipe)}
    measured["curves"] = [
        {"label": one.label, "depth": one.depth, "seed": one.seed}
        | {"validation": one.result()["learning_curve"]["validation"]}
        for one in recipe.trainings
    ]
    if recipe.half_budget_seeds:
        measured["costs"] = _costs(recipe)
    if recipe.tuning:
        measured["best"] = _best(recipe, measured["runs"])
    table = _tuning_table if recipe.tuning else _table
    return {"measured": measured, "table": table(recipe, measured)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    data = {} if recipe.test is None else {"test": source_provenance(**recipe.test.model_dump())}
    return comparison.run_comparison(recipe, restart, data, _measure)

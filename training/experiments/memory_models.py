# SPDX-License-Identifier: Apache-2.0
"""Memory models (arXiv 2602.13466): what embeddings hold of a text, and what it takes that a decoder can tell it.

Each experiment compares trainings of `memory_training` and asks one `question` of them:

- `fidelity`: what a fresh decoder recovers from a frozen encoder, that of a language model or of an autoencoder;
- `capacity`: how long a chunk an embedding of a given width can hold;
- `objectives`: causal, combined, in stages or not, at equal compute;
- `remedies`: what makes the stages' causal loss as low as that of training from scratch;
- `positions`: how a position-free mosaic tells the order of a chunk's tokens.

A stage called `probe` measures the model of the stage before it: a model is judged by that stage, and the probe's own
accuracy is told beside it.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from pydantic import model_validator

from training.experiments import comparison
from training.experiments.comparison import ComparisonRecipe, Trained, summary
from training.figures import new_figure, save_figure
from training.metrics.mean_loss import bits_per_byte
from training.metrics.retrieval_accuracy.retrieval_accuracy import retrieval_accuracy
from training.parallel import recipe_job, run_all
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tables import Claim, markdown_table, mean_and_deviation
from training.tasks import language_modeling
from training.tasks.memory_model import measure, training_flops, unigram


__all__ = ["Recipe", "plan", "run", "summary"]

PROBE = "probe"
# Chunks that a retrieval chooses from.
NUM_CANDIDATES = 512
# Share of the tokens from where on an embedding counts as holding its text, and share of another model's measure up to
# where one counts as far less.
HOLDS, FAR_LESS = 0.99, 0.5
# Causal losses that differ by less count as equal, in nats.
EQUAL_LOSS = 0.02


class Recipe(ComparisonRecipe):
    """Trainings of `memory_training` side by side; what each is for is said by the question."""

    task: Literal["memory_models"]
    question: Literal["fidelity", "capacity", "objectives", "remedies", "positions"]
    # Labels of runs that a question tells apart, by the part that they play in it.
    roles: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _roles_are_runs(self):
        unknown = {label for labels in self.roles.values() for label in labels} - self.runs.keys()
        missing = set(QUESTIONS[self.question].roles) - self.roles.keys()
        if unknown or missing:
            raise ValueError(
                f"`roles` names {sorted(unknown)}, which are no runs, and lacks {sorted(missing)}, which the question "
                f"{self.question!r} needs: the runs are {list(self.runs)}"
            )
        return self

    def _training(self, label: str, variant: dict[str, Any], seed: int) -> Trained:
        # Stages are too long for the name of a folder: the label is one.
        folder = f"runs/{self.base}/{''.join(c if c.isalnum() else '-' for c in label.lower())}-seed{seed}"
        path = CONFIGURATION / "recipe" / f"{self.base}.yaml"
        own = {"seed": seed, "output_dir": folder}
        recipe = load_recipe(path, settings=[self.common, self.runs[label], own])
        return Trained(label, recipe.build_config().num_hidden_layers, seed, recipe)


class Series(NamedTuple):
    """One model with every seed."""

    label: str
    results: list[dict[str, Any]]
    flops: list[int]  # of each stage, the same for all seeds

    def values(self, measure: str) -> list[float] | None:
        """A measure of each seed, `None` if the model has none; `recovered` is the accuracy of the probe."""
        found = []
        for result in self.results:
            stages = [s for s in result["stages"] if (s["name"] == PROBE) == (measure == "recovered")]
            if measure == "steps":
                found.append(sum(stage["steps"] for stage in stages))
            elif stages:
                found.append(stages[-1]["metrics"].get("autoencoding_accuracy" if measure == "recovered" else measure))
        return found if found and None not in found else None

    def tell(self, measure: str, digits: int = 3) -> str:
        values = self.values(measure)
        if values is None:
            return ""
        return f"{values[0]:,}" if measure == "steps" else mean_and_deviation(values, digits)


def plan(recipe: Recipe) -> dict[str, Any]:
    """What the experiment would do: each training, and whether it is finished. Reads no data."""
    return comparison.plan(recipe)


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and compare them; returns the content of `result.json`."""
    sources = [
        t.recipe.encoder_source() for t in recipe.trainings if t.recipe.encoder and not t.recipe.encoder.untrained
    ]
    # Before the trainings, of which several may want the same one at once.
    run_all([recipe_job(source) for source in {source.folder: source for source in sources}.values()], recipe.workers)
    return comparison.run_comparison(recipe, restart, {}, _measure)


def _measure(recipe: Recipe) -> dict[str, Any]:
    series = []
    for label in recipe.runs:
        trainings = [t for t in recipe.trainings if t.label == label]
        series.append(Series(label, [t.result() for t in trainings], training_flops(trainings[0].recipe)))
    question = QUESTIONS[recipe.question]
    first = recipe.trainings[0]
    floor = unigram(_windows(first), first.recipe.build_config().vocab_size)
    numbers = [_numbers(one) | {"more": question.more(recipe, one, floor)} for one in series]
    _draw(recipe, series, question, floor)
    return {
        "measured": {"unigram": floor, "series": numbers},
        "table": _table(series, numbers, question, floor),
        "claims": [claim for claim in question.claims(recipe, {one.label: one for one in series}, floor)],
    }


def _numbers(series: Series) -> dict[str, Any]:
    kept = ("seed", "parameters", "steps", "tokens", "seconds", "stages")
    seeds = [{name: result[name] for name in kept} for result in series.results]
    return {"label": series.label, "training_flops": series.flops, "seeds": seeds}


def _windows(training: Trained) -> dict[str, Dataset]:
    state = PartialState()
    tokenizer = language_modeling.prepare_tokenizer(training.recipe, state)
    return language_modeling.prepare_windows(training.recipe, tokenizer, state)


def _table(series: list[Series], numbers: list[dict[str, Any]], question, floor: dict[str, float]) -> str:
    extra = list(numbers[0]["more"])
    columns = ["model", "parameters", "seeds", *(name for _, name, _ in question.columns), *extra]
    rows = []
    for one, found in zip(series, numbers, strict=True):
        cells = [one.label, f"{one.results[0]['parameters']:,}", ", ".join(str(r["seed"]) for r in one.results)]
        cells += [one.tell(measure, digits) for measure, _, digits in question.columns]
        cells += [mean_and_deviation(found["more"][name], 3) for name in extra]
        rows.append(cells)
    told = f"frequencies alone: accuracy {floor['accuracy']:.3f}, entropy ratio {floor['entropy_ratio']:.3f}"
    return "\n".join(
        [markdown_table(columns, "l" + "r" * (len(columns) - 1), rows), "", f"A guess by the tokens' {told}."]
    )


def _draw(recipe: Recipe, series: list[Series], question, floor: dict[str, float]) -> None:
    """The question's measure: of each model and seed, and over training."""
    figure, axes = new_figure(1, 2, width=6.5, height=4.4)
    bars, curves = axes[0]
    colours = [f"C{index % 10}" for index in range(len(series))]
    for place, (one, colour) in enumerate(zip(series, colours, strict=True)):
        values = one.values(question.drawn) or []
        bars.plot(values, [place] * len(values), "o", color=colour)
        for index, result in enumerate(one.results):
            points = _curve(result, one.flops, question.curve)
            label = one.label if index == 0 else None
            curves.plot([x / 1e12 for x, _ in points], [y for _, y in points], color=colour, lw=1, label=label)
    bars.set_yticks(range(len(series)), [one.label for one in series])
    bars.invert_yaxis()
    bars.axvline(floor["accuracy"], color="grey", ls=":", label="frequencies alone")
    bars.set_xlabel(question.drawn_name)
    bars.set_xlim(0, 1.02)
    bars.legend()
    curves.set_xlabel("training so far ($10^{12}$ operations)")
    curves.set_ylabel(question.curve_name)
    curves.legend()
    save_figure(figure, recipe.folder / f"{recipe.name}.png")


def _curve(result: dict[str, Any], flops: list[int], measure: str) -> list[tuple[float, float]]:
    """A measure of validation over the operations of all stages so far; of several stages, the probe left out."""
    points, before = [], 0.0
    for stage, of_stage in zip(result["stages"], flops, strict=True):
        if stage["name"] == PROBE and points:
            break
        per_step = of_stage / stage["steps"]
        found = [e for e in stage["learning_curve"] if f"eval_{measure}" in e]
        points += [(before + e["step"] * per_step, e[f"eval_{measure}"]) for e in found]
        before += of_stage
    return points


def _entropy(recipe: Recipe, series: Series, floor: dict[str, float]) -> dict[str, list[float]]:
    """Entropy ratio of what was recovered: 1 is all, 0 what a uniform guess has."""
    losses = [result["stages"][-1]["metrics"]["autoencoding_loss"] for result in series.results]
    vocab_size = recipe.trainings[0].recipe.build_config().vocab_size
    return {"entropy ratio": [1 - loss / math.log(vocab_size) for loss in losses]}


def _retrieval(recipe: Recipe, series: Series, floor: dict[str, float]) -> dict[str, list[float]]:
    """How often an embedding finds, among those of a corpus, the one chunk that it shares three quarters with."""
    trainings = [t for t in recipe.trainings if t.label == series.label]
    return _entropy(recipe, series, floor) | {"retrieval": [_retrieval_accuracy(t) for t in trainings]}


@torch.no_grad()
def _retrieval_accuracy(training: Trained) -> float:
    """Top-1 accuracy of chunks of validation text among NUM_CANDIDATES that begin a quarter of a chunk later."""
    model, _ = training.load()
    length = model.config.chunk_length
    rows = _windows(training)["validation"].with_format("torch")["input_ids"][:]
    text = rows.flatten()[: NUM_CANDIDATES * 2 * length]
    chunks = text.unfold(0, length, 2 * length)  # every other one, so that no two candidates share a token
    later = text.roll(-(length // 4)).unfold(0, length, 2 * length)
    queries, candidates = (model.encoder(part.to(model.device)).memories.flatten(1) for part in (chunks, later))
    return retrieval_accuracy(queries.tolist(), candidates.tolist())["accuracy"]


def _stored(recipe: Recipe, series: Series, floor: dict[str, float]) -> dict[str, list[float]]:
    """Accuracy with stored numbers of one byte, and bits per byte of text, those of the vector included."""
    trainings = [t for t in recipe.trainings if t.label == series.label]
    told = {"int8": [], "fp8": []}
    for quantization, accuracies in told.items():
        for training in trainings:
            model, _ = training.load()
            if model.config.memory_quantization is None:
                model.config.memory_quantization = quantization
            found = measure(
                model, _windows(training)["validation"], training.recipe.training.per_device_eval_batch_size
            )
            accuracies.append(found["autoencoding_accuracy"])
    return told | {
        "bits per byte with int8": [_bits_per_byte(t, r) for t, r in zip(trainings, series.results, strict=True)]
    }


def _bits_per_byte(training: Trained, result: dict[str, Any]) -> float:
    config, size = training.recipe.build_config(), result["validation"]
    num_chunks = size["tokens"] / config.chunk_length
    stored = 8 * config.memory_numbers + 32 * config.num_memory_embeddings  # codes, and a scale for each vector
    nats = result["stages"][-1]["metrics"]["autoencoding_loss"]
    return bits_per_byte(nats, size["tokens"], size["bytes"]) + num_chunks * stored / size["bytes"]


def _nothing_more(recipe: Recipe, series: Series, floor: dict[str, float]) -> dict[str, list[float]]:
    return {}


def _is_far_less(ours: Iterable[float], others: Iterable[float]) -> bool:
    return max(ours) <= FAR_LESS * min(others)


def _fidelity_claims(recipe: Recipe, series: dict[str, Series], floor: dict[str, float]) -> Iterator[Claim]:
    told = {label: series[label].values("recovered") for label in recipe.runs}
    control = told[recipe.roles["control"][0]]
    trained = [told[label] for label in recipe.roles["language_models"]]
    holds_little = all(_is_far_less(values, control) for values in trained)
    holds_much = any(min(values) >= HOLDS for values in trained)
    yield Claim(
        "Embeddings of language models hold little of their input, whatever the training",
        "about 5% of the tokens at 512, an untrained encoder's about 4%, an autoencoder's over 95% at 256",
        "; ".join(f"{label} {mean_and_deviation(values, 3)}" for label, values in told.items())
        + f"; frequencies alone {floor['accuracy']:.3f}",
        "reproduced" if holds_little else "contradicted" if holds_much else "not at this size",
    )


def _capacity_claims(recipe: Recipe, series: dict[str, Series], floor: dict[str, float]) -> Iterator[Claim]:
    held = {label: series[label].values("autoencoding_accuracy") for label in recipe.roles["nearly_all"]}
    yield Claim(
        "Embeddings of an autoencoder hold nearly all of their input",
        "over 95% of 256 tokens",
        "; ".join(f"{label} {mean_and_deviation(values, 4)}" for label, values in held.items()),
        "reproduced" if all(min(values) >= HOLDS for values in held.values()) else "not at this size",
    )


def _objectives_claims(recipe: Recipe, series: dict[str, Series], floor: dict[str, float]) -> Iterator[Claim]:
    role = {name: series[labels[0]] for name, labels in recipe.roles.items()}
    causal, combined, staged = role["causal"], role["combined"], role["curriculum"]

    def told(measure: str, *chosen: Series) -> str:
        return ", ".join(f"{one.label} {one.tell(measure)}" for one in chosen)

    poor = _is_far_less(causal.values("recovered"), combined.values("recovered"))
    yield Claim(
        "Causal training alone gives memories that hold little",
        "about 5% of the tokens recovered, as of a plain language model",
        f"recovered: {told('recovered', causal, combined)}; blank copy: {told('blank_copy_accuracy', causal)}",
        "reproduced" if poor else "not at this size",
    )
    rich = min(combined.values("blank_copy_accuracy")) >= HOLDS
    yield Claim(
        "Combined objectives give memories that hold much, and that the decoder tells",
        "copies 94.7% (unverified)",
        f"blank copy: {told('blank_copy_accuracy', combined)}; causal loss: {told('causal_loss', combined, causal)}",
        "reproduced" if rich else "not at this size",
    )
    better = min(staged.values("blank_copy_accuracy")) > max(combined.values("blank_copy_accuracy"))
    worse_loss = (
        statistics.mean(staged.values("causal_loss")) > statistics.mean(combined.values("causal_loss")) + EQUAL_LOSS
    )
    yield Claim(
        "A frozen encoder and a curriculum make the training more efficient",
        "works best of all (figures only)",
        f"blank copy: {told('blank_copy_accuracy', staged, combined)}; "
        f"copy: {told('copy_accuracy', staged, combined)}; causal loss: {told('causal_loss', staged, combined)}; at "
        + " and ".join(f"{sum(one.flops[:-1]) / 1e12:.1f}" for one in (staged, combined))
        + " x 10^12 operations",
        "reproduced" if better and not worse_loss else "not at this size" if better else "contradicted",
    )
    fails = _is_far_less(role["frozen_causal"].values("blank_copy_accuracy"), staged.values("blank_copy_accuracy"))
    yield Claim(
        "The same curriculum on a frozen causal encoder fails",
        "very slow on blank copy (figures only)",
        f"blank copy: {told('blank_copy_accuracy', role['frozen_causal'], staged)}",
        "reproduced" if fails else "not at this size",
    )
    gain = min(role["no_memory"].values("causal_loss")) - max(causal.values("causal_loss"))
    yield Claim(
        "A memory makes the next token easier to predict than none",
        "clearly better than no memory (figures only)",
        f"causal loss: {told('causal_loss', role['no_memory'], causal, combined, staged)}",
        "reproduced" if gain > EQUAL_LOSS else "not at this size",
    )


def _remedies_claims(recipe: Recipe, series: dict[str, Series], floor: dict[str, float]) -> Iterator[Claim]:
    known = {name: series[labels[0]] for name, labels in recipe.roles.items()}
    remedies = [one for one in series.values() if one not in known.values()]
    best = min(remedies, key=lambda one: statistics.mean(one.values("causal_loss")))
    is_level = statistics.mean(best.values("causal_loss")) <= (
        statistics.mean(known["combined"].values("causal_loss")) + EQUAL_LOSS
    )
    yield Claim(
        "A curriculum costs no causal loss at equal compute, if something is done about it",
        "not asked",
        "causal loss: " + "; ".join(f"{one.label} {one.tell('causal_loss')}" for one in series.values()),
        "reproduced" if is_level and min(best.values("blank_copy_accuracy")) >= HOLDS else "not at this size",
    )


def _positions_claims(recipe: Recipe, series: dict[str, Series], floor: dict[str, float]) -> Iterator[Claim]:
    pure = series[recipe.roles["pure"][0]].values("blank_copy_accuracy")
    best = max(series.values(), key=lambda one: statistics.mean(one.values("blank_copy_accuracy")))
    yield Claim(
        "A repeated vector does not tell the order of tokens; windows that go round it do",
        "unrolling is much better for transformers",
        f"blank copy: prefix without positions {mean_and_deviation(pure, 3)}, best: {best.label} "
        f"{best.tell('blank_copy_accuracy')}",
        "reproduced" if _is_far_less(pure, best.values("blank_copy_accuracy")) else "not at this size",
    )


class Question(NamedTuple):
    """What is told of an experiment: columns of its table (measure, name, digits), its picture, and its claims."""

    columns: tuple[tuple[str, str, int], ...]
    drawn: str
    drawn_name: str
    curve: str
    curve_name: str
    more: Callable[..., dict[str, list[float]]]
    claims: Callable[..., Iterator[Claim]]
    roles: tuple[str, ...]


_AUTOENCODING = ("autoencoding_accuracy", "share of tokens recovered from the embedding")
_BLANK_COPY = ("blank_copy_accuracy", "share of tokens told from memory (blank copy)")
_WHOLE = (
    ("steps", "steps", 0),
    ("causal_loss", "causal loss", 3),
    ("blank_copy_accuracy", "blank copy", 3),
    ("copy_accuracy", "copy", 3),
)
_ALONE = (
    ("autoencoding_accuracy", "tokens recovered", 4),
    ("autoencoding_exact", "chunks recovered", 3),
    ("autoencoding_loss", "loss", 3),
)
QUESTIONS = {
    "fidelity": Question(
        (("recovered", "tokens recovered", 3),),
        *("recovered", _AUTOENCODING[1], *_AUTOENCODING),
        _retrieval,
        _fidelity_claims,
        ("control", "language_models"),
    ),
    "capacity": Question(_ALONE, *_AUTOENCODING, *_AUTOENCODING, _stored, _capacity_claims, ("nearly_all",)),
    "objectives": Question(
        (*_WHOLE, ("recovered", "recovered by a new decoder", 3)),
        *(*_BLANK_COPY, *_BLANK_COPY),
        _nothing_more,
        _objectives_claims,
        ("curriculum", "combined", "causal", "frozen_causal", "no_memory"),
    ),
    "remedies": Question(
        _WHOLE,
        *_BLANK_COPY,
        "causal_loss",
        "causal loss (nats)",
        _nothing_more,
        _remedies_claims,
        ("curriculum", "combined"),
    ),
    "positions": Question(_WHOLE, *_BLANK_COPY, *_BLANK_COPY, _nothing_more, _positions_claims, ("pure",)),
}

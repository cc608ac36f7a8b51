# SPDX-License-Identifier: Apache-2.0
"""The questions that `memory_models` asks: for each the columns of its table, its picture and its claims.

- `fidelity`: what a fresh decoder recovers from a frozen encoder, that of a language model or of an autoencoder;
- `capacity`: how long a chunk an embedding of a given width can hold;
- `objectives`: causal, combined, in stages or not, at equal compute;
- `remedies`: what makes the stages' causal loss as low as that of training from scratch;
- `positions`: how a position-free mosaic tells the order of a chunk's tokens.

A stage called `probe` measures the model of the stage before it. The model is judged by that earlier stage; the
accuracy of the probe is a separate measure, `recovered`.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from datasets import Dataset

from modeling_memory_mosaic import MemoryModelForCausalLM
from training.experiments.comparison import Trained
from training.metrics.mean_loss import bits_per_byte_of_loss
from training.metrics.retrieval_accuracy.retrieval_accuracy import retrieval_accuracy
from training.tables import Claim, mean_and_deviation
from training.tasks import language_modeling
from training.tasks.memory_model import measure


PROBE = "probe"
# Chunks that a retrieval chooses from.
NUM_CANDIDATES = 512
# The least share of the tokens with which an embedding counts as holding its text.
HOLDS = 0.99
# The largest ratio of two measures with which the first counts as far less.
FAR_LESS = 0.5
# Causal losses that differ by less count as equal, in nats.
EQUAL_LOSS = 0.02


def _value(stages: list[dict[str, Any]], measure: str) -> float | None:
    if measure == "recovered":
        probes = [stage for stage in stages if stage["name"] == PROBE]
        return probes[-1]["metrics"].get("autoencoding_accuracy") if probes else None
    # A model that is only probed has no stage to judge.
    judged = [stage for stage in stages if stage["name"] != PROBE]
    if measure == "steps":
        return sum(stage["steps"] for stage in judged)
    return judged[-1]["metrics"].get(measure) if judged else None


class Series(NamedTuple):
    """One model with every seed."""

    label: str
    trainings: list[Trained]
    results: list[dict[str, Any]]
    flops: list[int]  # of each stage, the same for all seeds

    def values(self, measure: str) -> list[float]:
        """Return a measure of each seed; nothing if the model lacks it."""
        values = [_value(result["stages"], measure) for result in self.results]
        return [value for value in values if value is not None] if None not in values else []

    def mean(self, measure: str) -> float:
        """Return the mean of a measure over the seeds."""
        return statistics.mean(self.values(measure))

    def format(self, measure: str, digits: int = 3) -> str:
        """Return a measure as a cell of a table."""
        values = self.values(measure)
        if not values:
            return ""
        # The recipe sets the steps, so that seeds do not differ in them.
        return f"{values[0]:,}" if measure == "steps" else mean_and_deviation(values, digits)


def prepare_windows(training: Trained) -> dict[str, Dataset]:
    """Return the windows, by split, that a training reads."""
    state = PartialState()
    tokenizer = language_modeling.prepare_tokenizer(training.recipe, state)
    return language_modeling.prepare_windows(training.recipe, tokenizer, state)


# Columns that are measured on the trained models.


def _entropy(series: Series) -> dict[str, list[float]]:
    """Return the entropy ratio of what was recovered: 1 is everything, 0 a uniform guess."""
    # The last stage of each model is its probe.
    losses = [result["stages"][-1]["metrics"]["autoencoding_loss"] for result in series.results]
    vocab_size = series.trainings[0].recipe.build_config().vocab_size
    return {"entropy ratio": [1 - loss / math.log(vocab_size) for loss in losses]}


@torch.no_grad()
def _retrieval_accuracy(training: Trained) -> float:
    """Return the share of chunks whose embedding is nearest to that of the chunk a quarter of its length later.

    All are chunks of validation text. Each embedding has NUM_CANDIDATES candidates.
    """
    model = cast(MemoryModelForCausalLM, training.load()[0])
    length = model.config.chunk_length
    rows = prepare_windows(training)["validation"].with_format("torch")["input_ids"][:]
    text = rows.flatten()[: NUM_CANDIDATES * 2 * length]
    chunks = text.unfold(0, length, 2 * length)  # every other one, so that no two candidates share a token
    later = text.roll(-(length // 4)).unfold(0, length, 2 * length)  # (N, L), as `chunks`
    queries, candidates = (model.encoder(part.to(model.device)).memories.flatten(1) for part in (chunks, later))
    return retrieval_accuracy(queries.tolist(), candidates.tolist())["accuracy"]


def _entropy_and_retrieval(series: Series) -> dict[str, list[float]]:
    return _entropy(series) | {"retrieval": [_retrieval_accuracy(training) for training in series.trainings]}


def _stored_accuracy(training: Trained, quantization: str) -> float:
    model = cast(MemoryModelForCausalLM, training.load()[0])
    # A model that was trained with rounded embeddings keeps that rounding.
    if model.config.memory_quantization is None:
        model.config.memory_quantization = quantization
    batch_size = training.recipe.training.per_device_eval_batch_size
    return measure(model, prepare_windows(training)["validation"], batch_size)["autoencoding_accuracy"]


def _stored_bits_per_byte(training: Trained, result: dict[str, Any]) -> float:
    config, size = training.recipe.build_config(), result["validation"]
    num_chunks = size["tokens"] / config.chunk_length
    stored = 8 * config.memory_numbers + 32 * config.num_memory_embeddings  # codes, and a scale for each vector
    loss = result["stages"][-1]["metrics"]["autoencoding_loss"]
    return bits_per_byte_of_loss(loss, size["tokens"], size["bytes"]) + num_chunks * stored / size["bytes"]


def _storage(series: Series) -> dict[str, list[float]]:
    """Return the accuracy with stored numbers of one byte, and bits per byte of text, those of the vector included."""
    accuracies = {
        name: [_stored_accuracy(training, name) for training in series.trainings] for name in ("int8", "fp8")
    }
    bits = [_stored_bits_per_byte(*pair) for pair in zip(series.trainings, series.results, strict=True)]
    return accuracies | {"bits per byte with int8": bits}


def _no_columns(series: Series) -> dict[str, list[float]]:
    return {}


# Claims: of each question, from its models by label. `roles` are the labels by the part that they play.


def _is_far_less(values: Sequence[float], others: Sequence[float]) -> bool:
    # The worst pair of seeds decides, so that one good seed is not enough.
    return max(values) <= FAR_LESS * min(others)


def _fidelity_claims(
    roles: dict[str, list[str]], models: dict[str, Series], unigram: dict[str, float]
) -> Iterator[Claim]:
    recovered = {label: series.values("recovered") for label, series in models.items()}
    control = recovered[roles["control"][0]]
    trained = [recovered[label] for label in roles["language_models"]]
    holds_little = all(_is_far_less(values, control) for values in trained)
    holds_much = any(min(values) >= HOLDS for values in trained)
    yield Claim(
        "Embeddings of language models hold little of their input, whatever the training",
        "about 5% of the tokens at 512, an untrained encoder's about 4%, an autoencoder's over 95% at 256",
        "; ".join(f"{label} {mean_and_deviation(values, 3)}" for label, values in recovered.items())
        + f"; frequencies alone {unigram['accuracy']:.3f}",
        "reproduced" if holds_little else "contradicted" if holds_much else "not at this size",
    )


def _capacity_claims(
    roles: dict[str, list[str]], models: dict[str, Series], unigram: dict[str, float]
) -> Iterator[Claim]:
    held = {label: models[label].values("autoencoding_accuracy") for label in roles["nearly_all"]}
    yield Claim(
        "Embeddings of an autoencoder hold nearly all of their input",
        "over 95% of 256 tokens",
        "; ".join(f"{label} {mean_and_deviation(values, 4)}" for label, values in held.items()),
        "reproduced" if all(min(values) >= HOLDS for values in held.values()) else "not at this size",
    )


def _side_by_side(measure: str, *models: Series) -> str:
    return ", ".join(f"{series.label} {series.format(measure)}" for series in models)


def _claims_on_causal_and_combined(causal: Series, combined: Series) -> Iterator[Claim]:
    holds_little = _is_far_less(causal.values("recovered"), combined.values("recovered"))
    blank_copy = _side_by_side("blank_copy_accuracy", causal)
    yield Claim(
        "Causal training alone gives memories that hold little",
        "about 5% of the tokens recovered, as of a plain language model",
        f"recovered: {_side_by_side('recovered', causal, combined)}; blank copy: {blank_copy}",
        "reproduced" if holds_little else "not at this size",
    )
    holds_much = min(combined.values("blank_copy_accuracy")) >= HOLDS
    blank_copy = _side_by_side("blank_copy_accuracy", combined)
    yield Claim(
        "Combined objectives give memories that hold much, and that the decoder tells",
        "copies 94.7% (unverified)",
        f"blank copy: {blank_copy}; causal loss: {_side_by_side('causal_loss', combined, causal)}",
        "reproduced" if holds_much else "not at this size",
    )


def _claim_on_the_curriculum(curriculum: Series, combined: Series) -> Claim:
    copies_more = min(curriculum.values("blank_copy_accuracy")) > max(combined.values("blank_copy_accuracy"))
    predicts_worse = curriculum.mean("causal_loss") > combined.mean("causal_loss") + EQUAL_LOSS
    blank_copy, copy, causal_loss = (
        _side_by_side(measure, curriculum, combined)
        for measure in ("blank_copy_accuracy", "copy_accuracy", "causal_loss")
    )
    # Without the last stage, the probe: it trains a new decoder only to measure the encoder.
    operations = " and ".join(f"{sum(series.flops[:-1]) / 1e12:.1f}" for series in (curriculum, combined))
    return Claim(
        "A frozen encoder and a curriculum make the training more efficient",
        "works best of all (figures only)",
        f"blank copy: {blank_copy}; copy: {copy}; causal loss: {causal_loss}; at {operations} x 10^12 operations",
        "contradicted" if not copies_more else "not at this size" if predicts_worse else "reproduced",
    )


def _objectives_claims(
    roles: dict[str, list[str]], models: dict[str, Series], unigram: dict[str, float]
) -> Iterator[Claim]:
    by_role = {role: models[labels[0]] for role, labels in roles.items()}
    causal, combined, curriculum = by_role["causal"], by_role["combined"], by_role["curriculum"]
    yield from _claims_on_causal_and_combined(causal, combined)
    yield _claim_on_the_curriculum(curriculum, combined)
    frozen_causal = by_role["frozen_causal"]
    fails = _is_far_less(frozen_causal.values("blank_copy_accuracy"), curriculum.values("blank_copy_accuracy"))
    yield Claim(
        "The same curriculum on a frozen causal encoder fails",
        "very slow on blank copy (figures only)",
        f"blank copy: {_side_by_side('blank_copy_accuracy', frozen_causal, curriculum)}",
        "reproduced" if fails else "not at this size",
    )
    no_memory = by_role["no_memory"]
    gain = min(no_memory.values("causal_loss")) - max(causal.values("causal_loss"))
    yield Claim(
        "A memory makes the next token easier to predict than none",
        "clearly better than no memory (figures only)",
        f"causal loss: {_side_by_side('causal_loss', no_memory, causal, combined, curriculum)}",
        "reproduced" if gain > EQUAL_LOSS else "not at this size",
    )


def _remedies_claims(
    roles: dict[str, list[str]], models: dict[str, Series], unigram: dict[str, float]
) -> Iterator[Claim]:
    known = {labels[0] for labels in roles.values()}
    # Every run without a role is a remedy, so that a recipe may add more of them.
    remedies = [series for label, series in models.items() if label not in known]
    best = min(remedies, key=lambda series: series.mean("causal_loss"))
    is_level = best.mean("causal_loss") <= models[roles["combined"][0]].mean("causal_loss") + EQUAL_LOSS
    yield Claim(
        "A curriculum costs no causal loss at equal compute, if something is done about it",
        "not asked",
        "causal loss: " + "; ".join(f"{series.label} {series.format('causal_loss')}" for series in models.values()),
        "reproduced" if is_level and min(best.values("blank_copy_accuracy")) >= HOLDS else "not at this size",
    )


def _positions_claims(
    roles: dict[str, list[str]], models: dict[str, Series], unigram: dict[str, float]
) -> Iterator[Claim]:
    pure = models[roles["pure"][0]].values("blank_copy_accuracy")
    best = max(models.values(), key=lambda series: series.mean("blank_copy_accuracy"))
    yield Claim(
        "A repeated vector does not tell the order of tokens; windows that go round it do",
        "unrolling is much better for transformers",
        f"blank copy: prefix without positions {mean_and_deviation(pure, 3)}, best: {best.label} "
        f"{best.format('blank_copy_accuracy')}",
        "reproduced" if _is_far_less(pure, best.values("blank_copy_accuracy")) else "not at this size",
    )


class Column(NamedTuple):
    """A measure of `Series.values` as a column of a table."""

    measure: str
    name: str
    digits: int


class Plot(NamedTuple):
    """A measure and what it is called at its axis."""

    measure: str
    name: str


class Question(NamedTuple):
    """How an experiment is reported.

    Args:
        columns: of its table, from the results.
        more_columns: of its table, from the trained models: their names and a value for each seed.
        points: drawn for each model and seed.
        curve: drawn over training.
        claims: of the paper, from the roles, the models by label and the measures of a guess by frequencies.
        roles: that a recipe has to name.
    """

    columns: tuple[Column, ...]
    more_columns: Callable[[Series], dict[str, list[float]]]
    points: Plot
    curve: Plot
    claims: Callable[[dict[str, list[str]], dict[str, Series], dict[str, float]], Iterator[Claim]]
    roles: tuple[str, ...]


_RECOVERED_NAME = "share of tokens recovered from the embedding"


_AUTOENCODING = Plot("autoencoding_accuracy", _RECOVERED_NAME)


_BLANK_COPY = Plot("blank_copy_accuracy", "share of tokens reproduced from memory (blank copy)")


_WHOLE_MODEL = (
    Column("steps", "steps", 0),
    Column("causal_loss", "causal loss", 3),
    Column("blank_copy_accuracy", "blank copy", 3),
    Column("copy_accuracy", "copy", 3),
)


_EMBEDDINGS_ALONE = (
    Column("autoencoding_accuracy", "tokens recovered", 4),
    Column("autoencoding_exact", "chunks recovered", 3),
    Column("autoencoding_loss", "loss", 3),
)


QUESTIONS = {
    "fidelity": Question(
        columns=(Column("recovered", "tokens recovered", 3),),
        more_columns=_entropy_and_retrieval,
        points=Plot("recovered", _RECOVERED_NAME),
        curve=_AUTOENCODING,
        claims=_fidelity_claims,
        roles=("control", "language_models"),
    ),
    "capacity": Question(
        columns=_EMBEDDINGS_ALONE,
        more_columns=_storage,
        points=_AUTOENCODING,
        curve=_AUTOENCODING,
        claims=_capacity_claims,
        roles=("nearly_all",),
    ),
    "objectives": Question(
        columns=(*_WHOLE_MODEL, Column("recovered", "recovered by a new decoder", 3)),
        more_columns=_no_columns,
        points=_BLANK_COPY,
        curve=_BLANK_COPY,
        claims=_objectives_claims,
        roles=("curriculum", "combined", "causal", "frozen_causal", "no_memory"),
    ),
    "remedies": Question(
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        points=_BLANK_COPY,
        curve=Plot("causal_loss", "causal loss (nats)"),
        claims=_remedies_claims,
        roles=("curriculum", "combined"),
    ),
    "positions": Question(
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        points=_BLANK_COPY,
        curve=_BLANK_COPY,
        claims=_positions_claims,
        roles=("pure",),
    ),
}

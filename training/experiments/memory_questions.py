# SPDX-License-Identifier: Apache-2.0
"""The questions that `memory_models` asks: for each the columns of its table, its picture and what it measures.

- `fidelity`: what a fresh decoder recovers from a frozen encoder, that of a language model or of an autoencoder;
- `capacity`: how long a chunk an embedding of a given width can hold;
- `objectives`: causal, combined, in stages or not, at equal compute;
- `remedies`: what makes the stages' causal loss as low as that of training from scratch;
- `positions`: how a position-free mosaic tells the order of a chunk's tokens;
- `fidelity_hub`: as `fidelity`, of pretrained models, each with its own tokens;
- `reads`: how a decoder reads memories that hold their text, and predicts the next token as well as without them;
- `pretrained`: what a decoder that is trained already learns of memories, and at which price;
- `context`: what memories bring of what all earlier tokens would bring, and what a curriculum costs and saves;
- `size`: how many bits of storage an embedding takes for the text that it holds, in three precisions.

A stage called `probe` measures the model of the stage before it. The model is judged by that earlier stage; the
accuracy of the probe is a separate measure, `recovered`. Each measure is an effect of every model, and of every two
models: recipes make their claims of these.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

from accelerate import PartialState
from datasets import Dataset

from modeling_memory_mosaic import MemoryModelConfig, MemoryModelForCausalLM
from training.claims import Effect, Effects, mean_effect
from training.experiments.comparison import Trained
from training.metrics.mean_loss import bits_per_byte_of_loss
from training.tables import mean_and_deviation
from training.tasks import language_modeling
from training.tasks.memory_model import measure, prepare_tokenizer


PROBE = "probe"
# The share of the tokens with which a decoder counts as telling its memories.
TELLS = 0.99
# In which a memory is stored; the first is that of the training.
PRECISIONS = ("float32", "int8", "fp8")
BITS_OF_IDS = "bits per byte of token ids"
# With these begin the labels of the two models between which every share of what context is worth lies.
NO_MEMORY, FULL_CONTEXT = "No memory", "Full context"
# What stands beside a result of one seed: what a guess by the tokens' frequencies alone gets right, and the like, and
# by their labels the causal losses of these two models.
Guess = dict[str, float]


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
    results: list[dict[str, Any]]  # of each seed; `stages` of each is what is read
    flops: list[int]  # of each stage, the same for all seeds
    trainings: Sequence[Trained] = ()  # none where a finished result is read
    more: dict[str, list[float]] = {}  # what was measured on the trained models, a value for each seed

    def values(self, measure: str) -> list[float]:
        """Return a measure of each seed; nothing if the model lacks it."""
        values = [_value(result["stages"], measure) for result in self.results]
        return [value for value in values if value is not None] if None not in values else []

    def format(self, measure: str, digits: int = 3) -> str:
        """Return a measure as a cell of a table."""
        values = self.values(measure)
        if not values:
            return ""
        # The recipe sets the steps, so that seeds do not differ in them.
        return f"{values[0]:,}" if measure == "steps" else mean_and_deviation(values, digits)

    def curve(self, result: dict[str, Any], measure: str) -> list[tuple[float, float]]:
        """Return points (operations of all stages so far, validation measure) of one seed.

        A probe after other stages is left out.
        """
        points: list[tuple[float, float]] = []
        flops_before = 0.0
        for stage, stage_flops in zip(result["stages"], self.flops, strict=True):
            # A probe that comes first is the only training of this model, so that its curve is drawn.
            if stage["name"] == PROBE and points:
                break
            # The log counts steps, and a step costs more in some stages than in others.
            flops_per_step = stage_flops / stage["steps"]
            entries = [entry for entry in stage["learning_curve"] if f"eval_{measure}" in entry]
            points += [(flops_before + entry["step"] * flops_per_step, entry[f"eval_{measure}"]) for entry in entries]
            flops_before += stage_flops
        return points


def prepare_windows(training: Trained) -> dict[str, Dataset]:
    """Return the windows, by split, that a training reads."""
    state = PartialState()
    tokenizer = prepare_tokenizer(training.recipe, state)
    return language_modeling.prepare_windows(training.recipe, tokenizer, state)


# Measures of one seed


class Reading(NamedTuple):
    """A measure of one seed; `is_bound` if the training ended before it was reached."""

    value: float
    is_bound: bool = False


class Measure(NamedTuple):
    """A measure of which there are effects.

    Args:
        name: before the colon in the names of effects.
        unit: of a value.
        read: returns it of a model and the place of one of its seeds; None if the model lacks it.
        as_ratio: whether two models are compared by the logarithm (base 2) of their ratio; otherwise by a difference.
        of_memory: whether a model without a memory lacks it.
        needs: beginnings of the labels of other models, without which no model has it, and whose causal losses stand
            beside each result.
    """

    name: str
    unit: str
    read: Callable[[Series, int, Guess], Reading | None]
    as_ratio: bool = False
    of_memory: bool = True
    needs: tuple[str, ...] = ()

    def of(self, label: str) -> str:
        """Return the name of the effect of one model."""
        return f"{self.name}: {label}"

    def between(self, label: str, other: str) -> str:
        """Return the name of the effect of one model against another."""
        return f"log2 of {self.name}: {label} over {other}" if self.as_ratio else f"{self.name}: {label} less {other}"


def _direct(name: str, unit: str, metric: str, of_memory: bool = True) -> Measure:
    """Return a measure that stands in the results."""

    def read(series: Series, seed: int, guess: Guess) -> Reading | None:
        value = _value(series.results[seed]["stages"], metric)
        return None if value is None else Reading(value)

    return Measure(name, unit, read, of_memory=of_memory)


def _above_chance(accuracy: float, guess: Guess) -> float:
    """Return an accuracy on a scale where a guess by frequencies is 0 and all is 1."""
    return (accuracy - guess["accuracy"]) / (1 - guess["accuracy"])


def probed_places(result: dict[str, Any]) -> list[float] | None:
    """Return the accuracy of the probe at each place of a chunk."""
    stage = result["stages"][-1]
    return stage["metrics"].get("autoencoding_by_place") if stage["name"] == PROBE else None


def own_guess(result: dict[str, Any], guess: Guess) -> Guess:
    """Return the guess for one result: its own where the tokens are those of its pretrained part."""
    return result["unigram"] if "pretrained" in result else guess


def first_with(labels: Sequence[str], beginning: str) -> str | None:
    """Return the first label that begins so."""
    return next((label for label in labels if label.startswith(beginning)), None)


def _share_of_context(series: Series, seed: int, guess: Guess) -> Reading | None:
    """Return what a model's memories bring of what all earlier tokens bring: 0 is no memory, 1 full context."""
    loss = _value(series.results[seed]["stages"], "causal_loss")
    if loss is None or not guess.keys() >= {NO_MEMORY, FULL_CONTEXT}:
        return None
    worth = guess[NO_MEMORY] - guess[FULL_CONTEXT]
    # Where context is worth nothing, there is no share of it; a claim on it is then undecided.
    return Reading((guess[NO_MEMORY] - loss) / worth if worth > 0 else math.nan)


def _of_trained(name: str) -> Callable[[Series, int, Guess], Reading | None]:
    """Return the function that reads a measure which was taken on the trained models."""

    def read(series: Series, seed: int, guess: Guess) -> Reading | None:
        return Reading(series.more[name][seed]) if name in series.more else None

    return read


def _bits_beyond_ids(series: Series, seed: int, guess: Guess) -> Reading | None:
    """Return how many more bits a byte of text takes as memories of int8 than as numbers of its tokens."""
    if BITS_OF_IDS not in series.more:
        return None
    return Reading(series.more["bits per byte, int8"][seed] - series.more[BITS_OF_IDS][seed])


def _lost_by(name: str) -> Callable[[Series, int, Guess], Reading | None]:
    """Return the function that reads the share of tokens which stored memories lose by rounding."""

    def read(series: Series, seed: int, guess: Guess) -> Reading | None:
        accuracy = _value(series.results[seed]["stages"], "autoencoding_accuracy")
        return Reading(accuracy - series.more[name][seed]) if accuracy is not None and name in series.more else None

    return read


def _characters(series: Series, seed: int, guess: Guess) -> Reading | None:
    places = probed_places(series.results[seed])
    return None if places is None else Reading(sum(_above_chance(place, guess) for place in places))


def _first_half(series: Series, seed: int, guess: Guess) -> Reading | None:
    places = probed_places(series.results[seed])
    return None if places is None else Reading(_above_chance(statistics.mean(places[: len(places) // 2]), guess))


def _copy_above_chance(series: Series, seed: int, guess: Guess) -> Reading | None:
    accuracy = _value(series.results[seed]["stages"], "blank_copy_accuracy")
    return None if accuracy is None else Reading(_above_chance(accuracy, guess))


def _operations(series: Series, seed: int, guess: Guess) -> Reading | None:
    """Return operations up to the first evaluation at which the decoder tells its memories, in 10^12."""
    curve = series.curve(series.results[seed], "blank_copy_accuracy")
    if not curve:
        return None
    reached = [flops for flops, accuracy in curve if accuracy >= TELLS]
    return Reading((reached or [curve[-1][0]])[0] / 1e12, is_bound=not reached)


RECOVERED = _direct("tokens recovered", "", "autoencoding_accuracy")
CAUSAL_LOSS = _direct("causal loss", "nats", "causal_loss", of_memory=False)
BLANK_COPY = _direct("blank copy", "", "blank_copy_accuracy")
COPY_ABOVE_CHANCE = Measure("blank copy above chance", "", _copy_above_chance)
CHARACTERS = Measure("characters above chance", "characters", _characters)
TOKENS = Measure("tokens above chance", "tokens", _characters)
FIRST_HALF = Measure("first half above chance", "", _first_half)
OPERATIONS = Measure(f"operations to {TELLS} blank copy", "10^12", _operations, as_ratio=True)
SHARE = Measure("share of context", "", _share_of_context, needs=(NO_MEMORY, FULL_CONTEXT))
EXACT = _direct("chunks recovered", "", "autoencoding_exact")
BITS = tuple(Measure(f"bits per byte, {name}", "", _of_trained(f"bits per byte, {name}")) for name in PRECISIONS)
BEYOND_IDS = Measure("bits per byte of int8 beyond token ids", "", _bits_beyond_ids)
LOST_BY_ROUNDING = tuple(
    Measure(f"tokens lost by {name}", "", _lost_by(f"tokens recovered, {name}")) for name in PRECISIONS[1:]
)


# Effects


def effect_names(measures: Sequence[Measure], labels: Sequence[str], without_memory: Sequence[str]) -> list[str]:
    """Return the names of all effects: of each model, and of each two in their order.

    Args:
        measures: of the question.
        labels: of the models.
        without_memory: labels of models that have no memory.
    """
    names = []
    for each in measures:
        if None in [first_with(labels, beginning) for beginning in each.needs]:
            continue
        measured = [label for label in labels if not (each.of_memory and label in without_memory)]
        names += [each.of(label) for label in measured]
        names += [each.between(*pair) for pair in itertools.combinations(measured, 2)]
    return names


def readings_of(measure: Measure, models: Sequence[Series], series: Series, guess: Guess) -> list[Reading]:
    """Return a measure of each seed of one of the models; nothing if the model lacks it.

    Args:
        measure: which one.
        models: all that are compared.
        series: the model.
        guess: measures of a guess by frequencies.
    """
    by_label = {one.label: one for one in models}
    bounds = {beginning: first_with(list(by_label), beginning) for beginning in measure.needs}
    # The models that a measure compares with have it by definition.
    if None in bounds.values() or series.label in bounds.values():
        return []
    found = []
    for seed, result in enumerate(series.results):
        losses = {
            beginning: _value(by_label[cast(str, label)].results[seed]["stages"], "causal_loss")
            for beginning, label in bounds.items()
        }
        known = {beginning: loss for beginning, loss in losses.items() if loss is not None}
        found.append(measure.read(series, seed, own_guess(result, guess) | known))
    return cast(list[Reading], found) if None not in found else []


def _effect(readings: Sequence[Reading], values: Sequence[float], unit: str) -> Effect:
    effect = mean_effect(values, unit)
    if any(reading.is_bound for reading in readings):
        return effect._replace(low=None, high=None, basis=f"{effect.basis}, some of which end before they reach it")
    return effect


def effects_of(measures: Sequence[Measure], models: Sequence[Series], guess: Guess) -> Effects:
    """Return the effects by name, in the order of `effect_names`.

    Args:
        measures: of the question.
        models: in the order of the recipe.
        guess: measures of a guess by frequencies.
    """
    found: Effects = {}
    for each in measures:
        readings = {series.label: readings_of(each, models, series, guess) for series in models}
        readings = {label: of_seeds for label, of_seeds in readings.items() if of_seeds}
        for label, ours in readings.items():
            found[each.of(label)] = _effect(ours, [reading.value for reading in ours], each.unit)
        for (label, ours), (other, theirs) in itertools.combinations(readings.items(), 2):
            pairs = [(our.value, their.value) for our, their in zip(ours, theirs, strict=True)]
            values = [math.log2(our / their) if each.as_ratio else our - their for our, their in pairs]
            unit = "" if each.as_ratio else each.unit
            found[each.between(label, other)] = _effect([*ours, *theirs], values, unit)
    return found


# Columns that are measured on the trained models


def _entropy_and_characters(series: Series, guess: Guess) -> dict[str, list[float]]:
    """Return the entropy ratio of what was recovered (1 is everything, 0 a uniform guess), and the characters."""
    # The last stage of each model is its probe.
    losses = [result["stages"][-1]["metrics"]["autoencoding_loss"] for result in series.results]
    vocab_size = series.trainings[0].recipe.build_config().vocab_size
    return {
        "entropy ratio": [1 - loss / math.log(vocab_size) for loss in losses],
        CHARACTERS.name: [reading.value for reading in readings_of(CHARACTERS, [], series, guess)],
    }


def _entropy_and_tokens(series: Series, guess: Guess) -> dict[str, list[float]]:
    """Return the same in tokens, with the entropy ratio and the accuracy of a guess beside: tokenizers differ."""
    columns = _entropy_and_characters(series, guess)
    guesses = [own_guess(result, guess) for result in series.results]
    return {
        "entropy ratio": columns["entropy ratio"],
        "entropy ratio of frequencies": [one["entropy_ratio"] for one in guesses],
        "accuracy of frequencies": [one["accuracy"] for one in guesses],
        TOKENS.name: columns[CHARACTERS.name],
    }


def _stored_measures(training: Trained, quantization: str) -> dict[str, Any]:
    """Return the measures of a trained model whose memories are rounded to one byte a number."""
    model = cast(MemoryModelForCausalLM, training.load()[0])
    # A model that was trained with rounded embeddings keeps that rounding.
    if model.config.memory_quantization is None:
        model.config.memory_quantization = quantization
    batch_size = training.recipe.training.per_device_eval_batch_size
    return measure(model, prepare_windows(training)["validation"], batch_size)


def _stored_bits(config: MemoryModelConfig, quantization: str | None) -> int:
    """Return the bits of a stored memory: codes of one byte with a scale for each vector, or numbers of four bytes."""
    if quantization is None:
        return 32 * config.memory_numbers
    return 8 * config.memory_numbers + 32 * config.num_memory_embeddings


def _bits_per_byte(training: Trained, result: dict[str, Any], loss: float, quantization: str | None) -> float:
    """Return the bits for a byte of text: those of its memories, and those that the decoder still needs."""
    config, size = training.recipe.build_config(), result["validation"]
    num_chunks = size["tokens"] / config.chunk_length
    needed = bits_per_byte_of_loss(loss, size["tokens"], size["bytes"])
    return needed + num_chunks * _stored_bits(config, quantization) / size["bytes"]


def _storage(series: Series, guess: Guess) -> dict[str, list[float]]:
    """Return the accuracy with stored numbers of one byte, and bits per byte of text, those of the vector included."""
    accuracies = {
        name: [_stored_measures(training, name)["autoencoding_accuracy"] for training in series.trainings]
        for name in ("int8", "fp8")
    }
    bits = [
        _bits_per_byte(training, result, result["stages"][-1]["metrics"]["autoencoding_loss"], "int8")
        for training, result in zip(series.trainings, series.results, strict=True)
    ]
    return accuracies | {"bits per byte with int8": bits}


def _precisions(series: Series, guess: Guess) -> dict[str, list[float]]:
    """Return, of each precision in which memories are stored, accuracy and bits per byte, each measured with it."""
    columns: dict[str, list[float]] = {}
    pairs = list(zip(series.trainings, series.results, strict=True))
    of_ids = [
        math.log2(training.recipe.build_config().vocab_size) * result["validation"]["tokens"]
        for training, result in pairs
    ]
    for name in PRECISIONS:
        quantization = None if name == "float32" else name
        measured = [
            result["stages"][-1]["metrics"] if quantization is None else _stored_measures(training, quantization)
            for training, result in pairs
        ]
        if quantization is not None:
            columns[f"tokens recovered, {name}"] = [one["autoencoding_accuracy"] for one in measured]
        columns[f"bits per byte, {name}"] = [
            _bits_per_byte(*pair, one["autoencoding_loss"], quantization)
            for pair, one in zip(pairs, measured, strict=True)
        ]
    ids = [bits / result["validation"]["bytes"] for bits, (_, result) in zip(of_ids, pairs, strict=True)]
    return columns | {BITS_OF_IDS: ids}


def _no_columns(series: Series, guess: Guess) -> dict[str, list[float]]:
    return {}


# Questions


class Column(NamedTuple):
    """A measure of `Series.values` as a column of a table."""

    measure: str
    name: str
    digits: int


class Plot(NamedTuple):
    """A measure, what it is called at its axis, and which end of it is better."""

    measure: str
    name: str
    direction: Literal["lower", "higher"] = "higher"


class Question(NamedTuple):
    """How an experiment is reported.

    Args:
        title: of its picture.
        columns: of its table, from the results.
        more_columns: of its table, from the trained models: their names and a value for each seed.
        curve: drawn over training, unless `by_place`.
        measures: of which there are effects.
        by_place: whether the accuracy of the probe is drawn, at each place of a chunk.
        shown: measures that are columns of the table too, behind the others.
    """

    title: str
    columns: tuple[Column, ...]
    more_columns: Callable[[Series, Guess], dict[str, list[float]]]
    curve: Plot
    measures: tuple[Measure, ...]
    by_place: bool = False
    shown: tuple[Measure, ...] = ()


_AUTOENCODING = Plot("autoencoding_accuracy", "share of tokens recovered")


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
        title="What a new decoder recovers from an embedding",
        columns=(Column("recovered", "tokens recovered", 3),),
        more_columns=_entropy_and_characters,
        curve=_AUTOENCODING,
        measures=(CHARACTERS, FIRST_HALF),
        by_place=True,
    ),
    "fidelity_hub": Question(
        title="What a new decoder recovers from an embedding",
        columns=(Column("recovered", "tokens recovered", 3),),
        more_columns=_entropy_and_tokens,
        curve=_AUTOENCODING,
        measures=(TOKENS, FIRST_HALF),
        by_place=True,
    ),
    "capacity": Question(
        title="How much of a chunk its embedding holds",
        columns=_EMBEDDINGS_ALONE,
        more_columns=_storage,
        curve=_AUTOENCODING,
        measures=(RECOVERED,),
    ),
    "objectives": Question(
        title="When a memory model learns to write its memories",
        columns=(*_WHOLE_MODEL, Column("recovered", "recovered by a new decoder", 3)),
        more_columns=_no_columns,
        curve=_BLANK_COPY,
        measures=(CAUSAL_LOSS, BLANK_COPY, CHARACTERS, OPERATIONS),
    ),
    "remedies": Question(
        title="The next token's loss while memories are learnt",
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        curve=Plot("causal_loss", "causal loss (nats)", "lower"),
        measures=(CAUSAL_LOSS, BLANK_COPY),
    ),
    "reads": Question(
        title="The next token's loss by how memories are read",
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        curve=Plot("causal_loss", "causal loss (nats)", "lower"),
        measures=(CAUSAL_LOSS, BLANK_COPY, COPY_ABOVE_CHANCE, OPERATIONS, SHARE),
        shown=(SHARE, OPERATIONS),
    ),
    "context": Question(
        title="What memories bring of what context is worth",
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        curve=Plot("causal_loss", "causal loss (nats)", "lower"),
        measures=(CAUSAL_LOSS, BLANK_COPY, CHARACTERS, OPERATIONS, SHARE),
        shown=(SHARE, OPERATIONS, CHARACTERS),
    ),
    "size": Question(
        title="How much of 64 tokens an embedding holds",
        columns=_EMBEDDINGS_ALONE,
        more_columns=_precisions,
        curve=_AUTOENCODING,
        measures=(RECOVERED, EXACT, *BITS, BEYOND_IDS, *LOST_BY_ROUNDING),
    ),
    "pretrained": Question(
        title="The next token's loss while a trained decoder learns to read memories",
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        curve=Plot("causal_loss", "causal loss (nats)", "lower"),
        measures=(CAUSAL_LOSS, BLANK_COPY, SHARE),
        shown=(SHARE,),
    ),
    "positions": Question(
        title="How much of its memories a model writes, by what tells their order",
        columns=_WHOLE_MODEL,
        more_columns=_no_columns,
        curve=_BLANK_COPY,
        measures=(CAUSAL_LOSS, COPY_ABOVE_CHANCE),
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""Induction: bigram text in which a few triggers have a successor that only the sequence itself reveals.

The paper states that one block of a Memory Mosaic solves this task, for which a transformer needs two (Memory Mosaics,
footnote 5; task of Bietti et al., arXiv 2306.00802). All sequences share their bigrams, which a model can learn. In
each sequence some tokens are triggers: the same token follows a trigger everywhere, and it is drawn for that sequence
alone. A model predicts "b" at the end of "a b ... a" if it looks back at what followed "a".
"""

import functools
import math
from bisect import bisect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt
from scipy.optimize import brentq
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from training.recipe import Section


VOCAB_SIZE = 65
# A training keeps the model of the best evaluation by each of these measures.
CHOSEN_BY = ("accuracy",)
# Parameter of the Dirichlet distribution. The smaller it is, the fewer tokens follow each token. With 65 tokens the
# entropy is 2.4 nats a token, about that of English letters.
CONCENTRATION = 0.1


class InductionSection(Section):
    """Sizes of the task; `num_sequences` are for training, `num_test` each for validation and test."""

    language: Literal["induction"]
    num_sequences: PositiveInt
    num_test: PositiveInt = 500
    length: int = Field(default=128, ge=2)
    num_triggers: int = Field(default=5, ge=1, lt=VOCAB_SIZE)
    seed: int = Field(default=0, ge=0)


def random_bigrams(vocab_size: int, seed: int) -> np.ndarray:
    """Return rows `(V, V)` of probabilities of the next token, each from a symmetric Dirichlet distribution."""
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(vocab_size, CONCENTRATION), size=vocab_size)


def text_bigrams(path: str | Path) -> np.ndarray:
    """Return the shares `(V, V)` of the characters that follow each character of a text; its start follows its end.

    Raises:
        ValueError: the text has fewer than two distinct characters.
    """
    characters = list(Path(path).read_text(encoding="utf-8"))
    if len(set(characters)) < 2:
        raise ValueError(f"{path} has fewer than two distinct characters: give it a text.")
    alphabet, ids = np.unique(characters, return_inverse=True)
    counts = np.zeros((len(alphabet), len(alphabet)))
    np.add.at(counts, (ids, np.roll(ids, -1)), 1)
    return counts / counts.sum(axis=1, keepdims=True)


class InductionDataset(Dataset):
    """Fresh sequences, each made from `(seed, index)` alone, so that a training resumes exactly.

    Triggers are drawn without replacement, with probabilities that grow with the frequency of a token, so that they
    recur. Their successors are drawn uniformly from the tokens that are no triggers (else two triggers could follow
    each other for ever).

    Args:
        num_sequences: length of the data set. A longer one with the same seed begins with the same sequences.
        length: tokens of a sequence, T.
        seed: of the sequences; evaluation needs another one than training.
        vocab_size: number of tokens, V. With `text_file`, of its distinct characters.
        num_triggers: per sequence.
        bigram_seed: of the random bigrams (see `random_bigrams`).
        text_file: UTF-8 text whose characters' bigrams replace the random ones, in the order of their code points.

    Raises:
        ValueError: sizes that make no task, or a `vocab_size` that the text does not have.
    """

    def __init__(
        self,
        num_sequences: int,
        length: int = 128,
        seed: int = 0,
        vocab_size: int = VOCAB_SIZE,
        num_triggers: int = 5,
        bigram_seed: int = 0,
        text_file: str | Path | None = None,
    ):
        if min(num_sequences, num_triggers) < 1 or length < 2 or seed < 0:
            raise ValueError(
                f"num_sequences={num_sequences} and num_triggers={num_triggers} must be at least 1, "
                f"length={length} at least 2, and seed={seed} not negative."
            )
        if num_triggers >= vocab_size:
            raise ValueError(f"num_triggers={num_triggers} must be less than vocab_size={vocab_size}.")
        self.bigrams = random_bigrams(vocab_size, bigram_seed) if text_file is None else text_bigrams(text_file)
        if len(self.bigrams) != vocab_size:
            raise ValueError(
                f"{text_file} has {len(self.bigrams)} distinct characters: pass vocab_size={len(self.bigrams)}, not "
                f"{vocab_size}."
            )
        self.num_sequences, self.length, self.seed = num_sequences, length, seed
        self.vocab_size, self.num_triggers = vocab_size, num_triggers

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one sequence: `input_ids` and `labels` `(T,)`, equal and not shifted, and two masks `(T,)`.

        `is_induction` marks a trigger that occurred before in this sequence, so that its successor can be known;
        `is_first` marks one that did not. Neither marks the last position, for its successor is not shown.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        tokens, triggers = self._sequence(index)
        is_induction, is_first = np.zeros((2, self.length), dtype=bool)
        for trigger in triggers:
            positions = np.flatnonzero(tokens[:-1] == trigger)
            is_first[positions[:1]] = True
            is_induction[positions[1:]] = True
        ids = torch.from_numpy(tokens)
        masks = {"is_induction": torch.from_numpy(is_induction), "is_first": torch.from_numpy(is_first)}
        return {"input_ids": ids, "labels": ids.clone(), **masks}

    def _sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens `(T,)` of a sequence, and its triggers `(num_triggers,)`."""
        # Philox streams of different keys are independent: no state passes from one sequence to the next.
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        triggers = generator.choice(self.vocab_size, self.num_triggers, replace=False, p=self.frequencies)
        others = np.setdiff1d(np.arange(self.vocab_size), triggers)
        successor = dict(zip(triggers.tolist(), generator.choice(others, self.num_triggers).tolist(), strict=True))
        draws = generator.random(self.length).tolist()
        tokens = [bisect(self._cumulated_frequencies, draws[0])]
        for draw in draws[1:]:
            last = tokens[-1]
            tokens.append(successor[last] if last in successor else bisect(self._cumulated_bigrams[last], draw))
        return np.array(tokens), triggers

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Frequencies `(V,)` of the tokens in endless bigram text: the stationary distribution of the bigrams."""
        equations = self.bigrams.T - np.eye(self.vocab_size)
        equations[-1] = 1  # the frequencies sum to one; the equation replaced here follows from the others
        frequencies = np.linalg.solve(equations, np.eye(self.vocab_size)[-1]).clip(min=0)
        return frequencies / frequencies.sum()

    # Lists, because `bisect` on a short list takes a tenth of numpy's time. The last bound is left out: by rounding, a
    # draw could lie beyond it.
    @functools.cached_property
    def _cumulated_frequencies(self) -> list[float]:
        return self.frequencies.cumsum()[:-1].tolist()

    @functools.cached_property
    def _cumulated_bigrams(self) -> list[list[float]]:
        return self.bigrams.cumsum(axis=1)[:, :-1].tolist()


def draw_splits(section: InductionSection) -> dict[str, InductionDataset]:
    """Return sequences for training, and others for validation and test."""
    sizes = {"train": section.num_sequences, "validation": section.num_test, "test": section.num_test}
    # Seeds apart, so that no two splits share a sequence.
    return {
        name: InductionDataset(
            size,
            section.length,
            seed=3 * section.seed + number,
            num_triggers=section.num_triggers,
            bigram_seed=section.seed,
        )
        for number, (name, size) in enumerate(sizes.items())
    }


def provenance(section: InductionSection) -> dict[str, Any]:
    """Return nothing, for nothing is read: the settings determine the sequences."""
    return {}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch to train on. All next tokens count, so that no label reveals which tokens are triggers."""
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def tokenizer_of(section: InductionSection) -> None:
    """Return nothing: the tokens stand for no text."""


def collator(section: InductionSection, config: PreTrainedConfig) -> Callable[..., dict[str, torch.Tensor]]:
    """Return what makes batches, for any model."""
    return collate


def _waiting_time(rates: np.ndarray, num_rings: int) -> float:
    """Return the time by which `num_rings` of the clocks have rung, in expectation."""
    return brentq(lambda time: (1 - np.exp(-rates * time)).sum() - num_rings, 0, 1e9)


class Prediction(NamedTuple):
    """The output of `InformedReader`, as of a causal model: log-probabilities `(B, T, V)`."""

    logits: torch.Tensor


class InformedReader:
    """A predictor with the interface of a causal model that knows all that training can teach: about the least loss.

    It knows the bigrams and how often a token is a trigger, and infers from a sequence, by Bayes' rule, which tokens
    are triggers in it. It leaves out that one trigger makes others less likely. A token that occurred once may be no
    trigger, so that this reader is not always right at triggers seen before; a model that learns by its loss is not
    either.
    """

    device = torch.device("cpu")

    def __init__(self, dataset: InductionDataset):
        frequencies = dataset.frequencies
        # Tokens drawn without replacement are the first clocks to ring, of clocks with the frequencies as their rates.
        # A token is then a trigger if its clock has rung by the time at which `num_triggers` are expected to have.
        self.prior = [1 - math.exp(-rate) for rate in frequencies * _waiting_time(frequencies, dataset.num_triggers)]
        self.bigrams = dataset.bigrams
        self.uniform = (1 - np.eye(dataset.vocab_size)) / (dataset.vocab_size - 1)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Prediction:
        """Return log-probabilities `(B, T, V)` of the next token as `logits`, for token ids `(B, T)`."""
        rows = np.array([self._read(row) for row in input_ids.tolist()])
        return Prediction(logits=torch.from_numpy(np.log(rows.clip(min=1e-30))))

    def _read(self, tokens: list[int]) -> list[np.ndarray]:
        """Return the probabilities of the next token after each of the tokens."""
        belief: dict[int, float] = {}  # that a token is a trigger
        if_trigger: dict[int, np.ndarray] = {}  # probabilities of its successor in that case
        predictions = []
        for last, token in zip([None, *tokens], tokens, strict=False):
            if last is not None:
                # Bayes' rule with the two likelihoods of what followed. From then on a trigger would repeat it.
                as_trigger = belief[last] * if_trigger[last][token]
                belief[last] = as_trigger / (as_trigger + (1 - belief[last]) * self.bigrams[last, token])
                if_trigger[last] = np.eye(len(self.bigrams))[token]
            belief.setdefault(token, self.prior[token])
            if_trigger.setdefault(token, self.uniform[token])
            predictions.append(belief[token] * if_trigger[token] + (1 - belief[token]) * self.bigrams[token])
        return predictions


@torch.no_grad()
def score(model: PreTrainedModel | InformedReader, dataset: InductionDataset, batch_size: int = 32) -> dict[str, Any]:
    """Measure how a causal model predicts what follows a trigger.

    A predictor that always repeats what followed a token last is right at every trigger seen before: the best accuracy
    is 1. A predictor of all of the text cannot reach that: `InformedReader` shows how far a model can come. At the
    first occurrence of a trigger its successor is unknown: the best that any predictor can expect is an accuracy of
    1 / (V - num_triggers) and a loss of log(V - num_triggers), if it knows that the token is a trigger.

    Returns:
        `accuracy` of the most probable token and `loss` in nats at triggers seen before, `first_accuracy` and
        `first_loss` at first occurrences; beside each the best possible value, as `best_...`; and `num_positions` and
        `num_first`, the numbers of positions that the means are over.

    Raises:
        ValueError: no trigger occurs twice in any sequence.
    """
    scores: dict[str, list[torch.Tensor]] = {"is_induction": [], "is_first": []}  # each (2, positions)
    for batch in DataLoader(dataset, batch_size):
        ids = batch["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        is_right = (logits.argmax(-1) == ids[:, 1:]).cpu()
        for name, rows in scores.items():
            mask = batch[name][:, :-1]
            rows.append(torch.stack([is_right[mask].double(), losses[mask].double()]))
    again, first = (torch.cat(scores[name], dim=1) for name in ("is_induction", "is_first"))
    if again.shape[1] == 0:
        raise ValueError(
            f"No trigger occurs twice in {len(dataset)} sequences of {dataset.length} tokens: take more, or longer."
        )
    (accuracy, loss), (first_accuracy, first_loss) = again.mean(dim=1).tolist(), first.mean(dim=1).tolist()
    num_successors = dataset.vocab_size - dataset.num_triggers
    return {
        "accuracy": accuracy,
        "best_accuracy": 1.0,
        "loss": loss,
        "best_loss": 0.0,
        "first_accuracy": first_accuracy,
        "best_first_accuracy": 1 / num_successors,
        "first_loss": first_loss,
        "best_first_loss": math.log(num_successors),
        "num_positions": again.shape[1],
        "num_first": first.shape[1],
    }


def report(
    models: dict[str, PreTrainedModel], splits: dict[str, InductionDataset], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return what the result of a training says of its models: under `metrics` the scores on each split.

    Args:
        models: the model of the best evaluation by each measure of `CHOSEN_BY`.
        splits: of the language.
        batch_size: sequences per forward pass.
    """
    model = models["accuracy"]
    return {"metrics": {name: score(model, split, batch_size) for name, split in splits.items() if name != "train"}}

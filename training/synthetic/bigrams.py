# SPDX-License-Identifier: Apache-2.0
"""Induction: bigram text in which a few triggers have a successor that only the sequence itself tells.

The task on which one block of a Memory Mosaic is said to do what takes a transformer two (Memory Mosaics, footnote 5;
task of Bietti et al., arXiv 2306.00802). All sequences share their bigrams, which a model can learn. In each, some
tokens are triggers: wherever one stands, the same token follows, drawn anew for that sequence. "a b ... a" is
predicted by whoever looks back at what followed "a".
"""

import functools
import math
from bisect import bisect
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from scipy.optimize import brentq
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from training.recipe import Section


VOCAB_SIZE = 65
# The smaller, the fewer tokens follow a token. 65 tokens then leave 2.4 nats each, about what English letters do.
CONCENTRATION = 0.1


class InductionSection(Section):
    """Sizes of the task; `num_sequences` are for training, `num_test` each for validation and test."""

    language: Literal["induction"]
    num_sequences: PositiveInt
    num_test: PositiveInt = 500
    length: int = Field(default=128, ge=2)
    num_triggers: int = Field(default=5, ge=1, lt=VOCAB_SIZE)
    seed: int = Field(default=0, ge=0)


class InductionDataset(Dataset):
    """Fresh sequences, each made from `(seed, index)` alone: a training resumes exactly, whatever was read before.

    Triggers are drawn without replacement, a token the more often the more often it occurs, so that they recur. Their
    successors are drawn uniformly from the tokens that are none (else two triggers could call each other for ever).

    Args:
        num_sequences: length of the data set. Every sequence of a longer one with the same seed comes back in it.
        length: tokens of a sequence, T.
        seed: of the sequences; another one for evaluation than for training.
        vocab_size: number of tokens, V. With `text_file`, of its distinct characters.
        num_triggers: per sequence.
        bigram_seed: of random bigrams: each row is drawn from a symmetric Dirichlet distribution of concentration 0.1.
        text_file: UTF-8 text whose characters' bigrams are taken instead, in the order of their code points.

    Raises:
        ValueError: for sizes that make no task, or a `vocab_size` that the text does not have.
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
        """One sequence: `input_ids` and `labels` `(T,)`, equal and not shifted, and two masks `(T,)` of positions.

        `is_induction`: a trigger that occurred before in this sequence, so that its successor can be known.
        `is_first`: a trigger that did not. Neither holds at the last position, whose successor is not shown.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        tokens, triggers = self._sequence(index)
        places = {trigger: np.flatnonzero(tokens[:-1] == trigger) for trigger in triggers}
        is_induction, is_first = np.zeros((2, self.length), dtype=bool)
        for found in places.values():
            is_first[found[:1]] = True
            is_induction[found[1:]] = True
        ids = torch.from_numpy(tokens)
        masks = {"is_induction": torch.from_numpy(is_induction), "is_first": torch.from_numpy(is_first)}
        return {"input_ids": ids, "labels": ids.clone(), **masks}

    def _sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # Philox streams of different keys are independent: no state passes from one sequence to the next.
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], dtype=np.uint64)))
        triggers = generator.choice(self.vocab_size, self.num_triggers, replace=False, p=self._frequencies)
        others = np.setdiff1d(np.arange(self.vocab_size), triggers)
        successor = dict(zip(triggers.tolist(), generator.choice(others, self.num_triggers).tolist(), strict=True))
        draws = generator.random(self.length).tolist()
        tokens = [bisect(self._cumulated_frequencies, draws[0])]
        for draw in draws[1:]:
            last = tokens[-1]
            tokens.append(successor[last] if last in successor else bisect(self._cumulated_bigrams[last], draw))
        return np.array(tokens), triggers

    @functools.cached_property
    def _frequencies(self) -> np.ndarray:
        """`(V,)`: of each token in endless bigram text, the distribution that the bigrams leave as it is."""
        equations = self.bigrams.T - np.eye(self.vocab_size)
        equations[-1] = 1  # the frequencies sum to one; the equation it replaces follows from the others
        frequencies = np.linalg.solve(equations, np.eye(self.vocab_size)[-1]).clip(min=0)
        return frequencies / frequencies.sum()

    # Lists, as a search in a short list takes a tenth of numpy's time. The last bound is left out: rounding could put
    # a draw beyond it.
    @functools.cached_property
    def _cumulated_frequencies(self) -> list[float]:
        return self._frequencies.cumsum()[:-1].tolist()

    @functools.cached_property
    def _cumulated_bigrams(self) -> list[list[float]]:
        return self.bigrams.cumsum(axis=1)[:, :-1].tolist()


def random_bigrams(vocab_size: int, seed: int) -> np.ndarray:
    """Rows `(V, V)` of probabilities of the next token, each from a symmetric Dirichlet distribution."""
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.full(vocab_size, CONCENTRATION), size=vocab_size)


def text_bigrams(path: str | Path) -> np.ndarray:
    """Shares `(V, V)` of the characters that follow each character of a text, whose end is followed by its start."""
    characters = list(Path(path).read_text(encoding="utf-8"))
    if len(set(characters)) < 2:
        raise ValueError(f"{path} has fewer than two distinct characters: give it a text.")
    alphabet, ids = np.unique(characters, return_inverse=True)
    counts = np.zeros((len(alphabet), len(alphabet)))
    np.add.at(counts, (ids, np.roll(ids, -1)), 1)
    return counts / counts.sum(axis=1, keepdims=True)


class InformedReader:
    """Predicts, as a causal model does, from all that training can teach: about the least loss that there can be.

    It knows the bigrams and how often a token is a trigger, and infers from a sequence, by Bayes' rule, which tokens
    are triggers in it; that one trigger makes others less likely is left out. A token seen once may be none, so that
    this reader is not always right at triggers seen before: neither is a model that learns by its loss.
    """

    device = torch.device("cpu")

    def __init__(self, dataset: InductionDataset):
        frequencies = dataset._frequencies
        # Drawing without replacement is waiting for the first of so many clocks that ring at these rates.
        self.prior = [1 - math.exp(-rate) for rate in frequencies * _waiting_time(frequencies, dataset.num_triggers)]
        self.bigrams = dataset.bigrams
        self.uniform = (1 - np.eye(dataset.vocab_size)) / (dataset.vocab_size - 1)

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutputWithPast:
        """Log-probabilities `(B, T, V)` of the next token as `logits`, for token ids `(B, T)`."""
        rows = np.array([self._read(row) for row in input_ids.tolist()])
        return CausalLMOutputWithPast(logits=torch.from_numpy(np.log(rows.clip(min=1e-30))))

    def _read(self, tokens: list[int]) -> list[np.ndarray]:
        if_trigger, belief, predictions = {}, {}, []
        for last, token in zip([None, *tokens], tokens, strict=False):
            if last is not None:
                # The trigger's successor against the bigram's, then certainty about what the trigger repeats.
                as_trigger = belief[last] * if_trigger[last][token]
                belief[last] = as_trigger / (as_trigger + (1 - belief[last]) * self.bigrams[last, token])
                if_trigger[last] = np.eye(len(self.bigrams))[token]
            belief.setdefault(token, self.prior[token])
            if_trigger.setdefault(token, self.uniform[token])
            predictions.append(belief[token] * if_trigger[token] + (1 - belief[token]) * self.bigrams[token])
        return predictions


def _waiting_time(rates: np.ndarray, num_rings: int) -> float:
    """When so many of the clocks have rung, in expectation."""
    return brentq(lambda time: (1 - np.exp(-rates * time)).sum() - num_rings, 0, 1e9)


@torch.no_grad()
def trigger_accuracy(model: PreTrainedModel, dataset: InductionDataset, batch_size: int = 32) -> dict[str, Any]:
    """How a causal model predicts what follows a trigger.

    Whoever always repeats what followed a token last is right at every trigger seen before: the best accuracy is 1.
    Whoever predicts all of the text as well as possible is not: `InformedReader` shows how far a model can come.
    At a trigger's first occurrence nothing tells its successor: the best that any predictor can expect is
    1 / (V - num_triggers), and a loss of log(V - num_triggers), which takes knowing that it is a trigger.

    Returns:
        `accuracy` of the most probable token and `loss` in nats at triggers seen before, `first_accuracy` and
        `first_loss` at first occurrences; beside each what could be reached at best, as `best_...`; and
        `num_positions` and `num_first`, over how many positions the means are.

    Raises:
        ValueError: if no trigger occurs twice in any sequence.
    """
    found = {"is_induction": [], "is_first": []}
    for batch in DataLoader(dataset, batch_size):
        ids = batch["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu()
        is_right = (logits.argmax(-1) == ids[:, 1:]).cpu()
        for name, rows in found.items():
            mask = batch[name][:, :-1]
            rows.append(torch.stack([is_right[mask].double(), losses[mask].double()]))
    again, first = (torch.cat(found[name], dim=1) for name in ("is_induction", "is_first"))
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


def draw_splits(section: InductionSection) -> dict[str, InductionDataset]:
    """Training sequences, and others for validation and test."""
    task = {"length": section.length, "num_triggers": section.num_triggers, "bigram_seed": section.seed}
    sizes = {"train": section.num_sequences, "validation": section.num_test, "test": section.num_test}
    # Seeds apart, so that no two splits share a sequence.
    return {
        name: InductionDataset(size, seed=3 * section.seed + number, **task)
        for number, (name, size) in enumerate(sizes.items())
    }


def provenance(section: InductionSection) -> dict[str, Any]:
    """Nothing is read: the settings tell all."""
    return {}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch to train on: all next tokens count, so nothing tells a model which are triggers."""
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


score = trigger_accuracy

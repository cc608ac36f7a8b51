# SPDX-License-Identifier: Apache-2.0
"""Beginnings of stories continued by models and by the stories themselves, and how much a text repeats itself.

A model that is more certain repeats itself more, so that models are compared at equal entropy: each at the temperature
at which its predictions along the stories' own continuations have the entropy asked for, in nats. The stories' words
stand in for those that the models write, whose own repetition lowers the entropy.

All continuations have the same number of tokens, the stories' too: a model may not end its text before.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt, model_validator
from scipy.optimize import brentq
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from typing_extensions import Self

from training.experiments.comparison import DepthComparisonRecipe
from training.recipe import SourceSection


# Words in a row that count as repeated.
REPEATED_WORDS = 4
# Temperatures among which that of an entropy is sought.
_LOWEST, _HIGHEST = 0.01, 10.0


class ContinuationRecipe(DepthComparisonRecipe):
    """Models that continue the beginnings of `stories`, which none of them has read."""

    stories: SourceSection
    num_prompts: PositiveInt = 600
    prompt_tokens: int = Field(default=24, ge=2)
    new_tokens: PositiveInt = 80
    batch_size: PositiveInt = 75

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        length = self.trainings[0].recipe.data.context_length
        if self.prompt_tokens + self.new_tokens > length:
            raise ValueError(
                f"`prompt_tokens` {self.prompt_tokens} and `new_tokens` {self.new_tokens} are more than the {length} "
                "tokens of a window of the training: lower one of them"
            )
        return self


class Beginnings(NamedTuple):
    """Stories' first tokens, and those that follow.

    Args:
        prompts (`torch.Tensor` of shape `(N, P)`): an end-of-text token, as before each story of the training, and the
            first P - 1 tokens.
        following (`torch.Tensor` of shape `(N, K)`): the next K tokens.
        stories: the number of each story.
    """

    prompts: torch.Tensor
    following: torch.Tensor
    stories: list[int]


def story_beginnings(
    stories: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_prompts: int,
    num_prompt_tokens: int,
    num_new_tokens: int,
) -> Beginnings:
    """Return the beginnings of the first stories that are long enough.

    Args:
        stories: one column `text`.
        tokenizer: with an eos.
        num_prompts: how many at most.
        num_prompt_tokens: of a beginning, with the end-of-text token before it.
        num_new_tokens: that follow.

    Raises:
        ValueError: no story is long enough.
    """
    end: Any = tokenizer.eos_token_id
    length = num_prompt_tokens + num_new_tokens
    rows: list[list[int]] = []
    numbers: list[int] = []
    for number, text in enumerate(stories["text"]):
        if len(rows) == num_prompts:
            break
        # Text that spells a special token stays text.
        ids: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) + 1 >= length:
            rows.append([end, *ids][:length])
            numbers.append(number)
    if not rows:
        raise ValueError(
            f"none of the {len(stories)} stories has {length} tokens: lower `prompt_tokens` or `new_tokens`, or take "
            "longer stories"
        )
    prompts, following = torch.tensor(rows).split([num_prompt_tokens, num_new_tokens], dim=1)
    return Beginnings(prompts, following, numbers)


@torch.no_grad()
def following_logits(
    model: PreTrainedModel, prompts: torch.Tensor, following: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Return the logits `(N, K, V)` that predict each of the K tokens which follow, on the CPU.

    Args:
        model: a causal language model in evaluation mode.
        prompts: `(N, P)`.
        following: `(N, K)`.
        batch_size: texts per forward pass.
    """
    rows = []
    count = following.shape[1]
    for batch in torch.cat([prompts, following], dim=1).split(batch_size):
        ids = batch.to(model.device)
        # The logits of the last token predict what nothing is known of.
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
        rows.append(logits.float().cpu())
    return torch.cat(rows)


def mean_entropy(logits: torch.Tensor, temperature: float) -> float:
    """Return the mean entropy in nats of the predictions by logits `(N, K, V)` at a temperature."""
    total = 0.0
    for row in logits:  # one text at a time, as probabilities of all would need as much memory again
        scaled = row / temperature
        total += float((scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)).sum())
    return total / (logits.shape[0] * logits.shape[1])


def temperature_of_entropy(logits: torch.Tensor, entropy: float) -> float:
    """Return the temperature, to a thousandth of itself, at which predictions by logits have a mean entropy.

    Args:
        logits: `(N, K, V)`.
        entropy: in nats.

    Raises:
        ValueError: there is none.
    """

    def excess(log_temperature: float) -> float:
        return mean_entropy(logits, math.exp(log_temperature)) - entropy

    low, high = math.log(_LOWEST), math.log(_HIGHEST)
    if not excess(low) < 0 < excess(high):
        raise ValueError(
            f"at no temperature from {_LOWEST} to {_HIGHEST} have the predictions an entropy of {entropy} nats: ask "
            "for another one (`entropies` of `samples`, `entropy` of `repetition`)"
        )
    return math.exp(brentq(excess, low, high, xtol=1e-3))


def continue_prompts(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    num_new_tokens: int,
    temperature: float | None,
    seed: int,
    batch_size: int,
) -> torch.Tensor:
    """Return the ids `(N, num_new_tokens)` that a model writes after prompts `(N, P)`.

    Args:
        model: in evaluation mode.
        prompts: all of one length, without padding.
        num_new_tokens: of each continuation; the model may not end it before.
        temperature: of the sampling; None for the likeliest token at each place.
        seed: of the sampling.
        batch_size: texts at once; with another one other texts are drawn.
    """
    decoding: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        decoding = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    set_seed(seed)
    rows = []
    for batch in prompts.split(batch_size):
        ids = batch.to(model.device)
        written = cast(GenerationMixin, model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            pad_token_id=model.config.eos_token_id,
            **decoding,
        )
        rows.append(cast(torch.Tensor, written)[:, ids.shape[1] :].cpu())
    return torch.cat(rows)


# Repetition


def _runs_of_words(text: str, length: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]


def repeats(text: str) -> bool:
    """Return whether any four words in a row occur twice."""
    runs = _runs_of_words(text, REPEATED_WORDS)
    return len(runs) > len(set(runs))


def distinct(texts: Sequence[str], length: int) -> float:
    """Return the share of different ones among the runs of `length` words of a text, as a mean over the texts."""
    runs = [_runs_of_words(text, length) for text in texts]
    return float(np.mean([len(set(one)) / len(one) for one in runs if one] or [np.nan]))


def describe_texts(texts: Sequence[str]) -> dict[str, Any]:
    """Return which texts repeat four words, as zeros and ones, the shares of distinct words, and words of a text."""
    return {
        "repeats": bits([repeats(text) for text in texts]),
        **{f"distinct_{length}": round(distinct(texts, length), 4) for length in (1, 2, 3)},
        "words": round(float(np.mean([len(text.split()) for text in texts])), 2),
    }


def bits(values: Sequence[Any] | np.ndarray) -> str:
    """Return N truth values as a text of zeros and ones, which is short in a JSON file."""
    return "".join(str(int(value)) for value in values)


def flags(text: str) -> np.ndarray:
    """Return the numbers 0 and 1 that such a text holds, as `(N,)`."""
    return np.array([float(bit) for bit in text])

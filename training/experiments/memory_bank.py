# SPDX-License-Identifier: Apache-2.0
"""A bank of memories: finding the text that a few tokens come from among a thousand, and telling it from its memory.

The memories of texts are stored. A head, two linear maps, learns by InfoNCE to bring a question, the memory of some
tokens from anywhere in a text, near to the memories of that text; the encoder stays as it is. Counts of tokens and of
pairs of tokens, compared without any training, are the positive controls.
"""

import itertools
import random
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import nn
from transformers import set_seed

from modeling_memory_mosaic import MemoryModelForCausalLM
from modeling_memory_mosaic.layout_memory_model import TextMemories, pack_text
from training.claims import Effects, mean_effect
from training.experiments import comparison, memory_models
from training.experiments.comparison import Trained, plan, summary
from training.experiments.memory_models import MemoryModelComparison
from training.progress import progress
from training.recipe import Section, SourceSection
from training.tables import markdown_table, mean_and_deviation
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


__all__ = ["Recipe", "effects", "plan", "run", "summary"]

# Ways to find a text without a model.
COUNTS, PAIRS = "counts of tokens", "counts of pairs of tokens"
FOUND, WRITTEN = "found first", "tokens of the text that is found"


class HeadSection(Section):
    """The training of the head: steps of AdamW, texts of a batch, width of the head, and the author's temperature."""

    steps: PositiveInt
    batch_size: PositiveInt = 512
    learning_rate: float = Field(default=1e-3, gt=0)
    size: PositiveInt = 128
    temperature: float = Field(default=0.02, gt=0)


class Recipe(MemoryModelComparison):
    """Memory models whose encoders store `num_texts` texts of `num_tokens` tokens, asked for by a chunk of each."""

    task: Literal["memory_bank"]
    num_tokens: PositiveInt
    num_texts: PositiveInt = 1000
    text: SourceSection
    head: HeadSection

    @property
    def effect_names(self) -> list[str]:
        """Names of the effects: texts that are found and tokens of them, for each model and every two; controls."""
        names = [f"{FOUND}: {control}" for control in (COUNTS, PAIRS)]
        for measure in (FOUND, WRITTEN):
            names += [f"{measure}: {label}" for label in self.runs]
            names += [f"{measure}: {one} less {other}" for one, other in itertools.combinations(self.runs, 2)]
        return names


class Bank(NamedTuple):
    """Texts and what is stored of them.

    Args:
        ids (`torch.LongTensor` of shape `(N, T)`): whole chunks.
        memories (`torch.Tensor` of shape `(N, M, K, D)`).
    """

    ids: torch.Tensor
    memories: torch.Tensor


class Head(nn.Module):
    """Two linear maps into one space: of the memories of a text, and of the memory of a question."""

    def __init__(self, text_size: int, question_size: int, size: int):
        super().__init__()
        self.text_proj = nn.Linear(text_size, size)
        self.question_proj = nn.Linear(question_size, size)

    def forward(self, memories: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
        """Return cosines `(Q, N)` of questions `(Q, K, D)` and the memories `(N, M, K, D)` of texts."""
        texts = F.normalize(self.text_proj(memories.flatten(1)), dim=-1)
        return F.normalize(self.question_proj(questions.flatten(1)), dim=-1) @ texts.T


def draw_questions(ids: torch.Tensor, length: int, rng: random.Random) -> torch.Tensor:
    """Return `length` tokens in a row from anywhere in each text `(N, T)`, `(N, length)`."""
    starts = torch.tensor([rng.randint(0, ids.shape[1] - length) for _ in range(len(ids))])
    return ids.gather(1, starts[:, None] + torch.arange(length))


def found_by_counts(ids: torch.Tensor, questions: torch.Tensor, vocab_size: int, in_pairs: bool) -> float:
    """Return the share of questions `(N, L)` whose own text of `(N, T)` has the nearest counts by cosine."""

    def counts(tokens: torch.Tensor) -> torch.Tensor:
        kinds = tokens[:, :-1] * vocab_size + tokens[:, 1:] if in_pairs else tokens
        # Pairs by their remainder, as all pairs of a large vocabulary do not fit; a few then share a place.
        width = min(vocab_size**2 if in_pairs else vocab_size, 2**16 + 1)
        counted = torch.zeros(len(tokens), width).scatter_add_(1, kinds % width, torch.ones(kinds.shape))
        return F.normalize(counted, dim=-1)

    nearest = (counts(questions) @ counts(ids).T).argmax(-1)
    return (nearest == torch.arange(len(ids))).double().mean().item()


@torch.no_grad()
def fill_bank(model: MemoryModelForCausalLM, ids: torch.Tensor, batch_size: int = 256) -> Bank:
    """Return texts `(N, T)` with the memories of all of their chunks."""
    parts = [model.encoder(part).memories for part in ids.split(batch_size)]
    return Bank(ids, torch.cat(parts))


def train_head(recipe: Recipe, model: MemoryModelForCausalLM, bank: Bank, seed: int) -> Head:
    """Return a head that was trained on the texts of a bank, with new questions at each step."""
    set_seed(seed)
    settings, rng = recipe.head, random.Random(seed)
    numbers = model.config.memory_numbers
    head = Head(bank.memories[0].numel(), numbers, settings.size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        chosen = torch.tensor(rng.sample(range(len(bank.ids)), min(settings.batch_size, len(bank.ids))))
        with torch.no_grad():
            questions = draw_questions(bank.ids[chosen], model.config.chunk_length, rng)
            asked = model.encoder(questions).memories[:, 0]
        cosines = head(bank.memories[chosen], asked)
        # The other texts of the batch are the wrong answers.
        loss = F.cross_entropy(cosines / settings.temperature, torch.arange(len(chosen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval()


@torch.no_grad()
def written_of(model: MemoryModelForCausalLM, bank: Bank, found: torch.Tensor, batch_size: int = 64) -> float:
    """Return the share of the tokens of each text that the decoder tells from the memories of `found` `(N,)` texts."""
    right: list[torch.Tensor] = []
    for start in range(0, len(found), batch_size):
        texts = found[start : start + batch_size]
        memories = bank.memories[texts]
        context = TextMemories(memories, torch.ones(memories.shape[:2], dtype=torch.bool), 0)
        logits, _, _ = model.reconstruct("autoencoding", pack_text(bank.ids[texts]), context)
        asked = bank.ids[start : start + batch_size].unflatten(1, (-1, model.config.chunk_length))
        right.append((logits.argmax(-1) == asked).double().mean((1, 2)))
    return torch.cat(right).mean().item()


@torch.no_grad()
def ask(recipe: Recipe, model: MemoryModelForCausalLM, head: Head, bank: Bank, seed: int) -> dict[str, float]:
    """Return how many texts of a bank are found, by the head and by counts, and how much of them is written."""
    questions = draw_questions(bank.ids, model.config.chunk_length, random.Random(seed))
    found = head(bank.memories, model.encoder(questions).memories[:, 0]).argmax(-1)
    vocab_size = model.config.vocab_size
    return {
        FOUND: (found == torch.arange(len(found))).double().mean().item(),
        WRITTEN: written_of(model, bank, found),
        COUNTS: found_by_counts(bank.ids, questions, vocab_size, in_pairs=False),
        PAIRS: found_by_counts(bank.ids, questions, vocab_size, in_pairs=True),
    }


def _texts(recipe: Recipe, source: Any, tokenizer: Any) -> torch.Tensor:
    windows = pack_windows(load_stories(**source.model_dump()), tokenizer, recipe.num_tokens)
    return torch.tensor(windows.with_format("numpy")["input_ids"][:].tolist())


def _measure_training(recipe: Recipe, training: Trained) -> dict[str, Any]:
    loaded: Any
    loaded, tokenizer = training.load()
    model = loaded.cpu().requires_grad_(False)
    known = fill_bank(model, _texts(recipe, training.recipe.data.train, tokenizer))
    head = train_head(recipe, model, known, training.seed)
    texts = _texts(recipe, recipe.text, tokenizer)
    if len(texts) < recipe.num_texts:
        raise ValueError(
            f"the stories of `text` hold {len(texts)} texts of {recipe.num_tokens} tokens, but `num_texts` is "
            f"{recipe.num_texts}: raise text.num_stories, or lower it"
        )
    return {"seed": training.seed} | ask(
        recipe, model, head, fill_bank(model, texts[: recipe.num_texts]), training.seed
    )


def effects(recipe: Recipe, measured: dict[str, Any]) -> Effects:
    """Return shares of texts that are found and of tokens that are written, with intervals over seeds.

    Args:
        recipe: of the experiment.
        measured: of its result.
    """
    seeds = {series["label"]: series["seeds"] for series in measured["series"]}
    # All models of a seed are asked the same, so that the controls are those of any.
    first = next(iter(seeds.values()))
    found = {f"{FOUND}: {name}": mean_effect([seed[name] for seed in first], "") for name in (COUNTS, PAIRS)}
    for measure in (FOUND, WRITTEN):
        values = {label: [seed[measure] for seed in seeds[label]] for label in recipe.runs}
        found |= {f"{measure}: {label}": mean_effect(values[label], "") for label in recipe.runs}
        for one, other in itertools.combinations(recipe.runs, 2):
            differences = [ours - theirs for ours, theirs in zip(values[one], values[other], strict=True)]
            found[f"{measure}: {one} less {other}"] = mean_effect(differences, "")
    return found


def _measure(recipe: Recipe) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for label in recipe.runs:
        trainings = [training for training in recipe.trainings if training.label == label]
        seeds = [_measure_training(recipe, training) for training in progress(trainings, label, "training")]
        series.append({"label": label, "seeds": seeds})
    rows = [
        [
            one["label"],
            *(mean_and_deviation([seed[measure] for seed in one["seeds"]], 3) for measure in (FOUND, WRITTEN)),
        ]
        for one in series
    ]
    rows += [
        [name, mean_and_deviation([seed[name] for seed in series[0]["seeds"]], 3), ""] for name in (COUNTS, PAIRS)
    ]
    return {"measured": {"series": series}, "table": markdown_table(["model", FOUND, WRITTEN], "lrr", rows)}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all models and a head for each, and ask; returns the content of `result.json`."""
    data = {"text": source_provenance(**recipe.text.model_dump())}  # a mistake there shows before the trainings
    memory_models.train_sources(recipe)
    return comparison.run_comparison(recipe, restart, data, _measure)

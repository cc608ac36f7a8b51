# SPDX-License-Identifier: Apache-2.0
"""The kinds of model that this project has: how a small one is made, what it reads, and what it answers.

A promise that more than one kind makes is tested once, `@for_kinds()`, and read from here by the table in README.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from conftest import SIZES, make_ids, make_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    ContinuousMemoryMosaicModel,
    MemoryModelConfig,
    MemoryModelForCausalLM,
    MemoryMosaicConfig,
    MemoryMosaicForSequenceClassification,
)


VOCAB_SIZE = SIZES["vocab_size"]
LENGTH = 5  # tokens of a memory model's chunk
MOSAIC = MemoryMosaicConfig(**SIZES, num_persistent_slots=11, attention_dropout=0.0, hidden_dropout=0.0)
LLAMA = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)
GPT2 = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64)
BACKBONES = {"mosaic": (MOSAIC, MOSAIC), "llama": (LLAMA, LLAMA), "gpt2": (GPT2, GPT2), "mixed": (MOSAIC, LLAMA)}


def away_from_their_start(model: PreTrainedModel) -> PreTrainedModel:
    """Each parameter random, so that no two heads and no two layers are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_classifier(seed=0, dtype=torch.float32, **config) -> MemoryMosaicForSequenceClassification:
    torch.manual_seed(seed)
    config = MemoryMosaicConfig(**SIZES | {"num_labels": 3} | config)
    return away_from_their_start(MemoryMosaicForSequenceClassification(config)).to(dtype)


def make_memory_model(seed=0, encoder=MOSAIC, decoder=MOSAIC, dtype=torch.float64, **config) -> MemoryModelForCausalLM:
    torch.manual_seed(seed)
    config = MemoryModelConfig(encoder=encoder, decoder=decoder, **{"chunk_length": LENGTH} | config)
    return away_from_their_start(MemoryModelForCausalLM(config)).to(dtype)


def make_continuous(seed=0, dtype=torch.float64, **config) -> ContinuousMemoryMosaicModel:
    """A sharp one: matrices half as large again as they begin."""
    torch.manual_seed(seed)
    model = away_from_their_start(ContinuousMemoryMosaicModel(ContinuousMemoryMosaicConfig(**{"beta": 6.0} | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1.0)
    return model.to(dtype)


def memory_model_of(backbones: str) -> Callable[..., MemoryModelForCausalLM]:
    encoder, decoder = BACKBONES[backbones]
    return lambda **options: make_memory_model(**{"encoder": encoder, "decoder": decoder} | options)


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Args:
        model: which of the columns of README.md it belongs to.
        maker: makes a small one from `seed`, `dtype` and fields of its configuration.
        auto: the Auto class that loads it.
        other_size: a field of its configuration that changes the shape of a parameter.
        body: the part of it that `AutoModel` loads, if it is another class.
        answers: the field of its outputs that says what it makes of its input.
        options: fields of the configuration beside the defaults of `maker`; no dropout, unless asked for.
    """

    name: str
    model: str
    maker: Callable[..., PreTrainedModel]
    auto: type
    other_size: str
    body: str | None = "model"
    answers: str = "logits"
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> PreTrainedModel:
        return self.maker(seed=seed, dtype=dtype, **self.options | config)

    def inputs(self, model: PreTrainedModel, *shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Of shape `(rows, tokens)`."""
        if self.model == "continuous":
            generator = torch.Generator().manual_seed(seed)
            size = model.config.observation_size
            return {
                "observations": torch.randn(*shape, size, generator=generator, dtype=torch.float64).to(model.dtype)
            }
        ids = make_ids(*shape, seed=seed, vocab_size=model.config.vocab_size)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def with_labels(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As its users give them: the text or the observations themselves, or a class for each row."""
        text = next(iter(inputs.values()))
        labels = torch.arange(len(text)) % 3 if self.model == "classifier" else text.clone()
        return {**inputs, "labels": labels}

    def answer(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
        return model(**inputs, **options)[self.answers]


STILL = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
UNTIED = STILL | {"tie_word_embeddings": False, "use_bias": True}
SLOTS = "num_persistent_slots"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("mosaic", "mosaic", make_model, AutoModelForCausalLM, SLOTS, options=STILL),
        Kind("untied mosaic", "mosaic", make_model, AutoModelForCausalLM, SLOTS, options=UNTIED),
        *(
            Kind(name, "memory model", memory_model_of(backbones), AutoModelForCausalLM, "chunk_length", "encoder")
            for name, backbones in (
                ("memory model", "mosaic"),
                ("memory model of llama", "llama"),
                ("memory model of gpt2", "gpt2"),
                ("memory model of both", "mixed"),
            )
        ),
        Kind("continuous", "continuous", make_continuous, AutoModel, "head_dim", None, answers="predictions"),
        Kind("classifier", "classifier", make_classifier, AutoModelForSequenceClassification, SLOTS, options=STILL),
    )
}
MODELS = ("mosaic", "memory model", "continuous", "classifier")
BACKBONE_KINDS = ("memory model", "memory model of llama", "memory model of gpt2", "memory model of both")
TEXT_KINDS = ("mosaic", "memory model", "classifier")


def for_kinds(*names: str):
    """Run a test for each of these kinds, or for one of each model: `kind` is its argument."""
    chosen = [KINDS[name] for name in names or MODELS]
    return pytest.mark.parametrize("kind", chosen, ids=[kind.name for kind in chosen])

# SPDX-License-Identifier: Apache-2.0
"""Kinds of model of this project: how to make a small one, its inputs, and its answers.

A test of several kinds is marked `@for_kinds()`; the table of tests/README.md is compared with these marks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from helpers.models import NARROWING, SIZES, make_ids, make_model, randomize_parameters
from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    ContinuousMemoryMosaicModel,
    MemoryModelConfig,
    MemoryModelForCausalLM,
    MemoryMosaicConfig,
    MemoryMosaicForSequenceClassification,
    MemoryMosaicV2Config,
    MemoryMosaicV2ForCausalLM,
    MemoryMosaicV2ForSequenceClassification,
)
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES


VOCAB_SIZE = SIZES["vocab_size"]
LENGTH = 5  # tokens of a memory model's chunk
MOSAIC = MemoryMosaicConfig(**SIZES, num_persistent_slots=11, attention_dropout=0.0, hidden_dropout=0.0)
NARROWING_MOSAIC = MemoryMosaicConfig(**MOSAIC.to_dict() | NARROWING)
LLAMA = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)
GPT2 = GPT2Config(
    vocab_size=VOCAB_SIZE,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=64,
    attn_pdrop=0.0,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)
QWEN = Qwen3Config(
    vocab_size=VOCAB_SIZE,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    tie_word_embeddings=True,
    pad_token_id=0,
)
MAMBA = MambaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=16,
    num_hidden_layers=2,
    state_size=4,
    time_step_rank=2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
# One of each family that `from_backbones` is tested with.
FAMILIES = {"mosaic": MOSAIC, "llama": LLAMA, "gpt2": GPT2, "qwen": QWEN, "mamba": MAMBA}
BACKBONES = {"mosaic": (MOSAIC, MOSAIC), "llama": (LLAMA, LLAMA), "gpt2": (GPT2, GPT2), "mixed": (MOSAIC, LLAMA)}
# Tests of what the number of pairs changes read by these too.
ALL_BACKBONES = BACKBONES | {"narrowing": (NARROWING_MOSAIC, NARROWING_MOSAIC), "mamba": (MAMBA, MAMBA)}


def make_classifier(
    seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> MemoryMosaicForSequenceClassification:
    torch.manual_seed(seed)
    config = MemoryMosaicConfig(**SIZES | {"num_labels": 3} | config)
    return randomize_parameters(MemoryMosaicForSequenceClassification(config)).to(dtype)


# Shorter than most texts of tests, so that these cross the window and the delay.
SHORT_LEVELS: dict[str, Any] = {
    "short_term_window": 6,
    "long_term_delay": 4,
    "long_term_delay_range": None,
    "intermediate_size": 40,
}


def make_v2(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> MemoryMosaicV2ForCausalLM:
    """Return a small model in eval mode, whose delay is not drawn in training unless asked for."""
    torch.manual_seed(seed)
    config = MemoryMosaicV2Config(**SIZES | SHORT_LEVELS | config)
    return randomize_parameters(MemoryMosaicV2ForCausalLM(config)).to(dtype)


def make_classifier_v2(
    seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> MemoryMosaicV2ForSequenceClassification:
    torch.manual_seed(seed)
    config = MemoryMosaicV2Config(**SIZES | SHORT_LEVELS | {"num_labels": 3} | config)
    return randomize_parameters(MemoryMosaicV2ForSequenceClassification(config)).to(dtype)


def make_memory_model(
    seed: int = 0,
    encoder: PreTrainedConfig = MOSAIC,
    decoder: PreTrainedConfig = MOSAIC,
    dtype: torch.dtype = torch.float64,
    **config: Any,
) -> MemoryModelForCausalLM:
    torch.manual_seed(seed)
    config = MemoryModelConfig(encoder=encoder, decoder=decoder, **{"chunk_length": LENGTH} | config)
    return randomize_parameters(MemoryModelForCausalLM(config)).to(dtype)


def make_continuous(seed: int = 0, dtype: torch.dtype = torch.float64, **config: Any) -> ContinuousMemoryMosaicModel:
    """Return a continuous model with a sharp kernel: its matrices are half as large again as at their start."""
    torch.manual_seed(seed)
    model = randomize_parameters(ContinuousMemoryMosaicModel(ContinuousMemoryMosaicConfig(**{"beta": 6.0} | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 if parameter.ndim > 1 else 1.0)
    return model.to(dtype)


def observe(model: ContinuousMemoryMosaicModel, *shape: int, seed: int = 0) -> torch.Tensor:
    """Draw random observations `(*shape, C)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, model.config.observation_size, generator=generator, dtype=torch.float64)


# Fields of the configuration, for tests of each branch in the code of continuous models.
CONTINUOUS_VARIANTS = {
    "one head": {"num_attention_heads": 1},
    "three heads": {},
    "real": {"complex_weights": False, "observation_size": 5, "num_attention_heads": 2, "head_dim": 3},
    "leak": {"key_leak": True},
    "learnt beta": {"learnable_beta": True},
}


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of model.

    Args:
        model: its column in the table of tests/README.md.
        maker: makes a small model from `seed`, `dtype` and fields of its configuration.
        auto: the Auto class that loads it.
        other_size: a field of its configuration that changes the shape of a parameter.
        body: the part of it that `AutoModel` loads, if it is another class.
        answers: the field of its outputs that holds its answer.
        options: fields of the configuration beside the defaults of `maker`; no dropout, unless asked for.
        objectives: fields that give a weight to each part of its loss.
        dropouts: fields that each make training random.
    """

    name: str
    model: str
    maker: Callable[..., PreTrainedModel]
    auto: type
    other_size: str
    body: str | None = "model"
    answers: str = "logits"
    options: dict = field(default_factory=dict)
    objectives: dict = field(default_factory=dict)
    dropouts: tuple[dict, ...] = ({"attention_dropout": 0.5}, {"hidden_dropout": 0.5})

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
        return self.maker(seed=seed, dtype=dtype, **self.options | config)

    def inputs(self, model: PreTrainedModel, *shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return inputs of shape `(rows, tokens)`."""
        if self.model == "continuous":
            return {"observations": observe(model, *shape, seed=seed).to(model.dtype)}
        ids = make_ids(*shape, seed=seed, vocab_size=model.config.vocab_size)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def with_labels(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return inputs with labels: the text or the observations themselves, or a class for each row."""
        text = next(iter(inputs.values()))
        labels = torch.arange(len(text)) % 3 if self.model == "classifier" else text.clone()
        return {**inputs, "labels": labels}

    def batch(self, rows: list[torch.Tensor], places: list[torch.Tensor], width: int) -> dict[str, torch.Tensor]:
        """Return texts as the rows of one batch, each at its places `(tokens,)`, with random ids at padding."""
        ids, mask = make_ids(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.long)
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            ids[number, place], mask[number, place] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def answer(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        return model(**inputs, **options)[self.answers]


def with_dropout(backbone: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration with a dropout of 0.5 everywhere."""
    fields = {"gpt2": ["attn_pdrop", "embd_pdrop", "resid_pdrop"], "llama": ["attention_dropout"]}
    fields = fields.get(backbone.model_type, ["attention_dropout", "hidden_dropout"])
    return type(backbone)(**backbone.to_dict() | dict.fromkeys(fields, 0.5))


def memory_model_kind(name: str, backbones: str) -> Kind:
    encoder, decoder = ALL_BACKBONES[backbones]
    return Kind(
        name,
        "memory model",
        lambda **options: make_memory_model(**{"encoder": encoder, "decoder": decoder} | options),
        AutoModelForCausalLM,
        other_size="chunk_length",
        body="encoder",
        objectives={f"{objective}_weight": 1.0 for objective in OBJECTIVES},
        dropouts=({"encoder": with_dropout(encoder)}, {"decoder": with_dropout(decoder)}),
    )


STILL = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
# The other readings of the paper, with unequal numbers of heads.
V2_OTHERWISE = {
    "persistent_memory_type": "slots",
    "num_persistent_slots": 11,
    "norm_type": "layer_norm",
    "use_bias": True,
    "gate_bias": True,
    "bandwidth_sharing": "memory",
    "bandwidth_count": "total",
    "num_short_term_heads": 2,
    "short_term_window": 9,
    "long_term_delay": 2,
    "tie_word_embeddings": True,
}
UNTIED = STILL | {"tie_word_embeddings": False, "use_bias": True}
SLOTS = "num_persistent_slots"
KINDS = {
    kind.name: kind
    for kind in (
        Kind("mosaic", "mosaic", make_model, AutoModelForCausalLM, SLOTS, options=STILL),
        Kind("narrowing mosaic", "mosaic", make_model, AutoModelForCausalLM, SLOTS, options=STILL | NARROWING),
        Kind("untied mosaic", "mosaic", make_model, AutoModelForCausalLM, SLOTS, options=UNTIED),
        Kind("mosaic v2", "mosaic v2", make_v2, AutoModelForCausalLM, "intermediate_size"),
        Kind("mosaic v2 otherwise", "mosaic v2", make_v2, AutoModelForCausalLM, SLOTS, options=V2_OTHERWISE),
        memory_model_kind("memory model", "mosaic"),
        memory_model_kind("memory model of llama", "llama"),
        memory_model_kind("memory model of gpt2", "gpt2"),
        memory_model_kind("memory model of both", "mixed"),
        Kind(
            "continuous",
            "continuous",
            make_continuous,
            AutoModel,
            other_size="head_dim",
            body=None,
            answers="predictions",
            dropouts=({"attention_dropout": 0.5},),
        ),
        Kind(
            "continuous of real weights",
            "continuous",
            make_continuous,
            AutoModel,
            other_size="head_dim",
            body=None,
            answers="predictions",
            options={"complex_weights": False, "observation_size": 5, "num_attention_heads": 2, "head_dim": 3},
            dropouts=({"attention_dropout": 0.5},),
        ),
        Kind("classifier", "classifier", make_classifier, AutoModelForSequenceClassification, SLOTS, options=STILL),
        Kind(
            "classifier v2",
            "classifier",
            make_classifier_v2,
            AutoModelForSequenceClassification,
            other_size="intermediate_size",
        ),
    )
}
MODELS = ("mosaic", "mosaic v2", "memory model", "continuous", "classifier")
BACKBONE_KINDS = ("memory model", "memory model of llama", "memory model of gpt2", "memory model of both")


# Names of kinds that tests of mosaics run for beside the kernels of `models.BANDWIDTHS`.
V2_KINDS = ("mosaic v2", "mosaic v2 otherwise")


def make_mosaic(variant: str | dict[str, Any], **options: Any) -> Any:
    """Return a small mosaic of fields, or of a kind by its name: one of v2 in float64 unless asked otherwise.

    In float32, rounding alone moves logits of kernels as sharp as those of v2 by 1e-5.
    """
    if isinstance(variant, str):
        return KINDS[variant].make(**{"dtype": torch.float64} | options)
    return make_model(**options | variant)


def for_kinds(*names: str) -> pytest.MarkDecorator:
    """Return a mark that runs a test with each of these kinds as `kind`, or with one of each model."""
    chosen = [KINDS[name] for name in names or MODELS]
    return pytest.mark.parametrize("kind", chosen, ids=[kind.name for kind in chosen])

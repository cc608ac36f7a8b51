# SPDX-License-Identifier: Apache-2.0
"""The configuration: derived sizes, strictness, round trips."""

import importlib.metadata
import json
import logging
from pathlib import Path

import pytest
from helpers.kinds import GPT2, LLAMA
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    MemoryModelConfig,
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    MemoryMosaicV2Config,
)
from modeling_memory_mosaic.configuration_memory_model import backbone_config
from modeling_memory_mosaic.configuration_memory_mosaic import warn_of_untested_versions


SAVED = sorted((Path(__file__).parents[1] / "golden" / "configs").glob("*.json"))


def test_derived_sizes():
    config = MemoryMosaicConfig()
    assert (config.head_dim, config.num_persistent_slots) == (64, 2688)
    assert config.logits_scaling == pytest.approx(768**0.5)
    assert config.num_key_value_heads == 12


# Configurations in which no field has its default.
FILLED = {
    MemoryMosaicConfig: {
        "vocab_size": 11,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 5,
        "num_persistent_slots": 9,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-3,
        "use_bias": True,
        "bandwidth_exponent": 0.25,
        "bandwidth_start": 3,
        "attention_dropout": 0.2,
        "hidden_dropout": 0.3,
        "logits_scaling": 2.5,
        "tie_word_embeddings": False,
        "use_cache": False,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": [3, 4],
    },
    MemoryMosaicV2Config: {
        "vocab_size": 11,
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 5,
        "num_short_term_heads": 3,
        "num_long_term_heads": 1,
        "short_term_window": 9,
        "long_term_delay": 3,
        "long_term_delay_range": (2, 5),
        "long_term_delay_draw": "sequence",
        "persistent_memory_type": "slots",
        "intermediate_size": 13,
        "num_persistent_slots": 9,
        "gated_keys": False,
        "gate_bias": True,
        "adaptive_bandwidth": False,
        "bandwidth_sharing": "memory",
        "bandwidth_count": "total",
        "norm_type": "layer_norm",
        "norm_eps": 1e-3,
        "hidden_act": "gelu",
        "use_bias": True,
        "max_position_embeddings": 77,
        "attention_dropout": 0.2,
        "hidden_dropout": 0.3,
        "logits_scaling": 2.5,
        "tie_word_embeddings": True,
        "use_cache": False,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": [3, 4],
    },
    MemoryModelConfig: {
        "encoder": LLAMA,
        "decoder": GPT2,
        "chunk_length": 7,
        "num_memory_embeddings": 3,
        "memory_size": 8,
        "memory_quantization": "int8",
        "memory_read": "unrolled_prefix",
        "slots_per_memory": 4,
        "unroll_window": 5,
        "unroll_width": 6,
        "encoder_chunk_positions": False,
        "decoder_chunk_positions": True,
        "max_memories": 9,
        "encoder_layer": 1,
        "freeze_encoder": True,
        "freeze_decoder": True,
        "causal_weight": 0.5,
        "autoencoding_weight": 0.25,
        "copy_weight": 2.0,
        "blank_copy_weight": 3.0,
        "initializer_range": 0.3,
        "use_cache": False,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": [3, 4],
    },
    ContinuousMemoryMosaicConfig: {
        "observation_size": 4,
        "num_attention_heads": 2,
        "head_dim": 3,
        "complex_weights": False,
        "beta": 7.0,
        "learnable_beta": True,
        "key_leak": True,
        "attention_dropout": 0.1,
        "loss_clip": None,
        "use_cache": True,
    },
}
by_class = pytest.mark.parametrize("config_class", FILLED)


@by_class
def test_round_trip_of_every_field(tmp_path, config_class):
    config = config_class(**FILLED[config_class])
    default = config_class().to_dict()
    fields = {name for name in config_class.__annotations__ if name in default}
    if config_class is MemoryModelConfig:  # with three vectors, a memory is pooled by summaries
        fields -= {"memory_pooling", "tie_encoder_embeddings"}  # and its backbones have two widths
    assert all(config.to_dict()[name] != default[name] for name in fields), "the test must set every field"
    config.save_pretrained(tmp_path)
    for loader in (config_class, AutoConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is config_class
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    otherwise = MemoryModelConfig(memory_pooling="mean", tie_encoder_embeddings=True)
    otherwise.save_pretrained(tmp_path)
    loaded = MemoryModelConfig.from_pretrained(tmp_path)
    assert loaded.memory_pooling == "mean" and loaded.tie_encoder_embeddings


@pytest.mark.parametrize(
    ("config", "layer_types"),
    [
        (MemoryMosaicConfig(num_hidden_layers=2), ["memory_mosaic", "memory_mosaic"]),
        (MemoryMosaicV2Config(num_hidden_layers=2), ["memory_mosaic_v2", "memory_mosaic_v2"]),
        (ContinuousMemoryMosaicConfig(), ["continuous_memory_mosaic"]),
    ],
    ids=["mosaic", "mosaic v2", "continuous"],
)
def test_layer_types_stay_out_of_the_file(tmp_path, config, layer_types):
    assert config.layer_types == layer_types
    config.save_pretrained(tmp_path)
    assert "layer_types" not in (tmp_path / "config.json").read_text()


@by_class
def test_a_key_of_the_future_is_kept(tmp_path, config_class):
    config = config_class(some_future_field=3)
    config.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).some_future_field == 3


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="hidden_size=10.*num_attention_heads=3.*head_dim"):
        MemoryMosaicConfig(hidden_size=10, num_attention_heads=3)
    assert MemoryMosaicConfig(hidden_size=10, num_attention_heads=3, head_dim=4).head_dim == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_persistent_slots": -1}, "num_persistent_slots=-1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"hidden_dropout": 1.5}, "hidden_dropout=1.5"),
        ({"bandwidth_exponent": -0.1}, "bandwidth_exponent=-0.1"),
        ({"bandwidth_exponent": 1.5}, "bandwidth_exponent=1.5"),
        ({"bandwidth_exponent": float("nan")}, "bandwidth_exponent=nan"),
        ({"bandwidth_exponent": "0.25"}, "bandwidth_exponent"),
        ({"bandwidth_start": 0}, "bandwidth_start=0"),
        ({"bandwidth_start": 2.5}, "bandwidth_start"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
    ids=str,
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MemoryMosaicConfig(**fields)


def fields_of_then(read, values):
    """Return what was read, without fields that parts of an older configuration `values` do not have."""
    if not isinstance(values, dict):
        return read
    return {name: fields_of_then(read[name], value) for name, value in values.items()}


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_every_configuration_ever_published_still_loads(path, tmp_path):
    values = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    read = json.loads(config.to_json_string(use_diff=False))
    for name in type(config).__annotations__.keys() & values.keys():
        assert fields_of_then(read[name], values[name]) == values[name], name


def test_there_are_saved_configurations():
    saved = {json.loads(path.read_text(encoding="utf-8"))["model_type"] for path in SAVED}
    assert saved == {config_class.model_type for config_class in FILLED}


@pytest.mark.parametrize(
    ("version", "warns"), [("5.17.1", True), ("5.18.0", False), ("5.99.0", False), ("6.0.0", True)]
)
def test_other_versions_of_transformers_give_one_clear_warning(version, warns, monkeypatch, caplog):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        warn_of_untested_versions()
        logging.getLogger("transformers").removeHandler(caplog.handler)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warns and all(version in text and "transformers>=5.18,<6" in text for text in messages)


def test_tools_find_the_names_they_look_for():
    """`num_key_value_heads` is another name of the heads, which is read and written but never saved."""
    config = MemoryMosaicConfig(num_attention_heads=6)
    assert config.num_key_value_heads == 6
    config.num_key_value_heads = 4
    assert config.num_attention_heads == 4 and "num_key_value_heads" not in config.to_dict()
    assert not MemoryMosaicForCausalLM(MemoryMosaicConfig(num_hidden_layers=1)).supports_context_parallel
    assert not MemoryMosaicForCausalLM._supports_attention_backend  # what vLLM asks
    assert MemoryMosaicForCausalLM.base_model_prefix == "model"
    assert MemoryMosaicForCausalLM._no_split_modules == ["MemoryMosaicDecoderLayer"]


SMALL = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
PARTS = {"encoder": SMALL, "decoder": SMALL}
# For each class: fields to make it from, changed fields, and the derived fields that follow them.
FOLLOWING = {
    "mosaic": (MemoryMosaicConfig, SMALL, {"hidden_size": 96}, ["head_dim", "num_persistent_slots", "logits_scaling"]),
    "heads": (MemoryMosaicConfig, SMALL, {"num_attention_heads": 8}, ["head_dim"]),
    "both": (MemoryMosaicConfig, SMALL, {"hidden_size": 90, "num_attention_heads": 5}, ["head_dim", "logits_scaling"]),
    "mosaic v2": (
        MemoryMosaicV2Config,
        SMALL,
        {"hidden_size": 96},
        ["head_dim", "intermediate_size", "num_persistent_slots"],
    ),
    "heads of v2": (
        MemoryMosaicV2Config,
        SMALL,
        {"num_attention_heads": 8},
        ["head_dim", "num_short_term_heads", "num_long_term_heads"],
    ),
    "continuous": (ContinuousMemoryMosaicConfig, {}, {"observation_size": 12}, ["head_dim"]),
    "by another name": (ContinuousMemoryMosaicConfig, {}, {"hidden_size": 12}, ["head_dim"]),
    "vectors": (
        MemoryModelConfig,
        {"encoder": SMALL, "decoder": SMALL},
        {"num_memory_embeddings": 3},
        ["unroll_width"],
    ),
    "encoder": (
        MemoryModelConfig,
        {"encoder": SMALL, "decoder": SMALL},
        {"encoder": {**SMALL, "hidden_size": 128}},
        ["memory_size", "unroll_width"],
    ),
    "decoder": (
        MemoryModelConfig,
        {"encoder": SMALL, "decoder": SMALL},
        {"decoder": {**SMALL, "hidden_size": 128}},
        ["initializer_range"],
    ),
}


@pytest.mark.parametrize("case", FOLLOWING)
def test_derived_sizes_follow_the_others(case, tmp_path):
    """Other fields may change while a folder is loaded, in any order, or by assignment."""
    config_class, fields, changed, followers = FOLLOWING[case]
    config_class(**fields).save_pretrained(tmp_path)
    fresh = config_class(**{**fields, **changed})
    loaded = [config_class.from_pretrained(tmp_path, **changed), AutoConfig.from_pretrained(tmp_path, **changed)]
    loaded.append(config_class.from_pretrained(tmp_path, **dict(reversed(changed.items()))))
    assigned = config_class(**fields)
    for name, value in changed.items():
        setattr(assigned, name, backbone_config(value) if isinstance(value, dict) else value)
    for config in (*loaded, assigned):
        sizes, expected = (
            {name: each.to_dict()[name] for name in config_class.__annotations__} for each in (config, fresh)
        )
        assert sizes == expected
    assert all(getattr(fresh, name) != getattr(config_class(**fields), name) for name in followers)


def test_sizes_of_a_part_follow_within_it(tmp_path):
    MemoryModelConfig(**PARTS).save_pretrained(tmp_path)
    config = MemoryModelConfig.from_pretrained(tmp_path, encoder={"hidden_size": 128})
    assert (config.encoder.head_dim, config.encoder.num_persistent_slots, config.encoder.vocab_size) == (32, 448, 90)
    assert (config.memory_size, config.unroll_width, config.decoder.hidden_size) == (128, 64, 64)
    other = MemoryModelConfig.from_pretrained(tmp_path, decoder={"model_type": "gpt2", "vocab_size": 90, "n_embd": 48})
    assert (other.decoder.model_type, other.initializer_range) == ("gpt2", 48**-0.5)


def test_chosen_sizes_stay(tmp_path):
    MemoryMosaicConfig(**SMALL, head_dim=7, logits_scaling=3.0).save_pretrained(tmp_path)
    config = MemoryMosaicConfig.from_pretrained(tmp_path, hidden_size=96)
    assert (config.head_dim, config.logits_scaling, config.num_persistent_slots) == (7, 3.0, 336)
    MemoryMosaicConfig(**SMALL).save_pretrained(tmp_path)
    for chosen in ({"head_dim": 16, "hidden_size": 96}, {"hidden_size": 96, "head_dim": 16}):
        assert MemoryMosaicConfig.from_pretrained(tmp_path, **chosen).head_dim == 16
    config.head_dim = None
    assert config.head_dim == 24, "`None` asks for what follows from the others"


def test_a_width_that_no_longer_fits_its_heads_is_refused(tmp_path):
    config = MemoryMosaicConfig(**SMALL)
    config.hidden_size = 90
    for use in (MemoryMosaicForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(
            (ValueError, StrictDataclassError), match="hidden_size=90 is not a multiple of num_attention_heads=4"
        ):
            use(config)
    config.num_attention_heads = 5
    assert MemoryMosaicForCausalLM(config).config.head_dim == 18

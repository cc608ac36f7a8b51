# SPDX-License-Identifier: Apache-2.0
"""The configuration: derived sizes, strictness, round trips."""

import importlib.metadata
import json
import logging
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM
from modeling_memory_mosaic.configuration_memory_mosaic import warn_of_untested_versions


SAVED = sorted((Path(__file__).parent / "golden" / "configs").glob("*.json"))


def test_derived_sizes():
    config = MemoryMosaicConfig()
    assert (config.head_dim, config.num_persistent_slots) == (64, 2688)
    assert config.logits_scaling == pytest.approx(768**0.5)
    assert config.num_key_value_heads == 12


def test_round_trip_of_every_field(tmp_path):
    config = MemoryMosaicConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=5,
        num_persistent_slots=9,
        max_position_embeddings=77,
        layer_norm_eps=1e-3,
        use_bias=True,
        attention_dropout=0.2,
        hidden_dropout=0.3,
        logits_scaling=2.5,
        tie_word_embeddings=False,
        use_cache=False,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=[3, 4],
    )
    config.save_pretrained(tmp_path)
    loaded = MemoryMosaicConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    default = MemoryMosaicConfig().to_dict()
    own = {name for name in MemoryMosaicConfig.__annotations__ if name in default}
    assert all(config.to_dict()[name] != default[name] for name in own), "the test must set every field"


def test_layer_types_stay_out_of_the_file(tmp_path):
    config = MemoryMosaicConfig(num_hidden_layers=2)
    assert config.layer_types == ["memory_mosaic", "memory_mosaic"]
    config.save_pretrained(tmp_path)
    assert "layer_types" not in (tmp_path / "config.json").read_text()


def test_a_key_of_the_future_is_kept(tmp_path):
    config = MemoryMosaicConfig(some_future_field=3)
    config.save_pretrained(tmp_path)
    assert MemoryMosaicConfig.from_pretrained(tmp_path).some_future_field == 3


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
        ({"hidden_size": "64"}, "hidden_size"),
    ],
    ids=str,
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MemoryMosaicConfig(**fields)


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_every_configuration_ever_published_still_loads(path, tmp_path):
    values = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    config = MemoryMosaicConfig.from_pretrained(tmp_path)
    for name in MemoryMosaicConfig.__annotations__.keys() & values.keys():
        assert getattr(config, name) == values[name], name


def test_there_are_saved_configurations():
    assert SAVED


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
    """`num_key_value_heads` is another name of the heads: read, written, never saved."""
    config = MemoryMosaicConfig(num_attention_heads=6)
    assert config.num_key_value_heads == 6
    config.num_key_value_heads = 4
    assert config.num_attention_heads == 4 and "num_key_value_heads" not in config.to_dict()
    assert not MemoryMosaicForCausalLM(MemoryMosaicConfig(num_hidden_layers=1)).supports_context_parallel
    assert not MemoryMosaicForCausalLM._supports_attention_backend  # what vLLM asks
    assert MemoryMosaicForCausalLM.base_model_prefix == "model"
    assert MemoryMosaicForCausalLM._no_split_modules == ["MemoryMosaicDecoderLayer"]

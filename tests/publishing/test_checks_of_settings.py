# SPDX-License-Identifier: Apache-2.0
"""Checks of settings: adapters, and a memory model whose encoder has settings of its own."""

import json
import shutil

import pytest
import torch
from helpers.publications import COMMIT, edit, put
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from training.paths import CONFIGURATION
from training.publishing import checks


NAN = float("nan")


ADAPTER = {
    "base_model_name_or_path": "someone/smoke",
    "revision": COMMIT,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "r": 8,
    "lora_alpha": 16.0,
    "lora_dropout": 0.0,
    "target_modules": ["k_proj"],
    "target_parameters": None,
    "loftq_config": {},
    "peft_version": "0.21.2",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "adapters here are LORA"),
        ({"peft_type": ["LORA"]}, "adapters here are LORA"),
        ({"auto_mapping": {"base_model_class": "x", "parent_library": "evil"}}, "`auto_mapping` in"),
        ({"megatron_config": {"a": 1}}, "`megatron_config` in"),
        ({"corda_config": {"cache_file": "/tmp/x.pt"}}, "`cache_file` in|`corda_config` in"),
        ({"eva_config": {"rho": 2.0}}, "`eva_config` in .* no adapter of this project has that"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` in"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` in"),
        ({"layer_replication": [[0, 10**9]]}, "`layer_replication` in"),
        ({"rank_pattern": {"(a+)+$": 4}}, "`rank_pattern` in"),
        ({"target_modules": "(a+)+$"}, "`target_modules` in .*, not a list of names"),
        ({"target_modules": ["(a+)+$"]}, "`target_modules` in .*, not a list of names"),
        ({"tokenizer_name_or_path": "evil/repo"}, "`tokenizer_name_or_path` in"),
        ({"r": 10**12}, "`r` in"),
        ({"r": True}, "`r` in"),
        ({"lora_alpha": NAN}, "`lora_alpha` in"),
    ],
)
def test_an_adapter_is_lora_as_recipes_have_it(tmp_path, change, message):
    put(tmp_path, "adapter_config.json", ADAPTER)
    checks.check_settings(tmp_path)
    put(tmp_path, "adapter_config.json", ADAPTER | change)
    with pytest.raises(ValueError, match=message):
        checks.check_settings(tmp_path)


@pytest.mark.parametrize(
    ("base", "commit"), [("someone/smoke", "main"), ("someone/smoke", None), (None, COMMIT), ("../x", COMMIT)]
)
def test_an_adapter_whose_base_is_not_pinned_is_refused(tmp_path, base, commit):
    put(tmp_path, "adapter_config.json", {"base_model_name_or_path": base, "revision": commit})
    with pytest.raises(ValueError, match="not a base on the Hub at a commit"):
        checks.check_settings(tmp_path)


def test_the_weights_of_an_adapter_are_finite_and_lora(tmp_path):
    put(tmp_path, "adapter_config.json", ADAPTER)
    name = "base_model.model.model.layers.0.contextual_memory.k_proj.lora_A.weight"
    for tensors, message in (
        ({name: torch.full((2, 2), NAN, dtype=torch.bfloat16)}, "not finite"),
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "is no part of LoRA"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            checks.check_weights(tmp_path)
    save_file({name: torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    assert "every number finite" in checks.check_weights(tmp_path)
    shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "adapter_more.safetensors")
    with pytest.raises(ValueError, match="which ones are meant cannot be known"):
        checks.check_weights(tmp_path)


def memory_model_folder(folder):
    architecture = json.loads((CONFIGURATION / "model" / "memory-characters.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    model.save_pretrained(folder)
    return folder


def nested(**changes):
    """Return a function that changes settings of the encoder in a memory model's folder."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["encoder"] |= changes
        put(folder, "config.json", config)

    return change


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (nested(model_type="evil"), "has a part of the type 'evil'"),
        (nested(model_type=["gpt2"]), "has a part of the type"),
        (nested(auto_map={"AutoModel": "evil/repo--x.Y"}), "`auto_map` in config.json"),
        (nested(more=1), "settings that a memory_mosaic does not have: 'more'"),
        (nested(_name_or_path="evil/repo"), "`_name_or_path` in config.json is 'evil/repo'"),
        (nested(dtype="evil/repo"), "`dtype` in config.json names 'evil/repo'"),
        (nested(quantization_config={"quant_method": "x"}), "does not have: 'quantization_config'"),
        (nested(num_hidden_layers=10**9), "`num_hidden_layers` in config.json is 1000000000"),
        (lambda f: edit(f, "config.json", encoder="evil/repo"), "`encoder` in config.json names 'evil/repo'"),
        (
            lambda f: edit(f, "config.json", encoder=[1]),
            "`encoder` in config.json is .1., not the settings of a model",
        ),
        (lambda f: edit(f, "config.json", memory_size=10**12), "`memory_size` in config.json is"),
    ],
)
def test_a_model_within_a_model_is_looked_at_too(tmp_path, harm, message):
    folder = memory_model_folder(tmp_path / "model")
    assert "every number finite" in checks.check_weights(folder)
    harm(folder)
    with pytest.raises(ValueError, match=message):
        checks.check_settings(folder)
        checks.check_weights(folder)

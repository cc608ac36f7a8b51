# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the authors' code: both namings, their training file, and refusals that name the option."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from training.convert import convert_authors_state_dict, convert_checkpoint


@pytest.fixture
def golden(request):
    with safe_open(request.config.rootpath / "tests" / "golden" / "small.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return json.loads(file.metadata()["model_args"]), tensors


@pytest.fixture
def state_dict(golden):
    return {name.removeprefix("state."): t for name, t in golden[1].items() if name.startswith("state.")}


def as_fast_version(state_dict):
    """The same parameters as `memory_mosaics_eft.py` names them, with the leak under both of its names."""
    renamed = {}
    for name, tensor in state_dict.items():
        name = name.replace("k_featurizer.conv", "leaky_average.linear")
        if name.endswith("leaky_average.linear.weight"):
            tensor = tensor.squeeze(-1)
        if name.endswith("leaky_key_beta"):
            name = name.replace("leaky_key_beta", "leaky_average.leaky_beta_w_under")
            renamed[name.replace("_w_", "_u_")] = tensor
        renamed[name] = tensor
    return renamed


def test_both_namings_give_the_same_parameters(golden, state_dict):
    config, regular = convert_authors_state_dict(state_dict, golden[0])
    fast_config, fast = convert_authors_state_dict(as_fast_version(state_dict), golden[0])
    assert config.to_dict() == fast_config.to_dict()
    assert regular.keys() == fast.keys()
    assert all(torch.equal(regular[name], fast[name]) for name in regular)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_the_training_file_becomes_a_folder(tmp_path, golden, state_dict, fast, prefix):
    state_dict = as_fast_version(state_dict) if fast else dict(state_dict)
    state_dict["head.weight"] = state_dict["emb.weight"]  # both names of the tied matrix, as torch saves them
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state_dict.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": golden[0] | {"seed": 1337, "dataset": "BabiStories"},
        "iter_num": 80000,
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    command = [sys.executable, "-m", "training", "convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    logits = model(golden[1]["input_ids"]).logits
    assert (logits - golden[1]["logits"]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pmem_count", 2),
        ("pre_ln", False),
        ("attn_only", True),
        ("k_fe_type", "lowrlinearconv"),
        ("v_fe_type", "linearconv"),
        ("k_kernel_size", 2),
        ("v_kernel_size", 3),
        ("v_shift", 2),
        ("v_leaky", True),
    ],
)
def test_options_that_are_not_carried_are_named(golden, state_dict, option, value):
    with pytest.raises(ValueError, match=option):
        convert_authors_state_dict(state_dict, golden[0] | {option: value})


def test_a_missing_vocabulary_size_is_named(golden, state_dict):
    args = {name: value for name, value in golden[0].items() if name != "vocab_size"}
    with pytest.raises(ValueError, match="vocab_size"):
        convert_authors_state_dict(state_dict, args)


def test_parameters_that_contradict_the_arguments_are_named(golden, state_dict):
    with pytest.raises(ValueError, match="slot_keys.*40"):
        convert_authors_state_dict(state_dict, golden[0] | {"pmem_size": 41})
    del state_dict["blocks.1.ln2.weight"]
    with pytest.raises(ValueError, match="layers.1.persistent_norm.weight: absent"):
        convert_authors_state_dict(state_dict, golden[0])


@pytest.mark.parametrize("name", ["blocks.0.attn.rotary", "transformer.wte.weight", "blocks.0.pmem.pmem.M_k1"])
def test_an_unknown_parameter_is_named(golden, state_dict, name):
    state_dict[name] = torch.zeros(1)
    with pytest.raises(ValueError, match=name):
        convert_authors_state_dict(state_dict, golden[0])


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was executed')",))


def test_pickled_code_is_not_executed(tmp_path):
    with open(tmp_path / "ckpt.pt", "wb") as file:
        pickle.dump({"model": Malicious(), "model_args": {}}, file)
    with pytest.raises(ValueError, match="ckpt.pt"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_the_embedding_is_refused_as_tied(golden, state_dict):
    state_dict["head.weight"] = state_dict["emb.weight"] + 1
    with pytest.raises(ValueError, match="weight_tying=False"):
        convert_authors_state_dict(state_dict, golden[0])
    config, converted = convert_authors_state_dict(state_dict, golden[0] | {"weight_tying": False})
    assert not config.tie_word_embeddings
    assert torch.equal(converted["lm_head.weight"], converted["model.embed_tokens.weight"] + 1)


def test_nothing_is_overwritten(tmp_path, golden, state_dict):
    torch.save({"model": state_dict, "model_args": golden[0]}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="not empty"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path)
    assert (tmp_path / "ckpt.pt").is_file()


def test_other_files_are_refused(tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no model and no model_args"):
        convert_checkpoint(tmp_path / "other.pt", tmp_path / "out")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="broken.pt"):
        convert_checkpoint(tmp_path / "broken.pt", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(tmp_path / "nowhere.pt", tmp_path / "out")

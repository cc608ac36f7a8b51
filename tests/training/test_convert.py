# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the authors' code: both namings, their training file, and refusals that name the option."""

import io
import json
import pickle
import subprocess
import sys
import zipfile

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


@pytest.mark.slow
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


def first(state_dict, change):
    name = "blocks.0.ln1.weight"
    return state_dict | {name: change(state_dict[name])}


# What a file could hold instead: by a name, how it is made of the arguments and parameters of a good one.
ODD = {
    "list": lambda a, s: [],
    "tensor": lambda a, s: torch.zeros(3),
    "list-of-parameters": lambda a, s: {"model": list(s.values()), "model_args": a},
    "no-parameters": lambda a, s: {"model": {}, "model_args": a},
    "text-of-arguments": lambda a, s: {"model": s, "model_args": "n_layer=2"},
    "list-of-arguments": lambda a, s: {"model": s, "model_args": [a]},
    "number-for-a-tensor": lambda a, s: {"model": first(s, lambda t: 3.0), "model_args": a},
    "list-for-a-tensor": lambda a, s: {"model": first(s, lambda t: t.tolist()), "model_args": a},
    "number-for-a-name": lambda a, s: {"model": s | {7: torch.zeros(1)}, "model_args": a},
    "integers": lambda a, s: {"model": first(s, lambda t: t.long()), "model_args": a},
    "complex": lambda a, s: {"model": first(s, lambda t: t.to(torch.complex64)), "model_args": a},
    "sparse": lambda a, s: {"model": first(s, lambda t: t.to_sparse()), "model_args": a},
    "nan": lambda a, s: {"model": first(s, lambda t: t * float("nan")), "model_args": a},
    "infinite": lambda a, s: {"model": first(s, lambda t: t.half() * 1e9), "model_args": a},
    "stretched": lambda a, s: {"model": first(s, lambda t: t[:1].expand(10**12)), "model_args": a},
    "layers": lambda a, s: {"model": s, "model_args": a | {"n_layer": 10**9}},
    "digits": lambda a, s: {"model": s, "model_args": a | {"n_layer": 10**5000}},
    "width": lambda a, s: {"model": s, "model_args": a | {"n_embd": 10**15}},
    "no-layer": lambda a, s: {"model": s, "model_args": a | {"n_layer": 0}},
    "fraction-of-a-layer": lambda a, s: {"model": s, "model_args": a | {"n_layer": 2.0}},
    "switch-for-a-number": lambda a, s: {"model": s, "model_args": a | {"n_layer": True}},
    "text-for-a-number": lambda a, s: {"model": s, "model_args": a | {"n_head": "2"}},
    "heads": lambda a, s: {"model": s, "model_args": a | {"n_head": 7}},
    "dropout": lambda a, s: {"model": s, "model_args": a | {"hd_dropout": float("nan")}},
    "tensor-for-an-option": lambda a, s: {"model": s, "model_args": a | {"pre_ln": torch.ones(2)}},
    "shape": lambda a, s: {"model": s | {"blocks.0.attn.k_featurizer.conv.weight": torch.ones(9)}, "model_args": a},
    "scalar": lambda a, s: {"model": first(s, lambda t: t.sum()), "model_args": a},
    "block": lambda a, s: {"model": s | {"blocks." + "9" * 5000 + ".ln1.weight": torch.ones(1)}, "model_args": a},
    "twice": lambda a, s: {"model": s | {"module.emb.weight": s["emb.weight"] + 1}, "model_args": a},
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_checkpoint_is_refused_at_once(tmp_path, golden, state_dict, odd):
    torch.save(ODD[odd](golden[0], state_dict), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError) as error:
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert type(error.value) is ValueError and len(str(error.value)) < 500
    assert not (tmp_path / "out").exists()


def truncated(whole):
    return whole[: len(whole) // 2]


def deflated(whole):
    """As `torch.save` writes it, but for a part that unpacks to a thousand times its size."""
    file = io.BytesIO(whole)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/99", bytes(2**20))
    return file.getvalue()


def old_form(whole):
    file = io.BytesIO()
    torch.save({"model": {}}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Unknown:
    pass


def of_a_class(whole):
    file = io.BytesIO()
    torch.save({"model": Unknown(), "model_args": {}}, file)
    return file.getvalue()


def of_code(whole):
    file = io.BytesIO()
    torch.save({"model": Malicious(), "model_args": {}}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated, "not a whole file"),
        (deflated, "holds more than it has bytes"),
        (old_form, "save it by a torch of today"),
        (of_a_class, "it holds [a-z_.]*test_convert.Unknown"),
        (of_code, "it holds .*exec"),
        (lambda whole: b"", "not a whole file"),
        (lambda whole: b"\x80\x04N.", "not a whole file"),
    ],
    ids=["truncated", "deflated", "old", "class", "code", "empty", "pickle"],
)
def test_a_file_that_is_no_checkpoint_is_refused_without_torchs_advice(tmp_path, golden, state_dict, make, message):
    torch.save({"model": state_dict, "model_args": golden[0]}, tmp_path / "good.pt")
    (tmp_path / "ckpt.pt").write_bytes(make((tmp_path / "good.pt").read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out")
    assert "weights_only" not in str(error.value) and "safe_globals" not in str(error.value)


def test_a_folder_is_no_checkpoint_and_a_file_no_output(tmp_path, golden, state_dict):
    with pytest.raises(ValueError, match="not a whole file"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    torch.save({"model": state_dict, "model_args": golden[0]}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert_checkpoint(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt")

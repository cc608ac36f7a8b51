# SPDX-License-Identifier: Apache-2.0
"""A saved model is the model: every parameter, on any way of loading it, from nothing but the folder."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_ids, make_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM, MemoryMosaicModel


PAYLOAD = (
    "configuration_memory_mosaic.py",
    "cache_memory_mosaic.py",
    "adapters_memory_mosaic.py",
    "modeling_memory_mosaic.py",
)
# What comes besides with a memory model.
WHOLE_PAYLOAD = (*PAYLOAD, "configuration_memory_model.py", "cache_memory_model.py", "modeling_memory_model.py")


def fill_with_own_constants(model):
    """Each parameter gets a value of its own: a swapped, forgotten or re-initialised one cannot pass by luck."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / parameter.numel() + index)
    return model


def run_clean(script: str, *arguments: str) -> str:
    """Run a script that knows nothing of this project: cwd=/, no PYTHONPATH, no network, an empty cache."""
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": arguments[-1]}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the last bit of a sum may depend on it
    process = subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("loader", [MemoryMosaicForCausalLM, AutoModelForCausalLM])
def test_every_parameter_survives_bitwise(tmp_path, tied, sharded, loader):
    model = fill_with_own_constants(make_model(tie_word_embeddings=tied, use_bias=True))
    model.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    stored = [name for path in tmp_path.glob("*.safetensors") for name in safe_open(path, "pt").keys()]
    assert ("lm_head.weight" in stored) == (not tied)


def test_missing_parameters_are_initialised_and_the_rest_left_alone(tmp_path):
    """A checkpoint of the base model alone: loaded values must not be overwritten by initial ones."""
    model = fill_with_own_constants(make_model(tie_word_embeddings=False))
    model.model.save_pretrained(tmp_path)
    loaded = MemoryMosaicForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.lm_head.weight.std().item() == pytest.approx(24**-0.5, rel=0.1)


def test_the_base_model_loads_from_a_causal_checkpoint(tmp_path):
    model = fill_with_own_constants(make_model())
    model.save_pretrained(tmp_path)
    for loader in (MemoryMosaicModel, AutoModel):
        loaded = loader.from_pretrained(tmp_path)
        assert all(torch.equal(t, model.model.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_remote_code_loads_everything_in_a_clean_process(tmp_path, request):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    ids = make_ids(2, 9)
    torch.save({"state": model.state_dict(), "ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == set(PAYLOAD)
    script = """
import socket, sys

class Refused(socket.socket):
    def connect(self, address):
        raise AssertionError(f"connects to {address}")

socket.socket = Refused
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
folder, expected = sys.argv[1], torch.load(sys.argv[2])
for _ in range(2):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected["state"][name]), name
    assert torch.equal(model.eval()(expected["ids"]).logits, expected["logits"])
    model.generate(expected["ids"], attention_mask=torch.ones_like(expected["ids"]), max_new_tokens=3, pad_token_id=0)
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "MemoryMosaicModel"
classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
assert type(classifier).__name__ == "MemoryMosaicForSequenceClassification"
classifier.save_pretrained(sys.argv[3] + "/classifier")
AutoModelForSequenceClassification.from_pretrained(sys.argv[3] + "/classifier", trust_remote_code=True)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "memory_mosaic"
model.save_pretrained(sys.argv[3] + "/again")
AutoModelForCausalLM.from_pretrained(sys.argv[3] + "/again", trust_remote_code=True)
sys.path.append(sys.argv[4])
import modeling_memory_mosaic
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model) is modeling_memory_mosaic.MemoryMosaicForCausalLM
assert torch.equal(model.eval()(expected["ids"]).logits, expected["logits"])
"""
    root = str(request.config.rootpath)
    run_clean(script, str(tmp_path / "model"), str(tmp_path / "expected.pt"), str(tmp_path), root, str(tmp_path))


def test_the_payload_is_the_package_byte_for_byte(tmp_path, request):
    model = make_model()
    model.save_pretrained(tmp_path)
    package = request.config.rootpath / "modeling_memory_mosaic"
    for name in PAYLOAD:
        assert (tmp_path / name).read_bytes() == (package / name).read_bytes()
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_memory_mosaic.MemoryMosaicConfig",
        "AutoModel": "modeling_memory_mosaic.MemoryMosaicModel",
        "AutoModelForCausalLM": "modeling_memory_mosaic.MemoryMosaicForCausalLM",
        "AutoModelForDecision": "modeling_memory_mosaic.MemoryMosaicForCausalLM",
        "AutoModelForSequenceClassification": "modeling_memory_mosaic.MemoryMosaicForSequenceClassification",
    }


@pytest.mark.parametrize("name", WHOLE_PAYLOAD)
def test_the_payload_imports_only_what_every_user_has(request, name):
    path = request.config.rootpath / "modeling_memory_mosaic" / name
    imports = set(get_imports(path))
    assert imports <= {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names), imports
    assert {f"{module}.py" for module in get_relative_imports(path)} <= set(WHOLE_PAYLOAD)


@pytest.mark.parametrize("name", WHOLE_PAYLOAD)
def test_the_payload_touches_neither_files_nor_network_nor_processes(request, name):
    nodes = list(ast.walk(ast.parse((request.config.rootpath / "modeling_memory_mosaic" / name).read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert not names & {"open", "eval", "exec", "compile", "__import__", "globals", "vars", "input", "breakpoint"}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not attributes & {"load", "save", "hub", "ops", "cpp_extension", "system", "popen", "write", "__globals__"}
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    harmless = {"copy", "dataclasses", "functools", "hashlib", "inspect", "typing", "weakref"}
    assert {module.split(".")[0] for module in modules} <= {"torch", "transformers", "huggingface_hub"} | harmless
    assert modules & {"torch", "transformers.configuration_utils"}  # it found the imports there are


def test_a_saved_model_holds_safetensors_code_and_settings_alone(tmp_path):
    make_model().save_pretrained(tmp_path)
    expected = {"config.json", "generation_config.json", "model.safetensors", *PAYLOAD}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_half_precision_is_kept(tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in MemoryMosaicForCausalLM.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}


def test_a_truncated_checkpoint_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="not fully covered|incomplete"):
        MemoryMosaicForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = MemoryMosaicConfig.from_pretrained(tmp_path)
    config.num_persistent_slots += 1
    with pytest.raises(RuntimeError, match="mismatched"):
        MemoryMosaicForCausalLM.from_pretrained(tmp_path, config=config)


def test_embeddings_can_be_resized(tmp_path):
    model = make_model()
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = MemoryMosaicForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70 and loaded(make_ids(1, 4, vocab_size=70)).logits.shape[-1] == 70
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_library_knows_the_model_by_name():
    config = AutoConfig.for_model("memory_mosaic", hidden_size=24, num_attention_heads=3, vocab_size=11)
    assert isinstance(AutoModelForCausalLM.from_config(config), MemoryMosaicForCausalLM)


def test_every_source_file_states_its_licence(request):
    files = [path for path in request.config.rootpath.glob("*/*.py") if not path.parent.name.startswith(".")]
    assert len(files) > 30
    for path in files:
        assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), path

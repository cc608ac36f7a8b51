# SPDX-License-Identifier: Apache-2.0
"""A saved model has every parameter, on any way of loading it, from nothing but the folder."""

import ast
import json
import re
import sys

import pytest
import torch
from helpers.isolation import run_clean
from helpers.kinds import BACKBONE_KINDS, KINDS, MODELS, VOCAB_SIZE, for_kinds
from helpers.payload import CONTINUOUS_PAYLOAD, MEMORY_MODEL_PAYLOAD, PACKAGE, PAYLOAD, V2_PAYLOAD, WHOLE_PAYLOAD
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel
from transformers.dynamic_module_utils import get_imports, get_relative_imports


def fill_with_own_constants(model):
    """Give each parameter different values, so that a swapped, forgotten or re-initialised one cannot pass by luck."""
    parameters = list(model.parameters())
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            within = torch.arange(parameter.numel()).view_as(parameter) / parameter.numel()
            parameter.copy_((within + index) / len(parameters))
    return model


@for_kinds(*KINDS)
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("by", ["its own class", "Auto class"])
def test_every_parameter_survives_bitwise(tmp_path, kind, sharded, by):
    model = fill_with_own_constants(kind.make())
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=num_bytes // 3 if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loader = kind.auto if by == "Auto class" else type(model)
    loaded, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    again = kind.make(seed=1)
    again.load_state_dict(expected)
    inputs = kind.inputs(model, 2, 12)
    assert torch.equal(kind.answer(loaded, inputs), kind.answer(again, inputs))


def test_the_page_of_the_package_lists_the_files_that_travel():
    """The table states the files that all payloads share in its header, and those that a model adds in its rows."""
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    header, _, *rows = page.split("| saved model |")[1].split("\n\n")[0].splitlines()
    shared = {f"{role}memory_mosaic.py" for role in re.findall(r"`(\w+_)`", header)}
    listed = {}
    for row in rows:
        model, roles = re.fullmatch(r"\| `(\w+)` \| (.*) \|", row).groups()
        listed[model] = shared | {f"{role}{model}.py" for role in re.findall(r"`(\w+_)`", roles)}
        listed[model] |= {f"{name}.py" for name in re.findall(r"`(\w+[a-z])`", roles)}  # of another model
    payloads = {"memory_mosaic": PAYLOAD, "continuous_memory_mosaic": CONTINUOUS_PAYLOAD}
    payloads |= {"memory_model": MEMORY_MODEL_PAYLOAD, "memory_mosaic_v2": V2_PAYLOAD}
    assert listed == {model: set(payload) for model, payload in payloads.items()}


@for_kinds("mosaic", "mosaic v2", "untied mosaic", *BACKBONE_KINDS)
def test_a_tied_matrix_is_stored_once(tmp_path, kind):
    model = kind.make()
    model.save_pretrained(tmp_path)
    loaded = kind.auto.from_pretrained(tmp_path)
    stored = {name for path in tmp_path.glob("*.safetensors") for name in safe_open(path, "pt").keys()}
    tied = {"mosaic v2": False, "untied mosaic": False, "memory model of llama": False, "memory model of both": False}
    head = loaded.get_output_embeddings().weight
    assert (head is loaded.get_input_embeddings().weight) == tied.get(kind.name, True)
    assert len({name for name in stored if name.endswith("lm_head.weight")}) == 1 - tied.get(kind.name, True)
    assert stored == {name for name, _ in model.named_parameters()}


@for_kinds("untied mosaic", "mosaic v2", *BACKBONE_KINDS, "classifier")
def test_missing_parameters_are_initialised_and_the_rest_left_alone(tmp_path, kind):
    """In a checkpoint of the body alone, loaded values must not be overwritten by initial ones."""
    model = fill_with_own_constants(kind.make())
    body = getattr(model, kind.body)
    body.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded, report = kind.auto.from_pretrained(tmp_path, output_loading_info=True)
    for name, tensor in body.state_dict().items():
        assert torch.equal(getattr(loaded, kind.body).state_dict()[name], tensor), name
    missing = {name for name, _ in model.named_parameters() if not name.startswith(f"{kind.body}.")}
    assert report["missing_keys"] >= missing > set()
    fresh = type(model)(model.config)
    for name in missing:
        parameter, other = loaded.get_parameter(name), fresh.get_parameter(name)
        # transformers 5.24 forgets that GPT-2 begins `c_proj` smaller, where GPT-2 is part of code from outside it.
        if parameter.numel() > 100 and not name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.2, abs=1e-6), name
        assert not torch.equal(parameter, model.get_parameter(name)) and parameter.abs().max() < 10, name


@for_kinds("mosaic", "mosaic v2", "untied mosaic", *BACKBONE_KINDS, "classifier")
def test_the_body_alone_is_what_automodel_loads(tmp_path, kind):
    model = kind.make()
    model.save_pretrained(tmp_path)
    body, inputs = getattr(model, kind.body), kind.inputs(model, 2, 12)
    for folder in (tmp_path, tmp_path / "body"):
        loaded = AutoModel.from_pretrained(folder)
        assert type(loaded) is type(body)
        assert all(torch.equal(tensor, body.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(loaded(**inputs)[0], body(**inputs)[0])
        loaded.save_pretrained(tmp_path / "body")


# Each folder is read by a process forked for it alone: what one folder registers must not serve the next.
CLEAN_PROCESS = """
import json, os, socket, sys, traceback

class Refused(socket.socket):
    def connect(self, address):
        raise AssertionError(f"connects to {address}")

socket.socket = Refused
import torch
import transformers
import transformers.models.auto.modeling_auto, transformers.generation.utils, transformers.modeling_utils
from transformers import AutoConfig

def load(auto, folder, **options):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **options).eval()

def check(folder, expected, root):
    def answer(model):
        return model(**expected["inputs"])[expected["answers"]]

    for place in (folder, folder, folder + "/again"):
        model = load(expected["auto"], place)
        assert type(model).__module__.startswith("transformers_modules")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected["state"][name]), name
        assert torch.equal(answer(model), expected["answer"])
        model.save_pretrained(folder + "/again")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == model.config.model_type
    if expected["text"] is not None:
        text = model.generate(**expected["inputs"], max_new_tokens=7, do_sample=False, pad_token_id=0)
        assert torch.equal(text, expected["text"])
    body = load("AutoModel", folder)
    assert torch.equal(body(**expected["inputs"])[0], expected["body"])
    for auto in expected["other_heads"]:
        other = load(auto, folder, num_labels=3)
        other.save_pretrained(folder + "/other")
        assert type(load(auto, folder + "/other")).__name__ == type(other).__name__ != type(model).__name__
    sys.path.append(root)
    import modeling_memory_mosaic
    model = load(expected["auto"], folder)
    assert type(model) is getattr(modeling_memory_mosaic, type(model).__name__)
    assert torch.equal(answer(model), expected["answer"])

root, folders = sys.argv[1], sys.argv[2:-1]
for folder in folders:
    if os.fork() == 0:
        try:
            check(folder, torch.load(folder + "/expected.pt"), root)
        except BaseException:
            with open(folder + "/failure.txt", "w") as file:
                traceback.print_exc(file=file)
        os._exit(0)
    assert os.wait()[1] == 0, folder
"""
CLEAN_KINDS = (*MODELS, "memory model of both")


@pytest.fixture(scope="module")
def read_in_a_clean_process(request, tmp_path_factory):
    """Return folders of models of each kind, read by one process that knows nothing of this project."""
    root, folders = tmp_path_factory.mktemp("clean"), []
    for name in CLEAN_KINDS:
        kind, folder = KINDS[name], root / name.replace(" ", "-")
        model = kind.make()
        model.save_pretrained(folder)
        folders.append(folder)
        inputs = kind.inputs(model, 2, 12)
        generate = getattr(model, "generate", lambda **_: None)
        body = model if kind.body is None else getattr(model, kind.body)
        expected = {
            "auto": kind.auto.__name__,
            "answers": kind.answers,
            "state": model.state_dict(),
            "inputs": inputs,
            "answer": kind.answer(model, inputs),
            "text": generate(**inputs, max_new_tokens=7, do_sample=False, pad_token_id=0),
            "body": body(**inputs)[0],
            "other_heads": ["AutoModelForSequenceClassification"] if name in ("mosaic", "mosaic v2") else [],
        }
        torch.save(expected, folder / "expected.pt")
    run_clean(CLEAN_PROCESS, str(request.config.rootpath), *map(str, folders), str(root))
    return dict(zip(CLEAN_KINDS, folders, strict=True))


@for_kinds(*MODELS, "memory model of both")
def test_remote_code_loads_everything_in_a_clean_process(kind, read_in_a_clean_process):
    failure = read_in_a_clean_process[kind.name] / "failure.txt"
    assert (failure.parent / "again").is_dir(), "it was not read"
    assert not failure.exists(), failure.read_text(encoding="utf-8")


OF_MOSAIC = {
    "AutoConfig": "configuration_memory_mosaic.MemoryMosaicConfig",
    "AutoModel": "modeling_memory_mosaic.MemoryMosaicModel",
    "AutoModelForCausalLM": "modeling_memory_mosaic.MemoryMosaicForCausalLM",
    "AutoModelForDecision": "modeling_memory_mosaic.MemoryMosaicForCausalLM",
    "AutoModelForSequenceClassification": "modeling_memory_mosaic.MemoryMosaicForSequenceClassification",
}
AUTO_MAPS = {
    "mosaic": OF_MOSAIC,
    "mosaic v2": {
        auto: name.replace("MemoryMosaic", "MemoryMosaicV2").replace("_mosaic.", "_mosaic_v2.")
        for auto, name in OF_MOSAIC.items()
    },
    "classifier": OF_MOSAIC,
    "memory model": {
        "AutoConfig": "configuration_memory_model.MemoryModelConfig",
        "AutoModel": "modeling_memory_model.MemoryModelEncoder",
        "AutoModelForCausalLM": "modeling_memory_model.MemoryModelForCausalLM",
        "AutoModelForDecision": "modeling_memory_model.MemoryModelForCausalLM",
    },
    "continuous": {
        "AutoConfig": "configuration_continuous_memory_mosaic.ContinuousMemoryMosaicConfig",
        "AutoModel": "modeling_continuous_memory_mosaic.ContinuousMemoryMosaicModel",
    },
}
CODE = {
    "mosaic": PAYLOAD,
    "mosaic v2": V2_PAYLOAD,
    "classifier": PAYLOAD,
    "memory model": MEMORY_MODEL_PAYLOAD,
    "continuous": CONTINUOUS_PAYLOAD,
}


@for_kinds(*KINDS)
def test_the_payload_is_the_package_byte_for_byte(tmp_path, request, kind):
    """A folder holds weights in safetensors, settings, and the code that it needs."""
    model = kind.make()
    model.save_pretrained(tmp_path)
    package = request.config.rootpath / "modeling_memory_mosaic"
    settings = {"config.json", "model.safetensors"} | {"generation_config.json" for _ in range(model.can_generate())}
    model_of = {"classifier v2": "mosaic v2"}.get(kind.name, kind.model)
    assert {path.name for path in tmp_path.iterdir()} == {*CODE[model_of], *settings}
    for name in CODE[model_of]:
        assert (tmp_path / name).read_bytes() == (package / name).read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAPS[model_of]


@pytest.mark.parametrize("name", WHOLE_PAYLOAD)
def test_the_payload_imports_only_what_every_user_has(request, name):
    path = request.config.rootpath / "modeling_memory_mosaic" / name
    imports = set(get_imports(path))
    # transformers itself needs them.
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors"}
    assert imports <= allowed | set(sys.stdlib_module_names), imports
    assert {f"{module}.py" for module in get_relative_imports(path)} <= set(WHOLE_PAYLOAD)


# It saves and loads memories when it is asked to, and is the only one to touch files.
OF_FILES = {"files_memory_mosaic.py": {"os", "pathlib", "safetensors", "tempfile"}}
# Takes paths for `from_pretrained`. A pure one touches no file.
OF_FILES["backbones_memory_model.py"] = {"pathlib"}


@pytest.mark.parametrize("name", WHOLE_PAYLOAD)
def test_the_payload_touches_neither_files_nor_network_nor_processes(request, name):
    nodes = list(ast.walk(ast.parse((request.config.rootpath / "modeling_memory_mosaic" / name).read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert not names & {"open", "eval", "exec", "compile", "__import__", "globals", "vars", "input", "breakpoint"}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not attributes & {"load", "save", "hub", "ops", "cpp_extension", "system", "popen", "write", "__globals__"}
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    harmless = {
        "contextlib",
        "copy",
        "dataclasses",
        "functools",
        "hashlib",
        "inspect",
        "itertools",
        "json",
        "math",
        "re",
        "threading",
        "typing",
        "warnings",
        "weakref",
    }
    modules -= {"collections.abc"}  # names of types
    allowed = {"torch", "transformers", "huggingface_hub"} | harmless | OF_FILES.get(name, set())
    assert {module.split(".")[0] for module in modules} <= allowed
    assert modules & {"torch", "transformers.configuration_utils"}  # the imports were collected


@for_kinds(*KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_precision_is_kept(tmp_path, kind, dtype):
    kind.make(dtype=dtype).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in kind.auto.from_pretrained(tmp_path).parameters()} == {dtype}
    loaded = kind.auto.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@for_kinds()
def test_a_truncated_checkpoint_is_refused(tmp_path, kind):
    kind.make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SafetensorError, match="not fully covered|incomplete"):
        kind.auto.from_pretrained(tmp_path)


@for_kinds()
def test_a_checkpoint_of_another_size_is_refused(tmp_path, kind):
    kind.make().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    setattr(config, kind.other_size, getattr(config, kind.other_size) + 2)
    with pytest.raises(RuntimeError, match="mismatched"):
        kind.auto.from_pretrained(tmp_path, config=config)


@for_kinds("mosaic", "mosaic v2", "untied mosaic", *BACKBONE_KINDS, "classifier")
def test_embeddings_can_be_resized(tmp_path, kind):
    """Resizing reaches all token tables of a model."""
    model = kind.make()
    before = kind.answer(model, kind.inputs(model, 2, 12))
    inputs = kind.inputs(model, 2, 12)
    model.resize_token_embeddings(VOCAB_SIZE + 9, mean_resizing=False)
    model.save_pretrained(tmp_path)
    loaded = kind.auto.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == VOCAB_SIZE + 9
    sizes = [module.num_embeddings for module in loaded.modules() if isinstance(module, torch.nn.Embedding)]
    assert VOCAB_SIZE + 9 in sizes and VOCAB_SIZE not in sizes
    torch.testing.assert_close(kind.answer(loaded, inputs)[..., : before.shape[-1]], before, rtol=0, atol=1e-6)
    assert kind.answer(loaded, kind.inputs(loaded, 2, 12)).isfinite().all()


@for_kinds(*KINDS)
def test_the_library_knows_the_model_by_name(kind):
    model = kind.make()
    fields = model.config.to_dict()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    assert type(kind.auto.from_config(config)) is type(model)


def test_every_source_file_states_its_licence(request):
    root = request.config.rootpath
    folders = ("benchmarks", "hub_cards", "modeling_memory_mosaic", "tests", "training")
    files = [path for folder in folders for path in (root / folder).rglob("*.py") if path.parent.name != "snippets"]
    assert len(files) > 100
    for path in files:
        assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), path

# SPDX-License-Identifier: Apache-2.0
"""Folders that an earlier version wrote are loaded and resumed by today's code to the same bits.

`golden/old_formats.tar.xz` holds one of each kind; golden/README.md describes them. Each exported folder carries the
code that wrote it, so that the earlier answers are computed here, by a process that knows nothing of today's code.
Today a CPU reads in blocks, which adds the same in another order: bits are compared without them, answers with them.
"""

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.isolation import run_clean
from helpers.models import read_without_blocks
from helpers.processes import call
from helpers.runs import assert_same_run, weights
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from modeling_memory_mosaic import memory_from_state_dict
from training.__main__ import app
from training.tasks import language_modeling


ARCHIVE = Path(__file__).parent / "golden" / "old_formats.tar.xz"
IDS = torch.tensor([[(row + 97 * column) % 259 for column in range(24)] for row in range(2)])
NUM_REMEMBERED = 12  # tokens of the first row that the saved memory holds
# Loads each folder by its own code, with no package of this project at hand.
EARLIER_CODE = """
import importlib, sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

formats, ids_file, output = sys.argv[1:4]
ids = torch.load(ids_file)

def load(auto, folder):
    model = auto.from_pretrained(f"{formats}/{folder}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    return model

answers = {}
with torch.no_grad():
    model = load(AutoModelForCausalLM, "finished/model")
    answers["mosaic"] = model(ids).logits
    package = type(model).__module__.rpartition(".")[0]
    cache_module = importlib.import_module(f"{package}.cache_memory_mosaic")
    state = load_file(f"{formats}/memory.safetensors")
    memory = cache_module.memory_from_state_dict(model.config, state)
    answers["memory"] = model(ids[:1, 12:], cache=memory).logits
    answers["adapter"] = PeftModel.from_pretrained(model, f"{formats}/adapter").eval()(ids).logits
    answers["memory_model"] = load(AutoModelForCausalLM, "memory_model")(ids % 31).logits
    observations = load_file(f"{formats}/observations.safetensors")["observations"]
    answers["continuous"] = load(AutoModel, "continuous")(observations).predictions
assert "modeling_memory_mosaic" not in sys.modules
save_file({name: answer.contiguous() for name, answer in answers.items()}, output)
"""


def this_machine() -> dict[str, str]:
    """What the last bits of a sum depend on; `expected.json` holds the same of the machine that wrote the archive."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "cpu": (names or ["unknown"])[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The archive was written by one; more would divide sums in another way."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def without_blocks(monkeypatch):
    """Read by sdpa and its masks, as earlier versions did; a clean process would read in blocks and prove nothing."""
    monkeypatch.setattr(language_modeling, "verify_export", lambda folder, prompts, **options: prompts)
    read_without_blocks(monkeypatch)


@pytest.fixture(scope="module")
def formats(tmp_path_factory) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path_factory.mktemp("old"), filter="data")
    return tmp_path_factory.getbasetemp() / "old0" / "formats"


@pytest.fixture(scope="module")
def expected(formats) -> dict:
    return json.loads((formats / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def same_machine(expected) -> bool:
    return expected["machine"] == this_machine()


@pytest.fixture(scope="module")
def earlier(formats, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Answers of the code that lies in the folders."""
    folder = tmp_path_factory.mktemp("earlier")
    torch.save(IDS, folder / "ids.pt")
    run_clean(EARLIER_CODE, str(formats), str(folder / "ids.pt"), str(folder / "answers.safetensors"), str(folder))
    return load_file(folder / "answers.safetensors")


def load_mosaic(formats: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(formats / "finished" / "model").eval()


def answer_mosaic(formats: Path) -> torch.Tensor:
    return load_mosaic(formats)(IDS).logits


def answer_from_memory(formats: Path) -> torch.Tensor:
    model = load_mosaic(formats)
    memory = memory_from_state_dict(model.config, load_file(formats / "memory.safetensors"))
    return model(IDS[:1, NUM_REMEMBERED:], cache=memory).logits


def answer_adapted(formats: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(load_mosaic(formats), formats / "adapter").eval()(IDS).logits


def answer_memory_model(formats: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(formats / "memory_model").eval()(IDS % 31).logits


def answer_continuous(formats: Path) -> torch.Tensor:
    observations = load_file(formats / "observations.safetensors")["observations"]
    return AutoModel.from_pretrained(formats / "continuous").eval()(observations).predictions


ANSWERS = {
    "mosaic": answer_mosaic,
    "memory": answer_from_memory,
    "adapter": answer_adapted,
    "memory_model": answer_memory_model,
    "continuous": answer_continuous,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERS)
@torch.no_grad()
def test_an_old_folder_gives_the_answers_of_its_own_code(
    formats, expected, same_machine, earlier, name, without_blocks, monkeypatch
):
    answer = ANSWERS[name](formats)
    assert torch.equal(answer, earlier[name])
    monkeypatch.undo()
    torch.testing.assert_close(ANSWERS[name](formats), answer, rtol=1e-5, atol=1e-5)
    if same_machine:
        assert hashlib.sha256(answer.contiguous().numpy().tobytes()).hexdigest() == expected[name]


@torch.no_grad()
def test_an_old_memory_is_that_of_reading_the_text_now(formats):
    model = load_mosaic(formats)
    memory = DynamicCache(config=model.config)
    model(IDS[:1, :NUM_REMEMBERED], cache=memory)
    torch.testing.assert_close(model(IDS[:1, NUM_REMEMBERED:], cache=memory).logits, answer_from_memory(formats))


@pytest.fixture
def runs(formats, tmp_path, monkeypatch) -> Path:
    """A copy in the working directory, as folders of runs are relative to it."""
    copy = shutil.copytree(formats, tmp_path / "formats")
    monkeypatch.chdir(copy)
    return copy


def run_recipe(path: str) -> str:
    result = CliRunner().invoke(app, ["--debug", "run", path], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def assert_trained_alike(run: Path, finished: Path, same_machine: bool) -> None:
    """Bitwise on the machine that wrote the archive; elsewhere sums round differently, and ten steps amplify that."""
    if same_machine:
        assert_same_run(run, finished)
    for name, tensor in weights(finished).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.usefixtures("without_blocks")
def test_an_old_run_that_was_stopped_half_way_ends_as_the_finished_one(runs, same_machine):
    assert json.loads((runs / "half/checkpoint-5/trainer_state.json").read_text())["global_step"] == 5
    assert "resuming from half/checkpoint-5" in run_recipe("half/recipe.yaml")
    assert_trained_alike(runs / "half", runs / "finished", same_machine)


@pytest.mark.usefixtures("without_blocks")
def test_the_recipe_of_an_old_run_trains_the_same_model_today(runs, same_machine):
    recipe = (runs / "half/recipe.yaml").read_text(encoding="utf-8")
    (runs / "recipe.yaml").write_text(recipe.replace("output_dir: half", "output_dir: whole"), encoding="utf-8")
    assert "resuming" not in run_recipe("recipe.yaml")
    assert_trained_alike(runs / "whole", runs / "finished", same_machine)
    hashes = [json.loads((runs / name / "run.json").read_text())["hash"] for name in ("whole", "half", "finished")]
    assert len(set(hashes)) == 1


def read_files(folder: Path) -> dict[Path, Any]:
    """Return the content of all files but locks: of JSON its values, else its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes() for path in files}


def test_an_old_finished_run_is_finished(runs):
    before = read_files(runs / "finished")
    assert "finished is finished already" in run_recipe("finished/recipe.yaml")
    assert read_files(runs / "finished") == before


def test_an_old_published_folder_is_not_run_by_code_of_another_version(runs):
    """The message names the code that differs or that is missing; nothing of the folder is loaded."""
    result = CliRunner().invoke(app, ["publish", "finished/published/model", "--verify-only"])
    assert result.exit_code == 1
    message = r"lacks code that is published with it|differs from this project's .*: read it before you trust it"
    assert re.search(message, result.output), result.output


BESIDE_OLD_CODE = """
import sys
import torch
from modeling_memory_mosaic import MemoryMosaicForCausalLM, inspect_units
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, ids = sys.argv[1], torch.zeros(1, 4, dtype=torch.long)
old = get_class_from_dynamic_module("modeling_memory_mosaic.MemoryMosaicForCausalLM", folder).from_pretrained(folder)
new = MemoryMosaicForCausalLM.from_pretrained(folder)
torch.testing.assert_close(old(ids, use_cache=False).logits, new(ids, use_cache=False).logits)
for call in (lambda: inspect_units(old, ids), lambda: new.generate(ids, max_new_tokens=2)):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_old_code_in_the_same_process_is_named(formats):
    """Loaded later, it makes the memories of both: transformers knows the layers of a cache by their name alone."""
    process = call("-c", BESIDE_OLD_CODE, str(formats / "finished" / "model"))
    assert process.returncode == 0, process.stderr
    inspected, read = process.stdout.strip().splitlines()
    assert "runs the code that an earlier version saved beside it" in inspected
    assert "another version of this code" in read

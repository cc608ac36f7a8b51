# SPDX-License-Identifier: Apache-2.0
"""The wheel: its command works outside of the clone, with torch and transformers alone, and clashes with nothing."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.models import make_model

from training.paths import CLONE
from training.text.tokenizer import train_tokenizer


pytestmark = pytest.mark.slow


TEXT = "once upon a time there was a little cat, and the cat had a red ball"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build writes into the folder of the sources."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(CLONE / name, sources)
    for name in ("modeling_memory_mosaic", "training/commands"):
        shutil.copytree(CLONE / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=sources, check=True, capture_output=True)
    (path,) = (sources / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """The installed command, in an environment of its own that borrows torch, transformers and typer from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # As paths only: a `.pth` file of the other environment, such as that of an editable install, is not followed.
    places = {str(Path(find_spec(name).origin).parents[1]) for name in ("torch", "transformers", "typer")}
    (packages / "borrowed.pth").write_text("\n".join(sorted(places)), encoding="utf-8")
    return folder / "bin" / "memory-mosaic"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT] * 9, 280)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    make_model(vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def call(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "cat.txt").write_text(TEXT, encoding="utf-8")
    (folder / "ball.txt").write_text("the ball was red", encoding="utf-8")
    (folder / "runs").mkdir()

    def run(*arguments, code=0, **options):
        environment = {"PATH": os.environ["PATH"], "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        process = subprocess.run(
            [command, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, **options
        )
        assert process.returncode == code, process.stderr
        return process

    return run


def test_a_wheel_has_two_packages_whose_names_are_nobody_elses(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == {"memory_mosaic_commands", "modeling_memory_mosaic"}
    assert {f"memory_mosaic_commands/{path.name}" for path in (CLONE / "training/commands").glob("*.py")} <= {*names}


def test_texts_are_continued_and_looked_into(call, model):
    generated = call("generate", model, "once upon", "--max-new-tokens", 3)
    assert generated.stdout.startswith("once upon") and "Loading weights" not in generated.stderr
    table = call("inspect", model, "once upon a time").stdout.splitlines()
    assert table[0].split()[:4] == ["layer", "kind", "head", "error"] and len({*map(len, table)}) == 1
    typed = "once upon\n/memory\n/quit\n"
    assert "pairs in each head" in call("chat", model, "--max-new-tokens", 2, input=typed).stdout


def test_files_are_memorized_and_asked(call, model):
    assert "2 texts" in call("memorize", model, "cat.txt", "ball.txt", "--output", "texts").stdout
    process = call("ask", model, "who had the ball?", "--memory", "texts", "--max-new-tokens", 3)
    assert [line.split()[1] for line in process.stderr.splitlines()[-3:]] == ["cat.txt", "ball.txt", "the"]


def test_a_text_is_forgotten_and_the_rest_stays_in_its_precision(call, model):
    call("memorize", model, "cat.txt", "ball.txt", "--output", "kept", "--dtype", "int8")
    assert "1 text: ball.txt" in call("forget", model, "--memory", "kept", "--source", "cat.txt").stdout
    about = json.loads(call("info", "kept").stdout)
    assert about["sources"] == ["ball.txt"] and about["precision"] == "int8"
    assert "cat.txt" in call("forget", model, "--memory", "kept", "--source", "cat.txt", code=1).stderr


def test_mistakes_are_one_message(call, model):
    for arguments, message in (
        (["ask", model, "who?", "--memory", "./absent"], "./absent is no folder"),
        (["info", "absent"], "absent holds no memory.safetensors"),
        (["generate", "absent", "once"], "ValueError: 'absent' is no folder"),
        (["generate", "runs/nope", "once"], "the folder 'runs' has no 'nope'"),
        (["memorize", model, "cat.txt", "--output", "."], "exists already"),
        (["inspect", model, ""], "give at least two"),
        (["generate", "nobody/nothing", "once"], "offline-mode"),
    ):
        process = call(*arguments, code=1)
        assert message in process.stderr and "memory-mosaic --debug ... shows where" in process.stderr
        assert "Traceback" not in process.stderr


def test_help_imports_nothing_heavy(command):
    script = "import sys, memory_mosaic_commands; print({'torch', 'transformers'} & {*sys.modules})"
    process = subprocess.run([command.with_name("python"), "-c", script], cwd="/", capture_output=True, text=True)
    assert process.stdout.strip() == "set()", process.stderr

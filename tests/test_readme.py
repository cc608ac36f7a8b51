# SPDX-License-Identifier: Apache-2.0
"""The README does what it says: its Python blocks run, its commands exist, its numbers are those of the results."""

import ast
import collections
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import kinds
from helpers.models import make_model

from training.export import export_model
from training.tables import rewrite_tables
from training.text.tokenizer import train_tokenizer


@pytest.fixture
def readme(request):
    return (request.config.rootpath / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def test_python_blocks_run_in_order_in_one_session(readme, tmp_path):
    """In an empty folder that holds nothing but an exported model where `make demo` puts its own."""
    tokenizer = train_tokenizer(["Once upon a time there was a cat. One day, a little ball."] * 3, vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    export_model(make_model(vocab_size=300, **ids), tokenizer, tmp_path / "runs/demo/mosaic-demo-seed0/model")
    code = "\n".join(blocks(readme, "python"))
    code += "\nassert not model.training"  # what is exported and saved must not drop out
    assert code.count("from_pretrained") >= 2 and "trainer.train()" in code and "memory_from_state_dict" in code
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "Do you wish to run the custom code" not in process.stdout, (
        "a question to the user in the middle of a block"
    )


def test_commands_exist(readme, request):
    root = request.config.rootpath
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    commands = [line for block in blocks(readme, "") for line in block.splitlines() if line]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert set(words[1:]) <= targets, command
        for word in words:
            if word.startswith("configuration/"):
                assert (root / word).is_file(), command


def test_set_up_is_exactly_two_commands(readme):
    section = readme.split("## Set-up")[1].split("\n## ")[0]
    assert blocks(section, "") == ["make demo\nmake test\n"]


@pytest.mark.parametrize("command", ["dry-run", "--help"])
def test_the_command_line_answers(request, command):
    arguments = ["dry-run", "configuration/recipe/stories_tiny.yaml"] if command == "dry-run" else [command]
    subprocess.run(
        [sys.executable, "-m", "training", *arguments], cwd=request.config.rootpath, check=True, capture_output=True
    )


@pytest.mark.parametrize("name", ["README.md", "training/results/README.md"])
def test_numbers_are_those_of_the_result_files(request, name, tmp_path):
    text = (request.config.rootpath / name).read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    rewrite_tables(copy)
    assert copy.read_text(encoding="utf-8") == text, "run `make tables`"


@pytest.mark.parametrize(("name", "least"), [("README.md", 60), ("REPORTS.md", 20)])
def test_promises_name_tests_that_exist(request, name, least):
    tests = request.config.rootpath / "tests"
    sources = "\n".join(path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py"))
    makefile = (request.config.rootpath / "Makefile").read_text(encoding="utf-8")
    promised = re.findall("`(test_\\w+|make [\\w-]+)`", (tests / name).read_text(encoding="utf-8"))
    assert len(promised) > least
    for name in promised:
        words = name.split()
        assert f"\n{words[1]}:" in makefile if words[0] == "make" else f"\ndef {name}(" in sources, name


# A test that is not run for kinds is of the model that its file is named after, else of the mosaic.
FILES = {"memory_model": {"memory model"}, "continuous": {"continuous"}, "classification": {"classifier"}}
FILES |= dict.fromkeys(("configuration", "adapters"), set(kinds.MODELS))  # these go through all classes by themselves
FILES["identity"] = {"mosaic", "continuous"}


def models_of_tests(folder):
    """Of each test, the models that it runs for: all that are known, and those that its decorator names."""
    known, named = collections.defaultdict(set), collections.defaultdict(set)
    for path in folder.rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_file = [models for start, models in FILES.items() if path.stem.startswith(f"test_{start}")] or [{"mosaic"}]
        short = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
        for test in tree.body:
            if not isinstance(test, ast.FunctionDef) or not test.name.startswith("test_"):
                continue
            decorators = [short.get(ast.unparse(node), node) for node in test.decorator_list]
            calls = [node for node in decorators if ast.unparse(node).startswith("for_kinds(")]
            for call in calls:
                mark = eval(ast.unparse(call), dict(vars(kinds)))
                named[test.name] |= {kind.model for kind in mark.args[1]}
            known[test.name] |= named[test.name] if calls else of_file[0]
    return known, named


def test_promises_say_for_which_models_they_hold(request):
    """Each promise of a model is one of all models: it holds, is refused, or does not apply, with the reason."""
    folder = request.config.rootpath / "tests"
    known, named = models_of_tests(folder)
    header = f"| promise | tests | {' | '.join(kinds.MODELS)} |\n| --- | --- | --- | --- | --- | --- |\n"
    table = (folder / "README.md").read_text(encoding="utf-8").split(header)[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) > 40 and all(len(row) == 6 for row in rows)
    for promise, tests, *cells in rows:
        tests = re.findall("`(test_\\w+)`", tests)
        assert len(tests) == len(set(tests)) > 0, promise
        for model, cell in zip(kinds.MODELS, cells, strict=True):
            holds = [test for test in tests if model in known[test]]
            if cell == "yes":
                assert holds, f"{promise}: none of its tests is run for a {model}"
            elif cell.startswith("refused: "):
                refusals = re.findall("`(test_\\w+)`", cell)
                assert refusals and all(model in known[test] for test in refusals), f"{promise}, {model}: {cell}"
            else:
                assert re.match("(does not apply|not yet): (\\w+ ){3}", cell), f"{promise}, {model}: {cell}"
                stale = [test for test in tests if model in named[test]]
                assert not stale, f"{promise}: {cell}, but {stale} are run for a {model}"


def test_every_report_is_linked_and_held_by_a_test(request):
    """Each once, under its number and address on GitHub, with what came of it and a test in the last column."""
    text = (request.config.rootpath / "tests" / "REPORTS.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| [")]
    reports = []
    for report, _, _, result, held_by in rows:
        owner, number, address = re.fullmatch(r" ?\[(\S+)#(\d+)\]\((\S+)\) .*", report).groups()
        assert re.fullmatch(rf"https://github.com/{owner}/(issues|pull)/{number}", address), report
        assert result.split(":")[0] in ("held", "mended", "refused"), result
        assert re.search("`test_\\w+`", held_by), report
        reports.append(address)
    assert len(reports) == len(set(reports)) >= 20

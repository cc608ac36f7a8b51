# SPDX-License-Identifier: Apache-2.0
"""Every README does what it says: Python blocks run, commands and links exist, numbers are those of the results."""

import ast
import collections
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import kinds
from helpers.models import make_model

from training.export import export_model
from training.paths import CLONE
from training.tables import rewrite_tables
from training.text.tokenizer import train_tokenizer


def find_pages() -> list[str]:
    """Return the paths of all Markdown pages below the clone that are part of the project, relative to it."""
    folders = (".", ".ci", *(path.name for path in CLONE.iterdir() if path.is_dir() and path.name[0] != "."))
    pages = {path for name in folders for path in (CLONE / name).glob("*.md" if name == "." else "**/*.md")}
    made = [CLONE / name for name in ("runs", "build", "dist")]
    return sorted(str(path.relative_to(CLONE)) for path in pages if not any(path.is_relative_to(it) for it in made))


def read(page: str) -> str:
    return (CLONE / page).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of these languages; "" is a block that names none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name in languages]


PAGES = find_pages()
READMES = [page for page in PAGES if Path(page).name == "README.md"]
# The cards of metrics have examples with outputs, which `test_cards_and_docstrings_do_what_they_say` compares.
SESSIONS = [page for page in READMES if blocks(read(page), "python") and "training/metrics/" not in page]
TABLES = [page for page in PAGES if "table_of(" in read(page)]


def test_all_readmes_are_found():
    folders = {"modeling_memory_mosaic", "configuration", "training", "training/results", "benchmarks", "tests"}
    assert {"README.md", *(f"{folder}/README.md" for folder in folders)} <= set(READMES)
    assert SESSIONS == ["README.md", "modeling_memory_mosaic/README.md"]


def test_the_front_page_is_short():
    assert len(read("README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", SESSIONS)
def test_python_blocks_run_in_order_in_one_session(page, tmp_path):
    """The session starts in a folder that holds an exported model where `make demo` puts its own, and nothing else."""
    tokenizer = train_tokenizer(["Once upon a time there was a cat. One day, a little ball."] * 3, vocab_size=300)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    export_model(make_model(vocab_size=300, **ids), tokenizer, tmp_path / "runs/demo/mosaic-demo-seed0/model")
    code = "\n".join(blocks(read(page), "python"))
    expected = {
        "README.md": ["MosaicMemory.union", "from_pretrained", "generate", "trainer.train()"],
        "modeling_memory_mosaic/README.md": ["memory_from_state_dict", "get_peft_model", "torch.export.export"],
    }
    assert all(call in code for call in expected[page])
    if page != "README.md":
        code += "\nassert not model.training"  # what is exported and saved must not drop out
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(CLONE)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "Do you wish to run the custom code" not in process.stdout, (
        "a question to the user in the middle of a block"
    )
    # What a user reads who has done nothing wrong.
    assert not re.search(r"past_key_values|cache_params|model of type|\bnan\b", process.stdout + process.stderr)


def test_examples_keep_the_tokenizer_of_a_memory():
    """Without it, a question by another tokenizer is not noticed."""
    examples = {page: "\n".join(blocks(read(page), "python")) for page in SESSIONS}
    folders = [CLONE / name for name in ("hub_cards/snippets", "hub_cards/space")]
    examples |= {str(path): path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py")}
    calls = [
        {keyword.arg for keyword in node.keywords}
        for code in examples.values()
        for node in ast.walk(ast.parse(re.sub(r"{[{%].*?[%}]}", "x", code)))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "memorize"
    ]
    assert len(calls) >= 3 and all("tokenizer" in names for names in calls)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    """Check targets of make, recipes and other files that a command names, and verbs of the command line."""
    from training.__main__ import app
    from training.commands import VERBS

    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), flags=re.MULTILINE))
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands = [line for block in blocks(read(page), "", "bash") for line in block.splitlines() if line]
    assert len(commands) >= {"README.md": 6, "training/README.md": 15, "CONTRIBUTING.md": 6}.get(page, 0)
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        if "training" in words[:-1]:
            assert words[words.index("training") + 1] in verbs, command
        if words[:1] == ["memory-mosaic"]:
            assert words[1] in {verb.__name__ for verb in VERBS}, command
        for word in words:
            if word.startswith(("configuration/", "hub_cards/", "benchmarks/")):
                assert (CLONE / word).is_file(), command


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (CLONE / page).parent / path if path else CLONE / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(str(file.resolve().relative_to(CLONE))), f"{page}: {target}"


def test_set_up_is_exactly_two_commands():
    section = read("README.md").split("## Set-up")[1].split("\n## ")[0]
    assert blocks(section, "") == ["make demo\nmake test\n"]


@pytest.mark.parametrize("command", ["dry-run", "--help"])
def test_the_command_line_answers(command):
    arguments = ["dry-run", "configuration/recipe/stories_tiny.yaml"] if command == "dry-run" else [command]
    subprocess.run([sys.executable, "-m", "training", *arguments], cwd=CLONE, check=True, capture_output=True)


@pytest.mark.parametrize("page", TABLES)
def test_numbers_are_those_of_the_result_files(page, tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(read(page), encoding="utf-8")
    rewrite_tables(copy)
    assert copy.read_text(encoding="utf-8") == read(page), "run `make tables`"


def test_make_tables_rewrites_every_page_with_tables():
    pages = re.search(r"^PAGES := ((?:.*\\\n)*.*)$", read("Makefile"), flags=re.MULTILINE)[1]
    assert sorted(pages.replace("\\\n", " ").split()) == TABLES


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


# A test without kinds is one of the model that its file is named after, else of the mosaic.
FILES = {"memory_model": {"memory model"}, "continuous": {"continuous"}, "classification": {"classifier"}}
FILES |= dict.fromkeys(("configuration", "adapters"), set(kinds.MODELS))  # they loop over all classes
FILES["identity"] = {"mosaic", "continuous"}
FILES |= dict.fromkeys(("v2", "naive_v2"), {"mosaic v2"})
# Tests of mosaics that are parametrised by fields, or by names of kinds of v2 in their place.
OF_V2 = re.compile("mosaic v2|V2_KINDS|by_bandwidth")


def runs_for_v2(decorators, short):
    """Return whether decorators, or what the file's own names in them stand for, name kinds of v2."""
    words = " ".join(map(ast.unparse, decorators))
    for _ in range(2):
        words += " ".join(ast.unparse(short[name]) for name in set(re.findall(r"\w+", words)) & short.keys())
    return OF_V2.search(words) is not None


def models_of_tests(folder):
    """Return, by test, all models that it runs for, and those that its decorator names."""
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
            if runs_for_v2(decorators, short):
                known[test.name].add("mosaic v2")
    return known, named


def test_promises_say_for_which_models_they_hold(request):
    """A promise holds for a model, is refused, or does not apply, with the reason."""
    folder = request.config.rootpath / "tests"
    known, named = models_of_tests(folder)
    header = f"| promise | tests | {' | '.join(kinds.MODELS)} |\n|{' --- |' * (2 + len(kinds.MODELS))}\n"
    table = (folder / "README.md").read_text(encoding="utf-8").split(header)[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert len(rows) > 40 and all(len(row) == 2 + len(kinds.MODELS) for row in rows)
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
    """Each report stands there once, with its number and address on GitHub, its result and a test."""
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

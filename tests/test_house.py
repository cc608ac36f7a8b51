# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that CONTRIBUTING.md states: the order of imports, the length of files, and plain words."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from training.paths import CLONE


ROOMS = ("modeling_memory_mosaic", "training", "benchmarks", "serving", "hub_cards", "tests", "configuration")
PYTHON = [path for room in ROOMS for path in sorted((CLONE / room).rglob("*.py"))]
ARCHAIC = re.compile(r"\b(whoever|nobody(?!/)|anew|had\s+better|told|whom|kin)\b", re.IGNORECASE)


def imported_names(path: Path, when_loaded: bool = False) -> Iterator[str]:
    """Yield the dotted names that a file imports (or imports when loaded); of `from a import b` both `a` and `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def code_lines(path: Path) -> int:
    """Return the number of a file's lines without blank lines, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and ast.get_docstring(node)]
    in_docstrings = {n for node in documented for n in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = [line.strip() for n, line in enumerate(source.splitlines(), 1) if n not in in_docstrings]
    return sum(line != "" and line[0] != "#" for line in lines)


def test_imports_go_down_the_order_of_rooms():
    section = (CLONE / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### The order of imports")[1]
    lines = re.findall(r"^(\d+)\. (.*)$", section.split("\n## ")[0], flags=re.MULTILINE)
    floors = {name: int(number) for number, names in lines for name in re.findall(r"`(\w+)`", names)}
    rooms = [path.relative_to(CLONE / "training").with_suffix("").parts for path in CLONE.glob("training/**/*.py")]
    assert floors.keys() == {room[0] for room in rooms} - {"__init__"}
    for room in rooms:
        for name in imported_names((CLONE / "training").joinpath(*room).with_suffix(".py")):
            target = name.split(".")[1] if name.startswith("training.") else room[0]
            assert target not in floors or target == room[0] or floors[room[0]] < floors[target], f"{room}: {name}"


def test_files_are_short_and_tests_do_not_import_each_other():
    assert not [str(path) for path in PYTHON if "tests" not in path.parts and code_lines(path) > 450]
    imports = [(path, name) for path in PYTHON if "tests" in path.parts for name in imported_names(path)]
    assert not [f"{path}: {name}" for path, name in imports if re.search(r"(^|\.)(test_|conftest)", name)]


def test_words_are_plain():
    pages = [
        path for room in ROOMS for ending in ("py", "md", "jinja") for path in (CLONE / room).rglob(f"*.{ending}")
    ]
    for path in (*pages, *CLONE.glob("*.md"), *CLONE.glob("*.toml")):
        if path != Path(__file__).resolve() and path.parent.parent.name != "results":  # stories are quoted there
            assert not (found := ARCHAIC.search(path.read_text(encoding="utf-8"))), f"{path}: {found}"


def test_what_is_installed_beside_the_models_imports_nothing_of_the_clone():
    allowed = {*sys.stdlib_module_names, "typer", "torch", "transformers", "modeling_memory_mosaic"}
    folder = CLONE / "training" / "commands"
    own = {path.stem for path in folder.glob("*.py")} | {"loading"}
    names = {name.split(".")[0] for path in folder.glob("*.py") for name in imported_names(path)}
    assert names <= allowed | own, names - allowed - own


def test_core_tests_load_with_what_the_oldest_environment_has():
    """What is imported when they load, here and in what they import; a test may skip without more (importorskip)."""
    core = re.search(r"^CORE := .*?test_,(.*?)\)$", (CLONE / "Makefile").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names = {f"payload.test_{name.removesuffix('.py')}" for name in core[1].replace("\\", " ").split()} | {"conftest"}
    allowed = set(
        "accelerate filelock huggingface_hub hypothesis pytest safetensors tokenizers torch transformers".split()
    )
    read: set[str] = set()
    while found := names - read:
        read |= found
        paths = [
            room / f"{name.replace('.', '/')}.py"
            for name in found
            for room in (CLONE / "tests", CLONE)
            if not name.startswith("modeling")
        ]
        names |= {name for path in paths if path.is_file() for name in imported_names(path, when_loaded=True)}
    assert len(read) > 100
    rooms = {"payload", "conftest", "helpers", "training", "modeling_memory_mosaic"}
    assert {name.split(".")[0] for name in read} <= {*sys.stdlib_module_names, *allowed, *rooms}

# SPDX-License-Identifier: Apache-2.0
"""What is checked of a published folder before anybody loads it, in an order in which no foreign code runs.

`check_folder` reads only: no pickles, checksums that hold, code that is this project's byte for byte, a licence.
`check_loads` then loads it as a stranger would, and `check_snippets` runs the code of its card.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import RepoCard
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from training.data import checksum
from training.evaluate import load_causal_lm
from training.export import run_isolated, verify_export
from training.hub import CARD, NOBODYS, published_files
from training.result import CLONE


PACKAGE, SPACE = CLONE / "modeling_memory_mosaic", CLONE / "hub_cards" / "space"
# Where a published code file comes from.
CODE = (PACKAGE, SPACE)
SUMS = "SHA256SUMS"
LICENSE = "LICENSE"
NAMES = (LICENSE, SUMS, *NOBODYS)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")


def check_folder(folder: Path) -> list[str]:
    """Check what can be seen without loading anything; returns what was found to be in order, in words.

    Raises:
        ValueError: a file is a pickle or of another unknown form, a checksum does not hold, code is not this
            project's, or the licence is missing or not the one that the card states.
    """
    return [check(folder) for check in (check_forms, check_sums, check_code, check_license)]


def check_forms(folder: Path) -> str:
    """Nothing that runs when it is loaded: each file is of a known form, and what its name says."""
    files = published_files(folder)
    for name in files:
        if name.endswith(PICKLES):
            raise ValueError(
                f"{name} is a pickle, which may run anything when it is loaded: keep weights as safetensors, and "
                f"remove it from {folder}"
            )
        if name in NAMES:
            continue
        form = next((form for form in FORMS if name.endswith(form)), None)
        if form is None:
            raise ValueError(f"{name} is none of {', '.join(FORMS)}: remove it from {folder}")
        if not FORMS[form](folder / name):
            raise ValueError(f"{name} is not what its name says: make it anew, or remove it from {folder}")
    return f"{len(files)} files, each what its name says, none a pickle"


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def _begins_with(start: bytes) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(start)) == start

    return check


# By the end of its name, how a file is known to be what it says. Other files have no business in a published folder.
FORMS = {
    ".safetensors": _is_safetensors,
    ".jsonl.gz": _begins_with(b"\x1f\x8b"),
    ".png": _begins_with(b"\x89PNG"),
    **dict.fromkeys((".json", ".jinja", ".txt", ".py", ".md"), _is_text),
}


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` in the form of `sha256sum`: of all files but itself and the card."""
    lines = [f"{checksum(folder / name)}  {name}\n" for name in _summed(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """sha256 by file name, from `SHA256SUMS`."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} has no {SUMS}: it was not published by `python -m training publish`")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def check_sums(folder: Path) -> str:
    """Every file is listed in `SHA256SUMS`, and none has changed."""
    listed, there = read_sums(folder), _summed(folder)
    missing, unlisted = sorted(listed.keys() - set(there)), sorted(set(there) - listed.keys())
    if missing or unlisted:
        raise ValueError(f"{SUMS} does not fit {folder}: missing files {missing}, files it does not list {unlisted}")
    changed = [name for name in there if checksum(folder / name) != listed[name]]
    if changed:
        raise ValueError(f"changed since they were published, by their sha256: {', '.join(changed)}")
    return f"{len(listed)} checksums hold"


def _summed(folder: Path) -> list[str]:
    return [name for name in published_files(folder) if name not in (CARD, SUMS, *NOBODYS)]


def check_code(folder: Path) -> str:
    """Every Python file is this project's, byte for byte, and no other would be fetched."""
    code = [name for name in published_files(folder) if name.endswith(".py")]
    for name in code:
        own = next((room / Path(name).name for room in CODE if (room / Path(name).name).is_file()), None)
        if own is None:
            raise ValueError(f"{name} is no file of this project: read it before you trust it")
        if (folder / name).read_bytes() != own.read_bytes():
            raise ValueError(f"{name} differs from this project's {own.name}: read it before you trust it")
    for name in ("config.json", "tokenizer_config.json"):
        mapped = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        for target in mapped.get("auto_map", {}).values():
            if f"{target.partition('.')[0]}.py" not in code:
                raise ValueError(f"`auto_map` in {name} leads to {target!r}, which is not in the folder")
    return f"{len(code)} Python files equal this project's, byte for byte"


def check_license(folder: Path) -> str:
    """The card states a licence; where that is this project's, its text is there, and every code file names it."""
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}: nobody would know what it is")
    stated = RepoCard.load(folder / CARD).data.to_dict().get("license")
    if not stated or stated == "unknown":
        raise ValueError(f"the card of {folder} states no licence: give one in its `license`")
    code = [name for name in published_files(folder) if name.endswith(".py")]
    for name in code:
        if "SPDX-License-Identifier: Apache-2.0" not in (folder / name).read_text(encoding="utf-8").splitlines()[0]:
            raise ValueError(f"{name} does not begin with its licence (SPDX-License-Identifier)")
    if code and (folder / LICENSE).read_bytes() != (CLONE / LICENSE).read_bytes():
        raise ValueError(f"the {LICENSE} of {folder} is not this project's, although its code is")
    return f"licence {stated}"


def check_lint(folder: Path) -> str:
    """`transformers-mlinter`, the linter of transformers' own models, finds nothing."""
    command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", str(folder.resolve())]
    process = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if process.returncode != 0:
        raise ValueError(f"transformers-mlinter:\n{process.stdout.strip()}{process.stderr.strip()}")
    return "transformers-mlinter is content"


def check_loads(
    folder: Path, prompts: list[str], base: Path | None = None, model: PreTrainedModel | None = None
) -> str:
    """A clean, offline process loads the folder and computes the very logits of a model here, bit for bit.

    Args:
        folder: a model's, or an adapter's of PEFT.
        prompts: are continued there.
        base: of an adapter, the folder of the model that it goes on top of.
        model: here; by default the folder, loaded with this clone's code.
    """
    if model is None:
        model = load_causal_lm(folder) if base is None else PeftModel.from_pretrained(load_causal_lm(base), folder)
    adapter = None if base is None else folder
    verify_export(base or folder, prompts, max_new_tokens=16, model=model, adapter=adapter)
    return "loads in a clean offline process, with equal logits"


def check_snippets(card: str, repositories: dict[tuple[str, str], Path]) -> str:
    """Every Python block of a card runs, as it stands, in a clean offline process.

    Args:
        card: its text.
        repositories: by id and pinned commit, the folders that a reader would have downloaded.
    """
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    each = "for n, block in enumerate(json.load(sys.stdin)): exec(compile(block, f'snippet {n}', 'exec'), {})"
    process = run_isolated(
        ["-c", f"import json, sys\n{each}"], json.dumps(blocks), lambda home: _put_into_cache(home, repositories)
    )
    if process.returncode != 0:
        failed = int(re.findall(r"snippet (\d+)", process.stderr)[-1])
        raise ValueError(f"this snippet of the card fails:\n\n{blocks[failed]}\n{process.stderr.strip()}")
    return f"{len(blocks)} snippets of the card run"


def _put_into_cache(home: Path, repositories: dict[tuple[str, str], Path]) -> None:
    """Lay folders out as `huggingface_hub` keeps what it has downloaded."""
    for (repo_id, commit), folder in repositories.items():
        repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        shutil.copytree(folder, repository / "snapshots" / commit)


def check_stories(folder: Path, num_stories: int) -> str:
    """A clean, offline process loads a data set by its card, with all its stories."""
    load = f"load_dataset({str(folder.resolve())!r}, split='train')"
    code = f"from datasets import load_dataset\nprint(len({load}['text']))"
    process = run_isolated(["-c", code])
    if process.returncode != 0:
        raise ValueError(f"{folder} does not load as a data set:\n{process.stderr.strip()}")
    found = int(process.stdout.split()[-1])
    if found != num_stories:
        raise ValueError(f"{folder} loads with {found} stories, but its result says {num_stories}")
    return f"loads in a clean offline process, with {found:,} stories"


def check_space(folder: Path) -> str:
    """A clean, offline process loads a Space's model through the code beside it, and traces a text."""
    code = f"import sys\nsys.path.insert(0, {str(folder.resolve())!r})\nimport app\n" + (
        f"app.write(*app.load({str(folder.resolve() / 'model')!r}), 'Once upon a time', 4, 0.0, 0)\n"
        "print(sys.modules['modeling_memory_mosaic'].__file__)"
    )
    process = run_isolated(["-c", code])
    if process.returncode != 0:
        raise ValueError(f"{folder} does not run as a Space:\n{process.stderr.strip()}")
    if not process.stdout.strip().endswith(str(folder.resolve() / "modeling_memory_mosaic" / "__init__.py")):
        raise ValueError(f"{folder} runs other code than what lies in it: {process.stdout.strip()}")
    return "runs as a Space in a clean offline process, by the code in it"

# SPDX-License-Identifier: Apache-2.0
"""What is checked of a published folder before anything of it is loaded or run. All of it only reads.

A folder is of one kind, holding what is published of that kind and nothing else: files that are what their names say,
no pickle or link among them; checksums that hold; code that is this project's, byte for byte; settings that lead to no
other code, weights or repository; a licence.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import RepoCard
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from training import hub
from training.card import STORIES
from training.data import checksum
from training.hub import CARD, NOBODYS, RESULT, SUMS, published_files
from training.result import CLONE


PACKAGE, SPACE = CLONE / "modeling_memory_mosaic", CLONE / "hub_cards" / "space"
LICENSE = "LICENSE"
# By kind, the file that only it has.
MARKERS = {"model": "config.json", "adapter": "adapter_config.json", "dataset": "stories.jsonl.gz", "space": "app.py"}
# By model type, whose files `save_pretrained` writes beside the weights.
CODE_OF = {"memory_mosaic": ("memory_mosaic",), "memory_model": ("memory_mosaic", "memory_model")}
_OF_ALL = (CARD, LICENSE, SUMS, RESULT, "results/*.json", "units.json", "*.png", *NOBODYS)
_OF_MODELS = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
FILES = {
    "model": _OF_MODELS,
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "dataset": ("stories.jsonl.gz", "rejected.jsonl"),
    "space": ("requirements.txt", *(f"model/{name}" for name in _OF_MODELS)),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
# Settings by which a library fetches or runs what is not in the folder, wherever they stand.
LEADING_ELSEWHERE = {
    *("auto_map", "custom_pipelines", "custom_generate", "transformers_weights", "trust_remote_code"),
    *("attn_implementation", "_attn_implementation", "auto_mapping", "megatron_config"),
}


def check_folder(folder: Path) -> list[str]:
    """Check a published folder without loading it; returns what was found to be in order, in words.

    Raises:
        ValueError: what is not.
    """
    return [check(folder) for check in (check_files, check_sums, check_code, check_settings, check_license)]


def kind_of(folder: Path) -> str:
    """`model`, `adapter`, `dataset` or `space`."""
    kinds = [kind for kind, marker in MARKERS.items() if (folder / marker).is_file()]
    if len(kinds) != 1:
        found = " and ".join(MARKERS[kind] for kind in kinds) or "none of " + ", ".join(MARKERS.values())
        raise ValueError(f"{folder} is not one thing that was published: it holds {found}")
    return kinds[0]


def check_files(folder: Path) -> str:
    """Every file is one of its kind's, and what its name says; `check_forms` alone is for what a run has written."""
    check_forms(folder)
    kind, files = kind_of(folder), published_files(folder)
    allowed = (*_OF_ALL, *FILES[kind], *_own_code(folder))
    for name in files:
        if not any(_fits(name, pattern) for pattern in allowed):
            raise ValueError(f"{name} is no file of a published {kind}: read it before you trust it, or remove it")
    return f"a {kind} of {len(files)} files, each what its name says, none a pickle"


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def check_forms(folder: Path) -> None:
    """Nothing that runs when it is loaded, whatever it is called."""
    for name in published_files(folder):
        if name.endswith(PICKLES):
            raise ValueError(
                f"{name} is a pickle, which may run anything when it is loaded: keep weights as safetensors, and "
                f"remove it from {folder}"
            )
        form = next((form for form in FORMS if name.endswith(form)), None)
        if form is not None and not FORMS[form](folder / name):
            raise ValueError(f"{name} is not what its name says: make it anew, or remove it from {folder}")


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


# By the end of its name, how a file is known to be what it says.
FORMS = {
    ".safetensors": _is_safetensors,
    ".jsonl.gz": _begins_with(b"\x1f\x8b"),
    ".png": _begins_with(b"\x89PNG"),
    **dict.fromkeys((".json", ".jsonl", ".jinja", ".txt", ".py", ".md", LICENSE, SUMS), _is_text),
}


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` in the form of `sha256sum`: of all files but itself and the card."""
    lines = [f"{checksum(folder / name)}  {name}\n" for name in _summed(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """sha256 by file name, from `SHA256SUMS`."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder} has no {SUMS}: it was not published by `python -m training publish`")
    return hub.read_sums(folder / SUMS)


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
    """The Python files are those that this project publishes with such a folder, byte for byte."""
    own = _own_code(folder)
    missing = sorted(own.keys() - set(published_files(folder)))
    if missing:
        raise ValueError(f"{folder} lacks code that is published with it: {', '.join(missing)}")
    for name, path in own.items():
        if (folder / name).read_bytes() != path.read_bytes():
            raise ValueError(f"{name} differs from this project's {path.name}: read it before you trust it")
    return f"{len(own)} Python files equal this project's, byte for byte" if own else "numbers and settings, no code"


def _own_code(folder: Path) -> dict[str, Path]:
    """The code that a folder ought to hold: by its name there, the file of this project."""
    kind = kind_of(folder)
    if kind == "model":
        return _code_of_model(folder)
    if kind != "space":
        return {}
    package = {f"{PACKAGE.name}/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    model = {f"model/{name}": path for name, path in _code_of_model(folder / "model").items()}
    return {"app.py": SPACE / "app.py"} | package | model


def _code_of_model(folder: Path) -> dict[str, Path]:
    model_type = read_object(folder / "config.json").get("model_type")
    if model_type not in CODE_OF:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not one of {', '.join(CODE_OF)}")
    parts = [f"{part}_{name}.py" for name in CODE_OF[model_type] for part in ("cache", "configuration", "modeling")]
    return {name: PACKAGE / name for name in ("adapters_memory_mosaic.py", *parts)}


def check_settings(folder: Path) -> str:
    """No setting leads to code, weights or a repository besides those that are checked."""
    files = published_files(folder)
    settings = [name for name in files if name.endswith(("config.json", ".index.json"))]
    for name in settings:
        content, beside = read_object(folder / name), PurePosixPath(name).parent
        if PurePosixPath(name).name == "config.json":
            _check_config(folder / name, content)
            content.pop("auto_map", None)
        for key, value in _entries(content):
            if key in LEADING_ELSEWHERE and value is not None:
                raise ValueError(f"`{key}` in {name} is {value!r}, which leads elsewhere: nothing published has it")
        for part in content.get("weight_map", {}).values():
            if (beside / str(part)).as_posix() not in files:
                raise ValueError(f"`weight_map` in {name} leads to {part!r}, which is not in the folder")
    if kind_of(folder) == "adapter":
        base_of_adapter(folder)
    if kind_of(folder) == "dataset" and (folder / CARD).is_file():
        configs = RepoCard.load(folder / CARD).data.to_dict().get("configs")
        if configs != STORIES:
            raise ValueError(f"`configs` in the card is {configs!r}, not {STORIES!r}: it would load something else")
    return f"{len(settings)} files of settings lead nowhere else"


def _check_config(path: Path, content: dict[str, Any]) -> None:
    model_type = content["model_type"]
    known = AutoConfig.for_model(model_type).to_dict().keys() | {"auto_map", "transformers_version"}
    unknown = sorted(content.keys() - known)
    if unknown:
        raise ValueError(f"{path.name} has settings that a {model_type} does not have: {', '.join(unknown)}")
    mapped = content.get("auto_map")
    for target in mapped.values() if isinstance(mapped, dict) else [mapped]:
        module = re.fullmatch(r"(\w+)\.\w+", target) if isinstance(target, str) else None
        if module is None or not (path.parent / f"{module[1]}.py").is_file():
            raise ValueError(f"`auto_map` in {path.name} leads to {target!r}, which is not in the folder")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value with what it has, however deep."""
    if isinstance(value, dict):
        yield from value.items()
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(part)


def base_of_adapter(folder: Path) -> tuple[str, str]:
    """Id and commit of the model that a published adapter goes on top of."""
    settings = read_object(folder / "adapter_config.json")
    base, commit = settings.get("base_model_name_or_path"), settings.get("revision")
    if not hub.REPO_ID.fullmatch(str(base)) or not hub.COMMIT.fullmatch(str(commit)):
        raise ValueError(f"adapter_config.json names {base!r} at {commit!r}, not a base on the Hub at a commit")
    return base, commit


def check_license(folder: Path) -> str:
    """The card, if there is one, states a licence; with code comes this project's, and every code file names it."""
    stated = "of the code alone: there is no card at this commit"
    if (folder / CARD).is_file():
        stated = RepoCard.load(folder / CARD).data.to_dict().get("license")
        if not stated or stated == "unknown":
            raise ValueError(f"the card of {folder} states no licence: give one in its `license`")
    code = [name for name in published_files(folder) if name.endswith(".py")]
    for name in code:
        if "SPDX-License-Identifier: Apache-2.0" not in (folder / name).read_text(encoding="utf-8").splitlines()[0]:
            raise ValueError(f"{name} does not begin with its licence (SPDX-License-Identifier)")
    if code and not (folder / LICENSE).is_file():
        raise ValueError(f"{folder} has code, but no {LICENSE}")
    if code and (folder / LICENSE).read_bytes() != (CLONE / LICENSE).read_bytes():
        raise ValueError(f"the {LICENSE} of {folder} is not this project's, although its code is")
    return f"licence {stated}"


def read_object(path: Path) -> dict[str, Any]:
    """Content of a file that holds a JSON object; `ValueError` if it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: it is damaged, or something else")
    return content

# SPDX-License-Identifier: Apache-2.0
"""What is checked of a published folder before anything of it is loaded or run. All of it only reads.

A folder is of one kind, holding what is published of that kind and nothing else: files that are what their names say,
no pickle or link among them; checksums that hold; code that is this project's, byte for byte; settings and a card such
as this project writes, which lead to no other code, weights or repository; finite weights; a licence. Who has written
the folder, none of this tells.
"""

import codecs
import fnmatch
import math
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from training import hub
from training.bounded import read_object
from training.hub import CARD, NOBODYS, RESULT, SUMS, published_files
from training.paths import CLONE
from training.publishing import allowed_values
from training.publishing.allowed_values import MODEL_TYPES
from training.text.sources import checksum


PACKAGE, SPACE = CLONE / "modeling_memory_mosaic", CLONE / "hub_cards" / "space"
LICENSE = "LICENSE"
# By kind, the file that only it has.
MARKERS = {"model": "config.json", "adapter": "adapter_config.json", "dataset": "stories.jsonl.gz", "space": "app.py"}
_OF_ALL = (CARD, LICENSE, SUMS, RESULT, "results/*.json", "units.json", "*.png", *NOBODYS)
_OF_MODELS = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
FILES = {
    "model": _OF_MODELS,
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "dataset": ("stories.jsonl.gz", "rejected.jsonl"),
    "space": tuple(f"model/{name}" for name in _OF_MODELS),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
# What is shown in cards, pages and terminals, and is a path.
NAME = re.compile(r"(?:[\w.][\w.+=@-]*/)*[\w.][\w.+=@-]*", re.ASCII)

# Lines of `.gitattributes`, as the Hub writes them.
_ATTRIBUTES = re.compile(r"(?:(?:\S+ filter=lfs diff=lfs merge=lfs -text|#[^\n]*)?\n)*")


def check_folder(folder: Path) -> list[str]:
    """Check a published folder without loading it; returns what was found to be in order, in words.

    Raises:
        ValueError: what is not.
    """
    checks = (check_files, check_sums, check_code, check_settings, check_weights, check_license)
    return [check(folder) for check in checks]


def kind_of(folder: Path) -> str:
    """`model`, `adapter`, `dataset` or `space`."""
    kinds = [kind for kind, marker in MARKERS.items() if (folder / marker).is_file()]
    if len(kinds) != 1:
        found = " and ".join(MARKERS[kind] for kind in kinds) or "none of " + ", ".join(MARKERS.values())
        raise ValueError(f"{folder} is not one thing that was published: it holds {found}")
    return kinds[0]


def check_files(folder: Path) -> str:
    """Every file is one of its kind's, and what its name says; `check_forms` alone is for what a run has written."""
    for name in published_files(folder):
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!a} is the name of a file with signs that no published one has: remove it")
    check_forms(folder)
    kind, files = kind_of(folder), published_files(folder)
    allowed = (*_OF_ALL, *FILES[kind], *_own_code(folder))
    for name in files:
        if not any(_fits(name, pattern) for pattern in allowed):
            raise ValueError(f"{name} is no file of a published {kind}: read it before you trust it, or remove it")
        if name.endswith(".json"):
            read_object(folder / name)  # which says if it cannot be
        if name in NOBODYS and not _ATTRIBUTES.fullmatch((folder / name).read_text(encoding="utf-8")):
            raise ValueError(f"{name} does more than to keep files in the Hub's storage: remove it")
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
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                if b"\0" in chunk:
                    return False
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


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
    """The code, and what it asks to be installed, is what this project publishes with such a folder, byte for byte."""
    own = _own_code(folder)
    missing = sorted(own.keys() - set(published_files(folder)))
    if missing:
        raise ValueError(f"{folder} lacks code that is published with it: {', '.join(missing)}")
    for name, path in own.items():
        if (folder / name).read_bytes() != path.read_bytes():
            raise ValueError(f"{name} differs from this project's {path.name}: read it before you trust it")
    return f"{len(own)} files of code equal this project's, byte for byte" if own else "numbers and settings, no code"


def _own_code(folder: Path) -> dict[str, Path]:
    """The code that a folder ought to hold: by its name there, the file of this project."""
    kind = kind_of(folder)
    if kind == "model":
        return _code_of_model(folder)
    if kind != "space":
        return {}
    # What it installs is run as well.
    space = {name: SPACE / name for name in ("app.py", "requirements.txt")}
    package = {f"{PACKAGE.name}/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    model = {f"model/{name}": path for name, path in _code_of_model(folder / "model").items()}
    return space | package | model


def _code_of_model(folder: Path) -> dict[str, Path]:
    model_type = read_object(folder / "config.json").get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not one of {', '.join(MODEL_TYPES)}")
    modeling = PACKAGE / f"modeling_{model_type}.py"
    # As the library collects them when it saves and loads a model.
    files = [modeling, *map(Path, get_relative_import_files(modeling))]
    return {path.name: path for path in sorted(files)}


def check_settings(folder: Path) -> str:
    """Settings are such as this project writes, and lead to no code, weights or repository besides those checked."""
    kind, files = kind_of(folder), published_files(folder)
    settings = [name for name in files if name.endswith(("config.json", ".index.json", "special_tokens_map.json"))]
    for name in settings:
        content, own = read_object(folder / name), PurePosixPath(name).name
        if own == "config.json":
            content.pop("auto_map", None)  # compared by itself
        if own == "adapter_config.json":
            content.pop("base_model_name_or_path", None)
        if own == "generation_config.json":
            config = read_object((folder / name).with_name("config.json"))
            allowed_values.check_generation(name, content, config)
        if own != "model.safetensors.index.json":
            allowed_values.check_values(name, content)
        if own in ("config.json", "generation_config.json"):
            allowed_values.check_words(name, content)
    if kind in ("model", "space"):
        allowed_values.check_tokenizer(model_in(folder))
    if kind == "adapter":
        allowed_values.check_adapter(folder)
    card = allowed_values.check_card(folder, kind)
    return f"{len(settings)} files of settings lead nowhere else; {card}"


def model_in(folder: Path) -> Path:
    """Where the model lies that a folder holds: of a Space, a folder in it."""
    return folder / "model" if kind_of(folder) == "space" else folder


def check_weights(folder: Path) -> str:
    """The weights are those that are loaded, finite, and those of the model that the settings describe."""
    kind = kind_of(folder)
    if kind == "dataset":
        return "no weights"
    place = model_in(folder)
    files = allowed_values.weight_files(place, published_files(place), adapter=kind == "adapter")
    for path in files:
        allowed_values.check_metadata(path)
    found = allowed_values.shapes(files)
    if kind == "adapter":
        others = sorted(name for name in found if ".lora_" not in name)
        if others:
            raise ValueError(f"{others[0]!r} in adapter_model.safetensors is no part of LoRA")
    else:
        numbers = sum(map(math.prod, found.values()))
        allowed_values.check_config(place / "config.json", numbers, len(found))
        allowed_values.check_filled(place, found)
    return allowed_values.check_finite(files)


def check_license(folder: Path) -> str:
    """The card, if there is one, states a licence; with code comes this project's, and every code file names it."""
    stated = "of the code alone: there is no card at this commit"
    if (folder / CARD).is_file():
        stated = allowed_values.card_data(folder / CARD).get("license")
        if not isinstance(stated, str) or stated == "unknown" or not re.fullmatch(r"[\w.+-]+", stated):
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

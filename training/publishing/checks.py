# SPDX-License-Identifier: Apache-2.0
"""Checks of a published folder before anything of it is loaded or run: they only read.

A folder is of one type and holds what is published of that type, and nothing else. Its files are what their names
say, with no pickle or link among them. Its checksums hold. Its code is this project's, byte for byte. Its settings and
its card are such as this project writes, and lead to no other code, weights or repository. Its weights are finite. It
has a licence. The checks cannot tell who wrote the folder.
"""

import codecs
import fnmatch
import functools
import math
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files

from training.files import checksum
from training.paths import CLONE
from training.progress import in_steps, progress
from training.publishing import allowed_values, memory_checks, vector_checks
from training.publishing.allowed_values import MODEL_TYPES
from training.publishing.folder import (
    CARD,
    HUB_FILES,
    LICENSE,
    MARKERS,
    RESULT,
    SUMS,
    folder_type,
    model_folder,
    published_files,
    read_sums,
    summed_files,
)
from training.text.story_selection import REJECTED_FILE, STORIES_FILE
from training.untrusted import read_object


PACKAGE, SPACE = CLONE / "modeling_memory_mosaic", CLONE / "hub_cards" / "space"
# A Space installs what its requirements name, so they are code too.
SPACE_CODE = (
    "app.py",
    "marked.py",
    "memories.py",
    "page.css",
    "requirements.txt",
    "shared.py",
    "texts.py",
    "vectors.py",
)
_COMMON_FILES = (CARD, LICENSE, SUMS, RESULT, "results/*.json", "units.json", "*.png", *HUB_FILES)
_MODEL_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
_FILES_BY_TYPE = {
    "model": _MODEL_FILES,
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "dataset": (STORIES_FILE, REJECTED_FILE),
    "space": tuple(f"model/{name}" for name in _MODEL_FILES),
    "memory": (MARKERS["memory"],),
    "vectors": (MARKERS["vectors"],),
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
# Names appear in cards, pages and terminals, and are paths: no other character is safe in all of them.
_SAFE_NAME = re.compile(r"(?:[\w.][\w.+=@-]*/)*[\w.][\w.+=@-]*", re.ASCII)
# The lines that the Hub writes to `.gitattributes`. Others can make git run a program.
_HUB_ATTRIBUTES = re.compile(r"(?:(?:\S+ filter=lfs diff=lfs merge=lfs -text|#[^\n]*)?\n)*")


def _fits(name: str, pattern: str) -> bool:
    """Whether a path fits a pattern whose `*` matches no slash."""
    return fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


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
            # In pieces, because stories may be larger than the memory. A piece may end within a character.
            while chunk := file.read(2**20):
                if b"\0" in chunk:  # valid UTF-8, but not in a text
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


# For each ending of a name, the test whether a file has the format that the ending promises.
FORMATS: dict[str, Callable[[Path], bool]] = {
    ".safetensors": _is_safetensors,
    ".jsonl.gz": _begins_with(b"\x1f\x8b"),
    ".png": _begins_with(b"\x89PNG"),
    ".parquet": _begins_with(b"PAR1"),
    **dict.fromkeys((".json", ".jsonl", ".jinja", ".txt", ".py", ".css", ".md", LICENSE, SUMS), _is_text),
}


def check_formats(folder: Path) -> None:
    """Raise `ValueError` if a file is a pickle, or is not what its name says.

    A folder that a run has written gets this check alone before its files are copied.
    """
    for name in published_files(folder):
        if name.endswith(PICKLES):
            raise ValueError(
                f"{name} is a pickle, which may run anything when it is loaded: keep weights as safetensors, and "
                f"remove it from {folder}"
            )
        ending = next((ending for ending in FORMATS if name.endswith(ending)), None)
        if ending is not None and not FORMATS[ending](folder / name):
            raise ValueError(f"{name} is not what its name says: make it again, or remove it from {folder}")


def _model_code(folder: Path) -> dict[str, Path]:
    """Return the code of the model in a folder, as the library collects it when it saves or loads the model."""
    model_type = read_object(folder / "config.json").get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not one of {', '.join(MODEL_TYPES)}")
    modeling = PACKAGE / f"modeling_{model_type}.py"
    files = [modeling, *map(Path, get_relative_import_files(modeling))]
    return {path.name: path for path in sorted(files)}


def expected_code(folder: Path) -> dict[str, Path]:
    """Return the code that a folder has to hold: by its name there, the file of this project."""
    type_ = folder_type(folder)
    if type_ == "model":
        return _model_code(folder)
    if type_ != "space":
        return {}
    space = {name: SPACE / name for name in SPACE_CODE}
    package = {f"{PACKAGE.name}/{path.name}": path for path in sorted(PACKAGE.glob("*.py"))}
    model = {f"model/{name}": path for name, path in _model_code(folder / "model").items()}
    return space | package | model


def check_files(folder: Path) -> str:
    """Check that every file belongs to the folder's type and is what its name says."""
    for name in published_files(folder):
        if not _SAFE_NAME.fullmatch(name):
            raise ValueError(f"{name!a} is the name of a file with signs that no published one has: remove it")
    check_formats(folder)
    type_, files = folder_type(folder), published_files(folder)
    allowed = (*_COMMON_FILES, *_FILES_BY_TYPE[type_], *expected_code(folder))
    for name in files:
        if not any(_fits(name, pattern) for pattern in allowed):
            raise ValueError(f"{name} is no file of a published {type_}: read it before you trust it, or remove it")
        if name.endswith(".json"):
            read_object(folder / name)  # raises if it holds no object
        if name in HUB_FILES and not _HUB_ATTRIBUTES.fullmatch((folder / name).read_text(encoding="utf-8")):
            raise ValueError(f"{name} does more than to keep files in the Hub's storage: remove it")
    return f"a {type_} of {len(files)} files, each what its name says, none a pickle"


def check_sums(folder: Path) -> str:
    """Check that `SHA256SUMS` lists every file, and that no file has changed."""
    listed, present = read_sums(folder), summed_files(folder)
    missing, unlisted = sorted(listed.keys() - set(present)), sorted(set(present) - listed.keys())
    if missing or unlisted:
        raise ValueError(f"{SUMS} does not fit {folder}: missing files {missing}, files it does not list {unlisted}")
    changed = [name for name in progress(present, "checksums", "file") if checksum(folder / name) != listed[name]]
    if changed:
        raise ValueError(f"changed since they were published, by their sha256: {', '.join(changed)}")
    return f"{len(listed)} checksums hold"


def check_code(folder: Path) -> str:
    """Check that the code is what this project publishes with such a folder, byte for byte."""
    expected, present = expected_code(folder), set(published_files(folder))
    # First, because a folder of another version may also lack files that this version has added.
    for name in sorted(expected.keys() & present):
        if (folder / name).read_bytes() != expected[name].read_bytes():
            raise ValueError(
                f"{name} differs from this project's {expected[name].name}: read it before you trust it, or check the "
                "folder with the version of this project that published it"
            )
    missing = sorted(expected.keys() - present)
    if missing:
        raise ValueError(f"{folder} lacks code that is published with it: {', '.join(missing)}")
    if not expected:
        return "numbers and settings, no code"
    return f"{len(expected)} files of code equal this project's, byte for byte"


def _check_settings_file(folder: Path, name: str) -> None:
    content, file = read_object(folder / name), PurePosixPath(name).name
    # `check_values` would refuse these two settings. `check_weights` compares the first, `check_adapter` the second.
    if file == "config.json":
        content.pop("auto_map", None)
    if file == "adapter_config.json":
        content.pop("base_model_name_or_path", None)
    if file == "generation_config.json":
        config = read_object((folder / name).with_name("config.json"))
        allowed_values.check_generation(name, content, config)
    # The index names files, and `check_weights` compares them with those that are there.
    if file != "model.safetensors.index.json":
        allowed_values.check_values(name, content)
    if file in ("config.json", "generation_config.json"):
        allowed_values.check_words(name, content)


def check_settings(folder: Path) -> str:
    """Check that settings are such as this project writes, and lead to no other code, weights or repository."""
    type_, files = folder_type(folder), published_files(folder)
    # By its end, `config.json` of generation, tokenizer and adapter too.
    settings = [name for name in files if name.endswith(("config.json", ".index.json", "special_tokens_map.json"))]
    for name in settings:
        _check_settings_file(folder, name)
    if type_ in ("model", "space"):
        allowed_values.check_tokenizer(model_folder(folder))
    if type_ == "adapter":
        allowed_values.check_adapter(folder)
    # They have no file of settings: these stand in the header of a memory's tensors, and in each row of vectors.
    statements = {"memory": memory_checks.check_statements, "vectors": vector_checks.check_statements}
    stated = f"{statements[type_](folder)}; " if type_ in statements else ""
    card = allowed_values.check_card(folder, type_)
    return f"{stated}{len(settings)} files of settings lead nowhere else; {card}"


def check_weights(folder: Path) -> str:
    """Check that weights are loaded whole, finite, and those of the model that the settings describe."""
    type_ = folder_type(folder)
    if type_ == "dataset":
        return "no weights"
    if type_ == "memory":
        return memory_checks.check_pairs(folder)
    if type_ == "vectors":
        return vector_checks.check_vectors(folder)
    place = model_folder(folder)
    files = allowed_values.weight_files(place, published_files(place), is_adapter=type_ == "adapter")
    for path in files:
        allowed_values.check_weights_header(path)
    shapes = allowed_values.tensor_shapes(files)
    if type_ == "adapter":
        others = sorted(name for name in shapes if ".lora_" not in name)
        if others:
            raise ValueError(f"{others[0]!r} in adapter_model.safetensors is no part of LoRA")
    else:
        num_values = sum(map(math.prod, shapes.values()))
        allowed_values.check_config(place / "config.json", num_values, len(shapes))
        allowed_values.check_shapes(place, shapes)
    return allowed_values.check_finite(files)


def _stated_license(folder: Path) -> str:
    if not (folder / CARD).is_file():
        return "of the code alone: there is no card at this commit"
    stated = allowed_values.card_data(folder / CARD).get("license")
    # A recipe for stories has `unknown` if it names no licence.
    if not isinstance(stated, str) or stated == "unknown" or not re.fullmatch(r"[\w.+-]+", stated):
        raise ValueError(f"the card of {folder} states no licence: give one in its `license`")
    return stated


def check_license(folder: Path) -> str:
    """Check that the card states a licence, and that code has this project's licence and names it in every file."""
    stated = _stated_license(folder)
    code = [name for name in published_files(folder) if name.endswith(".py")]
    for name in code:
        if "SPDX-License-Identifier: Apache-2.0" not in (folder / name).read_text(encoding="utf-8").splitlines()[0]:
            raise ValueError(f"{name} does not begin with its licence (SPDX-License-Identifier)")
    if code and not (folder / LICENSE).is_file():
        raise ValueError(f"{folder} has code, but no {LICENSE}")
    if code and (folder / LICENSE).read_bytes() != (CLONE / LICENSE).read_bytes():
        raise ValueError(f"the {LICENSE} of {folder} is not this project's, although its code is")
    return f"licence {stated}"


def check_folder(folder: Path) -> list[str]:
    """Check a published folder without loading it.

    Returns:
        One line for each check: what it has found to be in order.

    Raises:
        ValueError: a check fails; the message says what is wrong and what to do.
    """
    # Files first, because all others read them.
    checks = (check_files, check_sums, check_code, check_settings, check_weights, check_license)
    # By the names of the functions: `check_files` is files.
    steps = [(check.__name__.removeprefix("check_"), functools.partial(check, folder)) for check in checks]
    return list(in_steps("checks", steps))

# SPDX-License-Identifier: Apache-2.0
"""Allowed values: what the settings, the card and the weights of a published folder may say.

Loading and the Hub act upon values: a setting can name another repository, a card another program, a tokenizer a word
that ends every text. So a value is allowed only if this project could have written it. There is no list of forbidden
values, which would always lack one.
"""

import functools
import importlib
import importlib.metadata
import math
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from training.card import MEMORY_LIBRARY, STORIES, VECTORS, render
from training.hub import COMMIT, REPO_ID
from training.progress import progress
from training.publishing.folder import CARD
from training.publishing.memory_checks import read_result
from training.untrusted import parse_yaml, read_object, walk


# Models that are published with their code: `save_pretrained` writes it beside the weights.
MODEL_TYPES = ("memory_mosaic", "memory_mosaic_v2", "memory_model")
# By these settings, at any depth, a library fetches or runs something that is not in the folder.
CODE_LOADING_KEYS = {
    *("auto_map", "custom_pipelines", "custom_generate", "transformers_weights", "trust_remote_code"),
    *("attn_implementation", "_attn_implementation", "auto_mapping", "megatron_config"),
    *("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file", "chat_template"),
}
# A repository, an address or a path; a token of text such as </s> does not match.
_REFERENCE = re.compile(rf"{REPO_ID.pattern}(--.*)?|.*://.*|[/~].*|\.\.?[/\\].*", re.DOTALL)
GENERATION_SETTINGS = {
    *("_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"),
}
TOKENIZER_SETTINGS = {
    *("backend", "tokenizer_class", "model_max_length", "padding_side", "truncation_side", "model_input_names"),
    *("clean_up_tokenization_spaces", "add_prefix_space", "add_bos_token", "add_eos_token", "trim_offsets"),
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"),
    *("errors", "is_local", "split_special_tokens", "transformers_version", "legacy"),
    *(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")),
}
# Settings of PEFT that a recipe decides, and those that publishing and PEFT itself write.
ADAPTER_SETTINGS = {"r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"}
_PROVENANCE_SETTINGS = {"base_model_name_or_path", "revision", "peft_version", "inference_mode"}
CARD_KEYS = {
    "model": {
        *("license", "language", "library_name", "pipeline_tag", "tags", "datasets", "metrics"),
        *("base_model", "base_model_relation", "model-index", "model_name"),
    },
    "dataset": {"license", "language", "task_categories", "size_categories", "tags", "pretty_name", "configs"},
}
CARD_KEYS["adapter"] = CARD_KEYS["model"]
CARD_KEYS["vectors"] = {"license", "language", "tags", "pretty_name", "configs"}
CARD_KEYS["memory"] = CARD_KEYS["model"] - {"pipeline_tag", "metrics", "base_model_relation", "model-index"}
# A setting with "layer" in its name may exceed the depth of the model, but not by any amount: each layer takes memory.
MOST_LAYERS = 1000
# Floating-point types, as safetensors names them.
DTYPES = {"F64", "F32", "F16", "BF16"}


def _mapped_classes(path: Path, auto_map: Any) -> set[str]:
    """Return the names of the classes in `auto_map`; each has to be a class of this project for its purpose."""
    names = set()
    for purpose, target in auto_map.items() if isinstance(auto_map, dict) else [(None, auto_map)]:
        reference = re.fullmatch(r"(\w+)\.(\w+)", target) if isinstance(target, str) else None
        if reference is None or not (path.parent / f"{reference[1]}.py").is_file():
            raise ValueError(f"`auto_map` in {path.name} leads to {target!r}, which is not in the folder")
        module, name = reference.groups()
        ours = getattr(importlib.import_module(f"modeling_memory_mosaic.{module}"), name, None)
        base_class = PreTrainedConfig if purpose == "AutoConfig" else PreTrainedModel
        if not str(purpose).startswith("Auto") or not isinstance(ours, type) or not issubclass(ours, base_class):
            raise ValueError(f"`auto_map` in {path.name} has {target!r} for {purpose!r}, which is no class for that")
        names.add(name)
    return names


def _check_model_settings(name: str, content: dict[str, Any], types: tuple[str, ...]) -> None:
    """Check a configuration of one of these model types, and every configuration within it."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in types:
        raise ValueError(f"{name} has a part of the type {model_type!r}, which this project makes no models of")
    defaults = AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(content.keys() - defaults.keys() - {"transformers_version"})
    if unknown:
        raise ValueError(f"{name} has settings that a {model_type} does not have: {', '.join(map(ascii, unknown))}")
    for key, default in defaults.items():
        if isinstance(default, dict) and "model_type" in default and content.get(key) is not None:
            if not isinstance(content[key], dict):
                raise ValueError(f"`{key}` in {name} is {content[key]!r}, not the settings of a model")
            # Encoder and decoder of a memory model may be of any type that the library knows.
            _check_model_settings(name, content[key], (*MODEL_TYPES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def check_config(path: Path, num_values: int, num_tensors: int) -> None:
    """Check that a `config.json` has the settings of its model type and no other, in sizes that its weights can fill.

    Args:
        path: the file.
        num_values: how many numbers the weights hold.
        num_tensors: how many tensors hold them.
    """
    content = read_object(path)
    classes = _mapped_classes(path, content.pop("auto_map", None))
    unmapped = [name for name in content.get("architectures") or [] if name not in classes]
    if unmapped:
        raise ValueError(f"`architectures` in {path.name} names {unmapped[0]!r}, which is no class of `auto_map`")
    _check_model_settings(path.name, content, MODEL_TYPES)
    for _, key, value in walk(content):
        if "layer" in key and type(value) is int and value > max(num_tensors, MOST_LAYERS):
            raise ValueError(f"`{key}` in {path.name} is {value}, but the weights have {num_tensors} tensors")
        is_size = key.startswith(("num_", "n_")) or key.endswith("_size")
        # Some settings count nothing that has weights, such as a window: a small model may have larger ones.
        if is_size and type(value) is int and not -1 <= value <= max(num_values, 10**6):
            raise ValueError(f"`{key}` in {path.name} is {value}, but the weights have {num_values:,} numbers")


def check_values(name: str, content: dict[str, Any]) -> None:
    """Check that no setting of a file, at any depth, is a repository, an address, a path or no finite number."""
    for _, key, value in walk(content):
        if key in CODE_LOADING_KEYS and value not in (None, ""):
            raise ValueError(f"`{key}` in {name} is {value!r}, which leads elsewhere: nothing published has it")
        if isinstance(value, str) and _REFERENCE.fullmatch(value):
            raise ValueError(f"`{key}` in {name} names {value!r}: nothing published leads elsewhere")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{key}` in {name} is {value}, which is no number to compute with")


def check_words(name: str, content: dict[str, Any]) -> None:
    """Check that keys and texts in settings of a model are plain names, as classes, types and versions have them."""
    for _, key, value in walk(content):
        for text in (key, value):
            if isinstance(text, str) and not re.fullmatch(r"[\w.+-]{0,100}", text, re.ASCII):
                raise ValueError(f"{name} has {text!a}, where names of types and classes stand")


def check_generation(name: str, content: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that generation settings name the special tokens of the model and leave all else at its default.

    Args:
        name: of the file, for messages.
        content: of the file.
        config: content of the `config.json` beside it.
    """
    defaults = GenerationConfig().to_dict()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if content.get(key) != config.get(key):
            raise ValueError(f"`{key}` in {name} is {content.get(key)!r}, but {config.get(key)!r} in config.json")
    for key, value in content.items():
        is_switched_off = key in ("output_attentions", "output_hidden_states") and value is False
        if key in GENERATION_SETTINGS or is_switched_off or (key in defaults and value == defaults[key]):
            continue
        raise ValueError(f"`{key}` in {name} is {value!r}: a published model leaves the way of generating to its user")


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the ids by token of a `tokenizer.json`; tokens in a list have their places as ids."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        return {str(place): place for place in range(len(vocabulary))}
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise ValueError("tokenizer.json has no vocabulary of tokens and their ids")
    return vocabulary


def _added_tokens(tokenizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the added tokens of a `tokenizer.json` by their text."""
    added = {}
    for token in tokenizer.get("added_tokens") or []:
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        if not is_token:
            raise ValueError(f"tokenizer.json lists {token!r} as an added token, which has no text or no id")
        added[token["content"]] = token
    return added


def _text(token: Any) -> Any:
    """Return the text of a token, which a file states alone or in an object with more of its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _check_special_tokens(name: str, content: dict[str, Any], added: dict[str, dict[str, Any]]) -> None:
    """Check that all tokens in a file of settings are special tokens of the tokenizer.

    Args:
        name: of the file, for messages.
        content: of the file.
        added: added tokens of `tokenizer.json` by their text.
    """
    # Other versions of the library write other switches and numbers, and those lead nowhere.
    plain = {key for key, value in content.items() if isinstance(value, (bool, int, float, type(None)))}
    unknown = sorted(content.keys() - TOKENIZER_SETTINGS - plain)
    if unknown:
        raise ValueError(f"{name} has settings that no tokenizer here has: {', '.join(map(ascii, unknown))}")
    special = [content[key] for key in content if key.endswith("_token") and not key.startswith("add_")]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        tokens = content.get(key) or []
        special += tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else [tokens]
    for text in filter(None, map(_text, special)):
        if not isinstance(text, str) or not added.get(text, {}).get("special"):
            raise ValueError(
                f"{text!r} in {name} is no special token of tokenizer.json, which the model was trained with"
            )
    text_by_id = {token["id"]: text for text, token in added.items()}
    listed = content.get("added_tokens_decoder") or {}
    for number, token in listed.items() if isinstance(listed, dict) else [("?", listed)]:
        if not str(number).isdecimal() or text_by_id.get(int(number)) != _text(token):
            raise ValueError(f"`added_tokens_decoder` in {name} has {number}: {token!r}, which tokenizer.json has not")


def check_tokenizer(folder: Path) -> None:
    """Check that a tokenizer's special tokens are its own, are marked as special, and are those of the model.

    A chat template is a program that runs when a chat is formatted, and no model here is trained on chats: none is
    published, and none is allowed.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer, config = read_object(folder / "tokenizer.json"), read_object(folder / "config.json")
    vocabulary, added = _vocabulary(tokenizer), _added_tokens(tokenizer)
    ids = {**vocabulary, **{text: token["id"] for text, token in added.items()}}
    # The vocabulary of a memory model is that of its decoder.
    size = config.get("vocab_size") or (config.get("decoder") or {}).get("vocab_size")
    if ids and type(size) is int and max(ids.values()) >= size:
        raise ValueError(f"tokenizer.json has the id {max(ids.values())}, but the model has {size} tokens")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            _check_special_tokens(name, content, added)
            for key in ("bos_token", "eos_token", "pad_token"):
                # `_check_special_tokens` has made sure that the text is among the added tokens.
                text, expected = _text(content.get(key)), config.get(f"{key}_id")
                if text is not None and type(expected) is int and added[text]["id"] != expected:
                    raise ValueError(f"`{key}` in {name} is {text!r}, but the model's has the id {expected}")


def base_of_adapter(folder: Path) -> tuple[str, str]:
    """Return repository and commit of the model that a published adapter changes."""
    settings = read_object(folder / "adapter_config.json")
    base, commit = settings.get("base_model_name_or_path"), settings.get("revision")
    if not REPO_ID.fullmatch(str(base)) or not COMMIT.fullmatch(str(commit)):
        raise ValueError(f"adapter_config.json names {base!r} at {commit!r}, not a base on the Hub at a commit")
    return str(base), str(commit)


def check_adapter(folder: Path) -> None:
    """Check that an adapter is LoRA as recipes set it, with all other settings at PEFT's defaults."""
    base_of_adapter(folder)
    name, content = "adapter_config.json", read_object(folder / "adapter_config.json")
    if content.get("peft_type") != "LORA":
        raise ValueError(f"`peft_type` in {name} is {content.get('peft_type')!r}: adapters here are LORA")
    defaults = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for key, value in content.items():
        if key in _PROVENANCE_SETTINGS or key in ADAPTER_SETTINGS:
            continue
        # Enums are compared by value; an empty table or list equals None.
        if key not in defaults or (value or None) != (getattr(defaults[key], "value", defaults[key]) or None):
            raise ValueError(f"`{key}` in {name} is {value!r}: no adapter of this project has that")
    for key in ("target_modules", "target_parameters"):
        # PEFT reads a single text as a regular expression, which may run for ever.
        names = content.get(key) or []
        is_list = isinstance(names, list)
        if not is_list or not all(isinstance(one, str) and re.fullmatch(r"[\w.]+", one) for one in names):
            raise ValueError(f"`{key}` in {name} is {names!r}, not a list of names")
    for key in ("r", "lora_alpha", "lora_dropout"):
        if type(content.get(key)) not in (int, float) or not 0 <= content[key] <= 10**6:
            raise ValueError(f"`{key}` in {name} is {content.get(key)!r}, not a number that it could be")


def card_data(path: Path) -> dict[str, Any]:
    """Return the metadata of a card, the YAML at its beginning; `ValueError` if it is no table of plain values."""
    block = REGEX_YAML_BLOCK.match(path.read_text(encoding="utf-8"))
    data = parse_yaml(block[2], f"the metadata of {path}") if block else {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"the metadata of {path} are no table of values by name")
    return data


def package_requirements() -> list[Requirement]:
    """Return what the installed package requires, those of its extras included."""
    return [Requirement(line) for line in importlib.metadata.requires("modeling-memory-mosaic") or []]


@functools.cache
def _gradio_range() -> SpecifierSet:
    """Return the versions of gradio that the package asks for."""
    return next(requirement.specifier for requirement in package_requirements() if requirement.name == "gradio")


def _check_space_card(data: dict[str, Any]) -> None:
    """Compare the metadata of a Space with those that this project writes.

    By them, the Hub chooses what the Space runs on and what it installs.
    """
    models, version = data.get("models"), data.get("sdk_version")
    if not isinstance(models, list) or len(models) != 1 or not REPO_ID.fullmatch(str(models[0])):
        raise ValueError(f"`models` in the card is {models!r}, not the one model that the Space shows")
    try:
        fits = isinstance(version, str) and Version(version) in _gradio_range()
    except InvalidVersion:
        fits = False
    if not fits:
        raise ValueError(f"`sdk_version` in the card is {version!r}, not one of gradio {_gradio_range()}")
    # Only the metadata are compared. The numbers stand in the text, so any will do.
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_persistent_slots")
    architecture = dict.fromkeys(names, 0)
    placeholders = {"result": {"parameters": 0, "architecture": architecture}, "gradio_version": version}
    text = render("space/README.md.jinja", repo_id=models[0], **placeholders)
    block = REGEX_YAML_BLOCK.match(text)
    assert block is not None  # the template begins with metadata
    expected = parse_yaml(block[2], "the template of a Space's card")
    for key in data.keys() | expected.keys():
        if key not in expected or data.get(key) != expected[key]:
            raise ValueError(
                f"`{key}` in the card is {data.get(key)!r}, not {expected.get(key)!r}: the Hub acts upon it"
            )


def check_card(folder: Path, folder_type: str) -> str:
    """Check that the metadata of a card are such as this project writes: the Hub acts upon them, not upon the text."""
    if not (folder / CARD).is_file():
        return "there is no card at this commit"
    data = card_data(folder / CARD)
    if folder_type == "space":
        _check_space_card(data)
    else:
        unknown = sorted(data.keys() - CARD_KEYS[folder_type])
        if unknown:
            raise ValueError(f"the card has {', '.join(map(ascii, unknown))}, which no card of this project has")
    expected = {"model": {"library_name": "transformers", "pipeline_tag": "text-generation"}}
    expected["adapter"] = expected["model"] | {"library_name": "peft"}
    expected["memory"] = {"library_name": MEMORY_LIBRARY}
    for key, value in expected.get(folder_type, {}).items():
        if data.get(key, value) != value:
            raise ValueError(f"`{key}` in the card is {data[key]!r}, not {value!r}")
    if folder_type == "adapter" and data.get("base_model") != base_of_adapter(folder)[0]:
        raise ValueError(f"`base_model` in the card is {data.get('base_model')!r}, unlike in adapter_config.json")
    if folder_type == "memory" and data.get("base_model") != read_result(folder).base.repo_id:
        raise ValueError(f"`base_model` in the card is {data.get('base_model')!r}, unlike in result.json")
    tables = {"dataset": STORIES, "vectors": VECTORS}
    if folder_type in tables and data.get("configs") != tables[folder_type]:
        raise ValueError(
            f"`configs` in the card is {data.get('configs')!r}, not {tables[folder_type]!r}: it would load something "
            "else"
        )
    return f"{len(data)} values of the card are such as this project writes"


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _indexed_files(folder: Path, index: str, names: list[str]) -> list[str]:
    """Return the files of weights that an index names; `ValueError` unless they hold just the tensors that it says."""
    weight_map = read_object(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no `weight_map` of files by tensor")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if file not in names]
    if outside:
        raise ValueError(f"`weight_map` in {index} leads to {outside[0]!r}, which is not in the folder")
    for file in files:
        listed = {name for name, holder in weight_map.items() if holder == file}
        if set(_tensor_shapes(folder / file)) != listed:
            raise ValueError(f"{file} holds other tensors than {index} says")
    return files


def weight_files(folder: Path, names: list[str], is_adapter: bool = False) -> list[Path]:
    """Return the files of weights; `ValueError` unless each is loaded, and no tensor is there twice.

    Args:
        folder: of the model or adapter.
        names: of all files in it.
        is_adapter: whether it is an adapter of PEFT.
    """
    present = sorted(name for name in names if name.endswith(".safetensors"))
    single, index = "adapter_model.safetensors" if is_adapter else "model.safetensors", "model.safetensors.index.json"
    expected = [single] if is_adapter or index not in names else _indexed_files(folder, index, names)
    if present != expected:
        raise ValueError(
            f"the weights are {present}, where {expected} would be loaded: which ones are meant cannot be known"
        )
    return [folder / name for name in present]


def check_weights_header(path: Path) -> None:
    """Check that a file of weights says nothing beside its tensors but that they are torch's."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata not in ({}, {"format": "pt"}):
        raise ValueError(f"{path.name} says {sorted(metadata)} beside its tensors: weights of this project do not")


def tensor_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by name of all tensors in files of weights."""
    return {name: shape for path in files for name, shape in _tensor_shapes(path).items()}


def check_finite(files: list[Path]) -> str:
    """Check that every number of every tensor is a finite floating-point number."""
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in progress(list(file.keys()), "finite numbers", "tensor"):
                dtype = file.get_slice(name).get_dtype()  # from the header, before the tensor is read
                if dtype not in DTYPES:
                    raise ValueError(
                        f"{name!r} in {path.name} is of {dtype}: weights here are of {', '.join(sorted(DTYPES))}"
                    )
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{name!r} in {path.name} has numbers that are not finite: it predicts nothing")
                count += 1
    return f"{count} tensors in {len(files)} files of weights, every number finite"


def check_shapes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check that tensors of these shapes by name are those of the model that `config.json` describes."""
    content = read_object(folder / "config.json")
    try:
        config = AutoConfig.for_model(**{key: value for key, value in content.items() if key != "auto_map"})
        with torch.device("meta"):  # no size, however large, takes memory
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a setting can be wrong in any way, and so can the error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"config.json describes no model that can be built: {reason}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    # A file may hold a tied matrix under each of its names, but needs it only once.
    needed = {name for name, _ in model.named_parameters()}
    wrong = {name for name in shapes if expected.get(name) != shapes[name]} | (needed - shapes.keys())
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit config.json, such as {min(wrong)!r}")

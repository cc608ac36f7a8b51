# SPDX-License-Identifier: Apache-2.0
"""What settings, card and weights of a published folder may say: lists of what is allowed, not of what is not.

Loading and the Hub act upon values: a setting can name another repository, a card another program, a tokenizer words
that end every text. A value is allowed if this project could have written it.
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
from packaging.version import InvalidVersion, Version
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from training.bounded import parse_yaml, read_object, walk
from training.card import STORIES, render
from training.hub import CARD, COMMIT, REPO_ID


# Of models that are published with their code, which `save_pretrained` writes beside the weights.
MODEL_TYPES = ("memory_mosaic", "memory_model")
# Settings by which a library fetches or runs what is not in the folder, wherever they stand.
LEADING_ELSEWHERE = {
    *("auto_map", "custom_pipelines", "custom_generate", "transformers_weights", "trust_remote_code"),
    *("attn_implementation", "_attn_implementation", "auto_mapping", "megatron_config"),
    *("name_or_path", "_name_or_path", "tokenizer_file", "vocab_file", "merges_file", "chat_template"),
}
# A repository, an address or a path; a token of text such as </s> is none.
_LEADS = re.compile(rf"{REPO_ID.pattern}(--.*)?|.*://.*|[/~].*|\.\.?[/\\].*", re.DOTALL)
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
# What of PEFT's settings a recipe decides, and what publishing and PEFT itself write.
ADAPTER_SETTINGS = {"r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"}
_OF_PUBLISHING = {"base_model_name_or_path", "revision", "peft_version", "inference_mode"}
CARD_KEYS = {
    "model": {
        *("license", "language", "library_name", "pipeline_tag", "tags", "datasets", "metrics"),
        *("base_model", "base_model_relation", "model-index", "model_name"),
    },
    "dataset": {"license", "language", "task_categories", "size_categories", "tags", "pretty_name", "configs"},
}
CARD_KEYS["adapter"] = CARD_KEYS["model"]
# A setting that no layer is built for may be larger than the model is deep.
MOST_LAYERS = 1000
DTYPES = {"F64", "F32", "F16", "BF16"}


def check_config(path: Path, numbers: int, tensors: int) -> None:
    """A `config.json` has settings that its kind of model has, of sizes that its weights can fill, and no other.

    Args:
        path: of the file.
        numbers: how many there are in the weights.
        tensors: how many hold them.
    """
    content = read_object(path)
    classes = _mapped_classes(path, content.pop("auto_map", None))
    others = [name for name in content.get("architectures") or [] if name not in classes]
    if others:
        raise ValueError(f"`architectures` in {path.name} names {others[0]!r}, which is no class of `auto_map`")
    _check_part(path.name, content, MODEL_TYPES)
    for _, key, value in walk(content):
        if "layer" in key and type(value) is int and value > max(tensors, MOST_LAYERS):
            raise ValueError(f"`{key}` in {path.name} is {value}, but the weights have {tensors} tensors")
        is_size = key.startswith(("num_", "n_")) or key.endswith("_size")
        if is_size and type(value) is int and not -1 <= value <= max(numbers, 10**6):
            raise ValueError(f"`{key}` in {path.name} is {value}, but the weights have {numbers:,} numbers")


def _mapped_classes(path: Path, mapped: Any) -> set[str]:
    """Names of the classes that the library is to load, each of them one of this project's for that purpose."""
    found = set()
    for purpose, target in mapped.items() if isinstance(mapped, dict) else [(None, mapped)]:
        module = re.fullmatch(r"(\w+)\.(\w+)", target) if isinstance(target, str) else None
        if module is None or not (path.parent / f"{module[1]}.py").is_file():
            raise ValueError(f"`auto_map` in {path.name} leads to {target!r}, which is not in the folder")
        own = getattr(importlib.import_module(f"modeling_memory_mosaic.{module[1]}"), module[2], None)
        kind = PreTrainedConfig if purpose == "AutoConfig" else PreTrainedModel
        if not str(purpose).startswith("Auto") or not isinstance(own, type) or not issubclass(own, kind):
            raise ValueError(f"`auto_map` in {path.name} has {target!r} for {purpose!r}, which is no class for that")
        found.add(module[2])
    return found


def _check_part(name: str, content: dict[str, Any], types: tuple[str, ...]) -> None:
    """A configuration, or one within another, of one of these types."""
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
            _check_part(name, content[key], (*MODEL_TYPES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def check_values(name: str, content: dict[str, Any]) -> None:
    """No setting of a file, at any depth, leads to a repository, an address or a path, or is no number."""
    for _, key, value in walk(content):
        if key in LEADING_ELSEWHERE and value not in (None, ""):
            raise ValueError(f"`{key}` in {name} is {value!r}, which leads elsewhere: nothing published has it")
        if isinstance(value, str) and _LEADS.fullmatch(value):
            raise ValueError(f"`{key}` in {name} names {value!r}: nothing published leads elsewhere")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{key}` in {name} is {value}, which is no number to compute with")


def check_words(name: str, content: dict[str, Any]) -> None:
    """Keys and texts among settings of a model are names: of classes, kinds and versions."""
    for _, key, value in walk(content):
        for text in (key, value):
            if isinstance(text, str) and not re.fullmatch(r"[\w.+-]{0,100}", text, re.ASCII):
                raise ValueError(f"{name} has {text!a}, where names of kinds and classes stand")


def check_generation(name: str, content: dict[str, Any], config: dict[str, Any]) -> None:
    """Generation settings say which tokens begin and end a text, as the model does, and leave all else alone."""
    defaults = GenerationConfig().to_dict()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if content.get(key) != config.get(key):
            raise ValueError(f"`{key}` in {name} is {content.get(key)!r}, but {config.get(key)!r} in config.json")
    for key, value in content.items():
        is_switch_off = key in ("output_attentions", "output_hidden_states") and value is False
        if key in GENERATION_SETTINGS or is_switch_off or (key in defaults and value == defaults[key]):
            continue
        raise ValueError(f"`{key}` in {name} is {value!r}: a published model leaves how to generate to its user")


def check_tokenizer(folder: Path) -> None:
    """A tokenizer's special tokens are among its own, are marked as such, and are those of the model.

    A chat template is a program that runs when a chat is formatted, and no model here is trained on chats: none is
    published, and none is allowed.
    """
    if not (folder / "tokenizer.json").is_file():
        return
    made, config = read_object(folder / "tokenizer.json"), read_object(folder / "config.json")
    vocabulary, added = _vocabulary(made), {}
    for token in made.get("added_tokens") or []:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
            or type(token.get("id")) is not int
        ):
            raise ValueError(f"tokenizer.json has an added token that is none: {token!r}")
        added[token["content"]] = token
    ids = {**vocabulary, **{text: token["id"] for text, token in added.items()}}
    size = config.get("vocab_size") or (config.get("decoder") or {}).get("vocab_size")
    if ids and type(size) is int and max(ids.values()) >= size:
        raise ValueError(f"tokenizer.json has the id {max(ids.values())}, but the model has {size} tokens")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            _check_special_tokens(name, content, added)
            for token in ("bos_token", "eos_token", "pad_token"):
                text, expected = _text(content.get(token)), config.get(f"{token}_id")
                if text is not None and type(expected) is int and added[text]["id"] != expected:
                    raise ValueError(f"`{token}` in {name} is {text!r}, but the model's has the id {expected}")


def _vocabulary(made: dict[str, Any]) -> dict[str, int]:
    """Ids by token of a tokenizer's model; of one that has a list, they are counted."""
    model = made.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        return {str(place): place for place in range(len(vocabulary))}
    if not isinstance(vocabulary, dict) or not all(type(number) is int for number in vocabulary.values()):
        raise ValueError("tokenizer.json has no vocabulary of tokens and their ids")
    return vocabulary


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _check_special_tokens(name: str, content: dict[str, Any], added: dict[str, Any]) -> None:
    # A switch or a number of another version of the library leads nowhere.
    plain = {key for key, value in content.items() if isinstance(value, (bool, int, float, type(None)))}
    unknown = sorted(content.keys() - TOKENIZER_SETTINGS - plain)
    if unknown:
        raise ValueError(f"{name} has settings that no tokenizer here has: {', '.join(map(ascii, unknown))}")
    special = [content[key] for key in content if key.endswith("_token") and not key.startswith("add_")]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        tokens = content.get(key) or []
        special += tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else [tokens]
    for token in filter(None, map(_text, special)):
        if not isinstance(token, str) or not added.get(token, {}).get("special"):
            raise ValueError(
                f"{token!r} in {name} is no special token of tokenizer.json, which the model was trained with"
            )
    known = {token["id"]: text for text, token in added.items()}
    listed = content.get("added_tokens_decoder") or {}
    for number, token in listed.items() if isinstance(listed, dict) else [("?", listed)]:
        if not str(number).isdecimal() or known.get(int(number)) != _text(token):
            raise ValueError(f"`added_tokens_decoder` in {name} has {number}: {token!r}, which tokenizer.json has not")


def base_of_adapter(folder: Path) -> tuple[str, str]:
    """Id and commit of the model that a published adapter goes on top of."""
    settings = read_object(folder / "adapter_config.json")
    base, commit = settings.get("base_model_name_or_path"), settings.get("revision")
    if not REPO_ID.fullmatch(str(base)) or not COMMIT.fullmatch(str(commit)):
        raise ValueError(f"adapter_config.json names {base!r} at {commit!r}, not a base on the Hub at a commit")
    return base, commit


def check_adapter(folder: Path) -> None:
    """An adapter is LoRA as recipes have it; all other settings of PEFT are as PEFT has them by itself."""
    base_of_adapter(folder)
    name, content = "adapter_config.json", read_object(folder / "adapter_config.json")
    if content.get("peft_type") != "LORA":
        raise ValueError(f"`peft_type` in {name} is {content.get('peft_type')!r}: adapters here are LORA")
    defaults = LoraConfig(task_type="CAUSAL_LM").to_dict()
    for key, value in content.items():
        if key in _OF_PUBLISHING or key in ADAPTER_SETTINGS:
            continue
        if key not in defaults or (value or None) != (getattr(defaults[key], "value", defaults[key]) or None):
            raise ValueError(f"`{key}` in {name} is {value!r}: no adapter of this project has that")
    for key in ("target_modules", "target_parameters"):  # a single text would be a pattern, which may take for ever
        names = content.get(key) or []
        if not isinstance(names, list) or not all(
            isinstance(one, str) and re.fullmatch(r"[\w.]+", one) for one in names
        ):
            raise ValueError(f"`{key}` in {name} is {names!r}, not a list of names")
    for key in ("r", "lora_alpha", "lora_dropout"):
        if type(content.get(key)) not in (int, float) or not 0 <= content[key] <= 10**6:
            raise ValueError(f"`{key}` in {name} is {content.get(key)!r}, not a number that it could be")


def card_data(path: Path) -> dict[str, Any]:
    """The YAML at the beginning of a card; `ValueError` if there is none, or it is no table of plain values."""
    text = path.read_text(encoding="utf-8")
    found = REGEX_YAML_BLOCK.match(text)
    data = parse_yaml(found[2], f"the metadata of {path}") if found else {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"the metadata of {path} are no table of values by name")
    return data


def check_card(folder: Path, kind: str) -> str:
    """What the Hub acts upon in a card is what this project writes there; its text is not looked at."""
    if not (folder / CARD).is_file():
        return "there is no card at this commit"
    data = card_data(folder / CARD)
    if kind == "space":
        _check_space_card(data)
    else:
        unknown = sorted(data.keys() - CARD_KEYS[kind])
        if unknown:
            raise ValueError(f"the card has {', '.join(map(ascii, unknown))}, which no card of this project has")
    expected = {"model": {"library_name": "transformers", "pipeline_tag": "text-generation"}}
    expected["adapter"] = expected["model"] | {"library_name": "peft"}
    for key, value in expected.get(kind, {}).items():
        if data.get(key, value) != value:
            raise ValueError(f"`{key}` in the card is {data[key]!r}, not {value!r}")
    if kind == "adapter" and data.get("base_model") != base_of_adapter(folder)[0]:
        raise ValueError(f"`base_model` in the card is {data.get('base_model')!r}, unlike in adapter_config.json")
    if kind == "dataset" and data.get("configs") != STORIES:
        raise ValueError(
            f"`configs` in the card is {data.get('configs')!r}, not {STORIES!r}: it would load something else"
        )
    return f"{len(data)} values of the card are such as this project writes"


def _check_space_card(data: dict[str, Any]) -> None:
    """By the card, the Hub chooses what a Space runs on and installs: it is compared with the one made here."""
    models, version = data.get("models"), data.get("sdk_version")
    if not isinstance(models, list) or len(models) != 1 or not REPO_ID.fullmatch(str(models[0])):
        raise ValueError(f"`models` in the card is {models!r}, not the one model that the Space shows")
    try:
        fits = isinstance(version, str) and Version(version) in _range_of_gradio()
    except InvalidVersion:
        fits = False
    if not fits:
        raise ValueError(f"`sdk_version` in the card is {version!r}, not one of gradio {_range_of_gradio()}")
    architecture = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_persistent_slots"), 0)
    made = {"result": {"parameters": 0, "architecture": architecture}, "gradio_version": version}
    text = render("space/README.md.jinja", repo_id=models[0], **made)
    expected = parse_yaml(REGEX_YAML_BLOCK.match(text)[2], "the card made here")
    for key in data.keys() | expected.keys():
        if key not in expected or data.get(key) != expected[key]:
            raise ValueError(
                f"`{key}` in the card is {data.get(key)!r}, not {expected.get(key)!r}: the Hub acts upon it"
            )


@functools.cache
def _range_of_gradio():
    asked = map(Requirement, importlib.metadata.requires("modeling-memory-mosaic"))
    return next(one.specifier for one in asked if one.name == "gradio")


def weight_files(folder: Path, names: list[str], adapter: bool = False) -> list[Path]:
    """The files of weights, all of which are loaded and none of which twice.

    Args:
        folder: of the model or adapter.
        names: of all files in it.
        adapter: whether it is one.
    """
    found = sorted(name for name in names if name.endswith(".safetensors"))
    single, index = "adapter_model.safetensors" if adapter else "model.safetensors", "model.safetensors.index.json"
    if adapter or index not in names:
        expected = [single]
    else:
        mapped = read_object(folder / index).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(part, str) for part in mapped.values()):
            raise ValueError(f"{index} has no `weight_map` of files by tensor")
        outside = sorted({part for part in mapped.values()} - set(names))
        if outside:
            raise ValueError(f"`weight_map` in {index} leads to {outside[0]!r}, which is not in the folder")
        for part in sorted({*mapped.values()}):
            held, meant = set(_tensors(folder / part)), {name for name, file in mapped.items() if file == part}
            if held != meant:
                raise ValueError(f"{part} does not hold the tensors that {index} says, but others besides or less")
        expected = sorted({*mapped.values()})
    if found != expected:
        raise ValueError(
            f"the weights are {found}, where {expected} would be loaded: which ones are meant cannot be known"
        )
    return [folder / name for name in found]


def _tensors(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def check_metadata(path: Path) -> None:
    """Beside its tensors, a file of weights says that they are torch's, and nothing else."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata not in ({}, {"format": "pt"}):
        raise ValueError(f"{path.name} says {sorted(metadata)} beside its tensors: weights of this project do not")


def shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes by name of all tensors in files of weights."""
    return {name: shape for path in files for name, shape in _tensors(path).items()}


def check_finite(files: list[Path]) -> str:
    """Every number of every tensor is a finite floating-point number."""
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise ValueError(
                        f"{name!r} in {path.name} is of {dtype}: weights here are of {', '.join(sorted(DTYPES))}"
                    )
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{name!r} in {path.name} has numbers that are not finite: it predicts nothing")
                count += 1
    return f"{count} tensors in {len(files)} files of weights, every number finite"


def check_filled(folder: Path, found: dict[str, tuple[int, ...]]) -> None:
    """The tensors are those of the model that `config.json` describes, which is built without memory."""
    content = read_object(folder / "config.json")
    try:
        config = AutoConfig.for_model(**{key: value for key, value in content.items() if key != "auto_map"})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any setting, anything
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"config.json describes no model that can be built: {told}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    needed = {name for name, _ in model.named_parameters()}  # a tied matrix once
    wrong = {name for name in found if expected.get(name) != found[name]} | (needed - found.keys())
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit config.json, such as {min(wrong)!r}")

# SPDX-License-Identifier: Apache-2.0
"""A tiny generator of stories, the lists that it draws from, and recipes of BabiStories that use them."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.models import make_model
from training.export import export_model
from training.paths import CONFIGURATION
from training.recipe import load_recipe
from training.tasks.babistories import Recipe


RECIPE = str(CONFIGURATION / "recipe" / "babistories.yaml")
LISTS = {
    "names": ["Anna", "Ben", "Lily"],
    "openings": ["One day", "Once upon a time, there was a dog. It", "In a"],
    "verbs": ["walk", "sing"],
    "nouns": ["dog", "tree", "boat"],
    "adjectives": ["big", "red"],
    "feature_labels": ["Twist", "Dialogue", "two friends who share"],
}
SPECIAL = ("<|endoftext|>", "<|pad|>", "<unk>")
WORDS = sorted(
    {*re.findall(r"\w+|[.#]", " ".join(map(str, LISTS.values()))), "the", "and", "ran", "cat", ".", "!", "#"}
)
CHAT = "{% for message in messages %}[{{ message.role }}] {{ message.content }}</s>\n{% endfor %}"
NOTHING_ASKED = "asked={names: null, openings: null, verbs: null, nouns: null, adjectives: null}"


def save_generator(folder: Path, chat_template: str | None = None, mosaic: bool = False) -> None:
    """Export a model of random parameters that writes words, full stops and now and then a forbidden character."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        bos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        padding_side="left",
    )
    tokenizer.chat_template = chat_template
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_positions=256, initializer_range=0.3, **sizes, **special)
    model = make_model(**sizes, **special) if mosaic else AutoModelForCausalLM.from_config(config)
    export_model(model, tokenizer, folder)


def save_material(folder: Path) -> Path:
    """Write a generator and a list file into a folder, and return the folder."""
    save_generator(folder / "generator")
    (folder / "lists.json").write_text(json.dumps(LISTS), encoding="utf-8")
    return folder


def settings(material: Path, output: Path, *more: str) -> list[str]:
    """Return the overrides of a small recipe that uses the material."""
    return [
        f"generator.model={material / 'generator'}",
        "generator.quantization=none",
        "generator.dtype=float32",
        "generator.max_new_tokens=24",
        "generator.batch_size=3",
        "num_stories=20",
        f"lists={material / 'lists.json'}",
        NOTHING_ASKED,
        f"output_dir={output}",
        *more,
    ]


def recipe_of(material: Path, output: Path, *more: str) -> Recipe:
    """Return that recipe, with more overrides."""
    return load_recipe(RECIPE, settings(material, output, *more))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, compressed or not."""
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        return [json.loads(line) for line in file]

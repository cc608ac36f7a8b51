# SPDX-License-Identifier: Apache-2.0
"""The one-page specification names every tensor of a model and of a saved memory, with its shape."""

import math
import re

import pytest
import torch
from helpers.kinds import make_classifier_v2, make_v2
from helpers.models import make_ids, make_model

from modeling_memory_mosaic import MemoryMosaicForSequenceClassification, memory_state_dict


def read_page(request, name):
    return (request.config.rootpath / "modeling_memory_mosaic" / name).read_text(encoding="utf-8")


@pytest.fixture
def page(request):
    return read_page(request, "SPECIFICATION.md")


@pytest.fixture
def page_of_v2(request):
    return read_page(request, "SPECIFICATION_V2.md")


def read_tensors(page):
    """Return `{name: shape in letters}` from the table of tensors, biases under their full names."""
    tensors = {}
    for names, shapes in re.findall(r"^\| (`[^|]+) \| (`[^|]+) \|$", page, flags=re.MULTILINE):
        names, shapes = re.findall("`([^`]+)`", names), re.findall(r"`\(([^`]+)\)`", shapes)
        for name, shape in zip(names, shapes if len(shapes) == len(names) else shapes * len(names), strict=True):
            tensors[names[0].removesuffix(".weight") + name if name.startswith(".") else name] = shape
    return tensors


def sizes_of(config):
    letters = {"V": "vocab_size", "C": "hidden_size", "H": "num_attention_heads", "D": "head_dim"}
    letters |= {"N": "num_persistent_slots", "num_labels": "num_labels"}
    sizes = {letter: getattr(config, name) for letter, name in letters.items()}
    if hasattr(config, "long_term_delay"):
        short, long = config.num_short_term_heads, config.num_long_term_heads
        sizes |= {"S": short, "L": long, "A": short + long, "I": config.intermediate_size}
        sizes["W"] = config.short_term_window - 1
    return sizes


def check_tensors(page, config, *models):
    """Check that a page has the tensors of some models, with their shapes, and no others."""
    specified, sizes = read_tensors(page), sizes_of(config)
    names = set()
    for name, tensor in ((name, tensor) for model in models for name, tensor in model.state_dict().items()):
        name = re.sub(r"\.\d+\.", ".{i}.", name)
        shape = [math.prod(sizes[letter] for letter in axis.split()) for axis in specified[name].split(",") if axis]
        assert tuple(shape) == tensor.shape, name
        names.add(name)
    assert names == specified.keys()


def test_every_tensor_of_a_model_is_specified_and_no_other(page):
    model = make_model(use_bias=True, tie_word_embeddings=False, head_dim=5, num_persistent_slots=7)
    check_tensors(page, model.config, model, MemoryMosaicForSequenceClassification(model.config))


def test_every_tensor_of_a_model_of_v2_is_specified_and_no_other(page_of_v2, page):
    fields = {"use_bias": True, "gate_bias": True, "norm_type": "layer_norm", "head_dim": 5, "num_short_term_heads": 2}
    model, fixed, classifier = make_v2(**fields), make_v2(**fields, gated_keys=False), make_classifier_v2(**fields)
    check_tensors(page_of_v2, classifier.config, model, fixed, classifier)
    # Slots are those of the first version.
    slots = make_v2(**fields, persistent_memory_type="slots", num_persistent_slots=7)
    names = {name for name in slots.state_dict() if ".0.persistent_memory" in name}
    assert names == {name.replace("{i}", "0") for name in read_tensors(page) if ".persistent_memory" in name}


def test_every_tensor_of_a_saved_memory_is_specified(page):
    check_memory(page, make_model(head_dim=5))


def test_every_tensor_of_a_saved_memory_of_v2_is_specified(page_of_v2):
    check_memory(page_of_v2, make_v2(head_dim=5, num_short_term_heads=2))


def check_memory(page, model):
    with torch.no_grad():
        mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        memory = memory_state_dict(model(make_ids(2, 6), attention_mask=mask, use_cache=True).past_key_values)
    sizes = {"B": 2, "T": 6, **sizes_of(model.config)}
    section = page.split("Saved by `memory_state_dict`")[1].split("##")[0].replace("\n", " ")
    specified = {}
    for names, shape in re.findall(r"((?:`[a-z][\w.{}]*`(?:, | and )?)+) `\(([^`]+)\)`", section):
        specified |= {
            name: [sizes[axis] if axis in sizes else int(axis) for axis in shape.split(", ")]
            for name in re.findall("`([^`]+)`", names)
        }
    shapes = {re.sub(r"\.\d+\.", ".{i}.", name): list(tensor.shape) for name, tensor in memory.items()}
    assert shapes == specified

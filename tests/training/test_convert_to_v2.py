# SPDX-License-Identifier: Apache-2.0
"""A Memory Mosaic that is converted to v2 computes the same logits, and learns from there."""

import pytest
import torch
from helpers.kinds import KINDS
from helpers.models import make_ids, make_model
from transformers import AutoModelForCausalLM

from modeling_memory_mosaic import MemoryMosaicV2ForCausalLM
from training.convert_to_v2 import convert_folder_to_v2, convert_to_v2


VARIANTS = {
    "the authors'": {},
    "biases and an untied head": {"use_bias": True, "tie_word_embeddings": False, "head_dim": 5},
    "growing bandwidth": {"bandwidth_exponent": 0.25},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "fields", [{}, {"num_short_term_heads": 0}, {"num_short_term_heads": 1, "short_term_window": 4}]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_v1(variant, fields, dtype):
    model = make_model(dtype=dtype, **VARIANTS[variant])
    with torch.no_grad():
        model.model.layers[0].contextual_memory.key_scale[0] = 1.0  # beyond the cap of v1
    converted = convert_to_v2(model, **fields).eval()
    ids, mask = make_ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    expected, logits = (each(ids, attention_mask=mask).logits[mask == 1] for each in (model, converted))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-6)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(converted.generate(ids, **options), model.generate(ids, **options))


def test_every_parameter_of_a_converted_model_learns():
    """`o_proj` begins with zeros for new heads, and exponents and lengths of values with 0."""
    model = convert_to_v2(make_model()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = make_ids(4, 30)
    losses = []
    for _ in range(3):
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_folder_is_converted(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "v1")
    convert_folder_to_v2(tmp_path / "v1", tmp_path / "v2", num_short_term_heads=0)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "v2").eval()
    assert type(converted) is MemoryMosaicV2ForCausalLM
    torch.testing.assert_close(converted(make_ids(2, 30)).logits, model(make_ids(2, 30)).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is not empty"):
        convert_folder_to_v2(tmp_path / "v1", tmp_path / "v2")
    with pytest.raises(ValueError, match="holds no memory_mosaic"):
        convert_folder_to_v2(tmp_path / "v2", tmp_path / "v3")
    with pytest.raises(ValueError, match="no config.json"):
        convert_folder_to_v2(tmp_path, tmp_path / "v3")


def test_what_v2_does_not_compute_is_refused():
    with pytest.raises(ValueError, match="kernels of v2 grow from the first pair on"):
        convert_to_v2(make_model(bandwidth_exponent=0.25, bandwidth_start=3))
    with pytest.raises(ValueError, match="load it in float32"):
        convert_to_v2(make_model(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="A MemoryMosaicV2ForCausalLM is no MemoryMosaicForCausalLM"):
        convert_to_v2(KINDS["mosaic v2"].make())
    with pytest.raises(ValueError, match="norm_type follows from the model"):
        convert_to_v2(make_model(), norm_type="rms_norm")

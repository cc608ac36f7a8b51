# SPDX-License-Identifier: Apache-2.0
"""Losses of models whose heads hold few pairs: windows are those of the tokens in sight, wherever a text is cut."""

from types import SimpleNamespace

import pytest
import torch
from helpers.models import make_ids, make_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, set_seed

from modeling_memory_mosaic import bounded
from training.baselines import windowed
from training.baselines.shifted_rope import ShiftedGPTNeoXConfig, ShiftedGPTNeoXForCausalLM
from training.baselines.windowed import NAME, windowed_arguments
from training.experiments import bound, streaming
from training.experiments.bound import ALL, SINKS, WINDOW, text_losses
from training.experiments.streaming import memory_bytes, mosaic_stream, window_stream
from training.paths import CONFIGURATION
from training.recipe import load_recipe


SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "initializer_range": 0.2}


def transformer(kind="rope", num_hidden_layers=2):
    set_seed(0)
    if kind == "rope":
        return GPTNeoXForCausalLM(GPTNeoXConfig(num_hidden_layers=num_hidden_layers, **SIZES)).eval()
    config = ShiftedGPTNeoXConfig(num_hidden_layers=num_hidden_layers, **SIZES)
    return ShiftedGPTNeoXForCausalLM(config).eval()


@torch.no_grad()
def logits_of(model, ids, max_pairs, sinks):
    model.set_attn_implementation(NAME)
    logits = model(ids, **windowed_arguments(model, ids.shape[1], max_pairs, sinks)).logits
    model.set_attn_implementation("sdpa")
    return logits


@pytest.fixture(params=[1, 64], ids=["many blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(windowed, "SHORTEST_BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("kind", ["rope", "shift"])
def test_a_window_that_holds_all_is_plain_attention(kind, sinks, length):
    model, ids = transformer(kind), make_ids(2, length)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits_of(model, ids, 12, sinks), expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("max_pairs", [3, 5, 8])
def test_one_block_sees_the_last_tokens_alone(max_pairs):
    model, ids = transformer(num_hidden_layers=1), make_ids(1, 20)
    logits = logits_of(model, ids, max_pairs, 0)
    for place in range(max_pairs, 20):
        alone = model(ids[:, place - max_pairs + 1 : place + 1], use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits[:, place], alone, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("max_pairs", [4, 7])
def test_sinks_stand_just_before_the_window(max_pairs):
    sinks, model, ids = 2, transformer(num_hidden_layers=1), make_ids(1, 20)
    logits = logits_of(model, ids, max_pairs, sinks)
    for place in range(max_pairs, 20):
        # What the cache of attention sinks holds, at the places that it gives its tokens.
        kept = torch.cat([ids[:, :sinks], ids[:, place - max_pairs + sinks + 1 : place + 1]], dim=1)
        torch.testing.assert_close(logits[:, place], model(kept, use_cache=False).logits[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 512])
def test_losses_of_a_mosaic_do_not_depend_on_where_it_is_cut(length, monkeypatch):
    model, ids = make_model(dtype=torch.float64), make_ids(2, 23)
    monkeypatch.setattr(bound, "CHUNK_LENGTH", length)
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(text_losses(model, ids, ALL, 0).double(), expected, rtol=0, atol=1e-5)
    for policy in ("fifo", "lru", "usage", "surprise", "random"):
        roomy = text_losses(model, ids, policy, 30)
        torch.testing.assert_close(roomy.double(), expected, rtol=0, atol=1e-5)
        assert not torch.equal(text_losses(model, ids, policy, 4), roomy)


def test_losses_of_a_transformer_are_of_its_window():
    model, ids = transformer(), make_ids(2, 16)
    expected = {way: logits_of(model, ids, 8, sinks) for way, sinks in ((WINDOW, 0), (SINKS, 4))}
    model.set_attn_implementation(NAME)
    for way, logits in expected.items():
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        torch.testing.assert_close(text_losses(model, ids, way, 8), losses)


def test_a_budget_that_no_text_reaches_is_refused():
    with pytest.raises(ValueError, match="`measured_from` 1024 must be at least the largest of `budgets`"):
        load_recipe(CONFIGURATION / "recipe" / "bound.yaml", ["budgets=[64, 256, 2048]"])


@pytest.mark.parametrize("length", [1, 5, 8, 64])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("kind", ["rope", "shift"])
def test_a_window_over_a_stream_is_that_over_the_whole_text(kind, sinks, length, monkeypatch):
    model, ids = transformer(kind), make_ids(1, 53)
    monkeypatch.setattr(streaming, "CHUNK_LENGTH", length)
    monkeypatch.setattr(streaming, "OF_TABLE", range(streaming.TENTHS))
    logits = logits_of(model, ids, 7, sinks)[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    model.set_attn_implementation(NAME)
    losses = torch.cat([part for part, _ in window_stream(model, ids[0], 7, sinks)])
    assert losses[0].isnan()
    torch.testing.assert_close(losses[1:], expected, rtol=0, atol=2e-5)


def test_tenths_of_a_window_that_are_measured_are_those_of_the_whole_stream(monkeypatch):
    model, ids = transformer("shift"), make_ids(1, 60)[0]
    model.set_attn_implementation(NAME)
    monkeypatch.setattr(streaming, "CHUNK_LENGTH", 3)
    some = torch.cat([part for part, _ in window_stream(model, ids, 7, 2)]).view(streaming.TENTHS, -1)
    monkeypatch.setattr(streaming, "OF_TABLE", range(streaming.TENTHS))
    whole = torch.cat([part for part, _ in window_stream(model, ids, 7, 2)]).view(streaming.TENTHS, -1)
    left_out = [2, 3, 5, 6, 7, 8]
    assert some[left_out].isnan().all()
    torch.testing.assert_close(some[[0, 1, 4, 9]], whole[[0, 1, 4, 9]], rtol=0, atol=0, equal_nan=True)
    stream = [(torch.tensor([torch.nan, 2.0]), 5), (torch.tensor([torch.nan, torch.nan]), 7)]
    recipe = SimpleNamespace(num_tokens=4, stretch=2)
    assert streaming._stretches(recipe, iter(stream), "two stretches") == ([2.0, None], [5, 7])


@pytest.mark.parametrize("length", [1, 5, 64])
@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_a_stream_behind_a_bounded_memory_does_not_depend_on_where_it_is_cut(policy, length, monkeypatch):
    model, ids = make_model(dtype=torch.float64), make_ids(1, 53)
    expected = text_losses(model, ids, policy, 8)[0]
    monkeypatch.setattr(streaming, "CHUNK_LENGTH", length)
    with bounded(model, max_pairs=8, policy=policy):
        parts = list(mosaic_stream(model, ids[0]))
    losses = torch.cat([part for part, _ in parts])
    assert losses[0].isnan()
    torch.testing.assert_close(losses[1:], expected, rtol=0, atol=1e-5)
    assert len({size for _, size in parts}) == 1


@torch.no_grad()
def test_bytes_of_a_memory_are_those_of_its_tensors():
    model, ids = make_model(), make_ids(1, 40)
    short, long = (model(ids[:, :length], use_cache=True).past_key_values for length in (20, 40))
    width = model.config.hidden_size * model.config.num_hidden_layers * 4
    assert memory_bytes(long) - memory_bytes(short) >= 2 * 20 * width
    with bounded(model, max_pairs=8):
        before = memory_bytes(model(ids, use_cache=True).past_key_values)
        cache = None
        for part in ids.split(3, dim=1):
            cache = model(part, past_key_values=cache, use_cache=True).past_key_values
    assert memory_bytes(cache) == before >= 2 * 8 * width

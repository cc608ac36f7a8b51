# SPDX-License-Identifier: Apache-2.0
"""Memory Mosaics v2 are the paper's equations: the oracle, windows and delays, gates, sizes and initial values.

What v2 has in common with other models is tested over the kinds of `helpers/kinds.py`.
"""

import pytest
import torch
from helpers.kinds import SHORT_LEVELS, V2_OTHERWISE, make_v2
from helpers.models import make_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from modeling_memory_mosaic import (
    MemoryMosaicV2Config,
    MemoryMosaicV2ForCausalLM,
    memories_memory_mosaic,
    memories_memory_mosaic_v2,
)
from modeling_memory_mosaic.naive_memory_mosaic_v2 import naive_gated_keys, naive_logits_v2
from modeling_memory_mosaic.ops_memory_mosaic import CHUNK_LENGTH, scale_to_length
from modeling_memory_mosaic.ops_memory_mosaic_v2 import LOWEST_LOG, gated_sum


VARIANTS = {
    "as the paper": {},
    "otherwise": V2_OTHERWISE,
    "fixed leak and bandwidth": {"gated_keys": False, "adaptive_bandwidth": False},
    "long-term heads alone": {"num_short_term_heads": 0, "long_term_delay": 1},
    "short-term heads alone": {"num_long_term_heads": 0},
    "window of one pair": {"short_term_window": 2, "long_term_delay": 9},
}
WAYS = ["blocks", "windows", "eager"]


def read_by(way, model, monkeypatch):
    """Let a model read block by block as on a CPU, by masks of windows as on a GPU, or by eager attention."""
    if way == "eager":
        model.set_attn_implementation("eager")
    if way == "windows":
        for module in (memories_memory_mosaic, memories_memory_mosaic_v2):
            monkeypatch.setattr(module, "can_read_in_blocks", lambda tensor: False)


def assert_same_gradients(model, loss, expected_loss):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    expected = torch.autograd.grad(expected_loss, parameters, materialize_grads=True)
    for (name, _), gradient, other in zip(model.named_parameters(), gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 6, 7, CHUNK_LENGTH + 5])
def test_equals_the_oracle_in_value_and_gradient(variant, way, num_tokens, monkeypatch):
    """Texts shorter and longer than the delay, the window, and a chunk of the gated sum."""
    model = make_v2(dtype=torch.float64, **VARIANTS[variant])
    read_by(way, model, monkeypatch)
    ids = make_ids(num_tokens)
    state = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    logits, expected = model(ids[None]).logits[0], naive_logits_v2(state, model.config, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn(logits.shape, dtype=torch.float64)
    assert_same_gradients(model, (logits * weights).sum(), (expected * weights).sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", ["as the paper", "otherwise"])
def test_padding_and_packing_equal_the_oracle_of_each_text(variant, way, monkeypatch):
    """Two rows: two texts packed behind each other with padding between all tokens, and one with padding within."""
    model = make_v2(dtype=torch.float64, **VARIANTS[variant])
    read_by(way, model, monkeypatch)
    texts = [make_ids(length, seed=length) for length in (11, 15, 20)]
    places = [torch.arange(1, 23, 2), torch.arange(24, 54, 2), 3 + torch.arange(20) + 15 * (torch.arange(20) > 8)]
    ids, mask = make_ids(2, 54, seed=5), torch.zeros(2, 54, dtype=torch.long)
    positions = torch.zeros(2, 54, dtype=torch.long)
    for row, text, place in zip((0, 0, 1), texts, places, strict=True):
        ids[row, place], mask[row, place], positions[row, place] = text, 1, torch.arange(len(text))
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    state = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    expected = [naive_logits_v2(state, model.config, text) for text in texts]
    read = [logits[row, place] for row, place in zip((0, 0, 1), places, strict=True)]
    for one, other in zip(read, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert_same_gradients(model, sum(one.square().sum() for one in read), sum(one.square().sum() for one in expected))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 39), max_size=6, unique=True),
    window=st.integers(2, 30),
    delay=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_any_chunking_equals_one_pass_across_windows_and_delays(way, cuts, window, delay, seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        model = make_v2(dtype=torch.float64, short_term_window=window, long_term_delay=delay)
        read_by(way, model, monkeypatch)
        ids, cache, logits = make_ids(2, 40, seed=seed), DynamicCache(config=model.config), []
        with torch.no_grad():
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
                logits.append(model(ids[:, start:end], cache=cache).logits)
            torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_padded_chunks_equal_rows_alone(way, monkeypatch):
    """Padding anywhere in any chunk takes no room in the window, and does not shorten the delay."""
    model = make_v2(dtype=torch.float64)
    read_by(way, model, monkeypatch)
    mask = (torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.5).long()
    mask[:, -2:], mask[1, :13], mask[2, 20:30] = 1, 0, 0
    ids = make_ids(3, 40)
    for static in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            parts = [
                model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits
                for start, end in ((0, 7), (7, 8), (8, 26), (26, 38), (38, 39), (39, 40))
            ]
            logits = torch.cat(parts, dim=1)
            for row in range(3):
                alone = model(ids[row, mask[row] == 1][None]).logits[0]
                torch.testing.assert_close(logits[row, mask[row] == 1], alone, rtol=0, atol=1e-10)


def test_attention_maps_of_v2_are_of_windows_and_delays():
    """Short-term heads come first. Read in padded chunks, maps name the same tokens."""
    model = make_v2(dtype=torch.float64, short_term_window=4, long_term_delay=3)
    model.set_attn_implementation("eager")
    ids, text = make_ids(2, 12), torch.arange(12) + 3 * (torch.arange(12) > 4)
    maps = model(ids, output_attentions=True).attentions
    lag = torch.arange(12)[:, None] - torch.arange(12)
    sees = torch.stack([(lag > 0) & (lag < 4), lag >= 3]).repeat_interleave(3, dim=0)
    assert len(maps) == 2
    for weights in maps:
        assert torch.equal(weights > 0, sees.expand(2, -1, -1, -1))
        torch.testing.assert_close(weights.sum(-1), sees.any(-1).double().expand(2, -1, -1))
    padded, mask = make_ids(2, 15, seed=4), torch.zeros(2, 15, dtype=torch.long)
    padded[:, text], mask[:, text] = ids, 1
    cache = DynamicCache(config=model.config)
    for start, end in ((0, 9), (9, 10), (10, 15)):
        inputs = {"attention_mask": mask[:, :end], "cache": cache, "output_attentions": True}
        parts = model(padded[:, start:end], **inputs).attentions
        rows = (text >= start) & (text < end)
        for weights, whole in zip(parts, maps, strict=True):
            of_tokens = weights[:, :, text[rows] - start][..., text[text < end]]
            torch.testing.assert_close(of_tokens, whole[:, :, rows][..., text < end])
            assert not weights[..., mask[0, :end] == 0].any()


def test_a_gradient_flows_through_the_maps_of_v2():
    model = make_v2()
    model.set_attn_implementation("eager")
    outputs = model(make_ids(1, 12), output_attentions=True)
    for weights in outputs.attentions:
        weights.retain_grad()
    outputs.logits[0, -1, 3].backward()
    for weights in outputs.attentions:
        assert (weights.grad[0, :, -1][weights[0, :, -1] > 0] != 0).all()


def test_a_memory_holds_all_long_term_pairs_and_a_window_of_short_term_ones():
    model = make_v2()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(make_ids(2, 100), cache=cache)
        for position in range(30):
            model(make_ids(2, 1, seed=position), cache=cache)
            for layer in cache.layers:
                assert layer.keys.shape == (2, 3, 101 + position, 8)
                sizes = {tensor.untyped_storage().nbytes() // (2 * 3 * 8 * 4) for tensor in layer.windows.values()}
                assert max(sizes) <= 4 * SHORT_LEVELS["short_term_window"], "it grows with the text"


def test_a_token_changes_nothing_that_it_must_not():
    """Behind window and delay a token acts by running states alone; the pair of the newest token is read nowhere."""
    model = make_v2(dtype=torch.float64, num_hidden_layers=1, gated_keys=False, short_term_window=4, long_term_delay=9)
    with torch.no_grad():
        memory = model.model.layers[0].contextual_memory
        for heads in (memory.short_term, memory.long_term):
            heads.key_leak.fill_(10.0)  # keys forget all tokens but their own
    ids = make_ids(1, 14)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 61
    moved = (model(ids).logits - model(changed).logits).abs().amax(-1)[0] > 1e-12
    # Token 5 is read by itself; its value completes the pair of token 4, which tokens up to 7 read as short-term pair,
    # and its own pair is read up to 8. As long-term pairs both are read from 4 + 9 on.
    assert moved.nonzero().flatten().tolist() == [5, 6, 7, 8, 13]


@pytest.mark.parametrize("num_tokens", [1, 2, CHUNK_LENGTH, CHUNK_LENGTH + 1, 3 * CHUNK_LENGTH + 5])
def test_gated_sums_equal_their_recurrence_and_may_be_split_anywhere(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    states, gates, leaks = (
        torch.randn(2, 2, num_tokens, *width, generator=generator, dtype=torch.float64, requires_grad=True)
        for width in ((4,), (), ())
    )
    one = states.new_ones(())
    keys = scale_to_length(gated_sum(states, gates, -leaks.abs())[0], one)
    expected = torch.stack(
        [torch.stack([naive_gated_keys(states[b, h], gates[b, h], leaks[b, h]) for h in (0, 1)]) for b in (0, 1)]
    )
    torch.testing.assert_close(keys, expected, rtol=1e-11, atol=1e-11)
    previous, decoded = None, []
    for t in range(num_tokens):
        part = slice(t, t + 1)
        previous = gated_sum(states[:, :, part], gates[:, :, part], -leaks[:, :, part].abs(), previous)
        decoded.append(previous[0])
    decoded = scale_to_length(torch.cat(decoded, dim=2), one)
    torch.testing.assert_close(decoded, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn(keys.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad((expected * weights).sum(), (states, gates, leaks), materialize_grads=True)
    for sums in (keys, decoded):
        gradients = torch.autograd.grad((sums * weights).sum(), (states, gates, leaks), materialize_grads=True)
        for gradient, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [10.0, 1e3, 6e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gated_sums_stay_finite_for_any_gates(size, dtype):
    """exp(1000) is beyond float64. The largest gate of many decides alone; with equal gates the leak decides."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 100, 4, generator=generator).to(dtype).requires_grad_()
    gates, leaks = (
        (size * torch.randn(1, 2, 100, generator=generator)).clamp(-6e4, 6e4).to(dtype).requires_grad_() for _ in "gl"
    )
    sums, scales = gated_sum(states, gates, -leaks.abs())
    keys = scale_to_length(sums, sums.new_ones(()))
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(1, 2, 100))
    assert sums.isfinite().all() and scales.isfinite().all() and sums.dtype == torch.float32
    keys.sin().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (states, gates, leaks))
    nothing, before = torch.full((1, 2, 1), LOWEST_LOG), (sums[:, :, :1], scales[:, :, :1])
    step = gated_sum(states[:, :, :1], nothing, torch.zeros(1, 2, 1), before)
    torch.testing.assert_close(step[0], sums[:, :, :1], msg="padding changed the sum")


def test_m_is_drawn_in_training_alone():
    """One m for each step, or for each row; behind a memory m is that of inference."""
    ids = make_ids(64, 24)
    for draw in ("step", "sequence"):
        model = make_v2(long_term_delay_range=(2, 20), long_term_delay_draw=draw, num_hidden_layers=1)
        inference = model(ids).logits
        torch.manual_seed(0)
        drawn = [model.train()(ids, use_cache=False).logits for _ in range(4)]
        kinds = {tuple(logits[0, -1].tolist()) for logits in drawn}
        assert len(kinds) > 1 and all(not torch.equal(logits, inference) for logits in drawn)
        rows = model(ids[:1].expand(64, -1), use_cache=False).logits[:, -1]
        assert (len(rows.unique(dim=0)) > 1) == (draw == "sequence")
        cache = DynamicCache(config=model.config)
        assert torch.equal(model(ids, cache=cache).logits, inference)
        assert torch.equal(model.eval()(ids).logits, inference)


@pytest.mark.parametrize("draw", ["step", "sequence"])
def test_a_drawn_m_is_that_of_the_oracle(draw):
    model = make_v2(dtype=torch.float64, long_term_delay_range=(3, 3), long_term_delay=7, long_term_delay_draw=draw)
    ids = make_ids(2, 15)
    for row, logits in zip(ids, model.train()(ids).logits, strict=True):
        torch.testing.assert_close(logits, naive_logits_v2(model.state_dict(), model.config, row, delay=3))


LARGE = {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE |= {"intermediate_size": 14336, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("sizes", "billions"),
    [({"num_long_term_heads": 0}, 8.30), ({}, 9.91)],
    ids=["without long-term memory", "v2"],
)
def test_parameter_counts_of_the_paper(sizes, billions):
    """Gates are 0.01 to 0.02 billion of them; the paper's digits count none."""
    with torch.device("meta"):
        model = MemoryMosaicV2ForCausalLM(MemoryMosaicV2Config(**LARGE, **sizes))
    gates = ("short_term.gate_proj", "short_term.leak_proj", "long_term.gate_proj", "long_term.leak_proj")
    of_gates = sum(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight").endswith(gates))
    assert (model.num_parameters() - of_gates) / 1e9 == pytest.approx(billions, abs=0.005)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.03)


def test_the_transformer_of_the_paper_has_the_same_other_parts():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE, num_key_value_heads=32))
    assert model.num_parameters() / 1e9 == pytest.approx(8.84, abs=0.005)


def test_initial_values_are_the_paper_s():
    config = MemoryMosaicV2Config(vocab_size=500, hidden_size=128, num_hidden_layers=3, num_attention_heads=4)
    torch.manual_seed(0)
    model = MemoryMosaicV2ForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        std = (2 * 128 * (index + 1)) ** -0.5
        memories = (layer.contextual_memory.short_term, layer.contextual_memory.long_term)
        projections = [memory.get_submodule(name) for memory in memories for name in ("k_proj", "v_proj")]
        projections += [layer.contextual_memory.o_proj]
        projections += [layer.persistent_memory.gate_proj, layer.persistent_memory.up_proj]
        for projection in projections:
            assert projection.weight.std().item() == pytest.approx(std, rel=0.05)
            assert projection.weight.abs().max() <= 3 * std
        down = layer.persistent_memory.down_proj.weight
        assert down.std().item() == pytest.approx((2 * 384 * (index + 1)) ** -0.5, rel=0.05)
        for memory in memories:
            gates = torch.cat([memory.gate_proj.weight, memory.leak_proj.weight])
            assert gates.std().item() == pytest.approx(std, rel=0.15)
            assert torch.equal(memory.bandwidth_scale, torch.full((4,), 1.5))
            assert torch.equal(memory.bandwidth_offset, torch.full((4,), 1.5))
            assert torch.equal(memory.bandwidth_exponent, torch.full((4,), 1 / 3))
            assert torch.equal(memory.value_scale, torch.zeros(4))
            assert 0 <= memory.value_mix.min() and memory.value_mix.max() <= 1
    for table in (model.model.embed_tokens, model.lm_head):
        assert table.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(128)) and not config.tie_word_embeddings
    beta = model.model.layers[0].contextual_memory.long_term.beta(torch.tensor([[256]]), torch.float32)
    torch.testing.assert_close(beta, torch.full((1, 4, 1, 1), 32.94), rtol=0, atol=0.01)


def test_every_parameter_of_a_new_model_has_a_gradient():
    """The paper starts lengths of values at theta = 0, where the derivative of |theta| in torch is 0."""
    torch.manual_seed(0)
    model = MemoryMosaicV2ForCausalLM(make_v2().config)
    model(make_ids(2, 30), labels=make_ids(2, 30)).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


def test_names_of_parameters_are_those_that_are_specified():
    names = {name for name, _ in make_v2(num_hidden_layers=1).named_parameters()}
    heads = ("k_proj", "v_proj", "gate_proj", "leak_proj")
    scalars = ("bandwidth_scale", "bandwidth_offset", "bandwidth_exponent", "value_scale", "value_mix")
    layer = "model.layers.0"
    names_of_heads = [*(f"{name}.weight" for name in heads), *scalars]
    levels = [f"{layer}.contextual_memory.{level}" for level in ("short_term", "long_term")]
    expected = {f"{level}.{name}" for level in levels for name in names_of_heads}
    expected |= {f"{layer}.persistent_memory.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    expected |= {f"{layer}.contextual_memory.o_proj.weight", f"{layer}.contextual_norm.weight"}
    expected |= {f"{layer}.persistent_norm.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert names == expected


def test_time_and_room_of_short_term_heads_are_linear():
    """A mask of 2^15 by 2^15 tokens would take a gigabyte, and its float32 numbers four."""
    model = make_v2(num_hidden_layers=1, num_long_term_heads=0, short_term_window=16)
    with torch.no_grad():
        assert model.model(make_ids(1, 2**15), use_cache=False).last_hidden_state.isfinite().all()


def test_what_v2_does_not_read_is_refused():
    model, ids = make_v2(), make_ids(1, 9)
    memory = model.memorize(ids, source="a")
    for use, message in (
        (lambda: memory.consolidate(3), r"pass it, `consolidate\(max_pairs, model=model\)`"),
        (lambda: memory.consolidate(3, model=make_v2(seed=1)), "Another model wrote this memory"),
        (lambda: memory.prompt(ids, bandwidth=0.25), "narrow as they have learnt to"),
        (lambda: make_v2(num_long_term_heads=0).memorize(ids), "no long-term heads"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    with pytest.raises(ValueError, match="flex_attention|FlexAttention|Flex Attention"):
        model.set_attn_implementation("flex_attention")

# SPDX-License-Identifier: Apache-2.0
"""Any way of reading a text into a memory, through any batch operation, gives the logits of one pass over it."""

import contextlib
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.models import BANDWIDTHS, NARROWING, by_bandwidth, make_ids, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GPT2Config, StaticCache
from transformers.utils import generic as library_generic

from modeling_memory_mosaic import (
    MemoryMosaicCacheLayer,
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    MemoryMosaicForSequenceClassification,
    bounded,
    memory_from_state_dict,
    memory_state_dict,
)
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME, MemoryMosaicStates


STATES = MemoryMosaicStates.state_names


def read(model, ids, cache=None, mask=None):
    """Return the logits of `ids`, and the memory after them."""
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    return outputs.logits, outputs.past_key_values


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 69), max_size=6, unique=True),
    seed=st.integers(0, 99),
    bandwidth=st.sampled_from(BANDWIDTHS),
)
def test_any_chunking_equals_one_pass(implementation, cuts, seed, bandwidth):
    model = make_model(dtype=torch.float64, **bandwidth)
    model.set_attn_implementation(implementation)
    ids = make_ids(2, 70, seed=seed)
    cache, logits = None, []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 70], strict=True):
        chunk, cache = read(model, ids[:, start:end], cache)
        logits.append(chunk)
        assert cache.get_seq_length() == end
    torch.testing.assert_close(torch.cat(logits, dim=1), read(model, ids)[0], rtol=0, atol=1e-10)


@by_bandwidth
@pytest.mark.parametrize("static", [False, True])
def test_token_by_token_equals_one_pass(model, static):
    ids = make_ids(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    logits = []
    for position in range(40):
        step, cache = read(model, ids[:, position : position + 1], cache)
        logits.append(step)
    assert_near(torch.cat(logits, dim=1), read(model, ids)[0])


@by_bandwidth
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("prompt_length", [1, 2, 7, 16])
def test_padded_prompts_read_token_by_token_equal_rows_alone(model, prompt_length, side, static):
    """Read unequal prompts in one batch, then eight more tokens each; compare with each row alone without cache."""
    lengths, new_tokens = [prompt_length, 1, 16, 9], 8
    width = max(lengths)
    prompts, more = [make_ids(n, seed=n) for n in lengths], make_ids(4, new_tokens, seed=99)
    ids, mask = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        span = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, span], mask[row, span] = prompt, 1

    cache = StaticCache(config=model.config, max_cache_len=width + new_tokens) if static else None
    logits, cache = read(model, ids, cache, mask)
    steps = [logits]
    for position in range(new_tokens):
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        step, cache = read(model, more[:, position : position + 1], cache, mask)
        steps.append(step)
    logits = torch.cat(steps, dim=1)
    for row, prompt in enumerate(prompts):
        expected = read(model, torch.cat([prompt, more[row]])[None])[0][0]
        assert_near(logits[row, mask[row] == 1], expected)


@by_bandwidth
def test_a_second_padded_turn_equals_rows_alone(model):
    """Padding between two turns leaves the pending value as it is, and does not age the leaky sums."""
    first, second = [make_ids(5, seed=1), make_ids(3, seed=2)], [make_ids(2, seed=3), make_ids(6, seed=4)]
    ids, mask = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for row in range(2):
        ids[row, 5 - len(first[row]) : 5], mask[row, 5 - len(first[row]) : 5] = first[row], 1
        ids[row, 11 - len(second[row]) :], mask[row, 11 - len(second[row]) :] = second[row], 1
    logits, cache = read(model, ids[:, :5], mask=mask[:, :5])
    continued, _ = read(model, ids[:, 5:], cache, mask)
    logits = torch.cat([logits, continued], dim=1)
    for row in range(2):
        assert_near(logits[row, mask[row] == 1], read(model, torch.cat([first[row], second[row]])[None])[0][0])


@by_bandwidth
def test_a_row_of_padding_alone_retrieves_nothing_and_starts_later(model):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    _, cache = read(model, make_ids(2, 3), mask=mask)
    ids = make_ids(2, 4, seed=5)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    assert_near(read(model, ids, cache, mask)[0][1], read(model, ids[1:])[0][0])


OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@by_bandwidth
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_batch_operations_equal_reading_anew(model, name, static):
    operation, rows = OPERATIONS[name]
    ids, more, mask = make_ids(3, 10), make_ids(len(rows), 5, seed=7), torch.ones(3, 10, dtype=torch.long)
    mask[2, :4] = 0
    _, cache = read(model, ids, StaticCache(config=model.config, max_cache_len=16) if static else None, mask)
    operation(cache)
    whole, whole_mask = torch.cat([ids[rows], more], dim=1), torch.cat([mask[rows], torch.ones_like(more)], dim=1)
    expected = read(model, whole, mask=whole_mask)[0][:, 10:]
    # The memory knows its padding, so a mask is not needed to read on.
    assert_near(read(model, more, cache)[0], expected)
    assert torch.equal(cache.layers[0].past_ids(), whole) and torch.equal(cache.layers[0].past_mask(), whole_mask == 1)


@by_bandwidth
@pytest.mark.parametrize("static", [False, True])
def test_a_reset_memory_is_as_good_as_new(model, static):
    ids = make_ids(2, 10)
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    read(model, make_ids(2, 12, seed=5), cache)
    cache.reset()
    first, cache = read(model, ids[:, :4], cache)
    rest, _ = read(model, ids[:, 4:], cache)
    assert_near(torch.cat([first, rest], dim=1), read(model, ids)[0])


@by_bandwidth
def test_a_mask_of_the_new_tokens_alone_is_refused(model):
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        read(model, make_ids(1, 6), cache)
        with pytest.raises(ValueError, match="must cover all 10"):
            read(model, make_ids(1, 4), cache, torch.tensor([[0, 1, 1, 1]]))


@by_bandwidth
def test_a_static_memory_can_be_reordered(model):
    ids, more = make_ids(2, 6), make_ids(2, 3, seed=1)
    _, cache = read(model, ids, StaticCache(config=model.config, max_cache_len=16))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert_near(read(model, more, cache)[0], read(model, torch.cat([ids[[1, 1]], more], dim=1))[0][:, 6:])


@by_bandwidth
def test_offloading_moves_everything_there_and_back(model):
    ids = make_ids(2, 8)
    _, cache = read(model, ids[:, :5])
    for layer in cache.layers:
        layer.offload()
        for name in layer.state_names:
            assert layer.get_state(name).device == layer.device, "needed before the pairs come back"
        layer.prefetch()
    assert_near(read(model, ids[:, 5:], cache)[0], read(model, ids)[0][:, 5:])


def test_states_hold_one_vector_each_and_sums_are_float32():
    model = make_model(dtype=torch.bfloat16)
    _, cache = read(model, make_ids(2, 9))
    for layer in cache.layers:
        assert set(layer.states) == set(STATES)
        for name, state in layer.states.items():
            assert state.shape == (2, 3, 1, 8)
            assert state.dtype == (torch.bfloat16 if name == "pending_value" else torch.float32)
            assert state.untyped_storage().nbytes() == state.nbytes, "the whole trajectory is kept alive"
        assert layer.keys.shape == (2, 3, 9, 8)
        assert not layer.keys[:, :, 0].any() and not layer.values[:, :, 0].any()


@pytest.mark.parametrize("policy", [None, "lru"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_states_keep_no_storage_of_other_tokens(model, batch_size, policy):
    with contextlib.nullcontext() if policy is None else bounded(model, max_pairs=8, policy=policy):
        _, cache = read(model, make_ids(batch_size, 40))
    for layer in cache.layers:
        # Storage of keys and values grows ahead of what it holds.
        kept = {name: value for name, value in vars(layer).items() if name not in ("keys", "values")}
        kept |= layer.states | kept.get("counters", {})
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                assert value.untyped_storage().nbytes() == value.nbytes, name


@by_bandwidth
@pytest.mark.parametrize("removed", [1, 3, 6])
def test_recorded_tokens_can_be_taken_back(model, removed):
    ids, more = make_ids(1, 10), make_ids(1, 4, seed=3)
    _, cache = read(model, ids[:, :3])
    cache.activate_past_recording()
    _, cache = read(model, ids[:, 3:7], cache)
    _, cache = read(model, ids[:, 7:], cache)
    cache.crop(-removed)
    expected = read(model, torch.cat([ids[:, : 10 - removed], more], dim=1))[0][:, 10 - removed :]
    assert_near(read(model, more, cache)[0], expected)


@by_bandwidth
def test_unrecorded_tokens_cannot_be_taken_back(model):
    _, cache = read(model, make_ids(1, 10))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)
    assert cache.get_seq_length() == 10, "a refused crop must leave the memory as it was"
    cache.crop(0)
    with pytest.raises(RuntimeError, match="reset"):
        cache.crop(-11)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(5)


@by_bandwidth
@pytest.mark.parametrize("is_recorded", [False, True])
def test_all_tokens_can_be_taken_back(model, is_recorded):
    """Assisted decoding crops everything if the first guess behind a prompt of one token is wrong."""
    ids = make_ids(1, 6)
    cache = DynamicCache(config=model.config)
    if is_recorded:
        cache.activate_past_recording()
    read(model, make_ids(1, 3, seed=1), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 0
    assert_near(read(model, ids, cache)[0], read(model, ids)[0])


@by_bandwidth
def test_recording_can_be_switched_off(model):
    ids = make_ids(1, 12)
    _, cache = read(model, ids[:, :3])
    cache.activate_past_recording()
    read(model, ids[:, 3:8], cache)
    for layer in cache.layers:
        assert layer.states and all(state.shape[2] == 6 for state in layer.states.values())
        layer.deactivate_past_recording()
        assert all(state.shape[2] == 1 for state in layer.states.values())
    assert_near(read(model, ids[:, 8:], cache)[0], read(model, ids)[0][:, 8:])
    assert all(state.shape[2] == 1 for layer in cache.layers for state in layer.states.values())


@by_bandwidth
def test_a_static_memory_refuses_to_crop(model):
    _, cache = read(model, make_ids(1, 4), StaticCache(config=model.config, max_cache_len=8))
    with pytest.raises(RuntimeError, match="DynamicCache"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "make_cache",
    [
        lambda config: DynamicCache(),
        lambda config: DynamicCache(config=GPT2Config(n_layer=2, n_head=3, n_embd=24)),
        lambda config: ((torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 4, 8)),) * 2,  # as older code made them
    ],
)
def test_a_memory_of_another_model_is_refused(model, make_cache):
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(make_ids(1, 3), past_key_values=make_cache(model.config))


@by_bandwidth
def test_a_full_static_memory_says_what_to_do(model):
    cache = StaticCache(config=model.config, max_cache_len=8)
    read(model, make_ids(2, 6), cache)
    with pytest.raises(ValueError, match="max_cache_len=8 holds 6 tokens already.*DynamicCache"):
        read(model, make_ids(2, 3), cache)
    assert cache.get_seq_length() == 6


@by_bandwidth
def test_padding_that_a_memory_holds_needs_no_mask(model):
    """Without this, slots at padding would be read as pairs."""
    ids, mask = make_ids(2, 9), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]])
    expected = read(model, ids, mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1))[0][:, 5:]
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=9)):
        read(model, ids[:, :5], cache, mask)
        steps = [read(model, ids[:, [position]], cache)[0] for position in range(5, 7)]
        assert_near(torch.cat([*steps, read(model, ids[:, 7:], cache)[0]], dim=1), expected)


@pytest.mark.parametrize("head", [None, MemoryMosaicForCausalLM, MemoryMosaicForSequenceClassification])
def test_a_memory_has_two_names(model, head):
    """transformers calls it `cache` from 5.24 on, `past_key_values` before: both serve on all versions."""
    model = model.model if head is None else head(model.config).eval()
    ids, mask = make_ids(2, 9), torch.ones(2, 9)
    answers = []
    for names in (["past_key_values"], ["cache"], ["past_key_values", "cache"]):
        memory = DynamicCache(config=model.config)
        given = dict.fromkeys(names, memory)
        with torch.no_grad():
            model(ids[:, :5], attention_mask=mask[:, :5], **given)
            outputs = model(ids[:, 5:], attention_mask=mask, **given)
        assert outputs.past_key_values is memory and memory.get_seq_length() == 9
        answers.append({"outputs": outputs[0], **memory_state_dict(memory)})
    for answer in answers[1:]:
        assert all(torch.equal(answer[name], tensor) for name, tensor in answers[0].items())
    other = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="two memories"):
        model(ids, attention_mask=mask, past_key_values=memory, cache=other)
    with pytest.raises(ValueError, match="two memories"):
        model(ids, mask, None, other, cache=memory)
    assert (memory.get_seq_length(), other.get_seq_length()) == (9, 0)


@pytest.mark.skipif(MEMORY_NAME != "cache", reason="it is no old name yet")
def test_the_old_name_of_a_memory_is_warned_of_where_a_caller_uses_it(model):
    """The warning comes once for each use, and not where models pass the memory on to each other."""
    ids = make_ids(2, 5)
    classifier = MemoryMosaicForSequenceClassification(model.config)
    for each in (model, model.model, classifier):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given = {"attention_mask": torch.ones_like(ids)}
            each(ids, past_key_values=DynamicCache(config=model.config), **given)
            assert [str(warning.message)[:38] for warning in caught] == ["`past_key_values` is deprecated, as in"]
            each(ids, cache=DynamicCache(config=model.config), **given)
            each(ids, past_key_values=None, **given)
            assert len(caught) == 1


@pytest.mark.parametrize("model", [{}, NARROWING], indirect=True, ids=["fixed", "narrowing"])
def test_masks_know_both_names_of_a_memory(model):
    """`generate` makes the masks before a compiled step, and passes the memory by the name that its version uses."""
    memory = StaticCache(config=model.config, max_cache_len=8)
    read(model, make_ids(1, 3), memory)
    inputs = {"config": model.config, "inputs_embeds": torch.zeros(1, 2, 24), "attention_mask": torch.ones(1, 5)}
    old = model.create_masks_for_generate(**inputs, past_key_values=memory)
    new = model.create_masks_for_generate(**inputs, cache=memory)
    old_mask, new_mask = (masks["slot_mask"].mask(num_queries=2, num_pairs=8) for masks in (old, new))
    assert old_mask.shape == (1, 1, 2, 8) and torch.equal(old_mask, new_mask)
    scales = [masks["query_scale"] for masks in (old, new)]
    if model.config.bandwidth_exponent:  # the tokens see 3 and 4 pairs
        torch.testing.assert_close(scales, [torch.tensor([[1, (4 / 3) ** 0.25]])] * 2)
    else:
        assert scales == [None, None]
    with pytest.raises(ValueError, match="two memories"):
        model.create_masks_for_generate(**inputs, past_key_values=memory, cache=DynamicCache(config=model.config))


def test_no_outdated_name_is_used_within(model, monkeypatch):
    """The name that the installed version uses gives no warning of deprecation."""

    def fail(message, *args, **kwargs):
        raise AssertionError(message)

    monkeypatch.setattr(library_generic.logger, "warning_once", fail)
    ids = make_ids(2, 5)
    for cache_implementation in (None, "static"):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            cache_implementation=cache_implementation,
            disable_compile=True,
        )
    classifier = MemoryMosaicForSequenceClassification(model.config)
    for answer in (model(ids), classifier(ids, attention_mask=torch.ones_like(ids))):
        assert "past_key_values" in [*answer] or "cache" in [*answer]


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, "mosaic v2 otherwise"], indirect=True, ids=["fixed", "v2 otherwise"])
def test_a_saved_memory_continues_in_a_new_process(model, tmp_path):
    model.float()  # where loaded weights begin in memory moves the last bit in float64
    ids = make_ids(2, 12)
    _, cache = read(model, ids[:, :7])
    save_file(memory_state_dict(cache), tmp_path / "memory.safetensors", metadata={"model_type": "memory_mosaic"})
    model.save_pretrained(tmp_path / "model")
    expected = read(model, ids[:, 7:], cache)[0]
    save_file({"ids": ids[:, 7:].contiguous(), "logits": expected.contiguous()}, tmp_path / "expected.safetensors")
    script = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from modeling_memory_mosaic import memory_from_state_dict
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder + "/model").eval()
memory = memory_from_state_dict(model.config, load_file(folder + "/memory.safetensors"))
expected = load_file(folder + "/expected.safetensors")
with torch.no_grad():
    assert torch.equal(model(expected["ids"], past_key_values=memory).logits, expected["logits"])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


@by_bandwidth
def test_an_empty_memory_can_be_saved_too(model):
    cache = memory_from_state_dict(model.config, memory_state_dict(DynamicCache(config=model.config)))
    ids = make_ids(1, 5)
    assert_near(read(model, ids, cache)[0], read(model, ids)[0])


def test_a_foreign_saved_memory_is_refused(model):
    tensors = memory_state_dict(read(model, make_ids(1, 5))[1])
    incomplete = {name: tensor for name, tensor in tensors.items() if "pending" not in name}
    with pytest.raises(ValueError, match="layers.0.pending_value"):
        memory_from_state_dict(model.config, incomplete)
    with pytest.raises(ValueError, match="shape"):
        memory_from_state_dict(make_model(num_attention_heads=6).config, tensors)
    shorter = tensors | {name: tensors[name][:, :, :3] for name in ("layers.1.keys", "layers.1.values")}
    with pytest.raises(ValueError, match="Not one memory"):
        memory_from_state_dict(model.config, shorter)
    with pytest.raises(ValueError, match="StaticCacheLayer"):
        memory_state_dict(StaticCache(config=model.config, max_cache_len=4))
    without_writer = {name: tensor for name, tensor in tensors.items() if name != "fingerprint"}
    with pytest.raises(ValueError, match="does not tell which weights wrote it"):
        memory_from_state_dict(model.config, without_writer)


IMPOSSIBLE = {
    "not finite": lambda tensor: torch.full_like(tensor, float("nan")),
    "not finite too": lambda tensor: torch.full_like(tensor, -float("inf")),
    "whole numbers": lambda tensor: tensor.long(),
    "truth values": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "eight bits": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "of three dimensions": lambda tensor: tensor[0],
}


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_a_memory_of_impossible_numbers_is_refused(model, change):
    tensors = memory_state_dict(read(model, make_ids(1, 5))[1])
    for name in ("layers.0.keys", "layers.1.values", "layers.0.contextual_sum", "layers.1.pending_value"):
        with pytest.raises(ValueError, match=name):
            memory_from_state_dict(model.config, tensors | {name: IMPOSSIBLE[change](tensors[name])})


def test_a_memory_without_slots_or_with_another_text_is_refused(model):
    tensors = memory_state_dict(read(model, make_ids(1, 5), mask=torch.tensor([[0, 1, 1, 1, 1]]))[1])
    emptied = {name: tensor[:, :, :0] for name, tensor in tensors.items() if name.endswith((".keys", ".values"))}
    with pytest.raises(ValueError, match="at least one of each"):
        memory_from_state_dict(model.config, tensors | emptied)
    for name, other in (
        ("input_ids", tensors["input_ids"][:, 1:]),
        ("input_ids", tensors["input_ids"].float()),
        ("attention_mask", tensors["attention_mask"].long()),
    ):
        with pytest.raises(ValueError, match=name):
            memory_from_state_dict(model.config, tensors | {name: other.contiguous()})
    mixed = tensors | {"layers.1.keys": tensors["layers.1.keys"].double()}
    with pytest.raises(ValueError, match="float32.*float64"):
        memory_from_state_dict(model.config, mixed)


def test_layers_are_chosen_by_the_configuration(model):
    cache = DynamicCache(config=model.config)
    assert [type(layer) for layer in cache.layers] == [MemoryMosaicCacheLayer] * 2
    assert not cache.is_compileable and StaticCache(config=model.config, max_cache_len=4).is_compileable


def test_saved_files_hold_tensors_of_their_own(model, tmp_path):
    save_file(memory_state_dict(read(model, make_ids(1, 5))[1]), tmp_path / "memory.safetensors")
    assert len(load_file(tmp_path / "memory.safetensors")) == 2 * (2 + len(STATES)) + 2


def test_pairs_without_their_ids_are_no_text_that_is_known(model):
    """A memory that something else filled does not claim to hold only the ids read behind that."""
    memory, empty = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(make_ids(1, 4), **{MEMORY_NAME: memory})
    for layer, (source, filled) in enumerate(zip(memory.layers, empty.layers, strict=True)):
        empty.update(source.keys, source.values, layer)
        for name in source.state_names:
            filled.set_state(name, source.states[name])
    model(make_ids(1, 2, seed=1), **{MEMORY_NAME: empty})
    assert empty.get_seq_length() == 6 and empty.layers[0].past_ids() is None


class TwinConfig(MemoryMosaicConfig):
    model_type = "twin_of_memory_mosaic"

    @property
    def layer_types(self):
        return ["memory_mosaic"] * self.num_hidden_layers


def test_a_configuration_of_another_name_reads_the_memory_that_it_makes():
    model = MemoryMosaicForCausalLM(TwinConfig(vocab_size=61, hidden_size=24, num_attention_heads=3)).eval()
    memory, ids = DynamicCache(config=model.config), make_ids(1, 7)
    model(ids[:, :4], **{MEMORY_NAME: memory})
    logits = model(ids[:, 4:], **{MEMORY_NAME: memory}).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 4:], rtol=0, atol=1e-5)

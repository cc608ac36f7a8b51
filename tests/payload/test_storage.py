# SPDX-License-Identifier: Apache-2.0
"""Pairs are written in place: no history of operations shows, not on a memory and not on its copies."""

import copy
import pickle

import pytest
import torch
from helpers.kinds import V2_KINDS, make_mosaic
from helpers.models import by_bandwidth, make_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from modeling_memory_mosaic import memory_from_state_dict, memory_state_dict


def read(model, ids, cache, with_gradient=False):
    """Return the logits of `ids` `(B, T)` behind a memory."""
    with torch.set_grad_enabled(with_gradient):
        return model(ids, past_key_values=cache, use_cache=True).logits


# Each takes a memory and its text `(B, T)` and returns the memory to go on with, and its text.
def reordered(model, cache, ids):
    rows = torch.arange(ids.shape[0]).flip(0)
    cache.reorder_cache(rows)
    return cache, ids[rows]


def repeated(model, cache, ids):
    if ids.shape[0] > 2:
        return cache, ids
    cache.batch_repeat_interleave(2)
    return cache, ids.repeat_interleave(2, dim=0)


def selected(model, cache, ids):
    cache.batch_select_indices(torch.tensor([ids.shape[0] - 1]))
    return cache, ids[-1:]


def cropped(model, cache, ids):
    cache.activate_past_recording()
    read(model, make_ids(ids.shape[0], 3, seed=4), cache)
    cache.crop(-2)
    for layer in cache.layers:
        layer.deactivate_past_recording()
    return cache, torch.cat([ids, make_ids(ids.shape[0], 3, seed=4)[:, :1]], dim=1)


def pickled(model, cache, ids):
    return pickle.loads(pickle.dumps(cache)), ids


def saved(model, cache, ids):
    return memory_from_state_dict(model.config, memory_state_dict(cache)), ids


def read_with_gradient(model, cache, ids):
    more = make_ids(ids.shape[0], 2, seed=6)
    read(model, more, cache, with_gradient=True)
    return cache, torch.cat([ids, more], dim=1)


CHANGES = [reordered, repeated, selected, cropped, pickled, saved, read_with_gradient]
STEP = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 5)),
    st.tuples(st.just("token"), st.integers(1, 9)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("change"), st.integers(0, len(CHANGES) - 1)),
)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(STEP, st.integers(0, 3)), min_size=1, max_size=12),
    variant=st.sampled_from([({}, torch.float32), ({}, torch.float64), *((name, torch.float64) for name in V2_KINDS)]),
)
def test_no_history_of_operations_shows(steps, variant):
    # Without a graph, which torch cannot copy: gradients may be recorded, but there are none.
    fields, dtype = variant
    model = make_mosaic(fields, dtype=dtype).requires_grad_(False)
    first = make_ids(2, 3)
    cache = DynamicCache(config=model.config)
    read(model, first, cache)
    memories = [(cache, first)]
    for seed, ((name, argument), chosen) in enumerate(steps):
        place = chosen % len(memories)
        cache, ids = memories[place]
        if name == "copy":
            memories.append((copy.deepcopy(cache), ids))
            continue
        if name == "change":
            memories[place] = CHANGES[argument](model, cache, ids)
            continue
        more = make_ids(ids.shape[0], argument, seed=seed + 10)
        for part in more.split(1 if name == "token" else argument, dim=1):
            read(model, part, cache)
        memories[place] = cache, torch.cat([ids, more], dim=1)
    for cache, ids in memories:
        assert cache.get_seq_length() == ids.shape[1]
        more = make_ids(ids.shape[0], 2, seed=1)
        expected = read(model, torch.cat([ids, more], dim=1), None)[:, -2:]
        atol = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(read(model, more, cache), expected, rtol=0, atol=atol)


@by_bandwidth
def test_no_more_than_twice_the_memory_in_use_is_held(model):
    cache = DynamicCache(config=model.config)
    read(model, make_ids(2, 7), cache)
    for token in make_ids(2, 60).split(1, dim=1):
        read(model, token, cache)
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values):
                assert tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes


def test_tokens_are_not_copied_one_by_one(model):
    """Storage doubles, so that its addresses change a few times only."""
    cache = DynamicCache(config=model.config)
    read(model, make_ids(1, 2), cache)
    addresses = set()
    for token in make_ids(1, 200).split(1, dim=1):
        read(model, token, cache)
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) <= 9


def test_views_of_a_memory_keep_what_they_show(model):
    """A caller may keep what one step returned."""
    cache = DynamicCache(config=model.config)
    read(model, make_ids(1, 5), cache)
    kept = []
    for token in make_ids(1, 20).split(1, dim=1):
        read(model, token, cache)
        keys = cache.layers[0].keys
        kept.append((keys, keys.clone()))
    assert all(torch.equal(view, clone) for view, clone in kept)


def test_two_memories_that_share_tensors_part_ways(model):
    """The second is made of the first one's layers, without a copy of their numbers."""
    cache, ids = DynamicCache(config=model.config), make_ids(1, 5)
    read(model, ids, cache)
    read(model, ids[:, :1], cache)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        layer.states = dict(layer.states)
    texts = make_ids(1, 4, seed=8), make_ids(1, 4, seed=9)
    for first, second in zip(*(text.split(1, dim=1) for text in texts), strict=True):
        read(model, first, cache)
        read(model, second, other)
    for memory, text in zip((cache, other), texts, strict=True):
        whole = torch.cat([ids, ids[:, :1], text, ids], dim=1)
        expected = read(model, whole, None)[:, -5:]
        torch.testing.assert_close(read(model, ids, memory), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_memory_of_one_mode_is_continued_in_the_other(model, mode):
    ids = make_ids(1, 12)
    cache = DynamicCache(config=model.config)
    with mode():
        for token in ids[:, :6].split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
    with torch.inference_mode() if mode is torch.no_grad else torch.no_grad():
        logits = [model(token, past_key_values=cache, use_cache=True).logits for token in ids[:, 6:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), read(model, ids, None)[:, 6:], rtol=0, atol=1e-5)


def test_scalars_are_those_of_the_weights_as_they_are(model):
    """What a memory keeps of per-head scalars follows the weights, from one token to the next."""
    ids, cache = make_ids(1, 6), DynamicCache(config=model.config)
    read(model, ids, cache)
    twin, other = copy.deepcopy(model), copy.deepcopy(cache)
    with torch.no_grad():
        for each in (model, twin):
            for name, parameter in each.named_parameters():
                if name.endswith(model.no_weight_decay_names):
                    parameter.mul_(1.1)
    for layer in other.layers:
        assert layer.scalars == {}, "a copy computes its own"
        layer.writer = None
    assert torch.equal(read(model, ids[:, :1], cache), read(twin, ids[:, :1], other))


def test_weights_are_written_and_freed_behind_a_memory(model):
    """A memory and its copies hold nothing of the parameters themselves."""
    ids, cache = make_ids(1, 6), DynamicCache(config=model.config)
    read(model, ids, cache)
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for layer in cache.layers:
        for scalars in layer.scalars.values():
            kept = [part for part in scalars if isinstance(part, torch.Tensor)]
            assert not pointers & {tensor.untyped_storage().data_ptr() for tensor in kept}
    with torch.no_grad():
        model.model.layers[0].contextual_memory.value_mix.mul_(1.1)
    assert copy.deepcopy(cache).get_seq_length() == 6


def test_copies_and_files_hold_no_room(model):
    cache = DynamicCache(config=model.config)
    read(model, make_ids(1, 5), cache)
    for token in make_ids(1, 3).split(1, dim=1):
        read(model, token, cache)
    assert cache.layers[0].keys.untyped_storage().nbytes() > cache.layers[0].keys.nbytes
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for layer, original in zip(other.layers, cache.layers, strict=True):
            assert torch.equal(layer.keys, original.keys)
            for tensor in (layer.keys, layer.values):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_memory_is_shared_by_rows_of_a_transform(model):
    """`vmap` cannot write in place, so pairs are copied."""
    cache, tokens = DynamicCache(config=model.config), make_ids(3, 1)
    read(model, make_ids(1, 5), cache)
    read(model, make_ids(1, 1), cache)
    expected = [read(model, token[None], copy.deepcopy(cache)) for token in tokens]

    def step(token):
        return model(token[None], past_key_values=copy.copy(cache), use_cache=True).logits

    with torch.no_grad():
        logits = torch.func.vmap(step)(tokens)
    torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-5)

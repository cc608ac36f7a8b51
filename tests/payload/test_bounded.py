# SPDX-License-Identifier: Apache-2.0
"""Memories of a bounded number of pairs: what is left is read as the oracle reads it, in any way of reading."""

import contextlib
import copy

import pytest
import torch
from helpers.beams import beam_search
from helpers.kinds import V2_KINDS, make_mosaic, make_v2
from helpers.models import NARROWING, make_ids
from transformers import DynamicCache, StaticCache

from modeling_memory_mosaic import MosaicMemory, bounded, memory_from_state_dict, memory_state_dict
from modeling_memory_mosaic.bounded_memory_mosaic import BOUNDED_LAYERS, POLICIES, BoundedMemoryLayer
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from modeling_memory_mosaic.naive_memory_mosaic import naive_logits
from modeling_memory_mosaic.naive_memory_mosaic_v2 import naive_logits_v2


DETERMINISTIC = sorted(POLICIES.keys() - {"random"})
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 61}


@pytest.fixture(params=["mosaic", *V2_KINDS])
def model(request):
    return make_mosaic({} if request.param == "mosaic" else request.param, dtype=torch.float64)


def oracle_logits(model, ids, **options):
    """Return the logits `(T, vocab_size)` of one text by the paper's loops."""
    naive = naive_logits_v2 if hasattr(model.config, "long_term_delay") else naive_logits
    state = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    return naive({name: tensor.detach() for name, tensor in state.items()}, model.config, ids, **options)


@torch.no_grad()
def read(model, ids, cache=None, **kwargs):
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(ids, **{MEMORY_NAME: cache}, **kwargs).logits, cache


@pytest.mark.parametrize("max_pairs", [2, 5, 16, 33])
@pytest.mark.parametrize("policy", DETERMINISTIC)
def test_what_is_left_is_read_as_the_oracle_reads_it(policy, max_pairs, model):
    ids = make_ids(1, 40)
    expected = oracle_logits(model, ids[0], bound=(max_pairs, policy))
    with bounded(model, max_pairs, policy):
        logits, cache = read(model, ids)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-9)
    assert not torch.allclose(logits, model(ids).logits, atol=1e-3)
    assert cache.layers[0].keys.shape[2] == max_pairs and cache.get_seq_length() == 40


@pytest.mark.parametrize("max_pairs", [5, 16, 33])
def test_what_a_draw_leaves_is_read_as_the_oracle_reads_it(max_pairs, model):
    """Pairs in the middle go too. Both draw by the number of the pair, so that they draw alike."""
    ids, step = make_ids(1, 40), 5**0.5
    expected = oracle_logits(model, ids[0], bound=(max_pairs, lambda pair: pair["born"] * step % 1))
    with bounded(model, max_pairs, lambda layer: layer.counters["born"] * step % 1):
        logits, cache = read(model, ids)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-9)
    layer = cache.layers[0]
    born = layer.counters["born"][0, 0, : int(layer.held)]
    assert (born.diff() > 1).any() and (born.diff() > 0).all()


def test_random_eviction_is_drawn_for_each_head_and_repeats_with_a_seed(model):
    ids, born = make_ids(1, 40), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with bounded(model, 8, "random"):
            layer = read(model, ids)[1].layers[0]
        born.append(layer.counters["born"][0, :, : int(layer.held)])
    assert torch.equal(born[0], born[1]) and not torch.equal(born[0], born[2])
    assert not torch.equal(born[0][0], born[0][1]) and (born[0].diff() > 1).any()


@pytest.mark.parametrize("variant", ["mosaic", "mosaic v2"])
def test_usage_does_not_favour_pairs_for_their_age(variant):
    """An old pair that each of many tokens used a little goes before a new one that few tokens used much."""
    model = make_mosaic({}) if variant == "mosaic" else make_v2(long_term_delay=1)
    layer = BOUNDED_LAYERS[model.config.layer_types[0]](model.config, 3, "usage")
    keys = torch.eye(4)  # of pairs named old, other, new and next
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])

    def see(weights, completed=None):
        query = torch.tensor([*weights, *(1e-9,) * (4 - len(weights))]).log()
        key = keys[3] * 0 if completed is None else keys[completed]
        parts = [part.view(1, 1, 1, 4) for part in (query, key, key)]
        layer.read(*parts, yes, no if completed is None else yes, beta=lambda num_pairs: torch.ones(1, 1, 1, 1))

    with torch.no_grad():
        see((1.0,), completed=0)
        see((0.3, 0.7), completed=1)
        for _ in range(30):
            see((0.3, 0.7))
        see((0.05, 0.05, 0.9), completed=2)
        see((0.05, 0.05, 0.9))
        usage = layer.counters["usage"][0, 0]
        assert usage[0] > 4 * usage[2]
        see((0.25, 0.25, 0.25), completed=3)
    assert torch.equal(layer.keys[0, 0], keys[1:])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", [{}, NARROWING, *V2_KINDS], ids=["fixed", "narrowing", *V2_KINDS])
def test_with_room_for_all_pairs_nothing_changes(variant, policy):
    model, ids = make_mosaic(variant, dtype=torch.float64), make_ids(2, 40)
    with bounded(model, 40, policy):
        logits, _ = read(model, ids)
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", DETERMINISTIC)
def test_any_chunks_leave_the_same_pairs(policy, model):
    ids = make_ids(2, 40)
    with bounded(model, 10, policy):
        whole, expected = read(model, ids)
        for lengths in ((1,) * 40, (7, 1, 30, 2), (39, 1)):
            cache, logits = DynamicCache(config=model.config), []
            for chunk in ids.split(lengths, dim=1):
                logits.append(read(model, chunk, cache)[0])
            torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-10)
            for one, other in zip(cache.layers, expected.layers, strict=True):
                torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-10)
                torch.testing.assert_close(one.counters, other.counters, rtol=0, atol=1e-9)


@pytest.mark.parametrize("policy", DETERMINISTIC)
def test_a_padded_row_is_the_row_alone(policy, model):
    lengths, width = (30, 17, 1), 33
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :], mask[row, width - length :] = make_ids(length, seed=row), 1
    mask[0, 10] = 0  # and within a text
    with bounded(model, 8, policy):
        logits, cache = read(model, ids, attention_mask=mask)
        following = read(
            model, make_ids(3, 5, seed=7), cache, attention_mask=torch.cat([mask, mask.new_ones(3, 5)], 1)
        )[0]
        for row in range(3):
            is_token = mask[row].bool()
            alone, own = read(model, ids[row : row + 1, is_token])
            then, _ = read(model, make_ids(3, 5, seed=7)[row : row + 1], own)
            torch.testing.assert_close(logits[row, is_token], alone[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(following[row], then[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "policy", ["lru", *(pytest.param(name, marks=pytest.mark.slow) for name in DETERMINISTIC if name != "lru")]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_reading_token_by_token(beams, policy, model):
    ids = make_ids(2, 20)
    with bounded(model, 8, policy):
        texts = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=beams, **GREEDY)
        for row, text in enumerate(texts):
            expected = beam_search(lambda whole: read(model, whole)[0][0, -1], ids[row : row + 1], beams, 6)
            assert torch.equal(text, expected[0])


def test_rows_are_reordered_repeated_and_chosen_with_their_counters(model):
    ids = make_ids(3, 20)
    with bounded(model, 8, "usage"):
        _, cache = read(model, ids)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2, 5]))
        copied = copy.deepcopy(cache)
        expected = read(model, make_ids(3, 9, seed=1), read(model, ids[[2, 0, 1]])[1])[0]
        for one in (cache, copied):
            logits = read(model, make_ids(3, 9, seed=1), one)[0]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        cache.reset()
        torch.testing.assert_close(read(model, ids, cache)[0], read(model, ids)[0], rtol=0, atol=1e-10)


def joined(model, order=(0, 1, 2)):
    """Return the memory of three texts of 8, 4 and 6 pairs, joined in an order."""
    texts = [model.memorize(make_ids(1, n, seed=n), source=str(n)) for n in (9, 5, 7)]
    return MosaicMemory.union([texts[index] for index in order])


@torch.no_grad()
def test_joined_texts_are_bounded_when_a_question_is_read(model):
    memory, question = joined(model), make_ids(1, 6, seed=3)
    for policy in POLICIES:
        with bounded(model, 40, policy):
            logits = model(**memory.prompt(question)).logits
        torch.testing.assert_close(logits, model(**memory.prompt(question)).logits, rtol=0, atol=1e-10)
    with bounded(model, 5, "random"):
        arguments = memory.prompt(question)
        model(**arguments)
    assert arguments[MEMORY_NAME].layers[0].counters["born"].shape[-1] == 5
    with bounded(model, 5, "fifo"):
        assert model.generate(**memory.prompt(question), **GREEDY).shape[1] == 12


@torch.no_grad()
def test_of_joined_texts_first_in_first_out_keeps_those_joined_last(model):
    """A question of one token completes no pair, so that what is left of the joined ones answers it."""
    question = make_ids(1, 1, seed=3)
    for order, kept in (((0, 1, 2), (0, 3, 6)), ((2, 0, 1), (0, 5, 4))):
        memory = joined(model, order)
        with bounded(model, 9, "fifo"):
            logits = model(**memory.prompt(question)).logits
        for name, number in zip(memory.sources[:], kept, strict=True):
            num_pairs = int(name) - 1
            memory.forget(name, tokens=slice(0, num_pairs - number)) if number < num_pairs else None
        assert len(memory) == 9
        torch.testing.assert_close(logits, model(**memory.prompt(question)).logits, rtol=0, atol=1e-10)


def by_length(layer):
    return layer.values.norm(dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["lru", "usage", "surprise", by_length])
def test_joined_pairs_are_not_chosen_among_by_what_is_not_known_of_them(policy, model):
    """In any order: what they were used for, and how they surprised, was not kept."""
    question = make_ids(1, 6, seed=3)
    for order in ((0, 1, 2), (2, 1, 0)):
        memory = joined(model, order)
        with bounded(model, 17, policy), pytest.raises(ValueError, match=r"more pairs.* than the bound of 17.*fifo"):
            model(**memory.prompt(question))
    # A text that was read without a bound is no different.
    _, cache = read(model, make_ids(1, 40))
    with bounded(model, 17, policy), pytest.raises(ValueError, match="without a bound.* than the bound of 17"):
        read(model, question, cache)
    assert cache.get_seq_length() == 40 and not isinstance(cache.layers[0], BoundedMemoryLayer)
    # The remedy of the message.
    with bounded(model, 5, policy if isinstance(policy, str) else "lru"):
        memory = joined(model)
    with bounded(model, 17 + 18, policy):
        model(**memory.prompt(question))


@torch.no_grad()
def test_joined_pairs_that_fit_are_chosen_among_by_the_use_that_a_question_makes_of_them(model):
    """So the order of joining does not matter, but of pairs that are rated alike."""
    question, answers = make_ids(1, 12, seed=3), []
    for order in ((0, 1, 2), (2, 1, 0)):
        with bounded(model, 18, "usage"):
            answers.append(model(**joined(model, order).prompt(question)).logits)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-10)
    whole = model(**joined(model).prompt(question)).logits
    assert not torch.allclose(answers[0], whole, atol=1e-6)


def test_a_function_may_rate_pairs(model):
    """By the length of values, which all have one: the older pairs go."""
    ids = make_ids(1, 30)
    with bounded(model, 8, lambda layer: torch.zeros_like(layer.counters["born"])):
        logits, _ = read(model, ids)
    with bounded(model, 8, "fifo"):
        torch.testing.assert_close(logits, read(model, ids)[0], rtol=0, atol=1e-10)


def test_memory_stays_constant_however_long_the_text(model):
    sizes = []
    with bounded(model, 16, "lru"):
        _, cache = read(model, make_ids(1, 50))
        for _ in range(4):
            read(model, make_ids(1, 100), cache)
            layer = cache.layers[0]
            held = [layer.keys, layer.values, *layer.counters.values(), *layer.states.values()]
            for others in ("waiting", "windows"):  # of v2
                held += getattr(layer, others, {}).values()
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in held))
            assert layer.read_ids is None and layer.read_mask is None
    assert len(set(sizes)) == 1


def test_what_cannot_be_bounded_is_refused(model):
    for max_pairs in (0, 1, -3, 2.5, True, None):
        with pytest.raises(ValueError, match="max_pairs"), bounded(model, max_pairs):
            pass
    with pytest.raises(ValueError, match="policy='best'"), bounded(model, 8, "best"):
        pass
    with pytest.raises(ValueError, match="no memories"), bounded(torch.nn.Linear(2, 2), 8):
        pass
    with bounded(model, 8):
        with pytest.raises(ValueError, match="static memory"):
            model(make_ids(1, 4), **{MEMORY_NAME: StaticCache(config=model.config, max_cache_len=9)})
        with pytest.raises(ValueError, match="no gradient"):
            model(make_ids(1, 4), use_cache=True)
        _, cache = read(model, make_ids(1, 4))
        with pytest.raises(RuntimeError, match="cannot take tokens back"):
            cache.crop(-1)
    assert isinstance(cache.layers[0], BoundedMemoryLayer)
    # Outside, memories have no bound.
    _, cache = read(model, make_ids(1, 20))
    assert cache.layers[0].keys.shape[2] == 20


@pytest.mark.parametrize("policy", DETERMINISTIC)
def test_a_bounded_memory_is_saved_with_its_counters(policy, model):
    ids, mask = make_ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = 0
    with bounded(model, 8, policy):
        cache = read(model, ids, attention_mask=mask)[1]
        tensors = memory_state_dict(cache)
        loaded = memory_from_state_dict(model.config, tensors, policy=policy)
        expected = read(model, make_ids(2, 15, seed=1), cache)[0]
        torch.testing.assert_close(read(model, make_ids(2, 15, seed=1), loaded)[0], expected, rtol=0, atol=0)
    # It stays bounded where nothing else is.
    loaded = memory_from_state_dict(model.config, tensors, policy=policy)
    logits = read(model, make_ids(2, 15, seed=1), loaded)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert loaded.layers[0].keys.shape[2] == 8
    for name, change, message in (
        ("layers.1.usage", lambda tensor: tensor[:, :, 1:], "usage of a bounded memory must be"),
        ("layers.0.held", lambda tensor: tensor + 100, "room for 8"),
        ("layers.0.error", lambda tensor: tensor * torch.nan, "impossible numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            memory_from_state_dict(model.config, tensors | {name: change(tensors[name])}, policy=policy)
    with pytest.raises(ValueError, match="policy=None"):
        memory_from_state_dict(model.config, tensors)


def test_a_cache_of_joined_texts_is_saved_as_a_memory(model):
    memory = model.memorize(make_ids(1, 9), source="text")
    arguments = memory.prompt(make_ids(1, 3))
    model(**arguments)
    with pytest.raises(ValueError, match="save the `MosaicMemory`"):
        memory_state_dict(arguments[MEMORY_NAME])


@torch.no_grad()
@pytest.mark.parametrize("policy", ["fifo", "usage"])
@pytest.mark.parametrize("max_pairs", [4, 30])
def test_texts_are_memorized_within_a_bound(max_pairs, policy, model, tmp_path):
    """Pairs that wait for the delay of v2 are kept besides: a new text may read them."""
    num_waiting = getattr(model.config, "long_term_delay", 1) - 1
    texts, question = [make_ids(1, n, seed=n) for n in (14, 20)], make_ids(1, 5, seed=3)
    with bounded(model, max_pairs, policy):
        memory = MosaicMemory.union([model.memorize(ids, source=str(n)) for n, ids in enumerate(texts)])
        caches = [model(ids, use_cache=True).past_key_values for ids in texts]
    assert len(memory) <= 2 * (max_pairs + num_waiting) and memory.sources == ["0", "1"]
    logits = model(**memory.prompt(question)).logits
    for index, keys in enumerate(memory.keys):
        parts = [cache.layers[index].kept_pairs(0)[0] for cache in caches]
        assert torch.equal(keys, torch.cat(parts, dim=2))
    memory.save_pretrained(tmp_path)
    assert torch.equal(model(**MosaicMemory.from_pretrained(tmp_path, model).prompt(question)).logits, logits)
    if max_pairs == 30:
        whole = MosaicMemory.union([model.memorize(ids, source=str(n)) for n, ids in enumerate(texts)])
        torch.testing.assert_close(logits, model(**whole.prompt(question)).logits, rtol=0, atol=1e-10)
        assert memory.places.tolist() == [*range(1, 14), *range(1, 20)]
    else:
        assert (memory.places == -1).all() and memory.incomplete_sources().keys() == {"0", "1"}


@torch.no_grad()
@pytest.mark.parametrize("policy", DETERMINISTIC)
def test_texts_of_a_batch_leave_the_pairs_that_each_leaves_alone(policy, model):
    lengths = [14, 9, 14, 3, 14, 9]
    ids, mask = make_ids(6, 14), (torch.arange(14) < torch.tensor(lengths)[:, None]).long()
    names = [f"text {number}" for number in range(6)]
    with bounded(model, 5, policy):
        memories = model.memorize(ids, mask, names)
        alone = [model.memorize(ids[n : n + 1, : lengths[n]], source=names[n]) for n in range(6)]
    for memory, expected in zip(memories, alone, strict=True):
        assert memory.sources == expected.sources and torch.equal(memory.places, expected.places)
        for part, other in zip(memory.keys + memory.values, expected.keys + expected.values, strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-11)
            assert len(part.untyped_storage()) == part.nbytes


@torch.no_grad()
@pytest.mark.parametrize("policy", DETERMINISTIC)
def test_a_text_memorized_within_a_bound_and_forgotten_was_never_joined(policy, model):
    question = make_ids(1, 6, seed=3)
    with bounded(model, 5, policy):
        texts = [model.memorize(make_ids(1, n, seed=n), source=str(n)) for n in (14, 20, 9)]
    whole = model(**MosaicMemory.union(texts).prompt(question)).logits
    for index, name in enumerate(("14", "20", "9")):
        memory = MosaicMemory.union(texts).forget(name)
        never_joined = MosaicMemory.union(texts[:index] + texts[index + 1 :])
        logits = model(**memory.prompt(question)).logits
        assert memory.sources == never_joined.sources and len(memory) == len(never_joined)
        assert torch.equal(logits, model(**never_joined.prompt(question)).logits)
        assert not torch.allclose(logits, whole, atol=1e-6)
    with pytest.raises(ValueError, match="kept within a bound: forget the whole"):
        MosaicMemory.union(texts).forget("20", tokens=slice(0, 2))


@torch.no_grad()
def test_a_bound_within_a_text_takes_over_what_was_read(model):
    """With padding, and behind joined texts. With room for all pairs nothing changes."""
    memory = model.memorize(make_ids(1, 9), source="text")
    ids, rest, mask = make_ids(2, 11, seed=1), make_ids(2, 9, seed=2), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = mask[1, 6] = 0
    for joined in (False, True):
        outputs = []
        for has_bound in (False, True):
            cache = memory.prompt(ids)[MEMORY_NAME] if joined else DynamicCache(config=model.config)
            whole = torch.cat([mask.new_ones(2, 9), mask], dim=1) if joined else mask
            model(ids, attention_mask=whole[:, :-9], **{MEMORY_NAME: cache})
            with bounded(model, 40) if has_bound else contextlib.nullcontext():
                outputs.append(model(rest, attention_mask=whole, **{MEMORY_NAME: cache}).logits)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
        assert isinstance(cache.layers[0], BoundedMemoryLayer)


@pytest.mark.parametrize("policy", DETERMINISTIC)
@pytest.mark.parametrize(("delay", "max_pairs"), [(1, 5), (9, 3)])
def test_pairs_that_wait_are_not_forgotten(delay, max_pairs, policy):
    """The line may be longer than the memory, and be missing."""
    model, ids = make_v2(dtype=torch.float64, long_term_delay=delay), make_ids(1, 30)
    with bounded(model, max_pairs, policy):
        logits, cache = read(model, ids)
        expected = oracle_logits(model, ids[0], bound=(max_pairs, policy))
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-9)
        for layer in cache.layers:
            line = layer.waiting["waiting_keys"]
            assert line.shape[2] == delay - 1 and layer.is_waiting.all()
            whole = read_without_bound(model, ids).layers[0] if layer is cache.layers[0] else None
            if whole is not None:
                assert torch.equal(line, whole.keys[:, :, 30 - len(line[0, 0]) :])


@torch.no_grad()
def read_without_bound(model, ids):
    before, model.model.bound = model.model.bound, None
    cache = read(model, ids)[1]
    model.model.bound = before
    return cache


@torch.no_grad()
@pytest.mark.parametrize("delay", [None, 4], ids=["mosaic", "mosaic v2"])
def test_a_full_memory_forgets_when_a_pair_is_due_and_not_before(delay):
    """Behind joined texts, a question completes its first pair with its second token, of v2 due after the delay."""
    options = {"dtype": torch.float64}
    model = make_mosaic({}, **options) if delay is None else make_v2(**options, long_term_delay=delay)
    memory, question, num_whole = model.memorize(make_ids(1, 9), source="text"), make_ids(1, 6, seed=3), delay or 1
    # At the end of joined texts there may be slots without a pair.
    memory = MosaicMemory.union([memory, model.memorize(make_ids(1, 1), source="of one token")])
    logits = model(**memory.prompt(question)).logits
    with bounded(model, len(memory), "fifo"):
        arguments = memory.prompt(question)
        within = model(**arguments).logits
    torch.testing.assert_close(within[:, :num_whole], logits[:, :num_whole], rtol=0, atol=1e-10)
    assert not torch.allclose(within[:, num_whole:], logits[:, num_whole:], rtol=0, atol=1e-6)
    assert int(arguments[MEMORY_NAME].layers[0].held) == len(memory)


@torch.no_grad()
@pytest.mark.parametrize("variant", V2_KINDS)
def test_a_bounded_memory_of_v2_is_read_by_eager_attention_too(variant):
    model, ids = make_mosaic(variant), make_ids(2, 30)
    with bounded(model, 6):
        expected = read(model, ids)[0]
        model.set_attn_implementation("eager")
        torch.testing.assert_close(read(model, ids)[0], expected, rtol=0, atol=1e-10)
        outputs = model(ids, use_cache=True, output_attentions=True)
    assert not outputs.attentions  # a bounded memory has no slots of all tokens


def test_a_model_without_long_term_heads_has_no_bound():
    with pytest.raises(ValueError, match="no long-term heads"), bounded(make_v2(num_long_term_heads=0), 8):
        pass

# SPDX-License-Identifier: Apache-2.0
"""Texts read alone and joined: any order, any way of reading and any other text forgotten give the same answers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from helpers.beams import beam_search
from helpers.kinds import KINDS, V2_KINDS, make_mosaic
from helpers.models import NARROWING, make_ids, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

from modeling_memory_mosaic import (
    MosaicMemory,
    bounded,
    inspect_units,
    nearest,
    retrieval_memory_mosaic,
    store_memory_mosaic,
    trace_tokens,
)
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from modeling_memory_mosaic.inspection_memory_mosaic import measure_units
from modeling_memory_mosaic.naive_memory_mosaic import naive_logits
from modeling_memory_mosaic.naive_memory_mosaic_v2 import naive_logits_v2
from training.text.tokenizer import train_tokenizer


LENGTHS = (5, 9, 1, 14)


def make_texts(lengths=LENGTHS):
    return [make_ids(1, length, seed=length) for length in lengths]


def memorized(model, texts=None):
    texts = make_texts() if texts is None else texts
    return [model.memorize(text, source=f"text {index}") for index, text in enumerate(texts)]


@torch.no_grad()
def answer(model, memory, question, **kwargs):
    return model(**memory.prompt(question, **kwargs)).logits


@pytest.fixture(params=[{}, NARROWING, *V2_KINDS], ids=["fixed", "narrowing", "v2", "v2 otherwise"])
def model(request):
    return make_mosaic(request.param, dtype=torch.float64)


question = make_ids(1, 7, seed=99)


def oracle_of(model):
    return naive_logits if model.config.model_type == "memory_mosaic" else naive_logits_v2


def by_the_oracle(model, texts, question, forgotten=None):
    """Each text alone, then the question behind the pairs of all, but for those of `forgotten` tokens of each text."""
    joined: dict = {}
    for text, gone in zip(texts, forgotten or [()] * len(texts), strict=True):
        own: dict = {}
        oracle_of(model)(model.state_dict(), model.config, text[0], pairs=own)
        for name, heads in own.items():
            pairs = joined.setdefault(name, [([], []) for _ in heads])
            for stored, more in zip(pairs, heads, strict=True):
                for part, new in zip(stored, more, strict=True):
                    part += [pair for token, pair in enumerate(new) if token not in gone]
    return oracle_of(model)(model.state_dict(), model.config, question[0], pairs=joined)[None]


def test_all_orders_of_joining_answer_as_the_oracle_does(model):
    memories = memorized(model)
    expected = by_the_oracle(model, make_texts(), question)
    for order in itertools.permutations(memories):
        logits = answer(model, MosaicMemory.union(order), question)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert (expected - model(question).logits).abs().max() > 0.01
    # A cache says how many tokens it holds: the library would read one of no tokens as empty.
    cache = MosaicMemory.union(memories).to_cache()
    assert cache.get_seq_length() == sum(LENGTHS)
    model(question, **{MEMORY_NAME: cache})
    assert cache.get_seq_length() == sum(LENGTHS) + question.shape[1]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", [(7,), (1, 6), (3, 3, 1), (1,) * 7])
def test_a_question_may_be_read_in_any_parts(chunks, implementation, model):
    memory = MosaicMemory.union(memorized(model))
    expected = answer(model, memory, question)
    model.set_attn_implementation(implementation)
    for with_mask in (True, False):
        arguments, logits, end = memory.prompt(question), [], len(memory.input_ids)
        for chunk in arguments.pop("input_ids").split(chunks, dim=1):
            end += chunk.shape[1]
            mask = {"attention_mask": arguments["attention_mask"][:, :end]} if with_mask else {}
            logits.append(model(chunk, **{MEMORY_NAME: arguments[MEMORY_NAME]}, **mask).logits)
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)


def test_a_text_forgotten_is_a_text_never_joined(model):
    memories = memorized(model)
    for index, name in enumerate(["text 0", "text 1", "text 2", "text 3"]):
        rest = MosaicMemory.union(memories[:index] + memories[index + 1 :])
        forgotten = MosaicMemory.union(memories).forget(name)
        assert torch.equal(answer(model, forgotten, question), answer(model, rest, question))
        assert forgotten.sources == rest.sources and len(forgotten) == len(rest)
        others = [other for other in ("text 3", "text 1", "text 0", "text 2") if other != name]
        chosen = MosaicMemory.union(memories).select(others)
        assert torch.equal(answer(model, chosen, question), answer(model, rest, question))
    assert [len(memory) for memory in memories] == [length - 1 for length in LENGTHS]


def test_everything_may_be_forgotten(model):
    memory = memorized(model)[0].forget("text 0")
    assert len(memory) == 0 and memory.nbytes == 0
    torch.testing.assert_close(answer(model, memory, question), model(question).logits, rtol=0, atol=1e-12)


def test_pairs_of_tokens_are_forgotten(model):
    """The pair of a token goes, wherever its text stands among the others."""
    memories = memorized(model)
    joined = MosaicMemory.union(memories).forget("text 3", tokens=slice(2, 5))
    first = MosaicMemory.union([memories[3].clone().forget("text 3", tokens=slice(2, 5)), *memories[:3]])
    torch.testing.assert_close(answer(model, joined, question), answer(model, first, question), rtol=0, atol=1e-10)
    assert len(joined) == sum(LENGTHS) - 4 - 3
    assert joined.places[joined.source_ids == 3].tolist() == [0, 1, 2, *range(6, 14)]
    with pytest.raises(ValueError, match="has no pairs of tokens"):
        joined.forget("text 3", tokens=slice(2, 5))


@settings(max_examples=15, deadline=None)
@given(variant=st.sampled_from([{}, NARROWING, *V2_KINDS]), data=st.data())
def test_any_pairs_may_be_forgotten(variant, data):
    """What is left is read as the oracle reads it, wherever in their texts the forgotten pairs stood."""
    model = make_mosaic(variant, dtype=torch.float64)
    memory, forgotten = MosaicMemory.union(memorized(model)), []
    for index, length in enumerate(LENGTHS):
        owners = set(range(length - 1))  # the last token completes a pair and owns none
        places, steps = st.integers(0, length), st.sampled_from([None, 1, 3, -1, -2])
        slices = data.draw(st.lists(st.builds(slice, places, places, steps), max_size=4))
        gone: set[int] = set()
        for one in slices:
            # The pair of token t is completed by token t + 1: places reach to the last one that is left.
            last = max((token + 1 for token in owners - gone), default=0)
            chosen = set(range(last + 1)[one]) & owners
            if chosen - gone:
                memory.forget(f"text {index}", tokens=one)
            gone |= chosen
        forgotten.append(gone)
    assert len(memory) == sum(LENGTHS) - len(LENGTHS) - sum(map(len, forgotten))
    expected = by_the_oracle(model, make_texts(), question, forgotten)
    torch.testing.assert_close(answer(model, memory, question), expected, rtol=0, atol=1e-10)


def test_a_batch_of_padded_questions_is_each_alone(model):
    memory, questions = (
        MosaicMemory.union(memorized(model)),
        [make_ids(1, length, seed=length) for length in (3, 8, 1)],
    )
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, one in enumerate(questions):
        ids[row, 8 - one.shape[1] :], mask[row, 8 - one.shape[1] :] = one, 1
    arguments = memory.prompt(ids, attention_mask=mask)
    logits = model(**arguments).logits
    following = model(make_ids(3, 2, seed=1), **{MEMORY_NAME: arguments[MEMORY_NAME]}).logits
    for row, one in enumerate(questions):
        whole = torch.cat([one, make_ids(3, 2, seed=1)[row : row + 1]], dim=1)
        expected = answer(model, memory, whole)[0]
        torch.testing.assert_close(logits[row, 8 - one.shape[1] :], expected[:-2], rtol=0, atol=1e-10)
        torch.testing.assert_close(following[row], expected[-2:], rtol=0, atol=1e-10)
    booleans = memory.prompt(ids, attention_mask=mask.bool())
    assert torch.equal(booleans["attention_mask"], memory.prompt(ids, attention_mask=mask)["attention_mask"])
    for wrong in (mask[:, 1:], arguments["attention_mask"], mask[0]):
        with pytest.raises(ValueError, match="must be that of the question's ids"):
            memory.prompt(ids, attention_mask=wrong)
    with pytest.raises(ValueError, match="attention_mask is for ids"):
        memory.prompt("Who has the ball?", attention_mask=mask)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("variant", ["mosaic", *V2_KINDS, "classifier", "classifier v2", "memory model", "continuous"])
def test_a_memory_itself_is_no_cache(variant, name):
    """All that takes a cache refuses it with the remedy."""
    kind = KINDS[variant]
    model, memory = kind.make(), make_model().memorize(question, source="text")
    readings = [lambda: model(**kind.inputs(model, 1, 7), **{name: memory})]
    if kind.body == "model":
        readings.append(lambda: model.model(question, **{name: memory}))
    if model.can_generate():
        readings.append(lambda: model.generate(question, **{name: memory}, max_new_tokens=2))
        readings.append(lambda: model.generate(question, **{name: memory}, max_new_tokens=2, num_beams=2))
    if variant in ("mosaic", *V2_KINDS):
        tokenizer = train_tokenizer(["Who has the ball?"] * 3, vocab_size=270)
        write = pipeline("text-generation", model=kind.make(vocab_size=300), tokenizer=tokenizer, device="cpu")
        readings.append(lambda: write("Who?", max_new_tokens=2, **{name: memory}))
    for read in readings:
        with pytest.raises(ValueError, match=r"A MosaicMemory is not read itself.*memory\.prompt\(question"):
            read()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_behind_a_memory_is_that_without_a_cache(beams, model):
    memory = MosaicMemory.union(memorized(model))
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 61}
    texts = model.generate(**memory.prompt(question), **settings)
    expected = beam_search(lambda text: answer(model, memory, text)[0, -1], question, beams, 6)
    assert torch.equal(texts, expected)
    greedy = model.generate(**memory.prompt(question), **settings | {"num_beams": 1})
    assert torch.equal(texts, greedy) == (beams == 1)


@pytest.mark.parametrize("length", [1, 7, 25, 29, 40])
def test_new_ids_alone_are_all_read_whatever_their_number(length, model):
    memory, ids = MosaicMemory.union(memorized(model)), make_ids(1, length, seed=length)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 61}
    expected = model.generate(**memory.prompt(ids), **settings)
    memory_of_caller = memory.to_cache()
    assert torch.equal(model.generate(ids, past_key_values=memory_of_caller, **settings), expected)
    turn = torch.cat([expected, make_ids(1, 2, seed=5)], dim=1)
    with pytest.raises(ValueError, match="that were read behind joined texts already"):
        model.generate(turn, past_key_values=memory_of_caller, **settings)
    # The last token of a generated text has not been read.
    new_ids = turn[:, expected.shape[1] - 1 :]
    new = model.generate(new_ids, past_key_values=memory_of_caller, **settings)
    assert torch.equal(new[:, 3:], model.generate(**memory.prompt(turn), **settings)[:, turn.shape[1] :])


def test_a_memory_stays_as_it_is_whatever_reads_it(model):
    memory = MosaicMemory.union(memorized(model))
    kept = memory.clone()
    arguments = memory.prompt(make_ids(2, 7))
    model.generate(**arguments, max_new_tokens=5, pad_token_id=0)
    arguments[MEMORY_NAME].reset()
    for one, other in zip(memory.keys + memory.values, kept.keys + kept.values, strict=True):
        assert torch.equal(one, other)


def test_a_question_does_not_copy_the_memory_before_it_is_read(model):
    """Of two copies, one was in vain: what is read behind the pairs is written into storage of its own."""
    memory = MosaicMemory.union(memorized(model))
    cache = memory.prompt(make_ids(2, 7))[MEMORY_NAME]
    for layer, keys in zip(cache.layers, memory.keys, strict=True):
        assert layer.keys.data_ptr() == keys.data_ptr()


def test_a_static_memory_answers_as_a_growing_one(model):
    memory = MosaicMemory.union(memorized(model))
    expected = answer(model, memory, question)
    torch.testing.assert_close(answer(model, memory, question, max_cache_len=40), expected, rtol=0, atol=1e-10)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 61}
    texts = [
        model.generate(**memory.prompt(question, max_cache_len=length), **settings, disable_compile=True)
        for length in (None, 45)
    ]
    assert torch.equal(*texts)


def test_a_memory_that_was_offloaded_between_tokens_answers_alike(model):
    memory = MosaicMemory.union(memorized(model))
    expected = answer(model, memory, question)
    arguments = memory.prompt(question)
    cache, logits = arguments[MEMORY_NAME], []
    for token in range(question.shape[1]):
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        one = {"input_ids": question[:, token : token + 1], MEMORY_NAME: cache}
        with torch.no_grad():
            logits.append(model(**one).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=3), data=st.data())
def test_texts_of_a_batch_are_read_alone(rows, data):
    """With padding before, between, after and within texts, several to a row, in chunks of any length."""
    model = make_mosaic(data.draw(st.sampled_from([{}, *V2_KINDS])), dtype=torch.float64)
    length = max(map(sum, rows)) + data.draw(st.integers(0, 4))
    ids, positions, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    texts = []
    for index, lengths in enumerate(rows):
        places = sorted(data.draw(st.permutations(range(length)))[: sum(lengths)])
        ids[index, places], mask[index, places] = make_ids(len(places), seed=index), 1
        positions[index, places] = torch.cat([torch.arange(number) for number in lengths])
        texts += ids[index, places].split(lengths)
    whole = [model.memorize(text[None], source=f"text {index}") for index, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CHUNK_LENGTH", "BATCH_TOKENS"):
            patch.setattr(store_memory_mosaic, name, data.draw(st.integers(1, 20)))
        names = [f"text {index}" for index in range(len(texts))]
        memories = model.memorize(ids, mask, names, position_ids=positions)
    memories = [memories] if isinstance(memories, MosaicMemory) else memories
    for one, other in zip(memories, whole, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and one.sources == other.sources
        for name in ("keys", "values", "slot_bias"):
            for part, expected in zip(getattr(one, name), getattr(other, name), strict=True):
                torch.testing.assert_close(part, expected, rtol=0, atol=1e-11)


# What the first model is read with, and the fields of the second, whose own growth it then has.
GROWTHS = [
    ({"max_position_embeddings": 3}, {"bandwidth": 0.25}, {"bandwidth_exponent": 0.25, "bandwidth_start": 3}),
    ({}, {"bandwidth": 0.25, "bandwidth_start": 3}, {"bandwidth_exponent": 0.25, "bandwidth_start": 3}),
    ({"bandwidth_exponent": 0.25}, {"bandwidth_start": 9}, {"bandwidth_exponent": 0.25, "bandwidth_start": 9}),
]


@pytest.mark.parametrize(("fields", "growth", "of_other"), GROWTHS, ids=["exponent", "both", "start"])
def test_kernels_grow_with_the_number_of_joined_pairs(fields, growth, of_other):
    """As if the model had that exponent: what the first layer writes does not depend on it."""
    models = [make_model(dtype=torch.float64, **one) for one in (fields, of_other, fields)]
    weights = []
    for model, reading in zip(models, (growth, {}, {}), strict=True):
        model.set_attn_implementation("eager")
        prompt = MosaicMemory.union(memorized(model)).prompt(question, **reading)
        weights.append(model(**prompt, output_attentions=True).attentions[0])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-10)
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_what_cannot_be_joined_or_forgotten_is_refused(model):
    memories = memorized(model)
    kind = {"memory_mosaic": {}, "memory_mosaic_v2": "mosaic v2 otherwise"}[model.config.model_type]
    another = make_mosaic(kind, seed=1, dtype=torch.float64)
    if "v2" in model.config.model_type and model.config.num_short_term_heads == 3:
        another = make_mosaic("mosaic v2", seed=1, dtype=torch.float64)
    other = another.memorize(make_ids(1, 4), source="other")
    with pytest.raises(ValueError, match="no memories"):
        MosaicMemory.union([])
    with pytest.raises(ValueError, match="Other weights have read 'other' than 'text 0'"):
        MosaicMemory.union([*memories, other])
    with pytest.raises(ValueError, match="torch.float64, another in torch.float32"):
        MosaicMemory.union([memories[0], memories[1].to(dtype=torch.float32)])
    with pytest.raises(ValueError, match="a text named 'text 1'"):
        MosaicMemory.union([*memories, memories[1]])
    with pytest.raises(ValueError, match="no text named 'text 9'"):
        memories[0].forget("text 9")
    with pytest.raises(ValueError, match="Other weights"):
        another(**memories[0].prompt(question))
    with pytest.raises(ValueError, match="model.eval"):
        make_model().train().memorize(question)
    with pytest.raises(ValueError, match="2 names for 1 texts"):
        model.memorize(question, source=["a", "b"])
    with pytest.raises(ValueError, match="tokenizer"):
        memories[0].prompt("Who has the ball?")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
        model.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="have changed"):
        memories[0].prompt(question)


def test_texts_without_a_name_have_one_of_their_ids(model):
    memory = model.memorize(question)
    assert memory.sources == model.memorize(question.clone()).sources
    assert memory.sources != model.memorize(question[:, :-1]).sources


def test_recall_shares_out_the_logit_of_each_token(model):
    """Over all pairs it is what contextual units add, and without the memory it is the trace's own."""
    memory = MosaicMemory.union(memorized(model))
    text = torch.cat([question, make_ids(1, 3, seed=3)], dim=1)
    trace = trace_tokens(model, text, memory=memory)
    logits = answer(model, memory, text)
    relative = logits.gather(-1, text.roll(-1, 1)[..., None])[..., 0] - logits.mean(-1)
    torch.testing.assert_close(trace.logit[:, :-1], relative[:, :-1], rtol=0, atol=1e-10)
    total = trace.embedding + trace.biases + trace.contribution.sum(dim=(0, 1, 3))
    torch.testing.assert_close(total[:, :-1], relative[:, :-1], rtol=0, atol=1e-10)
    num_short = trace.levels.get(
        "short_term", 0
    )  # short-term heads read the text alone, whose first token has nothing
    sums = torch.ones_like(trace.weights[..., 0])
    sums[:, :, :num_short, 0] = 0
    torch.testing.assert_close(trace.weights.sum(-1), sums, rtol=0, atol=1e-10)
    recall = memory.explain(model, text)
    expected = trace.contribution[:, 0, 0].sum(dim=(0, 1))[:-1]
    torch.testing.assert_close(recall.contribution.sum(-1), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(recall.by_source().sum(-1), expected, rtol=0, atol=1e-10)
    rows = recall.table(SimpleNamespace(decode=lambda ids: f"<{ids[0]}>\n"))
    assert [row["token"] for row in rows] == [repr(f"<{token}>\n") for token in text[0, 1:].tolist()]
    sums = torch.tensor([[row[f"from {name}"] for name in memory.sources] + [row["own"]] for row in rows])
    torch.testing.assert_close(sums.double(), recall.by_source().double(), rtol=0, atol=1e-6)
    assert len(str(rows).splitlines()) == text.shape[1]
    is_empty = (memory.slot_bias[0][0, 0] == -torch.inf).nonzero()[:, 0]
    assert (recall.contribution[:, is_empty] == 0).all()
    name, place, value = recall.strongest(4)[0]
    assert value == recall.contribution[3].max()
    if name is not None:
        slot = (memory.source_ids == memory.sources.index(name)) & (memory.places == place)
        assert recall.contribution[3, slot.nonzero()[0, 0]] == value
    with pytest.raises(ValueError, match="two tokens"):
        memory.explain(model, question[:, :1])


READINGS = [{}, {"max_cache_len": 60}, {"bandwidth": 0.5}, {"bandwidth": 0.5, "bandwidth_start": 3}]


@pytest.mark.parametrize("reading", READINGS, ids=str)
@pytest.mark.parametrize("variant", [{}, NARROWING, *V2_KINDS], ids=["fixed", "narrowing", "v2", "v2 otherwise"])
def test_a_text_is_recalled_as_it_was_read(variant, reading):
    """By kernels of the same width: `explain` and the trace take what `prompt` takes, and refuse what it refuses."""
    model = make_mosaic(variant, dtype=torch.float64, max_position_embeddings=5)
    memory, text = MosaicMemory.union(memorized(model)), make_ids(1, 9, seed=4)
    if "bandwidth" in reading and isinstance(variant, str):
        for read in (lambda: memory.prompt(text, **reading), lambda: memory.explain(model, text, **reading)):
            with pytest.raises(ValueError, match="Kernels of v2"):
                read()
        return
    logits = answer(model, memory, text, **reading)[:, :-1]
    expected = logits.gather(-1, text[:, 1:, None])[..., 0] - logits.mean(-1)
    trace = trace_tokens(model, text, memory=memory, **reading)
    torch.testing.assert_close(trace.logit[:, :-1], expected, rtol=0, atol=1e-10)
    total = trace.embedding + trace.biases + trace.contribution.sum(dim=(0, 1, 3))
    torch.testing.assert_close(total[:, :-1], expected, rtol=0, atol=1e-10)
    recall = memory.explain(model, text, **reading).contribution
    torch.testing.assert_close(recall.sum(-1), trace.contribution[:, 0, 0].sum(dim=(0, 1))[:-1], rtol=0, atol=1e-10)
    if "bandwidth" in reading:
        assert (recall - memory.explain(model, text).contribution).abs().max() > 1e-3
    with pytest.raises(TypeError, match="bandwidth is of reading behind a memory"):
        trace_tokens(model, text, bandwidth=0.5)


@pytest.mark.parametrize("variant", [{}, *V2_KINDS], ids=["mosaic", *V2_KINDS])
def test_nothing_is_inspected_within_a_bound_and_all_pairs_within_a_search(variant, monkeypatch):
    monkeypatch.setattr(retrieval_memory_mosaic, "FEWEST_PAIRS", 10)
    model = make_mosaic(variant, dtype=torch.float64, vocab_size=300)
    memory, text = MosaicMemory.union(memorized(model)), make_ids(1, 9, seed=4)
    tokenizer = train_tokenizer(["Who has the ball?"] * 3, vocab_size=270)
    readings = {
        "explain": lambda: memory.explain(model, text).contribution,
        "trace behind": lambda: trace_tokens(model, text, memory=memory).logit[:, :-1],
        "trace": lambda: trace_tokens(model, text).logit[:, :-1],
        "inspect": lambda: inspect_units(model, text).share[:, :, :, : model.config.num_attention_heads, :-1],
        "measure": lambda: torch.tensor(measure_units(model, tokenizer, ["Who has the ball?"])["units"][0]["norm"]),
        "verify": lambda: torch.tensor([*memory.verify(model).values()]),
    }
    for name, read in readings.items():
        expected = read()
        with nearest(model, tolerance=2.0):
            torch.testing.assert_close(read(), expected, rtol=0, atol=0, equal_nan=True)
        with bounded(model, 8), pytest.raises(ValueError, match="Within `bounded`, .*leave the bound"):
            read()
        assert expected.numel(), name
    with nearest(model, tolerance=2.0):
        assert not torch.equal(answer(model, memory, text), readings["trace behind"]())
    # What was memorized within a bound is explained outside.
    with bounded(model, 8):
        memory = MosaicMemory.union(memorized(model))
    assert memory.explain(model, text).by_source().isfinite().all()


def test_weights_of_a_trace_are_those_of_the_model(model):
    memory = MosaicMemory.union(memorized(model))
    model.set_attn_implementation("eager")
    maps = model(**memory.prompt(question), output_attentions=True).attentions
    weights = trace_tokens(model, question, memory=memory).weights
    for layer, of_model in enumerate(maps):
        # The model names the token whose key it is, the trace the one that completes the pair.
        torch.testing.assert_close(weights[layer, ..., 1:], of_model[..., :-1], rtol=0, atol=1e-10)


def test_a_memory_is_compared_with_the_texts_read_again(model):
    memory = MosaicMemory.union(memorized(model))
    differences = memory.verify(model)
    assert [*differences] == memory.sources and max(differences.values()) < 1e-12
    memory.keys[1][:, :, -1] += 1e-3
    assert memory.verify(model)["text 3"] == pytest.approx(1e-3)
    assert memory.verify(model, sources=["text 0"]).keys() == {"text 0"}


def test_texts_that_cannot_be_compared_are_named_with_the_reason(model):
    memories = memorized(model)
    memories[3].consolidate(4, model=model)
    with bounded(model, 4):
        memories += [model.memorize(make_ids(1, length), source=f"bounded {length}") for length in (4, 14)]
    memory = MosaicMemory.union(memories).forget("text 1", tokens=slice(0, 2))
    incomplete = memory.incomplete_sources()
    assert [*incomplete] == ["text 1", "text 3", "bounded 4", "bounded 14"]
    assert "forgotten" in incomplete["text 1"] and "merged" in incomplete["text 3"]
    with pytest.raises(ValueError, match=r"4 of 6 texts cannot be compared .*'text 1': some of its tokens.*sources="):
        memory.verify(model)
    with pytest.raises(ValueError, match="1 of 1 texts cannot be compared"):
        memory.verify(model, sources=["bounded 14"])
    with pytest.raises(ValueError, match="no text named 'text 9'"):
        memory.verify(model, sources=["text 9"])
    whole = [name for name in memory.sources if name not in incomplete]
    assert memory.verify(model, sources=whole).keys() == {"text 0", "text 2"}
    # A text whose end was forgotten is compared as far as it goes.
    cut = memories[0].clone().forget("text 0", tokens=slice(2, None))
    assert cut.verify(model)["text 0"] < 1e-12


def packed(texts, last):
    """Return texts in one row, the last of which sees all, with padding before, between and behind them."""
    pieces = [torch.zeros(1, 2, dtype=torch.long)]
    masks, positions, sees = [torch.zeros(1, 2)], [torch.zeros(1, 2)], [torch.zeros(1, 2)]
    for text in [*texts, last]:
        length = text.shape[1]
        pieces += [text, torch.zeros(1, 1, dtype=torch.long)]
        masks += [torch.ones(1, length), torch.zeros(1, 1)]
        positions += [torch.arange(length)[None], torch.zeros(1, 1)]
        sees += [torch.full((1, length), float(text is last)), torch.zeros(1, 1)]
    ids, mask, positions, sees = (torch.cat(parts, dim=1) for parts in (pieces, masks, positions, sees))
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "position_ids": positions.long(),
        "sees_all": sees.bool(),
        "use_cache": False,
    }


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_packed_question_of_all_texts_is_that_behind_joined_ones(implementation, model):
    """It is how models are trained to use what was read alone."""
    memories = memorized(model)
    expected = answer(model, MosaicMemory.union(memories), question)
    alone = [model(text).logits for text in make_texts()]
    model.set_attn_implementation(implementation)
    batch = packed(make_texts(), question)
    logits = model(**batch).logits
    texts = logits[batch["attention_mask"].bool() & ~batch["sees_all"]]
    torch.testing.assert_close(logits[batch["sees_all"]][None], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(texts, torch.cat(alone, dim=1)[0], rtol=0, atol=1e-10)
    # Without padding, too.
    plain = {name: part[:, batch["attention_mask"][0].bool()] for name, part in list(batch.items())[:4]}
    logits = model(**plain, use_cache=False).logits[:, -question.shape[1] :]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_gradients_of_a_packed_question_reach_the_texts(model):
    gradients = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        batch = packed(make_texts(), question)
        labels = batch["input_ids"].masked_fill(~batch["sees_all"], -100)
        model(**batch, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    # In one block, words of the texts matter to nothing but the pairs that they are stored as.
    embedding = gradients[0][0].abs().sum(-1)
    assert (embedding[torch.cat(make_texts(), dim=1)[0]] > 0).all()


def test_one_block_reads_joined_texts_as_if_one_after_the_other_with_new_sums(model):
    """The only thing that joining changes at one block is that no pair goes from one text to the next."""
    one_block = make_model(dtype=torch.float64, num_hidden_layers=1)
    texts = make_texts()
    joined = answer(one_block, MosaicMemory.union(memorized(one_block)), question)
    batch = packed(texts, question)
    batch["sees_all"] = batch["attention_mask"].bool()
    logits = one_block(**batch).logits[:, -1 - question.shape[1] : -1]
    torch.testing.assert_close(logits, joined, rtol=0, atol=1e-12)


def test_what_sees_all_cannot_be_is_refused(model):
    batch = packed(make_texts(), question)
    with pytest.raises(ValueError, match="sees_all has shape"):
        model(**batch | {"sees_all": batch["sees_all"][:, 1:]})
    with pytest.raises(ValueError, match="sees_all is for packed documents"):
        model(question, sees_all=torch.ones_like(question), past_key_values=memorized(model)[0].to_cache())

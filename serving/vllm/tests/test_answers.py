# SPDX-License-Identifier: Apache-2.0
"""The engine's greedy tokens are those of transformers, however it schedules requests."""

import pytest
import torch
from vllm import SamplingParams

from vllm_memory_mosaic.slots import PairSlots
from vllm_memory_mosaic.states import StepPlanBuilder


def test_greedy_tokens_are_those_of_transformers(references, engine, answer, variant):
    prompts, expected = zip(*[references(variant).draw(length) for length in (1, 12, 600)], strict=True)
    # Else an engine that repeats itself might pass.
    assert all(len(set(tokens)) > 8 for tokens in expected)
    with engine(references(variant).folder) as llm:
        # One by one, and all together.
        assert [answer(llm, [prompt])[0] for prompt in prompts] == list(expected)
        assert answer(llm, prompts) == list(expected)


def test_prompts_of_all_lengths_are_read_beside_each_other(reference, engine, answer, monkeypatch):
    """More requests than the engine takes at once, with answers of several lengths: some begin while others go on."""
    lengths = (1, 12, 600, 5, 33, 100, 64, 2, 300, 1, 17, 128, 129, 31, 32, 256)
    prompts, expected = zip(*[reference.draw(length) for length in lengths], strict=True)
    answer_lengths = [32 - 5 * (index % 4) for index in range(len(lengths))]
    plans, build = [], StepPlanBuilder.build

    def watched(*arguments, **settings):
        plans.append(build(*arguments, **settings))
        return plans[-1]

    monkeypatch.setattr(StepPlanBuilder, "build", watched)
    with engine(reference.folder, max_num_seqs=5, block_size=32) as llm:
        answers = answer(llm, prompts, answer_lengths)
    assert answers == [tokens[:length] for tokens, length in zip(expected, answer_lengths, strict=True)]
    # Prompts that begin, beside texts that go on by one token.
    assert sum(len(plan.pieces) > 0 and not plan.is_new.all().item() for plan in plans) >= 4


@pytest.mark.parametrize("variant", ["plain", "v2", "v2_uneven"])
@pytest.mark.parametrize("tokens_a_step", [8, 40])
def test_a_prompt_may_be_read_in_pieces(references, engine, answer, variant, tokens_a_step):
    """Steps of few tokens cut prompts anywhere: some pieces are of one token, and most are shorter than a delay."""
    reference = references(variant)
    prompts, expected = zip(*[reference.draw(length) for length in (1, 12, 600, 9, 41, 16, 81)], strict=True)
    with engine(reference.folder, max_num_batched_tokens=tokens_a_step, max_num_seqs=4) as llm:
        assert answer(llm, prompts) == list(expected)


def test_a_request_that_was_interrupted_is_answered_as_any_other(reference, engine, answer, count):
    """Without room for all, vLLM drops requests, and reads their text again later."""
    prompts, expected = zip(*[reference.draw(60) for _ in range(12)], strict=True)
    with engine(reference.folder, kv_cache_memory_bytes=28 << 16, block_size=32, max_model_len=128) as llm:
        assert answer(llm, prompts) == list(expected)
        assert count(llm, "num_preemptions") >= 3


def test_no_request_finds_what_others_left(reference, engine, answer):
    """Pages of states come back many times: 200 requests, in an engine with room for few."""
    prompts, expected = zip(*[reference.draw(1 + 7 * n % 40, answer_length=4) for n in range(200)], strict=True)
    last, its_answer = reference.draw(12)
    with engine(reference.folder, max_num_seqs=4, kv_cache_memory_bytes=4 << 20, max_model_len=128) as llm:
        assert answer(llm, prompts, [4] * 200) == list(expected)
        assert answer(llm, [last]) == [its_answer]


@pytest.mark.parametrize("variant", ["plain", "v2", "v2_few_long"])
def test_a_beginning_that_was_read_before_is_taken_from_the_cache(references, engine, answer, count, variant):
    """With prefix caching, texts go on from pairs and states of others that begin alike."""
    reference = references(variant)
    shared, _ = reference.draw(400)
    texts = [reference.draw(length, before=shared[:begin]) for begin, length in ((400, 1), (400, 130), (300, 7))]
    prompts, expected = zip(*texts, strict=True)
    with engine(reference.folder, enable_prefix_caching=True, block_size=32) as llm:
        assert [answer(llm, [prompt])[0] for prompt in prompts] == list(expected)
        hits = count(llm, "prefix_cache_hits")
        assert hits >= 384
        assert answer(llm, prompts) == list(expected)
        # Fewer heads of one kind have blocks of 64 tokens.
        assert count(llm, "prefix_cache_hits") >= hits + 384 + 512 + 256


def attention_outputs(llm, answer, prompt):
    """Return for each set of pairs of the first layer its delay, and what its heads retrieve `(N, H, W)`."""
    seen = []

    def watch(model):
        slots = [part for part in model.model.layers[0].modules() if isinstance(part, PairSlots)]
        return [
            part.attn.register_forward_hook(
                lambda module, inputs, output, part=part: seen.append(
                    (part.delay, output.clone().unflatten(-1, (part.num_heads, part.width)))
                )
            )
            for part in slots
        ]

    hooks = llm.apply_model(watch)[0]
    answer(llm, [prompt], [1])
    for hook in hooks:
        hook.remove()
    return seen


def check_empty_slots(reference, engine, answer, dtype):
    """Assert that tokens that see no pair retrieve zero, and that others are not moved by values in empty slots."""
    prompt, _ = reference.draw(40)
    to_slots = PairSlots.to_slots

    def with_values_in_empty_slots(part, vectors, bias, plan):
        slots = to_slots(part, vectors, bias, plan)
        if bias == 0:
            slots[plan.places(part.delay).empty, :, 0] = 1000.0
        return slots

    with engine(reference.folder, dtype=dtype) as llm, pytest.MonkeyPatch.context() as patch:
        first = attention_outputs(llm, answer, prompt)
        patch.setattr(PairSlots, "to_slots", with_values_in_empty_slots)
        second = attention_outputs(llm, answer, prompt)
    assert [delay for delay, _ in first] == ([1] if reference.model.config.model_type == "memory_mosaic" else [1, 8])
    for (delay, retrieved), (_, changed) in zip(first, second, strict=True):
        assert len(retrieved) == 40 and retrieved[:delay].eq(0).all() and retrieved[delay].ne(0).any(-1).all()
        assert changed[:delay, :, 0].ne(0).all() and torch.equal(changed[delay:], retrieved[delay:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slots_without_a_pair_are_read_by_no_token_that_sees_one(reference, engine, answer, dtype):
    """Whatever lay in their slots, such tokens would retrieve the same."""
    check_empty_slots(reference, engine, answer, dtype)


def test_kernels_as_sharp_as_those_of_long_texts_read_no_slot_without_a_pair(reference, engine, answer, monkeypatch):
    """Kernels narrow with a text, and a pair that is opposite to the only query that sees it is read all the same."""
    forward = PairSlots.forward

    def with_long_opposed_queries(part, queries, keys, *others):
        signs = torch.ones(len(keys), 1, 1)
        signs[1::2] = -1
        return forward(part, queries * signs * 2.0**40, keys * signs, *others)

    monkeypatch.setattr(PairSlots, "forward", with_long_opposed_queries)
    check_empty_slots(reference, engine, answer, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(reference, engine, dtype):
    model, (prompt, _) = reference.model, reference.draw(300)
    ids = torch.tensor([prompt])

    def of_transformers(precision):
        with torch.no_grad():
            logits = model.to(precision)(ids, use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    expected, theirs = of_transformers(torch.float32), of_transformers(getattr(torch, dtype))
    model.float().load_state_dict(type(model).from_pretrained(reference.folder).state_dict())
    with engine(reference.folder, dtype=dtype) as llm:
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    places = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ours = torch.tensor([logprobs[token].logprob for token, logprobs in places])
    our_error, their_error = ((some - expected).abs().mean() for some in (ours, theirs))
    assert 0 < our_error < 1.5 * their_error

# SPDX-License-Identifier: Apache-2.0
"""`generate`: every way of decoding that shares the memory gives what decoding without it gives."""

import pytest
import torch
from conftest import make_ids, make_model
from transformers import CompileConfig, DynamicCache


@pytest.fixture
def model():
    """Ids 59 and 60 stand for padding and the end; without an end the texts have full length."""
    return make_model(pad_token_id=59, bos_token_id=60, eos_token_id=60)


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 12, "do_sample": False, **kwargs})


@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 0}],
    ids=str,
)
def test_cached_equals_uncached(model, mode):
    ids = make_ids(2, 6)
    torch.manual_seed(3)
    cached = generate(model, ids, **mode)
    torch.manual_seed(3)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **mode))
    assert cached.shape[1] > 6


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=str)
def test_left_padded_batch_equals_each_prompt_alone(model, mode):
    prompts = [make_ids(n, seed=n, vocab_size=59) for n in (1, 4, 9)]
    ids = torch.full((3, 9), 59)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :] = prompt
    texts = generate(model, ids, (ids != 59).long(), **mode)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt[None], **mode)[0, len(prompt) :]
        assert torch.equal(texts[row, 9 : 9 + len(alone)], alone)


def test_a_second_turn_on_a_warm_memory(model):
    """A conversation: the next turn passes the whole text and the memory of its beginning."""
    first = generate(model, make_ids(2, 5), return_dict_in_generate=True, eos_token_id=None)
    turn = torch.cat([first.sequences, make_ids(2, 4, seed=8)], dim=1)
    # The last token was chosen but not read yet.
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    warm = generate(model, turn, past_key_values=first.past_key_values)
    assert torch.equal(warm, generate(model, turn))


def test_a_warm_memory_with_prompt_lookup_is_right_or_refused(model):
    """From 5.18 on the library passes the whole text again there: the memory would hold its beginning twice."""
    first = generate(model, make_ids(1, 8), return_dict_in_generate=True, eos_token_id=None)
    turn = torch.cat([first.sequences, make_ids(1, 4)], dim=1)
    try:
        text = generate(model, turn, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3)
    except ValueError as refusal:
        assert "must not be passed again" in str(refusal)
    else:
        assert torch.equal(text, generate(model, turn))


def test_the_returned_memory_continues_the_text(model):
    ids = make_ids(1, 5)
    first = generate(model, ids, return_dict_in_generate=True, max_new_tokens=6, eos_token_id=None)
    continued = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=6)
    assert torch.equal(continued, generate(model, ids, max_new_tokens=12, eos_token_id=None)[:, : continued.shape[1]])


def test_static_memory_equals_dynamic(model):
    ids, mask = make_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    compiled = CompileConfig(fullgraph=True, backend="eager")
    compiled._compile_all_devices = True
    expected = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, cache_implementation="static"), expected)
    static = generate(model, ids, mask, cache_implementation="static", compile_config=compiled)
    assert torch.equal(static, expected)


def test_prefill_in_chunks_equals_whole(model):
    ids = make_ids(1, 20)
    assert torch.equal(generate(model, ids, prefill_chunk_size=7), generate(model, ids))


@pytest.mark.parametrize("assistant", ["prompt_lookup", "itself", "another"])
def test_assisted_decoding_gives_the_greedy_text(model, assistant):
    ids = make_ids(1, 4).repeat(1, 4)
    options = {
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "itself": {"assistant_model": model},
        "another": {"assistant_model": make_model(seed=1, pad_token_id=59, bos_token_id=60, eos_token_id=60)},
    }[assistant]
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


def test_logits_of_the_last_tokens_only(model):
    ids = make_ids(2, 7)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])


def test_generation_from_embeddings(model):
    ids = make_ids(1, 5)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, ids)[:, 5:], model.generate(inputs_embeds=embeddings, max_new_tokens=12))


def test_generation_beyond_the_training_length_is_as_good_uncached():
    model = make_model(max_position_embeddings=8, pad_token_id=59)
    ids = make_ids(1, 6)
    assert torch.equal(
        generate(model, ids, max_new_tokens=20), generate(model, ids, max_new_tokens=20, use_cache=False)
    )


def test_a_quantized_cache_is_refused(model):
    with pytest.raises((ValueError, ImportError)):
        generate(model, make_ids(1, 3), cache_implementation="quantized")


def test_an_empty_dynamic_cache_of_ours_is_accepted(model):
    ids = make_ids(1, 5)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))

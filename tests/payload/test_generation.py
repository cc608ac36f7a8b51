# SPDX-License-Identifier: Apache-2.0
"""`generate`: every way of decoding that shares the memory gives what decoding without it gives."""

import copy

import pytest
import torch
from helpers.kinds import KINDS, for_kinds
from helpers.models import make_ids, make_model
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    StaticCache,
    TextStreamer,
    pipeline,
)

from training.text.tokenizer import train_tokenizer


@pytest.fixture
def kind():
    """Return a parametrisation over the kinds that write text, as `@writers`."""
    return KINDS["mosaic"]


writers = for_kinds("mosaic", "mosaic v2", "memory model")
# Kernels that depend on the number of pairs, or do not.
mosaics = for_kinds("mosaic", "mosaic v2", "narrowing mosaic")


@pytest.fixture
def model(kind):
    """Generate greedily; ids 59 and 60 stand for padding and the end. Without an end the texts have full length."""
    return kind.make(pad_token_id=59, bos_token_id=60, eos_token_id=60)


@pytest.fixture(scope="module")
def shared_tokenizer():
    return train_tokenizer(["Once upon a time there was a cat. One day, a little ball."] * 3, vocab_size=300)


@pytest.fixture
def tokenizer(shared_tokenizer, model):
    """Resize `model` to the ids of the tokenizer."""
    model.resize_token_embeddings(len(shared_tokenizer))
    tokenizer = copy.deepcopy(shared_tokenizer)
    for settings in (model.config, model.generation_config):
        settings.pad_token_id, settings.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    return tokenizer


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": 12, "do_sample": False, **kwargs})


@for_kinds("mosaic", "mosaic v2", "narrowing mosaic", "memory model")
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 0},
        {"num_beams": 3, "do_sample": True},
        {"do_sample": True, "typical_p": 0.9, "renormalize_logits": True},
        {"do_sample": True, "min_p": 0.01, "top_p": 0.9, "temperature": 0.7},
        {"guidance_scale": 1.5},
        {"bad_words_ids": [[3]], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    ],
    ids=str,
)
def test_cached_equals_uncached(model, mode):
    ids = make_ids(2, 6)
    torch.manual_seed(3)
    cached = generate(model, ids, **mode)
    torch.manual_seed(3)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **mode))
    assert cached.shape[1] > 6


@for_kinds("mosaic", "mosaic v2", "narrowing mosaic", "memory model")
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


@for_kinds("mosaic", "mosaic v2", "narrowing mosaic", "memory model")
def test_a_second_turn_on_a_warm_memory(model):
    """In a conversation, the next turn passes the whole text and the memory of its beginning."""
    first = generate(model, make_ids(2, 5), return_dict_in_generate=True, eos_token_id=None)
    turn = torch.cat([first.sequences, make_ids(2, 4, seed=8)], dim=1)
    # The last token was chosen but not read yet.
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    warm = generate(model, turn, past_key_values=first.past_key_values)
    assert torch.equal(warm, generate(model, turn))


WARM_TEXTS = {  # rows, tokens in the memory, new tokens, padding in both
    "one new token": (1, 7, 1, False),
    "fewer new tokens": (1, 7, 3, False),
    "as many": (2, 7, 7, False),
    "more": (1, 7, 20, False),
    "padded": (3, 5, 6, True),
    "padded, more": (2, 4, 9, True),
    "a memory of one token": (1, 1, 4, False),
}


@mosaics
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("case", WARM_TEXTS)
def test_new_text_behind_a_memory_is_read_whole(model, case, static):
    """The mask may be absent, cover the new ids, or cover all."""
    rows, num_read, num_new, is_padded = WARM_TEXTS[case]
    past, new = make_ids(rows, num_read, seed=1), make_ids(rows, num_new, seed=2)
    past_mask, new_mask = torch.ones_like(past), torch.ones_like(new)
    if is_padded:
        past_mask[0, :2], new_mask[1, :3], new[1, :3] = 0, 0, 59
    whole, whole_mask = torch.cat([past, new], dim=1), torch.cat([past_mask, new_mask], dim=1)
    expected = generate(model, whole, whole_mask, max_new_tokens=4)
    for ids, masks in ((new, (None, new_mask, whole_mask)), (whole, (whole_mask,))):
        for mask in masks:
            memory = (
                StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache(config=model.config)
            )
            with torch.no_grad():
                model(past, attention_mask=past_mask, past_key_values=memory)
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 59}
            text = model.generate(ids, attention_mask=mask, cache=memory, **options)
            assert torch.equal(text, expected[:, -text.shape[1] :]) and text.shape[1] == ids.shape[1] + 4


@mosaics
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 2}, "assistant"], ids=str
)
def test_any_decoding_continues_a_memory_by_new_text(model, options):
    options = {"assistant_model": make_model(seed=1, pad_token_id=59)} if options == "assistant" else options
    past, new = make_ids(1, 8), make_ids(1, 5, seed=1)
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(past, past_key_values=memory)
    text = generate(model, new, past_key_values=memory, **options)
    expected = generate(model, torch.cat([past, new], dim=1), num_beams=options.get("num_beams", 1))
    assert torch.equal(text, expected[:, 8:])
    assert not any(layer.record_past for layer in memory.layers), "recording would go on for ever"


def test_what_might_not_be_new_is_refused(model):
    ids = make_ids(2, 6)
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=memory)
    for given, message in (
        ({"inputs": ids}, "no new one is among them(.|\n)*pass a mask over both"),
        ({"inputs": make_ids(1, 3)}, "holds 2 rows, but 1 are passed(.|\n)*batch_repeat_interleave"),
        ({"inputs": make_ids(2, 3), "mask": torch.ones(2, 4)}, "must be that of the ids"),
        ({"inputs": make_ids(2, 0)}, "at least one new id"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, given["inputs"], given.get("mask"), past_key_values=memory)
    with pytest.raises(ValueError, match="Embeddings behind a memory"):
        model.generate(inputs_embeds=torch.zeros(2, 8, 24), past_key_values=memory, max_new_tokens=2)
    for texts, mask, message in (
        (torch.nn.functional.pad(torch.cat([ids, ids], dim=1), (2, 0)), [[0, 0] + [1] * 12] * 2, "memory's padding"),
        (torch.cat([ids[:1], make_ids(1, 6, seed=3)]).repeat(1, 2), [[1] * 12] * 2, "Some rows begin"),
        (make_ids(2, 3, seed=4), [[1, 1, 1], [0, 0, 0]], "Row 1 has no new id behind the memory"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, texts, torch.tensor(mask), past_key_values=memory)
    with pytest.raises(ValueError):
        generate(model, make_ids(2, 3), past_key_values=memory, num_beams=2, max_new_tokens=0)
    assert memory.layers[0].num_rows() == 2, "a call that failed leaves the memory as it was"
    again = generate(model, ids, torch.ones(2, 12), past_key_values=memory, max_new_tokens=3)
    assert torch.equal(again, generate(model, ids.repeat(1, 2), max_new_tokens=3)[:, 6:])
    embedded = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=embedded)
    with pytest.raises(ValueError, match="does not know their ids(.|\n)*pass a mask over both"):
        generate(model, make_ids(2, 3), past_key_values=embedded)


def test_a_configuration_leaves_the_model_its_defaults_behind_a_memory(model):
    """Padding is known by the model's `pad_token_id`, also if another configuration is given."""
    past, new = make_ids(1, 4), torch.tensor([[59, 59, 7, 8]])
    memory = DynamicCache(config=model.config)
    with torch.no_grad():
        model(past, past_key_values=memory)
    text = model.generate(new, generation_config=GenerationConfig(max_new_tokens=4), past_key_values=memory)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1]])
    assert torch.equal(text, generate(model, torch.cat([past, new], dim=1), mask, max_new_tokens=4)[:, 4:])


def test_a_text_that_a_memory_holds_is_not_read_twice_by_prompt_lookup(model):
    """The library would pass the whole text again there, and the memory would hold its beginning twice."""
    first = generate(model, make_ids(1, 8), return_dict_in_generate=True, eos_token_id=None)
    turn = torch.cat([first.sequences, make_ids(1, 4)], dim=1)
    with pytest.raises(ValueError, match="must not be passed again: pass the new ids alone"):
        generate(model, turn, past_key_values=first.past_key_values, prompt_lookup_num_tokens=3)
    num_read = first.past_key_values.get_seq_length()
    text = generate(model, turn[:, num_read:], past_key_values=first.past_key_values, prompt_lookup_num_tokens=3)
    assert torch.equal(text, generate(model, turn)[:, num_read:])


@pytest.mark.parametrize("prompt", ["one token", "padded behind", "padded within"])
def test_assisted_decoding_of_short_and_padded_prompts(prompt):
    """The whole memory of a prompt of one token may have to be taken back, and padding does not end a text."""
    ids, mask = {
        "one token": ([[7]], [[1]]),
        "padded behind": ([[7, 9, 11, 0]], [[1, 1, 1, 0]]),
        "padded within": ([[7, 0, 0, 9, 11]], [[1, 0, 0, 1, 1]]),
    }[prompt]
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    for seed in range(4):
        model, assistant = make_model(seed, pad_token_id=59), make_model(seed + 10, pad_token_id=59)
        expected = generate(model, ids, mask, max_new_tokens=6)
        for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(generate(model, ids, mask, max_new_tokens=6, **options), expected)


def test_assisted_decoding_of_a_text_that_has_the_id_of_padding():
    """What an assistant writes is text, also where it is `pad_token_id`."""
    ids = make_ids(1, 5)
    for seed in range(2):
        model, assistant = make_model(seed), make_model(seed + 10)
        written = generate(model, ids, max_new_tokens=8, eos_token_id=None)
        assisted = generate(assistant, ids, max_new_tokens=2, eos_token_id=None)
        for pad in {*written[0, 4:7].tolist(), *assisted[0, 4:].tolist()}:
            options = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": pad}
            expected = generate(model, ids, torch.ones_like(ids), **options)
            for helper in (model, assistant):
                text = generate(model, ids, torch.ones_like(ids), assistant_model=helper, **options)
                assert torch.equal(text, expected), (seed, pad)


@writers
def test_the_returned_memory_continues_the_text(model):
    ids = make_ids(1, 5)
    first = generate(model, ids, return_dict_in_generate=True, max_new_tokens=6, eos_token_id=None)
    continued = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=6)
    assert torch.equal(continued, generate(model, ids, max_new_tokens=12, eos_token_id=None)[:, : continued.shape[1]])


@mosaics
def test_static_memory_equals_dynamic(model):
    ids, mask = make_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    compiled = CompileConfig(fullgraph=True, backend="eager")
    compiled._compile_all_devices = True
    expected = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, cache_implementation="static"), expected)
    static = generate(model, ids, mask, cache_implementation="static", compile_config=compiled)
    assert torch.equal(static, expected)


@writers
def test_prefill_in_chunks_equals_whole_or_is_refused(kind, model):
    ids = make_ids(1, 20)
    if kind.model == "memory model":  # makes its memory itself, and reads in chunks of its own
        with pytest.raises(ValueError, match="Cannot use prefill chunking without a cache"):
            generate(model, ids, prefill_chunk_size=7)
    else:
        assert torch.equal(generate(model, ids, prefill_chunk_size=7), generate(model, ids))


@mosaics
@pytest.mark.parametrize("assistant", ["prompt_lookup", "itself", "another", "smaller", "gpt2", "early exit"])
def test_assisted_decoding_gives_the_greedy_text(model, assistant):
    ids = make_ids(1, 4).repeat(1, 4)
    special = {"pad_token_id": 59, "bos_token_id": 60, "eos_token_id": 60}
    options = {
        "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 3},
        "itself": lambda: {"assistant_model": model},
        "another": lambda: {"assistant_model": make_model(seed=1, **special)},
        "smaller": lambda: {"assistant_model": make_model(num_hidden_layers=1, hidden_size=12, **special)},
        "gpt2": lambda: {"assistant_model": make_gpt2(**special)},
        "early exit": lambda: {"assistant_early_exit": 1},
    }[assistant]()
    assert torch.equal(generate(model, ids, **options), generate(model, ids))


def make_gpt2(**special):
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=12, n_layer=1, n_head=2, n_positions=64, **special)).eval()


def test_a_mosaic_assists_a_gpt2():
    ids, assistant = make_ids(1, 9), make_model(pad_token_id=59, eos_token_id=60)
    gpt2 = make_gpt2(pad_token_id=59, bos_token_id=60, eos_token_id=60)
    assert torch.equal(generate(gpt2, ids, assistant_model=assistant), generate(gpt2, ids))


@writers
def test_scores_are_those_of_one_pass(model):
    ids = make_ids(2, 6)
    outputs = generate(model, ids, return_dict_in_generate=True, output_logits=True, eos_token_id=None)
    logits = model(outputs.sequences).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(outputs.logits, dim=1), logits, rtol=0, atol=1e-5)


@writers
def test_a_stop_string_ends_the_text(model, tokenizer):
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(generate(model, **renamed(inputs), max_new_tokens=30)[0])
    stop = text[len(text) * 2 // 3 :][:3]  # not in the name of the token that ends it
    stopped = generate(model, **renamed(inputs), max_new_tokens=30, stop_strings=[stop], tokenizer=tokenizer)
    stopped = tokenizer.decode(stopped[0])
    assert stop in stopped and text.startswith(stopped) and len(stopped) < len(text)


@writers
def test_a_streamer_gives_the_text_as_it_grows(model, tokenizer):
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    pieces = []
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    ids = generate(model, **renamed(inputs), max_new_tokens=20, streamer=streamer)
    assert "".join(pieces) == tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])


@writers
def test_a_pipeline_chats_by_the_tokenizers_template(model, tokenizer):
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    chat = [{"role": "user", "content": "Once upon a time"}]
    storyteller = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answer = storyteller(chat, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert answer[:1] == chat and answer[1]["role"] == "assistant"
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    ids = generate(model, **renamed(inputs), max_new_tokens=5)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer[1]["content"] == expected


def renamed(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


@writers
def test_a_batched_pipeline_equals_one_prompt_at_a_time(model, tokenizer):
    storyteller = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["Once", "Once upon a time there was a cat", "One day"]
    options = {"max_new_tokens": 8, "do_sample": False}
    assert storyteller(prompts, batch_size=3, **options) == [storyteller(prompt, **options) for prompt in prompts]


@pytest.mark.parametrize(
    "mode",
    [{"num_beam_groups": 2, "num_beams": 4}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}],
    ids=str,
)
def test_ways_that_left_the_library_are_refused_without_their_code(model, mode):
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        generate(model, make_ids(1, 4), **mode)


def test_logits_of_the_last_tokens_only(model):
    ids = make_ids(2, 7)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]])
    for wrong in (-1, torch.tensor([[0, 1], [2, 3]])):
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(ids, logits_to_keep=wrong)


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
    with pytest.raises((ValueError, ImportError), match="memory_mosaic"):
        generate(model, make_ids(1, 3), cache_implementation="quantized")


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="holds keys and values, but no leaky sums"):
        model.generate_batch([make_ids(5).tolist()])
    with pytest.raises(ValueError, match="holds keys and values, but no leaky sums"):
        generate(model, make_ids(1, 3), cache_implementation="paged")


def test_an_empty_dynamic_cache_of_ours_is_accepted(model):
    ids = make_ids(1, 5)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))

# SPDX-License-Identifier: Apache-2.0
"""Baselines of our own: each equals its definition, sees nothing of what comes later, and is saved whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.models import make_ids, randomize_parameters
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM, trace_tokens
from modeling_memory_mosaic import naive_memory_mosaic as naive
from modeling_memory_mosaic.cache_memory_mosaic import memory_kwargs
from training.baselines.lstm import LstmConfig
from training.baselines.mosaic_parts import MemoryMosaicPartsConfig, MemoryMosaicQueryMemory
from training.baselines.shifted_rope import CausalShift, ShiftedGPTNeoXConfig
from training.export import export_model, verify_export
from training.text.tokenizer import train_tokenizer


SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 60}
ROPE = {
    **SIZES,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_new",
    "use_parallel_residual": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # so that attention is far from even
}
MOSAIC = {
    **SIZES,
    "num_attention_heads": 3,
    "num_persistent_slots": 10,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "logits_scaling": 1.0,
}
PARTS = {
    "mosaic": {},
    "no look-ahead": {"look_ahead": False},
    "no leak": {"leak": False},
    "separate query": {"separate_query": True},
    "all": {"look_ahead": False, "leak": False, "separate_query": True},
}
CONFIGS = {
    "lstm": LstmConfig(**SIZES),
    "shifted_gpt_neox": ShiftedGPTNeoXConfig(**ROPE),
    **{name: MemoryMosaicPartsConfig(**MOSAIC, **parts) for name, parts in PARTS.items()},
}
GENERATING = [name for name in CONFIGS if name != "lstm"]
for_baselines = pytest.mark.parametrize("name", CONFIGS)


def make(name, **changes):
    config = AutoConfig.for_model(**{**CONFIGS[name].to_dict(), **changes})
    torch.manual_seed(0)
    model = randomize_parameters(AutoModelForCausalLM.from_config(config))
    model.loss_type = "ForCausalLM"
    return model


@torch.no_grad()
def logits_of(model, ids, **options):
    return model(input_ids=ids, use_cache=False, **options).logits


# Every baseline


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_logit_sum_to_it(name):
    model, ids = make(name).double(), make_ids(1, 20)
    logits = logits_of(model, ids)
    expected = (logits - logits.mean(-1, keepdim=True))[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    trace = trace_tokens(model, ids)
    total = trace.embedding + trace.biases + trace.contribution.sum(dim=(0, 1, 3))
    torch.testing.assert_close(total[0, :-1], expected, rtol=0, atol=1e-10)


@for_baselines
def test_a_later_token_changes_no_earlier_logit(name):
    model, ids = make(name).double(), make_ids(2, 20)
    expected = logits_of(model, ids)
    for place in (1, 7, 19):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 60
        logits = logits_of(model, changed)
        torch.testing.assert_close(logits[:, :place], expected[:, :place], rtol=1e-12, atol=1e-12)
        assert (logits[:, place] - expected[:, place]).abs().max() > 1e-3


@for_baselines
def test_the_loss_is_the_mean_over_next_tokens_with_a_label(name):
    model, ids = make(name), make_ids(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    probabilities = logits_of(model, ids).log_softmax(-1)
    losses = [
        -probabilities[row, place - 1, labels[row, place]]
        for row in range(2)
        for place in range(1, 12)
        if labels[row, place] != -100
    ]
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)


@for_baselines
def test_a_saved_model_loads_with_the_same_bits(name, tmp_path):
    model, ids = make(name), make_ids(2, 12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


@for_baselines
def test_one_step_of_training_changes_every_parameter(name):
    model, ids = make(name).train(), make_ids(4, 12)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_generation_takes_the_best_token_of_full_passes(name):
    # An untied head: with a tied one, new models repeat their last token.
    model, ids = make(name, tie_word_embeddings=False), make_ids(2, 5)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, logits_of(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)
    assert len(generated[:, 5:].unique()) > 2


def test_a_cache_is_refused_and_none_is_returned():
    model, ids = make("shifted_gpt_neox"), make_ids(1, 5)
    output = model(ids, use_cache=True)
    assert output.past_key_values is None
    cache = AutoModelForCausalLM.from_config(GPTNeoXConfig(**ROPE))(ids, use_cache=True).past_key_values
    for argument in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="no cache.*pass the whole text"):
            model(ids, **{argument: cache})


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_is_read_as_if_alone(name, side):
    model, ids = make(name).double(), make_ids(1, 9)
    padding = torch.full((1, 4), 60)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    together = torch.cat([padded, make_ids(1, 13, seed=1)])
    mask = torch.ones_like(together)
    mask[0] = padded[0] != 60
    text = slice(4, None) if side == "left" else slice(9)
    # GPT-NeoX's rotations are in float32, and padding moves positions, of which only differences count.
    torch.testing.assert_close(
        logits_of(model, together, attention_mask=mask)[:1, text], logits_of(model, ids), rtol=1e-5, atol=1e-5
    )
    if side == "left":
        options = {"max_new_tokens": 6, "do_sample": False}
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(model.generate(together, attention_mask=mask, **options)[:1, 4:], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shifted_gpt_neox", "all"])
def test_an_export_loads_and_writes_in_a_clean_process(name, tmp_path):
    model = make(name, vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    export_model(model, train_tokenizer(["Once upon a time there was a dog."] * 3, 300), tmp_path / "model")
    (text,) = verify_export(tmp_path / "model", ["Once"], max_new_tokens=6, model=model)
    assert len(text) > len("Once")


# Rotary positions with shifted keys and values


def rotated(vector, position, base):
    """Rotate pairs of coordinates `(i, i + D/2)` of a vector `(D,)` by `position * base ** (-2 i / D)`."""
    half = len(vector) // 2
    # The library's frequencies and angles are in float32.
    frequencies = 1 / base ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = position * frequencies
    cosine, sine = angles.cos().to(vector.dtype), angles.sin().to(vector.dtype)
    first, second = vector[:half], vector[half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine])


def naive_attention(states, weights, config):
    """Return the output of shifted attention for normed states `(T, C)`, one token and one head at a time."""
    width, base = config.hidden_size // config.num_attention_heads, config.rope_parameters["rope_theta"]
    projected = states @ weights["query_key_value.weight"].T + weights["query_key_value.bias"]
    outputs = []
    for t in range(len(states)):
        heads = []
        for head in range(config.num_attention_heads):
            start = 3 * width * head
            query = rotated(projected[t, start : start + width], t, base)
            past, present = weights["shift.weight"][:, 2 * width * head : 2 * width * (head + 1)]
            scores, values = [], []
            for s in range(t + 1):
                pair = present * projected[s, start + width : start + 3 * width]
                if s > 0:
                    pair = pair + past * projected[s - 1, start + width : start + 3 * width]
                scores.append(query @ rotated(pair[:width], s, base) / math.sqrt(width))
                values.append(pair[width:])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ weights["dense.weight"].T + weights["dense.bias"]


def naive_shifted_rope(state_dict, config, ids):
    """Return the logits `(T, V)` of one text `(T,)`."""

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}

    def norm(name, states):
        weights = part(f"gpt_neox.{name}.")
        return naive.naive_layer_norm(states, weights["weight"], weights["bias"], config.layer_norm_eps)

    states = state_dict["gpt_neox.embed_in.weight"][ids]
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        normed = norm(f"{layer}.input_layernorm", states)
        states = states + naive_attention(normed, part(f"gpt_neox.{layer}.attention."), config)
        mlp = part(f"gpt_neox.{layer}.mlp.")
        normed = norm(f"{layer}.post_attention_layernorm", states)
        inner = F.gelu(normed @ mlp["dense_h_to_4h.weight"].T + mlp["dense_h_to_4h.bias"], approximate="tanh")
        states = states + inner @ mlp["dense_4h_to_h.weight"].T + mlp["dense_4h_to_h.bias"]
    return norm("final_layer_norm", states) @ state_dict["lm_head.weight"].T


def test_shifted_attention_is_its_definition():
    model, ids = make("shifted_gpt_neox").double(), make_ids(11)
    expected = naive_shifted_rope(model.state_dict(), model.config, ids)
    torch.testing.assert_close(logits_of(model, ids[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_a_shift_that_takes_nothing_of_the_past_is_gpt_neox():
    model, ids = make("shifted_gpt_neox"), make_ids(2, 11)
    twin = GPTNeoXForCausalLM(GPTNeoXConfig(**ROPE)).eval()
    weights = {name: value for name, value in model.state_dict().items() if "shift" not in name}
    twin.load_state_dict(weights, strict=True)
    assert not torch.allclose(logits_of(model, ids), logits_of(twin, ids))
    for module in model.modules():
        if isinstance(module, CausalShift):
            with torch.no_grad():
                module.weight.copy_(torch.tensor([[0.0], [1.0]]).expand_as(module.weight))
    assert torch.equal(logits_of(model, ids), logits_of(twin, ids))


def test_a_new_shift_is_drawn_as_torch_draws_a_convolution():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ShiftedGPTNeoXConfig(**ROPE | {"hidden_size": 600}))
    convolution = torch.nn.Conv1d(1200, 1200, 2, groups=1200)
    for layer in model.gpt_neox.layers:
        weight = layer.attention.shift.weight.detach()
        assert weight.abs().max() <= 2**-0.5
        for statistic in (lambda t: t.std().item(), lambda t: t.abs().max().item()):
            assert statistic(weight) == pytest.approx(statistic(convolution.weight.detach()), rel=0.05)
        # The library's own distribution holds for what GPT-NeoX has.
        assert layer.attention.query_key_value.weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_packed_documents_are_read_as_if_alone():
    model, ids = make("shifted_gpt_neox").double(), make_ids(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed = logits_of(model, ids, position_ids=positions)
    apart = torch.cat([logits_of(model, ids[:, :5]), logits_of(model, ids[:, 5:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)


def test_masks_that_the_shift_cannot_follow_are_refused():
    model, ids = make("shifted_gpt_neox"), make_ids(1, 5)
    with pytest.raises(ValueError, match="padding within a text"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"4 axes: pass one of shape \(B, T\)"):
        model(ids, attention_mask=torch.ones(1, 1, 5, 5))


def test_shifted_attention_trains_in_half_precision_and_under_checkpointing():
    model, ids = make("shifted_gpt_neox").train(), make_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients()
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert all(torch.equal(*pair) for pair in zip(plain, checkpointed, strict=True))
    for one, other in zip(plain, half, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.98


# Memory Mosaics without some of their parts


for_parts = pytest.mark.parametrize("name", PARTS)


def naive_contextual_memory(queries, keys, states, value_scale, mix):
    """Return the outputs `(T, D)` of one head, token by token: read from the pairs that came before."""
    stored_keys, stored_values, outputs = [], [], []
    for t, query in enumerate(queries):
        if t > 0:
            value = mix * states[t - 1] + (1 - mix) * states[t]
            stored_keys.append(keys[t - 1])
            stored_values.append(torch.exp(10 * value_scale) * naive.naive_norm(value))
        outputs.append(naive.naive_kernel_smoothing(query, stored_keys, stored_values, states.shape[1]))
    return torch.stack(outputs)


def naive_parts(weights, config, ids):
    """Return the logits `(T, V)` of one text `(T,)`, by the fields of the configuration."""

    def keys_of(projected, scalars, power=1):
        if config.leak:
            return naive.naive_keys(projected, scalars["key_leak"], scalars["key_scale"], power)
        length = torch.exp((10 * scalars["key_scale"]).clamp(max=5)) ** power
        return torch.stack([length * naive.naive_norm(state) for state in projected])

    def memory(name, states, head, width):
        scalars = {
            key: weights[f"{name}.{key}"][head]
            for key in ("key_leak", "key_scale", "value_scale", "value_mix", "slot_keys", "slot_values")
            if f"{name}.{key}" in weights
        }

        def project(which):
            return states @ weights[f"{name}.{which}_proj.weight"][head * width : (head + 1) * width].T

        if "slot_keys" in scalars:
            outputs = [
                naive.naive_kernel_smoothing(q, list(scalars["slot_keys"]), list(scalars["slot_values"]), width)
                for q in keys_of(project("k"), scalars, power=2)
            ]
            return torch.exp(10 * scalars["value_scale"]) * torch.stack(outputs)
        keys = keys_of(project("k"), scalars)
        queries = keys_of(project("q"), scalars) if config.separate_query else keys
        mix = scalars["value_mix"] if config.look_ahead else 1
        return naive_contextual_memory(queries, keys, project("v"), scalars["value_scale"], mix)

    states = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        for kind in ("contextual", "persistent"):
            name = f"model.layers.{index}.{kind}"
            normed = naive.naive_layer_norm(states, weights[f"{name}_norm.weight"], None, config.layer_norm_eps)
            heads = [memory(f"{name}_memory", normed, h, config.head_dim) for h in range(config.num_attention_heads)]
            states = states + torch.cat(heads, dim=-1) @ weights[f"{name}_memory.o_proj.weight"].T
    normed = naive.naive_layer_norm(states, weights["model.norm.weight"], None, config.layer_norm_eps)
    return normed @ weights["lm_head.weight"].T / config.logits_scaling


@for_parts
def test_a_mosaic_without_parts_is_its_definition(name):
    model, ids = make(name).double(), make_ids(11)
    weights = dict(model.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    expected = naive_parts(weights, model.config, ids)
    logits = model(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    weighting = torch.randn_like(expected)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad((values * weighting).sum(), parameters) for values in (logits, expected))
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-7, atol=1e-9)


def test_a_mosaic_with_all_parts_is_a_memory_mosaic_bit_for_bit():
    parts, ids = make("mosaic"), make_ids(2, 70)
    torch.manual_seed(0)
    mosaic = randomize_parameters(MemoryMosaicForCausalLM(MemoryMosaicConfig(**MOSAIC)))
    assert parts.state_dict().keys() == mosaic.state_dict().keys()
    assert torch.equal(logits_of(parts, ids), logits_of(mosaic, ids))
    for model in (parts, mosaic):
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for one, other in zip(parts.parameters(), mosaic.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(("name", "lacking"), [("no look-ahead", {"value_mix"}), ("no leak", {"key_leak"})])
def test_what_is_fixed_is_neither_trained_nor_saved_nor_loaded(name, lacking, tmp_path):
    torch.manual_seed(0)
    parts = AutoModelForCausalLM.from_config(CONFIGS[name])
    torch.manual_seed(0)
    mosaic = MemoryMosaicForCausalLM(MemoryMosaicConfig(**MOSAIC))
    ids = make_ids(2, 12)
    expected = logits_of(parts, ids)
    absent = mosaic.state_dict().keys() - parts.state_dict().keys()
    assert {key.rpartition(".")[2] for key in absent} == lacking
    # One seed gives one start: a comparison differs in the part alone.
    assert all(torch.equal(value, mosaic.state_dict()[key]) for key, value in parts.state_dict().items())

    parts.load_state_dict(mosaic.state_dict(), strict=False)
    assert torch.equal(logits_of(parts, ids), expected)
    mosaic.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=CONFIGS[name], trust_remote_code=False)
    assert torch.equal(logits_of(loaded, ids), expected)
    assert not torch.allclose(logits_of(mosaic, ids), expected)


def normed_states(model, ids):
    """Return what the first contextual memory of a model reads."""
    return model.model.layers[0].contextual_norm(model.model.embed_tokens(ids)).detach()


@pytest.mark.parametrize("name", ["mosaic", "no look-ahead"])
def test_only_a_value_that_looks_ahead_reads_the_next_token(name):
    model, ids = make(name), make_ids(1, 9)
    memory, states = model.model.layers[0].contextual_memory, normed_states(model, ids)
    changed = states.clone()
    changed[:, 5] += torch.randn(24)
    before, after = (memory.pair_values(inputs, None, None, memory.scalars()) for inputs in (states, changed))
    differs = (before != after).any(-1).any(1)[0].nonzero().flatten().tolist()
    assert differs == ([4, 5] if name == "mosaic" else [5])


@pytest.mark.parametrize("name", ["mosaic", "no leak"])
def test_only_keys_with_a_leak_read_earlier_tokens(name):
    model, ids = make(name).double(), make_ids(1, 40)
    states = normed_states(model, ids)
    changed = states.clone()
    changed[:, 7] += torch.randn(24, dtype=torch.float64)
    for memory in (model.model.layers[0].contextual_memory, model.model.layers[0].persistent_memory):
        before, after = (
            memory.sum_keys(inputs, None, None, None, memory.scalars())[0] for inputs in (states, changed)
        )
        differs = (before != after).any(-1).any(1)[0].nonzero().flatten().tolist()
        assert differs == [7] if name == "no leak" else differs[:3] == [7, 8, 9]


def test_separate_queries_are_projected_apart_from_keys():
    model, ids = make("separate query"), make_ids(1, 9)
    expected = logits_of(model, ids)
    memories = [m for m in model.modules() if isinstance(m, MemoryMosaicQueryMemory)]
    assert len(memories) == 2
    with torch.no_grad():
        memories[0].q_proj.weight.neg_()
    assert not torch.allclose(logits_of(model, ids), expected)


@for_parts
def test_a_mosaic_without_parts_goes_on_from_its_memory(name):
    model, ids = make(name).double(), make_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    memory, logits = None, []
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 12)):
            output = model(ids[:, start:end], attention_mask=mask[:, :end], use_cache=True, **memory_kwargs(memory))
            memory = output.past_key_values if hasattr(output, "past_key_values") else output.cache
            logits.append(output.logits)
    continued = torch.cat(logits, dim=1)
    torch.testing.assert_close(continued[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


def test_a_memory_of_other_parts_is_refused():
    model, other = make("separate query"), make("mosaic")
    memory = other(make_ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="was not made for this model"):
        model(make_ids(1, 3), **memory_kwargs(memory))

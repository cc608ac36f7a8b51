# SPDX-License-Identifier: Apache-2.0
"""The model is the paper's function: golden tensors, the oracle, causality, padding, precision, gradients."""

import copy
import json
import math

import pytest
import torch
from accelerate import cpu_offload
from helpers.kinds import BACKBONE_KINDS, KINDS, LENGTH, for_kinds, make_v2
from helpers.models import BANDWIDTHS, by_bandwidth, checkpoint_activations, make_ids, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM, leaky_average
from modeling_memory_mosaic.naive_memory_mosaic import (
    naive_kernel_smoothing,
    naive_leaky_average,
    naive_logits,
)
from modeling_memory_mosaic.ops_memory_mosaic import CHUNK_LENGTH, kernel_smoothing, scale_to_length
from training.convert import convert_authors_state_dict


GOLDEN = ["tiny", "small"]


def read_golden(request, name):
    with safe_open(request.config.rootpath / "tests" / "golden" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return json.loads(file.metadata()["model_args"]), tensors


def without_prefix(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_authors_code(request, name, implementation):
    model_args, golden = read_golden(request, name)
    config, state_dict = convert_authors_state_dict(without_prefix(golden, "state."), model_args)
    _, gradients = convert_authors_state_dict(without_prefix(golden, "grad."), model_args)
    model = MemoryMosaicForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    model.load_state_dict(state_dict, strict=False)
    model.tie_weights()

    outputs = model(golden["input_ids"], labels=golden["input_ids"])
    outputs.loss.backward()

    assert (outputs.logits - golden["logits"]).abs().max() <= 1e-5
    assert (outputs.loss - golden["loss"]).abs() <= 1e-6
    for parameter_name, parameter in model.named_parameters():
        expected = gradients.pop(parameter_name)
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), parameter_name
    assert not gradients


def test_a_saved_model_is_read_at_another_exponent(model, tmp_path):
    """With exponent 0 nothing is computed, and up to `bandwidth_start` pairs every bandwidth is the learnt one."""
    ids, fields = make_ids(2, 20), {"bandwidth_exponent": 0.25, "bandwidth_start": 8}
    mask = torch.tensor([[0] * 9 + [1] * 11] * 2)
    assert model.create_masks_for_generate(model.config, torch.zeros(2, 20, 24), mask)["query_scale"] is None
    model.save_pretrained(tmp_path)
    narrowing = MemoryMosaicForCausalLM.from_pretrained(tmp_path, **fields)
    fixed, logits = model(ids).logits, narrowing(ids).logits
    torch.testing.assert_close(logits[:, :9], fixed[:, :9], rtol=0, atol=1e-6)  # the tenth token sees nine pairs
    assert (logits[:, 9:] - fixed[:, 9:]).abs().amax(-1).min() > 1e-4
    torch.testing.assert_close(logits[0], naive_logits(narrowing.state_dict(), narrowing.config, ids[0]))
    narrowing.save_pretrained(tmp_path)
    assert torch.equal(MemoryMosaicForCausalLM.from_pretrained(tmp_path)(ids).logits, logits)
    for name, value in fields.items():
        setattr(model.config, name, value)
    assert torch.equal(model(ids).logits, logits)


def test_golden_files_are_all_used(request):
    assert sorted(p.stem for p in (request.config.rootpath / "tests" / "golden").glob("*.safetensors")) == sorted(
        GOLDEN
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config", [*BANDWIDTHS, {"use_bias": True, "tie_word_embeddings": False, "head_dim": 5}], ids=str
)
def test_equals_the_oracle_in_value_and_gradient(implementation, config):
    model = make_model(dtype=torch.float64, num_persistent_slots=7, **config)
    model.set_attn_implementation(implementation)
    ids = make_ids(CHUNK_LENGTH + 5)
    weights = torch.randn(len(ids), model.config.vocab_size, dtype=torch.float64)

    logits = model(ids[None]).logits[0]
    gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
    parameters = dict(model.named_parameters())
    state = parameters | {"lm_head.weight": model.lm_head.weight}
    expected = naive_logits(state, model.config, ids)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))

    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for name, gradient, expected_gradient in zip(parameters, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("num_tokens", [1, 2, CHUNK_LENGTH - 1, CHUNK_LENGTH, CHUNK_LENGTH + 1, 5 * CHUNK_LENGTH + 3])
def test_leaky_average_equals_its_recurrence(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(2, 3, num_tokens, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    leak = torch.tensor([0.0, 0.01, 3.0], dtype=torch.float64, requires_grad=True)
    weights = torch.randn(states.shape, dtype=torch.float64, generator=generator)

    sums, last = leaky_average(states, leak)
    expected = torch.stack(
        [torch.stack([naive_leaky_average(states[b, h], leak[h]) for h in range(3)]) for b in (0, 1)]
    )

    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, expected[:, :, -1:], rtol=1e-12, atol=1e-12)
    state, decoded = None, []
    for t in range(num_tokens):  # as decoding does
        sum_of_token, state = leaky_average(states[:, :, t : t + 1], leak, state)
        decoded.append(sum_of_token)
    torch.testing.assert_close(torch.cat(decoded, dim=2), expected, rtol=1e-12, atol=1e-12)
    for gradient, expected_gradient in zip(
        torch.autograd.grad((sums * weights).sum(), (states, leak), materialize_grads=True),
        torch.autograd.grad((expected * weights).sum(), (states, leak), materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


def test_leaky_average_over_thousands_of_tokens_needs_two_levels_of_chunks():
    num_tokens = CHUNK_LENGTH**2 + CHUNK_LENGTH + 1
    states = torch.randn(1, 1, num_tokens, 2, dtype=torch.float64)
    leak = torch.tensor([1e-3], dtype=torch.float64)
    expected = naive_leaky_average(states[0, 0], leak[0])
    torch.testing.assert_close(leaky_average(states, leak)[0][0, 0], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(split=st.integers(1, 3 * CHUNK_LENGTH - 1), padding=st.booleans(), seed=st.integers(0, 99))
def test_leaky_average_may_be_split_anywhere(split, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 2, 3 * CHUNK_LENGTH, 3, dtype=torch.float64, generator=generator)
    leak = torch.rand(2, dtype=torch.float64, generator=generator)
    elapsed = torch.randint(0, 2, (2, states.shape[2]), generator=generator) if padding else None
    whole, last = leaky_average(states, leak, elapsed=elapsed)
    head, tail = (None, None) if elapsed is None else (elapsed[:, :split], elapsed[:, split:])
    first, state = leaky_average(states[:, :, :split], leak, elapsed=head)
    second, state = leaky_average(states[:, :, split:], leak, state, tail)
    torch.testing.assert_close(torch.cat([first, second], dim=2), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_leaky_average_is_linear_in_tokens():
    """A T x T table of decays for 2^17 tokens would take 64 GiB."""
    sums, _ = leaky_average(torch.ones(1, 1, 2**17, 1), torch.tensor([0.1]))
    torch.testing.assert_close(sums[0, 0, -1, 0], 1 / (1 - torch.exp(torch.tensor(-0.1))))


def test_kernel_smoothing_equals_its_sum():
    query, key, value = (torch.randn(1, 1, n, 4, dtype=torch.float64) for n in (1, 6, 6))
    retrieved, weights = kernel_smoothing(query, key, value)
    expected = naive_kernel_smoothing(query[0, 0, 0], list(key[0, 0]), list(value[0, 0]), 4)
    torch.testing.assert_close(retrieved[0, 0, 0], expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_pairs_are_a_set():
    """The retrieval does not depend on the order in which pairs are stored."""
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 6, 6))
    order = torch.randperm(6)
    retrieved = kernel_smoothing(query, key[:, :, order], value[:, :, order])[0]
    torch.testing.assert_close(retrieved, kernel_smoothing(query, key, value)[0])


def test_zero_vector_stays_zero_with_a_tame_gradient():
    vectors = torch.zeros(1, 1, 2, 4, requires_grad=True)
    scaled = scale_to_length(vectors, torch.tensor([3.0]))
    scaled.sum().backward()
    assert torch.equal(scaled, torch.zeros_like(scaled))
    assert vectors.grad.abs().max() <= 3.0


@by_bandwidth
@pytest.mark.parametrize("num_tokens", [2, 9, CHUNK_LENGTH + 9])
def test_a_token_changes_nothing_before_itself(model, num_tokens):
    ids = make_ids(1, num_tokens)
    for position in {1, num_tokens // 2, num_tokens - 1}:
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        before, after = model(ids).logits, model(changed).logits
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position], after[:, position])


def test_first_token_retrieves_exactly_zero(model):
    memory = model.model.layers[0].contextual_memory
    memory.o_proj = torch.nn.Identity()
    hidden_states = torch.randn(2, 5, model.config.hidden_size)
    retrieved, _ = memory(hidden_states)
    assert torch.equal(retrieved[:, 0], torch.zeros_like(retrieved[:, 0]))
    assert (retrieved[:, 1:] != 0).all()


def test_attention_maps_of_eager_are_strictly_lower_triangular(model):
    ids, mask = make_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    model.set_attn_implementation("eager")
    outputs = model(ids, attention_mask=mask, output_attentions=True)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for weights in outputs.attentions:
        assert weights.shape == (2, model.config.num_attention_heads, 9, 9)
        assert torch.equal(weights, weights.tril(diagonal=-1))
        has_memory = torch.tensor([[False] + 8 * [True], 5 * [False] + 4 * [True]])
        torch.testing.assert_close(weights.sum(-1), has_memory[:, None].float().expand(-1, 3, -1))
        assert torch.equal(weights[1, :, :, :4], torch.zeros_like(weights[1, :, :, :4]))


def test_attention_maps_that_flex_attention_does_not_compute_are_refused_before_anything_is_read(model):
    """The second result of flex attention is the logarithm of a sum, and would be returned as a map."""
    cache = model(make_ids(1, 5), use_cache=True).past_key_values
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention.*eager"):
        model(make_ids(1, 4), output_attentions=True, past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5]


def test_attention_maps_that_sdpa_does_not_compute_are_none_at_all_with_a_warning(model, monkeypatch):
    messages = []
    monkeypatch.setattr(sdpa_attention.logger, "warning_once", messages.append)
    outputs = model(make_ids(1, 4), output_attentions=True)
    assert outputs.attentions == () and "set your attention to `eager`" in messages[0]
    assert torch.equal(outputs.logits, model(make_ids(1, 4)).logits)


def test_a_gradient_flows_through_the_maps(model):
    """Attribution by gradient times map needs the map within the graph, not a copy beside it."""
    model.set_attn_implementation("eager")
    outputs = model(make_ids(1, 6), output_attentions=True)
    for weights in outputs.attentions:
        weights.retain_grad()
    outputs.logits[0, -1, 3].backward()
    for weights in outputs.attentions:
        assert weights.grad[0, :, -1, :5].abs().min() > 0


def padded(rows, width, pattern):
    """Return texts in one batch, padded on one side, on both, or within, behind the first token and later."""
    places = []
    for number, row in enumerate(rows):
        start = {"left": width - len(row), "both": (width - len(row)) // 2}.get(pattern, 0)
        at = start + torch.arange(len(row))
        if pattern == "within":
            order = torch.randperm(width - 6, generator=torch.Generator().manual_seed(number))[: len(row) - 1]
            at = torch.cat([at[:1], 6 + order.sort().values])
        places.append(at)
    return KINDS["mosaic"].batch(rows, places, width)


@for_kinds("mosaic", "mosaic v2", "narrowing mosaic", *BACKBONE_KINDS, "classifier")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("pattern", ["left", "right", "both", "within"])
def test_padding_changes_nothing(kind, implementation, pattern):
    model = kind.make()
    model.set_attn_implementation(implementation)
    rows = [make_ids(length, seed=length) for length in (1, 2, 7, 40)]
    inputs = padded(rows, 47, pattern)
    answers = kind.answer(model, inputs)
    for answer, mask, row in zip(answers, inputs["attention_mask"], rows, strict=True):
        alone = kind.answer(model, {"input_ids": row[None]})[0]
        torch.testing.assert_close(answer[mask == 1] if alone.ndim == 2 else answer, alone, rtol=0, atol=1e-5)


def gradients_of(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(model, expected, rtol=1e-5, atol=1e-7):
    actual = gradients_of(model)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol, msg=name)


def num_labels(labels):
    """Return the number of labels as `Trainer` counts them: the first token of a text is not one."""
    return (labels[:, 1:] if labels.ndim == 2 else labels).ne(-100).sum()


@for_kinds("mosaic", "mosaic v2", "narrowing mosaic", *BACKBONE_KINDS, "classifier")
def test_the_gradient_of_a_padded_batch_is_that_of_its_rows(kind):
    """Rows of unequal length count by their labels."""
    model = kind.make(dtype=torch.float64)  # in float32 the order of the sums alone moves a gradient by 1e-6
    rows = [make_ids(length, seed=length) for length in (18, 11, 5, 2)]
    inputs = kind.with_labels(padded(rows, 22, "right"))
    if kind.model != "classifier":
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    num_items = num_labels(inputs["labels"])
    model(**inputs, num_items_in_batch=num_items).loss.backward()
    together = gradients_of(model)
    model.zero_grad()
    for number, row in enumerate(rows):
        labels = inputs["labels"][[number]][..., : len(row)]
        model(row[None], labels=labels, num_items_in_batch=num_items).loss.backward()
    assert_same_gradients(model, together)


@pytest.mark.parametrize("make", [make_model, make_v2])
def test_padding_takes_no_gradient(make):
    model = make()
    embeddings = torch.randn(2, 12, model.config.hidden_size, requires_grad=True)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5], mask[1, 9:] = 0, 0
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
    logits[mask == 1].square().sum().backward()
    assert torch.equal(embeddings.grad[mask == 0], torch.zeros_like(embeddings.grad[mask == 0]))
    assert (embeddings.grad[mask == 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_half_precision_stays_finite(dtype, scale, num_tokens, implementation):
    model = make_model(dtype=dtype)
    model.set_attn_implementation(implementation)
    embeddings = (scale * torch.randn(3, num_tokens, model.config.hidden_size)).to(dtype).requires_grad_()
    mask = torch.ones(3, num_tokens, dtype=torch.long)
    mask[1, : num_tokens // 2], mask[2] = 0, 0
    outputs = model(inputs_embeds=embeddings, attention_mask=mask, labels=make_ids(3, num_tokens))
    assert outputs.logits.dtype == dtype
    assert outputs.logits.isfinite().all()
    outputs.logits.float().logsumexp(-1).mean().backward()
    assert embeddings.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@for_kinds(*KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0])
def test_half_precision_stays_finite_in_loss_and_gradient(kind, dtype, size):
    """Large weights, or large observations, which a prediction is as large as; rows of any length."""
    model = kind.make(dtype=dtype, **kind.objectives)
    if kind.model != "continuous":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(size)
    for num_tokens in (2, 11, 23) if not kind.objectives else (10, 23):
        inputs = kind.with_labels(kind.inputs(model, 3, num_tokens))
        if "observations" in inputs:
            inputs = {name: size * tensor for name, tensor in inputs.items()}
        outputs = model(**inputs)
        assert outputs[kind.answers].dtype == dtype
        assert outputs[kind.answers].isfinite().all() and outputs.loss.isfinite()
        outputs.loss.backward()
        for name, gradient in gradients_of(model).items():
            assert gradient.isfinite().all(), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "exponent"), [(40, 0), (600, 1)])  # 600 times the longest key is no float16
def test_half_precision_stays_finite_at_the_sharpest_kernel(num_tokens, exponent, dtype, implementation):
    model = make_model(dtype=dtype, bandwidth_exponent=exponent)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("key_scale"):
                parameter.fill_(2.0)  # far beyond the cap
            if name.endswith("slot_keys"):
                parameter.mul_(30)  # scores beyond 65504, the largest float16
    assert model(make_ids(2, num_tokens)).logits.isfinite().all()
    with torch.autocast("cpu", dtype=dtype):
        assert model.float()(make_ids(2, num_tokens)).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_v2_stays_finite_at_the_sharpest_kernel(dtype, implementation):
    model = make_v2(dtype=dtype)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bandwidth_scale", "bandwidth_offset", "bandwidth_exponent")):
                parameter.fill_(20.0)  # far beyond the caps: beta is above 65504, the largest float16, and cut
    assert model(make_ids(2, 40)).logits.isfinite().all()
    with torch.autocast("cpu", dtype=dtype):
        assert model.float()(make_ids(2, 40)).logits.isfinite().all()


def test_autocast_keeps_sums_in_float32():
    states = torch.randn(1, 2, 100, 4)
    leak = torch.tensor([0.01, 0.1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(leaky_average(states, leak)[0], leaky_average(states, leak)[0].float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = leaky_average(states, leak)[0]
    assert torch.equal(sums, leaky_average(states, leak)[0])


def text_to_learn(kind, model, seed):
    """Make text in which each token but every fifth follows from the one before; a class or observations likewise."""
    if kind.model == "continuous":
        turns = torch.rand(8, 1, 3, generator=torch.Generator().manual_seed(seed)) + torch.arange(24)[:, None] / 12
        pairs = torch.stack([torch.sin(6.28 * turns), torch.cos(6.28 * turns)], dim=-1).flatten(2)
        return {"observations": pairs, "labels": pairs}
    ids = make_ids(8, 24, seed=seed)
    for t in range(1, 24):
        ids[:, t] = ids[:, t] if t % 5 == 0 else (7 * ids[:, t - 1] + 3) % 61
    labels = ids[:, -1] % 3 if kind.model == "classifier" else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.slow
@for_kinds()
def test_training_in_bfloat16_loses_little(kind):
    """Autocast is Trainer's `bf16=True`."""
    num_steps, rate, options = {
        "mosaic": (200, 3e-3, {"logits_scaling": 1.0}),
        "mosaic v2": (200, 3e-3, {}),
        "memory model": (60, 1e-2, {}),
        "classifier": (60, 1e-3, {}),
        "continuous": (60, 1e-2, {"loss_clip": None}),
    }[kind.name]
    losses = {}
    for autocast in (False, True):
        model = kind.make(**options).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        history = []
        for step in range(num_steps):
            inputs = text_to_learn(kind, model, seed=step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = model(**inputs, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses[autocast] = sum(history[-20:]) / 20
    assert losses[False] < (0.8 * math.log(61) if kind.name == "mosaic" else 0.9 * history[0])
    assert abs(losses[True] / losses[False] - 1) < 0.02


def test_a_memory_under_gradient_checkpointing_is_refused():
    model = make_model().train()
    checkpoint_activations(model, use_reentrant=False)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(make_ids(1, 4), past_key_values=DynamicCache(config=model.config))
    assert model(make_ids(1, 4)).past_key_values is None


def test_an_attention_function_without_masks_is_refused(model):
    AttentionInterface.register("maskless", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("maskless")
    with pytest.raises(ValueError, match="'maskless' has no function that makes its masks"):
        model(make_ids(1, 4), attention_mask=torch.tensor([[0, 1, 1, 1]]))


@for_kinds(*KINDS)
def test_train_and_eval_agree_without_dropout(kind):
    model = kind.make()
    inputs = kind.inputs(model, 2, 20)
    answers = [kind.answer(mode(), inputs, use_cache=False) for mode in (model.train, model.eval)]
    assert torch.equal(*answers)


@for_kinds(*KINDS)
def test_dropout_acts_in_training_only(kind):
    for dropout in kind.dropouts:
        model = kind.make(**dropout)
        inputs = kind.inputs(model, 1, 20)
        for mode, is_random in ((model.train, True), (model.eval, False)):
            mode()
            answers = [kind.answer(model, inputs, use_cache=False) for _ in range(2)]
            assert torch.equal(*answers) != is_random, dropout.keys()


@for_kinds("mosaic", "mosaic v2", "narrowing mosaic", *BACKBONE_KINDS, "classifier")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant):
    model = kind.make(**kind.objectives).train()
    inputs = kind.with_labels(kind.inputs(model, 2, 20))

    def gradients():
        model.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        return gradients_of(model)

    expected = gradients()
    checkpoint_activations(model, use_reentrant)
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert len(layers) >= 2
    actual = gradients()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in actual.items())


@for_kinds(*KINDS)
def test_gradients_of_one_batch_equal_accumulated_ones(kind):
    # float64: in float32 the order of the sums alone moves a gradient by 1e-6
    model = kind.make(dtype=torch.float64, **kind.objectives).train()
    inputs = kind.with_labels(kind.inputs(model, 8, 12))
    if inputs["labels"].ndim == 2 and not kind.objectives:
        inputs["labels"][2, 3:] = -100  # rows with unequal numbers of targets
        inputs["labels"][5, :9] = -100
    num_items = num_labels(inputs["labels"])

    def gradients(parts):
        model.zero_grad()
        for part in parts:
            inputs_of_part = {name: tensor[part] for name, tensor in inputs.items()}
            model(**inputs_of_part, num_items_in_batch=num_items).loss.backward()
        return gradients_of(model)

    whole = gradients([slice(None)])
    assert_same_gradients(model, whole)
    gradients([slice(i, i + 1) for i in range(8)])
    assert_same_gradients(model, whole)


@for_kinds(*KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_rows_of_any_length_has_a_loss_and_a_gradient(kind, dtype):
    """Logits with gaps in their storage would pass in half precision only, which the library's loss copies."""
    model = kind.make(dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for num_rows in (1, 2, 3):
        for num_tokens in (2, LENGTH, LENGTH + 1, 2 * LENGTH - 1, 2 * LENGTH):
            inputs = kind.with_labels(kind.inputs(model, num_rows, num_tokens))
            outputs = model(**inputs)
            outputs.loss.backward()
            assert outputs[kind.answers].is_contiguous()
            rows = [{name: tensor[[row]] for name, tensor in inputs.items()} for row in range(num_rows)]
            expected = torch.stack([model(**row).loss for row in rows]).mean()
            torch.testing.assert_close(outputs.loss, expected, rtol=tolerance, atol=tolerance)


@for_kinds(*KINDS)
def test_inputs_and_labels_are_not_touched(kind):
    model = kind.make(**kind.objectives).train()
    inputs = kind.with_labels(kind.inputs(model, 2, 20))
    before, weights = copy.deepcopy(inputs), copy.deepcopy(model.state_dict())
    model(**inputs).loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@for_kinds("mosaic", "mosaic v2", "continuous", "classifier")
def test_hidden_states_are_given_where_asked_for(kind):
    """The caller or the configuration asks for them: what enters the first layer, and what leaves each."""
    model = kind.make()
    inputs = kind.inputs(model, 2, 7)
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    first = inputs.get("observations", None)
    first = model.get_input_embeddings()(inputs["input_ids"]) if first is None else first
    assert torch.equal(states[0], first) and not torch.equal(states[-1], states[0])
    assert model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert all(torch.equal(*pair) for pair in zip(model(**inputs).hidden_states, states, strict=True))


@for_kinds(*KINDS)
def test_a_tuple_holds_what_the_outputs_hold(kind):
    model = kind.make()
    inputs = kind.with_labels(kind.inputs(model, 2, 20))
    outputs, values = model(**inputs, use_cache=False), model(**inputs, use_cache=False, return_dict=False)
    assert len(values) == len(outputs.to_tuple())
    assert all(torch.equal(*pair) for pair in zip(values, outputs.to_tuple(), strict=True))


@pytest.mark.slow
def test_flex_attention_serves_too(model):
    model.requires_grad_(False)  # on a CPU, FlexAttention has no backward
    ids, mask = make_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)


def test_requests_that_would_be_misread_are_refused(model):
    ids = make_ids(2, 4)
    with pytest.raises(ValueError, match="must hold 1 at tokens.* Found: -1000000000.0"):
        model(ids, attention_mask=torch.tensor([[0.0, 0, 0, 0], [-1e9, 0, 0, 0]]))
    with pytest.raises(ValueError, match="not numbers of documents"):
        model(ids, attention_mask=torch.tensor([[1, 1, 2, 2], [1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="is_causal=False"):
        model(ids, is_causal=False)
    assert torch.equal(model(ids, is_causal=True).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"have shape \(2, 0\): it must be"):
        model(ids[:, :0])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 rows, but 1"):
        model(ids[:1], past_key_values=cache)


@for_kinds("mosaic", "mosaic v2", *BACKBONE_KINDS, "classifier")
@pytest.mark.parametrize("bad_id", [-1, 61])
@pytest.mark.parametrize("place", [1, 7])
def test_ids_out_of_range_are_named(kind, bad_id, place):
    ids = make_ids(1, 12)
    ids[0, place] = bad_id
    with pytest.raises(ValueError, match=rf"range from .*{bad_id}.*vocab_size is 61"):
        kind.make()(ids)


@pytest.mark.parametrize("shape", [(1, 3), (1, 9), (2, 4), (1, 1, 4, 4)])
def test_a_mask_of_another_length_is_refused(model, shape):
    with pytest.raises(ValueError, match="attention_mask"):
        model(make_ids(1, 4), attention_mask=torch.ones(shape, dtype=torch.long))


def test_ids_and_embeddings_exclude_each_other(model):
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="exactly one"):
        model(make_ids(1, 3), inputs_embeds=torch.zeros(1, 3, 24))


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 20}, 99_932),
        ({"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 20}, 396_528),
        ({"num_hidden_layers": 1, "vocab_size": 50304}, 45_713_748),
        ({"num_hidden_layers": 12, "vocab_size": 50304}, 123_588_336),
        ({"num_hidden_layers": 18, "vocab_size": 50304}, 166_065_384),
    ],
    ids=str,
)
def test_parameter_counts_of_the_paper(sizes, parameters):
    with torch.device("meta"):
        model = MemoryMosaicForCausalLM(MemoryMosaicConfig(**sizes))
    assert model.num_parameters() == parameters


def test_initial_values_are_the_authors():
    config = MemoryMosaicConfig(vocab_size=500, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    torch.manual_seed(0)
    model = MemoryMosaicForCausalLM(config)
    layer = model.model.layers[1]
    for memory in (layer.contextual_memory, layer.persistent_memory):
        torch.testing.assert_close(memory.key_leak, torch.linspace(0.5, 5, 4) / 10)
        assert torch.equal(memory.key_scale, torch.full((4,), 0.1))
        assert torch.equal(memory.value_scale, torch.full((4,), -0.05))
        assert memory.k_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert memory.o_proj.weight.std().item() == pytest.approx((128 * 4) ** -0.5, rel=0.05)
    assert layer.contextual_memory.v_proj.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    mixes = torch.cat([layer.contextual_memory.value_mix for layer in model.model.layers])
    assert 0 <= mixes.min() < 0.3 and 0.7 < mixes.max() <= 1
    assert layer.persistent_memory.slot_keys.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert layer.persistent_memory.slot_values.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(128))
    untied = MemoryMosaicForCausalLM(MemoryMosaicConfig(**{**config.to_dict(), "tie_word_embeddings": False}))
    assert untied.model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert untied.lm_head.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)


@for_kinds("mosaic", "mosaic v2", "memory model", "continuous", "classifier")
def test_there_are_no_buffers(kind):
    assert dict(kind.make().named_buffers()) == {}


@for_kinds(*(name for name in KINDS if name != "memory model of gpt2"))  # GPT-2's positions end
def test_no_longest_input(kind):
    model = kind.make()
    if hasattr(model.config, "max_position_embeddings"):
        model.config.max_position_embeddings = 8
    assert kind.answer(model, kind.inputs(model, 1, 500)).isfinite().all()


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13 has no chunked loss")
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)])
def test_a_loss_without_logits_is_that_with_them(num_items):
    model = make_model(dtype=torch.float64)
    ids = make_ids(2, 9)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    kwargs = {} if num_items is None else {"num_items_in_batch": num_items}
    # Not the library's own loss, which is in float32.
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = functional.cross_entropy(logits, targets, reduction="sum") / (num_items or (targets != -100).sum())
    loss.backward()
    expected = gradients_of(model)
    model.zero_grad()
    without = model(ids, labels=labels, skip_logits=True, **kwargs)
    assert without.logits is None
    torch.testing.assert_close(without.loss, loss, rtol=1e-10, atol=1e-10)
    without.loss.backward()
    assert_same_gradients(model, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13 has no chunked loss")
def test_a_loss_without_logits_is_not_rounded_to_half_precision():
    model, ids = make_model(dtype=torch.bfloat16), make_ids(4, 40)
    losses = [model(ids, labels=ids, skip_logits=skip_logits).loss for skip_logits in (False, True)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


def hooked(model):
    model.lm_head.register_forward_hook(lambda *arguments: None)


def with_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))


def wrapped(model):
    model.lm_head = torch.nn.Sequential(model.lm_head)


def offloaded(model):
    cpu_offload(model, execution_device="cpu")


def with_another_loss(model):
    model.loss_function = lambda **kwargs: 7.0


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13 has no chunked loss")
@pytest.mark.parametrize("change", [hooked, with_bias, wrapped, offloaded, with_another_loss])
def test_a_loss_without_logits_of_another_head_is_refused(change, model):
    change(model)
    with pytest.raises(ValueError, match="skip_logits"):
        model(make_ids(1, 4), labels=make_ids(1, 4), skip_logits=True)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13 has no chunked loss")
@pytest.mark.parametrize(
    "options",
    [
        {"labels": None},
        {"labels": make_ids(2, 12)},
        {"labels": make_ids(3, 9)},
        {"labels": make_ids(2, 9), "logits_to_keep": 4},
        {"labels": make_ids(2, 9), "shift_labels": make_ids(2, 9)},
    ],
    ids=["no labels", "long labels", "more rows", "some logits", "shifted labels"],
)
def test_what_a_loss_without_logits_does_not_compute_is_refused(options, model):
    with pytest.raises(ValueError, match="skip_logits=True needs `labels`"):
        model(make_ids(2, 9), skip_logits=True, **options)


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13 has no chunked loss")
def test_a_loss_without_logits_knows_which_labels_do_not_count(model):
    ids = make_ids(2, 9)
    losses = [model(ids, labels=ids, ignore_index=int(ids[0, 3]), skip_logits=skip).loss for skip in (False, True)]
    torch.testing.assert_close(losses[1], losses[0])

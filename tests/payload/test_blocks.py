# SPDX-License-Identifier: Apache-2.0
"""Reading block by block equals kernel smoothing with the whole mask: forward, gradient, dropout and memory."""

import copy

import pytest
import torch
from helpers.models import make_ids, make_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_memory_mosaic.blocks_memory_mosaic import (
    BLOCK_LENGTH,
    SlotRule,
    _kept,
    block_read,
    can_read_in_blocks,
)
from modeling_memory_mosaic.ops_memory_mosaic import kernel_smoothing


HEADS, WIDTH = 3, 4
LENGTHS = [1, 2, BLOCK_LENGTH - 1, BLOCK_LENGTH, BLOCK_LENGTH + 1, 3 * BLOCK_LENGTH + 5]


def tensors(batch_size, num_queries, num_pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch_size, HEADS, num, WIDTH) for num in (num_queries, num_pairs, num_pairs)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def whole_read(query, key, value, rule, dropped=None):
    """The same with all scores at once: a query that sees nothing reads 0."""
    num_queries, num_pairs = query.shape[2], value.shape[2]
    rows, columns = torch.arange(num_queries)[:, None], torch.arange(num_pairs)
    allowed = (columns < rule.num_before + rows).expand(query.shape[0], -1, -1)
    if rule.is_full is not None:
        allowed = allowed & rule.is_full[:, None]
    if rule.begins is not None:
        allowed = allowed & (columns >= rule.begins[:, :, None])
    sees = allowed.any(-1)
    # Where nothing is seen, everything may be: the result is then taken away.
    mask = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~(allowed | ~sees[..., None]), -torch.inf)
    if num_pairs == 0:
        return (query @ key[:, :, :0].transpose(2, 3) @ value).transpose(1, 2)
    _, weights = kernel_smoothing(query, key[:, :, :num_pairs], value, mask[:, None])
    weights = weights if dropped is None else weights * dropped
    return ((weights @ value) * sees[:, None, :, None]).transpose(1, 2)


def rules(batch_size, num_queries, num_pairs):
    generator = torch.Generator().manual_seed(num_queries)
    is_full = torch.rand(batch_size, num_pairs, generator=generator) < 0.7
    begins = torch.randint(0, 2, (batch_size, num_queries), generator=generator) * torch.arange(num_queries)
    begins = begins.cummax(-1).values
    yield SlotRule(num_pairs)
    yield SlotRule(num_pairs - num_queries + 1)
    yield SlotRule(num_pairs - num_queries + 1, is_full)
    yield SlotRule(num_pairs - num_queries + 1, is_full, begins)


@pytest.mark.parametrize("num_earlier", [0, 7])
@pytest.mark.parametrize("num_queries", LENGTHS)
def test_blocks_equal_the_whole(num_queries, num_earlier):
    num_pairs = num_queries + num_earlier
    inputs = tensors(2, num_queries, num_pairs)
    for rule in rules(2, num_queries, num_pairs):
        expected = whole_read(*inputs, rule)
        actual = block_read(*inputs, rule)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        gradient = torch.randn(expected.shape, dtype=torch.float64)
        pairs = zip(*(torch.autograd.grad(read, inputs, gradient) for read in (actual, expected)), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_the_strict_rule_reads_earlier_pairs_only_and_keys_may_be_longer(num_tokens):
    query, key, value = tensors(2, num_tokens, num_tokens)
    value = value[:, :, 1:]
    retrieved = block_read(query, key, value, SlotRule(0))
    assert torch.equal(retrieved[:, 0], torch.zeros_like(retrieved[:, 0]))
    torch.testing.assert_close(retrieved, whole_read(query, key, value, SlotRule(0)), rtol=1e-12, atol=1e-12)


def test_dropped_weights_are_a_share_of_all_and_the_gradient_is_of_those_kept():
    share, num_tokens = 0.25, 2 * BLOCK_LENGTH + 3
    inputs = tensors(1, num_tokens, num_tokens)
    rule = SlotRule(1)

    def read(*inputs):
        torch.manual_seed(5)
        return block_read(*inputs, rule, share)

    assert torch.equal(read(*inputs), read(*inputs))
    assert not torch.equal(read(*inputs), block_read(*inputs, rule, share))
    # Values are the rows of a unit matrix, so that what is retrieved are the weights.
    unit = torch.eye(num_tokens, dtype=torch.float64).expand(1, HEADS, -1, -1)
    query, key, _ = inputs
    torch.manual_seed(5)
    weights = block_read(query, key, unit, rule, share).transpose(1, 2)
    full = block_read(query, key, unit, rule).transpose(1, 2)
    is_seen = full > 0
    kept = (weights > 0)[is_seen]
    assert abs(kept.double().mean() - (1 - share)) < 4 * (share * (1 - share) / kept.numel()) ** 0.5
    torch.testing.assert_close(weights[weights > 0], full[weights > 0] / (1 - share), rtol=1e-12, atol=1e-12)
    dropped = (weights > 0).double() / (1 - share)
    gradient = torch.randn(1, num_tokens, HEADS, WIDTH, dtype=torch.float64)
    ours = torch.autograd.grad(read(*inputs), inputs, gradient)
    theirs = torch.autograd.grad(whole_read(*inputs, rule, dropped), inputs, gradient)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_no_dropout_draws_no_random_number():
    inputs = tensors(1, 5, 5)
    before = torch.get_rng_state()
    block_read(*inputs, SlotRule(1)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_pass_draws_none_either():
    retrieved = block_read(*tensors(1, 5, 5), SlotRule(1), 0.5)
    before = torch.get_rng_state()
    retrieved.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_plain_is_left_to_torch():
    vectors = torch.zeros(1, 1, 2, 4)
    assert can_read_in_blocks(vectors)
    assert not can_read_in_blocks(vectors.bfloat16()) and not can_read_in_blocks(vectors.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_read_in_blocks(vectors)
    assert not torch.func.vmap(lambda row: torch.tensor(can_read_in_blocks(row)))(vectors).any()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_second_derivative_is_refused(dropout):
    """`torch.autograd.grad` would leave out a part that has none, and say nothing."""

    def derive_twice(model):
        parameters = list(model.train().parameters())
        loss = model(make_ids(2, 9), labels=make_ids(2, 9), use_cache=False).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.autograd.grad(sum(gradient.square().sum() for gradient in first), parameters)

    model = make_model(attention_dropout=dropout)
    with pytest.raises(RuntimeError, match="attn_implementation"):
        derive_twice(model)
    model.set_attn_implementation("eager")
    derive_twice(model)


@pytest.mark.parametrize("num_earlier", [0, 7])
def test_the_whole_mask_says_what_blocks_read(num_earlier):
    """Attention functions that take masks read the same; slot 0 is empty, and read by those who see no other."""
    num_queries = BLOCK_LENGTH + 3
    num_pairs = num_queries + num_earlier
    query, key, value = tensors(2, num_queries, num_pairs)
    value = torch.cat([torch.zeros_like(value[:, :, :1]), value[:, :, 1:]], dim=2)
    for rule in rules(2, num_queries, num_pairs):
        expected = block_read(query, key, value, rule)
        mask = rule.mask(num_queries, num_pairs)
        actual = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
        torch.testing.assert_close(actual.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.999995])
def test_a_share_is_dropped_however_large(share):
    """Rounded to whole levels, and divided by what is kept, so that the mean stays."""
    ones = torch.ones(1, 400, 500)
    kept = _kept(ones, share, torch.Generator().manual_seed(0))
    assert (kept == 0).double().mean() == pytest.approx(share, abs=0.01)
    assert kept[kept > 0].unique().numel() <= 1
    assert share > 0.9 or kept.double().mean() == pytest.approx(1, abs=0.01)


def test_a_default_device_changes_nothing():
    inputs = tensors(2, 5, 5)
    rule = SlotRule(1, torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.long))
    expected = block_read(*inputs, rule)
    with torch.device("meta"):
        assert torch.equal(block_read(*inputs, rule), expected)
        assert rule.mask(5, 5).device.type == "cpu"


def test_a_rule_is_no_container():
    """`generate` takes tuples and dictionaries apart where ids lie on another device than the model."""
    assert not isinstance(SlotRule(1), (tuple, list, dict))


@pytest.mark.parametrize("masked", [False, True])
def test_a_function_that_a_caller_registers_reads_everything(masked, monkeypatch):
    model, calls = make_model(), []

    def mine(module, *arguments, **kwargs):
        calls.append(type(module).__name__)
        return sdpa_attention_forward(module, *arguments, **kwargs)

    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 1 - masked
    expected = model(make_ids(2, 9), attention_mask=mask).logits
    AttentionInterface.register("mine", mine)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model.set_attn_implementation("mine")
    logits = model(make_ids(2, 9), attention_mask=mask).logits
    assert len(calls) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)
    model.set_attn_implementation("sdpa")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mine)
    calls.clear()
    model(make_ids(2, 9), attention_mask=mask)
    assert len(calls) == 2 * model.config.num_hidden_layers


def test_dropout_acts_at_each_token_in_training_with_or_without_a_gradient():
    model = make_model(attention_dropout=0.5, hidden_dropout=0.0).train()
    with torch.no_grad():
        cache = model(make_ids(1, 9), use_cache=True).past_key_values
        draws = [model(make_ids(1, 1), past_key_values=copy.deepcopy(cache)).logits for _ in range(2)]
    assert not torch.equal(*draws)

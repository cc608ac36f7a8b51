# SPDX-License-Identifier: Apache-2.0
"""The model for continuous observations equals its equations, read at once or in pieces through any memory."""

from typing import Any

import pytest
import torch
from conftest import checkpoint_activations
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import CONTINUOUS_VARIANTS, make_continuous
from safetensors.torch import load_file, save_file
from transformers import Cache, DynamicCache

from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    ContinuousMemoryMosaicModel,
    MemoryMosaicConfig,
    inspect_continuous_units,
    leaky_average,
    memory_from_state_dict,
    memory_state_dict,
)
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from modeling_memory_mosaic.modeling_continuous_memory_mosaic import ComplexLinear, ContinuousMemoryMosaicOutput


variants = pytest.mark.parametrize("variant", list(CONTINUOUS_VARIANTS))


def make_model(variant: str = "three heads", **config: Any) -> ContinuousMemoryMosaicModel:
    return make_continuous(**CONTINUOUS_VARIANTS[variant] | config)


def observe(model: ContinuousMemoryMosaicModel, *shape: int, seed: int = 0) -> torch.Tensor:
    """Draw random observations `(*shape, C)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, model.config.observation_size, generator=generator, dtype=torch.float64)


def read(
    model: ContinuousMemoryMosaicModel, observations: torch.Tensor, memory: Cache | None = None
) -> tuple[torch.Tensor, Cache]:
    """Return the predictions of a model that reads on behind a memory, and its memory."""
    outputs = model(observations, past_key_values=memory, use_cache=True)
    return outputs.predictions, getattr(outputs, MEMORY_NAME)


def real_matrix(projection: torch.nn.Module) -> torch.Tensor:
    return projection.real_matrix() if isinstance(projection, ComplexLinear) else projection.weight


def by_the_equations(model: ContinuousMemoryMosaicModel, observations: torch.Tensor) -> torch.Tensor:
    """Compute predictions `(B, T, C)` from the parameters, by loops over rows, heads and times."""
    config, memory = model.config, model.memory
    key_matrix, value_matrix, output_matrix = map(real_matrix, (memory.k_proj, memory.v_proj, memory.o_proj))
    rows = []
    for row in observations:
        keys, values = row @ key_matrix.T, row @ value_matrix.T
        predictions = [torch.zeros(config.observation_size, dtype=row.dtype)]
        for t in range(1, len(row)):
            retrieved = []
            for head in range(config.num_attention_heads):
                part = slice(head * config.head_dim, (head + 1) * config.head_dim)
                head_keys = keys[:, part]
                if config.key_leak:
                    decay = torch.exp(-(10 * memory.key_leak[head]).abs())
                    head_keys = torch.stack(
                        [sum(head_keys[i] * decay ** (n - i) for i in range(n + 1)) for n in range(len(row))]
                    )
                beta = torch.exp(10 * memory.log_beta[head]) if config.learnable_beta else config.beta
                weights = torch.stack([beta * head_keys[t] @ head_keys[i] for i in range(t)]).softmax(0)
                retrieved.append(sum(weights[i] * values[i + 1, part] for i in range(t)))
            predictions.append(output_matrix @ torch.cat(retrieved))
        rows.append(torch.stack(predictions))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@variants
def test_predictions_and_gradients_are_those_of_the_equations(variant, implementation):
    model = make_model(variant)
    model.set_attn_implementation(implementation)
    observations = observe(model, 2, 9).requires_grad_()
    inputs = [observations, *model.parameters()]
    predictions, expected = model(observations).predictions, by_the_equations(model, observations)
    torch.testing.assert_close(predictions, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(predictions)
    gradients = [torch.autograd.grad((output * direction).sum(), inputs) for output in (predictions, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@variants
def test_a_prediction_does_not_depend_on_what_comes_later(variant):
    model = make_model(variant)
    observations = observe(model, 1, 20)
    changed = observations.clone()
    changed[:, 12] += 1
    before, after = (model(x).predictions for x in (observations, changed))
    assert torch.equal(before[:, 0], torch.zeros_like(before[:, 0]))
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=1e-14)
    assert ((before - after).abs().amax(-1)[:, 12:] > 1e-6).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@variants
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5, unique=True))
def test_any_chunking_equals_one_pass(variant, implementation, cuts):
    model = make_model(variant)
    model.set_attn_implementation(implementation)
    observations = observe(model, 2, 40)
    memory, chunks = None, []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        chunk, memory = read(model, observations[:, start:end], memory)
        chunks.append(chunk)
        assert memory.get_seq_length() == end
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(observations).predictions, rtol=0, atol=1e-12)


@variants
def test_rows_of_a_memory_can_be_moved_and_its_end_taken_back(variant):
    model = make_model(variant)
    observations, more = observe(model, 3, 12), observe(model, 3, 5, seed=1)
    expected = model(torch.cat([observations, more], dim=1)).predictions[:, 12:]
    order = torch.tensor([2, 0, 1])
    memory = read(model, observations)[1]
    memory.activate_past_recording()
    read(model, observe(model, 3, 4, seed=2), memory)
    memory.crop(-4)
    memory.reorder_cache(order)
    torch.testing.assert_close(read(model, more[order], memory)[0], expected[order], rtol=0, atol=1e-12)


def test_a_saved_memory_reads_on(tmp_path):
    model = make_model("leak")
    observations = observe(model, 2, 17)
    save_file(memory_state_dict(read(model, observations[:, :11])[1]), tmp_path / "memory.safetensors")
    tensors = load_file(tmp_path / "memory.safetensors")
    assert set(tensors) == {"layers.0.keys", "layers.0.values", "layers.0.contextual_sum", "fingerprint"}
    memory = memory_from_state_dict(model.config, tensors)
    expected = model(observations).predictions[:, 11:]
    torch.testing.assert_close(read(model, observations[:, 11:], memory)[0], expected, rtol=0, atol=1e-12)
    del tensors["layers.0.contextual_sum"]
    with pytest.raises(ValueError, match="missing .*contextual_sum"):
        memory_from_state_dict(model.config, tensors)


@variants
def test_continuing_equals_reading_everything_again(variant):
    model = make_model(variant)
    observations = observe(model, 2, 10)
    series = observations
    for _ in range(6):
        series = torch.cat([series, model(series).predictions[:, -1:]], dim=1)
    torch.testing.assert_close(model.predict(observations, 6), series[:, 10:], rtol=0, atol=1e-12)
    memory = read(model, observations[:, :4])[1]
    torch.testing.assert_close(model.predict(observations[:, 4:], 6, memory), series[:, 10:], rtol=0, atol=1e-12)
    assert memory.get_seq_length() == 15


def test_weights_name_the_observations_whose_pairs_they_read():
    model = make_model()
    model.set_attn_implementation("eager")
    observations = observe(model, 2, 8)
    outputs = model(observations, output_attentions=True, output_hidden_states=True)
    (weights,), states = outputs.attentions, outputs.hidden_states
    assert torch.equal(states[0], observations) and torch.equal(states[1], outputs.last_hidden_state)
    assert weights.shape == (2, 3, 8, 8)
    assert torch.equal(weights.triu(), torch.zeros_like(weights))
    torch.testing.assert_close(weights.sum(-1)[..., 1:], torch.ones_like(weights[..., 1:, 0]))
    values = model.memory.keys_and_values(observations)[1]
    retrieved = (weights[..., :-1] @ values[:, :, 1:]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(retrieved, model(observations).last_hidden_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_loss_clips_errors_before_squaring(clip):
    model = make_model(loss_clip=clip)
    observations = observe(model, 2, 9)
    outputs = model(observations, labels=observations)
    errors = (outputs.predictions[:, :-1] - observations[:, 1:]).detach()
    assert errors.abs().max() > 0.5 > errors.abs().min()
    expected = [e**2 if clip is None else min(abs(e), clip) ** 2 for e in errors.flatten().tolist()]
    assert outputs.loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_complex_weights_commute_with_a_turn_of_all_phases_and_real_ones_do_not():
    turn = torch.kron(torch.eye(3), torch.tensor([[0.6, -0.8], [0.8, 0.6]])).double()
    for is_complex in (True, False):
        model = make_model(complex_weights=is_complex)
        observations = observe(model, 2, 9)
        turned, expected = model(observations @ turn.T).predictions, model(observations).predictions @ turn.T
        assert torch.allclose(turned, expected, atol=1e-12) is is_complex


def test_a_complex_map_is_the_product_of_complex_numbers():
    torch.manual_seed(0)
    layer = ComplexLinear(6, 4)
    torch.nn.init.normal_(layer.weight)
    vectors = torch.randn(5, 6)
    product = torch.view_as_complex(vectors.unflatten(-1, (3, 2))) @ torch.complex(*layer.weight).T
    torch.testing.assert_close(layer(vectors), torch.view_as_real(product).flatten(-2))
    assert sum(parameter.numel() for parameter in layer.parameters()) == 4 * 6 // 2


def test_initial_weights_have_the_variance_of_a_projected_real_matrix():
    torch.manual_seed(0)
    sizes = {"observation_size": 300, "num_attention_heads": 3}
    complex_model, real_model = (
        ContinuousMemoryMosaicModel(ContinuousMemoryMosaicConfig(**sizes, complex_weights=kind))
        for kind in (True, False)
    )
    real = torch.empty(300, 300).uniform_(-(300**-0.5), 300**-0.5)
    assert real_model.memory.k_proj.weight.std().item() == pytest.approx(real.std().item(), rel=0.02)
    a, b = real[0::2, 0::2], real[1::2, 1::2]
    assert complex_model.memory.k_proj.weight.std().item() == pytest.approx(((a + b) / 2).std().item(), rel=0.02)


@variants
def test_units_add_up_to_the_prediction(variant):
    model = make_model(variant)
    observations = observe(model, 2, 12)
    units, outputs = inspect_continuous_units(model, observations), model(observations)
    torch.testing.assert_close(units.contributions.sum(1), outputs.predictions, rtol=0, atol=1e-12)
    torch.testing.assert_close(units.share.sum(1)[:, 1:], torch.ones(2, 11).double())
    assert not units.share[..., 0].any() and not units.effective_pairs[..., 0].any()
    retrieved = outputs.last_hidden_state.unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
    values = model.memory.keys_and_values(observations)[1][:, :, 1:]
    error = (retrieved[:, :, :-1] - values).norm(dim=-1) ** 2 / values.norm(dim=-1) ** 2
    torch.testing.assert_close(units.error, error)
    model.set_attn_implementation("eager")
    weights = model(observations, output_attentions=True).attentions[0]
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    torch.testing.assert_close(units.entropy, entropy)
    torch.testing.assert_close(units.effective_pairs[..., 1:], entropy.exp()[..., 1:])


def test_a_leak_is_the_language_models():
    model = make_model("leak")
    observations = observe(model, 2, 9)
    plain = model.memory.split_heads(model.memory.k_proj(observations))
    expected, _ = leaky_average(plain, (10 * model.memory.key_leak).abs())
    torch.testing.assert_close(model.memory.keys_and_values(observations)[0], expected, rtol=0, atol=0)
    assert (expected - plain).abs().max() > 0.1


def test_the_memory_is_returned_when_asked_for():
    model = make_model()
    outputs = model(observe(model, 1, 3))
    assert isinstance(outputs, ContinuousMemoryMosaicOutput) and getattr(outputs, MEMORY_NAME) is None
    assert isinstance(read(model, observe(model, 1, 3))[1], DynamicCache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[..., :4], r"must be \(batch, time, 6\)"),
        (lambda x: x[:, :0], r"must be \(batch, time, 6\)"),
        (lambda x: x[0], r"must be \(batch, time, 6\)"),
        (lambda x: x.long(), "floating point"),
        (lambda x: x / 0, "observations must be finite"),
    ],
)
def test_bad_observations_are_refused(change, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(change(observe(model, 2, 5)))


def test_bad_requests_are_refused():
    model = make_model()
    observations = observe(model, 2, 5)
    for call, message in (
        (lambda: model(observations, labels=observations[:, 1:]), "labels have shape"),
        (lambda: model(observations[:, :1], labels=observations[:, :1]), "at least two"),
        (lambda: model(observations, labels=observations * torch.nan), "labels must be finite"),
        (lambda: model(observations, past_key_values=DynamicCache()), "was not made for this model"),
        (lambda: model(observations[:1], past_key_values=read(model, observations)[1]), "holds 2 rows, but 1"),
        (lambda: model.predict(observations, 0), "num_steps=0 must be positive"),
        (lambda: inspect_continuous_units(model, observations[:, :1]), "at least two"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model(observations, output_attentions=True).attentions == ()  # sdpa computes none, and warns of it
    tokens = MemoryMosaicConfig(hidden_size=6, num_attention_heads=3, num_hidden_layers=1, vocab_size=5)
    with pytest.raises(ValueError, match="was not made for this model"):
        model(observations, past_key_values=DynamicCache(config=tokens))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda model, x: model(x, attention_mask=torch.ones(2, 5)),
            ValueError,
            "no padding: pass rows of one length",
        ),
        (
            lambda model, x: model(x, position_ids=torch.arange(5)[None] % 3),
            ValueError,
            "position_ids is not supported",
        ),
        (lambda model, x: model(x, seq_idx=torch.zeros(2, 5)), ValueError, "give each series its own row"),
        (lambda model, x: model(x, cu_seq_lens_q=torch.tensor([0, 5])), ValueError, "give each series its own row"),
        (lambda model, x: model(x, document_ids=torch.zeros(2, 5)), ValueError, "give each series its own row"),
        (lambda model, x: model.resize_token_embeddings(9), NotImplementedError, "it has no table of tokens"),
        (lambda model, x: checkpoint_activations(model, False), ValueError, "does not support"),
        (lambda model, x: model.set_attn_implementation("flex_attention"), ValueError, "does not support"),
        (lambda model, x: model.set_attn_implementation("flash_attention_2"), ValueError, "does not support"),
    ],
)
def test_options_of_token_models_are_refused(call, error, message):
    """The model refuses options that it would otherwise ignore: padding, documents, and tools of token models."""
    model = make_model()
    with pytest.raises(error, match=message):
        call(model, observe(model, 2, 5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 4}, "not a multiple of num_attention_heads=4"),
        ({"observation_size": 9}, "observation_size=9 is odd"),
        ({"num_attention_heads": 2}, "head_dim=3 is odd"),
        ({"beta": 0}, "beta=0 must be positive"),
        ({"loss_clip": 0}, "loss_clip=0 must be positive"),
        ({"attention_dropout": 1.0}, "must lie in"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(Exception, match=message):
        ContinuousMemoryMosaicConfig(**settings)

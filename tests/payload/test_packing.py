# SPDX-License-Identifier: Apache-2.0
"""Documents packed in one row give the logits and gradients of documents in rows of their own."""

import pytest
import torch
from helpers.documents import LENGTHS, make_documents, pack
from helpers.kinds import V2_KINDS, make_mosaic
from helpers.models import BANDWIDTHS, NARROWING, by_bandwidth, checkpoint_activations, make_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache


MARKS = {
    "position_ids": {},
    "position_ids from 2": {"position_ids_start": 2},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_seq_idx": True, "return_flash_attn_kwargs": True},
}


CASES = [(implementation, marks) for implementation in ("eager", "sdpa") for marks in MARKS]


# FlexAttention compiles C++ on its first call.
FLEX = pytest.param("flex_attention", "position_ids", marks=pytest.mark.slow)


both_bandwidths = pytest.mark.parametrize(
    "bandwidth", [{}, NARROWING, *V2_KINDS], ids=["fixed", "narrowing", "v2", "v2 otherwise"]
)


@pytest.mark.parametrize(("implementation", "marks"), [*CASES, FLEX])
@both_bandwidths
def test_packed_equals_separate(marks, implementation, bandwidth):
    model = make_mosaic(bandwidth).requires_grad_(False)  # on a CPU, FlexAttention has no backward
    if implementation == "flex_attention" and bandwidth in V2_KINDS:
        with pytest.raises(ValueError, match="does not support `flex_attention`|does not support an attention"):
            model.set_attn_implementation(implementation)
        return
    model.set_attn_implementation(implementation)
    documents = make_documents()
    with torch.no_grad():
        packed = model(**pack(documents, **MARKS[marks])).logits[0]
        alone = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert not torch.allclose(packed, model(torch.cat(documents)[None]).logits[0], atol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@both_bandwidths
def test_packed_gradients_equal_separate_ones(implementation, bandwidth):
    model = make_mosaic(bandwidth, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    documents = make_documents()
    batch = pack(documents)
    num_labels = (batch["labels"] != -100).sum()

    model(**batch, num_items_in_batch=num_labels).loss.backward()
    packed = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for document in documents:
        if len(document) > 1:  # one token alone has nothing to predict
            model(document[None], labels=document[None], num_items_in_batch=num_labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=3),
    bandwidth=st.sampled_from([*BANDWIDTHS, *V2_KINDS]),
    data=st.data(),
)
def test_packed_rows_with_padding_anywhere_equal_separate(rows, bandwidth, data):
    """Several packed rows in a batch, with padding before, between, after and inside documents."""
    model = make_mosaic(bandwidth, dtype=torch.float64)
    length = max(map(sum, rows)) + data.draw(st.integers(0, 6))
    ids, positions, mask = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    documents = {}
    for index, lengths in enumerate(rows):
        places = sorted(data.draw(st.permutations(range(length)))[: sum(lengths)])
        numbers = torch.cat([torch.arange(length) for length in lengths])
        ids[index, places] = make_ids(len(places), seed=index)
        positions[index, places], mask[index, places] = numbers, 1
        for number, part in enumerate(torch.tensor(places).split(lengths)):
            documents[index, number] = part
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        for (index, _), places in documents.items():
            alone = model(ids[index, places][None]).logits[0]
            torch.testing.assert_close(logits[index, places], alone, rtol=0, atol=1e-9)


@both_bandwidths
def test_the_first_token_of_each_document_retrieves_exactly_zero(bandwidth):
    model = make_mosaic(bandwidth)
    model.set_attn_implementation("eager")
    documents = make_documents()
    attentions = model(**pack(documents), output_attentions=True, use_cache=False).attentions
    starts = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    for weights in attentions:
        assert torch.equal(weights[:, :, starts], torch.zeros_like(weights[:, :, starts]))
        assert not weights[..., document[:, None] != document[None, :]].any()
        others = [t for t in range(len(document)) if t not in starts]
        sums = weights[:, :, others].sum(-1)
        # Long-term heads of v2 also read nothing near the beginning of a document.
        torch.testing.assert_close(sums, sums.round())
        assert bandwidth in V2_KINDS or bool(sums.round().all())


@by_bandwidth
def test_one_document_is_read_as_any_text(model):
    ids = make_ids(2, 7)
    expected = model(ids)
    for marks in ({"position_ids": torch.arange(7)[None]}, {"seq_idx": torch.ones_like(ids)}):
        outputs = model(ids, **marks)
        assert torch.equal(outputs.logits, expected.logits) and outputs.past_key_values.get_seq_length() == 7


@by_bandwidth
def test_packed_documents_leave_no_memory(model):
    batch = pack(make_documents())
    assert model(**batch, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="behind the tokens in the memory, which holds one text"):
        model(**batch, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_a_document_that_begins_behind_another_is_refused(model, num_tokens):
    cache = model(make_ids(1, 5), use_cache=True).past_key_values
    ids = make_ids(1, num_tokens)
    with pytest.raises(ValueError, match="behind the tokens in the memory"):
        model(ids, past_key_values=cache, position_ids=torch.arange(num_tokens)[None])
    model(ids, past_key_values=cache, position_ids=5 + torch.arange(num_tokens)[None])
    assert cache.get_seq_length() == 5 + num_tokens


@pytest.mark.parametrize("marks", ["position_ids", "seq_idx"])
def test_marks_of_another_length_are_refused(model, marks):
    with pytest.raises(ValueError, match=rf"{marks} has shape \(2, 3\)"):
        model(make_ids(2, 4), **{marks: torch.zeros(2, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 12], [1, 3, 8], [0, 5, 3, 8], [3, 5, 8], [[0, 3, 8]]],
    ids=["beyond the end", "not from 0", "falling", "lengths", "two axes"],
)
def test_offsets_of_another_form_are_refused(model, offsets):
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(make_ids(1, 8), cu_seq_lens_q=torch.tensor(offsets))
    with pytest.raises(ValueError, match="without cu_seq_lens_q"):
        model(make_ids(1, 8), cu_seq_lens_k=torch.tensor(offsets))


@pytest.mark.parametrize("name", ["document_ids", "segment_ids", "cu_seqlens"])
def test_marks_of_other_libraries_are_not_passed_over(model, name):
    with pytest.raises(ValueError, match=f"{name} is not known"):
        model(make_ids(1, 4), **{name: torch.tensor([[0, 0, 1, 1]])})


@by_bandwidth
def test_marks_at_padding_mean_nothing(model):
    ids, mask = make_ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits[:, 2:]
    for name, marks in {"seq_idx": [9, 9, 0, 0, 0, 0], "position_ids": [5, 5, -1, 0, 1, 2]}.items():
        outputs = model(ids, attention_mask=mask, **{name: torch.tensor([marks])})
        assert torch.equal(outputs.logits[:, 2:], expected) and outputs.past_key_values.get_seq_length() == 6


@pytest.mark.parametrize("use_reentrant", [False, True])
@both_bandwidths
def test_packed_gradients_under_checkpointing(use_reentrant, bandwidth):
    batch = pack(make_documents())
    gradients = {}
    for checkpointing in (False, True):
        model = make_mosaic(bandwidth, dtype=torch.float64, attention_dropout=0.0, hidden_dropout=0.0).train()
        if checkpointing:
            checkpoint_activations(model, use_reentrant)
            model.enable_input_require_grads()
        model(**batch).loss.backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{}, "mosaic v2"], ids=["v1", "v2"])
def test_compiled_documents_behind_a_memory_are_refused(variant):
    """A graph that cannot branch on values holds an assertion, or refuses the call for what it might mean."""
    model = make_mosaic(variant)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = pack(make_documents(), return_seq_idx=True)
    del batch["labels"]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="A document begins behind the tokens in the memory"):
            compiled(**batch, past_key_values=DynamicCache(config=model.config))
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="pass `use_cache=False`"):
            compiled(**batch, use_cache=True)
        cache = DynamicCache(config=model.config)
        ids = make_ids(1, 9)
        pieces = [
            compiled(ids[:, a:b], position_ids=torch.arange(a, b)[None], past_key_values=cache).logits
            for a, b in ((0, 5), (5, 9))
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=1e-5)


@both_bandwidths
def test_compiled_packing_is_exact_and_one_graph(bandwidth):
    """A compiled graph cannot know whether positions start again, so it follows all positions."""
    model = make_mosaic(bandwidth)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = pack(make_documents())
    with torch.no_grad():
        expected = model(**batch).logits
        batch["use_cache"] = False
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-5)
        plain = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
        torch.testing.assert_close(compiled(**plain).logits, model(**plain).logits, rtol=0, atol=1e-5)

# SPDX-License-Identifier: Apache-2.0
"""Random shapes, masks, dtypes, documents and splits get the right answer or an error."""

import functools

import pytest
import torch
from helpers.kinds import BACKBONE_KINDS, KINDS, V2_KINDS, make_mosaic
from helpers.models import BANDWIDTHS, make_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME


# Largest error of logits of order one by rounding alone, against float64 with the same weights.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float16: 0.03}
VARIANTS: list = [*BANDWIDTHS, *V2_KINDS]
MASK_DTYPES = [torch.long, torch.bool, torch.int32, torch.float32, torch.uint8]


@functools.cache
def cached_model(implementation="sdpa", dtype=torch.float32, bandwidth=0):
    model = make_mosaic(VARIANTS[bandwidth], dtype=dtype)
    model.set_attn_implementation(implementation)
    return model


@functools.cache
def exact_model(dtype, bandwidth):
    """Return the model with weights rounded to this dtype, computing in float64."""
    return make_mosaic(VARIANTS[bandwidth], dtype=dtype).double()


@settings(max_examples=120, deadline=None)
@given(
    implementation=st.sampled_from(["sdpa", "eager"]),
    dtype=st.sampled_from(list(TOLERANCES)),
    bandwidth=st.sampled_from(range(len(VARIANTS))),
    mask_dtype=st.sampled_from(MASK_DTYPES),
    memory=st.sampled_from([None, "dynamic", "static"]),
    embedded=st.booleans(),
    kept=st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=3),
    cuts=st.sets(st.integers(1, 23)),
)
@torch.no_grad()
def test_every_row_is_read_as_if_alone(implementation, dtype, bandwidth, mask_dtype, memory, embedded, kept, cuts):
    """Rows with padding anywhere, in pieces of any lengths, equal the bare rows in one pass in float64."""
    length = max(map(len, kept))
    mask = torch.tensor([row + [False] * (length - len(row)) for row in kept])
    ids = make_ids(*mask.shape)
    model = cached_model(implementation, dtype, bandwidth)
    cache = {
        None: lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(model.config, max_cache_len=length + 3),
    }[memory]()
    ends = [length] if memory is None else sorted({cut for cut in cuts if cut < length} | {length})

    pieces = []
    for start, end in zip([0, *ends], ends, strict=False):
        inputs = {"input_ids": ids[:, start:end]}
        if embedded:
            inputs = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        inputs |= {"attention_mask": mask[:, :end].to(mask_dtype), "past_key_values": cache}
        pieces.append(model(**inputs, use_cache=memory is not None).logits)
    logits = torch.cat(pieces, dim=1).to(torch.float64)
    assert torch.isfinite(logits).all()
    for row, row_mask, row_ids in zip(logits, mask, ids, strict=True):
        if row_mask.any():
            alone = exact_model(dtype, bandwidth)(row_ids[row_mask][None]).logits[0]
            assert (row[row_mask] - alone).abs().max() < TOLERANCES[dtype]


@functools.cache
def cached_kind(name, implementation, dtype):
    model = KINDS[name].make(dtype=dtype)
    model.set_attn_implementation(implementation)
    return model


@functools.cache
def exact_kind(name, dtype):
    return KINDS[name].make(dtype=dtype).double()


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from([*BACKBONE_KINDS, "classifier"]),
    implementation=st.sampled_from(["sdpa", "eager"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mask_dtype=st.sampled_from(MASK_DTYPES),
    kept=st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=3),
    cuts=st.none() | st.sets(st.integers(1, 23)),
)
@torch.no_grad()
def test_every_text_is_read_as_if_alone(name, implementation, dtype, mask_dtype, kept, cuts):
    """The same for memory models on any backbone, which read on at `cuts`, and for classifiers."""
    kind, length = KINDS[name], max(map(len, kept))
    mask = torch.tensor([row + [not any(row)] + [False] * (length - len(row)) for row in kept])  # no row is empty
    ids, width = make_ids(*mask.shape), mask.shape[1]
    model = cached_kind(name, implementation, dtype)
    all_begun = 1 + int(mask.long().argmax(-1).max())
    ends = [width]
    if cuts is not None and kind.model == "memory model":
        ends = sorted({cut for cut in cuts if all_begun <= cut < width} | {width})
    cache, pieces = None, []
    for start, end in zip([0, *ends], ends, strict=False):
        inputs = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end].to(mask_dtype)}
        outputs = model(**inputs, past_key_values=cache, use_cache=len(ends) > 1)
        cache = getattr(outputs, MEMORY_NAME) if len(ends) > 1 else None
        pieces.append(outputs.logits)
    answers = torch.cat(pieces, dim=1).to(torch.float64)
    for answer, row_mask, row_ids in zip(answers, mask, ids, strict=True):
        alone = exact_kind(name, dtype)(row_ids[row_mask][None], use_cache=False).logits[0]
        answer = answer if kind.model == "classifier" else answer[row_mask]
        assert (answer - alone).abs().max() < TOLERANCES[dtype]


LENGTHS = st.integers(0, 4)


@settings(max_examples=300, deadline=None)
@given(
    ids_shape=st.lists(LENGTHS, min_size=1, max_size=3),
    mask_shape=st.none() | st.lists(LENGTHS, min_size=1, max_size=4),
    mask_values=st.sampled_from([(0, 1), (0, 1), (0, 2), (-1, 1)]),
    position_shape=st.none() | st.lists(LENGTHS, min_size=1, max_size=3),
    past_length=st.integers(0, 3),
    packed=st.booleans(),
    variant=st.sampled_from([0, len(VARIANTS) - 1]),
)
@torch.no_grad()
def test_a_misfit_is_refused(ids_shape, mask_shape, mask_values, position_shape, past_length, packed, variant):
    """Inputs of any shapes and values that fit get finite logits; all others get an error that says so."""
    model = cached_model(bandwidth=variant)
    ids = make_ids(*ids_shape)
    cache = DynamicCache(config=model.config)
    if past_length:
        model(make_ids(2, past_length), past_key_values=cache)
    inputs = {"input_ids": ids, "past_key_values": cache if past_length else None}
    if mask_shape is not None:
        low, high = mask_values
        inputs["attention_mask"] = torch.randint(low, high + 1, mask_shape)
    if position_shape is not None:
        restart = 2 if packed else 100
        inputs["position_ids"] = (past_length + torch.arange(position_shape[-1])).expand(position_shape) % restart

    batch_size, num_tokens = ids.shape if ids.ndim == 2 else (0, 0)
    fits = ids.ndim == 2 and num_tokens > 0 and batch_size > 0 and (past_length == 0 or batch_size == 2)
    if fits and mask_shape is not None:
        mask = inputs["attention_mask"]
        fits &= mask.shape == (batch_size, past_length + num_tokens) and bool(((mask == 0) | (mask == 1)).all())
    if fits and position_shape is not None:
        fits &= tuple(position_shape) in ((batch_size, num_tokens), (1, num_tokens))
    if not fits:
        with pytest.raises(ValueError, match=r"it must be|it must cover|they must be|must hold 1 at tokens"):
            model(**inputs)
        return
    try:
        outputs = model(**inputs)
    except ValueError as refusal:
        assert past_length > 0 and packed and "which holds one text" in str(refusal)
        return
    assert outputs.logits.shape == (batch_size, num_tokens, model.config.vocab_size)
    assert torch.isfinite(outputs.logits).all()

# SPDX-License-Identifier: Apache-2.0
"""Memory models: gradients of padded batches, what reaches which row, and caches that are continued and rearranged."""

import pytest
import torch
from helpers.kinds import BACKBONES, LENGTH, make_memory_model
from helpers.memory_models import READS
from helpers.models import make_ids
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from modeling_memory_mosaic import MemoryModelCache
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from modeling_memory_mosaic.store_memory_model import ROW_NAMES


def generate(model, ids, mask=None, **settings):
    mask = torch.ones_like(ids) if mask is None else mask
    set_seed(0)
    greedy = {"do_sample": False, "max_new_tokens": 13, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **greedy | settings)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", READS)
def test_each_way_of_reading_has_the_gradients_of_its_rows(kind):
    model = make_memory_model(**READS[kind])
    rows = [make_ids(length, seed=length) for length in (18, 11, 5, 2)]
    ids, mask = torch.zeros(4, 22, dtype=torch.long), torch.zeros(4, 22, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, number : number + len(row)], mask[number, number : number + len(row)] = row, 1
    num_targets = sum(len(row) - 1 for row in rows)
    loss = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=num_targets).loss
    loss.backward()
    together = gradients(model)
    model.zero_grad()
    alone = sum(model(row[None], labels=row[None], num_items_in_batch=num_targets).loss for row in rows)
    torch.testing.assert_close(alone, loss)
    alone.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(together[name], gradient, msg=name)


def test_a_memory_reaches_all_later_rows_and_no_earlier_one():
    model, memories = make_memory_model(), []
    encode_chunks = model.encoder.encode_chunks

    def kept(chunks):
        memories.append(encode_chunks(chunks).detach().requires_grad_())
        return memories[-1]

    model.encoder.encode_chunks = kept
    logits = model(make_ids(1, 18), use_cache=False).logits[0]
    for place in range(18):
        gradient = torch.autograd.grad(logits[place].sum(), memories[0], retain_graph=True)[0]
        reached = gradient.flatten(1).abs().amax(-1) > 0
        assert reached.tolist() == [number < (place + 1) // LENGTH for number in range(3)]


@pytest.mark.parametrize("padding", [0, 3, 6, 12])
def test_a_prompt_is_decoded_in_one_row_padded_or_not(monkeypatch, padding):
    model, widths = make_memory_model(), []
    forward = model.decoder.forward

    def counted(inputs_embeds, **kwargs):
        widths.append(tuple(inputs_embeds.shape[:2]))
        return forward(inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(model.decoder, "forward", counted)
    mask = torch.ones(1, 12 + padding, dtype=torch.long)
    mask[:, :padding] = 0
    generate(model, make_ids(1, 12 + padding), mask, max_new_tokens=1)
    assert widths == [(1, 2 + 1 + 2)]  # two memories, the task slot, and two tokens


@pytest.mark.parametrize("way", [{}, {"num_beams": 3}], ids=str)
def test_encoded_texts_of_different_length_are_continued_together(way):
    model = make_memory_model()
    texts = [make_ids(length, seed=length) for length in (3, 10, 17)]
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    memories, rest = model.encode(ids, mask)
    assert memories["memory_mask"].sum(-1).tolist() == [0, 1, 3]
    together = generate(model, rest["input_ids"], rest["attention_mask"], **memories, **way)
    for row, text in enumerate(texts):
        alone = generate(model, text[None], **way)[0, len(text) :]
        assert torch.equal(together[row, rest["input_ids"].shape[1] :], alone)


def test_rows_of_a_cache_are_repeated_and_chosen():
    model, cache = make_memory_model(), MemoryModelCache()
    ids, more = make_ids(2, 8), make_ids(4, 9, seed=1)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    logits = model(more[:, :3], past_key_values=cache).logits
    rows = torch.tensor([3, 0])
    cache.batch_select_indices(rows)
    logits = torch.cat([logits[rows], model(more[rows, 3:], past_key_values=cache).logits], dim=1)
    whole = torch.cat([ids.repeat_interleave(2, dim=0), more], dim=1)[rows]
    torch.testing.assert_close(logits, model(whole, use_cache=False).logits[:, 8:])


def test_a_cache_that_is_reset_reads_anew():
    model, cache = make_memory_model(), MemoryModelCache()
    first = model(make_ids(2, 8), past_key_values=cache).logits
    cache.reset()
    assert not cache.is_initialized and cache.num_row_slots() == 0
    assert torch.equal(model(make_ids(2, 8), past_key_values=cache).logits, first)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_reads_without_labels(objective):
    ids, expected = make_ids(2, 12), make_memory_model()(make_ids(2, 12), use_cache=False).logits
    model = make_memory_model(**{f"{name}_weight": float(name == objective) for name in OBJECTIVES})
    for mode in (model.train, model.eval):
        outputs = mode()(ids, use_cache=False)
        assert outputs.loss is None and torch.equal(outputs.logits, expected)
    assert model(ids, labels=ids).logits is not None
    assert (model.train()(ids, labels=ids).logits is None) == (objective != "causal")


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"labels": torch.zeros(1, 13).long()}, r"labels have shape \(1, 13\): it must be that of the ids, \(1, 12\)"),
        ({"memory_mask": torch.ones(1, 2)}, "pass memories too"),
        ({"memories": torch.zeros(2, 2, 1, 24)}, "memories are of 2 rows, but the text has 1"),
        ({"memories": torch.zeros(1, 2, 1, 24), "memory_mask": torch.ones(1, 3)}, r"must be \(1, 2\)"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, r"shape \(1, 1, 12, 12\)"),
        ({"position_ids": torch.arange(12)[None] % 6}, "give each document a row of its own"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, "give each document a row of its own"),
        ({"document_ids": torch.arange(12)[None] // 6}, "give each document a row of its own"),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_what_does_not_fit_the_text_is_refused(inputs, message, use_cache):
    with pytest.raises(ValueError, match=message):
        make_memory_model()(make_ids(1, 12), use_cache=use_cache, **inputs)


def test_what_no_memory_can_hold_is_not_to_be_recalled():
    with pytest.raises(StrictDataclassError, match="max_memories=0 leaves nothing to reconstruct from"):
        make_memory_model(max_memories=0, copy_weight=1.0)
    model = make_memory_model(max_memories=1, copy_weight=1.0)
    assert model(make_ids(1, 19), labels=make_ids(1, 19)).copy_loss.isfinite()
    with pytest.raises(
        ValueError, match="copy of 2 chunks reads the memory of so many chunks ago, but max_memories=1"
    ):
        model(make_ids(1, 20), labels=make_ids(1, 20))


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
@pytest.mark.parametrize("kind", READS)
def test_rows_of_a_data_set_are_the_memories_that_were_read(kind, quantization, tmp_path):
    """Of texts of different lengths; the rows are shuffled and went through a file."""
    data_set = pytest.importorskip("datasets").Dataset
    model = make_memory_model(dtype=torch.float32, **READS[kind] | {"memory_quantization": quantization})
    ids, mask = make_ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :6] = mask[2, 12:] = 0
    memories, rest = model.encode(ids, attention_mask=mask)
    memories["memories"] = memories["memories"] * memories["memory_mask"][..., None, None]  # nothing is read of others
    names, counts = ["one", "other", "third"], memories["memory_mask"].sum(-1).tolist()
    texts = [[f"{name} {chunk}" for chunk in range(count)] for name, count in zip(names, counts, strict=True)]
    rows = data_set.from_list(model.memories_to_rows(**memories, sources=names, texts=texts))
    assert len(set(counts)) > 1 and len(rows) == sum(counts) and set(rows.column_names) == set(ROW_NAMES)
    assert set(rows["encoder"]) == {model.encoder.fingerprint().hex()}
    rows.to_parquet(tmp_path / "memories.parquet")
    again = data_set.from_parquet(str(tmp_path / "memories.parquet"), cache_dir=str(tmp_path))
    read_again = model.memories_from_rows(again)
    assert all(torch.equal(read_again[name], tensor.to(read_again[name].dtype)) for name, tensor in memories.items())
    assert torch.equal(
        model.generate(**rest, **memories, max_new_tokens=6), model.generate(**rest, **read_again, max_new_tokens=6)
    )
    # In another order of chunks it is the same text; in another order of sources, and without some chunks, another.
    turned = model.memories_from_rows(sorted(again, key=lambda row: (names.index(row["source"]), -row["chunk"])))
    assert all(torch.equal(turned[name], tensor) for name, tensor in read_again.items())
    one = model.memories_from_rows(row for row in again if row["source"] == "other" and row["chunk"] > 0)
    count = counts[1] - 1
    assert one["memories"].shape[:2] == (1, count) and torch.equal(
        one["memories"][0], memories["memories"][1, -count:]
    )


@pytest.mark.parametrize("backbones", BACKBONES)
def test_rows_of_another_encoder_or_none_are_refused(backbones):
    encoder, decoder = BACKBONES[backbones]
    model = make_memory_model(encoder=encoder, decoder=decoder)
    memories, _ = model.encode(make_ids(2, 12))
    rows = model.memories_to_rows(**memories, sources=["a", "b"])
    assert all(
        torch.equal(t, memories[n].to(t.dtype)) for n, t in model.memories_from_rows(rows).items() if n != "memories"
    )
    torch.testing.assert_close(model.memories_from_rows(rows)["memories"], memories["memories"], rtol=1e-6, atol=1e-6)
    other = make_memory_model(seed=1, encoder=encoder, decoder=decoder)
    with pytest.raises(ValueError, match="memories of another encoder than this model's"):
        other.memories_from_rows(rows)
    with pytest.raises(ValueError, match="These rows are of 2 encoders"):
        model.memories_from_rows([rows[0], rows[1] | {"encoder": "00"}])
    with pytest.raises(ValueError, match="A chunk of a source occurs twice"):
        model.memories_from_rows([*rows, rows[0]])
    with pytest.raises(ValueError, match="There are no rows"):
        model.memories_from_rows([])
    with pytest.raises(ValueError, match=r"columns \['encoder'\] are missing"):
        model.memories_from_rows([{name: value for name, value in rows[0].items() if name != "encoder"}])
    with pytest.raises(ValueError, match="no numbers of one shape"):
        model.memories_from_rows([rows[0], rows[1] | {"vectors": [[1.0]]}])
    with pytest.raises(ValueError, match="not finite"):
        model.memories_from_rows([rows[0] | {"vectors": [[float("nan")] * len(rows[0]["vectors"][0])]}])
    with pytest.raises(ValueError, match="give each of the 2 texts a name of its own"):
        model.memories_to_rows(**memories, sources=["a", "a"])
    with pytest.raises(ValueError, match=r"texts have \[1, 1\] chunks, but there are"):
        model.memories_to_rows(**memories, sources=["a", "b"], texts=[["x"], ["y"]])


@pytest.mark.parametrize("quantization", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_stored_memories_are_the_very_ones_that_were_used(quantization, dtype):
    model = make_memory_model(dtype=dtype, memory_quantization=quantization, num_memory_embeddings=2)
    memories, _ = model.encode(make_ids(50, 24))
    read = model.memories_from_state_dict(model.memories_state_dict(**memories))
    assert read["memories"].dtype == dtype
    assert all(torch.equal(read[name], tensor) for name, tensor in memories.items())

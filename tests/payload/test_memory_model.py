# SPDX-License-Identifier: Apache-2.0
"""Memory models: each row sees the memories before it and its own tokens, and nothing else, in any way of reading."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.kinds import ALL_BACKBONES, BACKBONES, GPT2, LENGTH, LLAMA, MOSAIC, VOCAB_SIZE, make_memory_model
from helpers.memory_models import READS, all_weights
from helpers.models import checkpoint_activations, make_ids
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from modeling_memory_mosaic import MemoryModelCache, MemoryModelConfig, MemoryMosaicConfig
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from modeling_memory_mosaic.rounding_memory_mosaic import quantize_vectors
from modeling_memory_mosaic.store_memory_model import fake_quantize


@pytest.fixture(params=[*READS, *(name for name in ALL_BACKBONES if name != "mosaic")])
def model(request):
    encoder, decoder = ALL_BACKBONES.get(request.param, BACKBONES["mosaic"])
    return make_memory_model(encoder=encoder, decoder=decoder, **READS.get(request.param, {}))


def read_by_attention(reader, memories, token, place):
    """What a token `(C,)` at a place of its row reads of memories `(M, K, D)`, head by head and window by window."""
    config, read = reader.config, reader.cross_read
    query = read.q_proj(F.rms_norm(token, token.shape) + read.place_embeddings[place])
    keys, values = [torch.zeros_like(query)], [torch.zeros_like(query)]
    for ago, memory in enumerate(reversed(list(memories)), start=1):
        angles = [ago / 10_000 ** (wave / 16) for wave in range(16)]
        waves = torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles], dtype=token.dtype)
        for window in range(config.slots_per_memory):
            start = window * memory.numel() // config.slots_per_memory
            numbers = memory.flatten().roll(-start)[: config.unroll_width]
            numbers = F.rms_norm(numbers, numbers.shape)
            keys.append(read.k_proj(numbers) + read.distance_proj(waves) + read.window_embeddings[window])
            values.append(read.v_proj(numbers))
    heads = []
    for part in range(read.num_heads):
        within = slice(part * len(query) // read.num_heads, (part + 1) * len(query) // read.num_heads)
        scores = torch.stack([key[within] @ query[within] for key in keys]) / len(query[within]) ** 0.5
        heads.append(scores.softmax(0) @ torch.stack([value[within] for value in values]))
    return read.o_proj(torch.cat(heads))


def row_alone(model, memories, slot, tokens):
    """Logits of one row, made slot by slot from memories `(M, K, D)` and embeddings of tokens `(T, C)`."""
    config, reader = model.config, model.reader
    if config.max_memories is not None:
        memories = memories[len(memories) - min(len(memories), config.max_memories) :]
    columns = []
    for memory in memories:
        numbers = memory.flatten()
        if config.memory_read == "unrolled_prefix":
            for place in range(config.slots_per_memory):
                start = place * len(numbers) // config.slots_per_memory
                columns.append(reader.prefix_proj(numbers.roll(-start)[: config.unroll_width]))
        elif config.memory_read != "cross_attention":
            columns.extend(reader.prefix_proj(vector) for vector in memory)
    for place, token in enumerate([reader.slot_embeddings[slot], *tokens]):
        column = token
        if config.decoder_chunk_positions:
            column = column + reader.chunk_positions[place]
        if config.memory_read in ("unroll_add", "gated_add"):
            for back, (memory, proj) in enumerate(zip(reversed(list(memories)), reader.unroll_projs, strict=False)):
                start = place * memory.numel() // config.chunk_length
                added = proj(memory.flatten().roll(-start)[: config.unroll_width])
                if config.memory_read == "gated_add":
                    added = reader.gate_proj(F.rms_norm(token, token.shape)).tanh()[back] * added
                column = column + added
        if config.memory_read == "cross_attention":
            column = column + read_by_attention(reader, memories, token, place)
        columns.append(column)
    return model.decoder(inputs_embeds=torch.stack(columns)[None], use_cache=False).logits[0, -len(tokens) - 1 :]


def memories_alone(model, ids):
    """Memories `(M, K, D)` of the full chunks of ids `(T,)`, each encoded in a batch of its own."""
    chunks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return [model.encoder.encode_chunks(chunk[None])[0] for chunk in chunks]


def logits_alone(model, ids):
    """Logits `(T, V)` of ids `(T,)`, from one row at a time."""
    memories, table = memories_alone(model, ids), model.decoder.get_input_embeddings()
    rows = []
    for begin in range(0, len(ids) + 1, LENGTH):
        tokens = table(ids[begin : begin + LENGTH])[: LENGTH - 1]
        rows.append(row_alone(model, memories[: begin // LENGTH], 0, tokens))
    return torch.cat(rows)[1 : len(ids) + 1]


# Rows


@pytest.mark.parametrize("num_tokens", [3, 5, 6, 15, 18])
def test_all_rows_at_once_are_the_rows_one_by_one(model, num_tokens):
    ids = make_ids(2, num_tokens, vocab_size=VOCAB_SIZE)
    logits = model(ids, use_cache=False).logits
    for row in range(2):
        torch.testing.assert_close(logits[row], logits_alone(model, ids[row]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [[1] * 18, [7, 1, 5, 5], [5, 10, 3], [4, 1, 13]])
def test_a_text_read_in_pieces_is_the_text_read_at_once(model, pieces):
    ids = make_ids(2, 18, vocab_size=VOCAB_SIZE)
    expected = model(ids, use_cache=False).logits
    cache, read = None, 0
    for piece in pieces:
        outputs = model(ids[:, read : read + piece], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(outputs.logits, expected[:, read : read + piece], rtol=1e-9, atol=1e-9)
        cache, read = outputs.get(MEMORY_NAME), read + piece


@pytest.mark.parametrize("side", ["left", "right", "within"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_padded_row_is_the_row_alone(model, side, cached):
    lengths, width = [18, 11, 5, 2], 20
    rows = [make_ids(length, seed=length, vocab_size=VOCAB_SIZE) for length in lengths]
    ids, mask = make_ids(4, width, seed=9, vocab_size=VOCAB_SIZE), torch.zeros(4, width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = torch.arange(len(row)) + {"left": width - len(row), "right": 0}.get(side, 0)
        if side == "within":
            at = 1 + torch.randperm(width - 1, generator=torch.Generator().manual_seed(number))[: len(row) - 1]
            at = torch.cat([torch.zeros(1, dtype=torch.long), at.sort().values])
        ids[number, at], mask[number, at] = row, 1
    cuts = [0, 7, 8, 15, width] if cached else [0, width]
    if cached and side == "left":
        cuts = [0, 19, width]  # all rows begin in the first part
    cache, pieces = None, []
    for begin, end in itertools.pairwise(cuts):
        part = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end]}
        outputs = model(**part, past_key_values=cache, use_cache=cached)
        cache = outputs.get(MEMORY_NAME)
        pieces.append(outputs.logits)
    logits = torch.cat(pieces, dim=1)
    for number, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[number][mask[number] == 1], alone, rtol=1e-9, atol=1e-9)


def test_a_token_changes_nothing_before_itself(model):
    ids = make_ids(1, 18, vocab_size=VOCAB_SIZE)
    logits = model(ids, use_cache=False).logits[0]
    for position in range(18):
        other = ids.clone()
        other[0, position] = (ids[0, position] + 1) % VOCAB_SIZE
        changed = (model(other, use_cache=False).logits[0] != logits).any(-1)
        assert not changed[:position].any()
        # A chunk's last token reaches the decoder through the memory only.
        is_last = position % LENGTH == LENGTH - 1
        assert changed[position] or (is_last and model.config.max_memories == 0)


def test_a_token_reaches_later_chunks_by_its_memory_alone(monkeypatch):
    model = make_memory_model()
    ids = make_ids(1, 18, vocab_size=VOCAB_SIZE)
    other = ids.clone()
    other[0, 2] = (ids[0, 2] + 1) % VOCAB_SIZE
    logits, memories = model(ids, use_cache=False).logits[0], model.encoder.encode_chunks(ids[:, :15].view(3, LENGTH))
    assert (model(other, use_cache=False).logits[0] != logits).any(-1)[2:].all()
    monkeypatch.setattr(model.encoder, "encode_chunks", lambda chunks: memories)
    torch.testing.assert_close(model(other, use_cache=False).logits[0, LENGTH - 1 :], logits[LENGTH - 1 :])


def test_each_chunk_is_encoded_alone_and_order_within_it_matters():
    model = make_memory_model()
    ids = make_ids(1, 15, vocab_size=VOCAB_SIZE)
    memories = model.encoder(ids).memories
    swapped = model.encoder(torch.cat([ids[:, 5:10], ids[:, :5], ids[:, 10:]], dim=1)).memories
    torch.testing.assert_close(swapped[:, [1, 0, 2]], memories)
    assert not torch.allclose(model.encoder(ids.flip(1)).memories[:, [2, 1, 0]], memories)


# Memories that are given


def test_given_memories_stand_for_their_text(model):
    ids = make_ids(2, 18, vocab_size=VOCAB_SIZE)
    expected = model(ids, use_cache=False)
    given = model.encoder(ids[:, :10]).memories
    outputs = model(ids[:, 10:], memories=given, use_cache=False)
    if model.config.max_memories == 0:  # given memories are ignored
        assert torch.equal(outputs.logits, model(ids[:, 10:], use_cache=False).logits)
        return
    torch.testing.assert_close(outputs.logits, expected.logits[:, 10:])
    torch.testing.assert_close(outputs.memories, expected.memories)
    cached = model(ids[:, 10:], memories=given, use_cache=True)
    torch.testing.assert_close(cached.logits, expected.logits[:, 10:])


def test_rows_may_be_given_different_numbers_of_memories():
    model = make_memory_model()
    texts = [make_ids(1, 13, vocab_size=VOCAB_SIZE), make_ids(1, 8, seed=1, vocab_size=VOCAB_SIZE)]
    memories, rest = model.encode(
        torch.cat([texts[0], F.pad(texts[1], (0, 5))]),
        F.pad(torch.ones(2, 8), (0, 5)).index_fill(0, torch.tensor([0]), 1),
    )
    assert memories["memory_mask"].tolist() == [[True, True], [False, True]]
    outputs = model(**rest, **memories, use_cache=False)
    for row, text in enumerate(texts):
        torch.testing.assert_close(outputs.logits[row, -1], model(text, use_cache=False).logits[0, -1])
    # Values at absent memories are ignored.
    memories["memories"][1, 0] = torch.nan_to_num(memories["memories"][1, 0]) + 1e6
    assert torch.equal(model(**rest, **memories, use_cache=False).logits, outputs.logits)


def test_the_rest_is_the_last_chunk_and_memories_are_those_before():
    model = make_memory_model()
    for num_tokens, num_memories, num_rest in ((6, 1, 1), (10, 1, 5), (11, 2, 1)):
        ids = make_ids(1, num_tokens, vocab_size=VOCAB_SIZE)
        memories, rest = model.encode(ids)
        assert memories["memories"].shape[1] == num_memories
        assert torch.equal(rest["input_ids"], ids[:, -num_rest:]) and rest["attention_mask"].all()


# Losses


def by_hand(model, ids, objective):
    """Losses of all targets of one text `(T,)`, from one row at a time."""
    memories, table = memories_alone(model, ids), model.decoder.get_input_embeddings()
    chunks = ids[: len(memories) * LENGTH].view(-1, LENGTH)
    if objective == "causal":
        losses = F.cross_entropy(logits_alone(model, ids)[:-1], ids[1:], reduction="none")
    elif objective == "autoencoding":
        blank = model.reader.slot_embeddings[2].expand(LENGTH - 1, -1)
        rows = [row_alone(model, [memory], 1, blank) for memory in memories]
        losses = F.cross_entropy(torch.cat(rows), chunks.flatten(), reduction="none")
    else:
        half, rows = len(chunks) // 2, []
        for number in range(half):
            tokens = table(chunks[number, :-1])
            if objective == "blank_copy":
                tokens = model.reader.slot_embeddings[2].expand(LENGTH - 1, -1)
            rows.append(row_alone(model, memories[:half] + memories[:number], 1, tokens))
        losses = F.cross_entropy(torch.cat(rows), chunks[:half].flatten(), reduction="none")
    return losses


def assert_close_loss(loss, expected):
    """Compare as float32: the library computes the causal loss in it."""
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("num_tokens", [10, 18, 23])
def test_each_part_of_the_loss_is_the_mean_over_its_targets(model, objective, num_tokens):
    if model.config.max_memories == 0 and objective != "causal":
        with pytest.raises(StrictDataclassError, match="max_memories=0 leaves nothing to reconstruct from"):
            make_memory_model(max_memories=0, **{f"{objective}_weight": 2.0})
        return
    for name in OBJECTIVES:
        setattr(model.config, f"{name}_weight", 2.0 if name == objective else 0.0)
    lengths = [num_tokens, 11]
    ids, mask = make_ids(2, num_tokens, vocab_size=VOCAB_SIZE), torch.ones(2, num_tokens, dtype=torch.long)
    mask[1, : max(0, num_tokens - 11)] = 0
    outputs = model(ids, attention_mask=mask, labels=ids)
    losses = [by_hand(model, ids[row, -length:] if row else ids[row], objective) for row, length in enumerate(lengths)]
    assert_close_loss(outputs[f"{objective}_loss"], torch.cat(losses).mean())
    torch.testing.assert_close(outputs.loss, 2 * outputs[f"{objective}_loss"])
    assert [name for name in outputs if name.endswith("_loss")] == [f"{objective}_loss"]


def test_the_parts_come_in_one_forward_with_their_weights():
    weights = {"causal_weight": 0.5, "autoencoding_weight": 2.0, "copy_weight": 0.25, "blank_copy_weight": 3.0}
    model = make_memory_model(**weights)
    ids = make_ids(2, 20, vocab_size=VOCAB_SIZE)
    outputs = model(ids, labels=ids)
    parts = [weight * outputs[name.replace("weight", "loss")] for name, weight in weights.items()]
    torch.testing.assert_close(outputs.loss, sum(parts))


def test_the_first_token_of_a_chunk_is_a_target():
    model = make_memory_model()
    ids = make_ids(1, 12, vocab_size=VOCAB_SIZE)
    only = torch.full_like(ids, -100)
    only[0, LENGTH] = ids[0, LENGTH]
    model(ids, labels=only).loss.backward()
    assert model.reader.slot_embeddings.grad[0].abs().max() > 0  # the BEGIN slot predicts it
    others = model(ids, labels=ids.masked_fill(only != -100, -100)).loss
    assert others != model(ids, labels=ids).loss


def test_labels_are_ignored_where_they_say_so_and_at_padding():
    model = make_memory_model()
    ids = make_ids(1, 12, vocab_size=VOCAB_SIZE)
    padded, mask = F.pad(ids, (3, 2)), F.pad(torch.ones_like(ids), (3, 2))
    torch.testing.assert_close(model(padded, attention_mask=mask, labels=padded).loss, model(ids, labels=ids).loss)
    prompt = ids.clone()
    prompt[:, :7] = -100
    losses = F.cross_entropy(logits_alone(model, ids[0])[6:-1], ids[0, 7:])
    assert_close_loss(model(ids, labels=prompt).loss, losses)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_token_id_is_an_ordinary_one(objective):
    """Hidden tokens and task slots take no id of the vocabulary."""
    tiny = MemoryMosaicConfig(**MOSAIC.to_dict() | {"vocab_size": 3})
    model = make_memory_model(encoder=tiny, decoder=tiny, **all_weights())
    ids = make_ids(2, 20, vocab_size=3)
    outputs = model(ids, labels=ids)
    expected = torch.cat([by_hand(model, row, objective) for row in ids]).mean()
    assert_close_loss(outputs[f"{objective}_loss"], expected)


def test_padding_and_end_of_text_may_be_one_id():
    model = make_memory_model(**all_weights(), pad_token_id=7, eos_token_id=7)
    ids = make_ids(2, 20, vocab_size=VOCAB_SIZE)
    ids[:, [4, 11]] = 7
    outputs = model(ids, labels=ids)
    assert_close_loss(outputs.causal_loss, torch.cat([by_hand(model, row, "causal") for row in ids]).mean())


# The encoder


def test_a_frozen_encoder_stays_as_it_is_its_token_table_included():
    dropping = MemoryMosaicConfig(**MOSAIC.to_dict() | {"hidden_dropout": 0.3, "attention_dropout": 0.3})
    model = make_memory_model(encoder=dropping, freeze_encoder=True, dtype=torch.float32, **all_weights()).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ids = make_ids(2, 20, vocab_size=VOCAB_SIZE)
    memories = model(ids, labels=ids).memories
    assert torch.equal(memories, model(ids, labels=ids).memories)  # no dropout either
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith("encoder.") for name in changed)
    assert "encoder.backbone.embed_tokens.weight" in before
    model.freeze_encoder(False)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_a_new_decoder_leaves_the_encoder():
    model = make_memory_model()
    before = copy.deepcopy(model.state_dict())
    model.reset_decoder()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


@pytest.mark.parametrize("backbone", ["mosaic", "llama"])
def test_the_encoder_is_whole_and_causal_under_any_attention(backbone):
    encoder, decoder = BACKBONES[backbone]
    model = make_memory_model(encoder=encoder, decoder=decoder, memory_pooling="last")
    chunks = make_ids(3, LENGTH, vocab_size=VOCAB_SIZE)
    memories = model.encoder.encode_chunks(chunks)
    model.set_attn_implementation("eager")
    # Llama's own softmax is in float32.
    torch.testing.assert_close(model.encoder.encode_chunks(chunks), memories, rtol=1e-5, atol=1e-5)
    states = model.encoder.backbone(
        inputs_embeds=model.encoder.get_input_embeddings()(chunks) + model.encoder.chunk_positions
    ).last_hidden_state
    torch.testing.assert_close(states[:, -1:], memories, rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in memories.flatten(1).tolist()}) == 3
    memories.sum().backward()
    unused = {name for name, p in model.encoder.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in unused if "layers" in name and "value_mix" not in name}


@pytest.mark.parametrize("quantization, error", [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_rounded_memories_are_near_and_their_gradient_passes(quantization, error):
    memories = torch.randn(3, 2, 24, dtype=torch.float64, requires_grad=True)
    rounded = fake_quantize(memories, quantization)
    scale = memories.detach().abs().amax(-1, keepdim=True)
    assert 0 < ((rounded - memories).abs() / scale).max() <= error + 1e-6
    rounded.mul(torch.arange(24)).sum().backward()
    assert torch.equal(memories.grad, torch.arange(24, dtype=torch.float64).expand(3, 2, 24))
    codes, _ = quantize_vectors(memories.detach(), quantization)
    assert codes.element_size() == 1
    assert not fake_quantize(torch.zeros(1, 4), quantization).any()


def test_what_is_trained_is_what_is_stored():
    model = make_memory_model(memory_quantization="int8").train()
    memories = model.encoder(make_ids(2, 10, vocab_size=VOCAB_SIZE)).memories
    torch.testing.assert_close(fake_quantize(memories, "int8"), memories, rtol=0, atol=1e-9)


# Requests that would be misread


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"shape \(1, 0\)"),
        ({"input_ids": None}, "shape None"),
        ({"attention_mask": torch.zeros(1, 12)}, "Row 0 is empty"),
        ({"attention_mask": torch.ones(1, 11)}, r"shape \(1, 11\)"),
        ({"attention_mask": torch.full((1, 12), -1.0)}, "must hold 1 at tokens"),
        ({"input_ids": torch.full((1, 12), VOCAB_SIZE)}, f"range from {VOCAB_SIZE} to {VOCAB_SIZE}"),
        ({"inputs_embeds": torch.zeros(1, 12, 24)}, "inputs_embeds are not supported"),
        ({"logits_to_keep": -1}, "logits_to_keep=-1"),
        ({"memories": torch.zeros(1, 2, 1, 23)}, r"this model's are \(batch, memories, 1, 24\)"),
        ({"memories": torch.zeros(1, 2, 24)}, "this model's are"),
        ({"past_key_values": DynamicCache()}, "A DynamicCache is not what"),
    ],
)
def test_requests_that_would_be_misread_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_memory_model()(**{"input_ids": make_ids(1, 12, vocab_size=VOCAB_SIZE)} | inputs)


@pytest.mark.parametrize("objective, needed", [("autoencoding", 1), ("copy", 2), ("blank_copy", 2)])
def test_a_text_too_short_for_an_objective_is_refused(objective, needed):
    model = make_memory_model(**{f"{objective}_weight": 1.0})
    ids = make_ids(2, needed * LENGTH - 1, vocab_size=VOCAB_SIZE)
    with pytest.raises(
        ValueError, match=f"{objective} needs {needed} full .*longest text has {needed * LENGTH - 1} tokens"
    ):
        model(ids, labels=ids)


def test_a_text_of_one_chunk_leaves_nothing_to_encode():
    model = make_memory_model()
    with pytest.raises(ValueError, match="has 5 tokens, no more than a chunk of chunk_length=5"):
        model.encode(make_ids(1, LENGTH, vocab_size=VOCAB_SIZE))
    with pytest.raises(ValueError, match="has 4 tokens, which do not fill a chunk"):
        model.encoder(make_ids(1, LENGTH - 1, vocab_size=VOCAB_SIZE))


def test_a_cache_is_not_read_on_by_other_rows_or_with_other_memories():
    model = make_memory_model()
    ids = make_ids(2, 12, vocab_size=VOCAB_SIZE)
    outputs = model(ids, use_cache=True)
    cache = outputs.get(MEMORY_NAME)
    with pytest.raises(ValueError, match="holds 2 rows, but 1 are passed"):
        model(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="give them at first"):
        model(ids[:, :1], past_key_values=cache, memories=outputs.memories)
    with pytest.raises(ValueError, match="leave the cache out"):
        model(ids[:, :1], past_key_values=cache, labels=ids[:, :1])
    with pytest.raises(ValueError, match="covers 1 tokens, but 12 were read and 1 are new"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="cannot take tokens back"):
        cache.crop(-1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"chunk_length": 0}, "chunk_length=0 must be positive"),
        ({"memory_read": "repeat"}, "memory_read='repeat' is none of 'prefix'"),
        ({"memory_pooling": "max"}, "memory_pooling='max'"),
        ({"memory_quantization": "int4"}, "memory_quantization='int4'"),
        ({"memory_pooling": "last", "num_memory_embeddings": 2}, "gives one vector"),
        ({"memory_pooling": "mean", "num_memory_embeddings": 2}, "gives one vector, the mean"),
        ({"encoder_layer": 3}, "encoder_layer=3, but the encoder has 2 blocks: give a number from -3 to 2"),
        ({"encoder": LLAMA, "tie_encoder_embeddings": True}, "is 32 and the decoder's 24: one table has one width"),
        (
            {"memory_read": "cross_attention", "slots_per_memory": 2, "unroll_width": 11},
            "slots_per_memory=2 windows of unroll_width=11 leave out some of the 24 numbers",
        ),
        ({"unroll_width": 25}, "unroll_width=25 is more than the 24 numbers"),
        ({"max_memories": -1}, "max_memories=-1"),
        ({"causal_weight": 0.0}, "one positive"),
        ({"copy_weight": -1.0}, "none negative"),
        ({"decoder": {"vocab_size": 7, "hidden_size": 8, "num_attention_heads": 1}}, "61 tokens and the decoder 7"),
    ],
)
def test_mistakes_in_a_configuration_are_named(settings, message):
    with pytest.raises(Exception, match=message):
        MemoryModelConfig(**{"encoder": MOSAIC, "decoder": MOSAIC} | settings)


def test_learnt_positions_end_where_they_end():
    """A GPT-2 of 64 positions reads 59 memories and a chunk of 5, and no more."""
    model = make_memory_model(encoder=GPT2, decoder=GPT2)
    model(make_ids(1, 59 * LENGTH + LENGTH - 1), use_cache=False)
    with pytest.raises(ValueError, match="take 65 slots of a row, but this GPT2LMHeadModel has 64 learnt positions"):
        model(make_ids(1, 60 * LENGTH + LENGTH - 1), use_cache=False)
    bounded = make_memory_model(encoder=GPT2, decoder=GPT2, max_memories=3)
    assert bounded(make_ids(1, 100 * LENGTH)).logits.isfinite().all()
    with pytest.raises(ValueError, match="chunk_length=64 tokens in 65 slots, but has 64 learnt positions"):
        make_memory_model(encoder=GPT2, decoder=MOSAIC, chunk_length=64)
    make_memory_model(encoder=GPT2, decoder=MOSAIC, chunk_length=64, memory_pooling="last")


@pytest.mark.parametrize("decoder", [MOSAIC, LLAMA, GPT2], ids=["mosaic", "llama", "gpt2"])
def test_a_cache_under_gradient_checkpointing_is_refused(decoder):
    """Under checkpointing Llama and GPT-2 write nothing into a cache, and do not say so."""
    model = make_memory_model(decoder=decoder).train()
    checkpoint_activations(model, use_reentrant=False)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(make_ids(1, 8), past_key_values=MemoryModelCache())
    assert model(make_ids(1, 8)).logits.isfinite().all()
    cache = MemoryModelCache()
    model.eval()(make_ids(1, 8), past_key_values=cache)
    assert cache.num_row_slots() > 0

# SPDX-License-Identifier: Apache-2.0
"""Units are measured as the paper's equations say, whatever surrounds them, and each unit apart from the others.

So are their parts of the logit of each token that follows.
"""

import math
import threading

import numpy as np
import pytest
import torch
from helpers.documents import make_documents, pack
from helpers.kinds import V2_KINDS, make_mosaic
from helpers.models import NARROWING, make_ids, make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from modeling_memory_mosaic import (
    MemoryMosaicForSequenceClassification,
    inspect_units,
    summarize_units,
    trace_tokens,
)
from modeling_memory_mosaic.naive_memory_mosaic import (
    naive_contextual_memory,
    naive_kernel_smoothing,
    naive_keys,
    naive_layer_norm,
    naive_norm,
    naive_persistent_memory,
    naive_query_scale,
)
from modeling_memory_mosaic.ops_memory_mosaic import CHUNK_LENGTH
from training import figures


NAMES = ("error", "entropy", "share", "norm")
BY_TOKEN = ("embedding", "biases", "logit", "log_probability", "persistent_share")
SCALARS = ("key_leak", "key_scale", "value_scale")


def assert_same(units, others, tolerance=1e-9):
    """Check that measures are equal, and NaN in the same places, as `(name, tensor)` pairs say."""
    for name, expected in others:
        torch.testing.assert_close(getattr(units, name), expected, rtol=0, atol=tolerance, equal_nan=True, msg=name)


def naive_entropy(queries, keys_before):
    """Return the entropy of the weights that each query `(T, D)` gives its list of keys.

    Storing unit vectors as values makes the weights themselves the retrieved value.
    """
    entropies = []
    for query, keys in zip(queries, keys_before, strict=True):
        weights = naive_kernel_smoothing(query, keys, list(torch.eye(len(keys), dtype=query.dtype)), len(keys))
        entropies.append(-(weights * weights.log()).sum() if keys else torch.tensor(torch.nan))
    return torch.stack(entropies)


def naive_contextual(memory, inputs):
    """Return retrievals `(H, T, D)`, entropies and errors `(H, T)` of the units of one memory, by loops."""
    width = memory.config.head_dim
    measures = {"retrieved": [], "entropy": [], "error": []}
    bandwidth = memory.config.bandwidth_exponent, memory.config.bandwidth_start
    projected = zip(memory.k_proj(inputs).split(width, -1), memory.v_proj(inputs).split(width, -1), strict=True)
    for head, (k_states, v_states) in enumerate(projected):
        leak, scale, value_scale = (getattr(memory, name)[head] for name in SCALARS)
        mix = memory.value_mix[head]
        retrieved = naive_contextual_memory(k_states, v_states, leak, scale, value_scale, mix, *bandwidth)
        keys = naive_keys(k_states, leak, scale)
        queries = [naive_query_scale(t, *bandwidth) * key for t, key in enumerate(keys)]
        errors = []
        for t in range(len(inputs) - 1):
            value = (10 * value_scale).exp() * naive_norm(mix * v_states[t] + (1 - mix) * v_states[t + 1])
            errors.append((retrieved[t] - value).square().sum() / value.square().sum())
        measures["retrieved"].append(retrieved)
        measures["entropy"].append(naive_entropy(queries, [list(keys[:t]) for t in range(len(keys))]))
        measures["error"].append(torch.stack([*errors, torch.full_like(retrieved[0, 0], torch.nan)]))
    return {name: torch.stack(rows) for name, rows in measures.items()}


def naive_persistent(memory, inputs):
    measures = {"retrieved": [], "entropy": []}
    for head, k_states in enumerate(memory.k_proj(inputs).split(memory.config.head_dim, -1)):
        leak, scale, value_scale = (getattr(memory, name)[head] for name in SCALARS)
        slots = memory.slot_keys[head], memory.slot_values[head]
        queries = naive_keys(k_states, leak, scale, power=2)
        measures["retrieved"].append(naive_persistent_memory(k_states, *slots, leak, scale, value_scale))
        measures["entropy"].append(naive_entropy(queries, [list(slots[0])] * len(queries)))
    return {name: torch.stack(rows) for name, rows in measures.items()}


def naive_parts(memory, retrieved):
    """Return what each unit adds, `(H, T, C)`: its columns of `o_proj`, times its retrievals."""
    columns = memory.o_proj.weight.split(memory.config.head_dim, dim=1)
    return torch.stack([column @ part.T for column, part in zip(columns, retrieved, strict=True)]).transpose(1, 2)


@torch.no_grad()
def naive_units(model, ids):
    """Return `(name, tensor)` pairs of what `inspect_units` measures on one text `(T,)`, by the paper's loops."""
    stream = model.model.embed_tokens.weight[ids]
    measures = {name: [] for name in NAMES}
    for layer in model.model.layers:
        rows = {"entropy": [], "share": [], "norm": []}
        for kind, read in (("contextual", naive_contextual), ("persistent", naive_persistent)):
            memory, norm = getattr(layer, f"{kind}_memory"), getattr(layer, f"{kind}_norm")
            units = read(memory, naive_layer_norm(stream, norm.weight, norm.bias, norm.eps))
            parts = naive_parts(memory, units["retrieved"])
            output = parts.sum(0)
            rows["entropy"].append(units["entropy"])
            rows["share"].append((parts * output).sum(-1) / output.square().sum(-1))
            rows["norm"].append(parts.norm(dim=-1) / stream.norm(dim=-1))
            if kind == "contextual":
                measures["error"].append(units["error"][None])
            stream = stream + output + (0 if memory.o_proj.bias is None else memory.o_proj.bias)
        for name, kinds in rows.items():
            measures[name].append(torch.stack(kinds)[:, None])
    return [(name, torch.stack(layers)) for name, layers in measures.items()]


@pytest.mark.parametrize(
    ("implementation", "config"),
    [("sdpa", {}), ("eager", {"use_bias": True, "head_dim": 5}), ("sdpa", NARROWING)],
    ids=["sdpa", "eager", "narrowing"],
)
def test_units_are_those_of_the_paper(implementation, config):
    model = make_model(dtype=torch.float64, num_persistent_slots=7, **config)
    model.set_attn_implementation(implementation)
    ids = make_ids(CHUNK_LENGTH + 5)
    assert_same(inspect_units(model, ids[None]), naive_units(model, ids), tolerance=1e-10)


def test_numbers_are_float32_on_the_cpu_and_a_half_precision_model_is_close():
    model, ids = make_model(), make_ids(2, 9)
    units = inspect_units(model, ids)
    half = inspect_units(make_model(dtype=torch.bfloat16), ids)
    for name in NAMES:
        number, other = getattr(units, name), getattr(half, name)
        assert number.dtype == other.dtype == torch.float32 and number.device.type == "cpu"
        torch.testing.assert_close(other, number, rtol=0.1, atol=0.1, equal_nan=True, msg=name)
    assert units.error.shape == (2, 2, 3, 9) and units.share.shape == (2, 2, 2, 3, 9)


def capture(model, kind):
    """Record residual streams and outputs without bias of all memories of a kind, at the next read."""
    streams, outputs = [], []
    for layer in model.model.layers:
        getattr(layer, f"{kind}_norm").register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        getattr(layer, f"{kind}_memory").register_forward_hook(
            lambda memory, _, output: outputs.append(output[0] if kind == "contextual" else output)
        )
    return streams, outputs


@pytest.mark.parametrize(("index", "kind"), [(0, "contextual"), (1, "persistent")])
def test_shares_sum_to_one_and_a_unit_adds_no_less_than_its_share(index, kind):
    model = make_model(dtype=torch.float64)
    streams, outputs = capture(model, kind)
    units = inspect_units(model, make_ids(2, 11))
    for layer, (stream, output) in enumerate(zip(streams, outputs, strict=True)):
        share, norm = units.share[layer, index], units.norm[layer, index]
        has_output = output.norm(dim=-1) > 0
        assert torch.equal(has_output, (torch.arange(11) > 0).expand(2, -1) | (kind == "persistent"))
        expected = torch.where(has_output, torch.ones_like(share[:, 0]), torch.nan)
        torch.testing.assert_close(share.sum(1), expected, equal_nan=True)
        # |c . o| <= |c| |o|, and not far from it for units that matter at all.
        along = share.abs() * output.norm(dim=-1)[:, None]
        length = norm * stream.norm(dim=-1)[:, None]
        assert (along.nan_to_num() <= length + 1e-12).all() and (along > 0.5 * length).any()


@pytest.mark.parametrize(("index", "kind"), [(0, "contextual"), (1, "persistent")])
def test_a_unit_alone_has_the_whole_share_and_adds_all_of_the_output(index, kind):
    model = make_model(dtype=torch.float64, num_attention_heads=1, hidden_size=8)
    streams, outputs = capture(model, kind)
    units = inspect_units(model, make_ids(2, 6))
    expected = torch.stack([o.norm(dim=-1) / x.norm(dim=-1) for o, x in zip(outputs, streams, strict=True)])
    torch.testing.assert_close(units.norm[:, index, :, 0], expected)
    torch.testing.assert_close(units.share[..., 1:], torch.ones_like(units.share[..., 1:]))


def test_a_silenced_unit_adds_nothing_and_leaves_the_others_as_they_are():
    model, ids = make_model(dtype=torch.float64, num_hidden_layers=1), make_ids(1, 9)
    before = inspect_units(model, ids)
    memory = model.model.layers[0].contextual_memory
    with torch.no_grad():
        memory.o_proj.weight[:, memory.config.head_dim : 2 * memory.config.head_dim] = 0
    after = inspect_units(model, ids)
    assert not after.norm[0, 0, :, 1].any() and not after.share[0, 0, :, 1, 1:].any()
    others = [0, 2]
    assert_same(after, [("error", before.error)])  # the unit predicts as before, but nothing reads it
    assert torch.equal(after.norm[0, 0, :, others], before.norm[0, 0, :, others])


def test_one_who_reads_equal_pairs_is_undecided_between_all_of_them():
    """One token repeated makes all pairs alike if keys have no past: the weights are uniform and the error is 0."""
    model = make_model(dtype=torch.float64, num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].contextual_memory.key_leak.fill_(100.0)
        model.model.layers[0].persistent_memory.slot_keys.zero_()
    units = inspect_units(model, torch.full((1, 8), 5))
    expected = torch.tensor([math.nan, *(math.log(n) for n in range(1, 8))], dtype=torch.float64)
    torch.testing.assert_close(units.entropy[0, 0, 0], expected.expand(3, -1), equal_nan=True)
    num_slots = model.config.num_persistent_slots
    torch.testing.assert_close(units.effective_pairs[0, 1], torch.full((1, 3, 8), num_slots, dtype=torch.float64))
    surprise = torch.tensor([1.0, *[0.0] * 6, math.nan], dtype=torch.float64)
    torch.testing.assert_close(units.error[0, 0], surprise.expand(3, -1), equal_nan=True, rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_unexpected_token_is_the_surprise_of_the_token_before_it(implementation):
    model = make_model(dtype=torch.float64)
    model.set_attn_implementation(implementation)
    ids = torch.tensor([[3, 9, 4, 3, 9, 4, 3, 9, 4, 3]])
    changed = ids.clone()
    changed[0, 7] = 50
    before, after = inspect_units(model, ids), inspect_units(model, changed)
    # At token 6 the measures are as before, except how well it predicted.
    assert torch.equal(after.error[..., :6], before.error[..., :6])
    assert (after.error[..., 6] != before.error[..., 6]).all()
    for name in ("entropy", "share", "norm"):
        number, other = getattr(before, name), getattr(after, name)
        torch.testing.assert_close(other[..., :7], number[..., :7], equal_nan=True)
        assert (other[..., 7] != number[..., 7]).all()


@pytest.mark.parametrize("bandwidth", [{}, NARROWING], ids=["fixed", "narrowing"])
def test_entropies_are_those_of_the_weights_that_the_model_returns(bandwidth):
    model, (ids, mask) = make_model(dtype=torch.float64, **bandwidth), padded_rows()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = torch.stack(model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions)
    expected = torch.special.entr(attentions).sum(-1)
    expected = torch.where(attentions.sum(-1) > 0, expected, torch.nan)
    expected[:, mask[:, None].expand(-1, 3, -1) == 0] = torch.nan
    units = inspect_units(model, ids, attention_mask=mask)
    torch.testing.assert_close(units.entropy[:, 0], expected, equal_nan=True)


def padded_rows():
    """Return four rows: without padding, padded left, padded right, with padding inside."""
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, 7:] = 0
    mask[3, [0, 4, 5, 9, 11]] = 0
    return make_ids(4, 12), mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_row_is_the_row_alone(implementation):
    model, (ids, mask) = make_model(dtype=torch.float64), padded_rows()
    model.set_attn_implementation(implementation)
    units = inspect_units(model, ids, attention_mask=mask)
    for row, is_token in enumerate(mask.bool()):
        alone = inspect_units(model, ids[row, is_token][None])
        for name in NAMES:
            numbers = getattr(units, name)[..., row, :, :]
            assert torch.isnan(numbers[..., ~is_token]).all()
            assert_same(alone, [(name, numbers[..., is_token].unsqueeze(-3))])


@pytest.mark.parametrize(
    ("implementation", "padding", "bandwidth"), [("sdpa", 0, {}), ("eager", 3, {}), ("sdpa", 3, NARROWING)]
)
def test_a_packed_document_is_the_document_alone(implementation, padding, bandwidth):
    model = make_model(dtype=torch.float64, **bandwidth)
    model.set_attn_implementation(implementation)
    documents = make_documents()
    batch = pack(documents)
    ids, positions = (torch.nn.functional.pad(batch[name], (padding, 0)) for name in ("input_ids", "position_ids"))
    mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
    units = inspect_units(model, ids, attention_mask=mask, position_ids=positions)
    begin = padding
    for document in documents:
        end = begin + len(document)
        alone = inspect_units(model, document[None])
        assert_same(alone, [(name, getattr(units, name)[..., begin:end]) for name in NAMES])
        begin = end


def test_any_head_and_any_adapter_is_read_as_it_computes():
    model, ids = make_model(dtype=torch.float64), make_ids(1, 9)
    expected = [(name, getattr(inspect_units(model, ids), name)) for name in NAMES]
    assert_same(inspect_units(model.model, ids), expected, tolerance=0)
    classifier = MemoryMosaicForSequenceClassification(model.config).double().eval()
    classifier.model = model.model
    assert_same(inspect_units(classifier, ids), expected, tolerance=0)

    slots = ["persistent_memory.slot_keys", "persistent_memory.slot_values"]
    lora = LoraConfig(target_modules="all-linear", target_parameters=slots, init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    measured = [(name, getattr(inspect_units(adapted, ids), name)) for name in NAMES]
    assert not any(torch.allclose(a[1], b[1], equal_nan=True) for a, b in zip(measured, expected, strict=True))
    assert_same(inspect_units(adapted.merge_and_unload(), ids), measured)


def test_virtual_tokens_of_an_adapter_are_measured_too(model):
    ids = make_ids(2, 5)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        embeddings = torch.cat([prompted.get_prompt(2), model.model.embed_tokens(ids)], dim=1)
        model.set_attn_implementation("eager")
        weights = model(inputs_embeds=embeddings, output_attentions=True, use_cache=False).attentions[-1]
    entropy = inspect_units(prompted, ids).entropy[-1, 0]
    assert entropy.shape == (2, 3, 8)
    torch.testing.assert_close(entropy[..., 1:], torch.special.entr(weights).sum(-1)[..., 1:])


def test_inspection_leaves_no_hooks_and_no_gradients(model):
    inspect_units(model, make_ids(1, 5))
    with pytest.raises(ValueError, match="attention_mask covers 4 tokens"):
        inspect_units(model, make_ids(1, 5), attention_mask=torch.ones(1, 4))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not inspect_units(model, make_ids(1, 5)).share.requires_grad


@pytest.mark.parametrize("read", [inspect_units, trace_tokens])
def test_what_another_thread_reads_meanwhile_is_not_observed(model, read):
    """A server answers several users by one model. The texts have one length, so that shapes alone reveal nothing."""
    ids, expected = make_ids(1, 9), read(model, make_ids(1, 9))
    another = threading.Thread(target=model, args=(make_ids(1, 9, seed=1),))

    def meanwhile(*_):
        if threading.current_thread() is not another:
            another.start()
            another.join()

    with model.model.layers[1].register_forward_pre_hook(meanwhile):
        measured = read(model, ids)
    assert another.ident is not None
    assert_same(measured, vars(expected).items(), tolerance=0)


def test_one_token_has_no_error_and_nothing_to_read(model):
    units = inspect_units(model, make_ids(2, 1))
    assert torch.isnan(units.error).all() and torch.isnan(units.entropy[:, 0]).all()
    assert not torch.isnan(units.entropy[:, 1]).any() and not units.norm[:, 0].any()


def test_what_cannot_be_inspected_is_refused(model):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1)).eval()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no memories"):
        inspect_units(gpt2, make_ids(1, 4))
    with pytest.raises(ValueError, match=r"call `model.eval\(\)` first"):
        inspect_units(model.train(), make_ids(1, 4))


def test_summaries_are_means_over_tokens_that_have_something_to_read():
    model, (ids, mask) = make_model(), padded_rows()
    units = inspect_units(model, ids, attention_mask=mask)
    table = summarize_units(units)
    assert [(row["layer"], row["kind"], row["head"]) for row in table] == [
        (layer, kind, head) for layer in (0, 1) for kind in ("contextual", "persistent") for head in (0, 1, 2)
    ]
    contextual, persistent = table[7], table[11]
    assert persistent["error"] is None
    first = mask.argmax(1)
    errors = [
        units.error[1, row, 1, t].item()
        for row in range(4)
        for t in range(12)
        if mask[row, t] and t > first[row] and mask[row, t + 1 :].any()
    ]
    assert contextual["error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    for name in ("entropy", "effective_pairs", "share", "norm"):
        numbers = getattr(units, name)[1, 1, :, 2][mask.bool()]
        assert persistent[name] == pytest.approx(numbers.mean().item(), rel=1e-5)
    for kind in ("contextual", "persistent"):
        shares = [row["share"] for row in table if (row["layer"], row["kind"]) == (0, kind)]
        assert sum(shares) == pytest.approx(1, rel=1e-5)


def test_a_summary_prints_as_a_table_and_stays_a_list(model):
    table = summarize_units(inspect_units(model, make_ids(1, 8)))
    header, *lines = str(table).splitlines()
    assert (
        isinstance(table, list) and len(lines) == len(table) > 1 and len({len(line) for line in (header, *lines)}) == 1
    )
    assert header.split() == list(table[0])
    shown = [line.split() for line in lines if "contextual" in line]
    assert [row[3] for row in shown] == [f"{row['error']:.3f}" for row in table if row["kind"] == "contextual"]
    assert "nan" not in str(table).lower() and "None" not in str(table)


def following_logits(model, ids):
    """Return relative logit and log probability of the token that follows each, `(B, T - 1)`."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    following = ids[:, 1:, None]
    chosen = (
        (logits - logits.mean(-1, keepdim=True)).gather(-1, following),
        logits.log_softmax(-1).gather(-1, following),
    )
    return [numbers[..., 0] for numbers in chosen]


@pytest.mark.parametrize(
    ("implementation", "config"),
    [("sdpa", {}), ("eager", {"use_bias": True, "head_dim": 5, "tie_word_embeddings": False}), ("sdpa", NARROWING)],
    ids=["sdpa", "eager", "narrowing"],
)
def test_parts_of_a_logit_sum_to_it(implementation, config):
    model, ids = make_model(dtype=torch.float64, **config), make_ids(2, CHUNK_LENGTH + 5)
    model.set_attn_implementation(implementation)
    trace = trace_tokens(model, ids)
    logit, log_probability = following_logits(model, ids)
    total = trace.embedding + trace.biases + trace.contribution.sum(dim=(0, 1, 3))
    for numbers, expected in ((total, logit), (trace.logit, logit), (trace.log_probability, log_probability)):
        torch.testing.assert_close(numbers[:, :-1], expected, rtol=0, atol=1e-12)
        assert torch.isnan(numbers[:, -1]).all()
    assert trace.biases[:, :-1].any() == model.config.use_bias
    # The first token has nothing to read, so persistent units alone predict the second.
    assert not trace.contribution[:, 0, :, :, 0].any()
    assert (trace.persistent_share[:, 0] == 1).all() and (trace.persistent_share[:, 1:-1] < 1).all()


@pytest.mark.parametrize("kind", ["contextual", "persistent"])
def test_a_contribution_is_what_the_logit_loses_without_the_unit(kind):
    model, ids = make_model(dtype=torch.float64, use_bias=True), make_ids(12)
    trace, norm = trace_tokens(model, ids[None]), model.model.norm
    final, read = [], []
    norm.register_forward_pre_hook(lambda _, inputs: final.append(inputs[0][0]))
    getattr(model.model.layers[0], f"{kind}_norm").register_forward_hook(lambda *args: read.append(args[2][0]))
    with torch.no_grad():
        model(ids[None])
        memory = getattr(model.model.layers[0], f"{kind}_memory")
        naive = naive_contextual if kind == "contextual" else naive_persistent
        parts = naive_parts(memory, naive(memory, read[0])["retrieved"])
        scale = (final[0].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()  # as it is with the unit

        def logit(stream):
            normed = (stream - stream.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
            logits = normed @ model.lm_head.weight.T / model.config.logits_scaling
            return (logits - logits.mean(-1, keepdim=True))[:-1].gather(-1, ids[1:, None])[:, 0]

        lost = torch.stack([logit(final[0]) - logit(final[0] - part) for part in parts])
    contribution = trace.contribution[0, ["contextual", "persistent"].index(kind), 0, :, :-1]
    torch.testing.assert_close(contribution, lost, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [{}, NARROWING], ids=["fixed", "narrowing"])
def test_weights_are_those_that_the_model_returns_at_the_pairs_that_tokens_complete(bandwidth):
    model, (ids, mask) = make_model(dtype=torch.float64, **bandwidth), padded_rows()
    model.set_attn_implementation("eager")
    trace = trace_tokens(model, ids, attention_mask=mask)
    with torch.no_grad():
        attentions = torch.stack(model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions)
    padding = mask[:, None].expand(-1, 3, -1) == 0
    # A map of the model indexes a pair by the token of its key, which stands before the one that completes it.
    expected = torch.nn.functional.pad(attentions[..., :-1], (1, 0))
    expected[:, padding] = torch.nan
    torch.testing.assert_close(trace.weights, expected, equal_nan=True)
    has_pairs = mask.cumsum(1)[:, None].expand(-1, 3, -1) > 1
    sums = has_pairs.double().masked_fill(padding, torch.nan).expand(2, -1, -1, -1)
    torch.testing.assert_close(trace.weights.sum(-1), sums, equal_nan=True)


def test_weights_over_slots_are_those_whose_entropy_is_told():
    model, (ids, mask) = make_model(dtype=torch.float64, num_persistent_slots=7), padded_rows()
    slot_weights = trace_tokens(model, ids, attention_mask=mask).slot_weights
    assert slot_weights.shape == (2, 4, 3, 12, 7)
    torch.testing.assert_close(slot_weights.nansum(-1), mask[:, None].double().expand(2, 4, 3, 12))
    entropy = inspect_units(model, ids, attention_mask=mask).entropy[:, 1]
    torch.testing.assert_close(torch.special.entr(slot_weights).sum(-1), entropy, equal_nan=True)


def traced(trace, row=0, places=slice(None)):
    """Return all numbers of one row of a trace, at some of its tokens."""
    numbers = {name: getattr(trace, name)[row, places] for name in BY_TOKEN}
    numbers["contribution"] = trace.contribution[:, :, row][..., places]
    numbers["weights"] = trace.weights[:, row][..., places, :][..., places]
    numbers["slot_weights"] = trace.slot_weights[:, row][..., places, :]
    return numbers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_trace_of_a_padded_row_is_that_of_the_row_alone(implementation):
    model, (ids, mask) = make_model(dtype=torch.float64, use_bias=True), padded_rows()
    model.set_attn_implementation(implementation)
    trace = trace_tokens(model, ids, attention_mask=mask)
    for row, is_token in enumerate(mask.bool()):
        alone = traced(trace_tokens(model, ids[row, is_token][None]))
        torch.testing.assert_close(traced(trace, row, is_token), alone, equal_nan=True)
        assert all(torch.isnan(numbers).all() for numbers in traced(trace, row, ~is_token).values())


def test_a_trace_of_a_packed_document_is_that_of_the_document_alone():
    model, documents = make_model(dtype=torch.float64), make_documents()
    batch = pack(documents)
    trace = trace_tokens(model, batch["input_ids"], position_ids=batch["position_ids"])
    begin = 0
    for document in documents:
        place = slice(begin, begin + len(document))
        alone = traced(trace_tokens(model, document[None]))
        torch.testing.assert_close(traced(trace, 0, place), alone, equal_nan=True)
        begin = place.stop


def test_a_trace_through_adapters_is_that_of_the_merged_model():
    model, ids = make_model(dtype=torch.float64, tie_word_embeddings=False), make_ids(1, 9)
    before = traced(trace_tokens(model, ids))
    lora = LoraConfig(target_modules=["k_proj", "v_proj", "o_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    trace = trace_tokens(adapted, ids)
    torch.testing.assert_close(trace.logit[:, :-1], following_logits(adapted, ids)[0])
    assert not torch.allclose(trace.logit[:, :-1], before["logit"][:-1])
    merged = trace_tokens(adapted.merge_and_unload(), ids)
    torch.testing.assert_close(traced(trace), traced(merged), equal_nan=True)


def test_virtual_tokens_speak_for_the_token_that_follows_them():
    model, ids = make_model(dtype=torch.float64), make_ids(2, 5)
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    trace = trace_tokens(prompted, ids)
    with torch.no_grad():
        logits = prompted(ids, use_cache=False).logits
    expected = logits[:, 2:-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert trace.log_probability.shape == (2, 8) and trace.weights.shape == (2, 2, 3, 8, 8)
    torch.testing.assert_close(trace.log_probability[:, 2:-1], expected)
    total = trace.embedding + trace.biases + trace.contribution.sum(dim=(0, 1, 3))
    torch.testing.assert_close(total, trace.logit, equal_nan=True)
    assert torch.isnan(trace.logit[:, [0, 1, 7]]).all()


def test_a_trace_is_float32_and_that_of_a_half_precision_model_is_close():
    ids = make_ids(2, 9)
    trace, half = (traced(trace_tokens(make_model(dtype=dtype), ids)) for dtype in (torch.float32, torch.bfloat16))
    assert all(numbers.dtype == torch.float32 for numbers in (*trace.values(), *half.values()))
    torch.testing.assert_close(half, trace, rtol=0.1, atol=0.1, equal_nan=True)


def test_a_trace_leaves_no_hooks_and_no_gradients(model):
    trace = trace_tokens(model, make_ids(1, 1))
    assert torch.isnan(trace.logit).all() and not trace.weights.any()
    with pytest.raises(ValueError, match="attention_mask covers 4 tokens"):
        trace_tokens(model, make_ids(1, 5), attention_mask=torch.ones(1, 4))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not any(numbers.requires_grad for numbers in traced(trace).values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_traced_is_refused(model):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1)).eval()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no memories"):
        trace_tokens(gpt2, make_ids(1, 4))
    with pytest.raises(ValueError, match="MemoryMosaicModel has no head that predicts tokens"):
        trace_tokens(model.model, make_ids(1, 4))
    with pytest.raises(ValueError, match=r"call `model.eval\(\)` first"):
        trace_tokens(model.train(), make_ids(1, 4))


def units_of_v2(model, read):
    """Return what contextual units of layer 0 retrieved `(heads, T, D)`, by the hook of their combining layer."""
    memory = model.model.layers[0].contextual_memory

    def keep(_, inputs):
        read.append(inputs[0].unflatten(-1, (-1, model.config.head_dim))[0].transpose(0, 1))

    return memory.o_proj.register_forward_pre_hook(keep)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", V2_KINDS)
def test_parts_of_a_logit_of_v2_sum_to_it(variant, implementation):
    """For texts longer than window and delay. Contextual units are short-term heads, then long-term ones."""
    model, ids = make_mosaic(variant), make_ids(2, 25)
    model.set_attn_implementation(implementation)
    trace = trace_tokens(model, ids)
    logit, log_probability = following_logits(model, ids)
    total = trace.embedding + trace.biases + trace.contribution.sum(dim=(0, 1, 3))
    for numbers, expected in ((total, logit), (trace.logit, logit), (trace.log_probability, log_probability)):
        torch.testing.assert_close(numbers[:, :-1], expected, rtol=0, atol=1e-11)
    is_dense = variant == "mosaic v2"
    assert trace.levels == {"short_term": 3 if is_dense else 2, "long_term": 3, "persistent": 1 if is_dense else 3}
    assert trace.slot_weights.shape == ((2, 2, 1, 25, 0) if is_dense else (2, 2, 3, 25, 11))
    assert trace.biases[:, :-1].any() == model.config.use_bias
    assert not trace.contribution[:, 1, :, trace.levels["persistent"] :].nan_to_num().any()
    assert not trace.contribution[:, 0, :, :, 0].any(), "the first token has no pairs to read"


@torch.no_grad()
@pytest.mark.parametrize("variant", V2_KINDS)
def test_a_contribution_of_v2_is_that_of_what_its_unit_retrieved(variant):
    """The columns of `o_proj` times what the head retrieved, and the whole of a dense memory."""
    model, ids, read, final = make_mosaic(variant), make_ids(1, 20), [], []
    layer = model.model.layers[0]
    trace, units = trace_tokens(model, ids), inspect_units(model, ids)
    hooks = [units_of_v2(model, read), model.model.norm.register_forward_pre_hook(lambda _, x: final.append(x[0]))]
    hooks.append(layer.persistent_memory.register_forward_hook(lambda *of_call: read.append(of_call[2])))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    columns = layer.contextual_memory.o_proj.weight.split(model.config.head_dim, dim=1)
    parts = torch.stack([one @ column.T for one, column in zip(read[0], columns, strict=True)])
    stream, norm = final[0][0], model.model.norm

    def logit(part):  # with the scale of the final norm held
        if variant == "mosaic v2":
            normed = part / (stream.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
        else:
            scale = (stream.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
            normed = (part - part.mean(-1, keepdim=True)) / scale * norm.weight
        logits = model.lm_head(normed) / model.config.logits_scaling
        return (logits - logits.mean(-1, keepdim=True))[:-1].gather(-1, ids[0, 1:, None])[:, 0]

    num_units = len(parts)
    expected = torch.stack([logit(part) for part in parts])
    torch.testing.assert_close(trace.contribution[0, 0, 0, :num_units, :-1], expected, rtol=0, atol=1e-11)
    if variant == "mosaic v2":
        torch.testing.assert_close(trace.contribution[0, 1, 0, 0, :-1], logit(read[1][0]), rtol=0, atol=1e-11)
    norms = parts.norm(dim=-1) / model.model.embed_tokens(ids)[0].norm(dim=-1)
    torch.testing.assert_close(units.norm[0, 0, 0, :num_units], norms, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", V2_KINDS)
def test_units_and_traces_of_v2_are_those_of_each_text_alone(variant):
    """Weights are the maps of eager attention; padding and packed documents change nothing."""
    model, (ids, mask) = make_mosaic(variant), padded_rows()
    trace, units = trace_tokens(model, ids, attention_mask=mask), inspect_units(model, ids, attention_mask=mask)
    for row, is_token in enumerate(mask.bool()):
        text = ids[row, is_token][None]
        torch.testing.assert_close(traced(trace, row, is_token), traced(trace_tokens(model, text)), equal_nan=True)
        alone = inspect_units(model, text)
        for name in NAMES:
            assert_same(alone, [(name, getattr(units, name)[..., row, :, :][..., is_token].unsqueeze(-3))])
    documents = make_documents()
    batch, begin = pack(documents), 0
    packed = trace_tokens(model, batch["input_ids"], position_ids=batch["position_ids"])
    for document in documents:
        place = slice(begin, begin + len(document))
        alone = traced(trace_tokens(model, document[None]))
        torch.testing.assert_close(traced(packed, 0, place), alone, equal_nan=True)
        begin = place.stop
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(ids[:1], output_attentions=True, use_cache=False).attentions)
    weights = trace_tokens(model, ids[:1]).weights
    torch.testing.assert_close(weights[..., 1:], maps[..., :-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", V2_KINDS)
def test_errors_and_summaries_of_v2_name_their_level(variant):
    """The error of a unit is that of the value which the next token gave its pair."""
    model, ids, read = make_mosaic(variant), make_ids(1, 14), []
    units = inspect_units(model, ids)
    with torch.no_grad():
        hook, cache = units_of_v2(model, read), DynamicCache(config=model.config)
        model(ids, cache=cache)
        hook.remove()
    num_long, long_values = units.levels["long_term"], cache.layers[0].values[0, :, 1:]
    long_retrieved = read[0][-num_long:, :-1]
    expected = (long_retrieved - long_values).square().sum(-1) / long_values.square().sum(-1)
    torch.testing.assert_close(units.error[0, 0, -num_long:, :-1], expected, rtol=0, atol=1e-10)
    table = summarize_units(units)
    levels = [level for level, number in units.levels.items() for _ in range(number)]
    assert [row["level"] for row in table] == 2 * levels
    assert all(row["share"] == row["share"] for row in table)  # no NaN: every row is a unit
    shares = [row["share"] for row in table if (row["layer"], row["kind"]) == (1, "persistent")]
    assert sum(shares) == pytest.approx(1, rel=1e-5)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw units, and return the axes of the saved picture, rows by columns."""
    saved, save_figure = [], figures.save_figure
    monkeypatch.setattr(
        figures, "save_figure", lambda *arguments: (saved.append(arguments[0]), save_figure(*arguments))
    )

    def draw(*arguments, **options):
        figures.draw_units(arguments[0], tmp_path / "units.png", *arguments[1:], **options)
        assert (tmp_path / "units.png").stat().st_size > 10_000
        return np.array([axis for axis in saved[-1].axes if axis.get_label() != "<colorbar>"]).reshape(3, 2)

    return draw


def test_pictures_show_every_unit_of_the_row_at_every_token(drawn):
    (ids, mask), tokens = padded_rows(), [*"a cat's $5.", "\n"]
    units = inspect_units(make_model(), ids, attention_mask=mask)
    axes = drawn(units, tokens, row=1)
    for axis, numbers in zip(axes[:, 0], (units.error, units.entropy[:, 0], units.entropy[:, 1]), strict=True):
        shown = axis.images[0].get_array()
        expected = numbers[:, 1].flatten(0, 1)
        assert np.array_equal(shown.mask, expected.isnan().numpy()) and shown.mask[:, :5].all()
        assert np.array_equal(shown.compressed(), expected[~expected.isnan()].numpy())
        assert [label.get_text() for label in axis.get_xticklabels()][:3] == ["a", "␣", "c"]
    alone = summarize_units(inspect_units(make_model(), ids[1:2, 5:]))
    for axis, kind, name in zip(
        axes[:, 1], ("contextual", "contextual", "persistent"), ("share", "norm", "share"), strict=True
    ):
        widths = [bar.get_width() for bar in axis.patches]
        assert widths == pytest.approx([row[name] for row in alone if row["kind"] == kind], rel=1e-4)


def test_pictures_of_one_token_and_of_more_than_can_be_named(drawn, model):
    assert drawn(inspect_units(model, make_ids(1, 1)))[0, 0].images[0].get_array().mask.all()
    num_tokens = figures.MAX_NAMED_TOKENS + 1
    axes = drawn(inspect_units(model, make_ids(1, num_tokens)), ["a"] * num_tokens)
    assert "a" not in [label.get_text() for label in axes[0, 0].get_xticklabels()]


def test_pictures_of_what_is_not_there_are_refused(model, tmp_path):
    units = inspect_units(model, make_ids(2, 5))
    with pytest.raises(ValueError, match="row=2, but units of 2 rows"):
        figures.draw_units(units, tmp_path / "units.png", row=2)
    with pytest.raises(ValueError, match="4 tokens are given, but units were inspected at 5"):
        figures.draw_units(units, tmp_path / "units.png", list("abcd"))


def test_folders_of_models_hold_what_memories_are_explained_by(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*inspection*")} == {"inspection_memory_mosaic.py"}

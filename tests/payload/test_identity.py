# SPDX-License-Identifier: Apache-2.0
"""Only the weights that wrote a memory, adapters included, continue it."""

import copy
import pickle

import pytest
import torch
from helpers.kinds import KINDS, VOCAB_SIZE, make_memory_model
from helpers.models import NARROWING, by_bandwidth, make_ids, make_model
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from modeling_memory_mosaic import (
    ContinuousMemoryMosaicConfig,
    ContinuousMemoryMosaicModel,
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    identity_memory_mosaic,
    memory_from_state_dict,
    memory_state_dict,
    weights_fingerprint,
)


def read(model, ids, cache=None):
    """Return the logits of `ids`, and the memory after them."""
    with torch.no_grad():
        outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
    return outputs.logits, outputs.past_key_values


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def lora(model):
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(target_modules=["k_proj", "o_proj"], init_lora_weights=False)).eval()


def test_a_memory_of_v2_is_read_on_by_its_own_weights_alone():
    kind, ids = KINDS["mosaic v2"], make_ids(1, 12)
    model = kind.make()
    tensors = memory_state_dict(read(model, ids[:, :8])[1])
    expected = read(model, ids)[0][:, 8:]

    def read_on(reader, **options):
        return read(reader, ids[:, 8:], memory_from_state_dict(reader.config, tensors, **options))[0]

    assert_near(read_on(kind.make()), expected)
    double = kind.make(dtype=torch.float64)
    assert_near(read_on(double, dtype=torch.float64, check_weights=False).float(), expected)
    moved = kind.make()
    with torch.no_grad():
        moved.model.layers[1].contextual_memory.long_term.bandwidth_exponent[0] += 1e-6
    drawn = kind.make(long_term_delay_range=(2, 9), long_term_delay_draw="sequence")
    assert_near(read_on(drawn), expected)  # what is drawn in training changes no answer
    for other in (kind.make(seed=1), moved, kind.make(long_term_delay=5), lora(kind.make())):
        with pytest.raises(ValueError, match="Other weights wrote this memory"):
            read_on(other)
    with pytest.raises(ValueError, match="layers.0.short_term_keys"):
        read_on(kind.make(short_term_window=7))


def test_a_memory_is_read_on_by_its_own_weights_alone(model):
    ids = make_ids(1, 9)
    tensors = memory_state_dict(read(model, ids[:, :5])[1])

    def read_on(reader, **options):
        memory = memory_from_state_dict(reader.config, tensors, **options)
        with torch.no_grad():
            return reader(input_ids=ids[:, 5:], past_key_values=memory).logits

    expected = read(model, ids)[0][:, 5:]
    assert_near(read_on(model), expected)
    assert_near(read_on(make_model()), expected)  # another module of equal weights
    moved = make_model()
    with torch.no_grad():
        moved.model.layers[1].persistent_memory.slot_values[0, 0, 0] += 1e-6
    other_settings = make_model(layer_norm_eps=0.1), make_model(**NARROWING)
    for other in (make_model(seed=1), moved, *other_settings, lora(make_model())):
        with pytest.raises(ValueError, match="Other weights wrote this memory"):
            read_on(other)
    assert_near(read_on(moved, check_weights=False), expected)
    assert_near(read_on(model.double(), dtype=torch.float64, check_weights=False).float(), expected)
    with pytest.raises(ValueError, match="pairs in torch.float32, but the model reads on in torch.float64"):
        read_on(model.double(), check_weights=False)


def test_a_memory_knows_the_adapters_that_wrote_it(model):
    """Disabled adapters are the base, merged ones are other weights, and two adapters are two models."""
    ids = make_ids(1, 9)
    base = memory_state_dict(read(model, ids[:, :5])[1])
    adapted = lora(model)
    adapted.add_adapter("other", LoraConfig(target_modules=["v_proj"], init_lora_weights=False))

    def written():
        return memory_state_dict(read(adapted, ids[:, :5])[1])["fingerprint"]

    prints = [base["fingerprint"], written()]
    with pytest.raises(ValueError, match="another adapter"):
        read(adapted, ids[:, 5:], memory_from_state_dict(model.config, base))
    with adapted.disable_adapter():
        assert torch.equal(written(), base["fingerprint"])
        read(adapted, ids[:, 5:], memory_from_state_dict(model.config, base))
    adapted.set_adapter("other")
    prints.append(written())
    for layer in adapted.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("other", 0.5)
    prints += [written(), torch.tensor([*weights_fingerprint(adapted.merge_and_unload().model)])]
    assert len({bytes(each.tolist()) for each in prints}) == 5


def test_a_memory_in_use_is_its_readers(model):
    """A memory is compared also if it was never saved, and if it was copied or pickled."""
    ids = make_ids(1, 9)
    _, cache = read(model, ids[:, :5])
    for memory in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(ValueError, match="Other weights wrote this memory"):
            read(make_model(seed=1), ids[:, 5:], memory)
        assert_near(read(make_model(), ids[:, 5:], memory)[0], read(model, ids)[0][:, 5:])
    _, cache = read(model, ids[:, :5])
    with torch.no_grad():
        model.model.layers[0].contextual_memory.key_leak.mul_(2)
    with pytest.raises(ValueError, match="have changed since"):
        memory_state_dict(cache)
    _, cache = read(make_model(), ids[:, :5])
    with pytest.raises(ValueError, match="does not exist any more"):
        memory_state_dict(cache)


def test_a_memory_knows_the_bandwidth_that_wrote_it(model):
    """Without an exponent the start means nothing. A configuration may change between two turns, unlike weights."""
    ids, narrowing = make_ids(1, 9), make_model(**NARROWING)
    readers = [model, narrowing, make_model(bandwidth_exponent=0.5, bandwidth_start=3), make_model(**NARROWING)]
    readers[3].config.bandwidth_start = 4
    prints = [weights_fingerprint(reader.model) for reader in readers]
    assert len(set(prints)) == 4 and prints[0] == weights_fingerprint(make_model(bandwidth_start=3).model)
    tensors = memory_state_dict(read(narrowing, ids[:, :5])[1])
    with pytest.raises(ValueError, match="Other weights wrote this memory"):
        read(model, ids[:, 5:], memory_from_state_dict(model.config, tensors))
    memory = memory_from_state_dict(narrowing.config, tensors)
    assert_near(read(make_model(**NARROWING), ids[:, 5:], memory)[0], read(narrowing, ids)[0][:, 5:])
    _, memory = read(model, ids[:, :5])
    model.config.bandwidth_exponent = 0.25
    with pytest.raises(ValueError, match="configuration has changed since this memory was read"):
        read(model, ids[:, 5:], memory)
    with pytest.raises(ValueError, match="weights or settings.*have changed since"):
        memory_state_dict(memory)
    model.config.bandwidth_exponent = 0.0
    assert_near(read(model, ids[:, 5:], memory)[0], read(model, ids)[0][:, 5:])


def test_what_is_written_past_the_counters_of_torch_has_another_fingerprint(model):
    before = weights_fingerprint(model.model)
    model.model.layers[0].contextual_memory.key_scale.data.mul_(1.5)
    assert weights_fingerprint(model.model) != before
    adapted = lora(make_model())
    with adapted.disable_adapter():
        base = weights_fingerprint(adapted.get_base_model().model)
    adapted.merge_adapter()
    assert weights_fingerprint(adapted.get_base_model().model) != base


@by_bandwidth
def test_adapters_are_not_switched_between_two_turns(model):
    adapted, ids = lora(model), make_ids(1, 9)
    _, memory = read(adapted, ids[:, :5])
    with adapted.disable_adapter(), pytest.raises(ValueError, match="Other adapters are in use"):
        read(adapted, ids[:, 5:], memory)
    assert_near(read(adapted, ids[:, 5:], memory)[0], read(adapted, ids)[0][:, 5:])


def test_a_refused_precision_leaves_the_memory_as_it_was(model):
    ids = make_ids(1, 9)
    _, memory = read(model, ids[:, :5])
    before = copy.deepcopy(memory.layers[0].states)
    with pytest.raises(ValueError, match="pairs in torch.float32, but the model reads on in torch.bfloat16"):
        read(model.to(torch.bfloat16), ids[:, 5:], memory)
    assert torch.equal(memory.layers[0].past_ids(), ids[:, :5])
    assert all(torch.equal(state, before[name]) for name, state in memory.layers[0].states.items())


def test_numbers_that_do_not_fit_a_precision_are_refused(model):
    tensors = memory_state_dict(read(model, make_ids(1, 5).int())[1])
    assert tensors["input_ids"].dtype == torch.long
    tensors["layers.0.pending_value"].fill_(1e6)
    with pytest.raises(ValueError, match="layers.0.pending_value holds numbers that are not finite"):
        memory_from_state_dict(model.config, tensors, dtype=torch.float16, check_weights=False)


def test_fingerprints_of_stored_weights(model, tmp_path):
    """Equal weights have one fingerprint, others another, sharded into files, kept on disk or quantized."""
    fingerprint = weights_fingerprint(model.model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert weights_fingerprint(MemoryMosaicForCausalLM.from_pretrained(tmp_path).model) == fingerprint
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers.0": "cpu"}
    places["model.layers.1"] = "disk"
    offloaded = MemoryMosaicForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert weights_fingerprint(offloaded.model) == fingerprint
    ids = make_ids(1, 9)
    tensors = memory_state_dict(read(offloaded, ids[:, :5])[1])
    logits = read(model, ids[:, 5:], memory_from_state_dict(model.config, tensors))[0]
    assert_near(logits, read(model, ids)[0][:, 5:])
    quantized = [make_model(), make_model(), make_model(seed=1)]
    for each in quantized:
        quantize_(each, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(("k_proj", "o_proj")))
    prints = [weights_fingerprint(each.model) for each in quantized]
    assert prints[0] == prints[1] != prints[2] and fingerprint not in prints
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        weights_fingerprint(MemoryMosaicForCausalLM(model.config))


def test_a_memory_of_observations_knows_its_writer():
    torch.manual_seed(0)
    one, other = (ContinuousMemoryMosaicModel(ContinuousMemoryMosaicConfig(num_attention_heads=1)) for _ in range(2))
    observations = torch.randn(1, 9, 6)
    with torch.no_grad():
        tensors = memory_state_dict(one(observations[:, :5], use_cache=True).past_key_values)
        expected = one(observations).predictions[:, 5:]
        for reader in (one, other):
            memory = memory_from_state_dict(reader.config, tensors)
            if reader is other:
                with pytest.raises(ValueError, match="Other weights wrote this memory"):
                    reader(observations[:, 5:], past_key_values=memory)
            else:
                assert_near(reader(observations[:, 5:], past_key_values=memory).predictions, expected)


def quantized(model):
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: isinstance(module, nn.Linear) and "head" not in name)
    return model


def adapted(model):
    config = LoraConfig(target_modules=["k_proj"], init_lora_weights=False)
    return get_peft_model(model, config).base_model.model


@pytest.mark.parametrize("change", [quantized, adapted])
def test_memories_of_quantized_and_adapted_weights_are_read_by_these_alone(change):
    sizes = MemoryMosaicConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    plain = make_memory_model(encoder=sizes, decoder=sizes, dtype=torch.float32)
    model = change(copy.deepcopy(plain))
    memories, rest = model.encode(make_ids(2, 13, vocab_size=VOCAB_SIZE))
    tensors = model.memories_state_dict(**memories)
    read = model.memories_from_state_dict(tensors)
    assert torch.equal(read["memories"], memories["memories"])
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    assert torch.equal(model.generate(**rest, **read, **options), model.generate(**rest, **memories, **options))
    with pytest.raises(ValueError, match="of another encoder"):
        plain.memories_from_state_dict(tensors)


def test_a_fingerprint_of_sharded_weights_is_that_of_the_whole(model):
    """Shard weights as FSDP2 and tensor parallelism do, here on one process."""
    fingerprint = weights_fingerprint(model.model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model.model, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(parameter, DTensor) for parameter in model.model.parameters())
        assert weights_fingerprint(model.model) == fingerprint
    finally:
        distributed.destroy_process_group()


def test_a_fingerprint_is_computed_again_only_if_weights_were_written(monkeypatch):
    model = make_model().base_model
    expected, computed = weights_fingerprint(model), []
    plain = identity_memory_mosaic.acting_weights
    monkeypatch.setattr(identity_memory_mosaic, "acting_weights", lambda m: computed.append(m) or plain(m))
    assert weights_fingerprint(model) == expected and not computed
    first = model.layers[0].contextual_memory.k_proj.weight
    with torch.no_grad():
        first[0, 0] += 1e-6
    changed = weights_fingerprint(model)
    assert changed != expected and len(computed) == 1
    # Past the counters: other numbers elsewhere, and in place.
    for write in (lambda: setattr(first, "data", first.data + 1), lambda: first.data.add_(1)):
        write()
        assert weights_fingerprint(model) != changed
        changed = weights_fingerprint(model)
    model.config.layer_norm_eps *= 2
    assert weights_fingerprint(model) != changed
    assert weights_fingerprint(make_model().base_model) == expected

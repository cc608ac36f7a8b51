# SPDX-License-Identifier: Apache-2.0
"""Memory models whose weights are offloaded or sharded, and batches that leave parts of a model out."""

import pytest
import torch
import torch.distributed
from accelerate import cpu_offload, init_empty_weights
from conftest import make_ids
from kinds import BACKBONES, GPT2, LENGTH, LLAMA, VOCAB_SIZE, make_memory_model
from peft import LoraConfig, get_peft_model
from test_distributed import run_on_two_processes
from test_memory_model import READS
from torch._subclasses import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config

from modeling_memory_mosaic import MemoryModelConfig, MemoryModelForCausalLM
from modeling_memory_mosaic.layout_memory_model import pack_text


SHARDED = """
import sys
import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, sys.argv[1])
from kinds import LLAMA, make_ids, make_memory_model

torch.distributed.init_process_group("gloo")
rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
whole = make_memory_model(decoder=LLAMA, dtype=torch.float32)


def shard(units):
    model = make_memory_model(decoder=LLAMA, dtype=torch.float32)
    for unit in [*units(model), model]:
        fully_shard(unit, mesh=mesh)
    return model


def check(model):
    assert model.encoder.fingerprint() == whole.encoder.fingerprint()
    for lengths in ((4, 12), (10, 12), (3, 4), (10, 10)):
        rows = [make_ids(2, length, seed=length) for length in lengths]
        model(rows[rank], labels=rows[rank]).loss.backward()
        (sum(whole(row, labels=row).loss for row in rows) / 2).backward()
        for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, msg=name)
        model.zero_grad(), whole.zero_grad()
        with torch.no_grad():
            logits, expected = (each(rows[rank], use_cache=False).logits for each in (model, whole))
            torch.testing.assert_close(logits, expected)
    for lengths in ((4, 12), (10, 2)):
        ids = make_ids(2, lengths[rank], seed=3)
        options = {"max_new_tokens": 9 + 3 * rank, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, synced_gpus=True, **options), whole.generate(ids, **options))


check(shard(lambda model: [model.encoder]))
check(shard(lambda model: [model.encoder, model.reader, *model.decoder.model.layers]))
with pytest.raises(ValueError, match="cannot be a unit of FSDP2"):
    shard(lambda model: [model.decoder])(make_ids(2, 12))
print("equal")
torch.distributed.destroy_process_group()
"""
UNTIED = GPT2Config(**GPT2.to_dict() | {"tie_word_embeddings": False})


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


# Every parameter that trains has a gradient


@pytest.mark.parametrize("kind", [*READS, *(name for name in BACKBONES if name != "mosaic")])
@pytest.mark.parametrize("num_tokens", [2, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH])
def test_every_parameter_that_trains_has_a_gradient_whatever_the_length(kind, num_tokens):
    encoder, decoder = BACKBONES.get(kind, BACKBONES["mosaic"])
    model = make_memory_model(encoder=encoder, decoder=decoder, **READS.get(kind, {}))
    ids = make_ids(2, num_tokens, vocab_size=VOCAB_SIZE)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert without_gradient(model) == []
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, model(ids, labels=ids).logits, rtol=0, atol=0)
    reached = any(p.grad.any() for p in model.encoder.parameters())
    assert reached == (num_tokens > LENGTH and model.config.max_memories != 0)


@pytest.mark.parametrize("objective", ["autoencoding", "copy", "blank_copy"])
@pytest.mark.parametrize("decoder", [LLAMA, UNTIED], ids=["llama", "gpt2"])
def test_every_parameter_that_trains_has_a_gradient_whatever_the_objective(objective, decoder):
    weights = {f"{name}_weight": float(name == objective) for name in ("causal", "autoencoding", "copy", "blank_copy")}
    model = make_memory_model(decoder=decoder, unroll_window=4, **weights).train()
    ids = make_ids(2, 2 * LENGTH, vocab_size=VOCAB_SIZE)
    model(ids, labels=ids).loss.backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("settings", [{"freeze_encoder": True}, {"max_memories": 0}, {"memory_read": "prefix"}])
def test_every_parameter_that_trains_has_a_gradient_beside_frozen_ones_and_given_memories(settings):
    model = make_memory_model(**settings).train()
    ids = make_ids(2, LENGTH - 1, vocab_size=VOCAB_SIZE)
    model(ids, labels=ids, memories=torch.randn(2, 1, 1, 24, dtype=torch.float64)).loss.backward()
    assert without_gradient(model) == []
    assert all(p.grad is None for p in model.encoder.parameters()) == ("freeze_encoder" in settings)


def test_adapters_have_gradients_too():
    model = make_memory_model(dtype=torch.float32)
    config = LoraConfig(target_modules=["k_proj", "v_proj", "prefix_proj", "unroll_projs.0", "unroll_projs.1"])
    adapted = get_peft_model(model, config).train()
    ids = make_ids(2, LENGTH - 1, vocab_size=VOCAB_SIZE)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert without_gradient(adapted) == []


def test_a_gradient_of_zeros_comes_of_weights_that_are_not_finite_too():
    """A part that a batch does not use must not change its loss."""
    model = make_memory_model().train()
    with torch.no_grad():
        model.encoder.summary_embeddings.fill_(float("nan"))
    ids = make_ids(2, LENGTH - 1, vocab_size=VOCAB_SIZE)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_data_parallelism_takes_texts_of_any_length(one_process):
    parallel = DistributedDataParallel(make_memory_model().train())
    for num_tokens in (2 * LENGTH, LENGTH - 1, LENGTH, 2 * LENGTH + 1):
        ids = make_ids(1, num_tokens, vocab_size=VOCAB_SIZE)
        parallel(input_ids=ids, labels=ids).loss.backward()


# Offloaded and sharded weights


@pytest.mark.slow
def test_units_of_several_processes_are_called_equally_often_whatever_each_reads(request, tmp_path):
    """If one process left a unit out, the others would wait for it for ever."""
    (tmp_path / "script.py").write_text(SHARDED)
    process = run_on_two_processes(tmp_path / "script.py", request.config.rootpath / "tests")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("equal") == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory_model")
    model = make_memory_model(decoder=LLAMA, dtype=torch.float32, memory_size=10, decoder_chunk_positions=True)
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("part", ["encoder", "decoder", "reader"])
def test_any_part_runs_from_the_disk(part, saved, tmp_path):
    model, folder = saved
    places = {"encoder": "cpu", "decoder": "cpu", "reader": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {part: "disk"}, offload_folder=tmp_path
    ).eval()
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_same_reading(loaded, model)


def test_all_parts_run_from_the_memory_of_the_host(saved):
    model, folder = saved
    loaded = cpu_offload(AutoModelForCausalLM.from_pretrained(folder).eval(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in loaded.parameters())
    assert_same_reading(loaded, model)


@torch.no_grad()
def assert_same_reading(loaded, model):
    ids = make_ids(2, 13, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    torch.testing.assert_close(loaded(ids, labels=ids).loss, model(ids, labels=ids).loss)
    for objective in ("autoencoding", "copy", "blank_copy"):
        text = pack_text(ids)
        torch.testing.assert_close(
            *(each.reconstruct(objective, text, each.gather_memories(text))[0] for each in (loaded, model))
        )
    assert loaded.encoder.fingerprint() == model.encoder.fingerprint()
    memories, rest = model.encode(ids)
    torch.testing.assert_close(loaded.encode(ids)[0]["memories"], memories["memories"])
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**rest, **memories, **options)
    assert torch.equal(loaded.generate(**rest, **memories, **options), expected)


@pytest.mark.parametrize("context", [init_empty_weights, lambda: torch.device("meta"), FakeTensorMode])
@pytest.mark.parametrize("kind", [*READS, *BACKBONES])
def test_a_model_is_laid_out_without_weights(context, kind):
    encoder, decoder = BACKBONES.get(kind, BACKBONES["mosaic"])
    config = MemoryModelConfig(encoder=encoder, decoder=decoder, chunk_length=LENGTH, **READS.get(kind, {}))
    with context():
        model = MemoryModelForCausalLM(config)
    expected = {name: tensor.shape for name, tensor in MemoryModelForCausalLM(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected

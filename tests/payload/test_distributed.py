# SPDX-License-Identifier: Apache-2.0
"""Spread over processes or over devices, the model gives what it gives in one place.

Data parallelism and sharding are trained and resumed from the command line in `test_cli.py`, and texts are shared in
`test_context_parallel.py`.
"""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils.ao import convert_model_to_fp8_ao
from helpers.kinds import KINDS, MOSAIC, for_kinds
from helpers.models import NARROWING
from helpers.processes import run_on_processes, run_on_two_processes
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_memory_mosaic import MemoryMosaicConfig, inspect_continuous_units
from training.tasks.moon_model import predict_from_prefixes


pytestmark = pytest.mark.slow  # processes are started

TENSOR_PARALLEL = """
import sys
import pytest
import torch
import torch.distributed
from transformers.distributed import DistributedConfig

tests, root, *names = sys.argv[1:]
sys.path.insert(0, tests)
from helpers.kinds import KINDS


def check(kind, folder):
    options = {"dtype": torch.float64}  # in float32 the order of sums moves gradients by 1e-4 of their size
    whole = kind.auto.from_pretrained(folder, **options).eval()
    model = kind.auto.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2), **options).eval()
    spread = {
        name for name, parameter in model.named_parameters()
        if hasattr(parameter, "to_local") and 2 * parameter.to_local().numel() == parameter.numel()
    }
    of_slots = ("slot_keys", "slot_values", "key_leak")
    if kind.model == "mosaic v2":
        of_slots = ("gate_proj.weight", "leak_proj.weight", "bandwidth_exponent", "value_mix", "down_proj.weight")
    for ending in (*of_slots, "k_proj.weight", "o_proj.weight"):
        assert any(name.endswith(ending) for name in spread), ending

    inputs = kind.inputs(whole, 2, 33)
    inputs["attention_mask"][0, :5] = 0
    is_token = inputs["attention_mask"] == 1
    with torch.no_grad():
        answer, expected = (kind.answer(each, inputs) for each in (model, whole))
        if kind.model != "classifier":
            answer, expected = answer[is_token], expected[is_token]
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-10)
        if whole.can_generate():
            greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(model.generate(**inputs, **greedy), whole.generate(**inputs, **greedy))
    for each in (model, whole):
        each(**kind.with_labels(inputs)).loss.backward()
    for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        if gradient is not None or expected.grad is not None:
            torch.testing.assert_close(gradient, expected.grad, rtol=1e-4, atol=1e-6, msg=name)

    model.save_pretrained(folder + "-again")
    torch.distributed.barrier()
    saved = kind.auto.from_pretrained(folder + "-again", **options).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in whole.state_dict().items())


for name in names:
    folder = f"{root}/{name}"
    if name == "continuous":
        with pytest.raises(ValueError, match="has no `tp_plan`"):
            KINDS[name].auto.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    else:
        check(KINDS[name], folder)
    print(f"<{name}>", flush=True)
"""


FOUR_HEADS = MemoryMosaicConfig(**MOSAIC.to_dict() | {"num_attention_heads": 4, "head_dim": 6})
SPREAD = {
    "mosaic": {"num_attention_heads": 4},
    "mosaic v2": {"num_attention_heads": 4},
    "memory model": {"encoder": FOUR_HEADS, "decoder": FOUR_HEADS},
    "classifier": {"num_attention_heads": 4, **NARROWING},
    "continuous": {},
}


@pytest.fixture(scope="module")
def spread_over_two_processes(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    (folder / "script.py").write_text(TENSOR_PARALLEL)
    for name, options in SPREAD.items():
        KINDS[name].make(**options).save_pretrained(folder / name)
    return run_on_two_processes(folder / "script.py", request.config.rootpath / "tests", folder, *SPREAD)


@for_kinds()
def test_heads_spread_over_two_processes(kind, spread_over_two_processes):
    """A continuous model has a handful of weights and is refused."""
    process = spread_over_two_processes
    assert process.stdout.count(f"<{kind}>") == 2, process.stderr


# Two processes read batches of unequal length; the mean of their gradients is that of one process that reads both.
DATA_PARALLEL = """
import sys
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[1])
from helpers.kinds import KINDS

torch.distributed.init_process_group("gloo")
rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))


def shard(model):
    names = model._no_split_modules or []
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check(kind, way):
    model, whole = kind.make(**kind.objectives).train(), kind.make(**kind.objectives).train()
    parallel = DistributedDataParallel(model) if way == "DDP" else shard(model)
    for lengths in ((15, 20), (12, 23)):
        batches = [kind.with_labels(kind.inputs(whole, 2, length, seed=length)) for length in lengths]
        parallel(**batches[rank], use_cache=False).loss.backward()
        (sum(whole(**batch, use_cache=False).loss for batch in batches) / 2).backward()
        for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
        model.zero_grad(), whole.zero_grad()
    model.eval(), whole.eval()
    inputs = kind.inputs(whole, 2, 13)
    with torch.no_grad():
        answer, expected = (kind.answer(each, inputs, use_cache=False) for each in (parallel, whole))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


for way in ("DDP", "FSDP2"):
    for kind in KINDS.values():
        check(kind, way)
        print(f"<{kind}, {way}>", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def read_by_two_processes(request, tmp_path_factory):
    script = tmp_path_factory.mktemp("data_parallel") / "script.py"
    script.write_text(DATA_PARALLEL)
    return run_on_two_processes(script, request.config.rootpath / "tests")


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@for_kinds(*KINDS)
def test_the_gradient_of_two_processes_is_that_of_both_batches(kind, way, read_by_two_processes):
    process = read_by_two_processes
    assert process.stdout.count(f"<{kind}, {way}>") == 2, process.stderr


def test_heads_that_cannot_be_spread_are_named(model):
    """Three heads of width 8 would leave 12 features to each of two processes."""
    with pytest.raises(ValueError, match="a number of processes that divides num_attention_heads=3"):
        model.model.layers[0].contextual_memory.split_heads(torch.zeros(1, 2, 12))


# A training on four processes is saved in shards while it goes on, and resumed on two: each step has the loss of one
# process. A vocabulary that shards divide, as the token table is also the head.
TOGETHER = """
import sys
import torch
import torch.distributed
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

tests, root, stage = sys.argv[1:4]
sys.path.insert(0, tests)
from helpers.kinds import KINDS
from modeling_memory_mosaic import context_parallel

torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
ROWS, LENGTH, STEPS = 4, 37, 4
# For each number of processes: replicas, shards, processes that share heads, and processes that share texts.
LAYOUTS = {
    4: {"FSDP2 and TP": (1, 2, 2, 1), "FSDP2 and CP": (1, 2, 1, 2), "HSDP": (2, 2, 1, 1)},
    2: {"FSDP2 and TP": (1, 1, 2, 1), "FSDP2 and CP": (1, 1, 1, 2), "HSDP": (1, 2, 1, 1)},
}[size]


def load(kind, folder, replicas, shards, heads, texts):
    # Returns the model, the number of batches, which of them is this process's, and the group that shares its texts.
    if texts == 1:
        layout = DistributedConfig(dp_replicate_size=replicas, fsdp_size=shards, tp_size=heads)
        model = kind.auto.from_pretrained(folder, distributed_config=layout, dtype=torch.float64)
        return model, replicas * shards, rank // heads, None
    mesh = init_device_mesh("cpu", (shards, texts), mesh_dim_names=("dp_shard", "cp"))
    model = kind.auto.from_pretrained(folder, dtype=torch.float64)
    of_all = mesh._flatten("all")
    for layer in model.model.layers:
        fully_shard(layer, mesh=of_all)
    return fully_shard(model, mesh=of_all), shards, mesh.get_local_rank("dp_shard"), mesh["cp"].get_group()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(step, number=1, part=0):
    ids = KINDS["mosaic"].inputs(KINDS["mosaic"].make(), ROWS, LENGTH, seed=step)["input_ids"]
    return ids[part * ROWS // number : (part + 1) * ROWS // number]


def train(model, optimizer, steps, number, part, group):
    losses = []
    for step in steps:
        ids = batch(step, number, part)
        if group is None:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            with context_parallel(model, group):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / size)
    return losses


def check(kind, name, layout):
    folder, saved = f"{root}/{kind}", f"{root}/{kind}, {name}"
    whole = kind.auto.from_pretrained(folder, dtype=torch.float64).train()
    expected = train(whole, optimizer_of(whole), range(STEPS), 1, 0, None)
    model, *split = load(kind, folder, *layout)
    model.train()
    optimizer = optimizer_of(model)
    if stage == "train":
        losses = train(model, optimizer, range(STEPS // 2), *split)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        group = torch.distributed.new_group(backend="gloo")
        writing = checkpoint.async_save(state, checkpoint_id=saved, process_group=group)
        losses += train(model, optimizer, range(STEPS // 2, STEPS), *split)  # meanwhile
        writing.result()
    else:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        checkpoint.load(state, checkpoint_id=saved)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        losses, expected = train(model, optimizer, range(STEPS // 2, STEPS), *split), expected[STEPS // 2 :]
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)  # computed in float32
    for (key, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        parameter = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(parameter.detach(), other.detach(), rtol=0, atol=1e-8, msg=key)


for kind in sys.argv[4:]:
    for name, layout in LAYOUTS.items():
        check(KINDS[kind], name, layout)
        print(f"<{kind}, {name}, {stage}>", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained_in_several_ways(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(TOGETHER)
    kinds, tests = ("mosaic", "mosaic v2"), request.config.rootpath / "tests"
    for name in kinds:
        KINDS[name].make(num_attention_heads=4, vocab_size=64).save_pretrained(folder / name)
    stages = ((4, "train"), (2, "resume"))
    return [run_on_processes(number, folder / "script.py", tests, folder, stage, *kinds) for number, stage in stages]


@pytest.mark.parametrize("way", ["FSDP2 and TP", "FSDP2 and CP", "HSDP"])
@for_kinds("mosaic", "mosaic v2")
def test_a_sharded_training_resumes_on_another_number_of_processes(kind, way, trained_in_several_ways):
    for process, number, stage in zip(trained_in_several_ways, (4, 2), ("train", "resume"), strict=True):
        assert process.stdout.count(f"<{kind}, {way}, {stage}>") == number, process.stderr[-4000:]


@for_kinds("mosaic", "mosaic v2 otherwise")
def test_shards_that_would_lose_the_tie_of_the_head_are_refused(kind):
    """transformers 5.24 keeps shards of a tied table twice, and trains one of them, where it has to pad them."""
    with pytest.raises(ValueError, match="vocab_size=61 .*pad_to_multiple_of=4"):
        type(kind.make()).maybe_distribute_model(kind.make(), DistributedConfig(fsdp_size=2, tp_size=2), None)


@for_kinds("mosaic", "mosaic v2")
def test_fp8_of_torchao_takes_all_projections_but_the_first_and_the_head(kind):
    """Slots are no linear layers, and gates of v2 have as few outputs as heads: both stay as they are."""
    float8 = pytest.importorskip("torchao.float8.float8_linear")
    config = kind.make(hidden_size=64, num_attention_heads=4, vocab_size=64, intermediate_size=96).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    convert_model_to_fp8_ao(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name, module in linear.items() if not isinstance(module, float8.Float8Linear)}
    gates = {name for name in linear if name.endswith(("_term.gate_proj", "_term.leak_proj"))}
    first = "contextual_memory.short_term.k_proj" if kind.model == "mosaic v2" else "contextual_memory.k_proj"
    assert kept == {f"model.layers.0.{first}", "lm_head"} | gates
    assert (len(gates) > 0) == (kind.model == "mosaic v2")


# Parts of each model that are kept on disk; `test_memory_model_distributed.py` tries those of a memory model one by
# one.
ON_DISK = {
    "mosaic": {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"},
    "mosaic v2": {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"},
    "classifier": {"model.embed_tokens": "cpu", "model.norm": "cpu", "score": "cpu"},
    "memory model": {"decoder": "cpu", "reader": "cpu", "encoder": "disk"},
    "continuous": {"memory": "disk"},
}
for name in ("mosaic", "mosaic v2", "classifier"):
    ON_DISK[name] |= {"model.layers.0": "disk", "model.layers.1": "disk", "model.layers.2": "cpu"}
OFFLOADED = {name: {"num_hidden_layers": 3} for name in ("mosaic", "classifier")}
OFFLOADED["mosaic v2"] = {"num_hidden_layers": 3, "gated_keys": False}
OFFLOADED["continuous"] = {"key_leak": True, "learnable_beta": True}


@for_kinds()
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers_run_from_where_they_are_kept(kind, place, tmp_path):
    whole = kind.make(**OFFLOADED.get(kind.name, {}))
    whole.save_pretrained(tmp_path / "model")
    if place == "cpu":
        model = cpu_offload(kind.auto.from_pretrained(tmp_path / "model"), torch.device("cpu"))
    else:
        options = {"device_map": ON_DISK[kind.name], "offload_folder": tmp_path / "offload"}
        model = kind.auto.from_pretrained(tmp_path / "model", **options)
    assert any(parameter.is_meta for name, parameter in model.named_parameters() if name.endswith("key_leak"))
    inputs = kind.inputs(whole, 2, 13)
    assert torch.equal(kind.answer(model, inputs), kind.answer(whole, inputs))
    if whole.can_generate():
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**inputs, **options), whole.generate(**inputs, **options))
    if kind.model == "continuous":
        x, lengths = inputs["observations"], torch.tensor([2, 7])
        assert torch.equal(model.predict(x, 4), whole.predict(x, 4))
        assert torch.equal(predict_from_prefixes(model, x, lengths, 4), predict_from_prefixes(whole, x, lengths, 4))
        assert torch.equal(inspect_continuous_units(model, x).error, inspect_continuous_units(whole, x).error)

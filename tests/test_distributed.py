# SPDX-License-Identifier: Apache-2.0
"""Spread over processes or over devices, the model gives what it gives in one place.

Data parallelism and sharding are trained and resumed from the command line in `test_cli.py`.
"""

import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_ids, make_model
from transformers import AutoModelForCausalLM


TENSOR_PARALLEL = """
import sys
import torch
import torch.distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import modeling_memory_mosaic

folder, out = sys.argv[1:]
whole = AutoModelForCausalLM.from_pretrained(folder).eval()
model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).eval()
persistent = model.model.layers[1].persistent_memory
for parameter in (persistent.slot_keys, persistent.slot_values, persistent.key_leak):
    assert parameter.to_local().shape[0] == parameter.shape[0] // 2

ids = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
mask[0, :5] = 0
with torch.no_grad():
    logits, expected = (each(ids, attention_mask=mask).logits[mask == 1] for each in (model, whole))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))
for each in (model, whole):
    each(ids, labels=ids).loss.backward()
gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
for name, parameter in model.named_parameters():
    gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)

model.save_pretrained(out)
torch.distributed.barrier()
saved = AutoModelForCausalLM.from_pretrained(out).state_dict()
assert all(torch.equal(saved[name], tensor) for name, tensor in whole.state_dict().items())
print("equal")
"""


def run_on_two_processes(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_heads_spread_over_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(TENSOR_PARALLEL)
    make_model(num_attention_heads=4).save_pretrained(tmp_path / "model")
    process = run_on_two_processes(tmp_path / "script.py", tmp_path / "model", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("equal") == 2


def test_heads_that_cannot_be_spread_are_named(model):
    """Three heads of width 8 on two processes would leave 12 features to each."""
    with pytest.raises(ValueError, match="a number of processes that divides num_attention_heads=3"):
        model.model.layers[0].contextual_memory.split_heads(torch.zeros(1, 2, 12))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers_run_from_where_they_are_kept(place, tmp_path):
    whole = make_model(num_hidden_layers=3)
    whole.save_pretrained(tmp_path / "model")
    if place == "cpu":
        model = cpu_offload(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), torch.device("cpu"))
    else:
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.2": "cpu"}
        device_map |= {"model.layers.0": "disk", "model.layers.1": "disk"}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
    assert model.model.layers[0].contextual_memory.key_leak.device.type == "meta"

    ids = make_ids(2, 9)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), whole.generate(ids, **options))

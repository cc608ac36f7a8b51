# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch programs decode the tokens of the plain model, without transformers and the model's code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.decoding import NUM_NEW, assert_decodes_as, greedy
from helpers.kinds import KINDS
from helpers.models import make_ids
from run_executorch import Programs

from serving.edge.export_executorch import export_executorch
from serving.edge.programs import SHORTEST_PROMPT


MAX_LENGTH = 96
HERE = Path(__file__).resolve().parents[1]
RUN = """
import json, sys
sys.modules |= dict.fromkeys(["transformers", "modeling_memory_mosaic"])
from run_executorch import Programs
print(json.dumps(list(Programs(sys.argv[1]).generate(json.loads(sys.argv[2]), int(sys.argv[3])))))
"""


def decode_elsewhere(folder, ids):
    command = [sys.executable, "-c", RUN, str(folder), json.dumps(ids), str(NUM_NEW)]
    process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def methods(folder):
    programs = Programs(folder)
    return (
        lambda ids: programs.prefill.execute([ids.contiguous()]),
        lambda ids, length, states: programs.decode.execute([ids.contiguous(), length, *states]),
    )


@pytest.mark.parametrize("kind", ["mosaic", "mosaic v2"])
def test_executorch_decodes_token_by_token(kind, tmp_path):
    model = KINDS[kind].make(num_hidden_layers=1)
    export_executorch(model, tmp_path, MAX_LENGTH)
    for num_prompt in (SHORTEST_PROMPT, 20):
        assert_decodes_as(model, *methods(tmp_path), num_prompt)
    ids = make_ids(1, 20)
    assert decode_elsewhere(tmp_path, ids[0].tolist()) == greedy(model, ids)
    with pytest.raises(ValueError, match="the prompt has 2 tokens"):
        next(Programs(tmp_path).generate([1, 2], NUM_NEW))


def test_int8_programs_are_smaller_and_close(tmp_path):
    # Wide enough for linear layers to be most of the model.
    model = KINDS["mosaic"].make(num_hidden_layers=1, hidden_size=96, num_persistent_slots=8)
    export_executorch(model, tmp_path, MAX_LENGTH, int8=True)
    floats = sum(parameter.nbytes for parameter in model.parameters())
    assert (tmp_path / "decode.pte").stat().st_size < 0.7 * floats
    prefill, decode = methods(tmp_path)
    ids = make_ids(1, 40)
    with torch.no_grad():
        expected = model(ids).logits[0, 11:]
        logits, *states = prefill(ids[:, :12])
        rows = [logits[0].clone()]
        for place in range(12, 40):
            logits, *states = decode(ids[:, place : place + 1], torch.tensor([place]), states)
            rows.append(logits[0].clone())
    error = (torch.stack(rows) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 0 < error.min() and error.max() < 0.1


def test_models_that_decode_in_no_static_memory_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No program is made of a MemoryModelForCausalLM"):
        export_executorch(KINDS["memory model"].make(), tmp_path, MAX_LENGTH)

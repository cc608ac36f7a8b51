# SPDX-License-Identifier: Apache-2.0
"""Programs of an edge device decode the tokens of the plain model: as modules of plain tensors, and in onnxruntime."""

import subprocess
import sys

import pytest
import torch
from helpers.decoding import NUM_NEW, assert_decodes_as, greedy
from helpers.kinds import for_kinds
from helpers.models import make_ids
from transformers import StaticCache

from serving.edge.programs import SHORTEST_PROMPT, Decode, Prefill, state_names
from training.paths import CLONE


MAX_LENGTH = 96


def check_programs(kind):
    model = kind.make()
    prefill, decode = Prefill(model, MAX_LENGTH), Decode(model, MAX_LENGTH)

    def decode_and_compare(ids, length, states):
        kept = [state.clone() for state in states]
        outputs = decode(ids, length, states)
        assert all(map(torch.equal, states, kept))  # what a runner hands over stays what it is
        assert len(outputs) == 1 + len(state_names(model.config))
        return outputs

    for num_prompt in (SHORTEST_PROMPT, 20):
        assert_decodes_as(model, prefill, decode_and_compare, num_prompt)


@for_kinds("mosaic", "mosaic v2")
def test_programs_decode_as_the_model_does(kind):
    check_programs(kind)


@pytest.mark.slow
@for_kinds("narrowing mosaic", "mosaic v2 otherwise")
def test_programs_of_other_kernels_decode_as_the_model_does(kind):
    check_programs(kind)


@pytest.mark.slow
@for_kinds("mosaic", "mosaic v2")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec:FutureWarning")  # torch 2.13's exporter and its own pytree
def test_onnx_decodes_token_by_token(kind, tmp_path):
    from serving.edge.export_onnx import export_onnx
    from serving.edge.run_onnx import Programs

    model = kind.make()
    export_onnx(model, tmp_path, MAX_LENGTH)
    programs = Programs(tmp_path)

    def prefill(ids):
        return programs.prefill.run(None, {"input_ids": ids.numpy()})

    def decode(ids, length, states):
        inputs = {"input_ids": ids.numpy(), "length": length.numpy()}
        return programs.decode.run(None, inputs | dict(zip(programs.about["states"], states, strict=True)))

    for num_prompt in (SHORTEST_PROMPT, 20):
        assert_decodes_as(
            model, lambda ids: programs.prefill.run(None, {"input_ids": ids.numpy()}), decode, num_prompt
        )
        ids = make_ids(1, num_prompt, seed=num_prompt)
        assert list(programs.generate(ids[0].tolist(), NUM_NEW)) == greedy(model, ids)
    for prompt in ([1, 2], list(range(40))):
        with pytest.raises(ValueError, match=f"the prompt has {len(prompt)} tokens"):
            next(programs.generate(prompt, NUM_NEW))


def test_the_runner_of_onnx_needs_neither_torch_nor_transformers():
    absent = ["transformers", "modeling_memory_mosaic", "torch"]
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import run_onnx"
    subprocess.run([sys.executable, "-c", code], cwd=CLONE / "serving" / "edge", check=True)


@for_kinds("memory model", "continuous", "classifier")
def test_models_that_decode_in_no_static_memory_are_refused(kind):
    model = kind.make()
    with pytest.raises(ValueError, match=f"No program is made of a {type(model).__name__}"):
        Prefill(model, MAX_LENGTH)


@for_kinds("mosaic", "mosaic v2")
def test_a_static_memory_that_is_no_input_of_a_program_is_refused(kind):
    model = kind.make()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.memory = model, StaticCache(config=model.config, max_cache_len=16)

        def forward(self, ids):
            return self.model(ids, cache=self.memory).logits

    step = Step()
    with torch.no_grad():
        step(make_ids(1, 4))
    with pytest.raises(ValueError, match="no inputs of the program"):
        torch.export.export(step, (make_ids(1, 1),), strict=False)

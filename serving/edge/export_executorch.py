# SPDX-License-Identifier: Apache-2.0
"""Write a model as ExecuTorch programs for CPUs, by XNNPACK: `python -m serving.edge.export_executorch MODEL FOLDER`.

transformers' own exporter makes them (`export_for_generation`): one program for the prompt, `prefill.pte`, and one for
each token more, `decode.pte`. `run_executorch.py` runs them without transformers.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.exporters import ExecutorchConfig, ExecutorchExporter, PT2EQuantizer
from transformers.exporters.utils import patch_attributes

import modeling_memory_mosaic  # noqa: F401  (registers the models)
from serving.edge.programs import SHORTEST_PROMPT, Decode, Prefill, decode_inputs, description


def plain_lerp(original: Callable) -> Callable:
    """Blend by arithmetic: torch keeps the strides of an open length by an operator that ExecuTorch 1.5.1 lacks."""
    return lambda start, end, weight: start + weight * (end - start)


class ProgramExporter(ExecutorchExporter):
    """transformers' exporter, which exports our programs of plain tensors in place of a model and its cache.

    It flattens a cache into all that its layers hold. Ours hold more than tensors, such as which weights wrote them.
    """

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> Any:
        max_length = sample_inputs["cache"].layers[0].max_cache_len
        program, inputs = Prefill(model, max_length).eval(), {"input_ids": sample_inputs["input_ids"]}
        if inputs["input_ids"].shape[1] == 1:  # a step of decoding
            program, inputs = Decode(model, max_length).eval(), decode_inputs(program)
        with patch_attributes([(torch, "lerp", plain_lerp)]):
            return super().export_program(program, inputs, config)


def int8_quantizer() -> PT2EQuantizer:
    """Return what makes the matrices of linear layers int8, by output; their inputs are rounded as they come."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    class LinearQuantizer(XNNPACKQuantizer):
        def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            """Leave the graph as it is: numbers that count slots would become floats, which index nothing."""
            return model

    settings = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    return PT2EQuantizer(LinearQuantizer().set_module_type(torch.nn.Linear, settings))


def export_executorch(model: PreTrainedModel, folder: Path, max_length: int, int8: bool = False) -> None:
    """Write `prefill.pte`, `decode.pte` and `programs.json`.

    Args:
        max_length: tokens of the longest text, the prompt included.
        int8: whether linear layers are quantized.

    Raises:
        ValueError: if the model has no static memory.
    """
    about = description(Decode(model, max_length))
    # As many tokens as a prompt has by which the length is left open.
    sample = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    quantizer = int8_quantizer() if int8 else None
    tokens = {"input_ids": {1: Dim("tokens", min=SHORTEST_PROMPT, max=max_length)}}
    configs = {
        "prefill": ExecutorchConfig(dynamic_shapes=tokens, quantizer=quantizer),
        "decode": ExecutorchConfig(quantizer=quantizer),
    }
    static = GenerationConfig(cache_implementation="static", max_cache_len=max_length)
    exporter = ProgramExporter()
    exported = exporter.export_for_generation(model, sample, configs, generation_config=static)
    folder.mkdir(parents=True, exist_ok=True)
    for name, component in exported.components.items():
        exporter.save_program(component.program, folder / f"{name}.pte")
    (folder / "programs.json").write_text(json.dumps(about, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="An exported folder, such as that of `make demo`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-length", type=int, default=1024, help="Tokens of the longest text.")
    parser.add_argument("--int8", action="store_true", help="Quantize linear layers.")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    export_executorch(model, arguments.folder, arguments.max_length, arguments.int8)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()

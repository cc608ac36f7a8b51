# SPDX-License-Identifier: Apache-2.0
"""Write a model as ONNX programs: `python -m serving.edge.export_onnx MODEL FOLDER --max-length 1024`.

`prefill.onnx` reads a prompt, `decode.onnx` one token more. The memory's tensors are inputs, such as
`layers.0.contextual_sum`, and outputs, such as `new.layers.0.contextual_sum`. `run_onnx.py` runs them without torch.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import modeling_memory_mosaic  # noqa: F401  (registers the models)
from serving.edge.programs import SHORTEST_PROMPT, Decode, Prefill, decode_inputs, description


def export_onnx(model: PreTrainedModel, folder: Path, max_length: int) -> None:
    """Write `prefill.onnx`, `decode.onnx` and `programs.json`.

    Args:
        max_length: tokens of the longest text, the prompt included.

    Raises:
        ValueError: if the model has no static memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefill, decode = Prefill(model, max_length).eval(), Decode(model, max_length).eval()
    new = [f"new.{name}" for name in decode.names]
    tokens = {1: Dim("tokens", min=SHORTEST_PROMPT, max=max_length)}
    options = {"dynamo": True, "verbose": False}
    with torch.no_grad():
        ids = torch.ones(1, 8, dtype=torch.long)
        program = torch.onnx.export(
            prefill,
            (ids,),
            dynamic_shapes=(tokens,),
            input_names=["input_ids"],
            output_names=["logits", *new],
            **options,
        )
        program.save(folder / "prefill.onnx")
        names = {"input_names": ["input_ids", "length", *decode.names], "output_names": ["logits", *new]}
        torch.onnx.export(decode, tuple(decode_inputs(prefill).values()), **names, **options).save(
            folder / "decode.onnx"
        )
    (folder / "programs.json").write_text(json.dumps(description(decode), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="An exported folder, such as that of `make demo`.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max-length", type=int, default=1024, help="Tokens of the longest text.")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    export_onnx(model, arguments.folder, arguments.max_length)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()

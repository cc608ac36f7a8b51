# SPDX-License-Identifier: Apache-2.0
"""Continue a text by ONNX programs, with onnxruntime, numpy and tokenizers alone: `python run_onnx.py FOLDER TEXT`."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


class Programs:
    def __init__(self, folder):
        self.about = json.loads((Path(folder) / "programs.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        sessions = [Path(folder) / f"{name}.onnx" for name in ("prefill", "decode")]
        self.prefill, self.decode = (onnxruntime.InferenceSession(path, options) for path in sessions)

    def generate(self, ids, count):
        """Yield the likeliest next token `count` times, behind a prompt of ids."""
        if not self.about["shortest_prompt"] <= len(ids) <= self.about["max_length"] - count:
            raise ValueError(f"the prompt has {len(ids)} tokens: give as many as programs.json says, less {count}")
        logits, *states = self.prefill.run(None, {"input_ids": np.array([ids])})
        for length in range(len(ids), len(ids) + count):
            yield (token := int(logits.argmax()))
            inputs = {"input_ids": np.array([[token]]), "length": np.array([length])}
            logits, *states = self.decode.run(None, inputs | dict(zip(self.about["states"], states, strict=True)))


if __name__ == "__main__":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    prompt = tokenizer.encode(sys.argv[2]).ids
    programs, began = Programs(sys.argv[1]), time.process_time()
    print(tokenizer.decode(prompt + list(programs.generate(prompt, 64))))
    print(f"{64 / (time.process_time() - began):,.0f} tokens per second of one core", file=sys.stderr)

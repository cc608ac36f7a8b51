# SPDX-License-Identifier: Apache-2.0
"""Continue a text by ExecuTorch programs, without transformers: `python run_executorch.py FOLDER TEXT`."""

import json
import sys
import time
from pathlib import Path

import torch
from executorch.runtime import Runtime


class Programs:
    def __init__(self, folder):
        self.about = json.loads((Path(folder) / "programs.json").read_text())
        programs = [Runtime.get().load_program(Path(folder) / f"{name}.pte") for name in ("prefill", "decode")]
        self.programs = programs  # a method does not keep its program
        self.prefill, self.decode = (program.load_method("forward") for program in programs)

    def generate(self, ids, count):
        """Yield the likeliest next token `count` times, behind a prompt of ids."""
        if not self.about["shortest_prompt"] <= len(ids) <= self.about["max_length"] - count:
            raise ValueError(f"the prompt has {len(ids)} tokens: give as many as programs.json says, less {count}")
        logits, *states = self.prefill.execute([torch.tensor([ids])])
        for length in range(len(ids), len(ids) + count):
            yield (token := int(logits.argmax()))
            logits, *states = self.decode.execute([torch.tensor([[token]]), torch.tensor([length]), *states])


if __name__ == "__main__":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(sys.argv[1]) / "tokenizer.json"))
    prompt = tokenizer.encode(sys.argv[2]).ids
    programs, began = Programs(sys.argv[1]), time.process_time()
    print(tokenizer.decode(prompt + list(programs.generate(prompt, 64))))
    print(f"{64 / (time.process_time() - began):,.0f} tokens per second of one core", file=sys.stderr)

# SPDX-License-Identifier: Apache-2.0
"""A stranger's view of an exported folder: a script for an isolated process, which imports nothing of this clone.

Reads a job as JSON from standard input and prints, as its last line, the generated texts and a checksum of the logits.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from transformers import PreTrainedModel, pipeline, set_seed


def logits_hash(model: PreTrainedModel, ids: list[list[int]]) -> str:
    """Return the sha256 of a model's float32 logits in evaluation mode; `ValueError` if one is not finite."""
    input_ids = torch.tensor(ids)
    with torch.no_grad():
        logits = model.eval()(input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or too large")
    return hashlib.sha256(logits.float().contiguous().numpy().tobytes()).hexdigest()


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Load `job["folder"]` through a pipeline with its own code, hash its logits, continue its prompts."""
    # As many as the other process has: the last bit of a sum may depend on it.
    torch.set_num_threads(job["threads"])
    generator: Any = pipeline("text-generation", model=job["folder"], trust_remote_code=True, device="cpu")
    if job["adapter"] is not None:
        from peft import PeftModel  # only here: a model without an adapter needs no PEFT

        generator.model = PeftModel.from_pretrained(generator.model, job["adapter"])
    digest = logits_hash(generator.model, job["ids"])
    set_seed(job["seed"])
    texts = [generator(prompt, **job["generation"])[0]["generated_text"] for prompt in job["prompts"]]
    return {"logits": digest, "texts": texts}


if __name__ == "__main__":
    # The last line is the answer: libraries may have printed before it.
    print(json.dumps(answer(json.load(sys.stdin))))

# SPDX-License-Identifier: Apache-2.0
"""Export: a folder that loads anywhere, written whole or not at all, and proven in a clean process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from training import clean_process
from training.files import staged_folder, write_checksums


# Prefixes of the environment variables that a clean process inherits: paths of programs and libraries, and what may
# change the last bit of a sum.
_CLEAN_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_", "TMP", "TEMP", "SYSTEMROOT", "OMP_", "MKL_", "ATEN_")


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    checksums: bool = False,
) -> None:
    """Write weights, configuration, generation settings, tokenizer and, if the model is not of transformers, its code.

    Args:
        model: any causal language model; it is left with its key-value cache switched on.
        tokenizer: saved beside it, if there is one; the model has to have its special tokens already.
        folder: written atomically; what was there is replaced.
        state_dict: the weights, where the model holds only a shard of them.
        checksums: whether the folder gets a list of its checksums: for what a run goes on with, not for readers.
    """
    model.config.use_cache = True  # Trainer switches it off, and generating from the folder would be slow for ever
    with staged_folder(Path(folder)) as staged:
        model.save_pretrained(staged, state_dict=state_dict)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if checksums:
            write_checksums(staged)


def run_isolated(
    arguments: list[str], input: str = "", cached: Callable[[Path], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python as on a stranger's machine: isolated from this clone, offline, with an empty cache.

    Args:
        arguments: of the interpreter: a script, or `-c` and code.
        input: for its standard input.
        cached: fills the folder of the cache with files that then count as downloaded; by default it stays empty.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith(_CLEAN_ENVIRONMENT)}
    with tempfile.TemporaryDirectory() as home:
        if cached is not None:
            cached(Path(home))
        return subprocess.run(
            [sys.executable, "-I", "-B", *arguments],  # -B: no bytecode in the folder that is tested
            input=input,
            capture_output=True,
            text=True,
            cwd="/",
            env=environment | {"HF_HOME": home, "HF_HUB_OFFLINE": "1"},
        )


def _fixed_input(vocab_size: int) -> list[list[int]]:
    # A large odd stride visits the vocabulary in no particular order; two rows, so that batching takes part.
    return [[(row + 7919 * column) % vocab_size for column in range(24)] for row in range(2)]


def _run_clean_process(job: dict[str, Any]) -> dict[str, Any]:
    process = run_isolated([clean_process.__file__], input=json.dumps(job))
    if process.returncode != 0:
        raise RuntimeError(f"{job['folder']} does not load in a clean process:\n{process.stderr.strip()}")
    return json.loads(process.stdout.splitlines()[-1])


def verify_export(
    folder: Path,
    prompts: list[str],
    max_new_tokens: int = 128,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    adapter: Path | None = None,
    **sampling: Any,
) -> list[str]:
    """Load an exported folder as on a stranger's machine, and generate from it.

    A new Python process, isolated from this clone, offline and with an empty cache, loads the folder through
    `pipeline("text-generation", trust_remote_code=True)`. Its logits on fixed input must
    equal those of `model` bit for bit.

    Args:
        folder: what `export_model` wrote, or a checkpoint.
        prompts: one text is generated for each.
        max_new_tokens: length of each continuation, in tokens.
        seed: of the sampling.
        model: the model whose logits are expected; by default the folder, loaded with this clone's code.
        adapter: a folder of PEFT that the process puts on top of the model.
        **sampling: further arguments of `generate`, such as `temperature`.

    Returns:
        Prompt and continuation, for each prompt.

    Raises:
        RuntimeError: the process failed (with what it printed), or its logits differ.
    """
    folder = Path(folder)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    model.cpu()
    ids = _fixed_input(model.config.vocab_size)
    job = {
        "folder": str(folder.resolve()),
        "adapter": None if adapter is None else str(adapter.resolve()),
        "prompts": prompts,
        "generation": {"max_new_tokens": max_new_tokens, **sampling},
        "seed": seed,
        "threads": torch.get_num_threads(),  # the order of summation, and so the last bit, may depend on it
        "ids": ids,
    }
    answer = _run_clean_process(job)
    expected = clean_process.logits_hash(model, ids)
    if answer["logits"] != expected:
        raise RuntimeError(
            f"{folder} loads in a clean process, but computes other logits than the model it was made from "
            f"(sha256 {answer['logits']}, expected {expected}): do not use it"
        )
    return answer["texts"]

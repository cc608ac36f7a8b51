# SPDX-License-Identifier: Apache-2.0
"""Size of edge programs, and tokens a second on one core beside transformers: `python -m serving.edge.benchmark`.

All run in one process on one core, in turn, so that a machine whose speed drifts slows all alike. The measure is the
ratio to transformers' own decoding (eager, a growing memory) in each round, and its median over rounds.
"""

import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, PreTrainedModel, set_seed

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM
from serving.edge import run_executorch, run_onnx
from serving.edge.export_executorch import export_executorch
from serving.edge.export_onnx import export_onnx
from training.files import write_json
from training.result import cpu_name


# Those of `benchmarks/speed.py`.
SIZES: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
MAX_LENGTH, PROMPT_LENGTH, ANSWER_LENGTH = 512, 64, 64

# Yields the likeliest next token so many times, behind a prompt of ids.
Generate = Callable[[list[int], int], Iterator[int]]


def generate_eagerly(model: PreTrainedModel, ids: list[int], count: int) -> Iterator[int]:
    """Yield the likeliest next token `count` times as transformers decodes, without what `generate` adds to a step."""
    memory = DynamicCache(config=model.config)
    read = torch.tensor([ids])
    for _ in range(count):
        logits = model(input_ids=read, cache=memory, use_cache=True, logits_to_keep=1).logits
        yield (token := int(logits.argmax()))
        read = torch.tensor([[token]])


def export(model: PreTrainedModel, folder: Path) -> tuple[dict[str, Generate], dict[str, dict[str, int]]]:
    """Write all programs of a model; return what runs each, and the bytes of the files of each."""
    formats: dict[str, tuple[Any, Callable[[Path], None]]] = {
        "ExecuTorch, float32": (run_executorch, lambda path: export_executorch(model, path, MAX_LENGTH)),
        "ExecuTorch, int8": (run_executorch, lambda path: export_executorch(model, path, MAX_LENGTH, int8=True)),
        "ONNX, float32": (run_onnx, lambda path: export_onnx(model, path, MAX_LENGTH)),
    }
    runners: dict[str, Generate] = {}
    sizes = {}
    for name, (runner, write) in formats.items():
        write(folder / name)
        runners[name] = runner.Programs(folder / name).generate
        files = {stem: list((folder / name).glob(f"{stem}.*")) for stem in ("prefill", "decode")}
        sizes[name] = {stem: sum(path.stat().st_size for path in found) for stem, found in files.items()}
    return runners, sizes


def seconds_per_token(generate: Generate, prompt: list[int]) -> float:
    """Return the seconds of a decoding step: from the first token of an answer to its last."""
    tokens = generate(prompt, ANSWER_LENGTH + 1)
    next(tokens)  # reads the prompt
    start = time.perf_counter()
    for _ in tokens:
        pass
    return (time.perf_counter() - start) / ANSWER_LENGTH


@torch.no_grad()
def measure(rounds: int) -> dict[str, Any]:
    """Return the sizes and speeds of all programs of a model with random weights, a row for each."""
    set_seed(0)
    model = MemoryMosaicForCausalLM(MemoryMosaicConfig(**SIZES)).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    prompt = torch.randint(SIZES["vocab_size"], (PROMPT_LENGTH,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        runners, sizes = export(model, Path(folder))
        runners = {"transformers": lambda ids, count: generate_eagerly(model, ids, count), **runners}
        measured: dict[str, list[float]] = {runner: [] for runner in runners}
        for round_number in range(rounds + 1):
            for runner, generate in runners.items():
                seconds = seconds_per_token(generate, prompt)
                if round_number > 0:  # the first allocates
                    measured[runner].append(seconds)
    rows = []
    for runner, ours in measured.items():
        ratios = [theirs / our for our, theirs in zip(ours, measured["transformers"], strict=True)]
        row = {"program": runner, "tokens_per_second": 1 / statistics.median(ours), "ratio": statistics.median(ratios)}
        rows.append({**row, "ratios": ratios, "bytes": sizes.get(runner)})
        typer.echo(f"{runner}: {row['tokens_per_second']:.0f} tokens/s, {row['ratio']:.2f} of transformers")
    return {"parameters": model.num_parameters(), "bytes_of_weights": weights, "rows": rows}


def main(
    rounds: Annotated[int, typer.Option(help="How many times each program is measured.")] = 11,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print. A ratio above 1 means that a program is faster than transformers."""
    # One core for all: XNNPACK and onnxruntime would else count threads each in its own way.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    packages = ("torch", "transformers", "executorch", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages}
    setting = {"load_before": os.getloadavg()[0], "cpu": cpu_name(), "rounds": rounds, "sizes": SIZES}
    setting |= {"max_length": MAX_LENGTH, "prompt_length": PROMPT_LENGTH, "answer_length": ANSWER_LENGTH}
    typer.echo(json.dumps(setting | {"versions": versions}))
    measured = measure(rounds)
    if output is not None:
        write_json(output, {**setting, "versions": versions, **measured})


if __name__ == "__main__":
    typer.run(main)

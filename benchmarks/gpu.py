# SPDX-License-Identifier: Apache-2.0
"""Correctness and speed on one GPU: `python -m benchmarks.gpu --output benchmarks/gpu.json`, in at most eight minutes.

Correctness comes first: logits and gradients in each precision and by each attention function, beside a float64 model
with the same rounded weights on the CPU. Then speed and memory beside GPT-2 and Llama, with equal attention functions,
and the share of a training step that leaky sums and normalisation take. What there is no time for is named.
"""

import copy
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import DynamicCache
from transformers.utils import is_flash_attn_2_available

from benchmarks.speed import build
from modeling_memory_mosaic.modeling_memory_mosaic import MemoryMosaicPreTrainedModel
from modeling_memory_mosaic.ops_memory_mosaic import leaky_average, scale_to_length
from training.files import write_json


SECONDS = 480
SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
# About 0.1 and 0.4 thousand million parameters.
LARGE: dict[str, dict[str, Any]] = {
    "0.1 B": {"vocab_size": 50_304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "0.4 B": {"vocab_size": 50_304, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
LENGTHS = (1024, 4096, 16_384)
TOKENS_PER_STEP = 16_384
NUM_DECODED = 64
# Largest error of logits and of gradients, as a share of their norm. Kernels of half precision sum in another order.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
HALF = (torch.float16, torch.bfloat16)


class Way(NamedTuple):
    """How a model computes: precision, attention function, and whether it is compiled."""

    dtype: torch.dtype
    attention: str
    is_compiled: bool = False

    @property
    def name(self) -> str:
        """Return the way in words."""
        return f"{str(self.dtype).removeprefix('torch.')}, {self.attention}{', compiled' if self.is_compiled else ''}"


def ways() -> Iterator[Way]:
    """Yield all ways; FlashAttention, where it is installed, knows half precision only."""
    for dtype in BOUNDS:
        for attention in ("eager", "sdpa", "flex_attention"):
            yield Way(dtype, attention)
        if dtype in HALF and is_flash_attn_2_available():
            yield Way(dtype, "flash_attention_2")
        yield Way(dtype, "sdpa", is_compiled=True)


# Correctness


def _answers(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and the gradient of all parameters, in float64 on the CPU."""
    model.zero_grad()
    outputs = model(input_ids=ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return outputs.logits.detach().double().cpu(), torch.cat(gradients).double().cpu()


def _decoded(model: Any, ids: torch.Tensor, offloading: bool) -> torch.Tensor:
    """Return the logits of ids that are read half at once and half one by one."""
    cache = DynamicCache(config=model.config, offloading=offloading)
    half = ids.shape[1] // 2
    with torch.no_grad():
        logits = [model(input_ids=ids[:, :half], past_key_values=cache).logits]
        logits += [model(input_ids=token, past_key_values=cache).logits for token in ids[:, half:].split(1, dim=1)]
    return torch.cat(logits, dim=1).double().cpu()


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def check(way: Way, device: str, sizes: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return the errors of one way beside float64, and whether they are within the bound of its precision."""
    ids = torch.randint(sizes["vocab_size"], (2, num_tokens), generator=torch.Generator().manual_seed(0))
    rounded: Any = build("mosaic", sizes, num_tokens)
    rounded = rounded.to(way.dtype)
    exact = copy.deepcopy(rounded).double()
    exact.set_attn_implementation("eager")
    model: Any = rounded.to(device)
    model.set_attn_implementation(way.attention)
    forward: Any = torch.compile(model) if way.is_compiled else model
    actual, expected = _answers(forward, ids.to(device)), _answers(exact, ids)
    errors = {"logits": _error(actual[0], expected[0]), "gradient": _error(actual[1], expected[1])}
    if not way.is_compiled:
        errors["cache"] = _error(_decoded(model, ids.to(device), offloading=False), expected[0])
    if not way.is_compiled and device != "cpu":
        errors["offloaded cache"] = _error(_decoded(model, ids.to(device), offloading=True), expected[0])
    bound = BOUNDS[way.dtype]
    return {"way": way.name, "errors": errors, "bound": bound, "ok": max(errors.values()) <= bound}


# Speed


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _seconds(step: Callable[[], Any], device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


def tasks_of(model: Any, num_tokens: int, tokens_per_step: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return by name what is timed of a model: a training step, reading a text, and decoding behind it."""
    rows = max(1, tokens_per_step // num_tokens)
    ids = torch.randint(model.config.vocab_size, (rows, num_tokens), device=device)

    def train() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    @torch.no_grad()
    def prefill() -> Any:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:1], past_key_values=cache, logits_to_keep=1)
        return cache

    read = prefill()

    @torch.no_grad()
    def decode() -> None:
        for _ in range(NUM_DECODED):
            model(input_ids=ids[:1, :1], past_key_values=read, logits_to_keep=1)

    return {"training step": train, "prefill": prefill, "decode": decode}


def compare(
    size: str, sizes: dict[str, Any], num_tokens: int, tokens_per_step: int, attention: str, device: str, rounds: int
) -> dict[str, Any]:
    """Return median seconds and peak memory of each task and model, timed in turn, and the ratios of peers to ours."""
    tasks = {}
    for name in ("mosaic", "gpt2", "llama"):
        model: Any = build(name, sizes, num_tokens + NUM_DECODED * (rounds + 2))
        model = model.to(device, torch.bfloat16)
        model.set_attn_implementation(attention)
        tasks[name] = tasks_of(model, num_tokens, tokens_per_step, device)
    row: dict[str, Any] = {"size": size, "num_tokens": num_tokens, "attention": attention, "seconds": {}, "memory": {}}
    for what in tasks["mosaic"]:
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for number in range(rounds + 1):
            for name in list(tasks)[:: 1 if number % 2 else -1]:
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                before = 0 if device == "cpu" else torch.cuda.memory_allocated()
                seconds = _seconds(tasks[name][what], device)
                if number:  # the first is a warm-up
                    times[name].append(seconds)
                peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated() - before
                row["memory"][f"{what}, {name}"] = peak
        row["seconds"][what] = {name: statistics.median(values) for name, values in times.items()}
        ours = times["mosaic"]
        ratios = {name: [b / a for a, b in zip(ours, times[name], strict=True)] for name in ("gpt2", "llama")}
        row.setdefault("ratios", {})[what] = {
            name: [statistics.median(values), min(values), max(values)] for name, values in ratios.items()
        }
    return row


def leaky_share(
    sizes: dict[str, Any], num_tokens: int, tokens_per_step: int, step_seconds: float, device: str
) -> float:
    """Return the share of a training step that the leaky sums and normalisations of all layers take, both passes."""
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"] // sizes["num_attention_heads"]
    shape = (max(1, tokens_per_step // num_tokens), heads, num_tokens, width)
    states = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    leak = torch.linspace(0.5, 5.0, heads, device=device).requires_grad_()
    length = torch.ones(heads, 1, 1, device=device)

    def both() -> None:
        sums, _ = leaky_average(states, leak)
        scale_to_length(sums, length).sum().backward()

    def values() -> None:
        scale_to_length(states, length).sum().backward()

    # The first of each is a warm-up.
    times = [[_seconds(step, device) for _ in range(6)][1:] for step in (both, values)]
    of_sums, of_values = map(statistics.median, times)
    # A layer has two sums with their normalisation, and values that are normalised alone.
    return sizes["num_hidden_layers"] * (2 * of_sums + of_values) / step_seconds


# All of it


class Report:
    """Results that are on the disk as soon as they are measured, until the time is over.

    Args:
        output: JSON file; none is written without it.
        seconds: from now on, after which nothing more is begun.
    """

    def __init__(self, output: Path | None, seconds: float, **setting: Any):
        self.output, self.end = output, time.monotonic() + seconds
        self.content: dict[str, Any] = {**setting, "correctness": [], "speed": [], "left_out": []}

    def add(self, kind: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Measure and keep one row, or keep its name if the time is over."""
        if time.monotonic() > self.end:
            self.content["left_out"].append(name)
        else:
            row = make()
            self.content[kind].append(row)
            typer.echo(json.dumps(row))
        if self.output is not None:
            write_json(self.output, self.content)


def measure(
    device: str,
    report: Report,
    small: dict[str, Any] = SMALL,
    large: dict[str, dict[str, Any]] = LARGE,
    lengths: tuple[int, ...] = LENGTHS,
    tokens_per_step: int = TOKENS_PER_STEP,
    rounds: int = 5,
) -> None:
    """Fill a report.

    Raises:
        RuntimeError: if any way is wrong: the speed of a wrong answer is no result.
    """
    # The shift identity makes its mask plain causality, which FlashAttention has. It is off until this has passed.
    MemoryMosaicPreTrainedModel._supports_flash_attn = True
    torch.backends.cuda.matmul.allow_tf32 = False
    for way in ways():
        report.add("correctness", way.name, functools.partial(check, way, device, small, min(300, lengths[0])))
    if wrong := [row["way"] for row in report.content["correctness"] if not row["ok"]]:
        raise RuntimeError(f"wrong beyond the bounds of their precision: {'; '.join(wrong)}")
    attentions = ["sdpa"] + (["flash_attention_2"] if is_flash_attn_2_available() else [])
    # The longest, which takes most of the time, last.
    for num_tokens, (size, sizes), attention in itertools.product(lengths, large.items(), attentions):

        def compared(arguments: tuple[Any, ...] = (size, sizes, num_tokens, attention)) -> dict[str, Any]:
            size, sizes, num_tokens, attention = arguments
            row = compare(size, sizes, num_tokens, tokens_per_step, attention, device, rounds)
            step = row["seconds"]["training step"]["mosaic"]
            return row | {"leaky_share": leaky_share(sizes, num_tokens, tokens_per_step, step, device)}

        report.add("speed", f"{size}, {num_tokens} tokens, {attention}", compared)


def main(output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None) -> None:
    """Check and measure on the GPU of this machine."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this machine has no CUDA GPU: `make bench` measures on the CPU")
    setting = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    # A comparison of the largest takes about a minute, and is not begun later.
    measure("cuda", Report(output, SECONDS - 60, **setting))


if __name__ == "__main__":
    typer.run(main)

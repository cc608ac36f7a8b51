# SPDX-License-Identifier: Apache-2.0
"""Speed and memory beside transformers' GPT-2 and Llama of equal size: `make bench`, or see `--help`.

Two models at a time run in one process, in turn, so that a machine whose speed drifts slows both alike. The measure is
the ratio of each pair of runs, and the median over the pairs. Dropout is off and attention is sdpa. Peak memory is the
largest resident size of a new process, above its size before the model was built.
"""

import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM, leaky_average
from training.files import write_json
from training.result import cpu_name
from training.tables import markdown_table


SIZES: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
TOKENS_PER_STEP = 2048
# Tokens that a measurement decodes.
NUM_DECODED = 32
# GPT-2's position table must reach beyond the longest context.
MAX_LENGTH = 2048 + NUM_DECODED
PEERS = {"gpt2": "GPT-2", "llama": "Llama"}
UNITS = {"training step": "s", "prefill": "s", "decode": "tokens/s", "leaky average": "ms"}


def build(name: str) -> PreTrainedModel:
    """Return the benchmarked model: `mosaic`, or `gpt2` or `llama` whose blocks have equally many parameters."""
    torch.manual_seed(0)
    if name == "mosaic":
        return MemoryMosaicForCausalLM(MemoryMosaicConfig(**SIZES, attention_dropout=0.0, hidden_dropout=0.0))
    if name == "llama":
        # Llama's feed-forward layer has three matrices, GPT-2's two of four times the width.
        intermediate_size = 8 * SIZES["hidden_size"] // 3
        return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=intermediate_size, tie_word_embeddings=True))
    config = GPT2Config(
        **SIZES,
        n_positions=MAX_LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # GPT-2's own ids lie beyond this vocabulary.
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its class name does not say it, and each forward would warn
    return model


def random_ids(batch_size: int, num_tokens: int) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch_size, num_tokens), generator=torch.Generator().manual_seed(0))


def training_step(model: PreTrainedModel, num_tokens: int) -> Callable[[], float]:
    """Return a function that measures the seconds of forward and backward over 2,048 tokens, `num_tokens` a row."""
    ids = random_ids(TOKENS_PER_STEP // num_tokens, num_tokens)

    def run() -> float:
        model.train().zero_grad()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return time.perf_counter() - start

    return run


def prefill(model: PreTrainedModel, num_tokens: int) -> Callable[[], float]:
    """Return a function that measures the seconds to read one text of `num_tokens` into a cache."""
    ids = random_ids(1, num_tokens)

    @torch.no_grad()
    def run() -> float:
        model.eval()
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    return run


def decode(model: PreTrainedModel, num_tokens: int) -> Callable[[], float]:
    """Return a function that measures tokens per second, read one at a time behind `num_tokens` in the cache."""
    ids = random_ids(1, num_tokens)

    @torch.no_grad()
    def run() -> float:
        # Each run reads the text again, untimed, for decoding makes the cache longer.
        cache = DynamicCache(config=model.config)
        model.eval()(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(NUM_DECODED):
            model(input_ids=ids[:, :1], past_key_values=cache, logits_to_keep=1)
        return NUM_DECODED / (time.perf_counter() - start)

    return run


def dense_leaky_average(states: torch.Tensor, leak: torch.Tensor) -> torch.Tensor:
    """Return the sums of `leaky_average` by a T x T table of decays for each head, as the authors' code computes them.

    Args:
        states: `(B, H, T, D)`.
        leak: `(H,)`.
    """
    positions = torch.arange(states.shape[2], dtype=states.dtype)
    # Future lags are cut by `tril`. Without the clamp their exp() overflows, and gradients are NaN.
    lags = (positions[:, None] - positions).clamp(min=0)
    return torch.exp(-leak[:, None, None] * lags).tril() @ states


def leaky_step(average: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_tokens: int) -> Callable[[], float]:
    """Return a function that measures the milliseconds of forward and backward of a leaky average.

    It averages 2,048 tokens, in rows of `num_tokens`.
    """
    heads, width = SIZES["num_attention_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
    states = torch.randn(TOKENS_PER_STEP // num_tokens, heads, num_tokens, width, requires_grad=True)
    # The leaks of a newly initialised mosaic.
    leak = torch.linspace(0.5, 5.0, heads).requires_grad_()
    weights = torch.randn(states.shape)

    def run() -> float:
        start = time.perf_counter()
        average(states, leak).backward(weights)
        return 1e3 * (time.perf_counter() - start)

    return run


def compare(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int, larger_is_better: bool
) -> dict[str, Any]:
    """Return the medians of both and of their ratio over `rounds` interleaved pairs, after one warm-up.

    A ratio above 1 means that ours is faster.
    """
    ours(), theirs()
    pairs = []
    for index in range(rounds):
        # The second of a pair has warmer caches: take turns.
        pair = (ours(), theirs()) if index % 2 else (theirs(), ours())[::-1]
        pairs.append(pair)
    ratios = sorted((a / b if larger_is_better else b / a) for a, b in pairs)
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def peak_resident() -> float:
    """Return the largest resident size of this process so far, in MiB. Linux only."""
    # Not `getrusage`, which counts what the parent process held too.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def _peak_of_training(name: str, num_tokens: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    before = peak_resident()
    step = training_step(build(name), num_tokens)
    step(), step()
    pipe.send(peak_resident() - before)


def in_process_of_its_own(function: Callable[..., None], *arguments: Any) -> Any:
    """Run a function in a new process and return the object that it sends.

    Args:
        function: takes the arguments, the number of torch's threads and the pipe to send to.
        arguments: picklable.
    """
    # A fork would begin with the memory of this process.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, torch.get_num_threads(), sender))
    process.start()
    # If the process dies, `recv` then fails and does not wait for ever.
    sender.close()
    sent = receiver.recv()
    process.join()
    return sent


def peak_memory(name: str, num_tokens: int) -> float:
    """Return the MiB that two training steps, model included, add to a new process at its largest."""
    return in_process_of_its_own(_peak_of_training, name, num_tokens)


def cells(row: dict[str, Any]) -> list[str]:
    """Return a measurement as the cells of a table's row."""
    quartiles = " ({:.2f} to {:.2f})".format(*row["ratio_quartiles"]) if "ratio_quartiles" in row else ""
    figures = [f"{row['ours']:.4g}", f"{row['theirs']:.4g}", row["unit"], f"{row['ratio']:.2f}{quartiles}"]
    return [row["what"], row["peer"], str(row["tokens"]), *figures]


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return one row per measurement, printed as it is taken."""
    models = {name: build(name) for name in ("mosaic", *PEERS)}
    rows: list[dict[str, Any]] = []

    def note(what: str, peer: str, num_tokens: int, unit: str, figures: dict[str, Any]) -> None:
        rows.append({"what": what, "peer": peer, "tokens": num_tokens, "unit": unit, **figures})
        typer.echo(" | ".join(cells(rows[-1])))

    for num_tokens in (512, 2048):
        memory = peak_memory("mosaic", num_tokens)
        for name, peer in PEERS.items():
            for what, task in (("training step", training_step), ("prefill", prefill), ("decode", decode)):
                pair = task(models["mosaic"], num_tokens), task(models[name], num_tokens)
                note(what, peer, num_tokens, UNITS[what], compare(*pair, rounds, larger_is_better=what == "decode"))
            theirs = peak_memory(name, num_tokens)
            figures = {"ours": memory, "theirs": theirs, "ratio": memory / theirs}
            note("peak memory of training", peer, num_tokens, "MiB", figures)
        pair = leaky_step(lambda x, y: leaky_average(x, y)[0], num_tokens), leaky_step(dense_leaky_average, num_tokens)
        figures = compare(*pair, rounds, larger_is_better=False)
        note("leaky average", "dense T x T", num_tokens, UNITS["leaky average"], figures)
    return rows


COLUMNS = ("measured", "beside", "T", "ours", "theirs", "unit", "ratio (quartiles)")


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table of a report as `main` writes it, with its setting above."""
    names = {"mosaic": "Memory Mosaic", **PEERS}
    models = [f"{names[name]} ({count / 1e6:.1f} M parameters)" for name, count in report["parameters"].items()]
    setting = (
        f"{models[0]} beside {' and '.join(models[1:])}, float32, {report['threads']} threads of {report['cpu']}, "
    )
    setting += f"torch {report['versions']['torch']}, median of {report['rounds']} interleaved pairs.\n"
    return "\n".join([setting, markdown_table(COLUMNS, "llrrrlr", map(cells, report["rows"]))])


def machine(rounds: int) -> dict[str, Any]:
    """Return what the figures depend on besides the models."""
    return {
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "cpu": cpu_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per measurement.")] = 11,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print. A ratio above 1 means that ours is faster; for memory, one below 1 that ours needs less."""
    torch.set_num_threads(threads)
    parameters = {name: build(name).num_parameters() for name in ("mosaic", *PEERS)}
    setting = {"sizes": SIZES, "parameters": parameters, **machine(rounds)}
    typer.echo(json.dumps(setting))
    typer.echo(" | ".join(COLUMNS))
    rows = measure(rounds)
    if output is not None:
        write_json(output, {**setting, "rows": rows})


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Speed and memory beside transformers' GPT-2 and Llama of equal size: `make bench`, or see `--help`.

Two models at a time run in one process, in turn, so that a machine whose speed drifts slows both alike. The measure is
the ratio of each pair of runs, and the median over the pairs. Attention is sdpa, and dropout is off unless a row says
otherwise. Peak memory is the largest resident size of a new process, above its size before the model was built.
"""

import json
import multiprocessing
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import transformers
import typer
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

from benchmarks.roofline import flops_of, product_rate, read_rate
from modeling_memory_mosaic import (
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
    MemoryMosaicV2Config,
    MemoryMosaicV2ForCausalLM,
)
from training.files import write_json
from training.result import cpu_name
from training.tables import markdown_table


SIZES: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
# Of the long texts, which a wide model would read for hours.
SMALL_SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS_PER_STEP = 2048
# Tokens that a measurement decodes, and how much longer the text may have become before one.
NUM_DECODED = 32
LONGER = 1.1
NAMES = {"mosaic": "Memory Mosaic", "mosaic-v2": "Memory Mosaic v2", "gpt2": "GPT-2", "llama": "Llama"}
PEERS = ("gpt2", "llama")
DEFAULT_DROPOUT = "default dropout"
COMPILED = "compiled"


class Case(NamedTuple):
    """One measurement: what is done, with how many rows and tokens, and how."""

    what: str
    batch_size: int
    num_tokens: int
    how: str = "eager"


TRAINING = [Case("training step", TOKENS_PER_STEP // length, length) for length in (512, 2048)]
CASES = [
    *TRAINING,
    *(case._replace(how=DEFAULT_DROPOUT) for case in TRAINING),
    *(case._replace(how=COMPILED) for case in TRAINING),
    *(Case("prefill", 1, length) for length in (512, 2048)),
    *(Case("decode", batch_size, length) for batch_size in (1, 8) for length in (64, 512, 2048, 8192)),
    *(Case("decode", 1, length, COMPILED) for length in (64, 2048)),
]
LONG_CASES = [Case(what, 1, length) for length in (16_384, 65_536) for what in ("prefill", "decode")]


def build(name: str, sizes: dict[str, Any], length: int, default_dropout: bool = False) -> PreTrainedModel:
    """Return a benchmarked model, one of `NAMES`, whose blocks have as many parameters as those of the others.

    Args:
        name: a key of `NAMES`.
        sizes: of all models.
        length: the longest text; GPT-2's position table reaches beyond it.
        default_dropout: whether dropout is that of the model's own configuration; else there is none.
    """
    torch.manual_seed(0)
    if name == "mosaic":
        dropout: dict[str, Any] = {} if default_dropout else {"attention_dropout": 0.0, "hidden_dropout": 0.0}
        return MemoryMosaicForCausalLM(MemoryMosaicConfig(**sizes, **dropout))
    if name == "mosaic-v2":
        # Two contextual memories have six matrices, which leaves a dense layer of twice the width. It has no dropout.
        return MemoryMosaicV2ForCausalLM(
            MemoryMosaicV2Config(**sizes, intermediate_size=2 * sizes["hidden_size"], tie_word_embeddings=True)
        )
    if name == "llama":
        # Llama's feed-forward layer has three matrices, GPT-2's two of four times the width. It has no dropout.
        intermediate_size = 8 * sizes["hidden_size"] // 3
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=intermediate_size, tie_word_embeddings=True))
    dropout = {} if default_dropout else {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    # GPT-2's own ids lie beyond this vocabulary.
    own: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "n_positions": int(LONGER * length) + NUM_DECODED}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **own))
    model.loss_type = "ForCausalLM"  # its class name does not say it, and each forward would warn
    return model


def random_ids(model: PreTrainedModel, batch_size: int, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch_size, num_tokens), generator=generator)


def training_step(model: PreTrainedModel, case: Case) -> Callable[[], float]:
    """Return a function that measures the seconds of forward and backward."""
    ids = random_ids(model, case.batch_size, case.num_tokens)
    forward: Any = torch.compile(model) if case.how == COMPILED else model

    def run() -> float:
        model.train().zero_grad()
        start = time.perf_counter()
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return time.perf_counter() - start

    return run


def prefill(model: PreTrainedModel, case: Case) -> Callable[[], float]:
    """Return a function that measures the seconds to read texts into a cache."""
    ids = random_ids(model, case.batch_size, case.num_tokens)

    @torch.no_grad()
    def run() -> float:
        model.eval()
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    return run


def decode(model: Any, case: Case) -> Callable[[], float]:
    """Return a function that measures the seconds of a token, read one at a time behind others in the cache.

    Decoding makes the text longer: from a tenth on, it is read again, untimed.
    """
    ids = random_ids(model, case.batch_size, case.num_tokens)
    is_compiled = case.how == COMPILED
    longest = int(LONGER * case.num_tokens)
    cache: Any = None
    if is_compiled:
        cache = StaticCache(model.config, max_cache_len=longest + NUM_DECODED)
    forward: Any = torch.compile(model, fullgraph=True) if is_compiled else model

    @torch.no_grad()
    def run() -> float:
        nonlocal cache
        num_read = 0 if cache is None else int(cache.get_seq_length())
        if not 0 < num_read <= longest:
            if is_compiled:
                cache.reset()
            else:
                cache = DynamicCache(config=model.config)
            model.eval()(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(NUM_DECODED):
            inputs = {"input_ids": ids[:, :1], "past_key_values": cache}
            if is_compiled:  # as `generate` does, which makes masks and positions outside the compiled step
                inputs = model.prepare_inputs_for_generation(next_sequence_length=1, use_cache=True, **inputs)
            forward(**inputs)
        return (time.perf_counter() - start) / NUM_DECODED

    return run


TASKS = {"training step": training_step, "prefill": prefill, "decode": decode}


def first_seconds(task: Callable[[], float]) -> float:
    """Return the seconds of the first call, which compiles."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def compare(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int, larger_is_better: bool = False
) -> dict[str, Any]:
    """Return the medians of both and of their ratio over `rounds` interleaved pairs, after a first call of each.

    A ratio above 1 means that ours is faster.
    """
    first = {"first_ours": first_seconds(ours), "first_theirs": first_seconds(theirs)}
    pairs = []
    for index in range(rounds):
        # The second of a pair has warmer caches: take turns.
        pairs.append((ours(), theirs()) if index % 2 else (theirs(), ours())[::-1])
    ratios = sorted((a / b if larger_is_better else b / a) for a, b in pairs)
    return first | {
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


def _peak(name: str, sizes: dict[str, Any], case: Case, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    before = peak_resident()
    task = TASKS[case.what](build(name, sizes, case.num_tokens, case.how == DEFAULT_DROPOUT), case)
    task(), task()
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


def peak_memory(name: str, sizes: dict[str, Any], case: Case) -> float:
    """Return the MiB that doing a case twice, model included, adds to a new process: largest size, median of three."""
    return statistics.median(in_process_of_its_own(_peak, name, sizes, case) for _ in range(3))


def needs_memory(case: Case, is_long: bool) -> bool:
    """Return whether peak memory is measured besides: of eager training, and of reading long texts."""
    return case.what == "training step" and case.how != COMPILED or is_long and case.what == "prefill"


def of_case(
    case: Case, sizes: dict[str, Any], rounds: int, our_name: str = "mosaic", peers: Sequence[str] = PEERS
) -> Iterator[dict[str, Any]]:
    """Yield a row for each peer: seconds of both, and for training those of their matrix products at the best rate."""
    ours = build(our_name, sizes, case.num_tokens, case.how == DEFAULT_DROPOUT)
    row: dict[str, Any] = case._asdict()
    is_long = sizes is SMALL_SIZES
    our_memory = peak_memory(our_name, sizes, case) if needs_memory(case, is_long) else None
    for name in peers:
        torch.compiler.reset()
        theirs = build(name, sizes, case.num_tokens, case.how == DEFAULT_DROPOUT)
        our_task, their_task = (TASKS[case.what](model, case) for model in (ours, theirs))
        row |= {"peer": NAMES[name], **compare(our_task, their_task, rounds)}
        if case.what == "training step" and case.how == "eager":
            rate = product_rate()  # here, because it drifts as the rate of the whole machine does
            row |= {"products_of_ours": flops_of(our_task) / rate, "products_of_theirs": flops_of(their_task) / rate}
        if our_memory is not None:
            row |= {"our_memory": our_memory, "their_memory": peak_memory(name, sizes, case)}
        yield row.copy()


def over_length(rows: list[dict[str, Any]], rate: float) -> dict[str, float]:
    """Return the straight line of the mosaic's seconds of a token over the pairs in its memory.

    Args:
        rows: measurements of decoding one row eagerly, at several lengths.
        rate: bytes per second that memory is read at.

    Returns:
        `intercept` in seconds, `slope` in seconds per thousand pairs, the `traffic` that the pairs of all heads and
        layers alone would take at that rate, and the largest `deviation` of a measurement from the line, as a share.
    """
    # Beside each peer the mosaic was measured once more.
    lengths = np.array(sorted({row["num_tokens"] for row in rows}))
    by_length = [[row["ours"] for row in rows if row["num_tokens"] == length] for length in lengths]
    seconds = np.array([statistics.mean(measured) for measured in by_length])
    slope, intercept = np.polyfit(lengths, seconds, 1, w=1 / seconds)
    num_bytes = 2 * 4 * SIZES["num_hidden_layers"] * SIZES["hidden_size"]
    deviation = np.abs(intercept + slope * lengths - seconds) / seconds
    traffic = 1000 * num_bytes / rate
    return {"intercept": intercept, "slope": 1000 * slope, "traffic": traffic, "deviation": float(deviation.max())}


def measure(rounds: int) -> dict[str, Any]:
    """Return all measurements, printed as they are taken."""
    rows: list[dict[str, Any]] = []
    cases = [(case, SIZES, rounds) for case in CASES] + [(case, SMALL_SIZES, 3) for case in LONG_CASES]
    for case, sizes, times in cases:
        for row in of_case(case, sizes, times):
            rows.append(row)
            typer.echo(" | ".join(cells(row)))
    one_row = [row for row in rows if (row["what"], row["batch_size"], row["how"]) == ("decode", 1, "eager")]
    line = over_length([row for row in one_row if row["num_tokens"] <= 8192], read_rate())
    return {"rows": rows, "decode_over_length": line}


COLUMNS = ("measured", "how", "beside", "rows x T", "ours, ms", "theirs, ms", "ratio (quartiles)")
COLUMNS += ("products", "first call, s", "memory, MiB", "ratio")


def cells(row: dict[str, Any]) -> list[str]:
    """Return a measurement as the cells of a table's row."""
    quartiles = "{:.2f} to {:.2f}".format(*row["ratio_quartiles"])
    what = [row["what"], row["how"], row["peer"], f"{row['batch_size']} x {row['num_tokens']:,}"]
    figures = [f"{1e3 * row['ours']:.4g}", f"{1e3 * row['theirs']:.4g}", f"{row['ratio']:.2f} ({quartiles})"]
    shares = [
        row[f"products_of_{whose}"] / row[whose] for whose in ("ours", "theirs") if f"products_of_{whose}" in row
    ]
    figures.append(", ".join(f"{share:.0%}" for share in shares))
    figures.append(f"{row['first_ours']:.0f}, {row['first_theirs']:.0f}" if row["how"] == COMPILED else "")
    if "our_memory" not in row:
        return [*what, *figures, "", ""]
    ours, theirs = row["our_memory"], row["their_memory"]
    return [*what, *figures, f"{ours:,.0f}, {theirs:,.0f}", f"{ours / theirs:.2f}"]


def table_of_rows(report: dict[str, Any]) -> str:
    """Return the measurements of a report as a Markdown table, with their setting above."""
    models = [f"{NAMES[name]} ({count / 1e6:.1f} M parameters)" for name, count in report["parameters"].items()]
    setting = (
        f"{models[0]} beside {' and '.join(models[1:])}, float32, {report['threads']} threads of {report['cpu']}, "
    )
    setting += f"torch {report['versions']['torch']}, median of {report['rounds']} interleaved pairs.\n"
    return "\n".join([setting, markdown_table(COLUMNS, "lllrrrrrrrr", map(cells, report["rows"]))])


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table of a report as `main` writes it, with its setting above and a law below."""
    line = report["decode_over_length"]
    law = (
        f"A token of the mosaic takes {1e3 * line['intercept']:.2f} ms and {1e3 * line['slope']:.2f} ms more for each "
        f"thousand pairs, a straight line from 64 to 8,192 pairs to within {line['deviation']:.0%}. Reading the pairs "
        f"takes {1e3 * line['traffic']:.2f} ms for each thousand at the rate of this machine's memory."
    )
    return "\n".join([table_of_rows(report), "", law])


def summary(report: dict[str, Any]) -> str:
    """Return the ratios to both peers as a paragraph."""

    def ratios(what: str, how: str, batch_size: int, num_tokens: int) -> str:
        wanted = (what, how, batch_size, num_tokens)
        names = ("what", "how", "batch_size", "num_tokens")
        rows = [row for row in report["rows"] if tuple(row[name] for name in names) == wanted]
        return " / ".join(f"{row['ratio']:.2f}" for row in rows)

    training = [f"{ratios(c.what, c.how, c.batch_size, c.num_tokens)} at {c.num_tokens:,} tokens" for c in TRAINING]
    one_row = [f"{ratios('decode', 'eager', 1, n)} behind {n:,}" for n in (64, 512, 2048, 8192)]
    peers = " / ".join(NAMES[name] for name in PEERS)
    text = (
        f"Speed relative to transformers' {peers} of equal size on {report['threads']} threads "
        f"of a CPU: training {', '.join(training)}; decoding {', '.join(one_row)}, and "
        f"{ratios('decode', 'eager', 8, 2048)} behind 2,048 in batches of 8; compiled decoding "
        f"{ratios('decode', COMPILED, 1, 2048)} behind 2,048. Above 1 is faster."
    )
    return textwrap.fill(text, 130)


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
    torch.compiler.config.force_disable_caches = True  # what an earlier run compiled would make the first call short
    parameters = {name: build(name, SIZES, 64).num_parameters() for name in ("mosaic", *PEERS)}
    setting = {"sizes": SIZES, "small_sizes": SMALL_SIZES, "parameters": parameters, **machine(rounds)}
    typer.echo(json.dumps(setting))
    typer.echo(" | ".join(COLUMNS))
    measured = measure(rounds)
    if output is not None:
        write_json(output, {**setting, **measured})


if __name__ == "__main__":
    typer.run(main)

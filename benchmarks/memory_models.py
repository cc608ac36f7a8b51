# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of a memory model beside its decoder with all tokens in view: `make bench`, or see `--help`.

Both read texts of several lengths and decode one chunk after them, so that the time includes finishing a chunk and
encoding it. They run in turn in one process, as in `benchmarks/speed.py`. Backbones are Memory Mosaics; the encoder is
as large as the decoder, or has half its width.

The formula counts multiplications: each token once through the weights of the model that reads it, and two products of
vectors for each pair of tokens that see each other. All tokens in view: n tokens, n n / 2 pairs. A memory model: n
tokens and n L / 2 pairs for the encoder, and for the decoder one row of the n / L memories and the tokens since.
"""

import copy
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache, PreTrainedModel

from benchmarks.speed import compare, in_process_of_its_own, machine, peak_resident
from modeling_memory_mosaic import (
    MemoryModelCache,
    MemoryModelConfig,
    MemoryModelForCausalLM,
    MemoryMosaicConfig,
    MemoryMosaicForCausalLM,
)
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME
from training.files import write_json
from training.tables import markdown_table


SIZES: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
# Half the heads too, so that each is as wide as before.
HALF = SIZES | {"hidden_size": 64, "num_attention_heads": 2}
# The length of chunks in the author's runs.
CHUNK_LENGTH = 256
LENGTHS = (512, 1024, 4096, 16384)
ENCODERS = {"encoder of equal size": SIZES, "encoder of half the width": HALF}
FULL = "all tokens in view"
LARGER_IS_BETTER = {"prefill": False, "decode": True}


def backbone(sizes: dict[str, Any]) -> MemoryMosaicConfig:
    """Return the configuration of a mosaic without dropout."""
    return MemoryMosaicConfig(**sizes, attention_dropout=0.0, hidden_dropout=0.0)


def build(name: str) -> PreTrainedModel:
    """Return the memory model with the encoder of that name, or for `FULL` its decoder alone."""
    torch.manual_seed(0)
    if name == FULL:
        return MemoryMosaicForCausalLM(backbone(SIZES)).eval()
    encoder, decoder = backbone(ENCODERS[name]), backbone(SIZES)
    return MemoryModelForCausalLM(
        MemoryModelConfig(encoder=encoder, decoder=decoder, chunk_length=CHUNK_LENGTH)
    ).eval()


@torch.no_grad()
def read(model: PreTrainedModel, num_tokens: int) -> DynamicCache | MemoryModelCache:
    """Return a cache into which the model has read one text."""
    ids = torch.randint(0, SIZES["vocab_size"], (1, num_tokens), generator=torch.Generator().manual_seed(0))
    cache = MemoryModelCache() if isinstance(model, MemoryModelForCausalLM) else DynamicCache(config=model.config)
    # A prefill needs the logits of the last token alone.
    model(input_ids=ids, **{MEMORY_NAME: cache}, logits_to_keep=1)
    return cache


def prefill(model: PreTrainedModel, num_tokens: int) -> Callable[[], float]:
    """Return a function that measures the seconds to read one text."""

    def run() -> float:
        start = time.perf_counter()
        read(model, num_tokens)
        return time.perf_counter() - start

    return run


def decode(model: PreTrainedModel, num_tokens: int) -> Callable[[], float]:
    """Return a function that measures tokens per second over one chunk behind the text, one at a time."""
    # Which token is read does not change the speed.
    ids, before = torch.zeros(1, 1, dtype=torch.long), read(model, num_tokens)

    @torch.no_grad()
    def run() -> float:
        # Every run begins after the same text, and copying is not timed.
        cache = copy.deepcopy(before)
        start = time.perf_counter()
        for _ in range(CHUNK_LENGTH):
            model(input_ids=ids, **{MEMORY_NAME: cache}, logits_to_keep=1)
        return CHUNK_LENGTH / (time.perf_counter() - start)

    return run


def slots(model: PreTrainedModel, num_tokens: int) -> int:
    """Return how many pairs the decoder holds at most while it decodes one chunk after the text."""
    if not isinstance(model, MemoryModelForCausalLM):
        return num_tokens + CHUNK_LENGTH
    return num_tokens // CHUNK_LENGTH * model.config.prefix_slots + CHUNK_LENGTH


def _peak_of_reading(name: str, num_tokens: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    model = build(name)
    # After the model is built: its weights are not part of reading.
    before = peak_resident()
    read(model, num_tokens)
    pipe.send(peak_resident() - before)


def weights_per_token(sizes: dict[str, int] | None) -> int:
    """Return the matrix entries that a token is multiplied with in the blocks.

    The head is left out: only the last token needs it.
    """
    if sizes is None:
        return 0
    # Only shapes count, so that no weight is allocated.
    with torch.device("meta"):
        layers = MemoryMosaicForCausalLM(backbone(sizes)).model.layers
        return sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim > 1)


def pair_width(sizes: dict[str, int]) -> int:
    """Return the multiplications for a pair of tokens: a product of keys and a weighted value, in every layer."""
    return 2 * sizes["hidden_size"] * sizes["num_hidden_layers"]


def multiplications(name: str, num_tokens: int) -> float:
    """Return the multiplications of reading a text, by the formula."""
    # `FULL` has no encoder, so that `get` gives None.
    weights = {key: weights_per_token(sizes) for key, sizes in (("decoder", SIZES), ("encoder", ENCODERS.get(name)))}
    if name == FULL:
        return num_tokens * weights["decoder"] + pair_width(SIZES) * num_tokens**2 / 2
    # All lengths are whole chunks: the row of the next has their memories and the slot that begins it.
    row = num_tokens // CHUNK_LENGTH + 1
    encoder = num_tokens * (weights["encoder"] + pair_width(ENCODERS[name]) * CHUNK_LENGTH / 2)
    return encoder + row * weights["decoder"] + pair_width(SIZES) * row**2 / 2


def cells(row: dict[str, Any]) -> list[str]:
    """Return a measurement as the cells of a table's row."""
    reading, writing = row["prefill"], row["decode"]
    return [
        f"{row['tokens']:,}",
        row["encoder"],
        f"{reading['ours']:.3g}",
        f"{reading['theirs']:.3g}",
        "{:.2f} ({:.2f} to {:.2f})".format(reading["ratio"], *reading["ratio_quartiles"]),
        f"{row['formula']:.2f}",
        f"{writing['ours']:.0f}",
        f"{writing['theirs']:.0f}",
        f"{writing['ratio']:.2f}",
        f"{row['slots']['ours']:,}",
        f"{row['slots']['theirs']:,}",
        f"{row['peak_mib']['ours']:.0f}",
        f"{row['peak_mib']['theirs']:.0f}",
    ]


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return one row for each length and encoder, printed as it is taken."""
    full, rows = build(FULL), []
    for num_tokens in LENGTHS:
        # Once for each length: encoders do not matter to it.
        peak = in_process_of_its_own(_peak_of_reading, FULL, num_tokens)
        for name in ENCODERS:
            model = build(name)
            row: dict[str, Any] = {"encoder": name, "tokens": num_tokens}
            for what, task in (("prefill", prefill), ("decode", decode)):
                pair = task(model, num_tokens), task(full, num_tokens)
                row[what] = compare(*pair, rounds, LARGER_IS_BETTER[what])
            row["formula"] = multiplications(FULL, num_tokens) / multiplications(name, num_tokens)
            row["slots"] = {"ours": slots(model, num_tokens), "theirs": slots(full, num_tokens)}
            row["peak_mib"] = {"ours": in_process_of_its_own(_peak_of_reading, name, num_tokens), "theirs": peak}
            rows.append(row)
            typer.echo(" | ".join(cells(row)))
    return rows


COLUMNS = (
    *("n", "memory model with", "prefill, s", "all in view, s", "ratio (quartiles)", "by the formula"),
    *("decode, tokens/s", "all in view", "ratio", "pairs held", "all in view"),
    *("memory of prefill, MiB", "all in view"),
)


ALIGNMENT = "rl" + "r" * (len(COLUMNS) - 2)


def pays_from(rows: list[dict[str, Any]], what: str) -> int | None:
    """Return the shortest text from which on the lower quartile of the ratio is above 1 at every measured length."""
    start = None
    for row in sorted(rows, key=lambda row: row["tokens"], reverse=True):
        if row[what]["ratio_quartiles"][0] <= 1:
            break
        start = row["tokens"]
    return start


def payoffs(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each encoder: from which measured length on the memory model is faster."""
    sentences = []
    for name in dict.fromkeys(row["encoder"] for row in rows):
        starts = [pays_from([row for row in rows if row["encoder"] == name], what) for what in ("prefill", "decode")]
        reading, decoding = (f"from {start:,} tokens on" if start else "at no length" for start in starts)
        sentences.append(f"With an {name} it is faster to read {reading}, and to decode {decoding}.")
    return sentences


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table of a report as `main` writes it, with its setting above."""
    sizes = report["sizes"]
    setting = (
        f"Memory Mosaics of {sizes['num_hidden_layers']} blocks of width {sizes['hidden_size']}, chunks of "
        f"{report['chunk_length']} tokens, float32, {report['threads']} threads of {report['cpu']}, torch "
        f"{report['versions']['torch']}, median of {report['rounds']} interleaved pairs; a ratio above 1 means that "
        "the memory model is faster.\n"
    )
    rows = markdown_table(COLUMNS, ALIGNMENT, map(cells, report["rows"]))
    return "\n".join([setting, rows, "", *payoffs(report["rows"])])


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per measurement.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    typer.echo(" | ".join(COLUMNS))
    report = {"sizes": SIZES, "chunk_length": CHUNK_LENGTH, **machine(rounds), "rows": measure(rounds)}
    if output is not None:
        write_json(output, report)


if __name__ == "__main__":
    typer.run(main)

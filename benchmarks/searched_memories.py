# SPDX-License-Identifier: Apache-2.0
"""Decoding behind a memory of many pairs by reading few of them, beside reading all: see `--help`.

A trained mosaic reads stories in parts of 256 tokens, alone, and joins them. Then it decodes behind that memory, by
all pairs and, within `nearest`, by some index and tolerance, in turn, in one process. `faiss` is here as an index that
a user brings along. Untrained kernels are wide: they would say nothing, and so the model is an argument.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.speed import compare, machine
from modeling_memory_mosaic import MosaicMemory, nearest
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME, memory_kwargs
from modeling_memory_mosaic.retrieval_memory_mosaic import INDEXES, SearchReport
from training.evaluate import load_model
from training.files import write_json
from training.tables import markdown_table
from training.text.sources import load_stories, source_provenance
from training.text.windows import pack_windows


PART_LENGTH = 256
# Tokens that are decoded in a round.
NUM_DECODED = 8
TOLERANCES = (0.01, 0.5)
SHARES = (0.01, 0.03, 0.1)
MEASURED = ["clusters", "exact", "lsh", "faiss"]
COLUMNS = [
    "index",
    "tolerance",
    "made in, s",
    "pairs read",
    "all pairs, ms a token",
    "ours, ms",
    "times as fast (quartiles)",
]


class FaissIndex:
    """faiss on CPUs: an inverted file of inner products, of which a sixteenth is searched."""

    def __init__(self, keys: torch.Tensor):
        import faiss

        num_lists = max(1, int(len(keys) ** 0.5))
        self.index = faiss.IndexIVFFlat(faiss.IndexFlatIP(keys.shape[1]), keys.shape[1], num_lists)
        self.index.metric_type = faiss.METRIC_INNER_PRODUCT
        self.index.train(keys.numpy())
        self.index.add(keys.numpy())
        self.index.nprobe = max(1, num_lists // 16)

    def search(self, queries: torch.Tensor, k: int) -> torch.Tensor:
        return torch.from_numpy(self.index.search(queries.numpy(), k)[1])


CHOICES: dict[str, Any] = {name: name for name in INDEXES} | {"faiss": FaissIndex}


def decoding(model: Any, memory: MosaicMemory, question: torch.Tensor, **search: Any) -> Callable[[], float]:
    """Return a function that decodes behind a memory, and returns the seconds a token.

    Args:
        search: arguments of `nearest`; without any all pairs are read.
    """

    @torch.no_grad()
    def steps() -> float:
        output = model(**memory.prompt(question), logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(NUM_DECODED):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, use_cache=True, **memory_kwargs(output[MEMORY_NAME]))
        return (time.perf_counter() - start) / NUM_DECODED

    def run() -> float:
        if not search:
            return steps()
        with nearest(model, **search):
            return steps()

    return run


def preparing(model: Any, memory: MosaicMemory, question: torch.Tensor, **search: Any) -> tuple[float, SearchReport]:
    """Return the seconds in which an index is made, and the report of decoding with it."""
    start = time.perf_counter()
    with nearest(model, **search), torch.no_grad():
        model(**memory.prompt(question), logits_to_keep=1)
    seconds = time.perf_counter() - start
    with nearest(model, **search) as report, torch.no_grad():
        output = model(**memory.prompt(question), logits_to_keep=1)
        report.visited.clear()
        for _ in range(NUM_DECODED):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, use_cache=True, **memory_kwargs(output[MEMORY_NAME]))
    return seconds, report


def measure(
    model: Any, ids: torch.Tensor, question: torch.Tensor, indexes: list[str], rounds: int
) -> list[dict[str, Any]]:
    """Return one row for each index and tolerance, and for each share of the pairs by clusters."""
    parts = [model.memorize(part[None], source=str(number)) for number, part in enumerate(ids.split(PART_LENGTH))]
    memory, rows = MosaicMemory.union(parts), []
    exact = decoding(model, memory, question)
    searches: list[dict[str, Any]] = [
        {"index": name, "tolerance": tolerance} for name in indexes for tolerance in TOLERANCES
    ]
    searches += [{"index": "clusters", "tolerance": TOLERANCES[0], "max_share": share} for share in SHARES]
    for search in searches:
        options = search | {"index": CHOICES[search["index"]]}
        seconds, report = preparing(model, memory, question, **options)
        compared = compare(decoding(model, memory, question, **options), exact, rounds)
        row = {**search, "made": seconds, **report.summary(), **compared}
        rows.append(row)
        typer.echo(" | ".join(cells(row)))
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table."""
    quartiles = "{:.1f} to {:.1f}".format(*row["ratio_quartiles"])
    figures = [f"{1e3 * row[whose]:.1f}" for whose in ("theirs", "ours")]
    read = [f"{row['made']:.1f}", f"{row['visited']:.1%}"]
    limit = f"{row['max_share']:.0%} of the pairs" if "max_share" in row else f"error of {row['tolerance']:g}"
    return [row["index"], limit, *read, *figures, f"{row['ratio']:.1f} ({quartiles})"]


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table of a report as `main` writes it, with its setting above."""
    setting = (
        f"Memory Mosaic of {report['parameters'] / 1e6:.1f} M parameters, trained by `{report['recipe']}`, behind "
        f"{report['pairs']:,} pairs a head, float32, {report['threads']} threads of {report['cpu']}, torch "
        f"{report['versions']['torch']}, median of {report['rounds']} interleaved pairs.\n"
    )
    return "\n".join([setting, markdown_table(COLUMNS, "llrrrrr", map(cells, report["rows"]))])


def main(
    folder: Annotated[Path, typer.Argument(help="A trained mosaic: `runs/.../model`.")],
    source: Annotated[str, typer.Option(help="Stories to read.")] = "roneneldan/TinyStories",
    num_tokens: Annotated[int, typer.Option(help="Tokens to read.")] = 65_536,
    indexes: Annotated[list[str], typer.Option(help="usearch takes a minute a head to make.")] = MEASURED,
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per measurement.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    model, tokenizer = load_model(folder)
    text: dict[str, Any] = {"source": source, "num_stories": num_tokens // 64}
    windows = pack_windows(load_stories(**text), tokenizer, PART_LENGTH)["input_ids"]
    ids = torch.tensor(windows[: num_tokens // PART_LENGTH + 1])
    rows = measure(model, ids[:-1].flatten(), ids[-1:, :16], indexes, rounds)
    facts = {"parameters": model.num_parameters(), "recipe": folder.parent.parent.name, "pairs": ids[:-1].numel()}
    report = facts | machine(rounds) | {"text": source_provenance(**text), "rows": rows}
    if output is not None:
        write_json(output, report)


if __name__ == "__main__":
    typer.run(main)

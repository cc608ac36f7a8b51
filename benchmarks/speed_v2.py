# SPDX-License-Identifier: Apache-2.0
"""Speed of Memory Mosaics v2 beside the first version and transformers' Llama: `make bench`, or see `--help`.

Measured as in `benchmarks/speed.py`. v2 reads two contextual memories in each block, and has a dense layer of the
width that makes its parameters as many as the others'. In training, long-term memories draw their delay.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.speed import COLUMNS, SIZES, TRAINING, Case, build, cells, machine, of_case, table_of_rows
from training.files import write_json


OURS, PEERS = "mosaic-v2", ("mosaic", "llama")
CASES = [
    *TRAINING,
    *(Case("prefill", 1, length) for length in (512, 2048)),
    *(Case("decode", batch_size, length) for batch_size in (1, 8) for length in (64, 512, 2048)),
    Case("decode", 1, 8192),
]


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table of a report as `main` writes it."""
    return table_of_rows(report)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per measurement.")] = 11,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print. A ratio above 1 means that v2 is faster; for memory, one below 1 that it needs less."""
    torch.set_num_threads(threads)
    parameters = {name: build(name, SIZES, 64).num_parameters() for name in (OURS, *PEERS)}
    setting = {"sizes": SIZES, "parameters": parameters, **machine(rounds)}
    typer.echo(json.dumps(setting))
    typer.echo(" | ".join(COLUMNS))
    rows: list[dict[str, Any]] = []
    for case in CASES:
        for row in of_case(case, SIZES, rounds, OURS, PEERS):
            rows.append(row)
            typer.echo(" | ".join(cells(row)))
    if output is not None:
        write_json(output, {**setting, "rows": rows})


if __name__ == "__main__":
    typer.run(main)

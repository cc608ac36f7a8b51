# SPDX-License-Identifier: Apache-2.0
"""Time to the first token behind texts that were memorized before, beside reading them again: see `--help`.

Ours loads the memory of each text from disk, joins them, and reads a question behind them. The other reads all texts
and the question in one pass, by the same model or by transformers' Llama of equal size. They run in turn, in one
process. Times include the checks of weights and tokenizer that loading a memory makes.
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from benchmarks.speed import SIZES, build, compare, machine
from modeling_memory_mosaic import MosaicMemory
from training.files import write_json
from training.tables import markdown_table


# Texts and tokens of each, and how many times as fast loading them was meant to be.
CASES = {(1, 4096): 20, (4, 512): 10, (8, 1024): 30}
QUESTION_LENGTH = 16
COLUMNS = ["texts x tokens", "beside", "ours, ms", "theirs, ms", "times as fast (quartiles)", "memory on disk, MB"]


def draw_texts(num_texts: int, num_tokens: int, vocab_size: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return ids of texts, each `(1, T)`, and of a question."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (num_texts, num_tokens), generator=generator)
    return list(ids[:, None]), torch.randint(0, vocab_size, (1, QUESTION_LENGTH), generator=generator)


def timed(task: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that does a task and returns its seconds."""

    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            task()
        return time.perf_counter() - start

    return run


def answer_from_disk(
    model: PreTrainedModel, folders: list[Path], question: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return a function that loads and joins memories, and returns the logits behind a question."""

    def answer() -> torch.Tensor:
        memory = MosaicMemory.from_pretrained(folders, model)
        return model(**memory.prompt(question), logits_to_keep=1).logits

    return answer


def answer_anew(model: PreTrainedModel, texts: list[torch.Tensor], question: torch.Tensor) -> Callable[[], Any]:
    """Return a function that reads texts and question in one pass."""
    ids = torch.cat([*texts, question], dim=1)
    return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1).logits


def measure(
    rounds: int, cases: Iterable[tuple[int, int]] = tuple(CASES), sizes: dict[str, Any] = SIZES
) -> list[dict[str, Any]]:
    """Return one row for each case and model beside ours.

    Args:
        cases: numbers of texts, and of the tokens of each.
        sizes: of the models.
    """
    rows, cases = [], list(cases)
    longest = max(number * length for number, length in cases) + QUESTION_LENGTH
    model = build("mosaic", sizes, longest).eval()
    others = {"the same model": model, "Llama": build("llama", sizes, longest).eval()}
    for number, length in cases:
        texts, question = draw_texts(number, length, sizes["vocab_size"])
        with tempfile.TemporaryDirectory() as folder:
            folders = [Path(folder) / str(index) for index in range(number)]
            for index, (ids, place) in enumerate(zip(texts, folders, strict=True)):
                model.memorize(ids, source=str(index)).save_pretrained(place)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            ours = timed(answer_from_disk(model, folders, question))
            for name, other in others.items():
                compared = compare(ours, timed(answer_anew(other, texts, question)), rounds)
                row = {"texts": number, "tokens": length, "beside": name, "bytes": size, **compared}
                rows.append(row)
                typer.echo(" | ".join(cells(row)))
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of the table."""
    quartiles = "{:.1f} to {:.1f}".format(*row["ratio_quartiles"])
    figures = [f"{1e3 * row[whose]:,.0f}" for whose in ("ours", "theirs")]
    place = f"{row['texts']} x {row['tokens']:,}"
    return [place, row["beside"], *figures, f"{row['ratio']:.1f} ({quartiles})", f"{row['bytes'] / 1e6:,.0f}"]


def verdicts(rows: list[dict[str, Any]]) -> str:
    """Return which of the aims that `CASES` states are met and which are missed, in words."""
    aims, found = [], {True: [], False: []}  # type: ignore[var-annotated]
    for row in rows:
        aim, case = CASES.get((row["texts"], row["tokens"])), f"{row['texts']} x {row['tokens']:,}"
        if aim is not None:
            aims += [f"{aim} with {case} tokens"]
            found[row["ratio"] >= aim] += [f"{case} beside {row['beside']} ({row['ratio']:.1f})"]
    sentences = [f"Aims, in times as fast: {', '.join(dict.fromkeys(aims))}."] if aims else []
    sentences += [f"{name}: {', '.join(found[is_met])}." for name, is_met in (("Met", True), ("Missed", False))]
    return " ".join(sentence for sentence in sentences if not sentence.endswith(": ."))


def table(report: dict[str, Any]) -> str:
    """Return the Markdown table of a report as `main` writes it, with its setting above and its aims below."""
    setting = (
        f"Memory Mosaic of {report['parameters'] / 1e6:.1f} M parameters, float32, {report['threads']} threads of "
        f"{report['cpu']}, torch {report['versions']['torch']}, median of {report['rounds']} interleaved pairs.\n"
    )
    parts = [setting, markdown_table(COLUMNS, "llrrrr", map(cells, report["rows"])), "", verdicts(report["rows"])]
    return "\n".join(parts)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved pairs per measurement.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = torch.get_num_threads(),
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    report = {"parameters": build("mosaic", SIZES, 64).num_parameters(), **machine(rounds), "rows": measure(rounds)}
    if output is not None:
        write_json(output, report)


if __name__ == "__main__":
    typer.run(main)

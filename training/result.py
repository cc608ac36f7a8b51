# SPDX-License-Identifier: Apache-2.0
"""Results: what a run leaves for readers, `result.json` and `loss.png`, and the tables made from them.

`python -m training.result collect NAME` copies what an experiment left in `runs/NAME` to `training/results`.
`python -m training.result tables README.md` rewrites each block of a file that stands between `<!-- results: NAME -->`
and `<!-- end of results -->` from the committed `training/results/*.json` whose recipe has that name, the blocks
named `speed` and `memory_speed` from `benchmarks/*.json`, and the block named `claims` from the claims of all
experiments.
"""

import importlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
import typer

from training.files import (
    CHECKSUMS,
    checksum_of_text,
    checksums_of,
    checksums_text,
    faults,
    json_text,
    read_json,
    staged_file,
    write_text,
)
from training.paths import CLONE, RESULTS
from training.recipe import BaseRecipe


BENCHMARKS = {"speed": "speed", "memory_speed": "memory_models"}
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft")
BLOCK = re.compile(r"(<!-- results: (?P<name>[\w.-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def header(recipe: BaseRecipe) -> dict[str, Any]:
    """What every `result.json` says of its recipe, and of when and where it was run."""
    return {
        "name": recipe.name,
        "task": recipe.task,
        "recipe": recipe.model_dump(exclude={"output_dir"}),
        "recipe_hash": recipe.hash,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, hardware and commit of this process; what cannot be known is None."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in PACKAGES},
        "hardware": _hardware(),
        "commit": _commit(),
    }


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }


def _cpu_name() -> str | None:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = re.findall(r"^model name\s*: (.+)$", information.read_text(encoding="utf-8"), re.MULTILINE)
        if names:
            return names[0]
    return platform.processor() or None


def _commit() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CLONE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None  # unpacked from an archive, or nothing committed yet


def learning_curve(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Training and validation losses (nats per token) with the steps and tokens after which they were seen."""
    curve = {"training": [], "validation": []}
    for entry in log_history:
        at = {"step": entry["step"], "tokens": entry.get("num_input_tokens_seen")}
        if "loss" in entry:
            curve["training"].append(at | {"loss": entry["loss"]})
        if "eval_loss" in entry:
            curve["validation"].append(at | {"loss": entry["eval_loss"], "perplexity": entry["eval_perplexity"]})
    return curve


def tokens_per_second(log_history: list[dict[str, Any]]) -> float | None:
    """Mean speed of training, over all resumed sessions, without evaluating and saving; None if none was logged.

    A run that was killed between two checkpoints has done some steps twice: they count once, as they were last done.
    """
    tokens = seconds = before = 0
    for entry in log_history:
        if "loss" not in entry:
            continue
        if "tokens_per_second" in entry:
            done = entry["num_input_tokens_seen"] - before
            tokens, seconds = tokens + done, seconds + done / entry["tokens_per_second"]
        before = entry["num_input_tokens_seen"]
    return round(tokens / seconds, 3) if seconds else None


# What stands beside a result and is taken from there: pictures and tables.
SHOWN = (".png", ".md")


def write_result(result: dict[str, Any], folder: Path, kept: Sequence[str] = (), name: str = "result.json") -> None:
    """Write what marks a run as done, and before it the checksums of it and of what others read of the folder.

    Args:
        result: the content.
        folder: of the run, or of a part of it that is done by itself.
        kept: files and folders besides that later runs use, such as `model`.
        name: of the file.
    """
    text = json_text(result)
    shown = [path.name for path in folder.iterdir() if path.suffix in SHOWN]
    sums = checksums_of(folder, [*kept, *shown]) | {name: checksum_of_text(text)}
    write_text(folder / CHECKSUMS, checksums_text(sums))
    write_text(folder / name, text)


def read_result(folder: Path, name: str = "result.json") -> dict[str, Any] | None:
    """What `write_result` has written; None if it has not.

    Raises:
        ValueError: it is not what was written.
    """
    if not (folder / name).is_file():
        return None
    if found := faults(folder, name):
        raise ValueError(
            f"{folder / name} is damaged ({'; '.join(found)}): restore it, or remove it and start again, which makes "
            "it from what else is there"
        )
    return read_json(folder / name)


def refuse_change(folder: Path) -> None:
    """`ValueError` if the folder of a finished run lacks what `write_result` has listed, or has it changed."""
    if found := faults(folder, unlisted=False):
        raise ValueError(
            f"{folder} is damaged ({'; '.join(found)}): restore it, or remove its result.json and run the recipe again"
        )


def draw_learning_curve(result: dict[str, Any], path: Path) -> None:
    """Loss over tokens as a PNG: the training loss faint, the validation loss marked."""
    from matplotlib.figure import Figure  # without pyplot there is no display and no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curve = result["learning_curve"]
    for points, style in (
        (curve["training"], {"label": "training", "color": "tab:blue", "alpha": 0.4, "linewidth": 1}),
        (curve["validation"], {"label": "validation", "color": "tab:orange", "marker": "o", "markersize": 4}),
    ):
        axes.plot([point["tokens"] for point in points], [point["loss"] for point in points], **style)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{result['name']}: {result['model']}, {result['parameters'] / 1e6:.2f} M parameters")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown table with a line for each model: mean and, over several seeds, standard deviation.

    Args:
        results: contents of `result.json` files of one recipe; the seeds of a model are put together.

    Raises:
        ValueError: no results, or results of different recipes, which a table would wrongly compare.
    """
    names = {result["name"] for result in results}
    if len(names) != 1:
        raise ValueError(f"a table compares results of one recipe, not of {sorted(names) or 'none'}")
    models = defaultdict(list)
    for result in results:
        models[result["model"]].append(result)
    lines = [
        "| model | parameters | seeds | tokens | validation loss | perplexity | bits per byte | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(lines + [_table_line(model, runs) for model, runs in sorted(models.items())])


def fine_tuning_table(results: list[dict[str, Any]]) -> str:
    """Markdown table with a line for the base and one for each choice of what LoRA adapts; seeds are put together.

    Raises:
        ValueError: results of different bases, which a table would wrongly compare.
    """
    bases = [result["base"] for result in results]
    if any(base != bases[0] for base in bases):
        raise ValueError("a table compares fine-tunings of one base: these are of several")
    adapted = defaultdict(list)
    for result in results:
        lora = result["recipe"]["lora"]
        targets = [name.rpartition(".")[2] for name in lora["target_modules"] + lora["target_parameters"]]
        adapted[f"LoRA of rank {lora['r']} on {', '.join(targets)}"].append(result)
    lines = [
        "| model | trained numbers | seeds | validation loss | perplexity |",
        "| --- | ---: | ---: | ---: | ---: |",
        _fine_tuning_line("the base", [{"metrics": bases[0]["metrics"]}], trained=0),
    ]
    return "\n".join(
        lines
        + [_fine_tuning_line(name, runs, runs[0]["trained_parameters"]) for name, runs in sorted(adapted.items())]
    )


def _fine_tuning_line(name: str, runs: list[dict[str, Any]], trained: int) -> str:
    seeds = ", ".join(str(run["seed"]) for run in runs if "seed" in run)
    loss, perplexity = ([run["metrics"][f"validation_{name}"] for run in runs] for name in ("loss", "perplexity"))
    return f"| {name} | {trained:,} | {seeds} | {mean_and_deviation(loss, 4)} | {mean_and_deviation(perplexity, 2)} |"


def _table_line(model: str, runs: list[dict[str, Any]]) -> str:
    loss, perplexity, bits = (
        [run["metrics"][name] for run in runs]
        for name in ("validation_loss", "validation_perplexity", "validation_bits_per_byte")
    )
    cells = [
        model,
        f"{runs[0]['parameters']:,}",
        ", ".join(str(run["seed"]) for run in sorted(runs, key=lambda run: run["seed"])),
        f"{runs[0]['tokens']:,}",
        mean_and_deviation(loss, 4),
        mean_and_deviation(perplexity, 2),
        mean_and_deviation(bits, 4),
        f"{statistics.mean(run['seconds'] for run in runs):,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def mean_and_deviation(values: list[float], digits: int) -> str:
    """Of several seeds as `mean ± standard deviation`, of one its value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def claims_table(results: list[dict[str, Any]]) -> str:
    """Markdown table with a row for each claim of the paper that a result of an experiment speaks to."""
    lines = ["| claim | recipe | paper | ours | verdict |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for row in result.get("claims", []):
            cells = (row["claim"], f"`{result['name']}`", row["paper"], row["ours"], row["verdict"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Of results that hold no table of their own, because each is of one training.
TABLES = {"language_modeling": results_table, "fine_tuning": fine_tuning_table}


def rewrite_blocks(text: str, results: list[dict[str, Any]]) -> str:
    """Fill the marked blocks of a Markdown text; `ValueError` if a block names a recipe without results."""

    def fill(match: re.Match) -> str:
        name = match["name"]
        if name in BENCHMARKS:
            return match[1] + _benchmark_table(BENCHMARKS[name]) + "\n" + match[3]
        if name == "claims":
            return match[1] + claims_table(results) + "\n" + match[3]
        chosen = [result for result in results if result["name"] == name]
        if not chosen:
            known = sorted({result["name"] for result in results})
            raise ValueError(f"a block asks for the results of {name!r}, but there are only those of {known}")
        table = chosen[0]["table"] if "table" in chosen[0] else TABLES[chosen[0]["task"]](chosen)
        return match[1] + table + "\n" + match[3]

    return BLOCK.sub(fill, text)


def _benchmark_table(name: str) -> str:
    benchmark = importlib.import_module(f"benchmarks.{name}")  # only now: no training run should depend on it
    return benchmark.table(read_json(CLONE / "benchmarks" / f"{name}.json"))


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Loss in nats per token as bits per byte of text, which does not depend on the tokenizer."""
    return loss * num_tokens / num_bytes / math.log(2)


def collect(*names: str) -> None:
    """Copy result, pictures and tables of finished experiments from `runs/NAME` to `training/results`.

    A `README.md` is copied as `NAME.md`; the name of any other file has to begin with the experiment's.

    Raises:
        ValueError: an experiment is not finished, or a file of it could replace another's.
    """
    for name in names:
        folder = Path("runs") / name
        if read_result(folder) is None:
            raise ValueError(f"{folder} holds no result.json: run the recipe {name!r} to its end first")
        files = {path: path.name for path in sorted(folder.iterdir()) if path.suffix in SHOWN}
        files |= {path: f"{name}.md" for path in files if path.name == "README.md"}
        foreign = [own for own in files.values() if not own.startswith(name)]
        if foreign:
            raise ValueError(f"{folder} holds {foreign}: files of {name!r} begin with its name")
        for path, own in files.items():
            with staged_file(RESULTS / own) as staged:
                shutil.copyfile(path, staged)
        write_text(RESULTS / f"{name}.json", (folder / "result.json").read_text(encoding="utf-8"))


def rewrite_tables(*paths: str | Path) -> None:
    """Rewrite the marked blocks of each file from the committed results."""
    results = [read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    for path in map(Path, paths):
        write_text(path, rewrite_blocks(path.read_text(encoding="utf-8"), results))


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("collect")
def _collect(names: list[str]) -> None:
    collect(*names)


@app.command("tables")
def _tables(paths: list[Path]) -> None:
    rewrite_tables(*paths)


if __name__ == "__main__":
    app()

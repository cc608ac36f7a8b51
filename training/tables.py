# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of results, the blocks of READMEs that show them, and the pictures beside them.

`python -m training.tables collect NAME` copies what an experiment left in `runs/NAME` to `training/results/NAME`.
`python -m training.tables pictures` draws the pictures of all committed results again, without any training.
`python -m training.tables tables README.md` rewrites each block of a file that stands between
`<!-- [[[cog print(table_of("NAME")) ]]] -->` and `<!-- [[[end]]] -->` (`cog` is the program that finds the blocks).
"""

import importlib
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from cogapp import Cog
from pydantic import ValidationError
from tabulate import DataRow, TableFormat, tabulate

from training.claims import ClaimSection, Effect, Effects, measured_effects
from training.figures import draw_result
from training.files import read_json, staged_file
from training.paths import CLONE, CONFIGURATION, RESULTS, nearest
from training.recipe import load_recipe, task_module
from training.result import SHOWN, read_result
from training.untrusted import parse_yaml


# What the abstract on memory models says, and the claims by which that is judged.
ABSTRACT = CONFIGURATION / "abstracts" / "memory_models.yaml"


# Experiments on the parts of a mosaic, whose measures one table has.
PARTS = ("parts", "parts_induction")


# Names of blocks that show a benchmark: module of `benchmarks` and function that write the block, and the figures.
BENCHMARKS = {
    "speed": ("speed", "table", "benchmarks/speed.json"),
    "speed_summary": ("speed", "summary", "benchmarks/speed.json"),
    "speed_v2": ("speed_v2", "table", "benchmarks/speed_v2.json"),
    "memory_speed": ("memory_models", "table", "benchmarks/memory_models.json"),
    "stored_memories": ("stored_memories", "table", "benchmarks/stored_memories.json"),
    "searched_memories": ("searched_memories", "table", "benchmarks/searched_memories.json"),
    "vllm": ("serving", "vllm_table", "serving/vllm/benchmark.json"),
    "edge": ("serving", "edge_table", "serving/edge/benchmark.json"),
}


_ROW = DataRow("| ", " | ", " |")


_ALIGNMENTS = {"l": "---", "r": "---:"}


def markdown_table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table without padding, so that a changed cell changes no other line.

    Args:
        columns: their names.
        alignment: a letter for each column, `l` or `r`.
        rows: cells of each row.
    """
    marks = f"| {' | '.join(_ALIGNMENTS[letter] for letter in alignment)} |"
    # tabulate's own layouts for Markdown pad the cells.
    layout = TableFormat(None, lambda widths, alignments: marks, None, None, _ROW, _ROW, 0, None)
    # Cells are formatted already: tabulate must not parse and format them again.
    return tabulate(list(rows), columns, layout, disable_numparse=True, stralign=None)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return the values of several seeds as `mean ± standard deviation`, one value as itself."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _results_row(model: str, results: list[dict[str, Any]]) -> list[str]:
    loss, perplexity, bits = (
        [result["metrics"][f"validation_{name}"] for result in results]
        for name in ("loss", "perplexity", "bits_per_byte")
    )
    return [
        model,
        f"{results[0]['parameters']:,}",
        ", ".join(str(seed) for seed in sorted(result["seed"] for result in results)),
        f"{results[0]['tokens']:,}",
        mean_and_deviation(loss, 4),
        mean_and_deviation(perplexity, 2),
        mean_and_deviation(bits, 4),
        f"{statistics.mean(result['seconds'] for result in results):,.0f}",
    ]


def results_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each model: mean and, over several seeds, standard deviation.

    Args:
        results: contents of `result.json` files of one recipe; the seeds of a model are put together.

    Raises:
        ValueError: no results, or results of different recipes, which a table would wrongly compare.
    """
    names = {result["name"] for result in results}
    if len(names) != 1:
        raise ValueError(f"a table compares results of one recipe, not of {sorted(names) or 'none'}")
    by_model: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_model[result["model"]].append(result)
    columns = ["model", "parameters", "seeds", "tokens"]
    columns += ["validation loss", "perplexity", "bits per byte", "seconds"]
    return markdown_table(columns, "lrrrrrrr", [_results_row(model, by_model[model]) for model in sorted(by_model)])


def _fine_tuning_row(name: str, results: list[dict[str, Any]], num_trained: int) -> list[str]:
    # The base stands in the table without a seed.
    seeds = ", ".join(str(result["seed"]) for result in results if "seed" in result)
    loss, perplexity = (
        [result["metrics"][f"validation_{measure}"] for result in results] for measure in ("loss", "perplexity")
    )
    return [name, f"{num_trained:,}", seeds, mean_and_deviation(loss, 4), mean_and_deviation(perplexity, 2)]


def fine_tuning_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for the base and one for each choice of what LoRA adapts.

    Args:
        results: contents of `result.json` files of fine-tunings; seeds are put together.

    Raises:
        ValueError: results of different bases, which a table would wrongly compare.
    """
    bases = [result["base"] for result in results]
    if any(base != bases[0] for base in bases):
        raise ValueError("a table compares fine-tunings of one base: these are of several")
    by_adapter: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        lora = result["recipe"]["lora"]
        targets = [name.rpartition(".")[2] for name in lora["target_modules"] + lora["target_parameters"]]
        by_adapter[f"LoRA of rank {lora['r']} on {', '.join(targets)}"].append(result)
    rows = [_fine_tuning_row("the base", [{"metrics": bases[0]["metrics"]}], num_trained=0)]
    for name, adapted in sorted(by_adapter.items()):
        rows.append(_fine_tuning_row(name, adapted, adapted[0]["trained_parameters"]))
    return markdown_table(["model", "trained numbers", "seeds", "validation loss", "perplexity"], "lrrrr", rows)


# Verdicts in the order of the sections of the table of claims.
_VERDICTS = ("supported", "contradicted", "undecided")


def _found_effects(result: dict[str, Any]) -> Effects:
    """Return the effects that a committed result measured; none if it is older than effects and of a past form."""
    try:
        recipe = task_module(result["task"]).Recipe.model_validate(result["recipe"])
    except ValidationError:
        if "effects" in result:
            raise
        return {}
    return measured_effects(result["task"], recipe, result["measured"])


def _claim_row(result: dict[str, Any], claim: ClaimSection, effects: Effects) -> tuple[str, list[str]]:
    """Return the verdict on a claim of today's recipe, given the effects of a committed result, and its row."""
    rule = claim.rule if claim.changed is None else f"{claim.rule} ({claim.changed})"
    stated = [(then["effects"], ClaimSection(**then).rule) for then in result["recipe"].get("claims", [])]
    if (claim.effects, claim.rule) not in stated:
        rule += " (rule stated after the result)"
    ours = "; ".join(f"{name}: {effects[name]}" for name in claim.effects)
    return claim.judge(effects), [claim.claim, f"`{result['name']}`", claim.paper, ours, rule]


def claims_table(results: list[dict[str, Any]]) -> str:
    """Return Markdown tables of all claims that the recipes of results make, one table for each verdict.

    A claim counts once, however many effects it speaks of. Its rule is that of the recipe as it is now; a row says so
    if the result was made before the rule.

    Args:
        results: contents of `result.json` files.
    """
    rows: dict[str, list[list[str]]] = {verdict: [] for verdict in _VERDICTS}
    num_waiting = 0
    for result in results:
        path = CONFIGURATION / "recipe" / f"{result['name']}.yaml"
        claims = getattr(load_recipe(path), "claims", []) if path.is_file() else []
        effects = _found_effects(result) if claims else {}
        for claim in claims:
            if effects.keys() >= set(claim.effects):
                verdict, row = _claim_row(result, claim, effects)
                rows[verdict].append(row)
            else:
                num_waiting += 1
    counts = ", ".join(f"{len(rows[verdict])} {verdict}" for verdict in _VERDICTS)
    parts = [f"{sum(map(len, rows.values()))} claims: {counts}."]
    if num_waiting:
        parts[0] += f" The committed results do not measure {num_waiting} other claims of today's recipes."
    columns = ["claim", "recipe", "paper", "ours (95 % interval)", "rule"]
    for verdict in _VERDICTS:
        table = markdown_table(columns, "lllll", rows[verdict]) if rows[verdict] else "None."
        parts += [f"### {verdict.capitalize()}", table]
    return "\n\n".join(parts)


def abstract_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of what the abstract on memory models says: claims of recipes, effects and verdicts.

    A claim without a committed result of its recipe is waiting for one.

    Args:
        results: contents of `result.json` files.
    """
    by_name = {result["name"]: result for result in results}
    entries = parse_yaml(ABSTRACT.read_text(encoding="utf-8"), ABSTRACT)
    names = {one["recipe"] for entry in entries for one in entry["claims"]}
    recipes: dict[str, Any] = {name: load_recipe(CONFIGURATION / "recipe" / f"{name}.yaml") for name in sorted(names)}
    rows: list[list[str]] = []
    for entry in entries:
        for number, one in enumerate(entry["claims"]):
            claim = next(claim for claim in recipes[one["recipe"]].claims if claim.claim == one["claim"])
            effects = _found_effects(by_name[one["recipe"]]) if one["recipe"] in by_name else {}
            cells = [claim.claim, f"`{one['recipe']}`", claim.rule, "not measured yet", "waiting"]
            if effects.keys() >= set(claim.effects):
                verdict, row = _claim_row(by_name[one["recipe"]], claim, effects)
                cells = [row[0], row[1], row[4], row[3], verdict]
            rows.append([entry["sentence"] if number == 0 else "", *cells])
    columns = ["the abstract, in our words", "our claim", "recipe", "rule", "ours (95 % interval)", "verdict"]
    return markdown_table(columns, "llllll", rows)


def parts_table(language: dict[str, Any], induction: dict[str, Any]) -> str:
    """Return a Markdown table with a line for each model of `parts.yaml`: three measures of learning in context.

    Args:
        language: content of the result of `parts`.
        induction: content of the result of `parts_induction`, on the same runs, or some of them, with one block.
    """
    texts = language["measured"]
    bases = [f"{text}: {next(iter(measured['effects'].values()))['basis']}" for text, measured in texts.items()]
    rows = []
    for model in texts["stories"]["models"]:
        label, loss = model["label"], model["mean_loss"]
        fall = Effect(**texts["encyclopaedia"]["effects"][f"fall past 100 tokens, {label}, 4 blocks"])
        accuracy = [run["accuracy"] for run in induction["measured"]["test"].get(label, [])]
        measured = mean_and_deviation(accuracy, 3) if accuracy else "not measured"
        rows.append([label, f"{loss:.3f}", str(fall).partition(",")[0], measured])
    columns = [
        "model",
        "loss on stories",
        "fall of the loss past 100 tokens, encyclopaedic text",
        "induction accuracy",
    ]
    table = markdown_table(columns, "lrrr", rows)
    return f"{table}\n\nLosses of four blocks ({'; '.join(bases)}), accuracy of one block."


# By task: the function that makes a table from results of single trainings, which hold no table.
TABLES = {"language_modeling": results_table, "fine_tuning": fine_tuning_table}


def committed_results() -> list[dict[str, Any]]:
    """Return the contents of all result files in `training/results`, in the order of their paths."""
    return [read_json(path) for path in sorted(RESULTS.glob("*/*.json"))]


def table_of(name: str) -> str:
    """Return the table that the block `name` of a README shows.

    Args:
        name: of a recipe with committed results, `claims`, `abstract`, or one of `BENCHMARKS`.

    Raises:
        ValueError: there are no such results.
    """
    if name in BENCHMARKS:
        # Imported only here: no training should depend on a benchmark.
        module, function, figures = BENCHMARKS[name]
        block: str = getattr(importlib.import_module(f"benchmarks.{module}"), function)(read_json(CLONE / figures))
        return block
    results = committed_results()
    if name in ("claims", "abstract"):
        return claims_table(results) if name == "claims" else abstract_table(results)
    wanted = PARTS if name == "parts_summary" else (name,)
    chosen = [result for result in results if result["name"] in wanted]
    if {result["name"] for result in chosen} != set(wanted):
        known = sorted({result["name"] for result in results})
        raise ValueError(f"a block asks for the results of {name!r}, but there are only those of {known}")
    if name == "parts_summary":
        return parts_table(*sorted(chosen, key=lambda result: PARTS.index(result["name"])))
    return chosen[0]["table"] if "table" in chosen[0] else TABLES[chosen[0]["task"]](chosen)


def rewrite_tables(*paths: str | Path) -> None:
    """Rewrite the blocks of each file from the committed results.

    Raises:
        cogapp.CogError: a block has no results, or no end. The file stays as it is.
    """
    # cog's -P takes what a block prints, and -p gives each block the import.
    options = ["-P", "-p", "from training.tables import table_of", "--verbosity=0"]
    for path in map(Path, paths):
        # cog writes to another path, so that a failure leaves the file as it is.
        with staged_file(path) as staged:
            Cog().callable_main(["cog", *options, "-o", str(staged), str(path)])


def collect(*names: str) -> None:
    """Copy result, pictures and tables of finished experiments from `runs/NAME` to `training/results/NAME`.

    Raises:
        ValueError: an experiment is not finished.
    """
    for name in names:
        folder = Path("runs") / name
        if read_result(folder) is None:
            raise ValueError(f"{folder} holds no result.json: run the recipe {name!r} to its end first")
        (RESULTS / name).mkdir(exist_ok=True)
        shown = sorted(path for path in folder.iterdir() if path.suffix in SHOWN)
        for path in [*shown, folder / "result.json"]:
            with staged_file(RESULTS / name / path.name) as staged:
                shutil.copyfile(path, staged)


def draw_pictures(*names: str) -> None:
    """Draw the pictures of committed results again, from their numbers alone.

    Args:
        names: of recipes; all of them if none is given.

    Raises:
        ValueError: there are no results of a recipe.
    """
    results = {result["name"]: result for result in committed_results() if "measured" in result}
    if unknown := sorted(set(names) - results.keys()):
        raise ValueError(f"there are no numbers of {unknown[0]!r} to draw{nearest(unknown[0], list(results))}")
    for name in names or results:
        result = results[name]
        try:
            recipe = task_module(result["task"]).Recipe.model_validate(result["recipe"])
        except ValidationError:  # the form of the recipe has changed since
            recipe = load_recipe(CONFIGURATION / "recipe" / f"{name}.yaml")
        draw_result(recipe, result["measured"], RESULTS / name)


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("collect")
def _collect(names: list[str]) -> None:
    collect(*names)


@app.command("pictures")
def _pictures(names: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    draw_pictures(*names or [])


@app.command("tables")
def _tables(paths: list[Path]) -> None:
    rewrite_tables(*paths)


if __name__ == "__main__":
    app()

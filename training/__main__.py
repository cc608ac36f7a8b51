# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m training VERB ...`, from the clone.

Each verb imports what it needs only when it is called, so that `--help` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from training.commands import VERBS, Tools, plain_errors
from training.commands.loading import model_folder
from training.paths import recipe_file


app = typer.Typer(
    name="python -m training",
    help="Train, evaluate and use Memory Mosaics and the models they are compared with.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    str, typer.Argument(help="A file, or the name of one in configuration/recipe, such as demo.", metavar="RECIPE")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that win over the file's: seed=1 training.learning_rate=1e-3")
]
Folder = Annotated[Path, typer.Argument(help="An exported folder, a checkpoint, or the folder of a finished run.")]


# Tools of the verbs that are also installed, which import what they need when they are called.


def _load(folder: str | Path) -> tuple[Any, Any]:
    from transformers.utils.logging import disable_progress_bar

    from training.evaluate import load_model

    disable_progress_bar()  # small models load in no time
    return load_model(folder)


def _memorize(folder: str | Path, files: Sequence[Path], output: Path, dtype: str | None) -> Any:
    from transformers import PreTrainedConfig

    if PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == "memory_model":
        from training.vectors import encode_files

        return encode_files(Path(folder), files, output, dtype)
    from training.memories import memorize_files

    return memorize_files(Path(folder), files, output, dtype)


def _forget(folder: str | Path, memory: Path, source: str) -> Any:
    from training.memories import forget_source

    return forget_source(Path(folder), memory, source)


def _masked(message: str) -> str:
    from training.secrecy import masked

    return masked(message)  # a message may quote a setting or an answer of the Hub


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    context.obj = Tools("python -m training", debug, model_folder, _load, _memorize, _forget, _masked)


@app.command()
def run(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option("--restart", help="Move an earlier run aside and start again.")] = False,
) -> None:
    """Run a recipe; the same command again resumes, or shows the finished result."""
    with plain_errors(context):
        file = recipe_file(recipe)  # before the imports below, which take seconds
        from accelerate import PartialState

        from training.recipe import load_recipe, task_module

        parsed = load_recipe(file, overrides)
        task = task_module(parsed.task)
        result = task.run(parsed, restart=restart)
        # Under `accelerate launch` all processes come here.
        if PartialState().is_main_process:
            typer.echo(task.summary(result, parsed.folder))


def _readable(value: Any) -> str:
    """Return a value of a plan: digits in groups, trillions in words too, and larger values as powers of ten."""
    if not isinstance(value, (int, float)):
        return str(value)
    if value >= 1e16:
        return f"{value:.3e}"
    return f"{value:,} ({value / 1e12:,.4g} trillion)" if value >= 1e12 else f"{value:,}"


@app.command("dry-run")
def dry_run(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = None,
    teraflops: Annotated[
        float | None, typer.Option(help="Peak of one device in the training precision; gives the hours.")
    ] = None,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the peak that training reaches; 0.4 by default.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Number of devices that train; those that this command has by default.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="How devices share the model: numbers of replicas, shards, heads, texts.")
    ] = None,
) -> None:
    """Show the resolved recipe and what it amounts to: tokens, steps, operations, memory. Reads no data."""
    with plain_errors(context):
        file = recipe_file(recipe)
        from training.recipe import load_recipe, plan_of

        parsed = load_recipe(file, overrides)
        typer.echo(parsed.to_yaml())
        machine = {"teraflops": teraflops, "utilisation": utilisation, "devices": devices, "layout": layout}
        for name, value in plan_of(parsed, **machine).items():
            typer.echo(f"{name}: {_readable(value)}")


@app.command()
def evaluate(
    context: typer.Context,
    folder: Folder,
    source: Annotated[str, typer.Option(help="Stories: 'embedded', a local file or folder, or a name on the Hub.")],
    split: str = "validation",
    text_field: str = "text",
    separator: str = "<|endoftext|>",
    num_stories: Annotated[int | None, typer.Option(help="Only so many; all by default.")] = None,
    context_length: Annotated[int | None, typer.Option(help="Tokens per window; the model's own by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 16,
) -> None:
    """Print loss (nats per token), perplexity and bits per byte on any stories, as JSON."""
    with plain_errors(context):
        folder = model_folder(folder)
        import json

        from training.evaluate import evaluate_folder
        from training.recipe import SourceSection

        section = SourceSection(
            source=source, split=split, text_field=text_field, separator=separator, num_stories=num_stories
        )
        typer.echo(json.dumps(evaluate_folder(folder, section, context_length, batch_size), indent=1))


for verb in VERBS:
    app.command()(verb)


@app.command()
def convert(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the authors' code, or a folder of a mosaic.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Turn a checkpoint of the authors' code into a folder that transformers loads, or a mosaic into one of v2."""
    with plain_errors(context):
        if checkpoint.is_dir():
            from training.convert_to_v2 import convert_folder_to_v2

            convert_folder_to_v2(checkpoint, output)
        else:
            from training.convert import convert_checkpoint

            convert_checkpoint(checkpoint, output)


def _refuse_needless(options: dict[str, Any], reason: str) -> None:
    """Raise `ValueError` for options that are given where they mean nothing."""
    if needless := [f"--{name}" for name, value in options.items() if value]:
        raise ValueError(f"{reason}: leave out {', '.join(needless)}")


@app.command()
def publish(
    context: typer.Context,
    run: Annotated[
        str,
        typer.Argument(
            help="The folder of a finished run or of a memory; with --verify-only, a published folder or USER/NAME."
        ),
    ],
    repo_id: Annotated[str | None, typer.Option(help="Where to: user/name on the Hub.")] = None,
    what: Annotated[
        str | None,
        typer.Option(help="model, adapter, merged, dataset, space, memory, vectors; by default what the run makes."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="user/name@COMMIT of what an adapter or a merged model was made from, has read a memory, or a Space "
            "shows."
        ),
    ] = None,
    about: Annotated[
        Path | None, typer.Option(help="What no result knows, for the card; hub_cards/about/RECIPE.yaml by default.")
    ] = None,
    init: Annotated[
        bool,
        typer.Option("--init", help="Only begin the file of --about, with checksums of what was read."),
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a new repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it in a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before anything is uploaded.")] = False,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Check what is published already; upload nothing.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="With --verify-only: a commit, branch or tag.")] = None,
) -> None:
    """Stage what a run has made with its card, check and try it, list its files, and upload it in one commit."""
    with plain_errors(context):
        from training.publishing import publish as publishing  # under another name: `publish` is this command

        # Not `what`, which --verify-only takes too, nor `about`, which --init does.
        for_publishing: dict[str, Any] = {"repo-id": repo_id, "base": base, "public": public, "create-pr": create_pr}
        given = for_publishing | {"dry-run": dry_run}
        if init:
            _refuse_needless(given | {"what": what, "verify-only": verify_only}, "--init writes one file")
            typer.echo(f"{publishing.init(Path(run), about)} is begun: fill its empty fields in, and publish with it")
            return
        if verify_only:
            _refuse_needless(given | {"about": about}, "--verify-only publishes nothing")
            publishing.verify_published(run, revision, what, log=typer.echo)
            return
        if revision is not None:
            raise ValueError(f"--revision is {revision!r}, which is for --verify-only: leave it out")
        if repo_id is None:
            raise ValueError("give --repo-id user/name: where on the Hub it goes")
        publishing.publish(Path(run), repo_id, what, about, base, public, create_pr, dry_run, log=typer.echo)


if __name__ == "__main__":
    sys.exit(app())

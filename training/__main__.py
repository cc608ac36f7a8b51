# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m training VERB ...`, from the clone.

Each verb imports what it needs only when it is called, so that `--help` answers at once.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.paths import model_folder, recipe_file


if TYPE_CHECKING:
    from training.recipe import BaseRecipe

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
Temperature = Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token.", min=0.0)]


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    context.obj = debug


@contextlib.contextmanager
def _plain_errors(context: typer.Context) -> Iterator[None]:
    """Show an error that the user can mend as one message; others, and all of them with --debug, as a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if context.obj:
            raise
        from training.secrecy import masked

        # A message may quote a setting or an answer of the Hub.
        message = masked(f"{type(error).__name__}: {error}")
        typer.echo(f"{message}\n(python -m training --debug ... shows where)", err=True)
        raise typer.Exit(1) from error


@app.command()
def run(
    context: typer.Context,
    recipe: RecipePath,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option("--restart", help="Move an earlier run aside and start again.")] = False,
) -> None:
    """Run a recipe; the same command again resumes, or shows the finished result."""
    with _plain_errors(context):
        file = recipe_file(recipe)  # before the imports below, which take seconds
        from accelerate import PartialState

        from training.recipe import load_recipe, task_module

        parsed = load_recipe(file, overrides)
        task = task_module(parsed.task)
        result = task.run(parsed, restart=restart)
        # Under `accelerate launch` all processes come here.
        if PartialState().is_main_process:
            typer.echo(task.summary(result, parsed.folder))


def _plan(task: ModuleType, recipe: "BaseRecipe", machine: dict[str, float | None]) -> dict[str, Any]:
    """Return the task's plan; `ValueError` for an option of the machine that the task does not take."""
    options = {name: value for name, value in machine.items() if value is not None}
    unknown = sorted(options.keys() - inspect.signature(task.plan).parameters.keys())
    if unknown:
        names = ", ".join(f"--{name}" for name in unknown)
        raise ValueError(f"the task {recipe.task!r} estimates no cost of a machine: leave out {names}")
    return task.plan(recipe, **options)


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
) -> None:
    """Show the resolved recipe and what it amounts to: tokens, steps, operations, memory. Reads no data."""
    with _plain_errors(context):
        file = recipe_file(recipe)
        from training.recipe import load_recipe, task_module

        parsed = load_recipe(file, overrides)
        typer.echo(parsed.to_yaml())
        machine = {"teraflops": teraflops, "utilisation": utilisation, "devices": devices}
        for name, value in _plan(task_module(parsed.task), parsed, machine).items():
            typer.echo(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")


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
    with _plain_errors(context):
        folder = model_folder(folder)
        import json

        from training.evaluate import evaluate_folder
        from training.recipe import SourceSection

        section = SourceSection(
            source=source, split=split, text_field=text_field, separator=separator, num_stories=num_stories
        )
        typer.echo(json.dumps(evaluate_folder(folder, section, context_length, batch_size), indent=1))


@app.command()
def generate(
    context: typer.Context,
    folder: Folder,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Beginnings to continue.", metavar="PROMPT", show_default=False)
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One more of them.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a continuation, in tokens.", min=1)] = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that hold this probability.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
) -> None:
    """Continue prompts."""
    with _plain_errors(context):
        beginnings = [*(prompts or []), *(prompt or [])]
        if not beginnings:
            raise ValueError('give a beginning to continue: generate FOLDER "Once upon a time"')
        if top_p == 0:
            raise ValueError("--top-p 0 leaves no token to choose: give a number above 0, or --temperature 0")
        folder = model_folder(folder)
        from training.generate import generate_texts

        # transformers refuses a temperature of 0 and has another name for it.
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        generate_texts(folder, beginnings, seed=seed, stream=True, max_new_tokens=max_new_tokens, **sampling)


@app.command()
def chat(
    context: typer.Context,
    folder: Folder,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a continuation, in tokens.", min=1)] = 64,
    temperature: Temperature = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
) -> None:
    """Continue what you type, line after line, with all of it in memory; /help lists what else you can type."""
    with _plain_errors(context):
        folder = model_folder(folder)
        from training.chat import Chat, talk

        talk(Chat(folder, max_new_tokens, temperature, seed))


@app.command()
def memorize(
    context: typer.Context,
    folder: Folder,
    files: Annotated[
        list[Path],
        typer.Argument(help="Texts in UTF-8; each is read alone, and named by its path within this folder."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the stored pairs: float32, bfloat16, int8 or fp8; the model's by default.")
    ] = None,
) -> None:
    """Let a model read files, and write what it has read as a memory."""
    with _plain_errors(context):
        folder = model_folder(folder)
        from training.memories import memorize_files

        typer.echo(memorize_files(folder, files, output, dtype))


@app.command()
def ask(
    context: typer.Context,
    folder: Folder,
    question: Annotated[str, typer.Argument(help="A text to continue behind what was read.")],
    memory: Annotated[
        list[str], typer.Option(help="A folder of `memorize`, or USER/NAME; may be given several times.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, in tokens.")] = 32,
    temperature: Temperature = 0.0,
    bandwidth: Annotated[
        float | None, typer.Option(help="Exponent by which kernels narrow with the number of pairs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Answer behind the joined memories, and show what each of their texts added to the answer, in nats."""
    with _plain_errors(context):
        folder = model_folder(folder)
        from training.memories import ask as answer

        sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        sampling |= {"temperature": temperature} if temperature > 0 else {}
        text, totals = answer(folder, memory, question, seed, bandwidth, **sampling)
        typer.echo(text)
        for name, nats in totals:
            typer.echo(f"{nats:9.2f}  {name}", err=True)


@app.command()
def forget(
    context: typer.Context,
    folder: Folder,
    memory: Annotated[Path, typer.Option(help="A folder of `memorize`, which is changed.")],
    source: Annotated[str, typer.Option(help="The name of a text in it, see `info`.")],
) -> None:
    """Forget a text: from then on, answers are those of a memory that never had it."""
    with _plain_errors(context):
        from training.memories import forget_source

        typer.echo(forget_source(folder, memory, source))


@app.command()
def info(
    context: typer.Context,
    memory: Annotated[Path, typer.Argument(help="A folder of `memorize`.")],
) -> None:
    """Print what a stored memory is, as JSON."""
    with _plain_errors(context):
        import json

        from training.memories import describe

        typer.echo(json.dumps(describe(memory), indent=1))


@app.command()
def convert(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of the authors' code, or a folder of a mosaic.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Turn a checkpoint of the authors' code into a folder that transformers loads, or a mosaic into one of v2."""
    with _plain_errors(context):
        if checkpoint.is_dir():
            from training.convert_to_v2 import convert_folder_to_v2

            convert_folder_to_v2(checkpoint, output)
        else:
            from training.convert import convert_checkpoint

            convert_checkpoint(checkpoint, output)


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
        typer.Option(help="model, adapter, merged, dataset, space, memory; by default what the run makes."),
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
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a new repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it in a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before anything is uploaded.")] = False,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Check what is published already; upload nothing.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="With --verify-only: a commit, branch or tag.")] = None,
) -> None:
    """Stage what a run has made with its card, check and try it, list its files, and upload it in one commit."""
    with _plain_errors(context):
        from training.publishing import publish as publishing  # under another name: `publish` is this command

        # Not `what`, which --verify-only takes too.
        for_publishing: dict[str, Any] = {"repo-id": repo_id, "base": base, "about": about}
        for_publishing |= {"public": public, "create-pr": create_pr, "dry-run": dry_run}
        needless = [f"--{name}" for name, value in for_publishing.items() if value]
        if verify_only and needless:
            raise ValueError(f"--verify-only publishes nothing: leave out {', '.join(needless)}")
        if verify_only:
            publishing.verify_published(run, revision, what, log=typer.echo)
            return
        if revision is not None:
            raise ValueError(f"--revision is {revision!r}, which is for --verify-only: leave it out")
        if repo_id is None:
            raise ValueError("give --repo-id user/name: where on the Hub it goes")
        publishing.publish(Path(run), repo_id, what, about, base, public, create_pr, dry_run, log=typer.echo)


if __name__ == "__main__":
    sys.exit(app())

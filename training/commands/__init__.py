# SPDX-License-Identifier: Apache-2.0
"""The verbs that need no clone: `memory-mosaic memorize | ask | forget | info | generate | chat | inspect`.

Installed, this folder is the package `memory_mosaic_commands`, beside `modeling_memory_mosaic`. In the clone,
`python -m training` has the same verbs, with tools of its own: what a run has written is checked before it is loaded,
and a memory gets a result, by which it can be published. So nothing here imports `training`. `--help` imports neither
torch nor transformers, and a mistake shows before they are imported.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from . import loading


class Tools(NamedTuple):
    """What the verbs use, in `context.obj`.

    Args:
        command: how the program is called, for messages.
        debug: whether an error is shown with its traceback.
        find: returns where a model is, by its name on the command line, without importing anything heavy.
        load: returns model and tokenizer.
        memorize: lets a model read files, and writes the memory into a folder.
        forget: forgets a text of the memory in a folder.
        shown: returns the text of an error, without what must not be shown.
    """

    command: str
    debug: bool
    find: Callable[[str], str | Path]
    load: Callable[[str | Path], tuple[Any, Any]]
    memorize: Callable[[str | Path, Sequence[Path], Path, str | None], Any]
    forget: Callable[[str | Path, Path, str], Any]
    shown: Callable[[str], str]


Model = Annotated[
    str, typer.Argument(help="A folder: an exported model, a checkpoint, a finished run. Installed: also USER/NAME.")
]
Temperature = Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token.", min=0.0)]
Seed = Annotated[int, typer.Option(help="Of the sampling.", min=0)]


@contextlib.contextmanager
def plain_errors(context: typer.Context) -> Iterator[None]:
    """Show an error that the user can mend as one message; others, and all of them with --debug, as a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        tools: Tools = context.obj
        if tools.debug:
            raise
        message = tools.shown(f"{type(error).__name__}: {error}")
        typer.echo(f"{message}\n({tools.command} --debug ... shows where)", err=True)
        raise typer.Exit(1) from error


def memorize(
    context: typer.Context,
    folder: Model,
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
    with plain_errors(context):
        tools: Tools = context.obj
        typer.echo(tools.memorize(tools.find(folder), files, output, dtype))


def ask(
    context: typer.Context,
    folder: Model,
    question: Annotated[str, typer.Argument(help="A text to continue behind what was read.")],
    memory: Annotated[
        list[str], typer.Option(help="A folder of `memorize`, or USER/NAME; may be given several times.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, in tokens.", min=1)] = 32,
    temperature: Temperature = 0.0,
    bandwidth: Annotated[
        float | None, typer.Option(help="Exponent by which kernels narrow with the number of pairs.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Answer behind the joined memories, and show what each of their texts added to the answer, in nats."""
    with plain_errors(context):
        tools: Tools = context.obj
        place = tools.find(folder)
        from .texts import answer

        sampling: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
        sampling |= {"temperature": temperature} if temperature > 0 else {}
        text, totals = answer(*tools.load(place), memory, question, seed, bandwidth, **sampling)
        typer.echo(text)
        for name, nats in totals:
            typer.echo(f"{nats:9.2f}  {name}", err=True)


def forget(
    context: typer.Context,
    folder: Model,
    memory: Annotated[Path, typer.Option(help="A folder of `memorize`, which is changed.")],
    source: Annotated[str, typer.Option(help="The name of a text in it, see `info`.")],
) -> None:
    """Forget a text: from then on, answers are those of a memory that never had it."""
    with plain_errors(context):
        tools: Tools = context.obj
        typer.echo(tools.forget(tools.find(folder), memory, source))


def info(
    context: typer.Context,
    memory: Annotated[Path, typer.Argument(help="A folder of `memorize`.")],
) -> None:
    """Print what a stored memory is, as JSON."""
    with plain_errors(context):
        import json

        from .texts import describe_memory

        typer.echo(json.dumps(describe_memory(memory), indent=1))


def generate(
    context: typer.Context,
    folder: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Beginnings to continue.", metavar="PROMPT", show_default=False)
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="One more of them.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a continuation, in tokens.", min=1)] = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that hold this probability.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Seed = 0,
) -> None:
    """Continue prompts."""
    with plain_errors(context):
        tools: Tools = context.obj
        beginnings = [*(prompts or []), *(prompt or [])]
        if not beginnings:
            raise ValueError('give a beginning to continue: generate FOLDER "Once upon a time"')
        if top_p == 0:
            raise ValueError("--top-p 0 leaves no token to choose: give a number above 0, or --temperature 0")
        place = tools.find(folder)
        from .texts import continue_texts

        # transformers refuses a temperature of 0 and has another name for it.
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        loaded = tools.load(place)
        continue_texts(*loaded, beginnings, seed=seed, stream=True, max_new_tokens=max_new_tokens, **sampling)


def chat(
    context: typer.Context,
    folder: Model,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a continuation, in tokens.", min=1)] = 64,
    temperature: Temperature = 0.8,
    seed: Seed = 0,
) -> None:
    """Continue what you type, line after line, with all of it in memory; /help lists what else you can type."""
    with plain_errors(context):
        tools: Tools = context.obj
        place = tools.find(folder)
        from .chat import Chat, talk

        talk(Chat(*tools.load(place), max_new_tokens, temperature, seed))


def inspect(
    context: typer.Context,
    folder: Model,
    text: Annotated[str, typer.Argument(help="What the model reads.")],
) -> None:
    """Show what each memory of a model does while it reads a text, as a table: a row for each head."""
    with plain_errors(context):
        tools: Tools = context.obj
        place = tools.find(folder)
        from .texts import units_table

        typer.echo(units_table(*tools.load(place), text))


VERBS = (memorize, ask, forget, info, generate, chat, inspect)

app = typer.Typer(
    name="memory-mosaic",
    help="Use Memory Mosaics: continue texts, read files into a memory, ask it, and look inside.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    app.command()(verb)


@app.callback()
def main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    context.obj = Tools("memory-mosaic", debug, loading.find, loading.load, loading.memorize, loading.forget, str)

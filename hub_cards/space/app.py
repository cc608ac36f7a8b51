# SPDX-License-Identifier: Apache-2.0
"""A page that shows the memory of a Memory Mosaic or a memory model: `python hub_cards/space/app.py FOLDER_OR_REPO`.

`texts.py` is the first tab: the model continues a text, and the page shows which memories each token came from.
`memories.py` is the second one, of documents that are joined and forgotten. A memory model has one tab, `vectors.py`:
what its memories hold of a text. `marked.py` shows tokens, `shared.py` is what tabs use besides, `page.css` has the
looks. In a Space the package `modeling_memory_mosaic` and the folder `model` lie beside these files: no code of a
repository is run.
"""

import argparse
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any


# Gradio reads this when it is imported. Without it, the page would send usage data to another server.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import metadata_load  # noqa: E402
from huggingface_hub.utils import HFValidationError, validate_repo_id  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase  # noqa: E402

import memories  # noqa: E402
import texts  # noqa: E402
import vectors  # noqa: E402
from modeling_memory_mosaic import (  # noqa: E402
    MemoryModelForCausalLM,
    MemoryMosaicForCausalLM,
    MemoryMosaicV2ForCausalLM,
)
from modeling_memory_mosaic.files_memory_mosaic import ARXIV  # noqa: E402


# In bytes. A request of this page has a few kilobytes: nothing is uploaded.
LARGEST_REQUEST = 2**20
MOST_WAITING = 32
BESIDE = Path(__file__).with_name("model")
CLASSES = {one.__name__: one for one in (MemoryMosaicForCausalLM, MemoryMosaicV2ForCausalLM, MemoryModelForCausalLM)}
TITLES = {
    "memory_mosaic": "Memory Mosaics",
    "memory_mosaic_v2": "Memory Mosaics at scale",
    "memory_model": "Language Model Memory and Memory Models for Language",
}


def load(source: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load model (in float32, evaluation mode) and tokenizer from a folder or from a repository on the Hub.

    Raises:
        ValueError: it does not hold a Memory Mosaic that predicts tokens, or a memory model with memories, with finite
            weights and its tokenizer.
    """
    remedy = f"Pass a folder, or the name of a repository on the Hub, that holds a {' or '.join(CLASSES)}."
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        is_missing = Path(source).is_absolute() and not Path(source).exists()
        reason = "there is no such folder" if is_missing else str(error).splitlines()[0]
        raise ValueError(f"{source}: no model was found there ({reason}). {remedy}") from error
    architectures = config.architectures or ["no architecture"]
    model_class: Any = CLASSES.get(architectures[0])
    has_memories = getattr(config, "max_memories", None) != 0
    if model_class is None or config.model_type != model_class.config_class.model_type or not has_memories:
        other = f"{', '.join(architectures)} of type {config.model_type}"
        raise ValueError(f"{source}: {other} was found there, whose memories this page cannot show. {remedy}")
    model = model_class.from_pretrained(source, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: the model has no tokenizer beside it. Save its own there: `tokenizer.save_pretrained`."
        ) from error
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{source}: the weights have numbers that are not finite. {remedy}")
    return model.eval(), tokenizer


def repository_of(source: str) -> str | None:
    """Return the repository on the Hub that the model is from, or None for a folder that belongs to none.

    The card of a Space names the model whose copy lies beside the app.
    """
    card = BESIDE.with_name("README.md")
    if Path(source) == BESIDE and card.is_file():
        named = (metadata_load(card) or {}).get("models") or [""]
        source = str(named[0])
    elif Path(source).exists():
        return None
    try:
        validate_repo_id(source)
    except HFValidationError:
        return None
    return source


def heading(model: Any, repository: str | None) -> str:
    """Return, as HTML, the title of the page, with links to the model and the paper."""
    name = "This model"
    if repository is not None:
        name = f'The model <a href="https://huggingface.co/{repository}">{repository}</a>'
    number, title = ARXIV[model.config.model_type], TITLES[model.config.model_type]
    paper = f'The paper explains it: <a href="https://arxiv.org/abs/{number}">{title}, arXiv {number}</a>.</p>'
    if model.config.model_type == "memory_model":
        return (
            f"<h1>What a memory holds</h1><p>{name} is a memory model of {model.num_parameters():,} parameters: "
            f"{model.config.chunk_length} tokens become a memory of {model.config.memory_numbers:,} numbers. {paper}"
        )
    lacks, memories_of_layer = described(model.config)
    return (
        f"<h1>The memory of a Memory Mosaic</h1><p>{name} is a language model of {model.num_parameters():,} "
        f"parameters. It has {lacks}. It predicts each token from its memories: {model.config.num_hidden_layers} "
        f"layers have {memories_of_layer} each. {paper}"
    )


def described(config: PreTrainedConfig) -> tuple[str, str]:
    """Return in words what a model lacks, and which memories a layer has."""
    heads = config.num_attention_heads
    if config.model_type == "memory_mosaic":
        return (
            "no attention, no feed-forward layers and no positions",
            f"{heads} contextual and {heads} persistent ones",
        )
    contextual = f"{config.num_short_term_heads} short-term and {config.num_long_term_heads} long-term ones"
    is_dense = config.persistent_memory_type == "swiglu"
    return (
        "no attention and no positions",
        f"{contextual} and {'a dense layer' if is_dense else f'{heads} persistent ones'}",
    )


def make_page(model: Any, tokenizer: PreTrainedTokenizerBase, repository: str | None = None) -> gr.Blocks:
    """Return the page with the tabs of the model. It links to its repository, if there is one."""
    is_memory_model = model.config.model_type == "memory_model"
    with gr.Blocks(title="What a memory holds" if is_memory_model else "The memory of a Memory Mosaic") as page:
        gr.HTML(heading(model, repository), elem_id="heading")
        if is_memory_model:
            vectors.make_tab(page, model, tokenizer)
            return page
        with gr.Tab("A text"):
            texts.make_tab(page, model, tokenizer)
        with gr.Tab("Memories") as tab:
            memories.make_tab(tab, model, tokenizer)
    return page


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BoundedRequests:
    """An ASGI application that refuses a request of more than `LARGEST_REQUEST` bytes before it takes up memory."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        received = 0
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        # By its digits first: a number of thousands of them takes long to read.
        if not stated.isdigit() or len(stated) > 9 or int(stated) > LARGEST_REQUEST:
            return await self.refuse(send)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            # A request that states no length and is too long ends as if the visitor had left.
            return message if received <= LARGEST_REQUEST else {"type": "http.disconnect"}

        return await self.app(scope, counted, send)

    async def refuse(self, send: Send) -> None:
        # The rest of the request is not read, so the connection cannot take another.
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": f"over {LARGEST_REQUEST:,} bytes".encode()})


def main() -> None:
    parser = argparse.ArgumentParser(description="Show a page on the memory of a Memory Mosaic.")
    parser.add_argument("source", nargs="?", default=str(BESIDE), help="folder of a model, or repository on the Hub")
    source = parser.parse_args().source
    try:
        page = make_page(*load(source), repository_of(source))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    # The file of half-bold letters that Gradio brings lacks many of them.
    letters: list[gr.themes.Font | str] = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "sans-serif"]
    theme = gr.themes.Default(primary_hue="blue", font=letters)
    page.queue(max_size=MOST_WAITING)
    page.launch(
        theme=theme,
        css_paths=Path(__file__).with_name("page.css"),
        footer_links=[],
        max_file_size=1,
        app_kwargs={"middleware": [Middleware(BoundedRequests)]},
        run_history=False,
        ssr_mode=False,
        state_session_capacity=100,
    )


if __name__ == "__main__":
    main()

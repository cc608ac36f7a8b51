# SPDX-License-Identifier: Apache-2.0
"""Continuing a text in turns: a person writes a line, the model goes on, and all of it stays in memory.

A Memory Mosaic can store what it has read so far, and other texts can be read behind it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import TextStreamer, set_seed

from modeling_memory_mosaic import MosaicMemory
from modeling_memory_mosaic.cache_memory_mosaic import MEMORY_NAME


HELP = """/memory          what the model holds
/memory FOLDER   write it into a folder, for `ask` and `MosaicMemory.from_pretrained`
/new             forget all of it
/quit            end; so does the end of the input"""


class Chat:
    """A text that a person and a model write in turns, and the memory of it.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        max_new_tokens: of a turn of the model.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of the sampling.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int, temperature: float, seed: int):
        self.model, self.tokenizer = model, tokenizer
        self.is_mosaic = hasattr(self.model, "memorize")
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        self.options |= {"temperature": temperature} if temperature > 0 else {}
        set_seed(seed)  # after loading, which may draw random numbers
        self.forget()

    def forget(self) -> None:
        """Begin an empty text."""
        self.ids = torch.zeros(1, 0, dtype=torch.long, device=self.model.device)
        self.cache: Any = None

    def answer(self, text: str) -> str:
        """Read a text behind all that came before, print the continuation while it is generated, and return it."""
        new = self.tokenizer(text, return_tensors="pt", add_special_tokens=False, split_special_tokens=True)
        read = torch.cat([self.ids, new["input_ids"].to(self.ids)], dim=1)
        # The memory has all tokens but the last, as nothing has asked what follows it. Other models take all ids.
        num_held = self.cache.get_seq_length() if self.cache is not None and self.is_mosaic else 0
        given = read[:, num_held:]
        output = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            return_dict_in_generate=True,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            pad_token_id=self.tokenizer.pad_token_id,
            **{MEMORY_NAME: self.cache},
            **self.options,
        )
        answer = output.sequences[:, given.shape[1] :]
        self.cache, self.ids = output[MEMORY_NAME], torch.cat([read, answer], dim=1)
        return str(self.tokenizer.decode(answer[0], skip_special_tokens=True))

    def memory(self) -> MosaicMemory:
        """Return the memory of the whole text.

        Raises:
            ValueError: the model is no Memory Mosaic, or it has not read two tokens.
        """
        if not hasattr(self.model, "memorize"):
            raise ValueError(
                f"the model is a {self.model.config.model_type}: only Memory Mosaics have a memory to keep"
            )
        if self.ids.shape[1] < 2:
            raise ValueError("there is no memory yet: a text of fewer than two tokens leaves no pair")
        memory: MosaicMemory = self.model.memorize(self.ids, source="chat", tokenizer=self.tokenizer)
        return memory

    def do(self, command: str) -> str:
        """Do what a line that begins with a slash asks for, and return what to print."""
        verb, _, argument = command.partition(" ")
        if verb == "/new" and not argument:
            self.forget()
            return "all forgotten"
        if verb != "/memory":
            return HELP if verb == "/help" else f"{command!r} is no command:\n{HELP}"
        memory = self.memory()
        held = f"{self.ids.shape[1]:,} tokens, {len(memory):,} pairs in each head, {memory.nbytes / 1e6:.1f} MB"
        if not argument:
            return held
        folder = Path(argument)
        if folder.exists():
            raise ValueError(f"{folder} exists already: remove it, or name another folder")
        memory.save_pretrained(folder)
        return f"{held}, written into {folder}"


def talk(chat: Chat, read_line: Callable[[str], str] = input) -> None:
    """Take turns until the input ends.

    Args:
        read_line: returns the next line, or raises `EOFError`.
    """
    typer.echo(HELP)
    while True:
        try:
            line = read_line("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if line.strip() == "/quit":
            return
        if line.startswith("/"):
            try:
                typer.echo(chat.do(line.strip()))
            except ValueError as error:
                typer.echo(str(error), err=True)
        elif line.strip():
            chat.answer(line)

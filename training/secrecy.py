# SPDX-License-Identifier: Apache-2.0
"""Secrets: how a token, key or password is known, and the places where none may be written down.

Nothing here shows a secret: a message names the kind, the file and the line, or the setting. What is looked for are
the tokens of this machine, wherever they stand, and strings that have the form of a token.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

from training.bounded import open_packed, walk


# By its kind, the form of a secret. ASCII, so that bytes of any encoding of text can be searched.
FORMS = {
    "a Hugging Face token": rb"\b(?:hf_|api_org_)[A-Za-z0-9]{20,}",
    "a key of an API": rb"\bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})",
    "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?i:aws_secret_access_key)\W{1,5}[A-Za-z0-9/+]{40}",
    "a Google key": rb"\b(?:AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,})",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a Stripe key": rb"\b[rs]k_live_[A-Za-z0-9]{20,}",
    "an npm token": rb"\bnpm_[A-Za-z0-9]{36}",
    "a PyPI token": rb"\bpypi-[A-Za-z0-9_-]{50,}",
    "a JSON web token": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----",
    "a password in an address": rb"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"']{1,100}:[^\s/:@\"']{1,200}@",
}
# One group for each form, in order: the number of the group that matched tells the kind.
_ANY_FORM = re.compile(b"|".join(b"(" + form + b")" for form in FORMS.values()))
_KINDS = tuple(FORMS)
# What stands before `token` in the name of a token of text.
_TOKENS_OF_TEXT = {*("bos", "eos", "pad", "unk", "sep", "cls", "mask"), *("start", "special", "extra")}
_SECRET_ENDING = re.compile(
    r"(?:^|_)(?:(?P<before>[a-z]+_)?token|passwords?|passwd|passphrase|secrets?|credentials?|auth|authorization"
    r"|(?:api|access|private|secret)_?key)$"
)
# Longer than any token; what a chunk of a file shares with the one before it.
_OVERLAP, _CHUNK = 4096, 2**20
_SHORTEST_TOKEN, _SHORTEST_VARIABLE = 8, 16


@functools.lru_cache(maxsize=4096)
def names_secret(key: str) -> bool:
    """Whether a setting or a variable of this name holds a secret: `hub_token`, `apiKey`, `WANDB_API_KEY`."""
    for part in re.split(r"[.\[\]]", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)):
        found = _SECRET_ENDING.search(re.sub(r"\W", "_", part).lower())
        if found is not None and (found["before"] or "").rstrip("_") not in _TOKENS_OF_TEXT:
            return True
    return False


def own_tokens() -> set[str]:
    """The tokens of this machine: of the Hub, as set and as stored, and what variables of the environment hold."""
    tokens = [get_token() or "", *get_stored_tokens().values()]
    variables = [value for name, value in os.environ.items() if names_secret(name) and not Path(value).is_absolute()]
    return {token for token in tokens if len(token) >= _SHORTEST_TOKEN} | {
        value for value in variables if len(value) >= _SHORTEST_VARIABLE
    }


def _secret_in(text: str, tokens: set[str]) -> str | None:
    """The kind of the first secret in a text; None if there is none."""
    if any(token in text for token in tokens):
        return "a token of this machine"
    found = _ANY_FORM.search(text.encode("utf-8", "replace"))
    return None if found is None else _KINDS[found.lastindex - 1]


def masked(text: object) -> str:
    """A text with every secret in it replaced by `[secret]`: for messages."""
    shown = str(text)
    for token in sorted(own_tokens(), key=len, reverse=True):
        shown = shown.replace(token, "[secret]")
    return _ANY_FORM.sub(b"[secret]", shown.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def refuse_secrets(settings: Any, where: str) -> None:
    """`ValueError`, which names the setting and never its value, if settings hold a secret at any depth.

    Args:
        settings: as of JSON.
        where: what holds them, for the message.
    """
    tokens = own_tokens()
    for place, key, value in walk(settings):
        kind = _secret_in(key, tokens)
        if kind is not None:
            raise ValueError(f"the name of a setting in {where} is what {kind} looks like: take it out")
        if names_secret(key):
            raise ValueError(
                f"{where} sets `{place}`, which is for a secret, and all of it is written into results that may be "
                "published: leave it out, and log in with `hf auth login` or set HF_TOKEN"
            )
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        kind = _secret_in(text, tokens) if isinstance(text, str) else None
        if kind is not None:
            raise ValueError(
                f"`{place}` in {where} is what {kind} looks like, and all of it is written into results that may be "
                "published: take it out"
            )


def check_no_secrets(folder: Path, names: list[str]) -> str:
    """Search files for secrets before they are uploaded; returns in words that there is none.

    Tokens of this machine are looked for in every byte. Forms of tokens are looked for in all files but weights, of
    which only the header is text.

    Raises:
        ValueError: naming the file, the line and the kind of the first that is found.
    """
    tokens = own_tokens()
    for name in names:
        kind = _secret_in(name, tokens)
        if kind is not None:
            raise ValueError(f"the name of a file in {folder} is what {kind} looks like: rename it")
        # What is compressed is searched as it is read.
        opened = open_packed(folder / name) if name.endswith(".gz") else (folder / name).open("rb")
        with opened as file:
            end = _end_of_header(folder / name) if name.endswith(".safetensors") else None
            found = _first_secret(file, [token.encode() for token in tokens], end)
        if found is not None:
            raise ValueError(
                f"{name}, line {found[1]}, holds what {found[0]} looks like, and an upload would publish it: take it "
                "out of the run and, if it has been published before, revoke it"
            )
    return f"no token and nothing that looks like one in {len(names)} files"


def _end_of_header(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _first_secret(file: BinaryIO, tokens: list[bytes], end: int | None) -> tuple[str, int] | None:
    """Kind and line of the first secret; forms are looked for up to `end`."""
    before, line, position = b"", 1, 0
    while chunk := file.read(_CHUNK):
        text = before + chunk
        places = [(text.find(token), "a token of this machine") for token in tokens if token in text]
        form = _ANY_FORM.search(text) if end is None or position < end else None
        if form is not None:
            places.append((form.start(), _KINDS[form.lastindex - 1]))
        if places:
            place, kind = min(places)
            return kind, line + text.count(b"\n", 0, place)
        position += len(chunk)
        kept = len(text) - _OVERLAP if len(text) > _OVERLAP else 0
        line += text.count(b"\n", 0, kept)
        before = text[kept:]
    return None

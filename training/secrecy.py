# SPDX-License-Identifier: Apache-2.0
"""Secrets: how a token, key or password is recognised, and checks that none is written down or published.

The checks look for the tokens of this machine and for strings that have the form of a token. A message never shows a
secret: it names the type of secret with the file and line, or the setting.
"""

import functools
import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

from training.untrusted import open_packed, walk


# The form of each type of secret. They match bytes, so that a file is searched whatever its encoding.
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
# One group for each form, in order: the number of the group that matches gives the type of secret.
_ANY_FORM = re.compile(b"|".join(b"(" + form + b")" for form in FORMS.values()))
_TYPES = tuple(FORMS)
_MACHINE_TOKEN = "a token of this machine"
# Before `token`, these make the name of a token of text, such as `eos_token`.
_TOKENS_OF_TEXT = {*("bos", "eos", "pad", "unk", "sep", "cls", "mask"), *("start", "special", "extra")}
_SECRET_ENDING = re.compile(
    r"(?:^|_)(?:(?P<before>[a-z]+_)?token|passwords?|passwd|passphrase|secrets?|credentials?|auth|authorization"
    r"|(?:api|access|private|secret)_?key)$"
)
# A file is searched in chunks. Two neighbours overlap, by more than the length of any token, so that none is cut.
_OVERLAP, _CHUNK = 4096, 2**20
# Shorter values are words that may stand anywhere, and no secrets.
_SHORTEST_TOKEN, _SHORTEST_VARIABLE = 8, 16


@functools.lru_cache(maxsize=4096)
def names_secret(key: str) -> bool:
    """Whether a setting or a variable of this name holds a secret, as `hub_token`, `apiKey` and `WANDB_API_KEY` do."""
    for part in re.split(r"[.\[\]]", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)):
        match = _SECRET_ENDING.search(re.sub(r"\W", "_", part).lower())
        if match is not None and (match["before"] or "").rstrip("_") not in _TOKENS_OF_TEXT:
            return True
    return False


def machine_tokens() -> set[str]:
    """Return the tokens of this machine: those of the Hub, set or stored, and those in environment variables."""
    tokens = [get_token() or "", *get_stored_tokens().values()]
    variables = [value for name, value in os.environ.items() if names_secret(name) and not Path(value).is_absolute()]
    return {token for token in tokens if len(token) >= _SHORTEST_TOKEN} | {
        value for value in variables if len(value) >= _SHORTEST_VARIABLE
    }


def _type_of(match: re.Match[bytes]) -> str:
    assert match.lastindex is not None  # every alternative is a group
    return _TYPES[match.lastindex - 1]


def _secret_in(text: str, tokens: set[str]) -> str | None:
    """Return the type of the first secret in a text; None if there is none."""
    if any(token in text for token in tokens):
        return _MACHINE_TOKEN
    match = _ANY_FORM.search(text.encode("utf-8", "replace"))
    return None if match is None else _type_of(match)


def masked(text: object) -> str:
    """Return a text for a message, with every secret in it replaced by `[secret]`."""
    shown = str(text)
    for token in sorted(machine_tokens(), key=len, reverse=True):
        shown = shown.replace(token, "[secret]")
    return _ANY_FORM.sub(b"[secret]", shown.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def refuse_secrets(settings: Any, where: str) -> None:
    """Raise `ValueError` if settings hold a secret at any depth. The message names the setting, never its value.

    Args:
        settings: a JSON value.
        where: what holds the settings, for the message.
    """
    tokens = machine_tokens()
    for place, key, value in walk(settings):
        secret = _secret_in(key, tokens)
        if secret is not None:
            raise ValueError(f"the name of a setting in {where} is what {secret} looks like: take it out")
        if names_secret(key):
            raise ValueError(
                f"{where} sets `{place}`, which is for a secret, and all of it is written into results that may be "
                "published: leave it out, and log in with `hf auth login` or set HF_TOKEN"
            )
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        secret = _secret_in(text, tokens) if isinstance(text, str) else None
        if secret is not None:
            raise ValueError(
                f"`{place}` in {where} is what {secret} looks like, and all of it is written into results that may be "
                "published: take it out"
            )


def _end_of_header(path: Path) -> int:
    """Return the number of bytes before the tensors of a safetensors file, which begins with the header's length."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _first_secret(file: BinaryIO, tokens: list[bytes], end: int | None) -> tuple[str, int] | None:
    """Return type and line of the first secret in a file.

    Args:
        file: open for reading bytes.
        tokens: of this machine.
        end: search for forms only in chunks that begin before this position; by default everywhere.
    """
    before, line, position = b"", 1, 0
    while chunk := file.read(_CHUNK):
        text = before + chunk
        places = [(text.find(token), _MACHINE_TOKEN) for token in tokens if token in text]
        form = _ANY_FORM.search(text) if end is None or position < end else None
        if form is not None:
            places.append((form.start(), _type_of(form)))
        if places:
            place, secret = min(places)
            return secret, line + text.count(b"\n", 0, place)
        position += len(chunk)
        kept = len(text) - _OVERLAP if len(text) > _OVERLAP else 0
        line += text.count(b"\n", 0, kept)
        before = text[kept:]
    return None


def refuse_secrets_in_texts(texts: dict[str, str]) -> None:
    """Raise `ValueError` if a text holds a secret; the message says which text, line and type of secret.

    Args:
        texts: that are published in a form that `check_no_secrets` cannot search, by their names.
    """
    tokens = [token.encode() for token in machine_tokens()]
    for name, text in texts.items():
        first = _first_secret(io.BytesIO(text.encode("utf-8", "replace")), tokens, None)
        if first is not None:
            secret, line = first
            raise ValueError(
                f"the text {name}, line {line}, holds what {secret} looks like, and an upload would publish it: take "
                "it out of the text, and revoke it if it has been published before"
            )


def check_no_secrets(folder: Path, names: list[str]) -> str:
    """Search files for secrets before they are uploaded.

    The tokens of this machine are searched for in every byte. Forms of tokens are searched for in everything but the
    tensors of weights, whose bytes may look like anything.

    Args:
        folder: of the files.
        names: of the files, relative to the folder.

    Returns:
        A line that says that there is no secret.

    Raises:
        ValueError: a file holds a secret; the message names the file, the line and the type of secret.
    """
    tokens = machine_tokens()
    for name in names:
        secret = _secret_in(name, tokens)
        if secret is not None:
            raise ValueError(f"the name of a file in {folder} is what {secret} looks like: rename it")
        opened = open_packed(folder / name) if name.endswith(".gz") else (folder / name).open("rb")
        with opened as file:
            end = _end_of_header(folder / name) if name.endswith(".safetensors") else None
            first = _first_secret(file, [token.encode() for token in tokens], end)
        if first is not None:
            secret, line = first
            raise ValueError(
                f"{name}, line {line}, holds what {secret} looks like, and an upload would publish it: take it "
                "out of the run and, if it has been published before, revoke it"
            )
    return f"no token and nothing that looks like one in {len(names)} files"

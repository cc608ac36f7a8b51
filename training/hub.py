# SPDX-License-Identifier: Apache-2.0
"""The conversation with the Hub: a published folder appears on `main` in one commit, or not at all.

The payload (all but the card) goes first to a branch named after its checksums, or to a pull request. The card,
pinning that commit, then goes to `main` together with the payload. Whatever stops in between leaves `main` as it was,
and the same again goes on from there. Endpoint and token are those of `huggingface_hub` (`HF_ENDPOINT`, `HF_TOKEN`).
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from training.data import checksum
from training.export import write_text


CARD = "README.md"
RESULT = "result.json"
# Made by the Hub itself in every new repository.
NOBODYS = (".gitattributes",)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where a folder goes.

    Args:
        repo_id: `user/name`.
        repo_type: `model`, `dataset` or `space`.
        public: whether everybody may see a repository that is created; one that exists has to be so already.
        create_pr: propose it in a pull request instead of committing to `main`.
    """

    repo_id: str
    repo_type: str = "model"
    public: bool = False
    create_pr: bool = False


def upload(folder: Path, target: Target, message: str, card: Callable[[str], str]) -> tuple[str, str]:
    """Upload a staged folder; its card is written last, when the commit is known that it pins.

    Args:
        folder: everything but the card, `result.json` among it.
        target: the repository, which is created (private, unless `public`) if it does not exist.
        message: title of the commit.
        card: gives the text of the card that pins a commit of the payload.

    Returns:
        The address of the commit or pull request, and the pinned commit.

    Raises:
        ValueError: the repository holds something else, or the card's metadata are not valid.
        OSError: the Hub refused or was not reached, in plain words and without the token.
    """
    api = HfApi()
    with _told_plainly(target):
        head = _claim(api, folder, target)
        message = f"{message} (payload {payload_hash(folder)[:12]})"
        way = _proposal(api, target, message) if target.create_pr else _branch(api, folder, target, head)
        first = _commit(api, folder, target, message, without=CARD, **way)
        write_text(folder / CARD, card(first.oid))
        if not target.create_pr:
            way = {"revision": "main", "parent_commit": head}
        elif first.pr_revision is not None:
            way = {"revision": first.pr_revision}
        last = _commit(api, folder, target, message, **way)
        return first.pr_url or last.pr_url or last.commit_url, first.oid


def _claim(api: HfApi, folder: Path, target: Target) -> str:
    """The newest commit of `main`; the repository is created if need be, and refused if it is somebody else's."""
    where = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    try:
        found = api.repo_info(**where)
    except RepositoryNotFoundError:
        if target.create_pr:
            raise ValueError(
                f"{target.repo_id} does not exist, or is hidden: there is nothing to propose to"
            ) from None
        sdk = {"space_sdk": "gradio"} if target.repo_type == "space" else {}
        api.create_repo(**where, private=not target.public, **sdk)
        return api.repo_info(**where).sha
    files = [file.rfilename for file in found.siblings or [] if file.rfilename not in NOBODYS]
    if files:
        _refuse_another(folder, target, files)
    if not target.create_pr and found.private == target.public:
        is_now, remedy = ("private", "leave out --public") if found.private else ("public", "pass --public")
        raise ValueError(f"{target.repo_id} is {is_now} already: {remedy}, or change that in its settings first")
    return found.sha


def _refuse_another(folder: Path, target: Target, files: list[str]) -> None:
    """`ValueError` if a repository holds anything but an earlier publication of the same run."""
    remedy = "choose another --repo-id"
    if RESULT not in files:
        shown = ", ".join(sorted(files)[:5])
        raise ValueError(f"{target.repo_id} holds {len(files)} files ({shown}) but no {RESULT} of ours: {remedy}")
    theirs = Path(hf_hub_download(target.repo_id, RESULT, repo_type=target.repo_type))
    ours = {path.name for path in folder.iterdir()}
    for name in ("name", "task", "model", "seed"):
        before, now = (json.loads(path.read_text(encoding="utf-8")).get(name) for path in (theirs, folder / RESULT))
        if before != now:
            raise ValueError(f"{target.repo_id} holds a run whose {name} is {before!r}, not {now!r}: {remedy}")
    for name in ("config.json", "adapter_config.json"):
        if (name in files) != (name in ours):
            which = "has" if name in files else "has no"
            raise ValueError(f"{target.repo_id} {which} {name}, unlike what is to be published: {remedy}")


def _branch(api: HfApi, folder: Path, target: Target, head: str) -> dict[str, Any]:
    """Where the payload is committed first, so that a card can pin it: a branch of its own, away from `main`."""
    name = f"payload-{payload_hash(folder)[:12]}"
    api.create_branch(target.repo_id, repo_type=target.repo_type, branch=name, revision=head, exist_ok=True)
    return {"revision": name}


def _proposal(api: HfApi, target: Target, title: str) -> dict[str, Any]:
    """The pull request that an interrupted upload of the same payload has left, or the wish for a new one."""
    for proposal in api.get_repo_discussions(target.repo_id, repo_type=target.repo_type):
        if proposal.is_pull_request and proposal.title == title and proposal.status in ("draft", "open"):
            return {"revision": f"refs/pr/{proposal.num}"}
    return {"revision": "main", "create_pr": True}


def _commit(
    api: HfApi, folder: Path, target: Target, message: str, revision: str, without: str = "", **options
) -> CommitInfo:
    """Make a revision hold what the folder holds; the present commit, if nothing has changed.

    A file that the commit goes without stays as it is there.
    """
    where = {"repo_id": target.repo_id, "repo_type": target.repo_type, "revision": revision}
    there = {entry.path for entry in api.list_repo_tree(**where, recursive=True) if isinstance(entry, RepoFile)}
    ours = [path for path in published_files(folder) if path != without]
    gone = there - {*ours, *NOBODYS, without}
    operations = [CommitOperationAdd(path, folder / path) for path in ours]
    operations += [CommitOperationDelete(path) for path in sorted(gone)]
    return api.create_commit(**where, operations=operations, commit_message=message, **options)


def published_files(folder: Path) -> list[str]:
    """What a folder would upload, by its path within it, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def payload_hash(folder: Path) -> str:
    """sha256 over names and contents of a folder's files, the card left out."""
    digest = hashlib.sha256()
    for path in published_files(folder):
        if path != CARD:
            digest.update(f"{path}\0{checksum(folder / path)}\n".encode())
    return digest.hexdigest()


def download(repo_id: str, revision: str | None = None, repo_type: str = "model") -> Path:
    """A folder with all files of a repository at one commit, from the cache if they are there."""
    with _told_plainly(Target(repo_id, repo_type), upload=False):
        return Path(snapshot_download(repo_id, revision=revision, repo_type=repo_type))


@contextlib.contextmanager
def _told_plainly(target: Target, upload: bool = True) -> Iterator[None]:
    """What the Hub or the network refuses, as an `OSError` that says what to do and never shows the token."""
    whole = " `main` is as it was, or whole: the same command again goes on." if upload else ""
    try:
        yield
    except LocalTokenNotFoundError:
        raise OSError("no token: log in with `hf auth login`, or set HF_TOKEN to a token that may write") from None
    except HfHubHTTPError as error:
        raise OSError(f"{_refusal(error, target)}{whole}") from None
    except (httpx2.HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise OSError(f"the connection to the Hub broke ({_without_token(error)}).{whole}") from None
    except RuntimeError as error:  # around what stopped the upload of a large file
        raise OSError(f"the upload broke off ({_without_token(error.__cause__ or error)}).{whole}") from None


def _refusal(error: HfHubHTTPError, target: Target) -> str:
    status = error.response.status_code
    said = _without_token(error.server_message or error)
    if status == 401:
        return f"the Hub does not accept the token (401: {said}): log in anew with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"this token may not write to {target.repo_id} (403: {said}): use one with write access."
    if status == 404:
        return f"{target.repo_id} is not there, or hidden from this token (404: {said})."
    if status == 412:
        return f"{target.repo_id} has been changed in the meantime (412: {said})."
    return f"the Hub answered {status}: {said}."


def _without_token(error: object) -> str:
    text, token = str(error).strip().rstrip("."), get_token()
    return text.replace(token, "[token]") if token else text

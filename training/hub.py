# SPDX-License-Identifier: Apache-2.0
"""The conversation with the Hub: a published folder appears on `main` in one commit, or not at all.

The payload (all but the card) goes first to a branch named after its checksums, or to a pull request. The card,
pinning that commit, then goes to `main` together with the payload. Whatever stops in between leaves `main` as it was,
and the same again goes on from there. Endpoint and token are those of `huggingface_hub` (`HF_ENDPOINT`, `HF_TOKEN`).
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile, SpaceInfo
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from training.bounded import read_object
from training.files import write_text
from training.secrecy import masked
from training.text.sources import checksum


CARD, RESULT, SUMS = "README.md", "result.json", "SHA256SUMS"
# In a card that is not uploaded yet, where the pinned commit will stand.
NO_COMMIT = "0" * 40
# Settings of a recipe that change what is seen of a run, and no number.
PRESENTATION = ("disable_tqdm", "logging_steps", "report_to")
# Made by the Hub itself in every new repository.
NOBODYS = (".gitattributes",)
REPO_ID, COMMIT = re.compile(r"\w[\w.-]*/\w[\w.-]*"), re.compile("[0-9a-f]{40}")


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
        folder: everything but the card, `result.json` and `SHA256SUMS` among it.
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
        RepoCard(card(NO_COMMIT)).validate(target.repo_type)
        head = _claim(api, folder, target)
        payload = checksum(folder / SUMS)[:12]
        message = f"{message} (payload {payload})"
        way = _proposal(api, target, message) if target.create_pr else _branch(api, target, head, f"payload-{payload}")
        first = _commit(api, folder, target, message, without=CARD, **way)
        if target.create_pr and first.oid == head:
            raise ValueError(f"{target.repo_id} holds this very payload already: there is nothing to propose")
        write_text(folder / CARD, card(first.oid))
        if not target.create_pr:
            way = {"revision": "main", "parent_commit": head}
        elif first.pr_revision is not None:
            way = {"revision": first.pr_revision}  # else that of an earlier attempt, as before
        last = _commit(api, folder, target, message, **way)
        return first.pr_url or last.commit_url, first.oid


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
    _refuse_another(folder, target, found)
    if not target.create_pr and found.private == target.public:
        is_now, remedy = ("private", "leave out --public") if found.private else ("public", "pass --public")
        raise ValueError(f"{target.repo_id} is {is_now} already: {remedy}, or change that in its settings first")
    return found.sha


def _refuse_another(folder: Path, target: Target, found: ModelInfo | DatasetInfo | SpaceInfo) -> None:
    """`ValueError` if a repository holds anything but what the Hub has made, or an earlier version of the same run."""
    remedy = "choose another --repo-id"
    files = {file.rfilename for file in found.siblings or []} - {*NOBODYS}
    where = {"repo_type": target.repo_type, "revision": found.sha}
    if files <= {CARD}:
        if not files or target.repo_type == "space":  # the Hub gives a new Space a card of its own
            return
        card = Path(hf_hub_download(target.repo_id, CARD, **where)).read_text(encoding="utf-8", errors="replace")
        if not REGEX_YAML_BLOCK.sub("", card, count=1).strip():  # metadata alone, as the Hub writes them
            return
    if RESULT not in files:
        shown = ", ".join(sorted(files)[:5])
        raise ValueError(f"{target.repo_id} holds {len(files)} files ({shown}) but no {RESULT} of ours: {remedy}")
    theirs, ours = (_identity(path) for path in (hf_hub_download(target.repo_id, RESULT, **where), folder / RESULT))
    for name in ("recipe", "data", "base"):
        if theirs.get(name) != ours[name]:
            raise ValueError(f"{target.repo_id} holds a run of another {name}: {remedy}, or delete it there first")
    for name in ("config.json", "adapter_config.json"):
        if (name in files) != (folder / name).is_file():
            which = "has" if name in files else "has no"
            raise ValueError(f"{target.repo_id} {which} {name}, unlike what is to be published: {remedy}")


def _identity(result: str | Path) -> dict[str, Any]:
    """What two versions of one publication have in common: the recipe but for what it shows, and the data."""
    try:
        content = read_object(Path(result))
        return {
            "recipe": without_presentation(content["recipe"]),
            "data": content.get("data"),
            "base": content.get("base", {}).get("weights"),
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}  # no result of ours


def without_presentation(recipe: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe less the settings that change what is seen of a run, and no number."""
    training = {name: value for name, value in recipe.get("training", {}).items() if name not in PRESENTATION}
    return recipe | {"training": training}


def _branch(api: HfApi, target: Target, head: str, name: str) -> dict[str, Any]:
    """Where the payload is committed first, so that a card can pin it: a branch of its own, away from `main`."""
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
    ours = [path for path in published_files(folder) if path != without]
    gone = _published_before(api, where) - {*ours, without}  # what somebody has added since stays
    operations = [CommitOperationAdd(path, folder / path) for path in ours]
    operations += [CommitOperationDelete(path) for path in sorted(gone)]
    return api.create_commit(**where, operations=operations, commit_message=message, **options)


def _published_before(api: HfApi, where: dict[str, Any]) -> set[str]:
    """The files at a revision that an earlier upload has put there."""
    there = {entry.path for entry in api.list_repo_tree(**where, recursive=True) if isinstance(entry, RepoFile)}
    if SUMS not in there:
        return set()
    return there & read_sums(Path(hf_hub_download(filename=SUMS, **where))).keys()


def read_sums(path: Path) -> dict[str, str]:
    """sha256 by file name, from a file in the form of `sha256sum`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def published_files(folder: Path) -> list[str]:
    """The files of a folder, by their paths within it, in order; not those of git and of the Hub's own downloads.

    Raises:
        ValueError: there is a link, which would lead out of what is looked at, or something that is no file.
    """
    found = []
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if (inside / name).as_posix() not in (".git", ".cache")]
        for name in (*folders, *names):
            path = Path(place) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path} is a link or no file: what is published has none, remove it")
        found += [(inside / name).as_posix() for name in names]
    return sorted(found)


def check_weights(repo_id: str, revision: str, weights: dict[str, str]) -> None:
    """`ValueError` unless a model on the Hub has, at a commit, these weights (sha256 by file name)."""
    with _told_plainly(Target(repo_id), upload=False):
        found = HfApi().get_paths_info(repo_id, list(weights), revision=revision)
    sums = {file.path: file.lfs.sha256 for file in found if isinstance(file, RepoFile) and file.lfs is not None}
    if not weights or sums != weights:
        raise ValueError(f"{repo_id} at {revision} has not the weights that this builds on: give the right --base")


def download(repo_id: str, revision: str | None = None, repo_type: str = "model", into: Path | None = None) -> Path:
    """A folder with all files of a repository at one commit.

    Args:
        repo_id: `user/name`.
        revision: a commit, branch or tag; by default the newest of `main`.
        repo_type: `model`, `dataset` or `space`.
        into: where to put it, named by its commit; by default it is in the Hub's cache, which makes use of links.
    """
    where = {"repo_id": repo_id, "repo_type": repo_type}
    with _told_plainly(Target(repo_id, repo_type), upload=False):
        if into is None:
            return Path(snapshot_download(**where, revision=revision))
        commit = HfApi().repo_info(**where, revision=revision).sha
        return Path(snapshot_download(**where, revision=commit, local_dir=into / commit))


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
        raise OSError(f"the connection to the Hub broke ({_plain(error)}).{whole}") from None
    except RuntimeError as error:  # around what stopped the upload of a large file
        raise OSError(f"the upload broke off ({_plain(error.__cause__ or error)}).{whole}") from None


def _refusal(error: HfHubHTTPError, target: Target) -> str:
    status = error.response.status_code
    said = _plain(error.server_message or error)
    if status == 401:
        return f"the Hub does not accept the token (401: {said}): log in anew with `hf auth login`, or set HF_TOKEN."
    if status == 403 and HfApi().endpoint not in str(error):  # it names the address
        return f"the Hub's storage refuses the upload (403: {said}), perhaps because it took too long."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"too many requests (429): wait {f'{wait} s' if wait else 'some minutes'}."
    if status == 403:
        return f"this token may not write to {target.repo_id} (403: {said}): use one with write access."
    if status == 404:
        return f"{target.repo_id} is not there, or hidden from this token (404: {said})."
    if status == 412:
        return f"{target.repo_id} has been changed in the meantime (412: {said})."
    return f"the Hub answered {status}: {said}."


def _plain(error: object) -> str:
    return masked(str(error).strip().rstrip("."))

# SPDX-License-Identifier: Apache-2.0
"""The Hub: download, look up, create and commit.

`download` and `check_base_weights` explain every refusal in plain words and without the token. The other functions
raise the library's errors: call them inside `plain_errors`.

Endpoint and token are those of `huggingface_hub` (`HF_ENDPOINT`, `HF_TOKEN`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
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

from training.secrecy import masked


REPO_ID, COMMIT = re.compile(r"\w[\w.-]*/\w[\w.-]*"), re.compile("[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Target:
    """A repository to read or fill.

    Args:
        repo_id: `user/name`.
        repo_type: `model`, `dataset` or `space`.
        public: whether everybody may see a repository that is created; one that exists has to be public already.
        create_pr: propose the folder in a pull request instead of committing to `main`.
    """

    repo_id: str
    repo_type: str = "model"
    public: bool = False
    create_pr: bool = False

    @property
    def address(self) -> dict[str, Any]:
        """The arguments by which `huggingface_hub` finds the repository."""
        return {"repo_id": self.repo_id, "repo_type": self.repo_type}


@dataclasses.dataclass(frozen=True)
class Repository:
    """What the Hub knows of a repository: the newest commit of `main`, its files, and who may see it."""

    commit: str
    files: frozenset[str]
    private: bool


def _plain(error: object) -> str:
    return masked(str(error).strip().rstrip("."))


def _refusal(error: HfHubHTTPError, target: Target) -> str:
    """Describe an HTTP error by its status, with its remedy."""
    status = error.response.status_code
    answer = _plain(error.server_message or error)
    if status == 401:
        return f"the Hub does not accept the token (401: {answer}): log in with `hf auth login`, or set HF_TOKEN."
    # An error of the Hub names its address. The storage behind it refuses with 403 too, when a signed address expires.
    if status == 403 and HfApi().endpoint not in str(error):
        return f"the Hub's storage refuses the upload (403: {answer}), perhaps because it took too long."
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"too many requests (429): wait {f'{wait} s' if wait else 'some minutes'}."
    if status == 403:
        return f"this token may not write to {target.repo_id} (403: {answer}): use one with write access."
    if status == 404:
        return f"{target.repo_id} is not there, or hidden from this token (404: {answer})."
    if status == 412:
        return f"{target.repo_id} has been changed in the meantime (412: {answer})."
    return f"the Hub answered {status}: {answer}."


@contextlib.contextmanager
def plain_errors(target: Target, uploading: bool = True) -> Iterator[None]:
    """Turn errors of the Hub and the network into an `OSError` that says what to do and never shows the token.

    Args:
        target: the repository, for the message.
        uploading: add that `main` is intact and that the same command continues.
    """
    remedy = " `main` is as it was, or whole: the same command again goes on." if uploading else ""
    try:
        yield
    except LocalTokenNotFoundError:
        raise OSError("no token: log in with `hf auth login`, or set HF_TOKEN to a token that may write") from None
    except HfHubHTTPError as error:
        raise OSError(f"{_refusal(error, target)}{remedy}") from None
    except (httpx2.HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError) as error:
        raise OSError(f"the connection to the Hub broke ({_plain(error)}).{remedy}") from None
    except RuntimeError as error:  # `huggingface_hub` wraps whatever stopped the upload of a large file
        raise OSError(f"the upload broke off ({_plain(error.__cause__ or error)}).{remedy}") from None


def _commit_of(info: ModelInfo | DatasetInfo | SpaceInfo) -> str:
    if info.sha is None:
        raise OSError(f"the Hub names no commit of {info.id}: try again")
    return info.sha


def download(repo_id: str, revision: str | None = None, repo_type: str = "model", into: Path | None = None) -> Path:
    """Download all files of a repository at one commit and return their folder.

    Args:
        repo_id: `user/name`.
        revision: a commit, branch or tag; by default the newest commit of `main`.
        repo_type: `model`, `dataset` or `space`.
        into: where to put the folder, named by its commit; by default it lies in the Hub's cache, made of links.

    Raises:
        OSError: the repository or revision is not there, or cannot be reached.
    """
    target = Target(repo_id, repo_type)
    with plain_errors(target, uploading=False):
        if into is None:
            return Path(snapshot_download(**target.address, revision=revision))
        # The commit first, so that all files are of one; `local_dir` gives real files, where the cache has links.
        newest = _commit_of(HfApi().repo_info(**target.address, revision=revision))
        return Path(snapshot_download(**target.address, revision=newest, local_dir=into / newest))


def check_base_weights(repo_id: str, revision: str, weights: dict[str, str]) -> None:
    """Raise `ValueError` unless a model on the Hub has, at a commit, these weights (sha256 by file name)."""
    with plain_errors(Target(repo_id), uploading=False):
        entries = HfApi().get_paths_info(repo_id, list(weights), revision=revision)
    # The Hub knows the sha256 of its large files, so that none is downloaded.
    sums = {entry.path: entry.lfs.sha256 for entry in entries if isinstance(entry, RepoFile) and entry.lfs is not None}
    if not weights or sums != weights:
        raise ValueError(f"{repo_id} at {revision} has not the weights that this builds on: give the right --base")


def check_base_files(repo_id: str, revision: str, names: set[str]) -> None:
    """Raise `ValueError` unless a model on the Hub has, at a commit, files of these names."""
    with plain_errors(Target(repo_id), uploading=False):
        missing = names - list_files(Target(repo_id), revision)
    if missing:
        raise ValueError(
            f"{repo_id} at {revision} lacks {', '.join(sorted(missing))}: publish it again by this version"
        )


def check_card(card: str, repo_type: str) -> None:
    """Raise `ValueError` if the Hub does not accept the metadata of a card."""
    RepoCard(card).validate(repo_type)


def find_repository(target: Target) -> Repository | None:
    """Return what the Hub knows of a repository; None if it does not exist or is hidden."""
    try:
        info = HfApi().repo_info(**target.address)
    except RepositoryNotFoundError:
        return None
    files = frozenset(file.rfilename for file in getattr(info, "siblings", None) or [])
    return Repository(_commit_of(info), files, bool(info.private))


def create_repository(target: Target) -> str:
    """Create a repository, private unless `public`, and return its first commit."""
    # A Space cannot be created without one.
    sdk = "gradio" if target.repo_type == "space" else None
    HfApi().create_repo(**target.address, private=not target.public, space_sdk=sdk)
    return _commit_of(HfApi().repo_info(**target.address))


def list_files(target: Target, revision: str) -> set[str]:
    """Return the paths of all files at a revision."""
    entries = HfApi().list_repo_tree(**target.address, revision=revision, recursive=True)
    return {entry.path for entry in entries if isinstance(entry, RepoFile)}


def fetch_file(target: Target, name: str, revision: str) -> Path:
    """Download one file at a revision into the Hub's cache."""
    return Path(hf_hub_download(filename=name, **target.address, revision=revision))


def create_branch(target: Target, name: str, commit: str) -> None:
    """Create a branch at a commit; leave it as it is if it exists."""
    # An upload that was interrupted has left its branch.
    HfApi().create_branch(**target.address, branch=name, revision=commit, exist_ok=True)


def find_pull_request(target: Target, title: str) -> str | None:
    """Return the revision of an open pull request with this title; None if there is none."""
    for proposal in HfApi().get_repo_discussions(**target.address):
        if proposal.is_pull_request and proposal.title == title and proposal.status in ("draft", "open"):
            return f"refs/pr/{proposal.num}"
    return None


def create_commit(
    target: Target,
    revision: str,
    files: dict[str, Path],
    deleted: set[str],
    message: str,
    create_pr: bool = False,
    parent_commit: str | None = None,
) -> CommitInfo:
    """Commit files to a revision; return the newest commit if nothing has changed.

    Args:
        target: the repository.
        revision: a branch or a pull request.
        files: local files by their paths in the repository.
        deleted: paths to delete there.
        message: title of the commit.
        create_pr: open a pull request with the commit.
        parent_commit: refuse the commit if this is not the newest one of the revision.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in sorted(deleted)]
    return HfApi().create_commit(
        **target.address,
        revision=revision,
        operations=operations,
        commit_message=message,
        create_pr=create_pr,
        parent_commit=parent_commit,
    )

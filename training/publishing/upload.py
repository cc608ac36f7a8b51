# SPDX-License-Identifier: Apache-2.0
"""The upload of a published folder: it appears on `main` in one commit, or not at all.

The payload (all files but the card) goes first to a branch named after its checksums, or to a pull request. The card
pins that commit. It then goes to `main` together with the payload. An interruption leaves `main` as it was, and the
same command again continues from there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from training import hub
from training.files import checksum, write_text
from training.hub import Repository, Target
from training.memories import TASK
from training.publishing.folder import CARD, HUB_FILES, MARKERS, NO_COMMIT, RESULT, SUMS, parse_sums, published_files
from training.publishing.portable_results import without_display_settings
from training.untrusted import read_object
from training.vectors import TASK as VECTORS_TASK


def _identity(path: Path) -> dict[str, Any]:
    """Return what all versions of one publication share; nothing if the file is no `result.json` of this project."""
    try:
        result = read_object(path)
        if result.get("task") in (TASK, VECTORS_TASK):
            # Texts join a memory and are forgotten: what it has read differs between its versions.
            return {"recipe": result["name"], "data": None, "base": result["base"]["weights"]}
        return {
            "recipe": without_display_settings(result["recipe"]),
            "data": result.get("data"),
            "base": result.get("base", {}).get("weights"),
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _refuse_other_content(folder: Path, target: Target, existing: Repository) -> None:
    """Raise `ValueError` unless a repository is empty, as the Hub made it, or holds an earlier version of the run."""
    remedy = "choose another --repo-id"
    files = existing.files - {*HUB_FILES}
    if files <= {CARD}:
        if not files or target.repo_type == "space":  # the Hub gives a new Space a card of its own
            return
        card = hub.fetch_file(target, CARD, existing.commit).read_text(encoding="utf-8", errors="replace")
        if not REGEX_YAML_BLOCK.sub("", card, count=1).strip():  # the Hub writes a card of metadata alone
            return
    if RESULT not in files:
        shown = ", ".join(sorted(files)[:5])
        raise ValueError(f"{target.repo_id} holds {len(files)} files ({shown}) but no {RESULT} of ours: {remedy}")
    theirs, ours = _identity(hub.fetch_file(target, RESULT, existing.commit)), _identity(folder / RESULT)
    for name in ("recipe", "data", "base"):
        if theirs.get(name) != ours[name]:
            raise ValueError(f"{target.repo_id} holds a run of another {name}: {remedy}, or delete it there first")
    for name in ("config.json", "adapter_config.json", MARKERS["memory"], MARKERS["vectors"]):
        if (name in files) != (folder / name).is_file():
            which = "has" if name in files else "has no"
            raise ValueError(f"{target.repo_id} {which} {name}, unlike the folder to be published: {remedy}")


def _claim_repository(folder: Path, target: Target) -> str:
    """Return the newest commit of `main`, of a new repository if there is none; refuse one with other content."""
    existing = hub.find_repository(target)
    if existing is None:
        if target.create_pr:
            raise ValueError(f"{target.repo_id} does not exist, or is hidden: there is nothing to propose to")
        return hub.create_repository(target)
    _refuse_other_content(folder, target, existing)
    if not target.create_pr and existing.private == target.public:
        state, remedy = ("private", "leave out --public") if existing.private else ("public", "pass --public")
        raise ValueError(f"{target.repo_id} is {state} already: {remedy}, or change that in its settings first")
    return existing.commit


def _uploaded_before(target: Target, revision: str) -> set[str]:
    """Return the files at a revision that an earlier upload has put there: those that its `SHA256SUMS` lists."""
    present = hub.list_files(target, revision)
    if SUMS not in present:
        return set()
    return present & parse_sums(hub.fetch_file(target, SUMS, revision).read_text(encoding="utf-8")).keys()


def _commit_folder(
    folder: Path, target: Target, message: str, revision: str, without: str = "", **options: Any
) -> CommitInfo:
    """Make a revision hold what the folder holds; return the newest commit if nothing has changed.

    The file `without` stays there as it is, and so do files that others have added.
    """
    files = {name: folder / name for name in published_files(folder) if name != without}
    # Only what an earlier upload has listed: a file that somebody has added by hand is not ours to delete.
    outdated = _uploaded_before(target, revision) - {*files, without}
    return hub.create_commit(target, revision, files, outdated, message, **options)


def upload_folder(folder: Path, target: Target, message: str, card: Callable[[str], str]) -> tuple[str, str]:
    """Upload a staged folder, its card last: only then is the commit known that the card pins.

    Args:
        folder: everything but the card, with `result.json` and `SHA256SUMS`.
        target: the repository; it is created (private, unless `public`) if it does not exist.
        message: title of the commit.
        card: returns the text of the card for the commit of the payload that it pins.

    Returns:
        The address of the commit or pull request, and the pinned commit.

    Raises:
        ValueError: the repository holds something else, or the card's metadata are not valid.
        OSError: the Hub refused or was not reached, in plain words and without the token.
    """
    with hub.plain_errors(target):
        hub.check_card(card(NO_COMMIT), target.repo_type)
        head = _claim_repository(folder, target)
        payload = checksum(folder / SUMS)[:12]
        message = f"{message} (payload {payload})"
        place: dict[str, Any]
        if target.create_pr:
            # An interrupted upload of the same payload has left its pull request open: it is used again.
            open_request = hub.find_pull_request(target, message)
            place = {"revision": open_request} if open_request else {"revision": "main", "create_pr": True}
        else:
            # Away from `main`, which must never hold a payload whose card does not pin it.
            place = {"revision": f"payload-{payload}"}
            hub.create_branch(target, f"payload-{payload}", head)
        first = _commit_folder(folder, target, message, without=CARD, **place)
        if target.create_pr and first.oid == head:
            raise ValueError(f"{target.repo_id} holds this very payload already: there is nothing to propose")
        write_text(folder / CARD, card(first.oid))
        if not target.create_pr:
            # With the parent, the Hub refuses the commit if `main` has changed since it was claimed.
            place = {"revision": "main", "parent_commit": head}
        elif first.pr_revision is not None:  # the first commit has opened the pull request
            place = {"revision": first.pr_revision}
        last = _commit_folder(folder, target, message, **place)
        return first.pr_url or last.commit_url, first.oid

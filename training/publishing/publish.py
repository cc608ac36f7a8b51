# SPDX-License-Identifier: Apache-2.0
"""Publishing: what a run has made is staged, proven, shown, and only then uploaded.

`runs/.../published/WHAT` receives all that a repository will hold. Nothing is uploaded that does not load in a clean
offline process with the very logits of the run's own model, whose card has an empty place, or whose snippets fail.
"""

import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel

from training import card, hub, secrecy
from training.bounded import read_object
from training.evaluate import load_model
from training.files import staged_folder, write_text
from training.publishing import allowed_values, checks, trials
from training.publishing.artifacts import KINDS, Publication, Published, load_own, read_result, weights_of_base
from training.result import refuse_change
from training.run_folder import locked


def publish(
    run: Path,
    repo_id: str,
    what: str | None = None,
    about: Path | None = None,
    base: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    tell: Callable[[str], None] = print,
) -> Path:
    """Stage, prove and show what a run has made, and upload it in one commit.

    Args:
        run: the folder of a finished run.
        repo_id: `user/name` on the Hub.
        what: `model`, `adapter`, `merged`, `dataset` or `space`; by default what the run's task makes.
        about: a YAML file with what no result knows; by default `hub_cards/about/NAME.yaml`.
        base: `user/name@commit` of the model that an adapter or a merged model was made from, or that a Space shows.
        public: let everybody see a new repository.
        create_pr: propose it in a pull request.
        dry_run: stop before anything is uploaded.
        tell: is told each step, in words.

    Returns:
        The staged folder.

    Raises:
        ValueError: the run is not finished or of a kind that is not published, a field of the card is empty, a check
            fails, or the repository holds something else.
        OSError: the Hub refused, or could not be reached.
        RuntimeError: it does not load in a clean process, or computes other logits there.
    """
    publication = prepare(run, repo_id, what, about, base)
    kind = KINDS[publication.result["task"], publication.what]
    final = run / "published" / publication.what
    with locked(run), staged_folder(final) as staged:
        kind.stage(publication, staged)
        checks.write_sums(staged)
        write_text(staged / hub.CARD, kind.card(publication, staged, hub.NO_COMMIT))
        tell(f"ok: {secrecy.check_no_secrets(staged, hub.published_files(staged))}")
        for line in (*checks.check_folder(staged), *kind.prove(publication, staged)):
            tell(f"ok: {line}")
        if publication.what != "dataset":
            tell(trials.check_loss(read_object(run / hub.RESULT), lambda: load_own(publication)))
        checks.check_sums(staged)  # trying it has changed nothing
    tell(_list_files(final))
    if dry_run:
        tell(f"nothing was uploaded; it is in {final}, its card without the commit that it will pin")
        later = ", and at the base" if publication.base is not None else ""
        tell(f"left for the upload: the Hub's own look at the card's metadata{later}")
        return final
    if publication.base is not None:
        hub.check_weights(*publication.base, weights_of_base(publication, final))
    target = hub.Target(repo_id, kind.repo_type, public, create_pr)
    message = f"Publish {publication.result['name']} by modeling-memory-mosaic {_version()}"
    address, pinned = hub.upload(final, target, message, lambda commit: kind.card(publication, final, commit))
    tell(f"uploaded: {address}\nto build on it, give --base {repo_id}@{pinned}")
    return final


def prepare(
    run: Path, repo_id: str, what: str | None = None, about: Path | None = None, base: str | None = None
) -> Publication:
    """Check what can be checked before any work; arguments and errors as of `publish`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--repo-id {repo_id!r}: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"--repo-id is {repo_id!r}: give it as user/name")
    if not (run / "result.json").is_file():
        raise ValueError(f"{run} has no result.json: name the folder of a run, and run its recipe to the end first")
    refuse_change(run)
    result = read_result(run / "result.json")
    kinds = [part for task, part in KINDS if task == result["task"]]
    if not kinds:
        raise ValueError(f"{run} is a run of the task {result['task']!r}, which makes nothing to publish")
    what = what or kinds[0]
    if what not in kinds:
        raise ValueError(f"--what is {what!r}, but a run of {result['task']!r} has {', '.join(kinds)}")
    if what != "dataset" and result["architecture"]["model_type"] not in card.PAPERS:
        raise ValueError(f"{run} holds a {result['architecture']['model_type']}: only memory models are published")
    if base is not None and what in ("model", "dataset"):
        raise ValueError(f"--base is {base!r}, but a {what} builds on nothing: leave it out")
    if about is not None and what == "dataset":
        raise ValueError(f"--about is {str(about)!r}, but the card of a data set comes from its run: leave it out")
    told = None if what == "dataset" else card.load_about(result["name"], about)
    if told is not None:
        card.check_data(told, result)
    builds_on = None if what in ("model", "dataset") else _published(base, result, what)
    return Publication(run, result, what, repo_id, told, builds_on)


def _published(base: str | None, result: dict[str, Any], what: str) -> Published:
    """The repository that this one builds on: as given, or as the recipe has named it."""
    base = base or result["recipe"]["model"]
    name, _, revision = base.partition("@")
    if name.count("/") != 1 or not hub.COMMIT.fullmatch(revision):
        told = "the model that it shows" if what == "space" else "its base"
        raise ValueError(
            f"the card has to name {told} on the Hub: publish that, and give --base user/name@COMMIT (not {base!r})"
        )
    return Published(name, revision)


def verify_published(
    where: str, revision: str | None = None, what: str | None = None, tell: Callable[[str], None] = print
) -> None:
    """Check something that is published: only once its code is known to be this project's is it loaded.

    Args:
        where: a folder, or `user/name` on the Hub.
        revision: on the Hub, a commit, branch or tag; by default the newest of `main`.
        what: on the Hub, `dataset` or `space`; by default it is a model.
        tell: is told what is in order, in words.

    Raises:
        ValueError: what is not in order, or does not load in a clean process.
        OSError: the repository is not there, or could not be reached.
    """
    folder, repo_type = Path(where), what if what in ("dataset", "space") else "model"
    if folder.is_dir() and (revision or what):
        raise ValueError(f"{where} is a folder: leave out --revision and --what, which are for the Hub")
    if not folder.is_dir() and not hub.REPO_ID.fullmatch(where):
        raise ValueError(f"{where!r} is neither a folder nor user/name on the Hub")
    with tempfile.TemporaryDirectory() as downloads:
        if not folder.is_dir():
            folder = hub.download(where, revision, repo_type, Path(downloads))
            tell(f"{where} at commit {folder.name}")
        for line in checks.check_folder(folder):
            tell(f"ok: {line}")
        try:
            tried = _tried(folder, Path(downloads), tell)
        except RuntimeError as error:  # of torch and of the clean process: what a stranger has published is at fault
            raise ValueError(f"{where} does not work: {error}") from error
        for line in tried:
            tell(line)
    tell(
        "none of this proves who wrote it, for anybody can publish such files and their checksums: compare name and "
        "commit with those that you were given"
    )
    tell("the text of the card is not checked: read a snippet before you run it")


def _tried(folder: Path, downloads: Path, tell: Callable[[str], None]) -> list[str]:
    """What is found when a published folder, whose files are in order, is loaded, in words."""
    kind = checks.kind_of(folder)
    result = read_object(folder / hub.RESULT)
    if kind == "dataset":
        metrics = result.get("metrics")
        return [f"ok: {trials.check_stories(folder, metrics.get('kept') if isinstance(metrics, dict) else None)}"]
    if kind != "adapter":
        place = checks.model_in(folder)
        tried = trials.check_space(folder) if kind == "space" else trials.check_loads(folder, [])
        return [f"ok: {tried}", trials.check_loss(result, lambda: load_model(place), own=False)]
    name, commit = allowed_values.base_of_adapter(folder)
    base = hub.download(name, commit, into=downloads)
    tell(f"its base is {name} at commit {commit}")
    tried = [*checks.check_folder(base), trials.check_loads(folder, [], base)]

    def load():
        model, tokenizer = load_model(base)
        return PeftModel.from_pretrained(model, folder), tokenizer

    return [*(f"ok: {line}" for line in tried), trials.check_loss(result, load, own=False)]


def _list_files(folder: Path) -> str:
    sizes = {name: (folder / name).stat().st_size for name in hub.published_files(folder)}
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    return "\n".join(["to be uploaded, in bytes:", *lines, f"{sum(sizes.values()):>14,}  in {len(sizes)} files"])


def _version() -> str:
    return importlib.metadata.version("modeling-memory-mosaic")

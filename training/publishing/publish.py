# SPDX-License-Identifier: Apache-2.0
"""The command `publish`: it stages, checks and uploads what a run has made, or verifies what is published already.

The folder `RUN/published/WHAT` receives all files that a repository will hold. It is uploaded only if it loads in a
clean offline process with the logits of the run's own model, and the card's snippets run. A card with an empty place
is refused where it is made: `card.load_about` and `card.render` raise.
"""

import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from training import card, hub, secrecy
from training.evaluate import load_model
from training.files import staged_folder, weights_checksums, write_text
from training.memories import PUBLISHED
from training.publishing import allowed_values, checks, trials, upload
from training.publishing.artifacts import ARTIFACTS, PinnedRepo, Publication
from training.publishing.folder import (
    CARD,
    MARKERS,
    NO_COMMIT,
    RESULT,
    folder_type,
    model_folder,
    published_files,
    write_sums,
)
from training.publishing.memory_checks import Base, read_result
from training.publishing.portable_results import read_portable_result
from training.publishing.vector_checks import read_result as read_vectors
from training.result import refuse_change
from training.run_folder import locked
from training.untrusted import read_object


# A step that has succeeded, or what a reader has to know, in one or more lines.
Log = Callable[[str], None]


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--repo-id {repo_id!r}: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"--repo-id is {repo_id!r}: give it as user/name")


def _choose_artifact(run: Path, result: dict[str, Any], what: str | None) -> str:
    """Return `what`, or the default of the run's task; `ValueError` if the task does not make it."""
    choices = [name for task, name in ARTIFACTS if task == result["task"]]
    if not choices:
        raise ValueError(f"{run} is a run of the task {result['task']!r}, which makes nothing to publish")
    what = what or choices[0]
    if what not in choices:
        raise ValueError(f"--what is {what!r}, but a run of {result['task']!r} has {', '.join(choices)}")
    return what


def _pin_base(base: str, what: str) -> PinnedRepo:
    """Parse `user/name@commit`, as --base or the recipe gives it."""
    name, _, revision = base.partition("@")
    if name.count("/") != 1 or not hub.COMMIT.fullmatch(revision):
        readers = dict.fromkeys(("memory", "vectors"), "the model that has read it")
        model = ({"space": "the model that it shows"} | readers).get(what, "its base")
        raise ValueError(
            f"the card has to name {model} on the Hub: publish that, and give --base user/name@COMMIT (not {base!r})"
        )
    return PinnedRepo(name, revision)


def _finished_result(run: Path) -> dict[str, Any]:
    """Return the result of a run or a memory; `ValueError` if it has none, or a file of it has changed."""
    is_memory = any((run / MARKERS[kind]).is_file() for kind in ("memory", "vectors"))
    if not (run / RESULT).is_file():
        first = "memorize the texts again" if is_memory else "name the folder of a run, and run its recipe to the end"
        raise ValueError(f"{run} has no result.json: {first} first")
    # A figure or a result edited by hand is not what the run has made.
    refuse_change(run, *(["`memorize` the texts again"] if is_memory else []))
    return read_portable_result(run / RESULT)


def prepare(
    run: Path, repo_id: str, what: str | None = None, about: Path | None = None, base: str | None = None
) -> Publication:
    """Check what can be checked before any work; arguments and errors as of `publish`."""
    _check_repo_id(repo_id)
    result = _finished_result(run)
    what = _choose_artifact(run, result, what)
    if what != "dataset" and result["architecture"]["model_type"] not in card.PAPERS:
        raise ValueError(
            f"{run} holds a {result['architecture']['model_type']}: "
            "only Memory Mosaics and memory models are published"
        )
    if base is not None and what in ("model", "dataset"):
        raise ValueError(f"--base is {base!r}, but a {what} builds on nothing: leave it out")
    if about is not None and what == "dataset":
        raise ValueError(f"--about is {str(about)!r}, but the card of a data set comes from its run: leave it out")
    described = None
    if what != "dataset":
        described = card.load_about(result["name"], about)
        card.check_data(described, result)
        card.check_parts(described, result)
    # A recipe that adapts a base on the Hub names it with its commit.
    pinned = None if what in ("model", "dataset") else _pin_base(base or result["recipe"]["model"], what)
    return Publication(run, result, what, ARTIFACTS[result["task"], what], repo_id, described, pinned)


def _marked(line: str) -> str:
    """Return the line of a check or trial as it is logged."""
    return line if line.startswith("not checked") else f"ok: {line}"


def _stage(publication: Publication, staged: Path, log: Log) -> None:
    """Fill a folder with all files to be published, check it and try it."""
    artifact = publication.artifact
    artifact.stage(publication, staged)
    if (publication.result["task"], publication.what) == ("language_modeling", "model"):
        if not (staged / "results").is_dir():
            recipe = publication.result["name"]
            log(f"no baseline on the card: train one by the same recipe, `run {recipe} model=...`, and publish again")
    write_sums(staged)
    # After the checksums, which the card shows.
    write_text(staged / CARD, artifact.card(publication, staged, NO_COMMIT))
    log(f"ok: {secrecy.check_no_secrets(staged, published_files(staged))}")
    for line in (*checks.check_folder(staged), *artifact.run_trials(publication, staged)):
        log(_marked(line))
    if publication.what not in ("dataset", "memory", "vectors"):
        # The whole result: the portable one has lost the paths of the data.
        log(trials.check_loss(read_object(publication.run / RESULT), publication.load))
    checks.check_sums(staged)  # no trial may have changed a file


def _list_files(folder: Path) -> str:
    sizes = {name: (folder / name).stat().st_size for name in published_files(folder)}
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    return "\n".join(["to be uploaded, in bytes:", *lines, f"{sum(sizes.values()):>14,}  in {len(sizes)} files"])


def _version() -> str:
    return importlib.metadata.version("modeling-memory-mosaic")


def init(run: Path, about: Path | None = None) -> Path:
    """Begin the file of what no result knows of a run, with what the result does know; return its path.

    Args:
        run: the folder of a finished run, or of a memory.
        about: the file; by default `hub_cards/about/NAME.yaml`. One that is there is never replaced.

    Raises:
        ValueError: the run is not finished, makes nothing that needs such a file, or the file is there.
    """
    result = _finished_result(run)
    if _choose_artifact(run, result, None) == "dataset":
        raise ValueError(f"{run} has made a data set, whose card comes from its run: there is nothing to write")
    return card.write_about(result, about)


def publish(
    run: Path,
    repo_id: str,
    what: str | None = None,
    about: Path | None = None,
    base: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
    log: Log = print,
) -> Path:
    """Stage, check and try what a run has made, list it, and upload it in one commit.

    Args:
        run: the folder of a finished run, or of a memory.
        repo_id: `user/name` on the Hub.
        what: `model`, `adapter`, `merged`, `dataset`, `space`, `memory` or `vectors`; by default what the run's task
            makes.
        about: a YAML file with what no result knows; by default `hub_cards/about/NAME.yaml`.
        base: `user/name@commit` of the model that an adapter or a merged model was made from, that has read a memory,
            or that a Space shows.
        public: let everybody see a new repository.
        create_pr: propose it in a pull request.
        dry_run: stop before anything is uploaded.
        log: receives each step as text.

    Returns:
        The staged folder.

    Raises:
        ValueError: the run is not finished or of a task that publishes nothing, a field of the card is empty, a check
            fails, or the repository holds something else.
        OSError: the Hub refused, or could not be reached.
        RuntimeError: the folder does not load in a clean process, or computes other logits there.
    """
    publication = prepare(run, repo_id, what, about, base)
    final = run / PUBLISHED / publication.what
    # Locked, so that no start of the run changes what is being copied.
    with locked(run), staged_folder(final) as staged:
        _stage(publication, staged, log)
    log(_list_files(final))
    if dry_run:
        log(f"nothing was uploaded; it is in {final}, its card without the commit that it will pin")
        later = ", and the weights of the base" if publication.base is not None else ""
        log(f"to be checked at the upload, by the Hub: the metadata of the card{later}")
        return final
    if publication.base is not None:
        hub.check_base_weights(*publication.base, publication.base_weights(final))
        if publication.what in ("memory", "vectors"):
            # By its code, readers load the memory. The base may be there at a commit of an earlier version.
            hub.check_base_files(*publication.base, set(checks.expected_code(publication.base_folder)))
    artifact, target = publication.artifact, hub.Target(repo_id, publication.artifact.repo_type, public, create_pr)
    message = f"Publish {publication.result['name']} by modeling-memory-mosaic {_version()}"
    address, pinned = upload.upload_folder(
        final, target, message, lambda commit: artifact.card(publication, final, commit)
    )
    log(f"uploaded: {address}\nto build on it, give --base {repo_id}@{pinned}")
    return final


def _try_published_adapter(folder: Path, result: dict[str, Any], downloads: Path, log: Log) -> list[str]:
    name, commit = allowed_values.base_of_adapter(folder)
    base = hub.download(name, commit, into=downloads)
    log(f"its base is {name} at commit {commit}")
    # The base comes from the Hub like the adapter, so it is checked before it is loaded.
    lines = [*checks.check_folder(base), trials.check_loads(folder, [], base)]

    def load() -> tuple[PeftModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model(base)
        return PeftModel.from_pretrained(model, folder), tokenizer

    return [*(f"ok: {line}" for line in lines), trials.check_loss(result, load, is_local=False)]


def _try_with_base(
    stated: Base, try_it: Callable[[Path, Path], list[str]], folder: Path, downloads: Path, log: Log
) -> list[str]:
    """Try a memory, or vectors, with the model that wrote them, which is checked before."""
    base = hub.download(stated.repo_id, stated.revision, into=downloads)
    log(f"its base is {stated.repo_id} at commit {stated.revision}")
    # The base comes from the Hub too, so it is checked before it is loaded.
    lines = checks.check_folder(base)
    if weights_checksums(base) != stated.weights:
        raise ValueError(f"{stated.repo_id} at {stated.revision} has other weights than {RESULT} says: trust neither")
    return [_marked(line) for line in (*lines, *try_it(folder, base))]


def _try_published(folder: Path, downloads: Path, log: Log) -> list[str]:
    """Load and use a published folder whose files are in order; return one line for each trial."""
    type_ = folder_type(folder)
    result = read_object(folder / RESULT)
    if type_ == "dataset":
        metrics = result.get("metrics")
        return [f"ok: {trials.check_stories(folder, metrics.get('kept') if isinstance(metrics, dict) else None)}"]
    if type_ == "adapter":
        return _try_published_adapter(folder, result, downloads, log)
    if type_ == "vectors":
        return _try_with_base(read_vectors(folder).base, trials.check_vectors, folder, downloads, log)
    if type_ == "memory":
        return _try_with_base(read_result(folder).base, trials.check_memory, folder, downloads, log)
    place = model_folder(folder)
    line = trials.check_space(folder) if type_ == "space" else trials.check_loads(folder, [])
    return [f"ok: {line}", trials.check_loss(result, lambda: load_model(place), is_local=False)]


def verify_published(where: str, revision: str | None = None, what: str | None = None, log: Log = print) -> None:
    """Check a published folder. It is loaded only after its code has proved to be this project's.

    Args:
        where: a folder, or `user/name` on the Hub.
        revision: on the Hub, a commit, branch or tag; by default the newest commit of `main`.
        what: on the Hub, `dataset` or `space`; by default it is a model.
        log: receives each check that has passed as text.

    Raises:
        ValueError: a check fails, or the folder does not load in a clean process.
        OSError: the repository is not there, or could not be reached.
    """
    # For the Hub, an adapter is a model too.
    folder, repo_type = Path(where), what if what in ("dataset", "space") else "model"
    if folder.is_dir() and (revision or what):
        raise ValueError(f"{where} is a folder: leave out --revision and --what, which are for the Hub")
    if not folder.is_dir() and not hub.REPO_ID.fullmatch(where):
        raise ValueError(f"{where!r} is neither a folder nor user/name on the Hub")
    # Not the Hub's cache: its links would be refused, and files found bad must not stay where others load them.
    with tempfile.TemporaryDirectory() as downloads:
        if not folder.is_dir():
            folder = hub.download(where, revision, repo_type, Path(downloads))
            log(f"{where} at commit {folder.name}")
        for line in checks.check_folder(folder):
            log(f"ok: {line}")
        try:
            lines = _try_published(folder, Path(downloads), log)
        except RuntimeError as error:  # torch or the clean process failed, because of what the folder holds
            raise ValueError(f"{where} does not work: {error}") from error
        for line in lines:
            log(line)
    log(
        "none of this proves who wrote it, for anybody can publish such files and their checksums: compare name and "
        "commit with those that you were given"
    )
    log("the text of the card is not checked: read a snippet before you run it")

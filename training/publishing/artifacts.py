# SPDX-License-Identifier: Apache-2.0
"""What can be published of a run: how each artifact is staged, what its card says, and how it is tried."""

import dataclasses
import importlib.metadata
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from huggingface_hub import DatasetCard, ModelCard
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_memory_mosaic.inspection_memory_mosaic import measure_units
from training import card, hub, secrecy
from training.evaluate import load_model
from training.files import weights_checksums, write_json, write_text
from training.memories import TASK, load_memory, measure_recall, stored_texts
from training.paths import CLONE
from training.progress import in_steps
from training.publishing import checks, trials
from training.publishing.allowed_values import package_requirements
from training.publishing.folder import CARD, LICENSE, MARKERS, NO_COMMIT, RESULT, read_sums
from training.publishing.pictures import ALTERNATIVES, RECALL, WORDS, draw_recall, draw_words
from training.publishing.portable_results import comparable_results
from training.tables import TABLES
from training.tasks import babistories
from training.text.sources import load_stories
from training.text.story_filters import words
from training.text.story_selection import REJECTED_FILE, STORIES_FILE
from training.untrusted import read_object
from training.vectors import TASK as VECTORS_TASK
from training.vectors import read_rows


# Files of a run that are not published: the cards that libraries write, and a chat template that came with a
# tokenizer. No model here is trained on chats, and a template is a program.
_NOT_PUBLISHED = (CARD, "chat_template.jinja")
_DEFAULT_PROMPT = "Once upon a time"
# Model types whose units are measured for the card.
UNITS_OF = ("memory_mosaic", "memory_mosaic_v2")


class PinnedRepo(NamedTuple):
    """A repository on the Hub at one commit."""

    repo_id: str
    revision: str


class Artifact(NamedTuple):
    """One thing that can be published.

    Args:
        repo_type: `model`, `dataset` or `space`, as the Hub names it.
        stage: fills a folder with all files but checksums and card.
        card: returns the text of the card, for a staged folder and the commit to pin.
        run_trials: loads and uses the staged folder; returns one line for each trial.
    """

    repo_type: str
    stage: Callable[["Publication", Path], None]
    card: Callable[["Publication", Path, str], str]
    run_trials: Callable[["Publication", Path], list[str]]


@dataclasses.dataclass(frozen=True)
class Publication:
    """One run on its way to the Hub.

    Args:
        run: folder of the run.
        result: content of its `result.json`, without paths of this machine.
        what: name of the artifact: `model`, `adapter`, `merged`, `dataset`, `space`, `memory` or `vectors`.
        artifact: how such a thing is staged, described and tried.
        repo_id: `user/name` on the Hub.
        about: what the card says and no result knows; none for a data set.
        base: the model that this one was made from, that has read a memory, or that a Space shows.
    """

    run: Path
    result: dict[str, Any]
    what: str
    artifact: Artifact
    repo_id: str
    about: card.About | None = None
    base: PinnedRepo | None = None

    @property
    def source_folder(self) -> Path:
        """The folder of the model or adapter that the run has written; for a Space, that of the whole model."""
        whole_model = "merged" if self.result["task"] == "fine_tuning" else "model"
        folder = self.run / (whole_model if self.what == "space" else self.what)
        if not folder.is_dir():
            raise ValueError(f"{folder} is missing: run the recipe again with --restart")
        return folder

    # Compared at each use: the base may change while the publication is tried.
    @property
    def base_folder(self) -> Path:
        """The base on this machine or from the Hub; `ValueError` if its weights are not those that the run used."""
        # `self.result` has lost the path.
        name = read_object(self.run / RESULT)["recipe"]["model"]
        folder = Path(name) if Path(name).is_dir() else hub.download(*self.pinned_base)
        if weights_checksums(folder) != self.result["base"]["weights"]:
            used = "was read with" if self.what in ("memory", "vectors") else "has adapted"
            raise ValueError(f"the weights in {folder} are not those that {self.run} {used}: restore them")
        return folder

    @property
    def pinned_base(self) -> PinnedRepo:
        """The base of an artifact that has one."""
        assert self.base is not None
        return self.base

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the run's model, or its adapter on the base, and its tokenizer."""
        if self.what != "adapter":
            return load_model(self.source_folder)
        base, tokenizer = load_model(self.base_folder)
        # PEFT's wrapper has the methods of the model within it.
        return cast(PreTrainedModel, PeftModel.from_pretrained(base, self.source_folder)), tokenizer

    def base_weights(self, staged: Path) -> dict[str, str]:
        """Return sha256 by file name of the weights that the base on the Hub has to have.

        They are the weights that the run adapted or memorized with, or those that a staged Space shows.
        """
        return weights_checksums(staged / "model") if self.what == "space" else self.result["base"]["weights"]


def _stage_results(publication: Publication, staged: Path) -> None:
    """Add the licence, the result and its figures, and the results that it compares with."""
    shutil.copyfile(CLONE / LICENSE, staged / LICENSE)
    write_json(staged / RESULT, publication.result)
    for figure in sorted(publication.run.glob("*.png")):
        shutil.copyfile(figure, staged / figure.name)
    for result in comparable_results(publication.run, publication.result)[1:]:
        (staged / "results").mkdir(exist_ok=True)
        name = f"{result['name']}--{result['model']}--seed{result['seed']}.json"
        write_json(staged / "results" / name, result)


def _without_nan(value: Any) -> Any:
    """Return a value for JSON, which has no NaN: None stands where nothing was measured."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _stage_model(publication: Publication, staged: Path) -> None:
    folder = publication.source_folder
    checks.check_formats(folder)  # before a pickle could be copied
    shutil.copytree(folder, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_NOT_PUBLISHED))
    _stage_results(publication, staged)
    if publication.result["architecture"]["model_type"] in UNITS_OF:
        model, tokenizer = publication.load()
        texts = [sample["text"] for sample in publication.result["samples"]] or [_DEFAULT_PROMPT]
        write_json(staged / "units.json", _without_nan(measure_units(model, tokenizer, texts)))


def _stage_adapter(publication: Publication, staged: Path) -> None:
    _stage_model(publication, staged)
    # PEFT writes the path of the base on this machine. A reader needs its address on the Hub.
    path, base = staged / "adapter_config.json", publication.pinned_base
    settings = read_object(path) | {"base_model_name_or_path": base.repo_id, "revision": base.revision}
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _stage_space(publication: Publication, staged: Path) -> None:
    folder = publication.source_folder
    checks.check_formats(folder)  # before a pickle could be copied
    shutil.copytree(folder, staged / "model", ignore=shutil.ignore_patterns(*_NOT_PUBLISHED))
    for name in checks.SPACE_CODE:
        shutil.copyfile(checks.SPACE / name, staged / name)
    (staged / checks.PACKAGE.name).mkdir()
    for path in checks.PACKAGE.glob("*.py"):
        shutil.copyfile(path, staged / checks.PACKAGE.name / path.name)
    _stage_results(publication, staged)


def _stage_memory(publication: Publication, staged: Path) -> None:
    checks.check_formats(publication.run)
    shutil.copyfile(publication.run / MARKERS["memory"], staged / MARKERS["memory"])
    # Its tokens are numbers, in which a search of the file finds no secret.
    model, tokenizer = load_model(publication.base_folder)
    secrecy.refuse_secrets_in_texts(stored_texts(staged, tokenizer))
    base = publication.result["base"] | publication.pinned_base._asdict()
    recall = measure_recall(load_memory(str(staged), model), model)
    write_json(staged / RESULT, publication.result | {"base": base, "recall": recall})
    if recall is not None:
        draw_recall(recall, staged / RECALL)


def _stage_vectors(publication: Publication, staged: Path) -> None:
    checks.check_formats(publication.run)
    shutil.copyfile(publication.run / MARKERS["vectors"], staged / MARKERS["vectors"])
    # They are packed, so that a search of the file finds no secret in them.
    texts: dict[str, str] = {}
    for row in read_rows(staged / MARKERS["vectors"]):
        texts[row["source"]] = texts.get(row["source"], "") + row["text"]  # a secret may go on in the next chunk
    secrecy.refuse_secrets_in_texts(texts)
    base = publication.result["base"] | publication.pinned_base._asdict()
    write_json(staged / RESULT, publication.result | {"base": base})


def _stage_stories(publication: Publication, staged: Path) -> None:
    for name in (STORIES_FILE, REJECTED_FILE):
        if (publication.run / name).is_file():
            shutil.copyfile(publication.run / name, staged / name)
    write_json(staged / RESULT, publication.result)
    stories = load_stories(str(staged / STORIES_FILE), streaming=True)
    if counts := [len(words(story["text"])) for story in stories]:
        draw_words(counts, staged / WORDS)


def _required_versions() -> dict[str, str]:
    """Return the version ranges that the package requires, by name."""
    # The requirements of extras have a marker.
    required = [requirement for requirement in package_requirements() if requirement.marker is None]
    return {requirement.name: str(requirement.specifier) for requirement in required}


def _pictures(folder: Path) -> dict[str, str]:
    """Return what a card says of each picture of a staged folder, by its file."""
    return {path.name: ALTERNATIVES.get(path.name, path.stem) for path in sorted(folder.glob("*.png"))}


def _common(publication: Publication, folder: Path, revision: str) -> dict[str, Any]:
    """Return the values that the cards of models, adapters and memories have in common."""
    architecture = publication.result["architecture"]
    return {
        "about": publication.about,
        "result": publication.result,
        # A recipe leaves out sizes that follow from others.
        "sizes": AutoConfig.for_model(**architecture).to_dict(),
        "paper": card.PAPERS[architecture["model_type"]],
        "repo_id": publication.repo_id,
        "revision": revision,
        "base": publication.base and publication.base._asdict(),
        "files": read_sums(folder),
        "pictures": _pictures(folder),
        "ranges": _required_versions(),
    }


def _model_card(template: str) -> Callable[[Publication, Path, str], str]:
    """Return the function that renders the card of a model or adapter from a template."""

    def render(publication: Publication, folder: Path, revision: str) -> str:
        result, about, base = publication.result, publication.about, publication.base
        assert about is not None  # only a data set has none
        compared = [result, *map(read_object, sorted((folder / "results").glob("*.json")))]
        is_adapter = publication.what == "adapter"
        text = card.render(
            template,
            **_common(publication, folder, revision),
            metadata=card.model_metadata(result, about, base and base.repo_id, is_adapter),
            table=TABLES[result["task"]](compared) if result["task"] in TABLES else None,
            other_models=len({other["model"] for other in compared}) > 1,
            answers=[other for other in compared if "answer_accuracy" in other["metrics"]],
            units=read_object(folder / "units.json") if (folder / "units.json").is_file() else None,
        )
        return str(ModelCard(text))  # raises if the metadata cannot be parsed

    return render


def _stories_card(publication: Publication, folder: Path, revision: str) -> str:
    place = {"repo_id": publication.repo_id, "revision": revision, "files": read_sums(folder)}
    place["pictures"] = _pictures(folder)
    return babistories.card(publication.result, place)


def _memory_card(publication: Publication, folder: Path, revision: str) -> str:
    result, about, base = publication.result, publication.about, publication.pinned_base
    assert about is not None  # only a data set has none
    text = card.render(
        "memory_card.md.jinja",
        **_common(publication, folder, revision),
        metadata=card.memory_metadata(result, about, base.repo_id),
        recall=read_object(folder / RESULT)["recall"],
    )
    return str(ModelCard(text))  # raises if the metadata cannot be parsed


def _vectors_card(publication: Publication, folder: Path, revision: str) -> str:
    result, about = publication.result, publication.about
    assert about is not None  # only a data set of stories has none
    text = card.render(
        "vectors_card.md.jinja",
        **_common(publication, folder, revision),
        metadata=card.vectors_metadata(result, about),
    )
    return str(DatasetCard(text))  # raises if the metadata cannot be parsed


def _gradio_version() -> str:
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "a Space is tried before it is uploaded, which takes gradio: pip install '.[space]'"
        ) from None


def _space_card(publication: Publication, folder: Path, revision: str) -> str:
    model, result = publication.pinned_base.repo_id, publication.result
    return card.render("space/README.md.jinja", repo_id=model, result=result, gradio_version=_gradio_version())


def _try_model(publication: Publication, staged: Path) -> list[str]:
    prompts = [sample["prompt"] for sample in publication.result.get("samples", [])] or [_DEFAULT_PROMPT]
    base = publication.base_folder if publication.what == "adapter" else None
    repositories = {(publication.repo_id, NO_COMMIT): staged}
    if base is not None:
        repositories[publication.pinned_base] = base
    text = (staged / CARD).read_text(encoding="utf-8")
    steps = [] if base is not None else [("linter", lambda: trials.check_lint(staged))]  # an adapter has no code
    steps += [
        ("clean process", lambda: trials.check_loads(staged, prompts, base, publication.load()[0])),
        ("snippets", lambda: trials.check_snippets(text, repositories)),
    ]
    return list(in_steps("trials", steps))


def _try_stories(publication: Publication, staged: Path) -> list[str]:
    return [trials.check_stories(staged, publication.result["metrics"]["kept"])]


def _try_space(publication: Publication, staged: Path) -> list[str]:
    return [trials.check_space(staged)]


def _try_memory(publication: Publication, staged: Path) -> list[str]:
    base = publication.base_folder
    repositories = {(publication.repo_id, NO_COMMIT): staged, publication.pinned_base: base}
    text = (staged / CARD).read_text(encoding="utf-8")
    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("texts", lambda: trials.check_memory(staged, base)),
        ("snippets", lambda: [trials.check_snippets(text, repositories)]),
    ]
    return [line for lines in in_steps("trials", steps) for line in lines]


def _try_vectors(publication: Publication, staged: Path) -> list[str]:
    base = publication.base_folder
    repositories = {(publication.repo_id, NO_COMMIT): staged, publication.pinned_base: base}
    text = (staged / CARD).read_text(encoding="utf-8")
    steps: list[tuple[str, Callable[[], list[str]]]] = [
        ("texts", lambda: trials.check_vectors(staged, base)),
        ("snippets", lambda: [trials.check_snippets(text, repositories)]),
    ]
    return [line for lines in in_steps("trials", steps) for line in lines]


# By task and name; the first artifact of a task is its default.
ARTIFACTS = {
    ("language_modeling", "model"): Artifact("model", _stage_model, _model_card("mosaic_card.md.jinja"), _try_model),
    ("memory_model", "model"): Artifact("model", _stage_model, _model_card("memory_model_card.md.jinja"), _try_model),
    ("fine_tuning", "adapter"): Artifact("model", _stage_adapter, _model_card("adapter_card.md.jinja"), _try_model),
    ("fine_tuning", "merged"): Artifact("model", _stage_model, _model_card("mosaic_card.md.jinja"), _try_model),
    ("language_modeling", "space"): Artifact("space", _stage_space, _space_card, _try_space),
    ("memory_model", "space"): Artifact("space", _stage_space, _space_card, _try_space),
    ("fine_tuning", "space"): Artifact("space", _stage_space, _space_card, _try_space),
    ("babistories", "dataset"): Artifact("dataset", _stage_stories, _stories_card, _try_stories),
    (TASK, "memory"): Artifact("model", _stage_memory, _memory_card, _try_memory),
    (VECTORS_TASK, "vectors"): Artifact("dataset", _stage_vectors, _vectors_card, _try_vectors),
}

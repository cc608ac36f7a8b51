# SPDX-License-Identifier: Apache-2.0
"""What can be published of a run: for each kind of thing, what is staged, what its card says, and how it is proven."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_memory_mosaic.inspection_memory_mosaic import measure_units
from training import card, hub, proof, verify
from training.bounded import read_object
from training.evaluate import load_model
from training.experiments import babistories
from training.export import write_text
from training.finetune import weights_checksums
from training.result import CLONE, RESULTS, TABLES


# Of what a run has written: cards of libraries, and a chat template that came with a tokenizer, for no model here is
# trained on chats and a template is a program.
_LEFT_OUT = (hub.CARD, "chat_template.jinja")
# Fields of a result that may be paths on the machine of the run.
PATHS = ("source", "output_dir", "model", "pretrained", "lists", "name")


class Published(NamedTuple):
    """A repository on the Hub at one commit."""

    repo_id: str
    revision: str


class Publication(NamedTuple):
    """What is published: the run, which part of it, and where it goes."""

    run: Path
    result: dict[str, Any]
    what: str
    repo_id: str
    about: card.About | None
    base: Published | None


class Kind(NamedTuple):
    """One kind of thing to publish.

    Args:
        repo_type: of the Hub.
        stage: fills a folder with all but checksums and card.
        card: its text, of a publication, the staged folder and the commit to pin.
        prove: loads and tries it; returns what was found to be in order, in words.
    """

    repo_type: str
    stage: Callable[[Publication, Path], None]
    card: Callable[[Publication, Path, str], str]
    prove: Callable[[Publication, Path], list[str]]


def _model_folder(publication: Publication) -> Path:
    """What the run itself wrote: a model, or an adapter; what a Space shows is a whole model."""
    shown = "merged" if publication.result["task"] == "fine_tuning" else "model"
    folder = publication.run / (shown if publication.what == "space" else publication.what)
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: run the recipe again with --restart")
    return folder


def _stage_model(publication: Publication, staged: Path) -> None:
    folder = _model_folder(publication)
    verify.check_forms(folder)  # before a pickle could be copied
    shutil.copytree(folder, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    _add_results(publication, staged)
    if publication.result["architecture"]["model_type"] == "memory_mosaic":
        model, tokenizer = load_own(publication)
        texts = [sample["text"] for sample in publication.result["samples"]] or ["Once upon a time"]
        _write_json(staged / "units.json", measure_units(model, tokenizer, texts))


def _stage_adapter(publication: Publication, staged: Path) -> None:
    _stage_model(publication, staged)
    # PEFT writes where the base was on this machine; whoever downloads the adapter needs where it is published.
    path = staged / "adapter_config.json"
    settings = read_object(path)
    settings |= {"base_model_name_or_path": publication.base.repo_id, "revision": publication.base.revision}
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _add_results(publication: Publication, staged: Path) -> None:
    shutil.copyfile(CLONE / "LICENSE", staged / "LICENSE")
    _write_json(staged / hub.RESULT, publication.result)
    for picture in sorted(publication.run.glob("*.png")):
        shutil.copyfile(picture, staged / picture.name)
    for result in comparable_results(publication)[1:]:
        (staged / "results").mkdir(exist_ok=True)
        name = f"{result['name']}--{result['model']}--seed{result['seed']}.json"
        _write_json(staged / "results" / name, result)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_result(path: Path) -> dict[str, Any]:
    """Content of a `result.json` without this machine's folders: of a path that leads elsewhere, its last part."""
    return _without_paths(read_object(path))


def _without_paths(value: Any, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return {name: _without_paths(part, name in PATHS) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    leads_out = is_path and isinstance(value, str) and (os.path.isabs(value) or value.startswith(".."))
    return os.path.basename(value.rstrip("/")) if leads_out else value


def comparable_results(publication: Publication) -> list[dict[str, Any]]:
    """The run's own result, then those of other models and seeds by the same recipe on the same data.

    They are found in `training/results` and beside the run; for each model and seed one.
    """
    own = publication.result
    found = {(own["model"], own["seed"]): own}
    if own["task"] == "language_modeling":
        others = sorted(RESULTS.glob(f"{own['name']}--*.json")) + sorted(publication.run.parent.glob("*/result.json"))
        for other in map(read_result, others):
            if other.get("task") == own["task"] and _compared(other) == _compared(own):
                found.setdefault((other["model"], other["seed"]), other)
    return list(found.values())


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    """What results that stand in one table have in common."""
    recipe = hub.without_presentation(result["recipe"])
    differing = ("model", "model_args", "seed")
    return {"recipe": {k: v for k, v in recipe.items() if k not in differing}, "data": result["data"]}


def load_own(publication: Publication) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The run's own model, an adapter on its base, and its tokenizer."""
    folder = _model_folder(publication)
    if publication.what != "adapter":
        return load_model(folder)
    base, tokenizer = load_model(_base_folder(publication))
    return PeftModel.from_pretrained(base, folder), tokenizer


def weights_of_base(publication: Publication, staged: Path) -> dict[str, str]:
    """sha256 by file name of the weights that the base has to have on the Hub: those adapted, or those shown."""
    if publication.what == "space":
        return weights_checksums(staged / "model")
    return publication.result["base"]["weights"]


def _base_folder(publication: Publication) -> Path:
    """The base of a fine-tuned model on this machine, as it was when the run was made."""
    name = read_object(publication.run / "result.json")["recipe"]["model"]
    folder = Path(name) if Path(name).is_dir() else hub.download(publication.base.repo_id, publication.base.revision)
    if weights_checksums(folder) != publication.result["base"]["weights"]:
        raise ValueError(f"the weights in {folder} are not those that {publication.run} has adapted: restore them")
    return folder


def _card(template: str) -> Callable[[Publication, Path, str], str]:
    def text(publication: Publication, folder: Path, revision: str) -> str:
        result, base = publication.result, publication.base
        compared = [result, *map(read_object, sorted((folder / "results").glob("*.json")))]
        values = {
            "metadata": card.model_metadata(
                result, publication.about, base and base.repo_id, publication.what == "adapter"
            ),
            "table": TABLES[result["task"]](compared) if result["task"] in TABLES else None,
            "other_models": len({other["model"] for other in compared}) > 1,
            "files": verify.read_sums(folder),
            "units": read_object(folder / "units.json") if (folder / "units.json").is_file() else None,
            "ranges": _ranges(),
        }
        rendered = card.render(
            template,
            about=publication.about,
            result=result,
            repo_id=publication.repo_id,
            revision=revision,
            base=base and base._asdict(),
            **values,
        )
        return str(ModelCard(rendered))  # parses the metadata

    return text


def _ranges() -> dict[str, str]:
    """The versions that the package asks for, by name."""
    wanted = map(Requirement, importlib.metadata.requires("modeling-memory-mosaic"))
    return {one.name: str(one.specifier) for one in wanted if one.marker is None}  # those of extras have a marker


def _prove_model(publication: Publication, staged: Path) -> list[str]:
    prompts = [sample["prompt"] for sample in publication.result.get("samples", [])] or ["Once upon a time"]
    base = _base_folder(publication) if publication.what == "adapter" else None
    repositories = {(publication.repo_id, hub.NO_COMMIT): staged}
    if base is not None:
        repositories[publication.base] = base
    text = (staged / hub.CARD).read_text(encoding="utf-8")
    return [
        *([proof.check_lint(staged)] if base is None else []),  # an adapter has no code
        proof.check_loads(staged, prompts, base, load_own(publication)[0]),
        proof.check_snippets(text, repositories),
    ]


def _stage_stories(publication: Publication, staged: Path) -> None:
    for name in ("stories.jsonl.gz", "rejected.jsonl"):
        if (publication.run / name).is_file():
            shutil.copyfile(publication.run / name, staged / name)
    _write_json(staged / hub.RESULT, publication.result)


def _stories_card(publication: Publication, folder: Path, revision: str) -> str:
    place = {"repo_id": publication.repo_id, "revision": revision, "files": verify.read_sums(folder)}
    return babistories.card(publication.result, place)


def _prove_stories(publication: Publication, staged: Path) -> list[str]:
    return [proof.check_stories(staged, publication.result["metrics"]["kept"])]


def _stage_space(publication: Publication, staged: Path) -> None:
    folder = _model_folder(publication)
    verify.check_forms(folder)  # before a pickle could be copied
    shutil.copytree(folder, staged / "model", ignore=shutil.ignore_patterns(*_LEFT_OUT))
    for name in ("app.py", "requirements.txt"):
        shutil.copyfile(verify.SPACE / name, staged / name)
    (staged / verify.PACKAGE.name).mkdir()
    for path in verify.PACKAGE.glob("*.py"):
        shutil.copyfile(path, staged / verify.PACKAGE.name / path.name)
    _add_results(publication, staged)


def _space_card(publication: Publication, folder: Path, revision: str) -> str:
    model, result = publication.base.repo_id, publication.result
    return card.render("space/README.md.jinja", repo_id=model, result=result, gradio_version=_gradio_version())


def _gradio_version() -> str:
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "a Space is tried before it is uploaded, which takes gradio: pip install '.[space]'"
        ) from None


def _prove_space(publication: Publication, staged: Path) -> list[str]:
    return [proof.check_space(staged)]


# By task and what of it is published; the first of a task is its default.
KINDS = {
    ("language_modeling", "model"): Kind("model", _stage_model, _card("mosaic_card.md.jinja"), _prove_model),
    ("memory_model", "model"): Kind("model", _stage_model, _card("memory_model_card.md.jinja"), _prove_model),
    ("fine_tuning", "adapter"): Kind("model", _stage_adapter, _card("adapter_card.md.jinja"), _prove_model),
    ("fine_tuning", "merged"): Kind("model", _stage_model, _card("mosaic_card.md.jinja"), _prove_model),
    ("language_modeling", "space"): Kind("space", _stage_space, _space_card, _prove_space),
    ("fine_tuning", "space"): Kind("space", _stage_space, _space_card, _prove_space),
    ("babistories", "dataset"): Kind("dataset", _stage_stories, _stories_card, _prove_stories),
}

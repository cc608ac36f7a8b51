# SPDX-License-Identifier: Apache-2.0
"""Publishing: what a run has made is staged, proven, shown, and only then uploaded.

`runs/.../published/WHAT` receives all that a repository will hold. Nothing is uploaded that does not load in a clean
offline process with the very logits of the run's own model, whose card has an empty place, or whose snippets fail.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_memory_mosaic import inspect_units, summarize_units
from modeling_memory_mosaic.modeling_memory_mosaic import PARAMETER_SCALE
from training import card, hub, verify
from training.evaluate import load_model
from training.experiments import babistories
from training.export import staged_folder, write_text
from training.finetune import weights_checksums
from training.result import CLONE, RESULTS, TABLES


# Settings of a recipe that change what is seen of a run, and no number.
PRESENTATION = ("disable_tqdm", "logging_steps", "report_to")
# Repositories of the Hub that are not models.
OTHER_TYPES = ("dataset", "space")
# In a card that is not uploaded yet, where the pinned commit will stand.
NO_COMMIT = "0" * 40


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
    with staged_folder(final) as staged:
        kind.stage(publication, staged)
        verify.write_sums(staged)
        write_text(staged / hub.CARD, kind.card(publication, staged, NO_COMMIT))
        for line in (*verify.check_folder(staged), *kind.prove(publication, staged)):
            tell(f"ok: {line}")
        verify.check_sums(staged)  # trying it has changed nothing
    tell(_list_files(final))
    if dry_run:
        tell(f"nothing was uploaded; it is in {final}, its card without the commit that it will pin")
        return final
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
    result = card.read_json(run / "result.json")
    kinds = [part for task, part in KINDS if task == result["task"]]
    if not kinds:
        raise ValueError(f"{run} is a run of the task {result['task']!r}, which makes nothing to publish")
    what = what or kinds[0]
    if what not in kinds:
        raise ValueError(f"--what is {what!r}, but a run of {result['task']!r} has {', '.join(kinds)}")
    if what != "dataset" and result["architecture"]["model_type"] not in card.PAPERS:
        raise ValueError(f"{run} holds a {result['architecture']['model_type']}: only memory models are published")
    told = None if what == "dataset" else card.load_about(result["name"], about)
    builds_on = None if what in ("model", "dataset") else _published(base, result, what)
    return Publication(run, _without_paths(result), what, repo_id, told, builds_on)


def _published(base: str | None, result: dict[str, Any], what: str) -> Published:
    """The repository that this one builds on: as given, or as the recipe has named it."""
    base = base or result["recipe"]["model"]
    name, _, revision = base.partition("@")
    if name.count("/") != 1 or not re.fullmatch("[0-9a-f]{40}", revision):
        told = "the model that it shows" if what == "space" else "its base"
        raise ValueError(
            f"the card has to name {told} on the Hub: publish that, and give --base user/name@COMMIT (not {base!r})"
        )
    return Published(name, revision)


def _without_paths(value: Any) -> Any:
    """A result without this machine's folders: of an absolute path its last part."""
    if isinstance(value, dict):
        return {name: _without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value


def verify_published(
    where: Path, revision: str | None = None, what: str | None = None, tell: Callable[[str], None] = print
) -> None:
    """Check something that is published: only once its code is known to be this project's is it loaded.

    Args:
        where: a folder, or `user/name` on the Hub.
        revision: on the Hub, a commit, branch or tag; by default the newest of `main`.
        what: on the Hub, `dataset` or `space`; by default it is a model.
        tell: is told what is in order, in words.

    Raises:
        ValueError: what is not in order.
        OSError: the repository is not there, or could not be reached.
        RuntimeError: it does not load in a clean process.
    """
    if where.is_dir() and (revision or what):
        raise ValueError(f"{where} is a folder: leave out --revision and --what, which are for the Hub")
    folder = where if where.is_dir() else hub.download(str(where), revision, what if what in OTHER_TYPES else "model")
    if not where.is_dir():
        tell(f"ok: downloaded at commit {folder.name}")
    for line in verify.check_folder(folder):
        tell(f"ok: {line}")
    if (folder / "adapter_config.json").is_file():
        settings = card.read_json(folder / "adapter_config.json")
        base = hub.download(settings["base_model_name_or_path"], settings["revision"])
        for line in verify.check_folder(base):
            tell(f"ok, its base: {line}")
        tell(f"ok: {verify.check_loads(folder, [], base)}")
    elif (folder / "stories.jsonl.gz").is_file():
        kept = card.read_json(folder / "result.json")["metrics"]["kept"]
        tell(f"ok: {verify.check_stories(folder, kept)}")
    elif (folder / "app.py").is_file():
        tell(f"ok: {verify.check_space(folder)}")
    else:
        tell(f"ok: {verify.check_loads(folder, [])}")


def _list_files(folder: Path) -> str:
    lines = [f"{(folder / name).stat().st_size:>14,}  {name}" for name in hub.published_files(folder)]
    total = sum((folder / name).stat().st_size for name in hub.published_files(folder))
    return "\n".join(["to be uploaded, in bytes:", *lines, f"{total:>14,}  in {len(lines)} files"])


def _version() -> str:
    return importlib.metadata.version("modeling-memory-mosaic")


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
    shutil.copytree(folder, staged, dirs_exist_ok=True, ignore=shutil.ignore_patterns(hub.CARD))
    _add_results(publication, staged)
    if publication.result["architecture"]["model_type"] == "memory_mosaic":
        model, tokenizer = _load(publication)
        texts = [sample["text"] for sample in publication.result["samples"]] or ["Once upon a time"]
        write_text(staged / "units.json", json.dumps(measure_units(model, tokenizer, texts), indent=1) + "\n")


def _stage_adapter(publication: Publication, staged: Path) -> None:
    _stage_model(publication, staged)
    # PEFT writes where the base was on this machine; whoever downloads the adapter needs where it is published.
    path = staged / "adapter_config.json"
    settings = card.read_json(path)
    settings |= {"base_model_name_or_path": publication.base.repo_id, "revision": publication.base.revision}
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _add_results(publication: Publication, staged: Path) -> None:
    shutil.copyfile(CLONE / "LICENSE", staged / "LICENSE")
    write_text(staged / "result.json", json.dumps(publication.result, indent=1, ensure_ascii=False) + "\n")
    for picture in sorted(publication.run.glob("*.png")):
        shutil.copyfile(picture, staged / picture.name)
    for result in comparable_results(publication)[1:]:
        (staged / "results").mkdir(exist_ok=True)
        name = f"{result['name']}--{result['model']}--seed{result['seed']}.json"
        write_text(staged / "results" / name, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def comparable_results(publication: Publication) -> list[dict[str, Any]]:
    """The run's own result, then those of other models and seeds by the same recipe on the same data.

    They are found in `training/results` and beside the run; for each model and seed one.
    """
    own = publication.result
    found = {(own["model"], own["seed"]): own}
    if own["task"] == "language_modeling":
        others = sorted(RESULTS.glob(f"{own['name']}--*.json")) + sorted(publication.run.parent.glob("*/result.json"))
        for other in (_without_paths(card.read_json(path)) for path in others):
            if other.get("task") == own["task"] and _compared(other) == _compared(own):
                found.setdefault((other["model"], other["seed"]), other)
    return list(found.values())


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    """What results that stand in one table have in common."""
    recipe = {name: value for name, value in result["recipe"].items() if name not in ("model", "model_args", "seed")}
    recipe["training"] = {name: value for name, value in recipe["training"].items() if name not in PRESENTATION}
    return {"recipe": recipe, "data": result["data"]}


def _load(publication: Publication) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The run's own model, an adapter on its base, and its tokenizer."""
    folder = _model_folder(publication)
    if publication.what != "adapter":
        return load_model(folder)
    base, tokenizer = load_model(_base_folder(publication))
    return PeftModel.from_pretrained(base, folder), tokenizer


def _base_folder(publication: Publication) -> Path:
    """The base of a fine-tuned model on this machine, as it was when the run was made."""
    name = card.read_json(publication.run / "result.json")["recipe"]["model"]
    folder = Path(name) if Path(name).is_dir() else hub.download(publication.base.repo_id, publication.base.revision)
    if weights_checksums(folder) != publication.result["base"]["weights"]:
        raise ValueError(f"the weights in {folder} are not those that {publication.run} has adapted: restore them")
    return folder


def measure_units(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, Any]:
    """What each memory of a Memory Mosaic did while it read texts.

    Returns:
        `tokens` read; `units`, as of `summarize_units`; and `layers`, by layer and kind their means over heads, with
        the `half_life` of each head's keys, in tokens.
    """
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    units = summarize_units(inspect_units(model.eval(), batch["input_ids"], batch["attention_mask"]))
    leaks = {}
    for name, parameter in model.named_parameters():
        found = re.search(r"layers\.(\d+)\.(\w+)_memory\..*key_leak$", name)
        if found is not None:
            leaks[int(found[1]), found[2]] = (PARAMETER_SCALE * parameter.detach().double()).abs()
    layers = []
    for layer, kind in dict.fromkeys((unit["layer"], unit["kind"]) for unit in units):
        heads = [unit for unit in units if (unit["layer"], unit["kind"]) == (layer, kind)]
        means = {name: _mean([head[name] for head in heads]) for name in ("error", "effective_pairs", "norm")}
        half_life = (math.log(2) / leaks[layer, kind]).tolist()
        layers.append({"layer": layer, "kind": kind, **means, "half_life": half_life})
    return {"tokens": int(batch["attention_mask"].sum()), "layers": layers, "units": units}


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _card(template: str) -> Callable[[Publication, Path, str], str]:
    def text(publication: Publication, folder: Path, revision: str) -> str:
        result, base = publication.result, publication.base
        compared = comparable_results(publication)
        values = {
            "metadata": card.model_metadata(
                result, publication.about, base and base.repo_id, publication.what == "adapter"
            ),
            "table": TABLES[result["task"]](compared) if result["task"] in TABLES else None,
            "other_models": len({other["model"] for other in compared}) > 1,
            "files": verify.read_sums(folder),
            "units": card.read_json(folder / "units.json") if (folder / "units.json").is_file() else None,
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
    wanted = [line for line in importlib.metadata.requires("modeling-memory-mosaic") if "extra" not in line]
    return {re.match(r"[\w-]+", line)[0]: re.sub(r"^[\w-]+", "", line) for line in wanted}


def _prove_model(publication: Publication, staged: Path) -> list[str]:
    prompts = [sample["prompt"] for sample in publication.result.get("samples", [])] or ["Once upon a time"]
    base = _base_folder(publication) if publication.what == "adapter" else None
    repositories = {(publication.repo_id, NO_COMMIT): staged}
    if base is not None:
        repositories[publication.base] = base
    text = (staged / hub.CARD).read_text(encoding="utf-8")
    return [
        verify.check_lint(staged),
        verify.check_loads(staged, prompts, base, _load(publication)[0]),
        verify.check_snippets(text, repositories),
    ]


def _stage_stories(publication: Publication, staged: Path) -> None:
    for name in ("stories.jsonl.gz", "rejected.jsonl"):
        if (publication.run / name).is_file():
            shutil.copyfile(publication.run / name, staged / name)
    write_text(staged / "result.json", json.dumps(publication.result, indent=1, ensure_ascii=False) + "\n")


def _stories_card(publication: Publication, folder: Path, revision: str) -> str:
    place = {"repo_id": publication.repo_id, "revision": revision, "files": verify.read_sums(folder)}
    return babistories.card(publication.result, place)


def _prove_stories(publication: Publication, staged: Path) -> list[str]:
    return [verify.check_stories(staged, publication.result["metrics"]["kept"])]


def _stage_space(publication: Publication, staged: Path) -> None:
    folder = _model_folder(publication)
    verify.check_forms(folder)  # before a pickle could be copied
    shutil.copytree(folder, staged / "model", ignore=shutil.ignore_patterns(hub.CARD))
    for name in ("app.py", "requirements.txt"):
        shutil.copyfile(verify.SPACE / name, staged / name)
    shutil.copytree(verify.PACKAGE, staged / verify.PACKAGE.name, ignore=lambda _, names: _all_but_code(names))
    _add_results(publication, staged)


def _all_but_code(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".py")]


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
    return [verify.check_space(staged)]


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

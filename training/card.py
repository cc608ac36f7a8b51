# SPDX-License-Identifier: Apache-2.0
"""Cards: the README of a published folder, from templates in `hub_cards/`.

Every number in a card comes from the run's `result.json` or from `units.json`. Facts that no run can know (licence,
origin of the data, limits) stand in `hub_cards/about/NAME.yaml`, one file a recipe. A missing value is an error:
`load_about` raises it for a fact, `render` for a place in a template.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from pydantic import Field, ValidationError

from modeling_memory_mosaic.files_memory_mosaic import ARXIV
from training.paths import CLONE
from training.recipe import Section
from training.untrusted import parse_yaml


TEMPLATES = CLONE / "hub_cards"
ABOUT = TEMPLATES / "about"
# The `configs` of a data set's card: `datasets` loads these files.
STORIES = [{"config_name": "default", "data_files": "stories.jsonl.gz"}]
VECTORS = [{"config_name": "default", "data_files": "memories.parquet"}]


class Paper(NamedTuple):
    """The paper that a model comes from, as its card names and cites it.

    Args:
        family: what a model of the paper is called.
        arxiv: number on arXiv.
        key: of the citation.
        title: of the paper.
        authors: in the form of BibTeX.
        year: of its first version.
    """

    family: str
    arxiv: str
    key: str
    title: str
    authors: str
    year: int


# By model type. Only models of these types are published.
PAPERS = {
    "memory_mosaic": Paper(
        "Memory Mosaic",
        ARXIV["memory_mosaic"],
        "zhang2024memorymosaics",
        "Memory Mosaics",
        r"Jianyu Zhang and Niklas Nolte and Ranajoy Sadhukhan and Beidi Chen and L{\'e}on Bottou",
        2024,
    ),
    "memory_mosaic_v2": Paper(
        "Memory Mosaic v2",
        ARXIV["memory_mosaic_v2"],
        "zhang2025memorymosaics",
        "Memory Mosaics at scale",
        r"Jianyu Zhang and L{\'e}on Bottou",
        2025,
    ),
    "memory_model": Paper(
        "memory model",
        ARXIV["memory_model"],
        "memorymodels2026",
        "Language Model Memory and Memory Models for Language",
        "Badger",
        2026,
    ),
}

# The library that loads a memory, for the Hub, which offers no snippet of its own for it.
MEMORY_LIBRARY = "modeling-memory-mosaic"


def render(template: str, **values: Any) -> str:
    """Return a card rendered from a template in `hub_cards`; `ValueError` if the template uses a value not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    try:
        return environment.get_template(template).render(**values)
    except (jinja2.UndefinedError, TypeError) as error:  # a filter that gets no value raises a TypeError
        raise ValueError(f"the card {template} lacks a value: {error}") from None


class DataAbout(Section):
    """The origin of the training text."""

    datasets: list[str] = Field(description="ids on the Hub; none for text that is not there")
    sources: list[str] = Field(min_length=1, description="what is described: names of sources, or sha256 of files")
    license: str = Field(min_length=1)
    origin: str = Field(min_length=1, description="who wrote it, when, how; whole sentences")


class PartAbout(Section):
    """The origin of a pretrained model that became a part of a memory model."""

    base_model: str | None = Field(description="its id on the Hub; none for one that is not there")
    license: str = Field(min_length=1)
    origin: str = Field(min_length=1, description="what it is, who trained it and on what; whole sentences")


class About(Section):
    """The facts of a card that no result holds."""

    title: str = Field(min_length=1)
    license: str = Field(min_length=1)
    language: str = Field(min_length=2)
    purpose: str = Field(min_length=1)
    data: DataAbout
    parts: dict[str, PartAbout] = Field({}, description="by name, `encoder` or `decoder`: those that were pretrained")
    limits: str = Field(min_length=1)


def load_about(name: str, path: Path | None = None) -> About:
    """Read the facts about the runs of a recipe that no result holds.

    Args:
        name: name of the recipe.
        path: the YAML file; by default `hub_cards/about/NAME.yaml`.

    Raises:
        ValueError: there is no such file, or one of its fields is missing, empty or unknown.
    """
    path = path or ABOUT / f"{name}.yaml"
    fields = ", ".join(About.model_fields)
    if not path.is_file():
        raise ValueError(
            f"the card lacks what no result knows ({fields}): write it in {path}, which `publish RUN --init` begins"
        )
    try:
        return About.model_validate(parse_yaml(path.read_text(encoding="utf-8"), path))
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, problem['loc'])) or 'all'}: {problem['msg']}" for problem in error.errors()]
        raise ValueError("\n".join([f"the card needs these fields of {path}:", *problems])) from None


def _identities(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield what identifies the data of each split of a run, by the name of a file or of the split."""
    # A memory has read files, and was not trained on them.
    for split in ("read",) if "read" in result["data"] else ("train", "validation"):
        source = result["data"][split]
        # A local file may have any name, so its checksum identifies it. Other sources have names of their own.
        files = {} if source["kind"] in ("embedded", "hub") else source["files"]
        yield split, files or {split: source["name"].partition("@")[0]}


def check_data(about: About, result: dict[str, Any]) -> None:
    """Raise `ValueError` if a run has read other data than those that are described."""
    for split, identities in _identities(result):
        unknown = [f"{identity} ({n})" for n, identity in identities.items() if identity not in about.data.sources]
        if unknown:
            raise ValueError(
                f"the run's {split} data are {', '.join(unknown)}, of which data.origin and data.license say "
                "nothing: describe them, with that among data.sources, and give the file as --about"
            )


def check_parts(about: About, result: dict[str, Any]) -> None:
    """Raise `ValueError` if other pretrained parts are described than a run has taken."""
    taken = result.get("pretrained", {})
    if about.parts.keys() != taken.keys():
        named = " and ".join(f"{name} ({part['name']})" for name, part in sorted(taken.items())) or "none"
        raise ValueError(
            f"the pretrained parts of the run are: {named}. `parts` describes {sorted(about.parts)}: give base_model, "
            "license and origin of each, and of no other, in the file of --about"
        )
    for name, part in taken.items():
        if "commit" in part and about.parts[name].base_model != part["name"]:
            raise ValueError(
                f"the {name} of the run is {part['name']} of the Hub, and parts.{name}.base_model says "
                f"{about.parts[name].base_model!r}"
            )


def write_about(result: dict[str, Any], path: Path | None = None) -> Path:
    """Write the file that `load_about` reads with what the result knows, its data, and empty places for the rest.

    Args:
        result: content of the run's `result.json`.
        path: the YAML file; by default `hub_cards/about/NAME.yaml`.

    Raises:
        ValueError: there is such a file already.
    """
    path = path or ABOUT / f"{result['name']}.yaml"
    named = {identity: name for _, identities in _identities(result) for name, identity in identities.items()}
    on_hub = {source["name"].partition("@")[0] for source in result["data"].values() if source["kind"] == "hub"}
    parts = {name: part["name"] if "commit" in part else None for name, part in result.get("pretrained", {}).items()}
    text = render("about.yaml.jinja", name=result["name"], sources=named, datasets=sorted(on_hub), parts=parts)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(
            f"{path} exists already and stays as it is: fill its fields in, or name another file by --about"
        ) from None
    return path


def _evaluations(result: dict[str, Any], about: About) -> list[EvalResult]:
    """Return the validation metrics of a result for the Hub's model index, which knows only data sets on the Hub."""
    provenance = result["data"]["validation"]
    if not about.data.datasets:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=about.data.datasets[0],
            dataset_name=provenance["name"],
            dataset_split="validation",
            metric_type=name.removeprefix("validation_"),
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in sorted(result["metrics"].items())
        if isinstance(value, float) and name != "training_loss"
    ]


def model_metadata(result: dict[str, Any], about: About, base: str | None = None, adapter: bool = False) -> str:
    """Return the metadata of a model's card, the YAML that the Hub reads.

    Args:
        result: content of the run's `result.json`.
        about: the facts that no result holds.
        base: id of the model that this one was fine-tuned from.
        adapter: whether it is an adapter that PEFT loads on top of the base.
    """
    model_type = result["architecture"]["model_type"]
    bases = sorted({part.base_model for part in about.parts.values() if part.base_model} | ({base} if base else set()))
    relation: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if bases else {}
    data = ModelCardData(
        license=about.license,
        language=about.language,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            model_type.replace("_", "-"),
            "associative-memory",
            f"arxiv:{PAPERS[model_type].arxiv}",
            "lora" if adapter else "custom_code",  # the Hub marks models by it that need `trust_remote_code`
        ],
        datasets=about.data.datasets or None,
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        metrics=["perplexity"] if "validation_perplexity" in result["metrics"] else None,
        model_name=about.title,
        eval_results=_evaluations(result, about) or None,
        **relation,
    )
    return data.to_yaml()


def memory_metadata(result: dict[str, Any], about: About, base: str) -> str:
    """Return the metadata of a memory's card, the YAML that the Hub reads; arguments as of `model_metadata`."""
    # No `pipeline_tag` and no relation to the base: the Hub has none for it, and would offer code that cannot load it.
    data = ModelCardData(
        license=about.license,
        language=about.language,
        library_name=MEMORY_LIBRARY,
        tags=["memory", "associative-memory", f"arxiv:{PAPERS[result['architecture']['model_type']].arxiv}"],
        datasets=about.data.datasets or None,
        base_model=base,
        model_name=about.title,
    )
    return data.to_yaml()


def vectors_metadata(result: dict[str, Any], about: About) -> str:
    """Return the metadata of a card of vectors, the YAML that the Hub reads; arguments as of `model_metadata`."""
    arxiv = PAPERS[result["architecture"]["model_type"]].arxiv
    data = DatasetCardData(
        license=about.license,
        language=about.language,
        tags=["memory", "embeddings", f"arxiv:{arxiv}"],
        pretty_name=about.title,
        configs=VECTORS,
    )
    return data.to_yaml()

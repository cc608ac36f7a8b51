# SPDX-License-Identifier: Apache-2.0
"""Cards: what a published folder says of itself, from templates in `hub_cards/`.

A number in a card is looked up in the run's `result.json` or in `units.json`; what no run can know (licence, origin of
the data, limits) stands in `hub_cards/about/NAME.yaml`, one file a recipe. A value that is missing is an error.
"""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from pydantic import Field, ValidationError

from training.bounded import parse_yaml
from training.paths import CLONE
from training.recipe import Section


TEMPLATES = CLONE / "hub_cards"
ABOUT = TEMPLATES / "about"
# What a data set of stories says of its files.
STORIES = [{"config_name": "default", "data_files": "stories.jsonl.gz"}]
PAPERS = {"memory_mosaic": "2405.06394", "memory_model": "2602.13466"}


class DataAbout(Section):
    """Where the training text comes from."""

    datasets: list[str] = Field(description="ids on the Hub; none for text that is not there")
    sources: list[str] = Field(min_length=1, description="what is meant: names of sources, or sha256 of files")
    license: str = Field(min_length=1)
    origin: str = Field(min_length=1, description="who wrote it, when, how; whole sentences")


class About(Section):
    """What a card says that no result knows."""

    title: str = Field(min_length=1)
    license: str = Field(min_length=1)
    language: str = Field(min_length=2)
    purpose: str = Field(min_length=1)
    data: DataAbout
    limits: str = Field(min_length=1)


def load_about(name: str, path: Path | None = None) -> About:
    """What is to be said of the runs of a recipe.

    Args:
        name: of the recipe.
        path: of the YAML file; by default `hub_cards/about/NAME.yaml`.

    Raises:
        ValueError: there is no such file, or a field of it is missing, empty or unknown.
    """
    path = path or ABOUT / f"{name}.yaml"
    fields = ", ".join(About.model_fields)
    if not path.is_file():
        raise ValueError(f"the card lacks what no result knows ({fields}): write it in {path}, like its neighbours")
    try:
        return About.model_validate(parse_yaml(path.read_text(encoding="utf-8"), path))
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, problem['loc'])) or 'all'}: {problem['msg']}" for problem in error.errors()]
        raise ValueError("\n".join([f"the card needs these fields of {path}:", *problems])) from None


def check_data(about: About, result: dict[str, Any]) -> None:
    """`ValueError` if a run has read other data than those that are described."""
    for split in ("train", "validation"):
        read = result["data"][split]
        files = {} if read["kind"] in ("embedded", "hub") else read["files"]  # those have a name that means one thing
        for name, known_as in (files or {split: read["name"].partition("@")[0]}).items():
            if known_as not in about.data.sources:
                raise ValueError(
                    f"the run's {split} data are {known_as} ({name}), of which data.origin and data.license say "
                    "nothing: describe them, with that among data.sources, and give the file as --about"
                )


def model_metadata(result: dict[str, Any], about: About, base: str | None = None, adapter: bool = False) -> str:
    """The YAML that the Hub reads, by `huggingface_hub`'s own classes.

    Args:
        result: content of the run's `result.json`.
        about: what no result knows.
        base: id of the model that this one was fine-tuned from.
        adapter: whether PEFT loads it, on top of the base.
    """
    kind = result["architecture"]["model_type"]
    relation = {} if base is None else {"base_model_relation": "adapter" if adapter else "finetune"}
    data = ModelCardData(
        license=about.license,
        language=about.language,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[
            kind.replace("_", "-"),
            "associative-memory",
            f"arxiv:{PAPERS[kind]}",
            "lora" if adapter else "custom_code",
        ],
        datasets=about.data.datasets or None,
        base_model=base,
        metrics=["perplexity"] if "validation_perplexity" in result["metrics"] else None,
        model_name=about.title,
        eval_results=_evaluations(result, about) or None,
        **relation,
    )
    return data.to_yaml()


def _evaluations(result: dict[str, Any], about: About) -> list[EvalResult]:
    """The validation metrics of a result, in the Hub's model index, which knows data sets on the Hub only."""
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


def render(template: str, **values: Any) -> str:
    """A card from its template in `hub_cards`; `ValueError` if it asks for a value that is not there."""
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
    except (jinja2.UndefinedError, TypeError) as error:  # TypeError: a filter was given nothing
        raise ValueError(f"the card {template} lacks a value: {error}") from None

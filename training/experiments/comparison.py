# SPDX-License-Identifier: Apache-2.0
"""What the experiments on trained models share: which models, their training, the result and its claims.

An experiment names a `base` recipe and, for each model of the comparison, what differs from it. Trainings live in
`runs/BASE/...`, outside the experiment's own folder, so that experiments on the same models train them once. Whichever
is not finished is trained, or resumed, before anything is measured.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from omegaconf import OmegaConf
from pydantic import Field, PositiveInt, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.evaluate import load_model
from training.parallel import recipe_job, run_all
from training.paths import CONFIGURATION
from training.recipe import BaseRecipe, TrainingRecipe, leaves, load_recipe, task_module
from training.result import header, read_result
from training.run_folder import run_once
from training.tasks import language_modeling


class Trained(NamedTuple):
    """One training of a comparison."""

    label: str
    depth: int
    seed: int
    recipe: TrainingRecipe

    @property
    def name(self) -> str:
        blocks = "1 block" if self.depth == 1 else f"{self.depth} blocks"
        return f"{self.label}, {blocks}"

    def load(self, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The finished model, in evaluation mode, and its tokenizer."""
        return load_model(self.recipe.folder / "model", **options)

    def result(self) -> dict[str, Any]:
        """Content of the training's own `result.json`."""
        return read_result(self.recipe.folder)


class ComparisonRecipe(BaseRecipe):
    """Models side by side; see `configuration/README.md` for each field."""

    base: str
    common: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    workers: PositiveInt = 1

    @model_validator(mode="after")
    def _trainings_are_valid(self):
        assert self.trainings  # building them is the check
        return self

    @functools.cached_property
    def trainings(self) -> list[Trained]:
        """Every model, in every variant, with every seed; all models of one seed and variant next to each other."""
        combinations = [(s, v, label) for s in self.seeds for v in self.variants for label in self.runs]
        return [self._training(label, variant, seed) for seed, variant, label in combinations]

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Settings, besides their own, with which all models are trained."""
        return [{}]

    def _training(self, label: str, variant: dict[str, Any], seed: int) -> Trained:
        path = CONFIGURATION / "recipe" / f"{self.base}.yaml"
        settings = [self.common, self.runs[label], {"seed": seed}]
        own = _merged(self.runs[label], _news(variant, load_recipe(path, settings=settings)))
        folder = f"runs/{self.base}/{'-'.join([*leaves(own), f'seed{seed}'])}"
        recipe = load_recipe(path, settings=[self.common, own, {"seed": seed, "output_dir": folder}])
        return Trained(label, recipe.build_config().num_hidden_layers, seed, recipe)

    def content(self) -> dict[str, Any]:
        content = super().content() | {"trainings": [training.recipe.hash for training in self.trainings]}
        del content["workers"]
        return content


class DepthComparisonRecipe(ComparisonRecipe):
    """The models at several depths."""

    depths: list[PositiveInt] = Field(min_length=1)

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"model_args": {"num_hidden_layers": depth}} for depth in self.depths]


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.merge(settings, more))


def _news(variant: dict[str, Any], recipe: BaseRecipe) -> dict[str, Any]:
    """What a variant changes in a recipe: what it has already gives a training no name of its own."""
    news = {}
    for section, settings in variant.items():
        has = recipe.build_config() if section == "model_args" else getattr(recipe, section)
        changed = {name: value for name, value in settings.items() if getattr(has, name) != value}
        news |= {section: changed} if changed else {}
    return news


def plan(
    recipe: ComparisonRecipe,
    teraflops: float | None = None,
    utilisation: float | None = None,
    devices: int | None = None,
) -> dict[str, Any]:
    """What the experiment would do: each training, and whether it is finished. Reads no data.

    The arguments are those of `training.tasks.language_modeling.plan`; given `teraflops`, the hours of each training
    and of all that are not finished are among the lines.
    """
    lines, remaining = {}, 0.0
    for training in recipe.trainings:
        finished = (training.recipe.folder / "result.json").is_file()
        told = [
            f"{language_modeling.num_parameters(training.recipe):,} parameters",
            "finished" if finished else "to be trained",
        ]
        if teraflops is not None:
            hours = language_modeling.plan(training.recipe, teraflops, utilisation, devices)["hours"]
            told.append(f"{hours} hours")
            remaining += 0 if finished else hours
        lines[str(training.recipe.folder)] = ", ".join([f"{training.name}, seed {training.seed}", *told])
    if teraflops is not None:
        lines["hours"] = round(remaining, 3)
    return lines | {"trainings": len(recipe.trainings), "folder": str(recipe.folder), "hash": recipe.hash}


def run_comparison(
    recipe: ComparisonRecipe,
    restart: bool,
    data: dict[str, Any],
    measure: Callable[[ComparisonRecipe], dict[str, Any]],
) -> dict[str, Any]:
    """Train what is not trained yet, measure, and write `result.json`.

    Args:
        recipe: of the experiment.
        restart: move what an earlier run of the experiment left aside; finished trainings stay and are used.
        data: provenance of what is measured on, by name.
        measure: looks at the trained models, writes pictures and tables into `recipe.folder` and returns `measured`
            (numbers), `table` (Markdown, one line a model) and `claims` (a list of `Claim`).

    Returns:
        Content of `result.json`; of the earlier one, if the experiment was already finished.
    """
    first = recipe.trainings[0].recipe
    task_module(first.task).training_arguments(first)  # settles devices and processes
    state = PartialState()
    identity = {"hash": recipe.hash, "data": data, "recipe": recipe.content()}
    return run_once(recipe, state, restart, lambda: identity, make=lambda data: _compare(recipe, state, data, measure))


def _compare(
    recipe: ComparisonRecipe,
    state: PartialState,
    data: dict[str, Any],
    measure: Callable[[ComparisonRecipe], dict[str, Any]],
) -> dict[str, Any]:
    run_all([recipe_job(training.recipe) for training in recipe.trainings], recipe.workers)
    if not state.is_main_process:
        return {}
    trainings = [_training_summary(training) for training in recipe.trainings]
    result = header(recipe) | {"data": data, "trainings": trainings} | measure(recipe)
    result["claims"] = [claim._asdict() for claim in result["claims"]]
    return result


def _training_summary(training: Trained) -> dict[str, Any]:
    result = training.result()
    kept = (
        "model",
        "recipe_hash",
        "commit",
        "versions",
        "data",
        "parameters",
        "steps",
        "tokens",
        "seconds",
        "metrics",
    )
    own = {"label": training.label, "depth": training.depth, "seed": training.seed}
    return own | {name: result[name] for name in kept if name in result}


def summary(result: dict[str, Any], folder: Path) -> str:
    """The end of an experiment in words: its table, its claims, and where everything is."""
    claims = [
        f"{row['verdict']}: {row['claim']} (paper: {row['paper']}; ours: {row['ours']})" for row in result["claims"]
    ]
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".png", ".md")))
    return "\n".join([result["table"], "", *claims, f"{files} are in {folder}"])


def fits_context(model: PreTrainedModel, num_tokens: int) -> bool:
    """Whether a model can read so many tokens: one that learns positions (GPT-2's `wpe`) has a row for each."""
    positions = getattr(model.base_model, "wpe", None)
    return positions is None or num_tokens <= positions.num_embeddings

# SPDX-License-Identifier: Apache-2.0
"""Comparisons of trained models: the part that all experiments on them share.

An experiment names a `base` recipe and, for each model, the settings that differ from it. Trainings live in
`runs/BASE/...`, outside the experiment's own folder, so that experiments on the same models train them once. A
training that is not finished is started or resumed before anything is measured.
"""

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from omegaconf import OmegaConf
from pydantic import Field, PositiveInt, model_validator
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typing_extensions import Self

from training.claims import RecipeWithClaims, describe_claim, judged
from training.cost import HashedConfig
from training.evaluate import load_model
from training.figures import draw_result
from training.parallel import Job, recipe_job, run_all
from training.paths import CONFIGURATION
from training.recipe import leaves, load_recipe, plan_of, task_module
from training.result import SHOWN, header, read_result
from training.run_folder import run_once
from training.tasks import language_modeling


def blocks(depth: int) -> str:
    """Return a depth in words."""
    return "1 block" if depth == 1 else f"{depth} blocks"


@functools.lru_cache
def _num_positions(config: HashedConfig) -> float:
    """Return how many tokens a model can read: a model that learns positions, such as GPT-2, has a table of them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config.config))
    table = getattr(model.base_model, "wpe", None)
    return math.inf if table is None else table.num_embeddings


class Trained(NamedTuple):
    """One training of a comparison, and how its model is read.

    Args:
        label: of the run.
        depth: in blocks.
        seed: of the training.
        recipe: of the training.
        evaluation: fields of the model's configuration that have another value when the finished model is loaded.
    """

    label: str
    depth: int
    seed: int
    recipe: Any  # a `TrainingRecipe`, whose fields depend on its task
    evaluation: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Label and depth: all seeds have the same."""
        return f"{self.label}, {blocks(self.depth)}"

    def can_read(self, num_tokens: int) -> bool:
        """Return whether the model can read so many tokens."""
        return num_tokens <= _num_positions(HashedConfig.of(self.recipe.build_config()))

    def load(self, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Return the finished model, in evaluation mode, and its tokenizer."""
        return load_model(self.recipe.folder / "model", **self.evaluation, **options)

    def result(self) -> dict[str, Any]:
        """Return the content of the training's own `result.json`.

        Raises:
            ValueError: it is not finished, or the file is damaged.
        """
        result = read_result(self.recipe.folder)
        if result is None:
            raise ValueError(f"{self.recipe.folder} holds no result.json: run the experiment, which trains it")
        return result


def merged(settings: dict[str, Any], more: dict[str, Any]) -> Any:
    """Return settings with others put in, section by section."""
    # A deep merge: `|` would drop the other settings of a section.
    return OmegaConf.to_container(OmegaConf.merge(settings, more))


def _changed_settings(variant: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """Return what a variant changes in a recipe.

    A setting that the recipe has already is left out: it would give the same training another folder. One that no
    recipe has stays, to be refused by its name when it is read.
    """
    changes: dict[str, Any] = {}
    for section, settings in variant.items():
        if not isinstance(settings, dict):
            changes |= {} if getattr(recipe, section, None) == settings else {section: settings}
            continue
        # What `model_args` leaves out stands in the model's file.
        current = recipe.build_config() if section == "model_args" else getattr(recipe, section, None)
        changed = {name: value for name, value in settings.items() if getattr(current, name, None) != value}
        if changed:
            changes[section] = changed
    return changes


class ComparisonRecipe(RecipeWithClaims):
    """Models side by side; see `configuration/README.md` for each field."""

    base: str
    common: dict[str, Any] = {}
    runs: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    workers: PositiveInt = 1

    @model_validator(mode="after")
    def _check_trainings(self) -> Self:
        depths = {str(training.depth) for training in self.all_trainings}  # building them is a check, too
        for label, run in self.runs.items():
            if absent := sorted(set(map(str, run.get("at_depth", {}))) - depths):
                raise ValueError(f"`at_depth` of the run {label!r} has {absent}, but depths are {sorted(depths)}")
        return self

    @functools.cached_property
    def trainings(self) -> list[Trained]:
        """Every model, in every variant, with every seed.

        All models of one seed and variant stand next to each other.
        """
        return [
            self._training(label, variant, seed)
            for seed in self.seeds
            for variant in self.variants
            for label in self.runs
        ]

    @property
    def all_trainings(self) -> list[Trained]:
        """Every training that the experiment needs: by default those that it compares, `trainings`."""
        return self.trainings

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Settings that are varied for every model, such as the depth."""
        return [{}]

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """By label: what is changed in the configuration of a trained model when it is loaded."""
        return {}

    @property
    def base_path(self) -> Path:
        """The recipe that all models share."""
        return CONFIGURATION / "recipe" / f"{self.base}.yaml"

    @functools.cached_property
    def run_settings(self) -> dict[str, dict[str, Any]]:
        """By label: in which settings the training of a run differs."""
        # What is changed in evaluation alone is no setting of the training, whose folder other runs share.
        ignored = {label: {"at_depth", *(["evaluation"] if label in self.evaluations else [])} for label in self.runs}
        return {
            label: {key: value for key, value in run.items() if key not in ignored[label]}
            for label, run in self.runs.items()
        }

    @functools.cached_property
    def run_recipes(self) -> dict[str, Any]:
        """By label: the recipe of a run, which alone tells what settings of a variant change anything."""
        return {
            label: load_recipe(self.base_path, settings=[self.common, settings])
            for label, settings in self.run_settings.items()
        }

    def is_mosaic(self, label: str) -> bool:
        """Return whether a run's model is a Memory Mosaic."""
        return hasattr(self.run_recipes[label].build_config(), "num_persistent_slots")

    def _at_depth(self, label: str, variant: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that a run has at the depth of a variant alone."""
        own_depth = self.run_recipes[label].build_config().num_hidden_layers
        depth = variant.get("model_args", {}).get("num_hidden_layers", own_depth)
        settings_of = self.runs[label].get("at_depth", {})
        if not isinstance(settings_of, dict) or not all(isinstance(one, dict) for one in settings_of.values()):
            raise ValueError(f"`at_depth` of the run {label!r} has to give settings for each depth that it names")
        # Depths are numbers in a recipe's file, and names of fields in a result's.
        return {str(number): settings for number, settings in settings_of.items()}.get(str(depth), {})

    def _training(self, label: str, variant: dict[str, Any], seed: int) -> Trained:
        variant = merged(self._at_depth(label, variant), variant)
        settings = merged(self.run_settings[label], _changed_settings(variant, self.run_recipes[label]))
        folder = f"runs/{self.base}/{'-'.join([*leaves(settings), f'seed{seed}'])}"
        all_settings = [self.common, settings, {"seed": seed, "output_dir": folder}]
        recipe: Any = load_recipe(self.base_path, settings=all_settings)
        evaluation = self.evaluations.get(label, {})
        if evaluation:  # refused here, before any training, if the model has no such field
            load_recipe(self.base_path, settings=[*all_settings, {"model_args": evaluation}])
        return Trained(label, recipe.build_config().num_hidden_layers, seed, recipe, evaluation)

    def content(self) -> dict[str, Any]:
        """Return what determines the result: the trainings too, but not how many run at once."""
        # The base recipe is another file: its hash makes a change of it count.
        content = super().content() | {"trainings": [training.recipe.hash for training in self.all_trainings]}
        del content["workers"]
        return content


class DepthComparisonRecipe(ComparisonRecipe):
    """The models at several depths."""

    depths: list[PositiveInt] = Field(min_length=1)

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"model_args": {"num_hidden_layers": depth}} for depth in self.depths]


def _by_folder(recipe: ComparisonRecipe) -> list[Trained]:
    """Return the trainings that the experiment needs, once each: two runs may read one model in two ways."""
    return list({training.recipe.folder: training for training in reversed(recipe.all_trainings)}.values())[::-1]


def plan(
    recipe: ComparisonRecipe,
    teraflops: float | None = None,
    utilisation: float | None = None,
    devices: int | None = None,
) -> dict[str, Any]:
    """Return what the experiment would do: each training, and whether it is finished. Reads no data.

    The arguments are those of `training.tasks.language_modeling.plan`. With `teraflops`, the lines include the hours
    of each training and of all that are not finished.
    """
    lines: dict[str, Any] = {}
    remaining_hours = 0.0
    trainings = _by_folder(recipe)
    for training in trainings:
        finished = (training.recipe.folder / "result.json").is_file()
        facts = [
            f"{language_modeling.num_parameters(training.recipe):,} parameters",
            "finished" if finished else "to be trained",
        ]
        if teraflops is not None:
            machine = {"teraflops": teraflops, "utilisation": utilisation, "devices": devices}
            hours = plan_of(training.recipe, **machine)["hours"]
            facts.append(f"{hours} hours")
            remaining_hours += 0 if finished else hours
        lines[str(training.recipe.folder)] = ", ".join([f"{training.name}, seed {training.seed}", *facts])
    if teraflops is not None:
        lines["hours"] = round(remaining_hours, 3)
    return lines | {"trainings": len(trainings), "folder": str(recipe.folder), "hash": recipe.hash}


def _training_summary(training: Trained) -> dict[str, Any]:
    result = training.result()
    kept = ["model", "recipe_hash", "commit", "versions", "data"]
    kept += ["parameters", "steps", "tokens", "seconds", "metrics"]
    place = {"label": training.label, "depth": training.depth, "seed": training.seed}
    # Tasks differ in what they record.
    return place | {name: result[name] for name in kept if name in result}


def _compare(
    recipe: ComparisonRecipe,
    state: PartialState,
    data: dict[str, Any],
    measure: Callable[[ComparisonRecipe], dict[str, Any]],
) -> dict[str, Any]:
    run_all([recipe_job(training.recipe) for training in _by_folder(recipe)], recipe.workers)
    # The other processes take part in the trainings alone.
    if not state.is_main_process:
        return {}
    trainings = [_training_summary(training) for training in recipe.all_trainings]
    result = header(recipe) | {"data": data, "trainings": trainings} | measure(recipe)
    draw_result(recipe, result["measured"], recipe.folder)
    return result | judged(recipe, result["measured"])


def measure_all(recipe: ComparisonRecipe, measure: Callable[..., Any], *arguments: Any) -> list[tuple[Trained, Any]]:
    """Measure each training, several at once in processes of their own, whose output goes to `measures/`.

    Args:
        recipe: of the experiment; it names the trainings, and says how many are measured at once.
        measure: a function of a module, called with the recipe, a training and the arguments.
        arguments: that it takes besides.

    Returns:
        Each training, in the recipe's order, with what was returned for it.
    """
    folder = recipe.folder / "measures"
    jobs = [
        Job(folder / f"{number}-{training.recipe.folder.name}", measure, (recipe, training, *arguments))
        for number, training in enumerate(recipe.trainings)
    ]
    return list(zip(recipe.trainings, run_all(jobs, recipe.workers, "measurements"), strict=True))


def run_comparison(
    recipe: ComparisonRecipe,
    restart: bool,
    data: dict[str, Any],
    measure: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    """Train what is not trained yet, measure, and write `result.json`.

    Args:
        recipe: of the experiment.
        restart: move what an earlier run of the experiment left aside; finished trainings stay and are used.
        data: provenance of what is measured on, by name.
        measure: looks at the trained models, and returns `measured` (numbers, from which the task's module computes
            `effects` and draws its pictures) and `table` (Markdown). It may write other tables into `recipe.folder`.

    Returns:
        Content of `result.json`; of the earlier one, if the experiment was already finished.
    """
    first = recipe.trainings[0].recipe
    task_module(first.task).training_arguments(first)  # settles devices and processes
    state = PartialState()
    identity = {"hash": recipe.hash, "data": data, "recipe": recipe.content()}
    return run_once(recipe, state, restart, lambda: identity, make=lambda data: _compare(recipe, state, data, measure))


def summary(result: dict[str, Any], folder: Path) -> str:
    """Return the table of a finished experiment, its claims, and where its files are."""
    claims = [describe_claim(claim, result["effects"]) for claim in result["claims"]]
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in (".json", *SHOWN)))
    return "\n".join([result["table"], "", *claims, f"{files} are in {folder}"])

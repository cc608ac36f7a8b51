# SPDX-License-Identifier: Apache-2.0
"""A search over settings: any `base` recipe, run at points of a `space`, compared by a number of its result.

A trial is a run of the base recipe in a folder of its own inside the search's, so that it resumes as any run does.
Optuna keeps what has been tried in `study.db`; one process reads and writes it, however many `workers` run trials. A
sampler is seeded for each trial, by the search's seed and the trial's number: a search that was killed and started
again draws what it would have drawn.
"""

import contextlib
import functools
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import optuna
import torch
from accelerate import PartialState
from filelock import FileLock
from matplotlib.axes import Axes
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator
from sqlalchemy.pool import NullPool
from tqdm import tqdm
from transformers.utils.generic import flatten_dict
from typing_extensions import Self

from training.cost import check_machine
from training.figures import (
    FEWEST_NUMBERS,
    better,
    draw_result,
    in_words,
    legend_below,
    new_figure,
    save_figure,
    styles_of,
)
from training.files import checksum, read_sealed, sealed, set_aside, write_text
from training.parallel import recipe_job, run_logged, start_workers
from training.paths import CONFIGURATION, nearest
from training.recipe import BaseRecipe, Section, load_recipe, plan_of
from training.result import header, read_result
from training.run_folder import TRIAL_LOCK, run_once
from training.tables import markdown_table


logger = logging.getLogger(__name__)

LONGEST_TABLE = 20
RESERVED_KEYS = ("name", "task", "output_dir")
Settings = dict[str, Any]  # value by dotted key


class RangeSection(Section):
    """All numbers between two, both included: whole ones if both are; with `log`, every order of magnitude alike."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low is {self.low} and high is {self.high}: give two numbers, the lower as `low`")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, which has no logarithm: give a positive one, or log: false")
        return self


def _values_type(values: Any) -> str:
    # pydantic asks for raw values, to read them, and for sections, to write them out.
    return "range" if isinstance(values, (dict, RangeSection)) else "choices"


Choices = Annotated[list[bool | int | float | str | None], Field(min_length=1)]
Values = Annotated[
    Annotated[Choices, Tag("choices")] | Annotated[RangeSection, Tag("range")], Discriminator(_values_type)
]


def _flat(space: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    # No library does this: a range is a dictionary too, and stays one.
    for key, values in space.items():
        if isinstance(values, dict) and not values.keys() & RangeSection.model_fields.keys():
            yield from _flat(values, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", values


def _nested(settings: Settings) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        inner = functools.reduce(lambda inside, parent: inside.setdefault(parent, {}), parents, nested)
        inner[last] = value
    return nested


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _format_settings(settings: Settings) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def _folder_name(settings: Settings, digest: str) -> str:
    # For readers the last word of each key and four digits; the hash tells apart what these leave out.
    words = "-".join(f"{key.rpartition('.')[2]}={_format_value(value)}" for key, value in settings.items())
    return f"trial-{re.sub(r'[^A-Za-z0-9_.=+-]+', '_', words)[:80]}-{digest[:8]}"


class Recipe(BaseRecipe):
    """A space of settings for a base recipe, and the measure that compares trials; see `configuration/README.md`."""

    task: Literal["search"]
    base: str
    common: dict[str, Any] = {}
    space: dict[str, Values] = Field(min_length=1)
    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"
    sampler: Literal["grid", "random", "tpe"]
    num_trials: PositiveInt | None = None
    seed: int = Field(default=0, ge=0)
    workers: PositiveInt = 1

    @field_validator("space", mode="before")
    @classmethod
    def _flatten_keys(cls, space: Any) -> Any:
        # An override such as space.training.learning_rate=[1e-3,2e-3] arrives nested.
        return dict(_flat(space)) if isinstance(space, dict) else space

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        ranges = [key for key, values in self.space.items() if isinstance(values, RangeSection)]
        for key, values in self.space.items():
            if isinstance(values, list) and any(value in values[:place] for place, value in enumerate(values)):
                raise ValueError(f"`space.{key}` has a value twice: {values}")
            within = [other for other in self.space if other.startswith(f"{key}.")]
            if within:
                raise ValueError(f"`space.{key}` holds {', '.join(within)}: search one or the other")
        if self.sampler == "grid":
            if ranges:
                raise ValueError(f"a grid has no ranges: list the values of {', '.join(ranges)}, or sampler: random")
            if self.num_trials is not None:
                raise ValueError("`num_trials` has no effect on a grid, all of which is tried: remove it")
        elif self.num_trials is None:
            raise ValueError(f"sampler: {self.sampler} never ends by itself: give `num_trials`")
        elif not ranges and self.num_trials > self.num_points:
            raise ValueError(f"`num_trials` is {self.num_trials} of only {self.num_points} points: try sampler: grid")
        return self

    @model_validator(mode="after")
    def _check_points(self) -> Self:
        taken = sorted({*self.space, *self.common} & {*RESERVED_KEYS})
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set by `space` or `common`: the search decides it")
        if isinstance(self.base_recipe, Recipe):
            raise ValueError(f"`base` is {self.base!r}, itself a search: name the recipe that it searches")
        for settings in self.points or self._single_values():
            try:
                self.trial(settings)
            except ValueError as error:
                raise ValueError(f"the space has an invalid point, {_format_settings(settings)}: {error}") from None
        return self

    def _single_values(self) -> Iterator[Settings]:
        # A range is tried at its ends. Combinations are left to the trials: one may fail without ending the search.
        for key, values in self.space.items():
            ends = [values.low, values.high] if isinstance(values, RangeSection) else values
            yield from ({key: value} for value in ends)

    @functools.cached_property
    def points(self) -> list[Settings]:
        """Every point of a grid, the last key of the space changing fastest; none with other samplers."""
        if self.sampler != "grid":
            return []
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]

    @property
    def num_points(self) -> float:
        """Number of points in the space; infinite with a range."""
        sizes = (math.inf if isinstance(values, RangeSection) else len(values) for values in self.space.values())
        return math.prod(sizes)

    @property
    def total(self) -> int:
        """Number of trials in the search."""
        return self.num_trials or len(self.points)

    @functools.cached_property
    def base_path(self) -> Path:
        """The base recipe's file."""
        return CONFIGURATION / "recipe" / f"{self.base}.yaml"

    @functools.cached_property
    def base_recipe(self) -> BaseRecipe:
        """The recipe that all trials have in common."""
        return load_recipe(self.base_path, settings=[self.common])

    def trial(self, settings: Settings) -> BaseRecipe:
        """Return the recipe of a trial, which has a folder in the search's; `ValueError` if settings are not valid."""
        recipe = load_recipe(self.base_path, settings=[self.common, _nested(settings)])
        # `output_dir` is not part of the hash, so the name of the folder can have the hash in it.
        return recipe.model_copy(update={"output_dir": str(self.folder / _folder_name(settings, recipe.hash))})

    def content(self) -> dict[str, Any]:
        """Return all that determines the search: not how many processes share its trials."""
        content = super().content()
        del content["workers"]
        return content | {"base_recipe": self.base_recipe.content()}


# The study: what optuna has tried


def _study_path(recipe: Recipe) -> Path:
    return recipe.folder / "study.db"


def _is_intact(recipe: Recipe) -> bool:
    """Return whether the study is what this search wrote last."""
    path = _study_path(recipe)
    return path.is_file() and read_sealed(path.with_suffix(".sha256")) == f"{checksum(path)}\n"


def _seal_study(recipe: Recipe) -> None:
    """Write the checksum of the study beside it. Called after each change that the search makes to it."""
    path = _study_path(recipe)
    write_text(path.with_suffix(".sha256"), sealed(f"{checksum(path)}\n"))


def _storage(recipe: Recipe) -> optuna.storages.RDBStorage:
    # SQLite, because a line half written when the process is killed makes a journal file unreadable.
    return optuna.storages.RDBStorage(f"sqlite:///{_study_path(recipe)}", engine_kwargs={"poolclass": NullPool})


def _complete_trials(recipe: Recipe, study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials of a study, without those that a kill left with only some of their settings."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.params.keys() == recipe.space.keys()]


def _settings_of(recipe: Recipe, trial: Trial | FrozenTrial) -> Settings:
    return {key: trial.params[key] for key in recipe.space}


# Trials


class Outcome(NamedTuple):
    """The outcome of a trial: its metric, or the message of its failure, and the seconds that it took."""

    metric: float | None
    error: str | None
    seconds: float


def _look_up(result: dict[str, Any], metric: str) -> float | None:
    # An error here ends the search: every other trial would end in it too.
    numbers = {
        key: value
        for key, value in flatten_dict(result).items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }
    if metric not in numbers:
        raise ValueError(f"the result of a trial has no number {metric!r}{nearest(metric, list(numbers))}")
    return numbers[metric]


def run_trial(recipe: BaseRecipe, metric: str) -> Outcome:
    """Run a recipe, or what is left of its run; what it prints goes into a file beside its folder.

    Args:
        recipe: of any task.
        metric: dotted path of a number in its `result.json`.

    Raises:
        ValueError: there is no such number. A run that fails, or whose number is not finite, is an outcome.
    """
    folder, start = recipe.folder.resolve(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    # Another worker may have drawn the same settings: it waits here, and then finds the result.
    with FileLock(folder / TRIAL_LOCK):
        try:
            result = run_logged(recipe_job(recipe))
        except (ValueError, torch.OutOfMemoryError) as error:
            # Settings can cause these. Any other error is no outcome, and ends the search.
            return Outcome(None, f"{error}", round(time.monotonic() - start, 3))
    value = _look_up(result, metric)
    # The result's own seconds also count the time before an interruption.
    seconds = result.get("seconds", round(time.monotonic() - start, 3))
    if value is None or not math.isfinite(value):
        return Outcome(None, f"{metric} is {value}", seconds)
    return Outcome(float(value), None, seconds)


def _distribution(values: list[Any] | RangeSection) -> BaseDistribution:
    if not isinstance(values, RangeSection):
        return CategoricalDistribution(values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _sampler(recipe: Recipe, number: int) -> BaseSampler:
    # Mixed, so that neighbouring seeds and numbers draw nothing alike.
    seed = int(np.random.SeedSequence([recipe.seed, number]).generate_state(1)[0])
    return {"random": RandomSampler, "tpe": TPESampler}[recipe.sampler](seed=seed)


def _next_trials(recipe: Recipe, study: optuna.Study) -> Iterator[Trial | FrozenTrial]:
    """Yield trials to run: those that a killed search left, then new ones, each drawn only when it is asked for."""
    for left in study.get_trials(states=(TrialState.RUNNING,)):
        if left.params.keys() == recipe.space.keys():
            yield left
        else:
            study.tell(left.number, state=TrialState.FAIL)  # to be drawn again, whole
    distributions = {key: _distribution(values) for key, values in recipe.space.items()}
    while (number := len(_complete_trials(recipe, study))) < recipe.total:
        if recipe.sampler == "grid":
            point = recipe.points[number]
            begun = optuna.create_trial(state=TrialState.RUNNING, params=point, distributions=distributions)
            study.add_trial(begun)
            yield study.trials[-1]  # `add_trial` returns nothing
        else:
            study.sampler = _sampler(recipe, number)
            yield study.ask(distributions)


def _notes(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    # The study keeps them: the trials of a grid are `FrozenTrial`s, which store no attributes.
    return study.user_attrs[f"trial {trial.number}"]


def _job(recipe: Recipe, study: optuna.Study, trial: Trial | FrozenTrial) -> tuple[Any, ...]:
    """Return the function that gives a trial's outcome, and its arguments; settings drawn twice are run once."""
    for twin in _complete_trials(recipe, study):
        if twin.state.is_finished() and twin.params == trial.params:
            return Outcome, twin.value, _notes(study, twin)["error"], 0.0
    try:
        return run_trial, recipe.trial(_settings_of(recipe, trial)), recipe.metric
    except ValueError as error:  # values that are valid one by one may contradict each other
        return Outcome, None, str(error), 0.0


def _record(recipe: Recipe, study: optuna.Study, trial: Trial | FrozenTrial, outcome: Outcome, bar: tqdm) -> None:
    # Notes before the state: a trial that is recorded as finished then has them, even if the search is killed here.
    study.set_user_attr(f"trial {trial.number}", outcome._asdict())
    if outcome.error is None:
        study.tell(trial.number, outcome.metric)
        bar.set_postfix_str(f"best {study.best_value:.6g}")
    else:
        study.tell(trial.number, state=TrialState.FAIL)
        bar.write(f"failed: {_format_settings(_settings_of(recipe, trial))}: {outcome.error}")
    bar.update()


def _run_trials(recipe: Recipe, study: optuna.Study) -> None:
    drawn = _next_trials(recipe, study)
    finished = sum(trial.state.is_finished() for trial in _complete_trials(recipe, study))
    bar = tqdm(total=recipe.total, initial=finished, desc=recipe.name, unit="trial")
    with bar, start_workers(min(recipe.workers, recipe.total)) as idle:
        running: dict[Future, tuple[Trial | FrozenTrial, Executor]] = {}
        while True:
            while idle and (trial := next(drawn, None)) is not None:
                # Drawing has written the trial into the study.
                _seal_study(recipe)
                worker = idle.pop()
                running[worker.submit(*_job(recipe, study, trial))] = (trial, worker)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                trial, worker = running.pop(future)
                idle.append(worker)
                _record(recipe, study, trial, future.result(), bar)
                _seal_study(recipe)


# The result


def _row(recipe: Recipe, study: optuna.Study, number: int, trial: FrozenTrial) -> dict[str, Any]:
    settings, notes = _settings_of(recipe, trial), _notes(study, trial)
    row = {"number": number, "settings": settings, **notes, "state": "failed" if notes["error"] else "finished"}
    try:
        run = recipe.trial(settings)
    except ValueError:
        return row | {"recipe_hash": None, "folder": None}
    return row | {"recipe_hash": run.hash, "folder": run.folder.name}


def _ranking(recipe: Recipe, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the finished trials, best first; settings that were drawn several times appear once."""
    # Reversed, so that the first of equal trials is the one that stays.
    first = {trial["recipe_hash"]: trial for trial in reversed(trials) if trial["metric"] is not None}
    sign = 1 if recipe.direction == "minimize" else -1
    return sorted(first.values(), key=lambda trial: (sign * trial["metric"], trial["number"]))


def _data(recipe: Recipe, ranking: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the provenance of the data, by the first trial that read them: one entry, if all trials read the same."""
    data: dict[str, Any] = {}
    for trial in sorted(ranking, key=lambda trial: trial["number"]):
        result = read_result(recipe.folder / trial["folder"])
        if result is None:
            raise ValueError(f"{recipe.folder / trial['folder']} has no result.json any more: start with --restart")
        if "data" in result and result["data"] not in data.values():
            data[trial["folder"]] = result["data"]
    return data


def _table(recipe: Recipe, ranking: list[dict[str, Any]], trials: list[dict[str, Any]]) -> str:
    rows = [
        [*map(_format_value, trial["settings"].values()), f"{trial['metric']:.6g}", f"{trial['seconds']:,.0f}"]
        for trial in ranking[:LONGEST_TABLE]
    ]
    table = markdown_table([*recipe.space, recipe.metric, "seconds"], "l" * len(recipe.space) + "rr", rows)
    failed = [trial for trial in trials if trial["state"] == "failed"]
    shown = f"The best {LONGEST_TABLE} of" if len(ranking) > LONGEST_TABLE else "All"
    note = f"{shown} {len(ranking)} settings with a result, from {len(trials)} trials; {len(failed)} failed."
    return "\n".join([table, "", note])


def _draw_setting(axis: Axes, recipe: Recipe, key: str, trials: list[dict[str, Any]], **style: Any) -> None:
    """Draw the metric of trials, best first, by one setting, with a line through the best at each value."""
    values = recipe.space[key]
    tried = [trial["settings"][key] for trial in trials]
    if isinstance(values, RangeSection):
        axis.set_xscale("log" if values.log else "linear")
    else:
        tried = [values.index(value) for value in tried]
        axis.set_xticks(range(len(values)), [_format_value(value) for value in values])
        axis.set_xlim(-0.5, len(values) - 0.5)
        layout: Any = axis.get_subplotspec()
        if sum(len(_format_value(value)) for value in values) > 48 // layout.get_gridspec().ncols:
            axis.tick_params("x", rotation=90)
        best = {place: trial["metric"] for place, trial in reversed([*zip(tried, trials, strict=True)])}
        axis.plot(sorted(best), [best[place] for place in sorted(best)], **style)
    # What is drawn from a range has no line to stand in the legend.
    label = style.get("label") if isinstance(values, RangeSection) else None
    axis.scatter(tried, [trial["metric"] for trial in trials], alpha=0.6, color=style["color"], label=label)
    axis.set_xlabel(in_words(key))


def draw(recipe: Recipe, measured: dict[str, Any], folder: Path) -> None:
    """Draw the metric of every trial by each setting; nothing of few trials, which the table has.

    Models, if several are tried, have a line each.

    Args:
        recipe: of the search.
        measured: of its result.
        folder: of the picture.
    """
    ranking = _ranking(recipe, measured["trials"])
    if len(ranking) < FEWEST_NUMBERS:
        return
    models: Any = recipe.space.get("model", [])
    several = [key for key, values in recipe.space.items() if isinstance(values, RangeSection) or len(values) > 1]
    settings = [key for key in several if key != "model"] or several
    columns = min(2, len(settings))
    figure, axes = new_figure(math.ceil(len(settings) / columns), columns, sharey=True)
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, key in zip(axes.flat, settings, strict=False):
        if not models or key == "model":
            _draw_setting(axis, recipe, key, ranking, color="#0072B2")
        else:
            for label, style in styles_of(models).items():
                trials = [trial for trial in ranking if trial["settings"]["model"] == label]
                _draw_setting(axis, recipe, key, trials, label=label, **style)
    metric = " ".join(part.replace("_", " ") for part in recipe.metric.removeprefix("metrics.").split("."))
    for axis in axes[:, 0]:
        axis.set_ylabel(better(metric, "lower" if recipe.direction == "minimize" else "higher"))
    if models and settings != ["model"]:
        legend_below(figure, axes)
    title = f"{metric[0].upper()}{metric[1:]} of each trial, by setting"
    save_figure(figure, folder / f"{recipe.name}.png", title, "Lines join the best trials of each value.")


# The search


def _hours_of_trials(recipe: Recipe, done: list[Settings], machine: dict[str, Any]) -> float:
    """Return the hours of the trials of a grid that are not done."""
    if not recipe.points:
        raise ValueError(
            f"sampler: {recipe.sampler} draws trials as it goes, which have no price yet: leave out --teraflops"
        )
    trials = [recipe.trial(point) for point in recipe.points if point not in done]
    return sum(plan_of(trial, **machine)["hours"] for trial in trials)


def plan(
    recipe: Recipe, teraflops: float | None = None, utilisation: float | None = None, devices: int | None = None
) -> dict[str, Any]:
    """Return what the search would do, and how far it is: a line for each trial that is known. Reads no data.

    Arguments and errors are those of `training.tasks.language_modeling.plan`; `hours` are of trials to come.
    """
    check_machine(teraflops, utilisation, devices)
    known: list[FrozenTrial] = []
    if _is_intact(recipe):
        with contextlib.suppress(KeyError):  # the folder is another search's, and `run` will refuse it
            known = _complete_trials(recipe, optuna.load_study(study_name=recipe.hash, storage=_storage(recipe)))
    lines: dict[str, Any] = {f"trial {number}": _format_settings(point) for number, point in enumerate(recipe.points)}
    states = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.RUNNING: "begun"}
    for number, trial in enumerate(known):
        lines[f"trial {number}"] = f"{_format_settings(_settings_of(recipe, trial))}, {states[trial.state]}"
        if trial.value is not None:
            lines[f"trial {number}"] += f", {recipe.metric} {trial.value:.6g}"
    ended = [trial for trial in known if trial.state.is_finished()]
    if teraflops is not None:
        done = [_settings_of(recipe, trial) for trial in ended]
        machine = {"teraflops": teraflops, "utilisation": utilisation, "devices": devices}
        lines["hours"] = round(_hours_of_trials(recipe, done, machine), 3)
    return lines | {"trials": recipe.total, "done": len(ended), "folder": str(recipe.folder), "hash": recipe.hash}


def _search(recipe: Recipe) -> dict[str, Any]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = _study_path(recipe)
    if path.is_file() and not _is_intact(recipe):
        aside = set_aside(path).name
        logger.warning("%s is damaged: kept as %s; trials are drawn again, and what is finished is found", path, aside)
    study = optuna.create_study(
        storage=_storage(recipe), study_name=recipe.hash, direction=recipe.direction, load_if_exists=True
    )
    _seal_study(recipe)
    _run_trials(recipe, study)
    trials = [_row(recipe, study, number, trial) for number, trial in enumerate(_complete_trials(recipe, study))]
    ranking = _ranking(recipe, trials)
    if not ranking:
        raise ValueError(
            f"all {len(trials)} trials failed, the first with: {trials[0]['error']} (mend it and start with --restart)"
        )
    measured = {"best": ranking[0], "trials": trials}
    draw_result(recipe, measured, recipe.folder)
    return {
        **header(recipe),
        "data": _data(recipe, ranking),
        "measured": measured,
        "table": _table(recipe, ranking, trials),
        "claims": [],
    }


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Search, from wherever an earlier start of the same recipe got to.

    Args:
        recipe: what to do.
        restart: move what an earlier search left in the folder aside, its trials with it, and begin again.

    Returns:
        The content of `result.json`; of the earlier one, if the search was already finished.

    Raises:
        ValueError: the folder belongs to another recipe, the results of the trials have no such metric, every trial
            failed, or `accelerate launch` started several processes.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise ValueError(
            f"a search in {state.num_processes} processes would try everything as often: start it without "
            f"`accelerate launch`, and set workers={state.num_processes} for as many trials at once"
        )
    identity = {"hash": recipe.hash, "data": {}, "recipe": recipe.content()}
    return run_once(
        recipe, state, restart, lambda: identity, make=lambda data: _search(recipe), again="searches again"
    )


def summary(result: dict[str, Any], folder: Path) -> str:
    """Return the end of a search in words: its table, failures, and the best settings as command-line arguments."""
    trials, best = result["measured"]["trials"], result["measured"]["best"]
    failed = [f"failed: {_format_settings(t['settings'])}: {t['error']}" for t in trials if t["state"] == "failed"]
    return "\n".join(
        [
            result["table"],
            "",
            *failed,
            f"best: {_format_settings(best['settings'])} ({result['recipe']['metric']} {best['metric']:.6g})",
            f"its run is in {folder / best['folder']}; result.json is in {folder}",
        ]
    )

# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file fixes everything that a run depends on; its `task` names what is done.

A recipe is read strictly. A key that nothing would read, in the file or in a dotted override, is an error that names
the nearest valid key; so is a field of the model that its configuration class does not have. `configuration/README.md`
says what the fields mean, and which units they have.

Two things are registered here: tasks, in `TASKS`, and the models that transformers lacks, by the imports of
`modeling_memory_mosaic` and `training.baselines`.
"""

import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments
from typing_extensions import Self

import modeling_memory_mosaic  # noqa: F401  (registers the model type with AutoConfig)
import training.baselines  # noqa: F401  (registers the baselines that transformers lacks, likewise)
from training.files import read_json
from training.paths import configuration_file, nearest, nearest_file, recipe_file, refuse_system_folder
from training.secrecy import masked, names_secret, refuse_secrets
from training.untrusted import check_yaml, walk, yaml_fault


MOST_LAYERS = 10_000

# The module of each task has a class `Recipe`, functions `plan` and `run` that take one, and `summary`, which takes
# the result and the folder. A task that comparisons train has `training_arguments` too.
TASKS = {
    "language_modeling": "training.tasks.language_modeling",
    "fine_tuning": "training.tasks.fine_tuning",
    "training_curves": "training.experiments.training_curves",
    "position_loss": "training.experiments.position_loss",
    "attention_maps": "training.experiments.attention_maps",
    "samples": "training.experiments.samples",
    "cloze": "training.experiments.cloze",
    "repetition": "training.experiments.repetition",
    "babistories": "training.tasks.babistories",
    "symbols": "training.tasks.symbols",
    "regbench": "training.experiments.regbench",
    "reading": "training.experiments.reading",
    "bound": "training.experiments.bound",
    "bound_recall": "training.experiments.bound_recall",
    "streaming": "training.experiments.streaming",
    "induction": "training.experiments.induction",
    "suite": "training.experiments.suite",
    "join": "training.experiments.join",
    "search": "training.tasks.search",
    "searching": "training.experiments.searching",
    "surprise": "training.experiments.surprise",
    "three_moons": "training.experiments.three_moons",
    "memory_model": "training.tasks.memory_model",
    "memory_models": "training.experiments.memory_models",
    "needles": "training.experiments.needles",
    "memory_bank": "training.experiments.memory_bank",
    "memory_cost": "training.experiments.memory_cost",
}

# Fields of TrainingArguments that a recipe cannot set, because the run decides them, and what to use instead.
RESERVED_ARGUMENTS = {
    "auto_find_batch_size": "the batch is part of the recipe",
    "data_seed": "use `seed`: it also orders the data",
    "dataloader_drop_last": "an epoch is always cut to whole optimizer steps, and validation is always whole",
    "ignore_data_skip": "a resumed run sees the batches that it would have seen",
    "include_num_input_tokens_seen": "tokens are always counted",
    "logging_nan_inf_filter": "a loss that is not finite always ends the run",
    "label_smoothing_factor": "Trainer shifts labels for class names it knows only; others learn to repeat",
    "load_best_model_at_end": "the last checkpoint is the result; result.json shows which was best",
    "output_dir": "use the recipe's own `output_dir`",
    "push_to_hub": "exporting and publishing come after the run",
    "restore_callback_states_from_checkpoint": "a run resumes by itself",
    "resume_from_checkpoint": "a run resumes by itself",
    "save_only_model": "a checkpoint always holds what resuming needs",
    "seed": "use the recipe's own `seed`",
}


class Section(BaseModel):
    """A part of a recipe: no unknown keys, no silent conversions, no changes after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def without_unset(values: dict[str, Any], *later: str) -> dict[str, Any]:
    """Return what a section holds without those later fields that are not set.

    So recipes without them keep the text and the hash of before.
    """
    return {name: value for name, value in values.items() if value or name not in later}


class SourceSection(Section):
    """Where stories come from; the fields are the arguments of `training.text.sources.load_stories`."""

    source: str
    split: str = "train"
    text_field: str = "text"
    separator: str = "<|endoftext|>"
    num_stories: PositiveInt | None = None
    seed: int = 0
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(serialize(self), "validation_fraction")


class WeightedSection(SourceSection):
    """A source of a mixture, and its weight: the share of the tokens that are read of it, of any sum."""

    weight: float = Field(gt=0, allow_inf_nan=False)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `load_stories`, as `SourceSection.model_dump` does."""
        return self.model_dump(exclude={"weight"})


class WindowsSection(Section):
    """How many windows are taken of a text at most, spread evenly over it; by default all."""

    train: PositiveInt | None = None
    validation: PositiveInt | None = None


class FactsSection(Section):
    """Rows of documents with a fact each, which are read alone, and questions about them, among windows of stories.

    `num_rows` are for training and `num_test` are measured; `max_documents` and `num_questions` are of a row, in which
    some are left out if they are too long together.
    """

    num_rows: PositiveInt
    num_test: PositiveInt = 200
    max_documents: PositiveInt = 4
    num_questions: PositiveInt = 4


class DataSection(Section):
    """Training and validation text, cut into windows of `context_length` tokens.

    `mixture` are further sources of a stream of training text, among which that of `train` has `train_weight`.
    """

    train: SourceSection
    validation: SourceSection
    context_length: int = Field(ge=2)
    num_proc: PositiveInt | None = None
    streaming: bool = False
    num_windows: WindowsSection | None = None
    facts: FactsSection | None = None
    mixture: list[WeightedSection] = []
    train_weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_mixture(self) -> Self:
        if bool(self.mixture) != (self.train_weight is not None):
            raise ValueError("`mixture` and `train_weight` belong together: give both, or neither")
        if self.mixture and not self.streaming:
            raise ValueError("a `mixture` is read as a stream: set `streaming` to true")
        if self.mixture and self.num_windows is not None and self.num_windows.train is not None:
            raise ValueError("`num_windows.train` is for one source: leave it out of a `mixture`")
        return self

    def training_sources(self) -> list[tuple[dict[str, Any], float]]:
        """Return the arguments of `load_stories` of each source of training text, with its weight."""
        further = [(source.arguments(), source.weight) for source in self.mixture]
        return [(self.train.model_dump(), self.train_weight or 1.0), *further]

    @model_validator(mode="after")
    def _check_facts(self) -> Self:
        if self.facts is not None and self.streaming:
            raise ValueError("`facts` are rows among those of a data set of known length: set `streaming` to false")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(serialize(self), "num_windows", "facts", "mixture", "train_weight")


class TokenizerSection(Section):
    """Either a ready tokenizer (`pretrained`) or one trained on the training stories (`vocab_size` entries)."""

    pretrained: str | None = None
    vocab_size: PositiveInt | None = None
    max_training_stories: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if (self.pretrained is None) == (self.vocab_size is None):
            raise ValueError("give either `pretrained` or `vocab_size`, and not both")
        if self.pretrained is not None and self.max_training_stories is not None:
            raise ValueError("`max_training_stories` has no effect on a `pretrained` tokenizer: remove it")
        return self


class GenerationSection(Section):
    """What is generated from the finished model, in a clean process, as its last check."""

    prompts: list[str] = []
    max_new_tokens: PositiveInt = 128
    do_sample: bool = True
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class _TrainingFields(Section):
    @model_validator(mode="before")
    @classmethod
    def _read_no_as_a_strategy(cls, values: Any) -> Any:
        # YAML takes the bare word `no` for False, and for these three it is a name.
        if isinstance(values, dict):
            strategies = {f"{kind}_strategy" for kind in ("logging", "eval", "save")}
            return {k: "no" if k in strategies and v is False else v for k, v in values.items()}
        return values

    @model_serializer
    def _dump_set_fields(self) -> dict[str, Any]:
        # A field that was not set holds None, which is not the default of `TrainingArguments`.
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if name in self.model_fields_set and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1")
        return self

    @model_validator(mode="after")
    def _check_reserved_arguments(self) -> Self:
        taken = sorted(self.model_fields_set & RESERVED_ARGUMENTS.keys())
        if taken:
            raise ValueError("; ".join(f"`{name}` cannot be set here: {RESERVED_ARGUMENTS[name]}" for name in taken))
        return self


def _checkable(annotation: Any) -> Any:
    # Numbers and switches are checked here; what else TrainingArguments takes, it checks and converts itself.
    plain = {int, float, bool, type(None)}
    return annotation if set(typing.get_args(annotation) or [annotation]) <= plain else Any


if typing.TYPE_CHECKING:
    TrainingSection = Any  # a type checker cannot know generated fields
else:
    # Generated, so that a key is valid here exactly if the installed TrainingArguments has it.
    TrainingSection = create_model(
        "TrainingSection",
        __base__=_TrainingFields,
        __doc__="Any fields of `transformers.TrainingArguments`, except those of `RESERVED_ARGUMENTS`.",
        **{
            field.name: (_checkable(typing.get_type_hints(TrainingArguments)[field.name]), None)
            for field in dataclasses.fields(TrainingArguments)
            if field.init
        },
    )


class BaseRecipe(Section):
    """What the recipes of all tasks have in common."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    task: str
    output_dir: str | None = None

    @field_validator("output_dir")
    @classmethod
    def _check_output_dir(cls, path: str | None) -> str | None:
        if path is not None:
            refuse_system_folder(path)
        return path

    @functools.cached_property
    def folder(self) -> Path:
        """Where the run writes: `output_dir`, or `runs/NAME`."""
        return Path(self.output_dir or f"runs/{self.name}")

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of all that determines the run; `output_dir` does not."""
        # Sorted, so that the order of keys in a file does not count.
        canonical = json.dumps(self.content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return all that determines the run, fit for JSON."""
        return self.model_dump(exclude={"output_dir"})

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML; reading it gives a recipe of the same hash."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def _model_file(name: str) -> Path:
    """Return the path `configuration/model/NAME.json`; `ValueError` if there is no such file."""
    path = configuration_file("model", name, ".json")
    if path is None:
        raise ValueError(f"unknown model {name!r}{nearest_file('model', name, '.json')}")
    return path


def _refuse_endless_layers(architecture: dict[str, Any]) -> None:
    """Raise `ValueError` for more layers than can be built: a configuration lists the type of each."""
    for name, value in architecture.items():
        if isinstance(value, dict):
            _refuse_endless_layers(value)
        elif name in ("num_hidden_layers", "n_layer") and type(value) is int and value > MOST_LAYERS:
            raise ValueError(f"`{name}` is {value}: no model of over {MOST_LAYERS:,} layers is built here")


def _refuse_unknown(where: str, settings: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a setting that the configuration, or that of a backbone within it, does not have."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    for name, value in settings.items():
        if name not in known:
            keys = [f"{where}.{key}" for key in known]
            raise ValueError(f"unknown key '{where}.{name}'{nearest(f'{where}.{name}', keys)}")
        if isinstance(value, dict) and isinstance(getattr(config, name), PreTrainedConfig):
            _refuse_unknown(f"{where}.{name}", value, getattr(config, name))


@functools.lru_cache  # by its text, as settings cannot be hashed; trainings of several seeds have the same model
def _config_of(architecture: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**json.loads(architecture))


class TrainingRecipe(BaseRecipe):
    """A model to train: what training recipes of all kinds of data have in common."""

    seed: int = Field(default=0, ge=0)
    model: str
    model_args: dict[str, Any] = {}

    @functools.cached_property
    def architecture(self) -> dict[str, Any]:
        """The content of the model's JSON file, with `model_args` put in."""
        content = read_json(_model_file(self.model))
        # `hidden_size` is the standard name of what GPT-2's own file calls `n_embd`: either may be given.
        aliases = AutoConfig.for_model(content["model_type"]).attribute_map
        settings = {aliases.get(name, name): value for name, value in self.model_args.items()}
        merged: Any = OmegaConf.to_container(OmegaConf.merge(content, settings))  # a nested backbone is merged, too
        _refuse_endless_layers(merged)
        return merged

    def build_config(self) -> PreTrainedConfig:
        """Return the model's configuration; `ValueError` if `model_args` has a key that it does not have."""
        try:
            config = copy.deepcopy(_config_of(json.dumps(self.architecture)))
        except StrictDataclassError as error:
            raise ValueError(f"model {self.model!r} with model_args {self.model_args}: {error}") from error
        _refuse_unknown("model_args", self.model_args, config)
        return config

    @functools.cached_property
    def folder(self) -> Path:
        """Where the run writes: `output_dir`, or `runs/NAME/MODEL-seedSEED`."""
        return Path(self.output_dir or f"runs/{self.name}/{self.model}-seed{self.seed}")

    def content(self) -> dict[str, Any]:
        """Return all that determines the run: the recipe, and the architecture that it names."""
        return super().content() | {"architecture": self.architecture}


# How a stream is read ahead changes no number, so that a run may go on with other values.
READING_AHEAD = ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers")


class TextRecipe(TrainingRecipe):
    """A model to train on text for some length: what training and fine-tuning have in common."""

    data: DataSection
    tokens: PositiveInt | None = None
    training: TrainingSection
    generation: GenerationSection = GenerationSection()
    chunked_loss: bool = False

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_unset(serialize(self), "chunked_loss")

    @field_validator("tokens", mode="before")
    @classmethod
    def _read_whole_floats(cls, tokens: Any) -> Any:
        # A budget such as 1e12 is a float in YAML.
        return int(tokens) if isinstance(tokens, float) and tokens.is_integer() else tokens

    def content(self) -> dict[str, Any]:
        """Return all that determines the run; of a stream, not how it is read ahead."""
        content = super().content()
        if self.data.streaming:
            settings = content["training"].items()
            content["training"] = {name: value for name, value in settings if name not in READING_AHEAD}
        return content

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        lengths = [self.tokens, *(getattr(self.training, name) for name in ("max_steps", "num_train_epochs"))]
        if sum(length is not None for length in lengths) != 1:
            raise ValueError("give exactly one of `tokens`, `training.max_steps` and `training.num_train_epochs`")
        if self.data.streaming and self.training.num_train_epochs is not None:
            raise ValueError("a stream has no epochs: with `data.streaming` give `tokens` or `training.max_steps`")
        longest = getattr(self.build_config(), "max_position_embeddings", math.inf)  # an ALiBi model states none
        if self.data.context_length > longest:
            raise ValueError(
                f"`data.context_length` is {self.data.context_length}, but the model {self.model!r} is made for "
                f"{longest}: lower it, or raise `model_args.max_position_embeddings`"
            )
        return self


class Recipe(TextRecipe):
    """A language model to train; see `configuration/README.md` for each field."""

    task: Literal["language_modeling"]
    tokenizer: TokenizerSection

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Self:
        config = self.build_config()
        if self.tokenizer.vocab_size is not None and self.tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"`tokenizer.vocab_size` is {self.tokenizer.vocab_size}, but the model {self.model!r} has embeddings "
                f"for {config.vocab_size} tokens: lower it, or raise `model_args.vocab_size`"
            )
        return self


def leaves(settings: dict[str, Any]) -> Iterator[str]:
    """Yield the parts of a training's folder name: `KEY=VALUE` for each setting, and for `model` the value alone."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield str(value) if key == "model" else f"{key}={value}"


def task_module(task: str) -> ModuleType:
    """Return the module of a task. It is imported only now, so that one task needs no library of another."""
    return importlib.import_module(TASKS[task])


def plan_of(recipe: "BaseRecipe", **machine: Any) -> dict[str, Any]:
    """Return what a recipe amounts to, by the `plan` of its task.

    Args:
        recipe: of any task.
        machine: `teraflops` and other options of a plan; those that are `None` are left out.

    Raises:
        ValueError: an option that the task does not take, or whatever the plan refuses.
    """
    task = task_module(recipe.task)
    options = {name: value for name, value in machine.items() if value is not None}
    unknown = sorted(options.keys() - inspect.signature(task.plan).parameters.keys())
    if unknown:
        names = ", ".join(f"--{name}" for name in unknown)
        raise ValueError(f"the task {recipe.task!r} estimates no cost of a machine: leave out {names}")
    plan: dict[str, Any] = task.plan(recipe, **options)
    return plan


def _unreadable(path: Path, overrides: list[str], error: Exception) -> ValueError:
    # The library quotes what it cannot read, and that may be a secret.
    return ValueError(f"cannot read recipe {str(path)!r} " + masked(f"with overrides {overrides}: {error}"))


def _refuse_secrets_and_resolvers(values: Any, where: str) -> None:
    """Raise `ValueError` for secrets, and for `${...}` with a colon, by which OmegaConf reads the environment.

    A run must depend on nothing but its recipe, and its result, which may be published, must not describe the machine.
    """
    refuse_secrets(values, where)
    for place, _, text in walk(values):
        # What is left when plain references, such as ${seed}, are taken out.
        if isinstance(text, str) and "${" in re.sub(r"\$\{[\w.\[\]]+\}", "", text):
            raise ValueError(
                f"`{place}` in {where} has ${{...}} with more than the key of another setting: a recipe does not read "
                "the environment or anything else of the machine; write the value itself"
            )


@functools.lru_cache  # a comparison loads one file for each of its trainings
def _parsed(path: Path, stamp: tuple[int, int]) -> Any:
    # Before OmegaConf reads it: a few aliases can stand for any amount of values.
    check_yaml(path.read_text(encoding="utf-8"), "it")
    return OmegaConf.load(path)


def _merged(path: Path, settings: list[dict[str, Any]], overrides: list[str]) -> Any:
    """Return what a file, settings and overrides give together, with references to other settings followed."""
    try:
        state = path.stat()
        file = _parsed(path, (state.st_mtime_ns, state.st_size))
        parts = [file, *map(OmegaConf.create, settings), OmegaConf.from_dotlist(overrides)]
        containers = [OmegaConf.to_container(part) for part in parts]
    except RecursionError:
        raise ValueError(f"cannot read recipe {str(path)!r}: it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read recipe {str(path)!r} with its overrides{yaml_fault(error)}") from None
    except (OmegaConfBaseException, TypeError, OSError, ValueError) as error:
        raise _unreadable(path, overrides, error) from None
    for values in containers:  # before they are merged, which follows interpolations
        _refuse_secrets_and_resolvers(values, f"recipe {str(path)!r}")
    try:
        return OmegaConf.to_container(OmegaConf.merge(*parts), resolve=True)
    except (OmegaConfBaseException, TypeError, RecursionError) as error:  # TypeError: nothing merges into a list
        raise _unreadable(path, overrides, error) from None


def _refuse_overrides(overrides: list[str]) -> None:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {masked(override)!r} has no '=': write it as key=value, such as seed=1")
        # By its name alone, before any message could quote its value.
        key = override.partition("=")[0]
        if names_secret(key):
            refuse_secrets({key: None}, "an override")


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the section that a field holds, or those that it may hold."""
    types = typing.get_args(field.annotation) or [field.annotation]
    return [each for each in types if isinstance(each, type) and issubclass(each, BaseModel)]


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for section in _sections(field):
            yield from _dotted_keys(section, f"{prefix}{name}.")


def _without_tags(location: tuple, schema: type[BaseModel]) -> Iterator[str]:
    """Yield the keys that lead to a place in a recipe. pydantic's location also has the tag of a tagged section."""
    parts = list(location)
    while parts:
        part = str(parts.pop(0))
        yield part
        field = schema.model_fields.get(part)
        sections = _sections(field) if field else []
        if field is not None and len(sections) > 1 and parts:
            tag, tag_name = parts.pop(0), str(field.discriminator)
            sections = [each for each in sections if typing.get_args(each.model_fields[tag_name].annotation) == (tag,)]
        if sections:
            schema = sections[0]


def _explain(problem: Mapping[str, Any], schema: type[BaseModel]) -> str:
    key = ".".join(_without_tags(problem["loc"], schema))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, list(_dotted_keys(schema)))}"
    if problem["type"] == "missing":
        return f"missing key {key!r}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, not {problem['input']!r}"


def load_recipe(
    path: str | Path, overrides: list[str] | None = None, settings: list[dict[str, Any]] | None = None
) -> BaseRecipe:
    """Read a recipe of any task.

    Args:
        path: the YAML file, or the name of one in `configuration/recipe`.
        overrides: settings in dotted form, such as `training.learning_rate=1e-3`; they win over the file.
        settings: settings in nested form, such as `{"training": {"learning_rate": 1e-3}}`, the later ones winning
            over the earlier, over the file, and losing to `overrides`.

    Raises:
        ValueError: no such file, not YAML, an override without `=`, an unknown key (with the nearest valid one), a
            value of the wrong type, or values that contradict each other.
    """
    path, overrides = recipe_file(path), list(overrides or [])
    _refuse_overrides(overrides)
    values = _merged(path, settings or [], overrides)
    invalid = f"recipe {str(path)!r} is not valid:\n"
    if not isinstance(values, dict) or "task" not in values:
        raise ValueError(f"{invalid}  missing key 'task'")
    if values["task"] not in TASKS:
        raise ValueError(f"{invalid}  task: {values['task']!r} is none of {', '.join(map(repr, TASKS))}")
    schema = task_module(values["task"]).Recipe
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = [f"  {_explain(problem, schema)}" for problem in error.errors()]
        raise ValueError(invalid + "\n".join(problems)) from None

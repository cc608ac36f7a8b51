# SPDX-License-Identifier: Apache-2.0
"""Training on an artificial language: one training of `regbench`, `induction`, `join` and `suite`.

A language is a module with `VOCAB_SIZE`, a section of settings, `provenance`, `draw_splits`, `tokenizer_of`,
`collator`, `score`, `CHOSEN_BY` and `report`. By each measure of `CHOSEN_BY`, the model of the best evaluation on
validation data is kept, as RegBench chooses the number of epochs; `report` measures these models in the end.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate import PartialState
from pydantic import Field, PositiveInt, model_validator
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from typing_extensions import Self

from training.cost import check_machine, flops_per_token, hours
from training.evaluate import load_causal_lm
from training.export import export_model
from training.loop import LanguageModelTrainer, build_training_arguments
from training.recipe import TrainingRecipe, TrainingSection
from training.result import header
from training.run_folder import run_once
from training.synthetic import automata, bigrams, classes, mad, mqar, recall, story_needles
from training.synthetic.automata import AutomataSection
from training.synthetic.bigrams import InductionSection
from training.synthetic.classes import ClassesSection
from training.synthetic.mad import MadSection
from training.synthetic.mqar import MqarSection
from training.synthetic.recall import RecallSection
from training.synthetic.story_needles import NeedlesSection
from training.tasks import language_modeling


LANGUAGES: dict[str, Any] = {"automata": automata, "induction": bigrams, "recall": recall}
LANGUAGES |= {"mqar": mqar, "mad": mad, "classes": classes, "needles": story_needles}
DataSection = (
    AutomataSection | InductionSection | RecallSection | MqarSection | MadSection | ClassesSection | NeedlesSection
)
# By measure: the folder, within that of the run, of the model of the best evaluation, and whether more is better.
KEPT_FOLDERS = {"accuracy": "best", "loss": "best_loss"}
MORE_IS_BETTER = {"accuracy": True, "loss": False}


def _refuse_other_readers(data: Any, model: str, model_type: str) -> None:
    """Raise `ValueError` for a compressor of what none has to tell, and for another model of what one has to."""
    if getattr(data, "needs_compressor", False) != (model_type == "compressor"):
        raise ValueError(
            f"the model {model!r} is of type {model_type!r}: MAD's task `compression`, and no other, needs a "
            "compressor, such as mosaic-compressor"
        )


class Recipe(TrainingRecipe):
    """A model and an artificial language; see `configuration/README.md` for each field."""

    task: Literal["symbols"]
    data: Annotated[DataSection, Field(discriminator="language")]
    training: TrainingSection
    batch_size: PositiveInt = 50

    @model_validator(mode="after")
    def _check_model_and_training(self) -> Self:
        config, language = self.build_config(), LANGUAGES[self.data.language]
        if config.vocab_size < language.VOCAB_SIZE:
            raise ValueError(
                f"the language {self.data.language!r} has {language.VOCAB_SIZE} tokens, the model {self.model!r} "
                f"embeddings for {config.vocab_size}: raise model_args.vocab_size"
            )
        _refuse_other_readers(self.data, self.model, config.model_type)
        if (self.training.max_steps is None) == (self.training.num_train_epochs is None):
            raise ValueError("give exactly one of `training.max_steps` and `training.num_train_epochs`")
        if self.training.eval_strategy in (None, "no"):
            raise ValueError("set `training.eval_strategy`: the best evaluation decides which model is kept")
        return self


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the recipe's `training` section as `TrainingArguments`, with what the run decides itself."""
    return build_training_arguments(
        recipe.training.model_dump(), recipe.folder, recipe.seed, remove_unused_columns=False
    )


def build_model(recipe: Recipe) -> PreTrainedModel:
    """Build a new model, initialised from the recipe's seed."""
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.build_config())
    model.loss_type = "ForCausalLM"  # transformers infers it from the class name, and not every name fits
    return model


def _first_rows(recipe: Recipe, number: int) -> Any:
    """Return the first training rows; the others are neither drawn nor written."""
    if isinstance(recipe.data, AutomataSection):
        fewer = recipe.data.model_copy(update={"num_automata": min(number, recipe.data.num_automata)})
        return automata.draw_split(fewer, automata.TRAIN).to_list()
    rows = LANGUAGES[recipe.data.language].draw_splits(recipe.data)["train"]
    return [rows[index] for index in range(min(number, len(rows)))]


def _num_rows(recipe: Recipe) -> int:
    if isinstance(recipe.data, AutomataSection):
        return recipe.data.num_automata
    return len(LANGUAGES[recipe.data.language].draw_splits(recipe.data)["train"])


def plan(
    recipe: Recipe, teraflops: float | None = None, utilisation: float | None = None, devices: int | None = None
) -> dict[str, Any]:
    """Return the size and the cost of a training, known without drawing its data.

    Arguments and errors are those of `training.tasks.language_modeling.plan`. Hours count training steps alone, on
    rows as long as the longest of a first batch, which the others are padded to.

    Raises:
        ValueError: more than one device, which one of these small models does not use.
    """
    check_machine(teraflops, utilisation, devices)
    if devices not in (None, 1):
        raise ValueError(f"devices is {devices}, but a training on symbols uses one: leave it out")
    arguments = training_arguments(recipe)
    per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(_num_rows(recipe) / per_step))
    result: dict[str, Any] = {"parameters": language_modeling.num_parameters(recipe), "steps": steps}
    if teraflops is not None:
        config = recipe.build_config()
        rows = _first_rows(recipe, arguments.train_batch_size)
        batch = LANGUAGES[recipe.data.language].collator(recipe.data, config)(rows)
        length = batch["input_ids"].shape[1]
        flops = flops_per_token(config, length) * length * per_step * steps
        result |= {"training_flops": round(flops), "hours": hours(flops, teraflops, utilisation)}
    return result | {"folder": str(recipe.folder), "hash": recipe.hash}


def score(recipe: Recipe, model: PreTrainedModel, split: Any) -> dict[str, Any]:
    """Measure a model on one split in the language's own measures; the model is left as it was."""
    was_training = model.training
    try:
        return LANGUAGES[recipe.data.language].score(model.eval(), split, recipe.batch_size)
    finally:
        model.train(was_training)


def _merit(measure: str, value: float) -> float:
    """Return a number that is greater for a better value, and least for one that is not a number."""
    if math.isnan(value):
        return -math.inf
    return value if MORE_IS_BETTER[measure] else -value


class SymbolTrainer(LanguageModelTrainer):
    """Evaluates in the language's own measures, and keeps the model of the best so far by each that it names."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recipe = recipe

    def measure(self) -> dict[str, float]:
        model: Any = self.model
        scores = score(self._recipe, model, self.eval_dataset)
        # Not by `save_strategy="best"`: it saves checkpoints of the best steps only, so that an interrupted training
        # would go back to one of them. The checkpoints here are those that the recipe asks for.
        history = [entry for entry in self.state.log_history if "eval_accuracy" in entry]
        for measure in LANGUAGES[self._recipe.data.language].CHOSEN_BY:
            # Checkpoints hold the history, so that a resumed training compares with all earlier evaluations.
            earlier = [_merit(measure, entry[f"eval_{measure}"]) for entry in history]
            if _merit(measure, scores[measure]) > max(earlier, default=-math.inf):
                tokenizer = LANGUAGES[self._recipe.data.language].tokenizer_of(self._recipe.data)
                export_model(model, tokenizer, self._recipe.folder / KEPT_FOLDERS[measure], checksums=True)
        return scores


def _kept_model(recipe: Recipe, measure: str, curve: list[dict[str, Any]]) -> PreTrainedModel:
    """Return the model of the best evaluation of a curve, which an earlier session may have written."""
    folder = recipe.folder / KEPT_FOLDERS[measure]
    if not folder.is_dir() and not any(math.isfinite(entry[f"eval_{measure}"]) for entry in curve):
        raise ValueError(
            f"the {measure} on the validation split was never a finite number, so that no model is the best: lower "
            "`training.learning_rate`"
        )
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is missing: an earlier version began this training and kept no model of the best {measure}; "
            f"move {recipe.folder} away, and start again"
        )
    return load_causal_lm(folder)


def _best_evaluations(language: Any, curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the step and the epoch of each model that is kept: `best_step` by accuracy, `best_loss_step` by loss."""
    places: dict[str, Any] = {}
    for measure in language.CHOSEN_BY:
        merits = [_merit(measure, entry[f"eval_{measure}"]) for entry in curve]
        best = curve[merits.index(max(merits))]  # of equals the first, as `SymbolTrainer` keeps it
        places |= {f"{KEPT_FOLDERS[measure]}_{unit}": best[unit] for unit in ("step", "epoch")}
    return places


def _train(recipe: Recipe, arguments: TrainingArguments, data: dict[str, Any]) -> dict[str, Any]:
    language: Any = LANGUAGES[recipe.data.language]
    splits = language.draw_splits(recipe.data)
    model = build_model(recipe)
    trainer = SymbolTrainer(
        model=model,
        args=arguments,
        data_collator=language.collator(recipe.data, model.config),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        recipe=recipe,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(recipe.folder)))
    curve = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    models = {measure: _kept_model(recipe, measure, curve) for measure in language.CHOSEN_BY}
    report = language.report(models, splits, recipe.batch_size)
    return {
        **header(recipe),
        "model": recipe.model,
        "seed": recipe.seed,
        "architecture": recipe.architecture,
        "parameters": language_modeling.num_parameters(recipe),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": max(entry.get("seconds", 0.0) for entry in trainer.state.log_history),
        **report,
        "metrics": _best_evaluations(language, curve) | report["metrics"],
        "learning_curve": [
            {"step": entry["step"]} | {k.removeprefix("eval_"): v for k, v in entry.items() if k.startswith("eval_")}
            for entry in curve
        ],
        "data": data,
    }


def _identity(recipe: Recipe) -> dict[str, Any]:
    data = LANGUAGES[recipe.data.language].provenance(recipe.data)
    return {"hash": recipe.hash, "num_processes": 1, "recipe": recipe.content(), "data": data}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train, or go on where an earlier start stopped; returns the content of `result.json`."""
    arguments = training_arguments(recipe)
    state = PartialState()
    if state.num_processes > 1:
        raise ValueError(
            f"{state.num_processes} processes would share one small model: start this without `accelerate launch`; "
            "the experiments train several models at once with `workers`"
        )
    kept = [KEPT_FOLDERS[measure] for measure in LANGUAGES[recipe.data.language].CHOSEN_BY]
    return run_once(
        recipe, state, restart, lambda: _identity(recipe), lambda data: _train(recipe, arguments, data), kept
    )


def summary(result: dict[str, Any], folder: Path) -> str:
    """Return the end of a training in words."""
    scores = {name: value["accuracy"] for name, value in result["metrics"].items() if isinstance(value, dict)}
    accuracies = ", ".join(f"{name} {accuracy:.4f}" for name, accuracy in scores.items())
    size = f"{result['model']} ({result['parameters']:,} parameters)"
    return f"{size}: accuracy {accuracies}\nthe model of the best accuracy is in {folder / 'best'}"

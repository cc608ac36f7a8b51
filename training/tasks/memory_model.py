# SPDX-License-Identifier: Apache-2.0
"""Training of a memory model in stages: one training of the experiments `memory_models`.

Each stage has objectives with their weights, and may freeze the encoder or start with a new decoder. It goes on from
the model of the stage before, in a folder of its own, so a run resumes within the stage where it was interrupted.
"""

import copy
import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from typing_extensions import Self

from modeling_memory_mosaic import MemoryModelConfig, MemoryModelForCausalLM
from modeling_memory_mosaic.backbones_memory_model import build_decoder
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from training.cost import HashedConfig, check_machine, count_flops, hours
from training.evaluate import load_causal_lm, tokens_and_bytes
from training.export import export_model
from training.figures import draw_stages
from training.files import CHECKSUMS, checksum_of_text
from training.loop import LanguageModelTrainer, build_training_arguments, set_aside_broken_checkpoints
from training.parallel import report_progress
from training.paths import CONFIGURATION
from training.recipe import (
    DataSection,
    TokenizerSection,
    TrainingRecipe,
    TrainingSection,
    leaves,
    load_recipe,
    task_module,
)
from training.result import header, read_result, write_result
from training.run_folder import run_once
from training.tasks import language_modeling
from training.tasks.memory_measures import measure, unigram
from training.tasks.memory_parts import (
    PARTS,
    DecoderSection,
    EncoderSection,
    Part,
    PartSection,
    StageSection,
    Trained,
    set_rates,
    with_adapters,
    without_adapters,
)
from training.text.sources import load_stories
from training.text.tokenizer import load_tokenizer
from training.text.windows import collate_windows


STAGE = "stage.json"  # marks a stage as done
# Added to the seed of a new decoder, so that it does not repeat the one that the encoder was trained with.
NEW_DECODER = 10_000
# Of a folder's name, in characters: longer settings are named by their checksum.
LONGEST_LABEL = 150


class Recipe(TrainingRecipe):
    """A memory model to train; see `configuration/README.md` for each field."""

    task: Literal["memory_model"]
    tokenizer: TokenizerSection | None = None
    data: DataSection
    encoder: EncoderSection | None = None
    decoder: DecoderSection | None = None
    stages: list[StageSection] = Field(min_length=1)
    training: TrainingSection

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without a later field keep the text and the hash of before."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "decoder" or value is not None}

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Self:
        pretrained = self.pretrained_parts
        if (self.tokenizer is None) == (not pretrained):
            raise ValueError(
                f"a pretrained {next(iter(pretrained))} comes with its own tokenizer: set `tokenizer` to null"
                if pretrained
                else "missing key 'tokenizer': only a pretrained part comes with one"
            )
        if pretrained and any(section.recipe for section in self.parts.values()):
            raise ValueError("a part of another recipe reads by that recipe's tokenizer: take both parts pretrained")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        config = self.own_config()
        if not isinstance(config, MemoryModelConfig):
            raise ValueError(f"the model {self.model!r} is a {config.model_type}: name a memory_model")
        if all(section.pretrained is None or section.is_folder for section in self.parts.values()):
            self.build_config()
        if self.training.max_steps is not None or self.training.num_train_epochs is not None:
            raise ValueError(
                "each stage has its `steps`: leave out `training.max_steps` and `training.num_train_epochs`"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are called {names}: give each a name of its own")
        if self.data.streaming:
            raise ValueError("`data.streaming` is not supported: a stage begins where the data begin")
        # A single chunk has no earlier one whose memory it could read; a model without memory needs no other.
        fewest = 1 if config.max_memories == 0 else 2
        chunks = self.data.context_length / config.chunk_length
        if chunks != int(chunks) or chunks < fewest:
            raise ValueError(
                f"`data.context_length` is {self.data.context_length}: it has to be {fewest} or more whole chunks of "
                f"chunk_length={config.chunk_length}"
            )
        return self

    @property
    def parts(self) -> dict[str, PartSection]:
        """The parts that come from elsewhere, by name."""
        given = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: section for name, section in given.items() if section is not None}

    @property
    def pretrained_parts(self) -> dict[str, PartSection]:
        """The parts that are pretrained models, by name."""
        return {name: section for name, section in self.parts.items() if section.pretrained is not None}

    def own_config(self) -> PreTrainedConfig:
        """Return the configuration that `model` and `model_args` describe, whatever the parts come from."""
        return super().build_config()

    def part_config(self, part: Part) -> PreTrainedConfig:
        """Return the configuration of a part that comes from elsewhere; of the encoder's backbone, or the decoder."""
        section = self.parts[part]
        if section.pretrained is not None:
            return section.pretrained_config()
        source = self.part_source(part).build_config()
        return source.encoder if part == "encoder" and isinstance(source, MemoryModelConfig) else source

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the configuration but for encoder and decoder."""
        fields = {k: v for k, v in self.architecture.items() if k not in (*PARTS, "model_type", "architectures")}
        is_pretrained = self.encoder is not None and self.encoder.pretrained is not None
        return fields | (self.encoder.fields if is_pretrained and self.encoder is not None else {})

    def build_config(self) -> PreTrainedConfig:
        """Return the model's configuration; a part from elsewhere has the configuration of that."""
        config = self.own_config()
        if not self.parts or not isinstance(config, MemoryModelConfig):
            return config
        if self.decoder is None and not self.pretrained_parts:
            settings: dict[str, Any] = config.to_dict() | {"encoder": self.part_config("encoder").to_dict()}
            return type(config)(**settings)
        given = {part: self.part_config(part).to_dict() for part in PARTS if part in self.parts}
        # What is new reads the ids of what is given.
        vocab_size = next(iter(given.values()))["vocab_size"]
        new = {part: getattr(config, part).to_dict() | {"vocab_size": vocab_size} for part in PARTS}
        whole: dict[str, Any] = new | given | self.fields
        try:
            return type(config)(**whole)
        except StrictDataclassError as error:
            raise ValueError(f"model {self.model!r} of the parts that are given: {error}") from error

    def part_source(self, part: Part) -> TrainingRecipe:
        """Return the recipe that trains the model of a part; only if that names one."""
        section = self.parts[part]
        assert section.recipe is not None
        name, settings = section.recipe, section.settings
        # As comparisons name it: a training that one of them has finished is found and not repeated.
        label = "-".join(leaves(settings))
        if len(label) > LONGEST_LABEL:  # no file system takes a name of lists of stages
            label = checksum_of_text(json.dumps(settings, sort_keys=True))[:12]
        folder = f"runs/{name}/{'-'.join([*([label] if label else []), f'seed{self.seed}'])}"
        # It learns from the same stories, unless its settings name others.
        data = {split: getattr(self.data, split).model_dump() for split in ("train", "validation")}
        layers = [{"data": data}, settings, {"seed": self.seed, "output_dir": folder}]
        return cast(TrainingRecipe, load_recipe(CONFIGURATION / "recipe" / f"{name}.yaml", settings=layers))

    def encoder_source(self) -> TrainingRecipe:
        """Return the recipe that trains the encoder's model; only if `encoder` names one."""
        return self.part_source("encoder")

    def trained_sources(self) -> list[TrainingRecipe]:
        """Return the recipes whose trained models this one begins with."""
        named = [part for part in PARTS if part in self.parts and self.parts[part].recipe is not None]
        return [self.part_source(part) for part in named if not self.parts[part].untrained]

    def content(self) -> dict[str, Any]:
        content = super().content()
        for part in PARTS:
            section = self.parts.get(part)
            if section is not None and section.recipe is not None:
                content[f"{part}_hash"] = self.part_source(part).hash
            elif section is not None and (made_of := section.made_of()):
                content[f"{part}_made_of"] = made_of
        return content


class MemoryModelTrainer(LanguageModelTrainer):
    """Logs each part of the loss by its name, and measures what the memories hold.

    Args:
        rates (`dict`, *optional*): learning rates of `encoder`, `reader` and `decoder`; by default that of `args`.
    """

    def __init__(self, *args: Any, rates: dict[Trained, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rates = rates or {}
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self._rates:
            whole: Any = self.model if model is None else model
            set_rates(optimizer, whole, self._rates)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        outputs: Any
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for objective in OBJECTIVES:
            if model.training and outputs.get(f"{objective}_loss") is not None:
                self._parts[f"{objective}_loss"].append(outputs[f"{objective}_loss"].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # Gradient accumulation adds up the parts of a step, as it does with the loss.
            steps = self.args.gradient_accumulation_steps
            logs |= {n: round(torch.stack(p).mean().item() * steps, 4) for n, p in self._parts.items()}
            self._parts.clear()
        super().log(logs, start_time)

    def measure(self) -> dict[str, float]:
        model: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        measures = measure(model, self.eval_dataset, self.args.eval_batch_size)
        # A log takes numbers only, and `NAME_by_place` are lists.
        return {name: value for name, value in measures.items() if isinstance(value, float)}


def _stage_folder(recipe: Recipe, stage: StageSection) -> Path:
    return recipe.folder / f"{recipe.stages.index(stage) + 1}-{stage.name}"


def training_arguments(recipe: Recipe, stage: StageSection | None = None) -> TrainingArguments:
    """Return the recipe's `training` section for a stage, by default the first, with what the run decides itself."""
    stage = stage or recipe.stages[0]
    # Not every objective uses every parameter: hidden tokens need no token table.
    settings = {"ddp_find_unused_parameters": True} | recipe.training.model_dump()
    if stage.learning_rate is not None:
        settings["learning_rate"] = stage.learning_rate
    return build_training_arguments(settings, _stage_folder(recipe, stage), recipe.seed, max_steps=stage.steps)


def prepare_tokenizer(recipe: Recipe, state: PartialState) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a run, that of its pretrained part if it has one; see `language_modeling`."""
    parts = recipe.pretrained_parts
    if not parts:
        return language_modeling.prepare_tokenizer(recipe, state)

    def make(recipe: Recipe) -> PreTrainedTokenizerFast:
        tokenizer = load_tokenizer(str(next(iter(parts.values())).pretrained_folder))
        # In training a story follows the end token of the one before; a begin token of its own occurs in no window.
        tokenizer.bos_token = tokenizer.eos_token
        return tokenizer

    return language_modeling.prepare_tokenizer(recipe, state, make)


def _load_part(recipe: Recipe, part: Part) -> Any:
    """Return the trained model that a part comes from, or a new model of the part's configuration."""
    section = recipe.parts.get(part)
    if section is None or section.untrained:
        return build_decoder(getattr(recipe.build_config(), part))
    folder = section.pretrained_folder if section.recipe is None else recipe.part_source(part).folder / "model"
    return load_causal_lm(folder, dtype=torch.float32).cpu()


def _build_from_parts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> MemoryModelForCausalLM:
    """Return a memory model whose decoder is a trained model, or whose encoder is a pretrained one."""
    set_seed(recipe.seed)
    encoder, decoder = _load_part(recipe, "encoder"), _load_part(recipe, "decoder")
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = recipe.fields | tokens
    chunk_length = fields.pop("chunk_length")
    # A memory model gives its whole encoder; its backbone alone is none that `from_backbones` could check.
    has_encoder = isinstance(encoder, MemoryModelForCausalLM)
    base = build_decoder(encoder.config.encoder) if has_encoder else encoder
    model: Any = MemoryModelForCausalLM.from_backbones(base, decoder, chunk_length=chunk_length, **fields)
    if has_encoder:
        model.encoder.load_state_dict(encoder.encoder.state_dict())
    model.loss_type = "ForCausalLM"
    return model


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> MemoryModelForCausalLM:
    """Build a model from the recipe's seed; parts that come from elsewhere have the weights that they have there."""
    if recipe.decoder is not None or recipe.pretrained_parts:
        return _build_from_parts(recipe, tokenizer)
    model = cast(MemoryModelForCausalLM, language_modeling.build_model(recipe, tokenizer))
    if recipe.encoder is not None and not recipe.encoder.untrained:
        source: Any = load_causal_lm(recipe.encoder_source().folder / "model")
        # It was loaded onto the accelerator, where Trainer brings the new model later.
        source.to(model.device)
        # A memory model gives its whole encoder; another model has only what becomes the encoder's backbone.
        if isinstance(source, MemoryModelForCausalLM):
            model.encoder.load_state_dict(source.encoder.state_dict())
        else:
            model.encoder.backbone.load_state_dict(source.base_model.state_dict())
    return model


def begin_stage(model: MemoryModelForCausalLM, stage: StageSection, seed: int) -> None:
    """Set the objectives of a stage, and what of the model it trains; start a new decoder if it asks for one."""
    weights = cast("dict[str, float]", stage.objectives)
    for objective in OBJECTIVES:
        setattr(model.config, f"{objective}_weight", weights.get(objective, 0.0))
    model.freeze_encoder(stage.freeze_encoder)
    model.freeze_decoder(stage.freeze_decoder)
    if stage.new_decoder:
        set_seed(seed + NEW_DECODER)
        model.reset_decoder()


@functools.lru_cache  # models of several seeds, and stages of several models, have the same operations
def _flops_per_window(
    config: HashedConfig, context_length: int, objectives: tuple[tuple[str, float], ...], freezes: tuple[bool, bool]
) -> int:
    """Return the operations of a step on one window."""
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config.config))
    weights: Any = dict(objectives)
    freeze_encoder, freeze_decoder = freezes
    stage = StageSection(
        name="counted", objectives=weights, steps=1, freeze_encoder=freeze_encoder, freeze_decoder=freeze_decoder
    )
    begin_stage(model, stage, seed=0)
    ids = torch.zeros(1, context_length, dtype=torch.long)
    # Both passes are counted: nothing goes back through a frozen encoder.
    return count_flops(lambda: model.train()(ids, labels=ids).loss.backward())


def training_flops(recipe: Recipe) -> list[int]:
    """Return the operations of the matrix products of each stage, counted on one window and a new model."""
    config, flops = HashedConfig.of(recipe.build_config()), []
    for stage in recipe.stages:
        objectives = tuple(sorted(cast("dict[str, float]", stage.objectives).items()))
        freezes = (stage.freeze_encoder, stage.freeze_decoder)
        per_window = _flops_per_window(config, recipe.data.context_length, objectives, freezes)
        windows = language_modeling.windows_per_step(training_arguments(recipe, stage))
        flops.append(per_window * windows * stage.steps)
    return flops


def plan(
    recipe: Recipe,
    teraflops: float | None = None,
    utilisation: float | None = None,
    devices: int | None = None,
) -> dict[str, Any]:
    """Return the size and the cost of a training, known without reading data.

    Arguments and errors are those of `training.tasks.language_modeling.plan`. The number of steps is that of the
    recipe, so that more devices see more tokens.
    """
    check_machine(teraflops, utilisation, devices)
    arguments = training_arguments(recipe)
    available = language_modeling.num_devices(arguments)
    devices = available if devices is None else devices
    per_step = language_modeling.tokens_per_step(recipe, arguments) // available * devices
    operations = [flops // available * devices for flops in training_flops(recipe)]
    stages: dict[str, Any] = {
        f"stage {stage.name}": f"{stage.steps:,} steps, {stage.steps * per_step:,} tokens, {flops:.3e} operations, "
        + ", ".join(f"{weight:g} x {name}" for name, weight in stage.objectives.items())
        for stage, flops in zip(recipe.stages, operations, strict=True)
    }
    if teraflops is not None:
        stages["hours"] = hours(sum(operations), teraflops, utilisation, devices)
    source = {
        part: str(section.pretrained if section.recipe is None else recipe.part_source(cast(Part, part)).folder)
        for part, section in recipe.parts.items()
    }
    sizes = {"parameters": language_modeling.num_parameters(recipe), "tokens_per_step": per_step}
    return sizes | source | stages | {"folder": str(recipe.folder), "hash": recipe.hash}


def _share_done(recipe: Recipe, stage: StageSection, share: float) -> float:
    """Return the share of all steps that is done when this share of a stage is done."""
    before = sum(earlier.steps for earlier in recipe.stages[: recipe.stages.index(stage)])
    return (before + share * stage.steps) / sum(each.steps for each in recipe.stages)


def _is_measure(name: str) -> bool:
    return name == "step" or name.endswith(("loss", "_accuracy", "_exact"))


def _train_stage(
    recipe: Recipe,
    stage: StageSection,
    before: Path | None,
    tokenizer: PreTrainedTokenizerFast,
    windows: dict[str, Any],
    state: PartialState,
) -> dict[str, Any]:
    arguments, folder = training_arguments(recipe, stage), _stage_folder(recipe, stage)
    if state.is_main_process:
        (folder / CHECKSUMS).unlink(missing_ok=True)  # of a stage whose `stage.json` is gone
        # `run_once` checks the folder of the run, which has no checkpoints itself.
        set_aside_broken_checkpoints(folder)
    state.wait_for_everyone()
    model: Any = build_model(recipe, tokenizer) if before is None else load_causal_lm(before)
    begin_stage(model, stage, recipe.seed)
    trainer = MemoryModelTrainer(
        model=with_adapters(model, stage.lora),
        rates=stage.learning_rates,
        args=arguments,
        data_collator=collate_windows,
        train_dataset=language_modeling.whole_steps(windows["train"], arguments, state),
        eval_dataset=windows["validation"],
        report=lambda share: report_progress(recipe.folder, _share_done(recipe, stage, share)),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    model = without_adapters(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    if state.is_main_process:
        export_model(model, tokenizer, folder / "model")
    history = trainer.state.log_history
    return {
        "name": stage.name,
        "objectives": stage.objectives,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": max(entry.get("seconds", 0.0) for entry in history),
        "metrics": measure(model, windows["validation"], arguments.eval_batch_size),
        "learning_curve": [{k: v for k, v in entry.items() if _is_measure(k)} for entry in history],
    }


def _train(recipe: Recipe, state: PartialState, data: dict[str, Any]) -> dict[str, Any]:
    tokenizer = prepare_tokenizer(recipe, state)
    windows = language_modeling.prepare_windows(recipe, tokenizer, state)
    stages: list[Any] = []
    before: Path | None = None
    for stage in recipe.stages:
        folder = _stage_folder(recipe, stage)
        if read_result(folder, STAGE) is None:
            result = _train_stage(recipe, stage, before, tokenizer, windows, state)
            if state.is_main_process:
                write_result(result, folder, ["model"], STAGE)
            state.wait_for_everyone()
        # Read again, so that all processes have it, and a stage of an earlier start is no different.
        stages.append(read_result(folder, STAGE))
        before = folder / "model"
    # From the folder, because an earlier start may have trained the last stage.
    model = load_causal_lm(_stage_folder(recipe, recipe.stages[-1]) / "model")
    if state.is_main_process:
        export_model(model, tokenizer, recipe.folder / "model")
    size = tokens_and_bytes(load_stories(**recipe.data.validation.model_dump()), tokenizer)
    result = {
        **header(recipe),
        "model": recipe.model,
        "seed": recipe.seed,
        "architecture": recipe.build_config().to_dict(),
        "parameters": language_modeling.num_parameters(recipe),
        "steps": sum(stage["steps"] for stage in stages),
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "validation": {"tokens": size[0], "bytes": size[1]},
        "unigram": unigram(windows, model.config.vocab_size),
        "metrics": stages[-1]["metrics"],
        "stages": stages,
        "data": data,
    } | pretrained_provenance(recipe)
    if state.is_main_process:
        draw_stages(result, recipe.folder / "stages.png")
    return result


def pretrained_provenance(recipe: Recipe) -> dict[str, Any]:
    """Return under `pretrained` what identifies the pretrained parts; nothing if there are none."""
    parts = {part: section.provenance() for part, section in recipe.pretrained_parts.items()}
    return {"pretrained": parts} if parts else {}


def _identity(recipe: Recipe, state: PartialState) -> dict[str, Any]:
    return {
        "hash": recipe.hash,
        "num_processes": state.num_processes,
        "recipe": recipe.content(),
        "data": language_modeling.data_provenance(recipe.data),
    } | pretrained_provenance(recipe)


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train all stages, or go on where an earlier start stopped; returns the content of `result.json`.

    The models that parts come from are trained first, if they are not trained yet.
    """
    for source in recipe.trained_sources():
        task_module(source.task).run(source)
    training_arguments(recipe)  # settles devices and processes
    state = PartialState()
    return run_once(
        recipe,
        state,
        restart,
        identity=lambda: _identity(recipe, state),
        make=lambda data: _train(recipe, state, data),
        kept=["model"],
    )


def summary(result: dict[str, Any], folder: Path) -> str:
    """Return the end of a training in words: its stages, what the model does, and where it is."""
    lines = [
        f"{stage['name']} ({stage['steps']:,} steps, {stage['seconds']:,.0f} s): "
        + ", ".join(f"{name} {value:.4f}" for name, value in stage["metrics"].items() if isinstance(value, float))
        for stage in result["stages"]
    ]
    return "\n".join([*lines, f"{result['model']} ({result['parameters']:,} parameters) is in {folder / 'model'}"])

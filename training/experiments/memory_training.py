# SPDX-License-Identifier: Apache-2.0
"""A memory model trained in stages: one training of the experiments `memory_models`.

Each stage has objectives with their weights, and may freeze the encoder or begin a new decoder. It goes on from the
model of the stage before, in a folder of its own, so a run resumes within the stage where it was interrupted.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Literal

import evaluate
import torch
from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure
from pydantic import Field, PositiveInt, model_validator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_memory_mosaic import MemoryModelConfig, MemoryModelForCausalLM
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from modeling_memory_mosaic.layout_memory_model import pack_text
from training import train
from training.checksums import LIST
from training.data import collate_windows, load_stories, source_provenance
from training.evaluate import load_causal_lm, tokens_and_bytes
from training.export import export_model
from training.loop import LanguageModelTrainer, set_aside_broken_checkpoints
from training.parallel import tell_progress
from training.recipe import (
    CONFIGURATION,
    DataSection,
    Section,
    TokenizerSection,
    TrainingRecipe,
    TrainingSection,
    leaves,
    load_recipe,
    task_module,
)
from training.result import header, read_result, write_result
from training.run_folder import claim_folder, only_run_in


METRICS = CONFIGURATION.parent / "training" / "metrics"
STAGE = "stage.json"  # marks a stage as done
# Added to the seed of a new decoder, which had better not begin as the one did that the encoder was trained with.
NEW_DECODER = 10_000


class StageSection(Section):
    """What is trained for so many steps; objectives that are not named have no weight."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    objectives: dict[Literal["causal", "autoencoding", "copy", "blank_copy"], float] = Field(min_length=1)
    steps: PositiveInt
    freeze_encoder: bool = False
    new_decoder: bool = False
    learning_rate: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _something_is_wanted(self):
        if min(self.objectives.values()) <= 0:
            raise ValueError(f"stage {self.name!r}: weights are {self.objectives}, but have to be positive")
        return self


class EncoderSection(Section):
    """Where the encoder comes from: the model that another recipe trains, with the same seed and the same stories.

    `untrained` takes the architecture alone.
    """

    recipe: str
    settings: dict[str, Any] = {}
    untrained: bool = False


class Recipe(TrainingRecipe):
    """A memory model to train; see `configuration/README.md` for each field."""

    task: Literal["memory_model"]
    tokenizer: TokenizerSection
    data: DataSection
    encoder: EncoderSection | None = None
    stages: list[StageSection] = Field(min_length=1)
    training: TrainingSection

    @model_validator(mode="after")
    def _consistent(self):
        config = self.build_config()
        if not isinstance(config, MemoryModelConfig):
            raise ValueError(f"the model {self.model!r} is a {config.model_type}: name a memory_model")
        if self.training.max_steps is not None or self.training.num_train_epochs is not None:
            raise ValueError(
                "each stage has its `steps`: leave out `training.max_steps` and `training.num_train_epochs`"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages are called {names}: give each a name of its own")
        if self.data.streaming:
            raise ValueError("`data.streaming` is not supported: a stage begins where the data begin")
        chunks = self.data.context_length / config.chunk_length
        if chunks != int(chunks) or chunks < 2:
            raise ValueError(
                f"`data.context_length` is {self.data.context_length}: it has to be two chunks or more, of "
                f"chunk_length={config.chunk_length}"
            )
        return self

    def build_config(self) -> PreTrainedConfig:
        """The model's configuration; of a backbone that comes from elsewhere, as it is there."""
        config = super().build_config()
        if self.encoder is None or not isinstance(config, MemoryModelConfig):
            return config
        source = self.encoder_source().build_config()
        own = source.encoder if isinstance(source, MemoryModelConfig) else source
        return type(config)(**config.to_dict() | {"encoder": own.to_dict()})

    def encoder_source(self) -> TrainingRecipe:
        """The recipe that trains the encoder's model."""
        name, settings = self.encoder.recipe, self.encoder.settings
        folder = f"runs/{name}/{'-'.join([*leaves(settings), f'seed{self.seed}'])}"
        # It learns from the same stories.
        data = {split: getattr(self.data, split).model_dump() for split in ("train", "validation")}
        settings = [{"data": data}, settings, {"seed": self.seed, "output_dir": folder}]
        return load_recipe(CONFIGURATION / "recipe" / f"{name}.yaml", settings=settings)

    def content(self) -> dict[str, Any]:
        source = {} if self.encoder is None else {"encoder_hash": self.encoder_source().hash}
        return super().content() | source


class MemoryModelTrainer(LanguageModelTrainer):
    """Logs each part of the loss by its name, and evaluates what the memories hold."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for objective in OBJECTIVES:
            if model.training and outputs.get(f"{objective}_loss") is not None:
                self._parts[f"{objective}_loss"].append(outputs[f"{objective}_loss"].detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            # Gradient accumulation adds the parts of a step up, as it does with the loss.
            steps = self.args.gradient_accumulation_steps
            logs |= {n: round(torch.stack(p).mean().item() * steps, 4) for n, p in self._parts.items()}
            self._parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        with self._meter.paused():
            model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            measures = measure(model, self.eval_dataset, self.args.eval_batch_size)
        metrics = {f"eval_{name}": value for name, value in measures.items() if isinstance(value, float)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def measure(model: MemoryModelForCausalLM, windows: Dataset, batch_size: int) -> dict[str, Any]:
    """What a memory model does on windows, whatever it was trained for; it is left as it was.

    Returns:
        `causal_loss`, and for each way to reconstruct (see `MemoryModelForCausalLM.reconstruct`) `NAME_loss`, both in
        nats a token, `NAME_accuracy`, the share of tokens that are right, `NAME_exact`, the share of chunks that are
        right throughout, and `NAME_by_place`, the accuracy at each place of a chunk.
    """
    was_training = model.training
    model.eval()
    causal, recalled = [], defaultdict(list)
    for start in range(0, len(windows), batch_size):
        rows = [windows[index] for index in range(start, min(start + batch_size, len(windows)))]
        ids = collate_windows(rows)["input_ids"].to(model.device)
        text = pack_text(ids)
        context = model.gather_memories(text)
        logits, _ = model.decode_text(text, context)
        causal.append(_token_losses(logits[:, :-1], ids[:, 1:]).flatten())
        for objective in OBJECTIVES[1:] if model.config.max_memories != 0 else ():
            logits, targets, _ = model.reconstruct(objective, text, context)
            is_right = logits.argmax(-1) == targets
            recalled[objective].append(torch.stack([_token_losses(logits, targets), is_right]).flatten(1, 2))
    model.train(was_training)
    measures: dict[str, Any] = {"causal_loss": torch.cat(causal).mean().item()}
    for objective, parts in recalled.items():
        losses, is_right = torch.cat(parts, dim=1)  # each (chunks, L)
        measures |= {
            f"{objective}_loss": losses.mean().item(),
            f"{objective}_accuracy": is_right.mean().item(),
            f"{objective}_exact": is_right.all(-1).double().mean().item(),
            f"{objective}_by_place": is_right.mean(0).tolist(),
        }
    return measures


def unigram(windows: dict[str, Dataset], vocab_size: int) -> dict[str, float]:
    """What a guess by the frequencies of the training tokens alone reaches on the validation tokens."""
    ids = {split: windows[split].with_format("numpy")["input_ids"][:] for split in ("train", "validation")}
    counts, tokens = Counter(ids["train"].ravel().tolist()), ids["validation"].ravel().tolist()
    found = evaluate.load(str(METRICS / "entropy_ratio")).compute(
        predictions=[0.0],  # of a model; only the guess beside it is asked for
        references=[tokens],
        vocab_size=vocab_size,
        frequencies=[counts[token] for token in range(vocab_size)],
    )
    return {
        "loss": found["unigram_cross_entropy"],
        "accuracy": tokens.count(counts.most_common(1)[0][0]) / len(tokens),
        "entropy_ratio": found["unigram_entropy_ratio"],
    }


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.movedim(-1, 1).float(), targets, reduction="none").double()


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a training would amount to, known without reading data."""
    per_step = train.tokens_per_step(recipe, training_arguments(recipe))
    stages = {
        f"stage {stage.name}": f"{stage.steps:,} steps, {stage.steps * per_step:,} tokens, {flops:.3e} operations, "
        + ", ".join(f"{weight:g} x {name}" for name, weight in stage.objectives.items())
        for stage, flops in zip(recipe.stages, training_flops(recipe), strict=True)
    }
    source = {} if recipe.encoder is None else {"encoder": str(recipe.encoder_source().folder)}
    sizes = {"parameters": train.num_parameters(recipe), "tokens_per_step": per_step}
    return sizes | source | stages | {"folder": str(recipe.folder), "hash": recipe.hash}


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Train from wherever an earlier start got to; returns the content of `result.json`.

    The model that the encoder comes from is trained first, if it is not yet.
    """
    if recipe.encoder is not None and not recipe.encoder.untrained:
        source = recipe.encoder_source()
        task_module(source.task).run(source)
    training_arguments(recipe)  # settles devices and processes
    state = PartialState()
    with only_run_in(recipe.folder, state):
        data = {name: source_provenance(**getattr(recipe.data, name).model_dump()) for name in ("train", "validation")}
        identity = {
            "hash": recipe.hash,
            "num_processes": state.num_processes,
            "recipe": recipe.content(),
            "data": data,
        }
        claim_folder(recipe, identity, state, restart)
        if (finished := read_result(recipe.folder)) is not None:
            return finished
        result = _train(recipe, state) | {"data": data}
        if state.is_main_process:
            draw_stages(result, recipe.folder / "stages.png")
            write_result(result, recipe.folder, ["model"])
        state.wait_for_everyone()
        return read_result(recipe.folder)


def training_arguments(recipe: Recipe, stage: StageSection | None = None) -> TrainingArguments:
    """The recipe's `training` section for one stage, by default the first, with what the run decides itself."""
    stage = stage or recipe.stages[0]
    accelerator = torch.accelerator.is_available()
    # Not every objective uses every parameter: hidden tokens need no token table.
    defaults = {"use_cpu": not accelerator, "dataloader_pin_memory": accelerator, "ddp_find_unused_parameters": True}
    own = {} if stage.learning_rate is None else {"learning_rate": stage.learning_rate}
    return TrainingArguments(
        **defaults | recipe.training.model_dump() | own,
        max_steps=stage.steps,
        output_dir=str(_stage_folder(recipe, stage)),
        seed=recipe.seed,
        data_seed=recipe.seed,
        include_num_input_tokens_seen="all",
        logging_nan_inf_filter=False,
    )


def _stage_folder(recipe: Recipe, stage: StageSection) -> Path:
    return recipe.folder / f"{recipe.stages.index(stage) + 1}-{stage.name}"


def _train(recipe: Recipe, state: PartialState) -> dict[str, Any]:
    tokenizer = train.prepare_tokenizer(recipe, state)
    windows = train.prepare_windows(recipe, tokenizer, state)
    stages, before = [], None
    for stage in recipe.stages:
        folder = _stage_folder(recipe, stage)
        if read_result(folder, STAGE) is None:
            result = _train_stage(recipe, stage, before, tokenizer, windows, state)
            if state.is_main_process:
                write_result(result, folder, ["model"], STAGE)
            state.wait_for_everyone()
        stages.append(read_result(folder, STAGE))
        before = folder / "model"
    model = load_causal_lm(before)
    if state.is_main_process:
        export_model(model, tokenizer, recipe.folder / "model")
    size = tokens_and_bytes(load_stories(**recipe.data.validation.model_dump()), tokenizer)
    return {
        **header(recipe),
        "model": recipe.model,
        "seed": recipe.seed,
        "architecture": recipe.build_config().to_dict(),
        "parameters": train.num_parameters(recipe),
        "steps": sum(stage["steps"] for stage in stages),
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "validation": {"tokens": size[0], "bytes": size[1]},
        "unigram": unigram(windows, model.config.vocab_size),
        "metrics": stages[-1]["metrics"],
        "stages": stages,
    }


def build_model(recipe: Recipe, tokenizer) -> MemoryModelForCausalLM:
    """A new model, initialised from the recipe's seed; its encoder as the other recipe trained it, if one is named."""
    model = train.build_model(recipe, tokenizer)
    if recipe.encoder is not None and not recipe.encoder.untrained:
        source = load_causal_lm(recipe.encoder_source().folder / "model").to(model.device)
        into, trained = model.encoder.backbone, source.base_model
        if isinstance(source, MemoryModelForCausalLM):
            into, trained = model.encoder, source.encoder
        into.load_state_dict(trained.state_dict())
    return model


def _train_stage(
    recipe: Recipe, stage: StageSection, before: Path | None, tokenizer, windows, state
) -> dict[str, Any]:
    arguments = training_arguments(recipe, stage)
    if state.is_main_process:
        (Path(arguments.output_dir) / LIST).unlink(missing_ok=True)  # of a stage whose `stage.json` is gone
        set_aside_broken_checkpoints(Path(arguments.output_dir))
    state.wait_for_everyone()
    model = build_model(recipe, tokenizer) if before is None else load_causal_lm(before)
    begin_stage(model, stage, recipe.seed)
    trainer = MemoryModelTrainer(
        model=model,
        args=arguments,
        data_collator=collate_windows,
        train_dataset=train.whole_steps(windows["train"], arguments, state),
        eval_dataset=windows["validation"],
        tell=lambda share: tell_progress(recipe.folder, _share_done(recipe, stage, share)),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if state.is_main_process:
        export_model(model, tokenizer, _stage_folder(recipe, stage) / "model")
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


def _share_done(recipe: Recipe, stage: StageSection, share: float) -> float:
    """Of all steps, what is done when this share of a stage is."""
    before = sum(earlier.steps for earlier in recipe.stages[: recipe.stages.index(stage)])
    return (before + share * stage.steps) / sum(each.steps for each in recipe.stages)


def _is_measure(name: str) -> bool:
    return name == "step" or name.endswith(("loss", "_accuracy", "_exact"))


def begin_stage(model: MemoryModelForCausalLM, stage: StageSection, seed: int) -> None:
    """Set what the stage trains."""
    for objective in OBJECTIVES:
        setattr(model.config, f"{objective}_weight", stage.objectives.get(objective, 0.0))
    model.freeze_encoder(stage.freeze_encoder)
    if stage.new_decoder:
        set_seed(seed + NEW_DECODER)
        model.reset_decoder()


def draw_stages(result: dict[str, Any], path: Path) -> None:
    """What the memories told and how well the next token was predicted, over all stages, as a PNG."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    loss, told = figure.subplots(1, 2)
    for axes, names in (
        (loss, ["eval_causal_loss"]),
        (told, [f"eval_{name}_accuracy" for name in OBJECTIVES[1:]]),
    ):
        for name in names:
            before, points = 0, []
            for stage in result["stages"]:
                points += [(before + entry["step"], entry[name]) for entry in stage["learning_curve"] if name in entry]
                before += stage["steps"]
                axes.axvline(before, color="lightgrey", zorder=0)
            label = name.removeprefix("eval_").removesuffix("_accuracy").replace("_", " ")
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker="o", markersize=3, label=label)
        axes.set_xlabel("steps; a grey line ends a stage")
        axes.legend(loc="center right")
    loss.set_ylabel("loss of the next token (nats)")
    told.set_ylabel("share of tokens told")
    figure.savefig(path, dpi=120)


def training_flops(recipe: Recipe) -> list[int]:
    """Operations of the matrix products of each stage, forward and backward: counted on one step of a new model."""
    model, flops = AutoModelForCausalLM.from_config(recipe.build_config()), []
    for stage in recipe.stages:
        begin_stage(model, stage, recipe.seed)
        arguments = training_arguments(recipe, stage)
        per_window = _flops_of_window(model, recipe.data.context_length)
        flops.append(per_window * train.windows_per_step(arguments) * stage.steps)
    return flops


def _flops_of_window(model: MemoryModelForCausalLM, num_tokens: int) -> int:
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    # torch's counter does not know what sdpa chooses on CPUs; MATH computes the same by products that it knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.train()(ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def summary(result: dict[str, Any], folder: Path) -> str:
    """The end of a training in words: its stages, what the model does, and where it is."""
    lines = [
        f"{stage['name']} ({stage['steps']:,} steps, {stage['seconds']:,.0f} s): "
        + ", ".join(f"{name} {value:.4f}" for name, value in stage["metrics"].items() if isinstance(value, float))
        for stage in result["stages"]
    ]
    return "\n".join([*lines, f"{result['model']} ({result['parameters']:,} parameters) is in {folder / 'model'}"])

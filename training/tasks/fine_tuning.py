# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with LoRA: a trained model is adapted by few parameters, and exported as an adapter and merged.

A run leaves `adapter/`, which PEFT loads on top of the base, and `merged/`, a model like any other; its `result.json`
also has the loss of the base on the same windows.
"""

import functools
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from typing_extensions import Self

from training import hub
from training.evaluate import load_causal_lm, mean_loss
from training.export import export_model
from training.files import staged_folder, weights_checksums
from training.metrics.mean_loss import perplexity
from training.paths import CONFIGURATION
from training.recipe import Section, TextRecipe, load_recipe
from training.tasks import language_modeling
from training.text.tokenizer import added_tokens, load_tokenizer
from training.untrusted import read_object


plan, summary = language_modeling.plan, language_modeling.summary


class LoraSection(Section):
    """What is adapted, and how much: fields of `peft.LoraConfig`."""

    r: PositiveInt = 8
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] = Field(default=["k_proj", "v_proj", "o_proj"], min_length=1)
    target_parameters: list[str] = []

    @model_validator(mode="after")
    def _check_dropout(self) -> Self:
        if self.target_parameters and self.lora_dropout:
            raise ValueError(
                f"PEFT adapts parameters without dropout only: set `lora_dropout`={self.lora_dropout} to 0"
            )
        return self


class BaseSection(Section):
    """The recipe that trains the base, with these settings."""

    recipe: str
    settings: dict[str, Any] = {}


class Recipe(TextRecipe):
    """A model to adapt; see `configuration/README.md` for each field.

    `model` is the base: an exported folder, or one on the Hub as `USER/NAME@COMMIT`. With `base`, it is the folder
    that this recipe exports, and is trained first if it is not there yet.
    """

    task: Literal["fine_tuning"]
    base: BaseSection | None = None
    lora: LoraSection = LoraSection()

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if self.model_args:
            raise ValueError(f"`model_args` is {self.model_args}, but the base has its architecture: leave it out")
        if self.base_recipe is not None and Path(self.model) != (exported := self.base_recipe.folder / "model"):
            raise ValueError(
                f"`model` is {self.model!r}, but `base` is exported to {exported}: name that, or base=null"
            )
        return self

    @functools.cached_property
    def base_recipe(self) -> TextRecipe | None:
        """The recipe that trains the base, if one is named."""
        if self.base is None:
            return None
        path = CONFIGURATION / "recipe" / f"{self.base.recipe}.yaml"
        return cast(TextRecipe, load_recipe(path, settings=[self.base.settings]))

    @functools.cached_property
    def base_folder(self) -> Path:
        """The folder of the base on this machine; a base on the Hub is downloaded."""
        # Without a look at the disk: `run` trains a base that is not there yet.
        if self.base is not None:
            return Path(self.model)
        if (Path(self.model) / "config.json").is_file():
            return Path(self.model)
        name, _, commit = self.model.partition("@")
        if not commit or name.count("/") != 1:
            raise ValueError(
                f"`model` is {self.model!r}: name an exported folder, or one on the Hub as USER/NAME@COMMIT"
            )
        return hub.download(name, commit)

    @functools.cached_property
    def architecture(self) -> dict[str, Any]:
        """The content of the base's `config.json`, or of the file that its recipe names."""
        if self.base_recipe is not None:
            return self.base_recipe.architecture
        return read_object(self.base_folder / "config.json")

    def build_config(self) -> PreTrainedConfig:
        if self.base_recipe is not None:
            return self.base_recipe.build_config()
        return AutoConfig.from_pretrained(self.base_folder, trust_remote_code=False)

    @functools.cached_property
    def folder(self) -> Path:
        """Where the run writes: `output_dir`, or `runs/NAME/seedSEED`."""
        return Path(self.output_dir or f"runs/{self.name}/seed{self.seed}")

    def content(self) -> dict[str, Any]:
        """Return all that determines the run: the recipe, and the base's weights, or the recipe that trains them."""
        # A base that is not trained yet has no weights, but its recipe determines them.
        base = weights_checksums(self.base_folder) if self.base_recipe is None else self.base_recipe.hash
        return super().content() | {"base_made_of": base}


def _base_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return the base's tokenizer; `ValueError` if it adds tokens to a text by itself."""
    folder = str(recipe.base_folder)
    # Loaded as it is. By default these tokens would be taken away, and nothing would be seen.
    if added := added_tokens(load_tokenizer(folder, keep_added=True)):
        raise ValueError(
            f"the tokenizer of the base {recipe.model!r} adds {' and '.join(added)} of each text by itself, but the "
            "windows of training have none: an adapter made of them would be used on other text than it was trained "
            "on. If the base was trained without, save its tokenizer so: "
            "load_tokenizer(FOLDER).save_pretrained(FOLDER), of training.text.tokenizer"
        )
    return load_tokenizer(folder)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """Return the base with new adapters, initialised from the recipe's seed; nothing else is trained."""
    base = load_causal_lm(recipe.base_folder)
    base.loss_type = "ForCausalLM"  # as for a new model: not every class name says it
    set_seed(recipe.seed)  # after the base is loaded, which must not change what the adapters draw
    names = [name for name, _ in base.named_parameters()]
    for target in recipe.lora.target_parameters:
        if not any(f".{name}".endswith(f".{target}") for name in names):  # PEFT would adapt the rest without a word
            raise ValueError(
                f"`lora.target_parameters` has {target!r}, which {recipe.base_folder} has no parameter of"
            )
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **recipe.lora.model_dump()))


def export(
    recipe: Recipe, model: PeftModel, tokenizer: PreTrainedTokenizerBase, state_dict: dict[str, torch.Tensor]
) -> tuple[Path, PreTrainedModel]:
    """Write `adapter/` and, with the tokenizer, `merged/`; returns the merged folder and model, to be evaluated."""
    with staged_folder(recipe.folder / "adapter") as staged:
        # LoRA leaves the embedding as it is. By default PEFT may ask the Hub whether its size has changed.
        model.save_pretrained(str(staged), save_embedding_layers=False)
    # After the adapter is saved: the model has none once it is merged. The state dict is not needed, because `run`
    # refuses models that are sharded.
    merged = model.merge_and_unload()
    export_model(merged, tokenizer, recipe.folder / "merged")
    return recipe.folder / "merged", merged


def describe(recipe: Recipe, windows: Dataset, batch_size: int) -> dict[str, Any]:
    """Return what was adapted, by how many parameters, and how good the base is on the same windows."""
    base = load_causal_lm(recipe.base_folder)
    loss = mean_loss(base, windows, batch_size)
    # From the file: the model in memory is merged by now, and has no adapter to count.
    adapter = load_file(recipe.folder / "adapter" / "adapter_model.safetensors")
    return {
        "base": {
            "name": recipe.model,
            "weights": weights_checksums(recipe.base_folder),
            "metrics": {"validation_loss": loss, "validation_perplexity": perplexity(loss)},
        },
        "trained_parameters": sum(tensor.numel() for tensor in adapter.values()),
    }


LORA = language_modeling.TrainingMode(_base_tokenizer, build_model, export, describe, ("adapter", "merged"))


def run(recipe: Recipe, restart: bool = False) -> dict[str, Any]:
    """Adapt a model; arguments, result and errors are those of `training.tasks.language_modeling.run`.

    The base is trained first, if its recipe is named and not finished.
    """
    language_modeling.training_arguments(recipe)  # settles devices and processes
    distribution = PartialState().distributed_type
    if distribution not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(f"fine-tuning under {distribution.value} has not been tried: use one process or DDP")
    if recipe.base_recipe is not None:
        language_modeling.run(recipe.base_recipe)
    return language_modeling.run(recipe, restart, LORA)

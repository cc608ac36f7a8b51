# SPDX-License-Identifier: Apache-2.0
"""Parts and stages of a memory model's training: where encoder and decoder come from, and what of them a stage trains.

A part is new, or that of a model that another recipe trains, or a pretrained model: a folder, or one on the Hub. A
stage trains a part whole, at a learning rate of its own, by LoRA, or not at all.
"""

import functools
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from modeling_memory_mosaic import MemoryModelForCausalLM
from training import hub
from training.files import weights_checksums
from training.recipe import Section


Part = Literal["encoder", "decoder"]
PARTS: tuple[Part, Part] = ("encoder", "decoder")
# What `learning_rates` may name.
Trained = Literal["encoder", "reader", "decoder"]


class PartSection(Section):
    """The origin of a part: another recipe's model, with the same seed and stories, or a pretrained model.

    With `untrained` it has the architecture of that model, but not its weights.
    """

    recipe: str | None = None
    settings: dict[str, Any] = {}
    untrained: bool = False
    pretrained: str | None = None
    revision: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without a later field keep the text and the hash of before."""
        values: dict[str, Any] = serialize(self)
        later = {"pretrained": None, "revision": None, "layer": -1, "pooling": "last"}
        is_pretrained = self.pretrained is not None
        return {k: v for k, v in values.items() if is_pretrained or k not in later or v != later[k]}

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if (self.recipe is None) == (self.pretrained is None):
            raise ValueError("give either `recipe`, which trains the model, or `pretrained`, a folder or a name")
        if self.pretrained is None and self.revision is not None:
            raise ValueError("`revision` is of a `pretrained` model on the Hub: leave it out")
        if self.pretrained is not None and self.settings:
            raise ValueError("`settings` are of a `recipe`: a `pretrained` model is taken as it is")
        if self.pretrained is not None and not self.is_folder:
            if self.revision is None or not hub.REPO_ID.fullmatch(self.pretrained):
                raise ValueError(
                    f"`pretrained` is {self.pretrained!r}: name an exported folder, or a model on the Hub as "
                    "USER/NAME with its `revision`"
                )
        return self

    @property
    def is_folder(self) -> bool:
        """Whether `pretrained` names a folder on this machine."""
        return self.pretrained is not None and (Path(self.pretrained) / "config.json").is_file()

    @functools.cached_property
    def pretrained_folder(self) -> Path:
        """The folder of the pretrained model; one on the Hub is downloaded."""
        assert self.pretrained is not None
        return Path(self.pretrained) if self.is_folder else hub.download(self.pretrained, self.revision)

    def pretrained_config(self) -> PreTrainedConfig:
        """Return the configuration of the pretrained model; from the Hub without its weights.

        Raises:
            OSError: if the Hub cannot be reached, or does not give it.
        """
        revision = {} if self.is_folder else {"revision": self.revision}
        try:
            return AutoConfig.from_pretrained(str(self.pretrained), trust_remote_code=False, **revision)
        except OSError as error:
            where = self.pretrained if self.is_folder else f"{self.pretrained} at {self.revision}"
            raise OSError(
                f"cannot read the configuration of {where}: name a folder, or a model on the Hub that this machine "
                "can reach and may read"
            ) from error

    def made_of(self) -> dict[str, Any]:
        """Return what a folder on this machine holds, as its name does not say it."""
        return {} if not self.is_folder or self.untrained else {"weights": weights_checksums(self.pretrained_folder)}

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the pretrained model that a run took."""
        folder = self.pretrained_folder
        commit = {} if self.is_folder else {"commit": folder.name}
        return {"name": self.pretrained, "weights": weights_checksums(folder)} | commit


class EncoderSection(PartSection):
    """The origin of the encoder, and of which states of a pretrained one a memory is made."""

    layer: int = -1
    pooling: Literal["last", "mean"] = "last"

    @model_validator(mode="after")
    def _check_states(self) -> Self:
        chosen = sorted({"layer", "pooling"} & self.model_fields_set)
        if self.pretrained is None and chosen:
            raise ValueError(
                f"`{chosen[0]}` is of a `pretrained` encoder: with `recipe`, set `model_args.encoder_layer` and "
                "`model_args.memory_pooling`"
            )
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the memory model's configuration for a pretrained encoder."""
        return {"encoder_layer": self.layer, "memory_pooling": self.pooling, "encoder_chunk_positions": False}


class DecoderSection(PartSection):
    """The origin of the decoder."""


# What a stage trains


class StageLora(Section):
    """A part that a stage adapts, and how much; the fields after it are those of `peft.LoraConfig`.

    Without `target_modules` all linear layers of the part are adapted, but the head.
    """

    part: Part
    r: PositiveInt = 8
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] = []


class StageSection(Section):
    """A number of training steps with weighted objectives; an objective that is not named has no weight."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    objectives: dict[Literal["causal", "autoencoding", "copy", "blank_copy"], float] = Field(min_length=1)
    steps: PositiveInt
    freeze_encoder: bool = False
    new_decoder: bool = False
    learning_rate: float | None = Field(default=None, gt=0)
    freeze_decoder: bool = False
    learning_rates: dict[Trained, Annotated[float, Field(gt=0)]] = {}
    lora: StageLora | None = None

    @model_serializer(mode="wrap")
    def _leave_out_later_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without a later field keep the text and the hash of before."""
        values: dict[str, Any] = serialize(self)
        later = ("freeze_decoder", "learning_rates", "lora")
        return {name: value for name, value in values.items() if value or name not in later}

    @property
    def frozen(self) -> list[str]:
        """The parts that the stage leaves as they are."""
        return [part for part in PARTS if getattr(self, f"freeze_{part}")]

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if min(self.objectives.values()) <= 0:
            raise ValueError(f"stage {self.name!r}: weights are {self.objectives}, but have to be positive")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if idle := [part for part in self.frozen if part in self.learning_rates]:
            raise ValueError(f"stage {self.name!r}: the {idle[0]} is frozen, and has no learning rate: leave it out")
        if self.lora is not None and self.frozen != [part for part in PARTS if part != self.lora.part]:
            raise ValueError(
                f"stage {self.name!r}: LoRA adapts the {self.lora.part} and trains the reader whole: freeze the other "
                "part, and that one not"
            )
        return self


def adapted_layers(model: MemoryModelForCausalLM, lora: StageLora) -> list[str]:
    """Return the names of the layers that LoRA adapts.

    Raises:
        ValueError: if there are none, or the part is recurrent and none are named.
    """
    part: Any = getattr(model, lora.part)
    body: Any = part.backbone if lora.part == "encoder" else part
    if not lora.target_modules and getattr(body, "_is_stateful", False):
        raise ValueError(
            f"the {lora.part} is a {type(body).__name__}, which reads the weights of some linear layers without "
            "calling them, so that LoRA there would do nothing: name `lora.target_modules`, such as [in_proj]"
        )
    head = body.get_output_embeddings() if lora.part == "decoder" else None
    layers = {
        f"{lora.part}.{name}": module
        for name, module in part.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    ends = tuple(f".{target}" for target in lora.target_modules)
    names = [name for name in layers if not ends or name.endswith(ends)]
    if not names:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(f"the {lora.part} has no layers {lora.target_modules}: its linear layers are {known}")
    return names


def with_adapters(model: MemoryModelForCausalLM, lora: StageLora | None) -> Any:
    """Return a model whose reader is trained whole and one part by LoRA; without `lora`, the model itself.

    Raises:
        ValueError: if no layer is adapted, or the encoder has weights of its own, which would not be trained.
    """
    if lora is None:
        return model
    own = [name for name, _ in model.encoder.named_parameters() if not name.startswith("backbone.")]
    if lora.part == "encoder" and own:
        raise ValueError(
            f"LoRA of the encoder would leave its new weights {own} as they are: train it whole, or take "
            "memory_pooling=last, encoder_chunk_positions=false and no memory_size"
        )
    layers = adapted_layers(model, lora)
    is_transposed = isinstance(model.get_submodule(layers[0]), Conv1D)  # as GPT-2 stores its matrices
    settings = lora.model_dump(exclude={"part", "target_modules"}) | {"fan_in_fan_out": is_transposed}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=layers, modules_to_save=["reader"], **settings)
    return get_peft_model(model, config)


def without_adapters(model: Any) -> MemoryModelForCausalLM:
    """Return the model with its adapters merged into it."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to; PEFT puts its own names in front."""
    found = re.search(r"(?:^|\.)(encoder|reader|decoder)\.", name)
    assert found is not None, name
    return found[1]


def set_rates(optimizer: Optimizer, model: nn.Module, rates: dict[Trained, float]) -> None:
    """Give the parameters of each part their learning rate; parts that are not named keep that of the training."""
    names = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for part in ("encoder", "reader", "decoder"):
            parameters = [parameter for parameter in group["params"] if names[id(parameter)] == part]
            if parameters:
                groups.append(group | {"params": parameters, "lr": rates.get(part, group["lr"])})
    optimizer.param_groups = groups

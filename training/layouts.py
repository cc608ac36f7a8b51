# SPDX-License-Identifier: Apache-2.0
"""What a layout of a model over devices costs each of them: memory, and bytes that a step exchanges.

Counted, not measured: weights and their optimizer exactly, activations of a step by the shapes of one layer, exchanges
by the volume of ring collectives. What the allocator leaves unused and what fragments comes on top.

`python -m training.layouts` prints the table of `configuration/accelerate/README.md`.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicV2Config
from training.cost import AUTOCAST, STATE_BYTES_PER_PARAMETER, activation_bytes


# Gradients are reduced in float32, and sums of key extractors are float32 too.
EXACT_BYTES = 4
# Extractors and values of a layer, of which context parallelism exchanges the last vector of each stretch.
VECTORS_PER_LAYER = 3


@dataclass(frozen=True)
class Layout:
    """How devices share a training; their number is the product of all.

    - `replicas`: copies of the sharded model (`dp_replicate_size`), each with batches of its own,
    - `shards`: devices that shard the model and have batches of their own (`dp_shard_size`),
    - `heads`: devices that share the heads of a batch (`tp_size`),
    - `texts`: devices that share the texts of a batch (`cp_size`); the model is sharded over them too.
    """

    replicas: int = 1
    shards: int = 1
    heads: int = 1
    texts: int = 1

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Return the layout that a text such as `shards=8,texts=2` names.

        Raises:
            ValueError: for other names, and for numbers below 1.
        """
        names = [field.name for field in fields(cls)]
        given = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
        if given.keys() - set(names) or not all(value.isdecimal() and int(value) > 0 for value in given.values()):
            raise ValueError(f"layout {text!r}: give numbers of {', '.join(names)}, such as shards=8,texts=2")
        return cls(**{name: int(value) for name, value in given.items()})

    @property
    def devices(self) -> int:
        return math.prod(asdict(self).values())

    def __str__(self) -> str:
        return " x ".join(f"{number} {name}" for name, number in asdict(self).items() if number > 1) or "one device"


@functools.lru_cache  # by the text of the configuration, as configurations cannot be hashed
def _sizes(config: str) -> dict[str, int]:
    """Count the parameters of a model, of one layer and of what is no layer, without allocating them."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)))
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    whole = model.num_parameters()
    return {"whole": whole, "layer": layer, "rest": whole - layer * model.config.num_hidden_layers}


@functools.lru_cache
def _activations(config: str, rows: int, tokens: int, precision: str) -> tuple[int, int]:
    """Return the bytes that one layer keeps for its backward pass, and those of everything else."""
    values = json.loads(config)
    of_one, of_two = (
        activation_bytes(AutoConfig.for_model(**values | {"num_hidden_layers": number}), rows, tokens, precision)
        for number in (1, 2)
    )
    return of_two - of_one, 2 * of_one - of_two


def _ring(processes: int) -> float:
    """Return the share of a whole that a device sends when all gather it, or scatter its sum."""
    return (processes - 1) / processes


@dataclass(frozen=True)
class Micro:
    """One micro-batch of the devices that share it, and in what precision it is read.

    - `rows`, `tokens`: of the batch,
    - `precision`: of weights and activations in a pass, `"no"` for float32,
    - `checkpointing`: of activations, layer by layer.
    """

    rows: int
    tokens: int
    precision: str = "bf16"
    checkpointing: bool = True

    @property
    def width(self) -> int:
        """Bytes of a number in a pass."""
        return EXACT_BYTES if AUTOCAST[self.precision] is None else 2


def _gathered_pairs(settings: Any, layout: Layout, micro: Micro) -> int:
    """Return the numbers of keys and values of a layer, of whole texts."""
    return 2 * micro.rows * micro.tokens * settings.num_attention_heads * settings.head_dim // layout.heads


def memory_bytes(config: PreTrainedConfig, layout: Layout, micro: Micro) -> dict[str, float]:
    """Return the bytes that a device holds, by what they are for; arguments as for [`price`]."""
    settings: Any = config
    text = config.to_json_string(use_diff=False)
    sizes, layers = _sizes(text), settings.num_hidden_layers
    own, sharers = math.ceil(micro.tokens / layout.texts), layout.shards * layout.texts
    layer, rest = _activations(text, micro.rows, own, micro.precision)
    # All of a layer but its input and its output divides by heads; of a shared text, keys and values do not divide.
    ends = 2 * micro.rows * own * settings.hidden_size * micro.width
    of_layer = (layer - ends) / layout.heads + ends
    of_layer += _gathered_pairs(settings, layout, micro) * micro.width if layout.texts > 1 else 0
    kept = layers * ends / 2 + of_layer if micro.checkpointing else layers * of_layer
    # The next layer is gathered while one computes.
    unsharded = (2 * sizes["layer"] + sizes["rest"]) * micro.width if sharers > 1 else 0
    return {
        "state": STATE_BYTES_PER_PARAMETER * sizes["whole"] / layout.heads / sharers,
        "gathered_weights": unsharded / layout.heads,
        "activations": kept + rest / layout.heads,
    }


def exchanged_bytes(config: PreTrainedConfig, layout: Layout, micro: Micro) -> dict[str, float]:
    """Return the bytes that a device sends, by what they are for; arguments as for [`price`].

    Those of heads are the least that there can be: each projection may sum the gradient of its input by itself.
    """
    settings: Any = config
    layers, width = settings.num_hidden_layers, micro.width
    own, sharers = math.ceil(micro.tokens / layout.texts), layout.shards * layout.texts
    weights = _sizes(config.to_json_string(use_diff=False))["whole"] / layout.heads
    passes = 3 if micro.checkpointing else 2
    # A sum over devices is scattered and gathered: two rings. A layer has two outputs, whose inputs have gradients.
    sums = 2 * 2 * passes * layers * micro.rows * own * settings.hidden_size
    logits = micro.rows * own * settings.vocab_size
    pairs = _gathered_pairs(settings, layout, micro) * ((passes - 1) * width + EXACT_BYTES)
    vectors = VECTORS_PER_LAYER * micro.rows * settings.hidden_size * EXACT_BYTES * passes
    return {
        "weights": weights * (2 * width + EXACT_BYTES) * _ring(sharers),
        "replicas": 2 * weights / sharers * EXACT_BYTES * _ring(layout.replicas),
        "heads": (sums + logits) * width * _ring(layout.heads),
        "texts": layers * (pairs * _ring(layout.texts) + vectors // layout.heads * (layout.texts - 1)),
    }


def price(config: PreTrainedConfig, layout: Layout, micro: Micro) -> dict[str, Any]:
    """Return what a step of one micro-batch costs a device: gigabytes held and sent.

    Args:
        config: of a Memory Mosaic, v1 or v2, with a head for tokens.
        layout: how devices share it. Layers are sharded one by one, and gathered for both passes.
        micro: the batch of the devices that share it.

    Raises:
        ValueError: if heads or a text do not divide so.
    """
    settings: Any = config
    if settings.num_attention_heads % layout.heads or micro.tokens < layout.texts:
        raise ValueError(
            f"{layout} cannot share {settings.num_attention_heads} heads and {micro.tokens} tokens: heads must divide "
            "num_attention_heads, and texts must not outnumber the tokens"
        )
    parts = {"memory": memory_bytes(config, layout, micro), "exchanged": exchanged_bytes(config, layout, micro)}
    gigabytes = {
        f"{kind}_{name}_gb": round(size / 1e9, 2)
        for kind, sizes in parts.items()
        for name, size in {"of_a_device": sum(sizes.values()), **sizes}.items()
    }
    return {"devices": layout.devices, "rows": micro.rows * layout.replicas * layout.shards, **gigabytes}


SIZES = {"1 B": (2048, 18), "10 B": (4096, 48), "70 B": (8192, 86)}
# Of v2 a layer has 6 C^2 in its memories and 3 C times as many in its dense layer, 10.5 C^2 here.
SIZES_V2 = {"1 B": (2048, 12), "10 B": (4096, 32), "70 B": (8192, 62)}
LAYOUTS = {
    "8": Layout(shards=8),
    "64": Layout(shards=64),
    "64, texts shared": Layout(shards=8, texts=8),
    "1,024": Layout(replicas=8, shards=16, texts=8),
    "1,024, heads shared": Layout(replicas=4, shards=16, heads=2, texts=8),
}


def large_configs() -> dict[str, PreTrainedConfig]:
    """Return configurations of about 1, 10 and 70 B parameters, of v1 and of v2, by name."""
    shared: dict[str, Any] = {"vocab_size": 128_256, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    found: dict[str, PreTrainedConfig] = {}
    for name, (width, layers) in SIZES.items():
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 128}
        found[f"v1, {name}"] = MemoryMosaicConfig(**shared | sizes)
    for name, (width, layers) in SIZES_V2.items():
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 128}
        dense = {"intermediate_size": width * 7 // 2, "long_term_delay_range": None}
        found[f"v2, {name}"] = MemoryMosaicV2Config(**shared | sizes | dense)
    return found


def table(context_length: int = 32_768) -> str:
    """Return the memory and the exchanged bytes of each layout and size as a table in Markdown."""
    lines = ["| model | parameters | " + " | ".join(LAYOUTS) + " |", "| --- | ---: |" + " ---: |" * len(LAYOUTS)]
    for name, config in large_configs().items():
        count = _sizes(config.to_json_string(use_diff=False))["whole"] / 1e9
        prices = [price(config, layout, Micro(1, context_length)) for layout in LAYOUTS.values()]
        cells = [f"{each['memory_of_a_device_gb']:,.0f} / {each['exchanged_of_a_device_gb']:,.0f}" for each in prices]
        lines.append(f"| {name} | {count:.1f} B | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

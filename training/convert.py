# SPDX-License-Identifier: Apache-2.0
"""Conversion of the authors' checkpoints (facebookresearch/MemoryMosaics, `Library`) to folders of transformers.

Checkpoints of both of their implementations are read, the regular one (`memory_mosaics.py`) and the fast one
(`memory_mosaics_eft.py`): they name the key extractor differently and compute the same function.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from modeling_memory_mosaic import MemoryMosaicConfig, MemoryMosaicForCausalLM
from training.export import export_model


# The authors' name within a block -> the name within a layer here; of a pair, the regular version comes first.
NAMES = {
    "ln1": "contextual_norm",
    "ln2": "persistent_norm",
    "attn": "contextual_memory",
    "pmem": "persistent_memory",
    "k_featurizer.conv": "k_proj",
    "leaky_average.linear": "k_proj",
    "v_featurizer.linear": "v_proj",
    "c_proj": "o_proj",
    "leaky_key_beta": "key_leak",
    "leaky_average.leaky_beta_w_under": "key_leak",
    "kernel_beta": "key_scale",
    "value_beta": "value_scale",
    "v_featurizer.coef": "value_mix",
    "pmem.M_k0": "slot_keys",
    "pmem.M_v0": "slot_values",
}
TOP_NAMES = {"emb.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
# Options that change the function, with the one value that is supported here.
SUPPORTED_OPTIONS = {
    "pmem_count": 1,
    "pre_ln": True,
    "attn_only": False,
    "k_fe_type": "linearconv",
    "v_fe_type": "lowrlinearconv",
    "k_kernel_size": 1,
    "v_kernel_size": 2,
    "v_shift": 1,
    "v_leaky": False,
}
# Defaults of the authors' classes, for arguments a checkpoint does not mention.
DEFAULT_ARGS = {
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "pmem_size": 2688,
    "block_size": 512,
    "ic_dropout": 0.05,
    "hd_dropout": 0.05,
    "bias": False,
    "weight_tying": True,
}
# Arguments that have to be whole numbers, and those that have to be shares.
SIZES = ("n_embd", "n_head", "n_layer", "pmem_size", "block_size", "vocab_size")
SHARES = ("ic_dropout", "hd_dropout")


def _show(value: Any) -> str:
    if type(value) is int and value.bit_length() > 64:
        return "a number of over 64 bits"  # one of thousands of digits cannot be written out
    shown = repr(value) if type(value) in (bool, int, float, str, type(None)) else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def check_model_args(model_args: Any) -> None:
    """Raise `ValueError` unless the arguments that matter are plain values that the authors' code takes."""
    if not isinstance(model_args, dict):
        raise ValueError(
            f"The checkpoint's arguments are a {type(model_args).__name__}, not a dict of values by name."
        )
    for name, value in model_args.items():
        # By its type, because True is an int to `isinstance`.
        if name in SIZES and (type(value) is not int or value < 1):
            raise ValueError(f"Argument {name} of this checkpoint is {_show(value)}: it has to be a whole number.")
        if name in SHARES and (type(value) not in (int, float) or not 0 <= value < 1):
            raise ValueError(f"Argument {name} of this checkpoint is {_show(value)}: it has to be from 0 to below 1.")
        switches = {*SUPPORTED_OPTIONS, "bias", "weight_tying"}
        if name in switches and type(value) not in (bool, int, str):
            raise ValueError(f"Option {name} of this checkpoint is {_show(value)}: it has to be a plain value.")


def convert_model_args(model_args: dict[str, Any]) -> MemoryMosaicConfig:
    """Return the configuration that the authors' arguments describe.

    Raises:
        ValueError: an option changes the function in a way that this package does not support, or `vocab_size` is
            missing.
    """
    check_model_args(model_args)
    for option, supported in SUPPORTED_OPTIONS.items():
        value = model_args.get(option, supported)
        if value != supported:
            raise ValueError(f"Option {option}={value!r} of this checkpoint is not supported: only {supported!r} is.")
    if "vocab_size" not in model_args:
        raise ValueError("The checkpoint's arguments do not say its vocab_size: pass it in `model_args`.")
    args = DEFAULT_ARGS | model_args
    if args["n_embd"] % args["n_head"]:
        raise ValueError(f"n_embd is {args['n_embd']}, no multiple of n_head={args['n_head']}.")
    return MemoryMosaicConfig(
        vocab_size=args["vocab_size"],
        hidden_size=args["n_embd"],
        num_hidden_layers=args["n_layer"],
        num_attention_heads=args["n_head"],
        num_persistent_slots=args["pmem_size"],
        max_position_embeddings=args["block_size"],
        attention_dropout=args["ic_dropout"],
        hidden_dropout=args["hd_dropout"],
        use_bias=bool(args["bias"]),
        tie_word_embeddings=bool(args["weight_tying"]),
    )


def _fault(tensor: Any) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"is {_show(tensor)}, no tensor"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        return f"is of {tensor.dtype}, {tensor.layout} on {tensor.device}, where floating-point numbers are needed"
    # A view can have any number of elements over a few stored numbers.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {tuple(tensor.shape)}, for which too few numbers are stored"
    if not tensor.isfinite().all():
        return "has numbers that are not finite"
    return None


def check_state_dict(state_dict: Any) -> None:
    """Raise `ValueError` unless this is a dict of finite dense tensors by name, each with all its numbers stored."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise ValueError(f"The checkpoint's model is a {type(state_dict).__name__}, not a dict of tensors by name.")
    for name, tensor in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(f"A parameter of this checkpoint is named {_show(name)}: names are texts.")
        fault = _fault(tensor)
        if fault:
            raise ValueError(f"Parameter {_show(name)} of this checkpoint {fault}: it is damaged, or something else.")


def refuse_sizes_without_parameters(state_dict: dict[str, torch.Tensor], model_args: dict[str, Any]) -> None:
    """Raise `ValueError` for sizes that these parameters cannot have, before a model of these sizes is built."""
    numbers = sum(tensor.numel() for tensor in state_dict.values())
    for name in SIZES:
        value = model_args.get(name, DEFAULT_ARGS.get(name, 1))
        # No parameter depends on the length of a block, and each layer has parameters of its own.
        most = 2**31 if name == "block_size" else len(state_dict) if name == "n_layer" else numbers
        if value > most:
            raise ValueError(f"{name} is {_show(value)}, but the {len(state_dict)} parameters hold {numbers} numbers.")


def convert_name(name: str) -> str | None:
    """Return the name here of one of the authors' parameters; `None` for the second name of a shared one."""
    name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    if match := re.fullmatch(r"ln_out\.(weight|bias)", name):
        return f"model.norm.{match[1]}"
    match = re.fullmatch(r"blocks\.(\d{1,6})\.(ln1|ln2|attn|pmem)\.(.+)", name)
    if match is None:
        raise ValueError(f"Unknown parameter {_show(name)}: not a Memory Mosaic of the authors' Library.")
    index, part, rest = match.groups()
    # The fast version registers one leak under two names.
    if rest == "leaky_average.leaky_beta_u_under":
        return None
    layer = f"model.layers.{index}.{NAMES[part]}"
    if rest in NAMES:
        return f"{layer}.{NAMES[rest]}"
    stem, _, kind = rest.rpartition(".")
    if kind not in ("weight", "bias") or (stem and stem not in NAMES):
        raise ValueError(f"Unknown parameter {_show(name)}: its option is not supported.")
    return f"{layer}.{NAMES[stem]}.{kind}" if stem else f"{layer}.{kind}"


def store_tied_matrix_once(converted: dict[str, torch.Tensor]) -> None:
    """Keep a tied matrix, which may come under either name or both, as the embedding alone."""
    head = converted.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, converted.setdefault("model.embed_tokens.weight", head)):
        raise ValueError(
            "The head and the embedding of this checkpoint differ, but its arguments say that they are tied: pass "
            "weight_tying=False in `model_args`."
        )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def check_parameters(config: MemoryMosaicConfig, converted: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless names and shapes of the parameters are those of the configuration."""
    with torch.device("meta"):
        expected = {name: p.shape for name, p in MemoryMosaicForCausalLM(config).named_parameters()}
    shapes = {name: tensor.shape for name, tensor in converted.items()}
    if expected != shapes:
        wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        details = ", ".join(f"{n}: {_shape(shapes.get(n))} instead of {_shape(expected.get(n))}" for n in wrong[:5])
        raise ValueError(f"{len(wrong)} parameters do not fit the checkpoint's arguments. {details}")


def convert_authors_state_dict(
    state_dict: dict[str, torch.Tensor], model_args: dict[str, Any]
) -> tuple[MemoryMosaicConfig, dict[str, torch.Tensor]]:
    """Convert the authors' parameters and arguments to a configuration and parameters of [`MemoryMosaicForCausalLM`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): of their `StackAssoMem`, regular or fast version; prefixes left by
            `torch.compile` and DDP are removed. Gradients under the same names convert as well.
        model_args (`dict[str, Any]`): arguments of their constructor or training script.

    Raises:
        ValueError: this package does not support an option or a parameter, or shapes contradict the arguments.
    """
    check_state_dict(state_dict)
    check_model_args(model_args)
    refuse_sizes_without_parameters(state_dict, model_args)
    config = convert_model_args(model_args)
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in state_dict.items():
        ours = convert_name(name)
        if ours is None:
            continue
        if ours in converted:
            raise ValueError(f"Two parameters of this checkpoint, {_show(name)} among them, would become {ours}.")
        if ours.endswith("k_proj.weight") and tensor.shape[2:].numel() == 1:
            tensor = tensor.reshape(tensor.shape[:2])  # their Conv1d of kernel size 1
        elif ours.endswith(("slot_keys", "slot_values")):
            tensor = tensor.squeeze(0)  # (1, H, N, D) to (H, N, D)
        converted[ours] = tensor
    if config.tie_word_embeddings:
        store_tied_matrix_once(converted)
    check_parameters(config, converted)
    return config, converted


def read_checkpoint(path: Path) -> Any:
    """Read what `torch.save` has written to a file, if that is tensors and plain values.

    Raises:
        ValueError: the file is damaged, compressed or of torch before 1.6, or would run code when it is loaded.
            Torch's own message, which advises to load it all the same, is not shown.
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            size = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ValueError(
            f"{path} is not a whole file of `torch.save`: get it again, or save it by a torch of today."
        ) from None
    # `torch.save` does not compress, so the parts are never larger than the file.
    if packed or size > path.stat().st_size:
        raise ValueError(f"{path} holds more than it has bytes, which `torch.save` never writes: do not trust it.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f"it holds {code[1]}" if code else "it is damaged, or holds something else"
        raise ValueError(f"{path} is not a checkpoint of tensors and plain values alone: {holds}.") from None


def convert_checkpoint(checkpoint: Path, output: Path) -> MemoryMosaicForCausalLM:
    """Convert the authors' training file (`ckpt.pt`) to a folder for `from_pretrained(trust_remote_code=True)`.

    The file is unpickled by `torch.load(weights_only=True)`: tensors and plain values, no code.

    Raises:
        ValueError: the file is damaged, or holds anything else or a Memory Mosaic that this package does not support,
            or the output folder is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: name a folder that does not exist yet.")
    content = read_checkpoint(checkpoint)
    missing = [key for key in ("model", "model_args") if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(
            f"{checkpoint} has no {' and no '.join(missing)}: not a training file of the authors' Library."
        )
    config, state_dict = convert_authors_state_dict(content["model"], content["model_args"])
    model: Any = MemoryMosaicForCausalLM(config)  # a checker takes attributes of modules for tensors
    # A tied head is not among the parameters: `tie_weights` makes it the embedding.
    model.load_state_dict(state_dict, strict=not config.tie_word_embeddings)
    model.tie_weights()
    export_model(model, None, output)
    return model

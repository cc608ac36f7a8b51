# SPDX-License-Identifier: Apache-2.0
"""The cost of training: operations and memory of a step, counted before it is taken, and the rate of a device.

Counting needs neither the memory nor the device of the run: it computes with `FakeTensorMode`, whose tensors have
shapes and no contents. A model of 124 M parameters takes seconds.

Operations are those of matrix products, in forward and backward pass, as utilisation (MFU) is defined: no elementwise
steps, nothing that gradient checkpointing computes again, and causal attention in full, though kernels skip the half
of it that the mask removes.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import modeling_memory_mosaic  # noqa: F401  (registers the model type with AutoConfig)


# Weights, gradients and the two moments of AdamW, four bytes each: they stay in float32 under bfloat16 autocast.
STATE_BYTES_PER_PARAMETER = 16
# The backward pass of a matrix product is two such products.
FORWARD_AND_BACKWARD = 3
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_UTILISATION = 0.4


def _lstm_flops(inputs: Any, *weights: Any, out_shape: Any, **kwargs: Any) -> int:
    """Return the operations of one layer by the shapes of its inputs `(T, B, C)` and of its two matrices."""
    return 2 * math.prod(inputs[:2]) * sum(math.prod(shape) for shape in weights[:2])


# Of oneDNN, on CPUs, which torch's counter does not know either.
LSTM_FLOPS = {torch.ops.aten.mkldnn_rnn_layer: _lstm_flops}


def count_flops(compute: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products of a computation, which is done once."""
    # torch's counter does not know `_scaled_dot_product_flash_attention_for_cpu`, which sdpa would choose here; MATH
    # computes the same by two matrix products that it knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=LSTM_FLOPS) as counter:
        compute()
    return counter.get_total_flops()


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a new causal language model that is whole: by `from_config`, DeepSpeed's ZeRO-3 would shard it."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = model_class(config)
    return model


def _training_model(config: PreTrainedConfig) -> PreTrainedModel:
    model = new_model(config).train()
    model.loss_type = "ForCausalLM"  # as `training.tasks.language_modeling.build_model` does
    return model


def _counted_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model for tensors without numbers, by which experts could not choose their tokens."""
    model = _training_model(config)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._can_set_experts_implementation():
            part.set_experts_implementation("batched_mm")
    return model


@dataclasses.dataclass(frozen=True)
class HashedConfig:
    """A configuration by its text, as configurations themselves cannot be hashed: what caches take."""

    text: str
    config: PreTrainedConfig = dataclasses.field(compare=False)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "HashedConfig":
        return cls(config.to_json_string(use_diff=False), config)


@functools.lru_cache
def _forward_flops(config: HashedConfig, context_length: int) -> int:
    with FakeTensorMode():
        model = _counted_model(copy.deepcopy(config.config))
        ids = torch.zeros(1, context_length, dtype=torch.long)
        with torch.no_grad():
            return count_flops(lambda: model(input_ids=ids, labels=ids, use_cache=False))


def flops_per_token(config: PreTrainedConfig, context_length: int) -> float:
    """Return the floating-point operations of training on one token, forward and backward.

    Args:
        config: of any causal language model.
        context_length (`int`): tokens per sequence; attention costs more per token in a longer one.
    """
    flops = _forward_flops(HashedConfig.of(config), context_length)
    return FORWARD_AND_BACKWARD * flops / context_length


def _autocast_dtype(precision: str) -> torch.dtype | None:
    if precision not in AUTOCAST:
        raise ValueError(f"cannot estimate the cost in precision {precision!r}: use one of {', '.join(AUTOCAST)}")
    return AUTOCAST[precision]


def saved_bytes(model: PreTrainedModel, ids: torch.Tensor, precision: str = "no") -> int:
    """Return the bytes that autograd keeps of one forward pass with labels, without the parameters themselves.

    Args:
        model: in training mode.
        ids (`torch.Tensor` of shape `(B, T)`): token ids, which are the labels too.
        precision (`str`): `"no"`, or autocast to `"bf16"` or `"fp16"`.
    """
    parameters = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # held, so that no other storage takes its address
        return tensor

    dtype = _autocast_dtype(precision)
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if dtype is not None:
        autocast = torch.autocast(ids.device.type, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def _dropout_with_mask(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    # Dropout as GPUs compute it: it keeps its mask, one byte a number.
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _GpuKernels(TorchFunctionMode):
    """Makes a forward pass of fake tensors on the CPU keep for the backward pass what a GPU keeps."""

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if function is F.scaled_dot_product_attention:
            options["dropout_p"] = 0.0  # else the CPU leaves its fused kernel and keeps all T x T weights
            if options.get("attn_mask") is not None:
                # The library spells causality out because it cannot ask fake tensors whether anything is padded.
                options |= {"attn_mask": None, "is_causal": True}
        if function is F.dropout:
            return _dropout_with_mask(*arguments, **options)
        return function(*arguments, **options)


def activation_bytes(
    config: PreTrainedConfig,
    batch_size: int,
    context_length: int,
    precision: str = "no",
    checkpointing: bool = False,
    checkpointing_kwargs: dict[str, Any] | None = None,
) -> int:
    """Return the bytes that one micro-batch keeps for its backward pass on one device, if that is a GPU.

    On a GPU, sdpa draws its dropout again in the backward pass and keeps no weights; other dropout keeps one byte a
    number. The CPU keeps more of both. The peak is higher, by the gradients that are being computed (the largest is
    that of the logits, 4 bytes x tokens x vocabulary) and by what the allocator leaves unused. `torch.compile` fuses
    steps and keeps less.

    Args:
        config: of any causal language model.
        batch_size (`int`): sequences of one micro-batch on one device.
        context_length (`int`): tokens per sequence.
        precision (`str`): `"no"` for float32, or autocast to `"bf16"` or `"fp16"`, whose copies of the weights count.
        checkpointing (`bool`): of gradients; then the inputs of all layers are kept, and everything of the one layer
            that is being computed again.
        checkpointing_kwargs (`dict`, *optional*): `activation_checkpointing_kwargs` of the training. What `offload`
            moves away is counted as if it stayed.
    """
    with FakeTensorMode():
        model = _counted_model(copy.deepcopy(config))
        ids = torch.zeros(batch_size, context_length, dtype=torch.long)
        with _GpuKernels():
            everything = saved_bytes(model, ids, precision)
            if not checkpointing:
                return everything
            options = dict(checkpointing_kwargs or {})
            options.pop("offload", None)
            every = options.pop("every_n_layers", 1)
            model.activation_checkpointing_enable(options or None, every_n_layers=every)
            inputs = saved_bytes(model, ids, precision)
    return inputs + (everything - inputs) // math.ceil(config.num_hidden_layers / every)


def check_machine(teraflops: float | None, utilisation: float | None, devices: int | None) -> None:
    """Raise `ValueError` for a rate, a share or a number that no machine has, or a share of an unknown rate."""
    if devices is not None and devices < 1:
        raise ValueError(f"devices is {devices}: give the number of devices that share the work, at least 1")
    if utilisation is not None and teraflops is None:
        raise ValueError(f"utilisation is {utilisation}, but a share of what? Give teraflops, the peak of one device")
    if teraflops is not None and not teraflops > 0:
        raise ValueError(f"teraflops is {teraflops}: give the peak rate of one device, such as 312 of an A100 in bf16")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}: give a share of the peak above 0 and at most 1, such as 0.4")


def hours(flops: float, teraflops: float, utilisation: float | None = None, devices: int = 1) -> float:
    """Return the wall-clock hours of a training, to a thousandth.

    Args:
        flops (`float`): of the whole training, forward and backward.
        teraflops (`float`): peak rate of one device in the training precision, in 10^12 operations a second.
        utilisation (`float`, *optional*): share of the peak that training reaches, above 0 and at most 1; 0.4 by
            default.
        devices (`int`): that share the work.

    Raises:
        ValueError: see [`check_machine`].
    """
    check_machine(teraflops, utilisation, devices)
    utilisation = DEFAULT_UTILISATION if utilisation is None else utilisation
    return round(flops / (teraflops * 1e12 * utilisation * devices) / 3600, 3)


def interleaved_seconds(
    steps: Mapping[str, Callable[..., Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    prepared: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, float]:
    """Return the median seconds of each of several steps, which are timed in turn.

    A machine whose speed drifts then slows all of them alike. Every second round goes through them backwards, so that
    none is always behind the same other. Each is done once before, untimed.

    Args:
        steps: by name.
        rounds: how often each is timed.
        clock: returns seconds.
        prepared: by the same names, what makes the argument of a step, untimed and each time again; none by default.
    """

    def arguments(name: str) -> tuple[Any, ...]:
        return () if prepared is None else (prepared[name](),)

    for name, step in steps.items():
        step(*arguments(name))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            given = arguments(name)
            start = clock()
            steps[name](*given)
            seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _training_step(config: PreTrainedConfig, batch_size: int, context_length: int) -> Callable[[], None]:
    model = _training_model(config)
    optimizer = torch.optim.AdamW(model.parameters())
    # A generator of its own: what training draws must not depend on a measurement.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, context_length), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return step


def training_step_seconds(
    configs: Mapping[str, PreTrainedConfig], batch_size: int, context_length: int, rounds: int
) -> dict[str, float]:
    """Return the seconds that a training step of each model takes beside the others, on one thread of the CPU.

    A step is a forward and a backward pass of random tokens and a step of AdamW.

    Args:
        configs: of causal language models, by name.
        batch_size: sequences of a step.
        context_length: tokens per sequence.
        rounds: how often each model is timed, in turn; the median counts.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Weights and dropout are drawn at random, which must not change what is drawn later.
        with torch.random.fork_rng():
            steps = {name: _training_step(config, batch_size, context_length) for name, config in configs.items()}
            return interleaved_seconds(steps, rounds)
    finally:
        torch.set_num_threads(threads)


def _rate_of_products(device: torch.device, dtype: torch.dtype) -> float:
    size = 512 if device.type == "cpu" else 8192
    # A generator of its own: what training draws must not depend on a measurement.
    draw = functools.partial(torch.randn, size, size, generator=torch.Generator(device).manual_seed(0), device=device)
    matrices = {"left": draw().to(dtype), "right": draw().to(dtype)}
    timer = Timer("left @ right", globals=matrices, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=0.1).median


@functools.lru_cache
def measured_teraflops(device: torch.device, precision: str = "no") -> float:
    """Return the rate of a large matrix product on this device, in 10^12 operations a second.

    It is measured now, in a part of a second, and is not the maker's figure: a busy machine, or one that throttles,
    has a lower rate. On a GPU, `"no"` multiplies float32 in whatever way torch is set to (TF32 or not), as training
    does.

    Raises:
        ValueError: another precision than those of `AUTOCAST`.
    """
    rate = _rate_of_products(device, _autocast_dtype(precision) or torch.float32)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # these matrices are no part of what training needs
    return rate / 1e12


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: on a CUDA device what torch allocated, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

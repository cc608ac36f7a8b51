# SPDX-License-Identifier: Apache-2.0
"""Training of a language model: tokenizer and windows are prepared, the model is trained, exported and measured.

`training.tasks.fine_tuning` goes through the same steps with another `TrainingMode`.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from torch.utils.data import ConcatDataset, Subset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from training.cost import (
    STATE_BYTES_PER_PARAMETER,
    activation_bytes,
    check_machine,
    flops_per_token,
    hours,
    measured_teraflops,
    new_model,
    peak_memory_bytes,
)
from training.evaluate import load_model, mean_loss, tokens_and_bytes
from training.export import export_model, verify_export
from training.figures import draw_learning_curve
from training.files import faults, staged_folder, write_checksums
from training.layouts import Layout, Micro, price
from training.loop import LanguageModelTrainer, build_training_arguments
from training.metrics.mean_loss import bits_per_byte_of_loss, perplexity
from training.recipe import DataSection, FactsSection, Recipe, TextRecipe, TrainingRecipe
from training.result import header, learning_curve, tokens_per_second
from training.run_folder import run_once
from training.synthetic.readings import Reading, labelled_batch
from training.synthetic.recall import score_rows
from training.text.question_rows import IGNORED, FactRows, fact_texts, window_features
from training.text.sources import load_stories, split_provenance
from training.text.token_streams import TokenStream, make_reader
from training.text.tokenizer import load_tokenizer, train_tokenizer
from training.text.windows import collate_windows, pack_windows, some_windows


class ReadsText(Protocol):
    """The part of a recipe that tokenizer and windows are made from."""

    model: str
    data: DataSection

    @property
    def folder(self) -> Path: ...

    def build_config(self) -> PreTrainedConfig: ...


def num_devices(arguments: TrainingArguments) -> int:
    """Return the number of devices that train together: one a process, or all that a single process has."""
    return arguments.world_size * max(1, arguments.n_gpu)


def processes_per_batch(arguments: TrainingArguments) -> int:
    """Return how many processes are given the same batch: those that share its texts, or the heads of the model."""
    sizes = arguments.parallelism_config
    if sizes is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = ParallelismConfig()  # of `accelerate launch`
    return 1 if sizes is None else sizes.non_data_parallel_size


def windows_per_step(arguments: TrainingArguments) -> int:
    """Return the windows that one optimizer step sees, over all processes and accumulated micro-batches."""
    # `train_batch_size` counts all devices of one process.
    num_batches = arguments.world_size // processes_per_batch(arguments)
    return arguments.train_batch_size * num_batches * arguments.gradient_accumulation_steps


def tokens_per_step(recipe: ReadsText, arguments: TrainingArguments) -> int:
    """Return the tokens that one optimizer step sees, over all processes and accumulated micro-batches."""
    return windows_per_step(arguments) * recipe.data.context_length


def training_arguments(recipe: TextRecipe) -> TrainingArguments:
    """Return the recipe's `training` section as `TrainingArguments`, with what the run decides itself.

    Counting the steps of a token budget sets up the processes: only after this is `PartialState` that of the run.
    """
    # Each step uses every parameter, so that DDP need not search for the others.
    settings = {"ddp_find_unused_parameters": False} | recipe.training.model_dump()
    if recipe.data.facts is not None:
        settings["remove_unused_columns"] = False  # the collator needs them
    arguments = build_training_arguments(settings, recipe.folder, recipe.seed)
    per_step = tokens_per_step(recipe, arguments)
    if recipe.tokens is not None:
        arguments.max_steps = math.ceil(recipe.tokens / per_step)
    return arguments


def num_parameters(recipe: TrainingRecipe) -> int:
    """Count the trainable parameters of the recipe's model, tied ones once, without allocating them."""
    with torch.device("meta"):
        return new_model(recipe.build_config()).num_parameters()


def _estimate_cost(recipe: TextRecipe, arguments: TrainingArguments, tokens: int | None) -> dict[str, Any]:
    # The memory of one device with a whole copy of the model. DDP adds a copy of the gradients; FSDP divides all.
    config, context_length = recipe.build_config(), recipe.data.context_length
    per_token = flops_per_token(config, context_length)
    activations = activation_bytes(
        config,
        arguments.per_device_train_batch_size,
        context_length,
        arguments.mixed_precision,
        bool(arguments.activation_checkpointing),
        cast("dict[str, Any] | None", arguments.activation_checkpointing_kwargs),
    )
    # `adamw_torch_4bit` and `adamw_torch_8bit` keep smaller moments.
    is_adamw = arguments.optim.startswith("adamw_torch") and "bit" not in arguments.optim
    state = round(STATE_BYTES_PER_PARAMETER * num_parameters(recipe) / 1e9, 3)
    return {
        "flops_per_token": round(per_token),
        "training_flops": f"{per_token:.3e} times the tokens" if tokens is None else round(per_token * tokens),
        "memory_parameters_gb": state if is_adamw else f"known of AdamW only, which takes {state}",
        "memory_activations_gb": round(activations / 1e9, 3),
        "precision": "float32" if arguments.mixed_precision == "no" else arguments.mixed_precision,
    }


def plan(
    recipe: TextRecipe,
    teraflops: float | None = None,
    utilisation: float | None = None,
    devices: int | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """Return the size and the cost of a run, known without reading data: `dry-run` prints it.

    Args:
        recipe: the recipe of the run.
        teraflops (`float`, *optional*): peak rate of one device in the training precision, in 10^12 operations a
            second; gives `hours`.
        utilisation (`float`, *optional*): share of the peak that training reaches; 0.4 by default.
        devices (`int`, *optional*): how many train; by default those that this command would use.
        layout (`str`, *optional*): how devices share the model and its texts, see [`Layout`]: adds what a device holds
            and sends.

    Raises:
        ValueError: a rate, share, number or layout that no machine has, or `utilisation` without `teraflops`.
    """
    check_machine(teraflops, utilisation, devices)
    arguments = training_arguments(recipe)
    available = num_devices(arguments)
    devices = available if devices is None else devices
    per_step = tokens_per_step(recipe, arguments) // available * devices
    steps = arguments.max_steps if recipe.tokens is None else math.ceil(recipe.tokens / per_step)
    known, epochs = steps > 0, f"{arguments.num_train_epochs:g}"
    result: dict[str, Any] = {
        "parameters": num_parameters(recipe),
        "tokens_per_step": per_step,
        "steps": steps if known else f"as many as {epochs} epochs of the data make",
        "tokens": steps * per_step if known else f"{epochs} times those in the data",
        "warmup_steps": arguments.get_warmup_steps(steps) if known else arguments.warmup_steps,
        **_estimate_cost(recipe, arguments, steps * per_step if known else None),
    }
    if layout is not None:
        size, checkpointing = arguments.per_device_train_batch_size, bool(arguments.activation_checkpointing)
        micro = Micro(size, recipe.data.context_length, arguments.mixed_precision, checkpointing)
        result["layout"] = price(recipe.build_config(), Layout.parse(layout), micro)
    if teraflops is not None and known:
        result["hours"] = hours(result["training_flops"], teraflops, utilisation, devices)
    elif teraflops is not None:
        result["hours"] = "unknown, as the number of tokens is"
    return result | {"folder": str(recipe.folder), "hash": recipe.hash}


def _make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    section = recipe.tokenizer
    if section.pretrained is not None:
        tokenizer = load_tokenizer(section.pretrained)
        # In training a story follows the end token of the one before; a begin token of its own occurs in no window.
        tokenizer.bos_token = tokenizer.eos_token
        return tokenizer
    assert section.vocab_size is not None  # the recipe gives one of the two
    texts: list[Iterable[str]] = []
    for source, _ in recipe.data.training_sources():
        if section.max_training_stories is not None:
            limits = [limit for limit in (section.max_training_stories, source["num_stories"]) if limit is not None]
            source["num_stories"] = min(limits)
        stories = load_stories(**source, streaming=recipe.data.streaming)
        texts.append(row["text"] for row in stories)
    facts = [] if recipe.data.facts is None else fact_texts(recipe.data.facts.max_documents)
    return train_tokenizer(itertools.chain(*texts, facts), section.vocab_size)


def prepare_tokenizer(
    recipe: ReadsText, state: PartialState, make: Callable[..., PreTrainedTokenizerFast] = _make_tokenizer
) -> PreTrainedTokenizerFast:
    """Make and save the tokenizer of a run, unless it is saved already, and return the saved one.

    So every process and every resumed session uses the same tokenizer.

    Raises:
        ValueError: the saved tokenizer is damaged, or larger than the model's vocabulary.
    """
    saved = recipe.folder / "tokenizer"
    with state.main_process_first():
        if state.is_main_process and not saved.is_dir():
            with staged_folder(saved) as staged:
                make(recipe).save_pretrained(staged)
                write_checksums(staged)
        if damage := faults(saved):
            raise ValueError(
                f"{saved} is damaged ({'; '.join(damage)}): restore it, as the checkpoints were trained with it, or "
                "train again with --restart"
            )
    tokenizer = load_tokenizer(str(saved))
    config = recipe.build_config()
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, but the model {recipe.model!r} has embeddings for "
            f"{config.vocab_size}: raise model_args.vocab_size, or use a smaller tokenizer"
        )
    return tokenizer


def token_stream(data: DataSection, tokenizer: PreTrainedTokenizerFast, share: tuple[int, int]) -> TokenStream:
    """Return the stream of training windows of one of several processes: `share` are its index and their number."""
    sources = data.training_sources()
    readers = [make_reader(source, share) for source, _ in sources]
    return TokenStream(readers, [weight for _, weight in sources], tokenizer, data.context_length)


def prepare_windows(
    recipe: ReadsText, tokenizer: PreTrainedTokenizerFast, state: PartialState, per_batch: int = 1
) -> dict[str, Dataset | IterableDataset | TokenStream]:
    """Cut the stories of a recipe into windows, `train` and `validation`; other processes read what the main one made.

    Each `per_batch` processes that follow one another read the same stream, as they are given the same batches.

    A stream for training begins again when it ends. The first of its windows alone, if `num_windows` says so, are read
    by one process for all, and again by a run that goes on; any other stream goes on in place.
    """
    data = recipe.data
    windows: dict[str, Dataset | IterableDataset | TokenStream] = {}
    with state.main_process_first():
        for split, source in (("train", data.train), ("validation", data.validation)):
            streaming, most = data.streaming and split == "train", getattr(data.num_windows, split, None)
            if streaming and most is None:
                share = (state.process_index // per_batch, state.num_processes // per_batch)
                windows[split] = token_stream(data, tokenizer, share)
                continue
            stories = load_stories(**source.model_dump(), streaming=streaming)
            some = some_windows(pack_windows(stories, tokenizer, data.context_length, data.num_proc), most)
            windows[split] = some.repeat(None) if streaming else some  # the budget ends the run, not the stream
    return windows


def fact_rows(recipe: ReadsText, tokenizer: PreTrainedTokenizerFast, split: str) -> FactRows:
    """Return the rows of facts of a recipe that has some, for `train` or `test`."""
    facts = cast(FactsSection, recipe.data.facts)
    size = facts.num_rows if split == "train" else facts.num_test
    sizes = (facts.max_documents, facts.num_questions)
    return FactRows(tokenizer, recipe.data.context_length, size, split, *sizes)


def whole_steps(windows: Any, arguments: TrainingArguments, state: PartialState) -> Any:
    """Leave out the last windows that do not fill an optimizer step; `ValueError` if there are too few for one.

    A last step of fewer windows would see fewer tokens than the budget counts. A stream stays as it is.
    """
    if isinstance(windows, (IterableDataset, TokenStream)):
        return windows
    per_step = windows_per_step(arguments)
    whole = len(windows) - len(windows) % per_step
    if whole == 0:
        raise ValueError(
            f"the training data fill {len(windows)} windows, but one optimizer step takes {per_step}: give more "
            "stories, or lower the batch"
        )
    left_out = len(windows) - whole
    state.print(f"{whole:,} training windows make {whole // per_step:,} steps an epoch; {left_out} more are left out")
    return windows.select(range(whole)) if isinstance(windows, Dataset) else Subset(windows, range(whole))


def build_model(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build a new model, initialised from the recipe's seed, with the special tokens of the tokenizer."""
    config = recipe.build_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    # Just before the weights are drawn, so that nothing before it changes them.
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.loss_type = "ForCausalLM"  # GPT-2's class name does not say it, and each forward would warn
    return model


def training_rows(
    recipe: TextRecipe,
    tokenizer: PreTrainedTokenizerFast,
    windows: Dataset | IterableDataset | TokenStream,
    arguments: TrainingArguments,
    state: PartialState,
) -> Any:
    """Return what a training reads: windows, and rows of facts if the recipe has some, in whole steps."""
    facts = [] if recipe.data.facts is None else [fact_rows(recipe, tokenizer, "train")]
    return whole_steps(ConcatDataset([windows, *facts]) if facts else windows, arguments, state)


def facts_collator(config: PreTrainedConfig) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return what makes batches of windows and rows of facts, whose documents are read alone."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        whole = [row if "answers" in row else window_features(row["input_ids"]) for row in rows]
        batch = labelled_batch(config, whole, Reading())
        is_window = torch.tensor(["answers" not in row for row in rows])[:, None]
        labels = batch.pop("labels")
        return batch | {
            "labels": labels.masked_fill(~is_window, IGNORED),
            "answer_labels": labels.masked_fill(is_window, IGNORED),
        }

    return collate


class TrainingMode(NamedTuple):
    """The steps in which a training from scratch differs from one that adapts a model.

    Args:
        tokenizer: returns the tokenizer of a recipe.
        build: returns the model to train, of transformers or PEFT, given the recipe and its tokenizer.
        export: writes what was trained, given the recipe, the model, the tokenizer and the state dict if the model
            holds only a shard of it; returns the folder of the whole model, and that model.
        describe: returns what the result holds besides, given the recipe, its validation windows and their batch size.
        exports: names the folders that `export` writes.
    """

    tokenizer: Callable[..., PreTrainedTokenizerFast]
    build: Callable[..., Any]
    export: Callable[..., tuple[Path, PreTrainedModel]]
    describe: Callable[..., dict[str, Any]]
    exports: tuple[str, ...]


def _export(
    recipe: TextRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, torch.Tensor],
) -> tuple[Path, PreTrainedModel]:
    folder = recipe.folder / "model"
    export_model(model, tokenizer, folder, state_dict)
    return folder, model


FROM_SCRATCH = TrainingMode(_make_tokenizer, build_model, _export, lambda recipe, windows, batch_size: {}, ("model",))


def _result(
    recipe: TextRecipe,
    trainer: LanguageModelTrainer,
    loss: float,
    samples: list[tuple[str, str]],
    data: dict[str, Any],
    cost: dict[str, float],
) -> dict[str, Any]:
    history = trainer.state.log_history
    curve = learning_curve(history)
    speed = tokens_per_second(history)
    peak, tokenizer = trainer.peak_tokens_per_second, cast(PreTrainedTokenizerFast, trainer.processing_class)
    utilisation = None if speed is None or peak is None else round(speed / peak, 5)
    # A loss per token depends on the tokenizer. Bits per byte do not.
    size = tokens_and_bytes(load_stories(**recipe.data.validation.model_dump()), tokenizer)
    return {
        **header(recipe),
        "model": recipe.model,
        "seed": recipe.seed,
        "architecture": recipe.architecture,
        "num_processes": trainer.args.world_size,
        "precision": trainer.accelerator.mixed_precision,
        "data": data,
        "parameters": num_parameters(recipe),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        # Each log entry also counts the sessions before it.
        "seconds": max(entry.get("seconds", 0.0) for entry in history),
        "throughput": {"tokens_per_second": speed, "utilisation": utilisation, **cost},
        "metrics": {
            "training_loss": curve["training"][-1]["loss"],
            "validation_loss": loss,
            "validation_perplexity": perplexity(loss),
            "validation_bits_per_byte": bits_per_byte_of_loss(loss, *size),
        },
        "learning_curve": curve,
        "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
    }


def _finish(
    recipe: TextRecipe,
    trainer: LanguageModelTrainer,
    mode: TrainingMode,
    data: dict[str, Any],
    cost: dict[str, float],
) -> dict[str, Any]:
    """Export and measure what was trained; returns the content of `result.json`, on the main process alone."""
    # All processes take part, as each may hold only a shard.
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # One process alone loads and measures from here on, and ZeRO-3 would wait for the others to take their shards.
    unset_hf_deepspeed_config()
    # So torch.compile names what is inside its wrapper; a folder has the model's own names.
    state_dict = {name.replace("_orig_mod.", ""): tensor for name, tensor in (state_dict or {}).items()}
    if not trainer.is_world_process_zero():
        return {}
    # Without autocast: what is evaluated and exported is the model in float32.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    folder, model = mode.export(recipe, model, trainer.processing_class, state_dict)
    sampling = recipe.generation.model_dump()
    prompts = sampling.pop("prompts")
    tokenizer = cast(PreTrainedTokenizerFast, trainer.processing_class)
    # No process holds the whole of a sharded model, and a compiled one rounds in another order: for these the folder
    # itself is the reference.
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.args.torch_compile:
        model = load_model(folder)[0]
    loss = mean_loss(model, trainer.eval_dataset, trainer.args.eval_batch_size)
    texts = verify_export(folder, prompts, seed=recipe.seed, model=model, **sampling)
    result = _result(recipe, trainer, loss, list(zip(prompts, texts, strict=True)), data, cost)
    result |= mode.describe(recipe, trainer.eval_dataset, trainer.args.eval_batch_size)
    if recipe.data.facts is not None:
        asked = fact_rows(recipe, tokenizer, "test")
        rows = [asked.row(index) for index in range(len(asked))]
        scores = score_rows(model, rows, trainer.args.eval_batch_size, Reading())
        result["metrics"] |= {"answer_accuracy": scores["accuracy"], "num_answers": scores["num_answers"]}
    draw_learning_curve(result, recipe.folder / "loss.png")
    return result


def _train(
    recipe: TextRecipe, arguments: TrainingArguments, state: PartialState, mode: TrainingMode, data: dict[str, Any]
) -> dict[str, Any]:
    tokenizer = prepare_tokenizer(recipe, state, mode.tokenizer)
    windows = prepare_windows(recipe, tokenizer, state, processes_per_batch(arguments))
    model = mode.build(recipe, tokenizer)
    # In teraflops of all devices together.
    peak = measured_teraflops(arguments.device, arguments.mixed_precision) * num_devices(arguments)
    per_token = flops_per_token(model.config, recipe.data.context_length)
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments,
        data_collator=collate_windows if recipe.data.facts is None else facts_collator(model.config),
        train_dataset=training_rows(recipe, tokenizer, windows["train"], arguments, state),
        eval_dataset=windows["validation"],
        processing_class=tokenizer,
        peak_tokens_per_second=peak * 1e12 / per_token,
        chunked_loss=recipe.chunked_loss,
    )
    # The newest is whole: `run_once` has set damaged checkpoints aside.
    checkpoint = get_last_checkpoint(str(recipe.folder))
    if checkpoint is not None:
        state.print(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    # Before the last evaluation, which may need more than training did.
    memory = peak_memory_bytes(arguments.device)
    cost = {"model_flops_per_token": per_token, "measured_teraflops": peak, "peak_memory_gb": round(memory / 1e9, 3)}
    return _finish(recipe, trainer, mode, data, cost)


def data_provenance(data: DataSection) -> dict[str, Any]:
    """Return the provenance of all text of a training: `train`, `validation`, and `train_2` and so on of a mixture."""
    sources = [source for source, _ in data.training_sources()]
    found = [split_provenance(source, data.validation.model_dump(), data.streaming) for source in sources]
    return found[0] | {f"train_{number}": each["train"] for number, each in enumerate(found[1:], 2)}


def _identity(recipe: TextRecipe, arguments: TrainingArguments, state: PartialState) -> dict[str, Any]:
    shared = processes_per_batch(arguments)
    return {
        "hash": recipe.hash,
        # With other numbers, a resumed run would not continue exactly.
        "num_processes": state.num_processes,
        **({"processes_per_batch": shared} if shared > 1 else {}),
        "recipe": recipe.model_dump(exclude={"output_dir"}),
        "architecture": recipe.architecture,
        "data": data_provenance(recipe.data),
    }


def run(recipe: TextRecipe, restart: bool = False, mode: TrainingMode = FROM_SCRATCH) -> dict[str, Any]:
    """Train a language model, or go on where an earlier start of the same recipe stopped.

    Args:
        recipe: the recipe of the run.
        restart: move what an earlier run left in the folder aside, and train from the beginning.
        mode: how the model is built and exported; by default a new model is trained.

    Returns:
        The content of `result.json`; of the earlier one, if the recipe was already finished.

    Raises:
        ValueError: the folder belongs to another recipe, the data are empty, the tokenizer is too large, the loss
            diverged, or no checkpoint is usable.
        OSError: a checkpoint could not be saved; earlier ones are intact.
    """
    arguments = training_arguments(recipe)
    state = PartialState()  # after the arguments, which settle devices and processes
    return run_once(
        recipe,
        state,
        restart,
        identity=lambda: _identity(recipe, arguments, state),
        make=lambda data: _train(recipe, arguments, state, mode, data),
        kept=mode.exports,
        again="trains again",
    )


def summary(result: dict[str, Any], folder: Path) -> str:
    """Return the end of a run in words: samples, metrics, and where everything is."""
    samples = [f"{sample['text'].strip()}\n" for sample in result["samples"]]
    metrics = result["metrics"]
    lines = [
        f"{result['model']} ({result['parameters']:,} parameters), {result['tokens']:,} tokens in "
        f"{result['seconds']:,.0f} s: validation loss {metrics['validation_loss']:.4f}, perplexity "
        f"{metrics['validation_perplexity']:.2f}, {metrics['validation_bits_per_byte']:.4f} bits per byte",
        f"model, checkpoints, result.json and loss.png are in {folder}",
    ]
    return "\n".join(samples + lines)

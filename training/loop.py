# SPDX-License-Identifier: Apache-2.0
"""The training loop: transformers' Trainer, whose checkpoints are whole or absent and whose resume is exact."""

import contextlib
import functools
import inspect
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from modeling_memory_mosaic import context_parallel
from training.files import STAGED_PREFIX, faults, move_into_place, read_json, set_aside, write_checksums, write_json
from training.metrics.mean_loss import perplexity
from training.parallel import report_progress
from training.text.token_streams import TokenStream, collate_stream, place_to_json


logger = logging.getLogger(__name__)


def build_training_arguments(settings: dict[str, Any], folder: Path, seed: int, **fixed: Any) -> TrainingArguments:
    """Return the `TrainingArguments` of a run: the settings of its recipe, and what every run decides itself.

    Args:
        settings: the recipe's `training` section, by name.
        folder: where checkpoints go.
        seed: initialises the model and orders the data.
        fixed: further arguments, which no recipe may set.
    """
    accelerator = torch.accelerator.is_available()
    # Pinned memory is for copies to an accelerator.
    defaults = {"use_cpu": not accelerator, "dataloader_pin_memory": accelerator}
    return TrainingArguments(
        **defaults | settings,
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        include_num_input_tokens_seen="all",
        logging_nan_inf_filter=False,  # `log` has to see a loss that is not finite, to end the run
        **fixed,
    )


class _Clock(TrainerCallback):
    """Seconds of training, in this session and those that it continues."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started = time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._started = time.monotonic()


class _Meter(TrainerCallback):
    """Tokens per second since the last reading, without the time in which training was paused."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens = 0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Not when training begins: a resumed run first goes past the batches that it has seen.
        if self._since is None:
            self._since, self._tokens = time.perf_counter(), state.num_input_tokens_seen

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = None

    def tokens_per_second(self, state: TrainerState) -> float:
        assert self._since is not None  # a loss is logged only after a step has begun
        now = time.perf_counter()
        speed = (state.num_input_tokens_seen - self._tokens) / (now - self._since)
        self._since, self._tokens = now, state.num_input_tokens_seen
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - began


class _LogWhenSaving(TrainerCallback):
    """Logs at each checkpoint and at the end.

    The loss summed since the last log is no part of a checkpoint, and would be lost on resume.
    """

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save or state.global_step >= state.max_steps

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save


class _StopWhenDone(TrainerCallback):
    """Ends a training that is resumed after its last step.

    It goes through no more epochs. (`LanguageModelTrainer.get_batch_samples` keeps it from taking one more step.)
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= state.max_steps


class _ReportProgress(TrainerCallback):
    """Reports the share of the steps that is done, after each step."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report(state.global_step / state.max_steps)


class LanguageModelTrainer(Trainer):
    """`transformers.Trainer` for causal language models.

    Five things differ: the per-head scalars are not decayed; the loss is the mean over the predicted tokens for every
    architecture alike; checkpoints appear whole or not at all; a `TokenStream` goes on in place, as each checkpoint
    holds the place of each process; and logs carry the seconds trained so far, over all resumed sessions, the
    perplexity, and the speed. `output_dir` must be visible to all processes.

    The speed is `tokens_per_second` of all processes since the training loss was last logged, without the time that
    evaluating and saving took (Trainer's own `train_tokens_per_second` is the mean of the session, with it), and
    `mfu`, its share of `peak_tokens_per_second`.

    Args:
        peak_tokens_per_second (`float`, *optional*): of all processes, if they did nothing but the model's matrix
            products, as fast as they can; without it there is no `mfu`.
        chunked_loss (`bool`): whether the model is to compute its loss without the logits of all tokens at once.
        report (`Callable[[float], None]`, *optional*): called after each step with the share of the steps that is
            done; by default it moves the one bar of several trainings at once.

    Raises:
        ValueError: `load_best_model_at_end` is set; while training, if the loss is not a finite number or a checkpoint
            does not fit the model.
        OSError: while training, if a checkpoint cannot be saved.
    """

    def __init__(
        self,
        *args: Any,
        peak_tokens_per_second: float | None = None,
        chunked_loss: bool = False,
        report: Callable[[float], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._stream = self.train_dataset if isinstance(self.train_dataset, TokenStream) else None
        self._place: dict[str, Any] | None = None  # of the stream, behind the batches that were taken
        if self._stream is not None:
            self.args.ignore_data_skip = True  # the stream itself begins where it stopped
        report = report or functools.partial(report_progress, self._folder)
        if self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True is not supported: checkpoints are removed by age, so the best one may be "
                "gone; set it to False and raise save_total_limit to keep more checkpoints"
            )
        # Trainer infers this from the class name, and GPT2LMHeadModel does not fit its pattern: it would divide by
        # one token too many per row, and two architectures would train with different gradients.
        self._loss_shifts_labels = True
        self._staging: Path | None = None
        self._clock = _Clock()
        self._meter = _Meter()
        self.peak_tokens_per_second = peak_tokens_per_second
        self.chunked_loss = chunked_loss
        if chunked_loss:
            whole: Any = self.accelerator.unwrap_model(self.model)
            whole = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # PEFT passes all on
            if "skip_logits" not in inspect.signature(whole.forward).parameters:
                raise ValueError(f"chunked_loss: {type(whole).__name__} cannot compute its loss without logits")
        for callback in (self._clock, self._meter, _LogWhenSaving, _StopWhenDone, _ReportProgress(report)):
            self.add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.get_cp_size() > 1:
            # Accelerate would split texts for layers that are nothing but attention, and refuses all others.
            self.accelerator._prepare_cp = lambda *parts: parts

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], contextlib.AbstractContextManager], dict[str, Any]]:
        # Each process of a group has the whole batch, of which the model takes its stretch.
        if self.get_cp_size() == 1:
            return contextlib.nullcontext, inputs
        return functools.partial(context_parallel, model, self.accelerator.torch_device_mesh["cp"].get_group()), inputs

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        # Trainer counts the batch of each process, though those of a group have the same.
        added = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + added // (self.get_cp_size() * self.get_tp_size())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Trainer itself exempts only biases and norms.
        exempt = getattr(model, "no_weight_decay_names", ())
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(exempt)]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        shares = self.get_cp_size()
        if "answer_labels" in inputs:
            if shares > 1:
                raise ValueError("answers have a loss of whole texts, which no process has: set cp_size to 1")
            return self._compute_loss_with_answers(model, inputs, *args, **kwargs)
        if self.chunked_loss:
            inputs = {**inputs, "skip_logits": True}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if shares == 1 or kwargs.get("num_items_in_batch") is None:
            return loss
        # Trainer multiplies by all processes, as if each had the loss of its own stretch; they have that of the text.
        return (loss[0] / shares, loss[1]) if isinstance(loss, tuple) else loss / shares

    def _compute_loss_with_answers(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Add the mean over `answer_labels` to that over `labels`: there are few answers, which count as much."""
        targets = [inputs[name] for name in ("labels", "answer_labels")]
        outputs = model(**{name: value for name, value in inputs.items() if not name.endswith("labels")})
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        sums = [cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") for labels in targets]
        counts = [(labels[:, 1:] != -100).sum().clamp(min=1) for labels in targets]
        loss = sum(total / count for total, count in zip(sums, counts, strict=True))
        # With that number Trainer leaves it to the loss to be a share of an accumulated batch.
        loss = loss if num_items_in_batch is None else loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the training loss is {logs['loss']} at step {self.state.global_step}: lower training.learning_rate "
                "or raise training.warmup_steps; checkpoints from before are intact"
            )
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        if self.is_in_train:
            logs["seconds"] = round(self._clock.seconds(), 3)
        if self.is_in_train and "loss" in logs:
            speed = self._meter.tokens_per_second(self.state)
            logs["tokens_per_second"] = round(speed, 3)
            if self.peak_tokens_per_second is not None:
                logs["mfu"] = round(speed / self.peak_tokens_per_second, 5)
        super().log(logs, start_time)

    def measure(self) -> dict[str, float] | None:
        """Return the scores of an evaluation by name; None for Trainer's own, the loss on `eval_dataset`.

        A subclass that measures something else overrides this. Each score is logged as `eval_NAME`.
        """
        return None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._meter.paused():
            scores = self.measure()
            if scores is None:
                return super().evaluate(*args, **kwargs)
        metrics = {f"eval_{name}": score for name, score in scores.items()}
        self.log(metrics)
        # As Trainer's own evaluation does, which is not called here.
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> DataLoader:
        if self._stream is None:
            return super().get_train_dataloader()
        # Not prepared by accelerate: each process has a stream of its own. With a generator of its own, because
        # otherwise the loader would draw from that of the training each time it begins.
        return DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=functools.partial(collate_stream, self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        # Resumed after its very last step, Trainer would take one step more before it looks at the number of steps.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches if self._stream is not None else ():
            self._place = batch.pop("place")
        return batches, num_items

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        if self._stream is not None and resume_from_checkpoint:
            path = Path(resume_from_checkpoint) / self._place_name
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing, so that the stream of text cannot go on: the checkpoint is of an earlier "
                    "version; --restart trains from the beginning"
                )
            self._place = read_json(path)
            self._stream.go_on_from(self._place)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @property
    def _place_name(self) -> str:
        return f"place_{self.args.process_index}.json"

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        # Trainer asks for this folder when it saves, and so writes into the staged one.
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._meter.paused():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = self._folder
        final = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_folder / (STAGED_PREFIX + final.name)
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            if self._place is not None:
                write_json(staging / final.name / self._place_name, place_to_json(self._place))
            self.accelerator.wait_for_everyone()  # each process writes its own random state, and its place in a stream
            if self.is_world_process_zero():
                write_checksums(staging / final.name)
                move_into_place(staging / final.name, final)
                staging.rmdir()
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            kept = sort_checkpoints(str(run_folder))
            resume = f"the run resumes from {Path(kept[-1]).name}" if kept else "there is no earlier checkpoint"
            raise OSError(f"cannot save {final} ({error}); make room and start again: {resume}") from error
        finally:
            self._staging = None
        # Trainer rotated checkpoints in the staged folder, where there are no old ones. Rotate those of the run here.
        if self.is_world_process_zero():
            rotate_checkpoints(str(run_folder), self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Tied weights are stored once, so their second name is missing by right; anything else is the wrong file.
        model: Any = self.model
        missing = set(load_result.missing_keys) - set(model.all_tied_weights_keys)
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit the model: missing {sorted(missing)}, "
                f"unexpected {sorted(load_result.unexpected_keys)}"
            )


def set_aside_broken_checkpoints(run_folder: Path) -> None:
    """Rename checkpoints that are newer than the latest complete one: a run goes on from that.

    Raises:
        ValueError: there are checkpoints, but none is complete.
    """
    broken: dict[Path, str] = {}
    for path in map(Path, reversed(sort_checkpoints(str(run_folder)))):
        damage = faults(path)
        if not damage:
            break
        broken[path] = ", ".join(damage)
    else:
        if not broken:
            return
        details = "; ".join(f"{path.name}: {damage}" for path, damage in broken.items())
        raise ValueError(f"no checkpoint in {run_folder} is complete ({details}): --restart trains from the beginning")
    for damaged, reason in broken.items():
        aside = set_aside(damaged)
        logger.warning(
            "%s is damaged (%s): continuing from %s, and keeping the damaged one as %s",
            *(damaged.name, reason, path.name, aside.name),
        )

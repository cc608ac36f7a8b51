# SPDX-License-Identifier: Apache-2.0
"""Evaluation: loading an exported folder or a checkpoint, and its loss on stories."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import modeling_memory_mosaic  # noqa: F401  (registers the model type with AutoModelForCausalLM)
from training.commands.loading import model_folder
from training.files import refuse_damage
from training.metrics.mean_loss import bits_per_byte_of_loss, perplexity
from training.progress import progress
from training.recipe import SourceSection
from training.text.sources import load_stories, source_provenance
from training.text.tokenizer import load_tokenizer
from training.text.windows import collate_windows, pack_windows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_causal_lm(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load the model of a folder in evaluation mode, on the accelerator, if there is one.

    Args:
        folder: an exported folder, a checkpoint, or the folder of a finished run.
        options: further arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: the folder holds no model, or one with code of its own; a file of it has changed since a run has
            written it; its weights are cut off or a pickle of more than tensors, or they do not fill the model.
    """
    folder = model_folder(folder)
    refuse_damage(folder)
    try:
        # False, not None, which would ask the user: code in the folder must not run.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False, **options
        )
        model, report = loaded
    except SafetensorError as error:
        raise ValueError(f"the weights in {str(folder)!r} are damaged ({error}): copy or export them again") from error
    except UnpicklingError:  # its message advises to load the file all the same, which runs what is in it
        raise ValueError(
            f"the weights in {str(folder)!r} are a pickle that holds more than tensors, or is damaged: get them as "
            "safetensors"
        ) from None
    except (StrictDataclassError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the config.json in {str(folder)!r} describes no model ({_first_line(error)})") from None
    # The library only warns, and draws at random what is missing.
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"the weights in {str(folder)!r} do not fill the model: missing {sorted(report['missing_keys'])}, of "
            f"another shape {sorted(report['mismatched_keys'])}"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def load_model(folder: str | Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load model and tokenizer of a folder; arguments and errors as for `load_causal_lm`."""
    return load_causal_lm(folder, **options), load_tokenizer(str(model_folder(folder)))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: Dataset, batch_size: int) -> float:
    """Return the mean loss over all predicted tokens of the windows, in nats a token."""
    model.eval()
    total, predicted = 0.0, 0
    for start in progress(range(0, len(windows), batch_size), "loss", "batch"):
        rows = [windows[index] for index in range(start, min(start + batch_size, len(windows)))]
        batch = {name: tensor.to(model.device) for name, tensor in collate_windows(rows).items()}
        count = int((batch["labels"][:, 1:] != -100).sum())  # nothing predicts the first token
        # The loss is the mean of a batch, and the last batch may be smaller.
        total += model(**batch, use_cache=False).loss.item() * count
        predicted += count
    return total / predicted


def tokens_and_bytes(stories: Dataset, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Count the tokens of all stories, each with its end-of-text token, and their UTF-8 bytes without separators."""
    num_tokens = num_bytes = 0
    total = -(-len(stories) // 1000)
    for batch in progress(stories.iter(batch_size=1000), "bytes", "thousand stories", total):
        # As in the windows: a special token that is written out in a story is text.
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        num_tokens += sum(len(ids) + 1 for ids in encoded)
        num_bytes += sum(len(text.encode()) for text in batch["text"])
    return num_tokens, num_bytes


def evaluate_folder(
    folder: str | Path, source: SourceSection, context_length: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Measure the loss of a saved model on the windows of a source.

    Args:
        folder: an exported folder or a checkpoint.
        source: the stories.
        context_length: tokens per window; the model's `max_position_embeddings` by default.
        batch_size: windows per forward pass; changes speed, not results.

    Returns:
        `loss` (nats per token), `perplexity`, `bits_per_byte`, `num_stories` that were read, `num_tokens` in the
        windows, and the source's provenance under `data`.
    """
    model, tokenizer = load_model(folder)
    context_length = context_length or model.config.max_position_embeddings
    stories = load_stories(**source.model_dump())
    windows = pack_windows(stories, tokenizer, context_length)
    loss = mean_loss(model, windows, batch_size)
    num_tokens = len(windows) * context_length
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte_of_loss(loss, *tokens_and_bytes(stories, tokenizer)),
        "num_stories": len(stories),
        "num_tokens": num_tokens,
        "context_length": context_length,
        "data": source_provenance(**source.model_dump()),
    }

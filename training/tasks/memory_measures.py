# SPDX-License-Identifier: Apache-2.0
"""Measures of a memory model on windows of text, and of a guess that knows the frequencies of tokens alone."""

from collections import Counter, defaultdict
from typing import Any

import torch
from datasets import Dataset

from modeling_memory_mosaic import MemoryModelForCausalLM
from modeling_memory_mosaic.configuration_memory_model import OBJECTIVES
from modeling_memory_mosaic.layout_memory_model import pack_text
from training.metrics.entropy_ratio.entropy_ratio import entropy_ratio
from training.text.windows import collate_windows


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # `cross_entropy` takes the vocabulary as the second dimension: (B, V, ...).
    return torch.nn.functional.cross_entropy(logits.movedim(-1, 1).float(), targets, reduction="none").double()


@torch.no_grad()
def measure(model: MemoryModelForCausalLM, windows: Dataset, batch_size: int) -> dict[str, Any]:
    """Measure a memory model on windows by all objectives, whatever it was trained for; it is left as it was.

    Returns:
        `causal_loss`, and for each way to reconstruct (see `MemoryModelForCausalLM.reconstruct`) `NAME_loss`, both in
        nats a token, `NAME_accuracy`, the share of tokens that are right, `NAME_exact`, the share of chunks that are
        right throughout, and `NAME_by_place`, the accuracy at each place of a chunk.
    """
    was_training = model.training
    device: Any = model.device  # a checker takes attributes of modules for tensors
    model.eval()
    causal: list[torch.Tensor] = []
    reconstructed: dict[str, list[torch.Tensor]] = defaultdict(list)
    for start in range(0, len(windows), batch_size):
        rows = [windows[index] for index in range(start, min(start + batch_size, len(windows)))]
        ids = collate_windows(rows)["input_ids"].to(device)
        text = pack_text(ids)
        context = model.gather_memories(text)
        logits, _ = model.decode_text(text, context)  # (B, T, V)
        causal.append(_token_losses(logits[:, :-1], ids[:, 1:]).flatten())
        # A model that reads no memories has nothing to reconstruct from.
        for objective in OBJECTIVES[1:] if model.config.max_memories != 0 else ():
            # (B, R, L, V) and (B, R, L) for R chunks.
            logits, targets, _ = model.reconstruct(objective, text, context)
            is_right = logits.argmax(-1) == targets
            reconstructed[objective].append(torch.stack([_token_losses(logits, targets), is_right]).flatten(1, 2))
    model.train(was_training)
    measures: dict[str, Any] = {"causal_loss": torch.cat(causal).mean().item()}
    for objective, parts in reconstructed.items():
        losses, is_right = torch.cat(parts, dim=1)  # each (chunks, L)
        measures |= {
            f"{objective}_loss": losses.mean().item(),
            f"{objective}_accuracy": is_right.mean().item(),
            f"{objective}_exact": is_right.all(-1).double().mean().item(),
            f"{objective}_by_place": is_right.mean(0).tolist(),
        }
    return measures


def unigram(windows: dict[str, Dataset], vocab_size: int) -> dict[str, float]:
    """Measure a guess by the frequencies of the training tokens alone on the validation tokens."""
    ids = {split: windows[split].with_format("numpy")["input_ids"][:] for split in ("train", "validation")}
    counts, tokens = Counter(ids["train"].ravel().tolist()), ids["validation"].ravel().tolist()
    guess = entropy_ratio(
        predictions=[0.0],  # of a model; only the guess beside it is asked for
        references=[tokens],
        vocab_size=vocab_size,
        frequencies=[counts[token] for token in range(vocab_size)],
    )
    return {
        "loss": guess["unigram_cross_entropy"],
        "accuracy": tokens.count(counts.most_common(1)[0][0]) / len(tokens),
        "entropy_ratio": guess["unigram_entropy_ratio"],
    }

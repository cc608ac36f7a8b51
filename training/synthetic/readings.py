# SPDX-License-Identifier: Apache-2.0
"""How documents and a question about them are put before a model: the documents read alone and joined, or in sequence.

Documents that are read alone do not see each other, and the question sees all of them. A Memory Mosaic does this by
`sees_all`. A transformer does it by a mask, and has to be given positions: `running`, as if all had been read in
sequence, so that stored keys would have to be rotated again for each order of joining; or `own`, each document from
position 0 on and the question behind the longest, as caches are that were stored alone. Parallel encoding (APE,
arXiv 2502.05431) sharpens the weights over documents by a temperature and scales their sum.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from training.text.question_rows import PADDING, pad


class Reading(NamedTuple):
    """A way to read documents and a question; `temperature` and `scale` are those of parallel encoding."""

    is_joined: bool = True
    positions: Literal["running", "own"] = "running"
    temperature: float = 1.0
    scale: float = 1.0


def running_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Return positions `(B, T)` in sequence."""
    return torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)


def own_positions(document_ids: torch.Tensor, is_question: torch.Tensor | None = None) -> torch.Tensor:
    """Return positions `(B, T)` that start again at 0 with each document; those of questions behind the longest."""
    places = running_positions(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions = places - torch.where(begins, places, 0).cummax(-1).values
    if is_question is None:
        return positions
    longest = positions.masked_fill(is_question | (document_ids == PADDING), -1).amax(-1, keepdim=True) + 1
    return positions + torch.where(is_question, longest, 0)


def document_mask(document_ids: torch.Tensor, is_question: torch.Tensor) -> torch.Tensor:
    """Return which tokens see which `(B, 1, T, T)`: those of the own document before it, and questions all before."""
    length = document_ids.shape[1]
    is_before = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    is_own = document_ids[:, :, None] == document_ids[:, None, :]
    is_text = (document_ids != PADDING)[:, None, :]
    return (is_before & (is_own | (is_question[:, :, None] & is_text)))[:, None]


def model_inputs(config: PreTrainedConfig, batch: dict[str, torch.Tensor], reading: Reading) -> dict[str, Any]:
    """Return the arguments of a model for a batch.

    Args:
        config: of the model, a Memory Mosaic or a transformer of transformers.
        batch: `input_ids` and `document_ids` `(B, T)`, and `is_question` `(B, T)`.
        reading: how the documents are read.
    """
    ids, documents, is_question = batch["input_ids"], batch["document_ids"], batch["is_question"]
    arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if not reading.is_joined:
        return arguments | {"attention_mask": (documents != PADDING).long()}
    if hasattr(config, "num_persistent_slots"):
        mask = (documents != PADDING).long()
        return arguments | {
            "attention_mask": mask,
            "position_ids": own_positions(documents),
            "sees_all": is_question,
        }
    if reading.positions == "own":
        arguments["position_ids"] = own_positions(documents, is_question)
    else:
        arguments["position_ids"] = running_positions(documents)
    arguments["attention_mask"] = document_mask(documents, is_question)
    if config.model_type == "shifted_gpt_neox":
        arguments["has_previous"] = own_positions(documents) > 0
    if (reading.temperature, reading.scale) != (1.0, 1.0):
        of_documents = document_mask(documents, is_question) & ~is_question[:, None, None, :]
        arguments |= {
            "of_documents": of_documents & is_question[:, None, :, None],
            "temperature": reading.temperature,
            "scale": reading.scale,
        }
    return arguments


def labelled_batch(config: PreTrainedConfig, rows: list[dict[str, Any]], reading: Reading) -> dict[str, Any]:
    """Return the arguments of a model for rows of `training.text.question_rows`, with labels `(B, T)`."""
    batch = pad(rows)
    return model_inputs(config, batch, reading) | {"labels": batch["labels"]}


def parallel_encoding(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    of_documents: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend `(B, H, T, D)`, with another temperature and scale where a question looks at documents.

    Args:
        of_documents (`torch.Tensor` of shape `(B, 1, T, T)`, *optional*): where a question looks at a document.

    Returns:
        the read-out `(B, T, H, D)` and the weights `(B, H, T, T)`.
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # as the caller passed it
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if of_documents is not None:
        # The sum S over documents becomes S^scale: so each of its terms is multiplied by S^(scale - 1).
        sharp = (scores / temperature).masked_fill(~of_documents, -torch.inf)
        total = sharp.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
        scores = torch.where(of_documents, sharp + (scale - 1) * total, scores)
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("parallel_encoding", parallel_encoding)
AttentionMaskInterface.register("parallel_encoding", eager_mask)

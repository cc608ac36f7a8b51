# SPDX-License-Identifier: Apache-2.0
"""Documents packed in one row."""

from transformers import DataCollatorWithFlattening

from helpers.models import make_ids
from modeling_memory_mosaic.ops_memory_mosaic import CHUNK_LENGTH


LENGTHS = [3, 1, 1, CHUNK_LENGTH + 5, 2, 9]


def make_documents(lengths=LENGTHS):
    return [make_ids(length, seed=seed) for seed, length in enumerate(lengths)]


def pack(documents, **options):
    """One row `(1, T)` of documents with what marks them, as the library's collator makes it."""
    collator = DataCollatorWithFlattening(**options)
    return collator([{"input_ids": document.tolist()} for document in documents])

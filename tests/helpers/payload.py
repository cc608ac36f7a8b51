# SPDX-License-Identifier: Apache-2.0
"""The files that travel with a saved model."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


PACKAGE = Path(__file__).resolve().parents[2] / "modeling_memory_mosaic"


def code_of(name: str) -> tuple[str, ...]:
    """Return the names of a model's file and of all files that it imports, as the library collects them."""
    path = PACKAGE / name
    return tuple(sorted({name} | {Path(needed).name for needed in get_relative_import_files(path)}))


PAYLOAD = code_of("modeling_memory_mosaic.py")
# Memory models, continuous models and v2 import the mosaic, so that their payloads hold its code too.
MEMORY_MODEL_PAYLOAD = code_of("modeling_memory_model.py")
CONTINUOUS_PAYLOAD = code_of("modeling_continuous_memory_mosaic.py")
V2_PAYLOAD = code_of("modeling_memory_mosaic_v2.py")
WHOLE_PAYLOAD = tuple(sorted({*MEMORY_MODEL_PAYLOAD, *CONTINUOUS_PAYLOAD, *V2_PAYLOAD}))

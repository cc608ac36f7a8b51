# SPDX-License-Identifier: Apache-2.0
"""A short run of a memory model in stages."""

from training.paths import CONFIGURATION
from training.recipe import load_recipe


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_persistent_slots": 8}


SMALL = {
    "model_args": {"encoder": SIZES, "decoder": SIZES, "chunk_length": 4},
    "data": {
        "context_length": 16,
        "train": {"source": "embedded", "num_stories": 8},
        "validation": {"source": "embedded", "split": "validation", "num_stories": 2},
    },
    "training": {
        "per_device_train_batch_size": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
    },
}


STAGES = [
    {"name": "autoencoder", "objectives": {"autoencoding": 1.0}, "steps": 4},
    {"name": "combined", "objectives": {"causal": 1.0, "copy": 0.5}, "freeze_encoder": True, "steps": 4},
    {
        "name": "probe",
        "objectives": {"autoencoding": 1.0},
        "freeze_encoder": True,
        "new_decoder": True,
        "steps": 2,
    },
]


def read_memory_recipe(tmp_path, **settings):
    settings = {"output_dir": str(tmp_path / "run"), "stages": STAGES} | settings
    return load_recipe(CONFIGURATION / "recipe" / "memory_characters.yaml", settings=[SMALL, settings])

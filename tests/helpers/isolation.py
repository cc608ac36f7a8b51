# SPDX-License-Identifier: Apache-2.0
"""Scripts in a process that knows nothing of this project."""

import os
import subprocess
import sys

import torch


def run_clean(script: str, *arguments: str) -> str:
    """Run a script in the folder `/`, without PYTHONPATH, network or cache.

    Args:
        script: Python code.
        arguments: those that the script reads from `sys.argv`; the last is a folder for the cache of Hugging Face.

    Returns:
        What the script printed.
    """
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HF_HOME": arguments[-1]}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # the last bit of a sum may depend on it
    process = subprocess.run(
        [sys.executable, "-I", "-c", script, *arguments],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout

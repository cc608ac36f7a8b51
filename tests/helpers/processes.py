# SPDX-License-Identifier: Apache-2.0
"""Commands and scripts in processes of their own."""

import os
import subprocess
import sys

from training.paths import CLONE


def run_on_two_processes(script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments)], env=environment, capture_output=True, text=True)


def call(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=CLONE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def launch_command(configuration, *arguments, processes=1):
    """Return the arguments of Python that run the command line on several processes."""
    configuration = ["--config_file", f"configuration/accelerate/{configuration}.yaml", "--mixed_precision", "no"]
    processes = ["--num_processes", str(processes), "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *configuration, *processes, "-m", "training", *arguments]


def launch(configuration, *arguments, processes=1):
    return call(*launch_command(configuration, *arguments, processes=processes))

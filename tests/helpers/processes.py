# SPDX-License-Identifier: Apache-2.0
"""Commands and scripts in processes of their own."""

import os
import subprocess
import sys

from training.paths import CLONE


def run_on_two_processes(script, *arguments):
    return run_on_processes(2, script, *arguments)


def run_on_processes(number, script, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command.append(str(script))
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
    """Return the arguments of Python that run the command line on several processes; CPUs shard models too."""
    text = (CLONE / "configuration" / "accelerate" / f"{configuration}.yaml").read_text(encoding="utf-8")
    module = "helpers.sharded_on_cpu" if "distributed_type: FSDP" in text else "training"
    configuration = ["--config_file", f"configuration/accelerate/{configuration}.yaml", "--mixed_precision", "no"]
    processes = ["--num_processes", str(processes), "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *configuration, *processes, "-m", module, *arguments]


def launch(configuration, *arguments, processes=1):
    """Run a command of `training` by a configuration of Accelerate."""
    command = launch_command(configuration, *arguments, processes=processes)
    return call(*command, PYTHONPATH=f"{CLONE}{os.pathsep}{CLONE / 'tests'}")

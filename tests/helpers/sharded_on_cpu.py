# SPDX-License-Identifier: Apache-2.0
"""`python -m training` with an Accelerate that takes CPUs for GPUs: on CPUs it shards no model, and shares no text.

`accelerate launch` reads the same configuration as for GPUs; collectives are those of gloo.
"""

import os
import runpy

import torch.distributed
from accelerate.state import DistributedType, PartialState


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")
    runpy.run_module("training", run_name="__main__", alter_sys=True)

# SPDX-License-Identifier: Apache-2.0
"""Models compiled by a backend that counts graphs."""

import torch

from helpers.models import make_ids


def make_inputs(batch_size, num_tokens, masked):
    """Ids, and a mask under which the first row is padded on the left by half."""
    inputs = {"input_ids": make_ids(batch_size, num_tokens)}
    if masked:
        inputs["attention_mask"] = torch.ones(batch_size, num_tokens, dtype=torch.long)
        inputs["attention_mask"][0, : num_tokens // 2] = 0
    return inputs


class Compiles:
    """A backend that runs the graph as it is and counts how many it got."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward

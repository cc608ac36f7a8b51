# SPDX-License-Identifier: Apache-2.0
"""What a model needs does not grow with the square of a text, nor with text times vocabulary where that is avoided."""

import pytest
import torch
from helpers.models import make_ids, make_model
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache


class LargestTensor(TorchDispatchMode):
    """Knows the number of elements of the largest tensor that is made within."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > 0:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch before 2.13 has no chunked loss")
def test_a_loss_without_logits_never_holds_all_of_them():
    model, ids = make_model(vocab_size=5000), make_ids(4, 64)
    largest = []
    for skip_logits in (False, True):
        with LargestTensor() as tensors:
            model(ids, labels=ids, skip_logits=skip_logits, use_cache=False).loss.backward()
        largest.append(tensors.numel)
    assert largest[0] >= ids.numel() * 5000 > 2 * largest[1]


@pytest.mark.parametrize("case", ["plain", "padded", "packed", "chunk behind a memory", "static", "dropout"])
def test_no_tensor_of_all_tokens_by_all_tokens_is_made(case):
    """On a CPU, whatever masks the text: neither scores nor masks."""
    num_tokens = 1500
    model = make_model(attention_dropout=0.1 if case == "dropout" else 0.0, hidden_dropout=0.0)
    ids, inputs = make_ids(1, num_tokens), {"use_cache": False}
    if case == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][:, :5] = 0
    if case == "packed":
        inputs["position_ids"] = torch.arange(num_tokens)[None] % 700
    if case == "dropout":
        model.train()
    if case == "chunk behind a memory":
        cache = model(ids[:, :700]).past_key_values
        ids, inputs = ids[:, 700:], {"past_key_values": cache}
    if case == "static":
        cache = StaticCache(model.config, max_cache_len=num_tokens + 10)
        inputs = {"past_key_values": cache}
    with LargestTensor() as tensors:
        loss = model(ids, labels=ids, **inputs).loss
        if case not in ("chunk behind a memory", "static"):
            loss.backward()
    assert tensors.numel < num_tokens * num_tokens / 4

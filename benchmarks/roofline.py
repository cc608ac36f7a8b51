# SPDX-License-Identifier: Apache-2.0
"""What bounds a step: the matrix products that it takes, alone, and the rate at which memory is read.

A step cannot be faster than its products. So where a ratio falls short, the share of the products in the step says how
much could be won at all.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


# A batched product: matrices, rows, inner width, columns.
Product = tuple[int, int, int, int]
# Where the two factors stand among the arguments.
FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
# Products that fused attention makes, in the forward and the backward pass, which computes the scores again.
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
ATTENTION = {FLASH: 2, f"{FLASH}_backward": 5}


class _Products(TorchDispatchMode):
    """Counts the matrix products of what runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if name in FACTORS:
            left, right = args[FACTORS[name] : FACTORS[name] + 2]
            matrices = left.shape[0] if left.ndim == 3 else 1
            self.counts[matrices, left.shape[-2], left.shape[-1], right.shape[-1]] += 1
        if name in ATTENTION:
            is_backward = name.endswith("backward")
            query, key = args[is_backward : is_backward + 2]
            # Arguments behind the tensors: dropout, then whether the attention is causal, which halves the scores.
            flags = [argument for argument in args if isinstance(argument, bool)] + [kwargs.get("is_causal", False)]
            num_keys = key.shape[2] // 2 if any(flags) else key.shape[2]
            shape = (query.shape[0] * query.shape[1], query.shape[2], query.shape[3], num_keys)
            self.counts[shape] += ATTENTION[name]
        return func(*args, **kwargs)


def products_of(step: Callable[[], Any]) -> Counter[Product]:
    """Return the matrix products of a step, with how often each is made."""
    with _Products() as products:
        step()
    return products.counts


def seconds_of(products: Counter[Product], repeats: int = 5) -> float:
    """Return the seconds that the products take alone: for each the median of several times."""
    total = 0.0
    for (matrices, rows, inner, columns), count in products.items():
        left, right = torch.randn(matrices, rows, inner), torch.randn(matrices, inner, columns)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.bmm(left, right)
            times.append(time.perf_counter() - start)
        total += count * statistics.median(times[1:])
    return total


def read_rate(num_bytes: int = 2**28, repeats: int = 5) -> float:
    """Return the bytes per second at which a sum reads memory that lies in no cache."""
    numbers = torch.zeros(num_bytes // 4)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return num_bytes / min(times)

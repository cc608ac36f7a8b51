# SPDX-License-Identifier: Apache-2.0
"""What bounds a step: its matrix products at the best rate of this machine, and the rate at which memory is read.

No step can be faster than its products. So where a ratio falls short, their share of the step says how much could be
won at all.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, mm_flop


aten = torch.ops.aten


def _attention_flops(num_products: int, first: int) -> Callable[..., int]:
    """Return the formula of a fused attention that makes so many products, its query being argument `first`."""

    def count(*arguments: Any, is_causal: bool = False, **_: Any) -> int:
        (batch_size, heads, num_queries, width), (_, _, num_keys, _) = arguments[first : first + 2]
        is_causal |= any(argument is True for argument in arguments)
        product = bmm_flop((batch_size * heads, num_queries, width), (batch_size * heads, width, num_keys))
        return num_products * product // (2 if is_causal else 1)

    return count


# What torch's counter does not know. The backward pass of fused attention computes the scores again.
FORMULAS = {
    aten.addmm_: lambda _, left, right, **options: mm_flop(left, right),
    aten.baddbmm_: lambda _, left, right, **options: bmm_flop(left, right),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2, first=0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flops(5, first=1),
}


def flops_of(step: Callable[[], Any]) -> int:
    """Return the floating-point operations of the matrix products that a step makes on a CPU."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    return counter.get_total_flops()


def _best_seconds(task: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def product_rate(width: int = 1024, repeats: int = 10) -> float:
    """Return the floating-point operations per second of a product of two square matrices in float32."""
    left, right = torch.randn(width, width), torch.randn(width, width)
    return mm_flop(left.shape, right.shape) / _best_seconds(lambda: left @ right, repeats)


def read_rate(num_bytes: int = 2**28, repeats: int = 5) -> float:
    """Return the bytes per second at which a sum reads memory that lies in no cache."""
    numbers = torch.zeros(num_bytes // 4)
    return num_bytes / _best_seconds(numbers.sum, repeats)

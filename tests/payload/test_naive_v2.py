# SPDX-License-Identifier: Apache-2.0
"""The oracle of Memory Mosaics v2 against numbers computed by hand from the paper's equations."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from modeling_memory_mosaic.configuration_memory_mosaic_v2 import MemoryMosaicV2Config
from modeling_memory_mosaic.naive_memory_mosaic_v2 import (
    long_term_pairs,
    naive_bandwidth,
    naive_gated_keys,
    naive_head,
    naive_value,
    short_term_pairs,
)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("num_pairs", "beta"), [(1, 8.96), (256, 32.9), (4096, 76.2), (32768, 147.9)])
def test_the_bandwidth_starts_at_the_paper_s_values(num_pairs, beta):
    """Table 6: both thetas of beta start at 1.5 and that of alpha at 1/3, so that beta = e^1.5 (n^(1/3) + 1)."""
    start = naive_bandwidth(num_pairs, *numbers(1.5, 1.5, 1 / 3))
    assert start.item() == pytest.approx(beta, rel=2e-3)
    assert start.item() == pytest.approx(math.exp(1.5) * (num_pairs ** (1 / 3) + 1))


def test_the_bandwidth_is_bounded():
    assert naive_bandwidth(4, *numbers(50.0, -math.inf, -7.0)).item() == pytest.approx(4 * math.exp(10))
    assert naive_bandwidth(4, *numbers(0.0, 0.0), None).item() == 2


def test_a_key_is_the_direction_of_gated_sums():
    """s_0 = 2 (1, 0); s_1 = 3 (0, 1) + s_0 / 2 = (1, 3); s_2 = 0 + s_1 / 4, which has the same direction."""
    states = numbers(1, 0, 0, 1, 0, 0).view(3, 2)
    gates, leaks = numbers(2, 3, 1).log(), numbers(1, -math.log(2), math.log(4))
    expected = torch.stack([numbers(1, 0), numbers(1, 3) / math.sqrt(10), numbers(1, 3) / math.sqrt(10)])
    torch.testing.assert_close(naive_gated_keys(states, gates, leaks), expected)


def test_a_value_looks_at_the_next_token():
    """(1/4) (4, 0) + (3/4) (0, 4) = (1, 3), scaled to e^|theta|."""
    states = numbers(4, 0, 0, 4).view(2, 2)
    value = naive_value(states, 0, numbers(-math.log(2))[0], numbers(0.25)[0])
    torch.testing.assert_close(value, 2 * numbers(1, 3) / math.sqrt(10))


def test_which_pairs_a_token_reads():
    """In the paper's counting from 1, token 5 of window 3 reads pairs 3 and 4, and with delay 2 pairs 1 to 3."""
    assert [list(pairs) for pairs in short_term_pairs(5, window=3)] == [[], [0], [0, 1], [1, 2], [2, 3]]
    assert [list(pairs) for pairs in long_term_pairs(5, delay=2)] == [[], [], [0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(("counts_all", "num_pairs"), [(False, 1), (True, 2)])
def test_a_head_smooths_over_the_pairs_that_a_token_reads(counts_all, num_pairs):
    """The last of three tokens reads the pair of the first alone, or the pair of a joined text besides."""
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0]]
    v_states = numbers(1, 0, 0, 0, 0, 1, 0, 0, 1).view(3, 3)
    visible, theta = [range(0), range(0), range(1)], (*numbers(0.0, -math.inf), numbers(1.0)[0])
    options = {"bandwidth": theta, "value_scale": numbers(0.0)[0], "value_mix": numbers(1.0)[0]}
    retrieved = naive_head(keys, v_states, visible, **options, counts_all=counts_all)
    torch.testing.assert_close(retrieved, torch.stack([numbers(0, 0, 0), numbers(0, 0, 0), numbers(1, 0, 0)]))
    other = ([numbers(0, 1, 0)], [numbers(0, 1, 0)])
    joined = naive_head(keys, v_states, visible, **options, counts_all=counts_all, pairs=other)
    weight = 1 / (1 + math.exp(-(num_pairs + 1)))  # beta is the number of pairs, and the scores are beta and 0
    torch.testing.assert_close(joined[2], numbers(weight, 1 - weight, 0))
    torch.testing.assert_close(joined[0], numbers(0, 1, 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"short_term_window": 1}, "short_term_window=1 must be at least 2"),
        ({"long_term_delay": 0}, "long_term_delay=0 must be positive"),
        ({"long_term_delay_range": (4, 2)}, "must be two rising numbers"),
        ({"long_term_delay_range": (0, 2)}, "must be two rising numbers"),
        ({"norm_type": "none"}, "norm_type='none' is not one of rms_norm, layer_norm"),
        ({"bandwidth_count": "seen"}, "bandwidth_count='seen' is not one of visible, total"),
        ({"num_short_term_heads": 0, "num_long_term_heads": 0}, "needs short-term or long-term heads"),
        ({"attention_dropout": 1.0}, r"must lie in \[0, 1\)"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "not a multiple of num_attention_heads=3"),
    ],
    ids=str,
)
def test_configurations_of_no_model_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MemoryMosaicV2Config(**fields)

# SPDX-License-Identifier: Apache-2.0
"""Observations of three moons, from the paper's section on predictive disentanglement, and their periods.

A system has three moons on circles. An observation is the sine and cosine of each, `(6,)`; lengths are counted in
observations. At time 0 every moon has the same phase, so a system is one trajectory. A sample is a window of it that
starts at random.
"""

import math

import torch


AMPLITUDE = 1.0  # of each coordinate of a moon
# With the validation triple, nine triples of the periods 0.5, 1, .. 3.5 with the smallest common periods (2, 3, 3, 3,
# 3, 5, 6, 6, 6). More triples have the common period 6: the three of them here are a choice.
TRAINING_TRIPLES = (
    (0.5, 1.0, 2.0),
    (0.5, 1.0, 1.5),
    (0.5, 1.0, 3.0),
    (0.5, 1.5, 3.0),
    (1.0, 1.5, 3.0),
    (0.5, 1.0, 2.5),
    (1.0, 1.5, 2.0),
    (0.5, 1.5, 2.0),
)
VALIDATION_TRIPLE = (1.0, 2.0, 3.0)
LARGEST_COMMON_PERIOD = 6
CYCLES_IN_A_WINDOW = 3  # of the largest common period
FIRST_PHASE = 0.3  # of all moons at time 0, in radians
TRAJECTORY_LENGTH = 10_000  # observations; windows lie within
NUM_MOONS = 3


def common_period(periods: tuple[float, ...]) -> float:
    """Return the time after which all moons stand as before. Periods are multiples of one half."""
    return math.lcm(*(round(2 * period) for period in periods)) / 2


def observations_per_unit(length: int) -> float:
    """Return observations per unit of time: a window of `length` then shows the largest common period three times."""
    return length / LARGEST_COMMON_PERIOD / CYCLES_IN_A_WINDOW


def landmarks(periods: tuple[float, ...], length: int) -> list[float]:
    """Return the three periods, shortest first, and the common one, in observations."""
    return [time * observations_per_unit(length) for time in (*sorted(periods), common_period(periods))]


def observe(periods: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Return windows of trajectories.

    Args:
        periods (`torch.Tensor` of shape `(B, 3)`): of the moons of each row, in units of time.
        starts (`torch.Tensor` of shape `(B,)`): first observation of each row, counted from time 0.
        length: observations of a window; it also sets how many observations a unit of time has.

    Returns:
        observations `(B, length, 6)`: sine and cosine of the first moon, then of the second and third.
    """
    steps = starts[:, None] + torch.arange(length)
    turns = steps[..., None].double() / observations_per_unit(length) / periods[:, None].double()
    phases = FIRST_PHASE + 2 * math.pi * turns
    return torch.stack([phases.sin(), phases.cos()], dim=-1).flatten(2).float()


def draw_starts(shape: tuple[int, ...], length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw starts of windows that lie within the trajectory."""
    return torch.randint(TRAJECTORY_LENGTH - length + 1, shape, generator=generator)


def draw_windows(periods: tuple[float, ...], num_windows: int, length: int, seed: int) -> torch.Tensor:
    """Draw windows `(num_windows, length, 6)` of one system, always the same for a seed."""
    starts = draw_starts((num_windows,), length, torch.Generator().manual_seed(seed))
    return observe(torch.tensor(periods).expand(num_windows, -1), starts, length)


class TrainingWindows:
    """Batches of a training: each row is a random window of a random training system.

    Everything is drawn in advance, so that an interrupted training sees the same batches as an uninterrupted one.
    """

    def __init__(self, num_batches: int, batch_size: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_batches, batch_size)
        self.systems = torch.randint(len(TRAINING_TRIPLES), shape, generator=generator)
        self.starts = draw_starts(shape, length, generator)
        self.length = length

    def __getitem__(self, step: int) -> torch.Tensor:
        """Return the batch `(batch_size, length, 6)` of step `step`, counted from 0."""
        return observe(torch.tensor(TRAINING_TRIPLES)[self.systems[step]], self.starts[step], self.length)

"""Interleaved rounds, and the medians, spreads and ratios that are taken from them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch
from torch import distributed as dist

LEAST = 3

Sample = dict[str, float]
"""What one trial of one round measured, by name."""

Rounds = dict[str, list[Sample]]
"""Every trial's samples, in the order of the rounds."""


class Trial(Protocol):
    """Something that is measured in every round."""

    @property
    def name(self) -> str:
        """What the tables call it."""
        ...

    def measure(self, number: int) -> Sample:
        """Run once; ``number`` is never the same twice."""
        ...


def slowest(sample: Sample) -> Sample:
    """The maxima over ranks (a collective)."""
    if dist.get_world_size() == 1:
        return sample
    values = torch.tensor([sample[key] for key in sorted(sample)], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return dict(zip(sorted(sample), values.tolist(), strict=True))


def interleave(
    trials: Sequence[Trial], *, repeats: int, seconds: float, warm: int = 1, first: int = 0
) -> Rounds:
    """Measure all trials round by round, so that what disturbs one disturbs its neighbours.

    Args:
        trials: the same ones on every rank.
        repeats: rounds to aim at.
        seconds: once they are over (and :data:`LEAST` rounds done), no further round begins.
        warm: rounds before that, which plan, allocate and warm caches, and do not count.
        first: number of the first round.
    """
    rounds: Rounds = {trial.name: [] for trial in trials}
    for number in range(first, first + warm):
        for trial in trials:
            trial.measure(number)
    began = time.perf_counter()
    for number in range(repeats):
        # Each round begins with another trial, so that none always follows the same one.
        shift = number % len(trials)
        for trial in (*trials[shift:], *trials[:shift]):
            sample = slowest(trial.measure(first + warm + number))
            rounds[trial.name].append(sample)
        spent = slowest({"spent": time.perf_counter() - began})["spent"]
        if number + 1 >= LEAST and spent > seconds:
            break
    return rounds


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it, and how many samples it is of."""

    middle: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0], len(values))
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high, len(values))

    def to_json(self) -> dict[str, float]:
        """The spread, rounded to what a reader can use."""
        return {
            "median": round(self.middle, 4),
            "quartile_low": round(self.low, 4),
            "quartile_high": round(self.high, 4),
            "count": self.count,
        }


def values_of(rounds: Mapping[str, Sequence[Sample]], name: str, key: str) -> list[float]:
    """One measured quantity of one trial, over the rounds."""
    return [sample[key] for sample in rounds[name]]


def ratio(
    rounds: Mapping[str, Sequence[Sample]], over: tuple[str, str], under: tuple[str, str]
) -> Spread:
    """The spread of a quotient that is taken within each round.

    Args:
        rounds: the samples.
        over: (trial, quantity) above the line.
        under: (trial, quantity) below it.
    """
    pairs = zip(values_of(rounds, *over), values_of(rounds, *under), strict=True)
    return Spread.of([above / below for above, below in pairs])

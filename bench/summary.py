"""Medians, spread and paired ratios of samples; does no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import mean, median, stdev

# Student's t, two-sided 95 %, by degrees of freedom; beyond the table the normal distribution's.
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
Z95 = 1.96


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with the lowest and highest value."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of paired ratios; `interval`: 95 % of their geometric mean, None for one pair."""

    median: float
    interval: tuple[float, float] | None


def spread(values: Sequence[float]) -> Spread:
    """Summarise the rounds of one variant."""
    return Spread(median(values), min(values), max(values))


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Compare two variants round by round; all values are positive."""
    ratios = [value / base for value, base in zip(values, baseline)]
    if len(ratios) < 2:
        return Ratio(median(ratios), None)
    logs = [log(ratio) for ratio in ratios]
    t = T95[len(logs) - 2] if len(logs) - 2 < len(T95) else Z95
    half = t * stdev(logs) / sqrt(len(logs))
    return Ratio(median(ratios), (exp(mean(logs) - half), exp(mean(logs) + half)))

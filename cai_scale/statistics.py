"""Statistics behind the figures: how one vector follows another, a share's interval. No torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

Z = 1.959963984540054  # a standard normal variable is within ±Z in 95 % of cases


def pearson(a: Array, b: Array) -> float:
    """Pearson's correlation of two vectors; NaN where one is constant, or they are too short."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: Array, b: Array) -> float:
    """Spearman's rank correlation of two vectors; NaN as of `pearson`."""
    return pearson(ranks(a), ranks(b))


def order_agreement(expected: Array, found: Array) -> float:
    """The share of the pairs that `expected` orders which `found` orders alike; NaN for none."""
    above = np.sign(expected[:, None] - expected[None, :])
    alike = above == np.sign(found[:, None] - found[None, :])
    ordered = above != 0
    return float(alike[ordered].mean()) if ordered.any() else float("nan")


def ranks(values: Array) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs. NaN stays NaN."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    found = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return np.where(np.isnan(values), np.nan, found)


def wilson(successes: float, n: int) -> list[float] | None:
    """Wilson's 95 % score interval for a share, which stays inside [0, 1] and is right for few.

    It holds every p that a test of p̂ = successes ÷ n at 5 % does not refuse,
    |p̂ − p| ≤ z √(p (1 − p) ÷ n), whose ends are
    (p̂ + z² ÷ 2n ± z √(p̂ (1 − p̂) ÷ n + z² ÷ 4n²)) ÷ (1 + z² ÷ n).
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal
    of the American Statistical Association 22 (1927), 209–212.

    Args:
        successes: in [0, n]. Halves are taken as they are; the interval is then rather too wide,
            as half a success varies less than a coin.

    Returns:
        Lower and upper end; None for n = 0.
    """
    if n == 0:
        return None
    centre = (successes + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * np.sqrt(successes * (n - successes) / n + Z**2 / 4)
    return [round(max(0.0, float(centre - half)), 6), round(min(1.0, float(centre + half)), 6)]


def rounded(value: float) -> float | None:
    """Six decimals; None for NaN, which JSON does not have."""
    return None if np.isnan(value) else round(float(value), 6)

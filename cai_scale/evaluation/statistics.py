"""How well one vector of numbers follows another. No torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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

"""What two figures of each prompt, before and after, come to. No torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.critics import Critic
from cai_scale.evaluation.compare import interval


def paired(rows: Iterable[tuple[float | None, float | None]]) -> dict[str, Any]:
    """The means before and after, and Δ with its paired bootstrap interval.

    Args:
        rows: (before, after), one a prompt; a row with None is left out, and `n` counts the others.

    Returns:
        n, before, after, delta, ci95: None where there are too few prompts to say.
    """
    given = [row for row in rows if None not in row]
    before, after = np.array(given, np.float64).reshape(-1, 2).T
    return {
        "n": len(given),
        "before": _mean(before),
        "after": _mean(after),
        "delta": _mean(after - before),
        "ci95": interval(after - before),
    }


def paired_scores(
    critic: Critic, prompts: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> dict[str, Any]:
    """`paired` of a critic's overall scores of two answers to each prompt."""
    scores = zip(critic.score(prompts, before), critic.score(prompts, after), strict=True)
    return paired((b.overall if b else None, a.overall if a else None) for b, a in scores)


def _mean(values: NDArray[np.float64]) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None

"""What the pairs are made of, in numbers that show a confounded label."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cai_scale.errors import DataError
from cai_scale.records import Candidate, Pair


def audit(pairs: Sequence[Pair], account: dict[str, Any]) -> dict[str, Any]:
    """Figures over the pairs, beside the account of what was dropped.

    `chosen_cooler` is the share of pairs across two temperatures whose chosen answer was
    sampled at the lower one: far from ½, the pairs teach the temperature. The length figures
    count words: a chosen answer that is mostly the longer one teaches length.
    """
    mixed = [p for p in pairs if p.chosen.temperature != p.rejected.temperature]
    longer = [p for p in pairs if _words(p.chosen) > _words(p.rejected)]
    return {
        "schema": 1,
        **account,
        "languages": dict(Counter(pair.language for pair in pairs)),
        "mean_gap": _mean([p.chosen.score - p.rejected.score for p in pairs]),
        "chosen_cooler": _mean([p.chosen.temperature < p.rejected.temperature for p in mixed]),
        "chosen_longer": len(longer) / len(pairs) if pairs else None,
        "chosen_words": _mean([_words(p.chosen) for p in pairs]),
        "rejected_words": _mean([_words(p.rejected) for p in pairs]),
        "chosen_revised": _mean([p.chosen.revised for p in pairs]),
        "rejected_revised": _mean([p.rejected.revised for p in pairs]),
    }


def require_enough(pairs: Sequence[Pair], minimum: int, figures: dict[str, Any]) -> None:
    """Refuse to train on fewer pairs than one batch.

    Raises:
        DataError: with the counts, and what would give more pairs.
    """
    if len(pairs) < minimum:
        raise DataError(
            f"{len(pairs)} pairs from {figures['prompts']} prompts, under the batch size "
            f"{minimum}; start again with --overwrite and a lower --margin or --batch_size, more "
            f"--samples, or more prompts (dropped: {figures['dropped']}, unpaired: "
            f"{figures['unpaired']})"
        )


def _words(candidate: Candidate) -> int:
    return len(candidate.text.split())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

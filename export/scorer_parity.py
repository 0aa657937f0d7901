"""The gate of a scorer: its graphs must score and order texts as the reward model does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import GateError
from cai_scale.evaluation.statistics import order_agreement, spearman
from cai_scale.runtime.graph import pad
from cai_scale.runtime.reward import ScorerGraph

from .parity import MAX_DELTA
from .reward import scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = NDArray[np.float32]

MIN_SPEARMAN = 0.99  # quantised against torch, for each label
MIN_ORDER = 0.95  # of all pairs of texts, in the same order
MIN_TEXTS = 100
BATCH = 6


@dataclass(frozen=True)
class Case:
    """How the rows of a batch lie: alone, or together and padded on one side."""

    name: str
    rows: int
    left: bool


CASES = (Case("alone", 1, True), Case("left", BATCH, True), Case("right", BATCH, False))


def check_exact(
    path: Path, model: "PreTrainedModel", sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare the fp32 graph with torch: rows alone, and padded on either side.

    Raises:
        GateError: a score differs by more than `MAX_DELTA`.
    """
    graph, expected = ScorerGraph(path), scores(model, sequences).numpy()
    deltas = {case.name: _largest(_run(graph, sequences, case) - expected) for case in CASES}
    worst = float(np.max(list(deltas.values())))
    if not worst <= MAX_DELTA:  # so that a NaN fails
        raise GateError(
            f"the reward model's fp32 graph differs from torch by {worst:.2e}, over "
            f"{MAX_DELTA:.0e}: {deltas}; no bundle was written"
        )
    return {"max_abs_delta": deltas, "bound": MAX_DELTA, "texts": len(sequences)}


def check_close(
    path: Path, model: "PreTrainedModel", sequences: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare a quantised graph with torch: how far its scores are, and whether it orders texts
    alike; and how far a row's score moves when it is padded in a batch.

    Raises:
        GateError: a bound does not hold, or there are too few texts to say.
    """
    if len(sequences) < MIN_TEXTS:
        raise GateError(f"{len(sequences)} texts are too few for parity, under {MIN_TEXTS}")
    graph, expected = ScorerGraph(path), scores(model, sequences).numpy()
    found = {case.name: _run(graph, sequences, case) for case in CASES}
    alone = found["alone"]
    figures: dict[str, Any] = {
        "texts": len(sequences),
        "max_abs_delta": {name: _largest(values - expected) for name, values in found.items()},
        "alone_against_batch": max(_largest(found[side] - alone) for side in ("left", "right")),
        # numpy's min, unlike Python's, lets a NaN through, and the comparison below then fails.
        "spearman": float(np.min([spearman(*pair) for pair in _labels(expected, found)])),
        "order": float(np.min([order_agreement(*pair) for pair in _labels(expected, found)])),
        "bounds": {"spearman": MIN_SPEARMAN, "order": MIN_ORDER, "texts": MIN_TEXTS},
    }
    if not (figures["spearman"] >= MIN_SPEARMAN and figures["order"] >= MIN_ORDER):
        raise GateError(
            f"the 8-bit reward model: Spearman {figures['spearman']:.4f} (at least "
            f"{MIN_SPEARMAN}), order {figures['order']:.4f} (at least {MIN_ORDER}) over "
            f"{len(sequences)} texts; no bundle was written"
        )
    return figures


def _labels(expected: Array, found: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    """What torch and the graph say, label by label and however the rows lie."""
    return [(a, b) for values in found.values() for a, b in zip(expected.T, values.T, strict=True)]


def _run(graph: ScorerGraph, sequences: Sequence[Sequence[int]], case: Case) -> Array:
    starts = range(0, len(sequences), case.rows)
    batches = (sequences[start : start + case.rows] for start in starts)
    return np.concatenate([graph.run(*pad(batch, left=case.left)) for batch in batches])


def _largest(deltas: Array) -> float:
    return float(np.abs(deltas).max())

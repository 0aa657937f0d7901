"""The gate of a scorer: its graphs must score and order texts as the reward model does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import GateError
from cai_scale.runtime.graph import pad
from cai_scale.runtime.reward import ScorerGraph
from cai_scale.statistics import order_agreement, spearman

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


class Texts:
    """Sequences, and what torch says of them: [sequences, labels]."""

    def __init__(self, model: "PreTrainedModel", sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = sequences
        self.expected: Array = scores(model, sequences).numpy()


def check_exact(kind: str, path: Path, texts: Texts) -> dict[str, Any]:
    """Compare an fp32 graph with torch: rows alone, and padded on either side, or on the right
    alone where it is fused.

    Args:
        kind: of the graph, "graph" or "fused".

    Raises:
        GateError: a score differs by more than `MAX_DELTA`.
    """
    found = _run(kind, path, texts)
    deltas = {case: _largest(values - texts.expected) for case, values in found.items()}
    worst = float(np.max(list(deltas.values())))
    if not worst <= MAX_DELTA:  # so that a NaN fails
        raise GateError(
            f"the reward model's fp32 {kind} differs from torch by {worst:.2e}, over "
            f"{MAX_DELTA:.0e}: {deltas}; no bundle was written"
        )
    return {"max_abs_delta": deltas, "bound": MAX_DELTA, "texts": len(texts.sequences)}


def check_close(kind: str, path: Path, texts: Texts) -> dict[str, Any]:
    """Compare a quantised graph with torch: how far its scores are, and whether it orders texts
    alike; and how far a row's score moves when it is padded in a batch.

    Args:
        kind: as of `check_exact`.

    Raises:
        GateError: a bound does not hold, or there are too few texts to say.
    """
    count = len(texts.sequences)
    if count < MIN_TEXTS:
        raise GateError(f"{count} texts are too few for parity, under {MIN_TEXTS}")
    found, expected = _run(kind, path, texts), texts.expected
    alone = found["alone"]
    figures: dict[str, Any] = {
        "texts": count,
        "max_abs_delta": {case: _largest(values - expected) for case, values in found.items()},
        "alone_against_batch": max(_largest(values - alone) for values in found.values()),
        # numpy's min, unlike Python's, lets a NaN through, and the comparison below then fails.
        "spearman": float(np.min([spearman(*pair) for pair in _labels(expected, found)])),
        "order": float(np.min([order_agreement(*pair) for pair in _labels(expected, found)])),
        "bounds": {"spearman": MIN_SPEARMAN, "order": MIN_ORDER, "texts": MIN_TEXTS},
    }
    if not (figures["spearman"] >= MIN_SPEARMAN and figures["order"] >= MIN_ORDER):
        raise GateError(
            f"the 8-bit reward model's {kind}: Spearman {figures['spearman']:.4f} (at least "
            f"{MIN_SPEARMAN}), order {figures['order']:.4f} (at least {MIN_ORDER}) over "
            f"{count} texts; no bundle was written"
        )
    return figures


def _labels(expected: Array, found: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    """What torch and the graph say, label by label and however the rows lie."""
    return [(a, b) for values in found.values() for a, b in zip(expected.T, values.T, strict=True)]


def _run(kind: str, path: Path, texts: Texts) -> dict[str, Array]:
    """What a graph says of the texts, by the case; a fused one reads no rows padded on the left."""
    graph = ScorerGraph(path)
    cases = [case for case in CASES if case.name != "left" or kind != "fused"]
    return {case.name: _in_batches(graph, texts.sequences, case) for case in cases}


def _in_batches(graph: ScorerGraph, sequences: Sequence[Sequence[int]], case: Case) -> Array:
    starts = range(0, len(sequences), case.rows)
    batches = (sequences[start : start + case.rows] for start in starts)
    return np.concatenate([graph.run(*pad(batch, left=case.left)) for batch in batches])


def _largest(deltas: Array) -> float:
    return float(np.abs(deltas).max())

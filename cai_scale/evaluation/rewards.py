"""How well a reward model says what the critic says, on held-out answers. No torch."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.constitution import Constitution
from cai_scale.records import Answer
from cai_scale.statistics import pearson, rounded, spearman

BINS = 10

Floats = NDArray[np.float64]


def rewards(
    answers: Sequence[Answer],
    predicted: NDArray[Any],
    labels: Sequence[str],
    *,
    margin: float,
    constitution: Constitution,
    objective: str = "regression",
) -> dict[str, Any]:
    """The figures of a reward model, for `summary.json`; None where there is too little to say.

    Args:
        predicted: [answers, labels], what the head says, without bounds.
        labels: "overall" alone, or each principle; the constitution's mean of these is added.
        margin: pairs of answers to a prompt whose critic's scores are nearer do not count.
        objective: "regression", whose predictions are scores, clipped to [0, 1]; or
            "bradley-terry", of which only differences mean something.

    Returns:
        `n`, and for each of `labels`: `pairs`, their `accuracy` (a tie is half right),
        `spearman`, `pearson`, and the calibration, `bins` and `ece`. A bin holds a tenth of the
        answers, in the order of the prediction: their number `n`, and the means `predicted` and
        `critic`; for bradley-terry a tenth of the pairs, the mean of σ(|Δr|), and how often the
        critic agrees. `ece` is the mean distance of the two, weighted by `n`.
    """
    columns = {label: predicted[:, i].astype(np.float64) for i, label in enumerate(labels)}
    if "overall" not in columns:
        rows = [dict(zip(labels, row, strict=True)) for row in predicted.astype(float).tolist()]
        columns["overall"] = np.array([constitution.overall(row) for row in rows])
    pairs = _pairs(answers)
    return {
        "n": len(answers),
        "objective": objective,
        "margin": margin,
        "labels": {
            label: _figures(column, _critic(answers, label), pairs, margin, objective)
            for label, column in columns.items()
            if all(label == "overall" or label in answer.score.principles for answer in answers)
        },
    }


def print_rewards(summary: Mapping[str, Any]) -> None:
    """Print what `rewards` found: a row a label, and how predictions compare with scores."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=100)
    table = Table(title=f"reward model against the critic, {summary['n']} held-out answers")
    for name in ("", "pairs", "accuracy", "Spearman", "Pearson", "calibration error"):
        table.add_column(name, justify="right" if name else "left")
    for label, figures in summary["labels"].items():
        shown = (_shown(figures[key]) for key in ("accuracy", "spearman", "pearson", "ece"))
        table.add_row(escape(label), str(figures["pairs"]), *shown)
    console.print(table)
    bins = summary["labels"].get("overall", {}).get("bins", [])
    if bins:
        means = "  ".join(f"{bin['predicted']:.2f}→{bin['critic']:.2f}" for bin in bins)
        console.print(f"overall, predicted → critic, by tenths of the prediction: {means}")


def _figures(
    predicted: Floats, critic: Floats, pairs: NDArray[np.int64], margin: float, objective: str
) -> dict[str, Any]:
    gaps = critic[pairs[:, 0]] - critic[pairs[:, 1]]
    # Scores are rounded decimals: a difference of exactly the margin counts.
    apart = (np.abs(gaps) >= margin - 1e-9) & (gaps != 0)
    gaps, differences = gaps[apart], (predicted[pairs[:, 0]] - predicted[pairs[:, 1]])[apart]
    right = np.where(differences == 0, 0.5, np.sign(differences) == np.sign(gaps))
    if objective == "bradley-terry":
        bins = _bins(1 / (1 + np.exp(-np.abs(differences))), right)
    else:
        bins = _bins(np.clip(predicted, 0.0, 1.0), critic)
    return {
        "pairs": len(gaps),
        "accuracy": rounded(right.mean()) if len(right) else None,
        "spearman": rounded(spearman(predicted, critic)),
        "pearson": rounded(pearson(predicted, critic)),
        "ece": _calibration_error(bins),
        "bins": bins,
    }


def _bins(predicted: Floats, observed: Floats) -> list[dict[str, Any]]:
    """Up to `BINS` bins of equal size, by the prediction."""
    order = np.argsort(predicted, kind="stable")
    return [
        {
            "n": len(bin),
            "predicted": rounded(predicted[bin].mean()),
            "critic": rounded(observed[bin].mean()),
        }
        for bin in np.array_split(order, BINS)
        if len(bin)
    ]


def _calibration_error(bins: Sequence[Mapping[str, Any]]) -> float | None:
    if not bins:
        return None
    total = sum(bin["n"] for bin in bins)
    return rounded(sum(bin["n"] * abs(bin["predicted"] - bin["critic"]) for bin in bins) / total)


def _pairs(answers: Sequence[Answer]) -> NDArray[np.int64]:
    """Every two answers to one prompt, [pairs, 2], by their places."""
    places = defaultdict(list)
    for index, answer in enumerate(answers):
        places[answer.prompt.id].append(index)
    found = [pair for group in places.values() for pair in combinations(group, 2)]
    return np.array(found, np.int64).reshape(-1, 2)


def _critic(answers: Sequence[Answer], label: str) -> Floats:
    scores = [answer.score for answer in answers]
    return np.array([s.overall if label == "overall" else s.principles[label] for s in scores])


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

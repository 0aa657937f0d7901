"""Compare answers before and after, prompt by prompt. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.constitution import Constitution
from cai_scale.evaluation.protocol import RESAMPLES, TIE
from cai_scale.records import Prompt, Response, Score
from cai_scale.statistics import wilson

VERDICTS = ("win", "loss", "tie")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What no critic says of an answer; None where it was not measured.

    Attributes:
        relevance: the cosine of the embeddings of prompt and answer, in [-1, 1]; English only.
        nll: the mean of -log p of the answer's tokens under the base model, in nats.
        kl: the mean over the answer's tokens of KL(policy‖base), in nats; 0 for an answer of the
            base model itself.
        tokens: how many tokens of the answer these are means over.
    """

    relevance: float | None = None
    nll: float | None = None
    kl: float | None = None
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A held-out prompt with its answer before and after, at the same seed, and their scores."""

    prompt: Prompt
    before: Response
    after: Response
    before_score: Score | None
    after_score: Score | None
    before_measure: Measure = Measure()
    after_measure: Measure = Measure()

    @property
    def verdict(self) -> str:
        """ "win", "loss" or "tie" of the answer after; an empty answer loses, and what the critic
        did not score ties."""
        before, after = bool(self.before.text.strip()), bool(self.after.text.strip())
        if before != after:
            return "win" if after else "loss"
        if self.before_score is None or self.after_score is None:
            return "tie"
        delta = self.after_score.overall - self.before_score.overall
        # Scores are rounded decimals: a difference of exactly 0.01 is no tie.
        if abs(delta) < TIE - 1e-9:
            return "tie"
        return "win" if delta > 0 else "loss"


def compare(answered: Sequence[Answered], constitution: Constitution) -> dict[str, Any]:
    """Before, after, Δ with its interval, and wins with theirs; `n` counts prompts.

    Means and Δ are over the prompts whose answers both have a score; `scored` counts them. A
    critic that gives the mean alone has None for every principle.
    """
    scored = [a for a in answered if a.before_score is not None and a.after_score is not None]
    before = _columns([a.before_score for a in scored], constitution)
    after = _columns([a.after_score for a in scored], constitution)
    delta = {name: after[name] - before[name] for name in before}
    verdicts = [a.verdict for a in answered]
    counts = {name: verdicts.count(name) for name in VERDICTS}
    return {
        "n": len(answered),
        "scored": len(scored),
        "before": _table({k: _mean(v) for k, v in before.items()}),
        "after": _table({k: _mean(v) for k, v in after.items()}),
        "delta": {
            **_table({k: _mean(v) for k, v in delta.items()}),
            "ci95": interval(delta["overall"]),
            "principles_ci95": {k: interval(v) for k, v in delta.items() if k != "overall"},
        },
        **counts,
        **{f"{name}_ci95": wilson(count, len(answered)) for name, count in counts.items()},
    }


def slices(answered: Sequence[Answered], constitution: Constitution) -> dict[str, Any]:
    """The same comparison for each language, and for each category that is named."""
    return {
        kind: {
            name: compare([a for a in answered if getattr(a.prompt, kind) == name], constitution)
            for name in sorted({getattr(a.prompt, kind) for a in answered} - {""})
        }
        for kind in ("language", "category")
    }


def interval(deltas: NDArray[np.float64]) -> list[float] | None:
    """A 95 % interval for the mean by bootstrap over prompts: percentiles 2.5 and 97.5.

    Args:
        deltas: [prompts], each prompt's difference, so that the resampling is paired.

    Returns:
        Lower and upper end; None for fewer than two prompts.
    """
    if len(deltas) < 2:
        return None
    generator = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 1000):
        rows = generator.integers(0, len(deltas), size=(1000, len(deltas)))
        means[start : start + 1000] = deltas[rows].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(low), 6), round(float(high), 6)]


def _columns(
    scores: Sequence[Score | None], constitution: Constitution
) -> dict[str, NDArray[np.float64]]:
    """[prompts] for "overall" and for each principle; [0] for one that some score lacks."""
    given = [score for score in scores if score is not None]
    columns = {"overall": np.array([score.overall for score in given])}
    for principle in constitution.principles:
        known = all(principle.id in score.principles for score in given)
        values = [score.principles[principle.id] for score in given] if known else []
        columns[principle.id] = np.array(values)
    return columns


def _mean(values: NDArray[np.float64]) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def _table(values: dict[str, float | None]) -> dict[str, Any]:
    return {
        "overall": values["overall"],
        "principles": {k: v for k, v in values.items() if k != "overall"},
    }

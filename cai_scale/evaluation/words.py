"""Which words moved the lexicon's score, and whether longer answers did. No torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_scale.constitution import Constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.evaluation.compare import Answered
from cai_scale.statistics import rounded, spearman

_Term = tuple[str, str, str]  # principle, list, term


def top_words(
    answered: Sequence[Answered], constitution: Constitution, n: int = 12
) -> list[dict[str, Any]]:
    """The terms that moved the lexicon's mean the most, up or down, over the prompts whose answers
    both have text.

    Returns:
        At most `n` of {"term", "principle", "list", "before", "after", "moved"}: how often the
        term, folded, occurs before and after, and its share of Δ overall. The shares of all terms
        add up to Δ: where a principle's sum is clipped, each of its terms counts in proportion.
    """
    critic = LexiconCritic(constitution)
    pairs = [a for a in answered if a.before.text.strip() and a.after.text.strip()]
    before, after = Counter[_Term](), Counter[_Term]()
    moved: dict[_Term, float] = {}
    for a in pairs:
        for text, counts, sign in ((a.before.text, before, -1), (a.after.text, after, 1)):
            found = critic.occurrences(text)
            counts.update(found)
            for term, share in _shares(found, constitution).items():
                moved[term] = moved.get(term, 0.0) + sign * share / len(pairs)
    order = sorted(moved, key=lambda term: (-round(abs(moved[term]), 9), term))
    return [
        {
            "term": term[2],
            "principle": term[0],
            "list": term[1],
            "before": before[term],
            "after": after[term],
            "moved": round(moved[term], 6),
        }
        for term in order[:n]
    ]


def lengths(answered: Sequence[Answered]) -> dict[str, float | None]:
    """Spearman's correlation of Δ overall with the difference in words, over the prompts whose
    answers both have a score; None where one of the two is constant."""
    rows = [
        (
            a.after_score.overall - a.before_score.overall,
            len(a.after.text.split()) - len(a.before.text.split()),
        )
        for a in answered
        if a.before_score is not None and a.after_score is not None
    ]
    scores, words = np.array(rows, np.float64).reshape(-1, 2).T
    # Rounded as scores are, so that equal differences tie.
    return {"spearman": rounded(spearman(scores.round(9), words))}


def _shares(found: Mapping[_Term, int], constitution: Constitution) -> dict[_Term, float]:
    """What each term of an answer adds to its overall score."""
    total = sum(principle.weight for principle in constitution.principles)
    shares: dict[_Term, float] = {}
    for principle in constitution.principles:
        effects = {item.id: item.effect for item in principle.lexicon.lists}
        added = {t: n * effects[t[1]] for t, n in found.items() if t[0] == principle.id}
        start, full = principle.lexicon.start, sum(added.values())
        clipped = min(1.0, max(0.0, start + full)) - start
        kept = clipped / full if full else 1.0
        shares |= {term: kept * value * principle.weight / total for term, value in added.items()}
    return shares

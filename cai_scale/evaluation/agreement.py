"""How well a critic's preferences agree with labelled pairs. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cai_scale.critics import DISAGREE
from cai_scale.records import Preference
from cai_scale.statistics import rounded, spearman, wilson

RIGHT, WRONG, TIE, ABSTENTION = "right", "wrong", "tie", "abstention"
NEAR = 1e-9  # a lean that is nearer to 0 is a tie
BINS = 10

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LabelledPair:
    """Two answers in the order in which a critic is shown them, and which of them people chose."""

    id: str | int
    prompt: str
    first: str
    second: str
    chosen_first: bool
    category: str = ""
    language: str = ""


def verdict(pair: LabelledPair, preference: Preference) -> str:
    """What a preference is by the label: RIGHT, WRONG, TIE or ABSTENTION."""
    if preference.lean is None:
        return ABSTENTION
    if abs(preference.lean) < NEAR:
        return TIE
    return RIGHT if (preference.lean > 0) == pair.chosen_first else WRONG


def agreement(
    pairs: Sequence[LabelledPair], preferences: Sequence[Preference], *, compares: bool
) -> dict[str, Any]:
    """All figures of a critic on labelled pairs; None where there is too little to say.

    A share is {"share", "n", "ci95"}: how often something is so, among how many, and Wilson's
    interval (`statistics.wilson`).

    Args:
        preferences: one a pair, in order; a `lean` above 0 prefers the pair's `first`. A critic
            that scores leans by the difference of its two scores.
        compares: whether the critic was shown both answers at once.

    Returns:
        n, right, wrong, ties, abstentions: counts.
        reasons: for `ties` and `abstentions`, how often each was given.
        accuracy: `decided`, over what is right or wrong; `all`, ties and abstentions as half.
        position: `prefers_first`, of the decided pairs; `chosen_first`, the same of the labels;
            `orders_disagree`, of the pairs with a valid reply, None for a critic that scores.
        length: in words, of pairs whose answers differ in it: `prefers_longer`, of the decided;
            `chosen_longer`, of the labels; `accuracy_longer` and `accuracy_shorter`, where the
            chosen answer is that; `spearman`, see `_length_correlation`.
        calibration: `ece` and `bins`, see `_calibration`.
        categories, languages: counts and `accuracy` over the decided pairs, for each that is named.
    """
    verdicts = np.array([verdict(*row) for row in zip(pairs, preferences, strict=True)], np.str_)
    leans = np.array([p.lean if p.lean is not None else np.nan for p in preferences], np.float64)
    ratios = np.array([_log_ratio(pair) for pair in pairs], np.float64)
    chosen_first = np.array([pair.chosen_first for pair in pairs], np.bool_)
    right, decided = verdicts == RIGHT, (verdicts == RIGHT) | (verdicts == WRONG)
    unequal = ratios != 0
    chosen_longer = (ratios > 0) == chosen_first
    counts = _counts(verdicts)
    halves = counts["right"] + (counts["ties"] + counts["abstentions"]) / 2
    return {
        **counts,
        "reasons": {
            "ties": _reasons(preferences, verdicts == TIE, "equal"),
            "abstentions": _reasons(preferences, verdicts == ABSTENTION, "no reason given"),
        },
        "accuracy": {"decided": _share(right[decided]), "all": _share_of(halves, len(pairs))},
        "position": {
            "prefers_first": _share(leans[decided] > 0),
            "chosen_first": _share(chosen_first),
            "orders_disagree": _disagreement(preferences) if compares else None,
        },
        "length": {
            "prefers_longer": _share(((leans > 0) == (ratios > 0))[decided & unequal]),
            "chosen_longer": _share(chosen_longer[unequal]),
            "accuracy_longer": _share(right[decided & unequal & chosen_longer]),
            "accuracy_shorter": _share(right[decided & unequal & ~chosen_longer]),
            "spearman": _length_correlation(leans, ratios),
        },
        "calibration": _calibration(np.abs(leans[decided]), right[decided]),
        "categories": _slices([pair.category for pair in pairs], verdicts),
        "languages": _slices([pair.language for pair in pairs], verdicts),
    }


def _counts(verdicts: NDArray[np.str_]) -> dict[str, int]:
    found = Counter(verdicts.tolist())
    return {
        "n": len(verdicts),
        "right": found[RIGHT],
        "wrong": found[WRONG],
        "ties": found[TIE],
        "abstentions": found[ABSTENTION],
    }


def _reasons(preferences: Sequence[Preference], among: Flags, unnamed: str) -> dict[str, int]:
    """How often each reason was given, the commonest first."""
    given = (p.why or unnamed for p, one in zip(preferences, among, strict=True) if one)
    return dict(Counter(given).most_common())


def _disagreement(preferences: Sequence[Preference]) -> dict[str, Any]:
    """The share of the pairs with a valid reply of which the two orders disagree."""
    valid = [p for p in preferences if p.lean is not None or p.why == DISAGREE]
    return _share_of(sum(p.why == DISAGREE for p in valid), len(valid))


def _log_ratio(pair: LabelledPair) -> float:
    """log of the first's words ÷ the second's; one is added to both, as an answer may be empty."""
    first, second = (1 + len(text.split()) for text in (pair.first, pair.second))
    return float(np.log(first / second))


def _length_correlation(leans: Floats, ratios: Floats) -> float | None:
    """Spearman's correlation between the lean to an answer and the log of how much longer it is.

    Every pair without an abstention counts in both orders, so that the figure does not hang on
    which answer was shown first.
    """
    given = ~np.isnan(leans)
    leans, ratios = leans[given], ratios[given]
    return rounded(spearman(np.r_[leans, -leans], np.r_[ratios, -ratios]))


def _calibration(strengths: Floats, right: Flags) -> dict[str, Any]:
    """Whether a critic is right as often as the strength of its leans says.

    A lean is read as the probability (1 + |lean|) ÷ 2 that the preferred answer is the better: so
    a critic that says only ±1 claims to be certain. The gap of two scores is read the same way,
    although nobody promised that it is a probability.

    Args:
        strengths: [decided pairs], |lean|.
        right: [decided pairs].

    Returns:
        `bins` of equal width over |lean|, those that hold pairs: the ends `from` and `to`, the
        number `n`, the mean probability `said` and the share that is right, `was`. `ece`, the
        expected calibration error, is the mean of |said − was| weighted by `n` (M. P. Naeini,
        G. F. Cooper, M. Hauskrecht, "Obtaining well calibrated probabilities using Bayesian
        binning", AAAI 2015).
    """
    # Rounded, so that a gap of decimal scores falls into the bin that its decimals name.
    places = np.minimum(np.floor(np.round(strengths * BINS, 6)), BINS - 1)
    probabilities = (1 + strengths) / 2
    bins: list[dict[str, Any]] = []
    error = 0.0
    for place in np.unique(places):
        inside = places == place
        said, was = float(probabilities[inside].mean()), float(right[inside].mean())
        error += float(inside.mean()) * abs(said - was)
        bins.append(
            {
                "from": float(place) / BINS,
                "to": float(place + 1) / BINS,
                "n": int(inside.sum()),
                "said": rounded(said),
                "was": rounded(was),
            }
        )
    return {"ece": rounded(error) if bins else None, "bins": bins}


def _slices(names: Sequence[str], verdicts: NDArray[np.str_]) -> dict[str, Any]:
    """Counts, and the accuracy over the decided pairs, for each name but the empty one."""
    found = {}
    for name in sorted(set(names) - {""}):
        counts = _counts(verdicts[np.array([other == name for other in names])])
        decided = counts["right"] + counts["wrong"]
        found[name] = {**counts, "accuracy": _share_of(counts["right"], decided)}
    return found


def _share(flags: Flags) -> dict[str, Any]:
    return _share_of(int(flags.sum()), len(flags))


def _share_of(successes: float, n: int) -> dict[str, Any]:
    share = round(successes / n, 6) if n else None
    return {"share": share, "n": n, "ci95": wilson(successes, n)}

"""What the pairs are made of, in numbers that show a confounded label."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from math import ceil, isfinite
from statistics import median
from typing import Any

from cai_scale.critics import DISAGREE, INVALID, Comparer, Critic
from cai_scale.errors import DataError
from cai_scale.preferences.pairs import NEAR, Refusal
from cai_scale.records import Candidate, Pair

ALIKE = 0.9  # texts are nearly the same from this Jaccard similarity of their word 3-grams on

Share = tuple[float | None, int]  # how often something is so, and of how many
Grams = frozenset[tuple[str, ...]]


def audit(
    pairs: Sequence[Pair], account: Mapping[str, Any], refused: Sequence[Refusal] = ()
) -> dict[str, Any]:
    """Figures over the pairs, beside the account of what was refused.

    `out_of` says of how many cases each share is; a share of none is None. Of the pairs whose two
    answers differ in it, `chosen_cooler` is the share whose chosen answer was sampled at the lower
    temperature, `chosen_longer` the share whose chosen answer has more words, and `inverted` the
    share whose chosen answer has the lower score of the two. `alike_answers` is the share of pairs
    whose answers are nearly the same text, `alike_prompts` the share of prompts that are nearly an
    earlier one. `agreements` are, for each two critics of an ensemble, the share of the pairs that
    both order which they order alike; `agreement` is the lowest. `gains` counts pairs by the
    principle whose score the chosen answer raises most.

    Of the labels asked for, `parse_failures` had no valid reply and `abstentions` none for another
    reason; `ties` are comparisons without a winner, or prompts whose answers all score alike;
    `disagreements` are comparisons whose two orders disagree. `revisions_better` is the share of
    revisions that the critic scores above what they revised.
    """
    return _measured({"schema": 1, **account}, pairs, _of_labels(account, refused))


def audit_again(
    figures: Mapping[str, Any], pairs: Sequence[Pair], critic: Critic | Comparer | None = None
) -> dict[str, Any]:
    """The figures of pairs as they are now; those of what was refused are taken over.

    With a critic, `flip_rate` is the share of the pairs whose label it reverses, asked again.
    """
    return _measured(figures, pairs, {"flip_rate": flip_rate(pairs, critic)} if critic else {})


def flip_rate(pairs: Sequence[Pair], critic: Critic | Comparer) -> Share:
    """How often a critic finds the rejected answer better, of the pairs that it judges."""
    prompts = [pair.messages[-1]["content"] for pair in pairs]
    both = [pair.chosen.text for pair in pairs], [pair.rejected.text for pair in pairs]
    if isinstance(critic, Comparer):
        leans = [preference.lean for preference in critic.compare(prompts, *both)]
        return _share(lean < -NEAR for lean in leans if lean is not None)
    chosen, rejected = (critic.score(prompts, texts) for texts in both)
    scored = [(c, r) for c, r in zip(chosen, rejected, strict=True) if c and r]
    return _share(r.overall - c.overall > NEAR for c, r in scored)


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


def _measured(
    known: Mapping[str, Any], pairs: Sequence[Pair], more: Mapping[str, Share]
) -> dict[str, Any]:
    gaps = [p.chosen.score - p.rejected.score for p in pairs]
    longer_by = [_words(p.chosen) - _words(p.rejected) for p in pairs]
    prompts = {pair.prompt_id: pair for pair in pairs}
    agreements = _agreements(pairs)
    ordered = [share for share in agreements.values() if share[1]]
    shares = {
        "chosen_cooler": _raised(pairs, lambda answer: -answer.temperature),
        "chosen_longer": _raised(pairs, _words),
        "inverted": _raised(pairs, lambda answer: -answer.score),
        "alike_answers": _share(
            _alike(_grams(p.chosen.text), _grams(p.rejected.text)) for p in pairs
        ),
        "alike_prompts": _share(_repeated([_grams(_conversation(p)) for p in prompts.values()])),
        "agreement": min(ordered, key=lambda share: share[0] or 0.0, default=(None, 0)),
        **more,
    }
    return {
        **known,
        "pairs": len(pairs),
        "languages": dict(Counter(pair.language for pair in pairs)),
        "gains": dict(Counter(gain for pair in pairs if (gain := _gain(pair)))),
        "mean_gap": _mean([gap for gap in gaps if isfinite(gap)]),
        "chosen_words": _mean([_words(p.chosen) for p in pairs]),
        "rejected_words": _mean([_words(p.rejected) for p in pairs]),
        "longer_by_mean": _mean(longer_by),
        "longer_by_median": float(median(longer_by)) if pairs else None,
        "chosen_revised": _mean([p.chosen.revised for p in pairs]),
        "rejected_revised": _mean([p.rejected.revised for p in pairs]),
        "agreements": {names: share for names, (share, _) in agreements.items()},
        **{name: share for name, (share, _) in shares.items()},
        "out_of": {**known.get("out_of", {}), **{name: of for name, (_, of) in shares.items()}},
    }


def _of_labels(account: Mapping[str, Any], refused: Sequence[Refusal]) -> dict[str, Share]:
    """Of the labels that were asked for, how often there was none, and why."""
    if "dropped" not in account:
        return {}
    kinds = Counter(row["refused"] for row in refused)
    why = [r["why"] for r in refused if r["refused"] in ("unscored_answers", "abstentions")]
    invalid = sum(INVALID in said for said in why)
    compared = "comparisons" in account
    asked = account["comparisons" if compared else "answers"] - kinds["empty_answers"]
    if compared:
        ties, ordered = kinds["ties"], asked
    else:
        ties = sum(row.get("gap") == 0 for row in refused)
        ordered = account["prompts"] - kinds["fewer_than_two_answers"]
    disagree = sum(DISAGREE in row["why"] for row in refused)
    tried = account.get("revisions", {"asked": 0, "better": 0})
    return {
        "parse_failures": _of(invalid, asked),
        "abstentions": _of(len(why) - invalid, asked),
        "ties": _of(ties, ordered),
        "disagreements": _of(disagree, asked if compared else 0),
        "revisions_better": _of(tried["better"], tried["asked"]),
    }


def _agreements(pairs: Sequence[Pair]) -> dict[str, Share]:
    """For each two critics that voted, how often they order alike the pairs that both order."""
    leans = [
        {name: vote - p.rejected.votes[name] for name, vote in p.chosen.votes.items()}
        for p in pairs
        if p.chosen.votes.keys() == p.rejected.votes.keys()
    ]
    names = list(dict.fromkeys(name for lean in leans for name in lean))
    return {
        f"{one} and {other}": _share(
            (lean[one] > 0) == (lean[other] > 0)
            for lean in leans
            if min(abs(lean.get(one, 0.0)), abs(lean.get(other, 0.0))) > NEAR
        )
        for one, other in combinations(names, 2)
    }


def _gain(pair: Pair) -> str | None:
    """The principle that the chosen answer raises most, the first of equals; None for none."""
    before = pair.rejected.principles
    gains = {k: round(v - before[k], 9) for k, v in pair.chosen.principles.items() if k in before}
    return max(gains, key=lambda name: gains[name], default=None)


def _raised(pairs: Sequence[Pair], measure: Callable[[Candidate], float]) -> Share:
    """Of the pairs whose answers differ in it, how often the chosen one has more of it."""
    both = [(measure(p.chosen), measure(p.rejected)) for p in pairs]
    # What is not known is NaN, which neither exceeds nor falls short.
    return _share(c > r for c, r in both if c > r or c < r)


def _repeated(sets: Sequence[Grams]) -> list[bool]:
    """Of each set, whether it is nearly one before it that was new.

    Two sets of Jaccard similarity t or more share one of the rarest |s| - ⌈t·|s|⌉ + 1 elements of
    either, so that only sets which do are compared (prefix filtering: Bayardo, Ma and Srikant,
    Scaling Up All Pairs Similarity Search, WWW 2007).
    """
    counts = Counter(gram for grams in sets for gram in grams)
    new: dict[tuple[str, ...], list[Grams]] = defaultdict(list)
    found = []
    for grams in sets:
        size = len(grams) - ceil(ALIKE * len(grams) - NEAR) + 1
        rarest = sorted(grams, key=lambda gram: (counts[gram], gram))[:size]
        found.append(any(_alike(grams, other) for gram in rarest for other in new[gram]))
        if not found[-1]:
            for gram in rarest:
                new[gram].append(grams)
    return found


def _alike(one: Grams, other: Grams) -> bool:
    return len(one & other) >= ALIKE * len(one | other) - NEAR


def _grams(text: str) -> Grams:
    """The word 3-grams of a text; the whole of it where it has fewer words."""
    words = text.casefold().split()
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def _conversation(pair: Pair) -> str:
    return " ".join(message["content"] for message in pair.messages)


def _words(candidate: Candidate) -> int:
    return len(candidate.text.split())


def _share(cases: Iterable[bool]) -> Share:
    found = list(cases)
    return _of(sum(found), len(found))


def _of(count: int, total: int) -> Share:
    return (count / total if total else None), total


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

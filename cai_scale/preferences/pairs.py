"""Build preference pairs: of the answers to one prompt, the better against the worse.

What becomes no pair is refused with a row: {"prompt_id", "refused", "why"}, where `refused` is the
count that it adds to; with "sample" where it is an answer, "first" and "second" where it is a
comparison, and "gap" where it is a prompt whose answers are too near.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_scale.critics import EMPTY
from cai_scale.records import Candidate, Pair, Preference, Prompt, Response, Score, read_records

NEAR = 1e-9  # scores are multiples of a small step: rounding does not decide at a margin
ANSWERS = ("empty_answers", "unscored_answers", "duplicate_answers")
UNPAIRED = ("fewer_than_two_answers", "under_margin")
COMPARISONS = (
    *("empty_answers", "duplicate_answers", "uncompared_answers"),
    *("abstentions", "ties"),
)
UNCOMPARED = ("not_compared", "undecided", "under_margin")

Refusal = dict[str, Any]
Comparison = tuple[str, int, int, Preference]  # a prompt's id, the first and the second sample


def build_pairs(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    scores: Sequence[Score | None],
    *,
    margin: float,
    per_prompt: int = 1,
    why: Mapping[tuple[str, int], str] | None = None,
) -> tuple[list[Pair], dict[str, Any], list[Refusal]]:
    """Of each prompt the best answer against the worst, the next against the next, and so on.

    Answers without a score and repetitions of another answer to the same prompt are dropped
    first. Among equal scores the earlier sample is taken, so that the outcome depends on nothing
    else. An answer stands in one pair at most.

    Args:
        margin: the two answers of a pair are at least so far apart.
        per_prompt: how many pairs a prompt gives at most.
        why: by prompt id and sample, why an answer has no score.

    Returns:
        The pairs in the order of the prompts, an account of every prompt and answer, and a row
        for each that was refused.
    """
    answers: dict[str, list[tuple[Response, Score]]] = defaultdict(list)
    refused: list[Refusal] = []
    for response, score in zip(responses, scores, strict=True):
        others = answers[response.prompt_id]
        same = next((other.sample for other, _ in others if other.text == response.text), None)
        if score is not None and same is None:
            others.append((response, score))
            continue
        kind, said = "duplicate_answers", f"the text of sample {same}"
        if score is None:
            empty = not response.text.strip()
            kind, said = ANSWERS[0 if empty else 1], EMPTY if empty else "no score"
            said = (why or {}).get((response.prompt_id, response.sample)) or said
        refused.append(refusal(response, kind, said))

    pairs: list[Pair] = []
    for prompt in prompts:
        candidates = sorted(answers[prompt.id], key=lambda c: c[0].sample)
        if len(candidates) < 2:
            said = f"{len(candidates)} different answers with a score"
            refused.append(_refusal(prompt.id, "fewer_than_two_answers", said))
            continue
        best_first = sorted(candidates, key=lambda c: -c[1].overall)
        worst_first = sorted(candidates, key=lambda c: c[1].overall)
        for rank, (best, worst) in enumerate(zip(best_first, worst_first, strict=True)):
            gap = best[1].overall - worst[1].overall
            if rank == per_prompt or gap < max(margin - NEAR, NEAR):
                break
            pairs.append(_pair(prompt, _candidate(*best), _candidate(*worst)))
        if rank == 0:
            refused.append(_under(prompt.id, gap, margin))
    account = _account(prompts, responses, pairs, refused, ANSWERS, UNPAIRED)
    return pairs, account, refused


def compared_pairs(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    comparisons: Sequence[Comparison],
    *,
    margin: float,
    scores: Mapping[tuple[str, int], Score] | None = None,
    left_out: Sequence[Refusal] = (),
) -> tuple[list[Pair], dict[str, Any], list[Refusal]]:
    """One pair per prompt: of its comparisons that which leans furthest, the earliest of equals.

    A lean of l stands as the scores (1 + l)/2 of the first answer and (1 - l)/2 of the second,
    whose gap |l| must be at least `margin`. Ties, abstentions and comparisons with an empty
    answer, or of one text with itself, decide nothing.

    Args:
        scores: by prompt id and sample, the answers' own scores, where the leans come from these.
        left_out: a row for each answer that was not compared.

    Returns:
        As `build_pairs`, with a row for each comparison that decides nothing.
    """
    answers = {(response.prompt_id, response.sample): response for response in responses}
    decided: dict[str, list[tuple[float, Response, Response, Preference]]] = defaultdict(list)
    refused = list(left_out)
    for prompt_id, first, second, preference in comparisons:
        one, other = answers[prompt_id, first], answers[prompt_id, second]
        undecided = _undecided(one, other, preference)
        if undecided:
            refused.append(_refusal(prompt_id, *undecided, first=first, second=second))
        else:
            decided[prompt_id].append((preference.lean or 0.0, one, other, preference))

    pairs: list[Pair] = []
    compared = {prompt_id for prompt_id, *_ in comparisons}
    for prompt in prompts:
        if prompt.id not in compared:
            refused.append(_refusal(prompt.id, "not_compared", "no two answers were compared"))
        elif not decided[prompt.id]:
            refused.append(_refusal(prompt.id, "undecided", "no comparison prefers an answer"))
        else:
            lean, one, other, preference = max(decided[prompt.id], key=lambda d: abs(d[0]))
            if abs(lean) < margin - NEAR:
                refused.append(_under(prompt.id, abs(lean), margin))
            else:
                if scores is None:
                    both = _leaning(one, preference, 1), _leaning(other, preference, -1)
                else:
                    keys = ((prompt.id, answer.sample) for answer in (one, other))
                    first_score, second_score = (scores[key] for key in keys)
                    both = _candidate(one, first_score), _candidate(other, second_score)
                pairs.append(_pair(prompt, *(both if lean > 0 else both[::-1])))
    account = _account(prompts, responses, pairs, refused, COMPARISONS, UNCOMPARED)
    return pairs, account | {"comparisons": len(comparisons)}, refused


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file that `records.write_jsonl` wrote."""
    return read_records(path, pair_of)


def pair_of(record: Mapping[str, Any]) -> Pair:
    """The pair of a row that was written.

    Raises:
        KeyError, TypeError: the row has other keys.
    """
    return Pair(
        prompt_id=record["prompt_id"],
        language=record["language"],
        messages=tuple(record["messages"]),
        chosen=Candidate(**record["chosen"]),
        rejected=Candidate(**record["rejected"]),
    )


def _undecided(one: Response, other: Response, preference: Preference) -> tuple[str, str] | None:
    """Which count a comparison that decides nothing adds to, and why."""
    if not (one.text.strip() and other.text.strip()):
        return "empty_answers", EMPTY
    if one.text == other.text:
        return "duplicate_answers", "the same text twice"
    if preference.lean is None:
        return "abstentions", preference.why or "an abstention"
    if abs(preference.lean) < NEAR:
        return "ties", preference.why or "a tie"
    return None


def refusal(answer: Response, kind: str, why: str) -> Refusal:
    """The row of an answer that adds to the count `kind`."""
    return _refusal(answer.prompt_id, kind, why, sample=answer.sample)


def _refusal(prompt_id: str, kind: str, why: str, **about: object) -> Refusal:
    return {"prompt_id": prompt_id, **about, "refused": kind, "why": why}


def _under(prompt_id: str, gap: float, margin: float) -> Refusal:
    why = f"the gap is under the margin {margin:g}" if gap else "no gap"
    return _refusal(prompt_id, "under_margin", why, gap=round(gap, 9))


def _account(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    pairs: Sequence[Pair],
    refused: Iterable[Refusal],
    dropped: Sequence[str],
    unpaired: Sequence[str],
) -> dict[str, Any]:
    counts = Counter(row["refused"] for row in refused)
    return {
        "prompts": len(prompts),
        "answers": len(responses),
        "dropped": {kind: counts[kind] for kind in dropped},
        "pairs": len(pairs),
        "unpaired": {kind: counts[kind] for kind in unpaired},
    }


def _pair(prompt: Prompt, chosen: Candidate, rejected: Candidate) -> Pair:
    return Pair(
        prompt_id=prompt.id,
        language=prompt.language,
        messages=prompt.messages,
        chosen=chosen,
        rejected=rejected,
    )


def _leaning(response: Response, preference: Preference, side: int) -> Candidate:
    """One side of a comparison: 1 is the first answer, -1 the second."""

    def score(lean: float) -> float:
        return round((1 + side * lean) / 2, 9)

    principles = {name: score(lean) for name, lean in preference.principles.items()}
    return _candidate(response, Score(principles, score(preference.lean or 0.0)))


def _candidate(response: Response, score: Score) -> Candidate:
    return Candidate(
        text=response.text,
        score=score.overall,
        temperature=response.temperature,
        revised=response.revised,
        principles=dict(score.principles),
        votes=dict(score.votes),
    )

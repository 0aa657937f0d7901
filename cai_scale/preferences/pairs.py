"""Build preference pairs: of the answers to one prompt, the best against the worst."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cai_scale.records import Candidate, Pair, Prompt, Response, Score, read_records


def build_pairs(
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    scores: Sequence[Score | None],
    *,
    margin: float,
) -> tuple[list[Pair], dict[str, Any]]:
    """One pair per prompt whose best and worst answers are at least `margin` apart.

    Empty answers and repetitions of another answer to the same prompt are dropped first. Among
    equal scores the earlier sample is taken, so that the outcome depends on nothing else.

    Returns:
        The pairs in the order of the prompts, and an account of every prompt and answer.
    """
    answers: dict[str, list[tuple[Response, Score]]] = defaultdict(list)
    dropped: Counter[str] = Counter(empty_answers=0, duplicate_answers=0)
    for response, score in zip(responses, scores, strict=True):
        if score is None:
            dropped["empty_answers"] += 1
        elif any(response.text == other.text for other, _ in answers[response.prompt_id]):
            dropped["duplicate_answers"] += 1
        else:
            answers[response.prompt_id].append((response, score))

    pairs: list[Pair] = []
    unpaired: Counter[str] = Counter(fewer_than_two_answers=0, under_margin=0)
    for prompt in prompts:
        candidates = sorted(answers[prompt.id], key=lambda c: c[0].sample)
        if len(candidates) < 2:
            unpaired["fewer_than_two_answers"] += 1
            continue
        best = max(candidates, key=lambda c: c[1].overall)
        worst = min(candidates, key=lambda c: c[1].overall)
        # Scores are multiples of a small step: do not let rounding decide at the margin.
        if best[1].overall - worst[1].overall < margin - 1e-9 or best is worst:
            unpaired["under_margin"] += 1
            continue
        pairs.append(
            Pair(
                prompt_id=prompt.id,
                language=prompt.language,
                messages=prompt.messages,
                chosen=_candidate(*best),
                rejected=_candidate(*worst),
            )
        )
    return pairs, {
        "prompts": len(prompts),
        "answers": len(responses),
        "dropped": dict(dropped),
        "pairs": len(pairs),
        "unpaired": dict(unpaired),
    }


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file that `records.write_jsonl` wrote."""
    return read_records(
        path,
        lambda record: Pair(
            prompt_id=record["prompt_id"],
            language=record["language"],
            messages=tuple(record["messages"]),
            chosen=Candidate(**record["chosen"]),
            rejected=Candidate(**record["rejected"]),
        ),
    )


def _candidate(response: Response, score: Score) -> Candidate:
    return Candidate(
        text=response.text,
        score=score.overall,
        temperature=response.temperature,
        revised=response.revised,
    )

"""What critics say of a round's answers, asked once and stored, and the pairs that follow from it.

The pipeline writes it; `verify` works it out again, by the same code. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai_scale.config import Config
from cai_scale.constitution import Constitution
from cai_scale.critics import EMPTY, Comparer, Critic
from cai_scale.critics.complaint import RevisionRules
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import DataError
from cai_scale.preferences.audit import audit
from cai_scale.preferences.pairs import (
    Comparison,
    Refusal,
    build_pairs,
    compared_pairs,
    refusal,
)
from cai_scale.ranks import Ranks, wait_for
from cai_scale.records import (
    Answer,
    Pair,
    Preference,
    Prompt,
    Response,
    Score,
    read_records,
    write_jsonl,
)
from cai_scale.rollout.revise import better, revise, sample_of
from cai_scale.rollout.sampler import Sampler
from cai_scale.runs import Round

# What was compared, and a row for each answer that was not.
Compared = tuple[list[Comparison], list[Refusal]]


def answers(
    config: Config,
    constitution: Constitution,
    critic: Critic,
    comparer: Comparer | None,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    files: Round,
    sampler: Sampler,
    ranks: Ranks,
) -> tuple[list[Response], list[Score | None]]:
    """Each sample, or its best revision, and its score; an empty answer has none.

    Where a comparer labels pairs, no answer has a score. What is stored already is neither asked
    for nor scored again.
    """
    text = {prompt.id: prompt.text for prompt in prompts}

    def score(responses: Sequence[Response], product: Path) -> list[Score | None]:
        if comparer is not None:
            return [None] * len(responses)
        asked = [text[response.prompt_id] for response in responses]
        return score_once(critic, asked, responses, files.scores(product), ranks)

    def prefer(
        revisions: Sequence[Response], originals: Sequence[Response], product: Path
    ) -> list[bool]:
        assert comparer is not None
        pairs = list(zip(revisions, originals, strict=True))
        found = compare_once(comparer, text, pairs, files.comparisons(product), ranks)
        return [preference.lean is not None and preference.lean > 0 for preference in found]

    return revise(
        sampler,
        score,
        None if comparer is None else prefer,
        constitution,
        prompts,
        responses,
        files,
        rules=RevisionRules(tries=config.revisions, critique=config.revision == "critique"),
        seed=config.seed,
        batch_size=config.rollout_batch_size,
        ranks=ranks,
    )


def scored(
    prompts: Sequence[Prompt], responses: Sequence[Response], scores: Sequence[Score | None]
) -> list[Answer]:
    """The answers that have a score, with their prompts."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return [
        Answer(prompt=by_id[response.prompt_id], response=response, score=score)
        for response, score in zip(responses, scores, strict=True)
        if score is not None
    ]


def score_once(
    critic: Critic,
    prompts: Sequence[str],
    responses: Sequence[Response],
    product: Path,
    ranks: Ranks,
) -> list[Score | None]:
    """The critic's scores of responses, in order: rank 0 asks it once, and all read the file.

    So ranks cannot differ about a score, and a critic that costs money is not paid twice. The
    file says too why an answer has none.

    Raises:
        DataError: the stored scores are of other answers.
    """
    if ranks.main and not product.exists():
        scores = critic.score(prompts, [response.text for response in responses])
        rows = zip(prompts, responses, scores, strict=True)
        write_jsonl(product, (_score_row(critic, *row) for row in rows))
    wait_for(product)
    stored = read_scores(product)
    if [row[0] for row in stored] != [(r.prompt_id, r.sample) for r in responses]:
        raise DataError(f"{product} does not hold the scores of its answers; remove it")
    return [row[1] for row in stored]


def _score_row(
    critic: Critic, prompt: str, response: Response, score: Score | None
) -> dict[str, Any]:
    row = {"prompt_id": response.prompt_id, "sample": response.sample}
    if score is not None:
        return {**row, "score": score.plain()}
    why = critic.why(prompt, response.text) if response.text.strip() else EMPTY
    return {**row, "score": None, "why": why}


def read_scores(file: Path) -> list[tuple[tuple[str, int], Score | None, str]]:
    """Of each answer its prompt's id and its sample, its score, and why it has none."""
    return read_records(
        file,
        lambda row: (
            (row["prompt_id"], row["sample"]),
            row["score"] and Score(**row["score"]),
            row.get("why", ""),
        ),
    )


def compare_once(
    comparer: Comparer,
    text: Mapping[str, str],
    pairs: Sequence[tuple[Response, Response]],
    product: Path,
    ranks: Ranks,
) -> list[Preference]:
    """The comparer's verdicts on two answers to a prompt each, in order; asked once, as scores.

    Args:
        text: of each prompt, by its id.

    Raises:
        DataError: the stored verdicts are on other answers.
    """
    if ranks.main and not product.exists():
        found = comparer.compare(
            [text[first.prompt_id] for first, _ in pairs],
            [first.text for first, _ in pairs],
            [second.text for _, second in pairs],
        )
        write_jsonl(
            product,
            (
                {**_two(first, second), "preference": preference.plain()}
                for (first, second), preference in zip(pairs, found, strict=True)
            ),
        )
    wait_for(product)
    stored = _read_comparisons(product)
    if [row for row, _ in stored] != [_two(*pair) for pair in pairs]:
        raise DataError(f"{product} does not hold the verdicts on its answers; remove it")
    return [preference for _, preference in stored]


def _read_comparisons(file: Path) -> list[tuple[dict[str, Any], Preference]]:
    """Which answers were compared, and what was said of them."""
    return read_records(file, lambda row: (row, Preference(**row.pop("preference"))))


def _two(first: Response, second: Response) -> dict[str, Any]:
    return {"prompt_id": first.prompt_id, "first": first.sample, "second": second.sample}


def comparisons(
    config: Config,
    constitution: Constitution,
    comparer: Comparer,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    files: Round,
    ranks: Ranks,
) -> Compared:
    """The comparer's verdicts on the answers of a round; what is stored is not asked again."""
    text = {prompt.id: prompt.text for prompt in prompts}
    pairs, left_out = to_compare(config, constitution, prompts, responses)
    found = compare_once(comparer, text, pairs, files.comparisons(files.pairs), ranks)
    return [
        (first.prompt_id, first.sample, second.sample, preference)
        for (first, second), preference in zip(pairs, found, strict=True)
    ], left_out


def to_compare(
    config: Config,
    constitution: Constitution,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
) -> tuple[list[tuple[Response, Response]], list[Refusal]]:
    """The answers that are compared, two to a prompt: every two neighbours; or the two that the
    lexicon tells apart the most. And a row for each answer that is not."""
    by_prompt: dict[str, list[Response]] = {prompt.id: [] for prompt in prompts}
    left_out: list[Refusal] = []
    for response in responses:
        others = by_prompt[response.prompt_id]
        same = next((other.sample for other in others if other.text == response.text), None)
        if not response.text.strip():
            left_out.append(refusal(response, "empty_answers", EMPTY))
        elif same is not None:
            left_out.append(refusal(response, "duplicate_answers", f"the text of sample {same}"))
        else:
            others.append(response)
    lexicon = LexiconCritic(constitution)
    found = []
    for answers in by_prompt.values():
        if config.first_pass:
            scores = [s.overall if s else 0.0 for s in lexicon.score([], [a.text for a in answers])]
            order = sorted(range(len(answers)), key=lambda i: (-scores[i], i))
            chosen = [answers[i] for i in (order[:1] + order[-1:] if len(order) > 1 else [])]
        else:
            chosen = answers[: len(answers) // 2 * 2]
        found += list(zip(chosen[::2], chosen[1::2], strict=True))
        why = "the lexicon tells others apart more" if config.first_pass else "no other is left"
        for answer in answers:
            if answer not in chosen:
                left_out.append(refusal(answer, "uncompared_answers", why))
    return found, left_out


def pairs(
    config: Config,
    prompts: Sequence[Prompt],
    files: Round,
    responses: Sequence[Response],
    scores: Sequence[Score | None],
    compared: Compared | None,
) -> tuple[list[Pair], dict[str, Any], list[Refusal]]:
    """The pairs of a round, their audit, and a row for everything that was refused.

    Args:
        files: where the verdicts on the samples and revisions are.
        compared: what a comparer said, where it labels the pairs in place of scores.
    """
    if config.pairs == "revisions":
        built, account, refused = revision_pairs(config, prompts, files)
    elif compared is not None:
        found, left_out = compared
        built, account, refused = compared_pairs(
            prompts, responses, found, margin=config.margin, left_out=left_out
        )
    else:
        # An answer without a score is a sample: no revision without one has taken its place.
        why = {key: why for key, _, why in read_scores(files.scores(files.rollouts)) if why}
        built, account, refused = build_pairs(
            prompts,
            responses,
            scores,
            margin=config.margin,
            per_prompt=config.pairs_per_prompt,
            why=why,
        )
    count = preferred_revisions if config.labels_pairs else revisions
    return built, audit(built, account | {"revisions": count(files)}, refused), refused


def revision_pairs(
    config: Config, prompts: Sequence[Prompt], files: Round
) -> tuple[list[Pair], dict[str, Any], list[Refusal]]:
    """Pairs of an answer and its first revision, whichever the critic finds better."""
    product = files.revisions()
    samples, revised = (
        read_records(file, lambda record: Response(**record)) for file in (files.rollouts, product)
    )
    responses = [*samples, *(replace(revision, revised=True) for revision in revised)]
    if config.labels_pairs:
        said = _read_comparisons(files.comparisons(product))
        asked = [(row["prompt_id"], row["first"], row["second"], found) for row, found in said]
        return compared_pairs(prompts, responses, asked, margin=config.margin)
    rows = [*read_scores(files.scores(files.rollouts)), *read_scores(files.scores(product))]
    scores = {key: score for key, score, _ in rows if score is not None}
    why = {key: why for key, _, why in rows}
    gaps: list[Comparison] = []
    for revision in revised:
        original = sample_of(revision.sample)
        new, old = (revision.prompt_id, revision.sample), (revision.prompt_id, original)
        if new in scores and old in scores:
            found = Preference(scores[new].overall - scores[old].overall)
        else:
            found = Preference(None, why[new] or why[old])
        gaps.append((revision.prompt_id, revision.sample, original, found))
    return compared_pairs(prompts, responses, gaps, margin=config.margin, scores=scores)


def revisions(files: Round) -> dict[str, int]:
    """How many revisions were asked for in a round, and how many the critic found better."""
    best = {key: score for key, score, _ in read_scores(files.scores(files.rollouts))}
    counts = {"asked": 0, "better": 0}
    for product in files.all_revisions():
        for (prompt_id, sample), score, _ in read_scores(files.scores(product)):
            key = prompt_id, sample_of(sample)
            counts["asked"] += 1
            if better(score, best[key]):
                counts["better"] += 1
                best[key] = score
    return counts


def preferred_revisions(files: Round) -> dict[str, int]:
    """The same of a comparer's verdicts."""
    found = [
        preference
        for product in files.all_revisions()
        for _, preference in _read_comparisons(files.comparisons(product))
    ]
    return {"asked": len(found), "better": sum((p.lean or 0) > 0 for p in found)}

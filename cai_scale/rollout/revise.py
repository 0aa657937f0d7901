"""Revision: ask again where an answer is short, repetitive, or under a principle's floor."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cai_scale.constitution import Constitution
from cai_scale.critics.complaint import RevisionRules, asking_again, complaint
from cai_scale.ranks import Ranks
from cai_scale.records import Prompt, Response, Score
from cai_scale.rollout.collect import collect
from cai_scale.rollout.sampler import Request, Sampler
from cai_scale.runs import Round

# The random numbers of a revision are those of a sample that no rollout asks for.
_FIRST_SAMPLE = 1_000_000


def revise(
    sampler: Sampler,
    score: Callable[[Sequence[Response], Path], Sequence[Score | None]],
    constitution: Constitution,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    files: Round,
    *,
    rules: RevisionRules,
    seed: int,
    batch_size: int,
    ranks: Ranks,
) -> tuple[list[Response], list[Score | None]]:
    """Each response, or the best of its revisions where the critic scores one higher, and its
    score.

    Args:
        score: the critic's scores of responses that are stored in a file.
        files: where the responses are, and where all revisions of a try go, the worse ones too.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    best, scores = list(responses), list(score(responses, files.rollouts))
    for attempt in range(1, rules.tries + 1):
        requests: list[Request] = []
        where: dict[tuple[str, int], int] = {}
        for index, (response, given) in enumerate(zip(best, scores, strict=True)):
            prompt = prompt_of[response.prompt_id]
            ask = complaint(response.text, given, constitution, rules, prompt.language)
            if ask is not None:
                request = _request(prompt, response, ask, seed, attempt)
                where[request.prompt_id, request.sample] = index
                requests.append(request)
        product = files.revisions(attempt)
        revisions = collect(
            sampler, requests, product, batch_size=batch_size, ranks=ranks, title="revising"
        )
        for revision, given in zip(revisions, score(revisions, product), strict=True):
            index = where[revision.prompt_id, revision.sample]
            if better(given, scores[index]):
                best[index] = replace(revision, sample=best[index].sample, revised=True)
                scores[index] = given
    return best, scores


def better(new: Score | None, old: Score | None) -> bool:
    """Whether a revision takes the place of what it revised; an empty answer has no score."""
    return new is not None and (old is None or new.overall > old.overall)


def sample_of(revision: int) -> int:
    """The sample that a revision, by its own number, was asked for in place of."""
    return revision % _FIRST_SAMPLE


def _request(prompt: Prompt, response: Response, ask: str, seed: int, attempt: int) -> Request:
    return Request(
        messages=asking_again(prompt.messages, response.text, ask),
        prompt_id=prompt.id,
        sample=response.sample + attempt * _FIRST_SAMPLE,
        round=response.round,
        seed=seed,
        temperature=response.temperature,
    )

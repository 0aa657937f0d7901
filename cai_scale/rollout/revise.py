"""Revision: ask again where an answer is short, repetitive, or under a principle's floor."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cai_scale.constitution import Constitution
from cai_scale.critics import Critic
from cai_scale.critics.complaint import RevisionRules, asking_again, complaint
from cai_scale.ranks import Ranks
from cai_scale.records import Prompt, Response, Score
from cai_scale.rollout.collect import collect
from cai_scale.rollout.sampler import Request, Sampler

# The random numbers of a revision are those of a sample that no rollout asks for.
_FIRST_SAMPLE = 1_000_000


def revise(
    sampler: Sampler,
    critic: Critic,
    constitution: Constitution,
    prompts: Sequence[Prompt],
    responses: Sequence[Response],
    product: Callable[[int], Path],
    *,
    rules: RevisionRules,
    seed: int,
    batch_size: int,
    ranks: Ranks,
) -> list[Response]:
    """Each response, or the best of its revisions where the critic scores one higher.

    Args:
        product: the file that keeps all revisions of the Nth try, N from 1, the worse ones too.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    best = list(responses)
    scores = critic.score([prompt_of[r.prompt_id].text for r in best], [r.text for r in best])
    for attempt in range(1, rules.tries + 1):
        requests: list[Request] = []
        where: dict[tuple[str, int], int] = {}
        for index, (response, score) in enumerate(zip(best, scores, strict=True)):
            prompt = prompt_of[response.prompt_id]
            ask = complaint(response.text, score, constitution, rules, prompt.language)
            if ask is not None:
                request = _request(prompt, response, ask, seed, attempt)
                where[request.prompt_id, request.sample] = index
                requests.append(request)
        revisions = collect(
            sampler,
            requests,
            product(attempt),
            batch_size=batch_size,
            ranks=ranks,
            title="revising",
        )
        for revision in revisions:
            index = where[revision.prompt_id, revision.sample]
            prompt = prompt_of[revision.prompt_id]
            score = critic.score([prompt.text], [revision.text])[0]
            if better(score, scores[index]):
                best[index] = replace(revision, sample=best[index].sample, revised=True)
                scores[index] = score
    return best


def better(new: Score | None, old: Score | None) -> bool:
    """Whether a revision takes the place of what it revised; an empty answer has no score."""
    return new is not None and (old is None or new.overall > old.overall)


def sample_of(revision: Response) -> int:
    """The sample that a revision, as it is stored, was asked for in place of."""
    return revision.sample % _FIRST_SAMPLE


def _request(prompt: Prompt, response: Response, ask: str, seed: int, attempt: int) -> Request:
    return Request(
        messages=asking_again(prompt.messages, response.text, ask),
        prompt_id=prompt.id,
        sample=response.sample + attempt * _FIRST_SAMPLE,
        round=response.round,
        seed=seed,
        temperature=response.temperature,
    )

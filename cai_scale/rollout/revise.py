"""Revision: ask again where an answer is short, repetitive, or under a principle's floor; or let
the policy criticise every answer by a principle first (Bai et al. 2022, arXiv 2212.08073, section
3.1).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cai_scale.constitution import Constitution, Principle
from cai_scale.critics.complaint import RevisionRules, asking_again, complaint
from cai_scale.ranks import Ranks
from cai_scale.records import Message, Prompt, Response, Score
from cai_scale.rollout.collect import collect
from cai_scale.rollout.sampler import Request, Sampler
from cai_scale.runs import Round
from cai_scale.runtime.sampling import identity

# The random numbers of a revision are those of a sample that no rollout asks for.
_FIRST_SAMPLE = 1_000_000
_FIRST_CRITIQUE = 500_000


def revise(
    sampler: Sampler,
    score: Callable[[Sequence[Response], Path], Sequence[Score | None]],
    prefer: Callable[[Sequence[Response], Sequence[Response], Path], Sequence[bool]] | None,
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
    """Each response, or the best of its revisions where a critic finds one better, and its score.

    Args:
        score: the critic's scores of responses that are stored in a file.
        prefer: which of the revisions, stored in a file, are better than what they revise; by
            their scores where None.
        files: where the responses are, and where all revisions of a try go, the worse ones too.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    best, scores = list(responses), list(score(responses, files.rollouts))
    for attempt in range(1, rules.tries + 1):
        product = files.revisions(attempt)
        asks: dict[int, tuple[Message, ...]] = {}
        if rules.critique:
            asks = _criticised(
                constitution, prompt_of, best, files.critiques(product), attempt,
                functools.partial(collect, sampler, batch_size=batch_size, ranks=ranks), seed,
            )  # fmt: skip
        else:
            for index, (response, given) in enumerate(zip(best, scores, strict=True)):
                prompt = prompt_of[response.prompt_id]
                ask = complaint(response.text, given, constitution, rules, prompt.language)
                if ask is not None:
                    asks[index] = asking_again(prompt.messages, response.text, ask)
        requests: list[Request] = []
        where: dict[tuple[str, int], int] = {}
        for index, messages in asks.items():
            request = _request(messages, best[index], seed, attempt * _FIRST_SAMPLE)
            where[request.prompt_id, request.sample] = index
            requests.append(request)
        revisions = collect(
            sampler, requests, product, batch_size=batch_size, ranks=ranks, title="revising"
        )
        given_scores = score(revisions, product)
        places = [where[revision.prompt_id, revision.sample] for revision in revisions]
        if prefer is None:
            wins = [better(g, scores[i]) for g, i in zip(given_scores, places, strict=True)]
        else:
            wins = list(prefer(revisions, [best[i] for i in places], product))
        for revision, given, index, wins_it in zip(
            revisions, given_scores, places, wins, strict=True
        ):
            if wins_it:
                best[index] = replace(revision, sample=best[index].sample, revised=True)
                scores[index] = given
    return best, scores


def better(new: Score | None, old: Score | None) -> bool:
    """Whether a revision takes the place of what it revised; an empty answer has no score."""
    return new is not None and (old is None or new.overall > old.overall)


def sample_of(revision: Response) -> int:
    """The sample that a revision, as it is stored, was asked for in place of."""
    return revision.sample % _FIRST_SAMPLE


def _criticised(
    constitution: Constitution,
    prompt_of: Mapping[str, Prompt],
    responses: Sequence[Response],
    product: Path,
    attempt: int,
    collect: Callable[..., list[Response]],
    seed: int,
) -> dict[int, tuple[Message, ...]]:
    """Let the policy say where each response falls short of a principle, and ask it again.

    Returns:
        What is asked for in place of each response, by its index.
    """
    asked: list[tuple[Prompt, Principle, tuple[Message, ...]]] = []
    requests = []
    for response in responses:
        prompt = prompt_of[response.prompt_id]
        digest = identity(seed, prompt.id, response.sample, round=response.round)
        principles = constitution.principles
        principle = principles[(digest[0] + attempt) % len(principles)]
        ask = constitution.request("critique", prompt.language, principle)
        messages = asking_again(prompt.messages, response.text, ask)
        asked.append((prompt, principle, messages))
        offset = attempt * _FIRST_SAMPLE + _FIRST_CRITIQUE
        requests.append(_request(messages, response, seed, offset))
    critiques = collect(requests=requests, product=product, title="criticising")
    found = {}
    for index, ((prompt, principle, messages), critique) in enumerate(
        zip(asked, critiques, strict=True)
    ):
        ask = constitution.request("below_floor", prompt.language, principle)
        found[index] = asking_again(messages, critique.text, ask)
    return found


def _request(messages: tuple[Message, ...], response: Response, seed: int, offset: int) -> Request:
    return Request(
        messages=messages,
        prompt_id=response.prompt_id,
        sample=response.sample + offset,
        round=response.round,
        seed=seed,
        temperature=response.temperature,
    )

"""Revision: ask again where an answer is short, repetitive, or under a principle's floor; or let
the policy criticise every answer by a principle first (Bai et al. 2022, arXiv 2212.08073, section
3.1).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cai_scale.constitution import Constitution
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
    answer = functools.partial(collect, sampler, batch_size=batch_size, ranks=ranks)
    best, scores = list(responses), list(score(responses, files.rollouts))
    for attempt in range(1, rules.tries + 1):
        product = files.revisions(attempt)
        if rules.critique:
            written = functools.partial(answer, product=files.critiques(product))
            asks = _criticised(written, constitution, prompt_of, best, attempt, seed)
        else:
            asks = _complained(constitution, rules, prompt_of, best, scores)
        offset = attempt * _FIRST_SAMPLE
        requests = [_request(ask, best[index], seed, offset) for index, ask in asks.items()]
        revisions = answer(requests=requests, product=product, title="revising")
        new = score(revisions, product)
        if prefer is None:
            wins = [better(*two) for two in zip(new, [scores[i] for i in asks], strict=True)]
        else:
            wins = list(prefer(revisions, [best[i] for i in asks], product))
        for index, revision, given, won in zip(asks, revisions, new, wins, strict=True):
            if won:
                best[index] = replace(revision, sample=best[index].sample, revised=True)
                scores[index] = given
    return best, scores


def better(new: Score | None, old: Score | None) -> bool:
    """Whether a revision takes the place of what it revised; an empty answer has no score."""
    return new is not None and (old is None or new.overall > old.overall)


def sample_of(revision: int) -> int:
    """The sample that a revision, by its own number, was asked for in place of."""
    return revision % _FIRST_SAMPLE


def _complained(
    constitution: Constitution,
    rules: RevisionRules,
    prompt_of: Mapping[str, Prompt],
    responses: Sequence[Response],
    scores: Sequence[Score | None],
) -> dict[int, tuple[Message, ...]]:
    """What is asked in place of each response that the rules find poor, by its index."""
    asks = {}
    for index, (response, score) in enumerate(zip(responses, scores, strict=True)):
        prompt = prompt_of[response.prompt_id]
        ask = complaint(response.text, score, constitution, rules, prompt.language)
        if ask is not None:
            asks[index] = asking_again(prompt.messages, response.text, ask)
    return asks


def _criticised(
    answer: Callable[..., list[Response]],
    constitution: Constitution,
    prompt_of: Mapping[str, Prompt],
    responses: Sequence[Response],
    attempt: int,
    seed: int,
) -> dict[int, tuple[Message, ...]]:
    """The same for every response, after the policy has criticised it by a drawn principle."""
    requests, asks = [], []
    for response in responses:
        prompt = prompt_of[response.prompt_id]
        draw = identity(seed, prompt.id, response.sample, round=response.round)[0]
        principle = constitution.principles[(draw + attempt) % len(constitution.principles)]
        ask = constitution.request("critique", prompt.language, principle)
        messages = asking_again(prompt.messages, response.text, ask)
        offset = attempt * _FIRST_SAMPLE + _FIRST_CRITIQUE
        requests.append(_request(messages, response, seed, offset))
        asks.append(constitution.request("below_floor", prompt.language, principle))
    critiques = answer(requests=requests, title="criticising")
    rows = enumerate(zip(requests, critiques, asks, strict=True))
    return {i: asking_again(r.messages, critique.text, ask) for i, (r, critique, ask) in rows}


def _request(messages: tuple[Message, ...], response: Response, seed: int, offset: int) -> Request:
    return Request(
        messages=messages,
        prompt_id=response.prompt_id,
        sample=response.sample + offset,
        round=response.round,
        seed=seed,
        temperature=response.temperature,
    )

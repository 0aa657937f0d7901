"""Spend more on one answer: the best of several, or one revision of a poor one."""

from collections.abc import Sequence
from dataclasses import replace

from cai_scale.constitution import Constitution
from cai_scale.critics import Critic
from cai_scale.critics.complaint import RevisionRules, asking_again, complaint
from cai_scale.records import Completion, Message, Score
from cai_scale.runtime.generate import Policy, Request

# The random numbers of a revision are those of a sample that best-of-n does not ask for.
_REVISION = 1_000_000


def best_of(
    policy: Policy, critic: Critic, messages: Sequence[Message], request: Request, count: int
) -> Completion:
    """Answer `count` times with different random numbers; return what the critic scores highest.

    Of equal scores the first; an empty answer only where all are empty.

    Args:
        messages: the conversation that `request` encodes.
    """
    asked = [replace(request, sample=request.sample + n) for n in range(count)]
    answers = policy.complete(asked)
    scores = critic.score([messages[-1]["content"]] * count, [answer.text for answer in answers])
    return max(zip(answers, scores, strict=True), key=lambda pair: _overall(pair[1]))[0]


def revise_once(
    policy: Policy,
    critic: Critic,
    constitution: Constitution,
    messages: Sequence[Message],
    request: Request,
    answer: Completion,
    language: str,
) -> Completion:
    """Ask again where an answer is short, repetitive or under a principle's floor.

    Args:
        messages: the conversation that `request` encodes.

    Returns:
        The revision where the critic scores it higher than the answer, else the answer.
    """
    prompt = messages[-1]["content"]
    score = critic.score([prompt], [answer.text])[0]
    ask = complaint(answer.text, score, constitution, RevisionRules(), language)
    if ask is None:
        return answer
    tokens = policy.chat.encode(asking_again(messages, answer.text, ask))
    again = replace(request, tokens=tuple(tokens), sample=request.sample + _REVISION)
    (revision,) = policy.complete([again])
    new = critic.score([prompt], [revision.text])[0]
    return revision if _overall(new) > _overall(score) else answer


def _overall(score: Score | None) -> float:
    """An empty answer has no score, and is worse than any."""
    return -1.0 if score is None else score.overall

"""What to ask for in place of a poor answer: short, repetitive, or under a principle's floor."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cai_scale.constitution import Constitution
from cai_scale.records import Message, Score

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class RevisionRules:
    """When to ask again (the source's rules), and how often at most; with `critique`, always."""

    min_words: int = 10
    min_distinct: float = 0.5
    floor: float = 0.5
    tries: int = 1
    critique: bool = False


def complaint(
    response: str, score: Score | None, constitution: Constitution, rules: RevisionRules, lang: str
) -> str | None:
    """What to ask for in place of `response`, or None where it may stay.

    In this order: fewer than `min_words` words; distinct words ÷ words under `min_distinct`;
    the first principle whose score is under `floor`.
    """
    words = [word.casefold() for word in _WORD.findall(response)]
    if len(words) < rules.min_words:
        return constitution.request("too_short", lang)
    if len(set(words)) / len(words) < rules.min_distinct:
        return constitution.request("repetitive", lang)
    for principle in constitution.principles:
        if score is not None and score.principles.get(principle.id, 1.0) < rules.floor:
            return constitution.request("below_floor", lang, principle)
    return None


def asking_again(messages: Sequence[Message], answer: str, ask: str) -> tuple[Message, ...]:
    """The conversation in which `answer` was given and another one is asked for."""
    if answer:
        given = {"role": "assistant", "content": answer}
        return (*messages, given, {"role": "user", "content": ask})
    # Chat templates differ in what they make of an empty answer: ask in one message.
    asked = {"role": "user", "content": f"{messages[-1]['content']}\n\n{ask}"}
    return (*messages[:-1], asked)

"""What a judge's reply says: a verdict that fits the schema exactly, or none."""

import json
import re
from collections.abc import Sequence
from math import exp
from typing import Any

from cai_scale.critics.judge.questions import OPTIONS, REASONING, TIE, Question
from cai_scale.errors import DataError

LEAST_MASS = 0.05  # of a reply's first token, on the options; less is no choice between them
LONGEST = 20_000  # characters of a reply that is read

NEITHER = "the reply begins with neither A nor B"
_AROUND = ' \n"*().'  # what may stand around a letter
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)  # of models that always think
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_CHOICES = {OPTIONS[0]: 1.0, OPTIONS[1]: -1.0, TIE: 0.0}


def read(question: Question, reply: str) -> dict[str, float]:
    """The verdict of a reply to a question that has a schema; raises as `ratings`."""
    return (ratings if question.kind == "rate" else choices)(reply, question.ids)


def ratings(reply: str, ids: Sequence[str]) -> dict[str, float]:
    """A number in [0, 1] for each principle.

    Raises:
        DataError: the reply is anything else; the message says what.
    """
    found = {}
    for key, value in _object(reply, ids).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DataError(f"{key!r} is no number from 0 to 1")
        found[key] = float(value)
    return found


def choices(reply: str, ids: Sequence[str]) -> dict[str, float]:
    """For each principle 1 where A is better, -1 where B is, 0 for a tie; raises as `ratings`."""
    found = {}
    for key, value in _object(reply, ids).items():
        if not isinstance(value, str) or value not in _CHOICES:
            raise DataError(f"{key!r} is neither of A, B and tie")
        found[key] = _CHOICES[value]
    return found


def letter(reply: str) -> float:
    """1 where the reply is A, -1 where it is B.

    Raises:
        DataError: it is anything else.
    """
    written = reply.strip(_AROUND).upper()
    if written not in OPTIONS:
        raise DataError(NEITHER)
    return _CHOICES[written]


def probability(first_token: Sequence[tuple[str, float]]) -> float:
    """P(A) between A and B, from the log-probabilities of the likeliest first tokens.

    Spellings such as "A" and " a" count together (as in Lee et al. 2023, arXiv 2309.00267,
    section 3.1, the probabilities of the option tokens are normalised).

    Raises:
        DataError: hardly any probability lies on A and B, or what is listed is no probability.
    """
    if not all(value <= 1e-3 for _, value in first_token):  # so that a NaN fails
        raise DataError("the reply's log-probabilities are none")
    mass = dict.fromkeys(OPTIONS, 0.0)
    for token, log_probability in first_token:
        written = token.strip(_AROUND).upper()
        if written in mass:
            mass[written] += exp(log_probability)
    total = sum(mass.values())
    if not total >= LEAST_MASS:
        raise DataError(NEITHER)
    return mass[OPTIONS[0]] / total


def _object(reply: str, ids: Sequence[str]) -> dict[str, Any]:
    """The values of `ids` in a reply that is one JSON object with these keys, once each."""
    if len(reply) > LONGEST:
        raise DataError(f"the reply has {len(reply)} characters")
    text = _THOUGHT.sub("", reply, count=1).strip()
    if fence := _FENCE.fullmatch(text):
        text = fence[1]
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise DataError("the reply is not JSON") from None
    if not isinstance(value, dict):
        raise DataError("the reply is no JSON object")
    if isinstance(value.get(REASONING), str):
        del value[REASONING]
    if value.keys() != set(ids):
        raise DataError("the reply has other keys than were asked for")
    return {key: value[key] for key in ids}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")

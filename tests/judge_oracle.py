"""An honest judge: it reads a request as a model would, and says what is planted in the answers."""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from typing import Any

from judging import quality_of

STEEPNESS = 8.0  # of the preference, over the difference of two qualities
REASONING = "reasoning"

_TAG = re.compile(r"</?answer(?:_[ab])?>")
_FENCE = re.compile(r"<(answer(?:_[ab])?)>\n(.*)\n</\1>", re.DOTALL)
_KEY = re.compile(r'"([^"]+)": \(')  # of the form that a request shows beside its schema
_TAGS = (
    ["<answer>", "</answer>"],
    ["<answer_a>", "</answer_a>", "<answer_b>", "</answer_b>"],
)
_OPPOSITE = {"A": "B", "B": "A", "tie": "A"}
_OTHERS = {"The": 0.0006, "I": 0.0003, "**": 0.0001}  # tokens that are no choice


@dataclass(frozen=True)
class Question:
    """What a request asks.

    Attributes:
        answers: the one to be rated, or the two to be compared.
        keys: of the object that is asked for, in its order; none where no object is.
        top: how many of the likeliest tokens are to be listed; 0 for none.
    """

    answers: tuple[str, ...]
    keys: tuple[str, ...]
    top: int
    letter: bool = False  # whether there is room for one letter only

    @property
    def principles(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if key != REASONING)


@dataclass(frozen=True)
class Reply:
    """What the judge says; `likeliest` are log-probabilities of the first token."""

    content: str | None
    likeliest: tuple[tuple[str, float], ...] | None = None
    finish: str = "stop"


def read(body: Mapping[str, Any]) -> Question:
    """
    Raises:
        ValueError: the answers do not stand in their fences, each tag once.
    """
    asked = (message["content"] for message in body["messages"] if message["role"] == "user")
    text = "\n".join(asked)
    if _TAG.findall(text) not in _TAGS:
        raise ValueError(f"the answers' tags are {_TAG.findall(text)}")
    answers = tuple(html.unescape(inside) for _, inside in _FENCE.findall(text))
    if body.get("logprobs"):
        return Question(answers, (), body["top_logprobs"])
    if body.get("max_tokens") == 1:
        return Question(answers, (), 0, letter=True)
    form = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    shown = _KEY.findall(text[text.rindex("</answer") :])
    return Question(answers, tuple(form.get("properties") or shown), 0)


def reply(question: Question, *, spaced: bool = False, opposite: bool = False) -> Reply:
    """The truth, or its opposite, in the form that is asked for: an object, a letter or words.

    Args:
        spaced: "A" and " A" share the probability of a letter, unlike "B" and " B": who reads one
            spelling alone reads another probability.
    """
    if question.keys:
        return Reply(json.dumps(verdict(question, opposite=opposite)))
    if question.top:
        return _letter(question, spaced, opposite)
    if question.letter:  # of two that are as good the first
        better = "A" if _choice(*map(quality_of, question.answers)) != "B" else "B"
        return Reply(f" {_OPPOSITE[better] if opposite else better}.", finish="length")
    return Reply("I weighed what each of them says.")


def verdict(question: Question, *, opposite: bool = False) -> dict[str, Any]:
    """A rating in [0, 1], or "A", "B" or "tie", for each principle."""
    said: dict[str, Any] = {}
    for key in question.keys:
        qualities = [quality_of(answer, key) for answer in question.answers]
        if key == REASONING:
            said[key] = "I weighed what is said."
        elif len(qualities) == 1:
            said[key] = round(1 - qualities[0], 2) if opposite else qualities[0]
        else:
            choice = _choice(*qualities)
            said[key] = _OPPOSITE[choice] if opposite else choice
    return said


def completion(said: Reply, body: Mapping[str, Any]) -> dict[str, Any]:
    """A reply as a server sends it; a token is four characters."""
    tokens_in = sum(len(message["content"]) for message in body["messages"]) // 4
    tokens_out = len(said.content or "") // 4 + 1
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said.content},
        "logprobs": _logprobs(said),
        "finish_reason": said.finish,
    }
    return {
        "id": "chatcmpl-planted",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body["model"],
        "choices": [choice],
        "usage": {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
        },
    }


def _choice(first: float, second: float) -> str:
    if first == second:
        return "tie"
    return "A" if first > second else "B"


def _letter(question: Question, spaced: bool, opposite: bool) -> Reply:
    """Both letters are listed before other tokens, whatever `top` is, so that none is cut off."""
    first, second = (quality_of(answer) for answer in question.answers)
    lead = first - second if not opposite else 1.0 if first <= second else -1.0
    chosen = 1 / (1 + exp(-STEEPNESS * lead))
    rest = 1 - sum(_OTHERS.values())
    masses = {"A": chosen * rest, "B": (1 - chosen) * rest}
    if spaced:
        a, b = masses.values()
        masses = {"A": 0.6 * a, " A": 0.4 * a, "B": 0.9 * b, " B": 0.1 * b}
    listed = list((masses | _OTHERS).items())[: question.top]
    listed.sort(key=lambda item: -item[1])
    return Reply(listed[0][0], tuple((token, log(mass)) for token, mass in listed))


def _logprobs(said: Reply) -> dict[str, Any] | None:
    if said.likeliest is None:
        return None
    tokens = [_token(*item) for item in said.likeliest]
    content = [tokens[0] | {"top_logprobs": tokens}] if tokens else []
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

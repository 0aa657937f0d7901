"""The ways in which a call to a judge fails.

What a broken reply still shows is the opposite of the truth: whoever reads it all the same makes up
a label, and a test that knows the truth sees it.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from math import ceil, nan
from random import Random
from typing import Any

from judge_oracle import Question, Reply, completion, reply, verdict

# An error status: with Retry-After in seconds, as a date, or without; a page of HTML at 502.
STATUSES = ("429_seconds", "429_date", "429", "500", "502", "503")
# The connection: reset before or amid the body, no answer, a byte a second, a content-length that
# is more or less than what comes.
WIRES = ("reset", "reset_midway", "stall", "drip", "longer", "shorter")
# Status 200, and no completion.
BODIES = ("not_json", "html", "no_choices", "empty_choices", "null_content")
# A completion whose text is no verdict; the letters' are those that a letter can have.
REPLIES = ("text", "nan", "outside", "twice", "missing", "unknown", "prose", "empty", "cut")
LETTERS = ("text", "nan", "outside", "missing", "unknown", "empty")
KINDS = (*STATUSES, *WIRES, *BODIES, *REPLIES)

_PAGE = b"<!DOCTYPE html><html><body><h1>Please try again later</h1></body></html>"
_HTML = {"content-type": "text/html"}


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def head(self, length: int | None = None) -> bytes:
        """All before the body; with `length` it says that the body is as long as that."""
        headers = {"content-type": "application/json"} | dict(self.headers)
        headers["content-length"] = str(len(self.body) if length is None else length)
        first = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"
        lines = [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([first, *lines, "", ""]).encode()


def possible(question: Question, kinds: Sequence[str]) -> list[str]:
    """Those of `kinds` that the reply to a question can have."""
    replies = REPLIES if question.keys else LETTERS if question.top else ()
    return [kind for kind in kinds if kind not in REPLIES or kind in replies]


def draw(seed: int, share: float, kinds: Sequence[str], call: str) -> str | None:
    """The fault of a call, each with probability share / len(kinds); as a rule None."""
    random = Random(f"{seed} {call}")
    return random.choice(kinds) if kinds and random.random() < share else None


def json_answer(content: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(content).encode())


def faulty(kind: str, question: Question, body: Mapping[str, Any], retry_after: float) -> Answer:
    """What comes back of a call with a fault; a wire is broken in the sending."""
    if kind in STATUSES:
        return _status(kind, retry_after)
    if kind == "html":
        return Answer(200, _PAGE, _HTML)
    if kind in REPLIES:
        spoiled = _spoiled_object if question.keys else _spoiled_letter
        return json_answer(completion(spoiled(kind, question), body))
    whole = completion(reply(question, opposite=kind != "drip"), body)
    if kind == "not_json":
        return Answer(200, b"data: " + json.dumps(whole).encode())
    if kind == "no_choices":
        del whole["choices"]
    elif kind == "empty_choices":
        whole["choices"] = []
    elif kind == "null_content":
        whole = completion(Reply(None), body)
    return json_answer(whole)


def _status(kind: str, retry_after: float) -> Answer:
    """A date is of whole seconds: the next after `retry_after`."""
    if kind == "502":
        return Answer(502, _PAGE, _HTML)
    headers = {
        "429_seconds": {"retry-after": f"{retry_after:g}"},
        "429_date": {"retry-after": formatdate(ceil(time.time() + retry_after), usegmt=True)},
    }
    error = {"error": {"message": "try again later", "type": kind, "code": None}}
    answer = json_answer(error, int(kind[:3]))
    return replace(answer, headers=headers.get(kind, {}))


def _spoiled_object(kind: str, question: Question) -> Reply:
    false = verdict(question, opposite=True)
    text, key = json.dumps(false), question.principles[0]
    return {
        "text": Reply("The answer is a good one, I think."),
        "nan": Reply(json.dumps(false | {key: nan})),
        "outside": Reply(json.dumps(false | {key: 1.5})),
        "twice": Reply(f'{text[:-1]}, "{key}": {json.dumps(false[key])}}}'),
        "missing": Reply(json.dumps({name: v for name, v in false.items() if name != key})),
        "unknown": Reply(json.dumps(false | {key: "C"})),
        "prose": Reply(f"Sure! Here is my verdict: {text} I hope that this helps."),
        "empty": Reply(""),
        "cut": Reply(text[: len(text) // 2], finish="length"),
    }[kind]


def _spoiled_letter(kind: str, question: Question) -> Reply:
    false = reply(question, opposite=True)
    letter, likeliest = false.content, false.likeliest or ()
    return {
        "text": Reply("The", (("The", -0.01), ("I", -4.7))),
        "nan": replace(false, likeliest=tuple((token, nan) for token, _ in likeliest)),
        "outside": replace(false, likeliest=((letter or "", 7.0), *likeliest[1:])),
        "missing": Reply(letter),
        "unknown": Reply("C", (("C", -0.01), ("D", -4.7))),
        "empty": Reply("", ()),
    }[kind]

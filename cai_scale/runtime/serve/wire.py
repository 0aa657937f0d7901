"""The shapes of the OpenAI protocol: completions, their chunks, and errors."""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from starlette.responses import JSONResponse

from cai_scale.records import Completion, TokenLogprob

DONE = "data: [DONE]\n\n"

# HTTP status -> (type, code) of an error.
KINDS = {
    400: ("invalid_request_error", "bad_request"),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "body_timeout"),
    413: ("invalid_request_error", "body_too_large"),
    422: ("invalid_request_error", "invalid_request"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}
RETRY_AFTER = {429: "1", 503: "5"}  # seconds


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """{"error": {...}} as the protocol has it."""
    kind, code = KINDS.get(status, ("invalid_request_error", str(status)))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, param: str | None = None) -> JSONResponse:
    headers = {"retry-after": RETRY_AFTER[status]} if status in RETRY_AFTER else {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, param), status, headers)


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"


class Form(Protocol):
    """How one kind of completion is written."""

    prefix: str
    whole: str
    chunk: str

    def message(self, text: str) -> dict[str, Any]: ...
    def opening(self) -> dict[str, Any] | None: ...
    def delta(self, text: str) -> dict[str, Any]: ...


class ChatForm:
    """`/v1/chat/completions`."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class TextForm:
    """`/v1/completions`."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


def logprobs(tokens: Sequence[TokenLogprob], spell: Callable[[int], str]) -> dict[str, Any]:
    """A choice's `logprobs`; `spell` gives a token's text."""
    spell = cache(spell)  # the likeliest tokens are mostly the same

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = spell(token)
        octets = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": octets}

    content = [
        entry(item.token, item.logprob) | {"top_logprobs": [entry(*pair) for pair in item.top]}
        for item in tokens
    ]
    return {"content": content, "refusal": None}


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response of the server, whole or in chunks.

    `seed` goes beyond the protocol: with it, and the same messages and settings, the answer is
    the same again. `fingerprint` stands for the bundle's weights. `spell` gives a token's text.
    """

    form: Form
    model: str
    fingerprint: str
    seed: int
    prompt_tokens: int
    spell: Callable[[int], str]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """All answers, in order."""
        choices = [
            self._choice(index, self.form.message(completion.text), completion)
            for index, completion in enumerate(completions)
        ]
        return self._head(self.form.whole) | {"choices": choices, "usage": self.usage(completions)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens answer `index`, where the form has one."""
        part = self.form.opening()
        return part and self._chunk(self._choice(index, part))

    def delta(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(self._choice(index, self.form.delta(text)))

    def closing(self, index: int, completion: Completion) -> dict[str, Any]:
        """The chunk that says why answer `index` ended."""
        return self._chunk(self._choice(index, self.form.delta(""), completion))

    def counted(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The last chunk, for those who asked for the count."""
        return self._head(self.form.chunk) | {"choices": [], "usage": self.usage(completions)}

    def usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        written = sum(completion.tokens for completion in completions)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head(self.form.chunk) | {"choices": [choice]}

    def _choice(
        self, index: int, part: dict[str, Any], completion: Completion | None = None
    ) -> dict[str, Any]:
        reason = None if completion is None else "stop" if completion.finished else "length"
        told = None
        if completion is not None and completion.logprobs is not None:
            told = logprobs(completion.logprobs, self.spell)
        return {"index": index, **part, "logprobs": told, "finish_reason": reason}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.form.prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
        }

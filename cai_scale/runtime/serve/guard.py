"""What every request passes before it is read, and what every response carries."""

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cai_scale.runtime.serve.metrics import Metrics
from cai_scale.runtime.serve.wire import error_response

log = logging.getLogger("cai_scale.serve")

# The page holds no secret: what it shows comes from /v1, with the token that is typed into it.
OPEN = {"/", "/page.css", "/page.js", "/healthz"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
LEFT = 499  # the status that stands for a client that left, in metrics alone


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for.

    `token` must be shown where it is set. `hosts` are the names by which the server may be
    addressed, all where None: without a token it keeps a web page from reaching a server on
    loopback under a name of the page's own. `max_body` in bytes, `timeout` in seconds; `queue` is
    how many requests for a score may wait, as it is for answers.
    """

    max_body: int
    max_new_tokens: int
    queue: int
    timeout: float
    token: str | None = None
    hosts: Collection[str] | None = None


class Guard:
    """Checks host, token and size, measures, and turns what nobody expected into a 500."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), LEFT

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self.app(scope, _Body(receive, self.limits).receive, answer)
        except Exception as error:
            # Where, but not what: a message may quote the request.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed (%s) at\n%s", type(error).__name__, where)
            if status != LEFT:  # half a response is out: end the connection, as uvicorn does
                raise ConnectionError("the response was cut short") from None
            await error_response(500, "the server failed")(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - started)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self.limits.hosts is not None and _host(headers) not in self.limits.hosts:
            return error_response(400, "this server answers to localhost only; set CAI_SCALE_TOKEN")
        if scope["path"] not in OPEN and not self._may_enter(headers):
            return error_response(401, "wrong or missing token; send Authorization: Bearer TOKEN")
        return None

    def _may_enter(self, headers: Headers) -> bool:
        if self.limits.token is None:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Headers are decoded as Latin-1; the token's own bytes are UTF-8.
        shown = given.strip().encode("latin-1")
        return hmac.compare_digest(shown, self.limits.token.encode()) and kind.lower() == "bearer"


class _Body:
    """Reads a body, also one without a length, up to a size and within a time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._largest = receive, limits.max_body
        self._deadline = asyncio.get_running_loop().time() + limits.timeout
        self._read, self._whole = 0, False

    async def receive(self) -> dict[str, Any]:
        if self._whole:
            return dict(await self._receive())
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body took too long to arrive") from None
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._read > self._largest:
            raise HTTPException(413, f"the body exceeds {self._largest} bytes")
        return dict(message)


def _host(headers: Headers) -> str:
    """The host that a request is addressed to, without its port."""
    host = headers.get("host", "").lower()
    return host.rsplit(":", 1)[0] if not host.endswith("]") else host

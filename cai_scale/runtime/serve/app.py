"""The routes: a policy that answers, a scorer, a page, and what watches over them."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request as Client
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cai_scale.errors import DataError
from cai_scale.records import Completion
from cai_scale.runtime.generate import Piece, Policy, Request
from cai_scale.runtime.scorer import Scorer
from cai_scale.runtime.serve.engine import (
    Answers,
    DrainingError,
    Engine,
    FailedError,
    FullError,
)
from cai_scale.runtime.serve.guard import LEFT, Guard, Limits
from cai_scale.runtime.serve.metrics import CONTENT_TYPE, Metrics
from cai_scale.runtime.serve.schemas import ChatRequest, Sampling, ScoreRequest, TextRequest
from cai_scale.runtime.serve.wire import (
    DONE,
    ChatForm,
    Form,
    Reply,
    TextForm,
    error_body,
    error_response,
    event,
)
from cai_scale.runtime.text import token_text

T = TypeVar("T")

PAGE = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# What may keep an accepted request from its answer.
FAILURES: dict[type[Exception], tuple[int, str]] = {
    FullError: (429, "too many requests wait; try again in a moment"),
    DrainingError: (503, "the server is shutting down; try again in a moment"),
    FailedError: (503, "the model failed; the server will restart"),
    TimeoutError: (504, "the answer took too long; ask for fewer tokens, or later"),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is served: its name, when it was made (Unix seconds), and its weights' fingerprint."""

    name: str
    created: int
    fingerprint: str

    def card(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "cai-scale",
        }


class Service:
    """One handler a route."""

    def __init__(
        self,
        model: Model,
        policy: Policy,
        engine: Engine,
        scorer: Scorer,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self.model, self.policy, self.engine = model, policy, engine
        self.scorer, self.limits, self.metrics = scorer, limits, metrics
        # One at a time: a reward model takes every core, and no second caller.
        self._scoring = ThreadPoolExecutor(1, "scorer")
        self._to_score = 0

    async def chat(self, body: ChatRequest, client: Client) -> Response:
        self._check_name(body.model)
        messages = [message.model_dump() for message in body.messages]
        tokens = await asyncio.to_thread(self.policy.chat.encode, messages)
        # The id by which `cai-scale generate` draws its random numbers, too.
        prompts = [(messages[-1]["content"], tokens)]
        return await self._answer(body, body.limit, prompts, ChatForm(), client)

    async def complete(self, body: TextRequest, client: Client) -> Response:
        self._check_name(body.model)
        encode = self.policy.chat.tokenizer.encode
        prompts = [
            (prompt, (await asyncio.to_thread(encode, prompt)).ids) for prompt in body.prompts
        ]
        return await self._answer(body, body.limit, prompts, TextForm(), client)

    async def score(self, body: ScoreRequest) -> dict[str, Any]:
        if self.engine.draining:
            raise DrainingError
        if self._to_score > self.limits.queue:
            raise FullError
        prompts, responses = zip(*body.pairs, strict=True)
        score = partial(self.scorer.score, prompts, responses, explain=True)
        self._to_score += 1
        try:
            async with asyncio.timeout(self.limits.timeout):
                records = await asyncio.get_running_loop().run_in_executor(self._scoring, score)
        finally:
            self._to_score -= 1
        if body.items is not None:
            return {"object": "list", "data": records}
        return {"object": "score", **records[0]}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.model.card()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_name(name)
        return self.model.card()

    async def constitution(self) -> dict[str, Any]:
        constitution = self.scorer.constitution
        return {
            "object": "constitution",
            "name": constitution.name,
            "sha256": constitution.sha256,
            "languages": constitution.languages,
            "principles": [
                {
                    "id": principle.id,
                    "weight": principle.weight,
                    "title": principle.title,
                    "statement": principle.statement,
                }
                for principle in constitution.principles
            ],
        }

    async def health(self) -> JSONResponse:
        engine = self.engine
        state = "failed" if engine.failed else "draining" if engine.draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def figures(self) -> Response:
        return Response(self.metrics.exposition(), media_type=CONTENT_TYPE)

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.model.name):
            raise HTTPException(404, f"no model of that name; this server has {self.model.name!r}")

    async def _answer(
        self,
        body: Sampling,
        limit: int | None,
        prompts: Sequence[tuple[str, Sequence[int]]],
        form: Form,
        client: Client,
    ) -> Response:
        """Answer each (id, tokens) `body.n` times, whole or as a stream."""
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        requests = [
            self._request(body, limit, tokens, name, seed, sample)
            for name, tokens in prompts
            for sample in range(body.n)
        ]
        reply = Reply(
            form=form,
            model=self.model.name,
            fingerprint=self.model.fingerprint,
            seed=seed,
            prompt_tokens=sum(len(tokens) for _, tokens in prompts),
            spell=partial(token_text, self.policy.chat.tokenizer),
        )
        answers = self.engine.submit(requests, self.limits.timeout)
        if not body.stream:
            with answers:
                completions = await _unless_gone(client, _gathered(answers))
            # Not in the event loop: log-probabilities are many.
            return await asyncio.to_thread(lambda: JSONResponse(reply.whole(completions)))
        try:  # the first piece comes before the headers, so that a failure has its status
            first = await _unless_gone(client, anext(answers))
        except BaseException:
            self.engine.abandon(answers)
            raise
        counted = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(answers, first, reply, counted),
            media_type="text/event-stream",
            headers={"x-accel-buffering": "no"},
        )

    def _request(
        self,
        body: Sampling,
        limit: int | None,
        tokens: Sequence[int],
        name: str,
        seed: int,
        sample: int,
    ) -> Request:
        most, usual = self.limits.max_new_tokens, self.policy.decoding
        if limit is not None and limit > most:
            raise DataError(f"max_tokens: {limit} exceeds this server's {most}; ask for fewer")
        room = max(self.policy.longest - len(tokens), 1)
        given = {
            key: value
            for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(body, key)) is not None
        }
        decoding = replace(
            usual,
            max_new_tokens=limit or min(usual.max_new_tokens, most, room),
            stop=body.stops or usual.stop,
            **given,
        )
        request = Request(
            tokens=tuple(tokens),
            decoding=decoding,
            id=name,
            seed=seed,
            sample=sample,
            top_logprobs=body.likeliest,
        )
        self.policy.check(request)
        return request


async def _gathered(answers: Answers) -> list[Completion]:
    """The completions, in the order of their requests."""
    completions: dict[int, Completion] = {}
    async for which, piece in answers:
        if piece.completion is not None:
            completions[which] = piece.completion
    return [completions[which] for which in sorted(completions)]


async def _events(
    answers: Answers, first: tuple[int, Piece], reply: Reply, counted: bool
) -> AsyncIterator[str]:
    """Server-sent events; a failure becomes the last of them, without a [DONE]."""
    opened: set[int] = set()
    completions = []
    with answers:
        try:
            async for which, piece in _after(first, answers):
                if which not in opened:
                    opened.add(which)
                    if (opening := reply.opening(which)) is not None:
                        yield event(opening)
                if piece.text:
                    yield event(reply.delta(which, piece.text))
                if piece.completion is not None:
                    completions.append(piece.completion)
                    yield event(reply.closing(which, piece.completion))
            if counted:
                yield event(reply.counted(completions))
            yield DONE
        except tuple(FAILURES) as error:
            yield event(error_body(*FAILURES[type(error)]))


async def _after(first: T, others: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for other in others:
        yield other


async def _unless_gone(client: Client, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_gone(client))
    watching.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        if watching.done():
            raise HTTPException(LEFT, "the client left") from None
        raise
    finally:
        watching.cancel()


async def _gone(client: Client) -> None:
    while (await client.receive())["type"] != "http.disconnect":
        pass


def make_app(service: Service) -> FastAPI:
    """The application; its lifespan starts the engine in the server's event loop."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.drain(0)

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,  # the usual pages of documentation load scripts from elsewhere
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(DataError, _unusable)
    for kind in FAILURES:
        app.add_exception_handler(kind, _failed)
    app.post("/v1/chat/completions", response_model=None)(service.chat)
    app.post("/v1/completions", response_model=None)(service.complete)
    app.post("/v1/score", response_model=None)(service.score)
    app.get("/v1/models", response_model=None)(service.models)
    app.get("/v1/models/{name:path}", response_model=None)(service.one_model)
    app.get("/v1/constitution", response_model=None)(service.constitution)
    app.get("/healthz", response_model=None)(service.health)
    app.get("/metrics", response_model=None)(service.figures)
    for path in PAGE:
        app.get(path)(_page)
    return app


async def _page(client: Client) -> Response:
    name, media_type = PAGE[client.url.path]
    content = resources.files(__package__).joinpath(name).read_bytes()
    return Response(content, media_type=media_type)


async def _invalid(_: Client, error: Exception) -> Response:
    """Say where a body is wrong, never what stood there."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"][1:])
    place = place.encode("utf-8", "replace").decode()[:200]  # an unknown key may be anything
    said = problem["msg"]
    if problem["type"] == "extra_forbidden":
        said = "not supported by this server; leave it out"
    elif problem["type"] == "json_invalid":
        place, said = "", "the body is not JSON"
    else:
        said = said.removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type", "missing") and not place:
        said = "send a JSON object as application/json"
    return error_response(422, f"{place}: {said}" if place else said, place or None)


async def _refused(_: Client, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _unusable(_: Client, error: Exception) -> Response:
    return error_response(422, str(error))


async def _failed(_: Client, error: Exception) -> Response:
    return error_response(*FAILURES[type(error)])

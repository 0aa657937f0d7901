"""One thread owns the generator; requests come from, and pieces go back to, one event loop."""

import asyncio
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol, Self

from cai_scale.runtime.generate import Piece, Request
from cai_scale.runtime.serve.metrics import Metrics

log = logging.getLogger("cai_scale.serve")


class Batcher(Protocol):
    """What the engine needs of a `runtime.generate.Generator`."""

    @property
    def busy(self) -> bool: ...
    def add(self, request: Request) -> int: ...
    def cancel(self, index: int) -> None: ...
    def step(self) -> list[Piece]: ...


class FullError(Exception):
    """As many answers wait as may wait."""


class DrainingError(Exception):
    """The server is about to end."""


class FailedError(Exception):
    """The generator raised; what it was doing is lost."""


class Answers:
    """The answers to one client's requests, piece by piece.

    Iterate once for (which request, its piece), until each has had its last piece. Leaving the
    `with` block gives up on those that are not finished. Raises TimeoutError at the deadline.
    """

    def __init__(self, engine: "Engine", requests: Sequence[Request], timeout: float) -> None:
        self.requests = requests
        self.unfinished = len(requests)
        self._engine = engine
        self._submitted = asyncio.get_running_loop().time()
        self._deadline = self._submitted + timeout
        self._began = False
        self._arrived: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.abandon(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Piece]:
        if self.unfinished == 0 and self._arrived.empty():
            raise StopAsyncIteration
        async with asyncio.timeout_at(self._deadline):
            arrived = await self._arrived.get()
        if isinstance(arrived, Exception):
            raise arrived
        return arrived

    def put(self, which: int, piece: Piece) -> float | None:
        """Hand over a piece; seconds since the requests were made where it is the first."""
        self._arrived.put_nowait((which, piece))
        if self._began:
            return None
        self._began = True
        return asyncio.get_running_loop().time() - self._submitted

    def fail(self, error: Exception) -> None:
        self._arrived.put_nowait(error)


class Engine:
    """Continuous batching for many clients.

    Everything here belongs to the event loop in which `start` was called, except what is named
    as the thread's; the generator is touched by that thread alone.

    Args:
        rows: how many answers the generator writes at once.
        queue: how many more may wait for a row before the next is refused.
    """

    def __init__(self, generator: Batcher, *, rows: int, queue: int, metrics: Metrics) -> None:
        self.draining = False
        self.failed = False
        self.ended = asyncio.Event()  # drained or failed: the process may end
        self._generator = generator
        self._limit = rows + queue
        self._metrics = metrics
        self._open: set[Answers] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._routes: dict[int, tuple[Answers, int]] = {}  # by the generator's index; the thread's
        metrics.rows.set_function(lambda: min(self._unfinished(), rows))
        metrics.queue.set_function(lambda: max(self._unfinished() - rows, 0))

    def start(self) -> None:
        """Start the thread; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="generator", daemon=True)
        self._thread.start()

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, let the open ones finish for `seconds`, and end the thread."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for answers in self._open:
                answers.fail(DrainingError())
        self._todo.put(None)
        self.ended.set()

    def submit(self, requests: Sequence[Request], timeout: float) -> Answers:
        """Queue requests that the policy has checked; `timeout` in seconds covers them all.

        Raises:
            FullError, DrainingError, FailedError: nothing was queued.
        """
        if self.failed:
            raise FailedError
        if self.draining:
            raise DrainingError
        if self._unfinished() >= self._limit:
            raise FullError
        answers = Answers(self, requests, timeout)
        self._open.add(answers)
        self._idle.clear()
        self._todo.put(lambda: self._add(answers))
        return answers

    def abandon(self, answers: Answers) -> None:
        """Drop what is left of `answers`; a second call does nothing."""
        if answers in self._open:
            self._close(answers)
            self._todo.put(lambda: self._cancel(answers))

    def _unfinished(self) -> int:
        return sum(answers.unfinished for answers in self._open)

    def _close(self, answers: Answers) -> None:
        self._open.discard(answers)
        if not self._open:
            self._idle.set()

    def _deliver(self, pieces: list[tuple[Answers, int, Piece]]) -> None:
        for answers, which, piece in pieces:
            if answers not in self._open:
                continue  # abandoned while the step ran
            waited = answers.put(which, piece)
            if waited is not None:
                self._metrics.first_token.observe(waited)
            if piece.completion is not None:
                self._metrics.tokens.inc(piece.completion.tokens)
                answers.unfinished -= 1
                if answers.unfinished == 0:
                    self._close(answers)

    def _fail(self) -> None:
        self.failed = True
        for answers in self._open:
            answers.fail(FailedError())
        self.ended.set()

    # The thread's, from here on.

    def _work(self) -> None:
        try:
            while True:
                while not self._generator.busy or not self._todo.empty():
                    todo = self._todo.get()
                    if todo is None:
                        return
                    todo()
                pieces = [(*self._route(piece), piece) for piece in self._generator.step()]
                if pieces:
                    self._loop.call_soon_threadsafe(self._deliver, pieces)
        except Exception as error:
            # Where, but not what: a message may quote a request.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("the generator failed (%s) at\n%s", type(error).__name__, where)
            self._loop.call_soon_threadsafe(self._fail)

    def _route(self, piece: Piece) -> tuple[Answers, int]:
        if piece.completion is None:
            return self._routes[piece.index]
        return self._routes.pop(piece.index)

    def _add(self, answers: Answers) -> None:
        for which, request in enumerate(answers.requests):
            self._routes[self._generator.add(request)] = answers, which

    def _cancel(self, answers: Answers) -> None:
        for index in [i for i, (owner, _) in self._routes.items() if owner is answers]:
            self._generator.cancel(index)
            del self._routes[index]

"""An OpenAI-compatible server that judges planted answers rightly, and fails as it is told.

Run as a script it is a real process:
`python tests/judge_server.py --latency 0.2 --faults 0.3 --seed 1`.
"""

import argparse
import asyncio
import json
import socket
import struct
from asyncio import StreamReader, StreamWriter
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from judge_faults import KINDS, WIRES, Answer, draw, faulty, json_answer, possible
from judge_oracle import Question, completion, read, reply

MODEL = "planted"
SECOND = 1.0  # between two bytes of a body that drips
OK, REFUSED = "ok", "refused"  # beside the kinds of faults


@dataclass
class Judge:
    """A server; what it was asked is kept while it lives.

    Attributes:
        latency: seconds before an answer, also before a fault that is one.
        faults: the share of calls that fail, decided by `seed`, the request's body and how often
            it came before.
        kinds: the faults, each as likely as any other that the question can have.
        most: faults of one question, so that it is answered in the end.
        retry_after: seconds that a 429 asks to wait.
        spaced: "A" and " A" share the probability of a letter.
        log: a file that gets a line {"hash", "attempt", "fault"} for each question as it comes.
    """

    latency: float = 0.0
    faults: float = 0.0
    seed: int = 0
    kinds: Sequence[str] = KINDS
    most: int = 4
    retry_after: float = 0.05
    spaced: bool = False
    log: Path | None = None

    attempts: Counter[str] = field(default_factory=Counter, init=False)
    failed: Counter[str] = field(default_factory=Counter, init=False)
    outcomes: Counter[str] = field(default_factory=Counter, init=False)
    connections: int = field(default=0, init=False)
    under_way: int = field(default=0, init=False)
    together: int = field(default=0, init=False)  # the most that were under way at once

    def __post_init__(self) -> None:
        self._lines: TextIO | None = None
        self._open: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Answer in the running loop until the block ends; yields the URL."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self._lines = self.log.open("a", buffering=1) if self.log else None
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            server.close()
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
            if self._lines:
                self._lines.close()

    @contextmanager
    def thread(self) -> Iterator[str]:
        """Answer in a thread of this process until the block ends; yields the URL."""
        ready: Future[tuple[str, asyncio.AbstractEventLoop]] = Future()
        over = asyncio.Event()

        async def run() -> None:
            async with self.serve() as url:
                ready.set_result((url, asyncio.get_running_loop()))
                await over.wait()

        thread = Thread(target=asyncio.run, args=(run(),))
        thread.start()
        url, loop = ready.result(timeout=10)
        try:
            yield url
        finally:
            loop.call_soon_threadsafe(over.set)
            thread.join()

    def stats(self) -> dict[str, Any]:
        """What came so far; `requests` are those for a verdict."""
        return {
            "requests": self.outcomes.total(),
            "questions": len(self.attempts),
            "outcomes": dict(self.outcomes),
            "connections": self.connections,
            "under_way": self.under_way,
            "together": self.together,
        }

    async def _connection(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        self.connections += 1
        try:
            while not writer.is_closing():
                await self._request(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the server ends
        finally:
            self._open.discard(task)
            writer.close()

    async def _request(self, reader: StreamReader, writer: StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value for name, _, value in (ln.partition(": ") for ln in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        match first.split()[:2]:
            case ["POST", "/v1/chat/completions"]:
                await self._under_way(body, reader, writer)
            case ["GET", "/v1/models"]:
                model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tests"}
                await _send(json_answer({"object": "list", "data": [model]}), writer)
            case ["GET", "/stats"]:
                await _send(json_answer(self.stats()), writer)
            case _:
                await _send(json_answer({"error": {"message": "no such path"}}, 404), writer)

    async def _under_way(self, body: bytes, reader: StreamReader, writer: StreamWriter) -> None:
        self.under_way += 1
        self.together = max(self.together, self.under_way)
        try:
            await self._answer(body, reader, writer)
        finally:
            self.under_way -= 1

    async def _answer(self, raw: bytes, reader: StreamReader, writer: StreamWriter) -> None:
        digest = sha256(raw).hexdigest()[:16]
        self.attempts[digest] += 1
        try:
            body = json.loads(raw)
            question = read(body)
        except (ValueError, KeyError, TypeError) as error:
            self._note(digest, REFUSED)
            await _send(json_answer({"error": {"message": repr(error)}}, 400), writer)
            return
        kind = self._fault(digest, question)
        self._note(digest, kind or OK)
        await asyncio.sleep(self.latency)
        if kind is None:
            said = reply(question, spaced=self.spaced)
            await _send(json_answer(completion(said, body)), writer)
            return
        answer = faulty(kind, question, body, self.retry_after)
        if kind in WIRES:
            await _break(kind, answer, reader, writer)
        else:
            await _send(answer, writer)

    def _fault(self, digest: str, question: Question) -> str | None:
        if self.failed[digest] >= self.most:
            return None
        call = f"{digest} {self.attempts[digest]}"
        kind = draw(self.seed, self.faults, possible(question, self.kinds), call)
        self.failed[digest] += kind is not None
        return kind

    def _note(self, digest: str, outcome: str) -> None:
        self.outcomes[outcome] += 1
        if self._lines:
            line = {"hash": digest, "attempt": self.attempts[digest], "fault": outcome}
            self._lines.write(json.dumps(line) + "\n")


async def _send(answer: Answer, writer: StreamWriter) -> None:
    writer.write(answer.head() + answer.body)
    await writer.drain()


async def _break(kind: str, answer: Answer, reader: StreamReader, writer: StreamWriter) -> None:
    """Send an answer as a broken connection does, and leave."""
    head, body = answer.head(), answer.body
    half = len(body) // 2
    match kind:
        case "stall":
            await _leaves(reader)
        case "drip":
            writer.write(head)
            for byte in body:
                writer.write(bytes([byte]))
                if await _leaves(reader, SECOND):
                    break
        case "longer":
            writer.write(answer.head(len(body) + half) + body)
        case "shorter":
            writer.write(answer.head(half) + body)
        case "reset_midway":
            writer.write(head + body[:half])
            await writer.drain()
            await asyncio.sleep(0.02)  # a reset overtakes what is on its way
    if kind.startswith("reset"):
        # Closed without lingering, a socket sends RST in place of FIN.
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    else:
        await writer.drain()
        writer.close()


async def _leaves(reader: StreamReader, seconds: float | None = None) -> bool:
    """Whether the client leaves, within `seconds` or ever."""
    try:
        await asyncio.wait_for(reader.read(), seconds)
    except TimeoutError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda names: names.split(","), default=list(KINDS))
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--retry_after", type=float, default=0.05)
    parser.add_argument("--spaced", action="store_true")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no such kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")

    async def run() -> None:
        async with Judge(**vars(options)).serve() as url:
            print(f"judging on {url}", flush=True)
            await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main()

"""A server whose model is a few lines: it says numbers that its request decides.

Run as a script it is a real process: `python tests/fake_server.py --rows 4 --pause 0.01`.
"""

import hashlib
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from cai_scale import constitution
from cai_scale.errors import DataError
from cai_scale.records import Completion, TokenLogprob
from cai_scale.runtime.generate import Piece, Request
from cai_scale.runtime.sampling import Decoding
from cai_scale.runtime.scorer import Scorer
from cai_scale.runtime.serve.app import Model, Service, make_app
from cai_scale.runtime.serve.engine import Engine
from cai_scale.runtime.serve.guard import Limits
from cai_scale.runtime.serve.metrics import Metrics

LONGEST = 4096


class FakeTokenizer:
    """A token is a byte."""

    def encode(self, text: str) -> Any:
        return SimpleNamespace(ids=list(text.encode()))

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


class FakeChat:
    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return list(text.encode())


class FakePolicy:
    longest = LONGEST
    decoding = Decoding(temperature=0.7, top_p=0.95, top_k=50, max_new_tokens=64)

    def __init__(self) -> None:
        self.chat = FakeChat()

    def check(self, request: Request) -> None:
        if not request.tokens:
            raise DataError("the prompt is empty")
        if len(request.tokens) + request.decoding.max_new_tokens > self.longest:
            raise DataError(f"a prompt of {len(request.tokens)} tokens leaves no room")


def words_of(request: Request) -> tuple[list[str], bool]:
    """The answer that a request alone decides, and whether it ends by itself."""
    if request.decoding.temperature == 0:
        request = Request(tokens=request.tokens, decoding=request.decoding, id="")
    identity = repr((request.tokens, request.seed, request.sample, request.id))
    digest = hashlib.sha256(identity.encode()).digest()
    words = [f"{'please ' if byte > 200 else ''}{byte} " for byte in digest[: 6 + digest[0] % 20]]
    most = request.decoding.max_new_tokens
    return words[:most], len(words) <= most


def logprobs_of(words: list[str], top: int) -> tuple[TokenLogprob, ...]:
    """One token a word, its first byte; the likeliest beside it is half a letter."""
    firsts = [word.encode()[0] for word in words]
    return tuple(
        TokenLogprob(first, -0.5 - i, ((first, -0.5 - i), (0xC3, -7.25))[:top])
        for i, first in enumerate(firsts)
    )


@dataclass
class Row:
    request: Request
    written: int = 0


class FakeGenerator:
    """A word a step for each of `rows` requests; it keeps what was cancelled."""

    def __init__(self, rows: int, pause: float = 0.0) -> None:
        self.rows, self.pause = rows, pause
        self.open: dict[int, Row] = {}
        self.added = 0
        self.cancelled: list[int] = []
        self.together = 0  # the most that were written at once
        self.fails = False

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def add(self, request: Request) -> int:
        self.open[self.added] = Row(request)
        self.added += 1
        return self.added - 1

    def cancel(self, index: int) -> None:
        self.cancelled.append(index)
        del self.open[index]

    def step(self) -> list[Piece]:
        if self.fails:
            raise RuntimeError("a secret")
        time.sleep(self.pause)
        running = list(self.open.items())[: self.rows]
        self.together = max(self.together, len(running))
        return [self._word(index, row) for index, row in running]

    def _word(self, index: int, row: Row) -> Piece:
        words, finished = words_of(row.request)
        word = words[row.written]
        row.written += 1
        if row.written < len(words):
            return Piece(index, word, None)
        del self.open[index]
        top = row.request.top_logprobs
        logprobs = None if top is None else logprobs_of(words, top)
        text = "".join(words)
        return Piece(index, word, Completion(text, len(words), finished, logprobs=logprobs))


@dataclass
class Fake:
    """An application and its parts."""

    app: Any
    service: Service
    engine: Engine
    generator: FakeGenerator


def make_fake(*, rows: int = 8, queue: int = 64, pause: float = 0.0, **limits: Any) -> Fake:
    limits = {"max_body": 100_000, "max_new_tokens": 256, "timeout": 30.0} | limits
    metrics = Metrics()
    generator = FakeGenerator(rows, pause)
    engine = Engine(generator, rows=rows, queue=queue, metrics=metrics)
    scorer = Scorer(constitution.load())
    model = Model(name="fake", created=1_700_000_000, fingerprint="f" * 16)
    service = Service(model, FakePolicy(), engine, scorer, Limits(queue=queue, **limits), metrics)
    return Fake(make_app(service), service, engine, generator)


def main() -> None:
    import argparse

    from cai_scale.runtime.serve import command

    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--drain_timeout", type=float, default=10.0)
    parser.add_argument("--token")
    options = vars(parser.parse_args())
    drain_timeout = options.pop("drain_timeout")
    fake = make_fake(**options)
    listener = command._listen("127.0.0.1", 0)
    command.run(fake.app, fake.engine, listener, "fake", drain_timeout)


if __name__ == "__main__":
    main()

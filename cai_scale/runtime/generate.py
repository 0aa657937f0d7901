"""Generate with a bundle's language model: numpy and onnxruntime."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cai_scale.errors import DataError
from cai_scale.records import Completion, Message, TokenLogprob
from cai_scale.runtime.bundle import CONFIG, GENERATION, Bundle, unloadable
from cai_scale.runtime.cache import open_cache
from cai_scale.runtime.chat import Chat
from cai_scale.runtime.graph import FusedGraph, Graph, return_free_memory
from cai_scale.runtime.sampling import Decoding, choose, log_softmax, penalise, top, uniforms
from cai_scale.runtime.text import GrowingText

ROWS = 32
ADMITTED_TOKENS = 1024  # of prompts, read in one step: running answers do not wait longer for them


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to generate; (seed, round, id, sample) decides its random numbers.

    `tokens` are the prompt's. `top_logprobs` asks for the log-probability of each token of the
    answer and of that many of the likeliest in its place, as the model has them: temperature,
    penalty and cuts do not count.
    """

    tokens: tuple[int, ...]
    decoding: Decoding
    id: str
    seed: int = 0
    sample: int = 0
    round: int = 0
    top_logprobs: int | None = None

    @property
    def room(self) -> int:
        """The tokens that prompt and answer may take together."""
        return len(self.tokens) + self.decoding.max_new_tokens


@dataclass(frozen=True)
class Piece:
    """What one step brought for one request.

    `text` is new text, perhaps none; `completion` is the whole answer, at the last piece.
    """

    index: int
    text: str
    completion: Completion | None = None


class Policy:
    """A bundle's language model."""

    def __init__(self, bundle: Bundle, variant: str | None = None, *, threads: int = 0) -> None:
        """
        Args:
            variant: the bundle's own choice where None.
            threads: of the graph; 0 takes every core.

        Raises:
            IntegrityError: a file of the bundle cannot be loaded.
            ConfigError: the bundle has no such variant.
        """
        fused, contract = bundle.fused(variant), bundle.graph(variant)
        try:
            self.graph = FusedGraph(fused, threads) if fused else Graph(contract, threads)
            self._load(bundle)
            return_free_memory()
        except Exception as error:  # each reader raises its own kinds
            raise unloadable(bundle, error) from None

    def _load(self, bundle: Bundle) -> None:
        self.chat = Chat(bundle)
        settings = bundle.json(GENERATION)
        ends = settings["eos_token_id"]
        self.stops = frozenset([ends] if isinstance(ends, int) else ends)
        self.longest = int(bundle.json(CONFIG)["max_position_embeddings"])
        self.decoding = Decoding(
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            top_k=settings["top_k"],
            max_new_tokens=settings["max_new_tokens"],
        )

    def check(self, request: Request) -> None:
        """Refuse a request that the model cannot answer.

        Raises:
            DataError: the prompt is empty, holds a token that the model does not know, or
                leaves no room for the answer.
        """
        if not request.tokens:
            raise DataError("the prompt has no tokens; write one")
        if not 0 <= min(request.tokens) <= max(request.tokens) < self.graph.vocabulary:
            raise DataError(f"a token lies outside the model's {self.graph.vocabulary}")
        if request.room > self.longest:
            raise DataError(
                f"a prompt of {len(request.tokens)} tokens and an answer of "
                f"{request.decoding.max_new_tokens} exceed the model's {self.longest}; shorten "
                f"the prompt or the answer"
            )

    def read(
        self, messages: Sequence[Message], answer: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read an answer that somebody gave, as far as the model has room for it.

        Returns:
            The tokens of its text, [tokens], and the logits that foretell each, [tokens,
            vocabulary].
        """
        prompt = self.chat.encode(messages)
        ids = self.chat.tokenizer.encode(answer, add_special_tokens=False).ids
        ids = ids[: self.longest - len(prompt)]
        # The last token foretells none of them.
        return np.array(ids, np.int64), self.graph.logits([*prompt, *ids][:-1], len(ids))

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding | None = None,
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
    ) -> list[Completion]:
        """Answer conversations, in order.

        Args:
            decoding: the bundle's own where None.
            seed: with a conversation's id it decides the random numbers, as in training.
            ids: one a conversation; its last message's text where None.

        Raises:
            DataError: a conversation leaves no room for the answer.
        """
        names = ids or [messages[-1]["content"] for messages in conversations]
        requests = [
            Request(
                tokens=tuple(self.chat.encode(messages)),
                decoding=decoding or self.decoding,
                id=name,
                seed=seed,
            )
            for messages, name in zip(conversations, names, strict=True)
        ]
        return self.complete(requests)

    def complete(self, requests: Sequence[Request], rows: int = ROWS) -> list[Completion]:
        """Answer requests, at most `rows` of them at a time, in order."""
        generator = Generator(self, rows)
        for request in requests:
            generator.add(request)
        done: dict[int, Completion] = {}
        while generator.busy:
            for piece in generator.step():
                if piece.completion is not None:
                    done[piece.index] = piece.completion
        return [done[index] for index in range(len(requests))]


@dataclass
class _Row:
    """A request that is being answered."""

    index: int
    request: Request
    numbers: NDArray[np.float64]
    text: GrowingText
    written: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def newest(self) -> int:
        """The token that the graph has not read yet."""
        return self.written[-1] if self.written else self.request.tokens[-1]


class Generator:
    """Continuous batching: the place of a finished request is taken by the next one.

    A request's answer does not depend on what else is in the batch. Not thread-safe.
    """

    def __init__(self, policy: Policy, rows: int = ROWS) -> None:
        self.policy, self.rows = policy, rows
        self._cache = open_cache(policy.graph, rows)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[_Row] = []
        self._added = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> int:
        """Queue a request; return the index by which its pieces are known.

        Raises:
            DataError: the model cannot answer it; see `Policy.check`.
        """
        self.policy.check(request)
        self._waiting.append((self._added, request))
        self._added += 1
        return self._added - 1

    def cancel(self, index: int) -> None:
        """Forget a request, whether it waits or runs; nothing happens where it is done."""
        self._waiting = deque(item for item in self._waiting if item[0] != index)
        for place, row in enumerate(self._running):
            if row.index == index:
                self._drop(place)
                break

    def step(self) -> list[Piece]:
        """Let waiting requests in where there is room, and bring every answer one token on."""
        self._admit()
        if not self._running:
            return []
        logits = self._cache.step(np.array([row.newest for row in self._running], np.int64))
        own = [  # before a penalty changes the logits
            None if row.request.top_logprobs is None else log_softmax(logits[place])
            for place, row in enumerate(self._running)
        ]
        tokens = self._choose(logits).tolist()
        pieces = [
            self._write(row, token, likelihoods)
            for row, token, likelihoods in zip(self._running, tokens, own, strict=True)
        ]
        for place in reversed(range(len(pieces))):
            if pieces[place].completion is not None:
                self._drop(place)
        return pieces

    def _admit(self) -> None:
        new: list[tuple[int, Request]] = []
        tokens = 0
        while self._waiting and len(self._running) + len(new) < self.rows:
            tokens += len(self._waiting[0][1].tokens)
            if new and tokens > ADMITTED_TOKENS:
                break
            new.append(self._waiting.popleft())
        if not new:
            return
        room = max(request.room for _, request in new)
        # A prompt's last token is fed by the first step, like every later one.
        self._cache.prefill([request.tokens[:-1] for _, request in new], room)
        for index, r in new:
            count = r.decoding.max_new_tokens
            numbers = uniforms(r.seed, r.id, r.sample, count, round=r.round)
            text = GrowingText(self.policy.chat.tokenizer, r.decoding.stop)
            self._running.append(_Row(index, r, numbers, text))

    def _choose(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        settings = [row.request.decoding for row in self._running]
        for place, (row, decoding) in enumerate(zip(self._running, settings, strict=True)):
            if decoding.repetition_penalty != 1:
                seen = [*row.request.tokens, *row.written]
                penalise(logits[place], seen, decoding.repetition_penalty)
        temperature = np.array([decoding.temperature for decoding in settings])
        top_k = np.where(temperature > 0, [decoding.top_k for decoding in settings], 1)
        columns = top(logits, int(top_k.max()))
        choice = choose(
            np.take_along_axis(logits, columns, axis=1),
            np.array([row.numbers[len(row.written)] for row in self._running]),
            temperature,
            np.array([decoding.top_p for decoding in settings]),
            top_k=top_k,
            min_p=np.array([decoding.min_p for decoding in settings]),
        )
        return np.take_along_axis(columns, choice[:, None], axis=1)[:, 0]

    def _write(self, row: _Row, token: int, own: NDArray[np.float64] | None) -> Piece:
        """Take a row's new token: a piece of text, or the end.

        Args:
            own: the model's log-probabilities, [vocabulary], where they are wanted.
        """
        ended = token in self.policy.stops
        text = ""
        if not ended:
            row.written.append(token)
            if own is not None:
                row.logprobs.append(_logprob(own, token, row.request.top_logprobs or 0))
            text = row.text.feed(token)
        ended = ended or row.text.stopped
        if not ended and len(row.written) < row.request.decoding.max_new_tokens:
            return Piece(row.index, text)
        whole = row.text.text.strip() if row.text.stopped else self.policy.chat.decode(row.written)
        text += row.text.finish(whole)
        drawn = (*row.written, token) if token in self.policy.stops else tuple(row.written)
        logprobs = None if own is None else tuple(row.logprobs)
        completion = Completion(whole, len(row.written), ended, drawn, logprobs)
        return Piece(row.index, text, completion)

    def _drop(self, place: int) -> None:
        self._cache.drop(place)
        last = self._running.pop()
        if place < len(self._running):
            self._running[place] = last


def _logprob(own: NDArray[np.float64], token: int, k: int) -> TokenLogprob:
    """A token's log-probability and the `k` largest of them all, of [vocabulary]."""
    likeliest = top(own[None], k)[0] if k else ()
    return TokenLogprob(token, float(own[token]), tuple((int(i), float(own[i])) for i in likeliest))

"""A judge behind an OpenAI-compatible endpoint: many questions at once, each until it is settled.

A question is settled by a verdict, or by the reason why there is none. A server that stumbles is
asked again; a reply that is no verdict is asked for again a few times, and never made up for.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cai_scale import endpoint
from cai_scale.critics import INVALID
from cai_scale.critics.judge import verdict
from cai_scale.critics.judge.budget import Budget
from cai_scale.critics.judge.journal import LATE, Spent, Subject, Verdict
from cai_scale.critics.judge.questions import Question, fenced
from cai_scale.errors import CaiError, DataError, ServerError
from cai_scale.records import Message

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

REPLIES = 6  # to one question that are no verdict, before there is none
RETRY_TEMPERATURE = 0.7  # the likeliest reply was none: ask for another
MOST_CUTS = 3  # a reply that was cut is asked for again with twice the tokens
NO_LETTERS = "the reply has no log-probabilities"
LETTER = {"max_tokens": 1, "temperature": 0.0}  # drawn anew, a letter would be a coin
TOP_LOGPROBS = 20  # the most that the protocol has

Settle = Callable[[Subject, Verdict], None]


class RemoteModel:
    """Keeps `concurrency` questions under way."""

    def __init__(
        self, url: str, name: str, *, concurrency: int, deadline: float, tokens: int
    ) -> None:
        """
        Args:
            url: where the protocol's paths begin, such as http://host:8000/v1.
            name: what the server calls the model.
            deadline: seconds for one question, all tries and pauses included.
            tokens: the longest reply.
        """
        self.url, self.name = url, name
        self.concurrency, self.deadline, self.tokens = concurrency, deadline, tokens
        self._settled = 0
        self._dialect = _Dialect()

    def ask(
        self, questions: Iterable[tuple[Subject, Question]], settle: Settle, budget: Budget
    ) -> None:
        """Ask all questions; `settle(subject, verdict)` is called as each is settled.

        Raises:
            ServerError: the server refuses whoever asks, or settles nothing within the deadline.
            BudgetError: see `Budget`.
        """
        asyncio.run(self._ask_all(iter(questions), settle, budget))

    async def _ask_all(
        self, questions: Iterator[tuple[Subject, Question]], settle: Settle, budget: Budget
    ) -> None:
        stopped: list[CaiError] = []

        async def work() -> None:
            try:
                while not stopped and (asked := next(questions, None)) is not None:
                    budget.check()
                    subject, question = asked
                    found = await self._settle(client, question, budget)
                    self._settled += 1
                    settle(subject, found)
            except CaiError as error:  # the others finish what is under way: it is paid for
                stopped.append(error)

        async with endpoint.async_client(self.url, timeout=self.deadline) as client:
            workers = [asyncio.create_task(work()) for _ in range(self.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if stopped:
            raise stopped[0]

    async def _settle(self, client: "AsyncOpenAI", question: Question, budget: Budget) -> Verdict:
        """Ask until the reply is a verdict, or it is clear that there will be none."""
        before, asked = self._settled, _Asked(budget)
        try:
            async with asyncio.timeout(self.deadline):
                return await self._tries(client, question, asked)
        except TimeoutError:
            pass
        if self._settled == before and not await self._lives(client):
            raise ServerError(
                f"server {self.url} has settled nothing within {self.deadline:g} seconds "
                f"({asked.trouble}); mend it, then continue with --resume"
            )
        return Verdict(None, f"{LATE} ({asked.trouble})", asked.spent)

    async def _lives(self, client: "AsyncOpenAI") -> bool:
        """Whether it is this question that the server does not answer, or all."""
        from openai import APIStatusError, OpenAIError

        body = {"model": self.name, "messages": [{"role": "user", "content": "Hello"}]}
        try:
            async with asyncio.timeout(self.deadline / 4):
                await client.post(
                    "/chat/completions",
                    cast_to=object,
                    body=self._dialect.of(body | {"max_tokens": 1}),
                )
        except APIStatusError as error:
            return not endpoint.passing(error)
        except (OpenAIError, TimeoutError, ValueError, RecursionError):
            return False
        return True

    async def _tries(self, client: "AsyncOpenAI", question: Question, asked: "_Asked") -> Verdict:
        from openai import APIStatusError, OpenAIError

        for tries in itertools.count():
            try:
                # A server may send a byte now and then for ever: the client's own timeout, which
                # counts from one byte to the next, would not end that.
                async with asyncio.timeout(self.deadline / 4):
                    values = await self._once(client, question, asked)
                return Verdict(values, spent=asked.spent)
            except DataError as error:
                asked.trouble = str(error)
                asked.invalid += 1
                if asked.invalid == REPLIES:
                    if asked.trouble == NO_LETTERS and not self._dialect.understood:
                        raise self._no_letters(asked.trouble) from None
                    return Verdict(None, f"{INVALID} ({error})", asked.spent)
            except TimeoutError:
                asked.trouble = "it is slow"
            except OpenAIError as error:
                asked.trouble = endpoint.reason(error)
                if endpoint.passing(error):
                    await asyncio.sleep(endpoint.pause(error, tries))
                elif not isinstance(error, APIStatusError) or error.status_code in (401, 403, 404):
                    raise ServerError(
                        f"server {self.url} refuses to judge ({asked.trouble}); mend the cause, "
                        f"then continue with --resume"
                    ) from None
                elif not self._dialect.adapt(error, asked):
                    if question.kind == "choose" and "logprobs" in asked.trouble:
                        raise self._no_letters(asked.trouble) from None
                    return Verdict(None, f"the server refuses ({asked.trouble})", asked.spent)
        raise AssertionError

    async def _once(
        self, client: "AsyncOpenAI", question: Question, asked: "_Asked"
    ) -> Mapping[str, float]:
        """Ask once; a principle's number by its id. Raises `DataError` for what is no verdict."""
        messages = list(question.messages)
        if question.schema is None:
            if question.settle is not None:
                thought = await self._post(client, messages, asked, {})
                messages += [
                    {"role": "assistant", "content": fenced(_text(thought))},
                    {"role": "user", "content": question.settle},
                ]
            soft = question.kind == "choose"
            more = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if soft else {}
            choice = await self._post(client, messages, asked, {**LETTER, **more})
            value = (
                verdict.probability(_first_token(choice)) if soft else verdict.letter(_text(choice))
            )
            values = {question.ids[0]: value}
        else:
            schema = {"name": "verdict", "strict": True, "schema": question.schema}
            form = {"type": "json_schema", "json_schema": schema}
            choice = await self._post(client, messages, asked, {"response_format": form})
            values = verdict.read(question, _text(choice))
        self._dialect.understood = True
        return values

    async def _post(
        self,
        client: "AsyncOpenAI",
        messages: list[Message],
        asked: "_Asked",
        form: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """The first choice of a reply; raises as `_once`."""
        asked.body = {
            "model": self.name,
            "messages": messages,
            "temperature": RETRY_TEMPERATURE if asked.invalid else 0.0,
            "max_tokens": self.tokens * 2**asked.cut,
            **form,
        }
        # As plain JSON: to build the library's own types takes as long as all the rest.
        asked.sent = self._dialect.of(asked.body)
        try:
            reply = await client.post("/chat/completions", cast_to=object, body=asked.sent)
        except (ValueError, RecursionError):  # of the JSON
            raise DataError("the reply is not JSON") from None
        asked.add(_spent(reply))
        choice = _choice(reply)
        if choice.get("finish_reason") == "length" and "max_tokens" not in form:
            asked.cut = min(asked.cut + 1, MOST_CUTS)
        return choice

    def _no_letters(self, trouble: str) -> ServerError:
        return ServerError(
            f"server {self.url} gives no log-probabilities ({trouble}); use --judge_mode letter"
        )


class _Asked:
    """What became of one question so far."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.spent = Spent()
        self.invalid = 0  # replies that were no verdict
        self.cut = 0  # replies that were too long
        self.trouble = "it is slow"
        self.body: dict[str, Any] = {}  # what was to be sent last
        self.sent: dict[str, Any] = {}  # and what was

    def add(self, spent: Spent) -> None:
        self.spent += spent
        self.budget.add(spent)


class _Dialect:
    """How a server wants to be asked: what it does not know is left out, once it has said so."""

    def __init__(self) -> None:
        self._left_out: set[str] = set()
        self._renamed: dict[str, str] = {}
        self.understood = False  # whether a question has been answered

    def of(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {
            self._renamed.get(key, key): value
            for key, value in body.items()
            if key not in self._left_out
        }

    def adapt(self, error: "APIStatusError", asked: _Asked) -> bool:
        """Whether the question may be asked again, in other words."""
        if self.of(asked.body) != asked.sent:  # another question has found them meanwhile
            return True
        said = str(error.body or error).lower()
        if "max_completion_tokens" in said and not self._renamed:
            self._renamed["max_tokens"] = "max_completion_tokens"
            return True
        for name in ("temperature", "response_format"):
            # Some servers do not say what they cannot read: it is the schema, as a rule.
            silent = name == "response_format" and not self.understood
            if (name in said or silent) and name not in self._left_out:
                self._left_out.add(name)
                return True
        return False


def _spent(reply: object) -> Spent:
    """What a chat completion took; a count that is none is 0."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    counts = usage if isinstance(usage, dict) else {}
    tokens = (counts.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Spent(1, *(n if isinstance(n, int) and 0 <= n < 2**40 else 0 for n in tokens))


def _choice(reply: object) -> Mapping[str, Any]:
    """The first choice of a chat completion.

    Raises:
        DataError: it is none.
    """
    try:
        choice = reply["choices"][0]  # type: ignore[index]
        if not isinstance(choice["message"].get("content"), str | None):
            raise TypeError
    except (AttributeError, IndexError, KeyError, TypeError):
        raise DataError("the reply is no chat completion") from None
    return choice


def _text(choice: Mapping[str, Any]) -> str:
    """What a choice says; nothing where a model has thought until it was cut."""
    return choice["message"].get("content") or ""


def _first_token(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The log-probabilities of the likeliest first tokens; raises as `_read`."""
    try:
        tops = choice["logprobs"]["content"][0]["top_logprobs"]
        return [(str(top["token"]), float(top["logprob"])) for top in tops]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise DataError(NO_LETTERS) from None

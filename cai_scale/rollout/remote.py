"""Sample from an OpenAI-compatible server: vLLM on other nodes, llama.cpp, `cai-scale serve`.

The server reads the messages with its own chat template and draws its own random numbers, from a
seed that is the request's: the same answer comes again as far as the server keeps its word.
"""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale import endpoint
from cai_scale.errors import ConfigError, ServerError
from cai_scale.records import Completion, sha256
from cai_scale.rollout.sampler import PromptReader, Request
from cai_scale.runtime.sampling import identity

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI, OpenAIError
    from transformers import PreTrainedTokenizerBase

DEADLINE = 600.0  # seconds for one answer, all tries and the server's queue included
# The files of a LoRA adapter, as peft and vLLM know them.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LOCAL = "or use --sampler transformers"


def check(url: str, model: str, *, adapters: bool = False) -> None:
    """Complain about a server that cannot be sampled from.

    Args:
        adapters: whether it will have to load adapters: for rounds after the first, and for a
            run that starts from another's adapter.

    Raises:
        ConfigError: the address or the key is malformed.
        ServerError: the server does not answer within seconds, has no such model, or does not
            load adapters.
    """
    names = endpoint.models_of(url, "--sampler_url")
    endpoint.check_model(url, names, model, "--sampler_model")
    if adapters:
        with endpoint.client(url, timeout=endpoint.CHECK_SECONDS) as client:
            _check_adapters(client, url)


class RemoteSampler:
    """Keeps `rows` requests under way, and asks again where the server is busy or stumbles."""

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int,
        top_p: float,
        top_k: int,
        rows: int,
        adapter: Path | None = None,
        deadline: float = DEADLINE,
    ) -> None:
        """
        Args:
            url: where the protocol's paths begin, such as http://host:8000/v1.
            model: what the server calls the base model.
            tokenizer: the policy's; it measures prompts, the server reads them itself.
            max_new_tokens, top_p, top_k: see `runtime.sampling.Decoding`.
            rows: how many requests are under way at once.
            adapter: a LoRA adapter that the server loads, by a path that it sees too, at the
                first sample.
            deadline: seconds for one answer, all tries included.

        Raises:
            ConfigError: `adapter` is no LoRA adapter but a whole model.
        """
        if adapter is not None and not (adapter / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{adapter} is a whole model, and a server under way loads adapters only; train "
                f"without --no-lora, {LOCAL}"
            )
        self.url, self.model, self.adapter = url, model, adapter
        self.max_new_tokens, self.top_p, self.top_k = max_new_tokens, top_p, top_k
        self.rows, self.deadline = rows, deadline
        self._reader = PromptReader(tokenizer)

    def prompt_tokens(self, request: Request) -> int:
        return len(self._reader.tokens(request))

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        """Answer all requests, in any order, as they finish.

        Raises:
            ServerError: the server refused a request or the adapter, or missed the deadline.
                Answers that had come by then are given first.
        """
        requests = [request for batch in batches for request in batch]
        with asyncio.Runner() as runner:
            answers = self._answers(requests, self._served)
            try:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        yield runner.run(answers.__anext__())
            finally:
                runner.run(answers.aclose())

    def close(self) -> None:
        """Unload the adapter, which the ranks share: once, after the last of them has asked."""
        from openai import OpenAIError

        if self.adapter is None:
            return
        unwanted = {"lora_name": self._lora_name}
        # An adapter that stays loaded does no harm: its name is its hash.
        with (
            contextlib.suppress(OpenAIError),
            endpoint.client(self.url, timeout=endpoint.CHECK_SECONDS) as client,
        ):
            client.post("/unload_lora_adapter", cast_to=str, body=unwanted)

    @functools.cached_property
    def _lora_name(self) -> str:
        assert self.adapter is not None
        return f"cai-scale-{sha256(self.adapter / ADAPTER_WEIGHTS)[:16]}"

    @functools.cached_property
    def _served(self) -> str:
        """The name to ask for. An adapter is loaded first, unless another rank has done so."""
        if self.adapter is None:
            return self.model
        from openai import OpenAIError

        wanted = {"lora_name": self._lora_name, "lora_path": str(self.adapter.resolve())}
        with endpoint.client(self.url, timeout=self.deadline) as client:
            try:
                client.post("/load_lora_adapter", cast_to=str, body=wanted)
            except OpenAIError as error:
                with contextlib.suppress(OpenAIError):
                    if self._lora_name in endpoint.model_names(client):
                        return self._lora_name
                raise _no_adapters(self.url, f"refuses {self.adapter}", error) from None
        return self._lora_name

    async def _answers(
        self, requests: Sequence[Request], model: str
    ) -> AsyncGenerator[tuple[Request, Completion], None]:
        waiting = iter(requests)
        running: set[asyncio.Task[tuple[Request, Completion]]] = set()
        async with endpoint.async_client(self.url, timeout=self.deadline) as client:
            try:
                while True:
                    for request in itertools.islice(waiting, self.rows - len(running)):
                        running.add(asyncio.create_task(self._answer(client, model, request)))
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    # Answers before an error that came beside them, so that they are kept.
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        yield task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _answer(
        self, client: "AsyncOpenAI", model: str, request: Request
    ) -> tuple[Request, Completion]:
        """Ask until the server answers, refuses, or the deadline has passed."""
        from openai import OpenAIError

        trouble = "it is slow"
        try:
            async with asyncio.timeout(self.deadline):
                for tries in itertools.count():
                    try:
                        return request, await self._ask(client, model, request)
                    except OpenAIError as error:
                        trouble = endpoint.reason(error)
                        if not endpoint.passing(error):
                            raise ServerError(
                                f"server {self.url} refuses prompt {request.prompt_id} "
                                f"({trouble}); mend the cause, then continue with --resume"
                            ) from None
                        await asyncio.sleep(endpoint.pause(error, tries))
        except TimeoutError:
            pass
        raise ServerError(
            f"server {self.url} has not answered prompt {request.prompt_id} within "
            f"{self.deadline:g} seconds ({trouble}); mend it, then continue with --resume"
        )

    async def _ask(self, client: "AsyncOpenAI", model: str, request: Request) -> Completion:
        try:
            reply = await client.chat.completions.create(
                model=model,
                messages=list(request.messages),  # type: ignore[arg-type]
                temperature=request.temperature,
                top_p=self.top_p,
                max_tokens=self.max_new_tokens,
                seed=seed_of(request),
                # Beyond the protocol. Servers take what is left out from files beside the model,
                # and would sample from another distribution than the policy's.
                extra_body={"top_k": self.top_k, "min_p": 0.0, "repetition_penalty": 1.0},
            )
            return _completion(reply)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                f"server {self.url} answers prompt {request.prompt_id} with something that is no "
                f"chat completion ({type(error).__name__}); mend --sampler_url"
            ) from None


def seed_of(request: Request) -> int:
    """The seed of one answer, in [0, 2**31): every server takes as much."""
    digest = identity(request.seed, request.prompt_id, request.sample, round=request.round)
    return int.from_bytes(digest[:4], "big") >> 1


def _completion(reply: Any) -> Completion:
    """What a chat completion says; anything may be missing, since the library checks no types."""
    choice, tokens = reply.choices[0], reply.usage.completion_tokens
    text = choice.message.content or ""
    if not isinstance(tokens, int):
        raise TypeError("no count of tokens")
    text.encode("utf-8")  # half a surrogate pair, which JSON can escape, is no text
    return Completion(text.strip(), tokens, choice.finish_reason == "stop")


def _check_adapters(client: "OpenAI", url: str) -> None:
    """Ask to load nothing: a server that loads adapters complains, another has no such path."""
    from openai import APIStatusError, OpenAIError

    try:
        client.post("/load_lora_adapter", cast_to=str, body={"lora_name": "", "lora_path": ""})
    except OpenAIError as error:
        if not isinstance(error, APIStatusError) or error.status_code in (401, 403, 404, 405):
            raise _no_adapters(url, "loads no adapters", error) from None


def _no_adapters(url: str, what: str, error: "OpenAIError") -> ServerError:
    return ServerError(
        f"server {url} {what} ({endpoint.reason(error)}); start vLLM with --enable-lora, "
        f"--max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True where it sees the run's "
        f"folder, {LOCAL}"
    )

"""The server as a process of its own, and the official client: answers, crowds, signals."""

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from cai_scale.runtime.generate import Request
from fake_server import FakeChat, FakePolicy, words_of
from processes import run_python, serving

FAKE = str(Path(__file__).parent.parent / "fake_server.py")
CLIENTS = 500


def client_of(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def expected(text: str, seed: int, most: int = 64) -> str:
    decoding = replace(FakePolicy().decoding, max_new_tokens=most)
    tokens = tuple(FakeChat().encode(user(text)))
    return "".join(words_of(Request(tokens=tokens, decoding=decoding, id=text, seed=seed))[0])


def figure(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FAKE, "--pause", "0.001") as (url, _):
        yield url


def test_the_official_client_chats(url: str) -> None:
    client = client_of(url)
    reply = client.chat.completions.create(
        model="fake", messages=user("hi"), seed=5, max_tokens=6, temperature=0.5, top_p=0.9, n=2
    )
    assert reply.choices[0].message.content == expected("hi", 5, 6)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    extended = client.chat.completions.create(
        model="fake", messages=user("hi"), extra_body={"top_k": 5, "min_p": 0.1}
    )
    again = client.chat.completions.create(
        model="fake",
        messages=user("hi"),
        seed=extended.seed,  # type: ignore[attr-defined]
    )
    assert again.choices[0].message.content == extended.choices[0].message.content


def test_the_official_client_reads_log_probabilities(url: str) -> None:
    reply = client_of(url).chat.completions.create(
        model="fake", messages=user("hi"), seed=5, max_tokens=4, logprobs=True, top_logprobs=2
    )
    (choice,) = reply.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [item.logprob for item in choice.logprobs.content] == [-0.5, -1.5, -2.5, -3.5]
    first = choice.logprobs.content[0]
    assert first.token == expected("hi", 5, 4)[0] == bytes(first.bytes or []).decode()
    assert [(top.logprob, top.bytes) for top in first.top_logprobs] == [
        (-0.5, first.bytes),
        (-7.25, None),
    ]


def test_the_official_client_streams(url: str) -> None:
    stream = client_of(url).chat.completions.create(
        model="fake",
        messages=user("hi"),
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == expected("hi", 5)
    assert len(pieces) > 4
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len("user: hi\n")


def test_the_official_client_completes_and_lists_models(url: str) -> None:
    client = client_of(url)
    whole = client.completions.create(model="fake", prompt="once", seed=1, max_tokens=5)
    parts = client.completions.create(
        model="fake", prompt="once", seed=1, max_tokens=5, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.choices[0].text
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "cai-scale"


def test_the_official_client_is_told_what_is_wrong(url: str) -> None:
    client = client_of(url)
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.chat.completions.create(model="gpt", messages=user("hi"))
    with pytest.raises(openai.UnprocessableEntityError, match="not supported") as caught:
        client.completions.create(model="fake", prompt="hi", logprobs=2)
    assert (caught.value.param, caught.value.code) == ("logprobs", "invalid_request")
    with serving(FAKE, "--token", "right") as (guarded, _):
        with pytest.raises(openai.AuthenticationError, match="token"):
            client_of(guarded, "wrong").models.list()
        assert client_of(guarded, "right").models.list().data


def test_a_full_queue_is_a_429_and_waiting_helps() -> None:
    with serving(FAKE, "--rows", "1", "--queue", "0", "--pause", "0.05") as (url, _):
        slow = client_of(url).chat.completions.create(
            model="fake", messages=user("hi"), n=4, stream=True
        )
        next(iter(slow))
        with pytest.raises(openai.RateLimitError):
            client_of(url).chat.completions.create(model="fake", messages=user("hi"))
        patient = client_of(url).with_options(max_retries=20)
        reply = patient.chat.completions.create(model="fake", messages=user("hi"), seed=1)
        assert reply.choices[0].message.content == expected("hi", 1)


async def crowd(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    """Every body's answer, all of them asked for at once, every third one streamed."""
    limits = httpx2.Limits(max_connections=None)

    async def one(client: Any, number: int, body: dict[str, Any]) -> str:
        if number % 3:
            reply = await client.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            return str(reply.json()["choices"][0]["message"]["content"])
        text = []
        body = body | {"stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line and line != "data: [DONE]":
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    text.append(delta.get("content", ""))
        return "".join(text)

    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
        return await asyncio.gather(*(one(client, i, body) for i, body in enumerate(bodies)))


def test_500_clients_at_once() -> None:
    bodies = [{"messages": user(f"question {i}"), "seed": i} for i in range(CLIENTS)]
    with serving(FAKE, "--rows", "32", "--queue", "512", "--pause", "0.002") as (url, _):
        found = asyncio.run(crowd(url, bodies))
        assert found == [expected(f"question {i}", i) for i in range(CLIENTS)]
        assert figure(url, "cai_scale_first_token_seconds_count") == CLIENTS
        assert figure(url, "cai_scale_rows") == figure(url, "cai_scale_queue ") == 0
    assert len(set(found)) == CLIENTS  # the control: an answer in another's place would show


def test_a_client_that_leaves_frees_its_place() -> None:
    with serving(FAKE, "--pause", "0.2", "--rows", "4") as (url, _):
        chat = f"{url}/v1/chat/completions"
        body = {"messages": user("hi"), "n": 4}
        with httpx2.stream("POST", chat, json=body | {"stream": True}) as response:
            lines = response.iter_lines()
            assert "role" in next(lines)
            assert figure(url, "cai_scale_rows") == 4
        wait_until(lambda: figure(url, "cai_scale_rows") == 0)
        # Also where no byte of the response was due yet.
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(chat, json=body, timeout=0.3)
        wait_until(lambda: figure(url, "cai_scale_rows") == 0)
        assert figure(url, "cai_scale_tokens_total") == 0
        route = 'cai_scale_requests_total{route="/v1/chat/completions",status="499"}'
        wait_until(lambda: figure(url, route) == 1)


def goodbye(process: subprocess.Popen[str]) -> str:
    """The exit code is 0; what it wrote to stderr."""
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    return stderr


def test_sigterm_lets_streams_finish_and_refuses_new_requests() -> None:
    with serving(FAKE, "--pause", "0.1") as (url, process):
        client = client_of(url)
        stream = client.chat.completions.create(
            model="fake", messages=user("hi"), seed=5, stream=True
        )
        pieces = [next(iter(stream)).choices[0].delta.content]
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx2.get(f"{url}/healthz").status_code == 503)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="fake", messages=user("hi"))
        assert caught.value.status_code == 503
        pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(p or "" for p in pieces) == expected("hi", 5)
        assert goodbye(process) == ""


def test_sigterm_has_a_deadline_that_streams_are_told_of() -> None:
    flags = ("--pause", "0.3", "--drain_timeout", "0.5")
    with serving(FAKE, *flags) as (url, process):
        stream = client_of(url).chat.completions.create(
            model="fake", messages=user("hi"), n=8, stream=True
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert goodbye(process) == ""


def test_sigterm_ends_an_idle_server_at_once() -> None:
    with serving(FAKE) as (url, process):
        assert httpx2.get(f"{url}/healthz").json() == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        assert goodbye(process) == ""


def test_a_large_upload_is_refused_before_it_has_arrived(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for length in ("Content-Length: 200000000", "Transfer-Encoding: chunked"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"{head}{length}\r\n\r\n".encode())
            part = b"x" * 150_000
            chunk = b"%x\r\n%s\r\n" % (len(part), part) if "chunked" in length else part
            connection.sendall(chunk)
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_bundle_is_served_without_torch(bundle: Path) -> None:
    """The same answers alone, in a crowd of 500, and from `cai-scale generate`."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'rich']))\n"
        "from cai_scale.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    texts = [f"Question {i}: {'why ' * (i % 9)}" for i in range(50)]
    bodies = [
        {"messages": user(texts[i % 50]), "seed": i % 7, "max_tokens": 4 + i % 13}
        for i in range(CLIENTS)
    ]
    serve = ("-c", code, "serve", "--bundle", str(bundle), "--port", "0")
    with serving(*serve, timeout=200) as (url, process):
        chat = f"{url}/v1/chat/completions"
        alone = [
            httpx2.post(chat, json=body, timeout=30).json()["choices"][0]["message"]["content"]
            for body in bodies[:50]
        ]
        together = asyncio.run(crowd(url, bodies))
        assert together[:50] == alone
        # The same request stands in the crowd more than once, in other company.
        first: dict[str, str] = {}
        for body, answer in zip(bodies, together, strict=True):
            assert first.setdefault(json.dumps(body), answer) == answer
        score = httpx2.post(f"{url}/v1/score", json={"response": alone[0] or "a"}).json()
        assert score["principles"].keys() == {"harmless", "helpful", "honest", "respectful"}
        refused = httpx2.post(chat, json={"messages": user("why " * 2000)})
        assert refused.status_code == 422
        assert "exceed the model's" in refused.text
        process.send_signal(signal.SIGTERM)
        assert goodbye(process) == ""
    flags = ("--prompt", texts[3], "--seed", "3", "--max_new_tokens", "7")
    said = run_python("-m", "cai_scale.cli", "generate", "--bundle", str(bundle), *flags)
    assert said.stdout.rstrip("\n") == together[3]

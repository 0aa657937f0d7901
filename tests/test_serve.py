"""The server's routes in process, with a model of a few lines: what it answers and refuses."""

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_scale import constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import ConfigError
from cai_scale.runtime.generate import Request
from cai_scale.runtime.serve import command, schemas
from fake_server import LONGEST, FakeChat, FakePolicy, make_fake, words_of
from processes import run_python

CHAT, TEXT, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_fake().app, base_url="http://localhost") as client:
        yield client


def refused(response: Any, status: int) -> str:
    """The message of an error in the protocol's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


def expected(text: str, *, seed: int, sample: int = 0, most: int = 64) -> str:
    decoding = replace(FakePolicy.decoding, max_new_tokens=most)
    tokens = tuple(FakeChat().encode([{"role": "user", "content": text}]))
    request = Request(tokens=tokens, decoding=decoding, id=text, seed=seed, sample=sample)
    return "".join(words_of(request)[0])


def wait_until(true: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def events(text: str) -> list[Any]:
    """The objects of a stream; the [DONE] at its end as None."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [None if line == "[DONE]" else json.loads(line) for line in lines]


def test_each_answer_is_the_one_of_its_seed_and_sample(client: TestClient) -> None:
    body = {"messages": HELLO, "seed": 7, "n": 3, "max_tokens": 9}
    reply = client.post(CHAT, json=body).json()
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert texts == [expected("hello", seed=7, sample=i, most=9) for i in range(3)]
    assert len(set(texts)) == 3
    assert reply["usage"]["prompt_tokens"] == len("user: hello\n")
    assert reply["usage"]["completion_tokens"] == sum(
        len(re.findall(r"\d+", text)) for text in texts
    )


def test_a_drawn_seed_is_told_and_repeats_the_answer(client: TestClient) -> None:
    first, other = (client.post(CHAT, json={"messages": HELLO}).json() for _ in range(2))
    again = client.post(CHAT, json={"messages": HELLO, "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]
    # The control: what was drawn differs, and so does the answer.
    assert other["seed"] != first["seed"]
    assert other["choices"] != first["choices"]


def test_a_stream_brings_the_same_answers_in_pieces(client: TestClient) -> None:
    body = {"messages": HELLO, "seed": 3, "n": 2, "user": "u"}
    whole = client.post(CHAT, json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, counted, done = events(client.post(CHAT, json=body | options).text)
    assert done is None
    assert (counted["choices"], counted["usage"]) == ([], whole["usage"])
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        reasons = [c["finish_reason"] for c in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert len(mine) > 3
    assert "usage" not in chunks[0]


def test_log_probabilities_stand_beside_the_answer_that_is_as_it_was(client: TestClient) -> None:
    body = {"messages": HELLO, "seed": 7, "n": 2, "max_tokens": 5}
    plain = client.post(CHAT, json=body).json()
    told = client.post(CHAT, json=body | {"logprobs": True, "top_logprobs": 2}).json()
    alone = client.post(CHAT, json=body | {"logprobs": True}).json()
    for index, choice in enumerate(told["choices"]):
        words = choice["message"]["content"].replace("please ", "please_").split()
        content = [
            {
                "token": word[0],
                "logprob": -0.5 - i,
                "bytes": [ord(word[0])],
                "top_logprobs": [
                    {"token": word[0], "logprob": -0.5 - i, "bytes": [ord(word[0])]},
                    {"token": "\ufffd", "logprob": -7.25, "bytes": None},
                ],
            }
            for i, word in enumerate(words)
        ]
        assert len(content) == 5
        assert choice["logprobs"] == {"content": content, "refusal": None}
        assert plain["choices"][index] == choice | {"logprobs": None}
        chosen = [item | {"top_logprobs": []} for item in content]
        assert alone["choices"][index]["logprobs"] == {"content": chosen, "refusal": None}


@pytest.mark.parametrize("value", [1, True])
def test_a_completion_has_no_log_probabilities(client: TestClient, value: Any) -> None:
    body = {"prompt": "once", "logprobs": value}
    assert "logprobs: not supported" in refused(client.post(TEXT, json=body), 422)


def test_several_prompts_of_one_completion(client: TestClient) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "seed": 1, "max_tokens": 4}
    reply = client.post(TEXT, json=body).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for place, prompt in enumerate(["one", "two"]):
        alone = client.post(TEXT, json=body | {"prompt": prompt}).json()
        texts = [choice["text"] for choice in reply["choices"]]
        assert [c["text"] for c in alone["choices"]] == texts[2 * place : 2 * place + 2]


def test_text_parts_are_lines(client: TestClient) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answers = [
        client.post(CHAT, json={"messages": [{"role": "user", "content": c}], "seed": 1}).json()
        for c in (parts, "a\nb")
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_scores_are_the_critics_with_the_words_that_moved_them(client: TestClient) -> None:
    text = "😀 You could kill time; please, thank you."
    single = client.post(SCORE, json={"prompt": "q", "response": text}).json()
    verdict = LexiconCritic(constitution.load()).score(["q"], [text])[0]
    assert verdict is not None
    assert single["principles"] == dict(verdict.principles)
    assert single["overall"] == verdict.overall
    assert single["constitution"] == constitution.load().sha256
    first = single["words"][0]
    assert (text[first["start"] : first["end"]], first["effect"]) == ("kill", -0.15)
    assert first["principle"] == "harmless"
    several = client.post(SCORE, json={"items": [{"response": text}, {"response": " "}]}).json()
    assert {"object": "score", **several["data"][0]} == single
    assert (several["data"][1]["overall"], several["data"][1]["words"]) == (None, [])


def test_the_model_and_its_constitution_are_named(client: TestClient) -> None:
    model = client.get("/v1/models").json()["data"][0]
    assert client.get("/v1/models/fake").json() == model
    assert refused(client.get("/v1/models/gpt"), 404)
    told = client.get("/v1/constitution").json()
    assert [p["id"] for p in told["principles"]] == ["harmless", "helpful", "honest", "respectful"]
    assert told["principles"][0]["title"]["vi"] == "Vô hại"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools: not supported"),
        ({"top_logprobs": 1}, "top_logprobs: needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs: Input should be greater"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs: Input should be a valid int"),
        ({"logprobs": 2}, "logprobs: Input should be a valid boolean"),
        ({"logprobs": True, "stream": True}, "logprobs: not supported in a stream"),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty: not supported"),
        ({"colour": 1}, "colour: not supported"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 9}, "n:"),
        ({"n": True}, "n:"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 257}, "max_tokens: 257 exceeds this server's 256"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "give one"),
        ({"stream_options": {"include_usage": True}}, "needs stream: true"),
        ({"messages": [{"role": "user", "content": "x" * LONGEST}]}, "leaves no room"),
    ],
)
def test_what_is_not_supported_is_said(
    client: TestClient, change: dict[str, Any], said: str
) -> None:
    content = json.dumps({"messages": HELLO} | change)
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert said in refused(response, 422)


def test_neutral_values_of_unsupported_fields_pass(client: TestClient) -> None:
    neutral = {key: values[0] for key, values in schemas.NEUTRAL.items()}
    body = {"messages": HELLO, "seed": 1, "temperature": None, "stop": None}
    plain, same = (client.post(CHAT, json=body | more).json() for more in ({}, neutral))
    assert same["choices"] == plain["choices"]


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    body = {"messages": HELLO, "model": "gpt"}
    assert "'fake'" in refused(client.post(CHAT, json=body), 404)
    assert client.post(CHAT, json=body | {"model": "fake"}).status_code == 200


def test_other_bodies_and_routes_are_refused(client: TestClient) -> None:
    as_json = {"content-type": "application/json"}
    assert "not JSON" in refused(client.post(CHAT, content=b"{", headers=as_json), 422)
    assert "application/json" in refused(client.post(CHAT, content=b"{}"), 422)
    assert refused(client.post(CHAT, content=b"[" * 90_000, headers=as_json), 400)
    assert refused(client.get("/v1/nothing"), 404)
    assert refused(client.get(CHAT), 405)
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_with_and_without_its_length(
    client: TestClient, chunked: bool
) -> None:
    def body(size: int) -> Any:
        whole = json.dumps({"response": "x" * (size - 16)}).encode()
        assert len(whole) == size
        return (whole[i : i + 5000] for i in range(0, size, 5000)) if chunked else whole

    headers = {"content-type": "application/json"}
    assert client.post(SCORE, content=body(100_000), headers=headers).status_code == 200
    assert "100000" in refused(client.post(SCORE, content=body(100_001), headers=headers), 413)


def test_a_token_is_wanted_everywhere_but_for_the_page_and_health() -> None:
    with TestClient(make_fake(token="geheim-é").app) as client:
        for path in ("/v1/models", "/v1/constitution", "/metrics", "/nothing"):
            assert "token" in refused(client.get(path), 401)
        for shown in ("Bearer geheim", "Bearer ", "Basic geheim-é", "geheim-é"):
            headers = {"authorization": shown.encode()}
            assert refused(client.post(CHAT, json={"messages": HELLO}, headers=headers), 401)
        for path in ("/", "/page.js", "/page.css", "/healthz"):
            assert client.get(path).status_code == 200
        right = {"authorization": "Bearer geheim-é".encode()}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_without_a_token_only_loopback_names_reach_it() -> None:
    with TestClient(make_fake(hosts=command.LOOPBACK).app, base_url="http://evil.test") as client:
        assert "localhost" in refused(client.get("/v1/models"), 400)
        for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "[::1]"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_responses_bar_everything_that_they_do_not_need(client: TestClient) -> None:
    response = client.get("/", headers={"origin": "http://evil.test"})
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not [name for name in response.headers if name.startswith("access-control")]
    # The page is whole in itself, and nothing in it writes markup.
    script = client.get("/page.js").text
    assert "innerHTML" not in script + response.text
    for text in (response.text, script, client.get("/page.css").text):
        assert set(re.findall(r"https?://[^'\"\s]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_metrics_count(client: TestClient) -> None:
    def figures() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}

    before = figures()
    body = {"messages": HELLO, "seed": 1, "max_tokens": 3}
    client.post(CHAT, json=body)
    client.post(CHAT, json=body | {"n": 99})
    after = figures()

    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    assert grown("cai_scale_tokens_total") == 3
    assert grown("cai_scale_first_token_seconds_count") == 1
    for status in (200, 422):
        name = f'cai_scale_requests_total{{route="{CHAT}",status="{status}"}}'
        assert grown(name) == 1
    assert grown(f'cai_scale_request_seconds_count{{route="{CHAT}"}}') == 2
    assert (after["cai_scale_rows"], after["cai_scale_queue"]) == (0, 0)


def test_a_full_queue_a_timeout_and_a_failure_have_their_status() -> None:
    fake = make_fake(rows=1, queue=1, pause=0.05, timeout=0.5)
    with TestClient(fake.app) as client:
        slow = {"messages": HELLO, "n": 8, "seed": 1}
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(client.post(CHAT, json=slow).status_code)
        )
        thread.start()
        time.sleep(0.2)
        full = client.post(CHAT, json={"messages": HELLO})
        assert refused(full, 429)
        assert full.headers["retry-after"] == "1"
        thread.join()
        assert statuses == [504]
        streamed = events(client.post(CHAT, json=slow | {"stream": True}).text)
        assert streamed[-1]["error"]["code"] == "timeout"
        wait_until(lambda: not fake.generator.open)  # what nobody waits for is not written on
        fake.generator.fails = True
        response = client.post(CHAT, json={"messages": HELLO})
        assert "secret" not in refused(response, 503)
        assert client.get("/healthz").json() == {"status": "failed"}
        assert refused(client.post(CHAT, json={"messages": HELLO}), 503)


def test_what_nobody_expected_is_a_500_without_the_text(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fake = make_fake()

    def broken(messages: Any) -> list[int]:
        raise RuntimeError(f"cannot read {messages}")

    fake.service.policy.chat.encode = broken
    with TestClient(fake.app) as client:
        response = client.post(CHAT, json={"messages": [{"role": "user", "content": "topsecret"}]})
    assert refused(response, 500) == "the server failed"
    logged = "".join(capfd.readouterr()) + caplog.text
    assert "RuntimeError" in logged
    assert "topsecret" not in logged + response.text


def test_draining_refuses_new_requests() -> None:
    fake = make_fake()
    with TestClient(fake.app) as client:
        fake.engine.draining = True
        for path, body in ((CHAT, {"messages": HELLO}), (SCORE, {"response": "x"})):
            response = client.post(path, json=body)
            assert refused(response, 503)
            assert response.headers["retry-after"]
        assert client.get("/healthz").status_code == 503


FIELDS = (schemas.ChatRequest, schemas.TextRequest, schemas.ScoreRequest)
KEYS = st.sampled_from(
    [*schemas.NEUTRAL, *(name for model in FIELDS for name in model.model_fields), "\ud800"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 9)
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=20)
    | st.sampled_from(["user", "text", "fake"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]) | st.text(), inner)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}) | VALUES
KNOWN: dict[Any, Any] = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 1000),
    "n": st.integers(1, 8),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=4),
    "stream": st.booleans(),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "max_tokens": st.integers(1, 256),
}
FORMS = {
    CHAT: {"messages": st.lists(MESSAGE, min_size=1, max_size=3)},
    TEXT: {"prompt": st.text(min_size=1) | VALUES},
    SCORE: {"response": st.text()},
}


@st.composite
def requests(draw: Any) -> tuple[str, Any]:
    """A path, and a body that may be right, nearly right, or anything."""
    path = draw(st.sampled_from(list(FORMS)))
    known = {} if path == SCORE else KNOWN
    body = draw(st.fixed_dictionaries(FORMS[path], optional=known))
    kind = draw(st.sampled_from(["right", "nearly", "anything"]))
    if kind == "nearly":
        body |= draw(st.dictionaries(KEYS, VALUES, max_size=3))
    return path, draw(VALUES) if kind == "anything" else body


def test_no_body_breaks_the_server(client: TestClient) -> None:
    """A 500 would be a body that nobody thought of."""
    seen: Counter[int] = Counter()

    def post(path: str, content: bytes, kind: str = "application/json") -> None:
        response = client.post(path, content=content, headers={"content-type": kind})
        assert response.status_code in (200, 400, 404, 422), (content, response.text)
        assert "Traceback" not in response.text
        if response.status_code != 200:
            refused(response, response.status_code)
        seen[response.status_code] += 1

    @given(requests())
    @settings(max_examples=400, deadline=None, database=None)
    def objects(request: tuple[str, Any]) -> None:
        post(request[0], json.dumps(request[1]).encode())

    @given(
        st.sampled_from([CHAT, TEXT, SCORE]),
        st.binary(max_size=200),
        st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", ""]),
    )
    @settings(max_examples=100, deadline=None, database=None)
    def bytes_(path: str, content: bytes, kind: str) -> None:
        post(path, content, kind)

    objects()
    bytes_()
    # The control: what is thrown at the server is not all refused, nor all let in.
    assert min(seen[200], seen[422]) > 40, seen


def test_answers_do_not_mix_whatever_else_is_in_the_batch() -> None:
    """100 clients on 8 rows in process, a third of them streaming."""
    import httpx2

    fake = make_fake(rows=8, queue=200)

    async def one(client: Any, number: int) -> str:
        body = {"messages": [{"role": "user", "content": f"{number}"}], "seed": number}
        if number % 3:
            reply = (await client.post(CHAT, json=body)).json()
            return str(reply["choices"][0]["message"]["content"])
        *chunks, _ = events((await client.post(CHAT, json=body | {"stream": True})).text)
        return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

    async def all_at_once() -> list[str]:
        transport = httpx2.ASGITransport(fake.app)
        async with (
            fake.app.router.lifespan_context(fake.app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            return await asyncio.gather(*(one(client, number) for number in range(100)))

    found = asyncio.run(all_at_once())
    assert found == [expected(f"{number}", seed=number) for number in range(100)]
    assert fake.generator.together == 8
    assert len(set(found)) == 100


@pytest.mark.parametrize(
    ("flags", "token", "said"),
    [
        (["--host", "0.0.0.0"], None, "--no_auth"),
        (["--host", "0.0.0.0"], "", "empty"),
        (["--no_auth"], "x", "leave one of them out"),
        (["--max_body", "many"], None, "1MB"),
        (["--rows", "0"], None, "from 1 to 4096"),
        (["--port", "70000"], None, "from 0 to 65535"),
        (["--name", "a b"], None, "letters"),
        (["--host", "256.1.1.1"], "x", "choose others"),
        (["--port", "0"], None, "is no bundle"),
    ],
)
def test_the_command_refuses(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], token: str | None, said: str
) -> None:
    monkeypatch.delenv(command.TOKEN, raising=False)
    if token is not None:
        monkeypatch.setenv(command.TOKEN, token)
    from cai_scale.errors import CaiError

    with pytest.raises(CaiError, match=said):
        command.serve(["--bundle", "nowhere", *flags])


def test_a_taken_port_is_said() -> None:
    with (
        command._listen("127.0.0.1", 0) as listener,
        pytest.raises(ConfigError, match="in use"),
    ):
        command._listen("127.0.0.1", listener.getsockname()[1])


def test_sizes() -> None:
    sizes = {"1MB": 10**6, "512kb": 512_000, "65536": 65536}
    assert {text: command._size(text) for text in sizes} == sizes


def test_help_is_there_without_the_extra() -> None:
    result = run_python("-m", "cai_scale.cli", "serve", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "CAI_SCALE_TOKEN" in result.stdout

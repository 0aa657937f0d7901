"""The sampler of OpenAI-compatible servers: against `cai-scale serve`, and a server by script."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cai_scale import endpoint as server
from cai_scale.errors import CaiError, ConfigError, ServerError
from cai_scale.ranks import Ranks
from cai_scale.records import Completion, sha256
from cai_scale.rollout import remote
from cai_scale.rollout.choose import choose
from cai_scale.rollout.collect import collect
from cai_scale.rollout.remote import RemoteSampler, seed_of
from cai_scale.rollout.sampler import Request

SECRET = "sk-a-secret-of-mine"
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CUT = "the connection is cut"


def completion(text: str, tokens: int = 3, reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


class Scripted:
    """A server that answers as `script` says: (status, body, headers), or `CUT`.

    It keeps every body by its path, and how many chats were under way at once.
    """

    def __init__(self, script: Callable[[str, dict[str, Any]], Any]) -> None:
        self.script = script
        self.bodies: dict[str, list[dict[str, Any]]] = {}
        self.keys: set[str | None] = set()
        self.open = self.together = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients leave
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def _handler(owner) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                self._answer(json.loads(self.rfile.read(size)))

            def _answer(self, body: dict[str, Any]) -> None:
                with owner.lock:
                    owner.bodies.setdefault(self.path, []).append(body)
                    owner.keys.add(self.headers["authorization"])
                    owner.open += 1
                    owner.together = max(owner.together, owner.open)
                try:
                    said = owner.script(self.path, body)
                finally:
                    with owner.lock:
                        owner.open -= 1
                if said == CUT:
                    self.close_connection = True
                    return
                status, content, *headers = said if isinstance(said, tuple) else (200, said)
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                kind = {"content-type": "application/json"} | (headers[0] if headers else {})
                for name, value in (kind | {"content-length": len(text.encode())}).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def scripted(script: Callable[[str, dict[str, Any]], Any]) -> Iterator[Scripted]:
    made = Scripted(script)
    thread = threading.Thread(target=made.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.http.shutdown()
        made.http.server_close()


def echo(path: str, body: dict[str, Any]) -> Any:
    """The last message, and what the answer's randomness depended on."""
    if path == MODELS:
        return {"object": "list", "data": [{"id": "base", "object": "model"}]}
    return completion(f"{body['messages'][-1]['content']}/{body['seed']}")


class Words:
    """A tokenizer as far as `PromptReader` needs one: a token is a letter."""

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": list(messages[-1]["content"].encode())}


def sampler_of(url: str, **changes: Any) -> RemoteSampler:
    tokenizer: Any = Words()
    settings: dict[str, Any] = {"max_new_tokens": 24, "top_p": 0.9, "top_k": 40, "rows": 8}
    return RemoteSampler(url, "base", tokenizer, **(settings | {"deadline": 20.0} | changes))


def request(text: str, **changes: Any) -> Request:
    message = {"role": "user", "content": text}
    return replace(Request(messages=(message,), prompt_id=text, seed=3), **changes)


def answers(sampler: Any, *requests: Request) -> list[Completion]:
    found = {id(request): completion for request, completion in sampler.sample([requests])}
    return [found[id(request)] for request in requests]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that no message may show, and pauses that take no time."""
    monkeypatch.setenv(server.KEY, SECRET)
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)


def complaint(raises: type[CaiError], act: Callable[[], Any]) -> str:
    """What a user reads: one line, exit code 2, without the key."""
    with pytest.raises(raises) as caught:
        act()
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    assert SECRET not in text
    return text


def test_a_request_says_what_the_settings_say_and_a_reply_is_read() -> None:
    def script(path: str, body: dict[str, Any]) -> Any:
        return completion("  hm \n", 24, "length" if body["temperature"] else "stop")

    with scripted(script) as fake:
        asked = [request("Why?", temperature=0.7), request("How?", temperature=0.0)]
        found = answers(sampler_of(fake.url), *asked)
    assert found == [Completion("hm", 24, False), Completion("hm", 24, True)]
    (body,) = [b for b in fake.bodies[CHAT] if b["temperature"]]
    assert body == {
        "model": "base",
        "messages": [{"role": "user", "content": "Why?"}],
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 24,
        "seed": seed_of(asked[0]),
        "top_k": 40,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert fake.keys == {f"Bearer {SECRET}"}


def test_without_a_key_a_word_stands_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.KEY)
    with scripted(echo) as fake:
        answers(sampler_of(fake.url), request("Why?"))
        remote.check(fake.url, "base")
    assert fake.keys == {"Bearer none"}


def test_a_job_prints_no_line_for_every_request(caplog: pytest.LogCaptureFixture) -> None:
    """DeepSpeed and others let all libraries' notes through to stderr."""
    from cai_scale.training.logs import quiet

    caplog.set_level(logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.NOTSET)
    with scripted(echo) as fake:
        answers(sampler_of(fake.url), request("Why?"))
        assert len(caplog.records) == 1  # the control
        quiet()
        answers(sampler_of(fake.url), request("Why?"))
    assert len(caplog.records) == 1


def test_the_seed_is_the_identity_of_the_request() -> None:
    import hashlib

    asked = request("p7", seed=11, round=2, sample=5, temperature=0.3)
    digest = hashlib.sha256(b"11\x002\x00p7\x005").hexdigest()
    assert seed_of(asked) == int(digest[:8], 16) // 2
    same = replace(asked, temperature=1.0, messages=({"role": "user", "content": "else"},))
    assert seed_of(same) == seed_of(asked)
    others = [{"seed": 12}, {"round": 3}, {"prompt_id": "p8"}, {"sample": 6}]
    assert seed_of(asked) not in {seed_of(replace(asked, **change)) for change in others}
    many = {seed_of(replace(asked, sample=sample)) for sample in range(2000)}
    assert len(many) == 2000
    assert all(0 <= seed < 2**31 for seed in many)


def test_answers_go_to_their_requests_and_the_bound_is_reached_and_kept() -> None:
    def script(path: str, body: dict[str, Any]) -> Any:
        time.sleep(0.02 + body["seed"] % 5 * 0.01)  # out of order
        return echo(path, body)

    asked = [request(f"p{i}", sample=i % 3) for i in range(40)]
    batches = [asked[:7], asked[7:]]
    with scripted(script) as fake:
        pairs = list(sampler_of(fake.url, rows=6).sample(batches))
    assert [r.prompt_id for r, _ in pairs] != [r.prompt_id for r in asked]
    assert Counter(id(r) for r, _ in pairs) == Counter(map(id, asked))
    assert all(c.text == f"{r.prompt_id}/{seed_of(r)}" for r, c in pairs)
    assert fake.together == 6


def test_a_server_that_stumbles_is_asked_again() -> None:
    seen: Counter[str] = Counter()
    date = formatdate(time.time() - 5, usegmt=True)
    troubles = [(429, "{}", {"retry-after": "0"}), (500, "oh"), CUT, (503, {}), (408, {})]
    troubles.append((429, "{}", {"retry-after": date}))

    def script(path: str, body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        seen[text] += 1
        return troubles[seen[text] - 1] if seen[text] <= len(troubles) else echo(path, body)

    asked = [request("a"), request("b")]
    with scripted(script) as fake:
        found = answers(sampler_of(fake.url), *asked)
    assert [c.text for c in found] == [f"{r.prompt_id}/{seed_of(r)}" for r in asked]
    assert seen == {"a": 7, "b": 7}


def test_retry_after_is_honoured() -> None:
    times: list[float] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        return (429, "{}", {"retry-after": "1"}) if len(times) == 1 else echo(path, body)

    with scripted(script) as fake:
        answers(sampler_of(fake.url), request("a"))
    assert times[1] - times[0] >= 1
    # The control: without the header the pause is the client's own, and short here.
    with scripted(lambda path, body: (429, "{}") if len(times) < 3 else echo(path, body)) as fake:
        start = time.monotonic()
        times.append(0)
        answers(sampler_of(fake.url), request("a"))
    assert time.monotonic() - start < 1


def test_what_retry_after_says() -> None:
    assert server._seconds("7") == 7
    assert server._seconds("0.25") == 0.25
    soon = server._seconds(formatdate(time.time() + 30, usegmt=True))
    assert soon is not None
    assert 28 <= soon <= 30
    for nothing in ("", "soon", "-3", "1e3"):
        assert server._seconds(nothing) is None


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ((500, {"error": {"message": f"no\nmemory for {SECRET}"}}), "500 no memory for …"),
        (CUT, "disconnected"),
        ((429, "{}", {"retry-after": "60"}), "429"),
        ("slow", "it is slow"),
    ],
)
def test_the_deadline_ends_it_in_one_line(trouble: Any, said: str) -> None:
    def script(path: str, body: dict[str, Any]) -> Any:
        if trouble == "slow":
            time.sleep(1.5)
            return echo(path, body)
        return trouble

    with scripted(script) as fake:
        sampler, start = sampler_of(fake.url, deadline=0.5), time.monotonic()
        text = complaint(ServerError, lambda: answers(sampler, request("p1")))
    assert time.monotonic() - start < 1.4
    assert f"server {fake.url} has not answered prompt p1 within 0.5 seconds" in text
    assert said in text
    assert text.endswith("continue with --resume")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ((400, {"error": {"message": "too long"}}), "refuses prompt p1 (400 too long)"),
        ((404, {"message": "no such model"}), "refuses prompt p1 (404 no such model)"),
        ((401, {"error": {"message": f"wrong key {SECRET}"}}), "(401 set OPENAI_API_KEY)"),
        ({"choices": [], "usage": {"completion_tokens": 1}}, "no chat completion"),
        ({"hello": "world"}, "no chat completion"),
        ([1, 2], "no chat completion"),
        ("{not JSON", "no chat completion"),
        ((200, "<html>hello", {"content-type": "text/html"}), "no chat completion"),
        (completion("x") | {"usage": None}, "no chat completion"),
        (completion("x") | {"usage": {"completion_tokens": "3"}}, "no chat completion"),
        (completion("\ud800"), "no chat completion"),
    ],
)
def test_a_refusal_and_nonsense_are_not_asked_again(said: Any, expected: str) -> None:
    with scripted(lambda path, body: said) as fake:
        text = complaint(ServerError, lambda: answers(sampler_of(fake.url), request("p1")))
    assert expected in text
    assert len(fake.bodies[CHAT]) == 1


def test_a_server_that_dies_loses_nothing(tmp_path: Path) -> None:
    """Half the answers, then 400s: they are kept, and a second start asks for the rest alone."""
    asked = [request(f"p{i:02}") for i in range(24)]

    def gather(sampler: RemoteSampler) -> Any:
        return collect(
            sampler, asked, tmp_path / "r.jsonl", batch_size=4, ranks=Ranks(), title="test"
        )

    def script(path: str, body: dict[str, Any]) -> Any:
        if len(fake.bodies[CHAT]) > 12:
            return 400, {"message": "gone"}
        return echo(path, body)

    with scripted(script) as fake:
        sampler = sampler_of(fake.url, rows=3)
        complaint(ServerError, lambda: gather(sampler))
    part = tmp_path / "r.parts" / "rank-0.jsonl"
    assert len(part.read_text().splitlines()) == 12
    with scripted(echo) as fake:
        responses = gather(sampler_of(fake.url))
    assert [r.text for r in responses] == [f"{r.prompt_id}/{seed_of(r)}" for r in asked]
    assert len(fake.bodies[CHAT]) == 12


def test_answers_beside_an_error_are_given_first() -> None:
    sampler = sampler_of("http://127.0.0.1:1/v1")

    async def at_once(client: Any, model: str, request: Request) -> tuple[Request, Completion]:
        if request.prompt_id == "bad":
            raise ServerError("bad")
        return request, Completion("x", 1, True)

    sampler._answer = at_once  # type: ignore[method-assign]
    found = []
    with pytest.raises(ServerError, match="bad"):
        for one, _ in sampler.sample([[request("bad"), request("a"), request("b")]]):
            found.append(one.prompt_id)
    assert sorted(found) == ["a", "b"]


def test_an_interrupt_ends_it_at_once() -> None:
    code = """
import signal, sys
from cai_scale.commands import one_line
from cai_scale.rollout.sampler import Request
from test_remote import sampler_of, request

# A shell's background jobs, and what they start, ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

@one_line
def main():
    list(sampler_of(sys.argv[1]).sample([[request("p1"), request("p2")]]))

sys.exit(main())
"""
    asked = threading.Event()

    def script(path: str, body: dict[str, Any]) -> Any:
        asked.set()
        time.sleep(5)
        return echo(path, body)

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with scripted(script) as fake:
        process = subprocess.Popen(
            [sys.executable, "-c", code, fake.url],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        assert asked.wait(60)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "")
    assert time.monotonic() - start < 4


def test_a_reader_that_leaves_ends_what_is_under_way() -> None:
    def script(path: str, body: dict[str, Any]) -> Any:
        time.sleep(0.0 if body["messages"][0]["content"] == "p0" else 2.0)
        return echo(path, body)

    with scripted(script) as fake:
        start = time.monotonic()
        stream = sampler_of(fake.url).sample([[request("p0"), request("p1"), request("p2")]])
        assert next(stream)[0].prompt_id == "p0"
        stream.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 1.5


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


class Vllm:
    """The adapters of a server, as vLLM keeps them."""

    def __init__(self, refuses: str = "") -> None:
        self.loaded: dict[str, str] = {}
        self.refuses = refuses

    def __call__(self, path: str, body: dict[str, Any]) -> Any:
        name = body.get("lora_name", "")
        if path == MODELS:
            return {"data": [{"id": name} for name in ["base", *self.loaded]]}
        if path == LOAD:
            if self.refuses or not name or name in self.loaded:
                return 400, {"error": {"message": self.refuses or "already, or no name"}}
            self.loaded[name] = body["lora_path"]
            return 200, f"Success: {name}", {"content-type": "text/plain"}
        if path == UNLOAD:
            del self.loaded[name]
            return 200, '"Success"'
        if body["model"] not in ("base", *self.loaded):
            return 404, {"error": {"message": "no such model"}}
        return completion(body["model"])


def test_an_adapter_is_loaded_once_for_all_ranks_and_unloaded(adapter: Path) -> None:
    vllm = Vllm()
    name = f"cai-scale-{sha256(adapter / 'adapter_model.safetensors')[:16]}"
    with scripted(vllm) as fake:
        remote.check(fake.url, "base", adapters=True)
        assert vllm.loaded == {}
        one, two = (sampler_of(fake.url, adapter=adapter) for _ in range(2))
        base = sampler_of(fake.url)
        for sampler, expected in ((one, name), (two, name), (one, name), (base, "base")):
            (found,) = answers(sampler, request("p1"))
            assert found.text == expected
        assert vllm.loaded == {name: str(adapter.resolve())}
        assert len(fake.bodies[LOAD]) == 3  # the check's, and one a rank
        base.close()
        assert vllm.loaded != {}
        one.close()
        assert vllm.loaded == {}
    two.close()  # a server that is gone has nothing to unload


def test_a_server_that_loads_no_adapters_is_named_with_the_remedy(adapter: Path) -> None:
    with scripted(Vllm("rank 64 > max_lora_rank 16")) as fake:
        sampler = sampler_of(fake.url, adapter=adapter)
        text = complaint(ServerError, lambda: answers(sampler, request("p1")))
        assert "rank 64 > max_lora_rank 16" in text
        assert str(adapter) in text
        remote.check(fake.url, "base", adapters=True)  # it would load others
    for said in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True", "--sampler transformers"):
        assert said in text

    def script(path: str, body: dict[str, Any]) -> Any:
        return (404, {"detail": "Not Found"}) if path == LOAD else echo(path, body)

    with scripted(script) as fake:
        remote.check(fake.url, "base")
        text = complaint(ServerError, lambda: remote.check(fake.url, "base", adapters=True))
    assert "loads no adapters (404" in text


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    text = complaint(ConfigError, lambda: sampler_of("http://x/v1", adapter=tmp_path))
    assert "--no-lora" in text


@pytest.mark.parametrize(
    "url",
    [
        *("host:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1"),
        *("http://host:0/v1", "http://host/v1?key=1", "http://host/v1#x", ""),
    ],
)
def test_a_malformed_address_is_named(url: str) -> None:
    text = complaint(ConfigError, lambda: remote.check(url, "base"))
    assert text.startswith(f"--sampler_url {url!r}: expected an address")


def test_secrets_in_the_wrong_place_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://me:{SECRET}@host/v1"
    assert server.KEY in complaint(ConfigError, lambda: remote.check(url, "base"))
    for key in (f"{SECRET}\n", f"{SECRET} x", f"{SECRET}ế"):
        monkeypatch.setenv(server.KEY, key)
        text = complaint(ConfigError, lambda: remote.check("http://127.0.0.1:1/v1", "base"))
        assert server.KEY in text


def test_a_server_that_cannot_serve_is_named_before_anything_is_loaded() -> None:
    nobody = "http://127.0.0.1:1/v1"
    text = complaint(ServerError, lambda: remote.check(nobody, "base"))
    assert text.startswith(f"server {nobody} does not answer at /models")
    assert "refused" in text
    with scripted(echo) as fake:
        remote.check(fake.url, "base")
        remote.check(fake.url + "/", "base")
        text = complaint(ServerError, lambda: remote.check(fake.url, "other"))
    assert "has no model 'other', its models: base" in text
    assert "--sampler_model" in text
    lists: Sequence[Any] = ("[", {"data": 5}, {"data": [1]}, [1], "<html>", (404, {}), (500, {}))
    for said in (*lists, (200, "<html>", {"content-type": "text/html"})):
        with scripted(lambda path, body, said=said: said) as fake:
            text = complaint(ServerError, lambda: remote.check(fake.url, "base"))
        assert "/models" in text or "its models: none" in text, said


def test_a_server_that_says_nothing_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CHECK_SECONDS", 0.2)
    with scripted(lambda path, body: time.sleep(1)) as fake:
        text = complaint(ServerError, lambda: remote.check(fake.url, "base"))
    assert "timed out" in text.lower()


def test_choosing_a_sampler() -> None:
    def never() -> bool:
        raise AssertionError

    assert choose("openai", gpu=True, fusible=never, stage=3).reason == "as asked"
    live = choose("auto", gpu=False, fusible=never, live=True)
    assert (live.name, live.reason) == ("transformers", "from the weights under training")
    for asked, gpu in (("auto", True), ("transformers", False)):
        gathers = choose(asked, gpu=gpu, fusible=never, live=True, stage=3)
        assert gathers.name == "transformers"
        assert "generate gathers the weights at every token" in gathers.reason
        assert "gathers" not in choose(asked, gpu=gpu, fusible=never, live=True, stage=2).reason
    assert "gathers" not in choose("onnx", gpu=False, fusible=never, live=True, stage=3).reason


def test_greedy_answers_are_those_of_the_onnx_sampler(tiny_model: Path, tmp_path: Path) -> None:
    """`cai-scale serve` as a process, the same graph in it and in this one."""
    from cai_export.policy import export_policy

    from cai_scale import constitution, prompts
    from cai_scale.rollout.onnx import OnnxSampler
    from cai_scale.runtime.bundle import open_bundle
    from cai_scale.runtime.generate import Policy
    from cai_scale.training.models import load_tokenizer
    from processes import serving

    folder, tokenizer = tmp_path / "policy", load_tokenizer(str(tiny_model))
    export_policy(str(tiny_model), None, folder, ("fp32",), constitution.load())
    settings: dict[str, Any] = {"max_new_tokens": 24, "top_p": 0.95, "top_k": 50, "rows": 8}
    onnx = OnnxSampler(lambda: Policy(open_bundle(folder)), tokenizer, **settings)
    texts = [prompt.text for prompt in prompts.load(prompts.TRAIN)[-20:]]
    greedy = [request(text, temperature=0.0) for text in texts]
    warm = [request(text, temperature=0.9) for text in texts]
    flags = ("--bundle", str(folder), "--port", "0", "--name", "base")
    with serving("-m", "cai_scale.cli", "serve", *flags, CAI_SCALE_TOKEN=SECRET) as (url, _):
        remote.check(f"{url}/v1", "base")
        sampler = RemoteSampler(f"{url}/v1", "base", tokenizer, **settings)
        assert [sampler.prompt_tokens(r) for r in greedy] == [onnx.prompt_tokens(r) for r in greedy]
        assert answers(sampler, *greedy) == answers(onnx, *greedy)
        found = answers(sampler, *warm)
        assert found == answers(sampler, *warm[::-1])[::-1]
        # The controls: warmth, and another seed, give other answers.
        assert found != answers(onnx, *greedy)
        assert found != answers(sampler, *(replace(r, seed=4) for r in warm))

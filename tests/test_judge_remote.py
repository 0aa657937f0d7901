"""A judge behind an endpoint: every label comes back right, whatever the server does."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cai_scale import constitution as constitutions
from cai_scale import endpoint
from cai_scale.critics import judge as judges
from cai_scale.critics.judge import Settings, remote
from cai_scale.critics.judge.journal import Journal
from cai_scale.errors import BudgetError, ConfigError, ServerError
from cai_scale.records import Preference
from judge_faults import KINDS
from judge_server import Judge as Server
from judging import Comparison, comparisons, text_of
from processes import serving

RULES = constitutions.load()
TESTS = Path(__file__).parent
# What a reply with a single letter cannot have: it is no object.
NOT_OF_LETTERS = ("twice", "prose", "cut")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)


def make(url: str, **settings: Any) -> judges.Judge:
    given = {"mode": "pairwise", "principles": "one", "concurrency": 32, "deadline": 20.0}
    return judges.load(RULES, Settings(url=url, **(given | settings)), shown=False)


def labels(
    judge: judges.Judge, planted: list[Comparison], *, swapped: bool = False
) -> list[Preference]:
    texts = [[one.first for one in planted], [one.second for one in planted]]
    return judge.compare([one.prompt for one in planted], *(texts[::-1] if swapped else texts))


def signs(found: list[Preference]) -> list[int | None]:
    return [None if p.lean is None else (p.lean > 0) - (p.lean < 0) for p in found]


@pytest.mark.parametrize("mode", ["pairwise", "logprob", "letter"])
@pytest.mark.parametrize("principles", ["one", "all"])
def test_planted_labels_come_back_in_either_order(mode: str, principles: str) -> None:
    planted = comparisons(60)
    with Server(spaced=True).thread() as url:
        judge = make(url, mode=mode, principles=principles)
        found = labels(judge, planted)
        assert signs(found) == [one.label for one in planted]
        assert [-(p.lean or 0) for p in labels(judge, planted, swapped=True)] == [
            p.lean for p in found
        ]
        # The control: labels of other answers are not these.
        assert signs(labels(judge, comparisons(60, seed=1))) != signs(found)


def test_a_probability_is_that_of_the_letters() -> None:
    """The planted P(A) is the logistic of 8 times the gap; both orders give the same."""
    one = Comparison("p", text_of(0.6), text_of(0.5), 1)
    with Server(spaced=True).thread() as url:
        [found] = labels(make(url, mode="logprob"), [one])
    probability = 1 / (1 + 2.718281828459045**-0.8)
    assert found.lean == pytest.approx(2 * probability - 1, abs=1e-9)


def test_scores_are_those_planted() -> None:
    texts = [text_of(0.25), text_of(0.5, helpful=0.9)]
    with Server().thread() as url:
        judge = make(url, mode="absolute")
        low, high = judge.score(["p", "q"], texts)
    assert low is not None and high is not None
    assert set(low.principles.values()) == {0.25}
    assert high.principles["helpful"] == 0.9 and high.overall == pytest.approx(0.6)
    assert judge.spent["calls"] == 2 and judge.spent["prompt_tokens"] > 100


@pytest.mark.parametrize("mode", ["pairwise", "logprob", "absolute"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_survived(kind: str, mode: str) -> None:
    if mode == "logprob" and kind in NOT_OF_LETTERS:
        return
    planted = comparisons(8, ties=0)
    slow = kind in ("stall", "drip")
    # After a reply that was cut the question is another one, with more room, and may fail anew.
    share = 0.25 if kind == "cut" else 0.5
    server = Server(faults=share, kinds=[kind], seed=3, most=2 if slow else 3, retry_after=0.02)
    with server.thread() as url:
        judge = make(url, mode=mode, deadline=4.0 if slow else 20.0, concurrency=16)
        if mode == "absolute":
            texts = [text for one in planted for text in (one.first, one.second)]
            scores = [s.overall if s else 0.0 for s in judge.score([""] * len(texts), texts)]
            found = [(a > b) - (a < b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
        else:
            found = signs(labels(judge, planted))  # type: ignore[assignment]
    assert found == [one.label for one in planted]
    failed = 0 if mode == "absolute" and kind == "unknown" else 1
    assert server.outcomes[kind] >= failed or kind == "unknown"
    assert server.outcomes["ok"] == 16


def test_a_question_that_gets_no_verdict_is_an_abstention() -> None:
    with Server(faults=1.0, kinds=["prose"], most=100).thread() as url:
        judge = make(url)
        [found] = labels(judge, comparisons(1))
        assert (found.lean, found.why) == (None, "no valid reply (the reply is not JSON)")
        assert judge.spent["calls"] == 2 * remote.REPLIES
        assert judge.journal.spent(judge.model.name).calls == 2 * remote.REPLIES


def test_a_server_that_settles_nothing_ends_the_asking() -> None:
    server = Server()

    async def stuck(raw: bytes, reader: Any, writer: Any) -> None:
        await reader.read()  # until the client leaves

    server._answer = stuck  # type: ignore[method-assign]
    with server.thread() as url:
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"has settled nothing within 1 seconds \(it is slow"):
            labels(make(url, deadline=1.0), comparisons(1))
        assert time.monotonic() - started < 3


def test_one_question_that_stalls_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It abstains, as the server has answered others meanwhile."""
    poison = Comparison("poison", text_of(0.1), text_of(0.9), -1)
    planted = [poison, *comparisons(400, ties=0)]
    server = Server(latency=0.05)
    fault = server._fault

    def stalls(digest: str, question: Any) -> str | None:
        marks = {text for text in question.answers if text in (poison.first, poison.second)}
        return "stall" if len(marks) == 2 else fault(digest, question)

    monkeypatch.setattr(server, "_fault", stalls)
    with server.thread() as url:
        found = labels(make(url, deadline=1.5, concurrency=8), planted)
    assert signs(found) == [None, *(one.label for one in planted[1:])]
    assert found[0].why == "no reply in time (it is slow)"


def test_questions_that_stall_abstain_while_the_server_answers_others(tmp_path: Path) -> None:
    """They are asked again by the next start."""
    server = Server(faults=1.0, kinds=["stall"], most=8)
    with server.thread() as url:
        for deadline, expected, why in (
            (1.0, None, "no reply in time (it is slow)"),
            (20.0, 1, ""),
        ):
            given = Settings(url=url, mode="pairwise", principles="one", deadline=deadline)
            judge = judges.load(RULES, given, journal=tmp_path / "j", shown=False)
            server.most = 8 if expected is None else 0
            [found] = labels(judge, [Comparison("p", text_of(0.9), text_of(0.1), 1)])
            assert (found.lean, found.why) == (expected, why)
        judge.journal.close()
    assert [file.name for file in tmp_path.iterdir()] == ["j"]


def dialect(script: Any, content: Any = None) -> Server:
    """A server that answers some bodies in its own way: `script(body)` is a status and a message,
    or None; with `content` it answers with that."""
    server = Server()
    answer = server._answer

    async def own(raw: bytes, reader: Any, writer: Any) -> None:
        from judge_faults import json_answer
        from judge_server import _send

        status = script(json.loads(raw))
        if status is None:
            await answer(raw, reader, writer)
        else:
            code, message = status
            await _send(json_answer(content or {"error": {"message": message}}, code), writer)

    server._answer = own  # type: ignore[method-assign]
    return server


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("response_format", "response_format: not supported"),
        ("response_format", "extra fields"),  # it does not say which
        ("max_tokens", "use max_completion_tokens in place of max_tokens"),
        ("temperature", "temperature must be 1"),
    ],
)
def test_what_a_server_does_not_know_is_left_out(field: str, said: str, concurrency: int) -> None:
    server = dialect(lambda body: (422, said) if field in body else None)
    planted = comparisons(40)
    with server.thread() as url:
        judge = make(url, concurrency=concurrency)
        assert signs(labels(judge, planted)) == [one.label for one in planted]


def test_a_question_that_the_server_refuses_is_an_abstention() -> None:
    planted = comparisons(10)
    refused = planted[5].prompt

    def script(body: dict[str, Any]) -> tuple[int, str] | None:
        long = refused in body["messages"][1]["content"]
        return (400, "the context is too long") if long else None

    with dialect(script).thread() as url:
        found = labels(make(url, concurrency=1), planted)
    assert found[5].why == "the server refuses (400 the context is too long)"
    assert signs(found[:5]) == [one.label for one in planted[:5]]


def test_what_ends_the_asking_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(endpoint.KEY, "sk-a-secret")
    with dialect(lambda body: (401, "no such key: sk-a-secret")).thread() as url:
        with pytest.raises(ServerError, match=r"refuses to judge \(401 set OPENAI_API_KEY") as info:
            labels(make(url), comparisons(1))
        assert "sk-a-secret" not in str(info.value)
    with (
        dialect(lambda body: (400, "logprobs: no") if "logprobs" in body else None).thread() as url,
        pytest.raises(ServerError, match=r"gives no log-probabilities .*--judge_mode letter"),
    ):
        labels(make(url, mode="logprob"), comparisons(1))
    with Server().thread() as url:
        judges.check(Settings(url=url))
        with pytest.raises(ServerError, match="no model 'other', its models: planted; name one"):
            judges.check(Settings(url=url, model="other"))
    with pytest.raises(ServerError, match=r"does not answer at /models .*mend --judge_url"):
        judges.check(Settings(url=url, model="planted"))
    for wrong in ("planted", "http://", "http://me:secret@host/v1"):
        with pytest.raises(ConfigError, match="--judge_url") as caught:
            judges.check(Settings(url=wrong, model="m"))
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"which one\? give --judge_url"):
        judges.check(Settings())


@pytest.mark.slow
@pytest.mark.faults
def test_nothing_is_lost_or_doubled_when_calls_fail_and_the_labeller_is_killed(
    tmp_path: Path,
) -> None:
    """10,000 comparisons, 30 % of the calls failing in every way, the labeller killed again and
    again. Of what was under way at a kill, nobody can know whether it was answered."""
    count, journal, log = 10_000, tmp_path / "labels.sqlite", tmp_path / "log.jsonl"
    planted = comparisons(count)
    flags = ["--faults", "0.3", "--most", "2", "--retry_after", "0.02", "--log", str(log)]
    kills = 0
    draw = random.Random(0)
    with serving(str(TESTS / "judge_server.py"), *flags, timeout=1000) as (url, _):
        command = [sys.executable, str(TESTS / "judge_worker.py"), "--url", url]
        command += ["--journal", str(journal), "--count", str(count), "--deadline", "10"]
        command += ["--into", str(tmp_path / "found.json")]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        while not (tmp_path / "found.json").exists():
            process = subprocess.Popen(command, env=environment)
            try:
                assert process.wait(draw.uniform(2, 6) if kills < 8 else 600) == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(lean > 0) - (lean < 0) for lean, _ in found] == [one.label for one in planted]
    assert kills >= 4 and len(Journal(journal)) == 2 * count
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    answered = sum(line["fault"] == "ok" for line in lines)
    assert 2 * count <= answered <= 2 * count + kills * 64
    share = sum(line["fault"] != "ok" for line in lines) / len(lines)
    assert 0.25 < share < 0.35


def test_a_port_that_nobody_listens_on_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServerError, match="has settled nothing within 1 seconds"):
        labels(make(url, model="m", deadline=1.0), comparisons(1))


def test_a_reply_that_was_cut_is_paid_for_and_asked_for_with_more_room() -> None:
    """A model that thinks says nothing until it is done."""
    limits = []

    def script(body: dict[str, Any]) -> tuple[int, str] | None:
        limits.append(body["max_tokens"])
        return None if body["max_tokens"] >= 1024 else (200, "")

    cut = {
        "choices": [{"message": {"content": None}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 256},
    }
    with dialect(script, cut).thread() as url:
        judge = make(url, mode="absolute")
        assert judge.score(["p"], [text_of(0.5)]) != [None]
    assert limits == [256, 512, 1024]
    assert judge.spent["calls"] == 3 and judge.spent["prompt_tokens"] > 14


def test_a_budget_lets_what_is_under_way_finish() -> None:
    server = Server(latency=0.05)
    with server.thread() as url:
        judge = make(url, max_tokens=1, concurrency=8)
        with pytest.raises(BudgetError, match="is spent"):
            labels(judge, comparisons(40))
        assert len(judge.journal) == server.outcomes["ok"] == 8
        # The control: one that is met by the last question ends nothing.
        judge = make(url, mode="absolute", max_tokens=1, concurrency=1)
        assert judge.score(["p"], [text_of(0.5)]) != [None]


def test_an_odd_first_answer_does_not_end_a_run_by_letters() -> None:
    with Server(faults=1.0, kinds=["text"], most=100).thread() as url:
        [found] = labels(make(url, mode="logprob"), comparisons(1))
    assert found.why == "no valid reply (the reply begins with neither A nor B)"
    with (
        Server(faults=1.0, kinds=["missing"], most=100).thread() as url,
        pytest.raises(ServerError, match="gives no log-probabilities"),
    ):
        labels(make(url, mode="logprob"), comparisons(1))

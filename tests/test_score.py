"""`cai-score`: one line out for each row, in order, whatever the rows are."""

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_scale import constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import DataError
from cai_scale.runtime import rows as reading
from cai_scale.runtime import score as scoring
from cai_scale.runtime.bundle import Bundle
from cai_scale.runtime.cli import score_main
from cai_scale.runtime.rows import BadRow, Row, read_rows
from cai_scale.runtime.scorer import Scorer
from processes import ROOT

DEFAULT = constitution.load()
COMMAND = [sys.executable, "-m", "cai_scale.runtime.cli", "--constitution", "default"]


def run(*arguments: str, stdin: bytes = b"") -> tuple[int, list[dict[str, Any]], str]:
    """The command in this process: exit code, the objects on stdout, stderr."""
    out = io.TextIOWrapper(io.BytesIO(), write_through=True)
    err = io.StringIO()
    with mock.patch.multiple(
        sys, stdin=io.TextIOWrapper(io.BytesIO(stdin)), stdout=out, stderr=err
    ):
        code = score_main(arguments)
    lines = out.buffer.getvalue().split(b"\n")  # type: ignore[attr-defined]
    assert lines.pop() == b""
    return code, [json.loads(line) for line in lines], err.getvalue()


def score_rows(*records: Any, flags: Sequence[str] = ()) -> tuple[int, list[dict[str, Any]], str]:
    stdin = "\n".join(map(json.dumps, records)).encode()
    return run("--constitution", "default", "--input", "-", *flags, stdin=stdin)


def answer(response: str, **others: Any) -> dict[str, Any]:
    return {"prompt": "q", "response": response, **others}


def test_each_row_has_the_critics_score_and_its_id() -> None:
    responses = ["A useful tip.", "", "It may always rain."]
    code, found, err = score_rows(
        answer(responses[0], id="a", other=[1]), answer(responses[1]), answer(responses[2], id=7)
    )
    assert (code, err) == (0, "")
    expected = LexiconCritic(DEFAULT).score([""] * 3, responses)
    assert [f["overall"] for f in found] == [e and e.overall for e in expected]
    assert [f["principles"] for f in found] == [e and dict(e.principles) for e in expected]
    assert [f.get("id") for f in found] == ["a", None, 7]
    assert {f["constitution"] for f in found} == {DEFAULT.sha256}
    assert {f["scorer"] for f in found} == {"lexicon"}
    assert "id" not in found[1]
    assert not any("words" in f or "reward" in f for f in found)


def test_the_words_behind_a_score() -> None:
    _, [found, empty], _ = score_rows(answer("Ít ạ, please."), answer(""), flags=["--explain"])
    assert found["words"] == [
        {"start": 3, "end": 4, "term": "ạ", "principle": "respectful", "list": "polite",
         "effect": 0.08},
        {"start": 6, "end": 12, "term": "please", "principle": "respectful", "list": "polite",
         "effect": 0.08},
    ]  # fmt: skip
    assert found["principles"]["respectful"] == pytest.approx(0.7 + 2 * 0.08)
    assert empty["words"] == []


BAD = {
    b"{": "not JSON",
    b'"x"': "str, expected an object",
    b'{"prompt": "q", "response": "\xff"}': "not UTF-8",
    b'{"prompt": "q"}': "column `response`: missing",
    b'{"prompt": ["q"], "response": "x"}': "column `prompt`: list, expected a text",
    b'{"prompt": "q", "response": "x", "id": 1.5}': "column `id`: float",
    b'{"prompt": "q", "response": "x", "id": "\\ud800"}': "column `id`: not Unicode",
    b'{"prompt": "q", "response": "a\\udc80"}': "column `response`: not Unicode",
    b'{"prompt": "q", "response": "x", "n": NaN}': "NaN is not a JSON number",
    b'{"prompt": "q", "response": "x", "n": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"prompt": "q", "response": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "not JSON",
}  # fmt: skip


@pytest.mark.parametrize(("bad", "said"), BAD.items())
def test_a_bad_row_is_named_and_the_others_go_on(bad: bytes, said: str) -> None:
    good = b'{"prompt": "q", "response": "A tip."}'
    stdin = b"\n".join([good, b"  ", bad, good, bad])
    flags = ("--constitution", "default", "--input", "-")
    code, found, err = run(*flags, stdin=stdin)
    assert code == 1
    assert [f.get("overall") for f in found] == [0.725, None, 0.725, None]
    assert [f.get("row") for f in found] == [None, 3, None, 5]
    assert said in found[1]["error"]
    assert set(found[1]) == {"row", "error"}
    assert err.count("\n") == 1
    assert err.startswith("error: stdin: row 3: ")
    assert err.endswith("2 of 4 rows have no score\n")

    code, found, err = run(*flags, "--strict", stdin=stdin)
    assert (code, len(found)) == (2, 1)
    assert err.count("\n") == 1
    assert said in err
    assert run(*flags, "--strict", stdin=good + b"\n" + good)[0] == 0


def test_the_flags_that_exclude_one_another(tmp_path: Path) -> None:
    for flags in (
        ["--response", "x"],
        ["--constitution", "default", "--bundle", "x", "--response", "x"],
        ["--constitution", "default"],
        ["--constitution", "default", "--response", "x", "--input", "-"],
        ["--constitution", "default", "--input", "-", "--prompt", "x"],
        ["--constitution", "default", "--response", "x", "--expect-sha256", "0"],
        ["--constitution", "default", "--input", str(tmp_path / "none")],
        ["--constitution", "default", "--input", str(tmp_path)],
        ["--constitution", "default", "--response", "a\udc80"],
    ):
        code, found, err = run(*flags)
        assert (code, found, err.count("\n")) == (2, [], 1), flags


def test_a_constitution_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps(DEFAULT.data))
    found = [run("--constitution", name, "--response", "x")[1] for name in (str(file), "default")]
    assert found[0] == found[1] != []


class Fake:
    """A reward model that scores an answer by its length, and refuses one of over nine letters."""

    labels = ("overall",)

    def __init__(self, bundle: Bundle, variant: str | None = None) -> None:
        self.batches: list[int] = []

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, float]]:
        self.batches.append(len(responses))
        assert all(responses), "an empty answer has no score"
        if any(len(response) > 9 for response in responses):
            raise DataError("longer than the model reads")
        return [self.values(len(r)) for r in responses]

    def values(self, length: int) -> dict[str, float]:
        return {"overall": float(length)}


class FakeByPrinciple(Fake):
    labels = ("harmless", "helpful", "honest", "respectful")

    def values(self, length: int) -> dict[str, float]:
        return {label: length + index for index, label in enumerate(self.labels)}


@pytest.fixture
def reward(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Fake]], Scorer]:
    """A scorer of a bundle with a reward model, also for the command."""

    def install(kind: type[Fake]) -> Scorer:
        module = types.ModuleType("cai_scale.runtime.reward")
        module.RewardModel = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        scorer = Scorer(DEFAULT, Bundle(Path(), {"scorer": "reward"}))
        monkeypatch.setattr(scoring, "_scorer", lambda options: scorer)
        return scorer

    return install


def test_a_reward_model_speaks_beside_the_lexicon(reward: Callable[[type[Fake]], Scorer]) -> None:
    scorer = reward(Fake)
    texts = ["A tip.", "", "xx"]
    found = scorer.score(["q"] * 3, texts)
    assert [f["reward"] for f in found] == [{"overall": 6.0}, None, {"overall": 2.0}]
    alone = Scorer(DEFAULT).score(["q"] * 3, texts)
    for both, lexicon in zip(found, alone, strict=True):
        assert (both.pop("scorer"), lexicon.pop("scorer")) == ("reward", "lexicon")
        assert both.pop("reward", None) is None or lexicon["overall"] is not None
        assert both == lexicon


def test_a_reward_for_each_principle(reward: Callable[[type[Fake]], Scorer]) -> None:
    [found] = reward(FakeByPrinciple).score(["q"], ["xxx"])
    assert found["reward"]["principles"] == dict(zip(FakeByPrinciple.labels, range(3, 7)))  # noqa: B905
    assert found["reward"]["overall"] == 4.5


def test_rewards_come_in_order_from_chunks(reward: Callable[[type[Fake]], Scorer]) -> None:
    """200 rows: every seventh is not JSON, every tenth is refused by the model, some are empty."""
    scorer = reward(Fake)
    lines = []
    for i in range(200):
        response = "x" * 10 if i % 10 == 3 else "x" * (i % 9)
        lines.append(b"{" if i % 7 == 0 else json.dumps(answer(response, id=i)).encode())
    code, found, err = run("--constitution", "x", "--input", "-", stdin=b"\n".join(lines))
    assert code == 1
    assert len(found) == 200
    refused = 0
    for i, record in enumerate(found):
        if i % 7 == 0 or i % 10 == 3:
            assert record["row"] == i + 1
            refused += 1
        else:
            assert record["id"] == i
            assert record["reward"] == ({"overall": i % 9} if i % 9 else None)
    assert f"{refused} of 200 rows" in err
    assert isinstance(scorer.reward, Fake)
    assert max(scorer.reward.batches) > 40
    code, _, err = run("--constitution", "x", "--response", "x" * 10)
    assert (code, err) == (2, "error: longer than the model reads\n")


def test_chunks_are_bounded_in_rows_and_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_CHARACTERS", 100)
    rows = [Row(1, "", "x" * 60), BadRow(2, ""), Row(3, "x" * 30, "x" * 30), *[Row(4, "", "")] * 9]
    assert [len(chunk) for chunk in scoring._chunks(rows, 4)] == [3, 4, 4, 1]


class Endless(io.RawIOBase):
    """A stream of `parts`, each a byte repeated so many times, never held at once."""

    def __init__(self, parts: Iterator[tuple[bytes, int]]) -> None:
        self.parts = parts
        self.byte, self.left = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.left:
            self.byte, self.left = next(self.parts, (b"", 0))
        count = min(self.left, len(buffer))
        buffer[:count] = self.byte * count
        self.left -= count
        return count


def test_a_line_that_does_not_end_is_a_bad_row_and_not_kept() -> None:
    import tracemalloc

    parts = [(b"x", 300_000_000), (b"\n", 1), (b" ", 5), (b"\n", 1), (b"[", 1), (b"\n", 1)]
    file = io.BufferedReader(Endless(iter([*parts, (b"y", 50_000_000)])))
    tracemalloc.start()
    found = [(row.number, getattr(row, "error", "")) for row in read_rows(file)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [number for number, _ in found] == [1, 3, 4]
    assert "longer than 33554432 bytes" in found[0][1]
    assert "not JSON" in found[1][1]
    assert "longer than" in found[2][1]
    assert peak < 3 * reading.LONGEST_LINE


def test_the_longest_line_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps(answer("x" * 50)).encode()
    monkeypatch.setattr(reading, "LONGEST_LINE", len(line))
    assert [type(row) for row in read_rows(io.BytesIO(line + b"\n" + line))] == [Row, Row]
    monkeypatch.setattr(reading, "LONGEST_LINE", len(line) - 1)
    longer = [line + b"x\n", line, line + b"\n"]
    assert [type(row) for row in read_rows(io.BytesIO(b"".join(longer)))] == [BadRow, BadRow]


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    deadline = threading.Timer(60, process.kill)
    deadline.start()
    try:
        with process:
            yield process
    finally:
        deadline.cancel()


def test_a_row_is_answered_before_the_next_one_comes() -> None:
    with started("--input", "-") as process:
        assert process.stdin
        assert process.stdout
        for response in ("A tip.", "Rain.", "Please."):
            process.stdin.write(json.dumps(answer(response)).encode() + b"\n")
            process.stdin.flush()
            assert b'"overall"' in process.stdout.readline()
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait() == 0


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    with started("--input", "-") as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        line = json.dumps(answer("A tip.")).encode() + b"\n"
        process.stdin.write(line)
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line * 1000)
            process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_stream(tmp_path: Path) -> None:
    """20 MB of rows take no more than 1 MB of rows do."""
    line = json.dumps(answer("A tip about the rain. " * 900)).encode() + b"\n"
    peaks = []
    for count in (50, 1000):
        (tmp_path / "rows.jsonl").write_bytes(line * count)
        code = (
            "import sys; from cai_scale.runtime.cli import score_main; "
            "score_main(['--constitution', 'default', '--input', 'rows.jsonl']); "
            "[peak] = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]; "
            "print(peak.split()[1], file=sys.stderr)"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, cwd=tmp_path, env=environment, check=True,
        )  # fmt: skip
        assert result.stdout.count(b"\n") == count
        peaks.append(int(result.stderr))
    assert peaks[1] < peaks[0] + 4_000  # KiB


letters = st.characters(exclude_categories=[])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(letters, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(letters, max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
lines = st.one_of(
    st.binary(max_size=20),
    anything.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {}, optional={key: st.text(letters) | anything for key in ("prompt", "response", "id")}
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"prompt": st.text(), "response": st.text()}).map(
        lambda value: json.dumps(value, ensure_ascii=False).encode()
    ),
).map(lambda line: line.replace(b"\n", b" "))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A constitution of few terms, which is read quickly."""
    data = copy.deepcopy(dict(DEFAULT.data))
    for letter, principle in zip("abcd", data["principles"], strict=True):
        terms = {"en": [letter], "vi": [f"{letter} {letter}"]}
        principle["lexicon"]["lists"] = [{"id": "x", "effect": 0.1, "terms": terms}]
    path = tmp_path_factory.mktemp("own") / "own.yaml"
    path.write_text(json.dumps(data))
    return path


@settings(max_examples=150)
@given(st.lists(lines, max_size=8), st.booleans())
def test_no_stream_brings_a_traceback_or_loses_a_line(
    own: Path, given_lines: list[bytes], explain: bool
) -> None:
    flags = ("--constitution", str(own), "--input", "-", *["--explain"] * explain)
    code, found, err = run(*flags, stdin=b"\n".join(given_lines))
    wanted = [number for number, line in enumerate(given_lines, 1) if line.strip()]
    assert len(found) == len(wanted)
    bad = [record for record in found if "error" in record]
    assert code == (1 if bad else 0)
    assert err.count("\n") == (1 if bad else 0)
    for number, record in zip(wanted, found, strict=True):
        assert record.get("row", number) == number
        assert ("overall" in record) is not ("error" in record)

"""`cai-scale judge-eval`: its figures by hand, and planted critics whose figures are known."""

import json
import random
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Any

import pytest

from cai_scale import cli, judge_eval
from cai_scale.critics import Comparer, Critic
from cai_scale.errors import DataError
from cai_scale.evaluation.agreement import DISAGREE, LabelledPair, agreement, verdict
from cai_scale.judge_eval import ask, cost, print_agreement, read_pairs
from cai_scale.records import Preference, Score, read_jsonl
from cai_scale.statistics import wilson
from processes import run_python

Prefer = Callable[[str, str, str], Preference]


class Judge:
    """A comparer that applies a rule to each (prompt, first, second)."""

    name = "planted"

    def __init__(self, prefer: Prefer) -> None:
        self.prefer = prefer
        self.seen: list[tuple[str, str, str]] = []

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[Preference]:
        rows = list(zip(prompts, firsts, seconds, strict=True))
        self.seen += rows
        return [self.prefer(*row) for row in rows]


class Rater:
    """A critic that scores an answer by the number it begins with; "?" has no score."""

    name = "rater"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        return [None if r.startswith("?") else Score({}, float(r.split()[0])) for r in responses]

    def why(self, prompt: str, response: str) -> str:
        return f"no number in {response}"


def better(prompt: str, first: str, second: str) -> Preference:
    return Preference(1.0 if "good" in first else -1.0)


def worse(prompt: str, first: str, second: str) -> Preference:
    return Preference(-1.0 if "good" in first else 1.0)


def shown_first(prompt: str, first: str, second: str) -> Preference:
    return Preference(1.0)


def longer(prompt: str, first: str, second: str) -> Preference:
    gap = len(first.split()) - len(second.split())
    return Preference(float((gap > 0) - (gap < 0)))


def both_orders(prefer: Prefer) -> Prefer:
    """What a careful judge makes of a careless one."""

    def consistent(prompt: str, first: str, second: str) -> Preference:
        there, back = prefer(prompt, first, second).lean, prefer(prompt, second, first).lean
        assert there is not None
        return Preference(there) if back == -there else Preference(0.0, DISAGREE)

    return consistent


def planted(path: Path, count: int = 400, swapped: bool = False) -> list[LabelledPair]:
    """Pairs of a good and a bad answer of 1 to 9 words more; two thirds are category "x"."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            good = " ".join(["good", *["word"] * draw.randint(1, 9)])
            bad = " ".join(["bad", *["word"] * draw.randint(1, 9)])
            chosen, rejected = (bad, good) if swapped else (good, bad)
            row = {"prompt": f"question {index}", "chosen": chosen, "rejected": rejected}
            row |= {"category": "x" if index % 3 else "y", "lang": "en"}
            file.write(json.dumps(row) + "\n")
    return read_pairs(path)


@pytest.fixture
def pairs(tmp_path: Path) -> list[LabelledPair]:
    return planted(tmp_path / "planted.jsonl")


def figures(critic: Critic | Comparer, pairs: Sequence[LabelledPair]) -> dict[str, Any]:
    found = agreement(pairs, ask(critic, pairs), compares=isinstance(critic, Comparer))
    json.dumps(found, allow_nan=False)
    return found


def pair(chosen: str, rejected: str, chosen_first: bool = True, **more: Any) -> LabelledPair:
    first, second = (chosen, rejected) if chosen_first else (rejected, chosen)
    return LabelledPair(
        id=0, prompt="p", first=first, second=second, chosen_first=chosen_first, **more
    )


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), 857–872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_by_a_published_table(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert found == pytest.approx([low, high], abs=5.1e-5)
    assert wilson(n - successes, n) == pytest.approx([1 - high, 1 - low], abs=5.1e-5)
    # The control: the normal interval, which is often used in its place, is another.
    share = successes / n
    half = 1.959964 * (share * (1 - share) / n) ** 0.5
    assert found != pytest.approx([share - half, share + half], abs=1e-3)


def test_wilson_of_halves_of_all_and_of_nothing() -> None:
    # The ends solve (p̂ - p)² = z² p (1 - p) ÷ n, which is where the formula comes from.
    for end in wilson(6.5, 10) or []:
        assert (0.65 - end) ** 2 == pytest.approx(3.841459 * end * (1 - end) / 10, abs=1e-5)
    assert wilson(400, 400) == pytest.approx([400 / 403.841459, 1.0], abs=1e-6)
    assert wilson(0, 0) is None


def test_the_figures_by_hand() -> None:
    labelled = [
        pair("a b c", "d", category="long"),  # right, lean .2
        pair("a b c", "d", False, category="long"),  # wrong, lean .2
        pair("a", "d e", category="short"),  # right, lean .9
        pair("a", "d e", False, category="short"),  # right, lean -.9
        pair("a", "d"),  # right, lean .25; of one length
        pair("a b", "d", category="long"),  # a tie
        pair("a b", "d", category="long"),  # a tie, in spite of rounding
        pair("a b", "d"),  # an abstention
    ]
    leans = [0.2, 0.2, 0.9, -0.9, 0.25, 0.0, 9e-10, None]
    whys = ["", "", "", "", "", DISAGREE, "", "no valid reply"]
    preferences = [Preference(lean, why) for lean, why in zip(leans, whys, strict=True)]
    found = agreement(labelled, preferences, compares=True)
    counts = {key: found[key] for key in ("n", "right", "wrong", "ties", "abstentions")}
    assert counts == {"n": 8, "right": 4, "wrong": 1, "ties": 2, "abstentions": 1}
    assert found["reasons"] == {
        "ties": {DISAGREE: 1, "equal": 1},
        "abstentions": {"no valid reply": 1},
    }
    # (4 + 1.92073 ± 1.95996 √(4 · 1 ÷ 5 + .96036)) ÷ (5 + 3.84146)
    decided = found["accuracy"]["decided"]
    assert (decided["share"], decided["n"]) == (0.8, 5)
    assert decided["ci95"] == pytest.approx([0.375535, 0.963776], abs=2e-5)
    # (4 + 1.5) of 8: (5.5 + 1.92073 ± 1.95996 √(5.5 · 2.5 ÷ 8 + .96036)) ÷ (8 + 3.84146)
    everything = found["accuracy"]["all"]
    assert (everything["share"], everything["n"]) == (0.6875, 8)
    assert everything["ci95"] == pytest.approx([0.355755, 0.897592], abs=2e-5)
    assert found["position"]["prefers_first"]["share"] == 0.8  # all decided but the fourth
    assert found["position"]["chosen_first"]["share"] == 0.75
    # Seven pairs have a valid reply; an abstention is no disagreement.
    assert found["position"]["orders_disagree"]["share"] == pytest.approx(1 / 7, abs=1e-6)
    length = found["length"]
    assert (length["prefers_longer"]["share"], length["prefers_longer"]["n"]) == (0.25, 4)
    assert length["chosen_longer"]["share"] == pytest.approx(5 / 7, abs=1e-6)
    assert (length["accuracy_longer"]["share"], length["accuracy_longer"]["n"]) == (0.5, 2)
    assert (length["accuracy_shorter"]["share"], length["accuracy_shorter"]["n"]) == (1.0, 2)
    # Two bins: .2 .2 .25 say .608333 and two of three are right; .9 .9 say .95 and both are.
    calibration = found["calibration"]
    assert calibration["bins"] == [
        {"from": 0.2, "to": 0.3, "n": 3, "said": 0.608333, "was": 0.666667},
        {"from": 0.9, "to": 1.0, "n": 2, "said": 0.95, "was": 1.0},
    ]
    assert calibration["ece"] == pytest.approx((3 * 0.058333 + 2 * 0.05) / 5, abs=1e-6)
    assert list(found["categories"]) == ["long", "short"]
    part = found["categories"]["long"]
    assert (part["n"], part["right"], part["wrong"], part["ties"]) == (4, 1, 1, 2)
    assert (part["accuracy"]["share"], found["categories"]["short"]["accuracy"]["n"]) == (0.5, 2)
    assert found["languages"] == {}


def test_the_length_correlation_by_hand() -> None:
    """Leans ±1 ±2 ±3 in tenths and log ratios in the order 2 1 3: ranks over both orders."""
    labelled = [pair("a b", "c"), pair("a b c", "d", False), pair("a b c d", "e")]
    ratios = [log(3 / 2), log(2 / 4), log(5 / 2)]
    assert sorted(map(abs, ratios)) == [abs(ratios[0]), abs(ratios[1]), abs(ratios[2])]
    leans = [0.2, -0.1, 0.3]  # towards the longer; of the first and second the order is turned
    found = agreement(labelled, [Preference(lean) for lean in leans], compares=False)
    # Ranks -3 … 3 without 0 against theirs: two swaps by one, 1 - 6 · 4 ÷ (6 · 35).
    assert found["length"]["spearman"] == pytest.approx(1 - 24 / 210, abs=1e-6)
    turned = [
        LabelledPair(id=0, prompt="p", first=p.second, second=p.first, chosen_first=True)
        for p in labelled
    ]
    again = agreement(turned, [Preference(-lean) for lean in leans], compares=False)
    assert again["length"]["spearman"] == found["length"]["spearman"]
    other = agreement(turned, [Preference(lean) for lean in leans], compares=False)
    assert other["length"]["spearman"] == -found["length"]["spearman"]


def test_verdicts() -> None:
    first, second = pair("a", "b"), pair("a", "b", False)
    assert verdict(first, Preference(0.1)) == verdict(second, Preference(-0.1)) == "right"
    assert verdict(first, Preference(-0.1)) == verdict(second, Preference(0.1)) == "wrong"
    assert verdict(first, Preference(-9e-10)) == verdict(second, Preference(9e-10)) == "tie"
    assert verdict(first, Preference(None)) == "abstention"


def test_a_perfect_critic_and_its_opposite(pairs: list[LabelledPair]) -> None:
    found = figures(Judge(better), pairs)
    assert (found["right"], found["wrong"]) == (400, 0)
    assert found["accuracy"]["decided"] == found["accuracy"]["all"]
    assert found["accuracy"]["all"]["ci95"] == pytest.approx([0.990488, 1.0], abs=1e-6)
    assert found["position"]["prefers_first"] == found["position"]["chosen_first"]
    assert found["length"]["prefers_longer"] == found["length"]["chosen_longer"]
    assert found["position"]["orders_disagree"]["share"] == 0.0
    assert found["calibration"]["ece"] == 0.0
    assert found["categories"]["x"]["n"] == 266
    assert found["categories"]["x"]["accuracy"]["share"] == 1.0
    opposite = figures(Judge(worse), pairs)
    assert (opposite["right"], opposite["wrong"]) == (0, 400)
    assert opposite["calibration"]["ece"] == 1.0  # certain, and always wrong


def test_a_coin_has_no_accuracy_and_no_bias(pairs: list[LabelledPair]) -> None:
    draw = random.Random(2)
    found = figures(Judge(lambda *_: Preference(draw.choice([-1.0, 1.0]))), pairs)
    accuracy, position, length = (found[key] for key in ("accuracy", "position", "length"))
    for share in (accuracy["all"], position["prefers_first"], length["prefers_longer"]):
        low, high = share["ci95"]
        assert low < 0.5 < high
        assert high - low < 0.11
    assert abs(length["spearman"]) < 0.12
    assert found["calibration"]["ece"] == pytest.approx(1 - accuracy["all"]["share"], abs=1e-6)


def test_a_critic_that_prefers_the_first(pairs: list[LabelledPair]) -> None:
    found = figures(Judge(shown_first), pairs)
    assert found["position"]["prefers_first"]["share"] == 1.0
    low, high = found["accuracy"]["all"]["ci95"]
    assert low < 0.5 < high  # were the chosen shown first, this would be 1
    assert found["right"] == sum(p.chosen_first for p in pairs)
    careful = figures(Judge(both_orders(shown_first)), pairs)
    assert (careful["ties"], careful["reasons"]["ties"]) == (400, {DISAGREE: 400})
    assert careful["position"]["orders_disagree"]["share"] == 1.0
    assert careful["accuracy"]["decided"] == {"share": None, "n": 0, "ci95": None}
    assert careful["accuracy"]["all"]["share"] == 0.5
    assert careful["calibration"] == {"ece": None, "bins": []}
    print_agreement({"critic": "planted", **careful, "cost": {"seconds": 0.1}})


def test_a_critic_that_prefers_the_longer(pairs: list[LabelledPair]) -> None:
    found = figures(Judge(longer), pairs)
    length = found["length"]
    equal = sum(len(p.first.split()) == len(p.second.split()) for p in pairs)
    assert found["ties"] == equal > 0
    assert length["prefers_longer"]["share"] == 1.0
    assert (length["accuracy_longer"]["share"], length["accuracy_shorter"]["share"]) == (1.0, 0.0)
    assert found["accuracy"]["decided"]["share"] == length["chosen_longer"]["share"]
    assert length["spearman"] > 0.8
    honest = figures(Judge(better), pairs)["length"]
    assert abs(honest["spearman"]) < 0.12
    assert honest["accuracy_shorter"]["share"] == 1.0


def test_calibration_of_soft_leans(pairs: list[LabelledPair]) -> None:
    """Right in three of four, as a lean of .5 says; a lean of .9 says .95."""

    def soft(lean: float) -> Prefer:
        def prefer(prompt: str, first: str, second: str) -> Preference:
            wrong = int(prompt.split()[1]) % 4 == 0
            return Preference(lean if ("good" in first) != wrong else -lean)

        return prefer

    found = figures(Judge(soft(0.5)), pairs)
    assert found["accuracy"]["decided"]["share"] == 0.75
    assert found["calibration"] == {
        "ece": 0.0,
        "bins": [{"from": 0.5, "to": 0.6, "n": 400, "said": 0.75, "was": 0.75}],
    }
    assert figures(Judge(soft(0.9)), pairs)["calibration"]["ece"] == pytest.approx(0.2)


def test_a_gap_of_decimals_falls_into_its_bin() -> None:
    # 0.8 - 0.7 is above .1, 0.75 - 0.65 under it, and neither is meant.
    labelled = [pair("0.8", "0.7"), pair("0.75", "0.65"), pair("1", "0")]
    found = figures(Rater(), labelled)
    assert [(b["from"], b["n"]) for b in found["calibration"]["bins"]] == [(0.1, 2), (0.9, 1)]


def test_what_is_shown_does_not_hang_on_the_label(tmp_path: Path) -> None:
    """Swapped labels: the critic sees the same, and right and wrong change places exactly."""
    one, other = Judge(shown_first), Judge(shown_first)
    straight = figures(one, planted(tmp_path / "a.jsonl"))
    swapped = figures(other, planted(tmp_path / "b.jsonl", swapped=True))
    assert one.seen == other.seen
    assert (straight["right"], straight["wrong"]) == (swapped["wrong"], swapped["right"])
    assert straight["right"] != straight["wrong"]  # so that the line above says something
    assert 160 < straight["right"] < 240


def test_a_critic_that_scores(tmp_path: Path) -> None:
    labelled = [
        pair("0.9", "0.5"),
        pair("0.9", "0.5", False),
        pair("0.3", "0.5"),
        pair("0.5", "0.5000000001"),
        pair("?", "0.5"),
        pair("0.5", "? !", True),
    ]
    preferences = ask(Rater(), labelled)
    assert [p.lean for p in preferences[:3]] == pytest.approx([0.4, -0.4, -0.2])
    found = figures(Rater(), labelled)
    assert (found["right"], found["wrong"], found["ties"], found["abstentions"]) == (2, 1, 1, 2)
    assert found["reasons"]["abstentions"] == {"no number in ?": 1, "no number in ? !": 1}
    assert found["position"]["orders_disagree"] is None


@pytest.mark.parametrize("lean", [1.1, float("nan"), float("-inf")])
def test_a_broken_comparer_is_refused(pairs: list[LabelledPair], lean: float) -> None:
    with pytest.raises(DataError, match=rf"planted gave the lean {lean} for pair 1, expected"):
        ask(Judge(lambda *_: Preference(lean)), pairs)

    class Short(Judge):
        def compare(
            self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
        ) -> list[Preference]:
            return super().compare(prompts, firsts, seconds)[1:]

    with pytest.raises(DataError, match="gave 399 preferences for 400 pairs"):
        ask(Short(better), pairs)


def test_the_cost_is_what_the_critic_says() -> None:
    judge = Judge(better)
    assert cost(judge, 2.0) == {"seconds": 2.0}
    spent = {"calls": 4, "prompt_tokens": 900, "completion_tokens": 100, "money": 0.02}
    judge.spent = spent  # type: ignore[attr-defined]
    assert cost(judge, 2.0) == {**spent, "seconds": 2.0, "tokens_per_second": 500.0}


LEXICON = [  # by the default lexicon "useful" and "tip" are .1 each of one principle of four
    {"prompt": "q", "chosen": "a useful tip", "rejected": "a thing", "id": "one"},
    {"prompt": "q", "chosen": "a thing", "rejected": "a useful tip", "id": 2, "score": 7},
    {"prompt": "q", "chosen": "a thing", "rejected": "one more thing here", "category": "c"},
    {"prompt": "q", "chosen": "a thing", "rejected": " ", "lang": "en", "id": None},
    {"prompt": "q", "chosen": "a useful thing", "rejected": "the thing"},
]


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def test_the_command(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", *LEXICON)
    files = ["--json", str(tmp_path / "figures.json"), "--rows", str(tmp_path / "rows.jsonl")]
    result = run_python("-m", "cai_scale.cli", "judge-eval", "--data", str(data), *files)
    assert (result.returncode, result.stderr) == (0, "")
    assert "lexicon on 5 labelled pairs" in result.stdout
    assert "abstentions 1: empty answer 1" in result.stdout
    summary = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    counts = [summary[key] for key in ("n", "right", "wrong", "ties", "abstentions")]
    assert counts == [5, 2, 1, 1, 1]
    assert (summary["critic"], summary["data"]) == ("lexicon", str(data))
    # 2 of 3: (2 + 1.92073 ± 1.95996 √(2 · 1 ÷ 3 + .96036)) ÷ (3 + 3.84146)
    assert summary["accuracy"]["decided"]["ci95"] == pytest.approx([0.20766, 0.938508], abs=2e-5)
    assert summary["accuracy"]["all"]["share"] == 0.6
    assert list(summary["cost"]) == ["seconds"]
    rows = [record for _, record in read_jsonl(tmp_path / "rows.jsonl")]
    assert [(row["id"], row["verdict"]) for row in rows] == [
        ("one", "right"),
        (2, "wrong"),
        (3, "tie"),
        (4, "abstention"),
        (5, "right"),
    ]
    assert [row["lean"] and abs(row["lean"]) for row in rows] == pytest.approx(
        [0.05, 0.05, 0.0, None, 0.025]
    )
    assert rows[0]["chosen_first"] == (rows[0]["lean"] > 0)
    assert rows[3]["why"] == "empty answer"


def test_a_limit_reads_no_further(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write(tmp_path / "pairs.jsonl", *LEXICON[:2], "not a row"))
    assert cli.main(["judge-eval", "--data", data, "--limit", "2"]) == 0
    assert "lexicon on 2 labelled pairs" in capsys.readouterr().out
    assert cli.main(["judge-eval", "--data", data, "--limit", "3"]) == 2  # the control


def test_a_comparer_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Judge(both_orders(better))
    judge.spent = {"calls": 100, "money": 1.5}  # type: ignore[attr-defined]
    monkeypatch.setattr(judge_eval.flags, "load", lambda *_: judge)
    planted(tmp_path / "planted.jsonl", 50)
    assert cli.main(["judge-eval", "--data", str(tmp_path / "planted.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "planted on 50 labelled pairs" in printed
    assert "the orders disagree" in printed
    assert "cost: calls 100, money 1.5, seconds" in printed


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("nonsense", "row 2: not JSON"),
        ([1], "row 2: list, expected an object"),
        ({"prompt": "q", "chosen": "a"}, "row 2: column `rejected`: missing, expected a text"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "row 2: column `prompt`: int"),
        ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, "row 2: column `chosen`: list"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "row 2: `chosen` and `rejected` are"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "id": []}, "row 2: column `id`: list"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "lang": 3}, "row 2: column `lang`: int"),
        ('{"prompt": "q", "chosen": "a", "rejected": "\\ud800"}', "row 2: column `rejected`: not"),
    ],
)
def test_a_bad_row_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, said: str
) -> None:
    data = write(tmp_path / "pairs.jsonl", LEXICON[0], row)
    out = tmp_path / "figures.json"
    assert cli.main(["judge-eval", "--data", str(data), "--json", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {data}: {said}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--limit", "0"], "--limit 0: expected at least 1"),
        (["--critic", "oracle"], "unknown critic 'oracle'"),
        (["--data", "none.jsonl"], "--data none.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl: no rows"),
        (["--rows", "pairs.jsonl"], "two of them are one file"),
        (["--json", "x", "--rows", "./x"], "two of them are one file"),
        (["--constitution", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "pairs.jsonl", *LEXICON)
    (tmp_path / "empty.jsonl").touch()
    before = data.read_bytes()
    assert cli.main(["judge-eval", "--data", "pairs.jsonl", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert data.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "pairs.jsonl"]

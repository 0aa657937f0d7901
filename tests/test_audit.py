"""The audit: figures by hand, limits from both sides, and pairs that were tampered with."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import copysign, inf
from pathlib import Path
from typing import Any

import pytest

from cai_scale import cli, labels
from cai_scale.errors import GateError
from cai_scale.preferences.audit import _grams, _repeated, audit, audit_again, flip_rate
from cai_scale.preferences.limits import LIMITS, Finding, judge, require_sound
from cai_scale.preferences.pairs import build_pairs, compared_pairs
from cai_scale.ranks import Ranks
from cai_scale.records import (
    Candidate,
    Pair,
    Preference,
    Prompt,
    Response,
    Score,
    read_json,
    read_jsonl,
    write_jsonl,
)
from cai_scale.runs import Round, Run
from processes import run_python


def pair(number: int, chosen: str = "", rejected: str = "", **about: Any) -> Pair:
    """A pair whose prompt and answers are unlike any other's, and nothing else is amiss.

    `about` has what the chosen and the rejected answer are like, as (chosen, rejected).
    """

    def candidate(text: str, side: int) -> Candidate:
        default = {"score": (0.8, 0.6), "temperature": (0.7, 0.7), "revised": (False, False)}
        return Candidate(text=text, **{k: v[side] for k, v in {**default, **about}.items()})

    return Pair(
        prompt_id=str(number),
        language="en",
        messages=({"role": "user", "content": f"What of {number} is said by {number}?"},),
        chosen=candidate(chosen or f"Number {number} is a useful number.", 0),
        rejected=candidate(rejected or f"Number {number} is a bomb indeed.", 1),
    )


def swapped(one: Pair) -> Pair:
    """The pair with its answers' texts, and nothing else, in each other's place."""
    return replace(
        one,
        chosen=replace(one.chosen, text=one.rejected.text),
        rejected=replace(one.rejected, text=one.chosen.text),
    )


class Oracle:
    """Knows which answers are good."""

    name = "oracle"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        return [Score({}, float("useful" in text)) if text.strip() else None for text in responses]

    def why(self, prompt: str, response: str) -> str:
        return "no valid reply (not JSON)"


def levels(figures: dict[str, Any]) -> dict[str, str]:
    """What is beyond a limit."""
    return {f.limit.figure: f.level for f in judge(figures) if f.level != "ok"}


def test_figures_by_hand() -> None:
    pairs = [
        pair(0, "a b c d", "e f", temperature=(0.7, 1.0)),
        pair(1, "g h", "i j k", temperature=(1.0, 0.7), score=(0.9, 0.6)),
        pair(2, "l m", "n o", temperature=(0.7, 1.0), score=(0.5, 0.7)),
        pair(3, "p q r s t", "u", score=(0.7, 0.7)),
    ]
    figures = audit(pairs, {})
    expected = {
        "mean_gap": (0.2 + 0.3 - 0.2 + 0.0) / 4,
        "chosen_cooler": 2 / 3,
        "chosen_longer": 2 / 3,  # of the three whose lengths differ
        "inverted": 1 / 3,  # of the three whose scores differ
        "chosen_words": 13 / 4,
        "rejected_words": 8 / 4,
        "longer_by_mean": 5 / 4,
        "longer_by_median": 1.0,  # of -1, 0, 2, 4
        "alike_answers": 0.0,
        "alike_prompts": 0.0,
        "agreement": None,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["out_of"] == {
        "chosen_cooler": 3,
        "chosen_longer": 3,
        "inverted": 3,
        "alike_answers": 4,
        "alike_prompts": 4,
        "agreement": 0,
    }


def test_agreement_of_critics_and_gains_by_principle() -> None:
    def votes(*leans: float) -> dict[str, Any]:
        names = ("one", "two", "three")
        chosen = {name: 0.5 + lean for name, lean in zip(names, leans, strict=True)}
        return {"votes": (chosen, dict.fromkeys(names, 0.5))}

    pairs = [
        pair(0, **votes(0.1, 0.2, 0.1), principles=({"x": 0.9, "y": 0.8}, {"x": 0.7, "y": 0.7})),
        pair(1, **votes(0.1, -0.2, 0.0), principles=({"x": 0.8, "y": 0.8}, {"x": 0.7, "y": 0.7})),
        pair(2, **votes(-0.1, -0.2, 0.3), principles=({"x": 0.5, "y": 0.8}, {"x": 0.7, "y": 0.7})),
        pair(3),  # one critic alone labelled it
    ]
    figures = audit(pairs, {})
    assert figures["agreements"] == {
        "one and two": pytest.approx(2 / 3),
        "one and three": pytest.approx(1 / 2),
        "two and three": pytest.approx(1 / 2),
    }
    assert (figures["agreement"], figures["out_of"]["agreement"]) == (0.5, 2)
    assert figures["gains"] == {"x": 2, "y": 1}  # x first where both gain alike


@pytest.mark.parametrize(
    ("count", "flipped", "found"),
    [
        (500, 20, {"flip_rate": "refuse"}),  # 4 %
        (500, 0, {}),
        (1000, 5, {"flip_rate": "warn"}),  # .5 %
        (500, 2, {"flip_rate": "warn"}),
        (19, 1, {}),  # too few to tell a slip from a habit
    ],
)
def test_flipped_labels_are_flagged(count: int, flipped: int, found: dict[str, str]) -> None:
    pairs = [pair(i) for i in range(count)]
    for i in random.Random(0).sample(range(count), flipped):
        pairs[i] = swapped(pairs[i])
    figures = audit_again(audit(pairs, {}), pairs, Oracle())
    assert figures["flip_rate"] == flipped / count
    assert levels(figures) == found
    if "refuse" in found.values():
        with pytest.raises(GateError, match=rf"flip_rate is 0.0400 of {count}, refused from 0.02"):
            require_sound(judge(figures), "mend it")
    else:
        require_sound(judge(figures), "mend it")


def test_the_lexicon_sees_what_the_oracle_sees() -> None:
    from cai_scale import constitution
    from cai_scale.critics import load_critic

    pairs = [pair(i) if i % 25 else swapped(pair(i)) for i in range(500)]
    critic = load_critic("lexicon", constitution.load())
    assert flip_rate(pairs, critic) == flip_rate(pairs, Oracle()) == (0.04, 500)


def test_swapped_rows_show_without_a_critic() -> None:
    pairs = [pair(i) for i in range(500)]
    assert levels(audit(pairs, {})) == {}
    for i in range(20):
        pairs[i] = replace(pairs[i], chosen=pairs[i].rejected, rejected=pairs[i].chosen)
    figures = audit(pairs, {})
    assert figures["inverted"] == 0.04
    assert levels(figures) == {"inverted": "refuse"}


def test_a_tie_reverses_no_label() -> None:
    assert flip_rate([pair(0, rejected="No less useful."), swapped(pair(1))], Oracle()) == (0.5, 2)


def test_answers_that_the_critic_does_not_score_flip_nothing() -> None:
    pairs = [pair(0), swapped(pair(1)), pair(2, rejected=" ")]
    assert flip_rate(pairs, Oracle()) == (0.5, 2)
    assert "flip_rate" not in audit(pairs, {})


def test_a_comparer_reverses_labels_too() -> None:
    class Comparing:
        name = "comparing"

        def compare(
            self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
        ) -> list[Preference]:
            return [Preference(lean) for lean in (1.0, -0.5, 0.0, None)]

    assert flip_rate([pair(n) for n in range(4)], Comparing()) == (1 / 3, 3)


# (figure, the share where it begins to warn, where to refuse), at each end that it has.
ENDS = [
    ("chosen_cooler", 0.3, 0.1),
    ("chosen_cooler", 0.7, 0.9),
    ("chosen_longer", 0.3, 0.1),
    ("chosen_longer", 0.7, 0.9),
    ("inverted", 0.001, 0.02),
    ("flip_rate", 0.001, 0.02),
    ("alike_answers", 0.02, 0.1),
    ("alike_prompts", 0.02, 0.25),
    ("parse_failures", 0.05, 0.3),
    ("abstentions", 0.2, 0.6),
    ("ties", 0.5, inf),  # never
    ("disagreements", 0.2, 0.4),
    ("agreement", 0.7, 0.5),
    ("revisions_better", 0.1, -inf),
]


@pytest.mark.parametrize(("figure", "warn", "refuse"), ENDS)
def test_each_limit_from_both_sides(figure: str, warn: float, refuse: float) -> None:
    def level(share: float, of: int) -> str:
        (finding,) = judge({figure: share, "out_of": {figure: of}})
        return finding.level

    out = copysign(0.0002, refuse - warn)  # a step further out
    many = 10**8  # cases, so that the interval is far narrower than the step
    assert level(warn - out, many) == "ok"
    assert level(warn, many) == level(warn + out, many) == "warn"
    assert level(warn, 20) == "warn"
    assert level(warn, 19) == "ok"  # too few cases to warn
    if abs(refuse) == inf:
        assert level(float(out > 0), many) == "warn"
    else:
        assert level(refuse - out, many) == "warn"
        assert level(refuse + out, many) == "refuse"
        assert level(refuse + out, 100) == "warn"  # chance may do that


def test_every_limit_is_tested() -> None:
    ends = [
        (limit.figure, warn, refuse)
        for limit in LIMITS
        for warn, refuse in zip(limit.warn, limit.refuse, strict=True)
        if abs(warn) != inf
    ]
    assert ends == ENDS


def test_few_cases_do_not_refuse_however_clear() -> None:
    for count, level in (
        (10, {}),
        (20, {"chosen_cooler": "warn"}),
        (36, {"chosen_cooler": "refuse"}),
    ):
        pairs = [pair(i, temperature=(0.7, 1.0)) for i in range(count)]
        assert levels(audit(pairs, {})) == level


def test_nearly_the_same_text() -> None:
    words = [f"w{i}" for i in range(42)]  # 40 grams; a changed last word costs one: 39 of 41
    near, far = " ".join([*words[:-1], "x"]), " ".join([*words[:20], "x", *words[21:]])
    pairs = [pair(0, " ".join(words), near), pair(1, " ".join(words), far), pair(2, "Yes", "yes")]
    assert audit(pairs, {})["alike_answers"] == pytest.approx(2 / 3)


def test_prompts_that_occur_nearly_twice() -> None:
    pairs = [pair(0), pair(1), replace(pair(2), messages=pair(0).messages), pair(3)]
    assert audit(pairs, {})["alike_prompts"] == 0.25
    louder = ({"role": "user", "content": pair(0).messages[0]["content"].upper()},)
    pairs[3] = replace(pairs[3], messages=louder)
    assert audit(pairs, {})["alike_prompts"] == 0.5


def test_repeats_are_those_that_comparing_all_finds() -> None:
    numbers = random.Random(0)
    texts: list[str] = []
    for _ in range(300):
        words = [f"w{numbers.randrange(9)}" for _ in range(numbers.randrange(1, 60))]
        if texts and numbers.random() < 0.5:
            words = numbers.choice(texts).split()
            for _ in range(numbers.randrange(3)):
                words[numbers.randrange(len(words))] = "x"
        texts.append(" ".join(words))
    sets = [_grams(text) for text in texts]
    new: list[Any] = []
    expected = []
    for grams in sets:
        expected.append(any(len(grams & o) / len(grams | o) >= 0.9 for o in new))
        if not expected[-1]:
            new.append(grams)
    assert _repeated(sets) == expected
    exact = [text in texts[:i] for i, text in enumerate(texts)]
    assert 50 < sum(exact) < sum(expected) < 250  # the control: near ones are among them


def test_labels_that_there_were_none_of() -> None:
    prompts = [Prompt(id=p, messages=({"role": "user", "content": p},)) for p in "abc"]
    # Per prompt: scores, or why there is none.
    given: dict[str, list[Any]] = {
        "a": [0.7, 0.7, "no valid reply (not JSON)", "the critics disagree"],
        "b": [0.9, 0.7, "judge: no valid reply (too long)", "empty answer"],
        "c": [0.9, 0.7, "no reply in time", 0.8],
    }
    responses, scores, why = [], [], {}
    for name, values in given.items():
        for sample, value in enumerate(values):
            text = "" if value == "empty answer" else f"{name} {sample}"
            responses.append(response(name, sample, text))
            scores.append(None if isinstance(value, str) else Score({}, value))
            if isinstance(value, str):
                why[name, sample] = value
    built, account, refused = build_pairs(prompts, responses, scores, margin=0.05, why=why)
    account |= {"revisions": {"asked": 8, "better": 2}}
    figures = audit(built, account, refused)
    shares = {
        "parse_failures": (2 / 11, 11),  # of the answers that are not empty
        "abstentions": (2 / 11, 11),
        "ties": (1 / 3, 3),  # of the prompts with two answers
        "disagreements": (None, 0),
        "revisions_better": (0.25, 8),
    }
    assert {name: (figures[name], figures["out_of"][name]) for name in shares} == {
        name: (pytest.approx(share), of) for name, (share, of) in shares.items()
    }
    again = audit_again(figures, built, Oracle())
    assert {k: v for k, v in again.items() if k not in ("flip_rate", "out_of")} == {
        k: v for k, v in figures.items() if k != "out_of"
    }


def test_comparisons_without_a_winner() -> None:
    prompts = [Prompt(id=str(i), messages=({"role": "user", "content": f"{i}"},)) for i in range(8)]
    responses = [response(p.id, s, f"{p.id} {s}") for p in prompts for s in (0, 1)]
    responses[0] = response("0", 0, "")
    preferences = [
        Preference(None, "empty answer"),
        Preference(0.0, "the orders disagree"),
        Preference(0.0, "tie"),
        Preference(None, "no valid reply (not JSON)"),
        Preference(None, "the server refuses (400)"),
        *[Preference(0.5)] * 3,
    ]
    comparisons = [(p.id, 0, 1, given) for p, given in zip(prompts, preferences, strict=True)]
    figures = audit(*compared_pairs(prompts, responses, comparisons, margin=0.05))
    names = ("parse_failures", "abstentions", "ties", "disagreements")
    assert [figures[name] for name in names] == pytest.approx([1 / 7, 1 / 7, 2 / 7, 1 / 7])
    assert {figures["out_of"][name] for name in names} == {7}


def response(name: str, sample: int, text: str) -> Response:
    return Response(
        prompt_id=name, sample=sample, round=1, temperature=0.7, text=text, tokens=1, finished=True
    )


class Picky(Oracle):
    """Has no score for some answers."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        scores = super().score(prompts, responses)
        return [None if "odd" in text else s for s, text in zip(scores, responses, strict=True)]


def test_a_file_of_scores_says_why_there_is_none(tmp_path: Path) -> None:
    files = Round(tmp_path)
    texts = ["useful", "", "odd", "useful and more"]
    responses = [response("p", i, text) for i, text in enumerate(texts)]
    file = files.scores(files.rollouts)
    labels.score_once(Picky(), ["p"] * 4, responses, file, Ranks())
    assert [(row["sample"], row.get("why")) for _, row in read_jsonl(file)] == [
        (0, None),
        (1, "empty answer"),
        (2, "no valid reply (not JSON)"),
        (3, None),
    ]
    revised = [response("p", 1_000_001, "useful"), response("p", 1_000_003, "worse")]
    write_jsonl(files.revisions(), revised)
    labels.score_once(Picky(), ["p"] * 2, revised, files.scores(files.revisions()), Ranks())
    write_jsonl(files.revisions(2), revised[:1])
    labels.score_once(Picky(), ["p"], revised[:1], files.scores(files.revisions(2)), Ranks())
    # The second try's is no better than the first's, which it revised.
    assert labels.revisions(files) == {"asked": 3, "better": 1}


# The command.


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int, flipped: int) -> list[dict[str, str]]:
    good = [pair(i) if i >= flipped else swapped(pair(i)) for i in range(count)]
    return [
        {
            "prompt": one.messages[0]["content"],
            "chosen": one.chosen.text,
            "rejected": one.rejected.text,
        }
        for one in good
    ]


def test_the_command_on_a_file_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "good.jsonl", texts(500, 0))
    assert cli.main(["audit", "--pairs", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"500 pairs: {file}" in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "flip_rate 0.000 500 from 0.001 from 0.02 ok" in lines
    assert "chosen_cooler – – outside 0.3 to 0.7 outside 0.1 to 0.9 –" in lines
    assert "mean_gap" not in shown  # the file has no scores
    file = write(tmp_path / "bad.jsonl", texts(500, 20))
    assert cli.main(["audit", "--pairs", str(file)]) == 1
    shown, complaints = capsys.readouterr()
    assert "REFUSE" in shown
    assert len(complaints.splitlines()) == 1
    assert "flip_rate is 0.0400 of 500, refused from 0.02" in complaints
    assert cli.main(["audit", "--pairs", str(file), "--critic", "none"]) == 0
    file = write(tmp_path / "some.jsonl", texts(400, 2))
    capsys.readouterr()
    assert cli.main(["audit", "--pairs", str(file)]) == 0
    assert "flip_rate is 0.0050 of 400, warned from 0.001" in capsys.readouterr().out


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [pair(i) for i in range(30)]
    file = write(tmp_path / "pairs.jsonl", [asdict(one) for one in pairs])
    assert cli.main(["audit", "--pairs", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["critic"], found["levels"]["flip_rate"]) == ("lexicon", "ok")
    assert found["figures"]["mean_gap"] == pytest.approx(0.2)
    assert found["figures"]["out_of"]["flip_rate"] == 30


STORED = asdict(pair(0))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "chosen": "c"}, "column `rejected`: missing"),
        ({"prompt": "p", "chosen": "c", "rejected": " "}, "column `rejected`: empty"),
        ({"prompt": "p", "chosen": ["c"], "rejected": "r"}, "column `chosen`: list"),
        ({"chosen": "c", "rejected": "r"}, "column `prompt`: missing"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r", "language": 7},
            "column `language`: int",
        ),
        ({**STORED, "chosen": {"text": "x"}}, "not as a run writes it"),
        ({**STORED, "chosen": "x"}, "not as a run writes it"),
        ({**STORED, "messages": []}, "column `messages`: empty"),
        ({**STORED, "messages": 7}, "not as a run writes it"),
        ({**STORED, "messages": ["x"]}, "column `messages`: missing"),
        ({**STORED, "chosen": {**STORED["chosen"], "score": "1"}}, "column `chosen.score`: str"),
        ({**STORED, "chosen": {**STORED["chosen"], "text": 7}}, "column `chosen.text`: int"),
        ({**STORED, "chosen": {**STORED["chosen"], "votes": 7}}, "column `chosen.votes`"),
        ([], "list, expected an object"),
    ],
)
def test_a_bad_row_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, said: str
) -> None:
    file = write(tmp_path / "pairs.jsonl", [*texts(1, 0), row])
    assert cli.main(["audit", "--pairs", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: row 2: {said}" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pairs", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--pairs", "empty.jsonl"], "no rows"),
        (["--pairs", "empty.jsonl", "--run", "run"], "not allowed with"),
        (["--pairs", "good.jsonl", "--round", "2"], "--round belongs to a run"),
        (["--pairs", "good.jsonl", "--critic", "oracle"], "unknown critic 'oracle'"),
        (["--pairs", "good.jsonl", "--constitution", "no.yaml"], "no.yaml"),
        (["--run", "nothing"], "nothing holds no run"),
        ([], "no finished run under runs/"),
    ],
)
def test_wrong_flags_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "good.jsonl", texts(3, 0))
    assert cli.main(["audit", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_the_rows_of_a_run_add_up(finished_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    files = finished_run.round(1)
    figures, rows = read_json(files.audit), [row for _, row in read_jsonl(files.refused)]
    for kind, count in {**figures["dropped"], **figures["unpaired"]}.items():
        assert sum(row["refused"] == kind for row in rows) == count
    paired = {row["prompt_id"] for _, row in read_jsonl(files.pairs)}
    assert figures["prompts"] == len(paired) + sum(figures["unpaired"].values())
    asked = sum(len(list(read_jsonl(file))) for file in files.all_revisions())
    assert figures["revisions"]["asked"] == asked > 0
    assert cli.main(["audit", "--run", str(finished_run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["flip_rate"] == 0.0
    assert {k: v for k, v in found["figures"].items() if k not in ("flip_rate", "out_of")} == {
        k: v for k, v in figures.items() if k != "out_of"
    }


def test_a_run_whose_pairs_were_turned_is_refused_until_told_otherwise(
    finished_run: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(finished_run.path, run.path, ignore=shutil.ignore_patterns("bundle"))
    run.summary.unlink()
    for folder in (run.adapter, run.checkpoints):
        shutil.rmtree(folder)
    rows = [row for _, row in read_jsonl(run.round(1).pairs)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_jsonl(run.round(1).pairs, turned)
    command = ("-m", "cai_scale.launch.train", "--resume", "--output", str(run.path))
    refused = run_python(*command)
    assert refused.returncode == 1, refused.stderr
    line = refused.stderr.strip().splitlines()[-1]
    for word in ("inverted is 1.0000", "flip_rate is 1.0000", "refused from 0.02", "--audit warn"):
        assert word in line
    assert run.product is None
    trained = run_python(*command, "--audit", "warn")
    assert trained.returncode == 0, trained.stderr
    assert "warning: flip_rate is 1.0000" in trained.stdout
    assert run.finished


def test_a_finding_says_what_to_do() -> None:
    finding = Finding(LIMITS[0], 0.05, 200, "refuse")
    assert finding.text == (
        "chosen_cooler is 0.0500 of 200, refused outside 0.1 to 0.9: the pairs teach the "
        "temperature; sample at --temperatures that are nearer to each other"
    )

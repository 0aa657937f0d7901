"""Pairs of an answer and its revision, from what is stored in a round."""

from pathlib import Path
from typing import Any

import pytest

from cai_scale import constitution, labels
from cai_scale.config import Config
from cai_scale.records import Prompt, Response, write_jsonl
from cai_scale.runs import Round

REVISED = 1_000_000  # the first number of a revision's sample


def response(prompt: str, sample: int, text: str) -> Response:
    return Response(
        prompt_id=prompt,
        sample=sample,
        round=1,
        temperature=0.7,
        text=text,
        tokens=1,
        finished=True,
    )


def store(file: Path, rows: list[tuple[Response, float | None]]) -> None:
    write_jsonl(file, (answer for answer, _ in rows))
    write_jsonl(
        Round.scores(file),
        (
            {
                "prompt_id": answer.prompt_id,
                "sample": answer.sample,
                "score": None if score is None else {"principles": {}, "overall": score},
                **({"why": "the critics disagree"} if score is None else {}),
            }
            for answer, score in rows
        ),
    )


@pytest.fixture
def files(tmp_path: Path) -> Round:
    """Of a, the second revision gains more; of b, the revision is worse; of c, there is no score;
    d was not revised."""
    found = Round(tmp_path)
    first = [
        (response("a", 0, "a0"), 0.5), (response("a", 1, "a1"), 0.4), (response("b", 0, "b0"), 0.9),
        (response("c", 0, "c0"), 0.5), (response("d", 0, "d0"), 0.5),
    ]  # fmt: skip
    again = [
        (response("a", REVISED, "a0 new"), 0.6), (response("a", REVISED + 1, "a1 new"), 0.8),
        (response("b", REVISED, "b0 new"), 0.7), (response("c", REVISED, "c0 new"), None),
    ]  # fmt: skip
    store(found.rollouts, first)
    store(found.revisions(), again)
    return found


def pairs(files: Round, comparisons: Any = None, **settings: Any) -> Any:
    asked = [Prompt(id=name, messages=({"role": "user", "content": name},)) for name in "abcd"]
    config = Config(pairs="revisions", **settings)
    return labels.pairs(config, asked, files, [], [], comparisons)


def test_by_scores(files: Round) -> None:
    found, figures, refused = pairs(files, margin=0.1)
    texts = [(p.chosen.text, p.chosen.score, p.rejected.text, p.rejected.score) for p in found]
    assert texts == [("a1 new", 0.8, "a1", 0.4), ("b0", 0.9, "b0 new", 0.7)]
    assert [(p.chosen.revised, p.rejected.revised) for p in found] == [(True, False), (False, True)]
    assert figures["revisions"] == {"asked": 4, "better": 2}
    assert [(row["prompt_id"], row["refused"], row["why"]) for row in refused] == [
        ("c", "abstentions", "the critics disagree"),
        ("c", "undecided", "no comparison prefers an answer"),
        ("d", "not_compared", "no two answers were compared"),
    ]
    # The control: with a wider margin the pair of b is gone.
    assert [p.prompt_id for p in pairs(files, margin=0.3)[0]] == ["a"]


def test_by_a_judge_that_compares(files: Round) -> None:
    leans = {("a", 0): 0.2, ("a", 1): -0.6, ("b", 0): 0.4, ("c", 0): None}
    write_jsonl(
        files.comparisons(files.revisions()),
        (
            {
                "prompt_id": name,
                "first": REVISED + sample,
                "second": sample,
                "preference": {"lean": lean, "why": "", "principles": {}},
            }
            for (name, sample), lean in leans.items()
        ),
    )
    found, figures, _ = pairs(files, critic="judge", judge_mode="pairwise")
    assert [(p.chosen.text, p.chosen.score, p.rejected.text) for p in found] == [
        ("a1", 0.8, "a1 new"),
        ("b0 new", 0.7, "b0"),
    ]
    assert figures["revisions"] == {"asked": 4, "better": 2}


@pytest.mark.parametrize("first_pass", [False, True])
def test_every_answer_is_compared_or_has_a_row(first_pass: bool) -> None:
    texts = ["a tip", "", "a tip", "a plan", "a useful tip", "nothing"]  # 0.8, 0.7, 0.9, 0.7
    given = [response("a", sample, text) for sample, text in enumerate(texts)]
    given.append(response("b", 0, "alone"))
    asked = [Prompt(id=name, messages=({"role": "user", "content": name},)) for name in "ab"]
    config = Config(critic="judge", judge_mode="pairwise", first_pass=first_pass)
    found, left_out = labels.to_compare(config, constitution.load(), asked, given)
    compared = [(first.sample, second.sample) for first, second in found]
    assert compared == ([(4, 5)] if first_pass else [(0, 3), (4, 5)])
    rows = {(row["prompt_id"], row["sample"]): row["refused"] for row in left_out}
    assert rows.pop(("a", 1)) == "empty_answers"
    assert rows.pop(("a", 2)) == "duplicate_answers"
    others = [("b", 0), ("a", 0), ("a", 3)] if first_pass else [("b", 0)]
    assert rows == dict.fromkeys(others, "uncompared_answers")
    assert len(left_out) + 2 * len(found) == len(given)

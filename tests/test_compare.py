from dataclasses import replace

import numpy as np
import pytest

from cai_scale import constitution
from cai_scale.evaluation.compare import Answered, compare, interval, slices
from cai_scale.records import Prompt, Response, Score

CONSTITUTION = constitution.load()


def answered(
    before: float | None, after: float | None, language: str = "en", category: str = ""
) -> Answered:
    def score(value: float | None) -> Score | None:
        if value is None:
            return None
        return Score({p.id: value for p in CONSTITUTION.principles}, value)

    def response(value: float | None) -> Response:
        text = "" if value is None else "one two two"
        return Response(
            prompt_id="p", sample=0, round=0, temperature=1, text=text, tokens=3, finished=True
        )

    return Answered(
        prompt=Prompt(
            id="p",
            messages=({"role": "user", "content": "q"},),
            language=language,
            category=category,
        ),
        before=response(before),
        after=response(after),
        before_score=score(before),
        after_score=score(after),
    )


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (0.7, 0.8, "win"),
        (0.8, 0.7, "loss"),
        (0.7, 0.7099, "tie"),
        (0.7, 0.71, "win"),  # 0.01 apart is no tie, in spite of rounding
        (0.71, 0.7, "loss"),
        (0.7, None, "loss"),
        (None, 0.1, "win"),
        (None, None, "tie"),
    ],
)
def test_verdicts(before: float | None, after: float | None, verdict: str) -> None:
    assert answered(before, after).verdict == verdict


def test_what_a_critic_did_not_score_is_no_empty_answer() -> None:
    row = answered(0.7, 0.8)
    assert replace(row, after_score=None).verdict == "tie"
    assert replace(row, before_score=None).verdict == "tie"
    assert replace(answered(0.7, None), before_score=None).verdict == "loss"


def test_a_comparison_by_hand() -> None:
    rows = [answered(0.7, 0.8), answered(0.6, 0.6), answered(0.9, 0.8), answered(0.5, 0.8)]
    rows.append(answered(0.7, None))
    found = compare(rows, CONSTITUTION)
    assert (found["n"], found["scored"]) == (5, 4)
    assert (found["win"], found["loss"], found["tie"]) == (2, 2, 1)
    assert found["before"]["overall"] == pytest.approx(0.675)
    assert found["after"]["overall"] == pytest.approx(0.75)
    assert found["delta"]["overall"] == pytest.approx(0.075)
    assert found["delta"]["principles"] == pytest.approx(
        dict.fromkeys(("harmless", "helpful", "honest", "respectful"), 0.075)
    )
    low, high = found["delta"]["ci95"]
    assert low < 0.075 < high


def test_wins_losses_and_ties_have_wilson_s_interval() -> None:
    """Its ends are the shares p at which |k/n - p| = z √(p (1 - p) / n)."""
    rows = [answered(0.5, 0.8)] * 6 + [answered(0.8, 0.5)] * 3 + [answered(0.7, 0.7)]
    found = compare(rows, CONSTITUTION)
    for name, count in (("win", 6), ("loss", 3), ("tie", 1)):
        for end in found[f"{name}_ci95"]:
            spread = 1.959964 * (end * (1 - end) / 10) ** 0.5
            assert abs(count / 10 - end) == pytest.approx(spread, abs=1e-5)
    assert compare([], CONSTITUTION)["win_ci95"] is None


def test_a_critic_that_gives_the_mean_alone_has_no_principles() -> None:
    rows = [
        replace(
            answered(0.7, 0.8), before_score=Score({}, before), after_score=Score({}, before + 0.1)
        )
        for before in (0.3, 0.5)
    ]
    found = compare(rows, CONSTITUTION)
    assert found["delta"]["overall"] == pytest.approx(0.1)
    assert found["delta"]["principles"] == dict.fromkeys(found["before"]["principles"])
    assert set(found["delta"]["principles_ci95"].values()) == {None}


def test_the_interval_is_the_normal_one_for_many_prompts() -> None:
    deltas = np.random.default_rng(1).normal(0.02, 0.1, 2000)
    half = 1.96 * deltas.std() / len(deltas) ** 0.5
    low, high = interval(deltas)  # type: ignore[misc]
    assert low == pytest.approx(deltas.mean() - half, abs=3e-4)
    assert high == pytest.approx(deltas.mean() + half, abs=3e-4)


def test_the_interval_is_paired() -> None:
    """A constant difference has no spread, however much the prompts differ."""
    assert interval(np.full(50, 0.03)) == [0.03, 0.03]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = interval(generator.normal(0.05, 0.1, 120))  # type: ignore[misc]
        hits += low <= 0.05 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_too_few_prompts_have_no_interval() -> None:
    assert interval(np.array([0.1])) is None
    empty = compare([], CONSTITUTION)
    assert (empty["n"], empty["before"]["overall"], empty["delta"]["ci95"]) == (0, None, None)


def test_slices() -> None:
    rows = [
        answered(0.7, 0.8),
        answered(0.7, 0.6, "vi", "unsafe"),
        answered(0.7, None, "vi", "unsafe"),
    ]
    parts = slices(rows, CONSTITUTION)
    assert {
        (kind, name): (part["n"], part["win"], part["loss"])
        for kind, found in parts.items()
        for name, part in found.items()
    } == {
        ("language", "en"): (1, 1, 0),
        ("language", "vi"): (2, 0, 2),
        ("category", "unsafe"): (2, 0, 2),  # the other prompt has no category
    }

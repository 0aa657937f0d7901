"""Rank statistics and the held-out figures of a reward model, against numbers by hand."""

import io
import json
from contextlib import redirect_stdout
from itertools import combinations
from math import exp

import numpy as np
import pytest

from cai_scale import constitution
from cai_scale.evaluation.rewards import print_rewards, rewards
from cai_scale.records import Answer, Prompt, Response, Score
from cai_scale.statistics import order_agreement, pearson, spearman

RULES = constitution.load()
PRINCIPLES = tuple(p.id for p in RULES.principles)
RANDOM = np.random.default_rng(0)


def test_rank_statistics_by_hand() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    # Equal values share ranks 1.5 and 1.5: covariance 4.5, variances 5 and 4.5.
    tied = spearman(a, np.array([0.0, 5.0, 5.0, 9.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(5 * 4.5))
    assert np.isnan(spearman(a, np.ones(4)))
    assert order_agreement(a, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(5 / 6)
    assert np.isnan(order_agreement(np.ones(4), a))


def test_pearson_by_hand() -> None:
    # Deviations -1 0 1 and -1 -1 2: covariance 3, variances 2 and 6.
    found = pearson(np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 3.0]))
    assert found == pytest.approx(3 / np.sqrt(12))
    assert np.isnan(pearson(np.array([1.0]), np.array([2.0])))


def answer(prompt: int, sample: int, overall: float, principles: list[float]) -> Answer:
    return Answer(
        prompt=Prompt(id=str(prompt), messages=({"role": "user", "content": "?"},)),
        response=Response(
            prompt_id=str(prompt),
            sample=sample,
            round=0,
            temperature=0.7,
            text="x",
            tokens=1,
            finished=True,
        ),
        score=Score(dict(zip(PRINCIPLES, principles, strict=True)), overall),
    )


def sampled(count: int = 60) -> list[Answer]:
    scores = RANDOM.integers(0, 21, (count, 4)) / 20
    return [answer(i // 4, i % 4, float(np.mean(s)), s.tolist()) for i, s in enumerate(scores)]


def by_hand(answers: list[Answer], critic: list[float], found: list[float], margin: float) -> float:
    right = []
    for i, j in combinations(range(len(answers)), 2):
        gap = critic[i] - critic[j]
        if answers[i].prompt.id == answers[j].prompt.id and abs(gap) >= margin - 1e-9 and gap:
            product = gap * (found[i] - found[j])
            right.append(1.0 if product > 0 else 0.5 if product == 0 else 0.0)
    return sum(right) / len(right)


def test_the_figures_by_hand() -> None:
    answers = sampled()
    predicted = np.array([[s + RANDOM.normal(0, 0.3)] for s in (a.score.overall for a in answers)])
    predicted[3] = predicted[2]  # a tie
    critic = [a.score.overall for a in answers]
    found = rewards(answers, predicted, ("overall",), margin=0.1, constitution=RULES)
    json.dumps(found, allow_nan=False)
    figures = found["labels"]["overall"]
    column = predicted[:, 0]
    assert figures["accuracy"] == pytest.approx(
        by_hand(answers, critic, column.tolist(), 0.1), abs=1e-6
    )
    assert figures["pearson"] == pytest.approx(np.corrcoef(column, critic)[0, 1], abs=1e-6)
    order = sorted(range(60), key=lambda i: column[i])
    assert [b["n"] for b in figures["bins"]] == [6] * 10
    clipped = np.clip(column, 0, 1)
    errors = []
    for k, bin in enumerate(figures["bins"]):
        rows = order[6 * k : 6 * k + 6]
        assert bin["critic"] == pytest.approx(np.mean([critic[i] for i in rows]), abs=0.05)
        errors.append(abs(bin["predicted"] - bin["critic"]))
    assert figures["bins"][-1]["predicted"] == pytest.approx(np.sort(clipped)[-6:].mean(), abs=1e-5)
    assert figures["ece"] == pytest.approx(np.mean(errors), abs=1e-5)
    # The control: a perfect model, and one that says the opposite.
    perfect = rewards(
        answers, np.array(critic)[:, None], ("overall",), margin=0.1, constitution=RULES
    )["labels"]["overall"]
    assert (perfect["accuracy"], perfect["spearman"], perfect["ece"]) == (1, 1, 0)
    opposite = rewards(
        answers, 1 - np.array(critic)[:, None], ("overall",), margin=0.1, constitution=RULES
    )["labels"]["overall"]
    assert opposite["accuracy"] == 0
    assert opposite["spearman"] == pytest.approx(-1, abs=1e-3)
    assert opposite["ece"] > 0.1


def test_the_margin_counts_pairs() -> None:
    answers = [answer(0, i, s, [s] * 4) for i, s in enumerate((0.5, 0.6, 0.8))]
    answers.append(answer(1, 0, 0.1, [0.1] * 4))  # to another prompt
    for margin, count in ((0.0, 3), (0.1, 3), (0.2, 2), (0.3, 1), (0.31, 0)):
        predicted = np.zeros((4, 1))
        found = rewards(answers, predicted, ("overall",), margin=margin, constitution=RULES)
        figures = found["labels"]["overall"]
        assert figures["pairs"] == count
        assert figures["accuracy"] == (0.5 if count else None)  # every prediction is a tie
        assert figures["spearman"] is None


def test_principles_have_figures_each_and_an_overall() -> None:
    answers = sampled()
    predicted = np.array([[a.score.principles[p] for p in PRINCIPLES] for a in answers])
    predicted[:, 1] = 1 - predicted[:, 1]
    found = rewards(answers, predicted, PRINCIPLES, margin=0.1, constitution=RULES)["labels"]
    assert [found[p]["spearman"] for p in PRINCIPLES] == [1, -1, 1, 1]
    expected = [
        RULES.overall(dict(zip(PRINCIPLES, row, strict=True))) for row in predicted.tolist()
    ]
    critic = [a.score.overall for a in answers]
    assert found["overall"]["pearson"] == pytest.approx(
        np.corrcoef(expected, critic)[0, 1], abs=1e-6
    )


def test_bradley_terry_is_calibrated_by_its_differences() -> None:
    # Two pairs: σ(2) and the critic agrees, σ(1) and it does not.
    answers = [answer(i // 2, i % 2, s, [s] * 4) for i, s in enumerate((0.9, 0.1, 0.2, 0.8))]
    predicted = np.array([[-5.0], [-7.0], [100.0], [99.0]])
    found = rewards(
        *(answers, predicted, ("overall",)),
        margin=0.1,
        constitution=RULES,
        objective="bradley-terry",
    )
    figures = found["labels"]["overall"]
    assert figures["accuracy"] == 0.5
    low, high = 1 / (1 + exp(-1)), 1 / (1 + exp(-2))
    assert figures["bins"] == [
        {"n": 1, "predicted": pytest.approx(low, abs=1e-6), "critic": 0.0},
        {"n": 1, "predicted": pytest.approx(high, abs=1e-6), "critic": 1.0},
    ]
    assert figures["ece"] == pytest.approx((low + 1 - high) / 2, abs=1e-6)


def test_nothing_to_say_is_none_and_is_printed() -> None:
    found = rewards([], np.zeros((0, 1)), ("overall",), margin=0.1, constitution=RULES)
    assert found["n"] == 0
    assert found["labels"]["overall"]["accuracy"] is None
    for summary in (
        found,
        rewards(sampled(), np.ones((60, 4)), PRINCIPLES, margin=0.1, constitution=RULES),
    ):
        with redirect_stdout(io.StringIO()) as printed:
            print_rewards(summary)
        assert "held-out answers" in printed.getvalue()

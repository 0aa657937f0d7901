"""The form of answers, by figures worked out by hand."""

from math import exp

import pytest

from cai_scale.evaluation.compare import Measure
from cai_scale.evaluation.drift import broken, drift, repetition
from cai_scale.evaluation.language import kept, language
from evaluated import evaluated


def test_repetition_is_the_share_of_grams_that_were_there() -> None:
    assert repetition(list("abcd")) == 0
    assert repetition(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(
        1 / 5
    )  # abcd bcda cdab dabc abcd
    assert repetition(["a"] * 9) == pytest.approx(5 / 6)
    assert repetition(list("abc")) is None


@pytest.mark.parametrize(
    ("text", "finished", "found"),
    [
        ('He said "yes" (twice).', True, False),
        ('He said "yes.', True, True),
        ('He said "yes.', False, False),  # it was cut off
        ("One (two [three) four].", True, True),
        ("One) two", True, True),
        ("One) two", False, True),  # what closes nothing was no matter of the cut
        ("1) Boil. 2) Cool. a) Serve. (b) Eat.", True, False),
        ("I can do that :) and 6'2\" is tall; don't worry", True, False),
        ("“Open and closed” «là» “", True, True),
        ("”closed first“", True, True),
        ("", True, False),
    ],
)
def test_quotes_and_brackets(text: str, finished: bool, found: bool) -> None:
    assert broken(text, finished=finished) is found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Bạn nên uống nước ấm và nghỉ ngơi.", "vi"),
        ("You can boil the rice in water for ten minutes.", "en"),
        ("Boil the bún in a pot of phở for two minutes, it is good.", "en"),
        ("Los gatos duermen mucho durante todo el día", None),
        ("Yes.", None),
        ("", None),
    ],
)
def test_languages(text: str, found: str | None) -> None:
    assert language(text) == found


def test_a_language_is_kept_or_not_or_nothing_is_known() -> None:
    assert kept("vi", "Bạn nên uống nước ấm và nghỉ ngơi.") is True
    assert kept("vi", "You can boil the rice in water.") is False
    assert kept("en", "Yes.") is None
    assert kept("de", "You can boil the rice in water.") is None


def test_drift_by_hand() -> None:
    rows = [
        evaluated("a", "x y x y", "v w x y z", before_measure=Measure(nll=1.0, kl=0.0, tokens=1)),
        evaluated("b", "x y", "", before_measure=Measure(nll=2.0, kl=0.4, tokens=3, relevance=0.5)),
    ]
    found = drift(rows)
    assert found["before"] == {
        "words": 3.0,
        "distinct": 0.75,
        "unfinished": 0,
        "empty": 0,
        "rep_4": 0.0,
        "distinct_2": 0.5,  # xy yx xy | xy: two of four
        "broken": 0.0,
        "language_kept": None,
        "relevance": 0.5,
        "perplexity": pytest.approx(exp(7 / 4), abs=1e-6),
        "kl": pytest.approx(0.3),
    }
    assert found["after"]["words"] == 2.5
    assert (found["after"]["empty"], found["after"]["distinct"]) == (1, 1.0)
    assert [found["after"][name] for name in ("relevance", "perplexity", "kl")] == [None] * 3


def test_no_answers_have_no_figures() -> None:
    assert set(drift([])["after"].values()) == {None, 0}

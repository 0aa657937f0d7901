"""What is left of a gain at equal length."""

from collections.abc import Sequence

import pytest

from answers import answered
from cai_scale import constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.evaluation.compare import compare
from cai_scale.evaluation.matched import cut, length_matched
from cai_scale.records import Score

DEFAULT = constitution.load()
CRITIC = LexiconCritic(DEFAULT)


class ByLength:
    """A critic of one's own: a tenth for each word, whatever the word."""

    name = "length"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        assert len(prompts) == len(responses)
        return [Score({}, len(r.split()) / 10) if r.strip() else None for r in responses]

    def why(self, prompt: str, response: str) -> str:
        return "empty"


@pytest.mark.parametrize(
    ("text", "words", "left"),
    [
        ("  a\n b\tc ", 2, "  a\n b"),
        ("a b c", 3, "a b c"),
        ("a b c\n", 3, "a b c\n"),
        ("a b", 60, "a b"),
        ("a b", 0, ""),
        ("", 3, ""),
        ("xin\u00a0chào bạn", 1, "xin"),
    ],
)
def test_cutting(text: str, words: int, left: str) -> None:
    assert cut(text, words) == left


def test_a_gain_that_is_length_alone_is_gone() -> None:
    rows = [answered("It works.", "It works. Perhaps useful, thanks."), answered("a b", "a b c d")]
    assert compare(rows, DEFAULT)["delta"]["overall"] > 0.02  # 0.23 / 4 / 2
    assert length_matched(rows, CRITIC)["delta"] == 0
    assert length_matched(rows, ByLength())["delta"] == 0


def test_by_hand() -> None:
    rows = [
        answered("a b c d useful", "useful tip"),  # cut to 2 words: 0.7 to 0.75
        answered("Thanks a lot", "b c d Thanks"),  # cut to 3: 0.72 to 0.7
        answered("a b", ""),  # left out
    ]
    found = length_matched(rows, CRITIC)
    assert (found["n"], found["before"], found["after"]) == (2, 0.71, 0.725)
    assert found["delta"] == pytest.approx(0.015)
    assert found["ci95"] == pytest.approx([-0.02, 0.05])


def test_nothing_is_cut_of_answers_of_one_length() -> None:
    rows = [answered("a b useful", "tip and thanks")]
    assert length_matched(rows, CRITIC)["delta"] == compare(rows, DEFAULT)["delta"]["overall"]

"""A critic is asked about an answer once, and its scores are kept."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cai_scale.critics.remembered import Remembered
from cai_scale.records import Score


class Counting:
    """Scores by length, and counts what it is asked about; it has no score for "?"."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        self.asked += zip(prompts, responses, strict=True)
        return [None if r == "?" else Score({"p": len(r) / 10}, len(r) / 10) for r in responses]

    def why(self, prompt: str, response: str) -> str:
        return f"no score for {response}"


def test_it_asks_once_about_each_exchange(tmp_path: Path) -> None:
    critic, file = Counting(), tmp_path / "evaluation" / "scores.jsonl"
    remembered = Remembered(critic, file)
    prompts, responses = ["a", "b", "a", "a"], ["xx", "xx", "xx", "?"]
    found = remembered.score(prompts, responses)
    assert [score and score.overall for score in found] == [0.2, 0.2, 0.2, None]
    assert critic.asked == [("a", "xx"), ("b", "xx"), ("a", "?")]
    again = Remembered(critic, file)  # a second start
    assert again.score(prompts, responses) == found
    assert len(critic.asked) == 3
    assert again.score(["c", "a"], ["xxx", "xx"]) == [Score({"p": 0.3}, 0.3), found[0]]
    assert critic.asked[3:] == [("c", "xxx")]
    assert (again.name, again.why("a", "?")) == ("counting", "no score for ?")


def test_what_is_asked_fails_without_losing_what_is_kept(tmp_path: Path) -> None:
    critic, file = Counting(), tmp_path / "scores.jsonl"
    Remembered(critic, file).score(["a"], ["xx"])
    kept = file.read_text()

    class Broken(Counting):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
            raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"):
        Remembered(Broken(), file).score(["a", "b"], ["xx", "xx"])
    assert file.read_text() == kept

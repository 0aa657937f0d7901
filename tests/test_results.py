"""What follows from held-out answers, whatever has scored them."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cai_scale import constitution, prompts, results
from cai_scale.config import Config
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.critics.remembered import Remembered
from cai_scale.evaluation.compare import Measure
from cai_scale.evaluation.table import print_summary
from cai_scale.records import Prompt, Response, Score
from cai_scale.runs import Run

RULES = constitution.load()
PARTS = {"length_matched", "supported", "halves", "words", "lengths", "drift", "safety", "slices"}


class Brevity:
    """A critic of a user's own: the shorter the better, and no word of principles."""

    name = "brevity"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        return [Score({}, 1 / len(text.split())) if text.strip() else None for text in responses]

    def why(self, prompt: str, response: str) -> str:
        return "it says nothing"


def answers(asked: Sequence[Prompt], text: str) -> list[Response]:
    return [
        Response(
            prompt_id=prompt.id,
            sample=0,
            round=0,
            temperature=0.7,
            text=text,
            tokens=4,
            finished=True,
        )
        for prompt in asked
    ]


def test_a_critic_without_principles_goes_through_all_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = prompts.load(prompts.HELDOUT)[:12]
    before, after = answers(asked, "one two three four"), answers(asked, "one two")
    after[0] = answers(asked[:1], "")[0]
    measure = {"before": [Measure(kl=0.0)] * 12, "after": [Measure(kl=0.5, tokens=2)] * 12}
    answered = results.answered(Brevity(), asked, before, after, measure)
    assert answered[3].after_measure.kl == 0.5
    found = results.figures(RULES, Brevity(), "lexicon", answered)
    assert found.keys() >= PARTS
    assert found["delta"]["overall"] == pytest.approx(0.25)
    assert found["delta"]["principles"] == {p.id: None for p in RULES.principles}
    assert (found["win"], found["loss"]) == (11, 1)
    assert found["length_matched"]["delta"] == 0.0  # at equal length nothing is left of it
    assert found["drift"]["after"]["kl"] == pytest.approx(0.5)
    print_summary({"method": "dpo", "model": "m", **found}, RULES)
    assert "Overall" in capsys.readouterr().out


def test_the_lexicon_is_asked_anew_and_other_critics_are_remembered(tmp_path: Path) -> None:
    run = Run(tmp_path)
    lexicon = results.evaluator(Config(), run, RULES, Brevity())
    assert isinstance(lexicon, LexiconCritic)
    other = results.evaluator(Config(evaluator="reward:x"), run, RULES, Brevity())
    assert isinstance(other, Remembered)
    assert other.score(["p"], ["a b"]) == [Score({}, 0.5)]
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["scores.jsonl"]

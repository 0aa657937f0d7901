from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cai_scale import constitution
from cai_scale.critics.complaint import RevisionRules, complaint
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.ranks import Ranks
from cai_scale.records import Completion, Prompt, Response
from cai_scale.rollout.revise import revise
from cai_scale.rollout.sampler import Request
from cai_scale.runs import Round

CONSTITUTION = constitution.load()
CRITIC = LexiconCritic(CONSTITUTION)
RULES = RevisionRules()
GOOD = "The moon pulls the sea, and the water rises twice a day along most coasts."


def ask(text: str, language: str = "en") -> str | None:
    return complaint(text, CRITIC.score([""], [text])[0], CONSTITUTION, RULES, language)


def test_a_good_answer_stays() -> None:
    assert ask(GOOD) is None


@pytest.mark.parametrize(("words", "asked"), [(9, True), (10, False)])
def test_short_answers(words: int, asked: bool) -> None:
    text = " ".join(f"word{i}" for i in range(words))
    assert (ask(text) == CONSTITUTION.requests["too_short"]["en"]) is asked


@pytest.mark.parametrize(("distinct", "asked"), [(9, True), (10, False)])
def test_repetitive_answers(distinct: int, asked: bool) -> None:
    text = " ".join(f"Word{i % distinct}" for i in range(20))
    assert (ask(text) == CONSTITUTION.requests["repetitive"]["en"]) is asked


def test_a_principle_under_its_floor_is_named_in_the_prompt_language() -> None:
    asked = ask(GOOD + " A bomb and a weapon.", "vi")  # harmless .7 - .3 = .4
    assert asked is not None
    assert CONSTITUTION.principles[0].statement["vi"] in asked
    assert ask(GOOD + " A bomb.") is None  # .55


def test_empty_answers_are_short() -> None:
    assert ask("") == CONSTITUTION.requests["too_short"]["en"]


class Reviser:
    """Gives the same answer to everything, and keeps the requests."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []  # type: ignore[var-annotated]

    def prompt_tokens(self, request: Request) -> int:
        return 1

    def sample(self, batches: Sequence[Sequence[Request]]) -> Iterator[tuple[Request, Completion]]:
        for batch in batches:
            self.asked.extend(batch)
            text = self.texts[0] if len(self.texts) == 1 else self.texts.pop(0)
            yield from ((request, Completion(text, 9, True)) for request in batch)


def run(tmp_path: Path, first: str, reviser: Reviser, prefer: Any = None, **rules: Any) -> Response:
    prompt = Prompt(id="p", messages=({"role": "user", "content": "Why tides?"},))
    response = Response(
        prompt_id="p", sample=2, round=1, temperature=0.7, text=first, tokens=3, finished=True
    )
    (best,), (given,) = revise(
        reviser,
        lambda responses, _: CRITIC.score([""] * len(responses), [r.text for r in responses]),
        prefer,
        CONSTITUTION,
        [prompt],
        [response],
        Round(tmp_path),
        rules=RevisionRules(**rules),
        seed=0,
        batch_size=8,
        ranks=Ranks(),
    )
    assert [given] == CRITIC.score([""], [best.text])
    return best


def test_a_better_revision_takes_the_place(tmp_path: Path) -> None:
    reviser = Reviser(GOOD + " A useful tip.")
    best = run(tmp_path, "The moon.", reviser)
    assert (best.text, best.sample, best.revised) == (GOOD + " A useful tip.", 2, True)
    roles = [m["role"] for m in reviser.asked[0].messages]
    assert roles == ["user", "assistant", "user"]
    assert reviser.asked[0].sample != 2  # its own random numbers


def test_a_worse_or_equal_revision_does_not(tmp_path: Path) -> None:
    best = run(tmp_path, "The useful moon.", Reviser(GOOD))
    assert (best.text, best.revised) == ("The useful moon.", False)


def test_the_best_of_n_tries_is_kept(tmp_path: Path) -> None:
    reviser = Reviser("A tip.", "Tips.", "A useful tip.")
    best = run(tmp_path, "Moon.", reviser, tries=3)
    assert best.text == "A useful tip."
    assert len(reviser.asked) == 3
    assert len(Round(tmp_path).all_revisions()) == 3


def test_no_tries_ask_nothing(tmp_path: Path) -> None:
    reviser = Reviser(GOOD)
    assert run(tmp_path, "Moon.", reviser, tries=0).text == "Moon."
    assert reviser.asked == []


def test_an_empty_answer_is_asked_again_in_one_message(tmp_path: Path) -> None:
    reviser = Reviser(GOOD)
    assert run(tmp_path, "", reviser).text == GOOD
    (message,) = reviser.asked[0].messages
    assert message["content"].startswith("Why tides?")


def test_a_critique_comes_before_its_revision(tmp_path: Path) -> None:
    reviser = Reviser("It says too little.", GOOD + " A tip.", "Nothing is amiss.", "A useful tip.")
    best = run(tmp_path, GOOD, reviser, tries=2, critique=True)
    assert best.text == "A useful tip."
    critique, revision, again, _ = reviser.asked
    principles = [
        next(
            p.id for p in CONSTITUTION.principles if p.statement["en"] in ask.messages[2]["content"]
        )
        for ask in (critique, again)
    ]
    assert len(set(principles)) == 2  # another one at each try
    asks = [m["content"] for m in revision.messages]
    assert asks[:4] == ["Why tides?", GOOD, critique.messages[2]["content"], "It says too little."]
    assert asks[2].startswith("Point out where the answer above falls short")
    assert asks[4].startswith("Please answer the question again so that")
    assert again.messages[1]["content"] == GOOD + " A tip."
    assert len({ask.sample for ask in reviser.asked} | {2}) == 5  # random numbers of their own
    files = Round(tmp_path)
    assert [files.critiques(file).name for file in files.all_revisions()] == [
        "critiques.jsonl",
        "critiques-2.jsonl",
    ]
    assert all(files.critiques(file).is_file() for file in files.all_revisions())


def test_a_comparer_says_whether_a_revision_is_better(tmp_path: Path) -> None:
    """It overrules the scores, in both directions."""
    asked = []

    def prefer(new: Sequence[Response], old: Sequence[Response], _: Path) -> list[bool]:
        asked.extend((n.text, o.text) for n, o in zip(new, old, strict=True))
        return [n.text.startswith("Worse") for n in new]

    assert run(tmp_path / "a", "Useful.", Reviser("Worse."), prefer).text == "Worse."
    assert run(tmp_path / "b", "Moon.", Reviser("A useful tip."), prefer).text == "Moon."
    assert asked == [("Worse.", "Useful."), ("A useful tip.", "Moon.")]

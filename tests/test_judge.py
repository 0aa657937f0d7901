"""A judge: what it is asked, what its verdicts become, what is kept and what it may cost."""

import random
from collections.abc import Callable, Iterable, Sequence
from math import log
from pathlib import Path

import pytest

from cai_scale import constitution as constitutions
from cai_scale.config import Config
from cai_scale.constitution import Constitution
from cai_scale.critics import load_critic
from cai_scale.critics.judge import Judge, Settings
from cai_scale.critics.judge.budget import Budget
from cai_scale.critics.judge.journal import Journal, Spent, Subject, Verdict
from cai_scale.critics.judge.questions import Question
from cai_scale.critics.judge.verdict import choices, letter, probability, ratings
from cai_scale.critics.weighted import WeightedCritic
from cai_scale.errors import BudgetError, ConfigError, DataError
from cai_scale.records import Preference, Score

RULES = constitutions.load()
IDS = [principle.id for principle in RULES.principles]
COST = Spent(1, 100, 10)


def quality(text: str) -> float:
    return float(text.rsplit(" ", 1)[1])


def answers(question: Question) -> list[str]:
    """The fenced answers, in the order in which they are shown."""
    content = question.messages[-1]["content"]
    return [part.split("\n</answer")[0] for part in content.split("<answer")[1:]]


class Fake:
    """A model whose verdicts a function makes of the qualities that it is shown."""

    def __init__(self, judge: Callable[..., float | None], name: str = "fake") -> None:
        self.judge, self.name = judge, name
        self.asked: list[Question] = []

    def ask(
        self,
        questions: Iterable[tuple[Subject, Question]],
        settle: Callable[[Subject, Verdict], None],
        budget: Budget,
    ) -> None:
        for subject, question in questions:
            budget.check()
            self.asked.append(question)
            budget.add(COST)
            value = self.judge(*map(quality, answers(question)))
            values = None if value is None else dict.fromkeys(question.ids, value)
            settle(subject, Verdict(values, "" if values else "no valid reply", COST))


def oracle(first: float, second: float) -> float:
    return float((first > second) - (first < second))


def make(
    judge: Callable[..., float | None], *, journal: Path | None = None, **settings: object
) -> tuple[Judge, Fake]:
    model = Fake(judge)
    given = Settings(**({"mode": "pairwise"} | settings))  # type: ignore[arg-type]
    return Judge(RULES, given, model, Journal(journal), shown=False), model


def planted(count: int) -> tuple[list[str], list[str], list[str]]:
    draw = random.Random(0)
    qualities = [draw.sample(range(100), 2) for _ in range(count)]
    return (
        [f"prompt {i}" for i in range(count)],
        [f"one {first}" for first, _ in qualities],
        [f"two {second}" for _, second in qualities],
    )


@pytest.mark.parametrize("mode", ["pairwise", "logprob", "letter"])
@pytest.mark.parametrize("principles", ["all", "one"])
def test_planted_labels_come_back_in_every_order_and_batch(mode: str, principles: str) -> None:
    """A logprob oracle gives the better answer 0.9."""

    def found(first: float, second: float) -> float:
        better = oracle(first, second)
        return 0.5 + 0.4 * better if mode == "logprob" else better

    prompts, firsts, seconds = planted(200)
    judge, _ = make(found, mode=mode, principles=principles)
    right = [quality(one) > quality(other) for one, other in zip(firsts, seconds, strict=True)]
    given = judge.compare(prompts, firsts, seconds)
    assert [p.lean > 0 for p in given if p.lean is not None] == right
    assert {abs(p.lean or 0) for p in given} == ({0.8} if mode == "logprob" else {1.0})
    swapped = make(found, mode=mode, principles=principles)[0].compare(prompts, seconds, firsts)
    assert [-(p.lean or 0) for p in swapped] == [p.lean for p in given]
    order = random.Random(1).sample(range(200), 200)
    other, _ = make(found, mode=mode, principles=principles)
    mixed = [other.compare([prompts[i]], [firsts[i]], [seconds[i]])[0] for i in order]
    assert mixed == [given[i] for i in order]


@pytest.mark.parametrize("letter", [1.0, -1.0])
def test_a_judge_that_looks_at_the_place_alone_labels_nothing(letter: float) -> None:
    prompts, firsts, seconds = planted(20)
    judge, _ = make(lambda first, second: letter)
    for found in judge.compare(prompts, firsts, seconds):
        assert (found.lean, found.why) == (0.0, "the orders disagree")


def test_preferences_by_hand() -> None:
    """P(A) .7 in one order and .4 in the other: p = (.7 + .6) / 2 = .65, 2 p - 1 = .3."""

    def found(first: float, second: float) -> float:
        return 0.7 if first == 1 else 0.4

    judge, model = make(found, mode="logprob", principles="one")
    [preference] = judge.compare(["p"], ["a 1"], ["b 2"])
    assert preference.lean == pytest.approx(0.3)
    assert len(model.asked) == 2
    judge, _ = make(found, mode="logprob", principles="one", thinking=True)
    [preference] = judge.compare(["p"], ["a 1"], ["b 2"])
    assert preference.lean == pytest.approx(0.6 - 0.4)  # clamped
    # One order says a tie, the other the first: a tie, no half preference.
    judge, _ = make(lambda first, second: 1.0 if first == 1 else 0.0)
    assert judge.compare(["p"], ["a 1"], ["b 2"]) == [
        Preference(0.0, "tie", dict.fromkeys(IDS, 0.0))
    ]


def test_what_cannot_be_compared() -> None:
    judge, model = make(lambda first, second: None)
    found = judge.compare(["p"] * 3, ["a 1", " ", "same 1"], ["b 2", "b 2", "same 1"])
    assert [(p.lean, p.why) for p in found] == [
        (None, "no valid reply"), (None, "empty answer"), (0.0, "the same answer"),
    ]  # fmt: skip
    assert len(model.asked) == 2  # both orders of the first alone


def test_one_principle_is_drawn_for_two_answers() -> None:
    judge, model = make(oracle, principles="one")
    prompts, firsts, seconds = planted(200)
    judge.compare(prompts, firsts, seconds)
    ids = [question.ids for question in model.asked]
    assert ids[::2] == ids[1::2]
    counts = [ids[::2].count((name,)) for name in IDS]
    assert sum(counts) == 200 and min(counts) > 30  # 50 each on the average


def test_scores_are_the_weighted_mean() -> None:
    judge, model = make(lambda value: value / 100, mode="absolute")
    prompts, texts = ["p"] * 3, ["a 50", "b 75", " "]
    found = judge.score(prompts, texts)
    assert found == [
        Score(dict.fromkeys(IDS, 0.5), 0.5),
        Score(dict.fromkeys(IDS, 0.75), 0.75),
        None,
    ]
    assert judge.why("p", " ") == "empty answer"
    assert len(model.asked) == 2
    judge, _ = make(lambda value: None, mode="absolute")
    assert judge.score(["p"], ["a 1"]) == [None]
    assert judge.why("p", "a 1") == "no valid reply"


def test_a_verdict_is_asked_for_once(tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite"
    prompts, firsts, seconds = planted(10)
    judge, model = make(oracle, journal=file)
    first = judge.compare(prompts * 2, firsts * 2, seconds * 2)
    assert len(model.asked) == 20 == judge.spent["calls"]
    assert judge.spent["prompt_tokens"] == 2000
    again, model = make(oracle, journal=file)
    assert again.compare(prompts, firsts, seconds) == first[:10]
    assert model.asked == [] and again.spent == judge.spent
    assert len(again.journal) == 20


def test_what_a_verdict_depends_on(tmp_path: Path) -> None:
    """Another constitution, judge, template, prompt, answer, or order is another question."""
    journal = Journal(tmp_path / "labels.sqlite")
    other = constitutions.from_dict({**RULES.data, "name": "other"})

    def asked(rules: Constitution = RULES, name: str = "fake", prompt: str = "p",
              texts: Sequence[str] = ("a 1", "b 2"), **settings: object) -> int:  # fmt: skip
        model = Fake(oracle, name)
        given = Settings(**({"mode": "pairwise"} | settings))  # type: ignore[arg-type]
        Judge(rules, given, model, journal, shown=False).compare([prompt], *[[t] for t in texts])
        return len(model.asked)

    assert asked() == 2
    assert asked() == 0 == asked(texts=("b 2", "a 1"))
    for change in (
        {"rules": other}, {"name": "another"}, {"prompt": "q"}, {"texts": ("a 1", "b 3")},
        {"thinking": True},
    ):  # fmt: skip
        assert asked(**change) == 2  # type: ignore[arg-type]
        assert asked(**change) == 0  # type: ignore[arg-type]


def test_a_budget_ends_the_asking_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite"
    prompts, firsts, seconds = planted(10)
    judge, model = make(oracle, journal=file, max_tokens=1000)
    with pytest.raises(BudgetError, match="1,100 tokens of --judge_max_tokens 1000; raise it"):
        judge.compare(prompts, firsts, seconds)
    assert len(model.asked) == 10  # of 110 tokens each: the tenth reached it
    judge, model = make(oracle, journal=file, max_cost=1.0, prices=(2.0, 20.0))
    judge.compare(prompts, firsts, seconds)
    assert len(model.asked) == 10
    assert judge.spent["money"] == pytest.approx(20 * (100 * 2e-6 + 10 * 20e-6))


def test_a_file_that_is_no_journal(tmp_path: Path) -> None:
    file = tmp_path / "labels.sqlite"
    file.write_text("something else, and longer than a header " * 10)
    with pytest.raises(DataError, match="cannot be used as the journal"):
        Journal(file).spent("j")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ('{"a": 0.5}', "other keys"),
        ('{"a": 0.5, "b": 0.5, "c": 1}', "other keys"),
        ('{"a": 0.5, "b": 1.5}', "no number from 0 to 1"),
        ('{"a": 0.5, "b": true}', "no number from 0 to 1"),
        ('{"a": 0.5, "b": "0.5"}', "no number from 0 to 1"),
        ('{"a": 0.5, "b": NaN}', "not JSON"),
        ('{"a": 0.5, "b": 1e999}', "no number from 0 to 1"),
        ('{"a": 0.5, "a": 0.6, "b": 1}', "not JSON"),
        ('Sure: {"a": 0.5, "b": 0.5}', "not JSON"),
        ('{"a": 0.5, "b": 0.5} {"a": 1, "b": 1}', "not JSON"),
        ("[0.5, 0.5]", "no JSON object"),
        ("", "not JSON"),
        ("[" * 5000, "not JSON"),
        (" " * 20_001, "20001 characters"),
    ],
)
def test_a_reply_that_is_no_verdict(reply: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        ratings(reply, ["a", "b"])


def test_replies_that_are_verdicts() -> None:
    for reply in (
        '{"b": 1, "a": 0.25}',
        '\n```json\n{"a": 0.25, "b": 1}\n```\n',
        '{"reasoning": "{\\"a\\": 0}", "a": 0.25, "b": 1.0}',
        '<think>{"a": 0, "b": 0}</think>\n{"a": 0.25, "b": 1}',
    ):
        assert ratings(reply, ["a", "b"]) == {"a": 0.25, "b": 1.0}
    assert choices('{"a": "A", "b": "B", "c": "tie"}', ["a", "b", "c"]) == {"a": 1, "b": -1, "c": 0}
    for wrong in ('{"a": "C"}', '{"a": "a"}', '{"a": 1}', '{"a": ["A"]}'):
        with pytest.raises(DataError, match="neither of A, B and tie"):
            choices(wrong, ["a"])


def test_a_letter_is_a_or_b_and_nothing_else() -> None:
    assert [letter(text) for text in ("A", " b.", "**A**\n", "(B)")] == [1, -1, 1, -1]
    for wrong in ("", "C", "A or B", "An", "tie", "AB"):
        with pytest.raises(DataError, match="neither A nor B"):
            letter(wrong)


def test_a_probability_is_normalised_over_the_options() -> None:
    tokens = {"A": log(0.2), " a": log(0.1), "B": log(0.15), "\n": log(0.5), "Answer": log(0.05)}
    assert probability(list(tokens.items())) == pytest.approx(0.3 / 0.45)
    assert probability([("A", 0.0)]) == 1.0
    # Two tokens may read alike.
    alike = [("A", log(0.2)), ("A", log(0.2)), ("B", log(0.1))]
    assert probability(alike) == pytest.approx(0.8)
    for none in ([], [("Well", -0.1), ("A", log(0.02))]):
        with pytest.raises(DataError, match="begins with neither"):
            probability(none)
    for wrong in (float("nan"), 7.0, float("inf")):
        with pytest.raises(DataError, match="log-probabilities are none"):
            probability([("A", wrong), ("B", -0.1)])


def test_an_ensemble_keeps_votes_and_abstains_where_they_are_apart() -> None:
    judge, _ = make(lambda value: value / 100, mode="absolute")
    critic = load_critic("lexicon*0.25+judge*0.75", RULES, judge=judge, agreement=0.8)
    near, far, empty = critic.score(["p"] * 3, ["word 60", "word 10", ""])
    assert near == Score(dict.fromkeys(IDS, 0.625), 0.625, {"lexicon": 0.7, "judge": 0.6})
    assert far is None and empty is None
    assert critic.why("p", "word 10") == "the critics disagree"
    assert critic.why("p", "") == "lexicon: empty answer"
    assert isinstance(critic.critic, WeightedCritic)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"judge_url": "http://h/v1"}, "--judge_url or --judge_model with --critic lexicon"),
        ({"judge_model": "m"}, "--judge_url or --judge_model with --critic lexicon"),
        ({"critic": "judge", "judge_principles": "one"}, "draws a principle for two answers"),
        ({"critic": "judge", "first_pass": True}, "--first_pass chooses"),
        ({"min_agreement": 0.5}, "one critic agrees with itself"),
        ({"critic": "judge+lexicon", "min_agreement": 7.0}, "expected a number from 0 to 1"),
        ({"method": "sft", "pairs": "revisions"}, "does not train on pairs"),
        ({"method": "grpo", "revision": "critique"}, "nothing is revised here"),
        ({"pairs": "revisions", "revisions": 0}, "there would be none"),
        ({"critic": "judge", "judge_mode": "pairwise", "method": "sft"}, "labels pairs"),
        ({"critic": "judge+lexicon", "judge_mode": "logprob"}, "labels pairs"),
        ({"critic": "judge", "judge_prices": (1.0,)}, "expected two numbers"),
        ({"critic": "judge", "judge_max_cost": 1.0}, "needs --judge_prices"),
        ({"critic": "judge", "judge_mode": "coin"}, "unknown judge_mode"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(**settings)  # type: ignore[arg-type]


def test_ranks_share_a_budget() -> None:
    whole = Settings(max_tokens=1000, max_cost=2.0, prices=(1.0, 2.0))
    assert (whole.shared(4).max_tokens, whole.shared(4).max_cost) == (250, 0.5)
    assert Settings().shared(4) == Settings()


def test_the_settings_of_a_judge_by_name() -> None:
    config = Config(critic="judge", judge_mode="pairwise", judge_deadline=7.0)
    assert config.labels_pairs and config.judge == Settings(mode="pairwise", deadline=7.0)
    assert not Config(judge_mode="pairwise").labels_pairs

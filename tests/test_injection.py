"""Judged text cannot steer a judge that obeys everything outside the fences."""

import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_scale import constitution
from cai_scale.constitution import Constitution
from cai_scale.critics.judge import questions, verdict
from cai_scale.critics.judge.questions import Question
from cai_scale.errors import DataError
from mock_judge import MockJudge, outside


@dataclass(frozen=True)
class Injection:
    id: str
    language: str
    kind: str
    text: str


INJECTIONS = [
    Injection(**json.loads(line))
    for line in Path(__file__).with_name("injections.jsonl").read_bytes().splitlines()
]
ENGLISH = constitution.load()
VIETNAMESE = replace(ENGLISH, languages=("vi", "en"))

PROMPT = "How long does cooked rice keep?"
# The marks are the planted verdicts: better, worse and equal, so that no uniform verdict fits.
HONEST = "Two days in a cold place. harmless=0.37 helpful=0.81 honest=0.55 respectful=0.62"
OTHER = "A week on the table. harmless=0.72 helpful=0.44 honest=0.55 respectful=0.20"
UNMARKED = "Two days."
RATED = {"harmless": 0.37, "helpful": 0.81, "honest": 0.55, "respectful": 0.62}
COMPARED = {"harmless": -1.0, "helpful": 1.0, "honest": 0.0, "respectful": 1.0}

PLACES = {
    "appended": lambda text: f"{HONEST}\n{text}",
    "prepended": lambda text: f"{text}\n{HONEST}",
    "alone": lambda text: text,
}
CLEAN = {"appended": HONEST, "prepended": HONEST, "alone": UNMARKED}
ROLES = ("rated", "first", "second")


def ask(
    role: str, text: str, prompt: str = PROMPT, other: str = OTHER, *, said: Constitution = ENGLISH
) -> Question:
    """A question in which `text` is the answer that is rated, or one of two."""
    if role == "rated":
        return questions.rate(said, prompt, text)
    first, second = (text, other) if role == "first" else (other, text)
    return questions.compare(said, said.principles, prompt, first, second)


def framed(role: str, text: str, *, tags: bool) -> Question:
    """The same question with raw text in the same frame, with its tags or without them."""
    frame = ask(role, "@text@", "@prompt@", "@other@")
    content = frame.messages[-1]["content"]
    if not tags:
        content = re.sub(r"</?(prompt|answer\w*)>\n", "", content)
    for place, raw in (("@prompt@", PROMPT), ("@other@", OTHER), ("@text@", text)):
        content = content.replace(place, raw)
    return replace(frame, messages=(frame.messages[0], {"role": "user", "content": content}))


def judged(question: Question, judge: MockJudge) -> dict[str, float] | None:
    """The verdict; None where the reply is no valid one."""
    try:
        return verdict.read(question, judge.reply(question.messages))
    except DataError:
        return None


def mock(role: str, **asked: Constitution) -> MockJudge:
    return MockJudge(frozenset(outside(ask(role, "", "", "", **asked).messages)))


def fooled(
    build: Callable[[str, str], Question], place: str, role: str, judge: MockJudge
) -> Iterator[Injection]:
    """The injections that change the verdict of the clean version."""
    clean = judged(build(role, CLEAN[place]), judge)
    assert clean is not None
    for injection in INJECTIONS:
        if judged(build(role, PLACES[place](injection.text)), judge) != clean:
            yield injection


def shares(build: Callable[[str, str], Question]) -> tuple[float, dict[str, float]]:
    """How many of the injected answers fool the judge, of all and of each kind."""
    wrong: Counter[str] = Counter()
    for place in ("appended", "prepended"):
        for role in ROLES:
            wrong.update(one.kind for one in fooled(build, place, role, mock(role)))
    tries = 2 * len(ROLES)
    kinds = Counter(one.kind for one in INJECTIONS)
    of_kind = {kind: wrong[kind] / (tries * number) for kind, number in kinds.items()}
    return wrong.total() / (tries * len(INJECTIONS)), of_kind


def test_the_suite_is_large_and_in_both_languages() -> None:
    assert len(INJECTIONS) >= 72
    assert len({one.id for one in INJECTIONS}) == len(INJECTIONS)
    assert len({one.text for one in INJECTIONS}) == len(INJECTIONS)
    languages = Counter(one.language for one in INJECTIONS)
    assert languages.keys() == {"en", "vi", "mixed", "none"}
    assert 0.8 < languages["vi"] / languages["en"] < 1.25
    for kind in ("fake_verdict", "role_marker", "closing_fence", "request", "pressure"):
        assert {one.language for one in INJECTIONS if one.kind == kind} == {"en", "vi"}, kind
    # A mark would be a quality of the answer, not an injection.
    assert not any(re.search(r"=\d\.\d", one.text) for one in INJECTIONS)


@pytest.mark.parametrize("said", [ENGLISH, VIETNAMESE], ids=["en", "vi"])
def test_the_mock_judges_clean_answers_as_planted(said: Constitution) -> None:
    expected = {"rated": RATED, "first": COMPARED, "second": {k: -v for k, v in COMPARED.items()}}
    for role in ROLES:
        judge = mock(role, said=said)
        assert judged(ask(role, HONEST, said=said), judge) == expected[role]
        assert judged(framed(role, HONEST, tags=True), mock(role)) == expected[role]
        assert judged(framed(role, HONEST, tags=False), mock(role)) == expected[role]


@pytest.mark.parametrize("said", [ENGLISH, VIETNAMESE], ids=["en", "vi"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("place", PLACES)
def test_no_injection_changes_the_verdict(place: str, role: str, said: Constitution) -> None:
    def build(role: str, text: str) -> Question:
        return ask(role, text, said=said)

    assert list(fooled(build, place, role, mock(role, said=said))) == []


@pytest.mark.parametrize("role", ROLES)
def test_no_injection_in_the_prompt_changes_the_verdict(role: str) -> None:
    judge = mock(role)
    clean = judged(ask(role, HONEST), judge)
    for injection in INJECTIONS:
        question = ask(role, HONEST, f"{PROMPT}\n{injection.text}")
        assert judged(question, judge) == clean, injection


def test_reasoning_that_repeats_an_injection_changes_nothing() -> None:
    clean = questions.rate(ENGLISH, "", "", thinking=True)
    judge = MockJudge(frozenset(outside(clean.messages)))
    for injection in INJECTIONS:
        text = f"{HONEST}\n{injection.text}"
        question = questions.rate(ENGLISH, PROMPT, text, thinking=True)
        reply = judge.reply(question.messages)
        assert HONEST in json.loads(reply)["reasoning"]
        assert verdict.read(question, reply) == RATED, injection


@pytest.mark.parametrize("part", ["_UNSAFE", "_LABEL", "_UNSEEN"])
def test_each_part_of_the_escaping_is_needed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, part, re.compile("(?!)()()()"))  # matches nothing
    assert list(fooled(ask, "appended", "rated", mock("rated")))


def test_without_escaping_tags_and_markers_fool_the_judge() -> None:
    """The control: the same suite, frame and judge, and raw text between the tags."""
    _, of_kind = shares(lambda role, text: framed(role, text, tags=True))
    assert of_kind["closing_fence"] > 0.65  # the others are half-open, or entities
    assert of_kind["role_marker"] == 1
    # The tags alone stop what does not reach for them.
    assert of_kind["request"] == of_kind["pressure"] == of_kind["fake_verdict"] == 0


def test_without_fences_nearly_everything_fools_the_judge() -> None:
    everything, of_kind = shares(lambda role, text: framed(role, text, tags=False))
    assert everything > 0.75
    of_kind.pop("degenerate")  # a lone ":" orders nothing
    assert min(of_kind.values()) > 0.7


PIECES = [
    *("<", ">", "&", "[", "]", "/", "|", ":", "#", "\n", "&lt;", "&#91;", "＜", "［", "："),
    *("</answer>", "<answer_a>", "<|im_start|>", "[INST]", "[|user|]", "USER:", "### X:", "User"),
    *("\u200b", "\u202e", "\x00", "\r", "\xad", "\u2028", "\ud800", "\U000e0041", "ạ", "🌧️"),
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=9))).map("".join)


SHAPED = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"  # Arabic, Syriac


def seen(letter: str) -> bool:
    """All but controls, surrogates, separators of lines, and formats that have no shape."""
    if letter > "\uffff":
        return not 0xE0000 <= ord(letter) <= 0xE0FFF
    unseen = unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return not unseen or letter in SHAPED or letter in "\n\t"


@given(TEXTS, TEXTS, TEXTS)
def test_whatever_is_judged_stays_between_its_tags(prompt: str, first: str, second: str) -> None:
    principles = ENGLISH.principles
    both = {"prompt": prompt, "answer_a": first, "answer_b": second}
    for question, texts in (
        (questions.rate(ENGLISH, prompt, first), {"prompt": prompt, "answer": first}),
        (questions.compare(ENGLISH, principles, prompt, first, second), both),
        (questions.choose(ENGLISH, principles[0], prompt, first, second), both),
    ):
        content = question.messages[-1]["content"]
        tags = [f"<{slash}{tag}>" for tag in texts for slash in ("", "/")]
        assert re.findall(r"<[^>]*>", content) == tags
        assert content.count("<") == content.count(">") == len(tags)
        content.encode()  # no surrogate is left
        rest = content
        for tag, text in texts.items():
            before, rest = rest.split(f"<{tag}>\n", 1)
            assert before.strip() == ""
            inside, rest = rest.split(f"\n</{tag}>\n", 1)
            assert unescape(inside) == "".join(filter(seen, text))


@pytest.mark.parametrize(
    "text",
    ["array[0] and [a link](x)", "[1, 2]", "At 10:30: tea.", "# Rice: a guide", "The user: I"],
)
def test_ordinary_text_stands_as_it_is(text: str) -> None:
    assert questions.fenced(text) == text


@pytest.mark.parametrize("piece", ["[", "[A", "#", "# ", "]~", " ", "\n", "-", "SYSTEM "])
def test_long_texts_are_fenced_in_time(piece: str) -> None:
    begin = time.perf_counter()
    questions.fenced(piece * 100_000)
    assert time.perf_counter() - begin < 2

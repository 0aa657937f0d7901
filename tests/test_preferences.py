import pytest

from cai_scale.errors import DataError
from cai_scale.preferences.audit import audit, require_enough
from cai_scale.preferences.pairs import build_pairs
from cai_scale.records import Pair, Prompt, Response, Score


def prompt(name: str, language: str = "en") -> Prompt:
    return Prompt(id=name, messages=({"role": "user", "content": name},), language=language)


def response(name: str, sample: int, text: str, temperature: float = 0.7) -> Response:
    return Response(
        prompt_id=name,
        sample=sample,
        round=1,
        temperature=temperature,
        text=text,
        tokens=len(text.split()),
        finished=True,
    )


def score(overall: float) -> Score:
    return Score({"only": overall}, overall)


def test_best_against_worst_and_the_account() -> None:
    prompts = [prompt("a"), prompt("b"), prompt("c"), prompt("d", "vi")]
    rows = [
        (response("a", 0, "middle"), score(0.75)),
        (response("a", 1, "best answer", 1.0), score(0.9)),
        (response("a", 2, "worst"), score(0.6)),
        (response("a", 3, ""), None),
        (response("b", 0, "x"), score(0.7)),
        (response("b", 1, "y"), score(0.74)),
        (response("c", 0, "same"), score(0.7)),
        (response("c", 1, "same"), score(0.7)),
        (response("d", 0, "u"), score(0.70)),
        (response("d", 1, "v w"), score(0.75)),
    ]
    pairs, account = build_pairs(prompts, *zip(*rows, strict=True), margin=0.05)
    assert [(p.prompt_id, p.chosen.text, p.rejected.text) for p in pairs] == [
        ("a", "best answer", "worst"),
        ("d", "v w", "u"),  # .75 - .70 is a gap of .05 in spite of rounding
    ]
    assert account == {
        "prompts": 4,
        "answers": 10,
        "dropped": {"empty_answers": 1, "duplicate_answers": 1},
        "pairs": 2,
        "unpaired": {"fewer_than_two_answers": 1, "under_margin": 1},
    }
    figures = audit(pairs, account)
    assert figures["languages"] == {"en": 1, "vi": 1}
    assert figures["mean_gap"] == pytest.approx(0.175)
    assert figures["chosen_cooler"] == 0.0  # of the one pair across temperatures
    assert figures["chosen_longer"] == 1.0
    assert (figures["chosen_words"], figures["rejected_words"]) == (2.0, 1.0)


def test_order_of_the_answers_does_not_matter() -> None:
    rows = [(response("a", i, f"t{i}"), score(s)) for i, s in enumerate([0.7, 0.9, 0.9, 0.5, 0.5])]
    expected, _ = build_pairs([prompt("a")], *zip(*rows, strict=True), margin=0)
    for turned in (rows[::-1], rows[2:] + rows[:2]):
        assert build_pairs([prompt("a")], *zip(*turned, strict=True), margin=0)[0] == expected
    assert (expected[0].chosen.text, expected[0].rejected.text) == ("t1", "t3")


def test_equal_scores_make_no_pair_even_without_margin() -> None:
    rows = [(response("a", i, f"t{i}"), score(0.7)) for i in range(3)]
    assert build_pairs([prompt("a")], *zip(*rows, strict=True), margin=0)[0] == []


def test_an_audit_of_nothing_has_no_figures() -> None:
    figures = audit([], {"pairs": 0})
    assert figures["mean_gap"] is None
    assert figures["chosen_longer"] is None


def test_too_few_pairs_are_refused_with_the_counts() -> None:
    pairs: list[Pair] = []
    figures = {"prompts": 9, "dropped": {"empty_answers": 4}, "unpaired": {"under_margin": 5}}
    with pytest.raises(DataError, match=r"0 pairs from 9 prompts, under the batch size 8"):
        require_enough(pairs, 8, figures)

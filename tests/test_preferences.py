from collections import Counter
from typing import Any

import pytest

from cai_scale.errors import DataError
from cai_scale.preferences.audit import audit, require_enough
from cai_scale.preferences.pairs import build_pairs, compared_pairs
from cai_scale.records import Pair, Preference, Prompt, Response, Score


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
    rows: list[Any] = [
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
    pairs, account, _ = build_pairs(prompts, *zip(*rows, strict=True), margin=0.05)
    assert [(p.prompt_id, p.chosen.text, p.rejected.text) for p in pairs] == [
        ("a", "best answer", "worst"),
        ("d", "v w", "u"),  # .75 - .70 is a gap of .05 in spite of rounding
    ]
    assert account == {
        "prompts": 4,
        "answers": 10,
        "dropped": {"empty_answers": 1, "unscored_answers": 0, "duplicate_answers": 1},
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
    expected, *_ = build_pairs([prompt("a")], *zip(*rows, strict=True), margin=0)
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


def test_every_refusal_is_a_row_and_a_count() -> None:
    prompts = [prompt("a"), prompt("b"), prompt("c")]
    rows: list[Any] = [
        (response("a", 0, "one"), score(0.7)),
        (response("a", 1, " "), None),
        (response("a", 2, "two"), None),
        (response("a", 3, "three"), None),
        (response("a", 4, "one"), score(0.7)),
        (response("b", 0, "one"), score(0.7)),
        (response("b", 1, "two"), score(0.72)),
        (response("c", 0, "one"), score(0.7)),
        (response("c", 1, "two"), score(0.9)),
    ]
    why = {("a", 2): "no valid reply (not JSON)"}
    pairs, account, refused = build_pairs(prompts, *zip(*rows, strict=True), margin=0.05, why=why)
    assert [p.prompt_id for p in pairs] == ["c"]
    assert refused == [
        {"prompt_id": "a", "sample": 1, "refused": "empty_answers", "why": "empty answer"},
        {
            "prompt_id": "a",
            "sample": 2,
            "refused": "unscored_answers",
            "why": "no valid reply (not JSON)",
        },
        {"prompt_id": "a", "sample": 3, "refused": "unscored_answers", "why": "no score"},
        {
            "prompt_id": "a",
            "sample": 4,
            "refused": "duplicate_answers",
            "why": "the text of sample 0",
        },
        {
            "prompt_id": "a",
            "refused": "fewer_than_two_answers",
            "why": "1 different answers with a score",
        },
        {
            "prompt_id": "b",
            "refused": "under_margin",
            "why": "the gap is under the margin 0.05",
            "gap": 0.02,
        },
    ]
    check_sums(account, refused)


def check_sums(account: dict[str, Any], refused: list[dict[str, Any]]) -> None:
    """The counts are those of the rows, and prompts are a pair or a row."""
    counts = {k: n for k, n in {**account["dropped"], **account["unpaired"]}.items() if n}
    assert counts == Counter(row["refused"] for row in refused)
    assert account["prompts"] == account["pairs"] + sum(account["unpaired"].values())


def test_what_a_pair_keeps_of_its_scores() -> None:
    scores = [
        Score({"x": 0.6, "y": 1.0}, 0.8, {"one": 0.7, "two": 0.9}),
        Score({"x": 0.5, "y": 0.7}, 0.6, {"one": 0.6, "two": 0.6}),
    ]
    answers = [response("a", 0, "p"), response("a", 1, "q")]
    ((pair,), *_) = build_pairs([prompt("a")], answers, scores, margin=0.05)
    assert (pair.chosen.principles, pair.chosen.votes) == (scores[0].principles, scores[0].votes)
    assert (pair.rejected.principles, pair.rejected.votes) == (
        scores[1].principles,
        scores[1].votes,
    )


COMPARED = [response(name, i, f"{name} answer {i}") for name in "abcd" for i in range(3)]


def test_the_comparison_that_leans_furthest_becomes_the_pair() -> None:
    comparisons = [
        ("a", 0, 1, Preference(0.2)),
        ("a", 1, 2, Preference(-0.6, "", {"x": -1.0, "y": -0.2})),
        ("a", 0, 2, Preference(0.6)),  # as far, but later
        ("b", 0, 1, Preference(0.4)),
        ("c", 0, 1, Preference(0.04)),
        ("d", 0, 1, Preference(0.0, "the orders disagree")),
        ("d", 0, 2, Preference(None, "no valid reply (not JSON)")),
        ("d", 1, 2, Preference(0.0)),
    ]
    prompts = [prompt(name) for name in "abcde"]
    pairs, account, refused = compared_pairs(prompts, COMPARED, comparisons, margin=0.05)
    assert [(p.chosen.text, p.chosen.score, p.rejected.text, p.rejected.score) for p in pairs] == [
        ("a answer 2", 0.8, "a answer 1", 0.2),
        ("b answer 0", 0.7, "b answer 1", 0.3),
    ]
    assert pairs[0].chosen.principles == {"x": 1.0, "y": 0.6}
    assert pairs[0].rejected.principles == {"x": 0.0, "y": 0.4}
    assert account == {
        "prompts": 5,
        "answers": 12,
        "comparisons": 8,
        "dropped": {
            "empty_answers": 0,
            "duplicate_answers": 0,
            "uncompared_answers": 0,
            "abstentions": 1,
            "ties": 2,
        },
        "pairs": 2,
        "unpaired": {"not_compared": 1, "undecided": 1, "under_margin": 1},
    }
    assert [(r["prompt_id"], r.get("first"), r.get("second"), r["why"]) for r in refused] == [
        ("d", 0, 1, "the orders disagree"),
        ("d", 0, 2, "no valid reply (not JSON)"),
        ("d", 1, 2, "a tie"),
        ("c", None, None, "the gap is under the margin 0.05"),
        ("d", None, None, "no comparison prefers an answer"),
        ("e", None, None, "no two answers were compared"),
    ]
    assert [row["gap"] for row in refused if "gap" in row] == [0.04]
    check_sums(account, refused)


def test_swapping_the_candidates_swaps_nothing_in_the_pairs() -> None:
    comparisons = [("a", 0, 1, Preference(0.2, "", {"x": 0.2})), ("b", 1, 2, Preference(-0.6))]
    swapped = [
        (name, second, first, Preference(-p.lean, "", {k: -v for k, v in p.principles.items()}))
        for name, first, second, p in comparisons
        if p.lean is not None
    ]
    prompts = [prompt("a"), prompt("b")]
    pairs, *_ = compared_pairs(prompts, COMPARED, comparisons, margin=0.05)
    assert compared_pairs(prompts, COMPARED, swapped, margin=0.05)[0] == pairs
    turned = [(name, second, first, p) for name, first, second, p in comparisons]
    others, *_ = compared_pairs(prompts, COMPARED, turned, margin=0.05)
    assert [p.chosen for p in others] != [p.chosen for p in pairs]  # the control


def test_a_comparison_of_an_empty_answer_or_of_one_text_decides_nothing() -> None:
    answers = [response("a", 0, "x"), response("a", 1, "  "), response("a", 2, "x")]
    comparisons = [("a", 0, 1, Preference(1.0)), ("a", 0, 2, Preference(1.0))]
    pairs, account, refused = compared_pairs([prompt("a")], answers, comparisons, margin=0)
    assert pairs == []
    assert account["dropped"] == {
        "empty_answers": 1,
        "duplicate_answers": 1,
        "uncompared_answers": 0,
        "abstentions": 0,
        "ties": 0,
    }
    check_sums(account, refused)


def test_a_lean_at_the_margin_counts_in_spite_of_rounding() -> None:
    lean = 0.15 + 0.15  # .3 is a hair larger
    for margin, count in ((0.3, 1), (0.30001, 0)):
        pairs, *_ = compared_pairs(
            [prompt("a")], COMPARED, [("a", 0, 1, Preference(lean))], margin=margin
        )
        assert len(pairs) == count


@pytest.mark.parametrize(
    ("per_prompt", "found"),
    [
        (1, [("f", "a")]),
        (2, [("f", "a"), ("e", "b")]),
        (3, [("f", "a"), ("e", "b")]),  # the third would be .02 apart
    ],
)
def test_a_prompt_may_give_several_pairs(per_prompt: int, found: list[tuple[str, str]]) -> None:
    scores = {"c": 0.70, "e": 0.78, "a": 0.6, "b": 0.65, "f": 0.8, "d": 0.72}
    pairs, account, refused = build_pairs(
        [prompt("p")],
        [response("p", i, text) for i, text in enumerate(scores)],
        [score(value) for value in scores.values()],
        margin=0.05,
        per_prompt=per_prompt,
    )
    assert [(p.chosen.text, p.rejected.text) for p in pairs] == found
    assert account["pairs"] == len(found) and not refused
    figures = audit(pairs, account)
    assert figures["alike_prompts"] == 0 and figures["out_of"]["alike_prompts"] == 1


def test_no_answer_stands_in_two_pairs_even_where_many_score_alike() -> None:
    scores = [0.7, 0.7, 0.7, 0.8, 0.8]
    pairs, _, _ = build_pairs(
        [prompt("p")],
        [response("p", i, str(i)) for i in range(5)],
        [score(value) for value in scores],
        margin=0.0,
        per_prompt=5,
    )
    assert [(p.chosen.text, p.rejected.text) for p in pairs] == [("3", "0"), ("4", "1")]

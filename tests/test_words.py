"""Which words moved the score, and whether longer answers did."""

import pytest

from answers import answered, rules
from cai_scale import constitution
from cai_scale.evaluation.compare import compare
from cai_scale.evaluation.words import lengths, top_words

TWO = rules(
    {
        "kind": (3, 0.7, {"kind": (0.2, ["please", "thanks"]), "rude": (-0.1, ["fool"])}),
        "clear": (1, 0.5, {"clear": (0.1, ["thus"])}),
    }
)


def row(term: str, before: int, after: int, moved: float) -> dict[str, object]:
    """What `top_words` says of a term."""
    where = {"please": "kind", "thanks": "kind", "fool": "rude", "thus": "clear"}[term]
    principle = "clear" if term == "thus" else "kind"
    counts = {"before": before, "after": after}
    return {
        "term": term,
        "principle": principle,
        "list": where,
        **counts,
        "moved": pytest.approx(moved),
    }


def test_what_moved_the_mean_by_hand() -> None:
    """0.7 + 3 × 0.2 is clipped to 1: its terms share the 0.3 that is left, three quarters of it
    as the principle weighs that; the second answer moves by 0.1 × ¼ and -0.1 × ¾."""
    rows = [
        answered("no", "please please thanks", TWO),
        answered("no", "thus, fool", TWO),
    ]
    assert top_words(rows, TWO) == [
        row("please", 0, 2, 0.2 * 0.75 / 2),
        row("thanks", 0, 1, 0.1 * 0.75 / 2),
        row("fool", 0, 1, -0.1 * 0.75 / 2),
        row("thus", 0, 1, 0.1 * 0.25 / 2),
    ]
    assert len(top_words(rows, TWO, n=2)) == 2


def test_shares_add_up_to_the_difference() -> None:
    default = constitution.load()
    rows = [
        answered("Never kill. Please, thank you.", "Tip tip useful tips, helpful solution; never."),
        answered("Perhaps.", "Perhaps a poison, a bomb, a weapon, murder, and a scam of arson."),
        answered("Cảm ơn bạn.", "Luôn luôn, chắc chắn; cảm ơn."),
        answered("Thanks.", ""),  # not scored, and not counted
    ]
    moved = [entry["moved"] for entry in top_words(rows, default, n=100)]
    delta = compare(rows, default)["delta"]["overall"]
    assert sum(moved) == pytest.approx(delta, abs=1e-5)
    assert abs(delta) > 0.01
    assert "thanks" not in [entry["term"] for entry in top_words(rows, default, n=100)]


def test_terms_that_come_and_go_alike_moved_nothing() -> None:
    rows = [answered("thus", "no", TWO), answered("no", "thus", TWO)]
    assert top_words(rows, TWO) == [row("thus", 1, 1, 0.0)]
    assert top_words([], TWO) == []


def test_gain_against_length() -> None:
    rows = [
        answered("no", "thus thus thus now", TWO),  # + 3 words
        answered("no", "thus thus", TWO),  # + 1
        answered("thus is so", "no", TWO),  # - 2
        answered("no", "", TWO),  # left out
    ]
    assert lengths(rows) == {"spearman": 1.0}
    against = [answered("no no no", "thus", TWO), answered("thus", "no no no", TWO)]
    assert lengths(against) == {"spearman": -1.0}
    assert lengths(rows[:1]) == lengths([]) == {"spearman": None}

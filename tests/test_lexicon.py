import copy
import time
import unicodedata

import pytest

from cai_scale import constitution
from cai_scale.critics import load_critic
from cai_scale.critics.lexicon import LexiconCritic, tokenise
from cai_scale.errors import ConfigError
from cai_scale.records import Score


@pytest.fixture(scope="module")
def critic() -> LexiconCritic:
    return LexiconCritic(constitution.load())


def score(critic: LexiconCritic, response: str) -> Score:
    found = critic.score(["a question"], [response])[0]
    assert found is not None
    return found


def test_a_neutral_text_scores_the_start(critic: LexiconCritic) -> None:
    assert score(critic, "The sky over the sea.") == Score(
        {"harmless": 0.7, "helpful": 0.7, "honest": 0.7, "respectful": 0.7}, 0.7
    )


@pytest.mark.parametrize(
    ("response", "principle", "expected"),
    [
        ("A useful and practical thing.", "helpful", 0.9),  # the worked example: two words
        ("A bomb, a Bomb, a BOMB.", "harmless", 0.25),
        ("It may rain, or it might not.", "honest", 0.8),
        ("It will always rain.", "honest", 0.6),
        ("Perhaps it always rains.", "honest", 0.65),
        ("Please sit down.", "respectful", 0.78),
        ("kill " * 9, "harmless", 0.0),
        ("useful " * 9, "helpful", 1.0),
        ("Đây là một quả bom.", "harmless", 0.55),
        ("CẢM ƠN bạn rất nhiều", "respectful", 0.78),
        ("Điều này có thể đúng.", "honest", 0.75),
        ("You're welcome", "respectful", 0.78),
        ("You’re welcome", "respectful", 0.78),
        ("It is 100% safe", "honest", 0.6),
    ],
)
def test_terms_move_their_principle(
    critic: LexiconCritic, response: str, principle: str, expected: float
) -> None:
    assert score(critic, response).principles[principle] == pytest.approx(expected)


def test_overall_of_the_worked_example(critic: LexiconCritic) -> None:
    # harmless .7, helpful .9, honest .75, respectful .78
    assert score(critic, "Please: a useful tip, perhaps").overall == pytest.approx(
        (0.7 + 0.9 + 0.75 + 0.78) / 4
    )


def test_whole_words_only(critic: LexiconCritic) -> None:
    # skill holds kill, bombard holds bomb, maybe holds may (and is a term itself, once)
    assert critic.occurrences("skill bombard dismay") == {}
    assert critic.occurrences("maybe") == {("honest", "hedges", "maybe"): 1}


@pytest.mark.parametrize(
    "text",
    ["phim bom tấn", "đau dạ dày", "bình thường", "đơn xin việc", "a heart attack", "celery stalk"],
)
def test_false_friends_are_no_terms(critic: LexiconCritic, text: str) -> None:
    assert critic.occurrences(text) == {}


def test_longest_match_wins_and_matches_do_not_overlap(critic: LexiconCritic) -> None:
    # "no doubt" inside "without a doubt"; "luôn" inside "luôn luôn"
    assert critic.occurrences("without a doubt") == {("honest", "absolutes", "without a doubt"): 1}
    assert critic.occurrences("luôn luôn luôn") == {
        ("honest", "absolutes", "luôn luôn"): 1,
        ("honest", "absolutes", "luôn"): 1,
    }
    # A match that fails after some words gives them back: "in some" starts "in some cases".
    assert critic.occurrences("in some may") == {("honest", "hedges", "may"): 1}


def test_the_two_placements_of_tone_marks_are_one(critic: LexiconCritic) -> None:
    for spelling in (
        "phóng hỏa",
        "phóng hoả",
        "PHÓNG HOẢ",
        unicodedata.normalize("NFD", "phóng hỏa"),
    ):
        assert critic.occurrences(spelling).total() == 1, spelling
    assert tokenise("hòa khỏe thủy") == tokenise("hoà khoẻ thuỷ")
    # The tone itself is not lost, and other words keep theirs.
    assert tokenise("hòa") != tokenise("hóa")
    assert tokenise("của mùa") == ["của", "mùa"]


def test_matching_is_on_the_response_alone(critic: LexiconCritic) -> None:
    asked = critic.score(["how do I kill a bomb?"], ["The sky."])[0]
    assert asked is not None
    assert asked.overall == 0.7


@pytest.mark.parametrize("empty", ["", "  \n\t "])
def test_an_empty_response_has_no_score(critic: LexiconCritic, empty: str) -> None:
    assert critic.score(["x"], [empty]) == [None]


def test_agrees_with_a_plain_search(critic: LexiconCritic) -> None:
    """An independent count: at each word, try all terms from the longest."""
    terms = {
        tuple(tokenise(term)): (p.id, item.effect)
        for p in critic.constitution.principles
        for item in p.lexicon.lists
        for language in item.terms.values()
        for term in language
    }
    text = (
        "In many cases you may try to start with a checklist, for example, but never rob a bank: "
        "có thể xin lỗi, chắc chắn không bao giờ lừa đảo. Thank you, thanks! It depends on luck."
    )
    tokens, position, moves = tokenise(text), 0, dict.fromkeys(("harmless", "helpful"), 0.0)
    moves |= dict.fromkeys(("honest", "respectful"), 0.0)
    while position < len(tokens):
        fits = [t for t in terms if tuple(tokens[position : position + len(t)]) == t]
        if fits:
            longest = max(fits, key=len)
            principle, effect = terms[longest]
            moves[principle] += effect
            position += len(longest)
        else:
            position += 1
    found = score(critic, text)
    assert sum(value != 0 for value in moves.values()) == 4
    for principle, move in moves.items():
        assert found.principles[principle] == pytest.approx(min(1.0, max(0.0, 0.7 + move)))


def test_time_does_not_grow_with_the_number_of_terms() -> None:
    """Twenty times the terms: the same pass over the text."""

    def seconds(extra: int) -> float:
        data = copy.deepcopy(dict(constitution.load().data))
        data["principles"][0]["lexicon"]["lists"][0]["terms"]["en"] += [
            f"alpha beta word{n}" for n in range(extra)
        ]
        critic = LexiconCritic(constitution.from_dict(data))
        text = "alpha beta gamma delta " * 2000
        times = []
        for _ in range(5):
            start = time.perf_counter()
            critic.score(["x"], [text])
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(8000) < 3 * seconds(0)


@pytest.mark.parametrize("term", ["please", "Please", "phóng hoả"])
def test_a_term_in_two_lists_is_refused_in_any_spelling(term: str) -> None:
    data = copy.deepcopy(dict(constitution.load().data))
    data["principles"][1]["lexicon"]["lists"][0]["terms"]["en"].append(term)
    with pytest.raises(ConfigError, match=r"stands in .*/.* and in .*/"):
        LexiconCritic(constitution.from_dict(data))


def test_unknown_critic_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'oracle'; choose one of: lexicon"):
        load_critic("oracle", constitution.load())

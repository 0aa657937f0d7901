"""The lexicon critic against a plain reading of its rules: a trie walked from every token."""

import copy
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, find, given, settings
from hypothesis import strategies as st

from cai_scale import constitution
from cai_scale.constitution import Constitution
from cai_scale.critics import fold as folding
from cai_scale.critics.fold import fold, tokenise
from cai_scale.critics.lexicon import Found, LexiconCritic
from cai_scale.errors import ConfigError
from cai_scale.records import Score

DEFAULT = constitution.load()
CRITIC = LexiconCritic(DEFAULT)


class Reference:
    """The rules one after the other, with nothing clever; slow."""

    PLACEMENTS = (
        "òa=oà óa=oá ỏa=oả õa=oã ọa=oạ òe=oè óe=oé ỏe=oẻ õe=oẽ ọe=oẹ ùy=uỳ úy=uý ủy=uỷ ũy=uỹ ụy=uỵ"
    )

    def __init__(self, given: Constitution) -> None:
        self.given = given
        self.root: dict[str, Any] = {}
        for principle in given.principles:
            for item in principle.lexicon.lists:
                for term in (t for terms in item.terms.values() for t in terms):
                    node = self.root
                    for token in self.tokens(term):
                        node = node.setdefault(token, {})
                    node[""] = (principle.id, item.id, item.effect)

    def tokens(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text).casefold()
        text = unicodedata.normalize("NFC", text).replace("’", "'").replace("ʼ", "'")
        for pair in self.PLACEMENTS.split():
            text = text.replace(*pair.split("="))
        return re.findall(r"\w+|[^\w\s]", text)

    def matches(self, tokens: Sequence[str]) -> Iterator[tuple[int, int, tuple[str, str, float]]]:
        start = 0
        while start < len(tokens):
            node, end, entry = self.root, start, None
            for position in range(start, len(tokens)):
                if tokens[position] not in node:
                    break
                node = node[tokens[position]]
                if "" in node:
                    end, entry = position + 1, node[""]
            if entry is None:
                start += 1
            else:
                yield start, end, entry
                start = end

    def occurrences(self, text: str) -> Counter[tuple[str, str, str]]:
        tokens = self.tokens(text)
        return Counter(
            (entry[0], entry[1], " ".join(tokens[start:end]))
            for start, end, entry in self.matches(tokens)
        )

    def score(self, text: str) -> Score | None:
        if not text.strip():
            return None
        scores = {p.id: p.lexicon.start for p in self.given.principles}
        for _, _, (principle, _, effect) in self.matches(self.tokens(text)):
            scores[principle] += effect
        scores = {key: round(min(1.0, max(0.0, value)), 9) for key, value in scores.items()}
        return Score(scores, round(self.given.overall(scores), 9))


REFERENCE = Reference(DEFAULT)
TERMS = sorted(
    {
        term
        for principle in DEFAULT.principles
        for item in principle.lexicon.lists
        for terms in item.terms.values()
        for term in terms
    }
)
ODD = [
    *("İ", "ı", "ß", "ŉ", "ΐ", "ﬁ", "ǰ", "K", "Å", "ʼ", "’", "'", "\u0345", "\u0344", "\u0f73"),
    *("\u0301", "\u0323", "\u031b", "\u0302", "\u200d", "\u200c", "\u00ad", "\ufeff", "\ud800"),
    *("\u1100", "\u1161", "\u11a8", "각", "\u09c7", "\u09be", "か", "\u3099", "²", "_", "%"),
    *("👩\u200d👧", "hòa", "hoà", "HOÀ", "thúy", "o", "a", "e", "ò", "oa\u0300", "uỵy", "òaoà"),
]  # fmt: skip
GAPS = [
    "",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\x1c",
    ",",
    ", ",
    "-",
    "'",
    "’",
    "_",
]


def prefixes(term: str) -> list[str]:
    words = term.split()
    return [" ".join(words[:n]) for n in range(1, len(words))] or [term[:-1]]


def respelt(term: str) -> st.SearchStrategy[str]:
    def with_apostrophe(text: str) -> str:
        return text.replace("'", "’")

    changes: list[Callable[[str], str]] = [
        *(str, str.upper, str.title, with_apostrophe),
        *(lambda text, form=form: unicodedata.normalize(form, text) for form in ("NFD", "NFKD")),
        lambda text: text.replace(" ", "\n\t "),
    ]
    return st.sampled_from(changes).map(lambda change: change(term))


pieces = st.one_of(
    st.sampled_from(TERMS).flatmap(respelt),
    st.sampled_from([prefix for term in TERMS for prefix in prefixes(term)]).flatmap(respelt),
    st.sampled_from(ODD),
    st.text(max_size=3),
)
texts = st.lists(st.tuples(pieces, st.sampled_from(GAPS)), max_size=12).map(
    lambda parts: "".join(piece + gap for piece, gap in parts)
)


@settings(max_examples=600)
@given(texts)
@example("in some may, in some cases may be luôn luôn luôn")
@example("100%may 100 % you’re welcomeyou're welcome")
def test_every_text_scores_as_the_plain_reading_has_it(text: str) -> None:
    assert tokenise(text) == REFERENCE.tokens(text)
    assert CRITIC.occurrences(text) == REFERENCE.occurrences(text)
    assert CRITIC.score([""], [text]) == [REFERENCE.score(text)]


@settings(max_examples=300)
@given(texts)
def test_a_text_folds_as_its_pieces_do(text: str) -> None:
    """Where a piece ends nothing is lost, with pieces as short as they can be."""
    with mock.patch.object(folding, "_PIECE", re.compile(r".\S*+", re.DOTALL)):
        assert tokenise(text) == REFERENCE.tokens(text)
    long = (text + " x") * (9000 // (len(text) + 2))  # pieces as they are
    assert tokenise(long) == REFERENCE.tokens(long)


def constitution_of(terms: Sequence[str]) -> Constitution:
    """The terms shared out over two lists of one principle."""
    data = copy.deepcopy(dict(DEFAULT.data))
    data["languages"], data["principles"] = ["en"], data["principles"][2:3]
    principle = data["principles"][0]
    principle["title"], principle["statement"] = {"en": "x"}, {"en": "x"}
    data["requests"] = {key: {"en": value["en"]} for key, value in data["requests"].items()}
    for index, item in enumerate(principle["lexicon"]["lists"]):
        item["terms"] = {"en": terms[index::2]}
    return constitution.from_dict(data)


few = st.text(alphabet="aab%'- ủyo", min_size=1, max_size=7)


@settings(max_examples=400)
@given(
    st.lists(few.filter(str.strip), min_size=2, max_size=9, unique_by=lambda t: tuple(tokenise(t))),
    st.lists(few, max_size=9).map("".join),
)
def test_every_lexicon_scores_as_the_plain_reading_has_it(terms: list[str], text: str) -> None:
    """Words and signs in any order, terms that begin or end with one another."""
    made = constitution_of(terms)
    critic, reference = LexiconCritic(made), Reference(made)
    assert critic.occurrences(text) == reference.occurrences(text)
    assert critic.score([""], [text]) == [reference.score(text)]


@pytest.mark.parametrize(
    ("part", "instead"), [(r"(?!\w)", ""), (r"(?<!\w)", ""), (r"\s++", " "), (r"\s*+", "")]
)
def test_a_pattern_that_lacks_a_part_is_found_out(part: str, instead: str) -> None:
    """The control: without any one of its conditions the pattern differs on some text."""
    made = constitution_of(["a", "a b", "b'a", "a%b", "%"])
    critic, reference = LexiconCritic(made), Reference(made)
    critic._pattern = re.compile(critic._pattern.pattern.replace(part, instead))
    assert find(
        st.text(alphabet="ab%' "),
        lambda text: critic.occurrences(text) != reference.occurrences(text),
    )


@settings(max_examples=500)
@given(texts)
def test_an_explanation_names_what_was_counted_and_where(text: str) -> None:
    found = CRITIC.explain(text)
    counted = Counter((f.principle, f.list, " ".join(tokenise(f.term))) for f in found)
    assert counted == REFERENCE.occurrences(text)
    for f in found:
        # Both cuts fall where nothing folds across them, and the term lies between them.
        assert fold(text[: f.start]) + fold(text[f.start : f.end]) + fold(text[f.end :]) == fold(
            text
        )
        assert f" {' '.join(tokenise(f.term))} " in f" {' '.join(tokenise(text[f.start : f.end]))} "
    starts = [f.start for f in found]
    assert starts == sorted(starts)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(TERMS).flatmap(respelt), min_size=1, max_size=5),
    st.sampled_from(
        ["Straße ", "İstanbul, ", "ŉ ", "ﬁ ", "각 ", unicodedata.normalize("NFD", "ậ, ")]
    ),
)
def test_the_words_of_an_explanation_are_exactly_its_spans(terms: list[str], before: str) -> None:
    """After letters that change their length in folding: an independent search by words."""
    text = before.join(["", *terms])
    for f in CRITIC.explain(text):
        assert tokenise(text[f.start : f.end]) == tokenise(f.term)
        assert not text[f.start : f.end][0].isspace()
        assert not text[f.start : f.end][-1].isspace()


def test_terms_without_end_are_one_line() -> None:
    """Hundreds of terms inside one another are more than a regular expression nests."""
    LexiconCritic(constitution_of(["a" * n for n in range(1, 50)]))
    with pytest.raises(ConfigError, match="begin with one another"):
        LexiconCritic(constitution_of(["a" * n for n in range(1, 2000)]))


def test_explain_by_hand() -> None:
    assert CRITIC.explain("Straße: It MAY  be useful.") == [
        Found(11, 14, "may", "honest", "hedges", 0.05),
        Found(19, 25, "useful", "helpful", "helpful", 0.1),
    ]
    text = unicodedata.normalize("NFD", "Để phóng hoả, có thể")
    first, second = CRITIC.explain(text)
    assert unicodedata.normalize("NFC", text[first.start : first.end]) == "phóng hoả"
    assert first.term == "phóng hỏa"  # as the constitution has it
    assert unicodedata.normalize("NFC", text[second.start :]) == "có thể"
    # The dotted capital folds to two characters, the mark of the last letter is not composed.
    assert [(f.start, f.end) for f in CRITIC.explain("İ tip kill\u0303")] == [(2, 5), (6, 11)]
    assert CRITIC.explain("") == CRITIC.explain("The sky.") == []


PROSE = (
    "It may be a good idea to start with the flour, which most bakers weigh. Please don't hurry. "
    "Trước hết, bạn nên rửa rau thật sạch. Có thể dùng chảo gang nếu nhà có sẵn. Hoà với nước ấm. "
)


def seconds(text: str) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        CRITIC.score([""], [text])
        times.append(time.process_time() - start)
    return min(times)


def repeated(part: str, length: int) -> str:
    return (part * (length // len(part) + 1))[:length]


def test_time_is_linear_up_to_ten_megabytes() -> None:
    small, large = (repeated(PROSE, n) for n in (800_000, 8_000_000))
    assert len(large.encode()) > 9_400_000
    assert seconds(large) < 13 * seconds(small)


@pytest.mark.parametrize(
    "part",
    [
        *("in some ", "không thể ", "luôn luôn ", "trong một số trường ", "kill ", "a", " ", "'"),
        *("in" + " " * 5000, "100 % ", "100%", "rất vui được", "\u0301", "\u0301\u0323", "ò", "İ"),
        *("a\u0323\u0302", "\u1100\u1161", "tip\u0301\u0323", "\u0301\u0f73"),
    ],
)
def test_no_text_takes_more_than_its_length(part: str) -> None:
    small, large = (repeated(part, n) for n in (20_000, 200_000))
    assert seconds(large) < 20 * seconds(small) + 0.02
    start = time.process_time()
    CRITIC.explain(large)
    assert time.process_time() - start < 5


def test_the_square_of_a_run_of_marks_would_be_seen() -> None:
    """The control: what `unicodedata` alone takes for such a text."""
    times = []
    for length in (2_000, 20_000):
        text, start = repeated("\u0301\u0323", length), time.process_time()
        unicodedata.normalize("NFC", text)
        times.append(time.process_time() - start)
    assert times[1] > 20 * times[0] + 0.02


def test_marks_in_a_long_run_compose_as_ever() -> None:
    for text in (
        "a" + "\u0301\u0323" * 100 + "b",
        "\u0345\u0f73\u0301☃" * 40,
        "ợ" + "\u031b\u0323" * 90,
    ):
        assert fold(text) == unicodedata.normalize(
            "NFC", unicodedata.normalize("NFC", text).casefold()
        )

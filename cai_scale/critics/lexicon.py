"""The lexicon critic: count a constitution's terms in a response. No torch.

It is deliberately simple, and it can be gamed by repeating its words. No claim of quality
rests on it alone.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from cai_scale.constitution import Constitution, TermList
from cai_scale.critics import EMPTY
from cai_scale.critics.fold import Origin, fold, tokenise, tokens
from cai_scale.errors import ConfigError
from cai_scale.records import Score


@dataclass(frozen=True)
class Found:
    """A term in a response: characters `start` to `end` of the text as given.

    `term` is the constitution's spelling, `list` its list's id, `effect` what it adds to the
    principle. A letter that the match covers in part (ŉ, which folds to two) counts as a whole.
    """

    start: int
    end: int
    term: str
    principle: str
    list: str
    effect: float


@dataclass(frozen=True)
class _Entry:
    """A term as the constitution writes it, and where it stands there."""

    term: str
    principle: str
    list: TermList


class LexiconCritic:
    """Each principle starts at its `start` and moves by `effect` for each term found.

    Matching is by whole words and phrases, leftmost-longest and not overlapping, in all
    languages at once, on the response alone. Every occurrence counts; the sum is clipped to
    [0, 1]. All terms are one regular expression in the shape of a trie, so that a text is read
    once, in time linear in its length, for any number of terms.
    """

    name = "lexicon"

    def __init__(self, constitution: Constitution) -> None:
        self.constitution = constitution
        self._entries: dict[str, _Entry] = {}
        for principle in constitution.principles:
            for item in principle.lexicon.lists:
                for term in (term for terms in item.terms.values() for term in terms):
                    self._add(_Entry(term, principle.id, item))
        try:
            self._pattern = re.compile(_regex(key.split(" ") for key in self._entries))
        except RecursionError:
            raise ConfigError(
                f"constitution {constitution.name}: hundreds of terms begin with one another; "
                f"keep fewer of them"
            ) from None

    def _add(self, entry: _Entry) -> None:
        other = self._entries.setdefault(" ".join(tokenise(entry.term)), entry)
        if (other.principle, other.list.id) != (entry.principle, entry.list.id):
            self._collision(entry, other)

    def _collision(self, *entries: _Entry) -> NoReturn:
        places = " and in ".join(f"{entry.principle}/{entry.list.id}" for entry in entries)
        raise ConfigError(
            f"constitution {self.constitution.name}: the term {entries[0].term!r} stands in "
            f"{places}, perhaps in another spelling; keep it in one list"
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """Score each response; `prompts` are not read. None for a response without text."""
        return [self._score_one(response) for response in responses]

    def why(self, prompt: str, response: str) -> str:
        return EMPTY

    def occurrences(self, response: str) -> Counter[tuple[str, str, str]]:
        """How often each (principle id, list id, term as matched) occurs."""
        counts = self._count(response)
        return Counter(
            {
                (entry.principle, entry.list.id, key): counts[key]
                for key, entry in self._entries.items()
                if key in counts
            }
        )

    def explain(self, response: str) -> list[Found]:
        """Each term in the order of the text: what moved the score, and where it stands."""
        origin = Origin(response)
        found = []
        for match in self._pattern.finditer(fold(response)):
            entry = self._entries[" ".join(tokens(match[0]))]
            found.append(
                Found(
                    *origin.span(*match.span()),
                    term=entry.term,
                    principle=entry.principle,
                    list=entry.list.id,
                    effect=entry.list.effect,
                )
            )
        return found

    def _score_one(self, response: str) -> Score | None:
        if not response.strip():
            return None
        scores = {p.id: p.lexicon.start for p in self.constitution.principles}
        for key, count in self._count(response).items():
            entry = self._entries[key]
            scores[entry.principle] += count * entry.list.effect
        # Rounded, so that a score does not depend on the order in which steps were added.
        principles = {key: round(min(1.0, max(0.0, value)), 9) for key, value in scores.items()}
        return Score(principles, round(self.constitution.overall(principles), 9))

    def _count(self, response: str) -> Counter[str]:
        """How often each term occurs, by its key in `_entries`."""
        found = Counter(map(re.Match.group, self._pattern.finditer(fold(response))))
        counts: Counter[str] = Counter()
        for words, count in found.items():
            counts[" ".join(tokens(words))] += count
        return counts


_Trie = dict[str, "_Trie"]  # the pieces of a regular expression that may follow here

_WORD = re.compile(r"\w")
_END = ("", r"(?!\w)")


def _regex(terms: Iterable[Sequence[str]]) -> str:
    """What matches the longest of the terms, each a sequence of tokens, at a place in a text."""
    root: _Trie = {}
    for term in terms:
        node = root
        for piece in _spell(term):
            node = node.setdefault(piece, {})
    return _alternatives(root)


def _spell(term: Sequence[str]) -> Iterator[str]:
    """A term's characters, with what must stand before, between and after its tokens.

    The possessive gaps never give back a space, so that nothing is tried twice.
    """
    words = [_WORD.match(token) is not None for token in term]
    yield r"(?<!\w)" if words[0] else ""
    for index, token in enumerate(term):
        if index:
            yield r"\s++" if words[index - 1] and words[index] else r"\s*+"
        yield from map(re.escape, token)
    yield _END[words[-1]]


def _alternatives(node: _Trie) -> str:
    """The trie as a regular expression: at most one branch fits a text, or the term ends."""
    path = []
    while len(node) == 1:
        [(piece, node)] = node.items()
        path.append(piece)
    branches = sorted(node, key=lambda piece: piece in _END)  # the longest term is tried first
    rest = "|".join(piece + _alternatives(node[piece]) for piece in branches)
    return "".join(path) + (f"(?:{rest})" if rest else "")

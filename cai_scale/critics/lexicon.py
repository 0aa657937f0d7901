"""The lexicon critic: count a constitution's terms in a response. No torch.

It is deliberately simple, and it can be gamed by repeating its words. No claim of quality
rests on it alone.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError
from cai_scale.records import Score

_TOKEN = re.compile(r"\w+|[^\w\s]")

# Vietnamese writes the tone of an open oa, oe or uy on either vowel (hòa, hoà; thúy, thuý).
# One of the two, the second vowel, stands for both here.
_TONE_MARKS = str.maketrans({"’": "'", "ʼ": "'"})
_PLACEMENTS = {
    unicodedata.normalize("NFC", first + tone + second): unicodedata.normalize(
        "NFC", first + second + tone
    )
    for first, second in ("oa", "oe", "uy")
    for tone in "\u0300\u0301\u0303\u0309\u0323"
}
_PLACEMENT = re.compile("|".join(_PLACEMENTS))


def tokenise(text: str) -> list[str]:
    """Words and single punctuation marks, case-folded, NFC, one placement of tone marks."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    text = _PLACEMENT.sub(lambda match: _PLACEMENTS[match[0]], text.translate(_TONE_MARKS))
    return _TOKEN.findall(text)


@dataclass
class _TrieNode:
    """A node of a trie over tokens; `entry` is the term list that ends here, if one does."""

    children: dict[str, "_TrieNode"] = field(default_factory=dict)
    entry: int | None = None


class LexiconCritic:
    """Each principle starts at its `start` and moves by `effect` for each term found.

    Matching is by whole words and phrases, leftmost-longest and not overlapping, in all
    languages at once, on the response alone. Every occurrence counts; the sum is clipped to
    [0, 1]. A trie over tokens makes it one pass over the text for any number of terms.
    """

    name = "lexicon"

    def __init__(self, constitution: Constitution) -> None:
        self.constitution = constitution
        self._lists = [(p.id, item) for p in constitution.principles for item in p.lexicon.lists]
        self._root = _TrieNode()
        for index, (_, term_list) in enumerate(self._lists):
            for terms in term_list.terms.values():
                for term in terms:
                    node = self._root
                    for token in tokenise(term):
                        node = node.children.setdefault(token, _TrieNode())
                    if node.entry not in (None, index):
                        self._collision(term, index, node.entry)
                    node.entry = index

    def _collision(self, term: str, *indices: int | None) -> NoReturn:
        lists = (self._lists[index] for index in indices if index is not None)
        places = " and in ".join(f"{principle}/{item.id}" for principle, item in lists)
        raise ConfigError(
            f"constitution {self.constitution.name}: the term {term!r} stands in {places}, "
            f"perhaps in another spelling; keep it in one list"
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """Score each response; `prompts` are not read. None for a response without text."""
        return [self._score_one(response) for response in responses]

    def occurrences(self, response: str) -> Counter[tuple[str, str, str]]:
        """How often each (principle id, list id, term as matched) occurs."""
        tokens = tokenise(response)
        return Counter(
            (self._lists[entry][0], self._lists[entry][1].id, " ".join(tokens[start:end]))
            for start, end, entry in self._matches(tokens)
        )

    def _score_one(self, response: str) -> Score | None:
        if not response.strip():
            return None
        scores = {p.id: p.lexicon.start for p in self.constitution.principles}
        for _, _, entry in self._matches(tokenise(response)):
            principle, term_list = self._lists[entry]
            scores[principle] += term_list.effect
        # Rounded, so that a score does not depend on the order in which steps were added.
        principles = {key: round(min(1.0, max(0.0, value)), 9) for key, value in scores.items()}
        return Score(principles, round(self.constitution.overall(principles), 9))

    def _matches(self, tokens: Sequence[str]) -> Iterator[tuple[int, int, int]]:
        """(start, end, list index) of each term, leftmost-longest, not overlapping."""
        start = 0
        while start < len(tokens):
            node, end, entry = self._root, start, None
            for position in range(start, len(tokens)):
                child = node.children.get(tokens[position])
                if child is None:
                    break
                node = child
                if node.entry is not None:
                    end, entry = position + 1, node.entry
            if entry is None:
                start += 1
            else:
                yield start, end, entry
                start = end

"""One spelling for all that means the same: case, composed letters, tone marks, apostrophes."""

import itertools
import re
import unicodedata
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

_TOKEN = re.compile(r"\w+|[^\w\s]")

# Vietnamese writes the tone of an open oa, oe or uy on either vowel (hòa, hoà; thúy, thuý).
# One of the two, the second vowel, stands for both here.
_PLACEMENTS = {
    unicodedata.normalize("NFC", first + tone + second): unicodedata.normalize(
        "NFC", first + second + tone
    )
    for first, second in ("oa", "oe", "uy")
    for tone in "\u0300\u0301\u0303\u0309\u0323"
}
_PLACEMENT = re.compile("|".join(_PLACEMENTS))

# Texts are folded by pieces that stay in the processor's cache. Nothing folds across the space
# where a piece begins.
_PIECE = re.compile(r".{1,4096}+\S*+", re.DOTALL)
_FIRST_MARK = "\u0300"  # no character below it ever joins the one before
_CROWD = re.compile(r"[^\w\s\x00-\u02ff]{64,}")


def tokenise(text: str) -> list[str]:
    """Words and single punctuation marks of the folded text."""
    return tokens(fold(text))


def tokens(folded: str) -> list[str]:
    """Words and single punctuation marks of a text that is folded already."""
    return _TOKEN.findall(folded)


def fold(text: str) -> str:
    """Case-folded, NFC, with one apostrophe and one placement of tone marks."""
    if text.isascii():
        return text.casefold()
    return "".join(map(_fold, _PIECE.findall(text)))


def _fold(text: str) -> str:
    text = _lower(text).replace("’", "'").replace("ʼ", "'")
    return _PLACEMENT.sub(lambda match: _PLACEMENTS[match[0]], text)


def _lower(text: str) -> str:
    return _compose(_compose(text).casefold())


def _compose(text: str) -> str:
    """NFC in linear time: `unicodedata.normalize` alone takes the square of a run of marks."""
    if unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", _CROWD.sub(_in_order, text))


def _in_order(match: re.Match[str]) -> str:
    """Marks in canonical order, which is the stable one by combining class between starters."""
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in match[0])
    runs = itertools.groupby(marks, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join(mark for _, run in runs for mark in sorted(run, key=unicodedata.combining))


class Origin:
    """Where the characters of `fold(text)` stand in `text`, which may be shorter or longer."""

    def __init__(self, text: str) -> None:
        lower = text.casefold()
        self._in_place = (
            len(lower) == len(text)
            and unicodedata.is_normalized("NFC", text)
            and unicodedata.is_normalized("NFC", lower)
        )
        # Where each piece begins, before and after; what follows `_lower` is one to one.
        self._text, self._folded = array("q", [0]), array("q", [0])
        if not self._in_place:
            for piece in _pieces(text):
                self._text.append(self._text[-1] + len(piece))
                self._folded.append(self._folded[-1] + len(_lower(piece)))

    def span(self, start: int, end: int) -> tuple[int, int]:
        """The smallest span of the text that folds to at least `start` to `end`."""
        if self._in_place:
            return start, end
        first = bisect_right(self._folded, start) - 1
        return self._text[first], self._text[bisect_left(self._folded, end)]


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into letters with their marks, each of which folds alone as it does there."""
    start = 0
    for position, letter in enumerate(text):
        joins = letter >= _FIRST_MARK and (
            unicodedata.category(letter).startswith("M")
            or _composes(text[start:position], letter)  # Korean syllables, written as letters
        )
        if position > start and not joins:
            yield text[start:position]
            start = position
    if text:
        yield text[start:]


def _composes(before: str, letter: str) -> bool:
    return _compose(before + letter) != _compose(before) + _compose(letter)

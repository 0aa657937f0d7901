"""Whether phrases stand around a term: what negates it, or warns of it. No torch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from cai_scale.critics.fold import fold

_SENTENCE_ENDS = re.compile(r"[.!?…;\n]")


class Context:
    """Looks for phrases before and after a term, in its sentence.

    Args:
        languages: the phrases of one kind and the `turns`, of each language.
    """

    def __init__(self, languages: Iterable[tuple[Mapping[str, Any], Iterable[str]]]) -> None:
        self._before: list[re.Pattern[str]] = []
        self._after: list[re.Pattern[str]] = []
        for groups, turns in languages:
            self._before += [_before(group, _any(turns)) for group in groups["before"]]
            self._after += [_after(group, _any(turns)) for group in groups["after"]]

    def holds(self, text: str, start: int, end: int) -> bool:
        """Whether one of the phrases is about what stands at characters `start` to `end`."""
        before = fold(_SENTENCE_ENDS.split(text[:start])[-1])
        after = fold(_SENTENCE_ENDS.split(text[end:], maxsplit=1)[0])
        return any(pattern.search(before) for pattern in self._before) or any(
            pattern.match(after) for pattern in self._after
        )


def _before(group: Mapping[str, Any], turns: str) -> re.Pattern[str]:
    """What ends in one of the phrases and the words that may follow it."""
    subject = ""
    if "not_after" in group:
        subject = rf"(?!{_any(group['not_after'])})\w+\s+"
    phrase = rf"(?<!\w){subject}{_any(group['phrases'])}[^\w\s]*"
    return re.compile(rf"{phrase}{_gap(group, turns)}\s*[^\w\s]*$")


def _after(group: Mapping[str, Any], turns: str) -> re.Pattern[str]:
    """What begins with the words that may come before one of the phrases, and that."""
    return re.compile(rf"[^\w\s]*{_gap(group, turns)}\s+{_any(group['phrases'])}")


def _gap(group: Mapping[str, Any], turns: str) -> str:
    """At most `within` words, none of `turns` among them."""
    return rf"(?:\s+(?!{turns})\S+){{0,{group['within']}}}"


def _any(phrases: Iterable[str]) -> str:
    """One of the phrases, as whole words."""
    spelled = (r"\s+".join(map(re.escape, fold(phrase).split())) for phrase in phrases)
    return rf"(?:{'|'.join(spelled)})(?!\w)"

"""A lexicon in two halves: train on one, see whether the other gains. No torch."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from cai_scale.constitution.schema import Constitution, Principle, TermList
from cai_scale.critics.fold import tokenise

SEED = 0

_Key = tuple[str, ...]  # a term's tokens: one for all of its spellings
_Place = tuple[str, str, str]  # principle, list, language


def halves(constitution: Constitution, seed: int = SEED) -> tuple[Constitution, Constitution]:
    """Two constitutions which share the terms of each list, in each language, between them.

    Terms of which one stands inside another (thanks, many thanks), in whatever list, stay
    together, so that no half counts a word of the other's. Of what remains each half gets the
    same number, the first one more. The order is by a hash of seed and terms: it is the same on
    every machine.

    Returns:
        The first half and the second. A list without terms is left out, a language without terms
        keeps an empty one: a list of one term is in the first half alone.
    """
    places: dict[_Key, list[_Place]] = {}
    for principle in constitution.principles:
        for item in principle.lexicon.lists:
            for language, terms in item.terms.items():
                for key in dict.fromkeys(map(_key, terms)):
                    places.setdefault(key, []).append((principle.id, item.id, language))
    counts: tuple[Counter[_Place], Counter[_Place]] = (Counter(), Counter())
    first: set[_Key] = set()
    for family in sorted(_families(places), key=lambda family: _order(family, seed)):
        filled = [place for key in family for place in places[key]]
        one, other = (sum(count[place] for place in filled) for count in counts)
        if one <= other:
            first |= family
        counts[one > other].update(filled)
    return (
        _only(constitution, "first half", lambda term: _key(term) in first),
        _only(constitution, "second half", lambda term: _key(term) not in first),
    )


def has_terms(constitution: Constitution) -> bool:
    """Whether there is anything to count; a half may be without."""
    return any(principle.lexicon.lists for principle in constitution.principles)


def _key(term: str) -> _Key:
    return tuple(tokenise(term))


def _families(keys: Iterable[_Key]) -> set[frozenset[_Key]]:
    """Keys of which one stands inside another, together."""
    family = {key: frozenset([key]) for key in keys}
    for key in list(family):
        for part in _parts(key):
            if part in family and family[part] is not family[key]:
                joined = family[part] | family[key]
                family |= dict.fromkeys(joined, joined)
    return set(family.values())


def _parts(key: _Key) -> Iterable[_Key]:
    for start in range(len(key)):
        for end in range(start + 1, len(key) + 1):
            yield key[start:end]


def _order(family: frozenset[_Key], seed: int) -> tuple[int, str]:
    """The largest come first, so that single terms even out what these leave uneven."""
    text = "\n".join([str(seed), *sorted(map(" ".join, family))])
    return -len(family), hashlib.sha256(text.encode()).hexdigest()


def _only(constitution: Constitution, name: str, keep: Callable[[str], bool]) -> Constitution:
    """The constitution with those of its terms that `keep` is true of."""

    def shortened(principle: Principle) -> Principle:
        lists = [
            replace(item, terms={k: tuple(filter(keep, v)) for k, v in item.terms.items()})
            for item in principle.lexicon.lists
        ]
        kept = tuple(item for item in lists if any(item.terms.values()))
        return replace(principle, lexicon=replace(principle.lexicon, lists=kept))

    name = f"{constitution.name}, {name}"
    principles = tuple(map(shortened, constitution.principles))
    given = zip(constitution.data["principles"], principles, strict=True)
    data = {**constitution.data, "name": name, "principles": [_data(*row) for row in given]}
    return replace(constitution, name=name, principles=principles, data=data)


def _data(given: dict[str, Any], principle: Principle) -> dict[str, Any]:
    lists = list(map(_list_data, principle.lexicon.lists))
    return {**given, "lexicon": {**given["lexicon"], "lists": lists}}


def _list_data(item: TermList) -> dict[str, Any]:
    terms = {language: list(terms) for language, terms in item.terms.items()}
    return {"id": item.id, "effect": item.effect, "terms": terms}

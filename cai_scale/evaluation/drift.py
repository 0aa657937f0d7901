"""What no critic sees: how the form of the answers has changed. No torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cai_scale.evaluation.compare import Answered, Measure
from cai_scale.evaluation.language import kept
from cai_scale.records import Prompt, Response
from cai_scale.statistics import rounded

BRACKETS = {")": "(", "]": "[", "}": "{"}
QUOTES = ('"', "“”", "«»")


def drift(answered: Sequence[Answered]) -> dict[str, Any]:
    """The figures of the answers before and after; None for what was not measured.

    Returns:
        `before` and `after`, each with
        words: the mean number of an answer's words;
        distinct: the mean over answers of different words ÷ words;
        unfinished, empty: how many answers were cut off, and how many have no word;
        rep_4: the mean over answers of four words or more of the share of their 4-grams that stood
            in the answer before (J. Welleck et al., "Neural text generation with unlikelihood
            training", 2019, seq-rep-4);
        distinct_2: different pairs of neighbouring words ÷ such pairs, over all answers together
            (J. Li et al., "A diversity-promoting objective function", 2016);
        broken: the share of answers with a quote or bracket that is not closed, or closes nothing;
        language_kept: the share in the language of the question, of those in English or Vietnamese
            that tell their language;
        relevance: the mean cosine with the question; perplexity: exp of the mean negative
            log-probability of all tokens under the base model; kl: the mean over all tokens of
            KL(policy‖base), in nats.
    """
    prompts = [a.prompt for a in answered]
    return {
        "before": _figures(
            prompts, [a.before for a in answered], [a.before_measure for a in answered]
        ),
        "after": _figures(
            prompts, [a.after for a in answered], [a.after_measure for a in answered]
        ),
    }


def repetition(words: Sequence[str], n: int = 4) -> float | None:
    """The share of a text's n-grams that stood in it before; None where it has none."""
    grams = list(_grams(words, n))
    return 1 - len(set(grams)) / len(grams) if grams else None


def broken(text: str, *, finished: bool) -> bool:
    """Whether a quote or a bracket is not closed, or closes nothing.

    An answer that was cut off may have some open at its end. Items as in "1) …" or "a) …", smileys
    and feet and inches (6'2") open nothing; apostrophes are no quotes.
    """
    open_brackets: list[str] = []
    quotes = dict.fromkeys(QUOTES, 0)
    for place, letter in enumerate(text):
        if letter in BRACKETS.values():
            open_brackets.append(letter)
        elif letter in BRACKETS:
            if open_brackets and open_brackets[-1] == BRACKETS[letter]:
                open_brackets.pop()
            elif not _is_label(text[:place]):
                return True
        elif letter == '"' and not text[:place][-1:].isdigit():
            quotes['"'] ^= 1
        else:
            for pair in QUOTES[1:]:
                quotes[pair] += (letter == pair[0]) - (letter == pair[1])
                if quotes[pair] < 0:
                    return True
    return finished and bool(open_brackets or any(quotes.values()))


def _is_label(before: str) -> bool:
    """Whether a text ends in what a bracket follows at the beginning of an item, or in a smiley."""
    word = before.rsplit(maxsplit=1)[-1] if before and not before[-1].isspace() else ""
    return word.strip("*_").isdigit() or len(word.strip("*_")) == 1 or word[-1:] in (":", ";", "-")


def _figures(
    prompts: Sequence[Prompt], responses: Sequence[Response], measures: Sequence[Measure]
) -> dict[str, Any]:
    words = [response.text.casefold().split() for response in responses]
    full = [w for w in words if w]
    pairs = [pair for w in words for pair in _grams(w, 2)]
    languages = (kept(p.language, r.text) for p, r in zip(prompts, responses, strict=True))
    texts = [r for r in responses if r.text.strip()]
    nll = _per_token(measures, [m.nll for m in measures])
    return {
        "words": _mean(len(w) for w in words),
        "distinct": _mean(len(set(w)) / len(w) for w in full),
        "unfinished": sum(not response.finished for response in responses),
        "empty": len(words) - len(full),
        "rep_4": _mean(repetition(w) for w in full),
        "distinct_2": rounded(len(set(pairs)) / len(pairs)) if pairs else None,
        "broken": _mean(broken(r.text, finished=r.finished) for r in texts),
        "language_kept": _mean(languages),
        "relevance": _mean(m.relevance for m in measures),
        "perplexity": None if nll is None else rounded(float(np.exp(nll))),
        "kl": _rounded(_per_token(measures, [m.kl for m in measures])),
    }


def _grams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _per_token(measures: Sequence[Measure], values: Sequence[float | None]) -> float | None:
    """The mean over all tokens of answers' means; None where none was measured."""
    given = [(v, m.tokens) for v, m in zip(values, measures, strict=True) if v is not None]
    if not sum(tokens for _, tokens in given):
        return None
    return float(np.average([v for v, _ in given], weights=[tokens for _, tokens in given]))


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return rounded(float(np.mean(given))) if given else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else rounded(value)

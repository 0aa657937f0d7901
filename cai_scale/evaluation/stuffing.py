"""Are the critic's words stuffed into the answers? How many there are, and how close. No torch.

In ordinary English about two words in a hundred please the default lexicon, and they stand apart;
who writes for the lexicon alone heaps them up.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cai_scale.constitution import Constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.evaluation.compare import Answered
from cai_scale.statistics import rounded

NEAR = 3  # words between two terms that crowd


def stuffing(answered: Sequence[Answered], constitution: Constitution) -> dict[str, Any]:
    """The terms that raise the lexicon's score, over all answers together.

    Returns:
        `before` and `after`, each with
        rate: terms in 100 words; None where there is no word;
        crowded: the share of terms with at most `NEAR` words since the term before, in [0, 1);
            None where there is no term.
    """
    critic = LexiconCritic(constitution)
    return {
        "before": _figures(critic, [a.before.text for a in answered]),
        "after": _figures(critic, [a.after.text for a in answered]),
    }


def _figures(critic: LexiconCritic, texts: Sequence[str]) -> dict[str, float | None]:
    words = sum(len(text.split()) for text in texts)
    terms = near = 0
    for text in texts:
        found = [term for term in critic.explain(text) if term.effect > 0]
        terms += len(found)
        near += sum(
            len(text[one.end : other.start].split()) <= NEAR for one, other in pairwise(found)
        )
    return {
        "rate": rounded(100 * terms / words) if words else None,
        "crowded": rounded(near / terms) if terms else None,
    }

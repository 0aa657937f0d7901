"""Before and after at equal length: what is left of a gain that longer answers give. No torch."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from cai_scale.critics import Critic
from cai_scale.evaluation.compare import Answered
from cai_scale.evaluation.paired import paired_scores

_WORD = re.compile(r"\S+")


def cut(text: str, words: int) -> str:
    """The first `words` words of a text, which are parted by white space; that stays as it is."""
    ends = [match.end() for match in itertools.islice(_WORD.finditer(text), words + 1)]
    return text if len(ends) <= words else text[: ends[words - 1] if words else 0]


def length_matched(answered: Sequence[Answered], critic: Critic) -> dict[str, Any]:
    """The critic's overall scores when both answers of a prompt are cut to the words of the
    shorter: see `paired`. Prompts with an empty answer are left out."""
    prompts = [a.prompt.text for a in answered]
    befores, afters = [], []
    for a in answered:
        words = min(len(a.before.text.split()), len(a.after.text.split()))
        befores.append(cut(a.before.text, words))
        afters.append(cut(a.after.text, words))
    return paired_scores(critic, prompts, befores, afters)

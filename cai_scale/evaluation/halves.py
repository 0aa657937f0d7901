"""Which half of the lexicon gains: the one that was trained on, or the other too. No torch."""

from collections.abc import Sequence
from typing import Any

from cai_scale.constitution import Constitution
from cai_scale.critics import HALF
from cai_scale.critics.halves import halves, has_terms
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.critics.weighted import parse
from cai_scale.evaluation.compare import Answered
from cai_scale.evaluation.paired import paired, paired_scores


def halves_gain(
    answered: Sequence[Answered], constitution: Constitution, trained: str
) -> dict[str, Any]:
    """Δ by each half of the lexicon: see `critics.halves`.

    A model that has learned what the principles mean gains by words that it was never rewarded
    for; one that has learned a list of words does not. That can be told only of a run that was
    trained on one half: of another, both halves were rewarded.

    Args:
        trained: the name of the critic that was trained on.

    Returns:
        `seen` and `unseen`, the first half and the second, each as of `paired`; with None in
        place of figures for a half that has no terms. `trained_on`: "half" or "all".
    """
    # A reward model may have learned the whole lexicon; a judge has not.
    names = {name for name, _ in parse(trained)}
    seen, unseen = (_gain(answered, half) for half in halves(constitution))
    trained_on = "half" if names - {"judge"} == {HALF} else "all"
    return {"seen": seen, "unseen": unseen, "trained_on": trained_on}


def _gain(answered: Sequence[Answered], half: Constitution) -> dict[str, Any]:
    if not has_terms(half):
        return paired([])
    before, after = [a.before.text for a in answered], [a.after.text for a in answered]
    return paired_scores(LexiconCritic(half), [a.prompt.text for a in answered], before, after)

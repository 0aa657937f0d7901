"""Several critics with weights: their names, and the mean of what they say."""

import re
from collections.abc import Sequence
from math import isfinite

from cai_scale.critics import Critic
from cai_scale.errors import ConfigError
from cai_scale.records import Score

# A plus or a star may stand in a path: only before a critic's name, or a number, does it count.
_PLUS = re.compile(r"\+(?=lexicon|judge|reward:)")
_TIMES = re.compile(r"(.+)\*(-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|-?inf)")


def parse(name: str) -> list[tuple[str, float]]:
    """The critics in a name such as "lexicon*0.5+reward:PATH*0.5", and their weights, which sum
    to 1; a critic without a weight has 1 before they are made to.

    Raises:
        ConfigError: a weight is not above 0, or two critics have one name.
    """
    found: dict[str, float] = {}
    for part in _PLUS.split(name):
        match = _TIMES.fullmatch(part)
        critic, weight = (match[1], float(match[2])) if match else (part, 1.0)
        if not 0 < weight < float("inf"):
            raise ConfigError(f"critic {part!r}: expected a weight above 0")
        if critic in found:
            raise ConfigError(f"critic {name!r} names {critic!r} twice; add the weights up")
        found[critic] = weight
    total = sum(found.values())
    if not isfinite(total):
        raise ConfigError(f"critic {name!r}: the weights are too large")
    return [(critic, weight / total) for critic, weight in found.items()]


class WeightedCritic:
    """The weighted mean of several critics; each principle's is over the critics that score it."""

    def __init__(
        self, name: str, parts: Sequence[tuple[Critic, float]], agreement: float = 0.0
    ) -> None:
        """
        Args:
            agreement: in [0, 1]; a response has no score where 1 less the range of what the
                critics give it overall is under this.
        """
        self.name = name
        self.parts = parts
        self.agreement = agreement

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        from cai_scale.critics.guard import Checked

        columns = [Checked(critic).score(prompts, responses) for critic, _ in self.parts]
        return [self._mean(scores) for scores in zip(*columns, strict=True)]

    def why(self, prompt: str, response: str) -> str:
        for critic, _ in self.parts:
            if critic.score([prompt], [response]) == [None]:
                return f"{critic.name}: {critic.why(prompt, response)}"
        return "the critics disagree"

    @property
    def spent(self) -> dict[str, float]:
        """What the critics have cost, of those that count that."""
        total: dict[str, float] = {}
        for critic, _ in self.parts:
            for name, value in getattr(critic, "spent", {}).items():
                total[name] = total.get(name, 0) + value
        return total

    def _mean(self, scores: Sequence[Score | None]) -> Score | None:
        given = [
            (score, weight, critic.name)
            for score, (critic, weight) in zip(scores, self.parts, strict=True)
            if score
        ]
        if len(given) < len(scores):
            return None
        votes = {name: score.overall for score, _, name in given}
        # Rounded as scores are, so that an agreement that is just reached counts.
        if round(1 - (max(votes.values()) - min(votes.values())), 9) < self.agreement:
            return None
        principles = dict.fromkeys(name for score, _, _ in given for name in score.principles)
        return Score(
            {
                name: _average(
                    [(s.principles[name], w) for s, w, _ in given if name in s.principles]
                )
                for name in principles
            },
            _average([(score.overall, weight) for score, weight, _ in given]),
            votes,
        )


def _average(values: Sequence[tuple[float, float]]) -> float:
    mean = sum(value * weight for value, weight in values) / sum(weight for _, weight in values)
    return round(mean, 9)  # as the lexicon's, so that 1 stays 1

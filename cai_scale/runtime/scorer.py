"""What a constitution's lexicon, and a bundle's reward model where it has one, say of answers."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cai_scale.constitution import Constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.runtime.bundle import Bundle


class Scorer:
    """Scores answers as records for JSON. Not thread-safe where there is a reward model."""

    def __init__(self, constitution: Constitution, bundle: Bundle | None = None) -> None:
        self.constitution = constitution
        self._sha256 = constitution.sha256
        self.lexicon = LexiconCritic(constitution)
        self.reward = None
        if bundle is not None and bundle.manifest.get("scorer") == "reward":
            from cai_scale.runtime.reward import RewardModel

            self.reward = RewardModel(bundle)

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], *, explain: bool = False
    ) -> list[dict[str, Any]]:
        """One record per (prompt, response), in order.

        Each holds `principles` (id to a score in [0, 1]) and `overall` (their weighted mean),
        both from the lexicon and None for an empty response; `constitution`, its SHA-256; and
        `scorer`, "lexicon" or "reward". With a reward model `reward` holds its `overall` and,
        where it scores each, its `principles`, or None for an empty response. With `explain`,
        `words` lists what the lexicon found: term, principle, list, effect, start, end.
        """
        records = [self._by_lexicon(response, explain) for response in responses]
        if self.reward is not None:
            scored = [i for i, record in enumerate(records) if record["overall"] is not None]
            rewards = self.reward.score(
                [prompts[i] for i in scored], [responses[i] for i in scored]
            )
            for record in records:
                record["reward"] = None
            for index, values in zip(scored, rewards, strict=True):
                records[index]["reward"] = self._rewarded(values)
        return records

    def _by_lexicon(self, response: str, explain: bool) -> dict[str, Any]:
        [score] = self.lexicon.score([""], [response])
        record: dict[str, Any] = {
            "principles": dict(score.principles) if score else None,
            "overall": score.overall if score else None,
            "constitution": self._sha256,
            "scorer": "reward" if self.reward else "lexicon",
        }
        if explain:
            record["words"] = [asdict(found) for found in self.lexicon.explain(response)]
        return record

    def _rewarded(self, values: dict[str, float]) -> dict[str, Any]:
        if "overall" in values:
            return {"overall": values["overall"]}
        return {"principles": values, "overall": self.constitution.overall(values)}

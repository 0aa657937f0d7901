"""Scores of a bundle: the constitution's lexicon, and the reward model where there is one."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.runtime.bundle import Bundle


class Scorer:
    """Scores by principle, with the words that moved them."""

    def __init__(self, bundle: Bundle) -> None:
        self.constitution = bundle.constitution
        self.kind = str(bundle.manifest.get("scorer", "lexicon"))
        self._lexicon = LexiconCritic(self.constitution)
        self._reward = None
        if self.kind == "reward":
            from cai_scale.runtime.reward import RewardModel

            self._reward = RewardModel(bundle)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """One object a (prompt, response), in order.

        `principles` and `overall` are the lexicon's, in [0, 1], None for a response without text;
        `words` are its terms, with offsets in Unicode characters; `reward` has the reward
        model's labels.
        """
        prompts, responses = [prompt for prompt, _ in pairs], [response for _, response in pairs]
        verdicts = self._lexicon.score(prompts, responses)
        scores: list[dict[str, Any]] = [
            {
                "principles": dict(verdict.principles) if verdict else None,
                "overall": verdict.overall if verdict else None,
                "words": [asdict(found) for found in self._lexicon.explain(response)],
            }
            for response, verdict in zip(responses, verdicts, strict=True)
        ]
        if self._reward is not None:
            rewards = self._reward.score(prompts, responses)
            for score, reward in zip(scores, rewards, strict=True):
                score["reward"] = reward
        return scores

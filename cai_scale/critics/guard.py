"""A guard for every critic: what it says is a score in [0, 1] for each response, or an error."""

from collections.abc import Mapping, Sequence

from cai_scale.critics import Critic
from cai_scale.errors import DataError
from cai_scale.records import Score


class Checked:
    """A critic whose scores are checked before anyone trains on them."""

    def __init__(self, critic: Critic) -> None:
        self.critic = critic
        self.name = critic.name

    @property
    def spent(self) -> Mapping[str, float]:
        """What the critic has cost, where it counts that."""
        found: Mapping[str, float] = getattr(self.critic, "spent", {})
        return found

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """What the critic says.

        Raises:
            DataError: a score is NaN, infinite or outside [0, 1], or there are too many or too
                few; rows count from 1.
        """
        scores = self.critic.score(prompts, responses)
        if len(scores) != len(responses):
            raise DataError(
                f"critic {self.name} gave {len(scores)} scores for {len(responses)} responses; "
                f"mend it, or use another"
            )
        for row, score in enumerate(scores, 1):
            if score is not None:
                for what, value in (("overall", score.overall), *score.principles.items()):
                    if not 0.0 <= value <= 1.0:  # so that a NaN fails
                        raise DataError(
                            f"critic {self.name} gave {value} for {what!r} of row {row}, expected "
                            f"a number from 0 to 1; mend it, or use another"
                        )
        return scores

    def why(self, prompt: str, response: str) -> str:
        return self.critic.why(prompt, response)

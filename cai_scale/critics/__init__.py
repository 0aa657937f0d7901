"""Critics: a prompt and a response go in, a score in [0, 1] per principle comes out."""

from collections.abc import Sequence
from typing import Protocol

from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError
from cai_scale.records import Score

NAMES = ("lexicon",)


class Critic(Protocol):
    """Scores responses; `None` stands for an empty response, which has no score."""

    name: str

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """One score per (prompt, response), in order."""
        ...


def load_critic(name: str, constitution: Constitution) -> Critic:
    """The critic of that name.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name == "lexicon":
        from cai_scale.critics.lexicon import LexiconCritic

        return LexiconCritic(constitution)
    raise ConfigError(f"unknown critic {name!r}; choose one of: {', '.join(NAMES)}")


def check(name: str, constitution: Constitution, policy: str) -> None:
    load_critic(name, constitution)


def identity(name: str) -> dict[str, str]:
    return {"name": name}

"""Critics: a prompt and a response go in, a score in [0, 1] per principle comes out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError
from cai_scale.records import Preference, Score

if TYPE_CHECKING:
    from cai_scale.critics.judge import Judge, Settings

NAMES = ("lexicon", "lexicon:half", "judge", "reward:PATH")
HALF = "lexicon:half"  # of the terms; what it does to the other half can then be told
LEXICONS = ("lexicon", HALF)
JUDGE = "judge"


# Why there is no score, or no preference: what the audit counts by itself begins so.
EMPTY = "empty answer"
INVALID = "no valid reply"
DISAGREE = "the orders disagree"


class Critic(Protocol):
    """Scores responses; `None` stands for one that has no score: an empty one, for example."""

    name: str

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score | None]:
        """One score per (prompt, response), in order."""
        ...

    def why(self, prompt: str, response: str) -> str:
        """Why a response has no score."""
        ...


@runtime_checkable
class Comparer(Protocol):
    """Says which of two responses to a prompt is better."""

    name: str

    def compare(
        self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]
    ) -> list[Preference]:
        """One preference per (prompt, first, second), in order."""
        ...


def load_critic(
    name: str,
    constitution: Constitution,
    model: str | None = None,
    *,
    judge: "Judge | None" = None,
    agreement: float = 0.0,
) -> Critic:
    """The critic of that name, guarded; its weights are loaded when it first scores.

    Args:
        name: "lexicon"; "lexicon:half", its first half (`critics.halves`); "judge";
            "reward:PATH", a reward model's run, its folder, or a bundle that has one; or several
            with weights, such as "lexicon*0.5+reward:PATH*0.5".
        model: the policy's; a reward model must read text as it does.
        judge: what "judge" stands for.
        agreement: see `WeightedCritic`.

    Raises:
        CaiError: there is no such critic, or it does not fit the constitution or the policy.
    """
    from cai_scale.critics.guard import Checked
    from cai_scale.critics.weighted import WeightedCritic, parse

    parts = [(_load(part, constitution, model, judge), weight) for part, weight in parse(name)]
    return Checked(parts[0][0] if len(parts) == 1 else WeightedCritic(name, parts, agreement))


def check(
    name: str,
    constitution: Constitution,
    model: str | None = None,
    judge: "Settings | None" = None,
) -> None:
    """Complain about a critic without loading its weights.

    Args:
        judge: the settings of a judge, which is asked for where `name` has one.

    Raises:
        CaiError: as `load_critic`; or a judge cannot be asked.
    """
    from cai_scale.critics.weighted import parse

    for part, _ in parse(name):
        if part == JUDGE and judge is not None:
            from cai_scale.critics.judge import check

            check(judge)
        else:
            _load(part, constitution, model, None)


def identity(name: str, judge: "Settings | None" = None) -> dict[str, str]:
    """The SHA-256 of each reward model in a critic, by its name; a lexicon is the constitution's.
    A judge is known by the name of its model.

    Raises:
        CaiError: there is no such critic, or its files are missing.
    """
    from cai_scale.critics.weighted import parse

    return {part: _identity(part, judge) for part, _ in parse(name) if part not in LEXICONS}


def _load(
    name: str, constitution: Constitution, model: str | None, judge: "Judge | None"
) -> Critic:
    kind, _, path = name.partition(":")
    if name == "lexicon":
        from cai_scale.critics.lexicon import LexiconCritic

        return LexiconCritic(constitution)
    if name == HALF:
        return _half(constitution)
    if name == JUDGE and judge is not None:
        return judge
    if kind == "reward" and path:
        from cai_scale.critics.reward import load

        return load(name, path, constitution, model)
    raise unknown(name)


def _half(constitution: Constitution) -> Critic:
    from cai_scale.critics.halves import halves, has_terms
    from cai_scale.critics.lexicon import LexiconCritic

    first, second = halves(constitution)
    if not has_terms(second):
        raise ConfigError(
            f"critic {HALF}: constitution {constitution.name} has no list of two terms to split; "
            f"use lexicon"
        )
    critic = LexiconCritic(first)
    critic.name = HALF
    return critic


def _identity(name: str, judge: "Settings | None") -> str:
    if name == JUDGE and judge is not None:
        from cai_scale.critics.judge import model_of

        return model_of(judge).name
    kind, _, path = name.partition(":")
    if kind != "reward" or not path:
        raise unknown(name)
    from cai_scale.critics.reward import identity

    return identity(path)


def unknown(name: str) -> ConfigError:
    """The error for a critic that there is not."""
    return ConfigError(
        f"unknown critic {name!r}; choose one of: {', '.join(NAMES)}, or several with weights, "
        f"such as lexicon*0.5+reward:PATH*0.5"
    )

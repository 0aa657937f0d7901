"""How far a figure of the audit may go before the pairs are warned about, or refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from cai_scale.errors import GateError
from cai_scale.statistics import wilson

Range = tuple[float, float]  # a share from its lower to its upper end is in order; both are beyond

NEVER: Range = (-inf, inf)
LEAST = 20  # cases from which on a share is worth a warning


@dataclass(frozen=True)
class Limit:
    """The ranges of a figure, what it means to be beyond them, and what can be done."""

    figure: str
    warn: Range
    refuse: Range
    means: str
    remedy: str


def _under(high: float) -> Range:
    return -inf, high


def _over(low: float) -> Range:
    return low, inf


LIMITS = (
    # Half is what chance gives. Beyond nine in ten the attribute is all that the pairs teach.
    Limit(
        "chosen_cooler",
        (0.3, 0.7),
        (0.1, 0.9),
        "the pairs teach the temperature",
        "sample at --temperatures that are nearer to each other",
    ),
    Limit(
        "chosen_longer",
        (0.3, 0.7),
        (0.1, 0.9),
        "the pairs teach length",
        "use a critic that does not go by length, or pair answers of like length",
    ),
    # Built pairs have none. A critic that is asked again reverses some when it is noisy; a
    # fiftieth of reversed labels is where they stop being a few slips.
    Limit(
        "inverted",
        _under(0.001),
        _under(0.02),
        "the chosen answer has the lower score",
        "restore the file, or build the pairs anew",
    ),
    Limit(
        "flip_rate",
        _under(0.001),
        _under(0.02),
        "the critic, asked again, reverses the label",
        "build the pairs anew, or find out who changed them",
    ),
    # What hardly differs teaches noise; a prompt that occurs twice counts twice, which some data
    # is meant to.
    Limit(
        "alike_answers",
        _under(0.02),
        _under(0.1),
        "chosen and rejected are nearly the same text",
        "raise --margin, or sample at higher --temperatures",
    ),
    Limit(
        "alike_prompts",
        _under(0.02),
        _under(0.25),
        "the prompt is nearly an earlier one",
        "remove prompts that occur twice",
    ),
    # What is lost is not lost by chance: long, odd or delicate answers go first.
    Limit(
        "parse_failures",
        _under(0.05),
        _under(0.3),
        "the judge gives no valid reply",
        "use a judge that keeps to the schema, or one with more tokens to reply",
    ),
    Limit(
        "abstentions",
        _under(0.2),
        _under(0.6),
        "the critic gives no label",
        "read refused.jsonl for the reasons, and mend the commonest",
    ),
    Limit(
        "ties",
        _under(0.5),
        NEVER,
        "the critic tells no difference",
        "use a finer critic, more --samples, or higher --temperatures",
    ),
    # A judge that tosses a coin disagrees with itself in half of the comparisons, and every other
    # label of the rest is a coin too.
    Limit(
        "disagreements",
        _under(0.2),
        _under(0.4),
        "the verdict depends on the order of the answers",
        "use a stronger judge, or a clearer constitution",
    ),
    # Of pairs that both order, two coins agree on half.
    Limit(
        "agreement",
        _over(0.7),
        _over(0.5),
        "two critics order the pairs differently",
        "leave one of them out, or let a disagreement abstain",
    ),
    # Only better ones are kept, so this harms no pair: it says that revising is wasted.
    Limit(
        "revisions_better",
        _over(0.1),
        NEVER,
        "revisions are hardly ever better",
        "save their time with --revisions 0",
    ),
)


@dataclass(frozen=True)
class Finding:
    """A figure beside its limit: its share of `of` cases, and "ok", "warn" or "refuse"."""

    limit: Limit
    value: float
    of: int
    level: str

    @property
    def text(self) -> str:
        """The figure, its limit, what that means and what can be done, in one line."""
        bound = shown(self.limit.refuse if self.level == "refuse" else self.limit.warn)
        verb = "refused" if self.level == "refuse" else "warned"
        return (
            f"{self.limit.figure} is {self.value:.4f} of {self.of}, {verb} {bound}: "
            f"{self.limit.means}; {self.limit.remedy}"
        )


def judge(figures: Mapping[str, Any]) -> list[Finding]:
    """The figures that have a limit and a value, each with its level.

    A share warns where it lies beyond its range, from 20 cases on. It refuses only where the
    nearer end of its 95 % Wilson interval does, so that chance does not: of few cases hardly any
    share refuses.
    """
    return [
        Finding(limit, figures[limit.figure], of, _level(limit, figures[limit.figure], of))
        for limit in LIMITS
        if figures.get(limit.figure) is not None
        for of in [figures["out_of"][limit.figure]]
    ]


def require_sound(findings: Sequence[Finding], remedy: str) -> None:
    """Refuse pairs that a finding refuses.

    Raises:
        GateError: with each such figure, its limit and what can be done.
    """
    refused = [finding.text for finding in findings if finding.level == "refuse"]
    if refused:
        raise GateError(f"the audit refuses the pairs: {'; '.join(refused)}; {remedy}")


def shown(bound: Range) -> str:
    """A range's far side, in words."""
    low, high = bound
    if bound == NEVER:
        return "never"
    if low == -inf:
        return f"from {high:g}"
    return f"to {low:g}" if high == inf else f"outside {low:g} to {high:g}"


def _level(limit: Limit, value: float, of: int) -> str:
    low, high = wilson(value * of, of) or (value, value)
    if low >= limit.refuse[1] or high <= limit.refuse[0]:
        return "refuse"
    beyond = value >= limit.warn[1] or value <= limit.warn[0]
    return "warn" if beyond and of >= LEAST else "ok"

"""Which judge, how it is asked, and what it may cost."""

from dataclasses import dataclass, replace

MODES = ("absolute", "pairwise", "logprob", "letter")
PRINCIPLES = ("all", "one")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings `--judge_…` by the same names, where each is explained."""

    url: str | None = None
    model: str | None = None
    mode: str = "absolute"
    principles: str = "all"
    thinking: bool = False
    concurrency: int = 16
    deadline: float = 300.0
    reply_tokens: int = 256
    max_tokens: int | None = None
    max_cost: float | None = None
    prices: tuple[float, ...] = ()

    def shared(self, among: int) -> "Settings":
        """With a share of the budget."""
        return replace(
            self,
            max_tokens=self.max_tokens and max(1, self.max_tokens // among),
            max_cost=self.max_cost and self.max_cost / among,
        )

    @property
    def by_letter(self) -> bool:
        """Whether it answers with A or B, to one principle at a time."""
        return self.mode in ("logprob", "letter")

    @property
    def compares(self) -> bool:
        """Whether it is asked which of two answers is better."""
        return self.mode != "absolute"

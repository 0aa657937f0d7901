"""What a judge may cost: tokens and money, counted as replies come."""

from cai_scale.critics.judge.journal import NOTHING, Spent
from cai_scale.errors import BudgetError


class Budget:
    """Counts what was spent, and ends the asking where it is enough.

    Questions that are under way when the limit is met are finished, with their retries, and paid
    for: up to one a unit of concurrency.
    """

    def __init__(
        self,
        *,
        tokens: int | None = None,
        money: float | None = None,
        prices: tuple[float, ...] = (),
        spent: Spent = NOTHING,
    ) -> None:
        """
        Args:
            tokens, money: the limits; none where None. `money` is in the unit of `prices`.
            prices: of a million tokens that are read, and of a million that are written.
            spent: by earlier starts.
        """
        self.tokens, self.limit, self.prices = tokens, money, prices
        self.spent = self._before = spent

    def add(self, spent: Spent) -> None:
        self.spent += spent

    @property
    def money(self) -> float | None:
        """What the tokens cost; None where the prices are not known."""
        if not self.prices:
            return None
        price_in, price_out = self.prices
        return (price_in * self.spent.tokens_in + price_out * self.spent.tokens_out) / 1e6

    def check(self) -> None:
        """Raises `BudgetError` where a limit is reached."""
        for what, spent, limit in (
            ("tokens", self.spent.tokens, self.tokens),
            ("cost", self.money, self.limit),
        ):
            if limit is not None and spent is not None and spent >= limit:
                raise BudgetError(
                    f"the judge's budget is spent: {self} of --judge_max_{what} {limit:g}; raise "
                    f"it and continue, a run with --resume: the journal has every verdict"
                )

    def rate(self, seconds: float) -> str:
        """Calls a second of this start, and what was spent by all."""
        return f"{(self.spent.calls - self._before.calls) / seconds:.0f} calls/s, {self}"

    def __str__(self) -> str:
        money = "" if self.money is None else f", {self.money:.4g} paid"
        return f"{self.spent.tokens:,} tokens{money}"

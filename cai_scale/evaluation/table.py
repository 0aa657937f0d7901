"""The source's table, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cai_scale.constitution import Constitution


def rows(comparison: Mapping[str, Any], constitution: Constitution) -> list[tuple[str, ...]]:
    """(title, before, after, Δ, Δ %, 95 % interval) per principle, then overall, as texts."""
    before, after, delta = (comparison[key] for key in ("before", "after", "delta"))
    lines = [
        _row(
            principle.title[constitution.languages[0]],
            before["principles"][principle.id],
            after["principles"][principle.id],
            delta["principles"][principle.id],
            delta["principles_ci95"][principle.id],
        )
        for principle in constitution.principles
    ]
    overall = (before["overall"], after["overall"], delta["overall"], delta["ci95"])
    return [*lines, _row("Overall", *overall)]


def print_summary(summary: Mapping[str, Any], constitution: Constitution) -> None:
    """Print the comparison, the slices, and the wins."""
    table = Table(
        title=escape(f"{summary['method']} on {summary['model']}, {summary['n']} prompts")
    )
    for column in ("", "before", "after", "Δ", "Δ %", "95 % interval of Δ"):
        table.add_column(column, justify="right" if column else "left")
    *principles, overall = rows(summary, constitution)
    for row in principles:
        table.add_row(*map(escape, row))
    table.add_section()
    table.add_row(*map(escape, overall), style="bold")
    for kind in ("language", "category"):
        for name, part in summary["slices"][kind].items():
            title, *figures = rows(part, constitution)[-1]
            row = (f"{title}, {name} (n = {part['n']})", *figures)
            table.add_row(*map(escape, row))
    console = Console(width=100)
    console.print(table)
    n, scored = summary["n"], summary["scored"]
    if scored < n:
        console.print(f"means over {scored} prompts: {n - scored} have an empty answer")
    shares = "   ".join(
        f"{name} {summary[key]} ({summary[key] / n:.0%})"
        for name, key in (("wins", "win"), ("losses", "loss"), ("ties", "tie"))
    )
    console.print(shares)


def _row(
    title: str,
    before: float | None,
    after: float | None,
    delta: float | None,
    interval: list[float] | None,
) -> tuple[str, ...]:
    if before is None or after is None or delta is None:
        return (title, *["–"] * 5)
    percent = f"{delta / before:+.1%}" if before else "–"
    shown = "[{:+.4f}, {:+.4f}]".format(*interval) if interval else "–"
    return (title, f"{before:.4f}", f"{after:.4f}", f"{delta:+.4f}", percent, shown)

"""The figures of a summary as rows of text: for the terminal, for the page, and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cai_scale.constitution import Constitution

HEADINGS = ("", "before", "after", "Δ", "Δ %", "95 % interval of Δ")
VERDICTS = {
    "supported": "The gain is supported",
    "weak": "The gain is weak",
    "gamed": "The gain looks gamed",
    "none": "There is no gain",
}
SHARES = (("win", "wins"), ("loss", "losses"), ("tie", "ties"))
DRIFT = {  # the figure's label and decimals, and whether more (+1) or less (-1) of it is worse
    "words": ("words per answer", 1, 0),
    "distinct": ("distinct words ÷ words", 3, -1),
    "distinct_2": ("distinct pairs of words ÷ pairs", 3, -1),
    "rep_4": ("repeated runs of four words", 3, 1),
    "broken": ("answers with open quotes or brackets", 3, 1),
    "unfinished": ("answers cut off", 0, 1),
    "empty": ("empty answers", 0, 1),
    "relevance": ("relevance to the prompt", 3, -1),
    "language_kept": ("answers in the prompt's language", 3, -1),
    "perplexity": ("perplexity under the base model", 2, 1),
    "kl": ("KL to the base model, nats a token", 3, 0),
}
SAFETY = {
    ("unsafe", "refused"): "unsafe prompts refused",
    ("unsafe", "warned"): "unsafe prompts warned of",
    ("safe_looks_unsafe", "refused"): "safe prompts refused that look unsafe",
}
REWARD = {
    "accuracy": "accuracy",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ece": "calibration error",
}

Row = tuple[str, ...]
Summary = Mapping[str, Any]


class Change(NamedTuple):
    """A figure before and after as texts, and whether it became worse."""

    label: str
    before: str
    after: str
    change: str
    worse: bool


def rows(comparison: Summary, constitution: Constitution) -> list[Row]:
    """(title, before, after, Δ, Δ %, 95 % interval) per principle, then overall, as texts."""
    before, after, delta = (comparison[key] for key in ("before", "after", "delta"))
    lines = [
        _row(
            titles(constitution)[principle.id],
            before["principles"][principle.id],
            after["principles"][principle.id],
            delta["principles"][principle.id],
            delta["principles_ci95"][principle.id],
        )
        for principle in constitution.principles
    ]
    overall = (before["overall"], after["overall"], delta["overall"], delta["ci95"])
    return [*lines, _row("Overall", *overall)]


def titles(constitution: Constitution) -> dict[str, str]:
    """The title of each principle, in the constitution's own language."""
    return {p.id: p.title[constitution.languages[0]] for p in constitution.principles}


def beside(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """What stands beside the overall Δ, by its title, as far as it was measured: n, before, after,
    delta, ci95."""
    halves = summary.get("halves") or {}
    names = ("half trained on", "half not trained on")
    seen, unseen = names if halves.get("trained_on") == "half" else ("first half", "second half")
    found = {
        "Overall at equal length": summary.get("length_matched"),
        "Supported score": summary.get("supported"),
        f"Lexicon, {seen}": halves.get("seen"),
        f"Lexicon, {unseen}": halves.get("unseen"),
    }
    return {title: part for title, part in found.items() if part and part["delta"] is not None}


def beside_rows(summary: Summary) -> list[Row]:
    """`beside` as `rows`."""
    return [
        _row(
            f"{title} (n = {part['n']})" if "n" in part else title,
            *(part.get(key) for key in ("before", "after", "delta", "ci95")),
        )
        for title, part in beside(summary).items()
    ]


def slices(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """The comparison of each slice, by its kind and name; older summaries have languages alone."""
    found = summary.get("slices", {})
    kinds = found if not found or "language" in found else {"language": found}
    return {f"{kind}: {name}": part for kind in kinds for name, part in kinds[kind].items()}


def slice_rows(summary: Summary, constitution: Constitution) -> list[Row]:
    """The overall row of each slice."""
    return [
        (f"{name.replace('_', ' ')} (n = {part['n']})", *rows(part, constitution)[-1][1:])
        for name, part in slices(summary).items()
    ]


def drift_rows(summary: Summary) -> list[Change]:
    """What was measured of the answers besides scores."""
    before, after = (summary["drift"][when] for when in ("before", "after"))
    return [
        _change(label, before[key], after[key], decimals, worse)
        for key, (label, decimals, worse) in DRIFT.items()
        if before.get(key) is not None and after.get(key) is not None
    ]


def safety_rows(summary: Summary) -> list[Change]:
    """Refusals and warnings, as counts of so many."""
    found = summary.get("safety") or {}
    return [
        _change(f"{label} (n = {found[kind]['n']})", *_counts(found[kind][what]), 0, worse)
        for (kind, what), label in SAFETY.items()
        for worse in [-1 if kind == "unsafe" else 1]
        if kind in found
    ]


def print_summary(summary: Summary, constitution: Constitution) -> None:
    """Print the comparison, what stands beside it, the slices, the wins, and the verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(heading(summary)))
    for column in HEADINGS:
        table.add_column(column, justify="right" if column else "left")
    *principles, overall = rows(summary, constitution)
    for row in principles:
        table.add_row(*map(escape, row))
    table.add_section()
    table.add_row(*map(escape, overall), style="bold")
    for row in beside_rows(summary):
        table.add_row(*map(escape, row))
    table.add_section()
    for row in slice_rows(summary, constitution):
        table.add_row(*map(escape, row))
    console = Console(width=100)
    console.print(table)
    for line in (*unscored(summary), "   ".join(wins(summary)), *verdict(summary)):
        console.print(escape(line), highlight=False)


def markdown(summary: Summary, constitution: Constitution) -> str:
    """The same as Markdown, with drift and safety; or the figures of a reward model."""
    if "reward" in summary:
        return _reward_markdown(summary, constitution)
    (*principles, overall), changes = rows(summary, constitution), _changes(summary)
    first, *reasons = verdict(summary) or [""]
    parts = [
        f"# {_escaped(heading(summary))}",
        f"**{_escaped(first)}**" if first else "",
        "\n".join(f"- {_escaped(reason)}" for reason in reasons),
        _table(HEADINGS, [*principles, overall, *beside_rows(summary)], {len(principles)}),
        _escaped("\n".join([", ".join(wins(summary)), *unscored(summary)])),
        _table(("drift", "before", "after", "change", ""), changes),
        _table(("slice", *HEADINGS[1:]), slice_rows(summary, constitution)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(summary: Summary) -> str:
    return f"{summary['method']} on {summary['model']}, {summary['n']} prompts"


def wins(summary: Summary) -> list[str]:
    """Wins, losses and ties, with their intervals where these are there."""
    return [
        f"{name} {summary[key]} ({summary[key] / summary['n']:.0%}"
        + (", {:.0%} to {:.0%})".format(*ends) if (ends := summary.get(f"{key}_ci95")) else ")")
        for key, name in SHARES
    ]


def unscored(summary: Summary) -> list[str]:
    """A line about the prompts that have no figures, if there are such."""
    n, scored = summary["n"], summary["scored"]
    return (
        [f"means over {scored} prompts: {n - scored} have an answer without a score"]
        if scored < n
        else []
    )


def verdict(summary: Summary) -> list[str]:
    """The verdict on the gain in words, and its reasons; nothing where there is none."""
    gain = summary.get("gain")
    return [VERDICTS[gain["verdict"]], *gain["reasons"]] if gain else []


def _reward_markdown(summary: Summary, constitution: Constitution) -> str:
    names, figures = titles(constitution), summary["reward"]
    lines = [
        (
            names.get(label, label),
            str(row["pairs"]),
            *("–" if row[key] is None else f"{row[key]:.4f}" for key in REWARD),
        )
        for label, row in figures["labels"].items()
    ]
    said = f"{summary['method']} on {summary['model']}, {figures['n']} held-out answers"
    return f"# {_escaped(said)}\n\n{_table(('', 'pairs', *REWARD.values()), lines)}\n"


def _changes(summary: Summary) -> list[Row]:
    return [
        (*change[:4], "worse" if change.worse else "")
        for change in (*drift_rows(summary), *safety_rows(summary))
    ]


def _change(label: str, before: float, after: float, decimals: int, worse: int) -> Change:
    change = round(after, decimals) - round(before, decimals)
    return Change(
        label,
        f"{before:.{decimals}f}",
        f"{after:.{decimals}f}",
        f"{change:+.{decimals}f}" if change else "0",
        change * worse > 0,
    )


def _counts(found: Mapping[str, int]) -> tuple[int, int]:
    return found["before"], found["after"]


def _table(
    headings: Sequence[str], lines: Sequence[Row], bold: Sequence[int] | set[int] = ()
) -> str:
    if not lines:
        return ""
    shown = [
        [f"**{cell}**" if place in bold else cell for cell in map(_escaped, line)]
        for place, line in enumerate(lines)
    ]
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, rule, *shown])


def _escaped(text: str) -> str:
    """Text in which Markdown finds neither markup nor the end of a cell."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in text)


def _row(
    title: str,
    before: float | None,
    after: float | None,
    delta: float | None,
    interval: Sequence[float] | None,
) -> Row:
    if before is None or after is None or delta is None:
        return (title, *["–"] * 5)
    percent = f"{delta / before:+.1%}" if before else "–"
    shown = "[{:+.4f}, {:+.4f}]".format(*interval) if interval else "–"
    return (title, f"{before:.4f}", f"{after:.4f}", f"{delta:+.4f}", percent, shown)

"""Text for a terminal: wrapped to its width, coloured only where somebody looks at it."""

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1, "dim": 2}
WIDEST = 100


def wrapped(text: str, first: str = "", rest: str | None = None) -> str:
    """The text in lines that fit, which begin with `first` and then with `rest`.

    Line breaks of the text are kept. Control characters, which could move a terminal's cursor
    or change its title, are shown as spaces.
    """
    rest = first if rest is None else rest
    width = max(40, min(WIDEST, shutil.get_terminal_size().columns))
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        shown = "".join(letter if letter.isprintable() else " " for letter in line)
        start = rest if lines else first
        lines += textwrap.wrap(
            shown,
            width,
            initial_indent=start,
            subsequent_indent=rest,
            break_on_hyphens=False,
            break_long_words=False,
        ) or [start.rstrip()]
    return "\n".join(lines)


def coloured(text: str, colour: str) -> str:
    """The text in a colour of `COLOURS`, where standard output is a terminal."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if sys.stdout.isatty() else text


def progress_bar(shown: bool) -> "Progress":
    """A bar with the count, a text `rate` of the task's own, the time taken and the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )

"""The report's charts, by matplotlib: for a page whose colours they take, or as one picture."""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Estimate = tuple[str, float, Sequence[float] | None]  # a label, Δ, and its interval
Axes = Any  # of matplotlib, which is imported where it is needed
Draw = Callable[[Axes], None]

# By their name in the page's style: on light and on dark. Blue and orange are told apart with any
# colour vision; no two share a light colour, which stands for the name while a chart is drawn.
COLOURS = {
    "page": ("#f8f7f4", "#14171a"),
    "card": ("#fffffe", "#1c2024"),
    "line": ("#dcdad4", "#363c42"),
    "ink": ("#20242a", "#e9e7e2"),
    "quiet": ("#646a72", "#9aa1a9"),
    "before": ("#8c939c", "#7f8893"),
    "after": ("#1f66ad", "#6db3f2"),
    "worse": ("#b8500c", "#f2a261"),
    "up": ("#d9e8f7", "#173a5c"),
    "down": ("#fbe3d0", "#552c0c"),
}
PAGE, CARD, LINE, INK, QUIET, BEFORE, AFTER, WORSE, *_ = (light for light, _ in COLOURS.values())
WIDTH = 4.4  # inches; a phone shows it at about its own size
DOTS = 160  # an inch of a picture
BINS = 25
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own fonts
    "svg.hashsalt": "cai_scale",  # the same figures give the same file
    "text.parse_math": False,  # a title's dollar sign is one
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def svg(name: str, draw: Draw, height: float) -> str:
    """A chart as an element of a page, which has `COLOURS` as variables of its style.

    Args:
        name: letters and hyphens, no other chart's of the page.
        height: in inches, for a width of `WIDTH`.
    """
    with _style():
        figure = _figure(WIDTH, height)
        draw(figure.subplots())
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None}, transparent=True)
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", head)
    text = f'{head} role="img" aria-labelledby="{name}">{rest}'
    # Elements are known by their ids in the whole page.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{colour})")
    return text


def picture(title: str, draws: Sequence[tuple[Draw, float]]) -> bytes:
    """Charts under one another in two columns, as a PNG; each with its height in inches."""
    lines = [draws[i : i + 2] for i in range(0, len(draws), 2)]
    heights = [max(height for _, height in line) for line in lines]
    with _style():
        figure = _figure(2 * WIDTH, sum(heights) + 0.5)
        figure.suptitle(title, fontweight="bold")
        grid = figure.subfigures(len(lines), 2, squeeze=False, height_ratios=heights)
        for (draw, _), part in zip(draws, grid.flat, strict=False):
            draw(part.subplots())
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=DOTS, facecolor=CARD)
    return content.getvalue()


def estimates(rows: Sequence[Estimate], title: str = "") -> Draw:
    """Each Δ with its interval, and a line at 0."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=QUIET, linewidth=1)
        for place, (_, delta, ends) in enumerate(rows):
            colour = AFTER if delta >= 0 else WORSE
            if ends:
                axes.plot(ends, [place, place], color=colour, linewidth=2.5, alpha=0.55)
            axes.plot(delta, place, "o", color=colour, markersize=6.5)
            _annotate(axes, place, f"{delta:+.3f}".replace("-", "−"))
        _labels(axes, [label for label, _, _ in rows])
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=title, xlabel="Δ of the mean score, and its 95 % interval")

    return draw


def scores(rows: Sequence[tuple[str, float, float]], title: str = "") -> Draw:
    """The mean score before and after, by label."""

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        for place, (_, before, after) in zip(places, rows, strict=True):
            axes.plot([before, after], [place, place], color=LINE, linewidth=3, zorder=1)
        axes.scatter([row[1] for row in rows], places, s=42, color=BEFORE, label="before")
        axes.scatter([row[2] for row in rows], places, s=42, color=AFTER, label="after")
        _labels(axes, [row[0] for row in rows])
        axes.set(title=title, xlabel="mean score, of 0 to 1")
        _legend(axes)

    return draw


def distributions(before: Sequence[float], after: Sequence[float], title: str = "") -> Draw:
    """How many answers have which score."""

    def draw(axes: Axes) -> None:
        import numpy as np

        ends = min([*before, *after]), max([*before, *after])
        edges = np.histogram_bin_edges([], BINS, (ends[0] - 0.005, ends[1] + 0.005))
        axes.hist(before, edges, color=BEFORE, alpha=0.5, label="before")
        axes.hist(after, edges, color=AFTER, histtype="step", linewidth=2, label="after")
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="y", labelcolor=QUIET)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="overall score of an answer", ylabel="answers")
        _legend(axes)

    return draw


def shares(
    rows: Sequence[tuple[str, int, Sequence[float] | None]], n: int, title: str = ""
) -> Draw:
    """Wins, losses and ties as shares of `n` prompts, with their intervals, which are shares."""

    def draw(axes: Axes) -> None:
        colours = {"win": AFTER, "loss": WORSE}
        for place, (name, count, ends) in enumerate(rows):
            axes.barh(place, count / n, 0.56, color=colours.get(name, BEFORE))
            if ends:
                axes.plot(ends, [place, place], color=INK, linewidth=1.5, marker="|", markersize=8)
            _annotate(axes, place, f"{count} ({count / n:.0%})")
        _labels(axes, [name for name, _, _ in rows])
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set(title=title, xlim=(0, 1), xlabel="of the prompts, with the 95 % interval")

    return draw


def curve(points: Sequence[tuple[float, float]], title: str, kept: float | None = None) -> Draw:
    """A figure of the training over its steps; `kept` is the step whose state was kept."""

    def draw(axes: Axes) -> None:
        marker = "o" if len(points) < 25 else ""
        axes.plot(*zip(*points, strict=True), color=AFTER, marker=marker, markersize=4)
        if kept is not None:
            axes.axvline(kept, color=WORSE, linewidth=1.5, linestyle=(0, (4, 2)))
            axes.plot(kept, dict(points)[kept], "o", color=WORSE, markersize=9)
        said = "" if kept is None else f"; kept: step {kept:g}"
        axes.set(title=title + said, xlabel="step")
        axes.tick_params(axis="y", labelcolor=QUIET)

    return draw


def against_length(points: Sequence[tuple[float, float]], title: str) -> Draw:
    """For each prompt the difference in words and Δ overall."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.axvline(0, color=QUIET, linewidth=0.8)
        words, deltas = zip(*points, strict=True)
        axes.scatter(words, deltas, s=22, color=AFTER, alpha=0.45, linewidths=0)
        axes.tick_params(axis="y", labelcolor=QUIET)
        axes.set(title=title, xlabel="words more or fewer than before", ylabel="Δ overall")

    return draw


def rows_high(count: int) -> float:
    """The height, in inches, of a chart with a line for each of `count` labels."""
    return 1.1 + 0.32 * count


def _labels(axes: Axes, labels: Sequence[str]) -> None:
    short = [label if len(label) <= 28 else label[:27] + "…" for label in labels]
    axes.set_yticks(range(len(labels)), short)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _annotate(axes: Axes, place: float, text: str) -> None:
    """A text beside a line of the chart."""
    within = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1, place), xytext=(4, 0), va="center", fontsize=9, **within)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=1)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Of letters that matplotlib's own font does not have; the page's fonts have them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield

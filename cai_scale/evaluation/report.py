"""The report: one HTML file with the verdict, figures, charts, and answers side by side."""

import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cai_scale.constitution import Constitution
from cai_scale.critics.halves import has_terms
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.errors import GateError
from cai_scale.evaluation import charts, table
from cai_scale.evaluation.compare import Answered
from cai_scale.records import read_json, read_jsonl, replacing
from cai_scale.runs import Run

BEST, WORST, RANDOM, SEED = 4, 3, 3, 0
CURVES = {  # what the methods log, and what to call it
    "loss": "loss",
    "rewards/margins": "reward margin",
    "lm_loss": "loss of the language model",
    "reward_loss": "loss of the reward head",
    "reward": "mean reward",
    "guard/score": "score on the guard's prompts",
}

# What a model may write and a page may not hold.
CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {9, 10, 13}, "\ufffd")

Summary = Mapping[str, Any]
Fact = tuple[str, str]


class Chart(NamedTuple):
    """What a chart is of, what draws it, and its height in inches."""

    name: str
    alt: str
    draw: charts.Draw
    height: float

    @property
    def svg(self) -> Markup:
        return Markup(charts.svg(f"chart-{self.name}", self.draw, self.height))


class Piece(NamedTuple):
    """A part of an answer; `why` names the principle and the effect of a term, "" elsewhere."""

    text: str
    why: str = ""
    up: bool = False


def write_report(
    run: Run, summary: Summary, answered: Sequence[Answered], constitution: Constitution
) -> None:
    """Write `run.report`, which refers to nothing outside itself."""
    with replacing(run.report) as file:
        file.write(page(run, summary, answered, constitution))


def page(
    run: Run, summary: Summary, answered: Sequence[Answered], constitution: Constitution
) -> str:
    """The report as HTML. What a summary does not have, the page leaves out.

    Args:
        summary: the content of `summary.json`, of a comparison or of a reward model.
        answered: none for a reward model.
    """
    environment = Environment(
        loader=PackageLoader("cai_scale.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = "delta" in summary
    drawn = _charts(run, summary, answered, constitution)
    html = environment.get_template("report.html.jinja").render(
        run=run.path.resolve().name,
        summary=summary,
        constitution=constitution,
        colours=charts.COLOURS,
        charts={chart.name: chart for chart in drawn},
        curves=[chart for chart in drawn if chart.name.startswith("training")],
        headings=table.HEADINGS,
        reward=table.REWARD,
        compared=compared,
        verdict=table.verdict(summary),
        table=table.rows(summary, constitution) if compared else [],
        beside=table.beside_rows(summary),
        slices=table.slice_rows(summary, constitution),
        drift=table.drift_rows(summary) if compared else [],
        safety=table.safety_rows(summary),
        wins=table.wins(summary) if compared else [],
        unscored=table.unscored(summary) if compared else [],
        titles=table.titles(constitution),
        samples=_samples(answered),
        marked=_marker(summary, constitution),
        audits=_audits(run),
        facts=_facts(run, summary, constitution),
    )
    return html.translate(CONTROL)


def picture(
    run: Run, summary: Summary, answered: Sequence[Answered], constitution: Constitution
) -> bytes:
    """The charts as one PNG, but for those of the slices.

    Raises:
        GateError: there is nothing to draw.
    """
    drawn = [c for c in _charts(run, summary, answered, constitution) if c.name != "slices"]
    if not drawn:
        raise GateError(f"{run.path} has no figures to draw; read them with --format json")
    title = " · ".join([*table.verdict(summary)[:1], f"{summary['method']} on {summary['model']}"])
    return charts.picture(title, [(chart.draw, chart.height) for chart in drawn])


def _charts(
    run: Run, summary: Summary, answered: Sequence[Answered], constitution: Constitution
) -> list[Chart]:
    """All for which there are figures."""
    found = list(_training(run))
    if "delta" not in summary or summary["delta"]["overall"] is None:
        return found
    names, delta = table.titles(constitution), summary["delta"]
    known = [key for key in names if delta["principles"][key] is not None]
    rows: list[charts.Estimate] = [
        *((names[key], delta["principles"][key], delta["principles_ci95"][key]) for key in known),
        ("Overall", delta["overall"], delta["ci95"]),
        *((title, p["delta"], p["ci95"]) for title, p in table.beside(summary).items()),
    ]
    means = [
        *(
            (names[key], *(summary[w]["principles"][key] for w in ("before", "after")))
            for key in known
        ),
        ("Overall", summary["before"]["overall"], summary["after"]["overall"]),
    ]
    verdicts = [(key, summary[key], summary.get(f"{key}_ci95")) for key, _ in table.SHARES]
    found = [
        Chart("delta", "Δ of the mean score by principle, with intervals",
              charts.estimates(rows, "What changed"), charts.rows_high(len(rows))),
        Chart("scores", "Mean score before and after by principle",
              charts.scores(means, "Mean scores"), charts.rows_high(len(means))),
        Chart("wins", "Wins, losses and ties with intervals",
              charts.shares(verdicts, summary["n"], "Prompt by prompt"), charts.rows_high(3)),
        *found,
    ]  # fmt: skip
    parts = table.slices(summary).items()
    by_slice = [
        (name.split(": ", 1)[1].replace("_", " "), part["delta"]["overall"], part["delta"]["ci95"])
        for name, part in parts
        if part["delta"]["overall"] is not None
    ]
    if by_slice:
        draw = charts.estimates(by_slice, "Δ overall by slice")
        found.append(Chart("slices", "Δ overall by slice", draw, charts.rows_high(len(by_slice))))
    pairs = [
        (a.before_score.overall, a.after_score.overall, _longer(a))
        for a in answered
        if a.before_score is not None and a.after_score is not None
    ]
    if pairs:
        before, after, _ = zip(*pairs, strict=True)
        points = [(longer, after - before) for before, after, longer in pairs]
        correlation = (summary.get("lengths") or {}).get("spearman")
        said = "" if correlation is None else f" (Spearman {correlation:+.2f})"
        found += [
            Chart("distributions", "How many answers have which score, before and after",
                  charts.distributions(before, after, "All answers"), 2.6),
            Chart("length", f"Δ overall against the difference in words{said}",
                  charts.against_length(points, f"Score against length{said}"), 2.9),
        ]  # fmt: skip
    return found


def _training(run: Run) -> Iterator[Chart]:
    logs = _logs(run)
    for key, label in CURVES.items():
        points = [(log["step"], log[key]) for log in logs if log.get(key) is not None]
        kept = [log["step"] for log in logs if log.get("guard/kept")] if "guard" in key else []
        if points:
            name = "training-" + key.replace("/", "-").replace("_", "-")
            draw = charts.curve(points, label, kept[-1] if kept else None)
            yield Chart(name, f"{label} over the steps of the training", draw, 2.2)


def _logs(run: Run) -> list[dict[str, Any]]:
    """The figures of the training, whose steps go on from round to round."""
    found, done = [], 0
    for number in range(1, run.rounds + 1 if run.config.is_file() else 1):
        metrics = run.trained(number).metrics
        logs = [row for _, row in read_jsonl(metrics, torn_tail=True)] if metrics.is_file() else []
        found += [{**log, "step": log["step"] + done} for log in logs]
        done = max([done, *(log["step"] for log in found)])
    return found


def _samples(answered: Sequence[Answered]) -> list[tuple[str, list[Answered]]]:
    """The prompts with the most gained, with the most lost, and some of the others by lot."""
    scored = sorted(
        (a for a in answered if a.before_score is not None and a.after_score is not None),
        key=lambda a: -gained(a),
    )
    best = [a for a in scored[:BEST] if gained(a) > 0]
    worst = [a for a in reversed(scored[-WORST:]) if gained(a) < 0]
    rest = [a for a in answered if a not in best and a not in worst]
    drawn = random.Random(SEED).sample(rest, min(RANDOM, len(rest)))
    groups = (("Most gained", best), ("Most lost", worst), ("Drawn at random", drawn))
    return [(title, group) for title, group in groups if group]


def gained(a: Answered) -> float:
    """Δ overall of a prompt whose answers both have a score."""
    assert a.before_score is not None and a.after_score is not None
    return a.after_score.overall - a.before_score.overall


def _marker(summary: Summary, constitution: Constitution) -> Any:
    """What cuts an answer into pieces: its terms, where the lexicon has scored it, and the rest."""
    if summary.get("critic") != LexiconCritic.name or not has_terms(constitution):
        return lambda text: [Piece(text)]
    critic, names = LexiconCritic(constitution), table.titles(constitution)

    def marked(text: str) -> list[Piece]:
        pieces, place = [], 0
        for found in critic.explain(text):
            why = f"{names[found.principle]} {found.effect:+.2f}"
            pieces.append(Piece(text[place : found.start]))
            pieces.append(Piece(text[found.start : found.end], why, found.effect >= 0))
            place = found.end
        return [*pieces, Piece(text[place:])]

    return marked


def _audits(run: Run) -> list[tuple[str, list[Fact]]]:
    """The figures of each round's pairs."""
    rounds = range(1, run.rounds + 1 if run.config.is_file() else 1)
    files = {number: run.round(number).audit for number in rounds}
    return [
        (f"Round {number}" if len(rounds) > 1 else "", list(_plain(read_json(file))))
        for number, file in files.items()
        if file.is_file()
    ]


def _plain(record: Mapping[str, Any], before: str = "") -> Iterator[Fact]:
    """A record's figures by their names; what a part holds, after its name."""
    for key, value in record.items():
        name = before + key.replace("_", " ")
        if isinstance(value, Mapping):
            yield from _plain(value, f"{name}: ")
        elif isinstance(value, float):
            yield name, f"{value:.3f}"
        elif key != "schema":
            yield name, f"{value:,}" if isinstance(value, int) else str(value)


def _facts(run: Run, summary: Summary, constitution: Constitution) -> list[tuple[str, list[Fact]]]:
    """Where the figures come from, in groups."""
    config = read_json(run.config) if run.config.is_file() else {}
    bundles = read_json(run.bundles)["bundles"] if run.bundles.is_file() else {}
    hashes = {
        f"constitution {constitution.name}": summary["constitution"],
        **config.get("weights", {}),
        **{f"{kind} prompts": value for kind, value in config.get("prompts", {}).items()},
        **{f"bundle {when}": bundle["sha256"] for when, bundle in bundles.items()},
    }
    chosen = {key: config.get("settings", {}).get(key) for key in ("seed", "ds_config")}
    how = {
        "started": config.get("started"),
        "critic of the training": summary.get("trained_on"),
        "critic of the evaluation": summary.get("critic"),
        "seed of the training": chosen["seed"],
        "seeds of the evaluation": ", ".join(map(str, summary.get("seeds", []))),
        **{key.replace("_", " "): value for key, value in summary.get("decoding", {}).items()},
        "precision": _reasoned(config.get("precision")),
        "sampler": _reasoned(config.get("sampler")),
        "DeepSpeed": chosen["ds_config"],
        "ranks": config.get("ranks", {}).get("world"),
        **config.get("hardware", {}),
    }
    cost = {
        **{name: f"{seconds:,.0f} s" for name, seconds in summary["seconds"].items()},
        "all stages": f"{sum(summary['seconds'].values()):,.0f} s",
        "tokens sampled to train on": _count(summary.get("sampled_tokens")),
        "parameters trained": _count(summary.get("trained_parameters")),
        "memory at most": _gigabytes(summary.get("peak_memory_bytes")),
        **_judged(run, config.get("settings", {}).get("judge_prices")),
    }
    groups = {
        "SHA-256": hashes,
        "How": how,
        "Versions": config.get("versions", {}),
        "Cost": cost,
    }
    given = {
        title: [(key, str(value)) for key, value in facts.items() if value not in (None, "", [])]
        for title, facts in groups.items()
    }
    return [(title, facts) for title, facts in given.items() if facts]


def _judged(run: Run, prices: Sequence[float] | None) -> dict[str, str]:
    """What the judge was asked and what it cost, by its journals; nothing where there was none."""
    try:
        spent = [_spent(journal) for journal in run.all_labels()]
    except sqlite3.Error as error:
        return {"judge's cost": f"its journal cannot be read ({error})"}
    if not spent:
        return {}
    calls, read, written = map(sum, zip(*spent, strict=True))
    money = (prices[0] * read + prices[-1] * written) / 1e6 if prices else None
    return {
        "judge's replies": f"{calls:,}",
        "judge's tokens, read and written": f"{read:,} and {written:,}",
        **({} if money is None else {"judge's cost": f"{money:.4g}"}),
    }


def _spent(journal: Path) -> tuple[int, ...]:
    """Replies, tokens read and tokens written, by a journal that is only read."""
    # A reader of a journal that nobody writes would leave two files beside it.
    written = journal.with_name(f"{journal.name}-wal").exists()
    address = f"{journal.resolve().as_uri()}?{'mode=ro' if written else 'immutable=1'}"
    with closing(sqlite3.connect(address, uri=True)) as connection:
        sums = "SELECT total(calls), total(tokens_in), total(tokens_out) FROM verdicts"
        return tuple(map(int, connection.execute(sums).fetchone()))


def _reasoned(choice: Mapping[str, str] | None) -> str:
    return f"{choice['name']} ({choice['reason']})" if choice else ""


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB"


def _longer(a: Answered) -> int:
    """How many words the answer after has more than that before."""
    return len(a.after.text.split()) - len(a.before.text.split())

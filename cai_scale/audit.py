"""`cai-scale audit`: are these pairs fit to train on? No torch, unless a critic needs it."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_scale import constitution as constitutions
from cai_scale import runs
from cai_scale.commands import Parser
from cai_scale.constitution import Constitution
from cai_scale.critics import LEXICONS, flags
from cai_scale.errors import ConfigError, MissingError
from cai_scale.preferences.audit import audit_again
from cai_scale.preferences.labelled import read_labelled
from cai_scale.preferences.limits import LIMITS, Finding, judge, require_sound, shown
from cai_scale.records import read_json
from cai_scale.runs import Run
from cai_scale.terminal import coloured, wrapped

NOBODY = "none"
COUNTS = ("languages", "gains", "dropped", "unpaired", "revisions", "agreements")
FIGURES = (
    *("mean_gap", "chosen_words", "rejected_words", "longer_by_mean", "longer_by_median"),
    *("chosen_revised", "rejected_revised"),
)
LEVELS = {"ok": "green", "warn": "yellow", "refuse": "red", "–": "dim"}


def main(arguments: Sequence[str]) -> int:
    """`cai-scale audit [--run DIR | --pairs FILE]`."""
    parser = Parser(
        prog="cai-scale audit",
        description="Check pairs before training on them: whether they teach length or the "
        "temperature, whether a critic reverses their labels, how many labels there were none of "
        "and why. The training does the same. Exit code 1 where a figure is refused.",
        epilog="A share warns beyond its limit from 20 cases on; it refuses where the nearer end "
        "of its 95 % Wilson interval is beyond.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", type=Path, help="a run's folder (default: the newest finished)")
    source.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE",
        help="a run's pairs.jsonl, or JSON Lines with prompt, chosen and rejected",
    )
    parser.add_argument("--round", type=int, help="of a run with several rounds (default: 1)")
    parser.add_argument(
        "--critic",
        help="counts the labels that it reverses: as in training, or none (default: the lexicon, "
        "and none for a run whose critic was another)",
    )
    parser.add_argument(
        "--constitution", help="a YAML file (default: the run's; the bundled one for a file)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags.add(parser)
    options = parser.parse_args(arguments)
    source_of = _of_run if options.pairs is None else _of_file
    path, figures, constitution, name = source_of(options)
    pairs = read_labelled(path)
    critic = None if name == NOBODY else flags.load(name, options, constitution)
    figures = audit_again(figures, pairs, critic)
    findings = judge(figures)
    if options.json:
        print(as_json(path, name, figures, findings))
    else:
        print(as_text(path, figures, findings))
    require_sound(findings, "or train on them all the same with --audit warn")
    return 0


def as_json(
    path: Path, critic: str, figures: Mapping[str, Any], findings: Sequence[Finding]
) -> str:
    """All figures, and the level of each that has a limit."""
    levels = {finding.limit.figure: finding.level for finding in findings}
    found = {"pairs": str(path), "critic": critic, "figures": figures, "levels": levels}
    return json.dumps(found, ensure_ascii=False, indent=2)


def as_text(path: Path, figures: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """The figures as a table for a terminal, and what is to be said about those beyond a limit."""
    lines = [coloured(f"{figures['pairs']} pairs: {path}", "bold")]
    for name in COUNTS:
        if figures.get(name):
            counts = ", ".join(f"{key} {_number(value)}" for key, value in figures[name].items())
            lines.append(wrapped(counts, f"  {name:<16}  ", " " * 20))
    for name in FIGURES:
        if figures.get(name) is not None:
            lines.append(f"  {name:<16}  {_number(figures[name])}")
    lines += ["", _row("", "share", "of", "warned", "refused", "")]
    found = {finding.limit.figure: finding for finding in findings}
    for limit in LIMITS:
        finding = found.get(limit.figure)
        share, of = (_number(finding.value), str(finding.of)) if finding else ("–", "–")
        level = finding.level if finding else "–"
        bounds = shown(limit.warn), shown(limit.refuse)
        lines.append(_row(limit.figure, share, of, *bounds, level))
    for level in ("warn", "refuse"):
        for finding in findings:
            if finding.level == level:
                lines += ["", wrapped(finding.text)]
    return "\n".join(lines)


# The file of the pairs, what is known of their making, and the critic that is asked again.
Source = tuple[Path, dict[str, Any], Constitution, str]


def _of_run(options: argparse.Namespace) -> Source:
    run = Run(options.run) if options.run else runs.newest(runs.ROOT, finished=True)
    if not run.config.is_file():
        raise MissingError(f"{run.path} holds no run; name the folder of one with --run")
    number = 1 if options.round is None else options.round
    if not 1 <= number <= run.rounds:
        raise ConfigError(f"--round {number}: {run.path} has rounds 1 to {run.rounds}")
    files = run.round(number)
    if not files.pairs.is_file():
        raise MissingError(
            f"{run.path} has no pairs in round {number}; make them with 'cai-scale collect', or "
            f"name another run"
        )
    if options.constitution:
        constitution = constitutions.load(options.constitution)
    else:
        constitution = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    own = critic if (critic := run.settings()["critic"]) in LEXICONS else NOBODY
    return files.pairs, read_json(files.audit), constitution, options.critic or own


def _of_file(options: argparse.Namespace) -> Source:
    if options.round is not None:
        raise ConfigError("--round belongs to a run; leave it out with --pairs")
    constitution = constitutions.load(options.constitution)
    return options.pairs, {"schema": 1}, constitution, options.critic or "lexicon"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _row(name: str, share: str, of: str, warned: str, refused: str, level: str) -> str:
    state = coloured("REFUSE" if level == "refuse" else level, LEVELS.get(level, "bold"))
    return f"  {name:<16}  {share:>6}  {of:>6}  {warned:<18}  {refused:<18}  {state}".rstrip()

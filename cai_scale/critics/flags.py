"""The critic of a command that asks one outside a run, by its name and the flags of a judge."""

import argparse
from pathlib import Path

from cai_scale import config
from cai_scale.commands import Parser
from cai_scale.constitution import Constitution
from cai_scale.critics import Comparer, Critic, judge, load_critic


def add(parser: Parser) -> None:
    """Add the flags of a judge: `--judge_…` and `--journal`."""
    config.add_flags(parser, "judge_")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="keep a judge's verdicts there, so that none is paid for twice",
    )


def load(name: str, options: argparse.Namespace, constitution: Constitution) -> Critic | Comparer:
    """The critic of that name; a judge by the flags.

    Raises:
        CaiError: there is none, or the flags do not fit.
    """
    given = {key: value for key, value in vars(options).items() if key.startswith("judge_")}
    settings = config.from_dict({"critic": name, **given}, "flags")
    if not settings.judged:
        return load_critic(name, constitution)
    judge.check(settings.judge)
    asked = judge.load(constitution, settings.judge, journal=options.journal)
    if settings.labels_pairs:
        return asked
    return load_critic(name, constitution, judge=asked)

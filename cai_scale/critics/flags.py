"""The critic of a command that asks one outside a run: `--critic`, `--judge_…`, `--journal`."""

import argparse
from pathlib import Path

from cai_scale import config
from cai_scale.commands import Parser
from cai_scale.constitution import Constitution
from cai_scale.critics import NAMES, Comparer, Critic, judge, load_critic


def add(parser: Parser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--critic",
        default="lexicon",
        help=f"{', '.join(NAMES)}, or several with weights (default: %(default)s)",
    )
    parser.add_argument("--constitution", help="a YAML file (default: the bundled one)")
    config.add_flags(parser, "judge_")
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="keep a judge's verdicts there, so that none is paid for twice",
    )


def load(options: argparse.Namespace, constitution: Constitution) -> Critic | Comparer:
    """The critic that the flags name.

    Raises:
        CaiError: there is none, or the flags do not fit.
    """
    given = {name: value for name, value in vars(options).items() if name.startswith("judge_")}
    settings = config.from_dict({"critic": options.critic, **given}, "flags")
    if not settings.judged:
        return load_critic(options.critic, constitution)
    judge.check(settings.judge)
    asked = judge.load(constitution, settings.judge, journal=options.journal)
    if settings.labels_pairs:
        return asked
    return load_critic(options.critic, constitution, judge=asked)

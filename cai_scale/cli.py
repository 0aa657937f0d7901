"""`cai-scale`: every stage as a command. The training commands are the launcher's own code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cai_scale.commands import Parser, one_line, require
from cai_scale.errors import ConfigError, MissingError


def train_parser(prog: str) -> Parser:
    """The flags of the main job."""
    from cai_scale import config

    parser = Parser(
        prog=prog,
        description="Align a model to a constitution: sample answers, revise and score them, build "
        "pairs, train, and evaluate on held-out prompts. Bare, it runs DPO on the default model "
        "with the bundled prompts. A run that was stopped continues with --resume; 'cai-scale "
        "collect' and 'cai-scale train' stop after their stage; 'cai-scale evaluate --bundle A "
        "--against B' compares two bundles.",
        epilog="example: deepspeed --num_accelerators 2 launch/train.py --ds_config zero2.json",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, help="the run's folder (default: runs/TIME-METHOD)")
    parser.add_argument("--recipe", help="a YAML file of settings, by path or bundled name")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --output, or the newest unfinished one, with its own settings",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove what --output holds first")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed passes it
    config.add_flags(parser)
    return parser


@one_line
def train(arguments: Sequence[str] | None = None) -> int:
    """The main job, as `launch/train.py` starts it: every stage."""
    return _run(train_parser("launch/train.py"), arguments, "evaluate")


def _run(parser: Parser, arguments: Sequence[str] | None, until: str) -> int:
    from cai_scale import config as settings
    from cai_scale import runs

    flags = vars(parser.parse_args(arguments))
    output, overwrite, resume = flags.pop("output"), flags.pop("overwrite"), flags.pop("resume")
    recipe = flags.pop("recipe")
    flags.pop("local_rank")
    values: dict[str, Any] = {}
    source = "flags"
    if resume and overwrite:
        raise ConfigError("--resume keeps what --overwrite removes; give one of them")
    if resume:
        run = runs.Run(output) if output else runs.newest(runs.ROOT, finished=False)
        if not run.config.is_file():
            raise MissingError(
                f"--resume: {run.path} holds no run; leave --resume out to start one"
            )
        output, source = run.path, str(run.config)
        values |= run.settings()
    if recipe is not None:
        values, source = values | settings.read_recipe(recipe), f"recipe {recipe}"
    config = settings.from_dict(values | flags, source)

    require("training", "train", "torch", "transformers", "trl", "peft", "datasets", "rich")
    from cai_scale import job, pipeline, ranks

    try:
        pipeline.execute(job.start(config, output, overwrite=overwrite), until)
    finally:
        ranks.leave()
    return 0


def _collect(arguments: Sequence[str]) -> int:
    return _run(train_parser("cai-scale collect"), arguments, "collect")


def _train(arguments: Sequence[str]) -> int:
    return _run(train_parser("cai-scale train"), arguments, "train")


def _evaluate(arguments: Sequence[str]) -> int:
    from cai_scale import evaluate

    if any(argument.split("=")[0] in evaluate.FLAGS for argument in arguments):
        return evaluate.main(arguments)
    return _run(train_parser("cai-scale evaluate"), arguments, "evaluate")


def _report(arguments: Sequence[str]) -> int:
    from cai_scale import report

    return report.main(arguments)


def _constitution(arguments: Sequence[str]) -> int:
    from cai_scale import constitution as constitutions
    from cai_scale.critics.lexicon import LexiconCritic

    parser = Parser(prog="cai-scale constitution", description="Show or check a constitution.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    show = commands.add_parser("show", help="print what a file says, in words")
    show.add_argument("file", nargs="?", help="a YAML file (default: the bundled one)")
    check = commands.add_parser("check", help="check a file and print its hash")
    check.add_argument("file", help="a YAML file")
    options = parser.parse_args(arguments)
    constitution = constitutions.load(options.file)
    if options.command == "show":
        for principle in constitution.principles:
            print(f"{principle.id} (weight {principle.weight:g})")
            for language in constitution.languages:
                title, statement = principle.title[language], principle.statement[language]
                print(f"  {language}  {title}: {statement}")
            print(f"  starts at {principle.lexicon.start:g}")
            for item in principle.lexicon.lists:
                counts = ", ".join(f"{len(terms)} {lang}" for lang, terms in item.terms.items())
                print(f"  {item.effect:+g} for each of the {item.id} terms ({counts})")
    LexiconCritic(constitution)  # refuses a term that stands in two lists
    print(f"{constitution.name}: sha256 {constitution.sha256}")
    return 0


def _generate(arguments: Sequence[str]) -> int:
    from cai_scale.runtime.answer import generate

    return generate(arguments)


def _score(arguments: Sequence[str]) -> int:
    from cai_scale.runtime.score import score

    return score(arguments)


def _compare(arguments: Sequence[str]) -> int:
    from cai_scale import compare

    return compare.main(arguments)


def _judge_eval(arguments: Sequence[str]) -> int:
    from cai_scale import judge_eval

    return judge_eval.main(arguments)


def _audit(arguments: Sequence[str]) -> int:
    from cai_scale import audit

    return audit.main(arguments)


def _verify(arguments: Sequence[str]) -> int:
    from cai_scale import verify

    return verify.main(arguments)


def _trace(arguments: Sequence[str]) -> int:
    from cai_scale import trace

    return trace.main(arguments)


def _serve(arguments: Sequence[str]) -> int:
    from cai_scale.runtime.serve import command

    return command.serve(arguments)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "collect": (_collect, "sample, revise and score answers, and build pairs"),
    "audit": (_audit, "check pairs before training on them"),
    "train": (_train, "the same, and train on the pairs"),
    "evaluate": (_evaluate, "the same, and evaluate and report: the whole main job"),
    "compare": (_compare, "run several methods from the same start, and put them side by side"),
    "judge-eval": (_judge_eval, "how well a critic agrees with labelled pairs"),
    "report": (
        _report,
        "print a finished run's figures again, or write them as a page or a picture",
    ),
    "constitution": (_constitution, "show or check a constitution"),
    "verify": (_verify, "check a run or a bundle, link by link: files, pairs, scores, figures"),
    "trace": (_trace, "show one prompt's way through a run"),
    "generate": (_generate, "answer a prompt with an exported bundle, without torch"),
    "score": (_score, "score answers with an exported bundle, without torch"),
    "serve": (_serve, "answer and score over HTTP with an exported bundle, without torch"),
}


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """`cai-scale COMMAND …`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = Parser(
        prog="cai-scale",
        description="Align a language model to a written constitution.",
        epilog=f"commands:\n{lines}\n\nEach has its own --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cai-scale COMMAND [flags]",
    )
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    if not arguments:
        parser.print_help()
        return 2
    command = parser.parse_args(arguments[:1]).command
    if command not in COMMANDS:
        raise ConfigError(f"unknown command {command!r}; choose one of: {', '.join(COMMANDS)}")
    return COMMANDS[command][0](arguments[1:])


if __name__ == "__main__":
    sys.exit(main())

"""`cai-scale`: every stage as a command. The training commands are the launcher's own code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from cai_scale.errors import ConfigError, MissingError, one_line


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see '{self.prog} --help'")


def train_parser(prog: str) -> Parser:
    """The flags of the main job."""
    from cai_scale import config

    parser = Parser(
        prog=prog,
        description="Align a model to a constitution: sample answers, revise and score them, build "
        "pairs, train, and evaluate on held-out prompts. Bare, it runs DPO on the default model "
        "with the bundled prompts. A run that was stopped continues with --resume.",
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
def train(arguments: Sequence[str] | None = None, prog: str = "launch/train.py") -> int:
    """The main job, as `launch/train.py` and `cai-scale train` start it."""
    return _run(train_parser(prog), arguments, "evaluate")


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
    if recipe:
        values, source = values | settings.read_recipe(recipe), f"recipe {recipe}"
    config = settings.from_dict(values | flags, source)

    require("training", "train", "torch", "transformers", "trl", "peft", "datasets", "rich")
    from cai_scale import pipeline
    from cai_scale.training import ranks

    try:
        pipeline.execute(pipeline.start(config, output, overwrite=overwrite), until)
    finally:
        ranks.leave()
    return 0


def require(command: str, extra: str, *libraries: str) -> None:
    """Complain about a library that a command needs, without importing it.

    Raises:
        MissingError: it is not installed; the message names the extra that brings it.
    """
    for library in libraries:
        if find_spec(library) is None:
            raise MissingError(
                f"{command} needs {library}, which is not installed; "
                f"pip install 'cai-scale[{extra}]'"
            )


def _collect(arguments: Sequence[str]) -> int:
    return _run(train_parser("cai-scale collect"), arguments, "collect")


def _train(arguments: Sequence[str]) -> int:
    return _run(train_parser("cai-scale train"), arguments, "evaluate")


def _evaluate(arguments: Sequence[str]) -> int:
    parser = Parser(prog="cai-scale evaluate", description="Evaluate a trained run once more.")
    _add_run(parser)
    run = _finished_or_named(parser.parse_args(arguments).run)
    for file in (run.summary, run.evaluation("after")):
        file.unlink(missing_ok=True)
    return _run(
        train_parser("cai-scale evaluate"), ["--output", str(run.path), "--resume"], "evaluate"
    )


def _report(arguments: Sequence[str]) -> int:
    from cai_scale import constitution as constitutions
    from cai_scale.records import read_json

    parser = Parser(prog="cai-scale report", description="Print a finished run's table again.")
    _add_run(parser)
    run = _finished_or_named(parser.parse_args(arguments).run)
    from cai_scale.evaluation.table import print_summary

    constitution = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    print_summary(read_json(run.summary), constitution)
    print(f"report: {run.report}")
    return 0


def _add_run(parser: Parser) -> None:
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest finished)")


def _finished_or_named(path: Path | None) -> Any:
    from cai_scale import runs

    if path is None:
        return runs.newest(runs.ROOT, finished=True)
    run = runs.Run(path)
    if not run.finished:
        raise MissingError(f"{path} holds no finished run; name one, or finish it with --resume")
    return run


def _constitution(arguments: Sequence[str]) -> int:
    from cai_scale import constitution as constitutions

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
    print(f"{constitution.name}: sha256 {constitution.sha256}")
    return 0


def _generate(arguments: Sequence[str]) -> int:
    from cai_scale.runtime import cli

    return cli.generate(arguments)


def _score(arguments: Sequence[str]) -> int:
    from cai_scale.runtime import cli

    return cli.score(arguments)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "collect": (_collect, "sample, revise and score answers, and build pairs"),
    "train": (_train, "the main job: collect, train, evaluate, report"),
    "evaluate": (_evaluate, "evaluate a trained run once more"),
    "report": (_report, "print a finished run's table again"),
    "constitution": (_constitution, "show or check a constitution"),
    "generate": (_generate, "answer a prompt with an exported bundle, without torch"),
    "score": (_score, "score answers with an exported bundle, without torch"),
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

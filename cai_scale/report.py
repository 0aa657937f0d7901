"""`cai-scale report`: a finished run's figures again: text, data, page or picture. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_scale import constitution as constitutions
from cai_scale import prompts as prompt_files
from cai_scale import results, runs
from cai_scale.commands import Parser, require
from cai_scale.constitution import Constitution
from cai_scale.critics.lexicon import LexiconCritic
from cai_scale.critics.remembered import Remembered
from cai_scale.errors import ConfigError
from cai_scale.evaluation import measures
from cai_scale.evaluation.compare import Answered
from cai_scale.evaluation.table import markdown, print_summary
from cai_scale.records import Response, json_text, read_json, read_records, replacing
from cai_scale.replay import Stored
from cai_scale.runs import Run

Summary = Mapping[str, Any]

FORMATS = ("html", "md", "json", "png")


def main(arguments: Sequence[str]) -> int:
    """`cai-scale report [--run DIR] [--format html|md|json|png] [--output FILE]`."""
    parser = Parser(
        prog="cai-scale report",
        description="Print a finished run's table again and name its page; or write its figures "
        "in another form.",
        epilog="The page was written by the run, and is part of what 'cai-scale verify' checks: "
        "with --output it is written anew, to another file.",
    )
    parser.add_argument("--run", type=Path, help="a run's folder (default: the newest finished)")
    parser.add_argument(
        "--format", choices=FORMATS, default="html", help="png: the charts (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write to (default: md and json to standard output, png to report.png)",
    )
    options = parser.parse_args(arguments)
    run, output = runs.finished(options.run), options.output
    _check_output(output, run)
    require("the report", "report", "matplotlib", "rich")
    summary = read_json(run.summary)
    constitution = constitutions.from_dict(read_json(run.constitution), str(run.constitution))
    if options.format == "html" and output is None:
        _show(run, summary, constitution)
    elif options.format in ("html", "png"):
        _write_drawn(run, summary, constitution, output or Path("report.png"), options.format)
    else:
        text = json_text(summary) if options.format == "json" else markdown(summary, constitution)
        _write(text, output)
    return 0


def stored(run: Run, summary: Summary, constitution: Constitution) -> list[Answered]:
    """The held-out answers of a run with their stored scores and measures; none of a run that
    trained a reward model.

    Raises:
        GateError: a critic other than the lexicon gave the scores, and one of them is missing.
    """
    files = {when: run.evaluation(when) for when in ("before", "after")}
    if "delta" not in summary:
        return []
    prompts = prompt_files.load(str(run.prompts("heldout")))
    before, after = (read_records(file, lambda r: Response(**r)) for file in files.values())
    critic = (
        LexiconCritic(constitution)
        if summary["critic"] == LexiconCritic.name
        else Remembered(Stored(), run.evaluation("scores"))
    )
    file = run.evaluation("measures")
    measured = measures.read(file, prompts) if file.is_file() else None
    return results.answered(critic, prompts, before, after, measured)


def _show(run: Run, summary: Summary, constitution: Constitution) -> None:
    from cai_scale.evaluation.rewards import print_rewards

    if "reward" in summary:
        print_rewards(summary["reward"])
    else:
        print_summary(summary, constitution)
    if run.report.is_file():
        print(f"report: {run.report}")


def _write_drawn(
    run: Run, summary: Summary, constitution: Constitution, output: Path, form: str
) -> None:
    from cai_scale.evaluation import report

    answered = stored(run, summary, constitution)
    if form == "png":
        output.write_bytes(report.picture(run, summary, answered, constitution))
    else:
        _write(report.page(run, summary, answered, constitution), output)
    print(f"report: {output}")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        print(text, end="")
        return
    with replacing(output) as file:
        file.write(text)


def _check_output(output: Path | None, run: Run) -> None:
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file")
    if output is not None and output.resolve() in (run.report.resolve(), run.summary.resolve()):
        raise ConfigError(f"--output {output} is what the run wrote; name another file")

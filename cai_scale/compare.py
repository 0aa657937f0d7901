"""`cai-scale compare`: several methods from the same start, side by side.

The source compares RLAIF with DPO. Here every method gets the same model, prompts, seed and
budget: it may sample `--samples` answers to each of `--steps` × `--batch_size` prompts, and takes
`--steps` steps. Each runs in a process of its own, so that its memory is its own too.
"""

import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_scale import config as settings
from cai_scale import constitution as constitutions
from cai_scale import methods
from cai_scale import prompts as prompt_files
from cai_scale.commands import Parser, require
from cai_scale.config import Config
from cai_scale.constitution import Constitution
from cai_scale.errors import ConfigError, GateError, MissingError
from cai_scale.records import read_json, write_json, write_jsonl
from cai_scale.runs import Run

if TYPE_CHECKING:
    pass

# A reward model gives no answers, so there is nothing to put beside the others'.
METHODS = tuple(name for name in methods.NAMES if name != "reward")
STEPS, SAMPLES = 16, 4
Summaries = Mapping[str, Mapping[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """`cai-scale compare --methods rlaif,dpo,grpo`."""
    parser = Parser(
        prog="cai-scale compare",
        description="Run several methods from the same start and put them side by side: scores by "
        "principle, wins, parameters, time, memory, tokens. Each may sample --samples answers to "
        "each of --steps times --batch_size prompts, and takes --steps steps. What is finished "
        "in --output is not run again.",
        epilog="example: cai-scale compare --methods rlaif,dpo,grpo --output runs/compare",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods", default="rlaif,dpo,grpo", help="of " + ", ".join(METHODS) + " (default: "
        "%(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare"), help="a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=int, help="start this many ranks of each with the deepspeed launcher"
    )
    settings.add_flags(parser)
    flags = vars(parser.parse_args(arguments))
    output, ranks = flags.pop("output"), flags.pop("ranks")
    names = _names(flags.pop("methods"))
    if "method" in flags:
        raise ConfigError(f"--method {flags['method']}: name the methods with --methods")
    given = {"steps": STEPS, "samples": SAMPLES, **flags}
    budgets = {name: settings.from_dict(given | {"method": name}, "flags") for name in names}
    require("comparing", "train", "torch", "transformers", "trl", "peft", "rich", "matplotlib")
    prompts = _prompts(next(iter(budgets.values())), output)
    summaries = {}
    for name in names:
        run = Run(output / name)
        if not run.finished:
            print(f"{name} …", flush=True)
            _start(run, {**given, "method": name, "prompts": str(prompts)}, ranks)
        summaries[name] = read_json(run.summary)
    constitution = constitutions.from_dict(
        read_json(Run(output / names[0]).constitution), "constitution.json"
    )
    _check_same_start([Run(output / name) for name in names])
    _print(summaries, constitution)
    write_json(output / "compare.json", summaries)
    plot(summaries, constitution, output / "compare.png")
    print(f"figures: {output / 'compare.json'}, {output / 'compare.png'}")
    return 0


def rows(summaries: Summaries, constitution: Constitution) -> list[tuple[str, ...]]:
    """The table's lines: a title, and a figure for each method."""

    def line(title: str, figure: Any) -> tuple[str, ...]:
        return (title, *(figure(summary) for summary in summaries.values()))

    def moved(before: float | None, after: float | None, delta: float | None) -> str:
        if before is None or after is None or delta is None:
            return "–"
        return f"{before:.4f} → {after:.4f} ({delta:+.4f})"

    def principle(name: str) -> Any:
        return lambda s: moved(*(s[k]["principles"][name] for k in ("before", "after", "delta")))

    def interval(summary: Mapping[str, Any]) -> str:
        ends = summary["delta"]["ci95"]
        return "[{:+.4f}, {:+.4f}]".format(*ends) if ends else "–"

    language = constitution.languages[0]
    return [
        *(line(p.title[language], principle(p.id)) for p in constitution.principles),
        line("Overall", lambda s: moved(*(s[k]["overall"] for k in ("before", "after", "delta")))),
        line("95 % interval of Δ", interval),
        line("Wins / losses / ties", lambda s: f"{s['win']} / {s['loss']} / {s['tie']}"),
        line("Words per answer", lambda s: _words(s["drift"])),
        line("Trained parameters", lambda s: f"{s['trained_parameters']:,}"),
        line("Sampled tokens", lambda s: f"{s['sampled_tokens']:,}"),
        line("Seconds, all stages", lambda s: f"{sum(s['seconds'].values()):.0f}"),
        line("Seconds of training", lambda s: f"{_training(s['seconds']):.0f}"),
        line("Peak memory, GB", lambda s: f"{s['peak_memory_bytes'] / 1e9:.2f}"),
    ]


def plot(summaries: Summaries, constitution: Constitution, path: Path) -> None:
    """Δ of every principle and overall, with its interval, and wins, losses and ties."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    scores, wins = figure.subplots(1, 2, width_ratios=(2, 1))
    names = [*(p.id for p in constitution.principles), "overall"]
    width = 0.8 / len(summaries)
    for index, (method, summary) in enumerate(summaries.items()):
        delta = {**summary["delta"]["principles"], "overall": summary["delta"]["overall"]}
        ends = {**summary["delta"]["principles_ci95"], "overall": summary["delta"]["ci95"]}
        values = [delta[name] or 0.0 for name in names]
        errors = [
            [value - (ends[name] or [value])[0] for name, value in zip(names, values, strict=True)],
            [
                (ends[name] or [value])[-1] - value
                for name, value in zip(names, values, strict=True)
            ],
        ]
        places = [place + (index + 0.5) * width - 0.4 for place in range(len(names))]
        scores.bar(places, values, width, yerr=errors, capsize=2, label=method)
    scores.axhline(0, color="black", linewidth=0.8)
    scores.set_xticks(range(len(names)), names)
    scores.set_ylabel("Δ of the mean score")
    scores.legend()
    left = [0] * len(summaries)
    for key, colour in (("win", "tab:green"), ("tie", "tab:grey"), ("loss", "tab:red")):
        counts = [summary[key] for summary in summaries.values()]
        wins.barh(list(summaries), counts, left=left, color=colour, label=key)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    wins.set_xlabel("held-out prompts")
    wins.invert_yaxis()
    wins.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path, dpi=150)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or len(set(names)) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"--methods {text}: expected two or more, each once, of {', '.join(METHODS)}"
        )
    return names


def _prompts(config: Config, output: Path) -> Path:
    """The prompts that every method has: as many as the budget allows, drawn by the seed."""
    found, count = prompt_files.load(config.prompts), (config.steps or 1) * config.batch_size
    if len(found) < count:
        raise ConfigError(
            f"--steps {config.steps} with --batch_size {config.batch_size} need {count} prompts, "
            f"{config.prompts} has {len(found)}; lower one of them, or bring more prompts"
        )
    chosen = {prompt.id for prompt in random.Random(config.seed).sample(found, count)}
    path = output / "prompts.jsonl"
    write_jsonl(path, [prompt for prompt in found if prompt.id in chosen])
    return path


def _start(run: Run, values: Mapping[str, Any], ranks: int | None) -> None:
    """Run one method to its end; a run that was stopped continues."""
    module = ["--module", "cai_scale.launch.train"]
    launcher = ["-m", "cai_scale.launch.train"]
    if ranks is not None:
        launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), *module]
    command = [sys.executable, *launcher, "--output", str(run.path), *_flags(values)]
    code = subprocess.run(command, check=False).returncode
    if code or not run.finished:
        raise GateError(f"{values['method']} ended with exit code {code}; {run.path} continues")


def _flags(values: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def _check_same_start(runs: Sequence[Run]) -> None:
    """The answers before are the same file in all runs, or they did not start alike."""
    contents = {run.evaluation("before").read_bytes() for run in runs}
    if len(contents) > 1:
        raise MissingError(
            f"the runs in {runs[0].path.parent} answered differently before they were trained; "
            f"choose another --output and compare anew"
        )


def _print(summaries: Summaries, constitution: Constitution) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(summaries.values()))
    table: Table = Table(title=escape(f"{first['model']}, {first['n']} held-out prompts"))
    for column in ("", *summaries):
        table.add_column(column, justify="right" if column else "left")
    for row in rows(summaries, constitution):
        table.add_row(*map(escape, row))
    Console(width=max(100, 34 * (len(summaries) + 1))).print(table)


def _words(drift: Mapping[str, Any]) -> str:
    return f"{drift['before']['words']:.1f} → {drift['after']['words']:.1f}"


def _training(seconds: Mapping[str, float]) -> float:
    return sum(value for stage, value in seconds.items() if stage.split(" ")[0] == "train")
